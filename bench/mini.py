#!/usr/bin/env python3
"""What the flagship's ideas are worth in the mini contest: training, packer and evaluation, one by one.

    python bench/mini.py --work FOLDER [--seeds 1 2 3] [--public RECIPE] [--ours RECIPE]

Trains, packs and scores the public settings (records/recipes/mini_public.env) and ours
(records/recipes/mini_flagship.env) with the same seeds, bytes and operations (docs/mini.md), and ours once
more without the copies of the mixture, which flatter small models. What is done is kept in --work.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data
import environment

environment.enter()
import argparse
import json
from typing import NamedTuple

import numpy as np

import recipes
from bench.trainings import train
from results import mean_error

RECIPES = ROOT / "records" / "recipes"
PARTS = ("training", "packer", "evaluation", "copies")


class Scores(NamedTuple):
    """Bits per byte of one seed: of the trained weights, packed, and scored with what it has learnt there."""

    trained: float
    packed: float
    plain: float  # the final score without copies
    final: float


def scores_of(summary: dict, without_copies: dict | None = None) -> Scores:
    """The scores in summary.json of a run, and of the run that scored its artifact without copies."""
    bits = summary["bpb"]
    final = summary["val_bpb"]
    plain = final if without_copies is None else without_copies["val_bpb"]
    return Scores(bits["prequant"], bits["quantized"], plain, final)


def differences(public: Scores, ours: Scores) -> dict[str, float]:
    """What each part makes of the difference of the final scores, which is their sum; negative is better."""
    return {
        "training": ours.trained - public.trained,
        "packer": (ours.packed - ours.trained) - (public.packed - public.trained),
        "evaluation": (ours.plain - ours.packed) - (public.plain - public.packed),
        "copies": (ours.final - ours.plain) - (public.final - public.plain),
    }


def limits(name: str, summary: dict) -> str:
    """One line: what a run used of what the rule allows."""
    return (
        f"{name}: {summary['artifact_bytes']:,} bytes, {summary['operations']:.4g} operations, "
        f"{summary['eval_passes']:.1f} passes, legal: {summary['compliance']['legal']}"
    )


def run_seed(seed: int, public: Path, ours: Path, work: Path) -> tuple[Scores, Scores]:
    """The scores of the two recipes with one seed."""
    own = {"SEED": str(seed), "EVAL_PREQUANT": "1"}
    theirs = train(work, f"public-{seed}", recipes.read(public) | own)
    settings = recipes.read(ours) | own
    full = train(work, f"ours-{seed}", settings)
    again = {
        "STAGE": "evaluate",
        "ARTIFACT": str(work / f"ours-{seed}" / "final_model.ptz"),
        "TTT_MIXTURE_COPIES": "none",
        "EVAL_PREQUANT": "0",
    }
    plain = train(work, f"ours-{seed}-without-copies", settings | again)
    for name, summary in (("public", theirs), ("ours", full)):
        print(limits(f"{name}, seed {seed}", summary), flush=True)
    return scores_of(theirs), scores_of(full, plain)


def report(found: dict[int, tuple[Scores, Scores]]) -> dict:
    """Print the table; the figures of RESULT."""
    for name, place in (("public", 0), ("ours", 1)):
        means = [
            float(np.mean(column)) for column in zip(*(pair[place] for pair in found.values()), strict=True)
        ]
        print(f"{name:<8}" + "".join(f"{value:>10.5f}" for value in means) + "   " + " ".join(Scores._fields))
    base = float(np.mean([public.final for public, _ in found.values()]))
    parts = [differences(*pair) for pair in found.values()]
    totals = {part: [each[part] for each in parts] for part in PARTS}
    totals["without copies"] = [sum(each.values()) - each["copies"] for each in parts]
    totals["together"] = [sum(each.values()) for each in parts]
    result: dict = {"seeds": len(found), "public_bpb": round(base, 5)}
    for part, values in totals.items():
        mean, error = mean_error(values)
        print(f"{part:<16}{mean:>+10.5f} ± {error:.5f}  {100 * mean / base:>+7.2f} %")
        result[part.replace(" ", "_")] = {"bpb": round(mean, 5), "percent": round(100 * mean / base, 2)}
    return result


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs, kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--public", type=Path, default=RECIPES / "mini_public.env")
    parser.add_argument("--ours", type=Path, default=RECIPES / "mini_flagship.env")
    options = parser.parse_args()
    work = options.work.resolve()
    found = {seed: run_seed(seed, options.public, options.ours, work) for seed in options.seeds}
    print("RESULT " + json.dumps(report(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
