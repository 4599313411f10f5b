/* Life cycle of the net sidecar's data path: what is made once, what an activation sets, what a reset forgets. */
#include "net_impl.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

void net_event(struct mc_net *net)
{
	const uint64_t one = 1;
	/* EAGAIN: it is signalled already. */
	ssize_t n = write(net->event_fd, &one, sizeof(one));
	(void)n;
}

void net_queue_broken(struct mc_net *net, struct mc_vq *vq)
{
	if (vq->error)
		net_event(net);
}

void net_set_link(struct mc_net *net, bool up)
{
	if (__atomic_exchange_n(&net->link_up, up, __ATOMIC_RELAXED) != up)
		net_event(net);
}

void net_backend_lost(struct mc_net *net, int error)
{
	__atomic_store_n(&net->backend_error, error, __ATOMIC_RELAXED);
	for (uint16_t i = 0; i < net->max_pairs; i++) {
		struct net_pair *p = &net->pairs[i];

		if (p->fd >= 0)
			net_unpoll(net, p->fd);
		p->fd = -1;
		p->events = 0;
		p->rx_state = RX_OFF;
		if (p->tx_state == TX_BLOCKED)
			p->tx_state = TX_READY;
	}
	net_set_link(net, false);
}

void net_capture(struct mc_net *net, const struct iovec *iov, uint32_t n, size_t skip, size_t len)
{
	if (net->pcap.fd < 0 || net->pcap.error)
		return;
	if (net_pcap_packet(&net->pcap, iov, n, skip, len))
		net_event(net);
	else
		net->counters.captured++;
}

/* A field at a time, each right by itself: killed in between, the driver has had no answer yet and asks again of nobody,
 * since its command is still in the queue. */
void net_keep(struct mc_net *net)
{
	struct mc_net_keep *k = net->keep;

	if (!k)
		return;
	k->offloads = net->offloads;
	k->pairs = net->active_pairs;
	memcpy(k->mac, &net->mac, sizeof(k->mac));
	mc_in_order();
	k->set = 1;
}

void mc_net_keep_mac(struct mc_net *net, struct mc_keep *keep)
{
	net->keep = (struct mc_net_keep *)keep->kind;
	if (net->keep->set)
		mc_net_set_mac(net, net->keep->mac);
}

struct mc_beat *mc_net_beat(struct mc_net *net) { return &net->beat; }

int net_set_offloads(struct mc_net *net, uint64_t guest)
{
	int err = 0;

	/* Whatever the guest takes: a tap is asked for no more than it can deliver. */
	if (net->backend == MC_NET_TAP && !net->backend_error)
		err = net_tap_offloads(net->fds[0], guest & net->deliverable);
	if (!err)
		net->offloads = guest;
	return err;
}

int net_set_pairs(struct mc_net *net, uint16_t n)
{
	int err = 0;

	for (uint16_t i = 0; i < net->max_pairs; i++) {
		struct net_pair *p = &net->pairs[i];
		bool active = i < n;

		if (net->backend == MC_NET_TAP && net->max_pairs > 1 && p->fd >= 0) {
			/* First out of epoll: a detached queue is nothing but errors. */
			if (!active && p->events) {
				net_unpoll(net, p->fd);
				p->events = 0;
			}
			int e = net_tap_queue(p->fd, active);
			if (e)
				err = e;
		}
		if (active == p->active)
			continue;
		p->active = active;
		p->rx_state = RX_OFF;
		p->tx_state = active && p->tx_set && !p->tx.error ? TX_READY : TX_OFF;
		if (active)
			net_rx_start(p);
		else
			net_rx_give_back(p);
	}
	__atomic_store_n(&net->active_pairs, n, __ATOMIC_RELAXED);
	return err;
}

void mc_net_stop(struct mc_net *net)
{
	const uint64_t one = 1;

	__atomic_store_n(&net->stop, true, __ATOMIC_RELEASE);
	ssize_t n = write(net->stop_fd, &one, sizeof(one));
	(void)n;
}

int mc_net_event_fd(const struct mc_net *net) { return net->event_fd; }
void mc_net_watch(struct mc_net *net, struct mc_watch *watch) { net->watch = watch; }

