#define MC_SANDBOX_USER ...
#define MC_SANDBOX_MOUNT ...
#define MC_SANDBOX_IPC ...
#define MC_SANDBOX_UTS ...
#define MC_SANDBOX_NET ...
#define MC_SANDBOX_LANDLOCK ...
#define MC_SANDBOX_STATUS ...

struct mc_sandbox_limits {
	uint64_t files;
	uint64_t threads;
	bool names;
};
int mc_sandbox_enter(const struct mc_sandbox_limits *limits, unsigned *had, const char **step);

struct mc_sandbox_words {
	const char *names;
	uint32_t count, width;
	const char *role;
	char *life;
	uint32_t life_size, life_at, life_room;
	int life_fd;
	int log_fd;
};
int mc_sandbox_close(const void *filter, size_t bytes, const struct mc_sandbox_words *words, const char **step);
bool mc_sandbox_sanitized(void);
