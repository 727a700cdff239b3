"""The style of several images: the direction in feature space that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

if TYPE_CHECKING:
    from .clip import AnyClip

# Shares that are subtracted: of the features of the perturbed images, and along the directions in
# which the images differ. Chosen on other trials than those of benchmarks/style.py. Prompts get
# worse where all of the differences are subtracted, since the rest is too small a target.
PERTURBED, DIFFERENT = 0.3, 0.5


def style_direction(
    clip: AnyClip, images: Sequence[Image.Image], features: torch.Tensor, fit: str = "crop"
) -> torch.Tensor:
    """The unit direction in feature space along which images of one style lie.

    The mean of the features also holds the mean of the contents, and a part that images of any
    style have in common. Two terms are subtracted in part. The first is the mean feature of the
    same images with other colours, lines and textures (`perturb`): it keeps the contents and loses
    the style. The second is the part along the directions in which the images differ, since the
    style is the same in all of them.

    Args:
        clip: encodes the perturbed images.
        images: RGB, at least two.
        features: (len(images), features) their unit features.
        fit: with which these were encoded.

    Returns:
        (features,) unit vector.
    """
    # in one call, since the image tower may have to be fetched for each
    perturbed = clip.encode_images(_Perturbed(images), fit)
    perturbed = perturbed.view(len(images), -1, perturbed.shape[1]).mean(1)
    style = (features - PERTURBED * perturbed).mean(0)
    differences = features - features.mean(0)
    # more images than a handful would leave too little; the first directions hold the contents
    count = min(len(images) - 1, features.shape[1] // 4)
    # on the CPU, since not every backend has it, and a few rows are quick anywhere
    _, lengths, basis = torch.linalg.svd(differences.cpu(), full_matrices=False)
    basis = basis[:count][lengths[:count] > 1e-4]  # images that are the same differ in nothing
    basis = basis.to(style.device)
    return F.normalize(style - DIFFERENT * basis.T @ (basis @ style), dim=-1)


class _Perturbed:
    """The perturbed images of all images, made one by one: large ones would fill the memory."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Image.Image]:
        for image in self.images:
            yield from perturb(image)


def perturb(image: Image.Image) -> Iterator[Image.Image]:
    """The same picture with its colours, lines or textures changed in twelve ways."""
    grey = image.convert("L")
    yield grey.convert("RGB")
    yield ImageOps.invert(grey.filter(ImageFilter.FIND_EDGES)).convert("RGB")
    yield grey.point([255 * (value > 160) for value in range(256)]).convert("RGB")
    yield image.filter(ImageFilter.GaussianBlur(image.width / 32))
    yield ImageOps.invert(image)
    yield ImageOps.posterize(image, 2)
    yield ImageOps.solarize(image, 128)
    yield ImageEnhance.Contrast(image).enhance(2.5)
    yield ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.3)).enhance(0.4)
    yield ImageEnhance.Color(image).enhance(3)
    yield _turn_hue(image, 85)
    yield _turn_hue(image, 170)


def _turn_hue(image: Image.Image, by: int) -> Image.Image:
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(by)  # wraps around, as hues do
    return Image.fromarray(hsv, "HSV").convert("RGB")
