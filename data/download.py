#!/usr/bin/env python3
"""Downloads the public tokenised datasets from the hub into data/datasets/ and data/tokenizers/.

    python data/download.py sp8192|casefold_v2|caseops_v1 [--train-shards N] [--out data]

Every file is checked against the size and sha256 the hub publishes, every shard against its own header, and
the result is described in data/datasets/<folder>/manifest.json. Wherever the repository keeps the folder
(datasets/datasets/... on some), it lands in one place. Files go through the hub client's cache (HF_HOME,
HF_HUB_CACHE) and are hard links to it where the file system allows, so they take their space once.
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE act as usual. A stopped download continues with the first unfinished
file; a connection that breaks continues inside the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import environment

environment.enter()
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

import httpx2
import numpy as np

try:
    # As a module: through the package the client prints a line of its own.
    import huggingface_hub.constants as constants
except ValueError as error:
    names = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
    print(f"error: the hub client refuses one of {names} ({error}); unset or correct it", file=sys.stderr)
    sys.exit(2)
from huggingface_hub import HfApi, RepoFile, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from tqdm import tqdm

from data.demo import FORMAT, manifest_checksum
from data.options import Parser
from data.shards import BOS, UNFINISHED, ShardError, read_json_object, read_shard, sha256_file

SHARD = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
BUSY = (408, 429, 500, 502, 503, 504)
# A refused connection, an unknown host or a wrong address stays so; the client has tried a few times already.
LASTING = (httpx2.ConnectError, httpx2.UnsupportedProtocol)
ATTEMPTS = 6
LONGEST_WAIT = 600  # seconds; the hub counts requests in windows of five minutes
# Seconds without a write after which a partial file of the cache belongs to a killed download.
ABANDONED = 3600
Result = TypeVar("Result")


class DownloadError(Exception):
    """The dataset cannot be completed; the message is one line with the remedy."""


class Dataset(NamedTuple):
    """A public dataset: where it is, what its files are called, how
    many training shards the published runs used.
    """

    name: str
    repository: str
    folder: str
    tokenizer: str
    train_shards: int
    transform: str
    # Of a tokenizer that is not in the repository and has to be brought along.
    tokenizer_sha256: str | None = None


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("sp8192", "kevclark/parameter-golf", "fineweb10B_sp8192", "fineweb_8192_bpe", 80, "none"),
        Dataset(
            "casefold_v2",
            "Mikeapedia/fineweb10B-sp8192-casefold-v2",
            "fineweb10B_sp8192_casefold_v2",
            "fineweb_8192_bpe_casefold_refined_v2",
            114,
            "casefold",
            "e2f3b89124cc3d517ae14abe3bc478ea5908a70289d4437123e25bb586148641",
        ),
        Dataset(
            "caseops_v1",
            "romeerp/parameter-golf-caseops-v1",
            "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
            "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved",
            80,
            "caseops_v1",
        ),
    )
}
VOCAB_SIZE = 8192
TOKENIZER = "tokenizer.model"


class Entry(NamedTuple):
    """A file of the repository: its path there, its size, and its
    sha256 (or git blob id if it is a small text).
    """

    path: str
    size: int
    digest: str


class Wanted(NamedTuple):
    """An entry and the place it gets."""

    entry: Entry
    target: Path


class Plan(NamedTuple):
    """What to fetch, from which commit and folder, and how many training shards there are to choose from."""

    commit: str
    folder: str
    wanted: list[Wanted]
    train_shards_there: int


class Progress:
    """Bytes done of all files together, shown once a second on a terminal, else once in ten seconds."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.done, self.fetched = name, total, 0, 0
        self.stop = threading.Event()
        self.started = self.shown = time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._lock = threading.Lock()

    def add(self, size: int, fetched: bool = True) -> None:
        """Count `size` more bytes, `fetched` over the network or found on disk."""
        with self._lock:
            self.done += size
            self.fetched += size if fetched else 0
            if time.monotonic() - self.shown >= (1 if self._terminal else 10):
                self.shown = time.monotonic()
                rate = self.fetched / (self.shown - self.started)
                left = f", {(self.total - self.done) / rate / 60:.1f} min left" if rate > 0 else ""
                self._write(
                    f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e6:.1f} MB/s{left}"
                )

    def say(self, text: str) -> None:
        """Print a line of its own."""
        with self._lock:
            self._write(text, "\n")

    def _write(self, text: str, end: str = "") -> None:
        clear = "\r\x1b[K" if self._terminal else ""
        print(f"{clear}{self.name}: {text}", end=end if self._terminal else "\n", flush=True)


