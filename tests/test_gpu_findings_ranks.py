"""What several ranks must do alike, what no rank may wait for, and numbers that bf16 must not bend."""

from __future__ import annotations

import ast
import functools
import json
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import train_gpt as t
from helpers import ROOT
from helpers.tensors import tokens
from helpers.trainer import environment, launch, replace

# A run that writes every collective of a rank as (name, shape, dtype) to FOLDER/RANK.json.
RECORDER = """
import json, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, train_gpt as t
from helpers.shared import share_short_form

share_short_form()
record = []

def recorded(name, call):
    def wrapped(*arguments, **options):
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        record.append([name, *((str(one.dtype), list(one.shape)) for one in tensors)])
        return call(*arguments, **options)
    return wrapped

for name in ("all_reduce", "broadcast_object_list"):
    setattr(t.dist, name, recorded(name, getattr(t.dist, name)))
for name in ("reduce_scatter", "all_gather"):
    setattr(t, name, recorded(name, getattr(t, name)))

def save():
    with open(f"{folder}/{{os.environ['RANK']}}.json", "w") as file:
        json.dump(record, file)

close = t.Run.close

def last(run):
    save()
    close(run)

t.Run.close = last
t.main(t.Config.from_env(os.environ))
"""
BF16 = {
    "COMPUTE_DTYPE": "bfloat16",
    "ITERATIONS": "3",
    "CHECKPOINT_EVERY": "2",
    "NUM_LAYERS": "3",
    "QUANTIZER": "sdclip",  # without the coder, whose compiled code takes new processes long to load
    "EVAL_PREQUANT": "0",
}


def test_training_calibration_and_evaluation_have_one_order_of_collectives(settings, tmp_path):
    """The order of a set of dtypes follows their addresses, which differ from process to process."""
    script = tmp_path / "script.py"
    script.write_text(RECORDER.format(root=str(ROOT), folder=str(tmp_path)))
    done = launch(settings | BF16 | {"PYTHONHASHSEED": "random"}, 4, script, fresh=True)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert all(rank == ranks[0] for rank in ranks)
    names = {name for name, *_ in ranks[0]}
    assert names == {"all_reduce", "reduce_scatter", "all_gather", "broadcast_object_list"}
    kinds = {(name, facts[0][0]) for name, *facts in ranks[0] if facts}
    assert {("all_reduce", "torch.bfloat16"), ("all_reduce", "torch.float32")} <= kinds
    summary = next(Path(settings["OUT_DIR"]).glob("*/summary.json"))
    assert json.loads(summary.read_text())["world_size"] == 4


