"""What an evaluation on GPUs must not do: compile, wait or sum on its clock; and what it has as published."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import train_gpt as t
from helpers.tensors import perturbed
from helpers.trainer import replace


@torch.library.custom_op("findings::attention_input", mutates_args=())
def attention_input(q: torch.Tensor, dropout: float) -> torch.Tensor:
    return q.clone()


@attention_input.register_fake
def _(q, dropout):
    return torch.empty_like(q)


class AttentionInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, dropout):
        return attention_input(q, dropout)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def pass_through(q, dropout=0.0):
    """As FlashAttention's interface: an autograd.Function with a float default."""
    return AttentionInput.apply(q, dropout)


def attend(q, k, v, starts, longest):
    """Dense attention behind a float default; a whole graph cannot cut rows by document without a GPU."""
    out = t.attend_sdpa(pass_through(q), k, v, None, longest)
    return out if starts is None else out + 0 * starts.sum()


@pytest.fixture
def tiny(config, monkeypatch):
    """Settings of a compiled evaluation in seconds; compiled without code generation."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k, backend="eager"))
    monkeypatch.setattr(t, "pick_attention", lambda *_: attend)
    monkeypatch.setattr(t.Run, "log", lambda *_, **named: None)
    torch._dynamo.reset()
    return replace(
        config,
        compile="on",
        loader="packed",
        vocab_size=64,
        num_layers=2,
        num_loops=0,
        parallel_residual="none",
        xsa_last_n=2,
        val_batch_tokens=8 * 2 * 32,
        ttt_batch_size=2,
        phased_ttt_num_phases=2,
        phased_ttt_prefix_docs=12,
        ttt_chunk_tokens=128,
    )


def text(lengths, seed=0):
    """Validation tokens of documents with so many targets each."""
    random = np.random.default_rng(seed)
    parts = [np.append(t.BOS, random.integers(4, 64, length)) for length in lengths]
    return np.concatenate(parts).astype("<u2")


def validation_of(tokens):
    return t.Validation(tokens, np.ones(len(tokens), np.int32), "test")


def play_rank(run, rank, world):
    """Let `run` do what this rank does."""
    run.rank, run.world_size, run.streams = rank, world, range(rank, t.STREAMS, world)
    return run


def alone(monkeypatch):
    """No other rank is there: nothing is summed, and what the others score is not missed."""
    monkeypatch.setattr(t.Run, "sum_over_ranks", lambda run, tensor: tensor)
    monkeypatch.setattr(t.Run, "sum_on_hosts", lambda run, value: value)
    monkeypatch.setattr(t.Run, "on_main_rank", lambda run, action: action())
    monkeypatch.setattr(t.Tally, "require", lambda *_: None)
    monkeypatch.setattr(t.Tally, "total", lambda tally, stage: t.Score(1.0, 1, 1, tally.nats))


# === GRAPHS ===


def test_adapters_on_fused_operators_have_two_graphs_for_any_context(tiny, monkeypatch):
    """One with gradients and one without, although documents and batches have many lengths."""
    run = t.Run(replace(tiny, kernels="triton", mlp_kernel="triton", val_batch_tokens=256))
    built = t.build(run)
    assert built.model.fused and built.model.feed_forward is not t.mlp_reference
    forward = torch.compile(built.model, dynamic=True, fullgraph=True)
    built.model.requires_grad_(False)
    tally = t.Tally(run, validation_of(text([18, 5, 3])))
    documents = t.find_documents(tally.validation.tokens)
    graphs = []
    for seed, batch in enumerate(([0, 1], [2])):
        before = t.compiled_graphs()
        t.adapt_documents(run, forward, tally, documents[batch], seed)
        graphs.append(t.compiled_graphs() - before)
    assert graphs == [2, 0]
    assert (tally.times[1:] == 1).all()


@pytest.mark.parametrize(
    "mode, rank, world",
    [("chunk_sgd", 0, 1), ("doc_lora", 3, 4), ("chunk_sgd", 9, 16), ("doc_lora", 9, 16)],
)
def test_the_rehearsal_meets_every_shape(tiny, monkeypatch, tmp_path, mode, rank, world):
    """Plain, sliding and learnt scores with a hash embedding, on every rank: none is left to the clock."""
    (tmp_path / "model.ptz").write_bytes(b"stands for an artifact")
    settings = replace(
        tiny,
        stage="evaluate",
        artifact=str(tmp_path / "model.ptz"),
        sliding_window_enabled=True,
        hash_embed_enabled=True,
        hash_embed_size=97,
        ttt_mode=mode,
    )
    alone(monkeypatch)
    run = play_rank(t.Run(settings), rank, world)
    run.folder = tmp_path
    built = t.build(run)
    weights = {name: weight.clone() for name, weight in built.model.state_dict().items()}
    tokens = text([1, 1, 2, 60, 17, 64, 33, 3, 90, 8, 47, 40, 15, 16, 48, 31, 50, 65, 5, 80, 29])
    facts, graphs, read = {}, [], []
    manifest = {"model": settings.chosen("Model"), "looped": False}
    monkeypatch.setattr(t, "decode_artifact", lambda path: (manifest, {}, "digest"))
    monkeypatch.setattr(t, "check_tensors", lambda *_: None)
    monkeypatch.setattr(t, "assemble_weights", lambda table, tensors: weights)
    monkeypatch.setattr(t, "load_validation", lambda data: read.append(1) or validation_of(tokens))
    monkeypatch.setattr(t, "record_stage", lambda run, stage, values: facts.update(values))
    monkeypatch.setattr(t, "summarize", lambda *_: None)
    real = t.measure

    def measure(run, validation, stage, how):
        zero = built.model.hash_embed is not None and not built.model.hash_embed.any()
        assert zero and torch.equal(built.model.qo, weights["qo"]), "the stage starts from the artifact"
        before = t.compiled_graphs()
        result = real(run, validation, stage, how)
        graphs.append((stage, t.compiled_graphs() - before))
        return result

    monkeypatch.setattr(t, "measure", measure)
    before = t.compiled_graphs()
    t.evaluate_stage(run, None, built)
    learns = len(run.streams) > 0  # a rank above the eighth only scores windows
    assert t.compiled_graphs() >= before + 1 + learns and read == [1]
    assert graphs == [("quantized", 0), ("sliding", 0), ("ttt", 0)]
    assert facts["graphs_inside_eval_clock"] == 0 and list(facts["bpb"]) == ["quantized", "sliding", "ttt"]


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_training_on_validation_text_is_rehearsed(tiny, monkeypatch, rank, world):
    """Its last chunk is shorter, and needs no graph of its own."""
    settings = replace(
        tiny,
        prequant_ttt_enabled=True,
        prequant_ttt_epochs=2,
        prequant_ttt_chunk_tokens=96,
        ttt_enabled=False,
    )
    alone(monkeypatch)
    run = play_rank(t.Run(settings), rank, world)
    built = t.build(run)
    weights = {name: weight.clone() for name, weight in built.model.state_dict().items()}
    monkeypatch.setattr(t, "load_validation", lambda data: validation_of(text([70] * 6)))
    monkeypatch.setattr(t, "record_stage", lambda *_: None)
    graphs, real = [], t.prequant_ttt

    def learn(run, model, validation):
        before = t.compiled_graphs()
        real(run, model, validation)
        graphs.append(t.compiled_graphs() - before)

    monkeypatch.setattr(t, "prequant_ttt", learn)
    t.train_on_validation(run, None, built, weights)
    assert graphs[0] > 0 and graphs[1:] == [0]


def test_one_graph_serves_any_number_of_segment_starts(tiny, tmp_path):
    assert [len(t.pad_starts(np.arange(count), 10_000)) for count in (1, 63, 64, 130)] == [64, 64, 128, 192]
    built = t.build(t.Run(tiny))
    before = t.compiled_graphs()
    for count in (1, 70, 130, 200):
        starts = t.pad_starts(np.arange(count), 512)
        inputs, targets = torch.randint(4, 64, (2, 1, 512))
        batch = t.Batch(inputs, targets, starts, 32)
        losses = built.forward(batch)
        losses.sum().backward()
        assert torch.allclose(losses, built.model(batch), atol=1e-5)
    assert t.compiled_graphs() == before + 1


# === NOTHING WAITS ===


def test_scores_and_adapters_never_ask_the_device(tiny):
    """On the meta device whatever needs a value of a tensor raises: masks as indices, item, nonzero."""
    run = t.Run(replace(tiny, loader="shuffled"))
    run.device = torch.device("meta")
    tokens = text([40, 5, 23])

    class Adapters(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

        def reset(self, seed):
            pass

    lora = Adapters()
    shapes = []

    def forward(batch, lora=lora):
        assert batch.inputs.device.type == "meta"
        shapes.append(tuple(batch.inputs.shape))
        return batch.targets * lora.weight

    tally = t.Tally(run, validation_of(tokens))
    t.score_sliding(run, forward, 8, tally)
    t.adapt_documents(run, forward, tally, t.find_documents(tokens)[:1], 0, lora)
    assert (2, 32) in shapes and (2, 16) in shapes


def test_documents_and_the_unquantised_model_come_after_the_clock(tiny, monkeypatch, tmp_path):
    (tmp_path / "final_model.ptz").write_bytes(b"stands for an artifact")
    settings = replace(tiny, compile="off", ttt_enabled=False, sliding_window_enabled=False)
    run, facts, events = t.Run(settings), {}, []
    run.folder = tmp_path
    built = t.build(run)
    weights = {name: weight.clone() for name, weight in built.model.state_dict().items()}
    other = {name: weight + 0.1 for name, weight in weights.items()}
    manifest = {"model": settings.chosen("Model"), "looped": False}
    monkeypatch.setattr(t, "decode_artifact", lambda path: (manifest, {}, "digest"))
    monkeypatch.setattr(t, "check_tensors", lambda *_: None)
    monkeypatch.setattr(t, "assemble_weights", lambda table, tensors: weights)
    monkeypatch.setattr(t, "load_checkpoint", lambda run, data: {"complete": True, "average": other})
    monkeypatch.setattr(t, "load_validation", lambda data: validation_of(text([40, 30])))
    monkeypatch.setattr(t, "record_stage", lambda run, stage, values: facts.update(values))
    monkeypatch.setattr(t, "summarize", lambda *_: None)
    monkeypatch.setattr(t.Run, "ledger", lambda run, event, **values: events.append(event))
    measure, save = t.measure, t.save_document_sums
    monkeypatch.setattr(t, "measure", lambda *given: events.append(given[2]) or measure(*given))
    monkeypatch.setattr(t, "save_document_sums", lambda *given: events.append("documents") or save(*given))
    t.evaluate_stage(run, None, built)
    clock = ["eval_clock_start", "validation_read", "quantized", "eval_clock_end"]
    assert events == [*clock, "documents", "prequant"]
    assert list(facts["bpb"]) == ["prequant", "quantized"] and facts["val_bpb"] == facts["bpb"]["quantized"]
    assert facts["bpb"]["prequant"] != facts["val_bpb"]
    assert all(torch.equal(value, weights[name]) for name, value in built.model.state_dict().items())
    with np.load(tmp_path / "documents.npz") as found:
        nats = found["nats"].sum()
    assert nats == pytest.approx(facts["val_loss"] * facts["val_tokens"]), "those of the score that counts"


def test_the_allocator_is_chosen_unless_the_user_did():
    fresh = {}
    t.choose_allocator(fresh)
    assert fresh == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        own = {name: "max_split_size_mb:64"}
        t.choose_allocator(own)
        assert own == {name: "max_split_size_mb:64"}
        assert t.describe_allocator(own) == f"{name}=max_split_size_mb:64"


# === AS PUBLISHED ===


def segments(batch):
    """The places where the segments of a packed batch start."""
    return np.unique(batch.starts.numpy())[:-1].tolist()


def test_segments_run_on_over_row_edges():
    """A document that begins in a row goes on in the next; it is cut where it is as long as a row."""
    tokens = np.full(49, 7)
    tokens[5] = t.BOS
    plan = t.plan_windows(49, 16, 16)
    batches = {packed: t.window_batch(tokens, plan, 4, 16, packed)[0] for packed in (1, 2, 4)}
    assert segments(batches[4]) == [0, 5, 21, 37, 48], "the fourth row is empty"
    assert segments(batches[2]) == [0, 5, 21, 32, 48]
    assert segments(batches[1]) == [0, 5, 16, 32, 48]
    overlapping, _, _ = t.window_batch(tokens, t.plan_windows(49, 16, 8)[:3], 3, 16, 3)
    assert segments(overlapping) == [0, 5, 16, 32]


def build_eager(config):
    torch.manual_seed(0)
    return perturbed(t.GPT(config), 0.1)


def test_plain_scores_are_those_of_rows_one_behind_the_other(tiny, monkeypatch):
    """Of 2 rows a batch, whatever the number of ranks."""
    monkeypatch.setattr(t.Run, "sum_over_ranks", lambda run, tensor: tensor)
    tokens = text([40, 9, 75, 2, 33, 60, 17])
    model = build_eager(tiny)
    expected = torch.zeros(len(tokens))
    for first in range(0, len(tokens) - 1, 64):
        ids = torch.from_numpy(tokens[first : first + 65].astype(np.int64))[None]
        starts = t.segment_starts(ids[0, :-1].numpy(), 32)
        with torch.no_grad():
            expected[first + 1 : first + 65] = model(t.Batch(ids[:, :-1], ids[:, 1:], starts, 32))[0]
    for world in (1, 2, 8):
        tallies = []
        for rank in range(world):
            tallies.append(t.Tally(play_rank(t.Run(tiny), rank, world), validation_of(tokens)))
            t.score_sliding(tallies[-1].run, model, 32, tallies[-1])
        assert torch.allclose(sum(tally.nats for tally in tallies), expected, rtol=1e-5, atol=1e-5)
        assert (sum(tally.times for tally in tallies)[1:] == 1).all()


def test_a_phase_learns_the_same_on_any_number_of_ranks(tiny, monkeypatch):
    """Each stream has adjacent rows over which segments run on, as each of 8 ranks has as published."""
    monkeypatch.setattr(t.Run, "sum_over_ranks", lambda run, tensor: tensor)
    tokens = text([150, 90, 300, 60])
    gradients, starts, real = {}, [], t.window_batch

    def window_batch(*given):
        found = real(*given)
        starts.append(segments(found[0]))
        return found

    monkeypatch.setattr(t, "window_batch", window_batch)
    monkeypatch.setattr(t.Learner, "step", lambda learner: None)
    for world in (1, 2, 4, 8, 16):
        model = build_eager(tiny)
        starts.clear()
        for rank in range(world):
            learner = t.Learner(play_rank(t.Run(tiny), rank, world), model, None, 1.0, 2, packed=True)
            rows = np.arange(0, 16 * 32, 32)  # sixteen rows: two for each stream
            learner.learn_rows(tokens, np.stack([rows, rows + 33, rows + 1], 1))
        gradients[world] = [parameter.grad.clone() for parameter in model.parameters()]
        assert all(64 * stream in starts[0] for stream in range(8 // world)), "cut between streams"
        assert world < 8 or any(32 not in segment for segment in starts), "not between the rows of a stream"
    for world in (2, 4, 8, 16):
        for one, other in zip(gradients[1], gradients[world], strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_shorter_step_is_filled_with_empty_rows(tiny):
    """The gradient is that of the rows that are there."""
    tokens = text([400])
    grads = []
    for larger_before in (False, True):
        model = build_eager(tiny)
        learner = t.Learner(
            t.Run(tiny), model, torch.optim.SGD(model.parameters(), lr=0.0), 1e9, 9, shared=False
        )
        starts = np.arange(0, 5 * 32, 32)
        plan = np.stack([starts, starts + 33, starts + 1], 1)
        if larger_before:
            learner.learn_rows(tokens, plan)
        learner.step = lambda: None
        learner.learn_rows(tokens, plan[:2])
        assert learner.rows == (5 if larger_before else 2)
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_averaging_leaves_frozen_weights_to_the_bit(tiny, monkeypatch):
    def sum_in_bfloat16(run, tensor):
        """Eight equal values added one by one, as a ring may."""
        once = tensor.bfloat16()
        total = once.clone()
        for _ in range(7):
            total += once
        return tensor.copy_(total)

    monkeypatch.setattr(t.Run, "sum_over_ranks", sum_in_bfloat16)
    run = play_rank(t.Run(tiny), 0, 8)
    model = build_eager(tiny)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    learner = t.Learner(run, model, None, 1.0, 1, freeze=1, shared=False)
    learner.average_over_ranks()
    after = model.state_dict()
    assert torch.equal(after["embed"], before["embed"])
    assert torch.equal(after["qo"][0], before["qo"][0]) and not torch.equal(after["qo"][1], before["qo"][1])


def test_streams_get_equal_work(tiny):
    """By padded tokens, on the lengths of 50,000 documents; dealt back and forth, one has a fifth more."""
    config = t.Config(phased_ttt_num_phases=1, phased_ttt_prefix_docs=2500)
    lengths = (np.random.default_rng(0).lognormal(6.4, 0.9, 50_000) + 2).astype(int).clip(2, 20_000)

    def imbalance(deal):
        """Over both phases, each of which ends with its slowest stream."""
        slowest, mean = 0.0, 0.0
        for batches in t.schedule_documents(config, lengths):
            longest = [int(lengths[batch].max()) for batch in batches]
            plans = [t.plan_chunks(length, 2048, 48) for length in longest]
            work = np.array([(plan[:, 1] - plan[:, 0] - 1).sum() for plan in plans])
            totals = np.array([work[places].sum() for places in deal(longest)])
            slowest += totals.max()
            mean += totals.mean()
        return slowest / mean

    def back_and_forth(longest):
        turn = np.arange(len(longest)) % (2 * t.STREAMS)
        stream = np.minimum(turn, 2 * t.STREAMS - 1 - turn)
        return [np.flatnonzero(stream == number) for number in range(t.STREAMS)]

    ours = imbalance(lambda longest: t.deal_batches(config, longest))
    assert ours < 1.03 and imbalance(back_and_forth) > 1.2
    dealt = t.deal_batches(config, [500, 400, 300, 200, 100])
    assert dealt == t.deal_batches(config, [500, 400, 300, 200, 100])
    assert sorted(place for places in dealt for place in places) == list(range(5))


@pytest.mark.parametrize("warm", [False, True])
def test_a_warm_start_keeps_a_from_full_batch_to_full_batch_of_a_stream(tiny, monkeypatch, warm):
    monkeypatch.setattr(t, "STREAMS", 2)
    config = replace(tiny, compile="off", ttt_warm_start_a=warm, phased_ttt_num_phases=0, ttt_lora_lr=0.02)
    run, model = t.Run(config), build_eager(config)
    tokens, seeds, kept = text([40] * 9), [], []
    reset = t.LoRA.reset

    def watched(lora, seed):
        before = lora.read["head"].detach().clone()
        reset(lora, seed)
        seeds.append(seed)
        kept.append(torch.equal(before, lora.read["head"]))
        assert not any(write.any() for write in lora.write.values())

    monkeypatch.setattr(t.LoRA, "reset", watched)
    tally = t.Tally(run, validation_of(tokens))
    t.doc_lora(run, model, model, tally)
    assert (tally.times[1:] == 1).all()
    # Five batches, the first of one document: streams 0 and 1 take 0, 2, 4 and 1, 3.
    assert seeds == ([0, 2, None, 1, None] if warm else [0, 2, 4, 1, 3])
    assert kept[1:] == [seed is None for seed in seeds[1:]]
