/*
 * A micro-guest that does what its command line says, one word after the other: NAME or NAME=ARGUMENT. After the
 * last one it sleeps for good. What it prints ends in "\n". A command line holds 2047 bytes; the word initrd goes on
 * with those in the initrd, which ends in a NUL.
 */
#include "guest.h"

#include <linux/serial_reg.h>
#include <linux/virtio_mmio.h>

struct module { uint64_t paddr, size, cmdline, reserved; };
struct start_info { uint32_t magic, version, flags, nr_modules; uint64_t modules, cmdline, rsdp, memmap; uint32_t entries; };
struct gate { uint16_t low, selector; uint8_t ist, type; uint16_t middle; uint32_t high, zero; };

extern struct gate idt[256];
extern char gate_call[], gate_irq[], gate_spurious[];

static uint32_t slot;	/* of the virtio-mmio device that the mmio words talk to */
static const char *word;	/* the next one to do */
static const struct start_info *boot;
static volatile uint32_t ap_alive;

static void sleep_for_good(void)
{
	for (;;)
		kernel(do_halt, 0);
}

/* print=TEXT ('_' for a blank) */
static void do_print(const char *arg)
{
	for (; *arg > ' '; arg++)
		put(*arg == '_' ? ' ' : *arg);
	put('\n');
}

/* fill=N: N bytes of a known pattern through the UART */
static void do_fill(const char *arg)
{
	uint64_t n = number(arg);

	for (uint64_t i = 0; i < n; i++)
		put("0123456789abcdefghijklmnopqrstuvwxyz"[i % 36]);
}

/* flood=N: the same, 16 bytes each time THRE is seen, as a driver with FIFOs on sends them */
static void do_flood(const char *arg)
{
	uint64_t n = number(arg);

	outb(COM1 + UART_FCR, UART_FCR_ENABLE_FIFO);
	for (uint64_t i = 0; i < n;) {
		while (!(inb(COM1 + UART_LSR) & UART_LSR_THRE))
			pause();
		for (int k = 0; k < 16 && i < n; k++, i++)
			outb(COM1 + UART_TX, "0123456789abcdefghijklmnopqrstuvwxyz"[i % 36]);
	}
}

/* count=A: increments the 64-bit word at guest physical address A for ever */
static void do_count(const char *arg)
{
	volatile uint64_t *word = (volatile uint64_t *)number(arg);

	for (;;)
		++*word;
}

/* spin=N: N rounds of nothing */
static void do_spin(const char *arg)
{
	for (uint64_t n = number(arg); n; n--)
		__asm__ volatile("");
}

/* echo=N: sends N received bytes back, polling LSR */
static void do_echo(const char *arg)
{
	for (uint64_t n = number(arg); n; n--) {
		while (!(inb(COM1 + UART_LSR) & UART_LSR_DR))
			pause();
		put(inb(COM1 + UART_RX));
	}
}

/* serial: goes on with the words of a line that is received, polling LSR; another `serial` among them waits for the next */
static void do_serial(const char *arg)
{
	static char line[16384];
	size_t n = 0;

	(void)arg;
	while (n < sizeof(line) - 1) {
		while (!(inb(COM1 + UART_LSR) & UART_LSR_DR))
			pause();
		line[n] = inb(COM1 + UART_RX);
		if (line[n] == '\n')
			break;
		n++;
	}
	line[n] = 0;
	word = line;
}

/* echoirq=N: the same by receive interrupts */
static void do_echoirq(const char *arg)
{
	uint64_t n = number(arg), seen = 0;

	outb(COM1 + UART_FCR, UART_FCR_ENABLE_FIFO | UART_FCR_R_TRIG_10);
	outb(COM1 + UART_MCR, UART_MCR_OUT2);
	enable_irq(4);
	outb(COM1 + UART_IER, UART_IER_RDI);
	while (n) {
		wait_interrupts(seen + 1);
		seen = interrupts;
		while (n && inb(COM1 + UART_LSR) & UART_LSR_DR) {
			put(inb(COM1 + UART_RX));
			n--;
		}
	}
	outb(COM1 + UART_IER, 0);
}

