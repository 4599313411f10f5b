"""The ELF core file of a guest's memory, read back by others: pyelftools, gdb, drgn."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile  # type: ignore[import-untyped]

from motorcade.core._native import ffi, lib
from motorcade.core.snapshot import dump
from motorcade.proto.memory import PAGE, Region

MIB = 1 << 20
REGIONS = [Region(0, 2 * MIB, 0), Region(4 << 30, MIB, 2 * MIB)]  # a small machine with a hole like a large one's
KERNEL = 0xFFFF_FFFF_8100_0000


class Dump:
    """A core file in the making: RAM is there, the head is not."""

    def __init__(self, path: Path, cpus: int = 2) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self.vcpus = [vcpu(n) for n in range(cpus)]
        self.start = dump.start(cpus, len(REGIONS))
        os.ftruncate(self.fd, self.start + 3 * MIB)

    def put(self, offset: int, data: bytes) -> None:
        """Into RAM, by the memfd's offset."""
        os.pwrite(self.fd, data, self.start + offset)

    def finish(self) -> Any:
        """The whole file, parsed."""
        dump.finish(self.fd, REGIONS, self.vcpus)
        return ELFFile(io.BytesIO(self.path.read_bytes()))

    def notes(self) -> list[Any]:
        """Of the whole file."""
        return [note for s in self.finish().iter_segments("PT_NOTE") for note in s.iter_notes()]


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Dump]:
    made = Dump(tmp_path / "core")
    yield made
    os.close(made.fd)


def vcpu(index: int) -> dump.Vcpu:
    """Each register has a value of its own."""
    native = ffi.new("struct mc_dump_vcpu *")
    for n, name in enumerate(REGISTERS):
        setattr(native.regs, name, 0x1000 * (index + 1) + n)
    native.sregs.cs = {"selector": 0x10, "limit": 0xFFFFF, "type": 0xB, "present": 1, "s": 1, "l": 1, "g": 1}
    native.sregs.ss.selector = 0x18
    native.sregs.fs.base, native.sregs.gs.base = 0xF500_0000, 0xF600_0000
    native.sregs.idt = {"base": 0x7000, "limit": 0xFFF}
    native.sregs.cr0, native.sregs.cr2, native.sregs.cr3, native.sregs.cr4 = 0x8000_0001, 2, 0x5000, 0x20
    native.kernel_gs_base = 0x6B
    return dump.Vcpu(native, KERNEL + 0x123)


REGISTERS = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags"]


def note(text: bytes, name: bytes = b"VMCOREINFO\0") -> bytes:
    """As a Linux kernel keeps it."""
    return struct.pack("<III", len(name), len(text), 0) + name.ljust(12, b"\0") + text


def text(release: str, stext: int = KERNEL) -> bytes:
    return f"OSRELEASE={release}\nPAGESIZE=4096\nSYMBOL(_stext)={stext:x}\n".encode()


def test_pyelftools_finds_ram_at_its_addresses(core: Dump) -> None:
    core.put(0x1000, b"low")
    core.put(2 * MIB + 0x2000, b"high")
    elf = core.finish()
    assert (elf.header.e_type, elf.header.e_machine, elf.elfclass) == ("ET_CORE", "EM_X86_64", 64)
    loads = list(elf.iter_segments("PT_LOAD"))
    assert [(s["p_paddr"], s["p_vaddr"], s["p_filesz"], s["p_memsz"]) for s in loads] == [
        (r.gpa, r.gpa, r.size, r.size) for r in REGIONS
    ]
    assert loads[0].data()[0x1000:0x1003] == b"low"
    assert loads[1].data()[0x2000:0x2004] == b"high"
    assert all(s["p_offset"] % PAGE == 0 for s in loads)


def test_notes_have_the_registers_of_every_vcpu(core: Dump) -> None:
    notes = core.notes()
    assert [(n["n_name"], n["n_type"]) for n in notes] == [("CORE", "NT_PRSTATUS")] * 2 + [("QEMU", 0)] * 2
    for index, n in enumerate(notes[2:]):
        raw: bytes = n["n_descdata"]
        version, size = struct.unpack_from("<II", raw)
        assert (version, size) == (1, len(raw)) == (1, 440)
        registers = struct.unpack_from("<18Q", raw, 8)
        assert registers == tuple(0x1000 * (index + 1) + n for n in range(18))
        selector, limit, flags, _, base = struct.unpack_from("<IIIIQ", raw, 152)  # cs
        assert (selector, limit, flags, base) == (0x10, 0xFFFFF, 0xA0_9B00, 0)
        assert struct.unpack_from("<IIIIQ", raw, 152 + 9 * 24) == (0, 0xFFF, 0, 0, 0x7000)  # idt
        assert struct.unpack_from("<6Q", raw, 392) == (0x8000_0001, 0, 2, 0x5000, 0x20, 0x6B)


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_shows_vcpus_as_threads_and_reads_memory(core: Dump) -> None:
    core.put(0x1000, b"MOTORCADE\0")
    core.finish()
    ask = ["info threads", "thread 2", "p/x $rax", "p/x $rip", "p/x $fs_base", "x/s 0x1000"]
    words = [word for line in ask for word in ("-ex", line)]
    done = subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", "set architecture i386:x86-64", "-core", str(core.path), *words],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "$1 = 0x2000\n$2 = 0x2010\n$3 = 0xf5000000\n" in done.stdout, done.stdout + done.stderr
    assert '"MOTORCADE"' in done.stdout


