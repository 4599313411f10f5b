/*
 * I/O through io_uring. One system call a round: it hands over all new transfers, and waits for completions and kicks
 * alike. Kicks and the stop signal are multishot polls, which report each write to an eventfd; its counter is never read.
 *
 * The ring is made while the process may still do everything, disabled, and enabled by the data thread, which with
 * SINGLE_ISSUER becomes the only one that may submit.
 */
#define _GNU_SOURCE
#include "blk_impl.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ENTRIES 256
#define TAG_POLL 1u		/* of user_data: (index << 1 | 1); ops are aligned pointers */
#define POLL_STOP MC_BLK_MAX_QUEUES

struct uring {
	struct io_uring ring;
	bool disabled, registered;
	bool polled[MC_BLK_MAX_QUEUES + 1];
};

/* A ring makes system calls that no seccomp filter sees. So it is told, while it is disabled and for good, what we use of
 * it: transfers, flushes, polls, and what uring_start() registers. */
static int restrict_ring(struct io_uring *ring)
{
	static const uint8_t sqes[] = {
		IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_FALLOCATE,
		IORING_OP_POLL_ADD,
	};
	static const uint8_t registers[] = {
		IORING_REGISTER_ENABLE_RINGS, IORING_REGISTER_FILES, IORING_REGISTER_RING_FDS, IORING_UNREGISTER_RING_FDS,
	};
	struct io_uring_restriction list[sizeof(sqes) + sizeof(registers) + 1];
	unsigned n = 0;

	memset(list, 0, sizeof(list));
	for (unsigned i = 0; i < sizeof(sqes); i++, n++) {
		list[n].opcode = IORING_RESTRICTION_SQE_OP;
		list[n].sqe_op = sqes[i];
	}
	for (unsigned i = 0; i < sizeof(registers); i++, n++) {
		list[n].opcode = IORING_RESTRICTION_REGISTER_OP;
		list[n].register_op = registers[i];
	}
	list[n].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
	list[n++].sqe_flags = IOSQE_FIXED_FILE;
	/* liburing 2.3 forgot to export io_uring_register_restrictions(), which is this. */
	return syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_RESTRICTIONS, list, n) < 0 ? -errno : 0;
}

static int uring_open(struct mc_blk *b)
{
	/* DEFER_TASKRUN (6.1): completions are worked off when we wait, and not by interrupting us. */
	static const unsigned flags[] = {
		IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
		IORING_SETUP_R_DISABLED | IORING_SETUP_COOP_TASKRUN,
		IORING_SETUP_R_DISABLED,
	};
	struct uring *u = calloc(1, sizeof(*u));
	int ret = -ENOMEM;

	for (unsigned i = 0; u && i < sizeof(flags) / sizeof(*flags); i++) {
		struct io_uring_params params = {.flags = flags[i] | IORING_SETUP_CQSIZE, .cq_entries = 2 * BLK_MAX_INFLIGHT};

		ret = io_uring_queue_init_params(ENTRIES, &u->ring, &params);
		if (ret == -EINVAL)
			continue;
		if (ret)
			break;
		/* Linux 5.13, when multishot poll came. */
		if (!(params.features & IORING_FEAT_RSRC_TAGS)) {
			io_uring_queue_exit(&u->ring);
			ret = -ENOSYS;
			break;
		}
		ret = restrict_ring(&u->ring);
		if (ret) {
			io_uring_queue_exit(&u->ring);
			break;
		}
		u->disabled = true;
		b->engine_state = u;
		return 0;
	}
	free(u);
	return -ret;
}

static void uring_close(struct mc_blk *b)
{
	struct uring *u = b->engine_state;

	io_uring_queue_exit(&u->ring);
	free(u);
}

/* Never NULL: what is queued goes to the kernel first, which takes it all, or says why not at the next wait. */
static struct io_uring_sqe *get_sqe(struct uring *u)
{
	struct io_uring_sqe *sqe;

	while (!(sqe = io_uring_get_sqe(&u->ring)))
		io_uring_submit(&u->ring);
	return sqe;
}

