"""Priors: terms beside the similarity that count in the choice between swaps."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import reduce
from typing import TYPE_CHECKING

import torch

from .readability import as_written, load_language_model
from .space import TokenSpace
from .token_lm import FixedText, Shape, State, TokenLM, chosen, repeated

if TYPE_CHECKING:
    from .caption import Caption
    from .clip.text import Words
    from .readability import LanguageModel
    from .swaps import Prior

# Weight of one nat of log-likelihood per token at readability 1. Word salad and captions differ by
# six nats, good and fair prompts by a similarity of 0.1.
_NAT = 0.05
_TOKEN_NAT = 0.1  # the same for a `TokenLM`, whose texts are captions
_ROWS = 512  # prompts that a `TokenLM` reads at once


def needed_language_model(
    readability: float,
    language_model: LanguageModel | None,
    device: str | torch.device,
    words: Words | None = None,
) -> LanguageModel | None:
    """The language model of a search; where one is missing, the small one is loaded.

    Args:
        readability: its weight; 0: none is needed.
        language_model: that was given.
        device: to load one on.
        words: of the CLIP; with CLIP's own tokenizer the `TokenLM` of the package serves. None:
            with another one.

    Raises:
        ArgumentError: its package is missing.
    """
    if readability and language_model is None and not (words and reads_like_clip(words)):
        return load_language_model(device=device)
    return language_model


def reads_like_clip(words: Words) -> bool:
    """Whether a tokenizer is CLIP's own, for which the `TokenLM` of the package was trained."""
    return words.separable and words.size == Shape.vocab_size


def kind_of(wording: str) -> str:
    """The one of `KINDS` that prompts of a wording are read as."""
    return "text" if wording == "free" else wording


