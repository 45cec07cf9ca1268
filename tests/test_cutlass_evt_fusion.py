"""The optional CUTLASS library: op and formulas without a GPU, the build, the kernels where they can run."""

from __future__ import annotations

import ctypes
import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cutlass_evt_fusion as fusion
from cutlass_evt_fusion import bench, build

OPS = torch.ops.cutlass_evt


def needs(condition: str) -> pytest.MarkDecorator:
    """Skips a test for the reason `condition`, if there is one."""
    return pytest.mark.skipif(bool(condition), reason=condition or "-")


def no_compiler() -> str:
    """Why the compile test does not run, or ""."""
    if os.environ.get("CUTLASS_COMPILE_TEST") != "1":
        return "takes minutes: set CUTLASS_COMPILE_TEST=1"
    try:
        build.nvcc_version(build.find_nvcc(os.environ))
        build.find_wheel()
    except build.BuildError as error:
        return str(error)
    return ""


def weights(dtype: torch.dtype, width: int = 16, hidden: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable up and down matrices."""
    source = torch.Generator().manual_seed(1)
    draw = lambda *shape: (
        torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    )
    return draw(hidden, width), draw(width, hidden)


def inputs(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Differentiable activations."""
    source = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """Plain torch in the place of the kernels; the list fills with the kernels that were launched."""
    seen: list[int] = []

    def stand_in(
        kernel: int, a: torch.Tensor, b: torch.Tensor, others: tuple[torch.Tensor, ...], columns: int
    ) -> None:
        seen.append(kernel)
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        first, second = others
        if kernel == fusion.BACKWARD:
            second.copy_((a.to(wide) @ b.to(wide)) * first)
        else:
            for out, value in zip(others, bench.elementwise(a.to(wide) @ b.to(wide).T), strict=True):
                out.copy_(value)
        assert first.size(1) == second.size(1) == columns

    monkeypatch.setattr(fusion, "launch", stand_in)
    return seen


# --- the formulas


def test_the_stored_slope_is_the_derivative_and_gives_the_activation():
    z = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)  # with zero in the middle
    act, slope = bench.elementwise(z)
    wanted = torch.nn.functional.leaky_relu(z, 0.5).square()
    assert torch.allclose(act, wanted, rtol=0, atol=1e-15)
    (derivative,) = torch.autograd.grad(wanted.sum(), z)
    assert torch.allclose(slope, derivative, rtol=0, atol=1e-15)


def test_rounding_the_slope_is_taking_the_slope_of_the_rounded_product():
    z = torch.randn(4096, generator=torch.Generator().manual_seed(2)) * 10
    assert torch.equal(bench.elementwise(z)[1].bfloat16(), bench.elementwise(z.bfloat16())[1])


def test_gradients_are_those_of_the_reference(launches):
    gradients = []
    for function in (fusion.leaky_relu_squared_mlp, fusion.leaky_relu_squared_mlp_reference):
        leaves = inputs(torch.float64, 2, 5, 16), *weights(torch.float64)
        out = function(*leaves)
        gradients.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    assert all(
        torch.allclose(got, wanted, rtol=1e-12, atol=1e-12) for got, wanted in zip(*gradients, strict=True)
    )
    assert launches == [fusion.FORWARD, fusion.BACKWARD]


def test_gradients_are_those_of_finite_differences(launches):
    leaves = inputs(torch.float64, 3, 4), *weights(torch.float64, 4, 6)
    assert torch.autograd.gradcheck(fusion.leaky_relu_squared_mlp, leaves, fast_mode=True)


# --- tracing


def test_the_compiler_traces_both_directions_without_a_break(launches):
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    leaves = inputs(torch.bfloat16, 2, 8, 16), *weights(torch.bfloat16)
    compiled = torch.compile(
        fusion.leaky_relu_squared_mlp, fullgraph=True, backend=aot_autograd(fw_compiler=backend)
    )
    out = compiled(*leaves)
    out.float().sin().sum().backward()
    eager = fusion.leaky_relu_squared_mlp(*leaves)
    assert torch.equal(out, eager) and all(leaf.grad is not None for leaf in leaves)
    forward, backward = graphs
    assert (
        "cutlass_evt.leaky_relu_squared_mlp.default" in forward and "cutlass_evt.gemm_mul.default" in backward
    )
    assert not any("zeros" in target for target in backward)  # no gradients are made up for act and slope


def test_fake_tensors_pass_through_the_ops():
    with FakeTensorMode():
        x, up, down = (
            torch.empty(*shape, dtype=torch.bfloat16) for shape in ((98304, 512), (2048, 512), (512, 2048))
        )
        act, slope = OPS.gemm_leaky_relu_squared(x, up)
        assert act.shape == slope.shape == (98304, 2048) and act.dtype == torch.bfloat16
        assert OPS.gemm_mul(x, down, slope).shape == (98304, 2048)
        assert fusion.leaky_relu_squared_mlp(x.view(8, -1, 512), up, down).shape == (8, 12288, 512)


