/* One run of chunks: from a template's file, summed, to a process that misses it. */
#define _GNU_SOURCE
#include "pager_impl.h"

#include "crc32c.h"

#include <endian.h>
#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static bool damaged(struct mc_pager *p, uint32_t chunk, enum mc_pager_failure failure, int error)
{
	p->damage = (struct mc_pager_damage){failure, error, chunk, layer_of(p, chunk)};
	return false;
}

bool pager_read(struct mc_pager *p, uint32_t first, uint32_t count)
{
	int fd = p->config.layer_fds[layer_of(p, first) - 1];
	uint64_t start = layer_of(p, first) == 1 ? p->config.start : 0;
	uint64_t size = chunk_bytes(p, first, count), got = 0;

	while (got < size) {
		ssize_t n = pread(fd, p->buffer + got, size - got, (off_t)(start + first * CHUNK + got));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return damaged(p, first + (uint32_t)(got / CHUNK), MC_PAGER_READ_FAILED, errno);
		if (n == 0)
			return damaged(p, first + (uint32_t)(got / CHUNK), MC_PAGER_SHORT, 0);
		got += (uint64_t)n;
	}
	for (uint32_t i = 0; p->config.sums && i < count; i++) {
		uint32_t sum;

		memcpy(&sum, p->config.sums + 4ull * (first + i), sizeof(sum));
		if (mc_crc32c(0, p->buffer + i * CHUNK, chunk_bytes(p, first + i, 1)) != le32toh(sum))
			return damaged(p, first + i, MC_PAGER_WRONG_SUM, 0);
	}
	return true;
}

uint32_t pager_run_length(const struct mc_pager *p, uint32_t first, uint32_t end)
{
	uint32_t count = 0;

	while (count < RUN && first + count < end && !is_done(p, first + count) &&
	       layer_of(p, first + count) == layer_of(p, first))
		count++;
	return count;
}

void pager_mark_done(struct mc_pager *p, uint32_t chunk)
{
	if (is_done(p, chunk))
		return;
	p->done[chunk / 64] |= 1ull << chunk % 64;
	if (layer_of(p, chunk))
		p->stats.left--;
}

bool pager_present(const struct mc_pager *p, uint64_t offset)
{
	/* The position that this moves belongs to everybody who has the memfd; nobody uses it. */
	return lseek(p->config.memory_fd, (off_t)offset, SEEK_DATA) == (off_t)offset;
}

/* What the ioctl said, once it did not say 0: how many bytes are settled (-errno where none are, 0 for EAGAIN). */
static int64_t settled(int64_t moved, bool *was_there)
{
	if (moved > 0)
		return moved;	/* it stopped there for now; errno is EAGAIN, the cause comes again */
	if (errno == EEXIST) {
		*was_there = true;
		return PAGE;	/* another pager's page, or one that was filled through another process: go on behind it */
	}
	return errno == EAGAIN ? 0 : -errno;
}

/* Puts `size` bytes at `address` of the process; from NULL: zeros. 0, or -errno; EAGAIN: it changes its mappings now. */
static int put(const struct source *s, uint64_t address, const uint8_t *from, uint64_t size, bool *was_there)
{
	while (size) {
		int64_t n = (int64_t)size;

		if (from) {
			struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)from, .len = size};

			if (ioctl(s->uffd, UFFDIO_COPY, &copy) < 0)
				n = settled(copy.copy, was_there);
		} else {
			struct uffdio_zeropage zero = {.range = {address, size}};

			if (ioctl(s->uffd, UFFDIO_ZEROPAGE, &zero) < 0)
				n = settled(zero.zeropage, was_there);
		}
		if (n <= 0)
			return n ? (int)n : -EAGAIN;
		address += (uint64_t)n;
		size -= (uint64_t)n;
		if (from)
			from += n;
	}
	return 0;
}

/* ESRCH: the process has ended. Else its userfaultfd is not what it said. */
static enum placed lose(struct mc_pager *p, struct source *s, int err)
{
	if (err != -ESRCH) {
		p->stats.lost++;
		pager_notice(p, MC_PAGER_SOURCE_LOST);
	}
	pager_drop(p, s);
	return PLACE_GONE;
}

enum placed pager_empty(struct mc_pager *p, struct source *s, uint64_t offset)
{
	uint64_t address, length = pager_piece(s, &offset, PAGE, &address);
	bool was_there = false;
	int err = length ? put(s, address, NULL, length, &was_there) : 0;

	p->stats.emptied++;
	switch (-err) {
	case 0:
		break;
	case EAGAIN:	/* it is about to discard more: whoever waits asks again */
	case ENOENT:
		was_there = true;
		break;
	case ENOMEM:
	case ENOSPC:
		damaged(p, (uint32_t)(offset / CHUNK), MC_PAGER_PLACE_FAILED, -err);
		return PLACE_DAMAGED;
	default:
		return lose(p, s, err);
	}
	if (was_there)
		(void)!pager_wake(s, offset, PAGE);
	return PLACE_OK;
}

/* How many bytes from `offset` on, before `end`, the balloon has not had: their pages are the template's. */
static uint64_t undiscarded(const struct mc_pager *p, uint64_t offset, uint64_t end)
{
	uint64_t from = offset;

	while (offset < end && !is_discarded(p, offset))
		offset += PAGE;
	return offset - from;
}

enum placed pager_fill(struct mc_pager *p, struct source *s, uint32_t first, uint32_t count)
{
	uint64_t start = first * CHUNK, end = start + chunk_bytes(p, first, count), offset = start, covered = 0;
	const uint8_t *from = NULL;
	uint64_t address, length;

	if (layer_of(p, first)) {
		if (!pager_read(p, first, count))
			return PLACE_DAMAGED;
		from = p->buffer;
	}
	while (offset < end) {
		uint64_t wanted = undiscarded(p, offset, end);
		bool was_there = false;
		int err;

		if (!wanted) {
			offset += PAGE;
			covered += PAGE;
			continue;
		}
		length = pager_piece(s, &offset, wanted, &address);
		if (!length)
			break;
		err = put(s, address, from ? from + (offset - start) : NULL, length, &was_there);

		switch (-err) {
		case 0:
			covered += length;
			break;
		case EAGAIN:	/* it makes room for an event that we did not ask for */
		case ENOENT:	/* it has unmapped or unregistered some of it: its own business */
			was_there = true;
			break;
		case ENOMEM:
		case ENOSPC:
			damaged(p, first, MC_PAGER_PLACE_FAILED, -err);
			return PLACE_DAMAGED;
		default:
			return lose(p, s, err);
		}
		/* Only what was copied woke its waiters. Those of a page that somebody else had filled, and those whom we
		 * cannot help, look again. */
		if (was_there)
			(void)!pager_wake(s, offset, length);
		offset += length;
	}
	if (covered != end - start)
		return PLACE_PARTLY;
	for (uint32_t i = 0; i < count; i++)
		pager_mark_done(p, first + i);
	if (from)
		p->stats.filled += count;
	else
		p->stats.zeroed += count;
	if (from)
		pager_release_if_done(p);
	return PLACE_OK;
}
