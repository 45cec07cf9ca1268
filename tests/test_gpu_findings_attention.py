"""Attention backends are chosen by trial: stand-ins for the packages fail in every way seen so far."""

from __future__ import annotations

import functools
import itertools
import sys
import types

import pytest
import torch

import train_gpt as t
from helpers.trainer import launch, replace


@torch.library.custom_op("golf_test_flash::forward", mutates_args=())
def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the extension of a FlashAttention package does: (output, log-sum-exp), dense or packed."""
    dense = cu_q is None
    if not dense:
        q, k, v = q[None], k[None], v[None]
    output = t.attend_sdpa(q, k, v, cu_q, 0).contiguous()
    return (output if dense else output[0]), q.new_zeros(q.shape[-2])


@flash_forward.register_fake
def _flash_forward_fake(q, k, v, cu_q, cu_k):
    return torch.empty_like(q), q.new_empty(q.shape[-2])


@torch.library.custom_op("golf_test_flash::backward", mutates_args=())
def flash_backward(
    upstream: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, by hand: there is no autograd inside an operator."""
    tokens, heads, width = q.shape[-3:]
    copies = heads // k.shape[-2]
    up, queries, keys, values = (
        tensor.float().view(-1, tokens, tensor.shape[-2], width).transpose(1, 2)
        for tensor in (upstream, q, k, v)
    )
    keys, values = keys.repeat_interleave(copies, 1), values.repeat_interleave(copies, 1)
    place = torch.arange(tokens)
    hidden = place[:, None] < place
    if cu_q is not None:
        document = torch.bucketize(place, cu_q, right=True)
        hidden |= document[:, None] != document
    scores = queries @ keys.mT / width**0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    slope = weights * (up @ values.mT - ((up @ values.mT) * weights).sum(-1, keepdim=True)) / width**0.5
    gradients = (slope @ keys, slope.mT @ queries, weights.mT @ up)
    summed = [tensor.unflatten(1, (-1, copies)).sum(2) for tensor in gradients[1:]]
    pairs = zip((gradients[0], *summed), (q, k, v), strict=True)
    return tuple(found.transpose(1, 2).reshape(like.shape).to(like).contiguous() for found, like in pairs)


@flash_backward.register_fake
def _flash_backward_fake(upstream, q, k, v, cu_q):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Flash(torch.autograd.Function):
    """The Python side of FlashAttention-2 and 3: an autograd function over operators of the extension."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, causal, window_size, softcap, return_attn_probs):
        """As the packages do it: lengths are saved, the output alone is given back unless asked."""
        assert causal and window_size == (-1, -1)
        output, normalizers = flash_forward(q, k, v, cu_q, cu_k)
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        return (output, normalizers) if return_attn_probs else output

    @staticmethod
    def backward(ctx, upstream, *_):
        """Gradients for q, k and v alone."""
        q, k, v, cu_q, _ = ctx.saved_tensors
        return *flash_backward(upstream, q, k, v, cu_q), *[None] * 8


class ForwardOnly(torch.autograd.Function):
    """A package without a backward kernel for this GPU."""

    @staticmethod
    def forward(ctx, *arguments):
        """As Flash."""
        return flash_forward(*arguments[:5])[0]

    @staticmethod
    def backward(ctx, *_):
        """None."""
        raise NotImplementedError("backward needs another architecture\nand a second line")


def package(apply=Flash.apply, tuple_output=False, change=lambda result: result) -> types.ModuleType:
    """A module with the functions and argument names that FlashAttention 2, 3 and 4 have in common."""
    module = types.ModuleType("stand_in")

    def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0):
        return change(apply(q, k, v, None, None, None, None, causal, window_size, softcap, tuple_output))

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
    ):
        sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return change(apply(q, k, v, *sizes, causal, window_size, softcap, tuple_output))

    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


def package_4() -> types.ModuleType:
    """FlashAttention-4's module with its two halves as in 4.0.0b36; no graph may look inside."""
    module = types.ModuleType("stand_in")

    def forward(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False,
        return_lse=False,
    ):  # fmt: skip
        assert type(q) is torch.Tensor and causal and return_lse and (max_seqlen_q is None) == (q.dim() == 4)
        output, _ = flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        rows = (q.size(0), q.size(2), q.size(1)) if cu_seqlens_q is None else (q.size(1), q.size(0))
        return output, q.new_zeros(rows, dtype=torch.float32), None, None, None

    def backward(
        q, k, v, out, dout, lse, causal=False, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None,
    ):  # fmt: skip
        assert type(q) is torch.Tensor and causal and out.shape == dout.shape and lse.dtype == torch.float32
        return flash_backward(dout, q, k, v, cu_seqlens_q)

    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    return module


def broken(*_):
    """A wheel that was built for another GPU."""
    raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")


