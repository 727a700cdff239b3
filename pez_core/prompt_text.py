"""What is text in a prompt and what is syntax: weights, BREAK, embeddings, tags, alternatives.

The syntax is that of ComfyUI, of the web interface of AUTOMATIC1111 and of wildcard extensions:
`(word:1.2)`, `[word]`, `[cat:dog:0.5]`, `{red|blue}`, `__color__`, `embedding:name`,
`<lora:name:1>`, `saber \\(fate\\)`, `BREAK` and `a AND b :1.2`. All functions take time in
proportion to the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

# Marks that ComfyUI and others read as syntax; learned words between tags must not hold them.
SYNTAX = ("(", ")", "<", ">", "[", "]", "{", "}", "|", "\\")

SLOT = "{}"
"""The place of the learned words in a caption, which is no syntax."""

_MARKS = re.compile(
    r"(?P<escape>\\.)"
    r"|(?P<tag><[a-z][\w-]*:[^<>]*>|(?<![^\s,(\[{|])embedding:[^\s,()\[\]{}|]+"
    r"|__(?:[^\s_]|_(?!_))+__)"
    r"|(?P<slot>\{\})"
    r"|(?P<bracket>[()\[\]{}])"
    r"|(?P<part>[|:])"
    r"|(?P<separator>\b(?:BREAK|AND)\b)",
    re.IGNORECASE | re.DOTALL,
)
_NUMBER = re.compile(r"\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)\s*")
# before an alternative of a wildcard: `2$$red|blue` takes two, `0.5::red|blue` has a weight
_CHOICE = re.compile(r"\s*(?:\d+(?:-\d+)?\$\$|\d+(?:\.\d*)?::)")
_CLOSING = {")": "(", "]": "[", "}": "{"}
# Words before `\(` that belong to the name in `artoria pendragon \(fate\)`.
_NAME_WORDS = 3


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt.

    Attributes:
        printed: its characters in the prompt. A comma between two pieces of syntax is printed with
            the first one.
        read: the words that a text encoder reads of it, "" for a tag.
        kept: it is syntax; no task changes it.
    """

    printed: str
    read: str
    kept: bool


@dataclass(frozen=True)
class _Mark:
    kind: str
    text: str
    start: int
    end: int


def sections(prompt: str) -> list[str]:
    """The parts of a prompt between `BREAK`s and `AND`s; those in brackets do not count."""
    return [section for section, _ in _split(prompt)]


def separators(prompt: str) -> list[str]:
    """The `BREAK`s and `AND`s between the sections, in order."""
    return [separator for _, separator in _split(prompt) if separator]


def pieces(section: str, weighted: bool = False) -> list[Piece]:
    """A section in its pieces of text and syntax, in order.

    Kept are `(word:1.2)` and other brackets with a partner, nested ones whole, `embedding:name`,
    tags like `<lora:name:0.8>`, `__wildcard__`, and names with escaped brackets like
    `saber \\(fate\\)`.

    Args:
        section: of a prompt.
        weighted: it is a part of an `AND`, which may end in a weight such as ` :1.2`.
    """
    found: list[Piece] = []
    start = 0
    for first, last in _kept_spans(section, weighted):
        _add_text(found, section[start:first])
        kept = section[first:last]
        found.append(Piece(kept, "" if kept[0] == ":" else _read(kept), kept=True))
        start = last
    _add_text(found, section[start:])
    return found


def read(prompt: str) -> str:
    """The text of a prompt for a text encoder: without weights, tags and `BREAK`.

    Of alternatives, such as `{red|blue}` and `[cat:dog:0.5]`, the first one that has words.
    """
    return " ".join(filter(None, (piece.read for piece in all_pieces(prompt))))


def tags(prompt: str) -> str:
    """The tags of a prompt that no text encoder reads, separated by spaces."""
    kept = [piece for section in sections(prompt) for piece in pieces(section)]
    return " ".join(piece.printed.rstrip(", ") for piece in kept if piece.kept and not piece.read)


def all_pieces(prompt: str) -> list[Piece]:
    """The pieces of all sections, and what stands between the sections."""
    split = _split(prompt)
    weighted = any(separator == "AND" for _, separator in split)
    found = [
        piece
        for section, between in split
        for piece in [*pieces(section, weighted), *([Piece(between, "", True)] if between else [])]
    ]
    text = prompt.strip()
    return found or ([Piece(text, text, False)] if text else [])


