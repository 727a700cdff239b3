"""`--captioner`: a caption for each image, which learned words continue."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from ..captions import in_time, prepare_caption, pruned, text_of_caption
from ..continuation import continuing
from ..errors import ArgumentError
from ..prompt_text import SLOT
from .arguments import option_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
        help="drop the words of the caption that lower its similarity with the image",
    )


class Captions:
    """The captions of images: by the model of `--captioner`, or that of `--caption` to be pruned.

    Args:
        arguments: of the command.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from .. import load_captioner
        from ..captioners import naming_captioner

        self._prune, self._naming = arguments.prune_caption, naming_captioner
        self._option = partial(option_name, arguments)
        self._takes_wording = arguments.wording is None  # nobody chose another one
        self._given, self._write = arguments.caption, None
        if arguments.captioner is None:
            return
        with naming_captioner():
            self._write = load_captioner(
                arguments.captioner, device=arguments.device, download=arguments.download
            )

    def add(
        self,
        row: dict[str, Any],
        image: Image,
        options: SearchOptions,
        interrupted: Callable[[], bool],
        clip: AnyClip,
    ) -> tuple[str, SearchOptions]:
        """Write the caption of an image into its row, and a remark about what was changed.

        Args:
            row: of the image.
            image: to write it for.
            options: of the search.
            interrupted: whether pruning has to end.
            clip: of the search.

        Returns:
            The caption, and the options of the search.

        Raises:
            RuntimeError: the model writes no caption for this image.
        """
        if self._write is None:
            return self.add_given(row, [image], options, interrupted, clip)
        target = image if self._prune else None
        text = self._text(self._write, image)
        caption, remark = prepare_caption(clip, text, options, target, interrupted)
        return self._filled(row, caption, remark, options)

    def add_given(
        self,
        row: dict[str, Any],
        images: Sequence[Image],
        options: SearchOptions,
        interrupted: Callable[[], bool],
        clip: AnyClip,
    ) -> tuple[str, SearchOptions]:
        """Prune the caption of the user for images that share a prompt; otherwise as `add`."""
        stop = in_time(options, interrupted)
        caption, remark = pruned(clip, self._given, images, options.fit, stop)
        return self._filled(row, caption, remark, options)

    def _filled(
        self, row: dict[str, Any], caption: str, remark: str, options: SearchOptions
    ) -> tuple[str, SearchOptions]:
        row["caption"] = text_of_caption(caption)
        change = ""
        if self._takes_wording:
            options, change = continuing(options, caption)
        if remark or change:
            row["note"] = f"{remark} {change}".strip()
        return caption, options

    def _text(self, write: Callable[[Image], str], image: Image) -> str:
        """The text of the model, in which no place for the learned words is meant."""
        try:
            with self._naming():
                return write(image).replace(SLOT, "")
        except ArgumentError as error:  # the model fails on this image, and may not on others
            raise RuntimeError(error.render(self._option)) from error
