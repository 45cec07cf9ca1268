"""The network: routes, parameter counts, the equations of its variants, causality."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from helpers.tensors import perturbed, tokens
from helpers.trainer import replace

FULL = t.Config()
PLAIN = {"head_gate": "none", "smear_gate": False}
BIGRAMS = {"bigram_rows": 97, "bigram_width": 6}


@pytest.mark.parametrize(
    "changes, plain, looped",
    [
        ({"parallel_residual": "none"}, "0 1 2 3 4 | 5 6 7 8 9 10", "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7 8 9 10"),
        (
            {"parallel_residual": "gptj", "parallel_start_layer": 7},
            "0 1 2 3 4 | 5 6 7+ 8+ 9+ 10+",
            "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7+ 8+ 9+ 10+",
        ),
        ({}, "0 1 2 3 4 | 5 6 7 8= 9= 10=", "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7 8= 9= 10="),
        ({"num_loops": 1}, "0 1 2 3 4 | 5 6 7 8= 9= 10=", "0 1 2 3 4 5 3 | 4 5 6 7 8= 9= 10="),
        ({"num_loops": 0}, "0 1 2 3 4 | 5 6 7 8= 9= 10=", "0 1 2 3 4 | 5 6 7 8= 9= 10="),
    ],
)
def test_routes(changes, plain, looped):
    config = replace(FULL, **changes)
    assert t.show_route(t.make_route(config, 0)) == plain
    assert t.show_route(t.make_route(config, config.num_loops)) == looped


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_loops": 0},
        {"num_loops": 3, "loop_start": 0, "loop_end": 10},
        {"num_layers": 1, "loop_start": 0, "loop_end": 0},
        {"num_layers": 6},
    ],
)
def test_every_skip_that_is_pushed_is_popped_and_has_parameters(changes):
    config = replace(FULL, **changes)
    for loops in t.loop_states(config):
        route, depth = t.make_route(config, loops), 0
        for visit in route:
            depth += visit.pushes_skip - (visit.skip_row is not None)
            assert depth >= 0
        assert depth == 0
        pops = [visit.skip_row for visit in route if visit.skip_row is not None]
        rows = t.parameter_table(config)["skip_weights"].shape[0] if pops else 0
        assert pops == list(range(len(pops))) and len(pops) <= rows


@pytest.mark.parametrize(
    "changes, count",
    [
        (PLAIN | {"parallel_residual": "gptj", "parallel_start_layer": 7}, 35_944_536),  # #1738, #1755
        (PLAIN | {"parallel_residual": "two_lane"}, 35_944_602),  # #1585
        ({"head_gate": "attn_out"}, 35_945_671),  # #1693
    ],
)
def test_parameter_counts_of_the_published_systems(changes, count):
    table = t.parameter_table(replace(FULL, **changes))
    assert sum(math.prod(spec.shape) for spec in table.values()) == count
    assert len(t.list_matrices(table)) == 67 and len({m.key for m in t.list_matrices(table)}) == 67
    assert all(math.prod(spec.shape) <= 65_536 for spec in table.values() if spec.quantizer == "fp16")


def make(config: t.Config, seed: int = 0, **changes) -> t.GPT:
    """A model in fp64 whose parameters are all far from their neutral initial values."""
    torch.manual_seed(seed)
    model = perturbed(t.GPT(replace(config, **changes), dtype=torch.float64).double(), 0.3)
    model.looped = True
    return model


def published_smear(model: t.GPT, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """#1667 token by token: each takes of the one before, with #1851 a BOS nothing."""
    c = model.config
    smeared = x.clone()
    for row in range(ids.size(0)):
        for p in range(1, ids.size(1)):
            if not (c.smear_gate_bos_fix and ids[row, p] == t.BOS):
                seen = x[row, p, : c.gate_width or None]
                gate = torch.sigmoid(model.smear_w[0].detach() @ seen)
                smeared[row, p] = x[row, p] + model.smear_lambda.detach() * gate * x[row, p - 1]
    return smeared


