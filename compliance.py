#!/usr/bin/env python3
"""Probe whether the score of a run is legal: four conditions, the data, the shipped bytes, every budget.

    ./compliance.py runs/NAME                               every probe; evidence in runs/NAME/compliance.json
    ./compliance.py runs/NAME --tokens 5000 --positions 2   a smaller sample, fewer replaced futures
    ./compliance.py runs/NAME --decode 3                    and 3 documents decoded from their code

What is probed is the script that the run ships (packed_train_gpt.py), on whole documents from the start of
the validation set and with the stages that its own evaluation builds. Exit status 1, and one line per
violation, if a probe fails. The conditions are those of issue #1017 of the contest: causal, normalised, score
before update, single pass.
"""

from __future__ import annotations

import environment

environment.enter()
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import codec
import verify_bytes
from codec import config_of, patched, quiet, settings_of
from data.documents import DataError
from data.shards import BOS, ShardError, read_shard, sha256_file, write_shard
from data.sidecar import VERSIONS, byte_tables
from lossless_caps import TRANSFORMS, decode_caseops
from results import (
    Run,
    Stop,
    check_present,
    check_summary,
    read_arrays,
    read_json,
    run_tool,
    write_atomically,
)

ROOT = Path(__file__).resolve().parent
CONDITIONS = ("causal", "normalised", "score before update", "single pass")
GROUPS = (*CONDITIONS, "decoding", "documents apart", "data", "shipped bytes", "budgets")
CAP_BYTES = 16_000_000
BUDGET_SECONDS = 600
SAMPLE_TOKENS = 20_000
LEAST_DOCUMENTS = 10
POSITIONS = 3
SUMS_PER_POSITION = 8
CPU_WORK = 2_000_000_000  # parameters x sample tokens that a CPU scores a dozen times within some minutes
SUM_TOLERANCE = 1e-4
ENTRY_TOLERANCE = 1e-4
GPU_TOLERANCE = 1e-5
# Two scorings of one sample: the same program on a CPU; on a GPU one is compiled, with additions reordered.
SAME_SCORE = {"cpu": 1e-9, "cuda": 5e-4}
ROUNDING = 1e-9  # relative; sums are kept in fp64
WARMUP_RUN = 8  # tokens in a row that random text does not share with the validation text
TOKENIZERS = {"5697ec9cf5a1f193": "sp8192", "97754754561f20de": "caseops_v1"}  # of the published datasets
KNOWN_WRONG = {
    9_662_464: "10,000 documents or a corrupt shard",
    36_562_944: "a validation set built in parallel",
    164_594_398: "case operators charged as bytes",
}
# Operations for which the whole validation set is scored twice in a proof by decoding: some minutes.
WHOLE_WORK = {"cpu": 3e12, "cuda": 1e15}
DECODE = 3  # documents in submit.py --check
EXCESS = 0.001  # of the recorded loss that a code may be longer, or
EXCESS_BYTES = 16  # for each document
LENGTH_BYTES = 3  # of a document, which the container tells
USED = ("val_bpb", "val_loss", "val_tokens", "val_bytes", "bpb", "versions.source_sha256")  # of summary.json
SETTINGS = ("ARTIFACT_CAP_BYTES", "MAX_WALLCLOCK_SECONDS", "EVAL_BUDGET_SECONDS")  # of config.json
DECODED = 5_000  # documents whose bytes are counted in their text
NORMALISED = 0.02  # most that a normaliser is believed to change; case operators charged as bytes are 9 %
NEEDED = (
    "Config",
    "Run",
    "Dataset",
    "Validation",
    "Tally",
    "Score",
    "Stop",
    "build",
    "evaluate_stage",
    "measure",
    "window_batch",
    "learn_documents",
    "find_documents",
    "rehearse",
    "softcapped_ce_reference",
    "softcapped_ce_op",
    "decode_artifact",
    "assemble_weights",
    "parameter_table",
    "format_value",
    "pack_source",
    "STREAMS",
    "ALIASES",
    "FIXED",
    "REFUSED",
)


# === REPORT ===


class Row(NamedTuple):
    """One probe: what it belongs to, whether it holds (None: could not be measured) and why."""

    group: str
    probe: str
    holds: bool | None
    evidence: str


@dataclass
class Report:
    """Every probe of one run."""

    folder: Path
    rows: list[Row] = field(default_factory=list)

    def add(self, group: str, probe: str, holds: bool | None, evidence: str) -> None:
        """Enter one probe."""
        self.rows.append(Row(group, probe, None if holds is None else bool(holds), evidence))

    @property
    def violations(self) -> list[str]:
        """One line per probe that failed."""
        return [f"{row.group}: {row.probe}: {row.evidence}" for row in self.rows if row.holds is False]

    def verdict(self, group: str) -> bool | None:
        """Whether all measured probes of a group hold; None if none was measured."""
        verdicts = [row.holds for row in self.rows if row.group == group and row.holds is not None]
        return all(verdicts) if verdicts else None

    @property
    def legal(self) -> bool:
        """Whether no probe failed and each of the four conditions was measured."""
        return not self.violations and all(self.verdict(name) for name in CONDITIONS)

    def as_json(self) -> dict[str, Any]:
        """The report as written to compliance.json; results.conditions reads it."""
        unmeasured = [name for name in CONDITIONS if self.verdict(name) is None]
        reason = "; ".join(self.violations) or (
            f"not measured: {', '.join(unmeasured)}" if unmeasured else "every probe holds"
        )
        of = lambda group: [row for row in self.rows if row.group == group]
        conditions = {
            name: {
                "holds": self.verdict(name),
                "evidence": f"{sum(r.holds is True for r in of(name))} of {len(of(name))} probes hold",
            }
            for name in CONDITIONS
        }
        probes = {
            group: {row.probe: {"holds": row.holds, "evidence": row.evidence} for row in of(group)}
            for group in GROUPS
        }
        return {"legal": self.legal, "reason": reason, "conditions": conditions, **probes}

    def table(self) -> str:
        """The probes for people, group by group."""
        words = {True: "holds", False: "BROKEN", None: "not measured"}
        lines = []
        width = max(len(row.probe) for row in self.rows)
        for group in GROUPS:
            lines.append(f"{group}: {words[self.verdict(group)]}")
            lines += [
                f"  {row.probe:<{width}}  {words[row.holds]:<12}  {row.evidence}"
                for row in self.rows
                if row.group == group
            ]
        return "\n".join(lines)


# === THE TRAINER AND THE SAMPLE ===


def load_trainer(folder: Path) -> ModuleType:
    """The script that the run ships, as a module; Stop if it is none or lacks a function that is watched."""
    return codec.load_trainer(folder, NEEDED)


def bytes_of(data: Any, tokens: np.ndarray) -> np.ndarray:
    """The original bytes of each validation token: the sidecar's, or those of the tokenizer's tables."""
    if data.sidecar_files:
        return np.concatenate([read_shard(path) for path in data.sidecar_files])[: len(tokens)].astype(
            np.int64
        )
    base, lead, boundary = byte_tables(data.pieces)
    return base[tokens] + (lead[tokens] & ~boundary[np.append(np.uint16(BOS), tokens[:-1])])


class Sample(NamedTuple):
    """Whole validation documents as a dataset folder of their own, without training shards."""

    tokens: np.ndarray
    bytes: np.ndarray
    folder: Path


def take_sample(data: Any, tokens: np.ndarray, sizes: np.ndarray, wanted: int, folder: Path) -> Sample:
    """The first documents of the validation set that have `wanted` tokens, and LEAST_DOCUMENTS of them."""
    borders = np.append(np.flatnonzero(tokens == BOS), len(tokens))
    enough = borders[LEAST_DOCUMENTS:][borders[LEAST_DOCUMENTS:] >= wanted]
    end = int(enough[0]) if len(enough) and len(borders) > 2 else min(wanted, len(tokens))
    folder.mkdir(parents=True)
    write_shard(folder / "fineweb_val_000000.bin", tokens[:end].astype("<u2"))
    if data.sidecar_files:
        write_shard(folder / "fineweb_val_bytes_000000.bin", sizes[:end].astype("<u2"))
    shutil.copy(data.tokenizer, folder / "tokenizer.model")
    return Sample(np.array(tokens[:end]), np.array(sizes[:end]), folder)


