"""human-monitor-command: what people type at QEMU's monitor, each line carried out by QMP's own commands.

Answers are text, for people and not for programs. What is not known here is answered as QEMU answers it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from motorcade.core.qmp import monitorinfo
from motorcade.core.qmp.errors import QmpError
from motorcade.core.qmp.registry import Arguments, Context, Deferred, Then, command

Outcome = str | Deferred | Then
_MOST_WORDS = 4096  # that xp prints
_SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}


class HumanMonitorCommand(Arguments, frozen=True):
    """Of human-monitor-command. ``cpu-index``: the vCPU that a line is about."""

    command_line: str
    cpu_index: int = 0


@dataclass(frozen=True)
class _Line:
    """What was typed: after the command's name (of ``info``: after both)."""

    ctx: Context
    words: Sequence[str]
    cpu: int

    def ask(
        self, name: str, arguments: Mapping[str, object] | None = None, show: Callable[[Any], str] = lambda _: ""
    ) -> Outcome:
        """Carries out a command of QMP's; ``show`` puts what it returns into words. Raises QmpError."""
        outcome = self.ctx.registry.find(name).call(self.ctx, msgspec.Raw(msgspec.json.encode(arguments or {})))
        if isinstance(outcome, Then):
            return Then(show(outcome.value), outcome.action)
        if isinstance(outcome, Deferred):
            later = Deferred()
            outcome.on_done(lambda end: later.finish(_refused(end) if isinstance(end, QmpError) else show(end)))
            return later
        return show(outcome)


@dataclass(frozen=True)
class _Command:
    """``least`` and ``most``: how many words may follow the name."""

    usage: str
    what: str
    run: Callable[[_Line], Outcome]
    least: int = 0
    most: int = 0


def _plain(name: str) -> Callable[[_Line], Outcome]:
    return lambda line: line.ask(name)


def _of_one(name: str, argument: str) -> Callable[[_Line], Outcome]:
    return lambda line: line.ask(name, {argument: line.words[0]})


def _migrate(line: _Line) -> Outcome:
    uri = [word for word in line.words if word != "-d"]
    if len(uri) != 1:
        raise QmpError("migrate: one URI expected")
    note = "" if "-d" in line.words else "terminal does not allow synchronous migration, continuing detached\n"
    return line.ask("migrate", {"uri": uri[0]}, lambda _: note)


