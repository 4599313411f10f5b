#define _GNU_SOURCE
#include "syscalls.h"

uint32_t mc_seccomp_errno(uint16_t error)
{
	return SCMP_ACT_ERRNO(error);
}
