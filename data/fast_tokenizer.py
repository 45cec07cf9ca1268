"""SentencePiece ids several times faster: a word table in numpy that refuses every model it is not exact for.

Why it is exact. A SentencePiece model normalises text by longest-match rules, escapes spaces as U+2581 and
then joins pieces of its vocabulary. Where no rule and no piece spans a place in the text, what stands left of
it cannot influence the ids to the right of it. That holds in front of every space when no piece has an inner
U+2581, and between two ASCII characters that are adjacent in no piece ("d" and "," for example), and at both
sides of a case operator that stands next to such a character. A unigram model compares sums of scores from
the start of the text, which is the same as comparing those of the segment if all sums are exact: whole
numbers below 2**24. So text is cut at those places and the ids of each segment are looked up by its exact
bytes. `refusal` checks everything this argument uses on the model itself; a model that fails is encoded by
SentencePiece alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data.superwords import Superwords, learnt_after_words
from lossless_caps import OPERATORS

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
# Two 64-bit words hold a segment of up to 15 bytes and, in the top byte, whether a space leads it.
SHORT = 15
LONGEST = 4096
BLOCK_BYTES = 1 << 20
# 2**21 rows of 32 bytes: with the ids they refer to, at most about 100 MB for each process.
SMALLEST_TABLE, LARGEST_TABLE = 1 << 16, 1 << 21
MOST_LONG_SEGMENTS = 200_000
# Of a piece of a unigram model: with this one, texts of 8,000 characters are still looked up.
LARGEST_SCORE = 2048
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
LEAD_BIT = np.uint64(1 << 63)


def load_model(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, sentencepiece_model_pb2.ModelProto]:
    """The processor and the parsed model of a SentencePiece file; ValueError if it is not one."""
    model = sentencepiece_model_pb2.ModelProto()
    content = Path(path).read_bytes()
    try:
        model.ParseFromString(content)
        if not model.pieces:
            raise ValueError("it has no pieces")
        return sentencepiece.SentencePieceProcessor(model_proto=content), model
    except Exception as error:
        raise ValueError(
            f"{path}: not a SentencePiece model ({type(error).__name__}: {error}); "
            "give the .model file of a tokenizer"
        ) from None


class NormalisationRules:
    """The longest-match rules of a precompiled normalisation map (a
    double-array trie, then the NUL-ended results).
    """

    def __init__(self, charsmap: bytes):
        size = int.from_bytes(charsmap[:4], "little")
        units = np.frombuffer(charsmap[4 : 4 + size], dtype="<u4").astype(np.int64)
        self.results = charsmap[4 + size :]
        self._units = units
        self._labels = units & (0x80000000 | 0xFF)
        self._bases = np.arange(len(units)) ^ ((units >> 10) << ((units & (1 << 9)) >> 6))

    def _child(self, node: int, letter: int) -> int:
        """The node that `letter` leads to, or 0 (the root, which is nobody's child)."""
        child = int(self._bases[node]) ^ letter
        return child if child < len(self._units) and self._labels[child] == letter else 0

    def result(self, source: bytes) -> bytes | None:
        """What the rule for exactly `source` puts in its place (UTF-8), None if there is no such rule."""
        node = 0
        for letter in source if len(self._units) else b"":
            node = self._child(node, letter)
            if not node:
                return None
        if not node or not self._units[node] >> 8 & 1:
            return None
        start = int(self._units[self._bases[node]] & 0x7FFFFFFF)
        return self.results[start : self.results.index(b"\0", start)]

    def longest_result(self) -> int:
        """The most characters that a rule puts in the place of one or more."""
        return max(len(result.decode()) for result in self.results.split(b"\0"))

    def spans(self, first: bytes) -> bool:
        """Whether some rule has an ASCII byte after its first byte,
        or any byte after a first byte out of `first`.
        """
        starts = np.array([node for letter in first if (node := self._child(0, letter))], dtype=np.int64)
        deep = self._reachable[self._reachable != 0]
        return bool((self._labels[self._children(deep)] < 128).any() or len(self._children(starts)))

    def contain(self, text: bytes) -> bool:
        """Whether `text` (at least one byte) is part of the source of some rule."""
        nodes = self._reachable
        for letter in text:
            nodes = self._children(nodes)
            nodes = nodes[self._labels[nodes] == letter]
        return bool(len(nodes))

    def _children(self, nodes: np.ndarray) -> np.ndarray:
        """All children of `nodes`. Seen from their end: a unit is a
        child of each node with base unit ^ own label.
        """
        bases = np.zeros(len(self._units) + 256, dtype=bool)
        found = self._bases[nodes]
        bases[found[found < len(bases)]] = True
        return self._lettered[bases[self._lettered ^ self._labels[self._lettered]]]

    @cached_property
    def _lettered(self) -> np.ndarray:
        return np.flatnonzero((self._labels >= 1) & (self._labels <= 255))

    @cached_property
    def _reachable(self) -> np.ndarray:
        seen = np.zeros(len(self._units), dtype=bool)
        nodes = np.arange(min(1, len(self._units)))
        while len(nodes):
            seen[nodes] = True
            nodes = self._children(nodes)
            nodes = nodes[~seen[nodes]]
        return np.flatnonzero(seen)


def space_bytes(rules: NormalisationRules) -> bytes:
    """The ASCII characters that the normaliser treats as a space."""
    return b" " + bytes(code for code in range(1, 128) if rules.result(bytes((code,))) == b" ")


def refusal(model: sentencepiece_model_pb2.ModelProto, rules: NormalisationRules) -> str:
    """Why the word table would not be exact for this model, or an empty string if it is."""
    trainer, normaliser = model.trainer_spec, model.normalizer_spec
    pieces = [piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)]
    spaces = space_bytes(rules)
    if trainer.model_type not in (BPE, UNIGRAM):
        return "the model is neither BPE nor Unigram"
    if trainer.model_type == UNIGRAM:
        if any(piece.type != NORMAL for piece in pieces):
            return "a Unigram model with user-defined or unused symbols"
        if any(piece.score % 1 or abs(piece.score) > LARGEST_SCORE for piece in pieces):
            return (
                "Unigram scores are not small whole numbers, so ties depend on how sums are rounded; "
                "--tokenizer-model unigram trains one whose are"
            )
    if not trainer.byte_fallback:
        return "no byte fallback"
    if trainer.treat_whitespace_as_suffix or normaliser.add_dummy_prefix:
        return "spaces as suffix or a dummy prefix"
    if not (normaliser.remove_extra_whitespaces and normaliser.escape_whitespaces):
        return "extra spaces are kept or not escaped"
    if any(
        SPACE in piece.piece[1:] or any(space in piece.piece.encode() for space in spaces) for piece in pieces
    ):
        return "a piece has a space inside"
    if any(piece.type == USER_DEFINED and piece.piece.startswith(SPACE) for piece in pieces):
        return "a user-defined symbol starts with a space"
    if rules.result(SPACE.encode()) != b" " or SPACE.encode() in rules.results:
        return "U+2581 in the text is not treated as a space"
    if any(rules.result(letter.encode()) is not None for letter in PRINTABLE):
        return "the normaliser rewrites printable ASCII"
    if rules.spans(spaces):
        return "a normalisation rule spans ASCII characters"
    return ""


