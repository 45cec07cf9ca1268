"""Fused kernels against their references on the GPU: results, gradients, long tensors, memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import cutlass_evt_fusion
import train_gpt as t
from bench import gpu_meter as m
from cutlass_evt_fusion import bench as cutlass
from helpers.tensors import distance

FORMS = [("mlp", "cutlass"), *((name, "triton") for name in m.KERNELS)]


@pytest.mark.parametrize("name, form", FORMS)
@pytest.mark.parametrize("rows", [1, 131, 8192])
def test_results_and_gradients_are_as_exact_as_the_plain_form(
    name, form, rows, dry, meter, dtype, environment
):
    if rows > 1 and name == "newton-schulz":
        pytest.skip("its size is that of the model")
    config = t.Config.from_env(environment if dry else {})
    kernel = m.KERNELS[name](config, meter.device, dtype, min(rows, 7) if dry else rows)
    functions = {label: function for label, function in kernel.fused.items() if label.startswith(form)}
    if not functions:  # CUTLASS is optional
        pytest.skip(kernel.missing[form])
    wide = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
    exact = dataclasses.replace(kernel, operands=tuple(map(wide, kernel.operands)))
    run = lambda kernel, f: kernel.both(f)() if kernel.leaves else m.several(kernel.forward(f)())
    plain, wanted = run(kernel, kernel.reference), run(exact, exact.reference)
    for function in functions.values():
        results = run(kernel, function)
        assert len(results) == len(plain) > kernel.leaves
        for ours, theirs, best in zip(results, plain, wanted, strict=True):
            assert torch.isfinite(ours).all() and ours.dtype == theirs.dtype
            assert distance(ours, best) <= 1.5 * distance(theirs, best) + 1e-3


def test_cross_entropy_of_more_than_2_31_logits(dry, meter, dtype):
    rows, columns = (16, 64) if dry else (270_000, 8192)
    kernel = m.cross_entropy(meter.device, dtype, rows, columns)
    logits, targets, cap = kernel.operands
    loss, gradient = kernel.both(kernel.fused["triton"])()
    tail = dataclasses.replace(kernel, operands=(logits[-8:].clone(), targets[-8:], cap))
    assert torch.allclose(loss[-8:], tail.forward(kernel.reference)(), rtol=1e-4, atol=1e-4)
    leaf = logits[-8:].detach().clone().requires_grad_()
    upstream = m.random_tensor((rows,), 9, meter.device, torch.bfloat16).float()[-8:]
    (wanted,) = torch.autograd.grad(kernel.reference(leaf, targets[-8:], cap), leaf, upstream)
    assert distance(gradient[-8:], wanted) < 1e-2


@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_cross_entropy_of_saturated_logits(meter, dtype, cap):
    logits = torch.tensor([[1e4, -1e4, 0.0, 50.0]] * 3, dtype=dtype, device=meter.device).requires_grad_()
    targets = torch.tensor([0, 1, 2], device=meter.device)
    loss = t.softcapped_ce_op(logits, targets, cap)[0]
    loss.sum().backward()
    assert torch.allclose(
        loss, t.softcapped_ce_reference(logits.detach(), targets, cap), rtol=1e-4, atol=1e-4
    )
    assert torch.isfinite(logits.grad).all()


def test_fused_cross_entropy_needs_no_more_memory_than_the_compiled_reference_and_half_of_the_eager(
    dry, meter
):
    if dry:
        pytest.skip("a CPU's memory is not measured")
    kernel = m.cross_entropy(meter.device, torch.bfloat16, 24_576, 8192)
    compiled = torch.compile(kernel.reference, dynamic=False, fullgraph=True)
    calls = [kernel.both(form) for form in (kernel.fused["triton"], compiled, kernel.reference)]
    for call in calls:
        call()
    fused, compiled_peak, eager = (meter.peak(call) for call in calls)
    assert fused <= compiled_peak + 1  # MiB; torch 2.11 keeps no more than the gradient either
    assert fused <= 0.5 * eager


@pytest.mark.parametrize("sizes", [*cutlass.AWKWARD, (98_304, 512, 2048), (98_305, 512, 2048)])
def test_cutlass_parity(dry, sizes):
    if reason := cutlass_evt_fusion.available():
        pytest.skip(reason)
    errors = cutlass.parity(*sizes)
    assert max(errors.values()) <= 1, errors
