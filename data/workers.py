"""Work in several processes whose results come back in order; a killed parent leaves no worker behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.documents import DataError

Item = TypeVar("Item")


def _serve(connection: multiprocessing.connection.Connection, job: Callable) -> None:
    """A worker: answers each (number, item) until the other end goes
    away, as it does when the parent is killed.
    """
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            number, item = connection.recv()
            try:
                answer = job(item)
            except Exception as error:
                answer = error
            connection.send((number, answer))


def run_in_order(
    job: Callable[[Item], Any], source: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Any]]:
    """Each item with the result of `job` for it, in order, from `workers` processes (1: this one).

    `job` is sent to the workers once and must be picklable. What it raises is raised here.
    """
    if workers == 1:
        for item in source:
            yield item, job(item)
        return
    # Not fork: a forked worker would hold the other workers' pipes open and so outlive a killed parent.
    context = multiprocessing.get_context("spawn")
    idle, processes = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            idle.append(ours)
            processes.append(process)
        busy: dict[multiprocessing.connection.Connection, int] = {}
        waiting: dict[int, Item] = {}
        ready: dict[int, Any] = {}
        iterator, number, next_out = iter(source), 0, 0
        upcoming = next(iterator, None)
        while upcoming is not None or busy or ready:
            while idle and upcoming is not None and number - next_out < 4 * workers:
                connection = idle.pop()
                connection.send((number, upcoming))
                busy[connection] = number
                waiting[number] = upcoming
                number += 1
                upcoming = next(iterator, None)
            for connection in multiprocessing.connection.wait(list(busy)) if busy else ():
                try:
                    done, answer = connection.recv()
                except (EOFError, OSError):
                    raise DataError(
                        "a worker process died (was memory short?); give the command again to go on, "
                        "with fewer --workers or a smaller --batch-mb"
                    ) from None
                if isinstance(answer, Exception):
                    raise answer
                ready[done] = answer
                del busy[connection]
                idle.append(connection)
            while next_out in ready:
                yield waiting.pop(next_out), ready.pop(next_out)
                next_out += 1
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
