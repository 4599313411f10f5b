"""The box: a Linux machine with hardware-style KVM, made by QEMU's software emulation of an AMD CPU.

QEMU emulates SVM with nested paging completely, so a stock KVM works inside; the host's file tree is
shared by virtiofsd under a tmpfs overlay, so the same programs and the same virtualenv are there. Inside
it is root's own machine: nothing in it is a security boundary towards the host.

One box a host and user, kept until ``stop``; a test session may start a private one that dies with it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from motorcade.orchestrator.box.initrd import ensure_initrd, version
from motorcade.orchestrator.box.kernel import ensure_kernel
from motorcade.orchestrator.box.paths import locked, state_dir
from motorcade.orchestrator.box.tsc import tsc_khz
from motorcade.orchestrator.errors import UserError

Progress = Callable[[str], None]

VIRTIOFSD = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"]
START_TIMEOUT = 120.0
"""Seconds; a start takes about five on an idle machine, and far more on a crowded one."""

_FILE_SYSTEMS = {"root": "cache=always", "live": "cache=auto,timeout=0.1"}
"""The host's file tree, shared twice (by tag: virtiofsd's options). ``root`` lies under the box's own: a file
stays as it was when the box first read it, and a Python with this project's libraries starts in 1.9 s where
``auto`` takes 3.4. ``live`` is for shared directories and for the tree being worked on: every open sees what
the host has written, under the name that it has had for 0.1 s, less than a run takes to start."""

_CMDLINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t audit=0 mitigations=off random.trust_cpu=on"
    " tsc=reliable no_timer_check cryptomgr.notests rcupdate.rcu_expedited=1 lsm=landlock"
)


# QEMU's SVM does not intercept XSETBV: KVM in the box never learns a guest's XCR0 and puts its own idea of it back at
# each entry. A guest that sees XSAVE crashes now and then, by when its exits fall (QEMU's own microvm, too).
#
# Its nested paging loses guests: now and then a guest's saved state is, at an exit, that of KVM itself (rip behind its
# VMRUN, its CR3), and the guest hangs or is at a triple fault next (docs/box.md). Shadow paging is slower.
_CPU = "EPYC,+svm,-npt,-xsave,-xsaveopt,-xsavec,-xgetbv1,-avx,-avx2,-fma,-f16c"


class BoxError(UserError):
    """The box cannot be started, or is not there; the message says what is missing or what it printed."""


@dataclass(frozen=True)
class Box:
    """A running box. Its processes hold a flock on ``DIR/alive`` as long as any of them lives."""

    dir: Path
    pid: int
    """QEMU's, in this pid namespace."""
    port: int
    """TCP on 127.0.0.1, forwarded to the box's sshd."""
    kernel: str
    started: float
    """Seconds since the epoch."""
    cpus: int
    memory_mib: int
    version: str
    """Of the scripts in its initramfs (initrd.version)."""

    @property
    def ssh(self) -> list[str]:
        """The start of an ssh command line towards the box; the host's name in it is ``box``."""
        return ["ssh", "-F", str(self.dir / "ssh_config")]

    @property
    def console_log(self) -> Path:
        """What its kernel and its sshd printed."""
        return self.dir / "console.log"


def find_box(directory: Path | None = None) -> Box | None:
    """The running box whose state is in ``directory`` (default: this user's one), or None."""
    directory = directory or state_dir()
    if not _alive(directory):
        return None
    try:
        state = json.loads((directory / "box.json").read_text())
        return Box(**{field.name: state.get(field.name, "") for field in fields(Box)} | {"dir": directory})
    except FileNotFoundError:
        return None  # still starting


def ensure_box(
    progress: Progress = lambda line: None,
    *,
    directory: Path | None = None,
    private: bool = False,
    cpus: int = 2,
    memory_mib: int = 4096,
) -> Box:
    """The running box; starts it if there is none, reporting each step to ``progress``.

    ``private``: the box is killed by the kernel when the calling thread ends (PR_SET_PDEATHSIG).
    Raises BoxError where something is missing or it does not come up in START_TIMEOUT seconds.
    """
    directory = directory or state_dir()
    if box := find_box(directory):
        if box.version != version():
            progress("this box was started by another version of Motorcade; vmmctl box down, and it starts anew")
        return box
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(directory.with_name(directory.name + ".lock")):
        if box := find_box(directory):
            return box
        if _alive(directory):
            # Left by a start that was killed half way: nobody can use that box.
            _kill_holders(directory)
        _prepare_directory(directory)
        return _start(directory, progress, private, cpus, memory_mib)


