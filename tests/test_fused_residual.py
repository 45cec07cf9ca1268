"""The operators that join residual streams, make heads of them, and take the loss: interpreted, compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from helpers import ROOT
from helpers.trainer import without_interpreter

triton = pytest.importorskip("triton")

TOLERANCES = [(torch.float32, 3e-6), (torch.float16, 4e-3)]
SCALES = (1.0, 0.5, 0.25)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch, large_blocks):
    """So few that each has several blocks of tokens to go through, and tiles that do not fit the width."""
    monkeypatch.setattr(t, "RESIDUAL_BLOCK", 4)
    monkeypatch.setattr(t, "RESIDUAL_PROGRAMS", 2)
    monkeypatch.setattr(t, "SPREAD_WIDTH", 32)


def chain(embedding, again, keep, share, branches, read):
    """Three visits: from the embedding; one that remembers; one that merges and ends. -> what is read."""
    paths = t.spread_op(embedding, again)
    entries = [
        {"embedding": embedding, "embedding_path": path, "again": row, "read": read}
        for path, row in zip(paths, again, strict=True)
    ]
    first = t.Stream(*t.residual_op(**entries[0], scale=SCALES[0]))
    second = t.Stream(*t.residual_op(*first[:3], branches[0], scale=SCALES[0]))
    third = t.Stream(
        *t.residual_op(
            *second[:3], branches[1], keep[0], **entries[1], late=share, remembers=True, scale=SCALES[1]
        )
    )
    fourth = t.Stream(*t.residual_op(*third[:3], branches[2], after=keep[1], scale=SCALES[1]))
    fifth = t.Stream(
        *t.residual_op(*fourth[:3], branches[3], keep[1], third.whole, share, **entries[2], scale=SCALES[2])
    )
    last = t.Stream(*t.residual_op(*fifth[:3], branches[4], remembers=True, scale=SCALES[2]))
    streams = (first, second, third, fourth, fifth, last)
    return [*(stream.normed for stream in streams), third.source, fifth.source, last.whole]


def plain_chain(embedding, again, keep, share, branches, read):
    """The same as GPT.mix, merge_skip, normalise and serial have it."""
    streams = [again[0] * embedding]
    streams.append(streams[0] + branches[0])
    remembered = streams[1] + branches[1]
    streams.append(keep[0] * remembered + again[1] * embedding)
    streams.append(streams[2] + branches[2])
    streams.append(keep[1] * streams[3] + branches[3] + share * remembered + again[2] * embedding)
    streams.append(streams[4] + branches[4])
    scales = [scale for scale in SCALES for _ in range(2)]
    normed = [
        F.rms_norm(stream, (stream.size(-1),), eps=t.RMS_EPS) * scale
        for stream, scale in zip(streams, scales, strict=True)
    ]
    return [*normed, normed[2][..., :read], normed[4][..., :read], streams[-1]]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("rows, length, width, read", [(1, 1, 8, 0), (2, 11, 72, 5)])
def test_a_chain_of_joins(poisoned, rows, length, width, read, dtype, tolerance):
    """Every result and gradient within rounding of the plain chain in fp64."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    embedding = draw(rows, length, width)
    gains = [draw(3, width, dtype=torch.float32), draw(2, width, dtype=torch.float32)]
    gains.append(draw(width, dtype=torch.float32))
    branches = draw(5, rows, length, width)
    inputs = [embedding, *gains, branches]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.double().requires_grad_() for tensor in inputs]
    found, expected = chain(*ours, read), plain_chain(*theirs, read)
    upstreams = [draw(*tensor.shape) for tensor in expected]
    for one, other, upstream in zip(found, expected, upstreams, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * max(other.norm(), 1e-30)
        assert upstream.shape == one.shape
    used = [place for place, one in enumerate(found) if one.numel()]
    torch.autograd.backward([found[place] for place in used], [upstreams[place] for place in used])
    torch.autograd.backward(expected, [upstream.double() for upstream in upstreams])
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one.grad.double() - other.grad).norm() <= 2 * tolerance * other.grad.norm(), place


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("rows, length, heads, kv_heads, size", [(2, 21, 4, 2, 16), (1, 5, 3, 3, 24)])
def test_queries_keys_and_values_in_one(
    poisoned, rows, length, heads, kv_heads, size, dtype, tolerance, monkeypatch
):
    """With values read in two places, as attention and XSA do."""
    monkeypatch.setattr(t, "rms_norm", lambda x: F.rms_norm(x, (x.size(-1),), eps=t.RMS_EPS))
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(rows, length, 40, generator=generator).to(dtype)
    weight = (torch.randn((heads + 2 * kv_heads) * size, 40, generator=generator) / 6).to(dtype)
    gain = torch.randn(heads, generator=generator).to(dtype)
    tables = t.rotation_tables_op(3 * torch.randn(length, 1, 4, generator=generator), dtype)
    upstreams = [
        torch.randn(rows, length, count, size, generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads, kv_heads)
    ]
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight, gain)]
    theirs = [tensor.double().requires_grad_() for tensor in (x, weight, gain)]
    found = t.attention_inputs_op(*ours, *tables, kv_heads)[:4]
    parts = F.linear(*theirs[:2]).view(rows, length, -1, size).split((heads, kv_heads, kv_heads), 2)
    tables = [table.double() for table in tables]
    q, k = t.rotated_heads_reference(*parts[:2], theirs[2], *tables)
    expected = (q, k, parts[2], parts[2])
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()
    torch.autograd.backward(found, upstreams)
    torch.autograd.backward(expected, [upstream.double() for upstream in upstreams])
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad.double() - other.grad).norm() <= 2 * tolerance * other.grad.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("columns, size", [(5, 1), (1023, 1), (9000, 1), (300, 12)])
def test_the_loss_of_the_head(poisoned, columns, size, dtype, tolerance):
    """With logits of up to 50 times the cap as well."""
    generator = torch.Generator().manual_seed(columns)
    x = (size * torch.randn(3, 24, generator=generator)).to(dtype)
    weight = torch.randn(columns, 24, generator=generator).to(dtype)
    targets = torch.tensor([columns - 1, 0, 2])
    upstream = torch.randn(3, generator=generator)
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    theirs = [tensor.double().requires_grad_() for tensor in (x, weight)]
    losses, _, _ = t.head_loss_op(*ours, targets, 5.0)
    logits = 5.0 * torch.tanh(F.linear(*theirs) / 5.0)
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected, rtol=tolerance, atol=tolerance)
    losses.backward(upstream)
    expected.backward(upstream.double())
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad.dtype == dtype
        assert (one.grad.double() - other.grad).norm() <= 2 * tolerance * other.grad.norm()


