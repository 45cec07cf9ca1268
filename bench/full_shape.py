#!/usr/bin/env python3
"""The contest's model (11 x 512, vocabulary 8,192) through every stage on a CPU: its time and memory.

    python bench/full_shape.py [--quick] [--tokens N]

Two forms: GPT-J parallel residuals (#1738, #1755: 35,944,536 parameters) and two lanes (#1585: 35,944,602).
Each does one training step, calibration, GPTQ of its 67 matrices, packing, reading back and a score, on
random tokens: this shows that the full size works and what it costs, not quality. --quick: one form, fewer
tokens and trellis states, LZMA.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data
import environment

environment.enter()
import argparse
import contextlib
import functools
import io
import json
import resource
import tempfile
import time

import numpy as np
import torch

import train_gpt as t
from data.shards import BOS, write_shard

FORMS = {
    "gptj (#1738, #1755)": (
        {"PARALLEL_RESIDUAL": "gptj", "PARALLEL_START_LAYER": "7"},
        35_944_536,
        "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7+ 8+ 9+ 10+",
    ),
    "two_lane (#1585)": (
        {"PARALLEL_FIRST_SKIP": "both"},
        35_944_602,
        "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7 8= 9= 10=",
    ),
}


class Vocabulary:
    """Stands in for the SentencePiece model: 8,192 pieces of known length, so that bytes can be counted."""

    def id_to_piece(self, index: int) -> str:
        """Piece `index`."""
        return f"\u2581p{index:x}"

    def is_control(self, index: int) -> bool:
        """The first four ids are control tokens."""
        return index < 4

    is_unknown = is_unused = is_byte = lambda self, index: False


def measure(form: str, folder: Path, tokens: int, quick: bool) -> dict[str, float]:
    """Seconds of each stage, bytes and peak memory of one form of the model."""
    changes, parameters, route = FORMS[form]
    config = t.Config.from_env(
        {
            "DATASETS_DIR": str(folder),
            "LOADER": "shuffled",
            "HEAD_GATE": "none",
            "SMEAR_GATE": "0",
            "TRAIN_BATCH_TOKENS": str(8 * 2048),
            "ITERATIONS": "1",
            "GPTQ_CALIBRATION_BATCHES": "1",
            "VAL_BATCH_TOKENS": str(8 * 2048),
            "OUT_DIR": str(folder / "runs"),
            "COMPRESSOR": "lzma" if quick else "brotli",
            "TRELLIS_STATES": "8" if quick else "64",
            **changes,
        }
    )
    run = t.Run(config)
    run.folder = folder
    data = object.__new__(t.Dataset)
    data.folder, data.vocab_size, data.sidecar_files, data.manifest = folder, 8192, [], {}
    data.val_files, data.train_files = (
        [folder / "fineweb_val_000000.bin"],
        [folder / "fineweb_train_000000.bin"],
    )
    data.train, data.pieces = [t.read_shard(data.train_files[0])], Vocabulary()
    marks, names = [time.monotonic()], []

    def mark(name: str) -> None:
        marks.append(time.monotonic())
        names.append(name)

    with contextlib.redirect_stdout(io.StringIO()):
        model, forward, _ = t.build(run)
        model.looped = True
        assert (
            sum(p.numel() for p in model.parameters()) == parameters
            and len(t.list_matrices(model.table)) == 67
        )
        assert t.show_route(model.routes[model.loops]) == route
        mark("build")
        optimizers = t.Optimizers(run, model, compiled=False)
        average = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}
        loader = t.ShuffledLoader(config, data)
        batches = [loader.get(0, stream) for stream in range(max(1, tokens // 2048))]
        t.train_step(run, forward, optimizers, batches, progress=0.0, step=0)
        t.update_ema(average, model, 0.5)
        mark("train_step")
        model.load_state_dict(average)
        moments = t.collect_moments(run, model, data)
        mark("calibration")
        tensors = t.quantize(run, model.table, average, 15_900_000, True, moments)
        mark("quantize")
        size, _ = t.seal_artifact(run, tensors, looped=True)
        mark("pack_and_verify")
        _, again, _ = t.decode_artifact(folder / "final_model.ptz")
        model.load_state_dict(t.assemble_weights(model.table, again))
        mark("reload")
        whole = t.load_validation(data)
        part = t.Validation(whole.tokens[: tokens + 1], whole.bytes[: tokens + 1], "lut")
        result = t.measure(run, part, "plain", functools.partial(t.score_sliding, run, forward, 2048))
        mark("score")
    assert 7.0 < result.loss < 11.0, "one step on random tokens must stay near ln 8192 = 9.01"
    seconds = {name: round(b - a, 2) for name, a, b in zip(names, marks, marks[1:], strict=False)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**seconds, "artifact_bytes": size, "val_loss": result.loss, "peak_memory_mib": round(peak)}


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one form, 2,048 tokens, 8 states, lzma")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="tokens of the training step and of the score"
    )
    options = parser.parse_args()
    tokens = 2048 if options.quick else options.tokens
    forms = [*FORMS][:1] if options.quick else [*FORMS]
    with tempfile.TemporaryDirectory() as name:
        random = np.random.default_rng(0)
        for part, count in (("train", 300_000), ("val", 20_000)):
            ids = random.integers(4, 8192, count).astype("<u2")
            ids[::700] = BOS
            write_shard(Path(name) / f"fineweb_{part}_000000.bin", ids)
        results = {form: measure(form, Path(name), tokens, options.quick) for form in forms}
    print(
        f"{tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        "seconds unless named otherwise"
    )
    print(f"{'':<18}" + "".join(f"{form:>24}" for form in results))
    for row in next(iter(results.values())):
        print(f"{row:<18}" + "".join(f"{result[row]:>24,.2f}" for result in results.values()))
    print("RESULT " + json.dumps({"tokens": tokens, "forms": results}))


if __name__ == "__main__":
    main()
