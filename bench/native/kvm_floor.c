/*
 * What KVM's own calls cost here, one after the other, for the VM that a restore makes: the floor that no monitor gets
 * below. A VM with an in-kernel irqchip, one memory slot, one vCPU with all its state set, two devices' doorbells and
 * interrupts; its first instruction, at CPL 3 in long mode, as the benches' guest is frozen, stores to an address
 * without memory. Started by bench/floor.py: RUNS MEMORY. Prints one JSON object: microseconds of each step, a list of
 * RUNS values.
 */
#define _GNU_SOURCE
#include <asm/kvm.h>
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAX_RUNS 1000
#define MAX_MSRS 512
#define MMIO 0xd0000000u
#define CODE 0x1000u
#define TABLES 0x2000u		/* PML4, PDPT, one directory: the first GiB, and the one with MMIO */
#define GDT 0x6000u

enum { VM, SLOT, IRQCHIP, VCPU, STATE, DEVICES, FIRST, STEPS, END = STEPS, ALL };
static const char *const names[ALL] = {
	"create the VM", "memory slot", "irqchip", "create a vCPU", "set a vCPU's state", "doorbells, interrupts",
	"to the first instruction", "end of the VM",
};
static double took[ALL][MAX_RUNS];
static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid = { .head.nent = 256 };
static struct { struct kvm_msr_list head; uint32_t indices[MAX_MSRS]; } msr_list = { .head.nmsrs = MAX_MSRS };
static struct { struct kvm_msrs head; struct kvm_msr_entry entries[MAX_MSRS]; } msrs;

static long call(int fd, unsigned long request, void *arg, const char *what)
{
	long ret = ioctl(fd, request, arg);

	if (ret < 0)
		err(1, "%s", what);
	return ret;
}
#define CALL(fd, request, arg) call(fd, request, (void *)(arg), #request)

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* Page tables, open to CPL 3, for the first GiB and the one of MMIO; code that stores to MMIO; flat segments. */
static void fill(uint8_t *ram)
{
	static const uint8_t code[] = { 0xc6, 0x04, 0x25, 0x00, 0x00, 0x00, 0x10, 0x2a };	/* movb $42, 0x10000000 */
	uint64_t *pml4 = (void *)(ram + TABLES), *pdpt = pml4 + 512, *low = pdpt + 512;
	uint64_t gdt[] = { 0, 0, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff };

	memcpy(ram + CODE, code, sizeof(code));
	memcpy(ram + GDT, gdt, sizeof(gdt));
	pml4[0] = (TABLES + 0x1000) | 7;
	pdpt[0] = (TABLES + 0x2000) | 7;
	for (uint64_t i = 0; i < 512; i++)
		low[i] = i << 21 | 0x87;
	low[0x10000000 >> 21] = MMIO | 0x87;
}

static void set_state(int vcpu)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = CODE, .rflags = 0x3002, .rsp = 0x8000 };
	struct kvm_segment code = { 0, 0xffffffff, 0x20 | 3, 0xb, 1, 3, 0, 1, 1, 1, 0, 0, 0 };
	struct kvm_segment data = { 0, 0xffffffff, 0x18 | 3, 0x3, 1, 3, 1, 1, 0, 1, 0, 0, 0 };
	struct kvm_xsave *xsave = NULL;
	struct kvm_xcrs xcrs;
	struct kvm_lapic_state lapic;
	struct kvm_vcpu_events events;
	struct kvm_debugregs debug;
	struct kvm_mp_state state;

	/* Read first, since what is set must be valid; a restore reads it from a file. Not counted twice: see main. */
	if (posix_memalign((void **)&xsave, 4096, 65536))
		err(1, "memory");
	CALL(vcpu, KVM_SET_CPUID2, &cpuid);
	CALL(vcpu, KVM_GET_SREGS, &sregs);
	CALL(vcpu, KVM_GET_XSAVE, xsave);
	CALL(vcpu, KVM_GET_XCRS, &xcrs);
	CALL(vcpu, KVM_GET_LAPIC, &lapic);
	CALL(vcpu, KVM_GET_VCPU_EVENTS, &events);
	CALL(vcpu, KVM_GET_DEBUGREGS, &debug);
	CALL(vcpu, KVM_GET_MP_STATE, &state);
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cr0 = 0x80000011;
	sregs.cr3 = TABLES;
	sregs.cr4 = 0x20;
	sregs.efer = 0x500;
	sregs.gdt.base = GDT;
	sregs.gdt.limit = 39;
	CALL(vcpu, KVM_SET_SREGS, &sregs);
	CALL(vcpu, KVM_SET_XCRS, &xcrs);
	CALL(vcpu, KVM_SET_XSAVE, xsave);
	CALL(vcpu, KVM_SET_LAPIC, &lapic);
	CALL(vcpu, KVM_SET_MP_STATE, &state);
	CALL(vcpu, KVM_SET_DEBUGREGS, &debug);
	CALL(vcpu, KVM_SET_VCPU_EVENTS, &events);
	CALL(vcpu, KVM_SET_REGS, &regs);
	/* Stops at the first that cannot be written with what was read; the calls' number is what costs. */
	for (uint32_t i = 0; i < msr_list.head.nmsrs; i++) {
		msrs.head.nmsrs = 1;
		msrs.entries[0].index = msr_list.indices[i];
		if (ioctl(vcpu, KVM_GET_MSRS, &msrs) == 1)
			ioctl(vcpu, KVM_SET_MSRS, &msrs);
	}
	free(xsave);
}

