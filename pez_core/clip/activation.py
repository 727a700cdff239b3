"""Finds out by measurement what the weights of a CLIP do not show: its activation.

With a wrong activation a CLIP still works, but worse: texts and images agree less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image

from .files import Reading

# Ten drawings of Noto Emoji (Apache License 2.0), side by side.
_PICTURES = Path(__file__).parent / "pictures.png"
_NAMES = (
    "face with tongue",
    "fish",
    "glass of milk",
    "glasses",
    "hourglass",
    "muted speaker",
    "parrot",
    "sake",
    "television",
    "wine glass",
)
_MOST_SCALE = 100.0  # of similarities, in the training of all CLIPs


def set_reading(model: Any, reading: Reading) -> None:
    """Give a plain CLIP of open_clip an activation, and the preparation of images, in place."""
    for module in model.modules():
        mlp = getattr(module, "mlp", None)
        if mlp is not None and hasattr(mlp, "gelu"):
            mlp.gelu = QuickGELU() if reading.quick_gelu else torch.nn.GELU()
    if reading.preprocess is not None:
        size = model.visual.preprocess_cfg["size"]
        config = {**PreprocessCfg().__dict__, **dict(reading.preprocess), "size": size}
        set_model_preprocess_cfg(model, config)


@torch.no_grad()
def most_agreeing(model: Any, tokenizer: Any, readings: Sequence[Reading]) -> Reading:
    """The reading with which texts and images agree most; the model has it afterwards.

    Ten drawings and their names are encoded with each reading. The measure is the mean logarithm of
    the probability that the model gives to the right pairs.

    Args:
        model: a plain CLIP of open_clip, with its weights.
        tokenizer: its tokenizer.
        readings: at least one.
    """
    model.eval()
    scores = []
    for reading in readings:
        set_reading(model, reading)
        scores.append(_agreement(model, tokenizer))
    best = readings[max(range(len(scores)), key=scores.__getitem__)]
    set_reading(model, best)
    return best


def _agreement(model: Any, tokenizer: Any) -> float:
    prepare: Any = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    weight = model.visual.conv1.weight
    pixels = torch.stack([prepare(picture) for picture in _pictures()])
    images = model.encode_image(pixels.to(weight.device, weight.dtype), normalize=True).float()
    ids = tokenizer([f"an emoji of a {name}" for name in _NAMES]).to(weight.device)
    texts = model.encode_text(ids, normalize=True).float()
    logits = model.logit_scale.float().exp().clamp(1, _MOST_SCALE) * images @ texts.T
    right = torch.arange(len(_NAMES), device=logits.device)
    return -float(F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right))


def _pictures() -> list[Image.Image]:
    with Image.open(_PICTURES) as row:
        row = row.convert("RGB")
    size = row.height
    return [row.crop((k * size, 0, (k + 1) * size, size)) for k in range(len(_NAMES))]
