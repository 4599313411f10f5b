/* The loop: faults first; then, a run at a time, what is copied without being asked for. */
#define _GNU_SOURCE
#include "pager_impl.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

enum { EVENTS = 32, MESSAGES = 16 };

static void count_time(struct mc_pager *p, uint64_t ns)
{
	uint32_t bucket = (uint32_t)ns;

	if (ns >= 4) {
		uint32_t octave = 63 - (uint32_t)__builtin_clzll(ns);

		bucket = (octave - 1) * 4 + (ns >> (octave - 2) & 3);
	}
	p->stats.histogram[bucket < MC_PAGER_BUCKETS ? bucket : MC_PAGER_BUCKETS - 1]++;
	if (ns > p->stats.slowest_ns)
		p->stats.slowest_ns = ns;
}

static void end_recording(struct mc_pager *p)
{
	p->record_until = UINT64_MAX;
	pager_notice(p, MC_PAGER_RECORDED);
}

static bool recording(const struct mc_pager *p)
{
	return p->record && p->record_until != UINT64_MAX;
}

static void record(struct mc_pager *p, uint32_t chunk, uint64_t now)
{
	if (!recording(p))
		return;
	if (p->record_until == 0)
		p->record_until = now + MC_PAGER_RECORD_MS * 1000000ull;
	if (now < p->record_until)
		p->record[p->n_recorded++] = chunk;
	if (now >= p->record_until || p->n_recorded == MC_PAGER_MAX_RECORD)
		end_recording(p);
}

static enum placed fault(struct mc_pager *p, struct source *s, uint64_t address)
{
	uint64_t offset = pager_offset(s, address), start = pager_now();
	enum placed placed = PLACE_OK;
	uint32_t chunk;

	p->stats.faults++;
	if (offset == UINT64_MAX) {
		p->stats.stray++;	/* it registered what it did not tell of; that is not ours to fill */
		return PLACE_PARTLY;
	}
	chunk = (uint32_t)(offset / CHUNK);
	if (is_discarded(p, offset) && !pager_present(p, offset & ~(PAGE - 1))) {
		placed = pager_empty(p, s, offset & ~(PAGE - 1));
	} else if ((is_done(p, chunk) || is_discarded(p, offset)) && pager_present(p, offset & ~(PAGE - 1))) {
		/* It asked before it was there, or a wake-up was lost with our predecessor. */
		(void)!pager_wake(s, chunk * CHUNK, chunk_bytes(p, chunk, 1));
		p->stats.woken++;
	} else {
		bool first = !is_done(p, chunk);

		placed = pager_fill(p, s, chunk, 1);
		if (placed == PLACE_OK && first)
			record(p, chunk, start);
	}
	count_time(p, pager_now() - start);
	return placed;
}

/* false: damage was found. */
static bool faults(struct mc_pager *p, struct source *s)
{
	struct uffd_msg messages[MESSAGES];
	ssize_t size = read(s->uffd, messages, sizeof(messages));

	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return true;	/* whoever waited was helped with another's chunk */
	if (size <= 0 || size % sizeof(messages[0])) {
		p->stats.lost++;
		pager_notice(p, MC_PAGER_SOURCE_LOST);
		pager_drop(p, s);
		return true;
	}
	for (size_t i = 0; i < (size_t)size / sizeof(messages[0]); i++) {
		enum placed placed;

		if (messages[i].event == UFFD_EVENT_REMOVE)
			p->stats.removals++;	/* that it was read is all it is for: see balloon.h */
		if (messages[i].event != UFFD_EVENT_PAGEFAULT)
			continue;
		placed = fault(p, s, messages[i].arg.pagefault.address);
		if (placed == PLACE_DAMAGED)
			return false;
		if (placed == PLACE_GONE)
			break;
	}
	return true;
}

static struct source *any_source(struct mc_pager *p, struct source *after)
{
	for (struct source *s = after ? after + 1 : p->sources; s < p->sources + MC_PAGER_MAX_SOURCES; s++)
		if (s->uffd >= 0)
			return s;
	return NULL;
}

static bool ahead_left(const struct mc_pager *p)
{
	return p->ahead_next < p->config.n_ahead;
}

static bool has_background(struct mc_pager *p)
{
	return (ahead_left(p) || p->populating) && any_source(p, NULL);
}

/* Tries one process after the other. PLACE_GONE: there is none left. */
static enum placed fill_through_any(struct mc_pager *p, uint32_t first, uint32_t count)
{
	enum placed placed = PLACE_GONE;

