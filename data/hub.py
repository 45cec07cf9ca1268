"""The dataset hub for whatever reads from it or publishes there: listing, patience, errors in one line."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx2

try:
    # As a module: through the package the client prints a line of its own. It is imported from here alone.
    import huggingface_hub.constants as constants
except ValueError as error:
    names = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
    print(f"error: the hub client refuses one of {names} ({error}); unset or correct it", file=sys.stderr)
    sys.exit(2)
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile, hf_hub_download, hf_hub_url, scan_cache_dir
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from data.shards import sha256_file

DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
BUSY = (408, 429, 500, 502, 503, 504)
# A refused connection, an unknown host or a wrong address stays so; the client has tried a few times already.
LASTING = (httpx2.ConnectError, httpx2.UnsupportedProtocol)
ATTEMPTS = 6
LONGEST_WAIT = 600  # seconds; the hub counts requests in windows of five minutes
Result = TypeVar("Result")


__all__ = ["CommitOperationAdd", "build_hf_headers", "constants", "hf_hub_download", "hf_hub_url", "http_get"]
# What the hub client, the network and the disk raise; `explain` has a line for each.
FAILURES = (OSError, EntryNotFoundError, httpx2.HTTPError, httpx2.InvalidURL, HFValidationError)


class DownloadError(Exception):
    """The dataset cannot be completed; the message is one line with the remedy."""


class Entry(NamedTuple):
    """A file of the repository: its path there, its size, and its
    sha256 (or git blob id if it is a small text).
    """

    path: str
    size: int
    digest: str


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


class Stopped(Exception):
    """Raised inside a running transfer after another one has failed."""


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
                raise Stopped from None
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


def list_files(repository: str, revision: str, progress: Progress) -> tuple[str, list[Entry]]:
    """The same from the hub, or from the cache alone if HF_HUB_OFFLINE is set."""
    if constants.is_offline_mode():
        return list_cached(repository, revision)
    return list_remote(repository, revision, progress)


def digest_like(path: Path, like: str) -> str:
    """sha256 of a file, or its git blob id where the hub publishes that."""
    if len(like) == 64:
        return sha256_file(path)
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()


def intact(path: Path, entry: Entry) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == entry.size
        and digest_like(path, entry.digest) == entry.digest
    )


def place(source: Path, target: Path) -> None:
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


def cached_blob(repository: str, entry: Entry) -> Path:
    folder = repo_folder_name(repo_id=repository, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE, folder, "blobs", entry.digest)


def bar_class(progress: Progress, counted: list[int] | None) -> type[tqdm]:
    """A silent progress bar for the hub client that adds to `progress` (unless the
    caller counts itself: None), and ends the transfer when that is stopped.
    """

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if progress.stop.is_set():
                raise Stopped
            if counted is not None:
                counted[0] += int(n or 0)
                progress.add(int(n or 0))

        def update_transfer(self, n: float) -> None:
            """Bytes on the wire; `update` has counted them already."""

    return Bar


def explain(error: Exception, repository: str, another: str = "--repository") -> str:
    """One line for an error of the hub client, the network or the disk: what happened and what to do.

    `another` is how the user names another repository.
    """
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    kept = "finished files are kept, the same command continues"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, RevisionNotFoundError):
        return f"{repository} has no such revision; leave --revision out, or name a branch or commit of it"
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{constants.ENDPOINT} shows no dataset {repository} (status {status}): "
            f"set HF_TOKEN if it is private or gated; or name a copy with {another}"
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
            f"a listed file is not on the hub: {cause.response.url}; try later, or name a copy with {another}"
        )
    first_line = next(iter(str(cause).strip().splitlines()), "")
    if isinstance(cause, OSError) and cause.errno:
        return (
            f"{cause.strerror}: {cause.filename or ''}; "
            f"free space, or choose a writable --out and HF_HOME: {kept}"
        )
    return f"{type(cause).__name__}: {first_line}; {kept}"
