#!/usr/bin/env python3
"""Use an artifact: compress files with it and get them back, sample text, export it to transformers.

    ./codec.py compress runs/NAME/final_model.ptz FILE... -o texts.golf       as many bytes as the score says
    ./codec.py decompress runs/NAME/final_model.ptz texts.golf -o FOLDER
    ./codec.py sample runs/NAME/final_model.ptz --prompt "Once upon" --seed 1
    ./codec.py export runs/NAME/final_model.ptz --to hf FOLDER

Everything is done by the script that made the artifact: packed_train_gpt.py beside it, with the settings in
config.json; the environment may change those of the evaluation (TTT_MODE=mixture). A file is coded with the
run's own evaluation, test-time training included. Nothing of it is written anew here: the evaluation runs as
ever, on tokens that the decoder learns one by one. Whoever decodes is not given the text, so the score is
causal, normalised, and made before anything is learnt from it.
"""

from __future__ import annotations

import environment

environment.enter()
import argparse
import contextlib
import copy
import hashlib
import importlib.util
import io
import itertools
import json
import linecache
import lzma
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor
from tqdm import tqdm

from data.sidecar import VERSIONS
from lossless_caps import OPERATORS, TRANSFORMS, decode_caseops
from results import (
    NAMES,
    PLACES,
    Run,
    Stop,
    place_of,
    place_of_data,
    read_json,
    run_tool,
    warn,
    write_atomically,
)

# === THE SHIPPED SCRIPT ===
# In: an artifact, and beside it the script that made it and its settings. Out: that script as a module, whose
# evaluation runs on any tokens.

ROOT = Path(__file__).resolve().parent
SCRIPT = "packed_train_gpt.py"
NEEDED = (
    *("Config", "Run", "Batch", "Validation", "Tally", "Score", "Stop", "STREAMS", "build", "format_value"),
    *("evaluate_stage", "evaluation_modes", "load_validation", "measure", "record_stage", "summarize"),
    *("window_batch", "softcapped_ce_reference", "softcapped_ce_op", "load_tokenizer"),
)


def load_trainer(folder: Path, needed: Sequence[str] = NEEDED) -> ModuleType:
    """The script that the run ships, as a module; Stop if it is none or lacks what is used here."""
    path = folder / SCRIPT
    os.environ.setdefault("NUMBA_OPT", "1")  # its loops run once here: compiling them is what takes time
    spec = importlib.util.spec_from_file_location("shipped_train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its type hints are looked up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of any kind: it is a foreign script
        raise Stop(
            f"{path}: cannot be loaded ({type(error).__name__}: {error}); repeat STAGE=quantize"
        ) from None
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        raise Stop(
            f"{path}: has no {', '.join(missing)}, which this tool uses; it is not a script of this program"
        )
    return module


@contextlib.contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of `owner` replaced by `values` for a while."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def quiet() -> contextlib.redirect_stdout:
    """Swallow what the trainer says, progress bars too."""
    return contextlib.redirect_stdout(io.StringIO())


def settings_of(trainer: ModuleType, run: Run, **changes: Any) -> dict[str, str]:
    """The run's settings as environment variables, with some of them changed."""
    kept = {name: value for name, value in run.config.items() if name not in NAMES}
    kept |= {name: place_of(str(kept[name])) for name in PLACES if kept.get(name)}
    return {name: trainer.format_value(value) for name, value in (kept | changes).items()}


def config_of(trainer: ModuleType, run: Run, **changes: Any) -> Any:
    """The same as the trainer's Config."""
    return trainer.Config.from_env(settings_of(trainer, run, **changes))


def evaluate(
    trainer: ModuleType,
    config: Any,
    threads: int,
    tokenizer: Path,
    validation: Any,
    score: Callable[[Any, Any, dict[str, Callable[[Any], None]]], None],
) -> None:
    """The run's own evaluation of its artifact on `validation`, a Validation of the trainer.

    At its last stage, with the weights of the artifact in the model, `score` gets the trainer's Run, the
    model and the stages by name: it runs one of them, and nothing else is scored.
    """
    modes: dict[str, Callable[[Any], None]] = {}

    def measure(run: Any, validation: Any, stage: str, how: Callable[[Any], None]) -> Any:
        modes[stage] = how
        if len(modes) == len(expected):
            score(run, built.model, modes)
        return trainer.Score(0.0, 1, 1)

    def nothing(*_: Any, **__: Any) -> None:
        """What the run folder would be told."""

    stands_in = {"measure": measure, "record_stage": nothing, "summarize": nothing}
    threads_before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="codec-") as place, quiet():
        run = trainer.Run(config)
        run.folder = Path(place)
        torch.set_num_threads(threads)
        try:
            built = trainer.build(run)
            expected = trainer.evaluation_modes(run, built)
            data = types.SimpleNamespace(tokenizer=tokenizer, train_files=[], train=[])
            with patched(trainer, load_validation=lambda data: validation, **stands_in):
                trainer.evaluate_stage(run, data, built)
        finally:
            torch.set_num_threads(threads_before)


