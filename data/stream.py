"""The contest's documents on the hub: found, read as a stream, or stored.

They are one file of JSON lines beside a manifest that says its sha256 and how many documents it holds. The
stream asks for ranges of it, several at a time, and begins wherever it is told to.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from data.documents import DataError, RemoteFile
from data.hub import (
    FAILURES,
    DownloadError,
    Entry,
    Progress,
    bar_class,
    build_hf_headers,
    cached_blob,
    constants,
    explain,
    hf_hub_download,
    hf_hub_url,
    http_get,
    list_files,
    patiently,
    place,
)
from data.shards import read_json_object, sha256_file

DOCUMENTS, FACTS = "docs_selected.jsonl", "docs_selected.source_manifest.json"
REPOSITORY = "willdepueoai/parameter-golf"
SOURCE, ANOTHER = "hub:docs", "hub:docs@OWNER/NAME"
# The first range is small, for whoever wants a few lines; the ranges double up to the largest. Four of 32 MiB
# under way hold 128 MiB of memory, and keep the requests for 48 GB at 1,500.
FIRST_RANGE, LARGEST_RANGE, AHEAD = 1 << 20, 32 << 20, 4
BLOCK = 1 << 20


class RemoteStream(io.RawIOBase):
    """The bytes of a RemoteFile, fetched in ranges ahead of the reader; DataError if they cannot be had."""

    def __init__(self, source: RemoteFile):
        self._source, self._place = source, 0
        self._url = hf_hub_url(source.repository, source.path, repo_type="dataset", revision=source.commit)
        self._progress = Progress(str(source), source.size)
        self._pool = ThreadPoolExecutor(AHEAD)
        self._forget()

    def _forget(self) -> None:
        """Drop what was fetched: reading goes on at another place."""
        for future in getattr(self, "_coming", ()):
            future.cancel()
        self._coming: deque[Future[bytes]] = deque()
        self._range, self._asked, self._ahead = FIRST_RANGE, self._place, 1
        self._part = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, which is returned; nothing is asked of the hub before the next read."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._source.size}[whence]
        if base + offset != self._place:
            self._place = base + offset
            self._forget()
        return self._place

    def readinto(self, buffer: bytearray) -> int:
        """Fill `buffer` with the next bytes; how many there were, 0 at the end of the file."""
        if not self._part:
            self._part = self._next_range()
        count = min(len(buffer), len(self._part))
        buffer[:count] = self._part[:count]
        self._part = self._part[count:]
        self._place += count
        return count

    def _next_range(self) -> memoryview:
        while len(self._coming) < self._ahead and self._asked < self._source.size:
            end = min(self._asked + self._range, self._source.size)
            self._coming.append(self._pool.submit(self._fetch, self._asked, end))
            self._asked, self._range = end, min(2 * self._range, LARGEST_RANGE)
        self._ahead = AHEAD
        if not self._coming:
            return memoryview(b"")
        try:
            return memoryview(self._coming.popleft().result())
        except DownloadError as error:
            raise DataError(str(error)) from None
        except FAILURES as error:
            raise DataError(f"{self._source}: {explain(error, self._source.repository, ANOTHER)}") from None

    def _fetch(self, start: int, end: int) -> bytes:
        return patiently(functools.partial(self._ask, start, end), self._progress)

    def _ask(self, start: int, end: int) -> bytes:
        content = io.BytesIO()
        http_get(
            self._url,
            content,
            headers=build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"},
            expected_size=end - start,
            tqdm_class=bar_class(self._progress, None),
        )
        return content.getvalue()

    def close(self) -> None:
        """End the transfers under way."""
        if not self.closed:
            self._progress.stop.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


# === FINDING ===


def documents_of(name: str) -> RemoteFile:
    """The file that `hub:docs` or `hub:docs@OWNER/NAME` means; DataError if it is not there."""
    kind, _, repository = name.partition("@")
    repository = repository or REPOSITORY
    if kind != SOURCE:
        raise DataError(f"{name}: no such source; give {SOURCE} or {ANOTHER}")
    if constants.is_offline_mode():
        raise DataError(f"{name}: HF_HUB_OFFLINE is set; unset it, or give files that are here")
    try:
        return find_documents(repository, "main", Progress(name, 0))[0]
    except DownloadError as error:
        raise DataError(str(error)) from None
    except FAILURES as error:
        raise DataError(f"{name}: {explain(error, repository, ANOTHER)}") from None


def find_documents(repository: str, revision: str, progress: Progress) -> tuple[RemoteFile, Path]:
    """The documents of a repository, and where their manifest is in the cache; DownloadError if they lack."""
    commit, entries = list_files(repository, revision, progress)
    by_path = {entry.path: entry for entry in entries}
    paths = sorted(
        (path for path in by_path if PurePosixPath(path).name == DOCUMENTS), key=lambda path: path.count("/")
    )
    if not paths:
        raise DownloadError(f"{repository} has no {DOCUMENTS}; name another repository")
    beside = str(PurePosixPath(paths[0]).with_name(FACTS))
    if beside not in by_path:
        raise DownloadError(f"{repository} has no {beside}; name another repository")
    documents = by_path[paths[0]]
    manifest = patiently(
        functools.partial(hf_hub_download, repository, beside, repo_type="dataset", revision=commit), progress
    )
    try:
        said = read_json_object(Path(manifest))
        digest, count = str(said["docs_sha256"]), int(said["num_docs"])
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{beside} of {repository} does not say what the documents are ({error}); name another repository"
        ) from None
    if digest != documents.digest:
        raise DownloadError(
            f"{documents.path} of {repository} has sha256 {documents.digest}, but {beside} says {digest}; "
            "name another repository"
        )
    return RemoteFile(repository, commit, documents.path, documents.size, digest, count), Path(manifest)


# === STORING ===


def stored_documents(folder: Path, full_check: bool) -> str:
    """Why the documents in `folder` are not complete, or an empty text; all bytes only with `full_check`."""
    path = folder / DOCUMENTS
    try:
        said = read_json_object(folder / FACTS)
        digest = said["docs_sha256"]
    except FileNotFoundError:
        return f"{FACTS} is missing"
    except (ValueError, KeyError):
        return f"{FACTS} is not readable"
    if not path.is_file():
        return f"{DOCUMENTS} is missing"
    if path.stat().st_size != said.get("docs_bytes", path.stat().st_size):
        return f"{DOCUMENTS} has another size"
    if full_check and sha256_file(path) != digest:
        return f"{DOCUMENTS} has another sha256"
    return ""


def store_documents(repository: str, revision: str, out: Path, full_check: bool = False) -> Path:
    """Make the documents complete in `out`/datasets and return their path; no request if they are.

    What a killed run has written is kept, hashed again and continued at its last byte.
    """
    folder, progress = out / "datasets", Progress("docs", 0)
    target = folder / DOCUMENTS
    reason = stored_documents(folder, full_check)
    if reason:
        source, manifest = find_documents(repository, revision, progress)
        partial = folder / f".{DOCUMENTS}.{source.sha256[:16]}.partial"
        progress.total = source.size
        blob = cached_blob(repository, Entry(source.path, source.size, source.sha256))
        here = max((path.stat().st_size for path in (partial, target, blob) if path.is_file()), default=0)
        state_disk(source, min(here, source.size), out)
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            print(f"docs: {folder} is not complete: {reason}", flush=True)
        if _is(target, source):
            progress.add(source.size, fetched=False)
        elif _is(blob, source):
            place(blob, target)
        else:
            _fetch_documents(source, partial, target, progress)
        place(manifest.resolve(), folder / FACTS)
        progress.say(f"{progress.fetched / 1e9:.2f} GB fetched, sha256 {source.sha256} as published")
    print(f"docs: {target} complete", flush=True)
    return target


def _is(path: Path, source: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == source.size and sha256_file(path) == source.sha256


def state_disk(source: RemoteFile, here: int, out: Path) -> None:
    """Say what is needed beside the `here` bytes on disk, and free, before anything is fetched; DownloadError
    if it cannot be held.
    """
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    free, needed = shutil.disk_usage(existing).free, source.size - here
    print(
        f"docs: {source.records:,} documents, {source.size / 1e9:.2f} GB, from {source.repository} at "
        f"{source.commit[:8]}; {needed:,} bytes needed on the disk of {existing}, {free:,} free",
        flush=True,
    )
    if needed > free:
        raise DownloadError(
            f"{needed:,} bytes needed on the disk of {existing}, {free:,} free; free some, choose another "
            f"--out, or give {SOURCE} to data/prepare.py, which stores no text"
        )


def _fetch_documents(source: RemoteFile, partial: Path, target: Path, progress: Progress) -> None:
    """Continue the file that a killed run left, prove it, and give it its name."""
    digest = hashlib.sha256()
    with open(partial, "a+b", buffering=0) as file:
        file.truncate(min(os.fstat(file.fileno()).st_size, source.size))
        file.seek(0)
        while block := file.read(BLOCK):
            digest.update(block)
            progress.add(len(block), fetched=False)
        with RemoteStream(source) as stream:
            stream.seek(file.tell())
            buffered = io.BufferedReader(stream, BLOCK)
            while block := buffered.read(BLOCK):
                digest.update(block)
                file.write(block)
                progress.add(len(block))
        os.fsync(file.fileno())
    if digest.hexdigest() != source.sha256:
        partial.unlink()
        raise DownloadError(
            f"{source.path} does not have the sha256 {source.sha256} that the hub states; the copy was "
            "deleted: try again later, or another --repository"
        )
    os.replace(partial, target)
