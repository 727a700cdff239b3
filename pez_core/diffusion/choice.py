"""The choice among candidates by the images that they make."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..clip import AnyClip
from ..results import Candidate, Result
from .clip_model import PezClipModel
from .evaluation import use
from .image_models import default_settings, draw


def choose_by_image(
    pipeline: DiffusionPipeline,
    clip: PezClipModel | AnyClip,
    result: Result,
    targets: Sequence[Image.Image],
    seeds: Sequence[int],
    settings: Mapping[str, Any] = {},
    ended: Callable[[], bool] = lambda: False,
    fit: str = "crop",
    weights: Sequence[float] | None = None,
) -> Result:
    """The result with the candidate whose images are most similar to the targets.

    Every candidate gets the same noise, and equal prompts are drawn once. Similarity is that of
    images with images by `clip`, the mean over images and targets.

    Args:
        pipeline: a text-to-image pipeline.
        clip: on which the candidates were searched.
        result: of `invert` with `restarts`.
        targets: its images.
        seeds: of the images of each candidate, one image for each.
        settings: further arguments of the pipeline.
        ended: asked before the images of each candidate; once it is true, the candidates that are
            left are not considered.
        fit: how images become squares, as in `SearchOptions`.
        weights: of the targets; None: all the same.

    Returns:
        The result with its `candidates` in the order of their images, best first; those without
        images come last.
    """
    goals = use(clip, lambda one: one.encode_images(targets, fit)).cpu()
    shares = torch.ones(len(targets)) if weights is None else torch.tensor(list(weights)).float()
    goal = shares @ goals / shares.sum()
    given = default_settings(pipeline) | dict(settings)
    scored: list[tuple[float, Candidate]] = []
    by_prompt: dict[str, float] = {}
    for candidate in result.candidates:
        if ended():
            break
        if candidate.prompt not in by_prompt:
            images = draw(pipeline, candidate.prompt, seeds, given)
            features = use(clip, lambda one, made=images: one.encode_images(made, fit)).cpu()
            by_prompt[candidate.prompt] = float((features @ goal).mean())
        scored.append((by_prompt[candidate.prompt], candidate))
    scored.sort(key=lambda pair: pair[0], reverse=True)  # stable: those of equal score stay
    order = [one for _, one in scored] + result.candidates[len(scored) :]
    return _with_candidates(result, order)


def _with_candidates(result: Result, order: list[Candidate]) -> Result:
    """The result with its candidates in another order, the first as its own prompt."""
    if not order:
        return result
    own = {one.name: getattr(order[0], one.name) for one in fields(Candidate)}
    return replace(result, **own, candidates=order)
