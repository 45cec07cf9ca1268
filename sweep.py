#!/usr/bin/env python3
"""Try settings of train_gpt.py against each other, with statistics: a grid, greedy, or a random sample.

    ./sweep.py MATRIX_LR=0.02,0.026 QK_GAIN_INIT=5,5.25 SEED=1,2,3                       every combination
    ./sweep.py --greedy MATRIX_LR=0.026,0.02,0.03 WARMDOWN_FRAC=0.85,0.7 SEED=1,2,3      one after the other
    ./sweep.py --random 10 MATRIX_LR=0.02,0.023,0.026 EMBED_WD=0.05,0.085,0.1            ten combinations
    ./sweep.py --stage evaluate --artifact runs/A/final_model.ptz EVAL_STRIDE=64,32      one frozen artifact
    ./sweep.py --levers records/levers.txt SEED=1,2,3 --recipe records/recipes/mini.env  changes one by one,
                                                                 then together, then all but one

The first value of each setting is the baseline that the others are compared with, over the same seeds; on a
frozen artifact document by document. The caller's environment lies below these settings, --recipe below the
environment. The same command again goes on after a kill: finished runs are not repeated, unfinished ones
resume, failed ones are tried again. The sweep folder keeps a copy of the script, so that an edit during the
sweep changes no run of it.
"""

from __future__ import annotations

import environment

environment.enter()
import argparse
import ctypes
import hashlib
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

import levers
import recipes
from results import (
    Run,
    Stop,
    is_locked,
    lookup,
    mean_error,
    mean_std,
    paired,
    read_documents,
    read_plan,
    run_tool,
    show,
    warn,
    write_atomically,
)

ROOT = Path(__file__).resolve().parent
QUEUE_SECONDS = 10.0  # between two questions to Slurm's queue
OURS = ("RUN_ID", "OUT_DIR", "STAGE", "ARTIFACT")  # set for each run by the sweep itself
Settings = dict[str, str]


# === WHAT TO RUN ===


def parse_axes(words: list[str]) -> dict[str, list[str]]:
    """NAME=value,value... arguments; Stop for anything else."""
    axes: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        listed = values.split(",")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or "" in listed:
            raise Stop(f"{word}: give NAME=value,value,..., as in MATRIX_LR=0.02,0.026")
        if name in OURS:
            raise Stop(f"{name}: the sweep sets it for each run; use --out, --name, --stage or --artifact")
        if name in axes or len(set(listed)) < len(listed):
            raise Stop(
                f"{word}: {name} {'is given twice' if name in axes else 'has a value twice'}; drop one"
            )
        axes[name] = listed
    return axes


def below(options: argparse.Namespace) -> Settings:
    """The settings under the caller's environment: the recipe's, then the run's that made the artifact."""
    settings: Settings = {}
    if options.artifact and (config := options.artifact.parent / "config.json").exists():
        made = Run.read(config.parent).config
        settings = {
            name: show(value) for name, value in made.items() if name not in (*OURS, "data", "training_data")
        }
    if options.recipe:
        try:
            settings |= recipes.read(options.recipe)
        except recipes.RecipeError as error:
            raise Stop(f"--recipe {error}") from None
    return settings


