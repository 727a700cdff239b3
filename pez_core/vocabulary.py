"""Rules that say which tokens may appear in a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What the rules need to know of a tokenizer; `pez_core.clip.text.Words` is one."""

    def survives(self, ids: Sequence[int]) -> bool:
        """Whether text made of `ids` is read back as the same ids."""


def round_trip_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """Sorted `ids` of the tokens that survive decode -> encode on their own.

    In CLIP's tokenizer these are whole words and punctuation, 34,277 of 49,408 tokens: a word piece
    without its word end would fuse with its neighbour when it is printed.
    """
    return [i for i in sorted(set(ids)) if tokenizer.survives([i])]
