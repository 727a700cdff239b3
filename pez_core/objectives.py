"""Objectives: the losses that a search minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from .capture import capturable


class Similarity:
    """1 - cos(f(P), g(x)) of the paper (section 4), as a weighted sum over targets.

    Args:
        encode: (rows, prompt_len, dim) token embeddings -> (rows, features).
        targets: (problems, n, features) target features, normalised here; n targets per problem.
        weights: (problems, n), below 0 for a target to avoid. None: the mean over targets.
    """

    capturable = True

    def __init__(
        self,
        encode: Any,
        targets: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        self.encode = encode
        targets = F.normalize(targets.float(), dim=-1)
        if weights is None:
            weights = targets.new_full(targets.shape[:2], 1 / targets.shape[1])
        # a weighted sum of cosines with unit targets is one dot product with their weighted sum
        self.target = (targets * weights[..., None]).sum(dim=1)

    def __call__(self, embeddings: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.normalize(self.encode(embeddings).float(), dim=-1)
        # one row per problem, or as many candidates for each, all those of a problem in a row
        rows = features.view(len(self.target), -1, features.shape[-1])
        similarity = (rows @ self.target[..., None]).flatten()
        return 1 - similarity, similarity

    def given(self, embeddings: torch.Tensor) -> Similarity:
        """The similarity as a function of the tokens behind these (problems, n, dim) embeddings."""
        other = copy(self)
        other.encode = self.encode.given(embeddings)
        return other


class SampledSimilarity(Similarity):
    """`Similarity` whose loss is taken on a few random targets per step (section 4.3, style).

    The score that picks the best prompt is taken on all of them.

    Args:
        encode, targets, weights: as in `Similarity`; the loss of a step is the plain mean over its
            targets.
        batch_size: targets per step, drawn without replacement.
        generator: on the CPU; draws the targets.
    """

    capturable = False

    def __init__(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(encode, targets, weights)
        self.targets = F.normalize(targets.float(), dim=-1)
        self.batch_size, self.generator = batch_size, generator

    def __call__(self, embeddings: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.normalize(self.encode(embeddings).float(), dim=-1)
        rows = features.view(len(self.target), -1, features.shape[-1])
        order = torch.randperm(self.targets.shape[1], generator=self.generator)
        few = self.targets[:, order[: self.batch_size].to(features.device)].mean(dim=1)
        return 1 - (rows @ few[..., None]).flatten(), (rows @ self.target[..., None]).flatten()


class ExtraLoss(Protocol):
    """A loss beside the similarity, on token embeddings of its own.

    Attributes:
        weight: its share in the sum, above 0, at most 1; the similarity has the rest. At 1 the
            search does without the CLIP.
        prompts: the number of prompts that it is made for.
        token_embedding: (vocab_size or more, columns) fp32 tables side by side, with the CLIP's
            ids.
        parts: (columns, weight) of each table, from left to right; the weights sum to 1.
        projection: share of these tables in the projection, above 0, at most 1; the CLIP has the
            rest.
        refinable: what `objective` returns has a method `given`, as `Similarity` has, with which
            swaps can follow Algorithm 1.
    """

    weight: float
    prompts: int
    refinable: bool

    @property
    def projection(self) -> float: ...

    @property
    def token_embedding(self) -> torch.Tensor: ...

    @property
    def parts(self) -> list[tuple[int, float]]: ...

    def objective(
        self, before: Sequence[int], after: Sequence[int], goals: Sequence[int]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The loss as a function of the learned tokens.

        Args:
            before, after: ids of the fixed text around them.
            goals: the number of the prompt that each row belongs to.

        Returns:
            (rows, prompt_len, columns) embeddings -> (rows,) loss to descend.
        """
        ...

    def losses(self, texts: Sequence[str], goals: Sequence[int]) -> torch.Tensor:
        """(len(texts),) losses of printed prompts, encoded as they will be used."""
        ...


class WeightedSum:
    """A similarity and an extra loss, by weight.

    Args:
        similarity: objective on the first `columns` of the embeddings; None: the extra loss alone.
        extra: (problems, prompt_len, other columns) embeddings -> (problems,) loss.
        columns: of the similarity.
        weight: share of `extra`, above 0, at most 1.
    """

    def __init__(
        self,
        similarity: Similarity | None,
        extra: Any,
        columns: int,
        weight: float,
    ) -> None:
        self.similarity, self.extra = similarity, extra
        self.columns, self.weight = columns, weight
        parts = [extra] if similarity is None else [similarity, extra]
        self.capturable = capturable(*parts)

    def __call__(self, embeddings: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        extra = self.weight * self.extra(embeddings[..., self.columns :])
        if self.similarity is None:
            return extra, -extra
        loss, score = self.similarity(embeddings[..., : self.columns], step)
        return (1 - self.weight) * loss + extra, (1 - self.weight) * score - extra

    def given(self, embeddings: torch.Tensor) -> WeightedSum:
        """The sum as a function of the tokens behind these (problems, n, columns) embeddings."""
        other = copy(self)
        other.extra = self.extra.given(embeddings[..., self.columns :])
        if self.similarity is not None:
            other.similarity = self.similarity.given(embeddings[..., : self.columns])
        return other
