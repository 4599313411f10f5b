/* The scrollback ring: bytes by their position in the whole stream, of which the last cap are kept. */
#include "serial.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

uint64_t mc_scroll_cap(uint64_t history)
{
	uint64_t cap = MC_SCROLL_MIN;

	while (cap < history)
		cap <<= 1;
	return cap;
}

int mc_scroll_init(struct mc_scroll *sc, uint64_t history, bool shared, struct mc_serial_keep *keep)
{
	uint64_t cap = mc_scroll_cap(history);

	/* Touched as it fills, so an idle guest's scrollback costs address space only. */
	if (keep) {
		if (keep->cap && (keep->cap != cap || keep->loaded > keep->end))
			return EINVAL;
		sc->buf = (uint8_t *)keep + MC_SERIAL_KEEP;
		sc->kept = true;
		sc->kept_end = &keep->end;
		sc->loaded = keep->loaded;
	} else {
		void *p = mmap(NULL, cap, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (p == MAP_FAILED)
			return errno;
		sc->buf = p;
		sc->kept_end = &sc->own_end;
	}
	sc->cap = cap;
	sc->history = history;
	sc->end = *sc->kept_end;
	sc->shared = shared;
	pthread_mutex_init(&sc->lock, NULL);
	pthread_cond_init(&sc->grown, NULL);
	return 0;
}

void mc_scroll_deinit(struct mc_scroll *sc)
{
	if (!sc->kept)
		munmap(sc->buf, sc->cap);
	pthread_cond_destroy(&sc->grown);
	pthread_mutex_destroy(&sc->lock);
}

/* Puts bytes at end, which is not moved. Returns the next position. */
static uint64_t put(struct mc_scroll *sc, uint64_t end, const uint8_t *data, uint64_t len)
{
	while (len) {
		uint64_t at = end & (sc->cap - 1);
		uint64_t n = sc->cap - at;

		if (n > len)
			n = len;
		memcpy(sc->buf + at, data, n);
		end += n;
		data += n;
		len -= n;
	}
	return end;
}

static void move_end(struct mc_scroll *sc, uint64_t end)
{
	/* The bytes before the position that covers them, for whoever comes after us. */
	mc_in_order();
	sc->end = *sc->kept_end = end;
	mc_in_order();
}

void mc_scroll_append(struct mc_scroll *sc, const uint8_t *data, uint64_t len)
{
	mc_scroll_append2(sc, data, len, NULL, 0);
}

void mc_scroll_append2(struct mc_scroll *sc, const uint8_t *data, uint64_t len, const uint8_t *more, uint64_t more_len)
{
	if (sc->shared)
		pthread_mutex_lock(&sc->lock);
	move_end(sc, put(sc, put(sc, sc->end, data, len), more, more_len));
	if (sc->shared) {
		pthread_cond_signal(&sc->grown);
		pthread_mutex_unlock(&sc->lock);
	}
}

void mc_scroll_load(struct mc_scroll *sc, const uint8_t *data, uint64_t len, uint64_t *reader)
{
	if (sc->shared)
		pthread_mutex_lock(&sc->lock);
	move_end(sc, put(sc, sc->end, data, len));
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
