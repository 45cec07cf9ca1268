#!/usr/bin/env python3
"""Trains the small model that bench/packing.py quantises: 5 layers of width 384, vocabulary 2,048.

    python bench/checkpoint.py DATASET [--out runs/packing] [--minutes 60] [--loops 2] [--context 1024]
                               [--width 128] [--dtype bfloat16] [--quick]

DATASET is a folder made by data/prepare.py with --vocab-size 2048. The training is train_gpt.py's own with
STAGE=train and the settings below: the contest's model with fewer layers, no loops and short contexts (unless
asked for); 8.9 M parameters, or 1.2 M with --width 128. Few layers that are wide, and a small vocabulary, see
the most tokens per second on a CPU. bfloat16 is twice as fast on a CPU with AVX512-BF16, and slower on one
without.
--quick: half a minute. A second call with the same arguments does nothing: the finished training is on disk.
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
import os
import subprocess
import time

SETTINGS = {
    "STAGE": "train",
    "VOCAB_SIZE": "2048",
    "NUM_LAYERS": "5",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "4",
    "LOADER": "shuffled",
    "MICRO_BATCH_TOKENS": "4096",
    "VAL_BATCH_TOKENS": "65536",
    "MUON_MOMENTUM": "0.95",
    "MUON_MOMENTUM_WARMUP_STEPS": "100",
    "MIN_LR": "0",
    "EMA_DECAY": "0.98",
    "WARMUP_STEPS": "1",
    "GPTQ_RESERVE_SECONDS": "0",
    "CHECKPOINT_EVERY": "0",
    "TRAIN_LOG_EVERY": "20",
}


HEAD_CHANNELS = 64


def settings(
    dataset: Path, out: Path, minutes: float, loops: int, context: int, dtype: str, width: int
) -> dict[str, str]:
    """The environment variables of the training."""
    changes = {
        "MAX_WALLCLOCK_SECONDS": str(60 * minutes),
        "DATASETS_DIR": str(dataset),
        "NUM_LOOPS": str(loops),
        "MODEL_DIM": str(width),
        "NUM_HEADS": str(width // HEAD_CHANNELS),
        "NUM_KV_HEADS": str(width // HEAD_CHANNELS // 2),
        "COMPUTE_DTYPE": dtype,
        "TRAIN_SEQ_LEN": str(context),
        "EVAL_SEQ_LEN": str(context),
        "TRAIN_BATCH_TOKENS": str(max(4096, 8 * context)),
    }
    return SETTINGS | changes | {"OUT_DIR": str(out.resolve().parent), "RUN_ID": out.name}


def main() -> None:
    """Train, or find the finished training, and print what it was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, help="folder of shards made by data/prepare.py")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "packing", help="run folder of the checkpoint"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="training budget")
    parser.add_argument("--loops", type=int, default=0, help="how often layers 1 and 2 are visited again")
    parser.add_argument("--context", type=int, default=256, help="tokens of a training window (256)")
    parser.add_argument("--width", type=int, default=384, choices=(128, 256, 384), help="of the model (384)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products")
    parser.add_argument("--quick", action="store_true", help="half a minute of training")
    options = parser.parse_args()
    minutes = 0.5 if options.quick else options.minutes
    dataset = options.dataset.resolve()
    changes = settings(
        dataset, options.out, minutes, options.loops, options.context, options.dtype, options.width
    )
    began = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=os.environ | changes, check=True)
    facts = json.loads((options.out / "stages.json").read_text())["train"]
    print(f"{options.out}: {facts['steps']} steps, {facts['tokens_per_second']:,.0f} tokens/s")
    print(
        "RESULT "
        + json.dumps({"folder": str(options.out), "seconds": round(time.monotonic() - began, 1), **facts})
    )


if __name__ == "__main__":
    main()
