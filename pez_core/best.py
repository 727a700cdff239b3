"""The best prompts so far of all searches, and the reports of them."""

from __future__ import annotations

import time

import torch

from .problem import Problem
from .results import Report, Trajectory, best_of_restarts
from .scoring import contributions
from .tracker import Progress


class BestSoFar:
    """The best prompt so far of every search, of which some may not have had their turn.

    Attributes:
        spans: the searches of each turn, `options.batch_size` of them.
        ids: (searches, prompt_len) their best ids.
        history: of each target; see `Result`.
        trajectories: by search, of those that had their turn, where they are kept.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._restarts = problem, problem.options.restarts
        self._steps, self._done = problem.work.total, 0
        count = problem.options.batch_size or len(problem.ids)
        self.spans = [slice(k, k + count) for k in range(0, len(problem.ids), count)]
        self.ids = problem.ids[:, 0].clone()
        self.scores = torch.full((len(self.ids),), -torch.inf, device=self.ids.device)
        self.history: list[list[tuple[int, float]]] = [[] for _ in problem.targets]
        self.trajectories: dict[int, Trajectory] = {}
        self._failures: dict[int, FloatingPointError] = {}
        self._ended = 0

    @property
    def _time_limit(self) -> float | None:
        """The time limit, where it decides the number of steps."""
        work = self._problem.work
        return self._problem.options.time_limit if work.until_time_limit else None

    def take(self, span: slice, progress: Progress, before: int = 0) -> None:
        """Store what the searches of `span` found, `before` steps into their turn."""
        done = self._steps_before(span, before)
        first = span.start // self._restarts
        searches = len(self.ids[span])
        last = min(len(self.history), -(-span.stop // self._restarts))
        for step, scores in progress.history:
            trials = len(scores) // searches
            for k in range(first, last):
                begin = max(k * self._restarts, span.start) - span.start
                end = min((k + 1) * self._restarts - span.start, searches)
                # other restarts of this target may have been in an earlier span
                others = self.scores[k * self._restarts : span.start].tolist()
                top = max([*scores[begin * trials : end * trials], *others])
                self.history[k].append((done + step, top))
        self.ids[span], self.scores[span] = self._best_trials(span, progress)
        self._done += progress.step

    def fail(self, span: slice, error: FloatingPointError) -> None:
        """Store that the searches of `span` failed, which keep the best prompts before that."""
        self._failures |= dict.fromkeys(range(len(self.ids))[span], error)

    def end(self) -> None:
        """Store that a turn did not fail."""
        self._ended += 1

    def check(self) -> None:
        """Raise the error of the first search that failed, where all turns failed."""
        if self._failures and not self._ended:
            raise next(iter(self._failures.values()))

    def note(self, k: int) -> str:
        """A remark on target `k` where a search of it failed or had no turn, "" otherwise."""
        searches = range(k * self._restarts, (k + 1) * self._restarts)
        failed = [self._failures[n] for n in searches if n in self._failures]
        scores = self.scores[searches.start : searches.stop]
        is_initial = bool((scores == -torch.inf).all())
        if failed and len(failed) < len(searches) and not is_initial:
            return f"{len(failed)} of {len(searches)} searches failed ({failed[0]})."
        if failed:
            which = "initial prompt" if is_initial else "best prompt before that"
            return f"The search failed ({failed[0]}); this is the {which}."
        if is_initial:
            return "The search ended before this prompt had its turn; it is the initial prompt."
        return ""

    def _steps_before(self, span: slice, before: int) -> int:
        """Steps of earlier turns, and `before` of this one."""
        if self._time_limit is not None:
            return self._done
        return self.spans.index(span) * self._steps + before

    def _best_trials(self, span: slice, progress: Progress) -> tuple[torch.Tensor, torch.Tensor]:
        searches = len(self.ids[span])
        scores, choice = progress.scores.view(searches, -1).max(dim=1)
        ids = progress.ids.view(searches, -1, progress.ids.shape[1])
        return ids[torch.arange(searches, device=ids.device), choice], scores

    def report(self, span: slice, progress: Progress, before: int = 0) -> Report:
        """The report of a step of the searches in `span`, `before` steps into their turn."""
        ids, scores = self.ids.clone(), self.scores.clone()
        ids[span], scores[span] = self._best_trials(span, progress)
        chosen, similarities = best_of_restarts(ids, scores, self._restarts)
        problem = self._problem
        elapsed = time.monotonic() - problem.began
        step = self._steps_before(span, before) + progress.step
        steps = len(self.spans) * self._steps
        if self._time_limit is not None:  # extrapolated from the speed so far
            steps = max(step, round(step * self._time_limit / max(elapsed, 1e-3)))
        return Report(
            step,
            steps,
            elapsed,
            similarities,
            decode=lambda k: problem.caption.print(chosen[k]),
            explain=lambda k, prompt: contributions(
                problem.clip,
                problem.caption.print(chosen[k]) if prompt is None else prompt,
                problem.targets[k].towards,
            ),
            part=self._part(span, progress, before, step, steps),
        )

    def _part(
        self, span: slice, progress: Progress, before: int, step: int, steps: int
    ) -> tuple[int, int, bool]:
        """`Report.part`."""
        if self._time_limit is not None:  # all parts end with the time
            return step, steps, False
        refined_later = not before and self._problem.work.swaps > 0
        return progress.step, progress.steps, refined_later or span != self.spans[-1]