def effective(script: Path, environment: Mapping[str, str]) -> Settings:
    """Every setting with the value that the trainer would use; Stop with its message if it refuses one."""
    done = subprocess.run(
        [sys.executable, str(script.resolve()), "--print-config"],
        env={**environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Stop(
            (done.stderr.strip().splitlines() or [f"{script}: --print-config fails; run it alone"])[-1]
        )
    return dict(line.split("=", 1) for line in done.stdout.split("\n") if "=" in line)


def resolve(script: Path, base: Settings, chosen: list[Settings]) -> list[Settings]:
    """The effective settings of each choice; Stop if one is refused, is unknown or equals another."""
    with ThreadPoolExecutor(environment.usable_cores()) as pool:
        found = list(pool.map(lambda settings: effective(script, base | settings), chosen))
    seen: dict[str, Settings] = {}
    for settings, result in zip(chosen, found, strict=True):
        if unknown := settings.keys() - result.keys():
            raise Stop(f"{min(unknown)}: not a setting; `python train_gpt.py --help` lists them")
        twin = seen.setdefault(json.dumps(result, sort_keys=True), settings)
        if twin is not settings:
            name = next(n for n in settings if settings[n] != twin[n])
            raise Stop(f"{name}={twin[name]},{settings[name]}: these are the same value; drop one")
    return found


def name_of(settings: Settings) -> str:
    """The run folder's name; a digest stands in for what a file name cannot hold."""
    plain = "_".join(f"{name}-{value}" for name, value in settings.items()) or "run"
    if re.fullmatch(r"[A-Za-z0-9._-]{1,120}", plain):
        return plain
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9._-]", "-", plain)[:110] + "-" + digest


def without_seed(settings: Settings) -> Settings:
    """`settings` apart from the seed."""
    return {name: value for name, value in settings.items() if name != "SEED"}


def grid(axes: dict[str, list[str]], count: int = 0) -> list[Settings]:
    """Every combination, the baseline first; or the baseline and a sample of the others, `count` in all."""
    shape = [len(values) for values in axes.values()]
    total = math.prod(shape)
    places = (
        [0, *sorted(random.Random(0).sample(range(1, total), min(count, total) - 1))]
        if count
        else range(total)
    )
    return [
        {
            name: axes[name][i]
            for name, i in zip(axes, np.unravel_index(place, shape) if shape else (), strict=True)
        }
        for place in places
    ]


def greedy(axes: dict[str, list[str]], score: Callable[[Settings], float]) -> Iterator[list[Settings]]:
    """Rounds of settings to run: each in turn is varied from the best so far, and keeps its best value."""
    best = {name: values[0] for name, values in axes.items()}
    for name, values in axes.items():
        candidates = [best | {name: value} for value in values]
        yield candidates
        best = min(candidates, key=score)
        if math.isinf(score(best)):
            raise Stop(
                f"{name}: no value has finished with every seed; mend the errors above and start again"
            )


# === WHERE TO RUN ===

Poll = Callable[[], int | None]  # the exit status, or None while the run is going on
Start = Callable[[list[str], Settings, Path, int], Poll]  # command, settings, file for its output, slot


def execute(command: list[str], settings: Settings, console: str, folder: str) -> int:
    """Run a command to its end, `settings` in its environment, its output in a file; its exit status."""
    with open(console, "w") as output:
        return subprocess.run(
            command,
            env=os.environ | settings,
            cwd=folder,
            stdout=output,
            stderr=output,
            preexec_fn=die_with_parent,
            check=False,
        ).returncode


def die_with_parent() -> None:
    """Have Linux kill this process with the one that starts it: no orphan goes on writing to a run folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def local(options: argparse.Namespace) -> tuple[Start, int]:
    """Processes on this machine, each with GPUs of its own, or its share of the cores without any."""
    gpus = environment.gpus()
    each = options.gpus_per_run
    if gpus and len(gpus) < each:
        raise Stop(f"--gpus-per-run {each}: there are {len(gpus)} GPUs; lower it")
    groups = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    jobs = options.jobs or max(len(groups), 1)

    def start(command: list[str], settings: Settings, console: Path, slot: int) -> Poll:
        extra = {"CUDA_VISIBLE_DEVICES": groups[slot % len(groups)]} if groups else {}
        if not groups and jobs > 1:
            extra["OMP_NUM_THREADS"] = os.environ.get(
                "OMP_NUM_THREADS", str(max(environment.usable_cores() // jobs, 1))
            )
        with open(console, "w") as output:
            return subprocess.Popen(
                command,
                env=os.environ | settings | extra,
                cwd=ROOT,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            ).poll

    return start, jobs


def optional(package: str, launcher: str) -> Any:
    """An optional package; Stop with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise Stop(f"--launcher {launcher}: needs the package {package}; pip install {package}") from None


def slurm_gpus(wanted: int) -> int:
    """GPUs that a job asks for: none on a cluster whose nodes offer none, where Slurm refuses the request."""
    if not shutil.which("sinfo"):
        return wanted
    offered = subprocess.run(["sinfo", "-h", "-o", "%G"], capture_output=True, text=True, check=False)
    return wanted if offered.returncode or "gpu" in offered.stdout else 0


class SlurmJob:
    """A submitted job; without accounting (sacct) submitit never hears of a kill, the queue does."""

    def __init__(self, job: Any, console: Path):
        self.job = job
        self.console = console
        self.asked = time.monotonic()
        self.missing = 0  # times in a row that the queue did not have it

    def poll(self) -> int | None:
        """None while it goes on, then the exit status of its command; 1 if it left without one."""
        if self.job.done():
            error = self.job.exception()
            if error:
                self.console.write_text(f"{error}\n")
            return 1 if error else self.job.result()
        if time.monotonic() - self.asked < QUEUE_SECONDS or not shutil.which("squeue"):
            return None
        self.asked = time.monotonic()
        self.missing = 0 if self.is_queued() else self.missing + 1
        if self.missing < 2:  # its result may be on its way through a shared file system
            return None
        with open(self.console, "a") as output:
            output.write(f"job {self.job.job_id} has left Slurm's queue without a result: it was killed\n")
        return 1

    def is_queued(self) -> bool:
        """Whether Slurm has the job; also if it cannot be asked just now."""
        command = ["squeue", "-h", "-j", str(self.job.job_id), "-o", "%T"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        return bool(shown.stdout.strip() or (shown.returncode and "Invalid job id" not in shown.stderr))


def slurm(options: argparse.Namespace) -> tuple[Start, int]:
    """Jobs of a Slurm cluster, through submitit; --launcher-option gives parameters, as in timeout_min."""
    submitit = optional("submitit", "slurm")
    chosen = dict(options.launcher_option)
    executor = submitit.AutoExecutor(folder=options.folder / "slurm", cluster=chosen.pop("cluster", None))
    gpus = slurm_gpus(options.gpus_per_run)
    executor.update_parameters(**{"name": "sweep", "gpus_per_node": gpus, **chosen})

    def start(command: list[str], settings: Settings, console: Path, slot: int) -> Poll:
        try:
            job = executor.submit(execute, command, settings, str(console), str(ROOT))
        except submitit.core.utils.FailedJobError as error:
            said = " ".join(str(error).split())
            raise Stop(
                f"--launcher slurm: {said}; --launcher-option NAME=VALUE sets what a job asks for"
            ) from None

        return SlurmJob(job, console).poll

    return start, options.jobs or 64


def ray(options: argparse.Namespace) -> tuple[Start, int]:
    """Tasks of a Ray cluster; --launcher-option goes to ray.init, as in address=auto."""
    package = optional("ray", "ray")
    package.init(**dict(options.launcher_option))
    task = package.remote(num_gpus=options.gpus_per_run if environment.gpus() else 0)(execute)

    def start(command: list[str], settings: Settings, console: Path, slot: int) -> Poll:
        reference = task.remote(command, settings, str(console), str(ROOT))

        def poll() -> int | None:
            if not package.wait([reference], timeout=0)[0]:
                return None
            try:
                return package.get(reference)
            except package.exceptions.RayError as error:
                console.write_text(f"{error}\n")
                return 1

        return poll

    return start, options.jobs or 64


LAUNCHERS = {"local": local, "slurm": slurm, "ray": ray}


def last_line(console: Path) -> str:
    """The last line of a run's output; torchrun's own report about it is not the error."""
    if not console.exists():
        return "it has not been started"
    text = re.split(r"\n[EW]\d{4} [^\n]*torch/distributed", console.read_text(errors="replace"))[0]
    return (text.strip().splitlines() or ["it ended without a word"])[-1].strip()


def outcome_of(folder: Path, status: int) -> str:
    """What a run that has ended gave, in a few words."""
    if not (folder / "summary.json").exists():
        return f"FAILED (exit status {status}): {last_line(folder / 'console.log')}"
    try:
        return f"val_bpb {lookup(Run.read(folder).summary, 'val_bpb'):.6f}"
    except Stop as stop:  # the table will stop at it; until then the other runs go on
        return f"FAILED: {stop}"


class Sweep:
    """A sweep folder, locked: its plan, and how its runs are started."""

    def __init__(self, options: argparse.Namespace, base: Settings):
        self.options = options
        self.base = base
        self.folder = options.folder
        self.script = self.folder / "train_gpt.py"
        self.lock = self.open()
        self.start, self.capacity = LAUNCHERS[options.launcher](options)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *exception: object) -> None:
        self.lock.close()

    def open(self) -> TextIO:
        """Make and lock the folder; Stop if another sweep writes to it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115 -- open as long as the sweep
            if not environment.lock_file(lock):
                warn(f"{self.folder}: its file system has no locks; see that no other sweep has this --name")
            return lock
        except BlockingIOError:
            raise Stop(
                f"{self.folder}: this sweep is running already; wait for it or choose another --name"
            ) from None
        except OSError as error:
            raise Stop(f"{self.folder}: cannot be written ({error.strerror}); choose another --out") from None

    def plan(self, identity: dict[str, Any], runs: list[Settings]) -> None:
        """Add runs to sweep.json; Stop if the folder is that of other settings, artifact or code."""
        path = self.folder / "sweep.json"
        known = read_plan(self.folder) if path.exists() else {**identity, "runs": {}}
        for name in identity:
            if known.get(name) == identity[name]:
                continue
            if name == "source_sha256":
                raise Stop(
                    f"{self.options.script}: has changed since {self.folder} was started; --name NEW starts "
                    f"over, --script {self.script} goes on with the code of that time"
                )
            there = known.get(name)
            here = identity[name]
            if isinstance(here, dict) and isinstance(there, dict):
                name, there, here = next(
                    (n, there.get(n), here.get(n)) for n in {**there, **here} if there.get(n) != here.get(n)
                )
            raise Stop(
                f"{self.folder}: was started with {name}={there}, now it is {here}; set it back or choose "
                "another --name"
            )
        known["runs"] |= {name_of(settings): settings for settings in runs}
        write_atomically(path, json.dumps(known, indent=1))

    def command(self) -> list[str]:
        """The command of one run."""
        if self.options.gpus_per_run == 1:
            return [sys.executable, str(self.script)]
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={self.options.gpus_per_run}",
            str(self.script),
        ]

    def run(self, runs: list[Settings], finished: Callable[[str], None] | None = None) -> None:
        """Bring every run to its end, several at once; a failure is reported and does not stop the others.

        `finished` is told the name of each that has ended with a summary, also if that was before.
        """
        wanted = {name_of(settings): settings for settings in runs}
        pending = [name for name in wanted if not (self.folder / name / "summary.json").exists()]
        done = len(wanted) - len(pending)
        if done:
            print(f"{done} of {len(wanted)} runs are finished already", flush=True)
        tell = finished or (lambda name: None)
        for name in wanted:
            if name not in pending:
                tell(name)
        going: dict[int, tuple[str, Poll, float]] = {}
        while pending or going:
            for slot in range(self.capacity):
                # A locked folder is still written by a process of an earlier sweep.
                ready = next((name for name in pending if not is_locked(self.folder / name)), None)
                if slot in going or ready is None:
                    continue
                pending.remove(ready)
                if (self.folder / ready / "summary.json").exists():
                    done += 1
                    tell(ready)
                    continue
                (self.folder / ready).mkdir(exist_ok=True)
                settings = self.base | wanted[ready] | {"RUN_ID": ready, "OUT_DIR": str(self.folder)}
                console = self.folder / ready / "console.log"
                going[slot] = ready, self.start(self.command(), settings, console, slot), time.monotonic()
            for slot, (name, poll, begin) in list(going.items()):
                status = poll()
                if status is None:
                    continue
                del going[slot]
                done += 1
                outcome = outcome_of(self.folder / name, status)
                seconds = time.monotonic() - begin
                print(f"[{done}/{len(wanted)}] {name}: {outcome} ({seconds:.1f}s)", flush=True)
                if (self.folder / name / "summary.json").exists():
                    tell(name)
            time.sleep(0.1)


# === WHAT CAME OUT ===


class Row(NamedTuple):
    """One combination of settings: its results by seed, and the difference to the baseline's seeds."""

    settings: Settings
    runs: dict[str, Path]  # every run by seed, finished or not
    values: dict[str, float]  # the metric by seed
    failed: dict[str, str]  # the last line of output by seed
    mean: float
    std: float
    difference: float  # nan without common seeds
    p_value: float  # nan where nothing can be said
    pairs: str  # what was paired, for the table


def rows_of(folder: Path, metric: str) -> list[Row]:
    """The combinations of a sweep folder, best first, unfinished last; the first planned is the baseline."""
    plan = read_plan(folder)
    groups: dict[str, dict[str, Path]] = {}
    for name, settings in plan["runs"].items():
        key = json.dumps(without_seed(settings))
        groups.setdefault(key, {})[settings.get("SEED", "default")] = folder / name
    rows: list[Row] = []
    for key, runs in groups.items():
        values = {
            seed: lookup(Run.read(path).summary, metric)
            for seed, path in runs.items()
            if (path / "summary.json").exists()
        }
        failed = {seed: last_line(path / "console.log") for seed, path in runs.items() if seed not in values}
        mean, std = mean_std([*values.values()]) if values else (math.nan, math.nan)
        row = Row(json.loads(key), runs, values, failed, mean, std, math.nan, math.nan, "")
        by_document = plan.get("stage") == "evaluate" and metric == "val_bpb"
        rows.append(compare(row, rows[0], by_document) if rows else row)
    sign = -1 if plan.get("highest") else 1
    return sorted(rows, key=lambda row: math.inf if math.isnan(row.mean) else sign * row.mean)


def compare(row: Row, baseline: Row, by_document: bool) -> Row:
    """`row` with its difference to the baseline: by document if both have such sums, else by seed."""
    seeds = [seed for seed in row.values if seed in baseline.values]
    if not seeds:
        return row
    if by_document:
        ours, theirs = ([read_documents(side.runs[seed]) for seed in seeds] for side in (row, baseline))
        both = [*ours, *theirs]
        if all(both):
            first = both[0]
            if any(
                not np.array_equal(getattr(first, n), getattr(d, n))
                for d in both
                for n in ("tokens", "bytes")
            ):
                raise Stop(
                    f"{next(iter(row.runs.values()))}: scored other documents than the baseline; give the "
                    "same data to the whole sweep"
                )
            nats = [np.mean([d.nats for d in side], 0) for side in (ours, theirs)]
            difference = float((nats[0] - nats[1]).sum() / math.log(2) / first.bytes.sum())
            return row._replace(
                difference=difference, p_value=paired(*nats), pairs=f"{len(nats[0])} documents"
            )
    pairs = [(row.values[seed], baseline.values[seed]) for seed in seeds]
    return row._replace(
        difference=float(np.mean([a - b for a, b in pairs])),
        p_value=paired(*zip(*pairs, strict=True)),
        pairs=f"{len(pairs)} seeds",
    )


def number(value: float, form: str) -> str:
    """A number for a table; a dash for nan."""
    return "-" if math.isnan(value) else format(value, form)


def text_table(rows: list[Row], metric: str) -> str:
    """The results for people, aligned."""
    lines = [["mean", "std", "runs", "difference", "p", "paired over", f"settings ({metric})"]]
    for row in rows:
        settings = " ".join(f"{name}={value}" for name, value in row.settings.items()) or "(no settings)"
        lines.append(
            [
                number(row.mean, ".6f"),
                number(row.std, ".6f"),
                f"{len(row.values)}/{len(row.runs)}",
                number(row.difference, "+.6f"),
                number(row.p_value, ".3g"),
                row.pairs or "-",
                settings,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False)) + "  " + line[-1]
        for line in lines
    ]
    shown += [
        f"not finished: {row.runs[seed].name}: {line}" for row in rows for seed, line in row.failed.items()
    ]
    tested = sum(not math.isnan(row.p_value) for row in rows)
    if tested > 1:
        shown.append(
            f"{tested} comparisons: at the 5 % level one of them should have p below {0.05 / tested:.3g} "
            "(Bonferroni)"
        )
    return "\n".join(shown)


