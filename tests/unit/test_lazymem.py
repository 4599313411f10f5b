"""Registering guest memory that fills itself, and telling whether this host permits it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from motorcade.core._native import ffi, lib
from motorcade.proto.memory import GuestMemory, layout
from motorcade.sidecars import lazymem

SIZE = 4 << 20


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping that begins there."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"{address:x}-"))
    return next(line for line in lines[first:] if line.startswith("VmFlags:")).split()[1:]


@pytest.fixture
def memfd() -> int:
    return os.memfd_create("guest", os.MFD_CLOEXEC)


def test_every_region_is_registered_and_kept_from_huge_pages(memfd: int) -> None:
    os.ftruncate(memfd, SIZE)
    memory = GuestMemory(memfd, layout(SIZE), lazy=True)
    uffd, mappings = lazymem.register(ffi, lib, memory, {})
    [mapping] = mappings
    assert (mapping.address, mapping.size, mapping.offset) == (memory.host_address(0), SIZE, 0)
    assert {"um", "nh"} <= set(flags_of(mapping.address))
    assert not os.get_blocking(uffd) and not os.get_inheritable(uffd)
    os.close(uffd)
    assert "um" not in flags_of(mapping.address)
    os.close(memfd)


def test_the_device_is_used_where_there_is_one(memfd: int) -> None:
    os.ftruncate(memfd, SIZE)
    device = lazymem.open_device()
    if device is None:
        pytest.skip(f"no {lazymem.DEVICE} for this user")
    uffd, _ = lazymem.register(ffi, lib, GuestMemory(memfd, layout(SIZE), lazy=True), {"userfaultfd": device})
    for fd in (uffd, device, memfd):
        os.close(fd)


def test_memory_that_cannot_be_registered_is_an_error_that_says_where(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+") as file:
        file.truncate(SIZE)
        memory = GuestMemory(file.fileno(), layout(SIZE), lazy=True)
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(lazymem.LazyMemoryError, match=r"cannot be registered with userfaultfd: .* at 0x0"):
            lazymem.register(ffi, lib, memory, {})
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_descriptor_that_is_not_the_device_is_an_error(memfd: int) -> None:
    os.ftruncate(memfd, SIZE)
    with pytest.raises(lazymem.LazyMemoryError, match="userfaultfd: "):
        lazymem.register(ffi, lib, GuestMemory(memfd, layout(SIZE), lazy=True), {"userfaultfd": memfd})
    os.close(memfd)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a user without rights")
def test_a_user_without_the_right_is_told_what_it_takes() -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        pytest.skip("every user has it here")
    script = (
        "import os; from motorcade.core import _native; from motorcade.sidecars import lazymem; "
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); print(lazymem.permitted())"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "vm.unprivileged_userfaultfd=1" in said


def test_permitted_says_nothing_where_it_works() -> None:
    if os.geteuid() == 0:
        assert lazymem.permitted() == ""
