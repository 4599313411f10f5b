/*
 * A link: the wire between the NICs of two VMs, a SOCK_SEQPACKET socket whose messages are virtio_net_hdr_v1 and frame,
 * so that offloads carry through: what one guest left to its NIC, the other guest's header says, and only a guest that
 * did not accept such frames has them finished (net_gso.c), by its own sidecar. No side needs to know the other's
 * features, and either may go, come back, or reboot.
 *
 * They meet in a directory: whoever has the flock of it listens on `socket` there, the other one connects. The lock's
 * open file description is shared with the supervisor, so it outlives this process and dies with the VM.
 * The socket appears by rename when it already listens, which inotify tells a waiting peer; the timer is for what no
 * event tells: the lock became free, or a third party left.
 *
 * Each side's first message is a greeting. The link is up, also to the guest, between the greeting and the hang-up; a
 * guest without a driver has hung up.
 */
#define _GNU_SOURCE	/* accept4 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#include "net_impl.h"

#define RETRY_MS 200
#define LINK_BUF (4 << 20)
#define NAME "socket"

struct greeting {
	char magic[8];
	uint32_t version;
	uint32_t max_frame;
};
static const struct greeting GREETING = {"mc-link", 1, MC_NET_MAX_FRAME};

int net_link_init(struct mc_net *net, int dir_fd)
{
	struct net_link *l = &net->link;

	l->dir_fd = dir_fd;
	/* Names are short and relative to the directory: sun_path has 108 bytes, and there may be no /proc. */
	if (fchdir(dir_fd) < 0)
		return -errno;
	l->inotify_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	l->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (l->inotify_fd < 0 || l->timer_fd < 0)
		return -errno;
	return inotify_add_watch(l->inotify_fd, ".", IN_MOVED_TO | IN_ONLYDIR) < 0 ? -errno : 0;
}

static void link_close(struct mc_net *net, int *fd)
{
	if (*fd >= 0) {
		net_unpoll(net, *fd);
		close(*fd);
	}
	*fd = -1;
}

void net_link_deinit(struct mc_net *net)
{
	struct net_link *l = &net->link;

	net_link_stop(net);
	if (l->listen_fd >= 0) {
		unlink(NAME);
		flock(l->dir_fd, LOCK_UN);
	}
	link_close(net, &l->listen_fd);
	link_close(net, &l->inotify_fd);
	link_close(net, &l->timer_fd);
}

static void link_retry(struct net_link *l)
{
	const struct itimerspec in = {.it_value = {.tv_nsec = RETRY_MS * 1000000L}};

	timerfd_settime(l->timer_fd, 0, &in, NULL);
}

/* An error is told once, and not again at each attempt. */
static void link_error(struct mc_net *net, int error)
{
	if (__atomic_exchange_n(&net->link.error, error, __ATOMIC_RELAXED) != error && error)
		net_event(net);
}

static void link_hang_up(struct mc_net *net)
{
	struct net_pair *p = &net->pairs[0];

	p->fd = -1;
	p->events = 0;
	p->rx_state = RX_OFF;
	if (p->tx_state == TX_BLOCKED)
		p->tx_state = TX_READY;
	link_close(net, &net->link.fd);
	net->link.greeted = false;
	net_set_link(net, false);
}