class Priced(NamedTuple):
    """A combination against the baseline, seed by seed: (mean, standard error) of each difference."""

    settings: Settings
    metric: tuple[float, float]
    percent: tuple[float, float]  # of training seconds
    priced: tuple[float, float]  # the metric with the seconds at their price
    pairs: int


def price_rows(rows: list[Row], metric: str, exchange: float) -> list[Priced]:
    """Every combination against the first one planned, best price first.

    `exchange` is what one percent of training seconds is worth in the metric. Differences are taken within a
    seed, whose runs follow each other in an order that turns round from seed to seed: what the machine gains
    or loses steadily cancels.
    """
    seconds = {
        id(row): {seed: lookup(Run.read(row.runs[seed]).summary, "train_seconds") for seed in row.values}
        for row in rows
    }
    baseline = next(row for row in rows if not row.pairs)
    found = []
    for row in rows:
        seeds = [seed for seed in row.values if seed in baseline.values]
        if row is baseline or not seeds:
            continue
        scores = [row.values[seed] - baseline.values[seed] for seed in seeds]
        percents = [100 * (seconds[id(row)][s] / seconds[id(baseline)][s] - 1) for s in seeds]
        priced = [score + exchange * percent for score, percent in zip(scores, percents, strict=True)]
        found.append(
            Priced(row.settings, mean_error(scores), mean_error(percents), mean_error(priced), len(seeds))
        )
    return sorted(found, key=lambda row: row.priced[0])


