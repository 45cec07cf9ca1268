"""The contest's documents from a local hub: stored, streamed into preparation, and continued after a kill."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import download, prepare, stream
from data.card import read_proof
from data.documents import Position, batches, expand, survey
from data.running_hash import RunningSha256
from data.shards import train_tokenizer
from helpers.data_side import content, refused, run_prepare
from helpers.hub_server import Hub, hub_client

NAME = f"datasets/{stream.DOCUMENTS}"
FACTS = f"datasets/{stream.FACTS}"
WORDS = "the of a House river Time naïve 3,141 (see below) science. Why? \n".split(" ")


def lines(count: int) -> bytes:
    """JSON lines of different documents."""
    generator = random.Random(count)
    texts = (f"Document {number} " + " ".join(generator.choices(WORDS, k=20)) for number in range(count))
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def publish(hub: Hub, documents: bytes, **changes: object) -> bytes:
    """Put documents and what their manifest says of them on a hub."""
    facts = {
        "num_docs": documents.count(b"\n"),
        "docs_val": 50,
        "docs_bytes": len(documents),
        "docs_sha256": hashlib.sha256(documents).hexdigest(),
    }
    said = json.dumps(facts | changes).encode()
    hub.add(stream.REPOSITORY, {NAME: documents, FACTS: said, "README.md": b"words"})
    hub.small = {FACTS, "README.md"}
    return documents


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with 2,000 documents, which the hub client of this process talks to; ranges are small."""
    monkeypatch.setattr(stream, "FIRST_RANGE", 10_000)
    monkeypatch.setattr(stream, "LARGEST_RANGE", 40_000)
    with Hub() as hub:
        hub_client(monkeypatch, hub, tmp_path / "home")
        publish(hub, lines(2000))
        yield hub


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """data/download.py docs in this process: its exit code and what it says."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["download.py", "docs", "--out", str(tmp_path / "out"), *arguments])
        capfd.readouterr()
        code = download.main()
        output, errors = capfd.readouterr()
        return code, output + errors

    return run


def ranges(hub: Hub) -> list[tuple[int, int]]:
    """The ranges of the documents that were asked of the hub's storage, in order of their starts."""
    asked = [seen.range for seen in hub.downloads(stream.DOCUMENTS) if seen.host == "localhost"]
    return sorted(tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in asked)


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_a_hash_that_is_put_aside_goes_on(parts):
    running = RunningSha256()
    for part in parts:
        running = RunningSha256(json.loads(json.dumps(running.state())))
        running.update(part)
    assert running.hexdigest() == hashlib.sha256(b"".join(parts)).hexdigest()


def test_documents_are_stored_proved_and_not_asked_for_again(hub, command, tmp_path):
    code, output = command()
    documents = hub.repositories[stream.REPOSITORY][NAME]
    target = tmp_path / "out" / NAME
    assert code == 0 and target.read_bytes() == documents
    assert f"2,000 documents, {len(documents) / 1e9:.2f} GB" in output
    assert f"{len(documents):,} bytes needed on the disk of" in output
    assert output.index("bytes needed") < output.index("fetched")
    assert (tmp_path / "out" / FACTS).read_bytes() == hub.repositories[stream.REPOSITORY][FACTS]
    assert sum(end + 1 - start for start, end in ranges(hub)) == len(documents)
    requests = len(hub.seen)
    assert command()[0] == 0 and len(hub.seen) == requests
    target.write_bytes(documents[:-1] + b" ")
    assert command()[0] == 0 and target.read_bytes() != documents  # sizes alone are looked at
    assert "another sha256" in command("--verify")[1] and target.read_bytes() == documents
    assert sorted(path.name for path in target.parent.iterdir()) == [stream.DOCUMENTS, stream.FACTS]


def test_a_killed_download_goes_on_at_its_last_byte(hub, command, tmp_path):
    documents = hub.repositories[stream.REPOSITORY][NAME]
    digest = hashlib.sha256(documents).hexdigest()
    partial = tmp_path / "out" / "datasets" / f".{stream.DOCUMENTS}.{digest[:16]}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(documents[:70_001])
    assert command()[0] == 0 and (tmp_path / "out" / NAME).read_bytes() == documents
    assert ranges(hub)[0][0] == 70_001 and not partial.exists()


