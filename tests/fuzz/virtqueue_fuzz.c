/*
 * Random rings for virtqueue.c, under AddressSanitizer and UBSan: virtqueue_fuzz SEED SECONDS.
 *
 * Guest memory is two separate heap blocks, so that any address a chain should not hold is a report. Rings and descriptors
 * are random but plausible: most are nearly right. Every second round another thread rewrites all of it meanwhile, so
 * that a value that is checked and then read again is caught sooner or later.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <linux/virtio_ring.h>

#include "virtqueue.h"

#define LOW 0x8000u
#define HIGH_GPA 0x100000000ull
#define HIGH 0x3000u
#define CHAIN 300

#define CHECK(cond) do { if (!(cond)) { fprintf(stderr, "seed %llu: %s:%d: %s\n", (unsigned long long)seed0, __FILE__, \
	__LINE__, #cond); abort(); } } while (0)

static unsigned long long seed0;
static uint8_t *low, *high;

struct rng { uint64_t s; };

static uint64_t next(struct rng *r)
{
	r->s ^= r->s << 13;
	r->s ^= r->s >> 7;
	r->s ^= r->s << 17;
	return r->s;
}

static uint32_t below(struct rng *r, uint32_t n) { return next(r) % n; }

static uint64_t address(struct rng *r)
{
	switch (below(r, 200)) {
	case 0: return next(r);
	case 1: return LOW - below(r, 64);
	case 2: return HIGH_GPA + HIGH - below(r, 64);
	case 3: return HIGH_GPA - below(r, 64);
	case 4: return UINT64_MAX - below(r, 64);
	default: return next(r) % 3 ? below(r, LOW - 256) : HIGH_GPA + below(r, HIGH - 256);
	}
}

static uint32_t length(struct rng *r)
{
	switch (below(r, 200)) {
	case 0: return next(r);
	case 1: return 0;
	case 2: return UINT32_MAX - below(r, 32);
	default: return 1 + below(r, 200);
	}
}

static struct vring_desc descriptor(struct rng *r, uint16_t size)
{
	struct vring_desc d = {.addr = address(r), .len = length(r), .next = below(r, size)};
	uint32_t kind = below(r, 64);

	d.flags = kind < 20 ? 0 : kind < 34 ? VRING_DESC_F_NEXT : VRING_DESC_F_WRITE;
	if (kind >= 56)
		d.flags |= VRING_DESC_F_NEXT;
	if (kind == 63 && below(r, 4) == 0)
		d.flags = next(r);
	if (below(r, 12) == 0) {
		d.flags = VRING_DESC_F_INDIRECT | (below(r, 30) == 0 ? VRING_DESC_F_NEXT : 0);
		d.len = 16 * (1 + below(r, 40)) + (below(r, 100) == 0);
		d.addr = below(r, LOW / 2);
	}
	if (below(r, 200) == 0)
		d.next = next(r);
	return d;
}

/* Descriptors all over memory: any of it may be pointed at as an indirect table. */
static void fill(struct rng *r, uint16_t size)
{
	for (uint32_t at = 0; at + 16 <= LOW; at += 16) {
		struct vring_desc d = descriptor(r, size);

		memcpy(low + at, &d, sizeof(d));
	}
}

struct mutator { pthread_t thread; uint64_t seed; volatile bool stop; };

static void *mutate(void *arg)
{
	struct mutator *m = arg;
	struct rng r = {m->seed};

	while (!m->stop) {
		struct vring_desc d = descriptor(&r, 16);

		/* volatile, word by word: a race on purpose. */
		volatile uint32_t *at = (uint32_t *)(low + below(&r, LOW / 16) * 16);
		uint32_t words[4];
		memcpy(words, &d, sizeof(d));
		for (int i = 0; i < 4; i++)
			at[i] = words[i];
	}
	return NULL;
}

static bool inside(const struct iovec *v)
{
	uint8_t *p = v->iov_base;

	return v->iov_len && ((p >= low && p < low + LOW && v->iov_len <= (size_t)(low + LOW - p)) ||
			      (p >= high && p < high + HIGH && v->iov_len <= (size_t)(high + HIGH - p)));
}

static volatile uint8_t sink;