def bigrams(c: t.Config, w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """#1716 pair by pair, with a sign (modded-nanogpt #299): none at the start of a row or a document."""
    added = torch.zeros(*ids.shape, c.model_dim, dtype=torch.float64)
    for row, column in torch.cartesian_prod(torch.arange(ids.size(0)), torch.arange(1, ids.size(1))).tolist():
        before, here = ids[row, column - 1 : column + 1].tolist()
        mixed = c.vocab_size * before + here
        for factor in (1640531527, 668265263):
            mixed = mixed * factor % 2**32
            mixed ^= mixed >> 15
        entry = w["bigram_rows"][mixed * c.bigram_rows // 2**32] * (-1) ** mixed
        if here != t.BOS:
            added[row, column] = w["bigram_out"][0] @ entry
    return added


def dense_share(w: dict[str, torch.Tensor], place: int, x: torch.Tensor, streams: list) -> torch.Tensor:
    """What MUDD adds to x: streams by weights of a two-layer perceptron of the normalised x (#259)."""
    hidden = (
        x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps) @ w["mudd_read"][place].T
    )
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    weights = hidden @ w["mudd_write"][place].T / math.sqrt(hidden.size(-1))
    return sum(weights[..., k : k + 1] * stream for k, stream in enumerate(streams))


def reference(model: t.GPT, batch: t.Batch, lora: t.LoRA | None = None) -> torch.Tensor:
    """The network written out a second time, from the published equations, with branches on layer numbers."""
    c, w = model.config, {n: p.detach() for n, p in model.named_parameters()}
    base = c.rope_base
    if c.rope_yarn and batch.inputs.size(1) > c.train_seq_len:
        base *= (batch.inputs.size(1) / c.train_seq_len) ** (c.rope_dims / (c.rope_dims - 2))
    window = c.gate_width or c.model_dim

    def delta(site, visit, x):  # of the adapters, document by document
        if lora is None or site not in lora.read:
            return 0
        scale = c.ttt_lora_alpha / c.ttt_lora_rank if c.ttt_lora_alpha else 1
        pairs = zip(lora.read[site][visit].detach(), lora.write[site][visit].detach(), strict=True)
        return torch.stack([x[d] @ (b @ a).T.double() * scale for d, (a, b) in enumerate(pairs)])

    layers, heads, kv_heads, width = c.num_layers, c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
    rms = lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)

    def rope(x):  # (B, T, H, D)
        half = c.rope_dims // 2
        out = x.clone()
        for j in range(half):
            angle = torch.arange(x.size(1), dtype=torch.float32) * (base ** -(2 * j / c.rope_dims))
            cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]
            out[..., j] = x[..., j] * cos + x[..., half + j] * sin
            out[..., half + j] = -x[..., j] * sin + x[..., half + j] * cos
        return out

    def attention(i, x, u, visit):
        B, T, _ = x.shape
        raw = x @ w["qo"][i].T + delta("q", visit, x)
        q = raw.view(B, T, heads, width)
        k = (x @ w["kv"][i].T + delta("k", visit, x)).view(B, T, kv_heads, width)
        v = (x @ w["kv"][layers + i].T + delta("v", visit, x)).view(B, T, kv_heads, width)
        q, k = rope(rms(q)) * w["q_gain"][i][:, None], rope(rms(k))
        out = torch.zeros(B, T, heads, width, dtype=x.dtype)
        future = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
        for h in range(heads):
            g = h // (heads // kv_heads)
            score = (q[:, :, h] @ k[:, :, g].mT / math.sqrt(width)).masked_fill(future, -torch.inf)
            y = score.softmax(-1) @ v[:, :, g]
            if i >= layers - c.xsa_last_n:
                unit = v[:, :, g] / v[:, :, g].norm(dim=-1, keepdim=True)
                y = y - (y * unit).sum(-1, keepdim=True) * unit
            if c.head_gate != "none":
                seen = {"residual": u, "proj": x, "q": raw}[c.gate_attn_src][..., :window] @ w["head_gate"][
                    i, h
                ]
                gate = (
                    2 / (1 + torch.exp(-seen))
                    if c.head_gate == "attn_out"
                    else 1 / (1 + torch.exp(-seen * c.sparse_attn_gate_scale))
                )
                y = y * gate[..., None]
            out[:, :, h] = y
        return out.reshape(B, T, -1) @ w["qo"][layers + i].T + delta("o", visit, x)

    def mlp(i, x, visit):
        z = x @ w["up"][i].T
        return torch.where(z > 0, z * z, z * z / 4) @ w["down"][i].T + delta("down", visit, x)

    order = (
        list(range(c.loop_end + 1))
        + list(range(c.loop_start, c.loop_end + 1)) * c.num_loops
        + list(range(c.loop_end + 1, layers))
    )
    half, skips, lanes = len(order) // 2, [], None
    x, ids = w["embed"][batch.inputs], batch.inputs
    smeared = c.smear_gate_order if c.smear_gate else "never"
    if smeared == "before_norm":
        x = published_smear(model, x, ids)
    x = rms(x)
    if "hash_embed" in w:
        before = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
        x = x + w["hash_embed"][(2039 * before + ids) % c.hash_embed_size]
    if smeared == "after_norm":
        x = published_smear(model, x, ids)
    if c.bigram_rows:
        x = x + bigrams(c, w, ids)
    x0 = x
    outputs, dense = [], len(order) - c.mudd_last_n
    for place, i in enumerate(order):
        if place >= dense:
            spread = [outputs[max(0, dense * third // 3 - 1)] for third in (1, 2, 3)]
            x = x + dense_share(w, place - dense, x, [x0, *spread])
        depth = 1 / math.sqrt(i + 1) if c.ln_scale else 1
        two = c.parallel_residual == "two_lane" and i >= c.parallel_start_layer and place >= half
        if two and lanes is None and c.parallel_first_skip == "lane0":
            lanes = x
        if half <= place < 2 * half:
            j = place - half
            skip = w["skip_weights"][j] * skips.pop()
            if c.skip_gates_enabled:
                gate = torch.sigmoid(w["skip_gates"][j])
                x = gate * x + (1 - gate) * skip
            else:
                x = x + skip
        if two and lanes is None:
            lanes = x
        mix, sa, sm = w["resid_mix"][i], w["attn_scale"][i], w["mlp_scale"][i]
        u = mix[0] * x + mix[1] * x0
        a = sa * attention(i, depth * rms(u), u, place)
        if two:
            m, rho, pi = (
                sm * mlp(i, depth * rms(lanes), place),
                w["parallel_resid_lambdas"][i],
                w["parallel_post_lambdas"][i],
            )
            x, lanes = rho[0] * x + pi[0, 0] * a + pi[1, 0] * m, rho[1] * lanes + pi[0, 1] * a + pi[1, 1] * m
        elif c.parallel_residual == "gptj" and i >= c.parallel_start_layer:
            x = u + a + sm * mlp(i, depth * rms(u), place)
        else:
            h = u + a
            x = h + sm * mlp(i, depth * rms(h), place)
        if place < half:
            skips.append(x)
        outputs.append(x)
    x = rms(x if lanes is None else (x + lanes) / 2)
    logits = c.logit_softcap * torch.tanh((x @ w["embed"].T + delta("head", 0, x)) / c.logit_softcap)
    return -logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel_first_skip": "both"},
        {"parallel_residual": "gptj", "parallel_start_layer": 2},
        {"parallel_residual": "none"},
        {"skip_gates_enabled": False, "xsa_last_n": 2, "ln_scale": False},
        {
            "num_layers": 7,
            "num_loops": 2,
            "loop_start": 2,
            "loop_end": 3,
            "parallel_start_layer": 4,
            "num_kv_heads": 1,
        },
        {"num_heads": 2, "num_kv_heads": 2, "rope_dims": 16, "mlp_mult": 1.5},
        PLAIN,
        {
            "head_gate": "attn_out",
            "gate_attn_src": "residual",
            "smear_gate_bos_fix": False,
            "smear_gate_order": "after_norm",
        },  # #1693
        {"head_gate": "attn_out", "gate_attn_src": "proj", "gate_width": 5},  # #1667
        {"head_gate": "attn_out", "gate_attn_src": "q", "gate_width": 0},
        {"head_gate": "sparse", "gate_attn_src": "residual", "sparse_attn_gate_scale": 1.5},
        {"rope_yarn": True, "train_seq_len": 16},
        BIGRAMS | {"smear_gate_order": "after_norm", "mudd_last_n": 2},
        {"parallel_residual": "none", "mudd_last_n": 3, "num_loops": 0},
    ],
)
def test_the_one_forward_equals_the_published_equations(config, changes):
    model = make(config, **changes)
    batch = tokens(config)
    batch.inputs[:, 7] = t.BOS  # where the smear gate may or may not be shut
    ours, theirs = model(batch), reference(model, batch)
    # The one difference left: losses leave in fp32.
    assert torch.allclose(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    assert theirs.std() > 0.1


@pytest.mark.parametrize("bos_fix", [True, False])
@pytest.mark.parametrize("order", ["before_norm", "after_norm"])
def test_the_smear_gate_is_the_published_one(config, order, bos_fix):
    """On a packed row of two documents, the second cut at 25, where our own shutting changes one token."""
    changes = {"smear_gate_order": order, "smear_gate_bos_fix": bos_fix, "smear_gate_segment_fix": False}
    model = make(config, **changes)
    inputs, targets, *_ = tokens(config, rows=1, length=40)
    inputs[:, 9] = t.BOS
    batch = t.Batch(inputs, targets, t.pad_starts(np.array([0, 9, 25]), 40), 16)
    raw = model.embed[inputs]
    if order == "before_norm":
        expected = t.rms_norm(published_smear(model, raw, inputs))
    else:
        expected = published_smear(model, t.rms_norm(raw), inputs)
    assert torch.allclose(model.embedding(batch, t.Hooks()), expected)

    model.config = replace(model.config, smear_gate_segment_fix=True)
    differs = ~torch.isclose(model.embedding(batch, t.Hooks()), expected).all(-1)[0]
    assert differs.nonzero().flatten().tolist() == ([25] if bos_fix else [])
    assert torch.allclose(model.embedding(batch, t.Hooks())[:, 25], t.rms_norm(raw[:, 25])) == bos_fix


def test_the_default_smears_as_the_audited_system_does():
    """#1855: the embedding as it is stored, shut at every BOS."""
    assert (FULL.smear_gate, FULL.smear_gate_order, FULL.smear_gate_bos_fix) == (True, "before_norm", True)


@pytest.mark.parametrize(
    "changes", [{}, {"head_gate": "attn_out", "gate_attn_src": "q"}, {"ttt_lora_alpha": 0.0}]
)
def test_adapters_are_low_rank_deltas_of_each_document(config, changes):
    model = make(config, **changes)
    lora, batch = t.LoRA(model.config, 2, torch.device("cpu")), tokens(config)
    lora.reset(0)
    assert torch.equal(model(batch, lora=lora), model(batch)), "B = 0: no delta"
    for write in lora.write.values():
        write.data.normal_(generator=torch.Generator().manual_seed(1))
    adapted = model(batch, lora=lora)
    assert torch.allclose(adapted.double(), reference(model, batch, lora), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, model(batch), atol=0.1)
    for write in lora.write.values():
        write.data[:, 1] = 0
    half = model(batch, lora=lora)  # each document has its own adapter
    assert torch.equal(half[0], adapted[0]) and torch.allclose(half[1], model(batch)[1], atol=1e-6)


def test_fresh_adapters_depend_on_the_seed_alone(config):
    lora, other = (t.LoRA(config, 3, torch.device("cpu")) for _ in range(2))
    lora.reset(5), other.reset(5)
    assert all(torch.equal(lora.read[site], other.read[site]) for site in lora.read)
    bound = config.model_dim**-0.5
    for read in lora.read.values():
        assert read.abs().max() <= bound and read.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    other.reset(6)
    assert not torch.equal(lora.read["q"], other.read["q"]) and not any(p.any() for p in other.write.values())
    assert set(
        t.LoRA(replace(config, ttt_k_lora=False, ttt_mlp_lora=False), 3, torch.device("cpu")).read
    ) == {
        "q",
        "v",
        "o",
        "head",
    }


def test_the_hash_embedding_adds_the_row_of_each_pair(config):
    model = make(config, hash_embed_enabled=True, ttt_mode="chunk_sgd", hash_embed_size=97, loader="packed")
    batch = tokens(config, rows=1, length=40)
    plain = model(batch)
    model.hash_embed = torch.nn.Parameter(0.1 * torch.randn(97, config.model_dim, dtype=torch.float64))
    hashed = model(batch)
    assert torch.allclose(hashed.double(), reference(model, batch), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(hashed, plain, atol=1e-3)
    # In a packed row each segment starts without a previous token, like a row of its own.
    model = make(config, hash_embed_enabled=True, ttt_mode="chunk_sgd", hash_embed_size=97, smear_gate=False)
    model.hash_embed = torch.nn.Parameter(0.1 * torch.randn(97, config.model_dim, dtype=torch.float64))
    packed = model(t.Batch(*batch[:2], torch.tensor([0, 13, *[40] * 62], dtype=torch.int32), 40))
    alone = model(t.Batch(batch.inputs[:, 13:], batch.targets[:, 13:]))
    assert torch.allclose(packed[:, 13:], alone, atol=1e-5)


def test_the_loop_switch_changes_the_route_only(config):
    model, batch = make(config), tokens(config)
    looped = model(batch)
    model.looped = False
    assert not torch.allclose(model(batch), looped)
    single = make(config, num_loops=0)
    single.load_state_dict({n: p[: single.get_parameter(n).shape[0]] for n, p in model.state_dict().items()})
    assert torch.equal(model(batch), single(batch))


def test_a_loss_depends_on_the_past_only(config):
    model, batch = make(config), tokens(config)
    before = model(batch)
    for place in (1, 17, 31):
        changed = batch.inputs.clone()
        changed[:, place] = (changed[:, place] + 1) % config.vocab_size
        after = model(t.Batch(changed, batch.targets))
        assert torch.equal(before[:, :place], after[:, :place]) and not torch.equal(
            before[:, place], after[:, place]
        )


@pytest.mark.parametrize("changes", [{}, BIGRAMS])
def test_packed_documents_do_not_see_each_other(config, changes):
    model = make(config, loader="packed", **changes)
    batch = tokens(config, rows=1, length=40)
    batch.inputs[:, [13, 30]] = t.BOS  # shuts the smear gate
    starts = torch.tensor([0, 13, 30, *[40] * 61], dtype=torch.int32)
    packed = model(t.Batch(batch.inputs, batch.targets, starts, 40))
    for a, b in ((0, 13), (13, 30), (30, 40)):
        alone = model(t.Batch(batch.inputs[:, a:b], batch.targets[:, a:b]))
        # Positions differ, but only distances matter to the rotation; its fp32 tables leave such rounding.
        assert torch.allclose(packed[:, a:b], alone, atol=1e-5)


def test_the_tap_sees_the_input_of_every_matrix(config):
    model, batch, seen = make(config, **BIGRAMS, mudd_last_n=2), tokens(config), {}
    model(batch, lambda site, layer, x, _: seen.setdefault((site, layer), []).append(x))
    keys = {m.key for m in t.list_matrices(model.table)}
    assert set(seen) == keys | {
        (site, layer) for site in "kv" for layer in range(4)
    }  # whose input is that of q
    assert [len(seen["up", i]) for i in range(4)] == [1, 2, 2, 1]  # looped layers once per visit
    rows = seen.pop(("bigram", 0))[0]  # a table has no product: it is told which rows are read
    assert (rows[:, 0] == -1).all() and (rows[:, 1:] >= 0).all() and rows.max() < 97
    for m in t.list_matrices(model.table):
        if m.parameter == "bigram_rows":
            continue
        weight = model.get_parameter(m.parameter)
        assert seen[m.key][0].size(-1) == (weight if m.index is None else weight[m.index]).size(-1)


@pytest.mark.parametrize("dense", [False, True])
def test_the_forward_is_one_graph_in_both_loop_states(config, dense):
    """A graph break would be an error (fullgraph). Attention of packed rows, a GPU kernel, is left out."""
    config = replace(config, num_layers=3, loop_end=1, parallel_start_layer=2, xsa_last_n=2, **BIGRAMS)
    config = replace(config, mudd_last_n=int(dense))
    model, batch = t.GPT(config, fused=True), tokens(config, rows=1, length=8)  # little to interpret
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for looped in (False, True):
        model.looped = looped
        assert torch.allclose(compiled(batch), model(batch), atol=1e-5)
        compiled(batch).mean().backward()


def test_initial_values(config):
    torch.manual_seed(0)
    model = t.GPT(replace(config, **BIGRAMS, mudd_last_n=2))
    layers = config.num_layers
    assert (model.qo[layers:] == 0).all() and (model.down == 0).all() and (model.q_gain == 5.25).all()
    for bank in (model.qo[:layers], model.kv, model.up):
        for matrix in bank:
            small = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
            assert torch.allclose(small @ small.T, torch.eye(len(small)), atol=1e-5)
    # With zero output projections every block is the identity, so the head sees skip mixes of x0 alone.
    batch = tokens(config)
    x0 = t.rms_norm(F.embedding(batch.inputs, model.embed))
    assert torch.allclose(model.trunk(batch, t.Hooks()), t.rms_norm(x0), atol=1e-5)


def test_gradients_match_finite_differences(config):
    model, batch = make(config, **BIGRAMS, mudd_last_n=2), tokens(config, rows=1, length=12)
    loss = model(batch).double().mean()
    loss.backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        slope = (parameter.grad * direction).sum().item()
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                parameter += sign * 1e-4 * direction
                losses.append(reference(model, batch).mean().item())
                parameter -= sign * 1e-4 * direction
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=2e-3, abs=2e-6), name


def test_pytorchs_varlen_kernel_is_called_as_its_signature_asks(monkeypatch):
    """The kernel itself needs a GPU; an argument that this torch does not have would end a run there."""
    from torch.nn.attention import varlen

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, **_):
        assert window_size == (-1, 0) and max_q == max_k == 8
        assert torch.equal(cu_q, cu_k) and cu_q is not cu_k
        return t.attend_sdpa(q[None], k[None], v[None], cu_q, max_q)[0]

    fake = mock.create_autospec(varlen.varlen_attn, side_effect=stand_in)
    fake.__kwdefaults__ = varlen.varlen_attn.__kwdefaults__
    monkeypatch.setattr(varlen, "varlen_attn", fake)
    q, k, v = (torch.randn(1, 12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    starts = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
    found = t.attend_flash("varlen")(q, k, v, starts, 8)
    assert fake.called and torch.allclose(found, t.attend_sdpa(q, k, v, starts, 8))
