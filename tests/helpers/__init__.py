"""What several test files use: starts of the trainer, run folders, datasets, tensors, stand-ins, oracles."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
STAND_IN = ROOT / "tests" / "helpers" / "stand_in.py"  # in place of train_gpt.py