class Heard:
    """The logits of the latest forward (N, V), as the trainer's loss function got them."""

    def __init__(self) -> None:
        self.logits = torch.zeros(0)
        self.cap = 0.0

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities (..., V) in fp64 on the host of some of them."""
        return (self.cap * torch.tanh(logits.double().cpu() / self.cap)).log_softmax(-1)


@contextlib.contextmanager
def hear(trainer: ModuleType, model: Any) -> Iterator[Heard]:
    """Listen to every forward for a while."""
    heard = Heard()
    if not hasattr(model, "shows_logits"):
        raise Stop(
            f"{SCRIPT}: an older script, which does not show its logits; make the artifact with a later one"
        )

    def listening(function: Callable) -> Callable:
        def losses_of(logits: Tensor, targets: Tensor, cap: float) -> Any:
            heard.logits = logits.detach()
            heard.cap = cap
            return function(logits, targets, cap)

        return losses_of

    names = ("softcapped_ce_reference", "softcapped_ce_op")
    ours = {name: listening(getattr(trainer, name)) for name in names}
    with patched(trainer, **ours), patched(model, shows_logits=True):
        yield heard


# === PROBABILITIES AND THE RANGE CODER ===
# In: a distribution over the vocabulary, as fp64 logarithms. Out: bytes, and from these the tokens again. The
# coder is that of the artifact (section ARTIFACT of the trainer) with given counts instead of learnt ones.
# Its integers are the one form in which both sides see a probability.

COUNT_BITS = 28  # the counts of a distribution add up to 2^28, none is 0
INTERVAL_BITS = 56
INTERVAL_MASK = (1 << INTERVAL_BITS) - 1
HELD_BYTES = INTERVAL_BITS // 8


def cumulative_counts(log_p: np.ndarray) -> np.ndarray:
    """The counts (V + 1,) int64 before each token of a distribution `log_p` (V,) in nats, and their sum.

    Whatever the sum of the probabilities was, it is 1 here. Stop if one of them is not a number.
    """
    p = np.exp(log_p - log_p.max())
    total = p.sum()
    if not math.isfinite(total):
        raise Stop("the evaluation gives a probability that is not a number; the artifact cannot be used")
    size = len(p)
    counts = (p * (((1 << COUNT_BITS) - size) / total)).astype(np.int64) + 1
    counts[p.argmax()] += (1 << COUNT_BITS) - counts.sum()
    return np.concatenate((np.zeros(1, np.int64), counts.cumsum()))


class Encoder:
    """Writes tokens into as many bytes as their probabilities say."""

    def __init__(self) -> None:
        self.low = 0  # the interval's lower end, behind the bytes written
        self.span = INTERVAL_MASK + 1
        self.written = bytearray()

    def encode(self, first: int, count: int) -> None:
        """A token of `count`, behind those before it with the sum `first`."""
        unit = self.span >> COUNT_BITS
        self.low += unit * first
        self.span = unit * count
        if self.low > INTERVAL_MASK:
            self.low &= INTERVAL_MASK
            self.add_carry()
        while self.span <= INTERVAL_MASK >> 8:
            self.written.append(self.low >> INTERVAL_BITS - 8)
            self.low = self.low << 8 & INTERVAL_MASK
            self.span <<= 8

    def add_carry(self) -> None:
        """Add 1 to the number that is written."""
        place = len(self.written) - 1
        while self.written[place] == 255:
            self.written[place] = 0
            place -= 1
        self.written[place] += 1

    def finish(self) -> bytes:
        """The stream; the decoder reads bytes of 255 behind it, which lie within the span."""
        return bytes(self.written) + bytes([self.low >> INTERVAL_BITS - 8])


class Decoder:
    """Reads what an Encoder has written."""

    def __init__(self, stream: bytes):
        self.stream = stream
        self.position = HELD_BYTES
        self.number = int.from_bytes(stream[:HELD_BYTES].ljust(HELD_BYTES, b"\xff"), "big")
        self.span = INTERVAL_MASK + 1

    def decode(self, cumulative: np.ndarray) -> int:
        """The next token, from the counts of cumulative_counts; a damaged stream gives any."""
        unit = self.span >> COUNT_BITS
        share = min(self.number // unit, (1 << COUNT_BITS) - 1)
        token = int(np.searchsorted(cumulative, share, side="right")) - 1
        self.number -= unit * int(cumulative[token])
        self.span = unit * int(cumulative[token + 1] - cumulative[token])
        while self.span <= INTERVAL_MASK >> 8:
            byte = self.stream[self.position] if self.position < len(self.stream) else 255
            self.number = self.number << 8 | byte
            self.span <<= 8
            self.position += 1
        return token

    @property
    def is_at_end(self) -> bool:
        """Whether as many bytes were read as the Encoder has written."""
        return self.position == len(self.stream) + HELD_BYTES - 1


# === ONE EVALUATION THAT CODES ===
# In: one stage of the evaluation, and tokens that are known (encoder) or not yet (decoder). Out: a stream, or
# the tokens. A forward is taken apart into steps (`plan_steps`): each codes the targets whose inputs are all
# known, one of each row. The encoder runs a forward once, as ever, and codes its targets in that order. The
# decoder runs it once for every step, in the same shapes, with 0 for what it does not know, and then once
# more with all of it, from which the evaluation goes on. Both see the same distributions bit by bit if the
# kernels are deterministic and no value of a later token touches an earlier place, which the decoder looks
# at: the distributions of its last forward must be those that it has decoded with.


class Step(NamedTuple):
    """Targets that are told, and then those that are coded at once: their places, rows and columns."""

    told: list[int]
    places: list[int]
    rows: list[int]
    columns: list[int]


def plan_steps(
    first: np.ndarray, count: np.ndarray, scored: np.ndarray, known: np.ndarray, told: np.ndarray
) -> list[Step]:
    """The order in which the targets of a forward become known.

    Row r has the targets first[r] ... first[r] + count[r] - 1; `scored` (R, T) marks those that count. A
    place that is `told` is known as soon as all before it in its row are. Stop if a row needs a target that
    nobody codes.
    """
    known = known.copy()
    place = first.copy()
    end = first + count
    rows = [row for row in range(len(first)) if not known[first[row] : end[row]].all()]
    steps = []
    while rows:
        step = Step([], [], [], [])
        left = []
        for row in rows:
            while place[row] < end[row]:
                here = int(place[row])
                column = here - int(first[row])
                if not known[here]:
                    if not scored[row, column]:
                        break
                    if not told[here]:
                        step.places.append(here)
                        step.rows.append(row)
                        step.columns.append(column)
                        break
                    step.told.append(here)
                    known[here] = True
                place[row] += 1
            if place[row] < end[row]:
                left.append(row)
        known[step.places] = True
        if left and not step.places and len(left) == len(rows) and not step.told:
            raise Stop(
                f"target {int(place[left[0]])} is read before it is scored: the evaluation is not causal"
            )
        steps.append(step)
        rows = left
    return steps


class Windows(NamedTuple):
    """A call of window_batch: its arguments, and the targets of its rows as plan_steps wants them."""

    arguments: tuple
    first: np.ndarray
    count: np.ndarray
    scored: np.ndarray
    width: int


class Coding:
    """Watches one stage of the evaluation, and codes every target before the stage goes on.

    `tokens` (N,) uint16 are the text of the stage. With a `stream` they are filled from it: where `told` (N,)
    is true they come from `given` once it is their turn, elsewhere from the stream. `nats` (N,) are what each
    target has cost.
    """

    def __init__(
        self,
        trainer: ModuleType,
        model: Any,
        tokens: np.ndarray,
        told: np.ndarray,
        advance: Callable[[int], Any],
        stream: bytes | None = None,
        given: np.ndarray | None = None,
    ):
        self.trainer = trainer
        self.model = model
        self.tokens = tokens
        self.told = told
        self.advance = advance
        self.given = given
        self.encoder = Encoder() if stream is None else None
        self.decoder = None if stream is None else Decoder(stream)
        self.known = np.zeros(len(tokens), bool)
        self.known[0] = True
        self.nats = np.zeros(len(tokens))
        self.windows: Windows | None = None  # of the next forward
        self.chunk: tuple | None = None  # the arguments of mixed_chunk, for a mixture
        self.steps: list[Step] = []
        self.heard = Heard()
        self.histories: dict[int, np.ndarray] = {}  # what a document may copy from, by its first place
        self.seen: dict[int, Tensor] = {}  # the logits that a target was decoded with, by its place

    def __enter__(self) -> Coding:
        trainer = self.trainer
        self.stack = contextlib.ExitStack()
        ours = {"window_batch": self.window_batch}
        if hasattr(trainer, "Mixture"):  # older scripts have none
            ours["mixed_chunk"] = self.mixed_chunk
            self.run_chunk = trainer.Mixture.run_chunk
            self.stack.enter_context(patched(trainer.Mixture, run_chunk=self.coded_chunk()))
        self.real = {name: getattr(trainer, name) for name in ours}
        self.stack.enter_context(patched(trainer, **ours))
        if hasattr(trainer.Tally, "masked"):
            self.real_masked = trainer.Tally.masked

            def masked(tally: Any, *arguments: Any) -> Any:
                return self.masked(tally, *arguments)

            self.stack.enter_context(patched(trainer.Tally, masked=masked))
        if self.decoder is not None and hasattr(trainer, "Turn"):
            self.real_find = trainer.Copies.find

            def find(copies: Any, first: int, end: int) -> None:
                self.first_find(copies, first, end)

            self.stack.enter_context(patched(trainer.Copies, find=find))
        self.heard = self.stack.enter_context(hear(trainer, self.model))
        self.stack.callback(self.model.register_forward_pre_hook(self.before, with_kwargs=True).remove)
        self.stack.callback(self.model.register_forward_hook(self.after).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    # What the trainer calls meanwhile.

    def window_batch(self, tokens: np.ndarray, plan: np.ndarray, rows: int, context: int, packed: int) -> Any:
        """The trainer's, and remembered if it cuts the text that is coded."""
        found = self.real["window_batch"](tokens, plan, rows, context, packed)
        self.windows = None
        if tokens is self.tokens and len(plan):
            arguments = (tokens, plan, rows, context, packed)
            first = plan[:, 0] + 1
            self.windows = Windows(arguments, first, plan[:, 1] - first, found[1].numpy(), context)
        return found

    def mixed_chunk(self, *arguments: Any) -> Any:
        """The trainer's, and remembered."""
        found = self.real["mixed_chunk"](*arguments)
        self.chunk = arguments
        return found

    def plan(self) -> list[Step]:
        """The steps of the forward that comes."""
        windows = self.windows
        if windows is None or self.known[windows.first.min() : (windows.first + windows.count).max()].all():
            return []
        return plan_steps(windows.first, windows.count, windows.scored, self.known, self.told)

    def before(self, model: Any, args: tuple, named: dict[str, Any]) -> None:
        """A forward of whole windows begins; the decoder finds out what it holds."""
        if self.chunk is not None:  # see coded_chunk
            return
        self.steps = self.plan()
        if self.decoder is None or not self.steps:
            return
        batch = args[0]

        def rebuild() -> None:
            self.refill(batch, self.real["window_batch"](*self.windows.arguments)[0])

        def forward() -> Callable[[int, int], tuple[Tensor, np.ndarray]]:
            model.forward(*args, **named)
            return self.plain_distribution

        self.decode(rebuild, forward)

    def after(self, model: Any, args: tuple, output: Any) -> None:
        """That forward has ended, with all of its tokens known."""
        if self.chunk is None:
            self.settle(self.plain_distribution)
            self.windows = None

    def coded_chunk(self) -> Callable:
        """In place of Mixture.run_chunk: the chunk is coded before its losses are given out."""

        def run_chunk(mixture: Any, chunk: Any, cached: Any) -> Any:
            real = self.run_chunk
            self.steps = self.plan()

            def rebuild() -> None:
                self.find_copies(mixture.copies)
                fresh = self.real["mixed_chunk"](*self.chunk)
                chunk.match.copy_(fresh.match)
                chunk.batch.guesses.copy_(fresh.batch.guesses)
                self.refill(chunk.batch, fresh.batch)

            def forward() -> Callable[[int, int], tuple[Tensor, np.ndarray]]:
                losses, _ = real(mixture, chunk, cached)
                return self.mixed_distribution(mixture.mixer, chunk, losses)

            if self.decoder is not None:
                self.decode(rebuild, forward)
            losses, past = real(mixture, chunk, cached)
            self.settle(self.mixed_distribution(mixture.mixer, chunk, losses))
            self.windows = self.chunk = None
            return losses, past

        return run_chunk

    # Coding.

    def decode(self, rebuild: Callable[[], None], forward: Callable[[], Callable[[int, int], tuple]]) -> None:
        """Find the targets of `self.steps`, with a forward for each, and leave the batch complete."""
        for step in self.steps:
            self.reveal(step.told)
            if step.places:
                rebuild()
                distribution = forward()
                for place, row, column in zip(step.places, step.rows, step.columns, strict=True):
                    logits, log_p = distribution(row, column)
                    self.seen[place] = logits.clone()
                    self.tokens[place] = self.code(place, log_p)
                    self.known[place] = True
        rebuild()

    def settle(self, distribution: Callable[[int, int], tuple[Tensor, np.ndarray]]) -> None:
        """Code what the encoder has just scored; the decoder compares that with what it has decoded by."""
        for step in self.steps:
            if self.decoder is None:
                self.reveal(step.told)
            for place, row, column in zip(step.places, step.rows, step.columns, strict=True):
                if self.decoder is None:
                    self.code(place, distribution(row, column)[1])
                    self.known[place] = True
                elif not torch.equal(self.seen.pop(place), distribution(row, column)[0]):
                    raise Stop(
                        f"target {place}: its distribution is another one when later tokens are known: "
                        "the evaluation is not causal, or not deterministic on this machine"
                    )
        self.steps = []

    def reveal(self, places: list[int]) -> None:
        """It is the turn of places that are told."""
        self.known[places] = True
        if self.given is not None:
            self.tokens[places] = self.given[places]

    def code(self, place: int, log_p: np.ndarray) -> int:
        """Encode the token at `place`, or decode one; also counts what it costs."""
        cumulative = cumulative_counts(log_p)
        token = int(self.tokens[place]) if self.decoder is None else self.decoder.decode(cumulative)
        first, end = int(cumulative[token]), int(cumulative[token + 1])
        self.nats[place] = COUNT_BITS * math.log(2) - math.log(end - first)
        if self.encoder is not None:
            self.encoder.encode(first, end - first)
        self.advance(1)
        return token

    def finish(self) -> bytes:
        """The stream; Stop if a target was never scored, or the decoder has not read all."""
        if not self.known.all():
            raise Stop(
                f"target {int(self.known.argmin())} was scored by no forward of the evaluation; "
                "it cannot be coded"
            )
        if self.encoder is not None:
            return self.encoder.finish()
        if not self.decoder.is_at_end:
            raise Stop("the code stream has another length than the text that it gives")
        return self.decoder.stream

    # Distributions.

    def plain_distribution(self, row: int, column: int) -> tuple[Tensor, np.ndarray]:
        """The logits (V,) and the log-probabilities (V,) of one target."""
        logits = self.heard.logits[row * self.windows.width + column]
        return logits, self.heard.log_softmax(logits).numpy()

    def mixed_distribution(self, mixer: Any, chunk: Any, losses: Tensor) -> Callable:
        """The same from a mixture: the trainer's own, asked for every token of the vocabulary.

        `losses` (3, R, K, T) are what it is told of targets and copies. Of what it learns within a chunk, the
        weights of the adapters (its `within`) are the only part that counts in the same chunk.
        """
        trainer = self.trainer
        told = -losses.detach().double()
        scored = chunk.scored[:, None]
        before, _ = trainer.mix_experts(mixer.within, told[0] * scored)
        experts = self.heard.logits.unflatten(0, (*told.shape[1:],))  # (R, K, T, V)

        def distribution(row: int, column: int) -> tuple[Tensor, np.ndarray]:
            logits = experts[row, :, column]
            size = logits.size(1)
            asked = copy.copy(mixer)
            asked.within = before[row, :, column].repeat(size, 1)
            chances = self.heard.log_softmax(logits).T.to(told.device)  # (V, K)
            guesses = chunk.batch.guesses[:, row, column]
            # Of copies too: what the forward gives for these is rounded with the target's.
            log_p = torch.stack((chances, *(chances[guess].expand_as(chances) for guess in guesses)))
            targets = torch.arange(size, device=told.device)[:, None]
            question = chunk._replace(
                batch=chunk.batch._replace(
                    targets=targets, guesses=guesses.view(-1, 1, 1).repeat(1, size, 1)
                ),
                scored=torch.ones_like(targets, dtype=torch.bool),
                match=chunk.match[:, row : row + 1, column : column + 1].repeat(1, size, 1),
            )
            return logits, asked.mix(log_p[..., None], question)[:, 0].cpu().numpy()

        return distribution

    def find_copies(self, copies: Any) -> None:
        """Look for copies again, in what is known of the documents of the chunk."""
        documents = getattr(self.chunk[1], "documents", self.chunk[1])  # of a turn, or themselves
        for first, end in documents:
            unknown = np.flatnonzero(~self.known[first + 1 : end])
            known_end = first + 2 + int(unknown[0]) if len(unknown) else end
            copies.tokens[:, first + 1 : end] = 0  # its BOS is the last target of the document before
            copies.lengths[:, first + 1 : end] = 0
            if not hasattr(copies, "advance"):  # a script before turns
                copies.find(np.array([[first, known_end]]))
            elif end > first:
                now = copies.history_table
                copies.history_table = self.histories[int(first)]
                self.real_find(copies, first, known_end)
                copies.history_table = now

    def first_find(self, copies: Any, first: int, end: int) -> None:
        """The trainer's Copies.find when a document begins: of others it sees those entered by then."""
        self.histories[int(first)] = copies.history_table.copy()
        self.real_find(copies, first, end)

    def masked(self, tally: Any, batch: Any, chosen: Tensor, places: Tensor) -> Any:
        """The trainer's Tally.masked, and remembered."""
        self.mask = (tally, chosen, places)
        return self.real_masked(tally, batch, chosen, places)

    def refill(self, batch: Any, fresh: Any) -> None:
        """Put the tokens of a `fresh` batch into the one that is scored, and what they allow after them."""
        batch.inputs.copy_(fresh.inputs)
        batch.targets.copy_(fresh.targets)
        if getattr(batch, "mask", None) is not None:
            tally, chosen, places = self.mask
            rows = torch.from_numpy(tally.run.canonical.rows(self.tokens)).to(batch.mask.rows.device)
            tally.mask = tally.mask._replace(rows=rows)
            batch.mask.rows.copy_(self.real_masked(tally, batch, chosen, places).mask.rows)


