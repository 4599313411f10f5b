/* Guest to backend: the header is copied, checked and sent from here, the frame from where the guest put it. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "net_impl.h"

bool net_tx_parse(struct mc_net *net, struct mc_chain *c, struct tx_frame *f)
{
	size_t skip = MC_NET_HDR;
	uint32_t first = 0;

	if (c->len_out < MC_NET_HDR + MC_NET_MIN_FRAME || c->len_out > MC_NET_HDR + MC_NET_MAX_FRAME)
		return false;
	mc_iov_read(c->iov, c->n_out, 0, &f->hdr, MC_NET_HDR);
	f->len = (uint32_t)c->len_out - MC_NET_HDR;
	if (!net_hdr_check(&f->hdr, f->len, net->features) || net_drops(net, &net->drop_tx))
		return false;
	/* 5.1.6.2: the header may share its descriptor with the frame, or be split over several. */
	while (skip >= c->iov[first].iov_len)
		skip -= c->iov[first++].iov_len;
	c->iov[first].iov_base = (uint8_t *)c->iov[first].iov_base + skip;
	c->iov[first].iov_len -= skip;
	f->iov = c->iov + first - 1;
	f->n = c->n_out - first + 1;
	if (f->n > MC_NET_IOV_MAX) {
		mc_iov_read(f->iov + 1, f->n - 1, 0, net->tx_bounce, f->len);
		f->iov[1] = (struct iovec){net->tx_bounce, f->len};
		f->n = 2;
	}
	return true;
}

void net_tx_bad(struct mc_net *net, struct net_pair *p)
{
	net->counters.tx_dropped_header++;
	p->tx.stats->errors++;
}

enum tx_result { TX_SENT, TX_FULL, TX_REFUSED, TX_LOST };

static enum tx_result tx_send(struct mc_net *net, struct net_pair *p, struct tx_frame *f)
{
	struct msghdr msg = {.msg_iov = f->iov, .msg_iovlen = f->n};
	ssize_t n;

	f->iov[0] = (struct iovec){&f->hdr, MC_NET_HDR};
	do {
		n = net->backend == MC_NET_LINK ? sendmsg(p->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
						: writev(p->fd, f->iov, (int)f->n);
	} while (n < 0 && errno == EINTR);
	if (n >= 0)
		return TX_SENT;
	switch (errno) {
	case EAGAIN:
		return TX_FULL;
	case EBADFD:	/* a tap that was removed */
	case EPIPE:	/* a peer that hung up */
	case ECONNRESET:
	case ENOTCONN:
		return TX_LOST;
	}
	/* A tap that is down (EIO), a header that it does not like (EINVAL), no memory: this packet only. */
	return TX_REFUSED;
}

static enum tx_state tx_frames(struct mc_net *net, struct net_pair *p)
{
	struct mc_chain c = {.max = MC_MAX_QUEUE_SIZE, .iov = net->tx_iov + 1};
	struct tx_frame f;

	for (int i = 0; i < NET_BATCH; i++) {
		if (mc_vq_pop(&p->tx, &c) <= 0)
			return TX_KICK;
		if (net_tx_parse(net, &c, &f)) {
			switch (tx_send(net, p, &f)) {
			case TX_SENT:
				p->tx.stats->bytes_in += f.len;
				net->counters.tx_packets++;
				net_capture(net, f.iov + 1, f.n - 1, 0, f.len);
				break;
			case TX_FULL:
				mc_vq_unpop(&p->tx, 1);
				net->counters.tx_blocked++;
				return TX_BLOCKED;
			case TX_REFUSED:
				net->counters.tx_dropped_backend++;
				p->tx.stats->errors++;
				break;
			case TX_LOST:
				mc_vq_unpop(&p->tx, 1);
				if (net->backend == MC_NET_LINK)
					net_link_lost(net, errno);
				else
					net_backend_lost(net, errno);
				return TX_READY;
			}
		} else {
			net_tx_bad(net, p);
		}
		mc_vq_tick(&p->tx);
		mc_vq_push(&p->tx, c.head, 0);
	}
	return TX_READY;
}

/* A cable that is not plugged in: frames are gone, and the guest does not wait for them. */
static enum tx_state tx_discard(struct mc_net *net, struct net_pair *p)
{
	struct mc_chain c = {.max = MC_MAX_QUEUE_SIZE, .iov = net->tx_iov};

	for (int i = 0; i < NET_BATCH; i++) {
		if (mc_vq_pop(&p->tx, &c) <= 0)
			return TX_KICK;
		net->counters.tx_dropped_link++;
		p->tx.stats->errors++;
		mc_vq_push(&p->tx, c.head, 0);
	}
	return TX_READY;
}

void net_tx_run(struct mc_net *net, struct net_pair *p)
{
	enum tx_state state;

	mc_vq_disable_kick(&p->tx);
	if (!net->link_up)
		state = tx_discard(net, p);
	else if (net->backend == MC_NET_PASST)
		state = net_stream_tx(net, p);
	else
		state = tx_frames(net, p);
	mc_vq_flush(&p->tx);
	if (state == TX_KICK && mc_vq_enable_kick(&p->tx))
		state = TX_READY;
	p->tx_state = p->tx.error ? TX_OFF : state;
	if (p->tx.error)
		net_queue_broken(net, &p->tx);
	net_pair_poll(net, p);
}
