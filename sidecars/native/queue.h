/*
 * The queues of a device whose requests are answered outside of this file: by Python, one call a request, or by a
 * function in C that the device brings with it. For devices that are not a hot path; sidecars/sdk stands on this.
 *
 * One thread is in mc_queues_next() and what answers it; only mc_queues_wake() and mc_queues_stop() may be called by
 * others meanwhile. One request is in hand at a time, and each is finished, refused or given back before the next one:
 * a loop that has stopped has nothing in flight.
 */
#ifndef MC_QUEUE_H
#define MC_QUEUE_H

#include "virtqueue.h"

#define MC_QUEUES_MAX 16
#define MC_QUEUES_STOPPED (-1)

/*
 * Answers a request. iov[0] to iov[n_out - 1] are to be read, the n_in after them are to be written, from the first
 * byte on; both are guest memory, which may change under the reader. Returns how many bytes were written, or what is
 * below. Nothing but struct iovec is needed to write one.
 */
typedef int64_t (*mc_queues_handler)(void *opaque, uint32_t queue, const struct iovec *iov, uint32_t n_out, uint32_t n_in);
#define MC_QUEUES_REFUSED (-1)	/* no request of this device's: the queue is broken, DEVICE_NEEDS_RESET */
#define MC_QUEUES_LATER (-2)	/* keep it, and this queue, until mc_queues_wake() */

struct mc_queues;

/* n queues. isr and mem must outlive it; event_fd is signalled when a queue breaks. handler NULL: mc_queues_next()
 * returns for each request. NULL with errno. */
struct mc_queues *mc_queues_new(uint32_t n, int event_fd, mc_queues_handler handler, void *opaque);
void mc_queues_free(struct mc_queues *s);

/* The driver is ready: takes over a copy of *vq, which mc_vq_init() has seen. 0, or an errno. The counters are kept. */
int mc_queues_attach(struct mc_queues *s, uint32_t index, const struct mc_vq *vq);
/* A reset: no queue is attached. */
void mc_queues_detach(struct mc_queues *s);
/* Turned at each round of mc_queues_next(). */
struct mc_beat *mc_queues_beat(struct mc_queues *s);
/* For counters and positions. size is 0 and error too where none is attached. */
const struct mc_vq *mc_queues_at(const struct mc_queues *s, uint32_t index);

/* Waits for a request, looking at every queue once at first: the index of its queue, or MC_QUEUES_STOPPED. */
int mc_queues_next(struct mc_queues *s);

/* Of the request in hand: bytes to be read, and room. */
uint64_t mc_queues_readable(const struct mc_queues *s);
uint64_t mc_queues_writable(const struct mc_queues *s);
/* Copies from byte off of what is to be read. Returns how many there were. */
size_t mc_queues_read(const struct mc_queues *s, uint64_t off, void *buf, size_t len);
/* Writes behind what was written before. Returns how many fitted. */
size_t mc_queues_write(struct mc_queues *s, const void *buf, size_t len);

/* Each ends the request in hand: answered; not legal, so that its queue is broken; given back as if never taken, to be
 * taken again after nanoseconds, or at the next mc_queues_wake(). */
void mc_queues_done(struct mc_queues *s);
void mc_queues_refuse(struct mc_queues *s);
void mc_queues_later(struct mc_queues *s, uint64_t nanoseconds);

/* Takes requests again that were given back. One that is given back at the same moment is seen, too. */
void mc_queues_wake(struct mc_queues *s);
/* One call, one return of mc_queues_next(), now or when it is called next. */
void mc_queues_stop(struct mc_queues *s);

#endif