# === ARTIFACT AND SETTINGS ===


class Artifact(NamedTuple):
    """An artifact with the script that made it and the run's settings."""

    path: Path
    digest: bytes  # sha256
    run: Run
    trainer: ModuleType


def open_artifact(path: Path) -> Artifact:
    """The artifact at `path` with what lies beside it; Stop if any of that is missing."""
    folder = path.parent
    for needed in (path, folder / SCRIPT, folder / "config.json"):
        if not needed.is_file():
            raise Stop(f"{needed}: no such file; give the final_model.ptz of a finished run in its folder")
    digest = hashlib.sha256(path.read_bytes()).digest()
    return Artifact(path, digest, Run.read(folder), load_trainer(folder))


def coding_config(artifact: Artifact, changes: dict[str, Any]) -> Any:
    """The settings of the run with these `changes`, as the trainer's Config.

    Windows are scored one by one, as a decoder can have only one of them at a time: in batches it would run
    the whole batch for every token.
    """
    trainer = artifact.trainer
    run = artifact.run
    here = {
        "STAGE": "evaluate",
        "ARTIFACT": artifact.path.resolve(),
        "EVAL_PREQUANT": False,
        "COMPILE": "off",
    }
    here["VAL_BATCH_TOKENS"] = trainer.STREAMS * run.setting("EVAL_SEQ_LEN")
    if not torch.cuda.is_available():  # the run may have been made elsewhere
        here |= {"ATTENTION": "auto", "KERNELS": "auto"}
    return config_of(trainer, run, **here | changes)


