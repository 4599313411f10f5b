#define MC_DUMP_VMCOREINFO_MAX ...
#define MC_MSR_LSTAR ...
#define MC_MSR_KERNEL_GS_BASE ...

struct mc_dump_region { uint64_t gpa, size, offset; };
struct mc_dump_vcpu {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	uint64_t kernel_gs_base;
};
uint64_t mc_dump_start(uint32_t vcpus, uint32_t regions);
uint64_t mc_dump_head(uint8_t *out, const struct mc_dump_vcpu *vcpus, uint32_t n_vcpus,
		      const struct mc_dump_region *regions, uint32_t n_regions, const char *vmcoreinfo, uint32_t length);
int64_t mc_dump_find_vmcoreinfo(int fd, uint64_t start, uint64_t size, uint64_t from, char *out, uint32_t *length);
