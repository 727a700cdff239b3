"""Images as people have them -> RGB pictures as CLIP needs them."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import ArgumentError, ArgumentTypeError, first_line

ImageInput: TypeAlias = (
    Image.Image | str | os.PathLike | bytes | BinaryIO | torch.Tensor | np.ndarray
)
"""One image: PIL image, path, content of a file or a file that is open for reading bytes, or an
array: (H, W, C) or (C, H, W) with C = 1, 3 or 4, or (H, W) in grey, of values in [0, 1] or of
integers of 8 or 16 bits, in any type."""


# Pillow reads more, some of it by starting other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Pixels of the shorter side above which an image is scaled down; CLIPs read 512 or fewer.
_LARGEST = 2048
# Pixels that are converted at a time: copies of a whole large image would fill the memory.
_STRIP = 1 << 20
# Pixels of a very long image that lie outside the centre crop are cut off before resizing.
_LONGEST_ASPECT = 8
# Bicubic upscaling by the kernel of PyTorch leaves values from -0.45 to 1.45.
_LOWEST, _HIGHEST = -0.5, 1.5
# Pixels of the largest image; decoding it takes 2 GB.
_MOST_PIXELS = 1 << 29
_PILLOWS_LIMIT = Image.MAX_IMAGE_PIXELS
_limit_lock = Lock()

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


_BYTES = (bytes, bytearray, memoryview)
_SINGLE = (str, os.PathLike, *_BYTES, Image.Image, torch.Tensor, np.ndarray)


def load_image(image: ImageInput) -> Image.Image:
    """One image -> upright RGB picture on white.

    A path may begin with `~`. A file object is read from its position on. Values of an array that
    leave [0, 1] by at most 0.5, as after bicubic upscaling, are clamped. Exif rotation is applied,
    transparency is laid on white, an animation gives its first frame, 16-bit and floating-point
    greys are scaled to 8 bits. An image whose shorter side is longer than 2048 pixels is scaled
    down to that.

    Raises:
        ArgumentError: the image cannot be read, is empty, has more than 2**29 pixels, or has values
            that are not finite or no image; a file is named. For another type it is an
            ArgumentTypeError.
    """
    if isinstance(image, (str, os.PathLike)):
        if str(image).startswith(("http://", "https://")):
            raise ArgumentError(
                "images", f"holds the address {str(image)!r}", "download it, give the file"
            )
        if not str(image):
            raise ArgumentError("images", "holds an empty name", "give an image file")
        return _from_path(Path(image))
    if isinstance(image, Image.Image):
        with _naming("a PIL image"):
            return _to_rgb(_first_frame(image))
    if isinstance(image, (torch.Tensor, np.ndarray)):
        with _naming("an array"):
            return _from_array(image)
    if isinstance(image, _BYTES) or hasattr(image, "read"):
        return _from_content(image)
    raise ArgumentTypeError(
        "images",
        "has to hold PIL images, paths, contents of files or tensors but holds a "
        f"{type(image).__name__}",
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
    elif isinstance(images, _SINGLE) or hasattr(images, "read"):
        return [load_image(images)], True  # type: ignore[arg-type]
    elif not isinstance(images, Sequence):
        raise ArgumentTypeError(
            "images",
            "has to be a PIL image, a path, the content of a file, a tensor or a list of these "
            "but is a "
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
        if not path.exists():
            path = Path(os.path.expanduser(path))
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


def _from_content(source: bytes | bytearray | memoryview | BinaryIO) -> Image.Image:
    """The picture in the content of a file."""
    what = "the content of a file"
    if isinstance(source, memoryview):
        source = source.tobytes()
    if not isinstance(source, (bytes, bytearray)):
        name = getattr(source, "name", None)
        what = repr(name) if isinstance(name, str) else "a file object"
        with _naming(what):
            source = source.read()
        if not isinstance(source, (bytes, bytearray)):
            raise ArgumentTypeError(
                "images", f"holds {what}, which is opened as text", "open it with mode 'rb'"
            )
    return _read(lambda: BytesIO(source), what, len(source))


def _read(source: Callable[[], Path | BytesIO], what: str, size: int) -> Image.Image:
    """The picture in a file or in bytes, of which there are `size`."""
    if size == 0:
        raise ArgumentError(
            "images", f"holds {what}, which is an empty file", "save the image again"
        )
    Image.init()
    with _naming(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images and damage that does not matter
        with _opened(source()) as image:
            _decode_smaller(image)
            with _naming(what, "is damaged", "save the image again"):
                image.load()
            return _to_rgb(image)


def _opened(source: Path | BytesIO) -> Image.Image:
    """Pillow's image of a file, of up to `_MOST_PIXELS`.

    Pillow's own limit, a third of that, is another one meanwhile, unless somebody has set it.
    """
    formats = [f for f in _FORMATS if f in Image.OPEN]
    with _limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        if limit == _PILLOWS_LIMIT:
            Image.MAX_IMAGE_PIXELS = _MOST_PIXELS // 2  # twice the limit raises an error
        try:
            return Image.open(source, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


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

    def strip(top: int, bottom: int) -> Image.Image:
        whole = (top, bottom) == (0, image.height)
        return convert(image if whole else image.crop((0, top, image.width, bottom)))

    rgb = _scaled_down(image.size, strip)
    if (method := _TRANSPOSED.get(_orientation(image))) is not None:
        rgb = rgb.transpose(method)
    rgb.info = {}  # has the orientation that is applied now, and may have a transparent colour
    return rgb


def _scaled_down(size: tuple[int, int], strip: Callable[[int, int], Image.Image]) -> Image.Image:
    """An image of this width and height, whose shorter side has at most `_LARGEST` pixels.

    Args:
        size: width and height.
        strip: gives the RGB picture of the rows from one number to another.
    """
    width, height = size
    factor = max(1, min(width, height) // _LARGEST)
    rows = max(1, _STRIP // (width * factor)) * factor
    if rows >= height and factor == 1:
        rgb = strip(0, height)
    else:
        rgb = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        for top in range(0, height, rows):
            part = strip(top, min(top + rows, height))
            rgb.paste(part.reduce(factor), (0, top // factor))
    short = min(rgb.size)
    if short > _LARGEST:
        smaller = (round(rgb.width * _LARGEST / short), round(rgb.height * _LARGEST / short))
        rgb = rgb.resize(smaller, Image.Resampling.BICUBIC)
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
    if tensor.ndim == 2:
        tensor = tensor[..., None]
    elif tensor.ndim != 3 or not ({shape[0], shape[2]} & {1, 3, 4}):
        raise ArgumentError(
            "images",
            "has to be a tensor (H, W, 3), (3, H, W) or (H, W), or a batch of these of four "
            f"dimensions, but an image has shape {shape}",
            "write images[..., None] for a batch (N, H, W) of grey images"
            if tensor.ndim == 3
            else "",
        )
    elif shape[2] not in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    if 0 in shape:
        raise ArgumentError("images", f"holds a tensor of shape {shape}, which is empty")
    height, width, _ = tensor.shape
    white = _white_of(tensor)
    return _scaled_down(
        (width, height), lambda top, bottom: _array_strip(tensor[top:bottom], white)
    )


def _white_of(tensor: torch.Tensor) -> float:
    """The value of white in an array. That of integers is the least that holds all of them."""
    if tensor.is_floating_point() or tensor.dtype in (torch.uint8, torch.bool):
        return 1.0
    if tensor.dtype == torch.uint16:
        return 65535.0
    highest = int(tensor.max())
    return 1.0 if highest <= 1 else 255.0 if highest <= 255 else 65535.0


def _array_strip(tensor: torch.Tensor, white: float) -> Image.Image:
    """(rows, W, C) values -> RGB picture of these rows."""
    pixels = (tensor if tensor.dtype == torch.uint8 else _to_bytes(tensor, white)).numpy()
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return _conversion(image)(image)


def _to_bytes(tensor: torch.Tensor, white: float) -> torch.Tensor:
    """Values from 0 to that of white -> 8-bit integers."""
    tensor = tensor.float() / white
    low, high = (float(value) for value in tensor.aminmax())  # both NaN where one value is
    if not math.isfinite(low) or not math.isfinite(high):
        raise ArgumentError(
            "images", "holds a tensor with NaN or infinite values", "check its source"
        )
    if low < _LOWEST or high > _HIGHEST:
        raise ArgumentError(
            "images",
            "has to be a tensor of integers of 8 or 16 bits or of values in [0, 1] but spans "
            f"{low * white:.3g} to {high * white:.3g}",
            "scale it first",
        )
    return (tensor.clamp(0, 1) * 255).round().byte()


def trim_to_centre(image: Image.Image, aspect: int = _LONGEST_ASPECT) -> Image.Image:
    """Cut off the far ends of a very long image, which the resize before the crop would enlarge.

    Args:
        image: of any size.
        aspect: how many times the shorter side the longer one may be.
    """
    width, height = image.size
    longest = aspect * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))
