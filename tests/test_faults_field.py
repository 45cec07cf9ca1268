"""Further faults that users of this field have met, of clusters, containers, clocks and foreign files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

import compliance
import environment
import results
import sweep
import train_gpt as t
from data import prepare
from helpers.run_folders import original
from helpers.trainer import replace

# === CLUSTERS ===


@pytest.fixture
def pair(config, monkeypatch) -> t.Run:
    """A run that believes to be rank 0 of two."""
    run = t.Run(config)
    run.world_size = 2
    return run


def gathered(monkeypatch, **changes: object) -> None:
    """Let the other rank have said the same as this one but for these settings."""

    def gather(everyone: list, ours: dict, group: object) -> None:
        everyone[:] = [ours, ours | changes]

    monkeypatch.setattr(t.dist, "all_gather_object", gather)


@pytest.mark.parametrize(
    "changes", [{"MATRIX_LR": 0.5}, {"STAGE": "train"}, {"data": "0" * 16}, {"source_sha256": "0" * 16}]
)
def test_a_rank_that_was_started_otherwise_is_named(pair, monkeypatch, changes):
    """Each node reads its own environment, dataset and script; what one of them lacks would go unseen."""
    settings = pair.config.chosen("Run", "training") | {"data": "1" * 16}
    gathered(monkeypatch)
    t.check_ranks_agree(pair, settings)
    gathered(monkeypatch, **changes)
    (name,) = changes
    with pytest.raises(t.Stop, match=f"rank 1 was started otherwise than rank 0 .{name}=.* there, .*same"):
        t.check_ranks_agree(pair, settings)
    pair.is_main = False
    with pytest.raises(t.Stop) as stop:  # one rank says it
        t.check_ranks_agree(pair, settings)
    assert stop.value.code == 1


def test_places_may_differ_between_nodes(pair, monkeypatch):
    gathered(monkeypatch, DATASETS_DIR="/scratch/7", OUT_DIR="elsewhere", RUN_ID="x")
    t.check_ranks_agree(pair, pair.config.chosen("nothing", "training"))


@pytest.mark.parametrize("name", t.PLAIN_LAUNCHERS)
def test_a_launcher_that_starts_separate_runs_is_pointed_out(config, monkeypatch, name):
    run, said = t.Run(config), []
    monkeypatch.setattr(run, "log", said.append)
    monkeypatch.setenv(name, "8")
    t.check_launcher(run)
    (line,) = said
    assert line.startswith(f"warning: {name}=8: ") and "torchrun" in line
    monkeypatch.setattr(run, "is_cuda", True)
    monkeypatch.setattr(t.torch.cuda, "device_count", lambda: 8)
    with pytest.raises(t.Stop, match=f"{name}=8: "):  # all of them would take the first GPU
        t.check_launcher(run)
    monkeypatch.setenv("WORLD_SIZE", "8")
    t.check_launcher(run)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv(name, "1")
    t.check_launcher(run)
    assert said == [line]


@pytest.fixture(params=environment.NO_LOCKS)
def lockless(request, monkeypatch) -> None:
    """A file system that cannot lock."""

    def flock(file: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_trainer_works_where_files_cannot_be_locked(lockless, config, tmp_path, capsys):
    run = t.Run(config)
    run.folder = run.open(tmp_path / "a")
    run.close()
    assert "warning: " in capsys.readouterr().out and "no locks" in (tmp_path / "a/train.log").read_text()
    assert not t.is_locked(tmp_path / "a") and not results.is_locked(tmp_path / "a")


def test_the_tools_work_where_files_cannot_be_locked(lockless, tmp_path, capsys):
    with open(tmp_path / ".lock", "w") as lock:
        prepare._lock(lock, tmp_path)
    assert "no locks" in capsys.readouterr().out
    sweep.Sweep.open(bare_sweep(tmp_path)).close()
    assert "warning: " in capsys.readouterr().err


def bare_sweep(folder: Path) -> sweep.Sweep:
    """A sweep that has a folder and nothing else."""
    bare = sweep.Sweep.__new__(sweep.Sweep)
    bare.folder = folder
    return bare


def test_a_lock_that_another_process_has_is_still_one(config, tmp_path):
    with open(tmp_path / ".lock", "w") as lock, open(tmp_path / ".lock", "w") as other:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for tool in (t, environment):
            with pytest.raises(BlockingIOError):
                tool.lock_file(other)
        with pytest.raises(prepare.DataError, match="another run is writing here"):
            prepare._lock(other, tmp_path)
        assert t.is_locked(tmp_path) and results.is_locked(tmp_path)


# === CONTAINERS ===


@pytest.mark.parametrize("tool", [t, environment])
@pytest.mark.parametrize(
    ("texts", "cores"),
    [(["max 100000\n"], 64), (["250000 100000\n"], 3), (["-1", "100000"], 64), (["100000", "100000"], 1)],
)
def test_a_container_has_the_cores_of_its_quota(tool, texts, cores, tmp_path, monkeypatch):
    names = [str(tmp_path / str(number)) for number in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        Path(name).write_text(text)
    monkeypatch.setattr(tool, "CGROUP_QUOTAS", (("/nowhere",), tuple(names)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    assert tool.usable_cores() == cores


# === CLOCKS ===


def test_a_clock_that_is_set_changes_no_duration(dataset, tmp_path):
    """NTP, or a machine that goes on after a pause, sets the wall clock; budgets are of another clock."""
    folder = Path(shutil.copytree(original(dataset), tmp_path / "a"))
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all("clock" in record for record in records if record["kind"] == "ledger")

    def probed() -> list[compliance.Row]:
        report = compliance.Report(folder)
        compliance.probe_ledger(report, results.Run.read(folder))
        return report.rows

    before = probed()
    assert [row.holds for row in before[1:]] == [True, True, True]
    for record in records[len(records) // 2 :]:
        record["time"] -= 7200
    for record in records[-4:]:
        record["time"] += 20000
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert probed() == before


# === FILES ===


def test_a_file_of_a_tool_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, name=name, real=real: (calls.append(name), real(*given))[1]
        )
    results.write_atomically(tmp_path / "a.json", "{}")
    assert calls == ["fsync", "replace"] and (tmp_path / "a.json").read_text() == "{}"


def test_an_artifact_of_another_model_is_named_before_the_clock(dataset, config):
    path = original(dataset) / "final_model.ptz"
    _, tensors, _ = t.decode_artifact(path)
    table = t.parameter_table(replace(config, ttt_enabled=False))
    t.check_tensors(path, table, tensors)
    matrix = tensors["blocks.0.attn.c_q.weight"]
    odd = t.Quantized(matrix.values, matrix.scales[:-1], matrix.delta)
    for changed in (tensors | {"more": matrix}, tensors | {"blocks.0.attn.c_q.weight": odd}):
        with pytest.raises(t.Stop, match=r"final_model.ptz: (more|blocks.0.attn.c_q.weight) has the parts"):
            t.check_tensors(path, table, changed)
    del tensors["q_gain"]
    with pytest.raises(t.Stop, match="q_gain has the parts"):
        t.check_tensors(path, table, tensors)


def test_no_lock_errors_are_those_of_file_systems_without_locks():
    assert t.NO_LOCKS == environment.NO_LOCKS == (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
