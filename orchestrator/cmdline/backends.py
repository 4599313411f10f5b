"""-drive, -netdev, -chardev, -object, -device, -serial and -qmp as they come: with their keys, backends by id."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from motorcade.orchestrator.cmdline import grammar, tables
from motorcade.orchestrator.cmdline.grammar import Option, Problems, unknown

_IMPLIED = {"netdev": "type", "nic": "type", "chardev": "backend", "object": "qom-type", "device": "driver"}


@dataclass
class Backend:
    """A -drive, -netdev, -chardev or -object: what it says, and who uses it."""

    option: Option
    keys: dict[str, Any]
    kind: str = ""
    user: str = ""


@dataclass
class Memory:
    """A memory backend."""

    option: Option
    path: str | None
    size: int | None
    share: bool
    prealloc: bool


class Backends:
    """Collects them in the order of the command line. What they come to is devices.py's."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.drives: dict[str, Backend] = {}
        self.netdevs: dict[str, Backend] = {}
        self.chardevs: dict[str, Backend] = {}
        self.rngs: dict[str, Backend] = {}
        self.memory: dict[str, Memory] = {}
        self.objects: dict[str, Option] = {}
        self.devices: list[tuple[Option, str, dict[str, Any]]] = []
        self.serial: Option | None = None
        self.no_serial: Option | None = None
        self.monitors: list[tuple[Option, str]] = []
        self.qmp: list[tuple[Option, Backend]] = []

    # The options.

    def add_drive(self, option: Option) -> None:
        """-drive."""
        keys = grammar.parse(option, tables.DRIVE, self.problems)
        if "file" not in keys:
            self.missing(option, "file", tables.DRIVE)
            return
        if keys.get("if") == "virtio":
            before = sum(driver == "virtio-blk-device" for _, driver, _ in self.devices)
            if keys.get("index", before) != before:
                self.problems.add(option, f"index={keys['index']}: disks are in the order of the command line")
            name = keys.setdefault("id", f"virtio{len(self.drives)}")
            self.devices.append((option, "virtio-blk-device", {"drive": name}))
        if "id" not in keys:
            self.problems.add(option, "id= is missing: no -device can use it")
            return
        self.keep(self.drives, Backend(option, keys))

    def add_blockdev(self, option: Option) -> None:
        """-blockdev, with keys or as JSON."""
        if (plain := self.plain(option)) is None:
            return
        keys = grammar.parse(plain, tables.BLOCKDEV, self.problems, implied="driver")
        path = keys.get("filename", keys.get("file.filename"))
        below = self.drives.get(keys.get("file", ""))
        if "node-name" not in keys:
            self.missing(option, "node-name", tables.BLOCKDEV)
            return
        if "file" in keys and below is None:
            self.problems.add(option, unknown(keys["file"], self.drives, f"no -blockdev is called {keys['file']}"))
            return
        if below is not None:
            below.user = str(option)
            path = below.keys["file"]
        if path is None:
            self.missing(option, "file.filename" if keys.get("driver") == "raw" else "filename", tables.BLOCKDEV)
            return
        direct = keys.get("cache.direct", keys.get("file.cache.direct"))
        node = {
            "file": path,
            "id": keys["node-name"],
            "readonly": keys.get("read-only"),
            "direct": direct,
            "aio": keys.get("aio", keys.get("file.aio")),
            "discard": keys.get("discard", keys.get("file.discard")),
        }
        said = {key: value for key, value in node.items() if value is not None}
        self.keep(self.drives, Backend(option, {**(below.keys if below is not None else {}), **said}))

    def add_netdev(self, option: Option) -> None:
        """-netdev."""
        backend = self._typed(option, tables.NETDEVS)
        if backend is not None:
            self.keep(self.netdevs, backend)

    def add_nic(self, option: Option) -> None:
        """-nic: both in one."""
        if option.value == "none":
            return
        kinds = {kind: {**table, **tables.NIC} for kind, table in tables.NETDEVS.items() if not isinstance(table, str)}
        backend = self._typed(option, kinds, needs_id=False)
        if backend is None:
            return
        name = backend.keys.setdefault("id", f"nic{len(self.netdevs)}")
        mac = {"mac": backend.keys.pop("mac")} if "mac" in backend.keys else {}
        self.keep(self.netdevs, backend)
        self.devices.append((option, "virtio-net-device", {"netdev": name, **mac}))

    def add_chardev(self, option: Option) -> None:
        """-chardev."""
        backend = self._typed(option, tables.CHARDEVS)
        if backend is not None and self._check_chardev(backend):
            self.keep(self.chardevs, backend)

    def add_object(self, option: Option) -> None:
        """-object."""
        backend = self._typed(option, tables.OBJECTS)
        if backend is None:
            return
        name, keys = backend.keys["id"], backend.keys
        if name in self.objects:
            self.problems.add(option, f"{name} is the id of {self.objects[name]}")
            return
        self.objects[name] = option
        if backend.kind.startswith("rng-"):
            self.rngs[name] = backend
        elif backend.kind.startswith("memory-"):
            if backend.kind == "memory-backend-file" and "mem-path" not in keys:
                self.problems.add(option, "mem-path= is missing")
                return
            path, share = keys.get("mem-path"), keys.get("share", False)
            self.memory[name] = Memory(option, path, keys.get("size"), share, keys.get("prealloc", False))
        else:
            self.problems.note(option, tables.OWN_PROCESS)

    def add_device(self, option: Option) -> None:
        """-device."""
        if (plain := self.plain(option)) is None:
            return
        option = plain
        driver = _first(option.value or "")
        table = tables.DEVICES.get(driver)
        if table is None:
            known = [name for name, found in tables.DEVICES.items() if not isinstance(found, str)]
            self.problems.add(option, unknown(driver, known, f"there is no device {driver}"))
        elif isinstance(table, str):
            self.problems.add(option, table)
        else:
            keys = grammar.parse(option, {"driver": str, **table}, self.problems, implied="driver")
            self.devices.append((option, driver, keys))

    def add_serial(self, option: Option) -> None:
        """-serial."""
        if self.serial is not None:
            self.problems.add(
                option, f"there is one serial port ({self.serial}); more consoles are virtconsole devices"
            )
        self.serial = option

    def add_qmp(self, option: Option) -> None:
        """-qmp."""
        backend = self.short(option)
        if backend is not None:
            self.qmp.append((option, backend))

    def add_mon(self, option: Option) -> None:
        """-mon."""
        keys = grammar.parse(option, tables.MON, self.problems, implied="chardev")
        if "chardev" not in keys:
            self.missing(option, "chardev", tables.MON)
        elif "mode" not in keys:
            self.problems.add(option, "there is no human monitor; mode=control is QMP")
        else:
            self.monitors.append((option, str(keys["chardev"])))

    HANDLERS: Mapping[str, Callable[[Backends, Option], None]] = {
        "drive": add_drive,
        "blockdev": add_blockdev,
        "netdev": add_netdev,
        "nic": add_nic,
        "chardev": add_chardev,
        "object": add_object,
        "device": add_device,
        "serial": add_serial,
        "qmp": add_qmp,
        "mon": add_mon,
    }

    # Helpers.

    def plain(self, option: Option) -> Option | None:
        """JSON as keys and values: management programs write -blockdev, -device, -object and others so."""
        if not (option.value or "").startswith("{"):
            return option
        try:
            return option.reworded(_flattened(json.loads(option.value or "")))
        except ValueError as e:
            self.problems.add(option, f"not JSON that says an option: {e}")
            return None

    def _typed(
        self, option: Option, kinds: Mapping[str, tables.Table | str], *, needs_id: bool = True
    ) -> Backend | None:
        """An option one of whose words says which keys it has."""
        if (plain := self.plain(option)) is None:
            return None
        option = plain
        kind = _first(option.value or "")
        table = kinds.get(kind)
        if table is None:
            known = [name for name, found in kinds.items() if not isinstance(found, str)]
            self.problems.add(option, unknown(kind, known, f"there is no {kind or 'kind'}"))
            return None
        if isinstance(table, str):
            self.problems.add(option, table)
            return None
        implied = _IMPLIED[option.name]
        value = _joined(option.value or "", "hostfwd", implied)
        keys = grammar.parse(option.reworded(value), {implied: str, **table}, self.problems, implied=implied)
        if needs_id and "id" not in keys:
            self.missing(option, "id", table)
            return None
        return Backend(option, keys, kind)

    def short(self, option: Option, of: Mapping[str, Backend] | None = None) -> Backend | None:
        """A chardev as -serial and -qmp have it: ``unix:PATH,server,nowait``, ``stdio``, ``socket,path=...``. ``of``:
        those that ``chardev:ID`` may name."""
        value = (option.value or "").removeprefix("mon:")
        kind, colon, rest = value.partition(":")
        if kind == "chardev" and colon and of is not None:
            return self.use(option, "chardev", rest, of)
        if kind == "unix" and colon:
            value = "kind=socket,path=" + rest
        elif kind == "tcp" and colon:
            address, _, more = rest.partition(",")
            host, _, port = address.rpartition(":")
            value = f"kind=socket,host={host or '0.0.0.0'},port={port}" + (f",{more}" if more else "")
        elif kind == "file" and colon:
            value = "kind=file,path=" + rest
        elif _first(value) in ("file", "socket", "stdio", "pty", "null"):
            value = "kind=" + value
        else:
            forms = "stdio, unix:PATH,server,nowait, socket,path=PATH,server,nowait, pty, file:PATH, null, none"
            self.problems.add(option, f"one of {forms}, chardev:ID is wanted")
            return None
        kind = grammar.pairs(value)[0][1] or ""
        table = tables.CHARDEVS[kind]
        assert not isinstance(table, str)
        keys = grammar.parse(option.reworded(value), {"kind": str, **table}, self.problems)
        backend = Backend(option, keys, kind)
        return backend if self._check_chardev(backend) else None

    def _check_chardev(self, backend: Backend) -> bool:
        keys = backend.keys
        if backend.kind == "file" and "path" not in keys:
            self.problems.add(backend.option, "path= is missing")
            return False
        if backend.kind == "socket" and "path" not in keys and "port" not in keys:
            self.problems.add(backend.option, "path= (or host= and port=) is missing")
            return False
        return True

    def listens(self, backend: Backend) -> bool:
        """Whether a socket is said to listen, and to hold nothing up. Others do not matter."""
        if backend.kind == "socket" and not backend.keys.get("server"):
            self.problems.add(backend.option, "it listens, and does not connect; say server")
        elif backend.kind == "socket" and "wait" not in backend.keys:
            self.problems.add(backend.option, tables.NO_WAIT)
        else:
            return True
        return False

    def missing(self, option: Option, key: str, table: tables.Table) -> None:
        assert key in table
        self.problems.add(option, f"{key}= is missing")

    def keep(self, among: dict[str, Backend], backend: Backend) -> None:
        name = str(backend.keys["id"])
        if name in among:
            self.problems.add(backend.option, f"{name} is the id of {among[name].option}")
        among.setdefault(name, backend)

    def use_key(
        self, option: Option, key: str, keys: dict[str, Any], among: dict[str, Backend], *, what: str = ""
    ) -> Backend | None:
        if key not in keys:
            self.problems.add(option, f"{key}= is missing")
            return None
        return self.use(option, key, str(keys[key]), among, what=what)

    def use(
        self, option: Option, key: str, name: str, among: Mapping[str, Backend], *, what: str = ""
    ) -> Backend | None:
        """The backend of that name, which nobody else has."""
        backend = among.get(name)
        if backend is None:
            what = what or f"-{key}"
            self.problems.add(option, f"{key}={name}: {unknown(name, among, f'there is no {what} of that id')}")
        elif backend.user:
            self.problems.add(option, f"{key}={name}: {backend.user} uses it already")
            return None
        else:
            backend.user = str(option)
        return backend


