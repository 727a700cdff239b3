"""Goals in, prompts out: one search for several goals, and results as people would read them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from .judge import WordContribution, contributions
from .objectives import ExtraLoss, Mixed, SampledSimilarity, Similarity
from .presets import Plan
from .priors import Reading, Sum, WordsAlone
from .refine import Prior, Refinement, refine
from .search import Objective, Progress, Settings, check_integer, search
from .space import PhraseSpace, TokenSpace
from .vocabulary import Blocklist, Lexicon, Vocabulary, count_words

if TYPE_CHECKING:
    from .clip import AnyClip
    from .readability import LanguageModel

log = logging.getLogger(__name__)

# Words encoded at once, each by itself.
_WORDS_AT_ONCE = 2048
# The allowed tokens of the last search on each CLIP, and what they mean alone.
_ALONE: WeakKeyDictionary[AnyClip, tuple[torch.Tensor, torch.Tensor]] = WeakKeyDictionary()
# Some of them are made again to tell whether the CLIP still is what it was, within rounding.
_PROBES, _SAME = 4, 1e-3
# Steps of a search that only time ends.
_ENDLESS = 10**9

Callback = Callable[[dict], bool | None]
Tables = tuple[torch.Tensor, list[tuple[int, float]]]


@dataclass(frozen=True)
class Candidate:
    """A prompt that one restart found.

    Attributes:
        prompt: the text, with the fixed text of a template around the learned words.
        similarity: cosine similarity of the text, encoded again by the public tokenizer and the
            whole text tower, with its target; the weighted mean for several targets, and over the
            encoders where there are several. What is to be avoided does not enter, unless there is
            nothing else.
        token_ids: the tokens of the text, without start and end token.
        learned: the learned words alone.
        similarities: with each target, in the order given.
        avoided: with each thing to stay away from, in the order given.
        encoders: `similarity` by the name of the encoder.
        extra_loss: the loss beside the similarity, of the text read again; None: there was none.
        perplexity: of the text to the language model, where `readability` had one; else None.
    """

    prompt: str
    similarity: float
    token_ids: list[int]
    learned: str
    similarities: list[float] = field(repr=False)
    avoided: list[float] = field(repr=False)
    encoders: dict[str, float] = field(repr=False)
    extra_loss: float | None = field(default=None, kw_only=True)
    perplexity: float | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Result(Candidate):
    """What a task returns: the best candidate and how it was found.

    Attributes:
        candidates: one per restart, best first; the first is this result's own prompt. Empty where
            the prompt was not learned, or in sections.
        history: `(step, score of the best so far)`, one per report; the score is the similarity,
            less what is to be avoided by its weight. Where more counts in the choice (what words
            mean alone, how they read), it may fall a little. With an extra loss of weight w it is
            1 - w of that, less w of the loss.
        seconds: of the whole search that this result came from, shared by all of a batch.
        note: what a person should know about it, "" most of the time.
    """

    candidates: list[Candidate] = field(repr=False)
    history: list[tuple[int, float]] = field(repr=False)
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """What one prompt is learned for.

    Attributes:
        features: (n, features) unit features of targets.
        weights: (n,) how much each counts; not above 0 for what is to be avoided.
        away: (n,) bool, what is to be avoided.
        direction: (features,) what the search goes towards where this is not their weighted sum.
        batch_size: targets that the loss looks at per step; None: all of them.
    """

    features: torch.Tensor
    weights: torch.Tensor
    away: torch.Tensor
    direction: torch.Tensor | None = None
    batch_size: int | None = None

    @property
    def towards(self) -> torch.Tensor:
        """(features,) whose dot product with a prompt's features is its score."""
        return self.weights @ self.features if self.direction is None else self.direction


