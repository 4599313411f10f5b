"""A dump of a Linux guest, opened with drgn. There are no symbols but those of its VMCOREINFO: memory is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drgn

from harness.vm import VmHost

Machine = Callable[..., dict[str, Any]]
_NAME = 65  # bytes of each field of struct new_utsname (include/uapi/linux/utsname.h)


def test_drgn_reads_a_linux_guest(host: VmHost, linux: Machine, tmp_path: Path) -> None:
    """Of an unmodified kernel with KASLR, which no driver has told us anything."""
    vm = host.start(linux(cpus=2))
    agent = vm.console()
    release = agent.wait_ready()
    agent.check("echo motorcade-dump > /proc/sys/kernel/hostname")
    stext = int(agent.check("grep ' _stext$' /proc/kallsyms").split()[0], 16)
    with vm.qmp() as qmp:
        qmp.execute("dump-guest-memory", {"protocol": f"file:{tmp_path / 'core'}", "paging": False})
    assert agent.check("echo still here") == "still here"

    program = drgn.Program()
    program.set_core_dump(str(tmp_path / "core"))
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    info = program["VMCOREINFO"].string_().decode()

    def find(pattern: str, base: int) -> int:
        match = re.search(f"^{pattern}=([0-9a-f]+)$", info, re.MULTILINE)
        assert match is not None, info
        return int(match[1], base)

    assert f"OSRELEASE={release}\n" in info
    assert find(r"SYMBOL\(_stext\)", 16) == stext
    # Through the guest's page tables, wherever the kernel is.
    names = find(r"SYMBOL\(init_uts_ns\)", 16) + find(r"OFFSET\(uts_namespace.name\)", 10)
    read = [program.read(names + n * _NAME, _NAME).partition(b"\0")[0].decode() for n in range(3)]
    assert read == ["Linux", "motorcade-dump", release]
