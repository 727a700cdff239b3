"""Algorithm 1 of "Hard Prompts Made Easy" (section 3), on any embedding space and any objective."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any, Protocol

import torch

from . import replay

log = logging.getLogger(__name__)


class SearchSpace(Protocol):
    """Where prompts live: `pez_core.space.TokenSpace` is the one for a single embedding table."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(problems, prompt_len) ids -> (problems, prompt_len, dim) fp32 embeddings."""

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(problems, prompt_len, dim) -> (problems, prompt_len) nearest allowed ids."""


# (rows, prompt_len, dim) projected embeddings and the step, counted from 0 ->
# (rows,) loss to descend and (rows,) score, larger is better, that picks the best prompt.
# The two differ when the loss is taken on a minibatch and the score on everything. A score of -inf
# says that it was not looked at in this step; such a prompt is never a new best.
# There is one row per problem; methods that compare candidates give several per problem, all those
# of a problem in a row.
# One whose attribute `recordable` is true makes nothing of the step and never waits for the device.
Objective = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Budget:
    """How long to search; what every method has.

    Attributes:
        steps: optimisation steps T, at least 1.
        patience: a problem ends once it has not improved for this many steps; None: never.
        report_every: steps between two calls of the callback. None: every step on the CPU, every 25
            elsewhere, where each report has to wait for the device.
        time_limit: seconds after which the step at hand is the last, above 0; None: no limit.
        record: on CUDA, record a step once and launch it as a whole from then on, where everything
            that takes part can be recorded; see `pez_core.replay`. Default: unless the environment
            variable `PEZ_RECORD` is 0.
    """

    steps: int = 3000
    patience: int | None = None
    report_every: int | None = None
    time_limit: float | None = None
    record: bool = field(default_factory=replay.wanted, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("steps", "patience", "report_every"):
            value = getattr(self, name)
            if value is not None or name == "steps":
                check_integer(name, value, 1)
        if self.time_limit is not None:
            check_positive("time_limit", self.time_limit)


@dataclass(frozen=True)
class Settings(Budget):
    """How to search by gradient descent.

    Attributes:
        steps, patience, report_every, time_limit, record: see `Budget`.
        lr: learning rate (gamma in the paper).
        weight_decay: of AdamW.
        optimizer: makes the optimiser of a list of parameters, with a learning rate of its own;
            None: AdamW with `lr` and `weight_decay`.
    """

    lr: float = 0.1
    weight_decay: float = 0.1
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("lr", self.lr)
        check_positive("weight_decay", self.weight_decay, or_zero=True)

    def optimizer_of(self, P: torch.Tensor) -> torch.optim.Optimizer:
        """The optimiser that moves the continuous prompt `P`."""
        if self.optimizer is not None:
            return self.optimizer([P])
        # a single kernel, whose count of steps is on the device
        where = dict.fromkeys(("fused", "capturable"), P.device.type == "cuda")
        return torch.optim.AdamW([P], lr=self.lr, weight_decay=self.weight_decay, **where)


class Checkpoint(Protocol):
    """Where a search is kept so that it can go on: `pez_core.checkpoint.FileCheckpoint`.

    Attributes:
        every: steps between two calls of `save`.
    """

    every: int

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None: nothing yet."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep nested dicts, with keys that are text, of tensors, numbers and lists of numbers."""


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless the argument `name` is an integer of the range that it may have."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` has to be an integer but is {value!r}.")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` has to be {span} but is {value}.")


def check_positive(name: str, value: object, or_zero: bool = False) -> None:
    """Raise unless the argument `name` is a finite number above 0, or 0 where it may be."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` has to be a number but is {value!r}.")
    if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        bound = "0 or more" if or_zero else "above 0"
        raise ValueError(f"`{name}` has to be finite and {bound} but is {value}.")


