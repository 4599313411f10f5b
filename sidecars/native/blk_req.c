/*
 * From a chain to a request and back (virtio 1.2, section 5.2.6). The header, the data and the status byte may be split
 * over buffers in any way (2.7.4.1): the header is the first 16 readable bytes, the status the last writable one.
 */
#include "blk_impl.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

void blk_list_add(struct blk_list *l, struct blk_req *r)
{
	r->next = NULL;
	if (l->tail)
		l->tail->next = r;
	else
		l->head = r;
	l->tail = r;
}

struct blk_req *blk_list_take(struct blk_list *l)
{
	struct blk_req *r = l->head;

	if (r) {
		l->head = r->next;
		if (!l->head)
			l->tail = NULL;
	}
	return r;
}

void blk_req_complete(struct mc_blk *b, struct blk_req *r, uint8_t status, uint32_t in_len)
{
	struct blk_queue *q = r->q;

	*r->status = status;
	/* Of a read that failed, too: some of it may have arrived. */
	if (r->type == VIRTIO_BLK_T_IN || r->type == VIRTIO_BLK_T_GET_ID)
		mc_mem_mark_iov(q->vq.mem, r->iov, r->niov, r->len);
	mc_mem_mark(q->vq.mem, r->status, 1);
	if (status != VIRTIO_BLK_S_OK) {
		q->vq.stats->errors++;
		MC_TRACE(q->vq.watch, MC_EV_ERROR, q->vq.index, r->head, status, r->error);
	}
	mc_vq_push(&q->vq, r->head, in_len);
	r->next = q->free;
	q->free = r;
	b->requests--;
}

void blk_req_refuse(struct mc_blk *b, struct blk_req *r, uint8_t status)
{
	b->counters.refused++;
	blk_req_complete(b, r, status, r->in_len == 1 ? 1 : 0);
}

static void signal_event(struct mc_blk *b)
{
	const uint64_t one = 1;
	/* EAGAIN: it is signalled already. */
	ssize_t n = write(b->p.event_fd, &one, sizeof(one));
	(void)n;
}

void blk_req_finish(struct mc_blk *b, struct blk_req *r)
{
	struct mc_vq_stats *stats = r->q->vq.stats;

	if (!r->error) {
		if (r->type == VIRTIO_BLK_T_IN)
			stats->bytes_out += r->len;
		else if (r->type == VIRTIO_BLK_T_OUT)
			stats->bytes_in += r->len;
		blk_req_complete(b, r, VIRTIO_BLK_S_OK, r->in_len);
		return;
	}
	/* A discard is advice that this host cannot take. */
	if (r->error == EOPNOTSUPP && r->type == VIRTIO_BLK_T_DISCARD) {
		blk_req_refuse(b, r, VIRTIO_BLK_S_UNSUPP);
		return;
	}
	b->counters.io_errors++;
	b->counters.last_error = r->error;
	b->counters.last_error_type = r->type;
	b->counters.last_error_offset = r->off;
	signal_event(b);
	/* used.len promises bytes from the start of the writable part; of failed data there is nothing to promise. */
	blk_req_complete(b, r, VIRTIO_BLK_S_IOERR, r->in_len == 1 ? 1 : 0);
}

/* Whether [sector, sector + bytes) is on the disk, in whole blocks. Sets off and len; no sum here can wrap. */
static bool in_range(const struct mc_blk *b, struct blk_req *r, uint64_t sector, uint64_t bytes)
{
	if (sector > b->config.capacity || bytes > b->size - sector * 512)
		return false;
	r->off = sector * 512;
	r->len = bytes;
	return r->off % b->config.blk_size == 0 && r->len % b->config.blk_size == 0;
}

/* Drops n bytes at the front of the data vector. */
static void trim(struct blk_req *r, uint64_t n)
{
	while (n) {
		uint64_t part = blk_min(n, r->iov->iov_len);

		r->iov->iov_base = (uint8_t *)r->iov->iov_base + part;
		r->iov->iov_len -= part;
		n -= part;
		if (!r->iov->iov_len) {
			r->iov++;
			r->niov--;
		}
	}
}

static void start_rw(struct mc_blk *b, struct blk_req *r, uint64_t sector, uint64_t bytes)
{
	bool out = r->type == VIRTIO_BLK_T_OUT;

	if (!in_range(b, r, sector, bytes) || (out && b->p.readonly)) {
		blk_req_refuse(b, r, VIRTIO_BLK_S_IOERR);
		return;
	}
	if (out)
		b->counters.writes++;
	else
		b->counters.reads++;
	blk_io_begin(b, r);
}

