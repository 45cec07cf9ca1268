#!/usr/bin/env python3
"""Draw what happened in a run, or in a sweep, as one page that opens without network.

    ./report.py runs/A                       writes runs/A/report.html
    ./report.py runs/sweep-MATRIX_LR-1a2b3c  the settings against each other, and a page for each finished run

The page needs nothing but a browser: no script, no font and no picture from elsewhere; it is light or dark as
the reader's system is, and fits a phone. Its figures are those of summary.json, in full precision under the
pointer.
"""

from __future__ import annotations

import environment

environment.enter()
import argparse
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results import (
    Run,
    Stop,
    conditions,
    read_arrays,
    read_plan,
    run_tool,
    show,
    step_of,
    text_of,
    write_atomically,
)
from sweep import Row, number, rows_of

WIDTH = 460  # of a chart, in units of about a pixel
HEIGHT = 256
LEFT = 50
RIGHT = 22
TOP = 14
BOTTOM = 42
COLOURS = 6  # --c1 to --c6 of the style; more series than that would not be told apart

STYLE = """
:root{color-scheme:light dark;--page:#f3f3f0;--card:#fdfdfc;--ink:#1b1b1a;--soft:#65645f;--line:#dfded9;
--track:#ebeae6;
--c1:#2a78d6;--c2:#d9591f;--c3:#138a60;--c4:#b07900;--c5:#6a4fc4;--c6:#c23c74;--good:#0b7a35;--bad:#c02b2b}
@media(prefers-color-scheme:dark){:root{--page:#141413;--card:#1e1e1d;--ink:#f1f0ed;--soft:#a6a49d;
--line:#3a3936;
--track:#2c2b29;--c1:#4b95ee;--c2:#e5733f;--c3:#2bb282;--c4:#d1950f;--c5:#9c8cf0;--c6:#e0659a;--good:#45b868;
--bad:#f07070}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:20px 16px 48px;background:var(--page);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
h1{font-size:22px;margin:4px 0;overflow-wrap:anywhere}h2{font-size:16px;margin:0 0 2px}p{margin:4px 0}
a{color:var(--c1)}.soft,.card>p{color:var(--soft);font-size:13px}.good{color:var(--good)}
.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:10px;margin:14px 0}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;
min-width:0}
.tile b{display:block;font-size:18px;font-weight:600;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:12px}
.wide{grid-column:1/-1}svg{display:block;width:100%;height:auto;margin-top:6px}
svg text{font-size:12px;fill:var(--soft);font-family:inherit}.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.spot{fill:transparent}
.spot:hover,.few{fill:currentColor}.mark{stroke:var(--soft);stroke-dasharray:4 3}
.key{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;color:var(--soft);margin-top:4px}
.key i{display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle}
.bars{display:grid;grid-template-columns:minmax(84px,auto) 1fr auto;gap:7px 10px;align-items:center;
margin-top:10px;
font-size:14px}
.bars .track{height:16px;background:var(--track);border-radius:4px;position:relative}
.bars .track i{position:absolute;top:0;bottom:0;border-radius:4px;min-width:2px}
.bars .group{grid-column:1/-1;color:var(--soft);font-size:13px;margin-top:6px}
.bars .value{font-variant-numeric:tabular-nums;text-align:right}
.map{position:relative;width:100%;aspect-ratio:16/7;margin-top:10px}
.map div{position:absolute;overflow:hidden;border:1px solid var(--card);border-radius:3px}
.map .role{color:#fff;font-size:12px;line-height:1.25;background:var(--c1)}
.map .role span{position:absolute;left:5px;top:3px;right:2px;pointer-events:none}
.map .role div{border-color:rgba(255,255,255,.35);border-width:0 1px 1px 0;border-radius:0}
.scroll{overflow-x:auto;margin-top:8px}table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:var(--soft);font-weight:500}th,td{padding:5px 10px 5px 0;
border-bottom:1px solid var(--line);
vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.fixed{table-layout:fixed}
.fixed th:first-child{width:54%}.fixed td,td.s{overflow-wrap:anywhere}
code{font:13px ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
details summary{cursor:pointer;color:var(--soft);font-size:13px;margin-top:8px}
.strip{position:relative;height:22px;background:var(--track);border-radius:4px;margin:2px 0 10px}
.strip i{position:absolute;width:10px;height:10px;border-radius:50%;top:6px;margin-left:-5px;
background:var(--c1);
border:1px solid var(--card)}.strip u{position:absolute;width:2px;top:2px;bottom:2px;margin-left:-1px;
background:var(--ink)}
@media(max-width:560px){.map{aspect-ratio:4/5}body{padding:12px 10px 32px}svg text{font-size:16px}
.tiles{grid-template-columns:1fr 1fr}}
"""


