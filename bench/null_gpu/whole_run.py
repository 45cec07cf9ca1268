"""`python train_gpt.py` itself on the null GPU, from its start to the last score: python -m
bench.null_gpu.whole_run

With the null GPU preloaded and PYTORCH_NO_CUDA_MEMORY_CACHING=1, everything that no kernel wrote is zero:
losses are, and so are all counts, so the run passes its own checks. The settings come from the environment,
as for the script."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import pickle
import random
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SMALL = {  # every kind of visit, of kernel and of collective, in a model that compiles in minutes
    "VOCAB_SIZE": "320",
    "TRAIN_SEQ_LEN": "128",
    "TRAIN_BATCH_TOKENS": "8192",
    "MICRO_BATCH_TOKENS": "1024",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "128",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "XSA_LAST_N": "4",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "SCHEDULE": "steps",
    "ITERATIONS": "6",
    "WARMUP_STEPS": "1",
    "CHECKPOINT_EVERY": "3",
    "TRAIN_LOG_EVERY": "1",
    "MAX_WALLCLOCK_SECONDS": "100000",
    "EVAL_BUDGET_SECONDS": "100000",
    "GPTQ_CALIBRATION_BATCHES": "8",
    "EVAL_SEQ_LEN": "128",
    "EVAL_STRIDE": "64",
    "VAL_BATCH_TOKENS": "8192",
    "TTT_BATCH_SIZE": "8",
    "TTT_LORA_RANK": "16",
    "TTT_CHUNK_SIZE": "48",
    "TTT_EVAL_SEQ_LEN": "128",
    "PHASED_TTT_PREFIX_DOCS": "16",
    "GLOBAL_TTT_CHUNK_TOKENS": "1024",
}
WORDS = "the a model of language that reads one token after another while loss falls with every step".split()


def make_dataset(folder: Path) -> None:
    """Shards and a tokenizer of 320 entries from random words."""
    import sentencepiece

    from data.shards import BOS, train_tokenizer, write_shard

    source = random.Random(0)

    def documents(count: int) -> list[str]:
        return [" ".join(source.choices(WORDS, k=source.randint(8, 150))) for _ in range(count)]

    folder.mkdir(parents=True)
    train_tokenizer(
        [*documents(500), "xyzq jkvb ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789"], folder / "tokenizer", 320
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for name, count in (("train_000000", 800), ("train_000001", 800), ("val_000000", 43)):
        ids = [token for text in documents(count) for token in [BOS, *pieces.encode(text)]]
        write_shard(folder / f"fineweb_{name}.bin", np.array(ids, dtype="<u2"))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder: Path, settings: dict[str, str], flash_attn: str, ranks: int) -> list[str]:
    """Run the trainer to its end in `ranks` processes that log to `folder`; a line for each that failed."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    meetings = folder / "meetings"
    meetings.mkdir(parents=True)
    processes, logs = [], []
    for rank in range(ranks):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "NULL_GPU_RANKS": str(meetings),
            "FLASH_ATTN": flash_attn,
        }
        environment = os.environ | settings | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        environment |= shared | own if ranks > 1 else {"FLASH_ATTN": flash_attn}
        logs.append(open(folder / f"rank{rank}.log", "w+"))  # noqa: SIM115 -- read below
        command = [sys.executable, "-m", "bench.null_gpu.whole_run"]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=logs[-1], stderr=subprocess.STDOUT)
        )
    wait_for_all(processes)
    return [
        f"rank {rank} of {ranks}: exit status {process.returncode}: {reason(log)}"
        for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
        if process.returncode
    ]


def wait_for_all(processes: list[subprocess.Popen]) -> None:
    """Until all have ended; if one fails, the others, who would wait for it in a collective, are ended."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            for process in processes:
                process.terminate()
        time.sleep(0.2)


def reason(log: TextIO) -> str:
    """Why a process failed: the null GPU's own word if it spoke, or the last line; closes the log."""
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()] or ["no word"]
    log.close()
    spoken = [line for line in lines if line.startswith("null GPU:")]
    return (spoken or lines[-1:])[0][:300]


def graphs_inside_clock(folder: Path) -> int:
    """Graphs that the training of the run in `folder` compiled, or recorded, while its clock ran."""
    facts = json.loads((folder / "stages.json").read_text())["train"]
    return facts["graphs_inside_clock"] + facts.get("recorded_inside_clock", 0)


def objects_through_the_store() -> Callable[..., None]:
    """A broadcast_object_list without kernels: PyTorch's adds up sizes on the device, where nothing adds."""
    import torch.distributed as dist

    numbers = itertools.count()

    def broadcast(objects: list[Any], src: int = 0, **_: Any) -> None:
        store, key = dist.distributed_c10d._get_default_store(), f"objects{next(numbers)}"
        if dist.get_rank() == src:
            store.set(key, pickle.dumps(objects))
        objects[:] = pickle.loads(store.get(key))

    return broadcast


def any_numbers(trial: Callable[..., str]) -> Callable[..., str]:
    """The trainer's trial of an attention backend: it compiles and runs it as ever, and compares nothing."""
    import torch

    @functools.wraps(trial)
    def tried(*arguments: Any) -> str:
        real = torch.Tensor.__le__
        torch.Tensor.__le__ = lambda error, bound: True
        try:
            return trial(*arguments)
        finally:
            torch.Tensor.__le__ = real

    return tried


def become_script(path: Path) -> None:
    """What `python PATH` does, with `any_numbers` around the function try_attention."""
    tree = ast.parse(path.read_text(), str(path))
    (trial,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "try_attention"
    )
    trial.decorator_list = [ast.copy_location(ast.Name(any_numbers.__name__, ast.Load()), trial)]
    script = types.ModuleType("__main__")
    script.__file__ = str(path)
    script.any_numbers = any_numbers
    sys.modules["__main__"] = script
    sys.argv = [str(path)]
    exec(compile(tree, str(path), "exec"), vars(script))  # the script of this checkout


def main() -> None:
    """Become the script, with FlashAttention's functions, a nonzero that counts, and objects that arrive."""
    import torch
    import torch.distributed as dist

    from bench.null_gpu import attention
    from bench.null_gpu.parts import on_the_host, without_orthogonal_start

    flash_attn = os.environ.pop("FLASH_ATTN", "")
    attention.install(Path(flash_attn) if flash_attn else None)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it needs a driver that does more
    without_orthogonal_start()
    keep = on_the_host()
    dist.broadcast_object_list = objects_through_the_store()
    become_script(ROOT / "train_gpt.py")
    del keep


if __name__ == "__main__":
    main()
