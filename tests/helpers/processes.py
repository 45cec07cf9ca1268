"""Python programs in processes of their own that start in a tenth of the time.

They are forked from a server that has imported the heavy libraries once per test process, and the trainer
as a module; each executes its script anew. What a fork may hide is left to `fresh` processes, and to tests
that start an interpreter themselves: the packed script alone, a tool's start, every command of the documents.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType

import pytest

from helpers import ROOT

LIBRARIES = ["numba", "numpy", "sentencepiece", "torch", "torch._dynamo", "tqdm"]
TIMED_OUT = 1000  # no exit status


@functools.cache
def server() -> multiprocessing.context.BaseContext:
    """The server, started and loaded by the first who asks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES, "helpers.preload"])
    with pytest.MonkeyPatch.context() as patch:  # it does not inherit sys.path, and skips what it cannot find
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        forkserver.ensure_running()
    return context


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(words: list[str], variables: dict[str, str], folder: str, outputs: list[str], fresh: bool) -> None:
    """Be `python words…` in this forked process: its environment, folder, outputs and exit status."""
    for descriptor, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    if fresh:
        os.execv(sys.executable, [sys.executable, *words])
    status = 0
    try:
        execute(words)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.exit(status)


def execute(words: list[str]) -> None:
    """Run a script, or the text after -c, as __main__."""
    if words[0] == "-c":
        code = compile(words[1], "<string>", "exec")
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
    else:
        if Path(words[0]).resolve().is_relative_to(ROOT):
            code = SourceFileLoader("__main__", words[0]).get_code("__main__")  # compiled once for all
        else:  # a test may write a script twice within the second that caches tell versions apart by
            code = compile(Path(words[0]).read_bytes(), words[0], "exec")
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
    main = ModuleType("__main__")
    main.__file__ = words[0]
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def run_python(
    words: list[str],
    variables: dict[str, str] | None = None,
    ranks: int = 1,
    folder: Path = ROOT,
    fresh: bool = False,
    timeout: float = 240,
) -> subprocess.CompletedProcess:
    """The finished `python words…` in this environment or in `variables`.

    Several ranks are told what torchrun tells them, and all are stopped when one fails. `fresh` processes
    start a new interpreter each, and share no address and no hash seed.
    """
    variables = dict(os.environ) if variables is None else variables
    with empty_outputs() as paths:
        processes = []
        port = str(free_port())
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forked"}
            told = {name: str(value) for name, value in place.items()} | launcher if ranks > 1 else {}
            arguments = (list(map(str, words)), variables | told, str(folder), paths, fresh)
            processes.append(server().Process(target=become, args=arguments, daemon=True))
            processes[-1].start()
        status = wait_for(processes, timeout)
        shown, said = (Path(path).read_text() for path in paths)
    return subprocess.CompletedProcess(words, status, shown, said)


def kill_python(words: list[str], variables: dict[str, str], is_time: Callable[[str], bool]) -> str:
    """Start `python words…`, kill it once `is_time` of its standard output, and return the latter."""
    with empty_outputs() as paths:
        arguments = (list(map(str, words)), variables, str(ROOT), paths, False)
        process = server().Process(target=become, args=arguments, daemon=True)
        process.start()
        while not is_time(Path(paths[0]).read_text()):
            assert process.is_alive(), Path(paths[1]).read_text()
            time.sleep(0.02)
        process.kill()
        process.join()
        return Path(paths[0]).read_text()


@contextlib.contextmanager
def empty_outputs() -> Iterator[list[str]]:
    """Files for the standard output and error of a process."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/stdout", f"{folder}/stderr"]
        for path in paths:
            Path(path).touch()
        yield paths


def wait_for(processes: list[multiprocessing.Process], timeout: float) -> int:
    """The status of the first process that fails, or 0; none of them is left."""
    running = {process.sentinel: process for process in processes}
    status = 0
    while running and not status:
        ended = wait(list(running), timeout)
        if not ended:
            status = TIMED_OUT
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            status = status or process.exitcode
    for process in running.values():
        process.kill()
        process.join()
    assert status != TIMED_OUT, f"still running after {timeout:.0f} seconds"
    return status
