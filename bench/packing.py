#!/usr/bin/env python3
"""Packers on one trained checkpoint at equal bytes: size, KL to the unquantised model, BPB, time and memory.

    python bench/packing.py [--run runs/packing] [--lrzip PATH] [--tokens 204800] [--states 64] [--quick]
                            [--rates 1.5 ... 3.6] [--only-rates] [--tune-rates 2.25 2.75] [--tune-steps 20]
                            [--context 256]

The run folder is that of bench/checkpoint.py. Both packers are tuned on the first validation tokens, with
equally many trials at about 3.3 bit per weight, and reported on others; the figures of RESULT are those of
ours as shipped, untuned. Schemes: SDClip with brotli and, if lrzip is there, its zpaq per role (brotli for
the small streams); ours with each part switched on in turn. Every file is decoded again and the KL is that of
the decoded weights. The rows that show single parts are judged on --part-tokens, the others on --tokens and
(last column) on the same as these. Time and memory of the full shape come from random weights of the
contest's 36 M.
The curve at --rates bits a weight has the public packer, ours as shipped, that with errors fed back across
rows too (OUTPUT_FEEDBACK), and at --tune-rates this with --tune-steps of training of the fp16 tensors and of
the matrices that are not rounded yet (TUNE_MATRICES). kl_ratio_2_75 and the like are all of it against ours
as shipped, at equal bytes. --only-rates: nothing but that curve. The seconds of the flagship's 45 M weights
come last, for three sizes and for tuning; --only-shape: nothing but them.
--quick: few tokens, two sizes, LZMA for brotli, one layer of the full shape (seconds scaled to 36 M); the
same keys. Without a checkpoint it trains a tiny model on the demo's text first.
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
import json
import math
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import recipes
import train_gpt as t

CHUNK = 4096  # validation tokens that are judged at once
RATES = (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.3, 3.6)
TUNE_RATES = (2.25, 2.75)
TINY = {  # of --quick without a checkpoint
    "STAGE": "train",
    "MODEL_DIM": "64",
    "NUM_LAYERS": "4",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "ITERATIONS": "30",
}
Row = dict[str, Any]


class Subject:
    """The trained model, its matrices and training data, and the divergence of other weights from its own."""

    def __init__(
        self, folder: Path, tuning: int, tokens: int, compressor: str, changes: dict[str, str] | None = None
    ):
        settings = json.loads((folder / "config.json").read_text())
        known = {field.name.upper() for field in dataclasses.fields(t.Config)}
        settings = {name: t.format_value(value) for name, value in settings.items() if name in known}
        fixed = {"STAGE": "quantize", "COMPRESSOR": compressor}
        fixed |= {"COMPUTE_DTYPE": "float32", "EVAL_SEQ_LEN": "256"}
        self.config = t.Config.from_env(settings | fixed | (changes or {}))
        # What is judged are weights in fp32, whatever the products are taken in.
        self.config = dataclasses.replace(self.config, embed_master_fp32=True)
        self.run, self.data = t.Run(self.config), t.Dataset(self.config)
        self.model = t.GPT(self.config, dtype=self.run.dtype)
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        self.weights = {name: weight.float() for name, weight in saved["average"].items()}
        self.model.load_state_dict(self.weights)
        self.model.looped = saved["looped"]
        self.todo = t.list_matrices(self.model.table)
        self.count = sum(self.weight(m).numel() for m in self.todo)
        validation = t.load_validation(self.data)
        self.tuning = tuning // CHUNK
        chunks = min(tuning + tokens, len(validation.tokens) - 1) // CHUNK
        ids = torch.from_numpy(validation.tokens[: chunks * CHUNK + 1].astype(np.int64))
        shape = (chunks, -1, self.config.eval_seq_len)
        self.inputs, self.targets = ids[:-1].view(shape), ids[1:].view(shape)
        self.bytes = validation.bytes[1 : chunks * CHUNK + 1].reshape(chunks, CHUNK).sum(1)
        self.hidden = [self.trunk(chunk) for chunk in range(chunks)]

    @torch.no_grad()
    def trunk(self, chunk: int) -> Tensor:
        """Input of the head for CHUNK tokens, in windows of EVAL_SEQ_LEN."""
        return self.model.trunk(t.Batch(self.inputs[chunk], self.targets[chunk]), t.Hooks()).flatten(0, 1)

    def weight(self, m: t.Matrix) -> Tensor:
        """The unquantised matrix."""
        return self.weights[m.parameter] if m.index is None else self.weights[m.parameter][m.index]

    def moments(self, tokens: int) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """Calibration on so many training tokens."""
        changes = {"train_batch_tokens": 8 * CHUNK, "gptq_calibration_batches": max(1, tokens // CHUNK)}
        self.run.config = dataclasses.replace(self.config, **changes)
        return t.collect_moments(self.run, self.model, self.data)

    @torch.no_grad()
    def divergence(self, weights: dict[str, Tensor], chunks: range) -> tuple[np.ndarray, float]:
        """(KL in nats per token of the model from the one with `weights`, by chunk; more bits per byte)."""
        cap, worse, head, found = self.config.logit_softcap, 0.0, self.weights["embed"], []

        def chances(hidden: Tensor, matrix: Tensor) -> Tensor:
            raw = F.linear(hidden, matrix.to(hidden.dtype)).float()
            return F.log_softmax(cap * torch.tanh(raw / cap), -1)

        self.model.load_state_dict(weights)
        for chunk in chunks:
            p, q = chances(self.hidden[chunk], head), chances(self.trunk(chunk), weights["embed"])
            worse += float((p - q).gather(1, self.targets[chunk].view(-1, 1)).double().sum())
            found.append(float(F.kl_div(q, p, reduction="sum", log_target=True)) / CHUNK)
        return np.array(found), worse / math.log(2) / self.bytes[list(chunks)].sum()

    def tune(self, tensors: dict[str, t.Quantized], moments: dict, goal: int, form: Form) -> None:
        """Tune `tensors`, a file of `goal` bytes, as the settings say, rounding as `form` says."""
        changes = {"output_dampening": form.damping, "correct_levels": form.levels}
        self.run.config = dataclasses.replace(self.config, **changes)
        t.tune(self.run, self.model, self.data, self.weights, tensors, moments, goal)

    def small(self) -> dict[str, t.Quantized]:
        """The tensors that are not quantised."""
        table = self.model.table
        return {
            n: t.Quantized(self.weights[n].half()) for n, spec in table.items() if spec.quantizer == "fp16"
        }


def role(name: str) -> str:
    """The stream of a matrix."""
    return re.sub(r"\d+", "*", name)


def by_role(tensors: dict[str, t.Quantized]) -> dict[str, list[np.ndarray]]:
    """The integer matrices of each stream."""
    roles: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        if tensor.scales is not None:
            roles.setdefault(role(name), []).append(tensor.values.numpy())
    return roles


def symbol_bits(tensors: dict[str, t.Quantized]) -> float:
    """Entropy in bits of the integers given their role."""
    flat = [np.concatenate([values.ravel() for values in parts]) for parts in by_role(tensors).values()]
    counts = [np.unique(values, return_counts=True)[1] for values in flat]
    return -sum(float((n * np.log2(n / n.sum())).sum()) for n in counts)


def zpaq_bytes(tensors: dict[str, t.Quantized], lrzip: str) -> tuple[int, float, float]:
    """(bytes, encode and decode seconds) with one lrzip zpaq file per role; brotli where that is smaller."""
    streams: dict[str, list[bytes]] = {}
    for name, tensor in tensors.items():
        for stream, part in t.streams_of(name, tensor):  # columns of integers one after the other: smaller
            raw = part.numpy().reshape(-1, 1).view(np.uint8) if part.dtype != torch.int8 else part.numpy()
            streams.setdefault(stream, []).append(raw.T.tobytes())
    total, seconds, back = 0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for parts in streams.values():
            path, data = Path(folder) / "x", b"".join(parts)
            path.write_bytes(data)
            began = time.perf_counter()
            subprocess.run([lrzip, "-z", "-q", "-f", "-L", "9", str(path)], check=True, capture_output=True)
            done = time.perf_counter()
            subprocess.run([lrzip, "-d", "-q", "-f", str(path) + ".lrz"], check=True, capture_output=True)
            seconds, back = seconds + done - began, back + time.perf_counter() - done
            small = len(t.compress(data, "brotli")) if len(data) < 200_000 else len(data)
            total += min(small, os.path.getsize(str(path) + ".lrz"))
    return total, seconds, back


class Clip(NamedTuple):
    """SDClip's settings: step over standard deviation and integer width of each class."""

    embed: float = 14 / 63
    attn: float = 13 / 31
    mlp: float = 11.5 / 31
    embed_bits: int = 7
    bits: int = 6


