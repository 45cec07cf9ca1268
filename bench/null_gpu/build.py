"""Builds the null GPU with gcc, and the environment in which a process meets it instead of a driver."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = sorted(Path(__file__).resolve().parent.glob("*.[ch]"))
FLAGS = ("-O1", "-Wall", "-Werror", "-fPIC")
# These two headers of the runtime's need libcu++, which pip does not bring; nothing here uses their types.
WITHOUT_HALVES = ("-D__CUDA_FP16_H__", "-D__CUDA_BF16_H__")
SYMBOL = re.compile(r"\b_*(?:cuda|cublas|nccl|cu[A-Z])\w*")
# What Triton's launchers ask for by name, besides what PyTorch's libraries leave undefined.
ALSO_WANTED = {
    "cuInit",
    "cuCtxSetCurrent",
    "cuCtxSetLimit",
    "cuCtxSynchronize",
    "cuFuncSetCacheConfig",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuModuleUnload",
    "cuPointerGetAttributes",
    "cuStreamSynchronize",
    "cuTensorMapEncodeIm2col",
}


def missing() -> str:
    """Why this interpreter cannot meet the null GPU, in one line with the remedy; empty if it can."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed here; run with an interpreter that has the CUDA build of torch"
    version = runpy.run_path(str(Path(found.origin).parent / "version.py"))
    if not version.get("cuda"):
        return (
            f"torch {version['__version__']} is not a CUDA build; make an environment with one outside the "
            "checkout (python3 -m venv ../gpu-venv; pip install torch torchvision) and run with its python"
        )
    if not version["cuda"].startswith("13."):
        return f"torch is built for CUDA {version['cuda']}, the null GPU answers for 13; install such a torch"
    tools = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    return f"{' and '.join(tools)} not found; install gcc and binutils" if tools else ""


def include_folders(packages: Path) -> list[str]:
    """gcc's options for the headers of CUDA that pip brings with torch or, older, with triton."""
    folders = ("nvidia/cu13/include", "triton/backends/nvidia/include")
    return [f"-I{packages / folder}" for folder in folders if (packages / folder).is_dir()]


def undefined_symbols(packages: Path) -> set[str]:
    """The symbols of CUDA, cuBLAS and NCCL that PyTorch's libraries expect from others."""
    names = ("c10_cuda", "torch_cuda", "torch_python", "torch_cpu", "caffe2_nvrtc")
    libraries = [packages / "torch/lib" / f"lib{name}.so" for name in names]
    command = ["nm", "--dynamic", "--undefined-only", *map(str, filter(Path.exists, libraries))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {word for line in said.splitlines() for word in SYMBOL.findall(line.partition(" U ")[2])}


def stubs(wanted: set[str], sources: str) -> str:
    """C code for the `wanted` functions that `sources` do not define: each does nothing and returns 0."""
    defined = set(re.findall(rf"({SYMBOL.pattern})\(", sources))
    return "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(wanted - defined))


def build(cache: Path) -> Path:
    """The library, compiled into a folder of `cache` named after its sources unless it is there; RuntimeError
    with gcc's words if that fails."""
    packages = Path(importlib.util.find_spec("torch").origin).parent.parent
    text = "".join(path.read_text() for path in SOURCES)
    rest = stubs(undefined_symbols(packages) | ALSO_WANTED, text)
    folder = cache / hashlib.sha256((text + rest).encode()).hexdigest()[:12]
    library = folder / "libcuda.so.1"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        stub_file, made = Path(scratch, "stubs.c"), Path(scratch, library.name)
        stub_file.write_text(rest)
        code = [str(path) for path in SOURCES if path.suffix == ".c"]
        link = ["-shared", f"-Wl,-soname,{library.name}", "-o", str(made), "-ldl", "-lpthread"]
        includes = include_folders(packages)
        command = ["gcc", *FLAGS, "-fno-builtin", *includes, *WITHOUT_HALVES, *code, str(stub_file), *link]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        made.rename(library)
    (folder / "libcuda.so").symlink_to(library.name)
    return library


def environment(cache: Path, library: Path) -> dict[str, str]:
    """The environment of a child process that finds the null GPU; what it compiles goes to `cache`."""
    changes = {
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes
