/* What the files of the net data path share among themselves. Everything here belongs to the data thread while
 * mc_net_run() runs, but for what is marked as shared. */
#ifndef MC_NET_IMPL_H
#define MC_NET_IMPL_H

#include <sys/types.h>

#include "net.h"

_Static_assert(sizeof(struct virtio_net_hdr_v1) == 12, "5.1.6: without HASH_REPORT the header has 12 bytes");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "virtio's little-endian fields are read as they are");

#define BIT(n) (1ull << (n))
#define NET_GUEST_OFFLOADS \
	(BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4) | BIT(VIRTIO_NET_F_GUEST_TSO6) | \
	 BIT(VIRTIO_NET_F_GUEST_ECN) | BIT(VIRTIO_NET_F_GUEST_UFO))
#define NET_BATCH 64		/* packets of one queue before the others have their turn */
#define NET_ROOM 69632u		/* for one frame of any backend, and some more, to notice those too large */
#define TX_IOV 2048u
#define RX_IOV 4096u		/* iovecs of one pair's popped and unused rx chains */

/* Checks a local copy of a header from a guest, ours or a link's peer's, that may use these CSUM and HOST_* features
 * (5.1.6.2), and clears what is not set by a driver. False: drop the packet. */
bool net_hdr_check(struct virtio_net_hdr_v1 *hdr, uint32_t frame_len, uint64_t features);

#define NET_TCP_CSUM 16u	/* where a TCP header has its checksum */

/* A frame being segmented; net_gso.c. */
struct net_gso {
	const uint8_t *frame;
	uint32_t len, hdr_len, mss, offset;
	uint32_t l3, l4;
	bool v6;
	uint8_t hdr[512];	/* the present segment's headers */
};

/* Completes a partial checksum in place. False: it is not in the frame. */
bool net_csum_complete(uint8_t *frame, uint32_t len, uint16_t start, uint16_t offset);
/* False: the frame is not what its header says. `frame` must stay until the last segment. */
bool net_gso_init(struct net_gso *gso, const struct virtio_net_hdr_v1 *hdr, const uint8_t *frame, uint32_t len);
/* The next segment, checksummed: headers in gso->hdr (gso->hdr_len bytes), payload at *data. False: no more. */
bool net_gso_next(struct net_gso *gso, const uint8_t **data, uint32_t *data_len);
void net_gso_advance(struct net_gso *gso);

struct net_pcap {
	int fd;			/* -1: no capture */
	int error;		/* shared */
	bool seekable;
	uint8_t *buf;
	size_t used;
	off_t good;		/* size of the file at the last whole record */
};

int net_pcap_init(struct net_pcap *pcap, int fd);
int net_pcap_deinit(struct net_pcap *pcap);	/* 0, or -errno when the last records are lost */
/* One frame: `len` bytes of iov after the first `skip`. True: the capture has just failed. */
bool net_pcap_packet(struct net_pcap *pcap, const struct iovec *iov, uint32_t n, size_t skip, size_t len);
bool net_pcap_flush(struct net_pcap *pcap);

struct rx_buf {
	uint16_t head;
	uint16_t n;		/* iovecs */
	uint32_t len;		/* bytes */
};

enum rx_state {
	RX_OFF,			/* not set up, broken, or without a backend */
	RX_READY,		/* try to receive now */
	RX_POLL,		/* waiting for the backend */
	RX_STARVED,		/* waiting for the guest's kick; the backend is not polled */
};

enum tx_state { TX_OFF, TX_READY, TX_KICK, TX_BLOCKED };

struct net_pair {
	struct mc_vq rx, tx;
	bool rx_set, tx_set;		/* the driver made it ready */
	bool active;			/* MQ_VQ_PAIRS_SET covers it */
	enum rx_state rx_state;
	enum tx_state tx_state;
	int fd;				/* backend; -1: none */
	uint32_t events;		/* that epoll has for fd; 0: not in the set */

