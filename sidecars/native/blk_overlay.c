/*
 * The copy-on-write map (docs/overlay-format.md): for each block of 4096 bytes two bits that say where its present content
 * is: in the base, in the overlay at the same offset, or nowhere since it is zero. Data has no other order than the
 * disk's, so the map is all there is to keep consistent, and each pair of bits stands for itself: a torn write
 * of the map leaves some of them old and some new, and both are right as long as the data came first.
 *
 * The base may be a stack of read-only overlays over an image. What they say is put together once, at open, into a
 * byte a block, so that a read costs the same over 63 layers as over one.
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

uint8_t blk_overlay_place(const struct mc_blk *b, uint64_t off, uint64_t *len)
{
	enum blk_state state = blk_overlay_run(b, off, len);

	if (state != BLOCK_BASE)
		return state == BLOCK_DATA ? FILE_OVERLAY : FILE_NONE;
	if (!b->ov.below)
		return FILE_DISK;
	uint64_t first = off / BLOCK, end = (off + *len + BLOCK - 1) / BLOCK, i = first + 1;

	while (i < end && b->ov.below[i] == b->ov.below[first])
		i++;
	if (i < end)
		*len = i * BLOCK - off;
	return b->ov.below[first];
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

/* Reads the parts of a map that exist: the file is sparse, and so is the memory at into. */
static int read_map(int fd, off_t map_off, uint64_t pages, uint8_t *into)
{
	off_t end = map_off + pages * PAGE, at = map_off;

	while (at < end) {
		off_t data = lseek(fd, at, SEEK_DATA);

		if (data < 0 && errno == ENXIO)
			break;
		if (data < 0)
			return errno;
		off_t hole = lseek(fd, data, SEEK_HOLE);

		if (hole < 0)
			return errno;
		/* O_DIRECT: whole pages, whatever the file system takes for its blocks. */
		data -= data % PAGE;
		hole += PAGE - 1 - (hole + PAGE - 1) % PAGE;
		hole = hole < end ? hole : end;
		while (data < hole) {
			ssize_t n = pread(fd, into + (data - map_off), hole - data, data);

			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				return n ? errno : EIO;
			data += n;
		}
		at = data > at ? data : end;
	}
	return 0;
}

static bool empty(const uint8_t *map, uint64_t page)
{
	static const uint8_t none[PAGE];

	return !memcmp(map + page * PAGE, none, PAGE);
}

/* Whether all states of a page of a map can be. */
static bool legal(const struct blk_overlay *ov, const uint8_t *map, uint64_t page)
{
	for (uint64_t i = page * PER_PAGE; i < (page + 1) * PER_PAGE; i++) {
		enum blk_state s = get(map, i);

		if (s == BLOCK_BAD || (s && i >= ov->blocks))
			return false;
	}
	return true;
}

/*
 * The map as our predecessor left it, which may say more than the file does: it was killed between two flushes. Data was
 * there before the map said so, in the host's cache at least. What differs from the file is what the next flush writes.
 */
static int take_over(struct mc_blk *b)
{
	struct blk_overlay *ov = &b->ov;

	for (uint64_t p = 0; p < ov->pages; p++) {
		if (!legal(ov, ov->live, p))
			return EBADMSG;
		ov->dirty[p] = memcmp(ov->live + p * PAGE, ov->saved + p * PAGE, PAGE) != 0;
		for (uint64_t i = p * PER_PAGE; i < ov->blocks && i < (p + 1) * PER_PAGE; i++)
			b->counters.overlay_blocks += get(ov->live, i) == BLOCK_DATA;
	}
	ov->lost = b->keep->lost;
	return 0;
}

static int load(struct mc_blk *b)
{
	struct blk_overlay *ov = &b->ov;
	int err = read_map(b->p.overlay.fd, ov->map_off, ov->pages, ov->saved);

	if (!err && ov->kept && b->keep->mapped)
		return take_over(b);
	/* A predecessor that was killed in here may have left some of it. */
	if (ov->kept)
		memset(ov->live, 0, ov->pages * PAGE);
	for (uint64_t p = 0; !err && p < ov->pages; p++) {
		if (empty(ov->saved, p))
			continue;
		if (!legal(ov, ov->saved, p))
			return EBADMSG;
		memcpy(ov->live + p * PAGE, ov->saved + p * PAGE, PAGE);
		for (uint64_t i = p * PER_PAGE; i < (p + 1) * PER_PAGE; i++)
			b->counters.overlay_blocks += get(ov->live, i) == BLOCK_DATA;
	}
	mc_in_order();
	if (!err && ov->kept)
		b->keep->mapped = 1;
	return err;
}

