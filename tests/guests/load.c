/*
 * The word disk=SLOT:DEPTH:BLOCKS:OPS:GAP: a checksummed load on a disk, for those who kill its sidecar meanwhile. Every
 * block of 4096 bytes holds in each of its words which block and which write of it that is; a block has one request at a
 * time, and each read must find what the last write left; a write that was answered with an error may have left either
 * what it wrote or what was there. Every 50th request is a flush. OPS 0: until a byte is typed.
 *
 * It says "gap TICKS" for each time between two completions that is longer than GAP ticks of the TSC (0: never), and at the
 * end "load OPS bad B errors E doubled D": blocks that were wrong, requests answered with an error, and used entries for
 * what was not in flight.
 */
#include "guest.h"

#include <linux/serial_reg.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>

#define MEMORY 0x600000u			/* guest physical, above the micro-guest itself */
#define QUEUE 256u
#define MAX_DEPTH 64u
#define MAX_BLOCKS 4096u
#define BLOCK 4096u
#define WORDS (BLOCK / 8)
#define NOTHING 0xffffffffu

struct slot {
	struct virtio_blk_outhdr header;
	uint8_t status;
	bool busy;
	uint32_t block;			/* NOTHING: a flush */
	uint32_t generation;		/* that it writes; 0: it reads */
};

static struct vring_desc *const desc = (void *)(uint64_t)MEMORY;
static struct vring_avail *const avail = (void *)(uint64_t)(MEMORY + 0x2000);
static struct vring_used *const used = (void *)(uint64_t)(MEMORY + 0x4000);
static struct slot *const slots = (void *)(uint64_t)(MEMORY + 0x8000);
static uint8_t *const data = (void *)(uint64_t)(MEMORY + 0x10000);

static uint32_t generation[MAX_BLOCKS];	/* of the last write that succeeded */
static uint32_t perhaps[MAX_BLOCKS];	/* of a later one that did not; 0: none */
static bool taken[MAX_BLOCKS];
static uint64_t device, depth, blocks, limit, report;
static uint64_t started, finished, bad, errors, doubled, random_state;
static uint16_t made, seen;

static uint32_t pick(uint32_t n)
{
	random_state = random_state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(random_state >> 33) % n;
}

static uint64_t *buffer(uint32_t i) { return (uint64_t *)(data + (uint64_t)i * BLOCK); }
static uint64_t word(uint32_t block, uint32_t gen) { return gen ? (uint64_t)block << 32 | gen : 0; }

static void reg(uint32_t offset, uint32_t value) { write32(VIRTIO_MMIO(device) + offset, value); }

