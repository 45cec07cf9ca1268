"""Documents as they come: streamed in batches from JSON lines (plain, gz, bz2, xz, zst) and parquet.

Reading may begin at any record. Every file is read to its proven end, or refused. `hub:docs` is the contest's
own file, read from the hub without being stored.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data.compressed import DECOMPRESSORS, CompressedStream, StreamError
from data.shards import sha256_file

JSON_LINES = (".jsonl", ".json", ".ndjson")
COMPRESSED = tuple(DECOMPRESSORS)
# The opening of a document: enough to recognise a copy that was cut or continued differently.
OPENING_TOKENS = 64
# How the name of a source that is read from the hub begins.
HUB = "hub:"


class DataError(ValueError):
    """Input that cannot be used; the message is one line that names the place and the remedy."""


@dataclass(frozen=True)
class RemoteFile:
    """JSON lines on the hub, read where they are; size, sha256 and records are what the hub and the file's
    own manifest promise, and whoever reads it all proves.
    """

    repository: str
    commit: str
    path: str
    size: int
    sha256: str
    records: int
    suffix = ".jsonl"

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return f"hub:{self.repository}/{self.path}"


SourceFile = Path | RemoteFile


def stored_size(source: SourceFile) -> int:
    """The bytes of a source file, as stored."""
    return source.size if isinstance(source, RemoteFile) else source.stat().st_size


def open_source(source: SourceFile) -> IO[bytes]:
    """A source file for reading, seekable; what the network refuses is a DataError when it is read."""
    if isinstance(source, RemoteFile):
        # Not at the top: the hub client is slow to load, and rarely used.
        from data.stream import RemoteStream

        return io.BufferedReader(RemoteStream(source), 1 << 20)
    return open(source, "rb")


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

    path: SourceFile
    start: Position
    records: list[bytes] | list[str]
    after: Position
    consumed: int  # bytes of the files on disk read so far, for the progress bar


def expand(patterns: Sequence[str]) -> list[SourceFile]:
    """Files for a list of paths, globs and hub:docs[@OWNER/NAME], in the order given (a
    glob's matches sorted); DataError if one has none.
    """
    paths: list[SourceFile] = []
    for pattern in patterns:
        if pattern.startswith(HUB):
            from data.stream import documents_of

            paths.append(documents_of(pattern))
            continue
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
        suffixes = Path(path.name).suffixes[-2:]
        if suffixes[-1:] != [".parquet"] and not (
            suffixes[-1:] and (suffixes[-1] in JSON_LINES or suffixes[-1] in COMPRESSED)
        ):
            raise DataError(
                f"{path}: unknown kind of file; it must end in .jsonl, .gz, .bz2, .xz, .zst or .parquet"
            )
    if len(set(paths)) < len(paths):
        raise DataError("a source file is given twice; its documents would be counted twice")
    return paths


def text_bytes_estimate(path: SourceFile) -> int:
    """About how many bytes of text a file holds; compressed text is taken as 4 times its size on disk."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.ParquetFile(path).metadata
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(path, error) from None
        return sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return stored_size(path) * (4 if path.suffix in COMPRESSED else 1)


def _unreadable(path: SourceFile, error: Exception) -> DataError:
    if isinstance(error, StreamError):
        return DataError(f"{path}: cannot be read: {error}; get this file again")
    reason = str(error).splitlines()[0] if str(error) else "it ends too early"
    return DataError(f"{path}: cannot be read ({type(error).__name__}: {reason}); get this file again")


def _is_arrow_error(error: Exception) -> bool:
    return type(error).__name__.startswith("Arrow")


class _Hashed(io.RawIOBase):
    """A binary file whose content is hashed as it is read."""

    def __init__(self, raw: IO[bytes]):
        self.raw, self.digest = raw, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        count = self.raw.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count


def _open_text(path: SourceFile, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix in COMPRESSED:
        return io.BufferedReader(CompressedStream(raw, path.suffix), 1 << 20)
    return raw


@dataclass(frozen=True)
class Survey:
    """What a source file holds: stored bytes, sha256, records (lines or rows), bytes of text (or None)."""

    size: int
    sha256: str
    records: int
    bytes: int | None


def check_start(path: SourceFile, key: str) -> None:
    """DataError if a source file is empty, of another format, without
    the column, or starts with a bad record.
    """
    try:
        if path.suffix == ".parquet":
            _parquet_table(path, key)
            return
        with open_source(path) as raw:
            _parse_line(path, 0, _open_text(path, raw).readline(), key)
    except (OSError, StreamError) as error:
        raise _unreadable(path, error) from None
    except Exception as error:
        if _is_arrow_error(error):
            raise _unreadable(path, error) from None
        raise


def survey(path: SourceFile, key: str) -> Survey:
    """Read a source file to its proven end, and parse its first and last record; DataError if damaged.

    A file that is cut is refused here, before anything is made of it.
    """
    try:
        if path.suffix == ".parquet":
            table = _parquet_table(path, key)
            return Survey(path.stat().st_size, sha256_file(path), table.metadata.num_rows, None)
        return _survey_lines(path, key)
    except (OSError, StreamError) as error:
        raise _unreadable(path, error) from None
    except Exception as error:
        if _is_arrow_error(error):
            raise _unreadable(path, error) from None
        raise


def _survey_lines(path: SourceFile, key: str) -> Survey:
    with open_source(path) as raw:
        hashed = _Hashed(raw)
        records = size = 0
        last = b""
        for line in _open_text(path, io.BufferedReader(hashed, 1 << 20)):
            if records == 0:
                _parse_line(path, 0, line, key)
            records += 1
            size += len(line)
            last = line
        stored = raw.tell()
    if stored == 0:
        raise DataError(f"{path}: is empty; get this file again, or leave it out")
    _parse_line(path, max(0, records - 1), last, key)
    return Survey(stored, hashed.digest.hexdigest(), records, size)


def _parse_line(path: SourceFile, before: int, line: bytes, key: str) -> None:
    """DataError, with file and line, if a line is neither blank nor a document."""
    place = Position(record=before)
    if line:
        texts_of(Batch(path, place, [line], place, 0), key)


def batches(
    paths: Sequence[SourceFile],
    key: str,
    batch_bytes: int,
    start: Position = Position(),
    limit: int | None = None,
) -> Iterator[Batch]:
    """Batches of about `batch_bytes` from `start` on, at most `limit`
    records that are not blank lines in all.

    DataError for a file that cannot be read to its end.
    """
    sizes = list(map(stored_size, paths))
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
        except (OSError, StreamError) as error:
            raise _unreadable(path, error) from None
        except Exception as error:
            if _is_arrow_error(error):
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


def _line_batches(
    path: SourceFile, key: str, batch_bytes: int, start: Position, before: int
) -> Iterator[Batch]:
    with open_source(path) as raw:
        stream = _open_text(path, raw)
        if stream is raw:
            raw.seek(start.offset)
        else:
            _skip(path, stream, start.offset)
        position = start
        while lines := stream.readlines(batch_bytes):
            after = Position(
                position.file, position.record + len(lines), position.offset + sum(map(len, lines))
            )
            yield Batch(path, position, lines, after, before + raw.tell())
            position = after


def _skip(path: SourceFile, stream: IO[bytes], size: int) -> None:
    left = size
    while left:
        block = stream.read(min(left, 1 << 20))
        if not block:
            raise DataError(
                f"{path}: holds {size - left} bytes of text, but {size} were read before; "
                "bring back the file of the first run, or start again with --overwrite"
            )
        left -= len(block)


def _parquet_table(path: Path, key: str):
    """The open parquet file; DataError if it has no column `key` or one that cannot hold text."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    metadata, schema = table.metadata, table.schema_arrow
    held = sum(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    if held != metadata.num_rows:
        raise DataError(
            f"{path}: its footer promises {metadata.num_rows} rows, its row groups hold {held}; "
            "get this file again"
        )
    if key not in schema.names:
        raise DataError(f"{path}: no column {key!r} (it has {', '.join(schema.names)}); give --key")
    kind = schema.types[schema.names.index(key)]
    stored = kind
    if isinstance(stored, pyarrow.BaseExtensionType):
        stored = stored.storage_type
    if pyarrow.types.is_dictionary(stored):
        stored = stored.value_type
    of_text = ("string", "large_string", "string_view", "null")
    of_bytes = ("binary", "large_binary", "binary_view")
    if str(stored) not in of_text + of_bytes and not pyarrow.types.is_fixed_size_binary(stored):
        raise DataError(f"{path}: column {key!r} is {kind}, expected text; give --key")
    return table


def _parquet_batches(path: Path, key: str, batch_bytes: int, start: Position, before: int) -> Iterator[Batch]:
    table = _parquet_table(path, key)
    size, row = path.stat().st_size, 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row + rows <= start.record:
            row += rows
            continue
        for part in table.iter_batches(batch_size=256, row_groups=[group], columns=[key]):
            texts = [_value(path, row + index, cell) for index, cell in enumerate(part.column(0), 1)]
            skip = max(0, start.record - row)
            if skip < len(texts):
                after = Position(start.file, row + len(texts))
                share = size * after.record // max(1, table.metadata.num_rows)
                yield Batch(path, Position(start.file, row + skip), texts[skip:], after, before + share)
            row += len(texts)
    if row != table.metadata.num_rows:
        raise DataError(f"{path}: {row} rows could be read of {table.metadata.num_rows}; get this file again")


def _value(path: Path, number: int, cell) -> object:
    """The value of a parquet cell of row `number` (from 1), as text where the column holds bytes."""
    try:
        value = cell.as_py()
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from None


def _not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
    )


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
                raise _not_utf8(batch.path, number, error) from None
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
