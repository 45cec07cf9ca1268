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
import importlib.metadata
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

import constriction
import numpy as np
import safetensors.numpy
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
    *("KeyCache", "Mixture", "Copies", "Turn", "mixed_chunk", "mix_experts"),
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
            f"{path}: has no {', '.join(missing)}, which this tool uses; make the artifact again with this "
            "version's STAGE=quantize"
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


class CapturedLogits:
    """The logits of the latest forward (N, V), as the trainer's loss function got them."""

    def __init__(self) -> None:
        self.logits = torch.zeros(0)
        self.cap = 0.0

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities (..., V) in fp64 on the host of some of them."""
        return (self.cap * torch.tanh(logits.double().cpu() / self.cap)).log_softmax(-1)


@contextlib.contextmanager
def capture_logits(trainer: ModuleType, model: Any) -> Iterator[CapturedLogits]:
    """Listen to every forward for a while."""
    captured = CapturedLogits()
    if not hasattr(model, "shows_logits"):
        raise Stop(
            f"{SCRIPT}: an older script, which does not show its logits; make the artifact with a later one"
        )

    def capturing(function: Callable) -> Callable:
        def losses_of(logits: Tensor, targets: Tensor, cap: float) -> Any:
            captured.logits = logits.detach()
            captured.cap = cap
            return function(logits, targets, cap)

        return losses_of

    names = ("softcapped_ce_reference", "softcapped_ce_op")
    ours = {name: capturing(getattr(trainer, name)) for name in names}
    with patched(trainer, **ours), patched(model, shows_logits=True):
        yield captured


# === PROBABILITIES AND THE RANGE CODER ===
# In: a distribution over the vocabulary, as fp64 logarithms. Out: whole numbers, the one form in which both
# sides see a probability, and constriction's model of these for its range coder.

WORD_BYTES = 4  # a stream is a whole number of constriction's words
COUNT_BITS = 24  # constriction's; the counts of a distribution add up to 2^24, none is 0


def quantise_distribution(log_p: np.ndarray) -> np.ndarray:
    """The counts (V,) int64 of a distribution `log_p` (V,) in nats; they add up to 2^COUNT_BITS, none is 0.

    Whatever the sum of the probabilities was, it is 1 here. Stop if one of them is not a number.
    """
    p = np.exp(log_p - log_p.max())
    total = p.sum()
    if not math.isfinite(total):
        raise Stop("the evaluation gives a probability that is not a number; the artifact cannot be used")
    size = len(p)
    counts = (p * (((1 << COUNT_BITS) - size) / total)).astype(np.int64) + 1
    counts[p.argmax()] += (1 << COUNT_BITS) - counts.sum()
    return counts


def entropy_model(counts: np.ndarray) -> constriction.stream.model.Categorical:
    """Exactly these `counts` (V,) as constriction's model of one token.

    It scales what it is given to 2^COUNT_BITS - V, rounds down and adds 1: here it has nothing to round.
    """
    return constriction.stream.model.Categorical((counts - 1).astype(np.float64), lazy=True)


def open_stream(stream: bytes) -> constriction.stream.queue.RangeDecoder:
    """What decodes a code stream, little-endian words of 32 bits."""
    return constriction.stream.queue.RangeDecoder(np.frombuffer(stream, "<u4").astype(np.uint32))


def decode_token(decoder: constriction.stream.queue.RangeDecoder, model: Any) -> int:
    """The next token; a damaged stream gives any, or Stop where no token has its number."""
    try:
        return int(decoder.decode(model))
    except AssertionError as error:  # how constriction says it
        raise Stop(f"the code stream does not fit the distributions of the evaluation ({error})") from None


# === ONE EVALUATION THAT CODES ===
# In: one stage of the evaluation, and tokens that are known (encoder) or not yet (decoder). Out: a stream, or
# the tokens. A forward is taken apart into wavefronts (`plan_wavefronts`): each codes the targets whose
# inputs are all known, one of each row. The encoder runs a forward once, as ever, and codes its targets in
# that order. The decoder runs it once for every wavefront, in the same shapes, with 0 for what it does not
# know, and then once more with all of it, from which the evaluation goes on. Both see the same distributions
# bit by bit if the kernels are deterministic and no value of a later token touches an earlier position. The
# decoder looks whether that holds: the distributions of its last forward must be those that it has decoded
# with. Side information is text between the coded documents; the decoder has it, each token at its turn.


class Wavefront(NamedTuple):
    """Positions of side information, then targets that are coded at once: (position, row, column)."""

    side: list[int]
    targets: list[tuple[int, int, int]]


def plan_wavefronts(
    first: np.ndarray, count: np.ndarray, scored: np.ndarray, known: np.ndarray, side: np.ndarray
) -> list[Wavefront]:
    """The order in which the targets of a forward become known.

    Row r has the targets first[r] ... first[r] + count[r] - 1; `scored` (R, T) marks those that count. A
    position in `side` (N,) is known as soon as all before it in its row are. Stop if a row needs a target
    that nobody codes.
    """
    known = known.copy()
    position = first.copy()
    end = first + count
    rows = [row for row in range(len(first)) if not known[first[row] : end[row]].all()]
    wavefronts = []
    while rows:
        wavefront = Wavefront([], [])
        left = []
        for row in rows:
            while position[row] < end[row]:
                here = int(position[row])
                column = here - int(first[row])
                if not known[here]:
                    if not scored[row, column]:
                        break
                    if not side[here]:
                        wavefront.targets.append((here, row, column))
                        break
                    wavefront.side.append(here)
                    known[here] = True
                position[row] += 1
            if position[row] < end[row]:
                left.append(row)
        known[[here for here, _, _ in wavefront.targets]] = True
        if left and not wavefront.targets and len(left) == len(rows) and not wavefront.side:
            raise Stop(
                f"target {int(position[left[0]])} is read before it is scored: the evaluation is not causal"
            )
        wavefronts.append(wavefront)
        rows = left
    return wavefronts


class Windows(NamedTuple):
    """A call of window_batch: its arguments, and the targets of its rows as plan_wavefronts wants them."""

    arguments: tuple
    first: np.ndarray
    count: np.ndarray
    scored: np.ndarray
    width: int


class StageCoder:
    """Watches one stage of the evaluation, and codes every target before the stage goes on.

    `tokens` (N,) uint16 are the text of the stage. With a `stream` they are filled: where `side` (N,) is true
    from `side_tokens` once it is their turn, elsewhere from the stream. `nats` (N,) are what each target has
    cost.
    """

    def __init__(
        self,
        trainer: ModuleType,
        model: Any,
        tokens: np.ndarray,
        side: np.ndarray,
        advance: Callable[[int], Any],
        stream: bytes | None = None,
        side_tokens: np.ndarray | None = None,
    ):
        self.trainer = trainer
        self.model = model
        self.tokens = tokens
        self.side = side
        self.advance = advance
        self.side_tokens = side_tokens
        self.encoder = constriction.stream.queue.RangeEncoder()  # unused with a stream
        self.decoder = None if stream is None else open_stream(stream)
        self.known = np.zeros(len(tokens), bool)
        self.known[0] = True
        self.nats = np.zeros(len(tokens))
        self.windows: Windows | None = None  # of the next forward
        self.chunk: tuple | None = None  # the arguments of mixed_chunk, for a mixture
        self.wavefronts: list[Wavefront] = []
        self.captured = CapturedLogits()
        self.histories: dict[int, np.ndarray] = {}  # what a document may copy from, by its first position
        self.seen: dict[int, Tensor] = {}  # the logits that a target was decoded with, by its position

    def __enter__(self) -> StageCoder:
        trainer = self.trainer
        self.stack = contextlib.ExitStack()
        ours = {"window_batch": self.window_batch, "mixed_chunk": self.mixed_chunk}
        self.run_chunk = trainer.Mixture.run_chunk
        self.stack.enter_context(patched(trainer.Mixture, run_chunk=self.coded_chunk()))
        self.real = {name: getattr(trainer, name) for name in ours}
        self.stack.enter_context(patched(trainer, **ours))
        self.real_masked = trainer.Tally.masked

        def masked(tally: Any, *arguments: Any) -> Any:
            return self.masked(tally, *arguments)

        self.stack.enter_context(patched(trainer.Tally, masked=masked))
        if self.decoder is not None:
            self.real_find = trainer.Copies.find

            def find(copies: Any, first: int, end: int) -> None:
                self.first_find(copies, first, end)

            self.stack.enter_context(patched(trainer.Copies, find=find))
        self.captured = self.stack.enter_context(capture_logits(trainer, self.model))
        self.stack.callback(
            self.model.register_forward_pre_hook(self.before_forward, with_kwargs=True).remove
        )
        self.stack.callback(self.model.register_forward_hook(self.after_forward).remove)
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

    def plan(self) -> list[Wavefront]:
        """The wavefronts of the forward that comes."""
        windows = self.windows
        if windows is None or self.known[windows.first.min() : (windows.first + windows.count).max()].all():
            return []
        return plan_wavefronts(windows.first, windows.count, windows.scored, self.known, self.side)

    def before_forward(self, model: Any, args: tuple, named: dict[str, Any]) -> None:
        """A forward of whole windows begins; the decoder finds out what it holds."""
        if self.chunk is not None:  # see coded_chunk
            return
        self.wavefronts = self.plan()
        if self.decoder is None or not self.wavefronts:
            return
        batch = args[0]

        def rebuild() -> None:
            self.refill(batch, self.real["window_batch"](*self.windows.arguments)[0])

        def forward() -> Callable[[int, int], tuple[Tensor, np.ndarray]]:
            model.forward(*args, **named)
            return self.plain_distribution

        self.decode(rebuild, forward)

    def after_forward(self, model: Any, args: tuple, output: Any) -> None:
        """That forward has ended, with all of its tokens known."""
        if self.chunk is None:
            self.settle(self.plain_distribution)
            self.windows = None

    def coded_chunk(self) -> Callable:
        """In place of Mixture.run_chunk: the chunk is coded before its losses are given out."""

        def run_chunk(mixture: Any, chunk: Any, cached: Any) -> Any:
            real = self.run_chunk
            self.wavefronts = self.plan()

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
        """Find the targets of `self.wavefronts`, with a forward for each, and leave the batch complete."""
        for wavefront in self.wavefronts:
            self.reveal(wavefront.side)
            if wavefront.targets:
                rebuild()
                distribution = forward()
                for position, row, column in wavefront.targets:
                    logits, log_p = distribution(row, column)
                    self.seen[position] = logits.clone()
                    self.tokens[position] = self.code(position, log_p)
                    self.known[position] = True
        rebuild()

    def settle(self, distribution: Callable[[int, int], tuple[Tensor, np.ndarray]]) -> None:
        """Code what the encoder has just scored; the decoder compares that with what it has decoded by."""
        for wavefront in self.wavefronts:
            if self.decoder is None:
                self.reveal(wavefront.side)
            for position, row, column in wavefront.targets:
                if self.decoder is None:
                    self.code(position, distribution(row, column)[1])
                    self.known[position] = True
                elif not torch.equal(self.seen.pop(position), distribution(row, column)[0]):
                    raise Stop(
                        f"target {position}: its distribution is another one when later tokens are known: "
                        "the evaluation is not causal, or not deterministic on this machine"
                    )
        self.wavefronts = []

    def reveal(self, positions: list[int]) -> None:
        """It is the turn of side information."""
        self.known[positions] = True
        if self.side_tokens is not None:
            self.tokens[positions] = self.side_tokens[positions]

    def code(self, position: int, log_p: np.ndarray) -> int:
        """Encode the token at `position`, or decode one; also counts what it costs."""
        counts = quantise_distribution(log_p)
        model = entropy_model(counts)
        if self.decoder is None:
            token = int(self.tokens[position])
            self.encoder.encode(token, model)
        else:
            token = decode_token(self.decoder, model)
        self.nats[position] = COUNT_BITS * math.log(2) - math.log(counts[token])
        self.advance(1)
        return token

    def finish(self) -> bytes:
        """The stream, empty from a decoder; Stop if a target was never scored, or not all of it was read."""
        if not self.known.all():
            raise Stop(
                f"target {int(self.known.argmin())} was scored by no forward of the evaluation; "
                "it cannot be coded"
            )
        if self.decoder is None:
            return self.encoder.get_compressed().astype("<u4").tobytes()
        if not self.decoder.maybe_exhausted():
            raise Stop("the code stream is longer than the text that it gives")
        return b""

    # Distributions.

    def plain_distribution(self, row: int, column: int) -> tuple[Tensor, np.ndarray]:
        """The logits (V,) and the log-probabilities (V,) of one target."""
        logits = self.captured.logits[row * self.windows.width + column]
        return logits, self.captured.log_softmax(logits).numpy()

    def mixed_distribution(self, mixer: Any, chunk: Any, losses: Tensor) -> Callable:
        """The same from a mixture: the trainer's own, for every token of the vocabulary.

        `losses` (3, R, K, T) are those of targets and copies. Of what it learns within a chunk, the
        weights of the adapters (its `within`) are the only part that counts in the same chunk.
        """
        trainer = self.trainer
        log_p_scored = -losses.detach().double()
        scored = chunk.scored[:, None]
        before, _ = trainer.mix_experts(mixer.within, log_p_scored[0] * scored)
        experts = self.captured.logits.unflatten(0, (*log_p_scored.shape[1:],))  # (R, K, T, V)

        def distribution(row: int, column: int) -> tuple[Tensor, np.ndarray]:
            logits = experts[row, :, column]
            size = logits.size(1)
            fresh_mixer = copy.copy(mixer)
            fresh_mixer.within = before[row, :, column].repeat(size, 1)
            experts_log_p = self.captured.log_softmax(logits).T.to(log_p_scored.device)  # (V, K)
            guesses = chunk.batch.guesses[:, row, column]
            # Of copies too: what the forward gives for these is rounded with the target's.
            copied = [experts_log_p[guess].expand_as(experts_log_p) for guess in guesses]
            log_p = torch.stack((experts_log_p, *copied))
            targets = torch.arange(size, device=log_p_scored.device)[:, None]
            every_token = chunk._replace(
                batch=chunk.batch._replace(
                    targets=targets, guesses=guesses.view(-1, 1, 1).repeat(1, size, 1)
                ),
                scored=torch.ones_like(targets, dtype=torch.bool),
                match=chunk.match[:, row : row + 1, column : column + 1].repeat(1, size, 1),
            )
            return logits, fresh_mixer.mix(log_p[..., None], every_token)[:, 0].cpu().numpy()

        return distribution

    def find_copies(self, copies: Any) -> None:
        """Look for copies again, in what is known of the documents of the chunk."""
        for first, end in self.chunk[1].documents:  # of a turn
            unknown = np.flatnonzero(~self.known[first + 1 : end])
            known_end = first + 2 + int(unknown[0]) if len(unknown) else end
            copies.tokens[:, first + 1 : end] = 0  # its BOS is the last target of the document before
            copies.lengths[:, first + 1 : end] = 0
            if end > first:
                now = copies.history_table
                copies.history_table = self.histories[int(first)]
                self.real_find(copies, first, known_end)
                copies.history_table = now

    def first_find(self, copies: Any, first: int, end: int) -> None:
        """The trainer's Copies.find when a document begins: of others it sees those entered by then."""
        self.histories[int(first)] = copies.history_table.copy()
        self.real_find(copies, first, end)

    def masked(self, tally: Any, batch: Any, chosen: Tensor, positions: Tensor) -> Any:
        """The trainer's Tally.masked, and remembered."""
        self.mask = (tally, chosen, positions)
        return self.real_masked(tally, batch, chosen, positions)

    def refill(self, batch: Any, fresh: Any) -> None:
        """Put the tokens of a `fresh` batch into the one that is scored, and what they allow after them."""
        batch.inputs.copy_(fresh.inputs)
        batch.targets.copy_(fresh.targets)
        if getattr(batch, "mask", None) is not None:
            tally, chosen, positions = self.mask
            rows = torch.from_numpy(tally.run.canonical.rows(self.tokens)).to(batch.mask.rows.device)
            tally.mask = tally.mask._replace(rows=rows)
            batch.mask.rows.copy_(self.real_masked(tally, batch, chosen, positions).mask.rows)


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
    side: np.ndarray,
    stream: bytes | None = None,
    show: bool = False,
) -> Coded:
    """Code `tokens` (N,) uint16 with a stage of the evaluation, or with a `stream` decode them.

    `side` (N,) marks positions that are not coded but known once it is their turn, the first among them. A
    decoder reads of `tokens` only these, and the positions of BOS where the evaluation goes by documents
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
        bar = tqdm(total=int((~side).sum()), unit=" tokens", file=sys.stderr, disable=not show)
        side_tokens = None if stream is None else tokens
        with bar, StageCoder(trainer, model, text, side, bar.update, stream, side_tokens) as coder:
            modes[stage](tally)
        tally.total(stage)
        recorded = tally.nats.double().cpu().numpy()
        found.append(Coded(coder.finish(), text, coder.nats, recorded))

    evaluate(trainer, config, threads, tokenizer, validation, score)
    return found[0]


# === TEXT ===
# In: the bytes of a file. Out: tokens of the model, and a patch that makes what these decode to the very
# bytes again: most tokenizers normalise whitespace, and not every file is UTF-8.

KINDS = ("raw", "same", "spaces", "delta")
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
WORD = re.compile(rb"\S+")
WORD_MARK = b"x"  # of a word in a patch of spaces
MOST_INVALID = 0.05  # a file with a larger share of characters that are not UTF-8 is not text
ZSTD_WINDOW = 27  # bits


def lzma_raw(data: bytes, undo: bool = False) -> bytes:
    """`data` through LZMA without a header, or back."""
    act = lzma.decompress if undo else lzma.compress
    return act(data, lzma.FORMAT_RAW, filters=LZMA)


def zstd_delta(known: bytes, data: bytes, undo: bool = False) -> bytes:
    """`data` through zstd that knows the bytes `known`, or back."""
    dictionary = zstandard.ZstdCompressionDict(known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    if undo:
        reader = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << ZSTD_WINDOW)
        return reader.decompress(data)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, window_log=ZSTD_WINDOW, enable_ldm=True, write_checksum=False
    )
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(data)


class TokenizedFile(NamedTuple):
    """A file as tokens (N,) uint16 and a patch of one of KINDS."""

    kind: str
    tokens: np.ndarray
    patch: bytes


class TextCodec(NamedTuple):
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

    def tokenize(self, data: bytes) -> TokenizedFile:
        """A file as tokens and a patch."""
        text = data.decode("utf-8", "replace")
        tokens = np.zeros(0, "<u2")
        if text.count("\ufffd") <= MOST_INVALID * len(text):
            tokens = self.encode(text)
        if not len(tokens):
            return TokenizedFile("raw", tokens, lzma_raw(data) if data else b"")
        found = self.decode(tokens)
        if found == data:
            return TokenizedFile("same", tokens, b"")
        if found.split() == data.split():
            return TokenizedFile("spaces", tokens, lzma_raw(WORD.sub(WORD_MARK, data)))
        return TokenizedFile("delta", tokens, zstd_delta(found, data))

    def restore(self, file: TokenizedFile) -> bytes:
        """The file again."""
        if file.kind == "raw":
            return lzma_raw(file.patch, undo=True) if file.patch else b""
        found = self.decode(file.tokens)
        if file.kind == "delta":
            return zstd_delta(found, file.patch, undo=True)
        if file.kind == "spaces":
            spaces = lzma_raw(file.patch, undo=True).split(WORD_MARK)
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


def load_texts(artifact: Artifact, given: Path | None = None) -> TextCodec:
    """How files become tokens; Stop if there is no tokenizer of the run's vocabulary."""
    trainer = artifact.trainer
    path = find_tokenizer(artifact, given)
    size = artifact.run.setting("VOCAB_SIZE")
    try:
        pieces = trainer.load_tokenizer(path, size)
    except trainer.Stop:
        reason = f"not a SentencePiece model of {size} entries" if path.exists() else "no such file"
        raise Stop(f"{path}: {reason}; give the tokenizer of the run's dataset with --tokenizer") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return TextCodec(path, pieces, digest, find_transform(path, pieces), trainer.BOS)


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
#     52 + H         the code stream, the side information, the patches of the files: as long as the head says

