"""Superwords: pieces that cross a space, learnt after the pieces of words and applied after them.

The two stages are those of SuperBPE (Liu et al., 2025): pairs are merged within words until most of the
vocabulary is used, then pairs of the tokens so far are merged across spaces. Here both stages are one
SentencePiece model like any other. The score of a BPE piece is its rank, so SentencePiece makes every merge
of the first stage before any of the second, and a word is split as if there were no superwords. These follow
from the tokens of the words alone, which makes them fast to apply; a token's bytes are still those of its
text.
"""

from __future__ import annotations

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from data.jit import compiled
from lossless_caps import ALLCAPS, LOWER, TITLE

SPACE = "\u2581"
NORMAL, CONTROL = 1, 3
# The operators that stand between two words. The others stand within one, or change what the next one means.
JOINED_OPERATORS = TITLE + ALLCAPS + LOWER
# Tokens in a row that superwords may cross; a longer run, which no prose has, is left to SentencePiece.
LONGEST_RUN = 256


def _apply(ids, ends, starts, seconds, joined, ranks, longest_run, counts, refused):
    """Join the tokens `ids` of all texts in place, which `ends` (one for each text) divide; the new length.

    The neighbours first, second are crossed by a superword if `second` is among seconds[starts[first] :
    starts[first + 1]] (ascending); joined there is the superword that the two make, or 0. Sets counts[text]
    to the tokens left, and refused[text] where a run of crossed neighbours is longer than `longest_run`.
    """

    def slot(first, second):
        low, high = starts[first], starts[first + 1]
        while low < high:
            middle = (low + high) // 2
            if seconds[middle] < second:
                low = middle + 1
            else:
                high = middle
        return low if low < starts[first + 1] and seconds[low] == second else -1

    run = np.empty(longest_run, np.int64)
    slots = np.empty(longest_run, np.int64)
    read, written = 0, 0
    for text in range(len(ends)):
        before = written
        while read < ends[text]:
            run[0] = ids[read]
            length = 1
            while read + length < ends[text]:
                place = slot(run[length - 1], np.int64(ids[read + length]))
                if place < 0:
                    break
                if length == longest_run:
                    refused[text] = True
                    break
                slots[length - 1] = place
                run[length] = ids[read + length]
                length += 1
            read += length
            while length > 1:
                best, lowest = -1, len(ranks)
                for pair in range(length - 1):
                    if slots[pair] >= 0 and joined[slots[pair]] and ranks[joined[slots[pair]]] < lowest:
                        best, lowest = pair, ranks[joined[slots[pair]]]
                if best < 0:
                    break
                run[best] = joined[slots[best]]
                length -= 1
                for pair in range(best + 1, length):
                    run[pair] = run[pair + 1]
                    slots[pair - 1] = slots[pair]
                if best:
                    slots[best - 1] = slot(run[best - 1], run[best])
                if best + 1 < length:
                    slots[best] = slot(run[best], run[best + 1])
            for pair in range(length):
                ids[written] = run[pair]
                written += 1
        counts[text] = written - before
    return written


class Superwords:
    """The superwords of a model, joined from the tokens of its first stage as SentencePiece would do."""

    def __init__(self, model: sentencepiece_model_pb2.ModelProto):
        self.late = [token for token, piece in enumerate(model.pieces) if _is_superword(piece)]
        self.first_stage = sentencepiece_model_pb2.ModelProto()
        self.first_stage.CopyFrom(model)
        for token in self.late:
            # Not matched in any text, and every other piece keeps its id.
            self.first_stage.pieces[token].type = CONTROL
        self._starts, self._seconds, self._joined, self._ranks = self._table(model)

    def _table(self, model: sentencepiece_model_pb2.ModelProto) -> tuple[np.ndarray, ...]:
        numbers = {piece.piece: token for token, piece in enumerate(model.pieces) if piece.type == NORMAL}
        late = set(self.late)
        pairs: dict[tuple[int, int], int] = {}
        for token in self.late:
            text = model.pieces[token].piece
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                before = [numbers.get(left[start:], -1) for start in range(cut)]
                behind = [numbers.get(right[:end], -1) for end in range(1, len(right) + 1)]
                for first in before:
                    for second in behind:
                        if first >= 0 and second >= 0 and first not in late and second not in late:
                            pairs.setdefault((first, second), 0)
                if left in numbers and right in numbers:
                    pairs[numbers[left], numbers[right]] = token
        keys = sorted(pairs)
        firsts = np.array([first for first, _ in keys], np.int64)
        order = sorted(self.late, key=lambda token: -model.pieces[token].score)
        ranks = np.zeros(len(model.pieces), np.int64)
        ranks[order] = np.arange(len(order))
        return (
            np.searchsorted(firsts, np.arange(len(model.pieces) + 1)),
            np.array([second for _, second in keys], np.int64),
            np.array([pairs[key] for key in keys], np.int64),
            ranks,
        )

    def join(self, ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens (uint16) and token counts of texts after the second stage, and which texts (bool) have a
        run of tokens that is too long for this way, so that theirs are wrong.
        """
        ids, ends = ids.copy(), np.cumsum(counts)
        joined, refused = np.empty(len(counts), np.int64), np.zeros(len(counts), bool)
        table = self._starts, self._seconds, self._joined, self._ranks
        length = compiled(_apply)(ids, ends, *table, LONGEST_RUN, joined, refused)
        return ids[:length], joined, refused


def _is_superword(piece: sentencepiece_model_pb2.ModelProto.SentencePiece) -> bool:
    if piece.type != NORMAL or len(piece.piece) == 1:
        return False
    return SPACE in piece.piece[1:] or any(operator in piece.piece for operator in JOINED_OPERATORS)


def crosses_spaces(model: sentencepiece_model_pb2.ModelProto) -> bool:
    """Whether a piece of the model has a space inside, which tables of bytes by piece count as three."""
    return any(piece.type == NORMAL and SPACE in piece.piece[1:] for piece in model.pieces)


def learnt_after_words(model: sentencepiece_model_pb2.ModelProto) -> bool:
    """Whether a BPE model has superwords, all of them of lower rank than any other piece that is merged."""
    late = [piece.score for piece in model.pieces if _is_superword(piece)]
    words = [
        piece.score
        for piece in model.pieces
        if piece.type == NORMAL and len(piece.piece) > 1 and not _is_superword(piece)
    ]
    return bool(late) and max(late) < min(words, default=0) and len(set(late)) == len(late)
