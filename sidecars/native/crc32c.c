#include "crc32c.h"

#include <stdbool.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <nmmintrin.h>
#endif

#define POLYNOMIAL 0x82f63b78u	/* reflected */
#define LANE 2048		/* bytes of each of the three streams that are summed side by side */

static uint32_t by_byte[8][256];	/* of a byte that is followed by 0 to 7 zero bytes */
static uint32_t past_lane[4][256];	/* of each byte of a CRC, LANE zero bytes later */
static bool have_instruction;

static uint32_t past_zeros(uint32_t crc, unsigned n)
{
	while (n--)
		crc = by_byte[0][crc & 0xff] ^ crc >> 8;
	return crc;
}

/* When the library is loaded, and so before any thread can ask. A CRC is linear: what LANE zero bytes make of it is the sum
 * of what they make of its 32 bits. */
__attribute__((constructor)) static void init(void)
{
	uint32_t bits[32];

	for (uint32_t n = 0; n < 256; n++) {
		uint32_t crc = n;

		for (int bit = 0; bit < 8; bit++)
			crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
		by_byte[0][n] = crc;
	}
	for (uint32_t n = 0; n < 256; n++)
		for (int k = 1; k < 8; k++)
			by_byte[k][n] = past_zeros(by_byte[k - 1][n], 1);
	for (int bit = 0; bit < 32; bit++)
		bits[bit] = past_zeros(1u << bit, LANE);
	for (uint32_t n = 0; n < 256; n++)
		for (int k = 0; k < 4; k++) {
			past_lane[k][n] = 0;
			for (int bit = 0; bit < 8; bit++)
				if (n >> bit & 1)
					past_lane[k][n] ^= bits[8 * k + bit];
		}
#if defined(__x86_64__)
	unsigned a, b, c, d;

	have_instruction = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_SSE4_2);
#endif
}

static uint64_t load(const uint8_t *p)
{
	uint64_t word;

	memcpy(&word, p, sizeof(word));
	return word;
}

uint32_t mc_crc32c_tables(uint32_t crc, const void *data, size_t len)
{
	const uint8_t *p = data;

	crc = ~crc;
	/* Eight bytes at a time: a little-endian load, as all of this program assumes. */
	for (; len >= 8; p += 8, len -= 8) {
		uint64_t word = load(p) ^ crc;

		crc = 0;
		for (int k = 0; k < 8; k++)
			crc ^= by_byte[7 - k][word >> 8 * k & 0xff];
	}
	while (len--)
		crc = by_byte[0][(crc ^ *p++) & 0xff] ^ crc >> 8;
	return ~crc;
}

#if defined(__x86_64__)
static uint32_t over_lane(uint32_t crc)
{
	return past_lane[0][crc & 0xff] ^ past_lane[1][crc >> 8 & 0xff] ^ past_lane[2][crc >> 16 & 0xff] ^
	       past_lane[3][crc >> 24];
}

/* The instruction answers after 3 cycles and can be started in each: three streams at once, added up at their end. */
__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const uint8_t *p, size_t len)
{
	uint64_t a = ~crc;

	a &= 0xffffffff;
	for (; len >= 3 * LANE; p += 3 * LANE, len -= 3 * LANE) {
		uint64_t b = 0, c = 0;

		for (size_t i = 0; i < LANE; i += 8) {
			a = _mm_crc32_u64(a, load(p + i));
			b = _mm_crc32_u64(b, load(p + i + LANE));
			c = _mm_crc32_u64(c, load(p + i + 2 * LANE));
		}
		a = over_lane(over_lane((uint32_t)a) ^ (uint32_t)b) ^ (uint32_t)c;
	}
	for (; len >= 8; p += 8, len -= 8)
		a = _mm_crc32_u64(a, load(p));
	while (len--)
		a = _mm_crc32_u8((uint32_t)a, *p++);
	return ~(uint32_t)a;
}
#endif

uint32_t mc_crc32c(uint32_t crc, const void *data, size_t len)
{
#if defined(__x86_64__)
	if (have_instruction)
		return by_instruction(crc, data, len);
#endif
	return mc_crc32c_tables(crc, data, len);
}
