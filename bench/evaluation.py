#!/usr/bin/env python3
"""The mixture of experts (TTT_MODE=mixture) beside recomputed document adapters, on one frozen artifact.

    python bench/evaluation.py runs/NAME --dataset FOLDER [--documents 451] [--rates 1,3,9,27] [--quick]

The recomputed adapters have the settings of PR #2135, and the rate of --rates that is the best on --tune
documents cut from the end of the training shards. The documents that are scored are the validation documents
of --dataset, a prepared dataset with the run's tokenizer; without it, training documents before those. The
mixture scores them stream by stream. What learns within a document only is scored in small parts of a
stream's documents, so that the slow ways need not be run on all of them: figures are of the documents that
all ways of a table have scored. Every finished piece of work is kept in --work: the same command goes on
where it was stopped, and --pieces says how many to do before the table is printed. What the mixture scores
with fewer experts is mixed again from the recorded losses. Phases of SGD are off. Differences are paired by
document, with their standard error; seconds are processor time, per target. A stream of the contest has 6,250
documents: with few, --streams 1 or 2 shows better what is handed on from one to the next.

--quick: a tiny model is trained first; few documents.
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
import hashlib
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

SHORTEST, LONGEST = 64, 4096  # tokens of a document; longer ones are cut
LONG = 2048  # tokens of context and of the documents that the time with long contexts is measured on
PART = 8  # documents of a piece of work where documents are on their own
MISSET = {"low": 1 / 8, "high": 8}  # multiples of the mixture's rates
PLACES = {
    "stage",
    "out_dir",
    "run_id",
    "datasets_dir",
    "data_dir",
    "tokenizer_path",
}  # settings that only say where
PUBLISHED = {  # of PR #2135, but for the phases
    "ttt_mode": "doc_lora",
    "ttt_batch_size": 1,  # side by side they would be padded to the longest
    "ttt_lora_rank": 80,
    "ttt_chunk_size": 48,
    "ttt_k_lora": False,
    "ttt_weight_decay": 2.0,
    "ttt_warm_start_a": True,
}
QUICK = {
    "VOCAB_SIZE": "512",
    "MODEL_DIM": "64",
    "NUM_LAYERS": "4",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "ITERATIONS": "60",
    "TTT_ENABLED": "0",
    "SLIDING_WINDOW_ENABLED": "0",
    "EVAL_PREQUANT": "0",
    "TRELLIS_STATES": "0",
    "GPTQ_CALIBRATION_BATCHES": "8",
    "ARTIFACT_TARGET_BYTES": "0",
    "TTT_EVAL_SEQ_LEN": "128",
}


class Frozen:
    """The weights of a run's artifact."""

    def __init__(self, folder: Path, changes: dict[str, str]):
        settings = json.loads((folder / "config.json").read_text())
        # How the run was evaluated is no part of its artifact: all ways start from the defaults.
        known = {name for name in t.Config.variables() if "TTT" not in name}
        settings = {name: t.format_value(value) for name, value in settings.items() if name in known}
        fixed = {"STAGE": "evaluate", "TTT_ENABLED": "1", "PHASED_TTT_NUM_PHASES": "0", "TTT_BATCH_SIZE": "4"}
        self.config = t.Config.from_env(settings | fixed | changes)
        manifest, tensors, self.digest = t.decode_artifact(folder / "final_model.ptz")
        self.model = t.GPT(self.config, dtype=t.choose_dtype(self.config, False))
        self.model.load_state_dict(t.assemble_weights(self.model.table, tensors))
        self.model.looped = manifest["looped"]
        self.model.requires_grad_(False)


