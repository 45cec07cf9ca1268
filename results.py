"""What run folders hold and what several of them say together: shared by the tools that read them.

`is_locked` and `show` are twins of the trainer's: the trainer imports nothing of the repository, and
importing the trainer here would load torch for seconds.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import environment

ROOT = Path(__file__).resolve().parent
PLACES = ("DATA_DIR", "DATASETS_DIR", "TOKENIZER_PATH")  # where things lie, not what they are
NAMES = ("RUN_ID", "OUT_DIR", "STAGE", "ARTIFACT", "data", "training_data")


class Stop(SystemExit):
    """A one-line error for the user: the file or variable, its value and the remedy. Exit status 1."""


def run_tool(main: Callable[[list[str]], int | None]) -> None:
    """Run a tool's `main` on the command line; what stops it from outside is one line, no traceback."""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise Stop("interrupted; the same command starts again or goes on") from None
    except BrokenPipeError:  # the reader, such as head, has seen enough
        drop_output()
        raise SystemExit(1) from None
    except OSError as error:
        if not error.filename:
            drop_output()
        raise Stop(
            f"{error.filename or 'standard output'}: {error.strerror or error}; make room or permit it, "
            "and run the command again"
        ) from None
    raise SystemExit(status or 0)


def drop_output() -> None:
    """Send what standard output still holds nowhere: Python would complain about it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number that fp64 can hold."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )


def is_count(value: Any) -> bool:
    """Whether a value read from JSON is a whole number from 0 to 2^63."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; Stop if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Stop(f"{path}: no such file; finish the run, or give another folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Stop(f"{path}: cannot be read ({error}); copy it again, or repeat the run") from None
    if not isinstance(content, dict):
        raise Stop(f"{path}: not a JSON object; copy it again, or repeat the run")
    return content


def write_atomically(path: Path, content: str | bytes, lasting: bool = True) -> None:
    """Replace the file so that a kill at any moment leaves the old one or the new one.

    If it is `lasting`, so does a machine that goes down: file systems may keep the name without the content.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w" if isinstance(content, str) else "wb") as file:
            file.write(content)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Stop(
            f"{path}: cannot be written ({error.strerror}); free disk space or choose another folder"
        ) from None


def is_locked(folder: Path) -> bool:
    """Whether a living process writes to the folder (the trainer, or a sweep); False if nobody can know."""
    try:
        with open(folder / ".lock") as lock:
            environment.lock_file(lock)
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
    found = re.fullmatch(r"step(\d{1,18})", record.get("stage", ""))
    return int(found[1]) if found else record.get("step", record.get("steps", before))


# What a record of metrics.jsonl must have, by its kind, and what its fields are, by their names.
NEEDED = {"resume": ("step",), "score": ("stage",), "ledger": ("event", "time")}
TEXTS = ("kind", "stage", "event", "sha256")
COUNTS = ("step", "steps")
NUMBERS = ("time", "clock", "seconds", "train_loss", "rate", "step_ms", "speed", "val_loss", "val_bpb")


def parse_record(line: str | bytes) -> dict[str, Any]:
    """The record in a line of metrics.jsonl; ValueError says in a few words what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("not an object")
    needed = ("kind", *NEEDED.get(str(record.get("kind")), ()))
    if "train_loss" in record:
        needed += ("step", "rate")
    if missing := [name for name in needed if name not in record]:
        raise ValueError(f"has no {', '.join(missing)}")
    for names, holds in (
        (TEXTS, lambda value: isinstance(value, str)),
        (COUNTS, is_count),
        (NUMBERS, is_number),
    ):
        for name in names:
            if name in record and not holds(record[name]):
                raise ValueError(f"{name} is {ascii(record[name])[:40]}")
    return record


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"warning: {text}", file=sys.stderr)


# What the tools read of summary.json, and of config.json where it must be a number.
SUMMARY_OBJECTS = ("bpb", "overrides", "versions", "data", "compliance")
SUMMARY_NUMBERS = (
    *("val_bpb", "val_loss", "val_tokens", "val_bytes", "step_ms", "tokens_per_second", "peak_memory_mib"),
    *("train_seconds", "eval_seconds", "budgeted_seconds", "hessian_seconds", "gptq_seconds", "pack_seconds"),
)
SUMMARY_POSITIVE = ("val_bpb", "val_loss", "val_tokens", "val_bytes")
SUMMARY_COUNTS = ("artifact_bytes", "code_bytes", "total_bytes", "steps", "world_size")
CONFIG_NUMBERS = (
    *("ARTIFACT_CAP_BYTES", "MAX_WALLCLOCK_SECONDS", "EVAL_BUDGET_SECONDS"),
    *("NUM_LOOPS", "WD_TAPER_START_FRAC"),
)


