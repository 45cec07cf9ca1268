"""Has a command run under the environment that run.sh has made; the first import of every tool.

    import environment

    environment.enter()
    import numpy as np

Standard library only, and plain enough for an old Python to read: it runs before anything is known of the
interpreter. The shell scripts ask it, too:

    python3 environment.py packages [tests]      one line and status 2 if this interpreter lacks any of them
    python3 environment.py gpus                  their number; one line and status 2 if torch cannot use them
    python3 environment.py launcher              commands that unset a launcher's variables
"""

import errno
import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TRIED = "GOLF_ENVIRONMENT"  # the process that has changed its interpreter already; os.execv keeps its number
MODULES = {"protobuf": "google.protobuf", "pytest-xdist": "xdist"}  # where it is not the package's name
# What torchrun and its like set. A tool is one process, and starts others under numbers of their own.
LAUNCHER = (
    *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
)
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


def gpus() -> list:
    """The GPUs that a process started here may use, by the names that CUDA_VISIBLE_DEVICES takes.

    A driver that fails writes its complaint where the list should be, so only its own form of line counts.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        hidden = [place for place, name in enumerate(names) if not name or name.startswith("-")]
        return names[: hidden[0]] if hidden else names  # CUDA reads as far as the first that is none
    if not shutil.which("nvidia-smi"):
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", "--list-gpus"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,  # seconds; a driver that hangs would hang the tool
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"warning: nvidia-smi: {error}; going on without a GPU", file=sys.stderr)
        return []
    lines = done.stdout.decode(errors="replace").splitlines() if done.returncode == 0 else []
    return [str(number) for number in range(sum(bool(re.match(r"GPU \d+:", line)) for line in lines))]


CGROUP_QUOTAS = (  # of a container: microseconds of processor time in a period, and that period
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def usable_cores() -> int:
    """The cores that this process may use: a container or a job often has fewer than the machine.

    The trainer has a twin of this function and of the next: it imports nothing of the repository.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in CGROUP_QUOTAS:
        try:
            words = " ".join(Path(name).read_text() for name in names).split()
            quota, period = map(int, words)
        except (OSError, ValueError):  # no such file, or no limit: "max 100000"
            continue
        if quota > 0 and period > 0:
            return max(1, min(cores, -(-quota // period)))
    return cores


# What flock says on file systems without locks: Lustre mounted without them, some NFS.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock_file(file: object) -> bool:
    """Lock an open file; False where files cannot be locked. BlockingIOError if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def forget_launcher(variables: MutableMapping) -> list:
    """Remove a launcher's numbers, such as a stale WORLD_SIZE whose ranks one would wait for; their names."""
    names = [name for name in variables if name in LAUNCHER or name.startswith("TORCHELASTIC_")]
    for name in names:
        del variables[name]
    return names


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
    forget_launcher(os.environ)
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


def complain(tests: bool) -> int:
    """Say in one line what the running interpreter lacks and how to install exactly that; the exit status."""
    lacking = missing(tests)
    if not lacking:
        return 0
    pins = " ".join(shlex.quote(required(tests)[name]) for name in lacking)
    print(
        f"PYTHON={sys.executable}: has no {', '.join(lacking)}; "
        f"{shlex.quote(sys.executable)} -m pip install {pins}",
        file=sys.stderr,
    )
    return 2


def count_gpus() -> int:
    """Print how many GPUs a run may use, and say so in one line if torch sees fewer; the exit status."""
    listed = len(gpus())
    if listed:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the line below says it
            # The count comes from the driver, which lists GPUs for which this torch may be too new.
            seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if seen < listed:
            print(
                f"{listed} GPUs are listed, but torch {torch.__version__} (CUDA {torch.version.cuda}) can "
                f"use {seen}; renew the driver, name a Python with a fitting torch in PYTHON, or run without "
                "any by CUDA_VISIBLE_DEVICES=",
                file=sys.stderr,
            )
            return 2
    print(listed)
    return 0


def unset_launcher() -> int:
    """Print shell commands that unset a launcher's variables; a warning if it has several ranks; status 0."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    names = forget_launcher(os.environ)
    if ranks != "1":
        print(
            f"warning: WORLD_SIZE={ranks} is ignored: run.sh starts the processes of this machine itself",
            file=sys.stderr,
        )
    print("".join(f"unset {name}\n" for name in names), end="")
    return 0


def main(words: list) -> int:
    """Answer the shell scripts; the exit status."""
    answers = {"gpus": count_gpus, "launcher": unset_launcher}
    if len(words) == 1 and words[0] in answers:
        return answers[words[0]]()
    if words[:1] == ["packages"] and words[1:] in ([], ["tests"]):
        return complain(tests=len(words) == 2)
    print(__doc__)
    return 0 if words in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