MAGIC = b"GOLFTXT1"
PREAMBLE = struct.Struct("<8sQ16s16sI")
CHECKED_FROM = 32  # where what the checksum covers begins
DIGEST_BYTES = 16  # bytes of a sha256


class Head(NamedTuple):
    """What a decoder needs besides the stream."""

    files: list[list]  # [name, kind, tokens, bytes of the patch]
    stream: int  # bytes
    around: list[int]  # tokens of each piece of side information; empty if there is none
    side: int  # bytes of these through LZMA
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
    programs = f"torch {torch.__version__}, constriction {importlib.metadata.version('constriction')}"
    if torch.cuda.is_available():
        return f"{programs}, {torch.cuda.get_device_name()}"
    return f"{programs}, CPU {torch.backends.cpu.get_cpu_capability()}"


def write_container(artifact: Artifact, head: Head, body: bytes) -> bytes:
    """The container of a head and all that follows it."""
    packed = lzma_raw(json.dumps(head._asdict(), separators=(",", ":")).encode())
    rest = artifact.digest[:DIGEST_BYTES] + struct.pack("<I", len(packed)) + packed + body
    checksum = hashlib.sha256(rest).digest()[:DIGEST_BYTES]
    return MAGIC + struct.pack("<Q", CHECKED_FROM + len(rest)) + checksum + rest


