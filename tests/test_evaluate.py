"""Windows, scores and what they add up to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as t
from conftest import replace


@given(st.integers(2, 500), st.integers(1, 64), st.data())
def test_every_target_is_scored_exactly_once_with_full_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    plan, scored = t.windows(length, context, stride), []
    for start, end, first in plan.tolist():
        assert 0 <= start < first < end <= length and end - 1 - start <= context
        # All but the first window leave at least context - stride tokens before the first target they score.
        assert start == 0 or first - 1 - start == context - stride
        scored += range(first, end)
    assert scored == list(range(1, length))


@pytest.mark.parametrize("tokens, count", [(40_540_160, 633_409), (36_286_464, 566_945), (47_851_520, 747_649)])
def test_window_counts_of_the_published_runs(tokens, count):
    assert len(t.windows(tokens + 1, 2048, 64)) == count


def test_score_units():
    result = t.Score(nats=100 * math.log(2), tokens=50, bytes=200)
    assert result.bpb == pytest.approx(0.5) and result.loss == pytest.approx(2 * math.log(2))


def uniform(size):
    return lambda batch: torch.full(batch.targets.shape, math.log(size))


def ids_as_losses(batch):
    """The loss of a target is its own id: a score then says which targets were counted."""
    return batch.targets.float()


@pytest.mark.parametrize("loader", ["shuffled", "packed"])
@pytest.mark.parametrize("length", [2, 31, 32, 33, 34, 500, 1025])
def test_scores_cover_the_tail_and_count_each_byte_once(config, loader, length):
    changed = replace(config, loader=loader, val_batch_tokens=8 * 4 * 32)
    run, random = t.Run(changed), np.random.default_rng(0)
    validation = t.Validation(random.integers(0, 300, length).astype("<u2"), random.integers(0, 9, length), "test")
    for stride in (32, 8, 5):
        result = t.score(run, ids_as_losses, validation, stride, "test")
        assert result.nats == validation.tokens[1:].sum() and result.tokens == length - 1
        assert result.bytes == validation.bytes[1:].sum()


def test_a_uniform_model_has_the_entropy_of_the_vocabulary(config):
    validation = t.load_validation(t.Dataset(config))
    result = t.score(t.Run(config), uniform(config.vocab_size), validation, 32, "test")
    expected = math.log2(config.vocab_size) * (len(validation.tokens) - 1) / validation.bytes[1:].sum()
    assert result.bpb == pytest.approx(expected)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_windows(config, world):
    validation, parts = t.load_validation(t.Dataset(config)), []
    whole = t.score(t.Run(config), ids_as_losses, validation, 8, "test")
    for rank in range(world):
        run = t.Run(config)
        run.rank, run.world = rank, world
        run.sum = lambda sums: (parts.append(sums.clone()), torch.tensor(whole))[
            1
        ]  # only the last check sees the total
        t.score(run, ids_as_losses, validation, 8, "test")
    assert sum(parts).tolist() == list(whole)


def test_a_score_that_misses_a_token_is_not_reported(config, monkeypatch):
    validation, real = t.load_validation(t.Dataset(config)), t.windows
    monkeypatch.setattr(t, "windows", lambda *arguments: real(*arguments)[:-1])
    with pytest.raises(t.Stop, match="no score is reported"):
        t.score(t.Run(config), ids_as_losses, validation, 8, "test")


@pytest.mark.parametrize("loader", ["shuffled", "packed"])
def test_sliding_scores_equal_those_of_single_windows(config, loader):
    changed = replace(config, loader=loader)
    torch.manual_seed(0)
    model = t.GPT(changed)
    model.qo.data += 0.2 * torch.randn_like(model.qo)
    model.down.data += 0.2 * torch.randn_like(model.down)
    whole = t.load_validation(t.Dataset(changed))
    validation = t.Validation(whole.tokens[:300], whole.bytes[:300], "test")
    nats = 0.0
    for start, end, first in t.windows(300, 32, 8).tolist():
        ids = torch.from_numpy(validation.tokens[start:end].astype(np.int64))[None]
        batch = t.Batch(ids[:, :-1], ids[:, 1:])
        if loader == "packed":
            batch = batch._replace(starts=t.segment_starts(ids[0, :-1].numpy(), 32), longest=32)
        with torch.no_grad():
            nats += model(batch)[0, first - 1 - start :].double().sum().item()
    result = t.score(t.Run(changed), model, validation, 8, "test")
    assert result.nats == pytest.approx(nats, rel=1e-5)


def test_changing_the_future_changes_no_score_before_it(config):
    """Causality of the whole evaluation: bit-identical losses up to the changed token, for both kinds of attention."""
    for loader in ("shuffled", "packed"):
        changed = replace(config, loader=loader)
        torch.manual_seed(0)
        model = t.GPT(changed)
        model.qo.data += 0.2 * torch.randn_like(model.qo)
        whole, seen = t.load_validation(t.Dataset(changed)), []

        def record(batch, model=model, seen=seen):
            losses = model(batch)
            seen.append(losses.clone())
            return losses

        for place in (None, 100, 250):
            tokens = whole.tokens[:300].copy()
            if place is not None:
                tokens[place:] = np.random.default_rng(place).integers(4, changed.vocab_size, 300 - place)
            seen.clear()
            t.score(t.Run(changed), record, t.Validation(tokens, whole.bytes[:300], "test"), 32, "test")
            flat = torch.cat([losses.flatten() for losses in seen])[:299]
            if place is None:
                before = flat
            else:
                assert torch.equal(before[: place - 1], flat[: place - 1]) and not torch.equal(before, flat)
