"""The documentation's commands, pasted into a fresh shell: system's Python, clean environment, any folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import environment
from helpers import ROOT, STAND_IN
from helpers.processes import run_python
from helpers.run_folders import copy_run, original

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh|console)?\n(.*?)^```", re.S | re.M)
SPAN = re.compile(r"`(?:[A-Z_]+=\S+ )*(\./\S+\.(?:py|sh)\b[^`\n]*)`")
SCRIPT = re.compile(r"(?:\./)?((?:[\w-]+/)*[\w-]+\.(?:py|sh))")
TRAINER = ROOT / "train_gpt.py"  # says itself in one line that torch is missing; torchrun and python start it


def commands() -> list[tuple[str, str]]:
    """(page, command) of every shell command in code blocks, and in the text if it begins with ./"""
    found = []
    for page in filter(Path.exists, PAGES):
        text = page.read_text()
        lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *SPAN.findall(text)]:
            line = line.strip().removeprefix("$ ")
            if re.match(r"(?:[A-Z_]+=\S* )*(?:\./|python3? |torchrun |(?:\w+/)+\w+\.(?:py|sh))", line):
                found.append((page.name, line))
    return found


def words_of(line: str) -> list[str]:
    """The words of a command without the settings before it and the comment behind it."""
    words = shlex.split(line.replace("…", " "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def script_of(words: list[str]) -> Path | None:
    """The script of the repository that a command starts; None for python -m and its like."""
    for word in words:
        if found := SCRIPT.fullmatch(word):
            return ROOT / found[1]
        if word == "-m":
            return None
    return None


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> dict[str, str]:
    """The environment of a fresh shell, in whose PATH a Python without our packages comes first."""
    folder = tmp_path_factory.mktemp("bin")
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    for name in ("python", "python3"):
        (folder / name).symlink_to(base)
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
    bare = "import environment, sys; sys.exit(not environment.missing())"
    if subprocess.run([base, "-c", bare], cwd=ROOT, env=variables, check=False).returncode:
        pytest.skip(f"{base} has all packages: there is nothing to find")
    if not (ROOT / ".venv" / "bin" / "python").exists():
        variables["PYTHON"] = sys.executable
    return variables


def paste(words: list[str], shell: dict[str, str], cwd: Path, **more: str) -> subprocess.CompletedProcess:
    """Run a command in a fresh shell."""
    return subprocess.run(
        words, cwd=cwd, env=shell | more, capture_output=True, text=True, check=False, timeout=240
    )


def tools() -> list[Path]:
    """Every command that begins with environment.enter()."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("bench/*.py")]
    return sorted(path for path in paths if "\nenvironment.enter()\n" in path.read_text())


@cache
def help_of(script: Path) -> subprocess.CompletedProcess:
    """`script --help` from a folder that is not the repository, under this Python; once for all tests."""
    return run_python([script, "--help"], folder=Path("/"))


def test_the_pages_have_commands_and_the_tools_are_known():
    assert len(commands()) > 10
    names = {path.name for path in tools()}
    assert {"submit.py", "sweep.py", "report.py", "track.py", "compliance.py", "recipes.py"} <= names | {
        "recipes.py"
    }
    for path in tools():
        assert path.read_text().startswith("#!/usr/bin/env python3\n") and os.access(path, os.X_OK), path
        head = path.read_text().split("\nenvironment.enter()\n")[0]
        assert not re.search(r"^(?:import|from) (?:numpy|torch|numba|train_gpt|results|data)", head, re.M), (
            path
        )


@pytest.mark.parametrize("tool", tools(), ids=lambda path: path.name)
def test_every_tool_starts_from_any_folder(tool):
    done = help_of(tool)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


# Runs each tool of sys.argv as far as it changes the interpreter.
HEADS = """
import sys
folder, *tools = sys.argv[1:]
sys.path.insert(0, folder)
import environment
class Entered(Exception):
    pass
def enter():
    raise Entered
environment.enter = enter
for tool in tools:
    space = {"__name__": "__main__", "__file__": tool}
    try:
        exec(compile(open(tool, encoding="utf-8").read(), tool, "exec"), space)
    except Entered:
        print(tool)
"""


def test_every_tool_reaches_the_change_of_interpreter_without_our_packages(shell, tmp_path):
    words = ["python3", "-c", HEADS, str(ROOT), *map(str, tools())]
    done = paste(words, shell, tmp_path)
    assert done.stdout.splitlines() == [str(tool) for tool in tools()], done.stderr


def test_a_tool_changes_the_interpreter_behind_the_name_of_one_or_alone(shell, tmp_path):
    tool = str(ROOT / "report.py")
    for words in ([tool], ["python3", tool]):
        assert paste([*words, "--help"], shell, tmp_path).stdout == help_of(Path(tool)).stdout


@pytest.mark.parametrize("page, line", commands(), ids=lambda text: text[:60])
def test_every_command_exists_with_its_options(page, line):
    words = words_of(line)
    script = script_of(words)
    if script is None:
        assert "-m" in words or words[0] in ("pip", "git", "docker"), f"{page}: {line}"
        return
    assert script.is_file(), f"{page}: {line}: no such file"
    if words[0].startswith("./"):
        assert os.access(script, os.X_OK), f"{page}: {line}: has no run bit"
    if script == TRAINER or script.suffix == ".sh" or script not in tools():
        return
    done = help_of(script)
    assert done.returncode == 0, done.stderr
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in done.stdout, f"{page}: {line}: no such option {option}"


def test_the_tools_work_on_finished_runs_from_another_folder(dataset, shell, tmp_path):
    runs = [copy_run(original(dataset, "sdclip"), tmp_path / "runs" / f"s{seed}", seed) for seed in (1, 2)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    submission = [
        "--name",
        "Mine",
        "--track",
        "demo",
        "--out",
        "records",
        "--author",
        "me",
        "--date",
        "2026-01-02",
    ]
    sweep = ["SEED=1,2", "--script", str(STAND_IN), "--out", "sweeps", "--name", "s"]
    for words in (
        [str(ROOT / "report.py"), "../runs/s1"],
        [str(ROOT / "submit.py"), "../runs/s1", "../runs/s2", *submission],
        [str(ROOT / "sweep.py"), *sweep],
    ):
        done = paste(words, shell, elsewhere)
        assert done.returncode == 0, done.stderr
    assert (runs[0] / "report.html").exists()
    assert (elsewhere / "records" / "demo" / "2026-01-02_Mine" / "submission.json").exists()
    assert len(list((elsewhere / "sweeps" / "s").glob("*/summary.json"))) == 2
    done = paste([str(ROOT / "track.py"), "../runs/s1"], shell, elsewhere, TRACKER="wandb")
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "pip install wandb" in done.stderr


