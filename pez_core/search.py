"""Algorithm 1 of "Hard Prompts Made Easy" (section 3), on any embedding space and any objective."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Protocol

import torch

log = logging.getLogger(__name__)


class SearchSpace(Protocol):
    """Where prompts live: `pez_core.space.TokenSpace` is the one for a single embedding table."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(problems, prompt_len) ids -> (problems, prompt_len, dim) fp32 embeddings."""

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(problems, prompt_len, dim) -> (problems, prompt_len) nearest allowed ids."""


# (problems, prompt_len, dim) projected embeddings and the step, counted from 0 ->
# (problems,) loss to descend and (problems,) score, larger is better, that picks the best prompt.
# The two differ when the loss is taken on a minibatch and the score on everything.
Objective = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        steps: optimisation steps T, at least 1.
        lr: AdamW learning rate (gamma in the paper).
        weight_decay: AdamW weight decay.
        patience: a problem ends once it has not improved for this many steps; None: never.
        report_every: steps between two calls of the callback. None: every step on the CPU, every 25
            elsewhere, where each report has to wait for the device.
    """

    steps: int = 3000
    lr: float = 0.1
    weight_decay: float = 0.1
    patience: int | None = None
    report_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "patience", "report_every"):
            value = getattr(self, name)
            if value is not None or name == "steps":
                check_integer(name, value, 1)
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"`{name}` has to be a number but is {value!r}.")
            if not math.isfinite(value) or value < 0 or (name == "lr" and value == 0):
                bound = "above 0" if name == "lr" else "0 or more"
                raise ValueError(f"`{name}` has to be finite and {bound} but is {value}.")


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless the argument `name` is an integer of the range that it may have."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` has to be an integer but is {value!r}.")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` has to be {span} but is {value}.")


@dataclass
class Progress:
    """What `search` hands to its callback, and what it returns in the end.

    Attributes:
        step: steps done.
        steps: steps asked for.
        ids: (problems, prompt_len) best ids so far.
        scores: (problems,) their scores; -inf where no prompt was acceptable yet.
        elapsed: seconds since the search began.
        history: one `(step, scores)` per report, scores a list of floats.
        stopped: the callback ended the search early.
    """

    step: int
    steps: int
    ids: torch.Tensor
    scores: torch.Tensor
    elapsed: float
    history: list[tuple[int, list[float]]] = field(default_factory=list)
    stopped: bool = False


def search(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: Settings = Settings(),
    callback: Callable[[Progress], bool | None] | None = None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Progress:
    """Learn hard prompts by gradient descent through the projection (Algorithm 1).

    Each row of `ids` is a problem of its own; all of them share every forward and backward pass.

    Args:
        space: embeds ids and finds the nearest allowed ids.
        objective: see `Objective`. Called once per step; the rows of its results are independent.
        ids: (problems, prompt_len) initial ids; their embeddings are the first continuous prompt.
        settings: see `Settings`.
        callback: called with a `Progress` after step 1, after every `report_every` steps and at the
            end; a true return value ends the search, and the best so far is returned.
        acceptable: (n, prompt_len) ids -> (n,) bool; only these prompts are kept as the best. It is
            asked only about prompts that would be a new best. None accepts every prompt.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ValueError: `ids` is not a non-empty (problems, prompt_len) tensor.
        FloatingPointError: score or gradient became NaN or infinite; raised at the next report.
    """
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(
            f"`ids` has to be a non-empty (problems, prompt_len) tensor but is {tuple(ids.shape)}."
        )
    report_every = settings.report_every or (1 if ids.device.type == "cpu" else 25)
    began = time.monotonic()

    with torch.inference_mode(False), torch.enable_grad():
        P = space.embed(ids).float().clone().requires_grad_()
        optimizer = torch.optim.AdamW([P], lr=settings.lr, weight_decay=settings.weight_decay)
        best_ids = ids.clone()
        best_scores = torch.full((len(ids),), -torch.inf, device=ids.device)
        best_steps = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        finite = torch.ones((), dtype=torch.bool, device=ids.device)
        progress = Progress(0, settings.steps, best_ids, best_scores, 0.0)

        for step in range(settings.steps):
            projected_ids = space.nearest(P.detach())  # Proj_E(P)
            P_projected = space.embed(projected_ids).requires_grad_()  # P'
            loss, scores = objective(P_projected, step)
            (P.grad,) = torch.autograd.grad(loss.sum(), P_projected)  # the gradient at P' ...

            better = scores.detach() > best_scores
            if settings.patience is not None:
                better &= step - best_steps <= settings.patience
            if acceptable is not None and better.any():
                better[better.clone()] = acceptable(projected_ids[better])
            best_ids = torch.where(better[:, None], projected_ids, best_ids)
            best_scores = torch.where(better, scores.detach().float(), best_scores)
            best_steps = torch.where(better, step, best_steps)

            # A NaN moves P to where scores may look fine again, so it has to be remembered.
            finite = finite & scores.isfinite().all() & P.grad.isfinite().all()
            optimizer.step()  # ... moves the continuous P

            done = step + 1
            if done == 1 or done % report_every == 0 or done == settings.steps:
                if not finite:
                    raise FloatingPointError(
                        f"Score or gradient became NaN or infinite by step {done}; load the "
                        "model with dtype=torch.float32, or with torch.bfloat16 if it was float16."
                    )
                progress.step, progress.ids, progress.scores = done, best_ids, best_scores
                progress.elapsed = time.monotonic() - began
                progress.history.append((done, best_scores.tolist()))
                if callback is not None and callback(progress):
                    progress.stopped = done < settings.steps
                    break
                patience = settings.patience
                if patience is not None and (step - best_steps >= patience).all():
                    break
    log.debug("searched %d problems for %d steps", len(ids), progress.step)
    return progress
