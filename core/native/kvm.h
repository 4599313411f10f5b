/*
 * KVM's ioctls for Python: the requests and structures themselves are declared in kvm.cdef.h straight from the
 * kernel's headers; what stands here is only what a header does not give.
 */
#ifndef MC_KVM_H
#define MC_KVM_H

#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <stddef.h>
#include <stdint.h>

/* ioctl(2) with a pointer or with an integer argument: its result, or -errno. EINTR is retried, since none of the
 * requests made through here is meant to be interrupted (KVM_RUN is in vcpu.c). */
long mc_ioctl(int fd, unsigned long request, void *arg);
long mc_ioctl_value(int fd, unsigned long request, unsigned long arg);

/* Masks every line of the two 8259s, as firmware would leave them. KVM creates them unmasked, and a guest that takes
 * the machine for hardware-reduced ACPI never touches them: an edge on one would reach the boot processor through
 * LINT0 as a vector in the range of exceptions. 0 or -errno. */
long mc_mask_pics(int vm_fd);

/* Model-specific registers that the set-up writes; Intel SDM volume 4, table 2-2. */
enum {
	MC_MSR_IA32_TSC = 0x10,
	MC_MSR_IA32_MISC_ENABLE = 0x1a0,
	MC_MSR_IA32_MTRR_DEF_TYPE = 0x2ff,
	MC_MSR_IA32_TSC_DEADLINE = 0x6e0,
	MC_MSR_KVM_STEAL_TIME = 0x4b564d03,	/* Documentation/virt/kvm/x86/msr.rst */
};

/* Local APIC registers by their offset in its page; Intel SDM volume 3, table 11-1. */
enum {
	MC_APIC_LVT_LINT0 = 0x350,
	MC_APIC_LVT_LINT1 = 0x360,
	MC_APIC_TMICT = 0x380,	/* timer: initial count */
	MC_APIC_TMCCT = 0x390,	/* current count */
	MC_APIC_TDCR = 0x3e0,	/* divide configuration */
};

#endif
