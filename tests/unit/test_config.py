"""machine.yaml: what it means, and what every kind of mistake in it is answered with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorcade.orchestrator import config, hostcheck, machine, yamlpos

MINIMAL = "name: web\nkernel:\n  image: vmlinuz\n"


def load(tmp_path: Path, text: str, **overrides: str) -> machine.Machine:
    file = tmp_path / "machine.yaml"
    file.write_text(text)
    return config.load(file, **overrides)[0]


def problems(tmp_path: Path, text: str) -> list[str]:
    """Every problem, with the file's folder taken off."""
    with pytest.raises(config.ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.status == 2
    return [str(p).replace(f"{tmp_path}/", "") for p in caught.value.problems]


def test_defaults(tmp_path: Path) -> None:
    m = load(tmp_path, MINIMAL)
    assert (m.cpus, m.memory, m.accel, m.on_reboot) == (1, 512 << 20, "auto", "reset")
    assert m.kernel.image == str(tmp_path / "vmlinuz")
    assert [(c.id, c.type, c.backend) for c in m.consoles] == [("ttyS0", "uart", "none")]
    assert m.uuid == load(tmp_path, MINIMAL).uuid != load(tmp_path, MINIMAL, name="other").uuid


def test_no_uart(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "uart: false\n").consoles == []


def test_an_explicit_uart_is_the_only_one(tmp_path: Path) -> None:
    m = load(tmp_path, MINIMAL + "consoles:\n- {id: hvc0}\n- {id: com, type: uart, backend: terminal}\n")
    assert [c.id for c in m.consoles] == ["hvc0", "com"]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    m = load(
        tmp_path,
        "name: web\nkernel: {image: ../k, initrd: /abs/i}\n"
        "disks:\n- {id: a, path: a.img, overlay: true}\n- {id: b, path: b.img, overlay: o/b}\n"
        "nets:\n- {id: n, link: wire, capture: n.pcap}\n"
        "consoles:\n- {id: c, backend: {socket: c.sock}}\nqmp: ['unix:q.sock,server,nowait', 'tcp:127.0.0.1:4444']\n",
    )
    assert m.kernel.image == str(tmp_path.parent / "k")
    assert m.kernel.initrd == "/abs/i"
    assert m.disks[0].overlay == str(tmp_path / "web-a.overlay")
    assert m.disks[1].overlay == str(tmp_path / "o/b")
    assert (m.nets[0].link, m.nets[0].capture) == (str(tmp_path / "wire"), str(tmp_path / "n.pcap"))
    assert isinstance(m.consoles[1].backend, machine.To)
    assert m.consoles[1].backend.socket == str(tmp_path / "c.sock")
    assert m.qmp == [f"unix:{tmp_path}/q.sock", "tcp:127.0.0.1:4444"]


def test_the_command_line_wins(tmp_path: Path) -> None:
    m = load(tmp_path, MINIMAL, name="two", accel="box")
    assert (m.name, m.accel) == ("two", "box")


def test_macs_are_stable_and_differ(tmp_path: Path) -> None:
    nets = ["id: a", "id: b", "id: c, mac: 52:54:00:12:34:56"]
    text = MINIMAL + "nets:\n" + "".join(f"- {{user: true, {net}}}\n" for net in nets)
    a, b, c = (net.mac for net in load(tmp_path, text).nets)
    assert a == load(tmp_path, text).nets[0].mac != b
    assert str(c) == "52:54:00:12:34:56"  # YAML 1.1 would have read a number in base 60
    assert load(tmp_path, text, name="other").nets[0].mac != a


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("2GiB", 2 << 30),
        ("0x100000", 1 << 20),
        ("'4096k'", 4 << 20),
    ],
)
def test_sizes(tmp_path: Path, text: str, size: int) -> None:
    assert load(tmp_path, MINIMAL + f"memory: {text}\n").memory == size


