"""How many bytes of raw text each token stands for: the sidecar rule and the table rule."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lossless_caps import TRANSFORMS, original_byte_counts

VERSIONS = {"caseops_v1": 1, "caseops_v3": 3}
MOST = 0xFFFF
RUN = re.compile(r"\s+|\S+")


def encode_with_bytes(processor, transform: str, text: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids (uint16) of a raw text, the raw bytes each accounts
    for (uint16) and the raw bytes that none does.

    Uncounted are the spaces, and characters without a form, that SentencePiece drops at either
    end of a document; the counts and these always add up to the UTF-8 length of the text.
    """
    code = TRANSFORMS[transform][0](text)
    pieces = processor.encode(code, return_type="proto").pieces
    ids = np.fromiter((piece.id for piece in pieces), dtype=np.uint16, count=len(pieces))
    length = len(text.encode())
    if not len(ids):
        return ids, ids, length
    if transform in VERSIONS:
        counts = np.asarray(
            original_byte_counts([piece.surface for piece in pieces], VERSIONS[transform]), np.int64
        )
        dropped = pieces[0].begin + len(code.encode()) - pieces[-1].end
    else:
        ends = np.fromiter((piece.end for piece in pieces), dtype=np.int64, count=len(pieces))
        begins = np.fromiter((piece.begin for piece in pieces), dtype=np.int64, count=len(pieces))
        if transform == "casefold" and not text.isascii():
            totals = np.concatenate([np.zeros(1, np.int64), np.cumsum(folded_weights(text))])
            begins, ends = totals[begins], totals[ends]
        counts = ends - begins
        dropped = length - int(ends[-1] - begins[0])
    if int(counts.sum()) + dropped != length:
        raise AssertionError(
            f"{counts.sum()} bytes in tokens and {dropped} dropped, of a document of {length}"
        )
    return ids, _fit(counts), dropped


def folded_weights(text: str) -> np.ndarray:
    """Raw bytes that each UTF-8 byte of casefold(text) stands for (int64); they add up to the raw length.

    Characters are followed one by one where folding treats them so,
    else run by run (composition, final sigma).
    """
    fold = TRANSFORMS["casefold"][0]
    weights = []
    for run in RUN.findall(text):
        folded = fold(run)
        parts = [run] if run.isascii() or "".join(map(fold, run)) != folded else list(run)
        weights += [_spread(part, fold(part)) for part in parts]
    result = np.concatenate(weights) if weights else np.zeros(0, np.int64)
    if len(result) != len(fold(text).encode()):
        result = _spread(text, fold(text))
    return result


def _spread(raw: str, folded: str) -> np.ndarray:
    raw_length, length = len(raw.encode()), len(folded.encode())
    weights = (np.arange(length) < raw_length).astype(np.int64)
    weights[-1] += max(0, raw_length - length)
    return weights


def _fit(counts: np.ndarray) -> np.ndarray:
    """The counts as uint16; what one token cannot hold (a run of 65,536 spaces) goes to its neighbours."""
    if counts.max() > MOST:
        if counts.sum() > MOST * len(counts):
            raise OverflowError(
                "more bytes than the sidecar's 16 bits can hold for this document; split the document"
            )
        for order in (range(len(counts)), range(len(counts) - 1, -1, -1)):
            excess = 0
            for index in order:
                excess += int(counts[index])
                counts[index] = min(excess, MOST)
                excess -= int(counts[index])
            counts[order[-1]] += excess
    return counts.astype(np.uint16)


@lru_cache(maxsize=4)
def byte_tables(processor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token id: bytes without the leading space (int64), has a leading space, is a boundary (bool)."""
    size = processor.vocab_size()
    base, lead, boundary = np.zeros(size, np.int64), np.zeros(size, bool), np.zeros(size, bool)
    for token in range(size):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            boundary[token] = True
        elif processor.is_byte(token):
            base[token] = 1
        else:
            piece = processor.id_to_piece(token)
            lead[token] = piece.startswith("\u2581")
            base[token] = len(piece.removeprefix("\u2581").encode())
    return base, lead, boundary


def table_bytes(processor, tokens: np.ndarray, before: int) -> int:
    """Bytes that the tables credit for `tokens` when the token
    `before` precedes them (datasets without a sidecar).
    """
    base, lead, boundary = byte_tables(processor)
    previous = np.concatenate([np.array([before], dtype=tokens.dtype), tokens[:-1]])
    return int(base[tokens].sum() + np.count_nonzero(lead[tokens] & ~boundary[previous]))
