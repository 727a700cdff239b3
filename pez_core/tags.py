"""The phrases of a prompt of tags: those between its commas, in the order of their importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tags:
    """The learned tokens of a prompt.

    Attributes:
        comma: its token.
        phrases: the tokens between the commas; two commas side by side have none between them.
        movable: the numbers of the phrases that may change places.
    """

    comma: int
    phrases: list[list[int]]
    movable: list[int]

    @classmethod
    def of(
        cls, ids: Sequence[int], comma: int, before: Sequence[int], behind: Sequence[int]
    ) -> Tags:
        """The phrases of some learned tokens.

        Args:
            ids: of the learned tokens.
            comma: its token.
            before, behind: ids of the fixed text. A phrase that goes on in it keeps its place.
        """
        phrases: list[list[int]] = [[]]
        for token in ids:
            if token == comma:
                phrases.append([])
            else:
                phrases[-1].append(token)
        first = int(bool(before) and before[-1] != comma)
        last = len(phrases) - int(bool(behind) and behind[0] != comma)
        return cls(comma, phrases, [k for k in range(first, last) if phrases[k]])

    def without(self) -> list[list[int]]:
        """The tokens without each of the movable phrases; [] where fewer than two are movable."""
        if len(self.movable) < 2:
            return []
        return [self._joined(self.phrases[:k] + self.phrases[k + 1 :]) for k in self.movable]

    def orders(self, scores: Sequence[float]) -> list[list[int]]:
        """The tokens with all movable phrases in order, and with the first of these moved alone.

        Args:
            scores: of `without`. The lower one is, the more is lost with its phrase, and the
                earlier the phrase comes.
        """
        order = sorted(range(len(scores)), key=scores.__getitem__)
        return [
            self._reordered(one) for one in (order, sorted(order, key=lambda k: (k != order[0], k)))
        ]

    def _reordered(self, order: Sequence[int]) -> list[int]:
        phrases = list(self.phrases)
        for place, k in zip(self.movable, order, strict=False):
            phrases[place] = self.phrases[self.movable[k]]
        return self._joined(phrases)

    def _joined(self, phrases: Sequence[Sequence[int]]) -> list[int]:
        return [token for phrase in phrases for token in (self.comma, *phrase)][1:]
