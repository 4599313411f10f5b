/*
 * The file backend: a thread that appends the scrollback ring's bytes to a file. It takes them out under the
 * ring's lock and writes without it, so that a disk that hangs holds up this thread and nobody else. After an
 * error (a full disk) the position stays where it was, and the write is tried again when the guest has printed more.
 */
#define _GNU_SOURCE
#include "serial.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* With the lock held: the next bytes to write into f->buf, a note about lost ones first. Returns their count, of
 * which *from_ring move the position. */
static size_t take(struct mc_serial *s, struct mc_file *f, uint64_t *pos, size_t *from_ring)
{
	struct iovec iov[2];
	size_t len = 0;

	*pos = mc_scroll_resume(&s->scroll, f->pos);
	if (*pos != f->pos)
		len = mc_scroll_note((char *)f->buf, *pos - f->pos);
	int n = mc_scroll_peek(&s->scroll, *pos, sizeof(f->buf) - len, iov);
	*from_ring = 0;
	for (int i = 0; i < n; i++) {
		memcpy(f->buf + len, iov[i].iov_base, iov[i].iov_len);
		len += iov[i].iov_len;
		*from_ring += iov[i].iov_len;
	}
	return len;
}

static int64_t size_of(int fd)
{
	struct stat st;

	return fstat(fd, &st) || !S_ISREG(st.st_mode) ? -1 : st.st_size;
}

void mc_file_keep(struct mc_serial *s)
{
	struct mc_serial_keep *k = s->keep;
	uint32_t other = !k->file_now;

	k->file[other].pos = s->file.pos;
	k->file[other].size = size_of(s->file.fd);
	mc_in_order();
	k->file_now = other;
}

void mc_file_take_over(struct mc_serial *s)
{
	struct mc_serial_keep *k = s->keep;
	uint64_t pos = k->file[k->file_now & 1].pos;
	int64_t before = k->file[k->file_now & 1].size, now = size_of(s->file.fd);

	/* Our predecessor was killed in a write whose end it did not see. Nobody else appends to a console's file. */
	if (before >= 0 && now > before)
		pos += (uint64_t)(now - before);
	s->file.pos = pos < s->scroll.end ? pos : s->scroll.end;
	k->file_now = 0;
	mc_file_keep(s);
}

static void *file_thread(void *arg)
{
	struct mc_serial *s = arg;
	struct mc_file *f = &s->file;
	struct mc_scroll *sc = &s->scroll;
	uint64_t tried = 0;		/* the stream's end at the last failure */
	bool last = false;
	int error = 0;

	pthread_mutex_lock(&sc->lock);
	for (;;) {
		while (!f->stop && (sc->end == f->pos || (error && sc->end == tried)))
			pthread_cond_wait(&sc->grown, &sc->lock);
		/* A failure ends it only when the attempt began after the stop: the disk has had its last chance. */
		if (sc->end == f->pos || (error && last))
			break;
		last = f->stop;

		uint64_t pos;
		size_t from_ring, len = take(s, f, &pos, &from_ring), done = 0;
		uint64_t end = sc->end;

		pthread_mutex_unlock(&sc->lock);
		int now = 0;
		while (done < len && !now) {
			ssize_t n = write(f->fd, f->buf + done, len - done);
			if (n >= 0)
				done += n;
			else if (errno != EINTR)
				now = errno;
		}
		pthread_mutex_lock(&sc->lock);

		size_t note = len - from_ring;
		if (done >= note) {
			s->stats.file_skipped += pos - f->pos;
			f->pos = pos + (done - note);
		}
		/* A note cut off in the middle is written again in full; so are no bytes of the guest's. */
		mc_file_keep(s);
		s->stats.file_written += done;
		s->stats.file_errors += now != 0;
		s->stats.file_errno = now;
		/* Behind the counters that the log line will show. */
		if (now && !error)
			mc_serial_notice(s, MC_SERIAL_FILE_FAILED);
		else if (error && !now)
			mc_serial_notice(s, MC_SERIAL_FILE_RECOVERED);
		error = now;
		tried = end;
	}
	pthread_mutex_unlock(&sc->lock);
	return NULL;
}

int mc_file_start(struct mc_serial *s)
{
	sigset_t all, old;

	/* Signals are for Python's main thread. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int err = pthread_create(&s->file.thread, NULL, file_thread, s);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	s->file.started = err == 0;
	return err;
}

/* 0, or why bytes are missing from the file. */
int mc_file_stop(struct mc_serial *s)
{
	struct timespec until;

	pthread_mutex_lock(&s->scroll.lock);
	s->file.stop = true;
	pthread_cond_signal(&s->scroll.grown);
	pthread_mutex_unlock(&s->scroll.lock);
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += 2;
	int err = pthread_timedjoin_np(s->file.thread, NULL, &until);
	if (err)
		return err;
	s->file.started = false;
	return s->file.pos == s->scroll.end ? 0 : s->stats.file_errno;
}
