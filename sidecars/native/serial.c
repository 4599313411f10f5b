/* The serial sidecar's loop and what the main thread may call beside it; serial.h says how the parts fit. */
#define _GNU_SOURCE
#include "serial.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum { CMD_NONE, CMD_ATTACH, CMD_DETACH, CMD_EMERGENCY, CMD_QUIESCE, CMD_RESUME, CMD_SAVE, CMD_LOAD };

/* How long the loop looks for more output from the 16550 before it asks to be woken: serial_uart.c. */
#define NAP_MS 1
#define NAP_BELOW (MC_UART_TX_SIZE / 4)

int mc_epoll_set(int ep, int op, int fd, uint32_t events, uint64_t tag)
{
	struct epoll_event ev = {.events = events, .data.u64 = tag};

	return epoll_ctl(ep, op, fd, &ev);
}

int64_t mc_now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void mc_serial_notice(struct mc_serial *s, unsigned notices)
{
	const uint64_t one = 1;

	atomic_fetch_or(&s->notices, notices);
	ssize_t n = write(s->cfg.event_fd, &one, sizeof(one));	/* EAGAIN: a signal is pending already */
	(void)n;
}

unsigned mc_serial_notices(struct mc_serial *s)
{
	return atomic_exchange(&s->notices, 0);
}

static void deinit(struct mc_serial *s)
{
	mc_sinks_deinit(s);
	mc_uart_deinit(s);
	if (s->in_ep >= 0)
		close(s->in_ep);
	if (s->ep >= 0)
		close(s->ep);
	if (s->wake_fd >= 0)
		close(s->wake_fd);
	pthread_cond_destroy(&s->cmd_done);
	pthread_mutex_destroy(&s->cmd_lock);
	mc_scroll_deinit(&s->scroll);
	free(s);
}

uint64_t mc_serial_keep_size(uint64_t scrollback) { return MC_SERIAL_KEEP + mc_scroll_cap(scrollback); }
struct mc_beat *mc_serial_beat(struct mc_serial *s) { return &s->beat; }

/* Goes on where a predecessor stopped, as far as what it left can be believed. */
static void take_over(struct mc_serial *s)
{
	struct mc_serial_keep *k = s->keep;

	if (!k->cap) {
		k->file[0].size = -1;
		mc_in_order();
		k->cap = s->scroll.cap;
	}
	if (k->stage.off > MC_SERIAL_INPUT || k->stage.len > MC_SERIAL_INPUT - k->stage.off)
		k->stage.off = k->stage.len = 0;
	if (k->backend_pos > s->scroll.end)
		k->backend_pos = s->scroll.end;
	if (s->file.fd >= 0)
		mc_file_take_over(s);
}

struct mc_serial *mc_serial_new(const struct mc_serial_config *cfg)
{
	struct mc_serial *s = calloc(1, sizeof(*s));
	int err;

	if (!s)
		return NULL;
	s->cfg = *cfg;
	s->file.fd = cfg->backend == MC_SERIAL_FILE ? cfg->backend_fd : -1;
	s->watch_fd = -1;
	s->keep = cfg->keep && cfg->keep_size >= mc_serial_keep_size(cfg->scrollback) ? cfg->keep : NULL;
	err = mc_scroll_init(&s->scroll, cfg->scrollback, s->file.fd >= 0, s->keep);
	if (!s->keep)
		s->keep = &s->own_keep;
	s->stage = &s->keep->stage;
	if (err) {
		free(s);
		errno = err;
		return NULL;
	}
	take_over(s);
	pthread_mutex_init(&s->cmd_lock, NULL);
	pthread_cond_init(&s->cmd_done, NULL);
	s->ep = epoll_create1(EPOLL_CLOEXEC);
	s->in_ep = epoll_create1(EPOLL_CLOEXEC);
	s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	s->beat = (struct mc_beat){.wake_fd = s->wake_fd, .event_fd = cfg->event_fd};
	for (uint32_t i = 0; i <= MC_SERIAL_CLIENTS; i++)
		s->sinks[i].fd = -1;
	if (s->ep < 0 || s->in_ep < 0 || s->wake_fd < 0 ||
	    mc_epoll_set(s->ep, EPOLL_CTL_ADD, s->wake_fd, EPOLLIN, MC_TAG_WAKE)) {
		err = errno;
	} else {
		s->front = cfg->ring_fd >= 0 ? &mc_uart_front : &mc_console_front;
		mc_input_arm(s, true);
		err = cfg->ring_fd >= 0 ? mc_uart_init(s) : 0;
		if (!err)
			err = mc_sinks_init(s);
	}
	if (err) {
		deinit(s);
		errno = err;
		return NULL;
	}
	return s;
}

int mc_serial_free(struct mc_serial *s)
{
	int err = s->file.started ? mc_file_stop(s) : 0;

	/* The file's thread hangs in the kernel and will look at s again when it comes back: leave s to it. */
	if (s->file.started)
		return err;
	if (s->cfg.backend_fd >= 0)
		close(s->cfg.backend_fd);
	if (s->cfg.console_fd >= 0)
		close(s->cfg.console_fd);
	deinit(s);
	return err;
}

