/*
 * The words of guests that are frozen and cloned. ram= gives templates something to hold; serve= makes the guest
 * observable from outside, alike under every VMM: a byte on the UART as soon as it runs, answers to questions, and
 * what each first touch of a page cost it.
 */
#include "guest.h"

#include <linux/serial_reg.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define GROUP 256u		/* pages: 1 MiB, of which the first so-many per cent hold data */
#define MAX_SAMPLES 4096u

static uint64_t ram_start, ram_pages, ram_filled;	/* ram_filled: pages of each group */
static uint32_t samples[MAX_SAMPLES];

static volatile uint64_t *page(uint64_t n)
{
	return (volatile uint64_t *)(ram_start + n * PAGE);
}

/* Word i of page n as ram= leaves it; word 1 is everybody's to write. */
static uint64_t content(uint64_t n, unsigned i)
{
	return n % GROUP < ram_filled ? (n + 1) * 0x9e3779b97f4a7c15 + i * 0xd1342543de82ef95 : 0;
}

/* ram=START:PAGES:PERCENT, START a multiple of the page size; says "ram PAGES-WITH-DATA" */
void do_ram(const char *arg)
{
	uint64_t percent, filled = 0;

	arg = pair(arg, &ram_start);
	arg = pair(arg, &ram_pages);
	percent = number(arg);
	ram_filled = GROUP * percent / 100;
	for (uint64_t n = 0; n < ram_pages; n++) {
		if (n % GROUP >= ram_filled)
			continue;
		for (unsigned i = 0; i < WORDS; i++)
			page(n)[i] = content(n, i);
		filled++;
	}
	puts("ram ");
	put_hex(filled);
	put('\n');
}

static bool intact(uint64_t n, unsigned i)
{
	return i == 1 || page(n)[i] == content(n, i);
}

/* Says "bad N": words of the region that are not what ram= wrote. */
static void check(void)
{
	uint64_t bad = 0;

	for (uint64_t n = 0; n < ram_pages; n++)
		for (unsigned i = 0; i < WORDS; i++)
			bad += !intact(n, i);
	puts("bad ");
	put_hex(bad);
	put('\n');
}

/*
 * Touches count pages, the same in the same scattered order each time, and says "touched N bad B" and then each touch's
 * TSC ticks. Where ram_pages is a multiple of 16 the stride has no factor in common with it: no page comes twice, and
 * what is filled around one fault spares few others theirs.
 */
static void touch(uint64_t count, bool write)
{
	uint64_t n = 0, stride = (ram_pages * 5 / 8) | 1;
	uint32_t bad = 0;

	if (count > MAX_SAMPLES)
		count = MAX_SAMPLES;
	memset(samples, 0, sizeof(samples));	/* present before the clock runs */
	for (uint64_t i = 0; i < count; i++) {
		uint64_t start;

		n = (n + stride) % ram_pages;
		start = rdtsc();
		if (write)
			page(n)[1] = start;
		else
			(void)page(n)[1];
		samples[i] = rdtsc() - start;
		bad += !intact(n, 0);
	}
	puts("touched ");
	put_hex(count);
	puts(" bad ");
	put_hex(bad);
	for (uint64_t i = 0; i < count; i++) {
		put(' ');
		put_hex(samples[i]);
	}
	put('\n');
}

static bool received(void)
{
	return inb(COM1 + UART_LSR) & UART_LSR_DR;
}

/* Sleeps until the console has a byte. */
static void doze(void)
{
	uint32_t seen = interrupts;

	outb(COM1 + UART_MCR, UART_MCR_OUT2);
	enable_irq(4);
	outb(COM1 + UART_IER, UART_IER_RDI);
	while (!received()) {
		wait_interrupts(seen + 1);
		seen = interrupts;
	}
	outb(COM1 + UART_IER, 0);
}

/* A decimal number's digits and the byte after them. */
static uint64_t read_number(void)
{
	uint64_t v = 0;

	for (;;) {
		uint8_t c;

		while (!received())
			pause();
		c = inb(COM1 + UART_RX);
		if (c < '0' || c > '9')
			return v;
		v = v * 10 + (c - '0');
	}
}

/*
 * serve=TICKS:DIRTY: for ever, after each TICKS of the TSC it writes one '.' and the word 1 of DIRTY more pages of
 * ram=. A clock that was set, either way, counts as time that passed: a restored guest's first act is a '.'. Answers
 *   ?    "pong TSC"
 *   c    checks all of ram=: "bad N"
 *   rN.  reads N scattered pages (the '.' stands for any byte that is no digit); wN. writes them
 *   qN.  goes on with N for TICKS; N = 0: quiet, no '.' and no dirt
 *   z    from now on sleeps whenever there is nothing to answer
 */
void do_serve(const char *arg)
{
	uint64_t ticks, dirty, last = 0, next = 0;
	bool dozes = false;

	arg = pair(arg, &ticks);
	dirty = number(arg);
	for (;;) {
		uint64_t now = rdtsc();

		if (dozes)
			doze();
		else if (ticks && now - last >= ticks) {
			last = now;
			put('.');
			for (uint64_t i = 0; i < dirty; i++) {
				page(next)[1] = now;
				next = next + 1 < ram_pages ? next + 1 : 0;
			}
		}
		if (!received())
			continue;
		switch (inb(COM1 + UART_RX)) {
		case '?':
			puts("pong ");
			put_hex(rdtsc());
			put('\n');
			break;
		case 'c':
			check();
			break;
		case 'r':
			touch(read_number(), false);
			break;
		case 'w':
			touch(read_number(), true);
			break;
		case 'q':
			ticks = read_number();
			puts("so be it\n");
			break;
		case 'z':
			dozes = true;
			puts("dozing\n");
			break;
		}
	}
}
