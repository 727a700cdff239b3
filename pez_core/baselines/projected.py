"""Projected gradient descent, plain and with noise: what PEZ is without its continuous prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..pez import Objective, PezSettings, SearchSpace
from ..tracker import Checkpoint, Progress, Tracker
from .common import per_problem

# (problems, prompt_len, dim) embeddings -> (problems,) loss
Fluency = Callable[[torch.Tensor], torch.Tensor]


def autoprompt_sgd(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: PezSettings = PezSettings(),  # noqa: B008
    callback: Callable[[Progress], bool | None] | None = None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    generator: torch.Generator | None = None,
    fluency: Fluency | None = None,
    fluency_weight: float = 0.003,
    checkpoint: Checkpoint | None = None,
) -> Progress:
    """AutoPrompt_SGD of the PEZ paper (section 2): `fluent_prompt` without noise.

    A step of the optimiser leads from one projected prompt to the next. A token changes only if
    that one step takes it nearer to another; where it does not, the token is put back and the step
    is lost. AdamW moves each coordinate by about `lr` at most, however large the gradient.

    AdamW is the optimiser and has the settings that `search` has, so that the missing continuous
    prompt is the one difference. Its moments are kept: averages of gradients taken at tokens that
    may be gone, and all that is remembered. Weight decay shortens an embedding for one step, where
    in `search` it adds up.

    Args:
        space, objective, ids, settings, callback, acceptable, checkpoint: as in
            `pez_core.search.search`.
        generator: nothing is drawn; taken so that all rivals are called alike.
        fluency, fluency_weight: as in `fluent_prompt`.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ValueError: as `fluent_prompt`.
        FloatingPointError: as `search`.
    """
    common = (space, objective, ids, settings, callback, acceptable, checkpoint)
    return _descend(*common, fluency, fluency_weight)


def fluent_prompt(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: PezSettings = PezSettings(),  # noqa: B008
    callback: Callable[[Progress], bool | None] | None = None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    generator: torch.Generator,
    fluency: Fluency | None = None,
    fluency_weight: float = 0.003,
    checkpoint: Checkpoint | None = None,
) -> Progress:
    """FluentPrompt (Shi et al. 2022): projected Langevin dynamics, as the PEZ authors ran it.

    After each step of the optimiser sqrt(2 lr beta) z is added, z a standard normal draw, and the
    sum is projected; the next step starts from the projected embeddings. beta falls geometrically
    from 1 in the first step to 1e-4 after `settings.steps`, whether or not the search ends before.

    The optimiser is AdamW with the settings of `search`, as in the PEZ paper's experiments on
    images (section 4.1); see `autoprompt_sgd` for what its moments mean here.

    Args:
        space, objective, ids, settings, callback, acceptable, checkpoint: as in
            `pez_core.search.search`.
        generator: on the CPU; draws the noise, for each problem by itself.
        fluency: (problems, prompt_len, dim) embeddings -> (problems,) loss of a language model that
            has the same embeddings. None for CLIP, since there is no such model.
        fluency_weight: lambda in (1 - lambda) loss + lambda fluency, from 0 to 1. The scores that
            pick the best prompt are those of `objective` alone.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ValueError: as `search`; `fluency_weight` is not from 0 to 1.
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
    callback: Callable[[Progress], bool | None] | None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None,
    checkpoint: Checkpoint | None,
    fluency: Fluency | None,
    fluency_weight: float,
    draws: Sequence[torch.Generator] = (),
) -> Progress:
    if not 0 <= fluency_weight <= 1:
        raise ValueError(f"`fluency_weight` has to be from 0 to 1 but is {fluency_weight}.")
    best = Tracker(ids, settings, callback, acceptable, checkpoint)
    with torch.inference_mode(False), torch.enable_grad():
        P = space.embed(ids).clone().requires_grad_()
        optimizer = settings.optimizer_of(P)
        for step in range(best.resume(P, optimizer, draws), settings.steps):
            projected_ids = space.nearest(P.detach())
            P.data = space.embed(projected_ids)  # P = Proj_E(P), and where it was is forgotten
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
