"""run.sh and setup.sh around a stand-in for the trainer: folder, recipe, interpreter, GPUs and ranks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

TRAINER = """
import json, os, sys
from pathlib import Path

names = ["SEED", "OUT_DIR", "RUN_ID", "DATASETS_DIR", "DATA_DIR", "VOCAB_SIZE", "STAGE", "MATRIX_LR", "A"]
defaults = {"OUT_DIR": "runs", "DATA_DIR": "./data", "VOCAB_SIZE": "8192", "RUN_ID": "new"}
settings = {name: os.environ.get(name, defaults.get(name, "")) for name in names}
if sys.argv[1:] == ["--print-config"]:
    print("\\n".join(f"{name}={value}" for name, value in settings.items()))
    sys.exit()
folder = Path(settings["OUT_DIR"], settings["RUN_ID"])
folder.mkdir(parents=True)
told = os.environ.get("RUN_FOLDER_FILE") if settings["STAGE"] != "silent" else None
if told:
    Path(told).write_text(f"started {folder.resolve()}\\n")
ranks = {name: value for name, value in os.environ.items() if name.endswith("RANK") or name == "WORLD_SIZE"}
(folder / "environment.json").write_text(json.dumps(settings | ranks))
(folder / "config.json").write_text("{}")
if settings["STAGE"] == "fail":
    sys.exit("SEED: refused")
if settings["STAGE"] != "train":
    (folder / "summary.json").write_text("{}")
other = Path(settings["OUT_DIR"], "other")  # of another process, finished at the same moment
other.mkdir(exist_ok=True)
(other / "summary.json").write_text("{}")
if told and settings["STAGE"] != "train":
    Path(told).write_text(f"scored {folder.resolve()}\\n")
"""
NOTES = """
import os, sys

