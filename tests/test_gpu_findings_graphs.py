"""CUDA_GRAPHS=1: forward and backward by replay; a stand-in records and repeats operations of the CPU.

What it records it spoils, as a GPU does not run what it records; what would wait for the GPU it refuses.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt as t
from helpers.trainer import launch, replace

WAITS = ("_local_scalar_dense", "nonzero", "_unique2")


def tensors(values) -> list[torch.Tensor]:
    """All tensors in a nest."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Keeps every operation with the tensors that it reads and writes."""

    def __init__(self, operations: list):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.overloadpacket.__name__ in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = operation(*arguments, **(options or {}))
        self.operations.append((operation, arguments, options or {}, result))
        return result


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat what was recorded on the same tensors."""
        EVENTS.append("replay")
        for operation, arguments, options, result in self.operations:
            again = tensors(operation(*arguments, **options))
            for old, new in zip(tensors(result), again, strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.detach().copy_(new)

    def spoil(self) -> None:
        """Make all floating-point results NaN that have memory of their own."""
        read = set()
        for _, arguments, options, result in self.operations:
            read |= {tensor.untyped_storage().data_ptr() for tensor in tensors((arguments, options))}
            for tensor in tensors(result):
                if tensor.untyped_storage().data_ptr() not in read and tensor.is_floating_point():
                    tensor.detach().fill_(float("nan"))


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, device):
        self.device = device

    def wait_stream(self, other) -> None:
        """All has happened already."""
        EVENTS.append("wait")


@contextlib.contextmanager
def use_stream(stream) -> Iterator[None]:
    """In place of torch.cuda.stream."""
    assert isinstance(stream, Stream)
    EVENTS.append("unrecorded")
    yield


@contextlib.contextmanager
def record(graph, pool, stream, capture_error_mode) -> Iterator[None]:
    """In place of torch.cuda.graph."""
    assert pool == "pool" and isinstance(stream, Stream) and capture_error_mode == "thread_local"
    EVENTS.append("record")
    with Recorder(graph.operations):
        yield
    graph.spoil()


EVENTS: list[str] = []


@pytest.fixture
def gpu(monkeypatch):
    """The stand-ins; the events, from none on."""
    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("Stream", Stream),
        ("stream", use_stream),
        ("graph", record),
        ("graph_pool_handle", lambda: "pool"),
        ("current_stream", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    EVENTS.clear()
    return EVENTS


def attend_masked(q, k, v, starts, longest):
    """Attention within segments, by a mask: unlike attend_sdpa it does not ask where they end."""
    copies = q.size(2) // k.size(2)
    heads = [x.transpose(1, 2) for x in (q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2))]
    place = torch.arange(q.size(1))
    segment = torch.bucketize(place, starts, right=True)
    mask = (place[:, None] >= place) & (segment[:, None] == segment)
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


def packed(config: t.Config, seed: int, total: int = 64) -> t.Batch:
    """A packed row of random tokens in random segments."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, config.vocab_size, (1, total + 1), generator=source)
    borders = torch.randint(1, total, (4,), generator=source).unique()
    starts = t.pad_starts(torch.cat([torch.zeros(1, dtype=torch.int64), borders]).numpy(), total)
    return t.Batch(ids[:, :-1], ids[:, 1:], starts, config.train_seq_len)


def learnt(model: t.GPT, batches: list[t.Batch], work) -> tuple[list[float], dict[str, torch.Tensor | None]]:
    """Losses and summed gradients of `batches`, which are freed."""
    parts = [work(batch, len(batches)) for batch in batches]
    losses = [part.item() for part in parts]  # after all of them: a later replay must not change one
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return losses, gradients


def plain(model: t.GPT, batches: list[t.Batch]):
    """The same without graphs."""
    return learnt(model, batches, lambda batch, count: t.learn(model, batch, count))


def assert_same(found, wanted) -> None:
    """Equal losses and gradients, to the bit; no memory in common."""
    assert found[0] == wanted[0]
    for name, gradient in wanted[1].items():
        assert (gradient is None) == (found[1][name] is None), name
        assert gradient is None or torch.equal(found[1][name], gradient), name


