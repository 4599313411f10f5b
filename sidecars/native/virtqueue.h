/*
 * The device side of a split virtqueue (virtio 1.2, section 2.7) over guest memory that the guest may
 * change at any time. The guest is hostile: every index, length, address and flag is read once into a
 * local, bounded, then used.
 */
#ifndef MC_VIRTQUEUE_H
#define MC_VIRTQUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "inflight.h"
#include "watch.h"

#define MC_MAX_REGIONS 8
#define MC_MAX_QUEUE_SIZE 1024

/* Guest memory as this process has mapped it. Mappings are owned by whoever filled this in. */
struct mc_region {
	uint64_t gpa;
	uint64_t size;
	uint8_t *hva;
	uint64_t offset;		/* in the memfd; page-aligned */
};

#define MC_DIRTY_PAGE 4096u

struct mc_mem {
	uint32_t n;
	struct mc_region regions[MC_MAX_REGIONS];
	uint64_t *dirty;		/* shared with the core: a bit a page of the memfd; NULL: nobody wants to know */
};

/* Says in the dirty log that [hva, hva+len) was written: after the bytes, and before the guest is told of them. What is
 * outside of the region that hva is in, is cut off. */
void mc_mem_mark(const struct mc_mem *mem, const void *hva, uint64_t len);
/* The same of the first len bytes of a vector into guest memory. */
void mc_mem_mark_iov(const struct mc_mem *mem, const struct iovec *iov, uint32_t n, uint64_t len);

/* The host address of [gpa, gpa+len), or NULL when any byte of it is outside RAM. len 0: NULL. */
void *mc_mem_at(const struct mc_mem *mem, uint64_t gpa, uint64_t len);

/* Why a queue was declared broken; the driver sees DEVICE_NEEDS_RESET. */
enum mc_vq_error {
	MC_VQ_OK = 0,
	MC_VQ_BAD_AVAIL_IDX,	/* more entries made available than the ring has */
	MC_VQ_BAD_HEAD,		/* a head or next index past the table */
	MC_VQ_LOOP,		/* a chain that visits a descriptor twice, or has more than mc_chain.max buffers or 2^32 bytes */
	MC_VQ_BAD_ADDR,		/* a buffer outside RAM, or of length 0 */
	MC_VQ_BAD_INDIRECT,	/* nested, not last, of a bad length, outside RAM, or not negotiated (2.7.5.3.1) */
	MC_VQ_BAD_ORDER,	/* a device-readable buffer after a device-writable one (2.7.4.2) */
	MC_VQ_BAD_REQUEST,	/* the chain does not hold what the device type requires; set by the device */
	MC_VQ_BAD_RING,		/* mc_vq_init(): size, alignment or a part outside RAM */
	MC_VQ_BAD_USED,		/* mc_vq_keep(): used.idx is not what a device last wrote there */
	MC_VQ_BAD_KEEP,		/* mc_vq_keep(): the in-flight region is not this queue's */
};

const char *mc_vq_strerror(int error);

/* Shared with the core, one a device: virtio-mmio's InterruptStatus (4.2.2). The sidecar ORs bit 0 in
 * before it signals the call eventfd; the core's exit loop reads it and clears what the guest acknowledged. */
struct mc_isr {
	uint32_t status;
};

struct mc_vq {
	const struct mc_mem *mem;
	struct mc_isr *isr;
	int kick_fd, call_fd;		/* not owned */
	uint16_t index;			/* of the queue in its device */
	uint16_t size;			/* power of two, 1..MC_MAX_QUEUE_SIZE */
	bool event_idx, indirect;	/* negotiated */
	uint16_t last_avail;		/* next avail entry to take */
	uint16_t used_idx;		/* next used entry to fill */
	uint16_t signalled_used;	/* used_idx at the last decision to interrupt */
	uint16_t avail_seen;		/* the driver's avail.idx when last read; last_avail..avail_seen may be popped */
	int error;			/* enum mc_vq_error; once set the queue is not touched again */
	void *desc, *avail, *used;	/* host addresses, checked for the whole ring */
	struct mc_watch *watch;		/* not owned; NULL before mc_vq_init(): nobody watches */
	struct mc_vq_stats *stats;	/* in watch; set by mc_vq_init() */
	uint64_t now;			/* CLOCK_MONOTONIC in ns, read once a batch; 0: not read yet */
	uint64_t taken_at[MC_MAX_QUEUE_SIZE];	/* by head: when it was popped; 0: it was not */

