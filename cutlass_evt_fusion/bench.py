"""The fused kernels against cuBLAS followed by elementwise torch, on a Hopper GPU, at the contest's shapes.

    python -m cutlass_evt_fusion.bench [--tokens 98304] [--width 512] [--hidden 2048] [--repeats 30] [--quick]

Parity comes first, also at awkward sizes; nothing is timed if it fails. Rows: the forward (act and slope from
x up^T), the backward (grad down, times slope) and the whole MLP with all gradients, each three ways: fused;
cuBLAS and one elementwise kernel of torch.compile; cuBLAS and eager torch. "cuBLAS alone" is the bare
product, which no fusion can be expected to beat. Times are medians of single calls by CUDA events, methods
taking turns; +- is half the distance of the quartiles. The last line is RESULT and every figure as JSON.
--quick: an eighth of the tokens, few repeats; the same keys.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cutlass_evt_fusion as fusion

TOLERANCE = 1e-2  # of one product: absolute and relative, against fp32
CHAINED = 3e-2  # of the MLP and its gradients, in which bf16 operands are themselves rounded results
AWKWARD = ((1, 8, 8), (128, 64, 256), (129, 72, 264), (1000, 512, 2048))  # tokens, width, hidden
Calls = dict[str, Callable[[], Any]]


def elementwise(z: Tensor) -> tuple[Tensor, Tensor]:
    """(LeakyReLU(z, 1/2)^2, its derivative)."""
    slope = torch.where(z > 0, 2 * z, 0.5 * z)
    return 0.5 * slope * z, slope


def operands(tokens: int, width: int, hidden: int) -> dict[str, Tensor]:
    """Random x, up, down, grad and slope with the magnitudes of a network at its start."""
    source = torch.Generator("cuda").manual_seed(0)

    def draw(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=source, device="cuda") * scale
        return values.to(torch.bfloat16)

    return {
        "x": draw(tokens, width),
        "up": draw(hidden, width, width**-0.5),
        "down": draw(width, hidden, hidden**-0.5),
        "grad": draw(tokens, width),
        "slope": draw(tokens, hidden),
    }


def distance(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest error in units of the tolerance: at most 1 passes."""
    allowed = tolerance * (1 + wanted.float().abs())
    return float(((got.float() - wanted.float()).abs() / allowed).nan_to_num(nan=float("inf")).max())


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32, which the trainer allows, for products that others are measured against."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@exact_products()
def parity(tokens: int, width: int, hidden: int) -> dict[str, float]:
    """Errors of both kernels against fp32, of the MLP's gradients against autograd, over the tolerance."""
    t = operands(tokens, width, hidden)
    act, slope = fusion.gemm_leaky_relu_squared(t["x"], t["up"])
    wanted_act, wanted_slope = elementwise(t["x"].float() @ t["up"].float().T)
    product = fusion.gemm_mul(t["grad"], t["down"], t["slope"])
    errors = {
        "act": distance(act, wanted_act),
        "slope": distance(slope, wanted_slope),
        "product": distance(product, t["grad"].float() @ t["down"].float() * t["slope"].float()),
    }
    results = []
    for function, dtype in (
        (fusion.leaky_relu_squared_mlp, torch.bfloat16),
        (fusion.leaky_relu_squared_mlp_reference, torch.float32),
    ):
        leaves = [t[name].detach().to(dtype).requires_grad_() for name in ("x", "up", "down")]
        out = function(*leaves)
        out.backward(t["grad"].to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for name, got, wanted in zip(("out", "d_x", "d_up", "d_down"), *results, strict=True):
        scale = wanted.square().mean().sqrt()  # sums over all tokens: measured in units of their own size
        errors[name] = distance(got.float() / scale, wanted / scale, CHAINED)
    return errors


def timings(calls: Calls, repeats: int) -> dict[str, dict[str, float]]:
    """Median and half quartile distance in ms of each call; the calls take turns."""
    for call in calls.values():
        for _ in range(3):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in taken.items()}
    return {
        name: {"ms": middle, "spread_ms": (high - low) / 2} for name, (low, middle, high) in quartiles.items()
    }


