#!/usr/bin/env python3
"""records/recipes/flagship.env at full shape on a CPU: a few steps, packed, scored, compliance checked.

    python bench/flagship.py [--steps 2] [--work FOLDER] [--set NAME=VALUE ...]

Shows that the recipe works from its first step to a legal artifact, and what it costs; two steps say nothing
about quality. The data is made from the embedded corpus with the recipe's transform and vocabulary. What is
changed for two cores is printed: batch, steps, calibration, documents. Operations and bits are those of the
recipe itself at the contest's size; a pass of evaluation is a forward and backward of one token, counted
while the validation documents here are scored.
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

import train_gpt as t
from bench.budget import count_parameters, operations
from bench.texts import embedded_texts
from recipes import read as read_recipe
from results import write_atomically

RECIPE = ROOT / "records" / "recipes" / "flagship.env"
DOCUMENTS = 4
SECONDS = ("training and calibration", "calibration before the bell", "evaluation", "evaluation clock")
SMALLER = {  # what makes it minutes on two cores
    "SCHEDULE": "steps",
    "MAX_WALLCLOCK_SECONDS": "100000",
    "GPTQ_RESERVE_SECONDS": "0",
    "EVAL_BUDGET_SECONDS": "100000",
    "ENABLE_LOOPING_AT": "0.5",
    "TRAIN_BATCH_TOKENS": "4096",
    "MICRO_BATCH_TOKENS": "4096",
    "WARMUP_STEPS": "0",
    "TRAIN_LOG_EVERY": "1",
    "CHECKPOINT_EVERY": "0",
    "GPTQ_CALIBRATION_BATCHES": "1",
    "TTT_BATCH_SIZE": "4",
    "PHASED_TTT_PREFIX_DOCS": "2",
    "VAL_BATCH_TOKENS": "8192",
    "EVAL_PREQUANT": "0",
}


def make_dataset(folder: Path, vocabulary: int) -> None:
    """The embedded corpus with case operators and a tokenizer of its own, four documents held out."""
    if (folder / "manifest.json").exists():
        return
    texts, _ = embedded_texts()
    source = folder.parent / "texts.jsonl"
    write_atomically(source, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), str(source), "--out", str(folder)]
    shape = ["--transform", "caseops_v3", "--vocab-size", str(vocabulary), "--val-docs", str(DOCUMENTS)]
    subprocess.run([*command, *shape], check=True, cwd=ROOT)


def run_recipe(folder: Path, settings: dict[str, str]) -> dict:
    """Train, pack and score in `folder`/runs/full; the summary."""
    places = {"OUT_DIR": str(folder / "runs"), "RUN_ID": "full", "DATASETS_DIR": str(folder / "data")}
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    subprocess.run(command, env=os.environ | settings | places, check=True, cwd=ROOT)
    return json.loads((folder / "runs" / "full" / "summary.json").read_text())


def check_compliance(run: Path) -> tuple[list[str], list[str]]:
    """What compliance.py finds broken: all but seconds, and seconds, of which a CPU needs more than 600."""
    subprocess.run([sys.executable, str(ROOT / "compliance.py"), str(run)], cwd=ROOT, check=False)
    report = json.loads((run / "compliance.json").read_text())
    sections = {name: probes for name, probes in report.items() if isinstance(probes, dict)}
    broken = [
        f"{section}: {name}"
        for section, probes in sections.items()
        for name, probe in probes.items()
        if not probe["holds"]
    ]
    slow = [name for name in broken if name.removeprefix("budgets: ") in SECONDS]
    return [name for name in broken if name not in slow], slow


def describe(recipe: dict[str, str], summary: dict) -> dict:
    """The figures of RESULT: those of the recipe at the contest's size, and those of the small run."""
    config = t.Config.from_env(recipe)
    matrices, small = count_parameters(config)
    room = config.artifact_cap_bytes - summary["code_bytes"]
    return {
        "parameters": matrices + small,
        "bits_per_weight": round(8 * (room - 2 * small) / matrices, 4),
        "operations_per_step": round(operations(config) * config.train_batch_tokens),
        "artifact_bytes": summary["artifact_bytes"],
        "code_bytes": summary["code_bytes"],
        "total_bytes": summary["total_bytes"],
        "eval_passes": round(summary["eval_passes"], 3),
        "val_bpb": summary["val_bpb"],
    }


def main() -> None:
    """Print what the stages say, the table and the RESULT line; exit status 1 if a probe fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="training steps, half of them with loops")
    parser.add_argument("--work", type=Path, help="folder for data and run (a temporary one)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    options = parser.parse_args()
    recipe = read_recipe(RECIPE)
    changes = SMALLER | {"ITERATIONS": str(options.steps)}
    changes |= dict(setting.split("=", 1) for setting in options.set)
    print("changed: " + " ".join(f"{name}={value}" for name, value in changes.items()), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_dataset(folder / "data", int(recipe["VOCAB_SIZE"]))
        summary = run_recipe(folder, recipe | changes)
        broken, slow = check_compliance(folder / "runs" / "full")
        figures = describe(recipe, summary)
    print("longer than on eight H100, as expected: " + (", ".join(slow) or "nothing"))
    print("broken: " + (", ".join(broken) or "nothing"))
    for name, value in figures.items():
        print(f"{name:<22}{value:,}")
    print("RESULT " + json.dumps({**figures, "broken": broken, "slow": slow}))
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
