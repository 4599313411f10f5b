"""The box's parts that need no box: archives, modules, command lines, the environment."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from motorcade.orchestrator.box import paths, tsc
from motorcade.orchestrator.box.cpio import Archive
from motorcade.orchestrator.box.kernel import CLOUD, GENERIC, Flavour, Kernel, KernelError, find_kernel
from motorcade.orchestrator.box.session import carried_environment, fresh_trees, remote_command, working_tree
from motorcade.orchestrator.box.vm import BoxError, ensure_box, find_box, stop_box
from motorcade.orchestrator.cli import main


def test_archive_is_what_cpio_reads() -> None:
    if shutil.which("busybox") is None:
        pytest.skip("busybox is not installed")
    archive = Archive()
    archive.directory("d")
    archive.file("d/f", b"content", 0o755)
    archive.symlink("d/l", "f")
    archive.file("empty", b"")
    listed = subprocess.run(
        ["busybox", "cpio", "-tv"], input=archive.to_bytes(), capture_output=True, check=True
    ).stdout.decode()
    entries = [(line.split()[0], line.split()[2], " ".join(line.split()[5:])) for line in listed.splitlines()]
    assert [(kind, size, name.split()[-1]) for kind, size, name in entries] == [
        ("drwxr-xr-x", "0", "d"),
        ("-rwxr-xr-x", "7", "d/f"),
        ("lrwxrwxrwx", "0", "f"),  # busybox' way to say it
        ("-rw-r--r--", "0", "empty"),
    ]
    assert "d/l -> f" in listed


@pytest.mark.parametrize("length", range(9))
def test_archive_entries_are_aligned(length: int) -> None:
    """Names and contents of any length: the next header is at a multiple of four (buffer-format.rst)."""
    archive = Archive()
    archive.file("x" * (length + 1), bytes(length))
    archive.file("next", b"")
    data = archive.to_bytes()
    at = [i for i in range(len(data)) if data.startswith(b"070701", i)]
    assert len(at) == 3
    assert all(i % 4 == 0 for i in at)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel of three modules, the last one built in: top needs middle_part needs built-in."""
    made = Kernel(tmp_path, "1.0")
    folder = made.modules / "kernel"
    folder.mkdir(parents=True)
    (folder / "top.ko").write_bytes(b"\0license=GPL\0depends=middle-part,built_in\0")
    (folder / "middle_part.ko").write_bytes(b"\0depends=\0name=middle_part\0")
    (made.modules / "modules.builtin").write_text("kernel/drivers/built-in.ko\n")
    return made


def test_modules_come_in_the_order_of_insmod(kernel: Kernel) -> None:
    files = kernel.module_files(["top", "built-in", "middle-part"])
    assert [path.name for path in files] == ["middle_part.ko", "top.ko"]


def test_a_module_that_is_not_there_is_named(kernel: Kernel) -> None:
    with pytest.raises(KernelError, match=r"kernel 1\.0 has no module frobnicate"):
        kernel.module_files(["top", "frobnicate"])


@pytest.mark.parametrize("flavour", [CLOUD, GENERIC])
def test_a_named_kernel_must_be_there(flavour: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flavour.variable, str(tmp_path))
    with pytest.raises(KernelError, match=rf"{flavour.variable}: .*/vmlinuz: no such file"):
        find_kernel(flavour)


def test_the_remote_command_survives_a_shell() -> None:
    argv = ["sh", "-c", "echo 'a b' \"$0\"", "*;\n&"]
    command = remote_command("id", argv, cwd=Path("/a b"), env={"K": "v w", "not a name": "x"}, shares=[Path("/s h")])
    words = shlex.split(command)
    assert words[words.index("--") + 1 :] == argv
    assert "share:/s h" in words
    assert "K=v w" in words
    assert not any(word.startswith("not a name") for word in words)


def test_environment_that_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LC_ALL": "C", "SECRET": "s", "MOTORCADE_RUN_DIR": "/r", "MOTORCADE_X": "1"}.items():
        monkeypatch.setenv(name, value)
    carried = carried_environment()
    assert carried["LC_ALL"] == "C"
    assert carried["MOTORCADE_X"] == "1"
    assert carried["MOTORCADE_BOX"] == "1"
    assert not {"SECRET", "MOTORCADE_RUN_DIR"} & set(carried)
    assert carried_environment(["SECRET", "NEW=1=2"]).items() >= {"SECRET": "s", "NEW": "1=2"}.items()


def test_the_working_tree_is_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    inner = tmp_path / "repo" / "a" / "b"
    inner.mkdir(parents=True)
    assert working_tree(inner) == tmp_path / "repo"
    assert fresh_trees(inner)[-1] == tmp_path / "repo"
    assert Path("/") not in fresh_trees(Path("/"))


def test_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTORCADE_RUN_DIR", "/run/x")
    monkeypatch.delenv("MOTORCADE_BOX_DIR", raising=False)
    assert paths.state_dir() == Path("/run/x/.box")
    monkeypatch.setenv("MOTORCADE_BOX_DIR", "/run/y")
    assert paths.state_dir() == Path("/run/y")


def test_tsc_frequency_is_one() -> None:
    khz = tsc.tsc_khz()
    assert khz is None or 100_000 < khz < 10_000_000


def test_no_box_runs_in_a_directory_of_its_own(tmp_path: Path) -> None:
    assert find_box(tmp_path / "box") is None
    assert stop_box(tmp_path / "box") is False


def test_a_directory_that_a_kernel_command_line_cannot_carry(tmp_path: Path) -> None:
    with pytest.raises(BoxError, match="no blanks"):
        ensure_box(directory=tmp_path / "a box")


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["box", "run"], 2, "no command given"),
        (["box", "run", "--share", "/no/such", "--", "true"], 2, "/no/such: no such file or directory"),
        (["box", "shell"], 2, "needs a terminal"),
    ],
)
def test_usage_errors(argv: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == status
    assert message in capsys.readouterr().err


def test_status_and_down_without_a_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOTORCADE_BOX_DIR", str(tmp_path / "box"))
    assert main(["box", "status"]) == 3
    assert main(["box", "down"]) == 0
    assert capsys.readouterr().out == "no box runs\nno box runs\n"
