/*
 * virtio-console (virtio 1.2, section 5.3) with one port: receiveq 0 takes the staged input, transmitq 1 is the
 * guest's output.
 */
#include "serial.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

static void broken(struct mc_serial *s, struct mc_vq *vq, int error)
{
	if (!vq->error)
		vq->error = error;
	mc_serial_notice(s, MC_SERIAL_QUEUE_BROKEN);
}

/* Appends a piece of the chain in hand. true: all of it has been taken. */
static bool take_chain(struct mc_serial *s, uint64_t *budget)
{
	struct mc_console *c = &s->con;

	while (*budget && c->chain_i < c->chain.n_out) {
		const struct iovec *v = &c->chain.iov[c->chain_i];
		uint64_t n = v->iov_len - c->chain_off;

		if (n > *budget)
			n = *budget;
		/* The bytes may change under the copy, which is the guest's own loss. */
		mc_scroll_append(&s->scroll, (const uint8_t *)v->iov_base + c->chain_off, n);
		c->tx.stats->bytes_in += n;
		*budget -= n;
		c->chain_off += n;
		if (c->chain_off == v->iov_len) {
			c->chain_i++;
			c->chain_off = 0;
		}
	}
	return c->chain_i == c->chain.n_out;
}

/* A chain is in hand: from its beginning, or from where our predecessor was in it. */
static void begin_chain(struct mc_serial *s)
{
	struct mc_console *c = &s->con;
	const struct mc_inflight *r = c->tx.inflight;
	uint64_t skip = 0;

	c->chain_held = true;
	c->chain_i = 0;
	c->chain_off = 0;
	if (r) {
		uint64_t counter = r->desc[c->chain.head].counter + 1;	/* 0 is nobody's */

		if (s->keep->chain == counter && s->keep->chain_at <= s->scroll.end) {
			skip = s->scroll.end - s->keep->chain_at;
		} else {
			/* In this order: killed in between, none of it is skipped, and none of it was taken. */
			s->keep->chain = 0;
			mc_in_order();
			s->keep->chain_at = s->scroll.end;
			mc_in_order();
			s->keep->chain = counter;
		}
	}
	while (c->chain_i < c->chain.n_out && skip >= c->chain.iov[c->chain_i].iov_len)
		skip -= c->chain.iov[c->chain_i++].iov_len;
	if (c->chain_i < c->chain.n_out)
		c->chain_off = skip;
}

static uint64_t output(struct mc_serial *s, bool *more)
{
	struct mc_console *c = &s->con;
	uint64_t budget = MC_SERIAL_BATCH;

	*more = false;
	if (!c->attached || !c->tx.size || c->tx.error)
		return 0;
	/* Of the queue that is not looked at before somebody types. */
	if (c->rx.size && !c->rx.error)
		mc_vq_go_on(&c->rx);
	mc_vq_disable_kick(&c->tx);
	/* The chains count too, so that a driver that sends empty ones cannot keep the loop to itself. */
	for (int chains = 0; budget && chains < 2 * MC_MAX_QUEUE_SIZE; chains++) {
		if (!c->chain_held) {
			int got = mc_vq_pop(&c->tx, &c->chain);
			if (got == 0)
				break;
			if (got < 0 || c->chain.n_out == 0) {
				broken(s, &c->tx, MC_VQ_BAD_REQUEST);
				break;
			}
			begin_chain(s);
		}
		if (!take_chain(s, &budget))
			break;
		c->chain_held = false;
		mc_vq_tick(&c->tx);
		mc_vq_push(&c->tx, c->chain.head, 0);
	}
	mc_vq_flush(&c->tx);
	*more = !c->tx.error && (c->chain_held || budget == 0 || mc_vq_enable_kick(&c->tx));
	return MC_SERIAL_BATCH - budget;
}

static uint32_t input(struct mc_serial *s, const uint8_t *data, uint32_t len)
{
	struct mc_console *c = &s->con;
	struct mc_chain chain = {.iov = c->rx_iov, .max = MC_MAX_QUEUE_SIZE};
	uint32_t done = 0;

	if (!c->attached || !c->rx.size || c->rx.error)
		return 0;
	mc_vq_disable_kick(&c->rx);
	while (done < len) {
		int got = mc_vq_pop(&c->rx, &chain);

		if (got == 0) {
			if (mc_vq_enable_kick(&c->rx))
				continue;
			break;
		}
		if (got < 0 || chain.n_in == 0) {
			broken(s, &c->rx, MC_VQ_BAD_REQUEST);
			break;
		}
		size_t n = mc_iov_write(chain.iov + chain.n_out, chain.n_in, 0, data + done, len - done);

		mc_mem_mark_iov(c->rx.mem, chain.iov + chain.n_out, chain.n_in, n);
		mc_vq_tick(&c->rx);
		mc_vq_push(&c->rx, chain.head, n);
		c->rx.stats->bytes_out += n;
		done += n;
	}
	mc_vq_flush(&c->rx);
	return done;
}

static bool may_sleep(struct mc_serial *s)
{
	/* output() has asked for kicks when it said that there is no more, and input() when it left something. */
	return true;
}

static bool settle(struct mc_serial *s)
{
	struct mc_console *c = &s->con;
	uint64_t budget = MC_SERIAL_BATCH;

	if (!c->chain_held || !take_chain(s, &budget))
		return c->chain_held;
	c->chain_held = false;
	mc_vq_push(&c->tx, c->chain.head, 0);
	mc_vq_flush(&c->tx);
	return false;
}

static uint32_t pending(struct mc_serial *s, uint8_t data[MC_UART_RX_SIZE])
{
	/* Whatever input() took is in the guest's buffers. */
	return 0;
}

static void forget(struct mc_serial *s)
{
}

const struct mc_front mc_console_front = {
	.output = output, .input = input, .may_sleep = may_sleep, .settle = settle, .pending = pending, .forget = forget,
};

static void attach_one(struct mc_serial *s, struct mc_vq *vq, const struct mc_vq *from, uint64_t tag)
{
	memset(vq, 0, sizeof(*vq));
	if (from)
		*vq = *from;
	if (!from || vq->error)
		return;
	if (mc_epoll_set(s->ep, EPOLL_CTL_ADD, vq->kick_fd, EPOLLIN, tag))
		broken(s, vq, MC_VQ_BAD_RING);
}

void mc_console_attach(struct mc_serial *s, const struct mc_vq *rx, const struct mc_vq *tx)
{
	struct mc_console *c = &s->con;

	c->chain = (struct mc_chain){.iov = c->tx_iov, .max = MC_MAX_QUEUE_SIZE};
	c->chain_held = false;
	/* Another driver's chains have the same numbers. */
	if (!tx || !tx->recovered)
		s->keep->chain = 0;
	attach_one(s, &c->rx, rx, MC_TAG_KICK_RX);
	attach_one(s, &c->tx, tx, MC_TAG_KICK_TX);
	c->attached = true;
}

void mc_console_detach(struct mc_serial *s)
{
	struct mc_console *c = &s->con;

	if (!c->attached)
		return;
	/* A queue that was never ready has size 0; the descriptor of a broken one may be watched still. */
	if (c->rx.size)
		mc_epoll_set(s->ep, EPOLL_CTL_DEL, c->rx.kick_fd, 0, 0);
	if (c->tx.size)
		mc_epoll_set(s->ep, EPOLL_CTL_DEL, c->tx.kick_fd, 0, 0);
	c->rx = (struct mc_vq){0};
	c->tx = (struct mc_vq){0};
	c->attached = false;
	c->chain_held = false;
}
