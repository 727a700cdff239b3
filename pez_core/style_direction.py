"""What several images share beyond what they depict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

if TYPE_CHECKING:
    from .clip import AnyClip

# How much is taken out: of what stays when the style is spoilt, and along the directions in which
# the images differ. Chosen on other trials than those of benchmarks/style.py; taking out all of the
# differences leaves the search too faint a target, and its prompts get worse.
SPOILT, DIFFERENT = 0.3, 0.5


def style_direction(
    clip: AnyClip, images: Sequence[Image.Image], features: torch.Tensor
) -> torch.Tensor:
    """The unit direction in feature space along which images of one style lie.

    The mean of the features still holds the mean of the contents and all that is common to images
    of any style. Part of two things is taken out of it: of what stays when the same images are
    spoilt in colour, line and texture (`spoil`), since contents and the ways of images as such
    survive this better than a style does; and of every direction in which the images differ from
    each other, since what is shared lies elsewhere.

    Args:
        clip: encodes the spoilt images.
        images: RGB, at least two.
        features: (len(images), features) their unit features.

    Returns:
        (features,) unit vector.
    """
    # in one call, since the image tower may have to be fetched for each
    spoilt = clip.encode_images([picture for image in images for picture in spoil(image)])
    spoilt = spoilt.view(len(images), -1, spoilt.shape[1]).mean(1)
    style = (features - SPOILT * spoilt).mean(0)
    differences = features - features.mean(0)
    # more images than a handful would leave too little; the first directions hold the contents
    count = min(len(images) - 1, features.shape[1] // 4)
    _, lengths, basis = torch.linalg.svd(differences, full_matrices=False)
    basis = basis[:count][lengths[:count] > 1e-4]  # images that are the same differ in nothing
    return F.normalize(style - DIFFERENT * basis.T @ (basis @ style), dim=-1)


def spoil(image: Image.Image) -> list[Image.Image]:
    """The same picture with its colours, lines or textures changed in twelve ways."""
    grey = image.convert("L")
    edges = ImageOps.invert(grey.filter(ImageFilter.FIND_EDGES))
    bright = ImageEnhance.Brightness(image).enhance(1.3)
    return [
        grey.convert("RGB"),
        edges.convert("RGB"),
        grey.point([255 * (value > 160) for value in range(256)]).convert("RGB"),
        image.filter(ImageFilter.GaussianBlur(image.width / 32)),
        ImageOps.invert(image),
        ImageOps.posterize(image, 2),
        ImageOps.solarize(image, 128),
        ImageEnhance.Contrast(image).enhance(2.5),
        ImageEnhance.Contrast(bright).enhance(0.4),
        ImageEnhance.Color(image).enhance(3),
        _turn_hue(image, 85),
        _turn_hue(image, 170),
    ]


def _turn_hue(image: Image.Image, by: int) -> Image.Image:
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(by)  # wraps around, as hues do
    return Image.fromarray(hsv, "HSV").convert("RGB")
