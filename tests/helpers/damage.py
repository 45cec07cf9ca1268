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
    1,
    1.5,
    2**32,
    2**53 + 1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\u2028",
    [],
    [None],
    [[1]],
    {},
    {"a": 1},
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


def change_bytes(content: bytes, source: random.Random) -> bytes:
    """One random change, near the start more often: a bit flipped, bytes replaced, removed, added or
    exchanged with those of another place, or the end cut off."""
    result = bytearray(content)
    place = source.randrange(min(len(result), source.choice((12, 64, 1024, len(result)))))
    size = source.randrange(1, 9)
    kind = source.randrange(6)
    if kind == 0:
        result[place] ^= 1 << source.randrange(8)
    elif kind == 1:
        result[place : place + size] = source.randbytes(source.randrange(1, 9))
    elif kind == 2:
        del result[place : place + size]
    elif kind == 3:
        result[place:place] = source.randbytes(size)
    elif kind == 4:
        other = source.randrange(len(result))
        first, second = sorted((place, other))
        size = min(size, second - first, len(result) - second)
        head, tail = result[first : first + size], result[second : second + size]
        result[first : first + size], result[second : second + size] = tail, head
    else:
        del result[-source.randrange(1, len(result)) :]
    return bytes(result)


def change_text(content: bytes, source: random.Random) -> bytes:
    """One to three pieces cut out, doubled, exchanged or put in; lines are added too."""
    for _ in range(source.randint(1, 3)):
        begin = source.randrange(len(content) + 1)
        end = min(len(content), begin + source.choice((0, 1, 1, 2, 8, 100)))
        lines = content.split(b"\n")
        place = source.randrange(len(lines))
        content = source.choice(
            (
                content[:begin] + content[end:],
                content[:begin],
                content[:begin] + content[begin:end] * 2 + content[end:],
                content[:begin] + source.choice(PIECES) + content[end:],
                content[:begin] + bytes([source.randrange(256)]) + content[end:],
                b"\n".join([*lines[:place], source.choice(LINES), *lines[place:]]),
            )
        )
    return content


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change_json(content: bytes, source: random.Random) -> bytes:
    """A JSON object with one value, at any depth, replaced by an odd one, counted on, left out, or under
    another name."""
    root = json.loads(content)
    container, key = source.choice(list(places(root)))
    choice = source.random()
    if choice < 0.2 and type(container[key]) is int:
        container[key] += source.choice((-1, 1, 2**32))
    elif choice < 0.7:
        container[key] = source.choice(ODD)
    elif choice < 0.85 or isinstance(container, list):
        del container[key]
    else:
        container[source.choice((f"{key}x", "", "size", "files"))] = container.pop(key)
    return json.dumps(root).encode()


def mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` copies of a text, each changed by change_text."""
    source = random.Random(seed)
    for _ in range(count):
        yield change_text(data, source)


def json_mutants(text: str, count: int, seed: int) -> Iterator[str]:
    """`count` copies of a JSON object, each changed by change_json."""
    source = random.Random(seed)
    for _ in range(count):
        yield change_json(text.encode(), source).decode()