class Form(NamedTuple):
    """Our packer's settings."""

    states: int = 64
    between: float = t.SENSITIVITY_POWERS[0]  # powers of the sensitivities between matrices,
    rows: float = t.SENSITIVITY_POWERS[1]  # of rows
    columns: float = t.SENSITIVITY_POWERS[2]  # and of columns
    rate: float = t.BIT_PRICE  # weight of the rate term
    feedback: bool = False  # across rows as well
    damping: float = 0.0  # of the outputs' moments
    levels: bool = False  # corrected between kinds of matrices


ALL = Form(feedback=True, damping=0.25, levels=True)


class Packers:
    """Both packers on one subject, judged on some chunks of its validation text."""

    def __init__(self, subject: Subject, calibration: int):
        self.subject = subject
        self.moments = subject.moments(calibration)
        self.whole: dict[tuple[str, int], Tensor] = {}  # E[g g^T] of those that have it
        for key, (inputs, outputs) in self.moments.items():
            if outputs.dim() == 2:
                self.whole[key] = outputs
                self.moments[key] = inputs, outputs.diagonal()
        self.flat = self.problems(Form(rows=0, columns=0, between=0))

    def sdclip(self, c: Clip, factor: float = 1.0) -> dict[str, t.Quantized]:
        """All tensors by SDClip GPTQ with the steps of `c` times `factor`."""

        def one(m: t.Matrix) -> tuple[str, t.Quantized]:
            bits = c.embed_bits if m.quantizer == "embed" else c.bits
            sigmas = factor * getattr(c, m.quantizer) * (2 ** (bits - 1) - 1)
            return m.name, t.round_clipped(self.flat[m.name], sigmas, bits)

        return dict(t.parallel_map(one, self.subject.todo)) | self.subject.small()

    def problems(self, form: Form) -> dict[str, t.RoundingProblem]:
        """What our packer rounds."""
        powers = (form.between, form.rows, form.columns)

        def pose(m: t.Matrix) -> tuple[str, t.RoundingProblem]:
            inputs, outputs = self.moments[m.key]
            if form.feedback and m.key in self.whole:
                outputs = self.whole[m.key]
            damping = form.damping if m.quantizer != "embed" else 0.0
            problem = t.rounding_problem(self.subject.weight(m), inputs, outputs, 0.01, powers, damping)
            return m.name, t.correct_level(problem, m.parameter) if form.levels else problem

        return dict(t.parallel_map(pose, self.subject.todo))

    def trellised(
        self, problems: dict[str, t.RoundingProblem], form: Form, delta: float
    ) -> tuple[dict[str, t.Quantized], bytes]:
        """All tensors by our packer, and the file."""
        tensors = t.round_matrices(problems, delta, form.states, form.rate) | self.subject.small()
        return tensors, self.write(tensors, form.states)

    def fit(
        self, problems: dict[str, t.RoundingProblem], form: Form, goal: int, room: int
    ) -> tuple[dict[str, t.Quantized], bytes, float, int]:
        """Tensors and file of `goal` bytes less `room`; the seconds of this try, and how many there were."""
        files: dict[float, tuple[dict[str, t.Quantized], bytes, float]] = {}

        def size_of(delta: float) -> int:
            began = time.perf_counter()
            tensors, data = self.trellised(problems, form, delta)
            files[delta] = tensors, data, time.perf_counter() - began
            return len(data) + room

        guess = t.guess_delta(problems, goal, form.states)
        delta = t.fit_delta(guess, goal, self.subject.count / 8, size_of, lambda line: None)
        return *files[delta], len(files)

    def write(self, tensors: dict[str, t.Quantized], states: int = 0) -> bytes:
        """The artifact."""
        config = dataclasses.replace(self.subject.config, trellis_states=states)
        return t.encode_artifact(config, tensors, self.subject.model.looped)

    def read(self, data: bytes) -> dict[str, Tensor]:
        """The parameters in an artifact."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "x").write_bytes(data)
            return t.assemble_weights(self.subject.model.table, t.decode_artifact(Path(folder) / "x")[1])


def tune(start: Any, choices: dict[str, list], trials: int, score: Callable[[Any], float], log: str) -> Any:
    """The best settings that so many trials find, one after the other, each value from the best so far."""
    best, least, seen = start, score(start), {start}
    for name, values in [*choices.items()] * 3:
        for value in values:
            candidate = best._replace(**{name: value(getattr(best, name)) if callable(value) else value})
            if candidate in seen or len(seen) == trials:
                continue
            seen.add(candidate)
            if (found := score(candidate)) < least:
                best, least = candidate, found
    print(
        f"{log}: {len(seen)} trials, log2 KL at the goal {score(start):.3f} -> {least:.3f}: {best}",
        flush=True,
    )
    return best


class Report:
    """The table: every scheme at every size."""

    def __init__(self, packers: Packers, lrzip: str | None, part_chunks: int):
        self.packers, self.subject, self.lrzip, self.part_chunks = (
            packers,
            packers.subject,
            lrzip,
            part_chunks,
        )
        print(
            f"{'scheme':<26}{'setting':>10}{'bytes':>11}{'bit/w':>8}{'KL':>10}{'dBPB':>10}{'encode':>9}{'decode':>8}"
            f"{'MiB':>7}{'part KL':>10}"
        )

    def judge(self, weights: dict[str, Tensor], whole: bool) -> Row:
        """Divergence on the reporting part of the validation text, or on its beginning."""
        first, last = self.subject.tuning, len(self.subject.hidden)
        chunks = range(first, last if whole else min(last, first + self.part_chunks))
        kl, bpb = self.subject.divergence(weights, chunks)
        return {"kl": kl.mean(), "kl_part": kl[: self.part_chunks].mean(), "delta_bpb": bpb, "kl_chunks": kl}

    def show(self, row: Row) -> Row:
        """Print one line."""
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{row['scheme']:<26}{row['setting']:>10}{row['bytes']:>11}"
            f"{8 * row['bytes'] / self.subject.count:>8.3f}"
            f"{row['kl']:>10.5f}{row['delta_bpb']:>+10.5f}{row['encode']:>9.1f}{row['decode']:>8.1f}"
            f"{row['peak_mib']:>7}{row['kl_part']:>10.5f}",
            flush=True,
        )
        return row

    def public(self, name: str, clip: Clip, factors: list[float]) -> list[Row]:
        """SDClip at several clip widths, with every compressor there is."""
        rows = []
        for factor in factors:
            began = time.perf_counter()
            tensors = self.packers.sdclip(clip, factor)
            rounded = time.perf_counter()
            data = self.packers.write(tensors)
            packed = time.perf_counter()
            weights = self.packers.read(data)
            files = {
                self.subject.config.compressor: (len(data), packed - rounded, time.perf_counter() - packed)
            }
            if self.lrzip:
                files["zpaq"] = zpaq_bytes(tensors, self.lrzip)
            result = self.judge(weights, True)
            for coder, (size, seconds, back) in files.items():
                times = {"encode": rounded - began + seconds, "decode": back}
                row = {
                    "scheme": f"{name}+{coder}",
                    "setting": f"k x {factor:.2f}",
                    "bytes": size,
                    **times,
                    **result,
                }
                rows.append(self.show(row))
        return rows

    def ours(self, name: str, form: Form, goals: list[int], whole: bool, tuned: bool = False) -> list[Row]:
        """Our packer at each goal in bytes, decoded again from its file; with `tuned`, also tuned."""
        small = self.subject.small()
        room = t.fp16_growth(self.subject.config, small) if tuned else 0
        problems = self.packers.problems(form)
        rows = []
        for goal in goals:
            tensors, data, seconds, tries = self.packers.fit(problems, form, goal, room)
            tune_seconds = time.process_time()
            if tuned:
                fed = self.packers.whole if form.feedback else {}
                moments = {key: (x, fed.get(key, y)) for key, (x, y) in self.packers.moments.items()}
                self.subject.tune(tensors, moments, goal, form)
                data = self.packers.write(tensors, form.states)
            tune_seconds = time.process_time() - tune_seconds
            began = time.perf_counter()
            weights = self.packers.read(data)
            back = time.perf_counter() - began
            exact = t.assemble_weights(self.subject.model.table, tensors)
            assert all(torch.equal(weights[name], exact[name]) for name in exact)
            result = self.judge(weights, whole)
            row = {"scheme": name, "setting": f"{tries} tries", "bytes": len(data), "encode": seconds}
            more = {"decode": back, "off": len(data) / goal - 1, "tensors": tensors, "tune": tune_seconds}
            rows.append(self.show(row | more | result))
        return rows


def clip_factor(packers: Packers, clip: Clip, bits: float) -> float:
    """The factor on the clips with which SDClip's integers have about `bits` of entropy a weight."""
    octaves = 0.0
    for _ in range(6):
        found = symbol_bits(packers.sdclip(clip, 2**octaves)) / packers.subject.count
        octaves += found - bits
        if abs(found - bits) < 0.01:
            break
    return 2**octaves


