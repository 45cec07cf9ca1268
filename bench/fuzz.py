#!/usr/bin/env python3
"""Damaged files: each mutant gives an error of one line or the right
result, never a traceback, never a wrong count.

    python bench/fuzz.py [TARGET ...] [--mutants 2000] [--seed 0] [--quick]

A target makes a small right file, says how a damaged copy of it is read, and judges what came of it. All of
TARGETS are tried if none is named. Exit code 1 if a mutant was read wrongly or ended in a traceback; the
first such mutants are described, and --keep FOLDER keeps them.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# As a script this file's folder would be searched first, and bench/data.py would hide the package data.
sys.path[:] = [
    str(ROOT),
    str(ROOT / "tests"),
    *(path for path in sys.path if Path(path).resolve() != ROOT / "bench"),
]
import environment

environment.enter()
import argparse
import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import random
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

import recipes
import results
import verify_bytes
from data import prepare
from data.documents import DataError, batches, survey, texts_of
from data.shards import BOS, HEADER_BYTES, ShardError, read_shard, sha256_file, train_tokenizer, write_shard
from helpers.damage import change_bytes, change_json, change_text
from lossless_caps import TRANSFORMS

WORDS = "the The of NASA iPhone house river Time don't naïve 3,141 (see below) science. Why? a I".split()
REFUSED, RIGHT = "refused", "right"
QUICK = 100


class Wrong(Exception):
    """A mutant was taken for something that it is not; the message says what."""


@dataclass
class Target:
    """A right file, and what reads it.

    `content` is the right content, `judge` reads one mutant of it and returns REFUSED or RIGHT, or raises
    Wrong; any other exception counts as a traceback. `mutants` makes a mutant (default: bytes changed).
    """

    content: bytes
    judge: Callable[[bytes], str]
    mutate: Callable[[bytes, random.Random], bytes]


# === WHAT IS READ ===


def texts(count: int) -> list[str]:
    """Random documents, the same ones each time."""
    generator = random.Random(count)
    return [
        f"Document {number} " + " ".join(generator.choices(WORDS, k=generator.randint(20, 60)))
        for number in range(count)
    ]


def lines(documents: list[str]) -> bytes:
    """Documents as JSON lines."""
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def one_line(program: Callable[[list[str]], int], arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of a command run in this process; Wrong if an error is more than one line."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = program(arguments)
    said = [line for line in errors.getvalue().splitlines() if "WARNING" not in line]
    if code not in (0, 1, 2):
        raise Wrong(f"exit code {code}")
    if len(said) != (code == 2):
        raise Wrong(f"exit code {code} and {len(said)} lines of errors: {said[:3]}")
    return code, output.getvalue()


def make_dataset(folder: Path, *options: object) -> Path:
    """A small dataset with a byte sidecar, made by data/prepare.py from folder/all.jsonl."""
    (folder / "all.jsonl").write_bytes(lines(texts(60)))
    encode, _, operators, _ = TRANSFORMS["caseops_v1"]
    model = folder / "tokenizer.model"
    if not model.exists():
        train_tokenizer(map(encode, texts(60)), folder / "tokenizer", 400, operators)
    code, _ = one_line(prepare.main, command(folder, *options))
    if code:
        raise RuntimeError(f"{folder}: the right dataset could not be made")
    return folder / "dataset"


def command(folder: Path, *options: object) -> list[str]:
    """Arguments of data/prepare.py for the small dataset."""
    given = ["--out", folder / "dataset", "--val-docs", 10, "--tokenizer", folder / "tokenizer.model"]
    given += ["--transform", "caseops_v1", "--shard-tokens", 1500, "--workers", 1]
    return [str(argument) for argument in (folder / "all.jsonl", *given, *options)]


def verify(folder: Path) -> tuple[int, dict]:
    """Exit code and report of verify_bytes.py."""
    code, output = one_line(verify_bytes.main, [str(folder), "--workers", "1", "--json"])
    return code, json.loads(output) if code != 2 else {}


def true_counts(folder: Path) -> dict[str, int]:
    """The counts of a dataset straight from its files."""
    found = {}
    for kind in ("train", "val"):
        flat = np.concatenate([read_shard(path) for path in shards(folder, kind)])
        found[f"docs_{kind}"] = int((flat == BOS).sum())
        found[f"{kind}_tokens"] = len(flat)
    sidecar = [read_shard(path).astype(np.int64).sum() for path in shards(folder, "val_bytes")]
    return found | {"val_sidecar_bytes": int(sum(sidecar))}


def shards(folder: Path, kind: str) -> list[Path]:
    """The shards of a kind in order."""
    return sorted(folder.glob(f"fineweb_{kind}_{'[0-9]' * 6}.bin"))


def signed(manifest: dict, folder: Path) -> bytes:
    """A manifest whose checksum and facts of files are right, as a builder with an error would write it."""
    files = manifest.get("files")
    for name, facts in files.items() if isinstance(files, dict) else ():
        path = folder / name
        if isinstance(facts, dict) and name and path.is_file():
            facts |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
            if path.suffix == ".bin":
                facts["tokens"] = (path.stat().st_size - HEADER_BYTES) // 2
    manifest["checksum"] = prepare.checksum(manifest)
    return json.dumps(manifest).encode()


# === TARGETS ===


def shard(folder: Path) -> Target:
    """read_shard of a shard file."""
    path = folder / "fineweb_train_000000.bin"
    write_shard(path, np.arange(700, dtype="<u2"))
    content = path.read_bytes()

    def judge(mutant: bytes) -> str:
        path.write_bytes(mutant)
        try:
            values = read_shard(path)
        except ShardError as error:
            if path.name not in str(error) or "\n" in str(error):
                raise Wrong(f"an error that does not name the file in one line: {error}") from None
            return REFUSED
        if mutant[:12] != content[:12] or values.tobytes() != mutant[HEADER_BYTES:]:
            raise Wrong(f"{len(values)} values read")
        return RIGHT

    return Target(content, judge, change_bytes)


def file_of_dataset(name: str, sign: bool) -> Callable[[Path], Target]:
    """verify_bytes.py of a dataset with a damaged file, its manifest as it was or signed again."""

    def make(folder: Path) -> Target:
        dataset = make_dataset(folder)
        path, manifest = dataset / name, dataset / "manifest.json"
        content, original = path.read_bytes(), manifest.read_bytes()

        def judge(mutant: bytes) -> str:
            path.write_bytes(mutant)
            manifest.write_bytes(signed(json.loads(original), dataset) if sign else original)
            code, report = verify(dataset)
            if code:
                return REFUSED
            if not sign and mutant != content:
                raise Wrong("proved although the file has another sha256")
            counts = true_counts(dataset)
            if any(report["counts"][key] != value for key, value in counts.items()):
                raise Wrong(f"counts {report['counts']} instead of {counts}")
            return RIGHT

        return Target(content, judge, change_bytes)

    return make


def manifest_of_dataset(sign: bool) -> Callable[[Path], Target]:
    """verify_bytes.py of a dataset with a damaged manifest: bytes
    changed, or values changed and signed again.
    """

    def make(folder: Path) -> Target:
        dataset = make_dataset(folder)
        path, counts = dataset / "manifest.json", true_counts(dataset)

        def judge(mutant: bytes) -> str:
            path.write_bytes(mutant)
            code, report = verify(dataset)
            if code:
                return REFUSED
            if any(report["counts"][key] != value for key, value in counts.items()):
                raise Wrong(f"counts {report['counts']} instead of {counts}")
            return RIGHT

        def change(content: bytes, generator: random.Random) -> bytes:
            manifest = json.loads(change_json(content, generator))
            manifest["checksum"] = prepare.checksum(manifest)
            return json.dumps(manifest).encode()

        return Target(path.read_bytes(), judge, change if sign else change_bytes)

    return make


def journal(folder: Path) -> Target:
    """data/prepare.py going on after a kill with a damaged journal."""
    dataset = make_dataset(folder)
    expected = {path.name: path.read_bytes() for path in dataset.iterdir()}
    write_json, calls = prepare.write_json, 0

    class Killed(BaseException):
        pass

    def dying(path: Path, value: dict) -> None:
        nonlocal calls
        calls += 1
        write_json(path, value)
        if calls == 6:
            raise Killed

    (dataset / "manifest.json").unlink()
    prepare.write_json = dying
    options = ("--batch-mb", 0.002, "--journal-seconds", 0)
    try:
        one_line(prepare.main, command(folder, "--overwrite", *options))
        raise RuntimeError("the run was not stopped")
    except Killed:
        left = {path.name: path.read_bytes() for path in dataset.iterdir()}
    finally:
        prepare.write_json = write_json

    def judge(mutant: bytes) -> str:
        for path in dataset.iterdir():
            path.unlink()
        for name, content in (left | {prepare.JOURNAL: mutant}).items():
            (dataset / name).write_bytes(content)
        code, _ = one_line(prepare.main, command(folder, *options))
        if code:
            return REFUSED
        found = {path.name: path.read_bytes() for path in dataset.iterdir()}
        if found != expected:
            raise Wrong(f"another dataset: {sorted(set(found) ^ set(expected)) or 'other bytes'}")
        return RIGHT

    return Target(left[prepare.JOURNAL], judge, change_bytes)


def source(suffix: str) -> Callable[[Path], Target]:
    """The reader of source files: all of a damaged file's documents, or an error of one line."""

    def make(folder: Path) -> Target:
        path = folder / f"all{suffix}"
        path.write_bytes(packed(texts(40), suffix))
        content, right = path.read_bytes(), texts(40)

        def judge(mutant: bytes) -> str:
            path.write_bytes(mutant)
            try:
                found = survey(path, "text")
                read = [text for batch in batches([path], "text", 2000) for text in texts_of(batch, "text")]
                last = [batch.after.record for batch in batches([path], "text", 2000)][-1:]
            except DataError as error:
                if path.name not in str(error) or "\n" in str(error):
                    raise Wrong(f"an error that does not name the file in one line: {error}") from None
                return REFUSED
            if [found.records] != (last or [0]):
                raise Wrong(f"{found.records} records surveyed, {last} read")
            # A file that ends between two parts is a whole one to every reader.
            if suffix not in UNCHECKED and read not in [right[:end] for end in (PART, 2 * PART, len(right))]:
                raise Wrong(f"{len(read)} documents read, not the {len(right)} that were packed")
            if suffix == ".jsonl" and read != plain_texts(mutant):
                raise Wrong(f"{len(read)} documents read, not those of the file")
            return RIGHT

        return Target(content, judge, change_bytes)

    return make


