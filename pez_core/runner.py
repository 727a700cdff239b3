"""One search for several targets at once: prepare, descend, refine, verify."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .articles import with_right_articles
from .caption import Caption
from .errors import ArgumentError
from .fluency import FluencyLoss
from .objectives import SampledSimilarity, Similarity, WeightedSum
from .options import Effort, SearchOptions
from .pez import PezSettings, search
from .priors import (
    FluencyPrior,
    ReadabilityPrior,
    SumOfPriors,
    kind_of,
    needed_language_model,
    reads_like_clip,
)
from .prompt_text import read
from .readability import FUNCTION_WORDS
from .results import Candidate, Report, ReportCallback, Result, Trajectory, best_of_restarts
from .scoring import contributions
from .seeds import child_seed, restart_seed
from .single_words import SingleWordPrior, WordFeatures, sample_of
from .space import PhraseSpace, TokenSpace
from .swaps import ROWS, Prior, SwapSettings, refine
from .tags import Tags
from .token_lm import load_token_lm
from .tower_work import counted
from .tracker import Progress
from .vocabulary import Blocklist, Lexicon, Vocabulary
from .writing import WritingSettings, write

if TYPE_CHECKING:
    from .clip import AnyClip
    from .clip.text import Encoder

log = logging.getLogger(__name__)

# Steps of a refinement that only a time limit ends.
_ENDLESS = 10**9
# The random stream of a seed that baselines draw from, beside that of the initial prompt.
_DRAWS = (0, 0)
# A vocabulary of fewer words per token of the prompt needs some of them twice.
_WORDS_PER_TOKEN = 2
# Similarity that the order of tags may cost. More is lost in few prompts, but much in these.
_ORDER_COSTS = 0.01
# Random initial prompts that are tried until one is acceptable.
_TRIES = 100


@dataclass(frozen=True)
class PromptTarget:
    """The target of one prompt.

    Attributes:
        features: (n, features) unit features of images and texts.
        weights: (n,) their weights, below 0 for those to avoid.
        avoid: (n,) bool, those to avoid.
        direction: (features,) direction to search in, in place of the weighted sum of the features.
        batch_size: targets that the loss is taken on per step; None: all of them.
    """

    features: torch.Tensor
    weights: torch.Tensor
    avoid: torch.Tensor
    direction: torch.Tensor | None = None
    batch_size: int | None = None

    @property
    def towards(self) -> torch.Tensor:
        """(features,); the dot product with a prompt's features is its score."""
        return self.weights @ self.features if self.direction is None else self.direction


