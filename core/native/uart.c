#include "uart.h"

#include <errno.h>
#include <linux/kvm.h>
#include <linux/serial_reg.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* The modem lines of a cable with somebody at the other end. */
#define MSR_CONNECTED (UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS)
#define MCR_BITS (UART_MCR_DTR | UART_MCR_RTS | UART_MCR_OUT1 | UART_MCR_OUT2 | UART_MCR_LOOP)
#define IER_BITS (UART_IER_RDI | UART_IER_THRI | UART_IER_RLSI | UART_IER_MSI)

static bool fifo_enabled(const struct mc_uart *u)
{
	return u->regs.fcr & UART_FCR_ENABLE_FIFO;
}

static bool looped(const struct mc_uart *u)
{
	return u->regs.mcr & UART_MCR_LOOP;
}

static uint32_t fifo_size(const struct mc_uart *u)
{
	return fifo_enabled(u) ? MC_UART_FIFO : 1;
}

static uint32_t rx_trigger(const struct mc_uart *u)
{
	static const uint8_t levels[] = { 1, 4, 8, 14 };

	return fifo_enabled(u) ? levels[u->regs.fcr >> 6] : 1;
}

static void signal_event(int fd)
{
	const uint64_t one = 1;

	/* EAGAIN: the counter is at its end, so that the reader is awake anyway. Nothing else can happen to an
	 * eventfd that is open. */
	if (fd >= 0 && write(fd, &one, sizeof(one)) < 0)
		return;
}

/* --- The interrupt line ------------------------------------------------------------------------------------------ */

static uint8_t interrupt_id(const struct mc_uart *u)
{
	const struct mc_uart_regs *r = &u->regs;

	/* Priority as in table IV of the datasheet. */
	if ((r->ier & UART_IER_RLSI) && r->overrun)
		return UART_IIR_RLSI;
	if ((r->ier & UART_IER_RDI) && r->rx_len)
		/* Below the trigger level the line is idle by definition, so the timeout has passed. */
		return r->rx_len >= rx_trigger(u) ? UART_IIR_RDI : UART_IIR_RX_TIMEOUT;
	if ((r->ier & UART_IER_THRI) && r->thri)
		return UART_IIR_THRI;
	if ((r->ier & UART_IER_MSI) && r->msr_delta)
		return UART_IIR_MSI;
	return UART_IIR_NO_INT;
}

/* On a PC the interrupt output reaches the controller through OUT2. */
static bool irq_output(const struct mc_uart *u)
{
	return interrupt_id(u) != UART_IIR_NO_INT && (u->regs.mcr & UART_MCR_OUT2);
}

static void update_irq(struct mc_uart *u)
{
	bool level = irq_output(u);

	if (level == u->irq_level)
		return;
	u->irq_level = level;
	if (u->vm_fd >= 0) {
		struct kvm_irq_level irq = { .irq = u->gsi, .level = level };

		if (ioctl(u->vm_fd, KVM_IRQ_LINE, &irq) < 0)
			u->irq_error = errno;
	}
}

/* --- The rings --------------------------------------------------------------------------------------------------- */

/* Room in the TX ring; a peer whose tail lies outside of [head - size, head] is taken for a full ring. */
static uint32_t tx_room(struct mc_uart *u)
{
	/* acquire: the consumer has done with the bytes before its tail before we overwrite them. */
	uint32_t used = u->tx_head - __atomic_load_n(&u->ring->tx.tail, __ATOMIC_ACQUIRE);

	if (used > MC_UART_TX_SIZE) {
		u->stats.ring_errors++;
		return 0;
	}
	return MC_UART_TX_SIZE - used;
}