def has_syntax(prompt: str) -> bool:
    """Whether anything in a prompt is more than text."""
    return any(piece.kept or piece.read != piece.printed for piece in all_pieces(prompt))


def contexts(
    encode: Callable[[str], list[int]],
    encode_behind: Callable[[str], list[int]],
    prompt: str,
    size: int,
) -> list[list[int]]:
    """The token ids of a prompt in the contexts that ComfyUI encodes one by one.

    Args:
        encode: from text to ids.
        encode_behind: the same for a text behind a word.
        prompt: of any length, with syntax.
        size: tokens that a context holds.
    """
    texts = list(filter(None, (piece.read for piece in all_pieces(prompt))))
    ids = [encode_behind(f" {text}") if k else encode(text) for k, text in enumerate(texts)]
    return chunks(ids, size)


def chunks(groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Token ids of the pieces of a prompt -> the contexts that ComfyUI encodes one by one.

    A piece of fewer than eight tokens goes into the next context whole; a longer one, or one that
    no context holds, is cut where the context is full (ComfyUI 0.30, `comfy/sd1_clip.py`,
    `SDTokenizer.tokenize_with_weights`).
    """
    contexts: list[list[int]] = [[]]
    for group in groups:
        left = list(group)
        while left:
            room = size - len(contexts[-1])
            if len(left) <= room:
                contexts[-1].extend(left)
                break
            if len(group) >= 8 or len(group) > size:
                contexts[-1].extend(left[:room])
                left = left[room:]
            contexts.append([])
    return [context for context in contexts if context]


def kept_spans(prompt: str) -> list[tuple[int, int]]:
    """Where the syntax of a prompt begins and ends, without `BREAK`, `AND` and `{}`."""
    return list(_kept_spans(prompt, weighted=False))


def _marks(text: str) -> list[_Mark]:
    """The marks of a text in order; of brackets only those that have a partner."""
    found, opened, lone = [], [], set()
    for match in _MARKS.finditer(text):
        kind = match.lastgroup or ""
        if kind == "separator" and match[0] != match[0].upper():
            continue
        found.append(_Mark(kind, match[0], match.start(), match.end()))
        if kind != "bracket":
            continue
        place = len(found) - 1
        if match[0] in _CLOSING:
            _close(found, opened, lone, place)
        else:
            opened.append(place)
    lone.update(opened)
    return [mark for place, mark in enumerate(found) if place not in lone]


def _close(found: list[_Mark], opened: list[int], lone: set[int], place: int) -> None:
    """Take the partner of the closing bracket at `place` out of `opened`.

    Brackets that were opened in between have no partner.
    """
    wanted = _CLOSING[found[place].text]
    near = range(len(opened) - 1, max(-1, len(opened) - 1 - _DEEPEST), -1)
    partner = next((opened[k] for k in near if found[opened[k]].text == wanted), None)
    if partner is None:
        lone.add(place)
        return
    while opened[-1] != partner:
        lone.add(opened.pop())
    opened.pop()


# Open brackets among which a partner is searched.
_DEEPEST = 32


def _split(prompt: str) -> list[tuple[str, str]]:
    """The sections of a prompt, each with the separator behind it; "" behind the last."""
    depth, start, found = 0, 0, []
    for mark in _marks(prompt):
        if mark.kind == "bracket":
            depth += -1 if mark.text in _CLOSING else 1
        elif mark.kind == "separator" and depth == 0:
            found.append((prompt[start : mark.start].strip(), mark.text))
            start = mark.end
    return [*found, (prompt[start:].strip(), "")]


def _kept_spans(section: str, weighted: bool) -> Iterator[tuple[int, int]]:
    """Where the syntax of a section begins and ends."""
    depth, start, last = 0, 0, 0
    marks = _marks(section)
    for k, mark in enumerate(marks):
        if mark.kind == "bracket":
            depth += -1 if mark.text in _CLOSING else 1
            if depth == 1 and mark.text not in _CLOSING:
                start = mark.start
            elif depth == 0:
                yield start, mark.end
                last = mark.end
        elif depth == 0 and mark.kind == "tag":
            yield mark.start, mark.end
            last = mark.end
        elif depth == 0 and mark.text == "\\(" and mark.start >= last:
            closing = next((m for m in marks[k + 1 : k + 9] if m.text == "\\)"), None)
            if closing:
                yield _name_start(section, last, mark.start), closing.end
                last = closing.end
        elif weighted and depth == 0 and _is_last_weight(section, marks, k):
            yield mark.start, len(section)


def _is_last_weight(section: str, marks: Sequence[_Mark], k: int) -> bool:
    """Whether mark `k` is a colon with nothing but a number behind it."""
    last = k == len(marks) - 1 and marks[k].text == ":"
    return last and _NUMBER.fullmatch(section, marks[k].end) is not None


def _name_start(section: str, first: int, end: int) -> int:
    """Where the name before a `\\(` at `end` begins: behind a comma, at most three words."""
    first = max(first, section.rfind(",", first, end) + 1, section.rfind("\n", first, end) + 1)
    words = list(re.finditer(r"\S+", section[max(first, end - 200) : end]))[-_NAME_WORDS:]
    return max(first, end - 200) + words[0].start() if words else end


def _add_text(found: list[Piece], text: str) -> None:
    """Add a text to the pieces; commas alone belong to the syntax that they stand behind."""
    text = text.strip()
    if text.strip(", "):
        found.append(Piece(text, _read(text), kept=False))
    elif found:
        found[-1] = replace(found[-1], printed=found[-1].printed + text)


@dataclass
class _Level:
    """An open bracket while its content is read.

    Attributes:
        bracket: the opening one; "" for the text itself.
        start: of its content in the list of what was read.
        pipes, colons: places of `|` and `:` in this list.
    """

    bracket: str
    start: int
    pipes: list[int] = field(default_factory=list)
    colons: list[int] = field(default_factory=list)


class _ReadText:
    """What was read so far: texts, and how many up to each have letters or digits."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.counts: list[int] = [0]
        self.levels = [_Level("", 0)]

    def add(self, text: str) -> None:
        self.out.append(text)
        self.counts.append(self.counts[-1] + any(map(str.isalnum, text)))

    def open(self, bracket: str) -> None:
        self.add(" ")
        self.levels.append(_Level(bracket, len(self.out)))

    def part(self, mark: str) -> None:
        level = self.levels[-1]
        (level.pipes if mark == "|" else level.colons).append(len(self.out))
        self.add(mark)

    def close(self) -> None:
        """Leave the weight of a bracket out, and all of its alternatives but one."""
        level = self.levels.pop()
        colons, parts = level.colons, level.pipes
        # a number is one text, so that nothing else stands behind the colon
        numbered = colons and colons[-1] == len(self.out) - 2 and _NUMBER.fullmatch(self.out[-1])
        if numbered and level.bracket != "{":
            self._cut(colons[-1])
            if level.bracket == "[":
                parts = colons[:-1]
        if parts and level.bracket != "(":
            self._choose(level, parts)
        self.add(" ")

    def _cut(self, end: int) -> None:
        del self.out[end:], self.counts[end + 1 :]

    def _choose(self, level: _Level, parts: list[int]) -> None:
        """Keep the first alternative that has words."""
        starts, ends = [level.start, *(k + 1 for k in parts)], [*parts, len(self.out)]
        for first, last in zip(starts, ends, strict=True):
            if self.counts[last] > self.counts[first]:
                self._cut(last)
                if level.bracket == "{":
                    self._without_number(first)
                # nothing in front has words, so that the counts stay right
                del self.out[level.start : first], self.counts[level.start : first]
                return
        self._cut(level.start)

    def _without_number(self, first: int) -> None:
        """Leave out the number of choices, or the weight, that an alternative begins with."""
        head = "".join(self.out[first : first + 5])
        if found := _CHOICE.match(head):
            rest = len(self.out[first : first + 5]) - 1
            self.out[first : first + 5] = [head[found.end() :], *[""] * rest]


def _read(text: str) -> str:
    """What is read of a text with brackets."""
    reader, at, marks = _ReadText(), 0, _marks(text)
    for mark in marks:
        reader.add(text[at : mark.start])
        at = mark.end
        if mark.kind == "escape":
            reader.add(mark.text[1] if mark.text[1] in "()[]{}" else mark.text)
        elif mark.kind == "slot" or mark.text == "AND":
            reader.add(mark.text)
        elif mark.kind == "part":
            reader.part(mark.text)
        elif mark.kind == "bracket" and mark.text not in _CLOSING:
            reader.open(mark.text)
        elif mark.kind == "bracket":
            reader.close()
        else:  # tags and BREAK
            reader.add(" ")
    reader.add(text[at:])
    joined = "".join(reader.out)
    plain = all(mark.kind in ("escape", "slot", "part") for mark in marks)
    return joined.strip() if plain else " ".join(joined.split())