def scaled(trainer: ModuleType, config: Any, sample: Sample) -> dict[str, int]:
    """Settings so small that the sample holds several chunks, batches and phases of what the run learns."""
    length = config.eval_seq_len
    size = len(sample.tokens)
    streams = trainer.STREAMS
    documents = len(trainer.find_documents(sample.tokens))
    phases = config.phased_ttt_num_phases
    # A phase ends after a multiple of 8 batches, and one batch must be left to score.
    most = (documents - 1) // (streams * phases) if phases else documents // 3
    side_by_side = min(config.ttt_batch_size, max(1, most))
    return {
        "VAL_BATCH_TOKENS": min(config.val_batch_tokens, streams * length * -(-size // length)),
        "TTT_CHUNK_TOKENS": min(config.ttt_chunk_tokens, max(length, size // 4 // length * length)),
        "TTT_BATCH_SIZE": side_by_side,
        "PHASED_TTT_PREFIX_DOCS": min(
            config.phased_ttt_prefix_docs, max(1, streams * phases - 1) * side_by_side
        ),
        "GLOBAL_TTT_CHUNK_TOKENS": min(
            config.global_ttt_chunk_tokens, max(length, size // 16 // length * length)
        ),
    }


# === WATCHING ONE SCORING ===


def fingerprint(parameters: Any) -> str:
    """sha256 of the bytes of some parameters."""
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def softmax_of(logits: Tensor, cap: float) -> Tensor:
    """Log-probabilities (N, V) of raw `logits` under the softcap, whatever the loss makes of them."""
    return (cap * torch.tanh(logits.float() / cap)).log_softmax(-1)


@dataclass
class Mixed:
    """What a mixture was told of a chunk, and its weights before it: rows R, adapters K, targets T."""

    mix: Any  # the trainer's
    mixer: Any  # a copy of its state
    log_p: Tensor  # (3, R, K, T)
    chunk: Any

    def distribution(self, row: int, column: int, log_p: Tensor) -> Tensor:
        """Log-probability of every token (V,) at one target; `log_p` (K, V) are those of the adapters."""
        size = log_p.size(1)
        mixer = copy.copy(self.mixer)
        mixer.within = mixer.within[row].repeat(size, 1)
        told = self.log_p[:, row : row + 1].repeat(1, size, 1, 1)
        told[0, :, :, column] = log_p.T
        batch = self.chunk.batch
        targets = batch.targets[row].repeat(size, 1)
        targets[:, column] = torch.arange(size, device=targets.device)
        chunk = self.chunk._replace(
            batch=batch._replace(targets=targets, guesses=batch.guesses[:, row : row + 1].repeat(1, size, 1)),
            scored=self.chunk.scored[row].repeat(size, 1),
            match=self.chunk.match[:, row : row + 1].repeat(1, size, 1),
        )
        return self.mix(mixer, told, chunk)[:, column]

    def entries(self, trainer: ModuleType, log_p: Tensor) -> Tensor:
        """Log-probabilities (R, T) of the targets by hand, from those (R, K, T) of the adapters."""
        mixer = self.mixer
        scored = self.chunk.scored
        batch = self.chunk.batch
        trusts = torch.tensor(trainer.TRUSTS, dtype=torch.float64, device=log_p.device)
        weights = mixer.within.exp()
        found = torch.zeros(scored.shape, dtype=torch.float64, device=log_p.device)
        for column in range(scored.size(1)):
            p = log_p[:, :, column].double().exp()
            mixed = (weights * p).sum(1)
            for source, guess in enumerate(self.log_p[1:, :, :, column]):
                likely = (weights * guess.exp()).sum(1).log()
                length = self.chunk.match[source, :, column]
                number = (likely[:, None] > mixer.borders).sum(1)
                place = torch.where(length > 0, 1 + (length - 1) * (len(mixer.borders) + 1) + number, 0)
                hit = (batch.guesses[source, :, column] == batch.targets[:, column]).double()
                given = (1 - trusts) * mixed[:, None] + trusts * hit[:, None]
                trust = mixer.trust[source].exp()[place]
                mixed = torch.where(length > 0, (trust * given).sum(1), mixed)
            found[:, column] = mixed.log()
            learnt = weights * p
            weights = torch.where(scored[:, column, None], learnt / learnt.sum(1, keepdim=True), weights)
        return found


@dataclass
class Forward:
    """What is known of the latest forward of the model."""

    args: tuple = ()
    named: dict[str, Any] = field(default_factory=dict)
    learning: bool = False  # whether gradients were on
    updates: int = 0  # how many had been made
    logits: Tensor | None = None  # (N, V)
    function: Any = None  # the trainer's loss function
    cap: float = 0.0
    known: bool = False  # whether its targets are those of the latest window_batch
    experts: int = 1  # rows of the forward for each row of that
    mixed: Mixed | None = None  # what is made of the losses of several experts


class Watch:
    """Sees one scoring from outside: what is recorded when, from what, what is learnt, and the weights.

    It wraps the trainer's window_batch (which targets a forward holds), both loss functions (the logits, and
    through the gradient of each loss what is learnt), Tally.add (the records) and, inside torch, every
    optimiser's step. `closely`: each recorded forward is repeated with other targets, and weights are hashed
    at records and updates.
    """

    def __init__(
        self,
        trainer: ModuleType,
        model: nn.Module,
        tokens: np.ndarray,
        ask: Any = (),
        closely: bool = False,
        tolerance: float = 0.0,
    ):
        self.trainer = trainer
        self.model = model
        self.tokens = tokens
        self.closely = closely
        self.tolerance = tolerance
        size = len(tokens)
        self.ask = set(map(int, ask))
        self.answers: dict[
            int, Tensor
        ] = {}  # place -> log-probability of each token, as the loss function gives it
        self.recorded = torch.full((size,), math.nan)
        self.entry = torch.full((size,), math.nan)
        self.event = np.full(size, -1)
        self.times = np.zeros(size, int)
        self.learnt = np.zeros(size, bool)
        self.tables: dict[int, Tensor] = {}  # of the masks that forwards were given, by where they lie
        self.mask_rows = np.full(size, -1)  # of a table, by target
        self.events = self.updates = self.repeated = 0
        self.faults: dict[tuple[str, str], list[str]] = {}
        self.ledger: list[tuple[str, str, str]] = []  # (what, hash of the weights, hash of the adapters)
        self.stopped = ""
        self.tally = None
        self.final = torch.zeros(0)
        self.latest = Forward()
        self.batch = None
        self.text = None
        self.aside = None

    def fault(self, group: str, probe: str, text: str) -> None:
        """Note a violation."""
        self.faults.setdefault((group, probe), []).append(text)

    def __enter__(self) -> Watch:
        trainer = self.trainer
        self.stack = contextlib.ExitStack()
        add = trainer.Tally.add
        real_mix = getattr(getattr(trainer, "Mixer", None), "mix", None)  # older scripts have none
        real = {
            name: getattr(trainer, name)
            for name in ("window_batch", "learn_documents", "softcapped_ce_reference", "softcapped_ce_op")
        }

        def window_batch(tokens: np.ndarray, plan: np.ndarray, rows: int, context: int, packed: bool) -> Any:
            found = real["window_batch"](tokens, plan, rows, context, packed)
            place = plan[:, :1] + 1 + np.arange(context)
            inside = place < plan[:, 1:2]
            places = np.full((rows, context), -1)
            if tokens is self.tokens or (self.text is not None and len(tokens) == len(self.text)):
                names = np.arange(len(tokens)) if tokens is self.tokens else self.text
                places[: len(plan)][inside] = names[place[inside]]
            else:
                self.fault(
                    "score before update", "known text", "a forward reads tokens that are not the sample's"
                )
            self.batch = places, found[1]
            return found

        def learn_documents(run: Any, model: Any, tokens: np.ndarray, documents: np.ndarray) -> None:
            # The first token of a document is the last target of the one before it, here as there.
            self.text = np.concatenate([np.append(-1, np.arange(a + 1, b)) for a, b in documents])
            real["learn_documents"](run, model, tokens, documents)

        def mix(mixer: Any, log_p: Tensor, chunk: Any) -> Any:
            self.latest.mixed = Mixed(real_mix, copy.copy(mixer), log_p, chunk)
            return real_mix(mixer, log_p, chunk)

        def loss_function(function: Any) -> Any:
            def losses_of(logits: Tensor, targets: Tensor, cap: float) -> Any:
                out = function(logits, targets, cap)
                self.saw(function, logits, targets, cap, out[0] if isinstance(out, tuple) else out)
                return out

            return losses_of

        def record(tally: Any, losses: Tensor, places: Tensor) -> None:
            self.record(tally, losses.detach(), places)
            add(tally, losses, places)

        losses = {name: loss_function(real[name]) for name in ("softcapped_ce_reference", "softcapped_ce_op")}
        self.stack.enter_context(
            patched(trainer, window_batch=window_batch, learn_documents=learn_documents, **losses)
        )
        self.stack.enter_context(patched(trainer.Tally, add=record))
        if real_mix is not None:
            self.stack.enter_context(patched(trainer.Mixer, mix=mix))
        self.stack.enter_context(patched(self.model, shows_logits=True))
        self.stack.callback(self.model.register_forward_pre_hook(self.starts, with_kwargs=True).remove)
        self.stack.callback(register_optimizer_step_pre_hook(lambda *_: self.before_update()).remove)
        self.stack.callback(register_optimizer_step_post_hook(lambda *_: self.after_update()).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        if self.tally is not None:
            self.final = self.tally.nats.cpu().clone()
        self.latest = Forward()  # they hold batches and logits
        self.tally = None

    def starts(self, model: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        """A forward of the model begins."""
        self.latest = Forward(args, named, torch.is_grad_enabled(), self.updates)

    def saw(self, function: Any, logits: Tensor, targets: Tensor, cap: float, losses: Tensor) -> None:
        """The losses of a forward: keep its logits, and hear of the targets whose loss is differentiated."""
        if self.aside is not None:
            self.aside.append(logits.detach())
            return
        latest = self.latest
        latest.logits = logits.detach()
        latest.function = function
        latest.cap = cap
        places = np.zeros((0, 0), int) if self.batch is None else self.batch[0]
        latest.experts = max(1, len(losses) // max(1, places.size))
        places = places.repeat(latest.experts, 0).ravel()
        named = places > 0
        latest.known = len(places) == len(losses) and np.array_equal(
            targets.cpu().numpy()[named], self.tokens[places[named]]
        )
        if losses.requires_grad and latest.known:
            losses.register_hook(lambda gradient: self.differentiated(places, gradient))
        elif losses.requires_grad:
            self.fault("score before update", "known text", "a loss is learnt whose targets cannot be told")

    def differentiated(self, places: np.ndarray, gradient: Tensor) -> None:
        """The loss of some targets enters a gradient: all of them must be recorded by now."""
        used = places[(gradient != 0).cpu().numpy()]
        used = used[used > 0]
        if len(early := used[self.times[used] == 0]):
            self.fault(
                "score before update",
                "learnt after it was scored",
                f"{len(early)} targets, first {early[0]}, were learnt before their score was recorded",
            )
        self.learnt[used] = True

    def hashes(self) -> tuple[str, str]:
        """Of the weights, and of the adapters in use."""
        lora = self.latest.named.get("lora")
        return fingerprint(self.model.parameters()), fingerprint(
            lora.parameters()
        ) if lora is not None else ""

    def before_update(self) -> None:
        """An optimiser is about to step: the weights must still be those of the last record."""
        if self.closely and self.ledger:
            now = self.hashes()
            same = now[0] == self.ledger[-1][1] and (now[1] == self.ledger[-1][2] or not now[1])
            if self.ledger[-1][0] == "record" and not same:
                self.fault(
                    "score before update",
                    "hash before the update",
                    "the weights before an update are not "
                    f"those of the record before it ({now[0][:8]}, {self.ledger[-1][1][:8]})",
                )

    def after_update(self) -> None:
        """An optimiser has stepped."""
        self.updates += 1
        if self.closely:
            self.ledger.append(("update", *self.hashes()))

    def record(self, tally: Any, losses: Tensor, places: Tensor) -> None:
        """Scores are entered: they come from the latest forward, and their targets are not learnt yet."""
        where = places.cpu().numpy()
        latest = self.latest
        self.tally, self.recorded[places.cpu()] = tally, losses.float().cpu()
        self.event[where] = self.events
        np.add.at(self.times, where, 1)
        self.events += 1
        if len(late := where[self.learnt[where]]):
            self.fault(
                "score before update",
                "learnt after it was scored",
                f"{len(late)} targets, first {late[0]}, were scored after they were learnt",
            )
        if not latest.known or not np.array_equal(self.batch[0][self.batch[1].numpy()], where):
            self.fault(
                "normalised",
                "known distribution",
                f"{len(where)} scores were recorded, first {where[0]}, that "
                "no forward has given a distribution for",
            )
            return
        rows = self.batch[1].flatten().nonzero()[:, 0]
        for index in np.flatnonzero([int(place) in self.ask for place in where]):
            self.answers[int(where[index])] = self.ask_all(rows[index].item())
        if self.closely:
            self.note_mask(places, self.all_rows(rows.to(losses.device)))
            self.look_closely(places, rows.to(losses.device))

    def ask_all(self, place: int) -> Tensor:
        """Log-probability of every token (V,) as the trainer scores it at a place among all of the batch."""
        latest = self.latest
        if latest.mixed is None:
            return self.ask_loss(latest.logits[place])
        row, column = divmod(place, self.batch[0].shape[1])
        logits = latest.logits.unflatten(0, (-1, latest.experts, self.batch[0].shape[1]))[row, :, column]
        experts = torch.stack([self.ask_loss(expert) for expert in logits])
        told = experts.double().to(latest.logits.device)
        return latest.mixed.distribution(row, column, told).float().cpu()

    def ask_loss(self, logits: Tensor) -> Tensor:
        """Log-probability of every token (V,) as the loss function gives it for one row of logits."""
        parts = []
        for tokens in torch.arange(len(logits), device=logits.device).split(1024):
            out = self.latest.function(logits.expand(len(tokens), -1).contiguous(), tokens, self.latest.cap)
            parts.append(-(out[0] if isinstance(out, tuple) else out).detach().float().cpu())
        return torch.cat(parts)

    def again(self, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(losses, logits) of the latest forward once more, with other targets if any are given."""
        (batch, *rest), self.aside = self.latest.args, []
        batch = batch if targets is None else batch._replace(targets=targets)
        try:
            with torch.set_grad_enabled(self.latest.learning):
                losses = self.model.forward(batch, *rest, **self.latest.named).detach().flatten()
            return losses[: batch.targets.numel()], self.aside[-1]
        finally:
            self.aside = None

    def all_rows(self, rows: Tensor) -> Tensor:
        """The places of every expert's losses for those of the batch."""
        width = self.batch[0].shape[1]
        first = rows // width * self.latest.experts * width + rows % width
        return (first[:, None] + width * torch.arange(self.latest.experts, device=rows.device)).flatten()

    def note_mask(self, places: Tensor, every: Tensor) -> None:
        """Keep the mask that the forward was given, and its row at each place; -2 where experts differ."""
        mask = getattr(self.latest.args[0], "mask", None)  # older scripts have none
        if mask is None:
            return
        self.tables[mask.table.data_ptr()] = mask.table
        told = mask.rows.flatten()[every].view(len(places), -1).cpu().numpy()
        self.mask_rows[places.cpu().numpy()] = np.where((told == told[:, :1]).all(1), told[:, 0], -2)

    def look_closely(self, places: Tensor, rows: Tensor) -> None:
        """Hash the weights; repeat the forward with other targets: its distributions must be the same."""
        latest = self.latest
        hashes = self.hashes()
        if self.ledger and self.ledger[-1][0] == "record" and self.ledger[-1][1] != hashes[0]:
            self.fault(
                "score before update",
                "hash before the update",
                "the weights changed between two records "
                f"without an update ({self.ledger[-1][1][:8]}, {hashes[0][:8]})",
            )
        self.ledger.append(("record", *hashes))
        if latest.updates != self.updates:
            self.fault(
                "score before update",
                "learnt after it was scored",
                f"an update lies between the forward of {len(places)} scores and their record",
            )
            return
        targets = latest.args[0].targets
        vocabulary = latest.logits.size(1)
        other = (targets - 3) % (vocabulary - 4) + 4
        changed, logits = self.again(other)
        shift = 0.0
        every = self.all_rows(rows)
        entries = torch.zeros(targets.numel(), device=rows.device)
        for part in every.split(2048):
            before = softmax_of(latest.logits[part], latest.cap)
            after = softmax_of(logits[part], latest.cap)
            entries[part] = before.gather(1, targets.flatten()[part][:, None])[:, 0]
            shift = max(shift, (before - after).abs().max().item())
            expected = -before.gather(1, other.flatten()[part][:, None])[:, 0]
            shift_of_loss = (changed[part] - expected).abs().max().item()
            if shift_of_loss > ENTRY_TOLERANCE:
                self.fault(
                    "causal",
                    "token itself replaced",
                    f"the loss of another target is {shift_of_loss:.2g} nats "
                    "away from what the distribution gave it",
                )
        if latest.mixed is not None:
            told = entries.unflatten(0, (-1, latest.experts, self.batch[0].shape[1]))
            entries = latest.mixed.entries(self.trainer, told).float().flatten()
        self.entry[places.cpu()] = entries[rows].cpu()
        self.repeated += len(rows)
        if shift > self.tolerance:
            _, once_more = self.again()
            if torch.equal(once_more[every], latest.logits[every]):
                self.fault(
                    "causal",
                    "token itself replaced",
                    f"a distribution moves by {shift:.2g} when only the targets are replaced",
                )
            else:
                self.fault(
                    "score before update",
                    "hash before the update",
                    f"the weights {hashes[0][:8]} of a record "
                    f"do not give its scores again (off by {shift:.2g})",
                )


# === THE STAGES OF AN EVALUATION ===


class Stages:
    """The stages that the trainer's evaluate_stage runs on the sample, each watched and repeatable."""

    def __init__(self, trainer: ModuleType, config: Any, sample: Sample, positions: int):
        self.trainer = trainer
        self.config = config
        self.sample = sample
        self.random = np.random.default_rng(0)
        text = np.flatnonzero(sample.tokens >= 4)
        self.asked = self.random.choice(text, min(SUMS_PER_POSITION * positions, len(text)), replace=False)
        self.how: dict[str, Any] = {}
        self.start: dict[str, dict[str, Tensor]] = {}
        self.watches: dict[str, Watch] = {}
        self.scores: dict[str, Any] = {}
        self.noise: dict[str, float] = {}
        self.real_measure = trainer.measure
        with quiet():
            self.run = trainer.Run(config)
            self.run.folder = Path(config.out_dir)
            self.run.folder.mkdir(parents=True, exist_ok=True)
            built = trainer.build(self.run)
            self.model = built.model
            with patched(trainer, measure=self.measure):
                trainer.evaluate_stage(self.run, trainer.Dataset(config, need_training=False), built)

    def measure(self, run: Any, validation: Any, stage: str, how: Any) -> Any:
        """Stands in for the trainer's measure, and calls it."""
        self.validation, self.how[stage] = validation, how
        self.start[stage] = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        exact = 0.0 if run.device.type == "cpu" else GPU_TOLERANCE
        with Watch(self.trainer, self.model, validation.tokens, self.asked, True, exact) as watch:
            self.watches[stage] = watch
            try:
                self.scores[stage] = self.real_measure(run, validation, stage, how)
            except self.trainer.Stop as stop:
                watch.stopped, self.scores[stage] = str(stop), self.trainer.Score(math.nan, 1, 1)
        return self.scores[stage]

    def again(self, stage: str, tokens: np.ndarray, ask: Any = (), **changes: Any) -> Watch:
        """The stage once more from its first weights on other tokens, with some settings changed."""
        weights = self.start[stage]
        self.model.hash_embed = (
            nn.Parameter(weights["hash_embed"].clone()) if "hash_embed" in weights else None
        )
        self.model.load_state_dict(weights)
        self.model.requires_grad_(True)
        validation = self.trainer.Validation(tokens, self.validation.bytes, self.validation.source)
        config = self.trainer.dataclasses.replace(self.config, **changes)
        with quiet(), patched(self.run, config=config), Watch(self.trainer, self.model, tokens, ask) as watch:
            try:
                self.how[stage](self.trainer.Tally(self.run, validation))
            except self.trainer.Stop as stop:
                watch.stopped = str(stop)
        return watch

    def tolerance(self, stage: str) -> float:
        """How far two scorings of the same tokens may lie apart: on a CPU not at all."""
        if self.run.device.type == "cpu":
            return 0.0
        if stage not in self.noise:
            repeated = self.again(stage, self.validation.tokens)
            self.noise[stage] = gap(repeated.recorded, self.watches[stage].recorded, slice(1, None))
        return GPU_TOLERANCE + 2 * self.noise[stage]

    def replaced(self, tokens: np.ndarray, where: np.ndarray) -> np.ndarray:
        """`tokens` with other ones at `where`; control tokens stay, so that documents keep their borders."""
        size = self.config.vocab_size - 4
        chosen = where & (tokens >= 4)
        shift = self.random.integers(1, size, len(tokens))
        return np.where(chosen, (tokens.astype(np.int64) - 4 + shift) % size + 4, tokens).astype("<u2")


def gap(ours: Tensor, theirs: Tensor, where: Any) -> float:
    """The largest difference of two scores at some places; infinite if one of them is missing."""
    difference = (ours[where].double() - theirs[where].double()).abs()
    return math.inf if difference.isnan().any() else difference.max().item() if len(difference) else 0.0


def probe_passes(report: Report, stages: Stages, stage: str) -> None:
    """Single pass: every target recorded once, left to right, never changed; the score is their sum."""
    watch = stages.watches[stage]
    score = stages.scores[stage]
    sample = stages.sample
    size = len(watch.tokens)
    wrong = np.flatnonzero(watch.times[1:] != 1) + 1
    if watch.stopped:
        group = "score before update" if "learnt" in watch.stopped else "single pass"
        report.add(group, f"{stage}: finishes", False, watch.stopped)
    recorded = watch.recorded.clone()
    recorded[0] = 0
    if len(wrong) or watch.times[0]:
        report.add(
            "single pass",
            f"{stage}: scored once",
            False,
            f"{len(wrong)} of {size - 1} targets not recorded "
            f"exactly once, first {wrong[0] if len(wrong) else 0}",
        )
        return
    report.add(
        "single pass",
        f"{stage}: scored once",
        True,
        f"{size - 1} targets in {watch.events} records, each once",
    )
    backwards = sum(
        int((np.diff(watch.event[a + 1 : b]) < 0).sum())
        for a, b in stages.trainer.find_documents(watch.tokens)
    )
    report.add(
        "single pass",
        f"{stage}: left to right",
        not backwards,
        f"{backwards} targets scored before an earlier one of their document",
    )
    if watch.stopped:
        return
    counted = (score.tokens, score.bytes)
    expected = size - 1, int(sample.bytes[1:size].sum())
    sums = math.isclose(score.nats, recorded.double().sum().item(), rel_tol=1e-6) and counted == expected
    report.add(
        "single pass",
        f"{stage}: sum of the records",
        sums and torch.equal(recorded, watch.final),
        f"{score.nats:.2f} nats, {score.tokens} tokens, {score.bytes} bytes reported; "
        f"{recorded.double().sum().item():.2f}, {expected[0]}, {expected[1]} recorded, "
        f"{int((recorded != watch.final).sum())} changed afterwards",
    )


def probe_distributions(report: Report, stages: Stages, stage: str) -> None:
    """Normalised: the recorded score is the entry of a distribution that sums to 1 over the vocabulary."""
    watch = stages.watches[stage]
    off = gap(watch.recorded, -watch.entry, slice(1, None))
    worst = int((watch.recorded + watch.entry)[1:].abs().nan_to_num(math.inf).argmax()) + 1
    report.add(
        "normalised",
        f"{stage}: entry of the true token",
        off <= ENTRY_TOLERANCE,
        f"recorded scores lie at most {off:.2g} nats (target {worst}) from the softmax over "
        f"{stages.config.vocab_size} tokens, at {len(watch.tokens) - 1} targets",
    )
    sums = (
        torch.stack([answer.double().exp().sum() for answer in watch.answers.values()])
        if watch.answers
        else None
    )
    if sums is None:
        report.add("normalised", f"{stage}: sums to 1", None, "no distribution was seen")
        return
    far = (sums - 1).abs().max().item()
    report.add(
        "normalised",
        f"{stage}: sums to 1",
        far <= SUM_TOLERANCE,
        f"asked for the loss of every token at "
        f"{len(sums)} targets, the probabilities sum to {sums.min().item():.6f} to {sums.max().item():.6f}",
    )


def probe_updates(report: Report, stages: Stages, stage: str) -> None:
    """Score before update: the order of records, gradients and updates, and the weights' hashes there."""
    watch = stages.watches[stage]
    names = ("learnt after it was scored", "hash before the update", "known text")
    faults = [text for name in names for text in watch.faults.get(("score before update", name), [])]
    learns = stage == "ttt"
    probe = f"{stage}: records and updates"
    if faults:
        report.add("score before update", probe, False, f"{faults[0]} ({len(faults)} such events)")
    elif not watch.ledger or (learns and not watch.updates):
        report.add(
            "score before update", probe, None, "no update was made on so small a sample; give more --tokens"
        )
    else:
        states = list(dict.fromkeys(weights[:8] for _, weights, _ in watch.ledger))
        adapters = len({adapter for *_, adapter in watch.ledger} - {""})
        report.add(
            "score before update",
            probe,
            True,
            f"{watch.events} records on weights {states[0]}, no update"
            if not watch.updates
            else f"{watch.events} records and {watch.updates} updates: {len(states)} "
            f"states of the weights, {states[0]} to {states[-1]}, and {adapters} of adapters; all "
            f"{int(watch.learnt.sum())} targets learnt were recorded before; the weights before an update "
            "are those of the record before it, and gave its scores a second time",
        )


def probe_causality(report: Report, stages: Stages, stage: str, positions: int) -> None:
    """Causal: no score changes with what comes after its place, nor its distribution with its token."""
    watch = stages.watches[stage]
    tokens = stages.validation.tokens
    for probe in ("token itself replaced", "known distribution"):
        group = "causal" if probe.startswith("token") else "normalised"
        for text in watch.faults.get((group, probe), [])[:1]:
            report.add(group, f"{stage}: {probe}", False, text)
    order = np.array(sorted(watch.answers, key=lambda place: (watch.event[place], place)))
    if watch.stopped or len(order) < positions:
        report.add(
            "causal",
            f"{stage}: future replaced",
            None,
            "the stage does not finish" if watch.stopped else "too few distributions were seen",
        )
        return
    tolerance = stages.tolerance(stage)
    compared = 0
    worst = 0.0
    moved = 0.0
    alone = 0.0
    for number in range(positions):
        place = int(order[(2 * number + 1) * len(order) // (2 * positions)])
        event = watch.event[place]
        strictly = (watch.event < event) | ((watch.event == event) & (np.arange(len(tokens)) < place))
        strictly[0], known = True, strictly.copy()
        known[place] = True
        changed = stages.replaced(tokens, ~known)
        second = stages.again(stage, changed, [place])
        changed = np.where(known & ~strictly, stages.replaced(tokens, ~strictly), changed)
        third = stages.again(stage, changed, [place])
        if stop := second.stopped or third.stopped:
            report.add("causal", f"{stage}: future replaced", False, f"on other tokens: {stop}")
            return
        known[0] = strictly[0] = False
        first = watch.answers[place]
        worst = max(
            worst, gap(second.recorded, watch.recorded, known), gap(third.recorded, watch.recorded, strictly)
        )
        nothing = torch.full((1,), math.nan)
        moved = max(
            moved, *(gap(other.answers.get(place, nothing), first, slice(None)) for other in (second, third))
        )
        alone = max(alone, abs(third.recorded[place].item() + first[int(changed[place])].item()))
        compared += int(known.sum())
    report.add(
        "causal",
        f"{stage}: future replaced",
        worst <= tolerance,
        f"all tokens scored later replaced after "
        f"{positions} places: {compared} earlier scores move by at most {worst:.2g} (allowed "
        f"{tolerance:.2g})",
    )
    if ("causal", "token itself replaced") not in watch.faults:
        report.add(
            "causal",
            f"{stage}: token itself replaced",
            moved <= tolerance and alone <= ENTRY_TOLERANCE,
            f"at {watch.repeated} targets given to the forward, and in the text at {positions} places: "
            f"distributions move by at most {moved:.2g}, the score of the new token is the old "
            f"distribution's to {alone:.2g}",
        )


def probe_mask(report: Report, stages: Stages, stage: str) -> None:
    """What a score refuses follows from the tokenizer and from the tokens before, and from nothing else."""
    watch = stages.watches[stage]
    wanted = getattr(stages.config, "canonical_mask", False)
    if not watch.tables and not wanted:
        return
    with tempfile.TemporaryDirectory() as folder:  # in which there is nothing else to make it from
        alone = stages.trainer.Canonical(Path(shutil.copy(stages.sample.folder / "tokenizer.model", folder)))
    other = sum(not np.array_equal(table.cpu().numpy(), alone.table) for table in watch.tables.values())
    tokens = watch.tokens
    expected = alone.rows(tokens)[:-1]
    given = watch.mask_rows[1:]
    wrong = np.flatnonzero(given != expected)
    # The same of a text that ends there.
    ends = stages.random.choice(len(expected), min(32, len(expected)), replace=False)
    early = sum(alone.rows(tokens[: end + 1])[-1] != given[end] for end in ends)
    report.add(
        "causal",
        f"{stage}: mask from the tokenizer",
        wanted and len(watch.tables) == 1 and not other and not len(wrong) and not early,
        f"{other} of {len(watch.tables)} tables differ from that of the tokenizer alone, the rows of "
        f"{len(wrong)} of {len(given)} targets from those of the tokens before, of {early} of {len(ends)} "
        "from those of a text that ends there",
    )


def probe_documents(report: Report, stages: Stages, stage: str) -> None:
    """No score of a document depends on the one before it, where attention is confined to documents."""
    config = stages.config
    tokens = stages.validation.tokens
    probe = f"{stage}: previous document replaced"
    if not ((stage == "ttt" and config.ttt_mode in ("doc_lora", "mixture")) or config.loader == "packed"):
        report.add(
            "documents apart",
            probe,
            None,
            f"LOADER={config.loader}: windows attend across documents by design",
        )
        return
    documents = stages.trainer.find_documents(tokens)
    inside = np.zeros(len(tokens), bool)
    for a, b in documents[::2]:
        inside[a + 1 : b] = True
    # What is learnt from a scored document may change the next one's scores, so nothing is learnt for all;
    # and several documents lie side by side, however few of them the sample has.
    still = {
        "ttt_lr": 0.0,
        "global_ttt_lr": 0.0,
        "global_ttt_warmup_start_lr": 0.0,
        "ttt_warm_start_a": False,
        "ttt_mixture_copies": "none",
        "ttt_mixture_carry": 0.0,
        "ttt_batch_size": max(2, min(config.ttt_batch_size, len(documents) // 3)),
    }
    first = stages.again(stage, tokens, **still) if stages.watches[stage].updates else stages.watches[stage]
    second = stages.again(stage, stages.replaced(tokens, ~inside), **still)
    if stop := first.stopped or second.stopped:
        report.add("documents apart", probe, None, stop)
        return
    moved = gap(second.recorded, first.recorded, inside)
    report.add(
        "documents apart",
        probe,
        moved <= stages.tolerance(stage),
        f"every second document replaced: the "
        f"{int(inside.sum())} scores of the {len(documents[::2])} others move by at most {moved:.2g}",
    )


def probe_warmup(report: Report, stages: Stages) -> None:
    """What the evaluation is rehearsed on before its clock starts must not be validation text."""
    seen: list[np.ndarray] = []
    with quiet():
        stages.trainer.rehearse(stages.run, {"probe": lambda tally: seen.append(tally.validation.tokens)})
    runs = lambda tokens: (
        {
            run.tobytes()
            for run in np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, "<u2"), WARMUP_RUN)
        }
        if len(tokens) >= WARMUP_RUN
        else set()
    )
    ours = runs(stages.sample.tokens)
    shared = sum(len(runs(tokens) & ours) for tokens in seen)
    report.add(
        "score before update",
        "warm-up",
        not shared,
        f"the rehearsal of the stages, before the clock, reads "
        f"{sum(map(len, seen))} tokens, which share {shared} runs of {WARMUP_RUN} with the validation text",
    )


def probe_stages(report: Report, stages: Stages, positions: int) -> None:
    """Every probe of every stage."""
    sample = stages.sample
    read = stages.validation.tokens
    report.add(
        "single pass",
        "whole validation set",
        np.array_equal(read, sample.tokens),
        f"{len(read)} of the sample's {len(sample.tokens)} tokens are scored",
    )
    if first := next(iter(stages.start.values()), None):
        manifest, tensors, digest = stages.trainer.decode_artifact(Path(stages.config.artifact))
        weights = stages.trainer.assemble_weights(stages.model.table, tensors)
        equal = all(torch.equal(weights[name].to(first[name].dtype), first[name].cpu()) for name in weights)
        report.add(
            "shipped bytes",
            "weights scored",
            equal,
            f"the first stage starts from the {len(manifest['tensors'])} tensors of artifact {digest[:16]}",
        )
    for stage in stages.watches:
        probe_passes(report, stages, stage)
        probe_distributions(report, stages, stage)
        probe_updates(report, stages, stage)
        probe_causality(report, stages, stage, positions)
        probe_mask(report, stages, stage)
        probe_documents(report, stages, stage)
    probe_warmup(report, stages)


# === WHAT THE RUN HAS RECORDED ===


def probe_data(
    report: Report, run: Run, data: Any, tokens: np.ndarray, sizes: np.ndarray, trainer: ModuleType
) -> None:
    """Totals and sums per document against shards and sidecar, and the dataset against its own rules."""
    summary = run.summary
    documents = trainer.find_documents(tokens)
    report.add(
        "data",
        "same dataset",
        data.fingerprint["shards"] == run.config.get("data"),
        f"shards {data.fingerprint['shards']}, the run has {run.config.get('data')}",
    )
    count = len(tokens) - 1
    credited = int(sizes[1:].sum())
    hint = lambda value: f" ({KNOWN_WRONG[value]})" if value in KNOWN_WRONG else ""
    said = int(summary["val_tokens"]), int(summary["val_bytes"])
    report.add(
        "data",
        "whole validation set",
        said[0] == count,
        f"{said[0]} targets scored{hint(said[0])}, the shards hold {count} in {len(documents)} documents",
    )
    source = "sidecar sums" if data.sidecar_files else "tokenizer's tables come"
    report.add(
        "data",
        "bytes of the text",
        said[1] == credited,
        f"{said[1]} bytes counted{hint(said[1])}, the {source} to {credited} ({said[1] / credited - 1:+.4%})",
    )
    follows = summary["val_loss"] / math.log(2) * summary["val_tokens"] / summary["val_bytes"]
    report.add(
        "data",
        "val_bpb follows",
        math.isclose(follows, summary["val_bpb"], rel_tol=ROUNDING),
        f"val_loss / ln 2 x tokens / bytes = {follows:.8f}, val_bpb {summary['val_bpb']:.8f}",
    )
    last = list(summary["bpb"].items())[-1]
    report.add(
        "data",
        "score of the last stage",
        last[1] == summary["val_bpb"],
        f"val_bpb {summary['val_bpb']:.8f}, {last[0]} {last[1]:.8f}",
    )
    if not (arrays := read_arrays(run.folder)):
        report.add("data", "sums of the documents", None, "not recorded: there is no documents.npz")
    else:
        lengths = documents[:, 1] - documents[:, 0] - 1
        per_document = np.add.reduceat(sizes[1:], documents[:, 0])
        wrong = (
            [f"{len(arrays['tokens'])} documents for {len(documents)}"]
            if len(arrays["tokens"]) != len(documents)
            else [
                f"{name} of document {np.flatnonzero(arrays[name] != ours)[0]}"
                for name, ours in (("tokens", lengths), ("bytes", per_document))
                if (arrays[name] != ours).any()
            ]
        )
        sums = float(arrays["nats"].sum()) / math.log(2) / max(1, int(arrays["bytes"].sum()))
        report.add(
            "data",
            "sums of the documents",
            not wrong and math.isclose(sums, summary["val_bpb"], rel_tol=ROUNDING),
            f"nats / ln 2 / bytes over {len(arrays['tokens'])} documents = {sums:.8f}, "
            f"val_bpb {summary['val_bpb']:.8f}" + "".join(f"; differs from the shards: {w}" for w in wrong),
        )
    transform = probe_dataset(report, data)
    probe_decoding(report, data, tokens, sizes, transform)


def decoded_bytes(data: Any, transform: str, tokens: np.ndarray) -> int | None:
    """UTF-8 bytes of the original text that one document's tokens decode to; None if they do not decode.

    U+2581 is a space of the text: SentencePiece writes spaces that way before it splits.
    """
    text = data.pieces.decode(tokens.tolist()).replace("\u2581", " ")
    try:
        if transform in VERSIONS:
            text = decode_caseops(text, version=VERSIONS[transform], normalised=True)
        return len(text.encode())
    except ValueError:
        return None


def probe_decoding(
    report: Report, data: Any, tokens: np.ndarray, sizes: np.ndarray, transform: str | None
) -> None:
    """The counted bytes against those of the decoded text: neither tables nor sidecar are asked.

    Exact where the tables count. A sidecar counts the text as it was before the tokenizer's normaliser, which
    decoding cannot undo: there the two may differ by what a normaliser changes.
    """
    probe = "bytes by decoding"
    starts = np.flatnonzero(tokens == BOS)
    unknown = data.pieces.unk_id()
    if not len(starts) or transform is None or (data.sidecar_files and not TRANSFORMS[transform].lossless):
        reason = "no document has a BOS" if not len(starts) else f"transform {transform or 'unknown'}"
        report.add("data", probe, None, f"cannot be decoded to the original: {reason}")
        return
    borders = np.append(starts, len(tokens))
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(DECODED, len(starts))).astype(int))
    counted = found = 0
    wrong = []
    for number in chosen:
        begin, end = int(borders[number]) + 1, int(borders[number + 1])
        if (tokens[begin:end] == unknown).any():  # its text is lost
            continue
        ours = int(sizes[begin:end].sum())
        theirs = decoded_bytes(data, transform, tokens[begin:end])
        counted += ours
        found += theirs or 0
        if ours != theirs:
            wrong.append(number)
    near = bool(data.sidecar_files) and abs(counted - found) <= NORMALISED * found
    hint = f", the first difference in document {wrong[0]}" if wrong else ""
    report.add(
        "data",
        probe,
        (None if near else False) if wrong else True,
        f"{counted} bytes counted in {len(chosen)} documents, their decoded text has {found}{hint}",
    )


def probe_dataset(report: Report, data: Any) -> str | None:
    """verify_bytes.py on the dataset: operators without bytes, constants, no validation text in training."""
    claimed = (
        []
        if data.manifest
        else ["--name", TOKENIZERS[key]]
        if (key := sha256_file(data.tokenizer)[:16]) in TOKENIZERS
        else []
    )
    options = verify_bytes.parse_arguments([str(data.folder), "--tokenizer", str(data.tokenizer), *claimed])
    options.workers = (
        options.workers if sum(path.stat().st_size for path in data.train_files) > 1 << 28 else 1
    )
    proof = verify_bytes.Proof(data.folder, options)
    try:
        proof.run()
        evidence = f"{len(proof.report['proved'])} facts proved, {len(proof.report['not_proved'])} cannot be"
        report.add("data", "verify_bytes", True, "; ".join([evidence, *proof.report["proved"][-2:]]))
    except (verify_bytes.Refuted, ShardError) as error:
        report.add("data", "verify_bytes", False, str(error))
    except DataError as error:
        report.add("data", "verify_bytes", None, str(error))
    return getattr(proof, "transform", None)


def probe_budgets(report: Report, run: Run, trainer: ModuleType) -> None:
    """Bytes, seconds and code of the run against its limits, none of them above the contest's."""
    summary = run.summary
    folder = run.folder
    artifact = folder / "final_model.ptz"
    code = folder / "packed_train_gpt.py"
    sizes = [path.stat().st_size for path in (artifact, code)]
    cap = min(CAP_BYTES, run.setting("ARTIFACT_CAP_BYTES"))
    report.add(
        "budgets",
        "artifact and code",
        sum(sizes) <= cap,
        f"{sizes[0]} + {sizes[1]} = {sum(sizes)} of {cap} bytes on disk",
    )
    same = [summary.get("artifact_bytes"), summary.get("code_bytes")] == sizes
    digest = sha256_file(artifact)
    report.add(
        "shipped bytes",
        "artifact scored",
        same and digest == summary.get("artifact_sha256"),
        f"sha256 {digest[:16]}, {sizes[0]} and {sizes[1]} bytes; summary.json says "
        f"{str(summary.get('artifact_sha256'))[:16]}, {summary.get('artifact_bytes')} and "
        f"{summary.get('code_bytes')}",
    )
    for name, key, limit in (
        ("training and calibration", "budgeted_seconds", "MAX_WALLCLOCK_SECONDS"),
        ("evaluation", "eval_seconds", "EVAL_BUDGET_SECONDS"),
    ):
        used = summary.get(key)
        most = min(BUDGET_SECONDS, run.setting(limit))
        report.add(
            "budgets",
            name,
            None if used is None else used <= most,
            f"not recorded: no {key}" if used is None else f"{used:.2f} of {most:g} s ({key})",
        )
    source = ROOT / "train_gpt.py"
    recorded = summary["versions"]["source_sha256"]
    if sha256_file(code) == recorded:
        report.add(
            "shipped bytes",
            "code of the run",
            True,
            f"the run was started from the packed script {recorded[:16]}",
        )
    elif not source.exists() or sha256_file(source) != recorded:
        report.add(
            "shipped bytes", "code of the run", None, f"train_gpt.py {recorded[:16]} of the run is not here"
        )
    else:
        packed = trainer.pack_source(source.read_bytes())[0] == code.read_bytes()
        report.add(
            "shipped bytes",
            "code of the run",
            packed,
            f"train_gpt.py {recorded[:16]} packs to "
            f"{'the' if packed else 'another'} packed_train_gpt.py {sha256_file(code)[:16]}",
        )
    trained = run.config.get("PREQUANT_TTT_ENABLED") or "prequant_ttt" in run.stages()
    report.add(
        "score before update",
        "no training before scoring",
        not trained,
        "PREQUANT_TTT_ENABLED=1: trained on the validation tokens before they are scored"
        if trained
        else "PREQUANT_TTT_ENABLED=0",
    )
    verdict = summary.get("compliance") or {}
    legal = verdict.get("legal")
    report.add(
        "budgets",
        "the run's own verdict",
        None if legal is None else legal is True,
        str(verdict.get("reason", "not recorded")),
    )


LEDGER_PROBES = (
    "validation read after the seal",
    "calibration before the bell",
    "evaluation clock",
    "artifact sealed",
)


class Ledger(NamedTuple):
    """What the events of metrics.jsonl come to; None: not recorded, or not within one process."""

    early: list[str]  # the phase of each reading of validation data that came too early
    has_last: bool  # whether a last reading of training data is recorded
    seconds: float | None  # from the start of the training clock to that
    evaluation: float | None  # seconds of the evaluation clock
    sealed: str  # sha256 of the artifact


def read_ledger(events: list[dict[str, Any]]) -> Ledger:
    """Go through the events in order; a resumed run has several of a kind, the last counts."""
    phase = "nothing"
    early = []
    begun = None
    last = None
    seconds = None
    begins = None
    clock = None
    sealed = ""
    for record in events:
        event = record.get("event")
        moment = record.get("clock", record["time"])  # the wall clock of a log that has no other may be set
        if event in ("train_clock_start", "artifact_sealed", "eval_clock_start"):
            phase = event
        if event == "start":
            begun = None  # another process: the wall clock says nothing about the training clock
        elif event == "train_clock_start":
            begun = moment - record.get("seconds", 0.0)  # a resumed run has used some already
            last = None
        elif event == "train_read_last":
            last = moment
            seconds = moment - begun if begun is not None else None
        elif event == "artifact_sealed":
            sealed = record.get("sha256", "")
        elif event == "validation_read" and phase != "eval_clock_start":
            early.append(phase)
        elif event == "eval_clock_start":
            begins = moment
            clock = None
        elif event == "eval_clock_end":
            clock = moment - begins if begins is not None else None
    return Ledger(early, last is not None, seconds, clock, sealed)


def probe_ledger(report: Report, run: Run) -> None:
    """Order in metrics.jsonl: training data within the budget, validation data only after the seal."""
    probes = LEDGER_PROBES
    events = [record for record in run.records() if record.get("kind") == "ledger"]
    if not events:
        for probe in probes:
            report.add("budgets", probe, None, "not recorded: metrics.jsonl has no ledger")
        return
    early, has_last, seconds, clock, sealed = read_ledger(events)
    when = {
        "nothing": "before anything",
        "train_clock_start": "while it trained or calibrated, before the seal",
        "artifact_sealed": "before the evaluation clock started (warm-up on validation tokens)",
    }
    report.add(
        "budgets",
        probes[0],
        not early,
        f"validation tokens were read {when[early[0]]}"
        if early
        else "no validation token was read before the artifact was sealed and the evaluation clock started",
    )
    limit = min(BUDGET_SECONDS, run.setting("MAX_WALLCLOCK_SECONDS"))
    report.add(
        "budgets",
        probes[1],
        None if seconds is None else seconds <= limit,
        ("not recorded" if not has_last else "in another process than the training: budgeted_seconds counts")
        if seconds is None
        else f"training data was last read {seconds:.2f} s after the clock started, limit {limit:g} s",
    )
    limit = min(BUDGET_SECONDS, run.setting("EVAL_BUDGET_SECONDS"))
    report.add(
        "budgets",
        probes[2],
        None if clock is None else clock <= limit,
        "not recorded" if clock is None else f"{clock:.2f} of {limit:g} s between start and end",
    )
    report.add(
        "budgets",
        probes[3],
        sealed == run.summary.get("artifact_sha256") if sealed else None,
        f"sealed as {sealed[:16]}, scored as {str(run.summary.get('artifact_sha256'))[:16]}"
        if sealed
        else "not recorded",
    )


# === THE SHIPPED SCRIPT ALONE ===

# Loaded by Python at its start: no connection leaves the machine, and every opened file is written down.
GUARD = """
import os, sys

_log = os.open(os.environ["GUARD_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def _guard(event, arguments):
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple) or \\
            event in ("socket.getaddrinfo", "socket.gethostbyname"):
        os.write(_log, b"network " + event.encode() + b"\\n")
        raise OSError("no network here")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        os.write(_log, b"open " + os.path.abspath(os.fsencode(arguments[0])) + b"\\n")

sys.addaudithook(_guard)
"""


def start_guard(place: Path) -> dict[str, str]:
    """The variables under which Python keeps to this machine and writes what it opens to place/opened."""
    (place / "guard").mkdir(parents=True)
    (place / "guard" / "sitecustomize.py").write_text(GUARD)
    return {"PYTHONPATH": str(place / "guard"), "GUARD_LOG": str(place / "opened"), "HF_HUB_OFFLINE": "1"}


def guarded_events(place: Path) -> list[str]:
    """What the guard has seen: `open PATH` and `network EVENT`."""
    log = place / "opened"
    return sorted(set(log.read_text(errors="replace").splitlines())) if log.exists() else []


def run_alone(
    run: Run, trainer: ModuleType, sample: Sample, changes: dict[str, Any], place: Path
) -> tuple[dict[str, Any], str, list[str]]:
    """(summary, error, what it opened elsewhere) of the packed script on the sample in an empty folder."""
    guard = start_guard(place)
    empty = place / "empty"
    empty.mkdir()
    shutil.copy(run.folder / "packed_train_gpt.py", empty / "train_gpt.py")
    shutil.copy(run.folder / "final_model.ptz", empty / "model.ptz")
    shutil.copytree(sample.folder, empty / "data")
    where = {
        "STAGE": "evaluate",
        "ARTIFACT": "model.ptz",
        "RUN_ID": "alone",
        "OUT_DIR": "runs",
        "DATASETS_DIR": "data",
        "TOKENIZER_PATH": "data/tokenizer.model",
        "EVAL_PREQUANT": False,
    }
    settings = settings_of(trainer, run, **changes | where)
    ours = settings.keys() | trainer.ALIASES.keys() | trainer.FIXED.keys() | trainer.REFUSED.keys()
    variables = {name: value for name, value in os.environ.items() if name not in ours} | settings | guard
    environment.forget_launcher(variables)
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=empty,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    path = empty / "runs" / "alone" / "summary.json"
    summary = read_json(path) if done.returncode == 0 and path.exists() else {}
    check_summary(path, summary)
    error = "" if summary else (done.stderr.strip() or done.stdout.strip() or "no summary").splitlines()[-1]
    python = [str(Path(prefix).resolve()) for prefix in {sys.prefix, sys.base_prefix}]
    foreign = []
    for line in guarded_events(place):
        what, _, file = line.partition(" ")
        opened = Path(file).resolve()
        shipped = any(opened.is_relative_to(folder) for folder in [*python, place.resolve()])
        ours = any(opened.is_relative_to(folder) for folder in (ROOT, run.folder.resolve()))
        if what == "network" or "fineweb_train" in opened.name or (ours and not shipped):
            foreign.append(line)
    return summary, error, foreign


def probe_alone(report: Report, run: Run, stages: Stages, changes: dict[str, Any], place: Path) -> None:
    """The shipped script, on the shipped artifact alone, gives the scores that the probes saw."""
    summary, error, foreign = run_alone(run, stages.trainer, stages.sample, changes, place)
    if error:
        report.add("shipped bytes", "runs alone", False, f"in an empty folder: {error}")
        return
    ours = {stage: score.bpb for stage, score in stages.scores.items()}
    allowed = SAME_SCORE[stages.run.device.type]
    same = ours.keys() == summary["bpb"].keys() and all(
        math.isclose(ours[stage], bpb, rel_tol=allowed) for stage, bpb in summary["bpb"].items()
    )
    shown = lambda scores: ", ".join(f"{stage} {bpb:.8f}" for stage, bpb in scores.items())
    report.add(
        "shipped bytes",
        "runs alone",
        same,
        f"in an empty folder, without network and training shards: "
        f"{shown(summary['bpb'])}; here {shown(ours)}",
    )
    report.add(
        "shipped bytes",
        "opens nothing else",
        not foreign,
        "; ".join(foreign[:3])
        if foreign
        else "no connection, no training shard and no file of the repository or the run folder",
    )


# === PROOF BY DECODING ===
# Whoever gets the text back from the artifact and so many bytes has proved that the score is causal,
# normalised, made before it is learnt, and in a single pass: there is no text to look at. The documents are
# coded by the run's own evaluation (codec.py). Where that is affordable it goes over the whole validation
# set, of which the decoder is told the other documents one token at a time, each after those before it in the
# order of scoring: then the bytes are compared with documents.npz, that is with the score itself. Else the
# documents are a validation set of their own, with chunks and batches as small as they need to be, and the
# bytes are compared with the loss that the evaluation records of them there.


class Choice(NamedTuple):
    """What is to be decoded: documents (first, end) of the validation set, chosen by the artifact's hash."""

    numbers: list[int]
    documents: np.ndarray
    tokens: list[np.ndarray]
    texts: dict[str, bytes]
    bytes: np.ndarray  # that are counted for each
    whole: bool  # whether the rest of the validation set is scored around them

    def named(self) -> Iterator[tuple[str, np.ndarray]]:
        """The name and the tokens of each."""
        return zip(self.texts, self.tokens, strict=True)


def choose_documents(
    artifact: codec.Artifact,
    text_codec: codec.TextCodec,
    config: Any,
    stream: np.ndarray,
    sizes: np.ndarray,
    count: int,
) -> Choice:
    """`count` documents of the validation tokens, by a random choice whose seed is the artifact's sha256."""
    trainer = artifact.trainer
    documents = trainer.find_documents(stream)
    random = np.random.default_rng(int.from_bytes(artifact.digest, "little"))
    numbers = sorted(random.permutation(len(documents))[:count].tolist())
    chosen = documents[numbers]
    tokens = []
    for first, end in chosen:
        document = stream[first + 1 : end]
        tokens.append(document[document != trainer.BOS])
    names = [f"document{number}" for number in numbers]
    decoded = {name: text_codec.decode(part) for name, part in zip(names, tokens, strict=True)}

    parameters = sum(math.prod(spec.shape) for spec in trainer.parameter_table(config).values())
    windows = len(stream) // config.eval_stride + sum(map(len, tokens))
    work = 2 * parameters * config.eval_seq_len * windows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A batch of documents would run for every token of the one that is decoded.
    whole = not codec.needs_lengths(config) and work <= WHOLE_WORK[device]
    counted = np.array([sizes[first + 1 : end].sum() for first, end in chosen])
    return Choice(numbers, chosen, tokens, decoded, counted, whole)


def pieces_around(choice: Choice, stream: np.ndarray, bos: int) -> list[np.ndarray]:
    """The side information around the chosen documents: the others, or nothing."""
    if not choice.whole:
        return [codec.NO_TOKENS] * (len(choice.tokens) + 1)
    pieces = []
    place = 0
    for (first, _), tokens in zip(choice.documents, choice.tokens, strict=True):
        pieces.append(stream[place:first])
        place = first + 1 + len(tokens)
    return [*pieces, stream[place:]]


def decode_alone(run: Run, tokenizer: Path, container: bytes, place: Path) -> tuple[dict[str, bytes], str]:
    """(the texts, an error) of a fresh process that has the artifact with its script, and the code stream."""
    folder = run.folder
    variables = {name: value for name, value in os.environ.items() if name not in run.config}
    environment.forget_launcher(variables)
    variables |= start_guard(place)
    empty = place / "empty"
    empty.mkdir()
    for name in ("final_model.ptz", codec.SCRIPT, "config.json"):
        shutil.copy(folder / name, empty / name)
    shutil.copy(tokenizer, empty / "tokenizer.model")
    (empty / "texts.golf").write_bytes(container)
    words = ["decompress", "final_model.ptz", "texts.golf", "-o", "out"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "codec.py"), *words],
        cwd=empty,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {}, (done.stderr.strip() or "no output").splitlines()[-1]
    read = [line for line in guarded_events(place) if "fineweb_" in line or line.startswith("network ")]
    if read:
        return {}, f"the decoder has looked at {read[0]}"
    return {path.name: path.read_bytes() for path in (empty / "out").iterdir()}, ""


def probe_decode(report: Report, run: Run, trainer: ModuleType, data: Any, count: int, place: Path) -> None:
    """`count` documents are coded with the run's last stage, and decoded by a fresh process."""
    stream = np.concatenate([read_shard(path) for path in data.val_files])
    artifact = codec.open_artifact(run.folder / "final_model.ptz")._replace(trainer=trainer)
    text_codec = codec.load_texts(artifact, data.tokenizer)
    config = codec.coding_config(artifact, {})
    choice = choose_documents(artifact, text_codec, config, stream, bytes_of(data, stream), count)
    around = pieces_around(choice, stream, trainer.BOS)
    changes: dict[str, Any] = {}
    if not choice.whole:
        tokens = codec.lay_out(choice.tokens, around, trainer.BOS).tokens
        changes = scaled(trainer, config, Sample(tokens, tokens, place))
        del changes["VAL_BATCH_TOKENS"]  # codec.py's own
    coding_options = codec.CodingOptions("", changes, torch.get_num_threads())
    parts = {name: codec.TokenizedFile("same", document, b"") for name, document in choice.named()}
    probe = "text from the code"
    try:
        container, coded = codec.compress_files(
            artifact, text_codec, choice.texts, parts, coding_options, around
        )
    except (Stop, trainer.Stop) as stop:
        report.add("decoding", probe, False, f"cannot be coded: {stop}")
        return
    probe_code_length(report, run, data, choice, coded, codec.lay_out(choice.tokens, around, trainer.BOS))
    decoded, error = decode_alone(run, text_codec.path, container, place)
    different = [name for name, text in choice.texts.items() if decoded.get(name) != text]
    verdict = f"{different[0]} is another text" if different else "every byte is equal"
    report.add(
        "decoding",
        probe,
        not error and not different,
        error
        or f"{', '.join(choice.texts)}, chosen by the artifact's sha256, decoded by a fresh process from the "
        f"artifact and {len(coded.stream)} bytes: {verdict}",
    )


def probe_code_length(
    report: Report, run: Run, data: Any, choice: Choice, coded: codec.Coded, layout: codec.Layout
) -> None:
    """The bytes of the code against the recorded loss of exactly these documents, and those of the text."""
    arrays = read_arrays(run.folder) if choice.whole else {}
    source = "documents.npz" if arrays else "the evaluation of these documents alone"
    parts = [slice(a + 1, a + len(t) + 2) for a, t in zip(layout.firsts, choice.tokens, strict=True)]
    nats = (
        arrays["nats"][choice.numbers] if arrays else np.array([coded.recorded[part].sum() for part in parts])
    )
    recorded = nats / math.log(2) / 8
    cost = np.array([coded.nats[part].sum() for part in parts]) / math.log(2) / 8
    allowed = np.maximum(EXCESS * recorded, EXCESS_BYTES - LENGTH_BYTES)
    off = np.abs(cost - recorded)
    worst = int((off - allowed).argmax())
    total = float(recorded.sum())
    size = len(coded.stream)
    report.add(
        "decoding",
        "code length",
        (off <= allowed).all() and size - total <= allowed.sum(),
        f"{size} bytes for a loss of {total:.1f} bytes in {source} ({size / total - 1:+.3%}); the worst, "
        f"{list(choice.texts)[worst]}: {cost[worst]:.1f} for {recorded[worst]:.1f}",
    )
    found = np.array([len(text) for text in choice.texts.values()])
    counted = arrays["bytes"][choice.numbers] if arrays else choice.bytes
    # A sidecar counts the text before the tokenizer's normaliser, see probe_decoding.
    near = bool(data.sidecar_files) and abs(counted - found).sum() <= NORMALISED * found.sum()
    worst = int(abs(counted - found).argmax())
    report.add(
        "decoding",
        "bytes of the text",
        True if (counted == found).all() else None if near else False,
        f"{found.sum()} bytes decoded, {counted.sum()} counted; the worst, {list(choice.texts)[worst]}: "
        f"{found[worst]} decoded, {counted[worst]} counted",
    )


# === MAIN ===


def check(
    folder: Path,
    tokens: int = 0,
    positions: int = POSITIONS,
    trainer: ModuleType | None = None,
    alone: bool = True,
    decode: int = 0,
) -> Report:
    """Every probe of the run in `folder`, on about `tokens` validation tokens (0: as the hardware can).

    And so many documents `decode`d from their code.
    """
    run = Run.read(folder)
    report = Report(folder)
    for name in ("final_model.ptz", "packed_train_gpt.py", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise Stop(f"{folder / name}: no such file; finish the run, or copy the whole folder")
    check_present(folder / "summary.json", run.summary, USED, "score the run again with STAGE=evaluate")
    check_present(folder / "config.json", run.config, SETTINGS, "copy it again, or repeat the run")
    trainer = trainer or load_trainer(folder)
    try:
        config = config_of(trainer, run)
        data = trainer.Dataset(config, need_training=False)
    except trainer.Stop as stop:
        raise Stop(f"{folder}: cannot be probed here: {stop}") from None
    stream = np.concatenate([read_shard(path) for path in data.val_files])
    sizes = bytes_of(data, stream)
    probe_data(report, run, data, stream, sizes, trainer)
    probe_budgets(report, run, trainer)
    probe_ledger(report, run)
    with tempfile.TemporaryDirectory(prefix="compliance-") as name:
        place = Path(name)
        parameters = sum(math.prod(spec.shape) for spec in trainer.parameter_table(config).values())
        most = SAMPLE_TOKENS if torch.cuda.is_available() else min(SAMPLE_TOKENS, CPU_WORK // parameters)
        sample = take_sample(
            data, stream, sizes, max(tokens or most, 2 * config.eval_seq_len + 1), place / "sample"
        )
        changes: dict[str, Any] = scaled(trainer, config, sample)
        here = {
            "DATASETS_DIR": sample.folder,
            "TOKENIZER_PATH": sample.folder / "tokenizer.model",
            "STAGE": "evaluate",
            "ARTIFACT": (folder / "final_model.ptz").resolve(),
            "OUT_DIR": place / "here",
            "EVAL_PREQUANT": False,
            "COMPILE": "off",
        }  # what is compiled cannot be watched
        if not torch.cuda.is_available():  # the run may have been made elsewhere
            changes |= {"ATTENTION": "auto", "KERNELS": "auto"}
        try:
            stages = Stages(trainer, config_of(trainer, run, **changes | here), sample, positions)
            probe_stages(report, stages, positions)
            if alone:
                probe_alone(report, run, stages, changes, place / "alone")
            if decode:
                probe_decode(report, run, trainer, data, decode, place / "decoded")
        except trainer.Stop as stop:
            report.add("single pass", "evaluation", False, str(stop))
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a finished run, such as runs/NAME")
    parser.add_argument(
        "--tokens",
        type=int,
        default=0,
        help=f"validation tokens to score (default about "
        f"{SAMPLE_TOKENS:,}, fewer for a large model without a GPU)",
    )
    parser.add_argument(
        "--positions",
        type=int,
        default=POSITIONS,
        help="places per stage whose future is replaced (default %(default)s)",
    )
    parser.add_argument(
        "--decode",
        type=int,
        default=0,
        metavar="N",
        help="documents that a fresh process has to decode from as many bytes as their score says",
    )
    options = parser.parse_args(arguments)
    if options.tokens < 0 or options.positions < 1 or options.decode < 0:
        parser.error("--tokens, --positions and --decode must be positive")
    report = check(options.folder, options.tokens, options.positions, decode=options.decode)
    write_atomically(options.folder / "compliance.json", json.dumps(report.as_json(), indent=1))
    print(report.table())
    for violation in report.violations:
        print(f"VIOLATION {violation}")
    print(
        f"{options.folder}: {'legal' if report.legal else 'NOT LEGAL'} ({options.folder / 'compliance.json'})"
    )
    return 0 if report.legal else 1


if __name__ == "__main__":
    run_tool(main)
