#define _GNU_SOURCE
#include "vcpu.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_mmio.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PORT_IO_DELAY 0x80	/* POST codes; Linux writes here to pass time */

/* --- Accesses answered here -------------------------------------------------------------------------------------- */

/* A port access of 1, 2 or 4 bytes; to the 8-bit UART a wide one is as many byte-wide ones, as on the ISA bus. */
static bool serve_port(struct mc_vcpu *v, uint32_t port, uint32_t size, bool is_write, uint8_t *data)
{
	struct mc_platform *p = v->platform;
	uint32_t offset = port - p->uart_port;

	if (p->uart && offset < MC_UART_PORTS && offset + size <= MC_UART_PORTS) {
		for (uint32_t i = 0; i < size; i++) {
			if (is_write)
				mc_uart_write(p->uart, offset + i, data[i]);
			else
				data[i] = mc_uart_read(p->uart, offset + i);
		}
		v->stats.uart++;
		return true;
	}
	return port == PORT_IO_DELAY && is_write;
}

static bool serve_mmio(struct mc_vcpu *v, uint64_t addr, uint32_t size, bool is_write, uint8_t *data)
{
	struct mc_platform *p = v->platform;
	uint64_t offset = addr - p->mmio_base;
	uint32_t reg = offset % MC_MMIO_STRIDE, value;
	struct mc_isr *isr;

	if (offset >= (uint64_t)MC_MMIO_SLOTS * MC_MMIO_STRIDE || size != 4)
		return false;
	/* acquire: pairs with mc_platform_set_isr's release, for a slot filled while the guest runs. */
	isr = __atomic_load_n(&p->isr[offset / MC_MMIO_STRIDE], __ATOMIC_ACQUIRE);
	if (!isr)
		return false;
	if (reg == VIRTIO_MMIO_INTERRUPT_STATUS && !is_write) {
		value = mc_isr_read(isr);
		memcpy(data, &value, sizeof(value));
	} else if (reg == VIRTIO_MMIO_INTERRUPT_ACK && is_write) {
		memcpy(&value, data, sizeof(value));
		mc_isr_clear(isr, value);
	} else {
		return false;
	}
	v->stats.isr++;
	return true;
}

int mc_platform_set_isr(struct mc_platform *p, uint32_t slot, struct mc_isr *isr)
{
	if (slot >= MC_MMIO_SLOTS)
		return -EINVAL;
	__atomic_store_n(&p->isr[slot], isr, __ATOMIC_RELEASE);
	return 0;
}

/* --- The loop ---------------------------------------------------------------------------------------------------- */

static void describe_access(struct mc_exit *e, uint64_t addr, uint32_t size, bool is_write, const uint8_t *data)
{
	e->addr = addr;
	e->size = size;
	e->is_write = is_write;
	e->data = 0;
	if (is_write)
		memcpy(&e->data, data, size);
}

static void describe(struct mc_exit *e, uint32_t code, const __u64 *details, uint32_t n)
{
	memset(e, 0, sizeof(*e));
	e->code = code;
	e->n_details = n < MC_EXIT_DETAILS ? n : MC_EXIT_DETAILS;
	for (uint32_t i = 0; i < e->n_details; i++)
		e->details[i] = details[i];
}

static uint8_t *pio_element(struct mc_vcpu *v)
{
	return (uint8_t *)v->run + v->run->io.data_offset + (size_t)v->pos * v->run->io.size;
}

/* Serves what is left of a PIO exit, element by element (a string instruction has several). False: one is Python's. */
static bool finish_pio(struct mc_vcpu *v)
{
	const struct kvm_run *run = v->run;
	bool is_write = run->io.direction == KVM_EXIT_IO_OUT;

	for (; v->pos < v->count; v->pos++) {
		if (!serve_port(v, run->io.port, run->io.size, is_write, pio_element(v))) {
			describe_access(&v->exit, run->io.port, run->io.size, is_write, pio_element(v));
			return false;
		}
	}
	v->count = 0;
	return true;
}

