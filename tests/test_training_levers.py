"""Levers of training that are off by default: each against a plain form of what it says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import train_gpt as t
from helpers.tensors import tokens
from helpers.trainer import replace

CLASSIC = t.NEWTON_SCHULZ["classic"] * 5


def test_a_mixture_of_momenta_is_each_averages_nesterov_step_in_its_part():
    torch.manual_seed(0)
    gradients = torch.randn(3, 2, 6, 10)
    pairs = [(0.85, 0.4385), (0.98, 0.5615)]
    buffer, averages = torch.zeros(2, 6, 10), [torch.zeros(2, 6, 10) for _ in pairs]
    plain_buffer = buffer.clone()
    expected = [torch.zeros(2, 6, 10) for _ in pairs]
    for step, gradient in enumerate(gradients):
        mixture = [(average, *pair) for average, pair in zip(averages, pairs, strict=True)]
        arguments = (torch.tensor(0.9), True, torch.float32, CLASSIC)
        plain = t.muon_update(gradient, plain_buffer, *arguments)
        result = t.muon_update(gradient, buffer, *arguments, mixture=mixture, mixed=step == 2)
        if step < 2:  # they are only kept up to date
            assert torch.equal(result, plain)
        expected = [d * e + (1 - d) * gradient for e, (d, _) in zip(expected, pairs, strict=True)]
    parts = [w * ((1 - d) * gradient + d * e) for e, (d, w) in zip(expected, pairs, strict=True)]
    update = sum(parts)
    update = update / update.norm(dim=-1, keepdim=True)
    assert torch.allclose(result, t.orthogonalize(update, CLASSIC), atol=1e-5)


def test_the_averages_of_a_mixture_are_saved(config):
    config = replace(config, muon_mixture="0.85:0.4,0.98:0.6")
    run = t.Run(config)
    torch.manual_seed(0)
    model = t.GPT(config)
    optimizers = t.Optimizers(run, model, compiled=False)

    def advance():
        model(tokens(config)).mean().backward()
        optimizers.step(1.0, 0.9, 0.1, progress=0.3)

    advance()
    weights, state = t.to_cpu(model.state_dict()), t.to_cpu(optimizers.state())
    assert "kv/1" in state["muon"]
    advance()
    expected = t.to_cpu(model.state_dict())
    model.load_state_dict(weights)
    optimizers.load(state)
    advance()
    assert all(torch.equal(expected[name], weight) for name, weight in model.state_dict().items())


def test_decay_may_follow_the_rate_and_weights_are_a_blend():
    c = t.Config(warmdown_frac=0.5, min_lr=0.1, muon_wd=0.2, wd_follows_rate=True)
    assert [t.muon_weight_decay(c, f) for f in (0, 0.75, 1.0)] == pytest.approx([0.2, 0.1, 0.02])
    saved = {"average": {"a": torch.tensor([1.0])}, "last": {"a": torch.tensor([2.0])}}
    assert t.blend_average(c, saved) is saved["average"]
    blended = t.blend_average(dataclasses.replace(c, ema_share=0.6), saved)
    assert blended["a"].item() == pytest.approx(1.4)


def test_segments_grow_with_the_schedule():
    c = t.Config(train_seq_len=64, train_seq_schedule="16@0.1,32@0.7")
    assert [t.longest_segment(c, p) for p in (0, 0.1, 0.69, 0.7, 1)] == [16, 32, 32, 64, 64]
    ids = np.full(100, 5)
    ids[[0, 70]] = t.BOS
    inputs = torch.from_numpy(ids[None])
    batch = t.Batch(inputs, inputs, t.segment_starts(ids, 64), 64)
    cut = t.shorten_segments(batch, 32)
    assert torch.equal(cut.starts, t.segment_starts(ids, 32)) and cut.longest == 32
    assert t.attention_pairs(cut) == 32**2 * 2 + 6**2 + 30**2
    assert t.shorten_segments(batch, 64) is batch
    with pytest.raises(t.Stop, match="TRAIN_SEQ_SCHEDULE=16@0.5: needs LOADER=packed"):
        t.Config(train_seq_schedule="16@0.5", loader="shuffled")
    with pytest.raises(t.Stop, match="must be pairs length@progress"):
        t.Config(train_seq_schedule="16@")
    with pytest.raises(t.Stop, match="must be pairs decay:weight"):
        t.Config(muon_mixture="0.9")
