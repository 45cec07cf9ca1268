#!/usr/bin/env python3
"""Documents -> text transform -> tokenizer -> token shards, byte sidecar and manifest, in one command.

    python data/prepare.py corpus.jsonl.zst --out data/datasets/mine --tokenizer fineweb_8192_bpe.model
    python data/prepare.py 'corpus/*.parquet' --out data/datasets/mine_v3 --transform caseops_v3
    python data/prepare.py hub:docs --out data/datasets/flagship --transform caseops_v3

Every source file is read to its proven end before anything is written; its size, hash and number of records
are in the manifest. hub:docs is the contest's own file, read from the hub without being stored; the hub says
what it must be, and at its end it is proved that it was. The first 50,000 documents are the validation set
(or those of --val); training documents equal to one of them are left out and counted. Each document is BOS
and its tokens; documents may straddle shards. The output does not depend on --workers or --batch-mb. A run
that was killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import environment

environment.enter()
import argparse
import contextlib
import os
import platform
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from typing import IO, TextIO

import numpy as np

from data.card import CARD, FORMAT, MANIFEST, PROOF, ProofError, read_proof, write_card
from data.documents import (
    OPENING_TOKENS,
    Batch,
    DataError,
    Position,
    RemoteFile,
    SourceFile,
    Survey,
    batches,
    check_start,
    expand,
    stored_size,
    survey,
    text_bytes_estimate,
    text_hash,
    texts_of,
    token_hash,
)
from data.fast_tokenizer import FastTokenizer, load_model
from data.options import Parser, number_option
from data.running_hash import RunningSha256
from data.shards import (
    BOS,
    BPE,
    HEADER_BYTES,
    HEADER_WORDS,
    MAGIC,
    UNIGRAM,
    VERSION,
    ShardError,
    checksum,
    read_json_object,
    read_shard,
    sha256_file,
    write_json,
)
from data.sidecar import (
    MOST_CASE_LOST,
    CaseCheck,
    CountError,
    encode_with_bytes,
    standard_normaliser,
    table_bytes,
    table_problem,
)
from data.superword_training import KINDS, WORDS, train_with_superwords
from data.superwords import crosses_spaces
from data.workers import run_in_order
from lossless_caps import TRANSFORMS, encode_all

STANDARD_VALIDATION = 50_000
STANDARD_SHARD = 100_000_000
JOURNAL, TOKENIZER = "prepare.journal.json", "tokenizer.model"
TRAIN, VAL, SIDECAR = "fineweb_train_%06d.bin", "fineweb_val_%06d.bin", "fineweb_val_bytes_%06d.bin"
PARTIAL = ".partial"
# Bytes of shards written for one byte of text: 0.32 tokens of 2 bytes with CaseOps v1, and a margin.
OUTPUT_PER_TEXT = 0.75
MARGIN_BYTES = 64 << 20
LONGEST_SENTENCE = 4192
# From so many documents on, a share of lost capitals is judged while the training documents are read.
ENOUGH_TO_JUDGE = 1000
# The count in a shard's header is an int32.
MOST_SHARD_TOKENS = 2**31 - 1


# === PROGRESS ===


class Progress:
    """A bar with rate and time left on a terminal, a line every 10 s elsewhere (on `output`, or stdout)."""

    def __init__(self, stage: str, total: int, start: int = 0, output: TextIO | None = None):
        self.stage, self.total, self.start, self.done = stage, max(1, total), start, start
        self.output = output
        self.began = self.printed = time.monotonic()
        self.text_bytes = 0
        self.bar = None
        if sys.stderr.isatty():
            import tqdm

            self.bar = tqdm.tqdm(
                total=total, initial=start, desc=stage, unit="B", unit_scale=True, leave=False
            )

    def update(self, done: int, text_bytes: int = 0) -> None:
        """`done` of the source bytes (as stored) are behind us;
        `text_bytes` more bytes of text were worked on.
        """
        self.text_bytes += text_bytes
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(f"text {self.text_bytes / 1e6 / max(1e-9, now - self.began):.1f} MB/s")
            self.bar.update(done - self.done)
        self.done = done
        if self.bar is None and now - self.printed >= 10:
            self.printed = now
            left = (now - self.began) * (self.total - done) / max(1, done - self.start)
            print(
                f"{self.stage}: {100 * done / self.total:.1f} %, text "
                f"{self.text_bytes / 1e6 / (now - self.began):.1f} MB/s, {left:.0f} s left",
                file=self.output,
                flush=True,
            )

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


# === WORK ON ONE BATCH ===


@dataclass
class Known:
    """Content hashes of the validation documents: raw text, tokens, first OPENING_TOKENS tokens."""

    texts: set[bytes] = field(default_factory=set)
    tokens: set[bytes] = field(default_factory=set)
    openings: set[bytes] = field(default_factory=set)


@dataclass
class Result:
    """What one batch becomes: tokens with BOS (uint16), for validation their bytes (uint16), and counters."""

    tokens: np.ndarray
    sidecar: np.ndarray | None
    counts: dict[str, int]
    lost: str = ""  # the first document whose capitals are lost, and where


@lru_cache(maxsize=2)
def tokenizer_of(path: str, sha256: str) -> FastTokenizer:
    """The tokenizer of a file, once per process; the hash keeps a
    changed file from being taken for the old one.
    """
    return FastTokenizer(Path(path))


@lru_cache(maxsize=2)
def case_check_of(path: str, sha256: str, transform: str) -> CaseCheck:
    """The check for capitals that the normalisation of a tokenizer takes away, once per process."""
    return CaseCheck(transform, plain_normaliser(tokenizer_of(path, sha256).processor))


def plain_normaliser(processor) -> Callable[[str], str]:
    """The normaliser of a tokenizer, whose spaces stay spaces."""

    def normalise(text: str) -> str:
        return processor.normalize(text).replace("\u2581", " ")

    return normalise


@dataclass
class Job:
    """What is done to every batch of a stage, in this process or in a worker."""

    tokenizer: str
    tokenizer_sha256: str
    transform: str
    key: str
    validation: bool
    known: Known | None = None

    def __call__(self, batch: Batch) -> Result:
        texts = texts_of(batch, self.key)
        return self._validation(texts, batch) if self.validation else self._training(texts, batch)

    def _case_lost(self, texts: list[str], batch: Batch) -> tuple[int, str]:
        check = case_check_of(self.tokenizer, self.tokenizer_sha256, self.transform)
        return check.count(texts, f"{batch.path}: after record {batch.start.record}")

    def _validation(self, texts: list[str], batch: Batch) -> Result:
        processor = tokenizer_of(self.tokenizer, self.tokenizer_sha256).processor
        tokens, sidecar, dropped = [np.zeros(0, np.uint16)], [np.zeros(0, np.uint16)], 0
        for text in texts:
            try:
                ids, counts, lost = encode_with_bytes(processor, self.transform, text)
            except (OverflowError, CountError) as error:
                raise DataError(f"{batch.path}: after record {batch.start.record}: {error}") from None
            tokens += [np.array([BOS], np.uint16), ids]
            sidecar += [np.zeros(1, np.uint16), counts]
            dropped += lost
        raw = sum(len(text.encode()) for text in texts)
        case_lost, place = self._case_lost(texts, batch)
        counts = {"documents": len(texts), "bytes": raw, "uncounted_bytes": dropped, "case_lost": case_lost}
        return Result(np.concatenate(tokens), np.concatenate(sidecar), counts, place)

    def _training(self, texts: list[str], batch: Batch) -> Result:
        assert self.known is not None
        counts = dict.fromkeys(("same_text", "same_tokens", "same_opening"), 0)
        if self.known.texts:
            kept = [text for text in texts if text_hash(text) not in self.known.texts]
            counts["same_text"] = len(texts) - len(kept)
            texts = kept
        tokenizer = tokenizer_of(self.tokenizer, self.tokenizer_sha256)
        ids, lengths = tokenizer.encode_batch(encode_all(self.transform, texts))
        ends = np.cumsum(lengths)
        keep = np.ones(len(texts), dtype=bool)
        if self.known.tokens or self.known.openings:
            for index, (start, end) in enumerate(zip((ends - lengths).tolist(), ends.tolist(), strict=True)):
                if token_hash(ids[start:end]) in self.known.tokens:
                    counts["same_tokens"] += 1
                    keep[index] = False
                elif (
                    end - start >= OPENING_TOKENS
                    and token_hash(ids[start : start + OPENING_TOKENS]) in self.known.openings
                ):
                    counts["same_opening"] += 1
                    keep[index] = False
        if not keep.all():
            ids = ids[np.repeat(keep, lengths)]
            lengths = lengths[keep]
            texts = [text for text, good in zip(texts, keep.tolist(), strict=True) if good]
        tokens = np.insert(ids, np.cumsum(lengths) - lengths, BOS)
        case_lost, place = self._case_lost(texts, batch)
        counts |= {"documents": len(texts), "case_lost": case_lost}
        counts["bytes"] = sum(len(text.encode()) for text in texts)
        return Result(tokens, None, counts, place)


# === SHARDS ===


class ShardWriter:
    """Values appended to numbered shards of `limit` values; `state`
    is all that is needed to go on after a kill.
    """

    def __init__(self, folder: Path, pattern: str, limit: int, state: dict | None = None):
        self.folder, self.pattern, self.limit = folder, pattern, limit
        state = state or {"shard": 0, "count": 0, "files": {}}
        self.shard, self.count, self.files = state["shard"], state["count"], dict(state["files"])
        self.total = sum(entry["tokens"] for entry in self.files.values()) + self.count
        final, partial = self._path(), self._partial()
        for name, facts in self.files.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != facts["size"]:
                raise DataError(
                    f"{folder / name}: is missing or has another size than the journal says; "
                    "give --overwrite to start again"
                )
        # The shard may have been completed after the last journal
        # entry; what that does not know is written again.
        if self.count and not partial.exists() and final.exists():
            os.replace(final, partial)
        for path in folder.glob(pattern.replace("%06d", "[0-9]" * 6) + "*"):
            if path not in (partial if self.count else None, *(folder / name for name in self.files)):
                path.unlink()
        self.file = None
        if self.count:
            size = HEADER_BYTES + 2 * self.count
            if not partial.exists() or partial.stat().st_size < size:
                raise DataError(f"{partial}: shorter than the journal says; give --overwrite to start again")
            self.file = open(partial, "r+b")  # noqa: SIM115
            self.file.truncate(size)
            self.file.seek(size)

    def _path(self) -> Path:
        return self.folder / (self.pattern % self.shard)

    def _partial(self) -> Path:
        return self.folder / (self.pattern % self.shard + PARTIAL)

    def append(self, values: np.ndarray) -> None:
        """Write `values` (uint16), closing shards as they fill up."""
        while len(values):
            if self.file is None:
                self.file = open(self._partial(), "wb")  # noqa: SIM115
                self.file.write(bytes(HEADER_BYTES))
            part = values[: self.limit - self.count]
            self.file.write(part.astype("<u2", copy=False).tobytes())
            self.count += len(part)
            self.total += len(part)
            values = values[len(part) :]
            if self.count == self.limit:
                self.close()

    def close(self) -> None:
        """Complete the current shard, if one is open: header, disk, final name, hash."""
        if self.file is None:
            return
        header = np.zeros(HEADER_WORDS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.count
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        os.replace(self._partial(), self._path())
        self.files[self._path().name] = {
            "tokens": self.count,
            "size": HEADER_BYTES + 2 * self.count,
            "sha256": sha256_file(self._path()),
        }
        self.shard, self.count = self.shard + 1, 0

    def abandon(self) -> None:
        """Let go of the shard being written; the journal knows how much of it counts."""
        if self.file is not None:
            # What a full disk does not take now it did not take before either.
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None

    def state(self) -> dict:
        """The state that is safely on disk now."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"shard": self.shard, "count": self.count, "files": self.files}


