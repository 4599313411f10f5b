/*
 * Reads, writes and zeroing. A request proceeds in windows: up to BLK_RUNS transfers that go on at the same time. A raw
 * image needs one window of one transfer, straight between the file and guest memory. With an overlay a window is cut
 * where the place of the data changes; and a buffer that O_DIRECT cannot take, or a write to a part of a block that the
 * overlay does not have yet, is a window of its own through a bounce buffer.
 */
#include "blk_impl.h"

#include <errno.h>
#include <linux/falloc.h>
#include <string.h>

#define BLOCK ((uint64_t)MC_BLK_OVERLAY_BLOCK)

static void take_bounce(struct mc_blk *b, struct blk_req *r) { r->bounce = b->bounce_free[--b->bounces]; }

static void drop_bounce(struct mc_blk *b, struct blk_req *r)
{
	b->bounce_free[b->bounces++] = r->bounce;
	r->bounce = NULL;
}

/* Submits op of request r. off and len are of the disk; an overlay's data lies at an offset. */
static void submit(struct mc_blk *b, struct blk_req *r, struct blk_op *op, enum blk_op_kind kind, uint8_t file,
		   uint64_t off, uint64_t len, void (*done)(struct mc_blk *, struct blk_op *, int64_t))
{
	op->kind = kind;
	op->file = file;
	op->disk_off = off;
	op->disk_len = len;
	op->off = off + b->data_off[file];
	op->len = len;
	op->req = r;
	op->done = done;
	r->inflight++;
	blk_submit(b, op);
}

static void use_buffer(struct blk_op *op, void *buf, uint64_t len)
{
	op->one = (struct iovec){.iov_base = buf, .iov_len = len};
	op->iov = &op->one;
	op->niov = 1;
}

/* The data file of what is written or is not in the base. */
static uint8_t data_file(const struct mc_blk *b) { return blk_has_overlay(b) ? FILE_OVERLAY : FILE_DISK; }

/* Accounts for a transfer's end. True: it is complete; false: the rest was submitted, or it failed. */
static bool transferred(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	struct blk_req *r = op->req;

	if (res == -EINTR || res == -EAGAIN)
		res = 0;
	else if (res < 0 || res == 0) {
		/* 0: the file ends before the disk does, somebody cut it off. */
		if (!r->error)
			r->error = res ? (int)-res : EIO;
		return false;
	}
	op->off += res;
	op->len -= blk_min(res, op->len);
	if (!op->len)
		return true;
	if (op->iov == r->iov) {
		memcpy(r->slices, r->iov, sizeof(*r->iov) * op->niov);
		op->iov = r->slices;
	}
	while (res) {
		uint64_t part = blk_min(res, op->iov->iov_len);

		op->iov->iov_base = (uint8_t *)op->iov->iov_base + part;
		op->iov->iov_len -= part;
		res -= part;
		if (!op->iov->iov_len) {
			op->iov++;
			op->niov--;
		}
	}
	r->inflight++;
	blk_submit(b, op);
	return false;
}

static void op_ended(struct mc_blk *b, struct blk_req *r)
{
	if (r->inflight)
		return;
	if (r->bounce)
		drop_bounce(b, r);
	blk_io_step(b, r);
}

static void plain_done(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	struct blk_req *r = op->req;

	r->inflight--;
	if (transferred(b, op, res) && op->kind == OP_WRITE && op->file == FILE_OVERLAY)
		blk_overlay_mark(b, op->disk_off, op->disk_len, BLOCK_DATA);
	op_ended(b, r);
}

static void bounced_read_done(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	struct blk_req *r = op->req;

	r->inflight--;
	if (transferred(b, op, res))
		mc_iov_write(r->iov, r->niov, op->disk_off - r->off, r->bounce, op->disk_len);
	op_ended(b, r);
}

/* The second half of copying a block up: what the request changes of it, and out with the whole block. */
static void copy_up(struct mc_blk *b, struct blk_req *r, uint64_t block_off, uint64_t block_len)
{
	uint64_t from = r->off > block_off ? r->off : block_off;
	uint64_t to = blk_min(r->off + r->len, block_off + block_len);

	if (r->zeroes)
		memset(r->bounce + (from - block_off), 0, to - from);
	else
		mc_iov_read(r->iov, r->niov, from - r->off, r->bounce + (from - block_off), to - from);
	b->counters.copied++;
	use_buffer(&r->ops[0], r->bounce, block_len);
	submit(b, r, &r->ops[0], OP_WRITE, FILE_OVERLAY, block_off, block_len, plain_done);
}

