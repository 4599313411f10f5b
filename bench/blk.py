"""``python -m bench.blk``: the blk sidecar against QEMU's.

The same C load (bench/native/blk_load.c) drives, in one run and by turns, the blk sidecar, qemu-storage-daemon's
vhost-user-blk export (aio=io_uring, an iothread), and plain io_uring on the same file, which is the limit. Requests go
through virtqueues in a memfd and eventfds; no guest is involved, so this is the back-end's part of an I/O's cost.
Neither side polls; both sleep until a kick or a completion. CPU is the back-end's alone. On a machine with other work,
look at the medians and at the CPU time, which suffer less than the rates.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import report, vhost_user
from harness.disk import Disk
from harness.driver import Memory
from motorcade.proto import messages as m

ROOT = Path(__file__).resolve().parents[1]

MIB = 1 << 20
QUEUE_SIZE = 256
PART = 4096  # VD_PART(QUEUE_SIZE)
QUEUES = 4
RAM = 64 * MIB
RING_FEATURES = 1 << 28 | 1 << 29  # INDIRECT_DESC, EVENT_IDX
VERSION_1 = 1 << 32


@dataclasses.dataclass(frozen=True)
class Load:
    """One row of the table. ``depth`` is per queue."""

    name: str
    write: bool
    depth: int
    queues: int
    block: int = 4096
    sequential: bool = False


LOADS = [
    Load(
        f"{'write' if write else 'read'} 4K random, depth {depth}, {queues} queue{'s' * (queues > 1)}",
        write,
        depth,
        queues,
    )
    for depth in (1, 32)
    for queues in (1, 4)
    for write in (False, True)
] + [
    Load(f"{'write' if write else 'read'} 128K sequential, depth 8", write, 8, 1, 128 << 10, True)
    for write in (False, True)
]


@dataclasses.dataclass
class Sample:
    """What one short run measured. Latencies in µs; cpu: µs of the back-end's CPU time per request."""

    iops: float
    p50: float
    p99: float
    kicks: float  # per request
    cpu: float


class Target(Protocol):
    """What can be loaded."""

    def run(self, load: Load, ms: int) -> Sample: ...


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process, those that ended excepted."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int((task / "schedstat").read_text().split()[0])
    return total


class Runner:
    """Runs blk_load."""

    def __init__(self, directory: Path, span: int) -> None:
        self.span = span
        self.program = directory / "blk_load"
        command = ["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", f"-I{ROOT / 'tests/harness/native'}"]
        command += ["-o", str(self.program), str(ROOT / "bench/native/blk_load.c"), "-luring"]
        subprocess.run(command, check=True)

    def __call__(
        self,
        mode: str,
        fd: int,
        load: Load,
        ms: int,
        *,
        call: int = -1,
        kicks: Sequence[int] = (),
        pid: int | None = None,
    ) -> Sample:
        numbers = [fd, load.queues, load.depth, load.block, ms]
        access = ["write" if load.write else "read", "sequential" if load.sequential else "random", str(self.span)]
        arguments = [mode, *map(str, numbers), *access, str(call), *map(str, kicks)]
        pass_fds = [f for f in (fd, call, *kicks) if f >= 0]
        before = cpu_ns(pid) if pid else 0
        done = subprocess.run(
            [self.program, *arguments], pass_fds=pass_fds, check=True, stdout=subprocess.PIPE, timeout=60
        )
        spent = cpu_ns(pid) - before if pid else 0
        result = json.loads(done.stdout)
        ops = result["ops"]
        return Sample(ops / result["seconds"], result["p50"], result["p99"], result["kicks"] / ops, spent / 1000 / ops)


class Ours:
    """The blk sidecar."""

    def __init__(self, runner: Runner, image: Path, direct: bool, engine: str) -> None:
        self.runner = runner
        self.memory = Memory(RAM)
        self.disk = Disk(image, direct=direct, queues=QUEUES, memory=self.memory, engine=engine)

    def run(self, load: Load, ms: int) -> Sample:
        zero_rings(self.memory)
        queues = [m.Queue(i, QUEUE_SIZE, *ring(i)) for i in range(load.queues)]
        self.disk.ask(m.Activate(self.disk.offered, tuple(queues)))
        try:
            return self.runner(
                "ring", self.memory.fd, load, ms,
                call=self.disk.call, kicks=self.disk.kicks[: load.queues], pid=self.disk.pid,
            )  # fmt: skip
        finally:
            self.disk.reset()

    def close(self) -> None:
        self.disk.close()
        self.memory.close()


class Qemu:
    """qemu-storage-daemon with a vhost-user-blk export."""

    def __init__(self, runner: Runner, image: Path, direct: bool, directory: Path) -> None:
        self.runner = runner
        self.memory = Memory(RAM)
        path = directory / "vhost.sock"
        blockdev = {
            "driver": "file",
            "node-name": "disk",
            "filename": str(image),
            "cache": {"direct": direct},
            "aio": "io_uring",
            "discard": "unmap",
        }
        export = {
            "type": "vhost-user-blk",
            "id": "export",
            "node-name": "disk",
            "addr": {"type": "unix", "path": str(path)},
            "writable": True,
            "num-queues": QUEUES,
            "iothread": "io",
        }
        # setpriv: the daemon must not outlive a benchmark that is killed.
        command = ["setpriv", "--pdeathsig", "KILL", "qemu-storage-daemon", "--object", "iothread,id=io"]
        command += ["--blockdev", json.dumps(blockdev), "--export", json.dumps(export)]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("qemu-storage-daemon did not start")
            time.sleep(0.01)
        self.front = vhost_user.FrontEnd(str(path), QUEUES)
        self.front.set_up(RING_FEATURES | VERSION_1, self.memory.fd, RAM)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.kicks = [os.eventfd(0, flags) for _ in range(QUEUES)]
        self.call = os.eventfd(0, flags)

    def run(self, load: Load, ms: int) -> Sample:
        zero_rings(self.memory)
        for i in range(load.queues):
            self.front.start(i, QUEUE_SIZE, *ring(i), self.kicks[i], self.call)
        try:
            return self.runner(
                "ring", self.memory.fd, load, ms,
                call=self.call, kicks=self.kicks[: load.queues], pid=self.process.pid,
            )  # fmt: skip
        finally:
            for i in range(load.queues):
                self.front.stop(i)

    def close(self) -> None:
        self.front.close()
        self.process.terminate()
        self.process.wait(20)
        for fd in [*self.kicks, self.call]:
            os.close(fd)
        self.memory.close()


