"""data/download.py with the real hub client against a local server: happy path, faults, resuming, offline."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.download import DATASETS, DownloadError, Entry, main, make_plan, settle_tokenizer
from data.shards import UNFINISHED, read_shard, sha256_file, write_shard
from helpers import ROOT
from helpers.hub_server import COMMIT, Hub, hub_client

CASEOPS = DATASETS["caseops_v1"]
DOUBLED = f"datasets/datasets/{CASEOPS.folder}"
FIRST = "fineweb_train_000000.bin"
LAST = "fineweb_train_000002.bin"


def shard(folder: Path, seed: int, count: int = 2000, bos: bool = True) -> bytes:
    """The bytes of a shard file with random tokens, a BOS (1) now and then."""
    values = np.random.default_rng(seed).integers(4, 8192, count).astype("<u2")
    if bos:
        values[::100] = 1
    write_shard(folder / "made.bin", values)
    return (folder / "made.bin").read_bytes()


@pytest.fixture
def hub(tmp_path):
    """A hub with the CaseOps dataset of three training shards in the real doubled layout."""
    with Hub() as hub:
        files = {f"{DOUBLED}/fineweb_train_{number:06d}.bin": shard(tmp_path, number) for number in range(3)}
        files[f"{DOUBLED}/fineweb_val_000000.bin"] = shard(tmp_path, 10)
        files[f"{DOUBLED}/fineweb_val_bytes_000000.bin"] = shard(tmp_path, 11)
        files[f"datasets/tokenizers/{CASEOPS.tokenizer}.model"] = b"a tokenizer" * 100
        files[f"datasets/tokenizers/{CASEOPS.tokenizer}.vocab"] = b"pieces"
        files["datasets/manifest.json"] = b'{"docs_val": 50000}'
        files["README.md"] = b"words"
        hub.add(CASEOPS.repository, files)
        hub.small = {"README.md", "datasets/manifest.json", f"datasets/tokenizers/{CASEOPS.tokenizer}.vocab"}
        yield hub


class Client:
    """Runs the command with a folder and a cache of its own against one hub.

    In this process, which saves half a second each time, or in
    another one where environment variables matter.
    """

    def __init__(self, hub: Hub, folder: Path, monkeypatch, capfd):
        self.hub, self.out, self.home = hub, folder / "out", folder / "home"
        self.folder = self.out / "datasets" / CASEOPS.folder
        self._monkeypatch, self._capfd = monkeypatch, capfd
        hub_client(monkeypatch, hub, self.home)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error; `environment` makes it another process."""
        arguments = (*(arguments or ("caseops_v1",)), "--out", str(self.out))
        if environment:
            clean = {
                key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))
            }
            clean |= {
                "HF_ENDPOINT": self.hub.url,
                "HF_HOME": str(self.home),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            }
            result = subprocess.run(
                [sys.executable, "data/download.py", *arguments],
                cwd=ROOT,
                text=True,
                env=clean | environment,
                capture_output=True,
                timeout=60,
            )
            return result.returncode, result.stdout, result.stderr
        self._monkeypatch.setattr(sys, "argv", ["download.py", *arguments])
        self._capfd.readouterr()
        return main(), *self._capfd.readouterr()

    def good(self, *arguments: str, **environment: str) -> str:
        """The output of a run that must succeed."""
        code, output, errors = self.run(*arguments, **environment)
        assert code == 0, output + errors
        return output

    def bad(self, *arguments: str, **environment: str) -> str:
        """The one error line of a run that must fail."""
        code, output, errors = self.run(*arguments, **environment)
        assert code == 2, output + errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in errors
        return last

    def check_complete(self, shards: int = 3) -> dict:
        """Assert that all files are there, as published, and described by the manifest, which is returned."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        published = {
            path.rpartition("/")[2]: content
            for path, content in self.hub.repositories[CASEOPS.repository].items()
            if path.startswith(DOUBLED)
        }
        names = sorted(set(published) - {f"fineweb_train_{number:06d}.bin" for number in range(shards, 3)})
        others = ["hub_manifest.json", "manifest.json", "tokenizer.model"]
        assert sorted(path.name for path in self.folder.iterdir()) == sorted([*names, *others])
        for name in names:
            assert (self.folder / name).read_bytes() == published[name]
            assert manifest["files"][name]["sha256"] == sha256_file(self.folder / name)
            assert manifest["files"][name]["tokens"] == len(read_shard(self.folder / name))
        return manifest


@pytest.fixture
def client(hub, tmp_path, monkeypatch, capfd) -> Client:
    return Client(hub, tmp_path, monkeypatch, capfd)


def test_a_dataset_lands_in_one_place_whatever_the_layout(hub, client):
    hub.private_token = "secret"
    output = client.good(HF_TOKEN="secret")
    manifest = client.check_complete()
    assert "all sizes and checksums right" in output and "3 training shards" in output
    published = client.out / "tokenizers" / f"{CASEOPS.tokenizer}.model"
    for model in (client.folder / manifest["tokenizer"]["file"], published):
        assert model.read_bytes() == b"a tokenizer" * 100
        assert sha256_file(model) == manifest["tokenizer"]["sha256"]
    assert (client.out / "tokenizers" / f"{CASEOPS.tokenizer}.vocab").read_bytes() == b"pieces"
    assert manifest["source"] | {"folder": DOUBLED, "commit": COMMIT} == manifest["source"]
    assert (manifest["docs_val"], manifest["val_tokens"], manifest["train_tokens"]) == (20, 2000, 6000)
    sidecar = read_shard(client.folder / "fineweb_val_bytes_000000.bin")
    assert manifest["val_sidecar_bytes"] == int(sidecar.sum(dtype=int))
    # The token belongs to the hub alone; its storage is another host.
    assert {seen.token for seen in hub.seen if seen.host == "127.0.0.1"} == {"Bearer secret"}
    assert {seen.token for seen in hub.seen if seen.host == "localhost"} == {None}
    # The cache shares the space.
    assert (client.folder / FIRST).stat().st_nlink == 2

    requests = len(hub.seen)
    assert "complete" in client.good() and len(hub.seen) == requests  # nothing to do: nothing asked

    flip = bytearray((client.folder / FIRST).read_bytes())
    flip[1500] ^= 1
    (client.folder / FIRST).unlink()
    (client.folder / FIRST).write_bytes(flip)
    assert "another sha256" in client.good("caseops_v1", "--verify", HF_TOKEN="secret")
    client.check_complete()
    assert len(hub.downloads(FIRST)) == 1  # mended from the cache


def test_more_shards_are_added_and_fewer_never_forget_what_is_there(hub, client):
    client.good("caseops_v1", "--train-shards", "1")
    client.check_complete(shards=1)
    client.good("caseops_v1", "--train-shards", "3")
    client.check_complete(shards=3)
    (client.folder / "manifest.json").unlink()
    client.good("caseops_v1", "--train-shards", "1")
    client.check_complete(shards=3)
    assert [len(hub.downloads(f"fineweb_train_{number:06d}.bin")) for number in range(3)] == [1, 1, 1]


def test_a_broken_connection_continues_inside_the_file(hub, client, tmp_path):
    path = f"{DOUBLED}/{FIRST}"
    hub.add(CASEOPS.repository, {path: shard(tmp_path, 5, count=8_000_000)})
    hub.cut_after[path] = [13_000_000]
    client.good("caseops_v1", "--train-shards", "1")
    client.check_complete(shards=1)
    first, second = hub.downloads(FIRST)
    assert first.range is None and int(second.range.removeprefix("bytes=").rstrip("-")) >= 10_000_000


def test_a_killed_download_keeps_finished_files_and_clears_its_partial_ones(hub, client):
    hub.hidden.add(f"{DOUBLED}/{LAST}")
    client.bad("caseops_v1", "--workers", "1")
    assert not (client.folder / "manifest.json").exists() and (client.folder / FIRST).exists()
    blobs = next((client.home / "hub").glob("datasets--*/blobs"))
    for name, age in (("old.12345678.incomplete", 7200), ("new.12345678.incomplete", 0)):
        (blobs / name).touch()
        os.utime(blobs / name, (os.stat(blobs / name).st_atime - age,) * 2)
    hub.hidden.clear()
    client.good()
    client.check_complete()
    assert len(hub.downloads(FIRST)) == 1
    assert [path.name for path in blobs.glob("*.incomplete")] == ["new.12345678.incomplete"]


def test_wrong_content_is_never_installed(hub, client):
    good = hub.repositories[CASEOPS.repository][f"{DOUBLED}/{FIRST}"]
    hub.served_as[f"{DOUBLED}/{FIRST}"] = good[:-2] + b"\0\0"
    error = client.bad()
    assert FIRST in error and "sha256" in error and "fetched twice" in error
    assert not (client.folder / FIRST).exists() and not (client.folder / "manifest.json").exists()
    hub.served_as.clear()
    client.good()
    client.check_complete()


def test_wrong_small_file_is_never_installed(hub, client):
    hub.served_as["datasets/manifest.json"] = b'{"docs_val": 10000}'
    assert "datasets/manifest.json does not have" in client.bad()


def test_a_listed_file_that_is_missing_is_named(hub, client):
    hub.hidden.add(f"{DOUBLED}/{LAST}")
    assert LAST in (error := client.bad()) and "not on the hub" in error
    assert not (client.folder / "manifest.json").exists()


def test_a_busy_hub_is_waited_for_with_a_message(hub, client):
    hub.busy.update({"api": 1, f"{DOUBLED}/{FIRST}": 2})
    code, output, errors = client.run(HF_HUB_DOWNLOAD_TIMEOUT="10")
    assert code == 0, errors
    assert "the hub answers 429; trying again in 0 s (1 of 5)" in output
    assert "Rate limited. Waiting" in errors
    client.check_complete()


def test_a_hub_that_stays_busy_is_given_up(hub, client):
    hub.busy["api"] = 99
    error = client.bad()
    assert "still answers 429" in error and hub.busy["api"] == 93


def test_offline_uses_the_cache_and_says_what_it_lacks(hub, client):
    assert "HF_HUB_OFFLINE" in client.bad(HF_HUB_OFFLINE="1")
    client.good("caseops_v1", "--train-shards", "2")
    requests = len(hub.seen)
    assert "complete" in client.good("caseops_v1", "--train-shards", "2", HF_HUB_OFFLINE="1")
    shutil.rmtree(client.out)
    client.good("caseops_v1", "--train-shards", "2", HF_HUB_OFFLINE="1")
    client.check_complete(shards=2)
    error = client.bad("caseops_v1", "--train-shards", "3", HF_HUB_OFFLINE="1")
    assert "has 2" in error and "HF_HUB_OFFLINE" in error
    assert len(hub.seen) == requests


def test_damage_after_the_download_is_mended(hub, client):
    client.good()
    whole = (client.folder / FIRST).read_bytes()
    for content in (whole[:-100], b"\0" * len(whole)):
        (client.folder / FIRST).unlink()
        (client.folder / FIRST).write_bytes(content)
        assert "is not complete" in client.good()
        client.check_complete()


def test_a_local_copy_in_the_doubled_layout_is_used(hub, client):
    client.good()
    shutil.rmtree(client.home)
    os.renames(client.folder, client.out / "datasets" / "datasets" / CASEOPS.folder)
    (client.out / "datasets" / "datasets" / CASEOPS.folder / LAST).unlink()
    client.good()
    client.check_complete()
    assert (len(hub.downloads(FIRST)), len(hub.downloads(LAST))) == (1, 2)


def test_a_shard_that_is_truncated_on_the_hub_is_refused(hub, client):
    files = hub.repositories[CASEOPS.repository]
    files[f"{DOUBLED}/{FIRST}"] = files[f"{DOUBLED}/{FIRST}"][:-7]
    assert "no valid shard" in client.bad()
    assert not (client.folder / FIRST).exists()


def test_a_sidecar_of_another_length_is_refused(hub, client, tmp_path):
    hub.add(CASEOPS.repository, {f"{DOUBLED}/fineweb_val_bytes_000000.bin": shard(tmp_path, 1, count=1999)})
    assert "1,999 values for 2,000" in client.bad()
    assert not (client.folder / "manifest.json").exists()


def listing(hub: Hub) -> list[Entry]:
    return [
        Entry(path, len(content), "0" * 64) for path, content in hub.repositories[CASEOPS.repository].items()
    ]


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("_val_0", "lacks .*fineweb_val_"),
        ("_val_bytes", "lacks .*fineweb_val_bytes_"),
        (".model", "lacks .*model"),
    ],
)
def test_a_repository_without_a_needed_file_is_refused(hub, tmp_path, absent, message):
    entries = [entry for entry in listing(hub) if absent not in entry.path]
    with pytest.raises(DownloadError, match=message):
        make_plan(CASEOPS, COMMIT, entries, 1, tmp_path)


def test_the_folder_is_found_by_name_or_if_it_is_the_only_one(hub, tmp_path):
    plan = make_plan(CASEOPS, COMMIT, listing(hub), None, tmp_path)
    assert plan.folder == DOUBLED and plan.train_shards_there == 3 and len(plan.wanted) == 8
    renamed = [entry._replace(path=entry.path.replace(DOUBLED, "elsewhere")) for entry in listing(hub)]
    assert make_plan(CASEOPS, COMMIT, renamed, 2, tmp_path).folder == "elsewhere"
    partial = [
        entry._replace(path=entry.path.replace("datasets/datasets", "datasets")) for entry in listing(hub)[:2]
    ]
    assert make_plan(CASEOPS, COMMIT, [*partial, *listing(hub)], 1, tmp_path).folder == DOUBLED
    scattered = [
        entry._replace(path=f"{number}/{entry.path.rpartition('/')[2]}")
        for number, entry in enumerate(listing(hub))
    ]
    with pytest.raises(DownloadError, match="has no folder"):
        make_plan(CASEOPS, COMMIT, scattered, 1, tmp_path)
    with pytest.raises(DownloadError, match="has 3; ask for at most"):
        make_plan(CASEOPS, COMMIT, listing(hub), 4, tmp_path)


def test_casefold_asks_for_its_tokenizer_and_refuses_another(hub, client, tmp_path):
    dataset = DATASETS["casefold_v2"]
    hub.add(
        dataset.repository,
        {name: shard(tmp_path, 3, bos=False) for name in (FIRST, "fineweb_val_000000.bin")},
    )
    output = client.good("casefold_v2")
    assert dataset.tokenizer_sha256 in output
    folder = client.out / "datasets" / dataset.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["lossless"] is False and manifest["tokenizer"]["sha256"] == dataset.tokenizer_sha256
    model = client.out / "tokenizers" / f"{dataset.tokenizer}.model"
    model.parent.mkdir()
    model.write_bytes(b"another")
    assert "replace it" in client.bad("casefold_v2")
    brought = dataset._replace(tokenizer_sha256=sha256_file(model))
    settle_tokenizer(brought, client.out)
    assert (folder / "tokenizer.model").read_bytes() == b"another"


@pytest.mark.parametrize("name", ["sp1024", "sp4096", "byte260"])
def test_the_official_sets_come_with_their_own_tokenizer(hub, client, tmp_path, name):
    dataset = DATASETS[name]
    files = {f"datasets/datasets/{dataset.folder}/{FIRST}": shard(tmp_path, 3)}
    files[f"datasets/datasets/{dataset.folder}/fineweb_val_000000.bin"] = shard(tmp_path, 4)
    hub.add(dataset.repository, files)
    assert f"lacks {dataset.model}" in client.bad(name)
    hub.add(dataset.repository, {f"datasets/tokenizers/{dataset.model}": b"pieces"})
    output = client.good(name)
    assert ("train_gpt.py needs" in output) == (name == "byte260")
    assert "bytes needed on the disk of" in output
    manifest = json.loads((client.out / "datasets" / dataset.folder / "manifest.json").read_text())
    assert (
        client.out / "datasets" / dataset.folder / manifest["tokenizer"]["file"]
    ).read_bytes() == b"pieces"
    assert manifest["tokenizer"]["vocab_size"] == int(name.removeprefix("sp").removeprefix("byte"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sp99"], "sp8192, casefold_v2, caseops_v1, sp1024, sp4096, byte260"),
        (["sp8192", "--train-shards", "-1"], "0 or more"),
        (["sp8192", "--workers", "0"], "1 or more"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["download.py", *arguments])
    assert main() == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_what_the_hub_or_the_disk_refuse_is_one_line(hub, client):
    assert "HF_TOKEN" in client.bad("sp8192")  # this hub does not have that repository
    assert "no such revision" in client.bad("caseops_v1", "--revision", "elsewhere")
    assert "HF_ENDPOINT" in client.bad(HF_ENDPOINT="http://127.0.0.1:9")
    client.out.write_text("a file")
    assert "--out" in client.bad()


def test_a_full_disk_is_noticed_before_the_first_byte(hub, client, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    error = client.bad()
    needed = sum(
        len(content) for path, content in hub.repositories[CASEOPS.repository].items() if path != "README.md"
    )
    assert f"{needed:,} bytes needed" in error and "5,000 free" in error
    assert not any(seen.host == "localhost" for seen in hub.seen)


def test_a_disk_that_fills_is_one_line_and_the_folder_says_that_it_is_unfinished(hub, client, monkeypatch):
    """A killed or failed download leaves whole shards, which alone look like a smaller dataset."""

    def full(source, target, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(shutil, "copyfile", full)
        assert "No space left on device" in client.bad()
    assert (client.folder / UNFINISHED).exists()
    assert not list(client.folder.glob(".*"))
    client.good()
    client.check_complete()


@pytest.mark.parametrize("kind", ["train", "val", "val_bytes"])
def test_a_hole_in_the_numbers_is_refused(hub, tmp_path, kind):
    moved = (f"fineweb_{kind}_000000.bin", f"fineweb_{kind}_000007.bin")
    entries = [entry._replace(path=entry.path.replace(*moved)) for entry in listing(hub)]
    with pytest.raises(DownloadError, match="but none of number 0"):
        make_plan(CASEOPS, COMMIT, entries, 3, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HUB_DOWNLOAD_TIMEOUT", "abc"), ("HF_HUB_ETAG_TIMEOUT", "1s"), ("HF_ENDPOINT", "http://[")],
)
def test_a_variable_that_the_hub_client_cannot_read_is_one_line(client, name, value):
    code, _, errors = client.run("caseops_v1", HF_TOKEN="secret", **{name: value})
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: ")
    assert name in errors and "secret" not in errors


def test_a_wrong_address_is_not_tried_again(client):
    code, output, errors = client.run("caseops_v1", HF_ENDPOINT="no-address")
    assert code == 2 and "trying again" not in output and "HF_ENDPOINT" in errors


def test_a_manifest_nested_beyond_reason_is_replaced(hub, client):
    client.good()
    (client.folder / "manifest.json").write_text("[" * 100_000)
    assert "manifest.json is not readable" in client.good()
    client.check_complete()
