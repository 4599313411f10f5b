/* The queues of a device that is answered by Python or by a C function of its own (queue.h). */
#define _GNU_SOURCE
#include "queue.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64	/* requests of one queue before its neighbours' turn, and before what was answered is published */
#define TAG_STOP MC_QUEUES_MAX
#define TAG_WAKE (MC_QUEUES_MAX + 1)

struct queue {
	struct mc_vq vq;
	bool attached;
	bool ready;		/* there may be something in it */
	uint64_t held_until;	/* a request was given back: monotonic time in ns; UINT64_MAX: until it is woken; 0: none */
};

struct mc_queues {
	struct queue q[MC_QUEUES_MAX];
	uint32_t n;
	uint32_t turn;		/* whose it is */
	struct queue *current;	/* of the request in hand */
	struct mc_chain chain;
	uint64_t written;
	mc_queues_handler handler;
	void *opaque;
	int ep, stop_fd, wake_fd, event_fd;
	bool stopped;
	struct mc_beat beat;
	struct iovec iov[MC_MAX_QUEUE_SIZE];
};

static void signal_fd(int fd)
{
	const uint64_t one = 1;
	/* EAGAIN: it is signalled already. */
	ssize_t n = write(fd, &one, sizeof(one));
	(void)n;
}

static void clear_fd(int fd)
{
	uint64_t count;
	/* EAGAIN: somebody else's notification came to nothing. */
	ssize_t n = read(fd, &count, sizeof(count));
	(void)n;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static int watch(struct mc_queues *s, int fd, uint32_t tag)
{
	struct epoll_event e = {.events = EPOLLIN, .data.u32 = tag};

	return epoll_ctl(s->ep, EPOLL_CTL_ADD, fd, &e) ? errno : 0;
}

struct mc_queues *mc_queues_new(uint32_t n, int event_fd, mc_queues_handler handler, void *opaque)
{
	if (n > MC_QUEUES_MAX) {
		errno = EINVAL;
		return NULL;
	}
	struct mc_queues *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	s->n = n;
	s->event_fd = event_fd;
	s->handler = handler;
	s->opaque = opaque;
	s->chain = (struct mc_chain){.iov = s->iov, .max = MC_MAX_QUEUE_SIZE};
	s->ep = epoll_create1(EPOLL_CLOEXEC);
	s->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	s->beat = (struct mc_beat){.wake_fd = s->wake_fd, .event_fd = event_fd};
	if (s->ep < 0 || s->stop_fd < 0 || s->wake_fd < 0 || watch(s, s->stop_fd, TAG_STOP) || watch(s, s->wake_fd, TAG_WAKE)) {
		int error = errno;

		mc_queues_free(s);
		errno = error;
		return NULL;
	}
	return s;
}

void mc_queues_free(struct mc_queues *s)
{
	const int fds[] = {s->ep, s->stop_fd, s->wake_fd};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		if (fds[i] >= 0)
			close(fds[i]);
	}
	free(s);
}

int mc_queues_attach(struct mc_queues *s, uint32_t index, const struct mc_vq *vq)
{
	if (index >= s->n)
		return EINVAL;
	struct queue *q = &s->q[index];

	if (q->attached)
		return EBUSY;
	int error = watch(s, vq->kick_fd, index);

	if (error)
		return error;
	*q = (struct queue){.vq = *vq, .attached = true, .ready = true};
	return 0;
}

void mc_queues_detach(struct mc_queues *s)
{
	for (uint32_t i = 0; i < s->n; i++) {
		struct queue *q = &s->q[i];

		if (!q->attached)
			continue;
		epoll_ctl(s->ep, EPOLL_CTL_DEL, q->vq.kick_fd, NULL);
		*q = (struct queue){0};
	}
}

struct mc_beat *mc_queues_beat(struct mc_queues *s) { return &s->beat; }

const struct mc_vq *mc_queues_at(const struct mc_queues *s, uint32_t index)
{
	return index < s->n ? &s->q[index].vq : NULL;
}

uint64_t mc_queues_readable(const struct mc_queues *s) { return s->chain.len_out; }
uint64_t mc_queues_writable(const struct mc_queues *s) { return s->chain.len_in; }
void mc_queues_wake(struct mc_queues *s) { signal_fd(s->wake_fd); }
void mc_queues_stop(struct mc_queues *s) { signal_fd(s->stop_fd); }

size_t mc_queues_read(const struct mc_queues *s, uint64_t off, void *buf, size_t len)
{
	return mc_iov_read(s->iov, s->chain.n_out, off, buf, len);
}

size_t mc_queues_write(struct mc_queues *s, const void *buf, size_t len)
{
	size_t n = mc_iov_write(s->iov + s->chain.n_out, s->chain.n_in, s->written, buf, len);

	s->written += n;
	return n;
}

/* The guest's buffers were written, whatever becomes of the request. */
static void mark_written(struct mc_queues *s)
{
	mc_mem_mark_iov(s->current->vq.mem, s->iov + s->chain.n_out, s->chain.n_in, s->written);
}

