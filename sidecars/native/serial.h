/*
 * The serial sidecar's data loop. Everything that the guest prints is appended to one scrollback ring, counted
 * by a 64-bit position that never wraps. Whoever reads it (a console client, the backend) is a sink: a
 * descriptor and a position. A sink that stops reading falls behind, and when its position has left the ring
 * it skips ahead with a note that says by how much. So nothing is queued per client, no client can hold up the
 * guest or another client, and a late client's history and its live bytes are one stream with one position.
 *
 * Input goes the other way through one small staging buffer. While the guest has no room for what is in it, no
 * source is read: the back-pressure is the source's own socket or terminal buffer.
 *
 * A loop that holds (mc_serial_quiesce) takes nothing from the guest and reads no source; sinks are still written to.
 */
#ifndef MC_SERIAL_H
#define MC_SERIAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "uart_ring.h"
#include "virtqueue.h"

#define MC_SERIAL_CLIENTS 16
#define MC_SERIAL_STAGE 4096
/* Input that may be on its way: what was read from a source, and what is in the 16550's ring. Always at most this, since
 * no source is read before the stage is empty. */
#define MC_SERIAL_INPUT (MC_SERIAL_STAGE + MC_UART_RX_SIZE)
#define MC_SERIAL_HISTORY 65536u	/* bytes of the scrollback that a snapshot has */
#define MC_SERIAL_BATCH 65536		/* bytes taken from the guest between two looks at the sinks */
#define MC_SCROLL_MIN (256u << 10)	/* what a sink may lag behind, even with no scrollback asked for */

enum mc_serial_backend { MC_SERIAL_NONE, MC_SERIAL_PTY, MC_SERIAL_SOCKET, MC_SERIAL_FILE };

/* What happened on the data thread since mc_serial_notices() was last called. */
enum mc_serial_notice {
	MC_SERIAL_FILE_FAILED = 1,	/* the log file cannot be written now: mc_serial_stats.file_errno */
	MC_SERIAL_FILE_RECOVERED = 2,
	MC_SERIAL_BACKEND_OPENED = 4,	/* somebody opened the terminal or connected to the socket */
	MC_SERIAL_BACKEND_CLOSED = 8,
	MC_SERIAL_RING_HOSTILE = 16,	/* the core published positions that cannot be */
	MC_SERIAL_QUEUE_BROKEN = 32,
	MC_SERIAL_CLIENTS_FULL = 64,	/* a console client was turned away */
	MC_SERIAL_ACCEPT_FAILED = 128,	/* mc_serial_stats.accept_errno */
};

struct mc_serial_config {
	int backend;			/* enum mc_serial_backend */
	int backend_fd;			/* pty master, listening socket or file; -1 without a backend */
	int watch_fd;			/* of mc_serial_watch_pty, for a pty */
	int console_fd;			/* listening unix stream socket; -1: none */
	int event_fd;			/* eventfd signalled with every notice; not owned */
	uint64_t scrollback;		/* bytes that a late client is shown */
	int ring_fd;			/* struct mc_uart_ring; -1: a virtio console */
	int uart_tx_fd, uart_rx_fd;	/* eventfds, core to sidecar and back; not owned */
	void *keep;			/* mc_serial_keep_size(scrollback) bytes that outlive this process; NULL: none do */
	uint64_t keep_size;
};

struct mc_serial_stats {
	uint64_t guest_out, guest_in;	/* bytes */
	uint64_t skipped;		/* bytes that slow clients and the backend never saw, summed over them */
	uint64_t clients_total, clients_refused;
	uint64_t hostile;		/* impossible ring positions seen */
	uint64_t file_written, file_errors, file_skipped;
	uint32_t clients;		/* attached now */
	int32_t file_errno;		/* 0: the last write succeeded */
	int32_t accept_errno;
};

/* Input that was read and that the guest has not taken. */
struct mc_stage {
	uint32_t off, len;
	uint8_t data[MC_SERIAL_INPUT];
};

/*
 * What a console keeps: the scrollback, which is everything that the guest was told is printed, and how far its one
 * lasting reader, the backend, is. Positions are written after what they speak of was done, so that the backend may be
 * given some bytes twice and never lacks one; a file's own size says how far its writer really was.
 */