def settings_digest(config: Any) -> str:
    """16 hex digits of all settings but places and names."""
    settings = {name: getattr(config, name.lower()) for name in config.variables()}
    kept = {name: value for name, value in settings.items() if name not in (*NAMES, *PLACES)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def last_stage(config: Any) -> str:
    """The stage whose score is the run's."""
    if config.ttt_enabled:
        return "ttt"
    return "sliding" if config.sliding_window_enabled else "quantized"


def needs_lengths(config: Any) -> bool:
    """Whether the evaluation reads where documents begin before it scores them."""
    by_document = config.ttt_enabled and config.ttt_mode != "chunk_sgd"
    return by_document or config.loader == "packed"


class Coded(NamedTuple):
    """What came of one evaluation: the stream, the text, and by target its cost and its recorded loss."""

    stream: bytes
    tokens: np.ndarray
    nats: np.ndarray
    recorded: np.ndarray


def code_tokens(
    artifact: Artifact,
    config: Any,
    stage: str,
    threads: int,
    tokenizer: Path,
    tokens: np.ndarray,
    told: np.ndarray,
    stream: bytes | None = None,
    show: bool = False,
) -> Coded:
    """Code `tokens` (N,) uint16 with a stage of the evaluation, or with a `stream` decode them.

    `told` (N,) marks places that are not coded but known once it is their turn, the first among them. A
    decoder reads of `tokens` only these, and the places of BOS where the evaluation goes by documents
    (needs_lengths).
    """
    trainer = artifact.trainer
    text = np.array(tokens, "<u2")
    if stream is not None:
        text[1:] = 0
        if needs_lengths(config):
            text[tokens == trainer.BOS] = trainer.BOS
    validation = trainer.Validation(text, np.zeros(len(text), np.int32), "codec")
    found = []

    def score(run: Any, model: Any, modes: dict[str, Callable[[Any], None]]) -> None:
        if stage not in modes:
            raise Stop(f"--stage {stage}: this evaluation has {', '.join(modes)}")
        tally = trainer.Tally(run, validation)
        bar = tqdm(total=int((~told).sum()), unit=" tokens", file=sys.stderr, disable=not show)
        given = None if stream is None else tokens
        with bar, Coding(trainer, model, text, told, bar.update, stream, given) as coding:
            modes[stage](tally)
        tally.total(stage)
        recorded = tally.nats.double().cpu().numpy()
        found.append(Coded(coding.finish(), text, coding.nats, recorded))

    evaluate(trainer, config, threads, tokenizer, validation, score)
    return found[0]


# === TEXT ===
# In: the bytes of a file. Out: tokens of the model, and a patch that makes what these decode to the very
# bytes again: most tokenizers normalise whitespace, and not every file is UTF-8.

KINDS = ("raw", "same", "spaces", "delta")
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
WORD = re.compile(rb"\S+")
MARK = b"x"  # of a word in a patch of spaces
UNREADABLE = 0.05  # a file with a larger share of characters that are not UTF-8 is not text
ZSTD_WINDOW = 27  # bits


def squeeze(data: bytes, undo: bool = False) -> bytes:
    """`data` through LZMA without a header, or back."""
    act = lzma.decompress if undo else lzma.compress
    return act(data, lzma.FORMAT_RAW, filters=LZMA)


def zstd_against(known: bytes, data: bytes, undo: bool = False) -> bytes:
    """`data` through zstd that knows the bytes `known`, or back."""
    dictionary = zstandard.ZstdCompressionDict(known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    if undo:
        reader = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << ZSTD_WINDOW)
        return reader.decompress(data)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, window_log=ZSTD_WINDOW, enable_ldm=True, write_checksum=False
    )
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(data)