def price_table(rows: list[Priced], metric: str, exchange: float) -> str:
    """The prices for people; one percent of seconds costs `exchange`."""
    lines = [f"interleaved; 1 % of training seconds is priced at {exchange:g} {metric}"]
    for row in rows:
        settings = " ".join(f"{name}={value}" for name, value in row.settings.items())
        cells = [
            f"{metric} {row.metric[0]:+.6f} ± {row.metric[1]:.6f}",
            f"seconds {row.percent[0]:+.2f} ± {row.percent[1]:.2f} %",
            f"priced {row.priced[0]:+.6f} ± {row.priced[1]:.6f}",
        ]
        lines.append(f"  {settings}: " + ", ".join(cells) + f" ({row.pairs} pairs)")
    return "\n".join(lines)


def turn_round(seeds: list[str], settings: list[Settings]) -> list[Settings]:
    """The runs of every seed, those of every second seed in the other order: A B, B A."""
    runs = []
    for number, seed in enumerate(seeds):
        runs += [chosen | {"SEED": seed} for chosen in settings[:: -1 if number % 2 else 1]]
    return runs


# === LEVERS ===


def resolve_levers(options: argparse.Namespace, base: Settings, chosen: list[levers.Lever]) -> list[Settings]:
    """The effective settings of the base and of each lever; Stop for no setting, and for no change."""
    every = [levers.Lever(levers.BASE, {}, ""), *chosen]
    with ThreadPoolExecutor(environment.usable_cores()) as pool:
        found = list(pool.map(lambda lever: effective(options.script, base | lever.settings), every))
    for lever, result in zip(every[1:], found[1:], strict=True):
        if unknown := lever.settings.keys() - result.keys():
            raise Stop(f"{options.levers}: {lever.name}: {min(unknown)} is not a setting; --help lists them")
        if result == found[0]:
            raise Stop(f"{options.levers}: {lever.name}: changes nothing here; drop it")
    return found