struct mc_serial_keep {
	uint64_t cap;			/* of the scrollback behind this; 0: nobody was here yet */
	uint64_t end, loaded;		/* struct mc_scroll */
	uint64_t backend_pos, backend_skipped;
	/* How far the file's writer was, and how large a regular file was then (-1: unknown): the present one of two. */
	struct { uint64_t pos; int64_t size; } file[2];
	uint32_t file_now;
	/* Two places that `end` alone moves on from, so that no byte of the guest's is taken twice: where the chain with this
	 * counter (inflight.h) began, and the distance of the 16550's position in its ring (modulo 2^32), where it is known. */
	uint64_t chain, chain_at;
	uint32_t uart_base, uart_based;
	struct mc_stage stage;
};
#define MC_SERIAL_KEEP 16384		/* where the scrollback begins */
_Static_assert(sizeof(struct mc_serial_keep) <= MC_SERIAL_KEEP, "a console's positions and input");

/* The scrollback ring. Appended to by the data thread alone. */
struct mc_scroll {
	uint8_t *buf;
	uint64_t cap;			/* power of two */
	uint64_t history;		/* what a new client is shown, no more than cap */
	uint64_t end;			/* position after the last byte */
	uint64_t *kept_end;		/* the same, for a successor */
	uint64_t own_end;		/* where that is, when there will be none */
	bool kept;			/* buf is not ours alone */
	uint64_t loaded;		/* bytes at its beginning that another process appended */
	bool shared;			/* the file thread reads it too: lock around every change */
	pthread_mutex_t lock;
	pthread_cond_t grown;
};

/* Bytes that the scrollback takes for so much history. */
uint64_t mc_scroll_cap(uint64_t history);
/* keep: of mc_serial_config; with a predecessor's scrollback in it, or not. EINVAL: what it left cannot be. */
int mc_scroll_init(struct mc_scroll *sc, uint64_t history, bool shared, struct mc_serial_keep *keep);
void mc_scroll_deinit(struct mc_scroll *sc);
void mc_scroll_append(struct mc_scroll *sc, const uint8_t *data, uint64_t len);
/* Two pieces as one: a successor finds both, or none. */
void mc_scroll_append2(struct mc_scroll *sc, const uint8_t *data, uint64_t len, const uint8_t *more, uint64_t more_len);
/* Appends what another process had; a reader whose position is *reader is not shown it. */
void mc_scroll_load(struct mc_scroll *sc, const uint8_t *data, uint64_t len, uint64_t *reader);
/* Bytes that a client who attaches now is shown. */
uint64_t mc_scroll_shown(const struct mc_scroll *sc);
/* The bytes from pos to the end, as one or two pieces of at most max in all; pos must still be in the ring. */
int mc_scroll_peek(const struct mc_scroll *sc, uint64_t pos, uint64_t max, struct iovec iov[2]);
/* Where a reader at pos goes on: pos, or a later line if pos has left the ring. */
uint64_t mc_scroll_resume(const struct mc_scroll *sc, uint64_t pos);
/* Formats the note about skipped bytes; returns its length. */
int mc_scroll_note(char note[64], uint64_t skipped);

struct mc_sink {
	int fd;				/* -1: a free slot */
	bool is_socket;
	bool writing;			/* false: the peer reads no more */
	bool reading;			/* in the input epoll */
	bool blocked;			/* waits for EPOLLOUT */
	bool watched;			/* in the main epoll */
	uint32_t events;		/* what it is watched for there */
	uint64_t pos;			/* next byte to write */
	uint64_t skipped;		/* not yet told by a note */
	char note[64];
	uint8_t note_len, note_off;
};

/* The file backend's own thread: a regular file is always ready for poll(2) and may still block for long. */
struct mc_file {
	int fd;				/* -1: no file backend */
	pthread_t thread;
	bool started;
	bool stop;			/* under the scrollback's lock */
	uint64_t pos;			/* next byte to write; the thread's own */
	bool regular;			/* its size says what was written */
	uint8_t buf[65536];
};

struct mc_serial;

