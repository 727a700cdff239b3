"""GCG: the best of many random single swaps among the tokens that the gradient favours."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import check_integer
from ..pez import Objective
from ..tracker import Budget, Progress, Tracker
from ..space import TokenSpace
from .common import evaluate, gradient, per_problem


def gcg(
    space: TokenSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: Budget = Budget(),  # noqa: B008
    callback: Callable[[Progress], bool | None] | None = None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    generator: torch.Generator,
    topk: int = 256,
    width: int = 512,
) -> Progress:
    """Greedy coordinate gradient (Zou et al. 2023, algorithm 1).

    At each position the `topk` allowed tokens of the lowest gradient at the one-hot vector are
    kept. `width` candidates differ from the prompt in one random position, where they have a random
    one of its tokens. The best candidate is the next prompt, also if it is worse than this one. A
    step is a forward and backward pass of each prompt and `width` forward passes.

    Positions are drawn at random and the defaults are those of nanoGCG, whose other parts are left
    out: its test that a candidate survives being printed is what `acceptable` and the allowed
    tokens of `space` are for.

    Args:
        space: tokens and embeddings; a `PhraseSpace` is not kept to its phrases.
        objective, ids, settings, callback, acceptable: as in `pez_core.search.search`.
        generator: on the CPU; draws positions and tokens, for each problem by itself.
        topk: tokens that may come to each position, at least 1.
        width: candidates per step, at least 1.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ValueError: as `search`; `topk` or `width` below 1.
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
            losses, scores = evaluate(space, objective, tried, step)
            pick = losses.argmin(dim=1)
            ids = tried[every, pick]
            best.update(ids, scores[every, pick])
            if best.end_step():
                break
    return best.progress
