"""The readers of run folders: a damaged line is named and skipped, a damaged file refused in one line."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import report
import results
import submit
import sweep
import track
from helpers import ROOT, STAND_IN
from helpers.damage import json_mutants, mutants
from helpers.processes import run_python
from helpers.readers import read_all, text_alone
from helpers.run_folders import edit, original

ROUNDS = 60  # mutants of each file; 2,000 were tried once


@pytest.fixture
def run(dataset, tmp_path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(original(dataset), tmp_path / "runs" / "a")


@pytest.fixture
def quick() -> Iterator[None]:
    """Without the parts of a report that depend on the artifact and the trainer alone."""
    with text_alone():
        yield


def survives(folder: Path, capsys) -> bool:
    """Whether the run is read; if not, it is refused in one line. Warnings are one line each."""
    try:
        read_all(folder)
    except results.Stop as stop:
        assert str(stop) and "\n" not in str(stop)
        return False
    finally:
        warnings = capsys.readouterr().err.splitlines()
        assert all(line.startswith("warning: ") for line in warnings), warnings
    return True


@pytest.mark.parametrize("name", ["summary.json", "config.json", "stages.json", "metrics.jsonl", "train.log"])
def test_damaged_bytes_never_end_in_a_traceback(run, quick, capsys, name):
    assert survives(run, capsys)
    for data in mutants((run / name).read_bytes(), ROUNDS, 1):
        (run / name).write_bytes(data)
        survives(run, capsys)


@pytest.mark.parametrize("name", ["summary.json", "config.json", "stages.json"])
def test_odd_values_never_end_in_a_traceback(run, quick, capsys, name):
    for text in json_mutants((run / name).read_text(), 3 * ROUNDS, 2):
        (run / name).write_text(text)
        survives(run, capsys)


def test_odd_values_in_a_record_never_end_in_a_traceback(run, quick, capsys):
    source = random.Random(3)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for seed in range(2 * ROUNDS):
        place = source.randrange(len(lines))
        changed = [*lines[:place], *json_mutants(lines[place], 1, seed), *lines[place + 1 :]]
        (run / "metrics.jsonl").write_text("\n".join(changed) + "\n")
        survives(run, capsys)


def test_damaged_sums_per_document_are_refused(run, quick, capsys):
    whole = (run / "documents.npz").read_bytes()
    for data in mutants(whole, ROUNDS, 4):
        (run / "documents.npz").write_bytes(data)
        survives(run, capsys)
    for changes in ({"nats": np.zeros(3)}, {"bytes": np.array(["x"])}, {"tokens": np.ones((2, 2))}):
        arrays = {name: np.ones(4) for name in ("tokens", "bytes", "nats")}
        np.savez(run / "documents.npz", **(arrays | changes))
        with pytest.raises(results.Stop, match=r"documents.npz: \w+ is no list of numbers"):
            results.read_arrays(run)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("null", "not an object"),
        ("[1]", "not an object"),
        ('{"kind": "tra', "not JSON"),
        ("[" * 50_000, "not JSON"),
        ('{"step": 3}', "has no kind"),
        ('{"kind": "resume"}', "has no step"),
        ('{"kind": "ledger", "event": "start"}', "has no time"),
        ('{"kind": "train", "step": -1, "train_loss": 1, "rate": 1}', "step is -1"),
        ('{"kind": "train", "step": 1, "train_loss": NaN, "rate": 1}', "train_loss is nan"),
        ('{"kind": "score", "stage": 3}', "stage is 3"),
        ('{"kind": "train", "step": 1' + "0" * 400 + "}", "step is 1000"),
    ],
)
def test_a_damaged_line_is_named_and_skipped_by_every_reader(run, quick, capsys, line, reason):
    path = run / "metrics.jsonl"
    before = results.Run.read(run).records()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    assert results.Run.read(run).records() == before
    assert f"warning: {path}:3: {reason}" in capsys.readouterr().err
    assert survives(run, capsys)
    offset = len("\n".join(lines[:2])) + 1
    track.track(run, "silent", 0.0)  # goes on at the end: nothing is sent twice
    (run / ".silent.json").unlink()
    capsys.readouterr()
    track.track(run, "silent", 0.0)
    assert f"{path}: the line at byte {offset}: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mark", ["null", "{}", '{"offset": 5}', '{"offset": -1, "step": 0}', '{"offset": 1e9, "step": 0}']
)
def test_a_damaged_mark_of_a_tracker_is_refused(run, quick, mark):
    (run / ".silent.json").write_text(mark)
    with pytest.raises(results.Stop, match=r"\.silent\.json: "):
        track.track(run, "silent", 0.0)


@pytest.mark.parametrize(
    "plan", ["null", "{}", '{"runs": []}', '{"runs": {"a": null}}', '{"runs": {"../a": {}}}']
)
def test_a_damaged_plan_of_a_sweep_is_refused_by_every_reader(run, tmp_path, plan):
    (tmp_path / "runs" / "sweep.json").write_text(plan)
    words = [
        "SEED=1",
        "--script",
        str(STAND_IN),
        "--out",
        str(tmp_path),
        "--name",
        "runs",
    ]
    for reader in (
        lambda: sweep.rows_of(tmp_path / "runs", "val_bpb"),
        lambda: sweep.main(words),
        lambda: report.main([str(tmp_path / "runs")]),
        lambda: list(submit.started([results.Run.read(run)])),
    ):
        with pytest.raises(results.Stop, match=r"sweep\.json: "):
            reader()


def test_a_damaged_summary_of_one_run_does_not_stop_a_sweep(run, capsys):
    edit(run / "summary.json", lambda summary: summary.update(val_bpb=None, bpb=3))
    assert sweep.outcome_of(run, 0) == (
        f"FAILED: {run / 'summary.json'}: bpb is 3, not an object; copy the file again, or repeat the run"
    )


@pytest.mark.parametrize("text", ["nan,0.1,3", "inf,0.1,3", "1,inf,3", "1,nan,3"])
def test_a_baseline_that_is_no_number_is_refused(text):
    with pytest.raises(results.Stop, match="--baseline"):
        submit.read_baseline(text, None)


@pytest.mark.parametrize(
    "facts",
    [
        {"seed_results": 3},
        {"seed_results": {"1": {"val_bpb": "1"}, "2": {"val_bpb": None}}},
        {"val_bpb": "1", "val_bpb_std": 0.1, "seeds": [1, 2]},
        {"val_bpb": 1.0, "val_bpb_std": 0.1, "seeds": 2},
    ],
)
def test_a_damaged_record_is_no_baseline(tmp_path, facts):
    (tmp_path / "submission.json").write_text(json.dumps(facts))
    with pytest.raises(results.Stop, match="--baseline mean,std,n"):
        submit.read_baseline(None, tmp_path)


# === WRITES THAT FAIL ===


def full(text: str = "") -> None:
    """Stands in for a write to a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_leaves_the_old_file(run, monkeypatch):
    (run / "report.html").write_text("old")
    monkeypatch.setattr(os, "replace", lambda source, target: full())
    with pytest.raises(results.Stop, match=r"report.html: cannot be written \(No space left on device\)"):
        report.main([str(run)])
    assert (run / "report.html").read_text() == "old"


