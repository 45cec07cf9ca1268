"""The mask of what a tokenizer cannot write: against the tokenizer itself, in scores, and against shards."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2

import train_gpt as t
from data.canonical import main
from data.fast_tokenizer import NormalisationRules, load_model
from data.shards import BOS, BPE, UNIGRAM, read_shard, train_tokenizer, write_shard
from helpers.data_side import with_equal_scores
from helpers.trainer import replace
from lossless_caps import CLOSERS, SENTENCE_ENDS, TRANSFORMS, WHITESPACE

OPERATORS = TRANSFORMS["caseops_v3"].operators
WORDS = "aaaa aab banana the then hen ana nab -- ---- xé 1 22 222".split()
# What the normaliser joins, drops, or makes letters, capitals, spaces and ends of sentences of.
ODD = [
    "º",
    "™",
    "ﬁ",
    "…",
    "\U0001f100",
    "e\u0301",
    "a\u0327",
    "\u0301",
    "\u0001",
    "\u061c",
    "\u00a8",
    "中",
    "😀",
]
ODD += ["The", "THE", "nAb", "HENs", ". ", '?" ', " . ", ". the", "25ºC", *OPERATORS, *WHITESPACE, *CLOSERS]
ODD += list(SENTENCE_ENDS[:12])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """By kind a tokenizer whose text has runs, repeated letters and operators."""
    generator = random.Random(4)
    words = WORDS + [f"{operator}the" for operator in OPERATORS]
    texts = [" ".join(generator.choices(words, k=12)) + generator.choice("!?.") * 3 for _ in range(400)]
    folder = tmp_path_factory.mktemp("models")
    made = {
        kind: train_tokenizer(texts, folder / kind, 420, OPERATORS, model_type=kind)
        for kind in (BPE, UNIGRAM)
    }
    made["equals"] = folder / "equals.model"
    made["equals"].write_bytes(with_equal_scores(made[BPE].read_bytes(), OPERATORS))
    return made


@pytest.fixture(scope="module")
def model(models) -> Path:
    """The BPE tokenizer."""
    return models[BPE]


@pytest.fixture(scope="module")
def canonical(model) -> t.Canonical:
    """Its mask."""
    return t.Canonical(model)


@pytest.fixture(scope="module")
def processor(model) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def unpacked(table: np.ndarray, size: int) -> np.ndarray:
    """Rows of bits as (rows, size) bool."""
    return np.unpackbits(table, axis=1, count=size, bitorder="little").astype(bool)


def follows(canonical: t.Canonical, tokens: list[int]) -> np.ndarray:
    """(V,) bool: what may come after a text of `tokens`."""
    row = canonical.rows(np.array([BOS, *tokens]))[-1]
    return unpacked(canonical.table[row][None], len(canonical.kinds))[0]


def as_it_is(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The same tokenizer without normalisation, so that any text of pieces can be encoded."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    rules = proto.normalizer_spec
    rules.name, rules.precompiled_charsmap, rules.remove_extra_whitespaces = "identity", b"", False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


# === AGAINST THE TOKENIZER ===


@pytest.mark.parametrize("kind", [BPE, "equals"])
def test_pairs_are_what_the_tokenizer_does_with_every_pair(kind, models):
    processor = as_it_is(models[kind])
    vocabulary = t.read_vocabulary(models[kind])
    texts = [text.replace("\u2581", " ") for text in vocabulary.texts]
    alone = [token for token, text in enumerate(texts) if text and processor.encode(text) == [token]]
    wanted = [[first, second] for first in alone for second in alone]
    spelled = processor.encode([texts[first] + texts[second] for first, second in wanted])
    real = np.array([ids == pair for ids, pair in zip(spelled, wanted, strict=True)])
    table = unpacked(t.pair_table(vocabulary), len(texts))
    assert (table[np.ix_(alone, alone)] == real.reshape(len(alone), -1)).all()
    assert 100 < (~real).sum() < real.size / 2
    never = np.setdiff1d(vocabulary.where(bool).nonzero()[0], alone)
    assert not table[:, never].any() and (len(never) > 0) == (kind == "equals")


def test_merges_are_those_of_the_text_alone():
    assert t.find_merges("ab", {}) is None and t.find_merges("a", {}).right == ["a"]
    found = t.find_merges("aab", {"aa": -1.0, "ab": -2.0, "aab": -3.0})
    assert found == ([-1.0, -3.0], ["a", "aa", "aab"], ["b", "b", "aab"])


@pytest.mark.parametrize(
    "kind, transform",
    [
        (BPE, "caseops_v1"),
        (BPE, "caseops_v3"),
        (BPE, "none"),
        (UNIGRAM, "caseops_v3"),
        ("equals", "caseops_v3"),
    ],
)
def test_no_text_is_refused(kind, transform, models, monkeypatch):
    """Texts of all that makes trouble; with the operators of another version there is another grammar."""
    processor, _ = load_model(models[kind])
    canonical = t.Canonical(models[kind])
    assert t.case_version(canonical.vocabulary) == 3
    if transform != "caseops_v3":
        version = {"caseops_v1": 1, "none": 0}[transform]
        monkeypatch.setattr(t, "case_version", lambda vocabulary: version)
        monkeypatch.setattr(t, "read_vocabulary", lambda path: canonical.vocabulary)
        canonical = t.Canonical(Path())
    generator = random.Random(7)
    encode = TRANSFORMS[transform].encode
    texts = [
        "".join(
            generator.choice(ODD if generator.random() < 0.6 else WORDS) + " " * (generator.random() < 0.3)
            for _ in range(generator.randint(1, 40))
        )
        for _ in range(600)
    ]
    for text, ids in zip(texts, processor.encode([encode(text) for text in texts]), strict=True):
        refused, place, _ = canonical.find_refused(np.array([BOS, *ids]))
        assert refused == 0, (ascii(text), place)


def test_every_rule_refuses_what_it_says(processor, canonical):
    ids = {name: processor.piece_to_id(piece) for name, piece in zip("TACEL", OPERATORS, strict=True)}
    a, digit, stop, space = (processor.piece_to_id(piece) for piece in ("a", "1", ".", "\u2581"))
    spaced = processor.piece_to_id("\u2581the")
    byte = [processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    after = lambda *tokens: follows(canonical, list(tokens))
    assert not follows(canonical, [a])[[processor.pad_id(), processor.eos_id()]].any()
    assert after(a)[[BOS, byte[0xE4], digit, ids["T"]]].all()
    # Spaces: none at the start, and not two.
    assert not after()[spaced] and not after(space)[spaced] and after(a)[spaced]
    # Operators: before letters, LOWER after the end of a sentence, CAPNEXT between letters.
    for name in "TAL":
        assert after(ids[name])[[a, spaced, space, BOS]].all()
        assert not after(ids[name])[[digit, stop, *ids.values()]].any()
    assert after(a, ids["C"])[a] and not after(a, ids["C"])[[digit, spaced]].any()
    assert (
        after(stop)[ids["L"]] and after()[ids["L"]] and not after(a)[ids["L"]] and not after(digit)[ids["L"]]
    )
    assert after(a)[ids["C"]] and not after(digit)[ids["C"]]
    # ESC stands before an operator, and what it escapes is text.
    assert after(ids["E"])[list(ids.values())].all() and not after(ids["E"])[[a, digit, spaced]].any()
    assert after(ids["E"], ids["T"])[[digit, stop, spaced, ids["T"]]].all()
    assert not after(ids["E"], ids["E"], ids["T"])[digit], "this T is escaped by none"
    # Bytes: characters, and only those that are no pieces.
    assert not after(a)[byte[0x80:0xC2] + byte[0xF5:] + [byte[ord("a")]]].any()
    assert after(byte[0xE4])[byte[0x80:0xC0]].all() and not after(byte[0xE4])[[a, byte[0xE4]]].any()
    assert not after(byte[0xE0])[byte[0x9F]] and not after(byte[0xED])[byte[0xA0]]
    assert not after(byte[0xC3])[byte[0xA9]] and after(byte[0xC3])[byte[0xAA]], "é is a piece, ê is none"
    assert after(byte[0xE4], byte[0xB8])[byte[0xAD]] and not after(byte[0xE4], byte[0xB8])[a]
    assert after(byte[0xE4], byte[0xB8], byte[0xAD])[[a, byte[0xE4]]].all()
    assert not after(byte[0xE4], byte[0xB8], byte[0xAD])[byte[0x80]]


def test_the_normaliser_makes_only_letters_of_a_letter(model):
    """The grammar of operators builds on it: what a letter and the marks behind it become is that letter."""
    _, proto = load_model(model)
    rules = NormalisationRules(proto.normalizer_spec.precompiled_charsmap)
    marks = [chr(code) for code in range(0x300, 0x370)]
    made = 0
    for letter in "abcdefghijklmnopqrstuvwxyz":
        assert rules.result(letter.encode()) is None
        for mark in marks:
            result = rules.result((letter + mark).encode())
            made += result is not None
            assert result is None or t.is_letter(result.decode()[0])
    assert made > 100


# === IN SCORES ===


def test_what_is_refused_has_no_probability_and_the_rest_keeps_its_shares():
    generator = torch.Generator().manual_seed(0)
    logits = (9 * torch.randn(6, 13, generator=generator)).requires_grad_()
    allowed = torch.rand(4, 13, generator=generator) < 0.6
    allowed[:, 3] = True
    mask = t.TokenMask(
        torch.tensor([[0, 1, 2], [3, 3, 0]], dtype=torch.int32),
        torch.from_numpy(t.pack_bits(allowed.numpy())),
    )
    inside = allowed[mask.rows.flatten().long()]
    losses = torch.stack(
        [
            t.softcapped_ce_reference(t.refuse(logits, mask), torch.full((6,), token), 30.0)
            for token in range(13)
        ],
        1,
    )
    plain = (30 * torch.tanh(logits / 30)).softmax(1) * inside
    expected = plain / plain.sum(1, keepdim=True)
    assert torch.allclose((-losses).exp(), expected, atol=1e-6)
    assert losses.isfinite().all() and (losses[~inside] > 15).all()
    losses[:, 3].sum().backward()
    assert (logits.grad[~inside] == 0).all() and (logits.grad[inside] != 0).all()
    assert t.refuse(logits.detach().bfloat16(), mask).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["sliding", "doc_lora", "mixture"])
def test_every_score_has_the_mask_of_its_own_place(mode, config, canonical, processor, monkeypatch):
    """What is seen of the table at each target is the row after the tokens before it, in every mode."""
    changes = {
        "num_layers": 2,
        "num_loops": 0,
        "parallel_start_layer": 2,
        "xsa_last_n": 2,
        "vocab_size": len(canonical.kinds),
    }
    config = replace(
        config,
        **changes,
        canonical_mask=True,
        val_batch_tokens=512,
        ttt_batch_size=2,
        ttt_chunk_size=8,
        ttt_mixture_copies="none",
        phased_ttt_num_phases=0,
    )
    run = t.Run(config)
    run.canonical = canonical
    texts = ["the hen nab", "xé 中 banana then aaab 222 the nab ---- the", "the aaaa"]
    tokens = np.array([i for text in texts for i in [BOS, *processor.encode(text)]], dtype="<u2")
    expected = canonical.rows(tokens)
    model = t.GPT(config)
    seen = np.full(len(tokens), -1)
    latest = []

    def forward(batch, lora=None):
        latest[:] = [batch]
        return model(batch, lora=lora)

    enter = t.Tally.add

    def add(tally, losses, places):
        batch = latest[0]
        rows = batch.mask.rows.view(len(batch.targets), -1)
        experts = 2 if mode == "mixture" else 1
        assert torch.equal(rows[::experts], rows[experts - 1 :: experts])
        for place in places.tolist():
            at = (batch.targets[::experts] == tokens[place]) & (rows[::experts] == expected[place - 1])
            assert at.any(), place
            seen[place] = expected[place - 1]
        enter(tally, losses, places)

    monkeypatch.setattr(t.Tally, "add", add)
    tally = t.Tally(run, t.Validation(tokens, np.ones(len(tokens), np.int32), "test"))
    if mode == "sliding":
        t.score_sliding(run, forward, config.eval_seq_len, tally)
    elif mode == "doc_lora":
        t.doc_lora(run, model, forward, tally)
    else:
        run.config = replace(config, ttt_mode="mixture", ttt_mixture_rates="0,1")
        t.score_mixture(run, model, forward, tally)
    tally.total("test")
    assert (seen[1:] == expected[:-1]).all()


def test_a_score_without_its_mask_is_no_score(config):
    run = t.Run(replace(config, canonical_mask=True))
    with pytest.raises(t.Stop, match="CANONICAL_MASK=1: a score without its mask"):
        t.Tally(run, t.Validation(np.ones(4, "<u2"), np.ones(4, np.int32), "test"))


# === AGAINST SHARDS ===


def dataset(folder: Path, model: Path) -> Path:
    """Three documents in two training shards and a validation shard."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    texts = ("aaab banana then 2222 ----- the", "the hen nab ana 中 xé")
    tokens = np.array([i for text in texts for i in [BOS, *processor.encode(text)]], dtype="<u2")
    for name, part in (("train_000000", tokens[:7]), ("train_000001", tokens[7:]), ("val_000000", tokens)):
        write_shard(folder / f"fineweb_{name}.bin", part)
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.ones(len(tokens), "<u2"))
    return folder


