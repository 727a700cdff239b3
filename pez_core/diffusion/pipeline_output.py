"""Outputs of `PezPipeline`."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from ..results import Result


@dataclass
class PezPipelineOutput(BaseOutput):
    """
    Output class of `PezPipeline` with an image pipeline.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            `num_images_per_prompt` images for each prompt, those of the first prompt first.
        prompts (`list[str]`):
            The prompts that the images were made from.
        similarities (`list[float]`):
            Cosine similarity of each prompt with its target, by the CLIP of the search. For
            subjects in a style it is that of the style alone.
        nsfw_content_detected (`list[bool]`, *optional*):
            The flags of the safety checker of the image pipeline, one per image.

    The attribute `results` has the `pez_core.Result` of each search.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    prompts: list[str]
    similarities: list[float]
    nsfw_content_detected: list[bool] | None = None
    results: InitVar[Sequence[Result]] = ()

    def __post_init__(self, results: Sequence[Result]) -> None:
        super().__post_init__()
        object.__setattr__(self, "results", list(results))


@dataclass
class PezPriorOutput(BaseOutput):
    """
    Output class of `PezPipeline` without an image pipeline; `t2i(**output)` makes images from it.

    Args:
        prompt (`list[str]`):
            The learned prompts.

    The attributes `similarities` and `results` are those of `PezPipelineOutput`. They are no items
    of the output, since no image pipeline takes them.
    """

    prompt: list[str]
    similarities: InitVar[Sequence[float]] = ()
    results: InitVar[Sequence[Result]] = ()

    def __post_init__(self, similarities: Sequence[float], results: Sequence[Result]) -> None:
        super().__post_init__()
        object.__setattr__(self, "similarities", list(similarities))
        object.__setattr__(self, "results", list(results))
