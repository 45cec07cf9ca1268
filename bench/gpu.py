#!/usr/bin/env python3
"""One GPU in eight minutes: what it can do, and what kernels, training step and evaluation make of it.

    python bench/gpu.py [--quick] [--parts kernels,step] [--record] [--against FILE]    on one GPU
    python bench/gpu.py --device cpu --tiny     no GPU: the whole script at a small shape, times labelled CPU

Parts, in the order of time spent on them; what the budget leaves no time for is skipped, and listed:
    ceilings    device copy, matmul peak, matmuls of the model's shapes
    kernels     every fused kernel against its reference, eager and compiled, and against the floor,
                the larger of fewest operations over matmul peak and fewest bytes over copy bandwidth
    step        the training step of every recipe with one micro-batch, loops on and off: parts, kernel
                classes, share of the matmul peak; the flagship also with KERNELS=reference, same attention
    optimiser   alone; what one of 8 ranks computes, an estimate of what it communicates, a projected step
    evaluate    plain, adapters per document, SGD on chunks: tokens per second
    quantiser   seconds on the host for 36 M weights (bench/packing.py)
Recompilations after each warm-up are counted in step and evaluate. All text is synthetic: random tokens in
documents of log-normal length, so nothing is needed on disk. Times are medians, +- half the distance of the
quartiles; methods that are compared take turns. --against times another implementation of the interface of
bench/train_step.py beside ours. The last line is RESULT and every figure as JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data
import environment

environment.enter()
import argparse
import contextlib
import datetime
import functools
import gc
import io
import itertools
import json
import os
import subprocess
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn

import train_gpt as t
from bench import gpu_meter as m
from bench.train_step import TrainStep
from recipes import read as read_recipe

PARTS = ("ceilings", "kernels", "step", "optimiser", "evaluate", "quantiser")
RANKS, BUS = (
    8,
    300e9,
)  # of the estimate: ranks, and bytes per second that each sends (assumed; NVLink's limit is 450e9)
RESERVED = {"optimiser": 20, "evaluate": 60}  # seconds that recipes other than the flagship leave
REFERENCE = {"KERNELS": "reference", "MLP_KERNEL": "reference"}  # no fused kernel at all
TINY = {  # a shape that a CPU goes through in seconds
    "VOCAB_SIZE": "320",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "1024",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "XSA_LAST_N": "4",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "MUON_BACKEND_STEPS": "1",
    "COMPUTE_DTYPE": "float32",
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "16",
    "VAL_BATCH_TOKENS": "2048",
    "TTT_CHUNK_TOKENS": "256",
    "TTT_LORA_RANK": "4",
    "TTT_CHUNK_SIZE": "16",
    "TTT_EVAL_SEQ_LEN": "64",
    "TTT_BATCH_SIZE": "4",
}


def fail(message: str) -> NoReturn:
    """One line to the terminal, exit status 2."""
    print(f"gpu.py: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one line."""

    def error(self, message: str) -> NoReturn:
        """Stop with `message`."""
        fail(message)


class Table(NamedTuple):
    """Rows for people."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def text(self) -> str:
        """In columns, the first one to the left."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        align = lambda cell, i: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
        return "\n".join(
            [self.title, *("  ".join(align(cell, i) for i, cell in enumerate(line)) for line in lines)]
        )

    def markdown(self) -> str:
        """In Markdown."""
        line = lambda cells: "| " + " | ".join(cells) + " |"
        return "\n".join(
            [f"**{self.title}**", "", line(self.head), "|---" * len(self.head) + "|", *map(line, self.rows)]
        )


