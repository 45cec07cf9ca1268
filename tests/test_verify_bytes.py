"""verify_bytes.py: a right dataset is proved, and each way of being wrong is found and named."""

from __future__ import annotations

import json
import random
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import verify_bytes
from data import prepare
from data.shards import BOS, HEADER_BYTES, ShardError, read_shard, sha256_file, train_tokenizer, write_shard
from helpers import ROOT
from helpers.damage import change_bytes
from helpers.data_side import refuted, verify
from lossless_caps import TRANSFORMS

SHARED = ROOT.parent / "shared" / "data"
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
    "McDonald",
    "a",
    "I",
    "\ue001",
    "\n",
    "\n\n",
]


def corpus(count: int) -> list[str]:
    """Random documents of 60 to 200 words."""
    generator = random.Random(count)
    return [
        f"Document {number} " + " ".join(generator.choices(WORDS, k=generator.randint(60, 200))) + " end"
        for number in range(count)
    ]


def write_lines(path: Path, texts: list[str]) -> Path:
    """The documents as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Data:
    """A source of 120 documents, 20 of them for validation, and the dataset made of it."""

    def __init__(self, folder: Path, transform: str = "caseops_v1"):
        self.texts = corpus(120)
        self.source = write_lines(folder / "all.jsonl", self.texts)
        encode, _, operators, _ = TRANSFORMS[transform]
        self.tokenizer = train_tokenizer(map(encode, self.texts), folder / "tokenizer", 420, operators)
        self.transform = transform
        self.folder = self.make(folder / "dataset", 20, *(("--sidecar",) if transform == "none" else ()))

    def make(self, out: Path, val_docs: int, *options: object) -> Path:
        """A dataset with the first `val_docs` documents for validation."""
        assert (
            prepare.main(
                [
                    str(argument)
                    for argument in (
                        self.source,
                        "--out",
                        out,
                        "--val-docs",
                        val_docs,
                        "--transform",
                        self.transform,
                        "--tokenizer",
                        self.tokenizer,
                        "--shard-tokens",
                        9000,
                        "--max-case-lost",
                        1,
                        "--workers",
                        1,
                        *options,
                    )
                ]
            )
            == 0
        )
        return out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Data:
    return Data(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


def sign(folder: Path, **changes) -> None:
    """Make the manifest agree with the files again, as a builder with an error would write it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    for name, facts in manifest["files"].items():
        facts |= {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        if name.endswith(".bin"):
            facts["tokens"] = (facts["size"] - HEADER_BYTES) // 2
    manifest["checksum"] = prepare.checksum(manifest)
    path.write_text(json.dumps(manifest))


def change(path: Path, edit) -> None:
    """Rewrite a shard with its values edited in place or replaced."""
    values = np.array(read_shard(path))
    result = edit(values)
    write_shard(path, values if result is None else result)


# === RIGHT DATASETS ===


@pytest.mark.parametrize("workers", [1, 2])
def test_a_right_dataset_is_proved_against_its_documents(made, capsys, workers):
    assert (
        verify_bytes.main(
            [str(made.folder), "--documents", str(made.source), "--json", "--workers", str(workers)]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "proved" and report["not_proved"] == []
    assert (
        sum(report["documents"]["val"].values()) == 20 and sum(report["documents"]["train"].values()) == 100
    )
    assert report["documents"]["val"]["case_lost"] == 0
    assert report["counts"]["val_bytes"] == sum(len(text.encode()) for text in made.texts[:20])
    assert (
        report["overlap"]["equal"]
        == report["overlap"]["same_opening"]
        == report["overlap"]["found_inside"]
        == 0
    )


def test_without_documents_it_says_what_it_could_not_prove(made, capsys):
    code, report = verify(capsys, made.folder)
    assert code == 0 and any("--documents" in text for text in report["not_proved"])
    assert any("sidecar sums" in text for text in report["proved"])


@pytest.mark.parametrize("transform", ["none", "caseops_v3", "casefold"])
def test_every_transform(tmp_path, capsys, transform):
    data = Data(tmp_path, transform)
    code, report = verify(capsys, data.folder, "--documents", data.source)
    assert code == 0, report
    tiers = report["documents"]["val"]
    if transform == "casefold":
        assert tiers["lossy"] == 20 and any("lossy transform" in text for text in report["proved"])
    if transform == "none":
        assert tiers["exact"] + tiers["normalised"] == 20
        # Runs of newlines are one piece worth one byte to the tables, and more in the raw text.
        assert "byte tables are the count" in refuted(capsys, data.make(tmp_path / "tables", 20))
    if transform == "caseops_v3":
        assert tiers["case_lost"] == report["documents"]["train"]["case_lost"] == 0
        assert tiers["exact"] + tiers["normalised"] == 20


@pytest.mark.parametrize("transform", ["caseops_v1", "caseops_v3"])
def test_capitals_lost_by_the_normalisation(tmp_path, capsys, monkeypatch, transform):
    """The ordinal indicator becomes the letter o, so that the word behind it begins inside a word."""
    words = [word for word in WORDS if not word.startswith("\ue001")]
    monkeypatch.setattr(sys.modules[__name__], "WORDS", [*words, "Intel\u2122", "\uff21\uff23", "so\u2026"])
    data = Data(tmp_path, transform)
    code, report = verify(capsys, data.folder, "--documents", data.source)
    assert (
        code == 0
        and report["documents"]["val"]["case_lost"] == report["documents"]["train"]["case_lost"] == 0
    )
    data.texts[7] = "It is 45\u00baC " + data.texts[7]
    write_lines(data.source, data.texts)
    odd = data.make(tmp_path / "odd", 20)
    error = refuted(capsys, odd, "--documents", data.source)
    assert error.startswith("val document 7 ('It is 45\u00baC ") and "1 of 20 val documents" in error
    code, report = verify(capsys, odd, "--documents", data.source, "--max-case-lost", 0.05)
    assert code == 0 and report["documents"]["val"]["case_lost"] == 1
    assert any("cannot be recovered, first in val document 7" in text for text in report["proved"])


def test_an_inverse_that_loses_capitals_is_refuted(made, capsys, monkeypatch):
    """Right tokens and bytes are not enough: the capitals must come back, and most documents have some."""
    real = verify_bytes.decode_caseops
    monkeypatch.setattr(verify_bytes, "decode_caseops", lambda *given, **named: real(*given, **named).lower())
    error = refuted(capsys, made.folder, "--documents", made.source)
    assert error.startswith("val document 0 ('Document 0 ") and "20 of 20 val documents" in error


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real text is not there")
def test_official_validation_documents_are_recovered_exactly(tmp_path, capsys):
    source = SHARED / "fineweb_val_head.jsonl.xz"
    model = SHARED / "tokenizers" / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    out = tmp_path / "out"
    assert (
        prepare.main(
            [
                str(source),
                "--out",
                str(out),
                "--val-docs",
                "400",
                "--transform",
                "caseops_v1",
                "--tokenizer",
                str(model),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    code, report = verify(capsys, out, "--documents", source)
    assert code == 0
    assert report["documents"]["val"] == {"exact": 400, "normalised": 0, "case_lost": 0, "lossy": 0}
    counts = report["counts"]
    assert counts["val_sidecar_bytes"] == counts["val_bytes"]
    operators = counts["val_lut_bytes"] / counts["val_bytes"] - 1
    assert 0.07 < operators < 0.11


# === WRONG BYTES ===


def charge_operators(folder: Path) -> int:
    """Give every operator its 3 UTF-8 bytes in the sidecar; the bytes added."""
    added = 0
    for path in sorted(folder.glob("fineweb_val_bytes_*.bin")):
        tokens = read_shard(folder / path.name.replace("bytes_", ""))

        def edit(values, tokens=tokens):
            nonlocal added
            operators = (tokens >= 4) & (tokens <= 7) & (values == 0)
            values[operators] = 3
            added += 3 * int(operators.sum())

        change(path, edit)
    return added


def test_a_counter_that_charges_operators_is_caught(made, copy, capsys):
    added = charge_operators(copy)
    true = json.loads((copy / "manifest.json").read_text())["val_bytes"]
    assert added / true > 0.05
    sign(copy)
    assert "operator U+E001, worth 0 bytes" in refuted(capsys, copy)
    sign(copy, val_bytes=true + added, val_sidecar_bytes=true + added)
    assert "operator U+E001, worth 0 bytes" in refuted(capsys, copy)
    (copy / "manifest.json").unlink()
    assert "worth 0 bytes" in refuted(capsys, copy)


def test_wrong_sums_are_caught(made, copy, capsys):
    path = copy / "fineweb_val_bytes_000000.bin"
    letters = np.flatnonzero(read_shard(path) > 1)

    def more(values):
        values[letters[0]] += 5

    def less(values):
        values[letters[-1]] -= 1
        values[letters[0]] -= 4

    change(path, more)
    sign(copy)
    assert "sidecar: sums to" in refuted(capsys, copy)
    change(path, less)
    sign(copy)
    code, _ = verify(capsys, copy)
    assert code == 0
    assert "sidecar: gives" in refuted(capsys, copy, "--documents", made.source)


def test_a_sidecar_that_does_not_fit(copy, capsys):
    path = copy / "fineweb_val_bytes_000000.bin"
    change(path, lambda values: values[:-1])
    sign(copy)
    assert "the sidecar's shards have" in refuted(capsys, copy)
    path.unlink()
    (copy / "manifest.json").unlink()
    assert "no byte sidecar" in refuted(capsys, copy)


def test_bytes_for_bos_are_caught(copy, capsys):
    def edit(values):
        values[0] = 1

    change(copy / "fineweb_val_bytes_000000.bin", edit)
    sign(copy)
    assert "<s> and worth no bytes" in refuted(capsys, copy)


# === WRONG TOKENS ===


def test_one_wrong_token_is_caught(made, copy, capsys):
    path = copy / "fineweb_train_000001.bin"

    def edit(values):
        values[values != BOS] = np.where(np.arange((values != BOS).sum()) == 500, 300, values[values != BOS])

    change(path, edit)
    assert "sha256 differs" in refuted(capsys, copy)
    sign(copy)
    assert "do not decode to the raw document" in refuted(capsys, copy, "--documents", made.source)


def test_ids_beyond_the_vocabulary_and_missing_bos(made, copy, capsys):
    path = copy / "fineweb_val_000000.bin"
    original = np.array(read_shard(path))

    def too_large(values):
        values[77] = 5000

    change(path, too_large)
    sign(copy)
    assert "token 77 is 5000" in refuted(capsys, copy)
    write_shard(
        path,
        np.where(np.arange(len(original)) == np.flatnonzero(original == BOS)[3], 300, original).astype("<u2"),
    )
    sign(copy)
    assert "19 documents (BOS), the manifest says 20" in refuted(capsys, copy)


def test_missing_and_added_files(made, copy, capsys):
    names = sorted(path.name for path in copy.glob("fineweb_train_*.bin"))
    shutil.copy(copy / names[0], copy / "fineweb_train_000099.bin")
    assert "not in the manifest" in refuted(capsys, copy)
    (copy / "manifest.json").unlink()
    assert "is missing, but" in refuted(capsys, copy)
    (copy / "fineweb_train_000099.bin").unlink()
    (copy / names[1]).write_bytes((copy / names[1]).read_bytes()[:-2])
    assert "bytes, but" in refuted(capsys, copy)


def test_other_documents_are_refuted(made, tmp_path, capsys):
    for name, texts in {
        "fewer": made.texts[:-1],
        "more": [*made.texts, "One more"],
        "case": [*made.texts[:50], made.texts[50].replace("NASA", "Nasa"), *made.texts[51:]],
        "swapped": [*made.texts[1::-1], *made.texts[2:]],
    }.items():
        source = write_lines(tmp_path / f"{name}.jsonl", texts)
        refuted(capsys, made.folder, "--documents", source)


# === OVERLAP ===


def test_the_trap_of_a_smaller_split_is_refused(made, tmp_path, capsys):
    """Training shards exported with fewer validation documents hold the rest of the validation set."""
    leaky = made.make(tmp_path / "leaky", 5)
    for path in leaky.glob("fineweb_val_*.bin"):
        path.unlink()
    for path in made.folder.glob("fineweb_val_*.bin"):
        shutil.copy(path, leaky)
    for manifest in (True, False):
        if manifest:
            full = json.loads((made.folder / "manifest.json").read_text())
            files = {path.name: {} for path in leaky.iterdir() if path.name != "manifest.json"}
            sign(
                leaky,
                files=files,
                docs_val=20,
                **{name: full[name] for name in full if name.startswith("val_")},
            )
        else:
            (leaky / "manifest.json").unlink()
        assert "15 training documents equal a validation document" in refuted(capsys, leaky)
    code, report = verify(capsys, leaky, "--max-overlap", 15)
    assert code == 0 and report["overlap"]["equal"] == 15


def test_validation_text_without_bos_across_a_shard_border_is_found(made, tmp_path, capsys):
    document = np.array(read_shard(made.folder / "fineweb_val_000000.bin"))
    starts = np.flatnonzero(document == BOS)
    hidden = next(document[begin + 1 : end] for begin, end in pairwise(starts) if end - begin > 200)
    train = np.concatenate(
        [np.array(read_shard(path)) for path in sorted(made.folder.glob("fineweb_train_*.bin"))]
    )
    train = np.concatenate([train[:5000], hidden, train[5000:]]).astype("<u2")
    folder = tmp_path / "hidden"
    shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("fineweb_train*", "manifest.json"))
    cut = 5000 + 30
    write_shard(folder / "fineweb_train_000000.bin", train[:cut])
    write_shard(folder / "fineweb_train_000001.bin", train[cut:])
    assert "stands inside the training shards, at token 5000" in refuted(capsys, folder)


def test_a_copy_with_another_ending_is_found(made, copy, capsys):
    document = np.array(read_shard(copy / "fineweb_val_000000.bin"))
    last = sorted(copy.glob("fineweb_train_*.bin"))[-1]
    change(last, lambda values: np.concatenate([values, document[:80]]).astype("<u2"))
    (copy / "manifest.json").unlink()
    assert "start like" in refuted(capsys, copy)


# === NAMES AND COMMAND LINE ===


def test_a_canonical_name_needs_the_published_numbers(made, copy, capsys):
    assert "20 validation documents instead of 50,000" in refuted(capsys, copy, "--name", "caseops_v1")
    assert "whose transform is none" in refuted(capsys, copy, "--name", "sp8192")
    sign(copy, name="caseops_v1")
    assert "named caseops_v1" in refuted(capsys, copy)
    renamed = copy.rename(copy.with_name("fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"))
    sign(renamed, name="mine")
    assert "named caseops_v1" in refuted(capsys, renamed)


def test_errors_of_use(tmp_path, made, capsys):
    for arguments in (
        [tmp_path / "none"],
        [made.folder, "--documents", tmp_path / "none.jsonl"],
        [tmp_path],
        [made.folder, "--workers", 0],
        [made.folder, "--tokenizer", made.source],
    ):
        capsys.readouterr()
        code = verify_bytes.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        if arguments == [tmp_path]:
            assert code == 1
        else:
            assert code == 2 and error.startswith("verify_bytes: ") and error.count("\n") == 1


# === MUTANTS ===


def test_a_copy_of_a_shard_is_refuted(copy, capsys):
    """The trainer, or another reader, might take it for more data."""
    shutil.copy(copy / "fineweb_train_000000.bin", copy / "fineweb_train_000000 (1).bin")
    assert verify_bytes.main([str(copy), "--workers", "1"]) == 1
    assert "fineweb_train_000000 (1).bin: not a shard's name" in capsys.readouterr().out


def test_mutated_shards_give_an_error_or_the_right_count(tmp_path):
    generator = random.Random(1)
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(700, dtype="<u2"))
    content, refused = path.read_bytes(), 0
    for _ in range(1500):
        mutant = change_bytes(content, generator)
        path.write_bytes(mutant)
        try:
            values = read_shard(path)
        except ShardError as error:
            refused += 1
            assert path.name in str(error) and ";" in str(error)
            continue
        assert mutant[:12] == content[:12] and len(values) == 700
        assert values.tobytes() == mutant[HEADER_BYTES:]
    assert 300 < refused < 1500


def test_mutated_manifests_give_an_error_or_the_right_counts(made, copy):
    generator = random.Random(2)
    path = copy / "manifest.json"
    content = path.read_bytes()
    expected = json.loads(content)
    options = verify_bytes.parse_arguments([str(copy), "--workers", "1"])
    refused = 0
    for _ in range(700):
        path.write_bytes(change_bytes(content, generator))
        proof = verify_bytes.Proof(copy, options)
        try:
            proof._manifest()
        except verify_bytes.Refuted:
            refused += 1
            continue
        assert proof.manifest in ({}, expected)
        assert proof.manifest or proof.report["not_proved"]
    assert refused > 500


def test_mutated_datasets_are_never_proved(made, copy, capsys):
    generator = random.Random(3)
    files = sorted(path for path in copy.iterdir() if path.suffix in (".bin", ".model"))
    for _ in range(40):
        path = generator.choice(files)
        content = path.read_bytes()
        mutant = change_bytes(content, generator)
        path.write_bytes(mutant)
        assert verify_bytes.main([str(copy), "--workers", "1"]) == (0 if mutant == content else 1)
        path.write_bytes(content)
    assert verify_bytes.main([str(copy), "--workers", "1"]) == 0
