/*
 * The pager's data path: it fills guest memory from a template's files, a chunk of 64 KiB at a time, where other
 * processes miss a page of it.
 *
 * One thread, in mc_pager_run(), does all of it: answers faults, copies ahead, populates. The other calls may come from
 * any thread, except that mc_pager_free() comes last and mc_pager_eager() instead of mc_pager_run().
 *
 * What is whose. A chunk is filled once, through the userfaultfd of whichever process asked first, and with that it is
 * in the memfd for all. UFFDIO_COPY never replaces a page that is there, so what a guest has written since is safe even
 * from a pager that knows less than its predecessor.
 *
 * What was given away. A page whose bit in config.discarded is set was given to the balloon: what the template has for it
 * does not count any more, whether it was ever filled or not. Nobody is given such a page unless they touch it, and then it
 * is zero. The bits are set by another process while we fill; balloon.h says why none is overlooked.
 *
 * What is let go. Where a whole huge page of the template is zero, its registration is taken back at once: the kernel gives
 * zeros without asking. Once the template is all there, so are all the others, and nobody needs the pager any more.
 *
 * Whom to believe. The template's files may be damaged: each chunk is summed in a private buffer before a byte of it is
 * seen by anybody (where there are sums: memory that a machine has left behind in a file of its own has none). The addresses in events and mappings are another process's words: they are bounded, and decide only
 * where in that process's own registered memory something is put. A process that maps the memfd elsewhere than it says
 * thus writes the wrong pages of it, which it could by itself, and does not keep the right ones from others: of a fault
 * in a chunk that counts as filled, and before anything is let go, the memfd is asked what it has.
 */
#ifndef MC_PAGER_H
#define MC_PAGER_H

#include <stdbool.h>
#include <stdint.h>

#define MC_PAGER_CHUNK 65536
#define MC_PAGER_MAX_LAYERS 64
#define MC_PAGER_MAX_SOURCES 128	/* processes that are served at a time */
#define MC_PAGER_MAX_MAPPINGS 8	/* of each: guest memory has two regions */
#define MC_PAGER_MAX_RECORD 15360	/* chunks of a recorded working set: what a Life message holds */
#define MC_PAGER_RECORD_MS 3000
#define MC_PAGER_BUCKETS 192		/* four to an octave of nanoseconds */

struct mc_pager;

struct mc_pager_config {
	int memory_fd;			/* guest memory; none of the descriptors is owned */
	int event_fd;			/* an eventfd, written when there is a notice */
	int populated_fd;		/* an eventfd, written when what mc_pager_populate() asked for is done */
	uint64_t size;			/* bytes of guest memory, a multiple of the page */
	const uint8_t *layers;		/* one a chunk: 0 zero, N in layer_fds[N - 1]; these two outlive the pager */
	const uint8_t *sums;		/* CRC-32C of each chunk, 4 bytes, little-endian; NULL: nobody has summed them */
	uint32_t n_layers;
	int layer_fds[MC_PAGER_MAX_LAYERS];
	uint64_t start;			/* where memory begins in layer_fds[0], a multiple of the page */
	const uint32_t *ahead;		/* a working set: chunks to copy before faults are waited for; copied here */
	uint32_t n_ahead;
	bool record;			/* note which chunks are asked for in the first MC_PAGER_RECORD_MS */
	const uint64_t *discarded;	/* a bit a page of guest memory, set by the balloon (balloon.h); outlives the pager; or NULL */
};

/* `size` bytes at `address` of some process are those at `offset` of guest memory. */
struct mc_pager_mapping {
	uint64_t address, size, offset;
};

enum {				/* notices */
	MC_PAGER_AHEAD_DONE = 1,	/* the working set is there; at once where there is none */
	MC_PAGER_RECORDED = 2,
	MC_PAGER_DAMAGED = 4,
	MC_PAGER_SOURCE_LOST = 8,	/* a process that is not gone cannot be served any more: stats.lost counts them */
};

enum mc_pager_failure {
	MC_PAGER_OK = 0,
	MC_PAGER_READ_FAILED,		/* error: errno */
	MC_PAGER_SHORT,			/* the file ends within the chunk */
	MC_PAGER_WRONG_SUM,
	MC_PAGER_PLACE_FAILED,		/* error: errno, such as ENOMEM: guest memory could not be filled */
};

struct mc_pager_damage {
	int failure;			/* enum mc_pager_failure */
	int error;
	uint32_t chunk;
	uint32_t layer;
};

struct mc_pager_stats {
	uint64_t faults, filled, zeroed, ahead_chunks, ahead_ns, populated, woken, stray, lost, released;
	uint64_t emptied;		/* faults in pages that the balloon had */
	uint64_t removals;		/* holes that were about to be punched */
	uint64_t left;			/* chunks of the template that are not there yet */
	uint64_t slowest_ns;
	uint64_t histogram[MC_PAGER_BUCKETS];	/* of a fault's time from being read to being answered; see mc_pager_bucket_ns */
};

/* NULL and errno: EINVAL for sizes and numbers that do not fit each other. Looks at what of guest memory is there already
 * (SEEK_DATA), which is how a pager takes over from one that died. */
struct mc_pager *mc_pager_new(const struct mc_pager_config *config);

/* Closes every userfaultfd that it was given. */
void mc_pager_free(struct mc_pager *pager);

/* Answers the faults of a process from now on, in place of the one that had this slot (the lowest slots are copied
 * through by preference). Wakes whoever waits there, since a pager that died may have taken faults with it. Owns uffd,
 * a userfaultfd that is registered, unless it returns -errno: EINVAL for mappings outside guest memory or more than
 * MC_PAGER_MAX_MAPPINGS, ENOTTY for a descriptor that is no userfaultfd. */
int mc_pager_serve(struct mc_pager *pager, uint32_t slot, int uffd, const struct mc_pager_mapping *mappings, uint32_t n);

/* Fills all that is left, while faults go first, and then writes populated_fd. Needs a process that is served. */
void mc_pager_populate(struct mc_pager *pager);

/* The loop. 0: asked to stop, or damaged (a notice says so); -errno: epoll itself failed. */
int mc_pager_run(struct mc_pager *pager);
void mc_pager_stop(struct mc_pager *pager);

/* Writes everything into the memfd at once, where nobody can register. 0, or -1: mc_pager_get_damage(). */
int mc_pager_eager(struct mc_pager *pager);

/* The notices since the last call. */
unsigned mc_pager_notices(struct mc_pager *pager);

/* After MC_PAGER_DAMAGED. */
void mc_pager_get_damage(const struct mc_pager *pager, struct mc_pager_damage *out);

/* After MC_PAGER_RECORDED: copies the recorded chunks to out, room for MC_PAGER_MAX_RECORD. Returns how many. */
uint32_t mc_pager_recorded(const struct mc_pager *pager, uint32_t *out);

/* The loop may be adding to them: each is exact, together they are not one moment's. */
void mc_pager_get_stats(const struct mc_pager *pager, struct mc_pager_stats *out);

/* The upper bound of a bucket of the histogram. */
uint64_t mc_pager_bucket_ns(uint32_t bucket);

#endif
