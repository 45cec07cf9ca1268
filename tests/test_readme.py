"""README's table of settings is generated from the program: `python tests/test_readme.py` rewrites it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
sys.path.insert(0, str(README.parent))

import pytest

import train_gpt as t

PLACE = re.compile(r"(<!-- settings: .*? -->\n).*(<!-- end of settings -->)", re.S)


def table() -> str:
    """All settings as Markdown, by section."""
    types, lines = typing.get_type_hints(t.Config), []
    for section, fields in t.Config.sections():
        lines += [f"**{section.title}**", "", "| variable | type | default | meaning |", "|---|---|---|---|"]
        for field in fields:
            options = typing.get_args(types[field.name])
            kind, default = " \\| ".join(options) or types[field.name].__name__, t.format_value(field.default)
            meaning = field.metadata["meaning"].replace("|", "\\|")
            lines.append(
                f"| `{field.name.upper()}` | {kind} | {f'`{default}`' if default else ''} | {meaning} |"
            )
        lines.append("")
    return "\n".join(lines)


def test_the_table_of_settings_is_the_programs():
    found = PLACE.search(README.read_text())
    assert found and found[0] == found[1] + table() + found[2], "run python tests/test_readme.py"


def test_every_file_and_command_of_the_readme_exists():
    text = README.read_text()
    for path in re.findall(r"(?:python |\./)((?:data/|bench/|tests/|records/recipes/)?\w+\.(?:py|sh))", text):
        assert (README.parent / path).exists(), path
    known = {field.name.upper() for field in dataclasses.fields(t.Config)}
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)(?:=[^`]*)?`", text):
        assert name in known, name


@pytest.mark.parametrize(
    "script",
    [
        "bench/data.py",
        "bench/full_shape.py",
        "bench/gpu.py",
        "bench/transforms.py",
        "data/prepare.py",
        "data/download.py",
        "data/demo.py",
        "verify_bytes.py",
    ],
)
def test_every_command_starts_from_any_folder(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(README.parent / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


if __name__ == "__main__":
    README.write_text(PLACE.sub(lambda found: found[1] + table() + found[2], README.read_text()))