/* Takes Python's answer to the access that was returned last. */
static void take_answer(struct mc_vcpu *v)
{
	if (!v->answer)
		return;
	v->answer = false;
	if (v->count) {
		if (!v->exit.is_write)
			memcpy(pio_element(v), &v->exit.data, v->exit.size);
		v->pos++;
	} else if (!v->exit.is_write) {
		memcpy(v->run->mmio.data, &v->exit.data, v->exit.size);
	}
}

static int to_python(struct mc_vcpu *v, int kind)
{
	v->stats.python++;
	v->answer = kind == MC_EXIT_MMIO || kind == MC_EXIT_PIO;
	return kind;
}

int mc_vcpu_run(struct mc_vcpu *v)
{
	struct kvm_run *run = v->run;

	take_answer(v);
	for (;;) {
		if (!finish_pio(v))
			return to_python(v, MC_EXIT_PIO);
		/* KVM completes the access answered last before it looks at immediate_exit: EINTR therefore means
		 * that no access is half done. */
		if (ioctl(v->fd, KVM_RUN, 0) < 0) {
			if (errno == EINTR && __atomic_load_n(&run->immediate_exit, __ATOMIC_RELAXED))
				return MC_EXIT_PAUSED;
			/* EAGAIN: an application processor that waits for SIPI woke up; a signal without a kick. */
			if (errno == EINTR || errno == EAGAIN)
				continue;
			describe(&v->exit, errno, NULL, 0);
			return to_python(v, MC_EXIT_ERROR);
		}
		v->stats.exits++;
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			v->pos = 0;
			v->count = run->io.count;
			break;
		case KVM_EXIT_MMIO:
			if (serve_mmio(v, run->mmio.phys_addr, run->mmio.len, run->mmio.is_write, run->mmio.data))
				break;
			describe_access(&v->exit, run->mmio.phys_addr, run->mmio.len, run->mmio.is_write,
					run->mmio.data);
			return to_python(v, MC_EXIT_MMIO);
		case KVM_EXIT_INTR:
		case KVM_EXIT_IRQ_WINDOW_OPEN:
			break;
		case KVM_EXIT_SHUTDOWN:
			describe(&v->exit, 0, NULL, 0);
			return to_python(v, MC_EXIT_SHUTDOWN);
		case KVM_EXIT_FAIL_ENTRY: {
			const __u64 why[] = { run->fail_entry.hardware_entry_failure_reason, run->fail_entry.cpu };

			describe(&v->exit, 0, why, 2);
			return to_python(v, MC_EXIT_FAIL_ENTRY);
		}
		case KVM_EXIT_INTERNAL_ERROR:
			describe(&v->exit, run->internal.suberror, run->internal.data, run->internal.ndata);
			return to_python(v, MC_EXIT_INTERNAL_ERROR);
		case KVM_EXIT_SYSTEM_EVENT:
			describe(&v->exit, run->system_event.type, run->system_event.data, run->system_event.ndata);
			return to_python(v, MC_EXIT_SYSTEM_EVENT);
		case KVM_EXIT_DEBUG: {
			const __u64 why[] = { run->debug.arch.exception, run->debug.arch.pc, run->debug.arch.dr6,
					      run->debug.arch.dr7 };

			describe(&v->exit, 0, why, 4);
			return to_python(v, MC_EXIT_DEBUG);
		}
		default:
			describe(&v->exit, run->exit_reason, NULL, 0);
			return to_python(v, MC_EXIT_UNHANDLED);
		}
	}
}

/* --- Threads and kicks ------------------------------------------------------------------------------------------- */

static void on_kick(int signo)
{
	(void)signo;
}

int mc_vcpu_install_signal(void)
{
	/* No SA_RESTART: KVM_RUN is to return. */
	struct sigaction action = { .sa_handler = on_kick };

	return sigaction(SIGRTMIN, &action, NULL) < 0 ? -errno : 0;
}