def without_packing(*arguments):
    """Attention that looks across documents."""
    q, k, v = (tensor[None] if tensor.dim() == 3 else tensor for tensor in arguments[:3])
    return t.attend_sdpa(q, k, v, None, 0).view_as(arguments[0])


@pytest.fixture
def hopper(config, monkeypatch):
    """A Run that takes itself for one on a Hopper GPU with none of the packages, and remembers its log."""
    run = t.Run(replace(config, compile="off"))
    run.is_cuda, run.dtype, run.lines = True, torch.bfloat16, []
    run.log = lambda line, console=True: run.lines.append(line)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    for name in ("flash_attn_interface", "flash_attn", t.FLASH_MODULES["fa4"], "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    return run


def pick(run: t.Run, **changes):
    """The choice of `run` under changed settings."""
    run.config = replace(run.config, **changes)
    return t.pick_attention(run.config, run)


@pytest.mark.parametrize(
    "module, reason",
    [
        (package(broken), "RuntimeError: CUDA error: no kernel image is available"),
        (package(ForwardOnly.apply), "NotImplementedError: backward needs another architecture"),
        (package(without_packing), "gives other packed results than PyTorch's attention"),
        (package(tuple_output=True, change=lambda two: two[::-1]), "IndexError: Dimension out of range"),
        (types.ModuleType("empty"), "AttributeError: module 'empty' has no attribute 'flash_attn_func'"),
    ],
    ids=["cannot run", "no backward", "ignores documents", "log-sum-exp first", "another package"],
)
def test_a_package_that_imports_but_does_not_serve_gives_way_with_the_reason(
    hopper, monkeypatch, module, reason
):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setitem(sys.modules, "flash_attn", package())
    assert pick(hopper) is not t.attend_sdpa
    (line,) = hopper.lines
    assert line.startswith("attention: fa2 (not fa3: " + reason) and "\n" not in line
    assert "fa3_hub: cannot be imported" in line and "fa4: cannot be imported" in line
    with pytest.raises(t.Stop) as stop:
        pick(hopper, attention="fa3")
    assert str(stop.value).startswith("ATTENTION=fa3: " + reason) and "\n" not in str(stop.value)


def test_a_trial_that_leaves_the_gpu_unusable_ends_the_run_in_one_line(hopper, monkeypatch):
    """CUDA refuses everything after an illegal access: all backends after it would fail, then the run."""

    def lost(*_):
        raise RuntimeError(
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
        )

    monkeypatch.setitem(sys.modules, "flash_attn_interface", package(broken))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(t.Stop) as stop:
        pick(hopper)
    said = str(stop.value)
    assert said.startswith("ATTENTION=fa3: RuntimeError: CUDA error: no kernel image") and "\n" not in said
    assert said.endswith("set ATTENTION to one after fa3 of fa3, fa3_hub, fa4, fa2, varlen, sdpa")


def test_without_any_package_the_run_goes_on_with_pytorchs_own(hopper):
    pick(hopper)
    assert "not fa3: cannot be imported" in hopper.lines[0] and "not fa2" in hopper.lines[0]


@pytest.mark.parametrize("tuple_output", [False, True])
@pytest.mark.parametrize("backend", ["fa3", "fa4", "fa2"])
def test_a_package_that_works_is_taken_compiled_in_one_graph(hopper, monkeypatch, backend, tuple_output):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    module = package_4() if backend == "fa4" else package(tuple_output=tuple_output)
    monkeypatch.setitem(sys.modules, t.FLASH_MODULES[backend], module)
    torch._dynamo.reset()
    assert pick(hopper, attention=backend, compile="on") is not t.attend_sdpa
    assert hopper.lines == [f"attention: {backend}"]


def test_a_package_that_cannot_be_compiled_for_any_length_gives_way(hopper, monkeypatch):
    compile_real, asked = torch.compile, []

    def compile_static(function, dynamic, **options):
        asked.append(dynamic)
        if dynamic:
            raise RuntimeError("a length became a constant")
        return compile_real(function, dynamic=dynamic, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_static)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package())
    torch._dynamo.reset()
    with pytest.raises(t.Stop, match="ATTENTION=fa3: RuntimeError: a length became a constant"):
        pick(hopper, attention="fa3", compile="on")
    assert asked == [False, False, True]


