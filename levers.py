#!/usr/bin/env python3
"""Levers: what is tried in a contest, what every run of it gave, and what follows from that.

    ./sweep.py --levers records/levers.txt SEED=1,2,3 --recipe records/recipes/mini.env      runs them
    ./levers.py                          writes docs/levers.md and docs/levers.svg from records/levers.jsonl

A file of levers has a line for each: `name | NAME=value NAME=value | public evidence`. The runs are lines of
records/levers.jsonl, which is only ever added to: a run that has its line is not run again.
"""

from __future__ import annotations

import environment

environment.enter()
import argparse
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results import NAMES, PLACES, Run, Stop, lookup, mean_error, run_tool, write_atomically

ROOT = Path(__file__).resolve().parent
RECORDS = ROOT / "records" / "levers.jsonl"
LEVERS = ROOT / "records" / "levers.txt"
GONE = ROOT / "records" / "levers_gone.txt"  # those that lost, whose settings the script has no more
TOKENIZERS = ROOT / "records" / "levers_tokenizer.txt"
SHAPES = ROOT / "records" / "levers_shape.txt"
BASE = "base"
TOGETHER = "together"
WITHOUT = "without "
Settings = dict[str, str]
Record = dict[str, Any]


# === THE FILE OF LEVERS ===


class Lever(NamedTuple):
    """A change of settings, and who has measured what it gives."""

    name: str
    settings: Settings
    evidence: str


