/*
 * Power cuts. The blk sidecar's data path over an overlay, on a simulated host: blk_crash SEED SECONDS.
 *
 * The host completes transfers in any order, in pieces, with errors; and when the power fails, each sector of the overlay
 * file that was written since the last fdatasync holds any of the contents it had since then. After each power cut the
 * overlay is opened again, and each sector of the disk must hold what was flushed or something written later.
 * While it runs, a read must give what was last completed, or something that is being written.
 *
 * This file is the engine (it takes the place of blk_uring.c and blk_sync.c), the disk and the driver. All is
 * one thread: the driver moves when the data path waits. Built with sanitizers by test_blk_crash.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/falloc.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>

#include "blk_impl.h"
#include "vdriver.h"

#define SECTORS (64 * 8 + 3)		/* of the disk: the last block is short */
#define DISK (SECTORS * 512ull)
#define MAP 4096ull
#define DATA 8192ull
#define FILE_SECTORS ((DATA + (SECTORS + 7) / 8 * 4096ull) / 512)
#define VERSIONS 64			/* of a sector, between two power cuts at most; then the oldest go */
#define DEPTH 24
#define MAX_LEN 40			/* sectors of a request */
#define SLOT 0x8000ull
#define RAM (0x10000 + DEPTH * SLOT)

#define CHECK(cond, ...) do { if (!(cond)) { fprintf(stderr, "seed %llu, life %u, step %u: %s: ", seed0, life, step, #cond); \
	fprintf(stderr, __VA_ARGS__); fputc('\n', stderr); abort(); } } while (0)

static unsigned long long seed0;
static uint64_t rng_state;
static uint32_t life, step;
static struct { uint64_t requests, cuts, flushes, reads, copied, bounced, errors; } totals;

static uint64_t rnd(void)
{
	rng_state ^= rng_state << 13;
	rng_state ^= rng_state >> 7;
	rng_state ^= rng_state << 17;
	return rng_state;
}

static uint32_t below(uint32_t n) { return rnd() % n; }
static bool one_in(uint32_t n) { return below(n) == 0; }

/* --- The host: the base, and the overlay file with all that a power cut may leave of it. --- */

typedef uint8_t sector[512];

static sector base[SECTORS], cache[FILE_SECTORS];
#define LAYERS 2
static sector layers[LAYERS][FILE_SECTORS];	/* between base and overlay; never written */
/* versions[s][0] is permanent; those behind it were written since. */
static sector versions[FILE_SECTORS][VERSIONS];
static uint16_t version_count[FILE_SECTORS];

struct pending {
	struct blk_op *op;
	uint16_t synced[FILE_SECTORS];		/* of an fsync: the versions there were when it was asked for */
	bool used;
};

static struct pending pending[512];
static uint32_t pending_count;
static bool with_errors;

static void add_version(uint32_t s, const uint8_t *data)
{
	if (version_count[s] == VERSIONS) {	/* the second oldest is forgotten */
		memmove(versions[s][1], versions[s][2], sizeof(sector) * (VERSIONS - 2));
		version_count[s]--;
		for (uint32_t i = 0; i < 512; i++)
			if (pending[i].used && pending[i].op->kind == OP_FSYNC && pending[i].synced[s] > 1)
				pending[i].synced[s]--;
	}
	memcpy(versions[s][version_count[s]++], data, 512);
}

static int sim_open(struct mc_blk *b) { return 0; }
static void sim_close(struct mc_blk *b) { }
static int sim_start(struct mc_blk *b) { return 0; }

static void sim_submit(struct mc_blk *b, struct blk_op *op)
{
	for (uint32_t i = 0; ; i++) {
		CHECK(i < 512, "%s", "too many transfers at once");
		if (pending[i].used)
			continue;
		pending[i].used = true;
		pending[i].op = op;
		if (op->kind == OP_FSYNC)
			memcpy(pending[i].synced, version_count, sizeof(version_count));
		pending_count++;
		return;
	}
}

