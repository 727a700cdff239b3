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


# Weight of single words' own similarity for prompts of images, where it raises the similarity to a
# held-out CLIP (benchmarks/results/remedies.md). For prompts of texts it lowers the similarity.
WORD_WEIGHT = 0.035
# Weight of a standard deviation of familiarity against one of similarity.
FAMILIAR = 0.7


class SingleWordPrior:
    """A `Prior` for `refine` that favours words which resemble the target on their own.

    A search finds combinations of words that only its own CLIP finds similar to the target. Two
    properties of a single word predict how other models read it: the similarity of the word alone
    with the target, and how well the CLIP has learned it (`familiarity`, by its embedding). The
    score of a prompt is the sum over its tokens of

        weight * (similarity + 0.7 * spread * familiarity),

    where the spread is the standard deviation of the similarities of all allowed tokens. `refine`
    adds it to the score of its objective. benchmarks/results/remedies.md has the measured gain.

    Args:
        alone: (len(space.allowed), features) text features of length 1 of each allowed token as a
            text by itself, in the order of `space.allowed`.
        space: the `TokenSpace` of the search.
        towards: (problems, features), the target of each problem: the score of a prompt by the
            objective is the dot product of its unit features with this row.
        weight: of one word, compared with the prompt, whose similarity has weight 1; such as
            `WORD_WEIGHT` (0.035).
    """

    capturable = True

    def __init__(
        self, alone: torch.Tensor, space: TokenSpace, towards: torch.Tensor, weight: float
    ) -> None:
        similar = towards @ alone.T
        spread = similar.std(dim=1, correction=0, keepdim=True)
        familiar = familiarity(space.table[space.allowed]).to(similar)
        self._values = weight * (similar + FAMILIAR * spread * familiar)
        # the position of each token in `allowed`
        self._places = torch.zeros(len(space.table), dtype=torch.long, device=towards.device)
        self._places[space.allowed] = torch.arange(len(space.allowed), device=towards.device)

    def _problems(self, rows: int) -> torch.Tensor:
        every = torch.arange(len(self._values), device=self._values.device)
        return every.repeat_interleave(rows // len(every))

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) each token's part in `score`."""
        return self._values[self._problems(len(ids))]

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,) sum over their words."""
        return self._values[self._problems(len(ids))[:, None], self._places[ids]].sum(dim=1)


@torch.no_grad()
def familiarity(embeddings: torch.Tensor) -> torch.Tensor:
    """(n, dim) embeddings of tokens -> (n,) rank of their distance from the mean embedding.

    All embeddings start around one point, and training moves a token each time it occurs, so that
    rare ones stay near the mean (Land and Bartolo 2024, "Fishing for Magikarp", find under-trained
    tokens by their embeddings, too). Ranks are scaled to mean 0 and variance 1, since distances
    differ by model.
    """
    distance = (embeddings.float() - embeddings.float().mean(dim=0)).norm(dim=1)
    rank = distance.argsort().argsort().float()
    return (rank / max(1, len(rank) - 1) - 0.5) * 12**0.5


class SumOfPriors:
    """Several priors as one."""

    def __init__(self, priors: Sequence[Prior]) -> None:
        self.priors = priors
        self.capturable = all(prior.capturable for prior in priors)

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """The sum over the priors."""
        return reduce(torch.add, (prior.screen(ids, position) for prior in self.priors))

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """The sum over the priors."""
        return reduce(torch.add, (prior.score(ids) for prior in self.priors))
