/*
 * Frames that the backend has given us and the guest has no buffers for yet. In this process they wait where they were
 * read to: one in the bounce buffer, a pair, and for passt also in the stream's buffer. A snapshot gets the whole ones as
 * records, and a restored process hands its records to the guest before it looks at its backend, whatever that is. A frame
 * that passt had sent in part is lost with its stream, as on a wire.
 *
 * Records come out of a file: nothing in them is believed.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "net_impl.h"

struct record {
	uint32_t len;			/* of the frame, which follows */
	uint32_t segmented;		/* 1: the guest gets it in segments; 0: as its header says */
	uint32_t offset;		/* of segmented: payload that the guest has already */
	struct virtio_net_hdr_v1 hdr;
};

_Static_assert(sizeof(struct record) == 24, "no padding: records are compared byte by byte");

struct writer {
	uint8_t *buf;
	uint32_t size, used;
	bool full;
};

/* A frame that does not fit is lost, and so are those behind it, or they would arrive out of order. */
static void put(struct writer *w, const struct record *r, const uint8_t *frame)
{
	if (w->full || r->len > w->size - w->used || w->size - w->used - r->len < sizeof(*r)) {
		w->full = true;
		return;
	}
	memcpy(w->buf + w->used, r, sizeof(*r));
	memcpy(w->buf + w->used + sizeof(*r), frame, r->len);
	w->used += (uint32_t)sizeof(*r) + r->len;
}

static void put_stash(struct writer *w, const struct net_pair *p)
{
	struct record r = {.len = p->stash_len, .segmented = p->stash_gso, .hdr = p->stash_hdr};

	if (!p->stash_len)
		return;
	r.hdr.num_buffers = 0;
	if (p->stash_gso) {
		r.offset = p->gso.offset;
		r.hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		r.hdr.gso_type = p->gso.v6 ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4;
		r.hdr.gso_size = (uint16_t)p->gso.mss;
		r.hdr.csum_start = (uint16_t)p->gso.l4;
		r.hdr.csum_offset = NET_TCP_CSUM;
	}
	put(w, &r, p->bounce);
}

uint32_t mc_net_save_frames(const struct mc_net *net, uint16_t pair, uint8_t *buf, uint32_t size)
{
	struct writer w = {.buf = buf, .size = size};
	const uint8_t *frame = NULL;
	uint32_t at = 0;

	if (pair >= net->max_pairs)
		return 0;
	const struct net_pair *p = &net->pairs[pair];

	put_stash(&w, p);
	for (uint32_t i = p->held_first; i < p->held_last;) {
		struct record r;

		memcpy(&r, p->held + i, sizeof(r));
		put(&w, &r, p->held + i + sizeof(r));
		i += (uint32_t)sizeof(r) + r.len;
	}
	if (net->backend == MC_NET_PASST) {
		for (uint32_t next = 0; !w.full; at = next) {
			struct record r = {.len = net_stream_peek(&net->stream, &next, &frame)};

			if (next == at)
				break;
			if (r.len >= MC_NET_MIN_FRAME)
				put(&w, &r, frame);
		}
	}
	return w.used;
}

/* Is this what put() may have written, for a guest with these features? */
static bool legal(const struct record *r, const uint8_t *frame, uint64_t features)
{
	const struct virtio_net_hdr_v1 *h = &r->hdr;
	uint8_t type = h->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
	bool tcp = type == VIRTIO_NET_HDR_GSO_TCPV4 || type == VIRTIO_NET_HDR_GSO_TCPV6;
	struct net_gso gso;

	if (r->len < MC_NET_MIN_FRAME || r->len > MC_NET_MAX_FRAME || r->segmented > 1)
		return false;
	if (h->flags & ~(VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID))
		return false;
	if ((h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && (uint32_t)h->csum_start + h->csum_offset + 2 > r->len)
		return false;
	if (!r->segmented)
		return !r->offset && (tcp || type == VIRTIO_NET_HDR_GSO_NONE || type == VIRTIO_NET_HDR_GSO_UDP) &&
		       net_rx_acceptable(features, h);
	return tcp && net_gso_init(&gso, h, frame, r->len) && r->offset % gso.mss == 0 && r->offset < r->len - gso.hdr_len;
}

void net_held_free(struct net_pair *p)
{
	free(p->held);
	p->held = NULL;
	p->held_first = p->held_last = 0;
}

int mc_net_load_frames(struct mc_net *net, uint16_t pair, uint64_t features, const uint8_t *buf, uint32_t len)
{
	struct record r;

	if (pair >= net->max_pairs)
		return -EINVAL;
	net_held_free(&net->pairs[pair]);
	for (uint32_t at = 0; at < len; at += (uint32_t)sizeof(r) + r.len) {
		if (len - at < sizeof(r))
			return -EINVAL;
		memcpy(&r, buf + at, sizeof(r));
		if (r.len > len - at - sizeof(r) || !legal(&r, buf + at + sizeof(r), features))
			return -EINVAL;
	}
	/* Of a passt whose stream goes on, the whole frames are among these; what was saved is not taken from there too. */
	if (net->backend == MC_NET_PASST) {
		const uint8_t *frame;
		uint32_t next = 0, passed;

		do {
			passed = next;
			net_stream_peek(&net->stream, &next, &frame);
		} while (next != passed);
		net->stream.at->in_first += next;
	}
	if (!len)
		return 0;
	struct net_pair *p = &net->pairs[pair];

	p->held = malloc(len);
	if (!p->held)
		return -ENOMEM;
	memcpy(p->held, buf, len);
	p->held_last = len;
	return 0;
}

bool net_held_next(struct net_pair *p)
{
	struct record r;

	if (p->held_first == p->held_last) {
		net_held_free(p);
		return false;
	}
	memcpy(&r, p->held + p->held_first, sizeof(r));
	memcpy(p->bounce, p->held + p->held_first + sizeof(r), r.len);
	p->held_first += (uint32_t)sizeof(r) + r.len;
	p->stash_len = r.len;
	p->stash_hdr = r.hdr;
	p->stash_gso = r.segmented;
	if (r.segmented) {
		/* legal() has seen that it can be: the same bytes, which are ours. */
		net_gso_init(&p->gso, &r.hdr, p->bounce, r.len);
		p->gso.offset = r.offset;
		memset(&p->stash_hdr, 0, sizeof(p->stash_hdr));
	}
	return true;
}
