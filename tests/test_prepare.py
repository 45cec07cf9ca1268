"""data/prepare.py and what it is made of: exact ids and bytes, the
same output however it is made, clear refusals.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data import documents, prepare
from data.fast_tokenizer import FastTokenizer, load_model
from data.shards import BOS, read_shard, sha256_file, train_tokenizer
from data.sidecar import encode_with_bytes, folded_weights
from helpers import ROOT
from helpers.data_side import content, refused, run_prepare
from lossless_caps import TRANSFORMS, casefold

SHARED = ROOT.parent / "shared" / "data"
TOKENIZERS = SHARED / "tokenizers"
MODELS = {
    "sp1024": "fineweb_1024_bpe.model",
    "sp8192": "fineweb_8192_bpe.model",
    "caseops_v1": "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
    "casefold": "fineweb_8192_bpe_casefold_refined_v2.model",
}
needs_shared = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="the public tokenizers are not there")
# What normalisation, case operators and cutting at spaces and punctuation may trip over.
ODD = list("aAbtheingT.,'\"-019 \n\t  ") + list(
    "\x00\x01\x0b\x0c\r\x1c\x7f\x85\xa0\xad\u00a8\u00b4\u0301\u0308\u0345\u1680\u200b\u200d\u2028\u2581\u3000\ufeff\ufffd"
    "\ue001\ue002\ue003\ue004\ue005éÉ½²ĲﬁΣσßİ한ᄒ中☃ं😀"
)
odd_texts = st.lists(
    st.one_of(
        st.sampled_from(ODD),
        st.sampled_from([" The", " the", "USA", "\n\n", "don't", "3.14"]),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=40,
).map("".join)
WORDS = [
    "the",
    "The",
    "of",
    "NASA",
    "iPhone",
    "house",
    "river",
    "Time",
    "don't",
    "naïve",
    "3,141",
    "(see",
    "below)",
    "science.",
    "Why?",
    "“Quoted”",
    "McDonald",
    "a",
    "I",
    "e\u0301",
    "中文",
    "\n",
    "\n\n",
    "  ",
    "x\u200b",
]


def corpus(count: int, seed: int = 0) -> list[str]:
    """Random documents, all different."""
    generator = random.Random(seed)
    return [
        f"Document {seed}-{number} " + " ".join(generator.choices(WORDS, k=generator.randint(5, 150)))
        for number in range(count)
    ]


def write_lines(path: Path, texts: list[str]) -> Path:
    """The documents as JSON lines, compressed as the name of the file says."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".xz":
        content = lzma.compress(content)
    if path.suffix == ".zst":
        import zstandard

        half = len(content) // 2
        content = b"".join(
            zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:])
        )
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory) -> Path:
    """A BPE tokenizer of 500 entries with all operators."""
    texts = [TRANSFORMS["caseops_v3"][0](text) for text in corpus(300, 9)]
    return train_tokenizer(
        texts, tmp_path_factory.mktemp("tokenizer") / "small", 500, TRANSFORMS["caseops_v3"][2]
    )


def shard_documents(folder: Path, kind: str) -> list[list[int]]:
    """Token ids of every document of a dataset."""
    flat = np.concatenate([read_shard(path) for path in sorted(folder.glob(f"fineweb_{kind}_[0-9]*.bin"))])
    return [part[1:].tolist() for part in np.split(flat, np.flatnonzero(flat == BOS))[1:]]


# === TOKENIZER ===


def same_as_sentencepiece(tokenizer: FastTokenizer, texts: list[str]) -> None:
    ids, counts = tokenizer.encode_batch(texts)
    parts = np.split(ids, np.cumsum(counts)[:-1]) if texts else []
    for text, part in zip(texts, parts, strict=True):
        assert part.tolist() == tokenizer.processor.encode(text), repr(text)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, FastTokenizer]:
    return {name: FastTokenizer(TOKENIZERS / file) for name, file in MODELS.items()}


@needs_shared
@pytest.mark.parametrize("name", MODELS)
def test_ids_equal_sentencepiece_on_adversarial_text(tokenizers, name):
    tokenizer = tokenizers[name]
    assert not tokenizer.refused

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(odd_texts, max_size=8))
    def check(texts):
        same_as_sentencepiece(tokenizer, texts)

    check()