class Frame:
    """The fixed text around the learned part.

    Args:
        clip: whose tokens are meant.
        template: text with `{}` where the learned words go; the first one counts.
        read: what the text encoder reads of the template, where this is not the template itself.

    Raises:
        ValueError: the fixed text would fuse with the learned words.
    """

    def __init__(self, clip: AnyClip, template: str = "{}", read: str | None = None) -> None:
        self._words = clip.text.words
        self._printed = template.split("{}", 1)
        self._read = self._printed if read is None else read.split("{}", 1)
        before, after = self._read
        self.before, self.after = self._words.encode(before), self._words.encode(after)
        self._words_around = count_words(before), count_words(after)
        self.room = clip.text.max_prompt_len - len(self.before) - len(self.after)
        # beside a space nothing fuses; beside a comma other punctuation does, but words do not
        self.separate = (not before or before[-1].isspace()) and (not after or after[0].isspace())
        if self.room > 0 and not self.survives([clip.text.example_token]):
            raise ValueError(
                f"`template` is {template!r}, whose text would fuse with the learned words; put a "
                "space on both sides of {}."
            )

    def ids(self, learned: Sequence[int]) -> list[int]:
        """The tokens of the whole prompt."""
        return [*self.before, *learned, *self.after]

    def print(self, learned: Sequence[int]) -> str:
        """The whole prompt as people see it."""
        return self._words.decode(learned).join(self._printed)

    def text(self, learned: Sequence[int]) -> str:
        """The whole prompt as the text encoder reads it."""
        return self._words.decode(learned).join(self._read)

    def survives(self, learned: Sequence[int]) -> bool:
        """Whether the printed prompt means these very tokens."""
        if not self.before and not self.after:
            return self._words.round_trips(learned)
        special = self._words.special_ids & set(learned)
        return not special and self._words.encode(self.text(learned)) == self.ids(learned)

    def blocked_word(self, learned: Sequence[int], blocked: Blocklist) -> str | None:
        """A blocked word that the learned part spells or helps to spell."""
        text = self.text(learned)
        before, after = self._words_around
        found = blocked.find(text, before, count_words(text) - after)
        return found or blocked.find_mark(self._words.decode(learned))


@dataclass(frozen=True)
class Learning:
    """How prompts are learned: the settings of the search and what may appear.

    Attributes:
        prompt_len: tokens to learn, from 1 to what the context holds beside the template.
        settings: of PEZ; patience and time limit are those of everything.
        plan: what is done beside the steps of PEZ; None: nothing.
        restarts: independent searches per goal, at least 1.
        seed: of the initial prompts, for all goals or one for each; restart r starts from
            `seed + r`.
        vocabulary: None: the CLIP's default.
        initial: text that the first restart begins with; random tokens fill it up.
        template: text with `{}` for the learned part.
        read: what the text encoder reads of the template; None: the template itself.
        at_once: searches that run side by side; None: all of them. Fewer take less memory and more
            time, and find the same.
        extra: a loss beside the similarity.
        readability: how much it counts that a prompt reads like text, from 0 to 1.
        language_model: whose opinion that is.
    """

    prompt_len: int
    settings: Settings
    restarts: int = 1
    seed: int | Sequence[int] = 0
    vocabulary: Vocabulary | None = None
    initial: str | None = None
    template: str = "{}"
    read: str | None = None
    at_once: int | None = None
    extra: ExtraLoss | None = None
    plan: Plan | None = None
    readability: float = 0.0
    language_model: LanguageModel | None = None

    @property
    def trials(self) -> int:
        """Versions of each prompt that are searched side by side."""
        return 1 if self.plan is None else self.plan.trials

    def __post_init__(self) -> None:
        check_integer("prompt_len", self.prompt_len, 1)
        if self.at_once is not None:
            check_integer("at_once", self.at_once, 1)
        check_integer("restarts", self.restarts, 1)
        for seed in self.seed if isinstance(self.seed, (list, tuple)) else [self.seed]:
            check_integer("seed", seed, 0)
        if self.vocabulary is not None and not isinstance(self.vocabulary, Vocabulary):
            raise TypeError(f"`vocabulary` has to be a Vocabulary but is {self.vocabulary!r}.")
        if self.initial is not None and not isinstance(self.initial, str):
            raise TypeError(f"`initial` has to be a string but is {self.initial!r}.")
        if self.extra is not None and not hasattr(type(self.extra), "objective"):
            raise TypeError(
                "`extra` has to be a loss such as pez_core.diffusion.DenoisingLoss but is "
                f"{self.extra!r}."
            )


