"""vmmctl clone: start copies of a template, all at once."""

from __future__ import annotations

import argparse
import gc
import os
import selectors
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import tell
from motorcade.orchestrator.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.daemon import Order
    from motorcade.orchestrator.machine import Disk, Machine, Net
    from motorcade.orchestrator.restore import Plan

MAX_CLONES = 10_000
_START = 120.0  # seconds for all of them; a supervisor gives up by itself before that
_SERIAL = 20  # characters (virtio 1.2, 5.2.6.1)

_EPILOG = """\
Each clone goes on where the template was frozen, with its own uuid and VM generation ID, and writes to disk overlays of
its own, which are gone when it ends (docs/clones.md). NICs with `user: true` get a passt of their own, without ports
of the host's; those that had a tap or a link are unplugged, unless --tap gives them one. Consoles are reached by
`vmmctl console`.

In patterns {n} is the clone's number, from 1; numbers whose name is taken by a running VM are skipped.

examples:
  vmmctl clone /templates/web -n 10
  vmmctl clone /templates/web -n 3 --name 'job-{n}' --tap 'lan=tap{n}' --fresh-mac

exit status: 0 all of them run; 1 some do not (each says why); 2 the command line is wrong.
"""


def add_parser(commands: Any) -> None:
    """Adds ``clone``."""
    p = commands.add_parser(
        "clone",
        help="start copies of a template",
        description="Start copies of a frozen machine in the background.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("dir", metavar="DIR", type=Path)
    p.add_argument("-n", type=int, default=1, metavar="N", help="how many (default 1)")
    p.add_argument("--name", metavar="PATTERN", help="default: the template's machine, -{n}")
    p.add_argument("--tap", metavar="ID=PATTERN", action="append", default=[], help="an existing tap for a NIC")
    p.add_argument("--fresh-mac", action="store_true", help="a MAC address of its own for each NIC")
    p.add_argument("--fresh-serial", action="store_true", help="a serial of its own for each disk")
    p.add_argument("--keep-overlays", metavar="FOLDER", type=Path, help="overlays stay, as FOLDER/NAME-ID.overlay")
    p.add_argument("--paused", action="store_true", help="do not run the CPUs yet")
    p.add_argument("--same-id", action="store_true", help="keep the template's VM generation ID")
    p.add_argument("--accel", choices=["auto", "kvm", "box"], help="instead of the template's")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """See the module."""
    if not 0 < args.n <= MAX_CLONES:
        raise UserError(f"-n {args.n}: 1 to {MAX_CLONES}", EXIT_USAGE)
    from motorcade.orchestrator import accel, daemon, hostcheck, pool, restore

    plan = restore.read(args.dir)
    if not plan.memory and (written := [disk.id for disk in plan.machine.disks if not disk.readonly]):
        raise UserError(
            f"{plan.path} has no disks, and clones cannot share those that they write to ({', '.join(written)}); "
            "take a template (vmmctl snapshot), or start each with a machine.yaml of its own (vmmctl up --incoming)"
        )
    taps = _taps(args.tap, plan)
    overlays = args.keep_overlays.absolute() if args.keep_overlays else None
    if overlays is not None and not overlays.is_dir():
        raise UserError(f"--keep-overlays: no such folder: {overlays}")
    chosen = accel.choose(args.accel or plan.machine.accel)
    if chosen.reason:
        tell(f"{chosen.reason}; running in the box (accel: kvm insists)")
    starts = _Starts()
    with _Forker() as forker:
        for n, name in _names(args.name or f"{plan.machine.name}-{{n}}", args.n):
            machine = copy(plan.machine, name, n, taps=taps, fresh_mac=args.fresh_mac, fresh_serial=args.fresh_serial)
            generation_id = b"" if args.same_id else os.urandom(restore.GENERATION_ID)
            incoming = restore.incoming(machine, plan, generation_id=generation_id, overlays=overlays)
            if starts.count == 0:  # what is wrong with one is wrong with all
                hostcheck.check(machine, plan.source, incoming)
            order = daemon.Order(machine, str(plan.path), chosen.name, args.paused, incoming)
            starts.add(name, forker.fork(pool.shape(machine, pager=True)), order)
    return EXIT_ERROR if starts.wait() else EXIT_OK


class _Forker:
    """Where supervisors come from: the zygote, started if need be; else this process, its code loaded once for all."""

    def __enter__(self) -> _Forker:
        from motorcade.orchestrator import daemon, zygoteclient

        self._zygote: zygoteclient.Zygote | None = None
        try:
            self._zygote = zygoteclient.start()
        except zygoteclient.ZygoteError as e:
            tell(f"{e}; starting without it")
            gc.disable()
            daemon.preload()
            gc.freeze()
            gc.enable()
        return self

    def __exit__(self, *_: object) -> None:
        if self._zygote is not None:
            self._zygote.close()

    def fork(self, shape: dict[str, Any]) -> socket.socket:
        """The lifeline of a supervisor without a VM, the caller's."""
        from motorcade.orchestrator import daemon, zygoteclient

        if self._zygote is not None:
            try:
                return self._zygote.fork(shape)[1]
            except zygoteclient.ZygoteError as e:
                tell(f"{e}; starting without it")
                self._zygote.close()
                self._zygote = None
        return daemon.fork()[1]


def copy(machine: Machine, name: str, n: int, *, taps: dict[str, str], fresh_mac: bool, fresh_serial: bool) -> Machine:
    """The machine of clone number ``n``: nothing that two VMs cannot both have. Errors: UserError."""
    from msgspec import structs

    from motorcade.orchestrator import restore

    def net(old: Net) -> Net:
        from motorcade.orchestrator.machine import stable_mac

        mac = stable_mac(f"{name}/{uuid.uuid4()}", old.id) if fresh_mac else old.mac
        if old.id in taps:
            tap = _fill(taps[old.id], n)
            return structs.replace(
                old, tap=tap, user=False, link=None, unplugged=False, forward=[], capture=None, mac=mac
            )
        if old.user:
            return structs.replace(old, forward=[], capture=None, mac=mac)
        return structs.replace(old, tap=None, link=None, unplugged=True, capture=None, mac=mac)

    def disk(old: Disk) -> Disk:
        if not fresh_serial:
            return old
        return structs.replace(old, serial=f"{(old.serial or old.id)[: _SERIAL - 9]}-{os.urandom(4).hex()}")

    return structs.replace(
        restore.renamed(machine, name=name),
        uuid=str(uuid.uuid4()),
        memory_share=machine.memory_file is None,
        disks=[disk(d) for d in machine.disks],
        nets=[net(n) for n in machine.nets],
        consoles=[c if isinstance(c.backend, str) else structs.replace(c, backend="none") for c in machine.consoles],
        qmp=[],
        metrics=None,  # one port, many clones; each has its metrics.sock
    )


def _fill(pattern: str, n: int) -> str:
    return pattern.replace("{n}", str(n))


def _taps(words: list[str], plan: Plan) -> dict[str, str]:
    """Patterns by NIC. Errors: UserError."""
    taps: dict[str, str] = {}
    ids = [net.id for net in plan.machine.nets]
    for word in words:
        device, equals, pattern = word.partition("=")
        if not equals or not pattern:
            raise UserError(f"--tap {word}: not ID=PATTERN", EXIT_USAGE)
        if device not in ids:
            raise UserError(
                f"--tap {word}: the template has no NIC {device} (it has: {', '.join(ids) or 'none'})", EXIT_USAGE
            )
        taps[device] = pattern
    return taps


def _names(pattern: str, count: int) -> Iterator[tuple[int, str]]:
    """Numbers and names that no running VM has. Errors: UserError."""
    from motorcade.orchestrator import rundir

    if "{n}" not in pattern:
        if count > 1:
            raise UserError(f"--name {pattern}: several clones need a {{n}} in their names", EXIT_USAGE)
        yield 1, pattern
        return
    taken = {vm.name for vm in rundir.vms() if vm.alive}
    n = 0
    while count:
        n += 1
        if (name := _fill(pattern, n)) not in taken:
            count -= 1
            yield n, name


class _Starts:
    """Clones on their way. Owns their lifelines until ``wait`` is through."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.count = self._failed = 0

    def add(self, name: str, line: socket.socket, order: Order) -> None:
        """Gives a supervisor its clone. Takes ``line``."""
        from motorcade.orchestrator import daemon

        self.count += 1
        began = time.monotonic()
        try:
            daemon.start(line, order)
        except UserError as e:
            self._fail(name, str(e))
            line.close()
            return
        self._selector.register(line, selectors.EVENT_READ, (name, began))

    def wait(self) -> int:
        """Until each runs, or has said why not. How many do not run."""
        end = time.monotonic() + _START
        while self._selector.get_map():
            ready = self._selector.select(max(0.0, end - time.monotonic()))
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                if self._is_over(key.fileobj, *key.data):
                    self._drop(key.fileobj)
            if not ready:
                for key in list(self._selector.get_map().values()):
                    assert isinstance(key.fileobj, socket.socket)
                    self._fail(key.data[0], f"does not run after {_START:g} s")
                    self._drop(key.fileobj)  # which ends it
        return self._failed

    def _is_over(self, line: socket.socket, name: str, began: float) -> bool:
        from motorcade.orchestrator import lifeline

        message = lifeline.receive(line)
        if message is None:
            self._fail(name, f"its supervisor died (vmmctl logs {name})")
        elif message["event"] == "failed":
            self._fail(name, message["message"])
        elif message["event"] == "ended":
            self._fail(name, f"ended while it started: {message['reason']}: {message['detail']}")
        elif message["event"] == "running":
            lifeline.send(line, do="detach")
            print(f"{name} runs after {(time.monotonic() - began) * 1000:.0f} ms", flush=True)
        else:
            return False
        return True

    def _drop(self, line: socket.socket) -> None:
        self._selector.unregister(line)
        line.close()

    def _fail(self, name: str, why: str) -> None:
        self._failed += 1
        tell(f"{name}: {why}")
