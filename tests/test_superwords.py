"""data/superwords.py and its training: what SentencePiece makes of the model, what plain counting learns."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data import superword_training, superwords
from data.fast_tokenizer import FastTokenizer, load_model
from data.shards import BOS
from data.sidecar import byte_tables, encode_with_bytes
from data.superword_training import KINDS, Learner, train_with_superwords
from helpers.data_side import refused, run_prepare, verify
from lossless_caps import TRANSFORMS, decode_caseops
from train_gpt import Canonical

ENCODE, _, SYMBOLS, _ = TRANSFORMS["caseops_v3"]
WORDS = "the of The in a Paris NASA end. said, 12 3 it 'tis (a) x\u200b e\u0301 don't iPhone \u2581of".split(
    " "
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The texts are so small that compiling would take longer."""
    for module in (superwords, superword_training):
        monkeypatch.setattr(module, "compiled", lambda function: function)


def corpus(count: int, seed: int) -> list[str]:
    """Random documents with many frequent neighbours."""
    generator = random.Random(seed)
    weights = [2.0 ** -(place / 3) for place in range(len(WORDS))]
    return [f"{seed}-{n} " + " ".join(generator.choices(WORDS, weights, k=40)) for n in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """By kind of superword: a tokenizer of 380 entries of which 40 are superwords."""
    folder, found = tmp_path_factory.mktemp("superwords"), {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (superwords, superword_training):
            patch.setattr(module, "compiled", lambda function: function)
        for kind in KINDS:
            texts = map(ENCODE, corpus(60, 1))
            found[kind] = train_with_superwords(texts, folder / kind, 380, SYMBOLS, 40, kind)
            assert len(load_model(found[kind])[1].pieces) == 380
    return found


def plainly_learnt(ids: list[int], pieces: list[str], usable: list[bool], count: int) -> list[str]:
    """The superwords, with all pairs counted anew for each."""
    pieces, usable, found = list(pieces), list(usable), []
    while len(found) < count:
        pairs: Counter = Counter()
        for first, second in pairwise(ids):
            joined = pieces[first] + pieces[second]
            if usable[first] and usable[second] and "\u2581" in joined[1:] and len(joined) <= 16:
                pairs[first, second] += 1
        # The same token twice in a row, three times: two pairs that overlap.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        joined = pieces[best[0]] + pieces[best[1]]
        if joined not in found:
            found.append(joined)
            pieces.append(joined)
            usable.append(True)
        token, place = pieces.index(joined), 0
        while place < len(ids) - 1:
            if (ids[place], ids[place + 1]) == best:
                ids[place : place + 2] = [token]
            place += 1
    return found


@pytest.mark.parametrize("candidates", [1, 40])
def test_the_learner_takes_the_most_frequent_pair_each_time(monkeypatch, candidates):
    monkeypatch.setattr(superword_training, "CANDIDATES", candidates)
    generator = random.Random(3)
    pieces = ["", "a", "\u2581a", "\u2581b", "b", "\u2581"]
    usable = [False, True, True, True, True, True]
    ids = generator.choices(range(6), [1, 2, 5, 4, 2, 1], k=1500)
    learner = Learner(pieces, np.array(usable), "", 40)
    found = learner.learn(np.array(ids, np.uint16), 40)
    assert found == plainly_learnt(ids, pieces, usable, 40) and len(found) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_sentencepiece(models, kind, monkeypatch):
    monkeypatch.setattr(superwords, "LONGEST_RUN", 12)  # some of the texts are left to SentencePiece
    tokenizer = FastTokenizer(models[kind])
    assert not tokenizer.refused
    generator = random.Random(4)
    odd = [*WORDS, *SYMBOLS, "\x00", "\n", "\u3000", "e\u0301", "\ufb01", "中", "the of the of"]
    texts = ["".join(generator.choices([*odd, " ", " "], k=generator.randint(0, 60))) for _ in range(150)]
    texts += ["the of " * 50, ""]
    codes = [ENCODE(text) for text in texts + corpus(40, 5)]
    ids, counts = tokenizer.encode_batch(texts + codes)
    parts = np.split(ids, np.cumsum(counts)[:-1])
    for text, part in zip(texts + codes, parts, strict=True):
        assert part.tolist() == tokenizer.processor.encode(text), repr(text)
    tokens = np.concatenate([np.append(np.uint16(BOS), part) for part in parts[len(texts) :]])
    assert (tokens >= len(tokenizer.model.pieces) - 40).sum() > 100
    assert Canonical(models[kind]).find_refused(tokens, BOS)[0] == 0


def test_superwords_of_higher_rank_than_words_take_the_plain_path(models):
    path = models["words"]
    _, model = load_model(path)
    model.pieces[-1].score = 1.0
    other = path.with_name("mixed.model")
    other.write_bytes(model.SerializeToString())
    assert "a piece has a space inside" in FastTokenizer(other).refused


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_is_counted_once(models, kind):
    processor, _ = load_model(models[kind])
    for text in [*corpus(30, 6), " The  of\n\nThe of \ue001 the \ue004of the", "the of the "]:
        ids, counts, dropped = encode_with_bytes(processor, "caseops_v3", text)
        assert counts.sum(dtype=np.int64) + dropped == len(text.encode())
        decoded = decode_caseops(processor.decode(ids.tolist()), 3, normalised=True)
        assert decoded == processor.normalize(text).replace("\u2581", " ")
    base, lead, _ = byte_tables(processor)
    token = processor.piece_to_id("\u2581of\u2581the")
    assert base[token] == len("of the") and lead[token]


def test_a_dataset_with_superwords_is_proved(tmp_path, capsys):
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus(40, 7)))
    out = tmp_path / "out"
    options = [source, "--out", out, "--val-docs", 10, "--vocab-size", 350]
    assert run_prepare(*options, "--superwords", 25) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    trained = manifest["recipe"]["tokenizer"]["trained"]
    assert manifest["val_sidecar"] and trained["superwords"] == 25 and trained["superword_kind"] == "words"
    code, report = verify(capsys, out, "--documents", source)
    assert code == 0 and report["verdict"] == "proved" and report["not_proved"] == []
    assert "another dataset" in refused(capsys, *options)
    assert "give fewer" in refused(capsys, *options, "--superwords", 350)
    model = out / "tokenizer.model"
    assert "leave --tokenizer" in refused(capsys, *options, "--superwords", 9, "--tokenizer", model)
    other = [*options, "--tokenizer", model, "--tokenizer-sha256", "0" * 64]
    assert "get it again" in refused(capsys, *other)