class Packed(NamedTuple):
    """A file as tokens (N,) uint16 and a patch of one of KINDS."""

    kind: str
    tokens: np.ndarray
    patch: bytes


class Texts(NamedTuple):
    """From the bytes of a file to tokens and back, by a tokenizer and the transform of its dataset."""

    path: Path  # of the tokenizer
    pieces: Any  # that, as a SentencePieceProcessor
    digest: str  # 16 hex digits of the sha256 of its file
    transform: str
    bos: int

    def encode(self, text: str) -> np.ndarray:
        """The tokens (N,) uint16 of a text; the BOS is not one of them."""
        tokens = np.array(self.pieces.encode(TRANSFORMS[self.transform].encode(text)), "<u2")
        return tokens[tokens != self.bos]

    def decode(self, tokens: np.ndarray) -> bytes:
        """What tokens stand for, in UTF-8; U+2581 is SentencePiece's space."""
        text = self.pieces.decode(tokens.tolist()).replace("\u2581", " ")
        if self.transform in VERSIONS:
            with contextlib.suppress(ValueError):  # not the grammar's: the patch makes up for it
                text = decode_caseops(text, VERSIONS[self.transform], normalised=True)
        return text.encode("utf-8", "replace")

    def pack(self, data: bytes) -> Packed:
        """A file as tokens and a patch."""
        text = data.decode("utf-8", "replace")
        tokens = np.zeros(0, "<u2")
        if text.count("\ufffd") <= UNREADABLE * len(text):
            tokens = self.encode(text)
        if not len(tokens):
            return Packed("raw", tokens, squeeze(data) if data else b"")
        found = self.decode(tokens)
        if found == data:
            return Packed("same", tokens, b"")
        if found.split() == data.split():
            return Packed("spaces", tokens, squeeze(WORD.sub(MARK, data)))
        return Packed("delta", tokens, zstd_against(found, data))

    def unpack(self, packed: Packed) -> bytes:
        """The file again."""
        if packed.kind == "raw":
            return squeeze(packed.patch, undo=True) if packed.patch else b""
        found = self.decode(packed.tokens)
        if packed.kind == "delta":
            return zstd_against(found, packed.patch, undo=True)
        if packed.kind == "spaces":
            spaces = squeeze(packed.patch, undo=True).split(MARK)
            words = [*found.split(), b""]
            return b"".join(part for pair in zip(spaces, words, strict=True) for part in pair)
        return found


def find_tokenizer(artifact: Artifact, given: Path | None) -> Path:
    """The tokenizer that was given, that beside the artifact, or that of the run's dataset."""
    run = artifact.run
    if given is not None:
        return given
    beside = artifact.path.parent / "tokenizer.model"
    if beside.exists():
        return beside
    if run.setting("TOKENIZER_PATH"):
        return place_of(run.setting("TOKENIZER_PATH"))
    of_dataset = place_of_data(run) / "tokenizer.model"
    if of_dataset.exists():
        return of_dataset
    shared = place_of(run.setting("DATA_DIR")) / "tokenizers"
    return shared / f"fineweb_{run.setting('VOCAB_SIZE')}_bpe.model"


def find_transform(tokenizer: Path, pieces: Any) -> str:
    """The transform of the dataset of a tokenizer: its manifest's, else by the operators among its pieces."""
    manifest = tokenizer.parent / "manifest.json"
    named = read_json(manifest).get("transform") if manifest.exists() else None
    if named in TRANSFORMS:
        return named
    unknown = pieces.unk_id()
    for version in sorted(OPERATORS, reverse=True):
        if all(pieces.piece_to_id(operator) != unknown for operator in OPERATORS[version]):
            return f"caseops_v{version}"
    return "none"


