"""Refinement: swaps of single tokens, starting from prompts that PEZ has found.

PEZ moves all tokens at once and does not converge. Swaps climb to a local optimum, and random
changes between rounds leave it again. Known parts: candidates ranked by the gradient and compared
exactly (HotFlip, Ebrahimi et al. 2018; AutoPrompt, Shin et al. 2020; GCG, Zou et al. 2023) and
iterated local search (Lourenço et al. 2003). Three things make it fast here. All candidates of a
step are for one position, so that a causal tower encodes the tokens before it once. Several trials
of each prompt are refined side by side. And since the trials of a prompt differ in few tokens, a
token that is good in one is good in all: many are compared in the best trial, few in the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from . import capture
from .errors import ArgumentError, check_integer
from .pez import Objective
from .space import TokenSpace
from .tracker import Acceptable, Budget, Callback, Progress, Tracker

log = logging.getLogger(__name__)

# Steps per position below which capturing costs more than it saves: a graph is captured at the
# second step of a position, and pays from the fourth on.
_STEPS_PER_POSITION = 5
# Candidates encoded at once; `nodes/memory.py` has the same number.
ROWS = 2048


class RefinableObjective(Protocol):
    """An objective that can reuse what all candidates of a step have in common."""

    def __call__(self, embeddings: torch.Tensor, step: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective`."""
        ...

    def given(self, embeddings: torch.Tensor) -> Objective:
        """The objective of the tokens behind these (rows, n, dim) embeddings, one row per trial."""
        ...


class Prior(Protocol):
    """A term that is added to the scores when prompts are compared, such as readability.

    The rows of `ids` belong to the problems in their order, equally many for each.

    Attributes:
        capturable: it never synchronises with the device; see `pez_core.capture`.
    """

    capturable: bool

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) estimates for each token at a position."""
        ...

    def corrections(self, swaps: torch.Tensor) -> torch.Tensor | float:
        """(rows, count, n) tokens to swap in, -1 for unchanged ones -> (rows, count).

        The exact change of `score` by each swap, less the estimate of `screen`. Later calls of
        `screen` may return the exact value.
        """
        ...

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,) terms to add to their scores."""
        ...


