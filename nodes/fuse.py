"""PEZ Fuse Prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from comfy_api.latest import io

from ..pez_core import SearchOptions, fuse
from ..pez_core.errors import ArgumentError
from . import inputs
from .found import Found
from .learning import Learner, all_candidates, learner_schema, search_options
from .live import Live
from .values import Values

_PROMPTS = ("prompt_1", "prompt_2", "prompt_3", "prompt_4")
_IMAGES = ("images_1", "images_2")


class FusePrompts(Learner):
    """One prompt from several prompts and images."""

    NEEDED_TO_LEARN = ("clip", "vocabulary", *_IMAGES)
    WIDGETS: ClassVar[dict[str, str]] = {"sources": "one of `prompt_1` to `prompt_4`"}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return learner_schema(
            node_id="PEZ_ConcatPrompts",
            display_name="PEZ Fuse Prompts",
            description="Makes one prompt from several prompts and images. Prompts that fit are "
            "joined; otherwise one prompt is learned that is close to all of them.",
            search_aliases=[
                "combine prompts",
                "concat prompts",
                "merge prompts",
                "mix images",
                "blend images",
            ],
            inputs_=[
                *_source_inputs(),
                io.Boolean.Input(
                    "always_learn",
                    default=False,
                    optional=True,
                    label_on="always learn",
                    label_off="join if it fits",
                    tooltip="On: learn one prompt even if the joined prompts fit into "
                    "`max_tokens`.",
                ),
                *inputs.search(
                    16, "Length of a learned prompt in tokens. Most words are one token."
                ),
                *_join_inputs(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def learn(cls, live: Live, values: Values) -> list[Found]:
        sources = [*values.texts(*_PROMPTS), *values.pictures(*_IMAGES)]
        if len(sources) < 2:
            raise ValueError(
                "Too few sources: give at least two prompts or images, for example `images_1` and "
                "`prompt_1`."
            )
        weights, options = _weights(values["weights"]), search_options(values, live)

        def run(clip: Any, options: SearchOptions) -> list[Found]:
            live.begin()
            result = fuse(
                clip,
                sources,
                replace(options, time_limit=live.time_left()),
                weights=weights,
                max_tokens=values["max_tokens"],
                always_learn=values["always_learn"],
                callback=live.report,
            )
            return live.found([result])

        return values["clip"].search(run, options)

    @classmethod
    def outputs(cls, found: list[Found], values: Values) -> tuple:
        (only,) = found
        similarities = [float(similarity) for similarity in only.similarities]
        return only.prompt, float(only.similarity), similarities, *all_candidates(found)


def _source_inputs() -> list[io.Input]:
    images = [
        inputs.images(
            name,
            tooltip="Images to fuse, also from CLIP Vision Encode. Each image of a batch is a "
            "source of its own.",
        )
        for name in _IMAGES
    ]
    prompts = [
        inputs.text(
            name,
            multiline=k < 2,
            optional=True,
            advanced=True if k >= 2 else None,
            placeholder="a prompt",
            tooltip="A prompt to fuse. A list gives several.",
        )
        for k, name in enumerate(_PROMPTS)
    ]
    return [*images, *prompts]


def _join_inputs() -> list[io.Input]:
    return [
        inputs.text(
            "weights",
            **inputs.RARE,
            tooltip="Weight of each source, separated by commas: first the prompts, then the "
            "images. Empty: all the same.",
        ),
        io.Int.Input(
            "max_tokens",
            default=75,
            min=1,
            max=75,
            **inputs.RARE,
            tooltip="Most tokens of joined prompts. If they have more, one prompt is learned.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.String.Output("prompt", tooltip="One prompt for all sources."),
        io.Float.Output("similarity", tooltip="Its mean similarity with the sources."),
        io.Float.Output(
            "similarities",
            is_output_list=True,
            tooltip="Its similarity with each source: first the prompts, then the images.",
        ),
    ]


def _weights(text: str) -> list[float] | None:
    if not text.strip():
        return None
    try:
        return [float(number) for number in text.replace(";", ",").split(",")]
    except ValueError as error:
        raise ArgumentError(
            "weights", f"is {text!r}", "write numbers separated by commas, like 1, 2, 0.5"
        ) from error
