/*
 * What others may see of a sidecar while it works: counters of its queues, and a ring of events. It lies in a memfd
 * that the supervisor makes, maps into nothing of its own, and keeps over the sidecar's death: a replacement counts on.
 *
 * Nobody is asked and no message is sent: whoever has the descriptor reads. So a sidecar that hangs can be looked at, too.
 * The layout is also in proto/watch.py, and tests/device/test_watch.py holds the two together.
 *
 * Events cost one load and one branch of a word that never changes as long as nobody wants any (MC_TRACE).
 */
#ifndef MC_WATCH_H
#define MC_WATCH_H

#include <stdbool.h>
#include <stdint.h>

#define MC_WATCH_VERSION 1
#define MC_WATCH_QUEUES 64
#define MC_WATCH_RING 32768u		/* events; a power of two */
#define MC_WATCH_RING_AT 36864u		/* bytes from the start */
#define MC_WATCH_SIZE (MC_WATCH_RING_AT + MC_WATCH_RING * 32u)
#define MC_NO_QUEUE 255		/* mc_trace_event.queue of what is done for no queue's sake */
#define MC_LATENCY_BUCKETS 40		/* the last takes what is longer: 2^39 ns are nine minutes */

/* Of one queue. Written by the data loop only; others may read a value that is about to change, but none that never was. */
struct mc_vq_stats {
	uint64_t requests;		/* chains completed */
	uint64_t bytes_in, bytes_out;	/* from and to the guest */
	uint64_t errors;		/* requests answered with an error */
	uint64_t kicks;			/* wake-ups by the guest */
	uint64_t interrupts, suppressed;	/* raised; and spared the guest by EVENT_IDX or NO_INTERRUPT */
	uint64_t taken;			/* chains taken out of the avail ring, without those that were given back */
	uint64_t in_flight;		/* taken and not yet answered, now */
	uint64_t last_avail;		/* where the next one is taken, as in struct mc_vq */
	uint64_t latency_ns;		/* sum over all that the histogram counts */
	uint64_t latency[MC_LATENCY_BUCKETS];	/* from take to push: bucket n counts 2^n to 2^(n+1) - 1 ns; 0 with the first */
	uint64_t reserved[13];		/* 512 bytes in all */
};

enum mc_event {
	MC_EV_TAKE,			/* a chain was taken; len: bytes that the guest gives */
	MC_EV_PUSH,			/* and answered; len: bytes that the guest gets, arg: nanoseconds since it was taken */
	MC_EV_KICK,			/* the guest's notification arrived */
	MC_EV_INTERRUPT,		/* the guest was interrupted; arg: the used index */
	MC_EV_SUBMIT,			/* work for the host was begun; arg: offset in the file, len: bytes */
	MC_EV_COMPLETE,			/* and has ended; arg: as the system call's result */
	MC_EV_ERROR,			/* a request failed (arg: errno, len: what the guest is told), or the queue broke (arg: enum mc_vq_error, head: 0xffff) */
	MC_EVENTS,
};

struct mc_trace_event {
	uint64_t seq;			/* its number, from 1, and written last; else the slot is being written */
	uint64_t ns;			/* CLOCK_MONOTONIC: one clock for all processes, without calibration */
	uint64_t arg;
	uint32_t len;
	uint16_t head;
	uint8_t queue;
	uint8_t kind;			/* enum mc_event */
};

struct mc_watch {
	uint32_t version;
	uint32_t on;			/* bit n: enum mc_event n is recorded, for the supervisor's clients; bit 16+n: by QMP */
	uint8_t pad0[56];
	uint64_t next;			/* events recorded so far; alone in its cache line, since `on` is read all the time */
	uint8_t pad1[440];
	struct mc_vq_stats queues[MC_WATCH_QUEUES];	/* at 512 */
};

/* For queues that nobody watches. */
extern struct mc_watch mc_watch_nobody;

uint64_t mc_watch_now(void);
/* Records an event that somebody wants. Any thread. */
void mc_watch_record(struct mc_watch *w, enum mc_event kind, uint16_t queue, uint16_t head, uint32_t len, uint64_t arg);

static inline bool mc_watch_wants(const struct mc_watch *w, enum mc_event kind)
{
	/* Relaxed: an event more or less when it is switched does not matter. */
	return __builtin_expect(__atomic_load_n(&w->on, __ATOMIC_RELAXED) & (0x00010001u << kind), 0);
}

/* The arguments are evaluated only if the event is wanted. */
#define MC_TRACE(w, kind, queue, head, len, arg) \
	do { \
		if (mc_watch_wants((w), (kind))) \
			mc_watch_record((w), (kind), (queue), (head), (len), (arg)); \
	} while (0)

#endif
