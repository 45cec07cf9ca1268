"""Runs of the trainer that benchmarks compare."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from data.shards import read_json_object

ROOT = Path(__file__).resolve().parent.parent


def train(out: Path, name: str, settings: Mapping[str, str]) -> dict:
    """summary.json of the run `out`/`name` with these settings; a finished one is used again."""
    summary = out / name / "summary.json"
    if not summary.exists():
        own = {"RUN_ID": name, "OUT_DIR": str(out), "OMP_WAIT_POLICY": "passive"}
        subprocess.run(
            [sys.executable, str(ROOT / "train_gpt.py")],
            check=True,
            stdout=sys.stderr,
            cwd=ROOT,
            env=os.environ | dict(settings) | own,
        )
    return read_json_object(summary)
