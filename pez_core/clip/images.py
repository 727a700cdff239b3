"""Pictures as people have them -> RGB pictures as CLIP wants them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageInput: TypeAlias = Image.Image | str | os.PathLike | torch.Tensor | np.ndarray
"""One picture: PIL image, path, or (H, W, C) / (C, H, W) values in [0, 1] with C = 1, 3 or 4."""

# Pixels of a very long picture that lie outside the centre crop are cut off before resizing.
_LONGEST_ASPECT = 8


def load_image(image: ImageInput) -> Image.Image:
    """One picture -> upright RGB on white.

    Exif rotation is applied, transparency is laid on white, an animation gives its first frame,
    16-bit and floating-point greys are scaled to 8 bits.

    Raises:
        TypeError: `image` is none of the accepted types.
        ValueError: the picture cannot be read, is empty, or its values are not finite in [0, 1].
    """
    if isinstance(image, (str, os.PathLike)):
        if str(image).startswith(("http://", "https://")):
            raise ValueError(f"`images`: {image} is an address; download it and give the file.")
        return _from_path(Path(image))
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the PIL image")
    if isinstance(image, (torch.Tensor, np.ndarray)):
        return _from_array(image)
    raise TypeError(
        "`images` has to hold PIL images, paths or tensors but got "
        f"{type(image).__name__}; convert it to one of these."
    )


def load_images(
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
) -> tuple[list[Image.Image], bool]:
    """One picture or several -> list of RGB pictures, and whether it was a single one.

    Several: a list or tuple, or a (N, H, W, C) / (N, C, H, W) batch.

    Raises:
        TypeError, ValueError: as `load_image`; also for an empty list or batch.
    """
    if isinstance(images, (torch.Tensor, np.ndarray)) and images.ndim == 4:
        images = list(images)
    elif isinstance(images, (str, os.PathLike, Image.Image, torch.Tensor, np.ndarray)):
        return [load_image(images)], True
    elif not isinstance(images, Sequence):
        raise TypeError(
            "`images` has to be a PIL image, a path, a tensor or a list of these but is "
            f"{type(images).__name__}."
        )
    if not len(images):
        raise ValueError("`images` is empty; give at least one image.")
    loaded = []
    for k, image in enumerate(images, start=1):
        try:
            loaded.append(load_image(image))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (image {k} of {len(images)})") from error
    return loaded, False


def load_image_at(path: str | os.PathLike, offset: int, size: int) -> Image.Image:
    """The picture in `size` bytes of a file from `offset` on, such as a member of a tar.

    Raises:
        ValueError: as `load_image`.
    """

    def read() -> BytesIO:
        with open(path, "rb") as file:
            file.seek(offset)
            return BytesIO(file.read(size))

    return _opened(read, f"{path} at byte {offset}", size)


def _from_path(path: Path) -> Image.Image:
    def check() -> Path:
        if path.is_dir():
            raise ValueError(f"`images`: {path} is a folder; give the image files in it.")
        return path

    return _opened(check, str(path))


def _opened(read: Callable[[], Path | BytesIO], path: str, size: int | None = None) -> Image.Image:
    try:
        source = read()
        if (source.stat().st_size if size is None else size) == 0:
            raise ValueError(f"`images`: {path} is an empty file; save the image again.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
    except FileNotFoundError as error:
        raise ValueError(f"`images`: {path} does not exist; check the path.") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"`images`: {path} is not an image that can be read; save it as PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"`images`: {path} is too large ({error}); scale it down.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"`images`: {path} cannot be opened ({error}); check it.") from error
    with image:
        return _to_rgb(image, path)


def _first_frame(image: Image.Image, what: str) -> Image.Image:
    """The decoded picture, or the first of an animation, whose position is left as it was."""
    try:
        if getattr(image, "n_frames", 1) == 1:
            image.load()
            return image
        position = image.tell()
        image.seek(0)
        first = image.copy()
        image.seek(position)
        return first
    except Exception as error:  # decoders of damaged data raise whatever they happen to meet
        raise ValueError(f"`images`: {what} is damaged ({error}); save the image again.") from error


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"`images`: {what} has size {image.width}x{image.height}; it is empty.")
    sixteen_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
    image = _first_frame(image, what)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"`images`: {what} holds NaN or infinite values.")
        # Greys without a stated range: [0, 1], 8 or 16 bits, the least of these that holds them.
        # A dark 16-bit picture that is known to be one keeps its darkness.
        top = 65535 if sixteen_bits else _white_level(values.max())
        grey = (values / top * 255).clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        if image.mode in ("La", "RGBa"):  # premultiplied; each converts to its plain kind only
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _white_level(maximum: float) -> float:
    return 1.0 if maximum <= 1 else 255.0 if maximum <= 255 else 65535.0


def _from_array(array: torch.Tensor | np.ndarray) -> Image.Image:
    if isinstance(array, np.ndarray):
        array = np.ascontiguousarray(array)  # torch takes no negative strides
    tensor = torch.as_tensor(array).detach().cpu()
    shape = tuple(tensor.shape)
    if tensor.ndim != 3 or not ({shape[0], shape[2]} & {1, 3, 4}):
        raise ValueError(
            "`images` has to be a tensor (H, W, 3) or (3, H, W), or a batch of these with one more "
            f"dimension in front, but an image has shape {shape}."
        )
    if 0 in shape:
        raise ValueError(f"`images`: a tensor of shape {shape} is empty.")
    if shape[2] not in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    if tensor.dtype == torch.uint8:
        raise ValueError(
            "`images` is a tensor of 8-bit integers, but values in [0, 1] are needed; "
            "divide it by 255."
        )
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(
            "`images` is a tensor that holds NaN or infinite values; check its source."
        )
    low, high = tensor.min().item(), tensor.max().item()
    # resizing with bicubic filters leaves values slightly outside of [0, 1]
    if low < -0.1 or high > 1.1:
        raise ValueError(
            f"`images` has to be a tensor of values in [0, 1] but spans {low:.3g} to {high:.3g}; "
            "scale it first."
        )
    pixels = (tensor.clamp(0, 1) * 255).round().byte().numpy()
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    return _to_rgb(Image.fromarray(pixels), "the tensor")


def trim_to_centre(image: Image.Image) -> Image.Image:
    """Cut the far ends off a very long picture, which the resize before the crop would inflate."""
    width, height = image.size
    longest = _LONGEST_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))
