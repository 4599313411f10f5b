/*
 * The device side of a split virtqueue (virtio 1.2, section 2.7).
 *
 * Ordering, once for the whole file. The driver publishes a chain by writing descriptors and the avail entry, then
 * avail.idx; we load avail.idx with acquire and so see the rest. We write used entries, then store used.idx with
 * release, so that the driver sees the entries and the data behind them. Both directions of notification are Dekker's
 * pattern, "publish mine, then look at yours", for which acquire and release are not enough: a store may pass a later
 * load even on x86, and both sides would go to sleep. Those two places have a full fence.
 *
 * The dirty log is a third party to this: the core takes a word of it (exchange) and then copies the pages that its bits
 * name; we write, and then set the bit (atomic OR). The OR releases our writes to the exchange that finds the bit, so each
 * write is in a copy that comes after it, or its bit is found in the next round. A bit set before the write would prove
 * nothing: it may be taken, and the page copied, in between. So buffers and used entries are marked before used.idx is
 * stored, since the guest may act on them from then on and this process may be killed at any moment; and used.idx itself
 * only after it was stored. Killed between those two, a sidecar leaves its mark to its replacement: mc_vq_init() marks the
 * whole used ring.
 *
 * "Read once": ring words are loaded through __atomic_load_n, descriptors by desc_read(), and only the local copies are
 * checked and used.
 */
#include "virtqueue.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <string.h>
#include <unistd.h>

/* The parts of the rings behind the flexible arrays; the index is masked by the caller. */
static uint16_t *avail_ring(const struct mc_vq *vq, uint16_t i) { return &((struct vring_avail *)vq->avail)->ring[i]; }
static struct vring_used_elem *used_ring(const struct mc_vq *vq, uint16_t i) { return &((struct vring_used *)vq->used)->ring[i]; }
static uint16_t *used_event(const struct mc_vq *vq) { return avail_ring(vq, vq->size); }
static uint16_t *avail_event(const struct mc_vq *vq) { return (uint16_t *)used_ring(vq, vq->size); }

void *mc_mem_at(const struct mc_mem *mem, uint64_t gpa, uint64_t len)
{
	for (uint32_t i = 0; i < mem->n; i++) {
		const struct mc_region *r = &mem->regions[i];
		/* In this order no sum can wrap: off < size, then len against what is left. */
		uint64_t off = gpa - r->gpa;

		if (gpa >= r->gpa && off < r->size && len && len <= r->size - off)
			return r->hva + off;
	}
	return NULL;
}

void mc_mem_mark(const struct mc_mem *mem, const void *hva, uint64_t len)
{
	if (!mem->dirty || !len)
		return;
	for (uint32_t i = 0; i < mem->n; i++) {
		const struct mc_region *r = &mem->regions[i];
		uint64_t off = (uintptr_t)hva - (uintptr_t)r->hva;

		if ((uintptr_t)hva < (uintptr_t)r->hva || off >= r->size)
			continue;
		if (len > r->size - off)
			len = r->size - off;
		uint64_t first = (r->offset + off) / MC_DIRTY_PAGE, last = (r->offset + off + len - 1) / MC_DIRTY_PAGE;

		for (uint64_t word = first / 64; word <= last / 64; word++) {
			uint64_t bits = UINT64_MAX;

			if (word == first / 64)
				bits &= UINT64_MAX << first % 64;
			if (word == last / 64)
				bits &= UINT64_MAX >> (63 - last % 64);
			/* Not skipped where the bits are set already: without a fence that look could be answered before
			 * our write is visible, and the core may take the bits and copy the page in between. */
			__atomic_fetch_or(&mem->dirty[word], bits, __ATOMIC_SEQ_CST);
		}
		return;
	}
}

void mc_mem_mark_iov(const struct mc_mem *mem, const struct iovec *iov, uint32_t n, uint64_t len)
{
	for (uint32_t i = 0; mem->dirty && i < n && len; i++) {
		uint64_t part = iov[i].iov_len < len ? iov[i].iov_len : len;

		mc_mem_mark(mem, iov[i].iov_base, part);
		len -= part;
	}
}

