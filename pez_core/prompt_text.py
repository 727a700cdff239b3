"""What is text in a prompt and what is not: weights, BREAK, embeddings and LoRA tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Marks that ComfyUI and others read as syntax; a learned prompt between tags has to do without.
SYNTAX = frozenset("()<>[]\\")

_TAG = re.compile(r"<[a-z_]+:[^<>]*>|(?:(?<=\s)|^|(?<=,))embedding:[^\s,()]+", re.IGNORECASE)
_BREAK = re.compile(r"(?:^|\s)BREAK(?=\s|$)")
_WEIGHT = re.compile(r":\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*$")


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt.

    Attributes:
        printed: as it is written.
        read: the words that a text encoder reads of it, "" for a tag.
        kept: it is a weight or a tag, which no task changes.
    """

    printed: str
    read: str
    kept: bool


def sections(prompt: str) -> list[list[Piece]]:
    """The pieces of a prompt, one list for each section between `BREAK`s.

    Kept are `(word:1.2)` and `(word)`, nested ones whole, `embedding:name`, and tags like
    `<lora:name:0.8>`. Parentheses that are escaped as `\\(` and `\\)` are text.
    """
    return [_pieces(section.strip()) for section in _BREAK.split(prompt)]


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


def _pieces(section: str) -> list[Piece]:
    pieces: list[Piece] = []
    start = depth = opened = i = 0

    def add_text(text: str) -> None:
        at = 0
        for tag in _TAG.finditer(text):
            _append(pieces, text[at : tag.start()])
            pieces.append(Piece(tag[0], "", kept=True))
            at = tag.end()
        _append(pieces, text[at:])

    while i < len(section):
        character = section[i]
        if character == "\\" and section[i + 1 : i + 2] in ("(", ")"):
            i += 1
        elif character == "(":
            if depth == 0:
                opened = i
            depth += 1
        elif character == ")" and depth:
            depth -= 1
            if depth == 0:
                add_text(section[start:opened])
                weighted = section[opened : i + 1]
                pieces.append(Piece(weighted, _read(weighted), kept=True))
                start = i + 1
        i += 1
    add_text(section[start:])
    return pieces


def _append(pieces: list[Piece], text: str) -> None:
    text = text.strip(" ,\n\t")
    if text:
        pieces.append(Piece(text, _unescape(text), kept=False))


def _read(weighted: str) -> str:
    """The words of a weighted piece, without parentheses, weights and tags."""
    parts: list[str] = []
    inner = _WEIGHT.sub("", weighted[1:-1])
    for piece in _pieces(inner):
        parts.append(piece.read)
    return " ".join(filter(None, parts))


def _unescape(text: str) -> str:
    return text.replace("\\(", "(").replace("\\)", ")")
