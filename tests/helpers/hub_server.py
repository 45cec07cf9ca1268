"""A local stand-in for the dataset hub: the part of its HTTP
interface that the hub client uses, with faults on demand.

Large files answer a HEAD with a redirect to another host name, as the hub does for its storage,
so that a token sent on to a foreign host would be seen. Faults are set per path and used up.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34
PAGE = 5  # entries per page of a listing: small, so that the client has to follow pages


class Seen(NamedTuple):
    """One request as the server got it."""

    method: str
    path: str
    range: str | None
    token: str | None
    host: str


class Server(ThreadingHTTPServer):
    """A server on which a killed client makes no noise."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Silence for a broken connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """Repositories of files in memory, served on a free port while used as a context manager."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.small: set[str] = set()  # paths served directly, without LFS metadata
        self.hidden: set[str] = set()  # paths that are listed but cannot be fetched
        self.served_as: dict[str, bytes] = {}  # content sent instead of the published one
        self.cut_after: dict[str, list[int]] = {}  # bytes after which the connection breaks, one per download
        self.busy: Counter[str] = Counter()  # how often a path (or "api") answers 429
        self.retry_after = "0"
        self.private_token: str | None = None
        self.write_token: str | None = None  # None: nobody may upload
        self.stored: dict[
            str, bytes
        ] = {}  # large files that were uploaded, by sha256, before a commit names them
        self.commits: list[list[str]] = []  # the paths of each commit
        self.seen: list[Seen] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Hub:
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self._server = Server(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repository: str, files: dict[str, bytes]) -> None:
        """Publish `files` (path: content) in `repository`."""
        self.repositories.setdefault(repository, {}).update(files)

    def use_up(self, counter: Counter[str], key: str) -> bool:
        """True as long as there is one left of `key`."""
        with self._lock:
            counter[key] -= 1
            return counter[key] >= 0

    def take_cut(self, path: str) -> int | None:
        """The number of bytes after which this download of `path` breaks, or None."""
        with self._lock:
            return self.cut_after[path].pop(0) if self.cut_after.get(path) else None

    def downloads(self, path: str) -> list[Seen]:
        """The requests for the content of files whose path ends in `path`."""
        return [
            seen
            for seen in self.seen
            if seen.method == "GET" and seen.path.endswith(path) and "/api/" not in seen.path
        ]


class Handler(BaseHTTPRequestHandler):
    """One request to a Hub."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's acknowledgement

    def log_message(self, format: str, *args) -> None:
        """Silence."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        """Same as GET without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Route a request."""
        url = urlsplit(self.path)
        token = self.headers.get("Authorization")
        self.hub.seen.append(
            Seen(
                self.command,
                unquote(url.path),
                self.headers.get("Range"),
                token,
                self.headers["Host"].split(":")[0],
            )
        )
        parts = unquote(url.path).strip("/").split("/")
        if parts[0] == "storage":
            return self._storage("/".join(parts[1:3]), "/".join(parts[3:]))
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        repository = "/".join(parts[1:3])
        if self.hub.use_up(self.hub.busy, "api" if api else "/".join(parts[5:])):
            return self._answer(429, Retry_After=self.hub.retry_after)
        if (
            parts[0] != "datasets"
            or repository not in self.hub.repositories
            or (self.hub.private_token and token != f"Bearer {self.hub.private_token}")
        ):
            return self._refuse(401, "RepoNotFound")
        if len(parts) > 4 and parts[4] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if api and parts[3:4] == ["tree"]:
            return self._tree(repository, url)
        if api:
            return self._json({"id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        return self._resolve(repository, "/".join(parts[5:]))

    def do_PUT(self) -> None:
        """Take a large file in."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = hashlib.sha256(content).hexdigest()
        self._see()
        if not self.path.endswith(oid) or self.hub.use_up(self.hub.busy, "upload"):
            return self._answer(400)
        self.hub.stored[oid] = content
        return self._answer(200)

    def do_POST(self) -> None:
        """What an upload asks: make a repository, how to send files, where large ones go, commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._see()
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {self.hub.write_token}":
            return self._answer(401)
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            self.hub.add(repository, {})
            return self._json({"url": f"{self.hub.url}/datasets/{repository}"})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._json(
                {"transfer": "basic", "objects": list(map(self._place_of, json.loads(body)["objects"]))}
            )
        repository = "/".join(parts[2:4])
        if parts[4] == "preupload":
            return self._json(
                {"files": [self._mode_of(repository, file) for file in json.loads(body)["files"]]}
            )
        return self._commit(repository, [json.loads(line) for line in body.splitlines()])

    def _see(self) -> None:
        host = self.headers["Host"].split(":")[0]
        token = self.headers.get("Authorization")
        self.hub.seen.append(Seen(self.command, unquote(urlsplit(self.path).path), None, token, host))

    def _place_of(self, wanted: dict) -> dict:
        if wanted["oid"] in self.hub.stored:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}}

    def _mode_of(self, repository: str, file: dict) -> dict:
        mode = "lfs" if file["path"].endswith((".bin", ".model")) else "regular"
        there = self.hub.repositories[repository].get(file["path"])
        oid = (
            None
            if there is None
            else hashlib.sha256(there).hexdigest()
            if mode == "lfs"
            else git_digest(there)
        )
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _commit(self, repository: str, lines: list[dict]) -> None:
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.small.add(value["path"])
        self.hub.add(repository, files)
        self.hub.commits.append(sorted(files))
        self._json(
            {"commitUrl": f"{self.hub.url}/datasets/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        )

    def _json(self, value: object, **headers: str) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _tree(self, repository: str, url) -> None:
        files = sorted(self.hub.repositories[repository].items())
        folders = sorted({path.rpartition("/")[0] for path, _ in files} - {""})
        entries: list[dict] = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
        ]
        for path, content in files:
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_digest(content)}
            if path not in self.hub.small:
                entry["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 134,
                }
            entries.append(entry)
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        link = {"Link": f'<{self.hub.url}{url.path}?recursive=true&cursor={start + PAGE}>; rel="next"'}
        self._json(entries[start : start + PAGE], **(link if start + PAGE < len(entries) else {}))

    def _resolve(self, repository: str, path: str) -> None:
        content = self.hub.repositories[repository].get(path)
        if content is None or path in self.hub.hidden:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        if path in self.hub.small:
            return self._answer(
                200,
                self.hub.served_as.get(path, content),
                ETag=f'"{git_digest(content)}"',
                X_Repo_Commit=COMMIT,
            )
        return self._answer(
            302,
            X_Repo_Commit=COMMIT,
            X_Linked_Size=str(len(content)),
            X_Linked_Etag=f'"{hashlib.sha256(content).hexdigest()}"',
            Location=f"http://localhost:{self.hub.port}/storage/{repository}/{quote(path)}",
        )

    def _storage(self, repository: str, path: str) -> None:
        content = self.hub.served_as.get(path, self.hub.repositories[repository][path])
        status, start = 200, 0
        headers = {}
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            whole, status, start = len(content), 206, int(first)
            content = content[: int(last) + 1] if last else content
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{whole}"
        cut = self.hub.take_cut(path)
        if cut is None:
            return self._answer(status, content[start:], **headers)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + cut])
        self.close_connection = True


def hub_client(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path) -> None:
    """Let the hub client of this process talk to `hub` alone, its cache and token being in `home`."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def git_digest(content: bytes) -> str:
    """The git blob id of `content`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
