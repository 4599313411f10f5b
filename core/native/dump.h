/*
 * The ELF core file of a guest's memory (core/snapshot/dump.py): headers and notes, for gdb, drgn and crash.
 *
 * The file: ELF header, program headers, notes, zeros up to `start`, then RAM in the memfd's order. Layouts are the ELF
 * gABI's and core(5)'s, from the system's headers, and for the note "QEMU" the one that QEMU writes (struct QEMUCPUState
 * in its target/i386/arch_dump.c) and crash reads.
 */
#ifndef MC_DUMP_H
#define MC_DUMP_H

#include <linux/kvm.h>
#include <stdint.h>

/* linux/Documentation/admin-guide/kdump/vmcoreinfo.rst: the note in a page of its own, whose text is a page at most. */
enum { MC_DUMP_VMCOREINFO_MAX = 4096 };

/* Intel SDM volume 4, table 2-2. */
#define MC_MSR_LSTAR 0xc0000082
#define MC_MSR_KERNEL_GS_BASE 0xc0000102

struct mc_dump_region {
	uint64_t gpa, size, offset;	/* offset: in the memfd */
};

struct mc_dump_vcpu {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	uint64_t kernel_gs_base;
};

/* Where RAM begins in the file: behind the headers of so many, and the largest VMCOREINFO. A multiple of 64 KiB. */
uint64_t mc_dump_start(uint32_t vcpus, uint32_t regions);

/*
 * Writes what stands in front of RAM into `out`, which has room for mc_dump_start(). `vmcoreinfo`: that note's text, or 0
 * bytes of it for no such note; at most MC_DUMP_VMCOREINFO_MAX. Returns how many bytes are not padding.
 */
uint64_t mc_dump_head(uint8_t *out, const struct mc_dump_vcpu *vcpus, uint32_t n_vcpus,
		      const struct mc_dump_region *regions, uint32_t n_regions, const char *vmcoreinfo, uint32_t length);

/*
 * Looks in `size` bytes of RAM, from `start` in `fd`, for a page that begins with a Linux kernel's VMCOREINFO note, from
 * offset `from` of RAM on. Copies its text to `out` (MC_DUMP_VMCOREINFO_MAX bytes) and its length to *length. Returns the
 * page's offset, `size` where there is none, or -errno. The guest wrote it: its text is to be judged by the caller.
 */
int64_t mc_dump_find_vmcoreinfo(int fd, uint64_t start, uint64_t size, uint64_t from, char *out, uint32_t *length);

#endif
