/* What the balloon's driver gives away, and what it says of itself (balloon.h). */
#define _GNU_SOURCE
#include "balloon.h"
#include "queue.h"

#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define BATCH 1024	/* page numbers that are sorted and joined at a time */
#define MAX_STATISTICS 64

/* Packed, little-endian: struct virtio_balloon_stat of 5.5.6.3. */
#define STATISTIC_SIZE 10

enum role { INFLATE, DEFLATE, STATISTICS, REPORTING, NOTHING };

struct mc_balloon {
	const struct mc_mem *mem;
	uint64_t *discarded;
	uint64_t page;
	uint64_t *inflated;	/* a bit a page of the memfd that is in the balloon; NULL where pages are freed one by one */
	int event_fd;
	bool has_statistics, has_reporting;
	uint32_t poison;	/* atomic: the main thread's */
	struct mc_balloon_counters counters;
	uint32_t pfns[BATCH];

	pthread_mutex_t lock;	/* of what follows */
	bool wanted;		/* the buffer is to be given back */
	bool given;		/* it was, and what comes is new */
	uint32_t present;
	uint64_t values[MC_BALLOON_TAGS];
};

static uint64_t memfd_pages(const struct mc_mem *mem)
{
	uint64_t end = 0;

	for (uint32_t i = 0; i < mem->n; i++)
		if (mem->regions[i].offset + mem->regions[i].size > end)
			end = mem->regions[i].offset + mem->regions[i].size;
	return end / MC_BALLOON_PAGE;
}

struct mc_balloon *mc_balloon_new(const struct mc_mem *mem, uint64_t *discarded, uint64_t page, int event_fd)
{
	struct mc_balloon *b;

	if (page < MC_BALLOON_PAGE || page & (page - 1)) {
		errno = EINVAL;
		return NULL;
	}
	b = calloc(1, sizeof(*b));
	if (!b)
		return NULL;
	b->mem = mem;
	b->discarded = discarded;
	b->page = page;
	b->event_fd = event_fd;
	pthread_mutex_init(&b->lock, NULL);
	if (page > MC_BALLOON_PAGE) {
		b->inflated = calloc(memfd_pages(mem) / 64 + 1, sizeof(*b->inflated));
		if (!b->inflated) {
			free(b);
			return NULL;
		}
	}
	return b;
}

void mc_balloon_start(struct mc_balloon *b, bool statistics, bool reporting)
{
	b->has_statistics = statistics;
	b->has_reporting = reporting;
}

void mc_balloon_reset(struct mc_balloon *b)
{
	/* Every page is the guest's again. */
	if (b->inflated)
		memset(b->inflated, 0, (memfd_pages(b->mem) / 64 + 1) * sizeof(*b->inflated));
	mc_balloon_poison(b, 0);
	pthread_mutex_lock(&b->lock);
	b->wanted = b->given = false;
	b->present = 0;
	pthread_mutex_unlock(&b->lock);
}

void mc_balloon_poison(struct mc_balloon *b, uint32_t value)
{
	/* It orders nothing: the driver may not change it once it reports pages (5.5.6.6.1). */
	__atomic_store_n(&b->poison, value, __ATOMIC_RELAXED);
}

void mc_balloon_ask(struct mc_balloon *b)
{
	pthread_mutex_lock(&b->lock);
	b->wanted = true;
	pthread_mutex_unlock(&b->lock);
}

uint32_t mc_balloon_statistics(struct mc_balloon *b, uint64_t *values)
{
	uint32_t present;

	pthread_mutex_lock(&b->lock);
	memcpy(values, b->values, sizeof(b->values));
	present = b->present;
	pthread_mutex_unlock(&b->lock);
	return present;
}

void mc_balloon_count(const struct mc_balloon *b, struct mc_balloon_counters *out)
{
	*out = b->counters;
}

int mc_balloon_timer(uint32_t seconds)
{
	const struct itimerspec every = {.it_interval.tv_sec = seconds, .it_value.tv_sec = seconds};
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);

	if (fd < 0)
		return -errno;
	if (timerfd_settime(fd, 0, &every, NULL) < 0) {
		int err = errno;

		close(fd);
		return -err;
	}
	return fd;
}

/* Which queue this is. The specification numbers them as if all were there (5.5.2); Linux and QEMU leave no gaps for those
 * that were not negotiated. Both are understood, since no number has two meanings here. */
static enum role role_of(const struct mc_balloon *b, uint32_t queue)
{
	if (queue < 2)
		return queue == 0 ? INFLATE : DEFLATE;
	if (queue == 2 && b->has_statistics)
		return STATISTICS;
	return b->has_reporting ? REPORTING : NOTHING;
}

