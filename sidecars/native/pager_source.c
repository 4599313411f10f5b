/* The processes that are served: their userfaultfds, and where in each of them guest memory is. */
#include "pager_impl.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

uint64_t pager_offset(const struct source *s, uint64_t address)
{
	for (uint32_t i = 0; i < s->n; i++)
		if (address - s->maps[i].address < s->maps[i].size)
			return s->maps[i].offset + (address - s->maps[i].address);
	return UINT64_MAX;
}

uint64_t pager_piece(const struct source *s, uint64_t *offset, uint64_t size, uint64_t *address)
{
	uint64_t best = UINT64_MAX, length = 0;

	for (uint32_t i = 0; i < s->n; i++) {
		const struct mc_pager_mapping *m = &s->maps[i];
		uint64_t from = *offset > m->offset ? *offset : m->offset;
		uint64_t to = *offset + size < m->offset + m->size ? *offset + size : m->offset + m->size;

		if (from < to && from < best) {
			best = from;
			length = to - from;
			*address = m->address + (from - m->offset);
		}
	}
	if (length)
		*offset = best;
	return length;
}

/* Calls what(uffd, range) for each mapped piece. Returns 0, or the first -errno. */
static int each_piece(const struct source *s, uint64_t offset, uint64_t size, unsigned long what)
{
	uint64_t end = offset + size, address, length;

	while (offset < end && (length = pager_piece(s, &offset, end - offset, &address))) {
		struct uffdio_range range = {address, length};

		if (ioctl(s->uffd, what, &range) < 0)
			return -errno;
		offset += length;
	}
	return 0;
}

int pager_wake(const struct source *s, uint64_t offset, uint64_t size)
{
	return each_piece(s, offset, size, UFFDIO_WAKE);
}

/* Leaves a stretch to the kernel: a page that is missing there is zero from now on, and nobody is asked. It needs no care
 * where the process cannot do that (it is out of mappings, say): its faults come here as before. */
static void release(struct mc_pager *p, const struct source *s, uint64_t offset, uint64_t size)
{
	if (each_piece(s, offset, size, UFFDIO_UNREGISTER) == 0)
		p->stats.released++;
}

/* What was put where a process said its memory is may be elsewhere. So the memfd is asked before the others are let go. */
static bool all_there(struct mc_pager *p)
{
	return p->stats.left == 0 && pager_look(p) == 0 && p->stats.left == 0;
}

void pager_release_if_done(struct mc_pager *p)
{
	if (!all_there(p))
		return;
	for (uint32_t i = 0; i < MC_PAGER_MAX_SOURCES; i++)
		if (p->sources[i].uffd >= 0)
			release(p, &p->sources[i], 0, p->config.size);
}

void pager_drop(struct mc_pager *p, struct source *s)
{
	/* Closing takes it out of the epoll set only when no other process has a copy, and the supervisor has one. */
	(void)!epoll_ctl(p->epoll_fd, EPOLL_CTL_DEL, s->uffd, NULL);
	close(s->uffd);
	s->uffd = -1;
	s->n = 0;
}

void pager_adopt(struct mc_pager *p, struct source *s, const struct source *from)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)(s - p->sources)};

	if (s->uffd >= 0)
		pager_drop(p, s);
	*s = *from;
	if (epoll_ctl(p->epoll_fd, EPOLL_CTL_ADD, s->uffd, &event) < 0) {
		p->stats.lost++;
		pager_notice(p, MC_PAGER_SOURCE_LOST);
		pager_drop(p, s);
		return;
	}
	if (all_there(p)) {
		release(p, s, 0, p->config.size);
		return;
	}
	for (uint32_t i = 0; i < p->n_zeros; i++)
		release(p, s, p->zeros[i].offset, p->zeros[i].size);
}

static bool legal(const struct mc_pager *p, const struct mc_pager_mapping *m)
{
	return !((m->address | m->size | m->offset) % PAGE) && m->size && m->size <= p->config.size &&
	       m->offset <= p->config.size - m->size && m->address <= UINT64_MAX - m->size;
}

int mc_pager_serve(struct mc_pager *p, uint32_t slot, int uffd, const struct mc_pager_mapping *mappings, uint32_t n)
{
	struct source new = {.uffd = uffd, .n = n};
	uint64_t one = 1;
	int err, before;

	if (slot >= MC_PAGER_MAX_SOURCES || n == 0 || n > MC_PAGER_MAX_MAPPINGS)
		return -EINVAL;
	for (uint32_t i = 0; i < n; i++) {
		if (!legal(p, &mappings[i]))
			return -EINVAL;
		new.maps[i] = mappings[i];
	}
	err = pager_wake(&new, 0, p->config.size);
	if (err < 0)
		return err;
	pthread_mutex_lock(&p->inbox_lock);
	before = p->inbox[slot].uffd;
	p->inbox[slot] = new;
	pthread_mutex_unlock(&p->inbox_lock);
	if (before >= 0)
		close(before);
	(void)!write(p->command_fd, &one, sizeof(one));
	return 0;
}
