"""Builds libcutlass_evt_fusion.so for Hopper GPUs:  python cutlass_evt_fusion/build.py

Needs nvcc (from CUDA_HOME, else from PATH) and the headers in the nvidia-cutlass wheel of this Python
environment, but no GPU. What is already built from the same source, compiler, wheel and flags is kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "kernels.cu"
LIBRARY = FOLDER / "libcutlass_evt_fusion.so"
RECORD = LIBRARY.with_suffix(".json")  # what the library was built from, and what ptxas said
KERNELS = ("backward", "forward")  # their numbers in the C interface
OLDEST_NVCC = (12, 3)
# NDEBUG: without it CUTLASS keeps its device-side asserts. Hidden symbols: the CUDA runtime is linked in, and
# another one of torch's lives in the same process.
FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr "
    "-Xcompiler -fPIC -Xcompiler -fvisibility=hidden -Xptxas -v -shared"
).split()


class BuildError(Exception):
    """The library cannot be built; the text says what is missing and what to do."""


class Wheel(NamedTuple):
    """The installed nvidia-cutlass: its version and include folders."""

    version: str
    includes: tuple[Path, Path]


def find_nvcc(environment: Mapping[str, str]) -> Path:
    """The nvcc of CUDA_HOME if that is set, else the first on PATH."""
    home = environment.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.is_file():
            raise BuildError(
                f"CUDA_HOME={home!r}: there is no bin/nvcc in it; set CUDA_HOME to a CUDA toolkit, or "
                "unset it to use the nvcc on PATH"
            )
        return nvcc
    found = shutil.which("nvcc", path=environment.get("PATH", ""))
    if not found:
        raise BuildError(
            "nvcc is not on PATH and CUDA_HOME is not set; install the CUDA toolkit "
            f"({show(OLDEST_NVCC)} or newer) and set CUDA_HOME to it"
        )
    return Path(found)


def nvcc_version(nvcc: Path) -> tuple[int, ...]:
    """(major, minor, patch) of a compiler, which must be new enough for sm_90a."""
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", result.stdout)
    if not match:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["nothing"]
        raise BuildError(
            f"{nvcc} --version shows no version but {last[0]!r}; set CUDA_HOME to a working CUDA toolkit"
        )
    version = tuple(map(int, match.groups()))
    if version < OLDEST_NVCC:
        raise BuildError(
            f"{nvcc} is version {show(version)}; the kernels need {show(OLDEST_NVCC)} or newer: set "
            "CUDA_HOME to a newer CUDA toolkit"
        )
    return version


def find_wheel() -> Wheel:
    """The nvidia-cutlass wheel of the running Python."""
    remedy = f"run {sys.executable} -m pip install --no-deps nvidia-cutlass==4.2.0.0"
    spec = importlib.util.find_spec("cutlass_library")
    try:
        version = importlib.metadata.version("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if spec is None or not spec.submodule_search_locations or not version:
        raise BuildError(f"the nvidia-cutlass wheel is not installed in this environment; {remedy}")
    source = Path(next(iter(spec.submodule_search_locations)), "source")
    includes = source / "include", source / "tools" / "util" / "include"
    for folder, header in zip(includes, ("cutlass/cutlass.h", "cutlass/util/packed_stride.hpp"), strict=True):
        if not (folder / header).is_file():
            raise BuildError(f"nvidia-cutlass {version}: the header {folder / header} is missing; {remedy}")
    return Wheel(version, includes)


def show(version: tuple[int, ...]) -> str:
    """A version as text."""
    return ".".join(map(str, version))


def source_hash() -> str:
    """SHA-256 of the CUDA source as it is now."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def read_record() -> dict[str, Any]:
    """What the library on disk was built from; {} if there is no library or no record of it."""
    if not LIBRARY.is_file() or not RECORD.is_file():
        return {}
    try:
        return json.loads(RECORD.read_text())
    except ValueError:
        return {}


def read_ptxas(log: str) -> dict[str, dict[str, int]]:
    """Registers, stack and spill bytes of each kernel by `ptxas -v`; BuildError if a kernel spills."""
    found: dict[str, dict[str, int]] = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, log, re.S):
        kernel = KERNELS["Sm90AuxStore" in name]  # the forward kernel stores a second output
        found[kernel] = {
            "registers": int(registers),
            "stack": int(stack),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
        }
    if set(found) != set(KERNELS):
        raise BuildError(
            f"ptxas reported the kernels {sorted(found)} where {sorted(KERNELS)} were expected; is "
            "-Xptxas -v still among the flags?"
        )
    if slow := re.search(r".*(?:wgmma.*serialized|setmaxnreg.*ignored).*", log):
        raise BuildError(f"the kernels would be slow: {slow[0].strip()}; use another nvcc")
    for kernel, figures in found.items():
        if figures["spill_stores"] or figures["spill_loads"]:
            raise BuildError(
                f"the {kernel} kernel spills {figures['spill_stores']} bytes of registers, which makes it "
                "slow; use another nvcc or a smaller tile in kernels.cu"
            )
    return found


def build() -> tuple[dict[str, Any], bool]:
    """Make the library unless it is up to date; the record, and whether it was made now."""
    nvcc = find_nvcc(os.environ)
    wheel = find_wheel()
    identity = {
        "source": source_hash(),
        "nvcc": show(nvcc_version(nvcc)),
        "cutlass": wheel.version,
        "flags": FLAGS,
    }
    record = read_record()
    if {name: record.get(name) for name in identity} == identity:
        return record, False
    includes = [f"-I{folder}" for folder in wheel.includes]
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        made, start = Path(scratch, LIBRARY.name), time.perf_counter()
        command = [str(nvcc), *FLAGS, *includes, "-o", str(made), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        log, seconds = result.stdout + result.stderr, time.perf_counter() - start
        if result.returncode or not made.is_file():
            errors = [line for line in log.splitlines() if "error" in line.lower() or "fatal" in line.lower()]
            raise BuildError(
                "\n".join(
                    [
                        f"nvcc {identity['nvcc']} failed with status {result.returncode}:",
                        *(errors or log.splitlines()[-20:])[:20],
                    ]
                )
            )
        figures = read_ptxas(log)
        library = ctypes.CDLL(str(made))
        for number, kernel in enumerate(KERNELS):
            figures[kernel]["shared_bytes"] = library.cutlass_evt_shared_bytes(number)
            figures[kernel]["stages"] = library.cutlass_evt_stages(number)
        record = {**identity, "seconds": round(seconds, 1), "kernels": figures}
        RECORD.unlink(
            missing_ok=True
        )  # a kill between the next two lines leaves a library that counts as unbuilt
        made.replace(LIBRARY)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return record, True


def main() -> int:
    """Build and report; 1 with one message if that cannot be done."""
    try:
        record, made = build()
    except BuildError as error:
        print(f"cutlass_evt_fusion: {error}", file=sys.stderr)
        return 1
    took = f"built in {record['seconds']} s" if made else "up to date"
    print(f"{LIBRARY.name}: {took} (nvcc {record['nvcc']}, nvidia-cutlass {record['cutlass']})")
    for kernel, figures in record["kernels"].items():
        print(f"{kernel}: " + " ".join(f"{name}:{value}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
