/*
 * Guest RAM written into a template's `memory` file, and checked there (docs/templates.md); or into a larger file, from
 * `start` on.
 *
 * The unit is a chunk of 64 KiB, which has a layer and a CRC-32C. Within a chunk only the pages that are not zero are
 * written: the others stay holes, or become holes again. The guest may run meanwhile: each chunk is read into a
 * buffer of our own first, and what is summed and written is that. RAM is read by pread(2) from its memfd, never through a
 * mapping: a hole costs nothing there and stays one. (So memory that fills itself on demand must be filled before.)
 *
 * A round is one of the calls below that write. They run one at a time, on any thread; `cancel` and the counters are
 * the only fields that others may touch meanwhile. All return 0 or -errno (-ECANCELED after `cancel`), and note what
 * failed in `place`; after a failure the file is of no use.
 */
#ifndef MC_RAMWRITER_H
#define MC_RAMWRITER_H

#include <stdint.h>

enum { MC_RAM_CHUNK = 64 << 10, MC_RAM_PAGE = 4096, MC_RAM_CHUNK_PAGES = MC_RAM_CHUNK / MC_RAM_PAGE };

/* Where a call failed. */
enum mc_ram_place { MC_RAM_GUEST, MC_RAM_TARGET, MC_RAM_BASE, MC_RAM_STASH };

struct mc_ram {
	/* The caller's, set before mc_ram_init and alive until mc_ram_deinit. */
	int memfd, fd;			/* guest RAM; the template's memory, open for both, of `start` + `size` bytes */
	uint64_t start;			/* where RAM begins in fd, a whole page */
	uint64_t size;			/* bytes of RAM, whole pages */
	uint8_t *layers;		/* a chunk's: 0 zero, 1 in fd, N in bases[N - 2]. Zero at first; the result */
	uint32_t *sums;			/* a chunk's CRC-32C, little-endian, 0 where its layer is 0; the result */
	const int *bases;		/* memory files of the template to differ from, and of those it builds on */
	uint32_t base_count;
	const uint8_t *base_layers;	/* as that template has them (1 is bases[0]); NULL: no base */
	const uint32_t *base_sums;

	uint32_t cancel;		/* not 0: the round ends soon */
	uint64_t total, done;		/* of this round, in bytes of RAM */
	uint64_t written;		/* bytes given to fd, all rounds */
	uint32_t place;			/* enum mc_ram_place */

	uint8_t *data, *other;		/* a chunk each */
	uint8_t *stash;			/* pages set aside */
	uint32_t *stash_pages;		/* their numbers, ascending */
	uint64_t stash_count;
};

int mc_ram_init(struct mc_ram *ram);
void mc_ram_deinit(struct mc_ram *ram);

/* Writes all of RAM. */
int mc_ram_write_all(struct mc_ram *ram);

/* Writes what has its bit set in `dirty`: page N is bit N % 64 of word N / 64. */
int mc_ram_write_dirty(struct mc_ram *ram, const uint64_t *dirty);

/* Copies those pages aside. The guest must stand still, and all else must have been written. */
int mc_ram_stash(struct mc_ram *ram, const uint64_t *dirty);

/* Writes what was set aside, and forgets it. */
int mc_ram_write_stash(struct mc_ram *ram);

/*
 * Checks chunks `first` up to `end` of a template against their checksums; files[0] is its own memory, the others its
 * parents'. RAM begins at `start` in files[0]. The number of the first chunk that is wrong or cannot be read whole; `end`:
 * all are right; -errno.
 */
int64_t mc_ram_verify(const int *files, uint32_t count, uint64_t start, uint64_t size, const uint8_t *layers,
		      const uint32_t *sums, uint64_t first, uint64_t end);

/* Moves the bits of a log that others set meanwhile (docs/internals.md, "Dirty log of the sidecars") into `dirty`. */
void mc_dirty_take(uint64_t *log, uint64_t *dirty, uint64_t words);

/* ORs `words` words of `from`, which nobody else touches, into `dirty`. */
void mc_dirty_merge(const uint64_t *from, uint64_t *dirty, uint64_t words);

/* How many bits are set. */
uint64_t mc_dirty_count(const uint64_t *dirty, uint64_t words);

#endif