class Limit:
    """io_uring on the file itself."""

    def __init__(self, runner: Runner, image: Path, direct: bool) -> None:
        self.runner = runner
        self.fd = os.open(image, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))

    def run(self, load: Load, ms: int) -> Sample:
        return self.runner("uring", self.fd, load, ms)

    def close(self) -> None:
        os.close(self.fd)


def ring(index: int) -> tuple[int, int, int]:
    """Where blk_load puts the parts of a queue."""
    base = index * 3 * PART
    return base, base + PART, base + 2 * PART


def zero_rings(memory: Memory) -> None:
    """As after a reset: a device that starts must not see the last run's indices."""
    memory.map.write(0, bytes(QUEUES * 3 * PART))


def median(samples: Sequence[Sample]) -> Sample:
    """Field by field."""
    return Sample(*(statistics.median(getattr(s, f.name) for s in samples) for f in dataclasses.fields(Sample)))


@contextlib.contextmanager
def targets(runner: Runner, image: Path, direct: bool, engine: str, directory: Path) -> Iterator[dict[str, Target]]:
    """All three, ended at the end."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Ours | Qemu | Limit] = {"motorcade": Ours(runner, image, direct, engine)}
        stack.callback(found["motorcade"].close)
        found["qemu"] = Qemu(runner, image, direct, directory)
        stack.callback(found["qemu"].close)
        found["io_uring"] = Limit(runner, image, direct)
        stack.callback(found["io_uring"].close)
        yield dict(found)


def measure(loads: Sequence[Load], by_name: dict[str, Target], rounds: int, ms: int) -> dict[str, dict[str, Sample]]:
    """By turns, so that a disturbance hits all of them alike."""
    results: dict[str, dict[str, Sample]] = {}
    for load in loads:
        samples: dict[str, list[Sample]] = {name: [] for name in by_name}
        for _ in range(rounds):
            for name, target in by_name.items():
                samples[name].append(target.run(load, ms))
        results[load.name] = {name: median(s) for name, s in samples.items()}
        print(f"  {load.name}: {results[load.name]['motorcade'].iops:.0f} IOPS", file=sys.stderr, flush=True)
    return results


HEADER = ("", "motorcade IOPS", "qemu", "ratio", "limit", "of it", "p50 us", "qemu", "limit", "CPU us", "qemu")


def row(name: str, by_name: dict[str, Sample]) -> list[str]:
    """IOPS, their ratios, median latencies, CPU time per request."""
    ours, qemu, limit = by_name["motorcade"], by_name["qemu"], by_name["io_uring"]
    rates = [f"{ours.iops:.0f}", f"{qemu.iops:.0f}", f"{ours.iops / qemu.iops:.2f}"]
    rates += [f"{limit.iops:.0f}", f"{ours.iops / limit.iops:.2f}"]
    return [name, *rates, *(f"{x:.1f}" for x in (ours.p50, qemu.p50, limit.p50, ours.cpu, qemu.cpu))]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms", type=int, default=200, help="milliseconds of one run (default 200)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of which the median counts (default 5)")
    parser.add_argument("--size", type=int, default=512, help="MiB of the image (default 512)")
    parser.add_argument(
        "--directory", type=Path, default=Path("/var/tmp"), help="where the image goes (default /var/tmp)"
    )
    parser.add_argument("--cached", action="store_true", help="through the page cache instead of O_DIRECT")
    parser.add_argument("--engine", choices=["auto", "io_uring", "sync"], default="auto", help="of the sidecar")
    parser.add_argument("--only", default="", help="loads whose name contains this")
    options = parser.parse_args()
    if not shutil.which("qemu-storage-daemon"):
        parser.error(
            "qemu-storage-daemon is not installed (Debian: qemu-system-x86 and qemu-block-extra, or qemu-utils)"
        )
    loads = [load for load in LOADS if options.only in load.name]
    with tempfile.TemporaryDirectory(prefix="mc-bench-", dir=options.directory) as name:
        directory = Path(name)
        image = directory / "disk.img"
        print(
            f"image of {options.size} MiB in {options.directory}, {'page cache' if options.cached else 'O_DIRECT'}",
            flush=True,
        )
        with image.open("wb") as f:
            for _ in range(options.size):
                f.write(os.urandom(MIB))
            os.fsync(f.fileno())
        runner = Runner(directory, options.size * MIB)
        with targets(runner, image, not options.cached, options.engine, directory) as by_name:
            results = measure(loads, by_name, options.rounds, options.ms)
    version = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True).stdout
    path = report.save(
        "blk-cached" if options.cached else "blk",
        {
            "cached": options.cached,
            "engine": options.engine,
            "qemu": version.splitlines()[0],
            "results": {k: {n: dataclasses.asdict(s) for n, s in v.items()} for k, v in results.items()},
        },
    )
    print(report.table(HEADER, [row(name, by_name) for name, by_name in results.items()]))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
