#define MC_RAM_CHUNK ...
#define MC_RAM_GUEST ...
#define MC_RAM_TARGET ...
#define MC_RAM_BASE ...
#define MC_RAM_STASH ...

struct mc_ram {
	int memfd, fd;
	uint64_t start;
	uint64_t size;
	uint8_t *layers;
	uint32_t *sums;
	const int *bases;
	uint32_t base_count;
	const uint8_t *base_layers;
	const uint32_t *base_sums;
	uint32_t cancel;
	uint64_t total, done;
	uint64_t written;
	uint32_t place;
	uint64_t stash_count;
	...;
};

int mc_ram_init(struct mc_ram *ram);
void mc_ram_deinit(struct mc_ram *ram);
int mc_ram_write_all(struct mc_ram *ram);
int mc_ram_write_dirty(struct mc_ram *ram, const uint64_t *dirty);
int mc_ram_stash(struct mc_ram *ram, const uint64_t *dirty);
int mc_ram_write_stash(struct mc_ram *ram);
int64_t mc_ram_verify(const int *files, uint32_t count, uint64_t start, uint64_t size, const uint8_t *layers,
		      const uint32_t *sums, uint64_t first, uint64_t end);
void mc_dirty_take(uint64_t *log, uint64_t *dirty, uint64_t words);
void mc_dirty_merge(const uint64_t *from, uint64_t *dirty, uint64_t words);
uint64_t mc_dirty_count(const uint64_t *dirty, uint64_t words);
