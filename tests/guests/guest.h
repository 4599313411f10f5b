/* What micro-guest programs share; all of it runs at CPL 3 (start.S). */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COM1 0x3f8
#define VIRTIO_MMIO(slot) (0xd0000000u + 0x1000u * (slot))
#define LAPIC 0xfee00000u
#define IOAPIC 0xfec00000u
#define IRQ_VECTOR 0x30

static inline void outb(uint16_t port, uint8_t v) { __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outw(uint16_t port, uint16_t v) { __asm__ volatile("outw %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outl(uint16_t port, uint32_t v) { __asm__ volatile("outl %0, %1" : : "a"(v), "Nd"(port)); }
static inline uint8_t inb(uint16_t port) { uint8_t v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline uint16_t inw(uint16_t port) { uint16_t v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline uint32_t inl(uint16_t port) { uint32_t v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline uint32_t read32(uint64_t a) { return *(volatile uint32_t *)a; }
static inline void write32(uint64_t a, uint32_t v) { *(volatile uint32_t *)a = v; }
static inline void pause(void) { __asm__ volatile("pause" : : : "memory"); }
static inline uint64_t rdtsc(void) { uint32_t l, h; __asm__ volatile("rdtsc" : "=a"(l), "=d"(h)); return l | (uint64_t)h << 32; }

/* Calls fn(arg) at CPL 0. */
static inline uint64_t kernel(void *fn, uint64_t arg)
{
	uint64_t ret;

	__asm__ volatile("ud2" : "=a"(ret), "+D"(fn), "+S"(arg) : : "rcx", "rdx", "r8", "r9", "r10", "r11", "memory", "cc");
	return ret;
}

extern volatile uint32_t interrupts;
extern char ap_start[], ap_end[];
extern void do_halt(void), do_enable_interrupts(void), do_cpuid(void), do_triple_fault(void), do_unemulated(void);

void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int c, size_t n);
void put(char c);
void puts(const char *s);
void put_hex(uint64_t v);
uint64_t number(const char *s);
/* FIRST:SECOND; returns the second's text */
const char *pair(const char *arg, uint64_t *first);

/* Words (serve.c, load.c) */
void do_ram(const char *arg);
void do_serve(const char *arg);
void do_disk(const char *arg);

/* Routes a GSI, edge-triggered, to IRQ_VECTOR on the boot processor and turns interrupts on. */
void enable_irq(unsigned gsi);
void wait_interrupts(uint32_t n);

#endif
