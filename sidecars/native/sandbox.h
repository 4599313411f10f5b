/*
 * What a process gives up: first what it needs no more once its memory is mapped (mc_sandbox_enter), then every system
 * call but those of its role's list (mc_sandbox_close). docs/sandbox.md says what that leaves.
 */
#ifndef MC_SANDBOX_H
#define MC_SANDBOX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {	/* of mc_sandbox_enter, in *had */
	MC_SANDBOX_USER = 1 << 0,
	MC_SANDBOX_MOUNT = 1 << 1,	/* with an empty root */
	MC_SANDBOX_IPC = 1 << 2,
	MC_SANDBOX_UTS = 1 << 3,
	MC_SANDBOX_NET = 1 << 4,
	MC_SANDBOX_LANDLOCK = 1 << 5,
};

struct mc_sandbox_limits {
	uint64_t files;		/* RLIMIT_NOFILE */
	uint64_t threads;	/* RLIMIT_NPROC, where the user namespace makes it this process's own */
	bool names;		/* it makes and removes sockets in a directory that it has open: not for Landlock to forbid */
};

/* Namespaces of its own (user, mount with an empty root, ipc, uts, net), Landlock, resource limits, no_new_privs, no
 * capability, no core dumps (which would hold guest data). What the kernel refuses of the namespaces and of Landlock is
 * left out and not in *had; the rest are errors. Call it before any other thread exists: most of it is per thread.
 * Returns 0, or the errno of the step in *step. */
int mc_sandbox_enter(const struct mc_sandbox_limits *limits, unsigned *had, const char **step);

struct mc_sandbox_words {	/* what is said when the filter catches a call; all memory must outlive the process */
	const char *names;	/* of system calls, `width` bytes each, padded with NULs */
	uint32_t count, width;
	const char *role;	/* a JSON string, quotes included */
	char *life;		/* a Life message whose reason ends with `life_room` bytes of padding at `life_at` */
	uint32_t life_size, life_at, life_room;
	int life_fd;		/* where it is sent; -1: nowhere */
	int log_fd;
};

/* Installs a filter (struct sock_filter, `bytes` in all) for all threads, and the handler that names what it catches: a
 * JSON line on log_fd, the message on life_fd, and the exit status MC_SANDBOX_STATUS. A thread that blocks SIGSYS is ended
 * by it, with its process, and nothing is said. Returns 0, or the errno of the step in *step. */
int mc_sandbox_close(const void *filter, size_t bytes, const struct mc_sandbox_words *words, const char **step);

#define MC_SANDBOX_STATUS 159	/* as a shell shows a death by SIGSYS */

/* Whether this is a build with a sanitizer, whose reports need calls that no filter would let through. */
bool mc_sandbox_sanitized(void);

#endif
