"""The tracker's tail: what it sends, where it goes on, and that its failure costs a run nothing."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import types
from pathlib import Path

import pytest

import results
import track


class Service(types.ModuleType):
    """Stands in for wandb: keeps what it is sent."""

    def __init__(self, fail_after: int = 10**9):
        super().__init__("wandb")
        self.started = []
        self.sent = []
        self.axes = {}
        self.finished = 0
        self.fail_after = fail_after

    def init(self, **options):
        self.started.append(options)

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values, step=None):
        if len(self.sent) == self.fail_after:
            raise ConnectionError("no route")
        if self.axes.get("*"):  # W&B drops what has a step below its own counter
            assert step is None
            values = dict(values)
            step = values.pop(self.axes["*"])
        self.sent.append((step, values))

    def finish(self):
        self.finished += 1


RECORDS = [
    {
        "kind": "train",
        "time": 1.0,
        "step": 1,
        "train_loss": 6.5,
        "rate": 1.0,
        "step_ms": 120.0,
        "speed": 5000,
    },
    {"kind": "score", "time": 2.0, "stage": "step1", "val_loss": 4.0, "val_bpb": 2.5, "tokens": 9},
    {"kind": "train", "time": 3.0, "steps": 2, "train_seconds": 7.5, "peak_memory_mib": 100},
    {"kind": "score", "time": 4.0, "stage": "sliding", "val_loss": 3.0, "val_bpb": 2.0, "seconds": 1.5},
]
SENT = [
    (1, {"train/loss": 6.5, "train/lr": 1.0, "perf/step_ms": 120.0, "perf/tok_per_s": 5000}),
    (1, {"val/loss": 4.0, "val/bpb": 2.5}),
    (2, {"summary/steps": 2, "summary/train_seconds": 7.5, "summary/peak_memory_mib": 100}),
    (2, {"val/loss_sliding": 3.0, "val/bpb_sliding": 2.0}),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run folder whose trainer has ended."""
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"SEED": 1}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def service(monkeypatch, name: str = "wandb", **options) -> Service:
    """Put the stand-in in the place of a package."""
    monkeypatch.setenv("TRACKER", name)
    monkeypatch.setattr(track, "PAUSE", 0.01)
    fake = Service(**options)
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_finished_run_is_sent_once(folder, monkeypatch, name):
    fake = service(monkeypatch, name)
    track.main([str(folder)])
    assert fake.sent == SENT and fake.finished == 1
    assert fake.started[0]["name"] == "a" and fake.started[0]["config"] == {"SEED": 1}
    track.main([str(folder)])
    assert fake.sent == SENT


def test_steps_that_a_resumed_run_takes_again_are_not_dropped(folder, monkeypatch):
    """W&B ignores values for a step below the last one, so its own counter must not be the step."""
    again = [{"kind": "resume", "time": 5.0, "step": 0, "seconds": 0.1}, RECORDS[0]]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in again)
    fake = service(monkeypatch)
    track.main([str(folder)])
    assert fake.axes == {"step": None, "*": "step"}
    assert fake.sent == [*SENT, (0, {"summary/seconds": 0.1}), SENT[0]]


def test_tensorboard_gets_scalars(folder, monkeypatch):
    scalars = []
    writer = types.SimpleNamespace(
        add_text=lambda *_: None,
        close=lambda: scalars.append("closed"),
        add_scalar=lambda name, value, step: scalars.append((name, value, step)),
    )
    places = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda log_dir: places.append(log_dir) or writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setenv("TRACKER", "tensorboard")
    track.main([str(folder)])
    assert (
        ("train/loss", 6.5, 1) in scalars
        and ("val/bpb_sliding", 2.0, 2) in scalars
        and scalars[-1] == "closed"
    )
    assert places == [str(folder / "tensorboard")]


def test_it_follows_a_run_until_the_trainer_lets_go_and_goes_on_after_a_resumption(folder, monkeypatch):
    fake = service(monkeypatch)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + lines[1][:20])  # the trainer is in the middle of a line
    lock = open(folder / ".lock", "w")  # noqa: SIM115 -- held by the trainer until it ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=track.main, args=([str(folder)],))
    thread.start()
    while not fake.sent:
        thread.join(0.01)
    assert thread.is_alive() and fake.sent == SENT[:1]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(lines[1][20:])
    lock.close()
    thread.join(10)
    assert not thread.is_alive() and fake.sent == SENT[:2] and fake.finished == 1
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(lines[2:])
    track.main([str(folder)])
    assert fake.sent == SENT


def test_it_takes_the_folder_that_the_trainer_names_and_no_other(folder, monkeypatch, tmp_path):
    told = tmp_path / "told"
    monkeypatch.setenv("RUN_FOLDER_FILE", str(told))
    (folder.parent / "b").mkdir()
    (folder.parent / "b" / "config.json").write_text("{}")  # a run of somebody else, newer than ours
    threading.Timer(0.1, lambda: told.write_text(f"started {folder}\n")).start()
    assert track.starting_run(0.01) == folder
    monkeypatch.delenv("RUN_FOLDER_FILE")
    with pytest.raises(results.Stop, match="RUN_FOLDER_FILE is not set; give the run's folder"):
        track.starting_run(0.01)


def test_a_parent_that_ends_first_ends_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_FOLDER_FILE", str(tmp_path / "told"))
    parents = iter([10, 10, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    assert track.starting_run(0.0) is None


def test_a_missing_package_or_a_failing_service_is_one_warning(folder, monkeypatch, capsys):
    service(monkeypatch)
    monkeypatch.setitem(sys.modules, "wandb", None)
    track.main([str(folder)])
    shown = capsys.readouterr().err
    assert "warning: TRACKER=wandb" in shown and "pip install wandb" in shown and shown.count("\n") == 1
    fake = service(monkeypatch, fail_after=1)
    track.main([str(folder)])
    shown = capsys.readouterr().err
    assert "ConnectionError: no route" in shown and shown.count("\n") == 1 and fake.sent == SENT[:1]
    fake.fail_after = 10**9
    track.main([str(folder)])  # what failed is sent again
    assert fake.sent == SENT


def test_nothing_is_tracked_unless_asked_and_an_unknown_tracker_is_refused(folder, monkeypatch):
    fake = service(monkeypatch)
    monkeypatch.delenv("TRACKER")
    track.main([])
    with pytest.raises(results.Stop, match=r"TRACKER is not set: .*TRACKER=wandb ./track.py"):
        track.main([str(folder)])
    assert not fake.started
    monkeypatch.setenv("TRACKER", "wandbb")
    with pytest.raises(
        results.Stop, match="TRACKER=wandbb: must be one of none, tensorboard, wandb, trackio"
    ):
        track.main([str(folder)])