/* The guest's side of the loop: the 16550's rings or two virtqueues. */
struct mc_front {
	/* Appends at most MC_SERIAL_BATCH bytes of the guest's output. Returns the bytes; more: try again at once. */
	uint64_t (*output)(struct mc_serial *s, bool *more);
	/* Gives the guest what it has room for. Returns the bytes taken; when not all were, the front has asked for
	 * a wake-up and the loop will call again. */
	uint32_t (*input)(struct mc_serial *s, const uint8_t *data, uint32_t len);
	/* Before the loop blocks: asks for wake-ups. false: there is output already. */
	bool (*may_sleep)(struct mc_serial *s);
	/* Before the loop holds: takes at most MC_SERIAL_BATCH of what must not be left half done, or in a ring that is
	 * no guest memory. true: there is more. */
	bool (*settle)(struct mc_serial *s);
	/* The input that the guest has been given and has not taken, without taking it back. Returns the bytes. */
	uint32_t (*pending)(struct mc_serial *s, uint8_t data[MC_UART_RX_SIZE]);
	/* Takes that back. While the loop holds, and whoever gives it to the guest stands still as well. */
	void (*forget)(struct mc_serial *s);
};

struct mc_uart {
	struct mc_uart_ring *ring;
	uint32_t tx_tail, rx_head;	/* ours, kept here because the core can write to the shared ones */
	int tx_fd, rx_fd;
};

struct mc_console {
	struct mc_vq rx, tx;
	bool attached;
	/* A chain that is larger than a batch is taken in pieces. */
	struct mc_chain chain;
	bool chain_held;
	uint64_t chain_counter;		/* of the one held, in the in-flight region */
	uint32_t chain_i;
	uint64_t chain_off;
	struct iovec rx_iov[MC_MAX_QUEUE_SIZE], tx_iov[MC_MAX_QUEUE_SIZE];
};

struct mc_serial {
	struct mc_serial_config cfg;
	struct mc_scroll scroll;
	const struct mc_front *front;
	struct mc_uart uart;
	struct mc_console con;
	struct mc_file file;
	int ep, in_ep;			/* the loop's epoll, and the sources' that is inside it while input is wanted */
	bool in_armed;
	int64_t accept_at;		/* accept(2) failed for want of something: when to try again; 0: it did not */
	int wake_fd;			/* eventfd: a command, or stop */
	int watch_fd;			/* cfg's, once it is polled; -1: not a pty */
	struct mc_sink sinks[1 + MC_SERIAL_CLIENTS];	/* 0 is the backend */
	struct mc_serial_keep *keep, own_keep;
	struct mc_stage *stage;		/* keep's */
	struct mc_beat beat;
	struct mc_serial_stats stats;	/* written by the data thread; file_* by the file thread */
	atomic_uint notices;
	atomic_bool stop;
	bool held;			/* the loop's, under cmd_lock */

	/* Commands of the main thread, which waits until the loop has done them. */
	pthread_mutex_t cmd_lock;
	pthread_cond_t cmd_done;
	bool running;
	int cmd;
	bool cmd_has_rx, cmd_has_tx;
	struct mc_vq cmd_rx, cmd_tx;
	uint8_t cmd_byte;
	struct mc_serial_state *cmd_state;
	int cmd_error;
};

/* What a snapshot has of a console. */
struct mc_serial_state {
	uint32_t input_len, history_len;
	uint8_t input[MC_SERIAL_INPUT];		/* typed, and not yet taken by the guest */
	uint8_t history[MC_SERIAL_HISTORY];	/* the end of what a client who attaches is shown */
};

/* Bytes to be kept for a console with so much scrollback. */
uint64_t mc_serial_keep_size(uint64_t scrollback);
struct mc_beat *mc_serial_beat(struct mc_serial *s);
/* An inotify descriptor that is readable when somebody has opened the terminal, which the kernel does not tell its master:
 * the caller's to close. It takes a path, which a sidecar has none of: whoever opens the pty calls it. Or -errno. */
int mc_serial_watch_pty(int master);