static void copy_up_read_done(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	struct blk_req *r = op->req;

	r->inflight--;
	if (transferred(b, op, res))
		copy_up(b, r, op->disk_off, op->disk_len);
	op_ended(b, r);
}

/* The bytes of the block at off, less than BLOCK at the disk's end. */
static uint64_t block_len(const struct mc_blk *b, uint64_t off) { return blk_min(BLOCK, b->size - off / BLOCK * BLOCK); }

/* Writes a part of one block that the overlay may not have. Returns the bytes of the request that this covers. */
static uint64_t window_partial(struct mc_blk *b, struct blk_req *r)
{
	uint64_t at = r->off + r->pos, start = at / BLOCK * BLOCK, len = block_len(b, at);
	uint64_t n = blk_min(r->len - r->pos, start + len - at), run = len;
	uint8_t file = blk_overlay_place(b, start, &run);
	struct blk_op *op = &r->ops[0];

	if (file == FILE_NONE && r->zeroes)
		return n;
	take_bounce(b, r);
	if (file == FILE_NONE) {
		memset(r->bounce, 0, len);
		copy_up(b, r, start, len);
	} else {
		use_buffer(op, r->bounce, len);
		submit(b, r, op, OP_READ, file, start, len, copy_up_read_done);
	}
	return n;
}

/* One transfer through a bounce buffer, of len bytes at most. */
static uint64_t window_bounce(struct mc_blk *b, struct blk_req *r, uint8_t file, uint64_t len)
{
	struct blk_op *op = &r->ops[0];
	bool out = r->type == VIRTIO_BLK_T_OUT;

	len = blk_min(len, BLK_BOUNCE_SIZE);
	take_bounce(b, r);
	b->counters.bounced++;
	if (out)
		mc_iov_read(r->iov, r->niov, r->pos, r->bounce, len);
	use_buffer(op, r->bounce, len);
	submit(b, r, op, out ? OP_WRITE : OP_READ, file, r->off + r->pos, len, out ? plain_done : bounced_read_done);
	return len;
}

/* Finds the buffer that holds byte pos of the data. */
static uint32_t find(const struct blk_req *r, uint64_t pos, uint64_t *skip)
{
	uint32_t i = 0;

	while (pos >= r->iov[i].iov_len)
		pos -= r->iov[i++].iov_len;
	*skip = pos;
	return i;
}

/* A read of len bytes, of which parts lie in the base, parts in overlays, and parts are zero. */
static uint64_t window_read(struct mc_blk *b, struct blk_req *r, uint64_t len)
{
	uint64_t skip, pos = r->pos, end = pos + len;
	uint32_t i = find(r, pos, &skip), used = 0, ops = 0;

	while (pos < end && ops < BLK_RUNS) {
		uint64_t run = end - pos, at = r->off + pos;
		uint8_t file = blk_overlay_place(b, at, &run);
		struct iovec *first = &r->slices[used];

		for (uint64_t left = run; left; ) {
			uint64_t part = blk_min(left, r->iov[i].iov_len - skip);
			uint8_t *base = (uint8_t *)r->iov[i].iov_base + skip;

			if (file == FILE_NONE)
				memset(base, 0, part);
			else
				r->slices[used++] = (struct iovec){.iov_base = base, .iov_len = part};
			left -= part;
			skip += part;
			if (skip == r->iov[i].iov_len) {
				skip = 0;
				i++;
			}
		}
		if (file != FILE_NONE) {
			struct blk_op *op = &r->ops[ops++];

			op->iov = first;
			op->niov = &r->slices[used] - first;
			submit(b, r, op, OP_READ, file, at, run, plain_done);
		}
		pos += run;
	}
	return pos - r->pos;
}

/* The rest of the request, or len bytes of it, in one transfer from where the data is. */
static uint64_t window_whole(struct mc_blk *b, struct blk_req *r, uint8_t file, uint64_t len)
{
	struct blk_op *op = &r->ops[0];

	if (r->pos == 0 && len == r->len) {
		op->iov = r->iov;
		op->niov = r->niov;
	} else {
		uint64_t skip, left = len;
		uint32_t i = find(r, r->pos, &skip), n = 0;

		for (; left; i++, n++, skip = 0) {
			uint64_t part = blk_min(left, r->iov[i].iov_len - skip);

			r->slices[n] = (struct iovec){.iov_base = (uint8_t *)r->iov[i].iov_base + skip, .iov_len = part};
			left -= part;
		}
		op->iov = r->slices;
		op->niov = n;
	}
	submit(b, r, op, r->type == VIRTIO_BLK_T_OUT ? OP_WRITE : OP_READ, file, r->off + r->pos, len, plain_done);
	return len;
}