class Text:
    """Documents one behind the other, with the bytes of each; `canonical` is the mask of scores, if any."""

    canonical: t.Canonical | None = None

    def __init__(self, pieces: list[np.ndarray], sizes: list[np.ndarray]):
        self.tokens = np.append(np.concatenate(pieces), t.BOS).astype("<u2")
        bytes_of = np.append(np.concatenate(sizes), 0)
        self.validation = t.Validation(self.tokens, bytes_of, "bench")
        documents = t.find_documents(self.tokens)
        self.targets = documents[:, 1] - documents[:, 0] - 1
        self.bytes = np.add.reduceat(bytes_of[1:].astype(float), documents[:, 0])
        self.documents = documents
        # Longest first, as schedule_documents has them, and the streams that they are dealt to.
        self.order = np.argsort(-self.targets, kind="stable")
        numbers = {tuple(document): number for number, document in enumerate(documents)}
        dealt = t.deal_documents(documents[self.order])
        self.streams = [[numbers[tuple(document)] for document in stream] for stream in dealt]

    @property
    def digest(self) -> str:
        """Names the text."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def read_text(
    config: t.Config, dataset: Path | None, keep: Callable[[np.ndarray], np.ndarray], longest: int = LONGEST
) -> Text:
    """The documents that `keep` chooses by their lengths (N,): of `dataset`, or of the training shards.

    The tokens of training shards have the mean number of bytes, as they have no sidecar.
    """
    folder = str(dataset) if dataset else config.datasets_dir
    data = t.Dataset(dataclasses.replace(config, datasets_dir=folder), need_training=not dataset)
    if dataset:
        found = t.load_validation(data)
        tokens, sizes = found.tokens, found.bytes.astype(float)
    else:
        tokens = np.asarray(data.train[-1][-2_000_000:])
        mean = data.manifest.get("val_bytes", 1) / data.manifest.get("val_tokens", 1)
        sizes = np.full(len(tokens), mean)
    documents = t.find_documents(tokens)
    chosen = documents[keep(documents[:, 1] - documents[:, 0])]
    # The last target of a document is the first token of the next, so each keeps its own.
    ends = [(first, min(end - 1, first + longest)) for first, end in chosen]
    text = Text([tokens[first:end] for first, end in ends], [sizes[first:end] for first, end in ends])
    text.canonical = t.Canonical(data.tokenizer) if config.canonical_mask else None
    return text


def choose(count: int, shortest: int = SHORTEST, longest: int = sys.maxsize, last: int = 0) -> Callable:
    """What read_text keeps: `count` documents of the right length at random, or the ones up to the `last`."""

    def keep(lengths: np.ndarray) -> np.ndarray:
        fit = np.flatnonzero((lengths >= shortest) & (lengths <= longest))
        if last:
            return fit[-last : len(fit) - last + count]
        return np.sort(np.random.default_rng(0).permutation(fit)[:count])

    return keep


class Way(NamedTuple):
    """How documents are scored: settings, and whether by whole streams."""

    name: str
    settings: dict[str, Any]
    streams: bool = False


class Piece(NamedTuple):
    """Nats by document, processor seconds, tokens run, shapes of forwards; nats of other mixtures by name."""

    numbers: np.ndarray
    nats: np.ndarray
    seconds: float
    run: int
    shapes: int
    others: dict[str, np.ndarray]


class Seen(NamedTuple):
    """What a mixer was told: the method, and its arguments."""

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

    names = ("take", "open", "mix", "close", "leave")
    with patch.multiple(t.Mixer, **{name: wrapped(name, getattr(t.Mixer, name)) for name in names}):
        yield


def sums(text: Text, losses: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Nats of some documents."""
    return np.add.reduceat(losses[1:].astype(float), text.documents[:, 0])[numbers]


def score(frozen: Frozen, text: Text, way: Way, numbers: np.ndarray, stream: int) -> Piece:
    """Some documents in one way; by streams, those of one."""
    config = dataclasses.replace(frozen.config, **way.settings)
    run = t.Run(config)
    run.canonical = text.canonical
    shapes = set()
    tokens = 0

    def forward(batch: t.Batch, lora: Any = None) -> Tensor:
        nonlocal tokens
        shapes.add((*batch.inputs.shape, 0 if batch.past is None else batch.past.keys[0].size(1)))
        tokens += batch.inputs.numel()
        return frozen.model(batch, lora=lora)

    tally = t.Tally(run, text.validation)
    seen: list[Seen] = []
    began = time.process_time()
    with recorded(seen):
        if way.streams:
            run.streams = range(stream, stream + 1)
            t.Mixture(run, frozen.model, forward, tally).score_phase([text.documents[text.order]], 0, 0)
        elif config.ttt_mode == "mixture":
            with patch.object(t, "STREAMS", 1):
                run.streams = range(1)
                t.Mixture(run, frozen.model, forward, tally).score_phase([text.documents[numbers]], 0, 0)
        else:
            batches = [
                numbers[place : place + config.ttt_batch_size]
                for place in range(0, len(numbers), config.ttt_batch_size)
            ]
            lora = t.LoRA(config, config.ttt_batch_size, run.device)
            t.adapt_phase(run, forward, tally, [text.documents[batch] for batch in batches], 0, 0, lora)
    seconds = time.process_time() - began
    nats = tally.nats.double().numpy()
    inside = np.concatenate([np.arange(*text.documents[number])[1:] for number in numbers])
    if (tally.times.numpy()[inside] != 1).any():
        raise SystemExit(f"{way.name}: a target of stream {stream} was not scored exactly once: a bug")
    others = {}
    if way.streams and way.name == "mixture":
        others = mix_others(text, seen, config, numbers)
    return Piece(numbers, sums(text, nats, numbers), seconds, tokens, len(shapes), others)