/* Lays what a layer has over what those under it have. */
static int load_layer(struct mc_blk *b, uint16_t layer, uint8_t *map)
{
	struct blk_overlay *ov = &b->ov;
	int err = read_map(b->p.layer[layer].fd, b->p.layer[layer].map, ov->pages, map);

	for (uint64_t p = 0; !err && p < ov->pages; p++) {
		if (empty(map, p))
			continue;
		if (!legal(ov, map, p))
			return EBADMSG;
		for (uint64_t i = p * PER_PAGE; i < ov->blocks && i < (p + 1) * PER_PAGE; i++) {
			enum blk_state s = get(map, i);

			if (s != BLOCK_BASE)
				ov->below[i] = s == BLOCK_DATA ? FILE_LAYER + layer : FILE_NONE;
		}
	}
	return err;
}

static bool fits(const struct blk_overlay *ov, const struct mc_blk_overlay_file *f)
{
	return !(f->map % PAGE || f->data % PAGE || f->map < PAGE || f->map > f->data || f->data - f->map < ov->pages * PAGE);
}

static int complain(int err, const char *which, char *error)
{
	if (err == EBADMSG)
		snprintf(error, 256, "%s map is damaged: it has a block in a state that does not exist", which);
	else if (err)
		snprintf(error, 256, "%s map cannot be read: %s", which, strerror(err));
	return err;
}

static int open_layers(struct mc_blk *b, char *error)
{
	struct blk_overlay *ov = &b->ov;
	int err = 0;

	ov->below = map_anonymous(ov->blocks);
	if (!ov->below) {
		snprintf(error, 256, "no memory for %u layers", b->p.layers);
		return ENOMEM;
	}
	for (uint16_t i = 0; !err && i < b->p.layers; i++) {
		char which[32];
		uint8_t *map;

		snprintf(which, sizeof(which), "layer %u's", i);
		if (!fits(ov, &b->p.layer[i])) {
			snprintf(error, 256, "%s header places its map or its data wrongly", which);
			return EINVAL;
		}
		map = map_anonymous(ov->pages * PAGE);
		if (!map) {
			snprintf(error, 256, "no memory for %s map", which);
			return ENOMEM;
		}
		err = complain(load_layer(b, i, map), which, error);
		munmap(map, ov->pages * PAGE);
	}
	return err;
}

int blk_overlay_open(struct mc_blk *b, char *error)
{
	struct blk_overlay *ov = &b->ov;

	ov->map_off = b->p.overlay.map;
	ov->blocks = (b->size + BLOCK - 1) / BLOCK;
	ov->pages = (ov->blocks + PER_PAGE - 1) / PER_PAGE;
	if (!fits(ov, &b->p.overlay)) {
		snprintf(error, 256, "the overlay's header places its map or its data wrongly");
		return EINVAL;
	}
	ov->kept = b->p.keep_map && b->p.keep_map_size >= ov->pages * PAGE;
	ov->live = ov->kept ? b->p.keep_map : map_anonymous(ov->pages * PAGE);
	ov->saved = map_anonymous(ov->pages * PAGE);
	ov->dirty = map_anonymous(ov->pages);
	b->flush.writing = map_anonymous(ov->pages);
	if (!ov->live || !ov->saved || !ov->dirty || !b->flush.writing) {
		snprintf(error, 256, "no memory for the overlay's map: %s", strerror(ENOMEM));
		return ENOMEM;
	}
	int err = complain(load(b), "the overlay's", error);

	return err || !b->p.layers ? err : open_layers(b, error);
}

void blk_overlay_close(struct mc_blk *b)
{
	struct blk_overlay *ov = &b->ov;

	if (ov->live && !ov->kept)
		munmap(ov->live, ov->pages * PAGE);
	if (ov->saved)
		munmap(ov->saved, ov->pages * PAGE);
	if (ov->dirty)
		munmap(ov->dirty, ov->pages);
	if (ov->below)
		munmap(ov->below, ov->blocks);
	if (b->flush.writing)
		munmap(b->flush.writing, ov->pages);
}

static int datasync(struct mc_blk *b, int fd)
{
	int err;

	do
		err = fdatasync(fd) ? errno : 0;
	while (err == EINTR);
	/* As in blk_flush.c: the kernel forgets pages that it could not write. */
	if (err)
		blk_lost(b);
	return err;
}

/* The flush of blk_flush.c while nothing is in flight. A page whose write failed stays dirty. */
int blk_overlay_sync(struct mc_blk *b)
{
	struct blk_overlay *ov = &b->ov;
	bool wrote = false;
	int err = ov->lost ? EIO : datasync(b, b->p.overlay.fd);

	for (uint64_t p = 0; !err && p < ov->pages; p++) {
		if (!ov->dirty[p])
			continue;
		memcpy(ov->saved + p * PAGE, ov->live + p * PAGE, PAGE);
		ssize_t n;

		do
			n = pwrite(b->p.overlay.fd, ov->saved + p * PAGE, PAGE, ov->map_off + p * PAGE);
		while (n < 0 && errno == EINTR);
		if (n != (ssize_t)PAGE)
			return n < 0 ? errno : ENOSPC;
		ov->dirty[p] = 0;
		wrote = true;
	}
	return wrote && !err ? datasync(b, b->p.overlay.fd) : err;
}
