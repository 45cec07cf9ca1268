"""The text transforms of lossless_caps.py, one character at a time: slow, plain, the oracle of its tests."""

from __future__ import annotations

TITLE, ALLCAPS, CAPNEXT, ESC, LOWER = "\ue001\ue002\ue003\ue004\ue005"
OPERATORS = {1: TITLE + ALLCAPS + CAPNEXT + ESC, 3: TITLE + ALLCAPS + CAPNEXT + ESC + LOWER}
WHITESPACE = "".join(
    map(
        chr,
        (
            9,
            10,
            12,
            13,
            32,
            0xA0,
            0x61C,
            0x1680,
            *range(0x2000, 0x200D),
            0x200E,
            0x200F,
            0x2028,
            0x2029,
            0x202F,
            0x205F,
            0x2581,
            0x3000,
            0xFEFF,
            0xFFFD,
        ),
    )
)
SENTENCE_ENDS = ".!?" + "".join(
    map(
        chr,
        (
            *range(0x2024, 0x2027),
            0x203C,
            *range(0x2047, 0x204A),
            *range(0x2488, 0x249C),
            0x33C2,
            0x33C7,
            0x33D8,
            0xFE15,
            0xFE16,
            0xFE19,
            0xFE30,
            0xFE52,
            0xFE56,
            0xFE57,
            0xFF01,
            0xFF0E,
            0xFF1F,
        ),
    )
)
CLOSERS = "\"')]" + "".join(
    map(chr, (0x2019, 0x201D, 0x207E, 0x208E, 0xFE36, 0xFE48, 0xFE5A, 0xFF02, 0xFF07, 0xFF09, 0xFF3D))
)