const char *mc_vq_strerror(int error)
{
	switch (error) {
	case MC_VQ_OK: return "no error";
	case MC_VQ_BAD_AVAIL_IDX: return "the avail index ran ahead by more than the queue size";
	case MC_VQ_BAD_HEAD: return "a descriptor index is past the table";
	case MC_VQ_LOOP: return "a descriptor chain is a loop, or too long";
	case MC_VQ_BAD_ADDR: return "a buffer is outside RAM, or empty";
	case MC_VQ_BAD_INDIRECT: return "an indirect table is nested, chained, of a bad length, outside RAM, or was not negotiated";
	case MC_VQ_BAD_ORDER: return "a device-readable buffer follows a device-writable one";
	case MC_VQ_BAD_REQUEST: return "a request lacks a part that the device needs";
	case MC_VQ_BAD_RING: return "the queue's size, alignment or place in memory is not legal";
	case MC_VQ_BAD_USED: return "the used index is not what the device last wrote";
	case MC_VQ_BAD_KEEP: return "what the device's last process left behind is not of this queue";
	}
	return "unknown error";
}

/* Splits or joins a flat buffer and a vector; stops at the shorter. Returns the bytes copied. */
static size_t iov_copy(const struct iovec *iov, uint32_t n, size_t off, void *buf, size_t len, bool to_iov)
{
	size_t done = 0;

	for (uint32_t i = 0; i < n && done < len; i++) {
		if (off >= iov[i].iov_len) {
			off -= iov[i].iov_len;
			continue;
		}
		size_t part = iov[i].iov_len - off;
		uint8_t *at = (uint8_t *)iov[i].iov_base + off;

		if (part > len - done)
			part = len - done;
		if (to_iov)
			memcpy(at, (uint8_t *)buf + done, part);
		else
			memcpy((uint8_t *)buf + done, at, part);
		done += part;
		off = 0;
	}
	return done;
}

size_t mc_iov_read(const struct iovec *iov, uint32_t n, size_t off, void *buf, size_t len)
{
	return iov_copy(iov, n, off, buf, len, false);
}

size_t mc_iov_write(const struct iovec *iov, uint32_t n, size_t off, const void *buf, size_t len)
{
	return iov_copy(iov, n, off, (void *)(uintptr_t)buf, len, true);
}

/* Bytes of a used ring, with the event word behind it. */
static size_t used_size(uint16_t size)
{
	return sizeof(struct vring_used) + sizeof(struct vring_used_elem) * size + sizeof(uint16_t);
}

/* Marks the used entries from old up to used_idx. */
static void mark_used(const struct mc_vq *vq, uint16_t old)
{
	uint16_t n = vq->used_idx - old, from = old & (vq->size - 1), room = vq->size - from;

	if (n > vq->size)
		n = vq->size;
	uint16_t part = n < room ? n : room;

	mc_mem_mark(vq->mem, used_ring(vq, from), sizeof(struct vring_used_elem) * part);
	mc_mem_mark(vq->mem, used_ring(vq, 0), sizeof(struct vring_used_elem) * (n - part));
}

int mc_vq_init(struct mc_vq *vq, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used)
{
	vq->error = MC_VQ_BAD_RING;
	if (!vq->watch)
		vq->watch = &mc_watch_nobody;
	vq->stats = &vq->watch->queues[vq->index % MC_WATCH_QUEUES];
	vq->stats->in_flight = 0;
	vq->stats->last_avail = vq->last_avail;
	vq->now = 0;
	memset(vq->taken_at, 0, sizeof(vq->taken_at));
	if (size == 0 || size > MC_MAX_QUEUE_SIZE || (size & (size - 1)))
		return vq->error;
	if (desc % VRING_DESC_ALIGN_SIZE || avail % VRING_AVAIL_ALIGN_SIZE || used % VRING_USED_ALIGN_SIZE)
		return vq->error;

	/* With the event words behind both rings, whether negotiated or not: the driver has to leave room (2.7.10). */
	vq->desc = mc_mem_at(vq->mem, desc, sizeof(struct vring_desc) * size);
	vq->avail = mc_mem_at(vq->mem, avail, sizeof(struct vring_avail) + sizeof(uint16_t) * (size + 1u));
	vq->used = mc_mem_at(vq->mem, used, used_size(size));
	if (!vq->desc || !vq->avail || !vq->used)
		return vq->error;
	mc_mem_mark(vq->mem, vq->used, used_size(size));
	vq->size = size;
	vq->avail_seen = vq->last_avail;
	vq->signalled_used = vq->used_idx;
	return vq->error = MC_VQ_OK;
}

