"""The options that `vmmctl run` knows. Their keys are in tables.py."""

from __future__ import annotations

from dataclasses import dataclass

from motorcade.orchestrator.cmdline.grammar import Check, flag, noted, only, refused, text
from motorcade.orchestrator.cmdline.tables import (
    ACCEL,
    ACTION,
    BLOCKDEV,
    CPU,
    DRIVE,
    MACHINE,
    MEMORY,
    MON,
    NAME,
    NO_ACPI,
    OVERCOMMIT,
    RTC,
    SANDBOX,
    SANDBOXED,
    SMP,
    Table,
)


@dataclass(frozen=True)
class Spec:
    """An option: whether it has an argument, and what that may be."""

    argument: bool = True
    table: Table | None = None  # its keys
    implied: str = ""  # the first key's name where it has none
    check: Check = text  # of an argument without keys
    repeats: bool = False


_FLAG = Spec(argument=False)
_NO_FIRMWARE = "there is no firmware: the kernel of -kernel is booted"
_USE_DRIVE = "a disk is -drive file=IMAGE,id=D -device virtio-blk-device,drive=D"
_NO_GRAPHICS = "there are no graphics"


def _none(why: str) -> Spec:
    return Spec(check=only("none", why=why), repeats=True)


def _not(why: str) -> Spec:
    return Spec(check=refused(why), repeats=True)


OPTIONS: dict[str, Spec] = {
    "machine": Spec(table=MACHINE, implied="type", repeats=True),
    "cpu": Spec(table=CPU, implied="model"),
    "smp": Spec(table=SMP, implied="cpus"),
    "m": Spec(table=MEMORY, implied="size"),
    "accel": Spec(table=ACCEL, implied="accel"),
    "enable-kvm": _FLAG,
    "kernel": Spec(),
    "append": Spec(check=str),
    "initrd": Spec(),
    "drive": Spec(table=DRIVE, repeats=True),
    "blockdev": Spec(table=BLOCKDEV, implied="driver", repeats=True),
    "device": Spec(repeats=True),
    "netdev": Spec(repeats=True),
    "nic": Spec(repeats=True),
    "net": _none("a NIC is -netdev tap,id=N,ifname=IF -device virtio-net-device,netdev=N"),
    "chardev": Spec(repeats=True),
    "object": Spec(repeats=True),
    "serial": Spec(repeats=True),
    "qmp": Spec(repeats=True),
    "mon": Spec(table=MON, implied="chardev", repeats=True),
    "monitor": _none("there is no human monitor; -qmp, or QMP's human-monitor-command"),
    "incoming": Spec(),
    "S": _FLAG,
    "daemonize": _FLAG,
    "pidfile": Spec(),
    "D": Spec(),
    "name": Spec(table=NAME, implied="guest"),
    "uuid": Spec(),
    "no-reboot": _FLAG,
    "no-shutdown": _FLAG,
    "action": Spec(table=ACTION, repeats=True),
    "mem-path": Spec(),
    "mem-prealloc": _FLAG,
    "global": Spec(repeats=True),
    "rtc": Spec(table=RTC),
    "sandbox": Spec(table=SANDBOX, implied="enable"),
    "overcommit": Spec(table=OVERCOMMIT),
    "nographic": _FLAG,
    "nodefaults": _FLAG,
    # What is so anyway.
    "no-user-config": _FLAG,
    "nodefconfig": _FLAG,
    "no-hpet": _FLAG,
    "disable-seccomp": Spec(argument=False, check=noted(flag, SANDBOXED)),
    "msg": Spec(table={"timestamp": flag, "guest-name": flag}),
    "display": _none(_NO_GRAPHICS),
    "vga": _none(_NO_GRAPHICS),
    "parallel": _none("there is no parallel port"),
    # What is not to be had.
    "no-acpi": Spec(argument=False, check=noted(flag, NO_ACPI)),
    "snapshot": Spec(argument=False, check=refused("an overlay is what that is here (--print-yaml, overlay: PATH)")),
    "usb": Spec(argument=False, check=refused("there is no USB")),
    "s": Spec(argument=False, check=refused("there is no gdb stub")),
    "gdb": _not("there is no gdb stub"),
    "numa": _not("the guest has one node"),
    "bios": _not(_NO_FIRMWARE),
    "L": _not(_NO_FIRMWARE),
    "boot": _not(_NO_FIRMWARE),
    "smbios": _not(_NO_FIRMWARE),
    "fw_cfg": _not(_NO_FIRMWARE),
    "acpitable": _not("the ACPI tables are the machine's own"),
    "dtb": _not("x86 has no device tree"),
    **{
        name: _not(_USE_DRIVE)
        for name in ("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "pflash", "sd", "mtdblock")
    },
    "vnc": _not(_NO_GRAPHICS),
    "spice": _not(_NO_GRAPHICS),
    "audiodev": _not("there is no sound"),
    "usbdevice": _not("there is no USB"),
    "virtfs": _not("there are no shared folders"),
    "fsdev": _not("there are no shared folders"),
    "tpmdev": _not("there is no TPM"),
    "watchdog-action": _not("there is no watchdog device"),
    "icount": _not("guests run on KVM"),
    "trace": _not("traces are QMP's trace-set-state and the guest's own"),
    "d": _not("log_level in machine.yaml says how much is logged"),
    "loadvm": _not("a machine goes on from -incoming"),
    "readconfig": _not("machine.yaml is that here (vmmctl run --print-yaml)"),
    "set": _not("say it where the thing is made"),
    "runas": _not("start vmmctl as that user"),
    "run-with": _not("start vmmctl as that user"),
    "chroot": _not("each process is sandboxed by itself"),
    "qmp-pretty": _not("QMP answers are one line each; -qmp"),
    "plugin": _not("guests run on KVM"),
}
ALIASES = {"M": "machine", "nouserconfig": "no-user-config"}
