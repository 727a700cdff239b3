"""A term that makes the words of a prompt differ, for searches in benchmarks.

It is like the "disentangling" reward of a method that samples prompts from a diffusion language
model, known here by a summary of it alone. `pictures.py` measures what it brings to a search: less
than the rule that no word occurs twice, so that `pez_core` has the rule and not the term.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from pez_core import runner
from pez_core.priors import SumOfPriors
from pez_core.problem import Problem
from pez_core.single_words import WordFeatures

KINDS = ("pairs", "nearest")


class DistinctWords:
    """A `Prior` of `pez_core.swaps`: the words of a prompt should not mean the same.

    The score of a prompt is -weight times the mean over pairs of its words ("pairs"), or over its
    words the mean of that with the most similar other one ("nearest"), of the cosine of their text
    features, each less the mean over the vocabulary; below 0 counts as 0. Words that may occur
    twice do not count.

    Args:
        problem: the search, which has to have a vocabulary of single tokens.
        weight: see above; the similarity has 1.
        kind: one of `KINDS`.
    """

    capturable = False

    def __init__(self, problem: Problem, weight: float, kind: str) -> None:
        allowed = problem.space.allowed
        features = WordFeatures(problem.clip)(allowed)
        features = F.normalize(features - features.mean(dim=0), dim=1)
        counted = problem.space._is_once(allowed)
        self._directions = features.new_zeros(len(problem.space.table), features.shape[1])
        self._directions[allowed] = features * counted[:, None]
        self._allowed, self._weight, self._kind = allowed, weight, kind

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) part of each token in `score`."""
        others = torch.cat([ids[:, :position], ids[:, position + 1 :]], dim=1)
        alike = self._directions[self._allowed] @ self._directions[others].mT
        return -self._weight * self._of_word(alike.clamp(min=0), ids.shape[1])

    def _of_word(self, alike: torch.Tensor, prompt_len: int) -> torch.Tensor:
        """(..., others) similarities of a word with all others -> (...)"""
        if self._kind == "pairs":
            return 2 * alike.sum(-1) / (prompt_len * (prompt_len - 1))
        return alike.amax(-1) / prompt_len

    def corrections(self, swaps: torch.Tensor) -> float:
        """Nothing: `screen` is exact but for the other words."""
        return 0.0

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,)"""
        rows = self._directions[ids]
        alike = (rows @ rows.mT).clamp(min=0)
        alike = alike * (1 - torch.eye(ids.shape[1], device=ids.device))
        parts = self._of_word(alike, ids.shape[1]).sum(-1)
        # each pair was met from both of its words
        return -self._weight * (parts / 2 if self._kind == "pairs" else parts)


@contextmanager
def words_differ(weight: float, kind: str = KINDS[0]) -> Iterator[None]:
    """Searches in this context have the term, too."""
    usual = runner._prior

    def with_term(problem: Problem, *given: Any) -> Any:
        prior, term = usual(problem, *given), DistinctWords(problem, weight, kind)
        return SumOfPriors([term] if prior is None else [prior, term])

    with patch.object(runner, "_prior", with_term):
        yield
