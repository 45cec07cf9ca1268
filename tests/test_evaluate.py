"""Windows, scores and what they add up to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as t
from helpers.trainer import replace


@given(st.integers(2, 500), st.integers(1, 64), st.data())
def test_every_target_is_scored_exactly_once_with_full_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    plan, scored = t.plan_windows(length, context, stride), []
    for start, end, first in plan.tolist():
        assert 0 <= start < first < end <= length and end - 1 - start <= context
        # All but the first window leave at least context - stride tokens before the first target they score.
        assert start == 0 or first - 1 - start == context - stride
        scored += range(first, end)
    assert scored == list(range(1, length))


@given(st.integers(2, 500), st.integers(1, 64), st.data())
def test_chunks_of_a_document_end_their_window(length, context, data):
    chunk, scored = data.draw(st.integers(1, context)), []
    for start, end, first in t.plan_chunks(length, context, chunk).tolist():
        assert 0 <= start < first < end <= length and end - first <= chunk
        assert start == max(0, end - 1 - context), "all the context that it may have, the last chunk too"
        scored += range(first, end)
    assert scored == list(range(1, length))


@pytest.mark.parametrize(
    "tokens, count", [(40_540_160, 633_409), (36_286_464, 566_945), (47_851_520, 747_649)]
)
def test_window_counts_of_the_published_runs(tokens, count):
    assert len(t.plan_windows(tokens + 1, 2048, 64)) == count


def test_score_units():
    result = t.Score(nats=100 * math.log(2), tokens=50, bytes=200)
    assert result.bpb == pytest.approx(0.5) and result.loss == pytest.approx(2 * math.log(2))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plain(run, forward, validation, stride):
    return t.measure(run, validation, "test", lambda tally: t.score_sliding(run, forward, stride, tally))


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
    validation = t.Validation(
        random.integers(0, 300, length).astype("<u2"), random.integers(0, 9, length), "test"
    )
    for stride in (32, 8, 5):
        result = plain(run, ids_as_losses, validation, stride)
        assert result.nats == validation.tokens[1:].sum() and result.tokens == length - 1
        assert result.bytes == validation.bytes[1:].sum()


def test_a_uniform_model_has_the_entropy_of_the_vocabulary(config):
    validation = t.load_validation(t.Dataset(config))
    result = plain(t.Run(config), uniform(config.vocab_size), validation, 32)
    expected = math.log2(config.vocab_size) * (len(validation.tokens) - 1) / validation.bytes[1:].sum()
    assert result.bpb == pytest.approx(expected)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_windows(config, world):
    config = replace(config, val_batch_tokens=8 * 4 * 32)  # a batch for every rank
    validation = t.load_validation(t.Dataset(config))
    whole, parts = t.Tally(t.Run(config), validation), []
    t.score_sliding(t.Run(config), ids_as_losses, 8, whole)
    for rank in range(world):
        run = t.Run(config)
        run.rank, run.world_size = rank, world
        parts.append(t.Tally(run, validation))
        t.score_sliding(run, ids_as_losses, 8, parts[-1])
    assert torch.equal(sum(part.nats for part in parts), whole.nats)
    assert torch.equal(sum(part.times for part in parts), whole.times) and all(
        part.times.any() for part in parts
    )


def test_documents_sum_to_the_score(config, tmp_path):
    run, validation = t.Run(config), t.load_validation(t.Dataset(config))
    result = plain(run, uniform(config.vocab_size), validation, 32)
    t.save_document_sums(tmp_path / "documents.npz", validation, result.losses)
    found = np.load(tmp_path / "documents.npz")
    assert len(found["nats"]) == (validation.tokens == t.BOS).sum() == 30
    assert found["tokens"].sum() == result.tokens and found["bytes"].sum() == result.bytes
    assert found["nats"].sum() == pytest.approx(result.nats) and found["nats"].dtype == np.float64
    assert (
        found["position_nats"].sum() == pytest.approx(result.nats)
        and found["position_bytes"].sum() == result.bytes
    )
    assert found["position_start"].tolist() == [2**k for k in range(len(found["position_nats"]))]
    assert found["position_nats"][0] == pytest.approx(30 * math.log(config.vocab_size)), (
        "one second token per document"
    )


def test_a_score_that_misses_a_token_is_not_reported(config, monkeypatch):
    validation, real = t.load_validation(t.Dataset(config)), t.plan_windows
    monkeypatch.setattr(t, "plan_windows", lambda *arguments: real(*arguments)[:-1])
    with pytest.raises(t.Stop, match="no score is reported"):
        plain(t.Run(config), ids_as_losses, validation, 8)


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
    for start, end, first in t.plan_windows(300, 32, 8).tolist():
        ids = torch.from_numpy(validation.tokens[start:end].astype(np.int64))[None]
        batch = t.Batch(ids[:, :-1], ids[:, 1:])
        if loader == "packed":
            batch = batch._replace(starts=t.segment_starts(ids[0, :-1].numpy(), 32), longest=32)
        with torch.no_grad():
            nats += model(batch)[0, first - 1 - start :].double().sum().item()
    result = plain(t.Run(changed), model, validation, 8)
    assert result.nats == pytest.approx(nats, rel=1e-5)
