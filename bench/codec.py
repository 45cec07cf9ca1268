#!/usr/bin/env python3
"""An artifact as a compressor: bytes against the recorded score, and beside xz, brotli and zstd.

    python bench/codec.py runs/NAME [FILE...] [--documents 20] [--stage sliding] [--threads 1,2] [--quick]

Validation documents of the run (the first of those with at most 4,000 tokens) and the files are compressed
and decompressed with every number of threads; what comes out is compared byte by byte. Whether two numbers of
threads give the same stream, bit by bit, is printed, not demanded: a container says with how many it was
made. Without files, source code (this one) and the run's own log are the texts of other kinds. --quick: a
tiny model is trained first.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data
import environment

environment.enter()
import argparse
import json
import math
import tempfile
import time

import torch

import codec
from bench.evaluation import train_tiny

LONGEST = 4000  # tokens of a document


def documents_of(artifact: codec.Artifact, text_codec: codec.TextCodec, count: int) -> dict[str, bytes]:
    """The texts of the first validation documents that are not too long."""
    trainer = artifact.trainer
    config = codec.coding_config(artifact, {})
    with codec.quiet():
        stream = trainer.load_validation(trainer.Dataset(config, need_training=False)).tokens
    found = {}
    for number, (first, end) in enumerate(trainer.find_documents(stream)):
        document = stream[first + 1 : end]
        if len(document) <= LONGEST and len(found) < count:
            found[f"document{number}"] = text_codec.decode(document[document != trainer.BOS])
    return found


def measure(
    artifact: codec.Artifact,
    text_codec: codec.TextCodec,
    contents: dict[str, bytes],
    coding_options: codec.CodingOptions,
) -> tuple[dict[str, float], bytes]:
    """The figures of one round, and the stream."""
    parts = codec.tokenize_files(text_codec, contents)
    began = time.monotonic()
    container, coded = codec.compress_files(artifact, text_codec, contents, parts, coding_options)
    middle = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.golf"
        path.write_bytes(container)
        same = codec.decompress_files(artifact, text_codec, path) == contents
    recorded = float(coded.recorded.sum()) / math.log(2) / 8
    figures = {
        "same": same,
        "tokens": len(coded.tokens) - 1,
        "stream": len(coded.stream),
        "recorded": recorded,
        "container": len(container),
        "encode": (len(coded.tokens) - 1) / (middle - began),
        "decode": (len(coded.tokens) - 1) / (time.monotonic() - middle),
    }
    return figures, coded.stream


def sample_speed(artifact: codec.Artifact, text_codec: codec.TextCodec, tokens: int) -> float:
    """Tokens per second of processor time, with one thread."""
    config = codec.coding_config(artifact, {"TTT_ENABLED": False})
    torch.set_num_threads(1)
    generator = codec.TextGenerator(artifact, config, text_codec.path, config.eval_seq_len)
    began = time.process_time()
    for number in range(tokens):
        generator.next_log_p(2 + number % 100)
    return tokens / (time.process_time() - began)


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="run folder with final_model.ptz")
    parser.add_argument("files", type=Path, nargs="*", help="texts of other kinds")
    parser.add_argument(
        "--documents", type=int, default=20, help="validation documents (default %(default)s)"
    )
    parser.add_argument("--stage", default="", help="the stage to code with (default: the last)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="train a tiny model; few documents")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options.run = train_tiny(Path(folder))
            options.documents = 3
        if options.run is None or not (options.run / "final_model.ptz").exists():
            parser.error(f"run {options.run}: no final_model.ptz there; give a finished run, or --quick")
        artifact = codec.open_artifact(options.run / "final_model.ptz")
        text_codec = codec.load_texts(artifact)
        files = options.files or [Path(__file__), options.run / "train.log"]
        others = {path.name: path.read_bytes()[: 2000 if options.quick else None] for path in files}
        sets = {"documents": documents_of(artifact, text_codec, options.documents), "others": others}
        print(compare(artifact, text_codec, sets, options))


def compare(
    artifact: codec.Artifact,
    text_codec: codec.TextCodec,
    sets: dict[str, dict[str, bytes]],
    options: argparse.Namespace,
) -> str:
    """The table, and the last line."""
    result: dict[str, object] = {"machine": codec.machine()}
    for name, contents in sets.items():
        data = b"".join(contents.values())
        streams = []
        for threads in map(int, options.threads.split(",")):
            figures, stream = measure(
                artifact, text_codec, contents, codec.CodingOptions(options.stage, {}, threads)
            )
            streams.append(stream)
            excess = figures["stream"] / figures["recorded"] - 1
            print(
                f"{name}, {threads} threads: {len(data):,} bytes -> {figures['container']:,}, stream "
                f"{figures['stream']:,} for {figures['recorded']:,.1f} recorded ({excess:+.4%}), "
                f"{'identical' if figures['same'] else 'DIFFERENT'}; tokens/s: "
                f"{figures['encode']:.0f} encoded, {figures['decode']:.0f} decoded"
            )
            result |= {f"{name}_{key}_{threads}": round(float(value), 4) for key, value in figures.items()}
            result[f"{name}_excess_{threads}"] = round(excess, 6)
        result[f"{name}_same_bits"] = len(set(streams)) == 1
        for baseline, size in codec.baseline_sizes(data).items():
            ratio = size / figures["container"]
            print(f"{name}, {baseline}: {size:,} bytes, {ratio:.3f} of ours")
            result[f"{name}_{baseline}"] = round(ratio, 4)
    result["sampled"] = round(sample_speed(artifact, text_codec, 30 if options.quick else 200), 1)
    print(f"sample: {result['sampled']} tokens/s")
    return "RESULT " + json.dumps(result)


if __name__ == "__main__":
    main()
