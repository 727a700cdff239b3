"""Results of a learning node, in a form that fits into a workflow file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any

from ..pez_core import Result

Points = list[tuple[Any, float]]


@dataclass
class Found:
    """One prompt, with everything that the live view shows.

    Attributes:
        prompt: the text.
        similarity: cosine similarity with its target.
        candidates: prompt and similarity of every restart, best first.
        words: each word and its contribution.
        curve: step and best similarity by then.
        similarities: with each target, in their order.
        tokens_saved: fewer than in the given prompt; 0 where none was given.
        note: a remark for people, "" most of the time.
        fixed: numbers of words before and behind the learned ones; [] where there are none.
        each: the `similarities` of every candidate; [] where there is one target.
    """

    prompt: str
    similarity: float
    candidates: Points = field(default_factory=list)
    words: Points = field(default_factory=list)
    curve: Points = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)
    tokens_saved: int = 0
    note: str = ""
    fixed: list[int] = field(default_factory=list)
    each: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, result: Result, words: Points) -> Found:
        """A result of `pez_core`."""
        candidates = result.candidates or [result]
        return cls(
            prompt=result.prompt,
            similarity=result.similarity,
            candidates=[(c.prompt, c.similarity) for c in candidates],
            words=words,
            similarities=result.similarities,
            tokens_saved=getattr(result, "tokens_saved", 0),
            note=result.note,
            each=[c.similarities for c in candidates] if len(result.similarities) > 1 else [],
        )

    def with_remark(self, remark: str) -> Found:
        """The same with a remark in front of its note."""
        return replace(self, note=" ".join(f"{remark} {self.note}".split()))

    def to_json(self) -> dict[str, Any]:
        """The fields, with numbers rounded to five digits."""

        def short(value: Any) -> Any:
            if isinstance(value, float):
                return round(value, 5)
            return [short(one) for one in value] if isinstance(value, (list, tuple)) else value

        values = {name: short(value) for name, value in asdict(self).items()}
        for name in ("fixed", "each"):
            if not values[name]:
                del values[name]  # versions without this field can then read the rest
        return values

    @classmethod
    def from_json(cls, values: Any) -> Found:
        """Read the result of `to_json`. Every value is checked: workflows come from strangers.

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
                and all(isinstance(count, int) for count in found.fixed)
                and all(isinstance(text, str) for text, _ in [*found.candidates, *found.words])
                and all(
                    isinstance(number, Real) and math.isfinite(number)
                    for number in [
                        *(found.similarity, *found.similarities, *(n for _, n in points)),
                        *(number for one in found.each for number in one),
                    ]
                )
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError("not a learned prompt") from error
        if not good:
            raise ValueError("not a learned prompt")
        return found
