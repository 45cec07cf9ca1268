"""The embedded corpus, built from a small made-up package tree:
deterministic, disjoint, exact, reused, repaired.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import demo
from data.shards import BOS, read_shard, sha256_file
from helpers import ROOT

SPEECH = (
    "the value of this function depends on its first argument when a caller passes another list and returns "
    "whether every element was found before we read more text from each open file or stream into memory"
)
WORDS = SPEECH.split(" ")
COPY = (
    "Shared between two modules, so it must be counted once only: " + "a sentence about deduplication. " * 6
)


def sentence(chooser: random.Random) -> str:
    return " ".join(chooser.choice(WORDS) for _ in range(12)).capitalize() + "."


def package_tree(root: Path, modules: int = 120) -> Path:
    """Packages with docstrings, comments, attached documentation, copies, and files that do not parse."""
    chooser = random.Random(7)
    for number in range(modules):

        def prose(lines: int, indent: str = "") -> str:
            return ("\n" + indent).join(sentence(chooser) for _ in range(lines))

        folder = root / f"package{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{number}.py").write_text(
            f'"""{prose(3)}"""\n\n# {prose(4, "# ")}\nclass Thing:\n    """{prose(3, "    ")}"""\n\n'
            f'    async def work(self):\n        """{prose(3, "        ")}\n'
            '        Caf\u00e9 \ufb01ne \u00bd.\n        """\n'
            f'        if True:\n            def inner():\n                """{prose(2, " " * 16)}"""\n\n'
            f'_add_docstr(Thing, """{prose(3)}""")\n',
            encoding="utf-8",
        )
    (root / "copy_one.py").write_text(f'"""{COPY}"""\n')
    (root / "copy_two.py").write_text(f'def copy():\n    """{COPY.replace(". ", ".  ")}"""\n')
    (root / "broken.py").write_text(
        'def broken(:\n    """' + "not read: the file does not parse " * 5 + '"""\n'
    )
    (root / "binary.py").write_bytes(b"\xff\xfe\0")
    (root / "table.py").write_text('"""' + "0.123, 4.567; " * 40 + '"""\n')
    (root / "surrogate.py").write_text(
        '"""\\ud800 ' + "a lone surrogate and \\0 a nul character " * 5 + '"""\n'
    )
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    (root / "tests").mkdir()
    (root / "tests" / "test_it.py").write_text('"""' + "text of a test is left out " * 10 + '"""\n')
    information = root / "package0-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Name: package0\nVersion: 1.0\n\n" + "A long description of it. " * 20
    )
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return package_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory) -> Path:
    return demo.build(tmp_path_factory.mktemp("data") / "demo", 512, [tree])


def read_all(folder: Path, part: str) -> np.ndarray:
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(f"fineweb_{part}_*.bin"))])


def documents(folder: Path, part: str) -> list[str]:
    tokens = read_all(folder, part)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return tokenizer.decode([ids.tolist() for ids in np.split(tokens, np.flatnonzero(tokens == BOS))[1:]])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_manifest_agrees_with_the_files(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in built.iterdir()} - {"manifest.json"}
    assert len(list(built.glob("fineweb_train_*.bin"))) == demo.TRAIN_SHARDS
    for part in ("val", "train"):
        tokens, texts = read_all(built, part), documents(built, part)
        assert tokens[0] == BOS and len(tokens) == manifest[f"{part}_tokens"]
        assert len(texts) == int((tokens == BOS).sum()) == manifest[f"docs_{part}"]
        raw = sum(len(text.encode()) for text in texts)
        assert raw == manifest[f"{part}_bytes"] == manifest[f"{part}_lut_bytes"]
        assert manifest[f"{part}_not_exact"] == 0
    assert (built / "validation.txt").read_text(encoding="utf-8") == "\n".join(documents(built, "val")) + "\n"
    assert manifest["tokenizer"]["sha256"] == manifest["files"]["tokenizer.model"]["sha256"]
    assert manifest["transform"] == "none" and manifest["lossless"] is True
    assert 0 < manifest["references"]["xz -9e"] < 8


def test_validation_is_held_out_and_every_document_is_there_once(built):
    training, validation = documents(built, "train"), documents(built, "val")
    everything = training + validation
    assert len(set(everything)) == len(everything)
    assert 0 < sum(map(len, validation)) < 0.1 * sum(map(len, everything))
    assert sum(text.startswith("Shared between") for text in everything) == 1
    assert sum("long description" in text for text in everything) == 1
    assert sum("a lone surrogate" in text for text in everything) == 1
    assert any("Caf\u00e9 fine 1\u20442." in text for text in everything)
    for absent in ("does not parse", "0.123", "is left out"):
        assert not any(absent in text for text in everything)
    ends = {end for text in validation for end in (text[:200], text[-200:])}
    assert not any(text[:200] in ends or text[-200:] in ends for text in training)


