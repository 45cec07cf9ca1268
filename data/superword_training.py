"""Training of superwords (data/superwords.py): which pairs of tokens to merge across spaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from data.fast_tokenizer import FastTokenizer
from data.jit import compiled
from data.shards import BOS, BPE, train_tokenizer
from data.superwords import JOINED_OPERATORS, NORMAL, SPACE

# SentencePiece's own limit on the characters of a piece.
LONGEST_PIECE = 16
# Pairs kept as candidates for one superword still to be learnt; the rest is counted again when they run out.
CANDIDATES = 40
# Texts that are tokenised at once.
TEXTS = 4096
# What may be part of a superword: pieces of letters alone, any piece of text, and case operators as well.
WORDS, TEXT, OPERATORS = KINDS = ("words", "text", "operators")


# === LEARN ===


def _count_pairs(ids, usable, late, spaced, lengths, longest):
    """The keys (first << 16 | second) of all neighbours in `ids` that may be joined, in order of the text."""
    keys = np.empty(len(ids), np.uint32)
    found = 0
    for place in range(len(ids) - 1):
        first, second = ids[place], ids[place + 1]
        if (
            usable[first]
            and usable[second]
            and (spaced[second] or late[first] or late[second])
            and lengths[first] + lengths[second] <= longest
        ):
            keys[found] = np.uint32(first) << np.uint32(16) | np.uint32(second)
            found += 1
    return keys[:found]


def _join_pair(ids, first, second, joined, gains, losses):
    """Replace the pair in `ids` from left to right, in place; the new length.

    gains[0, p] and gains[1, q] count the new neighbours (p, joined) and (joined, q), losses[0, p] and
    losses[1, q] the old ones (p, first) and (second, q) that are gone.
    """
    read, written = 0, 0
    last = len(ids) - 1
    fresh = False  # whether the token written last is a new one
    while read <= last:
        if read < last and ids[read] == first and ids[read + 1] == second:
            if fresh:
                gains[1, first] -= 1
                gains[1, joined] += 1
            elif written:
                gains[0, ids[written - 1]] += 1
                losses[0, ids[written - 1]] += 1
            if read + 2 <= last:
                gains[1, ids[read + 2]] += 1
                losses[1, ids[read + 2]] += 1
            ids[written] = joined
            read += 2
            fresh = True
        else:
            ids[written] = ids[read]
            read += 1
            fresh = False
        written += 1
    return written


class _Candidates:
    """The most frequent pairs of neighbours that may be joined, with counts that are kept exact.

    A pair that is not among them occurs less than `floor` times.
    """

    def __init__(self, keys: np.ndarray, most: int):
        self.keys, self.counts = np.unique(keys, return_counts=True)
        self.floor = 2
        if len(self.keys) > most:
            self.floor = max(2, int(np.partition(self.counts, -most)[-most]))
        kept = self.counts >= self.floor
        self.keys, self.counts = self.keys[kept], self.counts[kept]

    def best(self) -> tuple[int, int] | None:
        """The most frequent pair (of equals the one with the smallest ids), None if it is below the floor."""
        if not len(self.keys) or self.counts.max() < self.floor:
            return None
        key = int(self.keys[self.counts == self.counts.max()].min())
        return key >> 16, key & 0xFFFF

    def update(self, first: int, second: int, losses: np.ndarray) -> None:
        """Forget the pair, and count off what its neighbours have lost."""
        firsts, seconds = self.keys >> 16, self.keys & 0xFFFF
        before, behind = seconds == first, firsts == second
        self.counts[before] -= losses[0, firsts[before]]
        self.counts[behind] -= losses[1, seconds[behind]]
        self.counts[(firsts == first) & (seconds == second)] = 0

    def add(self, firsts: np.ndarray, seconds: np.ndarray, counts: np.ndarray) -> None:
        """New pairs, of which the frequent ones are kept."""
        kept = counts >= self.floor
        keys = (firsts[kept].astype(np.uint32) << 16) | seconds[kept].astype(np.uint32)
        self.keys = np.concatenate([self.keys, keys])
        self.counts = np.concatenate([self.counts, counts[kept]])


class Learner:
    """Learns superwords from tokens: the most frequent allowed pair of neighbours again and again."""

    def __init__(self, pieces: Sequence[str], usable: np.ndarray, operators: str, most: int):
        """`pieces` are those of the first stage, `usable` (bool) those that may be part of a superword, and
        `most` is how many superwords there can be.
        """
        size = len(pieces) + most
        self.pieces, self.first = list(pieces), len(pieces)
        self.numbers: dict[str, int] = {}
        self.usable, self.late, self.spaced = np.zeros((3, size), bool)
        self.lengths = np.zeros(size, np.int64)
        self.usable[: self.first] = usable
        self.late[: self.first] = [piece in operators for piece in pieces]
        self.spaced[: self.first] = [piece.startswith(SPACE) for piece in pieces]
        self.lengths[: self.first] = [len(piece) for piece in pieces]

    def learn(self, ids: np.ndarray, count: int, longest: int = LONGEST_PIECE) -> list[str]:
        """`count` superwords of at most `longest` characters, best first; fewer if the text has no more.

        `ids` are the tokens (uint16) of the training text, with an unusable one between two texts.
        """
        ids = ids.copy()
        pairs = self._counted(ids, count, longest)
        while len(self.numbers) < count:
            best = pairs.best()
            if best is None:
                pairs = self._counted(ids, count, longest)
                best = pairs.best()
                if best is None:
                    break
            joined = self._number(*best)
            gains, losses = np.zeros((2, 2, len(self.usable)), np.int64)
            ids = ids[: compiled(_join_pair)(ids, *best, joined, gains, losses)]
            pairs.update(*best, losses)
            for side, first, second in ((0, None, joined), (1, joined, None)):
                pairs.add(*self._allowed(gains[side], first, second, longest))
        return self.pieces[self.first :]

    def _counted(self, ids: np.ndarray, count: int, longest: int) -> _Candidates:
        keys = compiled(_count_pairs)(ids, self.usable, self.late, self.spaced, self.lengths, longest)
        return _Candidates(keys, CANDIDATES * (count - len(self.numbers)))

    def _number(self, first: int, second: int) -> int:
        """The id of what two tokens make: that of an equal superword if there is one."""
        piece = self.pieces[first] + self.pieces[second]
        number = self.numbers.get(piece)
        if number is None:
            number = self.numbers[piece] = len(self.pieces)
            self.pieces.append(piece)
            self.usable[number] = self.late[number] = True
            self.spaced[number] = piece.startswith(SPACE)
            self.lengths[number] = len(piece)
        return number

    def _allowed(
        self, gains: np.ndarray, first: int | None, second: int | None, longest: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the new neighbours of a superword (the side that is None) those that may be joined to it."""
        other = np.flatnonzero((gains > 0) & self.usable)
        known = first if second is None else second
        other = other[self.lengths[other] + self.lengths[known] <= longest]
        same = np.full(len(other), known)
        return (same, other, gains[other]) if second is None else (other, same, gains[other])


