"""CUDA_GRAPHS=1: a whole step by replay; a stand-in records and repeats operations of the CPU."""

from __future__ import annotations

import json

import pytest
import torch

import train_gpt as t
from helpers import ROOT, cuda_graphs
from helpers.trainer import launch, replace


@pytest.fixture
def config(config: t.Config) -> t.Config:
    """That of a run that packs."""
    return replace(config, loader="packed")


@pytest.fixture
def gpu(monkeypatch):
    """The stand-ins; the events, from none on."""
    return cuda_graphs.install(monkeypatch)


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


class Steps:
    """A tiny model that packs, with its optimisers and average, by replay or as ever."""

    def __init__(self, run: t.Run, replayed: bool, attend: t.Attend = attend_masked):
        self.run = run
        torch.manual_seed(0)
        self.model = t.GPT(run.config, attend=attend)
        average = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.optimizers = t.Optimizers(self.run, self.model, compiled=False, average=average)
        graphs = t.StepGraphs(self.run, self.model, self.model, self.optimizers) if replayed else None
        self.graphs = graphs

    def __call__(self, batches: list[t.Batch], progress: float, step: int) -> torch.Tensor:
        """The loss of one step."""
        return t.train_step(self.run, self.model, self.optimizers, batches, progress, step, self.graphs)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, average and the optimisers' states."""
        state = self.optimizers.state()
        moments = {
            f"{place}/{name}": one
            for place, each in state["adam"]["state"].items()
            for name, one in each.items()
        }
        average = {f"average/{name}": one for name, one in self.optimizers.average.items()}
        return self.model.state_dict() | average | moments | state["muon"]


def assert_same(one: Steps, other: Steps) -> None:
    """Equal to the bit; no gradient is left."""
    others = other.tensors()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, others[name]), name
    assert all(weight.grad is None for weight in one.model.parameters())


@pytest.mark.parametrize("scope", ["global", "local"])
def test_replayed_steps_follow_batches_rates_and_weights_of_now(gpu, config, scope):
    changing = replace(
        config, warmdown_frac=0.9, wd_taper_start_frac=0.1, grad_clip_norm=0.1, grad_clip_scope=scope
    )
    plain, replayed = (Steps(t.Run(changing), replayed) for replayed in (False, True))
    losses = []
    for step in range(3):
        batches = [
            packed(config, 10 * step),
            packed(config, 10 * step + 1),
            packed(config, 10 * step + 2, 96),
        ]
        wanted = plain(batches, 0.3 * step, step)
        losses.append((wanted, replayed(batches, 0.3 * step, step)))
        for batch in batches:
            batch.inputs.fill_(-1)  # whoever reads it again fails
    assert all(torch.equal(*pair) for pair in losses)  # at the end: no later step has changed one
    assert_same(plain, replayed)
    # Two shapes and the update, each run once and recorded; then two of the first shape count as one.
    assert gpu.count("unrecorded") == gpu.count("record") == 3
    assert gpu.count("replay") == 1 + 2 * 4 and gpu[:4] == ["wait", "unrecorded", "wait", "record"]


def test_each_loop_state_shape_and_phase_has_its_graph_once(gpu, config):
    levers = replace(config, muon_mixture="0.9:0.5,0.99:0.5", muon_mixture_start=0.5)
    plain, replayed = (Steps(t.Run(levers), replayed) for replayed in (False, True))
    cases = [(False, 64, 0.0), (True, 64, 0.2), (False, 64, 0.4), (True, 96, 0.6), (True, 64, 0.7)]
    for step, (looped, total, progress) in enumerate(cases):
        plain.model.looped = replayed.model.looped = looped
        batches = [packed(config, step, total)]
        assert torch.equal(plain(batches, progress, step), replayed(batches, progress, step))
    assert_same(plain, replayed)
    assert len(replayed.graphs.batches) == 3 and len(replayed.graphs.graphs) == 3 + 2
    assert gpu.count("record") == 5 and gpu.count("replay") == 10 - 5


def test_what_waits_for_the_gpu_cannot_be_recorded(gpu, config):
    steps = Steps(t.Run(config), replayed=True, attend=t.attend_sdpa)  # it asks where segments end
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        steps([packed(config, 0)], 0.0, 0)