class _Stopped(Exception):
    """Raised inside a running transfer after another one has failed."""


# === WHAT IS THERE ===


def patiently(call: Callable[[], Result], progress: Progress) -> Result:
    """The result of `call`, retried with a message while the hub is busy or drops the connection."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError) as error:
            cause = (
                error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            )
            response = getattr(cause, "response", None)
            broken = isinstance(cause, httpx2.TransportError) and not isinstance(cause, LASTING)
            if attempt == ATTEMPTS or not (broken or (response is not None and response.status_code in BUSY)):
                raise
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            seconds = min(int(asked), LONGEST_WAIT) if asked.isdigit() else 2 ** (attempt - 1)
            progress.say(
                f"the hub {'broke the connection' if broken else f'answers {response.status_code}'}; "
                f"trying again in {seconds} s ({attempt} of {ATTEMPTS - 1})"
            )
            if progress.stop.wait(seconds):
                raise _Stopped from None
    raise AssertionError("the last attempt returns or raises")


def list_remote(repository: str, revision: str, progress: Progress) -> tuple[str, list[Entry]]:
    """The commit `revision` stands for and all files of the repository at that commit."""
    hub = HfApi()
    commit = patiently(
        lambda: hub.repo_info(repository, repo_type="dataset", revision=revision).sha, progress
    )
    tree = patiently(
        lambda: list(hub.list_repo_tree(repository, repo_type="dataset", revision=commit, recursive=True)),
        progress,
    )
    return str(commit), [
        Entry(item.path, item.lfs.size, item.lfs.sha256)
        if item.lfs
        else Entry(item.path, item.size, item.blob_id)
        for item in tree
        if isinstance(item, RepoFile)
    ]


def list_cached(repository: str, revision: str) -> tuple[str, list[Entry]]:
    """The same from the hub client's cache alone; there a blob is named by its digest."""
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        repositories = frozenset()
    snapshots = [
        snapshot
        for found in repositories
        if found.repo_type == "dataset" and found.repo_id == repository
        for snapshot in found.revisions
    ]
    snapshots.sort(
        key=lambda snapshot: (
            snapshot.commit_hash == revision,
            revision in snapshot.refs,
            snapshot.last_modified,
        )
    )
    if not snapshots:
        raise DownloadError(
            f"HF_HUB_OFFLINE is set and nothing of {repository} is in the cache "
            f"{constants.HF_HUB_CACHE}; unset it, or set HF_HOME to the right cache"
        )
    files = [
        Entry(
            file.file_path.relative_to(snapshots[-1].snapshot_path).as_posix(),
            file.size_on_disk,
            file.blob_path.name,
        )
        for file in snapshots[-1].files
    ]
    return snapshots[-1].commit_hash, [entry for entry in files if DIGEST.fullmatch(entry.digest)]


def make_plan(
    dataset: Dataset, commit: str, entries: Sequence[Entry], train_shards: int | None, out: Path
) -> Plan:
    """Choose the files of `dataset` among `entries`, wherever in the
    repository they are; DownloadError if some lack.

    `train_shards` None means as many as the published runs used, or all if there are fewer. Shards that
    are under `out` already stay part of the dataset, since a trainer reads every shard it finds there.
    """
    target = out / "datasets" / dataset.folder
    folder, files = _choose_folder(dataset, entries)
    kinds: dict[str, list[Entry]] = {"train": [], "val": [], "val_bytes": []}
    for name, entry in files.items():
        kinds[SHARD.fullmatch(name).group(1)].append(entry)
    offline = "; unset HF_HUB_OFFLINE to fetch the rest" if constants.is_offline_mode() else ""
    _check_kinds(dataset, folder, kinds, train_shards, offline)
    asked = dataset.train_shards if train_shards is None else train_shards
    chosen = kinds["train"][: max(asked, len(list(target.glob("fineweb_train_*.bin"))))]
    for shards in (kinds["val"], kinds["val_bytes"], chosen):
        for number, entry in enumerate(shards):
            if int(PurePosixPath(entry.path).stem[-6:]) != number:
                raise DownloadError(
                    f"{dataset.repository} has {entry.path} but none of number {number}"
                    f"{offline or '; try --repository, or fewer --train-shards'}"
                )
    wanted = [
        Wanted(entry, target / PurePosixPath(entry.path).name)
        for entry in [*kinds["val"], *kinds["val_bytes"], *chosen]
    ]
    # Of several manifests the nearest.
    for entry in sorted(entries, key=lambda entry: entry.path.count("/")):
        name = PurePosixPath(entry.path).name
        if name in (f"{dataset.tokenizer}.model", f"{dataset.tokenizer}.vocab"):
            wanted.append(Wanted(entry, out / "tokenizers" / name))
        elif name == "manifest.json" and PurePosixPath(folder).is_relative_to(
            PurePosixPath(entry.path).parent
        ):
            wanted.append(Wanted(entry, target / "hub_manifest.json"))
    wanted = list({item.target: item for item in wanted}.values())
    model = out / "tokenizers" / f"{dataset.tokenizer}.model"
    if not dataset.tokenizer_sha256 and model not in {item.target for item in wanted}:
        raise DownloadError(
            f"{dataset.repository} lacks {dataset.tokenizer}.model{offline or '; try --repository'}"
        )
    return Plan(commit, folder, wanted, len(kinds["train"]))