def learn(
    clip: AnyClip, goals: Sequence[Goal], learning: Learning, callback: Callback | None = None
) -> list[Result]:
    """Search a prompt for each goal, every restart of every goal a problem of its own in one batch.

    A result does not depend on the goals beside it.

    Raises:
        ValueError: the prompt does not fit the context, nothing is left of the vocabulary, the
            initial prompt does not fit or holds a blocked word, or the extra loss is for another
            number of prompts.
    """
    began = time.monotonic()
    restarts, words, extra = learning.restarts, clip.text.words, learning.extra
    if extra is not None and extra.prompts != len(goals):
        raise ValueError(
            f"`extra` is for {extra.prompts} prompts, but {len(goals)} are learned; make it of the "
            "same images, with `shared` alike."
        )
    frame = Frame(clip, learning.template, learning.read)
    if learning.prompt_len > frame.room:
        fixed = len(frame.before) + len(frame.after)
        raise ValueError(
            f"`prompt_len` has to be from 1 to {clip.text.max_prompt_len} but is "
            f"{learning.prompt_len}."
            if not fixed
            else f"`prompt_len` is {learning.prompt_len}, but beside the template's {fixed} tokens "
            f"there is room for {max(frame.room, 0)}; shorten the template or learn fewer."
        )
    vocabulary = learning.vocabulary
    if vocabulary is not None and learning.readability:
        # a language model would take pieces of words for what they look like
        vocabulary &= Vocabulary()
    lexicon = vocabulary.lexicon(clip) if vocabulary is not None else None
    blocked = Blocklist(lexicon.blocked if lexicon else ())
    tables = _tables(clip, extra)
    space = _space(clip, tables, lexicon, learning.prompt_len)
    alone = _surviving_tokens(clip, lexicon)
    single = None if lexicon is None else sum(len(phrase) == 1 for phrase in lexicon.phrases)
    everything_survives = words.separable and frame.separate and single in (None, len(alone))

    def acceptable(rows: torch.Tensor) -> torch.Tensor:
        good = [
            (everything_survives or frame.survives(row))
            and not (blocked and frame.blocked_word(row, blocked))
            for row in rows.tolist()
        ]
        return torch.tensor(good, device=rows.device)

    # told by the seed alone, so that a result does not depend on its neighbours
    seeds = _seeds(learning.seed, len(goals))
    starts = {
        s: _starts(clip, tables, space, lexicon, alone, learning, s, acceptable) for s in set(seeds)
    }
    # asking costs a wait for the device, so it is left out where it makes no difference
    asked = None if everything_survives and not blocked else acceptable
    reading = None
    if learning.readability:
        model = learning.language_model
        reading = Reading(model, clip.text.words, frame, space, learning.readability)
    trials, plan = learning.trials, learning.plan
    ids = torch.cat([starts[seed] for seed in seeds]).view(len(goals) * restarts, trials, -1)
    best = _Best(clip, goals, frame, ids[:, 0], learning, began)
    for turn, span in enumerate(best.spans):
        left = _time_left(learning, began, len(best.spans) - turn)
        refined = plan is not None and plan.refine_steps > 0
        found = search(
            space,
            _objective(clip, goals, frame, learning, span),
            ids[span].flatten(0, 1),
            replace(learning.settings, time_limit=left and (left / 2 if refined else left)),
            callback and (lambda progress, span=span: callback(best.report(span, progress))),
            acceptable=asked,
        )
        best.take(span, found)
        if found.stopped:
            break
        if not refined:
            continue
        numbers = _numbers(goals, restarts)[span]
        priors: list[Prior] = [reading] if reading else []
        left = _time_left(learning, began, len(best.spans) - turn)
        alone = _alone(clip, space, left and left / 2) if plan.word_weight else None
        if alone is not None:
            towards = torch.stack([goals[k].towards for k in numbers])
            priors.append(WordsAlone(alone, space, towards, plan.word_weight))
        found = refine(
            space,
            _similarity(clip, goals, numbers, frame),
            found.ids,
            Refinement(
                steps=_ENDLESS if plan.open_ended else plan.refine_steps,
                patience=learning.settings.patience,
                report_every=learning.settings.report_every,
                time_limit=_time_left(learning, began, len(best.spans) - turn),
                trials=trials,
                screened=plan.screened,
                record=learning.settings.record,
            ),
            callback
            and (lambda progress, span=span: callback(best.report(span, progress, plan.steps))),
            acceptable=asked,
            seeds=[seed + restart for seed in seeds for restart in range(restarts)][span],
            prior=Sum(priors) if priors else None,
        )
        best.take(span, found, plan.steps)
        if found.stopped:
            break
    rows = [_readable(clip, frame, row) for row in best.ids.tolist()]
    texts = [frame.text(row) for row in rows]
    features = clip.encode_texts(texts)
    losses = None if extra is None else extra.losses(texts, _numbers(goals, restarts))
    seconds = time.monotonic() - began
    results = []
    for k, goal in enumerate(goals):
        span = slice(k * restarts, (k + 1) * restarts)
        ranked = _ranked(
            clip,
            frame,
            rows[span],
            features[span],
            goal,
            None if losses is None else (losses[span].tolist(), extra.weight),
            reading,
        )
        results.append(
            Result(
                **vars(ranked[0]),
                candidates=ranked,
                history=best.history[k],
                seconds=seconds,
            )
        )
    return results


