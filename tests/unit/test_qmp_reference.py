"""The commands that clients of QEMU and StratoVirt expect: all there, and each in an example that is replayed."""

from __future__ import annotations

from harness.qmpexamples import GROUPS
from motorcade.core.qmp import server
from motorcade.core.qmp.registry import registry

REFERENCE = {
    "qmp_capabilities", "query-version", "query-commands", "query-events", "query-qmp-schema", "query-kvm",
    "query-target", "query-name", "query-uuid", "query-status", "query-cpus", "query-cpus-fast",
    "query-hotpluggable-cpus", "stop", "cont", "system_reset", "system_powerdown", "quit", "blockdev-add",
    "blockdev-del", "netdev_add", "netdev_del", "device_add", "device_del", "balloon", "query-balloon", "migrate",
    "query-migrate", "migrate_cancel", "migrate-set-capabilities", "query-migrate-capabilities", "migrate-incoming",
    "save-devices-state", "xen-save-devices-state", "load-devices-state", "xen-load-devices-state", "getfd",
    "closefd", "query-block", "query-blockstats", "query-named-block-nodes", "query-chardev", "query-iothreads",
    "query-memory-size-summary", "dump-guest-memory", "query-mem-gpa", "query-vcpu-reg", "trace-get-state",
    "trace-set-state", "human-monitor-command",
}  # fmt: skip


def test_all_are_there() -> None:
    assert server.COMMANDS
    assert not REFERENCE - {*registry.names()}


def test_all_have_an_example_that_succeeds() -> None:
    shown = {example.command for group in GROUPS for example in group.examples if not example.error}
    assert not REFERENCE - shown