/* The sectors of a write, whole ones, into the cache or into the versions only. */
static void write_sectors(struct blk_op *op, uint64_t len, bool apply)
{
	sector data;

	for (uint64_t done = 0; done < len; done += 512) {
		uint32_t s = (op->off + done) / 512;

		CHECK(s < FILE_SECTORS, "write at %llu", (unsigned long long)op->off);
		if (op->kind == OP_FALLOCATE)
			memset(data, 0, 512);
		else
			CHECK(mc_iov_read(op->iov, op->niov, done, data, 512) == 512, "%s", "short vector");
		add_version(s, data);
		if (apply)
			memcpy(cache[s], data, 512);
	}
}

static int64_t carry_out(struct mc_blk *b, struct pending *p)
{
	struct blk_op *op = p->op;
	uint64_t len = op->len;

	CHECK(op->file == FILE_OVERLAY || op->kind == OP_READ, "%s", "the base is never written");
	if (one_in(40))
		return one_in(2) ? -EINTR : -EAGAIN;
	if (op->kind == OP_FSYNC) {
		bool fails = with_errors && one_in(100);

		for (uint32_t s = 0; s < FILE_SECTORS; s++) {
			uint16_t n = p->synced[s], keep = n - 1;

			if (n < 2)
				continue;
			/* Linux drops what it could not write: it stays in the cache, as if it were clean. */
			if (fails && one_in(2))
				keep = 0;
			else if (fails)
				continue;
			memmove(versions[s][0], versions[s][keep], sizeof(sector));
			memmove(versions[s][1], versions[s][n], sizeof(sector) * (version_count[s] - n));
			version_count[s] -= n - 1;
		}
		return fails ? -EIO : 0;
	}
	CHECK(op->off % 512 == 0 && len % 512 == 0, "%llu+%llu", (unsigned long long)op->off, (unsigned long long)len);
	if (op->kind != OP_FALLOCATE && len > 512 && one_in(10))
		len = 512 * (1 + below(len / 512 - 1));
	if (op->kind == OP_READ) {
		const uint8_t *from = op->file == FILE_DISK ? base[0] : op->file == FILE_OVERLAY ? cache[0] : layers[op->file - FILE_LAYER][0];
		uint64_t size = op->file == FILE_DISK ? DISK : FILE_SECTORS * 512;

		CHECK(op->off + len <= size, "read past the end");
		mc_iov_write(op->iov, op->niov, 0, from + op->off, len);
		return len;
	}
	if (with_errors && one_in(60)) {
		if (len > 512 && one_in(2))
			write_sectors(op, len / 1024 * 512, true);
		return -ENOSPC;
	}
	write_sectors(op, len, true);
	return op->kind == OP_FALLOCATE ? 0 : (int64_t)len;
}

static void drive(struct mc_blk *b);
static jmp_buf power_cut;

static int sim_wait(struct mc_blk *b, bool block)
{
	step++;
	drive(b);
	for (uint32_t n = pending_count ? 1 + below(pending_count) : 0; n; n--) {
		uint32_t i = below(512);

		while (!pending[i].used)
			i = (i + 1) % 512;
		struct blk_op *op = pending[i].op;
		int64_t res = carry_out(b, &pending[i]);

		pending[i].used = false;
		pending_count--;
		b->inflight--;
		op->done(b, op, res);
	}
	return 0;
}

const struct blk_engine blk_uring = {"sim", sim_open, sim_close, sim_start, sim_submit, sim_wait};
const struct blk_engine blk_sync = {"sim", sim_open, sim_close, sim_start, sim_submit, sim_wait};

/* --- The disk as it must be: for each sector the values it was given, in order. --- */

#define ZERO UINT32_MAX
#define HISTORY 4096

static uint32_t history[SECTORS][HISTORY], count[SECTORS], completed[SECTORS], permanent[SECTORS], next_value = 1;
static bool busy[SECTORS];

