/*
 * Backend to guest. A tap or a link hands out one frame a read and does not tell its size before, so the read goes
 * straight into as many guest buffers as the last frames needed, with a bounce buffer behind them for the rest. What the
 * guest has no room for waits in the bounce buffer; the backend is not polled until the guest kicks.
 *
 * What is written into guest buffers is marked in the dirty log, also where it is a frame that the guest never gets.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "net_impl.h"

#define WANT_MIN 2048u

/* Pops chains until there are `want` bytes. True: only more buffers from the guest could give more room. */
static bool rx_topup(struct net_pair *p, uint64_t want)
{
	struct mc_chain c = {.max = MC_MAX_QUEUE_SIZE};

	while (p->room < want) {
		if (p->buf_count == p->rx.size)
			return false;
		if (p->iov_first + p->iov_count + MC_MAX_QUEUE_SIZE > RX_IOV) {
			memmove(p->iov, p->iov + p->iov_first, sizeof(*p->iov) * p->iov_count);
			p->iov_first = 0;
			if (p->iov_count + MC_MAX_QUEUE_SIZE > RX_IOV)
				return false;
		}
		c.iov = p->iov + p->iov_first + p->iov_count;
		if (mc_vq_pop(&p->rx, &c) <= 0)
			return true;
		/* 5.1.6.3.1: each buffer has room for the header. A readable part in front of it means nothing here. */
		if (c.len_in < MC_NET_HDR) {
			p->rx.error = MC_VQ_BAD_REQUEST;
			return true;
		}
		if (c.n_out)
			memmove(c.iov, c.iov + c.n_out, sizeof(*c.iov) * c.n_in);
		p->bufs[(p->buf_first + p->buf_count++) % MC_MAX_QUEUE_SIZE] =
			(struct rx_buf){.head = c.head, .n = c.n_in, .len = (uint32_t)c.len_in};
		p->iov_count += c.n_in;
		p->room += c.len_in;
	}
	return false;
}

void net_rx_give_back(struct net_pair *p)
{
	if (!p->rx.error)
		mc_vq_unpop(&p->rx, p->buf_count);
	p->buf_first = p->buf_count = 0;
	p->iov_first = p->iov_count = 0;
	p->room = 0;
}

/* The frame of `len` bytes lies behind room for its header in the oldest buffers: header, used entries. */
static void rx_finish(struct mc_net *net, struct net_pair *p, struct virtio_net_hdr_v1 *hdr, uint32_t len)
{
	uint32_t left = MC_NET_HDR + len, seen = 0;
	uint16_t n = 0;

	while (seen < left)
		seen += p->bufs[(p->buf_first + n++) % MC_MAX_QUEUE_SIZE].len;
	/* 5.1.6.4.1: no flags without GUEST_CSUM, and num_buffers is 1 without MRG_RXBUF. */
	if (!(net->features & BIT(VIRTIO_NET_F_GUEST_CSUM)))
		hdr->flags = 0;
	hdr->num_buffers = n;
	mc_iov_write(p->iov + p->iov_first, p->iov_count, 0, hdr, MC_NET_HDR);
	mc_mem_mark_iov(net->mem, p->iov + p->iov_first, p->iov_count, MC_NET_HDR + len);
	net_capture(net, p->iov + p->iov_first, p->iov_count, MC_NET_HDR, len);
	mc_vq_tick(&p->rx);
	while (n--) {
		struct rx_buf *b = &p->bufs[p->buf_first];
		uint32_t part = b->len < left ? b->len : left;

		mc_vq_push(&p->rx, b->head, part);
		left -= part;
		p->room -= b->len;
		p->iov_first += b->n;
		p->iov_count -= b->n;
		p->buf_first = (p->buf_first + 1) % MC_MAX_QUEUE_SIZE;
		p->buf_count--;
	}
	p->rx.stats->bytes_out += len;
	net->counters.rx_packets++;
}

enum rx_copy net_rx_copy(struct mc_net *net, struct net_pair *p, struct virtio_net_hdr_v1 *hdr, const struct iovec *src,
			 uint32_t n)
{
	uint32_t len = 0;
	size_t at = MC_NET_HDR;
	bool empty;

	for (uint32_t i = 0; i < n; i++)
		len += (uint32_t)src[i].iov_len;
	empty = rx_topup(p, net->mrg ? MC_NET_HDR + len : 1);
	if (p->rx.error)
		return RX_NO_BUFFERS;
	if (net->mrg ? p->room < MC_NET_HDR + len : !p->buf_count) {
		/* With every buffer that the queue can hold in hand, waiting for more would be for ever. */
		if (empty && p->buf_count < p->rx.size)
			return RX_NO_BUFFERS;
		net->counters.rx_dropped_oversize++;
		return RX_DROPPED;
	}
	if (!net->mrg && p->bufs[p->buf_first].len < MC_NET_HDR + len) {
		net->counters.rx_dropped_oversize++;
		return RX_DROPPED;
	}
	for (uint32_t i = 0; i < n; i++)
		at += mc_iov_write(p->iov + p->iov_first, p->iov_count, at, src[i].iov_base, src[i].iov_len);
	rx_finish(net, p, hdr, len);
	return RX_COPIED;
}

