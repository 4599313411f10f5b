"""The keys that the options of `vmmctl run` have: QEMU's (qemu(1)) as far as they make sense for a microvm, and
StratoVirt's (its configuration guidebook). What they come to is in translate.py and devices.py.

Some ask for what is so anyway, and are accepted for it. Some are accepted with a word about what is different. Whatever
would need something that is not there is refused, and so is what nobody has heard of.
"""

from __future__ import annotations

from collections.abc import Mapping

from motorcade.orchestrator.cmdline.grammar import (
    Check,
    Note,
    Wrong,
    choice,
    flag,
    is_off,
    is_on,
    noted,
    number,
    only,
    refused,
    size,
    text,
)

Table = Mapping[str, Check]

NO_PCI = "there is no PCI, a microvm has virtio-mmio: "
SANDBOXED = "the processes are always sandboxed"
NO_ACPI = "ACPI tables are there; acpi=off in -append has the guest not look"
NO_WAIT = "nothing waits for a client here; say nowait (or wait=off)"
OWN_PROCESS = "every device has a process of its own; iothreads change nothing"


_MACHINES: dict[str, object] = {"microvm": "microvm"} | {
    name: Wrong(f"{name}: the only machine is microvm")
    for name in ("pc", "q35", "virt", "none", "isapc", "StandardVm", "standard_vm")
}
_ACCELS: dict[str, object] = {"kvm": "kvm", "kvm:tcg": "auto"} | {
    name: Wrong(f"{name}: guests run on KVM; where the host's cannot, vmmctl run --accel box")
    for name in ("tcg", "xen")
}

MACHINE: Table = {
    "type": choice(_MACHINES),
    "accel": choice(_ACCELS),
    "memory-backend": text,
    "kernel-irqchip": only("on", "true", why="the interrupt controllers are the kernel's"),
    "isa-serial": flag,
    "acpi": noted(flag, NO_ACPI, when=False),
    "rtc": noted(choice({"on": True, "auto": True, "off": False}), "the RTC is there, and harmless", when=False),
    "pit": noted(choice({"on": True, "auto": True, "off": False}), "the PIT is there, and harmless", when=False),
    "pic": noted(choice({"on": True, "auto": True, "off": False}), "the PIC is there, and harmless", when=False),
    "auto-kernel-cmdline": flag,  # ACPI has it all, as in QEMU where that is on
    "x-option-roms": flag,  # there is no firmware that would look for one
    "pcie": is_off(f"{NO_PCI}pcie=off"),
    "usb": is_off("there is no USB"),
    "graphics": is_off("there are no graphics"),
    "vmport": is_off("there is no vmport"),
    "hpet": is_off("there is no HPET"),
    "smm": is_off("there is no firmware that would use SMM"),
    "nvdimm": is_off("there are no NVDIMMs"),
    "mem-merge": noted(flag, "shared memory is not merged", when=True),
    "mem-share": flag,  # it is shared with this VM's own processes, and nobody else
    "dump-guest-core": noted(flag, "processes write no core files", when=True),
}
_TOPOLOGY = noted(number(1), "the guest is not told about the topology")
SMP: Table = {
    "cpus": number(1, 255),
    "maxcpus": number(1, 255),
    **dict.fromkeys(("sockets", "dies", "clusters", "cores", "threads"), _TOPOLOGY),
}
CPU: Table = {
    "model": choice({"host": "host", "max": "host"}),
    "pmu": is_off("the guest has no PMU"),
    "migratable": flag,  # what is restored is checked for what the CPU can do
}
MEMORY: Table = {
    "size": size("m"),
    "slots": only("0", why="memory cannot be plugged in later"),
    "maxmem": refused("memory cannot be plugged in later"),
}
ACCEL: Table = {
    "accel": choice(_ACCELS),
    "kernel-irqchip": MACHINE["kernel-irqchip"],
}
NAME: Table = {
    "guest": text,
    "process": noted(text, "the processes are called motorcade: ROLE (NAME)"),
    "debug-threads": flag,  # threads and processes have names
}
RTC: Table = {
    "base": only("utc", why="the guest's clock starts at the host's UTC"),
    "clock": only("host", why="the guest's clock is the host's"),
    "driftfix": only("none", why="there are no lost ticks of an RTC to make up for"),
}
SANDBOX: Table = {
    "enable": noted(flag, SANDBOXED, when=False),
    **{
        key: choice({"deny": "deny", "allow": "allow", "on": "on", "off": "off", "children": "children"})
        for key in ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
    },
}
OVERCOMMIT: Table = {
    "mem-lock": is_off("guest memory is not locked"),
    "cpu-pm": is_off("the guest cannot put host CPUs to sleep"),
}
ACTION: Table = {
    "reboot": choice({"reset": "reset", "shutdown": "exit"}),
    "shutdown": choice({"poweroff": "end", "pause": "pause"}),
    "panic": only("none", "shutdown", "exit-failure", why="there is no pvpanic device"),
    "watchdog": only("none", "reset", why="there is no watchdog device"),
}
MON: Table = {
    "chardev": text,
    "mode": only("control", why="there is no human monitor; mode=control is QMP"),
    "pretty": is_off("QMP answers are one line each"),
}

