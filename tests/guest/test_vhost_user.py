"""A Linux guest with other programs' backends: Debian's virtiofsd and qemu-storage-daemon, started with the VM."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import vhostbackend
from harness.vhostbackend import PROGRAM
from harness.vm import VmHost
from motorcade.orchestrator.box.vm import VIRTIOFSD as VIRTIOFSDS

Machine = Callable[..., dict[str, Any]]

VIRTIOFSD = next((path for path in VIRTIOFSDS if os.access(path, os.X_OK)), None)
MIB = 1 << 20

pytestmark = [
    pytest.mark.skipif(bool(vhostbackend.missing), reason=vhostbackend.missing),
    pytest.mark.skipif(VIRTIOFSD is None, reason="virtiofsd is not installed (apt install qemu-system-common)"),
]

LOAD = "while read m; do insmod /modules/$m; done < /modules/on_demand"
BIND = "cd /sys/bus/virtio/devices; for d in *; do [ -e $d/driver ] || echo $d > ../drivers_probe; done"
UNBIND = "cd /sys/bus/virtio/drivers/virtiofs && for d in virtio*; do echo $d > unbind; done"


def pid(run_dir: Path, role: str) -> int:
    """Of the process that has this role now."""
    processes = json.loads((run_dir / "state.json").read_text())["processes"]
    return next(int(p["pid"]) for p in processes if p["role"] == role and p["state"] == "running")


@pytest.mark.timeout(600)
def test_a_shared_directory_and_a_disk(host: VmHost, linux: Machine, tmp_path: Path) -> None:
    shared, image = tmp_path / "shared", tmp_path / "disk.img"
    shared.mkdir()
    content = os.urandom(MIB // 4)
    (shared / "from-host").write_bytes(content)
    image.write_bytes(os.urandom(2 * MIB))
    export = "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=fd,addr.str={fd}"
    disk = [PROGRAM, "--blockdev", f"driver=file,node-name=d,filename={image}", "--export", export]
    # The box's own file tree has no extended attributes to pass on.
    files = [VIRTIOFSD, "--fd={fd}", "-o", f"source={shared},no_xattr"]
    devices = [
        {"id": "fs0", "kind": "vhost-user", "type": "fs", "tag": "shared", "command": files},
        {"id": "disk0", "kind": "vhost-user", "type": "blk", "command": disk},
    ]
    vm = host.start(linux(memory="128M", devices=devices))
    agent = vm.console()
    agent.wait_ready()

    # The directory, both ways.
    agent.check(LOAD)
    agent.check("mount -t virtiofs shared /mnt")
    assert agent.check("sha256sum < /mnt/from-host").split()[0] == hashlib.sha256(content).hexdigest()
    said = agent.check("head -c 100000 /dev/urandom > /mnt/from-guest; sync; sha256sum < /mnt/from-guest").split()[0]
    assert hashlib.sha256((shared / "from-guest").read_bytes()).hexdigest() == said

    # The disk, and its backend's death under a write.
    assert agent.check("sha256sum < /dev/vda").split()[0] == hashlib.sha256(image.read_bytes()).hexdigest()
    agent.check("(dd if=/mnt/from-host of=/dev/vda bs=4k seek=100 oflag=direct 2>&1; echo done $?) > /run/dd &")
    os.kill(pid(vm.run_dir, "backend-disk0"), signal.SIGKILL)
    assert vm.await_event("sidecar-died")["role"] == "backend-disk0"
    assert agent.check("while ! grep done /run/dd; do sleep 0.1; done", 100) == "done 0"
    assert image.read_bytes()[400 << 10 :][: len(content)] == content
    assert agent.check("dmesg | grep -c 'I/O error' || true") == "0"

    # What virtiofsd knows cannot be frozen; without a driver there is nothing to know.
    info = vm.snapshot(tmp_path / "refused")
    assert info["status"] == "failed" and "fs0: quiesce: the backend" in info["error-desc"], info
    assert agent.check("ls /mnt").split() == ["from-guest", "from-host"]
    agent.check("umount /mnt")
    agent.check(UNBIND)
    info = vm.snapshot(tmp_path / "template")
    assert info["status"] == "completed", info

    agent.send("poweroff -f")
    assert vm.wait_end()["status"] == 0

    # A clone finds both, with backends of its own.
    after = hashlib.sha256(image.read_bytes()).hexdigest()
    clone = host.start(linux(memory="128M", devices=devices), template=tmp_path / "template")
    agent = clone.console()
    agent.check("echo 3 > /proc/sys/vm/drop_caches")
    assert agent.check("sha256sum < /dev/vda").split()[0] == after
    agent.check(BIND)
    agent.check("mount -t virtiofs shared /mnt")
    assert agent.check("sha256sum < /mnt/from-guest").split()[0] == said
    agent.send("poweroff -f")
    assert clone.wait_end()["status"] == 0
