"""The texts that bench/data.py and bench/tokenizers.py measure on."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data import demo
from data.prepare import LONGEST_SENTENCE

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
TRAINING_MB = 53.6
HELD_OUT_WEB = 4.7e6


def documents(name: str, megabytes: float) -> list[str]:
    """Texts from the start of a file of the shared data, about so many MB of UTF-8."""
    texts, left = [], megabytes * 1e6
    with lzma.open(SHARED / name, "rt", encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            left -= len(texts[-1].encode())
            if left <= 0:
                break
    return texts


def size(texts: Iterable[str]) -> int:
    """UTF-8 bytes of all texts."""
    return sum(len(text.encode()) for text in texts)


def table_texts(megabytes: float) -> tuple[list[str], list[str]]:
    """Training texts (about so many MB) and held-out texts (5.92 MB) of every table of tokens per byte.

    Held out are the FineWeb validation documents and the end of the web pages; the rest of these and then
    prose is for training.
    """
    web = documents("web.jsonl.xz", 1000)
    held_out, left = documents("fineweb_val_head.jsonl.xz", 1000), HELD_OUT_WEB
    while left > 0:
        held_out.append(web.pop())
        left -= len(held_out[-1].encode())
    return web + documents("prose.jsonl.xz", max(0.1, megabytes - size(web) / 1e6)), held_out


def embedded_texts() -> tuple[list[str], list[str]]:
    """Training and held-out texts of the embedded corpus, which every installation has."""
    corpus = demo.split(demo.collect(demo.inventory(demo.default_roots())))
    return list(corpus.training), list(corpus.validation)


def lines_of(texts: Iterable[str], encode: Callable[[str], str]) -> Iterator[str]:
    """The lines of transformed texts that SentencePiece does not skip, as data/prepare.py uses them."""
    for text in texts:
        for line in encode(text).splitlines():
            if len(line.encode()) <= LONGEST_SENTENCE:
                yield line
