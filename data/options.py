"""Command lines whose errors are one line, and numbers that are what was meant."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse with an error of one line, that names the command, the option, its value and --help."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with 2."""
        name = self.prog.removesuffix(".py")
        print(f"{name}: {message}; {self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)


def number_option(
    kind: type[int] | type[float], least: float, most: float = math.inf
) -> Callable[[str], int | float]:
    """A reader of option values that are `kind`, finite, at least `least` and at most `most`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        if not math.isfinite(value) or not least <= value <= most:
            limit = "" if most == math.inf else f" and at most {most:,}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {least:,}{limit}")
        return value

    return parse
