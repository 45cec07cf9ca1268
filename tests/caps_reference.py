"""The text transforms of lossless_caps.py, one character at a time: slow, plain, and the oracle of its tests."""
from __future__ import annotations

TITLE, ALLCAPS, CAPNEXT, ESC, LOWER = "\ue001\ue002\ue003\ue004\ue005"
OPERATORS = {1: TITLE + ALLCAPS + CAPNEXT + ESC, 3: TITLE + ALLCAPS + CAPNEXT + ESC + LOWER}
CLOSERS = "\"')]\u201d\u2019"


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


def expects_capital(before: str, space: bool) -> bool:
    """Whether v3 expects a capital at the head of a word after `before` and, if `space`, one space."""
    if before == "" or before[-1] == "\n":
        return True
    if not space:
        return False
    return before[-1] in ".!?" or (before[-1] in CLOSERS and before[-2:-1] in (".", "!", "?"))


def encode_v3(text: str) -> str:
    """CaseOps v3 of `text`."""
    out = []
    position = 0
    while position < len(text):
        character = text[position]
        space = character == " " and is_letter(text[position + 1 : position + 2])
        start = position + space
        if not space and not is_letter(character):
            if character in OPERATORS[3]:
                out.append(ESC)
            out.append(character)
            position += 1
            continue
        end = word_end(text, start)
        word = text[start:end]
        if len(word) >= 2 and word.isupper():
            operator, letters = ALLCAPS, word.lower()
        else:
            expected = expects_capital(text[max(0, position - 2) : position], space)
            operator, letters = "", spell(word)
            if is_capital(word[0]) != expected:
                operator = LOWER if expected else TITLE
        out.append(operator + " " * space + letters)
        position = end
    return "".join(out)


def decode_v3(code: str) -> str:
    """The text whose CaseOps v3 encoding is `code`; Malformed if `code` is the encoding of no text."""
    out = []
    tail = ""  # the last two characters of the text so far
    position = 0
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
        space = code[position : position + 1] == " " and is_letter(code[position + 1 : position + 2])
        start = position + space
        if not is_letter(code[start : start + 1]):
            if operator:
                raise Malformed(begin, "operator without a word")
            out.append(code[position])
            tail = (tail + code[position])[-2:]
            position += 1
            continue
        if operator == CAPNEXT:
            raise Malformed(begin, "CAPNEXT outside a word")
        if not space and (is_letter(tail[-1:]) or tail[-1:] == " "):
            raise Malformed(begin, "operator between a word and what leads it")
        expected = expects_capital(tail, space)
        if operator == TITLE and expected:
            raise Malformed(begin, "TITLE where a capital is expected")
        if operator == LOWER and not expected:
            raise Malformed(begin, "LOWER where no capital is expected")
        letters = []
        position = start
        while position < len(code):
            if is_capital(code[position]):
                raise Malformed(position, "capital")
            if is_letter(code[position]):
                first = not letters and (operator == TITLE or (operator == "" and expected))
                letters.append(code[position].upper() if first or operator == ALLCAPS else code[position])
                position += 1
            elif code[position] == CAPNEXT:
                if operator == ALLCAPS:
                    raise Malformed(position, "CAPNEXT under ALLCAPS")
                following = code[position + 1 : position + 2]
                if not is_letter(following) or is_capital(following):
                    raise Malformed(position, "CAPNEXT without a lower-case letter")
                letters.append(following.upper())
                position += 2
            else:
                break
        word = "".join(letters)
        if operator == ALLCAPS and len(word) < 2:
            raise Malformed(begin, "ALLCAPS on one letter")
        if operator != ALLCAPS and len(word) >= 2 and word.isupper():
            raise Malformed(begin, "capitals without ALLCAPS")
        out.append(" " * space + word)
        tail = (tail + " " * space + word)[-2:]
    return "".join(out)


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
