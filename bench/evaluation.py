#!/usr/bin/env python3
"""The mixture of experts (TTT_MODE=mixture) beside recomputed document adapters, on one frozen artifact.

    python bench/evaluation.py runs/NAME [--documents 48] [--dataset FOLDER] [--quick]

The documents are cut from the end of the run's training shards, where constants may be chosen; --dataset
takes the validation documents of a prepared dataset with the same tokenizer instead. Both ways score the same
documents without phases of SGD. The rate of the recomputed adapters is the best of --rates, in hindsight. The
mixture runs once, with an adapter for every rate; what it scores with fewer experts is mixed again from the
recorded losses, which is the same as long as no expert learns from the mixture. Differences are paired by
document, with their standard error; seconds are processor time. --quick: a tiny model is trained first.
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
import functools
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import train_gpt as t

SHORTEST, LONGEST = 64, 4096  # tokens of a document
QUICK = {
    "DATASETS_DIR": "data/demo",
    "VOCAB_SIZE": "1024",
    "MODEL_DIM": "64",
    "NUM_LAYERS": "4",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "ITERATIONS": "30",
    "TTT_ENABLED": "0",
    "SLIDING_WINDOW_ENABLED": "0",
    "EVAL_PREQUANT": "0",
    "TRELLIS_STATES": "0",
    "GPTQ_CALIBRATION_BATCHES": "8",
    "ARTIFACT_TARGET_BYTES": "0",
    "TTT_LORA_RANK": "8",
    "TTT_EVAL_SEQ_LEN": "128",
}


class Subject:
    """The weights of a run's artifact, and documents one behind the other with the bytes of each."""

    def __init__(self, folder: Path, dataset: Path | None, count: int, changes: dict[str, str]):
        settings = json.loads((folder / "config.json").read_text())
        known = set(t.Config.variables())
        settings = {name: t.format_value(value) for name, value in settings.items() if name in known}
        fixed = {"STAGE": "evaluate", "TTT_ENABLED": "1", "PHASED_TTT_NUM_PHASES": "0"}
        self.config = t.Config.from_env(settings | fixed | changes)
        manifest, tensors, _ = t.decode_artifact(folder / "final_model.ptz")
        self.model = t.GPT(self.config)
        self.model.load_state_dict(t.assemble_weights(self.model.table, tensors))
        self.model.looped = manifest["looped"]
        if dataset:
            self.config = dataclasses.replace(self.config, datasets_dir=str(dataset))
        text, sizes = self.read(dataset is not None)
        documents = t.find_documents(text)
        lengths = documents[:, 1] - documents[:, 0]
        fit = documents[(lengths >= SHORTEST) & (lengths <= LONGEST)]
        if dataset:
            fit = fit[np.sort(np.random.default_rng(0).permutation(len(fit))[:count])]
        else:
            fit = fit[-count:]
        # The last target of a document is the first token of the next, so each keeps its own.
        pieces = [text[first : end - 1] for first, end in fit]
        self.tokens = np.append(np.concatenate(pieces), t.BOS).astype("<u2")
        weights = [sizes[first : end - 1] for first, end in fit]
        self.validation = t.Validation(self.tokens, np.append(np.concatenate(weights), 0), "bench")
        self.documents = t.find_documents(self.tokens)
        self.bytes = float(np.concatenate(weights).sum())

    def read(self, validation: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and bytes; of training tokens the mean, as shards of training have no sidecar."""
        data = t.Dataset(self.config, need_training=not validation)
        self.canonical = t.Canonical(data.tokenizer) if self.config.canonical_mask else None
        if validation:
            found = t.load_validation(data)
            return found.tokens, found.bytes.astype(float)
        mean = data.manifest.get("val_bytes", 1) / data.manifest.get("val_tokens", 1)
        text = np.asarray(data.train[-1][-2_000_000:])
        return text, np.full(len(text), mean)

    def sums(self, losses: np.ndarray) -> np.ndarray:
        """Nats by document."""
        return np.add.reduceat(losses[1:], self.documents[:, 0])


class Outcome(NamedTuple):
    """Nats by document, processor seconds, tokens run per target, shapes of forwards."""

    nats: np.ndarray
    seconds: float
    passes: float
    shapes: int


class Seen(NamedTuple):
    """What a mixer was told: its name, and its arguments."""

    what: str
    arguments: tuple


@contextmanager
def recorded(seen: list[Seen]) -> Iterator[None]:
    """Every call of a Mixer's methods, in order."""

    def wrapped(what: str, method: Callable) -> Callable:
        def call(mixer: t.Mixer, *arguments: Any) -> Any:
            seen.append(Seen(what, arguments))
            return method(mixer, *arguments)

        return call

    methods = {name: wrapped(name, getattr(t.Mixer, name)) for name in ("open", "mix", "close")}
    with patch.multiple(t.Mixer, **methods):
        yield


def score(subject: Subject, seen: list[Seen] | None = None, early: bool = True, **changes: Any) -> Outcome:
    """The documents with some settings changed; `early` false: all chunks have TTT_CHUNK_SIZE targets."""
    config = dataclasses.replace(subject.config, **changes)
    run = t.Run(config)
    run.canonical = subject.canonical
    shapes = set()
    passes = 0

    def forward(batch: t.Batch, lora: Any = None) -> Tensor:
        nonlocal passes
        cached = 0 if batch.past is None else batch.past.keys[0].size(1)
        shapes.add((*batch.inputs.shape, cached))
        passes += batch.inputs.numel()
        return subject.model(batch, lora=lora)

    tally = t.Tally(run, subject.validation)
    mode = t.score_mixture if config.ttt_mode == "mixture" else t.doc_lora
    stages = t.EARLY_CHUNKS if early else ()
    began = time.process_time()
    with patch.object(t, "EARLY_CHUNKS", stages), recorded([] if seen is None else seen):
        mode(run, subject.model, forward, tally)
    seconds = time.process_time() - began
    tally.total("bench")
    nats = subject.sums(tally.nats.double().numpy())
    return Outcome(nats, seconds, passes / (len(subject.tokens) - 1), len(shapes))


def mix_again(
    subject: Subject, seen: list[Seen], config: t.Config, rates: list[int], sources: str
) -> np.ndarray:
    """Nats by document of a mixture of some of the recorded experts: adapters by number, copies by source."""
    mixer = t.Mixer(config, torch.ones(len(rates), dtype=torch.float64))
    losses = np.zeros(len(subject.tokens))
    allowed = {"none": (0, 0), "document": (1, 0), "all": (1, 1)}[sources]
    for what, arguments in seen:
        if what == "mix":
            log_p, chunk = arguments
            match = chunk.match * torch.tensor(allowed)[:, None, None]
            scores = mixer.mix(log_p[:, :, rates], chunk._replace(match=match))
            losses[chunk.places.numpy()] = -scores.flatten()[chunk.chosen].numpy()
        else:
            getattr(mixer, what)(*arguments)
    return subject.sums(losses)


class Report:
    """Rows of the table: a score, and its paired difference from another."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.tokens = subject.documents[:, 1] - subject.documents[:, 0] - 1

    def bpb(self, nats: np.ndarray) -> float:
        """Bits per byte."""
        return float(nats.sum()) / math.log(2) / self.subject.bytes

    def row(self, name: str, nats: np.ndarray, base: np.ndarray, more: str = "") -> float:
        """Print one row; its difference from `base` in bits per byte."""
        difference = (nats - base) / math.log(2)
        mean = difference.sum() / self.tokens.sum()
        error = math.sqrt(np.square(difference - mean * self.tokens).sum()) / self.subject.bytes
        change = self.bpb(nats) - self.bpb(base)
        print(f"{name:<58}{self.bpb(nats):9.5f} {change:+9.5f} ± {error:.5f}  {more}", flush=True)
        return change


def describe(outcome: Outcome, base: Outcome) -> str:
    """Cost of an outcome beside another's."""
    share = outcome.seconds / base.seconds
    passes = f"{outcome.passes:6.2f} tokens run per target"
    return f"{passes}, {outcome.seconds:7.1f} s (x{share:.2f}), {outcome.shapes} shapes"


def compare(subject: Subject, rates: list[float], only_mixture: bool) -> dict[str, Any]:
    """All rows; the figures of RESULT."""
    config = subject.config
    report = Report(subject)
    print(
        f"{len(subject.documents)} documents, {len(subject.tokens) - 1} targets; differences in bits per byte"
    )
    text = ",".join(f"{rate:g}" for rate in [0.0, *rates])
    seen: list[Seen] = []
    mixture = functools.partial(score, subject, ttt_mode="mixture")
    with patch.object(t, "FARTHEST_SHIFT", 0.0):  # each row keeps its rate
        mixture(seen, ttt_mixture_rates=text, ttt_mixture_copies="all")
    mixed = functools.partial(mix_again, subject, seen, config)
    everyone = list(range(len(rates) + 1))
    none = mixed([0], "none")
    report.row("no adaptation, cached", none, none)
    for place in everyone[1:]:
        report.row(f"adapters at {rates[place - 1]:g} x rate, cached", mixed([place], "none"), none)
    singles = [mixed([place], "none").sum() for place in everyone]
    adapters = mixed(everyone, "none")
    report.row("mixture of the adapters", adapters, none)
    best = int(np.argmin(singles))
    experts = {
        "mixture of rates against the best of them": report.bpb(adapters) - report.bpb(mixed([best], "none"))
    }
    for place in everyone:
        rest = [other for other in everyone if other != place]
        name = "no adaptation" if place == 0 else f"rate {rates[place - 1]:g}"
        experts[name] = report.bpb(adapters) - report.bpb(mixed(rest, "none"))
    with_document = mixed(everyone, "document")
    with_all = mixed(everyone, "all")
    report.row("mixture of the adapters, copies from the document", with_document, none)
    report.row("mixture of the adapters, copies from all", with_all, none)
    report.row("no adaptation, copies from all", mixed([0], "all"), none)
    experts["copies from the document"] = report.bpb(with_document) - report.bpb(adapters)
    experts["copies from documents before"] = report.bpb(with_all) - report.bpb(with_document)
    for name, value in experts.items():
        print(f"  contribution of {name}: {value:+.5f}")
    result: dict[str, Any] = {"experts": {name: round(value, 6) for name, value in experts.items()}}
    return result if only_mixture else result | against_recomputed(subject, report, none, rates, mixture)


def against_recomputed(
    subject: Subject, report: Report, none: np.ndarray, rates: list[float], mixture: Callable[..., Outcome]
) -> dict[str, Any]:
    """The rows that compare with recomputed windows; the other figures of RESULT."""
    rate = subject.config.ttt_lora_lr
    recomputed = {}
    for multiple in rates:
        recomputed[multiple] = score(subject, ttt_mode="doc_lora", ttt_lora_lr=rate * multiple)
        outcome = recomputed[multiple]
        report.row(f"recomputed windows, {multiple:g} x rate", outcome.nats, none, describe(outcome, outcome))
    tuned = min(rates, key=lambda multiple: recomputed[multiple].nats.sum())
    base = recomputed[tuned]
    still = score(subject, ttt_mode="doc_lora", ttt_lora_lr=0.0)
    gain = report.bpb(still.nats) - report.bpb(base.nats)
    print(f"best rate of the recomputed adapters: {tuned:g} x {rate:g}, gain {gain:.5f}")
    equal = mixture(None, False, ttt_mixture_rates=f"{tuned:g}", ttt_mixture_copies="none")
    report.row("cached at the same settings", equal.nats, base.nats, describe(equal, base))
    ours = mixture()
    gained = -report.row("mixture with its own settings", ours.nats, none, describe(ours, base))
    report.row("the same against recomputed windows", ours.nats, base.nats)
    missed = [mixture(ttt_lora_lr=rate * factor).nats for factor in (1 / 8, 8)]
    for factor, nats in zip(("1/8", "8"), missed, strict=True):
        report.row(f"the same with the rate x {factor}", nats, none)
    worst = max(report.bpb(nats) for nats in missed) - report.bpb(ours.nats)
    return {
        "gain_ratio": round(gained / gain, 4),
        "time_ratio": round(ours.seconds / base.seconds, 4),
        "cached_gain_share": round((report.bpb(none) - report.bpb(equal.nats)) / gain, 4),
        "cached_time_ratio": round(equal.seconds / base.seconds, 4),
        "misset_share": round(worst / gained, 4),
        "graphs": ours.shapes,
    }


def train_tiny(folder: Path) -> Path:
    """A run folder with the artifact of half a minute."""
    subprocess.run([sys.executable, str(ROOT / "data" / "demo.py"), "--vocab-size", "1024"], check=True)
    recipe = (ROOT / "records" / "recipes" / "cpu_demo.env").read_text()
    settings = dict(line.split("=", 1) for line in recipe.splitlines() if line[:1].isalpha())
    places = {"OUT_DIR": str(folder), "RUN_ID": "tiny", "DATASETS_DIR": str(ROOT / "data" / "demo")}
    variables = os.environ | settings | QUICK | places
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=variables, check=True, cwd=ROOT)
    return folder / "tiny"


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="run folder with final_model.ptz")
    parser.add_argument("--dataset", type=Path, help="score the validation documents of this dataset")
    parser.add_argument("--documents", type=int, default=48, help="how many documents")
    parser.add_argument("--rates", default="1,3,9,27", help="multiples of TTT_LORA_LR that are tried")
    parser.add_argument("--only-mixture", action="store_true", help="do not run recomputed windows")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument("--quick", action="store_true", help="train a tiny model; few documents and rates")
    options = parser.parse_args()
    changes = dict(setting.split("=", 1) for setting in options.set)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options.run = train_tiny(Path(folder))
            options.documents, options.rates = 8, "3,27"
            changes = QUICK | {"TTT_BATCH_SIZE": "4", "TTT_ENABLED": "1"} | changes
            changes["DATASETS_DIR"] = str(ROOT / "data" / "demo")
        if options.run is None or not (options.run / "final_model.ptz").exists():
            parser.error(f"run {options.run}: no final_model.ptz there; give a finished run, or --quick")
        subject = Subject(options.run, options.dataset, options.documents, changes)
        rates = [float(rate) for rate in options.rates.split(",")]
        result = compare(subject, rates, options.only_mixture)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
