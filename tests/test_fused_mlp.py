"""The GEMM kernel with its epilogues, interpreted and compiled: the fused MLP, Muon's symmetric products."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import train_gpt as t
from helpers import ROOT
from helpers.tensors import distance
from helpers.trainer import replace, without_interpreter

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of norms, relative
SHAPES = [(1, 8, 8), (3, 5, 7), (1300, 24, 300), (257, 40, 72)]  # (M, D, H): tiles are 128 by 128 or by 256


def random(*shapes, dtype=torch.float32, seed=0):
    """Tensors with entries of about one over the root of their last dimension."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype) for shape in shapes]


@pytest.mark.parametrize("keep_input", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width, hidden", SHAPES)
def test_the_mlp_and_all_its_gradients(rows, width, hidden, dtype, keep_input):
    tensors = random((rows, width), (hidden, width), (width, hidden), (rows, width), dtype=dtype, seed=rows)
    ours = [tensor.requires_grad_() for tensor in tensors[:3]]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    result, expected = t.mlp_triton(*ours, keep_input), t.mlp_reference(*theirs)
    result.backward(tensors[3])
    expected.backward(tensors[3].double())
    pairs = [(result, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    assert all(a.dtype == dtype and distance(a, b) < TOLERANCE[dtype] for a, b in pairs)


def test_both_kept_forms_are_what_they_are_called():
    x, up, down = random((20, 16), (40, 16), (16, 40))
    z = x.double() @ up.double().T
    slope = torch.where(z > 0, 2 * z, z / 2)
    for keep_input, expected in ((False, slope), (True, z)):
        _, act, aux = t.mlp_op(x, up, down, keep_input)
        assert distance(aux, expected) < 1e-6 and distance(act, 0.5 * slope * z) < 1e-6


def test_leading_dimensions_and_views_are_taken_as_they_come():
    x, up, down = random((2, 24, 10), (40, 24), (24, 40))
    assert distance(t.mlp_triton(x.mT, up, down), t.mlp_reference(x.mT, up, down)) < 1e-5
    strided = up.T.contiguous().T
    assert t.mlp_triton(x.mT, strided, down).shape == (2, 10, 24)
    assert distance(t.mlp_triton(x.mT, strided, down), t.mlp_reference(x.mT, up, down)) < 1e-5


@pytest.mark.parametrize("keep_input", [False, True])
def test_the_operators_keep_the_rules_of_pytorch(keep_input, monkeypatch):
    monkeypatch.undo()  # opcheck compares what a custom op leaves unwritten, too
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    x, up, down, grad = random((6, 5), (12, 5), (5, 12), (6, 5))
    leaves = [tensor.requires_grad_() for tensor in (x, up, down)]
    torch.library.opcheck(t.mlp_op, (*leaves, keep_input), test_utils=checks)
    torch.library.opcheck(
        t.mlp_backward_op, (grad, down.detach(), torch.randn(6, 12), keep_input), test_utils=checks
    )
    torch.library.opcheck(t.symmetric_product_op, (torch.randn(2, 5, 7), 0.0, 1.0), test_utils=checks)
    fakes = torch._subclasses.FakeTensorMode()
    with fakes:
        outputs = t.mlp_op(torch.empty(6, 5), torch.empty(12, 5), torch.empty(5, 12), keep_input)
    assert [tuple(out.shape) for out in outputs] == [(6, 5), (6, 12), (6, 12)]
    assert len({out.untyped_storage()._cdata for out in outputs}) == 3


def test_the_operators_are_traced_in_one_graph():
    x, up, down = (tensor.requires_grad_() for tensor in random((6, 8), (16, 8), (8, 16)))
    compiled = torch.compile(t.mlp_triton, backend="aot_eager", fullgraph=True)
    result = compiled(x, up, down)
    assert distance(result, t.mlp_reference(x, up, down)) < 1e-5
    expected = torch.autograd.grad(t.mlp_reference(x, up, down).sum(), (x, up, down))
    pairs = zip(torch.autograd.grad(result.sum(), (x, up, down)), expected, strict=True)
    assert all(distance(a, b) < 1e-5 for a, b in pairs)
    muon = torch.compile(t.orthogonalize, backend="aot_eager", fullgraph=True)
    update, coefficients = up.detach()[None], t.NEWTON_SCHULZ["polar_express"]
    assert distance(muon(update, coefficients, True), t.orthogonalize(update, coefficients)) < 1e-5


def test_one_dynamic_graph_serves_every_number_of_rows():
    counter = CompileCounter()
    compiled = torch.compile(t.mlp_triton, backend=counter, dynamic=True, fullgraph=True)
    up, down = (tensor.requires_grad_() for tensor in random((16, 8), (8, 16)))
    for rows in (6, 7, 19):
        (x,) = random((rows, 8))
        assert distance(compiled(x, up, down), t.mlp_reference(x, up, down)) < 1e-5
    products = torch.compile(t.symmetric_product_op, backend=counter, dynamic=True, fullgraph=True)
    for matrices, rows in ((2, 5), (3, 6), (4, 9)):
        (x,) = random((matrices, rows, 7))
        assert distance(products(x, 0.0, 1.0), x @ x.mT) < 1e-5
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 130, 70), (1, 300, 40)])
def test_symmetric_products(shape, dtype, monkeypatch):
    def product(a, b, dtype):
        # NumPy's own adds in an order that on some CPUs is not the same for (i, j) and (j, i).
        return np.einsum("...ik,...kj->...ij", a, b, dtype=dtype)

    monkeypatch.setattr(np, "matmul", product)  # what Triton's interpreter takes for a tile's product
    (x,) = random(shape, dtype=dtype)
    gram = t.symmetric_product_op(x, 0.0, 1.0)
    assert torch.equal(gram, gram.mT) and distance(gram, x.double() @ x.double().mT) < TOLERANCE[dtype]
    whole = t.symmetric_product_op(gram, -2.5, 1.5)
    expected = -2.5 * gram.double() + 1.5 * gram.double() @ gram.double()
    assert torch.equal(whole, whole.mT) and distance(whole, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(2, 24, 40), (3, 40, 24)])
