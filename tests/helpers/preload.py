"""What every forked process would do first: the trainer's imports, compiled loops and packed script."""

from __future__ import annotations

import types

import numpy as np
import torch

import train_gpt as t
from helpers import ROOT
from helpers.shared import share_short_form

share_short_form()
t.pack_source((ROOT / "train_gpt.py").read_bytes())
# To load what numba has compiled takes half a second. Of inverses it compiles the transposed form.
two = {"column_order": torch.arange(2), "feedback": torch.zeros(2, 2).T, "row_feedback": None}
matrix = types.SimpleNamespace(weight=torch.ones(2, 2), **two)
integers = t.round_matrix(matrix, np.ones((2, 2), np.float32), 64, t.BIT_PRICE)
t.code_matrices([integers], 64, t.code_matrices([integers], 64))
