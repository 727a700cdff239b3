"""Projected gradient descent, plain and with noise: PEZ without its continuous prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import check_number
from ..pez import Objective, PezSettings, SearchSpace
from ..tracker import Acceptable, Callback, Checkpoint, Progress, Tracker
from .common import Generators, per_problem

# (problems, prompt_len, dim) embeddings -> (problems,) loss
Fluency = Callable[[torch.Tensor], torch.Tensor]


def autoprompt_sgd(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: PezSettings = PezSettings(),
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    generator: Generators | None = None,
    fluency: Fluency | None = None,
    fluency_weight: float = 0.003,
    checkpoint: Checkpoint | None = None,
) -> Progress:
    """AutoPrompt_SGD of the PEZ paper (section 2): `fluent_prompt` without noise.

    A step of the optimiser leads from one projected prompt to the next. A token changes only if
    this single step moves it closer to another token; otherwise the projection undoes the step.
    AdamW moves each coordinate by at most about `lr`, however large the gradient.

    The optimiser is AdamW with the settings of `search`, so that the missing continuous prompt is
    the only difference. Its moments are kept between steps; they average gradients at tokens that
    may have been replaced, and are the only memory. Weight decay shortens an embedding for one
    step, whereas it accumulates in `search`.

    Args:
        space, objective, ids, settings, callback, acceptable, checkpoint: as in `pez_core.search`.
        generator: belongs to the common signature and is not used.
        fluency, fluency_weight: as in `fluent_prompt`.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ArgumentError: as `fluent_prompt`.
        FloatingPointError: as `search`.
    """
    common = (space, objective, ids, settings, callback, acceptable, checkpoint)
    return _descend(*common, fluency, fluency_weight)


def fluent_prompt(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: PezSettings = PezSettings(),
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    generator: Generators,
    fluency: Fluency | None = None,
    fluency_weight: float = 0.003,
    checkpoint: Checkpoint | None = None,
) -> Progress:
    """FluentPrompt (Shi et al. 2022): projected Langevin dynamics, as in the PEZ authors' code.

    After each step of the optimiser sqrt(2 lr beta) z is added, where z is a standard normal draw,
    and the sum is projected; the next step starts from the projected embeddings. beta falls
    geometrically from 1 in the first step to 1e-4 after `settings.steps`, even if the search ends
    earlier.

    The optimiser is AdamW with the settings of `search`, as in the PEZ paper's experiments on
    images (section 4.1); see `autoprompt_sgd` for its moments.

    Args:
        space, objective, ids, settings, callback, acceptable, checkpoint: as in `pez_core.search`.
        generator: on the CPU; the noise is drawn from it, separately for each problem; or a
            list of one for each.
        fluency: (problems, prompt_len, dim) embeddings -> (problems,) loss of a language model with
            the same embeddings. None for CLIP, for which there is no such model.
        fluency_weight: lambda in (1 - lambda) loss + lambda fluency, from 0 to 1. The best prompt
            is chosen by the scores of `objective` alone.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ArgumentError: as `search`, or `fluency_weight` is not from 0 to 1.
        FloatingPointError: as `search`.
    """
    draws = per_problem(generator, len(ids))
    common = (space, objective, ids, settings, callback, acceptable, checkpoint)
    return _descend(*common, fluency, fluency_weight, draws)


def _descend(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: PezSettings,
    callback: Callback | None,
    acceptable: Acceptable | None,
    checkpoint: Checkpoint | None,
    fluency: Fluency | None,
    fluency_weight: float,
    draws: Sequence[torch.Generator] = (),
) -> Progress:
    check_number("fluency_weight", fluency_weight, 0, 1)
    best = Tracker(ids, settings, callback, acceptable, checkpoint)
    with torch.inference_mode(False), torch.enable_grad():
        P = space.embed(ids).clone().requires_grad_()
        optimizer = settings.optimizer_of(P)
        for step in range(best.resume(P, optimizer, draws), settings.steps):
            projected_ids = space.nearest(P.detach())
            P.data = space.embed(projected_ids)  # P = Proj_E(P), and the continuous P is lost
            loss, scores = objective(P, step)
            if fluency is not None:
                loss = (1 - fluency_weight) * loss + fluency_weight * fluency(P)
            (P.grad,) = torch.autograd.grad(loss.sum(), P)
            best.update(projected_ids, scores.detach())
            best.check_finite(P.grad)
            optimizer.step()
            if draws:
                beta = 1e-4 ** (step / settings.steps)
                z = torch.stack([torch.randn(P.shape[1:], generator=one) for one in draws])
                P.data += (2 * settings.lr * beta) ** 0.5 * z.to(P.device)
            if best.end_step():
                break
    return best.progress
