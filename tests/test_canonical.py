"""data/canonical.py: the table against the tokenizer itself, for every pair, and against shards."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data.canonical import canonical_table, main, trace
from data.fast_tokenizer import load_model
from data.shards import BOS, read_shard, train_tokenizer, write_shard
from lossless_caps import TRANSFORMS

OPERATORS = TRANSFORMS["caseops_v3"][2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A BPE tokenizer of 420 entries whose text has runs, repeated letters and operators."""
    generator = random.Random(4)
    words = [
        "aaaa",
        "aab",
        "banana",
        "the",
        "then",
        "hen",
        "ana",
        "nab",
        "--",
        "----",
        "xé",
        "1",
        "22",
        "222",
    ]
    words += [f"{operator}the" for operator in OPERATORS]
    texts = [" ".join(generator.choices(words, k=12)) + generator.choice("!?.") * 3 for _ in range(400)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("model") / "small", 420, OPERATORS)


def as_it_is(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The same tokenizer without normalisation, so that any text of pieces can be encoded."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    rules = proto.normalizer_spec
    rules.name, rules.precompiled_charsmap, rules.remove_extra_whitespaces = "identity", b"", False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_the_table_is_what_the_tokenizer_does_with_every_pair(model):
    table, processor = canonical_table(model), as_it_is(model)
    pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    special = [
        processor.is_control(token) or processor.is_byte(token) or processor.is_unknown(token)
        for token in range(len(pieces))
    ]
    tokens = [token for token in range(len(pieces)) if not special[token]]
    texts = [(pieces[first] + pieces[second]).replace("\u2581", " ") for first in tokens for second in tokens]
    wanted = [[first, second] for first in tokens for second in tokens]
    real = [ids == pair for ids, pair in zip(processor.encode(texts), wanted, strict=True)]
    found = table[np.ix_(tokens, tokens)]
    assert (found == np.array(real).reshape(found.shape)).all()
    assert 100 < (~found).sum() < found.size / 2


def test_what_is_never_emitted_and_what_always_may_be(model):
    table, (processor, _) = canonical_table(model), load_model(model)
    assert not table[:, [processor.pad_id(), processor.eos_id()]].any()
    byte = next(token for token in range(processor.vocab_size()) if processor.is_byte(token))
    letter = processor.piece_to_id("a")
    assert table[BOS, letter] and table[letter, BOS] and table[byte, letter] and table[letter, byte]
    assert trace("ab", {}) is None and trace("a", {}).right == ["a"]


def dataset(folder: Path, model: Path) -> Path:
    """Three documents in two training shards and a validation shard."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    texts = ("aaab banana then 2222 ----- the", "the hen nab ana 中 xé")
    tokens = np.array([i for text in texts for i in [BOS, *processor.encode(text)]], dtype="<u2")
    for name, part in (("train_000000", tokens[:7]), ("train_000001", tokens[7:]), ("val_000000", tokens)):
        write_shard(folder / f"fineweb_{name}.bin", part)
    return folder


def test_shards_prove_the_table_and_other_tokens_are_named(model, tmp_path, capsys):
    folder = dataset(tmp_path / "data", model)
    assert main([str(folder), "--out", str(tmp_path / "table.npy")]) == 0
    assert "cannot occur, and none of them is among" in capsys.readouterr().out
    table = canonical_table(model)
    packed = np.load(tmp_path / "table.npy")
    assert (np.unpackbits(packed, axis=1, count=len(table)).astype(bool) == table).all()
    # The first token of the second shard follows the last of the first.
    tokens = np.array(read_shard(folder / "fineweb_train_000001.bin"))
    last = int(read_shard(folder / "fineweb_train_000000.bin")[-1])
    tokens[0] = np.flatnonzero(~table[last])[-1]
    write_shard(folder / "fineweb_train_000001.bin", tokens)
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"token 0: {tokens[0]} after {last}" in error and error.count("\n") == 1


def test_a_model_that_is_not_bpe_is_refused(model, tmp_path, capsys):
    folder = dataset(tmp_path / "data", model)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    proto.trainer_spec.model_type = 1
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert main([str(folder)]) == 2 and "is no BPE model" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2 and "tokenizer.model" in capsys.readouterr().err
