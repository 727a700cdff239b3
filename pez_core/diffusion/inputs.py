"""Arguments as diffusers users give them -> what `pez_core` takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ..clip.images import ImageInput, load_images
from ..errors import ArgumentError


def pictures(
    name: str, images: ImageInput | Sequence[ImageInput] | torch.Tensor
) -> list[Image.Image]:
    """Images as `load_images` has them; errors speak of the argument `name`."""
    try:
        return load_images(images)[0]
    except ArgumentError as error:
        raise error.about(name) from error


def seeds(generator: torch.Generator | list[torch.Generator] | None, prompts: int) -> list[int]:
    """A seed for the search of each prompt, such that no generator is drawn from.

    Args:
        generator: its initial seed serves all prompts. A list has one for each prompt, or several
            for each, of which the first counts. None: a seed from torch's default generator.
        prompts: how many are learned.

    Raises:
        ValueError: the list has another length.
    """
    if generator is None:
        return [int(torch.randint(2**31, ()))] * prompts
    if not isinstance(generator, list):
        generator = [generator] * prompts
    for one in generator:
        if not isinstance(one, torch.Generator):
            raise TypeError(
                f"`generator` has to be a torch.Generator or a list of them but holds {one!r}; "
                "write torch.Generator().manual_seed(0)."
            )
    each, rest = divmod(len(generator), prompts)
    if not each or rest:
        raise ValueError(
            f"`generator` has to hold one for each of {prompts} prompts, or as many for each as "
            f"images are made of it, but holds {len(generator)}."
        )
    return [one.initial_seed() % 2**63 for one in generator[::each]]


def check_options(
    name: str, options: dict[str, Any], function: Callable, inputs: Mapping[str, str]
) -> None:
    """Raise unless the further arguments of a function are its own and not given otherwise.

    Args:
        name: of the argument that holds them.
        options: the further arguments.
        function: which takes them.
        inputs: its arguments that are given otherwise, and how.

    Raises:
        TypeError: `options` is no dict, or holds what it must not.
    """
    if not isinstance(options, dict):
        raise TypeError(f"`{name}` has to be a dict but is {options!r}.")
    for option in options:
        if option in inputs:
            raise TypeError(f"`{name}` holds {option!r}; give `{inputs[option]}` instead.")
        if option not in inspect.signature(function).parameters:
            raise TypeError(
                f"`{name}` holds {option!r}, which `{function.__name__}` does not take."
            )
