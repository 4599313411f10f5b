/* What the parts of the blk data path share. Nothing here is called from outside. */
#ifndef MC_BLK_IMPL_H
#define MC_BLK_IMPL_H

#include <sys/types.h>

#include "blk.h"

#define BLK_IOV (MC_BLK_SEG_MAX + 2)	/* buffers of a chain */
#define BLK_RUNS 16			/* transfers of one request at a time */
#define BLK_BOUNCES 16
#define BLK_BOUNCE_SIZE (64u << 10)
#define BLK_ZEROES (1u << 20)		/* of zeroes at hand, for hosts that cannot zero a range */
#define BLK_META_OPS 16			/* map pages written at a time by a flush */
#define BLK_MAX_INFLIGHT 4096		/* transfers handed to the engine */

struct blk_op;
struct blk_req;

enum blk_op_kind { OP_READ, OP_WRITE, OP_FSYNC, OP_FALLOCATE };

/* Where data is. FILE_LAYER and up: the layers, the lowest first. */
enum { FILE_DISK, FILE_OVERLAY, FILE_LAYER, BLK_FILES = FILE_LAYER + MC_BLK_MAX_LAYERS, FILE_NONE = 255 };

/* One transfer, handed to the engine. The engine calls done() once, with what the system call would have returned, or
 * -errno; never from inside submit(). */
struct blk_op {
	enum blk_op_kind kind;
	uint8_t file;
	int mode;			/* of fallocate */
	uint32_t niov;
	struct iovec *iov;		/* advanced in place after a short transfer */
	uint64_t off, len;		/* in the file; what is left to do */
	void (*done)(struct mc_blk *b, struct blk_op *op, int64_t res);
	struct blk_req *req;
	struct blk_op *next;		/* the sync engine's: a list, */
	int64_t result;			/* and what done() will be told */
	struct iovec one;		/* for an op of one buffer */
	uint64_t disk_off, disk_len;	/* what it covers of the disk, for marking it in the overlay */
};

/* A chain that was popped and is not yet pushed. */
struct blk_req {
	struct blk_queue *q;
	uint16_t head;
	uint16_t niov;			/* data buffers, at iov */
	uint32_t type;
	uint32_t in_len;		/* what goes into used.len if it succeeds */
	bool zeroes;			/* writes zeroes, not the guest's data */
	bool unmap;
	bool partial;			/* touches overlay blocks in part: alone in them */
	bool unaligned;			/* the guest's buffers cannot be used for O_DIRECT */
	bool writer;			/* on the device's list of writers */
	int error;
	uint32_t inflight;		/* ops */
	uint64_t off, len, pos;		/* bytes of the disk; pos: where the next window begins, from off */
	uint64_t sector, bytes_in, bytes_out;	/* as the driver has it, without header and status byte */
	uint64_t due;			/* of a delayed one: mc_watch_now() */
	uint8_t inject_status;		/* of one that is to fail, later perhaps; else 0 */
	uint8_t *status;
	uint8_t *bounce;
	struct blk_req *next;		/* a free list or a waiting list; a request is on one at most */
	struct blk_req *prev_writer, *next_writer;
	struct iovec *iov;		/* stays as the driver gave it: the dirty log is told of it at the end */
	struct iovec chain[BLK_IOV];
	struct iovec slices[BLK_IOV + BLK_RUNS];	/* iov, cut up for the ops of one window */
	struct blk_op ops[BLK_RUNS];
};

struct blk_list {
	struct blk_req *head, *tail;
};

struct blk_queue {
	struct mc_vq vq;
	bool active;
	bool reported;			/* the main loop was told that it is broken */
	uint16_t armed_at;		/* last_avail when a kick was last asked for */
	bool armed;
	struct blk_req *slots, *free;
};

/* The copy-on-write map, two bits a block. live is the present; saved is what the file has, or is being given. */
enum blk_state { BLOCK_BASE, BLOCK_DATA, BLOCK_ZERO, BLOCK_BAD };

struct blk_overlay {
	uint64_t map_off;
	uint64_t blocks, pages;		/* pages of the map, of 4096 bytes */
	uint8_t *live, *saved;
	uint8_t *dirty;			/* a byte a page: live differs from saved */
	uint8_t *below;			/* a byte a block: where it is when it is not here; NULL: all in FILE_DISK */
	bool kept;			/* live is not ours alone: it outlives us */
	bool lost;			/* the host lost data that a flush should have kept: nothing more becomes permanent */
};

struct blk_flush {
	bool running;
	int error;
	uint32_t inflight;
	uint64_t next_page;
	struct blk_list current, waiting;
	struct blk_op sync;
	struct blk_op meta[BLK_META_OPS];
	uint8_t *writing;		/* a byte a page: part of this flush */
};

struct blk_engine {
	const char *name;
	int (*open)(struct mc_blk *b);
	void (*close)(struct mc_blk *b);
	int (*start)(struct mc_blk *b);			/* on the data thread, at every run; returns an errno */
	void (*submit)(struct mc_blk *b, struct blk_op *op);
	int (*wait)(struct mc_blk *b, bool block);	/* reports what completed; returns an errno */
};

