#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int mc_uffd_open(int device_fd)
{
	/* What we need; a kernel that does not know it says EINVAL. EVENT_REMOVE is the balloon's (balloon.h): nobody else
	 * discards pages, so for nobody else it means anything. */
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_EVENT_REMOVE};
	const int flags = O_CLOEXEC | O_NONBLOCK;
	int fd = device_fd >= 0 ? ioctl(device_fd, USERFAULTFD_IOC_NEW, flags) : (int)syscall(SYS_userfaultfd, flags);

	if (fd < 0)
		return -errno;
	if (ioctl(fd, UFFDIO_API, &api) < 0) {
		int err = errno;

		close(fd);
		return -err;
	}
	return fd;
}

int mc_uffd_register(int uffd, uint64_t address, uint64_t size)
{
	struct uffdio_register reg = {.range = {address, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	const uint64_t needed = 1ull << _UFFDIO_COPY | 1ull << _UFFDIO_ZEROPAGE | 1ull << _UFFDIO_WAKE;

	if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
		return -errno;
	return (reg.ioctls & needed) == needed ? 0 : -EOPNOTSUPP;
}
