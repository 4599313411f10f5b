/* Recording of events (watch.h). Several threads may record; the readers are other processes. */
#include "watch.h"

#include <stddef.h>
#include <time.h>

_Static_assert(sizeof(struct mc_vq_stats) == 512, "the layout that proto/watch.py has too");
_Static_assert(offsetof(struct mc_watch, queues) == 512, "the layout that proto/watch.py has too");
_Static_assert(sizeof(struct mc_watch) <= MC_WATCH_RING_AT, "the ring lies behind the counters");
_Static_assert(sizeof(struct mc_trace_event) * MC_WATCH_RING + MC_WATCH_RING_AT == MC_WATCH_SIZE, "a whole ring");

struct mc_watch mc_watch_nobody;

uint64_t mc_watch_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);	/* the vDSO's: no system call where the clock is the TSC */
	return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

void mc_watch_record(struct mc_watch *w, enum mc_event kind, uint16_t queue, uint16_t head, uint32_t len, uint64_t arg)
{
	struct mc_trace_event *ring = (void *)((uint8_t *)w + MC_WATCH_RING_AT);
	/* Relaxed: it only hands out slots. */
	uint64_t n = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
	struct mc_trace_event *e = &ring[n & (MC_WATCH_RING - 1)];

	/* A reader that finds n + 1 in seq has the fields of event n, unless `next` says that the ring has gone round since.
	 * Release, both times: seq is 0 before any field changes, and n + 1 after all have. */
	__atomic_store_n(&e->seq, 0, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	e->ns = mc_watch_now();
	e->arg = arg;
	e->len = len;
	e->head = head;
	e->queue = queue;
	e->kind = kind;
	__atomic_store_n(&e->seq, n + 1, __ATOMIC_RELEASE);
}
