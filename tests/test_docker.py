"""The Dockerfile: pinned, installs the pinned requirements, starts run.sh as it expects; not built here."""

from __future__ import annotations

import re

import environment
from helpers import ROOT


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in lines]


def test_every_version_is_pinned_and_comes_from_the_requirements():
    found = instructions()
    (image,) = (rest for name, rest in found if name == "FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.(\d+)-slim-\w+", image)
    assert version and (int(version[1]), int(version[2])) >= (3, 10), image
    installs = re.findall(r"pip install ([^&|;]*)", " ".join(rest for name, rest in found if name == "RUN"))
    for words in installs:
        options = words.split()
        files = [options[place + 1] for place, option in enumerate(options) if option == "-r"]
        packages = [word for word in options if not word.startswith("-") and word not in files]
        assert files and not packages, f"a package beside the requirements: {packages}"
    assert {"requirements.txt", "requirements-gpu.txt"} == set(re.findall(r"-r (\S+)", " ".join(installs)))


def test_the_requirements_are_pinned_and_agree():
    pins: dict[str, set[str]] = {}
    for name in ("requirements.txt", "requirements-gpu.txt"):
        for line in (ROOT / name).read_text().splitlines():
            requirement, _, marker = line.partition("#")[0].partition(";")
            if requirement.strip():
                found = re.fullmatch(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9_.+]+)", requirement.strip())
                assert found, f"{name}: {line}: not pinned"
                if environment.applies(marker):
                    pins.setdefault(found[1].lower(), set()).add(found[2])
    assert all(len(versions) == 1 for versions in pins.values()), pins


def test_what_is_copied_and_started_exists_and_the_interpreter_is_the_images():
    for name, rest in instructions():
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    text = " ".join(rest for _, rest in instructions())
    assert "PYTHON=/usr/local/bin/python" in text and '["./run.sh"]' in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "data/datasets"} <= set(ignored)
