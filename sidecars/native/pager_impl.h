/* Between the pager's parts. All but the inbox and what is marked atomic belongs to the thread in mc_pager_run(). */
#ifndef MC_PAGER_IMPL_H
#define MC_PAGER_IMPL_H

#include "pager.h"

#include <pthread.h>
#include <stdatomic.h>

#define CHUNK ((uint64_t)MC_PAGER_CHUNK)
#define PAGE 4096ull
#define RUN 8			/* chunks that are copied at a time in the background; a fault waits no longer than that */
#define BLOCK (2ull << 20)	/* a huge page: zeros are left to the kernel in whole ones only */

struct source {
	int uffd;		/* -1: nobody */
	uint32_t n;
	struct mc_pager_mapping maps[MC_PAGER_MAX_MAPPINGS];
};

/* A stretch of guest memory that is zero in the template. */
struct zeros {
	uint64_t offset, size;
};

struct mc_pager {
	struct mc_pager_config config;
	uint32_t n_chunks, n_filled_chunks;	/* in all; those that are not zero */
	uint64_t *done;			/* a bit a chunk: every page of it is in the memfd */
	uint8_t *buffer;		/* RUN chunks */
	int epoll_fd, command_fd;
	struct source sources[MC_PAGER_MAX_SOURCES];

	struct zeros *zeros;
	uint32_t n_zeros;

	uint32_t *ahead;		/* config.ahead */
	uint32_t ahead_next;
	bool ahead_said;
	bool populating;
	uint32_t populate_next;

	uint32_t *record;		/* NULL: not asked for, or over */
	uint32_t n_recorded;
	uint64_t record_until;		/* ns; 0: no fault yet */

	struct mc_pager_damage damage;
	struct mc_pager_stats stats;

	_Atomic unsigned notices;
	_Atomic bool stop, populate;

	pthread_mutex_t inbox_lock;
	struct source inbox[MC_PAGER_MAX_SOURCES];
};

static inline bool is_done(const struct mc_pager *p, uint32_t chunk)
{
	return p->done[chunk / 64] >> chunk % 64 & 1;
}

static inline uint8_t layer_of(const struct mc_pager *p, uint32_t chunk)
{
	return p->config.layers[chunk];
}

#define CHUNK_PAGES (MC_PAGER_CHUNK / 4096)	/* divides the 64 bits of a word, so a chunk's are in one */

/* The pages of a chunk that the balloon has had, a bit each. */
static inline uint32_t discarded_of(const struct mc_pager *p, uint32_t chunk)
{
	uint64_t page = (uint64_t)chunk * CHUNK_PAGES;

	if (!p->config.discarded)
		return 0;
	/* Acquire: nothing of what we then fill is read before. What is set later is ended by an event that we read later. */
	return __atomic_load_n(&p->config.discarded[page / 64], __ATOMIC_ACQUIRE) >> page % 64 & ((1u << CHUNK_PAGES) - 1);
}

static inline bool is_discarded(const struct mc_pager *p, uint64_t offset)
{
	return discarded_of(p, (uint32_t)(offset / CHUNK)) >> offset % CHUNK / PAGE & 1;
}

/* Bytes of `count` chunks; the last one of memory may be short. */
static inline uint64_t chunk_bytes(const struct mc_pager *p, uint32_t first, uint32_t count)
{
	uint64_t start = first * CHUNK, end = start + count * CHUNK;

	return (end < p->config.size ? end : p->config.size) - start;
}

/* pager_fill.c */

/* How far filling got. Only PLACE_OK has marked the chunks as done. */
enum placed {
	PLACE_OK,
	PLACE_PARTLY,		/* this process does not have all of it registered, or is changing its mappings */
	PLACE_GONE,		/* the process is gone, or cannot be served: the source was dropped */
	PLACE_DAMAGED,		/* p->damage */
};

/* Fills `count` (at most RUN) chunks of one layer through a process. */
enum placed pager_fill(struct mc_pager *p, struct source *s, uint32_t first, uint32_t count);

/* Reads and sums them into p->buffer. false: p->damage. */
bool pager_read(struct mc_pager *p, uint32_t first, uint32_t count);

void pager_mark_done(struct mc_pager *p, uint32_t chunk);
/* Finds out from the memfd which chunks are done. 0, or -errno. */
int pager_look(struct mc_pager *p);
bool pager_present(const struct mc_pager *p, uint64_t offset);

/* A page that was discarded is touched again: it is zero. */
enum placed pager_empty(struct mc_pager *p, struct source *s, uint64_t offset);

/* How many chunks from `first` on, at most RUN and before `end`, can be filled at once: missing, and of one layer. */
uint32_t pager_run_length(const struct mc_pager *p, uint32_t first, uint32_t end);

/* pager_source.c */
void pager_drop(struct mc_pager *p, struct source *s);
void pager_adopt(struct mc_pager *p, struct source *s, const struct source *from);
int pager_wake(const struct source *s, uint64_t offset, uint64_t size);
/* Where `address` is in guest memory; UINT64_MAX: nowhere that this process told of. */
uint64_t pager_offset(const struct source *s, uint64_t address);
/* The next piece of [offset, offset+size) that the process has mapped. Returns its size, 0: there is none. */
uint64_t pager_piece(const struct source *s, uint64_t *offset, uint64_t size, uint64_t *address);
/* Where the template is all there: from now on no process needs the pager. */
void pager_release_if_done(struct mc_pager *p);

void pager_notice(struct mc_pager *p, unsigned what);
uint64_t pager_now(void);

#endif
