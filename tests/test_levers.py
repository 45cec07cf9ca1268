"""Sweeps of levers: each alone, winners together, removals; records that are made once; table and page."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import levers
import results
import sweep
from helpers import ROOT, STAND_IN, stand_in
from helpers.sweeps import run_sweep

FILE = """
# name | settings | evidence
rate | MATRIX_LR=0.03 | #1: three seeds
gain | QK_GAIN_INIT=6 | a | paper
slow | MATRIX_LR=0.01 | none
faster | MATRIX_LR=0.029 | #2
""".replace("a | paper", "a paper")


def call(tmp_path: Path, *words: str, seeds: str = "1,2,3", status: int = 0) -> Path:
    """Run the levers of `levers.txt` with the stand-in; returns the records."""
    if not (tmp_path / "levers.txt").exists():
        (tmp_path / "levers.txt").write_text(FILE)
    records = tmp_path / "records" / "levers.jsonl"
    words = ("--levers", str(tmp_path / "levers.txt"), f"SEED={seeds}", "--records", str(records), *words)
    run_sweep(tmp_path / "runs", *words, status=status)
    return records


def stand_in_here(settings: dict[str, str], *words: str) -> tuple[int, str]:
    """The stand-in in this process, which saves the start of an interpreter: exit status and output."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(sys, "argv", [str(STAND_IN), *words])
        patch.setattr(os, "environ", os.environ | settings)
        try:
            stand_in.main()
        except SystemExit as stop:
            return (0, shown.getvalue()) if not stop.code else (1, f"{shown.getvalue()}{stop}\n")
    return 0, shown.getvalue()


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and settings come from the stand-in in this process."""

    def start(command, settings, console, slot):
        status, shown = stand_in_here(settings)
        console.write_text(shown)
        return lambda: status

    def effective(script, settings):
        return dict(line.split("=", 1) for line in stand_in_here(settings, "--print-config")[1].split())

    monkeypatch.setitem(sweep.LAUNCHERS, "local", lambda options: (start, 1))
    monkeypatch.setattr(sweep, "effective", effective)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)


def starts(tmp_path: Path) -> dict[str, int]:
    """How often each run was started."""
    return {p.parent.name: len(p.read_text().splitlines()) for p in tmp_path.glob("runs/*/*/starts")}


def test_levers_alone_then_winners_together_then_removals_and_nothing_twice(tmp_path, capsys):
    records = call(tmp_path)
    rows = {row.name: row for row in levers.judge(levers.read_records(records))}
    assert [rows[name].verdict for name in ("rate", "faster", "slow")] == ["better", "better", "worse"]
    # Of two levers of one setting the better one goes into the whole.
    assert rows["together"].settings == {"MATRIX_LR": "0.03", "QK_GAIN_INIT": "6"}
    assert rows["without gain"].settings == {"MATRIX_LR": "0.03"} and "without faster" not in rows
    scores = [[stand_in.score(rate, 5.25, seed) for seed in (1, 2, 3)] for rate in (0.03, 0.026)]
    expected = np.array(scores[0]) - np.array(scores[1])
    assert rows["rate"].difference == pytest.approx(expected.mean())
    assert rows["rate"].error == pytest.approx(expected.std(ddof=1) / 3**0.5)
    shown = capsys.readouterr().out
    assert f"{expected.mean():+.5f}" in shown and (tmp_path / "runs/s/table.txt").read_text() in shown

    # 5 + the whole with 3 seeds; what remains without one winner is the other alone, which is known.
    assert len(starts(tmp_path)) == 18 and set(starts(tmp_path).values()) == {1}
    before = records.read_text()
    call(tmp_path)
    assert records.read_text() == before and set(starts(tmp_path).values()) == {1}

    # Records alone suffice, and a run that has ended without its record is entered, not repeated.
    lines = before.splitlines(keepends=True)
    records.write_text("".join(lines[1:]))
    call(tmp_path)
    assert sorted(records.read_text().splitlines()) == sorted(before.splitlines())
    for path in tmp_path.glob("runs/s/*/summary.json"):
        path.unlink()
    call(tmp_path, seeds="1,2,3,4")
    again = {name: count for name, count in starts(tmp_path).items() if not name.endswith("SEED-4")}
    assert set(again.values()) == {1} and len(starts(tmp_path)) == 24


def test_a_record_says_which_run_it_is_and_the_page_is_made_of_them(tmp_path, capsys):
    (tmp_path / "levers.txt").write_text("rate | MATRIX_LR=0.03 | #1: three seeds\n")
    records = call(tmp_path, seeds="1,2")
    record = json.loads(records.read_text().splitlines()[-1])
    assert record["settings"] == {"MATRIX_LR": "0.03"} and record["seed"] == 2 and record["legal"]
    assert record["bpb"]["quantized"] == record["val_bpb"] and len(record["source_sha256"]) == 64
    levers.main(["--records", str(records), "--levers", str(tmp_path / "levers.txt"), "--out", str(tmp_path)])
    page = (tmp_path / "levers.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| rate ")]
    assert "`MATRIX_LR=0.03`" in row and "| better | #1: three seeds |" in row
    assert "rate" in (tmp_path / "levers.svg").read_text()


def test_another_dataset_is_another_run(tmp_path):
    """A lever may bring its own data: a tokenizer. Where the same data lies does not matter."""
    base: dict[str, str] = {}
    for name in ("one", "copy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}" if name == "other" else "[]")
        base[name] = str(tmp_path / name)
    settings = {name: {"DATASETS_DIR": folder, "MATRIX_LR": "1"} for name, folder in base.items()}
    contest = levers.Contest(tmp_path / "records.jsonl", settings["one"], {}, "source", "recipe", ["1"])
    keys = {name: contest.key(effective, "1") for name, effective in settings.items()}
    assert keys["one"] == keys["copy"] != keys["other"]


def test_winners_of_an_earlier_choice_are_not_mixed_with_those_of_the_latest():
    def record(lever: str, score: float, **settings: str) -> levers.Record:
        return {"lever": lever, "seed": 1, "settings": settings, "val_bpb": score}

    records = [
        record("base", 2.0),
        *(record(name, 1.99, **{name.upper(): "1"}) for name in "abc"),
        record("together", 1.9, A="1", B="1"),
        record("without a", 1.95, B="1"),
        record("without b", 1.97, A="1"),
        record("together", 1.8, B="1", C="1"),
        record("without b", 1.85, C="1"),
    ]
    found = {row.name: row.mean for row in levers.judge(records) if len(row.name) > 1}
    assert found == {"base": 2.0, "together": 1.8, "without b": 1.85}
    assert "| without b | +0.05000 | 1 |" in levers.render_removals(records)


def test_another_script_is_another_contest_unless_its_base_has_the_same_scores(tmp_path):
    (tmp_path / "levers.txt").write_text("rate | MATRIX_LR=0.03 | #1: three seeds\n")
    before = levers.read_records(call(tmp_path, seeds="1,2"))
    base = [record for record in before if record["lever"] == "base"]
    other = {**before[-1], "source_sha256": "x", "lever": "other"}
    # Without a base of its own, with a part of the seeds, with a score that differs in the last bit: two.
    bits = {**base[1], "val_bpb": np.nextafter(base[1]["val_bpb"], 9)}
    for own in ([], base[:1], [base[0], bits]):
        own = [{**record, "source_sha256": "x"} for record in own]
        groups = levers.contests([*before, *own, other])
        assert groups == [[*own, other], before]
        assert own or np.isnan(levers.judge(groups[0])[0].difference)
    same = [{**record, "source_sha256": "x"} for record in base]
    assert levers.contests([*before, *same, other]) == [[*before, *same, other]]
    ruled = [{**record, "rule": "y"} for record in [*same, other]]  # a default was changed
    assert levers.contests([*before, *ruled]) == [[*before, *ruled]]


def test_an_edited_script_with_the_same_base_goes_on_with_the_records(tmp_path, monkeypatch):
    (tmp_path / "levers.txt").write_text("rate | MATRIX_LR=0.03 | #1: three seeds\n")
    records = call(tmp_path, seeds="1,2")
    edited = tmp_path / "edited.py"
    edited.write_text(STAND_IN.read_text() + "\n")
    call(tmp_path, "--script", str(edited), "--name", "edited", seeds="1,2")
    assert sorted(path.parent.name for path in tmp_path.glob("runs/edited/*/starts")) == ["SEED-1", "SEED-2"]
    rows = {row.name: row for row in levers.judge(levers.contests(levers.read_records(records))[0])}
    assert rows["rate"].seeds == 2 and rows["rate"].verdict == "better"


def test_a_failed_lever_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "levers.txt").write_text("broken | MATRIX_LR=9 | -\nrate | MATRIX_LR=0.03 | -\n")
    records = call(tmp_path, seeds="1,2", status=1)
    assert "not finished: broken" in capsys.readouterr().out
    names = {record["lever"] for record in levers.read_records(records)}
    assert names == {"base", "rate", "together"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("rate MATRIX_LR=0.03", "levers.txt:1: not `name"),
        ("rate | MATRIX_LR | x", "levers.txt:1: not `name"),
        ("a | SEED=1 | x\na | SEED=2 | x", "levers.txt:2: the name 'a' is taken"),
        ("base | SEED=1 | x", "the name 'base' is taken"),
        ("a | MATRIX_LX=1 | x", "a: MATRIX_LX is not a setting"),
        ("a | MATRIX_LR=0.0260 | x", "a: changes nothing here"),
    ],
)
def test_a_wrong_file_of_levers_is_refused(tmp_path, text, message):
    (tmp_path / "levers.txt").write_text(text)
    with pytest.raises(results.Stop, match=message):
        call(tmp_path)
    assert not starts(tmp_path)


def test_the_repositorys_levers_can_be_read():
    assert len(levers.read_levers(ROOT / "records" / "levers.txt")) >= 12


def test_interleaved_runs_turn_round_and_seconds_have_a_price(tmp_path, capsys):
    words = ["QK_GAIN_INIT=5,6", "SEED=1,2,3,4", "--interleave", "--exchange", "0.001", "--name", "i"]
    sweep.main([*words, "--script", str(STAND_IN), "--out", str(tmp_path)])
    times = {path.parent.name: float(path.read_text().split()[1]) for path in tmp_path.glob("i/*/starts")}
    order = [name.removeprefix("QK_GAIN_INIT-") for name in sorted(times, key=times.get)]
    assert order == [f"{gain}_SEED-{seed}" for seed, gain in zip("11223344", "56655665", strict=True)]
    scores = [[stand_in.score(0.026, gain, seed) for seed in (1, 2, 3, 4)] for gain in (6.0, 5.0)]
    difference = np.array(scores[0]) - np.array(scores[1])
    (row,) = sweep.price_rows(sweep.rows_of(tmp_path / "i", "val_bpb"), "val_bpb", 0.001)
    assert row.metric == pytest.approx((difference.mean(), difference.std(ddof=1) / 2))
    assert row.percent == pytest.approx((20.0, 0.0), abs=1e-9) and row.pairs == 4  # 120 seconds, not 100
    assert row.priced[0] == pytest.approx(difference.mean() + 0.02)
    assert f"priced {row.priced[0]:+.6f}" in capsys.readouterr().out