def read_levers(path: Path) -> list[Lever]:
    """The levers of a file; Stop names the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Stop(f"--levers {path}: cannot be read ({error.strerror}); give a file of levers") from None
    levers: list[Lever] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *cells = (cell.strip() for cell in line.split("|"))
        words = cells[0].split() if len(cells) == 2 else []
        pairs = [word.partition("=") for word in words]
        if not pairs or not all(re.fullmatch(r"[A-Z][A-Z0-9_]*", key) and equals for key, equals, _ in pairs):
            raise Stop(f"{path}:{number}: not `name | NAME=value NAME=value | evidence`; write it so")
        if name in (BASE, TOGETHER, "") or name.startswith(WITHOUT) or name in [one.name for one in levers]:
            raise Stop(f"{path}:{number}: the name {name!r} is taken; choose another")
        levers.append(Lever(name, {key: value for key, _, value in pairs}, cells[1]))
    return levers


# === RECORDS ===


def identity(settings: Mapping[str, str], defaults: Mapping[str, str]) -> Settings:
    """The effective settings that decide a result and are not the defaults, without the seed."""
    apart = {*NAMES, *PLACES, "SEED"}
    return {
        name: value
        for name, value in sorted(settings.items())
        if name not in apart and value != defaults.get(name)
    }


def digest_of(*parts: Any) -> str:
    """16 hex digits that stand for what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def dataset_digest(settings: Mapping[str, str]) -> str:
    """16 hex digits of the dataset's manifest, as in summary.json; empty if it has none."""
    shared = f"{settings.get('DATA_DIR')}/datasets/fineweb10B_sp{settings.get('VOCAB_SIZE')}"
    folder = settings.get("DATASETS_DIR") or shared
    path = ROOT / folder / "manifest.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def read_records(path: Path) -> list[Record]:
    """The lines of a file of records, none if there is no file; Stop for a damaged line."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            needed = [record[name] for name in ("key", "rule", "source_sha256", "lever", "seed", "settings")]
            needed.append(record["val_bpb"])
        except (ValueError, KeyError, TypeError):
            needed = []
        if not needed:
            raise Stop(f"{path}:{number}: not a record of a run; delete the line, and the run is made again")
        records.append(record)
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a line; a kill leaves the file with the line or without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomically(path, before + json.dumps(record) + "\n")


def record_of(folder: Path, **facts: Any) -> Record:
    """What a finished run gave, with the `facts` that say which run it is."""
    run = Run.read(folder)
    summary = run.summary
    figures = ("steps", "operations", "eval_passes", "artifact_bytes", "bpb", "val_bpb")
    legal = {"legal": summary["compliance"].get("legal"), "reason": summary["compliance"].get("reason")}
    return {**facts, **{name: summary[name] for name in figures if name in summary}, **legal}


# === WHAT FOLLOWS ===


class Judgement(NamedTuple):
    """A lever against the base, over the seeds that both have."""

    name: str
    seeds: int
    mean: float  # of its score
    difference: float  # negative is better; nan without a pair
    error: float  # standard error of the difference; nan for one pair
    operations: float  # relative change of those of a step
    size: float  # mean bytes of the artifact
    legal: bool  # whether every run kept its limits
    settings: Settings

    @property
    def verdict(self) -> str:
        """better, worse or open: whether the difference is more than twice its standard error."""
        if not self.legal:
            return "over a limit"
        if math.isnan(self.error):
            return "not judged"
        if abs(self.difference) <= 2 * self.error:
            return "open"
        return "better" if self.difference < 0 else "worse"


def contests(records: Sequence[Record]) -> list[list[Record]]:
    """The records by contest, the latest contest first.

    A contest is a rule and a script; those whose bases have the same scores, to the last bit and with the
    same seeds, are one: a rule also gets another digest when a setting that it names gets another default.
    """
    bases: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        scores = bases.setdefault((record["rule"], record["source_sha256"]), {})
        if record["lever"] == BASE:
            scores[record["seed"]] = record["val_bpb"]
    groups: dict[Any, list[Record]] = {}
    for record in reversed(records):
        contest = (record["rule"], record["source_sha256"])
        scores = tuple(sorted(bases[contest].items()))
        groups.setdefault(scores or contest, []).append(record)
    return [group[::-1] for group in groups.values()]


def combinations(records: Sequence[Record]) -> dict[str, Settings]:
    """The settings of the winners together and of these without each one, by the latest choice of winners."""
    chosen = [record["settings"] for record in records if record["lever"] == TOGETHER]
    if not chosen:
        return {}
    together = chosen[-1]
    found = {TOGETHER: together}
    for record in records:
        own = record["settings"].items()
        if own and own <= together.items():
            found[WITHOUT + record["lever"]] = dict(together.items() - own)
    return found


def group_records(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """The records of one contest by lever and seed; of two of one run the later.

    Of those about winners together, and without one, only what is about the latest choice of winners.
    """
    records = list(records)
    latest = combinations(records)
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        name = record["lever"]
        combined = name == TOGETHER or name.startswith(WITHOUT)
        if not combined or record["settings"] == latest.get(name):
            groups.setdefault(name, {})[record["seed"]] = record
    return groups


def judge(records: Iterable[Record], metric: str = "val_bpb", against: str = BASE) -> list[Judgement]:
    """Every lever of a contest against one of them, best first; the others' order is that of their means."""
    groups = group_records(records)
    base = groups.get(against, {})
    found = []
    for name, runs in groups.items():
        values = {seed: lookup(record, metric) for seed, record in runs.items()}
        pairs = [(values[seed], lookup(base[seed], metric)) for seed in values if seed in base]
        differences = [ours - theirs for ours, theirs in pairs]
        difference, error = mean_error(differences) if pairs else (math.nan, math.nan)
        found.append(
            Judgement(
                name,
                len(values),
                float(np.mean([*values.values()])),
                difference,
                math.nan if name == against else error,
                price(runs.values()) / price(base.values()) - 1 if base else math.nan,
                float(np.mean([record.get("artifact_bytes", math.nan) for record in runs.values()])),
                all(record.get("legal", True) for record in runs.values()),
                next(iter(runs.values()))["settings"],
            )
        )
    return sorted(found, key=lambda row: (math.isnan(row.difference), row.difference, row.mean))


def price(records: Iterable[Record]) -> float:
    """Mean operations of a step."""
    return float(np.mean([r.get("operations", math.nan) / max(r.get("steps", 0), 1) for r in records]))


def choose_winners(judgements: Sequence[Judgement], levers: Sequence[Lever]) -> list[Lever]:
    """The levers that are better, best first; of two that set the same setting the better one."""
    by_name = {lever.name: lever for lever in levers}
    chosen: list[Lever] = []
    for row in judgements:
        lever = by_name.get(row.name)
        if lever is None or row.verdict != "better":
            continue
        if not any(lever.settings.keys() & other.settings.keys() for other in chosen):
            chosen.append(lever)
    return chosen


def join(levers: Iterable[Lever]) -> Settings:
    """The settings of several levers."""
    return {name: value for lever in levers for name, value in lever.settings.items()}


# === RUNNING ===


