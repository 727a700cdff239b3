"""How similar to its target an image is that was made of a learned prompt."""

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
from ..search import check_integer
from ..targets import encode_targets
from .clip_model import PezClipModel

T = TypeVar("T")
Targets = ImageInput | Sequence[ImageInput | Sequence[ImageInput]] | torch.Tensor


@dataclass(frozen=True)
class Evaluation:
    """Images made of prompts, and their similarities with the targets.

    Attributes:
        prompts: those whose images are here.
        similarities: (prompts, n) cosines of the images made with their target, by the judge; the
            mean over the targets of a prompt where it has several.
        prompt_similarities: (prompts,) cosines of the prompts themselves with their target, by the
            judge.
        searched_similarities: as `similarities`, by the CLIP that the prompts were learned on;
            None: it was not given. A search overfits its CLIP, so that what it gains there and not
            with the judge is no gain. The two have different scales; compare how they change.
        images: n images for each prompt.
        judge: name of the CLIP that judged.
    """

    prompts: list[str]
    similarities: torch.Tensor
    prompt_similarities: torch.Tensor
    searched_similarities: torch.Tensor | None
    images: list[list[Image.Image]] = field(repr=False)
    judge: str

    @property
    def per_prompt(self) -> torch.Tensor:
        """(prompts,) means over the images of each prompt."""
        return self.similarities.mean(1)

    @property
    def mean(self) -> float:
        """Over all images; NaN where there is none."""
        return self.per_prompt.mean().item()

    @property
    def standard_error(self) -> float:
        """Of `mean`: over the means of the prompts; over the images where there is one prompt.

        NaN where there is only one of these.
        """
        values = self.similarities[0] if len(self.prompts) == 1 else self.per_prompt
        return values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan

    def __str__(self) -> str:
        prompts, images = self.similarities.shape
        line = f"{self.mean:.4f} ± {self.standard_error:.4f} by {self.judge}"
        if self.searched_similarities is not None:
            line += f", {self.searched_similarities.mean():.4f} by the CLIP searched on"
        return f"{line} (prompts: {prompts}, images of each: {images})"