class LeverRuns:
    """The runs of a sweep of levers: which are still to be made, and the record of each when it ends."""

    def __init__(self, sweep: Sweep, contest: levers.Contest, identity: dict[str, Any]):
        self.sweep = sweep
        self.contest = contest
        self.identity = identity

    def bring(self, wanted: list[levers.Lever]) -> None:
        """Every lever to its end with every seed, lever by lever, and its record into the file."""
        places: dict[str, tuple[levers.Lever, Settings, str]] = {}
        runs: list[Settings] = []
        for lever in wanted:
            found = effective(self.sweep.script, self.sweep.base | lever.settings)
            for seed in self.contest.seeds:
                if not self.contest.is_known(lever, found, seed):
                    settings = lever.settings | {"SEED": seed}
                    places[name_of(settings)] = (lever, found, seed)
                    runs.append(settings)

        def enter(name: str) -> None:
            self.contest.enter(self.sweep.folder / name, *places[name])

        self.sweep.plan(self.identity, runs)
        self.sweep.run(runs, enter)


def pull_levers(options: argparse.Namespace, base: Settings, seeds: list[str]) -> None:
    """Run a file of levers to the end, see levers.run_rounds; exit status 1 if a run failed."""
    chosen = levers.read_levers(options.levers)
    found = resolve_levers(options, base, chosen)
    known = found[0].keys()
    same = {name: value for name, value in found[0].items() if name not in (*OURS, "SEED")}
    identity = identity_of(options, {}, same) | {"mode": "levers"}
    recipe = options.recipe.name if options.recipe else "no recipe"
    source = identity["source_sha256"]
    options.folder = (options.out / (options.name or f"levers-{Path(recipe).stem}-{source[:6]}")).resolve()
    contest = levers.Contest(
        options.records, found[0], effective(options.script, {}), source, recipe, seeds or [found[0]["SEED"]]
    )
    with Sweep(options, {name: value for name, value in base.items() if name in known}) as sweep:
        sweep.plan(identity, [])
        if options.script.resolve() != sweep.script:
            shutil.copyfile(options.script, sweep.script)
        print(f"levers: {os.path.relpath(options.folder)}, records {options.records}", flush=True)
        levers.run_rounds(contest, chosen, options.metric, LeverRuns(sweep, contest, identity).bring)
    rows = levers.judge(contest.records(), options.metric)
    table = levers.text_table(rows)
    write_atomically(options.folder / "table.txt", table + "\n")
    write_atomically(options.folder / "levers.svg", levers.draw(rows, f"{recipe}: levers against the base"))
    print(table)
    lacking = [row.name for row in rows if row.seeds < len(contest.seeds)]
    missing = {levers.BASE, *(lever.name for lever in chosen)} - {row.name for row in rows}
    if lacking or missing:
        print("not finished: " + ", ".join([*lacking, *sorted(missing)]))
        raise SystemExit(1)


