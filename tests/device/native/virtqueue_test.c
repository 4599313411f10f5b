/*
 * What needs the device's end of a ring in the same process: notification decisions around every wrap, and the two
 * handshakes under two threads, where a missing fence is a hang. Built with sanitizers by test_virtqueue.py.
 */
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>

#include "vdriver.h"
#include "virtqueue.h"

#define CHECK(cond, ...) do { if (!(cond)) { fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond); \
	fprintf(stderr, __VA_ARGS__); fputc('\n', stderr); exit(1); } } while (0)

#define SIZE 8
static uint8_t *ram;
static struct mc_mem mem;
static struct mc_isr isr;

static void set_up(struct vd_queue *d, struct mc_vq *vq, uint16_t size, bool event_idx)
{
	int kick = eventfd(0, EFD_NONBLOCK), call = eventfd(0, EFD_NONBLOCK);

	vd_init(d, ram, size, event_idx, kick, call);
	*vq = (struct mc_vq){.mem = &mem, .isr = &isr, .kick_fd = kick, .call_fd = call, .event_idx = event_idx, .indirect = true};
	CHECK(!mc_vq_init(vq, size, 0, VD_PART(size), 2 * VD_PART(size)), "%s", mc_vq_strerror(vq->error));
	for (uint16_t i = 0; i < size; i++)
		d->desc[i] = (struct vring_desc){.addr = 0x10000 + 64 * i, .len = 64, .flags = i % 2 ? VRING_DESC_F_WRITE : 0};
}

static void tear_down(struct vd_queue *d)
{
	close(d->kick_fd);
	close(d->call_fd);
}

