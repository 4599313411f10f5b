/*
 * The loop. It sleeps in epoll and nowhere else. A queue that has more to do than one batch is run again after the
 * others had their turn, with epoll only looked at in between.
 */
#include "net_impl.h"

#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { EVENTS = 64 };

int net_poll(struct mc_net *net, int fd, enum net_tag tag, uint16_t index, uint32_t events)
{
	struct epoll_event e = {.events = events, .data.u64 = (uint64_t)tag << 32 | index};

	if (epoll_ctl(net->epoll_fd, EPOLL_CTL_ADD, fd, &e) == 0)
		return 0;
	if (errno == EEXIST && epoll_ctl(net->epoll_fd, EPOLL_CTL_MOD, fd, &e) == 0)
		return 0;
	return -1;
}

void net_unpoll(struct mc_net *net, int fd)
{
	/* ENOENT: it was not in the set, which is what is wanted. */
	if (net->epoll_fd >= 0)
		(void)!epoll_ctl(net->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

void net_pair_poll(struct mc_net *net, struct net_pair *p)
{
	uint32_t events = 0;

	if (p->fd < 0)
		return;
	if (p->rx_state == RX_READY || p->rx_state == RX_POLL)
		events |= EPOLLIN;
	if (p->tx_state == TX_BLOCKED)
		events |= EPOLLOUT;
	if (events == p->events)
		return;
	/* Out of the set rather than without events: an error or hang-up would be reported all the same, over and over,
	 * while the guest has no buffers to read what comes before it. */
	if (!events)
		net_unpoll(net, p->fd);
	else if (net_poll(net, p->fd, TAG_BACKEND, (uint16_t)(p - net->pairs), events) < 0)
		net_backend_lost(net, errno);
	p->events = events;
}

static bool wait_for_more(const struct mc_net *net)
{
	for (uint16_t i = 0; i < net->max_pairs; i++)
		if (net->pairs[i].rx_state == RX_READY || net->pairs[i].tx_state == TX_READY)
			return false;
	return true;
}

static void kicked(struct mc_vq *vq)
{
	uint64_t n;

	if (read(vq->kick_fd, &n, sizeof(n)) == sizeof(n))
		mc_vq_kicked(vq);
}

/* True: asked to stop. */
static bool handle(struct mc_net *net, const struct epoll_event *e, bool *ctrl)
{
	uint64_t woken;
	enum net_tag tag = (enum net_tag)(e->data.u64 >> 32);
	struct net_pair *p = &net->pairs[(uint32_t)e->data.u64];

	switch (tag) {
	case TAG_STOP:
		/* Or to show that we turn. */
		if (read(net->stop_fd, &woken, sizeof(woken)) < 0)
			break;
		return __atomic_load_n(&net->stop, __ATOMIC_ACQUIRE);
	case TAG_CTRL:
		kicked(&net->ctrl);
		*ctrl = true;
		break;
	case TAG_RX_KICK:
		kicked(&p->rx);
		if (p->rx_state == RX_STARVED)
			p->rx_state = RX_READY;
		break;
	case TAG_TX_KICK:
		kicked(&p->tx);
		if (p->tx_state == TX_KICK)
			p->tx_state = TX_READY;
		break;
	case TAG_BACKEND:
		if (net->backend == MC_NET_LINK && !net->link.greeted) {
			net_link_event(net, tag);
			break;
		}
		/* EPOLLERR and EPOLLHUP: whoever tries next finds out what it is. */
		if (p->rx_state == RX_POLL && (e->events & ~(uint32_t)EPOLLOUT))
			p->rx_state = RX_READY;
		if (p->tx_state == TX_BLOCKED && (e->events & ~(uint32_t)EPOLLIN))
			p->tx_state = TX_READY;
		break;
	case TAG_LISTEN:
	case TAG_INOTIFY:
	case TAG_TIMER:
		net_link_event(net, tag);
		break;
	}
	return false;
}

static int poll_all(struct mc_net *net)
{
	int err = net_poll(net, net->stop_fd, TAG_STOP, 0, EPOLLIN);

	if (net->ctrl_set)
		err |= net_poll(net, net->ctrl.kick_fd, TAG_CTRL, 0, EPOLLIN);
	for (uint16_t i = 0; i < net->max_pairs; i++) {
		struct net_pair *p = &net->pairs[i];

		p->events = 0;
		if (p->rx_set)
			err |= net_poll(net, p->rx.kick_fd, TAG_RX_KICK, i, EPOLLIN);
		if (p->tx_set)
			err |= net_poll(net, p->tx.kick_fd, TAG_TX_KICK, i, EPOLLIN);
	}
	if (net->backend == MC_NET_LINK)
		err |= net_link_poll(net);
	return err ? -errno : 0;
}

static int loop(struct mc_net *net)
{
	struct epoll_event events[EVENTS];
	bool ctrl = net->ctrl_set;

	for (;;) {
		mc_beat(&net->beat);
		if (ctrl)
			ctrl = net_ctrl_run(net);
		for (uint16_t i = 0; i < net->max_pairs; i++) {
			struct net_pair *p = &net->pairs[i];

			if (p->tx_state == TX_READY)
				net_tx_run(net, p);
			if (p->rx_state == RX_READY)
				net_rx_run(net, p);
		}
		bool idle = !ctrl && wait_for_more(net);
		if (idle && net_pcap_flush(&net->pcap))
			net_event(net);
		int n = epoll_wait(net->epoll_fd, events, EVENTS, idle ? -1 : 0);
		if (n < 0 && errno != EINTR)
			return -errno;
		for (int i = 0; i < n; i++)
			if (handle(net, &events[i], &ctrl))
				return 0;
	}
}

int mc_net_run(struct mc_net *net)
{
	int err;

	net->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (net->epoll_fd < 0)
		return -errno;
	err = poll_all(net);
	/* What was kicked before we listened: look at everything once. */
	for (uint16_t i = 0; i < net->max_pairs; i++) {
		struct net_pair *p = &net->pairs[i];

		p->rx_state = RX_OFF;
		if (p->rx_set && !p->rx.error)
			mc_vq_go_on(&p->rx);
		net_rx_start(p);
		p->tx_state = p->tx_set && p->active && !p->tx.error ? TX_READY : TX_OFF;
	}
	if (!err && net->backend == MC_NET_LINK)
		net_link_start(net);
	if (!err)
		err = loop(net);

	for (uint16_t i = 0; i < net->max_pairs; i++)
		net_rx_give_back(&net->pairs[i]);
	if (net_pcap_flush(&net->pcap))
		net_event(net);
	close(net->epoll_fd);
	net->epoll_fd = -1;
	/* Asked once, returned once. */
	__atomic_store_n(&net->stop, false, __ATOMIC_RELAXED);
	return err;
}