def test_the_documents_are_written_for_other_tokenizers(built, tmp_path):
    demo.export_text(built, tmp_path / "text")
    for part, name in (("train", "training.jsonl"), ("val", "validation.jsonl")):
        lines = (tmp_path / "text" / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["text"] for line in lines] == documents(built, part)


def test_near_copies_of_validation_documents_are_left_out():
    chooser = random.Random(1)
    texts = ["\n".join(sentence(chooser) for _ in range(10)) for _ in range(200)]
    held_out = texts[0]
    lines = held_out.split("\n")
    same_start = "\n".join(lines[:4]) + "\n" + sentence(chooser) * 40
    same_end = sentence(chooser) * 40 + "\n" + "\n".join(lines[-4:])
    within_a_long_one = "\n".join([*texts[100].split("\n") * 20, *lines[2:7], sentence(chooser)])
    one_line_in_common = "\n".join([sentence(chooser) for _ in range(9)] + lines[4:5])
    corpus = demo.split([*texts, same_start, same_end, within_a_long_one, one_line_in_common])
    assert held_out.replace("\n", " ") in corpus.validation
    assert corpus.held_back == 3
    assert corpus.training[-1] == one_line_in_common.replace("\n", " ")


def test_the_same_packages_give_the_same_bytes_anywhere(tree, built, tmp_path, monkeypatch):
    copy = package_tree(tmp_path / "elsewhere" / "tree")
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda root: ((at, folders, files[::-1]) for at, folders, files in walk(root))
    )
    other = demo.build(tmp_path / "deeper" / "down" / "other", 512, [copy])
    assert digests(other) == digests(built)


def test_a_complete_dataset_is_reused(tree, built, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    demo.build(built, 512, [tree])
    output = capsys.readouterr().out
    assert "reused" in output and output.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "fineweb_train_000001.bin differs": lambda out: os.truncate(out / "fineweb_train_000001.bin", 1500),
    "tokenizer.model is missing": lambda out: (out / "tokenizer.model").unlink(),
    "fineweb_val_000000.bin differs": lambda out: flip(out / "fineweb_val_000000.bin", 1100),
    "manifest.json is not readable": lambda out: os.truncate(out / "manifest.json", 100),
    "manifest.json was changed": lambda out: (out / "manifest.json").write_text(
        (out / "manifest.json").read_text().replace('"val_bytes": ', '"val_bytes": 1')
    ),
    "no complete dataset": lambda out: (out / "manifest.json").unlink(),
    "fineweb_train_000099.bin is not in the manifest": lambda out: (out / "fineweb_train_000099.bin").touch(),
}


def test_damage_is_named_and_repaired(tree, built, capsys):
    whole = digests(built)
    for message, harm in DAMAGE.items():
        harm(built)
        demo.build(built, 512, [tree])
        output = capsys.readouterr().out
        assert message in output and "ready" in output, output
        assert digests(built) == whole


def test_other_packages_or_options_make_it_stale(tmp_path, capsys):
    tree = package_tree(tmp_path / "tree", modules=40)
    out = demo.build(tmp_path / "out", 512, [tree])
    for change in ("packages", "options"):
        if change == "packages":
            (tree / "new.py").write_text('"""' + "a newly installed package says something here " * 5 + '"""')
        capsys.readouterr()
        demo.build(out, 512 if change == "packages" else 480, [tree])
        assert "stale" in capsys.readouterr().out
    assert any("newly installed" in text for part in ("train", "val") for text in documents(out, part))


def test_an_interrupted_build_leaves_the_old_dataset_and_nothing_half_made(tree, built, monkeypatch, capsys):
    whole = digests(built)
    monkeypatch.setattr(demo, "write_shard", lambda path, values: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        demo.build(built, 480, [tree])
    assert digests(built) == whole
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def test_what_a_killed_build_left_is_cleared_away(tree, tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from data import demo\n"
        "demo.write_shard = lambda path, values: time.sleep(60)\n"
        "demo.build(Path(sys.argv[1]), 512, [Path(sys.argv[2])])"
    )
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(out), str(tree)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / ".demo.building" / "tokenizer.model").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and (tmp_path / ".demo.building").exists()
    demo.build(out, 512, [tree])
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize(
    "names", [["notes.txt"], ["fineweb_train_000000.bin"], ["manifest.json", "tokenizer.model"]]
)
def test_a_folder_that_is_no_demo_dataset_is_never_replaced(tree, tmp_path, names):
    for name in names:
        (tmp_path / name).write_text('{"name": "mine"}')
    with pytest.raises(demo.DemoError, match=r"no demo dataset.*--out"):
        demo.build(tmp_path, 512, [tree])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_no_documentation_is_an_error(tmp_path):
    with pytest.raises(demo.DemoError, match="no documentation"):
        demo.build(tmp_path / "out", 512, [tmp_path])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere/demo"])
def test_an_unwritable_place_is_one_line_and_exit_code_2(tmp_path, out):
    (tmp_path / "file").touch()
    result = subprocess.run(
        [sys.executable, "data/demo.py", "--out", tmp_path / out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "--out" in result.stderr
