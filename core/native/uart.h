/*
 * A 16550A (National Semiconductor PC16550D datasheet) whose line is the shared ring of uart_ring.h. Baud rate and
 * line settings are stored and have no effect; there are no parity, framing or break errors. A byte written to
 * THR is on the line at once unless the ring is full; it then waits in the 16-byte FIFO and THRE stays off.
 *
 * Any vCPU and the core's main thread may call in; nothing here waits for the other process.
 */
#ifndef MC_UART_H
#define MC_UART_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "uart_ring.h"

#define MC_UART_FIFO 16
#define MC_UART_PORTS 8

/* Everything the guest can see: plain data, kept apart so that a snapshot can hold it. */
struct mc_uart_regs {
	uint8_t ier, fcr, lcr, mcr, scr, dll, dlm;
	uint8_t msr_delta;		/* low nibble of MSR; the high one follows from MCR */
	uint8_t overrun;		/* LSR.OE */
	uint8_t thri;			/* transmitter-empty interrupt pending */
	uint8_t rx_len, tx_len;
	uint8_t rx[MC_UART_FIFO], tx[MC_UART_FIFO];
};

struct mc_uart_stats {
	uint64_t tx_bytes;		/* taken from the guest and put into the ring */
	uint64_t rx_bytes;		/* handed to the guest */
	uint64_t tx_discarded;		/* nobody behind the ring */
	uint64_t tx_overrun;		/* written by the guest although THRE was off and the FIFO full */
	uint64_t rx_overrun;		/* lost in loopback */
	uint64_t ring_errors;		/* positions of the peer that cannot be */
	uint64_t tx_stalls;		/* times the ring was found full */
};

struct mc_uart {
	pthread_mutex_t lock;
	struct mc_uart_regs regs;
	struct mc_uart_stats stats;
	int vm_fd;			/* for KVM_IRQ_LINE; -1: no interrupts; not owned */
	uint32_t gsi;
	bool irq_level;			/* what KVM was told last */
	int irq_error;			/* errno of a KVM_IRQ_LINE that failed, else 0 */
	struct mc_uart_ring *ring;	/* NULL: nothing attached; not owned */
	int tx_event, rx_event;		/* eventfds; not owned */
	uint32_t tx_head, rx_tail;	/* our own positions: the copies in the ring are only ever written */
};

int mc_uart_init(struct mc_uart *uart, int vm_fd, uint32_t gsi);
void mc_uart_deinit(struct mc_uart *uart);

/* Puts a ring behind the UART, or takes it away (NULL): bytes are then discarded and counted. Positions go on from
 * where the ring stands; no byte moves before mc_uart_poll(), which must follow before the guest runs. The caller keeps the
 * mapping and the eventfds until the next call. */
void mc_uart_attach(struct mc_uart *uart, struct mc_uart_ring *ring, int tx_event, int rx_event);

/* What the sidecar's signal (rx_event readable) asks for: take bytes in, and send what waited for room. Not called between
 * the sidecar's quiesce and its resume, with the vCPUs parked: each byte is then in exactly one of what mc_uart_save() gives
 * and what the sidecar saves. */
void mc_uart_poll(struct mc_uart *uart);

/* Power-on state; the ring and its bytes stay. */
void mc_uart_reset(struct mc_uart *uart);

/* One byte-wide register access, offset 0..7. */
uint8_t mc_uart_read(struct mc_uart *uart, uint32_t offset);
void mc_uart_write(struct mc_uart *uart, uint32_t offset, uint8_t value);

/* Copies the registers out, or in (validated). Restoring moves no byte and leaves the interrupt line as it was saved, since
 * the irqchip that is restored beside it has it so; mc_uart_poll() goes on from there. Returns 0 or -EINVAL. */
void mc_uart_save(struct mc_uart *uart, struct mc_uart_regs *regs);
int mc_uart_restore(struct mc_uart *uart, const struct mc_uart_regs *regs);

#endif