def test_states_of_before_are_copied_into_the_tensors_that_replays_move(gpu, config):
    plain, replayed = (Steps(t.Run(config), replayed) for replayed in (False, True))
    batches = [packed(config, 0)]
    saved = []
    for steps in (plain, replayed):
        steps(batches, 0.0, 0)
        saved.append(t.to_cpu((steps.model.state_dict(), steps.optimizers.state())))
        steps(batches, 0.1, 1)
    for steps, (weights, state) in zip((plain, replayed), saved, strict=True):
        steps.model.load_state_dict(weights)
        steps.optimizers.load(state)
        steps.optimizers.restart_average()
        steps([packed(config, 1)], 0.2, 2)
    assert_same(plain, replayed)
    assert gpu.count("record") == 2 and gpu.count("replay") == 4


class Killed(Exception):
    """The end of a run that comes too early."""


def trained(config: t.Config, folder, graphs: bool, killed_at: int = -1):
    """(losses by step, averaged weights) of a training; with `killed_at` it stops there and is resumed."""
    run, data = t.Run(replace(config, cuda_graphs=graphs)), t.Dataset(config)
    run.folder = run.open(folder)
    built = t.build(run)
    take_step = t.Training.take_step

    def killed(training: t.Training) -> None:
        if training.step == killed_at:
            raise Killed
        take_step(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Training, "take_step", killed)
        if killed_at >= 0:
            with pytest.raises(Killed):
                t.train(run, data, built)
            built = t.build(run)
    t.train(run, data, built)
    run.close()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["train_loss"] for record in records if "train_loss" in record}
    return losses, torch.load(folder / "checkpoint.pt", weights_only=True)["average"]


def test_a_resumed_training_through_all_stages_is_the_same(gpu, config, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(t, "pick_attention", lambda config, run: attend_masked)
    monkeypatch.setattr(t, "check_cuda_graphs", lambda config, run, compiled: None)  # there is no GPU
    config = replace(
        config,
        train_batch_tokens=256,
        micro_batch_tokens=128,
        iterations=6,
        train_log_every=1,
        train_seq_schedule="16@0.6",
        num_loops=2,
        muon_mixture="0.85:0.4,0.98:0.6",
        muon_mixture_start=0.3,
        gptq_reserve_seconds=1.0,
    )
    losses, weights = trained(config, tmp_path / "plain", graphs=False)
    capfd.readouterr()
    replayed, others = trained(config, tmp_path / "replayed", graphs=True, killed_at=4)
    assert len(losses) == config.iterations and replayed == losses
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    # Short segments without loops, then with them, then long ones; and two phases of Muon.
    said = [line for line in capfd.readouterr().out.splitlines() if "cuda graphs:" in line]
    assert len(said) == 1 and said[0].endswith("cuda graphs: 5 recorded before the clock, 0 inside it")
    assert "warning" not in said[0]


def test_the_turning_points_of_a_training_are_those_that_compile_something_else():
    config = t.Config(enable_looping_at=0.35)
    assert [t.turning_points(config, loops) for loops in (0, 2)] == [[0.0], [0.35]]
    levers = {"muon_mixture": "0.9:1", "muon_mixture_start": 0.5}
    config = replace(config, train_seq_schedule="512@0.1,1024@0.5", **levers)
    assert [t.turning_points(config, loops) for loops in (0, 2)] == [[0.0, 0.1], [0.35, 0.5]]
    assert t.turning_points(replace(config, num_loops=0), 0) == [0.0, 0.1, 0.5]


TWO_RANKS = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import pytest, torch, train_gpt as t
from helpers import cuda_graphs
from test_gpu_findings_graphs import Steps, assert_same, packed
config = t.Config.from_env(os.environ)
with pytest.MonkeyPatch.context() as patch:
    events = cuda_graphs.install(patch)
    run = t.Run(config)
    plain, replayed = Steps(run, False), Steps(run, True)
    for step in range(3):
        batches = [packed(config, 10 * step + run.rank)]
        assert torch.equal(plain(batches, 0.3 * step, step), replayed(batches, 0.3 * step, step))
    assert_same(plain, replayed)
assert events.count("record") == 2 and events.count("replay") == 4
"""


def test_collectives_of_two_ranks_are_replayed_with_the_update(settings, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT)))
    done = launch(settings | {"LOADER": "packed"}, 2, script)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_or_compilation_it_is_refused_in_one_line(config, settings):
    done = launch(settings | {"CUDA_GRAPHS": "1"})
    assert done.returncode == 1 and done.stderr == "CUDA_GRAPHS=1: there is no GPU; unset CUDA_GRAPHS\n"
    run = t.Run(config)
    run.is_cuda = True
    with pytest.raises(t.Stop, match=r"^CUDA_GRAPHS=1: the forward is not compiled.*set COMPILE=on or unset"):
        t.check_cuda_graphs(replace(config, cuda_graphs=True), run, compiled=False)
    assert not t.Config().cuda_graphs