told = os.environ.get("RUN_FOLDER_FILE")
with open("calls", "a") as file:
    file.write(" ".join([os.path.basename(sys.argv[0]), *sys.argv[1:], *(["told"] if told else [])]) + "\\n")
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """A repository with the real shell scripts, in a folder with a space; stand-ins for what they call."""
    folder = tmp_path / "the repository"
    (folder / "data").mkdir(parents=True)
    for name in ("run.sh", "setup.sh", "environment.py", "recipes.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "records" / "recipes", folder / "records" / "recipes")
    (folder / "train_gpt.py").write_text(TRAINER)
    for name in (
        "report.py",
        "compliance.py",
        "track.py",
        "data/demo.py",
        "data/download.py",
        "data/prepare.py",
    ):
        (folder / name).write_text(NOTES)
    return folder


def start(copy: Path, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run run.sh from `cwd` in a clean environment with this interpreter, and `variables`."""
    path = str(copy.parent / "bin") + ":/usr/bin:/bin"
    plain = {
        "PATH": path,
        "HOME": os.environ.get("HOME", "/"),
        "PYTHON": sys.executable,
        "PIP_NO_INDEX": "1",
    } | variables
    return subprocess.run(
        [str(copy / "run.sh"), *words],
        cwd=cwd or copy,
        env={name: value for name, value in plain.items() if value != "unset"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def calls(copy: Path) -> list[str]:
    """What was called apart from the trainer, with its arguments."""
    path = copy / "calls"
    return path.read_text().splitlines() if path.exists() else []


def seen(copy: Path, run: str = "new", out: str = "runs") -> dict[str, str]:
    """The settings and ranks that the trainer saw."""
    return json.loads((copy / out / run / "environment.json").read_text())


def program(copy: Path, name: str, text: str) -> None:
    """A shell script that is found before the system's programs."""
    path = copy.parent / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_report_is_of_the_folder_that_the_trainer_names(copy, tmp_path):
    (tmp_path / "disk").mkdir()
    (copy / "runs").symlink_to(tmp_path / "disk")
    done = start(copy, COMPLIANCE="1", TRACKER="wandb")
    assert done.returncode == 0, done.stderr
    named = str(tmp_path / "disk" / "new")
    assert calls(copy)[0] == "demo.py --out data/demo --vocab-size 1024"
    assert sorted(calls(copy)[1:]) == sorted(
        [f"compliance.py {named}", f"report.py {named}", "track.py told"]
    )
    assert not list((tmp_path / "disk").glob(".run.*"))


def test_what_gave_no_score_has_no_report(copy):
    assert start(copy, STAGE="train").returncode == 0 and not any("report" in line for line in calls(copy))
    done = start(copy, STAGE="fail", RUN_ID="b")
    assert done.returncode == 1 and done.stderr == "SEED: refused\n"
    done = start(copy, STAGE="silent", RUN_ID="c")
    assert done.returncode == 1 and "the run has not said which folder it wrote" in done.stderr
    assert not any("report" in line for line in calls(copy))


def test_the_recipe_is_read_by_the_one_reader_and_the_caller_wins(copy, tmp_path):
    (tmp_path / "mine.env").write_bytes(
        b"# mine\r\nexport A='x $y'\r\nRUN_ID=\"new 2\" # two\r\nSEED=5\r\nMATRIX_LR=0.1"
    )
    done = start(copy, "mine.env", cwd=tmp_path, SEED="9007199254740993", DATASETS_DIR="elsewhere")
    assert done.returncode == 0, done.stderr
    found = seen(copy, "new 2")
    assert (found["A"], found["MATRIX_LR"]) == ("x $y", "0.1")
    assert found["SEED"] == "9007199254740993"
    (tmp_path / "mine.env").write_text("SEED=5\nMATRIX_LR 0.1\n")
    done = start(copy, "mine.env", cwd=tmp_path, RUN_ID="b")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{tmp_path}/mine.env:2: 'MATRIX_LR 0.1' is not NAME=value")
    done = start(copy, "nothing.env")
    assert done.returncode == 2 and "nothing.env: cannot be read" in done.stderr
    assert not (copy / "runs" / "b").exists()


def test_an_existing_python_is_used_as_it_is(copy, tmp_path):
    assert start(copy).returncode == 0 and not (copy / ".venv").exists()
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    done = start(copy, PYTHON="../bare/bin/python", RUN_ID="b")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no torch, " in done.stderr and "bin/python -m pip install torch==" in done.stderr
    assert "hypothesis" not in done.stderr and not (copy / "runs" / "b").exists()
    for package in ("torch", "numpy", "triton"):
        (
            bare / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / package
        ).mkdir()
    done = start(copy, PYTHON="../bare/bin/python", RUN_ID="b")
    assert done.returncode == 2 and "torch" not in done.stderr and "numpy" not in done.stderr
    done = start(copy, PYTHON="nothing")
    assert done.returncode == 2 and "nothing is missing" in done.stderr


def test_an_environment_made_before_is_used(copy):
    program(copy, "python3", f'exec "{sys.executable}" "$@"')
    stamp = hashlib.sha256((copy / "requirements.txt").read_bytes() + sys.version.encode()).hexdigest()
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (copy / ".venv" / "requirements.sha256").write_text(stamp + "\n")
    done = start(copy, PYTHON="unset")
    assert done.returncode == 0, done.stderr
    assert "installing" not in done.stdout and any("report.py" in line for line in calls(copy))


def test_a_linked_environment_of_other_requirements_is_not_emptied(copy, tmp_path):
    (tmp_path / "theirs" / "bin").mkdir(parents=True)
    (copy / ".venv").symlink_to(tmp_path / "theirs")
    done = start(copy, PYTHON="unset")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "remove the link" in done.stderr
    assert (tmp_path / "theirs" / "bin").is_dir()


@pytest.mark.parametrize(
    "script",
    [
        "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
        "echo 'Failed to initialize NVML: Driver/library version mismatch'",
        "exit 127",
    ],
)
def test_a_failing_nvidia_smi_is_no_gpu(copy, script):
    program(copy, "nvidia-smi", script)
    done = start(copy)
    assert done.returncode == 0, done.stderr
    assert seen(copy)["DATASETS_DIR"] == "data/demo"


def test_gpus_that_torch_cannot_use_are_one_line(copy):
    program(
        copy,
        "nvidia-smi",
        "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'; echo '  MIG 1g.10gb Device 0:'",
    )
    done = start(copy)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "1 GPUs are listed, but torch " in done.stderr and "CUDA_VISIBLE_DEVICES=" in done.stderr
    done = start(copy, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and seen(copy)["DATASETS_DIR"] == "data/demo"


@pytest.mark.parametrize("ranks", ["0", "8", "x"])
def test_a_launchers_stale_variables_are_dropped(copy, ranks):
    done = start(copy, WORLD_SIZE=ranks, RANK="3", LOCAL_RANK="3", MASTER_ADDR="node7")
    assert done.returncode == 0 and done.stderr == (
        f"warning: WORLD_SIZE={ranks} is ignored: run.sh starts the processes of this machine itself\n"
    )
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & seen(copy).keys()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"OUT_DIR": "run.sh"}, "OUT_DIR=run.sh: cannot be written; set OUT_DIR to a writable folder"),
        ({"COMPLIANCE": "yes"}, "COMPLIANCE=yes: must be 0 or 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(copy, variables, message):
    done = start(copy, **variables)
    assert done.returncode == 2 and done.stderr == message + "\n" and not (copy / "runs").exists()


@pytest.mark.parametrize(
    "variables, name",
    [
        ({"DATA_DIR": "data"}, "sp8192"),
        ({"DATASETS_DIR": "./data/datasets/fineweb10B_sp8192_casefold_v2/"}, "casefold_v2"),
        ({"VOCAB_SIZE": "1024", "DATASETS_DIR": ""}, None),  # no published dataset has this vocabulary
    ],
)
def test_what_is_downloaded_is_what_the_settings_name(copy, tmp_path, variables, name):
    (tmp_path / "r.env").write_text("A=1\n")
    done = start(copy, str(tmp_path / "r.env"), **variables)
    assert done.returncode == 0, done.stderr
    assert [line for line in calls(copy) if line.startswith("download.py")] == (
        [f"download.py {name}"] if name else []
    )


def test_the_flagships_dataset_is_made_until_it_is_proved(copy):
    folder = "data/datasets/fineweb10B_sp8192_caseops_v3"
    made = f"prepare.py hub:docs --out {folder} --transform caseops_v3 --vocab-size 8192"
    made += " --superwords 32 --join-digits --prove"
    assert start(copy, "records/recipes/flagship.env").returncode == 0
    assert calls(copy)[0] == made
    (copy / folder).mkdir(parents=True)
    (copy / folder / "proof.json").touch()
    kinds = {
        "words": "--superwords 0",
        "superwords": "--superwords 1024",
        "unigram": "--tokenizer-model unigram",
    }
    for kind, options in kinds.items():
        settings = {"RUN_ID": kind, "DATASETS_DIR": f"{folder}_{kind}"}
        assert start(copy, "records/recipes/flagship.env", **settings).returncode == 0
        assert f"{options} --prove" in calls(copy)[-2]
    assert start(copy, "records/recipes/flagship.env", RUN_ID="last").returncode == 0
    assert sum("prepare.py" in line for line in calls(copy)) == 4


def test_a_dataset_without_a_manifest_is_pointed_out(copy, tmp_path):
    (tmp_path / "r.env").write_text("A=1\n")
    (copy / "data" / "datasets" / "fineweb10B_sp8192").mkdir(parents=True)
    done = start(copy, str(tmp_path / "r.env"))
    assert done.returncode == 0 and "has no manifest.json; if its download was cut off" in done.stderr
