"""Has a command run under the environment that run.sh has made; the first import of every tool.

    import environment

    environment.enter()
    import numpy as np

Standard library only, and plain enough for an old Python to read: it runs before anything is known of the
interpreter. `python environment.py` says what run.sh asks of an interpreter that it did not make.
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TRIED = "GOLF_ENVIRONMENT"  # the process that has changed its interpreter already; os.execv keeps its number
MODULES = {"protobuf": "google.protobuf", "pytest-xdist": "xdist"}  # where it is not the package's name
FOR_TESTS = ("pytest", "pytest-xdist", "hypothesis", "ruff")  # no tool needs them


def applies(marker: str) -> bool:
    """Whether the condition behind a requirement's semicolon holds here; one of another form holds."""
    found = re.match(r'\s*(python_version|sys_platform)\s*(==|>=|<)\s*"([^"]+)"', marker)
    if found is None:
        return True
    name, relation, value = found.groups()
    if name == "sys_platform":
        return sys.platform == value
    there, here = tuple(int(part) for part in value.split(".")), sys.version_info[:2]
    return {"==": here == there, ">=": here >= there, "<": here < there}[relation]


def required(tests: bool = False) -> dict:
    """The packages of requirements.txt that this interpreter needs, each with its version in pip's form."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        pin, _, marker = line.partition("#")[0].partition(";")
        name = pin.partition("==")[0].strip()
        if name and applies(marker) and (tests or name not in FOR_TESTS):
            found[name] = pin.strip()
    return found


def missing(tests: bool = False) -> list:
    """The required packages that the running interpreter has not, in the file's order."""

    def is_there(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ImportError:  # the package around a module
            return False

    return [name for name in required(tests) if not is_there(MODULES.get(name, name.replace("-", "_")))]


def is_ours(script: str) -> bool:
    """Whether a file is a command of this repository (and not, say, pytest)."""
    path = Path(script).resolve()
    return ROOT in path.parents and ROOT / ".venv" not in path.parents


def enter() -> None:
    """Go on under run.sh's Python if the running one lacks packages; stop with one line if that cannot be.

    That Python is the one that PYTHON names, else that of .venv. Does nothing if the program is not one of
    this repository's: a library does not choose the interpreter.
    """
    tried = os.environ.pop(TRIED, "") == str(os.getpid())
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or not is_ours(script):
        return
    lacking = missing()
    if not lacking:
        return
    problem = f"it has no {', '.join(lacking)}"
    python = shutil.which(os.environ.get("PYTHON") or str(ROOT / ".venv" / "bin" / "python"))
    if python and not tried:
        words = list(getattr(sys, "orig_argv", [sys.executable, *sys.argv]))[1:]
        os.environ[TRIED] = str(os.getpid())
        try:
            os.execv(python, [python, *words])
        except OSError as error:
            problem = f"{problem}, and {python} cannot be started ({error.strerror})"
    print(
        f"{Path(script).name}: cannot run under {sys.executable}: {problem}; {ROOT / 'run.sh'} makes the "
        "environment .venv, or set PYTHON to a Python that has them",
        file=sys.stderr,
    )
    sys.exit(2)


def check(tests: bool) -> int:
    """Say in one line what the running interpreter lacks and how to install exactly that; the exit status."""
    lacking = missing(tests)
    if not lacking:
        return 0
    pins = " ".join(shlex.quote(required(tests)[name]) for name in lacking)
    print(
        f"PYTHON={sys.executable}: has no {', '.join(lacking)}; "
        f"{shlex.quote(sys.executable)} -m pip install {pins}"
    )
    return 2


if __name__ == "__main__":
    sys.exit(check(tests="--tests" in sys.argv[1:]))