def test_the_operators_can_be_traced():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    embedding = torch.randn(1, 3, 16, requires_grad=True)
    again = torch.randn(2, 16, requires_grad=True)
    torch.library.opcheck(t.spread_op, (embedding, again), test_utils=checks)
    path = t.spread_op(embedding.detach(), again.detach())[0]
    entry = {"embedding": embedding, "embedding_path": path, "again": again[0].detach(), "read": 5}
    torch.library.opcheck(t.residual_op, (), entry, test_utils=checks)
    given = (embedding, torch.ones(1, 3), path, embedding.detach(), again[0].detach())
    torch.library.opcheck(t.residual_op, given, {"remembers": True}, test_utils=checks)
    lane = (embedding, *(None,) * 9, embedding.detach(), path, *torch.ones(2, 16), False, True, 5, 1.0)
    torch.library.opcheck(t.lanes_op, lane, test_utils=checks)
    tables = t.rotation_tables_op(torch.randn(3, 1, 4), torch.float32)
    inputs = (embedding, torch.randn(32, 16, requires_grad=True), torch.ones(2), *tables, 1)
    torch.library.opcheck(t.attention_inputs_op, inputs, test_utils=checks)
    head = (embedding.detach()[0], torch.randn(9, 16, requires_grad=True), torch.tensor([0, 1, 8]), 5.0)
    torch.library.opcheck(t.head_loss_op, head, test_utils=checks)