class EvaluationError(RuntimeError):
    """Making or judging the images of one prompt failed; the error before it says why.

    Attributes:
        partial: what was finished before.
    """

    def __init__(self, message: str, partial: Evaluation) -> None:
        super().__init__(message)
        self.partial = partial


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
    **kwargs: Any,
) -> Evaluation:
    """Make images of prompts and judge them by a CLIP that took no part (paper, section 4.1).

    The paper makes images with Stable Diffusion 2 and compares them with the target under OpenCLIP
    ViT-G, where prompts were learned on ViT-H.

    Args:
        pipeline: any text-to-image pipeline that takes `prompt`. It is called once for each prompt,
            so that memory does not grow with their number.
        prompts: one or several.
        images: a single image is the target of every prompt. Of several, as a list or a batch, all
            are targets of a single prompt, such as images of one style; several prompts need one
            entry each, which is an image or a list of images. Images are given as in `invert`.
        judge: a CLIP on which the prompts were not learned. With several in one the similarity is
            their weighted mean.
        num_images_per_prompt: images to make of each prompt, at least 1.
        num_inference_steps: denoising steps. None: what the pipeline has by default. Not used where
            the pipeline does not know it.
        guidance_scale: as `num_inference_steps`. 9 is the paper's for Stable Diffusion 2; give
            pipelines of other kinds what they are made for.
        generator: drawn from for one prompt after the other, or a list with one for each image,
            those of the first prompt first. The same seeds give the same images.
        searched: the CLIP that the prompts were learned on.
        callback: called as `callback(i, n, evaluation)` when i of n prompts are finished, with what
            there is so far. A true return value ends it; what there is is returned.
        kwargs: further arguments of `pipeline`, such as `height` or `negative_prompt`.

    Raises:
        TypeError: an argument is of the wrong type, or `pipeline` does not take it.
        ValueError: no prompt, an empty prompt, a target that is missing or cannot be read, a number
            out of range, or a judge on which the prompts were learned.
        EvaluationError: `pipeline` or a CLIP failed; its `partial` has the prompts before.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("`prompts` is empty; give at least one prompt.")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"`prompts` has to hold strings but holds {text!r}.")
    check_integer("num_images_per_prompt", num_images_per_prompt, 1)
    generators = _generators(generator, len(texts), num_images_per_prompt)
    _check_neutral(judge, searched)
    settings = {
        "num_images_per_prompt": num_images_per_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "output_type": "pil",
    }
    accepted = _accepted(pipeline, [*kwargs, *(["generator"] if generator is not None else [])])
    settings = {k: v for k, v in settings.items() if k in accepted and v is not None} | kwargs
    targets = _targets(images, len(texts))

    neutral = _View(judge, targets)
    own = None if searched is None else _View(searched, targets)
    said = _use(judge, lambda clip: encode_targets("prompts", clip, texts).cpu())
    prompt_similarities = (said * neutral.targets).sum(1)
    made: list[list[Image.Image]] = []

    def finished() -> Evaluation:
        count = len(made)
        return Evaluation(
            texts[:count],
            neutral.similarities[:count].reshape(count, num_images_per_prompt),
            prompt_similarities[:count],
            None if own is None else own.similarities[:count].reshape(count, num_images_per_prompt),
            made[:],
            neutral.name,
        )

    for k, text in enumerate(texts):
        # a pipeline that cannot make several images of a prompt makes one of each of several
        repeated = text if "num_images_per_prompt" in settings else [text] * num_images_per_prompt
        try:
            pictures = pipeline(prompt=repeated, **generators[k], **settings)[0]
            neutral.look(k, pictures)
            if own is not None:
                own.look(k, pictures)
        except Exception as error:
            raise EvaluationError(
                f"Prompt {k + 1} of {len(texts)}, {text!r}, failed ({error}); what was finished "
                "before is in `partial`.",
                finished(),
            ) from error
        made.append(pictures)
        if callback is not None and callback(k + 1, len(texts), finished()):
            break
    return finished()


class _View:
    """What one CLIP sees.

    Attributes:
        name: of the CLIP.
        targets: (prompts, features) means of the features of each prompt's targets.
        similarities: (prompts looked at, n)
    """

    def __init__(
        self, model: PezClipModel | AnyClip, targets: Sequence[Sequence[Image.Image]]
    ) -> None:
        def encode(clip: AnyClip) -> torch.Tensor:
            features = clip.encode_images([image for several in targets for image in several])
            return torch.stack([few.mean(0) for few in features.split(list(map(len, targets)))])

        self.name = _clip(model).name
        self.targets = _use(model, encode).cpu()
        self.similarities = torch.empty(0)
        self._model = model

    def look(self, k: int, pictures: Sequence[Image.Image]) -> None:
        """Add the similarities of images made of prompt k."""
        features = _use(self._model, lambda clip: clip.encode_images(pictures)).cpu()
        seen = (features @ self.targets[k])[None]
        self.similarities = torch.cat([self.similarities, seen]) if k else seen


def _use(model: PezClipModel | AnyClip, use: Callable[[AnyClip], T]) -> T:
    if not isinstance(model, PezClipModel):
        return use(model)
    answer = model(use)
    # an offloaded model leaves the device when the next of its own pipeline is called, which is
    # not the case here; the image pipeline needs the room
    if hasattr(model, "_hf_hook"):
        model._hf_hook.init_hook(model)
    return answer


def _clip(model: PezClipModel | AnyClip) -> AnyClip:
    return model.clip if isinstance(model, PezClipModel) else model


def _check_neutral(judge: PezClipModel | AnyClip, searched: PezClipModel | AnyClip | None) -> None:
    towers = []
    for argument, model in (("judge", judge), ("searched", searched)):
        if argument == "searched" and model is None:
            return
        clip = _clip(model)
        if not isinstance(clip, (Clip, JointClip)):
            raise TypeError(
                f"`{argument}` has to be a CLIP from `load_clip` or a PezClipModel but is "
                f"{type(model).__name__}."
            )
        towers.append(clip.clips if isinstance(clip, JointClip) else [clip])
    for one in towers[0]:
        if any(_same(one, other) for other in towers[1]):
            raise ValueError(
                f"`judge` is {one.name}, on which the prompts were learned; give a CLIP that took "
                "no part, such as ViT-bigG-14 for prompts of ViT-H-14."
            )


def _same(a: Clip, b: Clip) -> bool:
    """Whether two CLIPs are one, whatever it is called and computes in."""
    tables = [clip.text.token_embedding.detach()[:1000].float().cpu() for clip in (a, b)]
    return a.name == b.name or (
        tables[0].shape == tables[1].shape and torch.allclose(*tables, atol=1e-3)
    )


def _accepted(pipeline: DiffusionPipeline, given: Sequence[str]) -> set[str]:
    """Names that the pipeline takes, all of `given` among them.

    Some pipelines swallow what they do not know, so only names in the signature count.
    """
    kind = type(pipeline).__name__
    parameters = inspect.signature(type(pipeline).__call__).parameters.values()
    accepted = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
    if "prompt" not in accepted:
        raise TypeError(
            f"`pipeline` has to be a text-to-image pipeline, which takes `prompt`, but is {kind}."
        )
    ours = {"self", "prompt", "output_type", "return_dict"}
    for name in given:
        if name not in accepted - ours:
            raise TypeError(
                f"`{name}` is an argument neither of `evaluate` nor, to be passed on, of {kind}; "
                "leave it out."
            )
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
        raise ValueError(
            f"`generator` has to hold one for each of {prompts * each} images but holds "
            f"{len(generator)}."
        )
    return [{"generator": generator[k * each : (k + 1) * each]} for k in range(prompts)]


def _targets(images: Targets, prompts: int) -> list[list[Image.Image]]:
    """The targets of each prompt."""
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) != 4:
        return [load_images(images)[0]] * prompts
    entries = list(images)
    if prompts == 1 and len(entries) > 1:
        entries = [entries]
    if len(entries) != prompts:
        raise ValueError(
            f"`images` has to hold one entry, an image or a list of images, for each of {prompts} "
            f"prompts but holds {len(entries)}."
        )
    return [load_images(entry)[0] for entry in entries]