/* Copies one descriptor. The empty asm makes the compiler forget where *d came from, so that no later use of it can be
 * turned into a second read of guest memory. Indirect tables need no alignment, so this is a memcpy. */
static void desc_read(struct vring_desc *d, const void *table, uint16_t i)
{
	memcpy(d, (const uint8_t *)table + sizeof(*d) * i, sizeof(*d));
	__asm__ volatile("" : "+m"(*d));
}

static int chain_add(const struct mc_vq *vq, struct mc_chain *c, const struct vring_desc *d)
{
	bool in = d->flags & VRING_DESC_F_WRITE;
	uint32_t n = (uint32_t)c->n_out + c->n_in;

	if (n >= c->max)
		return MC_VQ_LOOP;
	if (!in && c->n_in)
		return MC_VQ_BAD_ORDER;
	void *hva = mc_mem_at(vq->mem, d->addr, d->len);
	if (!hva)
		return MC_VQ_BAD_ADDR;
	c->iov[n] = (struct iovec){.iov_base = hva, .iov_len = d->len};
	/* At most MC_MAX_QUEUE_SIZE lengths of 32 bits: no overflow. */
	if (in) {
		c->n_in++;
		c->len_in += d->len;
	} else {
		c->n_out++;
		c->len_out += d->len;
	}
	return MC_VQ_OK;
}

static int chain_walk(const struct mc_vq *vq, struct mc_chain *c)
{
	const void *table = vq->desc;
	uint32_t limit = vq->size, steps = 0;
	uint16_t i = c->head;
	bool nested = false;
	struct vring_desc d;
	int err;

	for (;;) {
		if (i >= limit)
			return MC_VQ_BAD_HEAD;
		/* A chain that visits more descriptors than its table has visits one of them twice. */
		if (steps++ >= limit)
			return MC_VQ_LOOP;
		desc_read(&d, table, i);

		if (d.flags & VRING_DESC_F_INDIRECT) {
			/* 2.7.5.3.1: not inside another, last in the chain, a whole number of descriptors. Longer than
			 * the queue is tolerated, since Linux does that on small queues; c->max bounds it. */
			if (!vq->indirect || nested || (d.flags & VRING_DESC_F_NEXT) || d.len == 0 ||
			    d.len % sizeof(d) || d.len / sizeof(d) > UINT16_MAX + 1u)
				return MC_VQ_BAD_INDIRECT;
			table = mc_mem_at(vq->mem, d.addr, d.len);
			if (!table)
				return MC_VQ_BAD_INDIRECT;
			limit = d.len / sizeof(d);
			nested = true;
			steps = 0;
			i = 0;
			continue;
		}
		err = chain_add(vq, c, &d);
		if (err)
			return err;
		if (!(d.flags & VRING_DESC_F_NEXT))
			break;
		i = d.next;
	}
	/* 2.7.5.2: no more than 2^32 bytes in all; used.len could not say more anyway. */
	if (c->len_out + c->len_in > UINT32_MAX)
		return MC_VQ_LOOP;
	return MC_VQ_OK;
}

/* The time of this batch. One look at the clock for all that is taken or answered between two flushes: the guest cannot
 * tell when in a batch its request was answered either. */
static uint64_t batch_time(struct mc_vq *vq)
{
	if (!vq->now)
		vq->now = mc_watch_now();
	return vq->now;
}

static int broken(struct mc_vq *vq, int error)
{
	vq->error = error;
	MC_TRACE(vq->watch, MC_EV_ERROR, vq->index, UINT16_MAX, 0, error);
	return -1;
}

static void count_taken(struct mc_vq *vq, const struct mc_chain *c)
{
	vq->stats->in_flight++;
	/* A walked head is below size. Taken twice at once, as a hostile driver may have it, it counts once. */
	vq->taken_at[c->head] = batch_time(vq);
	MC_TRACE(vq->watch, MC_EV_TAKE, vq->index, c->head, c->len_out, c->len_in);
}

/* What is in the device's hands from here on. The counter before the mark that makes it count. */
static void mark_taken(struct mc_vq *vq, uint16_t head)
{
	struct mc_inflight_desc *d = &vq->inflight->desc[head];

	d->counter = vq->counter++;
	mc_in_order();
	d->inflight = MC_HEAD_TAKEN;
	mc_in_order();
}

