"""Guest RAM into a template's file: the bytes, the holes, what a base saves, and a guest that writes meanwhile."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.microvm import MicroVm, sealed_memfd, wait_until
from motorcade.core._native import lib
from motorcade.core.snapshot import ram
from motorcade.core.snapshot.dirty import DirtyPages, SharedLog
from motorcade.core.snapshot.ram import Base, RamCancelled, RamError, RamWriter
from motorcade.proto.memory import PAGE
from motorcade.proto.template import CHUNK, Cpu, Parent, Template, chunk_count

ODD_SIZE = 8 * CHUNK + 3 * PAGE  # the last chunk is short
Make = Callable[..., MicroVm]


class Files:
    """A memfd and files that go with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fds: list[int] = []

    def memfd(self, size: int) -> int:
        self.fds.append(sealed_memfd("ram", size))
        return self.fds[-1]

    def target(self, name: str, folder: Path | None = None) -> int:
        self.fds.append(os.open((folder or self.folder) / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        return self.fds[-1]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    made = Files(tmp_path)
    yield made
    for fd in made.fds:
        os.close(fd)


def done(writer: RamWriter) -> None:
    """Waits for the round as the core's loop does."""
    assert select.select([writer], [], [], 60)[0], "the round does not end"
    writer.finish()


def written(memfd: int, size: int, fd: int, base: Base | None = None) -> Template:
    """A template of what is in ``memfd`` now."""
    writer = RamWriter(memfd, size, fd, base)
    try:
        writer.start_all()
        done(writer)
        parents = tuple(Parent(f"/{i}", bytes(32)) for i in range(len(base.fds) if base else 0))
        return Template("{}", Cpu(b"", (), 0), size, writer.layers, writer.sums, parents, "[]", ())
    finally:
        writer.close()


def content(template: Template, fds: tuple[int, ...]) -> bytes:
    """What a machine restored from it would read, after all is found right."""
    assert ram.verify(template, fds, 0, len(template.layers)) is None
    pieces = []
    for chunk, layer in enumerate(template.layers):
        length = min(CHUNK, template.memory_size - chunk * CHUNK)
        pieces.append(os.pread(fds[layer - 1], length, chunk * CHUNK) if layer else bytes(length))
    return b"".join(pieces)


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_pages_that_are_zero_are_holes_in_the_file(files: Files) -> None:
    memfd, fd = files.memfd(ODD_SIZE), files.target("memory")
    os.pwrite(memfd, os.urandom(PAGE), 0)
    os.pwrite(memfd, bytes(PAGE), CHUNK)  # there, but zero
    os.pwrite(memfd, b"\0" * (PAGE - 1) + b"\1", 2 * CHUNK + 15 * PAGE)  # the last byte counts
    os.pwrite(memfd, os.urandom(2 * CHUNK), 4 * CHUNK)
    os.pwrite(memfd, b"end", ODD_SIZE - 3)
    before = allocated(memfd)
    template = written(memfd, ODD_SIZE, fd)
    assert template.layers == bytes([1, 0, 1, 0, 1, 1, 0, 0, 1])
    assert template.sums[4:8] == template.sums[12:16] == bytes(4)
    assert content(template, (fd,)) == os.pread(memfd, ODD_SIZE, 0)
    assert allocated(fd) == (1 + 1 + 32 + 1) * PAGE
    assert os.fstat(fd).st_size == ODD_SIZE
    assert allocated(memfd) == before  # holes of RAM were not filled by reading


def test_memory_that_nobody_touched_gives_an_empty_file(files: Files) -> None:
    memfd, fd = files.memfd(1 << 30), files.target("memory")
    template = written(memfd, 1 << 30, fd)
    assert not any(template.layers)
    assert allocated(fd) == 0


def test_a_page_that_is_zero_in_a_later_round_becomes_a_hole_again(files: Files) -> None:
    memfd, fd = files.memfd(ODD_SIZE), files.target("memory")
    os.pwrite(memfd, os.urandom(ODD_SIZE), 0)
    writer = RamWriter(memfd, ODD_SIZE, fd)
    writer.start_all()
    done(writer)
    assert allocated(fd) == ODD_SIZE
    os.pwrite(memfd, bytes(PAGE), 5 * PAGE)
    os.pwrite(memfd, bytes(CHUNK), CHUNK)
    os.pwrite(memfd, bytes(3 * PAGE), ODD_SIZE - 3 * PAGE)
    dirty = DirtyPages(ODD_SIZE)
    for page in (5, *range(16, 32), *range(128, 131)):
        dirty.add(page)
    writer.start_dirty(dirty)
    dirty.clear()  # the round has its own copy
    done(writer)
    assert os.pread(fd, ODD_SIZE, 0) == os.pread(memfd, ODD_SIZE, 0)
    assert allocated(fd) == ODD_SIZE - 20 * PAGE
    assert writer.layers == bytes([1, 0, 1, 1, 1, 1, 1, 1, 0])
    writer.close()


def test_rounds_and_a_stash_give_what_memory_was_when_it_was_taken(files: Files) -> None:
    """Random changes, noted as a dirty log notes them, with a base and without."""
    size = 400 * CHUNK + 7 * PAGE
    rng = random.Random(7)
    base: Base | None = None
    chain: tuple[int, ...] = ()
    memfd = files.memfd(size)

    def change(dirty: DirtyPages, count: int) -> None:
        for _ in range(count):
            page = rng.randrange(dirty.pages)
            kind = rng.random()
            if kind < 0.3:
                os.pwrite(memfd, bytes(PAGE), page * PAGE)
            elif kind < 0.5 and chain:  # back to what the base has
                os.pwrite(memfd, os.pread(chain[0], CHUNK, page // 16 * CHUNK)[:PAGE], page // 16 * CHUNK)
                page = page // 16 * 16
            else:
                os.pwrite(memfd, rng.randbytes(PAGE), page * PAGE)
            dirty.add(page)

    dirty = DirtyPages(size)
    change(dirty, 300)
    for generation in range(6):
        fd = files.target(f"memory{generation}")
        writer = RamWriter(memfd, size, fd, base)
        writer.start_all()
        done(writer)
        for _ in range(3):
            dirty.clear()
            change(dirty, 20)
            writer.start_dirty(dirty)
            done(writer)
        dirty.clear()
        change(dirty, 40)
        frozen = os.pread(memfd, size, 0)
        assert writer.stash(dirty) == len(dirty) * PAGE
        change(dirty, 60)  # the machine runs again
        writer.start_stash()
        done(writer)
        writer.start_sync()
        done(writer)
        parents = tuple(Parent(f"/{i}", bytes(32)) for i in range(len(chain)))
        template = Template("{}", Cpu(b"", (), 0), size, writer.layers, writer.sums, parents, "[]", ())
        template.check()
        writer.close()
        chain = (fd, *chain)
        assert content(template, chain) == frozen
        base = Base.of(template, chain)
    assert max(template.layers) > 2  # chunks of templates before the base


def test_what_the_base_has_is_not_written_again(files: Files) -> None:
    memfd = files.memfd(ODD_SIZE)
    os.pwrite(memfd, os.urandom(4 * CHUNK), 0)
    first = files.target("first")
    base = Base.of(written(memfd, ODD_SIZE, first), (first,))
    same = files.target("same")
    again = written(memfd, ODD_SIZE, same, base)
    assert again.layers == bytes([2, 2, 2, 2, 0, 0, 0, 0, 0])
    assert again.sums == base.sums
    assert allocated(same) == 0
    os.pwrite(memfd, b"x", CHUNK)
    os.pwrite(memfd, bytes(CHUNK), 2 * CHUNK)
    third = files.target("third")
    template = written(memfd, ODD_SIZE, third, Base.of(again, (same, first)))
    assert template.layers == bytes([3, 1, 0, 3, 0, 0, 0, 0, 0])
    assert content(template, (third, same, first)) == os.pread(memfd, ODD_SIZE, 0)


def test_a_base_whose_bytes_are_not_its_sums_is_not_relied_on(files: Files) -> None:
    """Chunks are compared byte for byte: a damaged base must not get into a new template."""
    memfd, first, fd = files.memfd(ODD_SIZE), files.target("first"), files.target("second")
    os.pwrite(memfd, os.urandom(CHUNK), 0)
    base = Base.of(written(memfd, ODD_SIZE, first), (first,))
    os.pwrite(first, bytes([os.pread(first, 1, 99)[0] ^ 1]), 99)
    template = written(memfd, ODD_SIZE, fd, base)
    assert template.layers[0] == 1


def test_a_base_of_another_size_or_with_files_missing_is_refused(files: Files) -> None:
    memfd, fd = files.memfd(ODD_SIZE), files.target("memory")
    template = written(memfd, ODD_SIZE, fd)
    with pytest.raises(ValueError, match="9 chunks, this machine's has 2"):
        RamWriter(memfd, 2 * CHUNK, fd, Base.of(template, (fd,)))
    with pytest.raises(ValueError, match="0 memory files for a base with 0 parents"):
        Base.of(template, ())
    bare = Template("{}", Cpu(b"", (), 0), ODD_SIZE, b"", b"", (), "[]", ())
    with pytest.raises(ValueError, match="no memory"):
        Base.of(bare, (fd,))


def test_a_base_that_is_too_short_is_named(files: Files) -> None:
    memfd, first, fd = files.memfd(ODD_SIZE), files.target("first"), files.target("second")
    os.pwrite(memfd, os.urandom(CHUNK), 0)
    base = Base.of(written(memfd, ODD_SIZE, first), (first,))
    os.truncate(first, 100)
    with pytest.raises(RamError, match="reading the base template's memory: the file is too short"):
        written(memfd, ODD_SIZE, fd, base)


def test_bits_past_the_end_of_memory_are_of_no_page(files: Files) -> None:
    """A sidecar can set any bit of the shared log."""
    memfd, fd, log_fd = files.memfd(ODD_SIZE), files.target("memory"), files.memfd(PAGE)
    os.pwrite(log_fd, b"\xff" * PAGE, 0)
    os.pwrite(memfd, os.urandom(ODD_SIZE), 0)
    log, dirty = SharedLog(log_fd, ODD_SIZE), DirtyPages(ODD_SIZE)
    log.take_into(dirty)
    assert not any(os.pread(log_fd, 8 * dirty.words, 0))
    writer = RamWriter(memfd, ODD_SIZE, fd)
    writer.start_dirty(dirty)
    done(writer)
    assert writer.progress.total == writer.progress.done == writer.progress.written == ODD_SIZE
    assert writer.stash(dirty) == ODD_SIZE
    writer.start_stash()
    done(writer)
    assert os.pread(fd, ODD_SIZE, 0) == os.pread(memfd, ODD_SIZE, 0)
    writer.close()
    log.close()


def test_a_bit_set_while_others_are_taken_is_found_in_time(files: Files) -> None:
    """Against a process that sets bits in C as fast as it can: none is lost."""
    size = 64 * 4096 * PAGE
    log_fd, dirty = files.memfd(8 * 4096), DirtyPages(size)
    log = SharedLog(log_fd, size)
    # One bit in each word, the words in turn, a new bit each time around.
    setter = files.folder / "setter.c"
    setter.write_text(
        "#include <stdint.h>\n#include <stdlib.h>\n#include <sys/mman.h>\n"
        "int main(int n, char **v) { uint64_t *log = mmap(0, 32768, 3, MAP_SHARED, atoi(v[1]), 0);\n"
        "for (int bit = 0; bit < 64; bit++) for (int word = 0; word < 4096; word++)\n"
        "__atomic_fetch_or(&log[word], 1ull << bit, __ATOMIC_SEQ_CST); return n != 2; }\n"
    )
    binary = files.folder / "setter"
    subprocess.run(["gcc", "-O2", "-o", str(binary), str(setter)], check=True, timeout=60)
    with subprocess.Popen([str(binary), str(log_fd)], pass_fds=[log_fd]) as child:
        while child.poll() is None:
            log.take_into(dirty)
    log.take_into(dirty)
    assert child.returncode == 0
    assert len(dirty) == dirty.pages
    log.close()


def test_a_file_that_may_not_grow_is_an_error_that_says_so(files: Files) -> None:
    memfd, fd = files.memfd(ODD_SIZE), files.target("memory")
    os.pwrite(memfd, os.urandom(ODD_SIZE), 0)
    writer = RamWriter(memfd, ODD_SIZE, fd)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK, limits[1]))
        writer.start_all()
        with pytest.raises(RamError, match="writing the template's memory: File too large"):
            done(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
        writer.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_is_an_error_that_says_so(files: Files) -> None:
    full = Path(tempfile.mkdtemp(prefix="motorcade-full-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(full)], check=True, timeout=30)
    try:
        memfd, fd = files.memfd(ODD_SIZE), files.target("memory", full)
        os.pwrite(memfd, os.urandom(ODD_SIZE), 0)
        with pytest.raises(RamError, match="writing the template's memory: No space left on device"):
            written(memfd, ODD_SIZE, fd)
        os.close(files.fds.pop())
    finally:
        subprocess.run(["umount", str(full)], check=True, timeout=30)
        shutil.rmtree(full)


def test_a_target_that_cannot_be_written_is_an_error(files: Files) -> None:
    memfd = files.memfd(ODD_SIZE)
    os.pwrite(memfd, b"x", 0)
    fd = files.memfd(ODD_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(RamError, match="Operation not permitted"):
        written(memfd, ODD_SIZE, fd)


def test_cancel_ends_a_round_and_all_later_ones(files: Files) -> None:
    memfd, fd = files.memfd(1 << 30), files.target("memory")
    writer = RamWriter(memfd, 1 << 30, fd)
    writer.cancel()
    writer.start_all()
    with pytest.raises(RamCancelled):
        done(writer)
    assert writer.progress.done <= CHUNK
    writer.start_all()
    writer.close()  # in the middle of a round


def test_one_round_at_a_time(files: Files) -> None:
    memfd, fd = files.memfd(ODD_SIZE), files.target("memory")
    writer = RamWriter(memfd, ODD_SIZE, fd)
    with pytest.raises(RuntimeError, match="no round"):
        writer.finish()
    writer.start_all()
    for wrong in (writer.start_all, writer.start_stash, lambda: writer.stash(DirtyPages(ODD_SIZE))):
        with pytest.raises(RuntimeError, match="not finished"):
            wrong()
    done(writer)
    assert not select.select([writer], [], [], 0)[0]
    dirty = DirtyPages(ODD_SIZE)
    assert writer.stash(dirty) == 0
    dirty.add(0)
    writer.stash(dirty)
    with pytest.raises(RamError, match="setting memory aside: Device or resource busy"):
        writer.stash(dirty)
    writer.close()


def test_verify_finds_each_damaged_chunk(files: Files) -> None:
    memfd, first, second = files.memfd(ODD_SIZE), files.target("first"), files.target("second")
    os.pwrite(memfd, os.urandom(ODD_SIZE), 0)
    base = Base.of(written(memfd, ODD_SIZE, first), (first,))
    os.pwrite(memfd, b"other", 3 * CHUNK)
    template = written(memfd, ODD_SIZE, second, base)
    chain = (second, first)
    assert ram.verify(template, chain, 0, 99) is None
    for chunk, layer in enumerate(template.layers):
        fd, where = chain[layer - 1], min(chunk * CHUNK + CHUNK, ODD_SIZE) - 1
        byte = os.pread(fd, 1, where)
        os.pwrite(fd, bytes([byte[0] ^ 0x80]), where)
        assert ram.verify(template, chain, 0, 99) == chunk
        assert ram.verify(template, chain, chunk + 1, 99) is None
        os.pwrite(fd, byte, where)
    os.truncate(second, CHUNK)
    assert ram.verify(template, chain, 0, 99) == 3
    assert chunk_count(ODD_SIZE) == 9


# With a guest.

RAM = f"ram={8 << 20}:2048:60"  # 1224 pages of data
COUNTER = 0x100000


def wait_counting(vm: MicroVm) -> None:
    """Until it has counted on from now."""
    seen = vm.memory.read(COUNTER, 8)
    wait_until(lambda: vm.memory.read(COUNTER, 8) != seen)


@pytest.mark.kvm
def test_kvm_reports_every_page_that_the_guest_changed(micro_vm: Make) -> None:
    vm = micro_vm(f"print=ready echo=1 {RAM} print=done count={COUNTER}")
    vm.start()
    vm.wait_for(b"ready\n")
    vm.vcpus.pause()
    size = vm.memory.size
    vm.vm.start_dirty_log()
    before = vm.memory.read(0, size)
    vm.vcpus.resume()
    vm.peer.send(b"x")
    vm.uart.poll()
    vm.wait_for(b"done\n")
    wait_counting(vm)
    dirty = DirtyPages(size)
    vm.vm.take_dirty(dirty)  # while it runs
    vm.vcpus.pause()
    vm.vm.take_dirty(dirty)
    after = vm.memory.read(0, size)
    reported = set(dirty.numbers())
    changed = {n for n in range(size // PAGE) if before[n * PAGE : (n + 1) * PAGE] != after[n * PAGE : (n + 1) * PAGE]}
    assert changed <= reported
    assert len(changed) > 1200
    assert COUNTER // PAGE in changed
    assert len(reported) < len(changed) + 200  # no blanket answer
    dirty.clear()
    vm.vm.take_dirty(dirty)
    assert len(dirty) == 0
    vm.vm.stop_dirty_log()
    with pytest.raises(RuntimeError, match="not on"):
        vm.vm.take_dirty(dirty)
    vm.vcpus.resume()


@pytest.mark.kvm
def test_a_running_guest_is_written_as_it_was_when_it_stood_still(micro_vm: Make, files: Files) -> None:
    vm = micro_vm(f"print=ready {RAM} print=filled count={COUNTER}")
    memfd, size, fd = vm._fds[1], vm.memory.size, files.target("memory")
    vm.start()
    vm.wait_for(b"ready\n")
    writer = RamWriter(memfd, size, fd)
    dirty = DirtyPages(size)
    vm.vm.start_dirty_log()
    writer.start_all()  # while it fills its RAM
    done(writer)
    for _ in range(3):
        dirty.clear()
        vm.vm.take_dirty(dirty)
        writer.start_dirty(dirty)
        done(writer)
    vm.wait_for(b"filled\n")
    wait_counting(vm)
    vm.vcpus.pause()
    dirty.clear()
    vm.vm.take_dirty(dirty)
    assert COUNTER // PAGE in dirty.numbers()
    frozen = vm.memory.read(0, size)
    writer.stash(dirty)
    vm.vcpus.resume()
    writer.start_stash()
    done(writer)
    vm.vm.stop_dirty_log()
    template = Template("{}", Cpu(b"", (), 0), size, writer.layers, writer.sums, (), "[]", ())
    writer.close()
    assert content(template, (fd,)) == frozen


def test_the_place_of_an_error_has_words() -> None:
    assert set(ram._PLACES) == {lib.MC_RAM_GUEST, lib.MC_RAM_TARGET, lib.MC_RAM_BASE, lib.MC_RAM_STASH}
