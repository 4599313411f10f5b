"""The rng sidecar: a real process, the driver simulator. What it shares with every device of the kit is tested here."""

from __future__ import annotations

import json
import os
import time

import pytest

from harness.sidecar import Sidecar, SidecarGone
from motorcade.proto import messages as m

ROLE = m.KitBoot("rng0", "rng")


def rng(role: m.KitBoot = ROLE, **options: object) -> Sidecar:
    """The sidecar, with its hello."""
    return Sidecar("rng", role, {}, queues=1, **options)  # type: ignore[arg-type]


def limited(rate: int) -> m.KitBoot:
    return m.KitBoot("rng0", "rng", json.dumps({"rate": rate}))


@pytest.mark.parametrize("cold", [False, True])
def test_a_buffer_comes_back_full_of_what_was_not_there_before(cold: bool) -> None:
    with rng(cold=cold) as sidecar:
        assert sidecar.hello is not None and sidecar.hello.virtio_type == 4
        (queue,) = sidecar.start()
        first, second = (queue.run(into=[32, 100]).data for _ in range(2))
        assert [len(part) for part in first] == [32, 100]
        assert first != second and first != [b"\xa5" * 32, b"\xa5" * 100]
        (stats,) = sidecar.stats().queues
        assert (stats.requests, stats.bytes_out, stats.bytes_in, stats.errors) == (2, 264, 0, 0)
        assert sidecar.shutdown() == 0


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_many_at_once_all_come_back(event_idx: bool, indirect: bool) -> None:
    with rng() as sidecar:
        (queue,) = sidecar.start(event_idx=event_idx, indirect=indirect)
        for _ in range(20):
            requests = [queue.submit(into=[64], indirect=indirect) for _ in range(queue.size)]
            queue.kick()
            queue.wait(queue.size)
            assert all(r.written == 64 for r in requests)
            assert len({r.data[0] for r in requests}) == queue.size


def test_a_huge_buffer_gets_a_part() -> None:
    with rng() as sidecar:
        (queue,) = sidecar.start()
        assert queue.run(into=[1 << 20]).written == 64 << 10


def test_the_rate_is_kept_and_does_not_block_the_process() -> None:
    with rng(limited(4096)) as sidecar:
        (queue,) = sidecar.start()
        start = time.monotonic()
        assert queue.run(into=[10000]).written == 4096  # the bucket was full
        for _ in range(2):
            assert queue.run(into=[512]).written == 512
        assert time.monotonic() - start >= 0.25  # 1024 bytes more than the bucket held, at 4096 a second
        queue.submit(into=[4096])
        queue.kick()
        sidecar.reset()  # while it waits


def test_a_request_that_waits_for_the_rate_is_in_the_ring_of_a_snapshot_and_answered_after_it() -> None:
    with rng(limited(64)) as sidecar:
        (queue,) = sidecar.start()
        assert queue.run(into=[64]).written == 64
        waiting = queue.submit(into=[64])
        queue.kick()
        sidecar.quiesce()
        before = sidecar.memory.pages()
        state = sidecar.save()
        assert sidecar.save() == state and state.data == b""
        assert sidecar.memory.pages() == before
        # On a machine that took more than a second to get here it has been answered.
        assert state.queues[0].last_avail == state.queues[0].used_idx == 1 or queue.used_idx == 2
        sidecar.kill()
        with rng(incoming=True, predecessor=sidecar) as clone:
            clone.restore(state, [queue])
            assert clone.save() == state
            assert clone.memory.pages() == before
            clone.resume()
            queue.wait(1)
            assert waiting.done and waiting.written == 64


def test_what_it_writes_is_in_the_dirty_log() -> None:
    with rng() as sidecar:
        (queue,) = sidecar.start()
        before = sidecar.memory.pages()
        sidecar.memory.take_dirty()
        queue.run(into=[8192, 64])
        sidecar.quiesce()
        dirty = sidecar.memory.take_dirty()
        after = sidecar.memory.pages()
        driver = {queue.driver // 4096, queue.desc // 4096}  # what the driver itself wrote
        changed = {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
        assert changed - driver <= dirty
        assert any(page in dirty for page in changed)


def test_a_reset_forgets_the_driver_and_the_next_one_starts_afresh() -> None:
    with rng() as sidecar:
        for _ in range(3):
            (queue,) = sidecar.start(16)
            assert queue.run(into=[16]).written == 16
            sidecar.reset()
            queue.submit(into=[16])
            queue.kick(force=True)
            sidecar.ask(m.Ping())
            assert queue.used_idx == 1
            queue.restart()


def test_a_buffer_that_cannot_be_written_breaks_the_queue_and_nothing_else() -> None:
    with rng() as sidecar:
        (queue,) = sidecar.start()
        queue.submit(out=[b"for you"])
        queue.kick()
        assert "lacks a part" in sidecar.wait_needs_reset().reason
        sidecar.reset()
        queue.restart()
        sidecar.activate([queue])
        assert queue.run(into=[8]).written == 8


@pytest.mark.parametrize("addr", [1 << 40, (1 << 64) - 8])
def test_a_buffer_outside_ram_breaks_the_queue(addr: int) -> None:
    with rng() as sidecar:
        (queue,) = sidecar.start()
        queue.write_desc(0, addr, 16, 2)
        queue.put_avail(0)
        queue.publish()
        queue.kick(force=True)
        assert "outside RAM" in sidecar.wait_needs_reset().reason


@pytest.mark.parametrize(
    "state", [m.DeviceState(2, b"", ()), m.DeviceState(0, b"", ()), m.DeviceState(1, os.urandom(8), ())]
)
def test_a_state_of_another_kind_is_refused(state: m.DeviceState) -> None:
    with rng(incoming=True) as sidecar:
        outcome = sidecar.request(m.Load(state))
        assert isinstance(outcome, m.Error) and "state" in outcome.text


@pytest.mark.parametrize("options", ["{", '{"rate": 0}', '{"rate": "fast"}', '{"colour": 1}', "[]"])
def test_options_that_are_none_end_it_at_once(options: str) -> None:
    with pytest.raises(SidecarGone, match=r"DecodeError|ValidationError"):
        rng(m.KitBoot("rng0", "rng", options))


def test_the_boot_of_another_kind_is_refused() -> None:
    with pytest.raises(SidecarGone, match="another kind"):
        Sidecar("rng", m.NetBoot("n", bytes(6)), {}, queues=1)