def show(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def ratio(one: float | None, other: float | None) -> float | None:
    """one / other, if both are there."""
    return one / other if one is not None and other else None


def recipes() -> dict[str, dict[str, str]]:
    """Settings by name: the flagship (the defaults, unless a recipe says more) and the published systems.

    Not those of the embedded corpus: they are of a CPU's size.
    """
    found = {"flagship": {}}
    for path in sorted((ROOT / "records" / "recipes").glob("*.env")):
        settings = read_recipe(path)
        if settings.get("DATASETS_DIR") != "data/demo":
            found[path.stem] = settings
    return {name: found[name] for name in sorted(found, key=lambda name: name != "flagship")}


class Bench:
    """The measurements of one run, the time that is left, and what was skipped or failed."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.meter = m.Meter(torch.device(options.device))
        self.device, self.cuda = self.meter.device, self.meter.cuda
        self.began, self.budget = time.monotonic(), options.budget
        self.seconds = 0.01 if options.tiny else 0.1 if options.quick else 0.3  # per call and turn
        self.rounds = 1 if options.tiny and options.quick else 3
        self.tables: list[Table] = []
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.results: dict[str, Any] = dict.fromkeys(PARTS) | {"recompilations": {}, "against": None}
        self.copy_rate = self.peak = None  # bytes and operations per second
        self.flagship: dict[str, Any] | None = None  # figures of its looped step, for the projection
        self.against = m.load_step(options.against).build if options.against else None

    def unit(self, name: str, seconds: float, work: Callable[[], Any]) -> Any:
        """The result of `work`; None, and the reason noted, if no `seconds` are left or if it fails."""
        left = self.budget - (time.monotonic() - self.began)
        if seconds > left:
            self.skipped[name] = (
                f"takes about {seconds:.0f}s, {max(left, 0):.0f}s are left of {self.budget:.0f}s"
            )
            return None
        print(f"{time.monotonic() - self.began:5.0f}s {name}", flush=True)
        try:
            return work()
        except (Exception, t.Stop) as error:  # one broken part must not take the others' figures with it
            text = (str(error).strip().splitlines() or [""])[0]
            self.failed[name] = f"{type(error).__name__}: {text}"[:300]
            print(f"      failed: {self.failed[name]}", flush=True)
            return None
        finally:
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()  # or the compiled code of all models so far is searched in every call
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()

    def settings(self, name: str, **changes: str) -> dict[str, str]:
        """The settings of a recipe at the shape of this run."""
        return recipes()[name] | (TINY if self.options.tiny else {}) | changes

    def time(self, calls: dict[str, Callable[[], Any]], longer: int = 1) -> dict[str, m.Time]:
        """Times of calls that take turns."""
        return self.meter.time(calls, longer * self.seconds, self.rounds)

    def floor(self, flops: float, size: float) -> float | None:
        """The fewest milliseconds that the ceilings allow."""
        return 1000 * max(flops / self.peak, size / self.copy_rate) if self.peak else None

    # --- ceilings ---

    def ceilings(self) -> None:
        """Copy bandwidth and matmul rates."""
        tiny, dtype = self.options.tiny, torch.bfloat16 if self.cuda else torch.float32
        size = 2**20 if tiny else 2**31
        source = torch.randint(256, (size,), dtype=torch.uint8, device=self.device)
        again = functools.partial(torch.empty_like(source).copy_, source)
        copy = self.time({"copy": again})["copy"]
        self.copy_rate = 2 * size / copy.ms * 1000
        rows = [
            ("device copy, bytes read and written", f"{show(self.copy_rate / 1e9, 0)} GB/s", show(copy.ms, 3))
        ]
        config = t.Config.from_env(self.settings("flagship"))
        del source, again
        n, side, d = (128, 64, config.model_dim) if tiny else (98_304, 8192, config.model_dim)
        kv, hidden = d * config.num_kv_heads // config.num_heads, int(config.mlp_mult * d)
        shapes = {
            "square": (side, side, side),
            "q, o": (n, d, d),
            "k, v": (n, d, kv),
            "up": (n, d, hidden),
            "down": (n, hidden, d),
            "head": (n, d, config.vocab_size),
            "gradient of up": (hidden, n, d),
        }
        rates = {}
        for name, (a, b, c) in shapes.items():
            left, right = (
                m.random_tensor(shape, i, self.device, dtype) for i, shape in enumerate(((a, b), (b, c)))
            )
            taken = self.time({"matmul": functools.partial(torch.mm, left, right)})["matmul"]
            rates[name] = 2 * a * b * c / taken.ms * 1000
            rate = f"{show(rates[name] / 1e12, 3 if tiny else 0)} TFLOP/s"
            rows.append((f"matmul {name}: {a:,} x {b:,} x {c:,}", rate, show(taken.ms, 3)))
        self.peak = max(rates.values())
        self.tables.append(
            Table(f"Ceilings ({str(dtype).removeprefix('torch.')}, random numbers)", ("", "rate", "ms"), rows)
        )
        self.results["ceilings"] = {
            "copy_gb_per_s": self.copy_rate / 1e9,
            "matmul_tflops": self.peak / 1e12,
            "matmuls_tflops": {name: rate / 1e12 for name, rate in rates.items()},
        }

    # --- kernels ---

    def kernels(self) -> None:
        """Every fused kernel against its reference."""
        if not self.cuda and os.environ.get("TRITON_INTERPRET") != "1":
            self.skipped["kernels"] = "there is no GPU; TRITON_INTERPRET=1 runs them in Triton's interpreter"
            return
        tiny, dtype = self.options.tiny, torch.bfloat16 if self.cuda else torch.float32
        config = t.Config.from_env(self.settings("flagship"))
        table = Table(
            "Fused kernels against plain PyTorch (ratio: time of the first fused form over this one's; "
            "memory: peak of a forward and backward)",
            (
                "kernel",
                "form",
                "forward ms",
                "+-",
                "ratio",
                "of floor",
                "both ms",
                "+-",
                "ratio",
                "of floor",
                "peak MiB",
                "ratio",
            ),
            [],
        )
        found = {}
        for name, make in m.KERNELS.items():
            kernel_of = functools.partial(make, config, self.device, dtype)
            work = functools.partial(self.kernel, kernel_of, table, 4 if tiny else 98_304)
            found[name] = self.unit(f"kernels: {name}", 25, work)
        self.tables.append(table)
        self.results["kernels"] = found

    def kernel(self, make: Callable[[int], m.Kernel], table: Table, rows: int) -> dict[str, Any]:
        """Times and memory of all forms of one kernel, with fewer rows if they do not fit."""
        while True:
            try:
                return self.forms(make(rows), table)
            except torch.OutOfMemoryError:
                if rows < 2048:
                    raise
            rows //= 2  # outside of the handler, which keeps the tensors of the failed call
            gc.collect()
            torch.cuda.empty_cache()

    def forms(self, kernel: m.Kernel, table: Table) -> dict[str, Any]:
        """The same at the kernel's size."""
        functions = {**kernel.fused, "eager": kernel.reference}
        if self.cuda:  # on a CPU, compiling takes longer than all the rest
            functions["compiled"] = torch.compile(kernel.reference, dynamic=False, fullgraph=True)
        forward = self.time({name: kernel.forward(f) for name, f in functions.items()})
        calls = {name: kernel.both(f) for name, f in functions.items()} if kernel.leaves else {}
        both = self.time(calls)
        peaks = {name: self.meter.peak(call) for name, call in calls.items()}
        floors = self.floor(kernel.flops[0], kernel.bytes[0]), self.floor(kernel.flops[1], kernel.bytes[1])
        best = next(iter(kernel.fused), "compiled" if self.cuda else "eager")
        rows, title = {}, f"{kernel.name} {kernel.shape}"
        for name in functions:
            one, two, peak = forward[name], both.get(name), peaks.get(name)
            rows[name] = row = {
                "forward_ms": one.ms,
                "forward_spread_ms": one.spread,
                "forward_ratio": ratio(forward[best].ms, one.ms),
                "forward_of_floor": ratio(one.ms, floors[0]),
                "both_ms": two and two.ms,
                "both_spread_ms": two and two.spread,
                "both_ratio": two and ratio(both[best].ms, two.ms),
                "both_of_floor": two and ratio(two.ms, floors[1]),
                "peak_mib": peak,
                "memory_ratio": ratio(peaks.get(best), peak),
            }
            digits = (3, 3, 3, 2, 3, 3, 3, 2, 0, 3)
            table.rows.append((title, name, *(show(v, n) for v, n in zip(row.values(), digits, strict=True))))
            title = ""
        least = show(floors[1], 3) if calls else "-"
        table.rows.append(("", "floor", show(floors[0], 3), "", "", "", least, *[""] * 5))
        for name, reason in kernel.missing.items():
            self.skipped[f"{kernel.name}: {name}"] = reason
        return {"shape": kernel.shape, "forms": rows, "floor_ms": floors, "missing": kernel.missing}

    # --- step ---

    def batches(self, config: t.Config, count: int) -> list[t.Batch]:
        """Micro-batches of one rank on the device, with the commonest number of starts: one compilation."""
        loader = t.LOADERS[config.loader](config, m.Synthetic(config, 9 * config.train_batch_tokens + 9))
        drawn = [loader.get(step, stream) for step in range(4) for stream in range(t.STREAMS)]
        size = lambda batch: 0 if batch.starts is None else len(batch.starts)
        sizes = [size(batch) for batch in drawn]
        common = max(set(sizes), key=sizes.count)
        chosen = [batch for batch in drawn if size(batch) == common][:count]
        move = lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x
        return [t.Batch(*map(move, batch)) for batch in chosen]

    def start_shapes(self, config: t.Config) -> dict[str, int]:
        """How often a packed micro-batch has each number of padded starts, each of which is compiled once."""
        if config.loader != "packed":
            return {}
        sizes: dict[str, int] = {}
        tokens = config.train_batch_tokens // t.STREAMS
        lengths = m.document_lengths(max(1, 2000 * tokens // m.MEAN_LENGTH), seed=3)
        begins = np.cumsum(lengths) - lengths
        for first in range(0, int(begins[-1]) - tokens, tokens):
            inside = begins[np.searchsorted(begins, first) : np.searchsorted(begins, first + tokens)] - first
            edges = np.unique(np.concatenate([[0], inside, [tokens]]))
            segments = int((-(-np.diff(edges) // config.train_seq_len)).sum())
            padded = str(-(-(segments + 1) // 64) * 64)
            sizes[padded] = sizes.get(padded, 0) + 1
        return dict(sorted(sizes.items(), key=lambda item: int(item[0])))

    def steps(self) -> None:
        """The training step of every recipe."""
        table = Table(
            "Training step of one micro-batch, optimiser of 1 rank and average included (x8: 8 micro-batches "
            "a step, as on one GPU, from the parts; ratio: ours over this; of peak: operations of the "
            "model's products over time and matmul peak)",
            (
                "recipe",
                "loops",
                "ms",
                "+-",
                "ratio",
                "tokens/s",
                "tokens/s x8",
                "of peak",
                "forward",
                "backward",
                "optimiser",
                "peak MiB",
                "recompiled",
            ),
            [],
        )
        classes = Table(
            "Device milliseconds of forward and backward by kernel class, and of the optimiser",
            ("recipe", "loops", *m.CLASSES, "other", "kernels", "Muon", "Adam, clip", "idle"),
            [],
        )
        self.results["step"] = found = {}
        self.results["recompilations"]["start_shapes"] = self.start_shapes(
            t.Config.from_env(self.settings("flagship"))
        )
        seen: dict[str, str] = {}
        wanted = [(name, looped) for looped in (True, False) for name in recipes()]
        wanted.sort(key=lambda pair: pair != ("flagship", True))
        estimate = 5.0 if self.options.tiny else 100.0
        for name, looped in wanted:
            label = f"step: {name} {'looped' if looped else 'not looped'}"
            if self.options.quick and (name, looped) != ("flagship", True):
                self.skipped[label] = "--quick"
                continue
            environment = self.settings(name, ENABLE_LOOPING_AT=str(int(not looped)))
            key = self.same_step(environment)
            if key in seen:
                found[label[6:]] = {"same_as": seen[key]}
                continue
            began, first = time.monotonic(), (name, looped) == ("flagship", True)
            work = functools.partial(self.one_step, label[6:], environment, table, classes, rivals=first)
            later = (
                0
                if first or self.options.tiny
                else sum(RESERVED.get(part, 0) for part in self.options.chosen)
            )
            result = self.unit(label, estimate * (2 if first and self.cuda else 1) + later, work)
            if result:
                found[label[6:]], seen[key] = result, label[6:]
                estimate = 1.1 * (time.monotonic() - began) / (1 + len(result["rivals"]))
                self.flagship = self.flagship or result
        self.tables += [table, classes]
        same = [f"{name}: as {one['same_as']}" for name, one in found.items() if "same_as" in one]
        if same:
            print("      the same step: " + "; ".join(same))

    @staticmethod
    def same_step(environment: dict[str, str]) -> str:
        """What a step's time depends on: recipes that differ in rates or initial values alone are one."""
        config = t.Config.from_env(environment)
        model = config.chosen("Model")
        for name in (
            "QK_GAIN_INIT",
            "TIED_EMBED_INIT_STD",
            "ROPE_BASE",
            "LOGIT_SOFTCAP",
            "SPARSE_ATTN_GATE_SCALE",
        ):
            del model[name]
        names = (
            "loader",
            "train_batch_tokens",
            "train_seq_len",
            "enable_looping_at",
            "muon_coefficients",
            "muon_backend_steps",
            "muon_row_normalize",
            "grad_clip_scope",
            "kernels",
            "mlp_kernel",
        )
        return json.dumps([model, *(getattr(config, name) for name in names)])

    def one_step(
        self, name: str, environment: dict[str, str], table: Table, classes: Table, rivals: bool
    ) -> dict[str, Any]:
        """Times, parts, kernel classes and memory of one step; with `rivals`, others take turns."""
        ours = TrainStep(environment, self.device)
        config = ours.config
        batches = self.batches(config, 2)
        steps: dict[str, Callable] = {"ours": ours}
        if rivals and self.cuda:  # on a CPU, `ours` has no fused kernels either
            same = environment | REFERENCE | {"ATTENTION": self.attention_of(ours)}
            steps["KERNELS=reference"] = TrainStep(same, self.device)
            if any(
                line.startswith("mlp: cutlass") for line in ours.said
            ):  # which the trainer prefers, unmeasured
                steps["MLP_KERNEL=triton"] = TrainStep(environment | {"MLP_KERNEL": "triton"}, self.device)
        if rivals and self.against:
            steps[self.options.against.name] = self.against(dict(environment), self.device)
        warm: dict[str, float] = {}
        for other, step in steps.items():
            began = time.monotonic()
            for batch in (*batches, *batches):
                step(batch.inputs, batch.targets)
            self.meter.wait()
            warm[other] = time.monotonic() - began
        graphs = m.compiled_graphs()
        calls = {other: self.in_turn(step, batches) for other, step in steps.items()}
        taken = self.time(calls, 1 if self.options.tiny else 6)
        peak = self.meter.peak(calls["ours"])
        parts = self.parts(ours, batches)
        by_class, muon, adam = self.kernel_classes(ours, batches[0])
        recompiled = m.compiled_graphs() - graphs
        self.results["recompilations"][name] = recompiled
        chosen = [line for line in ours.said if line.startswith(("attention", "kernels", "mlp", "compile"))]
        for line in chosen if rivals else ():
            print(f"      {line}")
        tokens, ms = batches[0].inputs.numel(), taken["ours"].ms
        flops = 3 * m.forward_flops(config, ours.model.looped, tokens, m.causal_pairs(batches[0]))
        share = flops / (ms / 1000) / self.peak if self.peak else None
        eight = 8000 * tokens / (8 * (parts["forward"] + parts["backward"]) + parts["optimiser"])
        recipe, loops = name.split(" ", 1)
        for other, one in taken.items():
            own = other == "ours"
            cells = (
                [eight, share, *parts.values()]
                if own
                else [None, share and share * ms / one.ms, None, None, None]
            )
            shown = [show(cell, digits) for cell, digits in zip(cells, (0, 3, 2, 2, 2), strict=True)]
            table.rows.append(
                (
                    recipe if own else f"  {other}",
                    loops,
                    show(one.ms),
                    show(one.spread),
                    show(ms / one.ms, 3),
                    show(1000 * tokens / one.ms, 0),
                    *shown,
                    show(peak if own else None, 0),
                    str(recompiled) if own else "-",
                )
            )
        busy = sum(value for key, value in by_class.items() if key != "kernels") + muon + adam
        idle = ms - busy if self.cuda else None  # a CPU's profiler counts its own time
        counts = [*(show(value, 0 if key == "kernels" else 2) for key, value in by_class.items())]
        classes.rows.append((recipe, loops, *counts, show(muon), show(adam), show(idle)))
        others = {
            other: {
                "ms": one.ms,
                "spread_ms": one.spread,
                "ratio": ms / one.ms,
                "warm_up_seconds": warm[other],
            }
            for other, one in taken.items()
            if other != "ours"
        }
        if rivals and self.against:
            self.results["against"] = {"file": str(self.options.against), **others[self.options.against.name]}
        return {
            "ms": ms,
            "spread_ms": taken["ours"].spread,
            "tokens": tokens,
            "tokens_per_s": 1000 * tokens / ms,
            "tokens_per_s_of_8_micro_batches": eight,
            "model_tflop": flops / 1e12,
            "of_peak": share,
            "parts_ms": parts,
            "classes_ms": by_class,
            "muon_ms": muon,
            "adam_ms": adam,
            "idle_ms": idle,
            "peak_mib": peak,
            "recompilations": recompiled,
            "warm_up_seconds": warm["ours"],
            "rivals": others,
            "chosen": chosen,
        }

    @staticmethod
    def attention_of(step: TrainStep) -> str:
        """The attention backend that a step chose."""
        (line,) = (line for line in step.said if line.startswith("attention: "))
        return line.split()[1]

    @staticmethod
    def in_turn(step: Callable, batches: list[t.Batch]) -> Callable[[], Any]:
        """A call that takes a step on the next of the batches."""
        turn = itertools.cycle(batches)

        def call() -> Any:
            batch = next(turn)
            return step(batch.inputs, batch.targets)

        return call

    def parts(self, step: TrainStep, batches: list[t.Batch]) -> dict[str, float]:
        """Median milliseconds of forward, backward and optimiser within train_step."""
        marks: list[Any] = []

        def mark() -> None:
            if self.cuda:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())

        def marked(call: Callable) -> Callable:
            def inner(*arguments: Any) -> Any:
                mark()
                result = call(*arguments)
                mark()
                return result

            return inner

        optimizers = types.SimpleNamespace(step=marked(step.optimizers.step))
        for i in range(3 if self.options.tiny else 10):
            batch = batches[i % len(batches)]
            t.train_step(
                step.run,
                marked(step.forward),
                optimizers,
                [step.batch(batch.inputs, batch.targets)],
                0.5,
                step.config.muon_momentum_warmup_steps,
            )
        self.meter.wait()
        gap = lambda a, b: a.elapsed_time(b) if self.cuda else 1000 * (b - a)
        gaps = [[gap(a, b) for a, b in itertools.pairwise(marks[i : i + 4])] for i in range(0, len(marks), 4)]
        return dict(zip(("forward", "backward", "optimiser"), np.median(gaps, 0).tolist(), strict=True))

    def kernel_classes(self, step: TrainStep, batch: t.Batch) -> tuple[dict[str, float], float, float]:
        """(device time of forward and backward by class, of Muon, of the rest of the optimiser), in ms."""
        ready, c = step.batch(batch.inputs, batch.targets), step.config
        model = self.meter.classes(lambda: step.forward(ready).mean().backward())
        gradients = {name: weight.grad for name, weight in step.model.named_parameters()}
        total = lambda found: sum(value for name, value in found.items() if name != "kernels")
        whole = total(
            self.meter.classes(
                lambda: step.optimizers.step(
                    t.learning_rate_scale(c, 0.5), c.muon_momentum, t.muon_weight_decay(c, 0.5)
                )
            )
        )

        def muon() -> None:
            for name, bank in step.optimizers.muon.banks.items():
                bank.grad = gradients[name]
            step.optimizers.muon.reduce()
            step.optimizers.muon.set_rates(c.matrix_lr, c.muon_momentum, c.muon_wd)
            step.optimizers.muon.step(None, mixed=False)

        alone = total(self.meter.classes(muon))
        for parameter in step.model.parameters():
            parameter.grad = None
        return model, alone, max(whole - alone, 0.0)

    # --- optimiser ---

    def optimiser(self) -> None:
        """The optimiser alone at 1 rank, the share of one of 8 ranks, and a projected step."""
        environment = self.settings("flagship", COMPILE="auto" if self.cuda else "off")
        config = t.Config.from_env(environment)
        with contextlib.redirect_stdout(io.StringIO()):
            run = t.Run(config)
            model = t.GPT(config, fused=t.pick_kernels(config, run), dtype=run.dtype).to(run.device)
        whole = t.Optimizers(run, model, self.cuda)
        draw = lambda parameters: {
            p: m.random_tensor(p.shape, i, p.device, p.dtype) for i, p in enumerate(parameters)
        }
        gradients = draw(model.parameters())
        share = lambda bank: nn.Parameter(bank.detach()[: -(-len(bank) // RANKS)].clone())
        own = t.Muon(
            run, {name: share(bank) for name, bank in whole.muon.banks.items()}, self.cuda, model.fused
        )
        parts = draw(own.banks.values())

        def give(values: dict) -> None:
            for parameter, value in values.items():
                parameter.grad = value

        def muon(which: t.Muon, values: dict) -> None:
            give(values)
            which.reduce()
            which.set_rates(config.matrix_lr, config.muon_momentum, config.muon_wd)
            which.step(None, mixed=False)

        banks = {bank: gradients[bank] for bank in whole.muon.banks.values()}
        calls = {
            "whole": lambda: (give(gradients), whole.step(1.0, config.muon_momentum, config.muon_wd)),
            "muon": lambda: muon(whole.muon, banks),
            "muon_of_8": lambda: muon(own, parts),
        }
        for call in calls.values():
            call()
        taken = self.time(calls)
        sizes = {
            name: RANKS * -(-len(bank) // RANKS) * bank[0].numel() * 2
            for name, bank in whole.muon.banks.items()
        }
        replicated = sum(p.nbytes for p in whole.replicated)
        each = (RANKS - 1) / RANKS
        scatter, reduce = each * sum(sizes.values()) / BUS, 2 * each * replicated / BUS
        moved = 1000 * (2 * scatter + reduce)
        eight = taken["whole"].ms - taken["muon"].ms + taken["muon_of_8"].ms
        rows = [
            ("optimiser step at 1 rank", show(taken["whole"].ms), "measured"),
            ("of it Muon", show(taken["muon"].ms), "measured"),
            ("Muon on the share of one of 8 ranks", show(taken["muon_of_8"].ms), "measured"),
            (
                f"reduce-scatter and all-gather of {sum(sizes.values()) / 1e6:,.1f} MB, all-reduce of "
                f"{replicated / 1e6:,.1f} MB at {BUS / 1e9:.0f} GB/s per rank",
                show(moved),
                "estimated",
            ),
            ("optimiser step of one of 8 ranks, nothing overlapped", show(eight + moved), "estimated"),
        ]
        facts = {
            "whole_ms": taken["whole"].ms,
            "muon_ms": taken["muon"].ms,
            "muon_of_8_ms": taken["muon_of_8"].ms,
            "communication_ms_estimated": moved,
            "rank_of_8_ms_estimated": eight + moved,
            "share_of_step": None,
            "step_of_8_ms_projected": None,
            "tokens_per_s_of_8_projected": None,
        }
        if self.flagship:
            step, model_ms = (
                self.flagship,
                sum(self.flagship["parts_ms"][name] for name in ("forward", "backward")),
            )
            facts["share_of_step"] = step["parts_ms"]["optimiser"] / step["ms"]
            facts["step_of_8_ms_projected"] = projected = model_ms + eight + moved
            facts["tokens_per_s_of_8_projected"] = speed = RANKS * step["tokens"] / projected * 1000
            rows += [
                (
                    "share of the optimiser in a step of 1 rank and 1 micro-batch",
                    f"{100 * facts['share_of_step']:.1f}%",
                    "measured",
                ),
                (f"step of 8 GPUs, loops on: {show(speed, 0)} tokens/s", show(projected), "projected"),
            ]
        self.tables.append(Table("Optimiser of the flagship", ("", "ms", "how"), rows))
        self.results["optimiser"] = facts

    # --- evaluate ---

    def evaluate(self) -> None:
        """Tokens per second of evaluation, of adapters per document and of SGD on chunks."""
        table = Table(
            "Evaluation on one GPU (loops on; 50,000 documents over 8 GPUs: projected, without compiling)",
            ("", "tokens", "seconds", "tokens/s", "50,000 documents, s", "recompiled"),
            [],
        )
        found = {}
        slow = 5 if self.options.tiny else 100
        jobs = {
            "plain": (slow / 2, self.plain),
            "document adapters": (slow, self.documents),
            "chunk SGD": (slow, self.chunks),
        }
        for name, (seconds, work) in jobs.items():
            if self.options.quick and not self.options.tiny and name != "plain":
                self.skipped[f"evaluate: {name}"] = "--quick"
                continue
            if (result := self.unit(f"evaluate: {name}", seconds, work)) is None:
                continue
            tokens, taken, recompiled = result
            speed = tokens / taken
            whole = 50_000 * m.MEAN_LENGTH / RANKS / speed
            found[name] = {
                "tokens": tokens,
                "seconds": taken,
                "tokens_per_s": speed,
                "recompilations": recompiled,
                "seconds_of_8_projected": whole,
            }
            self.results["recompilations"][name] = recompiled
            table.rows.append(
                (name, f"{tokens:,}", show(taken), show(speed, 0), show(whole, 0), str(recompiled))
            )
        self.tables.append(table)
        self.results["evaluate"] = found

    @staticmethod
    def model(environment: dict[str, str]) -> tuple[t.Run, t.Built]:
        """A looped model and its run."""
        with contextlib.redirect_stdout(io.StringIO()):
            run = t.Run(t.Config.from_env(environment))
            built = t.build(run)
        built.model.looped = run.config.num_loops > 0
        return run, built

    @staticmethod
    def tally(run: t.Run, lengths: np.ndarray) -> t.Tally:
        """For the scores of synthetic validation text."""
        tokens = m.random_text(lengths, run.config.vocab_size, seed=5)
        return t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "synthetic"))

    def twice(self, work: Callable[[], Any]) -> tuple[Any, float, int]:
        """(result, seconds, graphs compiled) of the second of two equal runs of `work`."""
        work()
        self.meter.wait()
        graphs, began = m.compiled_graphs(), time.perf_counter()
        result = work()
        self.meter.wait()
        return result, time.perf_counter() - began, m.compiled_graphs() - graphs

    def plain(self) -> tuple[int, float, int]:
        """Windows that do not overlap, flagship."""
        count = 8 if self.options.tiny else 500
        (run, built), lengths = (
            self.model(self.settings("flagship")),
            m.document_lengths(count, seed=4, longest=8192),
        )

        def work() -> int:
            one = self.tally(run, lengths)
            t.score_sliding(run, built.forward, run.config.eval_seq_len, one)
            return len(one.nats) - 1

        return self.twice(work)

    def documents(self) -> tuple[int, float, int]:
        """Adapters per document, flagship: batches from the middle of parts with equally many tokens."""
        environment = self.settings("flagship", TTT_ENABLED="1", TTT_MODE="doc_lora")
        size, parts = t.Config.from_env(environment).ttt_batch_size, 1 if self.options.quick else 3
        population = np.sort(m.document_lengths(50_000, seed=4))
        if self.options.tiny:
            population = population.clip(8, 48)
        shares = np.cumsum(population) / population.sum()
        places = [
            min(int(np.searchsorted(shares, (i + 0.5) / parts)), len(population) - size) for i in range(parts)
        ]
        lengths = np.concatenate([population[place : place + size] for place in places])
        run, built = self.model(environment)
        forward = torch.compile(built.model, dynamic=True, fullgraph=True) if built.compiled else built.model
        built.model.requires_grad_(False)
        seconds, tokens = [], []

        def work() -> int:
            one = self.tally(run, lengths)
            every = t.find_documents(one.validation.tokens)
            seconds.clear(), tokens.clear()
            for place in range(0, len(every), size):
                began, some = run.now(), every[place : place + size]
                t.adapt_documents(run, forward, one, some, seed=place)
                seconds.append(run.now() - began)
                tokens.append(int((some[:, 1] - some[:, 0] - 1).sum()))
            return sum(tokens)

        total, _, recompiled = self.twice(work)
        each = np.mean([second / count for second, count in zip(seconds, tokens, strict=True)])
        return total, float(total * each), recompiled  # every part of the text counts the same

    def chunks(self) -> tuple[int, float, int]:
        """Sliding windows and SGD on every chunk, pr1755: what one more chunk adds."""
        run, built = self.model(self.settings("pr1755", TTT_ENABLED="1", TTT_MODE="chunk_sgd"))
        size, found = run.config.ttt_chunk_tokens, []
        text = m.document_lengths(16 * size // m.MEAN_LENGTH + 8, seed=4)
        for count in (2, 3):
            lengths = np.append(text[: int(np.searchsorted(np.cumsum(text), count * size))], 0)
            lengths[-1] = count * size + 1 - lengths.sum()
            score = functools.partial(self.tally, run, lengths)
            found.append(
                self.twice(lambda score=score: t.chunk_sgd(run, built.model, built.forward, score()))
            )
        return size, max(found[1][1] - found[0][1], 1e-9), found[0][2] + found[1][2]

    # --- quantiser ---

    def quantiser(self) -> None:
        """Seconds on the host: bench/packing.py's figures for random weights."""
        from bench.packing import Form, full_shape

        if self.options.tiny and self.options.quick:
            self.skipped["quantiser"] = "--tiny --quick: a layer of the full shape takes half a minute"
            return
        layers = 1 if self.options.tiny or self.options.quick else 11
        facts = full_shape(Form(), layers)
        how = "36 M weights" if layers == 11 else "one layer, seconds scaled to 36 M weights"
        rows = [(name, show(facts[name], 1)) for name in ("plan", "round", "encode", "decode")]
        self.tables.append(Table(f"Quantiser on {os.cpu_count()} host cores, {how}", ("", "s"), rows))
        self.results["quantiser"] = facts | {"layers": layers, "cores": os.cpu_count()}


def head(bench: Bench) -> dict[str, str]:
    """What was measured where and when."""
    with contextlib.redirect_stdout(io.StringIO()):
        versions = t.versions(t.Run(t.Config.from_env({})))
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = (
            subprocess.run(ask, capture_output=True, text=True, check=False).stdout.splitlines()[0]
            if bench.cuda
            else "none"
        )
    except (OSError, IndexError):
        driver = "unknown"
    keys = ("device", "python", "torch", "triton", "cuda", "commit")
    return {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        **{key: versions[key] for key in keys},
        "driver": driver,
    }


def record(path: Path, bench: Bench, facts: dict[str, str], command: str) -> None:
    """Append this run as a section of a file of records."""
    before = path.read_text() if path.exists() else "# GPU checks\n"
    notes = [f"* skipped: {name} ({reason})" for name, reason in bench.skipped.items()]
    notes += [f"* **failed**: {name} ({reason})" for name, reason in bench.failed.items()]
    section = [
        f"## {facts['device']}, {facts['date']}",
        "",
        f"`{command}`",
        "",
        ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("device", "date")),
        "",
        "\n\n".join(table.markdown() for table in bench.tables if table.rows),
        *([""] if notes else []),
        *notes,
    ]
    kept = before.rstrip("\n")
    t.write_atomically(path, (kept + "\n\n" + "\n".join(section) + "\n").encode())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The checked command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the script"
    )
    parser.add_argument("--tiny", action="store_true", help="a small shape, for --device cpu")
    parser.add_argument(
        "--quick", action="store_true", help="short turns, the flagship only, plain evaluation only"
    )
    parser.add_argument("--parts", help=f"comma-separated, of {','.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=460.0, metavar="S", help="seconds in total (460)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="another bench/train_step.py")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=ROOT / "records" / "gpu_checks.md",
        metavar="FILE",
        help="append the tables to FILE (records/gpu_checks.md)",
    )
    options = parser.parse_args(arguments)
    options.chosen = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := set(options.chosen) - set(PARTS):
        fail(f"--parts {options.parts}: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if options.budget <= 0:
        fail(f"--budget {options.budget:g}: must be greater than 0")
    if options.device == "cpu" and not options.tiny:
        fail("--device cpu: add --tiny, the model's own shape takes hours there")
    if options.device == "cpu" and options.record:
        fail("--record: only figures of a GPU are recorded; leave it out or run on one")
    if options.device == "cuda" and not torch.cuda.is_available():
        fail(
            "there is no GPU here (torch.cuda.is_available() is False); "
            "--device cpu --tiny tries the script without"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and the RESULT line; 1 if a part failed."""
    options = parse(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer takes a GPU where it sees one
    try:
        bench = Bench(options)
        if bench.against:  # before minutes are spent on the rest
            bench.against(bench.settings("flagship"), bench.device)
    except (Exception, SystemExit) as error:
        fail(f"--against {options.against}: {' '.join(str(error).split())[:200] or type(error).__name__}")
    facts = head(bench)
    warning = "" if bench.cuda else " (CPU: these times say nothing about a GPU)"
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + warning)
    print(
        f"synthetic text: random tokens in documents of {m.MEAN_LENGTH} tokens on average (log-normal, "
        f"deviation {m.DEVIATION:g} of the logarithm); random weights"
    )
    work: dict[str, tuple[float, Callable[[], None]]] = {
        "ceilings": (15, bench.ceilings),
        "kernels": (20, bench.kernels),
        "step": (30, bench.steps),
        "optimiser": (20, bench.optimiser),
        "evaluate": (10, bench.evaluate),
        "quantiser": (60, bench.quantiser),
    }
    for part in PARTS:
        if part in options.chosen:
            bench.unit(part, 1 if options.tiny else work[part][0], work[part][1])
        else:
            bench.skipped[part] = "not in --parts"
    counts = [value for key, value in bench.results["recompilations"].items() if key != "start_shapes"]
    lines = [(name, reason) for name, reason in bench.skipped.items()]
    bench.tables.append(Table("Skipped", ("", "why"), lines))
    bench.tables.append(Table("Failed", ("", "why"), list(bench.failed.items())))
    for table in bench.tables:
        if table.rows:
            print("\n" + ("" if bench.cuda else "CPU: ") + table.text())
    print(
        f"\nrecompilations after warm-up: {sum(counts)} (must be 0); shapes of packed micro-batches, each "
        f"compiled once: {bench.results['recompilations'].get('start_shapes') or 'not looked at'}"
    )
    against = bench.flagship and bench.flagship["rivals"].get("KERNELS=reference")
    if against:
        print(
            "flagship's step over that with KERNELS=reference, compiled, same attention: "
            f"{against['ratio']:.3f} (asked for: at most 0.75)"
        )
    command = "python bench/gpu.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    if options.record:
        bench.tables = bench.tables[:-2]
        record(options.record, bench, facts, command.strip())
        print(f"recorded in {options.record}")
    result = {
        "head": facts,
        "device": options.device,
        "quick": options.quick,
        "tiny": options.tiny,
        **bench.results,
        "skipped": bench.skipped,
        "failed": bench.failed,
        "seconds": time.monotonic() - bench.began,
    }
    print("RESULT " + json.dumps(result, default=str))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
