"""Refinement: one token at a time is swapped for a better one, from prompts that PEZ has found.

PEZ moves all tokens at once and does not settle; swaps climb to the top of the hill that it is on,
and small kicks look at the hills beside it. What is old in it: candidates ranked by the gradient
and compared exactly (HotFlip, Ebrahimi et al. 2018; AutoPrompt, Shin et al. 2020; GCG, Zou et al.
2023), and iterated local search (Lourenço et al. 2003). What makes it fast here: all candidates of
a step are for one position, so that a causal tower looks once at what precedes it; the kicks of a
round are tried side by side; and since these versions of a prompt differ in little, a token that is
good in one of them is so in all: many are compared in the best version, few in the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from . import replay
from .search import Budget, Objective, Progress, Tracker, check_integer
from .space import TokenSpace

log = logging.getLogger(__name__)

# Visits of each position below which recording costs more than it brings.
_VISITS = 5
# Candidates encoded at once.
_ROWS = 2048


class RefinableObjective(Objective, Protocol):
    """An objective that can leave out what all candidates of a step share."""

    def given(self, embeddings: torch.Tensor) -> Objective:
        """The objective of what follows these (rows, n, dim) embeddings, one row per trial."""


class Prior(Protocol):
    """What counts in the choice between swaps beside the objective, such as how a prompt reads.

    The rows of `ids` are those of the problems in their order, as many for each.

    Attributes:
        recordable: it never waits for the device; see `pez_core.replay`.
    """

    recordable: bool

    def screen(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows, allowed) estimates for each token at a position."""

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len) ids -> (rows,) what is added to their scores."""


@dataclass(frozen=True)
class Refinement(Budget):
    """How to refine.

    Attributes:
        steps, patience, report_every, time_limit: see `Budget`. A step tries swaps at one position;
            a round has as many steps as the prompt has tokens.
        trials: versions of each prompt that are refined side by side. At the end of each round all
            become the best of them with one token changed at random.
        screened: tokens that are compared in the best version in a step, those with the best mean
            gradient.
        candidates: the best of these, which are then compared in each version.
    """

    steps: int = 128
    trials: int = 16
    screened: int = 128
    candidates: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trials", "screened", "candidates"):
            check_integer(name, getattr(self, name), 1)


def refine(
    space: TokenSpace,
    objective: RefinableObjective,
    ids: torch.Tensor,
    settings: Refinement = Refinement(),
    callback: Callable[[Progress], bool | None] | None = None,
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    seeds: Sequence[int],
    prior: Prior | None = None,
) -> Progress:
    """Improve prompts by swapping one token at a time.

    Args:
        space, objective, callback, acceptable: as in `pez_core.search`. Only acceptable prompts are
            swapped in.
        ids: (problems * trials, prompt_len) what to begin with, the trials of a problem in a row.
        settings: see `Refinement`.
        seeds: of each problem, for its random changes; a result depends on nothing else.
        prior: added to the scores of `objective` when prompts are compared.

    Returns:
        The best prompt of each problem, (problems, prompt_len), and its score by `objective`.

    Raises:
        ValueError: the number of `ids` is not that of `seeds` times `settings.trials`.
        FloatingPointError: a score or gradient became NaN or infinite; raised at the next report.
    """
    rows, prompt_len = ids.shape
    problems, trials = len(seeds), settings.trials
    if rows != problems * trials:
        raise ValueError(
            f"`ids` has to hold {problems} * {trials} prompts, for each of `seeds` as many as "
            f"`trials`, but holds {rows}."
        )
    generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
    shuffle = torch.Generator().manual_seed(0)  # the same for all problems, whatever is in a batch
    valid = space.only_allowed(acceptable)

    with torch.inference_mode(False):
        x = ids.clone()
        scores, worth = _score(space, objective, prior, x)
        best = Tracker(x.view(problems, trials, -1)[:, 0], settings, callback, valid)
        best.offer(*_best_trial(problems, worth, x, scores, worth))
        swaps: list[torch.Tensor] = []  # ids, scores and worths, which stay where they are

        def swaps_at(i: int) -> None:
            found, gradient = _swaps(space, objective, prior, x, worth, i, settings)
            best.check_finite(gradient, *found[1:])
            if swaps and recorder is not None:
                replay.put(swaps, found)
            else:
                swaps[:] = found if recorder is None else [one.clone() for one in found]

        # a graph is made at the second visit of a position, and pays from the fourth on
        recordable = settings.record and settings.steps >= _VISITS * prompt_len
        recordable = recordable and all(
            getattr(part, "recordable", False)
            for part in (space, objective, *([] if prior is None else [prior]))
        )
        recorder = replay.recorder_for(x.device) if recordable else None
        steps = [
            replay.Replay(
                partial(swaps_at, i), recorder, lambda: [*swaps, *best.changed()], warm_up=1
            )
            for i in range(prompt_len)
        ]
        order: list[int] = []
        while True:
            if not order:
                order = torch.randperm(prompt_len, generator=shuffle).tolist()
            steps[order.pop()]()
            replay.put((x, scores, worth), _improved((x, scores, worth), swaps, valid))
            best.offer(*_best_trial(problems, worth, x, scores, worth))
            if best.end_step():
                break
            if not order:
                kicks = zip(best.ids, generators, strict=True)
                kicked = torch.cat([space.changed(row, trials, one) for row, one in kicks])
                if valid is not None:
                    leads = best.ids.repeat_interleave(trials, dim=0)
                    kicked = torch.where(valid(kicked)[:, None], kicked, leads)
                x.copy_(kicked)
                replay.put((scores, worth), _score(space, objective, prior, x))
    log.debug("refined %d problems for %d steps", problems, best.progress.step)
    return best.progress


# Ids (..., prompt_len), their scores (...) and what they are worth with the prior (...).
Prompts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _swaps(
    space: TokenSpace,
    objective: RefinableObjective,
    prior: Prior | None,
    x: torch.Tensor,
    worth: torch.Tensor,
    i: int,
    settings: Refinement,
) -> tuple[Prompts, torch.Tensor]:
    """The most promising (rows, candidates) swaps at position i of each row, and the gradient.

    The gradient of a single version is too rough a guide; the mean of all is better, and the best
    version tells which of the tokens that it promises keep the promise.
    """
    problems = len(x) // settings.trials
    embeddings = space.embed(x)
    rest = objective.given(embeddings[:, :i])
    with torch.enable_grad():
        suffix = embeddings[:, i:].requires_grad_()
        loss, _ = rest(suffix, 0)
        (gradient,) = torch.autograd.grad(loss.sum(), suffix)
    with torch.no_grad():
        gradient = gradient.unflatten(0, (problems, -1)).mean(dim=1)
        (lead,) = _best_trial(problems, worth, x)
        likely = None if prior is None else prior.screen(lead, i)
        swaps, bonus = space.swaps(lead, gradient, i, settings.screened, likely)
        alone = objective.given(space.embed(lead[:, :i]))
        promise = _scores_behind(space, alone, space.swapped(lead, swaps, i), i)
        if bonus is not None:
            promise = promise + bonus
        picks = promise.topk(min(settings.candidates, promise.shape[1]), dim=1).indices
        swaps = swaps.gather(1, picks[..., None].expand(-1, -1, swaps.shape[2]))

        swapped = space.swapped(x, swaps.repeat_interleave(settings.trials, dim=0), i)
        scores = _scores_behind(space, rest, swapped, i)
        if prior is None:
            return (swapped, scores, scores), gradient
        worth = scores + prior.score(swapped.flatten(0, 1)).view(scores.shape)
        return (swapped, scores, worth), gradient


def _scores_behind(
    space: TokenSpace, rest: Objective, swapped: torch.Tensor, i: int
) -> torch.Tensor:
    """(rows, candidates) scores of prompts, by an objective of what they are from position i on."""
    few = max(1, _ROWS // len(swapped))
    parts = [
        rest(space.embed(part[:, :, i:].flatten(0, 1)), 0)[1].view(len(swapped), -1)
        for part in swapped.split(few, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _improved(
    now: Prompts,
    swaps: Prompts,
    valid: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Prompts:
    """Each row with its best valid swap where that is better."""
    swapped, _, worth = swaps
    every = torch.arange(len(swapped), device=swapped.device)
    while True:
        top, choice = worth.max(dim=1)
        better = top > now[2]
        refused = torch.zeros_like(better)
        if valid is not None and better.any():
            refused[better] = ~valid(swapped[every, choice][better])
        if valid is None or not refused.any():
            new = [part[every, choice] for part in swaps]
            x = torch.where(better[:, None], new[0], now[0])
            return x, *(torch.where(better, a, b) for a, b in zip(new[1:], now[1:], strict=True))
        worth = worth.clone()
        worth[every[refused], choice[refused]] = -torch.inf


@torch.no_grad()
def _score(
    space: TokenSpace, objective: RefinableObjective, prior: Prior | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of rows, and what they are worth with the prior."""
    _, scores = objective(space.embed(x), 0)
    return scores, scores if prior is None else scores + prior.score(x)


def _best_trial(
    problems: int, worth: torch.Tensor, *parts: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of each of some (rows, ...) tensors the row of each problem that is worth the most."""
    choice = worth.view(problems, -1).argmax(dim=1)
    every = torch.arange(problems, device=worth.device)
    return tuple(part.view(problems, -1, *part.shape[1:])[every, choice] for part in parts)