	for (struct source *s = any_source(p, NULL); s; s = any_source(p, s)) {
		placed = pager_fill(p, s, first, count);
		if (placed == PLACE_OK || placed == PLACE_DAMAGED)
			break;
	}
	return placed;
}

/* Faults need the first chunk of the buffer alone. What the rest has cost is given back: there may be a pager for each
 * of a hundred clones. */
static void shrink_buffer(struct mc_pager *p)
{
	(void)!madvise(p->buffer + CHUNK, (RUN - 1) * CHUNK, MADV_DONTNEED);
}

static void finish_ahead(struct mc_pager *p)
{
	if (ahead_left(p) || p->ahead_said)
		return;
	p->ahead_said = true;
	shrink_buffer(p);
	pager_notice(p, MC_PAGER_AHEAD_DONE);
}

/* One run of the working set. false: damage was found. */
static bool copy_ahead(struct mc_pager *p)
{
	uint32_t first = p->ahead[p->ahead_next], consecutive = 1, count;
	uint64_t start = pager_now();

	while (p->ahead_next + consecutive < p->config.n_ahead && p->ahead[p->ahead_next + consecutive] == first + consecutive)
		consecutive++;
	count = pager_run_length(p, first, first + consecutive);
	if (count) {
		enum placed placed = fill_through_any(p, first, count);

		if (placed == PLACE_DAMAGED)
			return false;
		if (placed == PLACE_GONE)
			return true;	/* nobody is there now; the next one goes on */
		if (placed == PLACE_OK)
			p->stats.ahead_chunks += count;
	}
	p->ahead_next += count ?: 1;
	p->stats.ahead_ns += pager_now() - start;
	finish_ahead(p);
	return true;
}

/* One run of all that is left. false: damage was found. */
static bool populate(struct mc_pager *p)
{
	uint32_t *next = &p->populate_next, count;
	uint64_t one = 1;

	/* Zeros are not filled: once nothing else is left, no mapping is registered any more. */
	while (*next < p->n_chunks && (is_done(p, *next) || !layer_of(p, *next)))
		(*next)++;
	if (*next < p->n_chunks) {
		enum placed placed;

		count = pager_run_length(p, *next, p->n_chunks);
		placed = fill_through_any(p, *next, count);
		if (placed == PLACE_DAMAGED)
			return false;
		if (placed == PLACE_OK)
			p->stats.populated += count;
		if (placed != PLACE_GONE)
			*next += count;
		return true;
	}
	p->populating = false;
	p->populate_next = 0;
	shrink_buffer(p);
	(void)!write(p->config.populated_fd, &one, sizeof(one));
	return true;
}

/* true: asked to stop. */
static bool take_commands(struct mc_pager *p)
{
	uint64_t n;

	(void)!read(p->command_fd, &n, sizeof(n));
	for (uint32_t i = 0; i < MC_PAGER_MAX_SOURCES; i++) {
		struct source new = {.uffd = -1};

		pthread_mutex_lock(&p->inbox_lock);
		if (p->inbox[i].uffd >= 0)
			new = p->inbox[i];
		p->inbox[i].uffd = -1;
		pthread_mutex_unlock(&p->inbox_lock);
		if (new.uffd >= 0)
			pager_adopt(p, &p->sources[i], &new);
	}
	if (atomic_exchange(&p->populate, false))
		p->populating = true;
	return atomic_load(&p->stop);
}

/* Milliseconds until something is to be done without an event. */
static int wait_for(struct mc_pager *p)
{
	uint64_t now;

	if (has_background(p))
		return 0;
	if (!recording(p) || p->record_until == 0)
		return -1;
	now = pager_now();
	return now < p->record_until ? (int)((p->record_until - now) / 1000000) + 1 : 0;
}

int mc_pager_run(struct mc_pager *p)
{
	finish_ahead(p);
	for (;;) {
		struct epoll_event events[EVENTS];
		int n = epoll_wait(p->epoll_fd, events, EVENTS, wait_for(p));
		bool sound = true;

		if (n < 0 && errno != EINTR)
			return -errno;
		for (int i = 0; sound && i < n; i++) {
			uint32_t which = events[i].data.u32;

			if (which == MC_PAGER_MAX_SOURCES) {
				if (take_commands(p))
					return 0;
			} else if (p->sources[which].uffd >= 0) {
				sound = faults(p, &p->sources[which]);
			}
		}
		if (sound && recording(p) && p->record_until && pager_now() >= p->record_until)
			end_recording(p);
		if (sound && has_background(p))
			sound = ahead_left(p) ? copy_ahead(p) : populate(p);
		if (!sound) {
			pager_notice(p, MC_PAGER_DAMAGED);
			return 0;
		}
	}
}
