"""The fused kernels around attention, interpreted: against their references and in the network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import train_gpt as t
from helpers import ROOT
from helpers.tensors import perturbed, tokens
from helpers.trainer import replace, without_interpreter

triton = pytest.importorskip("triton")

TOLERANCES = [(torch.float32, 2e-6), (torch.float16, 2e-3)]
FUSED = {"num_heads": 4, "num_kv_heads": 2, "xsa_last_n": 11}
# Few visits, since each takes long to interpret and to trace; the last two are of parallel lanes.
FUSED |= {"num_layers": 3, "loop_end": 1, "parallel_start_layer": 2}


YARN = {"rope_yarn": True, "train_seq_len": 4}


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values, rounded to `dtype`."""
    return torch.randn(*shape, generator=generator).to(dtype)


def compare(operator, reference, inputs, upstreams, tolerance):
    """Results and gradients of `operator` beside those of `reference` in fp64, as shares of their norms."""
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.double().requires_grad_() for tensor in inputs]
    found, expected = operator(*ours), reference(*theirs)
    torch.autograd.backward(found, upstreams)
    torch.autograd.backward(expected, [upstream.double() for upstream in upstreams])
    pairs = list(zip(found, expected, strict=True))
    pairs += [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    for place, (a, b) in enumerate(pairs):
        assert a.dtype == inputs[0].dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= tolerance * b.norm(), place


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize(
    "rows, length, heads, kv_heads, size, rotated",
    [(1, 1, 1, 1, 16, 8), (2, 21, 4, 2, 32, 16), (1, 37, 3, 3, 24, 24), (3, 5, 8, 4, 64, 0)],
)
def test_norm_gain_and_rotation(
    poisoned, rows, length, heads, kv_heads, size, rotated, dtype, tolerance, monkeypatch
):
    # The reference in fp64 would take the precision of fp64.
    monkeypatch.setattr(t, "rms_norm", lambda x: F.rms_norm(x, (x.size(-1),), eps=t.RMS_EPS))
    generator = torch.Generator().manual_seed(length)
    q, q_upstream = (draw(generator, rows, length, heads, size, dtype=dtype) for _ in range(2))
    k, k_upstream = (draw(generator, rows, length, kv_heads, size, dtype=dtype) for _ in range(2))
    q[0, 0] *= 1e-3  # so small that the term added to its square counts
    gain = draw(generator, heads, dtype=dtype)
    angles = 3 * draw(generator, length, 1, rotated // 2)
    cos, sin = t.rotation_tables_op(angles, dtype)
    compare(
        lambda *inputs: t.rotated_heads_op(*inputs, cos, sin)[:2],
        lambda *inputs: t.rotated_heads_reference(*inputs, cos.double(), sin.double()),
        [q, k, gain],
        [q_upstream, k_upstream],
        tolerance,
    )


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize(
    "rows, length, heads, kv_heads, size, read, width",
    [(1, 1, 1, 1, 16, 1, 1), (2, 21, 4, 2, 32, 12, 128), (1, 37, 3, 1, 24, 5, 72), (3, 5, 8, 4, 64, 64, 64)],
)
@pytest.mark.parametrize("gate", [t.Gate(2.0, 1.0), t.Gate(1.0, 0.5)])
def test_xsa_and_gate(poisoned, rows, length, heads, kv_heads, size, read, width, gate, dtype, tolerance):
    generator = torch.Generator().manual_seed(length)
    y, upstream = (draw(generator, rows, length, heads, size, dtype=dtype) for _ in range(2))
    v = draw(generator, rows, length, kv_heads, size, dtype=dtype)
    v[0, 0, 0] = 0  # has no direction
    source = draw(generator, rows, length, width, dtype=dtype)
    weight = draw(generator, heads, read, dtype=dtype)
    compare(
        lambda y, v, source, weight: [t.attention_output_op(y, v, None, source[..., :read], weight, *gate)],
        lambda y, v, source, weight: [t.attention_output_reference(y, v, source[..., :read], weight, gate)],
        [y, v, source, weight],
        [upstream],
        tolerance,
    )


def test_the_operators_can_be_traced():
    q, k = torch.randn(1, 3, 2, 16, requires_grad=True), torch.randn(1, 3, 1, 16, requires_grad=True)
    gain = torch.ones(2, requires_grad=True)
    tables = t.rotation_tables_op(torch.randn(3, 1, 4), torch.float32)
    source = torch.randn(1, 3, 32, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(t.rotated_heads_op, (q, k, gain, *tables), test_utils=checks)
    given = (q, k, None, source[..., :5], torch.randn(2, 5, requires_grad=True), 2.0, 1.0)
    torch.library.opcheck(t.attention_output_op, given, test_utils=checks)
    torch.library.opcheck(t.rotation_tables_op, (torch.randn(3, 1, 4), torch.bfloat16), test_utils=checks)


def make(config: t.Config, **options) -> t.GPT:
    """A model in fp32 whose parameters are all far from their neutral initial values."""
    torch.manual_seed(0)
    model = perturbed(t.GPT(config, **options), 0.3)
    model.looped = True
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_gate": "attn_out", "gate_attn_src": "residual", "num_loops": 0, "mudd_last_n": 1},
        {
            "head_gate": "attn_out",
            "gate_attn_src": "q",
            "xsa_last_n": 2,
            "parallel_start_layer": 1,
            "parallel_first_skip": "both",
            "skip_gates_enabled": False,
        },
        {"head_gate": "none"},
        {"gate_width": 0, "parallel_residual": "gptj"},
        {"parallel_residual": "none", "skip_gates_enabled": False},
    ],
)
def test_the_fused_network_is_the_plain_one(config, changes):
    """Losses within 1e-6 of fp64 and every parameter's gradient within 1e-4, adapters included."""
    config = replace(config, **(FUSED | changes))
    batch = tokens(config, rows=2, length=9)
    fused = make(config, fused=True)
    plain = t.GPT(config, dtype=torch.float64).double()
    plain.load_state_dict(fused.state_dict())
    plain.looped = fused.looped
    loras = [t.LoRA(config, 2, torch.device("cpu")) for _ in range(2)]
    for lora in loras:
        lora.reset(0)
        for write in lora.write.values():
            write.data.normal_(generator=torch.Generator().manual_seed(1))
    loras[1].double()
    for adapters in ((None, None), loras):
        losses = fused(batch, lora=adapters[0]).double(), plain(batch, lora=adapters[1]).double()
        # fp32 has 6e-8 of relative precision, and losses are up to 30: 1e-6 of the norm.
        assert (losses[0] - losses[1]).norm() <= 1e-6 * losses[1].norm()
        for loss in losses:
            loss.mean().backward()
        modules = zip((fused, *loras[:1]), (plain, *loras[1:]), strict=True)
        for one, other in modules:
            for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
                if b.grad is not None:
                    assert (a.grad.double() - b.grad).norm() <= 1e-4 * b.grad.norm(), name
                    a.grad = b.grad = None


def test_calibration_sees_the_outputs_before_their_scale(config):
    """The fused network with a tap gives the same inputs, outputs and losses as the plain one."""
    config = replace(config, **FUSED)
    batch = tokens(config, rows=1, length=9)
    fused = make(config, fused=True)
    plain = t.GPT(config)
    plain.load_state_dict(fused.state_dict())
    plain.looped = True
    seen = {}, {}
    for model, found in zip((fused, plain), seen, strict=True):
        model(batch, lambda site, layer, x, y, found=found: found.update({(site, layer): (x, y)}))
    assert seen[0].keys() == seen[1].keys()
    for key, (x, y) in seen[1].items():
        assert torch.allclose(seen[0][key][0], x, rtol=1e-4, atol=1e-4), key
        assert torch.allclose(seen[0][key][1], y, rtol=1e-4, atol=1e-3), key


@pytest.mark.parametrize("fused, changes", [(True, {}), (True, YARN), (False, YARN)])
def test_one_dynamic_graph_serves_every_length(config, fused, changes):
    config = replace(config, **(FUSED | changes))
    model = make(config, fused=fused)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for length in (4, 7):
        batch = tokens(config, rows=2, length=length)
        assert torch.allclose(compiled(batch), model(batch), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_the_rotation_is_computed_once_per_forward(config):
    """Sines inside the kernels of every visit would cost more than all they move."""
    sines = []

    def inspect(graph, inputs):
        sines.extend(node for node in graph.graph.nodes if "cos" in str(node.target))
        return graph.forward

    config = replace(config, **FUSED)
    model = make(config)
    torch.compile(model, backend=inspect, fullgraph=True)(tokens(config))
    assert not sines


COMPILE = """
import sys; sys.path.insert(0, {root!r})
import subprocess, tempfile
import triton, train_gpt as t
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
SIZES = dict(HEADS=8, KV_HEADS=4, GROUP=2, D=64, HALF=8, READ=12, BLOCK=t.HEAD_BLOCK, WIDTH=64, READ_WIDTH=16)
STRIDES = ("q_stride", "k_stride", "q_pitch", "k_pitch")
NUMBERS = dict(dict.fromkeys(STRIDES, "i32"), tokens="i32", length="i32", stride="i32", eps="fp32",
               height="fp32", slope="fp32", gain_gradients="*fp32", weight_gradients="*fp32")
KERNELS = (t.rotated_heads_kernel, t.rotated_heads_backward_kernel,
           t.attention_output_kernel, t.attention_output_backward_kernel)
for capability in (90, 100):
    for kernel in KERNELS:
        signature = {{name: "constexpr" if name in SIZES else NUMBERS.get(name, "*bf16")
                      for name in kernel.arg_names}}
        source = ASTSource(kernel, signature, {{n: SIZES[n] for n in kernel.arg_names if n in SIZES}})
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options=dict(num_warps=t.HEAD_WARPS))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(capability, kernel.__name__, *(word for word in usage.split() if word[:4] in ("REG:", "STAC")))
"""


def test_the_kernels_compile_for_hopper_and_blackwell_without_spills():
    lines = without_interpreter(COMPILE.format(root=str(ROOT)))
    assert len(lines) == 8
    assert all("STACK:0" in line.split() for line in lines), lines


def test_the_norm_adds_what_the_kernel_adds():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.full((1, 8), 3e-4, dtype=dtype)
        expected = x.double() / (x.double().square().mean() + t.RMS_EPS).sqrt()
        assert torch.allclose(t.rms_norm(x).double(), expected, rtol=1e-2)
