"""The data side against complaints of the field: cut sources, wrong tables, full disks, odd values, kills."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import verify_bytes
from data import demo, documents, prepare, shards, sidecar
from data.compressed import CompressedStream, StreamError
from data.shards import read_json_object, sha256_file, train_tokenizer
from data.sidecar import CaseCheck, byte_tables, standard_normaliser, table_bytes, table_problem
from data.workers import run_in_order
from helpers import ROOT
from helpers.data_side import content, refused, refuted, run_prepare, verify
from lossless_caps import TRANSFORMS, CaseOpsError, decode_caseops

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
WORDS = "the river house of NASA and a iPhone or two don't see 3,141 Time below".split()


def corpus(count: int) -> list[str]:
    """Random documents, all different."""
    generator = random.Random(count)
    return [
        f"Document {number} " + " ".join(generator.choices(WORDS, k=generator.randint(10, 80)))
        for number in range(count)
    ]


def lines(texts: list[str]) -> bytes:
    """Documents as JSON lines."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A BPE tokenizer of 400 entries with all operators."""
    folder = tmp_path_factory.mktemp("tokenizer")
    encode, _, operators, _ = TRANSFORMS["caseops_v3"]
    return train_tokenizer(map(encode, corpus(200)), folder / "small", 400, operators)


def sign(folder: Path, **changes: object) -> None:
    """Make a manifest's checksum right again after some of its values were changed."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest["checksum"] = prepare.checksum(manifest)
    path.write_text(json.dumps(manifest))


# === THE END OF A SOURCE ===


def unpack(content: bytes, suffix: str) -> bytes:
    """All text of a compressed stream."""
    return io.BufferedReader(CompressedStream(io.BytesIO(content), suffix)).read()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_cut_anywhere_is_found_and_between_parts_gives_whole_parts(suffix):
    texts = [lines(corpus(count)) for count in (3, 4, 5)]
    parts = [COMPRESS[suffix](text) for text in texts]
    whole, ends = b"".join(parts), list(accumulate(map(len, parts)))
    assert unpack(whole, suffix) == b"".join(texts)
    for cut in range(len(whole)):
        if cut in ends:
            assert unpack(whole[:cut], suffix) == b"".join(texts[: ends.index(cut) + 1])
            continue
        with pytest.raises(StreamError, match="ends inside its compressed part|is empty"):
            unpack(whole[:cut], suffix)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_in_any_part_is_found(suffix):
    """Python's own readers of xz and bzip2 drop a second part that is damaged, without a word."""
    texts = [lines(corpus(count)) for count in (3, 4)]
    parts = [COMPRESS[suffix](text) for text in texts]
    whole = b"".join(parts)
    for place in range(len(whole)):
        mutant = bytearray(whole)
        mutant[place] ^= 0x10
        try:
            text = unpack(bytes(mutant), suffix)
        except StreamError:
            continue
        assert text == b"".join(texts), place  # a time stamp in gzip's header
    with pytest.raises(StreamError):
        unpack(whole + b"rubbish", suffix)


