/*
 * A device that dies between any two of its stores to the in-flight region, over and over, also while it recovers, and the
 * one that comes after it: every request is answered once, with its own length, and none whose answer was noted is worked
 * on again. Then regions and rings that cannot be. recover_test SEED ROUNDS; built with MC_CRASH_POINTS by
 * test_virtqueue.py.
 */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>

#include "vdriver.h"
#include "virtqueue.h"

#define CHECK(cond, ...) do { if (!(cond)) { fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond); \
	fprintf(stderr, __VA_ARGS__); fputc('\n', stderr); exit(1); } } while (0)

#define SIZE 16
static uint8_t *ram;
static struct mc_mem mem;
static struct mc_isr isr;
static struct vd_queue d;
static struct mc_vq vq;
static struct mc_inflight region;
static unsigned seed;
static jmp_buf grave;
static int life;			/* stores until the next death; 0: none is due */

/* The driver's view, by head. */
static bool offered[SIZE], noted[SIZE];	/* noted: mc_vq_push() returned */
static uint32_t expected[SIZE];
/* The device's hands: what it works on. A process's own, gone with it. */
static uint16_t hands[SIZE], n_hands;
static uint64_t deaths, answered, worked;

void mc_crash_point(void)
{
	if (life && --life == 0)
		longjmp(grave, 1);
}

static unsigned pick(unsigned n) { return rand_r(&seed) % n; }

static void start(bool again, bool retake)
{
	n_hands = 0;
	vq = (struct mc_vq){.mem = &mem, .isr = &isr, .kick_fd = d.kick_fd, .call_fd = d.call_fd, .event_idx = d.event_idx,
			    .retake_done = retake};
	CHECK(!mc_vq_init(&vq, SIZE, 0, VD_PART(SIZE), 2 * VD_PART(SIZE)), "%s", mc_vq_strerror(vq.error));
	mc_vq_keep(&vq, &region, again);
	CHECK(!vq.error, "%s", mc_vq_strerror(vq.error));
}

static void driver_turn(void)
{
	uint32_t head, len;

	while (vd_take(&d, &head, &len)) {
		CHECK(head < SIZE && offered[head], "head %u was not in flight", head);
		CHECK(len == expected[head], "head %u: length %u, not %u", head, len, expected[head]);
		offered[head] = noted[head] = false;
		answered++;
	}
	for (unsigned n = pick(SIZE); n; n--) {
		uint16_t i = pick(SIZE);

		if (offered[i])
			continue;
		offered[i] = true;
		expected[i] = seed;
		d.desc[i] = (struct vring_desc){.addr = 0x10000 + 64 * i, .len = 64, .flags = VRING_DESC_F_WRITE};
		vd_offer(&d, i);
	}
	vd_kick(&d);
}

static void take(unsigned n)
{
	struct iovec iov[4];
	struct mc_chain c = {.iov = iov, .max = 4};

	while (n-- && mc_vq_pop(&vq, &c) > 0) {
		CHECK(offered[c.head], "head %u was taken though nobody offers it", c.head);
		CHECK(vq.retake_done || !noted[c.head], "head %u is to be worked on again", c.head);
		CHECK(region.desc[c.head].inflight == MC_HEAD_TAKEN, "head %u has no mark", c.head);
		for (uint16_t i = 0; i < n_hands; i++)
			CHECK(hands[i] != c.head, "head %u was taken twice", c.head);
		hands[n_hands++] = c.head;
	}
	CHECK(!vq.error, "%s", mc_vq_strerror(vq.error));
}

static void answer(bool in_order)
{
	if (!n_hands)
		return;
	unsigned k = in_order ? 0 : pick(n_hands);
	uint16_t head = hands[k];

	worked++;
	memmove(hands + k, hands + k + 1, sizeof(*hands) * (n_hands - k - 1));
	n_hands--;
	mc_vq_push(&vq, head, expected[head]);
	noted[head] = true;
}

static void device_turn(bool in_order)
{
	take(pick(6));
	for (unsigned n = pick(6); n; n--)
		answer(in_order);
	if (in_order && n_hands && !pick(4)) {
		unsigned back = 1 + pick(n_hands);

		mc_vq_unpop(&vq, back);
		n_hands -= back;
	}
	if (pick(2))
		mc_vq_flush(&vq);
}