DRIVE: Table = {
    "file": text,
    "id": text,
    "if": choice(
        {"none": "none", "virtio": "virtio"}
        | {
            name: Wrong(f"{name}: there is no such bus; if=none, and a virtio-blk-device")
            for name in ("ide", "scsi", "sd", "mtd", "floppy", "pflash", "xen")
        }
    ),
    "format": only("raw", why="images are raw (qemu-img convert -O raw); an overlay may lie over one (vmmctl up)"),
    "media": only("disk", why="there are only disks"),
    "index": number(),  # of if=virtio alone
    "readonly": flag,
    "read-only": flag,
    "direct": flag,
    "cache.direct": flag,
    "cache": choice(
        {
            "none": True,
            "writeback": False,
            "unsafe": Note(False, "the guest's flushes are done all the same"),
            "writethrough": Wrong("writes are cached until the guest flushes; cache=writeback or none"),
            "directsync": Wrong("writes are cached until the guest flushes; cache=none"),
        }
    ),
    "cache.no-flush": is_off("the guest's flushes are done"),
    "aio": choice({"threads": "sync", "off": "sync", "native": "auto", "io_uring": "io_uring"}),
    "discard": choice({"unmap": True, "on": True, "ignore": False, "off": False}),
    "detect-zeroes": only("off", why="zeroes are written as they come"),
    "serial": text,
    "snapshot": is_off("an overlay is what that is here (vmmctl run --print-yaml, then overlay: PATH)"),
    "werror": only("report", "enospc", why="errors are reported to the guest"),
    "rerror": only("report", why="errors are reported to the guest"),
    "throttling.iops-total": only("0", why="there is no limit of I/O"),
}
_FILE: Table = {
    "driver": choice({"raw": "raw", "file": "file", "host_device": "file"}
                     | {name: Wrong(f"{name}: images are raw") for name in ("qcow2", "vmdk", "vdi", "vhdx", "qed")}),
    "node-name": text,
    "filename": text,
    "file": text,
    "file.driver": choice({"file": "file", "host_device": "file"}),
    "file.filename": text,
    "file.aio": DRIVE["aio"],
    "file.locking": choice({"auto": True, "on": True, "off": Wrong("images are always locked")}),
    "locking": choice({"auto": True, "on": True, "off": Wrong("images are always locked")}),
    "read-only": flag,
    "auto-read-only": flag,
    "cache.direct": flag,
    "file.cache.direct": flag,
    "cache.no-flush": is_off("the guest's flushes are done"),
    "aio": DRIVE["aio"],
    "discard": DRIVE["discard"],
    "file.discard": DRIVE["discard"],
    "detect-zeroes": DRIVE["detect-zeroes"],
}  # fmt: skip
BLOCKDEV = _FILE