# Several trainings in bf16, one after the other; each rank writes its collectives and its weights.
STEPS = """
import json, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, train_gpt as t
from helpers.tensors import tokens
config = t.Config.from_env(os.environ)
run = t.Run(config)
found = []
for name in ("all_reduce", "reduce_scatter", "all_gather"):
    def recorded(*arguments, name=name, call=getattr(t.dist if name == "all_reduce" else t, name), **options):
        found.append([name, *(str(one.dtype) for one in arguments if isinstance(one, torch.Tensor))])
        return call(*arguments, **options)
    setattr(t.dist if name == "all_reduce" else t, name, recorded)
for attempt in range(3):
    torch.manual_seed(attempt)
    model = t.GPT(config, dtype=run.dtype)
    optimizers = t.Optimizers(run, model, compiled=False)
    for step in range(2):
        batches = [tokens(config, rows=1, seed=8 * step + stream) for stream in run.streams]
        found.append(run.sum_over_ranks(t.train_step(run, model, optimizers, batches, 0.5, step)).item())
    found.append([weight.double().sum().item() for weight in model.parameters()])
with open(f"{folder}/{{run.rank}}.json", "w") as file:
    json.dump(found, file)
run.close()
"""


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_in_bf16_take_the_same_steps_several_times_over(settings, tmp_path, world):
    script = tmp_path / "script.py"
    script.write_text(STEPS.format(root=str(ROOT), folder=str(tmp_path)))
    done = launch(
        settings | {"COMPUTE_DTYPE": "bfloat16", "NUM_LAYERS": "2", "NUM_LOOPS": "0"}, world, script
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(rank == ranks[0] for rank in ranks)
    losses = [one for one in ranks[0] if isinstance(one, float)]
    assert len(losses) == 6 and np.isfinite(losses).all()
    kinds = {tuple(one) for one in ranks[0] if isinstance(one, list) and isinstance(one[0], str)}
    assert {("all_reduce", "torch.bfloat16"), ("all_reduce", "torch.float32")} <= kinds


REDUCTIONS = ("all", "any", "len", "max", "min", "set", "sorted", "sum")  # the same in any order
ORDERED = ("list", "tuple", "enumerate", "zip", "map", "iter", "fromkeys")


def called(node: ast.AST) -> str:
    """The last word of what a node calls; empty if it is no call."""
    function = getattr(node, "func", None)
    return getattr(function, "id", getattr(function, "attr", ""))


def is_set(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression is a set for all to see; `names` are variables that are."""
    if isinstance(node, ast.BinOp):
        return any(is_set(side, names) or called(side) == "keys" for side in (node.left, node.right))
    if isinstance(node, ast.IfExp):
        return is_set(node.body, names) or is_set(node.orelse, names)
    if isinstance(node, ast.Name):
        return node.id in names
    return isinstance(node, ast.Set | ast.SetComp) or called(node) in ("set", "frozenset")


def in_the_order_of_a_set(tree: ast.AST) -> list[str]:
    """Where a program goes through a set in the order of its hashes: they differ between processes."""
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        nodes = list(ast.walk(function))
        names = set()
        for node in nodes:
            if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Subscript):
                names |= {node.arg} if getattr(node.annotation.value, "id", "") == "set" else set()
            elif isinstance(node, ast.Assign) and is_set(node.value, names):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        exempt = {id(part) for node in nodes if called(node) in REDUCTIONS for part in node.args}
        for node in nodes:
            walked = []
            if isinstance(node, ast.For | ast.Starred):
                walked = [node.iter if isinstance(node, ast.For) else node.value]
            elif isinstance(node, ast.ListComp | ast.DictComp | ast.GeneratorExp) and id(node) not in exempt:
                walked = [part.iter for part in node.generators]
            elif called(node) in ORDERED:
                walked = node.args
            found += [f"{function.name}: {ast.unparse(one)}" for one in walked if is_set(one, names)]
    return found


def test_nothing_is_done_in_the_order_of_a_set():
    """Two ranks agree on that of dtypes in 59 % of the cases, eight in 6 %; of words, hardly ever."""
    before = (
        "def f(ps, n):\n    for dtype in {p.dtype for p in ps} if n > 1 else ():\n        reduce(dtype)\n"
    )
    hidden = "def f(a, b):\n    kinds = set(a)\n    return [x for x in kinds] + list(a.keys() - b)\n"
    harmless = "def f(a: set[int]):\n    return sorted(a), any(x for x in a), 3 in a\n"
    assert [len(in_the_order_of_a_set(ast.parse(text))) for text in (before, hidden, harmless)] == [1, 2, 0]
    assert in_the_order_of_a_set(ast.parse(Path(t.__file__).read_text())) == []


def test_sixteen_ranks_train_and_score_as_one_does(settings):
    tiny = settings | {
        "ITERATIONS": "2",
        "WARMUP_STEPS": "0",
        "GPTQ_RESERVE_SECONDS": "1",
        "NUM_LAYERS": "2",
        "NUM_LOOPS": "0",
        "BIGRAM_ROWS": "60",
        "MUDD_LAST_N": "1",
        "CHECKPOINT_EVERY": "1",
        "GPTQ_CALIBRATION_BATCHES": "16",
        "SLIDING_WINDOW_ENABLED": "0",
        "EVAL_PREQUANT": "0",
    }
    found = []
    for name in ("one", "sixteen"):
        change = tiny | {"RUN_ID": name}
        done = launch(change, 0 if name == "one" else 16)
        assert done.returncode == 0, done.stderr
        folder = Path(settings["OUT_DIR"]) / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train_loss"] for line in lines if "train_loss" in line]
        found.append((losses, json.loads((folder / "summary.json").read_text())))
    (one, alone), (sixteen, shared) = found
    assert len(one) == 2 and sixteen == pytest.approx(one, rel=1e-5)
    assert shared["world_size"] == 16 and shared["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-3)


@pytest.mark.parametrize("loader", ["shuffled", "packed"])
@pytest.mark.parametrize("world", [16, 32])
def test_ranks_beyond_eight_share_the_tokens_of_each_stream(config, monkeypatch, loader, world):
    if loader == "shuffled":
        config = replace(config, train_batch_tokens=8 * 4 * config.train_seq_len)
    config = replace(config, loader=loader)
    run, data = t.Run(config), t.Dataset(config)
    source = t.LOADERS[loader](config, data)
    whole = [source.get(1, stream) for stream in range(t.STREAMS)]
    parts: list[list[t.Batch]] = [[] for _ in range(t.STREAMS)]
    for rank in range(world):
        run.rank, run.world_size = rank, world
        (batch,) = t.Feed(run, source).load(1)
        parts[rank % t.STREAMS].append(batch)
        if batch.starts is not None:
            starts = batch.starts.numpy()
            size = batch.inputs.numel()
            assert starts[0] == 0 and starts[-1] == size and batch.longest == config.train_seq_len
            assert (np.diff(starts) >= 0).all() and np.diff(starts).max() <= batch.longest
    axis = int(loader == "packed")
    for batch, shares in zip(whole, parts, strict=True):
        assert torch.equal(torch.cat([share.inputs for share in shares], axis), batch.inputs)
        assert torch.equal(torch.cat([share.targets for share in shares], axis), batch.targets)
        if axis:  # a document starts where it did, and where a rank's stretch does
            size = shares[0].inputs.numel()
            borders = {
                start + place * size for place, share in enumerate(shares) for start in share.starts.tolist()
            }
            assert borders == set(batch.starts.tolist()) | set(range(0, batch.inputs.numel() + 1, size))


def test_a_rank_without_a_stream_takes_part_in_a_shared_update(config):
    run = t.Run(config)
    torch.manual_seed(0)
    model = t.GPT(config)
    learner = t.Learner(run, model, torch.optim.SGD(model.parameters(), lr=0.1), clip=1.0, batch_seqs=2)
    run.world_size, run.rank, run.streams = 16, 9, range(9, t.STREAMS, 16)
    summed = []
    run.sum_over_ranks = summed.append
    plan = np.array([[0, 33, 1], [32, 65, 33]])
    learner.learn_rows(np.arange(65) % config.vocab_size, plan)
    assert len(summed) == len(learner.parameters) and not any(gradient.any() for gradient in summed)


def test_a_batch_that_more_ranks_cannot_share_equally_is_refused(config):
    with pytest.raises(t.Stop, match="TRAIN_BATCH_TOKENS=512: must be a multiple of 1024 for WORLD_SIZE=32"):
        t.check_batch_share(config, 32)
    t.check_batch_share(config, 16)


# The first of two ranks on this machine.
TWO = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    "launcher, words",
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be 1, 2, 4, 8 or a multiple of 8"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2: not a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: not a number"),
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE=3: must be"),
        ({"WORLD_SIZE": "12"}, "WORLD_SIZE=12: must be"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
        (TWO | {"RANK": "2"}, "RANK=2"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK=x: not a number"),
        (TWO | {"MASTER_ADDR": ""}, "WORLD_SIZE=2 without MASTER_ADDR"),
        (TWO | {"MASTER_PORT": "abc"}, "MASTER_PORT=abc: not a port"),
        (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536: not a port"),
    ],
)
def test_launcher_variables_that_cannot_be_true_are_one_line(launcher, words):
    with pytest.raises(t.Stop) as stop:
        t.find_place(launcher)
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_a_wrong_world_size_stops_the_program_before_torch_is_loaded(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is loaded')\n")
    changes = {"WORLD_SIZE": "0", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    done = subprocess.run(command, env=environment(changes), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("WORLD_SIZE=0") and done.stderr.count("\n") == 1


def start_as(monkeypatch, place: dict[str, str]) -> None:
    """Be the process that a launcher has told this `place`."""
    for name, value in place.items():
        monkeypatch.setenv(name, value)


def test_ranks_that_cannot_meet_are_one_line(config, monkeypatch):
    """Here another program listens at their port."""
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        start_as(monkeypatch, TWO | {"MASTER_PORT": port})
        with pytest.raises(t.Stop) as stop:
            t.Run(config)
    said = str(stop.value)
    assert said.startswith(
        f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank 0 of 2 does not meet the others ("
    )
    assert "a port that is free" in said and "\n" not in said

    def unknown(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    start_as(monkeypatch, {"MASTER_ADDR": "node-0"})
    with pytest.raises(t.Stop, match="^MASTER_ADDR=node-0 .*Name or service not known.*; start all at once"):
        t.Run(config)


def test_a_gpu_that_is_missing_or_cannot_be_used_is_one_line(config, monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(t.Stop) as stop:
        t.Run(config)
    said = str(stop.value)
    assert said.startswith("cuda:0: cannot be used (RuntimeError: CUDA error: ") and "\n" not in said
    start_as(monkeypatch, TWO | {"RANK": "1", "LOCAL_RANK": "1"})
    with pytest.raises(t.Stop, match="LOCAL_RANK=1: this machine shows 1 GPUs"):
        t.Run(config)


def test_too_little_memory_is_one_line_whatever_needs_it(settings, monkeypatch):
    def build(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nSee documentation")

    monkeypatch.setattr(t, "build", build)
    done = launch(settings)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB.; lower TRAIN"
    )
    monkeypatch.setattr(t, "inspect_machine", lambda run, whole: 1e15)  # it takes a second
    with pytest.raises(t.Stop, match="OutOfMemoryError: CUDA out of memory"):
        t.report_machine(t.Config.from_env(settings))


def nearest_quintic(low: float, high: float) -> np.ndarray:
    """(a, b, c) of the odd quintic with the least largest distance to 1 on [low, high], by Remez exchange."""
    points = np.linspace(low, high, 4)
    for _ in range(100):
        powers = points[:, None] ** np.array([1, 3, 5])
        system = np.concatenate([powers, [[1], [-1], [1], [-1]]], 1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        # The error is largest at both ends and where the derivative a + 3bx^2 + 5cx^4 is zero.
        points[1:3] = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
    return np.array([a, b, c])


def test_polar_express_coefficients_are_those_of_the_published_method():
    """arXiv:2505.16932: the nearest quintic to 1 on what the iterations before leave of [1e-3, 1].

    An interval starts at 2 % of its end at least (the quintic is then scaled until its values at the true
    ends lie evenly about 1), and all but the last row are shrunk by 2 % against rounding.
    """
    low, high = 1e-3, 1.0
    rows = t.NEWTON_SCHULZ["polar_express"]
    powers = np.array([1, 3, 5])
    for place, row in enumerate(rows):
        quintic = nearest_quintic(max(low, 0.02 * high), high)
        if low < 0.02 * high:
            quintic *= 2 / sum(quintic @ end**powers for end in (low, high))
        if place + 1 < len(rows):
            quintic /= 1.02**powers
        assert row == pytest.approx(quintic, rel=1e-12)
        low = float(quintic @ low**powers)
        high = 2 - low


def test_momentum_in_bf16_is_that_of_fp32():
    """0.97 in bf16 is 0.96875, which makes the buffer of 200 independent gradients 2 % smaller."""
    source = torch.Generator().manual_seed(0)
    buffers = {dtype: torch.zeros(4, 64, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    published = torch.zeros(4, 64, 64, dtype=torch.bfloat16)
    for _ in range(200):
        gradient = torch.randn(4, 64, 64, generator=source).bfloat16()
        for dtype, buffer in buffers.items():
            t.muon_update(gradient.to(dtype), buffer, torch.tensor(0.97), True, dtype, ())
        published.mul_(0.97).add_(gradient)  # a number of the host acts exactly
    assert torch.equal(buffers[torch.bfloat16], published)
    size = buffers[torch.bfloat16].float().norm() / buffers[torch.float32].norm()
    assert size.item() == pytest.approx(1.0, abs=0.002)


def test_a_few_steps_of_muon_in_bf16_follow_those_in_fp32(config):
    config = replace(config, grad_clip_norm=0.0)
    momenta = []
    for dtype in ("float32", "bfloat16"):
        run = t.Run(replace(config, compute_dtype=dtype))
        torch.manual_seed(0)
        model = t.GPT(config)
        optimizers = t.Optimizers(run, model, compiled=False)
        source = torch.Generator().manual_seed(1)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=source).bfloat16().float()
            optimizers.step(1.0, 0.97, 0.0)
        assert torch.equal(optimizers.muon.momentum, torch.tensor(0.97)), "rounded on its way to the step"
        momenta.append(optimizers.muon.momenta)
    for name, exact in momenta[0].items():
        error = momenta[1][name].float() - exact
        assert error.norm() < 0.004 * exact.norm(), name


class HostTensors(TorchFunctionMode):
    """Notes where the trainer makes a host wait for its GPU: tensors of numbers, numbers of tensors."""

    WAITS = (torch.tensor, torch.as_tensor, torch.Tensor.tolist, torch.Tensor.nonzero, torch.Tensor.cpu)

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        caller = sys._getframe(1).f_code.co_filename
        if function in self.WAITS and caller in (t.__file__, __file__):
            self.seen.append(function.__name__)
        return function(*arguments, **(options or {}))


def test_a_training_step_makes_no_tensor_of_a_host_number(config):
    run = t.Run(config)
    torch.manual_seed(0)
    model = t.GPT(config)
    optimizers = t.Optimizers(run, model, compiled=False)
    with HostTensors() as mode:
        t.train_step(run, model, optimizers, [tokens(config)], 0.5, 3)
    assert mode.seen == []
    with HostTensors() as mode:
        torch.tensor(1.0).tolist()
    assert mode.seen == ["tensor", "tolist"]


class Pretend:
    """A GPU's queue: an event is over once `queue` has been worked off up to it."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0  # of the host's clock
        self.ends: list[float] = []  # of the steps queued
        monkeypatch.setattr(torch.cuda, "Event", functools.partial(PretendEvent, self))
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))

    def queue(self, seconds: float) -> None:
        """Queue a step; the host goes on at once."""
        self.ends.append(max(self.seconds, self.ends[-1] if self.ends else 0.0) + seconds)


