"""A proved dataset on its way to a local hub and back; what is not proved stays."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from data import card, download, publish
from data.shards import checksum, train_tokenizer
from helpers.data_side import content, run_prepare, verify
from helpers.hub_server import Hub, hub_client

REPOSITORY = "someone/sp300"
TRAIN = "fineweb_train_000001.bin"


@pytest.fixture(scope="module")
def proved(tmp_path_factory) -> Path:
    """A small dataset of three training shards, proved against its documents."""
    folder = tmp_path_factory.mktemp("proved")
    texts = [f"Document {number} of a house by the river, {number * number} times." for number in range(300)]
    model = train_tokenizer(texts, folder / "small", 300)
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[3]]))
    options = ["--val-docs", 20, "--tokenizer", model, "--sidecar", "--shard-tokens", 5000, "--name", "sp300"]
    assert run_prepare(source, "--out", folder / "data", *options) == 0
    return folder


@pytest.fixture
def folder(proved, tmp_path, capsys) -> Path:
    """A copy of it with its proof."""
    copy = Path(shutil.copytree(proved / "data", tmp_path / "copy"))
    code, report = verify(capsys, copy, "--documents", proved / "texts.jsonl", "--card")
    assert code == 0, report
    return copy


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that takes uploads with the token `may-write`, which the client has."""
    with Hub() as hub:
        hub_client(monkeypatch, hub, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", "may-write")
        hub.write_token = "may-write"
        yield hub


@pytest.fixture
def fetch(tmp_path, monkeypatch, capsys):
    """data/download.py in this process: its exit code and what it says."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["download.py", *arguments, "--out", str(tmp_path / "out")])
        capsys.readouterr()
        code = download.main()
        output, errors = capsys.readouterr()
        return code, output + errors

    return run


def said(capsys: pytest.CaptureFixture, folder: Path, repository: str = REPOSITORY) -> str:
    """The one line with which data/publish.py refuses."""
    capsys.readouterr()
    assert publish.main([str(folder), repository]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("publish: ") and errors.count("\n") == 1, errors
    return errors


def test_the_card_says_what_the_manifest_and_the_proof_say(proved, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    text = (folder / card.CARD).read_text()
    documents, tokens, size = (manifest[name] for name in ("docs_train", "train_tokens", "train_bytes"))
    assert f"| training | {documents:,} | {tokens:,} | {size:,} | {tokens / size:.5f} |" in text
    assert "| training documents equal to a validation document | 0 |" in text
    assert "Left out of training: 1 documents equal" in text
    assert all(
        facts["sha256"] in text for facts in [*manifest["files"].values(), *manifest["recipe"]["sources"]]
    )
    assert "val tokens decode to the raw documents: 20 exactly" in text and "Not proved yet" not in text
    assert "Not proved yet" in (proved / "data" / card.CARD).read_text()


def test_a_proved_dataset_goes_to_the_hub_and_comes_back(folder, hub, fetch, tmp_path, capsys):
    assert publish.main([str(folder), REPOSITORY]) == 0
    assert f"./data/download.py {REPOSITORY}" in capsys.readouterr().out
    names = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    assert hub.commits == [names, sorted([publish.README, card.PROOF, "manifest.json"])]
    there = hub.repositories[REPOSITORY]
    assert there[publish.README].decode() == (folder / card.CARD).read_text()
    assert all(there[name] == (folder / name).read_bytes() for name in [*names, card.PROOF, "manifest.json"])

    code, output = fetch(REPOSITORY)
    assert code == 0 and "all sizes and checksums right" in output
    back = tmp_path / "out" / "datasets" / "sp300"
    assert content(back) == {name: digest for name, digest in content(folder).items() if name != card.CARD}
    assert verify(capsys, back)[0] == 0 and card.read_proof(back)["verdict"] == "proved"
    requests = len(hub.seen)
    assert fetch(REPOSITORY)[0] == 0 and len(hub.seen) == requests
    (back / TRAIN).write_bytes(bytes(len(there[TRAIN])))
    assert (
        "another sha256" in fetch(REPOSITORY, "--verify")[1] and (back / TRAIN).read_bytes() == there[TRAIN]
    )

    # Again: nothing is sent a second time.
    uploads = [seen for seen in hub.seen if seen.method == "PUT"]
    assert publish.main([str(folder), REPOSITORY]) == 0
    assert [seen for seen in hub.seen if seen.method == "PUT"] == uploads


def test_a_part_of_a_published_dataset_is_a_dataset(folder, hub, fetch, tmp_path, capsys):
    assert publish.main([str(folder), REPOSITORY]) == 0
    assert fetch(REPOSITORY, "--train-shards", "1")[0] == 0
    back = tmp_path / "out" / "datasets" / "sp300"
    manifest = json.loads((back / "manifest.json").read_text())
    assert TRAIN not in manifest["files"] and not (back / TRAIN).exists() and not (back / card.PROOF).exists()
    assert manifest["train_tokens"] == 5000 and manifest["source"]["train_shards_there"] == 3
    code, report = verify(capsys, back)
    assert code == 0 and report["counts"]["train_tokens"] == 5000
    assert "has 3; ask for at most that many" in fetch(REPOSITORY, "--train-shards", "4")[1]
    assert fetch(REPOSITORY)[0] == 0
    assert (back / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    assert (back / card.PROOF).exists() and verify(capsys, back)[0] == 0


def test_an_upload_that_was_stopped_is_no_dataset_and_goes_on(folder, hub, fetch, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(publish, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert publish.main([str(folder), REPOSITORY]) == 130
    assert "has not finished a dataset there" in fetch(REPOSITORY)[1]
    assert publish.main([str(folder), REPOSITORY]) == 0 and fetch(REPOSITORY)[0] == 0


def test_what_is_not_proved_stays(proved, folder, hub, capsys):
    assert "has no proof.json" in said(capsys, proved / "data")
    proof = json.loads((folder / card.PROOF).read_text())
    for changes, message in (
        ({"verdict": "refuted"}, "says 'refuted'"),
        ({"manifest_sha256": "0" * 64}, "is about another manifest.json"),
        ({"format": "other"}, "of another format"),
    ):
        changed = proof | changes
        changed["checksum"] = checksum(changed)
        (folder / card.PROOF).write_text(json.dumps(changed))
        assert message in said(capsys, folder)
    (folder / card.PROOF).write_text(json.dumps(proof | {"verdict": "so"}))
    assert "was changed" in said(capsys, folder)
    (folder / card.PROOF).write_text(json.dumps(proof))
    values = bytearray((folder / TRAIN).read_bytes())
    values[-1] ^= 1
    (folder / TRAIN).write_bytes(values)
    assert "is not what the manifest says" in said(capsys, folder)
    (folder / TRAIN).unlink()
    assert "is not what the manifest says" in said(capsys, folder)
    (folder / "manifest.json").write_text("{}")
    assert "of another format" in said(capsys, folder)
    assert not hub.seen and not hub.repositories


def test_a_refuted_dataset_loses_its_proof(folder, hub, capsys):
    values = bytearray((folder / TRAIN).read_bytes())
    values[-1] ^= 1
    (folder / TRAIN).write_bytes(values)
    assert verify(capsys, folder, "--card")[0] == 1
    assert "has no proof.json" in said(capsys, folder)


def test_what_the_hub_refuses_is_one_line(folder, hub, fetch, capsys, monkeypatch):
    assert "no repository" in said(capsys, folder, "a/b/c") or "HFValidationError" in said(
        capsys, folder, "a/b/c"
    )
    hub.add("someone/else", {"manifest.json": b"{}"})
    assert "holds another dataset" in said(capsys, folder, "someone/else")
    assert "of another format" in fetch("someone/else")[1]
    hub.write_token = "other"
    assert "set HF_TOKEN" in said(capsys, folder)
    monkeypatch.setattr(publish.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in said(capsys, folder)


def test_a_repository_that_contradicts_its_manifest_is_refused(folder, hub, fetch):
    assert publish.main([str(folder), REPOSITORY]) == 0
    hub.add(REPOSITORY, {TRAIN: bytes(len(hub.repositories[REPOSITORY][TRAIN]))})
    assert f"lacks {TRAIN} as its manifest says" in fetch(REPOSITORY)[1]
    assert "leave it out" in fetch(REPOSITORY, "--repository", "a/b")[1]
