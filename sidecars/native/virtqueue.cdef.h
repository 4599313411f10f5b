struct mc_region { uint64_t gpa; uint64_t size; uint8_t *hva; uint64_t offset; ...; };
struct mc_mem { uint32_t n; struct mc_region regions[...]; uint64_t *dirty; ...; };
struct mc_isr { uint32_t status; ...; };
struct mc_vq {
	const struct mc_mem *mem;
	struct mc_isr *isr;
	int kick_fd, call_fd;
	uint16_t index;
	uint16_t size;
	bool event_idx, indirect;
	uint16_t last_avail;
	uint16_t used_idx;
	int error;
	struct mc_watch *watch;
	...;
};
int mc_vq_init(struct mc_vq *vq, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used);
const char *mc_vq_strerror(int error);
