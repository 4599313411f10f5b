/*
 * Who reads the guest's output and writes its input: the console's clients and the backend.
 *
 * A sink has two halves that end apart. Its output half ends when the peer is gone (HUP, EPIPE, EIO); its input half
 * only at end of file, so that what a client sent before it left still reaches a guest that is slow to read. A pty
 * keeps its slot: the inotify watch on its slave says when somebody opens it again. Every descriptor is in the main
 * epoll for hang-ups (and EPOLLOUT while it is blocked), and is removed at the first one, which would else be reported
 * for ever.
 */
#define _GNU_SOURCE
#include "serial.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <unistd.h>

#define SINK_TURN (256u << 10)	/* bytes for one sink before the others and the guest get their turn */

static uint32_t index_of(const struct mc_serial *s, const struct mc_sink *k) { return k - s->sinks; }

static bool watch(struct mc_serial *s, struct mc_sink *k, uint32_t events)
{
	if (k->watched && k->events == events)
		return true;
	if (mc_epoll_set(s->ep, k->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, k->fd, events, MC_TAG_SINK + index_of(s, k)))
		return false;
	k->events = events;
	return k->watched = true;
}

static void unwatch(struct mc_serial *s, struct mc_sink *k)
{
	if (k->watched)
		mc_epoll_set(s->ep, EPOLL_CTL_DEL, k->fd, 0, 0);
	k->watched = false;
}

/* Starts whatever half of it is not open. false with errno set: the kernel has no room for the watches. */
static bool open_sink(struct mc_serial *s, struct mc_sink *k)
{
	k->blocked = false;
	k->writing = watch(s, k, 0);
	if (!k->writing)
		return false;
	if (!k->reading)
		k->reading = mc_epoll_set(s->in_ep, EPOLL_CTL_ADD, k->fd, EPOLLIN, index_of(s, k)) == 0;
	return k->reading;
}

/* Both halves have ended: the slot is free for the next one. */
static void release(struct mc_serial *s, struct mc_sink *k)
{
	if (k->writing || k->reading || k->fd < 0)
		return;
	if (k != &s->sinks[0]) {
		close(k->fd);
		k->fd = -1;
		s->stats.clients--;
	} else if (s->cfg.backend == MC_SERIAL_SOCKET) {
		close(k->fd);
		k->fd = -1;
		mc_serial_notice(s, MC_SERIAL_BACKEND_CLOSED);
		mc_epoll_set(s->ep, EPOLL_CTL_ADD, s->cfg.backend_fd, EPOLLIN, MC_TAG_BACKEND_LISTEN);
	} else {
		mc_serial_notice(s, MC_SERIAL_BACKEND_CLOSED);
	}
}

static void end_output(struct mc_serial *s, struct mc_sink *k)
{
	if (!k->writing)
		return;
	unwatch(s, k);
	k->writing = false;
	/* A note that was cut off is of no use to the next reader, who is told again. */
	if (k->note_len && k->note_off < k->note_len)
		k->note_len = k->note_off = 0;
	release(s, k);
}

static void end_input(struct mc_serial *s, struct mc_sink *k)
{
	if (!k->reading)
		return;
	mc_epoll_set(s->in_ep, EPOLL_CTL_DEL, k->fd, 0, 0);
	k->reading = false;
	release(s, k);
}

static ssize_t write_some(struct mc_sink *k, struct iovec *iov, int n)
{
	struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n};

	return k->is_socket ? sendmsg(k->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) : writev(k->fd, iov, n);
}

/* Writes until the sink has everything, blocks, or has had its turn. */
static void flush(struct mc_serial *s, struct mc_sink *k)
{
	uint64_t turn = 0;

	while (turn < SINK_TURN) {
		struct iovec iov[3];
		uint64_t pos = mc_scroll_resume(&s->scroll, k->pos);
		int n = 0;

		k->skipped += pos - k->pos;
		s->stats.skipped += pos - k->pos;
		k->pos = pos;
		if (k->skipped && !k->note_len) {
			k->note_len = mc_scroll_note(k->note, k->skipped);
			k->note_off = 0;
			k->skipped = 0;
		}
		if (k->note_len)
			iov[n++] = (struct iovec){k->note + k->note_off, k->note_len - k->note_off};
		/* Skipped again while the last note was under way: the next note comes before further bytes. */
		if (!k->skipped)
			n += mc_scroll_peek(&s->scroll, k->pos, SINK_TURN, iov + n);
		if (!n)
			break;

		ssize_t done = write_some(k, iov, n);
		if (done < 0) {
			if (errno == EINTR)
				continue;
			if (errno == EAGAIN || errno == ENOBUFS)
				k->blocked = true;
			else
				end_output(s, k);
			break;
		}
		/* A terminal whose output is stopped (^S) takes 0 bytes. */
		if (done == 0) {
			k->blocked = true;
			break;
		}
		turn += done;
		if (k->note_len) {
			uint64_t left = k->note_len - k->note_off;
			uint64_t of_note = (uint64_t)done < left ? (uint64_t)done : left;

			k->note_off += of_note;
			done -= of_note;
			if (k->note_off == k->note_len)
				k->note_len = k->note_off = 0;
		}
		k->pos += done;
		if (k == &s->sinks[0]) {
			s->keep->backend_pos = k->pos;
			s->keep->backend_skipped = k->skipped;
		}
	}
	if (k->writing)
		watch(s, k, k->blocked ? EPOLLOUT : 0);
}

