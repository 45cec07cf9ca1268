"""Kills at random moments of every stage of a preparation: the same command must end at the same bytes.

For bench/data.py --kills N. A small dataset with everything in it (case operators, superwords, sidecar, many
shards, proof) is made from a file and from a local hub's stream. Each preparation is killed (SIGKILL, from
outside) once in each of STAGES, at a moment drawn from how long the stage takes, and goes on each time; then
every file must be that of a run that nobody killed. Every start is a fork made after the imports.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import verify_bytes  # noqa: F401 -- before the forks, which prove their datasets
from bench.texts import ROOT
from data import prepare, stream
from data.card import MANIFEST
from data.shards import read_json_object
from helpers.data_side import content
from helpers.hub_server import Hub, hub_client

# In their order. "read": sources and validation texts are looked through, nothing is written yet; "finish":
# from the last training document to the manifest and the card.
STAGES = ("read", "tokenizer", "val", "train", "finish", "proof")
FILE, STREAM = "file", "stream"
LATE = "too late"
DOCUMENTS, VAL_DOCUMENTS = 700, 60
OPTIONS = ("--val-docs", VAL_DOCUMENTS, "--transform", "caseops_v3", "--vocab-size", 500, "--superwords", 50)
OPTIONS += ("--batch-mb", 0.01, "--journal-seconds", 0, "--shard-tokens", 10_000, "--prove")
OPTIONS += ("--max-case-lost", 1)  # this program's documents speak of odd characters
POLL_SECONDS = 0.005
# One preparation in so many has two workers, whose start costs more than all the rest.
TWO_WORKERS = 5


class Run:
    """A forked `prepare.py` that writes what it says to a file; `stage` is where it is."""

    def __init__(self, source: str, out: Path, workers: int):
        self.out, self.said = out, out.with_suffix(".log")
        self.said.touch()
        self.before = self.said.stat().st_size
        self.process = os.fork()
        if self.process == 0:
            log = os.open(self.said, os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            arguments = [source, "--out", out, *OPTIONS, "--workers", workers]
            os._exit(prepare.main([str(argument) for argument in arguments]))
        self.status: int | None = None

    def ended(self) -> bool:
        """Whether the process has ended; `status` is its exit status then."""
        if self.status is None:
            found, status = os.waitpid(self.process, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status is not None

    def stage(self) -> str:
        """The one of STAGES that it has reached."""
        text = self.said.read_bytes()[self.before :]
        if b"proving it" in text:
            return "proof"
        if b"already complete" in text or (self.out / MANIFEST).exists():
            return "finish"
        if b"about " not in text:  # what it says of the disk, after the sources are read
            return "read"
        try:
            journal = read_json_object(self.out / prepare.JOURNAL)
        except (OSError, ValueError):
            return "read"
        if journal["stage"] == "train" and self._is_read(journal):
            return "finish"
        return "read" if journal["stage"] == "tokenizer" and b"training a" not in text else journal["stage"]

    def _is_read(self, journal: dict) -> bool:
        """Whether all training documents are in the shards."""
        return journal.get("train", {}).get("position", {}).get("record") == DOCUMENTS

    def wait(self, is_time: Callable[[], bool]) -> None:
        """Until it is time, or the process has ended."""
        while not self.ended() and not is_time():
            time.sleep(POLL_SECONDS)

    def kill(self) -> bool:
        """SIGKILL; False if it came too late."""
        if self.ended():
            return False
        os.kill(self.process, signal.SIGKILL)
        self.wait(lambda: False)
        return self.status == -signal.SIGKILL


def warm(source: str, out: Path) -> dict[str, str]:
    """The files of a run in this process, whose forks have loaded and compiled everything therefore."""
    arguments = [source, "--out", out, *OPTIONS, "--workers", 1]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = prepare.main([str(argument) for argument in arguments])
    if status != 0:
        raise RuntimeError(f"{source}: the run in this process ends with {status}")
    return content(out)


def undisturbed(source: str, out: Path) -> dict[str, float]:
    """A run that nobody kills: the seconds of each stage."""
    run = Run(source, out, 1)
    began, seconds = time.monotonic(), {}
    for number, stage in enumerate(STAGES):
        run.wait(lambda number=number: STAGES.index(run.stage()) > number)
        seconds[stage] = time.monotonic() - began
        began += seconds[stage]
    if run.status != 0:
        raise RuntimeError(f"the undisturbed run ends with {run.status}: {run.said.read_text()[-2000:]}")
    return seconds


def killed(source: str, out: Path, seconds: dict[str, float], generator: random.Random) -> Counter:
    """Kill one preparation in every stage and let it end: the kills by the stage that they came in."""
    workers = generator.choice([2] + [1] * (TWO_WORKERS - 1))
    counts: Counter = Counter()
    for number, stage in enumerate(STAGES):
        run = Run(source, out, workers)
        run.wait(lambda number=number, run=run: STAGES.index(run.stage()) >= number)
        until = time.monotonic() + generator.uniform(0, seconds[stage])
        run.wait(lambda until=until: time.monotonic() >= until)
        reached = run.stage()
        counts[reached if run.kill() else LATE] += 1
    run = Run(source, out, workers)
    run.wait(lambda: False)
    if run.status != 0:
        raise RuntimeError(f"the same command ends with {run.status}: {run.said.read_text()[-2000:]}")
    return counts


def paragraphs() -> list[str]:
    """Different paragraphs of this repository, DOCUMENTS of them."""
    found: dict[str, None] = {}
    for path in [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("data/*.py"))]:
        found |= dict.fromkeys(path.read_text(encoding="utf-8").split("\n\n"))
    texts = [text for text in found if text.strip()][:DOCUMENTS]
    if len(texts) < DOCUMENTS:
        raise RuntimeError(f"{ROOT}: {len(texts)} paragraphs of documentation, but {DOCUMENTS} are wanted")
    return texts


def facts_of(documents: bytes) -> bytes:
    """What the manifest on the hub says of documents."""
    facts = {
        "num_docs": documents.count(b"\n"),
        "docs_val": VAL_DOCUMENTS,
        "docs_bytes": len(documents),
        "docs_sha256": hashlib.sha256(documents).hexdigest(),
    }
    return json.dumps(facts).encode()


@contextlib.contextmanager
def hub_of(documents: bytes) -> Iterator[Hub]:
    """A hub with documents, in a process of its own: this one forks, and must have no threads."""
    hub = Hub()
    facts = f"datasets/{stream.FACTS}"
    hub.add(stream.REPOSITORY, {f"datasets/{stream.DOCUMENTS}": documents, facts: facts_of(documents)})
    hub.small = {facts}
    reading, writing = os.pipe()
    server = os.fork()
    if server == 0:
        with hub:
            os.write(writing, hub.url.encode())
            signal.pause()
    hub.url = os.read(reading, 100).decode()
    try:
        yield hub
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def kills(count: int) -> dict:
    """Kill `count` preparations of each source in every stage; what differs from undisturbed ones."""
    documents = "".join(json.dumps({"text": text}) + "\n" for text in paragraphs()).encode()
    began, rows, differing = time.monotonic(), {}, []
    print(f"{'kills in':<10}" + "".join(f"{stage:>11}" for stage in (*STAGES, LATE)))
    with (
        tempfile.TemporaryDirectory() as name,
        pytest.MonkeyPatch.context() as patch,
        hub_of(documents) as hub,
    ):
        place = Path(name)
        hub_client(patch, hub, place / "home")
        patch.setattr(stream, "FIRST_RANGE", 10_000)
        patch.setattr(stream, "LARGEST_RANGE", 40_000)
        stored = place / stream.DOCUMENTS
        stored.write_bytes(documents)
        expected = warm(str(stored), place / "whole")
        for kind, source in {FILE: str(stored), STREAM: stream.SOURCE}.items():
            counts, wrong = kill_all(source, place / kind, count, expected)
            rows[kind] = dict(counts)
            differing += wrong
            print(f"{kind:<10}" + "".join(f"{counts[stage]:>11}" for stage in (*STAGES, LATE)), flush=True)
    for text in differing:
        print(f"OTHER BYTES: {text}")
    return {"kills": rows, "identical": not differing, "seconds": round(time.monotonic() - began, 1)}


def kill_all(source: str, place: Path, count: int, expected: dict[str, str]) -> tuple[Counter, list[str]]:
    """Kill `count` preparations of a source: the kills by stage, and the folders that are not as expected."""
    place.mkdir()
    generator, counts = random.Random(), Counter()
    seconds = undisturbed(source, place / "undisturbed")
    for number in range(count):
        counts += killed(source, place / f"killed_{number}", seconds, generator)
    return counts, [str(out) for out in sorted(place.glob("*/")) if content(out) != expected]
