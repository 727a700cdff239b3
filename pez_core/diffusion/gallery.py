"""Images of learned prompts beside their targets, for people to look at."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .. import targets as kinds
from ..clip import AnyClip
from ..clip.images import load_image
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    PartialError,
    check_choice,
    check_integer,
    check_string,
    check_weights,
)
from ..options import FITS
from ..prompt_text import read
from ..targets import as_list, check_callback, check_clip, encode_targets
from ..version import __version__
from .belonging import warn_where_foreign
from .clip_model import PezClipModel
from .evaluation import accepted_arguments, check_held_out, clip_of, use
from .image_models import (
    Stopped,
    check_settings,
    cut_remark,
    default_settings,
    draw,
    origin,
    with_both_sizes,
)
from .page import Entry, Gallery, Similarities, Target

logger = logging.getLogger(__name__)

_SEEDS = 2**63
# arguments of the pipeline that `seed` and `callback` stand for
_OWN = ("generator", "latents", "callback_on_step_end", "callback_on_step_end_tensor_inputs")


class GalleryError(PartialError):
    """Making the images of one prompt failed; its `__cause__` is the reason.

    Attributes:
        partial: the gallery with the images of the prompts before it.
    """


def make_gallery(
    pipeline: DiffusionPipeline,
    prompts: str | Sequence[str],
    targets: kinds.Target | Sequence[kinds.Target | Sequence[kinds.Target]],
    clip: PezClipModel | AnyClip,
    judge: PezClipModel | AnyClip | None = None,
    *,
    weights: Sequence[float] | None = None,
    titles: Sequence[str] = (),
    num_images_per_prompt: int = 4,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    callback: Callable[[float, int], Any] | None = None,
    fit: str = "crop",
    **kwargs: Any,
) -> Gallery:
    """Make images of prompts and measure how similar they are to the targets of the prompts.

    `save` of the result writes a page to look at. `evaluate` is for measurements: it has standard
    errors and insists on a judge.

    Args:
        pipeline: a text-to-image pipeline, such as `load_pipeline` loads. Each prompt is a call of
            its own.
        prompts: one or several. Their weights, `BREAK` and tags count as plain words or not at all,
            since the pipelines of diffusers lack this syntax.
        targets: one entry for each prompt: a text, an image, or a list of these. A string is a
            text; path objects, PIL images, arrays and tensors are images.
        clip: on which the prompts were learned.
        judge: a second CLIP, on which they were not.
        weights: of the targets of a prompt, the same for each prompt; None: all the same.
        titles: what each prompt is called on the page.
        num_images_per_prompt: images to make of each prompt, at least 1.
        num_inference_steps: denoising steps; None: 25 for pipelines with a UNet, as in the paper
            (12 for `emoji-diffusion`); others have their own default.
        guidance_scale: None: 9.0 for pipelines with a UNet, as in the paper (4.0 for
            `emoji-diffusion`); others have their own default.
        seed: of the noise of the first image of each prompt; the others have the numbers behind it.
        callback: called as `callback(done, n)` at the start and after each denoising step, with
            `done` of n prompts finished, a fraction within a prompt. A true return value ends the
            work; the prompts that are left have no images.
        fit: how images become squares where similarities are measured, as in `SearchOptions`.
        kwargs: further arguments of `pipeline`, such as `height` or `negative_prompt`. Its noise
            and its callback are those of `seed` and `callback`.

    Raises:
        ArgumentError: an argument is missing, out of range, or unknown to `pipeline`; a target
            cannot be read; or the prompts were learned on the judge.
        GalleryError: `pipeline` or a CLIP failed; its `partial` has what was made before.
    """
    texts = _texts(prompts, titles)
    check_callback(callback)
    check_integer("num_images_per_prompt", num_images_per_prompt, 1)
    check_integer("seed", seed, 0, _SEEDS - 1)
    check_choice("fit", fit, FITS)
    _check_accepted(pipeline, kwargs)
    chosen = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    settings = default_settings(pipeline) | {k: v for k, v in chosen.items() if v is not None}
    check_settings(pipeline, settings | kwargs)
    kwargs = with_both_sizes(pipeline, kwargs)
    clips = [clip] if judge is None else [clip, judge]
    for name, one in zip(("clip", "judge"), clips, strict=False):
        check_clip(name, clip_of(one))
    warn_where_foreign(clip_of(clip), pipeline)
    for text in texts:
        if remark := cut_remark(pipeline, text):
            logger.warning("%s", remark)
    if judge is not None:
        check_held_out(judge, clip)
    entries = _Entries(texts, _listed(targets, len(texts)), clips, weights, titles, fit)
    seeds = [(seed + k) % _SEEDS for k in range(num_images_per_prompt)]
    facts = _facts(pipeline, clips, settings)

    def ended(done: float) -> bool:
        return callback is not None and bool(callback(done, len(texts)))

    if ended(0):
        return entries.gallery(seeds, facts)
    for k, text in enumerate(texts):
        try:
            on_step = partial(lambda share, k: ended(k + share), k=k)
            entries.add(draw(pipeline, _read(text), seeds, settings | kwargs, on_step))
        except Stopped:
            break
        except Exception as error:
            raise GalleryError(
                f"Images of prompt {k + 1} of {len(texts)}, {text!r}, failed ({error}).",
                entries.gallery(seeds, facts),
            ) from error
        if ended(k + 1):
            break
    return entries.gallery(seeds, facts)


def _check_accepted(pipeline: DiffusionPipeline, kwargs: Mapping[str, Any]) -> None:
    """Raise where arguments are unknown to the pipeline, or ours."""
    for name in [name for name in _OWN if name in kwargs]:
        raise ArgumentTypeError(name, "is made from `seed` and `callback`", "leave it out")
    accepted_arguments(pipeline, list(kwargs))


def _texts(prompts: str | Sequence[str], titles: Sequence[str]) -> list[str]:
    """The prompts; raise where they or their titles are wrong."""
    if not isinstance(prompts, Iterable):
        raise ArgumentTypeError("prompts", f"has to hold strings but is {prompts!r}")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for text in texts:
        check_string("prompts", text)
    if not texts:
        raise ArgumentError("prompts", "is empty", "give at least one prompt")
    if isinstance(titles, str) or not isinstance(titles, Sequence) or len(titles) > len(texts):
        raise ArgumentError(
            "titles", f"has to hold at most one for each of {len(texts)} prompts but is {titles!r}"
        )
    for title in titles:
        check_string("titles", title)
    return texts


class _Entries:
    """The entries of a gallery while images are made.

    Args:
        texts: the prompts.
        targets: of each.
        clips: that measure similarities.
        weights, titles, fit: as in `make_gallery`.
    """

    def __init__(
        self,
        texts: list[str],
        targets: list[list[kinds.Target]],
        clips: Sequence[PezClipModel | AnyClip],
        weights: Sequence[float] | None,
        titles: Sequence[str],
        fit: str,
    ) -> None:
        self._texts, self._clips, self._fit = texts, clips, fit
        self._shown = [[_shown(one) for one in few] for few in targets]
        self._titles = [*titles, *[""] * (len(texts) - len(titles))]
        self._images: list[list[Image.Image]] = [[] for _ in texts]
        self._scores: list[list[Similarities]] = [[] for _ in texts]
        self._targets: list[list[torch.Tensor]] = []  # by CLIP, then by prompt
        self._done = 0
        for model in clips:
            self._targets.append([_mean(model, few, weights, fit) for few in self._shown])
            prompts = use(
                model, lambda one: encode_targets("prompts", one, list(map(_read, texts)))
            )
            for k, feature in enumerate(prompts.cpu()):
                similarity = float(feature @ self._targets[-1][k])
                self._scores[k].append(Similarities(clip_of(model).name, similarity, []))

    def add(self, images: list[Image.Image]) -> None:
        """The images of the next prompt."""
        k = self._done
        self._images[k] = images
        for c, model in enumerate(self._clips):
            features = use(model, lambda one: one.encode_images(images, self._fit)).cpu()
            found = (features @ self._targets[c][k]).tolist()
            before = self._scores[k][c]
            self._scores[k][c] = Similarities(before.clip, before.prompt, found)
        self._done += 1

    def gallery(self, seeds: list[int], facts: dict[str, str]) -> Gallery:
        parts = zip(self._texts, self._shown, self._images, self._scores, self._titles, strict=True)
        return Gallery([Entry(*part) for part in parts], seeds, facts)


def _read(text: str) -> str:
    """The words of a prompt; a prompt of nothing but syntax stays."""
    return read(text) or text


def _listed(targets: Any, prompts: int) -> list[list[kinds.Target]]:
    """The targets of each prompt."""
    entries = as_list(targets)
    if prompts == 1 and (len(entries) != 1 or not isinstance(entries[0], (list, tuple))):
        entries = [entries]
    if len(entries) != prompts:
        raise ArgumentError(
            "targets",
            f"has to hold one entry, a target or a list of targets, for each of {prompts} prompts "
            f"but holds {len(entries)}",
        )
    listed = [as_list(entry) for entry in entries]
    if not all(listed):
        raise ArgumentError("targets", "holds an empty list", "give a text or an image")
    return listed


def _shown(target: kinds.Target) -> Target:
    if isinstance(target, str):
        return Target(target)
    try:
        image = load_image(target)
    except ArgumentError as error:
        raise error.about("targets") from error
    return Target(image, str(target) if isinstance(target, os.PathLike) else "")


def _mean(
    model: PezClipModel | AnyClip,
    targets: Sequence[Target],
    weights: Sequence[float] | None,
    fit: str,
) -> torch.Tensor:
    """(features,) weighted mean of the features of the targets of a prompt."""
    given: list[Any] = [read(o.shown) if isinstance(o.shown, str) else o.shown for o in targets]
    encoded = use(model, lambda clip: encode_targets("targets", clip, given, fit))
    features = encoded.float().cpu()
    shares = [1.0] * len(given)
    if weights is not None:
        shares = check_weights("weights", weights, len(given))
    return torch.tensor(shares) @ features / sum(shares)


def _facts(
    pipeline: DiffusionPipeline, clips: Sequence[PezClipModel | AnyClip], settings: dict[str, Any]
) -> dict[str, str]:
    """What stands above the page."""
    names = [Path(clip_of(clip).name).name for clip in clips]
    source = origin(pipeline)
    facts = {"images by": type(pipeline).__name__ if source is None else source.name}
    facts |= {name.replace("_", " "): f"{value:g}" for name, value in settings.items()}
    facts |= dict(zip(("searched on", "judged by"), names, strict=False))
    return facts | {"made with": f"pez {__version__}"}
