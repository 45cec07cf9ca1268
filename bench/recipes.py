#!/usr/bin/env python3
"""The four published systems side by side: what each stage of their evaluation gives, on real text or at full size.

    python bench/recipes.py DATASET [--steps N] [--val-tokens N] [--quick]      reduced shape, trained: the table
    python bench/recipes.py DATASET --full [--quick]                            full shape, one and two processes

DATASET is a folder made by data/prepare.py with a vocabulary of 8,192. Every system runs from its recipe in
records/recipes/ through train_gpt.py; what is changed is printed. The reduced shape (6 layers, width 128) is trained on
equal tokens. The full shape makes one step on a few tokens: that shows that all of it works, not how good it is.
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
import tempfile
import time

import numpy as np

from data.shards import BOS, read_shard, write_shard
from recipes import read as read_recipe

SYSTEMS = {"pr1585": 35_944_602, "pr1738": 35_944_536, "pr1755": 35_944_536, "pr1693": 35_945_671}
SHORT = {  # rows of 256 tokens instead of 2,048, and chunks, phases and batches in proportion
    "TRAIN_SEQ_LEN": "256",
    "EVAL_SEQ_LEN": "256",
    "VAL_LOSS_EVERY": "0",
    "WARMUP_STEPS": "0",
    "SCHEDULE": "steps",
    "CHECKPOINT_EVERY": "0",
    "MAX_WALLCLOCK_SECONDS": "100000",
    "EVAL_BUDGET_SECONDS": "100000",
    "TTT_EVAL_SEQ_LEN": "256",
    "TTT_CHUNK_TOKENS": "4096",
    "GLOBAL_TTT_CHUNK_TOKENS": "4096",
    "PREQUANT_TTT_CHUNK_TOKENS": "4096",
    "VAL_BATCH_TOKENS": "65536",
    "SLIDING_WINDOW_ENABLED": "1",
}
REDUCED = SHORT | {
    "NUM_LAYERS": "6",
    "MODEL_DIM": "128",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "XSA_LAST_N": "6",
    "LOOP_START": "2",
    "LOOP_END": "3",
    "NUM_LOOPS": "1",
    "PARALLEL_START_LAYER": "4",
    "TRAIN_BATCH_TOKENS": "4096",
    "MUON_MOMENTUM_WARMUP_STEPS": "100",
    "EMA_DECAY": "0.97",
    "GPTQ_CALIBRATION_BATCHES": "64",
    "TRAIN_LOG_EVERY": "50",
    "TTT_LORA_RANK": "16",
    "TTT_BATCH_SIZE": "16",
    "PHASED_TTT_PREFIX_DOCS": "64",
    "PREQUANT_TTT_EPOCHS": "5",
}
FULL = SHORT | {
    "COMPRESSOR": "lzma",  # three times as fast as Brotli 11
    "EVAL_PREQUANT": "0",
    "TRAIN_BATCH_TOKENS": "2048",
    "ITERATIONS": "1",
    "GPTQ_CALIBRATION_BATCHES": "8",
    "VAL_BATCH_TOKENS": "16384",
    "TTT_CHUNK_TOKENS": "512",
    "GLOBAL_TTT_CHUNK_TOKENS": "512",
    "PREQUANT_TTT_CHUNK_TOKENS": "512",
    "PREQUANT_TTT_EPOCHS": "2",
    "EVAL_STRIDE": "128",
    "TTT_BATCH_SIZE": "1",
    "PHASED_TTT_PREFIX_DOCS": "3",
    "TTT_CHUNK_SIZE": "128",
}


def recipe(name: str) -> dict[str, str]:
    """The variables of a recipe in records/recipes/."""
    return read_recipe(ROOT / f"records/recipes/{name}.env")


def cut(
    dataset: Path, folder: Path, train_tokens: int, val_tokens: int, longest: int = 1 << 60
) -> dict[str, str]:
    """Make `folder` the first tokens of `dataset`, no validation document longer than `longest`; returns the variables
    that name it."""
    folder.mkdir(parents=True)
    val = read_shard(dataset / "fineweb_val_000000.bin")
    starts = np.maximum.accumulate(np.where(val == BOS, np.arange(len(val)), 0))
    kept = np.flatnonzero(np.arange(len(val)) - starts < longest)[:val_tokens]
    for path in sorted(dataset.glob("fineweb_*_000000.bin")):
        values = read_shard(path)
        write_shard(
            folder / path.name, np.array(values[:train_tokens] if "train" in path.name else values[kept])
        )
    tokenizer = next(iter(dataset.glob("*.model")))
    return {"DATASETS_DIR": str(folder), "TOKENIZER_PATH": str(tokenizer)}


def run(name: str, changes: dict[str, str], folder: Path, processes: int = 1) -> dict:
    """One run of a system; its summary with the seconds it took and the parameters its log names."""
    environment = (
        {key: value for key, value in os.environ.items() if key not in recipe(name)} | recipe(name) | changes
    )
    command = [sys.executable, "train_gpt.py"]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment |= {"OUT_DIR": str(folder), "RUN_ID": f"{name}-{processes}", "OMP_WAIT_POLICY": "passive"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    summary = json.loads((folder / f"{name}-{processes}" / "summary.json").read_text())
    stages = json.loads((folder / f"{name}-{processes}" / "stages.json").read_text())
    log = (folder / f"{name}-{processes}" / "train.log").read_text()
    parameters = int(log.split("model_params:")[1].split()[0])
    return (
        summary
        | {"seconds": time.monotonic() - began, "parameters": parameters}
        | stages.get("prequant_ttt", {})
    )


def reduced(options: argparse.Namespace, folder: Path) -> dict:
    """The table of all stages of all systems at the reduced shape."""
    data = cut(options.dataset, folder / "data", 1 << 60, options.val_tokens)
    changes = REDUCED | data | {"ITERATIONS": str(options.steps)}
    print(
        f"{options.steps} steps of 4,096 tokens, {options.val_tokens} validation tokens; changed in every recipe:"
    )
    print(
        "  " + " ".join(f"{key}={value}" for key, value in (REDUCED | {"ITERATIONS": options.steps}).items())
    )
    results = {}
    print(
        f"{'val_bpb':<10}{'prequant':>12}{'after 1738':>12}{'quantized':>12}{'sliding':>12}{'ttt':>12}  legal",
        flush=True,
    )
    for name in options.systems:
        summary = run(name, changes, folder / "runs")
        bpb = summary["bpb"] | ({"after": summary["after_bpb"]} if "after_bpb" in summary else {})
        cells = [
            f"{bpb[key]:.5f}" if key in bpb else ""
            for key in ("prequant", "after", "quantized", "sliding", "ttt")
        ]
        print(
            f"{name:<10}" + "".join(f"{cell:>12}" for cell in cells) + f"  {summary['compliance']['legal']}",
            flush=True,
        )
        results[name] = bpb | {"legal": summary["compliance"]["legal"], "seconds": round(summary["seconds"])}
    return {"steps": options.steps, "val_tokens": options.val_tokens, "bpb": results}


def full(options: argparse.Namespace, folder: Path) -> dict:
    """All stages of all systems at full size, with one and with two processes."""
    data = cut(options.dataset, folder / "data", 200_000, 2_000, longest=160)
    changes = FULL | data
    print("changed in every recipe: " + " ".join(f"{key}={value}" for key, value in FULL.items()))
    results = {}
    print(
        f"{'':<10}{'processes':>10}{'parameters':>12}{'artifact':>12}{'seconds':>9}  val_bpb by stage",
        flush=True,
    )
    for name in options.systems:
        scores = {}
        for processes in (1,) if options.quick else (1, 2):
            summary = run(name, changes, folder / "runs", processes)
            parameters = SYSTEMS[name]
            assert summary["parameters"] == parameters
            scores[processes] = summary["bpb"]
            stages = " ".join(f"{stage}:{bpb:.5f}" for stage, bpb in summary["bpb"].items())
            size, seconds = summary["artifact_bytes"], summary["seconds"]
            print(
                f"{name:<10}{processes:>10}{parameters:>12,}{size:>12,}{seconds:>9.0f}  {stages}", flush=True
            )
        results[name] = {"parameters": parameters, "bpb": scores}
    return {"systems": results}


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, help="folder of shards with a vocabulary of 8,192")
    parser.add_argument("--full", action="store_true", help="the full shape, one step")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="which of the four"
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps at the reduced shape")
    parser.add_argument(
        "--val-tokens", type=int, default=100_000, help="validation tokens at the reduced shape"
    )
    parser.add_argument("--quick", action="store_true", help="10 steps, or one process: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.val_tokens = 10, 5_000
    with tempfile.TemporaryDirectory() as name:
        result = (full if options.full else reduced)(options, Path(name))
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