BAD = [
    ("cpus: two", "machine.yaml:4:1: cpus: expected a whole number, got 'two'"),
    ("cpus: 1.5", "machine.yaml:4:1: cpus: expected a whole number, got 1.5"),
    ("cpus: true", "machine.yaml:4:1: cpus: expected a whole number, got true"),
    ("cpus: 0", "machine.yaml:4:1: cpus: 0 is too small (the least is 1)"),
    ("cpus: 256", "machine.yaml:4:1: cpus: 256 is too large (the most is 255)"),
    ("uart: no", "machine.yaml:4:1: uart: expected true or false, got 'no'"),
    ("memory: 3X", "machine.yaml:4:1: memory: expected a size such as 512M, 2G or a number of bytes, got '3X'"),
    ("memory: -5", "machine.yaml:4:1: memory: expected a size such as 512M, 2G or a number of bytes, got -5"),
    ("memory: 1048577", "machine.yaml:4:1: memory: RAM must be at least 1M and a multiple of 4096 bytes"),
    ("memory:", "machine.yaml:4:1: memory: expected a size such as 512M, 2G or a number of bytes, got nothing"),
    ("diks: []", "machine.yaml:4:1: diks: unknown key; did you mean 'disks'?"),
    ("name: 'x'", "machine.yaml:4:1: the key 'name' is there twice (first in line 1)"),
    ("uuid: 12-34", "machine.yaml:4:1: uuid: '12-34' is not a UUID"),
    ("accel: xen", "machine.yaml:4:1: accel: 'xen' is not one of auto, box, kvm"),
    ("disks: {}", "machine.yaml:4:1: disks: expected a list, got a mapping"),
    ("disks:\n- {path: x}", "machine.yaml:5:3: disks[0]: 'id' is missing"),
    ("disks:\n- id: 7\n  path: x", 'machine.yaml:5:3: disks[0].id: expected text, got 7 (put it in "quotes")'),
    ("disks:\n- {id: a/b, path: x}", "machine.yaml:5:4: disks[0].id: 'a/b': letters, digits, - _ and . only, "
     "at most 31, the first a letter or digit"),
    ("disks:\n- {id: d, path: x, engine: aio}", "machine.yaml:5:20: disks[0].engine: 'aio' is not one of "
     "auto, io_uring, sync"),
    ("disks:\n- {id: d, path: x, serial: 123456789012345678901}", None),
    ("disks:\n- {id: d, path: x, serial: '123456789012345678901'}",
     "machine.yaml:5:20: disks[0].serial: too long (the most is 20 characters)"),
    ("disks:\n- {id: d, path: x}\n- {id: d, path: y}",
     "machine.yaml:6:4: disks[1].id: 'd' is already the id of disks[0]"),
    ("disks:\n- {id: d, path: x, readonly: true, overlay: true}", "machine.yaml:5:36: disks[0].overlay: a read-only "
     "disk never writes to its overlay; drop one of the two"),
    ("disks:\n- {id: d, path: x, layers: [a]}", "machine.yaml:5:20: disks[0].layers: layers lie under an overlay; say "
     "overlay: true, or its path"),
    ("disks:\n- {id: d, path: x, overlay: true, layers: [a, '']}", "machine.yaml:5:47: disks[0].layers[1]: empty"),
    ("disks:\n- {id: pager, path: x}", "machine.yaml:5:4: disks[0].id: 'pager' is what fills the memory of a restored "
     "machine; choose another"),
    ("nets:\n- {id: n}", "machine.yaml:5:3: nets[0]: give exactly one of tap, user, link and unplugged, not none"),
    ("nets:\n- {id: n, tap: t0, user: true}", "machine.yaml:5:3: nets[0]: give exactly one of tap, user, link "
     "and unplugged, not tap and user"),
    ("nets:\n- {id: n, tap: t0, mac: 01:00:00:00:00:01}", "machine.yaml:5:20: nets[0].mac: 01:00:00:00:00:01 is not a "
     "unicast address (the first byte must be even)"),
    ("nets:\n- {id: n, tap: t0, mac: 52:54}", None),
    ("nets:\n- {id: n, tap: abcdefghijklmnop}", "machine.yaml:5:11: nets[0].tap: too long (the most is 15 characters)"),
    ("nets:\n- {id: n, user: true, queues: 2}",
     "machine.yaml:5:23: nets[0].queues: only a tap has several queue pairs"),
    ("nets:\n- {id: n, tap: t, forward: ['1:2']}",
     "machine.yaml:5:19: nets[0].forward: only 'user' networking forwards ports"),
    ("nets:\n- {id: n, user: true, forward: ['80']}", "machine.yaml:5:33: nets[0].forward[0]: '80' is not "
     "[udp:][ADDRESS:]HOSTPORT:GUESTPORT"),
    ("consoles:\n- {id: c, backend: tty}", "machine.yaml:5:11: consoles[0].backend: 'tty' is not one of none, pty, "
     "terminal, {socket: PATH}, {file: PATH}"),
    ("consoles:\n- {id: c, backend: {pipe: x}}", "machine.yaml:5:21: consoles[0].backend.pipe: unknown key (there are: "
     "socket, file)"),
    ("consoles:\n- {id: c, backend: {}}",
     "machine.yaml:5:11: consoles[0].backend: give exactly one of socket and file"),
    ("consoles:\n- {id: a, type: uart}\n- {id: b, type: uart}",
     "machine.yaml:6:11: consoles[1].type: the machine has one uart; use type: virtio for more consoles"),
    ("consoles:\n- {id: ttyS0}",
     "machine.yaml:4:1: consoles: the id ttyS0 is the serial port's; choose another (or set uart: false)"),
    ("qmp: ['foo']", "machine.yaml:4:7: qmp[0]: 'foo' is neither unix:PATH nor tcp:HOST:PORT"),
    ("qmp: ['tcp:host:99999']", "machine.yaml:4:7: qmp[0]: 'tcp:host:99999' is neither unix:PATH nor tcp:HOST:PORT"),
    (
        "metrics: '0.0.0.0:9200'",
        "machine.yaml:4:1: metrics: '0.0.0.0:9200' is not a loopback address and a port, such as 127.0.0.1:9200",
    ),
    ("metrics: 9200", 'machine.yaml:4:1: metrics: expected text or nothing, got 9200 (put it in "quotes")'),
    ("disks:\n" + "".join(f"- {{id: d{i}, path: x}}\n" for i in range(17)),
     "machine.yaml:4:1: disks: too long (the most is 16 entries)"),
    ("consoles:\n" + "".join(f"- {{id: c{i}}}\n" for i in range(17)),
     "machine.yaml:4:1: consoles: at most 8 virtio consoles"),
    ("devices:\n- {id: r, kind: rgn}",
     "machine.yaml:5:11: devices[0].kind: there is no kind of device 'rgn' (there are: rng, vhost-user)"),
    ("devices:\n- {id: r, kind: rng, rat: 5}", "machine.yaml:5:22: devices[0].rat: unknown key; did you mean 'rate'?"),
    ("devices:\n- {id: r, kind: rng, rate: 0}",
     "machine.yaml:5:22: devices[0].rate: 0 is too small (the least is 1)"),
    ("devices:\n- {id: r, kind: rng, rate: fast}",
     "machine.yaml:5:22: devices[0].rate: expected a whole number or nothing, got 'fast'"),
    ("devices:\n- {id: v, kind: vhost-user, type: blk}",
     "machine.yaml:5:3: devices[0]: give the backend's socket, or a command that starts it"),
    ("devices:\n- {id: v, kind: vhost-user, type: blk, socket: run/v.sock}",
     "machine.yaml:5:40: devices[0].socket: 'run/v.sock' is not an absolute path"),
    ("devices:\n- {id: v, kind: vhost-user, type: fs, socket: /v}",
     "machine.yaml:5:3: devices[0]: what the guest is to mount is missing (tag)"),
    ("devices:\n- {id: v, kind: vhost-user, type: fs, socket: /v, tag: " + "t" * 37 + "}",
     "machine.yaml:5:51: devices[0].tag: at most 36 bytes"),
    ("devices:\n- {id: v, kind: vhost-user, type: 4, socket: /v, tag: x}",
     "machine.yaml:5:50: devices[0].tag: only fs has one"),
    ("devices:\n- {id: v, kind: vhost-user, type: net, socket: /v}",
     "machine.yaml:5:29: devices[0].type: 'net' is not one of blk, fs"),
    ("devices:\n- {id: v, kind: vhost-user, type: 1, socket: /v}",
     "machine.yaml:5:29: devices[0].type: network cards are in nets; this front-end has no control queue for one"),
    ("devices:\n- {id: v, kind: vhost-user, type: 2, socket: /v}", "machine.yaml:5:29: devices[0].type: say blk"),
    ("devices:\n- {id: v, kind: vhost-user, type: blk, command: []}",
     "machine.yaml:5:40: devices[0].command: too short (the least is 1 entries)"),
    ("devices:\n- {id: v, kind: vhost-user, type: blk, command: [prog, --x]}",
     "machine.yaml:5:40: devices[0].command: {fd} (a socket that listens) or {socket} (a path to listen at) tells it"
     " where to serve"),
    ("devices:\n- {id: v, kind: vhost-user, type: blk, socket: /v, command: ['x{fd}']}",
     "machine.yaml:5:52: devices[0].command: with a socket of its own it has neither {fd} nor {socket}"),
    ("devices:\n- {id: v, kind: vhost-user, type: blk, socket: /v, queue_size: 100}",
     "machine.yaml:5:52: devices[0].queue_size: 100 is not a power of two"),
    ("devices:\n- {id: v, kind: vhost-user, type: blk, socket: /v, queues: 17}",
     "machine.yaml:5:52: devices[0].queues: 17 is too large (the most is 16)"),
    ("devices:\n- {id: r}", "machine.yaml:5:3: devices[0]: 'kind' is missing"),
    ("devices:\n- rng", "machine.yaml:5:3: devices[0]: expected a mapping with id and kind, got 'rng'"),
    ("devices:\n- {id: ../r, kind: rng}",
     "machine.yaml:5:3: devices[0]: id '../r': letters, digits, - _ and . only, at most 31, the first a letter or "
     "digit"),
    ("devices:\n- {id: r, kind: 5}", "machine.yaml:5:3: devices[0]: 'kind' is not text"),
    ("devices:\n- {id: ttyS0, kind: rng}",
     "machine.yaml:4:1: devices: the id ttyS0 is the serial port's; choose another (or set uart: false)"),
    ("devices:\n- {id: r, kind: blk}",
     "machine.yaml:5:11: devices[0].kind: there is no kind of device 'blk' (there are: rng, vhost-user)"),
    ("devices:\n- {id: a, kind: rng}\n- {id: a, kind: rng}",
     "machine.yaml:6:4: devices[1].id: 'a' is already the id of devices[0]"),
    ("devices:\n" + "".join(f"- {{id: d{i}, kind: rng}}\n" for i in range(9)),
     "machine.yaml:4:1: devices: too long (the most is 8 entries)"),
    ("devices:\n- {id: b, kind: balloon}",
     "machine.yaml:5:11: devices[0].kind: the balloon is a key of the machine itself: balloon: true"),
    ("balloon: yes", "machine.yaml:4:1: balloon: expected true or false or a mapping, got 'yes'"),
    ("balloon: {deflate_on_om: true}",
     "machine.yaml:4:11: balloon.deflate_on_om: unknown key; did you mean 'deflate_on_oom'?"),
    ("balloon: {free_page_reporting: 1}",
     "machine.yaml:4:11: balloon.free_page_reporting: expected true or false, got 1"),
    ("balloon: {stats_interval: -1}",
     "machine.yaml:4:11: balloon.stats_interval: -1 is too small (the least is 0)"),
    ("balloon: true\ndevices:\n- {id: balloon, kind: rng}",
     "machine.yaml:4:1: balloon.id: 'balloon' is already the id of devices[0]"),
    ("balloon: {id: b}\ndevices:\n" + "".join(f"- {{id: d{i}, kind: rng}}\n" for i in range(8)),
     "machine.yaml:4:1: balloon: there is room for 8 devices of this sort, and `devices` has them all"),
    ("? [a]\n: b", "machine.yaml:4:3: a key must be plain text"),
    ("cpus: !!python/object:os.system x", None),
    ("cpus: [", None),
    ("x: &a [*a]", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text.split("\n")[-1][:40] for text, _ in BAD])
