"""Sidecars that are replaced: when one has died or hangs, and when somebody asks for it.

A replacement gets what the last one had: the supervisor keeps a copy of every descriptor. It is a fork of this process,
and so warm; after an upgrade it is a new interpreter that runs the code on disk. The first few deaths are answered at
once. Where they go on, the next ones wait, each twice as long as the one before; and a device whose sidecar has died
``restarts`` times within a minute has failed: it stays without one until somebody asks for it (`vmmctl sidecar
restart`).

What the core has to do with it is in core/recovery.py.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from motorcade.orchestrator.errors import UserError
from motorcade.proto import boot, schema

if TYPE_CHECKING:
    from motorcade.orchestrator.processes import Processes
    from motorcade.orchestrator.resources import Device
    from motorcade.orchestrator.spawn import Child

log = logging.getLogger("motorcade.supervisor")

WINDOW = 60.0  # seconds in which deaths are counted
BACK_OFF = 0.05  # seconds before the first replacement that has to wait; doubled with each, up to
BACK_OFF_MAX = 2.0
STANDBY_TIMEOUT = 60.0  # for a successor to be ready


@dataclass
class _Story:
    """What has become of one device's sidecars."""

    deaths: deque[float] = field(default_factory=deque)  # monotonic, within the window
    due: float | None = None  # when the next replacement is to come
    failed: str = ""  # why there is none
    restarts: int = 0  # processes that took another's place
    code: str | None = None  # None: a fork of ours; else what an upgrade named, "" being the default path
    standby: Child | None = None
    standby_code: str | None = None
    standby_due: float = 0.0
    handed_over: bool = False  # the present one is ended for the one that stands by