	/* What a successor of this process will know of the queue; NULL: nobody will. */
	struct mc_inflight *inflight;
	uint64_t counter;		/* of the next head that is taken */
	bool retake_done;		/* set before mc_vq_keep(): what was answered and not published is taken again */
	bool recovered;			/* mc_vq_go_on() is still to come */
	/* What our predecessor had in its hands and cannot be taken from the avail ring again: popped first. */
	uint16_t redo_at, redo_n;
	uint64_t from_ring;		/* popped from the avail ring, and not given back */
	uint16_t redo[MC_MAX_QUEUE_SIZE], taken[MC_MAX_QUEUE_SIZE];	/* taken: by avail index, for mc_vq_unpop() */
};

_Static_assert(MC_MAX_QUEUE_SIZE == MC_INFLIGHT_MAX, "every head has its place in the region");

/* A chain copied out of the ring: n_out device-readable iovecs, then n_in device-writable ones. Both point
 * into guest memory, whose *contents* may still change under the reader. */
struct mc_chain {
	uint16_t head;
	uint16_t n_out, n_in;
	uint32_t max;			/* room in iov; MC_MAX_QUEUE_SIZE is always enough */
	uint64_t len_out, len_in;	/* bytes */
	struct iovec *iov;		/* owned by the caller */
};

/* Checks and maps the rings at these guest physical addresses. Fill in mem, isr, kick_fd, call_fd, index, event_idx and
 * indirect first; last_avail and used_idx too, which are 0 on a fresh start; and watch, where somebody does, which keeps
 * counting. The used ring counts as written from here on.
 * Returns 0, or an enum mc_vq_error, which is also in vq->error. */
int mc_vq_init(struct mc_vq *vq, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used);

/*
 * After mc_vq_init(): what happens in this queue is noted in its in-flight region (NULL: nowhere), for the process that
 * comes after this one. again: this is that process; last_avail and used_idx become what follows from region and rings,
 * whatever they were. vq->error is set where those two cannot belong together. The guest is not touched.
 */
void mc_vq_keep(struct mc_vq *vq, struct mc_inflight *inflight, bool again);

/* Once a recovered queue may touch the guest: publishes what its last device had done, and interrupts the driver, who may
 * have missed an interrupt. mc_vq_pop() calls it; a loop that does not pop at once calls it before it sleeps. */
void mc_vq_go_on(struct mc_vq *vq);

/* Heads that the last process had in its hands and this one has not taken yet, but for what is in the avail ring again. To
 * be taken before the device comes to rest: a saved position has no room for them. */
static inline uint16_t mc_vq_redo(const struct mc_vq *vq) { return vq->error ? 0 : vq->redo_n - vq->redo_at; }
/* The guest's notification has arrived. */
static inline void mc_vq_kicked(struct mc_vq *vq)
{
	/* One that was detached may have a wake-up left in its owner's hands. */
	if (!vq->stats)
		return;
	vq->stats->kicks++;
	MC_TRACE(vq->watch, MC_EV_KICK, vq->index, 0, 0, 0);
}

/* Time has passed since the last pop or push of this batch: the next one looks at the clock again. mc_vq_flush() says so by
 * itself. */
static inline void mc_vq_tick(struct mc_vq *vq) { vq->now = 0; }

/* Takes the next chain. 1: taken; 0: the ring is empty; -1: the ring is broken, vq->error says how. */
int mc_vq_pop(struct mc_vq *vq, struct mc_chain *chain);

/* What the ring's owner writes into used ring and event words is marked here; what it writes into buffers, by itself. */

/* Gives the last n popped chains back, which must not have been pushed, as if never taken (a net rx path that found its packet too large). */
void mc_vq_unpop(struct mc_vq *vq, uint16_t n);

/* Writes a used entry without publishing it; len is the bytes written into device-writable buffers. */
void mc_vq_push(struct mc_vq *vq, uint16_t head, uint32_t len);

/* The same of an answer that has been counted: of a predecessor's. */
void mc_vq_push_again(struct mc_vq *vq, uint16_t head, uint32_t len);

/* Publishes what was pushed (once a batch), and interrupts the guest if it wants to be (EVENT_IDX, NO_INTERRUPT). */
void mc_vq_flush(struct mc_vq *vq);

/* Interrupts the guest, whatever it asked for. */
void mc_vq_interrupt(struct mc_vq *vq);

/* Asks the guest for a kick at the next available buffer. true: buffers are there already; go on popping. */
bool mc_vq_enable_kick(struct mc_vq *vq);

/* Tells the guest that no kicks are needed for now (a hint; kicks may still come). */
void mc_vq_disable_kick(struct mc_vq *vq);

/* Copies between a flat buffer and a vector from byte off of it, stopping at the shorter. Returns the bytes copied. What
 * was read from guest memory must be checked in buf, never in the vector again. */
size_t mc_iov_read(const struct iovec *iov, uint32_t n, size_t off, void *buf, size_t len);
size_t mc_iov_write(const struct iovec *iov, uint32_t n, size_t off, const void *buf, size_t len);

#endif
