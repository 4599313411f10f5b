"""The core's C parts: KVM's ioctls and structures, the vCPU exit loop, the 16550 (native/*.h). cffi objects are Any."""

from typing import Any

class _Lib:
    MC_MSR_IA32_TSC: int
    MC_MSR_IA32_MISC_ENABLE: int
    MC_MSR_IA32_MTRR_DEF_TYPE: int
    MC_MSR_IA32_TSC_DEADLINE: int
    MC_MSR_KVM_STEAL_TIME: int
    MC_APIC_LVT_LINT0: int
    MC_APIC_LVT_LINT1: int
    MC_APIC_TMICT: int
    MC_APIC_TMCCT: int
    MC_APIC_TDCR: int
    KVM_API_VERSION: int
    KVM_GET_API_VERSION: int
    KVM_CHECK_EXTENSION: int
    KVM_CREATE_VM: int
    KVM_GET_VCPU_MMAP_SIZE: int
    KVM_GET_SUPPORTED_CPUID: int
    KVM_GET_MSR_INDEX_LIST: int
    KVM_SET_USER_MEMORY_REGION: int
    KVM_GET_DIRTY_LOG: int
    KVM_MEM_LOG_DIRTY_PAGES: int
    KVM_SET_TSS_ADDR: int
    KVM_SET_IDENTITY_MAP_ADDR: int
    KVM_CREATE_IRQCHIP: int
    KVM_CREATE_PIT2: int
    KVM_CREATE_VCPU: int
    KVM_IRQ_LINE: int
    KVM_IRQFD: int
    KVM_IOEVENTFD: int
    KVM_GET_IRQCHIP: int
    KVM_SET_IRQCHIP: int
    KVM_GET_PIT2: int
    KVM_SET_PIT2: int
    KVM_GET_CLOCK: int
    KVM_SET_CLOCK: int
    KVM_SET_CPUID2: int
    KVM_GET_REGS: int
    KVM_SET_REGS: int
    KVM_GET_SREGS: int
    KVM_SET_SREGS: int
    KVM_GET_MSRS: int
    KVM_SET_MSRS: int
    KVM_GET_XSAVE: int
    KVM_GET_XSAVE2: int
    KVM_SET_XSAVE: int
    KVM_GET_XCRS: int
    KVM_SET_XCRS: int
    KVM_GET_LAPIC: int
    KVM_SET_LAPIC: int
    KVM_GET_VCPU_EVENTS: int
    KVM_SET_VCPU_EVENTS: int
    KVM_GET_DEBUGREGS: int
    KVM_SET_DEBUGREGS: int
    KVM_GET_MP_STATE: int
    KVM_SET_MP_STATE: int
    KVM_GET_TSC_KHZ: int
    KVM_SET_TSC_KHZ: int
    KVM_KVMCLOCK_CTRL: int
    KVM_CAP_IRQCHIP: int
    KVM_CAP_USER_MEMORY: int
    KVM_CAP_SET_TSS_ADDR: int
    KVM_CAP_SET_IDENTITY_MAP_ADDR: int
    KVM_CAP_EXT_CPUID: int
    KVM_CAP_NR_VCPUS: int
    KVM_CAP_MAX_VCPUS: int
    KVM_CAP_NR_MEMSLOTS: int
    KVM_CAP_MP_STATE: int
    KVM_CAP_IRQFD: int
    KVM_CAP_IOEVENTFD: int
    KVM_CAP_PIT2: int
    KVM_CAP_ADJUST_CLOCK: int
    KVM_CAP_VCPU_EVENTS: int
    KVM_CAP_DEBUGREGS: int
    KVM_CAP_XSAVE: int
    KVM_CAP_XSAVE2: int
    KVM_CAP_XCRS: int
    KVM_CAP_TSC_DEADLINE_TIMER: int
    KVM_CAP_IMMEDIATE_EXIT: int
    KVM_IRQCHIP_PIC_MASTER: int
    KVM_IRQCHIP_PIC_SLAVE: int
    KVM_IRQCHIP_IOAPIC: int
    KVM_IRQFD_FLAG_DEASSIGN: int
    KVM_IOEVENTFD_FLAG_DATAMATCH: int
    KVM_IOEVENTFD_FLAG_DEASSIGN: int
    KVM_PIT_SPEAKER_DUMMY: int
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX: int
    KVM_CPUID_SIGNATURE: int
    KVM_MP_STATE_RUNNABLE: int
    KVM_MP_STATE_UNINITIALIZED: int
    KVM_SYSTEM_EVENT_SHUTDOWN: int
    KVM_SYSTEM_EVENT_RESET: int
    KVM_SYSTEM_EVENT_CRASH: int
    KVM_INTERNAL_ERROR_EMULATION: int
    KVM_INTERNAL_ERROR_SIMUL_EX: int
    KVM_INTERNAL_ERROR_DELIVERY_EV: int
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: int
    MC_RAM_CHUNK: int
    MC_RAM_GUEST: int
    MC_RAM_TARGET: int
    MC_RAM_BASE: int
    MC_RAM_STASH: int
    MC_DUMP_VMCOREINFO_MAX: int
    MC_MSR_LSTAR: int
    MC_MSR_KERNEL_GS_BASE: int
    MC_UART_PORTS: int
    MC_UART_TX_SIZE: int
    MC_UART_RX_SIZE: int
    MC_MMIO_SLOTS: int
    MC_MMIO_STRIDE: int
    MC_EXIT_PAUSED: int
    MC_EXIT_MMIO: int
    MC_EXIT_PIO: int
    MC_EXIT_SHUTDOWN: int
    MC_EXIT_FAIL_ENTRY: int
    MC_EXIT_INTERNAL_ERROR: int
    MC_EXIT_SYSTEM_EVENT: int
    MC_EXIT_DEBUG: int
    MC_EXIT_ERROR: int
    MC_EXIT_UNHANDLED: int

    def mc_ioctl(self, fd: int, request: int, arg: Any, /) -> int: ...
    def mc_ioctl_value(self, fd: int, request: int, arg: int, /) -> int: ...
    def mc_mask_pics(self, vm_fd: int, /) -> int: ...
    def mc_uart_init(self, uart: Any, vm_fd: int, gsi: int, /) -> int: ...
    def mc_uart_deinit(self, uart: Any, /) -> None: ...
    def mc_uart_attach(self, uart: Any, ring: Any, tx_event: int, rx_event: int, /) -> None: ...
    def mc_uart_poll(self, uart: Any, /) -> None: ...
    def mc_uart_reset(self, uart: Any, /) -> None: ...
    def mc_uart_read(self, uart: Any, offset: int, /) -> int: ...
    def mc_uart_write(self, uart: Any, offset: int, value: int, /) -> None: ...
    def mc_uart_save(self, uart: Any, regs: Any, /) -> None: ...
    def mc_uart_restore(self, uart: Any, regs: Any, /) -> int: ...
    def mc_platform_set_isr(self, platform: Any, slot: int, isr: Any, /) -> int: ...
    def mc_vcpu_init(self, vcpu: Any, fd: int, run_size: int, platform: Any, /) -> int: ...
    def mc_vcpu_deinit(self, vcpu: Any, /) -> None: ...
    def mc_vcpu_install_signal(self) -> int: ...
    def mc_vcpu_bind_thread(self, vcpu: Any, name: bytes, /) -> int: ...
    def mc_vcpu_run(self, vcpu: Any, /) -> int: ...
    def mc_vcpu_kick(self, vcpu: Any, /) -> int: ...
    def mc_vcpu_clear_kick(self, vcpu: Any, /) -> None: ...
    def mc_vcpu_forget_exit(self, vcpu: Any, /) -> None: ...
    def mc_ram_init(self, ram: Any, /) -> int: ...
    def mc_ram_deinit(self, ram: Any, /) -> None: ...
    def mc_ram_write_all(self, ram: Any, /) -> int: ...
    def mc_ram_write_dirty(self, ram: Any, dirty: Any, /) -> int: ...
    def mc_ram_stash(self, ram: Any, dirty: Any, /) -> int: ...
    def mc_ram_write_stash(self, ram: Any, /) -> int: ...
    def mc_ram_verify(
        self, files: Any, count: int, start: int, size: int, layers: Any, sums: Any, first: int, end: int, /
    ) -> int: ...
    def mc_dump_start(self, vcpus: int, regions: int, /) -> int: ...
    def mc_dump_head(
        self, out: Any, vcpus: Any, n_vcpus: int, regions: Any, n_regions: int, vmcoreinfo: bytes, length: int, /
    ) -> int: ...
    def mc_dump_find_vmcoreinfo(self, fd: int, start: int, size: int, from_: int, out: Any, length: Any, /) -> int: ...
    def mc_dirty_take(self, log: Any, dirty: Any, words: int, /) -> None: ...
    def mc_dirty_merge(self, source: Any, dirty: Any, words: int, /) -> None: ...
    def mc_dirty_count(self, dirty: Any, words: int, /) -> int: ...
    def mc_isr_map(self, fd: int, /) -> Any: ...
    def mc_isr_replace(self, isr: Any, fd: int, /) -> int: ...
    def mc_isr_unmap(self, isr: Any, /) -> None: ...
    def mc_isr_raise(self, isr: Any, bits: int, /) -> None: ...
    def mc_isr_clear(self, isr: Any, bits: int, /) -> None: ...
    def mc_isr_read(self, isr: Any, /) -> int: ...
    def mc_uart_ring_map(self, fd: int, /) -> Any: ...
    def mc_uart_ring_unmap(self, ring: Any, /) -> None: ...
    MC_SANDBOX_USER: int
    MC_SANDBOX_MOUNT: int
    MC_SANDBOX_IPC: int
    MC_SANDBOX_UTS: int
    MC_SANDBOX_NET: int
    MC_SANDBOX_LANDLOCK: int
    MC_SANDBOX_STATUS: int
    def mc_sandbox_enter(self, limits: Any, had: Any, step: Any, /) -> int: ...
    def mc_sandbox_close(self, program: Any, size: int, words: Any, step: Any, /) -> int: ...
    def mc_sandbox_sanitized(self) -> bool: ...
    def mc_uffd_open(self, device_fd: int, /) -> int: ...
    def mc_uffd_register(self, uffd: int, address: int, size: int, /) -> int: ...
    def mc_crc32c(self, crc: int, data: Any, len: int, /) -> int: ...
    def mc_crc32c_tables(self, crc: int, data: Any, len: int, /) -> int: ...

class _FFI:
    NULL: Any
    errno: int

    def new(self, cdecl: str, init: Any = ..., /) -> Any: ...
    def cast(self, cdecl: str, value: Any, /) -> Any: ...
    def from_buffer(self, cdecl: str, buffer: Any, /) -> Any: ...
    def memmove(self, to: Any, source: Any, size: int, /) -> None: ...
    def release(self, cdata: Any, /) -> None: ...
    def buffer(self, cdata: Any, size: int = ..., /) -> Any: ...
    def typeof(self, cdecl: Any, /) -> Any: ...
    def sizeof(self, cdecl: Any, /) -> int: ...
    def offsetof(self, cdecl: str, *fields: str) -> int: ...

lib: _Lib
ffi: _FFI
