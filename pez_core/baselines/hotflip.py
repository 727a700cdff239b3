"""AutoPrompt: one token at a time, chosen by the gradient and then by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import check_integer
from ..pez import Objective
from ..tracker import Budget, Progress, Tracker
from ..space import TokenSpace
from .common import evaluate, gradient, per_problem


def autoprompt(
    space: TokenSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: Budget = Budget(),  # noqa: B008
    callback: Callable[[Progress], bool | None] | None = None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    generator: torch.Generator,
    candidates: int = 10,
) -> Progress:
    """AutoPrompt (Shin et al. 2020, section 2.2) with the token flips of HotFlip (Ebrahimi et al.
    2018).

    Each step draws one position of each problem. The loss with another token there is estimated to
    first order, as the gradient times the difference of the embeddings; the tokens of the lowest
    estimates are tried, and the best of them stays if it lowers the loss. A step is a forward and
    backward pass of each prompt and `candidates` forward passes.

    With one candidate nothing is tried: the token of the lowest estimate is taken as it is, also
    where it raises the loss, as in the AutoPrompt k=1 of the PEZ paper (section 2), which is to
    avoid the forward passes. What the last step puts in is then never scored.

    Args:
        space: tokens and embeddings; a `PhraseSpace` is not kept to its phrases.
        objective, ids, settings, callback, acceptable: as in `pez_core.search.search`.
        generator: on the CPU; draws positions, for each problem by itself.
        candidates: tokens tried per step (k), at least 1; 10 is the default of its authors' code.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ValueError: as `search`; `candidates` below 1.
        FloatingPointError: as `search`.
    """
    check_integer("candidates", candidates, 1)
    best = Tracker(ids, settings, callback, acceptable)
    problems, prompt_len = ids.shape
    every = torch.arange(problems, device=ids.device)
    k = min(candidates, len(space.allowed))
    draws = per_problem(generator, problems)
    with torch.inference_mode(False):
        E = space.embed(space.allowed)
        for step in range(settings.steps):
            loss, scores, slope = gradient(space, objective, ids, step)
            best.update(ids, scores)
            best.check_finite(slope)
            places = torch.cat([torch.randint(prompt_len, (1,), generator=one) for one in draws])
            places = places.to(ids.device)
            # the token that is there now adds the same to every estimate and moves no minimum
            estimates = slope[every, places] @ E.T
            tokens = space.allowed[estimates.topk(k, largest=False).indices]
            tried = ids[:, None].repeat(1, k, 1)
            tried[every, :, places] = tokens
            if candidates == 1:
                ids = tried[:, 0]
            else:
                losses, scores = evaluate(space, objective, tried, step)
                lowest, pick = losses.min(dim=1)
                best.update(tried[every, pick], scores[every, pick])
                ids = torch.where((lowest < loss)[:, None], tried[every, pick], ids)
            if best.end_step():
                break
    return best.progress
