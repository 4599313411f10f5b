/* The memory that outlives a sidecar (inflight.h), and its data loop's sign of life. Queues are recovered in recover.c. */
#include "inflight.h"

#include <stddef.h>
#include <unistd.h>

struct mc_inflight *mc_keep_queue(struct mc_keep *keep, uint32_t index)
{
	if (!keep || index >= keep->queues)
		return NULL;
	return (struct mc_inflight *)((uint8_t *)keep + MC_KEEP_QUEUES + (size_t)index * MC_KEEP_QUEUE);
}

bool mc_keep_activate(struct mc_keep *keep, uint64_t activation)
{
	if (activation && keep->activation == activation)
		return true;
	/* From now on, until all regions are new, a successor begins anew as well. */
	keep->activation = 0;
	mc_in_order();
	return false;
}

void mc_keep_activated(struct mc_keep *keep, uint64_t activation)
{
	mc_in_order();
	keep->activation = activation;
}

static void signal_fd(int fd)
{
	const uint64_t one = 1;
	/* EAGAIN: it is signalled already. */
	ssize_t n = write(fd, &one, sizeof(one));
	(void)n;
}

void mc_beat_ask(struct mc_beat *beat)
{
	/* Release is what is needed, and what a write to an eventfd would give anyway: who is woken finds the question. */
	__atomic_fetch_add(&beat->asked, 1, __ATOMIC_RELEASE);
	signal_fd(beat->wake_fd);
}

bool mc_beat_heard(const struct mc_beat *beat)
{
	return __atomic_load_n(&beat->seen, __ATOMIC_ACQUIRE) == __atomic_load_n(&beat->asked, __ATOMIC_RELAXED);
}

void mc_beat(struct mc_beat *beat)
{
	uint32_t asked = __atomic_load_n(&beat->asked, __ATOMIC_ACQUIRE);

	if (asked == beat->seen)
		return;
	__atomic_store_n(&beat->seen, asked, __ATOMIC_RELEASE);
	signal_fd(beat->event_fd);
}
