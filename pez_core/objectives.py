"""What a prompt is optimised for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


class Similarity:
    """1 - cos(f(P), g(x)) of the paper (section 4), averaged over the targets of each problem.

    Args:
        encode: (problems, prompt_len, dim) token embeddings -> (problems, features).
        targets: (problems, n, features) target features, normalised here; n targets per problem.
    """

    def __init__(
        self, encode: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor
    ) -> None:
        self.encode = encode
        # the mean of cosines with unit targets is one dot product with the mean unit target
        self.target = F.normalize(targets.float(), dim=-1).mean(dim=1)

    def __call__(self, embeddings: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.normalize(self.encode(embeddings).float(), dim=-1)
        similarity = (features * self.target).sum(-1)
        return 1 - similarity, similarity