@pytest.mark.parametrize("kind", t.NEWTON_SCHULZ)
def test_newton_schulz_with_and_without_the_symmetric_products(shape, kind):
    (update,) = random(shape)
    coefficients = t.NEWTON_SCHULZ[kind] * (5 if kind == "classic" else 1)
    fused, plain = (t.orthogonalize(update, coefficients, fused) for fused in (True, False))
    assert fused.shape == plain.shape and distance(fused, plain) < 1e-4


def test_a_whole_model_with_the_fused_mlp(config):
    changed = replace(config, num_layers=2, num_loops=0, parallel_start_layer=1, mlp_mult=3.0)
    rows = torch.randint(2, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    batch, losses, gradients = t.Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()), [], []
    for feed_forward in (t.mlp_reference, t.mlp_triton):
        torch.manual_seed(0)
        model = t.GPT(changed, feed_forward=feed_forward)
        torch.manual_seed(1)
        for parameter in model.parameters():  # nothing may be zero: a gradient of zero shows nothing
            parameter.data.add_(0.05 * torch.randn_like(parameter).nan_to_num())
        losses.append(model(batch))
        losses[-1].mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0].isfinite().all() and distance(losses[1], losses[0]) < 1e-5
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    assert all(
        distance(gradients[1][name], value) < 1e-4 for name, value in gradients[0].items() if value.norm() > 0
    )


def test_calibration_takes_the_plain_path(config):
    def never(*_):
        raise AssertionError

    model = t.GPT(config, feed_forward=never)
    tokens = torch.randint(2, config.vocab_size, (2, 9))
    batch, sites = t.Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), set()
    model(batch, tap=lambda site, *_: sites.add(site))
    assert {"up", "down"} <= sites
    with pytest.raises(AssertionError):
        model(batch)


