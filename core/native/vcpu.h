/*
 * The vCPU exit loop. It runs on the vCPU's thread without the GIL, answers the exits that are frequent (the 16550,
 * InterruptStatus and InterruptACK of virtio-mmio, the I/O delay port) and returns to Python with the rest.
 */
#ifndef MC_VCPU_H
#define MC_VCPU_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "uart.h"
#include "virtqueue.h"

#define MC_MMIO_SLOTS 48
#define MC_MMIO_STRIDE 0x1000
#define MC_EXIT_DETAILS 16

enum mc_exit_kind {
	MC_EXIT_PAUSED,		/* immediate_exit was set; no access is half done */
	MC_EXIT_MMIO,		/* addr, size, is_write, data; before the next run put a read's answer into data */
	MC_EXIT_PIO,		/* likewise; one element of a string instruction at a time */
	MC_EXIT_SHUTDOWN,	/* triple fault */
	MC_EXIT_FAIL_ENTRY,	/* details: hardware reason, host CPU */
	MC_EXIT_INTERNAL_ERROR,	/* code: suberror; details as KVM gave them */
	MC_EXIT_SYSTEM_EVENT,	/* code: KVM_SYSTEM_EVENT_*; details */
	MC_EXIT_DEBUG,		/* details: exception, pc, dr6, dr7 */
	MC_EXIT_ERROR,		/* KVM_RUN failed; code: errno */
	MC_EXIT_UNHANDLED,	/* code: KVM's exit reason */
};

struct mc_exit {
	uint64_t addr;		/* guest physical address, or port */
	uint32_t size;		/* bytes: 1 to 8 (MMIO; odd ones where an access crosses a page), 1, 2 or 4 (PIO) */
	bool is_write;
	uint64_t data;		/* little-endian value */
	uint32_t code;
	uint32_t n_details;
	uint64_t details[MC_EXIT_DETAILS];
};

/* What the loop answers itself; one a VM, shared by its vCPUs. */
struct mc_platform {
	struct mc_uart *uart;		/* NULL: no 16550; not owned */
	uint16_t uart_port;
	uint64_t mmio_base;		/* of virtio-mmio slot 0 */
	struct mc_isr *isr[MC_MMIO_SLOTS];	/* NULL: the slot's registers are all Python's; not owned */
};

/* Fills or empties a slot while vCPUs may run. A mapping taken away must outlive any vCPU that might be using it:
 * unmap only when they are parked. 0, or -EINVAL. */
int mc_platform_set_isr(struct mc_platform *platform, uint32_t slot, struct mc_isr *isr);

struct mc_vcpu_stats {
	uint64_t exits;		/* returns of KVM_RUN */
	uint64_t uart, isr;	/* accesses answered in C */
	uint64_t python;	/* exits handed to Python */
};

struct mc_vcpu {
	int fd;			/* not owned */
	struct kvm_run *run;
	size_t run_size;
	struct mc_platform *platform;
	pid_t tid;		/* of the thread in mc_vcpu_run; 0: none */
	uint32_t pos;		/* next element of the PIO exit at hand */
	uint32_t count;		/* its elements; 0: no PIO exit at hand */
	bool answer;		/* exit.data answers the access returned last */
	struct mc_exit exit;
	struct mc_vcpu_stats stats;
};

/* Maps the vCPU's run page. 0 or -errno. */
int mc_vcpu_init(struct mc_vcpu *vcpu, int fd, size_t run_size, struct mc_platform *platform);
void mc_vcpu_deinit(struct mc_vcpu *vcpu);

/* Installs the (empty) handler of the kick signal, once a process. 0 or -errno. */
int mc_vcpu_install_signal(void);

/* Makes the calling thread the vCPU's: its name, its tid, and every signal but the kick blocked. 0 or -errno. */
int mc_vcpu_bind_thread(struct mc_vcpu *vcpu, const char *name);

/* Runs the guest until an exit that is not answered here; enum mc_exit_kind. Only from the bound thread. */
int mc_vcpu_run(struct mc_vcpu *vcpu);

/* From any thread: makes mc_vcpu_run return MC_EXIT_PAUSED, now or on its next call, until cleared. 0 or -errno. */
int mc_vcpu_kick(struct mc_vcpu *vcpu);
void mc_vcpu_clear_kick(struct mc_vcpu *vcpu);

/* Forgets the exit at hand; for a vCPU whose state was replaced by a reset. */
void mc_vcpu_forget_exit(struct mc_vcpu *vcpu);

/* InterruptStatus as the core itself uses it: mapped from its memfd, which must be sealed against shrinking. */
struct mc_isr *mc_isr_map(int fd);
/* Puts the page of `fd` where `isr` is mapped, while vCPUs may use it. 0 or -errno; then the old one is still there. */
int mc_isr_replace(struct mc_isr *isr, int fd);
void mc_isr_unmap(struct mc_isr *isr);
void mc_isr_raise(struct mc_isr *isr, uint32_t bits);
void mc_isr_clear(struct mc_isr *isr, uint32_t bits);
uint32_t mc_isr_read(const struct mc_isr *isr);

/* The UART's ring from its memfd, likewise. NULL with errno set: EPERM not sealed, EINVAL too small. */
struct mc_uart_ring *mc_uart_ring_map(int fd);
void mc_uart_ring_unmap(struct mc_uart_ring *ring);

#endif