def _choose_folder(dataset: Dataset, entries: Sequence[Entry]) -> tuple[str, dict[str, Entry]]:
    """The folder of the repository that holds the dataset, and its shards by name."""
    by_folder: dict[str, dict[str, Entry]] = {}
    for entry in sorted(entries):
        path = PurePosixPath(entry.path)
        if SHARD.fullmatch(path.name):
            by_folder.setdefault(str(path.parent), {})[path.name] = entry
    named = {
        folder: files for folder, files in by_folder.items() if PurePosixPath(folder).name == dataset.folder
    }
    candidates = named or (by_folder if len(by_folder) == 1 else {})
    if not candidates:
        raise DownloadError(
            f"{dataset.repository} has no folder {dataset.folder} with shards (shards are in: "
            f"{', '.join(by_folder) or 'no folder'}); name another repository with --repository"
        )
    folder = max(candidates, key=lambda name: (len(candidates[name]), -len(name)))
    return folder, candidates[folder]


def _check_kinds(
    dataset: Dataset, folder: str, kinds: dict[str, list[Entry]], train_shards: int | None, offline: str
) -> None:
    """DownloadError unless the folder has what every dataset needs and enough training shards."""
    sidecar_lacks = dataset.transform == "caseops_v1" and len(kinds["val_bytes"]) != len(kinds["val"])
    if not kinds["val"] or sidecar_lacks:
        lacking = "fineweb_val_*.bin"
        if kinds["val"]:
            lacking = "fineweb_val_bytes_*.bin, without which no score is right"
        raise DownloadError(f"{dataset.repository} lacks {folder}/{lacking}{offline or '; try --repository'}")
    if train_shards is not None and train_shards > len(kinds["train"]):
        raise DownloadError(
            f"--train-shards {train_shards}: {folder} of {dataset.repository} has "
            f"{len(kinds['train'])}{offline or '; ask for at most that many'}"
        )


def installed(
    dataset: Dataset, out: Path, train_shards: int | None, full_check: bool
) -> tuple[dict | None, str]:
    """The manifest of the dataset under `out` if it is complete, else
    None and the reason (empty: nothing is there).

    Sizes and shard headers are always checked, every sha256 only with `full_check`.
    """
    target = out / "datasets" / dataset.folder
    try:
        manifest = read_json_object(target / "manifest.json")
        if manifest.pop("checksum") != manifest_checksum(manifest):
            return None, "manifest.json was changed"
        source, files, tokenizer = manifest["source"], manifest["files"], manifest["tokenizer"]
    except FileNotFoundError:
        return None, ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "manifest.json is not readable"
    if source["repository"] != dataset.repository:
        return None, f"it came from {source['repository']}"
    here = sum(name.startswith("fineweb_train_") for name in files)
    if here < (
        min(dataset.train_shards, source["train_shards_there"]) if train_shards is None else train_shards
    ):
        return None, f"it has {here} training shards"
    model = out / "tokenizers" / f"{dataset.tokenizer}.model"
    if not dataset.tokenizer_sha256 and not (model.is_file() and sha256_file(model) == tokenizer["sha256"]):
        return None, f"{model.name} is missing or has another sha256"
    for name, facts in files.items():
        path = target / name
        if not path.is_file() or path.stat().st_size != facts["size"]:
            return None, f"{name} is missing or has another size"
        if SHARD.fullmatch(name):
            try:
                read_shard(path)
            except ShardError as error:
                return None, str(error)
    if full_check:
        with ThreadPoolExecutor() as pool:
            for (name, facts), digest in zip(
                files.items(), pool.map(sha256_file, map(target.joinpath, files)), strict=True
            ):
                if digest != facts["sha256"]:
                    return None, f"{name} has another sha256"
    return manifest, ""


