"""Images as people have them -> RGB pictures as CLIP needs them."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import ArgumentError, ArgumentTypeError, first_line

ImageInput: TypeAlias = Image.Image | str | os.PathLike | torch.Tensor | np.ndarray
"""One image: PIL image, path, or (H, W, C) / (C, H, W) array with C = 1, 3 or 4, of 8-bit integers
or of values in [0, 1]."""

# Pillow reads more, some of it by starting other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Pixels of the shorter side above which an image is scaled down; CLIPs read 512 or fewer.
_LARGEST = 2048
# Pixels that are converted at a time: copies of a whole large image would fill the memory.
_STRIP = 1 << 20
# Pixels of a very long image that lie outside the centre crop are cut off before resizing.
_LONGEST_ASPECT = 8
# Bicubic upscaling leaves values this far outside of [0, 1].
_LOWEST, _HIGHEST = -0.4, 1.4

_ORIENTATION = 0x0112  # of Exif
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(image: ImageInput) -> Image.Image:
    """One image -> upright RGB picture on white.

    Exif rotation is applied, transparency is laid on white, an animation gives its first frame,
    16-bit and floating-point greys are scaled to 8 bits. An image whose shorter side is longer than
    2048 pixels is scaled down to that.

    Raises:
        ArgumentError: the image cannot be read, is empty, or has values that are not finite in
            [0, 1]; a file is named. For another type it is an ArgumentTypeError.
    """
    if isinstance(image, (str, os.PathLike)):
        if str(image).startswith(("http://", "https://")):
            raise ArgumentError(
                "images", f"holds the address {str(image)!r}", "download it, give the file"
            )
        return _from_path(Path(image))
    if isinstance(image, Image.Image):
        with _naming("a PIL image"):
            return _to_rgb(_first_frame(image))
    if isinstance(image, (torch.Tensor, np.ndarray)):
        with _naming("an array"):
            return _from_array(image)
    raise ArgumentTypeError(
        "images",
        f"has to hold PIL images, paths or tensors but holds a {type(image).__name__}",
        "convert it to one of these",
    )


def load_images(
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
) -> tuple[list[Image.Image], bool]:
    """One image or several -> list of RGB pictures, and whether it was a single one.

    Several: a list or tuple, or a (N, H, W, C) / (N, C, H, W) batch.

    Raises:
        ArgumentError: as `load_image`; also for an empty list or batch.
    """
    if isinstance(images, (torch.Tensor, np.ndarray)) and images.ndim == 4:
        images = list(images)
    elif isinstance(images, (str, os.PathLike, Image.Image, torch.Tensor, np.ndarray)):
        return [load_image(images)], True
    elif not isinstance(images, Sequence):
        raise ArgumentTypeError(
            "images",
            "has to be a PIL image, a path, a tensor or a list of these but is a "
            f"{type(images).__name__}",
        )
    if not len(images):
        raise ArgumentError("images", "is empty", "give at least one image")
    loaded = []
    for k, image in enumerate(images, start=1):
        try:
            loaded.append(load_image(image))
        except ArgumentError as error:
            problem = f"{error.problem} (image {k} of {len(images)})"
            raise type(error)("images", problem, error.remedy) from error
    return loaded, False


def load_image_at(path: str | os.PathLike, offset: int, size: int) -> Image.Image:
    """The image in `size` bytes of a file from `offset` on, such as a member of a tar.

    Raises:
        ArgumentError: as `load_image`.
    """

    def read() -> BytesIO:
        with open(path, "rb") as file:
            file.seek(offset)
            return BytesIO(file.read(size))

    return _read(read, f"{str(path)!r} at byte {offset}", size)


def _from_path(path: Path) -> Image.Image:
    with _naming(repr(str(path))):
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise ArgumentError(
                "images", f"holds {str(path)!r}, which is a folder", "give the image files in it"
            )
        if not stat.S_ISREG(found.st_mode):
            raise ArgumentError(
                "images", f"holds {str(path)!r}, which is no regular file", "save it first"
            )
    return _read(lambda: path, repr(str(path)), found.st_size)


def _read(source: Callable[[], Path | BytesIO], what: str, size: int) -> Image.Image:
    """The picture in a file or in bytes, of which there are `size`."""
    if size == 0:
        raise ArgumentError(
            "images", f"holds {what}, which is an empty file", "save the image again"
        )
    Image.init()
    with _naming(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images and damage that does not matter
        with Image.open(source(), formats=[f for f in _FORMATS if f in Image.OPEN]) as image:
            _decode_smaller(image)
            with _naming(what, "is damaged", "save the image again"):
                image.load()
            return _to_rgb(image)


@contextmanager
def _naming(what: str, problem: str = "cannot be read", remedy: str = "check it") -> Iterator[None]:
    """Turn any error about an image into an ArgumentError that names the image.

    Decoders of damaged data raise errors of many types.
    """
    try:
        yield
        return
    except ArgumentError:
        raise
    except FileNotFoundError as error:
        problem, remedy, cause = "does not exist", "check the path", error
    except UnidentifiedImageError as error:
        problem, cause = "is not an image that can be read", error
        remedy = f"save it as PNG or JPEG; readable are {', '.join(_FORMATS)}"
    except Image.DecompressionBombError as error:
        problem, remedy, cause = f"is too large ({error})", "scale it down", error
    except Exception as error:
        problem, cause = f"{problem} ({first_line(error)})", error
    raise ArgumentError("images", f"holds {what}, which {problem}", remedy) from cause


def _decode_smaller(image: Image.Image) -> None:
    """Decode a large JPEG at reduced size, which is faster than to scale it down afterwards."""
    short = min(image.size)
    if image.format == "JPEG" and short >= 2 * _LARGEST:
        width, height = image.size
        image.draft(None, (width * _LARGEST // short, height * _LARGEST // short))


def _first_frame(image: Image.Image) -> Image.Image:
    """The caller's image, or a copy of the first frame of an animation."""
    if 0 in image.size:
        raise ArgumentError(
            "images", f"holds a PIL image of size {image.width}x{image.height}, which is empty"
        )
    with _naming("a PIL image", "is damaged", "save the image again"):
        if getattr(image, "n_frames", 1) == 1:
            image.load()
            return image
        position = image.tell()
        image.seek(0)
        first = image.copy()
        image.seek(position)
        return first


