"""Arguments as diffusers users give them -> what `pez_core` takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from ..clip.images import ImageInput, load_images


def pictures(
    name: str, images: ImageInput | Sequence[ImageInput] | torch.Tensor
) -> list[Image.Image]:
    """Images as `load_images` has them; errors speak of the argument `name`."""
    try:
        return load_images(images)[0]
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`images`", f"`{name}`")) from error


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
    each, rest = divmod(len(generator), prompts)
    if not each or rest:
        raise ValueError(
            f"`generator` has to hold one for each of {prompts} prompts, or as many for each as "
            f"images are made of it, but holds {len(generator)}."
        )
    return [one.initial_seed() % 2**63 for one in generator[::each]]