def test_mistakes(tmp_path: Path, text: str, message: str | None) -> None:
    found = problems(tmp_path, MINIMAL + text + "\n")
    if message is None:
        assert all(line.startswith("machine.yaml:") for line in found)
    else:
        assert found[0] == message


def test_every_problem_is_told_in_order(tmp_path: Path) -> None:
    found = problems(tmp_path, "name: n\nkernel: {image: k}\nuuid: x\nnets:\n- {id: a}\nqmp: [y]\n")
    assert [line.split(":")[1] for line in found] == ["3", "5", "6"]


@pytest.mark.parametrize("text", ["", "- a", "just text", "a: b: c", "\x00", "name: n\nkernel: {}\n"])
def test_not_a_machine(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text)[0].startswith("machine.yaml:")


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(config.ConfigError, match="not UTF-8"):
        config.load(tmp_path / "machine.yaml")


def test_aliases_do_not_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "too large" in problems(tmp_path, "\n".join(lines))[0]


@given(st.text(max_size=200))
def test_no_text_crashes_the_parser(text: str) -> None:
    try:
        yamlpos.parse(text)
    except yamlpos.YamlError as e:
        assert e.position.line >= 1


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.floats(allow_nan=False))
INNER_KEYS = ["id", "kind", "rate", "path", "tap", "user", "image", "backend", "socket", "zz"]
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER_KEYS), inner, max_size=4),
    max_leaves=8,
)
SECTIONS = ["disks", "nets", "consoles", "devices"]
KEYS = ["name", "kernel", *SECTIONS, "memory", "cpus", "qmp", "uuid", "accel", "uart", "zz"]


