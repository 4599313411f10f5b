/* The filter of system calls, and the last words of a process that it catches. */
#define _GNU_SOURCE
#include "sandbox.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static struct mc_sandbox_words last;

/* The handler runs in a process that may be anybody's by now, wherever it was caught: it calls nothing that takes a lock or
 * allocates, and writes what was made ready for it, and the call's name. */

struct text {
	char bytes[512];
	size_t size;
};

static void add(struct text *t, const char *s, size_t most)
{
	while (most-- && *s && t->size < sizeof(t->bytes))
		t->bytes[t->size++] = *s++;
}

static void add_number(struct text *t, uint64_t value, unsigned base, unsigned digits)
{
	char reversed[24];
	unsigned n = 0;

	do {
		reversed[n++] = "0123456789abcdef"[value % base];
		value /= base;
	} while (value || n < digits);
	while (n)
		add(t, &reversed[--n], 1);
}

/* As the log's other lines have it. The calendar's arithmetic is that of days since 0000-03-01, in eras of 400 years. */
static void add_time(struct text *t)
{
	struct timespec now;
	uint64_t days, era, doe, yoe, doy, month, seconds;

	clock_gettime(CLOCK_REALTIME, &now);
	seconds = (uint64_t)now.tv_sec % 86400;
	days = (uint64_t)now.tv_sec / 86400 + 719468;
	era = days / 146097;
	doe = days % 146097;
	yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
	doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
	month = (5 * doy + 2) / 153;
	add_number(t, yoe + era * 400 + (month >= 10), 10, 4);
	add(t, "-", 1);
	add_number(t, month < 10 ? month + 3 : month - 9, 10, 2);
	add(t, "-", 1);
	add_number(t, doy - (153 * month + 2) / 5 + 1, 10, 2);
	add(t, "T", 1);
	add_number(t, seconds / 3600, 10, 2);
	add(t, ":", 1);
	add_number(t, seconds / 60 % 60, 10, 2);
	add(t, ":", 1);
	add_number(t, seconds % 60, 10, 2);
	add(t, ".", 1);
	add_number(t, (uint64_t)now.tv_nsec / 1000000, 10, 3);
	add(t, "Z", 1);
}

static void add_name(struct text *t, int number)
{
	if (number >= 0 && (uint32_t)number < last.count && last.names[(uint32_t)number * last.width])
		add(t, last.names + (uint32_t)number * last.width, last.width);
	else {
		add(t, "system call ", 12);
		add_number(t, (uint32_t)number, 10, 1);
	}
}

static void add_arguments(struct text *t, const ucontext_t *context)
{
#ifdef __x86_64__
	static const int REGISTERS[] = {REG_RDI, REG_RSI, REG_RDX, REG_R10};

	for (unsigned i = 0; i < sizeof(REGISTERS) / sizeof(*REGISTERS); i++) {
		add(t, i ? ", 0x" : "(0x", 4);
		add_number(t, (uint64_t)context->uc_mcontext.gregs[REGISTERS[i]], 16, 1);
	}
	add(t, ")", 1);
#endif
}

static void on_violation(int signo, siginfo_t *info, void *context)
{
	static int caught;
	struct text line = {.size = 0}, name = {.size = 0};

	/* Two threads at once: the first one speaks. */
	while (__atomic_exchange_n(&caught, 1, __ATOMIC_ACQ_REL))
		sched_yield();
	add_name(&name, info->si_syscall);
	add(&line, "{\"ts\": \"", 8);
	add_time(&line);
	add(&line, "\", \"level\": \"critical\", \"role\": ", 64);
	add(&line, last.role, 128);
	add(&line, ", \"msg\": \"seccomp: ", 64);
	add(&line, name.bytes, name.size);
	add_arguments(&line, context);
	add(&line, ": this process may not do that, and ends\"}\n", 64);
	(void)!write(last.log_fd, line.bytes, line.size);
	if (last.life_fd >= 0) {
		memcpy(last.life + last.life_at, name.bytes, name.size < last.life_room ? name.size : last.life_room);
		(void)!send(last.life_fd, last.life, last.life_size, MSG_DONTWAIT | MSG_NOSIGNAL);
	}
	syscall(SYS_exit_group, MC_SANDBOX_STATUS);
}

int mc_sandbox_close(const void *filter, size_t bytes, const struct mc_sandbox_words *words, const char **step)
{
	struct sock_fprog program = {
		.len = (unsigned short)(bytes / sizeof(struct sock_filter)),
		.filter = (struct sock_filter *)filter,
	};
	struct sigaction action = {.sa_sigaction = on_violation, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	long thread;

	last = *words;
	*step = "the handler of SIGSYS";
	if (sigaction(SIGSYS, &action, NULL))
		return errno;
	*step = "the seccomp filter";
	thread = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
	if (thread)
		return thread < 0 ? errno : EBUSY;	/* a thread has a filter of its own */
	*step = 0;
	return 0;
}
