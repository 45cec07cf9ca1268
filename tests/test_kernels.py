"""Triton kernels: in the interpreter against their references, and compiled for the GPUs they are for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import train_gpt as t
from helpers import ROOT
from helpers.trainer import without_interpreter

triton = pytest.importorskip("triton")


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("rows, columns", [(1, 5), (3, 1024), (7, 1023), (2, 8192), (2, 8195), (4, 9000)])
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_softcapped_cross_entropy_and_its_gradient(poisoned, rows, columns, dtype, tolerance, cap):
    generator = torch.Generator().manual_seed(rows * columns)
    logits = (20 * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[0] = columns - 1
    upstream = torch.randn(rows, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = t.softcapped_ce_op(ours, targets, cap)[0]
    expected = F.cross_entropy(cap * torch.tanh(theirs / cap), targets, reduction="none")
    assert torch.allclose(
        t.softcapped_ce_reference(logits, targets, cap).double(), expected, rtol=1e-5, atol=2e-5
    )
    # Losses are fp32 whatever the logits' dtype: both sides start from the same rounded logits.
    assert loss.dtype == torch.float32 and torch.allclose(loss.double(), expected, rtol=1e-5, atol=2e-5)
    loss.backward(upstream)
    expected.backward(upstream.double())
    assert ours.grad.dtype == dtype
    error = (ours.grad.float() - theirs.grad.float()).norm() / theirs.grad.float().norm()
    assert error < tolerance


def test_the_kernel_can_be_traced_without_graph_breaks():
    torch.library.opcheck(
        t.softcapped_ce_op,
        (torch.randn(4, 16, requires_grad=True), torch.tensor([0, 1, 15, 3]), 30.0),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_one_dynamic_graph_serves_every_number_of_rows():
    counter = CompileCounter()
    compiled = torch.compile(t.softcapped_ce_op, backend=counter, dynamic=True, fullgraph=True)
    for rows in (4, 5, 17):
        logits = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows), requires_grad=True)
        targets = torch.arange(rows) % 16
        loss = compiled(logits, targets, 30.0)[0]
        assert torch.allclose(loss, t.softcapped_ce_reference(logits, targets, 30.0), atol=1e-5)
    assert counter.frame_count == 1


COMPILE = """
import sys; sys.path.insert(0, {root!r})
import triton, train_gpt as t
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for capability in (90, 100):
    for kernel in (t.softcapped_ce_forward_kernel, t.softcapped_ce_backward_kernel):
        types = dict(logits="*bf16", targets="*i64", losses="*fp32", normalizers="*fp32", upstream="*fp32",
                     gradient="*bf16",
                     columns="i32", cap="fp32", BLOCK="constexpr")
        signature = {{name: types[name] for name in kernel.arg_names}}
        source = ASTSource(kernel, signature, {{"BLOCK": 1024}})
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert built.metadata.shared <= 232_448, built.metadata.shared
        print(capability, kernel.__name__, len(built.asm["ptx"]))
for kernel in vars(t).values():
    if isinstance(kernel, triton.JITFunction) and kernel.__name__.endswith("_kernel"):  # others are inlined
        keys = [parameter.name for parameter in kernel.params if not parameter.do_not_specialize]
        assert not {{"rows", "tokens", "length"}} & set(keys), (kernel.__name__, keys)
"""


def test_the_kernels_compile_for_hopper_and_blackwell_once_for_any_number_of_tokens():
    assert len(without_interpreter(COMPILE.format(root=str(ROOT)))) == 4
