"""How many bytes of raw text each token stands for: the sidecar rule and the table rule."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lossless_caps import TRANSFORMS, CaseOpsError, decode_caseops, original_byte_counts

VERSIONS = {"caseops_v1": 1, "caseops_v3": 3}
MOST = 0xFFFF
RUN = re.compile(r"\s+|\S+")
SPACE = "\u2581"
# Share of the documents of a split whose capitals may be lost: NFKC makes or unmakes letters beside a word
# (the ordinal indicator becomes o, e and an accent one character), in about 1 of 1,000 web documents.
MOST_CASE_LOST = 0.003
# Documents that are looked at together for a character that may lose a capital: nearly all have none.
LOOKED_AT = 8


class CountError(ValueError):
    """A document whose tokens do not account for its bytes; the message is one line."""


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
        raise CountError(
            f"{counts.sum()} bytes in tokens and {dropped} dropped, of a document of {length}: "
            "this tokenizer loses track of its text; use another one"
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


def table_problem(processor) -> str:
    """Why byte tables miscount with this tokenizer, or an empty string.

    Without a piece for a lone space U+2581 becomes three byte pieces, worth three bytes for one space.
    """
    has_bytes = any(processor.is_byte(token) for token in range(processor.vocab_size()))
    if has_bytes and processor.id_to_piece(processor.piece_to_id(SPACE)) != SPACE:
        return "it has byte pieces but no piece for a lone space (U+2581), which is counted as three bytes"
    return ""


def standard_normaliser() -> Callable[[str], str]:
    """SentencePiece's nmt_nfkc, as in every tokenizer that train_tokenizer makes; spaces stay spaces."""
    import sentencepiece

    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, remove_extra_whitespaces=True, escape_whitespaces=False
    ).Normalize


def _units(text: str) -> np.ndarray:
    """The UTF-16 units of `text`, which has no lone surrogate."""
    return np.frombuffer(text.encode("utf-16-le"), dtype="<u2")


class CaseCheck:
    """Finds documents whose capitals a CaseOps transform cannot give back after `normalise`.

    Only characters that the normalisation drops, joins to a letter or makes a letter of can cause that; most
    documents have none, and are not looked at further.
    """

    def __init__(self, transform: str, normalise: Callable[[str], str]):
        self.transform, self.normalise = transform, normalise
        self._risky = self._risky_units() if transform in VERSIONS else None

    def _risky_units(self) -> np.ndarray:
        """For each of the 65,536 units of UTF-16 whether it is, or begins, a character that may matter."""
        risky = np.zeros(1 << 16, dtype=bool)
        for code in (*range(1, 0xD800), *range(0xE000, 0x20000)):
            character = chr(code)
            category = unicodedata.category(character)[0]
            # What NFKC leaves alone needs no closer look, which takes most of the time.
            if category in "LNPSZ" and unicodedata.normalize("NFKC", character) == character:
                continue
            inside = self.normalise(f"x{character}x").removeprefix("x").removesuffix("x")
            if category == "M" or not inside or re.search("[A-Za-z]", inside):
                risky[_units(character)[0]] = True
        return risky

    def count(self, texts: list[str], place: str) -> tuple[int, str]:
        """How many of `texts` lose capitals, and the first of them behind its `place` (empty if none)."""
        lost = []
        for start in range(0, len(texts), LOOKED_AT):
            group = texts[start : start + LOOKED_AT]
            if self._risky is not None and self._risky.take(_units("".join(group))).any():
                lost += [text for text in group if self.loses(text)]
        return len(lost), f"{place}: {lost[0][:60]!r}" if lost else ""

    def loses(self, text: str) -> bool:
        """Whether the decoded tokens of `text` would be neither the text nor its normalised form."""
        if self._risky is None or not self._risky.take(_units(text)).any():
            return False
        code = self.normalise(TRANSFORMS[self.transform][0](text))
        try:
            decoded = decode_caseops(code, VERSIONS[self.transform], normalised=True)
        except CaseOpsError:
            return True
        return decoded not in (text, self.normalise(text))


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
            lead[token] = piece.startswith(SPACE)
            base[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
    return base, lead, boundary


def table_bytes(processor, tokens: np.ndarray, before: int) -> int:
    """Bytes that the tables credit for `tokens` when the token
    `before` precedes them (datasets without a sidecar).
    """
    base, lead, boundary = byte_tables(processor)
    previous = np.concatenate([np.array([before], dtype=tokens.dtype), tokens[:-1]])
    return int(base[tokens].sum() + np.count_nonzero(lead[tokens] & ~boundary[previous]))