def low_rates(report: Report, rates: list[float], tune_rates: list[float]) -> dict[str, Any]:
    """The curve at `rates` bits a weight, tuned at `tune_rates` of them; the figures of RESULT."""
    count = report.subject.count
    goals = {rate: int(rate * count / 8) for rate in rates}
    factors = [clip_factor(report.packers, Clip(), rate) for rate in rates]
    report.public("SDClip untuned", Clip(), factors)
    plain = report.ours("ours, as shipped", Form(), [*goals.values()], True)
    rounded = report.ours("+ rows feed back, levels", ALL, [*goals.values()], True)
    tuned = report.ours("+ tuning", ALL, [goals[rate] for rate in tune_rates], True, tuned=True)
    plain_at = dict(zip(rates, plain, strict=True))
    tuned_at = dict(zip(tune_rates, tuned, strict=True))
    result: dict[str, Any] = {"rates": rates, "tune_rates": tune_rates}
    for rate in (2.75, 2.25):
        name = str(rate).replace(".", "_")
        result[f"kl_ratio_{name}"] = result[f"delta_bpb_{name}"] = None
        if rate in tuned_at:
            result[f"kl_ratio_{name}"] = round(tuned_at[rate]["kl"] / plain_at[rate]["kl"], 4)
            result[f"delta_bpb_{name}"] = round(tuned_at[rate]["delta_bpb"], 5)
    for name, rows in (("plain", plain), ("feedback", rounded), ("tuned", tuned)):
        result[f"kl_{name}"] = [round(row["kl"], 6) for row in rows]
        result[f"delta_bpb_{name}"] = [round(row["delta_bpb"], 5) for row in rows]
    seconds = [row["tune"] for row in tuned]
    result["tune_seconds"] = round(sum(seconds) / len(seconds), 1) if seconds else None
    return result


