/*
 * The two byte rings between the core's 16550 and the serial sidecar behind it, in one shared memfd of
 * sizeof(struct mc_uart_ring) bytes rounded up to pages. Each ring has one producer and one consumer; the
 * positions run freely and are taken modulo the size. A peer is not trusted: a distance head - tail above the
 * size is treated as an empty (reader) or full (writer) ring and counted.
 *
 * Wake-ups: after adding bytes the producer signals the consumer's eventfd only if consumer_asleep was set,
 * which it clears with an exchange. A consumer sets it, then looks at head once more, then sleeps. A producer
 * that found a ring full sets producer_waiting likewise, and the consumer signals back after making room.
 */
#ifndef MC_UART_RING_H
#define MC_UART_RING_H

#include <stdint.h>

#define MC_UART_TX_SIZE 65536	/* guest to host */
#define MC_UART_RX_SIZE 4096	/* host to guest */

struct mc_ring_pos {
	uint32_t head;			/* written by the producer only */
	uint32_t tail __attribute__((aligned(64)));	/* written by the consumer only */
	uint32_t consumer_asleep __attribute__((aligned(64)));
	uint32_t producer_waiting;
};

struct mc_uart_ring {
	struct mc_ring_pos tx __attribute__((aligned(64)));	/* producer: core, consumer: sidecar */
	struct mc_ring_pos rx __attribute__((aligned(64)));	/* producer: sidecar, consumer: core */
	uint8_t tx_data[MC_UART_TX_SIZE] __attribute__((aligned(4096)));
	uint8_t rx_data[MC_UART_RX_SIZE];
};

#endif
