"""bench/fuzz.py: no damaged file is a traceback or a wrong count; the judges can fail."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.run_folders import original

spec = importlib.util.spec_from_file_location("fuzz", ROOT / "bench" / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
sys.modules["fuzz"] = fuzz  # dataclasses look their module up
spec.loader.exec_module(fuzz)


# test_results.py and test_recipes.py have these.
ELSEWHERE = {"recipe", "metrics", "summary", "configuration", "stages", "sums of documents"}


@pytest.mark.parametrize("name", [name for name in fuzz.TARGETS if name not in ELSEWHERE])
def test_mutants_are_refused_or_read_rightly(tmp_path, dataset, monkeypatch, name):
    finished = lambda folder: Path(shutil.copytree(original(dataset), folder / "run"))
    monkeypatch.setattr(fuzz, "finished_run", finished)
    target, counts = fuzz.TARGETS[name](tmp_path), Counter()
    assert target.judge(target.content) == fuzz.RIGHT
    assert list(fuzz.failures(target, 40, 7, counts)) == []
    assert counts[fuzz.REFUSED] + counts[fuzz.RIGHT] == 40 and counts[fuzz.REFUSED] > 0


def test_a_wrong_count_and_a_traceback_are_seen(tmp_path, monkeypatch):
    target = fuzz.TARGETS["shard"](tmp_path)
    real = fuzz.read_shard
    monkeypatch.setattr(fuzz, "read_shard", lambda path: real(path)[:-1])
    with pytest.raises(fuzz.Wrong):
        target.judge(target.content)
    counts: Counter = Counter()
    monkeypatch.setattr(fuzz, "read_shard", lambda path: 1 // 0)
    assert "ZeroDivisionError" in next(fuzz.failures(target, 1, 0, counts))[1]
    assert counts["traceback"] == 1


def test_json_mutants_are_json(tmp_path):
    content = json.dumps({"a": {"b": [1, {"c": 2}]}, "d": "x"}).encode()
    mutants = {fuzz.change_json(content, random.Random(seed)) for seed in range(200)}
    assert len(mutants) > 20 and all(isinstance(json.loads(mutant), dict) for mutant in mutants)


def test_the_command_prints_a_table_and_a_result(capsys):
    assert fuzz.main(["shard", "--mutants", "20"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert sum(result["targets"]["shard"].values()) == 40
    assert fuzz.main(["nothing"]) == 2
    assert "no target 'nothing'" in capsys.readouterr().err