int mc_vcpu_bind_thread(struct mc_vcpu *v, const char *name)
{
	sigset_t set;
	int err;

	sigfillset(&set);
	sigdelset(&set, SIGRTMIN);
	/* Faults of the thread itself cannot wait. */
	sigdelset(&set, SIGSEGV);
	sigdelset(&set, SIGBUS);
	sigdelset(&set, SIGILL);
	sigdelset(&set, SIGFPE);
	sigdelset(&set, SIGABRT);
	sigdelset(&set, SIGSYS);
	err = pthread_sigmask(SIG_SETMASK, &set, NULL);
	if (err)
		return -err;
	if (prctl(PR_SET_NAME, name) < 0)
		return -errno;
	__atomic_store_n(&v->tid, (pid_t)syscall(SYS_gettid), __ATOMIC_RELEASE);
	return 0;
}

int mc_vcpu_kick(struct mc_vcpu *v)
{
	pid_t tid = __atomic_load_n(&v->tid, __ATOMIC_ACQUIRE);

	/* Set before the signal: a thread that the signal finds outside of KVM_RUN sees it when it enters. */
	__atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	if (tid && syscall(SYS_tgkill, getpid(), tid, SIGRTMIN) < 0)
		return -errno;
	return 0;
}

void mc_vcpu_clear_kick(struct mc_vcpu *v)
{
	__atomic_store_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
}

void mc_vcpu_forget_exit(struct mc_vcpu *v)
{
	v->answer = false;
	v->pos = v->count = 0;
}

int mc_vcpu_init(struct mc_vcpu *v, int fd, size_t run_size, struct mc_platform *platform)
{
	void *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (run == MAP_FAILED)
		return -errno;
	memset(v, 0, sizeof(*v));
	v->fd = fd;
	v->run = run;
	v->run_size = run_size;
	v->platform = platform;
	return 0;
}

void mc_vcpu_deinit(struct mc_vcpu *v)
{
	if (v->run)
		munmap(v->run, v->run_size);
	v->run = NULL;
}

/* --- Memory shared with sidecars --------------------------------------------------------------------------------- */

/* A sidecar holds the same descriptor: unsealed, it could shrink the file and have our next access end in SIGBUS. */
static void *map_sealed(int fd, size_t size)
{
	struct stat st;
	int seals = fcntl(fd, F_GET_SEALS);
	void *p;

	if (seals < 0 || fstat(fd, &st) < 0)
		return NULL;
	if (!(seals & F_SEAL_SHRINK)) {
		errno = EPERM;
		return NULL;
	}
	if ((uint64_t)st.st_size < size) {
		errno = EINVAL;
		return NULL;
	}
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	return p == MAP_FAILED ? NULL : p;
}

struct mc_isr *mc_isr_map(int fd)
{
	return map_sealed(fd, sizeof(struct mc_isr));
}

int mc_isr_replace(struct mc_isr *isr, int fd)
{
	struct mc_isr *other = mc_isr_map(fd);

	if (!other)
		return -errno;
	/* In one step: a vCPU thread that reads the register meanwhile finds the one page or the other. */
	if (mremap(other, sizeof(*other), sizeof(*other), MREMAP_MAYMOVE | MREMAP_FIXED, isr) == MAP_FAILED) {
		int err = errno;

		mc_isr_unmap(other);
		return -err;
	}
	return 0;
}

void mc_isr_unmap(struct mc_isr *isr)
{
	munmap(isr, sizeof(*isr));
}

void mc_isr_raise(struct mc_isr *isr, uint32_t bits)
{
	/* release: what the interrupt is about is visible to whoever sees the bit. */
	__atomic_fetch_or(&isr->status, bits, __ATOMIC_RELEASE);
}

void mc_isr_clear(struct mc_isr *isr, uint32_t bits)
{
	__atomic_fetch_and(&isr->status, ~bits, __ATOMIC_ACQ_REL);
}

uint32_t mc_isr_read(const struct mc_isr *isr)
{
	/* acquire: a guest that reads the bit then finds the used entries published before it was set. */
	return __atomic_load_n(&isr->status, __ATOMIC_ACQUIRE);
}

struct mc_uart_ring *mc_uart_ring_map(int fd)
{
	return map_sealed(fd, sizeof(struct mc_uart_ring));
}

void mc_uart_ring_unmap(struct mc_uart_ring *ring)
{
	munmap(ring, sizeof(*ring));
}