class Contest:
    """One contest: base settings, script and data; its records, and the runs that are still to be made.

    A script that is edited gets on with the records of the one before as soon as it has given the same
    scores of the base with the same seeds, see `contests`.
    """

    def __init__(
        self, path: Path, base: Settings, defaults: Settings, source: str, recipe: str, seeds: Sequence[str]
    ):
        self.path = path
        self.defaults = defaults
        self.recipe = recipe
        self.seeds = seeds
        self.source = source
        self.rule = digest_of(identity(base, defaults), dataset_digest(base))

    def records(self) -> list[Record]:
        """The records of this contest."""
        for group in contests(read_records(self.path)):
            if any(
                record["rule"] == self.rule and record["source_sha256"] == self.source for record in group
            ):
                return group
        return []

    def key(self, effective: Settings, seed: str) -> str:
        """What stands for one run."""
        return digest_of(identity(effective, self.defaults), seed, dataset_digest(effective))

    def is_known(self, lever: Lever, effective: Settings, seed: str) -> bool:
        """Whether the run has its record; one that it has under another name only is repeated under this."""
        key = self.key(effective, seed)
        known = [record for record in self.records() if record["key"] == key]
        if known and not any(record["lever"] == lever.name for record in known):
            append_record(self.path, {**known[-1], "lever": lever.name, "settings": lever.settings})
        return bool(known)

    def enter(self, folder: Path, lever: Lever, effective: Settings, seed: str) -> None:
        """Add the record of a finished run."""
        facts = {
            "lever": lever.name,
            "settings": lever.settings,
            "seed": int(seed),
            "recipe": self.recipe,
            "rule": self.rule,
            "key": self.key(effective, seed),
            "source_sha256": self.source,
            "data": dataset_digest(effective),
        }
        append_record(self.path, record_of(folder, **facts))


Runner = Callable[[list[Lever]], None]  # brings each of them to its end with all seeds


def run_rounds(contest: Contest, levers: list[Lever], metric: str, run: Runner) -> None:
    """Each lever alone, then those together that are better, then these less one; stops where none is."""
    run([Lever(BASE, {}, "")])
    run(levers)
    winners = choose_winners(judge(contest.records(), metric), levers)
    if not winners:
        return
    run([Lever(TOGETHER, join(winners), "")])
    if len(winners) > 1:
        rest = {lever.name: [other for other in winners if other is not lever] for lever in winners}
        run([Lever(WITHOUT + name, join(others), "") for name, others in rest.items()])


# === TABLE, PICTURE AND PAGE ===


def signed(value: float, digits: int = 5) -> str:
    """A number with its sign; a dash for nan."""
    return "–" if math.isnan(value) else f"{value:+.{digits}f}"


def words_of(settings: Settings) -> str:
    """Settings in one line."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def text_table(rows: Sequence[Judgement]) -> str:
    """The judgements for people, aligned."""
    lines = [
        ("lever", "mean", "difference", "± error", "operations", "bytes", "seeds", "verdict", "settings")
    ]
    for row in rows:
        lines.append(
            (
                row.name,
                f"{row.mean:.5f}",
                "" if row.name == BASE else signed(row.difference),
                "" if math.isnan(row.error) else f"{row.error:.5f}",
                f"{100 * row.operations:+.1f}%",
                f"{row.size:.0f}",
                str(row.seeds),
                "" if row.name == BASE else row.verdict,
                words_of(row.settings),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:-1]), line[-1]])
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


WIDTH, LEFT, RIGHT, LINE_HEIGHT, HEAD = 760, 210, 110, 24, 58
COLOURS = {"better": "#2a78d6", "worse": "#d9591f", "open": "#8a8983"}
INK, SOFT, RULE, PAPER = "#1b1b1a", "#65645f", "#dfded9", "#fdfdfc"


def label(x: float, y: float, words: str, anchor: str = "start", colour: str = INK, size: int = 13) -> str:
    """One line of text of the picture."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">'
        f"{html.escape(words)}</text>"
    )


