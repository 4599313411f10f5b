"""How a process gets its Boot, its descriptors, and afterwards its Life messages: one SOCK_SEQPACKET pair.

A Boot with its descriptors goes in as many packets as it takes, since the kernel carries at most 253
descriptors in one (SCM_MAX_FD) and a packet must fit the socket's send buffer. Each packet is a header, a run
of the encoded Boot, and up to FDS_PER_PACKET descriptors; the header of every packet repeats the totals, so
that a receiver can tell a short sequence from a whole one. Life messages are one packet each and carry no
descriptors.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import os
import socket
import struct
from collections.abc import Mapping, Sequence

from motorcade.proto import schema
from motorcade.proto.schema import Boot, Life, Malformed

FDS_PER_PACKET = 250
BYTES_PER_PACKET = 32 << 10
MAX_FDS = 4096
_MAGIC = b"MCB1"
_HEADER = struct.Struct("<4sIHH")  # magic, bytes of the Boot, descriptors in all, number of this packet
_FD_SIZE = array.array("i").itemsize


class BootError(Exception):
    """A Boot did not arrive whole, could not be sent, or is not a Boot. No descriptor was kept."""


def socketpair() -> tuple[socket.socket, socket.socket]:
    """A SEQPACKET pair, both ends CLOEXEC and blocking; the caller owns both.

    A process that is executed rather than forked gets its end by ``os.set_inheritable``.
    """
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def from_fd(fd: int) -> socket.socket:
    """The socket of a child's ``--boot-fd``; owns ``fd`` from here on, and makes it CLOEXEC.

    Raises BootError where ``fd`` is not a SEQPACKET unix socket; it is left open then.
    """
    try:
        probe = socket.socket(fileno=os.dup(fd))
    except OSError as e:
        raise BootError(f"descriptor {fd} is not the boot socket: {e.strerror}") from None
    with probe:
        if probe.family != socket.AF_UNIX or probe.type != socket.SOCK_SEQPACKET:
            raise BootError(f"descriptor {fd} is not a SOCK_SEQPACKET unix socket")
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def send_boot(sock: socket.socket, boot: Boot, fds: Mapping[str, int], timeout: float = 10.0) -> None:
    """Sends ``boot`` and ``fds`` (by label; the caller keeps and owns them) within ``timeout`` seconds a packet.

    ``boot.fd_labels`` is replaced by the labels of ``fds``. Raises BootError: the receiver is gone, does not
    read, or a descriptor is bad; ValueError where ``boot`` itself is out of bounds.
    """
    if len(fds) > MAX_FDS:
        raise ValueError(f"{len(fds)} descriptors, at most {MAX_FDS} are sent to one process")
    data = schema.encode_boot(dataclasses.replace(boot, fd_labels=tuple(fds)))
    numbers = list(fds.values())
    packets = max(-(-len(data) // BYTES_PER_PACKET), -(-len(numbers) // FDS_PER_PACKET))
    previous = sock.gettimeout()
    sock.settimeout(timeout)
    try:
        for n in range(packets):
            chunk = data[n * BYTES_PER_PACKET : (n + 1) * BYTES_PER_PACKET]
            some = numbers[n * FDS_PER_PACKET : (n + 1) * FDS_PER_PACKET]
            header = _HEADER.pack(_MAGIC, len(data), len(numbers), n)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", some))] if some else []
            sock.sendmsg([header, chunk], rights, socket.MSG_NOSIGNAL)
    except TimeoutError:
        raise BootError(f"the process did not read its Boot for {timeout} s") from None
    except OSError as e:
        raise BootError(f"the Boot could not be sent: {e.strerror}") from e
    finally:
        sock.settimeout(previous)


def recv_boot(sock: socket.socket) -> tuple[Boot, dict[str, int]]:
    """Waits for a Boot; the caller owns the returned descriptors, which are CLOEXEC.

    Raises BootError (peer gone, truncated, not a Boot, labels and descriptors do not match); every descriptor
    that had arrived is closed then.
    """
    fds: list[int] = []
    try:
        boot = _recv_boot(sock, fds)
    except BaseException as e:
        _close(fds)
        if isinstance(e, OSError):
            raise BootError(f"the Boot could not be received: {e.strerror}") from e
        if isinstance(e, Malformed):
            raise BootError(f"what arrived is not a Boot: {e}") from e
        raise
    return boot, dict(zip(boot.fd_labels, fds, strict=True))


def _recv_boot(sock: socket.socket, fds: list[int]) -> Boot:
    data = bytearray()
    total: tuple[int, int] | None = None
    number = 0
    while total is None or len(data) < total[0] or len(fds) < total[1]:
        packet, arrived, truncated = _recv_packet(sock, _HEADER.size + BYTES_PER_PACKET)
        fds.extend(arrived)
        if truncated:
            raise BootError("a packet of the Boot was truncated (too few free descriptors? see ulimit -n)")
        if not packet:
            raise BootError("the supervisor went away before the whole Boot had arrived")
        if len(packet) < _HEADER.size:
            raise BootError(f"a packet of {len(packet)} bytes is shorter than a header")
        magic, length, count, n = _HEADER.unpack_from(packet)
        if magic != _MAGIC or n != number or length > schema.MAX_BOOT_BYTES or count > MAX_FDS:
            raise BootError(f"packet {number} of the Boot has a bad header")
        if total is not None and total != (length, count):
            raise BootError("the packets of the Boot disagree about its size")
        total = (length, count)
        data += packet[_HEADER.size :]
        number += 1
        # A packet that brings nothing would let a sender keep us here for ever.
        if len(packet) == _HEADER.size and not arrived:
            raise BootError(f"packet {n} of the Boot is empty")
        if len(data) > length or len(fds) > count:
            raise BootError(f"{len(data)} bytes and {len(fds)} descriptors arrived, {length} and {count} were said")
    boot = schema.decode_boot(bytes(data))
    labels = boot.fd_labels
    if len(labels) != len(fds):
        raise BootError(f"{len(fds)} descriptors arrived for {len(labels)} labels")
    if len(set(labels)) != len(labels):
        raise BootError("two descriptors have the same label")
    return boot


def _recv_packet(sock: socket.socket, most: int) -> tuple[bytes, list[int], bool]:
    """One packet of at most ``most`` bytes, its descriptors (the caller's) and whether anything was cut off."""
    data, ancillary, flags, _ = sock.recvmsg(
        most,
        socket.CMSG_SPACE(FDS_PER_PACKET * _FD_SIZE),
        socket.MSG_CMSG_CLOEXEC,
    )
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            some = array.array("i")
            some.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
            fds.extend(some)
    return data, fds, bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))


