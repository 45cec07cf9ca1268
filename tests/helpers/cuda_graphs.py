"""In place of CUDA graphs on a CPU: a recorder of operations, and a graph that repeats them.

A GPU does not run what it records. So what is recorded here is undone: memory of before is as before, and
memory made meanwhile is spoilt. What would wait for the GPU is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "_unique2")
EVENTS: list[str] = []  # what the stand-ins were asked for


def tensors(values: Any) -> list[torch.Tensor]:
    """All tensors in a nest."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Keeps every operation with the tensors that it reads and writes, and what these held before."""

    def __init__(self, operations: list):
        super().__init__()
        self.operations = operations
        self.made: set[int] = set()  # addresses of memory
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        if operation.overloadpacket.__name__ in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tensors((arguments, options)):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in self.made and address not in self.before:
                self.before[address] = storage, storage.clone()
        result = operation(*arguments, **options)
        results = tensors(result)
        self.made |= {tensor.untyped_storage().data_ptr() for tensor in results} - self.before.keys()
        if operation.namespace != "profiler":
            self.operations.append((operation, arguments, options, results))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        """Nothing was computed."""
        for *_, results in self.operations:
            for tensor in results:
                if tensor.untyped_storage().data_ptr() in self.made and tensor.is_floating_point():
                    tensor.detach().fill_(float("nan"))
        for storage, content in self.before.values():
            storage.copy_(content)


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat what was recorded on the same tensors."""
        EVENTS.append("replay")
        for operation, arguments, options, results in self.operations:
            again = operation(*arguments, **options)
            if operation.namespace == "c10d":
                (handle,) = (leaf for leaf in tree_leaves(again) if isinstance(leaf, torch.ScriptObject))
                dist.Work.unbox(handle).wait()
            for old, new in zip(results, tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.detach().copy_(new)


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, device: Any = None):
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        """All has happened already."""
        assert isinstance(other, Stream)
        EVENTS.append("wait")


@contextlib.contextmanager
def use_stream(stream: Stream) -> Iterator[None]:
    """In place of torch.cuda.stream."""
    assert isinstance(stream, Stream)
    EVENTS.append("unrecorded")
    yield


@contextlib.contextmanager
def record(graph: Graph, pool: str, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    """In place of torch.cuda.graph."""
    assert pool == "pool" and isinstance(stream, Stream) and capture_error_mode == "thread_local"
    EVENTS.append("record")
    with Recorder(graph.operations) as recorder:
        yield
    recorder.undo()


def install(patch: pytest.MonkeyPatch) -> list[str]:
    """Put the stand-ins in place; the events, from none on.

    AdamW is the fused one, as on a GPU: the other reads its count of steps. What gloo does while someone
    waits for it belongs to the collective.
    """
    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("Stream", Stream),
        ("stream", use_stream),
        ("graph", record),
        ("graph_pool_handle", lambda: "pool"),
        ("current_stream", Stream),
    ):
        patch.setattr(torch.cuda, name, stand_in)
    adam, wait = torch.optim.AdamW, dist.Work.wait

    def fused_adam(groups: list, fused: bool, **options: Any) -> torch.optim.Optimizer:
        return adam(groups, fused=True, **options)

    def unrecorded_wait(work: dist.Work) -> bool:
        with _disable_current_modes():
            return wait(work)

    patch.setattr(torch.optim, "AdamW", fused_adam)
    patch.setattr(dist.Work, "wait", unrecorded_wait)
    EVENTS.clear()
    return EVENTS
