/*
 * One load for every block backend: `ring` drives virtqueues in a shared memfd over eventfds, as a guest's driver does;
 * `uring` does the same transfers on the file itself, which is the limit. Started by bench/blk.py, which passes
 * descriptors by number. Prints one JSON object.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <liburing.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "vdriver.h"

#define QUEUE_SIZE 256
#define MAX_QUEUES 4
#define MAX_DEPTH 128
#define BUCKET_NS 100
#define BUCKETS 200000

struct options {
	const char *mode;
	int fd, call_fd, kick_fds[MAX_QUEUES];	/* fd: the memfd, or the file */
	unsigned queues, depth, block, ms;
	bool write, sequential;
	uint64_t span;
};

/* A request that is made again and again. */
struct slot {
	uint64_t offset, started;
	struct virtio_blk_outhdr *header;
	volatile uint8_t *status;
	void *buffer;
};

static struct options o;
static struct slot slots[MAX_QUEUES][MAX_DEPTH];
static uint32_t histogram[BUCKETS];
static uint64_t ops, random_state = 88172645463325252ull, next_offset;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t choose_offset(void)
{
	uint64_t blocks = o.span / o.block;

	if (o.sequential) {
		next_offset = (next_offset + 1) % blocks;
		return next_offset * o.block;
	}
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state % blocks * o.block;
}

static void ended(struct slot *s, uint64_t at)
{
	uint64_t bucket = (at - s->started) / BUCKET_NS;

	histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
	ops++;
}

static void ring_begin(struct vd_queue *q, unsigned i, struct slot *s)
{
	s->offset = choose_offset();
	s->header->sector = s->offset / 512;
	*s->status = 0xff;
	s->started = now();
	vd_offer(q, i);
}

static uint64_t run_ring(uint64_t *kicks)
{
	static struct vd_queue queues[MAX_QUEUES];
	uint64_t slot_bytes = 4096 + (o.block + 4095ull) / 4096 * 4096;
	uint64_t rings = MAX_QUEUES * VD_BYTES(QUEUE_SIZE), size = rings + slot_bytes * o.queues * o.depth;
	uint8_t *ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, o.fd, 0);
	unsigned inflight = 0;
	uint64_t start, end, count;

	if (ram == MAP_FAILED)
		die("mmap");
	for (unsigned n = 0; n < o.queues; n++) {
		struct vd_queue *q = &queues[n];

		vd_init(q, ram + n * VD_BYTES(QUEUE_SIZE), QUEUE_SIZE, true, o.kick_fds[n], o.call_fd);
		for (unsigned i = 0; i < o.depth; i++) {
			/* A page with the indirect table, the header and the status, then the data. */
			uint64_t at = rings + slot_bytes * (n * o.depth + i);
			struct vring_desc *table = (void *)(ram + at);
			struct slot *s = &slots[n][i];

			s->header = (void *)(ram + at + 1024);
			s->status = ram + at + 2048;
			s->buffer = ram + at + 4096;
			*s->header = (struct virtio_blk_outhdr){.type = o.write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN};
			memset(s->buffer, 0x5a + i, o.block);
			table[0] = (struct vring_desc){.addr = at + 1024, .len = 16, .flags = VRING_DESC_F_NEXT, .next = 1};
			table[1] = (struct vring_desc){.addr = at + 4096, .len = o.block, .next = 2,
						       .flags = VRING_DESC_F_NEXT | (o.write ? 0 : VRING_DESC_F_WRITE)};
			table[2] = (struct vring_desc){.addr = at + 2048, .len = 1, .flags = VRING_DESC_F_WRITE};
			q->desc[i] = (struct vring_desc){.addr = at, .len = 48, .flags = VRING_DESC_F_INDIRECT};
		}
	}
	start = now();
	end = start + o.ms * 1000000ull;
	for (unsigned n = 0; n < o.queues; n++) {
		for (unsigned i = 0; i < o.depth; i++, inflight++)
			ring_begin(&queues[n], i, &slots[n][i]);
		vd_kick(&queues[n]);
	}
	while (inflight) {
		bool any = false;

		for (unsigned n = 0; n < o.queues; n++) {
			uint32_t head, len;

			while (vd_take(&queues[n], &head, &len)) {
				struct slot *s = &slots[n][head];
				uint64_t at = now();

				if (*s->status) {
					fprintf(stderr, "status %u at byte %llu\n", *s->status, (unsigned long long)s->offset);
					exit(1);
				}
				ended(s, at);
				any = true;
				inflight--;
				if (at < end) {
					ring_begin(&queues[n], head, s);
					inflight++;
				}
			}
			vd_kick(&queues[n]);
		}
		if (any)
			continue;
		bool quiet = true;
		for (unsigned n = 0; n < o.queues; n++)
			quiet &= vd_arm(&queues[n]);
		if (!quiet)
			continue;
		/* The vCPU halts until the interrupt. */
		struct pollfd p = {.fd = o.call_fd, .events = POLLIN};
		int ret = poll(&p, 1, 10000);
		if (ret == 0) {
			fprintf(stderr, "no interrupt for 10 s, %u in flight\n", inflight);
			exit(1);
		}
		if (read(o.call_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
			die("call eventfd");
	}
	for (unsigned n = 0; n < o.queues; n++)
		*kicks += queues[n].kicks;
	return now() - start;
}

static void uring_begin(struct io_uring *ring, struct slot *s)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

	s->offset = choose_offset();
	s->started = now();
	if (o.write)
		io_uring_prep_write(sqe, 0, s->buffer, o.block, s->offset);
	else
		io_uring_prep_read(sqe, 0, s->buffer, o.block, s->offset);
	sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, s);
}

