/*
 * The copy-on-write map (docs/overlay-format.md): for each block of 4096 bytes two bits that say where its present content
 * is: in the base, in the overlay at the same offset, or nowhere since it is zero. Data has no other order than the
 * disk's, so the map is all there is to keep consistent, and each pair of bits stands for itself: a torn write
 * of the map leaves some of them old and some new, and both are right as long as the data came first.
 */
#define _GNU_SOURCE
#include "blk_impl.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BLOCK ((uint64_t)MC_BLK_OVERLAY_BLOCK)
#define PAGE 4096ull
#define PER_BYTE 4ull
#define PER_PAGE (PAGE * PER_BYTE)

static enum blk_state get(const uint8_t *map, uint64_t i) { return map[i / PER_BYTE] >> (i % PER_BYTE * 2) & 3; }

enum blk_state blk_overlay_run(const struct mc_blk *b, uint64_t off, uint64_t *len)
{
	uint64_t first = off / BLOCK, end = (off + *len + BLOCK - 1) / BLOCK, i = first + 1;
	enum blk_state state = get(b->ov.live, first);
	uint8_t full = state * 0x55;

	while (i < end && get(b->ov.live, i) == state) {
		i++;
		/* Four at a time where the byte says so. */
		while (i % PER_BYTE == 0 && i + PER_BYTE <= end && b->ov.live[i / PER_BYTE] == full)
			i += PER_BYTE;
	}
	if (i < end)
		*len = i * BLOCK - off;
	return state;
}

void blk_overlay_mark(struct mc_blk *b, uint64_t off, uint64_t len, enum blk_state state)
{
	uint64_t first = (off + BLOCK - 1) / BLOCK;
	uint64_t end = off + len >= b->size ? b->ov.blocks : (off + len) / BLOCK;

	for (uint64_t i = first; i < end; i++) {
		uint8_t *byte = &b->ov.live[i / PER_BYTE], shift = i % PER_BYTE * 2;
		enum blk_state old = *byte >> shift & 3;

		if (old == state)
			continue;
		b->counters.overlay_blocks += (state == BLOCK_DATA) - (old == BLOCK_DATA);
		*byte = (*byte & ~(3 << shift)) | state << shift;
		b->ov.dirty[i / PER_PAGE] = 1;
	}
}

bool blk_overlay_has_data(const struct mc_blk *b, uint64_t off, uint64_t len)
{
	while (len) {
		uint64_t run = len;

		if (blk_overlay_run(b, off, &run) == BLOCK_DATA)
			return true;
		off += run;
		len -= run;
	}
	return false;
}

static void *map_anonymous(uint64_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

/* Reads the parts of the map that exist: the file is sparse, and so is the memory. */
static int load(struct mc_blk *b)
{
	struct blk_overlay *ov = &b->ov;
	off_t map_off = ov->map_off, end = ov->map_off + ov->pages * PAGE, at = map_off;

	while (at < end) {
		off_t data = lseek(b->p.overlay_fd, at, SEEK_DATA);

		if (data < 0 && errno == ENXIO)
			break;
		if (data < 0)
			return errno;
		off_t hole = lseek(b->p.overlay_fd, data, SEEK_HOLE);

		if (hole < 0)
			return errno;
		/* O_DIRECT: whole pages, whatever the file system takes for its blocks. */
		data -= data % PAGE;
		hole += PAGE - 1 - (hole + PAGE - 1) % PAGE;
		hole = hole < end ? hole : end;
		while (data < hole) {
			ssize_t n = pread(b->p.overlay_fd, ov->saved + (data - map_off), hole - data, data);

			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				return n ? errno : EIO;
			data += n;
		}
		at = data > at ? data : end;
	}
	for (uint64_t p = 0; p < ov->pages; p++) {
		static const uint8_t none[PAGE];
		uint8_t *from = ov->saved + p * PAGE;

		if (!memcmp(from, none, PAGE))
			continue;
		memcpy(ov->live + p * PAGE, from, PAGE);
		for (uint64_t i = 0; i < PER_PAGE; i++) {
			enum blk_state s = get(from, i);

			if (s == BLOCK_BAD || (s && p * PER_PAGE + i >= ov->blocks))
				return EBADMSG;
			b->counters.overlay_blocks += s == BLOCK_DATA;
		}
	}
	return 0;
}

int blk_overlay_open(struct mc_blk *b, char *error)
{
	struct blk_overlay *ov = &b->ov;

	ov->map_off = b->p.overlay_map;
	ov->data_off = b->p.overlay_data;
	ov->blocks = (b->size + BLOCK - 1) / BLOCK;
	ov->pages = (ov->blocks + PER_PAGE - 1) / PER_PAGE;
	if (ov->map_off % PAGE || ov->data_off % PAGE || ov->map_off < PAGE || ov->map_off > ov->data_off ||
	    ov->data_off - ov->map_off < ov->pages * PAGE) {
		snprintf(error, 256, "the overlay's header places its map or its data wrongly");
		return EINVAL;
	}
	ov->live = map_anonymous(ov->pages * PAGE);
	ov->saved = map_anonymous(ov->pages * PAGE);
	ov->dirty = map_anonymous(ov->pages);
	b->flush.writing = map_anonymous(ov->pages);
	if (!ov->live || !ov->saved || !ov->dirty || !b->flush.writing) {
		snprintf(error, 256, "no memory for the overlay's map: %s", strerror(ENOMEM));
		return ENOMEM;
	}
	int err = load(b);

	if (err == EBADMSG)
		snprintf(error, 256, "the overlay's map is damaged: it has a block in a state that does not exist");
	else if (err)
		snprintf(error, 256, "the overlay's map cannot be read: %s", strerror(err));
	return err;
}

void blk_overlay_close(struct mc_blk *b)
{
	struct blk_overlay *ov = &b->ov;

	if (ov->live)
		munmap(ov->live, ov->pages * PAGE);
	if (ov->saved)
		munmap(ov->saved, ov->pages * PAGE);
	if (ov->dirty)
		munmap(ov->dirty, ov->pages);
	if (b->flush.writing)
		munmap(b->flush.writing, ov->pages);
}

/* The flush of blk_flush.c, for a process that ends: nothing is in flight. */
int blk_overlay_sync(struct mc_blk *b)
{
	struct blk_overlay *ov = &b->ov;

	if (ov->lost)
		return EIO;
	if (fdatasync(b->p.overlay_fd)) {
		ov->lost = true;
		return errno;
	}
	bool wrote = false;

	for (uint64_t p = 0; p < ov->pages; p++) {
		if (!ov->dirty[p])
			continue;
		memcpy(ov->saved + p * PAGE, ov->live + p * PAGE, PAGE);
		ssize_t n = pwrite(b->p.overlay_fd, ov->saved + p * PAGE, PAGE, ov->map_off + p * PAGE);

		if (n != (ssize_t)PAGE)
			return n < 0 ? errno : ENOSPC;
		ov->dirty[p] = 0;
		wrote = true;
	}
	return wrote && fdatasync(b->p.overlay_fd) ? errno : 0;
}