def send_life(sock: socket.socket, life: Life, fds: Sequence[int] = ()) -> bool:
    """Sends one message, with ``fds`` (which stay the caller's) beside it; False when the other side is gone, which
    either side may be at any time.

    On a non-blocking socket raises BlockingIOError while its buffer is full.
    """
    data = schema.encode_life(life)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def recv_life(sock: socket.socket) -> Life | None:
    """The next message; None when the other side is gone.

    On a non-blocking socket raises BlockingIOError while there is none. Raises Malformed for anything that is
    not a Life message; the socket can still be read. Descriptors sent with it are closed.
    """
    life, fds = recv_life_fds(sock)
    _close(fds)
    return life


def recv_life_fds(sock: socket.socket) -> tuple[Life | None, list[int]]:
    """As recv_life, with the descriptors that came beside the message: CLOEXEC, and the caller's to close.

    Raises Malformed, too, where some were cut off (none is kept then).
    """
    try:
        data, fds, truncated = _recv_packet(sock, schema.MAX_LIFE_BYTES + 1)
    except ConnectionResetError:
        # It closed with words of ours unread. unix(7) says so first, and keeps its own last words for the next call.
        data, fds, truncated = _recv_packet(sock, schema.MAX_LIFE_BYTES + 1)
    if not data:
        _close(fds)
        return None, []
    try:
        if truncated:
            raise Malformed(
                f"a Life message has at most {schema.MAX_LIFE_BYTES} bytes and {FDS_PER_PACKET} descriptors"
            )
        return schema.decode_life(data), fds
    except Malformed:
        _close(fds)
        raise


def drain_life(sock: socket.socket) -> tuple[list[Life], bool]:
    """Every message that has arrived, without waiting, and whether the other side is there; closes descriptors.

    Raises Malformed at the first that is not a Life message; those before it are lost: end the process then.
    """
    messages, alive = drain_life_fds(sock)
    for _, fds in messages:
        _close(fds)
    return [life for life, _ in messages], alive


def drain_life_fds(sock: socket.socket) -> tuple[list[tuple[Life, list[int]]], bool]:
    """As drain_life, with the descriptors of each message, the caller's to close."""
    messages: list[tuple[Life, list[int]]] = []
    previous = sock.gettimeout()
    sock.setblocking(False)
    try:
        while True:
            life, fds = recv_life_fds(sock)
            if life is None:
                return messages, False
            messages.append((life, fds))
    except BlockingIOError:
        return messages, True
    except Malformed:
        for _, fds in messages:
            _close(fds)
        raise
    finally:
        sock.settimeout(previous)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
