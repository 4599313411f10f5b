"""``python -m bench.timeline``: a picture of one restore, process by process, as docs/restore-timeline.svg.

One clone is asked for at a zygote with prepared VMs, as ``bench.restore`` does it, while all its processes mark what
they do (bench/tracing). The picture has each process's steps on the time line, and above them what was seen from
outside. Of several restores the one with the median time is shown.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bench import frozen, frozen_ours, sides
from bench.frozen import MIB
from bench.tracing import sitecustomize as tracing
from harness import microguest

SVG = sides.REPO / "docs" / "restore-timeline.svg"
WIDTH, LABELS, ROW, TOP = 1200, 130, 16, 64  # pixels
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#e15759", "#9c755f")
ORDER = ("supervisor", "pager", "core")  # and then the sidecars


@dataclass
class Span:
    """A step. Milliseconds since the request."""

    what: str
    start: float
    end: float
    depth: int
    waits: bool = False


@dataclass
class Process:
    """One lane. ``forked``: when, in ms since the request; negative for one that was prepared."""

    pid: int
    role: str = "?"
    vm: str = ""
    forked: float | None = None
    spans: list[Span] = field(default_factory=list)


@dataclass
class Restore:
    """What was seen of one."""

    processes: list[Process]
    marks: dict[str, float]  # from outside; ms since the request


def read(path: Path, since: float, until: float, vm: str) -> list[Process]:
    """The processes of ``vm``, of the records between two times of time.monotonic()."""
    data = path.read_bytes()
    processes: dict[int, Process] = {}
    open_: dict[int, list[Span]] = {}
    records = []
    for at in range(0, len(data), tracing.RECORD):
        text = data[at : at + tracing.RECORD].rstrip(b"\0 ").decode()
        if text:
            ns, pid, kind, *what = text.split(" ", 3)
            records.append((int(ns), int(pid), kind, what[0] if what else ""))
    for ns, pid, kind, what in sorted(records):
        ms = (ns / 1e9 - since) * 1e3
        process = processes.setdefault(pid, Process(pid))
        stack = open_.setdefault(pid, [])
        if kind == "?":
            raise SystemExit(f"bench/tracing wraps {what}, which is gone")
        if kind == "F":
            process.forked = ms
        elif kind == "T":
            process.role, _, process.vm = what.partition(" ")
        elif kind in "B(":
            depth = stack[-1].depth + 1 if stack else 0
            span = Span(what + ("..." if kind == "(" else ""), ms, (until - since) * 1e3, depth, what in tracing.WAITS)
            stack.append(span)
            process.spans.append(span)
        else:
            name = what + ("..." if kind == ")" else "")
            for i in range(len(stack) - 1, -1, -1):
                if stack[i].what == name:
                    stack.pop(i).end = ms
                    break
    found = [p for p in processes.values() if p.vm == vm]
    for process in found:
        process.spans = [s for s in process.spans if s.end > 0 and s.start < (until - since) * 1e3]
        for span in process.spans:
            span.start = max(span.start, 0.0)
    return sorted(found, key=lambda p: (ORDER.index(p.role) if p.role in ORDER else len(ORDER), p.role))


def restore(template: frozen_ours.Template, trace: Path) -> Restore:
    """One, watched."""
    template.wait_for_pool(1)
    started = time.monotonic()
    with frozen_ours.ended(template.request()) as clone:
        marks = {"requested": time.monotonic() - started}
        clone.hear("started")
        marks["console joined"] = time.monotonic() - started
        marks["first instruction"], marks["answer"] = clone.joined.first_and_answer(started, template.old)
        time.sleep(0.05)  # what goes on a little longer is drawn, too
        processes = read(trace, started, started + marks["answer"] * 1.1, clone.name)
    return Restore(processes, {name: s * 1e3 for name, s in marks.items()})


def draw(seen: Restore, title: str) -> str:
    """The picture."""
    end = seen.marks["answer"] * 1.08
    scale = (WIDTH - LABELS - 10) / end
    colours: dict[str, str] = {}
    body: list[str] = []
    y = TOP
    for process in seen.processes:
        depths = 1 + max((span.depth for span in process.spans), default=0)
        height = depths * ROW
        body.append(f'<text x="4" y="{y + 12}" class="role">{escape(process.role)}</text>')
        when = "prepared" if process.forked is not None and process.forked < 0 else ""
        body.append(f'<text x="{LABELS - 6}" y="{y + 12}" class="when">{when}</text>')
        body.append(f'<rect x="{LABELS}" y="{y}" width="{end * scale:.1f}" height="{height}" class="lane"/>')
        if process.forked is not None and process.forked >= 0:
            x = LABELS + process.forked * scale
            body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + height}" class="fork"/>')
        for span in process.spans:
            colour = colours.setdefault(span.what, COLOURS[len(colours) % len(COLOURS)])
            x, width = LABELS + span.start * scale, max((min(span.end, end) - span.start) * scale, 0.8)
            top = y + span.depth * ROW
            style = "wait" if span.waits else "task" if span.what.endswith("...") else "step"
            text = f"{span.what}: {span.start:.2f} to {span.end:.2f} ms"
            body.append(f'<g><title>{escape(text)}</title><rect x="{x:.1f}" y="{top + 1}" width="{width:.1f}" '
                        f'height="{ROW - 2}" class="{style}" fill="{colour}"/>')  # fmt: skip
            if width > 5.6 * len(span.what) + 4:
                body.append(f'<text x="{x + 2:.1f}" y="{top + 12}" class="{style}-text">{escape(span.what)}</text>')
            body.append("</g>")
        y += height + 6
    grid = []
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if end / s <= 20)
    for i in range(int(end // step) + 1):
        x = LABELS + i * step * scale
        grid.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{y}" class="grid"/>')
        grid.append(f'<text x="{x:.1f}" y="{TOP - 10}" class="tick">{i * step}</text>')
    outside = []
    for i, (name, ms) in enumerate(seen.marks.items()):
        x = LABELS + ms * scale
        outside.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{y + 4 + i * 13}" class="mark"/>')
        outside.append(f'<text x="{x - 3:.1f}" y="{y + 12 + i * 13}" class="mark">{escape(name)} {ms:.1f} ms</text>')
    style = (
        "text{font:11px sans-serif;fill:#222} .role{font-weight:bold} .when,.tick,text.mark{text-anchor:end}"
        ".when{fill:#888;font-size:9px} .tick{text-anchor:middle;fill:#666}"
        ".step-text{font-size:10px;fill:#fff} .wait-text,.task-text{font-size:10px}"
        ".lane{fill:#f4f4f4} .grid{stroke:#ddd} .fork{stroke:#000;stroke-width:2} .wait{fill:#d8d8d8}"
        ".task{fill-opacity:.25} line.mark{stroke:#c00;stroke-dasharray:3 2} text.mark{fill:#c00}"
    )
    total = y + 20 + 13 * len(seen.marks)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}">',
        f"<style>{style}</style>", f'<rect width="{WIDTH}" height="{total}" fill="#fff"/>',
        f'<text x="4" y="18" style="font-size:14px">{escape(title)}</text>',
        f'<text x="4" y="{TOP - 10}">ms</text>', *grid, *body, *outside, "</svg>\n",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.timeline", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--runs", type=int, default=9, help="of which the one with the median time is drawn (default 9)"
    )
    parser.add_argument("--size", type=int, default=512, metavar="MIB", help="of the guest's RAM (default 512)")
    parser.add_argument("--output", type=Path, default=SVG, help=f"(default {SVG.relative_to(sides.REPO)})")
    args = parser.parse_args()
    with frozen.scratch() as folder, frozen_ours.Host() as host:
        template = frozen_ours.freeze(host, folder, args.size * MIB, microguest.build())
        trace = folder / "trace"
        with trace.open("wb") as file:
            file.truncate(tracing.SIZE)
        tracer = str(Path(tracing.__file__).parent)
        host.env.update({tracing.FILE: str(trace), "PYTHONPATH": f"{tracer}:{host.env['PYTHONPATH']}"})
        host.start_zygote()
        del os.environ[tracing.FILE]
        template.learn()
        seen = sorted((restore(template, trace) for _ in range(args.runs)), key=lambda r: r.marks["first instruction"])
    median = seen[len(seen) // 2]
    args.output.write_text(draw(median, f"A restore of {args.size} MiB from a warm pool, process by process"))
    for process in median.processes:
        for span in process.spans:
            print(f"{process.role:14} {span.start:8.2f} {span.end - span.start:8.2f}  {'  ' * span.depth}{span.what}")
    print(*(f"{name} {ms:.1f} ms" for name, ms in median.marks.items()), sep="\n")
    print(args.output)


if __name__ == "__main__":
    main()
