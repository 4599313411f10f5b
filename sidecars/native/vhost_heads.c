/*
 * Which heads a vhost-user backend has, by what the rings say (vhost.h); and its dirty log.
 *
 * Each look reads used.idx first (acquire) and avail.idx after it: whatever the used ring names up to there has been made
 * available before, so its avail entry is among those that this look or an earlier one counts. A ring holds its last
 * `size` entries only. A look that comes after more than that has missed some: the account is lost, until a moment at
 * which all that was made available has been answered. Heads are counted, not flagged, since one may have come and gone
 * several times between two looks.
 */
#include "vhost_impl.h"

#include <linux/virtio_ring.h>
#include <stdlib.h>
#include <string.h>

static uint16_t avail_idx(const struct mc_vq *vq)
{
	return __atomic_load_n(&((const struct vring_avail *)vq->avail)->idx, __ATOMIC_ACQUIRE);
}

static uint16_t used_idx(const struct mc_vq *vq)
{
	return __atomic_load_n(&((const struct vring_used *)vq->used)->idx, __ATOMIC_ACQUIRE);
}

static uint16_t avail_entry(const struct mc_vq *vq, uint16_t i)
{
	return __atomic_load_n(&((const struct vring_avail *)vq->avail)->ring[i & (vq->size - 1)], __ATOMIC_RELAXED);
}

static uint32_t used_entry(const struct mc_vq *vq, uint16_t i)
{
	return __atomic_load_n(&((const struct vring_used *)vq->used)->ring[i & (vq->size - 1)].id, __ATOMIC_RELAXED);
}

