"""Tuning after rounding: what it trains, that it pays for itself, and that ranks change nothing."""

from __future__ import annotations

import math

import pytest
import torch

import train_gpt as t
from helpers.tensors import perturbed
from helpers.trainer import replace, tiny_settings

STEPS = 12


@pytest.fixture(scope="module")
def shared(dataset, tmp_path_factory):
    """(config, weights, tensors, goal, moments): a perturbed model, rounded to 2.5 bits a weight."""
    config = t.Config.from_env(tiny_settings(dataset, tmp_path_factory.mktemp("runs")))
    config = replace(config, tune_steps=STEPS, tune_tokens=512, tune_lr=0.02, compressor="lzma")
    run = t.Run(config)
    torch.manual_seed(0)
    model = perturbed(t.GPT(config), 0.1)
    model.looped = True
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = t.collect_moments(run, model, t.Dataset(config))
    goal = int(2.5 / 8 * sum(weight.numel() for weight in weights.values()))
    return config, weights, t.quantize(run, model.table, weights, goal, True, moments), goal, moments


@pytest.fixture
def rounded(shared):
    """(run, model, data, weights, tensors, goal, moments), to be changed."""
    config, weights, tensors, goal, moments = shared
    model = t.GPT(config)
    model.looped = True
    return t.Run(config), model, t.Dataset(config), weights, dict(tensors), goal, moments


def divergence(model, data, before, after):
    """KL in nats per token between two sets of weights on tokens that tuning does not read."""
    teacher = t.GPT(model.config)
    teacher.looped = True
    teacher.load_state_dict(before)
    model.load_state_dict(after)
    loader = t.ShuffledLoader(model.config, data)
    with torch.no_grad():
        losses = [t.tuning_loss(teacher, model, loader.get(30, stream), 0.0) for stream in range(8)]
    return float(torch.stack(losses).mean())


def test_tuning_changes_no_integer_and_lowers_the_divergence_for_no_byte(rounded):
    run, model, data, weights, tensors, goal, moments = rounded
    kept = dict(tensors)
    table = model.table
    before = divergence(model, data, weights, t.assemble_weights(table, tensors))
    facts = t.tune(run, model, data, weights, tensors, moments, goal)
    assert divergence(model, data, weights, t.assemble_weights(table, tensors)) < 0.9 * before
    assert facts["tune_loss_after"] < 0.9 * facts["tune_loss_before"]
    for name, tensor in tensors.items():
        if tensor.scales is None:
            assert tensor.values.dtype == torch.float16
        else:
            assert tensor is kept[name]
    assert any(not torch.equal(tensors[name].values, kept[name].values) for name in tensors)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    # Room was kept for values that do not compress.
    noise = {
        name: t.Quantized(torch.randint(0, 30_000, tensor.values.shape, dtype=torch.int16).view(torch.half))
        for name, tensor in tensors.items()
        if tensor.scales is None
    }
    assert len(t.encode_artifact(run.config, tensors | noise, True)) <= goal


def test_matrices_still_to_come_make_up_for_the_errors_of_those_that_are_rounded(rounded):
    run, model, data, weights, tensors, goal, moments = rounded
    kept = dict(tensors)
    run.config = replace(run.config, tune_matrices=True, tune_matrix_lr=0.01, tune_lr=0.0)
    before = divergence(model, data, weights, t.assemble_weights(model.table, tensors))
    t.tune(run, model, data, weights, tensors, moments, goal)
    assert divergence(model, data, weights, t.assemble_weights(model.table, tensors)) < 0.9 * before
    # Room is left for fp16 tensors that do not compress.
    assert 0 <= goal - len(t.encode_artifact(run.config, tensors, True)) < 0.03 * goal
    assert list(tensors) == list(kept)
    first = {m.name for m in t.list_matrices(model.table) if m.parameter in t.ROUNDING_GROUPS[0]}
    matrices = [name for name, tensor in tensors.items() if tensor.scales is not None]
    assert all(torch.equal(tensors[name].scales, kept[name].scales) for name in matrices)
    same = {name for name in matrices if torch.equal(tensors[name].values, kept[name].values)}
    assert first <= same < set(matrices)


def test_every_matrix_is_in_one_group(config):
    grouped = [name for group in t.ROUNDING_GROUPS for name in group]
    assert sorted(grouped) == sorted(t.MATRICES)
    for changes in ({}, {"bigram_rows": 16, "mudd_last_n": 1}):
        table = t.parameter_table(replace(config, **changes))
        held = {matrix.parameter for matrix in t.list_matrices(table)}
        assert sorted(sum(t.rounding_groups(table), ())) == sorted(held)


@pytest.mark.parametrize("world", [2, 4])
def test_a_tuning_step_has_the_same_bits_for_any_number_of_ranks(rounded, world):
    run, model, data, weights, tensors, _goal, _moments = rounded
    tuning = t.Tuning(run, model, data, weights)
    tuning.load(t.spread_weights(run, model, tensors, t.ROUNDING_GROUPS[0]))
    tuning.choose(("qo", "embed"))
    alone = tuning.gradient(3)
    rows = []

    def keep(found):
        rows.append(found.clone())
        return found

    run.sum_over_ranks, run.world_size = keep, world
    for run.rank in range(world):
        tuning.gradient(3)
    assert torch.equal(torch.stack(rows).sum(0).mean(0), alone) and alone.abs().max() > 0
    assert torch.equal(sum(rows).mean(0), alone)