_TAP: Table = {
    "id": text,
    "ifname": text,
    "queues": number(1, 8),
    "script": only("no", "", why="no script is run; make the interface before (ip tuntap add ...), and say script=no"),
    "downscript": only("no", "", why="no script is run; say downscript=no"),
    "vhost": noted(flag, "a process of its own moves the packets, and not vhost-net", when=True),
    "fd": refused("an interface is named by ifname="),
    "fds": refused("an interface is named by ifname="),
    "vhostfd": refused("a process of its own moves the packets, and not vhost-net"),
    "vhostfds": refused("a process of its own moves the packets, and not vhost-net"),
}
_USER: Table = {
    "id": text,
    "hostfwd": text,
    "ipv6": flag,
    "ipv4": is_on("passt gives both"),
    "restrict": is_off("passt does not restrict the guest"),
}
NETDEVS: dict[str, Table | str] = {
    "tap": _TAP,
    "user": _USER,
    "passt": {"id": text},
    **{
        kind: f"{kind}: there are tap and user; two VMs are wired together by a link in machine.yaml"
        for kind in (
            "socket",
            "stream",
            "dgram",
            "bridge",
            "l2tpv3",
            "vde",
            "netmap",
            "vhost-user",
            "vhost-vdpa",
            "hubport",
        )
    },
}
NIC: Table = {
    "model": only("virtio-net-device", "virtio", "virtio-net", why="the only NIC is virtio-net-device"),
    "mac": text,
}

_SOCKET: Table = {
    "id": text,
    "path": text,
    "host": text,
    "port": number(0, 65535),
    "server": flag,
    "wait": is_off(NO_WAIT),
    "reconnect": number(0, 86400),  # of a vhost-user backend; one that listens has nothing to do with it
    "telnet": is_off("plain bytes only"),
    "ipv4": flag,
    "ipv6": flag,
    "mux": is_off("one user a chardev"),
}
CHARDEVS: dict[str, Table | str] = {
    "socket": _SOCKET,
    "stdio": {"id": text, "signal": noted(is_off("Ctrl-C goes to the guest"), "Ctrl-C goes to the guest", when=True),
              "mux": is_off("there is no human monitor to share it with")},
    "pty": {"id": text, "path": refused("vmmctl status shows the pty, and RUN_DIR/pty-ID is a link to it")},
    "file": {"id": text, "path": text, "append": noted(flag, "output is appended", when=False)},
    "null": {"id": text},
    **{kind: f"{kind}: there are stdio, pty, socket, file and null" for kind in
       ("udp", "pipe", "vc", "ringbuf", "msmouse", "braille", "serial", "parallel", "tty", "spicevmc", "dbus", "hub",
        "testdev", "console")},
}  # fmt: skip

_MMIO_KEYS: Table = {"id": text, "iothread": noted(text, OWN_PROCESS)}
BLK: Table = {
    **_MMIO_KEYS,
    "drive": text,
    "serial": text,
    "num-queues": number(1, 16),
    "discard": flag,
    "write-zeroes": flag,
    "share-rw": is_off("an image that is written to belongs to one VM"),
    "bootindex": number(),  # the kernel is booted directly, here as in QEMU's -kernel
    "config-wce": is_off("the write cache cannot be switched"),
    "write-cache": only("on", "auto", why="writes are cached until the guest flushes"),
}
NET: Table = {
    **_MMIO_KEYS,
    "netdev": text,
    "mac": text,
    "mq": flag,
    "host_mtu": number(68, 65535),
    "bootindex": number(),
    "vhost": _TAP["vhost"],
}
RNG: Table = {
    **_MMIO_KEYS,
    "rng": text,
    "max-bytes": number(1),
    "period": number(1, 0xFFFFFFFF),
}
BALLOON: Table = {
    **_MMIO_KEYS,
    "deflate-on-oom": flag,
    "free-page-reporting": flag,
    "free-page-hint": is_off("it is for migration to another host"),
}
VHOST_USER_FS: Table = {
    "id": text,
    "chardev": text,
    "tag": text,
    "num-request-queues": number(1, 15),
    "queue-size": number(2, 1024),
}
VHOST_USER_BLK: Table = {
    "id": text,
    "chardev": text,
    "num-queues": number(1, 16),
    "queue-size": number(2, 1024),
    "bootindex": number(),
    "config-wce": flag,  # the backend's to offer
}
SERIAL_BUS: Table = {"id": text, "max_ports": number(1, 31)}
VIRTCONSOLE: Table = {"id": text, "chardev": text, "bus": text, "nr": number(0, 30),
                      "name": noted(text, "ports have no names: the n-th console is hvcN")}  # fmt: skip

