"""Text transforms that take capitals out of the vocabulary: CaseOps v1 and v3 (lossless), casefold (lossy).

CaseOps writes every ASCII letter in lower case and says in private-use operators which ones were capitals:

    TITLE    the first letter of the word is a capital
    ALLCAPS  all letters of the word, two or more, are capitals
    CAPNEXT  the next letter of the word is a capital
    ESC      the next character is an operator that stands in the text itself
    LOWER    (v3) the first letter of the word is not the capital that was expected

A word is a maximal run of ASCII letters; everything else is copied. v1 writes TITLE and ALLCAPS right before
the word. v3 writes them and LOWER before the whitespace that leads the word, so that the word keeps its
leading-space piece in the tokenizer. v3 also expects a capital at a sentence start, and leaves TITLE out
there: at the start of the text, and after . ! ? with an optional closing quote or bracket and some
whitespace.

SentencePiece makes one space of every run of whitespace and none of that at the ends of a text. v3 holds
through that: no rule depends on the length or the kind of a run, whitespace is all that the normaliser makes
a space of, and at the start of the text the operator follows the whitespace. So the code of the normalised
text is the normalised code, and the tokens decode to the normalised text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

TITLE, ALLCAPS, CAPNEXT, ESC, LOWER = "\ue001", "\ue002", "\ue003", "\ue004", "\ue005"
# By version, in the order in which a tokenizer reserves them.
OPERATORS = {1: (TITLE, ALLCAPS, CAPNEXT, ESC), 3: (TITLE, ALLCAPS, CAPNEXT, ESC, LOWER)}
NAMES = {TITLE: "TITLE", ALLCAPS: "ALLCAPS", CAPNEXT: "CAPNEXT", ESC: "ESC", LOWER: "LOWER"}


class CaseOpsError(ValueError):
    """Malformed CaseOps text; `position` is the index, in characters, of the one at fault."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"position {position}: {reason}")
        self.position = position
        self.reason = reason


# === TEXT AS NUMBERS ===

# UTF-16: every character that the grammars know is one unit, and half
# a surrogate pair is never taken for one of them.
UNIT, CODEC = np.dtype("<u2"), "utf-16-le"
# Each block of text has one unit in front, which is its context, and
# zeros behind, so that every rule may look ahead.
CONTEXT, BEHIND = "\0", "\0\0\0\0"
# Working memory that stays in the cache, and bounded for any document: twice the speed of one piece on 10 MB.
BLOCK = 1 << 16
# All that nmt_nfkc makes a space, an end of a sentence, or a closing quote or bracket of (up to U+FFFF).
WHITESPACE = "\t\n\f\r \u00a0\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\u202f\u205f\u2581\u3000\ufeff"
WHITESPACE += "\ufffd" + "".join(map(chr, range(0x2000, 0x200B)))
SENTENCE_ENDS = ".!?\u2024\u2025\u2026\u203c\u2047\u2048\u2049\u33c2\u33c7\u33d8"
SENTENCE_ENDS += "\ufe15\ufe16\ufe19\ufe30\ufe52\ufe56\ufe57\uff01\uff0e\uff1f"
SENTENCE_ENDS += "".join(map(chr, range(0x2488, 0x249C)))  # a number and a full stop
CLOSERS = "\"')]\u2019\u201d\u207e\u208e\ufe36\ufe48\ufe5a\uff02\uff07\uff09\uff3d"
# Where a text may be cut: before whitespace, after a character that no rule looks back at.
CUT = re.compile(
    f"[^{re.escape(WHITESPACE + SENTENCE_ENDS + CLOSERS + ''.join(OPERATORS[3]))}](?=[{WHITESPACE}])"
)

# The kinds of unit that the rules tell apart; letters are odd, and
# from EVENT on come the ones at which a rule starts.
OTHER, SMALL, BLANK, CLOSER, EVENT, CAPITAL, SENTENCE_END = 0, 1, 2, 4, 64, 65, 68
NEXT, ESCAPE, TITLED, SHOUTED, LOWERED = 76, 80, 84, 88, 92
LETTER = 1
CASE = UNIT.type(ord("a") ^ ord("A"))