static uint64_t drain(int fd)
{
	uint64_t n = 0;

	return read(fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

/* 2.7.10: an interrupt exactly when used_event lies in what this flush published; batches of all sizes, more than
 * 65536 entries. */
static void test_used_event(void)
{
	struct vd_queue d;
	struct mc_vq vq;
	struct iovec iov[4];
	uint32_t head, len, seed = 1;

	set_up(&d, &vq, SIZE, true);
	for (uint32_t published = 0; published < 200000; ) {
		uint32_t n = 1 + rand_r(&seed) % SIZE, ahead = rand_r(&seed) % (2 * SIZE);
		uint16_t event = published + ahead;

		if (rand_r(&seed) % 4 == 0)
			event = rand_r(&seed);
		*vd_used_event(&d) = event;
		for (uint32_t i = 0; i < n; i++) {
			struct mc_chain c = {.max = 4, .iov = iov};

			vd_offer(&d, i);
			vd_kick(&d);
			CHECK(mc_vq_pop(&vq, &c) == 1, "%s", mc_vq_strerror(vq.error));
			CHECK(c.head == i && c.n_in == i % 2 && c.n_out == !(i % 2) && c.len_in + c.len_out == 64, "chain");
			mc_vq_push(&vq, c.head, i);
		}
		CHECK(d.used->idx == (uint16_t)published, "nothing is visible before the flush");
		mc_vq_flush(&vq);
		bool wanted = (uint16_t)(event - (uint16_t)published) < n;
		CHECK(drain(vq.call_fd) == wanted, "at %u, %u entries, event %u", published, n, event);
		mc_vq_flush(&vq);
		CHECK(drain(vq.call_fd) == 0, "an empty flush says nothing");
		for (uint32_t i = 0; i < n; i++)
			CHECK(vd_take(&d, &head, &len) && head == i && len == i, "used entry");
		published += n;
	}
	CHECK(vq.stats->requests >= 200000 && vq.stats->interrupts && vq.stats->suppressed, "stats");
	tear_down(&d);
}

static void test_flags(void)
{
	struct vd_queue d;
	struct mc_vq vq;
	struct iovec iov[4];
	struct mc_chain c = {.max = 4, .iov = iov};

	set_up(&d, &vq, SIZE, false);
	isr.status = 0;
	for (int suppress = 0; suppress < 2; suppress++) {
		d.avail->flags = suppress ? VRING_AVAIL_F_NO_INTERRUPT : 0;
		vd_offer(&d, 0);
		vd_kick(&d);
		CHECK(mc_vq_pop(&vq, &c) == 1, "pop");
		mc_vq_push(&vq, 0, 0);
		isr.status = 2;
		mc_vq_flush(&vq);
		CHECK(drain(vq.call_fd) == !suppress, "call");
		CHECK(isr.status == (suppress ? 2 : 3), "InterruptStatus %u: bit 1 is not ours", isr.status);
	}
	drain(vq.kick_fd);
	mc_vq_disable_kick(&vq);
	vd_offer(&d, 0);
	vd_kick(&d);
	CHECK(drain(vq.kick_fd) == 0, "NO_NOTIFY");
	CHECK(mc_vq_enable_kick(&vq), "an entry came meanwhile");
	CHECK(mc_vq_pop(&vq, &c) == 1 && !mc_vq_enable_kick(&vq), "now the ring is empty");
	vd_offer(&d, 0);
	vd_kick(&d);
	CHECK(drain(vq.kick_fd) == 1, "kicks are on");
	tear_down(&d);
}

static void test_unpop(void)
{
	struct vd_queue d;
	struct mc_vq vq;
	struct iovec iov[4];
	struct mc_chain c = {.max = 4, .iov = iov};

	set_up(&d, &vq, SIZE, true);
	for (int i = 0; i < 3; i++)
		vd_offer(&d, i);
	vd_kick(&d);
	for (int i = 0; i < 3; i++)
		CHECK(mc_vq_pop(&vq, &c) == 1 && c.head == i, "pop");
	mc_vq_unpop(&vq, 2);
	CHECK(mc_vq_enable_kick(&vq), "they are there again");
	for (int i = 1; i < 3; i++)
		CHECK(mc_vq_pop(&vq, &c) == 1 && c.head == i, "pop again");
	CHECK(mc_vq_pop(&vq, &c) == 0, "empty");
	tear_down(&d);
}

static void test_error_freezes(void)
{
	struct vd_queue d;
	struct mc_vq vq;
	struct iovec iov[4];
	struct mc_chain c = {.max = 4, .iov = iov};

	set_up(&d, &vq, SIZE, true);
	vd_offer(&d, 0);
	vd_offer(&d, SIZE);
	vd_kick(&d);
	CHECK(mc_vq_pop(&vq, &c) == 1, "the first is good");
	CHECK(mc_vq_pop(&vq, &c) == -1 && vq.error == MC_VQ_BAD_HEAD, "the second is not");
	mc_vq_push(&vq, 0, 0);
	mc_vq_flush(&vq);
	CHECK(d.used->idx == 0 && drain(vq.call_fd) == 0 && !mc_vq_enable_kick(&vq), "nothing is touched any more");
	CHECK(mc_vq_pop(&vq, &c) == -1, "for good");
	tear_down(&d);
}

static void test_iov_copy(void)
{
	uint8_t a[3] = {1, 2, 3}, b[5] = {4, 5, 6, 7, 8}, out[16];
	struct iovec iov[] = {{a, 3}, {NULL, 0}, {b, 5}};

	CHECK(mc_iov_read(iov, 3, 0, out, 16) == 8 && out[0] == 1 && out[7] == 8, "all");
	CHECK(mc_iov_read(iov, 3, 2, out, 3) == 3 && out[0] == 3 && out[2] == 5, "across");
	CHECK(mc_iov_read(iov, 3, 8, out, 1) == 0 && mc_iov_read(iov, 3, 1000, out, 1) == 0, "past the end");
	CHECK(mc_iov_write(iov, 3, 1, (uint8_t[]){9, 9, 9}, 3) == 3 && a[1] == 9 && b[0] == 9 && b[1] == 5, "write");
}

/* Two threads that only ever sleep on their eventfds. A lost notification is a time-out. */
#define MESSAGES 100000

static void wait_for(int fd, const char *who)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	CHECK(poll(&p, 1, 20000) == 1, "%s was never woken", who);
	drain(fd);
}

static void *device(void *arg)
{
	struct mc_vq *vq = arg;
	struct iovec iov[4];
	uint32_t seed = 7;

	for (uint32_t done = 0; done < MESSAGES; ) {
		struct mc_chain c = {.max = 4, .iov = iov};
		int got = mc_vq_pop(vq, &c);

		CHECK(got >= 0, "%s", mc_vq_strerror(vq->error));
		if (got) {
			mc_vq_push(vq, c.head, done++);
			if (rand_r(&seed) % 3 == 0)
				mc_vq_flush(vq);
			continue;
		}
		mc_vq_flush(vq);
		if (done < MESSAGES && !mc_vq_enable_kick(vq)) {
			wait_for(vq->kick_fd, "the device");
			mc_vq_disable_kick(vq);
		}
	}
	mc_vq_flush(vq);
	return NULL;
}

static void test_handshakes(bool event_idx)
{
	struct vd_queue d;
	struct mc_vq vq;
	pthread_t thread;
	uint32_t head, len, sent = 0, seed = 3;

	set_up(&d, &vq, SIZE, event_idx);
	CHECK(!pthread_create(&thread, NULL, device, &vq), "thread");
	for (uint32_t received = 0; received < MESSAGES; ) {
		uint32_t burst = rand_r(&seed) % (SIZE + 1);

		while (burst-- && sent < MESSAGES && sent - received < SIZE)
			vd_offer(&d, sent++ % SIZE);
		vd_kick(&d);
		while (vd_take(&d, &head, &len)) {
			CHECK(head == received % SIZE && len == received, "order: %u", received);
			received++;
		}
		if (sent > received && vd_arm(&d))
			wait_for(d.call_fd, "the driver");
	}
	pthread_join(thread, NULL);
	CHECK(vq.stats->interrupts < MESSAGES && d.kicks <= MESSAGES, "%s", "notifications are fewer than messages");
	tear_down(&d);
}

/*
 * The two handshakes as a litmus test: device and driver make their move at the same moment, over and over, and at least
 * one of them must see the other's. Fails within a second where a full fence is missing (tried).
 */
struct litmus {
	struct vd_queue d;
	struct mc_vq vq;
	bool kicks;			/* which handshake */
	uint32_t turn;			/* of the device thread: what it has done */
	uint32_t go;
	uint64_t told;			/* the device saw what it had to see */
};

/* sched_yield() is where the thread of a test that is over ends. */
static void spin_until(uint32_t *word, uint32_t value)
{
	for (uint32_t n = 0; __atomic_load_n(word, __ATOMIC_ACQUIRE) != value; n++) {
		if (n > 2000)
			sched_yield();
		if (n > 2000)
			pthread_testcancel();
	}
}

static void *litmus_device(void *arg)
{
	struct litmus *l = arg;

	for (uint32_t i = 1; ; i++) {
		uint64_t before = l->vq.stats->interrupts;

		if (!l->kicks)
			mc_vq_push(&l->vq, 0, 0);
		spin_until(&l->go, i);
		if (l->kicks) {
			l->told = mc_vq_enable_kick(&l->vq);
		} else {
			mc_vq_flush(&l->vq);
			l->told = l->vq.stats->interrupts != before;
		}
		__atomic_store_n(&l->turn, i, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void test_litmus(bool kicks)
{
	static struct litmus l;
	struct timespec t;
	struct iovec iov[4];
	pthread_t thread;
	uint32_t i = 0, seed = 5;

	l = (struct litmus){.kicks = kicks};
	set_up(&l.d, &l.vq, SIZE, true);
	int call = l.vq.call_fd;
	l.vq.call_fd = -1;		/* only the decision counts */
	CHECK(!pthread_create(&thread, NULL, litmus_device, &l), "thread");
	clock_gettime(CLOCK_MONOTONIC, &t);
	for (time_t end = t.tv_sec + 2; t.tv_sec < end; clock_gettime(CLOCK_MONOTONIC, &t)) {
		for (uint32_t stop = i + 2000; i < stop; ) {
			bool saw;

			i++;
			if (kicks) {
				/* The device sleeps unless told; we publish an entry and look whether it wants a kick. */
				*vd_avail_event(&l.d) = l.d.avail_idx - 1;
				vd_offer(&l.d, 0);
			} else {
				*vd_used_event(&l.d) = l.d.last_used - 1;
			}
			__atomic_store_n(&l.go, i, __ATOMIC_RELEASE);
			for (volatile uint32_t n = rand_r(&seed) % 40; n; n--)
				;
			if (kicks) {
				uint64_t count = l.d.kicks;

				vd_kick(&l.d);
				saw = l.d.kicks != count;
			} else {
				saw = !vd_arm(&l.d);
			}
			spin_until(&l.turn, i);
			CHECK(saw || l.told, "round %u: both went to sleep", i);
			if (kicks) {
				struct mc_chain c = {.max = 4, .iov = iov};

				drain(l.d.kick_fd);
				CHECK(mc_vq_pop(&l.vq, &c) == 1, "pop");
			} else {
				l.d.last_used++;
			}
		}
	}
	/* The device waits for i + 1. */
	l.vq.error = MC_VQ_BAD_REQUEST;
	pthread_cancel(thread);
	pthread_join(thread, NULL);
	l.vq.call_fd = call;
	tear_down(&l.d);
}

/* --- The dirty log. --- */

#define LOG_PAGES 200
static uint64_t dirty_log[(LOG_PAGES + 63) / 64 + 1];

static bool logged(uint64_t page) { return dirty_log[page / 64] >> page % 64 & 1; }

/* Marks and compares with the pages that it must name, which are counted in the memfd and not in guest physical memory. */
static void check_mark(const struct mc_mem *m, const uint8_t *at, uint64_t len, uint64_t first, uint64_t n)
{
	memset(dirty_log, 0, sizeof(dirty_log));
	mc_mem_mark(m, at, len);
	for (uint64_t page = 0; page < sizeof(dirty_log) * 8; page++)
		CHECK(logged(page) == (page >= first && page < first + n), "page %llu of +%llu", (unsigned long long)page, (unsigned long long)len);
}

static void test_mark(void)
{
	uint8_t *low = aligned_alloc(4096, 150 * 4096), *high = aligned_alloc(4096, 50 * 4096);
	struct mc_mem m = {.n = 2, .dirty = dirty_log, .regions = {
		{.gpa = 0, .size = 150 * 4096, .hva = low, .offset = 50 * 4096},
		{.gpa = 1ull << 32, .size = 50 * 4096, .hva = high, .offset = 0},
	}};

	check_mark(&m, low, 1, 50, 1);
	check_mark(&m, low + 4095, 1, 50, 1);
	check_mark(&m, low + 4095, 2, 50, 2);
	check_mark(&m, low + 13 * 4096, 4096, 63, 1);
	check_mark(&m, low + 13 * 4096 + 1, 4096, 63, 2);
	check_mark(&m, low, 150 * 4096, 50, 150);
	check_mark(&m, low + 14 * 4096, 64 * 4096, 64, 64);
	check_mark(&m, high + 49 * 4096, 4096, 49, 1);
	/* Cut off at the region's end: no bit of another region, none past the log. */
	check_mark(&m, low + 149 * 4096, UINT64_MAX, 199, 1);
	check_mark(&m, low + 100, UINT64_MAX, 50, 150);
	check_mark(&m, high + 48 * 4096, 1 << 20, 48, 2);
	/* Not guest memory, or nothing. */
	check_mark(&m, low, 0, 0, 0);
	check_mark(&m, (uint8_t *)dirty_log, 8, 0, 0);
	check_mark(&m, NULL, 4096, 0, 0);
	m.dirty = NULL;
	check_mark(&m, low, 4096, 0, 0);

	m.dirty = dirty_log;
	struct iovec iov[] = {{low, 4096}, {low + 8 * 4096, 4096}, {high, 4096}};

	mc_mem_mark_iov(&m, iov, 3, 4097);
	CHECK(logged(50) && logged(58) && !logged(0), "a vector, up to its length");
	free(low);
	free(high);
}

/* All that the ring's owner writes, at every place of the ring; over two pages, so that a used entry and the index differ. */
static void test_ring_is_marked(void)
{
	static uint8_t before[0x20000];
	struct vd_queue d;
	struct mc_vq vq;
	struct iovec iov[4];
	uint32_t head, len, seed = 1;

	mem.dirty = dirty_log;
	for (int event_idx = 0; event_idx < 2; event_idx++) {
		set_up(&d, &vq, 1024, event_idx);
		uint64_t used = 2 * VD_PART(1024) / 4096;

		CHECK(logged(used) && logged(used + 1) && logged(used + 2), "a predecessor may have died before it marked");
		for (uint32_t done = 0; done < 10000; ) {
			uint32_t n = 1 + rand_r(&seed) % 300;

			for (uint32_t i = 0; i < n; i++)
				vd_offer(&d, i);
			vd_kick(&d);
			memcpy(before, ram, sizeof(before));
			memset(dirty_log, 0, sizeof(dirty_log));
			for (uint32_t i = 0; i < n; i++) {
				struct mc_chain c = {.max = 4, .iov = iov};

				CHECK(mc_vq_pop(&vq, &c) == 1, "pop");
				mc_vq_push(&vq, c.head, done + i);
			}
			mc_vq_disable_kick(&vq);
			mc_vq_flush(&vq);
			mc_vq_enable_kick(&vq);
			for (uint32_t at = 0; at < sizeof(before); at++)
				CHECK(before[at] == ram[at] || logged(at / 4096), "byte %#x", at);
			for (uint32_t i = 0; i < n; i++)
				CHECK(vd_take(&d, &head, &len) && len == done + i, "used entry");
			done += n;
		}
		tear_down(&d);
	}
	mem.dirty = NULL;
}

static atomic_bool writer_stops;

static void *writer(void *arg)
{
	const struct mc_mem *m = arg;
	uint32_t seed = 7;

	for (uint64_t value = 1; !atomic_load(&writer_stops); value++) {
		uint64_t *at = (uint64_t *)(ram + rand_r(&seed) % 32 * 4096ull);

		__atomic_store_n(at, value, __ATOMIC_RELAXED);
		mc_mem_mark(m, at, sizeof(*at));
	}
	return NULL;
}

/* The core's side: take the bits, then copy. When the writer has come to rest, one more round makes the copy right. */
static void take_and_copy(uint8_t *copy)
{
	uint64_t bits = __atomic_exchange_n(&dirty_log[0], 0, __ATOMIC_SEQ_CST);

	for (uint64_t page = 0; page < 32; page++)
		if (bits >> page & 1)
			memcpy(copy + page * 4096, ram + page * 4096, 4096);
}

static void test_nothing_is_missed_by_a_copy_behind_a_writer(void)
{
	static uint8_t copy[0x20000];
	struct mc_mem m = mem;
	pthread_t thread;

	m.dirty = dirty_log;
	memset(dirty_log, 0, sizeof(dirty_log));
	for (int round = 0; round < 30; round++) {
		memcpy(copy, ram, sizeof(copy));
		memset(dirty_log, 0, sizeof(dirty_log));
		atomic_store(&writer_stops, false);
		CHECK(!pthread_create(&thread, NULL, writer, &m), "thread");
		for (int i = 0; i < 2000; i++)
			take_and_copy(copy);
		atomic_store(&writer_stops, true);
		pthread_join(thread, NULL);
		take_and_copy(copy);
		CHECK(!memcmp(copy, ram, sizeof(copy)), "round %d", round);
	}
}

int main(void)
{
	ram = aligned_alloc(4096, 0x20000);
	mem = (struct mc_mem){.n = 1, .regions = {{.gpa = 0, .size = 0x20000, .hva = ram}}};
	test_used_event();
	test_flags();
	test_unpop();
	test_error_freezes();
	test_mark();
	test_ring_is_marked();
	test_nothing_is_missed_by_a_copy_behind_a_writer();
	test_iov_copy();
	test_handshakes(true);
	test_handshakes(false);
	test_litmus(false);
	test_litmus(true);
	free(ram);
	return 0;
}