def train_tiny(folder: Path) -> Path:
    """A run folder with the checkpoint of half a minute on the demo's text, which is made if need be."""
    subprocess.run([sys.executable, str(ROOT / "data" / "demo.py"), "--vocab-size", "1024"], check=True)
    recipe = (ROOT / "records" / "recipes" / "cpu_demo.env").read_text()
    settings = dict(line.split("=", 1) for line in recipe.splitlines() if line[:1].isalpha())
    places = {"OUT_DIR": str(folder), "RUN_ID": "tiny", "DATASETS_DIR": str(ROOT / "data" / "demo")}
    variables = os.environ | settings | TINY | places
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=variables, check=True, cwd=ROOT)
    return folder / "tiny"


@numba.njit(nogil=True)
def count_symbol(symbol, context, counts, coder, buffer, decoding):
    """Stands in for code_symbol: only counts."""
    counts[context, symbol] += 1
    return symbol


def counting_coder() -> Callable:
    """code_integers, with count_symbol in the place of code_symbol."""
    compiled = count_symbol
    callee = "code_symbol"
    for name in ("code_integer", "code_matrix", "code_integers"):  # each calls the one before
        source = getattr(t, name).py_func
        compiled = numba.njit(types.FunctionType(source.__code__, source.__globals__ | {callee: compiled}))
        callee = name
    return compiled


