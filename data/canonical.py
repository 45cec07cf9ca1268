#!/usr/bin/env python3
"""Which token can follow which: the table of a BPE tokenizer, built from the model alone, and its proof.

    python data/canonical.py data/datasets/mine [--out table.npy]

A tokenizer gives one of many spellings of a text. After token a it can never emit token b where it would
have joined their parts otherwise, so a model may refuse b there at no risk. Exact for SentencePiece's BPE,
which works on the whole text: if a and b are neighbours in the result, no merge has crossed the outer borders
of the two, hence all merges inside happened in the order that they have when the text of a and b is encoded
alone. So the pair can occur exactly if that gives [a, b] back. The proof looks at every pair of neighbours in
every shard.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import environment

environment.enter()
import argparse
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data.documents import DataError
from data.fast_tokenizer import load_model
from data.jit import compiled
from data.options import Parser
from data.shards import BOS, ShardError, read_shard

BLOCK = 1 << 24
NONE = np.float32(-np.inf)
BPE = 2  # SentencePiece's number for the kind of model


class Trace(NamedTuple):
    """How a token comes about when its text is encoded alone: the score of each merge in order, and
    the symbols at the left and the right end before the first merge and after each.
    """

    scores: list[float]
    left: list[str]
    right: list[str]


def trace(text: str, scores: dict[str, float]) -> Trace | None:
    """The merges that SentencePiece's BPE makes of `text`, or None if they do not end in one symbol.

    The pair with the highest score first, the leftmost of equals.
    """
    symbols = list(text)
    found = Trace([], [symbols[0]], [symbols[-1]])
    while len(symbols) > 1:
        joined = [scores.get(first + second) for first, second in pairwise(symbols)]
        possible = [score for score in joined if score is not None]
        if not possible:
            return None
        best = joined.index(max(possible))
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
        found.scores.append(max(possible))
        found.left.append(symbols[0])
        found.right.append(symbols[-1])
    return found


def _fill(allowed, tokens, steps, scores, left, right, joined):
    """Set allowed[a, b] for all pairs of `tokens`, playing both traces together as for the text of the two.

    joined[r, l] is the score of the piece that the symbols r and l make, -inf if there is none.
    """
    for first in tokens:
        for second in tokens:
            i, j, good = 0, 0, True
            while True:
                across = joined[right[first, i], left[second, j]]
                of_first = scores[first, i]
                of_second = scores[second, j]
                # A merge within the first token is further left, and so goes before its equals.
                if across > of_first and across >= of_second:
                    good = False
                    break
                if i == steps[first] and j == steps[second]:
                    break
                if of_first >= of_second:
                    i += 1
                else:
                    j += 1
            allowed[first, second] = good


def canonical_table(path: Path) -> np.ndarray:
    """(V, V) bool: whether the tokenizer in `path` can emit token b (column) after token a (row).

    Byte pieces, the unknown token and symbols that are never merged are allowed beside all that can occur;
    pad and end of text, and pieces that no text is encoded to, nowhere. DataError unless the model is BPE.
    """
    _, model = load_model(path)
    if model.trainer_spec.model_type != BPE:
        raise DataError(
            f"{path}: is no BPE model, for which alone the table is exact; give another tokenizer"
        )
    kinds = dict(type(model.pieces[0]).Type.items())
    merged = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds["NORMAL"]}
    traces, free = {}, []
    for token, piece in enumerate(model.pieces):
        if piece.type == kinds["NORMAL"]:
            found = trace(piece.piece, merged)
            if found is not None:
                traces[token] = found
        elif piece.type in (kinds["BYTE"], kinds["UNKNOWN"], kinds["USER_DEFINED"]) or token == BOS:
            free.append(token)
    table = np.zeros((len(model.pieces),) * 2, dtype=bool)
    tokens = np.array(sorted(traces), dtype=np.int64)
    compiled(_fill)(table, tokens, *_arrays(len(model.pieces), traces, merged))
    live = np.zeros(len(model.pieces), dtype=bool)
    live[[*traces, *free]] = True
    table[free, :] |= live
    table[:, free] |= live[:, None]
    return table


def _numbered(symbols: Iterable[str]) -> dict[str, int]:
    return {symbol: number for number, symbol in enumerate(sorted(set(symbols)))}


def _arrays(size: int, traces: dict[int, Trace], merged: dict[str, float]) -> tuple[np.ndarray, ...]:
    """The traces as arrays (V, steps + 1) and the scores of joined symbols (symbols, symbols)."""
    rights = _numbered(symbol for found in traces.values() for symbol in found.right)
    lefts = _numbered(symbol for found in traces.values() for symbol in found.left)
    longest = max((len(found.scores) for found in traces.values()), default=0)
    steps = np.zeros(size, np.int64)
    scores = np.full((size, longest + 1), NONE, np.float32)
    left, right = np.zeros((2, size, longest + 1), np.int32)
    for token, found in traces.items():
        count = steps[token] = len(found.scores)
        scores[token, :count] = found.scores
        left[token, : count + 1] = [lefts[symbol] for symbol in found.left]
        right[token, : count + 1] = [rights[symbol] for symbol in found.right]
    joined = np.full((len(rights), len(lefts)), NONE, np.float32)
    for piece, score in merged.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in rights and piece[cut:] in lefts:
                joined[rights[piece[:cut]], lefts[piece[cut:]]] = score
    return steps, scores, left, right, joined


def refused_pairs(table: np.ndarray, values: np.ndarray, before: int) -> tuple[int, str]:
    """How many tokens of `values` the table refuses after their predecessors (`before`: the first one's),
    and the first of them.
    """
    count, example = 0, ""
    for start in range(0, len(values), BLOCK):
        tokens = np.asarray(values[start : start + BLOCK])
        previous = np.concatenate([np.array([before], tokens.dtype), tokens[:-1]])
        wrong = np.flatnonzero(~table[previous, tokens])
        if len(wrong) and not example:
            place = wrong[0]
            example = f"token {start + place}: {tokens[place]} after {previous[place]}"
        count += len(wrong)
        before = int(tokens[-1])
    return count, example


def check(folder: Path, table: np.ndarray) -> tuple[int, int]:
    """Tokens in all shards of a dataset, and the pairs that are refused; DataError if a shard has one."""
    tokens = 0
    for kind in ("train", "val"):
        before = BOS
        for path in sorted(folder.glob(f"fineweb_{kind}_[0-9]*.bin")):
            values = read_shard(path)
            refused, example = refused_pairs(table, values, before)
            if refused:
                raise DataError(
                    f"{path}: {refused:,} pairs that the table refuses, first {example}; the shards are not "
                    "what this tokenizer gives"
                )
            before = int(values[-1]) if len(values) else before
            tokens += len(values)
    return tokens, int((~table).sum())


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if no pair of any shard is refused, 2 after a one-line error."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder with tokenizer.model and shards")
    parser.add_argument("--tokenizer", type=Path, help="another SentencePiece model")
    parser.add_argument("--out", type=Path, help="write the table as .npy, packed to bits along its rows")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        table = canonical_table(options.tokenizer or options.dataset / "tokenizer.model")
        built = time.monotonic() - began
        tokens, refused = check(options.dataset, table)
        if options.out:
            np.save(options.out, np.packbits(table, axis=1))
    except (DataError, ShardError, ValueError, OSError) as error:
        print(f"canonical: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.dataset}: {refused / table.size:.1%} of {table.size:,} pairs cannot occur, and none of "
        f"them is among the {tokens:,} tokens of the shards (built in {built:.1f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
