/*
 * Capture: a pcap file with nanoseconds (draft-ietf-opsawg-pcap, magic 0xa1b23c4d), link type Ethernet, both directions
 * in one file. Records collect in a buffer, written when it is full and whenever the data thread is about to sleep.
 * A file that cannot be written ends the capture at its last whole record; the traffic goes on.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "net_impl.h"

#define PCAP_BUF (512u << 10)

struct pcap_file_header {
	uint32_t magic;
	uint16_t major, minor;
	uint32_t reserved[2];
	uint32_t snaplen;
	uint32_t linktype;
};

struct pcap_record_header {
	uint32_t sec, nsec, caplen, len;
};

static const struct pcap_file_header FILE_HEADER = {
	.magic = 0xa1b23c4d, .major = 2, .minor = 4, .snaplen = 262144, .linktype = 1,
};

int mc_pcap_check(int fd)
{
	struct pcap_file_header h;
	ssize_t n = pread(fd, &h, sizeof(h), 0);

	if (n < 0)
		return errno == ESPIPE ? 1 : -errno;
	return n == 0 || (n == (ssize_t)sizeof(h) && h.magic == FILE_HEADER.magic && h.linktype == FILE_HEADER.linktype);
}

int net_pcap_init(struct net_pcap *p, int fd)
{
	struct stat st;

	p->fd = fd;
	if (fd < 0)
		return 0;
	if (fstat(fd, &st) < 0)
		return -errno;
	p->buf = malloc(PCAP_BUF);
	if (!p->buf)
		return -ENOMEM;
	p->seekable = S_ISREG(st.st_mode);
	p->good = st.st_size;
	if (!p->seekable || !st.st_size) {
		memcpy(p->buf, &FILE_HEADER, sizeof(FILE_HEADER));
		p->used = sizeof(FILE_HEADER);
		if (net_pcap_flush(p))
			return -p->error;
	}
	return 0;
}

int net_pcap_deinit(struct net_pcap *p)
{
	int err = net_pcap_flush(p) ? -p->error : 0;

	free(p->buf);
	p->buf = NULL;
	return err;
}

bool net_pcap_flush(struct net_pcap *p)
{
	size_t done = 0;

	if (p->fd < 0 || p->error)
		return false;
	while (done < p->used) {
		ssize_t n = write(p->fd, p->buf + done, p->used - done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			__atomic_store_n(&p->error, n ? errno : EIO, __ATOMIC_RELAXED);
			/* Whole records only, or no tool reads the end. If even that fails, error says enough. */
			if (p->seekable && ftruncate(p->fd, p->good) < 0)
				return true;
			return true;
		}
		done += (size_t)n;
	}
	p->good += (off_t)p->used;
	p->used = 0;
	return false;
}

bool net_pcap_packet(struct net_pcap *p, const struct iovec *iov, uint32_t n, size_t skip, size_t len)
{
	struct pcap_record_header h;
	struct timespec now;

	if (p->used + sizeof(h) + len > PCAP_BUF && net_pcap_flush(p))
		return true;
	clock_gettime(CLOCK_REALTIME, &now);
	h = (struct pcap_record_header){(uint32_t)now.tv_sec, (uint32_t)now.tv_nsec, (uint32_t)len, (uint32_t)len};
	memcpy(p->buf + p->used, &h, sizeof(h));
	p->used += sizeof(h);
	p->used += mc_iov_read(iov, n, skip, p->buf + p->used, len);
	return false;
}