def test_a_kernels_vmcoreinfo_is_found_and_added(core: Dump) -> None:
    core.put(0x7000, note(text("6.1.0-test")))
    last = core.notes()[-1]
    assert (last["n_name"], last["n_desc"] if isinstance(last["n_desc"], bytes) else last["n_descdata"]) == (
        "VMCOREINFO",
        text("6.1.0-test"),
    )


def test_of_two_kernels_the_running_one_counts(core: Dump) -> None:
    core.put(0x7000, note(text("before", KERNEL - (2 << 30))))
    core.put(2 * MIB + 0x3000, note(text("running")))
    core.put(2 * MIB + 0x5000, note(text("after", KERNEL + 0x1000)))
    assert dump.vmcoreinfo(core.fd, core.start, 3 * MIB, [0, KERNEL + 0x123]) == text("running")
    assert dump.vmcoreinfo(core.fd, core.start, 3 * MIB, [0]) == text("before", KERNEL - (2 << 30))


@pytest.mark.parametrize(
    "page",
    [
        b"",
        note(text("x"), b"VMCOREINFX\0"),
        note(b"PAGESIZE=4096\nno release first"),
        note(b"OSRELEASE=x\n"),
        note(text("x").ljust(4097, b"\n")),
        struct.pack("<III", 11, 0xFFFF_FFFF, 0) + b"VMCOREINFO\0\0" + text("x"),
        struct.pack("<III", 11, 0, 0) + b"VMCOREINFO\0\0",
        struct.pack("<III", 11, 40, 7) + b"VMCOREINFO\0\0" + text("x"),
    ],
)
def test_what_only_looks_like_vmcoreinfo_is_left_alone(core: Dump, page: bytes) -> None:
    core.put(0x7000, page)
    core.put(0x7F00, note(text("not at a page's start")))
    assert dump.vmcoreinfo(core.fd, core.start, 3 * MIB, [KERNEL]) == b""
    assert len(core.notes()) == 4


def test_a_note_in_the_last_page_ends_with_ram(core: Dump) -> None:
    long = text("x").ljust(4096, b"\n")
    core.put(3 * MIB - PAGE, note(long))
    assert dump.vmcoreinfo(core.fd, core.start, 3 * MIB, [KERNEL]) == long[: PAGE - 24]


def test_a_guest_full_of_notes_does_not_keep_us_for_ever(core: Dump) -> None:
    core.put(0, note(b"nonsense").ljust(PAGE, b"\0") * (2 * MIB // PAGE) + note(text("late")))
    assert dump.vmcoreinfo(core.fd, core.start, 3 * MIB, [KERNEL]) == b""


def test_the_largest_machine_has_room_for_its_notes() -> None:
    """255 vCPUs, and a VMCOREINFO as long as it can be."""
    begin = dump.start(255, 2)
    out = ffi.new("uint8_t[]", begin)
    vcpus = ffi.new("struct mc_dump_vcpu[]", 255)
    regions = ffi.new("struct mc_dump_region[]", 2)
    info = bytes(lib.MC_DUMP_VMCOREINFO_MAX)
    end = lib.mc_dump_head(out, vcpus, 255, regions, 2, info, len(info))
    assert begin - (64 << 10) < end <= begin


def test_drgn_takes_it_for_a_linux_kernels(core: Dump) -> None:
    drgn = pytest.importorskip("drgn")
    info = text("6.1.0-test") + b"SYMBOL(init_uts_ns)=ffffffff82613780\nSYMBOL(swapper_pg_dir)=ffffffff82610000\n"
    core.put(0x7000, note(info))
    core.put(0x9000, b"physical")
    core.finish()
    program = drgn.Program()
    program.set_core_dump(str(core.path))
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    assert program.read(0x9000, 8, physical=True) == b"physical"
    assert program["VMCOREINFO"].string_() == info
