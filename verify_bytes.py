#!/usr/bin/env python3
"""Prove a dataset: shards, manifest, tokens, bytes of every document,
and no validation text among the training data.

    python verify_bytes.py data/datasets/mine
# what the dataset alone can prove
    python verify_bytes.py data/datasets/mine --documents
corpus.jsonl.zst   # everything, against the raw documents

Exit code 0: all that could be checked is right (what could not is listed); 1:
refuted, with the first counter-example; 2: the command cannot be carried out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment

environment.enter()
import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np

from data.card import CARD, FORMAT, MANIFEST, PROOF, write_proof
from data.documents import (
    OPENING_TOKENS,
    Batch,
    DataError,
    Position,
    SourceFile,
    batches,
    expand,
    stored_size,
    survey,
    text_hash,
    texts_of,
    token_hash,
)
from data.fast_tokenizer import FastTokenizer
from data.options import Parser, number_option
from data.prepare import JOURNAL, SIDECAR, TOKENIZER, TRAIN, VAL, Progress
from data.shards import BOS, UNFINISHED, ShardError, checksum, read_json_object, read_shard, sha256_file
from data.sidecar import (
    MOST_CASE_LOST,
    VERSIONS,
    CountError,
    encode_with_bytes,
    table_bytes,
    table_problem,
)
from data.workers import run_in_order
from lossless_caps import TRANSFORMS, decode_caseops, encode_all

ESCAPE = "\ue004"
BLOCK = 1 << 20
MOST_WORKERS = 1024
CHUNK_TOKENS = 1 << 20
# More places than this share a passage only if it is a repetition in itself (a line of dashes).
MOST_PLACES = 1000
# What the facts of a file in a manifest must look like, and its counts.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")
COUNTS = ("docs_val", "docs_train", "val_tokens", "train_tokens", "val_bytes", "train_bytes", "val_lut_bytes")
COUNTS += ("val_sidecar_bytes", "val_uncounted_bytes")


@dataclass(frozen=True)
class Canonical:
    """Published constants of a validation set: documents, tokens
    (with BOS), bytes credited; pairs are ranges.
    """

    transform: str
    documents: int
    tokens: tuple[int, int]
    credited: tuple[int, int]


# Of CaseOps v1 it is not known whether 47,853,343 tokens are all or
# all scored ones, nor the bytes to the last one.
CANONICAL = {
    "sp8192": Canonical("none", 50_000, (40_540_803, 40_540_803), (151_080_000, 151_081_500)),
    "caseops_v1": Canonical("caseops_v1", 50_000, (47_853_343, 47_853_344), (151_080_000, 151_081_500)),
}
FOLDERS = {"fineweb10B_sp8192": "sp8192", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved": "caseops_v1"}


class Refuted(Exception):
    """A counter-example: the message says what is wrong and where."""


# === WHAT THE WORKERS DO ===


@dataclass(frozen=True)
class Scan:
    """A shard to look through, and the tokens that follow it in the next one (a passage may straddle)."""

    path: Path
    following: np.ndarray
    sha256: str | None
    validation: bool


@dataclass
class Scanned:
    """What is in one shard: counts, the documents that lie wholly inside, and the fragments at both ends."""

    tokens: int
    documents: int
    largest: int
    problem: str
    hashes: list[bytes]
    openings: list[bytes]
    head: np.ndarray  # tokens before the first BOS
    tail: np.ndarray  # tokens from the last BOS on
    matches: list[tuple[int, int]]  # (passage, position of its first token in the shard)


@dataclass
class Passages:
    """Runs of OPENING_TOKENS tokens of validation documents, and a
    filter that tells most other text apart fast.
    """

    tokens: np.ndarray  # (P, OPENING_TOKENS) uint16, the opening and the middle of each document
    hashes: np.ndarray  # (P,) uint64, sorted
    order: np.ndarray  # (P,) passage of each sorted hash

    FILTER_BITS = 23

    @classmethod
    def of(cls, tokens: np.ndarray) -> Passages:
        """Passages for an array of token runs."""
        hashes = window_hashes(tokens.ravel())[::OPENING_TOKENS] if len(tokens) else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        return cls(tokens, hashes[order], order)

    def find(self, tokens: np.ndarray) -> list[tuple[int, int]]:
        """(passage, position) wherever one occurs in `tokens`,
        compared token by token, MOST_PLACES of each at most.
        """
        shift = np.uint64(64 - self.FILTER_BITS)
        present = np.zeros(1 << self.FILTER_BITS, dtype=bool)
        present[(self.hashes >> shift).astype(np.int64)] = True
        found: list[tuple[int, int]] = []
        places = np.zeros(len(self.tokens), dtype=np.int64)
        for start in range(0, max(0, len(tokens) - OPENING_TOKENS + 1), BLOCK):
            part = np.array(tokens[start : start + BLOCK + OPENING_TOKENS - 1])
            hashes = window_hashes(part)
            candidates = np.flatnonzero(present[(hashes >> shift).astype(np.int64)])
            first = np.searchsorted(self.hashes, hashes[candidates], side="left")
            last = np.searchsorted(self.hashes, hashes[candidates], side="right")
            real = np.flatnonzero(first < last)
            for position, low, high in zip(
                candidates[real].tolist(), first[real].tolist(), last[real].tolist(), strict=True
            ):
                window = part[position : position + OPENING_TOKENS]
                for passage in self.order[low:high].tolist():
                    if places[passage] < MOST_PLACES and np.array_equal(window, self.tokens[passage]):
                        places[passage] += 1
                        found.append((passage, start + position))
        return found


@lru_cache(maxsize=1)
def _token_codes() -> np.ndarray:
    return np.random.default_rng(1017).integers(0, 1 << 64, 1 << 16, dtype=np.uint64)


def window_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of OPENING_TOKENS tokens (uint64, one
    for each place where a whole run starts).
    """
    hashes = _token_codes()[tokens]
    width, factor = 1, 0x9E3779B97F4A7C15
    while width < OPENING_TOKENS:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        factor = factor * factor % (1 << 64)
        width *= 2
    return hashes


