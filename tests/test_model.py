"""The network: routes, parameter counts, the equations of its variants, causality."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from conftest import replace

FULL = t.Config()


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
    assert t.show_route(t.make_route(config, False)) == plain
    assert t.show_route(t.make_route(config, True)) == looped


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
    for looped in (False, True):
        route, depth = t.make_route(config, looped), 0
        for step in route:
            depth += step.push - (step.pop is not None)
            assert depth >= 0
        assert depth == 0
        pops = [step.pop for step in route if step.pop is not None]
        rows = t.param_table(config)["skip_weights"].shape[0] if pops else 0
        assert pops == list(range(len(pops))) and len(pops) <= rows


@pytest.mark.parametrize(
    "changes, count",
    [
        ({"parallel_residual": "gptj", "parallel_start_layer": 7}, 35_944_536),  # #1738, #1755
        ({"parallel_residual": "two_lane"}, 35_944_602),  # #1585
    ],
)
def test_parameter_counts_of_the_published_systems(changes, count):
    table = t.param_table(replace(FULL, **changes))
    assert sum(math.prod(spec.shape) for spec in table.values()) == count
    assert len(t.matrices(table)) == 67 and len({m.key for m in t.matrices(table)}) == 45
    assert all(math.prod(spec.shape) <= 65_536 for spec in table.values() if spec.quantizer == "fp16")


def make(config: t.Config, seed: int = 0, **changes) -> t.GPT:
    """A model in fp64 whose parameters are all far from their neutral initial values."""
    torch.manual_seed(seed)
    model = t.GPT(replace(config, **changes), dtype=torch.float64).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.looped = True
    return model


def tokens(config: t.Config, rows: int = 2, length: int = 32, seed: int = 0) -> t.Batch:
    """Random ids without BOS."""
    ids = torch.randint(4, config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return t.Batch(ids[:, :-1], ids[:, 1:])


def reference(model: t.GPT, batch: t.Batch) -> torch.Tensor:
    """The network written out a second time, from the published equations, with branches on layer numbers."""
    c, w = model.config, {n: p.detach() for n, p in model.named_parameters()}
    layers, heads, kv_heads, width = c.num_layers, c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
    rms = lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)

    def rope(x):  # (B, T, H, D)
        half = c.rope_dims // 2
        out = x.clone()
        for j in range(half):
            angle = torch.arange(x.size(1), dtype=torch.float32) * (c.rope_base ** -(2 * j / c.rope_dims))
            cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]
            out[..., j] = x[..., j] * cos + x[..., half + j] * sin
            out[..., half + j] = -x[..., j] * sin + x[..., half + j] * cos
        return out

    def attention(i, x):
        B, T, _ = x.shape
        q = (x @ w["qo"][i].T).view(B, T, heads, width)
        k = (x @ w["kv"][i].T).view(B, T, kv_heads, width)
        v = (x @ w["kv"][layers + i].T).view(B, T, kv_heads, width)
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
            out[:, :, h] = y
        return out.reshape(B, T, -1) @ w["qo"][layers + i].T

    def mlp(i, x):
        z = x @ w["up"][i].T
        return torch.where(z > 0, z * z, z * z / 4) @ w["down"][i].T

    order = (
        list(range(c.loop_end + 1))
        + list(range(c.loop_start, c.loop_end + 1)) * c.num_loops
        + list(range(c.loop_end + 1, layers))
    )
    half, skips, lanes = len(order) // 2, [], None
    x = x0 = rms(w["embed"][batch.inputs])
    for place, i in enumerate(order):
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
        a = sa * attention(i, depth * rms(u))
        if two:
            m, rho, pi = sm * mlp(i, depth * rms(lanes)), w["parallel_resid_lambdas"][i], w["parallel_post_lambdas"][i]
            x, lanes = rho[0] * x + pi[0, 0] * a + pi[1, 0] * m, rho[1] * lanes + pi[0, 1] * a + pi[1, 1] * m
        elif c.parallel_residual == "gptj" and i >= c.parallel_start_layer:
            x = u + a + sm * mlp(i, depth * rms(u))
        else:
            h = u + a
            x = h + sm * mlp(i, depth * rms(h))
        if place < half:
            skips.append(x)
    x = rms(x if lanes is None else (x + lanes) / 2)
    logits = c.logit_softcap * torch.tanh(x @ w["embed"].T / c.logit_softcap)
    return -logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel_first_skip": "both"},
        {"parallel_residual": "gptj", "parallel_start_layer": 2},
        {"parallel_residual": "none"},
        {"skip_gates_enabled": False, "xsa_last_n": 2, "ln_scale": False},
        {"num_layers": 7, "num_loops": 2, "loop_start": 2, "loop_end": 3, "parallel_start_layer": 4, "num_kv_heads": 1},
        {"num_heads": 2, "num_kv_heads": 2, "rope_dims": 16, "mlp_mult": 1.5},
    ],
)
def test_the_one_forward_equals_the_published_equations(config, changes):
    model = make(config, **changes)
    batch = tokens(config)
    ours, theirs = model(batch), reference(model, batch)
    # The one difference left: losses leave in fp32.
    assert torch.allclose(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    assert theirs.std() > 0.1


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
        assert torch.equal(before[:, :place], after[:, :place]) and not torch.equal(before[:, place], after[:, place])


def test_packed_documents_do_not_see_each_other(config):
    model = make(config, loader="packed")
    batch = tokens(config, rows=1, length=40)
    starts = torch.tensor([0, 13, 30, *[40] * 61], dtype=torch.int32)
    packed = model(t.Batch(batch.inputs, batch.targets, starts, 40))
    for a, b in ((0, 13), (13, 30), (30, 40)):
        alone = model(t.Batch(batch.inputs[:, a:b], batch.targets[:, a:b]))
        # Positions differ, but only distances matter to the rotation; fp32 tables leave rounding of that size.
        assert torch.allclose(packed[:, a:b], alone, atol=1e-5)


def test_the_tap_sees_the_input_of_every_matrix(config):
    model, batch, seen = make(config), tokens(config), {}
    model.trunk(batch, lambda site, layer, x: seen.setdefault((site, layer), []).append(x))
    assert set(seen) == {m.key for m in t.matrices(model.table)}
    assert [len(seen["up", i]) for i in range(4)] == [1, 2, 2, 1]  # looped layers once per visit
    for m in t.matrices(model.table):
        weight = model.get_parameter(m.parameter)
        assert seen[m.key][0].size(-1) == (weight if m.index is None else weight[m.index]).size(-1)


def test_the_forward_is_one_graph_in_both_loop_states(config):
    """fullgraph: a graph break would be an error. The attention of packed rows is a GPU kernel and not part of this."""
    model, batch = t.GPT(config, fused=True), tokens(config)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for looped in (False, True):
        model.looped = looped
        assert torch.allclose(compiled(batch), model(batch), atol=1e-5)
        compiled(batch).mean().backward()


def test_initial_values(config):
    torch.manual_seed(0)
    model = t.GPT(config)
    layers = config.num_layers
    assert (model.qo[layers:] == 0).all() and (model.down == 0).all() and (model.q_gain == 5.25).all()
    for bank in (model.qo[:layers], model.kv, model.up):
        for matrix in bank:
            small = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
            assert torch.allclose(small @ small.T, torch.eye(len(small)), atol=1e-5)
    # With zero output projections every block is the identity, so the head sees skip mixes of x0 alone.
    batch = tokens(config)
    x0 = t.norm(F.embedding(batch.inputs, model.embed))
    assert torch.allclose(model.trunk(batch), t.norm(x0), atol=1e-5)


def test_gradients_match_finite_differences(config):
    model, batch = make(config), tokens(config, rows=1, length=12)
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