@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_no_shape_crashes_the_checks(tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]) -> None:
    file = tmp_path_factory.mktemp("c") / "machine.yaml"
    file.write_text(json.dumps(data))  # JSON is YAML
    try:
        config.load(file)
    except config.ConfigError as e:
        assert e.problems


def test_schema_is_of_the_same_types() -> None:
    schema = machine.schema()
    properties = schema["$defs"]["Machine"]["properties"]
    assert set(properties) == set(machine.Machine.__struct_fields__)
    assert schema["$defs"]["Machine"]["additionalProperties"] is False
    for part in ("Disk", "Net", "Console"):
        assert all("description" in p for p in schema["$defs"][part]["properties"].values())
    json.dumps(schema)


# What depends on the host.


def host_problems(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "machine.yaml"
    file.write_text(text)
    (tmp_path / "vmlinuz").write_bytes(b"kernel")
    (tmp_path / "a.img").write_bytes(bytes(4096))
    parsed, source = config.load(file)
    with pytest.raises(config.ConfigError) as caught:
        hostcheck.check(parsed, source)
    return [str(p).replace(f"{tmp_path}/", "") for p in caught.value.problems]


def test_more_ram_than_the_host(tmp_path: Path) -> None:
    total = hostcheck.host_memory()
    found = host_problems(tmp_path, MINIMAL + f"memory: {(total + 4096) // 4096 * 4096 + (1 << 30)}\n")
    assert found[0].startswith("machine.yaml:4:1: memory: ")
    assert "is more RAM than this host has" in found[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nkernel: {image: nothing}\n", "machine.yaml:2:10: kernel.image: no such file: nothing"),
        ("name: a\nkernel: {image: .}\n", "machine.yaml:2:10: kernel.image: not a file: "),
        ("name: a\nkernel: {image: vmlinuz, initrd: x}\n", "machine.yaml:2:26: kernel.initrd: no such file: x"),
        (MINIMAL + "disks:\n- {id: d, path: no.img}\n", "machine.yaml:5:11: disks[0].path: no such file: no.img"),
        (MINIMAL + "disks:\n- {id: d, path: vmlinuz}\n", "machine.yaml:5:11: disks[0].path: vmlinuz has 6 bytes, "),
        (MINIMAL + "disks:\n- {id: d, path: a.img, overlay: no/x}\n",
         "machine.yaml:5:24: disks[0].overlay: no such folder"),
        (MINIMAL + "disks:\n- {id: d, path: /dev/null}\n", "machine.yaml:5:11: disks[0].path: neither a file nor a"),
        (MINIMAL + "consoles:\n- {id: c, backend: {file: no/x}}\n",
         "machine.yaml:5:21: consoles[0].backend.file: no such folder: no"),
        (MINIMAL + "qmp: ['unix:no/q']\n", "machine.yaml:4:7: qmp[0]: no such folder: no"),
    ],
)  # fmt: skip
def test_missing_files(tmp_path: Path, text: str, message: str) -> None:
    assert host_problems(tmp_path, text)[0].startswith(message)