/* txirq=N: sends N bytes by transmitter interrupts and says how many there were */
static void do_txirq(const char *arg)
{
	uint64_t n = number(arg), i = 0;
	uint32_t seen = interrupts, first = seen;

	outb(COM1 + UART_FCR, UART_FCR_ENABLE_FIFO);
	outb(COM1 + UART_MCR, UART_MCR_OUT2);
	enable_irq(4);
	outb(COM1 + UART_IER, UART_IER_THRI);
	while (i < n) {
		wait_interrupts(seen + 1);
		seen = interrupts;
		if ((inb(COM1 + UART_IIR) & 0xf) != UART_IIR_THRI)
			continue;
		for (int k = 0; k < 16 && i < n; k++, i++)
			outb(COM1 + UART_TX, "0123456789abcdefghijklmnopqrstuvwxyz"[i % 36]);
	}
	outb(COM1 + UART_IER, 0);
	puts("\nirqs ");
	put_hex(interrupts - first);
	put('\n');
}

/* pio=P: reads and writes port P in each width, then as strings */
static void do_pio(const char *arg)
{
	uint16_t port = number(arg);
	uint8_t buffer[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
	void *p = buffer;
	uint64_t n = sizeof(buffer);

	outb(port, inb(port) + 1);
	outw(port, inw(port) + 1);
	outl(port, inl(port) + 1);
	__asm__ volatile("rep outsb" : "+S"(p), "+c"(n) : "d"(port) : "memory");
	p = buffer, n = 4;
	__asm__ volatile("rep outsw" : "+S"(p), "+c"(n) : "d"(port) : "memory");
	p = buffer, n = sizeof(buffer);
	__asm__ volatile("rep insb" : "+D"(p), "+c"(n) : "d"(port) : "memory");
	for (unsigned i = 0; i < sizeof(buffer); i++) {
		put_hex(buffer[i]);
		put(' ');
	}
	put('\n');
}

/* out=PORT:VALUE, a byte. Powers off by out=1540:52, resets by out=100:254 (core/pm.py) */
static void do_out(const char *arg)
{
	uint64_t port;
	const char *value = pair(arg, &port);

	outb(port, number(value));
}

static void do_slot(const char *arg)
{
	slot = number(arg);
}

/* peek=OFFSET, of the slot's registers */
static void do_peek(const char *arg)
{
	put_hex(read32(VIRTIO_MMIO(slot) + number(arg)));
	put('\n');
}

/* poke=OFFSET:VALUE */
static void do_poke(const char *arg)
{
	uint64_t offset;
	const char *value = pair(arg, &offset);

	write32(VIRTIO_MMIO(slot) + offset, number(value));
}

/* store=ADDRESS:VALUE and load=ADDRESS, 32 bits of memory */
static void do_store(const char *arg)
{
	uint64_t address;
	const char *value = pair(arg, &address);

	write32(address, number(value));
}

/* until=ADDRESS:VALUE: waits until the 32 bits there are that */
static void do_until(const char *arg)
{
	uint64_t address;
	uint32_t value = number(pair(arg, &address));

	while (read32(address) != value)
		pause();
}

static void do_load(const char *arg)
{
	put_hex(read32(number(arg)));
	put('\n');
}

/* wide=OFFSET: accesses of 1, 2 and 8 bytes */
static void do_wide(const char *arg)
{
	uint64_t a = VIRTIO_MMIO(slot) + number(arg);

	*(volatile uint8_t *)a = 0x11;
	*(volatile uint16_t *)a = 0x2222;
	*(volatile uint64_t *)a = 0x8877665544332211;
	put_hex(*(volatile uint8_t *)a);
	put(' ');
	put_hex(*(volatile uint16_t *)a);
	put(' ');
	put_hex(*(volatile uint64_t *)a);
	put('\n');
}

/* irq=GSI: sets it up; await=N: N interrupts in all */
static void do_irq(const char *arg)
{
	enable_irq(number(arg));
}

static void do_await(const char *arg)
{
	wait_interrupts(number(arg));
	puts("interrupts ");
	put_hex(interrupts);
	put('\n');
}

/* isr: waits for InterruptStatus, prints and acknowledges it */
static void do_isr(const char *arg)
{
	uint32_t status;

	(void)arg;
	while (!(status = read32(VIRTIO_MMIO(slot) + VIRTIO_MMIO_INTERRUPT_STATUS)))
		pause();
	write32(VIRTIO_MMIO(slot) + VIRTIO_MMIO_INTERRUPT_ACK, status);
	puts("isr ");
	put_hex(status);
	puts(" then ");
	put_hex(read32(VIRTIO_MMIO(slot) + VIRTIO_MMIO_INTERRUPT_STATUS));
	put('\n');
}

/* bench=N: N notifications of queue 0, and what they cost in TSC ticks each */
static void do_kicks(const char *arg)
{
	uint64_t n = number(arg), start = rdtsc();

	for (uint64_t i = 0; i < n; i++)
		write32(VIRTIO_MMIO(slot) + VIRTIO_MMIO_QUEUE_NOTIFY, 0);
	puts("ticks ");
	put_hex((rdtsc() - start) / n);
	put('\n');
}

static void do_fault(const char *arg)
{
	(void)arg;
	kernel(do_triple_fault, 0);
}

static void do_bad(const char *arg)
{
	(void)arg;
	kernel(do_unemulated, 0);
	puts("emulated\n");
}

/* cpuid=LEAF, subleaf 0 */
static void do_cpuid_word(const char *arg)
{
	uint32_t r[4] = { number(arg), 0, 0, 0 };

	kernel(do_cpuid, (uint64_t)r);
	for (int i = 0; i < 4; i++) {
		put_hex(r[i]);
		put(' ');
	}
	put('\n');
}

void ap_main(void)
{
	ap_alive = (read32(LAPIC + 0x20) >> 24) + 1;
	for (;;)
		pause();
}

/* smp: starts APIC id 1 and waits for it */
static void do_smp(const char *arg)
{
	(void)arg;
	ap_alive = 0;
	memcpy((void *)0x8000, ap_start, ap_end - ap_start);
	write32(LAPIC + 0xf0, 0x1ff);
	write32(LAPIC + 0x310, 1u << 24);
	write32(LAPIC + 0x300, 0x4500);		/* INIT */
	write32(LAPIC + 0x310, 1u << 24);
	write32(LAPIC + 0x300, 0x4608);		/* SIPI, page 8 */
	while (!ap_alive)
		pause();
	puts("ap ");
	put_hex(ap_alive - 1);
	put('\n');
}

/* initrd: goes on with the words in the first module */
static void do_initrd(const char *arg)
{
	(void)arg;
	word = (const char *)((const struct module *)boot->modules)->paddr;
}

static const struct { const char *name; void (*run)(const char *arg); } words[] = {
	{ "print", do_print }, { "fill", do_fill }, { "flood", do_flood }, { "count", do_count }, { "spin", do_spin },
	{ "echo", do_echo }, { "serial", do_serial }, { "echoirq", do_echoirq }, { "txirq", do_txirq },
	{ "pio", do_pio }, { "slot", do_slot },
	{ "peek", do_peek }, { "poke", do_poke }, { "wide", do_wide }, { "irq", do_irq }, { "await", do_await },
	{ "isr", do_isr }, { "kicks", do_kicks }, { "fault", do_fault }, { "bad", do_bad }, { "smp", do_smp },
	{ "cpuid", do_cpuid_word }, { "out", do_out }, { "store", do_store }, { "load", do_load }, { "until", do_until },
	{ "initrd", do_initrd },
	{ "ram", do_ram }, { "serve", do_serve },
	{ "disk", do_disk },
};

static const char *match(const char *text, const char *name)
{
	while (*name && *text == *name)
		text++, name++;
	return *name ? NULL : *text == '=' ? text + 1 : *text <= ' ' ? text : NULL;
}

static void set_gate(unsigned vector, char *handler, uint8_t type)
{
	uint64_t a = (uint64_t)handler;

	idt[vector] = (struct gate){ a, 0x10, 0, type, a >> 16, a >> 32, 0 };
}

void guest_main(struct start_info *info)
{
	boot = info;
	word = (const char *)info->cmdline;
	set_gate(6, gate_call, 0x8e);
	set_gate(IRQ_VECTOR, gate_irq, 0x8e);
	set_gate(0xff, gate_spurious, 0x8e);
	for (;;) {
		const char *arg = NULL, *this;

		while (*word && *word <= ' ')
			word++;
		if (!*word)
			sleep_for_good();
		this = word;
		while (*word > ' ')
			word++;
		for (unsigned i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
			arg = match(this, words[i].name);
			if (arg) {
				words[i].run(arg);
				break;
			}
		}
		if (!arg)
			puts("what?\n");
	}
}