def load_texts(artifact: Artifact, given: Path | None = None) -> Texts:
    """How files become tokens; Stop if there is no tokenizer of the run's vocabulary."""
    trainer = artifact.trainer
    path = find_tokenizer(artifact, given)
    pieces = trainer.load_tokenizer(path, artifact.run.setting("VOCAB_SIZE"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Texts(path, pieces, digest, find_transform(path, pieces), trainer.BOS)


# === THE CONTAINER ===
# Little-endian; a damaged one is refused before anything is decoded:
#
#     offset  bytes  what
#          0      8  MAGIC
#          8      8  bytes of the container
#         16     16  sha256 of all that follows, its first half
#         32     16  sha256 of the artifact, its first half
#         48      4  H, bytes of the head
#         52      H  head: JSON through LZMA, see `Head`
#     52 + H         the code stream, what is told, the patches of the files: as long as the head says

MAGIC = b"GOLFTXT1"
FIXED = struct.Struct("<8sQ16s16sI")
CHECKED = 32  # where what the checksum covers begins
HALF = 16  # bytes of a sha256


class Head(NamedTuple):
    """What a decoder needs besides the stream."""

    files: list[list]  # [name, kind, tokens, bytes of the patch]
    stream: int  # bytes
    around: list[int]  # tokens of each piece that is told; empty if none is
    told: int  # bytes of these through LZMA
    text: str  # 32 hex digits of the sha256 of all files
    stage: str
    changes: dict[str, Any]  # settings that are not the run's
    settings: str  # settings_digest
    tokenizer: str  # 16 hex digits of its sha256
    transform: str
    threads: int
    machine: str  # what the distributions were computed by


def machine() -> str:
    """What decides the last bits of a distribution, besides the number of threads."""
    if torch.cuda.is_available():
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}"


def write_container(artifact: Artifact, head: Head, body: bytes) -> bytes:
    """The container of a head and all that follows it."""
    packed = squeeze(json.dumps(head._asdict(), separators=(",", ":")).encode())
    rest = artifact.digest[:HALF] + struct.pack("<I", len(packed)) + packed + body
    checksum = hashlib.sha256(rest).digest()[:HALF]
    return MAGIC + struct.pack("<Q", CHECKED + len(rest)) + checksum + rest


def read_container(path: Path, artifact: Artifact) -> tuple[Head, bytes]:
    """(head, what follows it) of a container of this artifact; Stop if a byte of it is wrong."""
    data = path.read_bytes()
    if len(data) < FIXED.size or not data.startswith(MAGIC):
        raise Stop(f"{path}: not made by codec.py (it should start with {MAGIC.decode()}); give another file")
    _, size, checksum, digest, head_size = FIXED.unpack_from(data)
    if len(data) != size:
        raise Stop(f"{path}: {len(data)} bytes instead of {size}, truncated or damaged; copy it again")
    if hashlib.sha256(data[CHECKED:]).digest()[:HALF] != checksum:
        raise Stop(f"{path}: a byte was changed, the checksum does not fit; copy it again")
    if digest != artifact.digest[:HALF]:
        raise Stop(
            f"{path}: made with the artifact {digest.hex()}..., {artifact.path} is "
            f"{artifact.digest[:HALF].hex()}...; give the artifact that it was made with"
        )
    end = FIXED.size + head_size
    try:
        head = Head(**json.loads(squeeze(data[FIXED.size : end], undo=True)))
    except (lzma.LZMAError, ValueError, TypeError) as error:
        raise Stop(f"{path}: its head cannot be read ({error}); use the version that made it") from None
    return head, data[end:]


# === COMPRESS AND DECOMPRESS ===


def changes_of_environment(trainer: ModuleType) -> dict[str, str]:
    """The settings that the environment sets, as for a run: where things lie stays as it is."""
    names = [name for name in trainer.Config.variables() if name not in (*NAMES, *PLACES)]
    return {name: os.environ[name] for name in names if name in os.environ}


def names_of(files: list[Path]) -> list[str]:
    """The names of the files without their folders; Stop if two are the same."""
    names = [path.name for path in files]
    for name in names:
        if names.count(name) > 1:
            raise Stop(f"{name}: two files of this name; compress them one by one, or rename one")
    return names


class Layout(NamedTuple):
    """A text in which some documents are coded and the rest is told, see lay_out."""

    tokens: np.ndarray  # (N,) uint16
    told: np.ndarray  # (N,) bool
    firsts: list[int]  # the place of the BOS of each document that is coded


def lay_out(documents: list[np.ndarray], around: list[np.ndarray], bos: int) -> Layout:
    """The text that has `documents`, each behind a BOS, between the pieces `around` that are told.

    The BOS behind a document is coded with it, as its loss is recorded with it.
    """
    pieces = [around[0]]
    firsts = []
    place = len(around[0])
    for document, after in zip(documents, around[1:], strict=True):
        firsts.append(place)
        pieces += [np.array([bos], "<u2"), document, after]
        place += 1 + len(document) + len(after)
    tokens = np.concatenate(pieces).astype("<u2")
    told = np.ones(len(tokens), bool)
    for first, document in zip(firsts, documents, strict=True):
        told[first + 1 : first + len(document) + 2] = False
    return Layout(tokens, told, firsts)


NOTHING = np.zeros(0, "<u2")


def rivals(data: bytes) -> dict[str, int]:
    """The bytes of `data` packed by other programs, each at its best."""
    import brotli

    return {
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "brotli": len(brotli.compress(data, quality=11, lgwin=24)),
        "zstd": len(zstandard.ZstdCompressor(level=22).compress(data)),
    }


def pack_files(texts: Texts, contents: dict[str, bytes]) -> dict[str, Packed]:
    """The files by name as tokens and patches, which is tried."""
    parts = {name: texts.pack(data) for name, data in contents.items()}
    for name, part in parts.items():
        if texts.unpack(part) != contents[name]:
            raise Stop(f"{name}: does not come back from its tokens and patch: a bug, nothing was written")
    return parts


class Job(NamedTuple):
    """How to code: the stage and settings of the evaluation, torch's threads, whether to show a bar."""

    stage: str = ""  # the last
    changes: dict[str, Any] = {}
    threads: int = 1
    show: bool = False


def compress_files(
    artifact: Artifact,
    texts: Texts,
    contents: dict[str, bytes],
    parts: dict[str, Packed],
    job: Job,
    around: list[np.ndarray] | None = None,
) -> tuple[bytes, Coded | None]:
    """(the container of the files by name, what coding their tokens gave: None if there are none).

    `around` are pieces of text that the decoder is told before, between and behind the files that have
    tokens.
    """
    documents = [part.tokens for part in parts.values() if len(part.tokens)]
    around = around or [NOTHING] * (len(documents) + 1)
    config = coding_config(artifact, job.changes)
    stage = job.stage or last_stage(config)
    coded = None
    if documents:
        layout = lay_out(documents, around, texts.bos)
        args = (stage, job.threads, texts.path, layout.tokens, layout.told)
        coded = code_tokens(artifact, config, *args, show=job.show)
    stream = coded.stream if coded else b""
    told = squeeze(np.concatenate(around).astype("<u2").tobytes()) if any(map(len, around)) else b""
    head = Head(
        [[name, p.kind, len(p.tokens), len(p.patch)] for name, p in parts.items()],
        len(stream),
        list(map(len, around)) if told else [],
        len(told),
        hashlib.sha256(b"".join(contents.values())).hexdigest()[: 2 * HALF],
        stage,
        job.changes,
        settings_digest(config),
        texts.digest,
        texts.transform,
        job.threads,
        machine(),
    )
    body = stream + told + b"".join(part.patch for part in parts.values())
    return write_container(artifact, head, body), coded


def decompress_files(artifact: Artifact, texts: Texts, path: Path, show: bool = False) -> dict[str, bytes]:
    """The files by name in the container at `path`; Stop if they do not come out as they went in."""
    head, body = read_container(path, artifact)
    if head.tokenizer != texts.digest:
        raise Stop(
            f"{path}: made with the tokenizer {head.tokenizer}..., here is {texts.digest}...; "
            "give its file with --tokenizer"
        )
    texts = texts._replace(transform=head.transform)
    config = coding_config(artifact, head.changes)
    if settings_digest(config) != head.settings:
        raise Stop(
            f"{artifact.path.parent / 'config.json'}: the settings are not those that {path} was made with "
            f"({settings_digest(config)} here, {head.settings} there); copy it again"
        )
    other = f"{head.machine}, {head.threads} threads; here is {machine()}"
    try:
        contents = decode_body(artifact, texts, config, head, body, show)
    except (ValueError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise Stop(f"{path}: cannot be decoded here ({error}); it was made with {other}") from None
    if hashlib.sha256(b"".join(contents.values())).hexdigest()[: 2 * HALF] != head.text:
        raise Stop(f"{path}: another text came out; decode it where it was made: {other}")
    return contents


def decode_body(
    artifact: Artifact, texts: Texts, config: Any, head: Head, body: bytes, show: bool
) -> dict[str, bytes]:
    """The files by name, from what follows the head; ValueError and the like if that does not fit."""
    stream, told, patches = np.split(np.frombuffer(body, np.uint8), np.cumsum([head.stream, head.told]))
    counts = [count for _, _, count, _ in head.files if count]
    around = [NOTHING] * (len(counts) + 1)
    if head.told:
        given = np.frombuffer(squeeze(told.tobytes(), undo=True), "<u2")
        around = np.split(given, np.cumsum(head.around)[:-1])
    documents = [np.zeros(count, "<u2") for count in counts]
    if documents:
        layout = lay_out(documents, around, texts.bos)
        args = (head.stage, head.threads, texts.path, layout.tokens, layout.told, stream.tobytes(), show)
        tokens = code_tokens(artifact, config, *args).tokens
        again = [tokens[first + 1 :][:count] for first, count in zip(layout.firsts, counts, strict=True)]
        if not np.array_equal(lay_out(again, around, texts.bos).tokens, tokens):
            raise ValueError("the documents have other ends")
        documents = again

    contents = {}
    left = iter(documents)
    begin = 0
    for name, kind, count, size in head.files:
        patch = patches[begin : begin + size].tobytes()
        contents[name] = texts.unpack(Packed(kind, next(left) if count else NOTHING, patch))
        begin += size
    return contents


def describe_compression(contents: dict[str, bytes], size: int, coded: Coded | None, seconds: float) -> str:
    """What compress says at its end."""
    data = b"".join(contents.values())
    total = max(1, len(data))
    others = rivals(data)
    shown = ", ".join(f"{name} {count:,} ({total / count:.2f})" for name, count in others.items())
    lines = [
        f"{len(data):,} bytes in {len(contents)} files -> {size:,} (ratio {total / size:.2f}); {shown}",
        f"{seconds:.1f} s, {len(data) / 1e6 / seconds:.4f} MB/s",
    ]
    if coded is not None:
        recorded = coded.recorded.sum() / math.log(2) / 8
        tokens = len(coded.tokens) - 1
        lines.append(
            f"{tokens:,} tokens in {len(coded.stream):,} bytes; their score is {recorded:,.1f} "
            f"({len(coded.stream) / recorded - 1:+.3%}); {tokens / seconds:.0f} tokens/s"
        )
    return "\n".join(lines)


def compress(options: argparse.Namespace) -> None:
    """The command."""
    names = names_of(options.files)
    contents = {}
    for name, path in zip(names, options.files, strict=True):
        contents[name] = path.read_bytes()
    artifact = open_artifact(options.artifact)
    texts = load_texts(artifact, options.tokenizer)
    parts = pack_files(texts, contents)
    changes: dict[str, Any] = changes_of_environment(artifact.trainer)
    # A batch of documents has rows for these, and none for documents that are not there.
    count = sum(len(part.tokens) > 0 for part in parts.values())
    rows = artifact.run.config.get("TTT_BATCH_SIZE", count)
    changes.setdefault("TTT_BATCH_SIZE", max(1, min(rows, count)))
    job = Job(options.stage, changes, options.threads, sys.stderr.isatty())
    began = time.monotonic()
    container, coded = compress_files(artifact, texts, contents, parts, job)
    seconds = time.monotonic() - began
    write_atomically(options.out, container)
    print(describe_compression(contents, len(container), coded, seconds))


def decompress(options: argparse.Namespace) -> None:
    """The command."""
    artifact = open_artifact(options.artifact)
    head, _ = read_container(options.container, artifact)
    for name, *_ in head.files:
        if Path(name).name != name or name == "..":
            raise Stop(f"{options.container}: {name!a} is not the name of a file; nothing was written")
        if (options.out / name).exists():
            raise Stop(f"{options.out / name}: is there already; give another folder with -o")
    if head.machine != machine():
        warn(f"{options.container}: made by {head.machine}, here is {machine()}; the last bits may differ")
    texts = load_texts(artifact, options.tokenizer)
    began = time.monotonic()
    contents = decompress_files(artifact, texts, options.container, sys.stderr.isatty())
    seconds = time.monotonic() - began
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        write_atomically(options.out / name, data)
    total = sum(map(len, contents.values()))
    print(f"{len(contents)} files, {total:,} bytes in {options.out}: as they were; {seconds:.1f} s")


# === SAMPLE ===
# In: a prompt. Out: text, token by token. Keys and values are kept from token to token as a mixture keeps
# them (section MIXTURE of the trainer): a token costs one forward of one token, whatever lies before it.


class Taste(NamedTuple):
    """How to choose a token: by its probability to the power 1 / `temperature` (0: always the likeliest).

    Of the tokens that together have `top_p`, the likeliest first.
    """

    temperature: float
    top_p: float


def choose_token(log_p: Tensor, taste: Taste, random: torch.Generator) -> int:
    """A token from its log-probabilities (V,)."""
    if taste.temperature == 0:
        return int(log_p.argmax())
    p, tokens = (log_p / taste.temperature).softmax(0).sort(descending=True)
    p[p.cumsum(0) - p >= taste.top_p] = 0  # never the first
    return int(tokens[torch.multinomial(p, 1, generator=random)])


class Speaker:
    """The model with a cache of keys: one token after another."""

    def __init__(self, artifact: Artifact, config: Any, tokenizer: Path, context: int):
        trainer = artifact.trainer
        self.trainer = trainer
        self.context = context
        found = []
        first = np.array([trainer.BOS, trainer.BOS], "<u2")
        validation = trainer.Validation(first, np.zeros(2, np.int32), "codec")

        def keep(run: Any, model: Any, modes: dict) -> None:
            found.append((run, model))

        evaluate(trainer, config, torch.get_num_threads(), tokenizer, validation, keep)
        self.run, self.model = found[0]
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        trainer = self.trainer
        device = self.run.device
        longest = self.context - 1
        if hasattr(trainer, "Turn"):
            self.cache = trainer.KeyCache(self.model, 1, longest, 1, device)
            self.cached = longest
        else:  # a script before turns
            self.cached = trainer.Stage(sys.maxsize, 1, longest)
            self.cache = trainer.KeyCache(self.model, 1, [self.cached], device)
        self.position = torch.zeros(1 if hasattr(trainer, "Turn") else (), dtype=torch.int64, device=device)
        self.previous = torch.zeros(1, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def hear_token(self, token: int) -> Tensor:
        """Log-probabilities (V,) of the token after this one."""
        ids = torch.tensor([[token]], device=self.run.device)
        past = self.cache.past(self.position, self.previous, self.cached)
        with hear(self.trainer, self.model) as heard:
            self.model(self.trainer.Batch(ids, ids, past=past))
        self.cache.keep(past)
        self.position = self.position + 1
        self.previous = ids
        return heard.log_softmax(heard.logits[0])

    def speak(self, prompt: np.ndarray, taste: Taste, seed: int) -> Iterator[int]:
        """The tokens after a BOS and those of the `prompt` (N,), until the model ends the document."""
        bos = self.trainer.BOS
        random = torch.Generator().manual_seed(seed)
        self.begin()
        for token in (bos, *prompt.tolist()):
            log_p = self.hear_token(token)
        token = choose_token(log_p, taste, random)
        while token != bos:
            yield token
            token = choose_token(self.hear_token(token), taste, random)


def settled(text: str, stop: str) -> str:
    """The part of a text that later tokens do not change, and that does not begin what ends it."""
    text = text.rstrip("\ufffd")  # half a character
    sizes = range(min(len(stop), len(text) + 1) - 1, 0, -1)
    held = next((size for size in sizes if text.endswith(stop[:size])), 0)
    return text[: len(text) - held]


def stream_text(
    texts: Texts, prompt: np.ndarray, tokens: Iterator[int], most: int, stop: str, write: Callable[[str], Any]
) -> int:
    """Write the text of at most `most` tokens behind the prompt as they come, to `stop`; their number."""
    ids = prompt.tolist()
    begin = len(texts.decode(prompt).decode()) if ids else 0
    shown = begin
    text = ""
    count = 0
    for token in itertools.islice(tokens, most):
        count += 1
        ids.append(token)
        text = texts.decode(np.array(ids, "<u2")).decode()
        if stop and stop in text[begin:]:
            text = text[: text.index(stop, begin)]
            break
        ready = settled(text, stop)
        write(ready[shown:])
        shown = max(shown, len(ready))
    write(text[shown:])
    return count


def sample(options: argparse.Namespace) -> None:
    """The command."""
    artifact = open_artifact(options.artifact)
    texts = load_texts(artifact, options.tokenizer)
    changes: dict[str, Any] = {"TTT_ENABLED": False}
    config = coding_config(artifact, changes)
    if not hasattr(artifact.trainer, "KeyCache"):
        raise Stop(f"{artifact.path.parent / SCRIPT}: keeps no keys; make the artifact with a later script")
    speaker = Speaker(artifact, config, texts.path, options.context or config.eval_seq_len)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    def answer(prompt: str) -> None:
        tokens = texts.encode(prompt)
        write(prompt)
        began = time.monotonic()
        taste = Taste(options.temperature, options.top_p)
        spoken = speaker.speak(tokens, taste, options.seed)
        count = stream_text(texts, tokens, spoken, options.tokens, options.stop, write)
        seconds = time.monotonic() - began
        print(flush=True)
        print(f"{count} tokens, {(len(tokens) + count) / seconds:.0f} tokens/s", file=sys.stderr)

    if not options.interactive:
        answer(options.prompt)
        return
    print("a line is a prompt; an empty one, or the end of the input, ends this", file=sys.stderr)
    for line in sys.stdin:
        if not line.strip():
            break
        answer(line.rstrip("\n"))


# === EXPORT ===
# In: an artifact. Out: a folder that transformers loads (trust_remote_code): the weights in fp32, the source
# of the script that made them, and the two small files in hf/ that call it.


def source_of(artifact: Artifact) -> str:
    """The source of the script that made the artifact, as transformers can load it.

    There a module's name has dots, which the script's name for its operators must not have.
    """
    path = artifact.path.parent / SCRIPT
    lines = linecache.getlines("<train_gpt>")  # where it registers itself
    packed = path.read_bytes().startswith(b"# coding: latin-1")
    source = "".join(lines) if packed else path.read_text(encoding="utf-8")
    return re.sub(r"__name__(?=\.strip\()", "__name__.replace('.', '_')", source)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The tensors in fp32 as a safetensors file: 8 bytes of length, a JSON head, the values."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + 4 * tensor.numel()
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    values = b"".join(tensor.float().contiguous().numpy().tobytes() for tensor in tensors.values())
    write_atomically(path, struct.pack("<Q", len(text)) + text + values)


def model_card(artifact: Artifact, digest: str) -> str:
    """README.md: what this is, with the figures of the run if it is finished."""
    run = artifact.run
    facts = run.summary if run.is_finished else {}
    shown = {
        "bits per byte on the validation set": facts.get("val_bpb"),
        "nats per token": facts.get("val_loss"),
        "validation tokens": facts.get("val_tokens"),
        "bytes of the artifact": artifact.path.stat().st_size,
        "bytes with the code": facts.get("total_bytes"),
        "training steps": facts.get("steps"),
        "seconds of training": facts.get("train_seconds"),
        "seed": facts.get("seed"),
    }
    shown |= {f"bits per byte, {stage}": bpb for stage, bpb in facts.get("bpb", {}).items()}
    rows = [f"| {name} | {value} |" for name, value in shown.items() if value is not None]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "# A Parameter Golf model",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)',
            "```",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "The weights are those of the artifact, unpacked to fp32, without test-time training; scores of",
            "stages called `ttt` are with it. Padding has to be on the right; there is no cache of keys.",
            f"Artifact sha256: `{artifact.digest.hex()}`; tokenizer: `{digest}...`.",
            "",
        ]
    )