static void fallocate_done(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	struct blk_req *r = op->req;

	r->inflight--;
	if (res == -EINTR || res == -EAGAIN) {
		r->inflight++;
		blk_submit(b, op);
		return;
	}
	if (blk_has_overlay(b)) {
		/* The map says that the blocks are zero, hole or not: a host that cannot punch only keeps the space. */
		blk_overlay_mark(b, op->disk_off, op->disk_len, BLOCK_ZERO);
	} else if (res == -EOPNOTSUPP && r->type == VIRTIO_BLK_T_WRITE_ZEROES) {
		if (op->mode & FALLOC_FL_PUNCH_HOLE)
			b->no_punch = true;
		else
			b->no_zero_range = true;
		r->pos -= op->disk_len;	/* again, by the next best way */
	} else if (res < 0 && !r->error) {
		r->error = -res;
	}
	op_ended(b, r);
}

static uint64_t window_fallocate(struct mc_blk *b, struct blk_req *r, int mode, uint64_t len)
{
	struct blk_op *op = &r->ops[0];

	op->mode = mode | FALLOC_FL_KEEP_SIZE;
	submit(b, r, op, OP_FALLOCATE, data_file(b), r->off + r->pos, len, fallocate_done);
	return len;
}

/* Zeroes of a raw image: a hole where that is allowed, else a zeroed range, else zeroes. On a block device the kernel's
 * fallocate is what BLKDISCARD with its guarantee, and BLKZEROOUT, do. */
static uint64_t window_zero_raw(struct mc_blk *b, struct blk_req *r)
{
	uint64_t len = r->len - r->pos;
	struct blk_op *op = &r->ops[0];

	if (r->type == VIRTIO_BLK_T_DISCARD || (r->unmap && !b->no_punch))
		return window_fallocate(b, r, FALLOC_FL_PUNCH_HOLE, len);
	if (!b->no_zero_range)
		return window_fallocate(b, r, FALLOC_FL_ZERO_RANGE, len);
	len = blk_min(len, BLK_ZEROES);
	use_buffer(op, b->zeroes, len);
	submit(b, r, op, OP_WRITE, FILE_DISK, r->off + r->pos, len, plain_done);
	return len;
}

/* Bytes at the request's position that are whole blocks; 0 when it stands in, or ends in, a part of one. */
static uint64_t whole_blocks(const struct mc_blk *b, const struct blk_req *r)
{
	uint64_t at = r->off + r->pos, end = r->off + r->len;

	if (at % BLOCK)
		return 0;
	if (end % BLOCK && end != b->size)
		end -= end % BLOCK;
	return end > at ? end - at : 0;
}

static uint64_t window_overlay_write(struct mc_blk *b, struct blk_req *r)
{
	uint64_t len = whole_blocks(b, r);

	if (r->zeroes) {
		/* A discard is advice, so parts of blocks may stay. */
		if (!len && r->type == VIRTIO_BLK_T_DISCARD)
			return blk_min(r->len - r->pos, BLOCK - (r->off + r->pos) % BLOCK);
		if (!len)
			return window_partial(b, r);
		if (b->p.discard && blk_overlay_has_data(b, r->off + r->pos, len))
			return window_fallocate(b, r, FALLOC_FL_PUNCH_HOLE, len);
		blk_overlay_mark(b, r->off + r->pos, len, BLOCK_ZERO);
		return len;
	}
	if (!len) {
		uint64_t run = 1;

		if (blk_overlay_run(b, r->off + r->pos, &run) != BLOCK_DATA)
			return window_partial(b, r);
		len = blk_min(r->len - r->pos, BLOCK - (r->off + r->pos) % BLOCK);
	}
	return r->unaligned ? window_bounce(b, r, FILE_OVERLAY, len) : window_whole(b, r, FILE_OVERLAY, len);
}

/* Whether O_DIRECT could refuse the guest's buffers. */
static bool unaligned(const struct mc_blk *b, const struct blk_req *r)
{
	for (uint32_t i = 0; i < r->niov; i++) {
		if ((uintptr_t)r->iov[i].iov_base % b->mem_align || r->iov[i].iov_len % b->file_align)
			return true;
	}
	return false;
}