/* NULL with errno set. Copies cfg; takes ownership of backend_fd, watch_fd and console_fd only when it succeeds. */
struct mc_serial *mc_serial_new(const struct mc_serial_config *cfg);
/* After run has returned or was never called. Flushes the file for at most two seconds; returns 0, or an errno when
 * bytes of the log file could not be written. */
int mc_serial_free(struct mc_serial *s);
/* The loop: returns after mc_serial_stop, with the guest's last bytes drained and offered to every sink. 0 or an errno. */
int mc_serial_run(struct mc_serial *s);
void mc_serial_stop(struct mc_serial *s);
/* A driver's queues, either of which may be NULL; copied. Output and input follow from the next turn. Any thread. */
void mc_serial_attach(struct mc_serial *s, const struct mc_vq *rx, const struct mc_vq *tx);
/* Returns when neither queue will be touched again and no interrupt raised. Staged input is kept for the next driver. */
void mc_serial_detach(struct mc_serial *s);
/* Returns when the loop holds: what the guest had printed is in the scrollback (a virtio console: the chain in hand is), no
 * queue or ring will be touched, no interrupt raised and no source read. Also before the loop was entered. */
void mc_serial_quiesce(struct mc_serial *s);
/* The loop goes on; it looks at every queue and ring once. */
void mc_serial_resume(struct mc_serial *s);
/* While it holds. load: the input takes the place of what the guest had not taken; the history is for a console that has none.
 * EBUSY when it does not hold, EINVAL for lengths that cannot be. */
void mc_serial_save(struct mc_serial *s, struct mc_serial_state *state);
int mc_serial_load(struct mc_serial *s, const struct mc_serial_state *state);
/* virtio 1.2, section 5.3.4: emergency write. Any thread. */
void mc_serial_emergency(struct mc_serial *s, uint8_t byte);
const struct mc_vq *mc_serial_queue(const struct mc_serial *s, int index);
unsigned mc_serial_notices(struct mc_serial *s);
void mc_serial_get_stats(struct mc_serial *s, struct mc_serial_stats *out);

/* Between the parts of the loop. */
void mc_serial_notice(struct mc_serial *s, unsigned notices);

enum { MC_TAG_WAKE = 1, MC_TAG_GUEST, MC_TAG_LISTEN, MC_TAG_BACKEND_LISTEN, MC_TAG_WATCH, MC_TAG_INPUT,
       MC_TAG_KICK_RX, MC_TAG_KICK_TX, MC_TAG_SINK };
int64_t mc_now_ms(void);
int mc_epoll_set(int ep, int op, int fd, uint32_t events, uint64_t tag);

int mc_sinks_init(struct mc_serial *s);
void mc_sinks_deinit(struct mc_serial *s);
bool mc_sinks_flush(struct mc_serial *s);	/* true: some sink can take more at once */
void mc_sinks_drain(struct mc_serial *s);	/* before the end: waits, not for long, for those that still read */
void mc_sink_event(struct mc_serial *s, uint32_t index, uint32_t events);
bool mc_sinks_accept(struct mc_serial *s, bool backend);	/* true: there may be more in the backlog */
void mc_sinks_accept_again(struct mc_serial *s);
void mc_sinks_reopened(struct mc_serial *s);
bool mc_sinks_input(struct mc_serial *s);	/* true: there may be more at once */
bool mc_serial_feed(struct mc_serial *s);	/* the stage to the guest; true: it is empty now */
void mc_input_arm(struct mc_serial *s, bool wanted);

void mc_file_keep(struct mc_serial *s);		/* for a successor; under the scrollback's lock */
void mc_file_take_over(struct mc_serial *s);	/* where the file really ends */
int mc_file_start(struct mc_serial *s);
int mc_file_stop(struct mc_serial *s);

int mc_uart_init(struct mc_serial *s);
void mc_uart_deinit(struct mc_serial *s);
void mc_uart_resumed(struct mc_serial *s);
void mc_uart_rebase(struct mc_serial *s);	/* the scrollback has got bytes that are not from the ring */
extern const struct mc_front mc_uart_front;
extern const struct mc_front mc_console_front;
void mc_console_attach(struct mc_serial *s, const struct mc_vq *rx, const struct mc_vq *tx);
void mc_console_detach(struct mc_serial *s);

#endif