struct mc_blk {
	struct mc_blk_params p;
	struct virtio_blk_config config;
	uint64_t size;			/* bytes of the disk */
	uint32_t mem_align, file_align;	/* for O_DIRECT; 1 without */
	uint32_t files;			/* how many of fds there are */
	int fds[BLK_FILES];
	uint64_t data_off[BLK_FILES];	/* where the disk begins in each */
	const struct blk_engine *engine;
	void *engine_state;
	int stop_fd;
	bool stop;			/* atomic: set by mc_blk_stop() */
	bool writeback;			/* atomic: set by the main thread */
	uint64_t features;
	uint32_t inflight;		/* ops in the engine */
	uint32_t requests;		/* popped and not pushed */
	bool no_punch, no_zero_range;	/* the host said so */
	struct blk_queue queues[MC_BLK_MAX_QUEUES];
	struct blk_req *writers;	/* in flight; kept with an overlay only */
	uint32_t partial_writers;
	bool writer_left;		/* since blk_io_wake() looked at waiting_writers */
	struct blk_list waiting_writers, waiting_bounce;
	uint8_t *bounce_area, *bounce_free[BLK_BOUNCES];
	uint32_t bounces;		/* free ones */
	uint8_t *zeroes;		/* BLK_ZEROES bytes, read only */
	struct blk_overlay ov;
	struct blk_flush flush;
	struct mc_blk_counters counters;
	uint64_t inject;		/* atomic: blk_inject.c; 0: nothing */
	struct blk_req *delayed, *last_delayed;	/* by due */
	struct mc_blk_keep *keep, own_keep;
	struct mc_beat beat;
};

/* A flush failed: from here on none succeeds, in this process or a later one. */
static inline void blk_lost(struct mc_blk *b)
{
	b->ov.lost = true;
	b->keep->lost = 1;
}

static inline bool blk_has_overlay(const struct mc_blk *b) { return b->p.overlay.fd >= 0; }
static inline uint64_t blk_min(uint64_t a, uint64_t b) { return a < b ? a : b; }

void blk_list_add(struct blk_list *l, struct blk_req *r);
struct blk_req *blk_list_take(struct blk_list *l);

/* blk_geometry.c: fills in size, alignments and config. Returns 0, or an errno with a message. */
int blk_geometry(struct mc_blk *b, char *error);

/* blk_req.c */
bool blk_queue_ready(const struct mc_blk *b, const struct blk_queue *q);
bool blk_queue_poll(struct mc_blk *b, struct blk_queue *q);
void blk_req_finish(struct mc_blk *b, struct blk_req *r);
void blk_req_begin(struct mc_blk *b, struct blk_req *r);
void blk_req_refuse(struct mc_blk *b, struct blk_req *r, uint8_t status);
void blk_req_complete(struct mc_blk *b, struct blk_req *r, uint8_t status, uint32_t in_len);

/* blk_inject.c. Whether the request fails or waits, instead of being begun now. */
bool blk_inject(struct mc_blk *b, struct blk_req *r);
/* Goes on with those whose time has come, or with all. */
void blk_inject_due(struct mc_blk *b, bool all);
/* Nanoseconds until the first one's time comes; there is one. */
uint64_t blk_inject_wait(const struct mc_blk *b);

/* blk_io.c */
void blk_io_begin(struct mc_blk *b, struct blk_req *r);
void blk_io_step(struct mc_blk *b, struct blk_req *r);
void blk_io_wake(struct mc_blk *b);

/* blk_flush.c: r is finished when all that was completed before this call is permanent. */
void blk_flush_add(struct mc_blk *b, struct blk_req *r);

/* blk_overlay.c */
int blk_overlay_open(struct mc_blk *b, char *error);
void blk_overlay_close(struct mc_blk *b);
/* The state of the block at a disk offset, and in *len, at most as given, the bytes from there in the same state. */
enum blk_state blk_overlay_run(const struct mc_blk *b, uint64_t off, uint64_t *len);
/* The file that has the block at a disk offset, or FILE_NONE for zeroes, and the bytes from there that it has. */
uint8_t blk_overlay_place(const struct mc_blk *b, uint64_t off, uint64_t *len);
/* Sets all blocks that lie wholly in the range; the disk's last block may be short. */
void blk_overlay_mark(struct mc_blk *b, uint64_t off, uint64_t len, enum blk_state state);
bool blk_overlay_has_data(const struct mc_blk *b, uint64_t off, uint64_t len);
int blk_overlay_sync(struct mc_blk *b);

extern const struct blk_engine blk_uring, blk_sync;

static inline void blk_submit(struct mc_blk *b, struct blk_op *op)
{
	b->inflight++;
	MC_TRACE(b->p.watch, MC_EV_SUBMIT, op->req ? op->req->q->vq.index : MC_NO_QUEUE, op->req ? op->req->head : UINT16_MAX,
		 op->len, op->off);
	b->engine->submit(b, op);
}

/* For the engines: an op has ended, as a system call would have. */
static inline void blk_ended(struct mc_blk *b, struct blk_op *op, int64_t res)
{
	b->inflight--;
	MC_TRACE(b->p.watch, MC_EV_COMPLETE, op->req ? op->req->q->vq.index : MC_NO_QUEUE, op->req ? op->req->head : UINT16_MAX,
		 op->len, res);
	op->done(b, op, res);
}

#endif
