"""Several jobs of a task in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from ..errors import ArgumentError, PartialError
from ..options import SearchOptions, with_share_of_time
from ..results import Report, ReportCallback

J = TypeVar("J")
P = TypeVar("P")
R = TypeVar("R")


class JobError(PartialError):
    """A job failed, by an argument, a NaN or lack of memory; its `__cause__` is the reason.

    Attributes:
        partial: the results of the jobs before it.
    """


def one_by_one(
    name: str,
    jobs: Sequence[J],
    options: SearchOptions,
    callback: ReportCallback | None,
    prepare: Callable[[J], P],
    search: Callable[[P, SearchOptions, ReportCallback | None], R],
) -> list[R]:
    """Do the jobs of one call, each with its own seed and an equal share of the time left.

    A result does not depend on the other jobs, unless there is a time limit.

    Args:
        name: of the argument that holds the jobs.
        jobs: one or more.
        options, callback: of the call.
        prepare: checks one job, and gives what `search` gets; all jobs come before any search.
        search: does one job.

    Returns:
        One result per job; fewer where the callback ended the search.

    Raises:
        ArgumentError: there are no jobs, or as `prepare` and, for the first job, `search`.
        JobError: a later job failed. Errors of the callback stay what they are.
    """
    if not jobs:
        raise ArgumentError(name, "is empty", "give at least one")
    ready, results, stopped = [prepare(job) for job in jobs], [], []
    began = time.monotonic()
    for turn, (job, seed) in enumerate(zip(ready, options.seeds(len(jobs)), strict=True)):
        report = callback and in_turn(callback, turn, len(jobs), stopped, began)
        try:
            shared = with_share_of_time(options, 1 / (len(jobs) - turn), began)
            results.append(search(job, replace(shared, seed=seed), report))
        except (ArgumentError, FloatingPointError, torch.OutOfMemoryError) as error:
            if not results:
                raise
            raise JobError(
                f"Job {turn + 1} of {len(jobs)} failed ({error}); `partial` has the results of "
                "the jobs before it.",
                results,
            ) from error
        if any(stopped):
            break
    return results


def in_turn(
    callback: ReportCallback, turn: int, turns: int, stopped: list[bool], began: float
) -> ReportCallback:
    """A callback for one of several searches.

    Args:
        callback: of the call.
        turn, turns: the place of the search, and how many there are.
        stopped: collects the answers of the callback.
        began: when the call began, by `time.monotonic`.
    """
    before = time.monotonic() - began

    def report(one: Report) -> bool:
        stopped.append(bool(callback(one.within(turn, turns, before))))
        return stopped[-1]

    return report
