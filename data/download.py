#!/usr/bin/env python3
"""Downloads the public tokenised datasets from the hub into data/datasets/ and data/tokenizers/.

    python data/download.py sp8192|casefold_v2|caseops_v1|sp1024|sp4096|byte260 [--train-shards N]
    python data/download.py docs          # the contest's raw documents: 48 GB of JSON lines
    python data/download.py OWNER/NAME    # what data/publish.py has put there, with its proof

Every file is checked against the size and sha256 the hub publishes, every shard against its own header, and
the result is described in data/datasets/<folder>/manifest.json. Wherever the repository keeps the folder
(datasets/datasets/... on some), it lands in one place. Files go through the hub client's cache (HF_HOME,
HF_HUB_CACHE) and are hard links to it where the file system allows, so they take their space once.
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE act as usual. A stopped download continues with the first unfinished
file, the documents at their last byte; a connection that breaks continues inside the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import environment

environment.enter()
import argparse
import functools
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.card import MANIFEST, PROOF, changed_or_foreign
from data.demo import FORMAT, manifest_checksum
from data.documents import DataError
from data.hub import (
    FAILURES,
    DownloadError,
    Entry,
    Progress,
    Stopped,
    bar_class,
    cached_blob,
    constants,
    explain,
    hf_hub_download,
    intact,
    list_files,
    patiently,
    place,
)
from data.options import Parser
from data.shards import BOS, UNFINISHED, ShardError, read_json_object, read_shard, sha256_file, write_json
from data.stream import REPOSITORY as OFFICIAL
from data.stream import store_documents

SHARD = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin")
# Seconds without a write after which a partial file of the cache belongs to a killed download.
ABANDONED = 3600


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
    vocab_size: int = 8192
    # The trainer reads SentencePiece models alone.
    suffix: str = ".model"

    @property
    def model(self) -> str:
        """The name of the tokenizer's file among all tokenizers."""
        return self.tokenizer + self.suffix

    @property
    def model_beside(self) -> str:
        """Its name beside the shards."""
        return "tokenizer" + self.suffix


DOCS = "docs"
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
        # The baseline's, of 195 training shards.
        Dataset("sp1024", OFFICIAL, "fineweb10B_sp1024", "fineweb_1024_bpe", 80, "none", vocab_size=1024),
        Dataset(
            "sp4096",
            "kevclark/parameter-golf",
            "fineweb10B_sp4096",
            "fineweb_4096_bpe",
            80,
            "none",
            vocab_size=4096,
        ),
        # Four special ids and the 256 bytes, described by a JSON file; not in every copy of the repository.
        Dataset(
            "byte260",
            OFFICIAL,
            "fineweb10B_byte260",
            "fineweb_pure_byte_260",
            80,
            "none",
            vocab_size=260,
            suffix=".json",
        ),
    )
}


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


# === WHAT IS THERE ===


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
        if name in (dataset.model, f"{dataset.tokenizer}.vocab"):
            wanted.append(Wanted(entry, out / "tokenizers" / name))
        elif name == "manifest.json" and PurePosixPath(folder).is_relative_to(
            PurePosixPath(entry.path).parent
        ):
            wanted.append(Wanted(entry, target / "hub_manifest.json"))
    wanted = list({item.target: item for item in wanted}.values())
    model = out / "tokenizers" / dataset.model
    if not dataset.tokenizer_sha256 and model not in {item.target for item in wanted}:
        raise DownloadError(f"{dataset.repository} lacks {dataset.model}{offline or '; try --repository'}")
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
    model = out / "tokenizers" / dataset.model
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


