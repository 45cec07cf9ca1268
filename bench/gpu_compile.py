"""The CUDA path of the trainer, compiled and checked on a machine without a GPU.

    python bench/gpu_compile.py --quick                             shapes and flags: a minute
    python bench/gpu_compile.py [--write records/gpu_compile.md]    everything: five minutes on two cores
    python bench/gpu_compile.py --parts training,run [--set NAME=VALUE ...]

A part whose checks have all held is not repeated while the trainer, the null GPU, torch and the options stay
the same: a call that was cut short goes on. --again repeats it.

The interpreter that starts it needs the CUDA build of torch (`python3 -m venv ../gpu-venv &&
../gpu-venv/bin/pip install torch torchvision numpy sentencepiece numba tqdm brotli python-minifier`, 5.5 GB)
and what train_gpt.py imports, and gcc.

A library that is preloaded (bench/null_gpu/, built at first use in --cache) answers for libcuda, cudart,
cuBLAS and NCCL as an H100's do; memory is there, copies are made, kernels are counted and not run. So
everything up to the launch is the real thing: Dynamo, AOTAutograd, Inductor, Triton, ptxas for sm_90a, the
launchers, TMA descriptors, the caching allocator. Numbers that come out of such a GPU mean nothing, and all
timings of its autotuner are equal.

Parts (a process each)
    interfaces  every attention backend, packed and dense, and adapters over many lengths: one graph each
    shapes      which changes of shape or flag compile again in training
    evaluation  every way of scoring after its rehearsal: no graph while the clock runs
    training    one micro-batch of the flagship with loops on, and the update of its weights: the table
    variants    at a short depth: no loops, windows, scoring, adapters, the optimisers, a step by CUDA graphs
    run         python train_gpt.py from start to last score at a small shape, alone and as two ranks; and the
                training of two by CUDA graphs
Exit status 1 if a check fails. The last line is RESULT and a JSON object; what no part measured is null.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data

from bench.null_gpu import account, build

QUICK = ("interfaces", "shapes", "evaluation")
PARTS = (*QUICK, "training", "variants", "run")
# In these parts what no kernel wrote must read as zero, so that the trainer's own checks of counts and losses
# pass.
ZEROED = ("evaluation", "run")
NOT_CHECKED = (
    "numbers, speed, and which configuration an autotuner would choose",
    "the CUDA code of PyTorch (its launches are counted), cuDNN and FlashAttention",
    "CUTLASS (cutlass_evt_fusion needs nvcc)",
    "cuSOLVER (the trainer factors its second moments on the CPU)",
    "what NCCL computes; operation, count, type and order of every collective are checked at two ranks",
)
RESULT_KEYS = (
    "graph_breaks",
    "recompiles",
    "spills",
    "launches_per_step",
    "elementwise_gb",
    "floor_ms",
    "peak_gib",
)


def fail(message: str) -> NoReturn:
    """End with one line."""
    raise SystemExit(f"bench/gpu_compile.py: {message}")


class Children:
    """The processes of the parts, each with all that it starts: they end when this one is told to.

    Each leads a group of its own, which a signal from the terminal does not reach.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a second signal may interrupt the first one's handler
        self.running: list[subprocess.Popen] = []
        self.stopped = False

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """The process of `command`; SystemExit once all are stopped."""
        with self.lock:
            if self.stopped:
                raise SystemExit("stopped")
            process = subprocess.Popen(command, start_new_session=True, **options)
            self.running = [*(one for one in self.running if one.poll() is None), process]
        return process

    def stop(self, number: int, frame: Any) -> NoReturn:
        """Handle a signal: end all groups, and this process with the status of one that it ended."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit(128 + number)


CHILDREN = Children()


def kept_file(name: str, arguments: argparse.Namespace) -> Path:
    """Where the findings of a part are kept: a file for each state of the sources, torch and the options."""
    sources = [ROOT / "train_gpt.py", *sorted((ROOT / "bench" / "null_gpu").glob("*.[pch]*"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    versions = [importlib.metadata.version(package) for package in ("torch", "triton")]
    digest.update(json.dumps([versions, arguments.set, arguments.flash_attn]).encode())
    return Path(arguments.cache) / "findings" / f"{name}-{digest.hexdigest()[:16]}.json"


def run_part(name: str, arguments: argparse.Namespace, library: Path) -> dict[str, Any]:
    """The findings of one part, kept or from a process of its own; one that dies is a failed check."""
    kept = kept_file(name, arguments)
    if kept.exists() and not arguments.again:
        findings = json.loads(kept.read_text())
        print(f"{name:<12}ok    kept: all {len(findings['checks'])} checks held before", flush=True)
        return findings
    findings = start_part(name, arguments, library)
    if all(holds for holds, _ in findings["checks"]):
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(".new")
        written.write_text(json.dumps(findings))
        written.replace(kept)
    return findings


def start_part(name: str, arguments: argparse.Namespace, library: Path) -> dict[str, Any]:
    """The findings of one part from a process of its own."""
    cache = Path(arguments.cache)
    environment = build.environment(cache, library)
    if name in ZEROED:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    settings = dict(word.split("=", 1) for word in arguments.set)
    options = {"cache": str(cache), "settings": settings, "flash_attn": arguments.flash_attn}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "findings.json")
        command = [sys.executable, "-m", "bench.null_gpu.parts", name, json.dumps(options), str(file)]
        status, last = follow(command, environment, name)
        if status == 0:
            return json.loads(file.read_text())
    text = f"{name}: ended with status {status}: {last[:300]}"
    print(f"{name:<12}FAIL  {text}", flush=True)
    return {"checks": [[False, text]]}


def follow(command: list[str], environment: dict[str, str], name: str) -> tuple[int, str]:
    """(Exit status, last line of the errors) of `command`; shows its checks and notes as they come."""
    with tempfile.TemporaryFile("w+") as errors:
        with CHILDREN.start(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            for line in process.stdout:
                if line.startswith(("ok ", "FAIL", "  ")):
                    print(f"{name:<12}{line.rstrip()}", flush=True)
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    return process.returncode, said[-1] if said else "no error message"


def run_parts(names: list[str], arguments: argparse.Namespace, library: Path) -> dict[str, dict[str, Any]]:
    """The findings of the parts by name, two at a time, the longest first: each compiles on one thread."""
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        first = sorted(names, key=PARTS.index, reverse=True)
        started = {name: pool.submit(run_part, name, arguments, library) for name in first}
        return {name: started[name].result() for name in names}


def rows_of(findings: dict[str, Any]) -> list[account.Work]:
    """The rows of a part."""
    return [account.Work(*row) for row in findings.get("rows", ())]


def result(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of RESULT; None where no part measured it. Flagship and variants share the spills."""
    known: dict[str, Any] = dict.fromkeys(RESULT_KEYS)
    for key in ("graph_breaks", "recompiles", "spills"):
        values = [part[key] for part in found.values() if part.get(key) is not None]
        known[key] = sum(values) if values else None
    training = found.get("training", {})
    if training.get("rows"):
        known |= account.summary(rows_of(training))
        known["peak_gib"] = training["peak_gib"]
    return known


def record(found: dict[str, dict[str, Any]], facts: dict[str, Any], command: str) -> str:
    """The text of records/gpu_compile.md."""
    lines = [
        "# The CUDA path, compiled without a GPU",
        "",
        f"Written by `{command}`: see that script for what it does. One micro-batch of the flagship "
        "(98,304 tokens, loops on); bytes of generated kernels from Inductor's own dependencies, those of "
        "hand-written ones from the tensors they are given; floors at 3.35 TB/s and 790 TFLOP/s. Launches, "
        "bytes and operations of attention itself are not in it. A part is the function of `train_gpt.py` "
        "that most of a kernel's operations come from.",
        "",
        f"Trainer: sha256 {hashlib.sha256((ROOT / 'train_gpt.py').read_bytes()).hexdigest()[:16]}.",
        "",
    ]
    if found.get("training", {}).get("rows"):
        rows = rows_of(found["training"])
        step = [row for row in rows if row.phase in ("forward", "backward")]
        rest = [row for row in rows if row.phase not in ("forward", "backward")]
        lines += ["## Forward and backward", "", account.markdown(step), ""]
        lines += ["## Update of all weights, one rank", "", account.markdown(rest), ""]
    if found.get("variants", {}).get("rows"):
        lines += ["## Four layers, other paths", "", account.markdown(rows_of(found["variants"])), ""]
    lines += ["## Figures", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {'not measured' if value is None else value} |" for key, value in facts.items()]
    lines += ["", "## Checks", ""]
    for name, part in found.items():
        checks = part["checks"]
        failed = [text for holds, text in checks if not holds]
        lines.append(f"* {name}: {len(checks) - len(failed)} of {len(checks)} hold")
        lines += [f"    * fails: {text}" for text in failed]
        lines += [f"    * {text.strip()}" for text in part.get("notes", ())]
    lines += ["", "Not checked:", "", *(f"* {text}" for text in NOT_CHECKED), ""]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line; ends with one line if it cannot be followed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="interfaces, shapes and evaluation")
    parser.add_argument("--parts", default="", help=f"some of {','.join(PARTS)}")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults"
    )
    parser.add_argument(
        "--flash-attn",
        default="",
        metavar="FOLDER",
        help="unpacked source of flash-attn 2.8.3; empty: stand-ins",
    )
    parser.add_argument(
        "--cache", default=str(Path(tempfile.gettempdir()) / "null_gpu"), help="for what is compiled"
    )
    parser.add_argument("--again", action="store_true", help="repeat what has held")
    parser.add_argument("--write", default="", metavar="FILE", help="write the tables there")
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",") if arguments.parts else list(QUICK if arguments.quick else PARTS)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        fail(f"--parts {arguments.parts}: no part {unknown[0]}; choose from {','.join(PARTS)}")
    if any("=" not in word for word in arguments.set):
        fail(f"--set {' '.join(arguments.set)}: give NAME=VALUE")
    if arguments.flash_attn and not Path(arguments.flash_attn, "flash_attn").is_dir():
        fail(f"--flash-attn {arguments.flash_attn}: holds no flash_attn/; unpack flash_attn-2.8.3.tar.gz")
    arguments.parts = chosen
    arguments.flash_attn = arguments.flash_attn and str(Path(arguments.flash_attn).resolve())
    return arguments


def main() -> None:
    """Run the parts and print what they found."""
    arguments = parse_arguments()
    reason = build.missing()
    if reason:
        fail(reason)
    library = build.build(Path(arguments.cache))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, CHILDREN.stop)
    found = run_parts(arguments.parts, arguments, library)
    facts = result(found)
    for name in ("training", "variants"):
        if found.get(name, {}).get("rows"):
            print(f"\n{name}", account.markdown(rows_of(found[name])), sep="\n")
    for text in NOT_CHECKED:
        print(f"not checked: {text}")
    for name in set(PARTS) - set(arguments.parts):
        print(f"not checked: the part {name}")
    if arguments.write:
        command = " ".join(["python bench/gpu_compile.py", *sys.argv[1:]])
        Path(arguments.write).write_text(record(found, facts, command))
    failed = sum(not holds for part in found.values() for holds, _ in part["checks"])
    print(f"{failed} checks failed" if failed else "all checks hold")
    print(f"RESULT {json.dumps(facts)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
