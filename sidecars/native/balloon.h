/*
 * The balloon's part of its queues (virtio 1.2, section 5.5): what the driver gives away becomes a hole in the memfd.
 *
 * How a page goes back to the host. MADV_REMOVE on this process's shared mapping punches the hole, which takes no right but
 * the mapping: it works on a memfd that is sealed against resizing (not on one sealed against writing), on a file of
 * tmpfs, and on hugetlbfs in whole huge pages. Every other process, and KVM, loses the page by the same call. Who
 * touches it again gets zeros.
 *
 * Memory that fills itself (sidecars/pager). A page that is missing is the template's there, so the pager has to know that
 * this one is not any more: `discarded` is a bit a page of the memfd, shared with it, which is set before the hole is
 * punched and never taken back. A pager may be filling that very page meanwhile. The userfaultfd of this process has
 * UFFD_FEATURE_EVENT_REMOVE, by which MADV_REMOVE waits, before it punches, until the pager has read of it: by one thread, which
 * has then ended whatever it was filling, and finds the bit in all that it fills from there on. The pager waits for nobody.
 *
 * The dirty log: a page whose content went is marked after the hole, as everything that a sidecar does to guest memory.
 */
#ifndef MC_BALLOON_H
#define MC_BALLOON_H

#include "virtqueue.h"

#define MC_BALLOON_PAGE 4096u		/* what the driver counts in, whatever its own pages are (5.5.6) */
#define MC_BALLOON_MAX_PFNS 65536u	/* in one request; Linux sends 256 */
#define MC_BALLOON_TAGS 16		/* statistics; virtio 1.2 has 10 */

struct mc_balloon;

struct mc_balloon_counters {
	uint64_t inflated, deflated;	/* pages of 4096, as the driver said */
	uint64_t reported;		/* bytes that it reported as free */
	uint64_t discarded;		/* bytes of holes that were punched */
	uint64_t outside;		/* pages that are not RAM: ignored */
	uint64_t kept;			/* bytes reported that may not be discarded, since free pages are not zero (5.5.6.7) */
	uint64_t failed;		/* madvise(2) that failed */
	uint64_t statistics;		/* buffers that were asked for and came */
};

/* mem must outlive it. discarded: as above, at least a bit a page of the memfd, or NULL. page: what the memory's file is
 * made of, a power of two from 4096 on. event_fd is signalled when statistics that were asked for have come.
 * NULL with errno. */
struct mc_balloon *mc_balloon_new(const struct mc_mem *mem, uint64_t *discarded, uint64_t page, int event_fd);

/* What the driver accepted; before its first request. */
void mc_balloon_start(struct mc_balloon *b, bool statistics, bool reporting);
/* The driver is gone. */
void mc_balloon_reset(struct mc_balloon *b);

/* PAGE_POISON was accepted and this is what free pages are filled with. Any thread. */
void mc_balloon_poison(struct mc_balloon *b, uint32_t value);

/* Gives the driver its statistics buffer back at the next chance, which mc_queues_wake() is. Any thread. */
void mc_balloon_ask(struct mc_balloon *b);
/* The last statistics, by tag (5.5.6.4); returns a bit for each that there is. Any thread. */
uint32_t mc_balloon_statistics(struct mc_balloon *b, uint64_t *values);
/* Each is exact, together they are not one moment's. */
void mc_balloon_count(const struct mc_balloon *b, struct mc_balloon_counters *out);

/* A timerfd (CLOEXEC, non-blocking) that ticks every so many seconds; the caller's. -errno. */
int mc_balloon_timer(uint32_t seconds);

/* mc_queues_handler; opaque is the balloon. */
int64_t mc_balloon_handle(void *opaque, uint32_t queue, const struct iovec *iov, uint32_t n_out, uint32_t n_in);

#endif
