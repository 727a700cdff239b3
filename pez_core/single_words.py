"""A prior of single words: how similar they are to the target alone, and how well learned."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .space import TokenSpace

if TYPE_CHECKING:
    from .clip import AnyClip

# Weight of single words' own similarity for prompts of images, where it raises the similarity to a
# held-out CLIP (benchmarks/results/remedies.md). For prompts of texts it lowers the similarity.
WORD_WEIGHT = 0.035
# Weight of a standard deviation of familiarity against one of similarity.
FAMILIAR = 0.7
# Words that the mean similarity and its deviation are measured on, and those that are encoded at
# once; the second numbers are for towers where each word takes a whole context.
_SAMPLE, _AT_ONCE = (256, 64), (2048, 64)
# Features are kept with the CLIP. A few are computed again to find out whether its weights have
# changed, within rounding.
_KEPT, _PROBES, _ROUNDING = "single tokens", 4, 1e-3


class WordFeatures:
    """Unit text features of tokens, each a text by itself, computed when they are asked for.

    They are kept in `clip.cache` for the next search, as long as the weights stay the same.

    Args:
        clip: from `load_clip`.

    Attributes:
        sample: the number of tokens that are enough for a mean.
        all_at_once: the features of all tokens of a search should be asked for before it begins: a
            CUDA graph cannot compute some only, and a causal tower on a card is quick with all.
    """

    def __init__(self, clip: AnyClip) -> None:
        self._encode, self._table = clip.text.encoder(), clip.text.token_embedding
        self._at_once = _AT_ONCE[not clip.text.causal]
        self.sample = _SAMPLE[not clip.text.causal]
        self.all_at_once = clip.device.type != "cpu" and clip.text.causal
        kept = clip.cache.get(_KEPT)
        if kept is None or kept[0].device != clip.device or not self._holds(*kept):
            size = len(self._table)
            kept = (
                torch.zeros(size, 0, device=clip.device),
                torch.zeros(size, dtype=torch.bool, device=clip.device),
            )
        self._values, self._computed = kept
        self._cache = clip.cache

    def _holds(self, values: torch.Tensor, computed: torch.Tensor) -> bool:
        """Whether the weights still have these features."""
        ids = computed.nonzero()[:, 0]
        ids = ids[:: -(-len(ids) // _PROBES)]
        return torch.allclose(self._features(ids), values[ids], atol=_ROUNDING)

    @torch.no_grad()
    def _features(self, ids: torch.Tensor) -> torch.Tensor:
        rows = [
            F.normalize(
                self._encode(F.embedding(part[:, None], self._table).float()).float(), dim=-1
            )
            for part in ids.split(self._at_once)
        ]
        return torch.cat(rows)

    def prepare(
        self, ids: torch.Tensor, time_limit: float | None, waiting: Callable[[], bool]
    ) -> bool:
        """Compute the features of (n,) ids; a tower that is not causal may take long for them.

        Such a tower is timed with a few words first, and `waiting` is called behind every block.

        Returns:
            False where it would take longer than `time_limit` seconds, or `waiting` was true.
        """
        if self._at_once == _AT_ONCE[0]:
            self(ids)
            return True
        new, began = ids[~self._computed[ids]].unique(), time.monotonic()
        done = 0
        for block in (new[:_PROBES], *new[_PROBES:].split(self._at_once)):
            self(block)
            done += len(block)
            expected = (time.monotonic() - began) * len(new) / max(1, done)
            if (time_limit is not None and expected > time_limit) or waiting():
                return False
        return True

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(n,) ids -> (n, features)."""
        new = ids[~self._computed[ids]].unique()
        if len(new):
            features = self._features(new)
            if not self._values.shape[1]:
                self._values = features.new_zeros(len(self._table), features.shape[1])
            self._values[new], self._computed[new] = features, True
            self._cache[_KEPT] = self._values, self._computed
        return self._values[ids]


class SingleWordPrior:
    """A `Prior` for `refine` that favours words which resemble the target on their own.

    A search finds combinations of words that only its own CLIP finds similar to the target. Two
    properties of a single word predict how other models read it: the similarity of the word alone
    with the target, and how well the CLIP has learned it (`familiarity`, by its embedding). The
    score of a prompt is the sum over its tokens of

        weight * (similarity + 0.7 * spread * familiarity),

    where the spread is the standard deviation of the similarities of words. `refine` adds it to the
    score of its objective. benchmarks/results/remedies.md has the measured gain.

    To encode every word of a large vocabulary would cost more than a whole search. So the mean
    similarity, which `screen` takes for words that were not compared yet, and the spread are those
    of a sample, and a word is encoded when it is about to be compared in a prompt.

    Args:
        features: of single tokens.
        space: the `TokenSpace` of the search.
        towards: (problems, features), the target of each problem: the score of a prompt by the
            objective is the dot product of its unit features with this row.
        weight: of one word, compared with the prompt, whose similarity has weight 1; such as
            `WORD_WEIGHT` (0.035).
    """

    def __init__(
        self, features: WordFeatures, space: TokenSpace, towards: torch.Tensor, weight: float
    ) -> None:
        self._features, self._towards, self._weight = features, towards, weight
        self.capturable = features.all_at_once
        self._allowed = allowed = space.allowed
        similar = towards @ features(sample_of(allowed, features)).T
        spread = similar.std(dim=1, correction=0, keepdim=True)
        familiar = familiarity(space.table[allowed]).to(similar)
        self._by_familiarity = FAMILIAR * spread * familiar
        self._values = weight * (similar.mean(dim=1, keepdim=True) + self._by_familiarity)
        self._met = torch.zeros_like(self._values, dtype=torch.bool)
        # the position of each token in `allowed`
        self._places = torch.zeros(len(space.table), dtype=torch.long, device=towards.device)
        self._places[allowed] = torch.arange(len(allowed), device=towards.device)
        if features.all_at_once:
            self._values = weight * (towards @ features(allowed).T + self._by_familiarity)

    def _problems(self, rows: int) -> torch.Tensor:
        every = torch.arange(len(self._values), device=self._values.device)
        return every.repeat_interleave(rows // len(every))

    def _meet(self, problems: torch.Tensor, places: torch.Tensor) -> None:
        """Replace the estimates of these tokens, in tensors of one shape."""
        new = ~self._met[problems, places]
        if self._features.all_at_once or not new.any():
            return
        problems, places = problems[new], places[new]
        similar = (self._features(self._allowed[places]) * self._towards[problems]).sum(dim=1)
        self._values[problems, places] = self._weight * (
            similar + self._by_familiarity[problems, places]
        )
        self._met[problems, places] = True

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) estimates of what each token adds."""
        return self._values[self._problems(len(ids))]

    def corrections(self, swaps: torch.Tensor) -> torch.Tensor:
        """(rows, count, n) swaps -> (rows, count) exact value of their first token less `screen`'s.

        Later calls of `screen` return the exact value.
        """
        problems = self._problems(len(swaps))[:, None].expand(swaps.shape[:2])
        places = self._places[swaps[..., 0].clamp(min=0)]
        before = self._values[problems, places]
        self._meet(problems, places)
        return self._values[problems, places] - before

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,) sum over their words."""
        problems, places = self._problems(len(ids))[:, None].expand(ids.shape), self._places[ids]
        self._meet(problems, places)
        return self._values[problems, places].sum(dim=1)


def sample_of(allowed: torch.Tensor, features: WordFeatures) -> torch.Tensor:
    """The words of a space that a mean is measured on."""
    return allowed[:: -(-len(allowed) // features.sample)]


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