def mix_others(text: Text, seen: list[Seen], config: t.Config, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Nats by document of the mixture with some of its experts."""
    rates = config.ttt_mixture_rates.split(",")
    everyone = list(range(len(rates)))
    others = {}
    for place, rate in enumerate(rates):
        rest = [other for other in everyone if other != place]
        others[f"without rate {rate}"] = mix_again(text, seen, config, rest, "all")
        others[f"rate {rate} alone"] = mix_again(text, seen, config, [place], "none")
    for sources in ("none", "document", "history"):
        others[f"copies {sources}"] = mix_again(text, seen, config, everyone, sources)
    return {name: sums(text, losses, numbers) for name, losses in others.items()}


def mix_again(text: Text, seen: list[Seen], config: t.Config, rates: list[int], sources: str) -> np.ndarray:
    """The losses of a mixture of some of the recorded experts: adapters by number, copies by source.

    The rates are those that all experts together found.
    """
    mixer = t.Mixer(config, torch.ones(len(rates), dtype=torch.float64))
    losses = np.zeros(len(text.tokens))
    allowed = {"none": (0, 0), "document": (1, 0), "history": (0, 1), "all": (1, 1)}[sources]
    for what, arguments in seen:
        if what == "mix":
            log_p, chunk = arguments
            match = chunk.match * torch.tensor(allowed)[:, None, None]
            scores = mixer.mix(log_p[:, :, rates], chunk._replace(match=match))
            losses[chunk.places.numpy()] = -scores.flatten()[chunk.chosen].numpy()
        else:
            getattr(mixer, what)(*arguments)
    return losses


class Work:
    """Pieces of work, kept in a folder by what they depend on; `left` of them are still to be done.

    With a `share` (i, n) those whose number leaves i when divided by n: n processes share a folder.
    """

    def __init__(self, frozen: Frozen, folder: Path, left: int, share: tuple[int, int]):
        self.frozen = frozen
        self.folder = folder
        self.left = left
        self.share = share
        self.asked = 0
        folder.mkdir(parents=True, exist_ok=True)

    def piece(self, text: Text, way: Way, stream: int, part: int = 0) -> Piece | None:
        """A piece, from the folder or done now; None where no more is to be done."""
        first, step = self.share
        number = self.asked
        self.asked += 1
        config = dataclasses.replace(self.frozen.config, **way.settings)
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACES}
        facts = [settings, text.digest, self.frozen.digest, PART, t.STREAMS]
        said = json.dumps(facts, default=str)
        name = f"{way.name}-{stream}-{part}-{hashlib.sha256(said.encode()).hexdigest()[:12]}.npz"
        path = self.folder / name
        if path.exists():
            with np.load(path) as kept:
                others = {key[6:]: kept[key] for key in kept if key.startswith("other ")}
                facts = (
                    kept["numbers"],
                    kept["nats"],
                    float(kept["seconds"]),
                    int(kept["run"]),
                    int(kept["shapes"]),
                )
                return Piece(*facts, others)
        if self.left == 0 or number % step != first:
            return None
        self.left -= 1
        numbers = np.array(text.streams[stream], np.int64)
        if not way.streams:
            parts = -(-len(numbers) // PART)
            numbers = numbers[part::parts]
        found = score(self.frozen, text, way, numbers, stream)
        others = {f"other {key}": value for key, value in found.others.items()}
        kept = {key: value for key, value in found._asdict().items() if key != "others"} | others
        t.write_atomically(path, lambda file: np.savez(file, **kept))
        targets = int(text.targets[numbers].sum())
        print(f"  {name}: {len(numbers)} documents, {targets} targets, {found.seconds:.1f} s", flush=True)
        return found


class Result:
    """What one way made of the documents: nats (N,), NaN where it has not scored them, and its cost."""

    def __init__(self, text: Text, pieces: list[Piece]):
        self.nats = np.full(len(text.documents), np.nan)
        self.others: dict[str, np.ndarray] = {}
        for piece in pieces:
            self.nats[piece.numbers] = piece.nats
            for name, nats in piece.others.items():
                self.others.setdefault(name, np.full(len(self.nats), np.nan))[piece.numbers] = nats
        targets = max(1, text.targets[np.isfinite(self.nats)].sum())
        self.seconds = sum(piece.seconds for piece in pieces) / targets
        self.passes = sum(piece.run for piece in pieces) / targets
        self.shapes = max((piece.shapes for piece in pieces), default=0)


def turns_of(text: Text, ways: list[Way]) -> Iterator[tuple[Way, int, int]]:
    """(way, stream, part) of every piece of all ways, in the order in which they are done.

    Of a stream first its own ways and one part of the others, so that early figures are of all; the mis-set
    rates of all streams but the first come last.
    """
    main = [way for way in ways if way.name not in MISSET]
    missed = [way for way in ways if way.name in MISSET]
    streams = [stream for stream, numbers in enumerate(text.streams) if numbers]
    for stream in streams:
        for way in main if stream else ways:
            yield way, stream, 0
        parts = -(-len(text.streams[stream]) // PART)
        for part in range(1, parts):
            for way in main:
                if not way.streams:
                    yield way, stream, part
    for stream in streams[1:]:
        for way in missed:
            yield way, stream, 0


def do_work(work: Work, text: Text, ways: list[Way]) -> dict[str, Result]:
    """All pieces of all ways, as far as work is to be done."""
    done: dict[str, list[Piece]] = {way.name: [] for way in ways}
    for way, stream, part in turns_of(text, ways):
        piece = work.piece(text, way, stream, part)
        if piece is not None:
            done[way.name].append(piece)
    return {name: Result(text, pieces) for name, pieces in done.items()}


class Report:
    """Rows of the table, about the documents that all of some results have scored."""

    def __init__(self, text: Text, nats: list[np.ndarray]):
        self.text = text
        self.shared = np.isfinite(nats).all(0)
        self.bytes = text.bytes[self.shared].sum()

    def count(self) -> str:
        """How much the rows are of."""
        targets = int(self.text.targets[self.shared].sum())
        return f"{int(self.shared.sum())} documents that all these ways have scored, {targets} targets"

    def bpb(self, nats: np.ndarray) -> float:
        """Bits per byte."""
        return float(nats[self.shared].sum()) / math.log(2) / self.bytes

    def row(self, name: str, nats: np.ndarray, base: np.ndarray, more: str = "") -> float:
        """Print one row; its difference from `base` in bits per byte."""
        targets = self.text.targets[self.shared]
        difference = (nats - base)[self.shared] / math.log(2)
        mean = difference.sum() / targets.sum()
        error = math.sqrt(np.square(difference - mean * targets).sum()) / self.bytes
        change = self.bpb(nats) - self.bpb(base)
        print(f"{name:<58}{self.bpb(nats):9.5f} {change:+9.5f} ± {error:.5f}  {more}", flush=True)
        return change


def describe(result: Result, base: Result) -> str:
    """Cost of a result beside another's."""
    share = result.seconds / base.seconds
    return f"{result.passes:6.2f} tokens run and {1000 * result.seconds:7.2f} ms per target (x{share:.3f})"


def tuned_rate(work: Work, text: Text, rates: list[float]) -> float:
    """The multiple of TTT_LORA_LR at which recomputed adapters are the best on training documents."""
    rate = work.frozen.config.ttt_lora_lr
    totals = {}
    for multiple in rates:
        way = Way(f"tune{multiple:g}", PUBLISHED | {"ttt_lora_lr": rate * multiple})
        pieces = [work.piece(text, way, stream) for stream, numbers in enumerate(text.streams) if numbers]
        if None in pieces:
            raise SystemExit(
                "the rate of the recomputed adapters is not known: more --pieces, or the other --share"
            )
        totals[multiple] = sum(piece.nats.sum() for piece in pieces)
        bpb = totals[multiple] / math.log(2) / text.bytes.sum()
        print(
            f"recomputed windows on {len(text.documents)} training documents, {multiple:g} x rate: {bpb:.5f}"
        )
    return min(totals, key=totals.get)


def ways_to_score(config: t.Config, multiple: float) -> list[Way]:
    """Every row of the table."""
    rate = config.ttt_lora_lr
    alone = {
        "ttt_mode": "mixture",
        "ttt_batch_size": 2,
        "ttt_mixture_copies": "none",
        "ttt_mixture_carry": 0.0,
    }
    same = (
        PUBLISHED | alone | {"ttt_mixture_rank": 80, "ttt_mixture_chunk": 48, "ttt_lora_lr": rate * multiple}
    )
    mixture = {"ttt_mode": "mixture"}
    return [
        Way("mixture", mixture, streams=True),
        Way("none", alone | {"ttt_mixture_rates": "0"}),
        Way("recomputed", PUBLISHED | {"ttt_lora_lr": rate * multiple}),
        Way("cached", same | {"ttt_mixture_rates": "1"}),
        *(
            Way(name, mixture | {"ttt_lora_lr": rate * factor}, streams=True)
            for name, factor in MISSET.items()
        ),
    ]


def compare(text: Text, results: dict[str, Result]) -> dict[str, Any]:
    """Print the table; the figures of RESULT."""
    main = [result.nats for name, result in results.items() if name not in MISSET]
    report = Report(text, main)
    if not report.shared.any():
        return {"documents": 0}
    print(f"{report.count()}; differences in bits per byte")
    none, base, ours = (results[name] for name in ("none", "recomputed", "mixture"))
    report.row("no adaptation", none.nats, none.nats, describe(none, base))
    gain = -report.row("recomputed windows, the rate tuned", base.nats, none.nats, describe(base, base))
    cached = results["cached"]
    kept = -report.row("cached, the same settings", cached.nats, none.nats, describe(cached, base))
    report.row("the same against recomputed windows", cached.nats, base.nats)
    gained = -report.row("mixture", ours.nats, none.nats, describe(ours, base))
    report.row("the same against recomputed windows", ours.nats, base.nats)
    return {
        "documents": int(report.shared.sum()),
        "gain": round(gain, 6),
        "gain_ratio": round(gained / gain, 4),
        "time_ratio": round(ours.seconds / base.seconds, 4),
        "cached_gain_share": round(kept / gain, 4),
        "cached_time_ratio": round(cached.seconds / base.seconds, 4),
        "graphs": ours.shapes + 1,  # and the adapters' step
    } | compare_missed(text, results)


def compare_missed(text: Text, results: dict[str, Result]) -> dict[str, Any]:
    """Print what mis-set rates make of the mixture, on the documents that they have scored; their figures."""
    none, ours = results["none"].nats, results["mixture"].nats
    report = Report(text, [none, ours, *(results[name].nats for name in MISSET)])
    if not report.shared.any():
        return {}
    print(f"mis-set rates: {report.count()}")
    gained = -report.row("mixture", ours, none)
    missed = [
        -report.row(f"mixture, rates x {factor:g}", results[name].nats, none)
        for name, factor in MISSET.items()
    ]
    return {
        "misset_share": round((gained - min(missed)) / gained, 4),
        "misset_documents": int(report.shared.sum()),
    }


def contributions(text: Text, ours: Result) -> dict[str, float]:
    """What each expert takes from the score of the mixture, over all documents that it has scored."""
    report = Report(text, [ours.nats])
    if not report.shared.any():
        return {}
    print(f"mixture on {int(report.shared.sum())} documents: {report.bpb(ours.nats):.5f}")
    for name, nats in ours.others.items():
        report.row(f"mixed again: {name}", nats, ours.nats)
    total = report.bpb(ours.nats)
    others = {name: report.bpb(nats) for name, nats in ours.others.items()}
    alone = [value for name, value in others.items() if name.endswith("alone")]
    experts = {
        name.removeprefix("without "): total - value
        for name, value in others.items()
        if name.startswith("without")
    }
    experts["mixture of rates against the best of them"] = others["copies none"] - min(alone)
    experts["copies from the document"] = total - others["copies history"]
    experts["copies from documents before"] = total - others["copies document"]
    for name, value in experts.items():
        print(f"  contribution of {name}: {value:+.5f}")
    return {name: round(value, 6) for name, value in experts.items()}


def time_long(work: Work, dataset: Path | None, count: int, multiple: float) -> dict[str, float]:
    """Recomputed against cached on documents as long as LONG tokens of context."""
    changes = {"ttt_eval_seq_len": LONG}
    text = read_text(work.frozen.config, dataset, choose(count, shortest=LONG), LONG)
    results = {}
    for way in ways_to_score(work.frozen.config, multiple):
        if way.name in ("recomputed", "cached"):
            long = way._replace(name=f"long-{way.name}", settings=way.settings | changes)
            pieces = [
                work.piece(text, long, stream) for stream, numbers in enumerate(text.streams) if numbers
            ]
            if None in pieces:
                return {}
            results[way.name] = Result(text, pieces)
    ratio = results["cached"].seconds / results["recomputed"].seconds
    count = len(text.documents)
    print(f"{count} documents of {LONG} tokens: cached takes {ratio:.3f} of the time of recomputed")
    return {"cached_time_ratio": round(ratio, 4)}


def make_dataset(folder: Path) -> None:
    """A small dataset: this repository's texts in documents of a page each."""
    import sentencepiece

    from data.shards import BOS, train_tokenizer, write_shard

    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.py")])
    texts = [path.read_text() for path in paths]
    pages = [text[place : place + 1500] for text in texts for place in range(0, len(text), 1500)]
    folder.mkdir()
    train_tokenizer(pages[::4], folder / "tokenizer", int(QUICK["VOCAB_SIZE"]))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for name, part in (("train", pages[20:]), ("val", pages[:20])):
        ids = [token for page in part for token in [BOS, *pieces.encode(page)]]
        write_shard(folder / f"fineweb_{name}_000000.bin", np.array(ids, "<u2"))


def train_tiny(folder: Path) -> Path:
    """A run folder with the artifact of half a minute, beside the dataset that it was trained on."""
    make_dataset(folder / "data")
    recipe = (ROOT / "records" / "recipes" / "cpu_demo.env").read_text()
    settings = dict(line.split("=", 1) for line in recipe.splitlines() if line[:1].isalpha())
    places = {"OUT_DIR": str(folder), "RUN_ID": "tiny", "DATASETS_DIR": str(folder / "data")}
    variables = os.environ | settings | QUICK | places
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=variables, check=True, cwd=ROOT)
    return folder / "tiny"


