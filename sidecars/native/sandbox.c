#include "sandbox.h"

#include <errno.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

int mc_sandbox_enter(const char **step)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};
	const struct rlimit zero = {0, 0};

	*step = "no_new_privs";
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return errno;
	*step = "RLIMIT_CORE";
	if (setrlimit(RLIMIT_CORE, &zero))
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
