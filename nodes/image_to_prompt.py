"""PEZ Image to Prompt."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from comfy_api.latest import io

from ..pez_core import Avoid, SearchOptions, invert, prepare_caption
from ..pez_core.captions import in_time, pruned
from ..pez_core.clip.images import load_image
from ..pez_core.continuation import continuing
from ..pez_core.errors import ArgumentError
from ..pez_core.options import IMAGE_WORDING
from ..pez_core.targets import encode_targets, is_encoded
from . import inputs
from .found import Found
from .learning import Learner, all_candidates, all_prompts, learner_schema, search_options
from .live import Live, countdown
from .memory import cancellable
from .values import Values, lines

log = logging.getLogger(__name__)


class ImageToPrompt(Learner):
    """A prompt for each image, or one for all."""

    NEEDED_TO_LEARN = ("clip", "images", "vocabulary", "avoid_images")
    REQUIRED = ("clip", "images")
    WIDGETS: ClassVar[dict[str, str]] = {"weight": "`avoid_weight`"}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return learner_schema(
            node_id="PEZ_ImageToPrompt",
            display_name="PEZ Image to Prompt",
            description="Finds a short text prompt for an image. Wire it to CLIP Text Encode.",
            search_aliases=[
                "image to text",
                "interrogate",
                "clip interrogator",
                "caption",
                "reverse prompt",
                "hard prompts made easy",
                "describe image",
                "tagger",
                "img2prompt",
                "textual inversion",
            ],
            wording=IMAGE_WORDING,
            inputs_=[
                inputs.images(
                    "images",
                    tooltip="One image or a batch, also from CLIP Vision Encode. Sizes may differ. "
                    "If one of several cannot be read, its prompt is empty.",
                ),
                *inputs.search(8, "Length of the prompt in tokens. Most words are one token."),
                *_target_inputs(),
                *_avoid_inputs(),
            ],
            newest=_caption_inputs(),
            outputs=_outputs(),
        )

    @classmethod
    def learn(cls, live: Live, values: Values) -> list[Found]:
        images, shared = values.pictures("images"), values["shared"]
        if not images:
            raise ArgumentError("images", "is empty", "connect an image")
        options = search_options(values, live)
        captions = [caption.strip() for caption in values.every("caption")]
        refused = {}
        if not shared:
            images, refused = _read(images)
        prunes = _prunes(values)
        groups = _groups(images, captions, shared, refused, prunes)
        avoid = [*lines(values["avoid"]), *values.pictures("avoid_images")]

        def run(clip: Any, options: SearchOptions) -> list[Found]:
            live.begin()
            found = []
            for turns, (group, given) in countdown(groups):
                targets = _encoded(clip, group, options.fit, always=prunes)
                limited = replace(options, time_limit=live.time_left(turns))
                caption, remark = _caption(clip, given, limited, values, targets, live)
                own, change = continuing(options, caption)
                results = invert(
                    clip,
                    targets,
                    replace(own, time_limit=live.time_left(turns)),
                    caption=caption,
                    avoid=Avoid(avoid, values["avoid_weight"]) if avoid else (),
                    shared=shared,
                    negative_prompt=values["negative_prompt"],
                    callback=live.turn(turns, caption),
                )
                remark = f"{remark} {change}"
                found += [one.with_remark(remark) for one in live.found(results)]
            return found

        found = values["clip"].search(run, options, 1 if shared else len(groups[0][0]))
        for k, problem in sorted(refused.items()):
            log.warning("%s", problem)
            found.insert(k, Found("", 0.0, note=problem))  # the others keep their places
        return found

    @classmethod
    def outputs(cls, found: list[Found], values: Values) -> tuple:
        return *all_prompts(found), *all_candidates(found)


def _target_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "shared",
            default=False,
            optional=True,
            label_on="one prompt for all images",
            label_off="one prompt per image",
            tooltip="With several images: one prompt for all of them, or one for each.",
        ),
        inputs.text(
            "caption",
            multiline=True,
            optional=True,
            placeholder="your caption (optional)",
            tooltip="Text that stays in the prompt, for example from a captioner node. The learned "
            "words go where it has {}, otherwise behind it. `clean_caption` and `prune_caption` "
            "change it.",
        ),
    ]


def _caption_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "clean_caption",
            default=True,
            **inputs.RARE,
            tooltip="On: text that does not describe the image is left out, such as markdown, line "
            "breaks and the words The image shows. A caption that leaves no room for the learned "
            "words is cut. They follow behind a comma, or continue a sentence if `wording` is "
            "sentence. Off: the caption stays as it is. On or off, a list of tags is continued by "
            "tags if `wording` is sentence.",
        ),
        io.Boolean.Input(
            "prune_caption",
            default=False,
            **inputs.RARE,
            tooltip="On: drop the words of the caption that lower its similarity with the images. "
            "Long captions take longer.",
        ),
    ]


def _avoid_inputs() -> list[io.Input]:
    return [
        inputs.text(
            "avoid",
            multiline=True,
            **inputs.RARE,
            placeholder="things to avoid, one per line",
            tooltip="Things that the prompt must not resemble, one per line.",
        ),
        inputs.images(
            "avoid_images",
            tooltip="Images that the prompt must not resemble.",
        ),
        io.Float.Input(
            "avoid_weight",
            default=Avoid([]).weight,
            min=0.0,
            max=10.0,
            step=0.05,
            **inputs.RARE,
            tooltip="Weight of all things to avoid together. The images have weight 1.",
        ),
        io.Boolean.Input(
            "negative_prompt",
            default=False,
            **inputs.RARE,
            tooltip="On: find a negative prompt, far from the images and close to the things to "
            "avoid.",
        ),
        inputs.text(
            "start_from",
            **inputs.RARE,
            tooltip="Text that the first search starts from, at most prompt_len tokens.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.String.Output(
            "prompt",
            is_output_list=True,
            tooltip="A prompt for each image, or one for all.",
        ),
        io.Float.Output(
            "similarity",
            is_output_list=True,
            tooltip="Cosine similarity of prompt and image by the CLIP, at most 1. For a negative "
            "prompt: of the prompt and the things to avoid.",
        ),
    ]


def _read(images: list[Any]) -> tuple[list[Any], dict[int, str]]:
    """The images as pictures, and what is wrong with those that cannot be read, by their places.

    Raises:
        ArgumentError: no image can be read.
    """
    images, errors = list(images), {}
    for k, image in enumerate(images):
        if is_encoded(image):
            continue
        try:
            images[k] = load_image(image)
        except ArgumentError as error:
            errors[k] = error
    if len(errors) == len(images):
        raise errors[0]
    of = f"of {len(images)} has no prompt"
    return images, {k: f"image {k + 1} {of}: {error}" for k, error in errors.items()}


def _encoded(
    clip: Any, images: list[Any], fit: str, always: bool = False
) -> list[Any] | torch.Tensor:
    """The images; their features, if some of them come encoded, or `always`."""
    if not always and not any(map(is_encoded, images)):
        return images
    return encode_targets("images", clip, images, fit)


def _prunes(values: Values) -> bool:
    """Whether words of the captions are dropped."""
    prunes = values["prune_caption"] and any(map(str.strip, values.every("caption")))
    if prunes and values["negative_prompt"]:
        raise ArgumentError(
            "prune_caption",
            "keeps words that are similar to the images, which a negative prompt must not be",
            "turn off `prune_caption` or `negative_prompt`",
        )
    return prunes


def _caption(
    clip: Any,
    given: str,
    options: SearchOptions,
    values: Values,
    images: list[Any] | torch.Tensor,
    live: Live,
) -> tuple[str, str]:
    """A caption as the node is set to change it, and a remark about what was left out."""
    prunes = values["prune_caption"] and given

    def is_finished() -> bool:
        return live.finished

    with cancellable(clip):
        if values["clean_caption"]:
            return prepare_caption(clip, given, options, images if prunes else None, is_finished)
        if not prunes:
            return given, ""
        return pruned(clip, given, images, options.fit, in_time(options, is_finished))


def _groups(
    images: list[Any],
    captions: Sequence[str],
    shared: bool,
    refused: Container[int],
    prunes: bool,
) -> list[tuple[list[Any], str]]:
    """Images that are searched side by side, with their caption, without those that are refused.

    Where captions are pruned, each image may get another one.
    """
    if len(set(captions)) == 1 and (shared or not prunes):
        return [([one for k, one in enumerate(images) if k not in refused], captions[0])]
    if len(set(captions)) == 1:
        captions = [captions[0]] * len(images)
    if shared or len(captions) != len(images):
        raise ArgumentError(
            "caption",
            f"gives {len(captions)} captions for {len(images)} images",
            "give one caption, or one for each image with one prompt per image",
        )
    pairs = enumerate(zip(images, captions, strict=True))
    return [([image], caption) for k, (image, caption) in pairs if k not in refused]