def evaluate(options: argparse.Namespace, changes: dict[str, str]) -> dict[str, Any]:
    """All figures of one artifact."""
    frozen = Frozen(options.run, changes)
    share = tuple(map(int, options.share.split("/")))
    work = Work(frozen, options.work or options.run / "evaluation", options.pieces, share)
    rates = [float(rate) for rate in options.rates.split(",")]
    tuning = read_text(frozen.config, None, choose(options.tune, longest=1024, last=options.tune))
    multiple = rates[0] if len(rates) == 1 else tuned_rate(work, tuning, rates)
    print(f"rate of the recomputed adapters: {multiple:g} x {frozen.config.ttt_lora_lr:g}")
    last = 0 if options.dataset else options.tune + options.documents
    text = read_text(frozen.config, options.dataset, choose(options.documents, last=last))
    results = do_work(work, text, ways_to_score(frozen.config, multiple))
    figures = compare(text, results)
    if options.long:
        figures |= time_long(work, options.dataset, options.long, multiple)
    return figures | {"experts": contributions(text, results["mixture"])}


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="run folder with final_model.ptz")
    parser.add_argument("--dataset", type=Path, help="score the validation documents of this dataset")
    parser.add_argument("--documents", type=int, default=451, help="how many documents (451)")
    parser.add_argument("--rates", default="1,3,9,27", help="multiples of TTT_LORA_LR that are tried")
    parser.add_argument("--tune", type=int, default=4, help="training documents that choose the rate (4)")
    parser.add_argument("--long", type=int, default=0, help="documents of 2,048 tokens that are timed (none)")
    parser.add_argument("--streams", type=int, default=t.STREAMS, help="they share the documents (8)")
    parser.add_argument("--work", type=Path, help="folder of finished pieces (RUN/evaluation)")
    parser.add_argument("--pieces", type=int, default=-1, help="how many pieces to do now (all)")
    parser.add_argument("--share", default="0/1", help="0/2 and 1/2: two processes do half of it each (0/1)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument("--quick", action="store_true", help="train a tiny model; few documents and rates")
    options = parser.parse_args()
    changes = dict(setting.split("=", 1) for setting in options.set)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options.run = train_tiny(Path(folder))
            options.documents, options.rates, options.tune, options.streams = 8, "3,27", 2, 1
            changes = QUICK | {"TTT_BATCH_SIZE": "4", "TTT_ENABLED": "1"} | changes
            changes["DATASETS_DIR"] = str(options.run.parent / "data")
        if options.run is None or not (options.run / "final_model.ptz").exists():
            parser.error(f"run {options.run}: no final_model.ptz there; give a finished run, or --quick")
        with patch.object(t, "STREAMS", options.streams):
            figures = evaluate(options, changes)
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
