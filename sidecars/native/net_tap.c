/* tap devices: Documentation/networking/tuntap.rst, and linux/if_tun.h. */
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "net_impl.h"

static unsigned offload_flags(uint64_t guest)
{
	unsigned flags = 0;

	/* The kernel takes segmentation only together with checksums, as 5.1.3.1 wants it of drivers. */
	if (!(guest & BIT(VIRTIO_NET_F_GUEST_CSUM)))
		return 0;
	flags |= TUN_F_CSUM;
	if (guest & BIT(VIRTIO_NET_F_GUEST_TSO4))
		flags |= TUN_F_TSO4;
	if (guest & BIT(VIRTIO_NET_F_GUEST_TSO6))
		flags |= TUN_F_TSO6;
	if ((guest & BIT(VIRTIO_NET_F_GUEST_ECN)) && (flags & (TUN_F_TSO4 | TUN_F_TSO6)))
		flags |= TUN_F_TSO_ECN;
	if (guest & BIT(VIRTIO_NET_F_GUEST_UFO))
		flags |= TUN_F_UFO;
	return flags;
}

int net_tap_offloads(int fd, uint64_t guest_features)
{
	return ioctl(fd, TUNSETOFFLOAD, (unsigned long)offload_flags(guest_features)) < 0 ? -errno : 0;
}

/* The guest-side offloads that this kernel's tap can deliver. Leaves all of them off. */
uint64_t net_tap_probe(int fd)
{
	const uint64_t tso = BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4) |
			     BIT(VIRTIO_NET_F_GUEST_TSO6) | BIT(VIRTIO_NET_F_GUEST_ECN);
	const uint64_t sets[] = {tso | BIT(VIRTIO_NET_F_GUEST_UFO), tso, BIT(VIRTIO_NET_F_GUEST_CSUM)};
	uint64_t found = 0;

	for (unsigned i = 0; i < sizeof(sets) / sizeof(sets[0]) && !found; i++)
		if (net_tap_offloads(fd, sets[i]) == 0)
			found = sets[i];
	net_tap_offloads(fd, 0);
	return found;
}

/* Attaching what is attached and detaching what is detached are EINVAL, and what we wanted. */
int net_tap_queue(int fd, bool attach)
{
	struct ifreq ifr = {.ifr_flags = attach ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE};

	return ioctl(fd, TUNSETQUEUE, &ifr) < 0 && errno != EINVAL ? -errno : 0;
}

static int tap_setiff(int fd, const char *ifname, int flags)
{
	struct ifreq ifr = {.ifr_flags = (short)(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags)};

	strncpy(ifr.ifr_name, ifname, sizeof(ifr.ifr_name) - 1);
	return ioctl(fd, TUNSETIFF, &ifr) < 0 ? -errno : 0;
}

int mc_tap_adopt(int fd, char *ifname)
{
	struct ifreq ifr = {0};
	int size = (int)MC_NET_HDR, flags = fcntl(fd, F_GETFL);

	/* A descriptor that is no tap's knows no such ioctl. */
	if (flags < 0 || ioctl(fd, TUNGETIFF, &ifr) < 0)
		return -EINVAL;
	if ((ifr.ifr_flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)) != (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
		return -EINVAL;
	if (ioctl(fd, TUNSETVNETHDRSZ, &size) < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -errno;
	memcpy(ifname, ifr.ifr_name, IFNAMSIZ);
	return 0;
}

int mc_tap_open(const char *ifname, uint16_t queues, int *fds, int *step)
{
	int size = (int)MC_NET_HDR, opened = 0, err = 0;

	if (!queues || queues > MC_NET_MAX_PAIRS || strlen(ifname) >= IFNAMSIZ)
		return -EINVAL;
	for (; opened < queues; opened++) {
		*step = MC_TAP_OPEN_TUN;
		fds[opened] = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
		if (fds[opened] < 0) {
			err = -errno;
			break;
		}
		/* A tap is made for one queue or for several, and has to be opened as it was made. */
		*step = MC_TAP_SETIFF;
		err = tap_setiff(fds[opened], ifname, queues > 1 ? IFF_MULTI_QUEUE : 0);
		if (err == -EINVAL && queues == 1) {
			err = tap_setiff(fds[opened], ifname, IFF_MULTI_QUEUE);
		} else if (err == -EINVAL) {
			int one = tap_setiff(fds[opened], ifname, 0);

			if (one == 0 || one == -EBUSY)
				*step = MC_TAP_ONE_QUEUE;
		}
		if (!err) {
			*step = MC_TAP_HEADER;
			err = ioctl(fds[opened], TUNSETVNETHDRSZ, &size) < 0 ? -errno : 0;
		}
		if (err) {
			close(fds[opened]);
			break;
		}
	}
	if (err)
		while (opened--)
			close(fds[opened]);
	return err;
}
