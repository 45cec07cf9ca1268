#!/usr/bin/env python3
"""Kills at every stage of a run: the same command goes on, and ends exactly where an undisturbed run does.

    python bench/kills.py [--kills 20] [--stage STAGE ...] [--quick]

A tiny run is killed (SIGKILL to itself) `--kills` times in each of STAGES and given the same command again.
Its files change at certain moments only: a kill between two of them leaves what a kill at the second leaves.
So half of the kills of a stage are spread over these moments (before and in the middle of each write, before
a file is flushed, before and after it replaces another), the others over all calls of a function of the
trainer. Then the artifact, every loss and every score must be those of a run that nobody killed, at most one
checkpoint interval is trained again (none after training), and submit.py and compliance.py accept the run.

Every start is a fork made after the imports, so that it costs nothing. Exit code 1 if a kill lost anything.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# As a script this file's folder would be searched first, and bench/data.py would hide the package data.
sys.path[:] = [
    str(ROOT),
    str(ROOT / "tests"),
    *(path for path in sys.path if Path(path).resolve() != ROOT / "bench"),
]
import environment

environment.enter()
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: a fork has no threads of its parent
import argparse
import builtins
import contextlib
import io
import json
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

import compliance
import results
import submit
import train_gpt as t
from helpers.trainer import make_dataset, tiny_settings

STAGES = ("start", "train", "quantise", "pack", "evaluate")
WRITE, CALL = "write", "call"  # the two kinds of moments
QUICK = 1
INTERVAL = 3  # steps between two checkpoints
SETTINGS = {"CHECKPOINT_EVERY": str(INTERVAL), "ITERATIONS": "8", "TRAIN_LOG_EVERY": "1"}
SETTINGS |= {"TTT_MODE": "chunk_sgd", "VAL_LOSS_EVERY": "0"}


class Moments:
    """Counts the moments of a run by stage and kind, and kills this process at one of them.

    `fatal` is (stage, kind, number from 1), or None to count only.
    """

    def __init__(self, fatal: tuple[str, str, int] | None):
        self.fatal = fatal
        self.stage = STAGES[0]
        self.counts: Counter = Counter()

    def reach(self, kind: str) -> None:
        """One more moment of this kind."""
        self.counts[self.stage, kind] += 1
        if (self.stage, kind, self.counts[self.stage, kind]) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def entering(self, stage: str, work: Callable) -> Callable:
        """`work`, which begins a stage."""

        def enter(*given: Any) -> Any:
            self.stage = stage
            return work(*given)

        return enter

    def around(self, work: Callable) -> Callable:
        """`work`, with a moment before and after it."""

        def reached(*given: Any) -> Any:
            self.reach(WRITE)
            result = work(*given)
            self.reach(WRITE)
            return result

        return reached

    def open(self, path: Any, mode: str = "r", buffering: int = -1) -> Any:
        """The trainer's `open`: what it writes has a moment before and one in the middle of each write."""
        if "b" not in mode or mode == "rb":
            return builtins.open(path, mode, buffering)
        file = Watched(path, mode)
        file.moments = self
        return file if buffering == 0 else io.BufferedWriter(file)

    def on_event(self, frame: Any, event: str, argument: Any) -> None:
        """For sys.setprofile: a call of a function of the trainer is a moment."""
        if event == "call" and frame.f_code.co_filename == t.__file__:
            self.reach(CALL)

    def watch(self) -> None:
        """Count from now on, in a process that does nothing else."""
        t.open = self.open
        os.fsync = self.around(os.fsync)
        os.replace = self.around(os.replace)
        for stage, name in (("train", "train"), ("quantise", "quantize"), ("evaluate", "evaluate")):
            t.STAGES[name] = self.entering(stage, t.STAGES[name])
        t.pack_run = self.entering("pack", t.pack_run)
        sys.setprofile(self.on_event)


