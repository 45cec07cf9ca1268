#!/usr/bin/env python3
"""Uploads a finished, proved dataset to the hub, where `data/download.py OWNER/NAME` fetches it.

    python verify_bytes.py data/datasets/mine --documents corpus.jsonl.zst --card
    python data/publish.py data/datasets/mine OWNER/NAME

Only what is proved goes out: the folder needs the proof.json that verify_bytes.py --card writes, about this
very manifest, and every file is hashed again. The shards go first, manifest and proof last, so that an upload
that was stopped is not taken for a dataset; the same command goes on with what is not there yet. At the end
the hub's own list of sizes and hashes is compared with the manifest. HF_ENDPOINT and HF_TOKEN act as usual.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import environment

environment.enter()
import argparse
import functools

from data.card import MANIFEST, PROOF, ProofError, card, changed_or_foreign, read_proof
from data.documents import DataError
from data.hub import (
    FAILURES,
    CommitOperationAdd,
    DownloadError,
    Entry,
    HfApi,
    Progress,
    constants,
    digest_like,
    explain,
    list_remote,
    patiently,
)
from data.options import Parser
from data.shards import UNFINISHED, read_json_object, sha256_file

README = "README.md"


def checked(folder: Path) -> tuple[dict, dict]:
    """The manifest and the proof of a dataset whose files are all as they were proved; else ProofError."""
    if (folder / UNFINISHED).exists() or not (folder / MANIFEST).is_file():
        raise ProofError(f"{folder}: holds no finished dataset; give the command that makes it again")
    try:
        manifest = read_json_object(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise ProofError(f"{folder / MANIFEST}: cannot be read ({error}); make the dataset again") from None
    problem = changed_or_foreign(manifest)
    if problem:
        raise ProofError(f"{folder / MANIFEST}: {problem}; make the dataset again")
    proof = read_proof(folder)
    progress = Progress("hash", sum(facts["size"] for facts in manifest["files"].values()))
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["size"] or sha256_file(path) != facts["sha256"]:
            raise ProofError(f"{path}: is not what the manifest says; ./verify_bytes.py {folder} shows more")
        progress.add(facts["size"])
    return manifest, proof


def refuse_another(repository: str, entries: list[Entry], manifest: Path) -> None:
    """DataError if the repository already holds another dataset."""
    for entry in entries:
        if entry.path == MANIFEST and entry.digest != digest_like(manifest, entry.digest):
            raise DataError(f"{repository}: holds another dataset; name a new repository")


def compare(repository: str, entries: list[Entry], folder: Path, wanted: dict[str, str]) -> None:
    """DataError unless the hub lists every file of `wanted` (name: sha256) as it is in `folder`."""
    there = {entry.path: entry for entry in entries}
    for name, sha256 in wanted.items():
        entry = there.get(name)
        if entry is None or entry.size != (folder / name).stat().st_size:
            raise DataError(f"{repository}: lacks {name}, or has another size; give the command again")
        if entry.digest != sha256 and entry.digest != digest_like(folder / name, entry.digest):
            raise DataError(f"{repository}: {name} has another hash there; give the command again")


def publish(folder: Path, repository: str, private: bool) -> str:
    """Upload the dataset in `folder` and return the commit that has all of it."""
    manifest, proof = checked(folder)
    wanted = {name: facts["sha256"] for name, facts in sorted(manifest["files"].items())}
    size = sum(facts["size"] for facts in manifest["files"].values())
    progress = Progress(repository, size)
    progress.say(f"{len(wanted)} files, {size / 1e9:.2f} GB, go to {constants.ENDPOINT}")
    hub = HfApi()
    patiently(
        functools.partial(
            hub.create_repo, repository, repo_type="dataset", private=private or None, exist_ok=True
        ),
        progress,
    )
    refuse_another(repository, list_remote(repository, "main", progress)[1], folder / MANIFEST)
    patiently(
        functools.partial(
            hub.upload_folder,
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=list(wanted),
            commit_message=f"Shards of {manifest['name']}",
        ),
        progress,
    )
    compare(repository, list_remote(repository, "main", progress)[1], folder, wanted)
    described = {README: card(manifest, proof).encode(), PROOF: folder / PROOF, MANIFEST: folder / MANIFEST}
    patiently(
        functools.partial(_describe, hub, repository, described, f"{manifest['name']}, proved"), progress
    )
    commit, entries = list_remote(repository, "main", progress)
    wanted |= {name: sha256_file(folder / name) for name in (PROOF, MANIFEST)}
    compare(repository, entries, folder, wanted)
    return commit


def _describe(hub: HfApi, repository: str, files: dict[str, bytes | Path], message: str) -> None:
    """Commit the files that make the shards a dataset, in one commit (operations serve for one attempt)."""
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    hub.create_commit(repository, operations, repo_type="dataset", commit_message=message)


def reason_of(error: Exception, repository: str) -> str:
    """One line for what stopped an upload."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"{constants.ENDPOINT} does not let you write {repository} (status {status}); "
            "set HF_TOKEN to a token that may, or name a repository of your own"
        )
    return explain(cause, repository, "another OWNER/NAME")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line; exits with usage on a wrong one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help=f"folder with {MANIFEST}, {PROOF} and the shards")
    parser.add_argument("repository", metavar="OWNER/NAME", help="of the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it so that only its owner sees it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code is 0 if all is on the hub, 2 after a one-line error, 130 if interrupted."""
    options = parse_arguments(arguments)
    try:
        if constants.is_offline_mode():
            raise DataError("HF_HUB_OFFLINE is set; unset it to publish")
        commit = publish(options.dataset, options.repository, options.private)
    except (ProofError, DataError, DownloadError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    except (*FAILURES, RuntimeError, ValueError) as error:
        print(f"publish: {reason_of(error, options.repository)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("publish: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(
        f"{options.repository}: complete at {commit[:8]}; ./data/download.py {options.repository} fetches it",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
