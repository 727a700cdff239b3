"""Prompts of the style that several images share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..clip.images import ImageInput, load_images
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    check_bool,
    check_integer,
    check_string,
    check_type,
)
from ..options import SearchOptions
from ..problem import PromptTarget, default_len
from ..prompt_text import read
from ..results import ReportCallback, Result
from ..runner import learn
from ..style_direction import style_direction
from ..targets import check_callback, check_clip

if TYPE_CHECKING:
    from PIL import Image

    from ..clip import AnyClip

PROMPT_LEN = 8
"""Tokens to learn if `prompt_len` is None and the context has room for them."""
STYLE_TEMPLATE = "{subject}, {style}"
# a run of letters and digits, with apostrophes within it
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class StyleResult(Result):
    """A style prompt: `prompt` describes the style, `apply` adds it to subjects."""

    def apply(self, subject: str, style_template: str = STYLE_TEMPLATE) -> str:
        """A prompt for `subject` in this style; for "" the style alone.

        Raises:
            ArgumentError: `subject` is no string, or `style_template` lacks `{subject}` or
                `{style}`.
        """
        check_style_template(style_template)
        if not check_string("subject", subject).strip():
            return self.prompt
        parts = style_template.replace("{style}", self.prompt).split("{subject}")
        return subject.join(parts)


def check_style_template(style_template: str) -> None:
    """Raise unless the template has places for the subject and the style."""
    check_string("style_template", style_template)
    if "{subject}" not in style_template or "{style}" not in style_template:
        raise ArgumentError(
            "style_template", f"has to hold {{subject}} and {{style}} but is {style_template!r}"
        )


def style(
    clip: AnyClip,
    images: Sequence[ImageInput] | torch.Tensor,
    options: SearchOptions = SearchOptions(),
    *,
    keep_content: bool = False,
    content: str | Sequence[str] = (),
    images_per_step: int | None = None,
    callback: ReportCallback | None = None,
) -> StyleResult:
    """Find one prompt for the style that several images share (paper, section 4.3).

    By default the prompt describes the style without the contents. Its target is the mean feature
    of the images, from which two things are subtracted in part: the features that the images keep
    when their colours, lines and textures are changed, and the directions in which the images
    differ (see `pez_core.style_direction`).

    Args:
        clip, callback: as in `invert`.
        images: two or more images of different things in one style, a list or a batch of pictures
            as in `invert`. Six are usually enough.
        options: see `SearchOptions`; 8 tokens are learned by default.
        keep_content: True: the target is the plain mean feature of the images, as in the paper. The
            prompt then also describes their contents.
        content: a string or a list of strings that describe the contents, such as captions of the
            images. Each of their words with three or more letters is blocked: it does not appear in
            the prompt, not even spelled by several tokens.
        images_per_step: number of images, from 1 to all, that each step of PEZ takes its loss on,
            drawn at random. The best prompt is still the one with the highest score on all images.
            It needs `keep_content`. None: all images.

    Returns:
        A `StyleResult`. `prompt` holds the style words, `similarity` is their mean similarity with
        the images, and `apply("a cat")` gives a prompt for a subject in this style.

    Raises:
        ArgumentError: there are fewer than two images, an image cannot be read, an argument is out
            of range or of the wrong type, or `images_per_step` is set without `keep_content`.
        FloatingPointError: a score or gradient became NaN or infinite.
    """
    check_clip("clip", clip)
    check_callback(callback)
    check_type("options", options, SearchOptions)
    pictures, single = load_images(images)
    if single or len(pictures) < 2:
        raise ArgumentError(
            "images",
            f"has to hold at least two images of one style but holds {len(pictures)}",
            "for a single image use `invert`",
        )
    check_bool("keep_content", keep_content)
    if images_per_step is not None:
        check_integer("images_per_step", images_per_step, 1, len(pictures))
        if not keep_content:
            raise ArgumentError(
                "images_per_step", "needs `keep_content`", "leave it out, or set `keep_content`"
            )
    blocked = _content_words([content] if isinstance(content, str) else content)
    if blocked:
        options = replace(options, vocabulary=options.vocabulary_without(blocked))
    with torch.inference_mode(False):
        target = style_target(clip, pictures, keep_content, images_per_step, options.fit)
        length = options.prompt_len or default_len(clip, PROMPT_LEN)
        (result,) = learn(clip, [target], options, length, callback)
    return StyleResult(**vars(result))


def style_target(
    clip: AnyClip,
    pictures: Sequence[Image.Image],
    keep_content: bool = False,
    images_per_step: int | None = None,
    fit: str = "crop",
) -> PromptTarget:
    """The target of `style`; several styles can be learned in one batch."""
    features = clip.encode_images(pictures, fit)
    weights = features.new_full((len(features),), 1 / len(features))
    direction = None if keep_content else style_direction(clip, pictures, features, fit)
    return PromptTarget(features, weights, weights < 0, direction, images_per_step)


def _content_words(content: Sequence[str]) -> list[str]:
    if not isinstance(content, Sequence) or not all(isinstance(text, str) for text in content):
        raise ArgumentTypeError("content", f"has to hold strings but is {content!r}")
    # words such as "a" and "of" name nothing
    found = [word for text in content for word in _WORD.findall(read(text))]
    return [word for word in found if sum(map(str.isalnum, word)) > 2]
