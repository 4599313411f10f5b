/* The pager's life, and what other threads ask of it. */
#define _GNU_SOURCE
#include "pager_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

uint64_t pager_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void ring(int eventfd)
{
	uint64_t one = 1;

	/* EAGAIN: it has not been read since 2^64 - 2 times, and so says already what it is to say. */
	(void)!write(eventfd, &one, sizeof(one));
}

void pager_notice(struct mc_pager *p, unsigned what)
{
	/* Release: who finds the bit finds p->damage and p->record as they were meant. */
	atomic_fetch_or_explicit(&p->notices, what, memory_order_release);
	ring(p->config.event_fd);
}

unsigned mc_pager_notices(struct mc_pager *p)
{
	/* Acquire: see pager_notice. */
	return atomic_exchange_explicit(&p->notices, 0, memory_order_acquire);
}

static bool sound(const struct mc_pager_config *c)
{
	uint64_t chunks = (c->size + CHUNK - 1) / CHUNK;
	struct stat st;

	if (!c->size || c->size % PAGE || chunks > UINT32_MAX || c->n_layers > MC_PAGER_MAX_LAYERS)
		return false;
	if (fstat(c->memory_fd, &st) < 0 || (uint64_t)st.st_size < c->size)
		return false;
	for (uint64_t i = 0; i < chunks; i++)
		if (c->layers[i] > c->n_layers)
			return false;
	for (uint32_t i = 0; i < c->n_ahead; i++)
		if (c->ahead[i] >= chunks || (i && c->ahead[i] <= c->ahead[i - 1]))
			return false;
	return true;
}

/* Notes that [start, end) of the memfd is a hole: chunks of which the balloon did not make it are missing. */
static void found_hole(struct mc_pager *p, uint64_t start, uint64_t end)
{
	for (uint64_t chunk = start / CHUNK; chunk < p->n_chunks && chunk * CHUNK < end; chunk++) {
		uint64_t at = chunk * CHUNK, from = start > at ? (start - at) / PAGE : 0;
		uint64_t to = (end < at + CHUNK ? end - at : CHUNK) / PAGE;
		uint32_t hole = (uint32_t)((1ull << to) - (1ull << from));

		if (hole & ~discarded_of(p, (uint32_t)chunk))
			p->done[chunk / 64] &= ~(1ull << chunk % 64);
	}
}

int pager_look(struct mc_pager *p)
{
	uint64_t size = p->config.size, at = 0;

	memset(p->done, 0xff, (p->n_chunks / 64 + 1) * sizeof(*p->done));
	while (at < size) {
		off_t data = lseek(p->config.memory_fd, (off_t)at, SEEK_DATA), hole;

		if (data < 0 && errno != ENXIO)
			return -errno;
		if (data < 0 || (uint64_t)data > size)
			data = (off_t)size;	/* ENXIO: no more data */
		found_hole(p, at, (uint64_t)data);
		if ((uint64_t)data == size)
			break;
		hole = lseek(p->config.memory_fd, data, SEEK_HOLE);
		if (hole <= data)
			return hole < 0 ? -errno : -EIO;
		at = (uint64_t)hole;
	}
	p->stats.left = 0;
	for (uint32_t chunk = 0; chunk < p->n_chunks; chunk++)
		p->stats.left += layer_of(p, chunk) && !is_done(p, chunk);
	return 0;
}

/* Finds the stretches of whole BLOCKs that are zero in the template: those are left to the kernel. In whole ones, since a
 * kernel that gives guest memory huge pages must not cover with one what is still to come (Linux 6.1 looks
 * at the file, and not at the mapping, for where one fits). */
static int find_zeros(struct mc_pager *p)
{
	const uint32_t per_block = BLOCK / MC_PAGER_CHUNK;
	uint32_t blocks = p->n_chunks / per_block, most = blocks / 2 + 1;

	p->zeros = calloc(most, sizeof(*p->zeros));
	if (!p->zeros)
		return -ENOMEM;
	for (uint32_t block = 0; block < blocks; block++) {
		const uint8_t *layers = p->config.layers + (uint64_t)block * per_block;
		struct zeros *last = p->n_zeros ? &p->zeros[p->n_zeros - 1] : NULL;
		uint64_t offset = block * BLOCK, size = BLOCK;

		if (layers[0] || memcmp(layers, layers + 1, per_block - 1))
			continue;
		if (offset + size > p->config.size)
			size = p->config.size - offset;
		if (last && last->offset + last->size == offset)
			last->size += size;
		else
			p->zeros[p->n_zeros++] = (struct zeros){offset, size};
	}
	return 0;
}

