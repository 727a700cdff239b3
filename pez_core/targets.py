"""Targets of a search: texts and images, each with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F

from .clip.images import ImageInput, load_image
from .errors import ArgumentError, ArgumentTypeError, check_decoded, check_number, check_weights
from .objectives import Similarity
from .prompt_text import contexts

if TYPE_CHECKING:
    from .clip import AnyClip

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")

Target: TypeAlias = str | ImageInput
"""A string is a text; path objects, PIL images, bytes, file objects, arrays and tensors are images.
A tensor with one dimension is the feature of an image by the same CLIP, of any length."""


@dataclass(frozen=True)
class Avoid:
    """Texts and images that a prompt must not be similar to, an argument of `invert`.

    Attributes:
        targets: one target or a list. A string is a text; path objects, PIL images, bytes, file
            objects, arrays and tensors are images, as in `invert`; a tensor with one dimension is
            the feature of an image by the CLIP of the search.
        weight: their weight in the score, where the images have 1. One number, 0 or more, is for
            all targets together; a list has one number above 0 per target.

    A wrong weight is an `ArgumentError` of `invert`.
    """

    targets: Target | Sequence[Target] = ()
    weight: float | Sequence[float] = 0.5

    def weights(self) -> list[float]:
        """One weight for each target.

        Raises:
            ArgumentError: a weight is negative or missing; named `avoid_weight`.
        """
        count = len(as_list(self.targets))
        if isinstance(self.weight, (list, tuple)):
            return check_weights("avoid_weight", self.weight, count)
        return [check_number("avoid_weight", self.weight) / max(count, 1)] * count


def as_list(targets: Target | Sequence[Target]) -> list[Target]:
    """One target or several as a list."""
    if isinstance(targets, (list, tuple)):
        return list(targets)
    if isinstance(targets, torch.Tensor) and targets.ndim == 4:
        return list(targets)
    return [targets]  # type: ignore[list-item]


def check_clip(name: str, clip: object) -> None:
    """Raise unless the argument `name` is a CLIP; a name has to be loaded first."""
    if not hasattr(clip, "encode_texts"):
        raise ArgumentTypeError(name, f"has to be a CLIP from `load_clip` but is {clip!r}")


def check_callback(callback: object) -> None:
    """Raise unless the callback is None or can be called."""
    if callback is not None and not callable(callback):
        raise ArgumentTypeError("callback", f"has to be a function but is {callback!r}")


def check_text(name: str, text: str, remedy: str | None = None) -> str:
    """The text; raise where it is the name of an image file, or cannot be written as UTF-8.

    Args:
        name: of the argument.
        text: its value, or a part of it.
        remedy: of the error; None: to give a path object, for arguments that also take images.
    """
    if text.lower().endswith(_IMAGE_SUFFIXES) and len(text) < 1000 and Path(text).is_file():
        raise ArgumentError(
            name,
            f"is the text {text!r}, which is the name of an image file",
            f"write Path({text!r}) for the image" if remedy is None else remedy,
        )
    return check_decoded(name, text)


def encode_prompt(clip: AnyClip, prompt: str) -> torch.Tensor | None:
    """(features,) unit feature of a prompt of any length; None where it has no words.

    Every function reads prompts like this: without weights and tags, chunk by chunk as in ComfyUI.
    """
    words = clip.text.words
    parts = contexts(words.encode, words.encode_behind, prompt, clip.text.max_prompt_len)
    return clip.encode_chunks(parts) if parts else None


def encode_targets(
    name: str, clip: AnyClip, targets: Sequence[Target], fit: str = "crop"
) -> torch.Tensor:
    """(len(targets), features) unit features of texts, of any length, and images.

    Args:
        name: of the argument that the targets were given as, for errors.
        clip: encodes them.
        targets: at least one.
        fit: of the images, as in `Clip.encode_images`.

    Raises:
        ArgumentError: there is no target, a text is empty or names an image file, an image cannot
            be read, or an encoded image is not of this CLIP; it is about the argument `name`.
    """
    if not targets:
        raise ArgumentError(name, "is empty", "give a text or an image")
    features: dict[int, torch.Tensor] = {}
    pictures = {}
    for k, target in enumerate(targets):
        if isinstance(target, str):
            feature = encode_prompt(clip, check_text(name, target))
            if feature is None:
                problem = "holds only tags, no words" if target.strip() else "holds an empty text"
                raise ArgumentError(name, problem, "leave it out")
            features[k] = feature
        elif isinstance(target, torch.Tensor) and is_encoded(target):
            features[k] = _given_feature(name, clip, target)
        else:
            try:
                pictures[k] = load_image(target)
            except ArgumentError as error:
                raise error.about(name) from error
    if pictures:
        encoded = clip.encode_images(list(pictures.values()), fit)
        features |= dict(zip(pictures, encoded, strict=True))
    return torch.stack([features[k] for k in range(len(targets))])


def is_encoded(target: object) -> bool:
    """Whether a target is the feature of an image."""
    return isinstance(target, torch.Tensor) and target.ndim == 1


def _given_feature(name: str, clip: AnyClip, feature: torch.Tensor) -> torch.Tensor:
    """The unit feature of an image that was encoded before."""
    length = clip.feature_size
    if len(feature) != length:
        raise ArgumentError(
            name,
            f"holds an encoded image of {len(feature)} numbers, but features of {clip.name} have "
            f"{length}",
            "give the image itself, or encode it with the image encoder of this CLIP",
        )
    values = feature.detach().to(clip.device, torch.float32, copy=True)
    if not values.isfinite().all() or not values.norm() > 0:
        raise ArgumentError(name, "holds an encoded image without a direction", "encode it again")
    return F.normalize(values, dim=-1)


def objective_for(
    clip: AnyClip, targets: Target | Sequence[Target], fit: str = "crop"
) -> Similarity:
    """The objective of `pez_core.search` for one prompt: the mean similarity with the targets.

    Args:
        clip: from `load_clip`.
        targets: one target or several; a string is a text.
        fit: of the images, as in `SearchOptions`.

    Raises:
        ArgumentError: there is no target, or one cannot be read.
    """
    with torch.inference_mode(False):
        features = encode_targets("targets", clip, as_list(targets), fit)
        return Similarity(clip.text.encoder(), features[None])
