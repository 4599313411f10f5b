"""A real box: what ``vmmctl box run`` carries, and what it leaves behind. One private box for all of them."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from motorcade.orchestrator.box.session import run
from motorcade.orchestrator.box.vm import Box, ensure_box, find_box, stop_box

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="the box needs root"),
    pytest.mark.skipif(not Path("/usr/bin/qemu-system-x86_64").exists(), reason="qemu-system-x86 is not installed"),
]


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with tempfile.TemporaryDirectory(prefix="mcbox-") as scratch:
        directory = Path(scratch) / "box"
        made = ensure_box(directory=directory, private=True)
        yield made
        assert stop_box(directory)
        assert find_box(directory) is None
        assert not directory.exists()


def shell(box: Box, script: str, **options: object) -> tuple[int, str, str]:
    """A shell script in the box: status, output, errors."""
    out, err = bytearray(), bytearray()
    with open(os.devnull, "rb") as null:
        options = {"stdin": null.fileno(), "out": out.extend, "err": err.extend, **options}
        status = run(box, ["sh", "-c", script], **options)  # type: ignore[arg-type]
    return status, out.decode(), err.decode()


def vmmctl(box: Box, *args: str, **options: object) -> "subprocess.Popen[bytes]":
    """``vmmctl box run`` for this box, as a process of its own."""
    env = {**os.environ, "MOTORCADE_BOX_DIR": str(box.dir), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "motorcade.orchestrator.cli", "box", "run", *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def test_it_is_a_linux_with_kvm_of_its_own(box: Box) -> None:
    script = "uname -r; test -c /dev/kvm && test -c /dev/net/tun && cat /sys/module/kvm_amd/parameters/npt"
    status, out, _ = shell(box, script)
    assert status == 0
    assert out.split() == [box.kernel, "N"]  # QEMU's nested paging loses guests (docs/box.md)


def test_output_directory_and_environment(box: Box) -> None:
    script = 'echo "$PWD $WORD $MOTORCADE_BOX"; echo wrong >&2'
    status, out, err = shell(box, script, cwd=ROOT / "tests", env={"WORD": "a  b", "MOTORCADE_BOX": "1"})
    assert (status, out, err) == (0, f"{ROOT}/tests a  b 1\n", "wrong\n")


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("exec /no/such", 127)])
def test_exit_status(box: Box, script: str, status: int) -> None:
    assert shell(box, script)[0] == status


def test_a_directory_that_is_not_there(box: Box) -> None:
    status, _, err = shell(box, "true", cwd=Path("/run/no-such-directory"))
    assert status == 125
    assert "/run/no-such-directory" in err


def test_standard_input(box: Box) -> None:
    with tempfile.TemporaryFile() as data:
        data.write(b"x" * 300_000)
        data.seek(0)
        assert shell(box, "wc -c", stdin=data.fileno())[1].strip() == "300000"


def test_writes_stay_in_the_box_but_below_a_share(box: Box, tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    for folder in (shared, other):
        folder.mkdir()
        (folder / "file").write_text("host\n")
    script = f"cd {other} && cat file && echo box > file && cat {shared}/file file && echo box > {shared}/file"
    status, out, err = shell(box, script, cwd=tmp_path, shares=[shared])
    assert (status, out, err) == (0, "host\nhost\nbox\n", "")
    assert (shared / "file").read_text() == "box\n"
    assert (other / "file").read_text() == "host\n"


def test_the_working_tree_is_seen_as_it_is_now(box: Box, tmp_path: Path) -> None:
    """A file replaced by another, as editors and git do it, between two runs."""
    file = tmp_path / "file"
    for content in ("one\n", "three\n"):
        (tmp_path / "new").write_text(content)
        (tmp_path / "new").rename(file)
        assert shell(box, "cat file", cwd=tmp_path)[:2] == (0, content)


def test_a_signal_reaches_the_command(box: Box) -> None:
    script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 1; done"
    with vmmctl(box, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"caught\n"
        assert process.wait(60) == 3


def test_a_killed_run_leaves_nothing_running(box: Box) -> None:
    mark = f"{os.getpid()}.25"  # seconds; an argument that no other process has
    with vmmctl(box, "--", "sh", "-c", f"sleep {mark} & echo ready; wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    # The leash works while we look; the box's kernel says when the last one is gone.
    script = f"for i in $(seq 300); do pgrep -f '[s]leep {mark}' > /dev/null || exit 0; sleep 0.1; done; exit 1"
    assert shell(box, script)[0] == 0


def test_a_background_process_outlives_its_run(box: Box) -> None:
    assert shell(box, "sleep 1000 > /dev/null 2>&1 & echo $! > /run/test-background")[0] == 0
    assert shell(box, "kill $(cat /run/test-background)")[0] == 0


def test_two_runs_at_once(box: Box) -> None:
    """They meet over a fifo, which they could not one after the other."""
    fifo = f"/run/test-fifo-{os.getpid()}"
    assert shell(box, f"mkfifo {fifo}")[0] == 0
    with vmmctl(box, "--", "sh", "-c", f"cat {fifo}") as reader:
        assert shell(box, f"echo met > {fifo}")[0] == 0
        assert reader.communicate(timeout=60)[0] == b"met\n"