class PretendEvent:
    def __init__(self, gpu: Pretend):
        self.gpu = gpu

    def record(self) -> None:
        self.end = self.gpu.ends[-1]

    def synchronize(self) -> None:
        self.gpu.seconds = max(self.gpu.seconds, self.end)


def test_training_on_a_gpu_ends_a_step_late_at_most_and_does_not_wait_for_the_last_one(monkeypatch):
    gpu = Pretend(monkeypatch)
    run = types.SimpleNamespace(
        is_cuda=True, max_over_ranks=lambda *values: [float(value) for value in values]
    )
    agreement, budget, step, elapsed = t.Agreement(run), 10.0, 0.9, 0.0
    while elapsed < budget:
        gpu.queue(step)
        elapsed, not_finite = agreement.reach(lambda: gpu.seconds, torch.tensor(1.0), late=True)
        assert not not_finite
        if len(gpu.ends) > 1:
            assert gpu.seconds == gpu.ends[-2]  # the step just queued is still running
    # The step during which the budget ran out, and the one queued meanwhile.
    assert gpu.ends[-3] < budget <= gpu.ends[-2] and gpu.ends[-1] < budget + 2 * step
    gpu.queue(step)
    elapsed, not_finite = agreement.reach(lambda: gpu.seconds, torch.tensor(float("nan")), late=False)
    assert not_finite and elapsed == gpu.ends[-1]


