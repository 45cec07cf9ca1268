"""The mixture of experts over cached keys: against plain references, causality, normalisation, ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from helpers.tensors import perturbed
from helpers.trainer import replace

TARGETS = [40, 9, 75, 2, 33, 60, 17, 90, 25, 51]  # of each document; most are longer than the context
ALONE = {"ttt_mixture_rates": "0", "ttt_mixture_copies": "none"}  # the network as it is
STAGES = ((8, 4),)  # instead of EARLY_CHUNKS: contexts here have 32 tokens


@pytest.fixture
def tiny(config, monkeypatch):
    """A small model and settings of the mixture."""
    monkeypatch.setattr(t, "EARLY_CHUNKS", STAGES)
    changes = {"num_layers": 3, "loop_end": 1, "parallel_start_layer": 2, "xsa_last_n": 3, "vocab_size": 64}
    return replace(
        config,
        **changes,
        ttt_mode="mixture",
        ttt_chunk_size=8,
        ttt_batch_size=3,
        ttt_lora_lr=0.01,
        phased_ttt_num_phases=0,
        ttt_mixture_rates="0,1,4",
    )


def stream(config: t.Config, seed: int = 0) -> np.ndarray:
    """Validation tokens of documents with TARGETS; every second token is one of four: there are copies."""
    random = np.random.default_rng(seed)
    parts = []
    for size in TARGETS:
        words = np.where(
            np.arange(size) % 2, random.integers(4, 8, size), random.integers(4, config.vocab_size, size)
        )
        parts.append(np.append(t.BOS, words))
    return np.concatenate(parts).astype("<u2")


def build(config: t.Config, dtype: torch.dtype = torch.float32) -> t.GPT:
    """The same perturbed model in every call."""
    torch.manual_seed(0)
    model = perturbed(t.GPT(config, dtype=dtype), 0.1)
    model.looped = config.num_loops > 0
    return model


def score(config: t.Config, tokens: np.ndarray, model: t.GPT | None = None) -> t.Tally:
    """The Tally of the mixture."""
    run = t.Run(config)
    model = model or build(config)
    tally = t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    t.score_mixture(run, model, model, tally)
    tally.total("test")
    return tally


def score_batch(
    config: t.Config, tokens: np.ndarray, documents: np.ndarray, model: t.GPT | None = None
) -> t.Tally:
    """A Tally with one batch of documents."""
    run = t.Run(config)
    model = (model or build(config)).requires_grad_(False)
    tally = t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    t.Mixture(run, model, model, tally).score_phase([documents], 0, 0)
    return tally


def whole_document(model: t.GPT, ids: torch.Tensor) -> torch.Tensor:
    """The losses of a document in one forward in which every chunk sees what its cache would hold."""
    length = len(ids) - 1
    first = torch.zeros(length, dtype=torch.int64)
    for place, stage in t.plan_positions(t.plan_stages(model.config), len(ids)):
        first[place : place + stage.chunk] = max(0, place - stage.cached)
    at = torch.arange(length)
    mask = (at <= at[:, None]) & (at >= first[:, None])

    def attend(q, k, v, starts, longest):
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    model.attend = attend
    with torch.no_grad():
        return model(t.Batch(ids[None, :-1], ids[None, 1:]))[0]


SHAPES = {
    "flagship": {},
    "no loops": {"num_loops": 0, "smear_gate_order": "after_norm"},
    "gptj": {"parallel_residual": "gptj", "gate_attn_src": "q", "smear_gate_bos_fix": False},
    "plain": {"parallel_residual": "none", "head_gate": "none", "smear_gate": False},
    "published": {"head_gate": "attn_out", "gate_attn_src": "residual", "smear_gate_segment_fix": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_over_a_cache_score_like_whole_documents(tiny, shape):
    config = replace(tiny, **SHAPES[shape], **ALONE)
    tokens = stream(config)
    model = build(config)
    expected = torch.zeros(len(tokens))
    for a, b in t.find_documents(tokens):
        expected[a + 1 : b] = whole_document(model, torch.from_numpy(tokens[a:b].astype(np.int64)))
    assert torch.allclose(score(config, tokens).nats, expected, rtol=1e-5, atol=1e-5)
    assert len(t.plan_stages(config)) == 2, "both kinds of chunks are part of this test"


def test_hashed_pairs_reach_back_over_the_edge_of_a_chunk(tiny):
    config = replace(tiny, **ALONE, hash_embed_enabled=True, phased_ttt_num_phases=1, hash_embed_size=97)
    tokens = stream(config)
    model = build(config)
    model.hash_embed = torch.nn.Parameter(torch.randn(97, config.model_dim))
    a, b = t.find_documents(tokens)[2]
    expected = whole_document(model, torch.from_numpy(tokens[a:b].astype(np.int64)))
    tally = score_batch(config, tokens, np.array([[a, b]]), model)
    assert torch.allclose(tally.nats[a + 1 : b], expected, rtol=1e-5, atol=1e-5)


def test_weights_are_those_of_bayes():
    random = torch.Generator().manual_seed(0)
    log_p = -torch.rand(2, 3, 5, generator=random, dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)
    before, after = t.mix_experts(weights.log(), log_p)
    for row in range(2):
        w = weights[row].clone()
        for place in range(5):
            assert torch.allclose(before[row, :, place].exp(), w)
            p = log_p[row, :, place].exp()
            w = w * p / (w @ p)
        assert torch.allclose(after[row].exp(), w)


def test_rates_move_to_where_the_weights_are(tiny):
    """A grid that lies too low rises until its middle is the rate found best; another stream stays."""
    rates = torch.tensor([0.0, 1e-4, 4e-4, 16e-4], dtype=torch.float64)
    mixer = t.Mixer(tiny, rates)
    best = 32e-4
    for _ in range(12):
        mixer.open(3, 2)
        distance = (mixer.rates * mixer.shift.exp()).clamp_min(1e-9).log() - math.log(best)
        mixer.within = (-distance.square()).log_softmax(0).repeat(2, 1)
        mixer.close(3, 2)
    assert 4e-4 * mixer.streams[3].shift.exp().item() == pytest.approx(best, rel=0.05)
    assert mixer.streams[2].shift == 0
    for weights in ([0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]):
        mixer.open(0, 1)
        mixer.within = torch.tensor([weights], dtype=torch.float64).log()
        mixer.close(0, 1)
        assert mixer.streams[0].shift.isfinite(), "the network as it is has no rate"


def test_trust_in_copies_is_learnt_by_class():
    """A class whose copies are right gets more of the probability, of wrong ones less."""
    log_p = torch.full((1, 40), 0.1, dtype=torch.float64).log()
    match = torch.tensor([[1, 2, 0, 1] * 10])
    hit = match == 1
    first = torch.zeros(4, len(t.TRUSTS), dtype=torch.float64).log_softmax(1)
    trusts = torch.tensor(t.TRUSTS, dtype=torch.float64)
    mixed, after = t.mix_copies(log_p, hit, match, trusts, first)
    mean = trusts.mean()
    for kind, expected in ((0, 0.1), (1, 0.1 * (1 - mean) + mean), (2, 0.1 * (1 - mean))):
        assert torch.allclose(mixed[match == kind].exp(), torch.tensor(float(expected), dtype=torch.float64))
    trust = after.exp() @ trusts
    assert trust[1] > 0.8 and trust[2] < 0.1 and torch.equal(after[[0, 3]], first[[0, 3]])


def test_copies_follow_the_longest_match_of_what_is_known():
    """Against a search by hand: nothing from the place on, from other documents only what is entered."""
    random = np.random.default_rng(0)
    text = random.integers(4, 7, 400).astype("<u2")
    text[[0, 150, 300]] = t.BOS
    documents = np.array([[0, 151], [150, 301], [300, 400]])
    copies = t.Copies(text, "all")
    copies.enter([documents[2:]])
    copies.find(documents[:2])
    for first, end in documents[:2]:
        for place in range(first + 1, end):
            lengths = [0]
            for found in range(first + 1, place):
                lengths.append(t.match_length.py_func(text, place, found, min(32, found - first)))
            assert copies.lengths[0, place] <= max(lengths)
            long = max(lengths) if max(lengths) <= 3 else 3  # the most recent match of an order is taken
            assert copies.lengths[0, place] >= long
    at = int(np.flatnonzero(copies.lengths[1])[0])
    order = int(copies.lengths[1, at])
    context = text[at - order : at]
    matches = [place for place in range(300 + order, 400) if (text[place - order : place] == context).all()]
    assert copies.tokens[1, at] == text[matches[-1]]
    assert not t.Copies(text, "all").lengths.any()


def test_adapters_of_all_rates_learn_as_alone(tiny, monkeypatch):
    """Each rate in its row does what a mixture of that rate alone does with the same initial adapters."""
    tokens = stream(tiny)
    documents = t.find_documents(tokens)[[4, 5]]
    mix = t.Mixer.mix
    losses = {}

    def reset(lora, seed):
        for read, write in zip(lora.read.values(), lora.write.values(), strict=True):
            count = read.size(1) // len(documents)
            values = torch.linspace(-0.2, 0.2, read[:, ::count].numel()).view_as(read[:, ::count])
            read.data.copy_(values.repeat_interleave(count, 1))
            write.data.zero_()

    monkeypatch.setattr(t.LoRA, "reset", reset)
    for rates in ("1,4", "1", "4"):
        seen = losses.setdefault(rates, [])

        def record(mixer, found, *rest, seen=seen):
            seen.append(found)
            return mix(mixer, found, *rest)

        monkeypatch.setattr(t.Mixer, "mix", record)
        score_batch(replace(tiny, ttt_mixture_rates=rates, ttt_batch_size=2), tokens, documents)
    found = {rates: torch.cat([part[0] for part in parts], 2) for rates, parts in losses.items()}
    for place, rate in enumerate(("1", "4")):
        assert torch.allclose(found["1,4"][:, place], found[rate][:, 0], rtol=1e-4, atol=1e-4)
    assert (found["1"] - found["4"]).abs().max() > 0.05, "learning must matter for this to be a test"


def scored_when(config: t.Config, tokens: np.ndarray, monkeypatch) -> np.ndarray:
    """The number of the record in which each target is entered."""
    when = np.full(len(tokens), -1)
    counter = iter(range(len(tokens)))
    enter = t.Tally.add

    def add(tally, losses, places):
        when[places.numpy()] = next(counter)
        enter(tally, losses, places)

    with monkeypatch.context() as patch:
        patch.setattr(t.Tally, "add", add)
        score(config, tokens)
    return when


@pytest.mark.parametrize("phases", [0, 2])
def test_no_score_depends_on_what_comes_later(tiny, monkeypatch, phases):
    """No earlier score changes by a bit when all later tokens do, all experts and phases of SGD included."""
    monkeypatch.setattr(t, "STREAMS", 2)
    config = replace(
        tiny,
        ttt_batch_size=1 if phases else 3,
        phased_ttt_num_phases=phases,
        phased_ttt_prefix_docs=4,
        global_ttt_lr=0.1,
        global_ttt_chunk_tokens=32,
    )
    tokens = stream(config)
    when = scored_when(config, tokens, monkeypatch)
    first = score(config, tokens).nats
    random = np.random.default_rng(1)
    for place in random.choice(np.flatnonzero(tokens != t.BOS), 2, replace=False):
        known = (when < when[place]) | ((when == when[place]) & (np.arange(len(tokens)) <= place))
        fixed = known | (tokens == t.BOS)
        changed = np.where(fixed, tokens, random.integers(4, config.vocab_size, len(tokens))).astype("<u2")
        second = score(config, changed).nats
        assert torch.equal(first[known], second[known])
        assert not torch.equal(first, second)


def test_the_mixture_is_normalised_and_no_expert_sees_its_target(tiny, monkeypatch):
    """Of documents that differ in one token, with all tokens in its place: the probabilities sum to 1."""
    size = tiny.vocab_size
    reset = t.LoRA.reset

    def same_for_all(lora, seed):
        reset(lora, seed)
        for read in lora.read.values():
            read.data.copy_(read.data[:, :3].repeat(1, size, 1, 1))

    monkeypatch.setattr(t.LoRA, "reset", same_for_all)
    text = stream(tiny)[: TARGETS[0]]
    place = 29
    copies = np.tile(text, (size, 1))
    copies[:, place] = np.arange(size)
    documents = np.stack([np.arange(size), np.arange(size) + 1], 1) * len(text)
    nats = score_batch(replace(tiny, ttt_batch_size=size), copies.ravel(), documents).nats.view(size, -1)
    assert nats[:, place].neg().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (nats[:, 1:place] == nats[:1, 1:place]).all() and nats[:, place].std() > 0.1


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_documents_and_score_them_as_one_does(tiny, monkeypatch, world_size):
    """Bit for bit, whatever is copied from batches that another rank scores."""
    config = replace(tiny, ttt_batch_size=1)
    tokens = stream(config)
    alone = score(config, tokens).nats
    together = torch.zeros_like(alone)
    times = torch.zeros(len(tokens), dtype=torch.int32)
    for rank in range(world_size):
        run = t.Run(config)
        run.rank, run.world_size, run.streams = rank, world_size, range(rank, t.STREAMS, world_size)
        monkeypatch.setattr(t.Run, "sum_over_ranks", lambda run, tensor: tensor)
        model = build(config)
        tally = t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
        t.score_mixture(run, model, model, tally)
        together += tally.nats
        times += tally.times
    assert (times[1:] == 1).all() and torch.equal(together, alone)


def test_every_stage_is_one_graph_and_the_rehearsal_meets_them_all(tiny, monkeypatch):
    monkeypatch.setattr(t, "STREAMS", 2)
    config = replace(tiny, val_batch_tokens=256, ttt_chunk_tokens=64, ttt_batch_size=2)
    run, model = t.Run(config), build(config)
    tokens = stream(config)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="eager")
    before = t.compiled_graphs()
    t.rehearse(run, {"ttt": lambda tally: t.score_mixture(run, compiled, compiled, tally)})
    graphs = t.compiled_graphs()
    assert graphs - before == len(t.plan_stages(config)) == 2
    tally = t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    t.score_mixture(run, compiled, compiled, tally)
    assert t.compiled_graphs() == graphs
    assert torch.allclose(tally.nats, score(config, tokens).nats, rtol=1e-4, atol=1e-4)


def test_a_run_in_bf16_scores_like_one_in_fp32(tiny):
    config = replace(tiny, ttt_lora_lr=0.001)
    tokens = stream(config)
    rough = score(config, tokens, build(config, torch.bfloat16)).nats
    exact = score(config, tokens).nats
    assert rough.mean().item() == pytest.approx(exact.mean().item(), rel=0.01)


def test_a_context_without_room_for_a_cache_is_refused(tiny):
    with pytest.raises(t.Stop, match="there would be no cache"):
        replace(tiny, ttt_chunk_size=32)
    with pytest.raises(t.Stop, match="TTT_MIXTURE_RATES"):
        replace(tiny, ttt_mixture_rates="1,x")


def test_the_stages_of_the_contest_are_few():
    stages = t.plan_stages(t.Config(ttt_mode="mixture"))
    assert [(stage.chunk, stage.cached) for stage in stages] == [(8, 64), (16, 256), (32, 1024), (48, 2000)]
    for length in (2, 9, 64, 65, 1025, 5000):
        plan = t.plan_positions(stages, length)
        ends = [place + stage.chunk for place, stage in plan]
        assert [place for place, _ in plan] == [0, *ends[:-1]] and ends[-1] >= length - 1 > plan[-1][0]
        assert all(place + stage.chunk <= max(stage.cached, 2048) for place, stage in plan if place < 1024)
