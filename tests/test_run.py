"""Whole runs: every stage, every file, resuming, several processes, and what must stop a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gpt as t
from helpers import ROOT
from helpers.processes import kill_python
from helpers.trainer import FRESH_RANK, RANK, environment, launch, tiny_settings


def artifact_hash(folder: Path) -> str:
    """sha256 of a run's artifact."""
    return hashlib.sha256((folder / "final_model.ptz").read_bytes()).hexdigest()


def losses(folder: Path) -> list[float]:
    """Training losses of a run in full precision."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        record["train_loss"] for record in records if record["kind"] == "train" and "train_loss" in record
    ]


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """The run ended with exactly one line of error that holds `words`."""
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


# What of the packer is off by default.
PACKER = {
    "OUTPUT_FEEDBACK": "1",
    "OUTPUT_DAMPENING": "0.5",
    "CORRECT_LEVELS": "1",
    "TUNE_STEPS": "3",
    "TUNE_TOKENS": "256",
    "TUNE_MATRICES": "1",
}


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """(settings, folder) of one finished run, shared by the tests that only look at it."""
    out = tmp_path_factory.mktemp("finished")
    settings = tiny_settings(dataset, out) | PACKER | {"RUN_ID": "a"}
    result = launch(settings, processes=1)
    assert result.returncode == 0, result.stderr
    (out / "a" / "stdout").write_text(result.stdout)
    return settings, out / "a"


def test_a_run_leaves_everything_it_promises(finished):
    _settings, folder = finished
    summary = json.loads((folder / "summary.json").read_text())
    for name in (
        "val_bpb",
        "val_loss",
        "bpb",
        "artifact_bytes",
        "code_bytes",
        "total_bytes",
        "train_seconds",
        "eval_seconds",
        "steps",
        "step_ms",
        "tokens_per_second",
        "seed",
        "world_size",
        "overrides",
        "compliance",
        "versions",
        "data",
    ):
        assert summary[name] is not None, name
    assert set(summary["bpb"]) == {"prequant", "quantized", "sliding", "ttt"}
    assert summary["val_bpb"] == summary["bpb"]["ttt"]
    assert summary["artifact_bytes"] == (folder / "final_model.ptz").stat().st_size
    assert summary["code_bytes"] == (folder / "packed_train_gpt.py").stat().st_size
    assert summary["total_bytes"] == summary["artifact_bytes"] + summary["code_bytes"]
    assert summary["artifact_sha256"] == artifact_hash(folder) and summary["steps"] == 8
    assert summary["compliance"]["legal"] is True
    assert summary["overrides"]["NUM_LAYERS"] == 4 and "MATRIX_LR" not in summary["overrides"]
    # Rounding and tuning read training data: they are in the budget, and the last read is behind them.
    spent = [summary[name] for name in ("train_seconds", "hessian_seconds", "gptq_seconds", "tune_seconds")]
    assert summary["budgeted_seconds"] >= sum(spent)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = {record["event"]: record["clock"] for record in records if record["kind"] == "ledger"}
    assert events["train_read_last"] - events["train_clock_start"] >= sum(spent)
    assert events["train_read_last"] <= events["artifact_sealed"]
    log = (folder / "train.log").read_text()
    assert "tuned in 3 steps" in log and log.strip() == "\n".join(
        line for line in log.splitlines() if line.strip()
    )
    assert (folder / "stdout").read_text().splitlines()[-1].startswith("final val_loss:")
    assert log.index("sha256:" + artifact_hash(folder)) < log.index("val_tokens:")
    assert len(losses(folder)) == 8 and losses(folder)[-1] < losses(folder)[0]


def test_scoring_the_artifact_again_gives_the_same_number(finished, tmp_path):
    settings, folder = finished
    before = json.loads((folder / "summary.json").read_text())["val_bpb"]
    copy = tmp_path / "copy.ptz"
    shutil.copy(folder / "final_model.ptz", copy)
    again = launch(
        settings
        | {"STAGE": "evaluate", "ARTIFACT": str(copy), "RUN_ID": "", "OUT_DIR": str(tmp_path / "other")}
    )
    assert again.returncode == 0, again.stderr
    summary = json.loads(next((tmp_path / "other").glob("*/summary.json")).read_text())
    assert summary["val_bpb"] == before and "prequant" not in summary["bpb"]
    assert summary["compliance"]["legal"] is False  # what was not measured is not vouched for


def test_a_finished_run_is_not_overwritten(finished):
    settings, folder = finished
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused(launch(settings, processes=1), "RUN_ID=a", "finished run", "choose another RUN_ID")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_same_seed_gives_the_same_artifact_stage_by_stage_too_and_another_seed_another(
    finished, tmp_path
):
    settings, folder = finished
    apart = settings | {"OUT_DIR": str(tmp_path), "RUN_ID": "b"}
    for stage in ("train", "quantize", "evaluate"):
        assert launch(apart | {"STAGE": stage}).returncode == 0
    assert artifact_hash(tmp_path / "b") == artifact_hash(folder) and losses(tmp_path / "b") == losses(folder)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (folder, tmp_path / "b"))
    assert first["bpb"] == second["bpb"]
    assert launch(apart | {"STAGE": "train", "RUN_ID": "c", "SEED": "2"}).returncode == 0
    assert losses(tmp_path / "c") != losses(folder)


def test_two_processes_compute_the_same_run_as_one(finished, tmp_path):
    settings, folder = finished
    result = launch(settings | {"OUT_DIR": str(tmp_path), "RUN_ID": "two"}, processes=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(folder), rel=1e-5)
    one, two = (json.loads((f / "summary.json").read_text()) for f in (folder, tmp_path / "two"))
    # Sums over ranks round differently in the last bit, which can move an integer of GPTQ: bytes may differ.
    assert two["world_size"] == 2 and two["bpb"] == pytest.approx(one["bpb"], rel=1e-3)


def test_a_killed_run_resumes_with_the_same_command_and_loses_at_most_one_interval(settings, tmp_path):
    longer = settings | {"ITERATIONS": "30", "CHECKPOINT_EVERY": "5", "TRAIN_LOG_EVERY": "1"}
    shown = kill_python(["-c", RANK], environment(longer), lambda shown: "\nstep:13/" in shown)
    step = int(re.findall(r"^step:(\d+)/", shown, re.M)[-1])
    (folder,) = Path(settings["OUT_DIR"]).iterdir()
    assert (folder / "checkpoint.pt").exists() and not (folder / "summary.json").exists()
    result = launch(longer, processes=1)
    assert result.returncode == 0, result.stderr
    resumed = int(result.stdout.split("resumed at step ")[1].split()[0])
    assert step - 5 <= resumed + 1 and resumed >= 5 and list(Path(settings["OUT_DIR"]).iterdir()) == [folder]
    # The interrupted run ends exactly where an uninterrupted one does.
    whole = launch(longer | {"RUN_ID": "whole"})
    assert whole.returncode == 0 and artifact_hash(folder.parent / "whole") == artifact_hash(folder)
    # And a third call starts a new run: the first one is finished.
    assert "resumed" not in launch(longer | {"STAGE": "train"}).stdout


def test_a_run_killed_under_torchrun_leaves_no_orphans(settings, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(FRESH_RANK)
    words = ["--standalone", "--nproc_per_node=2", str(script)]
    launcher = ["-c", f"from torch.distributed.run import main; main({words})"]
    variables = environment(settings | {"ITERATIONS": "100000", "RUN_ID": "x"})
    kill_python(launcher, variables, lambda shown: "\nstep:5/" in shown)
    folder = Path(settings["OUT_DIR"]) / "x"
    for _ in range(50):
        if not t.is_locked(folder):
            break
        time.sleep(0.1)
    assert not t.is_locked(folder)


def test_a_run_that_is_being_written_cannot_be_joined(config, settings):
    run = t.Run(config)
    run.folder = run.open(Path(settings["OUT_DIR"]) / "x")
    refused(launch(settings | {"RUN_ID": "x"}), "another process is writing this run", "RUN_ID")
    run.close()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"VOCAB_SIZE": "999"}, ("VOCAB_SIZE=999", "set VOCAB_SIZE=")),
        ({"DATASETS_DIR": "/nowhere"}, ("DATASETS_DIR=/nowhere", "data/demo.py")),
        ({"ATTENTION": "fa3"}, ("ATTENTION=fa3", "needs a GPU")),
        ({"ARTIFACT_CAP_BYTES": "1000"}, ("ARTIFACT_CAP_BYTES=1000", "packed code")),
        ({"STAGE": "quantize"}, ("STAGE=quantize", "train one first")),
        ({"STAGE": "evaluate"}, ("STAGE=evaluate", "RUN_ID or ARTIFACT")),
        ({"STAGE": "evaluate", "ARTIFACT": "/nowhere.ptz"}, ("/nowhere.ptz", "cannot be read")),
    ],
)
def test_what_cannot_work_is_refused_before_training(settings, change, words):
    refused(launch(settings | change), *words)


def test_an_unwritable_run_folder_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused(launch(settings | {"OUT_DIR": str(tmp_path / "file")}), "file", "cannot be written", "OUT_DIR")


def test_damaged_and_foreign_artifacts_are_not_scored(finished, tmp_path):
    settings, folder = finished
    damaged = bytearray((folder / "final_model.ptz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "flipped.ptz").write_bytes(damaged)
    (tmp_path / "short.ptz").write_bytes(damaged[:-10])
    shutil.copy(folder / "final_model.ptz", tmp_path / "whole.ptz")
    other = settings | {"STAGE": "evaluate", "RUN_ID": "", "OUT_DIR": str(tmp_path / "runs")}
    for name, words, change in (
        ("flipped", "a byte was changed", {}),
        ("short", "truncated", {}),
        ("whole", "NUM_LAYERS=4 there, 3 here", {"NUM_LAYERS": "3"}),
    ):
        refused(launch(other | {"ARTIFACT": str(tmp_path / f"{name}.ptz")} | change), f"{name}.ptz", words)
    assert not list((tmp_path / "runs").glob("*/summary.json"))


def test_a_checkpoint_of_other_settings_or_damaged_is_refused_and_kept(finished, tmp_path):
    settings, folder = finished
    mine = tmp_path / "a"
    mine.mkdir()
    shutil.copy(folder / "checkpoint.pt", mine)
    before = (mine / "checkpoint.pt").read_bytes()
    again = settings | {"OUT_DIR": str(tmp_path)}
    refused(
        launch(again | {"MATRIX_LR": "0.01"}),
        "checkpoint.pt",
        "MATRIX_LR=0.026 there, 0.01 here",
        "another RUN_ID",
    )
    assert (mine / "checkpoint.pt").read_bytes() == before
    for data in (before[: len(before) // 2], b"", b"nonsense" * 100):
        (mine / "checkpoint.pt").write_bytes(data)
        refused(launch(again, processes=len(data) % 2), "checkpoint.pt", "cannot be read", "delete it")
        assert (mine / "checkpoint.pt").read_bytes() == data


def test_a_checkpoint_never_executes_code(config, tmp_path):
    run = t.Run(config)
    run.folder = tmp_path

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    torch.save({"settings": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(t.Stop, match="cannot be read"):
        t.load_checkpoint(run, t.Dataset(config))
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(settings, monkeypatch):
    write_atomically = t.write_atomically

    def slow_disk(path, write):
        if path.name == "checkpoint.pt":
            time.sleep(0.3)  # the run is stopped while the checkpoint of the step before is being written
        write_atomically(path, write)

    monkeypatch.setattr(t, "write_atomically", slow_disk)
    blown = settings | {
        "SCALAR_LR": "1e30",
        "ITERATIONS": "50",
        "CHECKPOINT_EVERY": "1",
        "RUN_ID": "nan",
        "WARMUP_STEPS": "0",
    }
    refused(launch(blown), "train_loss is not finite at step", "SCALAR_LR")
    saved = torch.load(Path(settings["OUT_DIR"]) / "nan" / "checkpoint.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in saved["average"].values())
    assert not (Path(settings["OUT_DIR"]) / "nan" / "summary.json").exists()


def test_a_checkpoint_that_fails_while_a_run_is_stopped_hides_no_error_and_is_told(config, tmp_path, capsys):
    run = t.Run(config)
    run.folder = tmp_path / "missing"
    writer = t.CheckpointWriter(run)
    writer.write({})
    writer.close()
    shown = capsys.readouterr().out
    assert shown.startswith("warning: ") and "checkpoint.pt: cannot be written" in shown


def test_the_wall_clock_stops_a_run(settings):
    capped = settings | {
        "ITERATIONS": "100000",
        "SCHEDULE": "time",
        "MAX_WALLCLOCK_SECONDS": "3.5",
        "STAGE": "train",
        "GPTQ_RESERVE_SECONDS": "2",
        "RUN_ID": "capped",
    }
    result = launch(capped)
    assert (
        result.returncode == 0
        and "stopped by MAX_WALLCLOCK_SECONDS" in result.stdout
        and "loops on" in result.stdout
    )
    stages = json.loads((Path(settings["OUT_DIR"]) / "capped" / "stages.json").read_text())
    assert 1.5 <= stages["train"]["train_seconds"] < 8.5


@pytest.mark.parametrize("loader, steps", [("shuffled", 1), ("packed", 1), ("packed", 0)])
def test_warm_up_leaves_no_trace(config, loader, steps):
    config = dataclasses.replace(config, loader=loader, warmup_steps=steps)
    run, data = t.Run(config), t.Dataset(config)
    model, _, _ = built = t.build(run)._replace(compiled=True)  # the shapes that would be compiled are run
    average = {name: torch.full_like(weight, 9.0) for name, weight in model.state_dict().items()}
    optimizers, feed = t.Optimizers(run, model, False, average), t.Feed(run, t.LOADERS[loader](config, data))
    before = t.to_cpu({"model": model.state_dict(), "optimizers": optimizers.state()})
    t.warm_up(run, built, optimizers, feed)
    after = {"model": model.state_dict(), "optimizers": optimizers.state()}
    assert model.looped is False and all(parameter.grad is None for parameter in model.parameters())
    for name, weight in before["model"].items():
        assert torch.equal(weight, after["model"][name]) and torch.equal(weight, average[name])
    for name, buffer in after["optimizers"]["muon"].items():
        assert (buffer == 0).all(), name
    moments = list(after["optimizers"]["adam"]["state"].values())
    assert moments and not any(tensor.any() for each in moments for tensor in each.values())


def test_packed_documents_train_and_score_too(settings):
    result = launch(settings | {"LOADER": "packed", "RUN_ID": "packed", "ITERATIONS": "4"})
    assert result.returncode == 0, result.stderr
    summary = json.loads((Path(settings["OUT_DIR"]) / "packed" / "summary.json").read_text())
    # Documents keep to themselves: overlapping windows see the same document, never worse than cut ones.
    assert summary["bpb"]["sliding"] <= summary["bpb"]["quantized"] * 1.01


@pytest.mark.parametrize(
    "shape",
    [
        {"NUM_LAYERS": "1", "NUM_LOOPS": "0"},
        {"NUM_LAYERS": "2", "LOOP_START": "0", "LOOP_END": "1", "PARALLEL_START_LAYER": "8"},
        {
            "NUM_LAYERS": "3",
            "NUM_LOOPS": "0",
            "NUM_HEADS": "1",
            "NUM_KV_HEADS": "1",
            "ROPE_DIMS": "0",
            "MLP_MULT": "1.5",
        },
        {
            "NUM_LAYERS": "4",
            "PARALLEL_RESIDUAL": "gptj",
            "PARALLEL_START_LAYER": "0",
            "SKIP_GATES_ENABLED": "0",
            "XSA_LAST_N": "0",
            "GRAD_CLIP_SCOPE": "local",
            "MUON_COEFFICIENTS": "classic",
            "MATRIX_BITS": "5",
        },
        {
            "NUM_LAYERS": "3",
            "LOOP_START": "0",
            "LOOP_END": "0",
            "NUM_LOOPS": "4",
            "PARALLEL_START_LAYER": "1",
            "EVAL_SEQ_LEN": "57",
            "EVAL_STRIDE": "13",
            "COMPRESSOR": "lzma",
            "LOADER": "packed",
            "TRAIN_SEQ_LEN": "19",
            "BIGRAM_ROWS": "60",
        },
    ],
)
def test_odd_shapes_run_through_every_stage(settings, shape):
    result = launch(settings | {"ITERATIONS": "3", "RUN_ID": "odd"} | shape)
    assert result.returncode == 0, result.stderr
    summary = json.loads((Path(settings["OUT_DIR"]) / "odd" / "summary.json").read_text())
    assert 0 < summary["val_bpb"] < 20 and summary["total_bytes"] > summary["artifact_bytes"]


def test_importing_the_script_takes_no_environment_and_does_nothing(tmp_path):
    code = (
        "import sys, time, torch, numba, triton, triton.language; began = time.process_time(); "
        f"sys.path.insert(0, {str(ROOT)!r}); import train_gpt; "
        "assert not torch.distributed.is_initialized(); print(time.process_time() - began)"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env={"MATRX_LR": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) < 1.0 and list(tmp_path.iterdir()) == []


def test_the_configuration_in_the_run_folder_is_the_whole_one(finished):
    _settings, folder = finished
    saved = json.loads((folder / "config.json").read_text())
    assert (
        set(saved) == {"data", "training_data", *(f.name.upper() for f in dataclasses.fields(t.Config))}
        and saved["NUM_LAYERS"] == 4
    )


def test_a_setting_that_the_chosen_mode_does_not_read_is_named(settings):
    done = launch(
        settings
        | {
            "STAGE": "train",
            "ITERATIONS": "1",
            "MATRIX_BITS": "5",
            "TTT_LORA_RANK": "8",
            "TTT_LR": "0.1",
            "RUN_ID": "warned",
        }
    )
    warned = [line for line in done.stdout.splitlines() if "it changes nothing" in line]
    assert "only sdclip reads it" in "".join(line for line in warned if "MATRIX_BITS" in line)
    assert "only chunk_sgd reads it" in "".join(line for line in warned if "TTT_LR " in line)
    assert not any("TTT_LORA_RANK" in line or "GPTQ" in line for line in warned)
