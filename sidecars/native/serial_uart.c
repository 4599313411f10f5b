/*
 * The sidecar's end of the 16550: consumer of the tx ring, producer of the rx ring (core/native/uart_ring.h).
 *
 * A byte at a time is what a 16550 is made of, and a wake-up for each would cost the guest an eventfd write a
 * character. So after output the loop does not fall asleep at once: it looks again a millisecond later, with no
 * wake-up asked for, and sleeps once a look found nothing.
 */
#define _GNU_SOURCE
#include "serial.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void signal_core(const struct mc_uart *u)
{
	const uint64_t one = 1;
	/* EAGAIN: the counter is full, so a signal is pending already. */
	ssize_t n = write(u->rx_fd, &one, sizeof(one));
	(void)n;
}

/* Bytes in the tx ring. The core is not trusted: a distance that cannot be is an empty ring. */
static uint32_t tx_filled(struct mc_serial *s)
{
	/* Acquire: the bytes that head covers are read after it. */
	uint32_t n = __atomic_load_n(&s->uart.ring->tx.head, __ATOMIC_ACQUIRE) - s->uart.tx_tail;

	if (n <= MC_UART_TX_SIZE)
		return n;
	if (s->stats.hostile++ == 0)
		mc_serial_notice(s, MC_SERIAL_RING_HOSTILE);
	return 0;
}

/* Room in the rx ring; with impossible positions there is none. */
static uint32_t rx_room(struct mc_serial *s)
{
	/* Acquire: the core has read the bytes before tail before we write over them. */
	uint32_t n = s->uart.rx_head - __atomic_load_n(&s->uart.ring->rx.tail, __ATOMIC_ACQUIRE);

	if (n <= MC_UART_RX_SIZE)
		return MC_UART_RX_SIZE - n;
	if (s->stats.hostile++ == 0)
		mc_serial_notice(s, MC_SERIAL_RING_HOSTILE);
	return 0;
}

static uint64_t output(struct mc_serial *s, bool *more)
{
	struct mc_uart *u = &s->uart;
	struct mc_uart_ring *r = u->ring;
	uint32_t n;

	/* Awake: no signal is wanted. Relaxed: a signal too many does no harm. */
	__atomic_store_n(&r->tx.consumer_asleep, 0, __ATOMIC_RELAXED);
	n = tx_filled(s);
	*more = false;
	if (!n)
		return 0;

	uint32_t at = u->tx_tail % MC_UART_TX_SIZE;
	uint32_t first = MC_UART_TX_SIZE - at;

	if (first > n)
		first = n;
	mc_scroll_append2(&s->scroll, r->tx_data + at, first, r->tx_data, n - first);
	u->tx_tail += n;
	/* Release: our reads of the bytes are done before the core may write there. */
	__atomic_store_n(&r->tx.tail, u->tx_tail, __ATOMIC_RELEASE);
	/* Full: tail is visible before we look whether the core waits for it. The core says that it waits and then
	 * looks at tail again; without this each could miss the other and the guest's transmitter would stay full. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&r->tx.producer_waiting, __ATOMIC_RELAXED) &&
	    __atomic_exchange_n(&r->tx.producer_waiting, 0, __ATOMIC_RELAXED))
		signal_core(u);
	return n;
}

static uint32_t input(struct mc_serial *s, const uint8_t *data, uint32_t len)
{
	struct mc_uart *u = &s->uart;
	struct mc_uart_ring *r = u->ring;
	uint32_t room = rx_room(s);

	if (room < len) {
		__atomic_store_n(&r->rx.producer_waiting, 1, __ATOMIC_RELAXED);
		/* Full: "we wait" is visible before we look at tail again (see output(), with the parts swapped). */
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		room = rx_room(s);
	}
	uint32_t n = room < len ? room : len;

	if (!n)
		return 0;
	for (uint32_t i = 0; i < n; i++)
		r->rx_data[(u->rx_head + i) % MC_UART_RX_SIZE] = data[i];
	u->rx_head += n;
	/* Release: the bytes before the position that covers them. */
	__atomic_store_n(&r->rx.head, u->rx_head, __ATOMIC_RELEASE);
	/* Full: head is visible before we look whether the core sleeps; the core says so and then looks at head. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_exchange_n(&r->rx.consumer_asleep, 0, __ATOMIC_RELAXED))
		signal_core(u);
	return n;
}

static bool may_sleep(struct mc_serial *s)
{
	struct mc_uart_ring *r = s->uart.ring;

	__atomic_store_n(&r->tx.consumer_asleep, 1, __ATOMIC_RELAXED);
	/* Full: "asleep" is visible before the last look at head; the core publishes head and then looks at it. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return tx_filled(s) == 0;
}

/* The guest does not run, so what is in the ring now is all that it printed, and one look takes it. */
static bool settle(struct mc_serial *s)
{
	bool more;

	output(s, &more);
	return false;
}

