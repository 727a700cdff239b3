"""What prompts are to be close to, or far from: texts and images, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, TypeAlias

import torch

from .clip.images import ImageInput, load_image
from .errors import ArgumentError
from .prompt_text import chunks

if TYPE_CHECKING:
    from .clip import AnyClip

Target: TypeAlias = str | ImageInput
"""What a prompt can be close to: a string is a text; paths, PIL images and tensors are images."""


def as_list(targets: Target | Sequence[Target]) -> list[Target]:
    """One target or several as a list."""
    if isinstance(targets, (list, tuple)):
        return list(targets)
    if isinstance(targets, torch.Tensor) and targets.ndim == 4:
        return list(targets)
    return [targets]


def encode_targets(name: str, clip: AnyClip, targets: Sequence[Target]) -> torch.Tensor:
    """(len(targets), features) unit features of texts, which may be long, and images."""
    features: dict[int, torch.Tensor] = {}
    pictures = {}
    for k, target in enumerate(targets):
        if isinstance(target, str):
            ids = clip.text.words.encode(target)
            if not ids:
                raise ValueError(f"`{name}` holds an empty text; leave it out.")
            features[k] = clip.encode_chunks(chunks([ids], clip.text.max_prompt_len))
        else:
            try:
                pictures[k] = load_image(target)
            except ArgumentError as error:
                raise error.about(name) from error
    if pictures:
        encoded = clip.encode_images(list(pictures.values()))
        features |= dict(zip(pictures, encoded, strict=True))
    return torch.stack([features[k] for k in range(len(targets))])


def check_weights(
    name: str, weights: Sequence[float] | None, count: int, scale: bool = True
) -> list[float]:
    """One number above 0 for each of `count`, scaled to sum to 1."""
    if weights is None:
        return [1 / count] * count
    numbers = [check_number(name, weight, low=0, above=True) for weight in weights]
    if len(numbers) != count:
        raise ValueError(f"`{name}` has to hold {count} numbers but holds {len(numbers)}.")
    return [number / sum(numbers) for number in numbers] if scale else numbers


def check_number(name: str, value: object, low: float, above: bool = False) -> float:
    """Raise unless `value`, or one of what the argument holds, is a finite number from `low`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` has to hold numbers but holds {value!r}.")
    if not math.isfinite(value) or value < low or (above and value == low):
        bound = f"above {low}" if above else f"{low} or more"
        raise ValueError(f"`{name}` has to be finite and {bound} but holds {value}.")
    return float(value)
