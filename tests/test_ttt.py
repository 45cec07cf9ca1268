"""Test-time training: causality of every mode, each against a plain reference, plans, counts."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import train_gpt as t
from helpers.run_folders import original
from helpers.tensors import perturbed
from helpers.trainer import launch, replace

DOCUMENTS = [
    40,
    9,
    75,
    2,
    33,
    60,
    17,
    90,
    25,
    51,
]  # targets; one shorter than a chunk, most longer than the context


@pytest.fixture
def tiny(config):
    changes = {"num_layers": 3, "loop_end": 1, "parallel_start_layer": 2, "xsa_last_n": 3, "vocab_size": 64}
    changes |= {"bigram_rows": 31, "bigram_width": 4}
    return replace(config, **changes, ttt_chunk_size=8, ttt_batch_size=2)


SHORTER = [24, 9, 41, 2, 33, 17, 50, 12]  # for what is scored five times


def stream(config, seed=0, documents=DOCUMENTS):
    """Validation tokens of documents with so many targets each."""
    random = np.random.default_rng(seed)
    tokens = np.concatenate(
        [np.append(t.BOS, random.integers(4, config.vocab_size, size)) for size in documents]
    )
    return tokens.astype("<u2")


def build(config, seed=0):
    torch.manual_seed(seed)
    model = perturbed(t.GPT(config), 0.1)
    model.looped = True
    return model


MODES = {
    "plain": {"ttt_enabled": False},
    "sliding": {"ttt_enabled": False, "sliding_window_enabled": True},
    "chunk_sgd": {"ttt_mode": "chunk_sgd", "ttt_chunk_tokens": 64, "ttt_lr": 0.1, "ttt_epochs": 2},
    "chunk_sgd hash": {
        "ttt_mode": "chunk_sgd",
        "ttt_chunk_tokens": 64,
        "ttt_lr": 0.1,
        "hash_embed_enabled": True,
        "hash_embed_size": 97,
    },
    "chunk_sgd packed": {"ttt_mode": "chunk_sgd", "ttt_chunk_tokens": 64, "ttt_lr": 0.1, "loader": "packed"},
    "doc_lora": {"phased_ttt_num_phases": 0, "ttt_lora_lr": 0.02, "ttt_grad_steps": 2},
    "doc_lora phased": {
        "phased_ttt_num_phases": 2,
        "phased_ttt_prefix_docs": 4,
        "ttt_lora_lr": 0.02,
        "ttt_batch_size": 1,
        "global_ttt_lr": 0.1,
        "global_ttt_chunk_tokens": 32,
    },
}


def tally_of(config, tokens, prepare=None):
    """The Tally of the mode that `config` describes, from the same initial weights."""
    run, model = t.Run(config), build(config)
    validation = t.Validation(tokens, np.ones(len(tokens), np.int32), "test")
    if prepare:
        prepare(run, model, validation)
    tally = t.Tally(run, validation)
    if config.hash_embed_enabled:
        model.hash_embed = torch.nn.Parameter(torch.zeros(config.hash_embed_size, config.model_dim))
    if not config.ttt_enabled:
        t.score_sliding(
            run, model, config.eval_stride if config.sliding_window_enabled else config.eval_seq_len, tally
        )
    elif config.ttt_mode == "chunk_sgd":
        t.chunk_sgd(run, model, model, tally)
    else:
        t.doc_lora(run, model, model, tally)
    tally.total("test")
    return tally


def earlier(config, tokens, place):
    """Which targets are scored before or beside the target `place`; of its own document, those up to it."""
    before = np.arange(len(tokens)) <= place
    if (
        config.ttt_enabled and config.ttt_mode == "doc_lora"
    ):  # documents have an order of their own, phase by phase
        documents = t.find_documents(tokens)
        own = int(np.searchsorted(documents[:, 0], place) - 1)
        before &= np.arange(len(tokens)) > documents[own, 0]
        for batches in t.schedule_documents(config, documents[:, 1] - documents[:, 0]):
            numbers = np.concatenate(batches)
            if own in numbers:
                break
            for a, b in documents[numbers]:
                before[a + 1 : b] = True
    return before


@pytest.mark.parametrize("mode", MODES)
def test_no_score_depends_on_what_comes_later(tiny, mode, monkeypatch):
    """No earlier score changes by a bit when all later tokens do; no token changes its own distribution."""
    config = replace(tiny, **MODES[mode])
    monkeypatch.setattr(t, "STREAMS", 2)  # phases end after few documents
    seen = {}
    batch_of, enter, losses_of = t.window_batch, t.Tally.add, t.softcapped_ce_reference

    def window_batch(*arguments, **named):
        found = batch_of(*arguments, **named)
        seen["chosen"] = found[1]
        return found

    def reference(logits, targets, cap):
        seen["last"] = (cap * torch.tanh(logits.detach() / cap)).log_softmax(-1)
        return losses_of(logits, targets, cap)

    def add(tally, losses, places):
        tally.distributions = getattr(tally, "distributions", torch.zeros(len(tally.nats), config.vocab_size))
        rows = seen["last"].view(*seen["chosen"].shape, -1)[seen["chosen"]]
        tally.distributions[places] = rows
        enter(tally, losses, places)

    for name, replacement in (("window_batch", window_batch), ("softcapped_ce_reference", reference)):
        monkeypatch.setattr(t, name, replacement)
    monkeypatch.setattr(t.Tally, "add", add)
    tokens, random = stream(config, documents=SHORTER), np.random.default_rng(1)
    first = tally_of(config, tokens)
    assert torch.allclose(first.distributions[1:].exp().sum(-1), torch.ones(len(tokens) - 1), atol=1e-5)
    targets = torch.from_numpy(tokens.astype(np.int64))
    assert torch.allclose(first.nats[1:], -first.distributions.gather(1, targets[:, None])[1:, 0], atol=1e-5)
    for place in random.choice(np.flatnonzero(tokens != t.BOS), 2, replace=False).tolist():
        before = earlier(config, tokens, place)
        inputs = before | (np.arange(len(tokens)) == 0) | (tokens == t.BOS)
        changed = np.where(inputs, tokens, random.integers(4, config.vocab_size, len(tokens))).astype("<u2")
        second = tally_of(config, changed)
        assert torch.equal(first.nats[before], second.nats[before]) and not torch.equal(
            first.nats, second.nats
        )
        changed[place] = 4 + (changed[place] - 3) % (config.vocab_size - 4)  # now the token itself, too
        assert changed[place] != tokens[place]
        third = tally_of(config, changed)
        assert torch.equal(first.distributions[place], third.distributions[place])
        assert first.nats[place] != third.nats[place]


def test_training_on_the_text_before_scoring_it_is_not_causal(tiny):
    config = replace(
        tiny,
        ttt_enabled=False,
        prequant_ttt_enabled=True,
        prequant_ttt_epochs=2,
        prequant_ttt_lr=0.01,
        prequant_ttt_chunk_tokens=64,
        prequant_ttt_freeze_blocks=0,
    )
    tokens = stream(config)
    first = tally_of(config, tokens, t.prequant_ttt)
    changed = tokens.copy()
    changed[200:] = np.random.default_rng(2).integers(4, config.vocab_size, len(tokens) - 200)
    second = tally_of(config, changed, t.prequant_ttt)
    assert not torch.equal(first.nats[:200], second.nats[:200])
    assert first.nats.mean() < tally_of(config, tokens).nats.mean() - 0.05, "seen text is predicted better"


@pytest.mark.parametrize("loader", ["shuffled", "packed"])
def test_without_learning_chunks_score_like_sliding_windows(tiny, loader):
    config = replace(tiny, **MODES["chunk_sgd"] | {"ttt_lr": 0.0, "loader": loader})
    sliding = replace(config, ttt_enabled=False, sliding_window_enabled=True)
    scores, expected = tally_of(config, stream(config)).nats, tally_of(sliding, stream(config)).nats
    assert torch.allclose(
        scores, expected, rtol=1e-5, atol=1e-5
    )  # batches of other windows round differently


def test_without_learning_documents_score_like_their_windows(tiny):
    config = replace(tiny, **MODES["doc_lora phased"] | {"ttt_lora_lr": 0.0, "global_ttt_lr": 0.0})
    tokens, model = stream(config), build(config)
    expected = torch.zeros(len(tokens))
    for a, b in t.find_documents(tokens):
        for start, end, first in t.plan_chunks(b - a, config.ttt_eval_seq_len, config.ttt_chunk_size):
            ids = torch.from_numpy(tokens[a + start : a + end].astype(np.int64))[None]
            with torch.no_grad():
                expected[a + first : a + end] = model(t.Batch(ids[:, :-1], ids[:, 1:]))[
                    0, first - 1 - start :
                ]
    assert torch.allclose(tally_of(config, tokens).nats, expected, rtol=1e-5, atol=1e-5)


def rows_of(tokens, first, count, length):
    rows = [tokens[first + i * length : first + (i + 1) * length + 1] for i in range(count)]
    ids = torch.stack([torch.from_numpy(row.astype(np.int64)) for row in rows])
    return t.Batch(ids[:, :-1], ids[:, 1:])


def test_chunk_sgd_equals_its_description(tiny):
    """Score a chunk's windows, then whole rows of it: SGD, momentum, clip 1, cosine over chunks (5.4)."""
    config = replace(tiny, **MODES["chunk_sgd"])
    tokens, model, length = stream(config), build(config), config.eval_seq_len
    plan, count = t.plan_windows(len(tokens), length, config.eval_stride), math.ceil((len(tokens) - 1) / 64)
    expected, momentum = torch.zeros(len(tokens)), {}
    for chunk in range(count):
        for start, end, first in plan.tolist():
            if (0 if start == 0 else first - 1) // 64 == chunk:
                ids = torch.from_numpy(tokens[start:end].astype(np.int64))[None]
                with torch.no_grad():
                    expected[first:end] = model(t.Batch(ids[:, :-1], ids[:, 1:]))[0, first - 1 - start :]
        rate = config.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / (count - 1)))
        for _ in range(config.ttt_epochs if chunk < count - 1 else 0):
            model.zero_grad()
            model(rows_of(tokens, chunk * 64, 64 // length, length)).mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert norm > 1.0, "the clip is part of this test"
            for name, parameter in model.named_parameters():
                momentum[name] = config.ttt_momentum * momentum.get(name, 0) + parameter.grad
                parameter.data -= rate * momentum[name]
    scores = tally_of(config, tokens).nats
    assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-3)
    still = replace(config, ttt_enabled=False, sliding_window_enabled=True)
    assert (scores - tally_of(still, tokens).nats).abs().max() > 0.05, (
        "learning must matter for this to be a test"
    )


def test_document_adapters_equal_their_description(tiny):
    """One document alone: score a chunk, AdamW step (betas 0, .99) on its mean loss, next chunk (5.6)."""
    config = replace(tiny, ttt_lora_lr=0.02, ttt_batch_size=2, phased_ttt_num_phases=0)
    tokens, model, context, size = (
        stream(config),
        build(config).requires_grad_(False),
        32,
        config.ttt_chunk_size,
    )
    documents = t.find_documents(tokens)[[5, 9]]
    lora = t.LoRA(config, 2, torch.device("cpu"))
    lora.reset(3)
    alone = t.LoRA(config, 1, torch.device("cpu"))
    for name, parameter in alone.named_parameters():
        parameter.data.copy_(lora.get_parameter(name)[:, 1:].data)
    a, b = documents[1].tolist()
    expected, squares = torch.zeros(len(tokens)), {}
    for steps, low in enumerate(range(0, b - a - 1, size), 1):
        high = min(low + size, b - a - 1)
        start = max(0, high - context)
        ids = torch.from_numpy(tokens[a + start : a + high + 1].astype(np.int64))[None]
        losses = model(t.Batch(ids[:, :-1], ids[:, 1:]), lora=alone)[0, low - start :]
        expected[a + low + 1 : a + high + 1] = losses.detach()
        if high == b - a - 1:
            break
        alone.zero_grad()
        losses.mean().backward()
        for name, p in alone.named_parameters():
            squares[name] = config.ttt_beta2 * squares.get(name, 0) + (1 - config.ttt_beta2) * p.grad**2
            denominator = (squares[name] / (1 - config.ttt_beta2**steps)).sqrt() + 1e-10
            p.data = (
                p.data * (1 - config.ttt_lora_lr * config.ttt_weight_decay)
                - config.ttt_lora_lr * p.grad / denominator
            )
    run = t.Run(config)
    tally = t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    t.adapt_documents(run, model, tally, documents, seed=3)
    scored = tally.times > 0
    assert scored.sum() == (documents[:, 1] - documents[:, 0] - 1).sum()
    assert torch.allclose(tally.nats[a + 1 : b], expected[a + 1 : b], rtol=1e-3, atol=1e-3)


def test_a_phase_learns_its_shortest_documents_shortest_first(tiny, monkeypatch):
    config = replace(
        tiny, **MODES["doc_lora phased"] | {"global_ttt_warmup_chunks": 1, "global_ttt_epochs": 2}
    )
    monkeypatch.setattr(t, "STREAMS", 2)
    tokens, learnt, rates = stream(config), [], []
    learn = t.Learner.learn

    def record(learner, text, first, last, rate, epochs):
        learnt.append(text), rates.append((rate, epochs, first, last))
        return learn(learner, text, first, last, rate, epochs)

    monkeypatch.setattr(t.Learner, "learn", record)
    tally_of(config, tokens)
    documents = t.find_documents(tokens)
    order = np.argsort(documents[:, 1] - documents[:, 0], kind="stable")[::-1]  # longest first, one per batch
    texts = [
        np.concatenate([tokens[a:b] for a, b in documents[order[:done][::-1][:count]]])
        for done, count in ((2, 2), (4, 4))
    ]
    assert {text.tobytes() for text in learnt} == {text.tobytes() for text in texts}
    chunks = [math.ceil((len(text) - 1) / 32) for text in texts]
    assert len(rates) == sum(chunks) - 2, "the last chunk of a phase is not learnt"
    n = chunks[0]
    cosine = [0.1 * 0.5 * (1 + math.cos(math.pi * c / (n - 2))) for c in range(n - 2)]
    assert [rate for rate, *_ in rates[: n - 1]] == pytest.approx([0.0, *cosine])
    assert rates[0][1:] == (2, 0, 32) and rates[1][2:] == (32, 64)


def test_documents_cover_every_target_once():
    tokens = np.array([1, 5, 6, 1, 7, 1, 1, 8, 9], "<u2")
    found = t.find_documents(tokens)
    assert found.tolist() == [[0, 4], [3, 6], [5, 7], [6, 9]]  # the next BOS is the last target
    for stream_ in (
        tokens,
        tokens[1:],
        np.append(tokens, 1),
        np.full(5000, 7, "<u2"),
        np.array([1, 2], "<u2"),
    ):
        covered = np.zeros(len(stream_), int)
        for a, b in t.find_documents(stream_.astype("<u2")):
            covered[a + 1 : b] += 1
        assert (covered[1:] == 1).all() and covered[0] == 0
    assert t.find_documents(np.full(5000, 7, "<u2")).tolist() == [[0, 2049], [2048, 4097], [4096, 5000]]


def test_the_plan_of_the_published_run():
    """50,000 documents in batches of 64, phases at 666, 1,333, 2,000 (5.6, 5.7), rounds of 8 batches."""
    config = t.Config(phased_ttt_num_phases=3, phased_ttt_prefix_docs=2000)
    lengths = np.random.default_rng(0).geometric(1 / 800, 50_000) + 1
    phases = t.schedule_documents(config, lengths)
    batches = [batch for phase in phases for batch in phase]
    assert len(batches) == 782 and [len(b) for b in batches[:2]] == [16, 64]
    assert [sum(map(len, phase)) for phase in phases] == [976, 512, 512, 48_000]
    assert sorted(np.concatenate(batches)) == list(range(50_000))
    longest = [lengths[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True) and (np.diff(lengths[batches[9]]) >= 0).all()
    assert [len(p) for p in t.schedule_documents(replace(config, phased_ttt_num_phases=0), lengths)] == [782]
    few = t.schedule_documents(config, lengths[:500])
    assert len(few) == 1, "a phase after which nothing is left to score would be for nothing"


@pytest.mark.parametrize(
    "scored, chunks", [(40_540_160, 1238), (36_286_464, 1108), (36_335_616, 1109), (47_851_520, 1461)]
)
def test_chunk_counts_of_the_published_runs(scored, chunks):
    chunk_of = (t.plan_windows(scored + 1, 2048, 64)[:, 2] - 1) // 32_768
    assert chunk_of[-1] + 1 == chunks and (np.bincount(chunk_of)[1:-1] == 512).all()
    assert np.bincount(chunk_of)[0] == 1 + (32_768 - 2048) // 64


def test_frozen_layers_stay(tiny):
    config = replace(
        tiny,
        prequant_ttt_enabled=True,
        prequant_ttt_freeze_blocks=2,
        prequant_ttt_wd=0.1,
        prequant_ttt_epochs=1,
        prequant_ttt_chunk_tokens=64,
    )
    run, model, tokens = t.Run(config), build(config), stream(config)
    before = copy.deepcopy(model.state_dict())
    t.prequant_ttt(run, model, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    for name, after in model.state_dict().items():
        moved = (after != before[name]).flatten(1).any(1) if after.dim() > 1 else after != before[name]
        if name == "embed":
            assert not moved.any()
        elif name in ("qo", "kv"):
            assert moved.tolist() == [False, False, True] * 2, name
        elif model.table[name].layered and name not in ("parallel_post_lambdas", "parallel_resid_lambdas"):
            assert moved.tolist() == [False, False, True], name
        elif name.startswith("skip"):
            assert moved.all()


def test_frozen_parameters_of_the_published_run(monkeypatch):
    """With two blocks and the embedding frozen, 25,978,952 of 35,944,536 parameters are trained (5.5)."""
    config = t.Config(parallel_residual="gptj", parallel_start_layer=7, head_gate="none", smear_gate=False)
    with torch.device("meta"):
        model = t.GPT(config)
    run = object.__new__(t.Run)
    monkeypatch.setattr(t, "hash_weights", lambda model: "")  # the meta device has no bits
    learner = t.Learner(run, model, None, 1.0, 1, freeze=2)
    frozen = sum(parameter[rows].numel() for parameter, rows in learner.frozen)
    assert sum(p.numel() for p in model.parameters()) - frozen == 25_978_952


def test_prequant_epochs_follow_the_published_rates(tiny, monkeypatch):
    config = replace(
        tiny, prequant_ttt_enabled=True, prequant_ttt_chunk_tokens=256, prequant_ttt_freeze_blocks=0
    )
    rates = []
    monkeypatch.setattr(
        t.Learner, "learn", lambda learner, tokens, first, last, rate: rates.append((rate, first, last))
    )
    tokens = stream(config)
    t.prequant_ttt(t.Run(config), build(config), t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    assert len(rates) == 21 * 2 and rates[0][1:] == (0, 256) and rates[1][1:] == (256, len(tokens) - 1)
    assert [f"{rates[2 * e][0]:.2e}" for e in (0, 1, 2, 20)] == [
        "5.00e-04",
        "4.97e-04",
        "4.90e-04",
        "5.25e-05",
    ]


def test_the_rehearsal_sees_random_tokens_and_learns_a_phase(tiny):
    config = replace(tiny, **MODES["doc_lora phased"], val_batch_tokens=256, ttt_chunk_tokens=64)
    run, model = t.Run(config), build(config)
    before, lengths = copy.deepcopy(model.state_dict()), []

    def how(tally):
        lengths.append(len(tally.validation.tokens))
        t.doc_lora(run, model, model, tally)

    t.rehearse(run, {"ttt": how})
    (length,) = lengths
    assert length == (t.STREAMS + 1) * 40 and model.hash_embed is None, (
        "nine documents, a chunk over the context"
    )
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert "qo" in moved, "a phase is rehearsed, so evaluate_stage loads the weights again"
    assert run.config is config


@pytest.mark.parametrize("mode", ["chunk_sgd", "doc_lora"])
def test_two_processes_adapt_like_one(settings, dataset, mode):
    changes = {
        "STAGE": "evaluate",
        "ARTIFACT": str(original(dataset) / "final_model.ptz"),
        "EVAL_PREQUANT": "0",
        "TTT_MODE": mode,
        "TTT_BATCH_SIZE": "2",
        "PHASED_TTT_NUM_PHASES": "2",
        "PHASED_TTT_PREFIX_DOCS": "16",
        "TTT_LR": "0.05",
        "GLOBAL_TTT_LR": "0.05",
        "SLIDING_WINDOW_ENABLED": "0",
    }
    scores = []
    for processes in (0, 2):
        done = launch(settings | changes | {"RUN_ID": f"again{processes}"}, processes)
        assert done.returncode == 0, done.stderr
        summary = t.read_json(t.Path(settings["OUT_DIR"]) / f"again{processes}" / "summary.json")
        scores.append(summary["bpb"]["ttt"])
        assert summary["bpb"]["ttt"] != summary["bpb"]["quantized"]
    # Sums over ranks round differently, and the first AdamW step of an adapter is the sign of its gradient.
    assert scores[0] == pytest.approx(scores[1], rel=2e-5)


def test_learning_before_scoring_stops_the_run(tiny, monkeypatch):
    """Both kinds of SGD check that what they learn is scored: here no score is written."""
    for mode, name in (("chunk_sgd", "score_windows"), ("doc_lora phased", "adapt_documents")):
        with monkeypatch.context() as patch:
            patch.setattr(t, "STREAMS", 2)
            patch.setattr(t, name, lambda *arguments, **named: None)
            with pytest.raises(t.Stop, match="before they are learnt"):
                tally_of(replace(tiny, **MODES[mode]), stream(tiny))


@pytest.mark.parametrize("mode", ["chunk_sgd", "doc_lora phased"])
def test_the_ledger_chains_scores_and_updates(tiny, mode, monkeypatch):
    """Each update starts from the weights of the record before; each score has those of the last update."""
    monkeypatch.setattr(t, "STREAMS", 2)
    events = []
    monkeypatch.setattr(t.Run, "ledger", lambda run, event, **values: events.append((event, values)))
    tally_of(replace(tiny, **MODES[mode]), stream(tiny))
    weights = events[0][1]["weights"]
    assert events[0][0] == "scored" and {event for event, _ in events} == {"scored", "update"}
    for event, values in events[1:]:
        if event == "update":
            assert values["before"] == weights and values["after"] != weights
            weights = values["after"]
        else:
            assert values["weights"] == weights