/*
 * Two writes to different parts of a block that the overlay does not have would each copy the block up, and the second
 * would undo the first. So a request that touches blocks in part waits until no other writes to them, and the other way
 * round. Whole blocks need no such care, and cost one comparison.
 */
static bool conflicts(const struct mc_blk *b, const struct blk_req *r)
{
	if (!r->partial && !b->partial_writers)
		return false;
	uint64_t first = r->off / BLOCK, end = (r->off + r->len + BLOCK - 1) / BLOCK;

	for (const struct blk_req *w = b->writers; w; w = w->next_writer) {
		if ((r->partial || w->partial) && w->off / BLOCK < end && (w->off + w->len + BLOCK - 1) / BLOCK > first)
			return true;
	}
	return false;
}

static void add_writer(struct mc_blk *b, struct blk_req *r)
{
	r->writer = true;
	r->prev_writer = NULL;
	r->next_writer = b->writers;
	if (b->writers)
		b->writers->prev_writer = r;
	b->writers = r;
	b->partial_writers += r->partial;
}

static void remove_writer(struct mc_blk *b, struct blk_req *r)
{
	r->writer = false;
	b->partial_writers -= r->partial;
	if (r->prev_writer)
		r->prev_writer->next_writer = r->next_writer;
	else
		b->writers = r->next_writer;
	if (r->next_writer)
		r->next_writer->prev_writer = r->prev_writer;
}

void blk_io_begin(struct mc_blk *b, struct blk_req *r)
{
	bool write = r->type != VIRTIO_BLK_T_IN;
	uint64_t end = r->off + r->len;

	r->unaligned = b->p.direct && !r->zeroes && unaligned(b, r);
	if (write && blk_has_overlay(b)) {
		r->partial = r->type != VIRTIO_BLK_T_DISCARD && (r->off % BLOCK || (end % BLOCK && end != b->size));
		if (conflicts(b, r)) {
			blk_list_add(&b->waiting_writers, r);
			return;
		}
		add_writer(b, r);
	}
	blk_io_step(b, r);
}

/* All of it is done, or failed. */
static void end(struct mc_blk *b, struct blk_req *r)
{
	if (r->writer) {
		remove_writer(b, r);
		b->writer_left = true;
	}
	/* Without a FLUSH that the driver could send, or when it chose so, a completed write is a permanent one (5.2.5.2). */
	if (!r->error && r->type != VIRTIO_BLK_T_IN && !__atomic_load_n(&b->writeback, __ATOMIC_RELAXED))
		blk_flush_add(b, r);
	else
		blk_req_finish(b, r);
}

/* Lets those go on that waited for a bounce buffer or for another writer. From the loop, so that nothing recurses. */
void blk_io_wake(struct mc_blk *b)
{
	while (b->waiting_bounce.head && b->bounces)
		blk_io_step(b, blk_list_take(&b->waiting_bounce));
	while (b->writer_left && b->waiting_writers.head) {
		struct blk_list again = b->waiting_writers;
		struct blk_req *r;

		b->writer_left = false;
		b->waiting_writers = (struct blk_list){0};
		while ((r = blk_list_take(&again)))
			blk_io_begin(b, r);
	}
}

/* Goes on with a request of which nothing is in flight: window after window, until one waits for the host. */
void blk_io_step(struct mc_blk *b, struct blk_req *r)
{
	while (!r->error && r->pos < r->len) {
		bool read = r->type == VIRTIO_BLK_T_IN;
		uint64_t pos = r->pos, n, run = r->len - pos;

		/* Whether it will be needed is known only later; a request that may need one waits for one. */
		if ((r->unaligned || r->partial) && !b->bounces) {
			blk_list_add(&b->waiting_bounce, r);
			return;
		}
		if (!blk_has_overlay(b))
			n = r->zeroes ? window_zero_raw(b, r)
			    : r->unaligned ? window_bounce(b, r, FILE_DISK, run) : window_whole(b, r, FILE_DISK, run);
		else if (!read)
			n = window_overlay_write(b, r);
		else if (!r->unaligned)
			n = window_read(b, r, run);
		else {
			uint8_t file = blk_overlay_place(b, r->off + pos, &run);

			/* A zero run of memory that is not aligned is no transfer at all. */
			n = file == FILE_NONE ? window_read(b, r, run) : window_bounce(b, r, file, run);
		}
		r->pos += n;
		if (r->inflight)
			return;
	}
	end(b, r);
}
