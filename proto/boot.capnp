@0xb86d2ff4b0b7e1a3;
# What the supervisor sends a process that it has just started, with file descriptors beside it, and what
# the two say to each other afterwards, all over one SOCK_SEQPACKET socket pair (proto/boot.py).

struct MemoryRegion {
  gpa @0 :UInt64;           # guest physical address, page-aligned
  size @1 :UInt64;          # bytes, page-aligned
  offset @2 :UInt64;        # where it starts in the memfd
}

struct Boot {
  protocolVersion @0 :UInt16;
  vmName @1 :Text;
  controlSocket @2 :Text;   # path of the core's ZeroMQ socket
  regions @3 :List(MemoryRegion);
  logLevel @4 :Text;        # a name of Python's logging
  fdLabels @5 :List(Text);
  # Names of the descriptors that follow, in order. The names are listed in docs/internals.md.
  role :union {
    core @6 :CoreBoot;
    blk @7 :BlkBoot;
    net @8 :NetBoot;
    serial @9 :SerialBoot;
  }
}

struct CoreBoot {
  uuid @0 :Text;
  cpus @1 :UInt16;
  cmdline @2 :Text;
  devices @3 :List(Slot);
  uart @4 :Text;            # device id of the sidecar behind the 16550; empty: no 16550
  paused @5 :Bool;          # start with the vCPUs stopped
  kernelPath @6 :Text;      # for messages only; the image is the descriptor "kernel"
  initrdPath @7 :Text;
  onReboot @8 :Text;        # "reset" or "exit"
}

struct Slot {
  deviceId @0 :Text;
  kind @1 :Text;            # blk, net or serial
  index @2 :UInt16;         # virtio-mmio slot; 0xffff: none, it is the sidecar behind the 16550
  queues @3 :UInt16;        # how many queues have kick descriptors
  pid @4 :UInt32;           # of its sidecar
  info @5 :Text;            # JSON: what query-block, query-chardev and the like answer about the backend
}

struct BlkBoot {
  deviceId @0 :Text;
  path @1 :Text;            # for messages only
  readonly @2 :Bool;
  direct @3 :Bool;          # the descriptors were opened with O_DIRECT
  overlay @4 :Bool;         # "disk" is the read-only base, "overlay" the copy-on-write layer
  serial @5 :Text;          # GET_ID, at most 20 bytes
  queues @6 :UInt16;
  discard @7 :Bool;
  ioEngine @8 :Text;        # auto, io_uring or sync
}

struct NetBoot {
  deviceId @0 :Text;
  mac @1 :Data;             # 6 bytes
  queuePairs @2 :UInt16;
  backend @3 :Text;         # tap, passt or link
  mtu @4 :UInt16;           # 0: not offered
}

struct SerialBoot {
  deviceId @0 :Text;
  flavour @1 :Text;         # uart or virtio
  backend @2 :Text;         # none, pty, socket or file
  scrollback @3 :UInt32;    # bytes kept for a console that attaches late
}

struct Life {
  # After the Boot, over the same socket; either side may be gone at any time.
  union {
    ready @0 :Void;             # child: everything is open and mapped, the sandbox is closed
    failed @1 :Text;            # child: why it cannot start; it exits with status 1 after this
    running @2 :Void;           # core: the sidecars said hello, the vCPUs may run
    ended @3 :Ended;            # core: the VM is over
    sidecarDied @4 :SidecarDied;  # to the core
    shutdown @5 :Void;          # to the core: end the VM at once, flush the disks
    killSidecar @6 :Text;       # core: this device's sidecar is silent past a deadline; kill it
  }
}

struct Ended {
  status @0 :UInt8;         # exit status for vmmctl: 0 after a poweroff or quit
  reason @1 :Text;          # guest-shutdown, guest-reset, host-qmp-quit, internal-error, ...
  detail @2 :Text;          # for a person: registers, KVM's words
}

struct SidecarDied {
  deviceId @0 :Text;
  reason @1 :Text;
}
