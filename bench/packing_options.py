#!/usr/bin/env python3
"""What options on top of both packers give at equal bytes, and what better estimates of sensitivities give.

    python bench/packing_options.py [--run runs/packing] [--tokens 81920] [--estimates | --levels]
                                    [--context 256] [--quick]

On the checkpoint of bench/checkpoint.py, at about 3.3 bit per weight. Each row is one change: its divergence
from the unquantised model over that without the change, moved to equal bytes (an octave of divergence is
worth half a bit per weight, as measured in the first rows), on the same validation tokens. Below 1 the change
pays for its bytes. --levels: how much KL each kind of matrix costs if it alone is rounded, over what the
moments predict, and what CORRECT_LEVELS gives at equal bytes, both at --rates bits per weight.
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
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(ROOT / "bench"))

from packing import CHUNK, Clip, Form, Packers, Subject

import train_gpt as t

Weights = dict[str, Tensor]


def low_rank(packers: Packers, tensors: dict[str, t.Quantized], rank: int, count: int) -> tuple[Weights, int]:
    """(parameters with int8 low-rank corrections of the `count` best matrices, their bytes) (LQER)."""
    found = []
    for m in packers.subject.todo:
        inputs, outputs = (part.double() for part in packers.moments[m.key])
        inputs = inputs + 0.01 * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=torch.float64)
        root = torch.linalg.cholesky(inputs)
        error = packers.subject.weight(m).double() - tensors[m.name].restore().double()
        u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
        right = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
        gain = float(s[:rank].square().sum() * outputs.mean())
        found.append((gain, m, u[:, :rank] * s[:rank], right))
    weights, spent = t.assemble_weights(packers.subject.model.table, tensors), 0
    for _, m, left, right in sorted(found, key=lambda item: -item[0])[:count]:
        factors = []
        for factor in (left.T, right):
            step = factor.abs().amax(1, keepdim=True) / 127
            factors.append((factor / step).round() * step)
            spent += factor.numel() + 2 * len(factor)
        place = weights[m.parameter] if m.index is None else weights[m.parameter][m.index]
        place += (factors[0].T @ factors[1]).float()
    return weights, spent


def scaled_columns(packers: Packers, clip: Clip, power: float) -> dict[str, tuple[Tensor, np.ndarray]]:
    """(matrices, integers) of SDClip on columns multiplied by a power of their inputs' RMS."""
    tensors = {}
    for m in packers.subject.todo:
        p, inputs = packers.flat[m.name], packers.moments[m.key][0].diagonal()
        scale = inputs.clamp_min(1e-8).sqrt().float() ** power
        scale = scale / scale.log().mean().exp()
        bits = clip.embed_bits if m.quantizer == "embed" else clip.bits
        largest = 2 ** (bits - 1) - 1
        rows = (getattr(clip, m.quantizer) * (p.weight * scale).std(dim=1)).clamp_min(2.0**-24)
        step = (rows[:, None] / scale).numpy()
        integers = t.round_matrix(p, np.ascontiguousarray(step), 0, largest=largest)
        tensors[m.name] = torch.from_numpy(integers * step), integers
    return tensors


