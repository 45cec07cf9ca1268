"""bench/kills.py: the moments at which a run is killed are counted, spread and struck."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys

import pytest

from helpers import ROOT


@pytest.fixture(scope="module")
def kills():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("kills", ROOT / "bench" / "kills.py")
    module = importlib.util.module_from_spec(spec)
    threads = os.environ.get("OMP_NUM_THREADS")
    spec.loader.exec_module(module)
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = threads
    return module


def test_kills_are_spread_over_writes_and_calls(kills):
    counts = {("train", "write"): 3, ("train", "call"): 100}
    assert kills.plan(counts, "train", 7) == [
        *[("train", "write", place) for place in (1, 2, 3)],
        *[("train", "call", place) for place in (1, 34, 67, 100)],
    ]
    assert kills.plan(counts, "pack", 7) == []


@pytest.mark.parametrize("place", [1, 2, 3, 4, 5])
def test_a_file_is_left_as_a_kill_at_that_moment_leaves_it(kills, tmp_path, monkeypatch, place):
    """Before a write, in the middle of it, before the flush, and on both sides of the replacement."""
    path = tmp_path / "a"
    path.write_text("old")
    found = []

    def strike(process: int, number: int) -> None:
        found.append((number, path.read_text(), (tmp_path / "a.tmp").read_bytes()))
        raise KeyboardInterrupt

    monkeypatch.setattr(kills.os, "kill", strike)
    monkeypatch.setattr(kills.t, "open", None, raising=False)
    monkeypatch.setattr(kills.t, "STAGES", dict(kills.t.STAGES))
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, getattr(os, name))
    monkeypatch.setattr(kills.t, "pack_run", kills.t.pack_run)
    monkeypatch.setattr(sys, "setprofile", lambda function: None)
    kills.Moments(("start", "write", place)).watch()
    with pytest.raises(KeyboardInterrupt):
        kills.t.write_atomically(path, b"new file")
    parts = {1: b"", 2: b"new ", 3: b"new file", 4: b"new file", 5: b"new file"}
    assert found == [(signal.SIGKILL, "old", parts[place])]