static void use(struct rng *r, struct mc_vq *vq, struct mc_chain *c)
{
	uint64_t out = 0, in = 0;

	CHECK(c->n_out + c->n_in >= 1 && (uint32_t)c->n_out + c->n_in <= c->max);
	CHECK(c->head < vq->size);
	for (uint32_t i = 0; i < (uint32_t)c->n_out + c->n_in; i++) {
		const struct iovec *v = &c->iov[i];

		CHECK(inside(v));
		if (i < c->n_out) {
			out += v->iov_len;
			sink = *(uint8_t *)v->iov_base + ((uint8_t *)v->iov_base)[v->iov_len - 1];
		} else {
			in += v->iov_len;
			((uint8_t *)v->iov_base)[0] = next(r);
			((uint8_t *)v->iov_base)[v->iov_len - 1] = next(r);
		}
	}
	CHECK(out == c->len_out && in == c->len_in && out + in <= UINT32_MAX);
}

static uint64_t popped, broken;

static void round_of(struct rng *r, bool racing)
{
	struct mc_mem mem = {.n = 2, .regions = {{0, LOW, low, 0}, {HIGH_GPA, HIGH, high, LOW}}};
	struct mc_isr isr = {0};
	struct iovec iov[CHAIN];
	struct mc_vq vq = {
		.mem = &mem, .isr = &isr, .kick_fd = -1, .event_idx = next(r) & 1, .indirect = below(r, 4) != 0,
		.call_fd = eventfd(0, EFD_NONBLOCK),
	};
	uint16_t size = 1u << below(r, 9), start = below(r, 3) ? 0 : next(r);
	uint64_t desc = below(r, LOW), avail = below(r, LOW), used = below(r, LOW);

	if (below(r, 8)) {
		desc &= ~15ull;
		avail &= ~1ull;
		used &= ~3ull;
	} else if (below(r, 2)) {
		desc = address(r);
		size = next(r);
	}
	fill(r, size ? size : 1);
	vq.last_avail = vq.used_idx = start;
	if (mc_vq_init(&vq, size, desc, avail, used)) {
		CHECK(vq.error == MC_VQ_BAD_RING);
		close(vq.call_fd);
		return;
	}
	/* The ring of heads is written last, over the descriptors where they overlap. */
	volatile uint16_t *a = vq.avail;
	a[1] = start + (below(r, 10) ? below(r, size + 1) : next(r));
	for (uint32_t i = 0; i < size; i++)
		a[2 + i] = below(r, 100) ? below(r, size) : next(r);

	struct mutator m = {.seed = next(r)};
	if (racing)
		CHECK(!pthread_create(&m.thread, NULL, mutate, &m));
	for (int i = 0; i < 600; i++) {
		struct mc_chain c = {.max = 1 + below(r, CHAIN), .iov = iov};
		int got = mc_vq_pop(&vq, &c);

		if (got < 0) {
			CHECK(vq.error > MC_VQ_OK && vq.error < MC_VQ_BAD_REQUEST);
			CHECK(strcmp(mc_vq_strerror(vq.error), "unknown error"));
			broken++;
			break;
		}
		if (!got && (!mc_vq_enable_kick(&vq) || below(r, 4) == 0))
			break;
		if (!got)
			continue;
		popped++;
		use(r, &vq, &c);
		if (below(r, 50) == 0) {
			mc_vq_unpop(&vq, 1);
			continue;
		}
		mc_vq_push(&vq, c.head, next(r));
		if (below(r, 3) == 0)
			mc_vq_flush(&vq);
		if (below(r, 5) == 0)
			mc_vq_disable_kick(&vq);
	}
	mc_vq_flush(&vq);
	if (racing) {
		m.stop = true;
		pthread_join(m.thread, NULL);
	}
	close(vq.call_fd);
}

int main(int argc, char **argv)
{
	struct timespec t;
	uint64_t rounds = 0;

	if (argc != 3)
		return 2;
	seed0 = strtoull(argv[1], NULL, 0);
	struct rng r = {seed0 * 0x9e3779b97f4a7c15ull + 1};
	clock_gettime(CLOCK_MONOTONIC, &t);
	time_t end = t.tv_sec + atoi(argv[2]);
	low = malloc(LOW);
	high = malloc(HIGH);
	memset(high, 0, HIGH);
	do {
		round_of(&r, rounds++ % 2);
		clock_gettime(CLOCK_MONOTONIC, &t);
	} while (t.tv_sec < end);
	free(low);
	free(high);
	printf("%llu rounds, %llu chains, %llu broken rings\n", (unsigned long long)rounds, (unsigned long long)popped,
	       (unsigned long long)broken);
	return !(popped && broken);
}