def test_on_a_cpu_time_and_loss_are_those_of_the_step(config):
    agreement = t.Agreement(t.Run(config))
    assert agreement.reach(lambda: 7.5, torch.tensor(1.0), late=True) == (7.5, False)
    assert agreement.reach(lambda: 8.5, torch.tensor(float("inf")), late=True) == (8.5, True)


def test_hosts_wait_for_rank_0_through_gloo_and_longer_than_nccl_would(config, monkeypatch):
    """What rank 0 does alone may take longer than NCCL waits: no GPU group has a part in it."""
    run = t.Run(config)
    run.world_size, run.rank, run.is_main, run.host_group = 2, 1, False, "hosts"
    groups = []

    def broadcast(outcome, group=None, device=None):
        groups.append((group, device))
        outcome[1] = "value"

    monkeypatch.setattr(t.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(
        t.dist, "all_reduce", lambda tensor, op, group=None: groups.append((group, tensor.device.type))
    )
    assert run.on_main_rank(lambda: None) == "value"
    run.max_over_ranks(1.0)
    assert groups == [("hosts", None), ("hosts", "cpu")]
    assert t.HOST_PATIENCE.total_seconds() > 3600


def training(config, tmp_path) -> t.Training:
    """A training run before its first step."""
    run, data = t.Run(config), t.Dataset(config)
    run.folder = tmp_path
    return t.Training(run, data, t.build(run))


def test_only_rank_0_copies_a_checkpoint_to_the_host(config, tmp_path, monkeypatch):
    state = training(config, tmp_path)
    assert state.checkpoint()["model"].keys() == dict(state.model.named_parameters()).keys()
    state.run.is_main = False
    gathered = []
    monkeypatch.setattr(state.optimizers, "state", lambda: gathered.append(True))
    monkeypatch.setattr(t, "to_cpu", lambda state: pytest.fail("a copy that nobody writes"))
    assert state.checkpoint() is None and gathered == [True]


def test_the_reserve_for_calibration_is_measured_and_kept_by_a_resumed_run(config, tmp_path, monkeypatch):
    calls = []

    def collect(run, model, data, forwards):
        calls.append((forwards, model.looped))
        clock[0] += 0.5 + 2.0 * forwards + 30.0 * (len(calls) == 1)

    clock = [0.0]
    monkeypatch.setattr(t, "collect_moments", collect)
    monkeypatch.setattr(t.Run, "now", lambda run: clock[0])
    config = replace(config, gptq_calibration_batches=10, max_wallclock_seconds=600.0)
    assert t.calibration_forwards(config) == (10, 64)
    state = training(config, tmp_path)
    assert calls == [(1, True), (1, True), (3, True)] and state.model.looped is False
    assert state.reserve == pytest.approx(1.3 * (0.5 + 10 * 2.0) + 1)
    assert state.budget == pytest.approx(600 - state.reserve)

    saved = t.to_cpu(state.checkpoint())
    clock[0] = 0.0
    again = training(config, tmp_path)
    again.reserve = 1.0
    again.resume(saved)
    assert again.budget == state.budget

    fixed = training(replace(config, gptq_reserve_seconds=0.0), tmp_path)
    assert fixed.reserve == 0.0
    poor = training(replace(config, max_wallclock_seconds=5.0), tmp_path)
    with pytest.raises(t.Stop, match="MAX_WALLCLOCK_SECONDS=5: calibration alone would take"):
        poor.start_clock(t.Dataset(config))


def test_the_log_says_where_the_reserve_comes_from(settings):
    measured = launch(settings | {"STAGE": "train", "ITERATIONS": "1", "RUN_ID": "a"})
    given = launch(
        settings | {"STAGE": "train", "ITERATIONS": "1", "RUN_ID": "b", "GPTQ_RESERVE_SECONDS": "4"}
    )
    assert "are kept for it (measured)" in measured.stdout
    assert "calibration: 4.0s of the 600s are kept for it (GPTQ_RESERVE_SECONDS)" in given.stdout


def test_queries_keys_and_values_share_the_moment_of_their_input(config, monkeypatch):
    run, data = t.Run(config), t.Dataset(config)
    torch.manual_seed(0)
    model = t.GPT(config)
    found = t.collect_moments(run, model, data)
    monkeypatch.setattr(t, "SAME_INPUT", {})
    apart = t.collect_moments(run, model, data)
    assert found.keys() == apart.keys()
    for key, pair in apart.items():
        assert all(torch.equal(one, other) for one, other in zip(found[key], pair, strict=True)), key
    for layer in range(config.num_layers):
        assert found["q", layer][0] is found["k", layer][0] is found["v", layer][0]


def test_an_fp32_embedding_keeps_small_updates_that_bf16_loses(config):
    config = replace(config, compute_dtype="bfloat16")
    moved, losses = {}, {}
    for master in (False, True):
        torch.manual_seed(0)
        model = t.GPT(replace(config, embed_master_fp32=master), dtype=torch.bfloat16)
        assert model.embed.dtype == (torch.float32 if master else torch.bfloat16)
        model.embed.data.copy_(model.embed.data.bfloat16())
        losses[master] = model(tokens(config))
        before = model.embed.detach().float().clone()
        for _ in range(30):
            model.embed.data.add_(before.to(model.embed.dtype), alpha=1e-3)  # a quarter of an ulp
        moved[master] = ((model.embed.detach().float() - before).norm() / (0.03 * before.norm())).item()
    assert torch.equal(losses[True], losses[False])  # the same function of the same weights
    assert moved[True] == pytest.approx(1.0, abs=1e-3) and moved[False] < 0.5
    losses[True].mean().backward()
    assert model.embed.grad.dtype == torch.float32
    assert not t.Config().embed_master_fp32
