"""A checkout that cannot be written and a HOME that cannot be used: the tools write where they are told.

The folder is bound read-only in a mount namespace of its own, since file modes do not stop root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, STAND_IN
from helpers.run_folders import copy_run, original

BIND = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
HOME = "/proc/none"  # nobody, root neither, can make it


def inside(copy: Path, *words: object) -> subprocess.CompletedProcess:
    """Run a tool of `copy` with the folder read-only and without a usable HOME."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "XDG"))}
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", BIND, copy, sys.executable, *map(str, words)],
        cwd=copy,
        env=variables | {"HOME": HOME, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A checkout without anything that was compiled before."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, folder / path.name)
    for name in ("data", "records", "cutlass_evt_fusion"):
        left_out = shutil.ignore_patterns("__pycache__", "demo", "datasets", "tokenizers", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    done = inside(folder, "-c", "import os; print(os.access('.', os.W_OK))")
    if done.returncode:
        pytest.skip(f"mounts are not permitted here: {done.stderr.strip()}")
    assert done.stdout == "False\n"
    return folder


def test_the_tools_work(dataset, copy, tmp_path):
    runs = [copy_run(original(dataset, "sdclip"), tmp_path / "runs" / f"s{seed}", seed) for seed in (1, 2)]
    for words in (
        ["report.py", *runs],
        ["submit.py", *runs, "--name", "A", "--track", "demo", "--out", tmp_path / "records"],
        ["sweep.py", "SEED=1", "--script", STAND_IN, "--out", tmp_path / "sweeps"],
        ["compliance.py", "--help"],
    ):
        done = inside(copy, *words)
        assert done.returncode == 0, done.stderr
    assert (runs[1] / "report.html").exists() and list((tmp_path / "records").glob("demo/*/submission.json"))


def test_what_would_be_written_into_it_is_refused_in_one_line(dataset, copy, tmp_path):
    run = copy_run(original(dataset, "sdclip"), tmp_path / "runs" / "s1", 1)
    done = inside(copy, "submit.py", run, "--name", "A", "--track", "demo")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "records/demo: cannot be written (Read-only file system); choose another --out" in done.stderr
    done = inside(copy, "sweep.py", "SEED=1", "--script", STAND_IN)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot be written (Read-only file system); choose another --out" in done.stderr