# === THE RUN ===


@dataclass
class Settings:
    """Everything the command line says; see --help."""

    sources: list[SourceFile]
    out: Path
    val: list[SourceFile] = field(default_factory=list)
    val_docs: int | None = None
    key: str = "text"
    transform: str = "none"
    tokenizer: Path | None = None
    tokenizer_sha256: str | None = None
    tokenizer_model: str = BPE
    vocab_size: int = 8192
    tokenizer_docs: int = 0
    tokenizer_mb: float = 100
    tokenizer_unit: str = "line"
    superwords: int = 0
    superword_kind: str = WORDS
    split_digits: bool = True
    shard_tokens: int = STANDARD_SHARD
    name: str = ""
    sidecar: bool = False
    keep_duplicates: bool = False
    workers: int = 1
    batch_mb: float = 2
    journal_seconds: float = 5
    overwrite: bool = False
    disk_check: bool = True
    max_case_lost: float = MOST_CASE_LOST
    prove: bool = False


def say(text: str) -> None:
    """One line for the user."""
    print(f"prepare: {text}", flush=True)


@dataclass
class StageState:
    """How far a stage has come: what was read, what it gave, the first document whose capitals are lost;
    of a file that is read from the hub, the sha256 of all of it before the position.
    """

    position: Position
    counts: dict[str, int]
    seconds: float = 0.0
    digest: RunningSha256 | None = None
    first_lost: str = ""
    began: float = field(default_factory=time.monotonic)

    def add(self, batch: Batch, result: Result | None = None) -> None:
        """Count a batch that was read and, if it has a result, whose result is written."""
        for name, value in result.counts.items() if result else ():
            self.counts[name] = self.counts.get(name, 0) + value
        if batch.start.file != self.position.file:
            self.digest = None
        if isinstance(batch.path, RemoteFile):
            self.digest = self.digest or RunningSha256()
            self.digest.update(b"".join(batch.records))
        self.position = batch.after
        self.first_lost = self.first_lost or (result.lost if result else "")

    def entry(self, writers: list[ShardWriter]) -> dict:
        """The journal's entry for this state, once all of it is on disk."""
        return {
            "position": asdict(self.position),
            "counts": self.counts,
            "writers": [writer.state() for writer in writers],
            "seconds": self.seconds + time.monotonic() - self.began,
            "digest": self.digest and self.digest.state(),
        }


