#!/usr/bin/env python3
"""Draw the pictures of the README.

    ./docs/make_pictures.py                        docs/packing_curve.svg from docs/packing_curve.json,
                                                   docs/codec_session.svg from docs/codec_session.txt
    ./docs/make_pictures.py --report runs/NAME     docs/report.png as well: the top of the run's report.html

The second needs Chromium (Debian: apt install chromium); pngquant, if it is there, makes the file smaller.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 20, 56, 52
COLOURS = {"ours": "#2a78d6", "SDClip, tuned": "#d9591f", "SDClip, published constants": "#b07900"}
NAMES = {
    "ours": "ours, as shipped",
    "SDClip, tuned": "public packer (SDClip), tuned on this model",
    "SDClip, published constants": "public packer, published constants",
}
INK, SOFT, LINE, PAPER = "#1b1b1a", "#65645f", "#dfded9", "#fdfdfc"
SCREEN, TYPED, SHOWN = "#1e2227", "#ffffff", "#b9c0c8"  # of a terminal
GLYPH, ROW = 7.25, 18  # pixels of a character at 12 pixels
REPORT_SIZE = (1240, 2090)  # pixels: the page down to the map of the artifact's bytes


class Axes(NamedTuple):
    """Where values lie in the picture: bytes from left to right, the divergence upwards by its logarithm."""

    low_bytes: float
    high_bytes: float
    low_kl: float
    high_kl: float

    def x(self, size: float) -> float:
        """The place of a file of `size` bytes."""
        share = (size - self.low_bytes) / (self.high_bytes - self.low_bytes)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, kl: float) -> float:
        """The place of a divergence of `kl` nats per token."""
        share = math.log(kl / self.low_kl) / math.log(self.high_kl / self.low_kl)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = SOFT, size: int = 13) -> str:
    """One line of text; `anchor` says which of its ends lies at x."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">'
        f"{html.escape(words)}</text>"
    )


def grid(axes: Axes) -> list[str]:
    """The lines and numbers of both axes."""
    parts = []
    decades = range(math.floor(math.log10(axes.low_kl)), math.ceil(math.log10(axes.high_kl)) + 1)
    for kl in [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]:
        if axes.low_kl <= kl <= axes.high_kl:
            y = axes.y(kl)
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{LINE}"/>'
            )
            parts.append(text(LEFT - 8, y + 4, f"{kl:g}", "end"))
    step = 50_000
    for size in range(math.ceil(axes.low_bytes / step) * step, int(axes.high_bytes) + 1, step):
        parts.append(text(axes.x(size), HEIGHT - BOTTOM + 20, f"{size // 1000} kB", "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "size of the artifact", "middle"))
    parts.append(
        text(10, 22, "KL of the unquantised model to the packed one, nats per token", "start", INK, 14)
    )
    return parts


def curve(axes: Axes, name: str, points: Sequence[dict]) -> list[str]:
    """One packer: a line, a dot for every file, and the figures under the pointer."""
    colour = COLOURS[name]
    path = " ".join(f"{axes.x(p['bytes']):.1f},{axes.y(p['kl']):.1f}" for p in points)
    parts = [f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>']
    for point in points:
        label = (
            f"{NAMES[name]}: {point['bytes']:,} bytes, {point['bits']:.2f} bit a weight, KL {point['kl']:.5f}"
        )
        parts.append(
            f'<circle cx="{axes.x(point["bytes"]):.1f}" cy="{axes.y(point["kl"]):.1f}" r="4" fill="{colour}">'
            f"<title>{html.escape(label)}</title></circle>"
        )
    return parts


def draw_curve(facts: dict) -> str:
    """The packers' curves as one SVG."""
    points = [point for curve_points in facts["curves"].values() for point in curve_points]
    sizes, divergences = [p["bytes"] for p in points], [p["kl"] for p in points]
    axes = Axes(min(sizes) * 0.985, max(sizes) * 1.01, min(divergences) * 0.8, max(divergences) * 1.15)
    parts = grid(axes)
    for place, name in enumerate(facts["curves"]):
        parts += curve(axes, name, facts["curves"][name])
        y = TOP + 14 + 20 * place
        parts.append(f'<circle cx="{WIDTH - RIGHT - 300}" cy="{y - 4}" r="4" fill="{COLOURS[name]}"/>')
        parts.append(text(WIDTH - RIGHT - 288, y, NAMES[name], "start", INK))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui,DejaVu Sans,sans-serif">'
    )
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>'
    return "\n".join([head, paper, *parts, "</svg>\n"])


def draw_session(session: str) -> str:
    """A recorded terminal session as one SVG; lines that were typed begin with `$ `."""
    lines = session.rstrip("\n").split("\n")
    width = math.ceil(GLYPH * max(map(len, lines))) + 32
    height = ROW * len(lines) + 28
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="ui-monospace,DejaVu Sans Mono,monospace">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{SCREEN}"/>',
    ]
    for number, line in enumerate(lines):
        colour = TYPED if line.startswith("$ ") else SHOWN
        kept = line.replace(" ", "\u00a0")  # else a browser draws one for several
        parts.append(text(16, 26 + ROW * number, kept, "start", colour, 12))
    return "\n".join([*parts, "</svg>\n"])


def photograph(page: Path, picture: Path) -> None:
    """The top of an HTML page as a PNG; SystemExit if there is no Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("--report needs Chromium; install it (Debian: apt install chromium)")
    width, height = REPORT_SIZE
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    light = "--blink-settings=preferredColorScheme=1"
    subprocess.run(
        [
            browser,
            *options,
            light,
            f"--window-size={width},{height}",
            f"--screenshot={picture}",
            page.resolve().as_uri(),
        ],
        check=True,
        capture_output=True,
    )
    if shutil.which("pngquant"):
        subprocess.run(["pngquant", "--force", "--output", picture, "64", picture], check=True)


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, metavar="RUN", help="a run folder with report.html")
    options = parser.parse_args()
    facts = json.loads((FOLDER / "packing_curve.json").read_text(encoding="utf-8"))
    (FOLDER / "packing_curve.svg").write_text(draw_curve(facts), encoding="utf-8")
    print(FOLDER / "packing_curve.svg")
    session = (FOLDER / "codec_session.txt").read_text(encoding="utf-8")
    (FOLDER / "codec_session.svg").write_text(draw_session(session), encoding="utf-8")
    print(FOLDER / "codec_session.svg")
    if options.report:
        page = options.report / "report.html"
        if not page.exists():
            parser.error(f"{page}: no such page; ./report.py {options.report} writes it")
        photograph(page, FOLDER / "report.png")
        print(FOLDER / "report.png")


if __name__ == "__main__":
    main()
