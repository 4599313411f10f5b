/*
 * Where a queue goes on whose last device process has died: from its in-flight region (inflight.h) and its rings, and
 * nothing else. The steps are those of vhost-user's "Inflight I/O tracking", for split virtqueues.
 *
 * A process may be killed in here, too. Each step leaves the region such that the next process comes to the same result.
 */
#include "virtqueue.h"

#include <linux/virtio_ring.h>
#include <string.h>

/* Both of the guest's words are read once; a guest that changes them meanwhile gets what it asked for, within bounds. */
static uint16_t used_index(const struct mc_vq *vq)
{
	/* Relaxed: nothing is read on the strength of it; it was written by our predecessor. */
	return __atomic_load_n(&((struct vring_used *)vq->used)->idx, __ATOMIC_RELAXED);
}

static uint16_t avail_head(const struct mc_vq *vq, uint16_t at)
{
	return __atomic_load_n(&((struct vring_avail *)vq->avail)->ring[at & (vq->size - 1)], __ATOMIC_RELAXED);
}

static void begin(struct mc_vq *vq)
{
	struct mc_inflight *r = vq->inflight;

	memset(r, 0, sizeof(*r));
	r->version = MC_KEEP_VERSION;
	r->desc_num = vq->size;
	r->used_idx = r->next_used = vq->used_idx;
}

/* Heads in the order in which they were taken. At most the queue's size of them: a sort by insertion does. */
static void insert(const struct mc_inflight *r, uint16_t *heads, uint16_t n, uint16_t head)
{
	while (n && r->desc[heads[n - 1]].counter > r->desc[head].counter) {
		heads[n] = heads[n - 1];
		n--;
	}
	heads[n] = head;
}

/* Whether the last n entries that were taken from the avail ring are these: so it is with every device that answers in
 * order, and then they can be taken from there again. */
static bool at_the_end(const struct mc_vq *vq, const uint16_t *heads, uint16_t n)
{
	for (uint16_t k = 0; k < n; k++) {
		if (avail_head(vq, vq->last_avail - n + k) != heads[k])
			return false;
	}
	return true;
}

static void recover(struct mc_vq *vq)
{
	struct mc_inflight *r = vq->inflight;
	uint16_t used = used_index(vq), done[MC_MAX_QUEUE_SIZE], n_done = 0, n = 0;

	if (r->version != MC_KEEP_VERSION || r->desc_num != vq->size) {
		vq->error = MC_VQ_BAD_KEEP;
		return;
	}
	if (used != r->used_idx && used != r->next_used) {
		vq->error = MC_VQ_BAD_USED;
		return;
	}
	/* Killed behind the publication: what was done is the guest's. The index last, or this would not be seen again. */
	if (used != r->used_idx) {
		for (uint16_t i = 0; i < vq->size; i++) {
			if (r->desc[i].inflight == MC_HEAD_DONE)
				r->desc[i].inflight = MC_HEAD_FREE;
		}
		mc_in_order();
		r->used_idx = used;
	}
	vq->counter = 0;
	for (uint16_t i = 0; i < vq->size; i++) {
		struct mc_inflight_desc *d = &r->desc[i];

		/* Free ones count: a number that comes again would be taken for the chain that a console was in. */
		if (d->counter >= vq->counter)
			vq->counter = d->counter + 1;
		if (d->inflight == MC_HEAD_FREE)
			continue;
		if (d->inflight == MC_HEAD_DONE && !vq->retake_done)
			insert(r, done, n_done++, i);
		else
			insert(r, vq->redo, n++, i);
	}
	vq->stats->in_flight = 0;	/* what is taken again counts again */
	vq->used_idx = vq->signalled_used = used;
	vq->last_avail = vq->avail_seen = used + n_done + n;
	/* Answered, and not published: published by mc_vq_go_on(). */
	for (uint16_t i = 0; i < n_done; i++) {
		const struct mc_inflight_desc *d = &r->desc[done[i]];

		mc_vq_push_again(vq, done[i], d->len_low | (uint32_t)d->len_high << 16);
	}
	if (n && at_the_end(vq, vq->redo, n)) {
		/* Taken again, they get the numbers that they had. */
		vq->counter = r->desc[vq->redo[0]].counter;
		/* From the last to the first: killed in between, those that are left are at the end again. */
		while (n) {
			r->desc[vq->redo[--n]].inflight = MC_HEAD_FREE;
			mc_in_order();
			vq->last_avail--;
			vq->stats->taken--;
		}
		vq->avail_seen = vq->last_avail;
	}
	vq->stats->last_avail = vq->last_avail;
	vq->redo_n = n;
	vq->recovered = true;
}

void mc_vq_keep(struct mc_vq *vq, struct mc_inflight *inflight, bool again)
{
	vq->inflight = NULL;
	vq->redo_at = vq->redo_n = 0;
	vq->from_ring = vq->counter = 0;
	vq->recovered = false;
	if (vq->error || !inflight)
		return;
	vq->inflight = inflight;
	if (again)
		recover(vq);
	else
		begin(vq);
}

void mc_vq_go_on(struct mc_vq *vq)
{
	if (!vq->recovered)
		return;
	vq->recovered = false;
	if (vq->error)
		return;
	mc_vq_flush(vq);
	/* Whether or not there was anything to publish: our predecessor may have been killed between its last publication
	 * and the interrupt for it. */
	mc_vq_interrupt(vq);
}
