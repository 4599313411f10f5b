"""From a command line of QEMU's or StratoVirt's to what machine.yaml would say, and what vmmctl is to do with it.

``translate`` reads every option before it says anything, so that all that is wrong is told at once. What types and
ranges the machine has is machine.py's and config.py's to say; ``places`` lets them name the option that is to blame.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from motorcade.orchestrator.cmdline import grammar, options
from motorcade.orchestrator.cmdline.devices import Devices
from motorcade.orchestrator.cmdline.grammar import Note, Option, Problems, Wrong
from motorcade.orchestrator.errors import EXIT_USAGE, UserError

Path = tuple[str | int, ...]

DEFAULT_MEMORY = 256 << 20  # bytes; StratoVirt's, since QEMU's 128M is too little for a distribution's kernel


@dataclass
class Wish:
    """What a command line asks for."""

    data: dict[str, Any]  # as machine.yaml would have it
    places: dict[Path, str]  # which option is to blame for what of it
    notes: list[str]  # for the person
    paused: bool = False
    daemonize: bool = False
    pidfile: str = ""
    log_file: str = ""
    incoming: str = ""
    attached: bool = False  # a console has vmmctl's standard input and output
    problems: list[grammar.Problem] = field(default_factory=list)


def translate(words: Sequence[str]) -> Wish:
    """The wish of these words. Errors: UserError, a line for each thing that is wrong."""
    problems = Problems()
    wish = _Translator(problems).run(split(words, problems))
    if problems.found:
        raise UserError("\n".join(map(str, problems.found)), EXIT_USAGE)
    return wish


def split(words: Sequence[str], problems: Problems) -> list[Option]:
    """The options that are known, each with its argument, which has been checked where it has no keys."""
    found: list[Option] = []
    seen: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if any("\ud800" <= character <= "\udfff" for character in word + (left[0] if left else "")):
            problems.add(word.encode(errors="backslashreplace").decode(), "not UTF-8 text")
            break
        name = word.removeprefix("-").removeprefix("-")
        if not word.startswith("-") or not name:
            problems.add(word, "an image alone is no option; -drive file=IMAGE,id=D -device virtio-blk-device,drive=D")
            continue
        name = options.ALIASES.get(name, name)
        spec = options.OPTIONS.get(name)
        if spec is None:
            problems.add(word, grammar.unknown(name, options.OPTIONS, "unknown option"))
            if left and not left[0].startswith("-"):
                left.pop(0)
            continue
        value = None
        if spec.argument:
            # A file may be called -x, but who leaves an argument out is met more often.
            if not left or (left[0].startswith("-") and len(left[0]) > 1 and name != "append"):
                problems.add(word, "an argument is missing")
                continue
            value = left.pop(0)
        option = Option(name, value, word)
        if name in seen and not spec.repeats:
            problems.add(option, f"{seen[name]} was said before")
            continue
        seen[name] = str(option)
        try:
            if spec.table is None:
                spec.check(value if value is not None else "on")
            found.append(option)
        except Note as e:
            problems.note(option, str(e))
            found.append(option)
        except Wrong as e:
            problems.add(option, str(e))
    return found


class _Translator:
    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.devices = Devices(problems)
        self.machine: dict[str, Any] = {}
        self.kernel: dict[str, Any] = {}
        self.places: dict[Path, str] = {}
        self.wish = Wish({}, self.places, problems.notes)
        self.memory_backend: tuple[str, str] | None = None  # its id, and who named it
        self.nodefaults = self.nographic = False

    def run(self, given: Sequence[Option]) -> Wish:
        """All of it."""
        for option in given:
            if handler := _HANDLERS.get(option.name):
                handler(self, option, self.keys(option))
            elif option.name in self.devices.HANDLERS:
                self.devices.HANDLERS[option.name](self.devices, option)
            else:
                self.keys(option)  # it asks for what is so anyway, or is refused by its table
        self.finish()
        return self.wish

    def keys(self, option: Option) -> dict[str, Any]:
        """What its table makes of it; empty where it has none."""
        spec = options.OPTIONS[option.name]
        if spec.table is None:
            return {}
        return grammar.parse(option, spec.table, self.problems, implied=spec.implied)

    def put(self, key: str, value: object, option: Option) -> None:
        """A key of machine.yaml; another that says something else is wrong."""
        if self.machine.get(key, value) != value:
            self.problems.add(option, f"{self.places[(key,)]} says otherwise")
        self.machine[key] = value
        self.places[(key,)] = str(option)

    def finish(self) -> None:
        """What only makes sense when all is known."""
        machine, wish = self.machine, self.wish
        if "image" not in self.kernel:
            self.problems.add("-kernel", "missing: a microvm boots a kernel (a bzImage, or an ELF with a PVH note)")
        machine.setdefault("memory", DEFAULT_MEMORY)
        self.place_memory()
        made = self.devices.finish(nographic=self.nographic, nodefaults=self.nodefaults)
        self.places |= made.places
        wish.attached = made.attached
        if wish.daemonize and (made.attached or self.nographic):
            who = made.places.get(("terminal",), "-nographic")
            self.problems.add("-daemonize", f"{who} needs the terminal that the VM is to leave")
        data = {"memory": shown_size(machine.pop("memory")), "kernel": self.kernel, **machine, **made.data}
        name = data.pop("name", None) or default_name(data)
        wish.data = {"name": name, **{key: data[key] for key in sorted(data, key=_ORDER.index)}}
        self.places.setdefault(("memory",), "-m")
        self.places.setdefault(("name",), "-name")

    def place_memory(self) -> None:
        """RAM that is an object of the command line."""
        if self.memory_backend is None:
            for unused in self.devices.memory.values():
                self.problems.note(unused.option, "nobody uses it (-machine memory-backend=ID)")
            return
        wanted, where = self.memory_backend
        if (backend := self.devices.memory.get(wanted)) is None:
            self.problems.add(where, grammar.unknown(wanted, self.devices.memory, f"no -object has the id {wanted}"))
            return
        if backend.size not in (None, self.machine["memory"]):
            self.problems.add(backend.option, f"{backend.size} bytes, but -m says {self.machine['memory']}")
        if backend.path is not None:
            self.put("memory_file", backend.path, backend.option)
            if not backend.share:
                self.put("memory_share", False, backend.option)
        if backend.prealloc:
            self.put("memory_prealloc", True, backend.option)

    # The options, by name.

    def do_machine(self, option: Option, keys: dict[str, Any]) -> None:
        """-machine, also several."""
        if "accel" in keys:
            self.put("accel", keys["accel"], option)
        if "memory-backend" in keys:
            self.memory_backend = keys["memory-backend"], str(option)
        if keys.get("isa-serial") is False:
            self.devices.no_serial = option

    def do_accel(self, option: Option, keys: dict[str, Any]) -> None:
        if "accel" in keys:
            self.put("accel", keys["accel"], option)

    def do_enable_kvm(self, option: Option, _: dict[str, Any]) -> None:
        self.put("accel", "kvm", option)

    def do_smp(self, option: Option, keys: dict[str, Any]) -> None:
        product = 1
        parts = [key for key in ("sockets", "dies", "clusters", "cores", "threads") if key in keys]
        for key in parts:
            product *= keys[key]
        cpus = keys.get("cpus", keys.get("maxcpus", product))
        most = keys.get("maxcpus", cpus)
        if most > cpus:
            self.problems.add(option, f"maxcpus={most}: CPUs cannot be plugged in later")
        elif parts and most % product:
            self.problems.add(option, f"{' * '.join(parts)} are {product}, which {most} CPUs cannot be made of")
        self.put("cpus", cpus, option)

    def do_m(self, option: Option, keys: dict[str, Any]) -> None:
        if "size" in keys:
            self.put("memory", keys["size"], option)

    def do_kernel(self, option: Option, _: dict[str, Any]) -> None:
        self.kernel["image"] = option.value
        self.places["kernel", "image"] = self.places["kernel",] = str(option)

    def do_append(self, option: Option, _: dict[str, Any]) -> None:
        self.kernel["cmdline"] = option.value
        self.places["kernel", "cmdline"] = str(option)

    def do_initrd(self, option: Option, _: dict[str, Any]) -> None:
        self.kernel["initrd"] = option.value
        self.places["kernel", "initrd"] = str(option)

    def do_name(self, option: Option, keys: dict[str, Any]) -> None:
        if "guest" in keys:
            self.put("name", keys["guest"], option)

    def do_uuid(self, option: Option, _: dict[str, Any]) -> None:
        self.put("uuid", option.value, option)

    def do_no_reboot(self, option: Option, _: dict[str, Any]) -> None:
        self.put("on_reboot", "exit", option)

    def do_no_shutdown(self, option: Option, _: dict[str, Any]) -> None:
        self.put("on_poweroff", "pause", option)

    def do_action(self, option: Option, keys: dict[str, Any]) -> None:
        if "shutdown" in keys:
            self.put("on_poweroff", keys["shutdown"], option)
        if "reboot" in keys:
            self.put("on_reboot", keys["reboot"], option)

    def do_mem_path(self, option: Option, _: dict[str, Any]) -> None:
        self.put("memory_file", option.value, option)

    def do_mem_prealloc(self, option: Option, _: dict[str, Any]) -> None:
        self.put("memory_prealloc", True, option)

    def do_global(self, option: Option, _: dict[str, Any]) -> None:
        """``DRIVER.PROPERTY=VALUE``, or the same in three keys."""
        given: dict[str, str | None] = dict(grammar.pairs(option.value or ""))
        if set(given) == {"driver", "property", "value"}:
            given = {f"{given['driver']}.{given['property']}": given["value"]}
        if list(given) == ["virtio-mmio.force-legacy"]:
            if given["virtio-mmio.force-legacy"] not in ("false", "off", "no"):
                self.problems.add(option, "virtio-mmio is version 2")
            return
        self.problems.add(option, "no property is set this way but virtio-mmio.force-legacy=false, which is so anyway")

    def do_incoming(self, option: Option, _: dict[str, Any]) -> None:
        assert option.value is not None
        kind, __, rest = option.value.partition(":")
        if option.value != "defer" and (kind not in ("file", "exec", "fd") or not rest):
            self.problems.add(option, "a state comes from file:DIR, exec:COMMAND, fd:N, or defer")
        elif kind == "fd" and not rest.isdecimal():
            self.problems.add(option, "fd: wants the number of an open descriptor")
        self.wish.incoming = option.value

    def do_s(self, _: Option, __: dict[str, Any]) -> None:
        self.wish.paused = True

    def do_daemonize(self, _: Option, __: dict[str, Any]) -> None:
        self.wish.daemonize = True

    def do_pidfile(self, option: Option, _: dict[str, Any]) -> None:
        self.wish.pidfile = option.value or ""

    def do_log(self, option: Option, _: dict[str, Any]) -> None:
        self.wish.log_file = option.value or ""

    def do_nographic(self, _: Option, __: dict[str, Any]) -> None:
        self.nographic = True

    def do_nodefaults(self, _: Option, __: dict[str, Any]) -> None:
        self.nodefaults = True


_ORDER = ("cpus", "memory", "memory_file", "memory_share", "memory_prealloc", "accel", "uuid", "kernel", "disks",
          "nets", "consoles", "uart", "devices", "balloon", "qmp", "on_reboot", "on_poweroff")  # fmt: skip

_HANDLERS: dict[str, Callable[[_Translator, Option, dict[str, Any]], None]] = {
    "machine": _Translator.do_machine,
    "accel": _Translator.do_accel,
    "enable-kvm": _Translator.do_enable_kvm,
    "smp": _Translator.do_smp,
    "m": _Translator.do_m,
    "kernel": _Translator.do_kernel,
    "append": _Translator.do_append,
    "initrd": _Translator.do_initrd,
    "name": _Translator.do_name,
    "uuid": _Translator.do_uuid,
    "no-reboot": _Translator.do_no_reboot,
    "no-shutdown": _Translator.do_no_shutdown,
    "action": _Translator.do_action,
    "mem-path": _Translator.do_mem_path,
    "mem-prealloc": _Translator.do_mem_prealloc,
    "global": _Translator.do_global,
    "incoming": _Translator.do_incoming,
    "S": _Translator.do_s,
    "daemonize": _Translator.do_daemonize,
    "pidfile": _Translator.do_pidfile,
    "D": _Translator.do_log,
    "nographic": _Translator.do_nographic,
    "nodefaults": _Translator.do_nodefaults,
}


def shown_size(n: int) -> int | str:
    """Bytes as machine.yaml has them: 256M."""
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if n and n % (1 << shift) == 0:
            return f"{n >> shift}{unit}"
    return n


def default_name(data: dict[str, Any]) -> str:
    """Of a machine without -name: the same for the same command line, so that MAC addresses and UUID are, too."""
    return "vm-" + hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=4).hexdigest()
