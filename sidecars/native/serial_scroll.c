/* The scrollback ring: bytes by their position in the whole stream, of which the last cap are kept. */
#include "serial.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

int mc_scroll_init(struct mc_scroll *sc, uint64_t history, bool shared)
{
	uint64_t cap = MC_SCROLL_MIN;

	while (cap < history)
		cap <<= 1;
	/* Touched as it fills, so an idle guest's scrollback costs address space only. */
	void *p = mmap(NULL, cap, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return errno;
	sc->buf = p;
	sc->cap = cap;
	sc->history = history;
	sc->end = 0;
	sc->shared = shared;
	pthread_mutex_init(&sc->lock, NULL);
	pthread_cond_init(&sc->grown, NULL);
	return 0;
}

void mc_scroll_deinit(struct mc_scroll *sc)
{
	munmap(sc->buf, sc->cap);
	pthread_cond_destroy(&sc->grown);
	pthread_mutex_destroy(&sc->lock);
}

static void append(struct mc_scroll *sc, const uint8_t *data, uint64_t len)
{
	while (len) {
		uint64_t at = sc->end & (sc->cap - 1);
		uint64_t n = sc->cap - at;

		if (n > len)
			n = len;
		memcpy(sc->buf + at, data, n);
		sc->end += n;
		data += n;
		len -= n;
	}
}

void mc_scroll_append(struct mc_scroll *sc, const uint8_t *data, uint64_t len)
{
	if (sc->shared)
		pthread_mutex_lock(&sc->lock);
	append(sc, data, len);
	if (sc->shared) {
		pthread_cond_signal(&sc->grown);
		pthread_mutex_unlock(&sc->lock);
	}
}

void mc_scroll_load(struct mc_scroll *sc, const uint8_t *data, uint64_t len, uint64_t *reader)
{
	if (sc->shared)
		pthread_mutex_lock(&sc->lock);
	append(sc, data, len);
	*reader = sc->loaded = sc->end;
	if (sc->shared)
		pthread_mutex_unlock(&sc->lock);
}

uint64_t mc_scroll_shown(const struct mc_scroll *sc)
{
	return sc->end < sc->history ? sc->end : sc->history;
}

int mc_scroll_peek(const struct mc_scroll *sc, uint64_t pos, uint64_t max, struct iovec iov[2])
{
	uint64_t len = sc->end - pos;
	uint64_t at = pos & (sc->cap - 1);
	uint64_t first = sc->cap - at;

	if (len > max)
		len = max;
	if (!len)
		return 0;
	if (first >= len) {
		iov[0] = (struct iovec){.iov_base = sc->buf + at, .iov_len = len};
		return 1;
	}
	iov[0] = (struct iovec){.iov_base = sc->buf + at, .iov_len = first};
	iov[1] = (struct iovec){.iov_base = sc->buf, .iov_len = len - first};
	return 2;
}

uint64_t mc_scroll_resume(const struct mc_scroll *sc, uint64_t pos)
{
	if (sc->end - pos <= sc->cap)
		return pos;
	/* Half a ring ahead of the overrun, or a reader that is a little too slow would be told of it at every line. */
	pos = sc->end - sc->cap / 2;
	for (uint64_t i = 0; i < 4096; i++)
		if (sc->buf[(pos + i) & (sc->cap - 1)] == '\n')
			return pos + i + 1;
	return pos;
}

int mc_scroll_note(char note[64], uint64_t skipped)
{
	return snprintf(note, 64, "\r\n[... %llu bytes skipped ...]\r\n", (unsigned long long)skipped);
}