def head_and_input_rows(subject: Subject, tokens: int) -> Tensor:
    """Fisher diagonal of the embedding rows where they are looked up, summed over channels, per token."""
    model, sums, seen = subject.model, torch.zeros(subject.config.vocab_size), 0
    changes = {"train_batch_tokens": 8 * CHUNK, "loader": "shuffled"}
    loader = t.ShuffledLoader(t.dataclasses.replace(subject.config, **changes), subject.data)
    generator = torch.Generator().manual_seed(1)
    model.load_state_dict(subject.weights)
    for index in range(tokens // CHUNK):
        batch = loader.get(index // 8, index % 8)
        with torch.no_grad():
            hidden = model.trunk(batch, t.Hooks())
            cap = subject.config.logit_softcap
            chance = torch.softmax(cap * torch.tanh(hidden @ model.embed.T / cap), -1).flatten(0, 1)
            drawn = torch.multinomial(chance, 1, generator=generator).view_as(batch.targets)
        looked_up = F.embedding(batch.inputs, model.embed).detach().requires_grad_()
        lookup, t.F.embedding = t.F.embedding, lambda *_, rows=looked_up: rows
        try:
            model(batch._replace(targets=drawn)).sum().backward()
        finally:
            t.F.embedding = lookup
        sums.index_add_(0, batch.inputs.flatten(), looked_up.grad.square().sum(-1).flatten())
        seen += batch.inputs.numel()
    model.zero_grad()
    return sums / seen


class FirstVisits:
    """A model whose tap sees only the first visit of a looped layer."""

    def __init__(self, model: t.GPT):
        self.model = model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, batch: t.Batch, tap: t.Tap) -> Tensor:
        seen = set()

        def once(site: str, layer: int, x: Tensor, y: Tensor) -> None:
            if (site, layer) not in seen:
                seen.add((site, layer))
                tap(site, layer, x, y)

        return self.model(batch, once)


class Table:
    """Rows of changes against their baselines."""

    def __init__(self, packers: Packers, chunks: range):
        self.packers, self.subject, self.chunks, self.rows = packers, packers.subject, chunks, {}
        print(f"{'change':<52}{'bytes':>10}{'KL':>10}{'KL at equal bytes':>20}{'+-':>8}")

    def kl(self, weights: Weights) -> np.ndarray:
        """Divergence by chunk of validation text."""
        return self.subject.divergence(weights, self.chunks)[0]

    def add(
        self, name: str, size: float, weights: Weights, base: tuple | None = None
    ) -> tuple[float, np.ndarray]:
        """Print one row; returns what later rows are compared with."""
        found = self.kl(weights)
        ratio, spread = 1.0, 0.0
        if base is not None:
            move = 2 ** (2 * 8 * (size - base[0]) / self.subject.count)
            ratio = found.mean() / base[1].mean() * move
            spread = float(np.std(found / found.mean() - base[1] / base[1].mean()) / np.sqrt(len(found)))
            self.rows[name] = round(ratio, 4)
        print(f"{name:<52}{size:>10.0f}{found.mean():>10.5f}{ratio:>20.4f}{spread:>8.4f}", flush=True)
        return size, found


def ours(packers: Packers, form: Form, goal: int) -> tuple[dict[str, t.Quantized], int]:
    """Our tensors at the goal in bytes, and the bytes they take."""
    tensors, data, _, _ = packers.fit(packers.problems(form), form, goal, 0)
    return tensors, len(data)


def estimates(packers: Packers, options: argparse.Namespace, tensors: dict) -> Iterator[tuple[str, dict]]:
    """Other moments by name; `tensors` are the quantised ones."""
    subject, base = packers.subject, packers.moments
    subject.model.load_state_dict(t.assemble_weights(subject.model.table, tensors))
    later = subject.moments(options.calibration)
    subject.model.load_state_dict(subject.weights)
    yield "inputs of the quantised model", {key: (later[key][0], base[key][1]) for key in base}
    if subject.model.looped:
        whole, subject.model = subject.model, FirstVisits(subject.model)
        first = subject.moments(options.calibration)
        subject.model = whole
        yield "only the first visit of looped layers", first
    yield "calibration / 4", subject.moments(options.calibration // 4)
    more = subject.moments(options.calibration * 4)
    yield "calibration x 4", more
    yield "calibration x 4 for the inputs only", {key: (more[key][0], base[key][1]) for key in base}
    rows, level = head_and_input_rows(subject, options.calibration), base["head", 0][0].trace()
    for weight in (0.25, 1.0):
        both = base["head", 0][0], base["head", 0][1] + weight * rows / level
        yield f"embedding rows also where they are looked up, x {weight:g}", base | {("head", 0): both}


def public_rows(packers: Packers, table: Table, clip: Clip) -> None:
    """What AWQ-lite and LQER give on SDClip."""
    subject, model = packers.subject, packers.subject.model.table
    tensors = packers.sdclip(clip)
    size = len(packers.write(tensors))
    public = table.add("SDClip", size, t.assemble_weights(model, tensors))
    wide = packers.sdclip(clip, 2**0.25)
    table.add("SDClip, steps x 2^(1/4)", len(packers.write(wide)), t.assemble_weights(model, wide), public)
    flat = np.concatenate([tensors[m.name].values.numpy().ravel() for m in subject.todo])
    entropy = lambda values: (
        -sum(c * np.log2(c / len(values)) for c in np.unique(values, return_counts=True)[1]) / 8
    )
    for power in (0.25, 0.5):
        scaled = scaled_columns(packers, clip, power)
        weights = {m.name: t.Quantized(scaled[m.name][0].float()) for m in subject.todo} | subject.small()
        moved = entropy(np.concatenate([pair[1].ravel() for pair in scaled.values()])) - entropy(flat)
        columns = sum(scaled[m.name][1].shape[1] for m in subject.todo)
        table.add(
            f"SDClip + AWQ-lite, power {power:g}",
            size + moved + columns,
            t.assemble_weights(model, weights),
            public,
        )
    for rank, count in ((4, 3), (4, len(subject.todo))):
        weights, spent = low_rank(packers, tensors, rank, count)
        table.add(f"SDClip + LQER, rank {rank}, {count} matrices", size + spent, weights, public)


def our_rows(
    packers: Packers, table: Table, form: Form, tensors: dict[str, t.Quantized], mine: tuple
) -> None:
    """What the same options, and other sizes, give on our packer."""
    subject, model, size = packers.subject, packers.subject.model.table, mine[0]
    for bits in (3.2, 3.4):
        other, other_size = ours(packers, form, int(bits / 8 * subject.count))
        table.add(f"ours at {bits:g} bit", other_size, t.assemble_weights(model, other), mine)
    for rank, count in ((4, 3), (4, len(subject.todo))):
        weights, spent = low_rank(packers, tensors, rank, count)
        table.add(f"ours + LQER, rank {rank}, {count} matrices", size + spent, weights, mine)
    weights, saved = t.assemble_weights(model, tensors), 0
    for name, tensor in subject.small().items():
        if tensor.values.dim() > 1:
            rows = tensor.values.float().flatten(0, -2)
            step = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            weights[name] = ((rows / step).round() * step).view_as(tensor.values)
            saved += rows.numel() - 2 * len(rows)
    table.add("ours + small tensors in int8 by row", size - saved, weights, mine)


def predicted_divergence(packers: Packers, m: t.Matrix, rounded: Tensor) -> float:
    """KL in nats per token by the moments of a matrix, were it `rounded`."""
    inputs, outputs = packers.moments[m.key]
    error = rounded - packers.subject.weight(m)
    return 0.5 * float((outputs[:, None] * (error @ inputs) * error).sum())


def levels_of_kinds(packers: Packers, chunks: range, goal: int) -> dict[str, float]:
    """KL over what moments predict, by kind of matrix rounded alone; and what CORRECT_LEVELS gives."""
    subject, model = packers.subject, packers.subject.model.table
    tensors, _ = ours(packers, Form(), goal)
    whole = t.assemble_weights(model, tensors)
    plain = subject.divergence(whole, chunks)[0].mean()
    kinds: dict[str, list[t.Matrix]] = {}
    for m in subject.todo:
        kinds.setdefault(m.key[0], []).append(m)
    ratios = {}
    for kind, matrices in kinds.items():
        weights = {name: weight.clone() for name, weight in subject.weights.items()}
        predicted = 0.0
        for m in matrices:
            rounded = tensors[m.name].restore()
            predicted += predicted_divergence(packers, m, rounded)
            t.matrix_weight(weights, m).copy_(rounded)
        ratios[kind] = subject.divergence(weights, chunks)[0].mean() / predicted
    corrected, _ = ours(packers, Form(levels=True), goal)
    found = subject.divergence(t.assemble_weights(model, corrected), chunks)[0].mean()
    ratios["corrected levels"] = found / plain
    shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    print(f"{8 * goal / subject.count:.2f} bit: {shown}", flush=True)
    return {name: round(float(ratio), 3) for name, ratio in ratios.items()}


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default=ROOT / "runs" / "packing", help="run folder of bench/checkpoint.py"
    )
    parser.add_argument("--tokens", type=int, default=81_920, help="validation tokens")
    parser.add_argument(
        "--calibration", type=int, default=65_536, help="training tokens of the sensitivities"
    )
    parser.add_argument(
        "--estimates", action="store_true", help="only the rows of other estimates on our packer"
    )
    parser.add_argument("--levels", action="store_true", help="only the levels of kinds of matrices")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=(2.25, 2.75), help="bits a weight of --levels"
    )
    parser.add_argument("--context", type=int, default=256, help="tokens of a window")
    parser.add_argument("--quick", action="store_true", help="few tokens")
    options = parser.parse_args()
    if not (options.run / "checkpoint.pt").exists():
        parser.error(f"--run {options.run}: no checkpoint.pt there; make one with bench/checkpoint.py")
    if options.quick:
        options.tokens, options.calibration = 8192, 16_384
    windows = {"EVAL_SEQ_LEN": str(options.context)}
    subject = Subject(options.run, 4 * CHUNK, options.tokens, "lzma" if options.quick else "brotli", windows)
    packers = Packers(subject, options.calibration)
    if options.levels:
        chunks = range(subject.tuning, len(subject.hidden))
        goals = {rate: int(rate * subject.count / 8) for rate in options.rates}
        found = {str(rate): levels_of_kinds(packers, chunks, goal) for rate, goal in goals.items()}
        print("RESULT " + json.dumps({"tokens": options.tokens, "quick": options.quick, "levels": found}))
        return
    table = Table(packers, range(subject.tuning, len(subject.hidden)))
    form, goal, model = Form(), int(3.3 / 8 * subject.count), subject.model.table
    if not options.estimates:
        public_rows(packers, table, Clip())
    tensors, size = ours(packers, form, goal)
    mine = table.add("ours", size, t.assemble_weights(model, tensors))
    if not options.estimates:
        our_rows(packers, table, form, tensors, mine)
    base = packers.moments
    for name, moments in estimates(packers, options, tensors):
        packers.moments = moments
        other, other_size = ours(packers, form, goal)
        table.add(f"ours, {name}", other_size, t.assemble_weights(model, other), mine)
        packers.moments = base
    print("RESULT " + json.dumps({"tokens": options.tokens, "quick": options.quick, "ratios": table.rows}))


if __name__ == "__main__":
    main()
