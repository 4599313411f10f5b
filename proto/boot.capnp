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
    pager @10 :PagerBoot;
    kit @13 :KitBoot;
  }
  incoming @11 :Bool;       # a sidecar starts quiesced; the core takes the machine's state from the descriptor "state"
  standby @14 :Bool;
  # A sidecar that is to take the place of another which still serves: it says ready, touches nothing, and says hello to the
  # core when the supervisor says `go`.
  lazy @12 :Bool;
  # Guest memory is filled on demand: register this process's mapping with userfaultfd (from the descriptor
  # "userfaultfd", where there is one) before anything touches it, and say lazyReady instead of ready.
}

struct PagerBoot {
  size @0 :UInt64;          # bytes of guest memory
  eager @1 :Bool;           # no userfaultfd here: copy everything before ready
  parents @2 :UInt16;       # how many templates this one builds on: descriptors "template.1" and up
  start @3 :UInt64;         # where memory begins in "template.0", bytes
}

struct Mapping {
  address @0 :UInt64;       # in the process that registered it
  size @1 :UInt64;
  offset @2 :UInt64;        # in the memfd
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
  generationId @9 :Data;    # 16 bytes: give the restored guest this VM generation ID; empty: keep the template's
  defer @10 :Bool;          # incoming, but which template is said later, by migrate-incoming
  onPoweroff @11 :Text;     # "end" or "pause"
  onCrash @12 :Text;        # "end" or "pause"
}

struct Slot {
  deviceId @0 :Text;
  kind @1 :Text;            # blk, net, serial, or a kind of the kit's
  index @2 :UInt16;         # virtio-mmio slot; 0xffff: none, it is the sidecar behind the 16550
  queues @3 :UInt16;        # how many queues have kick descriptors
  pid @4 :UInt32;           # of its sidecar
  info @5 :Text;            # JSON: what query-block, query-chardev and the like answer about the backend
  debug @6 :Bool;           # somebody may be at a prompt in its sidecar: it answers when it likes
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
  layers @9 :UInt16;
  # How many read-only overlays, descriptors "layer.0" (the lowest) and up, lie between "disk" and "overlay".
  removed @10 :Bool;
  # The device was taken away, and the guest's driver is still bound: a disk of size 0, "disk" is empty.
}

struct NetBoot {
  deviceId @0 :Text;
  mac @1 :Data;             # 6 bytes
  queuePairs @2 :UInt16;
  backend @3 :Text;         # tap, passt, link, or none: a NIC without a link
  mtu @4 :UInt16;           # 0: not offered
}

struct SerialBoot {
  deviceId @0 :Text;
  flavour @1 :Text;         # uart or virtio
  backend @2 :Text;         # none, pty, socket or file
  scrollback @3 :UInt32;    # bytes kept for a console that attaches late
}

struct KitBoot {
  # Of a kind that is written with sidecars/sdk.
  deviceId @0 :Text;
  kind @1 :Text;            # rng, or what an installed package offers
  options @2 :Text;         # JSON: the device's keys in machine.yaml but id and kind
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

    lazyReady @7 :LazyReady;    # child, with its userfaultfd: as ready
    serve @8 :Serve;            # to the pager, with a userfaultfd: fill this process's mapping
    workingSet @9 :Data;        # pager: the chunks (UInt32, little-endian) that were asked for first, in order
    damaged @10 :Text;          # pager: the template cannot be read or its bytes are wrong; the VM cannot go on

    # A snapshot is written by the core to files that the supervisor opens, names and removes.
    openTarget @11 :OpenTarget; # core
    target @12 :Target;         # to the core, with descriptors: "memory", "state" and, with a base, its "base.N"
    copyDisks @13 :Void;        # core: every disk is quiet; copy what the template needs of them
    disksCopied @14 :DisksCopied;  # to the core
    closeTarget @15 :CloseTarget;  # core: all is written and fsynced, or none of it counts
    targetClosed @16 :TargetClosed;  # to the core: it has its name now, or why not

