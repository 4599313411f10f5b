/* Sizes and alignments of the backend, and the configuration space that follows from them (virtio 1.2, section 5.2.4). */
#define _GNU_SOURCE
#include "blk_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

static int file_size(int fd, uint64_t *size)
{
	struct stat st;

	if (fstat(fd, &st))
		return errno;
	if (S_ISBLK(st.st_mode))
		return ioctl(fd, BLKGETSIZE64, size) ? errno : 0;
	if (!S_ISREG(st.st_mode))
		return ENOTBLK;
	*size = st.st_size;
	return 0;
}

/* What O_DIRECT asks of buffers and offsets. STATX_DIOALIGN (Linux 6.1) knows; before it, 4096 is what every disk takes in
 * buffers, and offsets go by the sector size, or by 512, which fails on the few file systems with larger ones. */
static void dio_align(int fd, uint32_t *mem, uint32_t *file)
{
	struct statx sx;
	struct stat st;
	int sector = 512;

	memset(&sx, 0, sizeof(sx));
	if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) == 0 && (sx.stx_mask & STATX_DIOALIGN) &&
	    sx.stx_dio_mem_align) {
		*mem = sx.stx_dio_mem_align > *mem ? sx.stx_dio_mem_align : *mem;
		*file = sx.stx_dio_offset_align > *file ? sx.stx_dio_offset_align : *file;
		return;
	}
	if (fstat(fd, &st) == 0 && S_ISBLK(st.st_mode) && ioctl(fd, BLKSSZGET, &sector))
		sector = 512;
	*mem = *mem > 4096 ? *mem : 4096;
	*file = (uint32_t)sector > *file ? (uint32_t)sector : *file;
}

static uint32_t logical_block(const struct mc_blk *b)
{
	int sector = 0;
	uint32_t size = b->file_align > 512 ? b->file_align : 512;

	/* A 4K-native disk takes nothing smaller, with or without O_DIRECT, at least not without rereading. */
	if (ioctl(b->p.disk_fd, BLKSSZGET, &sector) == 0 && (uint32_t)sector > size)
		size = sector;
	return size;
}

int blk_geometry(struct mc_blk *b, char *error)
{
	uint64_t size = 0;
	int err = file_size(b->p.disk_fd, &size);

	if (err) {
		snprintf(error, 256, "the image is neither a file nor a block device: %s", strerror(err));
		return err;
	}
	b->mem_align = b->file_align = 1;
	if (b->p.direct) {
		dio_align(b->p.disk_fd, &b->mem_align, &b->file_align);
		for (uint32_t i = FILE_OVERLAY; blk_has_overlay(b) && i < b->files; i++)
			dio_align(b->fds[i], &b->mem_align, &b->file_align);
	}
	uint32_t lb = logical_block(b);

	if (lb > MC_BLK_OVERLAY_BLOCK) {
		snprintf(error, 256, "the image needs transfers of %u bytes, more than the supported %u", lb, MC_BLK_OVERLAY_BLOCK);
		return EINVAL;
	}
	if (blk_has_overlay(b)) {
		if (b->p.overlay_size > size) {
			snprintf(error, 256, "the overlay is of a disk of %llu bytes, its base has %llu",
				 (unsigned long long)b->p.overlay_size, (unsigned long long)size);
			return EINVAL;
		}
		size = b->p.overlay_size;
	}
	b->size = size - size % lb;
	if (!b->size && !b->p.removed) {
		snprintf(error, 256, "the image has %llu bytes, less than a block of %u", (unsigned long long)size, lb);
		return EINVAL;
	}

	uint32_t most = (1u << 30) / 512;	/* a range in one request: bounds how long one can take */

	b->config = (struct virtio_blk_config){
		.capacity = b->size / 512,
		.seg_max = MC_BLK_SEG_MAX,
		.blk_size = lb,
		.physical_block_exp = __builtin_ctz(MC_BLK_OVERLAY_BLOCK / lb),
		.min_io_size = MC_BLK_OVERLAY_BLOCK / lb,
		.wce = 1,
		.num_queues = b->p.queues,
		.max_discard_sectors = most,
		.max_discard_seg = 1,
		.discard_sector_alignment = MC_BLK_OVERLAY_BLOCK / 512,
		.max_write_zeroes_sectors = most,
		.max_write_zeroes_seg = 1,
		.write_zeroes_may_unmap = b->p.discard,
	};
	return 0;
}
