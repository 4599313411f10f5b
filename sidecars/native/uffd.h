/*
 * The side of a process whose guest memory fills itself: it makes a userfaultfd and registers its mappings of the memfd
 * with it, for pages that are missing; the pager (pager.h) gets the descriptor and answers the faults.
 *
 * Registrations are of one address space. A process that maps the memfd without one reads zeros where a page is not
 * there yet, and nothing of it may be forked afterwards: the child's mapping is not registered. Faults of the kernel
 * itself (KVM's for a vCPU, io_uring's, a read() into guest memory) count: a userfaultfd of user-mode faults only would
 * make those fail.
 *
 * Whoever punches a hole into guest memory has to say so, or the pager brings back the template's bytes where the guest gave
 * up a page: balloon.h says how.
 */
#ifndef MC_UFFD_H
#define MC_UFFD_H

#include <stdint.h>

/* A new userfaultfd (CLOEXEC, non-blocking), the caller's to close: from device_fd, an open /dev/userfaultfd, or by the
 * system call where that is -1. -errno: EPERM where neither is permitted, ENOSYS or EINVAL where the kernel cannot do
 * this for a memfd. */
int mc_uffd_open(int device_fd);

/* Registers `size` bytes at `address`, a mapping of a memfd, both page-aligned. 0, or -errno. */
int mc_uffd_register(int uffd, uint64_t address, uint64_t size);

#endif
