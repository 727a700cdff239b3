"""Algorithm 1 of "Hard Prompts Made Easy" (section 3), on any embedding space and any objective."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .capture import captured
from .errors import check_number
from .tracker import Acceptable, Budget, Callback, Checkpoint, Progress, Tracker

log = logging.getLogger(__name__)


class SearchSpace(Protocol):
    """The discrete set of prompts: `pez_core.space.TokenSpace` is the one of an embedding table."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(problems, prompt_len) ids -> (problems, prompt_len, dim) fp32 embeddings."""
        ...

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(problems, prompt_len, dim) -> (problems, prompt_len) nearest allowed ids."""
        ...


StepCallback = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Gets (problems, prompt_len) projected ids, (problems,) losses and the (problems, prompt_len, dim)
continuous prompt of a step."""

Objective = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""The function that is minimised.

It maps (rows, prompt_len, dim) projected embeddings and the step, counted from 0, to (rows,) losses
and (rows,) scores. The gradient is that of the loss; the prompt with the highest score is the best.
They differ where the loss is taken on a minibatch and the score on all targets. A score of -inf
means that the score was not computed in this step; such a prompt never becomes the best. There is
one row per problem; methods that compare candidates have several rows per problem, one problem
after the other. An objective with the attribute `capturable = True` ignores the step number and
never synchronises with the device, so that a CUDA graph can replay it.
"""


@dataclass(frozen=True)
class PezSettings(Budget):
    """Settings of Algorithm 1.

    Attributes:
        steps: optimisation steps, at least 1.
        patience: a problem ends after this many steps without improvement, at least 1; None: never.
        report_every: steps between two calls of the callback, at least 1. None: 1 on the CPU, 25
            elsewhere, where each report waits for the device.
        time_limit: seconds, above 0; the step during which they run out is the last. None: no
            limit.
        capture: on CUDA, replay steps as a CUDA graph where the space and the objective allow it.
            None: where `pez doctor` found that faster on this device, unless the environment
            variable `PEZ_CAPTURE` is 0 (never) or 1 (always).
        lr: learning rate (gamma in the paper), above 0.
        weight_decay: of AdamW, 0 or more.
        optimizer: a function from a list of parameters to their optimiser, with a learning rate of
            its own. None: AdamW with `lr` and `weight_decay`.

    Raises:
        ArgumentError: a value is out of range.
    """

    lr: float = 0.1
    weight_decay: float = 0.1
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lr", self.lr, above=True)
        check_number("weight_decay", self.weight_decay)

    def optimizer_of(self, P: torch.Tensor) -> torch.optim.Optimizer:
        """The optimiser of the continuous prompt `P`."""
        if self.optimizer is not None:
            return self.optimizer([P])
        # one kernel, whose step counter is on the device
        where = dict.fromkeys(("fused", "capturable"), P.device.type == "cuda")
        return torch.optim.AdamW([P], lr=self.lr, weight_decay=self.weight_decay, **where)


class SearchMethod(Protocol):
    """A search method with the signature of `search`, such as `pez_core.baselines.gcg`."""

    def __call__(
        self,
        space: Any,
        objective: Any,
        ids: torch.Tensor,
        settings: Any,
        callback: Any,
        acceptable: Acceptable | None,
        *,
        generator: Any,
    ) -> Progress:
        """The prompts found; `generator` is a list of one generator per problem."""
        ...


def search(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: PezSettings = PezSettings(),
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    on_step: StepCallback | None = None,
) -> Progress:
    """Learn hard prompts, sequences of token ids, with Algorithm 1 of "Hard Prompts Made Easy".

    Each step projects a continuous prompt to the nearest allowed tokens, takes the gradient of the
    loss there, and applies it to the continuous prompt. Each row of `ids` is an independent
    problem; all rows share every forward and backward pass.

    Args:
        space: embeds ids and finds the nearest allowed ids, such as a `TokenSpace`.
        objective: `objective(embeddings, step)` with the (problems, prompt_len, dim) projected
            embeddings and the step from 0. It returns (problems,) losses, whose gradient is
            followed, and (problems,) scores; the prompt with the highest score is the best. Each
            row of the output may depend on its own row alone. A function of your own runs in each
            step and may use `step`, random numbers and `item()`. `pez_core.objective_for` makes one
            for one problem of a CLIP and targets. Its result is captured as a CUDA graph, as are
            objectives whose attribute `capturable` is true (see `pez_core.pez.Objective`).
        ids: (problems, prompt_len) int64 ids to start from; `space.random` draws some. Their
            embeddings are the first continuous prompt.
        settings: steps, learning rate, patience and more, see `PezSettings`.
        callback: called with a `Progress` after step 1, after every `settings.report_every` steps
            and at the end; a true return value ends the search, which returns the best so far.
        acceptable: a function (n, prompt_len) ids -> (n,) bool; only prompts for which it is true
            can become the best. It is called only for prompts that would be a new best. None
            accepts every prompt.
        checkpoint: a `Checkpoint`, such as `pez_core.lm.checkpoint.FileCheckpoint`, that stores the
            state every `checkpoint.every` steps. If it holds a state, the search resumes from it.
            None: nothing is stored.
        on_step: called after each step with (ids, losses, continuous prompt), see
            `pez_core.pez.StepCallback`. Steps are then never captured, which is slower on CUDA.
            None: not called.

    Returns:
        A `Progress`. Its `ids` (problems, prompt_len) are the best prompts of all steps, not the
        last ones, and its `scores` (problems,) are theirs. A problem that had no acceptable prompt
        has its initial ids and the score -inf.

    Raises:
        ArgumentError: `ids` is not a non-empty (problems, prompt_len) tensor.
        FloatingPointError: a score or gradient became NaN or infinite. It is raised when the next
            report is due, up to `report_every` steps later.
    """
    best = Tracker(ids, settings, callback, acceptable, checkpoint)
    with torch.inference_mode(False), torch.enable_grad():
        P = space.embed(ids).float().clone().requires_grad_()
        optimizer = settings.optimizer_of(P)
        first = best.resume(P, optimizer)
        P.grad = grad = torch.zeros_like(P)
        seen: list[torch.Tensor] = []

        def one_step(step: int) -> None:
            projected_ids = space.nearest(P.detach())  # Proj_E(P)
            P_projected = space.embed(projected_ids).requires_grad_()  # P'
            loss, scores = objective(P_projected, step)
            if on_step is not None:
                seen[:] = projected_ids, loss.detach(), P.detach().clone()
            (gradient,) = torch.autograd.grad(loss.sum(), P_projected)
            grad.copy_(gradient)  # the gradient at P' ...
            best.propose(projected_ids, scores.detach())
            best.check_finite(gradient)
            optimizer.step()  # ... moves the continuous P

        run_step = captured(
            one_step,
            P.device,
            lambda: [P, grad, *optimizer.state[P].values(), *best.changed()],
            wanted=settings.optimizer is None
            and on_step is None
            and settings.captures_on(P.device),
            parts=(space, objective),
        )
        for step in range(first, settings.steps):
            run_step(step)
            if on_step is not None:
                on_step(*seen)
            best.accept()
            if best.end_step():
                break
    log.debug("searched %d problems for %d steps", len(ids), best.progress.step)
    return best.progress