# === COMMAND LINE ===


def launcher_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE for a launcher, whole numbers as such."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("give NAME=VALUE")
    return name, int(value) if value.isdecimal() else value


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_what_to_run(parser.add_argument)
    add_where_to_run(parser.add_argument)
    options = parser.parse_args(arguments)
    check_options(options)
    return options


def add_what_to_run(add: Callable[..., Any]) -> None:
    """The options that say which runs there are, and how they are compared."""
    add("axes", nargs="*", metavar="NAME=VALUE,VALUE", help="a setting and its values, the baseline's first")
    add("--greedy", action="store_true", help="one setting after the other, each keeping its best value")
    add("--random", type=int, default=0, metavar="N", help="N of the combinations, the baseline among them")
    add(
        "--interleave",
        action="store_true",
        help="one run at a time in blocks A B B A over the seeds, and seconds priced in the metric",
    )
    add(
        "--exchange",
        type=float,
        default=0.0004,
        metavar="X",
        help="what 1 %% of training seconds is worth (default %(default)s BPB, by the contest's logs)",
    )
    add("--levers", type=Path, metavar="FILE", help="a file of levers, as records/levers.txt")
    add(
        "--records",
        type=Path,
        default=levers.RECORDS,
        metavar="FILE",
        help="where runs of levers are recorded, default: records/levers.jsonl",
    )
    add("--recipe", type=Path, metavar="FILE", help="settings below the environment, as in records/recipes/")
    add(
        "--stage",
        choices=("all", "evaluate"),
        default="all",
        help="evaluate: score --artifact with each setting",
    )
    add(
        "--artifact",
        type=Path,
        metavar="FILE",
        help="the frozen artifact of --stage evaluate; the settings of "
        "the run folder in which it lies come below the recipe's",
    )
    add(
        "--metric",
        default="val_bpb",
        help="number in summary.json to sort by, as bpb.sliding (default %(default)s)",
    )
    add("--highest", action="store_true", help="a higher metric is better")