def candidates(tokens: int, width: int, hidden: int) -> dict[str, Calls]:
    """What is timed: part -> method -> call."""
    t = operands(tokens, width, hidden)
    x, up, down, grad, slope = t.values()
    fused_elementwise, fused_mul = (torch.compile(f, dynamic=False) for f in (elementwise, torch.mul))

    def train(function: Callable[..., Tensor]) -> Callable[[], Any]:
        leaves = [w.detach().requires_grad_() for w in (x, up, down)]
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    mlp, reference = fusion.leaky_relu_squared_mlp, fusion.leaky_relu_squared_mlp_reference
    return {
        "forward": {
            "fused": lambda: fusion.gemm_leaky_relu_squared(x, up),
            "cuBLAS + compiled": lambda: fused_elementwise(F.linear(x, up)),
            "cuBLAS + eager": lambda: elementwise(F.linear(x, up)),
            "cuBLAS alone": lambda: F.linear(x, up),
        },
        "backward": {
            "fused": lambda: fusion.gemm_mul(grad, down, slope),
            "cuBLAS + compiled": lambda: fused_mul(grad @ down, slope),
            "cuBLAS + eager": lambda: (grad @ down) * slope,
            "cuBLAS alone": lambda: grad @ down,
        },
        "MLP, all gradients": {
            "fused": train(torch.compile(mlp, dynamic=False, fullgraph=True)),
            "cuBLAS + compiled": train(torch.compile(reference, dynamic=False, fullgraph=True)),
            "cuBLAS + eager": train(reference),
        },
    }


def main() -> int:
    """Check, measure, print; 1 with one line where the kernels cannot run or are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if reason := fusion.available():
        print(f"cutlass_evt_fusion: {reason}", file=sys.stderr)
        return 1
    tokens, repeats = (options.tokens // 8, 8) if options.quick else (options.tokens, options.repeats)
    shape = tokens, options.width, options.hidden
    record = fusion.build.read_record()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nvcc": record["nvcc"],
        "cutlass": record["cutlass"],
        "shape": shape,
        "tolerance": TOLERANCE,
        "tolerance_chained": CHAINED,
        "parity": {},
        "times": {},
    }
    print(
        f"{result['device']}, torch {torch.__version__}, nvcc {record['nvcc']}, "
        f"nvidia-cutlass {record['cutlass']}"
    )
    for sizes in (*AWKWARD, (tokens + 1, *shape[1:]), shape):
        errors = result["parity"]["x".join(map(str, sizes))] = parity(*sizes)
        print(f"parity {sizes}: " + " ".join(f"{name}:{error:.3f}" for name, error in errors.items()))
        if (worst := max(errors.values())) > 1:
            print(
                f"cutlass_evt_fusion: at tokens, width, hidden = {sizes} an error is {worst:.2f} times "
                "what is allowed; nothing is timed",
                file=sys.stderr,
            )
            return 1
    product = 2 * tokens * options.width * options.hidden  # floating-point operations of one matrix product
    print(f"\n{'part':<20}{'method':<20}{'ms':>9}{'+-':>8}{'TFLOP/s':>10}{'of fused':>10}")
    for part, calls in candidates(*shape).items():
        times = result["times"][part] = timings(calls, repeats)
        work = product * (1 if "cuBLAS alone" in calls else 6)
        for method, row in times.items():
            row["tflops"] = work / row["ms"] / 1e9
            row["of_fused"] = row["ms"] / times["fused"]["ms"]
            print(
                f"{part:<20}{method:<20}{row['ms']:>9.4f}{row['spread_ms']:>8.4f}{row['tflops']:>10.1f}"
                f"{row['of_fused']:>9.2f}x"
            )
    print("RESULT " + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