# === FETCHING ===


def _digest(path: Path, like: str) -> str:
    """sha256 of a file, or its git blob id where the hub publishes that."""
    if len(like) == 64:
        return sha256_file(path)
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()


def _intact(path: Path, entry: Entry) -> bool:
    return (
        path.is_file() and path.stat().st_size == entry.size and _digest(path, entry.digest) == entry.digest
    )


def _place(source: Path, target: Path) -> None:
    """Let `target` be `source`: a hard link where possible, else a
    copy; complete from the moment it is visible.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _cached_blob(repository: str, entry: Entry) -> Path:
    folder = repo_folder_name(repo_id=repository, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE, folder, "blobs", entry.digest)


def _bar_class(progress: Progress, counted: list[int]) -> type[tqdm]:
    """A silent progress bar for the hub client that adds to
    `progress`, and ends the transfer when that is stopped.
    """

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if progress.stop.is_set():
                raise _Stopped
            counted[0] += int(n or 0)
            progress.add(int(n or 0))

        def update_transfer(self, n: float) -> None:
            """Bytes on the wire; `update` has counted them already."""

    return Bar


def fetch(repository: str, commit: str, wanted: Wanted, progress: Progress) -> None:
    """Bring one file to its place, checked against the hub's size and
    digest; a bad copy is fetched once more.
    """
    entry, target = wanted
    doubled = target.parents[1] / "datasets" / target.parent.name / target.name
    for local in (target, doubled):
        if _intact(local, entry):
            if local != target:
                _place(local, target)
            progress.add(entry.size, fetched=False)
            return
    found = 0
    for _ in range(2):
        counted = [0]
        bar = _bar_class(progress, counted)

        def once(counted: list[int] = counted, bar: type[tqdm] = bar) -> str:
            progress.add(-counted[0])
            counted[0] = 0
            return hf_hub_download(
                repository, entry.path, repo_type="dataset", revision=commit, tqdm_class=bar
            )

        if progress.stop.is_set():
            raise _Stopped
        pointer = Path(patiently(once, progress))
        progress.add(entry.size - counted[0], fetched=False)
        blob = pointer.resolve()
        if _intact(blob, entry):
            if SHARD.fullmatch(target.name):
                try:
                    read_shard(blob)
                except ShardError as error:
                    raise DownloadError(
                        f"{entry.path} is what the hub publishes, but no valid shard ({error}); "
                        "try another --repository"
                    ) from None
            _place(blob, target)
            return
        found = blob.stat().st_size
        progress.add(-entry.size)
        for path in (pointer, _cached_blob(repository, entry), blob):
            path.unlink(missing_ok=True)
    raise DownloadError(
        f"{entry.path} does not have the sha256 {entry.digest} that the hub states ({found:,} bytes, "
        "fetched twice); the copies were deleted: try again later, or another --repository"
    )


def check_disk(repository: str, plan: Plan, out: Path) -> None:
    """DownloadError unless the cache and `out` can hold what is not there yet."""

    def device(path: Path) -> tuple[Path, int]:
        existing = next(place for place in (path, *path.parents) if place.exists())
        return existing, existing.stat().st_dev

    missing = [
        item
        for item in plan.wanted
        if not (item.target.is_file() and item.target.stat().st_size == item.entry.size)
    ]
    uncached = sum(item.entry.size for item in missing if not _cached_blob(repository, item.entry).is_file())
    cache, cache_device = device(Path(constants.HF_HUB_CACHE).absolute())
    place, place_device = device(out.absolute())
    copied = sum(item.entry.size for item in missing) if place_device != cache_device else 0
    for folder, needed in ((cache, uncached), (place, copied)):
        if needed > (free := shutil.disk_usage(folder).free):
            raise DownloadError(
                f"{needed:,} bytes needed on the disk of {folder}, {free:,} free; free some, lower "
                "--train-shards, or set HF_HOME to a folder on a bigger disk"
            )


def fetch_all(repository: str, plan: Plan, workers: int, progress: Progress) -> None:
    """Fetch every file of `plan` with `workers` at a time; the first failure ends all."""
    for partial in _cached_blob(repository, plan.wanted[0].entry).parent.glob("*.incomplete"):
        if time.time() - partial.stat().st_mtime > ABANDONED:
            partial.unlink(missing_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(fetch, repository, plan.commit, item, progress) for item in plan.wanted]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            progress.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def write_manifest(dataset: Dataset, plan: Plan, out: Path) -> dict:
    """Describe the complete dataset in its manifest.json, which is returned."""
    target = out / "datasets" / dataset.folder
    files: dict[str, dict] = {}
    sums: Counter[str] = Counter()
    for entry, path in plan.wanted:
        if path.parent != target:
            continue
        digest = entry.digest if len(entry.digest) == 64 else sha256_file(path)
        files[path.name] = {"size": entry.size, "sha256": digest}
        if kind := SHARD.fullmatch(path.name):
            values = read_shard(path)
            files[path.name] = {"tokens": len(values)} | files[path.name]
            sums[kind.group(1)] += len(values)
            if kind.group(1) == "val":
                sums["documents"] += int(np.count_nonzero(values == BOS))
            elif kind.group(1) == "val_bytes":
                sums["bytes"] += int(values.sum(dtype=np.int64))
    if sums["val_bytes"] not in (0, sums["val"]):
        raise DownloadError(
            f"the byte sidecar of {dataset.folder} has {sums['val_bytes']:,} values for "
            f"{sums['val']:,} validation tokens; the repository is inconsistent, try --repository"
        )
    model = out / "tokenizers" / f"{dataset.tokenizer}.model"
    manifest = {
        "format": FORMAT,
        "name": dataset.name,
        "transform": dataset.transform,
        "lossless": dataset.transform != "casefold",
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": dataset.tokenizer_sha256 or sha256_file(model),
            "vocab_size": VOCAB_SIZE,
        },
        "val_tokens": sums["val"],
        "train_tokens": sums["train"],
        "files": files,
        "source": {
            "repository": dataset.repository,
            "commit": plan.commit,
            "folder": plan.folder,
            "train_shards_there": plan.train_shards_there,
        },
        "versions": {"huggingface_hub": version("huggingface_hub")},
    }
    if sums["documents"]:  # casefold shards hold no BOS, so nothing separates their documents
        manifest["docs_val"] = sums["documents"]
    if sums["val_bytes"]:
        manifest |= {"val_sidecar": True, "val_sidecar_bytes": sums["bytes"]}
    manifest["checksum"] = manifest_checksum(manifest)
    temporary = target / ".manifest.json"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target / "manifest.json")
    return manifest


def settle_tokenizer(dataset: Dataset, out: Path) -> None:
    """Put the tokenizer beside the shards too, where the trainer and verify_bytes.py look for it.

    One that is not on the hub is asked for, and refused if it is not the one that made the shards.
    """
    model, beside = (
        out / "tokenizers" / f"{dataset.tokenizer}.model",
        out / "datasets" / dataset.folder / TOKENIZER,
    )
    if not model.is_file():
        print(
            f"{dataset.name}: the repository holds no tokenizer; put {model.name} (sha256 "
            f"{dataset.tokenizer_sha256}) into {model.parent} and run this again",
            flush=True,
        )
        return
    found = sha256_file(model)
    if dataset.tokenizer_sha256 not in (None, found):
        raise DownloadError(
            f"{model} has sha256 {found}, but {dataset.name} was made with "
            f"{dataset.tokenizer_sha256}; replace it"
        )
    if not beside.is_file() or sha256_file(beside) != found:
        _place(model, beside)


def download(
    dataset: Dataset,
    out: Path,
    train_shards: int | None = None,
    workers: int = 8,
    revision: str = "main",
    full_check: bool = False,
) -> Path:
    """Make `dataset` complete under `out` and return its folder; no request if it is complete already."""
    target = out / "datasets" / dataset.folder
    manifest, reason = installed(dataset, out, train_shards, full_check)
    if manifest is None:
        if reason:
            print(f"{dataset.name}: {target} is not complete: {reason}", flush=True)
        progress = Progress(dataset.name, 0)
        if constants.is_offline_mode():
            commit, entries = list_cached(dataset.repository, revision)
        else:
            commit, entries = list_remote(dataset.repository, revision, progress)
        plan = make_plan(dataset, commit, entries, train_shards, out)
        check_disk(dataset.repository, plan, out)
        progress.total = sum(item.entry.size for item in plan.wanted)
        print(
            f"{dataset.name}: {len(plan.wanted)} files, {progress.total / 1e9:.2f} GB, "
            f"from {dataset.repository} at {commit[:8]}",
            flush=True,
        )
        target.mkdir(parents=True, exist_ok=True)
        (target / UNFINISHED).touch()
        fetch_all(dataset.repository, plan, workers, progress)
        manifest = write_manifest(dataset, plan, out)
        (target / UNFINISHED).unlink()
        progress.say(
            f"{progress.fetched / 1e9:.2f} GB fetched in {time.monotonic() - progress.started:.0f} s, "
            "all sizes and checksums right"
        )
    settle_tokenizer(dataset, out)
    shards = sum(name.startswith("fineweb_train_") for name in manifest["files"])
    print(
        f"{dataset.name}: {target} complete, {shards} training shards, "
        f"{manifest['train_tokens']:,} training and {manifest['val_tokens']:,} validation tokens",
        flush=True,
    )
    return target


def explain(error: Exception, dataset: Dataset) -> str:
    """One line for an error of the hub client, the network or the disk: what happened and what to do."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    kept = "finished files are kept, the same command continues"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, RevisionNotFoundError):
        return (
            f"{dataset.repository} has no such revision; "
            "leave --revision out, or name a branch or commit of it"
        )
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{constants.ENDPOINT} shows no dataset {dataset.repository} (status {status}): "
            "set HF_TOKEN if it is private or gated, or name a copy with --repository"
        )
    if status in BUSY:
        return f"{constants.ENDPOINT} still answers {status} after {ATTEMPTS} attempts; try later: {kept}"
    if isinstance(cause, httpx2.TransportError):
        return (
            f"no connection to {constants.ENDPOINT} ({type(cause).__name__}: {cause}); "
            f"check the network or set HF_ENDPOINT to a mirror: {kept}"
        )
    if isinstance(cause, EntryNotFoundError) and status is not None:
        return (
            f"a listed file is not on the hub: {cause.response.url}; "
            "try later, or name a copy with --repository"
        )
    first_line = next(iter(str(cause).strip().splitlines()), "")
    if isinstance(cause, OSError) and cause.errno:
        return (
            f"{cause.strerror}: {cause.filename or ''}; "
            f"free space, or choose a writable --out and HF_HOME: {kept}"
        )
    return f"{type(cause).__name__}: {first_line}; {kept}"


