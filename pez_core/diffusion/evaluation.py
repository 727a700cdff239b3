"""Similarity of images made from learned prompts with their targets, by a held-out CLIP."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..clip import AnyClip, Clip, JointClip
from ..clip.images import ImageInput, load_images
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    PartialError,
    check_integer,
    check_string,
)
from ..scoring import check_finite
from ..targets import encode_targets
from .clip_model import PezClipModel
from .image_models import check_settings, with_both_sizes
from .inputs import one_per_prompt

T = TypeVar("T")
Targets = ImageInput | Sequence[ImageInput | Sequence[ImageInput]] | torch.Tensor


@dataclass(frozen=True)
class Evaluation:
    """Images made from prompts, and their similarities with the targets.

    Attributes:
        prompts: the prompts of the images.
        similarities: (prompts, n) cosine similarities of the images with their target, by the
            judge; the mean over the targets where a prompt has several.
        prompt_similarities: (prompts,) cosine similarities of the prompts with their target, by the
            judge.
        searched_similarities: as `similarities`, by the CLIP of the search; None: it was not given.
            The search overfits this CLIP: a gain that the judge does not share is none. The two
            have different scales; compare their changes.
        images: n images for each prompt.
        judge: name of the held-out CLIP.
    """

    prompts: list[str]
    similarities: torch.Tensor
    prompt_similarities: torch.Tensor
    searched_similarities: torch.Tensor | None
    images: list[list[Image.Image]] = field(repr=False)
    judge: str

    @property
    def per_prompt(self) -> torch.Tensor:
        """(prompts,) mean over the images of each prompt."""
        return self.similarities.mean(1)

    @property
    def mean(self) -> float:
        """Mean over all images; NaN where there is none."""
        return self.per_prompt.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of `mean` over the prompts, or over the images of a single prompt.

        NaN for a single value.
        """
        values = self.similarities[0] if len(self.prompts) == 1 else self.per_prompt
        return values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan

    def __str__(self) -> str:
        prompts, images = self.similarities.shape
        line = f"{self.mean:.4f} ± {self.standard_error:.4f} by {self.judge}"
        if self.searched_similarities is not None:
            line += f", {self.searched_similarities.mean():.4f} by the CLIP of the search"
        return f"{line} (prompts: {prompts}, images of each: {images})"


class EvaluationError(PartialError):
    """Making or judging the images of one prompt failed; its `__cause__` is the reason.

    Attributes:
        partial: the evaluation of the prompts before it.
    """