def _set_capability(line: _Line) -> Outcome:
    name, state = line.words
    if state not in ("on", "off"):
        raise QmpError(f"{state} is neither on nor off")
    return line.ask("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state == "on"}]})


def _balloon(line: _Line) -> Outcome:
    if not line.words[0].isdecimal():
        raise QmpError(f"{line.words[0]} is no number of MiB")
    return line.ask("balloon", {"value": int(line.words[0]) << 20})


def _device_add(line: _Line) -> Outcome:
    driver, *rest = line.words[0].split(",")
    pairs: dict[str, str | int] = dict(part.partition("=")[::2] for part in rest)
    if (lun := str(pairs.get("lun"))).isdecimal():
        pairs["lun"] = int(lun)
    return line.ask("device_add", {"driver": driver.removeprefix("driver="), **pairs})


def _dump(line: _Line) -> Outcome:
    protocol = line.words[0] if ":" in line.words[0] else f"file:{line.words[0]}"
    return line.ask("dump-guest-memory", {"protocol": protocol, "paging": False})


def _examine(line: _Line) -> Outcome:
    """xp /COUNTxSIZE ADDRESS, as gdb has it: hexadecimal alone."""
    form, address = line.words if len(line.words) == 2 else ("/1xw", line.words[0])
    count, _, size = form.removeprefix("/").partition("x")
    if not form.startswith("/") or (size or "w") not in _SIZES or not (count or "1").isdecimal():
        raise QmpError(f"'{form}' is no format such as /8xw: a count, x, and a size of b, h, w or g")
    try:
        gpa = int(address, 0)
    except ValueError:
        gpa = -1
    if gpa < 0:
        raise QmpError(f"'{address}' is no address such as 0x1000")
    words, each = min(int(count or 1), _MOST_WORDS), _SIZES[size or "w"]
    data = line.ctx.machine.debugger.read_memory(gpa, words * each)
    values = struct.unpack(f"<{words}{ {1: 'B', 2: 'H', 4: 'I', 8: 'Q'}[each] }", data)
    a_line = 16 // each
    return "".join(
        f"{gpa + n * each:016x}: {' '.join(f'0x{v:0{2 * each}x}' for v in values[n : n + a_line])}\n"
        for n in range(0, words, a_line)
    )


def _info(line: _Line) -> Outcome:
    if not line.words:
        return "".join(f"info {name}  -- {i.what}\n" for name, i in monitorinfo.INFO.items())
    name, *rest = line.words
    info = monitorinfo.INFO.get(name)
    if info is None:
        return f"unknown command: 'info {name}'\n"
    if info.show is not None and not rest:
        return line.ask(info.command, show=info.show)
    if info.special is not None:
        return info.special(line.ctx, line.cpu, rest)
    return _extraneous(f"info {name}", "info")


def _help(line: _Line) -> Outcome:
    if line.words == ["info"]:
        return _info(_Line(line.ctx, (), line.cpu))
    wanted = [c for name, c in COMMANDS.items() if not line.words or line.words[0] in name.split("|")]
    return "".join(f"{c.usage}  -- {c.what}\n" for c in wanted)


COMMANDS: Mapping[str, _Command] = {
    "help|?": _Command("help|? [cmd]", "show the help", _help, most=1),
    "info": _Command("info [subcommand]", "show various information about the system state", _info, most=2),
    "stop|s": _Command("stop|s", "stop the vCPUs", _plain("stop")),
    "cont|c": _Command("cont|c", "let the vCPUs run", _plain("cont")),
    "system_reset": _Command("system_reset", "reset the machine", _plain("system_reset")),
    "system_powerdown": _Command("system_powerdown", "press the power button", _plain("system_powerdown")),
    "quit|q": _Command("quit|q", "end the VM", _plain("quit")),
    "xp": _Command("xp [/fmt] addr", "guest physical memory in hexadecimal, such as xp /8xw 0x1000", _examine, 1, 2),
    "migrate": _Command("migrate [-d] uri", "take a snapshot, such as migrate -d file:/tmp/template", _migrate, 1, 2),
    "migrate_cancel": _Command("migrate_cancel", "end the snapshot at hand", _plain("migrate_cancel")),
    "migrate_incoming": _Command("migrate_incoming uri", "go on from there", _of_one("migrate-incoming", "uri"), 1, 1),
    "migrate_set_capability": _Command(
        "migrate_set_capability capability on|off", "what snapshots do", _set_capability, 2, 2
    ),
    "dump-guest-memory": _Command("dump-guest-memory filename", "guest memory as an ELF core file", _dump, 1, 1),
    "balloon": _Command("balloon target", "ask the guest to do with so many MiB", _balloon, 1, 1),
    "device_add": _Command("device_add driver[,prop=value][,...]", "plug a device in", _device_add, 1, 1),
    "device_del": _Command("device_del device", "unplug a device", _of_one("device_del", "id"), 1, 1),
    "netdev_del": _Command("netdev_del id", "remove a NIC's backend", _of_one("netdev_del", "id"), 1, 1),
    "closefd": _Command("closefd name", "close a descriptor that has a name", _of_one("closefd", "fdname"), 1, 1),
}


def _extraneous(name: str, topic: str = "") -> str:
    return f'{name}: extraneous characters at the end of line\nTry "help {topic or name}" for more information\n'


def _refused(error: QmpError) -> str:
    return f"Error: {error.desc}\n"


def _carry_out(ctx: Context, text: str, cpu: int) -> Outcome:
    name, *words = text.split() or [""]
    if not name:
        return ""
    found = next((c for names, c in COMMANDS.items() if name in names.split("|")), None)
    if found is None:
        return f"unknown command: '{name}'\n"
    if len(words) > found.most:
        return _extraneous(name)
    if len(words) < found.least:
        return f'{name}: too few words\nTry "help {name}" for more information\n'
    try:
        return found.run(_Line(ctx, words, cpu))
    except QmpError as e:
        return _refused(e)


def _text(value: object) -> str:
    """As QEMU sends it."""
    return str(value).replace("\n", "\r\n")


@command("human-monitor-command", arguments=HumanMonitorCommand, returns=str)
def human_monitor_command(ctx: Context, args: HumanMonitorCommand) -> Outcome:
    """Carries out a line as at QEMU's monitor (``help`` lists them); the answer is text for a person."""
    if not 0 <= args.cpu_index < len(ctx.machine.vcpus()):
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    outcome = _carry_out(ctx, args.command_line, args.cpu_index)
    if isinstance(outcome, Then):
        return Then(_text(outcome.value), outcome.action)
    if isinstance(outcome, Deferred):
        later = Deferred()
        outcome.on_done(lambda end: later.finish(_text(end)))
        return later
    return _text(outcome)
