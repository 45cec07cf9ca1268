#!/usr/bin/env python3
"""Builds the embedded corpus: real English text that every machine with this project installed already has.

    python data/demo.py [--out data/demo] [--vocab-size 1024|2048] [--text FOLDER]

The text is the documentation inside the running Python: docstrings, the help topics of `pydoc_data`, strings
that attach documentation from outside (`add_docstr` and friends), comment blocks, and the long descriptions
of installed packages. Each document is passed through SentencePiece's own nmt_nfkc normalisation when the
corpus is built, which also turns every run of blanks and line ends into one space. Raw text and scored text
are therefore the same bytes: decode(tokens) gives each document back exactly, the per-token byte table counts
exactly the raw UTF-8 bytes, and a byte sidecar would add nothing. Both are checked for every document during
the build. --text writes them as documents for data/prepare.py, so that other tokenizers see the same text.

Documents are ordered by the sha256 of their text, so any prefix is a uniform sample and the same packages
give the same files on every machine. The first documents are held out for validation; training documents that
repeat much of a validation document are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import environment

environment.enter()
import ast
import collections
import contextlib
import fcntl
import gc
import hashlib
import inspect
import json
import lzma
import os
import platform
import re
import shutil
import signal
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from data.options import Parser
from data.shards import (
    BOS,
    HEADER_BYTES,
    read_json_object,
    read_shard,
    sha256_file,
    train_tokenizer,
    write_shard,
    write_text,
)

FORMAT = "parameter-golf-dataset/1"
# Raise it when a change of this file changes the bytes it makes, so that older builds become stale.
RECIPE = 2
MIN_CHARACTERS = 100
# Share of ASCII letters and spaces: keeps prose, drops tables, test data and commented-out code.
MIN_LETTERS = 0.7
VAL_BYTES = 400_000
EDGE = 200  # characters at either end of a document that must not be shared with a validation document
MIN_LINE = 20  # shorter lines ("Examples", "See also") say nothing about a shared origin
MAX_SHARED = 0.3  # share of a training document, or of a validation document, that may be lines of the other
TOKENIZER_BYTES = 8_000_000  # a prefix is a uniform sample; more text changes few merges and costs seconds
MAX_SENTENCE_BYTES = 4192
TRAIN_SHARDS = 8  # the shuffled loader deals whole shards to ranks, so eight ranks need eight
FREE_BYTES = 200_000_000
NOT_LETTERS = bytes(range(256)).translate(None, b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "testing",
    "idle_test",
    "benchmarks",
}
COMMENT = re.compile(r"[ \t]*#+!?[ \t]?(.*)")
OUR_FILES = re.compile(
    r"fineweb_(train|val)_\d{6}\.bin|tokenizer\.(model|vocab)|validation\.txt|manifest\.json"
)


class DemoError(Exception):
    """The corpus cannot be built; the message is one line with the remedy."""


class Source(NamedTuple):
    """One file that may hold documentation: its name inside its root, its place on disk and its size."""

    name: str
    path: Path
    size: int


class Corpus(NamedTuple):
    """Documents as normalised text, split; `held_back` counts training documents left out as near-copies."""

    validation: list[str]
    training: list[str]
    held_back: int


# === FINDING AND READING DOCUMENTATION ===


def default_roots() -> list[Path]:
    """The standard library and the package folders of the running interpreter, each once."""
    paths = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return list(dict.fromkeys(Path(path).resolve() for path in paths if path and Path(path).is_dir()))


def inventory(roots: Sequence[Path]) -> list[Source]:
    """All Python files and package descriptions under `roots`, sorted by name.

    Test folders are left out: a quarter of the time to parse, a twentieth of the text, and the poorest of it.
    So are package folders inside a root, which belong to another interpreter unless they are a root
    themselves.
    """
    sources = []
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            for name in files:
                path = Path(folder, name)
                if name.endswith(".py") or (name == "METADATA" and folder.endswith(".dist-info")):
                    with contextlib.suppress(OSError):  # a dangling link
                        sources.append(Source(path.relative_to(root).as_posix(), path, path.stat().st_size))
    return sorted(sources)


def signature(sources: Sequence[Source], vocab_size: int) -> str:
    """Hash of everything the dataset depends on: the recipe, the
    options, the tokenizer library, the source files.
    """
    listing = [
        [RECIPE, vocab_size, version("sentencepiece")],
        *([source.name, source.size] for source in sources),
    ]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Modules, classes, functions and every other statement;
    expressions are most of a tree and hold no docstring.
    """
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            children = getattr(node, field, ())
            if isinstance(children, list):
                stack.extend(children)


