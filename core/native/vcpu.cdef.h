#define MC_MMIO_SLOTS ...
#define MC_MMIO_STRIDE ...
#define MC_EXIT_PAUSED ...
#define MC_EXIT_MMIO ...
#define MC_EXIT_PIO ...
#define MC_EXIT_SHUTDOWN ...
#define MC_EXIT_FAIL_ENTRY ...
#define MC_EXIT_INTERNAL_ERROR ...
#define MC_EXIT_SYSTEM_EVENT ...
#define MC_EXIT_DEBUG ...
#define MC_EXIT_ERROR ...
#define MC_EXIT_UNHANDLED ...

struct mc_isr { uint32_t status; ...; };
struct mc_exit {
	uint64_t addr;
	uint32_t size;
	bool is_write;
	uint64_t data;
	uint32_t code;
	uint32_t n_details;
	uint64_t details[...];
	...;
};
struct mc_platform { struct mc_uart *uart; uint16_t uart_port; uint64_t mmio_base; ...; };
struct mc_vcpu_stats { uint64_t exits; uint64_t uart, isr; uint64_t python; };
struct mc_vcpu { struct mc_exit exit; struct mc_vcpu_stats stats; int tid; ...; };

int mc_platform_set_isr(struct mc_platform *platform, uint32_t slot, struct mc_isr *isr);
int mc_vcpu_init(struct mc_vcpu *vcpu, int fd, size_t run_size, struct mc_platform *platform);
void mc_vcpu_deinit(struct mc_vcpu *vcpu);
int mc_vcpu_install_signal(void);
int mc_vcpu_bind_thread(struct mc_vcpu *vcpu, const char *name);
int mc_vcpu_run(struct mc_vcpu *vcpu);
int mc_vcpu_kick(struct mc_vcpu *vcpu);
void mc_vcpu_clear_kick(struct mc_vcpu *vcpu);
void mc_vcpu_forget_exit(struct mc_vcpu *vcpu);
struct mc_isr *mc_isr_map(int fd);
int mc_isr_replace(struct mc_isr *isr, int fd);
void mc_isr_unmap(struct mc_isr *isr);
void mc_isr_raise(struct mc_isr *isr, uint32_t bits);
void mc_isr_clear(struct mc_isr *isr, uint32_t bits);
uint32_t mc_isr_read(const struct mc_isr *isr);
struct mc_uart_ring *mc_uart_ring_map(int fd);
void mc_uart_ring_unmap(struct mc_uart_ring *ring);