def check_fields(path: Path, content: Mapping[str, Any], names: Iterable[str], holds: Any, what: str) -> None:
    """Stop unless each of the names that an object has, null aside, is `what` by the predicate `holds`."""
    for name in names:
        if content.get(name) is not None and not holds(content[name]):
            raise Stop(
                f"{path}: {name} is {ascii(content[name])[:60]}, not {what}; copy the file again, "
                "or repeat the run"
            )


def check_present(path: Path, content: Mapping[str, Any], names: Iterable[str], remedy: str) -> None:
    """Stop at the first name that an object lacks or has as null; `part.name` is one inside another."""
    for name in names:
        value: Any = content
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise Stop(f"{path}: has no {name}; {remedy}")


def without_nulls(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object without the fields that are null: what is not there and what is not known are one thing."""
    return {name: value for name, value in content.items() if value is not None}


def check_summary(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a summary that are not null; Stop if one that the tools read is of another kind."""
    summary = without_nulls(content)
    is_object = lambda value: isinstance(value, dict)
    is_text = lambda value: isinstance(value, str)
    is_plain = lambda value: isinstance(value, str | int | float)
    check_fields(path, summary, SUMMARY_OBJECTS, is_object, "an object")
    check_fields(path, summary, ("bpb",), bool, "an object with the score of each stage")
    check_fields(path, summary, SUMMARY_NUMBERS, is_number, "a finite number")
    check_fields(path, summary, SUMMARY_POSITIVE, lambda value: value > 0, "above 0")
    check_fields(path, summary, SUMMARY_COUNTS, is_count, "a whole number of at least 0")
    check_fields(path, summary, ("seed",), lambda value: type(value) is int, "a whole number")
    check_fields(path, summary, ("artifact_sha256",), is_text, "text")
    scores = summary.get("bpb", {})
    if None in scores.values():
        raise Stop(f"{path}: bpb has a stage without a score; score the run again with STAGE=evaluate")
    check_fields(path, scores, scores, is_number, "a finite number")
    for name in ("overrides", "versions", "data", "compliance"):
        summary[name] = without_nulls(summary.get(name, {}))
    check_fields(path, summary["overrides"], summary["overrides"], is_plain, "a plain value")
    check_fields(path, summary["versions"], summary["versions"], is_text, "text")
    check_fields(path, summary["data"], summary["data"], is_plain, "a plain value")
    check_fields(path, summary["data"], ("tokenizer", "shards"), is_text, "text")
    check_fields(path, summary["compliance"], ("limits",), is_object, "an object")
    limits = without_nulls(summary["compliance"].get("limits", {}))
    check_fields(path, limits, limits, is_limit, "what was used and its limit")
    summary["compliance"]["limits"] = limits
    return summary


def is_limit(pair: Any) -> bool:
    """Whether a value is a pair of what was used, null if it was not measured, and a limit."""
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    used, limit = pair
    return (used is None or is_number(used)) and is_number(limit)


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
        path = folder / "config.json"
        config = read_json(path)
        is_setting = lambda value: isinstance(value, str | int | float)
        check_fields(path, config, config, is_setting, "a setting's value")
        check_fields(path, config, CONFIG_NUMBERS, is_number, "a finite number")
        return cls(folder, config)

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json of the finished run."""
        path = self.folder / "summary.json"
        return check_summary(path, read_json(path))

    @property
    def is_finished(self) -> bool:
        """Whether there is a summary.json."""
        return (self.folder / "summary.json").exists()

    def setting(self, name: str) -> Any:
        """The value of a setting; Stop if config.json lacks it."""
        if name not in self.config:
            raise Stop(f"{self.folder / 'config.json'}: has no {name}; copy it again, or repeat the run")
        return self.config[name]

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

    def stages(self) -> dict[str, dict[str, Any]]:
        """What each stage has left in stages.json; empty if there is none."""
        path = self.folder / "stages.json"
        found = without_nulls(read_json(path)) if path.exists() else {}
        check_fields(path, found, found, lambda value: isinstance(value, dict), "an object")
        return found

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl without steps that a resumption made void; damaged lines are named and skipped."""
        path = self.folder / "metrics.jsonl"
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise Stop(f"{path}: cannot be read ({error.strerror}); repeat the run") from None
        kept: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                record = parse_record(line)
            except ValueError as error:
                warn(f"{path}:{number}: {error}; the line is skipped")
                continue
            if record["kind"] == "resume":
                kept = [earlier for earlier in kept if step_of(earlier) <= record["step"]]
            kept.append(record)
        return kept


def read_plan(folder: Path) -> dict[str, Any]:
    """sweep.json of a sweep folder, with the settings of every planned run; Stop if it is damaged."""
    path = folder / "sweep.json"
    plan = read_json(path)
    runs = plan.get("runs")
    whole = isinstance(runs, dict) and all(
        isinstance(settings, dict)
        and all(isinstance(value, str) for value in settings.values())
        and Path(name).name == name
        for name, settings in runs.items()
    )
    if not whole:
        raise Stop(f"{path}: has no plan of runs; copy it again, or start the sweep under another --name")
    return plan


def place_of(path: str | Path) -> Path:
    """Where a recorded path lies: as seen from the current folder or, if not there, from the repository."""
    here = Path(path)
    return here if here.is_absolute() or here.exists() else ROOT / here


def lookup(summary: Mapping[str, Any], name: str) -> float:
    """The number called `name` in a summary, as in val_bpb or bpb.sliding; Stop if there is none."""
    value: Any = summary
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not is_number(value):
        known = [
            *(n for n, v in summary.items() if is_number(v)),
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


def place_of_data(run: Run) -> Path:
    """The folder of a run's shards."""
    given = run.setting("DATASETS_DIR")
    return place_of(given or f"{run.setting('DATA_DIR')}/datasets/fineweb10B_sp{run.setting('VOCAB_SIZE')}")


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
            evidence = {k: v for k, v in fact.items() if k != "holds"} if isinstance(fact, Mapping) else fact
            shown = "" if isinstance(fact, bool) else text_of(evidence)
            rows.append((f"{name} {part}".strip(), verdict_of(fact), shown))
    return rows


def verdict_of(fact: Any) -> str:
    """What a recorded condition says: holds, BROKEN, not measured, or nothing."""
    if isinstance(fact, Mapping) and fact.get("holds") is None:
        return "not measured"
    holds = fact["holds"] if isinstance(fact, Mapping) else fact
    if not isinstance(holds, bool):
        return ""
    return "holds" if holds else "BROKEN"


class Documents(NamedTuple):
    """Sums per validation document, in dataset order: the final stage's tokens, original bytes and nats."""

    tokens: np.ndarray
    bytes: np.ndarray
    nats: np.ndarray


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of documents.npz, empty if the run wrote none; Stop if it is damaged."""
    path = folder / "documents.npz"
    remedy = "delete it, or score the run again"
    if not path.exists():
        return {}
    damage = (OSError, ValueError, EOFError, KeyError, MemoryError, NotImplementedError, SyntaxError)
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (*damage, zipfile.BadZipFile, zlib.error) as error:
        raise Stop(f"{path}: cannot be read ({error}); {remedy}") from None
    for first, others in (
        ("tokens", ("bytes", "nats")),
        ("position_start", ("position_bytes", "position_nats")),
    ):
        names = (first, *others)
        missing = [name for name in names if name not in arrays]
        if missing == list(names) and first != "tokens":
            continue
        if missing:
            raise Stop(f"{path}: holds no {', '.join(missing)}; {remedy}")
        for name in names:
            array = arrays[name]
            if array.ndim != 1 or len(array) != len(arrays[first]) or array.dtype.kind not in "iuf":
                raise Stop(f"{path}: {name} is no list of numbers as long as {first}; {remedy}")
            if not np.isfinite(array).all():
                raise Stop(f"{path}: {name} holds what is no finite number; {remedy}")
    return arrays


def read_documents(folder: Path) -> Documents | None:
    """The sums per document of a scored run, None if it wrote none."""
    arrays = read_arrays(folder)
    return Documents(*(arrays[name] for name in Documents._fields)) if arrays else None


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (nan for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for one value)."""
    mean, std = mean_std(values)
    return mean, std / math.sqrt(len(values))


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
