"""What one process of a run of pytest makes and all of them read: folders, the trainer's short form."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import train_gpt as t

VARIABLE = "TESTS_SHARED_FOLDER"  # of the environment, which workers, their forks and children inherit


def share_in(folder: Path) -> None:
    """Make `folder` the place of what the processes of this run of pytest share."""
    folder.mkdir(exist_ok=True)
    os.environ[VARIABLE] = str(folder)
    share_short_form()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep the other processes from `path`."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, which the first process that asks for it lets `make` fill; not to be changed."""
    folder = Path(os.environ[VARIABLE]) / name
    done = folder.with_name(f"{name}.done")
    with locked(folder):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def share_short_form() -> None:
    """Let one process make the short form of the trainer, which takes 4 s; any other text is made anew."""
    source = Path(t.__file__).read_text()
    path = Path(os.environ[VARIABLE]) / "short_form.json"
    make = t.minify

    @functools.wraps(make)
    def minify(text: str) -> tuple[str, str]:
        if text != source:
            return make(text)
        with locked(path):
            if not path.exists():
                path.write_text(json.dumps(make(text)))
        short, how = json.loads(path.read_text())
        return short, how

    t.minify = minify
