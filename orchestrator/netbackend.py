"""The host's end of a NIC, opened by the supervisor: a tap, a passt process, a link to another VM.

Every error that a person can act on is a UserError, one clear line. The fds are the caller's.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EACCES, EBUSY, EINVAL, ENODEV, ENOENT, ENXIO, EPERM
from pathlib import Path

from motorcade.orchestrator.errors import UserError

PASST_DEADLINE = 10.0  # seconds to its first answer; it takes 0.05
_FORWARD = re.compile(r"(?:(tcp|udp):)?(?:([0-9.]+|\[[0-9a-fA-F:]+\]):)?([0-9]{1,5}):([0-9]{1,5})")


def open_tap(ifname: str, queues: int = 1) -> list[int]:
    """Opens ``queues`` queues of an existing tap: non-blocking, CLOEXEC, with 12-byte virtio headers.

    None is created: a tap is somebody's decision about the host's network (``ip tuntap add``).
    """
    from motorcade.sidecars._net import ffi, lib

    if not 1 <= queues <= lib.MC_NET_MAX_PAIRS:
        raise UserError(f"tap {ifname}: {queues} queues; 1 to {lib.MC_NET_MAX_PAIRS} are possible")
    try:
        socket.if_nametoindex(ifname)
    except OSError:
        multi = " multi_queue" if queues > 1 else ""
        raise UserError(
            f"tap {ifname}: there is no such interface (make it with: "
            f"ip tuntap add {ifname} mode tap{multi} user $USER && ip link set {ifname} up)"
        ) from None
    fds = ffi.new("int[]", queues)
    step = ffi.new("int *")
    if error := -lib.mc_tap_open(ifname.encode(), queues, fds, step):
        raise UserError(f"tap {ifname}: {_tap_error(ifname, queues, error, step[0])}")
    return list(fds)


def adopt_taps(name: str, fds: Sequence[int]) -> str:
    """Makes queues of a tap, opened by somebody else (``fds``, the caller's), what ``open_tap`` gives. Its name."""
    from motorcade.sidecars._net import ffi, lib

    names = set()
    for fd in fds:
        ifname = ffi.new("char[16]")
        if error := -lib.mc_tap_adopt(fd, ifname):
            what = "it is no tap with IFF_NO_PI and IFF_VNET_HDR" if error == EINVAL else os.strerror(error)
            raise UserError(f"network backend {name}: a descriptor cannot be used: {what}")
        names.add(ffi.string(ifname).decode())
    if len(names) > 1:
        raise UserError(f"network backend {name}: its descriptors are of several taps: {', '.join(sorted(names))}")
    return names.pop()


def _tap_error(ifname: str, queues: int, error: int, step: int) -> str:
    from motorcade.sidecars._net import lib

    if step == lib.MC_TAP_OPEN_TUN:
        if error in (ENOENT, ENXIO, ENODEV):
            return "there is no /dev/net/tun here (modprobe tun)"
        if error in (EACCES, EPERM):
            return "/dev/net/tun: permission denied"
        return f"/dev/net/tun: {os.strerror(error)}"
    if step == lib.MC_TAP_SETIFF:
        if error == EBUSY:
            return "in use by another process"
        if error == EPERM:
            return "not permitted: it belongs to another user (make it with 'user NAME', or run as root)"
        if error == EINVAL:
            return "an interface, but not a tap"
        return os.strerror(error)
    if step == lib.MC_TAP_ONE_QUEUE:
        return f"made for one queue, not for {queues} (ip tuntap add {ifname} mode tap multi_queue)"
    return f"no virtio headers: {os.strerror(error)}"


def link(path: str) -> int:
    """The directory ``path`` where the net sidecars of two VMs meet, made if it does not exist, opened for reading.

    Either may come first. Whoever may write to the directory may be the other end (mode 0700 where it is made here).
    """
    where = Path(path)
    try:
        where.mkdir(mode=0o700, exist_ok=True)
        return os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileExistsError:
        raise UserError(f"link {path}: exists and is not a directory") from None
    except OSError as e:
        raise UserError(f"link {path}: {e.strerror}") from None


def open_capture(path: str) -> int:
    """Opens a pcap file for appending, made where it does not exist (mode 0600)."""
    from motorcade.sidecars._net import lib

    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise UserError(f"capture {path}: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        # Anything that can make a write wait could stop the traffic.
        raise UserError(f"capture {path}: not a regular file")
    if lib.mc_pcap_check(fd) != 1:
        os.close(fd)
        raise UserError(f"capture {path}: exists and is no pcap file with nanoseconds; it is left alone")
    return fd


@dataclass(frozen=True)
class Forward:
    """A port of the host that reaches the guest. ``address`` empty: all."""

    protocol: str  # tcp or udp
    address: str
    host_port: int
    guest_port: int

    @classmethod
    def parse(cls, rule: str) -> Forward:
        """``[udp:][ADDRESS:]HOSTPORT:GUESTPORT``."""
        match = _FORWARD.fullmatch(rule)
        if not match or not all(0 < int(port) < 65536 for port in match.groups()[2:]):
            raise UserError(f"forward {rule!r} is not [udp:][ADDRESS:]HOSTPORT:GUESTPORT")
        protocol, address, host, guest = match.groups()
        address = (address or "").strip("[]")
        try:
            if address:
                socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        except OSError:
            raise UserError(f"forward {rule!r}: {address} is not an address") from None
        return cls(protocol or "tcp", address, int(host), int(guest))

    @property
    def option(self) -> list[str]:
        """As passt(1) has it."""
        spec = f"{self.host_port}:{self.guest_port}"
        return ["-u" if self.protocol == "udp" else "-t", f"{self.address}/{spec}" if self.address else spec]

    def check_free(self) -> None:
        """passt is content with one of several addresses; a port that is taken on IPv4 would only show in use."""
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        kind = socket.SOCK_DGRAM if self.protocol == "udp" else socket.SOCK_STREAM
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.address, self.host_port))
                if kind == socket.SOCK_STREAM:
                    probe.listen(1)
            except OSError as e:
                where = f"{self.address or '*'}:{self.host_port}"
                raise UserError(f"forward: {self.protocol} port {where} of the host: {e.strerror}") from None