def test_shards_prove_the_mask_and_other_tokens_are_named(model, canonical, tmp_path, capsys, config):
    folder = dataset(tmp_path / "data", model)
    documents = tmp_path / "text.jsonl"
    documents.write_text('{"text": "The HEN nab"}\n{"text": "xé. the"}\n')
    arguments = [str(folder), "--out", str(tmp_path / "table.npy"), "--documents", str(documents)]
    assert main([*arguments, "--transform", "caseops_v3"]) == 0
    assert "cannot occur, and none of" in capsys.readouterr().out
    assert (np.load(tmp_path / "table.npy") == canonical.table).all()

    config = replace(config, canonical_mask=True, datasets_dir=str(folder), vocab_size=len(canonical.kinds))
    run = t.Run(config)
    t.open_canonical(run, t.Dataset(config))
    assert (run.canonical.table == canonical.table).all()

    # The first token of the second shard follows the last of the first.
    tokens = np.array(read_shard(folder / "fineweb_train_000001.bin"))
    last = int(read_shard(folder / "fineweb_train_000000.bin")[-1])
    tokens[0] = np.flatnonzero(~unpacked(canonical.table, len(canonical.kinds))[last])[-1]
    write_shard(folder / "fineweb_train_000001.bin", tokens)
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"token 0: {tokens[0]} after those before" in error and error.count("\n") == 1
    run.canonical = None
    with pytest.raises(t.Stop, match=r"fineweb_train_000001.bin: 1 of .*the first at 0, cannot be what"):
        t.open_canonical(run, t.Dataset(config))


def test_a_tokenizer_for_which_it_is_not_exact_is_refused(model, tmp_path, capsys):
    folder = dataset(tmp_path / "data", model)
    for change, reason in (
        (lambda proto: setattr(proto.trainer_spec, "model_type", 3), "is no BPE or unigram model"),
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "whose scores are not whole"),
        (lambda proto: setattr(proto.pieces[-1], "type", 5), "has unused pieces"),
        (lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False), "does not write a space"),
    ):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
        change(proto)
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
        assert main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert reason in error and "CANONICAL_MASK=0" in error and error.count("\n") == 1
    assert main([str(tmp_path)]) == 2 and "tokenizer.model" in capsys.readouterr().err
