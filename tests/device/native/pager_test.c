/*
 * The pager's C under sanitizers, in the process of the test; those that fault are forked from it. Each mode checks what
 * its name says, with a random template: argv[1] mode, argv[2] seed.
 */
#define _GNU_SOURCE
#include "crc32c.h"
#include "pager.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what)                                                                        \
	do {                                                                               \
		if (!(what)) {                                                             \
			fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #what, strerror(errno)); \
			exit(1);                                                           \
		}                                                                          \
	} while (0)

enum { PAGE = 4096, CHUNKS = 400, LAYERS = 3 };
#define SIZE ((uint64_t)CHUNKS * MC_PAGER_CHUNK - 5 * PAGE)
#define SPLIT (177 * (uint64_t)PAGE)	/* between two mappings, in the middle of a chunk */

static uint8_t *expected;	/* shared with the children, who must not have it in the memory that they test */
static uint8_t layers[CHUNKS];
static uint32_t sums[CHUNKS];
static int files[LAYERS], memory_fd, event_fd, populated_fd;

static uint64_t random_state;

static uint64_t rnd(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static uint64_t bytes_of(uint32_t chunk)
{
	return chunk == CHUNKS - 1 ? SIZE - (uint64_t)chunk * MC_PAGER_CHUNK : MC_PAGER_CHUNK;
}

static int new_file(const char *name)
{
	int fd = memfd_create(name, MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, (off_t)SIZE) == 0);
	return fd;
}

static void make_template(void)
{
	expected = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(expected != MAP_FAILED);
	for (int i = 0; i < LAYERS; i++)
		files[i] = new_file("layer");
	for (uint32_t chunk = 0; chunk < CHUNKS; chunk++) {
		uint8_t *at = expected + (uint64_t)chunk * MC_PAGER_CHUNK;

		/* A stretch of zeros with a huge page in it, and zeros in between. */
		layers[chunk] = (chunk >= 100 && chunk < 200) ? 0 : (uint8_t)(rnd() % (LAYERS + 1));
		if (!layers[chunk])
			continue;
		for (uint64_t i = 0; i < bytes_of(chunk); i += 8)
			memcpy(at + i, &(uint64_t){rnd()}, 8);
		sums[chunk] = mc_crc32c(0, at, bytes_of(chunk));
		CHECK(pwrite(files[layers[chunk] - 1], at, bytes_of(chunk), (off_t)chunk * MC_PAGER_CHUNK) ==
		      (ssize_t)bytes_of(chunk));
	}
	memory_fd = new_file("guest");
	event_fd = eventfd(0, EFD_NONBLOCK);
	populated_fd = eventfd(0, EFD_NONBLOCK);
}

static struct mc_pager_config config(void)
{
	struct mc_pager_config c = {
		.memory_fd = memory_fd,
		.event_fd = event_fd,
		.populated_fd = populated_fd,
		.size = SIZE,
		.layers = layers,
		.sums = (const uint8_t *)sums,
		.n_layers = LAYERS,
	};

	memcpy(c.layer_fds, files, sizeof(files));
	return c;
}

static struct mc_pager *new_pager(const struct mc_pager_config *c)
{
	struct mc_pager *p = mc_pager_new(c);

	CHECK(p);
	return p;
}

struct child {
	pid_t pid;
	int uffd;
	struct mc_pager_mapping maps[2];
};

/* Touches every page in an order of its own and compares. */
static void walk(uint8_t *low, uint8_t *high, uint64_t seed)
{
	uint32_t n = SIZE / PAGE, *order = malloc(n * sizeof(*order));

	random_state = seed;
	for (uint32_t i = 0; i < n; i++)
		order[i] = i;
	for (uint32_t i = n - 1; i > 0; i--) {
		uint32_t k = (uint32_t)(rnd() % (i + 1)), t = order[i];

		order[i] = order[k];
		order[k] = t;
	}
	for (uint32_t i = 0; i < n; i++) {
		uint64_t offset = (uint64_t)order[i] * PAGE;
		const uint8_t *at = offset < SPLIT ? low + offset : high + (offset - SPLIT);

		if (memcmp(at, expected + offset, PAGE)) {
			fprintf(stderr, "page %#lx is wrong\n", (unsigned long)offset);
			_exit(1);
		}
	}
	_exit(0);
}

