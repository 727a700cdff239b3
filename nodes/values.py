"""The values that a node gets for its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from comfy_api.latest import io

from ..pez_core.errors import ArgumentError

MOST_PHRASES = 10_000
"""Phrases that a widget may hold."""
CONTROL = "control_after_generate"
"""The widget that the page puts behind a seed."""


class Values:
    """The inputs of a node that gets all of them as lists, with the schema's own defaults.

    Args:
        schema: of the node.
        given: a list for each input that has a value; optional inputs may be missing.
    """

    def __init__(self, schema: io.Schema, given: dict[str, Any]) -> None:
        self._defaults = defaults(schema)
        self._given = given

    def __getitem__(self, name: str) -> Any:
        """The first value of an input; the schema's default (None for a wire) if it is empty."""
        values = self._given.get(name)
        value = values[0] if isinstance(values, (list, tuple)) and values else None
        return self._defaults[name] if value is None else value

    def get(self, name: str, otherwise: Any) -> Any:
        """The first value of an input, or another one where the node lacks the input."""
        return self[name] if name in self._defaults else otherwise

    def every(self, name: str) -> list[Any]:
        """All values of an input, without those that are None."""
        values = [value for value in self._given.get(name) or () if value is not None]
        return values or [value for value in [self._defaults[name]] if value is not None]

    def pictures(self, *names: str) -> list[Any]:
        """The images of these inputs, one by one, each as `load_image` takes it.

        An image that comes encoded, as CLIP_VISION_OUTPUT, is its (features,) vector.

        Raises:
            ArgumentError: an encoded image is not by a CLIP.
        """
        return [
            image for name in names for batch in self.every(name) for image in _frames(name, batch)
        ]

    def texts(self, *names: str) -> list[str]:
        """The texts of these inputs that are not empty."""
        return texts([text for name in names for text in self.every(name)])


def _frames(name: str, batch: Any) -> Iterator[Any]:
    """The images of a value of a wire, of any node.

    That is a (images, height, width, channels) batch, or a (frames, height, width) mask, which may
    have three or four frames, or one image alone; or a CLIP_VISION_OUTPUT; or a list of these with
    gaps.
    """
    if batch is None:
        return
    if isinstance(batch, (list, tuple)):
        for one in batch:
            yield from _frames(name, one)
        return
    if hasattr(batch, "image_embeds"):
        yield from _encoded(name, batch.image_embeds)
        return
    shape = tuple(getattr(batch, "shape", ()))
    is_mask = len(shape) == 3 and shape[2] not in (1, 3, 4)
    if len(shape) > 3 or is_mask:
        for one in batch:
            yield from _frames(name, one)
    else:
        yield batch


def _encoded(name: str, features: Any) -> torch.Tensor:
    """The features of a CLIP_VISION_OUTPUT, one row for each image."""
    if isinstance(features, torch.Tensor) and features.ndim == 2:
        return features
    raise ArgumentError(
        name,
        "has a CLIP_VISION_OUTPUT that was not made by a CLIP",
        "encode the image with the image encoder of the model's own CLIP, or connect the image",
    )


def defaults(schema: io.Schema) -> dict[str, Any]:
    """The default of every input; None for a wire."""
    return {one.id: getattr(one, "default", None) for one in schema.inputs}


def widget_names(schema: io.Schema) -> list[str]:
    """The names of a node's widgets in the order in which a workflow file stores their values.

    The page puts required inputs before optional ones.
    """
    names = []
    for one in sorted(schema.inputs, key=lambda one: one.optional):
        if not isinstance(one, io.WidgetInput):
            continue
        names.append(one.id)
        if getattr(one, "control_after_generate", None):
            names.append(CONTROL)
    return names


def texts(values: Sequence[str | None]) -> list[str]:
    """Texts that are not empty."""
    return [text.strip() for text in values if text and text.strip()]


def lines(text: str) -> list[str]:
    """The lines of a text box that are not empty."""
    return texts(text.splitlines())


def phrases(text: str, name: str) -> list[str]:
    """Phrases that are separated by commas or line ends.

    Args:
        text: of a widget.
        name: of the widget, for the error.

    Raises:
        ArgumentError: there are more than `MOST_PHRASES`; a workflow may hold megabytes.
    """
    found = texts(text.replace("\n", ",").split(","))
    if len(found) > MOST_PHRASES:
        raise ArgumentError(
            name,
            f"holds {len(found):,} phrases, more than {MOST_PHRASES:,}",
            "shorten the list",
        )
    return found
