#!/usr/bin/env python3
"""Speed of the data side against its plain versions, in MB of raw text a second of processor time.

python bench/data.py            # encode, decode, tokenise, sidecar, whole pipeline, verification of a shard
python bench/data.py --quick    # the same figures from less text, within a minute
python bench/data.py --table    # tokens per byte without transform, with CaseOps v1 and v3
python bench/data.py --proof    # verify_bytes.py against documents: processor time, memory, the full scale
python bench/data.py --kills 20 # kill -9 at random moments of every stage, and the same bytes
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# As a script this file would be found under the name of the package `data`: its folder must not be searched.
sys.path[:] = [
    str(ROOT),
    str(ROOT / "tests"),
    *(path for path in sys.path if Path(path).resolve() != ROOT / "bench"),
]
import environment

environment.enter()
import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import numpy as np

from bench.data_kills import kills
from bench.texts import SHARED, TRAINING_MB, documents, embedded_texts, lines_of, size, table_texts
from data.documents import Batch, Position
from data.fast_tokenizer import FastTokenizer
from data.prepare import Job, Known, Settings, prepare
from data.shards import BOS, train_tokenizer, write_shard
from data.sidecar import encode_with_bytes
from data.superword_training import train_with_superwords
from helpers import caps_reference
from helpers.data_side import content
from lossless_caps import TRANSFORMS, decode_caseops, encode_caseops

# Tokens per byte of held-out text in spec/TOKENIZER.md.
PUBLISHED = {"none": 0.26513, "caseops_v1": 0.30917, "caseops_v3": 0.27183}

# Validation and training documents of the contest's export, and their mean length (15,368,808 are 48.17 GB).
FULL_DOCUMENTS, BYTES_PER_DOCUMENT, FULL_CORES = 8_250_000, 3134, 16

# As run.sh makes them, superwords are one of so many entries: of the flagship's tokenizer, and of its rival.
FEW_SUPERWORDS, SUPERWORDS = 256, 8


class Table:
    """Measured speeds, by processor time, which other work changes little: prints and keeps the figures."""

    def __init__(self, repeats: int):
        self.repeats, self.figures = repeats, {}
        print(f"{'step':<34}{'MB/s':>9}{'spread':>9}{'plain':>9}{'ratio':>8}")

    def speed(self, action: Callable[[], object], amount: int, repeats: int) -> tuple[float, float]:
        """Median MB/s of `action`, which works on `amount` bytes, and the spread (max - min) / median."""
        speeds = []
        for _ in range(repeats):
            began = time.process_time()
            action()
            speeds.append(amount / 1e6 / (time.process_time() - began))
        median = statistics.median(speeds)
        return median, (max(speeds) - min(speeds)) / median

    def compare(
        self,
        name: str,
        fast: Callable[[list[str]], object],
        plain: Callable[[list[str]], object],
        texts: list[str],
        sample: list[str],
        raw: tuple[int, int] | None = None,
    ) -> None:
        """Both versions, the plain one on `sample`; `raw` are the
        bytes of raw text where the texts are codes.
        """
        amounts = raw or (size(texts), size(sample))
        speed, spread = self.speed(lambda: fast(texts), amounts[0], self.repeats)
        slow, slow_spread = self.speed(lambda: plain(sample), amounts[1], self.repeats)
        print(f"{name:<34}{speed:>9.1f}{spread:>8.0%} {slow:>9.2f}{speed / slow:>7.1f}x", flush=True)
        self.figures |= {
            f"{name}_mb_per_s": round(speed, 2),
            f"{name}_spread": round(spread, 3),
            f"{name}_plain_mb_per_s": round(slow, 3),
            f"{name}_plain_spread": round(slow_spread, 3),
            f"{name}_ratio": round(speed / slow, 2),
        }


def each(function: Callable) -> Callable[[list[str]], list]:
    """`function` for every text of a list."""
    return lambda texts: [function(text) for text in texts]


def speeds(quick: bool) -> dict:
    """All speeds; a fresh tokenizer for every repeat, so that filling its table is part of its time."""
    texts = documents("web.jsonl.xz", 1000)
    sample = documents("web.jsonl.xz", 1 if quick else 4)
    table = Table(2 if quick else 5)
    raw = size(texts), size(sample)
    for version, name in ((1, "encode"), (3, "encode_v3")):
        plain = caps_reference.encode_v1 if version == 1 else caps_reference.encode_v3
        fast = each(lambda text, version=version: encode_caseops(text, version))
        table.compare(name, fast, each(plain), texts, sample)
    for version, name in ((1, "decode"), (3, "decode_v3")):
        plain = caps_reference.decode_v1 if version == 1 else caps_reference.decode_v3
        codes = [encode_caseops(text, version) for text in texts]
        table.compare(
            name,
            each(lambda code, version=version: decode_caseops(code, version)),
            each(plain),
            codes,
            codes[: len(sample)],
            raw,
        )
    codes = [encode_caseops(text) for text in texts]
    models = {
        "tokenize": (codes, "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"),
        "tokenize_sp8192": (texts, "fineweb_8192_bpe.model"),
    }
    for name, (inputs, file) in models.items():
        path = SHARED / "tokenizers" / file
        processor = FastTokenizer(path).processor
        few = inputs[: 4 * len(sample)] if quick else inputs
        table.compare(
            name,
            lambda part, path=path: FastTokenizer(path).encode_batch(part),
            each(processor.encode),
            inputs,
            few,
            (size(texts), size(texts[: len(few)])),
        )
    path = SHARED / "tokenizers" / models["tokenize"][1]
    warm = FastTokenizer(path)
    warm.encode_batch(codes)
    speed, _ = table.speed(lambda: warm.encode_batch(codes), raw[0], table.repeats)
    print(f"{'tokenize, words all known':<34}{speed:>9.1f}")
    table.figures["tokenize_warm_mb_per_s"] = round(speed, 2)

    def plain_sidecar(part: list[str]) -> None:
        for text in part:
            pieces = warm.processor.encode(caps_reference.encode_v1(text), return_type="proto").pieces
            caps_reference.byte_counts([piece.surface for piece in pieces])

    few = texts[: 2 * len(sample)]
    table.compare(
        "sidecar",
        each(lambda text: encode_with_bytes(warm.processor, "caseops_v1", text)),
        plain_sidecar,
        few,
        sample,
    )
    lines = [json.dumps({"text": text}).encode() for text in texts]

    def pipeline(part: list[str]) -> None:
        job = Job(
            str(path),
            str(time.perf_counter_ns()),
            "caseops_v1",
            "text",
            False,
            Known(texts={b""}, tokens={b""}),
        )
        for start in range(0, len(part), 500):
            job(
                Batch(
                    path,
                    Position(record=start),
                    lines[start : start + 500][: len(part) - start],
                    Position(),
                    0,
                )
            )

    def plain_pipeline(part: list[str]) -> None:
        ids: list[int] = []
        for line in lines[: len(part)]:
            ids += [BOS, *warm.processor.encode(caps_reference.encode_v1(json.loads(line)["text"]))]
        np.array(ids, dtype=np.uint16)

    table.compare("pipeline", pipeline, plain_pipeline, texts, sample)
    table.figures |= verification(20_000_000 if quick else 100_000_000)
    return {**table.figures, "quick": quick, "text_mb": round(raw[0] / 1e6, 1), "repeats": table.repeats}


def verification(tokens: int) -> dict:
    """Seconds that verify_bytes.py takes for a training shard of so many random tokens, on 2 processes."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, count in (("train", tokens), ("val", tokens // 10)):
            values = (generator.zipf(1.2, count).astype(np.uint64) % 7000 + 300).astype("<u2")
            values[::800] = BOS
            write_shard(folder / f"fineweb_{kind}_000000.bin", values)
        # With a sidecar nothing is decoded: random tokens are no text.
        write_shard(folder / "fineweb_val_bytes_000000.bin", np.zeros(tokens // 10, "<u2"))
        began = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "verify_bytes.py"),
                name,
                "--workers",
                "2",
                "--tokenizer",
                str(SHARED / "tokenizers" / "fineweb_8192_bpe.model"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - began
    print(f"verify_bytes.py, {tokens / 1e6:.0f} M tokens in a shard: {seconds:.1f} s")
    return {"verify_tokens": tokens, "verify_seconds": round(seconds, 2)}


def tokens_per_byte(megabytes: float) -> dict:
    """The table of spec/TOKENIZER.md: three tokenizers trained on the same text, counted on held-out text."""
    training, held_out = table_texts(megabytes)
    raw = size(held_out)
    print(f"trained on {size(training) / 1e6:.1f} MB, counted on {raw / 1e6:.2f} MB of held-out text")
    print(
        f"{'transform':<14}{'tokens':>11}{'per byte':>10}{'against v1':>12}{'published':>11}{'operators':>11}"
    )

    results: dict = {}
    with tempfile.TemporaryDirectory() as name:
        for transform in ("caseops_v1", "none", "caseops_v3"):
            encode, _, operators, _ = TRANSFORMS[transform]
            model = train_tokenizer(lines_of(training, encode), Path(name) / transform, 8192, operators)
            ids, _ = FastTokenizer(model).encode_batch([encode(text) for text in held_out])
            marks = int(np.isin(ids, np.arange(4, 4 + len(operators))).sum())
            results[transform] = len(ids)
            change = len(ids) / results["caseops_v1"] - 1
            print(
                f"{transform:<14}{len(ids):>11,}{len(ids) / raw:>10.5f}{change:>+12.1%}"
                f"{PUBLISHED[transform]:>11.5f}{marks:>11,}",
                flush=True,
            )
    return {f"tokens_per_byte_{name}": round(count / raw, 5) for name, count in results.items()} | {
        "v3_against_v1": round(results["caseops_v3"] / results["caseops_v1"] - 1, 4),
        "training_mb": megabytes,
    }


def flagship_tokens_per_byte() -> dict:
    """Tokens per byte of the flagship's tokenizer and of one with many superwords, both trained here: of the
    table's text, or where that is not there of the embedded corpus.
    """
    training, held_out = table_texts(TRAINING_MB) if SHARED.is_dir() else embedded_texts()
    text = "the table's text" if SHARED.is_dir() else "the embedded corpus"
    figures: dict = {"tokens_per_byte_text": text}
    encode, _, operators, _ = TRANSFORMS["caseops_v3"]
    kinds = (("tokens_per_byte", FEW_SUPERWORDS, False), ("tokens_per_byte_superwords", SUPERWORDS, True))
    for key, part, split_digits in kinds:
        with tempfile.TemporaryDirectory() as name:
            settings = Settings([], Path(name))
            model = train_with_superwords(
                lines_of(training, encode),
                settings.out / "tokenizer",
                settings.vocab_size,
                operators,
                settings.vocab_size // part,
                split_digits=split_digits,
            )
            ids, _ = FastTokenizer(model).encode_batch([encode(text) for text in held_out])
        figures[key] = round(len(ids) / size(held_out), 5)
        print(f"{key}: {figures[key]:.5f} of {text} ({size(held_out) / 1e6:.2f} MB)", flush=True)
    return figures


MEASURED = """
import importlib, json, resource, sys, threading, time

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

def watch():
    while True:
        used["own_mb"] = max(used["own_mb"], memory("RssAnon"))
        time.sleep(0.05)

if __name__ == "__main__":
    module, used = importlib.import_module(sys.argv[1]), {"own_mb": 0.0}
    threading.Thread(target=watch, daemon=True).start()
    status = module.main(sys.argv[2:])
    for name, who in (("parent", resource.RUSAGE_SELF), ("workers", resource.RUSAGE_CHILDREN)):
        found = resource.getrusage(who)
        used |= {f"{name}_seconds": found.ru_utime + found.ru_stime, f"{name}_mb": found.ru_maxrss / 1024}
    used["parent_mb"] = memory("VmHWM")  # ru_maxrss is never below that of the process it was forked from
    print(json.dumps(used))
    sys.exit(status)
"""


def measured(module: str, *arguments: object) -> dict:
    """Processor seconds and peak memory of a command's `main`, by parent and workers; `own_mb` is what the
    parent holds without the files that are mapped into it.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, module, *map(str, arguments)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_lines(path: Path, texts: list[str]) -> Path:
    """The texts as JSON lines in a file."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def end_to_end(sizes: tuple[float, float]) -> dict:
    """data/prepare.py with CaseOps v3 and a given tokenizer, by processor time, with 1 and with 2 workers.

    What the larger text costs more is the rate of a large one: starting and the first words fall away.
    """
    texts = documents("web.jsonl.xz", sizes[1])
    if size(texts) < sizes[1] * 1e6:
        texts += documents("prose.jsonl.xz", sizes[1] - size(texts) / 1e6)
    encode, _, operators, _ = TRANSFORMS["caseops_v3"]
    rows, made = {}, {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model = train_tokenizer(lines_of(texts[:1500], encode), place / "tokenizer", 8192, operators)
        options = ("--tokenizer", model, "--val-docs", 50, "--transform", "caseops_v3")
        for megabytes in sizes:
            part = texts[: max(60, int(len(texts) * megabytes / sizes[1]))]
            source = write_lines(place / f"{megabytes:g}.jsonl", part)
            for workers in (1, 2):
                out = place / f"{megabytes:g}_{workers}"
                used = measured("data.prepare", source, "--out", out, *options, "--workers", workers)
                rows[megabytes, workers] = size(part), used["parent_seconds"] + used["workers_seconds"]
                made[megabytes, workers] = content(out)
    figures: dict = {}
    for workers in (1, 2):
        (few, before), (many, after) = (rows[megabytes, workers] for megabytes in sizes)
        figures[f"end_to_end_{workers}_mb_per_s"] = round((many - few) / 1e6 / (after - before), 2)
        print(
            f"prepare.py, v3, {workers} workers: {few / 1e6:.1f} MB in {before:.1f} s, {many / 1e6:.1f} MB "
            f"in {after:.1f} s of processor time: {figures[f'end_to_end_{workers}_mb_per_s']:.1f} MB/s a core"
        )
    figures["identical"] = all(made[megabytes, 1] == made[megabytes, 2] for megabytes in sizes)
    print(f"the same bytes with 1 and 2 workers: {figures['identical']}")
    return figures


def proof_at_scale(sizes: tuple[float, float]) -> dict:
    """Datasets of two sizes (MB of text) are proved; what the larger one costs more is extrapolated."""
    texts = documents("web.jsonl.xz", sizes[1])
    rows, amounts, tokenizer = [], [], None
    with tempfile.TemporaryDirectory() as name:
        for megabytes in sizes:
            part = texts[: max(1, int(len(texts) * megabytes / sizes[1]))]
            out = Path(name) / f"{megabytes:g}"
            source = write_lines(Path(name) / f"{megabytes:g}.jsonl", part)
            settings = Settings([source], out, val_docs=50, transform="caseops_v3", tokenizer=tokenizer)
            settings.shard_tokens = 500_000
            settings.superwords = 0 if tokenizer else settings.vocab_size // SUPERWORDS
            prepare(settings)
            tokenizer = out / "tokenizer.model"
            rows.append(measured("verify_bytes", out, "--documents", source, "--workers", 2))
            amounts.append(size(part))
    print(
        f"{'MB of text':>10}{'parent s':>10}{'workers s':>11}{'parent MB':>11}{'its own':>9}{'worker MB':>11}"
    )
    for amount, row in zip(amounts, rows, strict=True):
        print(
            f"{amount / 1e6:>10.1f}{row['parent_seconds']:>10.2f}{row['workers_seconds']:>11.2f}"
            f"{row['parent_mb']:>11.0f}{row['own_mb']:>9.0f}{row['workers_mb']:>11.0f}"
        )
    more = amounts[1] - amounts[0]
    per_byte = {name: (rows[1][name] - rows[0][name]) / more for name in rows[0]}
    full = FULL_DOCUMENTS * BYTES_PER_DOCUMENT
    seconds = full * (per_byte["parent_seconds"] + per_byte["workers_seconds"] / FULL_CORES)
    print(
        f"{FULL_DOCUMENTS:,} documents ({full / 1e9:.1f} GB) on {FULL_CORES} cores, first parent, then "
        f"workers: {seconds / 60:.1f} minutes of processor time"
    )
    return {
        "proof_parent_mb_per_s": round(1e-6 / per_byte["parent_seconds"], 2),
        "proof_workers_mb_per_s": round(1e-6 / per_byte["workers_seconds"], 2),
        "proof_full_minutes": round(seconds / 60, 2),
        "proof_memory_mb": [
            [round(row[key]) for key in ("parent_mb", "own_mb", "workers_mb")] for row in rows
        ],
    }


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less text, the same figures")
    parser.add_argument("--table", action="store_true", help="tokens per byte instead of speeds")
    parser.add_argument("--proof", action="store_true", help="verify_bytes.py instead of speeds")
    parser.add_argument(
        "--mb", type=float, default=TRAINING_MB, help="training text for --table (default %(default)s)"
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=0,
        metavar="N",
        help="N kills in every stage, of a file and of a stream, instead of speeds",
    )
    options = parser.parse_args()
    if not SHARED.is_dir() and not options.kills:
        print(f"{SHARED}: no such folder, which holds the text and the tokenizers for everything else")
        result = flagship_tokens_per_byte()
    elif options.table:
        result = tokens_per_byte(options.mb if not options.quick else 10)
    elif options.proof:
        result = proof_at_scale((2, 5) if options.quick else (8, 24))
    elif options.kills:
        result = kills(options.kills)
    else:
        result = speeds(options.quick) | flagship_tokens_per_byte()
        result |= end_to_end((2, 6) if options.quick else (24, 96))
    print("RESULT " + json.dumps(result))
    return 0 if result.get("identical", True) else 1


if __name__ == "__main__":
    sys.exit(main())
