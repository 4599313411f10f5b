/*
 * I/O through preadv and pwritev, one transfer after the other, where io_uring is not allowed. An op is carried out when
 * it is submitted and reported at the next wait. Kicks and the stop signal are edges of an epoll set, so that the
 * eventfds' counters need not be read.
 */
#define _GNU_SOURCE
#include "blk_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

#define POLL_STOP MC_BLK_MAX_QUEUES

struct sync {
	int epoll;
	bool polled[MC_BLK_MAX_QUEUES + 1];
	struct blk_op *head, *tail;	/* carried out, not reported; res is in op->result */
};

static int sync_open(struct mc_blk *b)
{
	struct sync *s = calloc(1, sizeof(*s));

	if (!s)
		return ENOMEM;
	s->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (s->epoll < 0) {
		int err = errno;

		free(s);
		return err;
	}
	b->engine_state = s;
	return 0;
}

static void sync_close(struct mc_blk *b)
{
	struct sync *s = b->engine_state;

	close(s->epoll);
	free(s);
}

static int sync_start(struct mc_blk *b)
{
	struct sync *s = b->engine_state;

	for (unsigned i = 0; i <= POLL_STOP; i++) {
		struct epoll_event ev = {.events = EPOLLIN | EPOLLET, .data.u32 = i};
		int fd = i == POLL_STOP ? b->stop_fd : b->queues[i].vq.kick_fd;

		if (s->polled[i] || (i != POLL_STOP && !b->queues[i].active))
			continue;
		if (epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &ev))
			return errno;
		s->polled[i] = true;
	}
	return 0;
}

static int64_t carry_out(const struct mc_blk *b, const struct blk_op *op)
{
	int fd = b->fds[op->file];
	int64_t n = -1;

	switch (op->kind) {
	case OP_READ:
		n = preadv(fd, op->iov, op->niov, op->off);
		break;
	case OP_WRITE:
		n = pwritev(fd, op->iov, op->niov, op->off);
		break;
	case OP_FSYNC:
		n = fdatasync(fd);
		break;
	case OP_FALLOCATE:
		n = fallocate(fd, op->mode, op->off, op->len);
		break;
	}
	return n < 0 ? -errno : n;
}

static void sync_submit(struct mc_blk *b, struct blk_op *op)
{
	struct sync *s = b->engine_state;

	op->result = carry_out(b, op);
	if (op->req)
		mc_vq_tick(&op->req->q->vq);
	op->next = NULL;
	if (s->tail)
		s->tail->next = op;
	else
		s->head = op;
	s->tail = op;
}

static int sync_wait(struct mc_blk *b, bool block)
{
	struct sync *s = b->engine_state;
	struct epoll_event events[MC_BLK_MAX_QUEUES + 1];
	struct blk_op *op = s->head;
	/* Rounded up, or it would spin for the rest of a millisecond; a delay is at most 2^24 of them. */
	int patience = !block || op ? 0 : b->delayed ? (int)((blk_inject_wait(b) + 999999) / 1000000) : -1;
	int n = epoll_wait(s->epoll, events, MC_BLK_MAX_QUEUES + 1, patience);

	if (n < 0 && errno != EINTR)
		return errno;
	for (int i = 0; i < n; i++) {
		if (events[i].data.u32 != POLL_STOP)
			mc_vq_kicked(&b->queues[events[i].data.u32].vq);
	}
	/* What the reports submit in turn is for the next wait. */
	s->head = s->tail = NULL;
	while (op) {
		struct blk_op *next = op->next;

		blk_ended(b, op, op->result);
		op = next;
	}
	return 0;
}

const struct blk_engine blk_sync = {
	.name = "sync",
	.open = sync_open,
	.close = sync_close,
	.start = sync_start,
	.submit = sync_submit,
	.wait = sync_wait,
};