static void devices(int vm)
{
	for (unsigned i = 0; i < 6; i++) {	/* 3 queues; an interrupt each for 2 devices and the UART's ring */
		int fd = eventfd(0, EFD_CLOEXEC);
		struct kvm_ioeventfd bell = {
			.datamatch = i, .addr = MMIO + 0x50, .len = 4, .fd = fd, .flags = KVM_IOEVENTFD_FLAG_DATAMATCH,
		};
		struct kvm_irqfd irq = { .fd = fd, .gsi = 5 + i };

		if (i < 3)
			CALL(vm, KVM_IOEVENTFD, &bell);
		else
			CALL(vm, KVM_IRQFD, &irq);
	}
}

static void restore(int kvm, uint8_t *ram, uint64_t size, unsigned run)
{
	struct kvm_userspace_memory_region slot = { 0, 0, 0, size, (uint64_t)ram };
	uint64_t identity = 0xfeffc000;
	double t[STEPS + 1];
	size_t shared = CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *exit;
	int vm, vcpu;

	t[VM] = now();
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	/* Slots come before the irqchip: a slot waits for the SRCU callbacks that the irqchip's ports queue, 7 ms here. */
	t[SLOT] = now();
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &slot);
	t[IRQCHIP] = now();
	CALL(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity);
	CALL(vm, KVM_SET_TSS_ADDR, 0xfeffd000);
	CALL(vm, KVM_CREATE_IRQCHIP, 0);
	t[VCPU] = now();
	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	exit = mmap(NULL, shared, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (exit == MAP_FAILED)
		err(1, "kvm_run");
	t[STATE] = now();
	set_state(vcpu);
	t[DEVICES] = now();
	devices(vm);
	t[FIRST] = now();
	CALL(vcpu, KVM_RUN, 0);
	t[STEPS] = now();
	if (exit->exit_reason != KVM_EXIT_MMIO || exit->mmio.phys_addr != MMIO || exit->mmio.data[0] != 42)
		errx(1, "the guest's first instruction was not done: exit %u", exit->exit_reason);
	for (unsigned i = 0; i < STEPS; i++)
		took[i][run] = t[i + 1] - t[i];
	t[VM] = now();
	munmap(exit, shared);
	close(vcpu);
	close(vm);
	took[END][run] = now() - t[VM];
	closefrom(kvm + 1);	/* the eventfds */
}

int main(int argc, char **argv)
{
	unsigned runs = argc == 3 ? atoi(argv[1]) : 0;
	uint64_t size = argc == 3 ? strtoull(argv[2], NULL, 10) : 0;
	int memfd, kvm;
	uint8_t *ram;

	if (!runs || runs > MAX_RUNS || size < 1 << 20)
		errx(2, "usage: kvm_floor RUNS MEMORY");
	memfd = memfd_create("ram", MFD_CLOEXEC);
	if (memfd < 0 || ftruncate(memfd, size) < 0)
		err(1, "memfd");
	ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	if (ram == MAP_FAILED)
		err(1, "RAM");
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	CALL(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
	CALL(kvm, KVM_GET_MSR_INDEX_LIST, &msr_list);
	fill(ram);
	for (unsigned run = 0; run < runs; run++)
		restore(kvm, ram, size, run);
	printf("{");
	for (unsigned i = 0; i < ALL; i++) {
		printf("%s\"%s\": [", i ? ", " : "", names[i]);
		for (unsigned run = 0; run < runs; run++)
			printf("%s%.1f", run ? ", " : "", took[i][run]);
		printf("]");
	}
	printf("}\n");
	return 0;
}
