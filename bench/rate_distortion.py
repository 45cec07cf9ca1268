"""The rate-distortion packer: sensitivities, steps, trellis-coded GPTQ and the entropy coder, measured by packing.py.

A matrix W (R, C) becomes integers M and steps delta 2^(rows/8) 2^(columns/8). The steps come from the second moments of
the inputs and the Fisher diagonal of the outputs; there is no clipping. Going down a column, the state of an Ungerboeck
trellis gives the parity of each integer, so that only M >> 1 is coded: a Viterbi search finds the path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

import train_gpt as t

TRELLISES = {8: (0o13, 0o4), 64: (0o103, 0o24), 256: (0o515, 0o362)}  # parity polynomials of Ungerboeck's codes
OCTAVE, BLOCK = 8, 64  # steps are 2^(n/OCTAVE); columns per propagation of errors
SYMBOLS, CLASSES, GAIN, LIMIT = 256, 40, 32, 1 << 17  # of the entropy coder's counts
MASK = (1 << 56) - 1  # of its low end
compiled = numba.njit(nogil=True, cache=True)


def trellis(states: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, 2) state after s by the integer's second bit (its first is s & 1), (2, S) state before; of 0 states: none."""
    if states == 0:
        return np.zeros((1, 2), np.int64), np.zeros((2, 0), np.uint8)
    (h0, h1), s, bit = TRELLISES[states], np.arange(states)[:, None], np.arange(2)
    after = (s >> 1) ^ (h0 >> 1) * (s & 1) ^ (h1 >> 1) * bit
    return after, np.argsort(after, axis=0).T.astype(np.uint8)  # column `bit` of `after` is a permutation


@compiled
def viterbi(goal, price, before):
    """Integers (R,) on a trellis path from state 0 with the least sum of price (goal - integer)^2, all fp32 (R,)."""
    rows, states = len(goal), before.shape[1]
    metric, choice = np.empty(4, np.float32), np.empty((rows, states), np.uint8)
    cost, low, high = np.full(states, 1e30, np.float32), np.empty(states, np.float32), np.empty(states, np.float32)
    cost[0] = 0
    for r in range(rows):
        for c in range(4):  # to the nearest integer that is c modulo 4
            distance = (goal[r] - np.float32(c)) * np.float32(0.25)
            metric[c] = price[r] * np.float32(16) * (distance - np.rint(distance)) ** 2
        for s in range(states):
            low[s], high[s] = cost[s] + metric[s & 1], cost[s] + metric[2 + (s & 1)]
        for s in range(states):
            a, b = low[before[0, s]], high[before[1, s]]
            cost[s], choice[r, s] = min(a, b), b < a
    integers, s = np.empty(rows, np.int32), np.int64(np.argmin(cost))
    for r in range(rows - 1, -1, -1):
        bit = choice[r, s]
        s = np.int64(before[bit, s])
        c = np.float32(2 * bit + (s & 1))
        integers[r] = np.int32(np.rint((goal[r] - c) * np.float32(0.25)) * np.float32(4) + c)
    return integers


@compiled
def round_block(w, step, factor, price, before, largest):
    """Integers (B, R) of columns w (B, R), the error of one going to the later ones; the errors are left in w."""
    integers = np.empty(w.shape, np.int32)
    for j in range(len(w)):
        for i in range(j):
            for r in range(w.shape[1]):
                w[j, r] -= factor[i, j] * w[i, r]
        weight = np.float32(1) + price * step[j] * step[j]  # (x/s - m)^2 + p s^2 m^2 = g (x/sg - m)^2 + constant
        goal = w[j] / (step[j] * weight)
        if before.shape[1]:
            integers[j] = viterbi(goal, weight, before)
        else:
            integers[j] = np.minimum(np.maximum(np.rint(goal), -largest), largest)
        w[j] -= integers[j] * step[j]
    return integers


class Plan(NamedTuple):
    """A matrix ready to be rounded."""

    weight: Tensor  # fp32 (R, C)
    order: Tensor  # of the columns, by falling diagonal of the damped inputs
    factor: Tensor  # fp32 (C, C) in that order, upper, unit diagonal: what the error of a column does to the later ones
    rows: np.ndarray  # int32 (R,) exponents of the steps
    columns: np.ndarray  # int32 (C,)


