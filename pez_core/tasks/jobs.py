"""Several jobs of a task in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ..errors import ArgumentError
from ..options import SearchOptions
from ..results import Report, ReportCallback
from ..runner import with_share_of_time

J = TypeVar("J")
R = TypeVar("R")


def one_by_one(
    name: str,
    jobs: Sequence[J],
    options: SearchOptions,
    callback: ReportCallback | None,
    search: Callable[[J, SearchOptions, ReportCallback | None], R],
) -> list[R]:
    """Do the jobs of one call, each with its own seed and an equal share of the time limit.

    A result does not depend on the other jobs, unless there is a time limit.

    Args:
        name: of the argument that holds the jobs.
        jobs: one or more.
        options, callback: of the call.
        search: does one job.

    Returns:
        One result per job; fewer where the callback ended the search.

    Raises:
        ArgumentError: there are no jobs, or as `search`.
    """
    if not jobs:
        raise ArgumentError(name, "is empty", "give at least one")
    results, stopped = [], []
    shared = with_share_of_time(options, 1 / len(jobs))
    for turn, (job, seed) in enumerate(zip(jobs, options.seeds(len(jobs)), strict=True)):
        report = callback and in_turn(callback, turn, len(jobs), stopped)
        results.append(search(job, replace(shared, seed=seed), report))
        if any(stopped):
            break
    return results


def in_turn(callback: ReportCallback, turn: int, turns: int, stopped: list[bool]) -> ReportCallback:
    """A callback for one of several searches; `stopped` collects its answers."""

    def report(one: Report) -> bool:
        stopped.append(bool(callback(one.within(turn, turns))))
        return stopped[-1]

    return report
