"""The examples of the QMP reference, as data, and what replays them to a live guest by a raw socket and by qemu.qmp.

tests/kvm/test_qmp_examples.py replays them to a micro-guest, tests/guest/test_qmp_examples.py to Linux.

To add some: a module here with a GROUP (example.py says what an Example and a Group hold), and its name in GROUPS
below, before running.END. The groups are replayed one after the other on one VM, in the order of GROUPS, so a group
leaves the VM as it found it; each adds what it needs to the machine.yaml of all. A group with ``start`` has a VM of its
own. A group that needs drivers, which the micro-guest has not, says ``guests=("linux",)``.
"""

from __future__ import annotations

from harness.qmpexamples import balloon, hotplug, inspecting, looking, running, snapshots
from harness.qmpexamples.example import Group

GROUPS: tuple[Group, ...] = (
    inspecting.GROUP,
    looking.GROUP,
    balloon.WITHOUT_DRIVER,
    balloon.GROUP,
    running.GROUP,
    hotplug.GROUP,
    snapshots.GROUP,
    snapshots.INCOMING,
    running.END,
)
