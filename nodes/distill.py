"""PEZ Distill Prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from comfy_api.latest import io

from ..pez_core import SearchOptions, distill
from ..pez_core.errors import ArgumentError
from . import inputs
from .found import Found
from .learning import Learner, all_candidates, all_prompts, learner_schema, search_options
from .live import Live, countdown
from .values import Values, texts


class DistillPrompt(Learner):
    """A shorter prompt with the same meaning."""

    NEEDED_TO_LEARN = ("clip", "vocabulary")
    WIDGETS: ClassVar[dict[str, str]] = {"prompt": "`text`"}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return learner_schema(
            node_id="PEZ_DistillPrompt",
            display_name="PEZ Distill Prompt",
            description="Shortens a prompt. Weights, LoRA tags, embeddings and BREAK stay.",
            search_aliases=["shorten prompt", "compress prompt", "77 tokens", "prompt too long"],
            reads_images=False,
            inputs_=[
                inputs.text(
                    "text",
                    multiline=True,
                    placeholder="long prompt",
                    tooltip="The prompt to shorten. It may be longer than 77 tokens.",
                ),
                io.Float.Input(
                    "ratio",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Tokens to learn for each token of the long prompt. 0.3 is about a "
                    "third.",
                ),
                *inputs.search(
                    0, "Number of tokens to learn. 0: `ratio` times the tokens of the prompt."
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def learn(cls, live: Live, values: Values) -> list[Found]:
        prompts = values.every("text")
        if not texts(prompts):
            raise ArgumentError("text", "is empty", "give a prompt to shorten")
        options = search_options(values, live)

        def run(clip: Any, options: SearchOptions) -> list[Found]:
            live.begin()
            found = []
            for turns, prompt in countdown(prompts):
                if not prompt.strip():  # an empty text in a list must not end the others
                    found.append(Found(prompt, 1.0, [(prompt, 1.0)], note="There was no text."))
                    continue
                result = distill(
                    clip,
                    prompt,
                    replace(options, time_limit=live.time_left(turns)),
                    ratio=values["ratio"],
                    callback=live.turn(turns),
                )
                found += live.found([result])
            return found

        return values["clip"].search(run, options)

    @classmethod
    def outputs(cls, found: list[Found], values: Values) -> tuple:
        saved = [one.tokens_saved for one in found]
        return *all_prompts(found), saved, *all_candidates(found)


def _outputs() -> list[io.Output]:
    return [
        io.String.Output("prompt", is_output_list=True, tooltip="The shorter prompt."),
        io.Float.Output(
            "similarity",
            is_output_list=True,
            tooltip="Cosine similarity with the long prompt by the CLIP, at most 1.",
        ),
        io.Int.Output(
            "tokens_saved", is_output_list=True, tooltip="Tokens of the long prompt minus its own."
        ),
    ]
