"""The parts of a prompt: text, weights, BREAK, embeddings and LoRA tags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Marks that ComfyUI and others read as syntax; learned words between tags must not hold them.
SYNTAX = ("(", ")", "<", ">", "[", "]", "\\")

_TAG = re.compile(r"<[a-z_]+:[^<>]*>|(?<![^\s,])embedding:[^\s,()]+", re.IGNORECASE)
_BREAK = re.compile(r"\bBREAK\b")
_WEIGHT = re.compile(r":\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*$")


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt.

    Attributes:
        printed: its characters in the prompt.
        read: the words that a text encoder reads of it, "" for a tag.
        kept: it has a weight or is a tag; no task changes it.
    """

    printed: str
    read: str
    kept: bool


def sections(prompt: str) -> list[str]:
    """The parts of a prompt between `BREAK`s; a `BREAK` in parentheses does not count."""
    groups = list(_groups(prompt))
    parts, start = [], 0
    for found in _BREAK.finditer(prompt):
        if not any(opened < found.start() < closed for opened, closed in groups):
            parts.append(prompt[start : found.start()].strip())
            start = found.end()
    return [*parts, prompt[start:].strip()]


def pieces(section: str) -> list[Piece]:
    """A section in its pieces of text, weights and tags, in order.

    Kept are `(word:1.2)` and `(word)`, nested ones whole, `embedding:name`, and tags like
    `<lora:name:0.8>`. Parentheses that are escaped as `\\(` and `\\)` are text, and so are those
    without a partner.
    """
    found: list[Piece] = []
    start = 0
    for opened, closed in _groups(section):
        found += _text_and_tags(section[start:opened])
        weighted = section[opened:closed]
        found.append(Piece(weighted, read(_WEIGHT.sub("", weighted[1:-1])), kept=True))
        start = closed
    return found + _text_and_tags(section[start:])


def read(prompt: str) -> str:
    """The text of a prompt for a text encoder: without weights, tags and `BREAK`."""
    parts = [piece.read for section in sections(prompt) for piece in pieces(section)]
    return " ".join(filter(None, parts))


def tags(prompt: str) -> str:
    """The tags of a prompt that no text encoder reads, separated by spaces."""
    parts = [piece for section in sections(prompt) for piece in pieces(section)]
    return " ".join(piece.printed for piece in parts if not piece.read)


def chunks(groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Token ids of the pieces of a prompt -> the contexts that ComfyUI encodes one by one.

    A piece of fewer than eight tokens goes into the next context whole; a longer one is cut where
    the context is full (ComfyUI 0.30, `comfy/sd1_clip.py`, `SDTokenizer.tokenize_with_weights`).
    """
    contexts: list[list[int]] = [[]]
    for group in groups:
        left = list(group)
        while left:
            room = size - len(contexts[-1])
            if len(left) <= room:
                contexts[-1].extend(left)
                break
            if len(group) >= 8:
                contexts[-1].extend(left[:room])
                left = left[room:]
            contexts.append([])
    return [context for context in contexts if context]


def _groups(text: str) -> Iterator[tuple[int, int]]:
    """The beginning and the end of each outermost pair of parentheses."""
    opened: list[int] = []
    pairs: list[tuple[int, int]] = []
    for found in re.finditer(r"\\[()]|[()]", text):
        if found[0] == "(":
            opened.append(found.start())
        elif found[0] == ")" and opened:
            pairs.append((opened.pop(), found.end()))
    end = 0
    for first, last in sorted(pairs):
        if first >= end:
            yield first, last
            end = last


def _text_and_tags(text: str) -> list[Piece]:
    found: list[Piece] = []
    at = 0
    for tag in [*_TAG.finditer(text), None]:
        plain = text[at : tag.start() if tag else None].strip()
        if plain.strip(", "):
            words = plain.replace("\\(", "(").replace("\\)", ")")
            found.append(Piece(plain, words, kept=False))
        if tag:
            found.append(Piece(tag[0], "", kept=True))
            at = tag.end()
    return found
