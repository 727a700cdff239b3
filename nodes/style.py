"""PEZ Extract Style."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from comfy_api.latest import io

from ..pez_core import SearchOptions, style
from ..pez_core.tasks.style import STYLE_TEMPLATE, check_style_template
from . import inputs
from .found import Found
from .learning import Learner, all_candidates, learner_schema, search_options
from .live import Live
from .values import Values, lines


class ExtractStyle(Learner):
    """The style that several images share, as words."""

    NEEDED_TO_LEARN = ("clip", "images", "vocabulary")
    REQUIRED = ("clip", "images")
    WIDGETS: ClassVar[dict[str, str]] = {"invert": "PEZ Image to Prompt"}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return learner_schema(
            node_id="PEZ_ExtractStyle",
            display_name="PEZ Extract Style",
            description="Finds words for the style that several images share, and applies it to "
            "new subjects.",
            search_aliases=["style transfer", "style prompt", "art style", "reverse style"],
            inputs_=[
                io.Image.Input(  # no encoded ones: the images are perturbed
                    "images",
                    lazy=True,
                    optional=True,
                    tooltip="Two or more images of different things in one style; six do well.",
                ),
                io.String.Input(
                    "subject",
                    default="a cat",
                    multiline=True,
                    placeholder="subjects, one per line",
                    tooltip="Subjects that get the style, one per line. With `keep` on, new "
                    "subjects need no new search.",
                ),
                *inputs.search(
                    8, "Length of the style prompt in tokens. Most words are one token."
                ),
                *_style_inputs(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def learn(cls, live: Live, values: Values) -> list[Found]:
        check_style_template(values["style_template"])
        images, options = values.pictures("images"), search_options(values, live)

        def run(clip: Any, options: SearchOptions) -> list[Found]:
            live.begin()
            result = style(
                clip,
                images,
                replace(options, time_limit=live.time_left()),
                keep_content=values["keep_content"],
                content=lines(values["content"]),
                callback=live.report,
            )
            return live.found([result])

        return values["clip"].search(run, options)

    @classmethod
    def outputs(cls, found: list[Found], values: Values) -> tuple:
        words, template = found[0].prompt, values["style_template"]
        check_style_template(template)
        subjects = [subject for text in values.every("subject") for subject in lines(text)]
        prompts = [
            template.replace("{style}", words).replace("{subject}", subject) for subject in subjects
        ]
        return prompts or [words], words, float(found[0].similarity), *all_candidates(found)


def _style_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "style_template",
            default=STYLE_TEMPLATE,
            **inputs.RARE,
            tooltip="The form of the prompt, with {subject} and {style}.",
        ),
        io.Boolean.Input(
            "keep_content",
            default=False,
            **inputs.RARE,
            label_on="style and content",
            label_off="style alone",
            tooltip="On: everything that the images share, contents too, as in the paper.",
        ),
        inputs.text(
            "content",
            multiline=True,
            **inputs.RARE,
            placeholder="contents of the images",
            tooltip="Words for the contents of the images. The style prompt leaves them out.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.String.Output("prompt", is_output_list=True, tooltip="Each subject in the style."),
        io.String.Output("style", tooltip="The style alone."),
        io.Float.Output("similarity", tooltip="The style's mean similarity with the images."),
    ]