def test_padding_between_parts():
    text = lines(corpus(3))
    assert unpack(gzip.compress(text) + bytes(7) + gzip.compress(text) + bytes(500), ".gz") == text * 2
    assert unpack(lzma.compress(text) + bytes(8) + lzma.compress(text), ".xz") == text * 2
    with pytest.raises(StreamError, match="not a multiple of 4"):
        unpack(lzma.compress(text) + bytes(7) + lzma.compress(text), ".xz")
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    assert unpack(COMPRESS[".zst"](text) + skippable + COMPRESS[".zst"](text), ".zst") == text * 2


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_cut_source_makes_no_dataset_and_proves_none(tmp_path, tokenizer, capsys, suffix):
    texts = corpus(300)
    packed = b"".join(COMPRESS[suffix](lines(texts[start : start + 60])) for start in range(0, 300, 60))
    source, out = tmp_path / f"all.jsonl{suffix}", tmp_path / "out"
    source.write_bytes(packed[: len(packed) * 61 // 100])
    options = ("--val-docs", 20, "--tokenizer", tokenizer, "--sidecar")
    error = refused(capsys, source, "--out", out, *options)
    assert "it ends inside its compressed part 4" in error and "get this file again" in error
    assert not list(out.glob("*.bin*"))  # nothing was made of it
    source.write_bytes(packed)
    assert run_prepare(source, "--out", out, *options) == 0
    source.write_bytes(packed[: len(packed) * 61 // 100])
    assert "bytes, but the dataset was made of" in refuted(capsys, out, "--documents", source)


@pytest.mark.parametrize("cut", [0, 2, 100, 2000, -9, -1])
def test_a_cut_parquet_file(tmp_path, tokenizer, capsys, cut):
    import pyarrow
    import pyarrow.parquet

    source = tmp_path / "all.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": corpus(100)}), source, row_group_size=30)
    source.write_bytes(source.read_bytes()[:cut])
    assert "cannot be read" in refused(
        capsys, source, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--val-docs", 5
    )


def test_a_cut_line_and_an_empty_file_are_found_before_anything_is_made(tmp_path, tokenizer, capsys):
    source, out = tmp_path / "all.jsonl", tmp_path / "out"
    options = ("--out", out, "--tokenizer", tokenizer, "--val-docs", 5)
    source.write_bytes(lines(corpus(50))[:-30])
    assert "all.jsonl:50: bad JSON" in refused(capsys, source, *options)
    assert not list(out.glob("*.bin*"))
    source.write_bytes(b"")
    assert "is empty" in refused(capsys, source, *options)
    good = tmp_path / "good.jsonl"
    good.write_bytes(lines(corpus(50)))
    source.write_bytes(b'{"body": 1}\n')
    assert "all.jsonl:1: no key" in refused(capsys, good, source, *options)


def test_the_manifest_says_what_the_sources_hold(tmp_path, tokenizer, capsys):
    first, second, val = (tmp_path / name for name in ("a.jsonl.zst", "b.parquet", "val.jsonl"))
    import pyarrow
    import pyarrow.parquet

    first.write_bytes(COMPRESS[".zst"](lines(corpus(40))))
    pyarrow.parquet.write_table(pyarrow.table({"text": corpus(30)}), second)
    val.write_bytes(b"\n" + lines(corpus(9)))
    out = tmp_path / "out"
    assert run_prepare(first, second, "--val", val, "--out", out, "--tokenizer", tokenizer, "--sidecar") == 0
    sources = json.loads((out / "manifest.json").read_text())["recipe"]["sources"]
    assert [facts["records"] for facts in sources] == [40, 30, 10]
    assert [facts["bytes"] for facts in sources] == [len(lines(corpus(40))), None, len(lines(corpus(9))) + 1]
    assert [facts["sha256"] for facts in sources] == [sha256_file(path) for path in (first, second, val)]
    code, report = verify(capsys, out, "--documents", first, second, "--val", val)
    assert code == 0, report
    assert any(
        "3 source files of the manifest, 80 records, read to their ends" in text for text in report["proved"]
    )


def test_a_dataset_that_lacks_documents_of_its_sources_is_refuted(tmp_path, tokenizer, capsys):
    """Made of a shorter file, or with another number of records, by a builder that signs what it made."""
    source, short, out = tmp_path / "all.jsonl", tmp_path / "short.jsonl", tmp_path / "out"
    source.write_bytes(lines(corpus(60)))
    short.write_bytes(lines(corpus(60)[:50]))
    options = ("--tokenizer", tokenizer, "--val-docs", 10, "--sidecar")
    assert run_prepare(source, "--out", tmp_path / "whole", *options) == 0
    assert run_prepare(short, "--out", out, *options) == 0
    assert "bytes, but the dataset was made of" in refuted(capsys, out, "--documents", source)
    whole = json.loads((tmp_path / "whole" / "manifest.json").read_text())["recipe"]
    sign(out, recipe=whole)
    assert "train document 40 ('Document 50" in refuted(capsys, out, "--documents", source)
    whole["sources"][0]["records"] -= 1
    sign(tmp_path / "whole", recipe=whole)
    assert "holds 60 records" in refuted(capsys, tmp_path / "whole", "--documents", source)
    assert "2 files of documents are given" in refuted(capsys, out, "--documents", source, short)


def test_a_source_that_changes_during_the_run_is_noticed(tmp_path, tokenizer, capsys, monkeypatch):
    source = tmp_path / "all.jsonl"
    source.write_bytes(lines(corpus(60)))
    real = prepare.Preparation._make_tokenizer

    def meddling(self, *arguments):
        with open(source, "ab") as file:
            file.write(lines(["one more document"]))
        return real(self, *arguments)

    monkeypatch.setattr(prepare.Preparation, "_make_tokenizer", meddling)
    error = refused(capsys, source, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--val-docs", 10)
    assert "61 records were read, but it held 60 at the start" in error


def test_an_unfinished_dataset_is_refuted(tmp_path, tokenizer, capsys, monkeypatch):
    """Its shards alone look like a smaller dataset."""
    source, out = tmp_path / "all.jsonl", tmp_path / "out"
    source.write_bytes(lines(corpus(60)))
    options = ("--tokenizer", tokenizer, "--val-docs", 10, "--sidecar")
    assert run_prepare(source, "--out", out, *options) == 0
    (out / "manifest.json").unlink()
    assert verify(capsys, out)[0] == 0
    for name in (prepare.JOURNAL, shards.UNFINISHED):
        (out / name).write_text("{}")
        assert f"{name}: the dataset is not finished" in refuted(capsys, out)
        (out / name).unlink()


# === COLUMNS AND CHARACTERS ===


def test_a_binary_column_is_text_and_another_is_named(tmp_path, tokenizer, capsys):
    import pyarrow
    import pyarrow.parquet

    texts = [text + " naïve" for text in corpus(40)]
    options = ("--tokenizer", tokenizer, "--val-docs", 5)
    found = set()
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()]
    for number, kind in enumerate([*kinds, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]):
        source, out = tmp_path / f"{number}.parquet", tmp_path / f"out{number}"
        table = pyarrow.table({"text": pyarrow.array(texts).cast(kind)})
        pyarrow.parquet.write_table(table, source)
        assert run_prepare(source, "--out", out, *options) == 0
        found.add(sha256_file(out / "fineweb_train_000000.bin"))
    assert len(found) == 1
    source = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"good", b"bad \xff"] * 9}), source)
    assert "bad.parquet:2: not UTF-8" in refused(capsys, source, "--out", tmp_path / "bad", *options)
    damaged = pyarrow.array([b"good", b"bad \xff"] * 9).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": damaged}), source)
    assert "bad.parquet:2: not UTF-8" in refused(capsys, source, "--out", tmp_path / "worse", *options)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), source)
    assert "column 'text' is int64" in refused(capsys, source, "--out", tmp_path / "bad", *options)