bool net_rx_acceptable(uint64_t offloads, const struct virtio_net_hdr_v1 *hdr)
{
	uint64_t need = 0;

	if (hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)
		need |= BIT(VIRTIO_NET_F_GUEST_CSUM);
	switch (hdr->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
	case VIRTIO_NET_HDR_GSO_NONE: break;
	case VIRTIO_NET_HDR_GSO_TCPV4: need |= BIT(VIRTIO_NET_F_GUEST_TSO4); break;
	case VIRTIO_NET_HDR_GSO_TCPV6: need |= BIT(VIRTIO_NET_F_GUEST_TSO6); break;
	default: need |= BIT(VIRTIO_NET_F_GUEST_UFO);
	}
	if (hdr->gso_type & VIRTIO_NET_HDR_GSO_ECN)
		need |= BIT(VIRTIO_NET_F_GUEST_ECN);
	return (offloads & need) == need;
}

/* Turns the frame in the bounce buffer, which waits to be copied, into what the guest accepts. False: it cannot be. */
static bool rx_stash(struct mc_net *net, struct net_pair *p, struct virtio_net_hdr_v1 *hdr, uint32_t len)
{
	p->stash_gso = false;
	if (!net_rx_acceptable(net->offloads, hdr)) {
		if (hdr->gso_type != VIRTIO_NET_HDR_GSO_NONE) {
			if (!net_gso_init(&p->gso, hdr, p->bounce, len))
				return false;
			p->stash_gso = true;
			net->counters.segmented++;
		} else if (!net_csum_complete(p->bounce, len, hdr->csum_start, hdr->csum_offset)) {
			return false;
		}
		memset(hdr, 0, sizeof(*hdr));
	}
	p->stash_hdr = *hdr;
	p->stash_len = len;
	return true;
}

/* False: still no room for it. */
static bool rx_unstash(struct mc_net *net, struct net_pair *p)
{
	struct virtio_net_hdr_v1 hdr = p->stash_hdr;

	if (!p->stash_len)
		return true;
	if (p->stash_gso) {
		const uint8_t *data;
		uint32_t n;

		while (net_gso_next(&p->gso, &data, &n)) {
			struct iovec src[] = {{p->gso.hdr, p->gso.hdr_len}, {(void *)(uintptr_t)data, n}};

			hdr = p->stash_hdr;
			if (net_rx_copy(net, p, &hdr, src, 2) == RX_NO_BUFFERS)
				return false;
			net_gso_advance(&p->gso);
		}
	} else {
		struct iovec src = {p->bounce, p->stash_len};

		if (net_rx_copy(net, p, &hdr, &src, 1) == RX_NO_BUFFERS)
			return false;
	}
	p->stash_len = 0;
	return true;
}

/* One message: the header to *hdr, the frame into *direct bytes of guest buffers and then the bounce buffer. */
static ssize_t rx_read(struct mc_net *net, struct net_pair *p, struct virtio_net_hdr_v1 *hdr, size_t *direct)
{
	uint32_t limit = net->mrg ? p->iov_count : p->bufs[p->buf_first].n;
	size_t skip = MC_NET_HDR;
	struct iovec *iov = net->rx_iov;
	uint32_t n = 1;

	iov[0] = (struct iovec){hdr, MC_NET_HDR};
	*direct = 0;
	for (uint32_t i = 0; i < limit && n < MC_NET_IOV_MAX - 1 && *direct < p->want; i++) {
		struct iovec part = p->iov[p->iov_first + i];

		if (skip >= part.iov_len) {
			skip -= part.iov_len;
			continue;
		}
		part.iov_base = (uint8_t *)part.iov_base + skip;
		part.iov_len -= skip;
		skip = 0;
		*direct += part.iov_len;
		iov[n++] = part;
	}
	iov[n++] = (struct iovec){p->bounce, NET_ROOM};
	if (net->backend == MC_NET_LINK) {
		struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n};

		return recvmsg(p->fd, &msg, MSG_DONTWAIT);
	}
	return readv(p->fd, iov, (int)n);
}