def read_container(path: Path, artifact: Artifact) -> tuple[Head, bytes]:
    """(head, what follows it) of a container of this artifact; Stop if a byte of it is wrong."""
    data = read_input(path)
    if len(data) < PREAMBLE.size or not data.startswith(MAGIC):
        raise Stop(f"{path}: not made by codec.py (it should start with {MAGIC.decode()}); give another file")
    _, size, checksum, digest, head_size = PREAMBLE.unpack_from(data)
    if len(data) != size:
        raise Stop(f"{path}: {len(data)} bytes instead of {size}, truncated or damaged; copy it again")
    if hashlib.sha256(data[CHECKED_FROM:]).digest()[:DIGEST_BYTES] != checksum:
        raise Stop(f"{path}: a byte was changed, the checksum does not fit; copy it again")
    if digest != artifact.digest[:DIGEST_BYTES]:
        raise Stop(
            f"{path}: made with the artifact {digest.hex()}..., {artifact.path} is "
            f"{artifact.digest[:DIGEST_BYTES].hex()}...; give the artifact that it was made with"
        )
    end = PREAMBLE.size + head_size
    try:
        head = Head(**json.loads(lzma_raw(data[PREAMBLE.size : end], undo=True)))
    except (lzma.LZMAError, ValueError, TypeError) as error:
        raise Stop(f"{path}: its head cannot be read ({error}); use the version that made it") from None
    return head, data[end:]