def test_what_a_package_itself_says_is_told_in_a_compiled_run_too(hopper, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("a graph would hide it"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package(broken))
    with pytest.raises(t.Stop, match="ATTENTION=fa3: RuntimeError: CUDA error: no kernel image is available"):
        pick(hopper, attention="fa3", compile="on")


def test_a_tensor_that_is_passed_twice_cannot_be_traced(hopper, monkeypatch):
    """What the first compiled step died of, and what the trial sees (torch 2.13 and later)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    library = package()

    def attend(q, k, v, starts, longest):
        if starts is None:
            return library.flash_attn_func(q, k, v, causal=True)
        packed = library.flash_attn_varlen_func(
            q[0], k[0], v[0], starts, starts, longest, longest, causal=True
        )
        return packed[None]

    torch._dynamo.reset()
    assert t.try_attention(attend, hopper.config, hopper) == ""
    with pytest.raises(torch._dynamo.exc.Unsupported, match="duplicate"):
        t.try_attention(attend, replace(hopper.config, compile="on"), hopper)


class RoundedAttention(torch.autograd.Function):
    """Causal attention that rounds where FlashAttention does, heads first; sums are in fp32."""

    @staticmethod
    def forward(ctx, q, k, v, factor):
        T, D = q.shape[-2:]
        scores = (q.float() @ k.float().mT) / D**0.5
        p = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        output = (factor * (p.to(q.dtype).float() @ v.float())).to(q.dtype)
        ctx.save_for_backward(q, k, v, p, output)
        return output

    @staticmethod
    def backward(ctx, upstream):
        q, k, v, p, output = ctx.saved_tensors
        scale = q.size(-1) ** -0.5
        up = upstream.float()
        slopes = p * (up @ v.float().mT - (up * output.float()).sum(-1, keepdim=True))
        slopes = slopes.to(q.dtype).float() * scale
        gradients = slopes @ k.float(), slopes.mT @ q.float(), p.to(q.dtype).float().mT @ up
        return *(gradient.to(q.dtype) for gradient in gradients), None


@pytest.mark.parametrize(("factor", "said"), [(1.0, ""), (1.03, "gives other dense results")])
def test_the_trial_takes_what_bfloat16_alone_makes_inexact_and_no_more(hopper, factor, said):
    def attend(q, k, v, starts, longest):
        def dense(q, k, v):
            copies = q.size(2) // k.size(2)
            k, v = (x.repeat_interleave(copies, 2) for x in (k, v))
            return RoundedAttention.apply(*(x.transpose(1, 2) for x in (q, k, v)), factor).transpose(1, 2)

        if starts is None:
            return dense(q, k, v)
        edges = torch.unique(starts).tolist()
        spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
        return torch.cat([dense(*(x[:, span] for x in (q, k, v))) for span in spans], 1)

    for config in (hopper.config, replace(hopper.config, model_dim=512, num_heads=8, num_kv_heads=4)):
        assert t.try_attention(attend, config, hopper).startswith(said)
        assert bool(t.try_attention(attend, config, hopper)) == bool(said)


def test_the_hub_gives_its_version_or_one_line(hopper, monkeypatch):
    asked = []

    def get_kernel(name, *, version):
        asked.append((name, version))
        return package()

    hub = types.ModuleType("kernels")
    hub.get_kernel = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", hub)
    pick(hopper)
    assert asked == [("kernels-community/flash-attn3", 1)]
    assert hopper.lines[0].startswith("attention: fa3_hub (not fa3: cannot be imported")

    def offline(name, version):
        raise OSError("cannot reach the hub\nwith a long explanation")

    hub.get_kernel = offline
    with pytest.raises(t.Stop, match=r"^ATTENTION=fa3_hub: OSError: cannot reach the hub; install it .*$"):
        pick(hopper, attention="fa3_hub")


def test_the_trial_leaves_the_random_numbers_of_the_initial_weights_alone(hopper, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    pick(hopper)
    assert torch.equal(torch.rand(3), expected)


def test_what_fails_on_another_rank_is_used_on_none(hopper):
    hopper.world_size = 2
    failures = iter([1.0, 0.0])  # of the other rank
    hopper.sum_over_ranks = lambda tensor: tensor.add_(next(failures))
    order = {"fast": lambda: max, "slow": lambda: len}
    assert t.first_usable(hopper, "attention", "ATTENTION", "auto", order) is len
    assert hopper.lines == ["attention: slow (not fast: cannot be used on 1 other ranks)"]


def test_packed_rows_with_pytorchs_dense_attention_are_not_compiled(hopper, settings, monkeypatch):
    packed = replace(hopper.config, loader="packed", compile="auto")
    assert not t.choose_compile(packed, hopper, t.attend_sdpa)
    assert hopper.lines == [
        "compile: off (LOADER=packed with attention sdpa cuts rows by document, which no graph can hold)"
    ]
    assert t.choose_compile(packed, hopper, package().flash_attn_func)
    assert t.choose_compile(replace(packed, loader="shuffled"), hopper, t.attend_sdpa)
    monkeypatch.setattr(t, "check_compiler", lambda run: None)  # it takes seconds
    done = launch(settings | {"LOADER": "packed", "COMPILE": "on"})
    assert done.returncode == 1 and "COMPILE=on: LOADER=packed with attention sdpa" in done.stderr
    assert "set COMPILE=auto, LOADER=shuffled or another ATTENTION" in done.stderr
    assert done.stderr.count("\n") == 1
