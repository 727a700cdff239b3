"""A soft prompt: continuous embeddings, projected to tokens only at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..pez import Objective, PezSettings, SearchSpace
from ..tracker import Acceptable, Checkpoint, Progress, Tracker
from .common import Generators


@dataclass
class SoftProgress(Progress):
    """`Progress` of a soft prompt.

    Attributes:
        ids: (problems, prompt_len) the projection of the current prompt: the last, not the best;
            the initial ids where the projection is not acceptable.
        scores: (problems,) their scores; -inf where the projection is not acceptable.
        embeddings: (problems, prompt_len, dim) the current continuous prompt.
        soft_scores: (problems,) the scores of `embeddings`.
    """

    embeddings: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    soft_scores: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def soft_prompt(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: PezSettings = PezSettings(),
    callback: Callable[[SoftProgress], bool | None] | None = None,
    acceptable: Acceptable | None = None,
    *,
    generator: Generators | None = None,
    checkpoint: Checkpoint | None = None,
) -> SoftProgress:
    """AdamW on continuous embeddings (Lester et al. 2021), the soft prompt of the PEZ paper.

    Nothing is projected during the descent. As in the paper, the result is the projection of the
    last continuous prompt, not the best projection on the way. Prompts are projected and scored
    only at each report, so a high `report_every` saves time; the result does not depend on it.

    Args:
        space, objective, ids, callback, acceptable, checkpoint: as in `pez_core.search`.
        settings: see `PezSettings`. `patience` is ignored, since there is no best prompt.
        generator: belongs to the common signature and is not used.

    Returns:
        The last projection of each problem, and its continuous prompt.

    Raises:
        ArgumentError, FloatingPointError: as `search`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        P = space.embed(ids).clone().requires_grad_()
        optimizer = settings.optimizer_of(P)
        # the reported P is that before the step of the optimiser, whose scores are computed
        prompt, soft_scores = P.detach().clone(), torch.zeros(len(ids), device=P.device)

        def report(_: Progress) -> bool | None:
            projected_ids = space.nearest(prompt)
            with torch.no_grad():
                scores = objective(space.embed(projected_ids), progress.step - 1)[1]
            last.reset(ids)
            last.update(projected_ids, scores)
            progress.ids, progress.scores = last.ids, last.scores
            progress.history[-1] = (progress.step, last.scores.tolist())
            progress.embeddings, progress.soft_scores = prompt.clone(), soft_scores.clone()
            return callback is not None and callback(progress)

        last = Tracker(ids, replace(settings, patience=None), report, acceptable, checkpoint)
        last.progress = progress = SoftProgress(**vars(last.progress))
        begin = last.resume(P, optimizer, tensors=[prompt, soft_scores])
        progress.embeddings, progress.soft_scores = prompt.clone(), soft_scores.clone()
        for step in range(begin, settings.steps):
            loss, scores = objective(P, step)
            (P.grad,) = torch.autograd.grad(loss.sum(), P)
            soft_scores.copy_(scores.detach())
            last.check_scores(soft_scores)
            last.check_finite(P.grad)
            prompt.copy_(P.detach())
            optimizer.step()
            if last.end_step():
                break
    return progress
