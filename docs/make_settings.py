#!/usr/bin/env python3
"""Write docs/settings.md, the table of all settings, from their declarations in train_gpt.py.

./docs/make_settings.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import environment

environment.enter()
import argparse
import typing

import train_gpt

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Every setting is an environment variable: `SEED=2 ./run.sh`. What the environment says wins over the recipe,
and the recipe over the default. `.venv/bin/python train_gpt.py --help` prints this table, `--print-config`
the effective values. A misspelt or impossible setting stops the program at once with the variable, its value
and the remedy.

*Written by `./docs/make_settings.py` from the declarations in `train_gpt.py`; do not edit.*
"""


def render() -> str:
    """The whole page: name, type or options, default and meaning of every setting, by section."""
    types = typing.get_type_hints(train_gpt.Config)
    lines = [HEAD]
    for section, fields in train_gpt.Config.sections():
        lines += [f"## {section.title}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        for field in fields:
            options = typing.get_args(types[field.name])
            kind = " \\| ".join(options) or types[field.name].__name__
            default = train_gpt.format_value(field.default)
            meaning = field.metadata["meaning"].replace("|", "\\|")
            cell = f"`{default}`" if default else "(empty)"
            lines.append(f"| `{field.name.upper()}` | {kind} | {cell} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
