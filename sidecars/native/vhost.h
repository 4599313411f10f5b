/*
 * The rings of a device whose backend is another program's (vhost-user): that one walks them and waits for the guest's
 * kicks by itself. What is left to do here is what it cannot: virtio-mmio's InterruptStatus must be set before the
 * irqfd is signalled, so the backend signals an eventfd of ours, and this loop passes it on.
 *
 * It also keeps account of which heads are with the backend, by what the rings say each time, so that the requests which
 * a dead backend took with it can be given to the next one. One thread runs mc_vhost_next() and all that it says nothing
 * of; mc_vhost_wake() and mc_vhost_stop() may be called by others meanwhile.
 */
#ifndef MC_VHOST_H
#define MC_VHOST_H

#include "inflight.h"
#include "virtqueue.h"

#define MC_VHOST_MAX_QUEUES 64
#define MC_VHOST_ACCOUNT sizeof(struct mc_vhost_account)

/* Why mc_vhost_next() returned. */
enum mc_vhost_event {
	MC_VHOST_STOPPED,
	MC_VHOST_WOKEN,
	MC_VHOST_CONNECTION,	/* a descriptor of mc_vhost_watch() is readable, or its other end is gone */
	MC_VHOST_TIMEOUT,
	MC_VHOST_BROKEN,	/* the backend gave up a queue, whose vq.error is set now */
};

struct mc_vhost;

/* Of one queue: what was seen of its rings, and which heads are with the backend. It may outlive the process, which can
 * be killed anywhere: `busy` then says that it was in the middle. All of it is bounded when it is used. */
struct mc_vhost_account {
	uint32_t busy;
	uint32_t lost;			/* too much happened unseen */
	uint16_t avail_seen, used_seen;
	uint64_t number;		/* of the next avail entry, counted on without end */
	uint64_t last[MC_MAX_QUEUE_SIZE];	/* number of the entry that made this head available the last time */
	int16_t with[MC_MAX_QUEUE_SIZE];	/* 1: the backend has this head */
};

_Static_assert(sizeof(struct mc_vhost_account) <= MC_KEEP_QUEUE, "it lies where other kinds have their in-flight region");

/* n queues. NULL with errno. */
struct mc_vhost *mc_vhost_new(uint32_t n);
void mc_vhost_free(struct mc_vhost *s);

/* The driver is ready: takes over a copy of *vq, which mc_vq_init() has seen. account: MC_VHOST_ACCOUNT bytes to keep it in,
 * or NULL for s's own; again: it is there, left by another process. 0, or an errno. */
int mc_vhost_attach(struct mc_vhost *s, uint32_t index, const struct mc_vq *vq, void *account, bool again);
/* A reset: no queue is attached, and nothing is pending in any eventfd. */
void mc_vhost_detach(struct mc_vhost *s);
/* For its error. size is 0 and error too where none is attached. */
const struct mc_vq *mc_vhost_at(const struct mc_vhost *s, uint32_t index);
/* What the backend signals: a used buffer, a ring that it cannot read. Owned by s. */
int mc_vhost_call_fd(const struct mc_vhost *s, uint32_t index);
int mc_vhost_error_fd(const struct mc_vhost *s, uint32_t index);

/* Has mc_vhost_next() look at a socket as well; fd -1: no longer. which: 0 or 1. 0, or an errno. */
int mc_vhost_watch(struct mc_vhost *s, uint32_t which, int fd);

/* Passes interrupts on until something else happens, or for milliseconds (-1: for ever). */
enum mc_vhost_event mc_vhost_next(struct mc_vhost *s, int milliseconds);
/* The same of what is there already, at the end: also of buffers that were used without a word, since the backend may
 * have lost its voice before. */
void mc_vhost_flush(struct mc_vhost *s);
/* Interrupts the driver for every attached queue, whatever it asked for. */
void mc_vhost_interrupt_all(struct mc_vhost *s);
void mc_vhost_wake(struct mc_vhost *s);
/* One call, one return of mc_vhost_next(), now or when it is called next. */
void mc_vhost_stop(struct mc_vhost *s);

/* Indices as they stand in guest memory now, of an attached queue. */
uint16_t mc_vhost_avail_idx(const struct mc_vhost *s, uint32_t index);
uint16_t mc_vhost_used_idx(const struct mc_vhost *s, uint32_t index);

/* Requests that the used ring has more than the counters of an attached queue. On any thread. */
uint16_t mc_vhost_uncounted(const struct mc_vhost *s, uint32_t index);

/* The backend begins with the rings as they are, at avail entry last_avail and used entry used_idx: nothing of the
 * entries between is with anybody if the two are equal. Else nobody knows which. */
void mc_vhost_begin(struct mc_vhost *s, uint32_t index, uint16_t last_avail, uint16_t used_idx);

/* The backend is gone, and nothing touches the ring. Puts the heads that it has not answered, in the order in which they
 * were made available, where a backend that begins at used.idx finds them: with one that answers in order they are there
 * already, else entries of the avail ring are exchanged, none of which the driver can be about to write.
 * How many there are; -1: too much has happened unseen for that to be known, or the backend answered what it never got. */
int mc_vhost_recover(struct mc_vhost *s, uint32_t index);

/* Adds to mem's dirty log what a log of vhost's says, one bit a page of 4096 by guest physical address in words words,
 * and clears that. */
void mc_vhost_take_log(const struct mc_mem *mem, uint64_t *vhost_log, uint64_t words);
/* Says in the dirty log that all of memory was written. */
void mc_vhost_mark_all(const struct mc_mem *mem);

#endif
