"""What bench/gpu.py measures with: times, memory, operation counts, synthetic text, the fused kernels.

tests/gpu checks the kernels of the same table, so that whatever is timed is also checked.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import statistics
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.benchmark
from torch import Tensor

import cutlass_evt_fusion
import train_gpt as t

MEAN_LENGTH, DEVIATION = (
    811,
    1.0,
)  # tokens per document of FineWeb's validation set (SP8192); of the log, assumed
CLASSES = {  # the first that matches the name of a GPU kernel or, on the CPU, of an operator
    "cross-entropy": "softcapped_ce|log_softmax|nll_loss|cross_entropy",
    "attention": "flash|fmha|attention|attn|sdpa",
    "matmul": "gemm|nvjet|cublas|xmma|wgmma|cutlass|triton_tem|mlp|aten::(mm|addmm|bmm|linear|matmul)$",
    "elementwise": "triton_|elementwise|reduce|cat|index|foreach|multi_tensor|copy|memset|memcpy|aten::",
}


class Time(NamedTuple):
    """Median and half the distance of the quartiles, in milliseconds."""

    ms: float
    spread: float


class Meter:
    """Clock and memory of one device."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"

    def wait(self) -> None:
        """Until the device has finished."""
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, calls: dict[str, Callable[[], Any]], seconds: float, rounds: int = 3) -> dict[str, Time]:
        """The time of each call; they take turns, `rounds` times about `seconds` each."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name] += self.sample(call, seconds)
        quarters = {
            name: statistics.quantiles(values * 2, n=4) for name, values in samples.items()
        }  # 1 is enough
        return {name: Time(middle, (high - low) / 2) for name, (low, middle, high) in quarters.items()}

    def sample(self, call: Callable[[], Any], seconds: float) -> list[float]:
        """Milliseconds of single calls, for about `seconds`; on a GPU by events, with a cold cache."""
        if self.cuda:
            from triton.testing import do_bench

            return do_bench(call, warmup=int(200 * seconds), rep=int(1000 * seconds), return_mode="all")
        timer = torch.utils.benchmark.Timer(
            "call()", globals={"call": call}, num_threads=torch.get_num_threads()
        )
        return [1000 * value for value in timer.blocked_autorange(min_run_time=seconds).times]

    def peak(self, call: Callable[[], Any]) -> float | None:
        """MiB that `call` needs at its worst on top of what is there; None on a CPU."""
        if not self.cuda:
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def classes(self, work: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds of device time by kernel class, with "kernels", their number."""
        activity = torch.profiler.ProfilerActivity
        self.wait()
        with torch.profiler.profile(activities=[activity.CUDA if self.cuda else activity.CPU]) as profiler:
            work()
            self.wait()
        found = dict.fromkeys([*CLASSES, "other", "kernels"], 0.0)
        for event in profiler.key_averages():
            spent = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            name = next((name for name, like in CLASSES.items() if re.search(like, event.key, re.I)), "other")
            found[name] += spent / 1000
            found["kernels"] += event.count if spent > 0 else 0  # a GPU's list names the host's calls too
        return found


def compiled_graphs() -> int:
    """Graphs that torch.compile has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def document_lengths(count: int, seed: int, longest: int = 1 << 16) -> np.ndarray:
    """Lengths (count,) of synthetic documents: log-normal, with FineWeb's mean."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEAN_LENGTH) - DEVIATION**2 / 2, DEVIATION, count)
    return drawn.astype(int).clip(8, longest)


def random_text(lengths: np.ndarray, vocab_size: int, seed: int) -> np.ndarray:
    """Random uint16 tokens in documents of these lengths, each beginning with BOS."""
    tokens = np.random.default_rng(seed).integers(2, vocab_size, int(lengths.sum())).astype("<u2")
    tokens[np.cumsum(lengths) - lengths] = t.BOS
    return tokens