static bool tx_room_or_wait(struct mc_uart *u)
{
	if (tx_room(u))
		return true;
	u->stats.tx_stalls++;
	__atomic_store_n(&u->ring->tx.producer_waiting, 1, __ATOMIC_RELAXED);
	/* Store of the flag before the load of tail: either we see the room that the consumer makes, or it sees the
	 * flag after having made it. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return tx_room(u) != 0;
}

static bool tx_put(struct mc_uart *u, uint8_t byte)
{
	struct mc_uart_ring *ring = u->ring;

	if (!ring) {
		u->stats.tx_discarded++;
		return true;
	}
	if (!tx_room_or_wait(u))
		return false;
	ring->tx_data[u->tx_head % MC_UART_TX_SIZE] = byte;
	/* release: the byte is there before the head says so. */
	__atomic_store_n(&ring->tx.head, ++u->tx_head, __ATOMIC_RELEASE);
	u->stats.tx_bytes++;
	/* Store of head before the load of the flag; the consumer sets the flag, then looks at head. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring->tx.consumer_asleep, __ATOMIC_RELAXED) &&
	    __atomic_exchange_n(&ring->tx.consumer_asleep, 0, __ATOMIC_RELAXED))
		signal_event(u->tx_event);
	return true;
}

static void tx_drain(struct mc_uart *u)
{
	struct mc_uart_regs *r = &u->regs;
	uint32_t n = 0;

	if (!r->tx_len)
		return;
	while (n < r->tx_len && tx_put(u, r->tx[n]))
		n++;
	memmove(r->tx, r->tx + n, r->tx_len - n);
	r->tx_len -= n;
	if (!r->tx_len)
		r->thri = 1;
}

/* Bytes that wait in the RX ring; a distance that cannot be counts as none. */
static uint32_t rx_waiting(struct mc_uart *u)
{
	/* acquire: the bytes before head are there. */
	uint32_t n = __atomic_load_n(&u->ring->rx.head, __ATOMIC_ACQUIRE) - u->rx_tail;

	if (n > MC_UART_RX_SIZE) {
		u->stats.ring_errors++;
		return 0;
	}
	return n;
}

/* Moves bytes from the ring into the FIFO, and asks for a signal once the ring is empty. */
static void rx_fill(struct mc_uart *u)
{
	struct mc_uart_regs *r = &u->regs;
	struct mc_uart_ring *ring = u->ring;
	bool taken = false, slept = false;

	if (!ring || looped(u))
		return;
	while (r->rx_len < fifo_size(u)) {
		if (rx_waiting(u)) {
			r->rx[r->rx_len++] = ring->rx_data[u->rx_tail % MC_UART_RX_SIZE];
			/* release: the byte has been read before the producer may overwrite it. */
			__atomic_store_n(&ring->rx.tail, ++u->rx_tail, __ATOMIC_RELEASE);
			u->stats.rx_bytes++;
			taken = true;
			slept = false;
		} else if (!slept) {
			__atomic_store_n(&ring->rx.consumer_asleep, 1, __ATOMIC_RELAXED);
			/* Store of the flag before the next look at head; see uart_ring.h. */
			__atomic_thread_fence(__ATOMIC_SEQ_CST);
			slept = true;
		} else {
			break;
		}
	}
	if (!taken)
		return;
	/* Store of tail before the load of the flag; the producer sets the flag, then looks at tail. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring->rx.producer_waiting, __ATOMIC_RELAXED) &&
	    __atomic_exchange_n(&ring->rx.producer_waiting, 0, __ATOMIC_RELAXED))
		signal_event(u->tx_event);
}

/* --- The registers ----------------------------------------------------------------------------------------------- */

static uint8_t modem_status(const struct mc_uart *u)
{
	uint8_t mcr = u->regs.mcr;

	if (!looped(u))
		return MSR_CONNECTED;
	/* Loopback ties the outputs to the inputs: RTS-CTS, DTR-DSR, OUT1-RI, OUT2-DCD. */
	return (mcr & UART_MCR_RTS ? UART_MSR_CTS : 0) | (mcr & UART_MCR_DTR ? UART_MSR_DSR : 0) |
	       (mcr & UART_MCR_OUT1 ? UART_MSR_RI : 0) | (mcr & UART_MCR_OUT2 ? UART_MSR_DCD : 0);
}

static void write_mcr(struct mc_uart *u, uint8_t value)
{
	uint8_t before = modem_status(u), changed;

	u->regs.mcr = value & MCR_BITS;
	changed = before ^ modem_status(u);
	/* The delta bits are the status bits shifted down by four; RI's reports its trailing edge only (TERI). */
	if ((changed & UART_MSR_RI) && (modem_status(u) & UART_MSR_RI))
		changed &= ~UART_MSR_RI;
	u->regs.msr_delta |= changed >> 4;
	rx_fill(u);
}

static void write_thr(struct mc_uart *u, uint8_t byte)
{
	struct mc_uart_regs *r = &u->regs;

	r->thri = 0;
	if (looped(u)) {
		if (r->rx_len < fifo_size(u)) {
			r->rx[r->rx_len++] = byte;
		} else {
			r->overrun = 1;
			u->stats.rx_overrun++;
		}
		r->thri = 1;
		return;
	}
	tx_drain(u);
	r->thri = 0;
	if (!r->tx_len && tx_put(u, byte))
		r->thri = 1;
	else if (r->tx_len < fifo_size(u))
		r->tx[r->tx_len++] = byte;
	else
		u->stats.tx_overrun++;
}

static void write_fcr(struct mc_uart *u, uint8_t value)
{
	struct mc_uart_regs *r = &u->regs;
	/* Switching the FIFOs on or off clears them both. */
	bool toggled = (r->fcr ^ value) & UART_FCR_ENABLE_FIFO;

	r->fcr = value & UART_FCR_ENABLE_FIFO ? value & (UART_FCR_ENABLE_FIFO | UART_FCR_TRIGGER_MASK) : 0;
	if (toggled || (value & UART_FCR_CLEAR_RCVR))
		r->rx_len = 0;
	if ((toggled || (value & UART_FCR_CLEAR_XMIT)) && r->tx_len) {
		u->stats.tx_overrun += r->tx_len;
		r->tx_len = 0;
		r->thri = 1;
	}
	rx_fill(u);
}

static void write_ier(struct mc_uart *u, uint8_t value)
{
	uint8_t rising = value & ~u->regs.ier;

	u->regs.ier = value & IER_BITS;
	/* Enabling it while the transmitter is empty interrupts at once; drivers rely on it to start sending. */
	if ((rising & UART_IER_THRI) && !u->regs.tx_len)
		u->regs.thri = 1;
}

static uint8_t read_rbr(struct mc_uart *u)
{
	struct mc_uart_regs *r = &u->regs;
	uint8_t byte = r->rx[0];

	if (!r->rx_len)
		return 0;
	memmove(r->rx, r->rx + 1, --r->rx_len);
	if (!r->rx_len)
		rx_fill(u);
	return byte;
}

static uint8_t read_iir(struct mc_uart *u)
{
	uint8_t id = interrupt_id(u);

	if (id == UART_IIR_THRI)
		u->regs.thri = 0;
	return id | (fifo_enabled(u) ? 0xc0 : 0);
}

static uint8_t read_lsr(struct mc_uart *u)
{
	struct mc_uart_regs *r = &u->regs;
	uint8_t value = (r->rx_len ? UART_LSR_DR : 0) | (r->overrun ? UART_LSR_OE : 0);

	if (!r->tx_len)
		value |= UART_LSR_THRE | UART_LSR_TEMT;
	r->overrun = 0;
	return value;
}

static uint8_t read_msr(struct mc_uart *u)
{
	uint8_t value = modem_status(u) | u->regs.msr_delta;

	u->regs.msr_delta = 0;
	return value;
}

uint8_t mc_uart_read(struct mc_uart *u, uint32_t offset)
{
	struct mc_uart_regs *r = &u->regs;
	bool dlab;
	uint8_t value = 0xff;

	pthread_mutex_lock(&u->lock);
	dlab = r->lcr & UART_LCR_DLAB;
	switch (offset) {
	case UART_RX:
		value = dlab ? r->dll : read_rbr(u);
		break;
	case UART_IER:
		value = dlab ? r->dlm : r->ier;
		break;
	case UART_IIR:
		value = read_iir(u);
		break;
	case UART_LCR:
		value = r->lcr;
		break;
	case UART_MCR:
		value = r->mcr;
		break;
	case UART_LSR:
		value = read_lsr(u);
		break;
	case UART_MSR:
		value = read_msr(u);
		break;
	case UART_SCR:
		value = r->scr;
		break;
	}
	update_irq(u);
	pthread_mutex_unlock(&u->lock);
	return value;
}

void mc_uart_write(struct mc_uart *u, uint32_t offset, uint8_t value)
{
	struct mc_uart_regs *r = &u->regs;
	bool dlab;

	pthread_mutex_lock(&u->lock);
	dlab = r->lcr & UART_LCR_DLAB;
	switch (offset) {
	case UART_TX:
		if (dlab)
			r->dll = value;
		else
			write_thr(u, value);
		break;
	case UART_IER:
		if (dlab)
			r->dlm = value;
		else
			write_ier(u, value);
		break;
	case UART_FCR:
		write_fcr(u, value);
		break;
	case UART_LCR:
		r->lcr = value;
		break;
	case UART_MCR:
		write_mcr(u, value);
		break;
	case UART_SCR:
		r->scr = value;
		break;
	/* LSR and MSR: factory tests, ignored. */
	}
	update_irq(u);
	pthread_mutex_unlock(&u->lock);
}

/* --- Life -------------------------------------------------------------------------------------------------------- */

static void power_on(struct mc_uart_regs *r)
{
	memset(r, 0, sizeof(*r));
	r->dll = 12;	/* 9600 baud: reset leaves the divisor alone, firmware would have set it */
}

int mc_uart_init(struct mc_uart *u, int vm_fd, uint32_t gsi)
{
	memset(u, 0, sizeof(*u));
	u->vm_fd = vm_fd;
	u->gsi = gsi;
	u->tx_event = u->rx_event = -1;
	power_on(&u->regs);
	return -pthread_mutex_init(&u->lock, NULL);
}

void mc_uart_deinit(struct mc_uart *u)
{
	pthread_mutex_destroy(&u->lock);
}

void mc_uart_attach(struct mc_uart *u, struct mc_uart_ring *ring, int tx_event, int rx_event)
{
	pthread_mutex_lock(&u->lock);
	u->ring = ring;
	u->tx_event = tx_event;
	u->rx_event = rx_event;
	if (ring) {
		/* A peer that lied about them loses its own bytes, nothing else. */
		u->tx_head = __atomic_load_n(&ring->tx.head, __ATOMIC_ACQUIRE);
		u->rx_tail = __atomic_load_n(&ring->rx.tail, __ATOMIC_ACQUIRE);
	} else {
		tx_drain(u);
		update_irq(u);
	}
	pthread_mutex_unlock(&u->lock);
}

void mc_uart_poll(struct mc_uart *u)
{
	uint64_t count;

	pthread_mutex_lock(&u->lock);
	/* Non-blocking: EAGAIN when another call has taken the signal already. */
	if (u->rx_event >= 0 && read(u->rx_event, &count, sizeof(count)) < 0)
		count = 0;
	tx_drain(u);
	rx_fill(u);
	update_irq(u);
	pthread_mutex_unlock(&u->lock);
}

void mc_uart_reset(struct mc_uart *u)
{
	pthread_mutex_lock(&u->lock);
	power_on(&u->regs);
	rx_fill(u);
	update_irq(u);
	pthread_mutex_unlock(&u->lock);
}

void mc_uart_save(struct mc_uart *u, struct mc_uart_regs *regs)
{
	pthread_mutex_lock(&u->lock);
	*regs = u->regs;
	/* What the FIFOs held before is nobody's state: equal machines have equal snapshots. */
	memset(regs->rx + regs->rx_len, 0, sizeof(regs->rx) - regs->rx_len);
	memset(regs->tx + regs->tx_len, 0, sizeof(regs->tx) - regs->tx_len);
	pthread_mutex_unlock(&u->lock);
}

int mc_uart_restore(struct mc_uart *u, const struct mc_uart_regs *regs)
{
	if (regs->rx_len > MC_UART_FIFO || regs->tx_len > MC_UART_FIFO || (regs->ier & ~IER_BITS) ||
	    (regs->mcr & ~MCR_BITS) || regs->msr_delta > 0xf || regs->thri > 1 || regs->overrun > 1 ||
	    (regs->fcr & ~(UART_FCR_ENABLE_FIFO | UART_FCR_TRIGGER_MASK)))
		return -EINVAL;
	pthread_mutex_lock(&u->lock);
	u->regs = *regs;
	u->irq_level = irq_output(u);
	pthread_mutex_unlock(&u->lock);
	return 0;
}