@dataclass(frozen=True)
class Problem:
    """All that a search needs, as `prepare` computes it.

    The searches are numbered target by target, with the restarts of a target in a row.

    Attributes:
        clip, targets, options: as in `learn`.
        prompt_len: tokens to learn.
        caption: the fixed text.
        word_weight: of the prior of single words.
        space: the allowed tokens.
        acceptable: a check of prompts that may become the best, and of what these may begin with;
            None: all pass.
        seeds: one per target.
        ids: (searches, trials, prompt_len) initial prompts.
        readability: the prior of `options.read_weight`; None: there is none.
        writer: the prior that prompts are written with; None: PEZ finds them.
        began: time of the call.
    """

    clip: AnyClip
    targets: Sequence[PromptTarget]
    options: SearchOptions
    prompt_len: int
    caption: Caption
    word_weight: float
    space: TokenSpace
    acceptable: Callable[[torch.Tensor], torch.Tensor] | None
    seeds: list[int]
    ids: torch.Tensor
    readability: ReadabilityPrior | FluencyPrior | None
    writer: FluencyPrior | None
    began: float

    @property
    def work(self) -> Effort:
        """The steps, swaps and trials; where prompts are written, a step for each token."""
        work = self.options.work
        return replace(work, steps=self.prompt_len) if self.writer else work

    @property
    def search_seeds(self) -> list[int]:
        """The seed of each search."""
        restarts = range(self.options.restarts)
        return [restart_seed(seed, restart) for seed in self.seeds for restart in restarts]

    @property
    def encoder(self) -> Encoder:
        """Text features of learned words inside of the caption."""
        text, caption = self.clip.text, self.caption
        contexts = caption.contexts(self.prompt_len)
        if contexts is not None:
            return text.encoder_of_contexts(contexts)
        return text.encoder([(caption.before, caption.after)], caption.inserts)

    @property
    def owners(self) -> list[int]:
        """The number of the target of each search."""
        return [k for k in range(len(self.targets)) for _ in range(self.options.restarts)]

    def time_left(self, turns: int) -> float | None:
        """Seconds for the next of `turns` turns, each with an equal share."""
        limit = self.options.time_limit
        # a search needs a moment to end by itself with its best prompt
        return limit and max(limit - (time.monotonic() - self.began), 1e-3) / turns


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
    """
    frame = Caption(clip, caption, encoded, inserts, as_written=_reads(options))
    with counted() as work:
        problem = prepare(clip, targets, options, prompt_len, frame, word_weight)
        best = BestSoFar(problem)
        for turn, span in enumerate(best.spans):
            turns_left = len(best.spans) - turn
            found = descend(problem, best, span, turns_left, callback)
            if not found.stopped and problem.work.swaps:
                found = refine_span(problem, best, span, turns_left, found, callback)
            if found.stopped:
                break
        results = verify(problem, best)
    return [replace(result, tower_flops=work.flops) for result in results]


def _reads(options: SearchOptions) -> bool:
    """Whether a language model says that prompts read well."""
    return options.read_weight > 0 or isinstance(options.extra_loss, FluencyLoss)


def default_len(clip: AnyClip, wanted: int, caption: str = "{}") -> int:
    """Tokens to learn where the options do not say: `wanted`, or what the context holds.

    A caption that fills the context is encoded in several, of which one holds the learned tokens.
    """
    room = Caption(clip, caption).room
    return min(wanted, room if room > 0 else clip.text.max_prompt_len)


# 1. Prepare.


def prepare(
    clip: AnyClip,
    targets: Sequence[PromptTarget],
    options: SearchOptions,
    prompt_len: int,
    frame: Caption,
    word_weight: float,
) -> Problem:
    """Everything that is fixed before the first step: caption, allowed tokens, initial prompts."""
    began = time.monotonic()
    _check_extra_loss(options, len(targets))
    frame.check_room(prompt_len, one_context=options.extra_loss is not None)
    if note := frame.note(prompt_len):
        log.info(note)
    lexicon = _lexicon(clip, options)
    blocked = Blocklist(lexicon.blocked)
    space = _space(clip, options, lexicon, prompt_len, frame)
    single = [] if options.published else _round_trip_tokens(clip, lexicon)
    count = sum(len(phrase) == 1 for phrase in lexicon.phrases)
    # the published search has no such check
    all_round_trip = options.published or (
        clip.text.words.separable and frame.separate and count == len(single)
    )

    def acceptable(rows: torch.Tensor) -> torch.Tensor:
        around = frame if rows.shape[1] == prompt_len else frame.without_end()
        good = [
            (all_round_trip or around.round_trips(row))
            and not (blocked and around.blocked_word(row, blocked))
            for row in rows.tolist()
        ]
        return torch.tensor(good, device=rows.device)

    start = _Start(clip, options, lexicon, single, space, prompt_len, frame, blocked, acceptable)
    # by the seed alone, so that a result does not depend on its neighbours
    seeds = options.seeds(len(targets))
    starts = {seed: start.prompts(seed) for seed in set(seeds)}
    ids = torch.cat([starts[seed] for seed in seeds])
    fluent, readability = _readers(clip, options, frame, space, prompt_len)
    return Problem(
        clip=clip,
        targets=targets,
        options=options,
        prompt_len=prompt_len,
        caption=frame,
        word_weight=word_weight,
        space=space,
        # the check waits for the device, so it is left out where every prompt would pass
        acceptable=None if all_round_trip and not blocked else acceptable,
        seeds=seeds,
        ids=ids.view(len(targets) * options.restarts, options.work.trials, -1),
        readability=readability,
        writer=fluent if _can_write(options, space) else None,
        began=began,
    )


def _check_extra_loss(options: SearchOptions, prompts: int) -> None:
    extra = options.extra_loss
    if extra is not None and extra.prompts != prompts:
        raise ArgumentError(
            "extra_loss",
            f"is made for {extra.prompts} prompts, but {prompts} are learned",
            "make it of the same images, with the same `shared`",
        )


def _can_write(options: SearchOptions, space: TokenSpace) -> bool:
    """Whether prompts are written from left to right, a token at a time, from nothing."""
    begun = options.start_from is not None
    return options.wording != "free" and not begun and not isinstance(space, PhraseSpace)


def _readers(
    clip: AnyClip, options: SearchOptions, frame: Caption, space: TokenSpace, prompt_len: int
) -> tuple[FluencyPrior | None, ReadabilityPrior | FluencyPrior | None]:
    """The prior that prompts are written with, and the one that swaps are compared with."""
    weight, words, own = options.read_weight, clip.text.words, None
    if not weight:
        return None, None
    if reads_like_clip(words):
        kind = kind_of(options.wording)
        own = FluencyPrior(load_token_lm(), frame, space, prompt_len, kind, weight)
    elif options.wording != "free":
        raise ArgumentError(
            "wording",
            f"is {options.wording!r}, which needs CLIP's own tokenizer, and {clip.name} has "
            "another one",
            'take "free", with `readability` above 0 for words that read better',
        )
    model = needed_language_model(weight, options.language_model, clip.device, words)
    if model is None:
        return own, own
    return own, ReadabilityPrior(model, words, frame, space, weight)


def _lexicon(clip: AnyClip, options: SearchOptions) -> Lexicon:
    vocabulary = options.allowed
    if options.read_weight:
        # a language model would favour pieces of words for their looks
        vocabulary &= Vocabulary(dictionary=False)
    lexicon = vocabulary.lexicon(clip)
    if options.wording == "tags" and "," not in lexicon.blocked:
        comma = tuple(clip.text.words.encode_behind(","))
        return Lexicon(lexicon.phrases | {comma}, lexicon.blocked)
    if options.published and clip.trained_tokens is not None:
        trained = filter(clip.trained_tokens.issuperset, lexicon.phrases)
        return Lexicon(frozenset(trained), lexicon.blocked)
    return lexicon


def _tables(clip: AnyClip, options: SearchOptions) -> tuple[torch.Tensor, list[tuple[int, float]]]:
    """The token embeddings of all encoders side by side, and the (columns, weight) of each."""
    table, parts, extra = clip.text.token_embedding, clip.text.parts, options.extra_loss
    if extra is None:
        return table, parts
    other = extra.token_embedding[: len(table)].to(table.device)
    if extra.weight == 1:
        return other, extra.parts
    shares = [(columns, (1 - extra.projection) * weight) for columns, weight in parts]
    shares += [(columns, extra.projection * weight) for columns, weight in extra.parts]
    return torch.cat([table.detach().float(), other], dim=1), shares


def _space(
    clip: AnyClip, options: SearchOptions, lexicon: Lexicon, prompt_len: int, frame: Caption
) -> TokenSpace:
    table, parts = _tables(clip, options)
    phrases = sorted(lexicon.phrases)
    if frame.opens and not options.published:
        return PhraseSpace(table, phrases, prompt_len, parts, _openings(clip, phrases))
    if any(len(phrase) > 1 for phrase in phrases):
        return PhraseSpace(table, phrases, prompt_len, parts)
    allowed = torch.tensor([token for (token,) in phrases])
    if options.may_repeat:
        return TokenSpace(table, allowed, parts)
    once, beside = _once(clip, lexicon, _reads(options)), frame.ids([])
    if len(once) < _WORDS_PER_TOKEN * (prompt_len + len(beside)):
        return TokenSpace(table, allowed, parts)
    return TokenSpace(table, allowed, parts, torch.tensor(once), beside)


def _once(clip: AnyClip, lexicon: Lexicon, reads: bool) -> list[int]:
    """Sorted single tokens that a prompt holds once; the last ones are kept in `clip.cache`."""
    wanted, last = (lexicon.phrases, reads), clip.cache.get("once")
    if last is None or last[0] != wanted:
        free = FUNCTION_WORDS if reads else ()  # language repeats "a" and "of"
        printed = {i: clip.text.words.decode([i]) for (i,) in sorted(lexicon.phrases)}
        once = [i for i, s in printed.items() if any(map(str.isalnum, s)) and s not in free]
        clip.cache["once"] = last = (wanted, once)
    return last[1]


def _openings(clip: AnyClip, phrases: Collection[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The phrases in the tokens that they have at the beginning of a text."""
    trained, starts = clip.trained_tokens, []
    for start in clip.text.words.openings(phrases):
        if start is not None and (trained is None or trained.issuperset(start)):
            starts.append(start)
    if not starts:
        raise ArgumentError(
            "vocabulary", "has no word that can begin a prompt", "add words, or a `caption`"
        )
    longest = max(map(len, phrases))  # longer ones are rare words, spelled in letters
    return sorted({s for s in starts if len(s) <= longest} or set(starts))