class Synthetic(t.Dataset):
    """A dataset of one training shard of synthetic documents, in memory."""

    def __init__(self, config: t.Config, tokens: int, mean_length: int = MEAN_LENGTH):
        count = 2 * tokens // mean_length + 64
        lengths = (document_lengths(count, seed=1) * mean_length // MEAN_LENGTH).clip(2)
        self.folder, self.vocab_size, self.manifest = Path("synthetic"), config.vocab_size, {}
        self.train_files, self.val_files, self.sidecar_files = [self.folder / "train"], [], []
        self.train = [random_text(lengths, config.vocab_size, seed=2)[:tokens]]


def forward_flops(config: t.Config, looped: bool, tokens: int, pairs: int) -> int:
    """Floating-point operations of the products of one forward: two per multiplication. `pairs` are the pairs
    of a query's and a key's position that attention looks at. A backward has twice as many."""
    c, width, kv = config, config.model_dim, config.num_kv_heads * config.model_dim // config.num_heads
    gate = c.gate_width or width
    visit = 2 * width * width + 2 * kv * width + 2 * int(c.mlp_mult * width) * width
    visit += gate * c.num_heads if c.head_gate != "none" else 0
    once = c.vocab_size * width + (gate if c.smear_gate else 0)
    visits = len(t.make_route(c, c.num_loops if looped else 0))
    return 2 * tokens * (visits * visit + once) + visits * 4 * width * pairs


def causal_pairs(batch: t.Batch) -> int:
    """Pairs of positions that causal attention within the rows or segments of a batch looks at."""
    rows, length = batch.inputs.shape
    if batch.starts is None:
        return rows * length * (length + 1) // 2
    sizes = np.diff(batch.starts.cpu().numpy()).astype(np.int64)
    return int((sizes * (sizes + 1) // 2).sum())


@dataclasses.dataclass
class Kernel:
    """A fused kernel beside its reference: both take the operands; the first `leaves` get gradients.

    They return a tensor or several.
    """

    name: str
    shape: str
    reference: Callable[..., Tensor | Sequence[Tensor]]
    fused: dict[str, Callable[..., Tensor | Sequence[Tensor]]]
    missing: dict[str, str]  # fused forms that are not here, and why
    operands: tuple[Any, ...]
    leaves: int
    flops: tuple[int, int]  # the fewest of the forward, and of forward and backward
    bytes: tuple[int, int]  # the same: every operand and result once

    def forward(self, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """A call of `function` for evaluation."""
        return torch.no_grad()(lambda: function(*self.operands))

    def both(self, function: Callable[..., Tensor | Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        """A call of `function` and its backward; it returns the results and the gradients."""
        leaves = [operand.detach().requires_grad_() for operand in self.operands[: self.leaves]]
        others = self.operands[self.leaves :]
        upstreams = [
            random_tensor(out.shape, seed=9, device=out.device, dtype=torch.bfloat16).to(out.dtype)
            for out in several(torch.no_grad()(function)(*self.operands))
        ]

        def call() -> Sequence[Tensor]:
            outputs = several(function(*leaves, *others))
            gradients = torch.autograd.grad(outputs, leaves, upstreams)
            return [*(out.detach() for out in outputs), *gradients]

        return call


def several(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a function returned, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def moved(operands: Sequence[Any], leaves: int, results: int) -> tuple[int, int]:
    """The fewest bytes of a forward and of both passes, for `results` of so many bytes.

    A forward reads the operands and writes the results. A backward reads the results' gradients and the
    smaller of the two, and writes the gradients of the first `leaves` operands.
    """
    sizes = [operand.nbytes if isinstance(operand, Tensor) else 0 for operand in operands]
    forward = sum(sizes) + results
    return forward, forward + results + min(sum(sizes), results) + sum(sizes[:leaves])


def random_tensor(shape: Sequence[int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal random numbers of a shape: up to rounding the same in every dtype."""
    source = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=source, device=device).to(dtype)


def cross_entropy(
    device: torch.device, dtype: torch.dtype, rows: int, columns: int, cap: float = 30.0
) -> Kernel:
    """Softcapped cross-entropy; its gradient is as large as its operand, everything else is small."""
    logits = random_tensor((rows, columns), 0, device, dtype).mul_(5)
    targets = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    size, ours = logits.nbytes, lambda *operands: t.softcapped_ce_op(*operands)[0]
    return Kernel(
        "softcapped cross-entropy",
        f"{rows:,} x {columns:,}",
        t.softcapped_ce_reference,
        {"triton": ours},
        {},
        (logits, targets, cap),
        1,
        (0, 0),
        (size, 3 * size),
    )


def mlp_kernels(
    dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """(the fused forms of the MLP that run here, why the others do not), by name; they take x, up, down."""
    kept = (("slope", False), ("input", True))  # for the backward
    fused = {f"triton, {name} kept": functools.partial(t.mlp_triton, keep_input=flag) for name, flag in kept}
    missing = {}
    if reason := cutlass_evt_fusion.available(dtype, device):
        missing["cutlass"] = reason
    else:
        fused["cutlass"] = cutlass_evt_fusion.leaky_relu_squared_mlp
    return fused, missing


def mlp(device: torch.device, dtype: torch.dtype, rows: int, width: int, hidden: int) -> Kernel:
    """The MLP of one layer with all gradients."""
    sizes = ((rows, width), (hidden, width), (width, hidden))
    x, up, down = (random_tensor(shape, i, device, dtype) for i, shape in enumerate(sizes))
    operands, (fused, missing) = (x, up / width**0.5, down / hidden**0.5), mlp_kernels(dtype, device)
    weights, product = up.nbytes + down.nbytes, 2 * rows * width * hidden
    return Kernel(
        "MLP, leaky ReLU squared",
        f"{rows:,} x {width} x {hidden:,}",
        t.mlp_reference,
        fused,
        missing,
        operands,
        3,
        (2 * product, 6 * product),
        (2 * x.nbytes + weights, 5 * x.nbytes + 3 * weights),
    )


def newton_schulz(config: t.Config, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Newton-Schulz on all banks of matrices; the fewest operations make symmetric products by halves."""
    shapes = [spec.shape for spec in t.parameter_table(config).values() if spec.optimizer == "muon"]
    banks = [random_tensor(shape, i, device, dtype) for i, shape in enumerate(shapes)]
    table, iterations = t.NEWTON_SCHULZ[config.muon_coefficients], config.muon_backend_steps
    coefficients = tuple(table[min(i, len(table) - 1)] for i in range(iterations))

    def orthogonalize(*banks: Tensor, **how: bool) -> Tensor:
        return torch.cat([t.orthogonalize(bank, coefficients, **how).flatten() for bank in banks])

    sides = [(count, min(shape), max(shape)) for count, *shape in shapes]
    flops = iterations * sum(count * (r * r * c + r * r * r + 2 * r * r * c) for count, r, c in sides)
    size = 2 * sum(bank.nbytes for bank in banks)
    fused = {"triton, symmetric": functools.partial(orthogonalize, fused=True)}
    return Kernel(
        "Newton-Schulz, all banks",
        " ".join("x".join(map(str, shape)) for shape in shapes),
        orthogonalize,
        fused,
        {},
        tuple(banks),
        0,
        (flops, 0),
        (size, 0),
    )


def head_loss(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, columns: int, cap: float = 30.0
) -> Kernel:
    """The product of the head and its cross-entropy, as training has them."""
    x = random_tensor((rows, width), 0, device, dtype)
    weight = random_tensor((columns, width), 1, device, dtype) / width**0.5
    targets = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(2)).to(device)
    slopes = rows * columns * x.element_size()
    forward, both = moved((x, weight), 2, 4 * rows)
    product = 2 * rows * width * columns

    def reference(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        return t.softcapped_ce_reference(x @ weight.T, targets, cap)

    return Kernel(
        "head and cross-entropy",
        f"{rows:,} x {width} x {columns:,}",
        reference,
        {"triton": lambda *operands: t.head_loss_op(*operands)[0]},
        {},
        (x, weight, targets, cap),
        2,
        (product, 3 * product),
        (forward + slopes, both + 3 * slopes),
    )


def heads_of(config: t.Config) -> tuple[int, int, int]:
    """(query heads, key heads, the size of one)."""
    return config.num_heads, config.num_kv_heads, config.model_dim // config.num_heads


def projection(config: t.Config, device: torch.device, dtype: torch.dtype, rows: int) -> Kernel:
    """The product that makes queries, keys and values, with norm, gain and rotation."""
    heads, kv_heads, size = heads_of(config)
    depth, width = config.model_dim, (heads + 2 * kv_heads) * size
    x = random_tensor((1, rows, depth), 0, device, dtype)
    weight = random_tensor((width, depth), 1, device, dtype) / depth**0.5
    gain = 1 + random_tensor((heads,), 2, device, dtype).abs()
    angles = 3 * random_tensor((rows, 1, config.rope_dims // 2), 3, device, torch.float32)
    tables = t.rotation_tables_op(angles, dtype)

    def reference(x: Tensor, weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        raw = torch.nn.functional.linear(x, weight).unflatten(2, (-1, size))
        q, k, v = raw.split((heads, kv_heads, kv_heads), 2)
        return *t.rotated_heads_reference(q, k, gain, cos, sin), v

    operands, product = (x, weight, gain, *tables), 2 * rows * depth * width
    return Kernel(
        "queries, keys and values",
        f"{rows:,} x {depth} x {width}",
        reference,
        {"triton": lambda *operands: t.attention_inputs_op(*operands, kv_heads)[:3]},
        {},
        operands,
        3,
        (product, 3 * product),
        moved(operands, 3, rows * width * x.element_size()),
    )


def attention_output(config: t.Config, device: torch.device, dtype: torch.dtype, rows: int) -> Kernel:
    """XSA and the gate of the heads behind attention."""
    heads, kv_heads, size = heads_of(config)
    read = min(config.gate_width or t.MOST_READ, t.MOST_READ)
    shapes = ((1, rows, heads, size), (1, rows, kv_heads, size), (1, rows, read), (heads, read))
    operands = tuple(random_tensor(shape, i, device, dtype) for i, shape in enumerate(shapes))
    gate = t.Gate(1.0, config.sparse_attn_gate_scale)
    return Kernel(
        "XSA and gate",
        f"{rows:,} x {heads} x {size}",
        lambda *operands: t.attention_output_reference(*operands, gate),
        {"triton": lambda y, v, *gates: t.attention_output_op(y, v, None, *gates, *gate)},
        {},
        operands,
        4,
        (0, 0),
        moved(operands, 4, operands[0].nbytes),
    )


def residual(config: t.Config, device: torch.device, dtype: torch.dtype, rows: int) -> Kernel:
    """Two joins of the residual stream: the embedding with its gain, and a branch added to it."""
    shape = 1, rows, config.model_dim
    embedding, branch = (random_tensor(shape, i, device, dtype) for i in range(2))
    again = 1 + random_tensor((1, config.model_dim), 2, device, torch.float32).abs()

    def reference(embedding: Tensor, branch: Tensor, again: Tensor) -> Sequence[Tensor]:
        stream = again[0].to(embedding.dtype) * embedding
        return t.rms_norm(stream), t.rms_norm(stream + branch), stream + branch

    def fused(embedding: Tensor, branch: Tensor, again: Tensor) -> Sequence[Tensor]:
        (path,) = t.spread_op(embedding, again)
        first = t.residual_op(embedding=embedding, embedding_path=path, again=again[0])
        second = t.residual_op(*first[:3], branch, remembers=True)
        return first[0], second[0], second[4]

    return Kernel(
        "residual stream, two joins",
        f"{rows:,} x {config.model_dim}",
        reference,
        {"triton": fused},
        {},
        (embedding, branch, again),
        3,
        (0, 0),
        moved((embedding, branch, again), 3, 3 * embedding.nbytes),
    )


def lanes(config: t.Config, device: torch.device, dtype: torch.dtype, rows: int) -> Kernel:
    """Two joins of two lanes: where they part, with a skip, and behind the visit that follows."""
    shape = 1, rows, config.model_dim
    streams = [random_tensor(shape, i, device, dtype) for i in range(5)]
    weights = 1 + random_tensor((2, 3), 5, device, torch.float32).abs() / 3
    gains = 1 + random_tensor((4, config.model_dim), 6, device, torch.float32).abs() / 3

    def reference(*operands: Tensor) -> Sequence[Tensor]:
        x, attended, transformed, skip, embedding, weights, gains = operands
        through, share, keep, again = gains.to(x.dtype)
        merged = through * x + share * skip
        first = t.rms_norm(keep * merged + again * embedding), t.rms_norm(x)
        merged, lane = (
            row[0] * stream + row[1] * attended + row[2] * transformed
            for row, stream in zip(weights, (merged, x), strict=True)
        )
        return *first, t.rms_norm(keep * merged + again * embedding), t.rms_norm(lane), merged, lane

    def fused(*operands: Tensor) -> Sequence[Tensor]:
        x, attended, transformed, skip, embedding, weights, gains = operands
        through, share, keep, again = gains
        paths = t.spread_op(embedding, torch.stack((again, again)))
        shared = {"keep": keep, "again": again.detach(), "embedding": embedding, "late": False, "read": 0}
        start = dict.fromkeys(("lane", "lane_size", "lane_path", "attended", "transformed", "weights"))
        merge = {"skip": skip, "through": through, "share": share}
        first = t.lanes_op(x, **start, **merge, **shared, embedding_path=paths[0], ends=False, scale=1.0)
        second = t.lanes_op(
            first[0],
            *first[4:7],
            attended,
            transformed,
            weights,
            *(None, None, None),
            **shared,
            embedding_path=paths[1],
            ends=True,
            scale=1.0,
        )
        return first[1], first[4], second[1], second[4], second[0], second[7]

    operands = (*streams, weights, gains)
    return Kernel(
        "two lanes, two joins",
        f"{rows:,} x {config.model_dim}",
        reference,
        {"triton": fused},
        {},
        operands,
        7,
        (0, 0),
        moved(operands, 7, 6 * streams[0].nbytes),
    )


# The kernels of one table: name -> a Kernel of so many rows for these settings.
KERNELS: dict[str, Callable[[t.Config, torch.device, torch.dtype, int], Kernel]] = {
    "cross-entropy": lambda config, device, dtype, rows: cross_entropy(
        device, dtype, rows, config.vocab_size
    ),
    "head": lambda config, device, dtype, rows: head_loss(
        device, dtype, rows, config.model_dim, config.vocab_size
    ),
    "mlp": lambda config, device, dtype, rows: mlp(
        device, dtype, rows, config.model_dim, int(config.mlp_mult * config.model_dim)
    ),
    "projection": projection,
    "attention output": attention_output,
    "residual": residual,
    "lanes": lanes,
    "newton-schulz": lambda config, device, dtype, rows: newton_schulz(config, device, dtype),
}


def load_step(path: Path) -> types.ModuleType:
    """The module of a training step, see bench/train_step.py; ValueError if it has no build."""
    spec = importlib.util.spec_from_file_location(f"step_{path.stem}", path)
    if spec is None or not path.is_file():
        raise ValueError("no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "build", None)):
        raise ValueError("it has no function build(config_environment, device)")
    return module