def _first(value: str) -> str:
    """The word that says what it is."""
    pairs = grammar.pairs(value, "kind")
    said = [text or "" for key, text in pairs if key in ("kind", *_IMPLIED.values())]
    return said[0] if said else pairs[0][0] if pairs else ""


def _joined(value: str, key: str, implied: str) -> str:
    """``value`` with the several values of ``key`` in one, by line breaks."""
    pairs = grammar.pairs(value, implied)
    values = [text for name, text in pairs if name == key and text is not None]
    if len(values) < 2:
        return value
    rest = [f"{name}={text}" if text is not None else name for name, text in pairs if name != key]
    return ",".join(part.replace(",", ",,") for part in [*rest, f"{key}=" + "\n".join(values)])


def _flattened(found: object, prefix: str = "") -> str:
    """JSON as keys and values. Errors: ValueError."""
    if not isinstance(found, dict):
        raise ValueError("an object is wanted")
    parts = []
    for key, value in found.items():
        if isinstance(value, dict):
            parts.append(_flattened(value, f"{prefix}{key}."))
        elif isinstance(value, bool):
            parts.append(f"{prefix}{key}={'on' if value else 'off'}")
        elif isinstance(value, str | int):
            parts.append(f"{prefix}{key}={str(value).replace(',', ',,')}")
        else:
            raise ValueError(f"{prefix}{key} is neither text, a number, true, false nor an object")
    return ",".join(parts)