def draw(rows: Sequence[Judgement], title: str) -> str:
    """An SVG: a line for each lever, its difference as a dot and twice the standard error as a bar."""
    shown = [row for row in rows if row.name != BASE and not math.isnan(row.difference)]
    reach = [abs(row.difference) + 2 * (0 if math.isnan(row.error) else row.error) for row in shown]
    most = 1.05 * max(reach, default=0) or 1.0
    height = HEAD + LINE_HEIGHT * len(shown) + 34
    middle = (LEFT + WIDTH - RIGHT) / 2
    scale = (WIDTH - RIGHT - LEFT) / 2 / most
    parts = [label(10, 22, title, size=14)]
    parts.append(label(LEFT, 42, "better", colour=SOFT) + label(WIDTH - RIGHT, 42, "worse", "end", SOFT))
    bottom = HEAD + LINE_HEIGHT * len(shown)
    parts.append(f'<line x1="{middle}" x2="{middle}" y1="{HEAD - 8}" y2="{bottom}" stroke="{SOFT}"/>')
    for place, row in enumerate(shown):
        y = HEAD + LINE_HEIGHT * place + 8
        x = middle + scale * row.difference
        colour = COLOURS.get(row.verdict, SOFT)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{RULE}"/>')
        if not math.isnan(row.error):
            bar = 2 * scale * row.error
            parts.append(
                f'<line x1="{x - bar:.1f}" x2="{x + bar:.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
                'stroke-width="3"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(label(LEFT - 10, y + 4, row.name, "end"))
        parts.append(label(WIDTH - 10, y + 4, signed(row.difference), "end", colour))
    parts.append(
        label(middle, bottom + 22, "difference to the base, bits per byte; bars: 2 s.e.", "middle", SOFT)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui,DejaVu Sans,sans-serif">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


PAGE_HEAD = """# Levers

What each lever gave against the base of its contest ([mini](mini.md)), seed by seed: the difference in bits
per byte, negative is better, and its standard error. *better* and *worse* are more than twice that. Equal
operations and bytes; `./sweep.py --levers` made the runs, [records/levers.jsonl](../records/levers.jsonl)
has them all, losses too.

*Written by `./levers.py`; do not edit.*
"""


def difference_and_error(row: Judgement) -> str:
    """The difference, with its standard error if it has one."""
    return signed(row.difference) + ("" if math.isnan(row.error) else f" ± {row.error:.5f}")


def render_row(row: Judgement, evidence: str) -> str:
    """One line of the page's table."""
    cells = [
        row.name,
        f"`{words_of(row.settings)}`",
        difference_and_error(row),
        str(row.seeds),
        f"{100 * row.operations:+.1f} %",
        row.verdict,
        evidence,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def render_removals(group: Sequence[Record]) -> list[str]:
    """What is lost if one of the winners is taken from the whole; nothing if they have not been tried."""
    rows = [row for row in judge(group, against=TOGETHER) if row.name.startswith(WITHOUT)]
    if not rows:
        return []
    lines = ["The winners together, less one of them:", ""]
    lines += ["| together | Δ BPB ± s.e. against all of them | seeds |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.name} | {difference_and_error(row)} | {row.seeds} |")
    return [*lines, ""]


def render_page(records: Sequence[Record], evidence: Mapping[str, str], picture: str) -> str:
    """docs/levers.md."""
    parts = [PAGE_HEAD]
    for number, group in enumerate(contests(records)):
        last = group[-1]
        scripts = dict.fromkeys(record["source_sha256"][:12] for record in group)
        data = next((record["data"] for record in group if record["lever"] == BASE), last["data"])
        parts.append(f"## {last['recipe']}, script {', '.join(scripts)}, data {data}\n")
        if number == 0:
            parts.append(f"![differences]({picture})\n")
        rows = judge(group)
        for row in rows:
            if row.name == BASE:
                parts.append(f"Base: {row.mean:.5f} BPB, {row.size:.0f} bytes, {row.seeds} seeds.\n")
        parts.append(
            "| lever | settings | Δ BPB ± s.e. | seeds | Δ operations a step | verdict | public evidence |"
        )
        parts.append("|---|---|---|---|---|---|---|")
        parts += [render_row(row, evidence.get(row.name, "")) for row in rows if row.name != BASE]
        parts += ["", *render_removals(group)]
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    """Write the page and the picture from the records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="default: records/levers.jsonl")
    parser.add_argument(
        "--levers",
        type=Path,
        nargs="+",
        default=[LEVERS, TOKENIZERS, SHAPES, GONE],
        help="where the evidence is said",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of levers.md and levers.svg")
    options = parser.parse_args(arguments)
    records = read_records(options.records)
    if not records:
        raise Stop(f"{options.records}: holds no record; ./sweep.py --levers makes them")
    evidence = {lever.name: lever.evidence for path in options.levers for lever in read_levers(path)}
    latest = contests(records)[0]
    picture = draw(judge(latest), f"{latest[-1]['recipe']}: levers against the base")
    write_atomically(options.out / "levers.svg", picture)
    write_atomically(options.out / "levers.md", render_page(records, evidence, "levers.svg"))
    print(text_table(judge(latest)))
    print(os.path.relpath(options.out / "levers.md"))


if __name__ == "__main__":
    run_tool(main)
