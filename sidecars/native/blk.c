/* Life cycle and the loop of the data thread. */
#define _GNU_SOURCE
#include "blk_impl.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define BIT(n) (1ull << (n))

static int open_engine(struct mc_blk *b, char *error)
{
	int err = 0;

	if (b->p.engine != MC_BLK_SYNC) {
		b->engine = &blk_uring;
		err = b->engine->open(b);
		if (!err)
			return 0;
		if (b->p.engine == MC_BLK_URING) {
			b->engine = NULL;
			snprintf(error, 256, "io_uring cannot be used here: %s", strerror(err));
			return err;
		}
	}
	b->engine = &blk_sync;
	err = b->engine->open(b);
	if (err) {
		b->engine = NULL;
		snprintf(error, 256, "epoll cannot be used here: %s", strerror(err));
	}
	return err;
}

/* One slot for each request that a driver can have in flight. Memory of slots that are never used stays untouched: a
 * driver with little in flight always gets the same few. */
static int make_slots(struct blk_queue *q)
{
	q->slots = mmap(NULL, sizeof(struct blk_req) * MC_BLK_QUEUE_SIZE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (q->slots == MAP_FAILED) {
		q->slots = NULL;
		return ENOMEM;
	}
	return 0;
}

static int make_buffers(struct mc_blk *b)
{
	b->bounce_area = mmap(NULL, BLK_BOUNCES * BLK_BOUNCE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (b->bounce_area == MAP_FAILED) {
		b->bounce_area = NULL;
		return ENOMEM;
	}
	for (b->bounces = 0; b->bounces < BLK_BOUNCES; b->bounces++)
		b->bounce_free[b->bounces] = b->bounce_area + b->bounces * (size_t)BLK_BOUNCE_SIZE;
	b->zeroes = mmap(NULL, BLK_ZEROES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (b->zeroes == MAP_FAILED) {
		b->zeroes = NULL;
		return ENOMEM;
	}
	for (uint16_t i = 0; i < b->p.queues; i++) {
		struct blk_queue *q = &b->queues[i];

		q->vq.mem = b->p.mem;
		q->vq.isr = b->p.isr;
		q->vq.watch = b->p.watch;
		q->vq.index = i;
		if (make_slots(q))
			return ENOMEM;
	}
	return 0;
}

struct mc_blk *mc_blk_new(const struct mc_blk_params *params, char *error)
{
	struct mc_blk *b = calloc(1, sizeof(*b));

	if (!b) {
		snprintf(error, 256, "no memory");
		return NULL;
	}
	b->p = *params;
	if (!b->p.watch)
		b->p.watch = &mc_watch_nobody;
	b->stop_fd = -1;
	b->keep = params->keep ? (struct mc_blk_keep *)params->keep->kind : &b->own_keep;
	b->writeback = !(b->keep->set && b->keep->write_through);
	if (params->layers > MC_BLK_MAX_LAYERS || (params->layers && params->overlay.fd < 0)) {
		snprintf(error, 256, "%u layers: below an overlay up to %u are possible", params->layers, MC_BLK_MAX_LAYERS);
		goto fail;
	}
	b->fds[FILE_DISK] = params->disk_fd;
	b->fds[FILE_OVERLAY] = params->overlay.fd;
	b->data_off[FILE_OVERLAY] = params->overlay.data;
	for (uint16_t i = 0; i < params->layers; i++) {
		b->fds[FILE_LAYER + i] = params->layer[i].fd;
		b->data_off[FILE_LAYER + i] = params->layer[i].data;
	}
	b->files = FILE_LAYER + params->layers;
	if (params->queues == 0 || params->queues > MC_BLK_MAX_QUEUES) {
		snprintf(error, 256, "%u queues: 1 to %u are possible", params->queues, MC_BLK_MAX_QUEUES);
		goto fail;
	}
	if (make_buffers(b)) {
		snprintf(error, 256, "no memory for %u queues", params->queues);
		goto fail;
	}
	b->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (b->stop_fd < 0) {
		snprintf(error, 256, "eventfd: %s", strerror(errno));
		goto fail;
	}
	b->beat = (struct mc_beat){.wake_fd = b->stop_fd, .event_fd = params->event_fd};
	if (blk_geometry(b, error) || (blk_has_overlay(b) && blk_overlay_open(b, error)) || open_engine(b, error))
		goto fail;
	b->config.wce = b->writeback;
	return b;
fail:
	mc_blk_free(b);
	return NULL;
}

void mc_blk_free(struct mc_blk *b)
{
	if (b->engine)
		b->engine->close(b);
	if (b->stop_fd >= 0)
		close(b->stop_fd);
	for (uint16_t i = 0; i < MC_BLK_MAX_QUEUES; i++) {
		if (b->queues[i].slots)
			munmap(b->queues[i].slots, sizeof(struct blk_req) * MC_BLK_QUEUE_SIZE);
	}
	if (b->bounce_area)
		munmap(b->bounce_area, BLK_BOUNCES * BLK_BOUNCE_SIZE);
	if (b->zeroes)
		munmap(b->zeroes, BLK_ZEROES);
	blk_overlay_close(b);
	free(b);
}

uint64_t mc_blk_features(const struct mc_blk *b)
{
	uint64_t f = BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_TOPOLOGY) | BIT(VIRTIO_BLK_F_FLUSH);

	if (b->p.queues > 1)
		f |= BIT(VIRTIO_BLK_F_MQ);
	if (b->p.readonly)
		return f | BIT(VIRTIO_BLK_F_RO);
	f |= BIT(VIRTIO_BLK_F_CONFIG_WCE) | BIT(VIRTIO_BLK_F_WRITE_ZEROES);
	return b->p.discard ? f | BIT(VIRTIO_BLK_F_DISCARD) : f;
}

const struct virtio_blk_config *mc_blk_config(const struct mc_blk *b, uint32_t *size)
{
	*size = offsetof(struct virtio_blk_config, max_secure_erase_sectors);
	return &b->config;
}

const char *mc_blk_engine_name(const struct mc_blk *b) { return b->engine->name; }
const struct mc_blk_counters *mc_blk_counters(const struct mc_blk *b) { return &b->counters; }
struct mc_vq *mc_blk_queue(struct mc_blk *b, uint16_t i) { return &b->queues[i].vq; }

struct mc_beat *mc_blk_beat(struct mc_blk *b) { return &b->beat; }

void mc_blk_set_writeback(struct mc_blk *b, bool on)
{
	/* Kept before it is answered, or before a write is: a successor is no laxer than the driver was told. */
	b->keep->write_through = !on;
	b->keep->set = 1;
	b->config.wce = on;
	__atomic_store_n(&b->writeback, on, __ATOMIC_RELAXED);
}

void mc_blk_activate(struct mc_blk *b, uint64_t features, uint64_t queue_mask)
{
	b->features = features;
	/* 5.2.5.2: a driver without FLUSH must find a write-through cache. */
	if (!(features & BIT(VIRTIO_BLK_F_CONFIG_WCE)))
		mc_blk_set_writeback(b, features & BIT(VIRTIO_BLK_F_FLUSH));
	for (uint16_t i = 0; i < b->p.queues; i++) {
		struct blk_queue *q = &b->queues[i];

		q->active = queue_mask & BIT(i);
		q->armed = q->reported = false;
		q->free = NULL;
		for (uint32_t s = q->active ? q->vq.size : 0; s--; ) {
			q->slots[s].q = q;
			q->slots[s].next = q->free;
			q->free = &q->slots[s];
		}
		/* Broken from the start: the main loop announces it by itself. */
		if (q->active && q->vq.error)
			q->active = false;
	}
}

void mc_blk_stop(struct mc_blk *b)
{
	const uint64_t one = 1;

	__atomic_store_n(&b->stop, true, __ATOMIC_RELEASE);
	ssize_t n = write(b->stop_fd, &one, sizeof(one));
	(void)n;
}

void mc_blk_reset(struct mc_blk *b)
{
	for (uint16_t i = 0; i < b->p.queues; i++) {
		b->queues[i].active = false;
		b->queues[i].vq.error = 0;
	}
	mc_blk_set_writeback(b, true);
}

int mc_blk_sync(struct mc_blk *b)
{
	if (b->p.readonly)
		return 0;
	if (blk_has_overlay(b))
		return blk_overlay_sync(b);
	return fdatasync(b->p.disk_fd) ? errno : 0;
}

/* Asks for kicks where that was not done since the last chain was taken. True: chains came meanwhile. */
static bool arm_kicks(struct mc_blk *b)
{
	bool more = false;

	for (uint16_t i = 0; i < b->p.queues; i++) {
		struct blk_queue *q = &b->queues[i];

		/* What could not be taken now is looked at again after the next completion, kick or none. */
		if (!q->active || !blk_queue_ready(b, q) || (q->armed && q->armed_at == q->vq.last_avail))
			continue;
		q->armed = !mc_vq_enable_kick(&q->vq);
		q->armed_at = q->vq.last_avail;
		more |= !q->armed;
	}
	return more;
}

int mc_blk_run(struct mc_blk *b)
{
	int err = b->engine->start(b);

	while (!err) {
		bool stop = __atomic_load_n(&b->stop, __ATOMIC_ACQUIRE), more = false;

		mc_beat(&b->beat);
		if (b->delayed)
			blk_inject_due(b, stop);
		for (uint16_t i = 0; i < b->p.queues; i++) {
			/* What our predecessor had in its hands is finished before we come to rest. */
			if (b->queues[i].active && (!stop || mc_vq_redo(&b->queues[i].vq)))
				more |= blk_queue_poll(b, &b->queues[i]);
		}
		blk_io_wake(b);
		for (uint16_t i = 0; i < b->p.queues; i++) {
			if (b->queues[i].active)
				mc_vq_flush(&b->queues[i].vq);
		}
		if (stop && !b->requests)
			break;
		if (!stop)
			more |= arm_kicks(b);
		b->counters.wakeups++;
		err = b->engine->wait(b, !more);
	}
	/* Asked once, returned once: the next run goes on. */
	__atomic_store_n(&b->stop, false, __ATOMIC_RELAXED);
	return err;
}
