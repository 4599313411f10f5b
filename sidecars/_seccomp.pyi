"""What sidecars/native/syscalls.cdef.h declares, in types."""

from typing import Any

CData = Any

class _Ffi:
    NULL: Any
    def new(self, what: str, value: Any = ...) -> Any: ...
    def string(self, text: Any) -> bytes: ...

class _Lib:
    AF_UNIX: int
    AT_EMPTY_PATH: int
    CLONE_SIGHAND: int
    CLONE_THREAD: int
    CLONE_VM: int
    FIOCLEX: int
    FIONBIO: int
    FIONREAD: int
    F_DUPFD: int
    F_DUPFD_CLOEXEC: int
    F_GETFD: int
    F_GETFL: int
    F_GET_SEALS: int
    F_SETFD: int
    F_SETFL: int
    KVM_CHECK_EXTENSION: int
    KVM_CREATE_IRQCHIP: int
    KVM_CREATE_PIT2: int
    KVM_CREATE_VCPU: int
    KVM_CREATE_VM: int
    KVM_GET_API_VERSION: int
    KVM_GET_CLOCK: int
    KVM_GET_DEBUGREGS: int
    KVM_GET_DIRTY_LOG: int
    KVM_GET_IRQCHIP: int
    KVM_GET_LAPIC: int
    KVM_GET_MP_STATE: int
    KVM_GET_MSRS: int
    KVM_GET_MSR_INDEX_LIST: int
    KVM_GET_PIT2: int
    KVM_GET_REGS: int
    KVM_GET_SREGS: int
    KVM_GET_SUPPORTED_CPUID: int
    KVM_GET_TSC_KHZ: int
    KVM_GET_VCPU_EVENTS: int
    KVM_GET_VCPU_MMAP_SIZE: int
    KVM_GET_XCRS: int
    KVM_GET_XSAVE: int
    KVM_GET_XSAVE2: int
    KVM_IOEVENTFD: int
    KVM_IRQFD: int
    KVM_IRQ_LINE: int
    KVM_KVMCLOCK_CTRL: int
    KVM_RUN: int
    KVM_SET_CLOCK: int
    KVM_SET_CPUID2: int
    KVM_SET_DEBUGREGS: int
    KVM_SET_IDENTITY_MAP_ADDR: int
    KVM_SET_IRQCHIP: int
    KVM_SET_LAPIC: int
    KVM_SET_MP_STATE: int
    KVM_SET_MSRS: int
    KVM_SET_PIT2: int
    KVM_SET_REGS: int
    KVM_SET_SREGS: int
    KVM_SET_TSC_KHZ: int
    KVM_SET_TSS_ADDR: int
    KVM_SET_USER_MEMORY_REGION: int
    KVM_SET_VCPU_EVENTS: int
    KVM_SET_XCRS: int
    KVM_SET_XSAVE: int
    PROT_EXEC: int
    PR_GET_NAME: int
    PR_SET_NAME: int
    PR_SET_VMA: int
    SCMP_ACT_ALLOW: int
    SCMP_ACT_KILL_PROCESS: int
    SCMP_ACT_TRAP: int
    SCMP_ARCH_NATIVE: int
    SCMP_CMP_EQ: int
    SCMP_CMP_MASKED_EQ: int
    SCMP_CMP_NE: int
    SCMP_FLTATR_ACT_BADARCH: int
    SCMP_FLTATR_CTL_OPTIMIZE: int
    SIGSYS: int
    TCGETS: int
    TIOCGWINSZ: int
    TUNSETOFFLOAD: int
    TUNSETQUEUE: int
    UFFDIO_COPY: int
    UFFDIO_UNREGISTER: int
    UFFDIO_WAKE: int
    UFFDIO_ZEROPAGE: int

    def mc_seccomp_errno(self, error: int, /) -> int: ...
    def seccomp_init(self, action: int, /) -> Any: ...
    def seccomp_release(self, context: Any, /) -> None: ...
    def seccomp_attr_set(self, context: Any, attribute: int, value: int, /) -> int: ...
    def seccomp_rule_add_array(self, context: Any, action: int, call: int, count: int, array: Any, /) -> int: ...
    def seccomp_export_bpf(self, context: Any, fd: int, /) -> int: ...
    def seccomp_syscall_resolve_name(self, name: bytes, /) -> int: ...
    def seccomp_syscall_resolve_num_arch(self, architecture: int, number: int, /) -> Any: ...
    def free(self, memory: Any, /) -> None: ...

ffi: _Ffi
lib: _Lib