class Preparation:
    """One run of the pipeline: stages `tokenizer`, `val`, `train`, each resumable from the journal."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.out = settings.out
        self.batch_bytes = max(1, int(settings.batch_mb * 1e6))
        self.journal: dict = {}
        self.saved = 0.0
        # Of a file from the hub: how far a tokenizer was trained on it, and the sha256 of all until there.
        self.sampled: dict | None = None
        self.versions = {"sentencepiece": version("sentencepiece"), "unicode": unicodedata.unidata_version}
        self.has_sidecar = settings.transform != "none" or settings.sidecar or settings.superwords > 0

    def run(self) -> dict:
        """Make the dataset, or recognise a finished one; the manifest."""
        settings = self.settings
        self._check_tokenizer()
        for path in settings.val:
            if isinstance(path, RemoteFile):
                raise DataError(f"--val {path}: is read in part, so nothing proves it; give it as a source")
        for path in [*settings.sources, *settings.val]:
            check_start(path, settings.key)
        recipe = self._recipe()
        manifest = self._finished(recipe)
        if manifest is not None:
            say(
                f"{self.out}: already complete, verified ({manifest['docs_train']:,} training and "
                f"{manifest['docs_val']:,} validation documents)"
            )
            return manifest
        self._load_journal(recipe)
        if settings.disk_check:
            self._check_disk()
        if recipe["validation"]["documents"] not in (STANDARD_VALIDATION, None) or settings.val:
            print(
                "prepare: WARNING: this validation set is not the standard one (the first 50,000 documents); "
                "scores on it cannot be compared with published ones",
                file=sys.stderr,
                flush=True,
            )
        known, train_start = self._scan_validation()
        self._make_tokenizer(known, train_start)
        self._validation_stage(train_start)
        self._training_stage(known, train_start)
        return self._finish(recipe)

    # Checks before anything is written.

    def _check_tokenizer(self) -> None:
        path, superwords = self.settings.tokenizer, self.settings.superwords
        model_type = self.settings.tokenizer_model
        if model_type != BPE and (path is not None or superwords):
            other = f"--tokenizer {path}, which has its own kind" if path else f"--superwords {superwords}"
            raise DataError(
                f"--tokenizer-model {model_type}: does not go with {other}; leave one of them out"
            )
        if path is None:
            if superwords >= self.settings.vocab_size:
                raise DataError(
                    f"--superwords {superwords}: as many as --vocab-size {self.settings.vocab_size} or "
                    "more; give fewer"
                )
            return
        if superwords:
            raise DataError(
                f"--superwords {superwords}: are learnt with a tokenizer; leave --tokenizer {path} out"
            )
        try:
            processor, model = load_model(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); give an existing --tokenizer"
            ) from None
        except ValueError as error:
            raise DataError(str(error)) from None
        if processor.vocab_size() > 0xFFFF:
            raise DataError(
                f"{path}: {processor.vocab_size()} entries, but shards hold ids below 65,536; "
                "use a smaller vocabulary"
            )
        operators = TRANSFORMS[self.settings.transform][2]
        missing = [
            f"U+{ord(symbol):04X}"
            for symbol in operators
            if processor.id_to_piece(processor.piece_to_id(symbol)) != symbol
        ]
        if missing:
            raise DataError(
                f"{path}: has no {', '.join(missing)}, the operators of --transform "
                f"{self.settings.transform}; give a tokenizer trained for it, or leave --tokenizer out to "
                "train one"
            )
        if processor.bos_id() != BOS:
            raise DataError(
                f"{path}: BOS has id {processor.bos_id()}, the shard format needs {BOS}; "
                "use another tokenizer"
            )
        problem = table_problem(processor)
        if problem:
            raise DataError(f"{path}: {problem}; use another tokenizer")
        promised, found = self.settings.tokenizer_sha256, sha256_file(path)
        if promised not in (None, found):
            raise DataError(f"{path}: has sha256 {found}, not --tokenizer-sha256 {promised}; get it again")
        self.has_sidecar |= crosses_spaces(model)

    def _read_journal(self) -> dict:
        """The journal of an earlier run; empty if there is none, or none that can be relied on."""
        try:
            journal = read_json_object(self.out / JOURNAL)
        except (OSError, ValueError):
            return {}
        return journal if journal.get("checksum") == checksum(journal) else {}

    def _hash_sources(self) -> list[dict]:
        self.journal = self._read_journal()
        seen = self.journal.get("seen", {})
        files = [("documents", path) for path in self.settings.sources]
        files += [("validation", path) for path in self.settings.val]
        total = sum(stored_size(path) for _, path in files)
        progress, done, facts = Progress("read sources", total), 0, []
        self.seen = {}
        for role, path in files:
            if isinstance(path, RemoteFile):
                promised = Survey(path.size, path.sha256, path.records, path.size)
                facts.append({"name": path.name, "role": role, **asdict(promised)})
                continue
            status = path.stat()
            key = [status.st_size, status.st_mtime_ns]
            if seen.get(str(path), [])[:2] == key:
                found = seen[str(path)][2]
            else:
                found = asdict(survey(path, self.settings.key))
            self.seen[str(path)] = [*key, found]
            facts.append({"name": path.name, "role": role, **found})
            done += status.st_size
            progress.update(done, status.st_size)
        progress.close()
        return facts

    def _recipe(self) -> dict:
        """All that decides the output, free of paths; equal recipes give equal bytes."""
        settings = self.settings
        documents = (
            settings.val_docs if settings.val or settings.val_docs is not None else STANDARD_VALIDATION
        )
        if settings.tokenizer is not None:
            tokenizer: dict = {"sha256": sha256_file(settings.tokenizer), "source": settings.tokenizer.name}
        else:
            tokenizer = {
                "trained": {
                    "vocab_size": settings.vocab_size,
                    "documents": settings.tokenizer_docs,
                    "megabytes": settings.tokenizer_mb,
                    "unit": settings.tokenizer_unit,
                    "superwords": settings.superwords,
                    "superword_kind": settings.superword_kind if settings.superwords else None,
                    "split_digits": settings.split_digits,
                    "on": "training documents",
                }
            }
            if settings.tokenizer_model != BPE:  # an entry in every recipe would disown finished datasets
                tokenizer["trained"]["model"] = settings.tokenizer_model
        return {
            "sources": self._hash_sources(),
            "key": settings.key,
            "transform": settings.transform,
            "tokenizer": tokenizer,
            "shard_tokens": settings.shard_tokens,
            "name": settings.name,
            "sidecar": self.has_sidecar,
            "duplicates": "kept" if settings.keep_duplicates else "left out",
            "validation": {
                "from": "separate files" if settings.val else "first documents",
                "documents": documents,
            },
        }

    def _finished(self, recipe: dict) -> dict | None:
        """The manifest if a complete dataset of this recipe is there and all its files are unchanged."""
        path = self.out / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = read_json_object(path)
            same, unchanged = manifest["recipe"] == recipe, manifest["checksum"] == checksum(manifest)
            files = manifest["files"]
        except (OSError, ValueError, KeyError, TypeError):
            same = unchanged = False
        if same and unchanged:
            wrong = [
                name
                for name, facts in files.items()
                if not (self.out / name).is_file()
                or (self.out / name).stat().st_size != facts["size"]
                or sha256_file(self.out / name) != facts["sha256"]
            ]
            if not wrong:
                (self.out / JOURNAL).unlink(missing_ok=True)
                return manifest
            reason = f"its {wrong[0]} is missing or changed"
        else:
            reason = (
                "it holds another dataset" if unchanged else "its manifest.json was not made by this program"
            )
        if not self.settings.overwrite:
            raise DataError(f"{self.out}: {reason}; choose another --out, or give --overwrite to replace it")
        path.unlink()
        return None

    def _load_journal(self, recipe: dict) -> None:
        # The journal first: without it, what a killed replacement
        # leaves behind is taken for nothing it is not.
        ours = [JOURNAL + "*", MANIFEST + "*", TOKENIZER + "*", "tokenizer.vocab", CARD + "*", PROOF + "*"]
        ours += [*(pattern.replace("%06d", "[0-9]" * 6) + "*" for pattern in (TRAIN, VAL, SIDECAR)), ".lock"]
        foreign = [
            path.name for path in sorted(self.out.iterdir()) if not any(path.match(name) for name in ours)
        ]
        if foreign:
            raise DataError(f"{self.out}: holds other files ({foreign[0]}); choose another --out")
        started = any(path.name not in (".lock", JOURNAL + ".tmp") for path in self.out.iterdir())
        if self.journal.get("recipe") == recipe and self.journal.get("versions") == self.versions:
            say(f"going on where an earlier run stopped (stage {self.journal['stage']})")
        else:
            if started and not self.settings.overwrite:
                old = self.journal.get("recipe") or {}
                differs = [name for name in recipe if old.get(name) != recipe[name]] or ["versions"]
                if not self.journal and (self.out / JOURNAL).exists():
                    differs = [f"its journal, which is damaged ({JOURNAL})"]
                raise DataError(
                    f"{self.out}: holds an unfinished or unknown dataset that differs in "
                    f"{', '.join(differs)}; choose another --out, or give --overwrite to replace it"
                )
            for pattern in ours[:-1]:
                for path in self.out.glob(pattern):
                    path.unlink()
            self.journal = {
                "recipe": recipe,
                "versions": self.versions,
                "seen": self.seen,
                "stage": "tokenizer",
            }
            self._save()

    def _check_disk(self) -> None:
        text = sum(text_bytes_estimate(path) for path in [*self.settings.sources, *self.settings.val])
        present = sum(path.stat().st_size for path in self.out.iterdir())
        needed = int(text * OUTPUT_PER_TEXT) + MARGIN_BYTES - present
        free = shutil.disk_usage(self.out).free
        remote = [source for source in self.settings.sources if isinstance(source, RemoteFile)]
        say(
            f"{self.out}: about {max(0, needed) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
            + "".join(f"; {source} ({source.size / 1e9:.2f} GB) is not stored" for source in remote)
        )
        if free < needed:
            raise DataError(
                f"{self.out}: about {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
                "free some, choose another --out, or give --no-disk-check"
            )

    # The stages.

    def _batches(self, validation: bool, start: Position, limit: int | None = None) -> Iterator[Batch]:
        paths = self.settings.val if validation and self.settings.val else self.settings.sources
        return batches(paths, self.settings.key, self.batch_bytes, start, limit)

    def _validation_limit(self) -> int | None:
        return self.journal["recipe"]["validation"]["documents"]

    def _scan_validation(self) -> tuple[Known, Position]:
        """Raw-text hashes of the validation documents, and where training documents start."""
        known, self.validation_end = Known(), 0
        limit = self._validation_limit()
        check, seen = self._case_check(), StageState(Position(), {"documents": 0, "case_lost": 0})
        for batch in self._batches(True, Position(), limit):
            texts = texts_of(batch, self.settings.key)
            known.texts.update(map(text_hash, texts))
            lost, place = check.count(texts, f"{batch.path}: after record {batch.start.record}")
            counts = {"documents": len(texts), "case_lost": lost}
            seen.add(batch, Result(np.zeros(0, np.uint16), None, counts, place))
            self.validation_end = batch.consumed
        self._judge_case("validation", seen)
        # What was read here is read again for its tokens, and must be the same then.
        self.scanned = seen.digest and seen.digest.state()
        count, after = seen.counts["documents"], seen.position
        if count == 0 or (limit is not None and count < limit):
            raise DataError(
                f"{(self.settings.val or self.settings.sources)[0]}: {count} documents, but "
                f"{limit or 'some'} are wanted for validation; give a smaller --val-docs or a --val file"
            )
        return known, Position() if self.settings.val else after

    def _case_check(self) -> CaseCheck:
        """The check with the normaliser of the tokenizer that is given, or is going to be trained."""
        path = self.settings.tokenizer
        normalise = standard_normaliser() if path is None else plain_normaliser(load_model(path)[0])
        return CaseCheck(self.settings.transform, normalise)

    def _judge_case(self, kind: str, state: StageState) -> None:
        """DataError if more documents lose capitals than
        --max-case-lost allows, as verify_bytes.py would say.
        """
        lost, documents = state.counts.get("case_lost", 0), state.counts.get("documents", 0)
        most = self.settings.max_case_lost
        if lost > most * documents:
            raise DataError(
                f"{state.first_lost or self.settings.sources[0]}: SentencePiece's normalisation takes away "
                f"what {self.settings.transform} needs here, and in {lost:,} of {documents:,} {kind} "
                f"documents; normalise the text to NFC, or accept more than --max-case-lost {most:g}"
            )

    def _training_texts(self, known: Known, start: Position, read: dict[str, int]) -> Iterator[str]:
        """Transformed training documents up to the limits for training a tokenizer; `read` counts them."""
        encode = TRANSFORMS[self.settings.transform][0]
        most_documents, most_bytes = self.settings.tokenizer_docs, self.settings.tokenizer_mb * 1e6
        state = StageState(start, {}, digest=self.scanned and RunningSha256(self.scanned))
        for batch in self._batches(False, start):
            state.add(batch)
            self.sampled = state.digest and asdict(state.position) | {"digest": state.digest.state()}
            for text in texts_of(batch, self.settings.key):
                if text_hash(text) in known.texts:
                    continue
                if (most_documents and read["documents"] >= most_documents) or (
                    most_bytes and read["bytes"] >= most_bytes
                ):
                    return
                read["documents"] += 1
                code = encode(text)
                for sentence in code.splitlines() if self.settings.tokenizer_unit == "line" else (code,):
                    # SentencePiece skips longer ones; here they do not count towards the limit either.
                    if (size := len(sentence.encode())) <= LONGEST_SENTENCE:
                        read["bytes"] += size
                        yield sentence

    def _make_tokenizer(self, known: Known, start: Position) -> None:
        path = self.out / TOKENIZER
        facts = self.journal.get("tokenizer")
        if facts is None or not path.is_file() or sha256_file(path) != facts["sha256"]:
            facts = {"file": TOKENIZER}
            if self.settings.tokenizer is not None:
                # Not copyfile: its error on a full disk would name the file that is read.
                path.write_bytes(self.settings.tokenizer.read_bytes())
            else:
                facts["trained"] = self._train_tokenizer(path, known, start)
            processor, model = load_model(path)
            problem = table_problem(processor)
            if problem:
                raise DataError(f"{path}: {problem}; train it on text with spaces, or give a --tokenizer")
            facts |= {
                "sha256": sha256_file(path),
                "vocab_size": processor.vocab_size(),
                "type": {1: "unigram", 2: "bpe"}.get(model.trainer_spec.model_type, "other"),
            }
            self._save(tokenizer=facts, stage="val", sampled=self.sampled)
        self.tokenizer = tokenizer_of(str(path), facts["sha256"])
        if self.tokenizer.refused:
            say(
                f"tokenising with SentencePiece alone, the word table is not exact for this model: "
                f"{self.tokenizer.refused}"
            )

    def _train_tokenizer(self, path: Path, known: Known, start: Position) -> dict[str, int]:
        from sentencepiece import sentencepiece_model_pb2

        say(f"training a tokenizer of {self.settings.vocab_size} entries on training documents")
        read = {"documents": 0, "bytes": 0}
        began = time.monotonic()
        settings = self.settings
        try:
            trained = train_with_superwords(
                self._training_texts(known, start, read),
                self.out / "tokenizer",
                settings.vocab_size,
                TRANSFORMS[settings.transform].operators,
                settings.superwords,
                settings.superword_kind,
                settings.split_digits,
                model_type=settings.tokenizer_model,
            )
        except RuntimeError as error:
            if not read["documents"]:
                raise self._no_training_documents() from None
            raise DataError(
                f"--vocab-size {self.settings.vocab_size}: SentencePiece cannot train it on "
                f"{read['documents']} documents ({str(error).splitlines()[0][:200]}); give a smaller "
                "--vocab-size or more text"
            ) from None
        (self.out / "tokenizer.vocab").unlink(missing_ok=True)
        # SentencePiece stores the folder in the model; equal tokenizers must have equal hashes.
        model = sentencepiece_model_pb2.ModelProto.FromString(trained.read_bytes())
        model.trainer_spec.model_prefix = "tokenizer"
        path.write_bytes(model.SerializeToString(deterministic=True))
        say(
            f"tokenizer trained on {read['documents']:,} documents ({read['bytes'] / 1e6:.1f} MB) in "
            f"{time.monotonic() - began:.1f} s"
        )
        return read

    def _no_training_documents(self) -> DataError:
        return DataError(
            f"{self.settings.sources[0]}: no documents are left for training after "
            f"{self._validation_limit()} for validation; give a smaller --val-docs or more documents"
        )

    def _save(self, **changes) -> None:
        self.journal |= changes
        self.journal["checksum"] = checksum(self.journal)
        write_json(self.out / JOURNAL, self.journal)
        self.saved = time.monotonic()

    def _stage(
        self, stage: str, job: Job, writers: list[ShardWriter], start: Position, limit: int | None
    ) -> None:
        """Run `job` over the documents from the journal's position on; all state goes into its entry."""
        entry = self.journal.get(stage) or {"position": asdict(start), "counts": {}, "seconds": 0.0}
        digest = entry.get("digest", None if job.validation else self.scanned)
        state = StageState(
            Position(**entry["position"]),
            dict(entry["counts"]),
            entry["seconds"],
            digest and RunningSha256(digest),
        )
        if limit is not None:
            limit -= state.counts.get("documents", 0)
        source = () if limit == 0 else self._batches(job.validation, state.position, limit)
        results = run_in_order(job, source, self.settings.workers)
        sizes = sum(map(stored_size, self.settings.sources))
        total = self.validation_end if job.validation else sizes
        try:
            self._consume(stage, results, writers, state, total)
            for writer in writers:
                writer.close()
        finally:
            # Before the writers go: the workers end with their generator.
            results.close()
            for writer in writers:
                writer.abandon()
        self._save(**{stage: state.entry(writers)})
        if job.validation:
            if self.scanned != (state.digest and state.digest.state()):
                raise DataError(
                    f"{self.settings.sources[0]}: its validation documents came differently a second time; "
                    "start again with --overwrite"
                )
        else:
            self._check_passed(stage, state, Position(len(self.settings.sources)))
            self._judge_case("training", state)

    def _consume(
        self,
        stage: str,
        results: Iterator[tuple[Batch, Result]],
        writers: list[ShardWriter],
        state: StageState,
        total: int,
    ) -> None:
        progress = None
        for batch, result in results:
            self._check_passed(stage, state, batch.start)
            if progress is None:
                progress = Progress(stage, total, batch.consumed)
            if stage == "train":
                self._check_sample(state, batch)
            for writer, values in zip(writers, (result.tokens, result.sidecar), strict=False):
                writer.append(values)
            state.add(batch, result)
            if stage == "train" and state.counts["documents"] >= ENOUGH_TO_JUDGE:
                self._judge_case("training", state)
            progress.update(batch.consumed, result.counts["bytes"])
            if time.monotonic() - self.saved > self.settings.journal_seconds:
                self._save(**{stage: state.entry(writers)})
        if progress is not None:
            progress.close()

    def _check_sample(self, state: StageState, batch: Batch) -> None:
        """DataError if the tokenizer was trained on other bytes than those that come now."""
        sampled = self.journal.get("sampled")
        if not sampled or batch.start.file != sampled["file"]:
            return
        if not batch.start.offset < sampled["offset"] <= batch.after.offset:
            return
        same_file = state.digest is not None and batch.start.file == state.position.file
        digest = RunningSha256(state.digest.state() if same_file else None)
        digest.update(b"".join(batch.records)[: sampled["offset"] - batch.start.offset])
        if digest.state() != sampled["digest"]:
            raise DataError(
                f"{batch.path}: the tokenizer was trained on other bytes than came now; "
                "start again with --overwrite"
            )

    def _check_passed(self, stage: str, state: StageState, after: Position) -> None:
        """DataError unless every source file that ends between two positions gave all its records, and one
        from the hub the bytes that the hub promised.
        """
        before = state.position
        role = "validation" if stage == "val" and self.settings.val else "documents"
        sources = [facts for facts in self.journal["recipe"]["sources"] if facts["role"] == role]
        for index in range(before.file, after.file):
            read = before.record if index == before.file else 0
            if read != sources[index]["records"]:
                raise DataError(
                    f"{sources[index]['name']}: {read:,} records were read, but it held "
                    f"{sources[index]['records']:,} at the start; let nothing change it, and start again "
                    "with --overwrite"
                )
            found = state.digest.hexdigest() if index == before.file and state.digest else None
            if found not in (None, sources[index]["sha256"]):
                raise DataError(
                    f"{sources[index]['name']}: has sha256 {found}, but the hub promised "
                    f"{sources[index]['sha256']}; start again with --overwrite"
                )

    def _writers(self, stage: str, patterns: list[str]) -> list[ShardWriter]:
        states = (self.journal.get(stage) or {}).get("writers") or [None] * len(patterns)
        return [
            ShardWriter(self.out, pattern, self.settings.shard_tokens, state)
            for pattern, state in zip(patterns, states, strict=True)
        ]

    def _job(self, validation: bool, known: Known | None = None) -> Job:
        return Job(
            str(self.out / TOKENIZER),
            self.journal["tokenizer"]["sha256"],
            self.settings.transform,
            self.settings.key,
            validation,
            known,
        )

    def _validation_stage(self, train_start: Position) -> None:
        if self.journal["stage"] != "val":
            return
        writers = self._writers("val", [VAL, SIDECAR] if self.has_sidecar else [VAL])
        self._stage("val", self._job(True), writers, Position(), self._validation_limit())
        self._save(stage="train")

    def _training_stage(self, known: Known, start: Position) -> None:
        processor, carry, before = self.tokenizer.processor, np.zeros(0, np.uint16), BOS
        credited = 0
        if self.settings.keep_duplicates:
            known.texts.clear()
        for name in sorted(self.journal["val"]["writers"][0]["files"]):
            values = read_shard(self.out / name)
            for block in range(0, len(values), 1 << 22):
                tokens = np.array(values[block : block + (1 << 22)])
                credited += table_bytes(processor, tokens, before)
                before = int(tokens[-1])
                tokens = np.concatenate([carry, tokens])
                borders = np.flatnonzero(tokens == BOS)
                carry = tokens[borders[-1] :] if len(borders) else tokens
                self._learn(known, tokens, borders)
        self._learn(known, np.append(carry, np.uint16(BOS)), np.array([0, len(carry)]))
        self.table_bytes = credited
        self._stage("train", self._job(False, known), self._writers("train", [TRAIN]), start, None)
        if not self.journal["train"]["counts"].get("documents"):
            raise self._no_training_documents()

    def _learn(self, known: Known, tokens: np.ndarray, borders: np.ndarray) -> None:
        if self.settings.keep_duplicates:
            return
        for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            known.tokens.add(token_hash(tokens[begin + 1 : end]))
            if end - begin > OPENING_TOKENS:
                known.openings.add(token_hash(tokens[begin + 1 : begin + 1 + OPENING_TOKENS]))

    def _finish(self, recipe: dict) -> dict:
        manifest = self._manifest(recipe)
        manifest["checksum"] = checksum(manifest)
        write_card(self.out, manifest)
        write_json(self.out / MANIFEST, manifest)
        (self.out / JOURNAL).unlink()
        self._report(manifest)
        return manifest

    def _manifest(self, recipe: dict) -> dict:
        journal, settings = self.journal, self.settings
        val, train = journal["val"]["counts"], journal["train"]["counts"]
        writers = {stage: journal[stage]["writers"] for stage in ("train", "val")}
        files = {
            name: facts
            for stage in writers.values()
            for writer in stage
            for name, facts in writer["files"].items()
        }
        tokens = {
            stage: sum(facts["tokens"] for facts in stage_writers[0]["files"].values())
            for stage, stage_writers in writers.items()
        }
        files[TOKENIZER] = {
            "size": (self.out / TOKENIZER).stat().st_size,
            "sha256": journal["tokenizer"]["sha256"],
        }
        standard = recipe["validation"] == {"from": "first documents", "documents": STANDARD_VALIDATION}
        return {
            "format": FORMAT,
            "name": settings.name or f"sp{journal['tokenizer']['vocab_size']}_{settings.transform}",
            "transform": settings.transform,
            "lossless": TRANSFORMS[settings.transform][3],
            "bos": BOS,
            "tokenizer": journal["tokenizer"],
            "validation": recipe["validation"] | {"standard": standard},
            "docs_val": val["documents"],
            "val_tokens": tokens["val"],
            "val_bytes": val["bytes"],
            "val_uncounted_bytes": val["uncounted_bytes"],
            "case_lost": {"val": val["case_lost"], "train": train["case_lost"]},
            "val_sidecar": self.has_sidecar,
            "val_sidecar_bytes": val["bytes"] - val["uncounted_bytes"] if self.has_sidecar else None,
            "val_lut_bytes": self.table_bytes,
            "docs_train": train["documents"],
            "train_tokens": tokens["train"],
            "train_bytes": train["bytes"],
            "left_out": {name: train[name] for name in ("same_text", "same_tokens", "same_opening")},
            "recipe": recipe,
            "files": dict(sorted(files.items())),
            "versions": self.versions | {"python": platform.python_version(), "numpy": version("numpy")},
        }

    def _report(self, manifest: dict) -> None:
        """The lines with which a run ends."""
        for stage in ("val", "train"):
            size, tokens = manifest[f"{stage}_bytes"], manifest[f"{stage}_tokens"]
            say(
                f"{stage}: {manifest[f'docs_{stage}']:,} documents, {size:,} bytes, {tokens:,} tokens "
                f"({tokens / max(1, size):.5f} per byte)"
            )
        if any(manifest["left_out"].values()):
            say(
                "left out of training: {same_text:,} documents equal to a validation document, "
                "{same_tokens:,} with equal tokens, {same_opening:,} with an equal opening".format(
                    **manifest["left_out"]
                )
            )
        if not self.has_sidecar and self.table_bytes != manifest["val_bytes"]:
            say(
                f"the tokenizer's byte tables credit {self.table_bytes:,} of {manifest['val_bytes']:,} "
                "validation bytes; give --sidecar to count the raw bytes exactly"
            )
        speed = manifest["train_bytes"] / 1e6 / max(1e-9, self.journal["train"]["seconds"])
        say(
            f"{self.out}: complete, {speed:.1f} MB/s for training documents with "
            f"{self.settings.workers} worker(s), manifest {sha256_file(self.out / MANIFEST)[:16]}"
        )