class FastTokenizer:
    """Ids of a SentencePiece model, equal to `encode` of the library;
    `refused` says why the plain path is used.
    """

    def __init__(self, path: Path, fast: bool = True):
        self.processor, self.model = load_model(path)
        self.vocab_size = self.processor.vocab_size()
        rules = NormalisationRules(self.model.normalizer_spec.precompiled_charsmap)
        model = self.model
        self._superwords = None
        if fast and model.trainer_spec.model_type == BPE and learnt_after_words(model):
            self._superwords = Superwords(model)
            model = self._superwords.first_stage
        self.refused = refusal(model, rules) if fast else "not wanted"
        if self.refused:
            return
        self._pieces = [piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)]
        # What splits words; the plain path needs the whole model.
        self._splitter = self.processor
        if self._superwords is not None:
            self._splitter = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self._symbols = self._lone_symbols(rules)
        self._pairs = self._pair_table(space_bytes(rules))
        self._prefix = len(self._splitter.encode("a"))
        # Of a text whose sums of scores are exact: an unknown character costs 10 more than any piece.
        lowest = min(piece.score for piece in self.model.pieces)
        self._most_characters = (
            int(2**24 / (10 - lowest)) if self.model.trainer_spec.model_type == UNIGRAM else 2**62
        )
        self._longest_result = rules.longest_result()
        self._low_mask = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(SHORT + 1)], dtype=np.uint64)
        self._high_mask = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(SHORT + 1)], dtype=np.uint64)
        self._clear()

    def _lone_symbols(self, rules: NormalisationRules) -> list[tuple[str, str]]:
        """User-defined symbols and operators of one character that nothing else contains, and the character
        of one byte that stands for each here.
        """
        everything = "".join(piece.piece for piece in self._pieces)
        symbols = [
            piece.piece
            for piece in self._pieces
            if (piece.type == USER_DEFINED or piece.piece in OPERATORS[3])
            and len(piece.piece) == 1
            and not piece.piece.isascii()
            and everything.count(piece.piece) == 1
            and not rules.contain(piece.piece.encode())
        ]
        return [(symbol, chr(code)) for code, symbol in enumerate(symbols[:8], 1)]

    def _pair_table(self, spaces: bytes) -> np.ndarray:
        """uint8 (65536,), by byte + 256 * next: 1 = a word starts at
        the next byte, 2 = cut, 4 = a segment ends.
        """
        adjacent = {
            pair for piece in self._pieces for pair in zip(piece.piece[:-1], piece.piece[1:], strict=True)
        }
        table = np.zeros((256, 256), dtype=np.uint8)
        is_space = np.zeros(256, dtype=bool)
        is_space[list(spaces)] = True
        table[np.ix_(~is_space, is_space)] = 1
        table[np.ix_(is_space, ~is_space)] = 4
        letters = PRINTABLE + "".join(code for _, code in self._symbols)
        for left in letters:
            for right in letters:
                if (left, right) not in adjacent:
                    table[ord(right), ord(left)] = 2 | 4
        return table.ravel()

    def _clear(self) -> None:
        self._table = np.full((SMALLEST_TABLE, 4), EMPTY, dtype=np.uint64)
        self._used = 0
        self._ids = np.zeros(1 << 16, dtype=np.uint16)
        self._ids_used = 0
        self._long: dict[bytes, int] = {}

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids of `texts` one after another (uint16) and the number of ids of each text (int64).

        UnicodeEncodeError if a text has a lone surrogate.
        """
        parts, counts = [np.zeros(0, dtype=np.uint16)], [np.zeros(0, dtype=np.int64)]
        block: list[bytes] = []
        block_texts: list[str] = []
        size = 0
        for text in texts:
            block.append(text.encode())
            block_texts.append(text)
            size += len(block[-1])
            if size >= BLOCK_BYTES:
                part, count = self._encode_block(block_texts, block)
                parts.append(part)
                counts.append(count)
                block, block_texts, size = [], [], 0
        if block:
            part, count = self._encode_block(block_texts, block)
            parts.append(part)
            counts.append(count)
        return np.concatenate(parts), np.concatenate(counts)

    def _encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.processor.encode(text), dtype=np.uint16) for text in texts]

    def _encode_block(self, texts: list[str], encoded: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if self.refused:
            plain = self._encode_plain(texts)
            return np.concatenate(plain), np.array([len(ids) for ids in plain], dtype=np.int64)
        slow = self._unusual(texts, encoded)
        data = [b"" if index in slow else part for index, part in enumerate(encoded)] if slow else encoded
        if self._symbols:
            data = [
                part if text.isascii() or not part else self._with_codes(text)
                for text, part in zip(texts, data, strict=True)
            ]
        buffer = np.frombuffer(b" " + b" ".join(data) + b" " * 17, dtype=np.uint8)
        text_starts = np.cumsum([1] + [len(part) + 1 for part in data])
        length = int(text_starts[-1])
        kinds = self._pairs.take(np.ndarray(length, "<u2", buffer, strides=(1,)))
        cuts = np.flatnonzero((kinds & 2) != 0)
        # A combining character may change the letter before it, and with it the pair that was looked up.
        kinds[cuts[buffer[cuts + 2] >= 128]] = 0
        starts = np.flatnonzero((kinds & 3) != 0)
        lengths = np.flatnonzero((kinds & 4) != 0) - starts
        lead = (kinds[starts] & 1).astype(bool)
        starts += 1
        borders = np.searchsorted(starts, text_starts)
        first = borders[:-1][borders[:-1] < borders[1:]]
        lead[first] = False
        values = np.empty(len(starts), dtype=np.uint64)
        short = lengths <= SHORT
        if short.all():
            values = self._look_up_short(buffer, starts, lengths, lead)
        else:
            values[short] = self._look_up_short(buffer, starts[short], lengths[short], lead[short])
            for index in np.flatnonzero(~short).tolist():
                values[index] = self._look_up_long(buffer, starts[index], lengths[index], lead[index])
        counts = (values & np.uint64(0xFFFF)).astype(np.int64)
        begins = (values >> np.uint64(16)).astype(np.int64)
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        ids = self._ids.take(np.repeat(begins - ends[:-1], counts) + np.arange(ends[-1]))
        # A segment that normalises to nothing may leave the next word
        # without its space: SentencePiece decides.
        slow.update((np.searchsorted(borders, np.flatnonzero(counts == 0), side="right") - 1).tolist())
        token_borders = ends[borders]
        if self._superwords is not None:
            ids, joined, refused = self._superwords.join(ids, np.diff(token_borders))
            token_borders = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(joined)])
            slow.update(np.flatnonzero(refused).tolist())
        if self._used > LARGEST_TABLE // 2 or len(self._long) > MOST_LONG_SEGMENTS:
            self._clear()
        if not slow:
            return ids, np.diff(token_borders)
        per_text = np.split(ids, token_borders[1:-1])
        for index in slow:
            per_text[index] = self._encode_plain([texts[index]])[0]
        return np.concatenate(per_text), np.array([len(ids) for ids in per_text], dtype=np.int64)

    def _unusual(self, texts: list[str], encoded: list[bytes]) -> set[int]:
        """The texts that take the plain path: NUL pads the keys, other bytes stand for symbols, and sums of
        scores of very long texts are not exact.
        """
        taken = ["\0", *(code for _, code in self._symbols)]
        slow = set()
        for index, (text, part) in enumerate(zip(texts, encoded, strict=True)):
            others = len(part) - len(text)  # as many characters as are not ASCII, or more
            if len(text) + self._longest_result * others > self._most_characters:
                slow.add(index)
        together = b" ".join(encoded)
        for code in taken:
            if code.encode() in together:
                slow.update(index for index, text in enumerate(texts) if code in text)
        return slow

    def _with_codes(self, text: str) -> bytes:
        """The UTF-8 of a text in which one byte stands for each lone symbol."""
        for symbol, code in self._symbols:
            text = text.replace(symbol, code)
        return text.encode()

    def _encode_segments(self, segments: list[bytes], lead: Sequence[bool]) -> list[list[int]]:
        """Ids of each segment; a leading space is restored behind an "a", whose ids are then removed."""
        together = b"\0".join(segments).decode()
        for symbol, code in self._symbols:
            together = together.replace(code, symbol)
        texts = [
            f"a {segment}" if space else segment
            for segment, space in zip(together.split("\0"), lead, strict=True)
        ]
        return [
            ids[self._prefix :] if space else ids
            for ids, space in zip(self._splitter.encode(texts, num_threads=1), lead, strict=True)
        ]

    def _store(self, encoded: list[list[int]]) -> np.ndarray:
        """Append the ids of segments to the common array; the packed
        value (begin << 16 | count) of each, uint64.
        """
        counts = np.array([len(ids) for ids in encoded], dtype=np.int64)
        flat = np.array([token for ids in encoded for token in ids], dtype=np.uint16)
        while self._ids_used + len(flat) > len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[self._ids_used : self._ids_used + len(flat)] = flat
        begins = self._ids_used + np.cumsum(counts) - counts
        self._ids_used += len(flat)
        return (begins << 16 | counts).astype(np.uint64)

    def _look_up_long(self, buffer: np.ndarray, start: int, length: int, lead: bool) -> int:
        segment = buffer[start : start + length].tobytes()
        key = b" " + segment if lead else segment
        value = self._long.get(key)
        if value is None:
            value = int(self._store(self._encode_segments([segment], [lead]))[0])
            self._long[key] = value
        return value

    def _look_up_short(
        self, buffer: np.ndarray, starts: np.ndarray, lengths: np.ndarray, lead: np.ndarray
    ) -> np.ndarray:
        """Packed values (uint64) of segments of at most SHORT bytes, after adding those not met before."""
        words = np.ndarray(len(buffer) - 7, "<u8", buffer, strides=(1,))
        low = words[starts] & self._low_mask.take(lengths)
        high = words[starts + 8] & self._high_mask.take(lengths)
        high |= lead.astype(np.uint64) << np.uint64(63)
        values = self._find(low, high)
        missing = np.flatnonzero(values == EMPTY)
        if len(missing):
            keys = np.stack([low[missing], high[missing]], axis=1)
            _, index = np.unique(keys.view("V16").ravel(), return_index=True)
            new = missing[index]
            segments = [
                buffer[start : start + length].tobytes()
                for start, length in zip(starts[new].tolist(), lengths[new].tolist(), strict=True)
            ]
            self._insert(
                low[new], high[new], self._store(self._encode_segments(segments, lead[new].tolist()))
            )
            values[missing] = self._find(low[missing], high[missing])
        return values

    def _slots(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        mixed = low * np.uint64(0x9E3779B97F4A7C15) ^ high * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        return (mixed >> np.uint64(40)).astype(np.int64) & (len(self._table) - 1)

    def _find(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        slots = self._slots(low, high)
        rows = self._table.take(slots, axis=0)
        values = rows[:, 2].copy()
        wrong = np.flatnonzero(((rows[:, 0] != low) | (rows[:, 1] != high)) & (values != EMPTY))
        slots = slots[wrong]
        while len(wrong):
            slots = (slots + 1) & (len(self._table) - 1)
            rows = self._table.take(slots, axis=0)
            values[wrong] = rows[:, 2]
            again = np.flatnonzero(
                ((rows[:, 0] != low[wrong]) | (rows[:, 1] != high[wrong])) & (rows[:, 2] != EMPTY)
            )
            wrong, slots = wrong[again], slots[again]
        return values

    def _insert(self, low: np.ndarray, high: np.ndarray, values: np.ndarray) -> None:
        self._used += len(low)
        if 2 * self._used > len(self._table):
            old = self._table[self._table[:, 2] != EMPTY]
            size = len(self._table)
            while 2 * self._used > size:
                size *= 2
            self._table = np.full((size, 4), EMPTY, dtype=np.uint64)
            low, high, values = (
                np.concatenate([old[:, column], new]) for column, new in enumerate((low, high, values))
            )
        slots = self._slots(low, high)
        pending = np.arange(len(low))
        while len(pending):
            free = np.flatnonzero(self._table[slots[pending], 2] == EMPTY)
            taken, index = np.unique(slots[pending[free]], return_index=True)
            winners = pending[free[index]]
            self._table[taken, 0], self._table[taken, 1] = low[winners], high[winners]
            self._table[taken, 2] = values[winners]
            pending = np.setdiff1d(pending, winners, assume_unique=True)
            slots[pending] = (slots[pending] + 1) & (len(self._table) - 1)
