"""The device and the precision that a CLIP computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import ArgumentError, ArgumentTypeError, first_line

if TYPE_CHECKING:
    from .model import Clip

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device by its name; None: the first available of CUDA, MPS and CPU.

    Raises:
        ArgumentError: the device does not exist or cannot be used here.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not isinstance(device, (str, torch.device)):
        raise ArgumentTypeError("device", f"has to be a string or a device but is {device!r}")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            "device",
            f"is {str(device)!r}, which cannot be used here ({first_line(error)})",
            "leave it out, or use 'cpu'",
        ) from error
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """The default dtype of a CLIP on a device."""
    if device.type != "cuda":
        return torch.float32
    # torch.cuda.is_bf16_supported() also counts cards that only emulate bfloat16
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


def pick_precision(device: torch.device, dtype: torch.dtype | None) -> str:
    """open_clip's name of a dtype; None: of the default on the device.

    Raises:
        ArgumentError: open_clip cannot compute in this dtype.
    """
    dtype = default_dtype(device) if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError("dtype", f"has to be a torch.dtype but is {dtype!r}")
    if dtype not in _PRECISIONS:
        raise ArgumentError(
            "dtype", f"is {dtype}", "use torch.float32, torch.float16, torch.bfloat16 or None"
        )
    return _PRECISIONS[dtype]


def keep_image_tower_in_main_memory(clip: Clip, device: torch.device) -> Clip:
    """Move a CLIP from the CPU to a device, but its image tower only while it encodes images."""
    model, tower = clip.model, clip.model.visual
    model.visual = torch.nn.Identity()
    model.to(device)
    model.visual = tower
    clip.image_tower = partial(_on_device, tower, device)
    return clip


@contextmanager
def _on_device(tower: torch.nn.Module, device: torch.device) -> Iterator[None]:
    tower.to(device)
    try:
        yield
    finally:
        tower.to("cpu")