@dataclass
class Progress:
    """What `search` hands to its callback, and what it returns in the end.

    Attributes:
        step: steps done.
        steps: steps asked for.
        ids: (problems, prompt_len) best ids so far.
        scores: (problems,) their scores, without what a method adds to choose by; -inf where no
            prompt was acceptable yet.
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


class Tracker:
    """Keeps the best prompt of each problem, reports, and says when to end.

    Every method of search has one, so that they all mean the same by best, patience and progress.
    Nothing in it waits for the device between two reports, unless prompts have to be acceptable,
    and what it keeps stays where it is, so that `offer` can be recorded.

    Args:
        ids: (problems, prompt_len) ids that stand for the best until one is accepted.
        budget: how long the search may go on.
        callback, acceptable, checkpoint: as in `search`.

    Attributes:
        progress: brought up to date at each report.

    Raises:
        ValueError: `ids` is not a non-empty (problems, prompt_len) tensor.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        budget: Budget,
        callback: Callable[[Progress], bool | None] | None = None,
        acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(
                "`ids` has to be a non-empty (problems, prompt_len) tensor but is "
                f"{tuple(ids.shape)}."
            )
        self.budget, self.callback, self.acceptable = budget, callback, acceptable
        self.checkpoint = checkpoint
        with torch.inference_mode(False):  # what is made in it could not be changed outside
            self.forget(ids)
            self._step, self._now = 0, torch.zeros((), dtype=torch.long, device=ids.device)
            self._steps = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
            self._finite = torch.ones((), dtype=torch.bool, device=ids.device)
        self._every = budget.report_every or (1 if ids.device.type == "cpu" else 25)
        self._began = time.monotonic()
        self.progress = Progress(0, budget.steps, self.ids.clone(), self.scores.clone(), 0.0)

    def begin(
        self,
        P: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        draws: Sequence[torch.Generator] = (),
        also: Sequence[torch.Tensor] = (),
    ) -> int:
        """The step to begin with, after all has been put back as the checkpoint has it.

        Args:
            P: continuous prompt.
            optimizer: that moves it.
            draws: generators whose draws the next steps depend on.
            also: what else belongs to the search and is changed in place.
        """
        self._moving = (P, optimizer, draws, also)
        state = None if self.checkpoint is None else self.checkpoint.load()
        if state is None:
            return 0
        P.data.copy_(state["P"])
        inner = {int(k): values for k, values in state["optimizer"].items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": inner, "param_groups": groups})
        for k, draw in enumerate(draws):
            draw.set_state(state["draws"][str(k)].cpu())
        for k, values in enumerate(also):
            values.copy_(state["also"][str(k)])
        kept = {
            "ids": self.ids,
            "scores": self.scores,
            "chosen_by": self._chosen_by,
            "steps": self._steps,
        }
        for name, values in kept.items():
            values.copy_(state[name])
        self._step = state["step"]
        self._now.fill_(self._step)
        self._began -= state["elapsed"]
        progress = self.progress
        progress.step, progress.elapsed = self._step, state["elapsed"]
        progress.ids, progress.scores = self.ids.clone(), self.scores.clone()
        progress.history = [(step, scores) for step, scores in state["history"]]
        return self._step

    def _save(self) -> None:
        P, optimizer, draws, also = self._moving
        inner = optimizer.state_dict()["state"]
        self.checkpoint.save(
            {
                "P": P.detach(),
                "optimizer": {str(k): dict(values) for k, values in inner.items()},
                "draws": {str(k): draw.get_state() for k, draw in enumerate(draws)},
                "also": {str(k): values for k, values in enumerate(also)},
                "ids": self.ids,
                "scores": self.scores,
                "chosen_by": self._chosen_by,
                "steps": self._steps,
                "step": self._step,
                "elapsed": time.monotonic() - self._began,
                "history": [list(one) for one in self.progress.history],
            }
        )

    def forget(self, ids: torch.Tensor) -> None:
        """Let (problems, prompt_len) `ids` stand for the best until one is accepted."""
        self.ids = ids.clone()
        self.scores = torch.full((len(ids),), -torch.inf, device=ids.device)
        self._chosen_by = self.scores.clone()

    def offer(
        self, ids: torch.Tensor, scores: torch.Tensor, chosen_by: torch.Tensor | None = None
    ) -> None:
        """One new prompt for each problem: (problems, prompt_len) ids and (problems,) scores.

        The best is that with the highest `chosen_by`, which is the score unless it is given.
        """
        chosen_by = scores if chosen_by is None else chosen_by
        better = chosen_by > self._chosen_by
        if self.budget.patience is not None:
            better &= self._now - self._steps <= self.budget.patience
        if self.acceptable is not None and better.any():
            better[better.clone()] = self.acceptable(ids[better])
        self.ids.copy_(torch.where(better[:, None], ids, self.ids))
        self.scores.copy_(torch.where(better, scores, self.scores))
        self._chosen_by.copy_(torch.where(better, chosen_by, self._chosen_by))
        self._steps.copy_(torch.where(better, self._now, self._steps))
        self.check_scores(scores)

    def changed(self) -> list[torch.Tensor]:
        """What `offer` and `check_finite` change in place."""
        return [self.ids, self.scores, self._chosen_by, self._steps, self._finite]

    def check_scores(self, scores: torch.Tensor) -> None:
        """As `check_finite`, but -inf only says that a score was not looked at."""
        self.check_finite(scores.masked_fill(scores == -torch.inf, 0))

    def check_finite(self, *values: torch.Tensor) -> None:
        """Remember whether any of these is NaN or infinite; `end_step` raises then.

        It has to be remembered, since a NaN moves prompts to where scores may look fine again.
        """
        for value in values:
            self._finite.logical_and_(value.isfinite().all())

    def end_step(self) -> bool:
        """Count a step and report it where that is due; True: the search is to end.

        Raises:
            FloatingPointError: a score or gradient was NaN or infinite; at the next report.
        """
        self._step += 1
        self._now += 1
        done, budget = self._step, self.budget
        elapsed = time.monotonic() - self._began
        last = done >= budget.steps or (
            budget.time_limit is not None and elapsed >= budget.time_limit
        )
        checkpoint = self.checkpoint
        due = checkpoint is not None and (last or done % checkpoint.every == 0)
        if not (last or due or done == 1 or done % self._every == 0):
            return False
        if not self._finite:
            raise FloatingPointError(
                f"Score or gradient became NaN or infinite by step {done}; load the "
                "model with dtype=torch.float32, or with torch.bfloat16 if it was float16."
            )
        progress = self.progress
        progress.step, progress.elapsed = done, elapsed
        progress.ids, progress.scores = self.ids.clone(), self.scores.clone()
        progress.history.append((done, self.scores.tolist()))
        if self.callback is not None and self.callback(progress):
            progress.stopped = True
        if checkpoint is not None and (due or progress.stopped):
            self._save()
        patience = budget.patience
        return (
            last
            or progress.stopped
            or (patience is not None and bool((self._step - 1 - self._steps >= patience).all()))
        )


def search(
    space: SearchSpace,
    objective: Objective,
    ids: torch.Tensor,
    settings: Settings = Settings(),
    callback: Callable[[Progress], bool | None] | None = None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    checkpoint: Checkpoint | None = None,
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
        checkpoint: where the search is kept while it goes on, and goes on from; None: nowhere.

    Returns:
        The best prompt of each problem, not the last.

    Raises:
        ValueError: `ids` is not a non-empty (problems, prompt_len) tensor.
        FloatingPointError: score or gradient became NaN or infinite; raised at the next report.
    """
    best = Tracker(ids, settings, callback, acceptable, checkpoint)
    with torch.inference_mode(False), torch.enable_grad():
        P = space.embed(ids).float().clone().requires_grad_()
        optimizer = settings.optimizer_of(P)
        first = best.begin(P, optimizer)
        P.grad = torch.zeros_like(P)
        # what a step found, for those whom it has to be asked about
        at = best.ids.clone(), best.scores.clone()

        def step_of(step: int) -> None:
            projected_ids = space.nearest(P.detach())  # Proj_E(P)
            P_projected = space.embed(projected_ids).requires_grad_()  # P'
            loss, scores = objective(P_projected, step)
            (gradient,) = torch.autograd.grad(loss.sum(), P_projected)
            P.grad.copy_(gradient)  # the gradient at P' ...
            if acceptable is None:
                best.offer(projected_ids, scores.detach())
            else:
                at[0].copy_(projected_ids)
                at[1].copy_(scores.detach())
            best.check_finite(gradient)
            optimizer.step()  # ... moves the continuous P

        recordable = (
            settings.record
            and settings.optimizer is None
            and getattr(space, "recordable", False)
            and getattr(objective, "recordable", False)
        )
        recorded = replay.Replay(
            partial(step_of, 0),
            replay.recorder_for(P.device) if recordable else None,
            lambda: [P, P.grad, *optimizer.state[P].values(), *best.changed(), *at],
        )
        for step in range(first, settings.steps):
            if recordable:
                recorded()
            else:
                step_of(step)
            if acceptable is not None:
                best.offer(*at)
            if best.end_step():
                break
    log.debug("searched %d problems for %d steps", len(ids), best.progress.step)
    return best.progress
