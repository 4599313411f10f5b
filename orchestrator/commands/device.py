"""vmmctl device: disks and NICs of a VM that runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from motorcade.orchestrator.commands.common import find_running, table

_EPILOG = """\
examples:
  vmmctl device add web disk id=data path=/images/data.raw        the guest gets another disk
  vmmctl device add web disk id=scratch path=base.raw overlay=scratch.overlay
  vmmctl device add web net id=lan tap=tap1 mac=52:54:00:00:00:01
  vmmctl device add web net id=out user=true forward=8080:80
  vmmctl device ls web                                            what is in which slot
  vmmctl device del web data                                      unmount it in the guest first
"""
_ADD = """\
The keys are those of an entry of disks or nets in machine.yaml (vmmctl schema, docs/machine-yaml.md); of a list, the
entries with commas between them. Relative paths are from here. slot=N, 0 to 15, chooses the place: 0 is vda or eth0.
Nothing is left of a device that could not be added.

examples:
  vmmctl device add web disk id=data path=/images/data.raw readonly=true
  vmmctl device add web net id=lan tap=tap1 slot=3
"""
_DEL = """\
The guest is told, not asked: what it had written is kept, requests that are under way are finished, and what it asks
for afterwards fails. A disk is then one of 0 bytes, a NIC one without a link, until its driver is unbound or another
device comes to that slot. So unmount, or take the interface down, first.

example:
  vmmctl device del web data
"""
_PATHS = ("path", "overlay", "link", "capture")
_TIMEOUT = 90.0  # seconds: a disk flushes first


def add_parser(commands: Any) -> None:
    """Adds ``device`` with its own commands."""
    p = commands.add_parser(
        "device",
        help="add disks and NICs to a running VM, and take them away",
        description="Add disks and NICs to a running VM, and take them away (docs/hotplug.md).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = p.add_subparsers(dest="device_command", metavar="COMMAND", required=True)
    add = sub.add_parser(
        "add",
        help="add one",
        description="Add a disk or a NIC to a running VM.",
        epilog=_ADD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add.add_argument("name", metavar="NAME", help="the VM")
    add.add_argument("kind", choices=("disk", "net"), help="what it is")
    add.add_argument("keys", nargs="+", metavar="KEY=VALUE", help="as in machine.yaml; id=ID is needed")
    add.set_defaults(run=_add)
    delete = sub.add_parser(
        "del",
        help="take one away",
        description="Take a disk or a NIC away from a running VM.",
        epilog=_DEL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    delete.add_argument("name", metavar="NAME", help="the VM")
    delete.add_argument("device", metavar="ID", help="the device")
    delete.set_defaults(run=_delete)
    ls = sub.add_parser("ls", help="list them", description="List a VM's devices.")
    ls.add_argument("name", metavar="NAME", help="the VM")
    ls.set_defaults(run=_list)


def _add(args: argparse.Namespace) -> int:
    vm = find_running(args.name)
    options = parse(args.kind, args.keys)
    _ask(vm.path / "qmp.sock", "x-motorcade-device-add", {args.kind: options})
    return 0


def _delete(args: argparse.Namespace) -> int:
    _ask(find_running(args.name).path / "qmp.sock", "device_del", {"id": args.device})
    return 0


def _list(args: argparse.Namespace) -> int:
    rows = [["ID", "KIND", "SLOT", "BACKEND"]]
    devices = find_running(args.name).state.get("devices", [])
    first = {"blk": 0, "net": 16}
    for device in sorted(devices, key=lambda d: (d["slot"] is None, d["slot"])):
        slot = "-" if device["slot"] is None else str(device["slot"] - first.get(device["kind"], 0))
        backend = "removed; the guest's driver is still bound" if device["id"].startswith("~") else device["backend"]
        rows.append([device["id"], device["kind"], slot, backend])
    table(rows)
    return 0


def parse(kind: str, keys: list[str]) -> dict[str, Any]:
    """KEY=VALUE words as an entry of machine.yaml. Errors: UserError (status 2)."""
    import msgspec

    from motorcade.orchestrator.config import _explain, field_name
    from motorcade.orchestrator.errors import EXIT_USAGE, UserError
    from motorcade.orchestrator.machine import Disk, Net, decode

    cls: type[Disk | Net] = Disk if kind == "disk" else Net
    lists = ("layers", "forward")
    options: dict[str, Any] = {}
    for word in keys:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"'{word}' is not KEY=VALUE", EXIT_USAGE)
        if key in options:
            raise UserError(f"{key} is given twice", EXIT_USAGE)
        options[key] = value.split(",") if key in lists else value
    if options.get("overlay") in ("true", "false"):
        options["overlay"] = options["overlay"] == "true"
    try:
        # Not strict: all there is here is text.
        made = msgspec.convert(options, cls, strict=False, dec_hook=decode)
    except msgspec.ValidationError as e:
        where, message = _explain(str(e), options, cls)
        raise UserError(f"{field_name(where)}: {message}" if where else message, EXIT_USAGE) from None
    result: dict[str, Any] = {key: getattr(made, key) for key in options}
    for key in _PATHS:
        if isinstance(result.get(key), str):
            result[key] = str(Path(result[key]).absolute())
    if "layers" in result:
        result["layers"] = [str(Path(layer).absolute()) for layer in result["layers"]]
    if "mac" in result:
        result["mac"] = str(result["mac"])
    return result


def _ask(socket: Path, command: str, arguments: dict[str, Any]) -> None:
    from motorcade.orchestrator.qmpclient import QmpClient

    with QmpClient(socket, timeout=_TIMEOUT) as qmp:
        qmp.execute(command, arguments)
