/* Prints the layout that proto/watch.py has too, and writes a `watch` with known contents; for test_watch.py. */
#include <stddef.h>
#include <stdio.h>
#include "watch.h"
int main(void)
{
	printf("%d %d %u %u %u %d %d %zu %zu %zu %zu %zu %zu %zu\n", MC_WATCH_VERSION, MC_WATCH_QUEUES, MC_WATCH_RING,
	       MC_WATCH_RING_AT, MC_WATCH_SIZE, MC_LATENCY_BUCKETS, MC_EVENTS, offsetof(struct mc_watch, on),
	       offsetof(struct mc_watch, next), offsetof(struct mc_watch, queues), sizeof(struct mc_vq_stats),
	       offsetof(struct mc_vq_stats, last_avail), offsetof(struct mc_vq_stats, latency),
	       sizeof(struct mc_trace_event));
	static struct { _Alignas(64) char bytes[MC_WATCH_SIZE]; } area;
	struct mc_watch *w = (void *)&area;

	w->queues[3].requests = 1;
	w->queues[3].taken = 8;
	w->queues[3].latency[39] = 40;
	w->on = 1u << MC_EV_PUSH | 1u << (16 + MC_EV_ERROR);
	MC_TRACE(w, MC_EV_TAKE, 1, 2, 3, 4);
	MC_TRACE(w, MC_EV_PUSH, 1, 2, 3, 4);
	MC_TRACE(w, MC_EV_ERROR, MC_NO_QUEUE, 0xffff, 7, (uint64_t)-5);
	fwrite(&area, 1, sizeof(area), fopen("watch", "w"));
}