static struct child start_child(uint64_t seed)
{
	struct child c;
	int link[2], pipe_fds[2];
	char control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {c.maps, sizeof(c.maps)};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, link) == 0);
	CHECK(pipe(pipe_fds) == 0);
	c.pid = fork();
	CHECK(c.pid >= 0);
	if (c.pid == 0) {
		uint8_t *low = mmap(NULL, SPLIT, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
		uint8_t *high = mmap(NULL, SIZE - SPLIT, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, (off_t)SPLIT);
		int uffd = mc_uffd_open(-1);

		CHECK(low != MAP_FAILED && high != MAP_FAILED && uffd >= 0);
		c.maps[0] = (struct mc_pager_mapping){(uintptr_t)low, SPLIT, 0};
		c.maps[1] = (struct mc_pager_mapping){(uintptr_t)high, SIZE - SPLIT, SPLIT};
		for (int i = 0; i < 2; i++)
			CHECK(mc_uffd_register(uffd, c.maps[i].address, c.maps[i].size) == 0);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(cmsg), &uffd, sizeof(int));
		CHECK(sendmsg(link[1], &message, 0) == sizeof(c.maps));
		walk(low, high, seed);
	}
	close(link[1]);
	CHECK(recvmsg(link[0], &message, MSG_CMSG_CLOEXEC) == sizeof(c.maps));
	CHECK(CMSG_FIRSTHDR(&message));
	memcpy(&c.uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
	close(link[0]);
	close(pipe_fds[0]);
	close(pipe_fds[1]);
	return c;
}

/* The pager gets a copy, as from the supervisor. */
static void serve(struct mc_pager *p, uint32_t slot, const struct child *c)
{
	CHECK(mc_pager_serve(p, slot, dup(c->uffd), c->maps, 2) == 0);
}

static void finish(struct child *c)
{
	int status;

	CHECK(waitpid(c->pid, &status, 0) == c->pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	close(c->uffd);
}

static void murder(struct child *c)
{
	CHECK(kill(c->pid, SIGKILL) == 0 && waitpid(c->pid, NULL, 0) == c->pid);
	close(c->uffd);
}

static void *thread(void *p)
{
	CHECK(mc_pager_run(p) == 0);
	return NULL;
}

static pthread_t start(struct mc_pager *p)
{
	pthread_t t;

	CHECK(pthread_create(&t, NULL, thread, p) == 0);
	return t;
}

static void stop(struct mc_pager *p, pthread_t t)
{
	mc_pager_stop(p);
	CHECK(pthread_join(t, NULL) == 0);
	mc_pager_free(p);
}

static void faults(void)
{
	struct mc_pager_config c = config();
	uint32_t ahead[] = {0, 1, 2, 3, 50, 51, 52, 150, 397, 398, 399};
	struct mc_pager_stats stats;
	struct child children[4];
	struct mc_pager *p;
	pthread_t t;

	c.ahead = ahead;
	c.n_ahead = sizeof(ahead) / sizeof(ahead[0]);
	c.record = true;
	p = new_pager(&c);
	for (int i = 0; i < 4; i++)
		children[i] = start_child(rnd());
	t = start(p);
	for (uint32_t i = 0; i < 4; i++)
		serve(p, i, &children[i]);
	for (int i = 0; i < 4; i++)
		finish(&children[i]);
	mc_pager_get_stats(p, &stats);
	CHECK(stats.left == 0 && stats.stray == 0 && stats.lost == 0);
	CHECK(mc_pager_notices(p) & MC_PAGER_AHEAD_DONE);
	printf("%lu faults, %lu filled, %lu woken\n", stats.faults, stats.filled, stats.woken);
	stop(p, t);
}

/* Children die at any time, pagers come and go; one child lives through it all. */
static void deaths(void)
{
	struct mc_pager_config c = config();

	for (int machine = 0; machine < 6; machine++) {
		c.memory_fd = memory_fd = new_file("guest");
		struct child survivor = start_child(rnd());

		for (int round = 0; round < 4; round++) {
			struct child doomed[2] = {start_child(rnd()), start_child(rnd())};
			struct mc_pager *p = new_pager(&c);
			pthread_t t = start(p);

			serve(p, 1, &doomed[0]);
			serve(p, 2, &survivor);
			serve(p, 1, &doomed[1]);
			if (round == 2)
				mc_pager_populate(p);
			usleep(rnd() % 2000);	/* for how far they get, not for order */
			murder(&doomed[0]);
			usleep(rnd() % 2000);
			murder(&doomed[1]);
			serve(p, 3, &survivor);	/* twice is nobody's error */
			stop(p, t);
		}
		struct mc_pager *p = new_pager(&c);
		pthread_t t = start(p);

		serve(p, 0, &survivor);
		finish(&survivor);
		stop(p, t);
		close(memory_fd);
	}
}

static void damage(void)
{
	struct mc_pager_config c = config();
	struct mc_pager_damage d;
	uint32_t chunk = (uint32_t)(rnd() % CHUNKS);
	uint8_t byte;

	while (!layers[chunk])
		chunk = (chunk + 1) % CHUNKS;
	off_t at = (off_t)(chunk * (uint64_t)MC_PAGER_CHUNK + rnd() % bytes_of(chunk));
	int fd = files[layers[chunk] - 1];

	CHECK(pread(fd, &byte, 1, at) == 1);
	byte ^= (uint8_t)(1 << rnd() % 8);
	CHECK(pwrite(fd, &byte, 1, at) == 1);
	struct child child = start_child(rnd());
	struct mc_pager *p = new_pager(&c);
	pthread_t t = start(p);

	serve(p, 0, &child);
	CHECK(pthread_join(t, NULL) == 0);	/* it ends by itself */
	mc_pager_get_damage(p, &d);
	CHECK(mc_pager_notices(p) & MC_PAGER_DAMAGED);
	CHECK(d.failure == MC_PAGER_WRONG_SUM && d.chunk == chunk && d.layer == layers[chunk]);
	CHECK(lseek(memory_fd, (off_t)chunk * MC_PAGER_CHUNK, SEEK_DATA) != (off_t)chunk * MC_PAGER_CHUNK);
	murder(&child);
	CHECK(mc_pager_eager(p) == -1);
	mc_pager_get_damage(p, &d);
	CHECK(d.chunk == chunk);
	mc_pager_free(p);
}

static void eager(void)
{
	struct mc_pager_config c = config();
	struct mc_pager *p;
	uint8_t *memory, page[PAGE];

	for (int i = 0; i < 200; i++) {	/* pages that a guest has changed, or a predecessor has written */
		off_t at = (off_t)(rnd() % (SIZE / PAGE)) * PAGE;

		memset(page, i, PAGE);
		memcpy(expected + at, page, PAGE);
		CHECK(pwrite(memory_fd, page, PAGE, at) == PAGE);
	}
	p = new_pager(&c);
	CHECK(mc_pager_eager(p) == 0);
	mc_pager_free(p);
	memory = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, memory_fd, 0);
	CHECK(memory != MAP_FAILED && memcmp(memory, expected, SIZE) == 0);
	munmap(memory, SIZE);
}

