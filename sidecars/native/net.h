/*
 * The data path of the net sidecar (virtio 1.2, section 5.1): one thread, one epoll set, every queue pair.
 *
 * Each packet crosses this process once, by readv/writev between a backend and guest memory; the 12-byte header alone
 * is copied here, checked, and copied on. A frame is copied whole only where that cannot be: passt's byte stream, a
 * link to a guest without offloads, and a packet for which the guest has too few buffers just now.
 *
 *   net.c         life cycle
 *   net_loop.c    epoll, and whose turn it is
 *   net_rx.c      backend to guest
 *   net_tx.c      guest to backend
 *   net_ctrl.c    the control queue
 *   net_hdr.c     checks of virtio_net_hdr
 *   net_tap.c     tap ioctls
 *   net_stream.c  passt: frames behind their length on a byte stream
 *   net_link.c    another VM's net sidecar: who listens, who connects
 *   net_gso.c     checksums and segmentation for guests that take no others
 *   net_held.c    received frames that outlive this process
 *   net_pcap.c    capture
 */
#ifndef MC_NET_H
#define MC_NET_H

#include <linux/virtio_net.h>
#include <stdbool.h>
#include <stdint.h>

#include "virtqueue.h"

#define MC_NET_MAX_PAIRS 16
#define MC_NET_QUEUE_SIZE 256
#define MC_NET_CTRL_SIZE 64

#define MC_NET_HDR ((uint32_t)sizeof(struct virtio_net_hdr_v1))
#define MC_NET_MIN_FRAME 14u		/* an Ethernet header */
#define MC_NET_MAX_FRAME (65535u + 18u)	/* the largest IP packet behind a VLAN-tagged Ethernet header */
#define MC_NET_IOV_MAX 1024u		/* UIO_MAXIOV: what readv and writev take */

enum mc_net_backend {
	MC_NET_TAP, MC_NET_PASST, MC_NET_LINK,
	MC_NET_NONE,			/* no link, ever: what the guest sends is dropped */
};

/* What one device counted. Written by the data thread only; read at any time. */
struct mc_net_counters {
	uint64_t rx_packets, tx_packets;
	uint64_t rx_dropped_oversize;	/* larger than the guest's buffer (no MRG_RXBUF), or than all of them */
	uint64_t rx_dropped_header;	/* a link's peer sent a header or frame that makes no sense */
	uint64_t rx_starved;		/* times that reading stopped for lack of guest buffers */
	uint64_t tx_dropped_header;	/* a header that is wrong or not negotiated, or no whole Ethernet header */
	uint64_t tx_dropped_backend;	/* the backend refused the packet (a tap that is down) */
	uint64_t tx_dropped_link;	/* there was no link */
	uint64_t tx_blocked;		/* times that sending stopped until the backend had room */
	uint64_t segmented;		/* packets segmented here, since the guest takes none that large */
	uint64_t link_refused;		/* third parties turned away from a link */
	uint64_t captured;
	uint64_t injected;		/* frames dropped on request */
};

/* What the main thread asks after an event. */
struct mc_net_status {
	bool link_up;
	uint8_t mac[6];
	int backend_error;		/* errno that ended the backend; 0: none */
	int capture_error;		/* errno that ended the capture; 0: none */
	int link_error;			/* errno of the last failed attempt to link up; 0: none */
	uint16_t active_pairs;
	struct mc_net_counters counters;
};

/* What a NIC keeps in mc_keep.kind, and its successor begins with: what the driver did by its control queue. */
struct mc_net_keep {
	uint8_t set;
	uint8_t mac[6];
	uint16_t pairs;
	uint64_t offloads;
};

/* Where passt's stream stands; the first of what is kept for a NIC behind passt. busy: a process was killed in a step of
 * which nobody can say how far it came, so that the stream has to be another one. */
struct mc_net_stream_keep {
	uint32_t busy, in_first, in_last, out_first, out_last;
};
/* Bytes to be kept for a NIC behind passt, beside its queues. */
uint64_t mc_net_stream_keep_size(void);

struct mc_net;

/*
 * fds: MC_NET_TAP: one tap queue per pair (IFF_VNET_HDR, header of 12 bytes, non-blocking). MC_NET_PASST: a connected
 * stream socket. MC_NET_LINK: a directory, opened for reading, that two sidecars share; it becomes the calling process's
 * working directory. MC_NET_NONE: none. capture: a pcap file, or -1. All stay the caller's and must outlive mc_net_close().
 * stream_keep: mc_net_stream_keep_size() bytes that outlive the process, or NULL. Returns NULL and errno.
 */
struct mc_net *mc_net_open(const struct mc_mem *mem, struct mc_isr *isr, int backend, const int *fds, uint16_t pairs,
			   const uint8_t mac[6], uint16_t mtu, int capture, void *stream_keep);
/* Where its queues are counted and traced, which must outlive mc_net_close(). Before any queue is set. */
void mc_net_watch(struct mc_net *net, struct mc_watch *watch);
/* 0, or -errno when the end of the capture could not be written. */
int mc_net_close(struct mc_net *net);

