"""Sweeps of the stand-in, in the process of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

import sweep
from helpers import STAND_IN


def run_sweep(out: Path, *words: str, status: int = 0) -> Path:
    """Run a sweep under `out`, which has to end with `status`; returns its folder."""
    arguments = ["--script", str(STAND_IN), "--out", str(out), "--name", "s", *words]
    if status:
        with pytest.raises(SystemExit) as stop:
            sweep.main(arguments)
        assert stop.value.code == status
    else:
        sweep.main(arguments)
    return out / "s"
