#!/usr/bin/env python3
"""One trained model packed by SDClip + LQER and by ours at equal bytes: KL, BPB, seconds; on a GPU if any.

    python bench/gpu_packing.py RUN [--tokens N] [--tune-steps N] [--score] [--quick]

RUN is a run folder of train_gpt.py with a finished training. The public packer is SDClip GPTQ at its
published widths with brotli, and int8 corrections of rank 4 on the three matrices that gain most (#1797
stores them in fewer bits, so its bytes are overstated here by some kilobytes). Ours is fitted to the same
bytes and left in RUN/ours.ptz. The constants of neither are tuned here. Last comes ours with --tune-steps of
training after rounding (TUNE_STEPS, TUNE_MATRICES; 0: without). The model runs in fp32 on windows of 256
validation tokens, as in bench/packing.py; dBPB is what a packer costs in bits per byte. RUN/score.json gets
the score of the unquantised model. --score: nothing but that. --quick: few tokens, LZMA.
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
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.options import Parser, number_option  # before bench/data.py can be found

sys.path.append(str(ROOT / "bench"))

from packing import CHUNK, Clip, Form, Packers, Subject
from packing_options import low_rank

import train_gpt as t

RANK, CORRECTED = 4, 3  # of LQER: rank of a correction, number of matrices that get one


class DeviceSubject(Subject):
    """The subject of bench/packing.py with its model on the trainer's device."""

    def trunk(self, chunk: int) -> Tensor:
        """Input of the head for 16 windows of 256 tokens, on the device."""
        self.model.to(self.run.device)
        batch = t.to_device(t.Batch(self.inputs[chunk], self.targets[chunk]), self.run)
        with torch.no_grad():
            return self.model.trunk(batch, t.Hooks()).flatten(0, 1).float()

    def moments(self, tokens: int) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """Calibration on so many training tokens."""
        return {
            key: (inputs.cpu(), outputs.cpu()) for key, (inputs, outputs) in super().moments(tokens).items()
        }

    @torch.no_grad()
    def log_chances(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Log probabilities (4096, V) of a chunk."""
        cap = self.config.logit_softcap
        return F.log_softmax(cap * torch.tanh(hidden @ head.to(hidden.device).T / cap), -1)

    @torch.no_grad()
    def divergence(self, weights: dict[str, Tensor], chunks: range) -> tuple[np.ndarray, float]:
        """(KL in nats per token of the model from the one with `weights`, by chunk; more bits per byte)."""
        self.model.load_state_dict(weights)
        worse, found = 0.0, []
        for chunk in chunks:
            targets = self.targets[chunk].to(self.run.device).view(-1, 1)
            p = self.log_chances(self.hidden[chunk], self.weights["embed"])
            q = self.log_chances(self.trunk(chunk), weights["embed"])
            worse += float((p - q).gather(1, targets).double().sum())
            found.append(float(F.kl_div(q, p, reduction="sum", log_target=True)) / CHUNK)
        return np.array(found), worse / math.log(2) / self.bytes[list(chunks)].sum()

    def bits_per_byte(self, chunks: range) -> float:
        """The score of the unquantised model."""
        nats = 0.0
        for chunk in chunks:
            targets = self.targets[chunk].to(self.run.device).view(-1, 1)
            chances = self.log_chances(self.hidden[chunk], self.weights["embed"])
            nats -= float(chances.gather(1, targets).double().sum())
        return nats / math.log(2) / self.bytes[list(chunks)].sum()


def pack_public(packers: Packers) -> tuple[dict[str, Tensor], int]:
    """(parameters, bytes) of SDClip + LQER."""
    tensors = packers.sdclip(Clip())
    data = packers.write(tensors)
    weights, spent = low_rank(packers, tensors, RANK, CORRECTED)
    return weights, len(data) + spent


def pack_ours(packers: Packers, goal: int, room: int = 0) -> tuple[dict[str, t.Quantized], bytes]:
    """Our tensors and artifact, fitted to `goal` bytes less `room`."""
    form = Form()
    return packers.fit(packers.problems(form), form, goal, room)[:2]


def pack_tuned(packers: Packers, goal: int) -> bytes:
    """Our artifact of `goal` bytes, tuned after rounding as the settings of its subject say."""
    subject = packers.subject
    tensors, _ = pack_ours(packers, goal, t.fp16_growth(subject.config, subject.small()))
    subject.tune(tensors, packers.moments, goal, Form())
    return packers.write(tensors, Form().states)


def compare(
    subject: DeviceSubject, options: argparse.Namespace, chunks: range, bpb: float
) -> dict[str, dict[str, float]]:
    """Pack in all ways and print a row for each as it is done; bytes, KL, BPB and seconds by packer."""
    packers = Packers(subject, options.calibration)
    rows: dict[str, dict[str, float]] = {}
    print(f"{'packer':<16}{'bytes':>12}{'KL':>10}{'BPB':>10}{'dBPB':>10}{'seconds':>10}")

    def show(name: str, weights: dict[str, Tensor], size: int, seconds: float) -> None:
        kl, more = subject.divergence(weights, chunks)
        rows[name] = {"bytes": size, "kl": float(kl.mean()), "bpb": float(bpb + more), "seconds": seconds}
        numbers = f"{size:>12,}{kl.mean():>10.5f}{bpb + more:>10.5f}{more:>+10.5f}{seconds:>10.1f}"
        print(f"{name:<16}{numbers}", flush=True)

    began = time.monotonic()
    public_weights, goal = pack_public(packers)
    show("SDClip + LQER", public_weights, goal, time.monotonic() - began)
    began = time.monotonic()
    _, data = pack_ours(packers, goal)
    (options.run / "ours.ptz").write_bytes(data)
    show("ours", packers.read(data), len(data), time.monotonic() - began)
    if options.tune_steps:
        began = time.monotonic()
        data = pack_tuned(packers, goal)
        show("ours, tuned", packers.read(data), len(data), time.monotonic() - began)
    return rows


def main() -> None:
    """Print the table and the RESULT line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with checkpoint.pt")
    parser.add_argument("--tokens", type=number_option(int, CHUNK), default=204_800, help="validation tokens")
    parser.add_argument(
        "--calibration", type=number_option(int, CHUNK), default=262_144, help="training tokens"
    )
    parser.add_argument("--tune-steps", type=number_option(int, 0), default=96, help="after rounding (96)")
    parser.add_argument("--score", action="store_true", help="only score the unquantised model")
    parser.add_argument("--quick", action="store_true", help="8,192 tokens, little calibration, LZMA")
    options = parser.parse_args()
    if not (options.run / "checkpoint.pt").exists():
        parser.error(f"{options.run}: no checkpoint.pt there; train with STAGE=train first")
    if options.quick:
        options.tokens, options.calibration = 2 * CHUNK, 4 * CHUNK
        options.tune_steps = min(options.tune_steps, len(t.ROUNDING_GROUPS))
    began = time.monotonic()
    tuning = {"TUNE_STEPS": str(options.tune_steps), "TUNE_MATRICES": str(int(options.tune_steps > 0))}
    compressor = "lzma" if options.quick else "brotli"
    subject = DeviceSubject(options.run, 0, options.tokens, compressor, tuning)
    chunks = range(len(subject.hidden))
    bpb = subject.bits_per_byte(chunks)
    facts = {"device": str(subject.run.device), "tokens": CHUNK * len(chunks), "quick": options.quick}
    t.write_atomically(options.run / "score.json", json.dumps(facts | {"bpb": bpb}).encode())
    print(
        f"{subject.count} weights, {CHUNK * len(chunks)} tokens, {subject.run.device}; "
        f"unquantised BPB {bpb:.5f}"
    )
    rows = {} if options.score else compare(subject, options, chunks, bpb)
    seconds = round(time.monotonic() - began, 1)
    print("RESULT " + json.dumps({**facts, "bpb": bpb, "packers": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