class ReadabilityPrior:
    """A `Prior` of `pez_core.swaps`: the likelihood of the prompt under a language model.

    Args:
        language_model: from `load_language_model`.
        words: of the CLIP.
        caption: the fixed text, a part of the text that the language model scores.
        space: its allowed tokens are the candidates for swaps.
        readability: from 0 to 1, the weight of the likelihood.
    """

    capturable = False

    def __init__(
        self,
        language_model: LanguageModel,
        words: Words,
        caption: Caption,
        space: TokenSpace,
        readability: float,
    ) -> None:
        self.language_model, self.caption = language_model, caption
        self.weight = readability * _NAT
        printed = [words.decode([token]) for token in space.allowed.tolist()]
        self._table = language_model.table([word if word.strip() else "?" for word in printed])
        self._scores: dict[tuple[int, ...], float] = {}

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) likelihood of each token behind those before.

        Scaled like `score`, as a token's part in the mean.
        """
        left = [self.caption.words_before(row, position) for row in ids.tolist()]
        texts = [as_written(" ".join(words)) for words in left]
        likely = self.language_model.next_words(texts, self._table)
        return (likely * self.weight / ids.shape[1]).to(ids.device)

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,) weighted likelihood per token."""
        return torch.tensor(self.scores_of(ids.tolist()), device=ids.device)

    def corrections(self, swaps: torch.Tensor) -> float:
        """Nothing: what `screen` said of a token stands."""
        return 0.0

    def scores_of(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """`score` of lists of ids; the language model reads each prompt once."""
        keys = [tuple(row) for row in rows]
        new = [key for key in dict.fromkeys(keys) if key not in self._scores]
        if new:
            scores = self.language_model.readability_score([self.caption.text(key) for key in new])
            self._scores.update(zip(new, (scores * self.weight).tolist(), strict=True))
        return [self._scores[key] for key in keys]

    def perplexities(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Perplexity of each prompt."""
        texts = [as_written(self.caption.text(row)) for row in rows]
        return self.language_model.perplexity(texts).tolist()


class FluencyPrior:
    """A `Prior` of `pez_core.swaps`: the likelihood of the prompt under a `TokenLM`.

    The score of a prompt is the mean log-likelihood of its tokens, of fixed text behind the learned
    ones and of the end, which counts four times, times a weight.

    Args:
        model: the language model, on the device of the search.
        caption: the fixed text, which the model reads too.
        space: its allowed tokens are the candidates for swaps.
        prompt_len: tokens to learn.
        kind: one of `KINDS`.
        readability: from 0 to 1, the weight of the likelihood.

    Raises:
        ArgumentError: the model reads fewer tokens than are learned.
    """

    def __init__(
        self,
        model: TokenLM,
        caption: Caption,
        space: TokenSpace,
        prompt_len: int,
        kind: str,
        readability: float,
    ) -> None:
        self.model, self.caption, self.space = model, caption, space
        self.weight = readability * _TOKEN_NAT
        # elsewhere to look for equal beginnings would wait for the device
        self._joins_beginnings = space.table.device.type == "cpu"
        self.capturable = not self._joins_beginnings
        # -1 stands for a learned token
        behind = caption.ids([-1] * prompt_len)[len(caption.before) :]
        around = FixedText(model, caption.before, behind, kind)
        self.fixed, self.slots = around.tokens, around.slots
        self.places: list[int] = around.slots.tolist()
        self._shares, self.start = around.shares, around.start
        self.token_weight = self.weight / float(around.shares.sum())
        self._lead: tuple[torch.Tensor, int, torch.Tensor] | None = None
        # the position of each token in `allowed`
        self._rank = torch.zeros_like(space.table[:, 0], dtype=torch.long)
        self._rank[space.allowed] = torch.arange(len(space.allowed), device=space.table.device)

    def reader(self, rows: int) -> FluentReader:
        """A reader of prompts that begin with no learned token."""
        query, state = self.start
        return FluentReader(self, query[:, -1].expand(rows, -1), repeated(state, rows))

    def tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) learned ids -> (rows, n) with the fixed ones between and behind."""
        whole = self.fixed.repeat(len(ids), 1)
        whole[:, self.slots] = ids
        return whole

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) likelihood of each token behind those before.

        Scaled like `score`, as a token's part in the mean.
        """
        before = self.tokens(ids)[:, : self.places[position]]
        query, state = self.start
        queries = query.expand(len(ids), -1, -1)
        if before.shape[1]:
            queries, _ = self.model.extend(before, repeated(state, len(ids)))
        likely = self.model.next_tokens(queries[:, -1], self.space.allowed) * self.token_weight
        self._lead = ids, position, likely
        return likely

    def corrections(self, swaps: torch.Tensor) -> torch.Tensor | float:
        """(rows, count, n) swaps -> (rows, count) likelihood of the tokens behind the first one."""
        if self._lead is None:
            return 0.0
        ids, position, likely = self._lead
        swapped = self.space.swapped(ids, swaps, position)
        exact = self.score(swapped.flatten(0, 1)).view(swaps.shape[:2])
        return exact - likely.gather(1, self._rank[swaps[..., 0].clamp(min=0)])

    @torch.no_grad()
    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,) weighted mean log-likelihood."""
        parts = [self._likely(rows) @ self._shares for rows in self.tokens(ids).split(_ROWS)]
        return torch.cat(parts) * self.token_weight

    def _likely(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, n) tokens behind `start` -> (rows, n) their log-likelihoods.

        The candidates of a step have the same tokens before its position; these are read once.
        """
        query, state = self.start
        first = 0 if self._lead is None else self.places[self._lead[1]]
        if not (first and self._joins_beginnings):
            return self._read_behind(query, state, rows)
        shared, which = rows[:, :first].unique(dim=0, return_inverse=True)
        if 2 * len(shared) > len(rows):
            return self._read_behind(query, state, rows)
        queries, state = self.model.extend(shared, repeated(state, len(shared)))
        before = torch.cat([query.expand(len(shared), -1, -1), queries[:, :-1]], dim=1)
        head = self.model.likelihoods(before, shared)[which]
        state = chosen(state, which)
        return torch.cat([head, self._read_behind(queries[which, -1:], state, rows[:, first:])], 1)

    def _read_behind(self, query: torch.Tensor, state: State, rows: torch.Tensor) -> torch.Tensor:
        """(rows, n) tokens behind a state, of one row or of each -> (rows, n) as above."""
        queries = query.expand(len(rows), -1, -1)
        if rows.shape[1] > 1:
            few = len(query) < len(rows)
            state = repeated(state, len(rows)) if few else state
            behind, _ = self.model.extend(rows[:, :-1], state)
            queries = torch.cat([queries, behind], dim=1)
        return self.model.likelihoods(queries, rows)

    def scores_of(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """`score` of lists of ids."""
        return self.score(torch.tensor(rows, device=self.fixed.device)).tolist()

    @torch.no_grad()
    def perplexities(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Perplexity by token of each prompt, the end of the text included."""
        ids = torch.tensor(rows, device=self.fixed.device)
        return (-self._likely(self.tokens(ids)).mean(dim=1)).exp().tolist()


class FluentReader:
    """Reads learned tokens one by one, in several prompts at once; see `FluencyPrior.reader`."""

    def __init__(self, prior: FluencyPrior, query: torch.Tensor, state: State) -> None:
        self._prior, self._query, self._state, self._place = prior, query, state, 0
        self._skip_fixed()

    def _skip_fixed(self) -> None:
        """Read the fixed text in front of the next learned token."""
        places = self._prior.places
        done = places[self._place - 1] + 1 if self._place else 0
        if self._place < len(places) and done < places[self._place]:
            fixed = self._prior.fixed[done : places[self._place]]
            self._extend(fixed.expand(len(self._query), -1))

    def _extend(self, ids: torch.Tensor) -> None:
        queries, self._state = self._prior.model.extend(ids, self._state)
        self._query = queries[:, -1]

    @torch.no_grad()
    def next_tokens(self) -> torch.Tensor:
        """(rows, allowed) log-likelihood of each token that may come next."""
        return self._prior.model.next_tokens(self._query, self._prior.space.allowed)

    @torch.no_grad()
    def read(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> None:
        """Read (n,) tokens, each behind the prompt of one of (n,) `parents`; None: in order."""
        if parents is not None:
            self._state = chosen(self._state, parents)
        self._extend(tokens[:, None])
        self._place += 1
        self._skip_fixed()

    def of(self, rows: torch.Tensor) -> FluentReader:
        """A reader of some of the prompts, which goes on by itself."""
        other = copy(self)
        other._query, other._state = self._query[rows], chosen(self._state, rows)
        return other


class SumOfPriors:
    """Several priors as one."""

    def __init__(self, priors: Sequence[Prior]) -> None:
        self.priors = priors
        self.capturable = all(prior.capturable for prior in priors)

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """The sum over the priors."""
        return reduce(torch.add, (prior.screen(ids, position) for prior in self.priors))

    def corrections(self, swaps: torch.Tensor) -> torch.Tensor | float:
        """The sum over the priors."""
        return sum(prior.corrections(swaps) for prior in self.priors)

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """The sum over the priors."""
        return reduce(torch.add, (prior.score(ids) for prior in self.priors))