static bool has_output(const struct mc_serial *s, const struct mc_sink *k)
{
	return k->fd >= 0 && k->writing && (k->pos != s->scroll.end || k->note_len || k->skipped);
}

bool mc_sinks_flush(struct mc_serial *s)
{
	bool more = false;

	for (uint32_t i = 0; i <= MC_SERIAL_CLIENTS; i++) {
		struct mc_sink *k = &s->sinks[i];

		if (has_output(s, k) && !k->blocked) {
			flush(s, k);
			more |= has_output(s, k) && !k->blocked;
		}
	}
	return more;
}

void mc_sink_event(struct mc_serial *s, uint32_t index, uint32_t events)
{
	struct mc_sink *k = &s->sinks[index];

	/* An event of a descriptor that an earlier event of the same turn has closed. */
	if (index > MC_SERIAL_CLIENTS || k->fd < 0 || !k->watched)
		return;
	if (events & EPOLLOUT)
		k->blocked = false;
	if (events & (EPOLLHUP | EPOLLERR))
		end_output(s, k);
}

/* A client slot: a free one, or that of a client that has left and whose last input the guest does not take. */
static struct mc_sink *client_slot(struct mc_serial *s)
{
	for (uint32_t i = 1; i <= MC_SERIAL_CLIENTS; i++)
		if (s->sinks[i].fd < 0)
			return &s->sinks[i];
	for (uint32_t i = 1; i <= MC_SERIAL_CLIENTS; i++)
		if (!s->sinks[i].writing) {
			end_input(s, &s->sinks[i]);
			return &s->sinks[i];
		}
	return NULL;
}

static void accept_failed(struct mc_serial *s)
{
	s->stats.accept_errno = errno;
	mc_serial_notice(s, MC_SERIAL_ACCEPT_FAILED);
}

bool mc_sinks_accept(struct mc_serial *s, bool backend)
{
	static const char full[] = "motorcade: too many consoles are attached\r\n";
	int fd = accept4(backend ? s->cfg.backend_fd : s->cfg.console_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd < 0) {
		/* The peer left again, or there is nobody: not errors of ours. Out of descriptors or memory: the peer
		 * stays in the backlog and is served later. */
		if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
			accept_failed(s);
			mc_epoll_set(s->ep, EPOLL_CTL_DEL, backend ? s->cfg.backend_fd : s->cfg.console_fd, 0, 0);
			s->accept_at = mc_now_ms() + 1000;
		}
		return errno == EINTR || errno == ECONNABORTED;
	}
	struct mc_sink *k = backend ? &s->sinks[0] : client_slot(s);
	if (!k) {
		/* Best effort: a socket just accepted has room for a line. */
		ssize_t n = send(fd, full, sizeof(full) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		(void)n;
		close(fd);
		s->stats.clients_refused++;
		mc_serial_notice(s, MC_SERIAL_CLIENTS_FULL);
		return true;
	}
	/* The backend is one stream for whoever connects in turn: it goes on where the last one stopped. */
	uint64_t pos = backend ? k->pos : s->scroll.end - mc_scroll_shown(&s->scroll);
	*k = (struct mc_sink){.fd = fd, .is_socket = true, .pos = pos, .skipped = backend ? k->skipped : 0};
	if (!open_sink(s, k)) {
		accept_failed(s);
		close(fd);	/* which ends its watches too */
		k->fd = -1;
		return true;
	}
	if (backend) {
		mc_epoll_set(s->ep, EPOLL_CTL_DEL, s->cfg.backend_fd, 0, 0);
		mc_serial_notice(s, MC_SERIAL_BACKEND_OPENED);
	} else {
		s->stats.clients++;
		s->stats.clients_total++;
	}
	return !backend;
}

void mc_sinks_accept_again(struct mc_serial *s)
{
	s->accept_at = 0;
	/* EEXIST for the one that did not fail. */
	if (s->cfg.console_fd >= 0)
		mc_epoll_set(s->ep, EPOLL_CTL_ADD, s->cfg.console_fd, EPOLLIN, MC_TAG_LISTEN);
	if (s->cfg.backend == MC_SERIAL_SOCKET && s->sinks[0].fd < 0)
		mc_epoll_set(s->ep, EPOLL_CTL_ADD, s->cfg.backend_fd, EPOLLIN, MC_TAG_BACKEND_LISTEN);
}

/* Somebody opened the pty's slave, perhaps not for the first time. */
void mc_sinks_reopened(struct mc_serial *s)
{
	char events[4096] __attribute__((aligned(8)));
	struct mc_sink *k = &s->sinks[0];

	/* What the events say does not matter: that there were some does. */
	while (read(s->watch_fd, events, sizeof(events)) > 0)
		;
	if (!k->writing)
		mc_serial_notice(s, MC_SERIAL_BACKEND_OPENED);
	if (!open_sink(s, k)) {
		accept_failed(s);
		end_output(s, k);
	}
}

