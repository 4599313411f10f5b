/* Shared by vhost*.c. */
#ifndef MC_VHOST_IMPL_H
#define MC_VHOST_IMPL_H

#include "vhost.h"

struct queue {
	struct mc_vq vq;
	bool attached;
	int call_fd, error_fd;
	/* The account: what was seen of the rings, and which heads are with the backend. */
	bool lost;			/* too much happened unseen */
	uint16_t avail_seen, used_seen;
	uint64_t number;		/* of the next avail entry, counted on without end */
	uint64_t last[MC_MAX_QUEUE_SIZE];	/* number of the entry that made this head available the last time */
	int16_t with[MC_MAX_QUEUE_SIZE];	/* 1: the backend has this head */
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
