#define MC_KEEP_VERSION ...
#define MC_KEEP_QUEUES ...
#define MC_KEEP_QUEUE ...
struct mc_inflight_desc { uint8_t inflight; uint16_t len_low, len_high, next; uint64_t counter; ...; };
struct mc_inflight {
	uint64_t features;
	uint16_t version, desc_num, last_batch_head, used_idx;
	struct mc_inflight_desc desc[...];
	uint16_t next_used;
	...;
};
struct mc_keep { uint32_t version, queues; uint64_t activation; uint8_t kind[...]; ...; };
struct mc_inflight *mc_keep_queue(struct mc_keep *keep, uint32_t index);
bool mc_keep_activate(struct mc_keep *keep, uint64_t activation);
void mc_keep_activated(struct mc_keep *keep, uint64_t activation);
struct mc_beat { uint32_t asked, seen; int wake_fd, event_fd; ...; };
void mc_beat_ask(struct mc_beat *beat);
bool mc_beat_heard(const struct mc_beat *beat);