	/* Popped rx chains, oldest first: a ring of bufs, whose iovecs lie one after the other in iov[iov_first..]. */
	struct rx_buf bufs[MC_MAX_QUEUE_SIZE];
	uint16_t buf_first, buf_count;
	uint32_t iov_first, iov_count;
	uint64_t room;			/* bytes in them */
	uint32_t want;			/* bytes to gather before a read: follows the sizes seen */
	struct iovec *iov;		/* RX_IOV */

	/* A received frame that waits for guest buffers. */
	uint8_t *bounce;		/* NET_ROOM */
	struct virtio_net_hdr_v1 stash_hdr;
	uint32_t stash_len;		/* 0: none */
	bool stash_gso;
	struct net_gso gso;

	/* Frames that another process received: records of net_held.c, the oldest at held_first. */
	uint8_t *held;
	uint32_t held_first, held_last;
};

/* passt's byte stream; net_stream.c. What was read of it and what is still to be sent of a frame outlives the process. */
struct net_stream {
	struct mc_net_stream_keep *at;
	uint8_t *in;			/* NET_STREAM_IN; behind *at */
	uint8_t *out;			/* NET_ROOM: the rest of a frame that the socket did not take whole */
	void *own;			/* where all of that is, when nobody will come after us */
};
#define NET_STREAM_IN (256u << 10)
#define NET_STREAM_KEEP (sizeof(struct mc_net_stream_keep) + NET_STREAM_IN + NET_ROOM)

/* net_link.c */
struct net_link {
	int dir_fd, listen_fd, inotify_fd, timer_fd;
	int fd;				/* peer, -1: none */
	bool greeted;			/* the peer's hello came, so the link is up */
	int error;			/* shared */
};

enum net_tag { TAG_STOP, TAG_CTRL, TAG_RX_KICK, TAG_TX_KICK, TAG_BACKEND, TAG_LISTEN, TAG_INOTIFY, TAG_TIMER };

struct mc_net {
	const struct mc_mem *mem;
	struct mc_isr *isr;
	struct mc_watch *watch;		/* NULL: nobody watches */
	uint32_t drop_rx, drop_tx;	/* atomic: so many frames yet, on request */
	enum mc_net_backend backend;
	uint16_t max_pairs;
	uint16_t active_pairs;		/* shared */
	int fds[MC_NET_MAX_PAIRS];	/* not owned */
	int epoll_fd, stop_fd, event_fd;
	uint64_t offered, features;
	uint64_t deliverable;		/* the GUEST_* that the backend can make use of */
	uint64_t offloads;		/* the GUEST_* ones in force: CTRL_GUEST_OFFLOADS can withdraw some */
	bool mrg;
	bool link_up;			/* shared */
	int backend_error;		/* shared */
	uint64_t mac, boot_mac;		/* in its lowest six bytes, in the order of the wire; mac: shared */
	struct mc_vq ctrl;
	bool ctrl_set;
	struct net_pcap pcap;
	struct net_stream stream;
	struct net_link link;
	struct mc_net_keep *keep;		/* NULL: nobody will come after us */
	struct mc_beat beat;
	bool stop;				/* atomic: set by mc_net_stop() */
	struct mc_net_counters counters;	/* shared, read without locks */
	struct iovec tx_iov[TX_IOV], rx_iov[MC_NET_IOV_MAX];
	uint8_t *tx_bounce;			/* NET_ROOM */
	struct net_pair pairs[];
};

/* net.c */
void net_event(struct mc_net *net);			/* wakes the main thread */
/* Whether a frame is dropped on request. Off, it is a load and a branch. */
bool net_drop_one(struct mc_net *net, uint32_t *left);
static inline bool net_drops(struct mc_net *net, uint32_t *left)
{
	return __builtin_expect(__atomic_load_n(left, __ATOMIC_RELAXED) != 0, 0) && net_drop_one(net, left);
}