static int set_up(struct mc_pager *p)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = MC_PAGER_MAX_SOURCES};
	const struct mc_pager_config *c = &p->config;

	p->n_chunks = (uint32_t)((c->size + CHUNK - 1) / CHUNK);
	p->done = calloc(p->n_chunks / 64 + 1, sizeof(*p->done));
	p->ahead = calloc(c->n_ahead + 1, sizeof(*p->ahead));
	p->buffer = mmap(NULL, RUN * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (c->record)
		p->record = calloc(MC_PAGER_MAX_RECORD, sizeof(*p->record));
	if (!p->done || !p->ahead || p->buffer == MAP_FAILED || (c->record && !p->record))
		return -ENOMEM;
	if (c->n_ahead)
		memcpy(p->ahead, c->ahead, c->n_ahead * sizeof(*p->ahead));
	p->config.ahead = p->ahead;
	for (uint32_t i = 0; i < p->n_chunks; i++)
		p->n_filled_chunks += layer_of(p, i) != 0;
	p->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	p->command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (p->epoll_fd < 0 || p->command_fd < 0 || epoll_ctl(p->epoll_fd, EPOLL_CTL_ADD, p->command_fd, &event) < 0)
		return -errno;
	return find_zeros(p) ?: pager_look(p);
}

struct mc_pager *mc_pager_new(const struct mc_pager_config *config)
{
	struct mc_pager *p;
	int err;

	if (!sound(config)) {
		errno = EINVAL;
		return NULL;
	}
	p = calloc(1, sizeof(*p));
	if (!p)
		return NULL;
	p->config = *config;
	p->buffer = MAP_FAILED;
	p->epoll_fd = p->command_fd = -1;
	for (int i = 0; i < MC_PAGER_MAX_SOURCES; i++)
		p->sources[i].uffd = p->inbox[i].uffd = -1;
	pthread_mutex_init(&p->inbox_lock, NULL);
	err = set_up(p);
	if (err) {
		mc_pager_free(p);
		errno = -err;
		return NULL;
	}
	return p;
}

static void close_if(int fd)
{
	if (fd >= 0)
		close(fd);
}

void mc_pager_free(struct mc_pager *p)
{
	for (int i = 0; i < MC_PAGER_MAX_SOURCES; i++) {
		close_if(p->sources[i].uffd);
		close_if(p->inbox[i].uffd);
	}
	close_if(p->epoll_fd);
	close_if(p->command_fd);
	if (p->buffer != MAP_FAILED)
		munmap(p->buffer, RUN * CHUNK);
	pthread_mutex_destroy(&p->inbox_lock);
	free(p->done);
	free(p->ahead);
	free(p->record);
	free(p->zeros);
	free(p);
}

void mc_pager_populate(struct mc_pager *p)
{
	atomic_store(&p->populate, true);
	ring(p->command_fd);
}

void mc_pager_stop(struct mc_pager *p)
{
	atomic_store(&p->stop, true);
	ring(p->command_fd);
}

void mc_pager_get_damage(const struct mc_pager *p, struct mc_pager_damage *out)
{
	*out = p->damage;
}

uint32_t mc_pager_recorded(const struct mc_pager *p, uint32_t *out)
{
	memcpy(out, p->record, p->n_recorded * sizeof(*out));
	return p->n_recorded;
}

void mc_pager_get_stats(const struct mc_pager *p, struct mc_pager_stats *out)
{
	*out = p->stats;
}

uint64_t mc_pager_bucket_ns(uint32_t bucket)
{
	return bucket < 4 ? bucket + 1 : (uint64_t)(5 + bucket % 4) << (bucket / 4 - 1);
}

/* Writes what is missing of [offset, offset+size) of the memfd. */
static int write_missing(const struct mc_pager *p, uint64_t offset, const uint8_t *from, uint64_t size)
{
	int fd = p->config.memory_fd;
	off_t at = (off_t)offset, end = (off_t)(offset + size);

	while (at < end) {
		off_t hole = lseek(fd, at, SEEK_HOLE), data;

		if (hole < 0)
			return -errno;
		if (hole > at) {
			at = hole;
			continue;
		}
		data = lseek(fd, at, SEEK_DATA);
		if (data < 0 && errno != ENXIO)
			return -errno;
		if (data < 0 || data > end)
			data = end;
		while (at < data) {
			ssize_t n = pwrite(fd, from + (at - (off_t)offset), (size_t)(data - at), at);

			if (n < 0 && errno != EINTR)
				return -errno;
			if (n > 0)
				at += n;
		}
	}
	return 0;
}

int mc_pager_eager(struct mc_pager *p)
{
	uint32_t count;

	for (uint32_t chunk = 0; chunk < p->n_chunks; chunk += count) {
		int err;

		count = pager_run_length(p, chunk, p->n_chunks);
		if (count == 0 || layer_of(p, chunk) == 0) {
			count = count ?: 1;
			continue;
		}
		if (!pager_read(p, chunk, count))
			return -1;
		err = write_missing(p, chunk * CHUNK, p->buffer, chunk_bytes(p, chunk, count));
		if (err) {
			p->damage = (struct mc_pager_damage){MC_PAGER_PLACE_FAILED, -err, chunk, layer_of(p, chunk)};
			return -1;
		}
		for (uint32_t i = 0; i < count; i++)
			pager_mark_done(p, chunk + i);
		p->stats.filled += count;
	}
	return 0;
}