static void live_and_die(uint64_t rounds, bool in_order, bool retake)
{
	vd_init(&d, ram, SIZE, pick(2), d.kick_fd, d.call_fd);
	memset(offered, 0, sizeof(offered));
	memset(noted, 0, sizeof(noted));
	life = 0;
	start(false, retake);
	for (volatile uint64_t i = 0; i < rounds; i++) {
		if (setjmp(grave)) {
			uint64_t before = 0;

			deaths++;
			/* The driver may go on before the next one is there. */
			if (pick(2))
				driver_turn();
			if (read(d.call_fd, &before, sizeof(before)) < 0)
				before = 0;
			life = pick(3) ? 0 : 1 + pick(20);
			start(true, retake);
			mc_vq_go_on(&vq);
			CHECK(read(d.call_fd, &before, sizeof(before)) == sizeof(before), "no interrupt after a recovery");
		}
		if (!life)
			life = 1 + pick(60);
		driver_turn();
		device_turn(in_order);
	}
	/* The last one lives, and everything is answered. */
	life = 0;
	if (mc_vq_redo(&vq))
		take(mc_vq_redo(&vq));
	take(SIZE);
	while (n_hands)
		answer(in_order);
	mc_vq_flush(&vq);
	CHECK(vq.last_avail == d.avail_idx && vq.used_idx == d.avail_idx, "%u, %u of %u", vq.last_avail, vq.used_idx, d.avail_idx);
	for (uint32_t head, len; vd_take(&d, &head, &len);) {
		CHECK(offered[head] && len == expected[head], "head %u", head);
		offered[head] = false;
		answered++;
	}
	for (int i = 0; i < SIZE; i++) {
		CHECK(!offered[i], "head %d was lost", i);
		CHECK(region.desc[i].inflight == MC_HEAD_FREE, "head %d has a mark left", i);
	}
	CHECK(region.used_idx == vq.used_idx, "%u", region.used_idx);
}

/* What a taken-over process, or the guest, may have left: bounded, whatever it is, and an error where it is plain. */
static void test_hostile(uint64_t rounds)
{
	struct iovec iov[SIZE];
	struct mc_chain c = {.iov = iov, .max = SIZE};
	uint8_t *bytes = (uint8_t *)&region;

	life = 0;
	for (uint64_t i = 0; i < rounds; i++) {
		vd_init(&d, ram, SIZE, pick(2), d.kick_fd, d.call_fd);
		memset(offered, 0, sizeof(offered));
		vq = (struct mc_vq){.mem = &mem, .isr = &isr, .kick_fd = d.kick_fd, .call_fd = d.call_fd};
		mc_vq_init(&vq, SIZE, 0, VD_PART(SIZE), 2 * VD_PART(SIZE));
		mc_vq_keep(&vq, &region, false);
		driver_turn();
		for (unsigned n = pick(SIZE); n; n--)
			if (mc_vq_pop(&vq, &c) > 0 && pick(2))
				mc_vq_push(&vq, c.head, pick(64));
		if (pick(2))
			mc_vq_flush(&vq);
		/* Now anything at all. */
		for (unsigned n = pick(40); n; n--)
			bytes[pick(sizeof(struct mc_inflight))] = pick(256);
		for (unsigned n = pick(6); n; n--)
			bytes[pick(400)] = pick(256);
		if (!pick(3))
			d.used->idx = pick(65536);
		if (!pick(3))
			d.avail->idx = pick(65536);
		if (!pick(3))
			d.avail->ring[pick(SIZE)] = pick(65536);
		vq = (struct mc_vq){.mem = &mem, .isr = &isr, .kick_fd = d.kick_fd, .call_fd = d.call_fd, .retake_done = pick(2)};
		mc_vq_init(&vq, SIZE, 0, VD_PART(SIZE), 2 * VD_PART(SIZE));
		mc_vq_keep(&vq, &region, true);
		mc_vq_go_on(&vq);
		unsigned n = 0;

		while (n < 100 && mc_vq_pop(&vq, &c) > 0) {
			CHECK(c.head < SIZE, "head %u", c.head);
			if (pick(2))
				mc_vq_push(&vq, c.head, 1);
			else if (pick(2))
				mc_vq_unpop(&vq, 1 + pick(3));
			mc_vq_flush(&vq);
			n++;
		}
	}
}

static void test_errors(void)
{
	life = 0;
	vd_init(&d, ram, SIZE, false, d.kick_fd, d.call_fd);
	start(false, false);
	d.used->idx = 5;
	vq.inflight = NULL;
	mc_vq_keep(&vq, &region, true);
	CHECK(vq.error == MC_VQ_BAD_USED, "%d", vq.error);
	vq.error = 0;
	d.used->idx = 0;
	region.desc_num = SIZE / 2;
	mc_vq_keep(&vq, &region, true);
	CHECK(vq.error == MC_VQ_BAD_KEEP, "%d", vq.error);
}

int main(int argc, char **argv)
{
	uint64_t rounds = argc > 2 ? strtoull(argv[2], NULL, 10) : 100000;

	seed = argc > 1 ? strtoul(argv[1], NULL, 10) : 1;
	ram = calloc(1, 1 << 20);
	mem = (struct mc_mem){.n = 1, .regions = {{.gpa = 0, .size = 1 << 20, .hva = ram}}};
	d.kick_fd = eventfd(0, EFD_NONBLOCK);
	d.call_fd = eventfd(0, EFD_NONBLOCK);
	live_and_die(rounds, false, false);
	live_and_die(rounds, true, false);
	live_and_die(rounds, true, true);
	printf("%lu deaths, %lu answers, worked on %lu times\n", deaths, answered, worked);
	CHECK(deaths > rounds / 100, "%lu deaths are too few to show anything", deaths);
	test_hostile(rounds / 10);
	test_errors();
	free(ram);
	return 0;
}
