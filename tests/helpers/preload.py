"""What every forked process would do first: the trainer's imports, and its text made small (2.4 s)."""

from __future__ import annotations

import train_gpt as t
from helpers import ROOT

t.pack_source((ROOT / "train_gpt.py").read_bytes())
