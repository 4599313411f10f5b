"""Writes the golden blobs of the present versions.

    python tests/golden/make.py             template-N.state: format N, made-up components
    python tests/golden/make.py --machine   machine-N.state: what this program saves of a real machine (needs /dev/kvm)

A blob is never changed once it is committed: what it holds was in somebody's file. When a version goes up, a new one
joins the others, and test_template.py and test_template_upgrade.py go on reading them all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import tempfile
from pathlib import Path

from motorcade.proto import template
from motorcade.proto.template import CHUNK, Component, Cpu, Parent, Template

HERE = Path(__file__).resolve().parent


def filler(name: str, size: int) -> bytes:
    """Bytes that look like nothing, and are the same each time."""
    return hashlib.shake_128(name.encode()).digest(size)


def sample() -> Template:
    """A template in which every field has something to say."""
    layers = bytes([0, 1, 2, 3, 1, 0, 0, 1])
    sums = b"".join(filler(f"sum{n}", 4) if layer else bytes(4) for n, layer in enumerate(layers))
    return Template(
        description='{"name":"golden","cpus":2,"memory":"508K","kernel":{"image":"/boot/vmlinuz"}}',
        cpu=Cpu(filler("cpuid", 3 * 40), (0x10, 0x174, 0xC0000080, 0x4B564D00), 4096),
        memory_size=8 * CHUNK - 4096,
        layers=layers,
        sums=sums,
        parents=(Parent("/templates/base", filler("base", 32)), Parent("/templates/oldest", filler("oldest", 32))),
        disks='[{"id":"root","kind":"overlay"}]',
        components=(
            Component("vm", 1, filler("vm", 90)),
            Component("clock", 1, filler("clock", 16)),
            Component("vcpu.0", 1, filler("vcpu.0", 300)),
            Component("vcpu.1", 1, filler("vcpu.1", 300)),
            Component("uart", 1, filler("uart", 12)),
            Component("pm", 1, b""),
            Component("virtio.root", 1, filler("virtio", 64)),
            Component("sidecar.root", 1, filler("sidecar", 40)),
        ),
    )


def machine() -> Template:
    """A micro-guest with a device of each kind, frozen; without the paths of the host where that was."""
    sys.path.insert(0, str(HERE.parent))
    from harness import microguest
    from harness.vmmctl import Host, write_machine

    with tempfile.TemporaryDirectory() as name, Host() as host:
        folder = Path(name)
        (folder / "disk.raw").write_bytes(bytes(1 << 20))
        devices = {
            "disks": [{"id": "root", "path": str(folder / "disk.raw")}],
            "nets": [{"id": "lan", "unplugged": True}],
            "consoles": [{"id": "com", "type": "uart"}, {"id": "con"}],
        }
        guest = {"cmdline": f"print=golden count={1 << 20}", "cpus": 2, "memory": "16M"}
        host.vmmctl("up", "-d", str(write_machine(folder, "golden", microguest.build(), **guest, **devices)))
        try:
            host.vmmctl("snapshot", "golden", str(folder / "template"))
        finally:
            host.vmmctl("down", "--force", "golden")
        whole = template.decode((folder / "template" / "state").read_bytes())
        microguest_path = str(microguest.build())
        neutral = whole.description.replace(microguest_path, "/guest.elf").replace(name, "")
        return dataclasses.replace(whole, description=neutral, disks=whole.disks.replace(name, ""))


def write_machine_blob() -> None:
    """Unless a blob has these versions already."""
    made = machine()
    versions = {c.name: c.version for c in made.components}
    blobs = sorted(HERE.glob("machine-*.state"))
    for path in blobs:
        if {c.name: c.version for c in template.decode(path.read_bytes()).components} == versions:
            raise SystemExit(f"{path.name} has components of these versions already")
    (HERE / f"machine-{len(blobs) + 1}.state").write_bytes(template.encode(made))


def main() -> None:
    """Refuses to replace a blob that says something else."""
    if sys.argv[1:] == ["--machine"]:
        write_machine_blob()
        return
    path, data = HERE / f"template-{template.VERSION}.state", template.encode(sample())
    if path.exists() and path.read_bytes() != data:
        raise SystemExit(f"{path.name} is golden, and what would be written now differs")
    path.write_bytes(data)


if __name__ == "__main__":
    main()