def test_the_training_loss_can_be_a_part_of_what_is_tuned(rounded):
    run, model, data, weights, tensors, _goal, _moments = rounded
    tuning = t.Tuning(run, model, data, weights)
    tuning.load(t.spread_weights(run, model, tensors, model.table))
    batch = t.ShuffledLoader(run.config, data).get(0, 0)
    with torch.no_grad():
        found, plain = (t.tuning_loss(tuning.teacher, tuning.model, batch, share) for share in (0.5, 0.0))
        assert found - plain == pytest.approx(0.5 * float(tuning.model(batch).mean()), rel=1e-4)


def test_a_tuning_that_diverges_is_refused(rounded):
    run, model, data, weights, tensors, goal, moments = rounded
    run.config = replace(run.config, tune_steps=2, tune_lr=1e30)
    with pytest.raises(t.Stop, match="TUNE_LR=1e\\+30: the loss of tuning is not finite; lower it"):
        t.tune(run, model, data, weights, tensors, moments, goal)


@pytest.mark.parametrize("matrices", [False, True])
def test_a_tuning_that_does_not_pay_leaves_the_weights_as_they_were(rounded, matrices, capsys):
    run, model, data, weights, tensors, goal, moments = rounded
    kept = dict(tensors)
    run.config = replace(run.config, tune_steps=3, tune_lr=1.0, tune_matrices=matrices)
    facts = t.tune(run, model, data, weights, tensors, moments, goal)
    assert facts["tune_loss_after"] > facts["tune_loss_before"] > 0
    assert "tuning does not pay: the weights before it are kept; lower TUNE_LR=1.0" in capsys.readouterr().out
    assert list(tensors) == list(kept) and all(tensors[name] is kept[name] for name in kept)


def test_a_loss_that_is_not_a_number_does_not_pay(rounded, monkeypatch):
    run, model, data, weights, tensors, goal, moments = rounded
    kept = dict(tensors)
    losses = iter([0.1, float("nan")])
    monkeypatch.setattr(t.Tuning, "loss", lambda tuning, step: next(losses))
    run.config = replace(run.config, tune_steps=1)
    t.tune(run, model, data, weights, tensors, moments, goal)
    assert all(tensors[name] is kept[name] for name in kept)


def test_the_reserve_holds_rounding_and_tuning_and_leaves_no_trace(config, monkeypatch):
    config = replace(config, tune_steps=1000, tune_tokens=256, gptq_calibration_batches=1)
    run, data = t.Run(config), t.Dataset(config)
    model = t.GPT(config)
    fresh = {name: weight.clone() for name, weight in model.state_dict().items()}
    clock = iter(range(10_000))
    monkeypatch.setattr(run, "now", lambda: float(next(clock)))  # a second between two looks
    reserve = t.measure_reserve(run, model, data)
    assert reserve >= 1.3 * (1000 + 1)  # a second per step
    assert all(torch.equal(weight, fresh[name]) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_step_is_shared_by_eight_ranks_where_it_has_as_many_windows(config, monkeypatch):
    def forwards(tokens):
        return t.tuning_forwards(replace(config, tune_tokens=tokens))

    assert config.train_seq_len == 32
    assert [forwards(64), forwards(512), forwards(1024)] == [(2, 32), (8, 64), (8, 128)]
    monkeypatch.setattr(t, "TUNE_FORWARD", 64)
    assert forwards(1024) == (16, 64)


def test_tuning_takes_whole_windows_where_training_cuts_its_segments(rounded):
    run, model, data, weights, *_rest = rounded
    config = replace(run.config, loader="packed", train_seq_schedule="16@0.5")
    tuning = t.Tuning(t.Run(config), model, data, weights)
    assert tuning.loader.get(0, 0).inputs.size(1) == config.train_seq_len


@pytest.mark.parametrize("tokens", [1, 20, 32, 40])
def test_a_step_of_less_than_a_window_reads_so_many_tokens(rounded, tokens):
    run, model, data, weights, *_rest = rounded
    tuning = t.Tuning(t.Run(replace(run.config, tune_tokens=tokens)), model, data, weights)
    window = min(tokens, 32)
    assert t.tuning_forwards(tuning.config) == (1, window)
    assert tuning.loader.get(0, 0).inputs.shape == (1, window)
    assert math.isfinite(tuning.loss(0))


def test_tuning_has_no_momentum(rounded):
    """A parameter whose gradient has become 0 stays where it is."""
    run, model, data, weights, *_rest = rounded
    tuning = t.Tuning(run, model, data, weights)
    name, parameter = next(iter(tuning.parameters.items()))
    before = parameter.detach().clone()
    tuning.step(0, 1.0)
    moved = parameter.detach().clone()
    tuning.gradient = lambda step: torch.zeros(sum(p.numel() for p in tuning.parameters.values()) + 1)
    tuning.step(1, 1.0)
    assert not torch.equal(before, moved), name
    assert torch.equal(parameter.detach(), moved), name
