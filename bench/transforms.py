#!/usr/bin/env python3
"""CaseOps v1 against v3 by training: bits per byte of the same text after the same number of tokens.

    python bench/transforms.py [--quick] [--seeds 2] [--steps 150] [--work FOLDER]

Prepares one dataset per transform with data/prepare.py (tokenizers of 8,192 entries trained on the same
documents, validation = the FineWeb documents of ../shared/data), then trains a small model for the same
number of tokens on each with every seed. Bits per byte are over the original bytes, from each dataset's
sidecar.
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
import statistics
import subprocess
import tempfile

from bench.texts import SHARED
from bench.trainings import train

TRANSFORMS = ("caseops_v1", "caseops_v3")
SHAPE = {
    "LOADER": "shuffled",
    "TRAIN_SEQ_LEN": "128",
    "TRAIN_BATCH_TOKENS": "4096",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "128",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "XSA_LAST_N": "4",
    "NUM_LOOPS": "0",
    "PARALLEL_START_LAYER": "3",
    "SCHEDULE": "steps",
    "WARMUP_STEPS": "0",
    "MAX_WALLCLOCK_SECONDS": "3000",
    "MUON_MOMENTUM_WARMUP_STEPS": "100",
    "EMA_DECAY": "0.97",
    "GPTQ_CALIBRATION_BATCHES": "8",
    "EVAL_SEQ_LEN": "128",
    "VAL_BATCH_TOKENS": "16384",
    "SLIDING_WINDOW_ENABLED": "0",
    "CHECKPOINT_EVERY": "0",
    "VOCAB_SIZE": "8192",
    "EVAL_STRIDE": "128",
}


def prepare(transform: str, documents: str, folder: Path) -> Path:
    """The dataset of one transform; a finished one is recognised and used again."""
    script = str(ROOT / "data" / "prepare.py")
    subprocess.run(
        [
            sys.executable,
            script,
            str(SHARED / documents),
            "--transform",
            transform,
            "--val",
            str(SHARED / "fineweb_val_head.jsonl.xz"),
            "--vocab-size",
            "8192",
            "--workers",
            "2",
            "--out",
            str(folder),
        ],
        check=True,
        stdout=sys.stderr,
    )
    return folder


def train_on(folder: Path, seed: int, steps: int, out: Path) -> dict:
    """summary.json of one run."""
    own = {
        "SEED": str(seed),
        "ITERATIONS": str(steps),
        "DATASETS_DIR": str(folder),
        "TRAIN_LOG_EVERY": "50",
    }
    return train(out, f"{folder.name}-{steps}-seed{seed}", SHAPE | own)


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="10 steps on the smaller text: the same keys in a minute"
    )
    parser.add_argument("--seeds", type=int, default=2, help="seeds per transform")
    parser.add_argument("--steps", type=int, default=150, help="training steps of 4,096 tokens")
    parser.add_argument(
        "--work", type=Path, help="folder for datasets and runs, kept; default: a temporary one"
    )
    options = parser.parse_args()
    steps = 10 if options.quick else options.steps
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        scores: dict[str, list[float]] = {}
        for transform in TRANSFORMS:
            data = prepare(
                transform,
                "web.jsonl.xz" if options.quick else "prose.jsonl.xz",
                work / f"{transform}{'-quick' if options.quick else ''}",
            )
            runs = [train_on(data, seed + 1, steps, work / "runs") for seed in range(options.seeds)]
            scores[transform] = [run["bpb"]["prequant"] for run in runs]
            tokens, size = runs[0]["val_tokens"], runs[0]["val_bytes"]
            print(
                f"{transform}: {tokens / size:.5f} tokens per byte, {steps * 4096:,} training tokens; BPB "
                + ", ".join(f"{bpb:.5f}" for bpb in scores[transform])
                + f"; mean {statistics.mean(scores[transform]):.5f}",
                flush=True,
            )
    mean = {transform: statistics.mean(values) for transform, values in scores.items()}
    change = mean["caseops_v3"] / mean["caseops_v1"] - 1
    paired = [b - a for a, b in zip(scores["caseops_v1"], scores["caseops_v3"], strict=True)]
    print(f"v3 against v1: {100 * change:+.2f} % BPB (per seed: {', '.join(f'{d:+.5f}' for d in paired)})")
    print("RESULT " + json.dumps({"steps": steps, "bpb": scores, "mean": mean, "v3_change": change}))


if __name__ == "__main__":
    main()