def add_where_to_run(add: Callable[..., Any]) -> None:
    """The options that say where runs are started, and where they are kept."""
    add(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="runs at once; default: one per group of GPUs, one on a CPU",
    )
    add(
        "--gpus-per-run",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of each run, started with torchrun if several",
    )
    add(
        "--launcher",
        choices=sorted(LAUNCHERS),
        default="local",
        help="where runs are started (default %(default)s)",
    )
    add(
        "--launcher-option",
        type=launcher_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of submitit's executor (slurm) or of ray.init (ray)",
    )
    add("--name", default="", help="name of the sweep folder; default: the settings' names and a digest")
    add(
        "--out",
        type=Path,
        default=ROOT / "runs",
        help="where the sweep folder is made; default: runs/ beside it",
    )
    add(
        "--script",
        type=Path,
        default=ROOT / "train_gpt.py",
        help="the trainer (default: that of this repository)",
    )


def check_options(options: argparse.Namespace) -> None:
    """Stop for options that do not go together."""
    for name in ("random", "jobs"):
        if getattr(options, name) < 0:
            raise Stop(f"--{name} {getattr(options, name)}: must not be negative")
    if options.levers and (options.greedy or options.random or options.stage != "all" or options.highest):
        raise Stop("--levers: stands alone; drop --greedy, --random, --stage and --highest")
    if options.interleave and (options.greedy or options.stage != "all" or options.launcher != "local"):
        raise Stop("--interleave: compares trainings on one machine; drop --greedy, --stage and --launcher")
    if options.interleave and options.jobs > 1:
        raise Stop(f"--jobs {options.jobs}: --interleave has one run at a time; drop --jobs")
    if options.interleave:
        options.jobs = 1
    if options.gpus_per_run not in (1, 2, 4, 8):
        raise Stop(f"--gpus-per-run {options.gpus_per_run}: must be 1, 2, 4 or 8")
    if options.greedy and (options.random or not options.axes):
        raise Stop("--greedy: needs settings with several values, and no --random")
    if (options.stage == "evaluate") != bool(options.artifact):
        raise Stop(
            f"--stage {options.stage}: --artifact FILE belongs to --stage evaluate, and --stage evaluate to "
            f"it"
        )
    for path, name in ((options.artifact, "artifact"), (options.script, "script")):
        if path and not path.is_file():
            raise Stop(f"--{name} {path}: no such file; give the path of one")
    if not re.fullmatch(r"[A-Za-z0-9._-]*", options.name):
        raise Stop(f"--name {options.name}: may hold letters, digits, '.', '_' and '-' only")