class Malformed(ValueError):
    """Not an encoding; `position` is the index of the character at fault."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"position {position}: {reason}")
        self.position = position


def is_letter(character: str) -> bool:
    """Whether `character` is one of A-Z and a-z; false for the empty string."""
    return "a" <= character <= "z" or "A" <= character <= "Z"


def is_capital(character: str) -> bool:
    """Whether `character` is one of A-Z; false for the empty string."""
    return "A" <= character <= "Z"


def word_end(text: str, start: int) -> int:
    """Index after the ASCII letters that begin at `start`."""
    end = start
    while end < len(text) and is_letter(text[end]):
        end += 1
    return end


def spell(word: str) -> str:
    """The letters of `word` in lower case, CAPNEXT before each one after the first that was a capital."""
    out = [word[0].lower()]
    for letter in word[1:]:
        if is_capital(letter):
            out.append(CAPNEXT)
        out.append(letter.lower())
    return "".join(out)


def encode_v1(text: str) -> str:
    """CaseOps v1 of `text`."""
    out = []
    position = 0
    while position < len(text):
        character = text[position]
        if not is_letter(character):
            if character in OPERATORS[1]:
                out.append(ESC)
            out.append(character)
            position += 1
            continue
        end = word_end(text, position)
        word = text[position:end]
        if len(word) >= 2 and word.isupper():
            out.append(ALLCAPS + word.lower())
        else:
            if is_capital(word[0]):
                out.append(TITLE)
            out.append(spell(word))
        position = end
    return "".join(out)


def decode_v1(code: str) -> str:
    """The text whose CaseOps v1 encoding is `code`; Malformed if the grammar does not allow `code`."""
    out = []
    inside = shouting = False  # inside a word; under an ALLCAPS
    position = 0
    while position < len(code):
        character = code[position]
        following = code[position + 1 : position + 2]
        if character == ESC:
            if not following:
                raise Malformed(position, "nothing after ESC")
            out.append(following)
            inside = is_letter(following)
            shouting = shouting and inside
            position += 2
        elif character in OPERATORS[1]:
            if character != CAPNEXT and inside:
                raise Malformed(position, "operator inside a word")
            if not is_letter(following):
                raise Malformed(position, "operator without a letter")
            out.append(following.upper())
            inside = True
            shouting = shouting or character == ALLCAPS
            position += 2
        else:
            inside = is_letter(character)
            shouting = shouting and inside
            out.append(character.upper() if shouting else character)
            position += 1
    return "".join(out)


def blank_end(text: str, start: int) -> int:
    """Index after the whitespace that begins at `start`."""
    end = start
    while end < len(text) and text[end] in WHITESPACE:
        end += 1
    return end


def expects_capital(before: str, blank: bool) -> bool:
    """Whether v3 expects a capital at the head of a word after
    `before` (no whitespace at its end) and, if `blank`, whitespace."""
    if before == "":
        return True
    if not blank:
        return False
    if before[-1] in CLOSERS:
        before = before[:-1]
    return before != "" and before[-1] in SENTENCE_ENDS


def encode_v3(text: str) -> str:
    """CaseOps v3 of `text`."""
    out = []
    position = blank_end(text, 0)
    out.append(text[:position])
    top = position
    while position < len(text):
        start = blank_end(text, position)
        character = text[start : start + 1]
        if not is_letter(character):
            out.append(text[position:start])
            if character != "" and character in OPERATORS[3]:
                out.append(ESC)
            out.append(character)
            position = start + 1
            continue
        end = word_end(text, start)
        word = text[start:end]
        if len(word) >= 2 and word.isupper():
            operator, letters = ALLCAPS, word.lower()
        else:
            expected = expects_capital(text[max(top, position - 2) : position], start > position)
            operator, letters = "", spell(word)
            if is_capital(word[0]) != expected:
                operator = LOWER if expected else TITLE
        out.append(operator + text[position:start] + letters)
        position = end
    return "".join(out)


def decode_v3(code: str, normalised: bool = False) -> str:
    """The text whose CaseOps v3 encoding is `code`; Malformed if `code` is the encoding of no text.

    With `normalised` a capital in `code` stays, and is otherwise treated as its lower-case letter.
    """
    position = blank_end(code, 0)
    out = [code[:position]]
    tail = ""  # the last two characters of the text so far, without the whitespace at its start
    while position < len(code):
        begin, operator = position, ""
        if code[position] == ESC:
            literal = code[position + 1 : position + 2]
            if not literal or literal not in OPERATORS[3]:
                raise Malformed(position, "ESC without an operator")
            out.append(literal)
            tail = (tail + literal)[-2:]
            position += 2
            continue
        if code[position] in OPERATORS[3]:
            operator = code[position]
            position += 1
        start = blank_end(code, position)
        blank = code[position:start]
        if not is_letter(code[start : start + 1]):
            if operator:
                raise Malformed(begin, "operator without a word")
            if not blank:
                blank = code[position]
            out.append(blank)
            tail = (tail + blank)[-2:]
            position += len(blank)
            continue
        if operator == CAPNEXT:
            raise Malformed(begin, "CAPNEXT outside a word")
        if tail == "" and blank:
            raise Malformed(begin, "operator before whitespace at the start of the text")
        if blank == "" and tail != "" and (is_letter(tail[-1]) or tail[-1] in WHITESPACE):
            raise Malformed(begin, "operator between a word and what leads it")
        if operator and blank and tail[-1] in WHITESPACE:
            raise Malformed(begin, "operator inside whitespace")
        expected = expects_capital(tail, blank != "")
        if operator == TITLE and expected:
            raise Malformed(begin, "TITLE where a capital is expected")
        if operator == LOWER and not expected:
            raise Malformed(begin, "LOWER where no capital is expected")
        initial = operator == TITLE or (operator == "" and expected)
        word, spelled, position = word_v3(code, start, operator, initial, normalised)
        if operator == ALLCAPS and len(word) < 2:
            raise Malformed(begin, "ALLCAPS on one letter")
        if spelled and len(word) >= 2:
            raise Malformed(begin, "capitals without ALLCAPS")
        out.append(blank + word)
        tail = (tail + blank + word)[-2:]
    return "".join(out)


def word_v3(
    code: str, position: int, operator: str, initial: bool, normalised: bool
) -> tuple[str, bool, int]:
    """The word that begins at `position`, whether every letter of it is called a capital, and its end."""
    letters: list[str] = []
    spelled = initial
    while position < len(code):
        if is_capital(code[position]) and not normalised:
            raise Malformed(position, "capital")
        if is_letter(code[position]):
            first = not letters and initial
            spelled = spelled and not letters
            letters.append(code[position].upper() if first or operator == ALLCAPS else code[position])
            position += 1
        elif code[position] == CAPNEXT:
            if operator == ALLCAPS:
                raise Malformed(position, "CAPNEXT under ALLCAPS")
            following = code[position + 1 : position + 2]
            if not is_letter(following) or (is_capital(following) and not normalised):
                raise Malformed(position, "CAPNEXT without a lower-case letter")
            letters.append(following.upper())
            position += 2
        else:
            break
    return "".join(letters), spelled, position


def byte_counts(pieces: list[str], version: int = 1) -> list[int]:
    """Original UTF-8 bytes of each surface in `pieces`, the tokens of one document in order."""
    counts = []
    escaped = False
    for piece in pieces:
        total = 0
        for character in piece:
            if escaped:
                total += len(character.encode())
                escaped = False
            elif character == ESC:
                escaped = True
            elif character not in OPERATORS[version]:
                total += len(character.encode())
        counts.append(total)
    if escaped:
        raise Malformed(sum(map(len, pieces)) - 1, "nothing after ESC")
    return counts