def _time_left(learning: Learning, began: float, turns: int) -> float | None:
    """Seconds that the next of some turns may take, of which it gets a fair share."""
    limit = learning.settings.time_limit
    # the search has to have a moment, so that it ends by itself with what it has
    return limit and max(limit - (time.monotonic() - began), 1e-3) / turns


def _seeds(seed: int | Sequence[int], goals: int) -> list[int]:
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * goals
    if len(seeds) != goals:
        raise ValueError(f"`seed` has to be one number or {goals} of them but is {seed}.")
    return seeds


def _numbers(goals: Sequence[Goal], restarts: int) -> list[int]:
    """The number of the goal that each search is for."""
    return [k for k in range(len(goals)) for _ in range(restarts)]


def _tables(clip: AnyClip, extra: ExtraLoss | None) -> Tables:
    """The token embeddings of all that looks at a prompt, side by side, and the parts of them."""
    table, parts = clip.text.token_embedding, clip.text.parts
    if extra is None:
        return table, parts
    other = extra.token_embedding[: len(table)].to(table.device)
    if extra.weight == 1:
        return other, extra.parts
    shares = [(columns, (1 - extra.weight) * weight) for columns, weight in parts]
    shares += [(columns, extra.weight * weight) for columns, weight in extra.parts]
    return torch.cat([table.detach().float(), other], dim=1), shares


def _space(clip: AnyClip, tables: Tables, lexicon: Lexicon | None, prompt_len: int) -> TokenSpace:
    table, parts = tables
    if lexicon is None:
        return TokenSpace(table, clip.vocabulary, parts)
    if all(len(phrase) == 1 for phrase in lexicon.phrases):
        allowed = sorted(token for (token,) in lexicon.phrases)
        return TokenSpace(table, torch.tensor(allowed), parts)
    return PhraseSpace(table, sorted(lexicon.phrases), prompt_len, parts)


