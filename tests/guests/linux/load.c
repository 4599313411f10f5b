/*
 * Work for a Linux guest that checks itself: every byte that it reads back, receives or sends follows from its place.
 *
 *   load disk DEVICE LANE LANES STATUS   writes blocks and reads them back, in its own part of the device; even
 *                                        lanes O_DIRECT, odd ones through the page cache
 *   load tcp ADDRESS PORT STATUS         a stream each way; connects again when the connection is lost, and counts that
 *   load tty MS                          on standard input and output: a numbered line every MS milliseconds, and
 *                                        each line that comes in goes back
 *   load random COUNT                    so many random numbers, a line each
 *
 * STATUS is a file with one line, "rounds R again A" or "BAD ..."; after the latter it has ended. What it expects it
 * has in memory: a snapshot whose disk is not of the same instant as its memory is found out.
 * tests/harness/linuxload.py is the other end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

#define BLOCK 8192
#define BLOCKS 64			/* per lane: small, so that each is written again and again */
#define PAD 40

static int status_fd = -1;

static void say(const char *format, ...)
{
	char line[128];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	memset(line + n, ' ', sizeof(line) - n);
	line[sizeof(line) - 1] = '\n';
	if (pwrite(status_fd, line, sizeof(line), 0) != sizeof(line))
		exit(3);
}

#define bad(...) do { say("BAD " __VA_ARGS__); exit(1); } while (0)

static void open_status(const char *path)
{
	status_fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (status_fd < 0)
		exit(3);
}

/* One processor, emulated, is all that they have. */
static void rest(void)
{
	struct timespec pause = {.tv_nsec = 10000000};

	nanosleep(&pause, NULL);
}

/* splitmix64 (Steele, Lea, Flood 2014) */
static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

/* disk */

static void fill(uint64_t *words, uint64_t block, uint64_t generation)
{
	uint64_t key = mix(block << 32 | generation);

	for (uint64_t i = 0; i < BLOCK / 8; i++)
		words[i] = key + i * 0x0101010101010101;
	words[0] = block;
	words[1] = generation;
}

static int disk(const char *device, unsigned lane, unsigned lanes)
{
	static uint64_t data[BLOCK / 8] __attribute__((aligned(4096)));
	static uint64_t expected[BLOCK / 8];
	static uint64_t generation[BLOCKS];
	int fd = open(device, O_RDWR | (lane % 2 ? 0 : O_DIRECT));
	uint64_t size, random = lane;

	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) < 0)
		bad("open %s: %s", device, strerror(errno));
	if (size < (uint64_t)lanes * BLOCKS * BLOCK)
		bad("%s is too small", device);
	for (uint64_t round = 1;; round++) {
		unsigned block = (random = mix(random)) % BLOCKS;
		off_t at = ((off_t)lane * BLOCKS + block) * BLOCK;

		fill(data, block, ++generation[block]);
		if (pwrite(fd, data, BLOCK, at) != BLOCK)
			bad("write at %lld: %s", (long long)at, strerror(errno));
		if (round % 8 == 0 && fdatasync(fd) < 0)
			bad("fdatasync: %s", strerror(errno));
		if (round % 8 == 0 && lane % 2)		/* what is clean now is read again */
			posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
		block = (random = mix(random)) % BLOCKS;
		if (!generation[block])
			continue;
		at = ((off_t)lane * BLOCKS + block) * BLOCK;
		if (pread(fd, data, BLOCK, at) != BLOCK)
			bad("read at %lld: %s", (long long)at, strerror(errno));
		fill(expected, block, generation[block]);
		for (unsigned i = 0; i < BLOCK / 8; i++)
			if (data[i] != expected[i])
				bad("block %u word %u: %llx, not %llx (block %llx generation %llx, not %llx)", block, i,
				    (long long)data[i], (long long)expected[i], (long long)data[0],
				    (long long)data[1], (long long)generation[block]);
		say("rounds %llu again 0", (long long)round);
		rest();
	}
}

/* tcp: what a stream repeats is of prime length, so that nothing is lost in multiples of it */

#define PERIOD 65521

