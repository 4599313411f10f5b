"""The lifeline, and the boot link's last words: what was said before the end is heard, whatever was left unread."""

from __future__ import annotations

from motorcade.orchestrator import lifeline
from motorcade.proto import boot, schema


def test_last_words_after_a_reset() -> None:
    """vmmctl detaches and goes without having read all that the supervisor said."""
    vmmctl, supervisor = lifeline.pair()
    with supervisor:
        assert lifeline.send(supervisor, event="running")
        assert lifeline.send(vmmctl, do="detach")
        vmmctl.close()
        assert lifeline.receive(supervisor) == {"do": "detach"}
        assert lifeline.receive(supervisor) is None
        assert not lifeline.send(supervisor, event="ended")


def test_a_core_that_ends_with_words_unread() -> None:
    supervisor, core = boot.socketpair()
    with supervisor:
        boot.send_life(supervisor, schema.SidecarDied("root", "killed"))
        boot.send_life(core, schema.Ended(0, "guest-shutdown"))
        core.close()
        assert boot.recv_life(supervisor) == schema.Ended(0, "guest-shutdown")
        assert boot.recv_life(supervisor) is None


def test_a_vmmctl_that_does_not_read() -> None:
    """The supervisor never waits for it."""
    vmmctl, supervisor = lifeline.pair()
    with vmmctl, supervisor:
        sent = 0
        while lifeline.send(supervisor, event="progress", text="x" * 10_000):
            sent += 1
            assert sent < 10_000
