/*
 * passt's wire (passt(1), as QEMU's -netdev stream speaks it): each frame behind its length, 32 bits in network order,
 * on a byte stream. Neither reads nor writes keep to the frames' borders, so what the socket took of a frame must be
 * followed by the rest of it, and what it gave is reassembled. No virtio header travels, so no offloads are offered.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "net_impl.h"

#define LEN 4u

int net_stream_init(struct net_stream *s, void *keep)
{
	s->own = keep ? NULL : calloc(1, NET_STREAM_KEEP);
	if (!keep && !s->own)
		return -ENOMEM;
	s->at = keep ? keep : s->own;
	s->in = (uint8_t *)s->at + sizeof(*s->at);
	s->out = s->in + NET_STREAM_IN;
	/* What a predecessor left: where it stood between two frames, or parts of them, unless it was killed in the middle
	 * of a step. Then the supervisor has started another passt, and cleared this. */
	if (s->at->in_last > NET_STREAM_IN || s->at->in_first > s->at->in_last || s->at->out_last > NET_ROOM ||
	    s->at->out_first > s->at->out_last || s->at->busy)
		return -EPROTO;
	return 0;
}

void net_stream_deinit(struct net_stream *s)
{
	free(s->own);
}

/* Between these two a successor could not know where in the stream it is. */
static void begin_step(struct net_stream *s)
{
	s->at->busy = 1;
	mc_in_order();
}

static void end_step(struct net_stream *s)
{
	mc_in_order();
	s->at->busy = 0;
}

/* 1: there are bytes; 0: none for now; -1: the stream ended, or broke the rules (*error, or 0). */
static int stream_fill(struct net_stream *s, int fd, int *error)
{
	ssize_t n;

	begin_step(s);
	if (s->at->in_first) {
		memmove(s->in, s->in + s->at->in_first, s->at->in_last - s->at->in_first);
		s->at->in_last -= s->at->in_first;
		s->at->in_first = 0;
	}
	do {
		n = recv(fd, s->in + s->at->in_last, NET_STREAM_IN - s->at->in_last, MSG_DONTWAIT);
	} while (n < 0 && errno == EINTR);
	int failed = errno;

	if (n > 0)
		s->at->in_last += (uint32_t)n;
	end_step(s);
	if (n > 0)
		return 1;
	errno = failed;
	if (n < 0 && errno == EAGAIN)
		return 0;
	*error = n ? errno : ECONNRESET;
	return -1;
}

uint32_t net_stream_peek(const struct net_stream *s, uint32_t *at, const uint8_t **frame)
{
	uint32_t have = s->at->in_last - s->at->in_first - *at, len;

	if (have < LEN)
		return 0;
	memcpy(&len, s->in + s->at->in_first + *at, LEN);
	len = ntohl(len);
	if (len > MC_NET_MAX_FRAME || have < LEN + len)
		return 0;
	*frame = s->in + s->at->in_first + *at + LEN;
	*at += LEN + len;
	return len;
}

enum rx_state net_stream_rx(struct mc_net *net, struct net_pair *p)
{
	struct net_stream *s = &net->stream;

	for (int i = 0; i < NET_BATCH;) {
		uint32_t have = s->at->in_last - s->at->in_first, len = 0;

		if (have >= LEN) {
			memcpy(&len, s->in + s->at->in_first, LEN);
			len = ntohl(len);
			if (len > MC_NET_MAX_FRAME) {
				/* The borders are lost: nothing that follows can be understood. */
				net_backend_lost(net, EPROTO);
				return RX_OFF;
			}
		}
		if (have < LEN || have < LEN + len) {
			int error, r = stream_fill(s, p->fd, &error);

			if (r == 0)
				return RX_POLL;
			if (r < 0) {
				net_backend_lost(net, error);
				return RX_OFF;
			}
			continue;
		}
		if (len < MC_NET_MIN_FRAME) {
			net->counters.rx_dropped_header++;
		} else if (!net_drops(net, &net->drop_rx)) {
			struct virtio_net_hdr_v1 hdr = {0};
			struct iovec src = {s->in + s->at->in_first + LEN, len};

			if (net_rx_copy(net, p, &hdr, &src, 1) == RX_NO_BUFFERS)
				return RX_STARVED;
		}
		s->at->in_first += LEN + len;
		i++;
	}
	return RX_READY;
}