/* Features that this backend can offer, with RING_EVENT_IDX and RING_INDIRECT_DESC. */
uint64_t mc_net_features(const struct mc_net *net);

/* Readable when mc_net_status() or a queue's error changed. The main thread reads it. */
int mc_net_event_fd(const struct mc_net *net);
void mc_net_get_status(const struct mc_net *net, struct mc_net_status *status);

/* Queue `index` as the driver numbers it (the place of the control queue depends on MQ: 5.1.2). mc_net_set_features()
 * comes first. `error`: not 0 for a queue that was broken already, and stays so. Returns 0, an enum mc_vq_error, or -1:
 * there is no such queue. Eventfds stay the caller's. */
int mc_net_set_features(struct mc_net *net, uint64_t features);
int mc_net_set_queue(struct mc_net *net, uint16_t index, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used,
		     uint16_t last_avail, uint16_t used_idx, int error, int kick, int call);
/* After all of mc_net_set_queue(): what outlives this process (inflight.h). again: the queues are those that it speaks of,
 * and what the driver did by its control queue holds. Returns 0 or -errno. */
int mc_net_keep(struct mc_net *net, struct mc_keep *keep, bool again);
/* At the start, before any hello: the MAC that the driver chose last. */
void mc_net_keep_mac(struct mc_net *net, struct mc_keep *keep);
struct mc_beat *mc_net_beat(struct mc_net *net);

/* NULL: that queue is not set up. One that could not be, since its rings are not legal, has its error set. */
const struct mc_vq *mc_net_queue(const struct mc_net *net, uint16_t index);

/* Drops the next so many frames of each direction. Any time. */
void mc_net_inject(struct mc_net *net, uint32_t rx, uint32_t tx);

/* The loop. Returns 0 once mc_net_stop() was called and every popped chain is pushed or given back, or -errno when the
 * loop itself cannot go on. What the backend had in flight stays where it was, a link stays up: run again, it goes on. */
int mc_net_run(struct mc_net *net);
void mc_net_stop(struct mc_net *net);

/* Forgets the driver's settings: offloads, queue pairs, queues, MAC, received frames; hangs up a link. Only while
 * mc_net_run() is not running. */
void mc_net_reset(struct mc_net *net);

/* What a driver did by its control queue, for snapshots. Only while mc_net_run() is not running. */
struct mc_net_setup {
	uint64_t features;		/* accepted */
	uint64_t offloads;		/* of them the GUEST_* that are in force */
	uint16_t pairs;			/* active */
	bool mac_set;			/* the driver's own */
	uint8_t mac[6];
};

/* Of features that a driver accepted before another backend, those that this one cannot do. */
uint64_t mc_net_unservable(const struct mc_net *net, uint64_t features);
void mc_net_get_setup(const struct mc_net *net, struct mc_net_setup *setup);
/* Puts offloads and pairs back, after mc_net_set_features() and the queues. Returns 0 or -errno. */
int mc_net_restore(struct mc_net *net, const struct mc_net_setup *setup);
/* The MAC that the driver chose; NULL: that of mc_net_open(). */
void mc_net_set_mac(struct mc_net *net, const uint8_t *mac);

/*
 * Frames that were received for this pair, and that the guest had no buffers for, as bytes that another process can load.
 * mc_net_save_frames() writes as many whole ones, the oldest first, as fit into `size` bytes; returns the bytes written.
 * mc_net_load_frames() replaces those loaded before by a copy, for a guest that accepted these features. Returns 0, -EINVAL
 * when that is not what was saved, or -ENOMEM; then nothing is loaded. The guest gets them before anything else.
 */
uint32_t mc_net_save_frames(const struct mc_net *net, uint16_t pair, uint8_t *buf, uint32_t size);
int mc_net_load_frames(struct mc_net *net, uint16_t pair, uint64_t features, const uint8_t *buf, uint32_t len);

/*
 * For the supervisor. mc_tap_open() opens `queues` queues of an existing tap into fds, non-blocking and CLOEXEC, with
 * virtio headers of 12 bytes. Returns 0 or -errno; *step tells which step failed (ONE_QUEUE: it is a tap, but not for
 * several).
 */
enum mc_tap_step { MC_TAP_OPEN_TUN = 1, MC_TAP_SETIFF, MC_TAP_ONE_QUEUE, MC_TAP_HEADER };
int mc_tap_open(const char *ifname, uint16_t queues, int *fds, int *step);
/* Makes of a tap's queue that somebody else has opened, fd, what mc_tap_open() gives. ifname (IFNAMSIZ bytes): its name.
 * 0, or -errno; -EINVAL: not a tap, or one without virtio headers. */
int mc_tap_adopt(int fd, char *ifname);

/* 1: fd holds a pcap file as we write it, or is empty; 0: it is something else; -errno. */
int mc_pcap_check(int fd);

#endif