def main() -> int:
    """Command line: 0 if the dataset is complete, 2 after a one-line error, 130 if interrupted."""
    parser = Parser(description="Download a public tokenised dataset from the hub.")
    parser.add_argument("name", help=", ".join(DATASETS))
    parser.add_argument(
        "--train-shards",
        type=int,
        help="training shards, 0 for validation only "
        f"(default: {', '.join(f'{item.train_shards} for {item.name}' for item in DATASETS.values())})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="gets datasets/ and tokenizers/ (default: this folder)",
    )
    parser.add_argument("--workers", type=int, default=8, help="files at a time")
    parser.add_argument("--repository", help="another hub repository with the same files")
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument(
        "--verify", action="store_true", help="check every sha256 even if all sizes are right"
    )
    arguments = parser.parse_args()
    if arguments.name not in DATASETS:
        print(f"error: no dataset {arguments.name!r}; choose one of {', '.join(DATASETS)}", file=sys.stderr)
        return 2
    if (arguments.train_shards or 0) < 0 or arguments.workers < 1:
        print("error: --train-shards must be 0 or more and --workers 1 or more", file=sys.stderr)
        return 2
    dataset = DATASETS[arguments.name]
    dataset = dataset._replace(repository=arguments.repository or dataset.repository)
    try:
        download(
            dataset,
            arguments.out.resolve(),
            arguments.train_shards,
            arguments.workers,
            arguments.revision,
            arguments.verify,
        )
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, EntryNotFoundError, httpx2.HTTPError, httpx2.InvalidURL, HFValidationError) as error:
        print(f"error: {explain(error, dataset)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; finished files are kept, the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
