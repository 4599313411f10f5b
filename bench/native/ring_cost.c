/* For bench/ring.py: prints the nanoseconds of CPU that a request costs in the device side of a virtqueue, in batches of
 * argv[1], with nobody looking and with every event recorded. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>

#include "vdriver.h"
#include "virtqueue.h"

#define SIZE 256
#define REQUESTS 20000		/* of a run */
#define RUNS 200

static struct mc_mem mem;
static struct mc_isr isr;
static struct mc_vq vq;
static struct vd_queue driver;
static struct iovec iov[SIZE];

static uint64_t cpu_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void one_batch(int batch)
{
	static uint16_t next;
	uint16_t heads[SIZE];
	uint32_t head, len;
	int n = 0;
	struct mc_chain c = {.max = SIZE, .iov = iov};

	for (int i = 0; i < batch; i++)
		vd_offer(&driver, next++ % SIZE);
	__atomic_store_n(&driver.avail->idx, driver.avail_idx, __ATOMIC_RELEASE);
	*vd_used_event(&driver) = driver.avail_idx + 1000;	/* it wants no interrupt, which would be a system call */
	while (mc_vq_pop(&vq, &c) > 0)
		heads[n++] = c.head;
	mc_vq_flush(&vq);					/* as a disk's loop does between taking and answering */
	for (int i = 0; i < n; i++)
		mc_vq_push(&vq, heads[i], 1);
	mc_vq_flush(&vq);
	while (vd_take(&driver, &head, &len))
		;
}

static double measure(int batch)
{
	double best = 1e9;

	for (int run = 0; run < RUNS; run++) {
		uint64_t start = cpu_ns();

		for (int i = 0; i < REQUESTS / batch; i++)
			one_batch(batch);
		double each = (double)(cpu_ns() - start) / (REQUESTS / batch * batch);

		best = each < best ? each : best;
	}
	return best;
}

int main(int argc, char **argv)
{
	int batch = argc > 1 ? atoi(argv[1]) : 0, kick = eventfd(0, EFD_NONBLOCK), call = eventfd(0, EFD_NONBLOCK);
	uint8_t *ram = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct mc_watch *watch = mmap(NULL, MC_WATCH_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (batch < 1 || batch > SIZE || ram == MAP_FAILED || watch == MAP_FAILED)
		return 2;
	mem = (struct mc_mem){.n = 1, .regions = {{.gpa = 0, .size = 1 << 20, .hva = ram}}};
	vd_init(&driver, ram, SIZE, true, kick, call);
	vq = (struct mc_vq){
		.mem = &mem, .isr = &isr, .kick_fd = kick, .call_fd = call, .event_idx = true, .indirect = true, .watch = watch,
	};
	if (mc_vq_init(&vq, SIZE, 0, VD_PART(SIZE), 2 * VD_PART(SIZE)))
		return 1;
	for (int i = 0; i < SIZE; i++)
		driver.desc[i] = (struct vring_desc){.addr = 0x10000 + 64 * i, .len = 64};
	printf("%.1f ", measure(batch));
	watch->on = 0xffff;
	printf("%.1f\n", measure(batch));
	return 0;
}