/* The rest of the frame that was sent in part. 1: sent; 0: not yet; -1: never (*error). */
static int stream_drain(struct net_stream *s, int fd, int *error)
{
	while (s->at->out_first < s->at->out_last) {
		begin_step(s);
		ssize_t n = send(fd, s->out + s->at->out_first, s->at->out_last - s->at->out_first, MSG_DONTWAIT | MSG_NOSIGNAL);
		int failed = errno;

		if (n > 0)
			s->at->out_first += (uint32_t)n;
		end_step(s);
		if (n < 0 && failed == EINTR)
			continue;
		if (n < 0) {
			*error = failed;
			return failed == EAGAIN ? 0 : -1;
		}
	}
	return 1;
}

struct stream_batch {
	struct { uint16_t head; bool send; uint32_t iov, n, len; uint32_t prefix; } frames[NET_BATCH];
	int n;
	uint32_t iovs;
};

/* Pops what one sendmsg() can take. */
static void stream_gather(struct mc_net *net, struct net_pair *p, struct stream_batch *b)
{
	b->n = 0;
	b->iovs = 0;
	while (b->n < NET_BATCH && b->iovs + 1 + MC_MAX_QUEUE_SIZE <= TX_IOV) {
		struct mc_chain c = {.max = MC_MAX_QUEUE_SIZE, .iov = net->tx_iov + b->iovs + 1};
		struct tx_frame f = {0};

		if (mc_vq_pop(&p->tx, &c) <= 0)
			return;
		bool send = net_tx_parse(net, &c, &f);
		if (send && b->iovs + f.n > MC_NET_IOV_MAX) {
			mc_vq_unpop(&p->tx, 1);
			return;
		}
		b->frames[b->n].head = c.head;
		b->frames[b->n].send = send;
		if (send) {
			b->frames[b->n].prefix = htonl(f.len);
			f.iov[0] = (struct iovec){&b->frames[b->n].prefix, LEN};
			memmove(net->tx_iov + b->iovs, f.iov, sizeof(*f.iov) * f.n);
			b->frames[b->n].iov = b->iovs;
			b->frames[b->n].n = f.n;
			b->frames[b->n].len = f.len;
			b->iovs += f.n;
		}
		b->n++;
		if (send && c.n_out >= MC_NET_IOV_MAX)
			return;		/* it may lie in the one bounce buffer */
	}
}

/* `sent` bytes of the batch are on their way: completes those frames, keeps the rest of the one cut in two, and gives
 * the others back to the ring. True: the whole batch went. */
static bool stream_settle(struct mc_net *net, struct net_pair *p, struct stream_batch *b, size_t sent)
{
	struct net_stream *s = &net->stream;

	for (int i = 0; i < b->n; i++) {
		struct iovec *iov = net->tx_iov + b->frames[i].iov;
		uint32_t len = LEN + b->frames[i].len;

		if (!b->frames[i].send) {
			net_tx_bad(net, p);
			mc_vq_push(&p->tx, b->frames[i].head, 0);
			continue;
		}
		if (!sent) {
			mc_vq_unpop(&p->tx, (uint16_t)(b->n - i));
			return false;
		}
		net_capture(net, iov + 1, b->frames[i].n - 1, 0, b->frames[i].len);
		if (sent < len) {
			s->at->out_first = 0;
			s->at->out_last = (uint32_t)mc_iov_read(iov, b->frames[i].n, sent, s->out, len - sent);
			sent = 0;
		} else {
			sent -= len;
		}
		p->tx.stats->bytes_in += b->frames[i].len;
		net->counters.tx_packets++;
		mc_vq_push(&p->tx, b->frames[i].head, 0);
	}
	return s->at->out_first == s->at->out_last;
}

enum tx_state net_stream_tx(struct mc_net *net, struct net_pair *p)
{
	struct stream_batch b;
	int error, r = stream_drain(&net->stream, p->fd, &error);
	ssize_t n = 0;

	if (r == 0)
		return TX_BLOCKED;
	if (r < 0) {
		net_backend_lost(net, error);
		return TX_READY;
	}
	stream_gather(net, p, &b);
	if (!b.n)
		return TX_KICK;
	if (b.iovs) {
		struct msghdr msg = {.msg_iov = net->tx_iov, .msg_iovlen = b.iovs};

		begin_step(&net->stream);
		do {
			n = sendmsg(p->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
		} while (n < 0 && errno == EINTR);
	}
	if (n < 0 && errno != EAGAIN) {
		mc_vq_unpop(&p->tx, (uint16_t)b.n);
		net_backend_lost(net, errno);
		end_step(&net->stream);
		return TX_READY;
	}
	bool all = stream_settle(net, p, &b, n < 0 ? 0 : (size_t)n);

	end_step(&net->stream);
	if (!all) {
		net->counters.tx_blocked++;
		return TX_BLOCKED;
	}
	return TX_READY;
}