def without_filter(check: CaseCheck, text: str) -> bool:
    """What CaseCheck says, of every text and by its definition."""
    code = check.normalise(TRANSFORMS[check.transform][0](text))
    try:
        version = {"caseops_v1": 1, "caseops_v3": 3}[check.transform]
        decoded = decode_caseops(code, version, normalised=True)
    except CaseOpsError:
        return True
    return decoded not in (text, check.normalise(text))


ODD = "aAbtheT.,'\"- \n\x00\x01\x7f\x85\xa0\xad\u00a8\u00b4\u0301\u0308\u0345\u200b\u200d\u2028\u2581\u3000"
ODD += "\ufeff\ufffd\ue001\ue004éÉ½²ĲﬁΣßİ한中ºª™Ａ．！Ⓐ℃😀"
odd_texts = st.lists(st.sampled_from(ODD) | st.characters(exclude_categories=("Cs",)), max_size=30).map(
    "".join
)


@pytest.mark.parametrize("transform", ["caseops_v1", "caseops_v3"])
def test_lost_capitals_are_found_wherever_they_are(transform):
    check = CaseCheck(transform, standard_normaliser())
    assert check.loses("The E\u0301tude") and check.loses("It is 45\u00baC")
    assert not check.loses("The Étude, “quoted” — and so on… NASA's iPhone")

    @settings(max_examples=400, deadline=None, database=None)
    @given(odd_texts)
    def compare(text):
        assert check.loses(text) == without_filter(check, text)

    compare()