# Formats without a checksum of the text: other text may come out, as out of any text file.
UNCHECKED = (".jsonl", ".parquet")
PART = 14


def packed(documents: list[str], suffix: str) -> bytes:
    """Documents as a source file of some format; compressed ones have three parts with a checksum each."""
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), sink, row_group_size=15)
        return sink.getvalue()
    thirds = [documents[start : start + PART] for start in range(0, len(documents), PART)]
    if suffix == ".zst":
        import zstandard

        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    else:
        compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, bytes)
    return b"".join(compress(lines(part)) for part in thirds)


def plain_texts(content: bytes) -> list[str]:
    """The documents of JSON lines, in the plainest way."""
    return [json.loads(line)["text"] for line in content.split(b"\n") if line.strip()]


def refused(message: object, path: Path) -> str:
    """REFUSED, if the message is one line that names the file."""
    if path.name not in str(message) or "\n" in str(message):
        raise Wrong(f"an error that does not name the file in one line: {message}")
    return REFUSED


def recipe(folder: Path) -> Target:
    """The reader of recipe files: what a shell makes of it, or an error of one line."""
    path = folder / "r.env"
    published = ROOT / "records" / "recipes" / "pr1693.env"
    content = published.read_bytes() + b"export A='x y'\nB=\"z\" # c\n"

    def judge(mutant: bytes) -> str:
        path.write_bytes(mutant)
        try:
            settings = recipes.read(path)
        except recipes.RecipeError as error:
            return refused(error, path)
        path.write_bytes(mutant.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n"))
        shell = subprocess.run(["sh", "-c", f"set -a; . {path}; env -0"], env={}, capture_output=True)
        found = dict(word.split("=", 1) for word in shell.stdout.decode().split("\0") if word)
        if shell.returncode or not settings.items() <= found.items():
            raise Wrong(f"{dict(settings.items() - found.items())} is read, the shell reads otherwise")
        return RIGHT

    return Target(content, judge, change_text)


def finished_run(folder: Path) -> Path:
    """The folder of a tiny run, with every file that the trainer writes."""
    from helpers.run_folders import original
    from helpers.trainer import make_dataset

    (folder / "data").mkdir()
    return original(make_dataset(folder / "data"))


def file_of_run(name: str, mutate: Callable[[bytes, random.Random], bytes]) -> Callable[[Path], Target]:
    """Every tool that reads a run folder, one file of which is damaged: refused, or read with its score."""

    def make(folder: Path) -> Target:
        from helpers.readers import read_all, text_alone

        run = finished_run(folder)
        path, right = run / name, results.Run.read(run).summary

        def judge(mutant: bytes) -> str:
            path.write_bytes(mutant)
            warnings = io.StringIO()
            try:
                with text_alone(), contextlib.redirect_stderr(warnings):
                    read_all(run)
                    found = results.Run.read(run).summary
            except results.Stop as stop:
                return refused(stop, run)
            lines = warnings.getvalue().splitlines()
            if not all(line.startswith("warning: ") for line in lines):
                raise Wrong(f"a warning of several lines: {lines[:3]}")
            for figure in ("val_bpb", "val_loss", "val_tokens", "val_bytes", "artifact_bytes", "total_bytes"):
                if found[figure] != right[figure]:
                    raise Wrong(f"{figure} {found[figure]} instead of {right[figure]}")
            return RIGHT

        return Target(path.read_bytes(), judge, mutate)

    return make


def change_signed(content: bytes, source: random.Random) -> bytes:
    """An artifact whose manifest, payload or lengths are damaged, and whose checksum is right again."""
    import train_gpt as trainer

    header = trainer.ARTIFACT_HEADER
    magic, coder, head, _, _ = header.unpack_from(content)
    name = coder.rstrip(b"\0").decode()
    manifest, payload = content[header.size : header.size + head], content[header.size + head :]
    kind = source.randrange(4)
    if kind < 2:
        plain = trainer.compress(manifest, name, undo=True)
        manifest = trainer.compress((change_json, change_bytes)[kind](plain, source), name)
    elif kind == 2:
        payload = change_bytes(payload, source)
    else:
        place = source.randrange(len(manifest) + len(payload))
        manifest, payload = (manifest + payload)[:place], (manifest + payload)[place:]
    digest = hashlib.sha256(name.encode() + manifest + payload).digest()
    return header.pack(magic, coder, len(manifest), len(payload), digest) + manifest + payload


def artifact(signed: bool) -> Callable[[Path], Target]:
    """The readers of an artifact: the trainer's STAGE=evaluate as far as its weights, report.py, submit.py.

    With `signed` its checksum is right, as another program's would be; then whatever has all tensors is read.
    """

    def make(folder: Path) -> Target:
        import report
        import submit
        import train_gpt as trainer

        run = results.Run.read(finished_run(folder))
        path = run.folder / "final_model.ptz"
        content = path.read_bytes()
        given = {name: results.show(value) for name, value in run.summary["overrides"].items()}
        config = trainer.Config.from_env(given)
        table = trainer.parameter_table(config)

        def load() -> None:
            manifest, tensors, _ = trainer.decode_artifact(path)
            different = trainer.describe_other_model(manifest["model"], config)
            if different:
                raise trainer.Stop(f"{path}: made with other settings ({different})")
            trainer.check_tensors(path, table, tensors)
            weights = trainer.assemble_weights(table, tensors)
            if {name: tuple(weight.shape) for name, weight in weights.items()} != shapes:
                raise Wrong("weights of other shapes")
            report.treemap(report.artifact_parts(path))

        shapes = {name: tuple(spec.shape) for name, spec in table.items()}

        def judge(mutant: bytes) -> str:
            path.write_bytes(mutant)
            try:
                load()
            except trainer.Stop as stop:
                return refused(stop, path)
            if not signed and mutant != content:
                raise Wrong("read although a byte is another")
            try:
                submit.check_bytes(run, run.summary)
            except results.Stop as stop:
                return refused(stop, path)
            if mutant != content:
                raise Wrong("submitted although a byte is another")
            return RIGHT

        return Target(content, judge, change_signed if signed else change_bytes)

    return make


# Further targets are added here: a name, and a function of a folder to work in.
TARGETS: dict[str, Callable[[Path], Target]] = {
    "shard": shard,
    "validation shard": file_of_dataset("fineweb_val_000000.bin", sign=False),
    "training shard, signed": file_of_dataset("fineweb_train_000000.bin", sign=True),
    "sidecar": file_of_dataset("fineweb_val_bytes_000000.bin", sign=False),
    "sidecar, signed": file_of_dataset("fineweb_val_bytes_000000.bin", sign=True),
    "manifest": manifest_of_dataset(sign=False),
    "manifest, signed": manifest_of_dataset(sign=True),
    "journal": journal,
    "source .jsonl": source(".jsonl"),
    "source .gz": source(".gz"),
    "source .bz2": source(".bz2"),
    "source .xz": source(".xz"),
    "source .zst": source(".zst"),
    "source .parquet": source(".parquet"),
    "recipe": recipe,
    "metrics": file_of_run("metrics.jsonl", change_text),
    "summary": file_of_run("summary.json", change_json),
    "configuration": file_of_run("config.json", change_json),
    "stages": file_of_run("stages.json", change_json),
    "sums of documents": file_of_run("documents.npz", change_bytes),
    "artifact": artifact(signed=False),
    "artifact, signed": artifact(signed=True),
}


# === THE RUN ===


def failures(target: Target, mutants: int, seed: int, counts: Counter) -> Iterator[tuple[bytes, str]]:
    """The mutants that were read wrongly, each with what happened; `counts` counts all outcomes."""
    generator = random.Random(seed)
    for _ in range(mutants):
        mutant = target.mutate(target.content, generator)
        try:
            counts[target.judge(mutant)] += 1
        except Wrong as error:
            counts["wrong"] += 1
            yield mutant, str(error)
        except (Exception, SystemExit) as error:
            counts["traceback"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            yield mutant, f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def fuzz(name: str, mutants: int, seed: int, keep: Path | None) -> dict[str, int]:
    """Try one target and print its line; how many mutants came to which outcome."""
    counts: Counter = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[name](Path(folder))
        counts_right = target.judge(target.content)
        if counts_right != RIGHT:
            raise RuntimeError(f"{name}: the right file is refused")
        bad = list(failures(target, mutants, seed, counts))
    outcomes = {outcome: counts[outcome] for outcome in (REFUSED, RIGHT, "wrong", "traceback")}
    figures = "".join(f"{count:>11}" for count in outcomes.values())
    print(f"{name:<26}{mutants:>9}{figures}{time.monotonic() - began:>9.1f}", flush=True)
    for number, (mutant, what) in enumerate(bad[:5]):
        print(f"    {what[:200]}", flush=True)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name.replace(' ', '_')}.{number}").write_bytes(mutant)
    return {"mutants": mutants, **outcomes}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of: {', '.join(TARGETS)}")
    parser.add_argument("--mutants", type=int, default=2000, help="for each target (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutants (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} mutants for each target")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="gets the first mutants read wrongly")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown or options.mutants < 1:
        wrong = f"no target {unknown[0]!r}" if unknown else f"--mutants {options.mutants}"
        print(f"fuzz: {wrong}; the targets are {', '.join(TARGETS)}, --mutants is 1 or more", file=sys.stderr)
        return 2
    mutants = QUICK if options.quick else options.mutants
    print(f"{'target':<26}{'mutants':>9}{'refused':>11}{'right':>11}{'wrong':>11}{'traceback':>11}{'s':>9}")
    result = {name: fuzz(name, mutants, options.seed, options.keep) for name in options.targets or TARGETS}
    print("RESULT " + json.dumps({"seed": options.seed, "targets": result}))
    return int(any(outcome["wrong"] or outcome["traceback"] for outcome in result.values()))


if __name__ == "__main__":
    sys.exit(main())
