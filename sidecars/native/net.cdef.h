struct mc_net_counters {
	uint64_t rx_packets, tx_packets;
	uint64_t rx_dropped_oversize;
	uint64_t rx_dropped_header;
	uint64_t rx_starved;
	uint64_t tx_dropped_header;
	uint64_t tx_dropped_backend;
	uint64_t tx_dropped_link;
	uint64_t tx_blocked;
	uint64_t segmented;
	uint64_t link_refused;
	uint64_t captured;
	uint64_t injected;
	...;
};
struct mc_net_status {
	bool link_up;
	uint8_t mac[6];
	int backend_error;
	int capture_error;
	int link_error;
	uint16_t active_pairs;
	struct mc_net_counters counters;
	...;
};
struct mc_net;
#define MC_NET_MAX_PAIRS ...
#define MC_NET_QUEUE_SIZE ...
#define MC_NET_CTRL_SIZE ...
#define MC_NET_MAX_FRAME ...
#define VIRTIO_NET_F_CSUM ...
#define VIRTIO_NET_F_GUEST_CSUM ...
#define VIRTIO_NET_F_CTRL_GUEST_OFFLOADS ...
#define VIRTIO_NET_F_MTU ...
#define VIRTIO_NET_F_MAC ...
#define VIRTIO_NET_F_GUEST_TSO4 ...
#define VIRTIO_NET_F_GUEST_TSO6 ...
#define VIRTIO_NET_F_GUEST_ECN ...
#define VIRTIO_NET_F_GUEST_UFO ...
#define VIRTIO_NET_F_HOST_TSO4 ...
#define VIRTIO_NET_F_HOST_TSO6 ...
#define VIRTIO_NET_F_HOST_ECN ...
#define VIRTIO_NET_F_HOST_UFO ...
#define VIRTIO_NET_F_MRG_RXBUF ...
#define VIRTIO_NET_F_STATUS ...
#define VIRTIO_NET_F_CTRL_VQ ...
#define VIRTIO_NET_F_CTRL_RX ...
#define VIRTIO_NET_F_MQ ...
#define VIRTIO_NET_F_CTRL_MAC_ADDR ...
#define VIRTIO_NET_S_LINK_UP ...
enum mc_net_backend { MC_NET_TAP, MC_NET_PASST, MC_NET_LINK, MC_NET_NONE, ... };
void mc_net_watch(struct mc_net *net, struct mc_watch *watch);
struct mc_net *mc_net_open(const struct mc_mem *mem, struct mc_isr *isr, int backend, const int *fds, uint16_t pairs,
			   const uint8_t *mac, uint16_t mtu, int capture, void *stream_keep);
struct mc_net_stream_keep { uint32_t busy, in_first, in_last, out_first, out_last; ...; };
uint64_t mc_net_stream_keep_size(void);
int mc_net_close(struct mc_net *net);
uint64_t mc_net_features(const struct mc_net *net);
int mc_net_event_fd(const struct mc_net *net);
void mc_net_get_status(const struct mc_net *net, struct mc_net_status *status);
int mc_net_set_features(struct mc_net *net, uint64_t features);
int mc_net_set_queue(struct mc_net *net, uint16_t index, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used,
		     uint16_t last_avail, uint16_t used_idx, int error, int kick, int call);
int mc_net_keep(struct mc_net *net, struct mc_keep *keep, bool again);
void mc_net_keep_mac(struct mc_net *net, struct mc_keep *keep);
struct mc_beat *mc_net_beat(struct mc_net *net);
const struct mc_vq *mc_net_queue(const struct mc_net *net, uint16_t index);
void mc_net_inject(struct mc_net *net, uint32_t rx, uint32_t tx);
int mc_net_run(struct mc_net *net);
void mc_net_stop(struct mc_net *net);
void mc_net_reset(struct mc_net *net);
struct mc_net_setup {
	uint64_t features;
	uint64_t offloads;
	uint16_t pairs;
	bool mac_set;
	uint8_t mac[6];
	...;
};
void mc_net_get_setup(const struct mc_net *net, struct mc_net_setup *setup);
int mc_net_restore(struct mc_net *net, const struct mc_net_setup *setup);
void mc_net_set_mac(struct mc_net *net, const uint8_t *mac);
uint32_t mc_net_save_frames(const struct mc_net *net, uint16_t pair, uint8_t *buf, uint32_t size);
int mc_net_load_frames(struct mc_net *net, uint16_t pair, uint64_t features, const uint8_t *buf, uint32_t len);
uint64_t mc_net_unservable(const struct mc_net *net, uint64_t features);
enum mc_tap_step { MC_TAP_OPEN_TUN, MC_TAP_SETIFF, MC_TAP_ONE_QUEUE, MC_TAP_HEADER, ... };
int mc_tap_open(const char *ifname, uint16_t queues, int *fds, int *step);
int mc_tap_adopt(int fd, char *ifname);
int mc_pcap_check(int fd);