/* The bits first up to end - 1. */
static uint64_t bits_of_word(uint64_t word, uint64_t first, uint64_t end)
{
	uint64_t bits = UINT64_MAX;

	if (word == first / 64)
		bits &= UINT64_MAX << first % 64;
	if (word == (end - 1) / 64)
		bits &= UINT64_MAX >> (63 - (end - 1) % 64);
	return bits;
}

/* Punches a hole of whole pages at [start, end) of the memfd, which are in r. */
static void punch(struct mc_balloon *b, const struct mc_region *r, uint64_t start, uint64_t end)
{
	uint64_t first = start / MC_BALLOON_PAGE, last = end / MC_BALLOON_PAGE;
	uint8_t *hva = r->hva + (start - r->offset);

	/* Before the hole, see balloon.h; the system call that follows lets no store pass it. */
	for (uint64_t word = first / 64; b->discarded && word <= (last - 1) / 64; word++)
		__atomic_fetch_or(&b->discarded[word], bits_of_word(word, first, last), __ATOMIC_SEQ_CST);
	if (madvise(hva, end - start, MADV_REMOVE) < 0)
		b->counters.failed++;	/* the guest keeps what it gave away; there may still be a part of it */
	else
		b->counters.discarded += end - start;
	mc_mem_mark(b->mem, hva, end - start);
}

/* [off, off+len) of a region was given away: what is a whole page of the file goes. */
static void discard(struct mc_balloon *b, const struct mc_region *r, uint64_t off, uint64_t len)
{
	uint64_t start = (r->offset + off + b->page - 1) & ~(b->page - 1), end = (r->offset + off + len) & ~(b->page - 1);

	if (start < end)
		punch(b, r, start, end);
}

static bool all_inflated(const struct mc_balloon *b, uint64_t start)
{
	uint64_t first = start / MC_BALLOON_PAGE, end = first + b->page / MC_BALLOON_PAGE;

	for (uint64_t word = first / 64; word <= (end - 1) / 64; word++) {
		uint64_t bits = bits_of_word(word, first, end);

		if ((b->inflated[word] & bits) != bits)
			return false;
	}
	return true;
}

/* Notes what is in the balloon of a file of large pages, each of which goes when all of it is. */
static void note(struct mc_balloon *b, const struct mc_region *r, uint64_t off, uint64_t len, bool inflate)
{
	uint64_t first = (r->offset + off) / MC_BALLOON_PAGE, end = first + len / MC_BALLOON_PAGE;

	for (uint64_t word = first / 64; word <= (end - 1) / 64; word++) {
		if (inflate)
			b->inflated[word] |= bits_of_word(word, first, end);
		else
			b->inflated[word] &= ~bits_of_word(word, first, end);
	}
	if (!inflate)
		return;
	for (uint64_t start = (r->offset + off) & ~(b->page - 1); start < r->offset + off + len; start += b->page) {
		/* A page that is not all of this region's never goes. */
		if (start >= r->offset && start + b->page <= r->offset + r->size && all_inflated(b, start))
			punch(b, r, start, start + b->page);
	}
}

/* Pages `first` to `end` - 1 of guest physical memory. The numbers have 32 bits, so no sum wraps. */
static void take_run(struct mc_balloon *b, uint64_t first, uint64_t end, bool inflate)
{
	uint64_t gpa = first * MC_BALLOON_PAGE, top = end * MC_BALLOON_PAGE, inside = 0;

	for (uint32_t i = 0; i < b->mem->n; i++) {
		const struct mc_region *r = &b->mem->regions[i];
		uint64_t lo = gpa > r->gpa ? gpa : r->gpa, hi = top < r->gpa + r->size ? top : r->gpa + r->size;

		if (lo >= hi)
			continue;
		inside += hi - lo;
		if (b->inflated)
			note(b, r, lo - r->gpa, hi - lo, inflate);
		else if (inflate)
			discard(b, r, lo - r->gpa, hi - lo);
	}
	b->counters.outside += (top - gpa - inside) / MC_BALLOON_PAGE;
}

static void sift(uint32_t *v, size_t root, size_t n)
{
	for (size_t child; (child = 2 * root + 1) < n; root = child) {
		uint32_t parent = v[root];

		if (child + 1 < n && v[child] < v[child + 1])
			child++;
		if (parent >= v[child])
			return;
		v[root] = v[child];
		v[child] = parent;
	}
}

/* Heap sort: in place, and nothing that a guest sends makes it slow. */
static void sort(uint32_t *v, size_t n)
{
	for (size_t i = n / 2; i-- > 0;)
		sift(v, i, n);
	while (n-- > 1) {
		uint32_t largest = v[0];

		v[0] = v[n];
		v[n] = largest;
		sift(v, 0, n);
	}
}

static uint64_t total(const struct iovec *iov, uint32_t n)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < n; i++)
		sum += iov[i].iov_len;
	return sum;
}

