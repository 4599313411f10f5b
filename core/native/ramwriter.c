#define _GNU_SOURCE
#include "ramwriter.h"

#include "crc32c.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t chunk_count(uint64_t size)
{
	return (size + MC_RAM_CHUNK - 1) / MC_RAM_CHUNK;
}

static size_t chunk_length(uint64_t size, uint64_t chunk)
{
	uint64_t left = size - chunk * MC_RAM_CHUNK;

	return left < MC_RAM_CHUNK ? left : MC_RAM_CHUNK;
}

/* A bit for each page of a chunk of that length. */
static uint32_t all_pages(size_t length)
{
	return (1u << (length / MC_RAM_PAGE)) - 1;
}

static int failed(struct mc_ram *ram, enum mc_ram_place place, int error)
{
	ram->place = place;
	return error;
}

/* 0, -errno, or -ENODATA where the file ends before. */
static int read_at(int fd, uint8_t *data, size_t length, uint64_t offset)
{
	while (length) {
		ssize_t n = pread(fd, data, length, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -ENODATA;
		data += n;
		length -= n;
		offset += n;
	}
	return 0;
}

static int write_at(int fd, const uint8_t *data, size_t length, uint64_t offset)
{
	while (length) {
		ssize_t n = pwrite(fd, data, length, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		data += n;
		length -= n;
		offset += n;
	}
	return 0;
}

/* Makes bytes zero again, by a hole where the file system has holes. */
static int clear_at(int fd, size_t length, uint64_t offset)
{
	static const uint8_t zeros[MC_RAM_CHUNK];
	int ret;

	do
		ret = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
	while (ret < 0 && errno == EINTR);
	if (!ret)
		return 0;
	return errno == EOPNOTSUPP ? write_at(fd, zeros, length, offset) : -errno;
}

/* Pages that are not zero, a bit each. */
static uint32_t pages_in_use(const uint8_t *data, size_t length)
{
	uint32_t used = 0;

	for (unsigned page = 0; page < length / MC_RAM_PAGE; page++) {
		const uint8_t *p = data + page * MC_RAM_PAGE;

		if (*p || memcmp(p, p + 1, MC_RAM_PAGE - 1))
			used |= 1u << page;
	}
	return used;
}

/* The next run of set bits at or after *first; false when there is none. */
static bool next_run(uint32_t bits, unsigned *first, unsigned *count)
{
	bits &= ~0u << *first;
	if (!bits)
		return false;
	*first = __builtin_ctz(bits);
	*count = __builtin_ctz(~(bits >> *first));
	return true;
}

/* Whether a chunk is the base's: by its sum first, which costs nothing, then byte for byte. 1, 0 or -errno. */
static int is_the_bases(struct mc_ram *ram, uint64_t chunk, size_t length, uint32_t sum)
{
	uint8_t layer = ram->base_layers ? ram->base_layers[chunk] : 0;
	int ret;

	if (!layer || le32toh(ram->base_sums[chunk]) != sum)
		return 0;
	if (layer > ram->base_count)
		return failed(ram, MC_RAM_BASE, -EINVAL);
	ret = read_at(ram->bases[layer - 1], ram->other, length, chunk * MC_RAM_CHUNK);
	if (ret)
		return failed(ram, MC_RAM_BASE, ret);
	return !memcmp(ram->data, ram->other, length);
}

/*
 * Gives a chunk, which is in ram->data, its layer, sum and place. `changed`: the pages that are not what they were when
 * the chunk was last placed; only these are written where the file has the others.
 */
static int place(struct mc_ram *ram, uint64_t chunk, uint32_t changed)
{
	size_t length = chunk_length(ram->size, chunk);
	uint64_t start = ram->start + chunk * MC_RAM_CHUNK;
	uint32_t used = pages_in_use(ram->data, length);
	bool was_here = ram->layers[chunk] == 1;
	uint8_t layer = 0;
	uint32_t sum = 0;
	unsigned first, count;
	int ret;

	if (used) {
		sum = mc_crc32c(0, ram->data, length);
		ret = is_the_bases(ram, chunk, length, sum);
		if (ret < 0)
			return ret;
		layer = ret ? ram->base_layers[chunk] + 1 : 1;
	}
	if (layer != 1)
		used = 0;
	changed &= all_pages(length);
	if (!was_here || layer != 1)
		changed = all_pages(length);
	for (first = 0; next_run(used & changed, &first, &count); first += count) {
		size_t bytes = count * MC_RAM_PAGE;

		ret = write_at(ram->fd, ram->data + first * MC_RAM_PAGE, bytes, start + first * MC_RAM_PAGE);
		if (ret)
			return failed(ram, MC_RAM_TARGET, ret);
		__atomic_fetch_add(&ram->written, bytes, __ATOMIC_RELAXED);
	}
	if (was_here) {
		uint32_t unused = ~used & changed;

		for (first = 0; next_run(unused, &first, &count); first += count) {
			ret = clear_at(ram->fd, count * MC_RAM_PAGE, start + first * MC_RAM_PAGE);
			if (ret)
				return failed(ram, MC_RAM_TARGET, ret);
		}
	}
	ram->layers[chunk] = layer;
	ram->sums[chunk] = htole32(sum);
	return 0;
}

/* The counters and the flag order nothing: they are looked at for their own sake. */
static void begin(struct mc_ram *ram, uint64_t total)
{
	__atomic_store_n(&ram->total, total, __ATOMIC_RELAXED);
	__atomic_store_n(&ram->done, 0, __ATOMIC_RELAXED);
}

static int advance(struct mc_ram *ram, size_t length)
{
	__atomic_fetch_add(&ram->done, length, __ATOMIC_RELAXED);
	return __atomic_load_n(&ram->cancel, __ATOMIC_RELAXED) ? -ECANCELED : 0;
}

static int write_chunk(struct mc_ram *ram, uint64_t chunk, uint32_t changed)
{
	size_t length = chunk_length(ram->size, chunk);
	int ret = read_at(ram->memfd, ram->data, length, chunk * MC_RAM_CHUNK);

	if (ret)
		return failed(ram, MC_RAM_GUEST, ret);
	ret = place(ram, chunk, changed);
	return ret ? ret : advance(ram, length);
}

/* A chunk that is a hole in the memfd. */
static int write_hole(struct mc_ram *ram, uint64_t chunk)
{
	size_t length = chunk_length(ram->size, chunk);

	if (ram->layers[chunk] == 1) {
		int ret = clear_at(ram->fd, length, ram->start + chunk * MC_RAM_CHUNK);

		if (ret)
			return failed(ram, MC_RAM_TARGET, ret);
	}
	ram->layers[chunk] = 0;
	ram->sums[chunk] = 0;
	return advance(ram, length);
}

int mc_ram_init(struct mc_ram *ram)
{
	ram->data = malloc(MC_RAM_CHUNK);
	ram->other = malloc(MC_RAM_CHUNK);
	if (ram->data && ram->other)
		return 0;
	mc_ram_deinit(ram);
	return -ENOMEM;
}

static void forget_stash(struct mc_ram *ram)
{
	if (ram->stash)
		munmap(ram->stash, ram->stash_count * MC_RAM_PAGE);
	free(ram->stash_pages);
	ram->stash = NULL;
	ram->stash_pages = NULL;
	ram->stash_count = 0;
}

void mc_ram_deinit(struct mc_ram *ram)
{
	forget_stash(ram);
	free(ram->data);
	free(ram->other);
	ram->data = ram->other = NULL;
}

/* The first byte at or after `offset` that is data (SEEK_DATA), or is none (SEEK_HOLE); the size when there is none. */
static int64_t seek(struct mc_ram *ram, uint64_t offset, int whence)
{
	off_t found = lseek(ram->memfd, offset, whence);

	if (found < 0)
		return errno == ENXIO ? (int64_t)ram->size : failed(ram, MC_RAM_GUEST, -errno);
	return (uint64_t)found < ram->size ? found : (int64_t)ram->size;
}

int mc_ram_write_all(struct mc_ram *ram)
{
	uint64_t chunk = 0, end = chunk_count(ram->size);
	int ret;

	begin(ram, ram->size);
	while (chunk < end) {
		/* A page that the guest makes between the look and the end of the round is dirty, and comes later. */
		int64_t data = seek(ram, chunk * MC_RAM_CHUNK, SEEK_DATA), hole;
		uint64_t next;

		if (data < 0)
			return data;
		next = (uint64_t)data == ram->size ? end : (uint64_t)data / MC_RAM_CHUNK;
		for (; chunk < next; chunk++) {
			ret = write_hole(ram, chunk);
			if (ret)
				return ret;
		}
		if (chunk == end)
			break;
		hole = seek(ram, data, SEEK_HOLE);
		if (hole < 0)
			return hole;
		for (next = chunk_count(hole); chunk < next; chunk++) {
			ret = write_chunk(ram, chunk, all_pages(MC_RAM_CHUNK));
			if (ret)
				return ret;
		}
	}
	return 0;
}

/* The dirty pages of a chunk. Bits past the end of RAM, which any sidecar may have set, are of no page. */
static uint32_t changed_pages(const struct mc_ram *ram, const uint64_t *dirty, uint64_t chunk)
{
	uint64_t page = chunk * MC_RAM_CHUNK_PAGES;

	return dirty[page / 64] >> (page % 64) & all_pages(chunk_length(ram->size, chunk));
}

int mc_ram_write_dirty(struct mc_ram *ram, const uint64_t *dirty)
{
	uint64_t end = chunk_count(ram->size), total = 0;

	for (uint64_t chunk = 0; chunk < end; chunk++)
		total += changed_pages(ram, dirty, chunk) ? chunk_length(ram->size, chunk) : 0;
	begin(ram, total);
	for (uint64_t chunk = 0; chunk < end; chunk++) {
		uint32_t changed = changed_pages(ram, dirty, chunk);
		int ret = changed ? write_chunk(ram, chunk, changed) : 0;

		if (ret)
			return ret;
	}
	return 0;
}

int mc_ram_stash(struct mc_ram *ram, const uint64_t *dirty)
{
	uint64_t end = chunk_count(ram->size), count = 0, taken = 0;
	void *stash;

	if (ram->stash)
		return failed(ram, MC_RAM_STASH, -EBUSY);
	for (uint64_t chunk = 0; chunk < end; chunk++)
		count += __builtin_popcount(changed_pages(ram, dirty, chunk));
	if (!count)
		return 0;
	ram->stash_pages = malloc(count * sizeof(*ram->stash_pages));
	/* Populated at once: the guest waits, and a fault a page would cost more than its copy. */
	stash = mmap(NULL, count * MC_RAM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (!ram->stash_pages || stash == MAP_FAILED) {
		if (stash != MAP_FAILED)
			munmap(stash, count * MC_RAM_PAGE);
		free(ram->stash_pages);
		ram->stash_pages = NULL;
		return failed(ram, MC_RAM_STASH, -ENOMEM);
	}
	ram->stash = stash;
	ram->stash_count = count;
	for (uint64_t chunk = 0; chunk < end; chunk++) {
		uint32_t changed = changed_pages(ram, dirty, chunk);
		uint64_t first_page = chunk * MC_RAM_CHUNK_PAGES;
		unsigned first, run;

		for (first = 0; next_run(changed, &first, &run); first += run) {
			int ret = read_at(ram->memfd, ram->stash + taken * MC_RAM_PAGE, (size_t)run * MC_RAM_PAGE,
					  (first_page + first) * MC_RAM_PAGE);

			if (ret) {
				forget_stash(ram);
				return failed(ram, MC_RAM_GUEST, ret);
			}
			for (unsigned i = 0; i < run; i++)
				ram->stash_pages[taken++] = first_page + first + i;
		}
	}
	return 0;
}

/* Puts into ram->data what a chunk was when it was last placed. */
static int recall(struct mc_ram *ram, uint64_t chunk)
{
	size_t length = chunk_length(ram->size, chunk);
	uint8_t layer = ram->layers[chunk];
	int ret;

	if (!layer) {
		memset(ram->data, 0, length);
		return 0;
	}
	/* A base's layer came from place(), which bounded it. */
	ret = layer == 1 ? read_at(ram->fd, ram->data, length, ram->start + chunk * MC_RAM_CHUNK)
			 : read_at(ram->bases[layer - 2], ram->data, length, chunk * MC_RAM_CHUNK);
	return ret ? failed(ram, layer == 1 ? MC_RAM_TARGET : MC_RAM_BASE, ret) : 0;
}

int mc_ram_write_stash(struct mc_ram *ram)
{
	uint64_t next = 0;
	int ret = 0;

	begin(ram, ram->stash_count * MC_RAM_PAGE);
	/* The pages of a chunk that were not dirty when the guest stood still are what they were when it was placed. */
	while (!ret && next < ram->stash_count) {
		uint64_t chunk = ram->stash_pages[next] / MC_RAM_CHUNK_PAGES, from = next;
		uint32_t changed = 0;

		ret = recall(ram, chunk);
		for (; next < ram->stash_count && ram->stash_pages[next] / MC_RAM_CHUNK_PAGES == chunk; next++) {
			unsigned page = ram->stash_pages[next] % MC_RAM_CHUNK_PAGES;

			memcpy(ram->data + page * MC_RAM_PAGE, ram->stash + next * MC_RAM_PAGE, MC_RAM_PAGE);
			changed |= 1u << page;
		}
		if (!ret)
			ret = place(ram, chunk, changed);
		if (!ret)
			ret = advance(ram, (next - from) * MC_RAM_PAGE);
	}
	forget_stash(ram);
	return ret;
}

int64_t mc_ram_verify(const int *files, uint32_t count, uint64_t start, uint64_t size, const uint8_t *layers,
		      const uint32_t *sums, uint64_t first, uint64_t end)
{
	uint8_t *data = malloc(MC_RAM_CHUNK);
	int64_t result = end;

	if (!data)
		return -ENOMEM;
	for (uint64_t chunk = first; chunk < end; chunk++) {
		size_t length = chunk_length(size, chunk);
		int ret;

		if (!layers[chunk])
			continue;
		ret = layers[chunk] > count ? -EINVAL :
		      read_at(files[layers[chunk] - 1], data, length, (layers[chunk] == 1 ? start : 0) + chunk * MC_RAM_CHUNK);
		if (!ret && mc_crc32c(0, data, length) == le32toh(sums[chunk]))
			continue;
		result = ret && ret != -ENODATA ? ret : (int64_t)chunk;
		break;
	}
	free(data);
	return result;
}

void mc_dirty_take(uint64_t *log, uint64_t *dirty, uint64_t words)
{
	for (uint64_t i = 0; i < words; i++) {
		/* Most words are 0, and a bit that comes after this look is found by the next one. */
		if (!__atomic_load_n(&log[i], __ATOMIC_RELAXED))
			continue;
		/* Acquire: whoever sees a bit sees the data that was written before it. */
		dirty[i] |= __atomic_exchange_n(&log[i], 0, __ATOMIC_SEQ_CST);
	}
}

void mc_dirty_merge(const uint64_t *from, uint64_t *dirty, uint64_t words)
{
	for (uint64_t i = 0; i < words; i++)
		dirty[i] |= from[i];
}

uint64_t mc_dirty_count(const uint64_t *dirty, uint64_t words)
{
	uint64_t count = 0;

	for (uint64_t i = 0; i < words; i++)
		count += __builtin_popcountll(dirty[i]);
	return count;
}