def test_a_broken_connection_repeats_its_range_alone(hub, command, tmp_path):
    hub.cut_after[NAME] = [5_000]
    assert command()[0] == 0
    assert (tmp_path / "out" / NAME).read_bytes() == hub.repositories[stream.REPOSITORY][NAME]
    starts = [start for start, _ in ranges(hub)]
    assert starts[:2] == [0, 0] and len(set(starts)) == len(starts) - 1


def test_what_is_not_as_published_is_refused_and_deleted(hub, command, tmp_path):
    documents = hub.repositories[stream.REPOSITORY][NAME]
    hub.served_as[NAME] = documents[:-2] + b" \n"
    code, output = command()
    assert code == 2 and "does not have the sha256" in output and "deleted" in output
    assert list((tmp_path / "out" / "datasets").iterdir()) == []


def test_a_manifest_that_says_otherwise_is_refused(hub, command, tmp_path):
    publish(hub, lines(100), docs_sha256="0" * 64)
    code, output = command()
    assert code == 2 and "says " + "0" * 64 in output and "name another repository" in output
    hub.add(stream.REPOSITORY, {FACTS: b"[]"})
    shutil.rmtree(tmp_path / "home")
    assert "does not say what the documents are" in command()[1]
    assert ranges(hub) == []


def test_a_full_disk_is_noticed_before_the_first_byte(hub, command, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    code, output = command()
    assert code == 2 and "5,000 free" in output and "hub:docs" in output and ranges(hub) == []


def test_options_that_mean_nothing_are_refused(hub, command):
    assert "docs are no shards" in command("--train-shards", "1")[1]
    hub.repositories[stream.REPOSITORY].pop(NAME)
    assert f"has no {stream.DOCUMENTS}" in command()[1]


@pytest.mark.parametrize("start", [Position(), Position(0, 3, 0)])
def test_a_stream_gives_the_lines_of_the_file_from_any_place(hub, tmp_path, start):
    documents = hub.repositories[stream.REPOSITORY][NAME]
    (tmp_path / "same.jsonl").write_bytes(documents)
    if start.record:
        start = Position(0, 3, len(b"".join(documents.splitlines(keepends=True)[:3])))
    (source,) = expand(["hub:docs"])
    found, wanted = (list(batches([path], "text", 7000, start)) for path in (source, tmp_path / "same.jsonl"))
    assert [batch.records for batch in found] == [batch.records for batch in wanted]
    assert [batch.after for batch in found] == [batch.after for batch in wanted]
    assert survey(source, "text") == survey(tmp_path / "same.jsonl", "text")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    texts = [json.loads(line)["text"] for line in lines(300).splitlines()]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "small", 300)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Interrupt preparation at the `count`-th state it saves."""
    real, saved = prepare.write_json, []

    def interrupted(path: Path, journal: dict) -> None:
        real(path, journal)
        saved.append(path)
        if len(saved) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_json", interrupted)


def test_a_stream_gives_the_dataset_of_the_file_after_kills(hub, tokenizer, tmp_path, monkeypatch, capsys):
    documents = hub.repositories[stream.REPOSITORY][NAME]
    (tmp_path / stream.DOCUMENTS).write_bytes(documents)
    options = ["--val-docs", 50, "--tokenizer", tokenizer, "--shard-tokens", 20_000, "--batch-mb", 0.02]
    options += ["--journal-seconds", 0, "--sidecar"]
    assert run_prepare(tmp_path / stream.DOCUMENTS, "--out", tmp_path / "stored", *options) == 0
    whole, starts = tmp_path / "streamed", []
    for count in (4, 3, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            assert run_prepare("hub:docs", "--out", whole, *options) == 130
        starts.append(json.loads((whole / prepare.JOURNAL).read_text()).get("train", {}).get("position"))
    hub.seen.clear()
    assert run_prepare("hub:docs", "--out", whole, *options) == 0
    assert content(whole) == content(tmp_path / "stored")
    # Beside the validation documents, which are looked at again, all begins where the last run ended.
    begun = starts[-1]["offset"]
    assert begun > 100_000
    assert sum(end + 1 - start for start, end in ranges(hub) if start >= begun) == len(documents) - begun
    assert list(tmp_path.glob("**/*.jsonl")) == [tmp_path / stream.DOCUMENTS]
    capsys.readouterr()
    for said in ("proving it against", "already proved"):
        assert run_prepare("hub:docs", "--out", whole, *options, "--prove") == 0
        assert said in capsys.readouterr().out
    assert read_proof(whole)["not_proved"] == []
    assert "(0.00 GB) is not stored" in refused_disk(hub, tokenizer, tmp_path, capsys)


def refused_disk(hub: Hub, tokenizer: Path, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """What a run says of the disk before it starts."""
    capsys.readouterr()
    run_prepare("hub:docs", "--out", folder / "other", "--val-docs", 50, "--tokenizer", tokenizer)
    return capsys.readouterr().out.partition("train:")[0]


@pytest.mark.parametrize("place, message", [(-40, "the hub promised"), (40, "the hub promised")])
def test_a_stream_that_is_not_as_promised_makes_no_dataset(hub, tokenizer, tmp_path, capsys, place, message):
    documents = bytearray(hub.repositories[stream.REPOSITORY][NAME])
    documents[place] = ord("x")
    hub.served_as[NAME] = bytes(documents)
    options = ["--out", tmp_path / "out", "--val-docs", 50, "--tokenizer", tokenizer]
    for _ in range(2):
        assert message in refused(capsys, "hub:docs", *options)
    assert not (tmp_path / "out" / prepare.MANIFEST).exists()


def test_validation_documents_that_come_differently_again_are_refused(
    hub, tokenizer, tmp_path, capsys, monkeypatch
):
    documents = hub.repositories[stream.REPOSITORY][NAME]
    real = prepare.Preparation._make_tokenizer

    def changed(self, *arguments) -> None:
        real(self, *arguments)
        hub.served_as[NAME] = documents.replace(b"Document 7 ", b"Document 8 ")

    monkeypatch.setattr(prepare.Preparation, "_make_tokenizer", changed)
    options = ["--out", tmp_path / "out", "--val-docs", 50, "--tokenizer", tokenizer]
    assert "came differently" in refused(capsys, "hub:docs", *options)


def test_a_tokenizer_of_other_bytes_is_refused(hub, tmp_path, capsys, monkeypatch):
    documents = hub.repositories[stream.REPOSITORY][NAME]
    real = prepare.Preparation._train_tokenizer

    def changed(self, *arguments) -> dict[str, int]:
        hub.served_as[NAME] = documents.replace(b"Document 60 ", b"Document 61 ")
        read = real(self, *arguments)
        hub.served_as.clear()
        return read

    options = ["--val-docs", 50, "--vocab-size", 300, "--tokenizer-docs", 500, "--batch-mb", 0.01]
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Preparation, "_train_tokenizer", changed)
        assert "trained on other bytes" in refused(capsys, "hub:docs", "--out", tmp_path / "other", *options)
    assert run_prepare("hub:docs", "--out", tmp_path / "streamed", *options) == 0
    (tmp_path / stream.DOCUMENTS).write_bytes(documents)
    assert run_prepare(tmp_path / stream.DOCUMENTS, "--out", tmp_path / "stored", *options) == 0
    assert content(tmp_path / "streamed") == content(tmp_path / "stored")


def test_what_the_hub_refuses_is_one_line(hub, tokenizer, tmp_path, capsys, monkeypatch):
    options = ["--out", tmp_path / "out", "--val-docs", 50, "--tokenizer", tokenizer]
    assert "hub:docs@OWNER/NAME" in refused(capsys, "hub:other", *options)
    assert "no dataset no/where" in refused(capsys, "hub:docs@no/where", *options)
    assert "give it as a source" in refused(capsys, "hub:docs", "--val", "hub:docs", *options)
    hub.hidden.add(NAME)
    assert "not on the hub" in refused(capsys, "hub:docs", *options)
    monkeypatch.setattr(stream.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, "hub:docs", *options)