static void poll_fd(struct uring *u, int fd, unsigned index)
{
	struct io_uring_sqe *sqe = get_sqe(u);

	io_uring_prep_poll_multishot(sqe, fd, POLLIN);
	io_uring_sqe_set_data64(sqe, (uint64_t)index << 1 | TAG_POLL);
	u->polled[index] = true;
}

static int poll_index_fd(struct mc_blk *b, unsigned index)
{
	return index == POLL_STOP ? b->stop_fd : b->queues[index].vq.kick_fd;
}

static int uring_start(struct mc_blk *b)
{
	struct uring *u = b->engine_state;

	if (u->disabled) {
		/* liburing 2.3 forgot to export io_uring_enable_rings(), which is this. */
		if (syscall(SYS_io_uring_register, u->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0)
			return errno;
		u->disabled = false;
		/* Spares a reference count each; works without. */
		u->registered = io_uring_register_files(&u->ring, b->fds, b->files) == 0;
		io_uring_register_ring_fd(&u->ring);
	}
	for (unsigned i = 0; i <= POLL_STOP; i++) {
		if ((i == POLL_STOP || b->queues[i].active) && !u->polled[i])
			poll_fd(u, poll_index_fd(b, i), i);
	}
	return 0;
}

static void uring_submit(struct mc_blk *b, struct blk_op *op)
{
	struct uring *u = b->engine_state;
	struct io_uring_sqe *sqe = get_sqe(u);
	int fd = u->registered ? (int)op->file : b->fds[op->file];

	switch (op->kind) {
	case OP_READ:
		if (op->niov == 1)
			io_uring_prep_read(sqe, fd, op->iov->iov_base, op->iov->iov_len, op->off);
		else
			io_uring_prep_readv(sqe, fd, op->iov, op->niov, op->off);
		break;
	case OP_WRITE:
		if (op->niov == 1)
			io_uring_prep_write(sqe, fd, op->iov->iov_base, op->iov->iov_len, op->off);
		else
			io_uring_prep_writev(sqe, fd, op->iov, op->niov, op->off);
		break;
	case OP_FSYNC:
		io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
		break;
	case OP_FALLOCATE:
		io_uring_prep_fallocate(sqe, fd, op->mode, op->off, op->len);
		break;
	}
	if (u->registered)
		sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, op);
}

static int polled(struct mc_blk *b, struct uring *u, unsigned index, int res, unsigned flags)
{
	if (res < 0 && res != -ECANCELED)
		return -res;
	if (index != POLL_STOP)
		mc_vq_kicked(&b->queues[index].vq);
	/* The kernel ended the multishot poll, for want of room in the completion queue. */
	if (!(flags & IORING_CQE_F_MORE))
		poll_fd(u, poll_index_fd(b, index), index);
	return 0;
}

static int uring_wait(struct mc_blk *b, bool block)
{
	struct uring *u = b->engine_state;
	struct io_uring_cqe *cqe;
	unsigned head, n = 0;
	int err = 0, ret;

	if (!block) {
		ret = io_uring_submit_and_get_events(&u->ring);
	} else if (!b->delayed) {
		ret = io_uring_submit_and_wait(&u->ring, 1);
	} else {
		uint64_t ns = blk_inject_wait(b);
		struct __kernel_timespec ts = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};

		ret = io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &ts, NULL);
		if (ret == -ETIME)
			ret = 0;
	}

	/* EAGAIN and EBUSY: no room for completions, or no memory for requests, until some are taken. */
	if (ret < 0 && ret != -EINTR && ret != -EAGAIN && ret != -EBUSY)
		return -ret;
	io_uring_for_each_cqe(&u->ring, head, cqe) {
		uint64_t data = cqe->user_data;
		int res = cqe->res;
		unsigned flags = cqe->flags;

		n++;
		if (data & TAG_POLL) {
			ret = polled(b, u, data >> 1, res, flags);
			err = err ? err : ret;
		} else {
			struct blk_op *op = (struct blk_op *)(uintptr_t)data;

			blk_ended(b, op, res);
		}
	}
	io_uring_cq_advance(&u->ring, n);
	return err;
}

const struct blk_engine blk_uring = {
	.name = "io_uring",
	.open = uring_open,
	.close = uring_close,
	.start = uring_start,
	.submit = uring_submit,
	.wait = uring_wait,
};