def _round_trip_tokens(clip: AnyClip, lexicon: Lexicon) -> list[int]:
    """Sorted single tokens of the lexicon that round-trip through the tokenizer."""
    usual, round_trips = set(clip.vocabulary.tolist()), clip.text.words.round_trips_inside
    single = sorted(phrase[0] for phrase in lexicon.phrases if len(phrase) == 1)
    return [token for token in single if token in usual or round_trips([token])]


@dataclass(frozen=True)
class _Start:
    """Draws the initial prompts of a search."""

    clip: AnyClip
    options: SearchOptions
    lexicon: Lexicon
    single: Sequence[int]  # tokens of the lexicon that round-trip
    space: TokenSpace
    prompt_len: int
    frame: Caption
    blocked: Blocklist
    acceptable: Callable[[torch.Tensor], torch.Tensor]

    def prompts(self, seed: int) -> torch.Tensor:
        """(restarts * trials, prompt_len) ids, such that the first step is acceptable."""
        rows = []
        for restart in range(self.options.restarts):
            generator = torch.Generator().manual_seed(restart_seed(seed, restart))
            given = self._given() if restart == 0 else []
            for _ in range(self.options.work.trials):
                rows.append(self._prompt(self._source, generator, given))
        return torch.cat(rows)

    @cached_property
    def _source(self) -> TokenSpace:
        """The space to draw from: pieces of words are searched, but would fuse when drawn."""
        if self.options.published:
            return self.space
        single, phrases = set(self.single), self.lexicon.phrases
        good = frozenset(p for p in phrases if len(p) > 1 or single.issuperset(p))
        if not good or len(good) == len(phrases):
            return self.space
        return _space(self.clip, self.options, Lexicon(good), self.prompt_len, self.frame)

    def _prompt(
        self, source: TokenSpace, generator: torch.Generator, given: list[int]
    ) -> torch.Tensor:
        for _ in range(_TRIES):
            row = source.random(1, self.prompt_len, generator)
            if given:
                row[0, : len(given)] = row.new_tensor(given)
                row = self.space.nearest(self.space.embed(row))
            if self.acceptable(row).item():
                return row
        if given and self.blocked and self.frame.blocked_word(given, self.blocked):
            raise ArgumentError("start_from", "begins with a blocked word", "leave the word out")
        if given:
            raise ArgumentError(
                "start_from",
                f"is {self.options.start_from!r}, which leads to no prompt that round-trips and "
                "holds no blocked word",
                "write whole words of the CLIP's vocabulary",
            )
        raise ArgumentError(
            "vocabulary",
            "gives no prompt that round-trips and holds no blocked word",
            "block fewer words",
        )

    def _given(self) -> list[int]:
        """The tokens of `start_from`."""
        if self.options.start_from is None:
            return []
        ids = self.frame.encode(read(self.options.start_from))
        if len(ids) > self.prompt_len:
            raise ArgumentError(
                "start_from",
                f"has {len(ids)} tokens, more than `prompt_len` {self.prompt_len}",
                "shorten it or learn more tokens",
            )
        return ids