def overhead(tensors: dict[str, t.Quantized], states: int) -> float:
    """Bytes of the integer streams over the empirical entropy of their symbols by context, less 1."""
    count_integers = counting_coder()
    after = t.trellis(states)[0]
    real, bits = 0, 0.0
    for parts in by_role(tensors).values():
        counts = np.zeros((2 * t.SIZE_CLASSES + 4, t.SYMBOLS + 1), np.int64)
        values = np.concatenate([m.ravel() for m in parts])
        shapes = np.array([m.shape for m in parts])
        count_integers(values, shapes, after, counts, np.zeros(3, np.int64), np.zeros(64, np.uint8), False)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        bits -= float((counts * np.log2(np.where(share > 0, share, 1))).sum())
        real += len(t.code_matrices(parts, states))
    return 8 * real / bits - 1


def interpolate(rows: list[Row], x: str, y: str, at: float) -> float:
    """exp of log(y) as a line of log(x) through the two rows nearest to `at`."""
    nearest = sorted(rows, key=lambda row: abs(math.log(row[x] / at)))[:2]
    (a, b), (c, d) = ((math.log(row[x]), math.log(row[y])) for row in nearest)
    return math.exp(b + (d - b) * (math.log(at) - a) / (c - a)) if a != c else math.exp(b)