void mc_net_inject(struct mc_net *net, uint32_t rx, uint32_t tx)
{
	__atomic_store_n(&net->drop_rx, rx, __ATOMIC_RELAXED);
	__atomic_store_n(&net->drop_tx, tx, __ATOMIC_RELAXED);
}

bool net_drop_one(struct mc_net *net, uint32_t *left)
{
	uint32_t n = __atomic_load_n(left, __ATOMIC_RELAXED);

	do {
		if (!n)
			return false;
	} while (!__atomic_compare_exchange_n(left, &n, n - 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
	net->counters.injected++;
	return true;
}

uint64_t mc_net_features(const struct mc_net *net) { return net->offered; }

void mc_net_get_status(const struct mc_net *net, struct mc_net_status *s)
{
	uint64_t mac = __atomic_load_n(&net->mac, __ATOMIC_RELAXED);

	memcpy(s->mac, &mac, sizeof(s->mac));
	s->link_up = __atomic_load_n(&net->link_up, __ATOMIC_RELAXED);
	s->backend_error = __atomic_load_n(&net->backend_error, __ATOMIC_RELAXED);
	s->capture_error = __atomic_load_n(&net->pcap.error, __ATOMIC_RELAXED);
	s->link_error = __atomic_load_n(&net->link.error, __ATOMIC_RELAXED);
	s->active_pairs = __atomic_load_n(&net->active_pairs, __ATOMIC_RELAXED);
	s->counters = net->counters;
}

/* 5.1.2: the control queue comes after the pairs that the driver may use, which without MQ is one. */
static struct mc_vq *queue_at(struct mc_net *net, uint16_t index, bool **set)
{
	uint16_t pairs = net->features & BIT(VIRTIO_NET_F_MQ) ? net->max_pairs : 1;

	if (index == 2 * pairs && (net->features & BIT(VIRTIO_NET_F_CTRL_VQ))) {
		*set = &net->ctrl_set;
		return &net->ctrl;
	}
	if (index >= 2 * pairs)
		return NULL;
	struct net_pair *p = &net->pairs[index / 2];
	*set = index % 2 ? &p->tx_set : &p->rx_set;
	return index % 2 ? &p->tx : &p->rx;
}

int mc_net_keep(struct mc_net *net, struct mc_keep *keep, bool again)
{
	struct mc_net_setup setup = {.pairs = net->keep->pairs, .offloads = net->keep->offloads};
	bool *set = NULL;
	int err = 0;

	for (uint16_t i = 0; i <= 2 * net->max_pairs; i++) {
		struct mc_vq *vq = queue_at(net, i, &set);

		if (!vq || !*set)
			continue;
		/* A received frame may be in several buffers, which the guest gets together or not at all. */
		vq->retake_done = vq != &net->ctrl && i % 2 == 0;
		mc_vq_keep(vq, mc_keep_queue(keep, i), again);
		*set = vq->error == MC_VQ_OK;
	}
	if (again && net->keep->set)
		err = mc_net_restore(net, &setup);
	net_keep(net);
	return err;
}

const struct mc_vq *mc_net_queue(const struct mc_net *net, uint16_t index)
{
	bool *set = NULL;
	const struct mc_vq *vq = queue_at((struct mc_net *)(uintptr_t)net, index, &set);

	return vq && (*set || vq->error) ? vq : NULL;
}

int mc_net_set_features(struct mc_net *net, uint64_t features)
{
	net->features = features;
	net->mrg = features & BIT(VIRTIO_NET_F_MRG_RXBUF);
	return net_set_offloads(net, features & NET_GUEST_OFFLOADS);
}

int mc_net_set_queue(struct mc_net *net, uint16_t index, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used,
		     uint16_t last_avail, uint16_t used_idx, int error, int kick, int call)
{
	bool *set = NULL;
	struct mc_vq *vq = queue_at(net, index, &set);

	if (!vq)
		return -1;
	vq->mem = net->mem;
	vq->isr = net->isr;
	vq->watch = net->watch;
	vq->kick_fd = kick;
	vq->call_fd = call;
	vq->index = index;
	vq->event_idx = net->features & BIT(VIRTIO_RING_F_EVENT_IDX);
	vq->indirect = net->features & BIT(VIRTIO_RING_F_INDIRECT_DESC);
	vq->last_avail = last_avail;
	vq->used_idx = used_idx;
	mc_vq_init(vq, size, desc, avail, used);
	if (error)
		vq->error = error;
	*set = vq->error == MC_VQ_OK;
	return vq->error;
}

static void queue_reset(struct mc_vq *vq, bool *set)
{
	*vq = (struct mc_vq){0};
	*set = false;
}

void mc_net_reset(struct mc_net *net)
{
	if (net->backend == MC_NET_LINK)
		net_link_stop(net);
	for (uint16_t i = 0; i < net->max_pairs; i++) {
		struct net_pair *p = &net->pairs[i];

		p->stash_len = 0;
		net_held_free(p);
		p->want = 2048;
		queue_reset(&p->rx, &p->rx_set);
		queue_reset(&p->tx, &p->tx_set);
	}
	queue_reset(&net->ctrl, &net->ctrl_set);
	net_set_pairs(net, 1);
	mc_net_set_features(net, 0);
	mc_net_set_mac(net, NULL);
}

void mc_net_set_mac(struct mc_net *net, const uint8_t *mac)
{
	uint64_t value = net->boot_mac;

	if (mac)
		memcpy(&value, mac, 6);
	__atomic_store_n(&net->mac, value, __ATOMIC_RELAXED);
	net_keep(net);
}

void mc_net_get_setup(const struct mc_net *net, struct mc_net_setup *setup)
{
	*setup = (struct mc_net_setup){
		.features = net->features,
		.offloads = net->offloads,
		.pairs = net->active_pairs,
		.mac_set = net->mac != net->boot_mac,
	};
	memcpy(setup->mac, &net->mac, 6);
}

int mc_net_restore(struct mc_net *net, const struct mc_net_setup *setup)
{
	if (!setup->pairs || setup->pairs > net->max_pairs || (setup->offloads & ~(net->features & NET_GUEST_OFFLOADS)))
		return -EINVAL;
	int err = net_set_pairs(net, setup->pairs);

	err = err ? err : net_set_offloads(net, setup->offloads);
	net_keep(net);
	return err;
}

static uint64_t offered(const struct mc_net *net, uint64_t guest, uint16_t mtu)
{
	uint64_t f = BIT(VIRTIO_NET_F_MAC) | BIT(VIRTIO_NET_F_MRG_RXBUF) | BIT(VIRTIO_NET_F_STATUS) |
		     BIT(VIRTIO_NET_F_CTRL_VQ) | BIT(VIRTIO_NET_F_CTRL_RX) | BIT(VIRTIO_NET_F_CTRL_RX_EXTRA) |
		     BIT(VIRTIO_NET_F_CTRL_MAC_ADDR) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC);

	if (mtu)
		f |= BIT(VIRTIO_NET_F_MTU);
	if (net->max_pairs > 1)
		f |= BIT(VIRTIO_NET_F_MQ);
	if (net->backend == MC_NET_PASST)
		return f;
	/* What a tap's kernel or a link's other end can do with unfinished frames of ours is always the same, and nobody
	 * minds what is not sent at all. */
	f |= BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4) | BIT(VIRTIO_NET_F_HOST_TSO6) |
	     BIT(VIRTIO_NET_F_HOST_ECN);
	if (guest & BIT(VIRTIO_NET_F_GUEST_UFO))
		f |= BIT(VIRTIO_NET_F_HOST_UFO);
	return guest ? f | guest | BIT(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) : f;
}