@dataclass
class ScanJob:
    """Looks through one shard; for training shards also for passages of the validation documents."""

    vocab_size: int
    passages: Passages | None = None

    def __call__(self, scan: Scan) -> Scanned:
        problem = ""
        if scan.sha256 is not None and sha256_file(scan.path) != scan.sha256:
            problem = f"{scan.path.name}: sha256 differs from the manifest"
        values = np.asarray(read_shard(scan.path))
        starts = np.flatnonzero(values == BOS)
        hashes, openings = [], []
        for begin, end in zip((starts[:-1] + 1).tolist(), starts[1:].tolist(), strict=True):
            hashes.append(token_hash(values[begin:end]))
            openings.append(
                token_hash(values[begin : begin + OPENING_TOKENS]) if end - begin >= OPENING_TOKENS else b""
            )
        largest = int(values.max()) if len(values) else 0
        if largest >= self.vocab_size and not problem:
            place = int(np.argmax(values >= self.vocab_size))
            problem = (
                f"{scan.path.name}: token {place} is {int(values[place])}, but the tokenizer has "
                f"{self.vocab_size} entries"
            )
        matches = (
            self.passages.find(np.concatenate([values, scan.following])) if self.passages is not None else []
        )
        head = np.array(values[: starts[0]] if len(starts) else values)
        tail = np.array(values[starts[-1] :] if len(starts) else values[:0])
        return Scanned(len(values), len(starts), largest, problem, hashes, openings, head, tail, matches)


@dataclass(frozen=True)
class Decoded:
    """Per document of a chunk: hashes of the decoded text and of its
    inverse transform, and the sidecar's bytes.
    """

    texts: list[bytes]
    inverses: list[bytes]
    credited: list[int]
    lengths: list[int]


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> FastTokenizer:
    return FastTokenizer(Path(path))


@dataclass
class DecodeJob:
    """Decodes whole documents: (tokens from a BOS to before the next document, sidecar or None)."""

    tokenizer: str
    transform: str

    def __call__(self, chunk: tuple[np.ndarray, np.ndarray | None]) -> Decoded:
        tokens, sidecar = chunk
        processor, decode = _tokenizer(self.tokenizer).processor, TRANSFORMS[self.transform][1]
        if self.transform in VERSIONS:
            decode = partial(decode_caseops, version=VERSIONS[self.transform], normalised=True)
        starts = np.flatnonzero(tokens == BOS)
        documents = np.split(tokens, starts[1:])
        texts = processor.decode([document[1:].tolist() for document in documents])
        inverses = []
        for text in texts:
            try:
                inverses.append(text_hash(decode(text)) if decode is not None else b"")
            except ValueError:
                inverses.append(b"")
        credited = np.add.reduceat(sidecar.astype(np.int64), starts).tolist() if sidecar is not None else []
        lengths = [len(text.encode(errors="replace")) for text in texts]
        return Decoded([text_hash(text) for text in texts], inverses, credited, lengths)


@dataclass(frozen=True)
class Source:
    """What one raw document must look like in the dataset; `known` says that training leaves it out."""

    raw: bytes
    normalised: bytes
    code: bytes
    length: int
    credited: int
    known: bool
    excerpt: str


@dataclass
class SourceJob:
    """Works out from raw documents what the dataset must hold, with SentencePiece's own normaliser."""

    tokenizer: str
    transform: str
    key: str
    sidecar: bool
    texts: set[bytes] = field(default_factory=set)
    tokens: set[bytes] = field(default_factory=set)
    openings: set[bytes] = field(default_factory=set)

    def __call__(self, batch: Batch) -> list[Source]:
        tokenizer = _tokenizer(self.tokenizer)
        processor = tokenizer.processor
        texts = texts_of(batch, self.key)
        codes = encode_all(self.transform, texts)
        lengths = np.zeros(len(texts), np.int64)
        ids = np.zeros(0, np.uint16)
        if self.openings or self.tokens:
            ids, lengths = tokenizer.encode_batch(codes)
        ends = np.cumsum(lengths)
        sources = []
        for index, (text, code) in enumerate(zip(texts, codes, strict=True)):
            own = ids[ends[index] - lengths[index] : ends[index]]
            raw = text_hash(text)
            known = (
                raw in self.texts
                or (len(ids) and token_hash(own) in self.tokens)
                or (len(own) >= OPENING_TOKENS and token_hash(own[:OPENING_TOKENS]) in self.openings)
            )
            length = len(text.encode())
            credited = length - self._dropped(processor, text, batch) if self.sidecar else 0
            sources.append(
                Source(
                    raw,
                    text_hash(_plain(processor, text)),
                    text_hash(_plain(processor, code)),
                    length,
                    credited,
                    bool(known),
                    text[:60],
                )
            )
        return sources

    def _dropped(self, processor, text: str, batch: Batch) -> int:
        try:
            return encode_with_bytes(processor, self.transform, text)[2]
        except (OverflowError, CountError) as error:
            raise DataError(f"{batch.path}: after record {batch.start.record}: {error}") from None


def _plain(processor, text: str) -> str:
    return processor.normalize(text).replace("\u2581", " ")


# === THE PROOF ===