@dataclass(frozen=True)
class SwapSettings(Budget):
    """Settings of the refinement.

    Attributes:
        steps: number of steps, at least 1. A step tries swaps at one position; a round has as many
            steps as the prompt has tokens.
        patience, report_every, time_limit, capture: as in `PezSettings`.
        trials: variants of each prompt that are refined side by side, at least 1. After each round
            all become the best prompt with one token changed at random.
        screened: number of tokens that a step compares in the best trial, at least 1: those with
            the best mean gradient.
        candidates: number of the best of these that the step compares in each trial, at least 1.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: int = 128
    trials: int = 16
    screened: int = 128
    candidates: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trials", "screened", "candidates"):
            check_integer(name, getattr(self, name), 1)


@dataclass(frozen=True)
class _Task:
    """The fixed parts of a refinement."""

    space: TokenSpace
    objective: RefinableObjective
    prior: Prior | None
    valid: Acceptable | None
    settings: SwapSettings

    @torch.no_grad()
    def score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, prompt_len) ids -> their (rows,) scores, and the scores with the prior."""
        _, scores = self.objective(self.space.embed(x), 0)
        return scores, scores if self.prior is None else scores + self.prior.score(x)

    def changed_at_random(
        self, best: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """(problems, prompt_len) -> (rows, prompt_len), one random token changed in each trial."""
        trials = self.settings.trials
        pairs = zip(best, generators, strict=True)
        changed = torch.cat([self.space.changed(row, trials, one) for row, one in pairs])
        unchanged = best.repeat_interleave(trials, dim=0)
        if self.valid is None:
            return changed
        return torch.where(self.valid(changed)[:, None], changed, unchanged)


Prompts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Ids (..., prompt_len), their scores (...) and the scores with the prior (...)."""


def refine(
    space: TokenSpace,
    objective: RefinableObjective,
    ids: torch.Tensor,
    settings: SwapSettings = SwapSettings(),
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    seeds: Sequence[int],
    prior: Prior | None = None,
) -> Progress:
    """Improve prompts by swaps: each replaces one token by another of the space.

    Several trials of each problem, prompts of their own, are refined side by side. A step tries
    tokens at one position: it ranks them by the gradient, compares the most promising ones, and
    swaps in the best one in each trial where the score rises. A round has a step for each position.
    After it all trials start again from the best prompt, each with one token changed at random.

    Args:
        space: a `TokenSpace`; its allowed tokens may be swapped in.
        objective: as in `pez_core.search`, with a method `given` (see `RefinableObjective`), such
            as the result of `objective_for`, which has the targets of one problem. It is called
            with trials, or candidates of all trials: any multiple of the number of problems, those
            of the first problem first.
        ids: (problems * trials, prompt_len) ids to start from. The rows of one problem follow each
            other: problem k has the rows from k * trials on. `trials` is `settings.trials`.
        settings: steps, trials and more, see `SwapSettings`.
        callback: as in `pez_core.search`.
        acceptable: as in `pez_core.search`. A token is swapped in only if the new prompt is
            acceptable.
        seeds: one int per problem, for the random changes between rounds. The result of a problem
            does not depend on the others.
        prior: a `Prior`, whose score is added to that of `objective` when prompts are compared.
            None: the scores of `objective` decide.

    Returns:
        A `Progress`. Its `ids` (problems, prompt_len) are the best prompt of each problem, and its
        `scores` (problems,) are theirs by `objective` alone. With a `prior` the best is the prompt
        with the highest sum, so that another may have a higher score. A problem that had no
        acceptable prompt has the ids of its first trial and the score -inf.

    Raises:
        ArgumentError: the number of rows of `ids` is not `len(seeds) * settings.trials`.
        FloatingPointError: a score or gradient became NaN or infinite. It is raised when the next
            report is due, up to `report_every` steps later.
    """
    problems, trials = len(seeds), settings.trials
    if len(ids) != problems * trials:
        raise ArgumentError(
            "ids",
            f"has to hold {problems} * {trials} prompts, `trials` for each of `seeds`, but holds "
            f"{len(ids)}",
        )
    task = _Task(space, objective, prior, space.only_allowed(acceptable), settings)
    generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
    shuffle = torch.Generator().manual_seed(0)  # one order of positions, whatever is in the batch
    with torch.inference_mode(False):
        x = ids.clone()
        scores, totals = task.score(x)
        best = Tracker(x.view(problems, trials, -1)[:, 0], settings, callback, task.valid)
        best.update(*_best_trial(problems, totals, x, scores, totals))
        swaps_at = _swap_steps(task, best, x, totals)
        order: list[int] = []
        while True:
            order = order or torch.randperm(ids.shape[1], generator=shuffle).tolist()
            swaps = swaps_at(order.pop())
            capture.put((x, scores, totals), _improved((x, scores, totals), swaps, task.valid))
            best.update(*_best_trial(problems, totals, x, scores, totals))
            if best.end_step():
                break
            if not order:
                x.copy_(task.changed_at_random(best.ids, generators))
                capture.put((scores, totals), task.score(x))
    log.debug("refined %d problems for %d steps", problems, best.progress.step)
    return best.progress


def _swap_steps(
    task: _Task, best: Tracker, x: torch.Tensor, totals: torch.Tensor
) -> Callable[[int], Sequence[torch.Tensor]]:
    """A function from a position to the best swaps there, which may be captured by position."""
    prompt_len, settings = x.shape[1], task.settings
    parts = [task.space, task.objective, *([] if task.prior is None else [task.prior])]
    pays = settings.steps >= _STEPS_PER_POSITION * prompt_len
    recorder = None
    if pays and capture.capturable(*parts) and settings.captures_on(x.device):
        recorder = capture.recorder_for(x.device)
    swaps: list[torch.Tensor] = []  # ids, scores, scores with the prior; graphs write to them

    def step(i: int) -> None:
        found, gradient = _swaps(task, x, totals, i)
        best.check_finite(gradient, found[1])
        best.check_scores(found[2])
        if swaps and recorder is not None:
            capture.put(swaps, found)
        else:
            swaps[:] = found if recorder is None else [one.clone() for one in found]

    steps = [
        capture.Replay(partial(step, i), recorder, lambda: [*swaps, *best.changed()], warm_up=1)
        for i in range(prompt_len)
    ]

    def swaps_at(i: int) -> Sequence[torch.Tensor]:
        steps[i]()
        return swaps

    return swaps_at


def _swaps(
    task: _Task, x: torch.Tensor, totals: torch.Tensor, i: int
) -> tuple[Prompts, torch.Tensor]:
    """The most promising (rows, candidates) swaps at position i of each row, and the gradient.

    The gradient of one trial is a rough guide; the mean over all trials is better. The tokens that
    it ranks highest are then compared exactly in the best trial.
    """
    space, settings = task.space, task.settings
    problems = len(x) // settings.trials
    embeddings = space.embed(x)
    rest = task.objective.given(embeddings[:, :i])
    with torch.enable_grad():
        suffix = embeddings[:, i:].requires_grad_()
        loss, _ = rest(suffix, 0)
        (gradient,) = torch.autograd.grad(loss.sum(), suffix)
    with torch.no_grad():
        gradient = gradient.unflatten(0, (problems, -1)).mean(dim=1)
        (lead,) = _best_trial(problems, totals, x)
        likely = None if task.prior is None else task.prior.screen(lead, i)
        swaps, bonus = space.swaps(lead, gradient, i, settings.screened, likely)
        alone = task.objective.given(space.embed(lead[:, :i]))
        promise = scores_behind(space, alone, space.swapped(lead, swaps, i), i)
        if bonus is not None and task.prior is not None:
            promise = promise + bonus + task.prior.corrections(swaps)
        picks = promise.topk(min(settings.candidates, promise.shape[1]), dim=1).indices
        swaps = swaps.gather(1, picks[..., None].expand(-1, -1, swaps.shape[2]))

        swapped = space.swapped(x, swaps.repeat_interleave(settings.trials, dim=0), i)
        scores = totals = scores_behind(space, rest, swapped, i)
        if task.prior is not None:
            totals = scores + task.prior.score(swapped.flatten(0, 1)).view(scores.shape)
        # a token that the leading trial lacks may be in another
        return (swapped, scores, totals.masked_fill(space.repeated(swapped), -torch.inf)), gradient


def scores_behind(
    space: TokenSpace, rest: Objective, swapped: torch.Tensor, i: int
) -> torch.Tensor:
    """(rows, candidates) scores of prompts by an objective of their tokens from position i on."""
    few = max(1, ROWS // len(swapped))
    parts = [
        rest(space.embed(part[:, :, i:].flatten(0, 1)), 0)[1].view(len(swapped), -1)
        for part in swapped.split(few, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _improved(
    now: Prompts, swaps: Sequence[torch.Tensor], valid: Acceptable | None
) -> tuple[torch.Tensor, ...]:
    """Each row with its best valid swap where that is better."""
    swapped, _, totals = swaps
    every = torch.arange(len(swapped), device=swapped.device)
    while True:
        top, choice = totals.max(dim=1)
        better = top > now[2]
        refused = torch.zeros_like(better)
        if valid is not None and better.any():
            refused[better] = ~valid(swapped[every, choice][better])
        if valid is None or not refused.any():
            new = [part[every, choice] for part in swaps]
            x = torch.where(better[:, None], new[0], now[0])
            return x, *(torch.where(better, a, b) for a, b in zip(new[1:], now[1:], strict=True))
        totals = totals.clone()
        totals[every[refused], choice[refused]] = -torch.inf


def _best_trial(
    problems: int, totals: torch.Tensor, *parts: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of each of some (rows, ...) tensors the row of each problem with the highest total."""
    choice = totals.view(problems, -1).argmax(dim=1)
    every = torch.arange(problems, device=totals.device)
    return tuple(part.view(problems, -1, *part.shape[1:])[every, choice] for part in parts)