def prepare(settings: Settings) -> dict:
    """Make the dataset `settings` describes and return its manifest;
    DataError says in one line what is wrong.
    """
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        with open(settings.out / ".lock", "w") as lock:
            _lock(lock, settings.out)
            manifest = Preparation(settings).run()
            (settings.out / ".lock").unlink(missing_ok=True)
        return manifest
    except ShardError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(
            f"{error.filename or settings.out}: {error.strerror or error}; check the path, its permissions "
            "and the free space: the same command goes on where this one stopped"
        ) from None
    except MemoryError:
        raise DataError(
            f"--workers {settings.workers} --batch-mb {settings.batch_mb:g}: memory is short; give less of "
            "either: the same command goes on where this one stopped"
        ) from None


def prove(settings: Settings) -> int:
    """Prove a dataset as `verify_bytes.py --card` does, unless it is proved already; the exit code."""
    import verify_bytes  # not at the top: it imports this module

    try:
        read_proof(settings.out)
        say(f"{settings.out}: already proved ({PROOF})")
        return 0
    except ProofError:
        say(f"{settings.out}: proving it against its documents")
    options = verify_bytes.parse_arguments([str(settings.out), "--card", "--key", settings.key])
    options.documents, options.val = settings.sources, settings.val
    options.workers, options.max_case_lost = settings.workers, settings.max_case_lost
    return verify_bytes.prove(options)


