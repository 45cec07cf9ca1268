#!/usr/bin/env python3
"""Send a run's figures to TensorBoard, Weights & Biases or trackio while it runs, beside the trainer.

    TRACKER=wandb ./run.sh                      run.sh starts this script
    TRACKER=tensorboard ./track.py runs/A       a run that is going on, or one that has ended

It follows metrics.jsonl of the run folder (that given, or that which the trainer names in the file
RUN_FOLDER_FILE) until the trainer lets go of the folder, and goes on where it was if the run is resumed. A
tracker that is missing or fails costs one warning, no run. TRACKER_PROJECT names the project (default
parameter-golf).
"""

from __future__ import annotations

import environment

environment.enter()
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from results import (
    Run,
    Stop,
    is_count,
    is_locked,
    is_number,
    parse_record,
    read_json,
    run_tool,
    step_of,
    warn,
    write_atomically,
)

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
    """A run of Weights & Biases; its name is the folder's.

    A run that was resumed takes steps again, and W&B drops what comes for a step below its own counter. So
    that counter is left to it, and the step is a value like others that every chart has for its axis.
    """

    package = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.module = importlib.import_module(self.package)
        project = os.environ.get("TRACKER_PROJECT", "parameter-golf")
        options = {"project": project, "name": folder.name, "config": dict(config), "resume": "allow"}
        self.start(options)

    def start(self, options: dict[str, Any]) -> None:
        """Begin the run, or go on with it."""
        self.module.init(id=options["name"], **options)
        self.module.define_metric("step")
        self.module.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the values of one step."""
        self.module.log({**values, "step": step})

    def finish(self) -> None:
        """Send what is left."""
        self.module.finish()


class Trackio(Wandb):
    """A run of trackio, which has the functions of W&B and takes steps in any order."""

    package = "trackio"

    def start(self, options: dict[str, Any]) -> None:
        """Begin the run, or go on with it."""
        self.module.init(**options)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the values of one step."""
        self.module.log(values, step=step)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one record of metrics.jsonl, by the names that trackers sort into groups."""
    kind = record.get("kind")
    stage = record.get("stage", "")
    suffix = "" if not stage or stage.startswith("step") else f"_{stage}"
    numbers = {
        name: value for name, value in record.items() if is_number(value) and name not in ("time", "step")
    }
    if kind in ("train", "score") and "steps" not in record:
        return {NAMES[name] + suffix: value for name, value in numbers.items() if name in NAMES}
    return {f"summary/{name}": value for name, value in numbers.items()}


def follow(folder: Path, start: int, pause: float) -> Iterator[tuple[dict[str, Any], int]]:
    """(record, offset behind it) of the complete lines of metrics.jsonl from byte `start`, until nobody
    writes them."""
    path = folder / "metrics.jsonl"
    offset = start
    while True:
        alive = is_locked(folder)
        data = b""
        if path.exists():
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read()
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            begin = offset
            offset += len(line)
            try:
                record = parse_record(line)
            except ValueError as error:
                warn(f"{path}: the line at byte {begin}: {error}; it is skipped")
                continue
            yield record, offset
        if not alive:
            return
        time.sleep(pause)


def starting_run(pause: float) -> Path | None:
    """The folder that the trainer names in the file RUN_FOLDER_FILE; None if the parent ends first."""
    told = os.environ.get("RUN_FOLDER_FILE")
    if not told:
        raise Stop(
            "RUN_FOLDER_FILE is not set; give the run's folder, as in TRACKER=wandb ./track.py runs/NAME"
        )
    parent = os.getppid()
    while os.getppid() == parent:
        state, _, folder = read_text(Path(told)).rstrip("\n").partition(" ")
        if state and folder:
            return Path(folder)
        time.sleep(pause)
    return None


def read_text(path: Path) -> str:
    """The text of a file, empty if it is not there yet."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""


def position_of(folder: Path, mark: Path) -> tuple[int, int]:
    """(offset, step) that an earlier start has come to; Stop if that is no place in metrics.jsonl."""
    if not mark.exists():
        return 0, 0
    known = read_json(mark)
    offset, step = known.get("offset"), known.get("step")
    size = (folder / "metrics.jsonl").stat().st_size
    if not (is_count(offset) and is_count(step) and offset <= size):
        raise Stop(f"{mark}: names no place in metrics.jsonl; delete it to send all figures again")
    return offset, step


def track(folder: Path, name: str, pause: float) -> None:
    """Send a run's records to the tracker until the run ends."""
    mark = folder / f".{name}.json"
    start, step = position_of(folder, mark)
    tracker = TRACKERS[name](folder, Run.read(folder).config)
    for record, offset in follow(folder, start, pause):
        step = step_of(record, step)
        if values := figures(record):
            tracker.log(values, step)
        # After every record: waiting for the disk would take longer than sending it.
        write_atomically(mark, json.dumps({"offset": offset, "step": step}), lasting=False)
    tracker.finish()


def main(arguments: list[str]) -> None:
    """Follow the run in the folder given, or the one that is about to start; every failure is one warning."""
    name = os.environ.get("TRACKER", "none")
    if arguments in (["-h"], ["--help"]):
        print(f"usage: TRACKER={'|'.join(TRACKERS)} track.py [RUN_FOLDER]\n\n{__doc__}")
        return
    if len(arguments) > 1:
        raise Stop(f"{' '.join(arguments)}: give one run folder, such as runs/NAME")
    if name == "none":
        if arguments:
            raise Stop(f"TRACKER is not set: name a service, as in TRACKER=wandb ./track.py {arguments[0]}")
        return
    if name not in TRACKERS:
        raise Stop(f"TRACKER={name}: must be one of none, {', '.join(TRACKERS)}")
    folder = Path(arguments[0]) if arguments else starting_run(PAUSE)
    if folder is None:
        return
    if arguments and not (folder / "config.json").exists():
        raise Stop(f"{folder}: no run folder; give one, such as runs/NAME")
    wait_for_config(folder)
    try:
        track(folder, name, PAUSE)
    except ImportError as error:
        warn(f"TRACKER={name}: {error}; pip install {name}, the run itself is not affected")
    except Exception as error:  # of any kind: the service's client is foreign code
        text = " ".join(str(error).split())
        warn(
            f"TRACKER={name}: stopped by {type(error).__name__}: {text}; the run itself is not affected, "
            f"`TRACKER={name} ./track.py {folder}` goes on"
        )


def wait_for_config(folder: Path) -> None:
    """Wait until a run that has just taken its folder has written config.json there, or has ended."""
    while not (folder / "config.json").exists() and is_locked(folder):
        time.sleep(PAUSE / 10)


if __name__ == "__main__":
    run_tool(main)
