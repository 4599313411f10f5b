"""Feeds mutated control messages, Boots and Lives to the decoders: ``python proto_mutate.py SEED SECONDS``.

A program of its own, so that an abort inside pycapnp is seen by whoever started it. It prints the seed and the last
input (hex) on an unexpected exception, and counts at its end.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

from motorcade.proto import schema
from motorcade.proto.memory import Region

_SAMPLES: list[tuple[Callable[[bytes], object], bytes]] = []


def _samples() -> None:
    m = schema
    bodies: list[schema.Body] = [
        m.Hello(1, "disk0", 42, 2, 1 << 40, (256, 128, 64), b"\x01\x02" * 30),
        m.Activate(1 << 32, tuple(m.Queue(i, 256, 4096, 8192, 12288) for i in range(4))),
        m.ConfigWrite(4, b"abcd"),
        m.Error(m.ErrorCode.STATE, "not now"),
        m.StatsReport(tuple(m.QueueStats(i) for i in range(3)), (m.Counter("merged", 7), m.Counter("split", 1))),
        m.ConfigChanged(bytes(60)),
        m.NeedsReset(1, "descriptor loop"),
        m.Ok(),
    ]
    _SAMPLES.extend((m.decode, m.encode(m.Message(9, 1000, body))) for body in bodies)
    devices = tuple(m.Slot(f"d{i}", "blk", i, 1, i, '{"a": 1}') for i in range(3))
    roles: list[schema.Role] = [
        m.CoreBoot("uuid", 2, "console=ttyS0", devices, "com1"),
        m.BlkBoot("disk0", "/x.img", serial="abc"),
        m.NetBoot("net0", b"\x52\x54\0\0\0\1"),
        m.SerialBoot("com1", "uart", "pty"),
        m.KitBoot("rng0", "rng", '{"rate": 1}'),
    ]
    boots = [m.Boot(1, "vm", "/run/x", (Region(0, 4096, 0),), "INFO", role, ("memory", "log")) for role in roles]
    _SAMPLES.extend((m.decode_boot, m.encode_boot(boot)) for boot in boots)
    lives: list[schema.Life] = [
        m.Failed("why"),
        m.Ended(1, "internal-error", "rip"),
        m.SidecarDied("a", "b"),
        m.Ready(),
    ]
    _SAMPLES.extend((m.decode_life, m.encode_life(life)) for life in lives)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A neighbour of ``data``: flipped bits, copied or repeated words, wild pointers, cut or grown ends."""
    buffer = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        word = rng.randrange(max(1, len(buffer) // 8)) * 8
        match rng.randrange(8):
            case 0 if buffer:
                buffer[rng.randrange(len(buffer))] ^= 1 << rng.randrange(8)
            case 1 if buffer:
                buffer[rng.randrange(len(buffer))] = rng.choice((0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF))
            case 2:
                buffer[word : word + 8] = rng.randbytes(8)
            case 3:  # a pointer of each kind, near and far, to anywhere, claiming anything
                kind, offset, rest = rng.randrange(4), rng.randrange(-32, 33), rng.getrandbits(rng.choice((8, 16, 32)))
                buffer[word : word + 8] = ((offset & 0x3FFFFFFF) << 2 | kind | rest << 32).to_bytes(8, "little")
            case 4:
                other = rng.randrange(max(1, len(buffer) // 8)) * 8
                buffer[word : word + 8] = buffer[other : other + 8]
            case 5:
                buffer[word:word] = buffer[word : word + 8 * rng.randrange(1, 9)]
            case 6:
                del buffer[word : word + 8 * rng.randrange(1, 4)]
            case _:  # the segment table
                buffer[0:4] = rng.choice((0, 1, 2, 511, 512, 0xFFFFFFFF)).to_bytes(4, "little")
    if rng.randrange(16) == 0:
        del buffer[rng.randrange(len(buffer) + 1) :]
    return bytes(buffer)


def main(seed: int, seconds: float) -> int:
    """0 when nothing but Malformed was raised and no input took longer than a tenth of a second."""
    _samples()
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    runs = accepted = 0
    slowest = 0.0
    data = b""
    try:
        while time.monotonic() < end:
            for _ in range(200):
                decode, sample = rng.choice(_SAMPLES)
                data = mutate(rng, sample)
                runs += 1
                before = time.process_time()
                try:
                    decode(data)
                    accepted += 1
                except schema.Malformed:
                    pass
                slowest = max(slowest, time.process_time() - before)
    except Exception:
        print(f"seed {seed}, input {data.hex()}", file=sys.stderr)
        raise
    print(f"{runs} inputs, {accepted} of them messages, slowest {slowest * 1000:.1f} ms")
    return 0 if slowest < 0.1 else 1


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), float(sys.argv[2])))
