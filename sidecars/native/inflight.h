/*
 * What a sidecar leaves to its successor: one memfd a device, made and kept by the supervisor, written by whoever serves
 * the device. A header page, then a region for each queue that says which descriptor heads are in the device's hands, then
 * what the kind keeps.
 *
 * A queue's region is the split-ring layout of vhost-user's GET_INFLIGHT_FD (QueueRegionSplit and DescStateSplit in QEMU's
 * docs/interop/vhost-user.rst), with two additions. A head that was answered but not published yet is MC_HEAD_DONE, with
 * its used length, so that a successor publishes the answer and does not do the work twice. And next_used is the used
 * index that is about to be published, so that a used.idx in guest memory which is neither this nor used_idx is known to
 * be the guest's own doing.
 *
 * Whoever reads this reads what a process that may have been taken over left behind: everything is bounded.
 *
 * Order. Writer and reader are never there at the same time: the reader is started after the kernel has reported the
 * writer's end. A process that is killed has done all of its stores up to one instruction and none behind it, and all of
 * them are visible to whoever is started later. So no fence of the processor's is needed between stores to this memory,
 * and only the compiler must keep them in order: mc_in_order().
 */
#ifndef MC_INFLIGHT_H
#define MC_INFLIGHT_H

#include <stdbool.h>
#include <stdint.h>

#define MC_KEEP_VERSION 1
#define MC_KEEP_QUEUES 4096u		/* where the first queue's region is */
#define MC_KEEP_QUEUE 20480u		/* bytes of each */
#define MC_INFLIGHT_MAX 1024		/* MC_MAX_QUEUE_SIZE */

enum mc_head { MC_HEAD_FREE, MC_HEAD_TAKEN, MC_HEAD_DONE };

struct mc_inflight_desc {
	uint8_t inflight;		/* enum mc_head */
	uint8_t pad;
	uint16_t len_low, len_high;	/* of MC_HEAD_DONE: what the used entry says */
	uint16_t next;			/* the head answered before this one */
	uint64_t counter;		/* the order in which heads were taken */
};

struct mc_inflight {
	uint64_t features;		/* vhost-user's; 0 */
	uint16_t version;
	uint16_t desc_num;		/* the queue's size; 0: never used */
	uint16_t last_batch_head;
	uint16_t used_idx;		/* what is published, and its heads marked free */
	struct mc_inflight_desc desc[MC_INFLIGHT_MAX];
	uint16_t next_used;		/* what is about to be published */
};

/* The header page. */
struct mc_keep {
	uint32_t version;		/* MC_KEEP_VERSION, or 0: nobody has served the device yet */
	uint32_t queues;		/* how many regions there are room for */
	uint64_t activation;		/* whose positions the regions have: the core's number; 0: nobody's */
	uint8_t kind[3072] __attribute__((aligned(64)));	/* the kind's own */
};

_Static_assert(sizeof(struct mc_inflight_desc) == 16, "as in vhost-user");
_Static_assert(sizeof(struct mc_inflight) <= MC_KEEP_QUEUE, "a region holds the largest queue");
_Static_assert(sizeof(struct mc_keep) <= MC_KEEP_QUEUES, "the header is one page");

#ifdef MC_CRASH_POINTS
void mc_crash_point(void);		/* a test's, which does not always return: device/native/recover_test.c */
#else
static inline void mc_crash_point(void) { }
#endif

static inline void mc_in_order(void)
{
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	mc_crash_point();
}

/* The region of a queue; NULL where there is none. */
struct mc_inflight *mc_keep_queue(struct mc_keep *keep, uint32_t index);
/* A set-up of the driver's begins. True: it is the one that the regions have positions of, so they are to be recovered.
 * False: they mean nothing from here on, until mc_keep_activated(). activation 0 is always a new one. */
bool mc_keep_activate(struct mc_keep *keep, uint64_t activation);
/* Every queue's region is that of this activation. */
void mc_keep_activated(struct mc_keep *keep, uint64_t activation);

/*
 * The data loop's sign of life. The main thread asks; the loop, which is woken for it, answers from where it takes its next
 * turn, and has the main thread told. A loop that hangs in a request, or turns without end in one, does not.
 */
struct mc_beat {
	uint32_t asked, seen;
	int wake_fd, event_fd;		/* eventfds, not owned: wakes the loop; wakes the main thread */
};

void mc_beat_ask(struct mc_beat *beat);
bool mc_beat_heard(const struct mc_beat *beat);
/* The loop, at each turn. */
void mc_beat(struct mc_beat *beat);

#endif
