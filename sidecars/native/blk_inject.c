/*
 * Faults on request, for testing guests: the next so many requests fail, or wait, or both. Off, it is one load and one
 * branch a request. What is to happen is one word, so that the main thread can change it under the data thread.
 */
#include "blk_impl.h"

#include <errno.h>

/* The word: count in bits 0 to 31, delay in milliseconds 32 to 55, MC_BLK_INJECT_* operations 56 to 59, status 60 to 61. */
#define DELAY_AT 32
#define OPS_AT 56
#define STATUS_AT 60

void mc_blk_inject(struct mc_blk *b, uint32_t ops, uint32_t count, uint8_t status, uint32_t delay_ms)
{
	uint64_t word = count;

	if (count)
		word |= (uint64_t)(delay_ms & 0xffffff) << DELAY_AT | (uint64_t)(ops & 15) << OPS_AT |
			(uint64_t)(status & 3) << STATUS_AT;
	__atomic_store_n(&b->inject, word, __ATOMIC_RELAXED);
}

static uint32_t operation(uint32_t type)
{
	switch (type) {
	case VIRTIO_BLK_T_IN: return MC_BLK_INJECT_READ;
	case VIRTIO_BLK_T_OUT: return MC_BLK_INJECT_WRITE;
	case VIRTIO_BLK_T_FLUSH: return MC_BLK_INJECT_FLUSH;
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES: return MC_BLK_INJECT_DISCARD;
	}
	return 0;
}

/* As the host would have it: nothing of it is done. */
static void fail(struct mc_blk *b, struct blk_req *r)
{
	r->off = r->sector * 512;
	r->len = 0;
	if (r->inject_status == VIRTIO_BLK_S_UNSUPP) {
		blk_req_refuse(b, r, VIRTIO_BLK_S_UNSUPP);
		return;
	}
	r->error = EIO;
	blk_req_finish(b, r);
}

bool blk_inject(struct mc_blk *b, struct blk_req *r)
{
	/* Relaxed, all of it: the word is the whole of what is said. */
	uint64_t word = __atomic_load_n(&b->inject, __ATOMIC_RELAXED), after;

	do {
		if (!(uint32_t)word || !(word >> OPS_AT & 15 & operation(r->type)))
			return false;
		after = (uint32_t)word == 1 ? 0 : word - 1;
	} while (!__atomic_compare_exchange_n(&b->inject, &word, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));

	uint64_t delay = word >> DELAY_AT & 0xffffff;

	b->counters.injected++;
	r->inject_status = word >> STATUS_AT & 3;
	if (!delay) {
		fail(b, r);
		return true;
	}
	/* In the order of their ends; equal delays, the rule, find their place at once. */
	r->due = mc_watch_now() + delay * 1000000;
	struct blk_req **at = b->last_delayed && b->last_delayed->due <= r->due ? &b->last_delayed->next : &b->delayed;

	while (*at && (*at)->due <= r->due)
		at = &(*at)->next;
	r->next = *at;
	*at = r;
	if (!r->next)
		b->last_delayed = r;
	return true;
}

void blk_inject_due(struct mc_blk *b, bool all)
{
	uint64_t now = all ? UINT64_MAX : mc_watch_now();

	while (b->delayed && b->delayed->due <= now) {
		struct blk_req *r = b->delayed;

		b->delayed = r->next;
		if (!b->delayed)
			b->last_delayed = NULL;
		if (r->inject_status)
			fail(b, r);
		else
			blk_req_begin(b, r);
	}
}

uint64_t blk_inject_wait(const struct mc_blk *b)
{
	uint64_t now = mc_watch_now();

	return b->delayed->due > now ? b->delayed->due - now : 0;
}