static void start_range(struct mc_blk *b, struct blk_req *r, uint64_t bytes)
{
	bool discard = r->type == VIRTIO_BLK_T_DISCARD;
	struct virtio_blk_discard_write_zeroes seg;
	uint32_t flags, known = discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

	if (!(b->features & (1ull << (discard ? VIRTIO_BLK_F_DISCARD : VIRTIO_BLK_F_WRITE_ZEROES)))) {
		blk_req_refuse(b, r, VIRTIO_BLK_S_UNSUPP);
		return;
	}
	/* max_discard_seg and max_write_zeroes_seg are 1. */
	if (bytes != sizeof(seg) || b->p.readonly) {
		blk_req_refuse(b, r, VIRTIO_BLK_S_IOERR);
		return;
	}
	mc_iov_read(r->iov, r->niov, 0, &seg, sizeof(seg));
	flags = seg.flags;
	if (flags & ~known) {
		blk_req_refuse(b, r, VIRTIO_BLK_S_UNSUPP);
		return;
	}
	if (seg.num_sectors > b->config.max_write_zeroes_sectors || !in_range(b, r, seg.sector, seg.num_sectors * 512ull)) {
		blk_req_refuse(b, r, VIRTIO_BLK_S_IOERR);
		return;
	}
	r->zeroes = true;
	r->unmap = discard || ((flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) && b->p.discard);
	if (discard)
		b->counters.discards++;
	else
		b->counters.write_zeroes++;
	blk_io_begin(b, r);
}

/* Begins the request in the chain. False: it has no header or no status byte, and so cannot be answered. */
static bool start(struct mc_blk *b, struct blk_req *r, const struct mc_chain *c)
{
	struct virtio_blk_outhdr h;

	if (mc_iov_read(r->chain, c->n_out, 0, &h, sizeof(h)) != sizeof(h) || !c->len_in)
		return false;
	struct iovec *last = &r->chain[c->n_out + c->n_in - 1];

	last->iov_len--;
	r->status = (uint8_t *)last->iov_base + last->iov_len;
	r->type = h.type;
	r->head = c->head;
	r->error = 0;
	r->inflight = 0;
	r->off = r->len = r->pos = 0;
	r->zeroes = r->unmap = r->partial = r->unaligned = r->writer = false;
	r->bounce = NULL;
	b->requests++;

	uint64_t in = c->len_in - 1, out = c->len_out - sizeof(h);

	r->sector = h.sector;
	r->bytes_in = in;
	r->bytes_out = out;

	if (r->type == VIRTIO_BLK_T_IN || r->type == VIRTIO_BLK_T_GET_ID) {
		r->iov = &r->chain[c->n_out];
		r->niov = c->n_in - (last->iov_len == 0);
		r->in_len = c->len_in;
	} else {
		r->iov = r->chain;
		r->niov = c->n_out;
		trim(r, sizeof(h));
		/* Should a driver leave room before the status byte, nothing is written there. */
		r->in_len = in ? 0 : 1;
	}

	/* Relaxed: blk_inject() looks again. */
	if (!__builtin_expect(__atomic_load_n(&b->inject, __ATOMIC_RELAXED) != 0, 0) || !blk_inject(b, r))
		blk_req_begin(b, r);
	return true;
}

void blk_req_begin(struct mc_blk *b, struct blk_req *r)
{
	uint64_t in = r->bytes_in, out = r->bytes_out;

	switch (r->type) {
	case VIRTIO_BLK_T_IN:
		start_rw(b, r, r->sector, in);
		break;
	case VIRTIO_BLK_T_OUT:
		start_rw(b, r, r->sector, out);
		break;
	case VIRTIO_BLK_T_FLUSH:
		b->counters.flushes++;
		blk_flush_add(b, r);
		break;
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		start_range(b, r, out);
		break;
	case VIRTIO_BLK_T_GET_ID:
		r->len = mc_iov_write(r->iov, r->niov, 0, b->p.serial, sizeof(b->p.serial));
		r->in_len = r->len + (in <= sizeof(b->p.serial));
		blk_req_complete(b, r, VIRTIO_BLK_S_OK, r->in_len);
		break;
	default:
		blk_req_refuse(b, r, VIRTIO_BLK_S_UNSUPP);
	}
}

/* No slot: the driver has more in flight than the queue is long, which is its own loss. */
bool blk_queue_ready(const struct mc_blk *b, const struct blk_queue *q)
{
	return q->free && b->inflight + BLK_RUNS <= BLK_MAX_INFLIGHT && !q->vq.error;
}

/* Starts what the queue holds. True: more may be there. */
bool blk_queue_poll(struct mc_blk *b, struct blk_queue *q)
{
	/* The sync engine does the whole transfer in submit: give the driver what is done before going on. */
	uint32_t budget = b->engine == &blk_sync ? 8 : UINT32_MAX;

	for (; budget; budget--) {
		if (!blk_queue_ready(b, q))
			return false;
		struct blk_req *r = q->free;
		struct mc_chain c = {.max = BLK_IOV, .iov = r->chain};
		int got = mc_vq_pop(&q->vq, &c);

		if (got == 0)
			return false;
		if (got > 0) {
			q->free = r->next;
			if (start(b, r, &c))
				continue;
			r->next = q->free;
			q->free = r;
			q->vq.error = MC_VQ_BAD_REQUEST;
		}
		if (!q->reported) {
			q->reported = true;
			signal_event(b);
		}
		return false;
	}
	return true;
}
