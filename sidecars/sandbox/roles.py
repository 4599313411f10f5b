"""The one place that says which system calls each role may make once it runs, and why.

What is not here ends the process, and is named in its log. A device of the kit's adds what it needs beyond "kit" in
its class (``Device.system_calls``). Not here on purpose: openat and all that takes a path, socket, execve, fork (a
clone that is no thread), ptrace, process_vm_readv, pidfd_getfd, kill, mount, bpf, io_uring_setup, userfaultfd, memory
that can be executed. Calls of other C libraries and kernels for the same purpose stand beside those that are seen on
Debian 12.
"""

from __future__ import annotations

import errno

from motorcade.sidecars.sandbox.calls import OWN_PID, Call, Has, Is, IsNot, Lacks, Null, allow

_FILES = (
    *allow("descriptors that it was given or that are between its own threads", "read", "write", "readv", "writev"),
    *allow("files, at a position", "pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2", "lseek"),
    *allow("lets go of descriptors", "close", "close_range", "shutdown"),
    *allow("what a descriptor is", "fstat"),
    Call("newfstatat", "fstat, as the C library makes it", (Has(3, ("AT_EMPTY_PATH",)),)),
    Call(
        "fcntl",
        "flags and copies of descriptors, seals of a memfd; no locks, leases or signals",
        (Is(1, ("F_DUPFD", "F_DUPFD_CLOEXEC", "F_GETFD", "F_SETFD", "F_GETFL", "F_SETFL", "F_GET_SEALS")),),
    ),
    *allow("copies of descriptors", "dup", "dup2", "dup3"),
    Call("ioctl", "Python's way to make a descriptor non-blocking or close-on-exec", (Is(1, ("FIONBIO", "FIOCLEX")),)),
)
_WAITING = (
    *allow("its loops", "poll", "ppoll", "select", "pselect6", "epoll_create1", "epoll_ctl"),
    *allow("its loops", "epoll_wait", "epoll_pwait", "epoll_pwait2", "eventfd2"),
)
_MESSAGES = (
    *allow("sockets that are connected: the supervisor's, ZeroMQ's", "sendmsg", "recvmsg", "sendto", "recvfrom"),
    *allow("what a socket is", "getsockopt", "getsockname", "getpeername"),
    *allow("timeouts and buffer sizes of sockets that it has", "setsockopt"),
)
_MEMORY = (
    Call("mmap", "the heap, stacks, descriptors it was given; never to execute", (Lacks(2, ("PROT_EXEC",)),)),
    Call("mprotect", "stacks and the heap; never to execute", (Lacks(2, ("PROT_EXEC",)),)),
    *allow("the heap and stacks", "munmap", "mremap", "madvise", "brk"),
    *allow("fences between threads (C library, liburing)", "membarrier"),
)
_THREADS = (
    Call("clone", "threads, and nothing that is none", (Has(0, ("CLONE_VM", "CLONE_SIGHAND", "CLONE_THREAD")),)),
    Call("clone3", "its flags are out of a filter's sight: the C library takes clone then", fails=errno.ENOSYS),
    *allow("a thread's begin and end", "set_robust_list", "rseq", "exit", "exit_group", "sched_getaffinity"),
    *allow("ZeroMQ's threads look at their scheduling", "sched_getparam", "sched_getscheduler"),
    Call("sched_setscheduler", "and set it: normal, batch or idle, never real-time", (Is(1, (0, 3, 5)),)),
    *allow("locks", "futex", "futex_wait", "futex_wake", "futex_waitv", "futex_requeue", "sched_yield"),
    *allow("who it is", "getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid"),
    Call("prctl", "names of threads and of memory", (Is(0, ("PR_SET_NAME", "PR_GET_NAME", "PR_SET_VMA")),)),
    *allow("signals", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall"),
    Call("rt_sigaction", "handlers, but not that of the filter", (IsNot(0, "SIGSYS"),)),
    Call("tgkill", "abort, and kicking a vCPU out of the guest: threads of its own", (Is(0, (OWN_PID,)),)),
)
_TIME = (
    *allow("the time, where the vDSO has none", "clock_gettime", "clock_getres", "gettimeofday", "time"),
    *allow("pauses of ZeroMQ and of Python", "nanosleep", "clock_nanosleep"),
    *allow("its use of the processor", "getrusage", "times", "getcpu"),
)
_LIBRARY = (
    *allow("hash seeds, ids, what rng gives its guest", "getrandom"),
    *allow("sizes that the C library asks for", "uname", "sysinfo"),
    Call("prlimit64", "its own limits, to read", (Is(0, (0, OWN_PID)), Null(2))),
    *allow("its own limits, to read", "getrlimit"),
)
EVERYBODY = (*_FILES, *_WAITING, *_MESSAGES, *_MEMORY, *_THREADS, *_TIME, *_LIBRARY)

_CONTROL = (
    Call("socket", "ZeroMQ looks for a core that is gone, and may not", (Is(0, ("AF_UNIX",)),), fails=errno.EPERM),
)
_LISTENING = allow("clients of a socket that listens already", "accept4", "accept")

_BLK = (
    *allow("writes and flushes of the disk", "fdatasync", "fsync"),
    *allow("discarding and zeroing of the disk", "fallocate"),
    *allow("the ring that was made before, restricted to transfers and polls", "io_uring_enter", "io_uring_register"),
)
_NET = (
    Call("ioctl", "offloads and queues of the tap, as the driver chooses", (Is(1, ("TUNSETOFFLOAD", "TUNSETQUEUE")),)),
    *allow("a capture whose last record was cut short by a full disk", "ftruncate"),
)
_LINK = (
    Call("socket", "the wire to the other VM, which may come and go", (Is(0, ("AF_UNIX",)),)),
    *allow("the wire's ends, in a directory that it has open", "bind", "listen", "connect", "rename", "unlink"),
    *allow("the same, on other processors", "renameat", "renameat2", "unlinkat"),
    *allow("who of the two listens", "flock"),
    *allow("the next attempt", "timerfd_settime"),
    *_LISTENING,
)
_SERIAL = (
    *_LISTENING,
    Call("ioctl", "the size of its terminal", (Is(1, ("TIOCGWINSZ",)),)),
    *allow("the end of a file that it writes to", "fdatasync"),
)
_PAGER = (
    Call(
        "ioctl",
        "pages for those who wait, and letting go of memory that is filled",
        (Is(1, ("UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_WAKE", "UFFDIO_UNREGISTER")),),
    ),
    *allow("memory that it fills without faults", "fallocate", "ftruncate"),
)
KVM = (
    "KVM_RUN", "KVM_IRQ_LINE", "KVM_IOEVENTFD", "KVM_IRQFD", "KVM_KVMCLOCK_CTRL", "KVM_CHECK_EXTENSION",
    "KVM_SET_USER_MEMORY_REGION", "KVM_GET_DIRTY_LOG", "KVM_CREATE_VCPU", "KVM_GET_VCPU_MMAP_SIZE",
    "KVM_GET_SUPPORTED_CPUID", "KVM_GET_MSR_INDEX_LIST", "KVM_GET_CLOCK", "KVM_SET_CLOCK", "KVM_GET_DEBUGREGS",
    "KVM_SET_DEBUGREGS", "KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP", "KVM_GET_LAPIC", "KVM_SET_LAPIC", "KVM_GET_MP_STATE",
    "KVM_SET_MP_STATE", "KVM_GET_MSRS", "KVM_SET_MSRS", "KVM_GET_PIT2", "KVM_SET_PIT2", "KVM_GET_REGS",
    "KVM_SET_REGS", "KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_GET_TSC_KHZ", "KVM_SET_TSC_KHZ", "KVM_GET_VCPU_EVENTS",
    "KVM_SET_VCPU_EVENTS", "KVM_GET_XCRS", "KVM_SET_XCRS", "KVM_GET_XSAVE", "KVM_GET_XSAVE2", "KVM_SET_XSAVE",
    "KVM_SET_CPUID2",
)
_CORE = (
    Call("ioctl", "the VM and its processors; no new VM, and no device of KVM's", (Is(1, KVM),)),
    *allow("QMP, and sidecars that take others' places", *(call.name for call in _LISTENING)),
    *allow("a snapshot's files: holes, length, and that they are on the disk", "fallocate", "ftruncate", "fsync"),
    *allow("a snapshot's files", "fdatasync"),
)

ROLES: dict[str, tuple[Call, ...]] = {
    "blk": (*EVERYBODY, *_CONTROL, *_BLK),
    "net": (*EVERYBODY, *_CONTROL, *_NET),
    "net-link": (*EVERYBODY, *_NET, *_LINK),
    "serial": (*EVERYBODY, *_CONTROL, *_SERIAL),
    "kit": (*EVERYBODY, *_CONTROL),
    "pager": (*EVERYBODY, *_CONTROL, *_PAGER),
    "core": (*EVERYBODY, *_CORE),
}