@needs_shared
@pytest.mark.parametrize("name", MODELS)
def test_ids_equal_sentencepiece_on_real_text(tokenizers, name):
    texts = []
    for file, most in (("fineweb_val_head.jsonl.xz", 451), ("web.jsonl.xz", 150)):
        with lzma.open(SHARED / file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for _, line in zip(range(most), lines, strict=False)]
    encode = TRANSFORMS.get(name, TRANSFORMS["none"])[0]
    same_as_sentencepiece(tokenizers[name], [encode(text) for text in texts])


def test_long_words_and_full_tables(small_tokenizer, monkeypatch):
    from data import fast_tokenizer

    monkeypatch.setattr(fast_tokenizer, "SMALLEST_TABLE", 16)
    monkeypatch.setattr(fast_tokenizer, "LARGEST_TABLE", 64)
    monkeypatch.setattr(fast_tokenizer, "MOST_LONG_SEGMENTS", 3)
    tokenizer = FastTokenizer(small_tokenizer)
    generator = random.Random(5)
    for _ in range(10):
        texts = [
            "".join(generator.choices(ODD, k=generator.randint(0, 200)))
            + "x" * generator.choice((1, 14, 15, 16, 99))
            for _ in range(20)
        ]
        same_as_sentencepiece(tokenizer, texts)
    same_as_sentencepiece(tokenizer, ["y" * 100_000 + " end", ""])


def trained(folder: Path, **options) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(200, 3)),
        model_prefix=str(folder / "model"),
        vocab_size=420,
        bos_id=1,
        pad_id=0,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"byte_fallback": True, "add_dummy_prefix": False, "model_type": "bpe"} | options,
    )
    return folder / "model.model"


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"byte_fallback": False},
        {"model_type": "unigram"},
        {"remove_extra_whitespaces": False},
        {"user_defined_symbols": ["\n"]},
        {"normalization_rule_name": "identity"},
    ],
)
def test_a_model_that_breaks_the_argument_takes_the_plain_path(tmp_path, options):
    tokenizer = FastTokenizer(trained(tmp_path, **options))
    assert tokenizer.refused
    same_as_sentencepiece(tokenizer, [" a  b\n", "The river.", "\u2581x ", ""])


@needs_shared
def test_published_facts_of_the_casefold_tokenizer():
    path = TOKENIZERS / MODELS["casefold"]
    assert path.stat().st_size == 389_849
    assert sha256_file(path) == "e2f3b89124cc3d517ae14abe3bc478ea5908a70289d4437123e25bb586148641"
    processor, model = load_model(path)
    assert model.trainer_spec.model_type == 1 and len(model.pieces) == 8192
    assert [model.pieces[token].piece for token in range(4, 260)] == [
        f"<0x{byte:02X}>" for byte in range(256)
    ]
    learned = [piece.piece for piece in model.pieces[260:]]
    assert len(learned) == 7932 and not any(piece != piece.lower() for piece in learned)
    assert set(learned[8167 - 260 :]) == set(",.:-)?!;\"/'|]%(*+>=_<~@#^")
    assert {piece.score for piece in model.pieces[4:]} == {-1.0}
    assert processor.piece_to_id("\u2581") == 7793
    assert not any("\u2581" in piece[1:] for piece in learned)
    assert model.normalizer_spec.remove_extra_whitespaces and model.normalizer_spec.escape_whitespaces
    assert not model.normalizer_spec.add_dummy_prefix
    sizes = [len(piece) for piece in learned]
    assert max(sizes) == 20


# === BYTES ===


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_byte_is_counted_once(small_tokenizer, transform):
    processor, _ = load_model(small_tokenizer)

    @settings(max_examples=150, deadline=None, database=None)
    @given(odd_texts)
    def check(text):
        ids, counts, dropped = encode_with_bytes(processor, transform, text)
        assert ids.tolist() == processor.encode(TRANSFORMS[transform][0](text))
        assert counts.sum(dtype=np.int64) + dropped == len(text.encode())
        if text and not any(
            character.isspace() or ord(character) > 126 or ord(character) < 32
            for character in text[0] + text[-1]
        ):
            assert dropped == 0

    check()


@settings(max_examples=200, deadline=None, database=None)
@given(odd_texts)
def test_folded_bytes_add_up_to_the_raw_ones(text):
    weights = folded_weights(text)
    assert (
        weights.sum() == len(text.encode())
        and len(weights) == len(casefold(text).encode())
        and (weights >= 0).all()
    )