# A tool that writes to another standard output.
REDIRECTED = """
import os, runpy, sys
os.dup2({output}, 1)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FULL = REDIRECTED.format(output="os.open('/dev/full', os.O_WRONLY)")
UNREAD = "import os\nreading, writing = os.pipe()\nos.close(reading)" + REDIRECTED.format(output="writing")


@pytest.mark.parametrize("words", [["recipes.py", "records/recipes/pr1585.env"], ["report.py", "RUN"]])
def test_a_full_output_is_one_line(run, words):
    words = [str(run) if word == "RUN" else str(ROOT / word) for word in words]
    done = run_python(["-c", FULL, *words])
    assert done.returncode and done.stderr.startswith("standard output: No space left on device; ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(run):
    done = run_python(["-c", UNREAD, ROOT / "report.py", run])
    assert (done.returncode, done.stderr) == (1, "")


def test_what_stops_a_tool_from_outside_is_one_line(monkeypatch, tmp_path):
    def stopped(error: BaseException):
        def main(arguments):
            raise error

        with pytest.raises(SystemExit) as stop:
            results.run_tool(main)
        return stop.value

    assert "interrupted" in str(stopped(KeyboardInterrupt()))
    message = str(stopped(PermissionError(errno.EACCES, "Permission denied", "/x/y")))
    assert message.startswith("/x/y: Permission denied; ") and "\n" not in message
    with pytest.raises(ZeroDivisionError):  # a fault of the program stays one
        results.run_tool(lambda arguments: 1 // 0)
    with pytest.raises(SystemExit) as stop:
        results.run_tool(lambda arguments: 3)
    assert stop.value.code == 3


def test_a_record_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "records").write_text("a file")
    with pytest.raises(
        results.Stop, match=r"records/demo: cannot be written \(Not a directory\); choose another"
    ):
        submit.write_folder(tmp_path / "records" / "demo" / "x", [], {}, "", tmp_path)


def test_a_score_that_no_float_can_hold_is_refused(run):
    edit(run / "stages.json", lambda stages: stages["evaluate"].update(val_bpb=10**400))
    with pytest.raises(results.Stop, match="stages.json says 1000"):
        submit.check_run(results.Run.read(run))
