"""Damaged copies of files for the tests of their readers: bytes, lines and JSON values changed at random."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

ODD = (
    None,
    True,
    -1,
    0,
    2**53 + 1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\u2028",
    [],
    {},
    [[1]],
)
LINES = (b"null", b"[]", b"3", b"{}", b'{"kind": 3}', b'{"kind": "resume"}', b"\xff\xfe", b"", b"[" * 20000)
PIECES = (
    b"\r",
    b"\x00",
    b"=",
    b"'",
    b'"',
    b"$",
    b"\\",
    b"#",
    b" ",
    b"\n",
    b"export ",
    b"\xc3\xa9",
    b"\xe2",
    b"9" * 30,
)


def mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` copies of `data` with one to three pieces cut out, doubled, exchanged or put in."""
    source = random.Random(seed)
    for _ in range(count):
        changed = data
        for _ in range(source.randint(1, 3)):
            begin = source.randrange(len(changed) + 1)
            end = min(len(changed), begin + source.choice((0, 1, 1, 2, 8, 100)))
            lines = changed.split(b"\n")
            place = source.randrange(len(lines))
            changed = source.choice(
                (
                    changed[:begin] + changed[end:],
                    changed[:begin],
                    changed[:begin] + changed[begin:end] * 2 + changed[end:],
                    changed[:begin] + source.choice(PIECES) + changed[end:],
                    changed[:begin] + bytes([source.randrange(256)]) + changed[end:],
                    b"\n".join([*lines[:place], source.choice(LINES), *lines[place:]]),
                )
            )
        yield changed


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def json_mutants(text: str, count: int, seed: int) -> Iterator[str]:
    """`count` copies of a JSON object with a value replaced by an odd one, left out or under another name."""
    source = random.Random(seed)
    for _ in range(count):
        content = json.loads(text)
        container, key = source.choice(list(places(content)))
        choice = source.random()
        if choice < 0.75:
            container[key] = source.choice(ODD)
        elif choice < 0.9 or isinstance(container, list):
            del container[key]
        else:
            container[f"{key}x"] = container.pop(key)
        yield json.dumps(content)