# === PIECES ===


def esc(value: Any) -> str:
    """Text that is safe inside HTML."""
    return html.escape(str(value))


def figure(value: Any, form: str = "", unit: str = "") -> str:
    """A number in short, with its full precision in the page for readers and programs."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    return f'<data value="{value!r}" title="{value!r}">{format(value, form)}{unit}</data>'


def card(title: str, body: str, note: str = "", wide: bool = False) -> str:
    """One box of the page; nothing if it has no content."""
    if not body:
        return ""
    return (
        f'<section class="card{" wide" if wide else ""}"><h2>{esc(title)}</h2>'
        f"{f'<p>{note}</p>' if note else ''}{body}</section>"
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), fixed: bool = False
) -> str:
    """A table of ready HTML cells; nothing without rows."""
    if not rows:
        return ""
    kind = lambda place: (
        ' class="n"' if place in numeric else ' class="s"' if place == len(header) - 1 else ""
    )
    line = lambda cells, tag: "".join(
        ["<tr>", *(f"<{tag}{kind(i)}>{c}</{tag}>" for i, c in enumerate(cells)), "</tr>"]
    )
    kinds = ' class="fixed"' if fixed else ""
    return (
        f'<div class="scroll"><table{kinds}>{line([esc(h) for h in header], "th")}'
        + "".join(line(row, "td") for row in rows)
        + "</table></div>"
    )


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers between two values."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def apart(low: float, high: float) -> int:
    """1 if two ends of an axis are too close to be told apart in fp64, else 0."""
    return int(high - low <= 1e-12 * max(abs(low), abs(high), 1e-290))


def short(value: float) -> str:
    """A number for an axis."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"


class Curve(NamedTuple):
    """A named line through points."""

    name: str
    points: list[tuple[float, float]]