@pytest.mark.parametrize("checks", ["test_schema", "test_faketensor", "test_autograd_registration"])
def test_the_ops_keep_what_they_promise_to_torch(launches, checks):
    x, (up, down) = inputs(torch.bfloat16, 8, 16), weights(torch.bfloat16)
    slope = inputs(torch.bfloat16, 8, 24)
    torch.library.opcheck(OPS.leaky_relu_squared_mlp, (x, up, down), test_utils=checks)
    torch.library.opcheck(OPS.gemm_leaky_relu_squared, (x.detach(), up.detach()), test_utils=checks)
    torch.library.opcheck(OPS.gemm_mul, tuple(t.detach() for t in (x, down, slope)), test_utils=checks)


# --- refusals


def test_without_a_gpu_the_reason_is_told_and_the_op_raises_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch.cuda.is_available() is False" in fusion.available()
    assert "torch.float32" in fusion.available(torch.float32) and "on cpu" in fusion.available(device="cpu")
    leaves = inputs(torch.bfloat16, 8, 16), *weights(torch.bfloat16)
    with pytest.raises(RuntimeError, match="the operands are on cpu; the kernels need an H100"):
        fusion.leaky_relu_squared_mlp(*leaves)


def test_an_older_gpu_and_a_missing_or_stale_library_are_named(monkeypatch, tmp_path):
    capability = [8, 0]
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "A100")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(build, "RECORD", tmp_path / "library.json")
    fusion.device_problem.cache_clear()
    fusion.load_library.cache_clear()
    assert "cuda:0 (A100) has compute capability 8.0" in fusion.available()
    fusion.device_problem.cache_clear()
    capability[:] = 9, 0
    assert "library.so is not built; run: python cutlass_evt_fusion/build.py" in fusion.available()
    build.LIBRARY.write_bytes(b"")
    build.RECORD.write_text(json.dumps({"source": "another"}))
    assert "was built from another kernels.cu; run" in fusion.available()
    build.RECORD.write_text(json.dumps({"source": build.source_hash()}))
    assert "cannot be loaded" in fusion.available()
    fusion.device_problem.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, up, down: (x[:, :12], up[:, :12], down[:12]),
            r"x \(8, 12\) has rows of 12 elements; TMA needs",
        ),
        (lambda x, up, down: (x, up[:20], down[:, :20]), r"act \(8, 20\) has rows of 20 elements"),
        (lambda x, up, down: (x, up.float(), down), r"up \(24, 16\) is torch.float32 .* convert it"),
        (
            lambda x, up, down: (x, up.T.contiguous().T, down),
            r"up .* strides \(1, 24\); .* call .contiguous\(\)",
        ),
        (lambda x, up, down: (x, up[:, :8].contiguous(), down), "D is 16 in one operand and 8 in another"),
        (lambda x, up, down: (x, up[None], down), r"up \(1, 24, 16\) has 3 dimensions"),
        (
            lambda x, up, down: (x, up.flatten()[1:129].view(8, 16), down),
            r"starts at address .* call .clone\(\)",
        ),
    ],
)
def test_operands_that_tma_cannot_address_are_refused(change, message):
    operands = inputs(torch.bfloat16, 8, 16), *weights(torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        fusion.leaky_relu_squared_mlp(*change(*operands))


def test_the_product_checks_all_its_sizes():
    grad, slope = torch.zeros(8, 16), torch.zeros(16, 24)
    with pytest.raises(ValueError, match="gemm_mul: M is 8 in one operand and 16 in another"):
        fusion.gemm_mul(grad, torch.zeros(16, 24), slope)


# --- the build


def compiler(folder: Path, version: str) -> Path:
    """A stand-in for nvcc that only tells its version."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_build_names_a_missing_or_old_compiler(monkeypatch, tmp_path, capsys):
    with pytest.raises(build.BuildError, match="nvcc is not on PATH and CUDA_HOME is not set; install"):
        build.find_nvcc({"PATH": str(tmp_path)})
    with pytest.raises(
        build.BuildError, match=r"CUDA_HOME='/nowhere': there is no bin/nvcc in it; set CUDA_HOME"
    ):
        build.find_nvcc({"CUDA_HOME": "/nowhere", "PATH": os.environ["PATH"]})
    nvcc = compiler(tmp_path, "Cuda compilation tools, release 12.2, V12.2.140")
    assert (
        build.find_nvcc({"PATH": str(nvcc.parent)}) == build.find_nvcc({"CUDA_HOME": str(tmp_path)}) == nvcc
    )
    with pytest.raises(build.BuildError, match=r"is version 12.2.140; the kernels need 12.3 or newer"):
        build.nvcc_version(nvcc)
    compiler(tmp_path, "Cuda compilation tools, release 12.8, V12.8.93")
    assert build.nvcc_version(nvcc) == (12, 8, 93)
    compiler(tmp_path, "broken")
    with pytest.raises(build.BuildError, match="shows no version but 'broken'"):
        build.nvcc_version(nvcc)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert build.main() == 1
    assert re.fullmatch(r"cutlass_evt_fusion: CUDA_HOME='/nowhere': .*\n", capsys.readouterr().err)


def test_the_build_names_missing_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        build.BuildError, match="wheel is not installed .* pip install --no-deps nvidia-cutlass==4.2"
    ):
        build.find_wheel()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(build.importlib.metadata, "version", lambda _: "4.2.0.0")
    with pytest.raises(build.BuildError, match=r"4.2.0.0: the header .*cutlass/cutlass.h is missing; run"):
        build.find_wheel()


def test_the_build_is_repeated_only_if_something_changed(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_wheel", lambda: build.Wheel("4.2.0.0", (tmp_path, tmp_path)))
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(build, "RECORD", tmp_path / "library.json")
    compiler(tmp_path, "release 13.0, V13.0.88")
    build.LIBRARY.write_bytes(b"")
    identity = {"source": build.source_hash(), "nvcc": "13.0.88", "cutlass": "4.2.0.0", "flags": build.FLAGS}
    build.RECORD.write_text(json.dumps(identity))
    assert build.build() == (identity, False)
    compiler(tmp_path, "release 13.1, V13.1.1")
    with pytest.raises(build.BuildError, match="nvcc 13.1.1 failed with status 0"):  # it writes no library
        build.build()
    assert build.LIBRARY.exists() and build.RECORD.exists()


def test_the_build_reads_registers_and_refuses_spills():
    line = (
        "ptxas info    : Compiling entry function '_Z{}' for 'sm_90a'\nptxas info    : Function properties\n"
        "    0 bytes stack frame, {} bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 2 barriers\n"
    )
    log = line.format("Sm90AuxStore", 0) + line.format("Sm90AuxLoad", 0)
    assert build.read_ptxas(log)["forward"] == {
        "registers": 168,
        "stack": 0,
        "spill_stores": 0,
        "spill_loads": 0,
    }
    with pytest.raises(build.BuildError, match="the backward kernel spills 16 bytes"):
        build.read_ptxas(line.format("Sm90AuxStore", 0) + line.format("Sm90AuxLoad", 16))
    with pytest.raises(build.BuildError, match=r"the kernels \['forward'\] where"):
        build.read_ptxas(line.format("Sm90AuxStore", 0))
    with pytest.raises(build.BuildError, match="would be slow: .*wgmma"):
        build.read_ptxas(
            log + "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
            "serialized due to x\n"
        )


def test_the_benchmark_says_why_it_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(fusion, "available", lambda: "there is no GPU")
    monkeypatch.setattr("sys.argv", ["bench.py"])
    assert bench.main() == 1 and capsys.readouterr().err == "cutlass_evt_fusion: there is no GPU\n"


@needs(no_compiler())
def test_the_source_compiles_and_its_interface_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(build, "RECORD", tmp_path / "library.json")
    record, made = build.build()
    assert made and build.build() == (record, False)
    assert all(
        kernel["shared_bytes"] <= 232448 and kernel["registers"] <= 168
        for kernel in record["kernels"].values()
    )
    fusion.load_library.cache_clear()
    library = fusion.load_library()
    fusion.load_library.cache_clear()
    assert library.cutlass_evt_error_text(0) == b"Success"
    assert library.cutlass_evt_workspace_bytes(fusion.FORWARD, 98304, 2048, 512) >= 0
    refused = {
        (8, 20, 16, 16): b"Misaligned",
        (8, 24, 16, 24): b"Misaligned",
        (0, 24, 16, 16): b"Invalid Problem",
        (8, 24, 2**31, 16): b"Invalid Problem",
    }  # rows, columns, depth, address
    for (*extents, address), text in refused.items():
        pointers = [ctypes.c_void_p(address)] * 4
        for function in (library.cutlass_evt_gemm_mul, library.cutlass_evt_gemm_leaky_relu_squared):
            assert text in library.cutlass_evt_error_text(function(0, *pointers, *extents, None, 0, None))
    tool = next(Path(torch.__file__).parents[1].glob("triton/backends/nvidia/bin/cuobjdump"), None)
    if tool:
        code = subprocess.run(
            [tool, "-sass", build.LIBRARY], capture_output=True, text=True, check=True
        ).stdout
        assert {"HGMMA", "UTMALDG", "UTMASTG"} <= set(re.findall(r"HGMMA|UTMALDG|UTMASTG", code))
        assert not re.search(r"\b(?:LDL|STL)\b", code)  # no local memory


# --- on a GPU


@needs(fusion.available())
@pytest.mark.parametrize("sizes", [*bench.AWKWARD, (98304, 512, 2048), (98305, 512, 2048)])
def test_the_kernels_agree_with_fp32(sizes):
    assert max(bench.parity(*sizes).values()) <= 1