_NOT_HERE = {
    "virtserialport": "there are consoles only: virtconsole",
    "vhost-vsock-device": "there is no vsock",
    "virtio-9p-device": "there are no shared folders",
    "virtio-scsi-device": "disks are virtio-blk-device",
    "scsi-hd": "disks are virtio-blk-device",
    "virtio-gpu-device": "there are no graphics",
    "virtio-keyboard-device": "there are no graphics",
    "virtio-mem-device": "memory cannot be plugged in later",
    "isa-serial": "the serial port is -serial",
    "isa-debug-exit": "a guest ends its VM by powering off, or by -no-reboot and a reboot",
    "pvpanic": "there is no pvpanic device",
    "i6300esb": "there is no watchdog device",
    "vfio-pci": f"{NO_PCI}no host device can be passed through",
    "pcie-root-port": f"{NO_PCI}there are no root ports",
    "nec-usb-xhci": "there is no USB",
    "qemu-xhci": "there is no USB",
}
_PLAIN = {
    "virtio-blk-device": BLK,
    "virtio-net-device": NET,
    "virtio-rng-device": RNG,
    "virtio-balloon-device": BALLOON,
    "virtio-serial-device": SERIAL_BUS,
    "virtconsole": VIRTCONSOLE,
    "vhost-user-fs-device": VHOST_USER_FS,
    "vhost-user-blk-device": VHOST_USER_BLK,
}
DEVICES: dict[str, Table | str] = {
    **_PLAIN,
    **_NOT_HERE,
    **{
        name.replace("-device", suffix): f"{NO_PCI}{name}"
        for name in [*_PLAIN, "vhost-vsock-device"]
        if name.endswith("-device")
        for suffix in ("-pci", "-ccw", "-pci-non-transitional", "")
    },
}
"""By driver: its keys, or why it is not to be had."""

_RAM: Table = {
    "id": text,
    "size": size("b"),
    "share": flag,
    "prealloc": flag,
    "merge": is_off("shared memory is not merged"),
    "dump": flag,
    "policy": only("default", why="memory is the host's to place (numactl vmmctl run ...)"),
    "host-nodes": refused("memory is the host's to place (numactl vmmctl run ...)"),
}
OBJECTS: dict[str, Table | str] = {
    "rng-random": {
        "id": text,
        "filename": only("/dev/urandom", "/dev/random", why="the host's kernel gives random numbers: /dev/urandom"),
    },
    "rng-builtin": {"id": text},
    "memory-backend-ram": _RAM,
    "memory-backend-memfd": {**_RAM, "hugetlb": is_off("a file on hugetlbfs does it: memory-backend-file")},
    "memory-backend-file": {**_RAM, "mem-path": text, "readonly": is_off("the guest writes to its memory"),
                            "discard-data": is_off("the file stays")},
    "iothread": {"id": text},
    "rng-egd": "rng-egd: random numbers come from the host's kernel: rng-random",
    **{kind: f"{kind}: there is nothing here that would use it" for kind in
       ("secret", "tls-creds-x509", "cryptodev-backend", "filter-dump", "throttle-group", "authz-simple", "can-bus",
        "sev-guest", "tdx-guest", "thread-context", "memory-backend-epc")},
}  # fmt: skip
