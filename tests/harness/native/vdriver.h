/*
 * The driver's end of a split virtqueue (virtio 1.2, section 2.7) in C, as Linux's drivers use it: for the benchmarks and
 * for tests of the device's end. It trusts the device.
 */
#ifndef VDRIVER_H
#define VDRIVER_H

#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

struct vd_queue {
	uint16_t size;
	bool event_idx;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	int kick_fd, call_fd;
	uint16_t avail_idx;		/* entries made */
	uint16_t kicked;		/* avail_idx at the last decision to kick */
	uint16_t last_used;
	uint64_t kicks;
};

/* Bytes of guest memory that a queue takes, with each part on a page of its own. */
#define VD_PART(size) (((size) * sizeof(struct vring_desc) + 4095) / 4096 * 4096)
#define VD_BYTES(size) (3 * VD_PART(size))

static inline void vd_init(struct vd_queue *q, void *hva, uint16_t size, bool event_idx, int kick_fd, int call_fd)
{
	uint8_t *at = hva;

	memset(at, 0, VD_BYTES(size));
	*q = (struct vd_queue){
		.size = size, .event_idx = event_idx, .kick_fd = kick_fd, .call_fd = call_fd,
		.desc = (void *)at, .avail = (void *)(at + VD_PART(size)), .used = (void *)(at + 2 * VD_PART(size)),
	};
}

static inline volatile uint16_t *vd_used_event(struct vd_queue *q) { return &q->avail->ring[q->size]; }
static inline volatile uint16_t *vd_avail_event(struct vd_queue *q) { return (uint16_t *)&q->used->ring[q->size]; }

/* Makes the chain that begins at head available, without publishing it. */
static inline void vd_offer(struct vd_queue *q, uint16_t head)
{
	q->avail->ring[q->avail_idx++ % q->size] = head;
}

/* Publishes all offers, and kicks the device if it wants that. */
static inline void vd_kick(struct vd_queue *q)
{
	const uint64_t one = 1;
	uint16_t old = q->kicked;
	bool wanted;

	if (q->avail_idx == old)
		return;
	__atomic_store_n(&q->avail->idx, q->avail_idx, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	q->kicked = q->avail_idx;
	if (q->event_idx)
		wanted = vring_need_event(*vd_avail_event(q), q->avail_idx, old);
	else
		wanted = !(__atomic_load_n(&q->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
	if (wanted) {
		ssize_t n = write(q->kick_fd, &one, sizeof(one));

		(void)n;
		q->kicks++;
	}
}

/* Takes the next used entry. */
static inline bool vd_take(struct vd_queue *q, uint32_t *head, uint32_t *len)
{
	if (__atomic_load_n(&q->used->idx, __ATOMIC_ACQUIRE) == q->last_used)
		return false;
	struct vring_used_elem *e = &q->used->ring[q->last_used++ % q->size];

	*head = e->id;
	*len = e->len;
	return true;
}

/* Asks for an interrupt at the next used entry. False: there is one already. */
static inline bool vd_arm(struct vd_queue *q)
{
	if (q->event_idx)
		*vd_used_event(q) = q->last_used;
	else
		__atomic_store_n(&q->avail->flags, 0, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&q->used->idx, __ATOMIC_RELAXED) == q->last_used;
}

#endif
