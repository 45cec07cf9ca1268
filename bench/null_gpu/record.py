"""Every kernel that a process generates or launches on the null GPU: origin, bytes, registers."""

from __future__ import annotations

import collections
import ctypes
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor.runtime.triton_heuristics as heuristics
import triton
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.runtime.runtime_utils import triton_hash_to_path_key
from torch._inductor.virtualized import V

from bench.null_gpu.account import Hand, bytes_moved, parse_ledger, split_arguments

RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Ledger:
    """The null GPU's own count of what it was asked for."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")  # the preloaded one

    def take(self) -> dict[str, int]:
        """What happened since the last call, by name."""
        with tempfile.NamedTemporaryFile("r", suffix=".tsv") as file:
            if self.library.nullgpu_dump(file.name.encode()):
                raise OSError(
                    f"{file.name}: the null GPU cannot write there; free space in the temporary folder"
                )
            found = parse_ledger(file.read())
        self.library.nullgpu_reset()
        return found


class Recorder:
    """Watches Inductor's code generation and the launches of hand-written Triton kernels in this process."""

    def __init__(self, source: Path, helpers: frozenset[str], touched: dict[tuple[str, str], int]):
        self.source, self.helpers = source, helpers  # the trainer, and functions too general to name a part
        self.touched = touched  # (hand-written kernel, argument) -> values it touches in each row of this
        self.generated: dict[str, dict[str, Any]] = {}
        self.built: dict[str, Any] = {}
        self.hand: dict[str, Hand] = {}
        self.watch_generation()
        self.watch_launches()

    def watch_generation(self) -> None:
        """Keep the description and the compiled form of every kernel from now on."""
        define, precompile = TritonScheduling.define_kernel, heuristics.CachingAutotuner.precompile

        def defined(scheduling, code, schedule, kernel):
            name = define(scheduling, code, schedule, kernel)
            nodes = [node for node in schedule if hasattr(node, "read_writes")]
            found = {"bytes": self.bytes_of(nodes, kernel), "part": self.part_of(nodes)}
            before = self.generated.get(name)
            if before is not None:  # one of the same text in another graph
                found["bytes"] = (before["bytes"] + found["bytes"]) // 2
            self.generated[name] = found
            return name

        def compiled(tuner, *arguments, **options):
            precompile(tuner, *arguments, **options)
            self.built[tuner.inductor_meta.get("kernel_name")] = tuner

        TritonScheduling.define_kernel = defined
        heuristics.CachingAutotuner.precompile = compiled

    def watch_launches(self) -> None:
        """Add up the tensors given to hand-written kernels, and the operations of products."""
        run = triton.runtime.JITFunction.run

        def counted(kernel, *arguments, grid, warmup, **options):
            if not warmup:
                name = kernel.fn.__name__
                given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
                before = self.hand.get(name, Hand(0, 0.0, 0.0))
                whole, sparse = split_arguments(given, name, self.touched)
                one = Hand(1, tensor_bytes(whole) + sparse, product_operations(given))
                self.hand[name] = Hand(*(old + new for old, new in zip(before, one, strict=True)))
            return run(kernel, *arguments, grid=grid, warmup=warmup, **options)

        triton.runtime.JITFunction.run = counted

    def bytes_of(self, nodes: list, kernel: Any) -> int:
        """Bytes that a generated kernel reads and writes in device memory."""
        graph = V.graph
        stored = {name for name, inner in kernel.args.output_buffers.items() if isinstance(inner, str)}
        for buffer in kernel.args.inplace_buffers.values():
            stored |= set(getattr(buffer, "other_names", ()))
        loaded = {*kernel.args.input_buffers, *stored}
        gone = graph.removed_buffers | kernel.removed_buffers
        gone |= graph.inplaced_to_remove | kernel.inplaced_to_remove
        written = {dependency.name for node in nodes for dependency in node.read_writes.writes}
        reads: dict[str, dict[str, tuple[int, int]]] = {}
        writes: dict[str, dict[str, tuple[int, int]]] = {}
        for node in nodes:
            for dependency in node.read_writes.reads:
                if dependency.name not in written:
                    self.note_access(reads, dependency, loaded)
            for dependency in node.read_writes.writes:
                if dependency.name not in gone:
                    self.note_access(writes, dependency, stored)
        return bytes_moved(reads) + bytes_moved(writes)

    @staticmethod
    def note_access(
        accesses: dict[str, dict[str, tuple[int, int]]], dependency: Any, wanted: set[str]
    ) -> None:
        """Enter (bytes of this access, bytes of its buffer) if the kernel has the buffer as an argument."""
        graph = V.graph
        # A mutated buffer has a name per version; the argument is the first: what an attention's backward
        # fills, say.
        name = graph.scheduler.mutation_real_name.get(dependency.name, dependency.name)
        if not {dependency.name, name} & wanted:
            return
        try:
            size = graph.get_dtype(name).itemsize
            whole = graph.sizevars.optimization_hint(graph.get_numel(name)) * size
        except (KeyError, AttributeError, NotImplementedError):  # a random seed, say
            return
        try:
            part = min(graph.sizevars.optimization_hint(dependency.get_numel()) * size, whole)
            place = str(dependency.index)
        except (AttributeError, NotImplementedError):  # the whole buffer
            part, place = whole, "all"
        accesses.setdefault(name, {})[place] = (part, whole)

    def part_of(self, nodes: list) -> str:
        """The function of the trainer that most of a kernel's operations come from."""
        frame = re.compile(rf'{re.escape(self.source.name)}", line \d+, in (\w+)')
        votes: collections.Counter[str] = collections.Counter()
        for node in nodes:
            for origin in node.node.get_origins() if node.node is not None else ():
                functions = frame.findall(origin.meta.get("stack_trace") or "")
                inner = [function for function in reversed(functions) if function not in self.helpers]
                votes[inner[0] if inner else "unknown"] += 1
        return votes.most_common(1)[0][0] if votes else "unknown"

    def resources(self, cache: Path) -> dict[str, list[dict[str, Any]]]:
        """Registers, stack and local memory of every generated kernel and configuration (from its cubin)."""
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        files = {path.parent.name: path for path in cache.rglob("*.cubin")}
        found: dict[str, list[dict[str, Any]]] = {}
        for name, tuner in self.built.items():
            for result in tuner.compile_results:
                path = files.get(triton_hash_to_path_key(result.kernel.hash))
                if path is None:
                    continue
                command = [str(tool), "--dump-resource-usage", str(path)]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                numbers = RESOURCES.search(said)
                if numbers is not None:
                    values = map(int, numbers.groups())
                    entry = dict(zip(("registers", "stack", "shared", "local"), values, strict=True))
                    found.setdefault(name, []).append(entry | {"configuration": str(result.config)})
        return found


def tensor_bytes(given: dict[str, Any]) -> float:
    """Bytes of the distinct tensors among a kernel's arguments, those behind TMA descriptors and in tuples
    included."""
    values = [one for value in given.values() for one in (value if isinstance(value, tuple) else (value,))]
    tensors = [getattr(value, "base", value) for value in values]
    distinct = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return float(sum(distinct.values()))


def product_operations(given: dict[str, Any]) -> float:
    """Operations of a kernel that multiplies `a` (N, M, K) into so many `columns`; 0 for any other. Half of
    the tiles of a symmetric product are mirrored, which is not subtracted."""
    a = getattr(given.get("a"), "base", None)
    if not isinstance(a, torch.Tensor) or "columns" not in given:
        return 0.0
    return 2.0 * a.numel() * given["columns"]