def stop_box(directory: Path | None = None) -> bool:
    """Ends the box and removes its state; False if there was none."""
    directory = directory or state_dir()
    if not directory.parent.is_dir():
        return False
    with locked(directory.with_name(directory.name + ".lock")):
        running = _alive(directory)
        if running:
            _kill_holders(directory)
        shutil.rmtree(directory, ignore_errors=True)
        return running


def _start(directory: Path, progress: Progress, private: bool, cpus: int, memory_mib: int) -> Box:
    if os.geteuid() != 0:
        raise BoxError("the box needs root: Debian 12's virtiofsd cannot share the file tree without it")
    virtiofsd = next((path for path in VIRTIOFSD if os.access(path, os.X_OK)), None)
    missing = [
        package
        for command, package in [
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("/usr/sbin/sshd", "openssh-server"),
            ("ssh", "openssh-client"),
            ("setpriv", "util-linux"),
        ]
        if shutil.which(command) is None
    ]
    if virtiofsd is None:
        missing.append("virtiofsd (Debian 12: in qemu-system-common)")
    if virtiofsd is None or missing:
        raise BoxError(f"the box needs packages that are not installed: {', '.join(missing)}")
    kernel = ensure_kernel(progress)
    initrd = ensure_initrd(kernel)

    begun = time.monotonic()
    progress(f"starting the box (kernel {kernel.release}, {cpus} CPUs, {memory_mib} MiB)")
    with contextlib.ExitStack() as stack:
        alive = os.open(directory / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, alive)
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wrapper = ["setpriv", "--pdeathsig", "KILL"] if private else []
        processes: list[subprocess.Popen[bytes]] = []

        @stack.callback
        def end_half_started() -> None:
            for process in processes:
                process.kill()
                process.wait()

        for tag, cache in _FILE_SYSTEMS.items():
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with listener, open(directory / f"virtiofsd-{tag}.log", "wb") as log:
                listener.bind(str(directory / f"fs-{tag}"))
                listener.listen(1)
                # chroot, not a mount namespace: the box sees what is mounted on the host later, too.
                options = f"{cache},no_xattr,sandbox=chroot,allow_direct_io,source=/,log_level=warn"
                processes.append(
                    subprocess.Popen(
                        [*wrapper, virtiofsd, "-f", f"--fd={listener.fileno()}", "-o", options],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=[listener.fileno(), alive],
                        start_new_session=True,
                    )
                )
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        port = _free_port()
        with theirs, open(directory / "qemu.log", "wb") as log:
            command = _qemu_command(directory, kernel.image, initrd, kernel.modules, theirs.fileno(), port)
            command += ["-smp", str(cpus), "-m", f"{memory_mib}M"]
            command += ["-object", f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on"]
            qemu = subprocess.Popen(
                [*wrapper, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno(), alive],
                start_new_session=True,
            )
            processes.append(qemu)
        _await_ready(ours, begun + START_TIMEOUT, directory)
        progress(f"the box's Linux is up after {time.monotonic() - begun:.1f} s; connecting")
        _write_ssh_config(directory, port)
        box = Box(directory, qemu.pid, port, kernel.release, time.time(), cpus, memory_mib, version())
        _connect(box, max(10.0, begun + START_TIMEOUT - time.monotonic()))
        (directory / "box.json.new").write_text(json.dumps({**asdict(box), "dir": str(directory)}))
        (directory / "box.json.new").rename(directory / "box.json")
        progress(f"box ready after {time.monotonic() - begun:.1f} s")
        for process in processes:
            # They outlive this object on purpose, which Popen would warn about.
            process.returncode = 0
        processes.clear()
    return box


def _qemu_command(directory: Path, kernel: Path, initrd: Path, modules: Path, console: int, port: int) -> list[str]:
    cmdline = f"{_CMDLINE} BOX_DIR={directory} BOX_MODULES={modules}"
    if khz := tsc_khz():
        cmdline += f" tsc_early_khz={khz}"
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    # Half a second faster to boot than q35, and nothing in it that the box does not need.
    command += ["-machine", "microvm,acpi=on,rtc=on,pic=on,pit=on,memory-backend=ram"]
    command += ["-global", "virtio-mmio.force-legacy=off"]
    command += ["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", _CPU]
    command += ["-kernel", str(kernel), "-initrd", str(initrd)]
    command += ["-append", cmdline]
    for tag in _FILE_SYSTEMS:
        command += ["-chardev", f"socket,id=fs-{tag},path={directory}/fs-{tag}"]
        command += ["-device", f"vhost-user-fs-device,chardev=fs-{tag},tag={tag},queue-size=1024"]
    command += ["-chardev", f"socket,id=con,fd={console},logfile={directory}/console.log", "-serial", "chardev:con"]
    command += ["-netdev", f"user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-:22"]
    command += ["-device", "virtio-net-device,netdev=net"]
    return command


def _await_ready(console: socket.socket, deadline: float, directory: Path) -> None:
    """Reads the box's console until its sshd says that it is listening."""
    printed = b""
    while b"Server listening on" not in printed:
        console.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            chunk = console.recv(4096)
        except TimeoutError:
            raise BoxError(f"the box did not come up in {START_TIMEOUT:.0f} s; {_logs(directory)}") from None
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            raise BoxError(f"the box ended while starting; {_logs(directory)}")
        printed = (printed + chunk)[-8192:]


def _logs(directory: Path) -> str:
    """The last lines of what the box's processes printed, for an error message."""
    tails = []
    for log in sorted(directory.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-8:]
        if lines:
            tails.append(f"{log.name}:\n  " + "\n  ".join(lines))
    return "\n".join(["its logs end with:", *tails]) if tails else "its logs are empty"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _prepare_directory(directory: Path) -> None:
    """A fresh state directory with the keys of this one box."""
    if not str(directory).isascii() or any(c in str(directory) for c in " \t\n\"',%"):
        raise BoxError(f"{directory}: the box's directory must have no blanks, quotes, commas or %")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    for name in ("client", "host"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"motorcade box {name}"]
        subprocess.run([*command, "-f", str(directory / name)], check=True, stdin=subprocess.DEVNULL)
    inside = Path(f"/run/box/live{directory}")
    (directory / "sshd_config").write_text(
        f"""\
HostKey {inside}/host
AuthorizedKeysFile {inside}/client.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
AddressFamily inet
LogLevel INFO
PrintMotd no
PrintLastLog no
MaxSessions 1000
AllowStreamLocalForwarding yes
StreamLocalBindUnlink yes
Ciphers aes128-gcm@openssh.com
KexAlgorithms curve25519-sha256
PidFile none
"""
    )
    key_type, key, *_ = (directory / "host.pub").read_text().split()
    (directory / "known_hosts").write_text(f"motorcade-box {key_type} {key}\n")


def _write_ssh_config(directory: Path, port: int) -> None:
    (directory / "ssh_config").write_text(
        f"""\
Host box
  HostName 127.0.0.1
  Port {port}
  User root
  HostKeyAlias motorcade-box
  UserKnownHostsFile {directory}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  IdentityFile {directory}/client
  IdentitiesOnly yes
  IdentityAgent none
  PreferredAuthentications publickey
  ControlPath {directory}/mux
  ControlMaster no
  StreamLocalBindUnlink yes
  LogLevel ERROR
  EscapeChar none
"""
    )


def _connect(box: Box, timeout: float) -> None:
    """Starts the one ssh connection that every run shares (a key exchange takes a second in there)."""
    with open(box.dir / "ssh.log", "wb") as log:
        command = [*box.ssh, "-o", "ControlMaster=yes", "-o", "ControlPersist=yes", "-f", "-N", "box"]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise BoxError(f"the box's sshd did not answer in {timeout:.0f} s; {_logs(box.dir)}") from None
    if done.returncode:
        raise BoxError(f"no ssh connection to the box; {_logs(box.dir)}")


def _alive(directory: Path) -> bool:
    """Whether any process of this box lives: they inherited a descriptor that holds the lock."""
    try:
        fd = os.open(directory / "alive", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _holders(directory: Path) -> Iterator[int]:
    """The processes that have this box's ``alive`` open."""
    wanted = (directory / "alive").stat()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended, or is somebody else's
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    status = fd.stat()
                    if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                        yield int(process.name)
                        break


def _kill_holders(directory: Path) -> None:
    """Kills the box's processes and waits until the last has let go of the lock."""
    for pid in list(_holders(directory)):
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)
    fd = os.open(directory / "alive", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)