def plan(weight: Tensor, inputs: Tensor, outputs: Tensor, damping: float, powers: tuple[float, float, float]) -> Plan:
    """Steps by reverse water-filling: outputs^(-1/2) times the diagonal of GPTQ's factor, to powers.

    The first of the `powers` is for the geometric means of whole matrices, the others for rows and columns within.
    """
    inputs, outputs = inputs.double().cpu().clone(), outputs.double().cpu()
    inputs.diagonal().add_(damping * inputs.diagonal().mean().clamp_min(1e-30))
    order = torch.argsort(inputs.diagonal(), descending=True, stable=True)
    # inputs = R R^T with R upper, a Cholesky factor from the last column on; R^-1 is the factor that GPTQ needs.
    root = torch.linalg.cholesky(inputs[order][:, order].flip(0, 1)).flip(0, 1)
    factor = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=True)
    row = -0.5 * torch.log2(outputs.clamp_min(0.01 * outputs.mean()).clamp_min(1e-30))
    column = torch.log2(factor.diagonal())[torch.argsort(order)]
    level, bend = row.mean() + column.mean(), lambda x, power: power * (x - x.mean())
    exponents = (powers[0] * level + bend(row, powers[1]), bend(column, powers[2]))
    rows, columns = ((OCTAVE * x).round().int().numpy() for x in exponents)
    return Plan(weight.float().cpu(), order, (factor / factor.diagonal()[:, None]).float(), rows, columns)


