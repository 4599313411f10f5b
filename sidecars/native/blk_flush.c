/*
 * What makes completed writes permanent. Flushes go in rounds, one at a time: whoever asks while a round is on its way
 * joins the next one, so that many queues share one fdatasync.
 *
 * A raw image needs one fdatasync. With an overlay the order is: copy the changed pages of the map; fdatasync, which makes
 * the data permanent that those pages speak of; write the copies; fdatasync. Whatever is lost at any moment, the
 * map on the disk never speaks of data that is not there.
 */
#include "blk_impl.h"

#include <errno.h>
#include <string.h>

#define PAGE 4096ull
#define META_RUN 256ull		/* pages in one write */

static void begin(struct mc_blk *b);

static void finish(struct mc_blk *b)
{
	struct blk_flush *f = &b->flush;
	struct blk_req *r;

	if (f->error && blk_has_overlay(b)) {
		for (uint64_t p = 0; p < b->ov.pages; p++)
			b->ov.dirty[p] |= f->writing[p];
	}
	while ((r = blk_list_take(&f->current))) {
		r->error = f->error;
		blk_req_finish(b, r);
	}
	f->running = false;
	if (f->waiting.head)
		begin(b);
}

static void submit_sync(struct mc_blk *b, void (*done)(struct mc_blk *, struct blk_op *, int64_t))
{
	struct blk_op *op = &b->flush.sync;

	op->kind = OP_FSYNC;
	op->file = blk_has_overlay(b) ? FILE_OVERLAY : FILE_DISK;
	op->off = op->len = 0;
	op->done = done;
	blk_submit(b, op);
}

static bool again(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	if (res != -EINTR && res != -EAGAIN)
		return false;
	blk_submit(b, op);
	return true;
}

static void map_synced(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	if (again(b, op, res))
		return;
	b->flush.error = res < 0 ? -res : 0;
	/* The kernel forgets pages that it could not write: a later success would mean nothing. */
	if (b->flush.error)
		blk_lost(b);
	finish(b);
}

static bool submit_page(struct mc_blk *b, struct blk_op *op);

static void page_written(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	struct blk_flush *f = &b->flush;

	if (again(b, op, res))
		return;
	if (res > 0 && (uint64_t)res < op->len) {
		op->off += res;
		op->len -= res;
		op->one.iov_base = (uint8_t *)op->one.iov_base + res;
		op->one.iov_len -= res;
		blk_submit(b, op);
		return;
	}
	f->inflight--;
	if (res <= 0 && !f->error)
		f->error = res ? -res : EIO;
	if (!f->error && submit_page(b, op))
		return;
	if (f->inflight)
		return;
	if (f->error)
		finish(b);
	else
		submit_sync(b, map_synced);
}

/* Writes the next run of pages of this round. False: there is none. */
static bool submit_page(struct mc_blk *b, struct blk_op *op)
{
	struct blk_flush *f = &b->flush;
	uint64_t p = f->next_page, n = 0;
	uint8_t *found = p < b->ov.pages ? memchr(f->writing + p, 1, b->ov.pages - p) : NULL;

	if (!found)
		return false;
	p = found - f->writing;
	while (p + n < b->ov.pages && n < META_RUN && f->writing[p + n])
		n++;
	f->next_page = p + n;
	op->one = (struct iovec){.iov_base = b->ov.saved + p * PAGE, .iov_len = n * PAGE};
	op->kind = OP_WRITE;
	op->file = FILE_OVERLAY;
	op->iov = &op->one;
	op->niov = 1;
	op->off = b->ov.map_off + p * PAGE;
	op->len = n * PAGE;
	op->done = page_written;
	f->inflight++;
	blk_submit(b, op);
	return true;
}

static void data_synced(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	struct blk_flush *f = &b->flush;

	if (again(b, op, res))
		return;
	f->error = res < 0 ? -res : 0;
	if (!blk_has_overlay(b)) {
		finish(b);
		return;
	}
	if (f->error) {
		blk_lost(b);
		finish(b);
		return;
	}
	f->next_page = 0;
	for (uint32_t i = 0; i < BLK_META_OPS && submit_page(b, &f->meta[i]); i++)
		;
	if (!f->inflight)
		finish(b);
}

/* Takes a copy of what the map is now. */
static void snapshot(struct mc_blk *b)
{
	struct blk_overlay *ov = &b->ov;
	uint8_t *found;

	memset(b->flush.writing, 0, ov->pages);
	for (uint64_t p = 0; p < ov->pages && (found = memchr(ov->dirty + p, 1, ov->pages - p)); p++) {
		p = found - ov->dirty;
		memcpy(ov->saved + p * PAGE, ov->live + p * PAGE, PAGE);
		ov->dirty[p] = 0;
		b->flush.writing[p] = 1;
	}
}

static void begin(struct mc_blk *b)
{
	struct blk_flush *f = &b->flush;

	f->running = true;
	f->error = 0;
	b->counters.syncs++;
	f->current = f->waiting;
	f->waiting = (struct blk_list){0};
	if (blk_has_overlay(b)) {
		if (b->ov.lost) {
			f->error = EIO;
			memset(f->writing, 0, b->ov.pages);
			finish(b);
			return;
		}
		snapshot(b);
	}
	submit_sync(b, data_synced);
}

void blk_flush_add(struct mc_blk *b, struct blk_req *r)
{
	if (b->p.readonly) {
		blk_req_finish(b, r);
		return;
	}
	blk_list_add(&b->flush.waiting, r);
	if (!b->flush.running)
		begin(b);
}