void mc_input_arm(struct mc_serial *s, bool wanted)
{
	if (wanted == s->in_armed)
		return;
	mc_epoll_set(s->ep, wanted ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, s->in_ep, EPOLLIN, MC_TAG_INPUT);
	s->in_armed = wanted;
}

bool mc_serial_feed(struct mc_serial *s)
{
	if (s->stage->len) {
		uint32_t n = s->front->input(s, s->stage->data + s->stage->off, s->stage->len);

		s->stats.guest_in += n;
		/* The length first: killed in between, a byte too many is lost rather than typed twice. */
		s->stage->len -= n;
		mc_in_order();
		s->stage->off += n;
	}
	return s->stage->len == 0;
}

/* One source at a time fills the empty stage; the input epoll reports those that are ready in turn. */
bool mc_sinks_input(struct mc_serial *s)
{
	struct epoll_event ev;

	for (int turn = 0; turn < 16; turn++) {
		if (!mc_serial_feed(s)) {
			mc_input_arm(s, false);
			return false;
		}
		if (epoll_wait(s->in_ep, &ev, 1, 0) <= 0) {
			mc_input_arm(s, true);
			return false;
		}
		struct mc_sink *k = &s->sinks[ev.data.u64];
		ssize_t n = read(k->fd, s->stage->data, MC_SERIAL_STAGE);

		if (n > 0) {
			s->stage->off = 0;
			mc_in_order();
			s->stage->len = n;
		} else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
			/* A pty's EIO and a socket's reset end both halves; an end of file only this one. */
			if (n < 0)
				end_output(s, k);
			end_input(s, k);
		}
	}
	return true;
}

void mc_sinks_drain(struct mc_serial *s)
{
	struct pollfd fds[1 + MC_SERIAL_CLIENTS];
	int64_t until = 0;

	/* Who connected just before the end is shown the scrollback too. */
	while (s->cfg.console_fd >= 0 && mc_sinks_accept(s, false))
		;
	if (s->cfg.backend == MC_SERIAL_SOCKET && s->sinks[0].fd < 0)
		mc_sinks_accept(s, true);
	do {
		uint32_t n = 0;

		while (mc_sinks_flush(s))
			;
		for (uint32_t i = 0; i <= MC_SERIAL_CLIENTS; i++)
			if (has_output(s, &s->sinks[i]))
				fds[n++] = (struct pollfd){.fd = s->sinks[i].fd, .events = POLLOUT};
		/* A peer that takes nothing for this long has stopped reading. */
		if (n == 0 || poll(fds, n, 100) == 0)
			return;
		for (uint32_t i = 0; i <= MC_SERIAL_CLIENTS; i++)
			s->sinks[i].blocked = false;
		if (!until)
			until = mc_now_ms() + 500;
	} while (mc_now_ms() < until);
}

int mc_serial_watch_pty(int master)
{
	char slave[64];
	int err = ptsname_r(master, slave, sizeof(slave));
	int fd;

	if (err)
		return -err;
	fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	if (fd >= 0 && inotify_add_watch(fd, slave, IN_OPEN) < 0) {
		err = errno;
		close(fd);
		return -err;
	}
	return fd < 0 ? -errno : fd;
}

int mc_sinks_init(struct mc_serial *s)
{
	for (uint32_t i = 0; i <= MC_SERIAL_CLIENTS; i++)
		s->sinks[i].fd = -1;
	s->sinks[0].pos = s->keep->backend_pos;
	s->sinks[0].skipped = s->keep->backend_skipped;
	if (s->cfg.console_fd >= 0 && mc_epoll_set(s->ep, EPOLL_CTL_ADD, s->cfg.console_fd, EPOLLIN, MC_TAG_LISTEN))
		return errno;
	if (s->cfg.backend == MC_SERIAL_SOCKET &&
	    mc_epoll_set(s->ep, EPOLL_CTL_ADD, s->cfg.backend_fd, EPOLLIN, MC_TAG_BACKEND_LISTEN))
		return errno;
	if (s->cfg.backend != MC_SERIAL_PTY)
		return 0;

	s->watch_fd = s->cfg.watch_fd;
	if (mc_epoll_set(s->ep, EPOLL_CTL_ADD, s->watch_fd, EPOLLIN, MC_TAG_WATCH))
		return errno;
	s->sinks[0].fd = s->cfg.backend_fd;
	return open_sink(s, &s->sinks[0]) ? 0 : errno;
}

void mc_sinks_deinit(struct mc_serial *s)
{
	for (uint32_t i = 0; i <= MC_SERIAL_CLIENTS; i++)
		if (s->sinks[i].fd >= 0 && (i || s->cfg.backend == MC_SERIAL_SOCKET))
			close(s->sinks[i].fd);
	if (s->watch_fd >= 0)
		close(s->watch_fd);
}