class Watched(io.FileIO):
    """A file that is written in two halves."""

    moments: Moments

    def write(self, content: Any) -> int:
        """Write the bytes; returns how many they are."""
        view = memoryview(content).cast("B")
        half = len(view) // 2
        self.moments.reach(WRITE)
        super().write(view[:half])
        self.moments.reach(WRITE)
        return half + super().write(view[half:])


def start(settings: dict[str, str], said: Path, moments: Moments | None = None) -> int:
    """Run the trainer in a fork, what it says goes to a file; its exit status, -9 if it was killed.

    With `moments` it is watched, and what was counted is written beside that file.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        run_and_exit(settings, said, moments)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_and_exit(settings: dict[str, str], said: Path, moments: Moments | None) -> None:
    """What the fork does: never returns."""
    status = 1
    try:
        with builtins.open(said, "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        if moments is not None:
            moments.watch()
        t.main(t.Config.from_env(settings))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        if moments is not None:
            found = [[*moment, count] for moment, count in moments.counts.items()]
            said.with_suffix(".json").write_text(json.dumps(found))
        os._exit(status)


class Ended:
    """What a finished run has come to."""

    def __init__(self, folder: Path):
        self.run = results.Run.read(folder)
        summary = self.run.summary
        self.scores = (summary["val_bpb"], summary["bpb"], summary["steps"])
        self.artifact = summary["artifact_sha256"]
        self.losses = losses_of(self.run)

    def differences(self, other: Ended) -> list[str]:
        """What is not the same in two runs."""
        names = ("scores", "artifact", "losses")
        return [f"other {name}" for name in names if getattr(self, name) != getattr(other, name)]

    def refusals(self) -> list[str]:
        """What submit.py and the ledger's probe of compliance.py have against the run."""
        try:
            submit.check_run(self.run)
        except results.Stop as stop:
            return [str(stop)]
        probed = compliance.Report(self.run.folder)
        compliance.probe_ledger(probed, self.run)
        return [f"{row.probe}: {row.evidence}" for row in probed.rows if row.holds is False]


def losses_of(run: results.Run) -> dict[int, float]:
    """The training loss of every step that counts."""
    return {record["step"]: record["train_loss"] for record in run.records() if "train_loss" in record}


def steps_taken(folder: Path) -> int:
    """The last step that a killed run has recorded."""
    path = folder / "metrics.jsonl"
    return max(losses_of(results.Run(folder, {})), default=0) if path.exists() else 0


def saved_training(folders: list[Path]) -> str:
    """What the run folder holds of the training: "nothing", "a part" or "all"."""
    path = folders[0] / "checkpoint.pt" if folders else Path("none")
    if not path.exists():
        return "nothing"
    return "all" if torch.load(path, weights_only=True)["complete"] else "a part"


def kill(
    settings: dict[str, str], out: Path, fatal: tuple[str, str, int], whole: Ended
) -> tuple[int, list[str]]:
    """Kill a run at one moment and go on: (steps trained again, what was lost)."""
    settings = settings | {"OUT_DIR": str(out)}
    out.mkdir()
    said = out.with_suffix(".log")
    status = start(settings, said, Moments(fatal))
    if status != -signal.SIGKILL:
        return 0, [f"exit status {status} instead of a kill: {said.read_text()[-300:]}"]
    folders = list(out.glob("*/"))
    if folders and (folders[0] / "summary.json").exists():  # of a finished run everything must be there
        ended = Ended(folders[0])
        return 0, ended.differences(whole) + ended.refusals()
    before = steps_taken(folders[0]) if folders else 0
    saved = saved_training(folders)
    status = start(settings, said)
    if status != 0:
        return 0, [f"the same command ends with {status}: {said.read_text()[-300:]}"]
    lost = []
    if saved != "nothing" and list(out.glob("*/")) != folders:
        lost.append("the same command started another run")
    folder = max(out.glob("*/"))
    resumed = [line for line in said.read_text().splitlines() if line.startswith("train: resumed at step ")]
    first = int(resumed[0].split()[4]) if resumed else 0
    again = 0 if saved == "all" else max(before - first, 0)
    if saved == "all" and "\nstep:" in said.read_text():
        lost.append("trained again although training was finished")
    # One interval, and the step that was under way.
    if again > INTERVAL + 1:
        lost.append(f"{again} steps lost, a checkpoint is written every {INTERVAL}")
    ended = Ended(folder)
    return again, lost + ended.differences(whole) + ended.refusals()