def export_hf(artifact: Artifact, texts: Texts, folder: Path) -> None:
    """Write a folder for transformers."""
    trainer = artifact.trainer
    manifest, tensors, _ = trainer.decode_artifact(artifact.path)
    config = coding_config(artifact, {"COMPUTE_DTYPE": "float32"})
    table = trainer.parameter_table(config)
    weights = trainer.assemble_weights(table, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {f"golf.{name}": weights[name].cpu() for name in table})
    settings = {
        name: trainer.format_value(value)
        for name, value in config.chosen("Model").items()
        if value != trainer.Config.from_env({}).chosen("Model")[name]
    }
    about = {
        "architectures": ["GolfForCausalLM"],
        "model_type": "golf",
        "auto_map": {
            "AutoConfig": "modeling_golf.GolfConfig",
            "AutoModelForCausalLM": "modeling_golf.GolfForCausalLM",
        },
        "settings": settings,
        "looped": manifest["looped"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "bos_token_id": texts.bos,
        "eos_token_id": texts.bos,
        "pad_token_id": 0,
        "use_cache": False,
        "torch_dtype": "float32",
    }
    kind = {
        "tokenizer_class": "GolfTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_golf.GolfTokenizer", None]},
        "transform": texts.transform,
    }
    for name, content in (("config.json", about), ("tokenizer_config.json", kind)):
        (folder / name).write_text(json.dumps(content, indent=1))
    for path in (ROOT / "hf" / "modeling_golf.py", ROOT / "hf" / "tokenization_golf.py"):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "lossless_caps.py", folder / "golf_transforms.py")
    (folder / "golf_trainer.py").write_text(source_of(artifact), encoding="utf-8")
    (folder / "README.md").write_text(model_card(artifact, texts.digest), encoding="utf-8")
    write_atomically(folder / "tokenizer.model", texts.path.read_bytes())


