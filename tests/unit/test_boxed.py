"""What a VM in the box gets, and what stands for it outside. The box itself is tests/guest's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from motorcade.orchestrator import boxed, config
from motorcade.orchestrator.errors import UserError
from motorcade.orchestrator.frozendisks import File, FrozenDisk, Incoming, Restored
from motorcade.orchestrator.machine import Machine


def machine(tmp_path: Path, text: str = "") -> Machine:
    (tmp_path / "k").write_bytes(b"x")
    file = tmp_path / "machine.yaml"
    file.write_text("name: web\nkernel: {image: k}\naccel: box\n" + text)
    return config.load(file)[0]


def test_the_same_machine_inside(tmp_path: Path) -> None:
    """What the box gets is a machine.yaml, and means the same, but for its sockets."""
    outside = machine(
        tmp_path,
        "memory: 1G\nnets:\n- {id: n, user: true}\ndisks:\n- {id: d, path: d.img, overlay: true}\n"
        "consoles:\n- {id: a, backend: {socket: a.sock}}\n- {id: b, backend: {file: b.log}}\n- {id: c, backend: pty}\n"
        "qmp: ['unix:q.sock', 'tcp:127.0.0.1:4444']\n",
    )
    file = tmp_path / "inside.yaml"
    file.write_text(json.dumps(boxed.inside(outside)))
    inner = config.load(file)[0]
    assert (inner.accel, inner.qmp) == ("kvm", [])
    assert (inner.name, inner.uuid, inner.memory) == (outside.name, outside.uuid, outside.memory)
    assert inner.disks == outside.disks
    assert inner.nets == outside.nets
    assert [c.id for c in inner.consoles] == ["ttyS0", "a", "b", "c"]
    assert inner.consoles[2:] == outside.consoles[2:]


def test_forwards(tmp_path: Path) -> None:
    outside = machine(
        tmp_path,
        "nets:\n- {id: n, user: true, forward: ['127.0.0.1:8080:80', '22:22']}\n"
        "consoles:\n- {id: a, backend: {socket: a.sock}}\nqmp: ['unix:q.sock', 'tcp:127.0.0.1:4444']\n"
        "metrics: 127.0.0.1:9200\n",
    )
    assert boxed.forwards(outside, Path("/r/web")) == [
        "/r/web/qmp.sock:/run/motorcade/web/qmp.sock",
        f"{tmp_path}/q.sock:/run/motorcade/web/qmp.sock",
        "127.0.0.1:4444:/run/motorcade/web/qmp.sock",
        "/r/web/watch.sock:/run/motorcade/web/watch.sock",
        "/r/web/metrics.sock:/run/motorcade/web/metrics.sock",
        "127.0.0.1:9200:/run/motorcade/web/metrics.sock",
        "/r/web/console-ttyS0.sock:/run/motorcade/web/console-ttyS0.sock",
        "/r/web/console-a.sock:/run/motorcade/web/console-a.sock",
        f"{tmp_path}/a.sock:/run/motorcade-web-a.sock",
        "127.0.0.1:8080:127.0.0.1:8080",
        "22:127.0.0.1:22",
    ]


def test_shares(tmp_path: Path) -> None:
    """Folders, once each; of the system's folders only the file."""
    for folder in ("disks", "out"):
        (tmp_path / folder).mkdir()
    outside = machine(
        tmp_path,
        "disks:\n- {id: d, path: disks/d.img, overlay: out/o}\n- {id: e, path: /etc/hostname}\n"
        "nets:\n- {id: n, link: disks, capture: out/n.pcap}\n",
    )
    assert boxed.shares(outside) == [tmp_path, tmp_path / "disks", tmp_path / "out", Path("/etc/hostname")]


def test_what_the_box_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="UDP ports cannot be forwarded into the box"):
        boxed.shares(machine(tmp_path, "nets:\n- {id: n, user: true, forward: ['udp:53:53']}\n"))


def test_a_template_in_the_box(tmp_path: Path) -> None:
    """It is told by its name, and its files are shared as those of the machine are."""
    for name in ("t", "p", "images", "keep"):
        (tmp_path / name).mkdir()
    outside = machine(tmp_path, "disks:\n- {id: d, path: gone/d.img, overlay: true}\n- {id: e, path: gone/e.img}\n")
    base = File(str(tmp_path / "images/d.img"), 512, 1, "00")
    disks = [
        Restored(str(tmp_path / "t"), FrozenDisk("d", False, 512, [base, File("disk-d.overlay", 9, 1, "00")])),
        Restored(
            str(tmp_path / "t"),
            FrozenDisk("e", False, 512, [File("disk-e.raw", 512, 1, "00")]),
            str(tmp_path / "keep/e"),
        ),
    ]
    memory = [str(tmp_path / "t/memory"), str(tmp_path / "p/memory")]
    incoming = Incoming(str(tmp_path / "t"), memory, disks, bytes(range(16)))
    assert boxed.arguments(incoming) == [
        "--incoming", f"file:{tmp_path}/t", "--generation-id", "000102030405060708090a0b0c0d0e0f",
    ]  # fmt: skip
    assert boxed.arguments(Incoming(str(tmp_path / "t"), memory)) == ["--incoming", f"file:{tmp_path}/t", "--same-id"]
    shared = boxed.shares(outside, incoming)
    assert {tmp_path / name for name in ("t", "p", "images", "keep")} <= set(shared)
    inside = boxed.inside(outside, incoming)
    assert [disk["overlay"] for disk in inside["disks"]] == [outside.disks[0].overlay, str(tmp_path / "keep/e")]
    with pytest.raises(UserError, match="defer is not possible in the box"):
        boxed.arguments(Incoming())
