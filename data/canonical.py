#!/usr/bin/env python3
"""What a tokenizer can write after what: the mask of CANONICAL_MASK=1, and the proof that it is exact.

    python data/canonical.py data/datasets/mine [--out table.npy]
    python data/canonical.py --tokenizer M.model --documents corpus.jsonl.xz --transform caseops_v3

The mask is made from the tokenizer alone (section CANONICAL of train_gpt.py says how, and why it is exact).
The proof looks at every token of every shard, or of documents that are tokenised on the way.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import environment

environment.enter()
import argparse
import time
from collections.abc import Iterator

import numpy as np

from data.documents import DataError, batches, expand, texts_of
from data.fast_tokenizer import FastTokenizer
from data.options import Parser
from data.shards import BOS, ShardError, read_shard
from lossless_caps import TRANSFORMS
from train_gpt import Canonical, Stop

BLOCK = 1 << 24
BATCH_BYTES = 4 << 20


def dataset_parts(folder: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """(where it is from, its first token, tokens) of every block of all shards of a dataset."""
    for kind in ("train", "val"):
        for path in sorted(folder.glob(f"fineweb_{kind}_[0-9]*.bin")):
            values = read_shard(path)
            for start in range(0, len(values), BLOCK):
                yield str(path), start, values[start : start + BLOCK]


def document_parts(
    sources: list[Path], key: str, transform: str, tokenizer: Path
) -> Iterator[tuple[str, int, np.ndarray]]:
    """As dataset_parts for documents, which are made tokens as prepare.py does."""
    encode = TRANSFORMS[transform].encode
    encoder = FastTokenizer(tokenizer)
    for batch in batches(expand([str(source) for source in sources]), key, BATCH_BYTES):
        ids, lengths = encoder.encode_batch([encode(text) for text in texts_of(batch, key)])
        tokens = np.insert(ids, np.cumsum(lengths) - lengths, BOS)
        yield f"{batch.path}, record {batch.start.record} and further", 0, tokens


def prove(canonical: Canonical, parts: Iterator[tuple[str, int, np.ndarray]]) -> int:
    """How many tokens the parts have; DataError at the first one that the mask refuses."""
    count = 0
    row = BOS
    for place, start, tokens in parts:
        refused, first, after = canonical.find_refused(tokens, row)
        if refused:
            before = tokens[first - 1] if first else "those before"
            raise DataError(
                f"{place}: {refused:,} tokens that the mask refuses, first token {start + first}: "
                f"{tokens[first]} after {before}; this tokenizer has not written them"
            )
        count += len(tokens)
        row = after
    return count


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The options; ends the program if neither a dataset nor a tokenizer is given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", help="folder with tokenizer.model and shards")
    parser.add_argument("--tokenizer", type=Path, help="another SentencePiece model")
    parser.add_argument("--documents", type=Path, nargs="+", default=[], help="text as for prepare.py")
    parser.add_argument("--key", default="text", help="the field of the documents' text")
    parser.add_argument("--transform", choices=TRANSFORMS, default="none", help="what is done to it first")
    parser.add_argument("--out", type=Path, help="write the table as .npy, packed to bits along its rows")
    options = parser.parse_args(arguments)
    if options.dataset is None and options.tokenizer is None:
        parser.error("give the folder of a dataset, or --tokenizer")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if no token is refused, 2 after a one-line error."""
    options = parse_arguments(arguments)
    tokenizer = options.tokenizer or options.dataset / "tokenizer.model"
    began = time.monotonic()
    try:
        canonical = Canonical(tokenizer)
        built = time.monotonic() - began
        count = 0
        if options.dataset:
            count += prove(canonical, dataset_parts(options.dataset))
        if options.documents:
            parts = document_parts(options.documents, options.key, options.transform, tokenizer)
            count += prove(canonical, parts)
        if options.out:
            np.save(options.out, canonical.table)
    except (DataError, ShardError, Stop, ValueError, OSError) as error:
        print(f"canonical: {error}", file=sys.stderr)
        return 2
    size = len(canonical.kinds)
    share = 1 - np.bitwise_count(canonical.table[:size]).sum() / size**2
    print(
        f"{tokenizer}: {share:.1%} of {size**2:,} pairs cannot occur, "
        f"and none of {count:,} tokens is refused (built in {built:.1f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