@torch.no_grad()
def _alone(clip: AnyClip, space: TokenSpace, time_limit: float | None) -> torch.Tensor | None:
    """(allowed, features) unit features of each allowed token as a text by itself.

    Those of the last vocabulary are remembered for as long as the CLIP lives and, as some words
    tell, has the weights that it had. None: there is not the time.
    """
    began = time.monotonic()
    allowed, known = space.allowed, _ALONE.get(clip)
    encode, table = clip.text.encoder(), clip.text.token_embedding

    def features(ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(encode(F.embedding(ids[:, None], table).float()).float(), dim=-1)

    if known is not None and known[1].device == clip.device and torch.equal(known[0], allowed):
        some = slice(None, None, -(-len(allowed) // _PROBES))
        if torch.allclose(features(allowed[some]), known[1][some], atol=_SAME):
            return known[1]
    rows = []
    for ids in allowed.split(_WORDS_AT_ONCE):
        if time_limit is not None and time.monotonic() - began > time_limit:
            return None
        rows.append(features(ids))
    _ALONE[clip] = allowed, torch.cat(rows)
    return _ALONE[clip][1]


def _surviving_tokens(clip: AnyClip, lexicon: Lexicon | None) -> list[int]:
    """Sorted tokens of the lexicon that survive being printed alone."""
    default = clip.vocabulary.tolist()
    if lexicon is None:
        return default
    default, survives = set(default), clip.text.words.round_trips
    single = sorted(phrase[0] for phrase in lexicon.phrases if len(phrase) == 1)
    return [token for token in single if token in default or survives([token])]


def _starts(
    clip: AnyClip,
    tables: Tables,
    space: TokenSpace,
    lexicon: Lexicon | None,
    alone: list[int],
    learning: Learning,
    seed: int,
    acceptable: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """(restarts * trials, prompt_len) ids to begin from, so that the first step is acceptable."""
    source = space
    if lexicon is not None:
        # pieces of words are searched, but would not survive side by side
        single = set(alone)
        good = frozenset(p for p in lexicon.phrases if len(p) > 1 or p[0] in single)
        if 0 < len(good) < len(lexicon.phrases):
            source = _space(clip, tables, Lexicon(good), learning.prompt_len)
    rows = []
    for restart in range(learning.restarts):
        generator = torch.Generator().manual_seed((seed + restart) % 2**63)
        given = _initial(clip, learning) if restart == 0 else []
        for _ in range(learning.trials):
            for _ in range(100):
                row = source.random(1, learning.prompt_len, generator)
                if given:
                    row[0, : len(given)] = row.new_tensor(given)
                    row = space.nearest(space.embed(row))
                if acceptable(row).item():
                    break
            else:
                raise ValueError(
                    "`initial` begins with a blocked word; leave the word out."
                    if given
                    else "`vocabulary` gives no prompt that can be printed and holds no blocked "
                    "word; block fewer words."
                )
            rows.append(row)
    return torch.cat(rows)


def _initial(clip: AnyClip, learning: Learning) -> list[int]:
    if learning.initial is None:
        return []
    ids = clip.text.words.encode(learning.initial)
    if len(ids) > learning.prompt_len:
        raise ValueError(
            f"`initial` has {len(ids)} tokens, more than `prompt_len` {learning.prompt_len}; "
            "shorten it or learn more."
        )
    return ids


class _Best:
    """The best prompts so far of every search, of which some may not have had their turn."""

    def __init__(
        self,
        clip: AnyClip,
        goals: Sequence[Goal],
        frame: Frame,
        ids: torch.Tensor,
        learning: Learning,
        began: float,
    ) -> None:
        self.clip, self.goals, self.frame, self.began = clip, goals, frame, began
        self.restarts = learning.restarts
        self.steps = learning.settings.steps
        if learning.plan is not None:
            self.steps = learning.plan.total
        open_ended = learning.plan is not None and learning.plan.open_ended
        self.time_limit = learning.settings.time_limit if open_ended else None
        at_once = learning.at_once or len(ids)
        self.spans = [slice(k, k + at_once) for k in range(0, len(ids), at_once)]
        self.ids = ids.clone()
        self.scores = torch.full((len(ids),), -torch.inf, device=ids.device)
        self.history: list[list[tuple[int, float]]] = [[] for _ in goals]
        self._done = 0

    def take(self, span: slice, progress: Progress, before: int = 0) -> None:
        """Remember what the searches of `span` have found, `before` steps into their turn."""
        done = self._before(span, before)
        first = span.start // self.restarts
        searches = len(self.ids[span])
        for step, scores in progress.history:
            trials = len(scores) // searches
            for k in range(first, min(len(self.goals), -(-span.stop // self.restarts))):
                begin = max(k * self.restarts, span.start) - span.start
                end = min((k + 1) * self.restarts - span.start, searches)
                # other restarts of this goal may have been in an earlier span
                others = self.scores[k * self.restarts : span.start + begin].tolist()
                top = max([*scores[begin * trials : end * trials], *others])
                self.history[k].append((done + step, top))
        self.ids[span], self.scores[span] = self._best_trials(span, progress)
        self._done += progress.step

    def _before(self, span: slice, before: int) -> int:
        """Steps before those of a search in `span` that has itself done some before."""
        if self.time_limit is not None:
            return self._done
        return self.spans.index(span) * self.steps + before

    def _best_trials(self, span: slice, progress: Progress) -> tuple[torch.Tensor, torch.Tensor]:
        searches = len(self.ids[span])
        scores, choice = progress.scores.view(searches, -1).max(dim=1)
        ids = progress.ids.view(searches, -1, progress.ids.shape[1])
        return ids[torch.arange(searches, device=ids.device), choice], scores

    def report(self, span: slice, progress: Progress, before: int = 0) -> dict:
        """What a callback gets; `before` are the steps that the searches of `span` have done."""
        ids, scores = self.ids.clone(), self.scores.clone()
        ids[span], scores[span] = self._best_trials(span, progress)
        scores, best = scores.view(-1, self.restarts).max(dim=1)
        rows = ids.view(len(self.goals), self.restarts, -1)
        chosen = rows[torch.arange(len(rows), device=best.device), best].tolist()
        prompts = [self.frame.print(row) for row in chosen]
        similarities = scores.tolist()
        top = max(range(len(rows)), key=similarities.__getitem__)

        def explain(k: int, prompt: str | None = None) -> list[WordContribution]:
            text = self.frame.text(chosen[k]) if prompt is None else prompt
            return contributions(self.clip, text, self.goals[k].towards)

        elapsed = time.monotonic() - self.began
        step = self._before(span, before) + progress.step
        steps = len(self.spans) * self.steps
        if self.time_limit is not None:  # what the steps so far promise for the time that is left
            steps = max(step, round(step * self.time_limit / max(elapsed, 1e-3)))
        return {
            "step": step,
            "steps": steps,
            "prompt": prompts[top],
            "similarity": similarities[top],
            "prompts": prompts,
            "similarities": similarities,
            "elapsed": elapsed,
            "explain": explain,
        }


def _objective(
    clip: AnyClip, goals: Sequence[Goal], frame: Frame, learning: Learning, span: slice
) -> Objective:
    """The objective of PEZ for the searches in `span`, of which each goal has `restarts` in a row.

    All versions of a prompt have rows of their own.
    """
    numbers, extra = _numbers(goals, learning.restarts)[span], learning.extra
    if extra is None:
        return _similarity(clip, goals, numbers, frame, learning)
    loss = extra.objective(frame.before, frame.after, numbers)
    if extra.weight == 1:
        return Mixed(None, loss, 0, extra.weight)
    columns = sum(columns for columns, _ in clip.text.parts)
    return Mixed(_similarity(clip, goals, numbers, frame, learning), loss, columns, extra.weight)


def _similarity(
    clip: AnyClip,
    goals: Sequence[Goal],
    numbers: Sequence[int],
    frame: Frame,
    sampled: Learning | None = None,
) -> Similarity:
    """The similarity with all targets of the goals of these numbers.

    With `sampled` the loss of goals that have a batch size looks at as many targets only.
    """
    encode = clip.text.encoder([(frame.before, frame.after)])
    rows = [goals[k] for k in numbers]
    if goals[0].direction is not None:
        targets = torch.stack([goal.direction for goal in rows])[:, None]
        weights = None
    else:
        targets = torch.stack([goal.features for goal in rows])
        weights = torch.stack([goal.weights for goal in rows])
    if goals[0].batch_size is None or sampled is None:
        return Similarity(encode, targets, weights)
    generator = torch.Generator().manual_seed(_seeds(sampled.seed, 1)[0] % 2**63)
    return SampledSimilarity(encode, targets, weights, goals[0].batch_size, generator)


def _ranked(
    clip: AnyClip,
    frame: Frame,
    rows: list[list[int]],
    features: torch.Tensor,
    goal: Goal,
    extra: tuple[list[float], float] | None = None,
    reading: Reading | None = None,
) -> list[Candidate]:
    """Learned ids and the (n, features) of their printed text -> candidates, best first.

    `extra` holds n losses of the printed text and their weight.
    """
    products = features @ goal.features.T
    towards = ~goal.away
    shares = goal.weights.clamp(min=0) if towards.any() else goal.weights.abs()
    shares = shares / shares.sum()
    similarity = (products @ shares).tolist()
    parts, targets = clip.split(features), clip.split(goal.features)
    by_encoder = {name: (parts[name] @ targets[name].T @ shares).tolist() for name in parts}
    if goal.direction is None:
        scores = (products @ goal.weights).tolist()
    else:
        scores = (features @ goal.direction).tolist()
    losses, weight = extra or ([None] * len(rows), 0.0)
    if extra:
        scores = [(1 - weight) * s - weight * loss for s, loss in zip(scores, losses, strict=True)]
    perplexities = [None] * len(rows)
    if reading is not None:
        perplexities = reading.perplexities(rows)
        scores = [a + b for a, b in zip(scores, reading.worth_of(rows), strict=True)]
    candidates = [
        Candidate(
            prompt=frame.print(row),
            similarity=similarity[k],
            token_ids=frame.ids(row),
            learned=clip.text.words.decode(row),
            similarities=products[k][towards].tolist(),
            avoided=products[k][goal.away].tolist(),
            encoders={name: values[k] for name, values in by_encoder.items()},
            extra_loss=losses[k],
            perplexity=perplexities[k],
        )
        for k, row in enumerate(rows)
    ]
    order = sorted(range(len(rows)), key=lambda k: -scores[k])
    return [candidates[k] for k in order]


def _readable(clip: AnyClip, frame: Frame, ids: list[int]) -> list[int]:
    """`ids` if they survive being printed, else those of the text that they print as."""
    words, limit = clip.text.words, len(ids)
    if frame.survives(ids):
        return ids
    log.warning("The prompt found does not survive being printed; taking the tokens it prints as.")
    ids = [i for i in words.encode(words.decode(ids)) if words.round_trips([i])][:limit]
    while ids and not frame.survives(ids):
        ids.pop()
    return ids or clip.vocabulary[:1].tolist()