@pytest.fixture
def model(config) -> t.GPT:
    """A tiny model that packs."""
    torch.manual_seed(0)
    return t.GPT(replace(config, loader="packed"), attend=attend_masked)


def test_a_replay_reads_the_batch_and_the_weights_of_now(gpu, config, model):
    graphs = t.LearnGraphs(t.Run(config), model, model)
    first, second, third = ([packed(config, seed)] for seed in range(3))
    wanted = plain(model, first)
    assert_same(learnt(model, first, graphs.learn), wanted)
    assert gpu == ["wait", "unrecorded", "record", "replay"]
    first[0].inputs.fill_(-1)  # whoever reads it again fails
    first[0].starts.fill_(-1)
    wanted = plain(model, second)
    found = learnt(model, second, graphs.learn)
    assert_same(found, wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    wanted_later = plain(model, third)
    assert_same(learnt(model, third, graphs.learn), wanted_later)
    assert_same(found, wanted)  # what a replay has given stays
    assert gpu[4:] == ["replay", "replay"]


def test_each_loop_state_and_shape_has_its_graph_once(gpu, config, model):
    graphs = t.LearnGraphs(t.Run(config), model, model)
    cases = [(False, 64), (True, 64), (False, 64), (True, 96), (True, 64)]
    for seed, (looped, total) in enumerate(cases):
        model.looped = looped
        batches = [packed(config, seed, total)]
        assert_same(learnt(model, batches, graphs.learn), plain(model, batches))
    assert gpu.count("record") == len(graphs.graphs) == 3 and gpu.count("replay") == 5


def test_gradients_of_micro_batches_add_up_though_one_is_recorded_among_them(gpu, config, model):
    graphs = t.LearnGraphs(t.Run(config), model, model)
    batches = [packed(config, 0), packed(config, 1), packed(config, 2, 96), packed(config, 3)]
    assert_same(learnt(model, batches, graphs.learn), plain(model, batches))
    assert gpu.count("record") == 2 and gpu.count("replay") == 4


def test_what_waits_for_the_gpu_cannot_be_recorded(gpu, config):
    model = t.GPT(config, attend=t.attend_sdpa)  # it asks where segments end
    graphs = t.LearnGraphs(t.Run(config), model, model)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphs.learn(packed(config, 0), 1)


def test_a_training_has_the_same_losses_and_weights(gpu, config, tmp_path):
    config = replace(config, micro_batch_tokens=128, checkpoint_every=0, train_log_every=1, warmup_steps=1)
    kept = []
    for graphs in (False, True):
        run, data = t.Run(config), t.Dataset(config)
        run.folder = run.open(tmp_path / str(graphs))
        built = t.build(run)
        run.config = replace(config, cuda_graphs=graphs)
        t.train(run, data, built)
        run.close()
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        losses = [record.get("train_loss") for record in map(json.loads, lines) if record["kind"] == "train"]
        kept.append((losses, torch.load(run.folder / "checkpoint.pt", weights_only=True)["average"]))
    (losses, weights), (replayed, others) = kept
    assert len([loss for loss in losses if loss]) == config.iterations and replayed == losses
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    # Two loop states, each recorded in warm-up; 4 micro-batches a step, in warm-up as well.
    assert gpu.count("record") == 2 and gpu.count("replay") == 4 * (config.iterations + 2)


def test_without_a_gpu_or_compilation_it_is_refused_in_one_line(config, settings):
    done = launch(settings | {"CUDA_GRAPHS": "1"})
    assert done.returncode == 1 and done.stderr == "CUDA_GRAPHS=1: there is no GPU; unset CUDA_GRAPHS\n"
    run = t.Run(config)
    run.is_cuda = True
    with pytest.raises(t.Stop, match=r"^CUDA_GRAPHS=1: the forward is not compiled.*set COMPILE=on or unset"):
        t.check_cuda_graphs(replace(config, cuda_graphs=True), run, compiled=False)
    assert not t.Config().cuda_graphs
