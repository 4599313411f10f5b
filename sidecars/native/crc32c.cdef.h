uint32_t mc_crc32c(uint32_t crc, const void *data, size_t len);
uint32_t mc_crc32c_tables(uint32_t crc, const void *data, size_t len);
