"""What the GPU tests share. They are skipped where there is no GPU; --dry tries them on the CPU at a small
size, with the kernels in Triton's interpreter: that shows that the tests work, not that the kernels do.

    python -m pytest tests/gpu
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch

import train_gpt as t
from bench.gpu_meter import Meter, Synthetic
from bench.train_step import TrainStep

MEDIUM = {  # small enough to compile quickly, with the head size and the micro-batch of the contest's model
    "VOCAB_SIZE": "1024",
    "NUM_LAYERS": "3",
    "MODEL_DIM": "256",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "XSA_LAST_N": "3",
    "NUM_LOOPS": "0",
    "PARALLEL_START_LAYER": "2",
    "SCHEDULE": "steps",
    "ITERATIONS": "40",
    "MUON_MOMENTUM_WARMUP_STEPS": "10",
}
SMALL = MEDIUM | {
    "VOCAB_SIZE": "320",
    "MODEL_DIM": "32",
    "ROPE_DIMS": "4",
    "TRAIN_SEQ_LEN": "32",
    "TRAIN_BATCH_TOKENS": "1024",
    "COMPUTE_DTYPE": "float32",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """--dry."""
    parser.addoption(
        "--dry", action="store_true", help="tests/gpu: on the CPU, small, kernels in the interpreter"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of this folder, with the reason, where they would tell nothing."""
    if config.getoption("--dry", default=False):
        return
    reason = ""
    if not torch.cuda.is_available():
        reason = "there is no GPU (torch.cuda.is_available() is False)"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "kernels run in the interpreter (TRITON_INTERPRET=1); start as: python -m pytest tests/gpu"
    for item in items if reason else ():
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def dry(request) -> bool:
    """Whether this is a rehearsal on the CPU."""
    return request.config.getoption("--dry")


@pytest.fixture(scope="session")
def meter(dry: bool) -> Meter:
    """Clock and memory of the device of the tests."""
    return Meter(torch.device("cpu" if dry else "cuda"))


@pytest.fixture(scope="session")
def dtype(dry: bool) -> torch.dtype:
    """What the kernels compute with; bfloat16 products are wrong in the interpreter."""
    return torch.float32 if dry else torch.bfloat16


@pytest.fixture(scope="session")
def environment(dry: bool) -> dict[str, str]:
    """Settings of a model that compiles in half a minute."""
    return SMALL if dry else MEDIUM


@pytest.fixture(scope="session")
def trainer(environment: dict[str, str], meter: Meter) -> tuple[TrainStep, t.Feed]:
    """A step of that model and packed batches, after the warm-up of a run."""
    step = TrainStep(environment | {"LOADER": "packed"}, meter.device)
    data = Synthetic(step.config, 45 * step.config.train_batch_tokens)
    feed = t.Feed(step.run, t.PackedLoader(step.config, data))
    with contextlib.redirect_stdout(io.StringIO()):
        t.warm_up(step.run, step.built, step.optimizers, feed)
    return step, feed