uint64_t mc_net_unservable(const struct mc_net *net, uint64_t features)
{
	const uint64_t host = BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4) | BIT(VIRTIO_NET_F_HOST_TSO6) |
			      BIT(VIRTIO_NET_F_HOST_ECN) | BIT(VIRTIO_NET_F_HOST_UFO);
	uint64_t known = net->offered | NET_GUEST_OFFLOADS | BIT(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) |
			 BIT(VIRTIO_NET_F_MTU);

	/* A guest's unfinished frames go on as they are, or nowhere; a link drops what its other end would not take
	 * (UFO, which Linux accepts and has not used since 4.14). passt is the one that would have to finish them. */
	if (net->backend != MC_NET_PASST)
		known |= host;
	return features & ~known;
}

uint64_t mc_net_stream_keep_size(void) { return NET_STREAM_KEEP; }

static int init(struct mc_net *net, const int *fds, uint16_t mtu, int capture, void *keep)
{
	const uint64_t link = NET_GUEST_OFFLOADS & ~BIT(VIRTIO_NET_F_GUEST_UFO);
	int err = net_pcap_init(&net->pcap, capture);

	net->stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	net->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	net->tx_bounce = malloc(NET_ROOM);
	net->beat = (struct mc_beat){.wake_fd = net->stop_fd, .event_fd = net->event_fd};
	if (net->stop_fd < 0 || net->event_fd < 0 || !net->tx_bounce)
		return -errno;
	for (uint16_t i = 0; i < net->max_pairs; i++) {
		struct net_pair *p = &net->pairs[i];

		p->iov = malloc(sizeof(*p->iov) * RX_IOV);
		p->bounce = malloc(NET_ROOM);
		if (!p->iov || !p->bounce)
			return -ENOMEM;
		p->fd = -1;
	}
	switch (net->backend) {
	case MC_NET_TAP:
		for (uint16_t i = 0; i < net->max_pairs; i++)
			net->pairs[i].fd = net->fds[i] = fds[i];
		net->deliverable = net_tap_probe(fds[0]);
		break;
	case MC_NET_PASST:
		net->pairs[0].fd = net->fds[0] = fds[0];
		err = err ? err : net_stream_init(&net->stream, keep);
		break;
	case MC_NET_LINK:
		net->deliverable = link;
		err = err ? err : net_link_init(net, fds[0]);
		break;
	case MC_NET_NONE:
		net->deliverable = NET_GUEST_OFFLOADS;	/* as a tap: a machine may be made without and restored with one */
		break;
	}
	net->link_up = net->backend == MC_NET_TAP || net->backend == MC_NET_PASST;
	net->offered = offered(net, net->deliverable, mtu);
	mc_net_reset(net);
	return err;
}