@pytest.mark.parametrize("place", ["validation", "training"])
def test_decomposed_accents_are_refused_at_once(tmp_path, tokenizer, capsys, place):
    texts = corpus(1500)
    for number in range(5, 20) if place == "validation" else range(100, 110):
        texts[number] += " E\u0301tude"
    source, out = tmp_path / "all.jsonl", tmp_path / "out"
    source.write_bytes(lines(texts))
    options = ("--out", out, "--tokenizer", tokenizer, "--val-docs", 50, "--transform", "caseops_v3")
    error = refused(capsys, source, *options)
    assert f"{place} documents" in error and "--max-case-lost" in error and "Document " in error
    if place == "validation":
        assert not list(out.glob("*.bin*"))
    assert run_prepare(source, *options, "--max-case-lost", 1) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["case_lost"] == (
        {"val": 15, "train": 0} if place == "validation" else {"val": 0, "train": 10}
    )
    code, report = verify(capsys, out, "--documents", source, "--max-case-lost", 1)
    assert code == 0
    assert manifest["case_lost"] == {
        kind: report["documents"][kind]["case_lost"] for kind in ("val", "train")
    }


# === BYTE TABLES ===


def altered(model: Path, path: Path, edit) -> Path:
    """A copy of a tokenizer with its pieces edited in place."""
    from sentencepiece import sentencepiece_model_pb2

    parsed = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    edit(parsed.pieces)
    path.write_bytes(parsed.SerializeToString())
    return path


def test_a_tokenizer_without_a_lone_space_is_refused(tmp_path, tokenizer, capsys):
    def rename_space(pieces):
        for piece in pieces:
            if piece.piece == "\u2581":
                piece.piece = "\u2603\u2603"

    lame = altered(tokenizer, tmp_path / "lame.model", rename_space)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(lame))
    text = "river \u2603 house"  # a snowman is no piece, so that the space before it stands alone
    tokens = np.array(processor.encode(text), dtype=np.uint16)
    assert table_bytes(processor, tokens, shards.BOS) > len(text.encode())  # what this is about
    assert "U+2581" in table_problem(processor)
    source, out = tmp_path / "all.jsonl", tmp_path / "out"
    source.write_bytes(lines([f"{text} {number}" for number in range(50)]))
    assert "no piece for a lone space" in refused(
        capsys, source, "--out", out, "--val-docs", 5, "--tokenizer", lame
    )
    assert run_prepare(source, "--out", out, "--val-docs", 5, "--tokenizer", tokenizer) == 0
    shutil.copy(lame, out / "tokenizer.model")
    (out / "manifest.json").unlink()
    assert "no piece for a lone space" in refuted(capsys, out)


