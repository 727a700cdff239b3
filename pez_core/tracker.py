"""Bookkeeping of a search: the best prompts so far, reports, patience and the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from . import capture
from .errors import ArgumentError, check_integer, check_number

Acceptable = Callable[[torch.Tensor], torch.Tensor]
"""(n, prompt_len) ids -> (n,) bool: prompts that a search may return."""


@dataclass(frozen=True)
class Budget:
    """The length of a search, common to all methods.

    Attributes:
        steps: optimisation steps T, at least 1.
        patience: a problem ends after this many steps without improvement; None: never.
        report_every: steps between two calls of the callback. None: 1 on the CPU, 25 elsewhere,
            where each report waits for the device.
        time_limit: the step that runs when these seconds are over is the last; above 0. None: no
            limit.
        capture: on CUDA, capture a step as a CUDA graph and replay it (see `pez_core.capture`),
            where the space and the objective allow it. None: where `pez doctor` has found that
            faster on this device, or as the environment variable `PEZ_CAPTURE` (0 or 1) says.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: int = 3000
    patience: int | None = None
    report_every: int | None = None
    time_limit: float | None = None
    capture: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        for name in ("patience", "report_every"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.time_limit is not None:
            check_number("time_limit", self.time_limit, above=True)

    def captures_on(self, device: torch.device) -> bool:
        """Whether steps on a device are captured."""
        return capture.wanted(device) if self.capture is None else self.capture


class Checkpoint(Protocol):
    """A store from which a search can resume: `pez_core.lm.checkpoint.FileCheckpoint`.

    Attributes:
        every: steps between two calls of `save`.
    """

    every: int

    def load(self) -> dict[str, Any] | None:
        """The last state that was saved; None: there is none yet."""

    def save(self, state: dict[str, Any]) -> None:
        """Store nested dicts, with string keys, of tensors, numbers and lists of numbers."""


@dataclass
class Progress:
    """The state of a search, for its callback and as its result.

    Attributes:
        step: steps done.
        steps: steps planned.
        ids: (problems, prompt_len) best ids so far.
        scores: (problems,) their scores, without a prior; -inf where no prompt was acceptable yet.
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


Callback = Callable[[Progress], "bool | None"]
"""Called with the state of a search after its steps; a true return value ends the search."""


class Tracker:
    """Keeps the best prompt of each problem, reports, and decides when to end.

    Every search method uses one, so that best, patience and progress have one definition. Between
    two reports nothing waits for the device, unless prompts have to be acceptable. All state stays
    in the same tensors, so that `propose` can be captured.

    Args:
        ids: (problems, prompt_len) ids that are returned if no prompt is ever accepted.
        budget: the length of the search.
        callback, acceptable, checkpoint: as in `pez_core.search`.

    Attributes:
        progress: updated at each report.

    Raises:
        ArgumentError: `ids` is not a non-empty (problems, prompt_len) tensor.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        budget: Budget,
        callback: Callback | None = None,
        acceptable: Acceptable | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        if ids.ndim != 2 or ids.numel() == 0:
            raise ArgumentError(
                "ids",
                f"has to be a non-empty (problems, prompt_len) tensor but is {tuple(ids.shape)}",
            )
        self.budget, self.callback, self.acceptable = budget, callback, acceptable
        self.checkpoint = checkpoint
        with torch.inference_mode(False):  # inference tensors could not be changed outside of it
            self.reset(ids)
            self._proposal = self.ids.clone(), self.scores.clone()
            self._step, self._now = 0, torch.zeros((), dtype=torch.long, device=ids.device)
            self._steps = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
            self._finite = torch.ones((), dtype=torch.bool, device=ids.device)
        self._every = budget.report_every or (1 if ids.device.type == "cpu" else 25)
        self._began = time.monotonic()
        self.progress = Progress(0, budget.steps, self.ids.clone(), self.scores.clone(), 0.0)

    def reset(self, ids: torch.Tensor) -> None:
        """Replace the best prompts by (problems, prompt_len) `ids` without a score."""
        self.ids = ids.clone()
        self.scores = torch.full((len(ids),), -torch.inf, device=ids.device)
        self._chosen_by = self.scores.clone()

    def update(
        self, ids: torch.Tensor, scores: torch.Tensor, chosen_by: torch.Tensor | None = None
    ) -> None:
        """Keep each new prompt that is better than the best so far.

        Args:
            ids: (problems, prompt_len), one new prompt for each problem.
            scores: (problems,).
            chosen_by: (problems,) values to compare by; None: the scores.
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

    def propose(self, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """`update` for a step that may be captured: `accept` has to follow outside of the capture.

        `acceptable` runs in Python, and cannot be part of a capture.
        """
        if self.acceptable is None:
            self.update(ids, scores)
        else:
            capture.put(self._proposal, (ids, scores))

    def accept(self) -> None:
        """Update the best with the last proposal, where `propose` could not."""
        if self.acceptable is not None:
            self.update(*self._proposal)

    def changed(self) -> list[torch.Tensor]:
        """The tensors that `update`, `propose` and `check_finite` change in place."""
        state = [self.ids, self.scores, self._chosen_by, self._steps, self._finite]
        return [*state, *self._proposal]

    def check_scores(self, scores: torch.Tensor) -> None:
        """As `check_finite`; -inf marks a score that was not computed and is allowed."""
        self.check_finite(scores.masked_fill(scores == -torch.inf, 0))

    def check_finite(self, *values: torch.Tensor) -> None:
        """Remember whether a value is NaN or infinite; `end_step` raises at the next report.

        It has to be remembered, since a NaN moves prompts to where scores may be finite again.
        """
        for value in values:
            self._finite.logical_and_(value.isfinite().all())

    def end_step(self) -> bool:
        """Count a step and report it where that is due; True: the search has to end.

        Raises:
            FloatingPointError: a score or gradient was NaN or infinite; at the next report.
        """
        self._step += 1
        self._now += 1
        done, budget, checkpoint = self._step, self.budget, self.checkpoint
        elapsed = time.monotonic() - self._began
        last = done >= budget.steps or (
            budget.time_limit is not None and elapsed >= budget.time_limit
        )
        due = checkpoint is not None and (last or done % checkpoint.every == 0)
        if not (last or due or done == 1 or done % self._every == 0):
            return False
        self._report(elapsed)
        if checkpoint is not None and (due or self.progress.stopped):
            checkpoint.save(self._state())
        return last or self.progress.stopped or self._out_of_patience()

    def _report(self, elapsed: float) -> None:
        if not self._finite:
            raise FloatingPointError(
                f"Score or gradient became NaN or infinite by step {self._step}; load the "
                "model with dtype=torch.float32, or with torch.bfloat16 if it was float16. With "
                "float32 its weights are damaged."
            )
        progress = self.progress
        progress.step, progress.elapsed = self._step, elapsed
        progress.ids, progress.scores = self.ids.clone(), self.scores.clone()
        progress.history.append((self._step, self.scores.tolist()))
        if self.callback is not None and self.callback(progress):
            progress.stopped = True

    def _out_of_patience(self) -> bool:
        patience = self.budget.patience
        return patience is not None and bool((self._step - 1 - self._steps >= patience).all())

    def resume(
        self,
        P: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        generators: Sequence[torch.Generator] = (),
        tensors: Sequence[torch.Tensor] = (),
    ) -> int:
        """Restore everything from the checkpoint; returns the step to begin with.

        Args:
            P: continuous prompt.
            optimizer: of `P`.
            generators: random generators that the next steps draw from.
            tensors: further state of the method that is changed in place.
        """
        self._method_state = (P, optimizer, generators, tensors)
        state = None if self.checkpoint is None else self.checkpoint.load()
        if state is None:
            return 0
        P.data.copy_(state["P"])
        inner = {int(k): values for k, values in state["optimizer"].items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": inner, "param_groups": groups})
        for k, generator in enumerate(generators):
            generator.set_state(state["draws"][str(k)].cpu())
        for k, values in enumerate(tensors):
            values.copy_(state["also"][str(k)])
        for name, values in self._best_state().items():
            values.copy_(state[name])
        self._step = state["step"]
        self._now.fill_(self._step)
        self._began -= state["elapsed"]
        progress = self.progress
        progress.step, progress.elapsed = self._step, state["elapsed"]
        progress.ids, progress.scores = self.ids.clone(), self.scores.clone()
        progress.history = [(step, scores) for step, scores in state["history"]]
        return self._step

    def _best_state(self) -> dict[str, torch.Tensor]:
        return {
            "ids": self.ids,
            "scores": self.scores,
            "chosen_by": self._chosen_by,
            "steps": self._steps,
        }

    def _state(self) -> dict[str, Any]:
        P, optimizer, generators, tensors = self._method_state
        inner = optimizer.state_dict()["state"]
        return {
            "P": P.detach(),
            "optimizer": {str(k): dict(values) for k, values in inner.items()},
            "draws": {str(k): one.get_state() for k, one in enumerate(generators)},
            "also": {str(k): values for k, values in enumerate(tensors)},
            **self._best_state(),
            "step": self._step,
            "elapsed": time.monotonic() - self._began,
            "history": [list(one) for one in self.progress.history],
        }