/* A request of page numbers. A page that is named twice in it is one. */
static int64_t take_pages(struct mc_balloon *b, const struct iovec *iov, uint32_t n_out, bool inflate)
{
	uint64_t size = total(iov, n_out), *counter = inflate ? &b->counters.inflated : &b->counters.deflated;

	if (!size || size % sizeof(uint32_t) || size / sizeof(uint32_t) > MC_BALLOON_MAX_PFNS)
		return MC_QUEUES_REFUSED;
	*counter += size / sizeof(uint32_t);
	if (!inflate && !b->inflated)
		return 0;	/* the guest touches them, and they are there */
	for (uint64_t off = 0; off < size; off += sizeof(b->pfns)) {
		size_t n = mc_iov_read(iov, n_out, off, b->pfns, sizeof(b->pfns)) / sizeof(uint32_t);

		for (size_t i = 0; i < n; i++)
			b->pfns[i] = le32toh(b->pfns[i]);
		sort(b->pfns, n);
		for (size_t i = 0; i < n;) {
			uint64_t first = b->pfns[i], end = first + 1;

			for (i++; i < n && b->pfns[i] <= end; i++)
				if (b->pfns[i] == end)
					end++;
			take_run(b, first, end, inflate);
		}
	}
	return 0;
}

/* Buffers are the free pages themselves; nothing is written to them. They come back to the guest at once, and it may use
 * them at any time (5.5.6.7). */
static int64_t take_reported(struct mc_balloon *b, const struct iovec *iov, uint32_t n_out, uint32_t n_in)
{
	uint64_t size = total(iov + n_out, n_in);

	if (n_out || !n_in)
		return MC_QUEUES_REFUSED;
	b->counters.reported += size;
	/* Zeros are what a page is that comes back; where free pages are to be something else they stay as they are. */
	if (__atomic_load_n(&b->poison, __ATOMIC_RELAXED)) {
		b->counters.kept += size;
		return 0;
	}
	for (uint32_t i = 0; i < n_in; i++) {
		for (uint32_t k = 0; k < b->mem->n; k++) {
			const struct mc_region *r = &b->mem->regions[k];
			uint64_t off = (uintptr_t)iov[i].iov_base - (uintptr_t)r->hva;

			/* mc_vq_pop() has checked that a buffer is in one region, all of it. */
			if ((uintptr_t)iov[i].iov_base >= (uintptr_t)r->hva && off < r->size)
				discard(b, r, off, iov[i].iov_len);
		}
	}
	return 0;
}

static void read_statistics(struct mc_balloon *b, const struct iovec *iov, uint32_t n_out)
{
	uint8_t buffer[MAX_STATISTICS * STATISTIC_SIZE];
	size_t size = mc_iov_read(iov, n_out, 0, buffer, sizeof(buffer));

	b->present = 0;
	for (size_t at = 0; at + STATISTIC_SIZE <= size; at += STATISTIC_SIZE) {
		uint16_t tag;
		uint64_t value;

		memcpy(&tag, buffer + at, sizeof(tag));
		memcpy(&value, buffer + at + sizeof(tag), sizeof(value));
		tag = le16toh(tag);
		if (tag >= MC_BALLOON_TAGS)
			continue;	/* of a later specification (5.5.6.4: to be ignored) */
		b->values[tag] = le64toh(value);
		b->present |= 1u << tag;
	}
}

/* The driver fills the one buffer each time that it gets it back; it is kept until somebody wants to know. */
static int64_t take_statistics(struct mc_balloon *b, const struct iovec *iov, uint32_t n_out, uint32_t n_in)
{
	const uint64_t one = 1;
	bool news, give;

	if (n_in || !n_out)
		return MC_QUEUES_REFUSED;
	pthread_mutex_lock(&b->lock);
	read_statistics(b, iov, n_out);
	news = b->given;
	give = b->wanted && !news;
	b->given = give;
	b->wanted = false;
	pthread_mutex_unlock(&b->lock);
	if (news) {
		b->counters.statistics++;
		(void)!write(b->event_fd, &one, sizeof(one));	/* EAGAIN: it says so already */
	}
	return give ? 0 : MC_QUEUES_LATER;
}

int64_t mc_balloon_handle(void *opaque, uint32_t queue, const struct iovec *iov, uint32_t n_out, uint32_t n_in)
{
	struct mc_balloon *b = opaque;

	switch (role_of(b, queue)) {
	case INFLATE:
	case DEFLATE:
		return n_in ? MC_QUEUES_REFUSED : take_pages(b, iov, n_out, queue == 0);
	case STATISTICS:
		return take_statistics(b, iov, n_out, n_in);
	case REPORTING:
		return take_reported(b, iov, n_out, n_in);
	case NOTHING:
		break;
	}
	return MC_QUEUES_REFUSED;
}
