"""Documents as they come: streamed in batches from JSON lines (plain,
gz, xz, zst) and parquet, resumable anywhere.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

JSON_LINES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".xz", ".zst")
# The opening of a document: enough to recognise a copy that was cut or continued differently.
OPENING_TOKENS = 64


class DataError(ValueError):
    """Input that cannot be used; the message is one line that names the place and the remedy."""


@dataclass(frozen=True)
class Position:
    """A place between two records: the file, the records (lines or
    rows) before it and, for lines, the text bytes.
    """

    file: int = 0
    record: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """Consecutive records of one file: JSON lines (bytes) or texts
    (str), where they start and what comes after.
    """

    path: Path
    start: Position
    records: list[bytes] | list[str]
    after: Position
    consumed: int  # bytes of the files on disk read so far, for the progress bar


def expand(patterns: Sequence[str]) -> list[Path]:
    """Files for a list of paths and globs, in the order given (a
    glob's matches sorted); DataError if one has none.
    """
    paths: list[Path] = []
    for pattern in patterns:
        found = (
            [Path(pattern)]
            if Path(pattern).is_file()
            else [Path(name) for name in sorted(glob.glob(pattern))]
        )
        found = [path for path in found if path.is_file()]
        if not found:
            raise DataError(f"{pattern}: no such file; give existing files or a quoted glob")
        paths += found
    for path in paths:
        suffixes = path.suffixes[-2:]
        if suffixes[-1:] != [".parquet"] and not (
            suffixes[-1:] and (suffixes[-1] in JSON_LINES or suffixes[-1] in COMPRESSED)
        ):
            raise DataError(
                f"{path}: unknown kind of file; it must end in .jsonl, .gz, .xz, .zst or .parquet"
            )
    if len(set(paths)) < len(paths):
        raise DataError("a source file is given twice; its documents would be counted twice")
    return paths


def text_bytes_estimate(path: Path) -> int:
    """About how many bytes of text a file holds; compressed text is taken as 4 times its size on disk."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.ParquetFile(path).metadata
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(path, error) from None
        return sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return path.stat().st_size * (4 if path.suffix in COMPRESSED else 1)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else "it ends too early"
    return DataError(f"{path}: cannot be read ({type(error).__name__}: {reason}); get this file again")


def _open_text(path: Path, raw: IO[bytes]) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if path.suffix == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw), 1 << 20)
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(
            zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20
        )
    return raw


def batches(
    paths: Sequence[Path], key: str, batch_bytes: int, start: Position = Position(), limit: int | None = None
) -> Iterator[Batch]:
    """Batches of about `batch_bytes` from `start` on, at most `limit`
    records that are not blank lines in all.

    DataError for a file that cannot be read to its end.
    """
    sizes = [path.stat().st_size for path in paths]
    for index in range(start.file, len(paths)):
        path = paths[index]
        first = start if index == start.file else Position(index)
        reader = _parquet_batches if path.suffix == ".parquet" else _line_batches
        try:
            for batch in reader(path, key, batch_bytes, first, sum(sizes[:index])):
                if limit is not None:
                    batch, limit = _cut(batch, limit)
                yield batch
                if limit == 0:
                    return
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise _unreadable(path, error) from None
        except Exception as error:
            if type(error).__name__ == "ZstdError" or type(error).__name__.startswith("Arrow"):
                raise _unreadable(path, error) from None
            raise


def _cut(batch: Batch, limit: int) -> tuple[Batch, int]:
    """The batch cut to `limit` records that are not blank, and what is left of the limit after it."""
    number = 0
    for index, record in enumerate(batch.records):
        number += not isinstance(record, bytes) or not record.isspace()
        if number == limit:
            kept = batch.records[: index + 1]
            size = sum(map(len, kept)) if isinstance(record, bytes) else 0
            after = Position(batch.start.file, batch.start.record + index + 1, batch.start.offset + size)
            return Batch(batch.path, batch.start, kept, after, batch.consumed), 0
    return batch, limit - number


def _line_batches(path: Path, key: str, batch_bytes: int, start: Position, before: int) -> Iterator[Batch]:
    with open(path, "rb") as raw:
        stream = _open_text(path, raw)
        if stream is raw:
            raw.seek(start.offset)
        else:
            left = start.offset
            while left and (skipped := len(stream.read(min(left, 1 << 20)))):
                left -= skipped
        position = start
        while lines := stream.readlines(batch_bytes):
            after = Position(
                position.file, position.record + len(lines), position.offset + sum(map(len, lines))
            )
            yield Batch(path, position, lines, after, before + raw.tell())
            position = after


def _parquet_batches(path: Path, key: str, batch_bytes: int, start: Position, before: int) -> Iterator[Batch]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    if key not in table.schema_arrow.names:
        raise DataError(
            f"{path}: no column {key!r} (it has {', '.join(table.schema_arrow.names)}); give --key"
        )
    size, row = path.stat().st_size, 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row + rows <= start.record:
            row += rows
            continue
        for part in table.iter_batches(batch_size=256, row_groups=[group], columns=[key]):
            texts = part.column(0).to_pylist()
            skip = max(0, start.record - row)
            if skip < len(texts):
                after = Position(start.file, row + len(texts))
                share = size * after.record // max(1, table.metadata.num_rows)
                yield Batch(path, Position(start.file, row + skip), texts[skip:], after, before + share)
            row += len(texts)


def texts_of(batch: Batch, key: str) -> list[str]:
    """The documents of a batch without blank lines; DataError with
    file and line (from 1) for the first bad record.
    """
    texts = []
    for number, record in enumerate(batch.records, batch.start.record + 1):
        if isinstance(record, bytes):
            if record.isspace():
                continue
            try:
                record = json.loads(record.decode())
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{batch.path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); "
                    "convert the file to UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{batch.path}:{number}: bad JSON ({error}); repair or remove this line"
                ) from None
            if not isinstance(record, dict) or key not in record:
                raise DataError(
                    f"{batch.path}:{number}: no key {key!r}; every line must be a JSON object with it, "
                    "or give --key"
                )
            record = record[key]
        if not isinstance(record, str):
            raise DataError(
                f"{batch.path}:{number}: {key!r} is {type(record).__name__}, expected text; "
                "repair or remove this record"
            )
        if not record.isascii() and record.encode(errors="replace") != record.encode(errors="surrogatepass"):
            raise DataError(
                f"{batch.path}:{number}: a lone surrogate, which is not Unicode text; "
                "repair or remove this record"
            )
        texts.append(record)
    return texts


def text_hash(text: str) -> bytes:
    """16-byte content hash of a document's raw text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def token_hash(tokens: np.ndarray) -> bytes:
    """16-byte content hash of a document's tokens (uint16, without BOS)."""
    return hashlib.blake2b(tokens, digest_size=16).digest()