# === COMPRESS AND DECOMPRESS ===


def read_input(path: Path) -> bytes:
    """The content of a file; Stop if it is none."""
    if not path.is_file():
        reason = "a folder" if path.is_dir() else "no such file"
        raise Stop(f"{path}: {reason}; give a file")
    return path.read_bytes()


def check_output(path: Path) -> None:
    """Stop if no file can be written at `path`: that should be known before hours of work."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        reason = "a folder" if path.is_dir() else f"there is no folder {folder}"
        raise Stop(f"-o {path}: {reason}; give a file in a folder that is there")
    if not os.access(folder, os.W_OK):
        raise Stop(f"-o {path}: the folder {folder} cannot be written to; permit it, or give another")


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
    """A text in which some documents are coded and the rest is side information, see lay_out."""

    tokens: np.ndarray  # (N,) uint16
    side: np.ndarray  # (N,) bool
    firsts: list[int]  # the place of the BOS of each document that is coded


def lay_out(documents: list[np.ndarray], around: list[np.ndarray], bos: int) -> Layout:
    """The text that has `documents`, each behind a BOS, between the pieces `around` of side information.

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
    side = np.ones(len(tokens), bool)
    for first, document in zip(firsts, documents, strict=True):
        side[first + 1 : first + len(document) + 2] = False
    return Layout(tokens, side, firsts)


