"""Priors: terms beside the similarity that count in the choice between swaps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch

from .readability import as_written, load_language_model
from .space import TokenSpace

if TYPE_CHECKING:
    from .caption import Caption
    from .clip.text import Words
    from .readability import LanguageModel
    from .swaps import Prior

# Weight of one nat of log-likelihood per token at readability 1. Word salad and captions differ by
# six nats, good and fair prompts by a similarity of 0.1.
_NAT = 0.05


def needed_language_model(
    readability: float, language_model: LanguageModel | None, device: str | torch.device
) -> LanguageModel | None:
    """The language model of a search; where it is missing, the small one is loaded.

    Raises:
        ArgumentError: its package is missing.
    """
    if readability and language_model is None:
        return load_language_model(device=device)
    return language_model


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