def scale(exponents: np.ndarray) -> np.ndarray:
    """2^(n/OCTAVE) in fp32, the same bits on every machine: eight rounded constants times powers of two."""
    roots = np.array([2.0 ** (n / OCTAVE) for n in range(OCTAVE)], np.float32)
    return np.ldexp(roots[exponents % OCTAVE], exponents // OCTAVE).astype(np.float32)


def steps(rows: np.ndarray, columns: np.ndarray, delta: float) -> np.ndarray:
    """The fp32 step of every weight (R, C), by two roundings in a fixed order."""
    return (np.float32(delta) * scale(rows))[:, None] * scale(columns)


def restore(integers: np.ndarray, rows: np.ndarray, columns: np.ndarray, delta: float) -> np.ndarray:
    """The fp32 matrix (R, C) that integers stand for, the same bits on every machine."""
    return integers.astype(np.float32) * steps(rows, columns, delta)


def round_matrix(p: Plan, step: np.ndarray, states: int, rate: float = 0.0, largest: int = 1 << 30) -> np.ndarray:
    """Integers int32 (R, C) so that integers*step has little error under the inputs, on a trellis of `states` or none.

    `rate` is how much of the price of its bits an integer pays: in units of the squared step a bit is worth 2 ln 2 of
    the distortion, 0.26 with the trellis and 1/12 without, and a Gaussian integer has log2(e) m^2 / (2 variance) bits.
    """
    torch.set_num_threads(1)  # of this thread: matrices are spread over threads, and the sums must not depend on them
    order, before = p.order.numpy(), trellis(states)[1]
    w, step = p.weight[:, p.order].T.contiguous(), np.ascontiguousarray(step.T[order])
    price = (rate * (0.26 if states else 1 / 12) / w.square().mean(0).clamp_min(1e-20)).numpy()
    integers = np.empty(step.shape, np.int32)
    for a in range(0, len(w), BLOCK):
        b, block = a + BLOCK, w[a : a + BLOCK].numpy()
        integers[order[a:b]] = round_block(block, step[a:b], p.factor[a:b, a:b].numpy(), price, before, largest)
        w[b:] -= p.factor[a:b, b:].T @ w[a:b]
    return np.ascontiguousarray(integers.T)


def spread(work: Callable, jobs: Iterable, threads: int = 0) -> list:
    """[work(job)] on as many threads as there are cores."""
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return list(pool.map(work, jobs))


def round_all(plans: dict[str, Plan], delta: float, states: int, rate: float = 0.0,
              threads: int = 0) -> dict[str, np.ndarray]:
    """The integers of every plan, the same for any number of threads."""
    one = lambda p: round_matrix(p, steps(p.rows, p.columns, delta), states, rate)
    return dict(zip(plans, spread(one, plans.values(), threads), strict=True))


@compiled
def code_symbol(symbol, counts, coder, buffer, decoding):
    """Code one symbol by its `counts`, the last of which is their sum, and count it; `coder` is low, span, position."""
    unit, start, s = coder[1] // counts[SYMBOLS], 0, 0
    while s < SYMBOLS - 1 and ((start + counts[s]) * unit <= coder[0] if decoding else s < symbol):
        start += counts[s]
        s += 1
    coder[0] += -start * unit if decoding else start * unit
    coder[1] = unit * counts[s]
    if coder[0] > MASK:
        place = coder[2] - 1
        while buffer[place] == 255:  # a carry
            buffer[place] = 0
            place -= 1
        buffer[place] += 1
        coder[0] &= MASK
    while coder[1] <= MASK >> 8:
        if decoding:
            coder[0] = coder[0] << 8 | buffer[coder[2]]
        else:
            buffer[coder[2]] = coder[0] >> 48
            coder[0] = coder[0] << 8 & MASK
        coder[1] <<= 8
        coder[2] += 1
    counts[s] += GAIN
    counts[SYMBOLS] += GAIN
    if counts[SYMBOLS] > LIMIT:
        counts[:SYMBOLS] = (counts[:SYMBOLS] + 1) >> 1
        counts[SYMBOLS] = counts[:SYMBOLS].sum()
    return s


@compiled
def code_integers(values, shapes, after, counts, coder, buffer, decoding):
    """Encode or decode int32 matrices (R, C), one behind the other in `values`, column by column.

    Which of the `counts` (2 CLASSES + 4, SYMBOLS + 1) serve a symbol: those of its parity and of the size that running
    means of its row and its column let expect; the last four are for the bytes of what is no symbol.
    """
    halving, begin = np.int64(len(after) > 1), 0
    for rows, columns in shapes:
        row_size = np.full(rows, 4 << 10)  # of |integer|, 1 is 1024
        for j in range(columns):
            mean, state = max(1, row_size.sum() // rows), 0
            column_size = mean
            for r in range(rows):
                place, odd, context = begin + r * columns + j, state & 1, 0
                size = row_size[r] * column_size // mean >> 6
                while size >= 8:  # quarters of an octave
                    size >>= 1
                    context += 4
                context = min(context + max(size - 4, 0), CLASSES - 1) + odd * CLASSES
                k = np.int64(values[place]) >> halving
                rest = k << 1 if k >= 0 else ~k << 1 | 1  # 0, -1, 1, -2, 2 ...
                index = code_symbol(min(rest, SYMBOLS - 1), counts[context], coder, buffer, decoding)
                if index == SYMBOLS - 1:
                    index = 0
                    for i in range(0, 32, 8):
                        byte = code_symbol(rest >> i & 255, counts[2 * CLASSES + i // 8], coder, buffer, decoding)
                        index |= byte << i
                k = index >> 1 ^ -(index & 1)
                values[place] = k << halving | odd
                state = after[state, k & 1]
                size = min(abs(k << halving | odd), 1 << 20) << 10
                row_size[r] += (size - row_size[r]) >> 6
                column_size += (size - column_size) >> 5
        begin += rows * columns


def code(matrices: list[np.ndarray], states: int, data: bytes | None = None) -> bytes:
    """The stream of int32 matrices (R, C) whose columns lie on trellis paths; with `data` they are filled from it."""
    values, shapes = np.concatenate([m.ravel() for m in matrices]), np.array([m.shape for m in matrices])
    counts = np.ones((2 * CLASSES + 4, SYMBOLS + 1), np.int64)
    counts[:, SYMBOLS] = SYMBOLS
    buffer = np.frombuffer(bytearray(8 * values.size + 64 if data is None else data + b"\xff" * 64), np.uint8)
    coder = np.array([0, MASK + 1, 0] if data is None else [int.from_bytes(buffer[:7].tobytes(), "big"), MASK + 1, 7])
    code_integers(values, shapes, trellis(states)[0], counts, coder, buffer, data is not None)
    for m, part in zip(matrices, np.split(values, np.cumsum(shapes.prod(1))[:-1]), strict=True):
        m[:] = part.reshape(m.shape)
    return buffer[: coder[2]].tobytes() + bytes([coder[0] >> 48])  # read with 255s behind it: within the span


def guess_delta(plans: dict[str, Plan], goal: float, states: int) -> float:
    """The delta that makes about `goal` bytes: a Gaussian of deviation s costs log2(s/step) + 2.05 bits."""
    bits = [p.weight.numel() * (2.05 - (states > 0) - (p.rows.mean() + p.columns.mean()) / OCTAVE
                                + float(torch.log2(p.weight.std() + 1e-9))) for p in plans.values()]
    return 2.0 ** ((sum(bits) - 8 * goal) / sum(p.weight.numel() for p in plans.values()))


def fit_delta(delta: float, goal: float, slope: float, size_of: Callable[[float], int],
              log: Callable[[str], None] = print) -> float:
    """The delta for which `size_of(delta)` bytes lie below `goal` by at most 0.05 %: secant in its log2, from `delta`.

    `slope` is about how many bytes fewer an octave makes.
    """
    at, tried = float(np.log2(delta)), []
    for _ in range(8):
        tried.append((size_of(2.0**at), at))
        size, more = tried[-1][0], goal * (1 - 2.5e-4) - tried[-1][0]
        log(f"size: delta 2^{at:.5f} gives {size} bytes, {100 * (size / goal - 1):+.3f}% of the goal")
        if 0 <= goal - size <= 5e-4 * goal:
            break
        if len(tried) > 1 and at != tried[-2][1]:
            slope = min(max((tried[-2][0] - size) / (at - tried[-2][1]), slope / 2), slope * 2)
        at -= more / slope
    fitting = [(size, at) for size, at in tried if size <= goal]
    return 2.0 ** (max(fitting)[1] if fitting else at)


class Tapped(t.GPT):
    """The model with calibration taps that also see the product: tap(site, layer, input, output)."""

    @staticmethod
    def matmul(site, weight, x, step, hooks, adapt=None):
        y = t.GPT.matmul(site, weight, x, step, hooks._replace(tap=None), adapt)
        if hooks.tap:
            hooks.tap(site, step.layer, x, y)
        return y


def collect_sensitivities(run: t.Run, model: Tapped, batches: Iterable[t.Batch]) -> dict[tuple[str, int], list[Tensor]]:
    """(site, layer) -> [second moments of the inputs (C, C), of the loss gradient at the outputs (R,)], per token.

    The labels are drawn from the model itself, so the latter is the Fisher diagonal; that of the head is exact. A layer
    that is visited several times pays for every visit.
    """
    sums: dict[tuple[str, int], list[Tensor]] = {}
    generator, cap, tokens = torch.Generator(run.device).manual_seed(0), model.config.logit_softcap, 0

    def add(key: tuple[str, int], part: int, value: Tensor) -> None:
        pair = sums.setdefault(key, [torch.zeros((), device=run.device)] * 2)
        pair[part] = pair[part] + value

    def tap(site: str, layer: int, x: Tensor, y: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        add((site, layer), 0, x.T @ x)
        if site != "head":
            y.register_hook(lambda g: add((site, layer), 1, g.flatten(0, -2).float().square().sum(0)))
            return
        bend = torch.tanh(y.detach().flatten(0, -2).float() / cap)
        chance = torch.softmax(cap * bend, -1)
        add((site, layer), 1, (chance * (1 - chance) * (1 - bend.square()).square()).sum(0))
        batch.targets.copy_(torch.multinomial(chance, 1, generator=generator).view_as(batch.targets))

    for batch in batches:
        batch = batch._replace(targets=batch.targets.clone())  # they may share memory with the inputs
        model(batch, tap).sum().backward()
        tokens += batch.targets.numel()
    model.zero_grad()
    return {key: [run.sum(part) / tokens for part in pair] for key, pair in sorted(sums.items())}