def test_adapters_train_on_the_fused_mlp_while_the_weights_are_frozen(config):
    tokens = torch.randint(2, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    batch, losses, gradients = t.Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), [], []
    for feed_forward in (t.mlp_reference, t.mlp_triton):
        torch.manual_seed(0)
        used = mock.Mock(side_effect=feed_forward)
        model = t.GPT(config, feed_forward=used).requires_grad_(False)
        lora = t.LoRA(config, 2, torch.device("cpu"))
        for parameter in (*model.parameters(), *lora.parameters()):  # nothing may be zero
            parameter.data = parameter.data.nan_to_num() + 0.05 * torch.randn_like(parameter)
        losses.append(model(batch, lora=lora))
        losses[-1].sum().backward()
        gradients.append({name: p.grad for name, p in lora.named_parameters()})
        assert used.call_count == config.num_layers and all(p.grad is None for p in model.parameters())
    assert distance(losses[1], losses[0]) < 1e-5
    assert all(
        value.norm() > 0 and distance(gradients[1][name], value) < 1e-4
        for name, value in gradients[0].items()
    )


class Watched:
    """Stands in for a Run: remembers what was logged."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        self.dtype, self.device, self.is_cuda, self.lines = dtype, torch.device(device), device == "cuda", []
        self.world_size = 1

    def log(self, line):
        """Remember one line."""
        self.lines.append(line)


def test_the_choice_of_the_mlp_is_logged_with_the_reasons_against_the_better_ones(config):
    run = Watched()
    assert t.pick_mlp(config, run, fused=False) is t.mlp_reference
    assert t.pick_mlp(config, run, fused=True) is t.mlp_triton
    assert t.pick_mlp(replace(config, mlp_kernel="triton"), run, fused=False) is t.mlp_triton
    assert t.pick_mlp(replace(config, mlp_kernel="reference"), run, fused=True) is t.mlp_reference
    first, second, third, fourth = run.lines
    assert first.startswith("mlp: reference (not cutlass: the operands are torch.float32")
    assert first.endswith("not triton: KERNELS=auto chose the reference)")
    assert second.startswith("mlp: triton (not cutlass: ") and (third, fourth) == (
        "mlp: triton",
        "mlp: reference",
    )


def test_older_gpus_do_not_get_the_triton_mlp_unless_it_is_asked_for(config, monkeypatch):
    for capability, expected in (((8, 9), t.mlp_reference), ((9, 0), t.mlp_triton), ((10, 0), t.mlp_triton)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        run = Watched(torch.float32, "cuda")
        assert t.pick_mlp(config, run, fused=True) is expected
        assert t.pick_mlp(replace(config, mlp_kernel="triton"), run, fused=True) is t.mlp_triton
        assert ("compute capability 9.0, this GPU has 8.9" in run.lines[0]) == (expected is t.mlp_reference)


def test_an_mlp_that_cannot_be_had_stops_the_run(config, monkeypatch, tmp_path):
    with pytest.raises(
        t.Stop, match="MLP_KERNEL=cutlass: the operands are torch.float32.*set MLP_KERNEL=auto"
    ):
        t.pick_mlp(replace(config, mlp_kernel="cutlass"), Watched(), fused=True)
    narrow = replace(config, mlp_kernel="cutlass", model_dim=36, mlp_mult=1.0)
    with pytest.raises(t.Stop, match="MLP_KERNEL=cutlass: MODEL_DIM"):
        t.pick_mlp(narrow, Watched(), fused=True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(t.Stop, match="MLP_KERNEL=triton: there is no GPU"):
        t.pick_mlp(replace(config, mlp_kernel="triton"), Watched(), fused=True)
    monkeypatch.setattr(t, "__file__", str(tmp_path / "train_gpt.py"))
    with pytest.raises(t.Stop, match="MLP_KERNEL=cutlass: there is no folder"):
        t.pick_mlp(replace(config, mlp_kernel="cutlass"), Watched(), fused=True)


def test_cutlass_comes_first_where_it_can_run(config, monkeypatch):
    import cutlass_evt_fusion

    monkeypatch.setattr(cutlass_evt_fusion, "available", lambda *_: "")
    run = Watched()
    assert t.pick_mlp(config, run, fused=True) is cutlass_evt_fusion.leaky_relu_squared_mlp
    assert run.lines == ["mlp: cutlass"]


COMPILE = """
import re, subprocess, sys, tempfile; sys.path.insert(0, {root!r})
import triton, train_gpt as t
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
modes = ("act_and_slope", "act_and_input", "times_slope", "times_input", "gram", "polynomial")
for capability, mode in (*((90, mode) for mode in modes), (100, "act_and_slope"), (100, "gram")):
    m, n, k = t.gemm_tile(mode, t.torch.bfloat16)
    tile = lambda *block: f"tensordesc<bf16[1,{{block[0]}},{{block[1]}}]>"
    right = tile(k, n) if mode.startswith("times") else tile(n, k)
    constants = dict(MODE=mode, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=8)
    types = dict(a=tile(m, k), b=right, aux=tile(m, n), out=tile(m, n), linear="fp32", square="fp32")
    types |= dict(rows="i32", columns="i32", depth="i32", **dict.fromkeys(constants, "constexpr"))
    source = ASTSource(t.gemm_kernel, {{name: types[name] for name in t.gemm_kernel.arg_names}}, constants)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=dict(num_warps=8, num_stages=4))
    assert built.metadata.shared <= 232_448, built.metadata.shared
    text = built.asm["ptx"]
    assert ("wgmma.mma_async" if capability == 90 else "tcgen05.mma") in text
    assert "cp.async.bulk.tensor" in text
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        tool = tools / ("ptxas" if capability == 90 else "ptxas-blackwell")
        said = subprocess.run([tool, "-v", f"--gpu-name=sm_{{capability}}a", file.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    print(capability, mode, built.metadata.shared, re.findall(r"Used (\\d+) registers", said))
"""


def test_the_kernel_compiles_for_hopper_and_blackwell_within_their_limits():
    assert len(without_interpreter(COMPILE.format(root=str(ROOT)))) == 8


def compiled_run(config, monkeypatch, **changes):
    """A Run that remembers its log and metrics, and a model compiled without code generation."""
    run = t.Run(replace(config, loader="packed", **changes))
    run.lines, run.records = [], []
    run.log = lambda line, console=True: run.lines.append(line)
    run.metric = lambda kind, **values: run.records.append((kind, values))
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k, backend="eager"))

    # Attention of its own: the one without a GPU is cut by document, which a whole graph cannot hold.
    def attend(q, k, v, starts, longest):
        y = t.attend_sdpa(q, k, v, None, longest)
        return y if starts is None else y + 0 * starts.sum()

    monkeypatch.setattr(t, "pick_attention", lambda *_: attend)
    return run


@pytest.mark.parametrize("covered", [True, False])
def test_what_is_compiled_inside_the_clock_is_counted(config, monkeypatch, tmp_path, covered):
    run = compiled_run(
        config,
        monkeypatch,
        compile="on",
        iterations=3,
        num_layers=2,
        num_loops=0,
        checkpoint_every=0,
        parallel_residual="none",
        train_batch_tokens=1024,
    )
    run.folder = tmp_path
    data, load, torch._dynamo.config.recompile_limit = t.Dataset(run.config), t.Feed.load, 64

    def denser(feed, step):
        """From step 1 on, more segments than warm-up has seen, or their starts in another type."""
        starts = t.pad_starts(np.zeros(600, np.int32), 128)
        starts = starts if covered else starts.long()
        return [batch._replace(starts=starts) if step else batch for batch in load(feed, step)]

    monkeypatch.setattr(t.Feed, "load", denser)
    t.train(run, data, t.build(run))
    (line,) = [line for line in run.lines if "graphs before the clock" in line]
    ((_, facts),) = [record for record in run.records if record[0] == "train" and "steps" in record[1]]
    assert facts["graphs_before_clock"] > 2 and facts["graphs_inside_clock"] == (0 if covered else 1)
    assert line.startswith("compile: " if covered else "warning: compile: ")
    assert line.endswith(f"{facts['graphs_inside_clock']} inside it")