def test_tables_are_compared_with_the_decoded_text(tmp_path, capsys, monkeypatch):
    """A piece with an inner space is worth its bytes, and tables that count two too many (0.5 %) are seen."""
    source, out = tmp_path / "all.jsonl", tmp_path / "out"
    texts = [f"{number} of the " + "river house " * 40 for number in range(60)]
    source.write_bytes(lines([text.strip() for text in texts]))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "wide"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        user_defined_symbols=["of\u2581the"],
        minloglevel=2,
    )
    made_from = (source, "--val-docs", 20, "--tokenizer", tmp_path / "wide.model")
    assert run_prepare(*made_from, "--out", out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["val_lut_bytes"] == manifest["val_bytes"]

    def wrong_tables(processor):
        base, lead, boundary = byte_tables(processor)
        base[processor.piece_to_id("of\u2581the")] += 2
        return base, lead, boundary

    monkeypatch.setattr(sidecar, "byte_tables", wrong_tables)
    wrong = tmp_path / "wrong"
    assert run_prepare(*made_from, "--out", wrong) == 0
    manifest = json.loads((wrong / "manifest.json").read_text())
    assert 0 < manifest["val_lut_bytes"] / manifest["val_bytes"] - 1 < 0.01
    assert "its tokens decode to" in refuted(capsys, wrong)


# === ERRORS OF OTHERS ===


def test_a_bad_record_met_while_the_tokenizer_trains_is_named(tmp_path, capsys):
    source = tmp_path / "all.jsonl"
    good = lines(corpus(400)).splitlines(keepends=True)
    source.write_bytes(b"".join([*good[:300], b'{"text": 3}\n', *good[300:]]))
    error = refused(
        capsys, source, "--out", tmp_path / "out", "--val-docs", 20, "--vocab-size", 400, "--batch-mb", 0.01
    )
    assert "all.jsonl:301: 'text' is int" in error


def test_what_the_texts_raise_is_raised_by_the_training(tmp_path):
    def broken():
        yield from corpus(50)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        train_tokenizer(broken(), tmp_path / "tokenizer", 400)


def divide(item: int) -> float:
    """A job that fails for 0."""
    return 1 / item


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_s_error_is_its_own_and_no_want_of_memory(workers):
    with pytest.raises(ZeroDivisionError):
        list(run_in_order(divide, iter([1, 2, 0, 4]), workers))


# === WRITES THAT FAIL ===


def limited(command: list[str], size: int) -> subprocess.CompletedProcess:
    """A command that cannot write files beyond `size` bytes, as on a disk that fills up."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_is_one_line_and_loses_nothing(tmp_path, tokenizer, workers):
    source, out = tmp_path / "all.jsonl", tmp_path / "out"
    source.write_bytes(lines(corpus(300)))
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), str(source), "--val-docs", "100"]
    command += ["--tokenizer", str(tokenizer), "--sidecar", "--batch-mb", "0.01", "--journal-seconds", "0"]
    command += ["--workers", str(workers), "--shard-tokens", "9000", "--out"]
    assert limited([*command, str(tmp_path / "expected")], 1 << 30).returncode == 0
    sizes = [path.stat().st_size for path in (tmp_path / "expected").iterdir()]
    stages = (0, tokenizer.stat().st_size - 1, max(sizes) - 1)
    for size in stages if workers == 1 else stages[-1:]:
        result = limited([*command, str(out)], size)
        errors = [line for line in result.stderr.splitlines() if "WARNING" not in line]
        assert result.returncode == 2 and len(errors) == 1, (size, result.stderr)
        assert "File too large" in errors[0] and "the same command goes on" in errors[0]
        assert not (out / "manifest.json").exists()
    assert limited([*command, str(out)], 1 << 30).returncode == 0
    assert content(out) == content(tmp_path / "expected")


def test_the_demo_corpus_on_a_full_disk(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from data import demo\n"
    script += "sys.argv = ['demo.py', '--out', sys.argv[2]]\n"
    script += "demo.default_roots = lambda: [Path(sys.argv[2]).parent / 'tree']; sys.exit(demo.main())"
    generator = random.Random(1)
    for number in range(60):
        text = "\n\n".join(" ".join(generator.choices(WORDS, k=60)) for _ in range(4))
        path = tmp_path / "tree" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""{text}"""\n')
    out = tmp_path / "demo"
    for size in (0, 5000):
        result = limited([sys.executable, "-c", script, str(ROOT), str(out)], size)
        assert result.returncode == 2, result.stderr
        errors = [line for line in result.stderr.splitlines() if line[:2] not in ("WA", "W0")]
        assert len(errors) == 1 and "File too large" in errors[0]
        assert not out.exists()
    assert limited([sys.executable, "-c", script, str(ROOT), str(out)], 1 << 30).returncode == 0


def test_without_a_home(tmp_path, tokenizer):
    source = tmp_path / "all.jsonl"
    source.write_bytes(lines(corpus(30)))
    here = {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    command = [str(source), "--out", str(tmp_path / "out"), "--val-docs", "5", "--tokenizer", str(tokenizer)]
    command += ["--workers", "1"]
    for script, arguments in (
        ("data/prepare.py", [*command, "--sidecar"]),
        ("verify_bytes.py", [str(tmp_path / "out"), "--documents", str(source), "--workers", "1"]),
    ):
        result = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            env=os.environ | here,
            cwd="/",
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr


# === FILES AND NUMBERS ===


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "[" * 100_000, '{"a": 1', "\ufeff{}", '"x"', "{}x"])
def test_json_that_is_no_object_is_a_value_error(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        read_json_object(path)


@pytest.mark.parametrize("text", ["null", "[1]", "3", "[" * 100_000, '{"stage": "train"}', '{"seen": 3}'])
def test_odd_manifests_and_journals_are_one_line(tmp_path, tokenizer, capsys, text):
    source, out = tmp_path / "all.jsonl", tmp_path / "out"
    source.write_bytes(lines(corpus(30)))
    options = ("--out", out, "--val-docs", 5, "--tokenizer", tokenizer)
    out.mkdir()
    for name, expected in (
        (prepare.JOURNAL, "its journal, which is damaged"),
        ("manifest.json", "manifest.json"),
    ):
        (out / name).write_text(text)
        assert expected in refused(capsys, source, *options)
    code, _ = verify(capsys, out)
    assert code == 1
    assert demo.problem(out, "x") is not None
    (out / "manifest.json").unlink()
    assert run_prepare(source, *options, "--overwrite") == 0


@pytest.mark.parametrize(
    "option",
    [
        "--val-docs=0",
        "--val-docs=1e3",
        "--shard-tokens=2147483648",
        "--vocab-size=65536",
        "--workers=100000",
        "--batch-mb=nan",
        "--batch-mb=inf",
        "--journal-seconds=nan",
        "--tokenizer-mb=-1",
        "--tokenizer-docs=-1",
        "--max-case-lost=2",
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(tmp_path, capsys, option):
    source = tmp_path / "all.jsonl"
    source.write_bytes(lines(corpus(5)))
    with pytest.raises(SystemExit) as stopped:
        prepare.parse_arguments([str(source), "--out", str(tmp_path / "out"), option])
    assert stopped.value.code == 2
    name, _, value = option.partition("=")
    (error,) = capsys.readouterr().err.splitlines()
    assert name in error and value in error and "--help" in error


def test_a_shard_that_cannot_be_read_is_one_line(tmp_path, tokenizer, capsys):
    (tmp_path / "fineweb_val_000000.bin").mkdir()
    shutil.copy(tokenizer, tmp_path / "tokenizer.model")
    code = verify_bytes.main([str(tmp_path), "--workers", "1"])
    assert code in (1, 2)
    assert capsys.readouterr().err.count("\n") == (code == 2)


# === KILLS ===


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


@pytest.mark.parametrize("attempt", range(20))
def test_a_kill_at_any_write_loses_nothing(tmp_path, killed_at, attempt):
    """At 20 places spread over all writes of a run, from the first journal to the manifest."""
    command, expected, run_dying, writes = killed_at
    out = tmp_path / "out"
    assert run_dying(out, 1 + attempt * (writes - 1) // 19) == "killed"
    assert prepare.main([*command, "--out", str(out)]) == 0
    assert content(out) == expected


@pytest.fixture(scope="module")
def killed_at(tmp_path_factory):
    """The command, the dataset it must make, a way to kill it at its n-th write, and its number of writes."""
    folder = tmp_path_factory.mktemp("kills")
    source = folder / "all.jsonl.zst"
    source.write_bytes(COMPRESS[".zst"](lines(corpus(60))) + COMPRESS[".zst"](lines(corpus(70))))
    command = [str(source), "--val-docs", "20", "--vocab-size", "400", "--transform", "caseops_v1"]
    command += ["--shard-tokens", "1500", "--batch-mb", "0.005", "--journal-seconds", "0", "--workers", "1"]

    def run_dying(out: Path, place: int) -> str:
        calls = 0

        def counting(real):
            def call(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls == place:
                    raise Killed
                result = real(*arguments, **named)
                calls += 1
                if calls == place:
                    raise Killed
                return result

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", counting(os.fsync))
            patch.setattr(os, "replace", counting(os.replace))
            try:
                assert prepare.main([*command, "--out", str(out)]) == 0
            except Killed:
                return "killed"
        return str(calls)

    writes = int(run_dying(folder / "out", 0))
    return command, content(folder / "out"), run_dying, writes


def test_batches_over_parts_and_formats_start_anywhere(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"all.jsonl{suffix}"
        path.write_bytes(b"".join(compress(lines(corpus(count))) for count in (20, 30)))
        everything = list(documents.batches([path], "text", 3000))
        for number in (1, len(everything) - 1):
            again = list(documents.batches([path], "text", 3000, everything[number - 1].after))
            assert [batch.records for batch in again] == [batch.records for batch in everything[number:]]
