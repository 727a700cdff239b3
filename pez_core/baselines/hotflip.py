"""AutoPrompt: one token at a time, preselected by the gradient and chosen by its loss."""

from __future__ import annotations

import torch

from ..errors import check_integer
from ..pez import Objective
from ..space import TokenSpace
from ..tracker import Acceptable, Budget, Callback, Progress, Tracker
from .common import Generators, gradient, per_problem, score_candidates


def autoprompt(
    space: TokenSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: Budget = Budget(),
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    generator: Generators,
    candidates: int = 10,
) -> Progress:
    """AutoPrompt (Shin et al. 2020, section 2.2) with the token flips of HotFlip (Ebrahimi et al.
    2018).

    Each step draws one position of each problem. The loss with another token there is estimated to
    first order, as the gradient times the difference of the embeddings; the loss of the tokens with
    the lowest estimates is computed, and the best of them stays if it lowers the loss. A step is a
    forward and backward pass of each prompt and `candidates` forward passes.

    With one candidate no loss is computed: the token with the lowest estimate is taken even if it
    raises the loss, as in the AutoPrompt k=1 of the PEZ paper (section 2), which avoids the forward
    passes. The token of the last step is then never scored.

    Args:
        space: tokens and embeddings; the phrases of a `PhraseSpace` are ignored.
        objective, ids, settings, callback, acceptable: as in `pez_core.search`.
        generator: on the CPU; positions are drawn from it, separately for each problem; or a
            list of one for each.
        candidates: tokens compared per step (k), at least 1; 10 is the authors' default.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ArgumentError: as `search`, or `candidates` is below 1.
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
            # the present token adds the same to every estimate, which moves no minimum
            estimates = slope[every, places] @ E.T
            tokens = space.allowed[estimates.topk(k, largest=False).indices]
            tried = ids[:, None].repeat(1, k, 1)
            tried[every, :, places] = tokens
            if candidates == 1:
                ids = tried[:, 0]
            else:
                losses, scores = score_candidates(space, objective, tried, step)
                lowest, pick = losses.min(dim=1)
                best.update(tried[every, pick], scores[every, pick])
                ids = torch.where((lowest < loss)[:, None], tried[every, pick], ids)
            if best.end_step():
                break
    return best.progress