static int link_socket(struct sockaddr_un *addr, const char *name)
{
	int size = LINK_BUF;
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	*addr = (struct sockaddr_un){.sun_family = AF_UNIX};
	strncpy(addr->sun_path, name, sizeof(addr->sun_path) - 1);
	/* As much as the system allows; how much that is does not matter. */
	if (fd >= 0)
		(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	return fd;
}

static int link_listen(struct mc_net *net)
{
	struct net_link *l = &net->link;
	struct sockaddr_un addr;
	char name[32];
	int err = 0;

	snprintf(name, sizeof(name), ".%s.%d", NAME, getpid());
	unlink(name);
	l->listen_fd = link_socket(&addr, name);
	if (l->listen_fd < 0 || bind(l->listen_fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 ||
	    listen(l->listen_fd, 4) < 0 || rename(name, NAME) < 0) {
		err = -errno;
		unlink(name);
		link_close(net, &l->listen_fd);
	}
	return err;
}

/* The greeting goes out first; the other's may take as long as its guest needs to boot. */
static void link_greet(struct mc_net *net, int fd)
{
	net->link.fd = fd;
	net->link.greeted = false;
	if (send(fd, &GREETING, sizeof(GREETING), MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ||
	    net_poll(net, fd, TAG_BACKEND, 0, EPOLLIN) < 0) {
		link_error(net, errno);
		link_hang_up(net);
		link_retry(&net->link);
	}
}

static void link_connect(struct mc_net *net)
{
	struct sockaddr_un addr;
	int fd = link_socket(&addr, NAME);

	if (fd >= 0 && connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0) {
		link_greet(net, fd);
		return;
	}
	/* Nobody there yet, or not any more, or the listener's backlog is full. */
	if (errno != ENOENT && errno != ECONNREFUSED && errno != EAGAIN)
		link_error(net, errno);
	if (fd >= 0)
		close(fd);
	link_retry(&net->link);
}

int net_link_poll(struct mc_net *net)
{
	struct net_link *l = &net->link;
	int err = net_poll(net, l->inotify_fd, TAG_INOTIFY, 0, EPOLLIN) | net_poll(net, l->timer_fd, TAG_TIMER, 0, EPOLLIN);

	if (l->listen_fd >= 0)
		err |= net_poll(net, l->listen_fd, TAG_LISTEN, 0, EPOLLIN);
	/* Once greeted it is the pair's. */
	if (l->fd >= 0 && !l->greeted)
		err |= net_poll(net, l->fd, TAG_BACKEND, 0, EPOLLIN);
	return err;
}

void net_link_start(struct mc_net *net)
{
	struct net_link *l = &net->link;
	int err;

	if (l->fd >= 0)
		return;
	if (l->listen_fd < 0 && flock(l->dir_fd, LOCK_EX | LOCK_NB) == 0) {
		err = link_listen(net);
		if (err) {
			link_error(net, -err);
			flock(l->dir_fd, LOCK_UN);
			link_retry(l);
			return;
		}
	}
	if (l->listen_fd < 0)
		link_connect(net);
	else if (net_poll(net, l->listen_fd, TAG_LISTEN, 0, EPOLLIN) < 0)
		link_error(net, errno);
}

void net_link_stop(struct mc_net *net)
{
	const struct itimerspec never = {0};

	link_hang_up(net);
	if (net->link.timer_fd >= 0)
		timerfd_settime(net->link.timer_fd, 0, &never, NULL);
}

void net_link_lost(struct mc_net *net, int error)
{
	bool was_up = net->link.greeted;

	link_hang_up(net);
	link_error(net, error == ECONNRESET || error == EPIPE ? 0 : error);
	/* One that never greeted (or turned us away) would do so again at once. */
	if (was_up)
		net_link_start(net);
	else
		link_retry(&net->link);
}

static void link_accept(struct mc_net *net)
{
	int fd = accept4(net->link.listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	int size = LINK_BUF;

	if (fd < 0)
		return;
	if (net->link.fd >= 0) {
		net->counters.link_refused++;
		close(fd);
		net_event(net);
		return;
	}
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	link_greet(net, fd);
}

static void link_greeted(struct mc_net *net)
{
	struct net_pair *p = &net->pairs[0];
	struct greeting g;
	ssize_t n;

	/* An event of a socket that an earlier event of the same round closed. */
	if (net->link.fd < 0)
		return;
	n = recv(net->link.fd, &g, sizeof(g), MSG_DONTWAIT | MSG_TRUNC);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		net_link_lost(net, n ? errno : 0);
		return;
	}
	if (n != sizeof(g) || memcmp(&g, &GREETING, sizeof(g)) != 0) {
		net_link_lost(net, EPROTO);
		return;
	}
	net->link.greeted = true;
	__atomic_store_n(&net->link.error, 0, __ATOMIC_RELAXED);
	p->fd = net->link.fd;
	p->events = EPOLLIN;
	net_rx_start(p);
	net_set_link(net, true);
}

void net_link_event(struct mc_net *net, enum net_tag tag)
{
	struct net_link *l = &net->link;
	char events[4096];
	uint64_t expired;

	switch (tag) {
	case TAG_LISTEN:
		link_accept(net);
		return;
	case TAG_BACKEND:
		link_greeted(net);
		return;
	case TAG_INOTIFY:
		/* What happened is plain; the events only need to be out of the way. */
		while (read(l->inotify_fd, events, sizeof(events)) > 0)
			;
		break;
	case TAG_TIMER:
		if (read(l->timer_fd, &expired, sizeof(expired)) < 0)
			return;
		break;
	default:
		return;
	}
	if (l->listen_fd < 0)
		net_link_start(net);
}