def _mentions_doc(node: ast.AST) -> bool:
    """True for a name such as `add_docstr`, `__doc__` or `obj._docs`."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return "doc" in name.lower()


def _documentation(tree: ast.Module, module_is_documentation: bool) -> Iterator[ast.Constant]:
    """String constants that document something: docstrings, and
    strings assigned or passed to a name with `doc`.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in _statements(tree):
        value = None
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr):
            value = node.body[0].value if isinstance(node.body[0].value, ast.Constant) else None
        elif isinstance(node, (ast.Expr, ast.Assign)):
            called = [node.value.func] if isinstance(node.value, ast.Call) else []
            names = node.targets + called if isinstance(node, ast.Assign) else called
            if module_is_documentation or any(map(_mentions_doc, names)):
                value = node.value
        if value is not None:
            yield from (
                leaf
                for leaf in ast.walk(value)
                if isinstance(leaf, ast.Constant)
                and isinstance(leaf.value, str)
                and len(leaf.value) >= MIN_CHARACTERS
            )


def _comment_blocks(source: str, taken: set[int]) -> Iterator[str]:
    """Runs of whole-line comments, without the lines `taken` by documentation strings that quote code."""
    block: list[str] = []
    for number, line in enumerate(source.splitlines(), 1):
        match = COMMENT.fullmatch(line) if "#" in line and number not in taken else None
        if match:
            block.append(match.group(1))
        elif block:
            yield "\n".join(block)
            block = []
    yield "\n".join(block)


def _raw_documents(source: Source) -> Iterator[str]:
    content = source.path.read_bytes()
    if source.path.name == "METADATA":
        yield content.decode("utf-8", "ignore").partition("\n\n")[2]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(content)
    taken: set[int] = set()
    for leaf in _documentation(tree, "doc" in "/".join(source.name.split("/")[-2:])):
        if leaf.lineno not in taken:
            yield inspect.cleandoc(leaf.value)
        taken.update(range(leaf.lineno, (leaf.end_lineno or leaf.lineno) + 1))
    yield from _comment_blocks(content.decode("utf-8", "ignore"), taken)


@lru_cache(maxsize=1)
def _normalizer():
    import sentencepiece

    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, remove_extra_whitespaces=True, escape_whitespaces=False
    )


def read_documents(source: Source) -> list[str]:
    """The prose documents of one file, each as normalised lines; a file that does not parse has none."""
    documents = []
    # A file that cannot be read or parsed (template, test of the parser, too deep) is no documentation.
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        for raw in _raw_documents(source):
            if len(raw) < MIN_CHARACTERS:
                continue
            clean = raw.encode("utf-8", "ignore").replace(b"\0", b" ").decode()
            lines = [line for line in _normalizer().Normalize(clean.split("\n")) if line]
            encoded = " ".join(lines).encode()
            letters = len(encoded.translate(None, NOT_LETTERS))
            if len(encoded) >= MIN_CHARACTERS and letters >= MIN_LETTERS * len(encoded):
                documents.append("\n".join(lines))
    return documents


# === CHOOSING DOCUMENTS ===


def _start_worker() -> None:
    # Syntax trees are many objects without cycles: collecting garbage while building them doubles the time.
    gc.disable()
    # Ctrl-C reaches the whole process group; a worker that dies of it
    # while holding the queue's lock hangs the rest.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collect(sources: Sequence[Source]) -> list[str]:
    """All documents of `sources` once each, in order of the sha256 of their text."""
    largest_first = sorted(sources, key=lambda source: -source.size)
    workers = min(environment.usable_cores(), 8) if len(sources) > 500 else 1
    if workers > 1:
        with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
            try:
                found = list(pool.map(read_documents, largest_first, chunksize=16))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    else:
        found = [read_documents(source) for source in largest_first]
    unique: dict[bytes, str] = {}
    for document in (document for documents in found for document in documents):
        key = hashlib.sha256(document.replace("\n", " ").encode()).digest()
        # The same text may be broken into lines differently.
        unique[key] = min(document, unique.get(key, document))
    return [unique[key] for key in sorted(unique)]