static void fill(sector out, uint32_t s, uint32_t value)
{
	uint32_t words[128];

	for (uint32_t i = 0; i < 128; i++)
		words[i] = value == ZERO ? 0 : value * 2654435761u ^ s << 8 ^ i;
	memcpy(out, words, 512);
}

struct request {
	bool used;
	uint32_t type, first, n;
	uint32_t at[SECTORS];		/* of a read or flush: completed[] when it was sent */
	uint64_t data;			/* gpa */
};

/* A discard is advice, and followed for whole blocks only. */
static bool changes(const struct request *r, uint32_t s)
{
	uint32_t block_end = (s / 8 + 1) * 8 < SECTORS ? (s / 8 + 1) * 8 : SECTORS;

	return r->type == VIRTIO_BLK_T_OUT || r->type == VIRTIO_BLK_T_WRITE_ZEROES ||
	       (r->type == VIRTIO_BLK_T_DISCARD && s / 8 * 8 >= r->first && block_end <= r->first + r->n);
}

/* The latest place in the history where the sector had this content. */
static void check_content(uint32_t s, const uint8_t *content, uint32_t from, const char *what)
{
	sector expected;

	for (uint32_t i = count[s]; i-- > from; ) {
		fill(expected, s, history[s][i]);
		if (!memcmp(expected, content, 512))
			return;
	}
	for (uint32_t i = from; i-- > 0; ) {
		fill(expected, s, history[s][i]);
		CHECK(memcmp(expected, content, 512), "%s: sector %u has value %u of %u, at least %u is due", what, s, i, count[s], from);
	}
	CHECK(false, "%s: sector %u has a content that it never had", what, s);
}

/* --- The driver. --- */

static struct request requests[DEPTH];
static uint8_t *ram;
static struct vd_queue vd;
static uint32_t inflight, quit_at;
static uint64_t dirty_log[RAM / 4096 / 64 + 1];

static void check_logged(uint64_t from, uint64_t len)
{
	for (uint64_t page = from / 4096; len && page <= (from + len - 1) / 4096; page++)
		CHECK(dirty_log[page / 64] >> page % 64 & 1, "page %#llx was written and not logged", (unsigned long long)page);
}
static bool write_back, discards;