def fetch(repository: str, commit: str, wanted: Wanted, progress: Progress) -> None:
    """Bring one file to its place, checked against the hub's size and
    digest; a bad copy is fetched once more.
    """
    entry, target = wanted
    doubled = target.parents[1] / "datasets" / target.parent.name / target.name
    for local in (target, doubled):
        if intact(local, entry):
            if local != target:
                place(local, target)
            progress.add(entry.size, fetched=False)
            return
    found = 0
    for _ in range(2):
        counted = [0]
        bar = bar_class(progress, counted)

        def once(counted: list[int] = counted, bar: type[tqdm] = bar) -> str:
            progress.add(-counted[0])
            counted[0] = 0
            return hf_hub_download(
                repository, entry.path, repo_type="dataset", revision=commit, tqdm_class=bar
            )

        if progress.stop.is_set():
            raise Stopped
        pointer = Path(patiently(once, progress))
        progress.add(entry.size - counted[0], fetched=False)
        blob = pointer.resolve()
        if intact(blob, entry):
            if SHARD.fullmatch(target.name):
                try:
                    read_shard(blob)
                except ShardError as error:
                    raise DownloadError(
                        f"{entry.path} is what the hub publishes, but no valid shard ({error}); "
                        "try another --repository"
                    ) from None
            place(blob, target)
            return
        found = blob.stat().st_size
        progress.add(-entry.size)
        for path in (pointer, cached_blob(repository, entry), blob):
            path.unlink(missing_ok=True)
    raise DownloadError(
        f"{entry.path} does not have the sha256 {entry.digest} that the hub states ({found:,} bytes, "
        "fetched twice); the copies were deleted: try again later, or another --repository"
    )


def check_disk(repository: str, plan: Plan, out: Path) -> None:
    """Say what the cache and `out` need for what is not there yet; DownloadError if they cannot hold it."""

    def device(path: Path) -> tuple[Path, int]:
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        return existing, existing.stat().st_dev

    missing = [
        item
        for item in plan.wanted
        if not (item.target.is_file() and item.target.stat().st_size == item.entry.size)
    ]
    uncached = sum(item.entry.size for item in missing if not cached_blob(repository, item.entry).is_file())
    cache, cache_device = device(Path(constants.HF_HUB_CACHE).absolute())
    beside, out_device = device(out.absolute())
    copied = sum(item.entry.size for item in missing) if out_device != cache_device else 0
    for folder, needed in ((cache, uncached), (beside, copied)):
        free = shutil.disk_usage(folder).free
        if needed:
            print(f"{needed:,} bytes needed on the disk of {folder}, {free:,} free", flush=True)
        if needed > free:
            raise DownloadError(
                f"{needed:,} bytes needed on the disk of {folder}, {free:,} free; free some, lower "
                "--train-shards, or set HF_HOME to a folder on a bigger disk"
            )