def file_hash(path: Path | None) -> str:
    """sha256 of a file, empty for none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def identity_of(options: argparse.Namespace, axes: dict[str, list[str]], same: Settings) -> dict[str, Any]:
    """What makes two calls one sweep: what is varied and how, artifact, code and all other settings."""
    return {
        "axes": axes,
        "mode": "greedy" if options.greedy else f"random {options.random}" if options.random else "grid",
        "highest": options.highest,
        "stage": options.stage,
        "artifact_sha256": file_hash(options.artifact),
        "source_sha256": file_hash(options.script),
        "settings": same,
    }


def folder_of(options: argparse.Namespace, axes: dict[str, list[str]], identity: dict[str, Any]) -> Path:
    """Where the sweep is kept: --name, or the settings' names and a digest of what the command says."""
    said = [identity["axes"], identity["mode"], options.stage, str(options.recipe), str(options.artifact)]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:6]
    return (options.out / (options.name or f"sweep-{'-'.join(axes)[:60] or 'seeds'}-{digest}")).resolve()


def show_rows(options: argparse.Namespace) -> None:
    """Print what came out and keep it; exit status 1 if a run failed."""
    rows = rows_of(options.folder, options.metric)
    table = text_table(rows, options.metric)
    if options.interleave:
        priced = price_rows(rows, options.metric, options.exchange)
        table += "\n" + price_table(priced, options.metric, options.exchange)
    write_atomically(options.folder / "table.txt", table + "\n")
    print(table)
    if any(row.failed for row in rows):
        raise SystemExit(1)


def main(arguments: list[str]) -> None:
    """Run the sweep and print its table; exit status 1 if a run failed."""
    options = parse_arguments(arguments)
    axes = parse_axes(options.axes)
    seeds = axes.pop("SEED", [])
    fixed = {"STAGE": options.stage}
    if options.artifact:
        fixed["ARTIFACT"] = str(options.artifact.resolve())
    base = below(options) | {name: value for name, value in os.environ.items() if name not in OURS} | fixed
    if options.levers:
        if axes:
            raise Stop(
                f"{next(iter(axes))}: --levers takes SEED alone; set it in the environment or the file"
            )
        pull_levers(options, base, seeds)
        return
    if options.interleave and not seeds:
        raise Stop("--interleave: needs seeds to take turns over; give SEED=1,2,3,4")

    def with_seeds(settings: list[Settings]) -> list[Settings]:
        if options.interleave:
            return turn_round(seeds, settings)
        return [s | {"SEED": seed} for s in settings for seed in seeds] if seeds else settings

    first = [{name: value[0] for name, value in axes.items()}]
    single = first + [first[0] | {name: v} for name, values in axes.items() for v in values[1:]]
    settings = single if options.greedy else grid(axes, options.random)
    found = resolve(options.script, base, with_seeds(settings))
    same = {
        name: value for name, value in found[0].items() if name not in (*axes, *OURS, "SEED" if seeds else "")
    }
    identity = identity_of(options, {**axes, "SEED": seeds}, same)
    options.folder = folder_of(options, axes, identity)
    known = set(found[0])
    sign = -1 if options.highest else 1

    def score(chosen: Settings) -> float:
        row = next(row for row in rows_of(options.folder, options.metric) if row.settings == chosen)
        return math.inf if row.failed else sign * row.mean

    with Sweep(options, {name: value for name, value in base.items() if name in known}) as sweep:
        sweep.plan(identity, [] if options.greedy else with_seeds(settings))
        if options.script.resolve() != sweep.script:
            shutil.copyfile(options.script, sweep.script)
        print(
            f"sweep: {os.path.relpath(options.folder)}, {options.launcher}, {sweep.capacity} at once",
            flush=True,
        )
        for candidates in greedy(axes, score) if options.greedy else [settings]:
            if options.greedy:
                resolve(options.script, base, candidates)
                sweep.plan(identity, with_seeds(candidates))
            sweep.run(with_seeds(candidates))
    show_rows(options)


if __name__ == "__main__":
    run_tool(main)
