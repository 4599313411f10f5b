#define MC_VHOST_MAX_QUEUES ...
enum mc_vhost_event {
	MC_VHOST_STOPPED,
	MC_VHOST_WOKEN,
	MC_VHOST_CONNECTION,
	MC_VHOST_TIMEOUT,
	MC_VHOST_BROKEN,
	...
};
#define MC_VHOST_ACCOUNT ...
struct mc_vhost;
struct mc_vhost *mc_vhost_new(uint32_t n);
void mc_vhost_free(struct mc_vhost *s);
int mc_vhost_attach(struct mc_vhost *s, uint32_t index, const struct mc_vq *vq, void *account, bool again);
void mc_vhost_detach(struct mc_vhost *s);
const struct mc_vq *mc_vhost_at(const struct mc_vhost *s, uint32_t index);
int mc_vhost_call_fd(const struct mc_vhost *s, uint32_t index);
int mc_vhost_error_fd(const struct mc_vhost *s, uint32_t index);
int mc_vhost_watch(struct mc_vhost *s, uint32_t which, int fd);
enum mc_vhost_event mc_vhost_next(struct mc_vhost *s, int milliseconds);
void mc_vhost_flush(struct mc_vhost *s);
void mc_vhost_interrupt_all(struct mc_vhost *s);
void mc_vhost_wake(struct mc_vhost *s);
void mc_vhost_stop(struct mc_vhost *s);
uint16_t mc_vhost_avail_idx(const struct mc_vhost *s, uint32_t index);
uint16_t mc_vhost_used_idx(const struct mc_vhost *s, uint32_t index);
uint16_t mc_vhost_uncounted(const struct mc_vhost *s, uint32_t index);
void mc_vhost_begin(struct mc_vhost *s, uint32_t index, uint16_t last_avail, uint16_t used_idx);
int mc_vhost_recover(struct mc_vhost *s, uint32_t index);
void mc_vhost_take_log(const struct mc_mem *mem, uint64_t *vhost_log, uint64_t words);
void mc_vhost_mark_all(const struct mc_mem *mem);
