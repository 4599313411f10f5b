"""What machine.yaml has in its lists, of -device and the backends.

A backend and its device are two options here and one entry there. The entry has the device's id, which is what QMP
knows it by, or else the backend's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from motorcade.orchestrator.cmdline.backends import Backend, Backends
from motorcade.orchestrator.cmdline.grammar import Option, Problems, unknown

Path = tuple[str | int, ...]

_FORWARD = re.compile(r"(?:(tcp|udp):)?([0-9.]*|\[[0-9a-fA-F:]+\])?:([0-9]+)-([^:]*):([0-9]+)")
_VHOST_USER = {"vhost-user-fs-device": "fs", "vhost-user-blk-device": "blk"}
_VHOST_USER_KEYS = {"tag": "tag", "num-request-queues": "queues", "num-queues": "queues", "queue-size": "queue_size"}
TERMINAL = "terminal"


@dataclass
class Made:
    """The lists of machine.yaml, and which option is to blame for what in them."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)
    attached: bool = False


class Devices(Backends):
    """``finish`` puts them together."""

    def __init__(self, problems: Problems) -> None:
        super().__init__(problems)
        self.made = Made()
        self._ids: dict[str, str] = {}  # of devices, and who has each

    def finish(self, *, nographic: bool, nodefaults: bool) -> Made:
        """The lists. All options have been seen."""
        self._finish_serial(nographic=nographic, nodefaults=nodefaults)
        for option, _, keys in self.devices:
            if "id" in keys:
                self._claim(str(keys["id"]), option)
        buses: list[str] = []
        for option, driver, keys in self.devices:
            if driver == "virtio-blk-device":
                self._finish_blk(option, keys)
            elif driver == "virtio-net-device":
                self._finish_net(option, keys)
            elif driver == "virtio-rng-device":
                self._finish_rng(option, keys)
            elif driver == "virtio-balloon-device":
                self._finish_balloon(option, keys)
            elif driver == "virtio-serial-device":
                buses.append(str(keys.get("id", f"virtio-serial{len(buses)}")))
            elif driver == "virtconsole":
                self._finish_console(option, keys, buses)
            elif driver in _VHOST_USER:
                self._finish_vhost_user(option, _VHOST_USER[driver], keys)
        for option, name in self.monitors:
            chardev = self.use(option, "chardev", name, self.chardevs)
            if chardev is not None:
                self._add_qmp(option, chardev)
        for option, backend in self.qmp:
            self._add_qmp(option, backend)
        self._tell_unused()
        return self.made

    def _finish_blk(self, option: Option, keys: dict[str, Any]) -> None:
        drive = self.use_key(option, "drive", keys, self.drives)
        if drive is None:
            return
        said = drive.keys
        disk: dict[str, Any] = {"id": self._id(keys, said["id"], option), "path": said["file"]}
        if said.get("readonly", said.get("read-only")):
            disk["readonly"] = True
        direct = said.get("direct", said.get("cache.direct", said.get("cache")))
        if direct:
            disk["direct"] = True
        if (serial := keys.get("serial", said.get("serial"))) is not None:
            disk["serial"] = serial
        if "num-queues" in keys:
            disk["queues"] = keys["num-queues"]
        if keys.get("discard", said.get("discard")) is False or keys.get("write-zeroes") is False:
            disk["discard"] = False
        if said.get("aio", "auto") != "auto":
            disk["engine"] = said["aio"]
        at = self._append("disks", disk, option)
        self.made.places[*at, "path"] = str(drive.option)

    def _finish_net(self, option: Option, keys: dict[str, Any]) -> None:
        net: dict[str, Any]
        if "netdev" not in keys:
            net = {"id": self._id(keys, "net", option), "unplugged": True}
            netdev = None
        else:
            netdev = self.use_key(option, "netdev", keys, self.netdevs)
            if netdev is None:
                return
            net = {"id": self._id(keys, netdev.keys["id"], option)}
            if netdev.kind == "tap":
                if "ifname" not in netdev.keys:
                    self.problems.add(
                        netdev.option, "ifname= is missing: a tap that is there (ip tuntap add NAME mode tap)"
                    )
                    return
                net["tap"] = netdev.keys["ifname"]
                if "queues" in netdev.keys:
                    net["queues"] = netdev.keys["queues"]
            else:
                net["user"] = True
                if rules := self._forwards(netdev):
                    net["forward"] = rules
        if keys.get("mq") and net.get("queues", 1) == 1:
            self.problems.note(option, "mq=on changes nothing without queues= in the netdev")
        if keys.get("mq") is False and net.get("queues", 1) > 1:
            self.problems.add(option, "mq=off, but its netdev has several queues")
        if "mac" in keys:
            net["mac"] = keys["mac"]
        if "host_mtu" in keys:
            net["mtu"] = keys["host_mtu"]
        at = self._append("nets", net, option)
        if netdev is not None:
            for key in ("tap", "queues", "forward", "user"):
                self.made.places[*at, key] = str(netdev.option)

    def _forwards(self, netdev: Backend) -> list[str]:
        """QEMU's ``tcp:127.0.0.1:8080-:80`` as our ``127.0.0.1:8080:80``."""
        rules = []
        for rule in netdev.keys.get("hostfwd", "").split("\n"):
            if not rule:
                continue
            match = _FORWARD.fullmatch(rule)
            if match is None or match[4]:
                why = "passt has the guest's address" if match else "[tcp|udp]:[ADDRESS]:PORT-:PORT is wanted"
                self.problems.add(netdev.option, f"hostfwd={rule}: {why}")
                continue
            kind, address, port, _, to = match.groups()
            rules.append(("udp:" if kind == "udp" else "") + (f"{address}:" if address else "") + f"{port}:{to}")
        return rules

    def _finish_rng(self, option: Option, keys: dict[str, Any]) -> None:
        if "rng" in keys:
            self.use_key(option, "rng", keys, self.rngs, what="-object rng-random")
        kit: dict[str, Any] = {"id": self._id(keys, "rng", option), "kind": "rng"}
        if "max-bytes" in keys:
            kit["rate"] = max(1, keys["max-bytes"] * 1000 // keys.get("period", 65536))  # QEMU's default, in ms
        elif "period" in keys:
            self.problems.add(option, "period= is nothing without max-bytes=")
        self._append("devices", kit, option)

    def _finish_balloon(self, option: Option, keys: dict[str, Any]) -> None:
        if "balloon" in self.made.data:
            self.problems.add(option, "a machine has one balloon")
            return
        balloon: dict[str, Any] = {"id": self._id(keys, "balloon", option)}
        balloon |= {key.replace("-", "_"): True for key in ("deflate-on-oom", "free-page-reporting") if keys.get(key)}
        self.made.data["balloon"] = True if balloon == {"id": "balloon"} else balloon
        self.made.places["balloon",] = str(option)

    def _finish_vhost_user(self, option: Option, kind: str, keys: dict[str, Any]) -> None:
        chardev = self.use_key(option, "chardev", keys, self.chardevs)
        if chardev is None:
            return
        if chardev.kind != "socket" or "path" not in chardev.keys:
            self.problems.add(chardev.option, "a vhost-user backend is at a unix socket (socket, path=)")
            return
        if chardev.keys.get("server"):
            self.problems.note(chardev.option, "the backend listens, and the VM connects")
        kit = {"id": self._id(keys, kind, option), "kind": "vhost-user", "type": kind}
        kit["socket"] = os.path.abspath(chardev.keys["path"])  # noqa: PTH100
        kit |= {ours: keys[theirs] for theirs, ours in _VHOST_USER_KEYS.items() if theirs in keys}
        if "reconnect" in chardev.keys:
            kit["reconnect"] = chardev.keys["reconnect"]
        at = self._append("devices", kit, option)
        self.made.places[*at, "socket"] = str(chardev.option)

    def _finish_serial(self, *, nographic: bool, nodefaults: bool) -> None:
        """The serial port, which is there unless -serial none or -nodefaults say no."""
        if self.no_serial is not None and self.serial is not None and self.serial.value != "none":
            self.problems.add(self.serial, f"{self.no_serial} leaves the port out")
        said = Option("nographic", "stdio", "-nographic", shown="-nographic") if nographic and not nodefaults else None
        option = self.serial or said
        if (
            self.no_serial is not None
            or (option is None and nodefaults)
            or (option is not None and option.value == "none")
        ):
            self.made.data["uart"] = False
            return
        self._claim("ttyS0", option or Option("serial", None, "the serial port"))
        if option is not None:
            backend = self.short(option, of=self.chardevs)
            if backend is not None:
                self._console(option, "ttyS0", "uart", backend)

    def _finish_console(self, option: Option, keys: dict[str, Any], buses: list[str]) -> None:
        if not buses:
            self.problems.add(option, "no -device virtio-serial-device comes before it")
            return
        bus = str(keys.get("bus", f"{buses[0]}.0"))
        if bus.removesuffix(".0") not in buses:
            self.problems.add(
                option, f"bus={bus}: " + unknown(bus, [f"{b}.0" for b in buses], "no such virtio-serial-device")
            )
        before = sum(console["type"] == "virtio" for console in self.made.data.get("consoles", []))
        if keys.get("nr", before) != before:
            self.problems.add(
                option, f"nr={keys['nr']}: consoles are in the order of the command line, this is hvc{before}"
            )
        chardev = self.use_key(option, "chardev", keys, self.chardevs)
        if chardev is not None:
            self._console(option, self._id(keys, chardev.keys["id"], option), "virtio", chardev)

    def _console(self, option: Option, name: str, kind: str, backend: Backend) -> None:
        if not self.listens(backend):
            return
        what: object = {"stdio": TERMINAL, "pty": "pty", "null": "none"}.get(backend.kind)
        if backend.kind == "socket":
            if "path" not in backend.keys:
                self.problems.add(backend.option, "a console's socket is a unix socket (path=)")
                return
            what = {"socket": backend.keys["path"]}
        elif backend.kind == "file":
            what = {"file": backend.keys["path"]}
        if what == TERMINAL:
            if self.made.attached:
                self.problems.add(option, f"{self.made.places['terminal',]} has standard input and output")
            self.made.attached = True
            self.made.places["terminal",] = str(option)
        at = self._append("consoles", {"id": name, "type": kind, "backend": what}, option)
        self.made.places[*at, "backend"] = str(backend.option)

    def _add_qmp(self, option: Option, backend: Backend) -> None:
        keys = backend.keys
        if backend.kind != "socket":
            self.problems.add(
                option, "QMP is spoken on sockets: unix:PATH,server,nowait or tcp:HOST:PORT,server,nowait"
            )
        elif not self.listens(backend):
            return
        elif "path" in keys:
            self._append("qmp", f"unix:{keys['path']}", option)
        else:
            self._append("qmp", f"tcp:{keys.get('host', '0.0.0.0')}:{keys['port']}", option)

    def _claim(self, name: str, option: Option) -> None:
        if name in self._ids:
            self.problems.add(option, f"{name} is the id of {self._ids[name]}")
        self._ids.setdefault(name, str(option))

    def _id(self, keys: dict[str, Any], otherwise: str, option: Option) -> str:
        """The device's own, or one made of ``otherwise``."""
        if "id" in keys:
            return str(keys["id"])
        name, n = otherwise, 0
        while name in self._ids:
            name, n = f"{otherwise}{n}", n + 1
        self._ids[name] = str(option)
        return name

    def _append(self, section: str, entry: object, option: Option) -> Path:
        entries = self.made.data.setdefault(section, [])
        entries.append(entry)
        at = (section, len(entries) - 1)
        self.made.places[at] = str(option)
        return at

    def _tell_unused(self) -> None:
        for backends in (self.drives, self.netdevs, self.chardevs):
            for backend in backends.values():
                if not backend.user:
                    self.problems.note(backend.option, "no device uses it")