static const unsigned char *table(uint64_t key)
{
	unsigned char *bytes = malloc(PERIOD);

	if (!bytes)
		exit(1);
	for (unsigned i = 0; i < PERIOD; i++)
		bytes[i] = mix(i / 8 + key) >> i % 8 * 8;
	return bytes;
}

static int connected(const char *address, unsigned port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	struct timespec pause = {.tv_nsec = 100000000};

	inet_pton(AF_INET, address, &to.sin_addr);
	for (;;) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);

		if (connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0)
			return fd;
		close(fd);
		nanosleep(&pause, NULL);
	}
}

static int tcp(const char *address, unsigned port)
{
	const unsigned char *theirs = table(1ull << 40), *ours = table(2ull << 40);

	for (uint64_t again = 0, rounds = 0;; again++) {
		struct pollfd p = {.fd = connected(address, port), .events = POLLIN | POLLOUT};
		uint64_t sent = 0, got = 0;

		for (;; rounds++) {
			unsigned char out[4096], in[16384];
			ssize_t n = -1;

			say("rounds %llu again %llu", (long long)rounds, (long long)again);
			if (poll(&p, 1, -1) < 0)
				bad("poll: %s", strerror(errno));
			if (p.revents & POLLIN) {
				n = recv(p.fd, in, sizeof(in), MSG_DONTWAIT);
				if (n <= 0)
					break;
				for (ssize_t i = 0; i < n; i++, got++)
					if (in[i] != theirs[got % PERIOD])
						bad("tcp: %02x at %llu", in[i], (long long)got);
			}
			if (p.revents & POLLOUT) {
				for (unsigned i = 0; i < sizeof(out); i++)
					out[i] = ours[(sent + i) % PERIOD];
				n = send(p.fd, out, sizeof(out), MSG_DONTWAIT | MSG_NOSIGNAL);
				if (n < 0)
					break;
				sent += n;
			} else if (p.revents & (POLLERR | POLLHUP)) {
				break;
			}
			rest();
		}
		close(p.fd);
	}
}

/* tty */

static void put(const char *data, size_t size)
{
	while (size) {
		ssize_t n = write(1, data, size);

		if (n < 0)
			exit(1);
		data += n;
		size -= n;
	}
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

static int tty(int period_ms)
{
	static char in[8192] = "E ";		/* "E " and what has come of a line */
	size_t have = 2;
	uint64_t number = 0;
	int64_t next = now_ms();

	for (;;) {
		struct pollfd p = {.fd = 0, .events = POLLIN};
		int64_t left = next - now_ms();
		ssize_t n;

		if (left <= 0) {
			char line[PAD + 32];

			n = snprintf(line, sizeof(line), "L %llu ", (long long)++number);
			for (int i = 0; i < PAD; i++)
				line[n++] = 'a' + mix(number * PAD + i) % 26;
			line[n++] = '\n';
			put(line, n);
			next = now_ms() + period_ms;
			continue;
		}
		if (poll(&p, 1, left) == 0)
			continue;
		n = read(0, in + have, sizeof(in) - have);
		if (n <= 0)
			return 1;
		have += n;
		for (char *end; (end = memchr(in + 2, '\n', have - 2));) {
			size_t size = end + 1 - in;

			if (size > 3)
				put(in, size);
			memmove(in + 2, end + 1, have - size);
			have -= size - 2;
		}
		if (have == sizeof(in))
			return 1;
	}
}

static int random_numbers(unsigned count)
{
	while (count--) {
		uint64_t n;

		if (getrandom(&n, sizeof(n), 0) != sizeof(n))
			return 1;
		printf("%016llx\n", (long long)n);
	}
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 6 && !strcmp(argv[1], "disk")) {
		open_status(argv[5]);
		return disk(argv[2], atoi(argv[3]), atoi(argv[4]));
	}
	if (argc == 5 && !strcmp(argv[1], "tcp")) {
		open_status(argv[4]);
		return tcp(argv[2], atoi(argv[3]));
	}
	if (argc == 3 && !strcmp(argv[1], "tty"))
		return tty(atoi(argv[2]));
	if (argc == 3 && !strcmp(argv[1], "random"))
		return random_numbers(atoi(argv[2]));
	return 2;
}
