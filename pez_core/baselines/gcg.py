"""GCG: the best of many random single swaps among the tokens with the lowest gradients."""

from __future__ import annotations

import torch

from ..errors import check_integer
from ..pez import Objective
from ..space import TokenSpace
from ..tracker import Acceptable, Budget, Callback, Progress, Tracker
from .common import Generators, gradient, per_problem, score_candidates


def gcg(
    space: TokenSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: Budget = Budget(),
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    generator: Generators,
    topk: int = 256,
    width: int = 512,
) -> Progress:
    """Greedy coordinate gradient (Zou et al. 2023, algorithm 1).

    Each position keeps the `topk` allowed tokens with the lowest gradient at the one-hot vector.
    `width` candidates differ from the prompt at one random position, where they have a random one
    of its kept tokens. The best candidate becomes the next prompt, even if it is worse than this
    one. A step is a forward and backward pass of each prompt and `width` forward passes.

    Positions are drawn at random and the defaults are those of nanoGCG. Its other parts are left
    out: `acceptable` and the allowed tokens of `space` replace its round-trip check of candidates.

    Args:
        space: tokens and embeddings; the phrases of a `PhraseSpace` are ignored.
        objective, ids, settings, callback, acceptable: as in `pez_core.search`.
        generator: on the CPU; draws positions and tokens, separately for each problem; or a
            list of one for each.
        topk: kept tokens of each position, at least 1.
        width: candidates per step, at least 1.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ArgumentError: as `search`, or `topk` or `width` is below 1.
        FloatingPointError: as `search`.
    """
    check_integer("topk", topk, 1)
    check_integer("width", width, 1)
    best = Tracker(ids, settings, callback, acceptable)
    problems, prompt_len = ids.shape
    every = torch.arange(problems, device=ids.device)
    k = min(topk, len(space.allowed))
    draws = per_problem(generator, problems)
    with torch.inference_mode(False):
        E = space.embed(space.allowed)
        for step in range(settings.steps):
            _, scores, slope = gradient(space, objective, ids, step)
            best.update(ids, scores)
            best.check_finite(slope)
            # x @ E are the embeddings of one-hot rows x, so the gradient at x is slope @ E.T
            top = (slope @ E.T).topk(k, largest=False).indices
            places, ranks = (
                torch.stack([torch.randint(n, (width,), generator=one) for one in draws])
                for n in (prompt_len, k)
            )
            places = places.to(ids.device)
            tokens = space.allowed[top[every[:, None], places, ranks.to(ids.device)]]
            tried = ids[:, None].repeat(1, width, 1)
            tried.scatter_(2, places[..., None], tokens[..., None])
            losses, scores = score_candidates(space, objective, tried, step)
            pick = losses.argmin(dim=1)
            ids = tried[every, pick]
            best.update(ids, scores[every, pick])
            if best.end_step():
                break
    return best.progress
