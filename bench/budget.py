#!/usr/bin/env python3
"""What a shape costs and what it should give, beside the audited stack's: parameters, bits, steps, BPB.

    python bench/budget.py [--mlp 5 5.5 6] [--layers 11] [--width 512] [--vocab 8192] [--cap 16000000]

Counted: parameters, bits per weight when the artifact fills the cap, operations of a token's matrix products
(forward and backward, averaged over training). Estimated with rates of exchange between public runs of the
contest, given below with their sources: the share of steps that a larger model loses, and BPB against the
audited stack (11 layers of 512, MLP 4, 8,192 entries) packed by us. The rates hold near that stack alone, and
nothing is trained or measured here.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data
import environment

environment.enter()
import argparse
import dataclasses
import json
import math
from typing import NamedTuple

import train_gpt as t

# BPB per unit of the natural logarithm, and milliseconds of a step of the audited stack on the contest's
# machine per million parameters more. PR #2130 (MLP 3 and 4 at equal flags, steps made equal), #1979, #2008
# (training four and ten times as long), #1512 (12 layers), #670 (width), #1707 and #2120 (vocabulary).
BPB_PER_LOG_PARAMETERS = -0.075
BPB_PER_LOG_STEPS = -0.041
AUDITED_STEP_MS = 120.0
MS_PER_MILLION = {"width": 4.0, "layers": 4.5, "MLP": 1.3, "vocabulary": 0.5}
AUDITED = t.Config()


class Shape(NamedTuple):
    """The sizes that a budget is made for."""

    layers: int
    width: int
    mlp: float
    vocabulary: int


class Budget(NamedTuple):
    """What a shape costs, and what it should give against the audited stack in BPB (less is better)."""

    parameters: int
    bits: float  # of a weight of the matrices, if the artifact fills the cap
    operations: float  # of a token, in training
    steps: float  # that fit in the same time, as a share of the audited stack's
    by_parameters: float
    by_steps: float
    by_packing: float

    @property
    def total(self) -> float:
        """The sum of the estimates."""
        return self.by_parameters + self.by_steps + self.by_packing


def settings(shape: Shape) -> t.Config:
    """The audited stack in another shape; heads keep their width, two query heads share keys and values."""
    heads = shape.width // (AUDITED.model_dim // AUDITED.num_heads)
    return dataclasses.replace(
        AUDITED,
        num_layers=shape.layers,
        model_dim=shape.width,
        mlp_mult=float(shape.mlp),
        vocab_size=shape.vocabulary,
        num_heads=heads,
        num_kv_heads=heads // 2,
        xsa_last_n=shape.layers,
    )


def count_parameters(config: t.Config) -> tuple[int, int]:
    """(weights of the matrices, values in fp16) of a model."""
    counts = {True: 0, False: 0}
    for spec in t.parameter_table(config).values():
        counts[spec.quantizer == "fp16"] += math.prod(spec.shape)
    return counts[False], counts[True]


def operations(config: t.Config) -> float:
    """Operations of a token's matrix products in training, forward and backward, loops included."""
    plain, looped = (t.step_operations(config, loops, 1, 0) for loops in (0, config.num_loops))
    share = config.enable_looping_at
    return share * plain + (1 - share) * looped


def more_milliseconds(shape: Shape) -> float:
    """What a step takes longer than the audited stack's: its sizes are changed one after the other."""
    now = Shape(AUDITED.num_layers, AUDITED.model_dim, AUDITED.mlp_mult, AUDITED.vocab_size)
    changes = {"width": "width", "layers": "layers", "MLP": "mlp", "vocabulary": "vocabulary"}
    total = 0.0
    for kind, field in changes.items():
        then = now._replace(**{field: getattr(shape, field)})
        more = sum(count_parameters(settings(then))) - sum(count_parameters(settings(now)))
        total += MS_PER_MILLION[kind] * more / 1e6
        now = then
    return total


def budget(shape: Shape, cap: int, code: int) -> Budget:
    """The budget of a shape for an artifact of `cap` bytes less `code`."""
    matrices, small = count_parameters(settings(shape))
    audited_matrices, audited_small = count_parameters(AUDITED)
    parameters, audited = matrices + small, audited_matrices + audited_small

    def bits(weights: int, values: int) -> float:
        return 8 * (cap - code - 2 * values) / weights

    here, there = bits(matrices, small), bits(audited_matrices, audited_small)
    steps = AUDITED_STEP_MS / (AUDITED_STEP_MS + more_milliseconds(shape))
    return Budget(
        parameters,
        here,
        operations(settings(shape)),
        steps,
        BPB_PER_LOG_PARAMETERS * math.log(parameters / audited),
        BPB_PER_LOG_STEPS * math.log(steps),
        t.packing_loss(here) - t.packing_loss(there),
    )


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mlp", type=float, nargs="+", default=[5.0, 5.5, 6.0], help="widths of the MLP")
    parser.add_argument("--layers", type=int, default=AUDITED.num_layers, help="layers")
    parser.add_argument("--width", type=int, default=AUDITED.model_dim, help="width of the residual stream")
    parser.add_argument("--vocab", type=int, default=AUDITED.vocab_size, help="entries of the tokenizer")
    parser.add_argument("--cap", type=int, default=AUDITED.artifact_cap_bytes, help="bytes of the submission")
    options = parser.parse_args()
    code = len(t.pack_source((ROOT / "train_gpt.py").read_bytes())[0])
    audited = Shape(AUDITED.num_layers, AUDITED.model_dim, AUDITED.mlp_mult, AUDITED.vocab_size)
    asked = [Shape(options.layers, options.width, mlp, options.vocab) for mlp in options.mlp]
    print(f"{options.cap} bytes less {code} of code; estimates are BPB against the first row, packed by us")
    print(
        f"{'layers':>6}{'width':>7}{'MLP':>6}{'vocab':>7}{'M':>8}{'bit/w':>8}{'MFLOP/token':>13}{'steps':>8}"
        f"{'parameters':>12}{'steps':>9}{'packing':>9}{'total':>9}"
    )
    rows = {shape: budget(shape, options.cap, code) for shape in [audited, *asked]}
    for shape, row in rows.items():
        line = (
            f"{shape.layers:>6}{shape.width:>7}{shape.mlp:>6g}{shape.vocabulary:>7}"
            f"{row.parameters / 1e6:>8.2f}{row.bits:>8.2f}{row.operations / 1e6:>13.0f}"
            f"{100 * row.steps:>7.1f}%"
            f"{row.by_parameters:>+12.4f}{row.by_steps:>+9.4f}{row.by_packing:>+9.4f}{row.total:>+9.4f}"
        )
        print(line)
    found = [shape._asdict() | row._asdict() | {"total": row.total} for shape, row in rows.items()]
    best = min(rows, key=lambda shape: rows[shape].total)
    print("RESULT " + json.dumps({"best": best._asdict(), "shapes": found, "code_bytes": code}))


if __name__ == "__main__":
    main()