def test_the_same_image_by_two_names(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(4096))
    os.link(tmp_path / "a.img", tmp_path / "b.img")
    two = MINIMAL + "disks:\n- {id: a, path: a.img%s}\n- {id: b, path: b.img%s}\n"
    found = host_problems(tmp_path, two % ("", ", readonly: true"))
    assert found == ["machine.yaml:6:11: disks[1].path: the same image as disks[0], and one of them writes to it"]
    (tmp_path / "machine.yaml").write_text(two % (", readonly: true", ", overlay: true"))
    hostcheck.check(*config.load(tmp_path / "machine.yaml"))  # readers may share


def test_a_machine_survives_its_description(tmp_path: Path) -> None:
    """What a template says of it is what machine.yaml said."""
    text = MINIMAL + (
        "disks:\n- {id: d, path: x, overlay: true, layers: [a, /b]}\n"
        "nets:\n- {id: n, unplugged: true, queues: 4}\n- {id: m, tap: t, mac: '52:54:00:00:00:01'}\n"
        "consoles:\n- {id: a, backend: {file: f}}\nqmp: ['unix:q']\n"
    )
    (tmp_path / "machine.yaml").write_text(text)
    loaded, _ = config.load(tmp_path / "machine.yaml")
    description = machine.describe(loaded)
    again, _ = config.machine_of_template(description, tmp_path / "state")
    assert again == loaded
    assert machine.describe(again) == description
    assert again.disks[0].layers == [f"{tmp_path}/a", "/b"]
    assert again.nets[0].mode == "unplugged"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "n", "kernel": {"image": "k"}, "wings": 2}'])
def test_descriptions_that_are_none(text: str) -> None:
    with pytest.raises(config.ConfigError, match="/t/state: its machine is not one that this program knows"):
        config.machine_of_template(text, Path("/t/state"))
