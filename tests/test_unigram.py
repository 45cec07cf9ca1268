"""Unigram tokenizers: whole scores, the word table, and a dataset from documents to its proof."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data.fast_tokenizer import FastTokenizer, load_model
from data.shards import BOS, BPE, UNIGRAM, train_tokenizer
from data.sidecar import encode_with_bytes
from helpers.data_side import refused, run_prepare, verify, with_equal_scores
from lossless_caps import TRANSFORMS
from train_gpt import Canonical

ENCODE, _, SYMBOLS, _ = TRANSFORMS["caseops_v3"]
WORDS = "the of The other In a Paris NASA end. said, 12 313 it 'tis (a) don't iPhone x\u200b \u2581of".split(
    " "
)
ODD = [
    *WORDS,
    *SYMBOLS,
    " ",
    " ",
    "\x00",
    "\n",
    "\u3000",
    "e\u0301",
    "\u0301",
    "\ufb01",
    "\ufdfa",
    "中",
    "😀",
    "\u2581",
]


def corpus(count: int, seed: int) -> list[str]:
    """Random documents, all different."""
    generator = random.Random(seed)
    return [f"{seed}-{number} " + " ".join(generator.choices(WORDS, k=40)) for number in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A unigram tokenizer, and one of the pieces of BPE that often has to choose between equals."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        kind: train_tokenizer(map(ENCODE, corpus(80, 1)), folder / kind, 380, SYMBOLS, model_type=kind)
        for kind in (UNIGRAM, BPE)
    }
    content = with_equal_scores(made[BPE].read_bytes(), SYMBOLS)
    made[BPE].write_bytes(content)
    return {"trained": made[UNIGRAM], "equals": made[BPE]}


def test_scores_are_whole_and_only_those_of_operators_are_0(models):
    processor, model = load_model(models["trained"])
    assert model.trainer_spec.model_type == 1
    assert [piece.piece for piece in model.pieces[4 : 4 + len(SYMBOLS)]] == list(SYMBOLS)
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    assert all(score == round(score) for score in scores.values()) and len(set(scores.values())) > 10
    assert [text for text, score in scores.items() if score >= 0] == list(SYMBOLS)
    assert processor.encode("".join(SYMBOLS)) == list(range(4, 4 + len(SYMBOLS)))


@pytest.mark.parametrize("kind", ["trained", "equals"])
def test_ids_equal_those_of_sentencepiece_and_the_mask_refuses_none(models, kind):
    tokenizer = FastTokenizer(models[kind])
    canonical = Canonical(models[kind])
    assert not tokenizer.refused
    generator = random.Random(4)
    texts = ["".join(generator.choices(ODD, k=generator.randint(0, 60))) for _ in range(150)]
    texts += ["", "the" * 60, "of" * 4000]
    codes = [ENCODE(text) for text in texts + corpus(20, 5)]
    ids, counts = tokenizer.encode_batch(texts + codes)
    parts = np.split(ids, np.cumsum(counts)[:-1])
    for text, part in zip(texts + codes, parts, strict=True):
        assert part.tolist() == tokenizer.processor.encode(text), repr(text)
    for code, part in zip(codes, parts[len(texts) :], strict=True):
        assert canonical.find_refused(np.append(np.uint16(BOS), part))[0] == 0, repr(code)
    for text in texts[:40]:
        _, worth, dropped = encode_with_bytes(tokenizer.processor, "caseops_v3", text)
        assert worth.sum(dtype=np.int64) + dropped == len(text.encode())


def test_a_text_whose_sums_may_not_be_exact_is_left_to_sentencepiece(models, monkeypatch):
    tokenizer = FastTokenizer(models["trained"])
    lowest = min(piece.score for piece in tokenizer.model.pieces)
    assert tokenizer._most_characters * (10 - lowest) <= 2**24
    monkeypatch.setattr(tokenizer, "_most_characters", 40)
    texts = ["a" * 41, "a" * 40, "\ufdfa" * 3, "\ufdfa"]  # the normaliser makes 18 characters of that one
    assert len(tokenizer.processor.normalize(texts[2])) > 40
    assert tokenizer._unusual(texts, [text.encode() for text in texts]) == {0, 2}


def test_a_unigram_dataset_is_proved(tmp_path, capsys):
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus(40, 7)))
    out = tmp_path / "out"
    options = [source, "--out", out, "--val-docs", 10, "--vocab-size", 350, "--transform", "caseops_v3"]
    unigram = ["--tokenizer-model", "unigram"]
    assert run_prepare(*options, *unigram) == 0
    assert "word table" not in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"]["type"] == manifest["recipe"]["tokenizer"]["trained"]["model"] == "unigram"
    code, report = verify(capsys, out, "--documents", source)
    assert code == 0 and report["verdict"] == "proved" and report["not_proved"] == []
    assert "another dataset" in refused(capsys, *options)
    for other in (["--superwords", 25], ["--tokenizer", out / "tokenizer.model"]):
        assert f"does not go with {other[0]}" in refused(capsys, *options, *unigram, *other)
