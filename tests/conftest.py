"""The fixtures of all tests: a small dataset with a tokenizer of its own and the settings of a tiny run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

on_gpu = any("tests/gpu" in word for word in sys.argv[1:] if not word.startswith("-"))
# A worker of pytest-xdist has another command line, and from its parent what that decided.
if "PYTEST_XDIST_WORKER" not in os.environ and ("--dry" in sys.argv or not on_gpu):
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is loaded: kernels run on the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so does everything else, where there are GPUs too
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Most loops run for milliseconds: compiling them takes longer. The code of users is kept apart from this.
os.environ.setdefault("NUMBA_OPT", "1")
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent / "__pycache__" / "numba"))

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("helpers")
from helpers import ROOT

sys.path.insert(0, str(ROOT))

import train_gpt as t
from helpers.shared import made_once, share_in
from helpers.trainer import make_dataset, tiny_settings

hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory) -> None:
    """What takes long to make is made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    share_in((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared")


@pytest.fixture(scope="session")
def dataset(shared_folder) -> Path:
    """A folder with two training shards, one validation shard and a tokenizer of 320 entries."""
    return made_once("dataset", make_dataset)


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a program of a kernel takes the same time whatever its size: few large ones do."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(t, "RESIDUAL_BLOCK", 32)
        monkeypatch.setattr(t, "SPREAD_WIDTH", 128)


@pytest.fixture
def settings(dataset: Path, tmp_path: Path) -> dict[str, str]:
    """Environment variables of a run that takes seconds."""
    return tiny_settings(dataset, tmp_path / "runs")


@pytest.fixture
def config(settings: dict[str, str]) -> t.Config:
    """The same as a Config."""
    return t.Config.from_env(settings)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory a kernel forgets to write must not look like a result."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: real(*a, **k).fill_(float("nan")))