/* Takes again what our predecessor had. Its mark and its place in the order stay as they are. */
static int pop_redo(struct mc_vq *vq, struct mc_chain *c)
{
	c->head = vq->redo[vq->redo_at];
	int error = chain_walk(vq, c);

	if (error)
		return broken(vq, error);
	vq->redo_at++;
	count_taken(vq, c);
	return 1;
}

int mc_vq_pop(struct mc_vq *vq, struct mc_chain *c)
{
	if (vq->error)
		return -1;
	if (vq->recovered)
		mc_vq_go_on(vq);
	c->n_out = c->n_in = 0;
	c->len_out = c->len_in = 0;
	if (vq->redo_at < vq->redo_n)
		return pop_redo(vq, c);
	if (vq->last_avail == vq->avail_seen) {
		/* Acquire: the ring entries and descriptors that this index covers are read after it. */
		uint16_t idx = __atomic_load_n(&((struct vring_avail *)vq->avail)->idx, __ATOMIC_ACQUIRE);

		if (idx == vq->last_avail)
			return 0;
		if ((uint16_t)(idx - vq->last_avail) > vq->size) {
			return broken(vq, MC_VQ_BAD_AVAIL_IDX);
		}
		vq->avail_seen = idx;
	}
	c->head = __atomic_load_n(avail_ring(vq, vq->last_avail & (vq->size - 1)), __ATOMIC_RELAXED);
	int error = chain_walk(vq, c);

	if (error)
		return broken(vq, error);
	if (vq->inflight) {
		mark_taken(vq, c->head);
		vq->taken[vq->last_avail & (vq->size - 1)] = c->head;
	}
	vq->last_avail++;
	vq->from_ring++;
	vq->stats->last_avail = vq->last_avail;
	vq->stats->taken++;
	count_taken(vq, c);
	return 1;
}

void mc_vq_unpop(struct mc_vq *vq, uint16_t n)
{
	vq->stats->taken -= n < vq->from_ring ? n : vq->from_ring;
	vq->stats->in_flight -= n < vq->stats->in_flight ? n : vq->stats->in_flight;
	/* From the last to the first: killed in between, the marks that are left are those of a run without gaps. */
	for (; n && vq->from_ring; n--) {
		vq->last_avail--;
		vq->from_ring--;
		if (vq->inflight) {
			vq->inflight->desc[vq->taken[vq->last_avail & (vq->size - 1)]].inflight = MC_HEAD_FREE;
			mc_in_order();
		}
	}
	/* What is older is not in the avail ring, and stays in our hands as far as the region is concerned. */
	vq->redo_at -= n < vq->redo_at ? n : vq->redo_at;
	vq->stats->last_avail = vq->last_avail;
}

static void count_answer(struct mc_vq *vq, uint16_t head, uint32_t len)
{
	uint64_t *at = &vq->taken_at[head & (MC_MAX_QUEUE_SIZE - 1)], took = 0;

	vq->stats->requests++;
	if (vq->stats->in_flight)
		vq->stats->in_flight--;
	if (*at) {	/* else a predecessor of this process took it */
		took = batch_time(vq) - *at;
		*at = 0;
		unsigned bucket = 63 - __builtin_clzll(took | 1);

		vq->stats->latency[bucket < MC_LATENCY_BUCKETS ? bucket : MC_LATENCY_BUCKETS - 1]++;
		vq->stats->latency_ns += took;
	}
	MC_TRACE(vq->watch, MC_EV_PUSH, vq->index, head, len, took);
}

/* Answered: from here on a successor publishes this answer instead of doing the work again. The length and the place in
 * the batch before the mark that makes them count. */
static void mark_done(struct mc_vq *vq, uint16_t head, uint32_t len)
{
	struct mc_inflight *r = vq->inflight;
	struct mc_inflight_desc *d = &r->desc[head];

	d->len_low = (uint16_t)len;
	d->len_high = len >> 16;
	d->next = r->last_batch_head;
	r->last_batch_head = head;
	mc_in_order();
	d->inflight = MC_HEAD_DONE;
	mc_in_order();
}

/* The batch of n heads is published. The marks first: used_idx says that they are gone. A head that the guest made
 * available twice is in its batch twice, which costs a step. */
