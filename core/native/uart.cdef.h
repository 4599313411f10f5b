#define MC_UART_PORTS ...
#define MC_UART_TX_SIZE ...
#define MC_UART_RX_SIZE ...

struct mc_uart_regs { ...; };
struct mc_uart_stats {
	uint64_t tx_bytes;
	uint64_t rx_bytes;
	uint64_t tx_discarded;
	uint64_t tx_overrun;
	uint64_t rx_overrun;
	uint64_t ring_errors;
	uint64_t tx_stalls;
};
struct mc_ring_pos { uint32_t head; uint32_t tail; uint32_t consumer_asleep; uint32_t producer_waiting; ...; };
struct mc_uart_ring { struct mc_ring_pos tx, rx; uint8_t tx_data[...]; uint8_t rx_data[...]; ...; };
struct mc_uart { struct mc_uart_stats stats; bool irq_level; int irq_error; ...; };

int mc_uart_init(struct mc_uart *uart, int vm_fd, uint32_t gsi);
void mc_uart_deinit(struct mc_uart *uart);
void mc_uart_attach(struct mc_uart *uart, struct mc_uart_ring *ring, int tx_event, int rx_event);
void mc_uart_poll(struct mc_uart *uart);
void mc_uart_reset(struct mc_uart *uart);
uint8_t mc_uart_read(struct mc_uart *uart, uint32_t offset);
void mc_uart_write(struct mc_uart *uart, uint32_t offset, uint8_t value);
void mc_uart_save(struct mc_uart *uart, struct mc_uart_regs *regs);
int mc_uart_restore(struct mc_uart *uart, const struct mc_uart_regs *regs);
