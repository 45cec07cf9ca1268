"""data/prepare.py and verify_bytes.py in this process, and what they say."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

import verify_bytes
from data import prepare
from data.shards import sha256_file, with_whole_scores


def run_prepare(*arguments: object) -> int:
    """data/prepare.py in this process with one worker; returns its exit code."""
    return prepare.main([str(argument) for argument in (*arguments, "--workers", 1)])


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line with which data/prepare.py refuses."""
    capsys.readouterr()
    assert run_prepare(*arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "WARNING" not in line]
    assert len(error) == 1 and error[0].startswith("prepare: ") and "; " in error[0], error
    return error[0]


def verify(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, dict]:
    """Exit code and report of verify_bytes.py in this process."""
    capsys.readouterr()
    code = verify_bytes.main([str(argument) for argument in (*arguments, "--json", "--workers", 1)])
    return code, json.loads(capsys.readouterr().out)


def refuted(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The counter-example with which verify_bytes.py refutes a dataset."""
    code, report = verify(capsys, *arguments)
    assert code == 1 and report["verdict"] == "refuted"
    return report["first_counterexample"]


def with_equal_scores(bpe: bytes, operators: Sequence[str]) -> bytes:
    """A unigram model of the pieces of a BPE model, with whole scores of which many sums are equal."""
    generator = random.Random(2)
    model = sentencepiece_model_pb2.ModelProto.FromString(bpe)
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    for piece in model.pieces:
        if piece.type == piece.NORMAL:
            piece.score = -generator.randint(1, 4) - len(piece.piece)
    return with_whole_scores(model.SerializeToString(), operators)


def content(folder: Path) -> dict[str, str]:
    """Hash of every file of a dataset."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
