"""What a learning node has found, in a form that fits into a workflow file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from ..pez_core import Result

Points = list[tuple[Any, float]]


@dataclass
class Found:
    """One prompt and what the screen shows of it.

    Attributes:
        prompt: the text.
        similarity: cosine similarity with its target.
        candidates: prompt and similarity of every restart, best first.
        words: each word and what it adds.
        curve: step and best similarity by then.
        similarities: with each target, in their order.
        tokens_saved: against the prompt that was given, where one was.
        note: what a person should know.
    """

    prompt: str
    similarity: float
    candidates: Points = field(default_factory=list)
    words: Points = field(default_factory=list)
    curve: Points = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)
    tokens_saved: int = 0
    note: str = ""

    @classmethod
    def of(cls, result: Result, words: Points) -> Found:
        """What `pez_core` returned."""
        candidates = result.candidates or [result]
        return cls(
            prompt=result.prompt,
            similarity=result.similarity,
            candidates=[(c.prompt, c.similarity) for c in candidates],
            words=words,
            similarities=result.similarities,
            tokens_saved=getattr(result, "tokens_saved", 0),
            note=result.note,
        )

    def to_json(self) -> dict[str, Any]:
        """With numbers as short as anyone reads them."""

        def short(value: Any) -> Any:
            if isinstance(value, float):
                return round(value, 5)
            return [short(one) for one in value] if isinstance(value, (list, tuple)) else value

        return {name: short(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Any) -> Found:
        """Read what `to_json` made; a workflow is a stranger's file, so everything is looked at.

        Raises:
            ValueError: it is something else.
        """
        try:
            found = cls(**values)
            points = [*found.candidates, *found.words, *found.curve]
            good = (
                isinstance(found.prompt, str)
                and isinstance(found.note, str)
                and isinstance(found.tokens_saved, int)
                and all(isinstance(text, str) for text, _ in [*found.candidates, *found.words])
                and all(
                    isinstance(number, Real) and math.isfinite(number)
                    for number in [found.similarity, *found.similarities, *(n for _, n in points)]
                )
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError("not a learned prompt") from error
        if not good:
            raise ValueError("not a learned prompt")
        return found