/* Whatever is said of a process, nothing is written or read out of bounds, and the others are served. */
static void lies(void)
{
	struct mc_pager_config c = config();
	struct child honest = start_child(rnd()), liar = start_child(rnd());
	struct mc_pager *p = new_pager(&c);
	pthread_t t = start(p);
	int refused = 0;

	for (int i = 0; i < 3000; i++) {
		struct mc_pager_mapping maps[MC_PAGER_MAX_MAPPINGS];
		uint32_t n = (uint32_t)(rnd() % (MC_PAGER_MAX_MAPPINGS + 3));
		uint32_t slot = 1 + (uint32_t)(rnd() % MC_PAGER_MAX_SOURCES);
		int fd = dup(rnd() % 8 ? liar.uffd : memory_fd);

		for (uint32_t k = 0; k < n && k < MC_PAGER_MAX_MAPPINGS; k++) {
			maps[k] = liar.maps[rnd() % 2];
			if (rnd() % 2)
				maps[k].address += (rnd() % 64) * PAGE;
			if (rnd() % 3 == 0)
				maps[k].size = (rnd() % 600) * PAGE;
			if (rnd() % 2)
				maps[k].offset = (rnd() % (SIZE / PAGE)) * PAGE;
			if (rnd() % 40 == 0)
				maps[k].address = rnd();
			if (rnd() % 40 == 0)
				maps[k].size = rnd() >> rnd() % 64;
			if (rnd() % 40 == 0)
				maps[k].offset = rnd() >> rnd() % 64;
		}
		if (mc_pager_serve(p, slot, fd, maps, n) < 0) {
			refused++;
			close(fd);
		}
	}
	/* What it had put at wrong places is a process's right to write. All that is asked of the pager is that it does not
	 * take its word for what is there. */
	murder(&liar);
	CHECK(refused > 0 && fallocate(memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)SIZE) == 0);
	serve(p, 0, &honest);
	finish(&honest);
	stop(p, t);
}

static void configs(void)
{
	struct mc_pager_config c = config(), bad;
	uint32_t descending[] = {3, 3}, outside[] = {CHUNKS};

#define REFUSED(change)                                      \
	do {                                                 \
		bad = c;                                     \
		change;                                      \
		CHECK(!mc_pager_new(&bad) && errno == EINVAL); \
	} while (0)
	REFUSED(bad.size = 0);
	REFUSED(bad.size = SIZE - 1);
	REFUSED(bad.size = SIZE + PAGE);
	REFUSED(bad.size = 1ull << 63);
	REFUSED(bad.n_layers = LAYERS - 1);
	REFUSED(bad.n_layers = MC_PAGER_MAX_LAYERS + 1);
	REFUSED(bad.memory_fd = -1);
	REFUSED((bad.ahead = descending, bad.n_ahead = 2));
	REFUSED((bad.ahead = outside, bad.n_ahead = 1));
	for (uint32_t bucket = 1; bucket < MC_PAGER_BUCKETS; bucket++)
		CHECK(mc_pager_bucket_ns(bucket) > mc_pager_bucket_ns(bucket - 1));
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} modes[] = {{"faults", faults}, {"deaths", deaths}, {"damage", damage},
		     {"eager", eager},	 {"lies", lies},     {"configs", configs}};

	CHECK(argc == 3);
	alarm(90);
	random_state = 88172645463325252ull ^ strtoull(argv[2], NULL, 0);
	make_template();
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++)
		if (!strcmp(modes[i].name, argv[1])) {
			modes[i].run();
			return 0;
		}
	return 2;
}
