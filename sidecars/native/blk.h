/*
 * The data path of the blk sidecar (virtio 1.2, section 5.2): one thread serves all queues of the device.
 *
 *   blk.c          life cycle and the loop          blk_uring.c    I/O through io_uring
 *   blk_req.c      from a chain to a request        blk_sync.c     I/O through preadv and pwritev
 *   blk_io.c       reads, writes, zeroing           blk_overlay.c  the copy-on-write layer (docs/overlay-format.md)
 *   blk_flush.c    what makes writes permanent      blk_geometry.c sizes and alignments of the backend
 *   blk_inject.c   faults on request
 */
#ifndef MC_BLK_H
#define MC_BLK_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ids.h>
#include <stdbool.h>
#include <stdint.h>

#include "virtqueue.h"

#define MC_BLK_MAX_QUEUES 16
#define MC_BLK_QUEUE_SIZE 256
#define MC_BLK_SEG_MAX 254		/* with a header and a status byte, a chain fills the queue at most */
#define MC_BLK_OVERLAY_BLOCK 4096	/* what the overlay maps */
#define MC_BLK_MAX_LAYERS 63

enum mc_blk_engine { MC_BLK_AUTO, MC_BLK_URING, MC_BLK_SYNC };

/* An overlay file: its descriptor, and of its header, where the map and the data begin. */
struct mc_blk_overlay_file {
	int fd;
	uint64_t map, data;
};

/* Descriptors, mem and isr stay the caller's and must outlive the device. */
struct mc_blk_params {
	int disk_fd;			/* the image, or an overlay's base */
	int event_fd;			/* signalled when a queue broke or the host failed a request */
	int engine;			/* enum mc_blk_engine */
	bool readonly;
	bool direct;			/* the descriptors, all of them, were opened with O_DIRECT */
	bool discard;			/* space may be given back to the host */
	bool removed;			/* no disk: what is left for a driver that still has one, of size 0 */
	uint16_t queues;
	uint64_t overlay_size;		/* of the headers: bytes of the disk */
	struct mc_blk_overlay_file overlay;	/* fd -1: none */
	uint16_t layers;		/* read-only overlays between disk_fd and overlay, the lowest first */
	struct mc_blk_overlay_file layer[MC_BLK_MAX_LAYERS];
	char serial[VIRTIO_BLK_ID_BYTES];
	const struct mc_mem *mem;
	struct mc_isr *isr;
	struct mc_watch *watch;		/* NULL: nobody watches */
	struct mc_keep *keep;		/* what outlives this process (inflight.h) */
	uint8_t *keep_map;		/* with an overlay: room for its map, zero at first, which outlives us too */
	uint64_t keep_map_size;
};

/* What a disk keeps in mc_keep.kind. */
struct mc_blk_keep {
	uint8_t set;			/* write_through is what the driver chose */
	uint8_t write_through;
	uint8_t mapped;			/* keep_map is the overlay's present map */
	uint8_t lost;			/* the host lost data that a flush should have kept */
};

/* Written by the data thread only; read at any time. */
struct mc_blk_counters {
	uint64_t reads, writes, flushes, discards, write_zeroes;
	uint64_t refused;		/* requests of the guest's that are not legal, or not supported */
	uint64_t io_errors;		/* requests that the host failed */
	uint64_t last_error;		/* errno of the last of them */
	uint64_t last_error_type;	/* VIRTIO_BLK_T_* */
	uint64_t last_error_offset;	/* bytes */
	uint64_t bounced;		/* transfers through a bounce buffer */
	uint64_t copied;		/* overlay blocks copied up from the base */
	uint64_t overlay_blocks;	/* that hold data now */
	uint64_t syncs;			/* rounds of fdatasync */
	uint64_t wakeups;		/* of the data thread */
	uint64_t injected;		/* requests that were failed or delayed on request */
};

struct mc_blk;

/* Opens what the device needs. NULL with a message in error[256] on failure. */
struct mc_blk *mc_blk_new(const struct mc_blk_params *params, char *error);
/* Frees it. Not while mc_blk_run() runs. */
void mc_blk_free(struct mc_blk *b);

uint64_t mc_blk_features(const struct mc_blk *b);
/* Configuration space and how much of it there is. */
const struct virtio_blk_config *mc_blk_config(const struct mc_blk *b, uint32_t *size);
const char *mc_blk_engine_name(const struct mc_blk *b);
const struct mc_blk_counters *mc_blk_counters(const struct mc_blk *b);
struct mc_beat *mc_blk_beat(struct mc_blk *b);
/* Queue i, whose mem and isr are set. */
struct mc_vq *mc_blk_queue(struct mc_blk *b, uint16_t i);

/* After mc_vq_init() of the queues in the mask, before mc_blk_run(). */
void mc_blk_activate(struct mc_blk *b, uint64_t features, uint64_t queue_mask);
/* Serves the queues until mc_blk_stop(), and then until nothing is in flight; may be entered again after that. Always from
 * the same thread. Returns 0, or an errno when the loop cannot go on. */
int mc_blk_run(struct mc_blk *b);
void mc_blk_stop(struct mc_blk *b);
/* mc_blk_run() has returned: the driver's settings are gone. */
void mc_blk_reset(struct mc_blk *b);
/* The driver's choice of cache mode (VIRTIO_BLK_F_CONFIG_WCE). Any time. */
void mc_blk_set_writeback(struct mc_blk *b, bool on);
/* Has the next `count` requests of these kinds (0: none any more) wait delay_ms, at most 2^24 - 1, and then be answered with
 * a status other than OK, if one is given. Any time. */
enum { MC_BLK_INJECT_READ = 1, MC_BLK_INJECT_WRITE = 2, MC_BLK_INJECT_FLUSH = 4, MC_BLK_INJECT_DISCARD = 8 };
void mc_blk_inject(struct mc_blk *b, uint32_t ops, uint32_t count, uint8_t status, uint32_t delay_ms);
/* Makes all completed writes permanent; the overlay file then holds the disk as it is. Not while mc_blk_run() runs. Returns 0
 * or an errno; the device can go on either way. */
int mc_blk_sync(struct mc_blk *b);

#endif