static void mark_published(struct mc_vq *vq, uint16_t n)
{
	struct mc_inflight *r = vq->inflight;

	for (uint16_t i = r->last_batch_head; n && i < vq->size; i = r->desc[i].next, n--)
		r->desc[i].inflight = MC_HEAD_FREE;
	mc_in_order();
	r->used_idx = vq->used_idx;
}

void mc_vq_push(struct mc_vq *vq, uint16_t head, uint32_t len)
{
	if (vq->error)
		return;
	mc_vq_push_again(vq, head, len);
	count_answer(vq, head, len);
}

void mc_vq_push_again(struct mc_vq *vq, uint16_t head, uint32_t len)
{
	struct vring_used_elem *e = used_ring(vq, vq->used_idx & (vq->size - 1));

	/* Ordered before the driver's look at them by the release store of used.idx in mc_vq_flush(). */
	__atomic_store_n(&e->id, head, __ATOMIC_RELAXED);
	__atomic_store_n(&e->len, len, __ATOMIC_RELAXED);
	vq->used_idx++;
	if (vq->inflight)
		mark_done(vq, head, len);
}

static bool wants_interrupt(const struct mc_vq *vq, uint16_t old)
{
	if (!vq->event_idx)
		return !(__atomic_load_n(&((struct vring_avail *)vq->avail)->flags, __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
	return vring_need_event(__atomic_load_n(used_event(vq), __ATOMIC_RELAXED), vq->used_idx, old);
}

void mc_vq_flush(struct mc_vq *vq)
{
	uint16_t old = vq->signalled_used;

	vq->now = 0;
	if (vq->error || old == vq->used_idx)
		return;
	mark_used(vq, old);
	if (vq->inflight) {
		vq->inflight->next_used = vq->used_idx;
		mc_in_order();
	}
	/* Release: the used entries, and the data that we wrote into buffers, before the index that covers them. */
	__atomic_store_n(&((struct vring_used *)vq->used)->idx, vq->used_idx, __ATOMIC_RELEASE);
	if (vq->inflight) {
		mc_in_order();
		mark_published(vq, vq->used_idx - old);
	}
	mc_mem_mark(vq->mem, vq->used, sizeof(struct vring_used));
	/* Full: used.idx is visible before we look whether the driver wants to hear of it. The driver writes used_event
	 * (or flags) and then looks at used.idx; without this both could miss the other and the guest would hang. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	vq->signalled_used = vq->used_idx;
	if (!wants_interrupt(vq, old)) {
		vq->stats->suppressed++;
		return;
	}
	mc_vq_interrupt(vq);
}

void mc_vq_interrupt(struct mc_vq *vq)
{
	const uint64_t one = 1;

	/* Release: whoever reads the bit in InterruptStatus finds used.idx behind it. */
	__atomic_fetch_or(&vq->isr->status, 1, __ATOMIC_RELEASE);
	vq->stats->interrupts++;
	MC_TRACE(vq->watch, MC_EV_INTERRUPT, vq->index, 0, 0, vq->used_idx);
	/* EAGAIN: the counter is full, so a signal is pending already. Nothing else can fail on an eventfd. */
	ssize_t n = write(vq->call_fd, &one, sizeof(one));
	(void)n;
}

bool mc_vq_enable_kick(struct mc_vq *vq)
{
	if (vq->error)
		return false;
	if (vq->event_idx) {
		__atomic_store_n(avail_event(vq), vq->last_avail, __ATOMIC_RELAXED);
		mc_mem_mark(vq->mem, avail_event(vq), sizeof(uint16_t));
	} else {
		__atomic_store_n(&((struct vring_used *)vq->used)->flags, 0, __ATOMIC_RELAXED);
		mc_mem_mark(vq->mem, vq->used, sizeof(uint16_t));
	}
	/* Full: the request for a kick is visible before we look for entries that came before it. The driver publishes
	 * avail.idx and then looks at avail_event (or flags). */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&((struct vring_avail *)vq->avail)->idx, __ATOMIC_RELAXED) != vq->last_avail;
}

void mc_vq_disable_kick(struct mc_vq *vq)
{
	/* With EVENT_IDX nothing is to be done: avail_event lies behind, and the driver kicks only when passing it. */
	if (vq->error || vq->event_idx)
		return;
	__atomic_store_n(&((struct vring_used *)vq->used)->flags, VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
	mc_mem_mark(vq->mem, vq->used, sizeof(uint16_t));
}
