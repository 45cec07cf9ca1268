"""Sweeps: what is run, what a kill or a failure leaves, the statistics, what is refused at the start."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import results
import sweep
from helpers import ROOT, STAND_IN, stand_in
from helpers.run_folders import original
from helpers.sweeps import run_sweep
from helpers.trainer import launch


def call(tmp_path: Path, *words: str, status: int = 0) -> Path:
    """Run a sweep of the stand-in in this process; returns its folder."""
    return run_sweep(tmp_path / "runs", *words, status=status)


def refused(tmp_path: Path, *words: str) -> str:
    """The line with which a sweep is refused; no run was started."""
    with pytest.raises(results.Stop) as stop:
        sweep.main([*words, "--script", str(STAND_IN), "--out", str(tmp_path / "runs"), "--name", "s"])
    assert not list(tmp_path.glob("runs/*/*/starts")) and "\n" not in str(stop.value)
    return str(stop.value)


def starts(folder: Path) -> dict[str, int]:
    """How often each run was started."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in folder.glob("*/starts")}


def test_a_grid_runs_every_combination_once_and_sorts_them(tmp_path, capsys):
    folder = call(tmp_path, "MATRIX_LR=0.02,0.03", "QK_GAIN_INIT=5.25,6", "SEED=1,2")
    assert len(starts(folder)) == 8 and set(starts(folder).values()) == {1}
    rows = sweep.rows_of(folder, "val_bpb")
    assert [row.mean for row in rows] == sorted(row.mean for row in rows)
    assert rows[0].settings == {"MATRIX_LR": "0.03", "QK_GAIN_INIT": "6"}
    for row in rows:
        rate = float(row.settings["MATRIX_LR"])
        gain = float(row.settings["QK_GAIN_INIT"])
        assert row.values == {str(seed): stand_in.score(rate, gain, seed) for seed in (1, 2)}
    shown = capsys.readouterr().out
    assert (
        f"{rows[0].mean:.6f}" in shown and "MATRIX_LR=0.03 QK_GAIN_INIT=6" in shown and "Bonferroni" in shown
    )
    assert (folder / "table.txt").read_text() in shown
    sliding = sweep.rows_of(folder, "bpb.sliding")
    assert sliding[0].mean == pytest.approx(rows[0].mean - 0.001)
    call(tmp_path, "MATRIX_LR=0.02,0.03", "QK_GAIN_INIT=5.25,6", "SEED=1,2")
    assert set(starts(folder).values()) == {1}