static uint32_t pending(struct mc_serial *s, uint8_t data[MC_UART_RX_SIZE])
{
	const struct mc_uart *u = &s->uart;
	uint32_t n = MC_UART_RX_SIZE - rx_room(s);
	uint32_t tail = u->rx_head - n;

	/* A core whose positions cannot be has taken nothing: rx_room() says that the ring is full then. */
	for (uint32_t i = 0; i < n; i++)
		data[i] = u->ring->rx_data[(tail + i) % MC_UART_RX_SIZE];
	return n;
}

static void forget(struct mc_serial *s)
{
	struct mc_uart *u = &s->uart;

	/* The core does not look at the ring now: no order is needed but that of what asked for this. */
	u->rx_head = __atomic_load_n(&u->ring->rx.tail, __ATOMIC_RELAXED);
	__atomic_store_n(&u->ring->rx.head, u->rx_head, __ATOMIC_RELAXED);
}

const struct mc_front mc_uart_front = {
	.output = output, .input = input, .may_sleep = may_sleep, .settle = settle, .pending = pending, .forget = forget,
};

/* The scrollback's end and the position in the ring move on together. */
void mc_uart_rebase(struct mc_serial *s)
{
	if (!s->uart.ring)
		return;
	s->keep->uart_base = (uint32_t)s->scroll.end - s->uart.tx_tail;
	mc_in_order();
	s->keep->uart_based = 1;
}

/* What a predecessor has taken, and was killed before it could say so in the ring. */
static void catch_up(struct mc_serial *s, uint32_t head)
{
	uint32_t ahead = (uint32_t)s->scroll.end - s->keep->uart_base - s->uart.tx_tail;

	if (s->keep->uart_based && ahead <= head - s->uart.tx_tail) {
		s->uart.tx_tail += ahead;
		/* Release: its reads of the bytes were done before it died. */
		__atomic_store_n(&s->uart.ring->tx.tail, s->uart.tx_tail, __ATOMIC_RELEASE);
	}
}

int mc_uart_init(struct mc_serial *s)
{
	struct mc_uart *u = &s->uart;
	struct stat st;

	/* Behind the end of a memfd there is SIGBUS, so nobody may be able to move the end. */
	int seals = fcntl(s->cfg.ring_fd, F_GET_SEALS);
	if (seals < 0 || fstat(s->cfg.ring_fd, &st))
		return errno;
	if (!(seals & F_SEAL_SHRINK))
		return EPERM;
	if (st.st_size < (off_t)sizeof(struct mc_uart_ring))
		return EINVAL;
	void *p = mmap(NULL, sizeof(struct mc_uart_ring), PROT_READ | PROT_WRITE, MAP_SHARED, s->cfg.ring_fd, 0);
	if (p == MAP_FAILED)
		return errno;
	u->ring = p;
	u->tx_fd = s->cfg.uart_tx_fd;
	u->rx_fd = s->cfg.uart_rx_fd;
	/* A sidecar that replaces a dead one goes on at its positions, if they can be true at all. */
	u->tx_tail = __atomic_load_n(&u->ring->tx.tail, __ATOMIC_RELAXED);
	uint32_t head = __atomic_load_n(&u->ring->tx.head, __ATOMIC_RELAXED);
	if (head - u->tx_tail > MC_UART_TX_SIZE)
		u->tx_tail = head;
	catch_up(s, head);
	mc_uart_rebase(s);
	u->rx_head = __atomic_load_n(&u->ring->rx.head, __ATOMIC_RELAXED);
	if (mc_epoll_set(s->ep, EPOLL_CTL_ADD, u->tx_fd, EPOLLIN, MC_TAG_GUEST))
		return errno;
	return 0;
}

/* A signal may have been in flight when the loop held, or the core may be a new one: it shall look once, as we do. */
void mc_uart_resumed(struct mc_serial *s)
{
	if (s->uart.ring)
		signal_core(&s->uart);
}

void mc_uart_deinit(struct mc_serial *s)
{
	if (s->uart.ring)
		munmap(s->uart.ring, sizeof(struct mc_uart_ring));
}