NO_TOKENS = np.zeros(0, "<u2")


def baseline_sizes(data: bytes) -> dict[str, int]:
    """The bytes of `data` packed by other programs, each at its best."""
    import brotli

    return {
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "brotli": len(brotli.compress(data, quality=11, lgwin=24)),
        "zstd": len(zstandard.ZstdCompressor(level=22).compress(data)),
    }


def tokenize_files(text_codec: TextCodec, contents: dict[str, bytes]) -> dict[str, TokenizedFile]:
    """The files by name as tokens and patches, which is tried."""
    parts = {name: text_codec.tokenize(data) for name, data in contents.items()}
    for name, part in parts.items():
        if text_codec.restore(part) != contents[name]:
            raise Stop(f"{name}: does not come back from its tokens and patch: a bug, nothing was written")
    return parts


class CodingOptions(NamedTuple):
    """How to code: the stage and settings of the evaluation, torch's threads, whether to show a bar."""

    stage: str = ""  # the last
    changes: dict[str, Any] = {}
    threads: int = 1
    show: bool = False


def compress_files(
    artifact: Artifact,
    text_codec: TextCodec,
    contents: dict[str, bytes],
    parts: dict[str, TokenizedFile],
    coding_options: CodingOptions,
    around: list[np.ndarray] | None = None,
) -> tuple[bytes, Coded | None]:
    """(the container of the files by name, what coding their tokens gave: None if there are none).

    `around` are pieces of side information before, between and behind the files that have tokens.
    """
    documents = [part.tokens for part in parts.values() if len(part.tokens)]
    around = around or [NO_TOKENS] * (len(documents) + 1)
    config = coding_config(artifact, coding_options.changes)
    stage = coding_options.stage or last_stage(config)
    coded = None
    if documents:
        layout = lay_out(documents, around, text_codec.bos)
        args = (stage, coding_options.threads, text_codec.path, layout.tokens, layout.side)
        coded = code_tokens(artifact, config, *args, show=coding_options.show)
    stream = coded.stream if coded else b""
    side = lzma_raw(np.concatenate(around).astype("<u2").tobytes()) if any(map(len, around)) else b""
    head = Head(
        [[name, p.kind, len(p.tokens), len(p.patch)] for name, p in parts.items()],
        len(stream),
        list(map(len, around)) if side else [],
        len(side),
        hashlib.sha256(b"".join(contents.values())).hexdigest()[: 2 * DIGEST_BYTES],
        stage,
        coding_options.changes,
        settings_digest(config),
        text_codec.digest,
        text_codec.transform,
        coding_options.threads,
        machine(),
    )
    body = stream + side + b"".join(part.patch for part in parts.values())
    return write_container(artifact, head, body), coded