static void set_up(void)
{
	memset(desc, 0, 0x10000);
	reg(VIRTIO_MMIO_STATUS, 0);
	reg(VIRTIO_MMIO_STATUS, 1);
	reg(VIRTIO_MMIO_STATUS, 3);
	reg(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
	reg(VIRTIO_MMIO_DRIVER_FEATURES, 1u << VIRTIO_BLK_F_FLUSH);
	reg(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
	reg(VIRTIO_MMIO_DRIVER_FEATURES, 1);	/* VIRTIO_F_VERSION_1 */
	reg(VIRTIO_MMIO_STATUS, 11);
	reg(VIRTIO_MMIO_QUEUE_SEL, 0);
	reg(VIRTIO_MMIO_QUEUE_NUM, QUEUE);
	reg(VIRTIO_MMIO_QUEUE_DESC_LOW, (uint32_t)(uint64_t)desc);
	reg(VIRTIO_MMIO_QUEUE_AVAIL_LOW, (uint32_t)(uint64_t)avail);
	reg(VIRTIO_MMIO_QUEUE_USED_LOW, (uint32_t)(uint64_t)used);
	reg(VIRTIO_MMIO_QUEUE_READY, 1);
	reg(VIRTIO_MMIO_STATUS, 15);
}

static void offer(uint32_t i)
{
	struct slot *s = &slots[i];
	struct vring_desc *d = &desc[3 * i];
	bool flush = started % 50 == 49;

	s->block = NOTHING;
	s->generation = 0;
	if (!flush) {
		do
			s->block = pick(blocks);
		while (taken[s->block]);
		taken[s->block] = true;
		if (pick(2))
			s->generation = (perhaps[s->block] ? perhaps[s->block] : generation[s->block]) + 1;
	}
	s->header.type = flush ? VIRTIO_BLK_T_FLUSH : s->generation ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
	s->header.sector = flush ? 0 : (uint64_t)s->block * (BLOCK / 512);
	s->status = 0xff;
	for (uint32_t k = 0; !flush && k < WORDS; k++)
		buffer(i)[k] = s->generation ? word(s->block, s->generation) : 0x5a5a5a5a5a5a5a5a;
	d[0] = (struct vring_desc){(uint64_t)&s->header, 16, VRING_DESC_F_NEXT, flush ? 3 * i + 2 : 3 * i + 1};
	d[1] = (struct vring_desc){(uint64_t)buffer(i), BLOCK, VRING_DESC_F_NEXT | (s->generation ? 0 : VRING_DESC_F_WRITE), 3 * i + 2};
	d[2] = (struct vring_desc){(uint64_t)&s->status, 1, VRING_DESC_F_WRITE, 0};
	s->busy = true;
	started++;
	avail->ring[made++ % QUEUE] = 3 * i;
}

/* Whether one write's words are all that a read has found, and that one may have been the last. */
static bool right(const uint64_t *found, uint32_t block)
{
	uint32_t first = generation[block], last = perhaps[block] ? perhaps[block] : first;

	for (uint32_t k = 1; k < WORDS; k++)
		if (found[k] != found[0])
			return false;
	if (found[0] == word(block, first))
		return true;
	return found[0] >> 32 == block && (uint32_t)found[0] > first && (uint32_t)found[0] <= last;
}

static void settle(uint32_t head)
{
	uint32_t i = head / 3;
	struct slot *s = &slots[i];

	if (head % 3 || i >= depth || !s->busy) {
		doubled++;
		return;
	}
	s->busy = false;
	finished++;
	if (s->status)
		errors++;
	if (s->block == NOTHING)
		return;
	taken[s->block] = false;
	if (s->generation && s->status) {
		perhaps[s->block] = s->generation;
	} else if (s->generation) {
		generation[s->block] = s->generation;
		perhaps[s->block] = 0;
	} else if (!s->status && !right(buffer(i), s->block)) {
		bad++;
	}
}

/* At CPL 0 with interrupts off, so that none is missed between the look and the halt. */
static void halt_unless_used(void *arg)
{
	(void)arg;
	if (*(volatile uint16_t *)&used->idx == seen)
		__asm__ volatile("sti; hlt; cli" : : : "memory");
}

static bool typed(void) { return inb(COM1 + UART_LSR) & UART_LSR_DR; }

static void say(const char *what, uint64_t n)
{
	puts(what);
	put_hex(n);
}

/* Until nothing is in flight and `until` are finished; a byte typed ends it as well. */
static void run(uint64_t until)
{
	uint64_t last = rdtsc(), looked = 0;

	for (;;) {
		uint16_t before = made;

		if (until && finished >= until)
			return;
		if (!until && finished >= looked) {	/* a look at the UART is an exit */
			looked = finished + 256;
			if (typed())
				return;
		}
		for (uint32_t i = 0; i < depth; i++)
			if (!slots[i].busy)
				offer(i);
		__atomic_store_n(&avail->idx, made, __ATOMIC_RELEASE);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (made != before && !(*(volatile uint16_t *)&used->flags & VRING_USED_F_NO_NOTIFY))
			reg(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
		for (int spin = 0; spin < 200 && *(volatile uint16_t *)&used->idx == seen; spin++)
			pause();
		while (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) == seen)
			kernel(halt_unless_used, 0);
		uint64_t now = rdtsc();

		if (report && now - last > report) {
			say("gap ", now - last);
			put('\n');
			now = rdtsc();
		}
		last = now;
		while (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) != seen)
			settle(used->ring[seen++ % QUEUE].id);
	}
}

static void finish(void)
{
	bool busy = true;

	while (busy) {
		while (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) != seen)
			settle(used->ring[seen++ % QUEUE].id);
		busy = false;
		for (uint32_t i = 0; i < depth; i++)
			busy |= slots[i].busy;
		pause();
	}
}

/* Reads all of it once more. */
static void check(void)
{
	depth = 1;
	for (uint32_t b = 0; b < blocks; b++) {
		struct slot *s = &slots[0];

		s->block = b;
		s->generation = 0;
		s->header.type = VIRTIO_BLK_T_IN;
		s->header.sector = (uint64_t)b * (BLOCK / 512);
		s->status = 0xff;
		desc[0] = (struct vring_desc){(uint64_t)&s->header, 16, VRING_DESC_F_NEXT, 1};
		desc[1] = (struct vring_desc){(uint64_t)buffer(0), BLOCK, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 2};
		s->busy = true;
		avail->ring[made++ % QUEUE] = 0;
		__atomic_store_n(&avail->idx, made, __ATOMIC_RELEASE);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		reg(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
		finish();
	}
}

void do_disk(const char *arg)
{
	arg = pair(arg, &device);
	arg = pair(arg, &depth);
	arg = pair(arg, &blocks);
	arg = pair(arg, &limit);
	report = number(arg);
	depth = depth < MAX_DEPTH ? depth : MAX_DEPTH;
	blocks = blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS;
	set_up();
	puts("loading\n");
	run(limit);
	finish();
	uint64_t ops = finished;

	check();
	say("load ", ops);
	say(" bad ", bad);
	say(" errors ", errors);
	say(" doubled ", doubled);
	put('\n');
}