def chart(
    curves: list[Curve],
    below: str,
    marks: Sequence[tuple[float, str]] = (),
    form: str = ".4f",
    names: dict[float, str] | None = None,
    low: float | None = None,
) -> str:
    """A line chart with a word under its x axis, vertical marks, and every value under the pointer.

    Nothing without two points.
    """
    curves = [curve for curve in curves if len(curve.points) > 1][:COLOURS]
    if not curves:
        return ""
    xs, ys = ([p[i] for curve in curves for p in curve.points] for i in (0, 1))
    x0 = min(xs)
    x1 = max(xs)
    y0 = min(ys) if low is None else low
    y1 = max(ys)
    x1 += apart(x0, x1) * max(abs(x0), 1)
    y1 += apart(y0, y1) * max(abs(y0), 1) * 0.1
    y0, y1 = y0 - 0.04 * (y1 - y0) * (low is None), y1 + 0.04 * (y1 - y0)
    px = lambda x: LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
    py = lambda y: HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    parts = []
    for y in ticks(y0, y1):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{short(y)}</text>'
        )
    words = list((names or {x: short(x) for x in ticks(x0, x1)}).items())
    for x, word in words[:: -(-len(words) // 7)]:
        parts.append(
            f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{esc(word)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{esc(below)}</text>'
    )
    for x, word in marks:
        side, shift = ("end", -5) if x > (x0 + x1) / 2 else ("start", 5)
        parts.append(
            f'<line class="mark" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{px(x) + shift:.1f}" y="{TOP + 10}" text-anchor="{side}">{esc(word)}</text>'
        )
    for place, curve in enumerate(curves, 1):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in curve.points)
        parts.append(f'<polyline class="curve" stroke="var(--c{place})" points="{path}"/>')
        few = len(curve.points) <= 20
        every = -(-len(curve.points) // 150)
        for x, y in [*curve.points[::every], curve.points[-1]]:
            label = (
                f"{curve.name + ': ' if len(curves) > 1 else ''}{(names or {}).get(x, short(x))}: {y:{form}}"
            )
            parts.append(
                f'<circle class="spot{" few" if few else ""}" style="color:var(--c{place})" '
                f'cx="{px(x):.1f}" cy="{py(y):.1f}" r="{3.5 if few else 5}"><title>{esc(label)}</title>'
                "</circle>"
            )
    key = "".join(
        f'<span><i style="background:var(--c{i})"></i>{esc(c.name)}</span>' for i, c in enumerate(curves, 1)
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>' + (
        f'<div class="key">{key}</div>' if len(curves) > 1 else ""
    )


def bar(label: str, begin: float, end: float, value: str, colour: str) -> str:
    """One row of a bar chart; `begin` and `end` are fractions of the track."""
    first, last = (100 * min(max(edge, 0.0), 1.0) for edge in sorted((begin, end)))
    return (
        f'<div>{esc(label)}</div><div class="track"><i style="left:{first:.2f}%;width:{last - first:.2f}%;'
        f'background:var(--{colour})"></i></div><div class="value">{value}</div>'
    )


# === ONE RUN ===


def tiles(summary: dict[str, Any], cap: float | None) -> str:
    """The figures that one looks for first."""
    rows = [
        ("val_bpb", ".5f", "", "bits per byte: the score"),
        ("val_loss", ".5f", "", "nats per token"),
        ("total_bytes", ",", "", f"bytes of {cap:,.0f}" if cap else "bytes"),
        ("train_seconds", ".1f", " s", "training"),
        ("eval_seconds", ".1f", " s", "evaluation"),
        ("steps", ",", "", "steps"),
        ("step_ms", ".1f", " ms", "per step"),
        ("tokens_per_second", ",.0f", "", "training tokens per second"),
        ("peak_memory_mib", ",", " MiB", "memory"),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{figure(summary[name], form, unit)}</b><span>{esc(words)}</span></div>'
            for name, form, unit, words in rows
            if isinstance(summary.get(name), int | float)
        )
        + "</div>"
    )


def curves_of(run: Run) -> tuple[Curve, Curve, Curve, list[tuple[float, str]]]:
    """Training loss, learning rate and validation BPB by step, and the step that switched the loops on."""
    records = run.records()
    steps = {r["step"]: r for r in records if r.get("kind") == "train" and "train_loss" in r}
    checks = {step_of(r): r["val_bpb"] for r in records if "val_bpb" in r and step_of(r)}
    loops = re.findall(r"^loops on at step (\d+)", run.log, re.M)
    return (
        Curve("train_loss", [(step, r["train_loss"]) for step, r in sorted(steps.items())]),
        Curve("rate", [(step, r["rate"]) for step, r in sorted(steps.items())]),
        Curve("val_bpb", sorted(checks.items())),
        [(int(loops[-1]), "loops on")] if loops else [],
    )


def waterfall(bpb: dict[str, float]) -> str:
    """The score after the first stage, what each later one adds or takes away, and what remains."""
    values = list(bpb.values())
    if not values:
        return ""
    low = min(values)
    high = max(values)
    room = (high - low) or abs(high) * 0.01 or 1.0
    low = low - 0.6 * room
    high = high + 0.05 * room
    place = lambda value: (value - low) / (high - low)
    rows = []
    before = None
    for stage, value in bpb.items():
        if before is None:
            rows.append(bar(stage, 0, place(value), figure(value, ".5f"), "c1"))
        else:
            change = f"{'+' if value >= before else '−'}{abs(value - before):.5f}"
            rows.append(
                bar(
                    stage,
                    place(before),
                    place(value),
                    f"{change} → {figure(value, '.5f')}",
                    "c2" if value > before else "c3",
                )
            )
        before = value
    if len(values) > 1:
        rows.append(bar("score", 0, place(values[-1]), f"<b>{figure(values[-1], '.5f')}</b>", "c1"))
    return (
        f'<div class="bars">{"".join(rows)}</div><p class="soft">The bars start at {low:.4f}, not at 0.</p>'
    )


class Part(NamedTuple):
    """Bytes of one stream of the artifact, and the tensors in it with their sizes before compression."""

    name: str
    bytes: int
    tensors: list[tuple[str, int]]


def artifact_parts(path: Path) -> list[Part]:
    """The streams of an artifact, largest first; the container's own bytes last."""
    import train_gpt as trainer

    manifest, tensors, _ = trainer.decode_artifact(path)
    inside: dict[str, list[tuple[str, int]]] = {}
    for name, tensor in tensors.items():
        for stream, part in trainer.streams_of(name, tensor):
            inside.setdefault(stream, []).append((name, part.numel() * part.element_size()))
    parts = [Part(stream[0], stream[1], inside.get(stream[0], [])) for stream in manifest["streams"]]
    rest = path.stat().st_size - sum(part.bytes for part in parts)
    return [*sorted(parts, key=lambda part: -part.bytes), Part("header and manifest", rest, [])]


def treemap(parts: list[Part]) -> str:
    """Rectangles as large as the parts in bytes, divided into tensors by their share before compression."""
    import squarify

    parts = sorted((part for part in parts if part.bytes > 0), key=lambda part: -part.bytes)
    total = sum(part.bytes for part in parts)
    cells = []
    boxes = lambda sizes: squarify.squarify(squarify.normalize_sizes(sizes, 100, 100), 0, 0, 100, 100)
    place = lambda box: (
        f"left:{box['x']:.3f}%;top:{box['y']:.3f}%;width:{box['dx']:.3f}%;height:{box['dy']:.3f}%"
    )
    for i, (part, box) in enumerate(zip(parts, boxes([part.bytes for part in parts]), strict=True)):
        inner = sorted(part.tensors, key=lambda pair: -pair[1])
        if len(inner) > 1:
            raw = sum(size for _, size in inner)
            inside = "".join(
                f'<div style="{place(b)}" title="{esc(name)}: about {part.bytes * size // raw:,} bytes">'
                "</div>"
                for (name, size), b in zip(inner, boxes([size for _, size in inner]), strict=True)
            )
        else:
            inside = ""
        shade = f"color-mix(in srgb,var(--c{i % COLOURS + 1}) 78%,#000)"
        cells.append(
            f'<div class="role" style="{place(box)};background:{shade}" title="{esc(part.name)}: '
            f'{part.bytes:,} bytes">{inside}<span>{esc(part.name)}<br>{part.bytes:,}</span></div>'
        )
    rows = [
        [
            esc(part.name),
            figure(part.bytes, ","),
            f"{100 * part.bytes / total:.2f} %",
            esc(
                ", ".join(name for name, _ in part.tensors[:12]) + (" ..." if len(part.tensors) > 12 else "")
            ),
        ]
        for part in parts
    ]
    listing = table(["stream", "bytes", "share", "tensors"], rows, (1, 2))
    return f'<div class="map">{"".join(cells)}</div><details><summary>as a table</summary>{listing}</details>'


def times(summary: dict[str, Any], run: Run) -> str:
    """Where the seconds went, under the two clocks and outside them."""
    limits = summary.get("compliance", {}).get("limits", {})
    last = {
        r["stage"]: r["seconds"]
        for r in run.records()
        if r["kind"] == "score" and r["stage"] in summary["bpb"] and "seconds" in r
    }
    scoring = {f"val:{stage}": seconds for stage, seconds in last.items()}
    rest = summary.get("eval_seconds", 0) - sum(last.values())
    training = {"training": summary.get("train_seconds"), "calibration": summary.get("hessian_seconds")}
    untimed = {"packing": summary.get("pack_seconds")}
    # Tuning reads training tokens after rounding, so then the clock runs on until both are done.
    rounding = {"rounding": summary.get("gptq_seconds"), "tuning": summary.get("tune_seconds")}
    groups = [
        ("training clock", "train", training | (rounding if "tune_seconds" in summary else {})),
        ("not timed", "", untimed if "tune_seconds" in summary else rounding | untimed),
        ("evaluation clock", "eval", scoring | {"reading, moving": rest if rest > 0 else None}),
    ]
    rows = []
    for title, name, parts in groups:
        parts = {label: seconds for label, seconds in parts.items() if seconds is not None}
        used = sum(parts.values())
        limit = (limits.get(name) or (None, None))[1]
        if not parts:
            continue
        scale = max(limit or 0, used) or 1
        position = 0.0
        words = f"{title}: {used:.1f} s" + (f" of {limit:g} s" if limit else "")
        rows.append(f'<div class="group">{esc(words)}</div>')
        for label, seconds in parts.items():
            rows.append(
                bar(label, position / scale, (position + seconds) / scale, figure(seconds, ".1f", " s"), "c1")
            )
            position += seconds
    return f'<div class="bars">{"".join(rows)}</div>' if rows else ""


def by_length(arrays: dict[str, np.ndarray]) -> str:
    """BPB of short and long documents."""
    if not arrays:
        return ""
    scored = arrays["bytes"] > 0
    tokens, sizes, nats = (arrays[name][scored] for name in ("tokens", "bytes", "nats"))
    groups = np.floor(np.log2(np.maximum(tokens, 1))).astype(int)
    points = []
    names = {}
    for group in np.unique(groups):
        inside = groups == group
        points.append((float(group), float(nats[inside].sum() / math.log(2) / sizes[inside].sum())))
        names[float(group)] = str(2**group)
    return chart([Curve("val_bpb", points)], "tokens of the document (at least)", names=names)


def by_position(arrays: dict[str, np.ndarray]) -> str:
    """BPB early and late in a document, if the run has written sums by position."""
    if not {"position_start", "position_nats", "position_bytes"} <= arrays.keys():
        return ""
    points = []
    names = {}
    for place, (start, nats, size) in enumerate(
        zip(*(arrays[f"position_{n}"] for n in ("start", "nats", "bytes")), strict=True)
    ):
        if size > 0:
            points.append((float(place), float(nats / math.log(2) / size)))
            names[float(place)] = str(int(start))
    return chart([Curve("val_bpb", points)], "position in the document (from)", names=names)


def settings_table(overrides: dict[str, Any]) -> str:
    """Settings that differ from the defaults, with these and the meaning."""
    import train_gpt as trainer

    known = {field.name.upper(): field for _, fields in trainer.Config.sections() for field in fields}
    rows = []
    for name, value in overrides.items():
        field = known.get(name)
        meaning = field.metadata["meaning"] if field else "not a setting of this version"
        rows.append(
            [
                f'<code>{esc(name)}</code><br><span class="soft">{esc(meaning)}</span>',
                f"<code>{esc(show(field.default) or '(empty)')}</code>" if field else "",
                f"<code>{esc(show(value))}</code>",
            ]
        )
    return table(["setting", "default", "here"], rows, fixed=True)


def verdict_class(verdict: str) -> str:
    """The colour of a verdict."""
    return "good" if verdict in ("kept", "holds") else "bad" if verdict == "BROKEN" else "soft"


def compliance_table(compliance: dict[str, Any]) -> str:
    """Every condition and limit that the run has recorded."""
    return table(
        ["condition or limit", "verdict", "evidence"],
        [
            [esc(name), f'<span class="{verdict_class(verdict)}">{esc(verdict)}</span>', esc(evidence)]
            for name, verdict, evidence in conditions(compliance)
        ],
    )


def badge(compliance: dict[str, Any]) -> str:
    """Whether the run is legal, and why."""
    if "legal" not in compliance:
        return ""
    legal = compliance["legal"] is True
    return (
        f'<p><b class="{"good" if legal else "bad"}">{"✓ legal" if legal else "✗ not legal"}</b> '
        f'<span class="soft">{esc(compliance.get("reason", ""))}</span></p>'
    )


def page(title: str, head: str, body: list[str]) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{esc(title)}</h1>{head}\n" + "\n".join(filter(None, body)) + "\n</body></html>\n"
    )


def run_report(run: Run) -> str:
    """The page of one run; of an unfinished one as far as it has come."""
    summary = {"bpb": {}, "overrides": {}, "compliance": {}} | (run.summary if run.is_finished else {})
    loss, rate, checks, loops = curves_of(run)
    arrays = read_arrays(run.folder)
    artifact = run.folder / "final_model.ptz"
    versions = summary.get("versions", {})
    compliance = summary["compliance"]
    drawn = ""
    note = "Areas are bytes; within a stream, tensors are drawn by their share before compression."
    if artifact.exists():
        try:
            code = [Part("code (packed)", summary["code_bytes"], [])] if summary.get("code_bytes") else []
            drawn = treemap([*artifact_parts(artifact), *code])
        except SystemExit as error:
            drawn = f"<p>{esc(error)}</p>"
            note = ""
    facts = [
        ["seed", esc(run.seed)],
        *([name, esc(text_of(value))] for name, value in versions.items()),
        *([f"data: {name}", esc(text_of(value))] for name, value in summary.get("data", {}).items()),
    ]
    head = (
        badge(compliance) if run.is_finished else '<p class="bad">not finished: figures as far as they go</p>'
    )
    head += (
        f'<p class="soft">{esc(summary.get("world_size", ""))} × {esc(versions["device"])}, '
        f"commit {esc(versions.get('commit'))}</p>"
        if "device" in versions
        else ""
    )
    halves = [
        card("Training loss", chart([loss], "step", loops), "nats per token"),
        card(
            "Validation during training", chart([checks], "step", loops), "bits per byte, unquantised weights"
        ),
        card("Learning rate", chart([rate], "step", loops, low=0.0, form=".3f"), "multiplier of all rates"),
        card("Time by part", times(summary, run)),
        card("Score by document length", by_length(arrays), "bits per byte of the final stage"),
        card("Score by position", by_position(arrays), "bits per byte of the final stage"),
    ]
    even = (
        sum(map(bool, halves)) % 2 == 0
    )  # the bars of the stages fit in either width: no hole beside the last half
    cards = [
        *halves,
        card("Score by stage", waterfall(summary["bpb"]), "bits per byte; lower is better", wide=even),
        card("Bytes of the artifact", drawn, note, wide=True),
        card("Compliance", compliance_table(compliance), wide=True),
        card("Settings that differ from the defaults", settings_table(summary["overrides"]), wide=True),
        card("Versions and data", table(["", ""], facts, fixed=True) if run.is_finished else "", wide=True),
    ]
    cap = compliance.get("limits", {}).get("size", (None, None))[1]
    return page(
        f"Run {run.folder.resolve().name}",
        head,
        [tiles(summary, cap) if run.is_finished else "", '<div class="cards">', *cards, "</div>"],
    )


# === A SWEEP ===


def words_of(row: Row) -> str:
    """The settings of a row in one line."""
    return " ".join(f"{name}={value}" for name, value in row.settings.items()) or "the seeds"


def strips(rows: list[Row]) -> str:
    """Every seed as a dot and the mean as a line, one strip for each combination, all on one scale."""
    rows = [row for row in rows if row.values]
    values = [value for row in rows for value in row.values.values()]
    if not values:
        return ""
    low = min(values)
    high = max(values)
    place = lambda value: 3 + 94 * ((value - low) / (high - low) if high > low else 0.5)
    shown = []
    for row in rows[:40]:
        dots = "".join(
            f'<i style="left:{place(value):.2f}%" title="seed {esc(seed)}: {value:.6f}"></i>'
            for seed, value in row.values.items()
        )
        shown.append(
            f'<div class="soft">{esc(words_of(row))}: {figure(row.mean, ".6f")}</div>'
            f'<div class="strip">{dots}<u style="left:{place(row.mean):.2f}%"></u></div>'
        )
    return "".join(shown) + f'<p class="soft">left {low:.6f}, right {high:.6f}</p>'


def sweep_report(folder: Path, metric: str) -> str:
    """The page of a sweep."""
    rows = rows_of(folder, metric)
    first = folder / next(iter(read_plan(folder)["runs"]), "")
    cells = []
    failures = []
    curves = []
    for row in rows:
        links = " ".join(
            f'<a href="{esc(path.name)}/report.html">{esc(seed)}</a>' if seed in row.values else esc(seed)
            for seed, path in row.runs.items()
        )
        is_baseline = next(iter(row.runs.values())) == first
        cells.append(
            [
                f"<code>{esc(words_of(row))}</code>",
                figure(row.mean, ".6f") if row.values else "–",
                number(row.std, ".6f"),
                "baseline" if is_baseline else number(row.difference, "+.6f"),
                number(row.p_value, ".3g"),
                esc(row.pairs),
                f"{len(row.values)}/{len(row.runs)}",
                links,
            ]
        )
        failures += [
            [esc(path.name), esc(row.failed[seed])] for seed, path in row.runs.items() if seed in row.failed
        ]
        finished = [path for seed, path in row.runs.items() if seed in row.values]
        losses = [dict(curves_of(Run.read(path))[0].points) for path in finished]
        steps = set.intersection(*map(set, losses)) if losses else set()
        curves.append(
            Curve(words_of(row), [(s, float(np.mean([one[s] for one in losses]))) for s in sorted(steps)])
        )
    head = (
        f'<p class="soft">{sum(len(row.values) for row in rows)} of '
        f"{sum(len(row.runs) for row in rows)} runs "
        f"finished; {esc(metric)}, best first. The difference is to the baseline over the same seeds or "
        "documents, p from the paired t-test.</p>"
    )
    best = f"mean over the seeds, {'all' if len(curves) <= COLOURS else f'the best {COLOURS}'} combinations"
    header = ["settings", "mean", "std", "difference", "p", "paired over", "finished", "seeds"]
    return page(
        f"Sweep {folder.resolve().name}",
        head,
        [
            '<div class="cards">',
            card("Results", table(header, cells, range(1, 7)), wide=True),
            card("Every seed", strips(rows), f"{esc(metric)}: dots are seeds, lines are means"),
            card("Training loss", chart(curves, "step"), best),
            card("Not finished", table(["run", "last line of its output"], failures), wide=True),
            "</div>",
        ],
    )


def main(arguments: list[str]) -> None:
    """Write a report.html into every folder given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run or sweep folders")
    parser.add_argument(
        "--metric", default="val_bpb", help="number of summary.json that a sweep is sorted by"
    )
    options = parser.parse_args(arguments)
    for folder in options.folders:
        if not folder.is_dir():
            raise Stop(f"{folder}: no such folder; give a run folder or a sweep folder, such as runs/NAME")
        if (folder / "sweep.json").exists():
            pages = {folder: sweep_report(folder, options.metric)}
            finished = [path.parent for path in sorted(folder.glob("*/summary.json"))]
            pages |= {path: run_report(Run.read(path)) for path in finished}
        else:
            pages = {folder: run_report(Run.read(folder))}
        for place, text in pages.items():
            write_atomically(place / "report.html", text)
        print(folder / "report.html")


if __name__ == "__main__":
    run_tool(main)
