#include "guest.h"

#include <linux/serial_reg.h>

void put(char c)
{
	while (!(inb(COM1 + UART_LSR) & UART_LSR_THRE))
		pause();
	outb(COM1 + UART_TX, c);
}

void puts(const char *s)
{
	while (*s)
		put(*s++);
}

void put_hex(uint64_t v)
{
	char digits[17], *p = digits + 16;

	*p = 0;
	do
		*--p = "0123456789abcdef"[v & 15];
	while (v >>= 4);
	puts(p);
}

uint64_t number(const char *s)
{
	uint64_t v = 0;

	for (; *s >= '0' && *s <= '9'; s++)
		v = v * 10 + (*s - '0');
	return v;
}

const char *pair(const char *arg, uint64_t *first)
{
	*first = number(arg);
	while (*arg++ != ':')
		;
	return arg;
}

void enable_irq(unsigned gsi)
{
	write32(LAPIC + 0xf0, 0x1ff);		/* spurious vector 0xff, software enable */
	write32(IOAPIC, 0x10 + 2 * gsi + 1);
	write32(IOAPIC + 0x10, 0);		/* to APIC id 0 */
	write32(IOAPIC, 0x10 + 2 * gsi);
	write32(IOAPIC + 0x10, IRQ_VECTOR);	/* fixed, physical, edge, active high, unmasked */
}

void wait_interrupts(uint32_t n)
{
	while (interrupts < n)
		kernel(do_halt, 0);
}

/* gcc calls it for large initialisers and copies. */
void *memcpy(void *to, const void *from, size_t n)
{
	char *d = to;
	const char *s = from;

	while (n--)
		*d++ = *s++;
	return to;
}

void *memset(void *to, int c, size_t n)
{
	char *d = to;

	while (n--)
		*d++ = c;
	return to;
}
