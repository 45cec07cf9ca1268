"""What the documents name is there: links, commands, options, settings; and generated parts are fresh."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import levers
import train_gpt as t
from helpers import ROOT
from helpers.processes import run_python

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Variables of tools, launchers, libraries and strangers, and a published name that the trainer understands.
OTHER_VARIABLES = set(
    "COMPLIANCE TRACKER PYTHON TRITON_INTERPRET PARALLEL_RESIDUAL_START NAME WORLD_SIZE RANK LOCAL_RANK "
    "PYTORCH_ALLOC_CONF CUDA_VISIBLE_DEVICES PREQUANT_TTT MODEL_DIR DATA_DIRS COMPILER KERNEL".split()
)
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
VARIABLE = re.compile(r"\b([A-Z][A-Z0-9_]+)=")


class Command(NamedTuple):
    """A command of a document: the page, its words without variables before and redirections after."""

    page: str
    words: list[str]


@functools.cache
def text_of(name: str) -> str:
    """The whole text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


def prose_of(name: str) -> str:
    """The text of a page without its code blocks."""
    return BLOCK.sub("", text_of(name))


def spans_of(name: str) -> list[str]:
    """The pieces of code in the running text of a page; one that is wrapped is whole again."""
    return SPAN.findall(re.sub(r"\n(?!\n)", " ", prose_of(name)))


def shell_lines(name: str) -> list[str]:
    """The lines of the shell blocks of a page."""
    return [
        line for _, kind, body in BLOCK.findall(text_of(name)) if kind == "bash" for line in body.splitlines()
    ]


@functools.cache
def commands() -> list[Command]:
    """Every command of the documents: lines of shell blocks, and code in the text that starts a file."""
    found = []
    for name in NAMES:
        if name == "docs/settings.md":  # values of settings, some of which are paths
            continue
        lines = shell_lines(name)
        lines += [span for span in spans_of(name) if re.match(r"(\w+=\S+ )*(\./|\.venv/)\S", span)]
        for line in lines:
            words = shlex.split(line.replace("…", ""), comments=True)
            while words and VARIABLE.match(words[0]):
                words = words[1:]
            if words:
                found.append(Command(name, words))
    return found


def script_of(command: Command) -> str | None:
    """The file of this repository that a command starts; None for a command about no single file."""
    first, *rest = command.words
    if first.startswith("./"):
        return first[2:]
    if first in (".venv/bin/python", ".venv/bin/torchrun"):
        return next((word for word in rest if word.endswith(".py")), None)
    return None


WITHOUT_HELP = {
    "cutlass_evt_fusion/build.py"
}  # no arguments; its first word is about the wheel that it needs
SCRIPTS = sorted({script for command in commands() if (script := script_of(command))})


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", BLOCK.sub("", text), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def module_of(path: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_every_link_resolves(name):
    prose = prose_of(name)
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), f"{name}: {link}"


@pytest.mark.parametrize(
    "heading, anchor",
    [("## Beside #1855's own code", "beside-1855s-own-code"), ("# [On](x.md) a `GPU`_2", "on-a-gpu_2")],
)
def test_anchors_are_githubs(heading, anchor):
    assert anchors_of(heading) == {anchor} and anchors_of(f"```\n{heading}\n```") == set()


def test_the_readme_is_short_and_leads_to_every_page():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 200
    for name in NAMES[1:]:
        assert f"]({name})" in text, name


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_is_named_exists(name):
    known = {field.name.upper() for field in dataclasses.fields(t.Config)} | OTHER_VARIABLES
    if name == "docs/levers.md":  # it has what each lever gave, also those whose settings are gone
        known |= {setting for lever in levers.read_levers(levers.GONE) for setting in lever.settings}
    spans = spans_of(name)
    named = {variable for code in [*spans, *shell_lines(name)] for variable in VARIABLE.findall(code)}
    named |= {span for span in spans if re.fullmatch(r"[A-Z0-9]+(_[A-Z0-9]+)+", span)}
    assert named <= known


def test_every_command_is_about_files_that_are_there():
    for command in commands():
        first, *rest = command.words
        script, shown = script_of(command), f"{command.page}: {' '.join(command.words)}"
        if script:
            assert (ROOT / script).is_file(), shown
            assert not first.startswith("./") or os.access(ROOT / script, os.X_OK), f"{shown}: not executable"
        elif first == ".venv/bin/python":
            assert rest[:2] == ["-m", "pytest"] and (ROOT / rest[2]).exists(), shown
        else:
            assert first in (".venv/bin/pip", ".venv/bin/ruff"), f"{shown}: under which Python?"
        for word in rest:
            if word.startswith(("records/recipes/", "tests/", "requirements")) and "NAME" not in word:
                assert (ROOT / word).exists(), shown


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if script.endswith(".py") and script not in WITHOUT_HELP]
)
def test_every_command_starts_from_any_folder_and_has_the_options_named(script, tmp_path):
    done = run_python([ROOT / script, "--help"], folder=tmp_path)
    assert done.returncode == 0 and Path(script).name in done.stdout, done.stderr
    for command in commands():
        if script_of(command) == script:
            after = command.words[[word.removeprefix("./") for word in command.words].index(script) + 1 :]
            for option in {word for word in after if word.startswith("--")} - {"--help"}:
                assert option in done.stdout, f"{command.page}: {' '.join(command.words)}"


def test_the_documents_name_every_tool():
    tools = {path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert tools - {"environment.py"} <= set(SCRIPTS)


def test_the_page_of_settings_is_the_programs():
    made = module_of("docs/make_settings.py").render()
    assert text_of("docs/settings.md") == made, "run ./docs/make_settings.py"


def test_the_pictures_are_those_of_their_data():
    facts = json.loads(text_of("docs/packing_curve.json"))
    drawn = module_of("docs/make_pictures.py").draw_curve(facts)
    assert text_of("docs/packing_curve.svg") == drawn, "run ./docs/make_pictures.py"
    drawn = module_of("docs/make_pictures.py").draw_session(text_of("docs/codec_session.txt"))
    assert text_of("docs/codec_session.svg") == drawn, "run ./docs/make_pictures.py"
    assert (ROOT / "docs/report.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs/report.png").stat().st_size < 300_000
