/* CRC-32C (Castagnoli; RFC 3720, appendix B.4), by the processor's instruction where it has it. */
#ifndef MC_CRC32C_H
#define MC_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* The CRC of what `crc` is already the CRC of, followed by these bytes. Start with 0. "123456789" gives 0xe3069283. */
uint32_t mc_crc32c(uint32_t crc, const void *data, size_t len);

/* As above, always by tables, as on a processor without SSE 4.2. For tests. */
uint32_t mc_crc32c_tables(uint32_t crc, const void *data, size_t len);

#endif