def fetch_all(repository: str, plan: Plan, workers: int, progress: Progress) -> None:
    """Fetch every file of `plan` with `workers` at a time; the first failure ends all."""
    for partial in cached_blob(repository, plan.wanted[0].entry).parent.glob("*.incomplete"):
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
    model = out / "tokenizers" / dataset.model
    manifest = {
        "format": FORMAT,
        "name": dataset.name,
        "transform": dataset.transform,
        "lossless": dataset.transform != "casefold",
        "tokenizer": {
            "file": dataset.model_beside,
            "sha256": dataset.tokenizer_sha256 or sha256_file(model),
            "vocab_size": dataset.vocab_size,
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
    write_json(target / MANIFEST, manifest)
    return manifest


def settle_tokenizer(dataset: Dataset, out: Path) -> None:
    """Put the tokenizer beside the shards too, where the trainer and verify_bytes.py look for it.

    One that is not on the hub is asked for, and refused if it is not the one that made the shards.
    """
    model, beside = (
        out / "tokenizers" / dataset.model,
        out / "datasets" / dataset.folder / dataset.model_beside,
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
        place(model, beside)


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
        commit, entries = list_files(dataset.repository, revision, progress)
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
    if dataset.suffix != ".model":
        print(
            f"{dataset.name}: its tokenizer is no SentencePiece model, which train_gpt.py needs; "
            "the shards are for other programs",
            flush=True,
        )
    return target


# === WHAT OTHERS HAVE PUBLISHED ===


def published_there(target: Path, train_shards: int | None, full_check: bool) -> tuple[dict | None, str]:
    """The manifest of a published dataset that is complete in `target`, else None and the reason."""
    if (target / UNFINISHED).exists():
        return None, "its download was stopped"
    try:
        manifest = read_json_object(target / MANIFEST)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError):
        return None, "manifest.json is not readable"
    problem = changed_or_foreign(manifest)
    if problem:
        return None, f"manifest.json: {problem}"
    here = sum(name.startswith("fineweb_train_") for name in manifest["files"])
    there = manifest.get("source", {}).get("train_shards_there", here)
    if here < (there if train_shards is None else train_shards):
        return None, f"it has {here} training shards"
    for name, facts in manifest["files"].items():
        path = target / name
        if not path.is_file() or path.stat().st_size != facts["size"]:
            return None, f"{name} is missing or has another size"
        if full_check and sha256_file(path) != facts["sha256"]:
            return None, f"{name} has another sha256"
    return manifest, ""


def plan_published(
    repository: str,
    commit: str,
    entries: Sequence[Entry],
    manifest: dict,
    train_shards: int | None,
    out: Path,
) -> Plan:
    """What of a published dataset to fetch; DownloadError if the repository lacks or contradicts anything."""
    there = {entry.path: entry for entry in entries}
    target = out / "datasets" / PurePosixPath(repository).name
    train = sorted(name for name in manifest["files"] if name.startswith("fineweb_train_"))
    if train_shards is not None and train_shards > len(train):
        raise DownloadError(
            f"--train-shards {train_shards}: {repository} has {len(train)}; ask for at most that many"
        )
    here = len(list(target.glob("fineweb_train_*.bin")))
    left_out = set() if train_shards is None else set(train[max(train_shards, here) :])
    wanted = []
    for name, facts in manifest["files"].items():
        entry = there.get(name)
        agrees = entry is not None and entry.size == facts["size"]
        if not agrees or (len(entry.digest) == 64 and entry.digest != facts["sha256"]):
            raise DownloadError(f"{repository} lacks {name} as its manifest says; ask who published it")
        if name not in left_out:
            # Whatever the hub hashes a small file with: the manifest says what it must be.
            wanted.append(Wanted(entry._replace(digest=facts["sha256"]), target / name))
    if not left_out and PROOF in there:
        wanted.append(Wanted(there[PROOF], target / PROOF))
    return Plan(commit, "", wanted, len(train))


def download_published(
    repository: str,
    out: Path,
    train_shards: int | None = None,
    workers: int = 8,
    revision: str = "main",
    full_check: bool = False,
) -> Path:
    """Make a dataset that data/publish.py has put on the hub complete under `out`; no request if it is."""
    target = out / "datasets" / PurePosixPath(repository).name
    manifest, reason = published_there(target, train_shards, full_check)
    if manifest is None:
        progress = Progress(repository, 0)
        if reason:
            progress.say(f"{target} is not complete: {reason}")
        commit, entries = list_files(repository, revision, progress)
        fetched = _published_manifest(repository, commit, entries, progress)
        manifest = read_json_object(fetched)
        plan = plan_published(repository, commit, entries, manifest, train_shards, out)
        check_disk(repository, plan, out)
        progress.total = sum(item.entry.size for item in plan.wanted)
        progress.say(f"{len(plan.wanted)} files, {progress.total / 1e9:.2f} GB, at {commit[:8]}")
        target.mkdir(parents=True, exist_ok=True)
        (target / UNFINISHED).touch()
        fetch_all(repository, plan, workers, progress)
        kept = {item.target.name for item in plan.wanted}
        if set(manifest["files"]) <= kept:
            place(fetched, target / MANIFEST)
        else:
            manifest = _reduced(manifest, kept, repository, plan)
            write_json(target / MANIFEST, manifest)
            (target / PROOF).unlink(missing_ok=True)
        (target / UNFINISHED).unlink()
        progress.say(f"{progress.fetched / 1e9:.2f} GB fetched, all sizes and checksums right")
    print(
        f"{repository}: {target} complete, {manifest['train_tokens']:,} training and "
        f"{manifest['val_tokens']:,} validation tokens",
        flush=True,
    )
    return target


def _published_manifest(repository: str, commit: str, entries: Sequence[Entry], progress: Progress) -> Path:
    """Where the manifest of a published dataset is in the cache; DownloadError if it is none."""
    if MANIFEST not in {entry.path for entry in entries}:
        raise DownloadError(
            f"{repository} has no {MANIFEST} at its top: data/publish.py has not finished a dataset there; "
            "name another one"
        )
    fetch_it = functools.partial(hf_hub_download, repository, MANIFEST, repo_type="dataset", revision=commit)
    path = Path(patiently(fetch_it, progress)).resolve()
    try:
        problem = changed_or_foreign(read_json_object(path))
    except ValueError as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise DownloadError(f"{MANIFEST} of {repository} {problem}; ask who published it")
    return path


def _reduced(manifest: dict, kept: set[str], repository: str, plan: Plan) -> dict:
    """The manifest of a part of the training shards: what is known of the whole alone is left out."""
    files = {name: facts for name, facts in manifest["files"].items() if name in kept}
    train = [facts["tokens"] for name, facts in files.items() if name.startswith("fineweb_train_")]
    whole = ("docs_train", "train_bytes", "left_out", "recipe", "checksum")
    part = {name: value for name, value in manifest.items() if name not in whole}
    part |= {"files": files, "train_tokens": sum(train)}
    part["source"] = {
        "repository": repository,
        "commit": plan.commit,
        "train_shards_there": plan.train_shards_there,
    }
    part["checksum"] = manifest_checksum(part)
    return part


def fetch_named(arguments: argparse.Namespace, repository: str) -> None:
    """Download what the command line names."""
    out = arguments.out.resolve()
    if arguments.name == DOCS:
        store_documents(repository, arguments.revision, out, arguments.verify)
        return
    how = arguments.train_shards, arguments.workers, arguments.revision, arguments.verify
    if arguments.name in DATASETS:
        download(DATASETS[arguments.name]._replace(repository=repository), out, *how)
    else:
        download_published(repository, out, *how)


def main() -> int:
    """Command line: 0 if the dataset is complete, 2 after a one-line error, 130 if interrupted."""
    parser = Parser(description="Download a public tokenised dataset, or the raw documents, from the hub.")
    parser.add_argument("name", help=", ".join([*DATASETS, DOCS, "OWNER/NAME"]))
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
    if arguments.name not in (*DATASETS, DOCS) and arguments.name.count("/") != 1:
        names = ", ".join([*DATASETS, DOCS, "OWNER/NAME"])
        print(f"error: no dataset {arguments.name!r}; choose one of {names}", file=sys.stderr)
        return 2
    if (arguments.train_shards or 0) < 0 or arguments.workers < 1:
        print("error: --train-shards must be 0 or more and --workers 1 or more", file=sys.stderr)
        return 2
    if arguments.name == DOCS and arguments.train_shards is not None:
        print("error: --train-shards: docs are no shards; leave it out", file=sys.stderr)
        return 2
    if "/" in arguments.name and arguments.repository:
        print(f"error: --repository: {arguments.name} is one already; leave it out", file=sys.stderr)
        return 2
    known = {DOCS: OFFICIAL} | {dataset.name: dataset.repository for dataset in DATASETS.values()}
    repository = arguments.repository or known.get(arguments.name, arguments.name)
    try:
        fetch_named(arguments, repository)
    except (DownloadError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FAILURES as error:
        print(f"error: {explain(error, repository)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; finished files are kept, the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