def spawn_passt(
    forward: Sequence[str] = (), *, mtu: int | None = None, log_fd: int | None = None, program: str = "passt"
) -> tuple[int, int]:
    """Starts passt(1) for one NIC and waits until it serves. Returns a connected stream socket and its pid.

    passt lives as long as any copy of that socket is open, and is the caller's child to reap. As root it becomes
    nobody, as any user it confines itself to a namespace without file systems. ``mtu`` is what its DHCP says. Its words
    go to ``log_fd`` (not owned); without one they are kept only to explain a failure.
    """
    rules = [Forward.parse(rule) for rule in forward]
    path = shutil.which(program)
    if path is None:
        raise UserError("networking for users needs passt, which is not installed (apt install passt)")
    for rule in rules:
        rule.check_free()
    command = [program, "--foreground", "--quiet", *(option for rule in rules for option in rule.option)]
    if not any(rule.protocol == "udp" for rule in rules):
        command += ["-u", "none"]  # or every TCP port would be a UDP port as well
    if mtu:
        command += ["--mtu", str(mtu)]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    words = os.memfd_create("passt", os.MFD_CLOEXEC) if log_fd is None else os.dup(log_fd)
    start = os.lseek(words, 0, os.SEEK_END)
    try:
        with theirs:
            theirs.set_inheritable(True)
            pid = _spawn(path, [*command, "--fd", str(theirs.fileno())], words)
        _await_service(ours, pid, words, start)
    except BaseException:
        ours.close()
        raise
    finally:
        os.close(words)
    ours.setblocking(False)
    return ours.detach(), pid


def _spawn(path: str, argv: list[str], words: int) -> int:
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A new session: the terminal's Ctrl-C is vmmctl's business.
        return os.posix_spawn(
            path,
            argv,
            dict(os.environ),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, words, 1),
                (os.POSIX_SPAWN_DUP2, words, 2),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
        )
    finally:
        os.close(null)


def _await_service(sock: socket.socket, pid: int, words: int, start: int) -> None:
    """Asks as a guest would, since passt tells nobody else that it is ready: its first answer is taken off the stream,
    and nothing of the guest's has been assumed."""
    pidfd = os.pidfd_open(pid)
    try:
        failed = False
        try:
            for frame in _arp_probe(), _router_solicitation():
                sock.sendall(struct.pack("!I", len(frame)) + frame)
        except OSError:
            failed = True
        deadline = time.monotonic() + PASST_DEADLINE
        if not failed:
            failed = not _recv_frame(sock, deadline)
        if failed:
            # Ended by itself, or silent: no answer to come either way.
            ended = bool(select.select([pidfd], [], [], 1.0)[0])
            if not ended:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)
            text = os.pread(words, 65536, start).decode(errors="replace") if _readable(words) else ""
            lines = [s for s in text.splitlines() if s and "syslog" not in s and not s.startswith("Don't run as root")]
            raise UserError(f"passt: {lines[-1] if lines else 'it ended' if ended else 'it does not answer'}")
    finally:
        os.close(pidfd)


def _readable(fd: int) -> bool:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY


def _recv_frame(sock: socket.socket, deadline: float) -> bool:
    """Takes one whole frame off the stream and nothing behind it. False: the end, or too late."""
    want, got = 4, b""
    while len(got) < want:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([sock], [], [], left)[0]:
            return False
        try:
            part = sock.recv(want - len(got))
        except ConnectionResetError:
            return False
        if not part:
            return False
        got += part
        if len(got) == 4 and want == 4:
            want += int.from_bytes(got, "big")
    return True


_PROBE_MAC = bytes.fromhex("020000000001")


def _arp_probe() -> bytes:
    """RFC 5227: an ARP request from nobody, for an address that nobody has. passt answers for all addresses."""
    eth = b"\xff" * 6 + _PROBE_MAC + b"\x08\x06"
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    return eth + arp + _PROBE_MAC + bytes(4) + bytes(6) + bytes([169, 254, 254, 254])


def _router_solicitation() -> bytes:
    """RFC 4861, from the unspecified address: for hosts with IPv6 alone, where ARP is not answered."""
    source, target = bytes(16), bytes.fromhex("ff020000000000000000000000000002")
    body = struct.pack("!BBHI", 133, 0, 0, 0)
    total = sum(struct.unpack("!20H", source + target + struct.pack("!II", len(body), 58)))
    total += sum(struct.unpack("!4H", body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    ip = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + source + target
    return bytes.fromhex("333300000002") + _PROBE_MAC + b"\x86\xdd" + ip + body