# 2. Descend.


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
        best.trajectories += steps.of_searches() if steps else []
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


# 3. Refine.


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


# Between 2, 3 and 4: the best prompts so far.


class BestSoFar:
    """The best prompt so far of every search, of which some may not have had their turn.

    Attributes:
        spans: the searches of each turn, `options.batch_size` of them.
        ids: (searches, prompt_len) their best ids.
        history: of each target; see `Result`.
        trajectories: of each search that had its turn, where they are kept.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._restarts = problem, problem.options.restarts
        self._steps, self._done = problem.work.total, 0
        count = problem.options.batch_size or len(problem.ids)
        self.spans = [slice(k, k + count) for k in range(0, len(problem.ids), count)]
        self.ids = problem.ids[:, 0].clone()
        self.scores = torch.full((len(self.ids),), -torch.inf, device=self.ids.device)
        self.history: list[list[tuple[int, float]]] = [[] for _ in problem.targets]
        self.trajectories: list[Trajectory] = []

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


# 4. Verify.


def verify(problem: Problem, best: BestSoFar) -> list[Result]:
    """Results whose similarities are those of the printed text, encoded again the public way."""
    clip, caption, restarts = problem.clip, problem.caption, problem.options.restarts
    rows, seen = best.ids.tolist(), None
    if problem.options.published:
        table = clip.text.token_embedding.detach()
        with torch.no_grad():
            seen = F.normalize(
                problem.encoder(F.embedding(best.ids, table).float()).float(), dim=-1
            )
    else:
        rows = [_round_trip(clip, caption, row) for row in rows]
    if problem.options.wording == "tags" and not caption.inserts:
        rows = _by_importance(problem, rows)
    if _reads(problem.options):
        rows = [_with_right_articles(problem, row) for row in rows]
    texts = [caption.text(row) for row in rows]
    features, extra = _features_of(problem, rows, texts), problem.options.extra_loss
    losses = None if extra is None else extra.losses(texts, problem.owners).tolist()
    seconds = time.monotonic() - problem.began
    results, note = [], f"{caption.note(problem.prompt_len)} {_note(problem)}".strip()
    for k in range(len(problem.targets)):
        span = slice(k * restarts, (k + 1) * restarts)
        kept = [*best.trajectories[span], *[None] * restarts][:restarts]  # some were not reached
        extras: list[dict[str, Any]] = [{"trajectory": one} for one in kept]
        if seen is not None:
            shares = _shares(problem.targets[k])
            loop = (seen[span] @ problem.targets[k].features.T @ shares).tolist()
            extras = [one | {"loop_similarity": s} for one, s in zip(extras, loop, strict=True)]
        found = losses and losses[span]
        ranked = _ranked(problem, k, rows[span], features[span], found, extras)
        results.append(
            Result(
                **vars(ranked[0]),
                candidates=ranked,
                history=best.history[k],
                seconds=seconds,
                note=note,
            )
        )
    return results


def _note(problem: Problem) -> str:
    """A remark on settings that had no effect, "" where there are none."""
    unused = problem.options.settings_of_pez if problem.writer else []
    names = " and ".join(f"`{name}`" for name in unused)
    return names and (
        f"Without effect: {names}, since the prompt was written in place of Algorithm 1, and all "
        "phrases of the vocabulary are single tokens."
    )


def _by_importance(problem: Problem, rows: list[list[int]]) -> list[list[int]]:
    """Tags in order, each before those whose loss would cost less similarity.

    Where this costs too much or is refused, only the first of them is moved, or none.
    """
    caption = problem.caption
    (comma,) = problem.clip.text.words.encode_behind(",")
    tags = [Tags.of(row, comma, caption.before, caption.after) for row in rows]
    without = _similarities(problem, [one.without() for one in tags])
    orders = [one.orders(scores) for one, scores in zip(tags, without, strict=True)]
    orders = [[*few, row] for few, row in zip(orders, rows, strict=True)]

    def best(few: list[list[int]], scores: list[float]) -> list[int]:
        least = scores[-1] - _ORDER_COSTS
        good = (row for row, score in zip(few, scores, strict=True) if score >= least)
        return next((row for row in good if _passes(problem, row)), few[-1])

    found = zip(orders, _similarities(problem, orders), strict=True)
    return [best(few, scores) for few, scores in found]


@torch.no_grad()
def _similarities(problem: Problem, groups: Sequence[list[list[int]]]) -> list[list[float]]:
    """Similarities of learned tokens, of any lengths: a group of each search, with its target."""
    pairs = zip(problem.owners, groups, strict=True)
    rows = [(row, owner) for owner, group in pairs for row in group]
    found = [0.0] * len(rows)
    for n in {len(row) for row, _ in rows}:
        places = [k for k, (row, _) in enumerate(rows) if len(row) == n]
        ids = torch.tensor([rows[k][0] for k in places], device=problem.ids.device)
        encode = replace(problem, prompt_len=n).encoder
        parts = [encode(problem.space.embed(part)).float() for part in ids.split(ROWS)]
        towards = torch.stack([problem.targets[rows[k][1]].towards for k in places])
        values = (F.normalize(torch.cat(parts), dim=-1) * towards).sum(dim=1)
        for k, value in zip(places, values.tolist(), strict=True):
            found[k] = value
    scores = iter(found)
    return [[next(scores) for _ in group] for group in groups]


def _with_right_articles(problem: Problem, ids: list[int]) -> list[int]:
    """The learned tokens with the right articles, unless the prompt cannot be printed so."""
    words, allowed = problem.clip.text.words, frozenset(problem.space.allowed.tolist())
    right = with_right_articles(ids, words.decode, words.encode, allowed)
    return right if _passes(problem, right) else ids


def _passes(problem: Problem, ids: list[int]) -> bool:
    """Whether learned tokens round-trip and are acceptable."""
    good = problem.space.only_allowed(problem.acceptable)
    rows = torch.tensor([ids], device=problem.space.table.device)
    return problem.caption.round_trips(ids) and (good is None or bool(good(rows).all()))


def _features_of(problem: Problem, rows: list[list[int]], texts: list[str]) -> torch.Tensor:
    """(rows, features) of printed prompts, in contexts where they are longer than one."""
    clip, caption = problem.clip, problem.caption
    if caption.contexts(problem.prompt_len) is None:
        return clip.encode_texts(texts)
    cut = [caption.cut(caption.reread(row)) for row in rows]
    return torch.stack([clip.encode_chunks(parts) for parts in cut])


def _ranked(
    problem: Problem,
    k: int,
    rows: list[list[int]],
    features: torch.Tensor,
    losses: list[float] | None,
    extras: list[dict[str, Any]],
) -> list[Candidate]:
    """Candidates of target `k`, best first.

    Args:
        problem: of the search.
        k: number of the target.
        rows: the learned ids of each candidate.
        features: (candidates, features) of their printed text.
        losses: the extra loss of each; None: there is none.
        extras: further fields of each.
    """
    clip, caption, target = problem.clip, problem.caption, problem.targets[k]
    products = features @ target.features.T
    towards, shares = ~target.avoid, _shares(target)
    similarity = (products @ shares).tolist()
    parts, targets = clip.split(features), clip.split(target.features)
    by_encoder = {name: (parts[name] @ targets[name].T @ shares).tolist() for name in parts}
    perplexities = problem.readability and problem.readability.perplexities(rows)
    candidates = [
        Candidate(
            prompt=caption.print(row),
            similarity=similarity[n],
            token_ids=caption.reread(row) if problem.options.published else caption.ids(row),
            learned=caption.learned(row),
            similarities=products[n][towards].tolist(),
            avoided=products[n][target.avoid].tolist(),
            encoders={name: values[n] for name, values in by_encoder.items()},
            extra_loss=losses[n] if losses else None,
            perplexity=perplexities[n] if perplexities else None,
            **extras[n],
        )
        for n, row in enumerate(rows)
    ]
    scores = _final_scores(problem, target, rows, features, losses)
    return [candidates[n] for n in sorted(range(len(rows)), key=lambda n: -scores[n])]


def _shares(target: PromptTarget) -> torch.Tensor:
    """(n,) shares of the targets in the similarity that is reported, summing to 1."""
    towards = (~target.avoid).any()
    shares = target.weights.clamp(min=0) if towards else target.weights.abs()
    return shares / shares.sum()


def _final_scores(
    problem: Problem,
    target: PromptTarget,
    rows: list[list[int]],
    features: torch.Tensor,
    losses: list[float] | None,
) -> list[float]:
    """The scores that candidates are ranked by; arguments as in `_ranked`."""
    if target.direction is None:
        scores = (features @ target.features.T @ target.weights).tolist()
    else:
        scores = (features @ target.direction).tolist()
    extra = problem.options.extra_loss
    if losses is not None and extra is not None:
        weight = extra.weight
        pairs = zip(scores, losses, strict=True)
        scores = [(1 - weight) * score - weight * loss for score, loss in pairs]
    if problem.readability is not None:
        added = problem.readability.scores_of(rows)
        scores = [a + b for a, b in zip(scores, added, strict=True)]
    return scores


def _round_trip(clip: AnyClip, caption: Caption, ids: list[int]) -> list[int]:
    """`ids` if they round-trip through the tokenizer, else the tokens of their printed text."""
    words, limit = clip.text.words, len(ids)
    if caption.round_trips(ids):
        return ids
    log.warning("The prompt found does not round-trip; taking the tokens of its printed text.")
    good = words.round_trips, words.round_trips_inside
    ids = [i for i in caption.encode(words.decode(ids)) if any(g([i]) for g in good)][:limit]
    while ids and not caption.round_trips(ids):
        ids.pop()
    return ids or caption.encode(words.decode(clip.vocabulary[:1].tolist()))


def with_share_of_time(options: SearchOptions, share: float) -> SearchOptions:
    """`options` with a share of their time limit."""
    limit = options.time_limit
    return options if limit is None else replace(options, time_limit=limit * share)
