"""What counts in the choice between swaps beside the similarity of the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING

import torch

from .readability import as_written, load_language_model
from .space import TokenSpace

if TYPE_CHECKING:
    from .clip.text import Words
    from .learn import Frame
    from .readability import LanguageModel
    from .refine import Prior

# Similarity that one natural unit of likelihood per token is worth at readability 1. Word salad
# and captions are six apart, and similarities of good and fair prompts a tenth.
_WORTH = 0.05


def check_readability(
    readability: object, language_model: LanguageModel | None, device: str | torch.device
) -> LanguageModel | None:
    """The language model that is needed; raise unless `readability` is a number from 0 to 1.

    Raises:
        TypeError, ValueError: it is not, or no language model is at hand.
    """
    if isinstance(readability, bool) or not isinstance(readability, Real):
        raise TypeError(f"`readability` has to be a number but is {readability!r}.")
    if not 0 <= readability <= 1:
        raise ValueError(f"`readability` has to be from 0 to 1 but is {readability}.")
    if readability and language_model is None:
        return _bundled_language_model(torch.device(device))
    return language_model


@lru_cache(maxsize=1)
def _bundled_language_model(device: torch.device) -> LanguageModel:
    """Kept, since to load it and to read a vocabulary with it takes as long as a search."""
    return load_language_model(device=device)


class Reading:
    """A `Prior` of `pez_core.refine`: prompts that read like text are worth some similarity.

    Args:
        language_model: from `load_language_model`.
        words: of the CLIP.
        frame: the text around the learned part, which is read with it.
        space: whose allowed tokens may be swapped in.
        readability: from 0 to 1, how much it is worth.
    """

    recordable = False

    def __init__(
        self,
        language_model: LanguageModel,
        words: Words,
        frame: Frame,
        space: TokenSpace,
        readability: float,
    ) -> None:
        self.language_model, self.words, self.frame = language_model, words, frame
        self.worth = readability * _WORTH
        self._before = words.decode(frame.before).split()
        printed = [words.decode([token]) for token in space.allowed.tolist()]
        self._table = language_model.table([word if word.strip() else "?" for word in printed])
        self._known: dict[tuple[int, ...], float] = {}

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) how likely each token is behind what precedes.

        Scaled like `score`, as a token's part in the mean.
        """
        left = [
            [*self._before, *(self.words.decode([token]) for token in row[:position])]
            for row in ids.tolist()
        ]
        texts = [as_written(" ".join(words)) for words in left]
        likely = self.language_model.next_words(texts, self._table)
        return (likely * self.worth / ids.shape[1]).to(ids.device)

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,) what their readability is worth."""
        return torch.tensor(self.worth_of(ids.tolist()), device=ids.device)

    def worth_of(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """What the readability of each prompt is worth; the model is asked once for each."""
        keys = [tuple(row) for row in rows]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            scores = self.language_model.readability_score([self.frame.text(key) for key in new])
            self._known.update(zip(new, (scores * self.worth).tolist(), strict=True))
        return [self._known[key] for key in keys]

    def perplexities(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Perplexity of each prompt."""
        texts = [as_written(self.frame.text(row)) for row in rows]
        return self.language_model.perplexity(texts).tolist()


# What a standard deviation of familiarity counts beside one of similarity.
FAMILIAR = 0.7


class WordsAlone:
    """A `Prior` of `pez_core.refine`: words that mean something by themselves are worth more.

    A search finds combinations of words that only the CLIP that it runs on takes for the target.
    Two things tell how a word will be read by others: how similar it is to the target by itself,
    and how well the CLIP has learned it (`familiarity`). Such words can be told apart, too, when
    people edit the prompt. By how much that helps is in benchmarks/results/remedies.md.

    Args:
        alone: (allowed, features) unit features of each allowed token of `space` as a text by
            itself.
        space: of the search.
        towards: (problems, features) whose dot product with a prompt's features is its score.
        weight: what each word's own similarity counts beside that of the prompt.
    """

    recordable = True

    def __init__(
        self, alone: torch.Tensor, space: TokenSpace, towards: torch.Tensor, weight: float
    ) -> None:
        similar = towards @ alone.T
        spread = similar.std(dim=1, correction=0, keepdim=True)
        known = familiarity(space.table[space.allowed]).to(similar)
        self._worth = weight * (similar + FAMILIAR * spread * known)
        # where in `allowed` each token is
        self._places = torch.zeros(len(space.table), dtype=torch.long, device=towards.device)
        self._places[space.allowed] = torch.arange(len(space.allowed), device=towards.device)

    def _problems(self, rows: int) -> torch.Tensor:
        every = torch.arange(len(self._worth), device=self._worth.device)
        return every.repeat_interleave(rows // len(every))

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) each token's part in `score`."""
        return self._worth[self._problems(len(ids))]

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,) what their words alone are worth."""
        return self._worth[self._problems(len(ids))[:, None], self._places[ids]].sum(dim=1)


@torch.no_grad()
def familiarity(embeddings: torch.Tensor) -> torch.Tensor:
    """(n, dim) embeddings of tokens -> (n,) how much a model has learned of each, by rank.

    All begin around one point, and training moves each whenever it is read, so that rare ones stay
    near the mean (Land and Bartolo 2024, "Fishing for Magikarp", find under-trained tokens by their
    embeddings, too). Ranks, scaled to mean 0 and variance 1, since distances differ by model.
    """
    distance = (embeddings.float() - embeddings.float().mean(dim=0)).norm(dim=1)
    rank = distance.argsort().argsort().float()
    return (rank / max(1, len(rank) - 1) - 0.5) * 12**0.5


class Sum:
    """Several priors as one."""

    def __init__(self, priors: Sequence[Prior]) -> None:
        self.priors = priors
        self.recordable = all(prior.recordable for prior in priors)

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """The sum of those of the priors."""
        return sum(prior.screen(ids, position) for prior in self.priors)

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """The sum of those of the priors."""
        return sum(prior.score(ids) for prior in self.priors)
