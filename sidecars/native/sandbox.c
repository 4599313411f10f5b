/* Namespaces, Landlock, limits and privileges; the filter of system calls is in sandbox_close.c. */
#define _GNU_SOURCE
#include "sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/landlock.h>
#include <malloc.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* --- Namespaces ------------------------------------------------------------------------------------------------- */

static const struct { int flag; unsigned had; } NAMESPACES[] = {
	{CLONE_NEWUSER, MC_SANDBOX_USER}, {CLONE_NEWNS, MC_SANDBOX_MOUNT}, {CLONE_NEWIPC, MC_SANDBOX_IPC},
	{CLONE_NEWUTS, MC_SANDBOX_UTS}, {CLONE_NEWNET, MC_SANDBOX_NET},
};
#define N_NAMESPACES (sizeof(NAMESPACES) / sizeof(*NAMESPACES))

static unsigned unshare_all(void)
{
	int all = 0;
	unsigned had = 0;

	for (unsigned i = 0; i < N_NAMESPACES; i++) {
		all |= NAMESPACES[i].flag;
		had |= NAMESPACES[i].had;
	}
	if (unshare(all) == 0)
		return had;
	/* The user namespace comes first: it gives an unprivileged process the right to make the others. */
	had = 0;
	for (unsigned i = 0; i < N_NAMESPACES; i++)
		had |= unshare(NAMESPACES[i].flag) == 0 ? NAMESPACES[i].had : 0;
	return had;
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd >= 0) {
		/* Refused where an LSM leaves a new user namespace without rights: its ids are then shown as nobody's. */
		(void)!write(fd, text, strlen(text));
		close(fd);
	}
}

/* The ids stay what they were: SO_PEERCRED, by which the core knows its sidecars, goes on as before. */
static void map_ids(uid_t uid, gid_t gid)
{
	char line[64];

	write_file("/proc/self/setgroups", "deny");	/* else the kernel refuses the gid_map */
	snprintf(line, sizeof(line), "%u %u 1", (unsigned)uid, (unsigned)uid);
	write_file("/proc/self/uid_map", line);
	snprintf(line, sizeof(line), "%u %u 1", (unsigned)gid, (unsigned)gid);
	write_file("/proc/self/gid_map", line);
}

/* Descriptors of directories stay usable, and the working directory is the new root. */
static bool empty_root(void)
{
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return false;
	/* Any directory would do; this one was needed for the maps. */
	if (mount("none", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, "size=4k,nr_inodes=1"))
		return false;
	if (chdir("/proc"))
		return false;
	if (syscall(SYS_pivot_root, ".", ".") == 0) {
		if (umount2(".", MNT_DETACH))
			return false;
	} else {
		/* The root is the initial ramfs, which cannot be put away: it stays below the new one, out of reach. */
		if (mount(".", "/", NULL, MS_MOVE, NULL) || chroot("."))
			return false;
	}
	return chdir("/") == 0;
}

static unsigned enter_namespaces(void)
{
	uid_t uid = geteuid();
	gid_t gid = getegid();
	unsigned had = unshare_all();

	if (had & MC_SANDBOX_USER)
		map_ids(uid, gid);
	if ((had & MC_SANDBOX_MOUNT) && !empty_root())
		had &= ~MC_SANDBOX_MOUNT;
	return had;
}

/* --- Landlock --------------------------------------------------------------------------------------------------- */

/* What headers may be too old for (linux/landlock.h): bits 13 and 14 of the file system (ABI 2 and 3: REFER, TRUNCATE), 15
 * (ABI 5: IOCTL_DEV), the network (ABI 4), scopes (ABI 6). */
#define FS_ABI_1 ((1ull << 13) - 1)
#define FS_REFER (1ull << 13)
#define FS_TRUNCATE (1ull << 14)
#define FS_IOCTL_DEV (1ull << 15)
#define NET_TCP 3ull
#define SCOPES 3ull

struct ruleset {
	uint64_t fs, net, scoped;
};

/* A ruleset that handles everything and allows nothing. What is open already is not its business. */
static bool landlock(bool names)
{
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
	struct ruleset rules = {.fs = FS_ABI_1};
	size_t size = sizeof(rules.fs);
	bool done;
	int fd;

	if (abi < 1)
		return false;
	if (names)
		rules.fs &= ~(LANDLOCK_ACCESS_FS_MAKE_SOCK | LANDLOCK_ACCESS_FS_REMOVE_FILE);
	rules.fs |= (abi >= 2 ? FS_REFER : 0) | (abi >= 3 ? FS_TRUNCATE : 0) | (abi >= 5 ? FS_IOCTL_DEV : 0);
	if (abi >= 4) {
		rules.net = NET_TCP;
		size = offsetof(struct ruleset, scoped);
	}
	if (abi >= 6) {
		rules.scoped = SCOPES;
		size = sizeof(rules);
	}
	fd = (int)syscall(SYS_landlock_create_ruleset, &rules, size, 0);
	if (fd < 0)
		return false;
	done = syscall(SYS_landlock_restrict_self, fd, 0) == 0;
	close(fd);
	return done;
}

/* --- Limits and privileges -------------------------------------------------------------------------------------- */

static int limit(int resource, rlim_t most)
{
	struct rlimit now;

	if (getrlimit(resource, &now))
		return -1;
	if (now.rlim_max == RLIM_INFINITY || most < now.rlim_max)
		now.rlim_max = most;
	now.rlim_cur = now.rlim_max;
	return setrlimit(resource, &now);
}

/* One heap for all threads. Before it shrinks the heap that it makes for a thread, the GNU C library looks into
 * /proc/sys/vm/overcommit_memory (malloc/arena.c, check_may_shrink_heap), which would be a violation; and what a process
 * does on its hot paths allocates nothing. */
static void one_heap(void)
{
#ifdef __GLIBC__
	mallopt(M_ARENA_MAX, 1);
#endif
}

int mc_sandbox_enter(const struct mc_sandbox_limits *limits, unsigned *had, const char **step)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};

	one_heap();
	/* A sanitizer's report opens /proc/self/maps. */
	*had = mc_sandbox_sanitized() ? 0 : enter_namespaces();
	*step = "no_new_privs";
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return errno;
	/* After the mounts, which it forbids. */
	if (!mc_sandbox_sanitized() && landlock(limits->names))
		*had |= MC_SANDBOX_LANDLOCK;
	*step = "RLIMIT_CORE";
	if (limit(RLIMIT_CORE, 0))
		return errno;
	*step = "RLIMIT_NOFILE";
	if (limit(RLIMIT_NOFILE, limits->files))
		return errno;
	*step = "RLIMIT_MSGQUEUE";
	if (limit(RLIMIT_MSGQUEUE, 0))
		return errno;
	/* Without a user namespace it would count what else this user runs. */
	*step = "RLIMIT_NPROC";
	if ((*had & MC_SANDBOX_USER) && limit(RLIMIT_NPROC, limits->threads))
		return errno;
	/* The bounding set only matters to an execve that grants something, which no_new_privs forbids already; a process
	 * without CAP_SETPCAP cannot change it (EPERM), and one past the last capability there is none (EINVAL). */
	for (int cap = 0; prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) == 0; cap++)
		;
	*step = "the ambient capabilities";
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
		return errno;
	*step = "the capabilities";
	if (syscall(SYS_capset, &header, none))
		return errno;
	*step = 0;
	return 0;
}

bool mc_sandbox_sanitized(void)
{
#ifdef __SANITIZE_ADDRESS__
	return true;
#else
	return false;
#endif
}
