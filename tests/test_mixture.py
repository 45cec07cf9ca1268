"""The mixture of experts over cached keys: against plain references, causality, normalisation, ranks."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from helpers.processes import run_python
from helpers.tensors import perturbed
from helpers.trainer import replace

TARGETS = [40, 9, 75, 2, 33, 60, 17, 90, 25, 51]  # of each document; most are longer than the context
ALONE = {"ttt_mixture_rates": "0", "ttt_mixture_copies": "none"}  # the network as it is


@pytest.fixture
def tiny(config, monkeypatch):
    """A small model and settings of the mixture."""
    monkeypatch.setattr(t, "CACHE_LENGTHS", 2)
    monkeypatch.setattr(t, "STREAMS", 2)  # of five documents each, more than there are slots
    changes = {"num_layers": 3, "loop_end": 1, "parallel_start_layer": 2, "xsa_last_n": 3, "vocab_size": 64}
    return replace(
        config,
        **changes,
        ttt_mode="mixture",
        ttt_mixture_chunk=8,
        ttt_mixture_rank=4,
        ttt_batch_size=3,
        ttt_lora_lr=0.01,
        phased_ttt_num_phases=0,
        ttt_mixture_rates="0,1,4",
    )


def stream(config: t.Config, targets: Sequence[int] = TARGETS) -> np.ndarray:
    """Validation tokens of documents with `targets`; every second token is one of four: there are copies."""
    random = np.random.default_rng(0)
    parts = []
    for size in targets:
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


def whole_document(model: t.GPT, ids: torch.Tensor) -> torch.Tensor:
    """The losses of a document in one forward in which every chunk sees what its cache would hold."""
    length = len(ids) - 1
    first = torch.zeros(length, dtype=torch.int64)
    for turn in t.plan_turns(model.config, np.array([[0, len(ids)]])):
        place = turn.place[0]
        first[place:] = max(0, place - t.plan_caches(model.config)[-1])
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
    "no loops": {"num_loops": 0, "smear_gate_order": "after_norm", "bigram_rows": 97, "mudd_last_n": 1},
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


@pytest.mark.parametrize("order", ["before_norm", "after_norm"])
def test_hashed_pairs_reach_back_over_the_edge_of_a_chunk(tiny, order):
    """After the norm the token before a chunk is smeared with its own pair, which began a token earlier."""
    config = replace(tiny, **ALONE, hash_embed_enabled=True, phased_ttt_num_phases=1, hash_embed_size=97)
    config = replace(config, smear_gate_order=order)
    tokens = stream(config)
    model = build(config)
    model.hash_embed = torch.nn.Parameter(torch.randn(97, config.model_dim))
    config = replace(config, phased_ttt_num_phases=0, hash_embed_enabled=False)
    tally = score(config, tokens, model)
    a, b = t.find_documents(tokens)[2]
    expected = whole_document(model, torch.from_numpy(tokens[a:b].astype(np.int64)))
    assert torch.allclose(tally.nats[a + 1 : b], expected, rtol=1e-5, atol=1e-5)


def test_slots_take_the_next_document_when_theirs_ends(tiny):
    """Every target once, in order; no slot waits while documents do; caches hold what is seen."""
    documents = t.find_documents(stream(tiny))
    turns = list(t.plan_turns(tiny, documents))
    scored = {tuple(document): [] for document in documents}
    waiting = len(documents)
    for turn in turns:
        waiting -= len(turn.opens)
        busy = turn.documents[:, 1] > 0
        assert busy.all() or waiting == 0
        assert turn.cached >= min(turn.place.max(), t.plan_caches(tiny)[-1])
        for slot in np.flatnonzero(busy):
            document, (first, end, target) = tuple(turn.documents[slot]), turn.plan[slot]
            assert first == document[0] + turn.place[slot] and target == first + 1
            scored[document] += range(target, end)
            assert (slot in turn.ends) == (end == document[1])
    for (first, end), places in scored.items():
        assert places == list(range(first + 1, end))
    assert len(turns) < sum(sorted(-(-size // 8) + 1 for size in TARGETS)) / 3 + 6
    assert {turn.cached for turn in turns} == set(t.plan_caches(tiny)) == {16, 24}
    dealt = t.deal_documents(documents)
    assert sorted(map(tuple, np.concatenate(dealt))) == sorted(scored)


def test_a_document_does_not_notice_whose_slot_it_has(tiny, monkeypatch):
    """Adapters, their optimiser, cache and weights begin anew with each document."""
    monkeypatch.setattr(t, "SHIFT_CARRY", 0.0)
    config = replace(tiny, ttt_mixture_carry=0.0, ttt_mixture_copies="none", ttt_beta1=0.5)
    tokens = stream(config)
    three = score(config, tokens).nats
    assert torch.allclose(score(replace(config, ttt_batch_size=2), tokens).nats, three, atol=1e-4)


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


def test_rates_move_to_where_the_weights_are(tiny, monkeypatch):
    """A grid that lies too low rises until its middle is the rate found best; another stream stays."""
    monkeypatch.setattr(t, "STREAMS", 4)
    rates = torch.tensor([0.0, 1e-4, 4e-4, 16e-4], dtype=torch.float64)
    mixer = t.Mixer(tiny, rates)
    best = 32e-4
    slots = torch.tensor([0, 2])
    for _ in range(40):
        mixer.take(3)
        found = mixer.open(slots)
        distance = found.clamp_min(1e-9).log() - math.log(best)
        mixer.within = (-distance.square()).log_softmax(0).repeat(3, 1)
        mixer.close(slots)
        mixer.leave(3)
    assert 4e-4 * mixer.streams[3].shift.exp().item() == pytest.approx(best, rel=0.05)
    assert mixer.streams[2].shift == 0
    for weights in ([0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]):
        mixer.take(0)
        mixer.open(slots)
        mixer.within = torch.tensor([weights], dtype=torch.float64).log().repeat(3, 1)
        mixer.close(slots)
        assert mixer.shift.isfinite(), "the network as it is has no rate"


@pytest.mark.parametrize("first", [0.0, 0.9])
def test_rows_step_as_alone_in_adamw(tiny, first):
    """Rows that begin at another time, with a rate of their own."""
    config = replace(tiny, ttt_beta1=first)
    torch.manual_seed(0)
    lora = t.LoRA(config, 2, torch.device("cpu"), 4)
    lora.reset(0)
    rates = torch.tensor([0.01, 0.03])
    begins = (0, 2)
    optimizer = t.RowAdam(config, lora, False)
    optimizer.open(torch.arange(2), rates)
    alone = []
    for row in range(2):
        parts = [torch.nn.Parameter(part[:, row].detach().clone()) for part in lora.parameters()]
        settings = {"betas": (first, config.ttt_beta2), "weight_decay": config.ttt_weight_decay, "eps": 1e-10}
        alone.append((parts, torch.optim.AdamW(parts, lr=rates[row].item(), **settings)))
    for turn in range(5):
        gradients = [torch.randn_like(parameter) for parameter in lora.parameters()]
        for row, (parts, plain) in enumerate(alone):
            if turn == begins[row]:
                optimizer.open(torch.tensor([row]), rates[row : row + 1])
                for parameter, part in zip(lora.parameters(), parts, strict=True):
                    parameter.data[:, row] = part
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient[:, row].clone()
            if turn >= begins[row]:
                plain.step()
        for parameter, gradient in zip(lora.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for row, (parts, _) in enumerate(alone):
        for parameter, part in zip(lora.parameters(), parts, strict=True):
            assert torch.allclose(parameter[:, row], part, rtol=1e-5, atol=1e-6)


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
    copies.enter(*documents[2], copies.history_table)
    for first, end in documents[:2]:
        copies.find(first, end)
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


def test_documents_copy_from_what_was_scored_before_they_began(tiny, monkeypatch):
    """Of their stream what ended at earlier turns, of all streams the phases before."""
    tokens = stream(tiny)
    documents = t.find_documents(tokens)
    earlier, documents = documents[:3], documents[3:]
    plans = [list(t.plan_turns(tiny, dealt)) for dealt in t.deal_documents(documents)]
    seen = {}
    monkeypatch.setattr(t, "enter_contexts", lambda tokens, first, end, orders, table: table[0].put(first, 1))
    monkeypatch.setattr(
        t.Copies,
        "find",
        lambda copies, first, end: seen.setdefault((first, end), set(copies.history_table[0].nonzero()[0])),
    )
    copies = t.Copies(tokens, "all")
    copies.finish(earlier)
    for plan in plans:
        copies.begin(plan)
        scored = set(earlier[:, 0])
        for number, turn in enumerate(plan):
            copies.advance(number)
            for slot in turn.opens:
                assert seen.pop(tuple(turn.documents[slot])) == scored
            assert not seen
            scored |= {turn.documents[slot][0] for slot in turn.ends}
    copies.finish(documents)
    assert set(copies.phases_table[0].nonzero()[0]) == {*earlier[:, 0], *documents[:, 0]}


def test_adapters_of_all_rates_learn_as_alone(tiny, monkeypatch):
    """Each rate in its row does what a mixture of that rate alone does with the same initial adapters."""
    tokens = stream(tiny)
    mix = t.Mixer.mix
    losses = {}

    def reset(lora, seed):
        for read, write in zip(lora.read.values(), lora.write.values(), strict=True):
            values = torch.linspace(-0.2, 0.2, read[:, :1].numel()).view_as(read[:, :1])
            read.data.copy_(values.expand_as(read))
            write.data.zero_()

    monkeypatch.setattr(t.LoRA, "reset", reset)
    monkeypatch.setattr(t, "FARTHEST_SHIFT", 0.0)
    for rates in ("1,4", "1", "4"):
        seen = losses.setdefault(rates, [])

        def record(mixer, found, *rest, seen=seen):
            seen.append(found)
            return mix(mixer, found, *rest)

        monkeypatch.setattr(t.Mixer, "mix", record)
        score(replace(tiny, ttt_mixture_rates=rates), tokens)
    found = {rates: torch.cat([part[0] for part in parts], 2) for rates, parts in losses.items()}
    for place, rate in enumerate(("1", "4")):
        assert torch.allclose(found["1,4"][:, place], found[rate][:, 0], rtol=1e-3, atol=1e-3)
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
    config = replace(
        tiny,
        ttt_batch_size=1 if phases else 3,
        phased_ttt_num_phases=phases,
        phased_ttt_prefix_docs=4,
        global_ttt_lr=0.1,
        global_ttt_chunk_tokens=32,
    )
    tokens = stream(config, [24, 9, 41, 2, 33, 17, 50, 12])
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
    monkeypatch.setattr(t, "STREAMS", 1)
    text = stream(tiny)[: TARGETS[0]]
    place = 29
    copies = np.tile(text, (size, 1))
    copies[:, place] = np.arange(size)
    documents = np.stack([np.arange(size), np.arange(size) + 1], 1) * len(text)
    run = t.Run(replace(tiny, ttt_batch_size=size))
    tokens = np.append(copies.ravel(), t.BOS).astype("<u2")
    tally = t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    model = build(tiny).requires_grad_(False)
    t.Mixture(run, model, model, tally).score_phase([documents], 0, 0)
    nats = tally.nats[:-1].view(size, -1)
    assert nats[:, place].neg().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (nats[:, 1:place] == nats[:1, 1:place]).all() and nats[:, place].std() > 0.1


def score_as_rank(folder: Path) -> None:
    """What a rank of the test below does."""
    config, tokens = pickle.loads((folder / "told").read_bytes())
    run = t.Run(config)
    tally = t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    model = build(config)
    t.score_mixture(run, model, model, tally)
    tally.total("test")
    if run.is_main:
        torch.save(tally.nats, folder / "nats.pt")


def test_ranks_share_the_streams_and_score_them_as_one_does(tiny, monkeypatch, tmp_path):
    """1 and 4 gloo ranks; between phases they learn together."""
    monkeypatch.undo()  # ranks have the constants of the trainer
    config = replace(
        tiny,
        ttt_batch_size=1,
        phased_ttt_num_phases=1,
        phased_ttt_prefix_docs=8,
        global_ttt_lr=0.01,
        global_ttt_chunk_tokens=32,
    )
    tokens = stream(config, [20, 9, 18, 12, 21, 14, 10, 19, 11, 8])
    alone = score(config, tokens).nats
    still = score(replace(config, global_ttt_lr=0.0), tokens).nats
    assert (alone != still).sum() > 10, "learning between phases must matter for this to be a test"
    (tmp_path / "told").write_bytes(pickle.dumps((config, tokens)))
    program = f"import pathlib, test_mixture; test_mixture.score_as_rank(pathlib.Path({str(tmp_path)!r}))"
    result = run_python(["-c", program], ranks=4)
    assert result.returncode == 0, result.stderr
    together = torch.load(tmp_path / "nats.pt")
    # Sums over ranks round differently, which is seen after the first phase alone.
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-3)
    assert (together == alone).sum() > len(tokens) / 2


def test_every_cache_is_one_graph_and_the_rehearsal_meets_them_all(tiny):
    config = replace(tiny, val_batch_tokens=256, ttt_chunk_tokens=64, ttt_batch_size=2)
    run, model = t.Run(config), build(config)
    tokens = stream(config, [40, 9, 75, 33, 60])
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="eager")
    before = t.compiled_graphs()
    t.rehearse(run, {"ttt": lambda tally: t.score_mixture(run, compiled, compiled, tally)})
    graphs = t.compiled_graphs()
    assert graphs - before == len(t.plan_caches(config)) == 2
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
        replace(tiny, ttt_mixture_chunk=32)
    with pytest.raises(t.Stop, match="TTT_MIXTURE_RATES"):
        replace(tiny, ttt_mixture_rates="1,x")


def test_the_caches_of_the_contest_are_few():
    config = t.Config(ttt_mode="mixture")
    assert t.plan_caches(config) == [256, 512, 1016, 2024]
    turns = list(t.plan_turns(config, np.array([[0, 300]])))
    assert [int(turn.plan[0, 1] - turn.plan[0, 2]) for turn in turns] == [24] * 12 + [11]
