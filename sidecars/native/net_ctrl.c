/*
 * The control queue (virtio 1.2, 5.1.6.5). Every frame that a backend has for us reaches the guest, which 5.1.6.5.1 and
 * 5.1.6.5.2 allow (filtering "best-effort"): receive modes and MAC tables are checked and acknowledged, and need nothing
 * done. VLAN filters, RSS and announcements are not offered, and answered with an error.
 */
#include <string.h>

#include "net_impl.h"

enum { MAC_LEN = 6, CTRL_BATCH = 16 };

struct ctrl {
	const struct mc_chain *c;
	size_t at;			/* of the command's data not yet read */
};

static bool ctrl_take(struct ctrl *q, void *to, size_t len)
{
	if (q->c->len_out - q->at < len)
		return false;
	mc_iov_read(q->c->iov, q->c->n_out, q->at, to, len);
	q->at += len;
	return true;
}

static bool ctrl_rx(struct mc_net *net, struct ctrl *q, uint8_t cmd)
{
	uint64_t need = cmd <= VIRTIO_NET_CTRL_RX_ALLMULTI ? BIT(VIRTIO_NET_F_CTRL_RX) : BIT(VIRTIO_NET_F_CTRL_RX_EXTRA);
	uint8_t on;

	return cmd <= VIRTIO_NET_CTRL_RX_NOBCAST && (net->features & need) && ctrl_take(q, &on, 1) && on <= 1;
}

/* Two tables, unicast and multicast, each a count and so many addresses. */
static bool ctrl_mac_table(struct ctrl *q)
{
	for (int i = 0; i < 2; i++) {
		uint32_t entries;

		if (!ctrl_take(q, &entries, sizeof(entries)) || entries > (q->c->len_out - q->at) / MAC_LEN)
			return false;
		q->at += (size_t)entries * MAC_LEN;
	}
	return true;
}

static bool ctrl_mac(struct mc_net *net, struct ctrl *q, uint8_t cmd)
{
	uint64_t mac = 0;

	switch (cmd) {
	case VIRTIO_NET_CTRL_MAC_TABLE_SET:
		return (net->features & BIT(VIRTIO_NET_F_CTRL_RX)) && ctrl_mac_table(q);
	case VIRTIO_NET_CTRL_MAC_ADDR_SET:
		if (!(net->features & BIT(VIRTIO_NET_F_CTRL_MAC_ADDR)) || !ctrl_take(q, &mac, MAC_LEN))
			return false;
		__atomic_store_n(&net->mac, mac, __ATOMIC_RELAXED);
		net_keep(net);
		net_event(net);
		return true;
	}
	return false;
}

static bool ctrl_mq(struct mc_net *net, struct ctrl *q, uint8_t cmd)
{
	uint16_t n;

	if (cmd != VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET || !(net->features & BIT(VIRTIO_NET_F_MQ)) ||
	    !ctrl_take(q, &n, sizeof(n)) || n < VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN || n > net->max_pairs)
		return false;
	for (uint16_t i = 0; i < n; i++)
		if (!net->pairs[i].rx_set || !net->pairs[i].tx_set)
			return false;
	bool ok = net_set_pairs(net, n) == 0;

	net_keep(net);
	return ok;
}

static bool ctrl_offloads(struct mc_net *net, struct ctrl *q, uint8_t cmd)
{
	uint64_t wanted;

	if (cmd != VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET || !(net->features & BIT(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)) ||
	    !ctrl_take(q, &wanted, sizeof(wanted)) || (wanted & ~(net->features & NET_GUEST_OFFLOADS)))
		return false;
	bool ok = net_set_offloads(net, wanted) == 0;

	net_keep(net);
	return ok;
}

static bool ctrl_command(struct mc_net *net, const struct mc_chain *c)
{
	struct ctrl q = {.c = c};
	struct virtio_net_ctrl_hdr hdr;

	if (!ctrl_take(&q, &hdr, sizeof(hdr)))
		return false;
	switch (hdr.class) {
	case VIRTIO_NET_CTRL_RX: return ctrl_rx(net, &q, hdr.cmd);
	case VIRTIO_NET_CTRL_MAC: return ctrl_mac(net, &q, hdr.cmd);
	case VIRTIO_NET_CTRL_MQ: return ctrl_mq(net, &q, hdr.cmd);
	case VIRTIO_NET_CTRL_GUEST_OFFLOADS: return ctrl_offloads(net, &q, hdr.cmd);
	}
	return false;
}

bool net_ctrl_run(struct mc_net *net)
{
	struct mc_vq *vq = &net->ctrl;
	struct mc_chain c = {.max = MC_MAX_QUEUE_SIZE, .iov = net->tx_iov};

	for (int i = 0; i < CTRL_BATCH; i++) {
		if (mc_vq_pop(vq, &c) <= 0)
			break;
		if (!c.n_in) {
			vq->error = MC_VQ_BAD_REQUEST;	/* no byte for the answer */
			break;
		}
		bool ok = ctrl_command(net, &c);
		uint8_t ack = ok ? VIRTIO_NET_OK : VIRTIO_NET_ERR;

		vq->stats->bytes_in += c.len_out;
		vq->stats->bytes_out++;
		vq->stats->errors += !ok;
		mc_iov_write(c.iov + c.n_out, c.n_in, 0, &ack, 1);
		mc_mem_mark_iov(net->mem, c.iov + c.n_out, c.n_in, 1);
		mc_vq_push(vq, c.head, 1);
	}
	mc_vq_flush(vq);
	if (vq->error) {
		net_queue_broken(net, vq);
		return false;
	}
	return mc_vq_enable_kick(vq);
}