def test_without_the_environment_one_line_says_what_to_do(shell, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("environment.py", "report.py", "requirements.txt"):
        shutil.copy(ROOT / name, copy / name)
    variables = {name: value for name, value in shell.items() if name != "PYTHON"}
    done = paste([str(copy / "report.py"), "x"], variables, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert (
        "report.py: cannot run under " in done.stderr
        and f"{copy / 'run.sh'} makes the environment" in done.stderr
    )
    done = paste(
        [str(copy / "report.py"), "x"], variables, tmp_path, PYTHON="python3"
    )  # lacks them, too: no loop
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "python").write_text("not a program")
    (copy / ".venv" / "bin" / "python").chmod(0o755)
    done = paste([str(copy / "report.py"), "x"], variables, tmp_path)
    assert done.returncode == 2 and "cannot be started" in done.stderr and done.stderr.count("\n") == 1


def test_arguments_options_of_python_and_the_exit_status_survive_the_change(shell, tmp_path):
    copy = tmp_path / "a copy"
    copy.mkdir()
    for name in ("environment.py", "requirements.txt"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "tool.py").write_text(
        "import environment\n\nenvironment.enter()\nimport json, os, sys\n"
        "ours = [os.environ.get('WORLD_SIZE'), environment.TRIED in os.environ]\n"
        "print(json.dumps([sys.argv[1:], sys.flags.optimize, *ours]))\n"
        "import numpy\nsys.exit(7)\n"
    )
    python = shell.get("PYTHON", str(ROOT / ".venv" / "bin" / "python"))
    words = ["python3", "-OO", str(copy / "tool.py"), "a b", "--x=é", ""]
    done = paste(words, shell, tmp_path, PYTHON=python, WORLD_SIZE="8")
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout) == [["a b", "--x=é", ""], 2, None, False]


def test_the_packages_by_name_are_those_that_are_imported():
    """Every pin of requirements.txt is found under its module's name where it is installed."""
    assert environment.missing(tests=True) == []
    assert {"torch", "numpy", "protobuf", "python-minifier"} <= environment.required().keys()
    assert not environment.required().keys() & set(environment.FOR_TESTS)


@pytest.mark.parametrize(
    "chosen, names",
    [
        ("", []),
        ("-1", []),
        ("0,1", ["0", "1"]),
        (" 3 ", ["3"]),
        ("1,-1,2", ["1"]),
        ("GPU-ab,GPU-cd", ["GPU-ab", "GPU-cd"]),
    ],
)
def test_gpus_that_are_hidden_are_not_used(monkeypatch, chosen, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert environment.gpus() == names
