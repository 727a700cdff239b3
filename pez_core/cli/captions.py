"""`pez invert --captioner`: a caption for each image, which learned words continue."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..prompt_text import SLOT

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..clip import AnyClip
    from ..options import SearchOptions


def add_captioner(group: Any) -> None:
    """Add the options to a group of options."""
    group.add_argument(
        "--captioner",
        metavar="NAME_OR_FOLDER",
        help="model of transformers that writes the caption of each image",
    )
    group.add_argument(
        "--prune-caption",
        action="store_true",
        help="drop the words of this caption that lower its similarity with the image",
    )


def check_captioner(arguments: argparse.Namespace) -> None:
    """Raise where `--captioner` does not go with the other options."""
    if arguments.captioner is None:
        if arguments.prune_caption:
            raise ArgumentError("prune_caption", "requires `captioner`", "add it")
        return
    others = {
        "caption": "the captioner writes it",
        "shared": "each image has a caption of its own",
        "negative_prompt": "it would begin with a description of the image",
    }
    for name, reason in others.items():
        if getattr(arguments, name):
            raise ArgumentError(
                "captioner",
                f"cannot be combined with `{name}`: {reason}",
                "leave one of the two out",
            )


@contextmanager
def _naming_captioner() -> Iterator[None]:
    """Inside, errors about the model are about `--captioner`."""
    try:
        yield
    except ArgumentError as error:
        if error.argument == "name_or_path":
            raise error.about("captioner") from error
        raise


class Captions:
    """The captions of images, by the model of `--captioner`.

    Args:
        arguments: of the command.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from .. import load_captioner

        self._prune = arguments.prune_caption
        with _naming_captioner():
            self._write = load_captioner(
                arguments.captioner, device=arguments.device, download=arguments.download
            )

    def add(self, row: dict[str, Any], image: Image, clip: AnyClip, options: SearchOptions) -> str:
        """Write the caption of an image into its row, and a remark where it was cut.

        Returns:
            The caption with the place of the learned words.
        """
        from .. import clean_caption, fit_caption, prune_caption
        from ..tasks.invert import PROMPT_LEN

        with _naming_captioner():
            written = self._write(image)
        text = clean_caption(written.replace(SLOT, ""))
        if text and self._prune:
            text = clean_caption(prune_caption(clip, text, image, options.fit))
        row["caption"] = text
        if not text:
            return ""
        # more words behind a comma, or the rest of the sentence
        place = " {}" if options.wording == "sentence" else ", {}"
        caption, remark = fit_caption(clip, text + place, options.prompt_len or PROMPT_LEN)
        row["caption"] = caption.removesuffix(SLOT).rstrip(" ,")
        if remark:
            row["note"] = remark
        return caption