def evaluate(
    pipeline: DiffusionPipeline,
    prompts: str | Sequence[str],
    images: Targets,
    judge: PezClipModel | AnyClip,
    num_images_per_prompt: int = 4,
    num_inference_steps: int | None = 25,
    guidance_scale: float | None = 9.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    searched: PezClipModel | AnyClip | None = None,
    callback: Callable[[int, int, Evaluation], Any] | None = None,
    fit: str = "crop",
    **kwargs: Any,
) -> Evaluation:
    """Make images from prompts and compare them with targets by a held-out CLIP (section 4.1).

    The paper makes images with Stable Diffusion 2 and compares them under OpenCLIP ViT-G, for
    prompts learned on ViT-H.

    Args:
        pipeline: any text-to-image pipeline that takes `prompt`. Each prompt is a call of its own,
            so that memory does not grow with their number.
        prompts: one or several.
        images: the target images, each given as in `invert`. A single image is the target of every
            prompt. For one prompt a list or a batch holds all its targets, such as images of one
            style. For several prompts it has one entry per prompt: an image or a list of images.
        judge: a CLIP on which the prompts were not learned. With several in one the similarity is
            their weighted mean.
        num_images_per_prompt: images to make from each prompt, at least 1.
        num_inference_steps: denoising steps; None: the pipeline's own default. Not used where the
            pipeline lacks the argument.
        guidance_scale: as `num_inference_steps`. 9 is the paper's for Stable Diffusion 2; pipelines
            of other kinds need other values.
        generator: serves one prompt after the other; or a list with one generator per image, those
            of the first prompt first. The same seeds give the same images.
        searched: the CLIP that the prompts were learned on; its similarities are measured, too.
            None: they are not.
        callback: called as `callback(i, n, evaluation)` after i of n prompts, with the evaluation
            so far. A true return value ends the evaluation, which is then returned.
        fit: how targets and images become squares, as in `SearchOptions`.
        kwargs: further arguments of `pipeline`, such as `height` or `negative_prompt`.

    Returns:
        An `Evaluation`: (prompts, images) similarities, their mean and standard error, and the
        images.

    Raises:
        ArgumentError: a prompt or target is missing or cannot be read, an argument is out of range
            or unknown to `pipeline`, or the prompts were learned on the judge.
        FloatingPointError: similarities of prompts and targets are NaN or infinite, before any
            image is made.
        EvaluationError: `pipeline` or a CLIP failed, or similarities of images are NaN or infinite;
            its `partial` has the prompts before.
    """
    texts = _texts(prompts)
    check_integer("num_images_per_prompt", num_images_per_prompt, 1)
    generators = _generators(generator, len(texts), num_images_per_prompt)
    check_held_out(judge, searched)
    settings = {
        "num_images_per_prompt": num_images_per_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "output_type": "pil",
    }
    accepted = accepted_arguments(
        pipeline, [*kwargs, *(["generator"] if generator is not None else [])]
    )
    settings = {k: v for k, v in settings.items() if k in accepted and v is not None} | kwargs
    check_settings(pipeline, settings)
    settings = with_both_sizes(pipeline, settings)
    if "num_frames" in accepted:  # pipelines for videos
        settings["num_frames"] = 1
    alone = "num_images_per_prompt" not in settings
    if alone:
        settings = one_per_prompt(settings, num_images_per_prompt)
    scored = _Scored(texts, _targets(images, len(texts)), judge, searched, fit)
    make: Any = pipeline  # the base class has no `__call__`
    for k, text in enumerate(texts):
        # a pipeline without several images per prompt gets the prompt several times
        repeated = [text] * num_images_per_prompt if alone else text
        try:
            made = make(prompt=repeated, **generators[k], **settings)[0]
            scored.add([one[0] if isinstance(one, list) else one for one in made])
        except Exception as error:
            raise EvaluationError(
                f"Prompt {k + 1} of {len(texts)}, {text!r}, failed ({error}); `partial` has the "
                "evaluation of the prompts before it.",
                scored.evaluation(num_images_per_prompt),
            ) from error
        done = scored.evaluation(num_images_per_prompt)
        if callback is not None and callback(k + 1, len(texts), done):
            break
    return scored.evaluation(num_images_per_prompt)


class _Scored:
    """Images and their similarities, prompt by prompt."""

    def __init__(
        self,
        texts: list[str],
        targets: list[list[Image.Image]],
        judge: PezClipModel | AnyClip,
        searched: PezClipModel | AnyClip | None,
        fit: str,
    ) -> None:
        self._texts, self._images = texts, []
        self._judge = _TargetScores(judge, targets, fit)
        self._searched = None if searched is None else _TargetScores(searched, targets, fit)
        features = use(judge, lambda clip: encode_targets("prompts", clip, texts).cpu())
        self._prompt_similarities = check_finite(
            (features * self._judge.targets).sum(1), clip_of(judge)
        )

    def add(self, images: list[Image.Image]) -> None:
        """Score the images of the next prompt."""
        k = len(self._images)
        judged = self._judge.of(k, images)
        if self._searched is not None:
            self._searched.rows.append(self._searched.of(k, images))
        self._judge.rows.append(judged)
        self._images.append(images)

    def evaluation(self, each: int) -> Evaluation:
        """All so far, with `each` images per prompt."""
        count = len(self._images)
        return Evaluation(
            self._texts[:count],
            self._judge.similarities(each),
            self._prompt_similarities[:count],
            None if self._searched is None else self._searched.similarities(each),
            self._images[:],
            self._judge.name,
        )


class _TargetScores:
    """Similarities with the targets, by one CLIP.

    Attributes:
        name: of the CLIP.
        targets: (prompts, features) mean features of the targets of each prompt.
        rows: (n,) similarities, one row per prompt so far.
    """

    def __init__(
        self, model: PezClipModel | AnyClip, targets: Sequence[Sequence[Image.Image]], fit: str
    ) -> None:
        def encode(clip: AnyClip) -> torch.Tensor:
            features = clip.encode_images([one for several in targets for one in several], fit)
            return torch.stack([few.mean(0) for few in features.split(list(map(len, targets)))])

        self.name = clip_of(model).name
        self.targets = check_finite(use(model, encode).cpu(), clip_of(model))
        self.rows: list[torch.Tensor] = []
        self._model, self._fit = model, fit

    def of(self, k: int, images: Sequence[Image.Image]) -> torch.Tensor:
        """(len(images),) similarities of images made from prompt k."""
        features = use(self._model, lambda clip: clip.encode_images(images, self._fit)).cpu()
        return check_finite(features @ self.targets[k], clip_of(self._model))

    def similarities(self, each: int) -> torch.Tensor:
        """(prompts so far, each) similarities."""
        return torch.stack(self.rows) if self.rows else torch.empty(0, each)