# === TRAIN ===


def usable_pieces(model: sentencepiece_model_pb2.ModelProto, kind: str) -> np.ndarray:
    """(V,) bool: which pieces may be part of a superword of `kind`; byte pieces and symbols never."""
    usable = np.zeros(len(model.pieces), dtype=bool)
    for token, piece in enumerate(model.pieces):
        if piece.type == NORMAL:
            usable[token] = kind != WORDS or piece.piece.replace(SPACE, "").isalpha() or piece.piece == SPACE
        else:
            usable[token] = kind == OPERATORS and piece.piece in JOINED_OPERATORS
    return usable


def tokens_of(tokenizer: FastTokenizer, texts: Iterable[str]) -> np.ndarray:
    """The tokens (uint16) of all texts, each behind BOS."""
    texts = iter(texts)
    parts = [np.zeros(0, np.uint16)]
    while block := list(islice(texts, TEXTS)):
        ids, counts = tokenizer.encode_batch(block)
        parts.append(np.insert(ids, np.cumsum(counts) - counts, BOS))
    return np.concatenate(parts)


def with_superwords(content: bytes, superwords: Iterable[str], operators: str = "") -> bytes:
    """The SentencePiece BPE model `content` with further pieces behind all others, in id and in rank.

    `operators` become ordinary characters, since SentencePiece joins a user-defined symbol to nothing.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    lowest = min(piece.score for piece in model.pieces)
    for piece in model.pieces:
        if piece.piece in operators:
            piece.type = NORMAL
    for rank, text in enumerate(superwords, 1):
        model.pieces.add(piece=text, score=lowest - rank, type=NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    kept = [symbol for symbol in model.trainer_spec.user_defined_symbols if symbol not in operators]
    model.trainer_spec.user_defined_symbols[:] = kept
    return model.SerializeToString(deterministic=True)


def add_superwords(path: Path, texts: Iterable[str], count: int, kind: str, longest: int) -> int:
    """Give the model in `path`, trained on `texts`, up to `count` superwords of `kind` learnt from them; how
    many it got. 1,024 from 54 MB of text take about 15 seconds.
    """
    tokenizer = FastTokenizer(path)
    operators = JOINED_OPERATORS if kind == OPERATORS else ""
    pieces = [piece.piece for piece in tokenizer.model.pieces]
    learner = Learner(pieces, usable_pieces(tokenizer.model, kind), operators, count)
    found = learner.learn(tokens_of(tokenizer, texts), count, longest)
    path.write_bytes(with_superwords(path.read_bytes(), found, operators))
    return len(found)


def train_with_superwords(
    texts: Iterable[str],
    prefix: Path,
    vocab_size: int,
    operators: Sequence[str],
    superwords: int = 0,
    kind: str = WORDS,
    split_digits: bool = True,
    longest: int = LONGEST_PIECE,
    model_type: str = BPE,
) -> Path:
    """train_tokenizer, of whose `vocab_size` entries up to `superwords` are superwords of `kind`, of at most
    `longest` characters (of BPE alone); the texts are kept in memory if there are any.
    """
    if superwords:
        texts = list(texts)
    path = train_tokenizer(texts, prefix, vocab_size - superwords, operators, split_digits, model_type)
    if superwords:
        add_superwords(path, texts, superwords, kind, longest)
    return path
