#define MC_BALLOON_PAGE ...
#define MC_BALLOON_MAX_PFNS ...
#define MC_BALLOON_TAGS ...
struct mc_balloon;
struct mc_balloon_counters {
	uint64_t inflated, deflated, reported, discarded, outside, kept, failed, statistics;
	...;
};
struct mc_balloon *mc_balloon_new(const struct mc_mem *mem, uint64_t *discarded, uint64_t page, int event_fd);
void mc_balloon_start(struct mc_balloon *b, bool statistics, bool reporting);
void mc_balloon_reset(struct mc_balloon *b);
void mc_balloon_poison(struct mc_balloon *b, uint32_t value);
void mc_balloon_ask(struct mc_balloon *b);
uint32_t mc_balloon_statistics(struct mc_balloon *b, uint64_t *values);
void mc_balloon_count(const struct mc_balloon *b, struct mc_balloon_counters *out);
int mc_balloon_timer(uint32_t seconds);
int64_t mc_balloon_handle(void *opaque, uint32_t queue, const struct iovec *iov, uint32_t n_out, uint32_t n_in);
