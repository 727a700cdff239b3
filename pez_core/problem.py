"""What a search is given: the targets, the caption, the allowed tokens and the first prompts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .caption import Caption
from .errors import ArgumentError
from .fluency import FluencyLoss
from .options import Effort, SearchOptions
from .priors import (
    FluencyPrior,
    ReadabilityPrior,
    kind_of,
    needed_language_model,
    reads_like_clip,
)
from .readability import FUNCTION_WORDS
from .seeds import restart_seed
from .space import PhraseSpace, TokenSpace
from .token_lm import load_token_lm
from .vocabulary import Blocklist, Lexicon, Vocabulary

if TYPE_CHECKING:
    from .clip import AnyClip
    from .clip.text import Encoder

log = logging.getLogger(__name__)

# A vocabulary of fewer words per token of the prompt needs some of them twice.
_WORDS_PER_TOKEN = 2
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

    @property
    def lacks_words(self) -> bool:
        """Whether words may occur twice only because the vocabulary is too small."""
        if self.options.may_repeat or isinstance(self.space, PhraseSpace):
            return False
        return self.space.may_repeat

    @property
    def firsts(self) -> list[bool]:
        """Whether each search is the first restart of its target."""
        return [k % self.options.restarts == 0 for k in range(len(self.ids))]

    def time_left(self, turns: int) -> float | None:
        """Seconds for the next of `turns` turns, each with an equal share."""
        limit = self.options.time_limit
        # a search needs a moment to end by itself with its best prompt
        return limit and max(limit - (time.monotonic() - self.began), 1e-3) / turns


def uses_language_model(options: SearchOptions) -> bool:
    """Whether a language model scores the prompts."""
    return options.read_weight > 0 or isinstance(options.extra_loss, FluencyLoss)


def default_len(clip: AnyClip, wanted: int, caption: str = "{}") -> int:
    """Tokens to learn where the options do not say: `wanted`, or what the context holds.

    A caption that fills the context is encoded in several, of which one holds the learned tokens.
    """
    room = Caption(clip, caption).room
    return min(wanted, room if room > 0 else clip.text.max_prompt_len)


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
    begun = options.beginning or isinstance(space, PhraseSpace)
    return options.wording != "free" and not begun


def _readers(
    clip: AnyClip, options: SearchOptions, frame: Caption, space: TokenSpace, prompt_len: int
) -> tuple[FluencyPrior | None, ReadabilityPrior | FluencyPrior | None]:
    """The prior that prompts are written with, and the one that swaps are compared with."""
    weight, words, own = options.read_weight, clip.text.words, None
    if not weight:
        return None, None
    if reads_like_clip(words):
        kind = kind_of(options.wording)
        model = load_token_lm(device=space.table.device)
        own = FluencyPrior(model, frame, space, prompt_len, kind, weight)
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
    once, beside = _once(clip, lexicon, uses_language_model(options)), frame.ids([])
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
        if not self.options.beginning:
            return []
        ids = self.frame.encode(self.options.beginning)
        if len(ids) > self.prompt_len:
            raise ArgumentError(
                "start_from",
                f"has {len(ids)} tokens, more than `prompt_len` {self.prompt_len}",
                "shorten it or learn more tokens",
            )
        return ids
