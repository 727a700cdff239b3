"""The search methods of the paper's section 5, with one common signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..baselines.projected import autoprompt_sgd, fluent_prompt
from ..baselines.soft import soft_prompt
from ..pez import Objective, PezSettings, SearchSpace, search
from ..tracker import Acceptable, Callback, Checkpoint, Progress, Tracker


def pez(*problem: Any, generator: torch.Generator | None = None, **options: Any) -> Progress:
    """`pez_core.search`; `generator` belongs to the common signature and is not used."""
    return search(*problem, **options)


def as_released(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: PezSettings = PezSettings(),
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    generator: torch.Generator | None = None,
    checkpoint: Checkpoint | None = None,
) -> Progress:
    """PEZ as in the loop that its authors released for language models.

    In their prompt_lm/src/train_prompts.py (commit f22a1be) each step ends by replacing the
    continuous prompt by its projection, and the next step begins by copying that. So no continuous
    prompt survives a step, and every prompt is that of `autoprompt_sgd`. It is kept here for
    comparison, with the names of their variables.

    Args:
        space, objective, ids, settings, callback, acceptable, checkpoint: as in `pez_core.search`.
        generator: belongs to the common signature and is not used.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ArgumentError, FloatingPointError: as `search`.
    """
    best = Tracker(ids, settings, callback, acceptable, checkpoint)
    with torch.inference_mode(False), torch.enable_grad():
        soft_embeds = space.embed(ids).float().clone().requires_grad_()
        optimizer = settings.optimizer_of(soft_embeds)
        for step in range(best.resume(soft_embeds, optimizer), settings.steps):
            soft_prompt_copy = soft_embeds.detach().clone()
            nn_indices = space.nearest(soft_embeds.detach())
            soft_embeds.data = space.embed(nn_indices)
            loss, scores = objective(soft_embeds, step)
            (soft_embeds.grad,) = torch.autograd.grad(loss.sum(), soft_embeds)
            best.update(nn_indices, scores.detach())
            best.check_finite(soft_embeds.grad)
            if step > 0:
                soft_embeds.data = soft_prompt_copy
            optimizer.step()
            soft_embeds.data = space.embed(space.nearest(soft_embeds.detach()))
            if best.end_step():
                break
    return best.progress


# Values of `method` in `pez_core.lm.tune_prompt`. "empty" learns nothing: the template alone.
METHODS: dict[str, Callable[..., Progress] | None] = {
    "pez": pez,
    "autoprompt-sgd": autoprompt_sgd,
    "fluentprompt": fluent_prompt,
    "soft-prompt": soft_prompt,
    "pez-as-released": as_released,
    "empty": None,
}
