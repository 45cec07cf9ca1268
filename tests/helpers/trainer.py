"""Settings of a run that takes seconds, and ways to start the trainer with them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import subprocess
from pathlib import Path

import numpy as np

import train_gpt as t
from data.shards import BOS, train_tokenizer, write_shard
from helpers import ROOT
from helpers.processes import run_python

TINY = {
    "LOADER": "shuffled",
    "TRAIN_SEQ_LEN": "32",
    "TRAIN_BATCH_TOKENS": "512",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "XSA_LAST_N": "4",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "SCHEDULE": "steps",
    "ITERATIONS": "8",
    "WARMUP_STEPS": "1",
    "CHECKPOINT_EVERY": "3",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "EVAL_SEQ_LEN": "32",
    "EVAL_STRIDE": "8",
    "SLIDING_WINDOW_ENABLED": "1",
    "TTT_CHUNK_TOKENS": "256",
    "TTT_LORA_RANK": "4",
    "TTT_CHUNK_SIZE": "16",
    "TTT_EVAL_SEQ_LEN": "32",
    "TTT_BATCH_SIZE": "8",
    "PHASED_TTT_PREFIX_DOCS": "12",
    "GLOBAL_TTT_CHUNK_TOKENS": "128",
    "VAL_BATCH_TOKENS": "16384",
    "COMPUTE_DTYPE": "float32",
    "MUON_MOMENTUM_WARMUP_STEPS": "10",
    "EMA_DECAY": "0.5",
}
TRAINER = ROOT / "train_gpt.py"
RANK = "import os, train_gpt as t; t.main(t.Config.from_env(os.environ))"  # what the script does at last
# The same in a new interpreter, which takes the short form of the script from the others.
FRESH_RANK = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from helpers.shared import share_short_form
share_short_form()
{RANK}
"""
WORDS = (
    "the a model of language that reads and writes one token after another while loss falls with every step "
    "we take in space Time 42 kernel matrix bank shard byte café naïve"
).split()


def sentences(count: int, seed: int, longest: int = 60) -> list[str]:
    """`count` documents of 5 to `longest` random words."""
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(5, longest))) for _ in range(count)]


VALIDATION = sentences(30, 3, longest=40)  # the documents of the small dataset's validation shard


def make_dataset(folder: Path) -> Path:
    """Two training shards, one validation shard and a tokenizer of 320 entries, in `folder`."""
    import sentencepiece  # not at the top: tests/gpu makes tokens without it

    train_tokenizer(sentences(2000, 0), folder / "tokenizer", 320)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    training = {f"train_00000{number}": sentences(300, number + 1) for number in range(2)}
    for name, texts in (training | {"val_000000": VALIDATION}).items():
        ids = [i for text in texts for i in [BOS, *pieces.encode(text)]]
        write_shard(folder / f"fineweb_{name}.bin", np.array(ids, dtype="<u2"))
    return folder


def vocabulary(folder: Path) -> int:
    """Entries of the tokenizer in a dataset folder."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()


def tiny_settings(dataset: Path, out: Path) -> dict[str, str]:
    """TINY with the dataset in one folder and its runs below another."""
    return TINY | {
        "DATASETS_DIR": str(dataset),
        "VOCAB_SIZE": str(vocabulary(dataset)),
        "OUT_DIR": str(out),
    }


def replace(config: t.Config, **changes) -> t.Config:
    """`config` with some settings changed (and checked)."""
    return dataclasses.replace(config, **changes)


def environment(settings: dict[str, str]) -> dict[str, str]:
    """The environment of a child process: this one's, without settings of the program, plus `settings`."""
    known = {f.name.upper() for f in dataclasses.fields(t.Config)}
    return {name: value for name, value in os.environ.items() if name not in known} | settings


def launch(
    settings: dict[str, str],
    processes: int = 0,
    script: Path = TRAINER,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """Run the trainer to its end: inside this process (fast), or in `processes` processes of its own."""
    if processes == 0:
        shown, status, error = io.StringIO(), 0, ""
        with contextlib.redirect_stdout(shown):
            try:
                t.main(t.Config.from_env(settings))
            except t.Stop as stop:
                status, error = 1, f"{stop}\n"
        return subprocess.CompletedProcess([], status, shown.getvalue(), error)
    words = ["-c", RANK] if script == TRAINER and not fresh else [script]
    return run_python(words, environment(settings), processes, fresh=fresh)


# A forked process has loaded Triton with its interpreter; what is written in C cannot be loaded twice.
FORGET_TRITON = """
import sys
for name in list(sys.modules):
    if name == "train_gpt" or name.split(".")[0] == "triton" and not name.startswith("triton._C"):
        del sys.modules[name]
"""


def without_interpreter(program: str) -> list[str]:
    """The lines that a Python program prints where Triton compiles its kernels; it has to succeed."""
    variables = environment({})
    variables.pop("TRITON_INTERPRET")
    result = run_python(["-c", FORGET_TRITON + program], variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
