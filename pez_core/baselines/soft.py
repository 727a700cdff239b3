"""A soft prompt: continuous embeddings, made into text only when they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..search import Objective, Progress, SearchSpace, Settings, Tracker


@dataclass
class SoftProgress(Progress):
    """`Progress` of a soft prompt.

    Attributes:
        ids: (problems, prompt_len) the projection of the present prompt: the last, not the best.
            The initial ids where that is not acceptable.
        scores: (problems,) their scores; -inf where the projection is not acceptable.
        embeddings: (problems, prompt_len, dim) the present continuous prompt.
        soft_scores: (problems,) its own scores.
    """

    embeddings: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    soft_scores: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def soft_prompt(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: Settings = Settings(),  # noqa: B008
    callback: Callable[[SoftProgress], bool | None] | None = None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> SoftProgress:
    """AdamW on continuous embeddings (Lester et al. 2021), the soft prompt of the PEZ paper.

    Nothing is projected while it learns. What counts as the result is, as in the paper, the
    projection of the prompt that there is in the end, not the best of those on the way. Projecting
    and scoring the projection happens at each report and nowhere else, so a `report_every` above 1
    makes it as cheap as it can be; the result does not depend on it.

    Args:
        space, objective, ids, callback, acceptable: as in `pez_core.search.search`.
        settings: see `Settings`. `patience` has no meaning without a best prompt: it is not used.
        generator: nothing is drawn; taken so that all rivals are called alike.

    Returns:
        The last projection of each problem, and the continuous prompt that it belongs to.

    Raises:
        ValueError, FloatingPointError: as `search`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        P = space.embed(ids).clone().requires_grad_()
        optimizer = torch.optim.AdamW([P], lr=settings.lr, weight_decay=settings.weight_decay)
        soft_scores = torch.empty(0)

        def report(progress: SoftProgress) -> bool | None:
            projected_ids = space.nearest(P.detach())
            with torch.no_grad():
                _, scores = objective(space.embed(projected_ids), progress.step - 1)
            last.forget(ids)
            last.offer(projected_ids, scores)
            progress.ids, progress.scores = last.ids, last.scores
            progress.history[-1] = (progress.step, last.scores.tolist())
            progress.embeddings, progress.soft_scores = P.detach().clone(), soft_scores
            return callback is not None and callback(progress)

        last = Tracker(ids, replace(settings, patience=None), report, acceptable)
        last.progress = SoftProgress(**vars(last.progress))
        for step in range(settings.steps):
            loss, scores = objective(P, step)
            (P.grad,) = torch.autograd.grad(loss.sum(), P)
            soft_scores = scores.detach().float()
            last.check_finite(soft_scores, P.grad)
            if last.end_step():  # before P moves on, so that its score above still is its own
                break
            optimizer.step()
    return last.progress