def _kinds(members: dict[int, str]) -> np.ndarray:
    """The kind of each of the 65,536 units, uint8: the keys of
    `members` for their characters, OTHER for the rest.
    """
    kinds = np.full(1 << 16, OTHER, dtype=np.uint8)
    for kind, characters in members.items():
        kinds[[ord(character) for character in characters]] = kind
    return kinds


_LETTERS = {SMALL: "abcdefghijklmnopqrstuvwxyz", CAPITAL: "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_SENTENCES = {BLANK: WHITESPACE, CLOSER: CLOSERS, SENTENCE_END: SENTENCE_ENDS}
_OPERATORS = {TITLED: TITLE, SHOUTED: ALLCAPS, NEXT: CAPNEXT, ESCAPE: ESC}
ENCODE_KINDS = {1: _kinds(_LETTERS), 3: _kinds(_LETTERS | _SENTENCES)}
DECODE_KINDS = {
    1: _kinds({SMALL: "".join(_LETTERS.values())} | _OPERATORS),
    3: _kinds(_LETTERS | _SENTENCES | _OPERATORS | {LOWERED: LOWER}),
}
# The operator of a capital, by the kind of the unit before it.
SIGN = np.where(np.arange(256) & LETTER, ord(CAPNEXT), ord(TITLE)).astype(UNIT)
# Whether v3 allows an operator, by its kind plus one where a capital is expected.
ALLOWED = np.isin(np.arange(256), (TITLED, SHOUTED, SHOUTED + 1, LOWERED + 1))


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """The `text` in pieces that can be transformed one by one: (index
    of the piece, context and piece and zeros).
    """
    start = 0
    while len(text) - start > BLOCK and (cut := CUT.search(text, start + BLOCK)):
        yield start, CONTEXT + text[start : cut.end()] + BEHIND
        start = cut.end()
    yield start, CONTEXT + text[start:] + BEHIND


def _units(text: str) -> np.ndarray:
    """The UTF-16 units of `text`, writable."""
    return np.frombuffer(bytearray(text.encode(CODEC)), dtype=UNIT)


def _text(units: np.ndarray) -> str:
    """The text of a block without its context and zeros."""
    return str(units[1 : -len(BEHIND)], CODEC)


def _where(mask: np.ndarray) -> np.ndarray:
    """The indices at which the one-dimensional `mask` holds."""
    return mask.nonzero()[0]


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All the indices start, start + 1, ... start + length - 1 of every span, one span after the other."""
    ends = lengths.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + (starts - ends + lengths).repeat(lengths)


def _version(version: int) -> int:
    if version not in OPERATORS:
        raise ValueError(f"CaseOps version must be {' or '.join(map(str, OPERATORS))}, got {version!r}")
    return version


# === SENTENCES (v3) ===


def _sentence_starts(kinds: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is behind each of `marks` (SENTENCE_END) and its closing quote or bracket.

    Gives the index of what is there, whether that is whitespace, and the index after the whitespace.
    """
    begins = marks + 1
    begins += kinds.take(begins) == CLOSER
    blank = kinds.take(begins) == BLANK
    return begins, blank, _after_blanks(kinds, begins, blank)


def _after_blanks(kinds: np.ndarray, starts: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """The index of the first unit from each of `starts` on that is no whitespace; `blank` says which are."""
    ends = starts + blank
    long = _where(kinds.take(ends) == BLANK)
    if len(long):
        solid = _where(kinds != BLANK)
        ends[long] = solid[solid.searchsorted(ends[long])]
    return ends


def _before_blanks(kinds: np.ndarray, ends: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """The index of the whitespace run that ends before each of `ends`; `blank` says where there is one."""
    starts = ends - blank
    long = _where(blank & (kinds.take(starts - 1) == BLANK))
    if len(long):
        solid = _where(kinds != BLANK)
        starts[long] = solid[solid.searchsorted(starts[long]) - 1] + 1
    return starts


def _text_start(kinds: np.ndarray) -> int:
    """The index of the first unit after the context that is no whitespace."""
    return 1 + int((kinds[1:] != BLANK).argmax())


# === ENCODE ===


def encode_caseops(text: str, version: int = 1) -> str:
    """The CaseOps encoding of any `text`, which `decode_caseops`
    gives back; UnicodeEncodeError on a lone surrogate.
    """
    encode = _encode_v1 if _version(version) == 1 else _encode_v3
    text = _escaped(text, version)
    return "".join([encode(block, np.arange(1, 1 + (start == 0))) for start, block in _blocks(text)])


def encode_all(transform: str, texts: Sequence[str]) -> list[str]:
    """Each of `texts` transformed: the same as one by one, and twice as fast for short ones in CaseOps."""
    if transform == "none":
        return list(texts)
    if not transform.startswith("caseops_"):
        return [TRANSFORMS[transform].encode(text) for text in texts]
    version = int(transform.removeprefix("caseops_v"))
    codes: list[str] = []
    group: list[str] = []
    size = 0
    for text in texts:
        alone = len(text) > BLOCK or CONTEXT in text
        if group and (alone or size > BLOCK):
            codes += _encode_joined(group, version)
            group, size = [], 0
        if alone:
            codes.append(encode_caseops(text, version))
        else:
            group.append(text)
            size += len(text)
    return codes + (_encode_joined(group, version) if group else [])


def _encode_joined(texts: list[str], version: int) -> list[str]:
    """The codes of texts without CONTEXT, which stands before each of them here, as before every block."""
    block = CONTEXT + _escaped(CONTEXT.join(texts), version) + BEHIND
    starts = _where(_units(block[: -len(BEHIND)]) == ord(CONTEXT)) + 1
    return (_encode_v1 if version == 1 else _encode_v3)(block, starts).split(CONTEXT)


def _escaped(text: str, version: int) -> str:
    """The text with ESC before every operator that stands in it."""
    if not text.isascii():
        text = text.replace(ESC, ESC + ESC)
        for operator in OPERATORS[version]:
            if operator != ESC:
                text = text.replace(operator, ESC + operator)
    return text


def _encode_v1(block: str, starts: np.ndarray) -> str:
    units = _units(block)
    kinds = ENCODE_KINDS[1].take(units)
    capitals = _where(kinds >= EVENT)
    signs, kept = _case_signs(kinds, capitals, kinds.take(capitals - 1))
    return _inserted(units, capitals, capitals[kept], signs[kept])


def _encode_v3(block: str, starts: np.ndarray) -> str:
    """The code of a block in which texts begin at the indices `starts`."""
    units = _units(block)
    kinds = ENCODE_KINDS[3].take(units)
    events = _where(kinds >= EVENT)
    is_capital = kinds.take(events) == CAPITAL
    begins, blank, heads = _sentence_starts(kinds, events[~is_capital])
    tops = _after_blanks(kinds, starts, kinds.take(starts) == BLANK)
    begins, heads = np.concatenate([begins[blank], tops]), np.concatenate([heads[blank], tops])
    expected, first = np.zeros(len(units), dtype=bool), np.zeros(len(units), dtype=bool)
    expected[heads] = True
    first[tops] = True

    capitals = events[is_capital]
    before = kinds.take(capitals - 1)
    signs, kept = _case_signs(kinds, capitals, before)
    kept &= ~expected.take(capitals) | (signs == ord(ALLCAPS))
    at, signs = capitals[kept], signs[kept]
    at = _before_blanks(kinds, at, (before[kept] == BLANK) & ~first.take(at))

    lower = begins[kinds.take(heads) == SMALL]
    if len(lower):
        at = np.concatenate([at, lower])
        signs = np.concatenate([signs, np.full(len(lower), ord(LOWER), dtype=UNIT)])
        order = at.argsort(kind="stable")
        at, signs = at[order], signs[order]
    return _inserted(units, capitals, at, signs)


def _case_signs(kinds: np.ndarray, capitals: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The operator of each of `capitals`, which have kinds `before`
    before them, and whether it is to be written.
    """
    signs = SIGN.take(before)
    kept = np.ones(len(capitals), dtype=bool)
    after = kinds.take(capitals + 1)
    first, last = _where(before != CAPITAL), _where(after != CAPITAL)  # of each run of capitals
    shouted = last > first
    if shouted.any():
        first, last = first[shouted], last[shouted]
        whole = (before[first] | after[last]) & LETTER == 0  # a word of its own
        first, last = first[whole], last[whole]
        kept[_spans(first, last - first + 1)] = False
        kept[first] = True
        signs[first] = ord(ALLCAPS)
    return signs, kept


def _inserted(units: np.ndarray, capitals: np.ndarray, at: np.ndarray, signs: np.ndarray) -> str:
    """The block `units`, its `capitals` in lower case, with each of
    `signs` inserted before its index in `at`.
    """
    units[capitals] |= CASE
    at = at + np.arange(len(at))
    code = np.empty(len(units) + len(at), dtype=UNIT)
    copied = np.ones(len(code), dtype=bool)
    copied[at] = False
    code[at] = signs
    code[copied] = units
    return _text(code)


# === DECODE ===


def decode_caseops(code: str, version: int = 1, normalised: bool = False) -> str:
    """The text whose CaseOps encoding is `code`; CaseOpsError, with
    the position, where the grammar is broken.

    v3 accepts exactly what the encoder writes, and with `normalised` also capitals, which stay: SentencePiece
    makes them of characters that are none (the trade mark sign becomes TM) after the encoding. v1 accepts the
    published grammar, which is wider: it also allows capitals in `code`, ESC before any character, CAPNEXT to
    begin a word or under ALLCAPS, and ALLCAPS on one letter.
    """
    decode = _decode_v1 if _version(version) == 1 else partial(_decode_v3, normalised=normalised)
    texts = []
    for start, block in _blocks(code):
        try:
            texts.append(decode(block, start == 0))
        except CaseOpsError as error:
            raise CaseOpsError(start + error.position, error.reason) from None
    return "".join(texts)


def _decode_v1(block: str, first: bool) -> str:
    units, kinds, found, kind = _operators(block, 1)
    before, after = kinds.take(found - 1), kinds.take(found + 1)
    escape, word = kind == ESCAPE, kind > ESCAPE
    lone = found[~escape & (after & LETTER == 0)]
    inside = found[word & (before & LETTER != 0)]
    last = found[escape & (found + 1 == len(units) - len(BEHIND))]
    if len(lone) or len(inside) or len(last):
        raise _fault(
            units,
            (lone, "is not followed by an ASCII letter"),
            (inside, "stands inside a word"),
            (last, "ends the text"),
        )
    escaped = found[escape] + 1
    literal = units[escaped]
    units[found[~escape] + 1] &= ~CASE
    shouted = found[kind == SHOUTED] + 1
    if len(shouted):
        kinds[found] = SMALL  # CAPNEXT and ESC do not end a word
        units[_spans(shouted, _word_ends(kinds, shouted) - shouted)] &= ~CASE
    units[escaped] = literal
    return _without(units, found)


def _decode_v3(block: str, first: bool, normalised: bool) -> str:
    units, kinds, found, kind = _operators(block, 3)
    if normalised:
        kinds[found[kind == CAPITAL]] = SMALL
        found, kind = found[kind != CAPITAL], kind[kind != CAPITAL]
    begins, blank, words = _sentence_starts(kinds, found[kind == SENTENCE_END])
    expected = np.zeros(len(units), dtype=bool)
    expected[begins] = kinds.take(begins + 1) == BLANK  # if an operator begins there
    top = _text_start(kinds) if first else 0
    if first:
        begins, blank, words = np.append(begins, top), np.append(blank, True), np.append(words, top)
        expected[top] = True

    is_word = kind > ESCAPE
    at, sign = found[is_word], kind[is_word]
    spaced = kinds.take(at + 1) == BLANK
    heads = _after_blanks(kinds, at + 1, spaced)
    worded = kinds.take(heads) & LETTER != 0
    behind = kinds.take(at - 1)
    apart = np.where(at == top, ~spaced, (behind != BLANK) & (spaced | (behind & LETTER == 0)))
    allowed = ALLOWED.take(sign + expected.take(at))
    nexts = found[kind == NEXT]
    inner = (kinds.take(nexts - 1) & LETTER != 0) & (kinds.take(nexts + 1) == SMALL)
    escapes = found[kind == ESCAPE]
    single = under = useless = escapes[:0]
    if len(escapes):
        useless = escapes[DECODE_KINDS[3].take(units[escapes + 1]) < NEXT]

    plain = blank & (kinds.take(words) & LETTER != 0)  # a capital that is not written
    titled = sign == TITLED
    initials = np.concatenate([words[plain], heads[titled]])
    spelled = _spelled_out(kinds, nexts[inner], initials)
    if len(spelled):
        spelled = np.concatenate([begins[plain], at[titled]])[spelled]
    shouted = heads[sign == SHOUTED]
    if len(shouted):
        ends = _word_ends(kinds, shouted)
        second = kinds.take(shouted + 1)
        single = at[sign == SHOUTED][
            (kinds.take(shouted) == SMALL) & (second & LETTER == 0) & (second != NEXT)
        ]
        under = ends[kinds.take(ends) == NEXT]
    if (
        not (worded & apart & allowed).all()
        or not inner.all()
        or (kind == CAPITAL).any()
        or len(spelled) + len(single) + len(under) + len(useless)
    ):
        raise _fault(
            units,
            (found[kind == CAPITAL], "is a capital letter"),
            (useless, "is not followed by an operator"),
            (at[~worded], "is not followed by a word"),
            (at[~apart], "stands between a word and the letter or whitespace before it"),
            (at[~allowed & titled], "stands where a capital is expected anyway"),
            (at[~allowed & ~titled], "stands where no capital is expected"),
            (nexts[~inner], "is not between a letter and a lower-case letter"),
            (under, "stands in an ALLCAPS word"),
            (single, "leads a word of one letter"),
            (spelled, "begins a word of capitals that has no ALLCAPS"),
        )
    capitals = np.concatenate([initials, nexts + 1])
    if len(shouted):
        capitals = np.concatenate([capitals, _spans(shouted, ends - shouted)])
    units[capitals] &= ~CASE
    return _without(units, found[kind >= NEXT])


def _operators(block: str, version: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The units of `block`, their kinds (an escaped operator is
    OTHER), the indices of the events and their kinds.
    """
    units = _units(block)
    kinds = DECODE_KINDS[version].take(units)
    found = _where(kinds >= EVENT)
    kind = kinds.take(found)
    escapes = found[kind == ESCAPE]
    if len(escapes):
        # Of adjacent ESC the first, third, ... escape what follows.
        number = np.arange(len(escapes))
        begins = np.diff(escapes, prepend=-2) != 1
        active = (number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0
        kinds[escapes[active] + 1] &= LETTER
        kind = kinds.take(found)
        found, kind = found[kind >= EVENT], kind[kind >= EVENT]
    return units, kinds, found, kind


def _spelled_out(kinds: np.ndarray, nexts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Which of the words that begin with a capital at `first` have
    two letters or more and a CAPNEXT before each other.

    `nexts` are the places of all CAPNEXT that are between two letters.
    """
    some = _where(kinds.take(first + 1) == NEXT)
    some = some[(kinds.take(first[some]) == SMALL) & (kinds.take(first[some] + 2) == SMALL)]
    if not len(some):
        return some
    # Of each chain of CAPNEXT, letter, CAPNEXT, letter.
    ends = nexts[np.append(np.diff(nexts) != 2, True)] + 2
    stop = kinds.take(ends[ends.searchsorted(first[some] + 2)])
    return some[(stop & LETTER == 0) & (stop != NEXT)]


def _word_ends(kinds: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The index of the first unit at or after each of `starts` that is not a letter."""
    stops = _where(kinds & LETTER == 0)
    return stops[stops.searchsorted(starts)]


def _without(units: np.ndarray, places: np.ndarray) -> str:
    """The text of the block `units` without those at `places`."""
    kept = np.ones(len(units), dtype=bool)
    kept[places] = False
    return _text(units[kept])


def _fault(units: np.ndarray, *faults: tuple[np.ndarray, str]) -> CaseOpsError:
    """The error at the first of all the places in `faults`: (indices
    into the block `units`, what is wrong there).
    """
    found = [(int(places.min()), reason) for places, reason in faults if len(places)]
    place, reason = min(found, key=lambda fault: fault[0])
    character = chr(units[place])
    return CaseOpsError(len(str(units[1:place], CODEC)), f"{NAMES.get(character, ascii(character))} {reason}")


# === BYTES ===


class _Worth(dict):
    """Original bytes of surfaces met so far, -1 for one with an ESC; bounded, since any text may come."""

    def __init__(self, version: int) -> None:
        self.operators = dict.fromkeys(map(ord, OPERATORS[version]))

    def __missing__(self, piece: str) -> int:
        worth = -1 if ESC in piece else len(piece.translate(self.operators).encode())
        if len(self) >= 1 << 16:
            self.clear()
        if len(piece) <= 64:
            self[piece] = worth
        return worth


_WORTH = {version: _Worth(version) for version in OPERATORS}


def original_byte_counts(pieces: Sequence[str], version: int = 1) -> list[int]:
    """The original UTF-8 bytes that each token of one document
    accounts for; CaseOpsError if an ESC ends the document.

    `pieces` are the tokens' surfaces (not vocabulary pieces) in CaseOps text, in order and complete, since an
    ESC acts on the token after it. An operator is worth 0, an escaped one its 3 bytes, anything else its own
    length.
    """
    worth = _WORTH[_version(version)]
    counts = list(map(worth.__getitem__, pieces))
    if -1 not in counts:
        return counts
    escaped = False
    for index, piece in enumerate(pieces):
        if counts[index] >= 0 and not escaped:
            continue
        total = 0
        for character in piece:
            if escaped or character not in OPERATORS[version]:
                total += len(character.encode())
                escaped = False
            else:
                escaped = character == ESC
        counts[index] = total
    if escaped:
        raise CaseOpsError(sum(map(len, pieces)) - 1, "ESC ends the document")
    return counts


# === BY NAME ===


def casefold(text: str) -> str:
    """The NFKC form of `text` in lower case (`str.lower`, so sharp s
    stays); lossy: the text cannot be recovered.
    """
    return unicodedata.normalize("NFKC", text).lower()


def _same(text: str) -> str:
    return text


class Transform(NamedTuple):
    """A text transform; `decode` is None if it cannot be undone,
    `operators` are to be reserved by a tokenizer.
    """

    encode: Callable[[str], str]
    decode: Callable[[str], str] | None
    operators: tuple[str, ...]
    lossless: bool


TRANSFORMS = {
    "none": Transform(_same, _same, (), True),
    "caseops_v1": Transform(encode_caseops, decode_caseops, OPERATORS[1], True),
    "caseops_v3": Transform(
        partial(encode_caseops, version=3), partial(decode_caseops, version=3), OPERATORS[3], True
    ),
    "casefold": Transform(casefold, None, (), False),
}
