"""Run folders for the tests of what reads them: one tiny real run, and copies with another score."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from helpers.shared import made_once
from helpers.trainer import launch, tiny_settings


def original(dataset: Path, quantizer: str = "rate_distortion") -> Path:
    """The folder of one finished run with plain and sliding scores; made once, not to be changed.

    The artifact of sdclip is read without compiled loops, which a process without a cache compiles for 6 s.
    """

    def make(out: Path) -> None:
        chosen = {"RUN_ID": "original", "SEED": "1", "VAL_LOSS_EVERY": "4", "TTT_ENABLED": "0"}
        result = launch(tiny_settings(dataset, out) | chosen | {"QUANTIZER": quantizer})
        assert result.returncode == 0, result.stderr

    return made_once(f"runs_{quantizer}", make) / "original"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the JSON object in a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1))


def copy_run(source: Path, folder: Path, seed: int, factor: float = 1.0) -> Path:
    """A copy of a run with another seed and `factor` times its score in every file that records it."""
    shutil.copytree(source, folder)
    before = json.loads((folder / "summary.json").read_text())
    score = {name: before[name] * factor for name in ("val_bpb", "val_loss")}

    def scaled(facts: dict[str, Any]) -> None:
        facts.update(score, bpb={stage: bpb * factor for stage, bpb in facts["bpb"].items()})

    def summarised(facts: dict[str, Any]) -> None:
        scaled(facts)
        facts["seed"] = facts["overrides"]["SEED"] = seed
        facts["overrides"]["RUN_ID"] = folder.name

    edit(folder / "config.json", lambda c: c.update(SEED=seed, RUN_ID=folder.name))
    edit(folder / "stages.json", lambda s: scaled(s["evaluate"]))
    edit(folder / "summary.json", summarised)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (final,) = (stage for stage, bpb in before["bpb"].items() if bpb == before["val_bpb"])
    last = [r for r in records if r["kind"] == "score" and r["stage"] == final][-1]
    last.update(score)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if (folder / "documents.npz").exists():
        with np.load(folder / "documents.npz") as arrays:
            content = {name: arrays[name] * (factor if name == "nats" else 1) for name in arrays.files}
        np.savez(folder / "documents.npz", **content)
    log = (folder / "train.log").read_text()
    final = f"final val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}"
    (folder / "train.log").write_text(re.sub(r"^final val_loss:\S+ val_bpb:\S+", final, log, flags=re.M))
    return folder
