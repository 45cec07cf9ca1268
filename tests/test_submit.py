"""From run folders to a record folder: what a complete one holds, and every violation by its name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import compliance
import results
import submit
import train_gpt as t
from helpers import ROOT
from helpers.run_folders import copy_run, edit, original
from helpers.trainer import environment

FACTORS = {1: 1.0, 2: 0.999, 3: 1.0005}


@pytest.fixture
def runs(dataset, tmp_path) -> list[Path]:
    """Three runs that differ in their seed only."""
    return [
        copy_run(original(dataset), tmp_path / "runs" / f"s{seed}", seed, FACTORS[seed]) for seed in FACTORS
    ]


def call(runs: list[Path], tmp_path: Path, *more: str, track: str = "demo") -> Path:
    """Make a record folder from the runs; returns it."""
    submit.main(
        [
            *map(str, runs),
            "--name",
            "Test",
            "--track",
            track,
            "--out",
            str(tmp_path / "records"),
            "--date",
            "2026-01-02",
            "--author",
            "someone",
            "--github-id",
            "someone",
            *more,
        ]
    )
    return tmp_path / "records" / track / "2026-01-02_Test"


def refused(runs: list[Path], tmp_path: Path, *more: str, track: str = "demo") -> str:
    """The one line with which the runs are refused; nothing was written."""
    with pytest.raises(results.Stop) as stop:
        call(runs, tmp_path, *more, track=track)
    assert not (tmp_path / "records").exists() and "\n" not in str(stop.value)
    return str(stop.value)


def bpb(run: Path) -> float:
    """The score of a run."""
    return json.loads((run / "summary.json").read_text())["val_bpb"]


def test_three_seeds_become_a_complete_folder(runs, tmp_path, capsys):
    folder = call([runs[2], runs[0], runs[1]], tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "submission.json",
        "train_gpt.py",
        "requirements.txt",
        "tokenizer.model",
        "train_seed1.log",
        "train_seed2.log",
        "train_seed3.log",
    }
    facts = json.loads((folder / "submission.json").read_text())
    scores = [bpb(run) for run in runs]
    assert facts["val_bpb"] == np.mean(scores) and facts["val_bpb_std"] == np.std(scores, ddof=1)
    assert facts["seeds"] == [1, 2, 3] and facts["track"] == "demo" and facts["author"] == "someone"
    assert [facts["seed_results"][str(seed)]["val_bpb"] for seed in (1, 2, 3)] == scores
    packed = (runs[0] / "packed_train_gpt.py").read_bytes()
    assert (folder / "train_gpt.py").read_bytes() == packed and facts["bytes_code"] == len(packed)
    assert facts["bytes_total"] == len(packed) + (runs[0] / "final_model.ptz").stat().st_size
    assert (folder / "train_seed2.log").read_bytes() == (runs[1] / "train.log").read_bytes()
    text = (folder / "README.md").read_text()
    for run in runs:
        assert f"**{bpb(run):.5f}**" in text
    assert f"**val_bpb {np.mean(scores):.5f}**" in text and "## Compliance" in text and "## Credits" in text
    assert "written:" in capsys.readouterr().out


def test_the_command_of_the_readme_gives_the_recorded_settings(runs, tmp_path):
    text = (call(runs, tmp_path) / "README.md").read_text()
    command = re.search(r"```bash\n(.*?)```", text, re.S)[1]
    assert str(tmp_path) not in text and "for seed in 1 2 3; do" in command
    command = command.replace(
        "python train_gpt.py", f"{sys.executable} {ROOT / 'train_gpt.py'} --print-config"
    )
    shown = subprocess.run(
        ["bash", "-c", command], env=environment({}), capture_output=True, text=True, check=True
    )
    first = dict(
        line.split("=", 1) for line in shown.stdout.splitlines()[: len(shown.stdout.splitlines()) // 3]
    )
    recorded = json.loads((runs[0] / "config.json").read_text())
    apart = {"DATASETS_DIR", "RUN_ID", "OUT_DIR", "data", "training_data"}
    assert {n: v for n, v in first.items() if n not in apart} == {
        n: t.format_value(v) for n, v in recorded.items() if n not in apart
    }
    assert Path(first["DATASETS_DIR"]).name == Path(recorded["DATASETS_DIR"]).name


@pytest.mark.parametrize("name", submit.FILES)
def test_a_missing_file_is_named(runs, tmp_path, name):
    (runs[1] / name).unlink()
    assert str(runs[1] / name) in refused(runs, tmp_path)


def test_other_settings_code_machine_data_or_number_of_gpus_are_named(runs, tmp_path):
    plants = [
        (lambda s: s["overrides"].update(MATRIX_LR=0.5), lambda c: c.update(MATRIX_LR=0.5), "MATRIX_LR=0.5"),
        (lambda s: s["versions"].update(torch="0.1"), None, "torch 0.1"),
        (lambda s: s["versions"].update(device="H100"), None, "device H100"),
        (lambda s: s["data"].update(shards="0" * 16), None, "data shards 0000"),
        (lambda s: s.update(world_size=8), None, "world_size 8"),
    ]
    for summary, config, words in plants:
        changed = tmp_path / f"changed{words}"
        shutil.copytree(runs[1], changed)
        edit(changed / "summary.json", summary)
        if config:
            edit(changed / "config.json", config)
        message = refused([runs[0], changed, runs[2]], tmp_path)
        assert words in message and str(changed) in message


def test_other_code_is_named(runs, tmp_path):
    source = json.loads((runs[1] / "summary.json").read_text())["versions"]["source_sha256"]
    edit(runs[1] / "summary.json", lambda s: s["versions"].update(source_sha256="f" * 64))
    assert "source_sha256" in refused(runs, tmp_path)  # the log still says the old one
    log = (runs[1] / "train.log").read_text()
    (runs[1] / "train.log").write_text(log.replace(source, "f" * 64))
    message = refused(runs, tmp_path)
    assert "source_sha256 ffff" in message and "same code" in message


def test_a_seed_given_twice_or_left_out_in_silence_is_named(runs, tmp_path):
    twin = copy_run(runs[0], tmp_path / "elsewhere" / "twin", 2)
    assert "SEED=2 again" in refused([runs[0], runs[1], twin], tmp_path)
    message = refused(runs[:2], tmp_path)
    assert "s3" in message and "SEED=3" in message and "finished" in message and "--leave-out" in message
    (runs[2] / "summary.json").unlink()
    assert "started, not finished" in refused(runs[:2], tmp_path)
    assert "REASON" in refused(runs[:2], tmp_path, "--leave-out", str(runs[2]))
    folder = call(runs[:2], tmp_path, "--leave-out", f"{runs[2]}=the machine was lost")
    assert "s3 (the machine was lost)" in (folder / "README.md").read_text()


def test_leaving_out_what_is_not_there_is_refused(runs, tmp_path):
    assert "--leave-out" in refused(runs, tmp_path, "--leave-out", f"{tmp_path}/other=no reason")


def test_a_run_of_other_code_or_settings_beside_them_is_not_missed(runs, tmp_path):
    edit(runs[2] / "config.json", lambda c: c.update(MATRIX_LR=0.5))
    assert call(runs[:2], tmp_path).is_dir()


def test_a_seed_that_a_sweep_planned_but_never_started_is_named(runs, tmp_path):
    plan = {f"s{seed}": {"MATRIX_LR": "0.026", "SEED": str(seed)} for seed in (1, 2, 3, 4)}
    plan["other"] = {"MATRIX_LR": "0.03", "SEED": "1"}
    (runs[0].parent / "sweep.json").write_text(json.dumps({"runs": plan}))
    message = refused(runs, tmp_path)
    assert "s4" in message and "planned by the sweep, not started" in message and "other" not in message


def test_an_illegal_run_is_refused_with_its_reason(runs, tmp_path):
    edit(
        runs[0] / "summary.json",
        lambda s: s["compliance"].update(legal=False, reason="trained on validation"),
    )
    assert "trained on validation" in refused(runs, tmp_path)


def test_a_broken_condition_is_refused_even_if_the_run_calls_itself_legal(runs, tmp_path):
    edit(
        runs[0] / "summary.json",
        lambda s: s["compliance"].update(
            conditions={
                "causal": {"holds": True, "flips": 64},
                "single pass": {"holds": False, "scored twice": 7},
            }
        ),
    )
    message = refused(runs, tmp_path)
    assert "single pass" in message and "scored twice 7" in message
    edit(runs[0] / "summary.json", lambda s: s["compliance"]["conditions"]["single pass"].update(holds=True))
    text = (call(runs, tmp_path) / "README.md").read_text()
    assert "| 1 | conditions causal | holds | flips 64 |" in text


def test_an_artifact_over_the_cap_is_refused(runs, tmp_path):
    with open(runs[1] / "packed_train_gpt.py", "ab") as file:
        file.write(b"#" * 16_000_000)
    size = (runs[1] / "packed_train_gpt.py").stat().st_size
    artifact = (runs[1] / "final_model.ptz").stat().st_size
    assert "code_bytes" in refused(runs, tmp_path)
    edit(runs[1] / "summary.json", lambda s: s.update(code_bytes=size, total_bytes=size + artifact))
    message = refused(runs, tmp_path)
    assert f"{size + artifact - 16_000_000} over the cap" in message and str(runs[1]) in message


def test_a_changed_artifact_or_tokenizer_is_refused(runs, tmp_path, dataset):
    data = bytearray((runs[1] / "final_model.ptz").read_bytes())
    data[-1] ^= 1
    other = tmp_path / "other.model"
    shutil.copy(ROOT / "README.md", other)
    assert "other.model" in refused(runs, tmp_path, "--tokenizer", str(other))
    (runs[1] / "final_model.ptz").write_bytes(data)
    assert "not the artifact that was scored" in refused(runs, tmp_path)


@pytest.mark.parametrize("name", ["val_bpb", "val_loss", "val_tokens", "val_bytes"])
def test_an_edited_score_does_not_follow_from_its_sums(runs, tmp_path, name):
    edit(runs[1] / "summary.json", lambda s: s.update({name: s[name] * 0.999}))
    assert "does not follow" in refused(runs, tmp_path)


@pytest.mark.parametrize("place", ["summary.json", "stages.json", "metrics.jsonl", "train.log"])
def test_a_score_that_one_file_tells_differently_is_named(runs, tmp_path, place):
    other = copy_run(runs[1], tmp_path / "other" / "s2", 2, 0.9)
    shutil.copy(other / place, runs[1] / place)
    message = refused(runs, tmp_path)
    assert "says" in message and (place in message or place == "summary.json")


def test_sums_per_document_must_give_the_score(runs, tmp_path):
    summary = json.loads((runs[0] / "summary.json").read_text())
    tokens, count = (np.full(4, int(summary[name]) // 4) for name in ("val_tokens", "val_bytes"))
    tokens[0] += summary["val_tokens"] - tokens.sum()
    count[0] += summary["val_bytes"] - count.sum()
    nats = np.full(4, summary["val_loss"] * summary["val_tokens"] / 4)
    np.savez(runs[0] / "documents.npz", tokens=tokens, bytes=count, nats=nats * 1.001)
    assert "documents.npz" in refused(runs, tmp_path)
    np.savez(runs[0] / "documents.npz", tokens=tokens, bytes=count, nats=nats)
    assert call(runs, tmp_path).is_dir()


def test_the_record_track_wants_the_contest(runs, tmp_path):
    def contest(s):
        s["data"]["docs_val"] = 50_000
        s["val_loss"] *= 151_080_891 / s["val_bytes"]
        s["val_bytes"] = 151_080_891

    assert "50000" in refused(runs, tmp_path, track=submit.RECORD_TRACK)
    assert "3 seeds" in refused(
        runs[:1], tmp_path, *(f"--leave-out={run}=lost" for run in runs[1:]), track=submit.RECORD_TRACK
    )
    loaded = [results.Run.read(run) for run in runs]
    for run in runs:
        edit(run / "summary.json", contest)
    with pytest.raises(results.Stop, match="8 x H100"):
        submit.check_record_track(loaded[0])
    edit(
        runs[0] / "summary.json",
        lambda s: s.update(world_size=8, versions=s["versions"] | {"device": "H100 SXM"}),
    )
    submit.check_record_track(loaded[0])
    edit(runs[0] / "config.json", lambda c: c.update(EVAL_BUDGET_SECONDS=700.0))
    with pytest.raises(results.Stop, match="EVAL_BUDGET_SECONDS 700"):
        submit.check_record_track(results.Run.read(runs[0]))


def test_the_welch_test_is_scipys(runs, tmp_path, capsys):
    ours = [bpb(run) for run in runs]
    theirs = [bpb(runs[0]) * f for f in (1.001, 1.003, 1.004, 1.0015)]
    moments = ",".join(map(repr, (float(np.mean(theirs)), float(np.std(theirs, ddof=1)), 4)))
    comparison = json.loads((call(runs, tmp_path, "--baseline", moments) / "submission.json").read_text())[
        "comparison"
    ]
    expected = stats.ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue
    assert comparison["p_lower"] == pytest.approx(expected, rel=1e-9)
    summary = json.loads((runs[0] / "summary.json").read_text())
    margin = 0.005 * summary["val_bpb"] / summary["val_loss"]
    expected = stats.ttest_ind(ours, np.array(theirs) - margin, equal_var=False, alternative="less").pvalue
    assert comparison["p_lower_by_0.005_nats"] == pytest.approx(expected, rel=1e-9)
    gain = (np.mean(theirs) - np.mean(ours)) * summary["val_loss"] / summary["val_bpb"]
    assert comparison["gain_nats_per_token"] == pytest.approx(gain)
    assert f"p = {comparison['p_lower']:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize("factor, met", [(1.05, True), (1.0001, False)])
def test_the_rule_of_five_thousandths_of_a_nat(runs, factor, met):
    loaded = [results.Run.read(run) for run in runs]
    comparison = submit.compare(loaded, (bpb(runs[0]) * factor, 0.0005, 3))
    assert comparison["meets_0.005_nats_at_p_0.01"] is met


def test_a_record_folder_is_a_baseline(runs, tmp_path):
    first = call(runs, tmp_path)
    mean, std, count = submit.read_baseline(None, first)
    assert (mean, count) == (np.mean([bpb(run) for run in runs]), 3) and std > 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "submission.json").write_text(
        json.dumps({"val_bpb": 1.2, "val_bpb_std": 0.1, "seeds": [1, 2]})
    )
    assert submit.read_baseline(None, foreign) == (1.2, 0.1, 2)
    (foreign / "submission.json").write_text(json.dumps({"val_bpb": 1.2}))
    with pytest.raises(results.Stop, match="--baseline mean,std,n"):
        submit.read_baseline(None, foreign)


@pytest.mark.parametrize("text", ["1.06", "1.06,0.1", "1.06,x,3", "1.06,0.1,1", "-1,0.1,3", "1.06,-0.1,3"])
def test_a_wrong_baseline_is_refused(runs, tmp_path, text):
    assert "--baseline" in refused(runs, tmp_path, f"--baseline={text}")


def test_nothing_is_overwritten_and_names_are_checked(runs, tmp_path):
    folder = call(runs, tmp_path)
    (folder / "README.md").write_text("mine")
    with pytest.raises(results.Stop, match="there already"):
        call(runs, tmp_path)
    assert (folder / "README.md").read_text() == "mine"
    with pytest.raises(results.Stop, match="--name ../x"):
        submit.main([str(runs[0]), "--name", "../x"])
    with pytest.raises(results.Stop, match="no such folder"):
        submit.main([str(tmp_path / "nothing"), "--name", "x"])


def test_credits_follow_the_settings_and_name_settings_that_exist(runs):
    asked = set()
    config = json.loads((runs[0] / "config.json").read_text())
    for _, who, uses in submit.CREDITS:
        uses(lambda name: asked.add(name) or config.get(name))
        assert re.fullmatch(r"#\d+(, #\d+)*", who)
    assert asked <= {name.upper() for name in t.Config.__dataclass_fields__}
    used = lambda **changes: submit.credits_of(results.Run(runs[0], config | changes))
    assert "adapters per document at evaluation: #1530" not in used()
    assert "adapters per document at evaluation: #1530" in used(TTT_ENABLED=True, TTT_MODE="doc_lora")
    assert "Polar Express coefficients in Muon: #1787" not in used(MUON_COEFFICIENTS="classic")


def test_a_broken_compliance_probe_stops_the_submission(runs, monkeypatch):
    run = results.Run.read(runs[0])
    report = compliance.Report(runs[0])
    report.add("causal", "future replaced", True, "")
    report.add("budgets", "evaluation clock", False, "700 of 600 s")
    monkeypatch.setattr(compliance, "check", lambda folder, alone, decode: report)
    words, measured = submit.probe(run, "demo")  # another track has budgets of its own
    assert "1 of 2 compliance probes hold" in words and measured["causal"]["holds"] is True
    with pytest.raises(results.Stop, match="budgets: evaluation clock: 700 of 600 s"):
        submit.probe(run, submit.RECORD_TRACK)
    report.add("single pass", "scored once", False, "target 7 twice")
    with pytest.raises(results.Stop, match="single pass: scored once: target 7 twice"):
        submit.probe(run, "demo")
    assert (runs[0] / "compliance.json").exists()


def test_after_check_the_readme_has_the_measured_conditions(runs, tmp_path, monkeypatch):
    plain = (call(runs, tmp_path) / "README.md").read_text()
    assert "| 1 | conditions causal | not measured |" in plain and "measured them" not in plain
    shutil.rmtree(tmp_path / "records")
    report = compliance.Report(runs[0])
    for group in compliance.CONDITIONS:
        report.add(group, "a probe", True, "evidence")
    monkeypatch.setattr(compliance, "check", lambda folder, alone, decode: report)
    monkeypatch.setattr(submit, "score_again", lambda run: f"{run.folder.name}: scored again")
    folder = call(runs, tmp_path, "--check")
    text = (folder / "README.md").read_text()
    assert "not measured" not in text and "the conditions as `compliance.py` measured them" in text
    for seed in (1, 2, 3):
        assert f"| {seed} | conditions causal | holds | evidence 1 of 1 probes hold |" in text
    facts = json.loads((folder / "submission.json").read_text())["compliance"]["2"]
    assert facts["legal"] is True and facts["conditions"]["normalised"]["holds"] is True


def test_the_packed_script_alone_gives_the_score_again_and_another_score_is_caught(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET")
    folder = copy_run(original(dataset, "sdclip"), tmp_path / "run", 1)
    run = results.Run.read(folder)
    again, offline = submit.score_alone(run)
    assert again["val_bpb"] == pytest.approx(bpb(folder), rel=1e-9) and "train_seconds" not in again
    monkeypatch.setattr(submit, "score_alone", lambda run: (again, offline))
    assert f"{bpb(folder):.8f}" in submit.score_again(run)
    again["compliance"]["conditions"] = {"causal": {"holds": False, "flipped": 3}}
    with pytest.raises(results.Stop, match="condition conditions causal is broken .*flipped 3"):
        submit.score_again(run)
    edit(folder / "summary.json", lambda s: s.update(val_bpb=s["val_bpb"] * 0.99))
    with pytest.raises(results.Stop, match="not that of these bytes"):
        submit.score_again(run)