    openIncoming @17 :OpenIncoming;  # core, with a descriptor where the URI is fd:NAME
    incoming @18 :Incoming;     # to the core, with "state"; the pager fills memory from now on

    sidecarReplaced @19 :SidecarReplaced;  # to the core: another process is in its place, and will say hello

    reopen @20 :Void;           # a sidecar of the kit: open again what its kind's open_at() opens
    reopened @21 :Reopened;     # to that sidecar, with descriptors
    silent @22 :Text;           # core: this device's sidecar gives no sign of life; kill it, unless a debugger holds it
    # Devices that come and go while the machine is there (proto/hotplug.py).
    hotplug @23 :Hotplug;       # core, with a tap's descriptors for a network backend that is given by them
    hotplugged @24 :Hotplugged; # to the core, with the descriptors of the slot that `plug` asked for
    restartSidecar @25 :RestartSidecar;  # core: replace this device's sidecar, in good order
    sidecarReady @26 :SidecarReady;  # to the core: its successor stands by; bring the present one to rest. Or why there is none
    handOver @27 :HandOver;         # core: the present one is at rest, and may be ended; or it goes on
    go @28 :Void;                   # to a sidecar that stands by
    ending @29 :Void;               # core: the VM ends; sidecars that end from here on are not missed
  }
}

struct Reopened {
  error @0 :Text;           # empty: opened
  labels @1 :List(Text);    # of the descriptors, in order
}

struct LazyReady {
  mappings @0 :List(Mapping);
}

struct Serve {
  process @0 :Text;         # its role, for messages
  mappings @1 :List(Mapping);
}

struct OpenTarget {
  uri @0 :Text;             # file:DIR, exec:COMMAND, fd:NAME
  base @1 :Text;            # DIR of the template to differ from; empty: none
  what @2 :Text;
  # "template"; "state" (x-ignore-shared: no RAM); "devices" (save-devices-state); "dump" (an ELF core file); "save" (one
  # file, into which the supervisor puts RAM when it is asked to copyDisks)
}

struct Target {
  error @0 :Text;           # empty: opened
  labels @1 :List(Text);    # of the descriptors, in order
  description @2 :Text;     # JSON: the machine, for the template's state
}

struct DisksCopied {
  error @0 :Text;
  disks @1 :Text;           # JSON: orchestrator/templates.py
}

struct CloseTarget {
  keep @0 :Bool;
}

struct TargetClosed {
  error @0 :Text;
}

struct OpenIncoming {
  uri @0 :Text;             # file:DIR, file:STATE, exec:COMMAND, fd:NAME
  what @1 :Text;            # "machine" (migrate-incoming), "devices" (load-devices-state: no memory is looked for)
}

struct Incoming {
  error @0 :Text;
}

struct Hotplug {
  request @0 :Text;         # JSON
}

struct Hotplugged {
  error @0 :Text;           # empty: done
  answer @1 :Text;          # JSON
  labels @2 :List(Text);    # of the descriptors, in order
}

struct Ended {
  status @0 :UInt8;         # exit status for vmmctl: 0 after a poweroff or quit
  reason @1 :Text;          # guest-shutdown, guest-reset, host-qmp-quit, internal-error, ...
  detail @2 :Text;          # for a person: registers, KVM's words
}

struct RestartSidecar {
  deviceId @0 :Text;
  upgrade @1 :Bool;         # run the code on disk, instead of what the supervisor has loaded
  path @2 :Text;            # with upgrade: a directory that modules are looked for in first; empty: none
}

struct SidecarReady {
  deviceId @0 :Text;
  error @1 :Text;           # not empty: the successor did not start, and everything is as it was
}

struct HandOver {
  deviceId @0 :Text;
  cancel @1 :Bool;
}

struct SidecarReplaced {
  deviceId @0 :Text;
  pid @1 :UInt32;
}

struct SidecarDied {
  deviceId @0 :Text;
  reason @1 :Text;
  replaced @2 :Bool;        # another process will take its place: sidecarReplaced, or sidecarDied once more, follows
}
