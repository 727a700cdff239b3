"""What a prompt is optimised for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


class Similarity:
    """1 - cos(f(P), g(x)) of the paper (section 4), as a weighted sum over targets.

    Args:
        encode: (problems, prompt_len, dim) token embeddings -> (problems, features).
        targets: (problems, n, features) target features, normalised here; n targets per problem.
        weights: (problems, n) how much each counts; one below 0 is a target to stay away from.
            None: their mean.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
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
        similarity = (features * self.target).sum(-1)
        return 1 - similarity, similarity


class SampledSimilarity(Similarity):
    """`Similarity` whose loss looks at a few random targets per step (section 4.3, style).

    The score that picks the best prompt still looks at all of them.

    Args:
        encode, targets, weights: as in `Similarity`; the loss of a step is the plain mean over its
            targets.
        batch_size: targets per step, drawn without replacement.
        generator: on the CPU; draws the targets.
    """

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
        order = torch.randperm(self.targets.shape[1], generator=self.generator)
        few = self.targets[:, order[: self.batch_size].to(features.device)].mean(dim=1)
        return 1 - (features * few).sum(-1), (features * self.target).sum(-1)
