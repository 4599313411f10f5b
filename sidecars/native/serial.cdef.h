#define MC_UART_TX_SIZE ...
#define MC_UART_RX_SIZE ...
struct mc_ring_pos { uint32_t head, tail, consumer_asleep, producer_waiting; ...; };
struct mc_uart_ring {
	struct mc_ring_pos tx, rx;
	uint8_t tx_data[...];
	uint8_t rx_data[...];
	...;
};
enum mc_serial_backend { MC_SERIAL_NONE, MC_SERIAL_PTY, MC_SERIAL_SOCKET, MC_SERIAL_FILE };
enum mc_serial_notice {
	MC_SERIAL_FILE_FAILED, MC_SERIAL_FILE_RECOVERED, MC_SERIAL_BACKEND_OPENED, MC_SERIAL_BACKEND_CLOSED,
	MC_SERIAL_RING_HOSTILE, MC_SERIAL_QUEUE_BROKEN, MC_SERIAL_CLIENTS_FULL, MC_SERIAL_ACCEPT_FAILED, ...
};
#define MC_SERIAL_CLIENTS ...
#define MC_SERIAL_STAGE ...
#define MC_SERIAL_INPUT ...
#define MC_SERIAL_HISTORY ...
#define MC_SCROLL_MIN ...
struct mc_serial_config {
	int backend;
	int backend_fd;
	int watch_fd;
	int console_fd;
	int event_fd;
	uint64_t scrollback;
	int ring_fd;
	int uart_tx_fd, uart_rx_fd;
	void *keep;
	uint64_t keep_size;
	...;
};
struct mc_serial_stats {
	uint64_t guest_out, guest_in;
	uint64_t skipped;
	uint64_t clients_total, clients_refused;
	uint64_t hostile;
	uint64_t file_written, file_errors, file_skipped;
	uint32_t clients;
	int32_t file_errno;
	int32_t accept_errno;
	...;
};
struct mc_serial_state { uint32_t input_len, history_len; uint8_t input[...]; uint8_t history[...]; ...; };
struct mc_serial;
int mc_serial_watch_pty(int master);
uint64_t mc_serial_keep_size(uint64_t scrollback);
struct mc_beat *mc_serial_beat(struct mc_serial *s);
struct mc_serial *mc_serial_new(const struct mc_serial_config *cfg);
int mc_serial_free(struct mc_serial *s);
int mc_serial_run(struct mc_serial *s);
void mc_serial_stop(struct mc_serial *s);
void mc_serial_attach(struct mc_serial *s, const struct mc_vq *rx, const struct mc_vq *tx);
void mc_serial_detach(struct mc_serial *s);
void mc_serial_quiesce(struct mc_serial *s);
void mc_serial_resume(struct mc_serial *s);
void mc_serial_save(struct mc_serial *s, struct mc_serial_state *state);
int mc_serial_load(struct mc_serial *s, const struct mc_serial_state *state);
void mc_serial_emergency(struct mc_serial *s, uint8_t byte);
const struct mc_vq *mc_serial_queue(const struct mc_serial *s, int index);
unsigned mc_serial_notices(struct mc_serial *s);
void mc_serial_get_stats(struct mc_serial *s, struct mc_serial_stats *out);