def export(options: argparse.Namespace) -> None:
    """The command."""
    artifact = open_artifact(options.artifact)
    texts = load_texts(artifact, options.tokenizer)
    if options.folder.exists() and any(options.folder.iterdir()):
        raise Stop(f"{options.folder}: is not empty; give a new folder")
    export_hf(artifact, texts, options.folder)
    print(f"{options.folder}: for transformers, with trust_remote_code=True")


# === MAIN ===


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, act: Callable, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(act=act)
        command.add_argument("artifact", type=Path, help="final_model.ptz in the folder of its run")
        command.add_argument(
            "--tokenizer", type=Path, help="its tokenizer (default: beside it, else the dataset's)"
        )
        return command

    command = add("compress", compress, "Compress files losslessly with the run's own evaluation.")
    command.add_argument("files", type=Path, nargs="+", help="any files; text is what the model knows")
    command.add_argument("-o", "--out", type=Path, required=True, help="the container to write")
    command.add_argument(
        "--stage",
        default="",
        choices=("", "quantized", "sliding", "ttt"),
        help="the stage of the evaluation to code with (default: the last); only ttt learns from the text",
    )
    command.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch, here and when it is decoded"
    )
    command = add("decompress", decompress, "Get the files of a container back.")
    command.add_argument("container", type=Path, help="what compress has written")
    command.add_argument("-o", "--out", type=Path, default=Path(), help="the folder to write them to")
    command = add("sample", sample, "Write text that the model goes on with.")
    command.add_argument("--prompt", default="", help="how the text begins")
    command.add_argument("--tokens", type=int, default=200, help="at most so many (default %(default)s)")
    command.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    command.add_argument("--top-p", type=float, default=0.95, help="only tokens that have so much together")
    command.add_argument("--seed", type=int, default=0, help="of the choice (default %(default)s)")
    command.add_argument("--stop", default="", help="text that ends it")
    command.add_argument("--context", type=int, default=0, help="tokens that are seen (default EVAL_SEQ_LEN)")
    command.add_argument("--interactive", action="store_true", help="every line of the input is a prompt")
    command = add("export", export, "Write the model in the form of another library.")
    command.add_argument("--to", choices=("hf",), required=True, help="hf: transformers")
    command.add_argument("folder", type=Path, help="a new folder")
    parser.epilog = "".join(command.format_usage() for command in commands.choices.values())
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    options.act(options)


if __name__ == "__main__":
    run_tool(main)