def test_a_gain_of_zero_has_a_gradient():
    """Though backward finds what was normalised in what came out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 16, generator=generator)
    weight = torch.randn(32, 16, generator=generator)
    upstream = torch.randn(1, 3, 1, 16, generator=generator)
    gain = torch.zeros(1, requires_grad=True)
    tables = t.rotation_tables_op(torch.randn(3, 1, 4, generator=generator), torch.float32)
    weights = torch.cat((weight, weight[:16]))
    found = t.attention_inputs_op(x, weights, gain, *tables, 1)[:3]
    torch.autograd.backward(found, (upstream, *torch.zeros(2, 1, 3, 1, 16)))
    raw = F.linear(x, weight).unflatten(2, (2, 16))
    q, _ = t.rotated_heads_reference(raw[:, :, :1], raw[:, :, 1:], torch.ones(1), *tables)
    assert torch.allclose(gain.grad, (q * upstream).sum(), rtol=1e-5)


def test_a_path_takes_no_memory():
    path = t.empty_path(torch.empty(4, 1000, 1000))
    assert path.shape == (4, 1000, 1000) and path.untyped_storage().nbytes() == 4


COMPILE = """
import sys; sys.path.insert(0, {root!r})
import subprocess, tempfile
import triton, train_gpt as t
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
TYPES = dict(size="*fp32", out_size="*fp32", keep="*fp32", share="*fp32", again="*fp32", after="*fp32",
             late="*fp32", gain_gradients="*fp32", losses="*fp32", targets="*i64", tokens="i32",
             scale="fp32", eps="fp32", columns="i32", cap="fp32",
             lane_size="*fp32", lane_out_size="*fp32", weights="*fp32", through="*fp32",
             weight_gradients="*fp32", scales="*fp32", sums="*fp32", chosen="*fp32",
             **dict.fromkeys(("rows", "depth", "length"), "i32"))
BF, FP = "*bf16", "*fp32"
LANES = dict(inputs=(BF, BF, FP, BF, BF, BF), gains=(FP,) * 4, results=(BF, FP, BF, FP), upstreams=(BF,) * 5,
             gradients=(BF,) * 6)
M, N, K = t.gemm_tile("head", t.torch.bfloat16)
TILE = dict(BLOCK_M=M, BLOCK_N=N, BLOCK_K=K, GROUP=8)
TILES = {{name: f"tensordesc<bf16[1,{{height}},{{width}}]>" for name, height, width in
         (("a", M, K), ("b", N, K), ("q", M, N), ("k", M, N), ("v", M, N), ("slopes", M, N // 4))}}
OWN = dict(spread_backward_kernel=dict(upstreams=(BF,) * 17), lanes_backward_kernel=LANES,
           attention_inputs_kernel=TILES, head_kernel=TILES)
RESIDUAL = dict(D=512, READ=12, BLOCK=t.RESIDUAL_BLOCK, WIDTH=512)
SPREAD = dict(D=512, BLOCK=t.SPREAD_BLOCK, WIDTH=t.SPREAD_WIDTH)
NO_SKIP, NO_WHOLE = dict(skip=None, share=None), dict(whole=None)
PLAIN = dict(source_upstream=None, keep=None, whole=None, whole_upstream=None, late=None)
CASES = [
    (t.residual_kernel, RESIDUAL | NO_WHOLE, t.RESIDUAL_WARPS),
    (t.residual_kernel, RESIDUAL | NO_SKIP, t.RESIDUAL_WARPS),
    (t.residual_backward_kernel, RESIDUAL | PLAIN | dict(whole_gradient=None), t.RESIDUAL_WARPS),
    (t.residual_backward_kernel, RESIDUAL | dict(after=None), t.RESIDUAL_WARPS),
    (t.spread_backward_kernel, SPREAD, t.SPREAD_WARPS),
    (t.lanes_backward_kernel, RESIDUAL | dict(LATE=False), t.LANES_WARPS),
    (t.attention_inputs_kernel, dict(HEADS=8, KV_HEADS=4, D=64, HALF=8) | TILE, 8),
    (t.head_kernel, TILE, 8),
]
for kernel, constants, warps in CASES:
    types = TYPES | OWN.get(kernel.__name__, {{}})
    signature = {{name: "constexpr" if name in constants else types.get(name, "*bf16")
                  for name in kernel.arg_names}}
    source = ASTSource(kernel, signature, constants)
    options = dict(num_warps=warps, num_stages=4 if "BLOCK_M" in constants else 3)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.metadata.shared <= 232_448, built.metadata.shared
    assert "BLOCK_M" not in constants or "wgmma.mma_async" in built.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(kernel.__name__, *(word for word in usage.split() if word[:4] in ("REG:", "STAC")))
"""


def test_the_kernels_compile_for_hopper_without_spills():
    lines = without_interpreter(COMPILE.format(root=str(ROOT)))
    assert len(lines) == 8
    assert all("STACK:0" in line.split() for line in lines), lines
