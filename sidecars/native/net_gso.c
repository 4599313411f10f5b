/*
 * What a NIC's offloads do, in software, for the one case that has nobody else to do it: a frame that a guest left
 * unfinished reaches, over a link, a guest that did not accept such frames. Everything in a frame is the other guest's
 * word. Not handled: UDP segmentation (never offered on a link), IPv6 routing headers (they change the address that the
 * checksum covers; such a segment leaves with a wrong checksum and is dropped by its receiver).
 */
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <string.h>

#include "net_impl.h"

enum { IP4_MIN = 20, IP6_LEN = 40, TCP_MIN = 20, UDP_CSUM = 6, PROTO_TCP = 6 };
enum { TCP_FIN = 0x01, TCP_PSH = 0x08, TCP_CWR = 0x80 };

static uint16_t get16(const uint8_t *at) { return (uint16_t)(at[0] << 8 | at[1]); }
static void put16(uint8_t *at, uint16_t v) { at[0] = v >> 8; at[1] = (uint8_t)v; }
static uint32_t get32(const uint8_t *at) { return (uint32_t)get16(at) << 16 | get16(at + 2); }
static void put32(uint8_t *at, uint32_t v) { put16(at, v >> 16); put16(at + 2, (uint16_t)v); }

/* RFC 1071. 64 KiB of 16-bit words do not overflow 64 bits; `p` starts at an even offset of what is summed. */
static uint64_t sum_bytes(uint64_t sum, const uint8_t *p, size_t len)
{
	for (; len >= 2; p += 2, len -= 2)
		sum += get16(p);
	return len ? sum + ((uint32_t)*p << 8) : sum;
}

static uint16_t sum_fold(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

bool net_csum_complete(uint8_t *frame, uint32_t len, uint16_t start, uint16_t offset)
{
	if ((uint32_t)start + offset + 2 > len)
		return false;
	/* The driver left the pseudo header's sum in the field, which the sum therefore includes (5.1.6.2). */
	uint16_t sum = sum_fold(sum_bytes(0, frame + start, len - start));

	put16(frame + start + offset, sum || offset != UDP_CSUM ? sum : 0xffff);
	return true;
}

bool net_gso_init(struct net_gso *g, const struct virtio_net_hdr_v1 *hdr, const uint8_t *frame, uint32_t len)
{
	uint16_t type;

	g->frame = frame;
	g->len = len;
	g->mss = hdr->gso_size;
	g->offset = 0;
	g->v6 = (hdr->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) == VIRTIO_NET_HDR_GSO_TCPV6;
	g->l3 = ETH_HLEN;
	if (len < ETH_HLEN)
		return false;
	type = get16(frame + 12);
	for (int tags = 0; tags < 2 && (type == ETH_P_8021Q || type == ETH_P_8021AD); tags++, g->l3 += 4) {
		if (g->l3 + 4 > len)
			return false;
		type = get16(frame + g->l3 + 2);
	}
	if (type != (g->v6 ? ETH_P_IPV6 : ETH_P_IP) || g->l3 + (g->v6 ? IP6_LEN : IP4_MIN) > len)
		return false;

	const uint8_t *ip = frame + g->l3;
	g->l4 = hdr->csum_start;
	if (g->v6) {
		/* Extension headers may stand between; they are carried along unread. */
		if (ip[0] >> 4 != 6 || g->l4 < g->l3 + IP6_LEN)
			return false;
	} else {
		uint32_t ihl = (ip[0] & 15u) * 4;

		if (ip[0] >> 4 != 4 || ihl < IP4_MIN || ip[9] != PROTO_TCP || g->l4 != g->l3 + ihl)
			return false;
	}
	if (g->l4 + TCP_MIN > len || hdr->csum_offset != NET_TCP_CSUM || !g->mss)
		return false;
	uint32_t doff = (frame[g->l4 + 12] >> 4) * 4u;
	g->hdr_len = g->l4 + doff;
	return doff >= TCP_MIN && g->hdr_len < len && g->hdr_len <= sizeof(g->hdr);
}

bool net_gso_next(struct net_gso *g, const uint8_t **data, uint32_t *data_len)
{
	uint32_t left = g->len - g->hdr_len - g->offset;
	uint32_t n = left < g->mss ? left : g->mss;
	uint8_t *ip = g->hdr + g->l3, *tcp = g->hdr + g->l4;
	uint32_t l4_len = g->hdr_len - g->l4 + n;
	uint64_t sum;

	if (!left)
		return false;
	memcpy(g->hdr, g->frame, g->hdr_len);
	*data = g->frame + g->hdr_len + g->offset;
	*data_len = n;

	if (g->v6) {
		put16(ip + 4, (uint16_t)(g->hdr_len - g->l3 - IP6_LEN + n));
		sum = sum_bytes(0, ip + 8, 32);
	} else {
		put16(ip + 2, (uint16_t)(g->hdr_len - g->l3 + n));
		put16(ip + 4, (uint16_t)(get16(ip + 4) + g->offset / g->mss));
		put16(ip + 10, 0);
		put16(ip + 10, sum_fold(sum_bytes(0, ip, g->l4 - g->l3)));
		sum = sum_bytes(0, ip + 12, 8);
	}
	put32(tcp + 4, get32(tcp + 4) + g->offset);
	if (n != left)
		tcp[13] &= (uint8_t)~(TCP_FIN | TCP_PSH);
	if (g->offset)
		tcp[13] &= (uint8_t)~TCP_CWR;	/* RFC 3168: once a window */
	put16(tcp + NET_TCP_CSUM, 0);
	sum += PROTO_TCP + l4_len;
	/* The header's length is a multiple of four, so the payload starts at an even offset of the sum. */
	sum = sum_bytes(sum, tcp, g->hdr_len - g->l4);
	put16(tcp + NET_TCP_CSUM, sum_fold(sum_bytes(sum, *data, n)));
	return true;
}

void net_gso_advance(struct net_gso *g)
{
	uint32_t left = g->len - g->hdr_len - g->offset;

	g->offset += left < g->mss ? left : g->mss;
}