def spread(count: int, total: int) -> list[int]:
    """At most `count` different numbers from 1 to `total`, evenly spaced."""
    return sorted({1 + (total - 1) * place // max(count - 1, 1) for place in range(count)}) if total else []


def plan(counts: dict[tuple[str, str], int], stage: str, kills: int) -> list[tuple[str, str, int]]:
    """The moments of a stage at which a run is killed: half of them writes, if there are as many."""
    writes = spread((kills + 1) // 2, counts.get((stage, WRITE), 0))
    calls = spread(kills - len(writes), counts.get((stage, CALL), 0))
    return [(stage, WRITE, place) for place in writes] + [(stage, CALL, place) for place in calls]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the readers' warnings of lines that a kill has cut: they are wanted."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def undisturbed(settings: dict[str, str], out: Path) -> tuple[Ended, dict[tuple[str, str], int]]:
    """A run that nobody kills, and its moments by stage and kind."""
    said = out.with_suffix(".log")
    status = start(settings | {"OUT_DIR": str(out)}, said, Moments(None))
    if status != 0:
        raise RuntimeError(f"the undisturbed run ends with {status}: {said.read_text()[-2000:]}")
    found = json.loads(said.with_suffix(".json").read_text())
    (folder,) = out.glob("*/")
    return Ended(folder), {(stage, kind): count for stage, kind, count in found}


def kill_all(place: Path, stages: list[str], kills: int) -> dict[str, dict[str, int]]:
    """Kill runs at all planned moments and print a line for each stage; the figures of each."""
    (place / "data").mkdir()
    settings = tiny_settings(make_dataset(place / "data"), place / "runs") | SETTINGS
    t.pack_source(Path(t.__file__).read_bytes())  # kept for the forks
    whole, counts = undisturbed(settings, place / "whole")
    print(f"{'stage':<10}{'writes':>8}{'calls':>8}{'kills':>7}{'most steps again':>18}{'lost':>6}{'s':>7}")
    figures = {}
    for stage in stages:
        began = time.monotonic()
        again, failures = [0], []
        moments = plan(counts, stage, kills)
        for fatal in moments:
            out = place / "killed"
            with quiet():
                steps, lost = kill(settings, out, fatal, whole)
            again.append(steps)
            failures += [f"    {' '.join(map(str, fatal))}: {'; '.join(lost)}"] if lost else []
            shutil.rmtree(out)
        writes, calls = (counts.get((stage, kind), 0) for kind in (WRITE, CALL))
        row = f"{stage:<10}{writes:>8}{calls:>8}{len(moments):>7}{max(again):>18}{len(failures):>6}"
        print(f"{row}{time.monotonic() - began:>7.0f}", *failures, sep="\n", flush=True)
        figures[stage] = {"kills": len(moments), "most_steps_again": max(again), "lost": len(failures)}
    return figures


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="in each stage (default %(default)s)")
    parser.add_argument("--stage", action="append", choices=STAGES, help="of these alone (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} kill in each stage")
    options = parser.parse_args(arguments)
    if options.kills < 1:
        print(f"kills: --kills {options.kills}: must be 1 or more", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        figures = kill_all(
            Path(place), options.stage or list(STAGES), QUICK if options.quick else options.kills
        )
    print("RESULT " + json.dumps({"interval": INTERVAL, "stages": figures}))
    return int(any(figure["lost"] for figure in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
