"""Parts that several methods share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..pez import Objective
from ..space import TokenSpace

# Prompts of one pass while candidates are compared.
_ROWS = 1024


Generators = torch.Generator | Sequence[torch.Generator]
"""One generator, or one for each problem."""


def per_problem(generator: Generators, problems: int) -> list[torch.Generator]:
    """A generator for each problem: those given, or others that `generator` seeds.

    The draws of problem k then depend on `generator` and k alone, not on the number of problems.
    """
    if not isinstance(generator, torch.Generator):
        return list(generator)
    seeds = torch.randint(2**63 - 1, (problems,), generator=generator)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def gradient(
    space: TokenSpace, objective: Objective, ids: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, scores and gradients of prompts.

    Returns:
        (problems,) losses and (problems,) scores of (problems, prompt_len) `ids`, and
        (problems, prompt_len, dim) gradients of the losses at their embeddings.
    """
    embeddings = space.embed(ids).requires_grad_()
    with torch.enable_grad():
        loss, scores = objective(embeddings, step)
    (slope,) = torch.autograd.grad(loss.sum(), embeddings)
    return loss.detach(), scores.detach(), slope


@torch.no_grad()
def score_candidates(
    space: TokenSpace, objective: Objective, candidates: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate ids (problems, n, prompt_len) -> (problems, n) losses and (problems, n) scores."""
    problems = len(candidates)
    losses, scores = [], []
    for some in candidates.split(max(1, _ROWS // problems), dim=1):
        loss, score = objective(space.embed(some.flatten(0, 1)), step)
        losses.append(loss.view(problems, -1))
        scores.append(score.view(problems, -1))
    return torch.cat(losses, dim=1), torch.cat(scores, dim=1)
