"""One search for several targets at once: prepare, descend, refine, verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .best import BestSoFar
from .caption import Caption
from .objectives import SampledSimilarity, Similarity, WeightedSum
from .options import SearchOptions
from .pez import PezSettings, search
from .priors import SumOfPriors
from .problem import Problem, PromptTarget, prepare, uses_language_model
from .results import ReportCallback, Result, Trajectory
from .seeds import child_seed
from .single_words import SingleWordPrior, WordFeatures, sample_of
from .swaps import Prior, SwapSettings, refine
from .tower_work import counted
from .tracker import Progress
from .verify import verify
from .writing import WritingSettings, write

if TYPE_CHECKING:
    from .clip import AnyClip

# Steps of a refinement that only a time limit ends.
_ENDLESS = 10**9
# The random stream of a seed that baselines draw from, beside that of the initial prompt.
_DRAWS = (0, 0)


def learn(
    clip: AnyClip,
    targets: Sequence[PromptTarget],
    options: SearchOptions,
    prompt_len: int,
    callback: ReportCallback | None = None,
    *,
    caption: str | tuple[str, str] = "{}",
    encoded: str | tuple[str, str] | None = None,
    inserts: Sequence[tuple[int, str, str]] = (),
    word_weight: float = 0.0,
) -> list[Result]:
    """Search a prompt for each target, every restart of every target a problem of one batch.

    A result does not depend on the targets beside it.

    Args:
        clip: from `load_clip`.
        targets: one per prompt.
        options: see `SearchOptions`.
        prompt_len: tokens to learn.
        callback: called with a `Report`; a true return value ends the search.
        caption, encoded, inserts: see `Caption`.
        word_weight: of the prior of single words (`pez_core.single_words.SingleWordPrior`).

    Raises:
        ArgumentError: the prompt does not fit the context, the vocabulary is empty, the initial
            prompt does not fit or holds a blocked word, or the extra loss is for another number of
            prompts.
        FloatingPointError: a score or gradient became NaN or infinite. With `batch_size` the other
            searches go on; where one of them ends well, the results of those that failed have a
            `note` instead.
    """
    frame = Caption(clip, caption, encoded, inserts, as_written=uses_language_model(options))
    with counted() as work:
        problem = prepare(clip, targets, options, prompt_len, frame, word_weight)
        best = BestSoFar(problem)
        for turn, span in enumerate(best.spans):
            try:
                stopped = _search(problem, best, span, len(best.spans) - turn, callback)
            except FloatingPointError as error:
                best.fail(span, error)
                continue
            best.end()
            if stopped:
                break
        best.check()
        results = verify(problem, best)
    return [replace(result, tower_flops=work.flops) for result in results]


def _search(
    problem: Problem,
    best: BestSoFar,
    span: slice,
    turns_left: int,
    callback: ReportCallback | None,
) -> bool:
    """All steps of the searches in `span`; whether the callback ended them."""
    found = descend(problem, best, span, turns_left, callback)
    if not found.stopped and problem.work.swaps:
        found = refine_span(problem, best, span, turns_left, found, callback)
    return found.stopped


def descend(
    problem: Problem,
    best: BestSoFar,
    span: slice,
    turns_left: int,
    callback: ReportCallback | None,
) -> Progress:
    """PEZ for the searches in `span`, or the writing of their prompts."""
    if problem.writer is not None:
        return _written(problem, best, span, turns_left, callback)
    options, left = problem.options, problem.time_left(turns_left)
    settings = PezSettings(
        steps=problem.work.steps,
        patience=options.patience,
        time_limit=left and (left / 2 if problem.work.swaps else left),
        lr=options.lr,
        weight_decay=options.weight_decay,
    )
    report = callback and (lambda progress: callback(best.report(span, progress)))
    objective = _objective(problem, span, sampled=True)
    ids = problem.ids[span].flatten(0, 1)
    if options.method is None:
        steps = _Steps(problem.work.trials) if options.trajectory else None
        on_step = steps and steps.add
        found = search(
            problem.space, objective, ids, settings, report, problem.acceptable, on_step=on_step
        )
        best.trajectories |= enumerate(steps.of_searches() if steps else [], span.start)
    else:
        # baselines swap tokens of a space of phrases one by one
        good = problem.space.only_allowed(problem.acceptable)
        draws = [
            torch.Generator().manual_seed(child_seed(seed, *_DRAWS))
            for seed in problem.search_seeds[span]
        ]
        found = options.method(
            problem.space, objective, ids, settings, report, good, generator=draws
        )
    best.take(span, found)
    return found


def _written(
    problem: Problem,
    best: BestSoFar,
    span: slice,
    turns_left: int,
    callback: ReportCallback | None,
) -> Progress:
    """The prompts of the searches in `span`, written from left to right."""
    assert problem.writer is not None
    left, trials = problem.time_left(turns_left), problem.work.trials
    settings = WritingSettings(
        steps=problem.prompt_len,
        time_limit=left and left / 2,
        beams=max(WritingSettings.beams, trials),
        results=trials,
    )
    found = write(
        problem.space,
        _similarity(problem, problem.owners[span]),
        problem.writer,
        problem.prompt_len,
        settings,
        callback and (lambda progress: callback(best.report(span, progress))),
        problem.space.only_allowed(problem.acceptable),
        seeds=problem.search_seeds[span],
        firsts=problem.firsts[span],
        start=problem.ids[span].flatten(0, 1),
    )
    best.take(span, found)
    return found


class _Steps:
    """Collects the steps of `search`, with this number of rows for each search."""

    def __init__(self, trials: int) -> None:
        self.trials, self._parts = trials, ([], [], [])

    def add(self, *step: torch.Tensor) -> None:
        """Keep ids, losses and the continuous prompt of a step."""
        for parts, part in zip(self._parts, step, strict=True):
            parts.append(part.cpu().clone())

    def of_searches(self) -> list[Trajectory]:
        """The steps of each search."""
        ids, losses, embeddings = (torch.stack(parts) for parts in self._parts)
        pieces = (part.split(self.trials, dim=1) for part in (ids, losses, embeddings))
        return [Trajectory(*one) for one in zip(*pieces, strict=True)]


def _objective(problem: Problem, span: slice, sampled: bool = False) -> Similarity | WeightedSum:
    """The objective of the searches in `span`; all trials have rows of their own.

    Args:
        problem: of the search.
        span: the searches.
        sampled: as in `_similarity`.
    """
    owners, extra = problem.owners[span], problem.options.extra_loss
    if extra is None:
        return _similarity(problem, owners, sampled)
    loss = extra.objective(problem.caption.before, problem.caption.after, owners)
    if extra.weight == 1:
        return WeightedSum(None, loss, 0, extra.weight)
    columns = sum(columns for columns, _ in problem.clip.text.parts)
    return WeightedSum(_similarity(problem, owners, sampled), loss, columns, extra.weight)


def _similarity(problem: Problem, owners: Sequence[int], sampled: bool = False) -> Similarity:
    """The similarity with the targets of these numbers.

    Args:
        problem: of the search.
        owners: the target of each row.
        sampled: take the loss on a few targets per step, where the target has a `batch_size`.
    """
    encode, rows, weights = problem.encoder, [problem.targets[k] for k in owners], None
    if rows[0].direction is not None:
        features = torch.stack([row.towards for row in rows])[:, None]
    else:
        features = torch.stack([row.features for row in rows])
        weights = torch.stack([row.weights for row in rows])
    if rows[0].batch_size is None or not sampled:
        return Similarity(encode, features, weights)
    generator = torch.Generator().manual_seed(problem.seeds[0] % 2**63)
    return SampledSimilarity(encode, features, weights, rows[0].batch_size, generator)


def refine_span(
    problem: Problem,
    best: BestSoFar,
    span: slice,
    turns_left: int,
    descended: Progress,
    callback: ReportCallback | None,
) -> Progress:
    """Swaps for the searches in `span`, starting from what PEZ found."""
    options, work, owners = problem.options, problem.work, problem.owners[span]

    def waiting() -> bool:
        begun = replace(descended, step=0)
        descended.stopped = bool(callback and callback(best.report(span, begun, work.steps)))
        return descended.stopped

    prior = _prior(problem, owners, descended.ids, turns_left, waiting)
    if descended.stopped:
        return descended
    found = refine(
        problem.space,
        _objective(problem, span),
        descended.ids,
        SwapSettings(
            steps=_ENDLESS if work.until_time_limit else work.swaps,
            patience=options.patience,
            time_limit=problem.time_left(turns_left),
            trials=work.trials,
            screened=work.screened,
        ),
        callback and (lambda progress: callback(best.report(span, progress, work.steps))),
        acceptable=problem.acceptable,
        seeds=problem.search_seeds[span],
        prior=prior,
    )
    best.take(span, found, work.steps)
    return found


def _prior(
    problem: Problem,
    owners: Sequence[int],
    ids: torch.Tensor,
    turns_left: int,
    waiting: Callable[[], bool],
) -> Prior | None:
    """What counts beside the similarity; `waiting` reports, and is true where the search ends.

    Single words do not count where their features would take half of the time left.
    """
    priors: list[Prior] = [problem.readability] if problem.readability else []
    if problem.word_weight:
        words, left = WordFeatures(problem.clip), problem.time_left(turns_left)
        first = torch.cat([sample_of(problem.space.allowed, words), ids.flatten()])
        if words.prepare(first, left and left / 2, waiting):
            towards = torch.stack([problem.targets[k].towards for k in owners])
            priors.append(SingleWordPrior(words, problem.space, towards, problem.word_weight))
    return SumOfPriors(priors) if priors else None
