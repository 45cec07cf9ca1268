#!/usr/bin/env python3
"""Send a run's figures to TensorBoard, Weights & Biases or trackio while it runs, beside the trainer.

    TRACKER=wandb ./run.sh                      run.sh starts this script
    TRACKER=tensorboard python track.py runs/A  a run that is going on, or one that has ended

It follows metrics.jsonl of the run folder (RUN_ID, or the run that starts after it) until the trainer lets go of the
folder, and goes on where it was if the run is resumed. A tracker that is missing or fails costs one warning, no run.
TRACKER_PROJECT names the project (default parameter-golf).
"""

from __future__ import annotations

import environment

environment.enter()
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from results import Stop, is_locked, read_json, step_of, write_atomically

PAUSE = 2.0  # seconds between two looks at the file
NAMES = {
    "train_loss": "train/loss",
    "rate": "train/lr",
    "step_ms": "perf/step_ms",
    "speed": "perf/tok_per_s",
    "val_loss": "val/loss",
    "val_bpb": "val/bpb",
}


class Tracker(Protocol):
    """Where figures go."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the values of one step."""

    def finish(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in tensorboard/ of the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        module = importlib.import_module("torch.utils.tensorboard")
        self.writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))
        self.writer.add_text("settings", json.dumps(config, indent=1))

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the values of one step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write what is left."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, or of trackio, which has the same functions; its name is the folder's."""

    def __init__(self, package: str, folder: Path, config: Mapping[str, Any]):
        self.module = importlib.import_module(package)
        project = os.environ.get("TRACKER_PROJECT", "parameter-golf")
        once = {"id": folder.name} if package == "wandb" else {}
        self.module.init(project=project, name=folder.name, config=dict(config), resume="allow", **once)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the values of one step."""
        self.module.log(values, step=step)

    def finish(self) -> None:
        """Send what is left."""
        self.module.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda folder, config: Wandb("wandb", folder, config),
    "trackio": lambda folder, config: Wandb("trackio", folder, config),
}


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one record of metrics.jsonl, by the names that trackers sort into groups."""
    kind, stage = record.get("kind"), record.get("stage", "")
    suffix = "" if not stage or stage.startswith("step") else f"_{stage}"
    numbers = {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("time", "step")
    }
    if kind in ("train", "score") and "steps" not in record:
        return {NAMES[name] + suffix: value for name, value in numbers.items() if name in NAMES}
    return {f"summary/{name}": value for name, value in numbers.items()}


def follow(folder: Path, start: int, pause: float) -> Iterator[tuple[dict[str, Any], int]]:
    """(record, offset behind it) of the complete lines of metrics.jsonl from byte `start`, until nobody writes them."""
    path, offset = folder / "metrics.jsonl", start
    while True:
        alive = is_locked(folder)
        data = b""
        if path.exists():
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read()
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:  # cut by a kill
                continue
            yield record, offset
        if not alive:
            return
        time.sleep(pause)


def starting_run(pause: float) -> Path | None:
    """The folder of the run that the parent of this process starts; None if the parent ends before."""
    parent, begin = os.getppid(), time.time()
    root, name = Path(os.environ.get("OUT_DIR", "runs")), os.environ.get("RUN_ID") or "*"
    while os.getppid() == parent:
        found = [path for path in root.glob(f"{name}/config.json") if path.stat().st_mtime >= begin - 1]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime).parent
        time.sleep(pause)
    return None


def track(folder: Path, name: str, pause: float) -> None:
    """Send a run's records to the tracker until the run ends."""
    mark = folder / f".{name}.json"  # how far an earlier start has come
    known = read_json(mark) if mark.exists() else {"offset": 0, "step": 0}
    tracker, step = TRACKERS[name](folder, read_json(folder / "config.json")), known["step"]
    for record, offset in follow(folder, known["offset"], pause):
        step = step_of(record, step)
        if values := figures(record):
            tracker.log(values, step)
        write_atomically(mark, json.dumps({"offset": offset, "step": step}))
    tracker.finish()


def main(arguments: list[str]) -> None:
    """Follow the run in the folder given, or the one that is about to start; every failure is one warning."""
    name = os.environ.get("TRACKER", "none")
    if arguments in (["-h"], ["--help"]):
        print(f"usage: TRACKER={'|'.join(TRACKERS)} track.py [RUN_FOLDER]\n\n{__doc__}")
        return
    if name == "none":
        return
    if name not in TRACKERS:
        raise Stop(f"TRACKER={name}: must be one of none, {', '.join(TRACKERS)}")
    folder = Path(arguments[0]) if arguments else starting_run(PAUSE)
    if folder is None:
        return
    if not (folder / "config.json").exists():
        raise Stop(f"{folder}: no run folder; give one, such as runs/NAME")
    try:
        track(folder, name, PAUSE)
    except ImportError as error:
        print(
            f"warning: TRACKER={name}: {error}; pip install {name}, the run itself is not affected",
            file=sys.stderr,
        )
    except Exception as error:
        print(
            f"warning: TRACKER={name}: stopped by {type(error).__name__}: {error}; the run itself is not affected, "
            f"`TRACKER={name} python track.py {folder}` goes on",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