struct mc_net *mc_net_open(const struct mc_mem *mem, struct mc_isr *isr, int backend, const int *fds, uint16_t pairs,
			   const uint8_t mac[6], uint16_t mtu, int capture, void *stream_keep)
{
	struct mc_net *net;
	int err;

	if (!pairs || pairs > MC_NET_MAX_PAIRS || backend < MC_NET_TAP || backend > MC_NET_NONE ||
	    ((backend == MC_NET_PASST || backend == MC_NET_LINK) && pairs > 1)) {
		errno = EINVAL;
		return NULL;
	}
	net = calloc(1, sizeof(*net) + sizeof(net->pairs[0]) * pairs);
	if (!net)
		return NULL;
	net->mem = mem;
	net->isr = isr;
	net->backend = (enum mc_net_backend)backend;
	net->max_pairs = pairs;
	net->pcap.fd = net->epoll_fd = net->stop_fd = net->event_fd = -1;
	net->link.fd = net->link.listen_fd = net->link.inotify_fd = net->link.timer_fd = -1;
	memcpy(&net->boot_mac, mac, 6);
	err = init(net, fds, mtu, capture, stream_keep);
	if (err) {
		mc_net_close(net);
		errno = -err;
		return NULL;
	}
	return net;
}

int mc_net_close(struct mc_net *net)
{
	int err;

	if (net->backend == MC_NET_LINK)
		net_link_deinit(net);
	err = net_pcap_deinit(&net->pcap);
	net_stream_deinit(&net->stream);
	for (uint16_t i = 0; i < net->max_pairs; i++) {
		free(net->pairs[i].iov);
		free(net->pairs[i].bounce);
		net_held_free(&net->pairs[i]);
	}
	free(net->tx_bounce);
	if (net->stop_fd >= 0)
		close(net->stop_fd);
	if (net->event_fd >= 0)
		close(net->event_fd);
	free(net);
	return err;
}
