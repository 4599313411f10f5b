/* Passing on a vhost-user backend's interrupts (vhost.h). The account of who has what is vhost_heads.c. */
#define _GNU_SOURCE
#include "vhost_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { TAG_STOP = 2 * MC_VHOST_MAX_QUEUES, TAG_WAKE, TAG_CONNECTION };

static void signal_fd(int fd)
{
	const uint64_t one = 1;
	/* EAGAIN: it is signalled already. */
	ssize_t n = write(fd, &one, sizeof(one));
	(void)n;
}

static bool clear_fd(int fd)
{
	uint64_t count;
	/* EAGAIN: it was not signalled. */
	return read(fd, &count, sizeof(count)) == sizeof(count);
}

static int watch(struct mc_vhost *s, int fd, uint32_t tag)
{
	struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.u32 = tag};

	return epoll_ctl(s->ep, EPOLL_CTL_ADD, fd, &e) ? errno : 0;
}

struct mc_vhost *mc_vhost_new(uint32_t n)
{
	if (n == 0 || n > MC_VHOST_MAX_QUEUES) {
		errno = EINVAL;
		return NULL;
	}
	struct mc_vhost *s = calloc(1, sizeof(*s) + n * sizeof(s->q[0]));

	if (!s)
		return NULL;
	s->n = n;
	s->watched[0] = s->watched[1] = -1;
	s->ep = epoll_create1(EPOLL_CLOEXEC);
	s->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	bool failed = s->ep < 0 || s->stop_fd < 0 || s->wake_fd < 0 || watch(s, s->stop_fd, TAG_STOP) ||
		      watch(s, s->wake_fd, TAG_WAKE);

	for (uint32_t i = 0; i < n; i++) {
		struct queue *q = &s->q[i];

		q->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		q->error_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		failed = failed || q->call_fd < 0 || q->error_fd < 0 || watch(s, q->call_fd, 2 * i) ||
			 watch(s, q->error_fd, 2 * i + 1);
	}
	if (failed) {
		int error = errno;

		mc_vhost_free(s);
		errno = error;
		return NULL;
	}
	return s;
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

void mc_vhost_free(struct mc_vhost *s)
{
	for (uint32_t i = 0; i < s->n; i++) {
		close_fd(s->q[i].call_fd);
		close_fd(s->q[i].error_fd);
	}
	close_fd(s->ep);
	close_fd(s->stop_fd);
	close_fd(s->wake_fd);
	free(s);
}

int mc_vhost_attach(struct mc_vhost *s, uint32_t index, const struct mc_vq *vq, void *account, bool again)
{
	if (index >= s->n)
		return EINVAL;
	struct queue *q = &s->q[index];

	if (q->attached)
		return EBUSY;
	q->vq = *vq;
	q->attached = true;
	q->account = account ? account : &q->own;
	if (!again)
		memset(q->account, 0, sizeof(*q->account));
	return 0;
}

void mc_vhost_detach(struct mc_vhost *s)
{
	for (uint32_t i = 0; i < s->n; i++) {
		struct queue *q = &s->q[i];

		q->attached = false;
		q->vq = (struct mc_vq){0};
		clear_fd(q->call_fd);
		clear_fd(q->error_fd);
	}
}

const struct mc_vq *mc_vhost_at(const struct mc_vhost *s, uint32_t index) { return index < s->n ? &s->q[index].vq : NULL; }
int mc_vhost_call_fd(const struct mc_vhost *s, uint32_t index) { return index < s->n ? s->q[index].call_fd : -1; }
int mc_vhost_error_fd(const struct mc_vhost *s, uint32_t index) { return index < s->n ? s->q[index].error_fd : -1; }

int mc_vhost_watch(struct mc_vhost *s, uint32_t which, int fd)
{
	if (which > 1)
		return EINVAL;
	if (s->watched[which] >= 0)
		epoll_ctl(s->ep, EPOLL_CTL_DEL, s->watched[which], NULL);
	s->watched[which] = -1;
	if (fd < 0)
		return 0;
	int error = watch(s, fd, TAG_CONNECTION);

	if (!error)
		s->watched[which] = fd;
	return error;
}

/* The backend says that it has used buffers, or may have: libvhost-user signals each eventfd that it is given once, to be
 * sure. Without a used buffer that has not been announced there is no interrupt. Its write of used.idx is before its write
 * to the eventfd, which our read of that has seen; mc_vq_interrupt() sets InterruptStatus behind it. */
static void called(struct queue *q)
{
	clear_fd(q->call_fd);
	if (!q->attached || q->vq.error)
		return;
	uint16_t before = q->account->used_seen;

	mc_vhost_heads_look(q);
	if (q->account->used_seen != before)
		mc_vq_interrupt(&q->vq);
}

static bool gave_up(struct queue *q)
{
	if (!clear_fd(q->error_fd) || !q->attached || q->vq.error)
		return false;
	q->vq.error = MC_VQ_BAD_REQUEST;
	q->vq.stats->errors++;
	return true;
}

enum mc_vhost_event mc_vhost_next(struct mc_vhost *s, int milliseconds)
{
	struct epoll_event events[MC_VHOST_MAX_QUEUES];

	for (;;) {
		int n = epoll_wait(s->ep, events, MC_VHOST_MAX_QUEUES, milliseconds);
		bool stopped = false, woken = false, connection = false, broken = false;

		if (n == 0)
			return MC_VHOST_TIMEOUT;
		for (int i = 0; i < n; i++) {	/* -1 is EINTR */
			uint32_t tag = events[i].data.u32;

			if (tag == TAG_STOP)
				stopped = clear_fd(s->stop_fd) || stopped;
			else if (tag == TAG_WAKE)
				woken = clear_fd(s->wake_fd) || woken;
			else if (tag == TAG_CONNECTION)
				connection = true;	/* level-triggered: it stays so until somebody has read it */
			else if (tag & 1)
				broken = gave_up(&s->q[tag / 2]) || broken;
			else
				called(&s->q[tag / 2]);
		}
		/* Who is asked to stop looks at everything again when it goes on. */
		if (stopped)
			return MC_VHOST_STOPPED;
		if (connection)
			return MC_VHOST_CONNECTION;
		if (broken)
			return MC_VHOST_BROKEN;
		if (woken)
			return MC_VHOST_WOKEN;
	}
}

void mc_vhost_flush(struct mc_vhost *s)
{
	/* Also without a call: the driver wanted none, or the backend had no chance. */
	for (uint32_t i = 0; i < s->n; i++)
		called(&s->q[i]);
}

void mc_vhost_interrupt_all(struct mc_vhost *s)
{
	for (uint32_t i = 0; i < s->n; i++) {
		if (s->q[i].attached && !s->q[i].vq.error)
			mc_vq_interrupt(&s->q[i].vq);
	}
}

void mc_vhost_wake(struct mc_vhost *s) { signal_fd(s->wake_fd); }
void mc_vhost_stop(struct mc_vhost *s) { signal_fd(s->stop_fd); }