static uint64_t run_uring(void)
{
	struct io_uring ring;
	struct io_uring_params params = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN};
	unsigned inflight = 0, head;
	uint64_t start, end;
	int ret = io_uring_queue_init_params(1024, &ring, &params);

	if (ret || (ret = io_uring_register_files(&ring, &o.fd, 1))) {
		errno = -ret;
		die("io_uring");
	}
	start = now();
	end = start + o.ms * 1000000ull;
	for (unsigned n = 0; n < o.queues; n++) {
		for (unsigned i = 0; i < o.depth; i++, inflight++) {
			if (posix_memalign(&slots[n][i].buffer, 4096, o.block))
				die("memory");
			memset(slots[n][i].buffer, 0x5a + i, o.block);
			uring_begin(&ring, &slots[n][i]);
		}
	}
	while (inflight) {
		struct io_uring_cqe *cqe;
		unsigned n = 0;

		ret = io_uring_submit_and_wait(&ring, 1);
		if (ret < 0 && ret != -EINTR)
			die("io_uring_enter");
		io_uring_for_each_cqe(&ring, head, cqe) {
			struct slot *s = (void *)(uintptr_t)cqe->user_data;
			uint64_t at = now();

			if (cqe->res != (int)o.block) {
				fprintf(stderr, "transfer of %d bytes\n", cqe->res);
				exit(1);
			}
			ended(s, at);
			n++;
			inflight--;
			if (at < end) {
				uring_begin(&ring, s);
				inflight++;
			}
		}
		io_uring_cq_advance(&ring, n);
	}
	return now() - start;
}

static double percentile(double p)
{
	uint64_t want = ops * p, seen = 0;

	for (unsigned i = 0; i < BUCKETS; i++) {
		seen += histogram[i];
		if (seen > want)
			return i * (BUCKET_NS / 1000.0);
	}
	return BUCKETS * (BUCKET_NS / 1000.0);
}

int main(int argc, char **argv)
{
	uint64_t kicks = 0, ns;

	if (argc < 11) {
		fprintf(stderr, "usage: blk_load ring|uring FD QUEUES DEPTH BLOCK MS read|write random|sequential SPAN CALL KICK...\n");
		return 2;
	}
	o = (struct options){
		.mode = argv[1], .fd = atoi(argv[2]), .queues = atoi(argv[3]), .depth = atoi(argv[4]), .block = atoi(argv[5]),
		.ms = atoi(argv[6]), .write = !strcmp(argv[7], "write"), .sequential = !strcmp(argv[8], "sequential"),
		.span = strtoull(argv[9], NULL, 0), .call_fd = atoi(argv[10]),
	};
	bool ring = !strcmp(o.mode, "ring");

	if (o.queues < 1 || o.queues > MAX_QUEUES || o.depth < 1 || o.depth > MAX_DEPTH || !o.block ||
	    (ring && argc != 11 + (int)o.queues))
		return 2;
	for (unsigned n = 0; ring && n < o.queues; n++)
		o.kick_fds[n] = atoi(argv[11 + n]);
	ns = ring ? run_ring(&kicks) : run_uring();
	printf("{\"ops\": %llu, \"seconds\": %.6f, \"p50\": %.1f, \"p99\": %.1f, \"kicks\": %llu}\n", (unsigned long long)ops,
	       ns / 1e9, percentile(0.5), percentile(0.99), (unsigned long long)kicks);
	return 0;
}
