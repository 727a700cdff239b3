"""Results of a search and reports while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .scoring import WordContribution


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The steps of Algorithm 1 for one candidate, in main memory.

    Attributes:
        ids: (steps, trials, prompt_len) projected tokens. The efforts but `"paper"` have several
            trials.
        losses: (steps, trials) their losses.
        embeddings: (steps, trials, prompt_len, dim) the continuous prompts before projection.
    """

    ids: torch.Tensor
    losses: torch.Tensor
    embeddings: torch.Tensor


@dataclass(frozen=True)
class Candidate:
    """The prompt of one restart.

    Attributes:
        prompt: the text, with the caption around the learned words.
        similarity: cosine similarity of the text with its target. The text is encoded again by the
            public tokenizer and the whole text tower. With several targets it is their weighted
            mean, with several encoders the mean over them. Targets to avoid do not count, unless
            there are no others.
        token_ids: the tokens of the text, without start and end token.
        learned: the learned words alone.
        similarities: with each target, in the order given.
        avoided: with each target to avoid, in the order given.
        encoders: `similarity` by the name of the encoder.
        extra_loss: the extra loss of the printed text; None: there was none.
        perplexity: of the text, by the language model of `readability`; None: there was none.
        loop_similarity: as `similarity`, of the tokens that the search chose, which the loop sees.
            Only with `effort="paper"`, whose printed text may be read as other tokens; None
            otherwise, where both are the same tokens.
        trajectory: the steps of Algorithm 1, where `SearchOptions.trajectory` asks for them.
    """

    prompt: str
    similarity: float
    token_ids: list[int]
    learned: str
    similarities: list[float] = field(repr=False)
    avoided: list[float] = field(repr=False)
    encoders: dict[str, float] = field(repr=False)
    extra_loss: float | None = field(default=None, kw_only=True)
    perplexity: float | None = field(default=None, kw_only=True)
    loop_similarity: float | None = field(default=None, kw_only=True)
    trajectory: Trajectory | None = field(default=None, repr=False, compare=False, kw_only=True)


@dataclass(frozen=True)
class Result(Candidate):
    """The best candidate of a search.

    Attributes:
        candidates: one per restart, best first; the first is this result's own prompt. Empty where
            nothing was learned, or where sections were learned one by one.
        history: `(step, score of the best so far)`, one per report. The score is the similarity
            less the weighted similarity with targets to avoid; with an extra loss of weight w it is
            1 - w of that, less w times the loss. Where a prior (single words, readability) counts
            in the choice, it may fall a little.
        seconds: of the whole search, shared by all results of one call.
        tower_flops: the work of the text tower in it, shared as well; see
            `pez_core.tower_work.TowerWork`. It compares methods independently of the machine.
        note: a remark for the user, "" most of the time.
    """

    candidates: list[Candidate] = field(repr=False)
    history: list[tuple[int, float]] = field(repr=False)
    seconds: float
    tower_flops: float = 0.0
    note: str = ""


class Report:
    """The state of a running search, for a callback; prompts are decoded only when they are read.

    Attributes:
        step, steps: steps done, and how many there will be.
        elapsed: seconds since the call began.
        similarities: the score of the best prompt so far of each result (see `Result.history`).
        part: steps done and all steps of the part of the search that runs, whose steps take about
            the same time; and whether another part follows. Prompts are first descended, then
            refined.
    """

    def __init__(
        self,
        step: int,
        steps: int,
        elapsed: float,
        similarities: Sequence[float],
        decode: Callable[[int], str],
        explain: Callable[[int, str | None], list[WordContribution]],
        part: tuple[int, int, bool] | None = None,
    ) -> None:
        self.step, self.steps, self.elapsed = step, steps, elapsed
        self.similarities = list(similarities)
        self._decode, self._explain = decode, explain
        self.part = (step, steps, False) if part is None else part

    def within(self, turn: int, turns: int, before: float) -> Report:
        """This report as part of `turns` searches of equal length.

        Args:
            turn: the number of its search, from 0.
            turns: searches.
            before: seconds of the searches before.
        """
        step, steps = self.step + turn * self.steps, turns * self.steps
        done, of, follows = self.part
        part = done, of, follows or turn < turns - 1
        elapsed, decode, explain = before + self.elapsed, self._decode, self._explain
        return Report(step, steps, elapsed, self.similarities, decode, explain, part)

    @property
    def _best(self) -> int:
        return max(range(len(self.similarities)), key=self.similarities.__getitem__)

    @property
    def similarity(self) -> float:
        """The highest of `similarities`."""
        return self.similarities[self._best]

    @property
    def prompt(self) -> str:
        """The best prompt so far of all results."""
        return self.prompts[self._best]

    @cached_property
    def prompts(self) -> list[str]:
        """The best prompt so far of each result."""
        return [self._decode(k) for k in range(len(self.similarities))]

    def explain(self, k: int, prompt: str | None = None) -> list[WordContribution]:
        """The contribution of each word of the prompt of result `k`, or of `prompt` for it."""
        return self._explain(k, prompt)


ReportCallback = Callable[[Report], "bool | None"]


def best_of_restarts(
    ids: torch.Tensor, scores: torch.Tensor, restarts: int
) -> tuple[list[list[int]], list[float]]:
    """The best (prompts * restarts, prompt_len) ids of each prompt, and their scores."""
    scores, best = scores.view(-1, restarts).max(dim=1)
    rows = ids.view(len(best), restarts, -1)
    chosen = rows[torch.arange(len(rows), device=best.device), best].tolist()
    return chosen, scores.tolist()
