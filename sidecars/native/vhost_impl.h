/* Shared by vhost*.c. */
#ifndef MC_VHOST_IMPL_H
#define MC_VHOST_IMPL_H

#include "vhost.h"

struct queue {
	struct mc_vq vq;
	bool attached;
	int call_fd, error_fd;
	struct mc_vhost_account *account;	/* own, or memory that outlives us */
	struct mc_vhost_account own;
};

struct mc_vhost {
	uint32_t n;
	int ep, stop_fd, wake_fd;
	int watched[2];
	struct queue q[];
};

/* Brings the account up to what the rings say now. */
void mc_vhost_heads_look(struct queue *q);

#endif