static void finish(struct mc_queues *s)
{
	struct mc_vq *vq = &s->current->vq;

	mark_written(s);
	mc_vq_tick(vq);
	mc_vq_push(vq, s->chain.head, s->written);	/* fits: a chain has less than 2^32 bytes */
	vq->stats->bytes_in += s->chain.len_out;
	vq->stats->bytes_out += s->written;
}

void mc_queues_done(struct mc_queues *s)
{
	finish(s);
	mc_vq_flush(&s->current->vq);
}

void mc_queues_refuse(struct mc_queues *s)
{
	mark_written(s);
	/* What was answered before it is the guest's; a broken queue publishes nothing any more. */
	mc_vq_flush(&s->current->vq);
	s->current->vq.stats->errors++;
	s->current->vq.error = MC_VQ_BAD_REQUEST;
	signal_fd(s->event_fd);
}

void mc_queues_later(struct mc_queues *s, uint64_t nanoseconds)
{
	struct queue *q = s->current;
	uint64_t now = now_ns();

	mark_written(s);
	mc_vq_flush(&q->vq);
	mc_vq_unpop(&q->vq, 1);
	q->held_until = nanoseconds < UINT64_MAX - now ? now + nanoseconds : UINT64_MAX;
}

/* One request of the device's own function. false: this queue has to wait. */
static bool answer(struct mc_queues *s)
{
	struct mc_chain *c = &s->chain;
	int64_t n = s->handler(s->opaque, s->current - s->q, s->iov, c->n_out, c->n_in);

	if (n == MC_QUEUES_LATER) {
		mc_queues_later(s, UINT64_MAX);
		return false;
	}
	if (n < 0 || (uint64_t)n > c->len_in) {
		mc_queues_refuse(s);
		return false;
	}
	s->written = n;
	finish(s);
	return true;
}

/* Takes a request, and answers up to a BATCH of them itself where it can. true: one is in hand. */
static bool take(struct mc_queues *s, struct queue *q)
{
	struct mc_vq *vq = &q->vq;

	s->current = q;
	for (int i = 0; i < BATCH; i++) {
		int got = mc_vq_pop(vq, &s->chain);

		if (got < 0) {
			signal_fd(s->event_fd);
			return false;
		}
		if (got == 0) {
			mc_vq_flush(vq);
			q->ready = mc_vq_enable_kick(vq);
			return false;
		}
		s->written = 0;
		if (!s->handler)
			return true;
		if (!answer(s))
			return false;
	}
	mc_vq_flush(vq);
	return false;
}

/* May be looked at now; *next becomes the moment at which this has to be asked again, if that is earlier. */
static bool due(struct queue *q, uint64_t *next)
{
	if (!q->attached || !q->ready || q->vq.error)
		return false;
	if (q->held_until == 0)
		return true;
	if (q->held_until != UINT64_MAX && now_ns() >= q->held_until) {
		q->held_until = 0;
		return true;
	}
	if (q->held_until < *next)
		*next = q->held_until;
	return false;
}

static int milliseconds_until(uint64_t moment)
{
	uint64_t now = now_ns();

	if (moment <= now)
		return 0;
	uint64_t ms = (moment - now + 999999) / 1000000;	/* rounded up, or it would spin for the rest */

	return ms < INT_MAX ? (int)ms : INT_MAX;
}

/* Takes in what happened: kicks, a wake, a stop. Waits for it until the moment `until` (UINT64_MAX: for ever). */
static void await(struct mc_queues *s, bool busy, uint64_t until)
{
	struct epoll_event events[MC_QUEUES_MAX + 2];
	int timeout = busy ? 0 : until == UINT64_MAX ? -1 : milliseconds_until(until);
	int n = epoll_wait(s->ep, events, MC_QUEUES_MAX + 2, timeout);	/* -1 is EINTR: the caller comes again */

	for (int i = 0; i < n; i++) {
		uint32_t tag = events[i].data.u32;

		if (tag == TAG_STOP) {
			clear_fd(s->stop_fd);
			s->stopped = true;
		} else if (tag == TAG_WAKE) {
			/* Cleared before the queues are looked at: what is signalled after this finds its own wake. */
			clear_fd(s->wake_fd);
			for (uint32_t k = 0; k < s->n; k++)
				s->q[k].held_until = 0;
		} else {
			struct queue *q = &s->q[tag];

			clear_fd(q->vq.kick_fd);
			mc_vq_kicked(&q->vq);
			q->ready = true;
			mc_vq_disable_kick(&q->vq);
		}
	}
}

int mc_queues_next(struct mc_queues *s)
{
	for (;;) {
		uint64_t next = UINT64_MAX;
		bool busy = false;

		mc_beat(&s->beat);
		for (uint32_t k = 0; k < s->n; k++)
			busy = due(&s->q[k], &next) || busy;
		/* Also when there is enough to do: who never sleeps would never be stopped. */
		await(s, busy, next);
		if (s->stopped)
			break;
		for (uint32_t k = 0; k < s->n; k++) {
			struct queue *q = &s->q[s->turn++ % s->n];

			if (due(q, &next) && take(s, q))
				return q - s->q;
		}
	}
	/* Whoever comes again looks at everything once. */
	s->stopped = false;
	for (uint32_t k = 0; k < s->n; k++) {
		s->q[k].ready = true;
		s->q[k].held_until = 0;
	}
	return MC_QUEUES_STOPPED;
}
