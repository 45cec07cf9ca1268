"""The LeakyReLU(1/2)^2 MLP with its elementwise halves in the epilogues of two Hopper GEMMs (kernels.cu).

    import cutlass_evt_fusion
    cutlass_evt_fusion.available()                             # "" or why not, with the remedy
    cutlass_evt_fusion.leaky_relu_squared_mlp(x, up, down)     # differentiable

torch.compile(fullgraph=True) traces it. There is no fallback: an op that cannot run raises the text of
available(). Shapes: x (..., D), up (H, D), down (D, H).
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build

BACKWARD, FORWARD = range(2)  # the kernels' numbers in the C interface
TMA_BYTES = 16  # row starts and row lengths must be multiples of this


def available(dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cuda") -> str:
    """Why `dtype` operands on `device` ("cuda": the current GPU) cannot be used, or "" if they can."""
    if dtype != torch.bfloat16:
        return f"the operands are {dtype}; the kernels know torch.bfloat16 only: convert them"
    device = torch.device(device)
    if device.type != "cuda":
        return f"the operands are on {device}; the kernels need an H100 or H200"
    if not torch.cuda.is_available():
        return (
            "torch.cuda.is_available() is False; "
            "the kernels need an H100 or H200, its driver and torch for CUDA"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if problem := device_problem(index):
        return problem
    try:
        load_library()
    except RuntimeError as error:
        return str(error)
    return trial_problem(index)


@functools.cache
def device_problem(index: int) -> str:
    """Why a GPU cannot run the kernels, or "" if it can."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) == (9, 0):
        return ""
    return (
        f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {major}.{minor}; "
        "the kernels are built for 9.0: use an H100 or H200"
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """The built library with its C signatures; RuntimeError if it is missing or of another source."""
    remedy = f"run: python {build.FOLDER.name}/build.py"
    record = build.read_record()
    if not record:
        raise RuntimeError(f"{build.LIBRARY} is not built; {remedy}")
    if record.get("source") != build.source_hash():
        raise RuntimeError(f"{build.LIBRARY} was built from another kernels.cu; {remedy}")
    try:
        library = ctypes.CDLL(str(build.LIBRARY))
    except OSError as error:
        raise RuntimeError(f"{build.LIBRARY} cannot be loaded ({error}); {remedy} on this machine") from error
    pointer, extent = ctypes.c_void_p, ctypes.c_int64
    library.cutlass_evt_workspace_bytes.argtypes = [ctypes.c_int, *[extent] * 3]
    library.cutlass_evt_workspace_bytes.restype = extent
    library.cutlass_evt_error_text.restype = ctypes.c_char_p
    for name in ("cutlass_evt_gemm_mul", "cutlass_evt_gemm_leaky_relu_squared"):
        getattr(library, name).argtypes = [
            ctypes.c_int,
            *[pointer] * 4,
            *[extent] * 3,
            pointer,
            extent,
            pointer,
        ]
    return library


@functools.cache
def trial_problem(index: int) -> str:
    """Why a launch of either kernel fails on a GPU (its driver may be older than the library), or ""."""
    side = 128
    a, b, *others = torch.zeros(4, side, side, dtype=torch.bfloat16, device=f"cuda:{index}")
    try:
        for kernel in (FORWARD, BACKWARD):
            start(kernel, a, b, (others[0], others[1]), side)
        torch.cuda.synchronize(index)
    except RuntimeError as error:
        return f"a trial failed: {error}"
    return ""


def check_layout(op: str, **tensors: Tensor) -> None:
    """ValueError unless every tensor is a packed matrix for TMA and all have one dtype and device."""
    first, *_ = tensors.values()
    for name, t in tensors.items():
        said = f"{op}: {name} {tuple(t.shape)}"
        step = TMA_BYTES // t.element_size()
        if t.dim() != 2:
            raise ValueError(
                f"{said} has {t.dim()} dimensions; it must be a matrix: flatten the leading ones"
            )
        if t.dtype != first.dtype or t.device != first.device:
            raise ValueError(
                f"{said} is {t.dtype} on {t.device}, the first operand {first.dtype} on {first.device}; "
                "they must be alike: convert it"
            )
        if t.size(1) % step:
            raise ValueError(
                f"{said} has rows of {t.size(1)} elements; TMA needs multiples of {step} ({TMA_BYTES} "
                "bytes): choose another width, or pad it"
            )
        if not t.is_contiguous():
            raise ValueError(f"{said} has strides {t.stride()}; its rows must be packed: call .contiguous()")
        if t.data_ptr() % TMA_BYTES:
            raise ValueError(
                f"{said} starts at address {t.data_ptr():#x}; TMA needs multiples of {TMA_BYTES}: call "
                ".clone()"
            )


def check_extents(op: str, **pairs: tuple[int, int]) -> None:
    """ValueError unless the two sizes of every pair, which the shapes state twice, are equal."""
    for name, (one, other) in pairs.items():
        if one != other:
            raise ValueError(
                f"{op}: {name} is {one} in one operand and {other} in another; they must be equal"
            )


def launch(kernel: int, a: Tensor, b: Tensor, others: tuple[Tensor, Tensor], columns: int) -> None:
    """Queue a kernel on the current stream: a (M, K), b; aux and out or act and slope, all (M, `columns`)."""
    if reason := available(a.dtype, a.device):
        raise RuntimeError(f"cutlass_evt_fusion: {reason}")
    if a.numel():
        start(kernel, a, b, others, columns)


def start(kernel: int, a: Tensor, b: Tensor, others: tuple[Tensor, Tensor], columns: int) -> None:
    """As `launch`, of operands that are known to fit; RuntimeError if the kernel is refused."""
    library, extents = load_library(), (a.size(0), columns, a.size(1))
    function = (
        library.cutlass_evt_gemm_mul if kernel == BACKWARD else library.cutlass_evt_gemm_leaky_relu_squared
    )
    size = library.cutlass_evt_workspace_bytes(kernel, *extents)
    workspace = torch.empty(size, dtype=torch.uint8, device=a.device)
    with torch.cuda.device(a.device):
        stream = torch.cuda.current_stream(a.device).cuda_stream
        pointers = [t.data_ptr() for t in (a, b, *others)]
        status = function(a.device.index, *pointers, *extents, workspace.data_ptr(), size, stream)
    if status:
        text = library.cutlass_evt_error_text(status).decode()
        raise RuntimeError(
            f"cutlass_evt_fusion: the {build.KERNELS[kernel]} kernel of M, N, K = {extents} was not "
            f"launched: {text} (status {status})"
        )


@torch.library.custom_op("cutlass_evt::gemm_mul", mutates_args=())
def gemm_mul(grad: Tensor, down: Tensor, slope: Tensor) -> Tensor:
    """(grad (M, D) @ down (D, H)) * slope (M, H): the product in fp32, rounded once."""
    check_layout("gemm_mul", grad=grad, down=down, slope=slope)
    check_extents(
        "gemm_mul",
        D=(grad.size(1), down.size(0)),
        H=(down.size(1), slope.size(1)),
        M=(grad.size(0), slope.size(0)),
    )
    out = torch.empty_like(slope)
    launch(BACKWARD, grad, down, (slope, out), down.size(1))
    return out


@torch.library.custom_op("cutlass_evt::gemm_leaky_relu_squared", mutates_args=())
def gemm_leaky_relu_squared(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """With z = x (M, D) @ up (H, D)^T in fp32: (LeakyReLU(z, 1/2)^2, its derivative in z), both (M, H)."""
    check_layout("gemm_leaky_relu_squared", x=x, up=up)
    check_extents("gemm_leaky_relu_squared", D=(x.size(1), up.size(1)))
    act, slope = (x.new_empty(x.size(0), up.size(0)) for _ in range(2))
    check_layout("gemm_leaky_relu_squared", x=x, act=act)
    launch(FORWARD, x, up, (act, slope), up.size(0))
    return act, slope


@torch.library.custom_op("cutlass_evt::leaky_relu_squared_mlp", mutates_args=())
def mlp_op(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the MLP's output (M, D), and for its backward: act and slope (M, H))."""
    act, slope = gemm_leaky_relu_squared(x, up)
    return act @ down.T, act, slope


gemm_mul.register_fake(lambda grad, down, slope: grad.new_empty(grad.size(0), down.size(1)))
gemm_leaky_relu_squared.register_fake(
    lambda x, up: tuple(x.new_empty(x.size(0), up.size(0)) for _ in range(2))
)
mlp_op.register_fake(
    lambda x, up, down: tuple(x.new_empty(x.size(0), n) for n in (down.size(0), up.size(0), up.size(0)))
)


def _save(ctx, inputs, output):
    _, act, slope = output
    ctx.mark_non_differentiable(act, slope)
    ctx.set_materialize_grads(False)  # else two (M, H) blocks of zeros per backward
    ctx.save_for_backward(*inputs, act, slope)


def _gradients(ctx, grad, *_):
    if grad is None:
        return None, None, None
    x, up, down, act, slope = ctx.saved_tensors
    grad = grad.contiguous()
    hidden, need = (
        gemm_mul(grad, down, slope),
        ctx.needs_input_grad,
    )  # adapters train while the weights are frozen
    return hidden @ up, hidden.T @ x if need[1] else None, grad.T @ act if need[2] else None


mlp_op.register_autograd(_gradients, setup_context=_save)


def leaky_relu_squared_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """LeakyReLU(x up^T, 1/2)^2 down^T on x (..., D), with fused kernels in both directions."""
    out, _, _ = mlp_op(x.reshape(-1, x.size(-1)).contiguous(), up, down)
    return out.view(*x.shape[:-1], -1)


def leaky_relu_squared_mlp_reference(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same in plain torch, rounded between its operations."""
    return F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)