/* The frame was read: to the guest with it, or into the bounce buffer until that is possible. True: it went to the guest. */
static bool rx_deliver(struct mc_net *net, struct net_pair *p, struct virtio_net_hdr_v1 *hdr, uint32_t len, size_t direct)
{
	size_t rest = len > direct ? len - direct : 0;
	bool as_is = net_rx_acceptable(net->offloads, hdr);

	/* Follow growth at once and shrink slowly: a bulk transfer should not copy, small packets not pop 64 KiB. */
	if (len + MC_NET_HDR > p->want)
		p->want = len + MC_NET_HDR;
	else if (p->want > WANT_MIN)
		p->want -= p->want / 16;

	if (as_is && rest) {
		if (net->mrg)
			rx_topup(p, MC_NET_HDR + len);
		if (!p->rx.error && (net->mrg ? p->room : p->bufs[p->buf_first].len) >= MC_NET_HDR + len) {
			mc_iov_write(p->iov + p->iov_first, p->iov_count, MC_NET_HDR + direct, p->bounce, rest);
			rest = 0;
		}
	}
	if (as_is && !rest) {
		rx_finish(net, p, hdr, len);
		return true;
	}
	if (as_is && !net->mrg) {
		net->counters.rx_dropped_oversize++;
		return false;
	}
	memmove(p->bounce + (len - rest), p->bounce, rest);
	mc_iov_read(p->iov + p->iov_first, p->iov_count, MC_NET_HDR, p->bounce, len - rest);
	if (!rx_stash(net, p, hdr, len))
		net->counters.rx_dropped_header++;
	return false;
}

static enum rx_state rx_frames(struct mc_net *net, struct net_pair *p)
{
	/* What any guest behind the other end of a link may send; our own taps are believed. */
	const uint64_t peer = BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4) | BIT(VIRTIO_NET_F_HOST_TSO6) |
			      BIT(VIRTIO_NET_F_HOST_ECN);

	for (int i = 0; i < NET_BATCH; i++) {
		struct virtio_net_hdr_v1 hdr;
		size_t direct;

		if (!rx_unstash(net, p))
			return RX_STARVED;
		rx_topup(p, net->mrg ? p->want : 1);
		if (!p->buf_count || p->rx.error)
			return RX_STARVED;
		ssize_t n = rx_read(net, p, &hdr, &direct);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return RX_POLL;
		if (n <= 0) {
			/* A removed tap answers EBADFD; a peer that hung up, 0. */
			if (net->backend == MC_NET_LINK)
				net_link_lost(net, n ? errno : 0);
			else
				net_backend_lost(net, n ? errno : EIO);
			return RX_OFF;
		}
		uint32_t len = n < (ssize_t)MC_NET_HDR ? 0 : (uint32_t)n - MC_NET_HDR;
		bool delivered = false;
		if (len > MC_NET_MAX_FRAME)
			net->counters.rx_dropped_oversize++;
		else if (len < MC_NET_MIN_FRAME || (net->backend == MC_NET_LINK && !net_hdr_check(&hdr, len, peer)))
			net->counters.rx_dropped_header++;
		else if (!net_drops(net, &net->drop_rx))
			delivered = rx_deliver(net, p, &hdr, len, direct);
		if (!delivered)
			mc_mem_mark_iov(net->mem, p->iov + p->iov_first, p->iov_count, MC_NET_HDR + (len < direct ? len : direct));
	}
	return RX_READY;
}

void net_rx_start(struct net_pair *p)
{
	bool some = p->fd >= 0 || p->stash_len || p->held;

	if (p->rx_set && p->active && some && !p->rx.error)
		p->rx_state = RX_READY;
}

/* What came before everything that the backend has now. False: no room for it. */
static bool rx_waiting(struct mc_net *net, struct net_pair *p)
{
	do {
		if (!rx_unstash(net, p))
			return false;
	} while (net_held_next(p));
	return true;
}

void net_rx_run(struct mc_net *net, struct net_pair *p)
{
	mc_vq_disable_kick(&p->rx);
	enum rx_state state = RX_OFF;

	if (!rx_waiting(net, p))
		state = RX_STARVED;
	else if (p->fd >= 0)
		state = net->backend == MC_NET_PASST ? net_stream_rx(net, p) : rx_frames(net, p);

	mc_vq_flush(&p->rx);
	if (state == RX_STARVED) {
		net->counters.rx_starved++;
		if (mc_vq_enable_kick(&p->rx))
			state = RX_READY;
	}
	p->rx_state = p->rx.error ? RX_OFF : state;
	if (p->rx.error)
		net_queue_broken(net, &p->rx);
	net_pair_poll(net, p);
}