def manifest_problem(manifest: dict) -> str:
    """What is wrong with the form of a manifest, so that nothing in
    it can be relied on; empty if it is right.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "files is no object"
    for name, facts in files.items():
        if not FILE_NAME.fullmatch(name) or not isinstance(facts, dict):
            return f"files has an entry {name[:60]!r} that describes no file of the folder"
        counts = ("size", "tokens") if name.endswith(".bin") else ("size",)
        wrong = [key for key in counts if not is_count(facts.get(key))]
        if wrong or not SHA256.fullmatch(str(facts.get("sha256"))):
            return f"files: {name} has a wrong {(wrong or ['sha256'])[0]}"
    for key in COUNTS:
        without = key == "val_sidecar_bytes" and manifest.get(key) is None
        if key in manifest and not without and not is_count(manifest[key]):
            return f"{key} is {str(manifest[key])[:40]!r}, not a count"
    for key in ("tokenizer", "recipe"):
        if not isinstance(manifest.get(key, {}), dict):
            return f"{key} is no object"
    if not isinstance(manifest.get("recipe", {}).get("validation", {}), dict):
        return "recipe: validation is no object"
    left_out = manifest.get("left_out", {})
    if not isinstance(left_out, dict) or not all(map(is_count, left_out.values())):
        return "left_out does not hold counts"
    if not isinstance(manifest.get("transform", ""), str) or not isinstance(manifest.get("name", ""), str):
        return "name or transform is no text"
    return sources_problem(manifest.get("recipe", {}).get("sources", []))


def sources_problem(sources: object) -> str:
    """What is wrong with the form of a manifest's list of source files; empty if it is right."""
    if not isinstance(sources, list) or not all(isinstance(facts, dict) for facts in sources):
        return "recipe: sources is no list of files"
    for number, facts in enumerate(sources):
        if not is_count(facts.get("size")) or not SHA256.fullmatch(str(facts.get("sha256"))):
            return f"recipe: source {number} has a wrong size or sha256"
        if facts.get("role") not in ("documents", "validation") or not isinstance(facts.get("name"), str):
            return f"recipe: source {number} has a wrong role or name"
        if not is_count(facts.get("records", 0)):
            return f"recipe: source {number} has a wrong number of records"
    return ""


def is_count(value: object) -> bool:
    """Whether a value of a JSON file is a whole number from 0 on that fits 63 bits."""
    return type(value) is int and 0 <= value < 1 << 63