def decompress_files(
    artifact: Artifact, text_codec: TextCodec, path: Path, show: bool = False
) -> dict[str, bytes]:
    """The files by name in the container at `path`; Stop if they do not come out as they went in."""
    head, body = read_container(path, artifact)
    if head.tokenizer != text_codec.digest:
        raise Stop(
            f"{path}: made with the tokenizer {head.tokenizer}..., here is {text_codec.digest}...; "
            "give its file with --tokenizer"
        )
    text_codec = text_codec._replace(transform=head.transform)
    config = coding_config(artifact, head.changes)
    if settings_digest(config) != head.settings:
        raise Stop(
            f"{artifact.path.parent / 'config.json'}: the settings are not those that {path} was made with "
            f"({settings_digest(config)} here, {head.settings} there); copy it again"
        )
    other = f"{head.machine}, {head.threads} threads; here is {machine()}"
    try:
        contents = decode_body(artifact, text_codec, config, head, body, show)
    except (ValueError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise Stop(f"{path}: cannot be decoded here ({error}); it was made with {other}") from None
    if hashlib.sha256(b"".join(contents.values())).hexdigest()[: 2 * DIGEST_BYTES] != head.text:
        raise Stop(f"{path}: another text came out; decode it where it was made: {other}")
    return contents


def decode_body(
    artifact: Artifact, text_codec: TextCodec, config: Any, head: Head, body: bytes, show: bool
) -> dict[str, bytes]:
    """The files by name, from what follows the head; ValueError and the like if that does not fit."""
    stream, side, patches = np.split(np.frombuffer(body, np.uint8), np.cumsum([head.stream, head.side]))
    counts = [count for _, _, count, _ in head.files if count]
    around = [NO_TOKENS] * (len(counts) + 1)
    if head.side:
        given = np.frombuffer(lzma_raw(side.tobytes(), undo=True), "<u2")
        around = np.split(given, np.cumsum(head.around)[:-1])
    documents = [np.zeros(count, "<u2") for count in counts]
    if documents:
        layout = lay_out(documents, around, text_codec.bos)
        args = (head.stage, head.threads, text_codec.path, layout.tokens, layout.side, stream.tobytes(), show)
        tokens = code_tokens(artifact, config, *args).tokens
        again = [tokens[first + 1 :][:count] for first, count in zip(layout.firsts, counts, strict=True)]
        if not np.array_equal(lay_out(again, around, text_codec.bos).tokens, tokens):
            raise ValueError("the documents have other ends")
        documents = again

    contents = {}
    left = iter(documents)
    begin = 0
    for name, kind, count, size in head.files:
        patch = patches[begin : begin + size].tobytes()
        contents[name] = text_codec.restore(TokenizedFile(kind, next(left) if count else NO_TOKENS, patch))
        begin += size
    return contents


def describe_compression(contents: dict[str, bytes], size: int, coded: Coded | None, seconds: float) -> str:
    """What compress says at its end."""
    data = b"".join(contents.values())
    total = max(1, len(data))
    others = baseline_sizes(data)
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
    check_output(options.out)
    names = names_of(options.files)
    contents = {name: read_input(path) for name, path in zip(names, options.files, strict=True)}
    artifact = open_artifact(options.artifact)
    text_codec = load_texts(artifact, options.tokenizer)
    parts = tokenize_files(text_codec, contents)
    changes: dict[str, Any] = changes_of_environment(artifact.trainer)
    # A batch of documents has rows for these, and none for documents that are not there.
    count = sum(len(part.tokens) > 0 for part in parts.values())
    rows = artifact.run.config.get("TTT_BATCH_SIZE", count)
    changes.setdefault("TTT_BATCH_SIZE", max(1, min(rows, count)))
    coding_options = CodingOptions(options.stage, changes, options.threads, sys.stderr.isatty())
    began = time.monotonic()
    container, coded = compress_files(artifact, text_codec, contents, parts, coding_options)
    seconds = time.monotonic() - began
    write_atomically(options.out, container)
    print(describe_compression(contents, len(container), coded, seconds))


def decompress(options: argparse.Namespace) -> None:
    """The command."""
    if options.out.exists() and not options.out.is_dir():
        raise Stop(f"-o {options.out}: not a folder; give the folder to write the files to")
    artifact = open_artifact(options.artifact)
    head, _ = read_container(options.container, artifact)
    for name, *_ in head.files:
        if Path(name).name != name or name == "..":
            raise Stop(f"{options.container}: {name!a} is not the name of a file; nothing was written")
        if (options.out / name).exists():
            raise Stop(f"{options.out / name}: is there already; give another folder with -o")
    if head.machine != machine():
        warn(f"{options.container}: made by {head.machine}, here is {machine()}; the last bits may differ")
    text_codec = load_texts(artifact, options.tokenizer)
    began = time.monotonic()
    contents = decompress_files(artifact, text_codec, options.container, sys.stderr.isatty())
    seconds = time.monotonic() - began
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        write_atomically(options.out / name, data)
    total = sum(map(len, contents.values()))
    print(f"{len(contents)} files, {total:,} bytes in {options.out}: as they were; {seconds:.1f} s")


# === SAMPLE ===
# In: a prompt. Out: text, token by token. Keys and values are kept from token to token as a mixture keeps
# them (section MIXTURE of the trainer): a token costs one forward of one token, whatever lies before it.


class Sampling(NamedTuple):
    """How to choose a token: by its probability to the power 1 / `temperature` (0: always the likeliest).

    Of the tokens that together have `top_p`, the likeliest first.
    """

    temperature: float
    top_p: float


def choose_token(log_p: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """A token from its log-probabilities (V,)."""
    if sampling.temperature == 0:
        return int(log_p.argmax())
    p, tokens = (log_p / sampling.temperature).softmax(0).sort(descending=True)
    p[p.cumsum(0) - p >= sampling.top_p] = 0  # never the first
    return int(tokens[torch.multinomial(p, 1, generator=random)])


class TextGenerator:
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
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        trainer = self.trainer
        device = self.run.device
        longest = self.context - 1
        self.cache = trainer.KeyCache(self.model, 1, longest, 1, device)
        self.cached = longest
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.previous = torch.zeros(1, 2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def next_log_p(self, token: int) -> Tensor:
        """Log-probabilities (V,) of the token after this one."""
        ids = torch.tensor([[token]], device=self.run.device)
        past = self.cache.past(self.position, self.previous, self.cached)
        with capture_logits(self.trainer, self.model) as captured:
            self.model(self.trainer.Batch(ids, ids, past=past))
        self.cache.keep(past)
        self.position = self.position + 1
        self.previous = torch.cat((self.previous[:, 1:], ids), 1)
        return captured.log_softmax(captured.logits[0])

    def generate(self, prompt: np.ndarray, sampling: Sampling, seed: int) -> Iterator[int]:
        """The tokens after a BOS and those of the `prompt` (N,), until the model ends the document."""
        bos = self.trainer.BOS
        random = torch.Generator().manual_seed(seed)
        self.reset()
        for token in (bos, *prompt.tolist()):
            log_p = self.next_log_p(token)
        token = choose_token(log_p, sampling, random)
        while token != bos:
            yield token
            token = choose_token(self.next_log_p(token), sampling, random)


def stable_prefix(text: str, stop: str) -> str:
    """The part of a text that later tokens do not change, and that does not begin what ends it."""
    text = text.rstrip("\ufffd")  # half a character
    sizes = range(min(len(stop), len(text) + 1) - 1, 0, -1)
    held = next((size for size in sizes if text.endswith(stop[:size])), 0)
    return text[: len(text) - held]


def stream_text(
    text_codec: TextCodec,
    prompt: np.ndarray,
    tokens: Iterator[int],
    most: int,
    stop: str,
    write: Callable[[str], Any],
) -> int:
    """Write the text of at most `most` tokens behind the prompt as they come, to `stop`; their number."""
    ids = prompt.tolist()
    begin = len(text_codec.decode(prompt).decode()) if ids else 0
    shown = begin
    text = ""
    count = 0
    for token in itertools.islice(tokens, most):
        count += 1
        ids.append(token)
        text = text_codec.decode(np.array(ids, "<u2")).decode()
        if stop and stop in text[begin:]:
            text = text[: text.index(stop, begin)]
            break
        ready = stable_prefix(text, stop)
        write(ready[shown:])
        shown = max(shown, len(ready))
    write(text[shown:])
    return count


def check_prompt(prompt: str) -> None:
    """Stop if a prompt has bytes that are no UTF-8, which Python reads as halves of surrogate pairs."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise Stop(f"--prompt {prompt!a}: not UTF-8; give text in UTF-8")


def sample(options: argparse.Namespace) -> None:
    """The command."""
    check_prompt(options.prompt)
    artifact = open_artifact(options.artifact)
    text_codec = load_texts(artifact, options.tokenizer)
    changes: dict[str, Any] = {"TTT_ENABLED": False}
    config = coding_config(artifact, changes)
    generator = TextGenerator(artifact, config, text_codec.path, options.context or config.eval_seq_len)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    def answer(prompt: str) -> None:
        check_prompt(prompt)
        tokens = text_codec.encode(prompt)
        write(prompt)
        began = time.monotonic()
        sampling = Sampling(options.temperature, options.top_p)
        generated = generator.generate(tokens, sampling, options.seed)
        count = stream_text(text_codec, tokens, generated, options.tokens, options.stop, write)
        seconds = time.monotonic() - began
        print(flush=True)
        print(f"{count} tokens, {(len(tokens) + count) / seconds:.0f} tokens/s", file=sys.stderr)

    if not options.interactive:
        answer(options.prompt)
        return
    print("a line is a prompt; an empty one, or the end of the input, ends this", file=sys.stderr)
    sys.stdin.reconfigure(errors="surrogateescape")  # see check_prompt
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


def export_hf(artifact: Artifact, text_codec: TextCodec, folder: Path) -> None:
    """Write a folder for transformers."""
    trainer = artifact.trainer
    manifest, tensors, _ = trainer.decode_artifact(artifact.path)
    config = coding_config(artifact, {"COMPUTE_DTYPE": "float32"})
    table = trainer.parameter_table(config)
    weights = trainer.assemble_weights(table, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"golf.{name}": weights[name].float().cpu().contiguous().numpy() for name in table}
    content = safetensors.numpy.save(arrays, {"format": "pt"})  # transformers asks for a format
    write_atomically(folder / "model.safetensors", content)
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
        "bos_token_id": text_codec.bos,
        "eos_token_id": text_codec.bos,
        "pad_token_id": 0,
        "use_cache": False,
        "torch_dtype": "float32",
    }
    kind = {
        "tokenizer_class": "GolfTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_golf.GolfTokenizer", None]},
        "transform": text_codec.transform,
    }
    for name, content in (("config.json", about), ("tokenizer_config.json", kind)):
        (folder / name).write_text(json.dumps(content, indent=1))
    for path in (ROOT / "hf" / "modeling_golf.py", ROOT / "hf" / "tokenization_golf.py"):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "lossless_caps.py", folder / "golf_transforms.py")
    (folder / "golf_trainer.py").write_text(source_of(artifact), encoding="utf-8")
    (folder / "README.md").write_text(model_card(artifact, text_codec.digest), encoding="utf-8")
    write_atomically(folder / "tokenizer.model", text_codec.path.read_bytes())


def export(options: argparse.Namespace) -> None:
    """The command."""
    folder = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Stop(f"{folder}: is not an empty folder; give a new one")
    artifact = open_artifact(options.artifact)
    text_codec = load_texts(artifact, options.tokenizer)
    export_hf(artifact, text_codec, folder)
    print(f"{folder}: for transformers, with trust_remote_code=True")


# === MAIN ===

OPTION_RANGES = {
    "threads": (1, 1024),
    "tokens": (1, 1 << 30),
    "temperature": (0, 100),
    "top_p": (1e-6, 1),
    "seed": (0, (1 << 63) - 1),
    "context": (2, 1 << 20),
}


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
    command.add_argument("--context", type=int, help="tokens that are seen (default EVAL_SEQ_LEN)")
    command.add_argument("--interactive", action="store_true", help="every line of the input is a prompt")
    command = add("export", export, "Write the model in the form of another library.")
    command.add_argument("--to", choices=("hf",), required=True, help="hf: transformers")
    command.add_argument("folder", type=Path, help="a new folder")
    parser.epilog = "".join(command.format_usage() for command in commands.choices.values())
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    for name, (low, high) in OPTION_RANGES.items():
        value = getattr(options, name, None)
        if value is not None and not low <= value <= high:
            raise Stop(f"--{name.replace('_', '-')} {value}: give a number from {low} to {high}")
    options.act(options)


if __name__ == "__main__":
    run_tool(main)
