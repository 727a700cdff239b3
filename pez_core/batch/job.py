"""What is done with each item of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

from ..captions import check_captioner
from ..clip.models import ACTIVATIONS
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    check_string,
)
from ..options import SearchOptions
from ..targets import check_text
from ..tasks.invert import PROMPT_LEN
from ..vocabulary import UNSAFE_WORDS, Vocabulary, english_words
from .sources import NEEDS

# The fields of a job that belong to one task.
_TAKES = {
    "invert": (
        *("language_model", "caption", "captions", "captioner", "prune_caption"),
        *("avoid", "avoid_weight"),
    ),
    "distill": ("language_model", "ratio"),
    "score": (),
}
# Those that belong to captions of items.
_OF_CAPTIONS = ("captions", "captioner", "prune_caption")
# Options that a batch cannot have, and why.
_REFUSED = {
    "time_limit": "prompts would depend on the speed of the machine",
    "batch_size": "it belongs to the run, which has `batch_size` itself",
    "language_model": "each worker loads its own; give its path to the job",
    "extra_loss": "it is made of images, and a batch has many",
    "method": "baselines are for comparisons of single results",
    "trajectory": "a batch has one row per item",
}
# Options that `Job.settings` has in another form, or that change no result.
_OTHER_FORM = {
    "effort", "steps", "swaps", "vocabulary", "repeats", "block_unsafe", "prompt_len", *_REFUSED
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with each item; equal jobs find equal prompts, wherever and however they run.

    Attributes:
        task: "invert" finds a prompt for each image, "distill" shortens each prompt, "score"
            measures the similarity of each image and its prompt.
        clip: names as `load_clip` takes them; several are searched as one.
        clip_weights: weight of each of several CLIPs; None: all the same.
        activation: of CLIPs in files, as in `load_clip`.
        options: of the search; see `SearchOptions`. From `seed` and the id of an item its own seed
            is derived; "score" takes only `fit`. Without `time_limit`, `batch_size`,
            `language_model`, `extra_loss`, `method` and `trajectory`.
        language_model: path of another language model for `options.readability`; None: the one
            that `SearchOptions` takes where none is given.
        caption: as in `invert`.
        captions: each item has a caption of its own: the text file beside the image, or the column
            of texts. It goes through `prepare_caption`.
        captioner: name or path of a model, as `load_captioner` takes it, that writes the caption of
            each image; it goes through `prepare_caption`, too. None: there is none.
        prune_caption: drop the words of the caption that lower its similarity with the image of an
            item.
        avoid, avoid_weight: texts to stay away from, and their weight, as in `invert`.
        ratio: as in `distill`.

    Raises:
        ArgumentError: an argument is out of range or belongs to another task.
    """

    task: str = "invert"
    clip: Sequence[str] = ("emoji-clip",)
    clip_weights: Sequence[float] | None = None
    activation: str | None = None
    options: SearchOptions = field(default_factory=SearchOptions)
    language_model: str | None = None
    caption: str = ""
    captions: bool = False
    captioner: str | None = None
    prune_caption: bool = False
    avoid: Sequence[str] = ()
    avoid_weight: float = 0.5
    ratio: float = 0.3

    def __post_init__(self) -> None:
        check_choice("task", self.task, tuple(NEEDS))
        for name in ("clip", "avoid"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.clip_weights is not None:
            object.__setattr__(self, "clip_weights", tuple(self.clip_weights))
        if self.activation is not None:
            check_choice("activation", self.activation, ACTIVATIONS)
        for name, reason in _REFUSED.items():
            if getattr(self.options, name) not in (None, False):
                raise ArgumentError(name, f"cannot be an option of a batch: {reason}")
        check_integer("seed", self.options.seed, 0)
        self._check_use()
        check_string("caption", self.caption)
        if self.captioner is not None:
            check_string("captioner", self.captioner)
        check_bool("captions", self.captions)
        check_bool("prune_caption", self.prune_caption)
        self._check_captions()
        for text in self.avoid:
            _check_avoided(text)
        check_number("avoid_weight", self.avoid_weight)
        check_number("ratio", self.ratio, 0, 1, above=True)

    def _check_captions(self) -> None:
        """Raise where there are two captions, or none to prune."""
        if self.prune_caption and not self.captioned:
            raise ArgumentError(
                "prune_caption",
                "requires `caption`, `captions` or `captioner`",
                "add one of them",
            )
        check_captioner(self.captioner, False, caption=self.caption, captions=self.captions)
        if self.captions and self.caption:
            raise ArgumentError(
                "captions",
                "cannot be combined with `caption`: each item has a caption",
                "leave one of the two out",
            )

    @property
    def captioned(self) -> bool:
        """Whether each item has a caption of its own, if only by pruning."""
        pruned = self.prune_caption and bool(self.caption)
        return self.captions or self.captioner is not None or pruned

    def _check_use(self) -> None:
        """Raise where something is given that the task does not use."""
        used = {"task", "clip", "clip_weights", "activation", "options", *_TAKES[self.task]}
        given = [(f, getattr(self, f.name)) for f in fields(Job) if f.name not in used]
        if self.task == "score":
            options = [f for f in fields(SearchOptions) if f.name not in ("seed", "fit")]
            given += [(f, getattr(self.options, f.name)) for f in options]
        for one, value in given:
            if value != one.default:
                raise ArgumentError(
                    one.name,
                    f"is given, but task {self.task!r} does not use it",
                    "leave it out",
                )

    @property
    def prompt_len(self) -> int | None:
        """Tokens to learn; None: by `ratio`."""
        return self.options.prompt_len or (PROMPT_LEN if self.task == "invert" else None)

    @property
    def settings(self) -> dict:
        """Everything that a result depends on beside its item, as JSON has it."""
        values = {"task": self.task, "clip": self.clip, "clip_weights": self.clip_weights}
        if self.activation is not None:
            values["activation"] = self.activation
        if self.task == "score" and self.options.fit != "crop":
            values["fit"] = self.options.fit
        if self.task != "score":
            values |= {"prompt_len": self.prompt_len} | _settings_of(self.options)
        values |= {name: getattr(self, name) for name in _TAKES[self.task]}
        if not self.captioned:  # jobs of versions without captions of items go on
            values = {k: v for k, v in values.items() if k not in _OF_CAPTIONS}
        return json.loads(json.dumps(values))

    def seed_of(self, item: str) -> int:
        """The seed of the item with this id, below 2^48."""
        text = f"{self.options.seed}/{item}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")


def _check_avoided(text: object) -> None:
    try:
        check_text("avoid", check_string("avoid", text))
    except ArgumentTypeError:
        raise
    except ArgumentError as error:
        raise ArgumentError("avoid", error.problem, "a batch can avoid only texts") from error


def _settings_of(options: SearchOptions) -> dict:
    names = [f.name for f in fields(options) if f.name not in _OTHER_FORM]
    values = {name: getattr(options, name) for name in names}
    if options.fit == "crop":  # jobs of versions without this option go on
        del values["fit"]
    if not options.read_weight:
        del values["wording"]
    work = asdict(options.work)  # in place of a name, whose numbers may change
    del work["until_time_limit"]
    if options.published:
        values["published"] = True
    return values | {
        "work": work,
        "vocabulary": options.words.to_json(),
        "repeats": options.may_repeat,
        "dictionary": _digest(sorted(english_words())),
        "unsafe_words": _digest_of_unsafe_words() if options.block_unsafe else "allowed",
    }


def _digest_of_unsafe_words() -> str:
    return _digest(Vocabulary(block=UNSAFE_WORDS).to_json()["block"])


def _digest(words: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=8).hexdigest()