def shapes_of(layers: int, hidden: int) -> dict[str, tuple[int, int]]:
    """The contest's matrices by name; of fewer than 11 layers, with as large a part of the embedding."""
    block = {
        "q": (512, 512),
        "k": (256, 512),
        "v": (256, 512),
        "o": (512, 512),
        "up": (hidden, 512),
        "down": (512, hidden),
    }
    shapes = {f"{name}.{layer}": shape for name, shape in block.items() for layer in range(layers)}
    if layers < 11:
        return shapes | {f"embed.{layer}": (8192 // 11, 512) for layer in range(layers)}
    return shapes | {"embed": (8192, 512)}


def random_moments(width: int, generator: torch.Generator) -> Tensor:
    """Second moments (width, width) of vectors whose channels differ in size."""
    x = torch.randn(2 * width, width, generator=generator) * torch.rand(width, generator=generator)
    return x.T @ x / (2 * width)


def full_problems(form: Form, shapes: dict[str, tuple[int, int]]) -> tuple[dict, float]:
    """Rounding problems of random weights and moments in these shapes, and the seconds that posing takes."""
    generator = torch.Generator().manual_seed(0)

    sides = {side for name, shape in shapes.items() if role(name) != "embed*" for side in shape}
    moments = {width: random_moments(width, generator) for width in sorted(sides)}
    weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    squares = {name: 0.5 + torch.rand(shape[0], generator=generator) for name, shape in shapes.items()}
    powers = (0.0, form.rows, form.columns)

    def pose(name: str) -> t.RoundingProblem:
        rows, columns = shapes[name]
        outputs = moments[rows] if form.feedback and not name.startswith("embed") else squares[name]
        return t.rounding_problem(weights[name], moments[columns], outputs, 0.01, powers, form.damping)

    first = t.round_matrices({"": pose("k.0")}, 1.0, form.states, 0.0)[""]  # compiles
    t.code_stream([first.values], "brotli", form.states)
    began = time.perf_counter()
    problems = dict(zip(shapes, t.parallel_map(pose, shapes), strict=True))
    return problems, time.perf_counter() - began


def full_shape(form: Form, layers: int, hidden: int, bits: float) -> dict[str, float]:
    """Seconds to plan, round, encode and decode random weights of the full shape once, and peak memory.

    The MLPs are `hidden` wide; fewer layers than 11 stand for as many.
    """
    scaled = 11 / layers
    shapes = shapes_of(layers, hidden)
    problems, planning = full_problems(form, shapes)
    count = sum(math.prod(shape) for shape in shapes.values())
    delta = t.guess_delta(problems, bits * count / 8, form.states)
    roles: dict[str, list[str]] = {}
    for name in shapes:
        roles.setdefault(role(name), []).append(name)
    groups = sorted(roles.values(), key=lambda names: -sum(math.prod(shapes[n]) for n in names))
    times = [planning]
    began = time.perf_counter()
    tensors = t.round_matrices(problems, delta, form.states, form.rate)
    integers = {name: tensor.values.numpy() for name, tensor in tensors.items()}
    times.append(time.perf_counter() - began)
    began = time.perf_counter()
    streams = t.parallel_map(lambda names: t.code_matrices([integers[n] for n in names], form.states), groups)
    times.append(time.perf_counter() - began)
    began = time.perf_counter()
    again = {name: np.empty(shape, np.int32) for name, shape in shapes.items()}
    fill = lambda job: t.code_matrices([again[n] for n in job[1]], form.states, job[0])
    t.parallel_map(fill, list(zip(streams, groups, strict=True)))
    times.append(time.perf_counter() - began)
    assert all(np.array_equal(again[name], integers[name]) for name in shapes)
    facts = dict(
        zip(("plan", "round", "encode", "decode"), (scaled * seconds for seconds in times), strict=True)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return facts | {"bits": 8 * sum(map(len, streams)) / count, "peak_mib": peak}


def product_seconds(dtype: torch.dtype) -> float:
    """Seconds of a product of the flagship's MLPs on this machine, the least of five."""
    inputs, weight = torch.ones(1024, 512, dtype=dtype), torch.ones(2816, 512, dtype=dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        F.linear(inputs, weight)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class RandomText:
    """Stands in for the loader of calibration and tuning: random tokens in forwards of `tokens`."""

    def __init__(self, config: t.Config, tokens: int, window: int):
        self.shape = (-1, window)
        self.tokens = tokens
        self.vocab_size = config.vocab_size

    def get(self, step: int, stream: int) -> t.Batch:
        """The tokens of one forward."""
        generator = torch.Generator().manual_seed(step * t.STREAMS + stream)
        ids = torch.randint(self.vocab_size, (self.tokens + 1,), generator=generator)
        return t.Batch(ids[:-1].view(self.shape), ids[1:].view(self.shape))


def moments_for(model: t.GPT) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Stand-ins for what calibration finds for `model` with OUTPUT_FEEDBACK, the same for equal widths."""
    generator = torch.Generator().manual_seed(0)
    found: dict[int, Tensor] = {}

    def of_width(width: int) -> Tensor:
        if width not in found:
            found[width] = random_moments(width, generator)
        return found[width]

    moments = {}
    for matrix in t.list_matrices(model.table):
        rows, columns = model.get_parameter(matrix.parameter).shape[-2:]
        whole = matrix.key[0] not in ("head", "bigram")
        outputs = of_width(rows) if whole else 0.5 + torch.rand(rows, generator=generator)
        moments[matrix.key] = of_width(columns), outputs
    return moments


def packer_settings(options: argparse.Namespace) -> dict[str, str]:
    """Settings of a run that rounds like ALL and is tuned as the options say."""
    return {
        "OUTPUT_FEEDBACK": "1",
        "OUTPUT_DAMPENING": str(ALL.damping),
        "CORRECT_LEVELS": "1",
        "TUNE_STEPS": str(options.tune_steps),
        "TUNE_TOKENS": str(options.tune_tokens),
        "TUNE_MATRICES": "1",
    }


def matrix_weights(table: dict[str, t.ParameterSpec]) -> int:
    """How many weights the matrices of a model have."""
    return sum(math.prod(table[name].shape) for name in {m.parameter for m in t.list_matrices(table)})


def packing_seconds(config: t.Config) -> tuple[float, float, float]:
    """Seconds to quantise, tune and encode a model with random weights at 2.85 bits each, on random text."""
    run = t.Run(config)
    run.log = lambda line: None
    run.progress = lambda what, items: items
    model = t.GPT(config, dtype=run.dtype)
    model.looped = True
    generator = torch.Generator().manual_seed(0)
    weights = {name: weight.float().clone() for name, weight in model.state_dict().items()}
    for name in sorted({matrix.parameter for matrix in t.list_matrices(model.table)}):
        weights[name] = 0.02 * torch.randn(weights[name].shape, generator=generator)
    moments = moments_for(model)
    goal = int(2.85 * matrix_weights(model.table) / 8)
    loader = t.rounding_loader
    t.rounding_loader = lambda config, data, tokens, window: RandomText(config, tokens, window)
    try:
        began = time.perf_counter()
        tensors = t.quantize(run, model.table, weights, goal, True, moments)
        rounded = time.perf_counter()
        t.tune(run, model, None, weights, tensors, moments, goal)
        tuned = time.perf_counter()
    finally:
        t.rounding_loader = loader
    data = t.encode_artifact(config, tensors, True)
    encoded = time.perf_counter()
    assert len(data) <= goal
    return rounded - began, tuned - rounded, encoded - tuned


def whole_packing(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of quantising, tuning and encoding the flagship, by the trainer's own code.

    All of it: rounding to size, each group's turn and the file. --quick: a model of an eighth of the width,
    seconds scaled by the weights.
    """
    dtype = min((torch.float32, torch.bfloat16), key=product_seconds)  # bf16 where the CPU has such products
    settings = recipes.read(ROOT / "records" / "recipes" / "flagship.env") | packer_settings(options)
    settings["COMPUTE_DTYPE"] = str(dtype).removeprefix("torch.")
    whole = matrix_weights(t.parameter_table(t.Config.from_env(settings)))
    if options.quick:
        settings |= {"MODEL_DIM": "64", "NUM_HEADS": "2", "NUM_KV_HEADS": "1"}
    config = t.Config.from_env(settings)
    count = matrix_weights(t.parameter_table(config))
    quantise, tune, encode = packing_seconds(config)
    print(
        f"flagship, {count} weights in {dtype}: quantise {quantise:.1f} s, {options.tune_steps} steps of "
        f"{options.tune_tokens} tokens {tune:.1f} s, encode {encode:.1f} s"
    )
    return {
        "quantize_tune_encode_seconds_45m": round(whole / count * (quantise + tune + encode), 1),
        "tune_seconds_45m": round(whole / count * tune, 1),
    }


def flagship_shape(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for the flagship's 45 M weights, rounded from one side and from both, and with tuning.

    Of the first two, three sizes are tried until a file fits.
    """
    result: dict[str, Any] = {}
    for name, form in (("", Form()), ("two_sided_", ALL)):
        shape = full_shape(form, 1 if options.quick else 11, 2816, 2.85)
        print(f"45 M shape {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in shape.items()))
        seconds = shape["plan"] + 3 * (shape["round"] + shape["encode"])
        result[f"{name}quantize_encode_seconds_45m"] = round(seconds, 1)
        result[f"{name}decode_seconds_45m"] = round(shape["decode"], 1)
    tune_tokens = options.tune_steps * options.tune_tokens
    return result | whole_packing(options) | {"tune_tokens_45m": tune_tokens}


def compare(report: Report, options: argparse.Namespace) -> dict[str, Any]:
    """Both packers tuned, then at equal bytes, and ours part by part; the figures of RESULT."""
    packers, subject = report.packers, report.subject
    tuning, goal = range(subject.tuning), 3.3

    def at_goal(weights: dict[str, Tensor], bits: float) -> float:
        """log2 of the KL on the tuning part, moved to the goal: 6 dB a bit."""
        return math.log2(subject.divergence(weights, tuning)[0].mean()) + 2 * (bits / subject.count - goal)

    shift = {
        "SDClip": 0.0,
        "ours": 0.0,
    }  # log2 of the factor on all steps that gave the last trial the goal's bits

    def score_public(clip: Clip) -> float:
        tensors = packers.sdclip(clip, 2 ** shift["SDClip"])
        bits = symbol_bits(tensors)
        shift["SDClip"] += bits / subject.count - goal
        return at_goal(t.assemble_weights(subject.model.table, tensors), bits)

    def score_ours(form: Form) -> float:
        problems = packers.problems(form)
        delta = t.guess_delta(problems, goal * subject.count / 8, form.states) * 2 ** shift["ours"]
        data = packers.trellised(problems, form, delta)[1]
        shift["ours"] += 8 * len(data) / subject.count - goal
        return at_goal(packers.read(data), 8 * len(data))

    times = lambda *factors: [lambda now, factor=factor: now * factor for factor in factors]
    wider = times(0.7, 1.4)
    clips = {"embed": wider, "attn": wider, "mlp": wider, "embed_bits": [6, 8], "bits": [5, 7]}
    clip = tune(Clip(), clips, options.trials, score_public, "SDClip")
    powers = {
        "between": [0.5, 0.75],
        "rows": [0.5, 0.75, 1.25],
        "columns": [0.5, 0.75, 1.25],
        "rate": [0.0, 0.25, 1.0],
    }
    form = tune(Form(options.states), powers, options.trials, score_ours, "ours")

    score_public(clip)
    factors = [2 ** (shift["SDClip"] + more) for more in ((0, 0.4) if options.quick else (-0.4, 0, 0.4))]
    if not options.quick:
        report.public("SDClip untuned", Clip(), [1.0])
    public = report.public("SDClip", clip, factors)
    best = min(
        {row["scheme"] for row in public}, key=lambda n: sum(r["bytes"] for r in public if r["scheme"] == n)
    )
    public = [row for row in public if row["scheme"] == best]
    goals = [row["bytes"] for row in public]
    final = report.ours("ours, as shipped", Form(options.states), goals, True)
    if form != Form(options.states):
        report.ours("ours, tuned here", form, goals, True)
    if not options.quick:
        steps = {"one step for all, scalar": Form(0, 0, 0, 0, 0)}
        steps["+ between matrices"] = Form(0, form.between, 0, 0, 0)
        steps["+ rows"] = Form(0, form.between, form.rows, 0, 0)
        steps["+ columns"] = Form(0, form.between, form.rows, form.columns, 0)
        steps |= {f"+ trellis, {n} states": form._replace(states=n, rate=0) for n in (8, 64, 256)}
        steps |= {
            f"+ rate term, {n} states": form._replace(states=n, rate=form.rate or 0.5) for n in (64, 256)
        }
        for name, one in steps.items():
            report.ours(name, one, goals, False)
    ratio = [ours["kl"] / row["kl"] for ours, row in zip(final, public, strict=True)]
    middle = len(goals) // 2
    saved = 1 - interpolate(final, "kl", "bytes", public[middle]["kl"]) / goals[middle]
    extra = [overhead(row["tensors"], options.states) for row in final]
    shape = full_shape(form, 1 if options.quick else 11, 2048, 3.3)
    print("36 M shape: " + ", ".join(f"{name} {value:.1f}" for name, value in shape.items()))
    return {
        "kl_ratio_equal_bytes": round(ratio[middle], 4),
        "bytes_saved_equal_kl": round(saved, 4),
        "entropy_overhead": round(max(extra), 5),
        "quantize_encode_seconds_36m": round(shape["plan"] + shape["round"] + shape["encode"], 1),
        "decode_seconds_36m": round(shape["decode"], 1),
        "kl_ratios": [round(r, 4) for r in ratio],
        "bits": [round(8 * size / subject.count, 3) for size in goals],
        "public": best,
        "worst_size_error": max(abs(row["off"]) for row in final),
        "shipped": Form(options.states)._asdict(),
        "tuned": form._asdict(),
    }


def parse_options() -> argparse.Namespace:
    """The options of the command line; a --run without a checkpoint ends the program, but for --quick."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, default=ROOT / "runs" / "packing", help="run folder of bench/checkpoint.py")
    add("--lrzip", default=shutil.which("lrzip"), help="lrzip program; without: brotli only")
    add("--tokens", type=int, default=204_800, help="validation tokens of the report")
    add("--part-tokens", type=int, default=40_960, help="of these, for the rows of single parts")
    add("--tuning", type=int, default=16_384, help="validation tokens before these, for tuning")
    add("--trials", type=int, default=18, help="settings that each packer may try")
    add("--calibration", type=int, default=65_536, help="training tokens of the sensitivities")
    add("--states", type=int, default=64, choices=[8, 64, 256], help="states of the trellis")
    add("--rates", type=float, nargs="+", default=RATES, help="bits a weight of the curve at low rates")
    add("--tune-rates", type=float, nargs="*", help="those of --rates that are tuned too: 2.25 and 2.75")
    add("--only-rates", action="store_true", help="nothing but that curve")
    add("--only-shape", action="store_true", help="nothing but seconds of the full shape; no run is needed")
    add("--tune-steps", type=int, default=20, help="TUNE_STEPS of that curve")
    add("--tune-tokens", type=int, default=256, help="TUNE_TOKENS of that curve")
    add("--context", type=int, default=256, help="tokens of a window")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products")
    add("--quick", action="store_true", help="few tokens and sizes; trains a tiny model if need be")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.part_tokens, options.tuning, options.trials = 8192, 4096, 4096, 2
        options.calibration, options.lrzip, options.rates, options.tune_steps = 4096, None, [2.25, 2.75], 4
    if options.tune_rates is None:
        options.tune_rates = [rate for rate in TUNE_RATES if rate in options.rates]
    for rate in options.tune_rates:
        if rate not in options.rates:
            parser.error(f"--tune-rates {rate}: none of --rates; name it there as well")
    if not (options.quick or options.only_shape) and not (options.run / "checkpoint.pt").exists():
        parser.error(f"--run {options.run}: no checkpoint.pt there; make one with bench/checkpoint.py")
    return options


def main() -> None:
    """Print the tables and the RESULT line."""
    options = parse_options()
    if options.only_shape:
        print("RESULT " + json.dumps(flagship_shape(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not (options.run / "checkpoint.pt").exists():
            options.run = train_tiny(Path(folder))
        changes = packer_settings(options)
        changes |= {"COMPUTE_DTYPE": options.dtype, "EVAL_SEQ_LEN": str(options.context)}
        coder = "lzma" if options.quick else "brotli"
        subject = Subject(options.run, options.tuning, options.tokens, coder, changes)
        packers = Packers(subject, options.calibration)
        tokens = CHUNK * (len(subject.hidden) - subject.tuning)
        others = f"{CHUNK * subject.tuning} tokens for tuning, {tokens} others for the report"
        print(f"{subject.count} weights; {others}")
        report = Report(packers, options.lrzip, options.part_tokens // CHUNK)
        result = {} if options.only_rates else compare(report, options)
        result |= low_rates(report, list(options.rates), list(options.tune_rates))
        result |= flagship_shape(options)
    result |= {"tokens": tokens, "tune_steps": options.tune_steps, "quick": options.quick}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
