#define MC_QUEUES_MAX ...
#define MC_QUEUES_STOPPED ...
#define MC_QUEUES_REFUSED ...
#define MC_QUEUES_LATER ...
struct iovec { ...; };
typedef int64_t (*mc_queues_handler)(void *opaque, uint32_t queue, const struct iovec *iov, uint32_t n_out, uint32_t n_in);
struct mc_queues;
struct mc_queues *mc_queues_new(uint32_t n, int event_fd, mc_queues_handler handler, void *opaque);
void mc_queues_free(struct mc_queues *s);
int mc_queues_attach(struct mc_queues *s, uint32_t index, const struct mc_vq *vq);
void mc_queues_detach(struct mc_queues *s);
struct mc_beat *mc_queues_beat(struct mc_queues *s);
const struct mc_vq *mc_queues_at(const struct mc_queues *s, uint32_t index);
int mc_queues_next(struct mc_queues *s);
uint64_t mc_queues_readable(const struct mc_queues *s);
uint64_t mc_queues_writable(const struct mc_queues *s);
size_t mc_queues_read(const struct mc_queues *s, uint64_t off, void *buf, size_t len);
size_t mc_queues_write(struct mc_queues *s, const void *buf, size_t len);
void mc_queues_done(struct mc_queues *s);
void mc_queues_refuse(struct mc_queues *s);
void mc_queues_later(struct mc_queues *s, uint64_t nanoseconds);
void mc_queues_wake(struct mc_queues *s);
void mc_queues_stop(struct mc_queues *s);
