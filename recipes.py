#!/usr/bin/env python3
"""The one reader of recipe files (records/recipes/*.env); the shell and Python use the same.

    ./recipes.py FILE      shell commands that export the settings which the environment does not have

A line is NAME=value, a comment or empty; `export` before the name and one pair of quotes around the value are
allowed, so is a comment behind it, and a carriage return ends a line as well. What a shell would replace
(a dollar, a backslash, a tilde, ...) must stand in single quotes. So a recipe means the same here and in
`set -a; . FILE`, and every other line stops with file and line. Standard library only.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FREE = r"""[^\s'"$`\\;&|<>()*?~]"""  # what a shell takes as it is
LINE = re.compile(
    rf"""[ \t]*(?:export[ \t]+)?(?P<name>[A-Z][A-Z0-9_]*)=
    (?: '(?P<literal>[^']*)' | "(?P<quoted>[^"$`\\]*)" | (?P<bare>(?!\#){FREE}*) )
    (?: [ \t]+\#.* | [ \t]* )""",
    re.VERBOSE,
)
SHOWN = 60  # characters of a wrong line in its message


class RecipeError(ValueError):
    """A recipe that cannot be read; its text is one line with the file, the line and the remedy."""


def parse(text: str, source: str) -> dict[str, str]:
    """The settings of a recipe's text, by name; RecipeError names `source` and the line that is none."""
    settings: dict[str, str] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        bare = line.strip(" \t")
        if "\r" not in line and (not bare or bare.startswith("#")):
            continue
        plain = all(character.isprintable() or character == "\t" for character in line)
        found = LINE.fullmatch(line) if plain else None
        if found is None:
            shown = ascii(line if len(line) <= SHOWN else line[:SHOWN] + "...")
            raise RecipeError(
                f"{source}:{number}: {shown} is not NAME=value; write the name in capitals, no space around "
                "=, and a value with spaces, quotes or $ in single quotes"
            )
        name = found["name"]
        if name in places:
            raise RecipeError(f"{source}:{number}: {name} is set in line {places[name]} already; drop one")
        places[name] = number
        settings[name] = found["literal"] or found["quoted"] or found["bare"] or ""
    return settings


def read(path: Path) -> dict[str, str]:
    """The settings of a recipe file, by name; RecipeError if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        known = " ".join(str(found) for found in sorted((ROOT / "records" / "recipes").glob("*.env")))
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); there are: {known}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text; save it as UTF-8") from None
    return parse(text, str(path))


def exports(settings: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """Shell commands that export the settings which `environment` does not have."""
    return "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in settings.items() if name not in environment
    )


def main(arguments: list[str]) -> None:
    """Print the exports of the recipe given."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(f"usage: recipes.py FILE\n\n{__doc__}")
        raise SystemExit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    try:
        settings = read(Path(arguments[0]))
    except RecipeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    try:
        sys.stdout.write(exports(settings, os.environ))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"standard output: {error.strerror}; the settings were not passed on", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
