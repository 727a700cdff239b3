"""Prompts of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

import torch

from ..caption import check_caption, spoken_caption
from ..clip.images import ImageInput, load_images
from ..errors import ArgumentError, check_bool, check_type, check_weights
from ..options import SearchOptions
from ..problem import PromptTarget, default_len
from ..prompt_text import SYNTAX
from ..results import ReportCallback, Result
from ..runner import learn
from ..single_words import WORD_WEIGHT
from ..targets import Avoid, Target, as_list, check_callback, check_clip, encode_targets

if TYPE_CHECKING:
    from ..clip import AnyClip

PROMPT_LEN = 8
"""Tokens to learn if `prompt_len` is None and the context has room for them."""

# How far the length of a feature may be from 1; in half precision it is up to 0.004.
_UNIT = 0.01


def invert(
    clip: AnyClip,
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
    options: SearchOptions = SearchOptions(),
    *,
    caption: str = "",
    avoid: Avoid | Target | Sequence[Target] = (),
    shared: bool | Sequence[float] = False,
    negative_prompt: bool = False,
    callback: ReportCallback | None = None,
) -> list[Result]:
    """Find a short text prompt that CLIP finds similar to an image (paper, section 4).

    All images are searched side by side. The result of an image depends on the image and the
    options, not on the other images.

    Args:
        clip: from `load_clip`.
        images: a path, a PIL image, the content of an image file or a file object, or a (H, W, 3),
            (3, H, W) or (H, W) array or tensor, of integers or of floats in [0, 1]; a list of
            these; a (N, H, W, 3) or (N, 3, H, W) batch; or a (N, features) tensor of unit vectors,
            as `clip.encode_images` returns them. A (3, H, W) tensor is one picture in colour: three
            masks are `masks[..., None]`.
        options: see `SearchOptions`. By default 8 tokens are learned, or fewer where the caption
            leaves less of the context.
        caption: text that stays in the prompt, such as that of a captioner. The learned words go
            where it holds `{}`, else behind it; with the wording "tags", and behind a list of tags
            with "sentence", a comma stands between. It may have any length and hold weights and
            tags; `pez_core.prompt_text` says how these are read. A result whose prompt is longer
            than the context, or shorter than wanted for the caption, has a `note`.
        avoid: one text or image, or a list of them, to stay away from. A string is always a text;
            an image file is given as `Path("cat.png")`. The mean similarity with them is subtracted
            from that with the image, with weight 0.5; `Avoid(targets, weight)` sets another weight.
        shared: False: one prompt for each image. True: one prompt for all of them, by the mean of
            their similarities. A list of numbers above 0, one per image: the same by a weighted
            mean.
        negative_prompt: True: learn words for the negative prompt of an image model. They are
            similar to `avoid` and, with its weight, far from the images; without `avoid` they are
            only far from the images. It cannot be combined with `options.extra_loss`.
        callback: called with a `Report` after each step of PEZ and each swap
            (on a GPU after every 25th); a true return value ends the search, which returns the best
            so far.

    Returns:
        A list with one `Result` per image, in their order; with `shared` a list with a single one.
        `result.prompt` is the text, `result.similarity` its cosine similarity with the image; with
        `shared` the mean over the images, and for a negative prompt that with `avoid`, if given.

    Raises:
        ArgumentError: an argument is out of range or of the wrong type, or an image cannot be read.
        FloatingPointError: a score or gradient became NaN or infinite.
    """
    check_clip("clip", clip)
    check_callback(callback)
    check_type("options", options, SearchOptions)
    encoded = images if _are_features(images, clip) else None
    pictures = load_images(images)[0] if encoded is None else []
    count = len(pictures) if encoded is None else len(encoded)
    if not count:
        raise ArgumentError("images", "is empty", "give at least one image")
    away = avoid if isinstance(avoid, Avoid) else Avoid(avoid)
    weights = _weights(shared, count)
    if negative_prompt and options.extra_loss is not None:
        raise ArgumentError(
            "extra_loss",
            "moves prompts towards the images, a negative prompt away from them",
            "leave `negative_prompt` out",
        )
    signed, avoided = _signed_weights(weights, away, negative_prompt)
    fixed = check_caption(caption, options.wording)
    options, spoken = _as_read(options, fixed)
    length = options.prompt_len or default_len(clip, PROMPT_LEN, spoken or fixed)
    with torch.inference_mode(False):
        features = (
            clip.encode_images(pictures, options.fit)
            if encoded is None
            else _features(clip, encoded)
        )
        targets = as_list(away.targets)
        others = encode_targets("avoid", clip, targets, options.fit) if targets else features[:0]
        groups = [features] if shared else features.split(1)
        results = learn(
            clip,
            [
                PromptTarget(
                    torch.cat([group, others]),
                    features.new_tensor(signed),
                    torch.tensor(avoided, device=features.device),
                )
                for group in groups
            ],
            options,
            length,
            callback,
            caption=fixed,
            encoded=spoken,
            word_weight=WORD_WEIGHT,
        )
    if options.prompt_len or length == PROMPT_LEN or not caption:
        return results
    return _with_room(results, length)


def _with_room(results: list[Result], room: int) -> list[Result]:
    """The results with a remark that the caption leaves less room than usual."""
    remark = f"Beside the caption there is room for {room} learned tokens, not for {PROMPT_LEN}."
    return [replace(one, note=f"{remark} {one.note}".strip()) for one in results]


def _as_read(options: SearchOptions, caption: str) -> tuple[SearchOptions, str | None]:
    """The options and the caption for the text encoder, which reads no weights and tags."""
    spoken = spoken_caption(caption)
    if spoken is None:
        return options, None
    return replace(options, vocabulary=options.vocabulary_without(SYNTAX)), spoken


def _weights(shared: bool | Sequence[float], images: int) -> list[float]:
    """The weight of each image of one prompt, summing to 1."""
    if shared is False:
        return [1.0]
    if shared is True:
        return [1 / images] * images
    weights = check_weights("shared", shared, images)
    return [weight / sum(weights) for weight in weights]


def _signed_weights(
    weights: list[float], away: Avoid, negative_prompt: bool
) -> tuple[list[float], list[bool]]:
    """Weights of images and of targets to avoid, below 0 for those to stay away from."""
    check_bool("negative_prompt", negative_prompt)
    others = away.weights()
    total = sum(others)
    if negative_prompt and others and not total:
        raise ArgumentError("avoid_weight", "is 0, but a negative prompt is learned for `avoid`")
    if negative_prompt:
        weights = [-weight * (total if others else 1) for weight in weights]
        others = [weight / total for weight in others]
    else:
        others = [-weight for weight in others]
    avoided = [negative_prompt] * len(weights) + [not negative_prompt] * len(others)
    return [*weights, *others], avoided


def encode_images(
    clip: AnyClip, images: ImageInput | Sequence[ImageInput] | torch.Tensor, fit: str
) -> torch.Tensor:
    """(images, features) unit vectors of `images` as in `invert`, encoded before or here."""
    if _are_features(images, clip):
        return _features(clip, images)
    return clip.encode_images(load_images(images)[0], fit)


def _are_features(images: object, clip: AnyClip) -> TypeGuard[torch.Tensor]:
    """Whether images are features, and no grey picture: that has no negative values.

    Features without one have the size of those of the CLIP and unit length; 0 is refused later.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 2 or not images.is_floating_point():
        return False
    if not images.numel() or not bool(images.min() >= 0):  # also where values are NaN
        return True
    lengths = images.float().norm(dim=1)
    return images.shape[1] == clip.feature_size and (_are_units(lengths) or not lengths.any())


def _are_units(lengths: torch.Tensor) -> bool:
    return bool(((lengths - 1).abs() < _UNIT).all())  # false where they are not finite


def _features(clip: AnyClip, images: torch.Tensor) -> torch.Tensor:
    """Features that were encoded before, on the device of the CLIP."""
    length = clip.feature_size
    if images.shape[1] != length:
        raise ArgumentError(
            "images",
            f"has shape {tuple(images.shape)}, but features of {clip.name} have {length} numbers",
            "give the result of its `encode_images`, or pictures; images[..., None] is a grey one",
        )
    features = images.detach().to(clip.device, torch.float32).clone()
    lengths = features.norm(dim=1)
    if not _are_units(lengths):
        raise ArgumentError(
            "images",
            f"has to hold unit vectors, but their lengths are from {float(lengths.min()):.3g} to "
            f"{float(lengths.max()):.3g}",
            "give the result of `encode_images`, or divide each by its length",
        )
    return features