@needs_shared
def test_published_byte_rules():
    processor, _ = load_model(TOKENIZERS / MODELS["caseops_v1"])
    pairs = lambda text: list(
        zip(*(part.tolist() for part in encode_with_bytes(processor, "caseops_v1", text)[:2]), strict=True)
    )
    space = processor.piece_to_id("\u2581")
    assert pairs("The")[0] == (4, 0)
    assert [worth for token, worth in pairs("a \ue001 b") if 4 <= token <= 7] == [0, 3]
    assert (space, 2) in pairs("end\n\nThe start")
    assert encode_with_bytes(processor, "caseops_v1", "a snowman \u2603 ")[2] == 1
    assert [worth for token, worth in pairs("\u2603")] == [0, 0, 3]


def test_a_run_of_spaces_that_16_bits_cannot_hold(small_tokenizer):
    processor, _ = load_model(small_tokenizer)
    text = "a" + " " * 70_000 + "b c"
    _, counts, dropped = encode_with_bytes(processor, "none", text)
    assert counts.sum(dtype=np.int64) + dropped == len(text)
    with pytest.raises(OverflowError, match="split the document"):
        encode_with_bytes(processor, "none", "a" + " " * 300_000 + "b")


# === THE PIPELINE ===


def test_the_dataset_is_what_the_documents_say(tmp_path, small_tokenizer):
    texts = corpus(60)
    opening = texts[3][: len(texts[3]) // 2]
    processor, _ = load_model(small_tokenizer)
    encode = lambda text: processor.encode(TRANSFORMS["caseops_v1"][0](text))
    long = next(text for text in texts[:10] if len(encode(text)) > 80)
    extra = [texts[2], texts[5] + " ", long + " and it goes on", opening]
    out = tmp_path / "out"
    source = write_lines(tmp_path / "all.jsonl", texts + extra)
    assert (
        run_prepare(
            source,
            "--out",
            out,
            "--val-docs",
            10,
            "--transform",
            "caseops_v1",
            "--tokenizer",
            small_tokenizer,
            "--shard-tokens",
            1000,
        )
        == 0
    )
    assert shard_documents(out, "val") == [encode(text) for text in texts[:10]]
    manifest = json.loads((out / "manifest.json").read_text())
    left_out = manifest["left_out"]
    assert left_out["same_text"] == 1 and left_out["same_tokens"] == 1 and left_out["same_opening"] >= 1
    kept = shard_documents(out, "train")
    assert kept[:50] == [encode(text) for text in texts[10:60]]
    assert len(kept) == manifest["docs_train"] == 54 - sum(left_out.values())
    assert manifest["val_bytes"] == sum(len(text.encode()) for text in texts[:10])
    sidecar = np.concatenate([read_shard(path) for path in sorted(out.glob("fineweb_val_bytes_*.bin"))])
    assert sidecar.sum(dtype=np.int64) == manifest["val_bytes"] - manifest["val_uncounted_bytes"]
    sizes = [len(read_shard(path)) for path in sorted(out.glob("fineweb_train_*.bin"))]
    assert set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    assert not manifest["validation"]["standard"] and manifest["lossless"]


def test_every_kind_of_file_gives_the_same_tokens(tmp_path, small_tokenizer):
    import pyarrow
    import pyarrow.parquet

    texts = corpus(40)
    half = len(texts) // 2
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet", row_group_size=7)
    write_lines(tmp_path / "part1.jsonl", texts[:half])
    (tmp_path / "part2.jsonl").write_bytes(
        b"\n" + write_lines(tmp_path / "rest.jsonl", texts[half:]).read_bytes().rstrip(b"\n")
    )
    sources = [write_lines(tmp_path / f"all.jsonl{suffix}", texts) for suffix in ("", ".gz", ".xz", ".zst")]
    sources += [tmp_path / "all.parquet", tmp_path / "part?.jsonl"]
    seen = set()
    for number, source in enumerate(sources):
        out = tmp_path / f"out{number}"
        assert (
            run_prepare(
                source, "--out", out, "--val-docs", 5, "--tokenizer", small_tokenizer, "--batch-mb", 0.004
            )
            == 0
        )
        files = content(out)
        for described in ("manifest.json", "card.md"):  # they name the sources
            files.pop(described)
        seen.add(json.dumps(files))
    assert len(seen) == 1


def test_separate_validation_files(tmp_path, small_tokenizer):
    val, train = corpus(8, 1), corpus(30, 2)
    source = write_lines(tmp_path / "train.jsonl", [*train, val[4]])
    out = tmp_path / "out"
    assert (
        run_prepare(
            source,
            "--val",
            write_lines(tmp_path / "val.jsonl.gz", val),
            "--out",
            out,
            "--sidecar",
            "--tokenizer",
            small_tokenizer,
        )
        == 0
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["docs_val"], manifest["docs_train"], manifest["left_out"]["same_text"]) == (8, 30, 1)
    assert manifest["val_sidecar_bytes"] == manifest["val_bytes"] - manifest["val_uncounted_bytes"]


def command(source: Path, out: Path, workers: int) -> list[str]:
    """A run that trains its tokenizer, in many small steps."""
    return [
        sys.executable,
        str(ROOT / "data" / "prepare.py"),
        str(source),
        "--out",
        str(out),
        "--val-docs",
        "40",
        "--transform",
        "caseops_v3",
        "--vocab-size",
        "500",
        "--shard-tokens",
        "3000",
        "--batch-mb",
        "0.01",
        "--journal-seconds",
        "0",
        "--max-case-lost",
        "1",
        "--workers",
        str(workers),
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A source and the dataset that one undisturbed worker makes of it."""
    folder = tmp_path_factory.mktemp("reference")
    source = write_lines(folder / "all.jsonl.xz", corpus(700))
    subprocess.run(command(source, folder / "out", 1), check=True, capture_output=True)
    return source, content(folder / "out")


def test_several_workers_give_the_same_bytes_as_one(tmp_path, reference):
    source, expected = reference
    subprocess.run(command(source, tmp_path / "out", 3), check=True, capture_output=True)
    assert content(tmp_path / "out") == expected


def killed_run(arguments: list[str], out: Path, after: float) -> None:
    """Start a run and kill -9 it so many seconds after it has begun to write, if it still runs."""
    before = written(out)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and written(out) == before:
        time.sleep(0.005)
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def written(out: Path) -> int:
    """When the journal was last written, 0 if there is none."""
    journal = out / prepare.JOURNAL
    try:
        return journal.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("attempt", range(2))  # ./bench/data.py --kills makes hundreds, at every stage
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, reference, attempt):
    source, expected = reference
    generator = random.Random(time.time_ns())
    out = tmp_path / "out"
    for _ in range(3):
        killed_run(command(source, out, generator.choice((1, 2))), out, generator.uniform(0, 1))
    result = subprocess.run(command(source, out, 1), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert content(out) == expected


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


def test_stopping_at_every_journal_entry_gives_the_same_bytes(tmp_path, reference, monkeypatch, capsys):
    source, expected = reference
    write_json, steps = prepare.write_json, 0

    def dying(path, value):
        nonlocal steps
        steps += 1
        if steps % 9 == 0:
            raise Killed
        write_json(path, value)
        if steps % 13 == 0:
            raise Killed

    monkeypatch.setattr(prepare, "write_json", dying)
    arguments = command(source, tmp_path / "out", 1)[2:]
    for _ in range(100):
        try:
            assert prepare.main(arguments) == 0
            break
        except Killed:
            continue
    assert content(tmp_path / "out") == expected
    assert prepare.main(arguments) == 0
    assert "already complete, verified" in capsys.readouterr().out


# === REFUSALS ===


BAD_LINES = {
    "bad JSON": b'{"text": "a"',
    "no key 'text'": b'{"body": "a"}',
    "not UTF-8": b'{"text": "\xff"}',
    "'text' is int": b'{"text": 3}',
    "a lone surrogate": b'{"text": "\\ud800"}',
    "every line must": b'["text"]',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, small_tokenizer, capsys, reason):
    good = write_lines(tmp_path / "good.jsonl", corpus(20)).read_bytes().splitlines(keepends=True)
    for line in (3, 15):
        source = tmp_path / f"bad{line}.jsonl"
        source.write_bytes(b"".join([*good[:line], BAD_LINES[reason] + b"\n", *good[line:]]))
        error = refused(
            capsys, source, "--out", tmp_path / f"out{line}", "--val-docs", 5, "--tokenizer", small_tokenizer
        )
        assert reason in error and f"bad{line}.jsonl:{line + 1}:" in error


def test_unreadable_sources(tmp_path, small_tokenizer, capsys):
    texts = corpus(60)
    options = ("--val-docs", 5, "--tokenizer", small_tokenizer)
    for suffix in (".gz", ".xz", ".zst"):
        path = write_lines(tmp_path / f"cut.jsonl{suffix}", texts)
        path.write_bytes(path.read_bytes()[:-40] if suffix != ".zst" else b"nonsense" * 9)
        assert "cannot be read" in refused(capsys, path, "--out", tmp_path / suffix, *options)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nonsense PAR1")
    assert "cannot be read" in refused(capsys, broken, "--out", tmp_path / "p", *options)
    assert "no such file" in refused(capsys, tmp_path / "none*.jsonl", "--out", tmp_path / "n", *options)
    assert "unknown kind" in refused(capsys, small_tokenizer, "--out", tmp_path / "u", *options)


def test_settings_that_cannot_work(tmp_path, small_tokenizer, capsys, monkeypatch):
    source = write_lines(tmp_path / "all.jsonl", corpus(20))
    out = tmp_path / "out"
    assert "smaller --val-docs" in refused(capsys, source, "--out", out, "--tokenizer", small_tokenizer)
    assert "no documents are left for training" in refused(
        capsys, source, "--out", out, "--val-docs", 20, "--tokenizer", small_tokenizer, "--overwrite"
    )
    assert "not a SentencePiece model" in refused(capsys, source, "--out", out, "--tokenizer", source)
    assert "cannot be read" in refused(
        capsys, source, "--out", out, "--tokenizer", tmp_path / "missing.model"
    )
    assert "cannot train" in refused(
        capsys, source, "--out", tmp_path / "v", "--val-docs", 5, "--vocab-size", 60
    )
    plain = trained(tmp_path)
    assert "U+E001" in refused(
        capsys, source, "--out", out, "--tokenizer", plain, "--transform", "caseops_v1"
    )
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    assert "GB are needed" in refused(
        capsys, source, "--out", tmp_path / "d", "--val-docs", 5, "--tokenizer", plain
    )


def test_a_vocabulary_beyond_16_bits(tmp_path, small_tokenizer, capsys, monkeypatch):
    class Huge:
        def vocab_size(self) -> int:
            return 70_000

    monkeypatch.setattr(prepare, "load_model", lambda path: (Huge(), None))
    source = write_lines(tmp_path / "all.jsonl", corpus(20))
    assert "70000 entries" in refused(
        capsys, source, "--out", tmp_path / "out", "--tokenizer", small_tokenizer
    )


def test_another_dataset_is_not_replaced(tmp_path, small_tokenizer, capsys):
    source, out = write_lines(tmp_path / "all.jsonl", corpus(20)), tmp_path / "out"
    options = ("--tokenizer", small_tokenizer)
    assert run_prepare(source, "--out", out, "--val-docs", 5, *options) == 0
    before = content(out)
    assert "another dataset" in refused(capsys, source, "--out", out, "--val-docs", 6, *options)
    assert content(out) == {**before, ".lock": sha256_file(out / ".lock")}
    assert run_prepare(source, "--out", out, "--val-docs", 6, "--overwrite", *options) == 0
    with open(out / "fineweb_train_000000.bin", "r+b") as file:
        file.seek(2000)
        file.write(b"\1\1")
    assert "missing or changed" in refused(capsys, source, "--out", out, "--val-docs", 6, *options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    assert "other files" in refused(
        capsys, source, "--out", tmp_path / "other", "--val-docs", 5, "--overwrite", *options
    )


def test_a_second_run_in_the_same_folder_waits_its_turn(tmp_path, small_tokenizer, capsys):
    import fcntl

    source, out = write_lines(tmp_path / "all.jsonl", corpus(20)), tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run" in refused(
            capsys, source, "--out", out, "--val-docs", 5, "--tokenizer", small_tokenizer
        )


def test_batches_do_not_depend_on_where_reading_starts(tmp_path):
    paths = [
        write_lines(tmp_path / name, corpus(30, seed)) for seed, name in enumerate(("a.jsonl", "b.jsonl.xz"))
    ]
    everything = list(documents.batches(paths, "text", 3000))
    for number in (1, 4, len(everything) - 1):
        again = list(documents.batches(paths, "text", 3000, everything[number - 1].after))
        assert [batch.records for batch in again] == [batch.records for batch in everything[number:]]
    limited = list(documents.batches(paths, "text", 3000, limit=33))
    assert sum(len(batch.records) for batch in limited) == 33 and limited[-1].after.file == 1