class Revival:
    """Of one VM. Nothing here waits: ``due`` and ``look`` are called by the supervisor's loop."""

    def __init__(self, processes: Processes, most: int, changed: Callable[[str, str], None]) -> None:
        """``most``: deaths within the window before a device fails; 0: nothing is ever replaced. ``changed(role,
        text)`` is told what a person should know."""
        self._processes, self._most, self._changed = processes, most, changed
        self._stories: dict[str, _Story] = {}
        self._ending = False

    def _story(self, device_id: str) -> _Story:
        return self._stories.setdefault(device_id, _Story())

    def restarts(self, device_id: str) -> int:
        """How often a process has taken another's place."""
        return self._stories[device_id].restarts if device_id in self._stories else 0

    def status(self, device_id: str) -> str:
        """For a person: what is to be said of a device that is not simply served, or nothing."""
        story = self._stories.get(device_id)
        if story is None:
            return ""
        return f"failed: {story.failed}" if story.failed else "restarting" if story.due is not None else ""

    # Deaths.

    def died(self, child: Child, why: str) -> None:
        """A sidecar, or one that stands by, has ended while the VM runs."""
        story = self._story(child.device_id)
        if child is story.standby:
            self._standby_died(child, story, why)
        elif story.handed_over and story.standby is not None:
            self._tell_died(child, "it was replaced", replaced=True)
            self._promote(child.device_id, story)
        elif self._ending or self._processes.device(child.device_id) is None:
            self._tell_died(child, why, replaced=False)
        else:
            if story.standby is not None:  # it was prepared for another situation
                story.standby.failure = story.standby.failure or "the present one died meanwhile"
                story.standby.kill()
            self._count(child, story, why)

    def _count(self, child: Child, story: _Story, why: str) -> None:
        now = time.monotonic()
        story.deaths.append(now)
        while story.deaths[0] < now - WINDOW:
            story.deaths.popleft()
        if len(story.deaths) > self._most:
            times = "" if self._most == 0 else f"{len(story.deaths)} times within {WINDOW:g} s, at last: "
            self._fail(child.device_id, child.role, times + why)
            return
        self._tell_died(child, why, replaced=True)
        late = len(story.deaths) - 1 - self._most // 2
        wait = 0.0 if late < 0 else min(BACK_OFF * 2**late, BACK_OFF_MAX)
        self._changed(child.role, f"{why}; it is replaced" + (f" in {wait:g} s" if wait else ""))
        story.due = now + wait
        if not wait:
            self.look()

    def _fail(self, device_id: str, role: str, why: str) -> None:
        story = self._story(device_id)
        story.due, story.failed = None, why
        log.error("%s has failed: %s", role, why)
        self._processes.tell_core(schema.SidecarDied(device_id, why[:4000]))
        self._changed(role, f"{why}; its device has failed (vmmctl sidecar restart gives it another)")

    def _tell_died(self, child: Child, why: str, *, replaced: bool) -> None:
        self._processes.tell_core(schema.SidecarDied(child.device_id, why[:4000], replaced))

    def ending(self) -> None:
        """The VM ends: nobody is replaced any more, and the core is told of those who will not come."""
        self._ending = True
        for device_id, story in self._stories.items():
            if story.standby is not None:
                story.standby.kill()
            if story.due is not None:
                story.due = None
                self._processes.tell_core(schema.SidecarDied(device_id, "the VM ends"))

    # Replacements.

    def due(self) -> float | None:
        """When ``look`` has something to do (monotonic)."""
        times = [s.due for s in self._stories.values() if s.due is not None]
        waited_for = [s for s in self._stories.values() if s.standby is not None and s.standby.state == "starting"]
        times += [s.standby_due for s in waited_for]
        return min(times, default=None)

    def look(self) -> None:
        """Does what is due."""
        now = time.monotonic()
        for device_id, story in list(self._stories.items()):
            if story.due is not None and story.due <= now:
                story.due = None
                device = self._processes.device(device_id)
                if device is not None:
                    self._replace(device, story)
            standby = story.standby
            if standby is not None and standby.state == "starting" and story.standby_due <= now:
                standby.failure = standby.failure or f"not ready within {STANDBY_TIMEOUT:g} s"
                standby.kill()

    def _replace(self, device: Device, story: _Story) -> None:
        self._processes.renew(device)
        try:
            child = self._processes.fork_successor(device, story.code)
        except (OSError, UserError) as e:  # no process to be had is this device's end, and not the VM's
            self._fail(device.id, device.role, f"no other process can be started: {e}")
            return
        self._processes.sidecars[device.id] = child
        story.restarts += 1
        self._processes.tell_core(schema.SidecarReplaced(device.id, child.pid))
        self._processes.boot_successor(device, child, standby=False)

    # Restarts and upgrades.

    def restart(self, life: schema.RestartSidecar) -> None:
        """The core wants a successor for a device's sidecar, which is there, or has failed."""
        device = self._processes.device(life.device_id)
        if device is None:
            self._answer(life.device_id, "there is no such device")
            return
        story = self._story(device.id)
        if device.connection is not None:
            self._answer(device.id, "its backend serves one process at a time, so that none can stand by")
            return
        if story.standby is not None:
            self._answer(device.id, "one that is to replace it is being started already")
            return
        story.standby_code = life.path if life.upgrade else story.code
        try:
            story.standby = self._processes.fork_successor(device, story.standby_code)
        except (OSError, UserError) as e:
            self._answer(device.id, str(e))
            return
        story.standby_due = time.monotonic() + STANDBY_TIMEOUT
        self._processes.boot_successor(device, story.standby, standby=True)

    def ready(self, child: Child) -> None:
        """A process is set up; perhaps one that stands by."""
        story = self._stories.get(child.device_id)
        if story is None or child is not story.standby:
            return
        if not story.handed_over:
            self._answer(child.device_id, "")

    def hand_over(self, life: schema.HandOver) -> None:
        """The present one is at rest, or gone; or the successor is not to come after all."""
        story = self._stories.get(life.device_id)
        if story is None or story.standby is None:
            return  # it has come already, after a death
        if life.cancel:
            story.standby.kill()
            return
        story.handed_over = True
        present = self._processes.sidecars.get(life.device_id)
        if present is not None and present.alive:
            present.kill()  # at rest: it has nothing that is not in its files or in what is kept
        else:
            self._promote(life.device_id, story)

    def _promote(self, device_id: str, story: _Story) -> None:
        child, story.standby, story.handed_over = story.standby, None, False
        assert child is not None
        story.code, story.failed, story.due = story.standby_code, "", None
        story.deaths.clear()
        story.restarts += 1
        self._processes.sidecars[device_id] = child
        self._processes.tell_core(schema.SidecarReplaced(device_id, child.pid))
        boot.send_life(child.link, schema.Go())
        log.info("%s: process %d takes over, as was asked for", child.role, child.pid)

    def _standby_died(self, child: Child, story: _Story, why: str) -> None:
        story.standby = None
        if story.handed_over:  # the present one is gone as well: as after any death
            story.handed_over = False
            present = self._processes.sidecars.get(child.device_id)
            if present is None or not present.alive:
                story.due = time.monotonic()
                self.look()
        self._answer(child.device_id, why)

    def _answer(self, device_id: str, error: str) -> None:
        self._processes.tell_core(schema.SidecarReady(device_id, error[:4000]))

    def standing_by(self) -> list[Child]:
        """Successors that nobody has made way for yet."""
        return [story.standby for story in self._stories.values() if story.standby is not None]