def split(documents: Sequence[str]) -> Corpus:
    """Hold out the first documents (400 KB, at most a twentieth) and leave their near-copies out of the rest.

    A near-copy shares its first or last 200 characters with a validation document, or has
    lines in common with the validation documents that make up 30 % of it, or of one of them.
    """
    budget = min(VAL_BYTES, sum(map(len, documents)) // 20)
    size = count = 0
    while size < budget:
        size += len(documents[count].encode())
        count += 1
    held_out, rest = documents[:count], documents[count:]
    edges = {edge for text in map(_flat, held_out) for edge in (text[:EDGE], text[-EDGE:])}
    owners: dict[str, set[int]] = collections.defaultdict(set)
    for number, document in enumerate(held_out):
        for line in _long_lines(document):
            owners[line].add(number)
    training = []
    for document in rest:
        text = _flat(document)
        if text[:EDGE] in edges or text[-EDGE:] in edges:
            continue
        common = [line for line in _long_lines(document) if line in owners]
        shared = collections.Counter()
        for line in common:
            shared.update(dict.fromkeys(owners[line], len(line)))
        if sum(map(len, common)) <= MAX_SHARED * len(text) and all(
            size <= MAX_SHARED * len(held_out[number]) for number, size in shared.items()
        ):
            training.append(text)
    return Corpus(list(map(_flat, held_out)), training, len(rest) - len(training))


def _flat(document: str) -> str:
    return document.replace("\n", " ")


def _long_lines(document: str) -> set[str]:
    return {line for line in document.split("\n") if len(line) >= MIN_LINE}


# === TOKENS AND FILES ===


def credited_bytes(tokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes that the per-token byte table of the trainer credits for `tokens`."""
    size = np.zeros(tokenizer.vocab_size(), dtype=np.int64)
    space = np.zeros(tokenizer.vocab_size(), dtype=bool)
    boundary = np.zeros(tokenizer.vocab_size(), dtype=bool)
    for index in range(tokenizer.vocab_size()):
        piece = tokenizer.id_to_piece(index)
        if tokenizer.is_control(index) or tokenizer.is_unknown(index) or tokenizer.is_unused(index):
            boundary[index] = True
        elif tokenizer.is_byte(index):
            size[index] = 1
        else:
            space[index] = piece.startswith("\u2581")
            size[index] = len(piece.removeprefix("\u2581").encode())
    return int(size[tokens].sum() + (space[tokens[1:]] & ~boundary[tokens[:-1]]).sum())


def tokenize(tokenizer, documents: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Tokens of `documents` with a BOS before each, and those that decode to themselves, which are kept."""
    pieces: list[np.ndarray] = []
    kept: list[str] = []
    for start in range(0, len(documents), 1000):
        batch = list(documents[start : start + 1000])
        encoded = tokenizer.encode(batch, num_threads=environment.usable_cores())
        for document, ids, decoded in zip(batch, encoded, tokenizer.decode(encoded), strict=True):
            if decoded == document:
                pieces.append(np.array([BOS, *ids], dtype="<u2"))
                kept.append(document)
    return (np.concatenate(pieces) if pieces else np.zeros(0, dtype="<u2")), kept


def problem(out: Path, expected: str) -> str | None:
    """Why the dataset in `out` cannot be used as it is, or None if it
    is complete, unchanged and of this signature.
    """
    path = out / "manifest.json"
    if not path.is_file():
        return "no complete dataset there"
    try:
        manifest = read_json_object(path)
        if manifest.pop("checksum") != manifest_checksum(manifest):
            return "damaged: manifest.json was changed"
        if manifest["source"]["signature"] != expected:
            return "stale: other packages, options or builder than when it was made"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "damaged: manifest.json is not readable"
    files = manifest["files"]
    present = {entry.name for entry in out.iterdir()} - {path.name}
    difference = sorted(present ^ set(files))
    if difference:
        return (
            f"damaged: {difference[0]} is {'not in the manifest' if difference[0] in present else 'missing'}"
        )
    for name, facts in files.items():
        if (out / name).stat().st_size != facts["size"] or sha256_file(out / name) != facts["sha256"]:
            return f"damaged: {name} differs from the manifest"
    return None


def manifest_checksum(manifest: dict) -> str:
    """sha256 of a manifest without its `checksum` entry."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _refuse_foreign(out: Path) -> None:
    """Stop before replacing a folder that this program did not make; only it writes validation.txt."""
    if not out.exists():
        return
    names = sorted(os.listdir(out)) if out.is_dir() else [""]
    foreign = [name for name in names if not OUR_FILES.fullmatch(name)]
    if foreign or (names and "validation.txt" not in names and not _says_demo(out / "manifest.json")):
        raise DemoError(
            f"{out} is no demo dataset and would be replaced ({(foreign or names)[0] or 'a file'}); "
            "choose another folder with --out, or delete it"
        )


def _says_demo(manifest: Path) -> bool:
    try:
        return read_json_object(manifest).get("name") == "demo"
    except (OSError, ValueError):
        return False


def _write_dataset(
    folder: Path, corpus: Corpus, sources: int, vocab_size: int, source_signature: str
) -> None:
    """Write every file of the dataset into `folder`, the manifest last."""
    import sentencepiece

    def stage(text: str) -> None:
        nonlocal started
        print(f"demo: {text} ({time.monotonic() - started:.1f} s)", flush=True)
        started = time.monotonic()

    started = time.monotonic()
    # SentencePiece skips longer sentences, with three lines of warning.
    sentences = (document for document in corpus.training if len(document.encode()) <= MAX_SENTENCE_BYTES)
    model = train_tokenizer(_prefix(sentences, TOKENIZER_BYTES), folder / "tokenizer", vocab_size)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    stage(f"tokenizer of {tokenizer.vocab_size():,} pieces trained on the training part")

    validation, val_counts = _write_split(folder, "val", tokenizer, corpus.validation)
    text = ("\n".join(validation) + "\n").encode()
    (folder / "validation.txt").write_bytes(text)
    compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    _, train_counts = _write_split(folder, "train", tokenizer, corpus.training)
    counts = val_counts | train_counts
    stage(f"{counts['train_tokens']:,} training and {counts['val_tokens']:,} validation tokens")

    files = {}
    for path in sorted(folder.iterdir()):
        facts = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        tokens = {"tokens": (facts["size"] - HEADER_BYTES) // 2} if path.suffix == ".bin" else {}
        files[path.name] = tokens | facts
    manifest = {
        "format": FORMAT,
        "name": "demo",
        "transform": "none",
        "lossless": True,
        "note": "documents were normalised with nmt_nfkc first, so decode(tokens) is the raw text",
        "tokenizer": {
            "file": model.name,
            "sha256": files[model.name]["sha256"],
            "vocab_size": tokenizer.vocab_size(),
        },
        # Bits per byte of a general compressor on the same text, for the log of a training run.
        **counts,
        "references": {"xz -9e": 8 * len(compressed) / len(text)},
        "files": files,
        "source": {
            "text": "documentation of the installed Python packages",
            "signature": source_signature,
            "files": sources,
            "near_copies_of_validation_left_out": corpus.held_back,
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("numpy", "sentencepiece")},
    }
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_split(
    folder: Path, part: str, tokenizer, documents: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """Write the shards of `part` (val or train); the documents that are kept, and the manifest's counts."""
    tokens, kept = tokenize(tokenizer, documents)
    raw = sum(len(document.encode()) for document in kept)
    credited = credited_bytes(tokenizer, tokens)
    if credited != raw:
        raise DemoError(
            f"the byte table credits {credited:,} bytes for {raw:,} bytes of {part} text; "
            "install the pinned sentencepiece of requirements.txt"
        )
    shards = TRAIN_SHARDS if part == "train" else 1
    for number, values in enumerate(np.array_split(tokens, shards)):
        write_shard(folder / f"fineweb_{part}_{number:06d}.bin", values)
    return kept, {
        f"docs_{part}": len(kept),
        f"{part}_tokens": len(tokens),
        f"{part}_bytes": raw,
        f"{part}_lut_bytes": credited,
        f"{part}_not_exact": len(documents) - len(kept),
    }


def _prefix(documents: Iterable[str], size: int) -> Iterator[str]:
    for document in documents:
        if size <= 0:
            return
        size -= len(document)
        yield document


def export_text(dataset: Path, folder: Path) -> None:
    """Write training.jsonl and validation.jsonl into `folder`: the documents of a finished demo `dataset`."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(dataset / "tokenizer.model"))
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in (("train", "training.jsonl"), ("val", "validation.jsonl")):
        shards = [read_shard(path) for path in sorted(dataset.glob(f"fineweb_{part}_*.bin"))]
        tokens = np.concatenate(shards)  # documents straddle shards
        documents = np.split(tokens, np.flatnonzero(tokens == BOS))[1:]
        texts = tokenizer.decode([document[1:].tolist() for document in documents])
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        write_text(folder / name, "".join(lines))


@contextlib.contextmanager
def _only_builder_in(folder: Path) -> Iterator[None]:
    """Wait for other builds in `folder`; the lock goes with its
    process, so a killed build leaves none behind.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            environment.lock_file(handle)  # where there are no locks, two builds cost time but do no harm
        except BlockingIOError:
            print("demo: waiting for another build to finish", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def build(out: Path, vocab_size: int = 1024, roots: Sequence[Path] | None = None) -> Path:
    """Make the demo dataset in the folder `out`, or reuse it if it is
    complete, unchanged and current; returns `out`.

    A stale or damaged dataset is replaced as a whole, after the new one is
    complete; a folder that holds anything else is refused with DemoError.
    """
    started = time.monotonic()
    out = Path(out).resolve()
    _refuse_foreign(out)
    sources = inventory(default_roots() if roots is None else roots)
    current = signature(sources, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder_in(out.parent):
        reason = problem(out, current)
        if reason is None:
            print(f"demo: {out} reused, all checksums right ({time.monotonic() - started:.1f} s)", flush=True)
            return out
        # Fails in the first second, not after the parsing, when nothing can be written here.
        building = out.with_name(f".{out.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            free = shutil.disk_usage(building).free
            if free < FREE_BYTES:
                raise DemoError(
                    f"{free:,} bytes free for {out}, {FREE_BYTES:,} needed; free some or choose --out"
                )
            print(f"demo: building {out} ({reason})", flush=True)
            documents = collect(sources)
            corpus = split(documents)
            if not corpus.training or not corpus.validation:
                raise DemoError(
                    "found no documentation in the installed packages; install requirements.txt first"
                )
            print(
                f"demo: {len(documents):,} documents, {sum(map(len, documents)) / 1e6:.1f} MB, from "
                f"{len(sources):,} files ({time.monotonic() - started:.1f} s)",
                flush=True,
            )
            _write_dataset(building, corpus, len(sources), vocab_size, current)
            shutil.rmtree(out, ignore_errors=True)
            building.replace(out)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    print(f"demo: {out} ready ({time.monotonic() - started:.1f} s in all)", flush=True)
    return out


def main() -> int:
    """Command line: 0 if the dataset is there, 2 after a one-line error, 130 if interrupted."""
    parser = Parser(description="Build the embedded corpus from the installed Python packages.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent / "demo", help="folder to make"
    )
    parser.add_argument(
        "--vocab-size", type=int, choices=(1024, 2048), default=1024, help="tokenizer vocabulary"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FOLDER", help="write its documents as JSON lines as well"
    )
    arguments = parser.parse_args()
    try:
        dataset = build(arguments.out, arguments.vocab_size)
        if arguments.text is not None:
            export_text(dataset, arguments.text)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: cannot write {error.filename or arguments.out}: {error.strerror or error}; "
            "choose a writable folder with --out or --text",
            file=sys.stderr,
        )
        return 2
    except BrokenProcessPool:
        print(
            "error: a worker was killed, probably for want of memory; free some and run this again",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("error: interrupted, nothing was changed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