static void send(uint32_t i)
{
	struct request *r = &requests[i];
	uint64_t at = 0x10000 + i * SLOT;
	struct virtio_blk_outhdr h;
	struct virtio_blk_discard_write_zeroes seg = {0};
	uint32_t kind = below(20);

	/* A request's pages are its own. */
	for (uint64_t page = at / 4096; page < (at + SLOT) / 4096; page++)
		dirty_log[page / 64] &= ~(1ull << page % 64);
	r->type = kind < 9 ? VIRTIO_BLK_T_OUT : kind < 13 ? VIRTIO_BLK_T_IN : kind < 16 ? VIRTIO_BLK_T_FLUSH
		: kind < 18 || !discards ? VIRTIO_BLK_T_WRITE_ZEROES : VIRTIO_BLK_T_DISCARD;
	r->first = r->n = 0;
	if (r->type != VIRTIO_BLK_T_FLUSH) {
		r->n = one_in(3) ? 8 : 1 + below(one_in(3) ? MAX_LEN : 6);
		r->first = below(SECTORS);
		if (one_in(2))
			r->first &= ~7u;
		if (r->n > SECTORS - r->first)
			r->n = SECTORS - r->first;
		for (uint32_t s = r->first; s < r->first + r->n; s++)
			if (busy[s])
				return;
	}
	/* Buffers that O_DIRECT would take, and others. */
	r->data = at + 4096 + (one_in(2) ? 0 : 1 + below(1000));
	h = (struct virtio_blk_outhdr){.type = r->type, .sector = r->first};
	memcpy(r->at, completed, sizeof(completed));
	bool zeroes = r->type == VIRTIO_BLK_T_WRITE_ZEROES || r->type == VIRTIO_BLK_T_DISCARD;
	for (uint32_t s = r->first; s < r->first + r->n; s++) {
		busy[s] = true;
		if (!changes(r, s))
			continue;
		CHECK(count[s] < HISTORY, "%s", "history");
		history[s][count[s]++] = zeroes ? ZERO : next_value;
		if (!zeroes)
			fill(ram + r->data + (s - r->first) * 512, s, next_value++);
	}
	if (h.type == VIRTIO_BLK_T_IN || h.type == VIRTIO_BLK_T_OUT)
		h.sector = r->first;
	else
		h.sector = 0;
	seg.sector = r->first;
	seg.num_sectors = r->n;
	seg.flags = r->type == VIRTIO_BLK_T_WRITE_ZEROES && one_in(2);
	memcpy(ram + at, &h, sizeof(h));
	memcpy(ram + at + 64, &seg, sizeof(seg));
	ram[at + 128] = 0xee;

	struct vring_desc *table = (void *)(ram + at + 256);
	uint32_t d = 0;
	uint16_t write = r->type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0;
	uint32_t len = r->n * 512, cut = len && one_in(3) ? 1 + below(len) : len;

	table[d++] = (struct vring_desc){.addr = at, .len = sizeof(h), .flags = VRING_DESC_F_NEXT, .next = 1};
	if (zeroes) {
		table[d] = (struct vring_desc){.addr = at + 64, .len = sizeof(seg), .flags = VRING_DESC_F_NEXT, .next = d + 1};
		d++;
	} else if (len) {
		table[d] = (struct vring_desc){.addr = r->data, .len = cut, .flags = VRING_DESC_F_NEXT | write, .next = d + 1};
		d++;
		if (cut < len) {
			table[d] = (struct vring_desc){.addr = r->data + cut, .len = len - cut, .next = d + 1,
						       .flags = VRING_DESC_F_NEXT | write};
			d++;
		}
	}
	table[d++] = (struct vring_desc){.addr = at + 128, .len = 1, .flags = VRING_DESC_F_WRITE};
	vd.desc[i] = (struct vring_desc){.addr = at + 256, .len = d * 16, .flags = VRING_DESC_F_INDIRECT};
	r->used = true;
	inflight++;
	vd_offer(&vd, i);
}

static void ended(uint32_t i)
{
	struct request *r = &requests[i];
	uint8_t status = ram[0x10000 + i * SLOT + 128];

	CHECK(r->used && (status == VIRTIO_BLK_S_OK || (with_errors && status == VIRTIO_BLK_S_IOERR)), "status %u of type %u, %u sectors at %u", status, r->type, r->n, r->first);
	check_logged(0x10000 + i * SLOT + 128, 1);
	if (r->type == VIRTIO_BLK_T_IN)
		check_logged(r->data, r->n * 512);
	r->used = false;
	inflight--;
	totals.requests++;
	totals.errors += status != VIRTIO_BLK_S_OK;
	for (uint32_t s = r->first; s < r->first + r->n; s++)
		busy[s] = false;
	if (status != VIRTIO_BLK_S_OK)
		return;
	if (r->type == VIRTIO_BLK_T_FLUSH) {
		totals.flushes++;
		for (uint32_t s = 0; s < SECTORS; s++)
			permanent[s] = r->at[s] > permanent[s] ? r->at[s] : permanent[s];
		return;
	}
	for (uint32_t s = r->first; s < r->first + r->n; s++) {
		if (r->type == VIRTIO_BLK_T_IN) {
			totals.reads++;
			check_content(s, ram + r->data + (s - r->first) * 512, r->at[s], "read");
		} else if (changes(r, s)) {
			completed[s] = count[s] - 1;
			if (!write_back)
				permanent[s] = completed[s];
		}
	}
}

