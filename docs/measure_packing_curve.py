#!/usr/bin/env python3
"""Measure the packers' curve of docs/packing.md on one run: KL against bytes, ours and the public packer.

    ./docs/measure_packing_curve.py runs/NAME     writes docs/packing_curve.json; then ./docs/make_pictures.py

Every point is a file that was written, read again and judged on validation tokens that nothing was tuned on.
The public packer (SDClip) is measured with its published constants and with constants tuned on this model,
its clip widths scaled to reach other sizes; ours as shipped, with another goal in bytes for each point.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import environment

environment.enter()
import argparse
import json
import math
import shutil
from typing import Any

sys.path.insert(0, str(ROOT / "bench"))
import packing

BITS = (2.50, 2.75, 3.00, 3.25, 3.50, 3.75)  # bits per weight of the points
GOAL = 3.3  # bits per weight at which the public packer is tuned
CLIPS = {
    "embed": [0.7, 1.4],
    "attn": [0.7, 1.4],
    "mlp": [0.7, 1.4],
    "embed_bits": [6, 8],
    "bits": [5, 7],
}  # factors on the clip widths, and the other integer widths


class Public:
    """The public packer on one model: the factor on all clip widths that gives a size."""

    def __init__(self, packers: packing.Packers, clip: packing.Clip):
        self.packers, self.clip, self.octaves = packers, clip, 0.0

    def size(self, clip: packing.Clip) -> tuple[dict[str, Any], float]:
        """(tensors, entropy of their integers in bits per weight) with the clip widths of `clip`, scaled."""
        tensors = self.packers.sdclip(clip, 2**self.octaves)
        return tensors, packing.symbol_bits(tensors) / self.packers.subject.count

    def score(self, clip: packing.Clip) -> float:
        """log2 of the divergence on the tuning tokens, moved to GOAL bits per weight at 6 dB a bit."""
        subject = self.packers.subject
        tensors, bits = self.size(clip)
        self.octaves += bits - GOAL
        weights = self.packers.read(self.packers.write(tensors))
        return math.log2(subject.divergence(weights, range(subject.tuning))[0].mean()) + 2 * (bits - GOAL)

    def factor(self, bits: float) -> float:
        """The factor on the clip widths of self.clip whose integers have `bits` per weight, to 0.5 %."""
        for _ in range(8):
            found = self.size(self.clip)[1]
            self.octaves += found - bits
            if abs(found / bits - 1) < 0.005:
                break
        return 2**self.octaves


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The points of every curve, by name."""
    subject = packing.Subject(options.run, options.tuning, options.tokens, "brotli")
    packers = packing.Packers(subject, options.calibration)
    report = packing.Report(packers, options.lrzip, len(subject.hidden))
    published = Public(packers, packing.Clip())
    search = Public(packers, packing.Clip())
    choices = {
        name: [scaled(value) for value in values] if "bits" not in name else values
        for name, values in CLIPS.items()
    }
    tuned = Public(packers, packing.tune(packing.Clip(), choices, options.trials, search.score, "SDClip"))
    curves = {}
    for name, public in (("SDClip, published constants", published), ("SDClip, tuned", tuned)):
        rows = report.public(name, public.clip, [public.factor(bits) for bits in BITS])
        best = {
            row["setting"]: row for row in sorted(rows, key=lambda row: -row["bytes"])
        }  # the smaller file
        curves[name] = list(best.values())
    goals = [round(subject.count * bits / 8) for bits in BITS]
    curves["ours"] = report.ours("ours", packing.Form(), goals, True)
    keys = ("bytes", "kl", "delta_bpb", "scheme")
    return {
        name: [{key: row[key] for key in keys} | {"bits": 8 * row["bytes"] / subject.count} for row in rows]
        for name, rows in curves.items()
    }


def scaled(factor: float) -> Any:
    """A choice of packing.tune: the value so far times `factor`."""
    return lambda now: now * factor


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder with checkpoint.pt, such as that of ./run.sh")
    parser.add_argument("--lrzip", default=shutil.which("lrzip"), help="lrzip program; without: brotli only")
    parser.add_argument("--tokens", type=int, default=131_072, help="validation tokens to judge on")
    parser.add_argument(
        "--tuning", type=int, default=16_384, help="validation tokens before these, for tuning"
    )
    parser.add_argument("--trials", type=int, default=18, help="settings that the public packer may try")
    parser.add_argument(
        "--calibration", type=int, default=65_536, help="training tokens of the sensitivities"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "packing_curve.json", help="file to write"
    )
    options = parser.parse_args()
    if not (options.run / "checkpoint.pt").exists():
        parser.error(f"{options.run}: no checkpoint.pt there; give the folder of a finished run")
    curves = measure(options)
    settings = json.loads((options.run / "config.json").read_text())
    summary = json.loads((options.run / "summary.json").read_text())
    shape = f"{settings['NUM_LAYERS']} layers of {settings['MODEL_DIM']}"
    training = f"{settings['ITERATIONS']} steps of {settings['TRAIN_BATCH_TOKENS']} tokens"
    facts = {
        "command": f"./docs/measure_packing_curve.py {options.run}",
        "model": f"{shape}, {training}; its own artifact: sha256 {summary['artifact_sha256']}",
        "tokens": options.tokens,
        "curves": curves,
    }
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