class Proof:
    """All checks of one dataset folder; `report` is filled as they go and is printable at any moment."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        self.report: dict = {
            "dataset": folder.name,
            "verdict": "refuted",
            "first_counterexample": None,
            "proved": [],
            "not_proved": [],
            "counts": {},
        }
        patterns = {"train": TRAIN, "val": VAL, "sidecar": SIDECAR}
        self.files = {
            kind: sorted(folder.glob(pattern.replace("%06d", "[0-9]" * 6)))
            for kind, pattern in patterns.items()
        }

    def proved(self, text: str) -> None:
        """Note a fact that was checked."""
        self.report["proved"].append(text)

    def not_proved(self, text: str) -> None:
        """Note what could not be checked, and why."""
        self.report["not_proved"].append(text)

    def run(self) -> None:
        """All checks in order; Refuted or ShardError at the first that fails."""
        self._names()
        self._manifest()
        self._shards()
        self._tokenizer()
        self._scan_validation()
        self._sidecar()
        self._scan_training()
        self._canonical()
        self._documents()
        self.report["verdict"] = "proved"

    def _names(self) -> None:
        shards = {path for files in self.files.values() for path in files}
        for path in sorted(self.folder.glob("fineweb_*.bin")):
            if path not in shards:
                raise Refuted(
                    f"{path.name}: not a shard's name (fineweb_train_, _val_ or _val_bytes_ and six digits), "
                    "but other readers may take it for one"
                )

    def _manifest(self) -> None:
        path = self.folder / MANIFEST
        self.manifest: dict = {}
        if not path.exists():
            for name in (JOURNAL, UNFINISHED):
                if (self.folder / name).exists():
                    raise Refuted(f"{name}: the dataset is not finished; give its command again")
            self.not_proved("hashes, counts and origin of the files: there is no manifest.json")
            return
        try:
            manifest = read_json_object(path)
        except (OSError, ValueError) as error:
            raise Refuted(f"manifest.json: cannot be read ({error})") from None
        if manifest.get("format") != FORMAT:
            self.not_proved(
                "hashes and counts: manifest.json is of another format, so nothing in it is relied on"
            )
            return
        if manifest.get("checksum") != checksum(manifest):
            raise Refuted("manifest.json: was changed after it was written (its checksum does not match)")
        problem = manifest_problem(manifest)
        if problem:
            raise Refuted(f"manifest.json: {problem}")
        self._compare_files(manifest["files"])
        self.manifest = manifest
        self.report["manifest_sha256"] = sha256_file(path)

    def _compare_files(self, listed: dict[str, dict]) -> None:
        for name, facts in listed.items():
            file = self.folder / name
            if not file.is_file():
                raise Refuted(f"{name}: in the manifest, but missing")
            if file.stat().st_size != facts["size"]:
                raise Refuted(f"{name}: {file.stat().st_size} bytes, the manifest says {facts['size']}")
        for paths in self.files.values():
            for file in paths:
                if file.name not in listed:
                    raise Refuted(f"{file.name}: not in the manifest")
        for name in listed:
            # Token shards are hashed where they are looked through.
            tokens = name.endswith(".bin") and "bytes" not in name
            if not tokens and sha256_file(self.folder / name) != listed[name]["sha256"]:
                raise Refuted(f"{name}: sha256 differs from the manifest")

    def _shards(self) -> None:
        self.values = {}
        for kind, paths in self.files.items():
            numbers = [int(path.stem[-6:]) for path in paths]
            if numbers != list(range(len(numbers))):
                missing = next(number for number in range(len(numbers)) if number != numbers[number])
                raise Refuted(f"{kind} shards: number {missing} is missing, but {paths[-1].name} is there")
            self.values[kind] = [read_shard(path) for path in paths]
            for path, values in zip(paths, self.values[kind], strict=True):
                facts = self.manifest.get("files", {}).get(path.name)
                if facts is not None and facts["tokens"] != len(values):
                    raise Refuted(f"{path.name}: {len(values)} values, the manifest says {facts['tokens']}")
        if not self.files["val"]:
            raise Refuted("there is no validation shard")
        self.counts = {kind: sum(map(len, values)) for kind, values in self.values.items()}
        self.proved(f"headers and sizes of {sum(map(len, self.files.values()))} shard files")

    def _tokenizer(self) -> None:
        path = self.options.tokenizer or self.folder / TOKENIZER
        if not path.is_file():
            raise DataError(f"{path}: no such file; give --tokenizer, the dataset's SentencePiece model")
        try:
            self.tokenizer = FastTokenizer(path)
        except ValueError as error:
            raise DataError(str(error)) from None
        self.tokenizer_path, self.processor = path, self.tokenizer.processor
        expected = self.manifest.get("tokenizer", {}).get("sha256")
        if expected is not None and sha256_file(path) != expected:
            raise Refuted(f"{path.name}: sha256 differs from the tokenizer of the manifest")
        entries = self.manifest.get("tokenizer", {}).get("vocab_size", self.processor.vocab_size())
        if entries != self.processor.vocab_size():
            raise Refuted(f"{path.name}: {self.processor.vocab_size()} entries, the manifest says {entries}")
        if self.manifest.get("bos", BOS) != BOS:
            raise Refuted(
                f"manifest.json: bos is {str(self.manifest['bos'])[:40]}, but shards begin with {BOS}"
            )
        problem = table_problem(self.processor)
        if problem:
            raise Refuted(f"{path.name}: {problem}: no score would be right")
        symbols = {
            self.processor.id_to_piece(token): token
            for token in range(4, min(64, self.processor.vocab_size()))
        }
        self.operators = {
            symbols[operator] for operator in TRANSFORMS["caseops_v3"][2] if operator in symbols
        }
        self.escape = symbols.get(ESCAPE, -1)
        claimed = self.options.transform or self.manifest.get("transform")
        if claimed is None:
            claimed = "caseops_v3" if len(self.operators) == 5 else "caseops_v1" if self.operators else "none"
            self.not_proved(f"the transform: nothing names it; the tokenizer's symbols suggest {claimed}")
        if claimed not in TRANSFORMS:
            raise Refuted(f"manifest.json: unknown transform {claimed!r}")
        self.transform = claimed
        if self.operators and not self.files["sidecar"]:
            raise Refuted(
                "the tokenizer has operators worth no bytes, but there is no byte sidecar: "
                "no score would be right"
            )

    def _scans(self, kind: str) -> Iterator[Scan]:
        for index, path in enumerate(self.files[kind]):
            after = (
                self.values[kind][index + 1] if index + 1 < len(self.files[kind]) else np.zeros(0, np.uint16)
            )
            facts = self.manifest.get("files", {}).get(path.name)
            yield Scan(path, np.array(after[: OPENING_TOKENS - 1]), facts and facts["sha256"], kind == "val")

    def _joined(self, kind: str, job: ScanJob) -> Iterator[tuple[Scanned, int]]:
        """Each shard's findings and its first token's position; a
        document that straddles is the shard's it ends in.
        """
        tail, first = np.zeros(0, np.uint16), 0
        for _, found in run_in_order(job, self._scans(kind), self.options.workers):
            if found.problem:
                raise Refuted(found.problem)
            if found.documents == 0:
                tail = np.concatenate([tail, found.head]) if len(tail) else tail
            else:
                if len(tail):
                    self._add_document(found, np.concatenate([tail, found.head])[1:])
                tail = found.tail
            yield found, first
            first += found.tokens
        if len(tail) and tail[0] == BOS:
            last = Scanned(0, 0, 0, "", [], [], tail[:0], tail[:0], [])
            self._add_document(last, tail[1:])
            yield last, first

    def _add_document(self, found: Scanned, tokens: np.ndarray) -> None:
        found.hashes.append(token_hash(tokens))
        found.openings.append(token_hash(tokens[:OPENING_TOKENS]) if len(tokens) >= OPENING_TOKENS else b"")

    def _count_documents(self, kind: str, documents: int) -> None:
        claimed = self.manifest.get(f"docs_{kind}")
        self.report["counts"] |= {f"docs_{kind}": documents, f"{kind}_tokens": self.counts[kind]}
        if claimed is not None and claimed != documents:
            raise Refuted(f"{kind} shards: {documents} documents (BOS), the manifest says {claimed}")
        if (tokens := self.manifest.get(f"{kind}_tokens")) is not None and tokens != self.counts[kind]:
            raise Refuted(f"{kind} shards: {self.counts[kind]} tokens, the manifest says {tokens}")
        if self.counts[kind] and documents and int(self.values[kind][0][0]) != BOS:
            raise Refuted(f"{kind} shards: the first token is {int(self.values[kind][0][0])}, not BOS")

    def _scan_validation(self) -> None:
        documents, hashes, openings = 0, [], []
        for found, _ in self._joined("val", ScanJob(self.processor.vocab_size())):
            documents += found.documents
            hashes += found.hashes
            openings += found.openings
        self.val_hashes, self.val_openings = set(hashes), set(openings) - {b""}
        self._count_documents("val", documents)
        self.val_documents = documents
        if documents:
            self.proved(
                f"{documents:,} validation documents in {self.counts['val']:,} tokens, all ids below "
                f"{self.processor.vocab_size()}"
            )
        else:
            self.not_proved(
                "the documents of the validation set: its shards have no BOS, so nothing separates them"
            )
        credited, before = 0, BOS
        for values in self.values["val"]:
            for start in range(0, len(values), 4 * BLOCK):
                tokens = np.array(values[start : start + 4 * BLOCK])
                credited += table_bytes(self.processor, tokens, before)
                before = int(tokens[-1])
        self.report["counts"]["val_lut_bytes"] = self.table_credit = credited
        if (claimed := self.manifest.get("val_lut_bytes")) is not None and claimed != credited:
            raise Refuted(
                f"byte tables credit {credited} bytes to the validation set, the manifest says {claimed}"
            )

    def _sidecar(self) -> None:
        true = self.manifest.get("val_bytes")
        if not self.files["sidecar"]:
            if self.manifest.get("val_sidecar"):
                raise Refuted("the manifest promises a byte sidecar, but there is none")
            self._compare_decoded()
            if true is not None:
                self._compare_tables(true)
            self.credited = self.table_credit
            return
        lengths = [[len(values) for values in self.values[kind]] for kind in ("val", "sidecar")]
        if lengths[0] != lengths[1]:
            raise Refuted(
                f"the sidecar's shards have {lengths[1]} values, the validation shards {lengths[0]} tokens"
            )
        self.report["counts"]["val_sidecar_bytes"] = self.credited = total = self._sum_sidecar()
        claimed = self.manifest.get("val_sidecar_bytes")
        if claimed is not None and claimed != total:
            raise Refuted(f"sidecar: sums to {total} bytes, the manifest says {claimed}")
        if true is None:
            self.not_proved(
                "the sum of the sidecar: only the raw documents say what it must be (--documents)"
            )
            return
        uncounted = self.manifest.get("val_uncounted_bytes", 0)
        if total != true - uncounted:
            excess = 100 * (total / max(1, true - uncounted) - 1)
            raise Refuted(
                f"sidecar: sums to {total} bytes, but the raw documents have {true}, of which "
                f"{uncounted} are dropped at the ends of documents ({excess:+.2f} %)"
            )
        self.proved(
            f"the sidecar sums to the {true:,} raw bytes of the manifest"
            + (f" less {uncounted:,} spaces dropped at the ends of documents" if uncounted else "")
        )

    def _sum_sidecar(self) -> int:
        """The bytes of the sidecar; Refuted if it gives some to a token that is worth none."""
        total, escaped, position = 0, False, 0
        operators = np.zeros(self.processor.vocab_size(), bool)
        operators[list(self.operators)] = True
        controls = np.array([self.processor.is_control(token) for token in range(len(operators))])
        for tokens_all, values_all in zip(self.values["val"], self.values["sidecar"], strict=True):
            for start in range(0, len(tokens_all), 4 * BLOCK):
                tokens = np.array(tokens_all[start : start + 4 * BLOCK])
                values = np.array(values_all[start : start + 4 * BLOCK])
                total += int(values.sum(dtype=np.int64))
                wrong = np.flatnonzero(controls[tokens] & (values != 0))
                if len(wrong):
                    raise Refuted(
                        f"sidecar: token {position + wrong[0]} is {self._piece(tokens[wrong[0]])} and worth "
                        f"no bytes, the sidecar says {values[wrong[0]]}"
                    )
                # Whether an operator is escaped depends on the operators before it; runs are short and few.
                for index in np.flatnonzero(operators[tokens]).tolist():
                    literal = escaped if index == 0 else self._literal(tokens, index, escaped)
                    worth = 3 if literal else 0
                    if values[index] != worth:
                        raise Refuted(
                            f"sidecar: token {position + index} is operator {self._piece(tokens[index])}, "
                            f"worth {worth} bytes of the raw text, the sidecar says {values[index]}"
                        )
                escaped = bool(
                    tokens[-1] == self.escape and not self._literal(tokens, len(tokens) - 1, escaped)
                )
                position += len(tokens)
        return total

    def _compare_decoded(self) -> None:
        """The byte tables against the bytes of the text that the validation tokens decode to."""
        if not self.val_documents:
            return
        unknown = self.processor.unk_id()
        if any((values == unknown).any() for values in self.values["val"]):
            self.not_proved("that the byte tables count the decoded text: it has unknown tokens")
            return
        decoded = sum(lengths for *_, lengths in self._decoded("val"))
        self.report["counts"]["val_decoded_bytes"] = decoded
        if decoded != self.table_credit:
            raise Refuted(
                f"byte tables credit {self.table_credit} bytes to the validation set, but its tokens decode "
                f"to {decoded}: no score would be right"
            )
        self.proved(f"the byte tables credit the {decoded:,} bytes that the validation tokens decode to")

    def _compare_tables(self, true: int) -> None:
        difference = self.table_credit - true
        self.report["counts"]["val_lut_difference"] = difference
        if abs(difference) > 0.01 * true:
            raise Refuted(
                f"without a sidecar the byte tables are the count, and they credit {self.table_credit} bytes "
                f"for {true} ({100 * difference / true:+.2f} %)"
            )
        if difference:
            self.not_proved(
                f"an exact byte count: there is no sidecar and the byte tables credit {difference:+,} "
                f"bytes ({100 * difference / true:+.4f} %), because SentencePiece normalises text"
            )
        else:
            self.proved("the byte tables credit exactly the raw bytes")

    def _piece(self, token: int) -> str:
        piece = self.processor.id_to_piece(int(token))
        return piece if piece.isascii() else f"U+{ord(piece[0]):04X}"

    def _literal(self, tokens: np.ndarray, index: int, escaped_before: bool) -> bool:
        """Whether the token at `index` is escaped, which an odd number of escapes before it means."""
        run = index
        while run > 0 and tokens[run - 1] == self.escape:
            run -= 1
        return bool((index - run) % 2) ^ (run == 0 and escaped_before)

    def _passages(self) -> tuple[Passages, np.ndarray]:
        """Opening and middle of every validation document that is
        long enough; (P/2,) distance between the two.
        """
        flat = np.concatenate([np.asarray(values) for values in self.values["val"]])
        starts = np.flatnonzero(flat == BOS)
        ends = np.append(starts[1:], len(flat))
        long = ends - starts - 1 >= OPENING_TOKENS
        begins, middles = starts[long] + 1, (starts[long] + 1 + ends[long] - OPENING_TOKENS) // 2
        windows = np.lib.stride_tricks.sliding_window_view(flat, OPENING_TOKENS)
        self.passage_documents = np.flatnonzero(long)
        return Passages.of(np.concatenate([windows[begins], windows[middles]])), middles - begins

    def _scan_training(self) -> None:
        if not self.files["train"]:
            self.not_proved("anything about training data: there are no training shards")
            return
        passages, distances = self._passages()
        documents, equal, same_opening, example = 0, 0, 0, ""
        openings, middles = {}, {}
        for found, first in self._joined("train", ScanJob(self.processor.vocab_size(), passages)):
            for number, (whole, opening) in enumerate(zip(found.hashes, found.openings, strict=True)):
                if whole in self.val_hashes or opening in self.val_openings:
                    equal += whole in self.val_hashes
                    same_opening += whole not in self.val_hashes
                    how = "is" if whole in self.val_hashes else "starts like"
                    example = example or (
                        f"training document near number {documents + number} {how} a validation document"
                    )
            documents += found.documents
            for passage, position in found.matches:
                store = openings if passage < len(distances) else middles
                store.setdefault(passage % len(distances), []).append(first + position)
        self._count_documents("train", documents)
        inside = [
            number
            for number in openings
            if number in middles
            and self._contained(openings[number], middles[number], int(distances[number]))
        ]
        shared = len(set(openings) | set(middles)) - len(inside)
        overlap = {
            "equal": equal,
            "same_opening": same_opening,
            "found_inside": len(inside),
            "share_a_passage": shared,
        }
        self.report["overlap"] = overlap
        if inside and not example:
            place = openings[inside[0]][0]
            example = (
                f"validation document {int(self.passage_documents[inside[0]])} stands inside the training "
                f"shards, at token {place}"
            )
        hits = max(equal + same_opening, len(inside))
        if hits > self.options.max_overlap:
            raise Refuted(
                f"{example}; in all {equal} training documents equal a validation document, {same_opening} "
                f"start like one, and {len(inside)} validation documents stand inside the training shards"
            )
        if self.val_documents:
            self.proved(
                f"{hits} validation documents in the training shards, within --max-overlap"
                if hits
                else f"no validation document among {documents:,} training documents "
                f"({self.counts['train']:,} tokens; by content of whole documents and of openings, "
                f"and anywhere by two passages of {OPENING_TOKENS} tokens)"
            )
            if shared:
                self.report["counts"]["val_docs_sharing_a_passage"] = shared

    def _contained(self, openings: list[int], middles: list[int], distance: int) -> bool:
        return bool(set(openings) & {position - distance for position in middles})

    def _canonical(self) -> None:
        name = self.options.name or (
            self.manifest.get("name")
            if self.manifest.get("name") in CANONICAL
            else FOLDERS.get(self.folder.resolve().name)
        )
        if name is None:
            return
        constants = CANONICAL[name]
        if self.transform != constants.transform:
            raise Refuted(f"named {name}, whose transform is {constants.transform}, not {self.transform}")
        for what, value, (low, high) in (
            ("validation documents", self.val_documents, (constants.documents,) * 2),
            ("validation tokens", self.counts["val"], constants.tokens),
            ("validation bytes", self.credited, constants.credited),
        ):
            if not low <= value <= high:
                expected = f"{low:,}" if low == high else f"{low:,} to {high:,}"
                raise Refuted(f"named {name}, but it has {value:,} {what} instead of {expected}")
        self.proved(f"the published constants of {name}: documents, tokens and bytes of the validation set")

    # Against the raw documents.

    def _decoded(self, kind: str) -> Iterator[tuple[bytes, bytes, int, int]]:
        job = DecodeJob(str(self.tokenizer_path), self.transform)
        chunks = self._chunks(kind, kind == "val" and bool(self.files["sidecar"]))
        for _, decoded in run_in_order(job, chunks, self.options.workers):
            credited = decoded.credited or [0] * len(decoded.texts)
            yield from zip(decoded.texts, decoded.inverses, credited, decoded.lengths, strict=True)

    def _chunks(self, kind: str, sidecar: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Whole documents, about CHUNK_TOKENS at a time, with their sidecar values."""
        names = (kind, "sidecar") if sidecar else (kind,)
        rest = [np.zeros(0, np.uint16) for _ in names]
        for shard in range(len(self.files[kind])):
            columns = [self.values[name][shard] for name in names]
            for start in range(0, len(columns[0]), CHUNK_TOKENS):
                rest = [
                    np.concatenate([old, column[start : start + CHUNK_TOKENS]])
                    for old, column in zip(rest, columns, strict=True)
                ]
                starts = np.flatnonzero(rest[0] == BOS)
                if len(starts) and (cut := int(starts[-1])):
                    yield rest[0][:cut], rest[1][:cut] if sidecar else None
                    rest = [part[cut:] for part in rest]
        if len(rest[0]):
            yield rest[0], rest[1] if sidecar else None

    def _documents(self) -> None:
        options = self.options
        if not options.documents:
            self.not_proved("that the tokens are the documents: give the raw documents with --documents")
            return
        if not self.val_documents:
            self.not_proved("that the tokens are the documents: there is no BOS between them")
            return
        self._sources()
        self.raw_hashes: set[bytes] = set()
        end = self._validation_documents()
        if self.files["train"]:
            self._training_documents(Position() if options.val else end)

    def _sources(self) -> None:
        """The given files against those that the manifest says the dataset was made of."""
        listed = self.manifest.get("recipe", {}).get("sources", [])
        if not all("records" in facts for facts in listed) or not listed:
            self.not_proved("that these are the source files, whole: no manifest says how much they hold")
            return
        for role, paths in (("documents", self.options.documents), ("validation", self.options.val)):
            expected = [facts for facts in listed if facts["role"] == role]
            if len(paths) != len(expected):
                raise Refuted(
                    f"{len(paths)} files of {role} are given, but the dataset was made of {len(expected)} "
                    f"({', '.join(facts['name'] for facts in expected[:5]) or 'none'})"
                )
            for path, facts in zip(paths, expected, strict=True):
                self._compare_source(path, facts)
        records = sum(facts["records"] for facts in listed)
        self.proved(
            f"the {len(listed)} source files of the manifest, {records:,} records, read to their ends"
        )

    def _compare_source(self, path: SourceFile, facts: dict) -> None:
        size = stored_size(path)
        if size != facts["size"]:
            raise Refuted(f"{path}: {size:,} bytes, but the dataset was made of {facts['size']:,}")
        try:
            found = survey(path, self.options.key)
        except DataError as error:
            raise Refuted(f"source {error}") from None
        if found.sha256 != facts["sha256"]:
            raise Refuted(f"{path}: its sha256 is not that of the file the dataset was made of")
        if (found.records, found.bytes) != (facts["records"], facts.get("bytes")):
            raise Refuted(
                f"{path}: holds {found.records:,} records ({found.bytes} bytes of text), but the manifest "
                f"says {facts['records']:,} ({facts.get('bytes')})"
            )

    def _validation_documents(self) -> Position:
        """Compare the validation shards with the raw documents; where those of training start."""
        options, end = self.options, Position()
        job = SourceJob(str(self.tokenizer_path), self.transform, options.key, bool(self.files["sidecar"]))
        wanted = self.manifest.get("recipe", {}).get("validation", {})
        limit = None if options.val and wanted.get("documents", 0) is None else self.val_documents
        records = batches(options.val or options.documents, options.key, 2_000_000, Position(), limit)

        def sources() -> Iterator[Source]:
            nonlocal end
            for batch, found in run_in_order(job, records, options.workers):
                end = batch.after
                yield from found

        total = self._compare("val", sources())
        claimed = self.manifest.get("val_bytes")
        if claimed is not None and claimed != total:
            raise Refuted(f"the raw validation documents have {total} bytes, the manifest says {claimed}")
        self.report["counts"]["val_bytes"] = total
        if not self.files["sidecar"] and claimed is None:
            self._compare_tables(total)
        return end

    def _training_documents(self, start: Position) -> None:
        options, left_out = self.options, 0
        kept = self.manifest.get("recipe", {}).get("duplicates") == "kept" or not self.manifest
        job = SourceJob(str(self.tokenizer_path), self.transform, options.key, False)
        if not kept:
            job.texts, job.tokens, job.openings = self.raw_hashes, self.val_hashes, self.val_openings
        records = batches(options.documents, options.key, 2_000_000, start)

        progress = Progress("prove", sum(map(stored_size, options.documents)), output=sys.stderr)

        def sources() -> Iterator[Source]:
            nonlocal left_out
            for batch, found in run_in_order(job, records, options.workers):
                progress.update(batch.consumed, sum(source.length for source in found))
                left_out += sum(source.known for source in found)
                yield from (source for source in found if not source.known)

        total = self._compare("train", sources())
        progress.close()
        claimed = self.manifest.get("train_bytes")
        if claimed is not None and claimed != total:
            raise Refuted(f"the raw training documents have {total} bytes, the manifest says {claimed}")
        said = self.manifest.get("left_out")
        if said is not None and sum(said.values()) != left_out:
            raise Refuted(
                f"{left_out} documents equal or start like a validation document, but the manifest says "
                f"that {sum(said.values())} were left out"
            )
        self.report["counts"]["train_bytes"] = total

    def _compare(self, kind: str, sources: Iterator[Source]) -> int:
        """Walk through raw documents and dataset side by side; the raw bytes."""
        decoded = self._decoded(kind)
        tiers = {"exact": 0, "normalised": 0, "case_lost": 0, "lossy": 0}
        lossless = TRANSFORMS[self.transform][3]
        total, count, nothing, lost = 0, 0, object(), ""
        for number, source in enumerate(sources):
            count = number + 1
            found = next(decoded, nothing)
            if found is nothing:
                raise Refuted(
                    f"{kind} document {number} ({source.excerpt!r}): missing, the shards end before it"
                )
            text, inverse, credited, _ = found
            if text != source.code:
                raise Refuted(
                    f"{kind} document {number}: its tokens do not decode to the raw document "
                    f"{source.excerpt!r}"
                )
            tier = (
                "exact"
                if inverse == source.raw
                else "normalised"
                if inverse == source.normalised
                else "case_lost"
            )
            tiers[tier if lossless else "lossy"] += 1
            if lossless and tier == "case_lost":
                lost = lost or f"{kind} document {number} ({source.excerpt!r})"
            if kind == "val":
                self.raw_hashes.add(source.raw)
                if self.files["sidecar"] and credited != source.credited:
                    raise Refuted(
                        f"sidecar: gives {credited} bytes to validation document {number} "
                        f"({source.excerpt!r}), which has {source.length}, of which "
                        f"{source.length - source.credited} are dropped at its ends"
                    )
            total += source.length
        if next(decoded, nothing) is not nothing:
            raise Refuted(f"{kind} shards: more documents than the {count} raw ones")
        self.report.setdefault("documents", {})[kind] = tiers
        if tiers["case_lost"] > self.options.max_case_lost * count:
            raise Refuted(
                f"{lost}: its tokens do not give its capitals back, and so it is with "
                f"{tiers['case_lost']:,} of {count:,} {kind} documents, which is more than "
                f"--max-case-lost {self.options.max_case_lost:g} of them: {self.transform} is not lossless "
                "here"
            )
        self.proved(f"{kind} tokens decode to the raw documents: {self._describe(tiers, lost)}")
        return total

    def _describe(self, tiers: dict[str, int], lost: str) -> str:
        """How many documents came back in which way; `lost` is the first whose capitals did not."""
        meanings = {
            "exact": "exactly",
            "normalised": "up to SentencePiece's normalisation (spaces, newlines, compatibility forms)",
            "case_lost": "to the normalised transformed text only (within --max-case-lost): the "
            "normalisation took away what the inverse transform needs, so some capitals cannot be "
            f"recovered, first in {lost}",
            "lossy": f"to the normalised text of the lossy transform {self.transform}, not to the original",
        }
        return "; ".join(f"{count:,} {meanings[tier]}" for tier, count in tiers.items() if count)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line; exits with usage on a wrong one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", type=Path, help="folder with fineweb_*.bin")
    add(
        "--documents",
        nargs="+",
        default=[],
        metavar="FILE",
        help="the raw documents, in the order given to prepare.py",
    )
    add(
        "--val",
        nargs="+",
        default=[],
        metavar="FILE",
        help="the raw validation documents, where they were separate",
    )
    add("--key", default="text", help="key of the text in the documents (default %(default)s)")
    add("--tokenizer", type=Path, help="SentencePiece model (default: tokenizer.model in the folder)")
    add("--transform", choices=sorted(TRANSFORMS), help="for a dataset whose manifest does not name it")
    add("--name", choices=sorted(CANONICAL), help="demand the published constants of this dataset")
    add(
        "--max-overlap",
        type=number_option(int, 0),
        default=0,
        metavar="N",
        help="accept up to N validation documents among the training data (duplicates of a published export)",
    )
    add(
        "--max-case-lost",
        type=number_option(float, 0, 1),
        default=MOST_CASE_LOST,
        metavar="SHARE",
        help="accept this share of documents whose capitals normalisation has lost (default %(default)s)",
    )
    add(
        "--workers",
        type=int,
        default=environment.usable_cores(),
        metavar="N",
        help="processes (default %(default)s)",
    )
    add(
        "--card",
        action="store_true",
        help=f"if all is right, write {PROOF} and {CARD} into the folder, which data/publish.py asks for",
    )
    add("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(arguments)
    options.documents, options.val = expand(options.documents), expand(options.val)
    if not options.dataset.is_dir():
        raise DataError(f"{options.dataset}: no such folder; give that of a dataset")
    if options.card and not (options.dataset / MANIFEST).is_file():
        raise DataError(f"--card: {options.dataset} has no {MANIFEST}; make the dataset with data/prepare.py")
    if not 1 <= options.workers <= MOST_WORKERS:
        raise DataError(f"--workers {options.workers}: must be at least 1 and at most {MOST_WORKERS}")
    return options


def prove(options: argparse.Namespace) -> int:
    """Prove the dataset of `options` (those of parse_arguments) and print the report; the exit code."""
    began = time.monotonic()
    try:
        proof = Proof(options.dataset, options)
        try:
            proof.run()
            if options.card and not proof.manifest:
                raise DataError(f"--card: {MANIFEST} is of another format; make the dataset again")
            if options.card:
                write_proof(options.dataset, proof.report)
        except (Refuted, ShardError) as error:
            proof.report["first_counterexample"] = str(error)
            if options.card:
                (options.dataset / PROOF).unlink(missing_ok=True)
    except DataError as error:
        print(f"verify_bytes: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        name = error.filename or "a file"
        print(f"verify_bytes: {name}: {error.strerror or error}; check its permissions", file=sys.stderr)
        return 2
    except MemoryError:
        print("verify_bytes: memory is short; give fewer --workers", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("verify_bytes: interrupted, nothing is proved", file=sys.stderr)
        return 130
    report = proof.report
    report["seconds"] = round(time.monotonic() - began, 2)
    if options.json:
        print(json.dumps(report))
    else:
        for text in report["proved"]:
            print(f"proved      {text}")
        for text in report["not_proved"]:
            print(f"not proved  {text}")
        if report["first_counterexample"] is not None:
            print(f"REFUTED     {report['first_counterexample']}")
        print(f"{options.dataset}: {report['verdict']} in {report['seconds']} s")
    return 0 if report["verdict"] == "proved" else 1


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        options = parse_arguments(arguments)
    except DataError as error:
        print(f"verify_bytes: {error}", file=sys.stderr)
        return 2
    return prove(options)


if __name__ == "__main__":
    sys.exit(main())