void net_queue_broken(struct mc_net *net, struct mc_vq *vq);
void net_set_link(struct mc_net *net, bool up);
void net_backend_lost(struct mc_net *net, int error);	/* no more I/O on the backend; the link is down */
void net_keep(struct mc_net *net);			/* what a successor is to begin with has changed */
int net_set_pairs(struct mc_net *net, uint16_t n);	/* 0 or -errno */
int net_set_offloads(struct mc_net *net, uint64_t guest);	/* 0 or -errno */
void net_rx_start(struct net_pair *p);			/* RX_READY, if there is a queue and something to receive */
void net_capture(struct mc_net *net, const struct iovec *iov, uint32_t n, size_t skip, size_t len);

/* net_loop.c */
int net_poll(struct mc_net *net, int fd, enum net_tag tag, uint16_t index, uint32_t events);
void net_unpoll(struct mc_net *net, int fd);
void net_pair_poll(struct mc_net *net, struct net_pair *p);	/* epoll follows rx_state and tx_state */

/* net_rx.c */
void net_rx_run(struct mc_net *net, struct net_pair *p);
void net_rx_give_back(struct net_pair *p);	/* popped and unused chains, to the ring */
enum rx_copy { RX_COPIED, RX_DROPPED, RX_NO_BUFFERS };
/* A whole frame of n parts to the guest by memcpy. */
enum rx_copy net_rx_copy(struct mc_net *net, struct net_pair *p, struct virtio_net_hdr_v1 *hdr, const struct iovec *src,
			 uint32_t n);

/* Does a guest with these offloads take the frame as this header describes it? */
bool net_rx_acceptable(uint64_t offloads, const struct virtio_net_hdr_v1 *hdr);

/* net_held.c */
bool net_held_next(struct net_pair *p);		/* the next one into the bounce buffer; false: there is none */
void net_held_free(struct net_pair *p);

/* net_tx.c */
void net_tx_run(struct mc_net *net, struct net_pair *p);

/* net_ctrl.c */
bool net_ctrl_run(struct mc_net *net);	/* true: run it again */

/* net_tap.c */
int net_tap_queue(int fd, bool attach);
int net_tap_offloads(int fd, uint64_t guest_features);
uint64_t net_tap_probe(int fd);

/* net_stream.c */
enum rx_state net_stream_rx(struct mc_net *net, struct net_pair *p);
/* A popped chain, cut up for sending: iov[0] is free for the sender's own header, the frame follows. */
struct tx_frame {
	struct virtio_net_hdr_v1 hdr;
	struct iovec *iov;
	uint32_t n;		/* with iov[0] */
	uint32_t len;		/* bytes of frame */
};

/* False: the chain holds no frame that may be sent. `c->iov` must have a free iovec before it. A chain of very many
 * parts is copied to net->tx_bounce, of which there is one. */
bool net_tx_parse(struct mc_net *net, struct mc_chain *c, struct tx_frame *f);
void net_tx_bad(struct mc_net *net, struct net_pair *p);	/* counts such a chain */
enum tx_state net_stream_tx(struct mc_net *net, struct net_pair *p);
int net_stream_init(struct net_stream *s, void *keep);
/* The whole frame at *at of what was received (0: the first), its length, and *at of the next. 0: no whole frame. */
uint32_t net_stream_peek(const struct net_stream *s, uint32_t *at, const uint8_t **frame);
void net_stream_deinit(struct net_stream *s);

/* net_link.c */
int net_link_init(struct mc_net *net, int dir_fd);
int net_link_poll(struct mc_net *net);		/* what there is goes into a new epoll set; 0 or -1 */
void net_link_deinit(struct mc_net *net);
void net_link_start(struct mc_net *net);	/* listen or connect, whichever falls to us */
void net_link_stop(struct mc_net *net);		/* hang up: a guest without a driver has no carrier */
void net_link_lost(struct mc_net *net, int error);
void net_link_event(struct mc_net *net, enum net_tag tag);

#endif
