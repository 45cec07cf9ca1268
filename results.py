"""What run folders hold and what several of them say together: shared by the tools that read them.

`is_locked` and `show` are twins of the trainer's: the trainer imports nothing of the repository, and
importing the trainer here would load torch for seconds.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PLACES = ("DATA_DIR", "DATASETS_DIR", "TOKENIZER_PATH")  # where things lie, not what they are
NAMES = ("RUN_ID", "OUT_DIR", "STAGE", "ARTIFACT", "data")


class Stop(SystemExit):
    """A one-line error for the user: the file or variable, its value and the remedy. Exit status 1."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; Stop if there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise Stop(f"{path}: no such file; finish the run, or give another folder") from None
    except (OSError, ValueError) as error:
        raise Stop(f"{path}: cannot be read ({error}); copy it again, or repeat the run") from None
    if not isinstance(content, dict):
        raise Stop(f"{path}: not a JSON object; copy it again, or repeat the run")
    return content


def write_atomically(path: Path, text: str) -> None:
    """Replace the file so that a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise Stop(
            f"{path}: cannot be written ({error.strerror}); free disk space or choose another folder"
        ) from None


def is_locked(folder: Path) -> bool:
    """Whether a living process writes to the folder (the trainer, or a sweep)."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def show(value: Any) -> str:
    """A setting's value as the trainer reads it from the environment."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def step_of(record: Mapping[str, Any], before: int = 0) -> int:
    """The step of a record of metrics.jsonl: its own, that of a validation in training, or `before`."""
    found = re.fullmatch(r"step(\d+)", record.get("stage", ""))
    return int(found[1]) if found else int(record.get("step", record.get("steps", before)))


@dataclass(frozen=True)
class Run:
    """One run folder that holds a config.json."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The run in `folder`; Stop if it is none."""
        if not folder.is_dir():
            raise Stop(f"{folder}: no such folder; give a run folder, such as runs/NAME")
        return cls(folder, read_json(folder / "config.json"))

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json of the finished run."""
        return read_json(self.folder / "summary.json")

    @property
    def is_finished(self) -> bool:
        """Whether there is a summary.json."""
        return (self.folder / "summary.json").exists()

    @property
    def seed(self) -> Any:
        """The setting SEED."""
        return self.config.get("SEED")

    @property
    def log(self) -> str:
        """The text of train.log."""
        try:
            return (self.folder / "train.log").read_text(errors="replace")
        except OSError as error:
            raise Stop(
                f"{self.folder / 'train.log'}: cannot be read ({error.strerror}); repeat the run"
            ) from None

    @property
    def source(self) -> str:
        """sha256 of the script that the run was last started with, by its log; empty if that has none."""
        found = re.findall(r"source_sha256:([0-9a-f]{64})", self.log)
        return found[-1] if found else ""

    def settings(self, *without: str) -> dict[str, Any]:
        """What decides the result: the configuration without names, places and the settings `without`."""
        return {name: value for name, value in self.config.items() if name not in (*NAMES, *PLACES, *without)}

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl without the steps that a resumption made void and without a line cut by a kill."""
        path = self.folder / "metrics.jsonl"
        kept = []
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise Stop(f"{path}: cannot be read ({error.strerror}); repeat the run") from None
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("kind") == "resume":
                kept = [r for r in kept if step_of(r) <= record["step"]]
            kept.append(record)
        return kept


def lookup(summary: Mapping[str, Any], name: str) -> float:
    """The number called `name` in a summary, as in val_bpb or bpb.sliding; Stop if there is none."""
    value: Any = summary
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        known = [
            *(n for n, v in summary.items() if isinstance(v, int | float)),
            *(f"bpb.{stage}" for stage in summary.get("bpb", {})),
        ]
        raise Stop(f"--metric {name}: summary.json holds no such number; there are: {', '.join(known)}")
    return float(value)


def text_of(value: Any) -> str:
    """A value of a summary in a few words."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text_of(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    return str(value)


def conditions(compliance: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, verdict, evidence) of all that the compliance part of a summary lists."""
    rows = []
    for name, pair in compliance.get("limits", {}).items():
        used, limit = pair
        verdict = "not measured" if used is None else "kept" if used <= limit else "BROKEN"
        rows.append((name, verdict, f"{text_of(used)} of {text_of(limit)}"))
    for name, facts in compliance.items():
        if name in ("legal", "reason", "limits"):
            continue
        parts = facts.items() if isinstance(facts, Mapping) and "holds" not in facts else [("", facts)]
        for part, fact in parts:
            holds = fact.get("holds") if isinstance(fact, Mapping) else fact if isinstance(fact, bool) else ""
            evidence = {k: v for k, v in fact.items() if k != "holds"} if isinstance(fact, Mapping) else fact
            verdict = {True: "holds", False: "BROKEN", None: "not measured"}.get(holds, "")
            rows.append(
                (f"{name} {part}".strip(), verdict, "" if isinstance(fact, bool) else text_of(evidence))
            )
    return rows


class Documents(NamedTuple):
    """Sums per validation document, in dataset order: the final stage's tokens, original bytes and nats."""

    tokens: np.ndarray
    bytes: np.ndarray
    nats: np.ndarray


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of documents.npz, empty if the run wrote none; Stop if it is damaged."""
    path = folder / "documents.npz"
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError) as error:
        raise Stop(f"{path}: cannot be read ({error}); delete it, or score the run again") from None
    if missing := {"tokens", "bytes", "nats"} - arrays.keys():
        raise Stop(f"{path}: holds no {', '.join(sorted(missing))}; delete it, or score the run again")
    return arrays


def read_documents(folder: Path) -> Documents | None:
    """The sums per document of a scored run, None if it wrote none."""
    arrays = read_arrays(folder)
    return Documents(*(arrays[name] for name in Documents._fields)) if arrays else None


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (nan for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def welch(values: Sequence[float], mean: float, std: float, count: int) -> float:
    """One-sided p-value of Welch's test that `values` lie below a sample known by its moments."""
    from scipy import stats

    ours = mean_std(values)
    return float(
        stats.ttest_ind_from_stats(
            *ours, len(values), mean, std, count, equal_var=False, alternative="less"
        ).pvalue
    )


def paired(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """Two-sided p-value of the paired t-test; nan for fewer than two pairs."""
    from scipy import stats

    pairs = np.array([*zip(ours, theirs, strict=True)])
    if len(pairs) < 2:
        return math.nan
    difference = pairs[:, 0] - pairs[:, 1]
    if not difference.any():
        return 1.0
    return float(stats.ttest_1samp(difference, 0.0).pvalue)