def _lock(file: IO[str], out: Path) -> None:
    try:
        if not environment.lock_file(file):
            say(f"WARNING: {out}: its file system has no locks; see that no other process writes it")
    except BlockingIOError:
        raise DataError(f"{out}: another run is writing here; wait for it or choose another --out") from None


# === COMMAND LINE ===


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        help="documents: .jsonl, .gz, .bz2, .xz, .zst, .parquet files or quoted globs, in this order; "
        "hub:docs for the contest's own, hub:docs@OWNER/NAME for those of another repository",
    )
    add(
        "--out",
        type=Path,
        required=True,
        help="folder for the dataset; a new one, or that of the run to go on with",
    )
    add(
        "--key",
        default="text",
        help="key of the text in a JSON object, or parquet column (default %(default)s)",
    )
    add(
        "--transform",
        choices=sorted(TRANSFORMS),
        default="none",
        help="applied before the tokenizer (default none)",
    )
    add(
        "--max-case-lost",
        type=number_option(float, 0, 1),
        default=MOST_CASE_LOST,
        metavar="SHARE",
        help="accept this share of documents whose capitals normalisation takes away (default %(default)s)",
    )


def _add_validation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("validation set").add_argument
    add(
        "--val",
        action="append",
        default=[],
        metavar="FILE",
        help="take the validation documents from these files instead of the sources (repeatable)",
    )
    add(
        "--val-docs",
        type=number_option(int, 1),
        metavar="N",
        help=f"how many documents (default {STANDARD_VALIDATION:,}; with --val all of them)",
    )
    add("--sidecar", action="store_true", help="write the byte sidecar for --transform none as well")
    add(
        "--keep-duplicates",
        action="store_true",
        help="keep training documents that equal, or start like, a validation document (as the "
        "published exports do; verify_bytes.py will refuse the result)",
    )


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tokenizer").add_argument
    add("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model (default: train one)")
    add("--tokenizer-sha256", metavar="HEX", help="refuse any other model than the one with this sha256")
    add(
        "--tokenizer-model",
        choices=(BPE, UNIGRAM),
        default=BPE,
        help="kind of SentencePiece model for training one (default %(default)s)",
    )
    add(
        "--vocab-size",
        type=number_option(int, 1, 0xFFFF),
        default=8192,
        help="for training one (default %(default)s)",
    )
    add(
        "--tokenizer-docs",
        type=number_option(int, 0),
        default=0,
        metavar="N",
        help="train it on at most the first N training documents (default 0: no such limit)",
    )
    add(
        "--tokenizer-mb",
        type=number_option(float, 0),
        default=100,
        metavar="MB",
        help="and at most the first MB megabytes; 0: no limit, needs much memory (default %(default)s)",
    )
    add(
        "--tokenizer-unit",
        choices=("line", "document"),
        default="line",
        help="what SentencePiece takes for one sentence; it skips those above 4,192 bytes, so with "
        "`document`, as the public tokenizers were made, it learns from short documents only and "
        "needs about 1.5 %% more tokens (default %(default)s)",
    )
    add(
        "--superwords",
        type=number_option(int, 0, 0xFFFF),
        default=0,
        metavar="N",
        help="entries of it that are pieces across spaces, learnt after those of words (default %(default)s)",
    )
    add(
        "--superword-kind",
        choices=KINDS,
        default=WORDS,
        help="what they may join: letters and spaces, any text, or case operators too (default %(default)s)",
    )
    add(
        "--join-digits",
        dest="split_digits",
        action="store_false",
        help="let a piece hold several digits",
    )


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output and machine").add_argument
    add(
        "--shard-tokens",
        type=number_option(int, 1, MOST_SHARD_TOKENS),
        default=STANDARD_SHARD,
        metavar="N",
        help=f"tokens for each shard (default {STANDARD_SHARD:,})",
    )
    add("--name", default="", help="name in the manifest (default: vocabulary size and transform)")
    add(
        "--workers",
        type=number_option(int, 1, 1024),
        default=environment.usable_cores(),
        metavar="N",
        help="processes (default: one for each core, here %(default)s)",
    )
    add(
        "--batch-mb",
        type=number_option(float, 1e-6, 1000),
        default=2,
        metavar="MB",
        help="text handed to a worker at once (default %(default)s)",
    )
    add(
        "--journal-seconds",
        type=number_option(float, 0),
        default=5,
        metavar="S",
        help="how often progress is saved for a later run (default %(default)s)",
    )
    add(
        "--prove",
        action="store_true",
        help="then prove it against the documents, which are read once more, as verify_bytes.py --card does",
    )
    add("--overwrite", action="store_true", help="replace a dataset or unfinished run in --out")
    add(
        "--no-disk-check",
        dest="disk_check",
        action="store_false",
        help="do not ask whether there is enough free space",
    )


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line; exits with usage on a wrong one."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code 0: complete; 1: --prove has refuted it; 2: cannot be done, with one line that says "
        "why and what to do.",
    )
    _add_source_options(parser)
    _add_validation_options(parser)
    _add_tokenizer_options(parser)
    _add_machine_options(parser)
    values = vars(parser.parse_args(arguments))
    for name in ("sources", "val"):
        values[name] = expand(values[name])
    return Settings(**values)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        settings = parse_arguments(arguments)
        prepare(settings)
        return prove(settings) if settings.prove else 0
    except DataError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: interrupted; give the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
