int mc_uffd_open(int device_fd);
int mc_uffd_register(int uffd, uint64_t address, uint64_t size);
