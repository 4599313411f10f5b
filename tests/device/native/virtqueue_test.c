/*
 * What needs the device's end of a ring in the same process: notification decisions around every wrap, and the two
 * handshakes under two threads, where a missing fence is a hang. Built with sanitizers by test_virtqueue.py.
 */
#include <poll.h>
#include <pthread.h>
#include <sched.h>
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
	CHECK(vq.stats.requests >= 200000 && vq.stats.interrupts && vq.stats.suppressed, "stats");
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
	CHECK(vq.stats.interrupts < MESSAGES && d.kicks <= MESSAGES, "%s", "notifications are fewer than messages");
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
		uint64_t before = l->vq.stats.interrupts;

		if (!l->kicks)
			mc_vq_push(&l->vq, 0, 0);
		spin_until(&l->go, i);
		if (l->kicks) {
			l->told = mc_vq_enable_kick(&l->vq);
		} else {
			mc_vq_flush(&l->vq);
			l->told = l->vq.stats.interrupts != before;
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

int main(void)
{
	ram = aligned_alloc(4096, 0x20000);
	mem = (struct mc_mem){.n = 1, .regions = {{.gpa = 0, .size = 0x20000, .hva = ram}}};
	test_used_event();
	test_flags();
	test_unpop();
	test_error_freezes();
	test_iov_copy();
	test_handshakes(true);
	test_handshakes(false);
	test_litmus(false);
	test_litmus(true);
	free(ram);
	return 0;
}