static void drive(struct mc_blk *b)
{
	uint32_t head, len;

	while (vd_take(&vd, &head, &len))
		ended(head);
	if (step >= quit_at)
		longjmp(power_cut, 1);
	for (uint32_t i = 0; i < DEPTH; i++)
		if (!requests[i].used && one_in(2))
			send(i);
	vd_kick(&vd);
	drain: {
		uint64_t n;

		while (read(vd.kick_fd, &n, sizeof(n)) == sizeof(n) || read(vd.call_fd, &n, sizeof(n)) == sizeof(n))
			goto drain;
	}
}

/* --- A life: from one opening of the overlay to the next power cut. --- */

static void cut_power(void)
{
	for (uint32_t i = 0; i < 512; i++) {
		struct blk_op *op = pending[i].op;

		/* What was on its way may have arrived, all or part of it. */
		if (pending[i].used && (op->kind == OP_WRITE || op->kind == OP_FALLOCATE))
			write_sectors(op, op->len, false);
		pending[i].used = false;
	}
	pending_count = 0;
	for (uint32_t s = 0; s < FILE_SECTORS; s++) {
		/* Often the newest, since a disk does make progress. */
		uint32_t v = one_in(3) ? version_count[s] - 1u : below(version_count[s]);

		memcpy(cache[s], versions[s][v], 512);
		memcpy(versions[s][0], cache[s], 512);
		version_count[s] = 1;
	}
	totals.cuts++;
}

static struct mc_blk *open_disk(const struct mc_mem *mem, struct mc_isr *isr, int event_fd)
{
	int disk = memfd_create("base", 0), overlay = memfd_create("overlay", 0), layer[LAYERS];
	char error[256];

	CHECK(pwrite(disk, base, sizeof(base), 0) == sizeof(base), "%s", "base");
	CHECK(pwrite(overlay, cache, sizeof(cache), 0) == sizeof(cache), "%s", "overlay");
	struct mc_blk_params p = {
		.disk_fd = disk, .event_fd = event_fd, .queues = 1, .discard = one_in(2), .direct = one_in(2),
		.overlay_size = DISK, .overlay = {overlay, MAP, DATA}, .layers = LAYERS, .mem = mem, .isr = isr,
	};

	for (uint32_t i = 0; i < LAYERS; i++) {
		layer[i] = memfd_create("layer", 0);
		CHECK(pwrite(layer[i], layers[i], sizeof(layers[i]), 0) == sizeof(layers[i]), "%s", "layer");
		p.layer[i] = (struct mc_blk_overlay_file){layer[i], MAP, DATA};
	}
	struct mc_blk *b = mc_blk_new(&p, error);

	CHECK(b, "%s", error);
	return b;
}

static void check_disk(struct mc_blk *b)
{
	for (uint32_t s = 0; s < SECTORS; s++) {
		uint64_t run = 512;
		static const sector zero;
		uint8_t file = blk_overlay_place(b, s * 512ull, &run);
		const uint8_t *at = file == FILE_DISK ? base[s] : file == FILE_NONE ? zero : file == FILE_OVERLAY ? cache[DATA / 512 + s]
			: layers[file - FILE_LAYER][DATA / 512 + s];

		check_content(s, at, permanent[s], "after the power cut");
		/* From here on it is what was found. */
		for (uint32_t i = count[s]; i-- > 0; ) {
			sector expected;

			fill(expected, s, history[s][i]);
			if (!memcmp(expected, at, 512)) {
				history[s][0] = history[s][i];
				break;
			}
		}
		count[s] = 1;
		completed[s] = permanent[s] = 0;
		busy[s] = false;
	}
}

