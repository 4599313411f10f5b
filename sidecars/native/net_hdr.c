/* struct virtio_net_hdr_v1 from a guest (virtio 1.2, 5.1.6.2): a local copy, checked before anybody acts on it. */
#include "net_impl.h"

static uint64_t gso_feature(uint8_t type)
{
	switch (type) {
	case VIRTIO_NET_HDR_GSO_TCPV4: return BIT(VIRTIO_NET_F_HOST_TSO4);
	case VIRTIO_NET_HDR_GSO_TCPV6: return BIT(VIRTIO_NET_F_HOST_TSO6);
	case VIRTIO_NET_HDR_GSO_UDP: return BIT(VIRTIO_NET_F_HOST_UFO);
	}
	return 0;
}

bool net_hdr_check(struct virtio_net_hdr_v1 *hdr, uint32_t frame_len, uint64_t features)
{
	uint8_t type = hdr->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;

	/* 5.1.6.2.1: bits that we do not know are ignored; DATA_VALID and RSC_INFO are for receivers. */
	hdr->flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
	hdr->num_buffers = 0;
	if (hdr->flags) {
		if (!(features & BIT(VIRTIO_NET_F_CSUM)) ||
		    (uint32_t)hdr->csum_start + hdr->csum_offset + 2 > frame_len)
			return false;
	} else {
		hdr->csum_start = hdr->csum_offset = 0;
	}
	if (hdr->gso_type == VIRTIO_NET_HDR_GSO_NONE) {
		hdr->hdr_len = hdr->gso_size = 0;
		return true;
	}
	if ((hdr->gso_type & VIRTIO_NET_HDR_GSO_ECN) && !(features & BIT(VIRTIO_NET_F_HOST_ECN)))
		return false;
	/* hdr_len is only a hint, but one past the frame is a driver's error that the tap would refuse too. */
	return (features & gso_feature(type)) && hdr->flags && hdr->gso_size && hdr->hdr_len <= frame_len;
}