def _to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image -> upright RGB, on white, scaled down where it is large."""
    convert = _conversion(image)
    width, height = image.size
    factor = max(1, min(width, height) // _LARGEST)
    rows = max(1, _STRIP // (width * factor)) * factor
    if rows >= height and factor == 1:
        rgb = convert(image)
    else:
        rgb = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        for top in range(0, height, rows):
            strip = image.crop((0, top, width, min(top + rows, height)))
            rgb.paste(convert(strip).reduce(factor), (0, top // factor))
    short = min(rgb.size)
    if short > _LARGEST:
        size = (round(rgb.width * _LARGEST / short), round(rgb.height * _LARGEST / short))
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    if (method := _TRANSPOSED.get(_orientation(image))) is not None:
        rgb = rgb.transpose(method)
    rgb.info = {}  # has the orientation that is applied now, and may have a transparent colour
    return rgb


def _orientation(image: Image.Image) -> int:
    """The Exif orientation; 1, which is upright, where it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged Exif, which image viewers ignore, too
        return 1


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The function that makes RGB of the image, or of a strip of it."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        white = _white_level(image)
        return lambda strip: _grey_to_rgb(strip, white)
    return _lay_on_white if image.has_transparency_data else lambda strip: strip.convert("RGB")


def _lay_on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # premultiplied; each converts to its plain kind only
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey_to_rgb(image: Image.Image, white: float) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has NaN or infinite values")
    grey = (values / white * 255).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _white_level(image: Image.Image) -> float:
    """The value of white in a grey image.

    Where the image has no stated range, its range is [0, 1], 8 or 16 bits, the least of these that
    holds all values. An image whose mode has 16 bits is not brightened.
    """
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        return 65535.0
    extrema: Any = image.getextrema()
    highest = extrema[1]
    return 1.0 if highest <= 1 else 255.0 if highest <= 255 else 65535.0


def _from_array(array: torch.Tensor | np.ndarray) -> Image.Image:
    if isinstance(array, np.ndarray):
        # torch takes no negative strides, and warns about arrays that are read-only
        array = np.require(array, requirements=["C", "W"])
    tensor = torch.as_tensor(array).detach().cpu()
    shape = tuple(tensor.shape)
    if tensor.ndim != 3 or not ({shape[0], shape[2]} & {1, 3, 4}):
        raise ArgumentError(
            "images",
            "has to be a tensor (H, W, 3) or (3, H, W), or a batch of these with one more "
            f"dimension in front, but an image has shape {shape}",
        )
    if 0 in shape:
        raise ArgumentError("images", f"holds a tensor of shape {shape}, which is empty")
    if shape[2] not in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    pixels = (tensor if tensor.dtype == torch.uint8 else _to_bytes(tensor)).numpy()
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def _to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Values in [0, 1] -> 8-bit integers."""
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ArgumentError(
            "images", "holds a tensor with NaN or infinite values", "check its source"
        )
    low, high = tensor.min().item(), tensor.max().item()
    if low < _LOWEST or high > _HIGHEST:
        raise ArgumentError(
            "images",
            "has to be a tensor of 8-bit integers or of values in [0, 1] but spans "
            f"{low:.3g} to {high:.3g}",
            "scale it first",
        )
    return (tensor.clamp(0, 1) * 255).round().byte()


def trim_to_centre(image: Image.Image) -> Image.Image:
    """Cut off the far ends of a very long image, which the resize before the crop would enlarge."""
    width, height = image.size
    longest = _LONGEST_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))