def test_the_statistics_are_scipys(tmp_path):
    folder = call(tmp_path, "MATRIX_LR=0.026,0.03", "SEED=1,2,3,4")
    best, baseline = sweep.rows_of(folder, "val_bpb")
    ours, theirs = ([stand_in.score(rate, 5.25, seed) for seed in (1, 2, 3, 4)] for rate in (0.03, 0.026))
    assert best.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-9)
    assert best.difference == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert (best.mean, best.std) == (pytest.approx(np.mean(ours)), pytest.approx(np.std(ours, ddof=1)))
    assert math.isnan(baseline.p_value) and best.pairs == "4 seeds"
    moments = results.mean_std(theirs)
    expected = stats.ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue
    assert results.welch(ours, *moments, 4) == pytest.approx(expected, rel=1e-9)
    assert math.isnan(results.paired([1.0], [2.0])) and results.paired([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_a_frozen_artifact_is_compared_document_by_document(tmp_path):
    (tmp_path / "a.ptz").write_bytes(b"artifact")
    folder = call(tmp_path, "EVAL_STRIDE=64,32", "--stage", "evaluate", "--artifact", str(tmp_path / "a.ptz"))
    best, baseline = sweep.rows_of(folder, "val_bpb")
    ours = stand_in.nats(32)
    theirs = stand_in.nats(64)
    assert best.settings == {"EVAL_STRIDE": "32"} and best.pairs == "200 documents"
    assert best.difference == pytest.approx(best.mean - baseline.mean, rel=1e-9)
    assert abs(best.difference) < 5e-4 and best.p_value < 1e-6
    assert best.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-9)
    config = json.loads((folder / "EVAL_STRIDE-32" / "config.json").read_text())
    assert config["STAGE"] == "evaluate" and config["ARTIFACT"] == str(tmp_path / "a.ptz")
    np.savez(
        folder / "EVAL_STRIDE-32" / "documents.npz", tokens=np.ones(3), bytes=np.ones(3), nats=np.ones(3)
    )
    with pytest.raises(results.Stop, match="other documents"):
        sweep.rows_of(folder, "val_bpb")
    (tmp_path / "a.ptz").write_bytes(b"another")
    with pytest.raises(results.Stop, match="artifact_sha256"):
        call(tmp_path, "EVAL_STRIDE=64,32", "--stage", "evaluate", "--artifact", str(tmp_path / "a.ptz"))


def test_greedy_keeps_the_best_value_of_each_setting(tmp_path):
    folder = call(tmp_path, "--greedy", "MATRIX_LR=0.02,0.03,0.04", "QK_GAIN_INIT=5,6", "SEED=1,2")
    assert sweep.rows_of(folder, "val_bpb")[0].settings == {"MATRIX_LR": "0.03", "QK_GAIN_INIT": "6"}
    assert len(starts(folder)) == 2 * (3 + 1)  # 4 of the 6 combinations
    call(tmp_path, "--greedy", "MATRIX_LR=0.02,0.03,0.04", "QK_GAIN_INIT=5,6", "SEED=1,2")
    assert set(starts(folder).values()) == {1}


def test_a_random_sample_has_the_baseline_and_is_the_same_again(tmp_path):
    words = ["--random", "4", "MATRIX_LR=0.02,0.03,0.04", "QK_GAIN_INIT=5,6,7"]
    folder = call(tmp_path, *words)
    names = set(starts(folder))
    assert len(names) == 4 and "MATRIX_LR-0.02_QK_GAIN_INIT-5" in names
    call(tmp_path, *words)
    assert set(starts(folder)) == names


def test_a_failed_run_is_reported_with_its_error_and_tried_again(tmp_path, capsys):
    folder = call(tmp_path, "MATRIX_LR=0.02,9,0.03", "SEED=1,2", status=1)
    shown = capsys.readouterr().out
    assert "FAILED (exit status 1): train_loss is not finite at step 1; lower MATRIX_LR" in shown
    assert "not finished: MATRIX_LR-9_SEED-2: train_loss is not finite" in shown
    assert len(list(folder.glob("*/summary.json"))) == 4
    call(tmp_path, "MATRIX_LR=0.02,9,0.03", "SEED=1,2", status=1)
    assert starts(folder) == {
        f"MATRIX_LR-{rate}_SEED-{seed}": 2 if rate == "9" else 1
        for rate in ("0.02", "9", "0.03")
        for seed in (1, 2)
    }


def test_after_kill_9_the_same_command_goes_on(tmp_path):
    words = [
        sys.executable,
        str(ROOT / "sweep.py"),
        "MATRIX_LR=0.02,0.03",
        "SEED=1,2,3",
        "--script",
        str(STAND_IN),
        "--out",
        str(tmp_path),
        "--name",
        "s",
        "--jobs",
        "2",
    ]
    folder = tmp_path / "s"
    environment = os.environ | {"WAIT_FOR": str(tmp_path / "go")}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/summary.json"))) < 4 or len(starts(folder)) < 6:  # seed 3 waits
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    again = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "running already" in again.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    before = starts(folder)
    for path in folder.glob("*/.lock"):  # the runs died with the sweep
        while results.is_locked(path.parent):
            assert time.monotonic() < deadline
    assert set(folder.glob("*/summary.json")) == set(finished) and len(finished) == 4
    (tmp_path / "go").touch()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "4 of 6 runs are finished already" in done.stdout
    assert len(list(folder.glob("*/summary.json"))) == 6
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert starts(folder) == {name: count + name.endswith("3") for name, count in before.items()}


def test_runs_go_to_different_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    folder = call(tmp_path, "SEED=1,2,3,4")
    used = [path.read_text().split()[0] for path in folder.glob("*/starts")]
    assert sorted(used) == ["2", "3", "5", "7"]
    options = argparse.Namespace(gpus_per_run=2, jobs=0)
    assert sweep.local(options)[1] == 2
    with pytest.raises(results.Stop, match="there are 4 GPUs"):
        sweep.local(argparse.Namespace(gpus_per_run=8, jobs=0))


def test_settings_come_from_axes_then_environment_then_recipe(tmp_path, monkeypatch):
    recipe = tmp_path / "r.env"
    recipe.write_text("# a recipe\nMATRIX_LR=1\nQK_GAIN_INIT=7\n\nITERATIONS=99\n")
    monkeypatch.setenv("QK_GAIN_INIT", "6")
    folder = call(tmp_path, "MATRIX_LR=0.02", "--recipe", str(recipe))
    config = json.loads((folder / "MATRIX_LR-0.02" / "config.json").read_text())
    assert (config["MATRIX_LR"], config["QK_GAIN_INIT"], config["ITERATIONS"]) == ("0.02", "6", "99")
    monkeypatch.setenv("QK_GAIN_INIT", "5")
    with pytest.raises(results.Stop, match=r"QK_GAIN_INIT=6.0, now it is 5.0"):
        call(tmp_path, "MATRIX_LR=0.02", "--recipe", str(recipe))


def test_an_edit_of_the_script_changes_no_run_and_is_noticed(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(STAND_IN.read_text())
    words = ["SEED=1,2", "--out", str(tmp_path), "--name", "s"]
    sweep.main([*words, "--script", str(script)])
    assert (tmp_path / "s" / "train_gpt.py").read_text() == STAND_IN.read_text()
    script.write_text(STAND_IN.read_text() + "# changed\n")
    with pytest.raises(results.Stop, match="has changed since .*--name NEW .*--script .*train_gpt.py"):
        sweep.main([*words, "--script", str(script)])
    sweep.main([*words, "--script", str(tmp_path / "s" / "train_gpt.py")])


@pytest.mark.parametrize(
    "words, message",
    [
        (["MATRIX_LR=abc"], "MATRIX_LR=abc: must be a number"),
        (["MATRIX_LX=0.1"], "MATRIX_LX: not a setting"),
        (["MATRIX_LR=0.02,0.020"], "MATRIX_LR=0.02,0.020: these are the same value"),
        (["MATRIX_LR=0.02,0.02"], "has a value twice"),
        (["MATRIX_LR=0.02", "MATRIX_LR=0.03"], "is given twice"),
        (["MATRIX_LR"], "MATRIX_LR: give NAME=value"),
        (["MATRIX_LR=0.02,"], "give NAME=value"),
        (["RUN_ID=a,b"], "RUN_ID: the sweep sets it"),
        (["SEED=1", "--greedy", "--random", "2"], "no --random"),
        (["SEED=1", "--random", "-1"], "--random -1"),
        (["SEED=1", "--gpus-per-run", "3"], "--gpus-per-run 3"),
        (["SEED=1", "--recipe", "nothing.env"], "nothing.env"),
        (["SEED=1", "--stage", "evaluate"], "--artifact FILE"),
        (["MATRIX_LR=0.02,0.03", "--interleave"], "--interleave: needs seeds"),
        (["SEED=1", "--interleave", "--jobs", "2"], "--jobs 2: --interleave has one run"),
        (["SEED=1", "--stage", "evaluate", "--artifact", "nothing.ptz"], "nothing.ptz: no such file"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(tmp_path, words, message):
    assert message in refused(tmp_path, *words)


def test_a_metric_that_no_summary_holds_is_named_after_the_runs(tmp_path):
    with pytest.raises(
        results.Stop, match="bpb.ttt: .*there are: val_bpb, steps, train_seconds, bpb.quantized, bpb.sliding"
    ):
        call(tmp_path, "SEED=1", "--metric", "bpb.ttt")
    assert sweep.rows_of(call(tmp_path, "SEED=1"), "val_bpb")[0].values


@pytest.mark.parametrize("launcher, package", [("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_launcher_is_one_line(tmp_path, monkeypatch, launcher, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(tmp_path, "SEED=1", "--launcher", launcher)
    assert message == f"--launcher {launcher}: needs the package {package}; pip install {package}"


def test_ray_tasks_are_started_and_a_lost_one_is_a_failure(tmp_path, monkeypatch, capsys):
    class RayError(Exception):
        pass

    def get(outcome):
        if isinstance(outcome, RayError):
            raise outcome
        return outcome

    def remote(**resources):
        def wrap(function):
            lost = lambda command, settings, console, folder: (
                RayError("node lost")
                if settings["SEED"] == "2"
                else function(command, settings, console, folder)
            )
            return types.SimpleNamespace(remote=lost)

        return wrap

    chosen = {}
    fake = types.SimpleNamespace(
        init=lambda **options: chosen.update(options),
        remote=remote,
        get=get,
        wait=lambda references, timeout: (references, []),
        exceptions=types.SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    folder = call(tmp_path, "SEED=1,2,3", "--launcher", "ray", "--launcher-option", "address=auto", status=1)
    assert chosen == {"address": "auto"} and len(starts(folder)) == 2
    assert "SEED-2: node lost" in capsys.readouterr().out


def test_submitits_own_executor_runs_a_sweep(tmp_path):
    pytest.importorskip("submitit")
    folder = call(
        tmp_path,
        "MATRIX_LR=0.03,9",
        "--launcher",
        "slurm",
        "--launcher-option",
        "cluster=local",
        "--launcher-option",
        "gpus_per_node=0",
        status=1,
    )
    failed, finished = sorted(sweep.rows_of(folder, "val_bpb"), key=lambda row: len(row.values))
    assert finished.settings == {"MATRIX_LR": "0.03"} and "not finite" in failed.failed["default"]


@pytest.mark.parametrize(
    "answers, states",
    [
        # Listed, gone twice: killed. A controller that does not answer is no proof.
        ([(0, "RUNNING", ""), (1, "", "Invalid job id specified"), (0, "", "")], [None, None, 1]),
        ([(1, "", "Unable to contact slurm controller"), (0, "", ""), (0, "RUNNING", "")], [None] * 3),
    ],
)
def test_a_slurm_job_that_leaves_the_queue_without_a_result_has_failed(
    tmp_path, monkeypatch, answers, states
):
    replies = iter(answers)
    monkeypatch.setattr(sweep, "QUEUE_SECONDS", 0)
    monkeypatch.setattr(sweep.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        sweep.subprocess,
        "run",
        lambda command, **options: subprocess.CompletedProcess(command, *next(replies)),
    )
    job = sweep.SlurmJob(types.SimpleNamespace(job_id="7", done=lambda: False), tmp_path / "console.log")
    assert [job.poll() for _ in answers] == states
    killed = states[-1] == 1
    assert (tmp_path / "console.log").exists() == killed
    assert not killed or "job 7 has left" in (tmp_path / "console.log").read_text()


def test_torchruns_report_is_not_the_error(tmp_path):
    console = tmp_path / "console.log"
    console.write_text(
        "step 1\nSEED=x: must be a number\nE1121 08:00:00.1 12 torch/distributed/elastic/x.py:1] no\n"
        "Traceback\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    )
    assert sweep.last_line(console) == "SEED=x: must be a number"


def test_the_trainer_itself_is_swept_over_one_artifact(dataset, tmp_path, monkeypatch):
    def start(command, settings, console, slot):  # in this process, which has loaded torch already
        return lambda: launch(settings).returncode

    run = original(dataset)
    monkeypatch.setitem(sweep.LAUNCHERS, "local", lambda options: (start, 1))
    sweep.main(
        [
            "EVAL_STRIDE=8",
            "--stage",
            "evaluate",
            "--artifact",
            str(run / "final_model.ptz"),
            "--out",
            str(tmp_path),
            "--name",
            "s",
        ]
    )
    (row,) = sweep.rows_of(tmp_path / "s", "val_bpb")
    assert row.mean == pytest.approx(json.loads((run / "summary.json").read_text())["val_bpb"], rel=1e-9)
    documents = results.read_documents(row.runs["default"])
    assert documents.nats.sum() / math.log(2) / documents.bytes.sum() == pytest.approx(row.mean, rel=1e-9)