/* Only the compiler may reorder stores before a kill; whoever reads them is started after it. */
static void in_order(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

static void start_again(struct mc_vhost_account *a, uint16_t used, uint16_t avail, bool lost)
{
	memset(a->with, 0, sizeof(a->with));
	a->avail_seen = avail;
	a->used_seen = used;
	a->lost = lost;
}

void mc_vhost_begin(struct mc_vhost *s, uint32_t index, uint16_t last_avail, uint16_t used)
{
	struct mc_vhost_account *a = s->q[index].account;

	a->busy = 1;
	in_order();
	start_again(a, used, last_avail, last_avail != used);
	a->number = last_avail;
	in_order();
	a->busy = 0;
}

static void look(const struct mc_vq *vq, struct mc_vhost_account *a)
{
	uint16_t used = used_idx(vq), avail = avail_idx(vq);
	uint16_t more_used = used - a->used_seen, more = avail - a->avail_seen;

	/* What the driver has made available counts as taken: when the backend looks, nobody is told. */
	vq->stats->requests += more_used;
	vq->stats->taken += more;
	vq->stats->in_flight = (uint16_t)(avail - used);
	vq->stats->last_avail = avail;
	if (used == avail || a->lost || more > vq->size || more_used > vq->size) {
		/* Where all is answered nothing is with anybody, whatever was seen before. */
		a->number += more;
		start_again(a, used, avail, used != avail);
		return;
	}
	for (uint16_t i = 0; i < more; i++) {
		uint16_t head = avail_entry(vq, a->avail_seen + i);

		a->number++;
		if (head >= vq->size) {
			a->lost = true;		/* no driver does that; the backend will say so */
			continue;
		}
		a->last[head] = a->number;
		a->with[head]++;
	}
	for (uint16_t i = 0; i < more_used; i++) {
		uint32_t head = used_entry(vq, a->used_seen + i);

		if (head >= vq->size || a->with[head] <= 0)
			a->lost = true;		/* an answer to what nobody asked */
		else
			a->with[head]--;
	}
	a->avail_seen = avail;
	a->used_seen = used;
	/* Both rings may have been written while they were read: what was read is good only if none of it can have been
	 * overtaken. The indices are loaded after the entries. */
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	if ((uint16_t)(avail_idx(vq) - (uint16_t)(avail - more)) > vq->size ||
	    (uint16_t)(used_idx(vq) - (uint16_t)(used - more_used)) > vq->size)
		a->lost = true;
}

void mc_vhost_heads_look(struct queue *q)
{
	if (q->account->busy) {		/* who had it before us was killed in the middle of a look */
		start_again(q->account, q->account->used_seen, q->account->avail_seen, true);
		q->account->busy = 0;
	}
	q->account->busy = 1;
	in_order();
	look(&q->vq, q->account);
	in_order();
	q->account->busy = 0;
}

uint16_t mc_vhost_avail_idx(const struct mc_vhost *s, uint32_t index) { return avail_idx(&s->q[index].vq); }
uint16_t mc_vhost_used_idx(const struct mc_vhost *s, uint32_t index) { return used_idx(&s->q[index].vq); }

uint16_t mc_vhost_uncounted(const struct mc_vhost *s, uint32_t index)
{
	const struct queue *q = &s->q[index];

	if (!q->attached || q->vq.error)
		return 0;
	/* The other thread may count the same ones at this moment: then they show twice, until the next time. */
	return used_idx(&q->vq) - __atomic_load_n(&q->account->used_seen, __ATOMIC_RELAXED);
}

struct held {
	uint64_t number;
	uint16_t head;
};

static int by_number(const void *a, const void *b)
{
	uint64_t x = ((const struct held *)a)->number, y = ((const struct held *)b)->number;

	return (x > y) - (x < y);
}

int mc_vhost_recover(struct mc_vhost *s, uint32_t index)
{
	struct queue *q = &s->q[index];
	struct mc_vhost_account *a = q->account;
	struct mc_vq *vq = &q->vq;
	struct held held[MC_MAX_QUEUE_SIZE];
	uint16_t n = 0;

	if (!q->attached || vq->error)
		return -1;
	mc_vhost_heads_look(q);
	if (a->lost)
		return -1;
	for (uint16_t head = 0; head < vq->size; head++) {
		if (a->with[head] < 0 || a->with[head] > 1)
			return -1;
		if (a->with[head])
			held[n++] = (struct held){a->last[head], head};
	}
	/* The driver may have made more available since the look: those entries are whole, and behind these. */
	if (n != (uint16_t)(a->avail_seen - a->used_seen))
		return -1;
	qsort(held, n, sizeof(held[0]), by_number);
	/* The driver writes an entry only when `size` later ones have room, that is, after used.idx has passed it: it
	 * cannot be about to write these, and it never reads them. */
	for (uint16_t i = 0; i < n; i++) {
		uint16_t *entry = &((struct vring_avail *)vq->avail)->ring[(uint16_t)(a->used_seen + i) & (vq->size - 1)];

		if (*entry != held[i].head) {
			__atomic_store_n(entry, held[i].head, __ATOMIC_RELAXED);
			mc_mem_mark(vq->mem, entry, sizeof(*entry));
		}
	}
	return n;
}

void mc_vhost_take_log(const struct mc_mem *mem, uint64_t *vhost_log, uint64_t words)
{
	for (uint32_t i = 0; i < mem->n; i++) {
		const struct mc_region *r = &mem->regions[i];

		for (uint64_t off = 0; off < r->size; off += MC_DIRTY_PAGE) {
			uint64_t page = (r->gpa + off) / MC_DIRTY_PAGE, word = page / 64;

			if (word >= words)
				break;
			if (page % 64 == 0 && r->size - off >= 64 * MC_DIRTY_PAGE &&
			    !__atomic_load_n(&vhost_log[word], __ATOMIC_RELAXED)) {
				off += 63 * MC_DIRTY_PAGE;
				continue;
			}
			if (__atomic_load_n(&vhost_log[word], __ATOMIC_RELAXED) & UINT64_C(1) << page % 64)
				mc_mem_mark(mem, r->hva + off, MC_DIRTY_PAGE);
		}
	}
	for (uint64_t word = 0; word < words; word++) {
		if (vhost_log[word])
			vhost_log[word] = 0;
	}
}

void mc_vhost_mark_all(const struct mc_mem *mem)
{
	for (uint32_t i = 0; i < mem->n; i++)
		mc_mem_mark(mem, mem->regions[i].hva, mem->regions[i].size);
}
