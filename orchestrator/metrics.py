"""The VM's metrics in Prometheus' text format (exposition format 0.0.4), written by hand: its client library would cost
every supervisor 95 ms at the start.

Everything comes from what the supervisor has: the kernel says what its processes cost, and queues are counted in memory
that it shares with the sidecars. Nobody is asked, so a sidecar or a core that hangs holds up no scrape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_FIRST_BUCKET, _LAST_BUCKET = 9, 36  # up to 1.024 us, and up to 137 s; what is longer is in +Inf
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Metric:
    """A family: its help, its type, and its samples as labels and value. A histogram's value is a pair: a count by
    bucket of 2^n ns, and the sum in ns."""

    name: str
    kind: str
    help: str
    samples: list[tuple[Mapping[str, str], Any]]


def render(metrics: Iterable[Metric]) -> str:
    """The text; families without samples are left out."""
    lines: list[str] = []
    for metric in metrics:
        if not metric.samples:
            continue
        lines += [f"# HELP {metric.name} {_help(metric.help)}", f"# TYPE {metric.name} {metric.kind}"]
        for labels, value in metric.samples:
            if metric.kind == "histogram":
                lines += _histogram(metric.name, labels, value[0], value[1])
            else:
                lines.append(f"{metric.name}{_labels(labels)} {_number(value)}")
    return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Mapping[str, str], buckets: Iterable[int], total_ns: int) -> list[str]:
    lines, seen = [], 0
    for n, count in enumerate(buckets):
        seen += count
        if _FIRST_BUCKET <= n <= _LAST_BUCKET:
            bound = (2 << n) / 1e9
            lines.append(f"{name}_bucket{_labels({**labels, 'le': f'{bound:.9g}'})} {seen}")
    lines.append(f"{name}_bucket{_labels({**labels, 'le': '+Inf'})} {seen}")
    lines.append(f"{name}_sum{_labels(labels)} {_number(total_ns / 1e9)}")
    lines.append(f"{name}_count{_labels(labels)} {seen}")
    return lines


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    inner = ",".join(f'{key}="{_escape(value)}"' for key, value in labels.items())
    return "{" + inner + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def of_vm(status: Mapping[str, Any]) -> list[Metric]:
    """The families of a VM's status (status.py)."""
    vm = {"vm": str(status["name"])}
    processes, queues = status["processes"], status["queues"]

    def of_processes(key: str) -> list[tuple[Mapping[str, str], Any]]:
        return [({**vm, "role": p["role"]}, p[key]) for p in processes if p.get(key) is not None]

    def of_queues(key: str) -> list[tuple[Mapping[str, str], Any]]:
        return [({**vm, "device": q["device"], "queue": str(q["index"])}, q[key]) for q in queues]

    return [
        Metric("motorcade_vm_up", "gauge", "1 while the guest may run.", [(vm, int(status["status"] == "running"))]),
        Metric("motorcade_vm_start_time_seconds", "gauge", "When the VM was started, since the epoch.",
               [(vm, status["started"])]),
        Metric("motorcade_vm_memory_bytes", "gauge", "RAM of the guest.", [(vm, status["memory"])]),
        Metric("motorcade_vm_cpus", "gauge", "Virtual CPUs.", [(vm, status["cpus"])]),
        Metric("motorcade_process_up", "gauge", "1 while the process lives.", of_processes("up")),
        Metric("motorcade_process_restarts_total", "counter", "How often another took its place.",
               of_processes("restarts")),
        Metric("motorcade_process_uptime_seconds", "gauge", "Since the process was forked.", of_processes("uptime")),
        Metric("motorcade_process_cpu_seconds_total", "counter", "Processor time, user and system.",
               of_processes("cpu")),
        Metric("motorcade_process_resident_memory_bytes", "gauge", "Resident memory, with what it shares.",
               of_processes("rss")),
        Metric("motorcade_process_proportional_memory_bytes", "gauge",
               "Its share of the memory that it shares with others (PSS).", of_processes("pss")),
        Metric("motorcade_queue_requests_total", "counter", "Requests answered.", of_queues("requests")),
        Metric("motorcade_queue_errors_total", "counter", "Requests answered with an error.", of_queues("errors")),
        Metric("motorcade_queue_from_guest_bytes_total", "counter", "Data from the guest.", of_queues("bytes_in")),
        Metric("motorcade_queue_to_guest_bytes_total", "counter", "Data to the guest.", of_queues("bytes_out")),
        Metric("motorcade_queue_kicks_total", "counter", "Notifications of the guest's that arrived.",
               of_queues("kicks")),
        Metric("motorcade_queue_kicks_suppressed_total", "counter", "Requests that came without one.",
               of_queues("kicks_suppressed")),
        Metric("motorcade_queue_interrupts_total", "counter", "Interrupts raised.", of_queues("interrupts")),
        Metric("motorcade_queue_interrupts_suppressed_total", "counter", "Interrupts that the guest was spared.",
               of_queues("suppressed")),
        Metric("motorcade_queue_in_flight", "gauge", "Requests taken and not yet answered.", of_queues("in_flight")),
        Metric("motorcade_queue_latency_seconds", "histogram", "From a request's being taken to its being answered.",
               [({**vm, "device": q["device"], "queue": str(q["index"])}, (q["latency"], q["latency_ns"]))
                for q in queues]),
    ]  # fmt: skip
