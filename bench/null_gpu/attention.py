"""FlashAttention without its CUDA code: its real Python interfaces over extensions that only allocate, or
stand-ins.

`python_interfaces(folder)` takes the source distribution of flash-attn 2.8.3 (`pip download --no-deps
--no-binary :all: flash-attn==2.8.3`, unpacked), which holds the interfaces of FlashAttention-2 and -3. The
stand-ins have the same functions, the same kind of autograd.Function behind them and the same float defaults:
what Dynamo stumbles over."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from pathlib import Path

import torch
from torch import Tensor


def forward_shapes(q: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output, fp32 log-sum-exp) of attention on q (B, T, H, D), or packed (T, H, D) with `starts`."""
    rows = (q.size(0), q.size(2), q.size(1)) if starts is None else (q.size(1), q.size(0))
    return torch.empty_like(q), q.new_empty(rows, dtype=torch.float32)


def accumulator(q: Tensor) -> Tensor:
    """The fp32 gradient of q in which FlashAttention's backward adds up."""
    return q.new_empty(q.shape, dtype=torch.float32)


# --- FlashAttention-2: the extension is a module of plain functions ---
def fa2_extension() -> types.ModuleType:
    """A module with the functions of flash_attn_2_cuda that training calls, arguments in their order."""

    def fwd(q, k, v, out, *_):
        result, normalizers = forward_shapes(q, None)
        return result, normalizers, q.new_empty(0), torch.empty(2, dtype=torch.int64, device=q.device)

    def varlen_fwd(q, k, v, out, cu_seqlens_q, *_):
        result, normalizers = forward_shapes(q, cu_seqlens_q)
        return result, normalizers, q.new_empty(0), torch.empty(2, dtype=torch.int64, device=q.device)

    def bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, *_):
        accumulator(q)
        return dq, dk, dv, torch.empty_like(softmax_lse)

    module = types.ModuleType("flash_attn_2_cuda")
    module.fwd, module.varlen_fwd, module.bwd, module.varlen_bwd = fwd, varlen_fwd, bwd, bwd
    return module


# --- FlashAttention-3: the extension registers operators ---
FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out, Tensor? "
    "cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? "
    "seqused_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, "
    "Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? "
    "q_descale, Tensor? k_descale, Tensor? v_descale, float? softmax_scale, bool is_causal, SymInt "
    "window_size_left, SymInt window_size_right, SymInt attention_chunk, float softcap, bool "
    "is_rotary_interleaved, Tensor? scheduler_metadata, SymInt num_splits, bool? pack_gqa, SymInt "
    "sm_margin) -> (Tensor, Tensor)"
)
FA3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!) dq, "
    "Tensor(b!) dk, Tensor(c!) dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, "
    "Tensor? seqused_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float? softmax_scale, bool "
    "is_causal, SymInt window_size_left, SymInt window_size_right, float softcap, bool deterministic, "
    "SymInt sm_margin) -> (Tensor, Tensor, Tensor, Tensor)"
)


def register_fa3_extension() -> torch.library.Library:
    """The operators flash_attn_3::fwd and bwd, with the fakes that flash-attention#1769 brought."""

    def fwd(q, k, v, k_new, v_new, q_v, out, cu_seqlens_q, *_):
        return forward_shapes(q, cu_seqlens_q)

    def bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, *_):
        accumulator(q)
        # The interface uses the gradients it passed in; an operator that returns an argument cannot be
        # traced.
        return q.new_empty(0), q.new_empty(0), q.new_empty(0), torch.empty_like(softmax_lse)

    library = torch.library.Library("flash_attn_3", "DEF")
    for schema, work in ((FA3_FORWARD, fwd), (FA3_BACKWARD, bwd)):
        name = library.define(schema)
        library.impl(name, work, "CUDA")
        library.impl(name, work, "Meta")
    return library


def python_interfaces(folder: Path) -> dict[str, types.ModuleType]:
    """{"flash_attn": FA2, "flash_attn_interface": FA3}, imported from the unpacked source distribution in
    `folder` over stubbed extensions; FileNotFoundError names what is not there."""
    for path in (folder / "flash_attn/flash_attn_interface.py", folder / "hopper/flash_attn_interface.py"):
        if not path.exists():
            raise FileNotFoundError(f"--flash-attn {folder}: no {path}; unpack flash_attn-2.8.3.tar.gz")
    sys.modules["flash_attn_2_cuda"] = fa2_extension()
    package = types.ModuleType("flash_attn_3")
    package.library = register_fa3_extension()  # the operators live as long as it does
    sys.modules["flash_attn_3"], sys.modules["flash_attn_3._C"] = package, types.ModuleType("flash_attn_3._C")
    sys.path += [str(folder), str(folder / "hopper")]
    return {name: importlib.import_module(name) for name in ("flash_attn", "flash_attn_interface")}


# --- stand-ins ---
@torch.library.custom_op("null_gpu::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    longest: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of attention."""
    return forward_shapes(q, starts_q)


@attention_forward.register_fake
def _attention_forward_shapes(q, k, v, starts_q, starts_k, longest, softcap):
    return forward_shapes(q, starts_q)


@torch.library.custom_op("null_gpu::attention_backward", mutates_args=("dq", "dk", "dv"))
def attention_backward(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    normalizers: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    longest: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Fills the gradients; returns the row sums that FlashAttention returns."""
    accumulator(q)
    return torch.empty_like(normalizers)


@attention_backward.register_fake
def _attention_backward_shapes(upstream, q, k, v, out, normalizers, *_):
    return torch.empty_like(normalizers)


class Attention(torch.autograd.Function):
    """FlashAttention's kind of function: Dynamo traces it, but not with one tensor twice among its inputs."""

    @staticmethod
    def forward(ctx, q, k, v, starts_q, starts_k, longest, softcap):
        out, normalizers = attention_forward(q, k, v, starts_q, starts_k, longest, softcap)
        ctx.save_for_backward(q, k, v, out, normalizers, starts_q, starts_k)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx, upstream):
        q, k, v, out, normalizers, starts_q, starts_k = ctx.saved_tensors
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        attention_backward(
            upstream.contiguous(), q, k, v, out, normalizers, starts_q, starts_k, ctx.longest, *gradients
        )
        return *gradients, None, None, None, None


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, softcap=0.0, **_):
    """FlashAttention's dense function."""
    return Attention.apply(q, k, v, None, None, 0, softcap)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    **_,
):
    """FlashAttention's function for packed rows."""
    return Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softcap)


def stand_in(name: str) -> types.ModuleType:
    """A module `name` with both functions."""
    module = types.ModuleType(name)
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    module.__version__ = "2.8.3"
    return module


def install(folder: Path | None) -> str:
    """Make flash_attn and flash_attn_interface importable; returns in words what they are."""
    if folder is not None:
        python_interfaces(folder)
        return f"the Python interfaces of {folder.name} over stubbed extensions"
    for name in ("flash_attn", "flash_attn_interface"):
        sys.modules[name] = stand_in(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    return "stand-ins with FlashAttention's functions"