static void live(const struct mc_mem *mem)
{
	static struct mc_isr isr;
	int event_fd = eventfd(0, EFD_NONBLOCK), kick = eventfd(0, EFD_NONBLOCK), call = eventfd(0, EFD_NONBLOCK);
	struct mc_blk *b = open_disk(mem, &isr, event_fd);
	struct mc_vq *vq = mc_blk_queue(b, 0);
	int fds[] = {b->p.disk_fd, b->p.overlay.fd, b->p.layer[0].fd, b->p.layer[1].fd, event_fd, kick, call};

	check_disk(b);
	step = 0;
	quit_at = 20 + below(400);
	with_errors = one_in(3);
	write_back = !one_in(5);
	discards = b->p.discard;
	inflight = 0;
	memset(requests, 0, sizeof(requests));
	vd_init(&vd, ram, 64, true, kick, call);
	vq->kick_fd = kick;
	vq->call_fd = call;
	vq->event_idx = vq->indirect = true;
	vq->last_avail = vq->used_idx = 0;
	CHECK(!mc_vq_init(vq, 64, 0, VD_PART(64), 2 * VD_PART(64)), "%s", "rings");
	mc_blk_activate(b, mc_blk_features(b) & (write_back ? UINT64_MAX : ~(1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_CONFIG_WCE)), 1);
	if (!setjmp(power_cut)) {
		int err = mc_blk_run(b);

		CHECK(false, "the loop ended: %s", strerror(err));
	}
	cut_power();
	totals.copied += b->counters.copied;
	totals.bounced += b->counters.bounced;
	mc_blk_free(b);
	for (unsigned i = 0; i < sizeof(fds) / sizeof(*fds); i++)
		close(fds[i]);
}

int main(int argc, char **argv)
{
	struct timespec t;

	if (argc != 3)
		return 2;
	seed0 = strtoull(argv[1], NULL, 0);
	rng_state = seed0 * 0x9e3779b97f4a7c15ull + 1;
	ram = aligned_alloc(4096, RAM);
	memset(ram, 0, RAM);
	const struct mc_mem mem = {.n = 1, .regions = {{.gpa = 0, .size = RAM, .hva = ram}}, .dirty = dirty_log};

	for (uint32_t s = 0; s < SECTORS; s++) {
		fill(base[s], s, history[s][0] = next_value++);
		count[s] = 1;
	}
	/* What the topmost file that knows of a block says is the disk; what the others hold is never shown. */
	for (uint32_t i = 0; i < LAYERS; i++) {
		memset(layers[i], 0, DATA);
		for (uint32_t block = 0; block < (SECTORS + 7) / 8; block++) {
			enum blk_state state = below(3);

			layers[i][MAP / 512][block / 4] |= state << block % 4 * 2;
			for (uint32_t s = block * 8; s < block * 8 + 8 && s < SECTORS; s++) {
				memset(layers[i][DATA / 512 + s], 0xbe, 512);
				if (state != BLOCK_BASE)
					history[s][0] = state == BLOCK_ZERO ? ZERO : next_value;
				if (state == BLOCK_DATA)
					fill(layers[i][DATA / 512 + s], s, next_value++);
			}
		}
	}
	for (uint32_t s = 0; s < FILE_SECTORS; s++) {
		/* What a new file holds is zero; what a reused block of a bad file system might is not, and is never shown. */
		memset(cache[s], s < DATA / 512 ? 0 : 0xbd, 512);
		memcpy(versions[s][0], cache[s], 512);
		version_count[s] = 1;
	}
	clock_gettime(CLOCK_MONOTONIC, &t);
	for (time_t end = t.tv_sec + atoi(argv[2]); t.tv_sec < end; clock_gettime(CLOCK_MONOTONIC, &t), life++)
		live(&mem);
	free(ram);
	printf("%llu power cuts, %llu requests (%llu failed), %llu flushes, %llu sectors read, %llu blocks copied up, %llu bounced\n",
	       (unsigned long long)totals.cuts, (unsigned long long)totals.requests, (unsigned long long)totals.errors,
	       (unsigned long long)totals.flushes, (unsigned long long)totals.reads, (unsigned long long)totals.copied,
	       (unsigned long long)totals.bounced);
	return !(totals.cuts > 5 && totals.flushes && totals.copied && totals.bounced && totals.errors);
}
