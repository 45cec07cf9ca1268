"""Training and packing on the GPU: against CPU and eager, no recompilation, artifacts for the CPU."""

from __future__ import annotations

import time

import pytest
import torch

import train_gpt as t
from bench import gpu_meter as m
from bench.train_step import TrainStep
from helpers.trainer import TINY


def test_a_training_run_has_the_losses_of_the_cpu(monkeypatch, meter):
    settings = TINY | {"VOCAB_SIZE": "320", "COMPILE": "off", "ATTENTION": "sdpa", "MATRIX_LR": "0.01"}
    ours = TrainStep(settings, meter.device)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        theirs = TrainStep(settings, torch.device("cpu"))
    theirs.model.load_state_dict(ours.model.state_dict())  # the CPU draws other initial weights
    theirs.average = {
        name: weight.detach().float().clone() for name, weight in theirs.model.named_parameters()
    }
    loader = t.LOADERS["shuffled"](ours.config, m.Synthetic(ours.config, 20_000))
    losses = []
    for step in range(8):
        batch = loader.get(0, step % 2)
        here = [x.to(meter.device) for x in (batch.inputs, batch.targets)]
        losses.append((ours(*here).item(), theirs(batch.inputs, batch.targets).item()))
    assert losses[-1][0] < losses[0][0]
    assert all(abs(one - other) < 2e-2 for one, other in losses), losses  # the GPU's fp32 products are TF32


def test_compiled_and_eager_agree(trainer):
    step, feed = trainer
    found = []
    for forward in (step.forward, step.model):
        for batch in feed.get(0)[:1]:
            loss = forward(batch)
            loss.mean().backward()
        gradients = torch.cat(
            [p.grad.float().flatten() for p in step.model.parameters() if p.grad is not None]
        )
        step.model.zero_grad()
        found.append((loss.detach(), gradients))
    (loss, gradient), (plain, other) = found
    assert (loss - plain).norm() < 1e-2 * plain.norm()
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.995


def test_nothing_is_compiled_again_in_20_steps_of_packed_documents(trainer):
    step, feed = trainer
    graphs, losses = m.compiled_graphs(), []
    for number in range(20, 40):
        batches = feed.get(number)
        losses.append(t.train_step(step.run, step.forward, step.optimizers, batches, 0.5, number))
    assert m.compiled_graphs() == graphs
    assert torch.stack(losses).isfinite().all()


def test_no_step_waits_for_the_gpu(trainer, dry):
    step, feed = trainer
    agreement = t.Agreement(step.run)
    batches = [feed.get(number) for number in (20, 21)]
    for place, batch in enumerate(batches):
        if place == 1 and not dry:  # the first of them allocates
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss = t.train_step(step.run, step.forward, step.optimizers, batch, 0.5, 20 + place)
            t.update_ema(step.average, step.model, step.config.ema_decay)
            seconds, not_finite = agreement.reach(time.monotonic, loss, late=True)
        finally:
            if not dry:
                torch.cuda.set_sync_debug_mode("default")
    assert seconds <= time.monotonic() and not not_finite


def test_replayed_steps_have_the_losses_of_those_without_cuda_graphs(trainer, dry):
    if dry:
        pytest.skip("needs a GPU")
    step, feed = trainer
    before = t.to_cpu((step.model.state_dict(), step.optimizers.state()))
    found = []
    for graphs in (None, t.StepGraphs(step.run, step.model, step.forward, step.optimizers)):
        losses = []
        for number in range(20, 26):
            batches = feed.get(number)
            losses.append(t.train_step(step.run, step.forward, step.optimizers, batches, 0.5, number, graphs))
        found.append(torch.stack(losses))
        step.model.load_state_dict(before[0])
        step.optimizers.load(before[1])
    plain, replayed = found
    # Sums by atomic additions come in any order, so that a few digits differ from run to run.
    assert torch.allclose(plain, replayed, rtol=1e-3), found


def test_an_artifact_of_the_gpu_is_the_same_model_on_the_cpu(meter, tmp_path):
    config = t.Config.from_env(
        TINY | {"VOCAB_SIZE": "320", "COMPILE": "off", "ATTENTION": "sdpa", "COMPRESSOR": "lzma"}
    )
    run = t.Run(config)
    run.folder = tmp_path
    model, data = t.build(run).model, m.Synthetic(config, 20_000)
    model.looped = True
    moments = t.collect_moments(run, model, data)
    weights = {name: weight.detach().float() for name, weight in model.named_parameters()}
    tensors = t.quantize(
        run, model.table, weights, sum(w.numel() for w in weights.values()) // 2, True, moments
    )
    t.seal_artifact(run, tensors, looped=True)
    manifest, read, _ = t.decode_artifact(tmp_path / "final_model.ptz")
    restored = t.assemble_weights(model.table, read)
    assert manifest["looped"] and all(weight.device.type == "cpu" for weight in restored.values())
    there = t.GPT(config)
    there.looped = True
    there.load_state_dict(restored)
    model.load_state_dict(restored)
    batch = t.ShuffledLoader(config, data).get(0, 0)
    with torch.no_grad():
        ours, theirs = model(t.to_device(batch, run)).cpu(), there(batch)
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()
