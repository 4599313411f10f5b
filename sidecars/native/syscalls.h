/* What the lists of system calls are made of (sidecars/sandbox/roles.py): libseccomp, and the names of arguments. */
#ifndef MC_SYSCALLS_H
#define MC_SYSCALLS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE	/* F_GET_SEALS, CLONE_VM */
#endif
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <seccomp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>

/* The action that has a call fail. */
uint32_t mc_seccomp_errno(uint16_t error);

#endif
