"""Muon, Adam, averaging and schedules."""

from __future__ import annotations

import pytest
import torch

import train_gpt as t
from helpers import ROOT
from helpers.tensors import tokens
from helpers.trainer import launch, replace


@pytest.mark.parametrize("name, low, high", [("classic", 0.6, 1.25), ("polar_express", 0.75, 1.25)])
@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 48), (2, 48, 16)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(name, low, high, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    table = t.NEWTON_SCHULZ[name]
    result = t.orthogonalize(matrix, tuple(table[min(i, len(table) - 1)] for i in range(5)))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    mine = torch.linalg.svdvals(result)
    # Directions whose singular value starts below 2 % of the Frobenius norm are not expected to arrive.
    strong = values > 0.02 * matrix.norm(dim=(-2, -1), keepdim=True)[..., 0]
    assert strong.float().mean() > 0.8
    aligned = torch.einsum("nki,nkl,njl->nij", u.mT.mT, result, v).diagonal(dim1=-2, dim2=-1)
    assert (aligned[strong] > low).all() and (mine < high).all()


@pytest.mark.parametrize("rows", [True, False])
def test_a_muon_update_is_the_published_one(rows):
    torch.manual_seed(1)
    gradient, buffer = torch.randn(2, 6, 10), torch.randn(2, 6, 10)
    mu, coefficients = 0.9, t.NEWTON_SCHULZ["classic"] * 5
    expected_buffer = mu * buffer + gradient
    updates = gradient + mu * expected_buffer
    expected = []
    for update in updates.double():
        if rows:
            update = torch.stack([row / max(row.norm().item(), 1e-7) for row in update])
        x = update / (update.norm() + 1e-7)
        for a, b, c in coefficients:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        expected.append(x)
    result = t.muon_update(gradient, buffer, torch.tensor(mu), rows, torch.float32, coefficients)
    assert torch.allclose(buffer, expected_buffer) and torch.allclose(
        result.double(), torch.stack(expected), atol=1e-5
    )


def one_step(config, seed=0, scale=1.0):
    """(parameters before, after one step, model) with given gradients."""
    run = t.Run(config)
    torch.manual_seed(seed)
    model = t.GPT(config)
    optimizers = t.Optimizers(run, model, compiled=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (scale * model(tokens(config)).mean()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizers.step(0.5, 0.9, config.muon_wd)
    return before, gradients, model


def test_matrices_follow_muon_and_the_rest_adam(config):
    config = replace(config, grad_clip_norm=0.0)
    before, gradients, model = one_step(config)
    table = t.NEWTON_SCHULZ[config.muon_coefficients]
    for name, spec in model.table.items():
        after = model.get_parameter(name)
        if spec.optimizer == "muon":
            update = t.muon_update(
                gradients[name], torch.zeros_like(after), torch.tensor(0.9), True, torch.float32, table
            )
            aspect = max(1.0, after.size(1) / after.size(2)) ** 0.5
            rate = 0.5 * config.matrix_lr
            expected = before[name] * (1 - rate * config.muon_wd) - rate * aspect * update
        else:
            rate, decay = (
                (config.tied_embed_lr, config.embed_wd)
                if name == "embed"
                else (config.scalar_lr, config.adam_wd)
            )
            expected = torch.nn.Parameter(before[name].clone())
            expected.grad = gradients[name]
            torch.optim.AdamW(
                [expected],
                lr=0.5 * rate,
                betas=(config.beta1, config.beta2),
                eps=config.adam_eps,
                weight_decay=decay,
            ).step()
        assert torch.allclose(after, expected, atol=1e-6), name
        assert after.grad is None


@pytest.mark.parametrize("scope", ["global", "local"])
def test_clipping_bounds_the_norm_of_all_gradients(config, scope):
    # With momentum 0 before and one step, the buffers hold exactly the clipped gradients of the matrices.
    config = replace(config, grad_clip_norm=0.01, grad_clip_scope=scope)
    run = t.Run(config)
    torch.manual_seed(0)
    model = t.GPT(config)
    optimizers = t.Optimizers(run, model, compiled=False)
    model(tokens(config)).mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    expected = {name: 0.01 / norm * p.grad for name, p in optimizers.muon.banks.items()}
    optimizers.step(1.0, 0.9, 0.095)
    for name, buffer in optimizers.muon.momenta.items():
        assert torch.allclose(buffer, expected[name], rtol=1e-4, atol=1e-9)


def test_state_can_be_saved_and_loaded(config):
    run = t.Run(config)
    torch.manual_seed(0)
    model = t.GPT(config)
    optimizers = t.Optimizers(run, model, compiled=False)

    def advance(steps):
        for i in range(steps):
            model(tokens(config, seed=i)).mean().backward()
            optimizers.step(1.0, 0.9, 0.1)

    advance(2)
    weights, state = t.to_cpu(model.state_dict()), t.to_cpu(optimizers.state())
    advance(2)
    first = t.to_cpu(model.state_dict())
    model.load_state_dict(weights)
    optimizers.load(state)
    advance(2)
    assert all(torch.equal(first[name], p) for name, p in model.state_dict().items())


def test_average_is_exponential(config):
    model = t.GPT(config)
    average = {"q_gain": model.q_gain.detach().clone()}
    start = model.q_gain.detach().clone()
    model.q_gain.data += 1.0
    for _ in range(2):
        t.update_ema(average, model, 0.9)
    assert torch.allclose(average["q_gain"], start + (1 - 0.81))


def test_schedules():
    c = t.Config(
        warmdown_frac=0.5,
        min_lr=0.1,
        muon_momentum_warmup_start=0.9,
        muon_momentum=0.97,
        muon_momentum_warmup_steps=100,
    )
    assert [t.learning_rate_scale(c, f) for f in (0, 0.5, 0.75, 0.98, 1.0)] == pytest.approx(
        [1, 1, 0.5, 0.1, 0.1]
    )
    assert t.learning_rate_scale(replace(c, warmdown_frac=0.0), 1.0) == 1.0
    assert [t.muon_momentum(c, s) for s in (0, 50, 100, 1000)] == pytest.approx([0.9, 0.935, 0.97, 0.97])
    assert t.muon_momentum(replace(c, muon_momentum_warmup_steps=0), 0) == 0.97
    taper = replace(c, muon_wd=0.1, wd_taper_start_frac=0.7, wd_taper_final_mult=0.5)  # #1729
    assert [t.muon_weight_decay(taper, f) for f in (0, 0.7, 0.85, 1.0)] == pytest.approx(
        [0.1, 0.1, 0.075, 0.05]
    )
    assert t.muon_weight_decay(replace(c, muon_wd=0.1), 1.0) == 0.1


def test_gradients_of_two_dtypes_are_reduced_in_the_order_of_the_parameters(config):
    """The order of a set follows addresses and so differs between ranks."""
    run = t.Run(config)
    optimizers = t.Optimizers(run, t.GPT(config, dtype=torch.bfloat16), compiled=False)
    run.world_size = 2
    reduced = []

    def record(flat):
        reduced.append(flat.dtype)
        return flat

    run.sum_over_ranks = record
    forwards = optimizers.replicated
    for parameters in (forwards, forwards[::-1]):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizers.replicated = parameters
        optimizers.reduce_replicated()
        assert all((parameter.grad == 0.5).all() for parameter in parameters)
    assert reduced == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]


TWO_RANKS = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, train_gpt as t
from helpers.tensors import tokens
config = t.Config.from_env(os.environ)
run = t.Run(config)
torch.manual_seed(0)
model = t.GPT(config)
optimizers = t.Optimizers(run, model, compiled=False)
for step in range(3):
    for stream in run.streams:
        (model(tokens(config, seed=8 * step + stream)).mean() / len(run.streams)).backward()
    optimizers.step(1.0, 0.9, 0.095)
state = optimizers.state()
if run.is_main:
    torch.save((model.state_dict(), state), {target!r})
run.close()
"""


@pytest.mark.parametrize("scope", ["global"])
def test_two_ranks_make_the_same_steps_as_one(settings, tmp_path, scope):
    results = []
    for processes in (1, 2):
        target = tmp_path / f"{processes}.pt"
        script = tmp_path / "script.py"
        script.write_text(TWO_RANKS.format(root=str(ROOT), target=str(target)))
        done = launch(settings | {"GRAD_CLIP_SCOPE": scope}, processes, script)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(target, weights_only=True))
    (one, one_state), (two, two_state) = results
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5), name
    for name in one_state["muon"]:
        assert one_state["muon"][name].shape == two_state["muon"][name].shape
        assert torch.allclose(one_state["muon"][name], two_state["muon"][name], rtol=1e-4, atol=1e-6), name
