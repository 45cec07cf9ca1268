"""Compressed text read to its proven end: gzip, bzip2, xz and Zstandard, of any number of parts.

The readers of the libraries stop silently at some damage: Zstandard's at a frame that is cut, Python's own at
a broken second xz or bzip2 stream, all of them at an empty file. Here the last part must be whole, and what
follows a part must be another one, as `zstd -t` and `xz -t` demand.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol

CHUNK = 1 << 15
# As much as `zstd --long=31` makes necessary; the library's own limit refuses such files.
LARGEST_WINDOW = 1 << 31


class StreamError(ValueError):
    """A compressed stream that is cut or damaged; the message says where, without the file's name."""


class Decompressor(Protocol):
    """What all decompressors have in common: one compressed part from its start to its end."""

    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes) -> bytes:
        """The text that more compressed bytes give."""


def _gzip() -> Decompressor:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _xz() -> Decompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ)


def _zstandard() -> Decompressor:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {
    ".gz": _gzip,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": _xz,
    ".zst": _zstandard,
}
# Zero bytes may stand behind a part: any number in gzip (tapes), a multiple of four in xz.
PADDING = {".gz": 1, ".xz": 4}


class CompressedStream(io.RawIOBase):
    """The text inside `raw`, a binary file whose format `suffix` names; StreamError if it is damaged."""

    def __init__(self, raw: io.BufferedIOBase, suffix: str):
        self._raw, self._suffix = raw, suffix
        self._part: Decompressor | None = None
        self._parts = self._read = self._zeros = 0
        self._rest, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: bytearray) -> int:
        """Fill `buffer` with text; the bytes put there, 0 at the proven end."""
        more = True
        while more and not self._text:
            more = self._advance()
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def _advance(self) -> bool:
        """Work on the next compressed bytes; whether there were any."""
        data, self._rest = self._rest, b""
        if not data:
            data = self._raw.read(CHUNK)
            self._read += len(data)
        at_end = not data
        if self._part is None:
            data = self._without_padding(data, at_end)
        if at_end:
            self._check_end()
            return False
        if data:
            self._decompress(data)
        return True

    def _without_padding(self, data: bytes, at_end: bool) -> bytes:
        unit = PADDING.get(self._suffix)
        if unit is None or self._parts == 0:
            return data
        part = data.lstrip(b"\0")
        self._zeros += len(data) - len(part)
        if (part or at_end) and self._zeros % unit:
            raise StreamError(f"{self._zeros} zero bytes behind part {self._parts}, not a multiple of {unit}")
        if part:
            self._zeros = 0
        return part

    def _check_end(self) -> None:
        if self._part is not None:
            raise StreamError(
                f"it ends inside its compressed part {self._parts + 1}, after {self._read} bytes"
            )
        if self._parts == 0:
            raise StreamError("it is empty")

    def _decompress(self, data: bytes) -> None:
        if self._part is None:
            self._part = DECOMPRESSORS[self._suffix]()
        try:
            self._text = memoryview(self._part.decompress(data))
        except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise self._damaged(error) from None
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise self._damaged(error) from None
        if self._part.eof:
            self._rest = self._part.unused_data
            self._part = None
            self._parts += 1

    def _damaged(self, error: Exception) -> StreamError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return StreamError(
            f"its compressed part {self._parts + 1} is damaged within the first {self._read} bytes ({reason})"
        )