static void clear_eventfd(int fd)
{
	uint64_t count;
	ssize_t n = read(fd, &count, sizeof(count));	/* EAGAIN: somebody cleared it before */

	(void)n;
}

static void quiesce(struct mc_serial *s)
{
	if (s->held)
		return;
	/* Sinks in between, as ever: a large chain would else push what they have not seen yet out of the ring. */
	while (s->front->settle(s))
		mc_sinks_flush(s);
	mc_input_arm(s, false);
	s->held = true;
}

static void save(struct mc_serial *s, struct mc_serial_state *st)
{
	uint64_t n = mc_scroll_shown(&s->scroll);
	struct iovec iov[2];

	/* In the order in which it was typed: what is in the ring was staged before. */
	st->input_len = s->front->pending(s, st->input);
	memcpy(st->input + st->input_len, s->stage->data + s->stage->off, s->stage->len);
	st->input_len += s->stage->len;
	n = n < MC_SERIAL_HISTORY ? n : MC_SERIAL_HISTORY;
	st->history_len = 0;
	for (int i = 0, parts = mc_scroll_peek(&s->scroll, s->scroll.end - n, n, iov); i < parts; i++) {
		memcpy(st->history + st->history_len, iov[i].iov_base, iov[i].iov_len);
		st->history_len += iov[i].iov_len;
	}
}

static int load(struct mc_serial *s, const struct mc_serial_state *st)
{
	if (st->input_len > sizeof(st->input) || st->history_len > sizeof(st->history))
		return EINVAL;
	if (!s->held)
		return EBUSY;
	s->front->forget(s);
	memcpy(s->stage->data, st->input, st->input_len);
	s->stage->off = 0;
	s->stage->len = st->input_len;
	if (!s->scroll.end) {	/* else its readers have seen what it printed */
		mc_scroll_load(&s->scroll, st->history, st->history_len, &s->file.pos);
		s->sinks[0].pos = s->keep->backend_pos = s->keep->loaded = s->scroll.end;
		mc_uart_rebase(s);
		mc_file_keep(s);
	}
	return 0;
}

/* With cmd_lock held. */
static void do_command(struct mc_serial *s)
{
	switch (s->cmd) {
	case CMD_ATTACH:
		mc_console_detach(s);
		mc_console_attach(s, s->cmd_has_rx ? &s->cmd_rx : NULL, s->cmd_has_tx ? &s->cmd_tx : NULL);
		break;
	case CMD_DETACH:
		mc_console_detach(s);
		break;
	case CMD_EMERGENCY:
		/* It is no byte of the chain in hand, whose beginning moves on. Killed in between, one of that comes again. */
		s->keep->chain_at++;
		mc_in_order();
		mc_scroll_append(&s->scroll, &s->cmd_byte, 1);
		break;
	case CMD_QUIESCE:
		quiesce(s);
		break;
	case CMD_RESUME:
		/* The next turn looks at everything; sources that are ready are reported again. */
		s->held = false;
		mc_input_arm(s, true);
		mc_uart_resumed(s);
		break;
	case CMD_SAVE:
		save(s, s->cmd_state);
		break;
	case CMD_LOAD:
		s->cmd_error = load(s, s->cmd_state);
		break;
	}
	if (s->cmd != CMD_NONE) {
		s->cmd = CMD_NONE;
		pthread_cond_broadcast(&s->cmd_done);
	}
}

/* With cmd_lock held and no command under way: has the loop do cmd, or does it itself while there is no loop. */
static void command(struct mc_serial *s, int cmd)
{
	const uint64_t one = 1;

	s->cmd = cmd;
	if (!s->running) {
		do_command(s);
		return;
	}
	ssize_t n = write(s->wake_fd, &one, sizeof(one));
	(void)n;
	while (s->cmd != CMD_NONE)
		pthread_cond_wait(&s->cmd_done, &s->cmd_lock);
}

static void begin_command(struct mc_serial *s)
{
	pthread_mutex_lock(&s->cmd_lock);
	while (s->cmd != CMD_NONE)
		pthread_cond_wait(&s->cmd_done, &s->cmd_lock);
}

void mc_serial_attach(struct mc_serial *s, const struct mc_vq *rx, const struct mc_vq *tx)
{
	begin_command(s);
	s->cmd_has_rx = rx != NULL;
	s->cmd_has_tx = tx != NULL;
	if (rx)
		s->cmd_rx = *rx;
	if (tx)
		s->cmd_tx = *tx;
	command(s, CMD_ATTACH);
	pthread_mutex_unlock(&s->cmd_lock);
}

static void simple_command(struct mc_serial *s, int cmd)
{
	begin_command(s);
	command(s, cmd);
	pthread_mutex_unlock(&s->cmd_lock);
}