def use(model: PezClipModel | AnyClip, function: Callable[[AnyClip], T]) -> T:
    """The result of a function of a CLIP, which is on its device meanwhile."""
    if not isinstance(model, PezClipModel):
        return function(model)
    answer = model(function)
    # an offloaded model leaves the device only when the next model of its own pipeline is called;
    # the image pipeline here is another one and needs the memory
    if hasattr(model, "_hf_hook"):
        model._hf_hook.init_hook(model)
    return answer


def clip_of(model: PezClipModel | AnyClip) -> AnyClip:
    """The CLIP of a component; a CLIP is its own."""
    return model.clip if isinstance(model, PezClipModel) else model


def check_held_out(judge: PezClipModel | AnyClip, searched: PezClipModel | AnyClip | None) -> None:
    """Raise where a judge is one of the CLIPs that prompts were learned on."""
    judges = _towers("judge", judge)
    if searched is None:
        return
    others = _towers("searched", searched)
    for one in judges:
        if any(_same(one, other) for other in others):
            raise ArgumentError(
                "judge",
                f"is {one.name}, on which the prompts were learned",
                "give a held-out CLIP, such as ViT-bigG-14 for prompts of ViT-H-14",
            )


def _towers(argument: str, model: PezClipModel | AnyClip) -> list[Clip]:
    clip = clip_of(model)
    if not isinstance(clip, (Clip, JointClip)):
        raise ArgumentTypeError(
            argument,
            f"has to be a CLIP from `load_clip` or a PezClipModel but is {type(model).__name__}",
        )
    return clip.clips if isinstance(clip, JointClip) else [clip]


def _same(a: Clip, b: Clip) -> bool:
    """Whether two CLIPs have the same weights, under any names and in any precision."""
    first, second = (clip.text.token_embedding.detach()[:1000].float().cpu() for clip in (a, b))
    return a.name == b.name or (
        first.shape == second.shape and torch.allclose(first, second, atol=1e-3)
    )


def _texts(prompts: str | Sequence[str]) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ArgumentError("prompts", "is empty", "give at least one prompt")
    return [check_string("prompts", text) for text in texts]


def accepted_arguments(pipeline: DiffusionPipeline, given: Sequence[str]) -> set[str]:
    """The names in the signature of the pipeline; raise unless all of `given` are among them.

    Some pipelines take any `**kwargs` and ignore most of them.
    """
    kind = type(pipeline).__name__
    parameters = inspect.signature(type(pipeline).__call__).parameters.values()
    accepted = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
    if "prompt" not in accepted:
        raise ArgumentTypeError(
            "pipeline", f"has to be a text-to-image pipeline, which takes `prompt`, but is {kind}"
        )
    ours = {"self", "prompt", "output_type", "return_dict"}
    for name in given:
        if name not in accepted - ours:
            raise ArgumentTypeError(name, f"is no argument of {kind}", "leave it out")
    return accepted


def _generators(
    generator: torch.Generator | list[torch.Generator] | None, prompts: int, each: int
) -> list[dict[str, Any]]:
    """The argument `generator` for the call of each prompt."""
    if generator is None:
        return [{}] * prompts
    if not isinstance(generator, list):
        return [{"generator": generator}] * prompts
    if len(generator) != prompts * each:
        raise ArgumentError(
            "generator",
            f"has to hold one for each of {prompts * each} images but holds {len(generator)}",
        )
    return [{"generator": generator[k * each : (k + 1) * each]} for k in range(prompts)]


def _targets(images: Any, prompts: int) -> list[list[Image.Image]]:
    """The targets of each prompt, from `Targets`."""
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) != 4:
        return [load_images(images)[0]] * prompts
    entries = list(images)
    if prompts == 1 and len(entries) > 1:
        entries = [entries]
    if len(entries) != prompts:
        raise ArgumentError(
            "images",
            f"has to hold one entry, an image or a list of images, for each of {prompts} prompts "
            f"but holds {len(entries)}",
        )
    return [load_images(entry)[0] for entry in entries]