void mc_serial_detach(struct mc_serial *s) { simple_command(s, CMD_DETACH); }
void mc_serial_quiesce(struct mc_serial *s) { simple_command(s, CMD_QUIESCE); }
void mc_serial_resume(struct mc_serial *s) { simple_command(s, CMD_RESUME); }

void mc_serial_save(struct mc_serial *s, struct mc_serial_state *state)
{
	begin_command(s);
	s->cmd_state = state;
	command(s, CMD_SAVE);
	pthread_mutex_unlock(&s->cmd_lock);
}

int mc_serial_load(struct mc_serial *s, const struct mc_serial_state *state)
{
	int err;

	begin_command(s);
	s->cmd_state = (struct mc_serial_state *)(uintptr_t)state;
	command(s, CMD_LOAD);
	err = s->cmd_error;
	pthread_mutex_unlock(&s->cmd_lock);
	return err;
}

void mc_serial_emergency(struct mc_serial *s, uint8_t byte)
{
	begin_command(s);
	s->cmd_byte = byte;
	command(s, CMD_EMERGENCY);
	pthread_mutex_unlock(&s->cmd_lock);
}

void mc_serial_stop(struct mc_serial *s)
{
	const uint64_t one = 1;

	atomic_store(&s->stop, true);
	ssize_t n = write(s->wake_fd, &one, sizeof(one));
	(void)n;
}

const struct mc_vq *mc_serial_queue(const struct mc_serial *s, int index)
{
	return index == 0 ? &s->con.rx : index == 1 ? &s->con.tx : NULL;
}

void mc_serial_get_stats(struct mc_serial *s, struct mc_serial_stats *out)
{
	*out = s->stats;
	out->guest_out = s->scroll.end - s->scroll.loaded;
}

/* One turn's events. true: a source of input is ready. */
static bool dispatch(struct mc_serial *s, const struct epoll_event *evs, int n)
{
	bool input = false;

	for (int i = 0; i < n; i++) {
		switch (evs[i].data.u64) {
		case MC_TAG_WAKE:
			clear_eventfd(s->wake_fd);
			pthread_mutex_lock(&s->cmd_lock);
			do_command(s);
			pthread_mutex_unlock(&s->cmd_lock);
			break;
		case MC_TAG_GUEST:
			clear_eventfd(s->uart.tx_fd);
			break;
		case MC_TAG_KICK_RX:
			clear_eventfd(s->con.rx.kick_fd);
			mc_vq_kicked(&s->con.rx);
			break;
		case MC_TAG_KICK_TX:
			clear_eventfd(s->con.tx.kick_fd);
			mc_vq_kicked(&s->con.tx);
			break;
		case MC_TAG_LISTEN:
			mc_sinks_accept(s, false);
			break;
		case MC_TAG_BACKEND_LISTEN:
			mc_sinks_accept(s, true);
			break;
		case MC_TAG_WATCH:
			mc_sinks_reopened(s);
			break;
		case MC_TAG_INPUT:
			input = true;
			break;
		default:
			mc_sink_event(s, evs[i].data.u64 - MC_TAG_SINK, evs[i].events);
		}
	}
	return input;
}

static int loop(struct mc_serial *s)
{
	struct epoll_event evs[32];
	bool input = true;

	while (!atomic_load(&s->stop)) {
		bool again = false;

		mc_beat(&s->beat);
		uint64_t got = s->held ? 0 : s->front->output(s, &again);
		int timeout;

		again |= mc_sinks_flush(s);
		if (!s->held && (input || s->stage->len))
			input = mc_sinks_input(s);
		if (again || (input && !s->held))
			timeout = 0;
		else if (got && s->uart.ring)
			timeout = got < NAP_BELOW ? NAP_MS : 0;
		else if (!s->held && !s->front->may_sleep(s))
			timeout = 0;
		else
			timeout = s->accept_at ? 1000 : -1;

		int n = epoll_wait(s->ep, evs, sizeof(evs) / sizeof(evs[0]), timeout);
		if (n < 0 && errno != EINTR)
			return errno;
		if (s->accept_at && mc_now_ms() >= s->accept_at)
			mc_sinks_accept_again(s);
		input |= dispatch(s, evs, n);
	}
	return 0;
}

int mc_serial_run(struct mc_serial *s)
{
	int err = s->file.fd >= 0 && !s->file.started ? mc_file_start(s) : 0;
	bool more = true;

	if (err)
		return err;
	pthread_mutex_lock(&s->cmd_lock);
	s->running = true;
	pthread_mutex_unlock(&s->cmd_lock);

	err = loop(s);

	/* What the guest printed last is what people look for. Bounded, for a guest that still runs; one that holds has
	 * printed nothing since. */
	for (int i = 0; i < 64 && more && !s->held; i++) {
		more = s->front->output(s, &more) || more;
		mc_sinks_flush(s);
	}
	mc_sinks_drain(s);

	pthread_mutex_lock(&s->cmd_lock);
	s->running = false;
	do_command(s);
	pthread_mutex_unlock(&s->cmd_lock);
	return err;
}
