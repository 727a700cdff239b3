"""`PezPipeline`: images, styles and long prompts into short prompts, and these into images."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput, replace_example_docstring
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn

from ..clip import AnyClip
from ..clip.images import ImageInput
from ..learn import Result
from ..presets import Plan, make_plan
from ..priors import check_readability
from ..prompt_text import read
from ..search import check_integer, check_positive
from ..targets import check_number
from ..tasks import concatenate, distill, extract_style, invert
from .clip_model import PezClipModel
from .denoising import DenoisingLoss
from .evaluation import Evaluation, evaluate
from .inputs import check_options, pictures, seeds

logger = logging.getLogger(__name__)

TASKS = {
    "invert": invert,
    "style": extract_style,
    "distill": distill,
    "concat": concatenate,
}
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
# what the loaders of diffusers take to find files, of which `load_config` knows these
_FILES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# arguments of the tasks that the pipeline has arguments of its own for
_INPUTS = {
    "clip": "clip",
    "images": "image",
    "prompt": "prompt",
    "prompts": "prompt",
    "prompt_len": "prompt_len",
    "steps": "pez_steps",
    "restarts": "restarts",
    "seed": "generator",
    "callback": "pez_callback_on_step_end",
    "extra": "denoising_weight",
}
_OF_DENOISING = {
    "pipeline": "pipeline",
    "images": "image",
    "clip": "clip",
    "weight": "denoising_weight",
    "shared": "pez_kwargs",
    "generator": "generator",
}
# what people write who have used `pez_core`
_MEANT = {"seed": "generator", "steps": "pez_steps", "images": "image", "prompts": "prompt"}
# Stable Diffusion reads these from `**kwargs`, though they are no longer in its signature
_OF_OLD = {"callback", "callback_steps"}
_TEXT = re.compile(r"(negative_)?prompt(_\d)?")

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from pez_core import PezPipeline

        >>> pipe = PezPipeline.from_pretrained(
        ...     "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ...     clip="ViT-L-14:openai",
        ...     dtype=torch.bfloat16,
        ... )
        >>> pipe.to("cuda")

        >>> output = pipe(image="photo.jpg", generator=torch.Generator().manual_seed(0))
        >>> print(output.prompts[0], output.similarities[0])
        >>> output.images[0].save("like-photo.png")
        ```
"""


@dataclass
class PezPipelineOutput(BaseOutput):
    """
    Output class of `PezPipeline` where it makes images.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            `num_images_per_prompt` images of each prompt, those of the first prompt first.
        prompts (`list[str]`):
            The prompts that the images were made of.
        similarities (`list[float]`):
            Cosine similarity of each prompt with its target, as the CLIP of the search sees it.
        nsfw_content_detected (`list[bool]`, *optional*):
            What the safety checker of the image pipeline says of each image, where it has one.

    Its attribute `results` holds the `pez_core.Result` of each search.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    prompts: list[str]
    similarities: list[float]
    nsfw_content_detected: list[bool] | None = None
    results: InitVar[list[Result] | None] = None

    def __post_init__(self, results: list[Result] | None) -> None:
        super().__post_init__()
        self.results = results


@dataclass
class PezPriorOutput(BaseOutput):
    """
    Output class of `PezPipeline` without an image pipeline; `t2i(**output)` makes images of it.

    Args:
        prompt (`list[str]`):
            The prompts learned.

    Its attributes `similarities` and `results` are no items, so that any pipeline takes the rest.
    """

    prompt: list[str]
    results: InitVar[list[Result] | None] = None

    def __post_init__(self, results: list[Result] | None) -> None:
        super().__post_init__()
        self.results = results

    @property
    def similarities(self) -> list[float]:
        return [result.similarity for result in self.results]


class PezPipeline(DiffusionPipeline):
    r"""
    Pipeline that learns short prompts with PEZ ("Hard Prompts Made Easy") and makes images of them.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the
    generic methods implemented for all pipelines (downloading, saving, running on a particular
    device, etc.). Moving, offloading to the CPU, progress bars and `scheduler` reach the image
    pipeline, too; for all else there is `pipe.pipeline`.

    Args:
        clip ([`PezClipModel`], `pez_core.Clip`, `pez_core.JointClip`, `str` or `list[str]`):
            The CLIP that prompts are searched on: the one whose text encoder the image pipeline
            has, with the image tower that image pipelines lack. A name is given to
            `pez_core.load_clip`, which downloads nothing; `PezClipModel.load` does when asked.
        pipeline ([`DiffusionPipeline`], *optional*):
            Any text-to-image pipeline. Without it this is a prior, whose output feeds any pipeline,
            those that need an image of their own, too: `t2i(**pez(image=image))`.
    """

    model_cpu_offload_seq = "clip"
    # sequential offloading hooks submodules, whose weights the search reads without calling them
    _exclude_from_cpu_offload = ["clip"]  # noqa: RUF012
    _optional_components = ["pipeline"]  # noqa: RUF012

    def __init__(self, clip: PezClipModel, pipeline: DiffusionPipeline = None) -> None:
        super().__init__()
        if pipeline is not None:
            _check_pipeline(pipeline)
        self.register_modules(clip=_component(clip), pipeline=pipeline)
        self._prompts: list[str] = []
        self._results: list[Result] = []
        self._interrupt = False

    # Loading, placing and showing: what the base class does, done to the image pipeline, too.

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        clip: PezClipModel | AnyClip | str | Sequence[str] | None = None,
        clip_pretrained: str | None = None,
        download: bool | None = None,
        **kwargs: Any,
    ) -> PezPipeline:
        r"""
        Load what `save_pretrained` wrote, or a text-to-image pipeline to put a CLIP in front of.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder or a repository of the Hub.
            clip ([`PezClipModel`], `pez_core.AnyClip`, `str` or `list[str]`, *optional*):
                Needed for a text-to-image pipeline. A name is given to `pez_core.load_clip`: for
                Stable Diffusion 1.x `"ViT-L-14:openai"`, for 2.x `"ViT-H-14:laion2b_s32b_b79k"`,
                for XL both `"ViT-L-14:openai"` and `"ViT-bigG-14:laion2b_s39b_b160k"` in a list. It
                gets the device and dtype of the pipeline.
            clip_pretrained (`str`, *optional*):
                Tag or file of the weights, where `clip` does not say it.
            download (`bool`, *optional*):
                Whether to fetch a CLIP that is not on this disk; by default as everything else,
                unless `local_files_only` is set.
            kwargs:
                Passed to [`DiffusionPipeline.from_pretrained`].
        """
        files = {name: kwargs[name] for name in _FILES if name in kwargs}
        index = cls.load_config(pretrained_model_name_or_path, **files)
        if download is None:
            download = not kwargs.get("local_files_only", False)
        named = isinstance(clip, (str, list, tuple))
        if clip is not None:  # before the image pipeline, which can take long
            clip = _component(clip, clip_pretrained, download=download)
        if index["_class_name"] not in {kind.__name__ for kind in cls.__mro__}:
            if clip is None:
                raise ValueError(
                    f"`clip` has to be given, since {pretrained_model_name_or_path} is a "
                    f"{index['_class_name']}: give the CLIP whose text encoder it has, such as "
                    "'ViT-L-14:openai' for Stable Diffusion 1.x."
                )
            pipeline = DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)
            if named:
                _place(clip, pipeline)
            return cls(clip, pipeline)
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            # the base class refuses repositories that need a library beside diffusers
            files.pop("proxies", None)
            folder = snapshot_download(folder, **files)
        pipeline = kwargs.pop("pipeline", None)
        if pipeline is None and index["pipeline"][0] is not None:
            pipeline = DiffusionPipeline.from_pretrained(Path(folder, "pipeline"), **kwargs)
        if clip is not None:
            kwargs["clip"] = clip
        elif kwargs.get("variant") is not None:
            # the base class looks for variants among files and trips over the pipeline's folders
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            if isinstance(dtype, dict):
                dtype = dtype.get("clip", dtype.get("default"))
            kwargs["clip"] = PezClipModel.from_pretrained(
                folder, subfolder="clip", variant=kwargs["variant"], dtype=dtype
            )
        kwargs.pop("variant", None)
        pez = super().from_pretrained(folder, pipeline=None, **kwargs)
        if named and pipeline is not None:
            _place(clip, pipeline)
        pez.register_modules(pipeline=pipeline)
        return pez

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        clip: PezClipModel | AnyClip | str | Sequence[str] | None = None,
        clip_pretrained: str | None = None,
        download: bool = False,
    ) -> PezPipeline:
        r"""
        Put a CLIP in front of a pipeline that is loaded. Nothing of the pipeline changes.

        Args:
            pipeline ([`DiffusionPipeline`]):
                A text-to-image pipeline, or a `PezPipeline` whose CLIP is used unless there is
                another.
            clip, clip_pretrained:
                As in `from_pretrained`. A CLIP given by name gets the device and dtype of the
                pipeline, and is offloaded where the pipeline's models are; one that is loaded stays
                as it is.
            download (`bool`, *optional*, defaults to `False`):
                Whether to fetch a CLIP that is not on this disk.
        """
        if isinstance(pipeline, PezPipeline):
            clip, pipeline = clip or pipeline.clip, pipeline.pipeline
        if clip is None:
            raise ValueError("`clip` has to be given, such as 'ViT-L-14:openai'.")
        if pipeline is not None:
            _check_pipeline(pipeline)
        named = isinstance(clip, (str, list, tuple))
        clip = _component(clip, clip_pretrained, download)
        pez = cls(clip)
        if named and pipeline is not None:
            _place(clip, pipeline)
            if getattr(pipeline, "_all_hooks", None):
                pez.enable_model_cpu_offload(device=pipeline._offload_device)
        pez.register_modules(pipeline=pipeline)
        return pez

    def to(self, *args: Any, **kwargs: Any) -> PezPipeline:
        super().to(*args, **kwargs)
        if self.pipeline is not None:
            self.pipeline.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        super().enable_model_cpu_offload(*args, **kwargs)
        if self.pipeline is not None:
            self.pipeline.enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        super().enable_sequential_cpu_offload(*args, **kwargs)
        if self.pipeline is not None:
            self.pipeline.enable_sequential_cpu_offload(*args, **kwargs)

    def remove_all_hooks(self) -> None:
        super().remove_all_hooks()
        if self.pipeline is not None:
            self.pipeline.remove_all_hooks()

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        super().set_progress_bar_config(**kwargs)
        if self.pipeline is not None:
            self.pipeline.set_progress_bar_config(**kwargs)

    # What a call is at, or has come to.

    @property
    def prompts(self) -> list[str]:
        """The best prompts so far; those of the last call after it, however it ended."""
        return self._prompts

    @property
    def results(self) -> list[Result]:
        """The `pez_core.Result` of each search of the last call that came to its end."""
        return self._results

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the search; images are made of the best so far."""
        return self._interrupt

    @property
    def scheduler(self) -> SchedulerMixin:
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin) -> None:
        self.pipeline.scheduler = scheduler

    @property
    def guidance_scale(self) -> float:
        return self.pipeline.guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self.pipeline.num_timesteps

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        return self.pipeline._callback_tensor_inputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if hasattr(self.__dict__.get("pipeline"), name):
                raise AttributeError(
                    f"`{name}` belongs to the image pipeline; write `.pipeline.{name}`."
                ) from error
            raise

    # The steps of a call.

    def check_inputs(
        self,
        images: Sequence[Image.Image],
        prompt: str | list[str] | None,
        task: str,
        pez_steps: int | None,
        denoising_weight: float,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        pez_kwargs: dict[str, Any],
        denoising_kwargs: dict[str, Any],
        passed: dict[str, Any],
    ) -> None:
        """Raise where the arguments of a call do not go together."""
        if task not in TASKS:
            raise ValueError(f"`task` has to be one of {', '.join(TASKS)} but is {task!r}.")
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise ValueError(f"`prompt` has to be of type `str` or `list` but is {type(prompt)}.")
        if task in ("invert", "style") and not images:
            raise ValueError(f"`image` has to be given for the task {task!r}.")
        given = _INPUTS if prompt is None else _INPUTS | {"template": "prompt"}
        check_options("pez_kwargs", pez_kwargs, TASKS[task], given)
        if task == "invert" and prompt is not None:
            if isinstance(prompt, list) and (len(prompt) != len(images) or "shared" in pez_kwargs):
                raise ValueError(
                    "`prompt` has to be of type `str` for the task 'invert', or a list with one "
                    f"for each of {len(images)} images that get a prompt each, but has length "
                    f"{len(prompt)}."
                )
            if "{}" in "".join(prompt):
                raise ValueError(
                    "`prompt` stands before the learned words; to say where they go, use "
                    "`pez_kwargs={'template': ...}` in its place."
                )
        if task == "distill" and not prompt:
            raise ValueError("`prompt` has to be given for the task 'distill'.")
        if task == "distill" and images:
            raise ValueError("`image` cannot be given for the task 'distill'; leave it out.")
        if check_number("denoising_weight", denoising_weight, low=0) > 1:
            raise ValueError(f"`denoising_weight` has to be from 0 to 1 but is {denoising_weight}.")
        if denoising_weight and (self.pipeline is None or task != "invert"):
            raise ValueError(
                "`denoising_weight` needs an image pipeline and the task 'invert'; leave it out."
            )
        swaps = [name for name in ("preset", "refine_steps", "readability") if pez_kwargs.get(name)]
        if denoising_weight and swaps:
            raise ValueError(
                f"`denoising_weight` cannot be refined, but `pez_kwargs` holds {swaps[0]!r}; leave "
                "it out and give `pez_steps`."
            )
        planned(pez_steps, pez_kwargs, bool(denoising_weight))
        if pez_kwargs.get("time_limit") is not None:
            check_positive("time_limit", pez_kwargs["time_limit"])
        if denoising_kwargs and not denoising_weight:
            raise ValueError("`denoising_kwargs` needs a `denoising_weight` above 0.")
        check_options("denoising_kwargs", denoising_kwargs, DenoisingLoss, _OF_DENOISING)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"`output_type` has to be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}."
            )
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = _prompts_of(task, images, prompt, pez_kwargs.get("shared", False))
        if isinstance(generator, list):
            expected = batch_size * num_images_per_prompt
            if len(generator) != expected:
                raise ValueError(
                    f"You have passed a list of generators of length {len(generator)}, but "
                    f"requested an effective batch size of {expected}. Make sure the batch size "
                    "matches the length of the generators."
                )
        # without an image pipeline its arguments are not used, but a misspelt one is still an error
        target = self if self.pipeline is None else self.pipeline
        accepted = inspect.signature(type(target).__call__).parameters
        for name in sorted(set(passed) - set(accepted) - _OF_OLD):
            names = [*inspect.signature(type(self).__call__).parameters, *accepted]
            close = _MEANT.get(name) or next(iter(get_close_matches(name, names, 1)), None)
            raise TypeError(
                f"`{name}` is not an argument of {type(target).__name__}"
                + (f"; did you mean `{close}`?" if close else "; leave it out.")
            )
        if self.pipeline is not None:
            self._check_passed(["a"] * batch_size, accepted, passed)

    def _check_passed(
        self, prompts: list[str], accepted: Mapping[str, inspect.Parameter], passed: dict[str, Any]
    ) -> None:
        """Let the image pipeline check its arguments now and not after minutes of learning."""
        check = getattr(self.pipeline, "check_inputs", None)
        if check is None:
            return
        # sizes that all pipelines take, since some find theirs only after the check
        known = {name: parameter.default for name, parameter in accepted.items()}
        known |= {"height": 1024, "width": 1024, "callback_steps": 1}
        known |= _as_many(passed, len(prompts)) | {"prompt": prompts}
        needed = inspect.signature(check).parameters
        if set(needed) <= set(known):
            check(**{name: known[name] for name in needed})

    def learn_prompt(
        self,
        images: Sequence[Image.Image],
        prompt: str | list[str] | None,
        task: str,
        seeds: Sequence[int],
        callback: Callable[[PezPipeline, int, dict], Any] | None,
        **settings: Any,
    ) -> list[Result]:
        """One result for each prompt that is learned; `settings` go to the task of `pez_core`.

        Where it is called several times a time limit is shared out.
        """

        def run(search: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            with self.progress_bar(total=plan.total) as progress_bar:

                def report(state: dict) -> bool:
                    self._prompts = [*done, *state["prompts"]]
                    progress_bar.total = state["steps"]
                    progress_bar.update(state["step"] - progress_bar.n)
                    progress_bar.set_postfix({score: f"{state['similarity']:.4f}"})
                    if callback is not None and callback(self, state["step"], state) is True:
                        self._interrupt = True
                    return self._interrupt

                found = self.clip(
                    lambda clip: search(clip, *inputs, callback=report, **settings, **options)
                )
            found = found if isinstance(found, list) else [found]
            for result in filter(lambda one: one.note, found):
                logger.warning("%s", result.note)
            self._results += found
            done.extend(result.prompt for result in found)

        done: list[str] = []
        score = "score" if "extra" in settings else "similarity"
        plan = planned(settings["steps"], settings, "extra" in settings)
        texts = [prompt] if isinstance(prompt, str) else prompt or []
        if settings.get("time_limit") and task in ("invert", "distill"):
            settings["time_limit"] /= max(1, len(texts))
        if task == "style":
            run(extract_style, images, seed=seeds[0])
        elif task == "concat":
            run(concatenate, [*map(read, texts), *images], seed=seeds[0])
        elif task == "distill":
            for text, seed in zip(texts, seeds, strict=True):
                if not self._interrupt:
                    # image pipelines of diffusers take weights and tags for words
                    run(distill, read(text), seed=seed)
        elif isinstance(prompt, list):
            for image, text, seed in zip(images, texts, seeds, strict=True):
                if not self._interrupt:
                    run(invert, [image], seed=seed, template=f"{text} {{}}".strip())
        else:
            template = {} if prompt is None else {"template": f"{prompt} {{}}".strip()}
            seed = list(seeds) if len(seeds) > 1 else seeds[0]
            run(invert, images, seed=seed, **template)
        return self._results

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | torch.Tensor | None = None,
        prompt: str | list[str] | None = None,
        task: str = "invert",
        prompt_len: int | None = None,
        pez_steps: int | None = None,
        restarts: int = 4,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        denoising_weight: float = 0.0,
        pez_callback_on_step_end: Callable[[PezPipeline, int, dict], Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        pez_kwargs: dict[str, Any] | None = None,
        denoising_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> PezPipelineOutput | PezPriorOutput | tuple:
        r"""
        Function invoked when calling the pipeline for learning prompts and making images of them.

        Args:
            image (`ImageInput` or `list[ImageInput]`, *optional*):
                What prompts are learned for: PIL images, paths, or tensors and arrays of values in
                [0, 1].
            prompt (`str` or `list[str]`, *optional*):
                For `"invert"` a caption that the learned words are added to, or one for each image;
                for `"style"` the subjects that get the style; for `"distill"` what to shorten; for
                `"concat"` what to join, beside the images. Of weights, `BREAK` and tags, which the
                pipelines of diffusers take for words, the words count alone.
            task (`str`, *optional*, defaults to `"invert"`):
                `"invert"`, a prompt for each image; `"style"`, one for the style that all images
                share; `"distill"`, a shorter one for each prompt; `"concat"`, one of all prompts
                and images.
            prompt_len (`int`, *optional*):
                Tokens to learn; by default 16, for `"style"` 8, and for `"distill"` 0.3 of those
                given.
            pez_steps (`int`, *optional*):
                Steps of PEZ. By themselves they are the paper's search, whose number is 3000. By
                default those of the preset `"balanced"`, which swaps single tokens after them; with
                a `denoising_weight`, which allows no swaps, 3000.
            restarts (`int`, *optional*, defaults to 4):
                Searches from different starts, of which the best counts.
            height (`int`, *optional*):
                Of the images made, in pixels; by default what the image pipeline was trained for.
            width (`int`, *optional*):
                As `height`.
            num_inference_steps (`int`, *optional*):
                Denoising steps; by default 25, as in the paper, for pipelines with a UNet (Stable
                Diffusion 1.x, 2.x and XL), and what the image pipeline itself has for others.
            guidance_scale (`float`, *optional*):
                By default 9.0, as in the paper, for pipelines with a UNet; see
                `num_inference_steps`.
            num_images_per_prompt (`int`, *optional*, defaults to 4):
                Images to make of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the call reproducible. The search starts from its `initial_seed`, so that the
                images are those that the image pipeline makes of the same prompt with the same
                generator; a generator that is used again gives the same prompt and new images. Of a
                list, with one for each image made, the first of each prompt is the search's. By
                default both are drawn anew.
            latents (`torch.Tensor`, *optional*):
                Passed to the image pipeline.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"pt"`, `"np"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output class instead of a plain tuple.
            denoising_weight (`float`, *optional*, defaults to 0.0):
                Share of the image pipeline's own denoising loss in what is minimised, from 0 to 1;
                the CLIP has the rest. Needs a Stable Diffusion 1.x, 2.x or XL pipeline and the task
                `"invert"`. Every step takes `samples` (4, see `denoising_kwargs`) times `restarts`
                UNet forwards and backwards for each image: start with `restarts=1, pez_steps=200`.
                The result's `extra_loss` is what it came to.
            pez_callback_on_step_end (`Callable`, *optional*):
                Called as `pez_callback_on_step_end(pipe, step, callback_kwargs)` while prompts are
                learned, every step on the CPU and every 25 elsewhere; `callback_kwargs` are those
                of `pez_core.invert`'s callback. Return `True`, or set `pipe._interrupt = True`, to
                end the search and make images of the best so far.
            callback_on_step_end (`Callable`, *optional*):
                Passed to the image pipeline, which it gets as its first argument.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                Passed to the image pipeline.
            pez_kwargs (`dict`, *optional*):
                Further arguments of the task: `invert`, `extract_style`, `distill` or `concatenate`
                of `pez_core`. `{"preset": "best"}` or `"fast"` searches longer or shorter,
                `{"time_limit": 60}` as many seconds for all prompts together, and
                `{"readability": 0.5}` finds prompts that read better.
            denoising_kwargs (`dict`, *optional*):
                Further arguments of `DenoisingLoss`.
            kwargs:
                All other arguments are passed to the image pipeline.

        What belongs to the image pipeline is not used where there is none.

        Examples:

        Returns:
            [`PezPipelineOutput`] or `tuple`:
                Images, prompts and similarities; without an image pipeline a [`PezPriorOutput`] or
                a tuple of the prompts. Whatever happens while images are made, the prompts stay in
                `prompts` and `results`.
        """
        self._interrupt, self._prompts, self._results = False, [], []
        images = [] if image is None else pictures("image", image)
        pez_kwargs, denoising_kwargs = pez_kwargs or {}, denoising_kwargs or {}
        chosen = {
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "latents": latents,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None} | kwargs
        self.check_inputs(
            images,
            prompt,
            task,
            pez_steps,
            denoising_weight,
            num_images_per_prompt,
            generator,
            output_type,
            pez_kwargs,
            denoising_kwargs,
            chosen,
        )
        shared = pez_kwargs.get("shared", False)
        starts = seeds(generator, _prompts_of(task, images, prompt, shared))
        settings = {"steps": pez_steps, "restarts": restarts} | pez_kwargs
        if settings.get("readability"):  # loaded once for all prompts
            settings["language_model"] = check_readability(
                settings["readability"], settings.get("language_model"), self._execution_device
            )
        if prompt_len is not None:
            settings["prompt_len"] = prompt_len
        if denoising_weight:
            settings["extra"] = DenoisingLoss(
                self.pipeline,
                images,
                self.clip.clip,
                weight=denoising_weight,
                shared=shared,
                **denoising_kwargs,
            )
        self.learn_prompt(images, prompt, task, starts, pez_callback_on_step_end, **settings)
        for hook in getattr(self, "_all_hooks", []):
            hook.offload()
        prompts = [result.prompt for result in self._results]
        similarities = [result.similarity for result in self._results]
        if task == "style" and prompt is not None:
            (style,) = self._results
            prompts = list(map(style.apply, [prompt] if isinstance(prompt, str) else prompt))
            similarities *= len(prompts)
        self._prompts = prompts
        if self.pipeline is None:
            return PezPriorOutput(prompts, self._results) if return_dict else (prompts,)

        if getattr(self.pipeline, "unet", None) is not None:
            chosen = {"num_inference_steps": 25, "guidance_scale": 9.0} | chosen
        if isinstance(generator, list):  # an interrupted search has fewer prompts than it was to
            generator = generator[: len(prompts) * num_images_per_prompt]
        accepted = inspect.signature(type(self.pipeline).__call__).parameters
        several = {"num_images_per_prompt": num_images_per_prompt}
        if not set(several) <= set(accepted):
            prompts = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
        own = several | {"generator": generator, "output_type": output_type}
        chosen |= {name: value for name, value in own.items() if name in accepted}
        try:
            made = self.pipeline(prompt=prompts, **_as_many(chosen, len(prompts)))
        except Exception:
            logger.error("No images, but the prompts learned are in `prompts`: %s", self._prompts)
            raise
        flagged = getattr(made, "nsfw_content_detected", None)
        output = PezPipelineOutput(
            made[0], self._prompts, similarities, flagged, results=self._results
        )
        return output if return_dict else output.to_tuple()

    def evaluate(
        self,
        image: ImageInput | Sequence[ImageInput] | torch.Tensor,
        judge: PezClipModel | AnyClip,
        prompts: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Evaluation:
        r"""
        How similar images made of the prompts are to their targets, to a CLIP that took no part.

        Args:
            image (`ImageInput` or `list`):
                The targets, as in `pez_core.diffusion.evaluate`: one for each prompt, or a list for
                each. For a style given to several subjects `[images] * len(prompts)`.
            judge ([`PezClipModel`], `pez_core.Clip` or `pez_core.JointClip`):
                A CLIP other than the one searched on, such as ViT-bigG-14 for prompts of ViT-H-14.
            prompts (`str` or `list[str]`, *optional*):
                By default those of the last call.
            kwargs:
                As in `pez_core.diffusion.evaluate`.
        """
        if self.pipeline is None:
            raise ValueError("`evaluate` needs an image pipeline; give `pipeline`.")
        prompts = self._prompts if prompts is None else prompts
        if not prompts and not isinstance(prompts, str):
            raise ValueError("`prompts` has to be given, since nothing has been learned yet.")
        if getattr(self.pipeline, "unet", None) is None:
            # the paper's settings are those of Stable Diffusion
            kwargs = {"num_inference_steps": None, "guidance_scale": None} | kwargs
        return evaluate(self.pipeline, prompts, image, judge, searched=self.clip, **kwargs)


def planned(steps: int | None, options: Mapping[str, Any], extra: bool = False) -> Plan:
    """What a search does whose task gets these steps and `options`; raises as `make_plan` does."""
    names = ("preset", "refine_steps", "time_limit")
    rest = {name: options.get(name) for name in names}
    return make_plan(steps=steps, extra=extra, readability=options.get("readability", 0.0), **rest)


def _component(
    clip: PezClipModel | AnyClip | str | Sequence[str],
    pretrained: str | None = None,
    download: bool = False,
) -> PezClipModel:
    """A CLIP, or the name of one, as a component."""
    if isinstance(clip, PezClipModel):
        return clip
    if not isinstance(clip, (str, list, tuple)):
        return PezClipModel.from_clip(clip)
    return PezClipModel.load(clip, pretrained, download=download)


def _as_many(passed: dict[str, Any], count: int) -> dict[str, Any]:
    """Texts as lists, which `negative_prompt` and its like have to be where `prompt` is one."""
    return {
        name: [value] * count if _TEXT.fullmatch(name) and isinstance(value, str) else value
        for name, value in passed.items()
    }


def _place(clip: PezClipModel, pipeline: DiffusionPipeline) -> None:
    """To where the pipeline's models are when they compute, or wait in the memory of the host."""
    waits = bool(getattr(pipeline, "_all_hooks", None))
    encoder = getattr(pipeline, "text_encoder", None)
    dtype = pipeline.dtype if encoder is None else encoder.dtype
    # of Module, since diffusers' own warns of modules to keep in float32 where there are none
    nn.Module.to(clip, "cpu" if waits else pipeline._execution_device, dtype)


def _check_pipeline(pipeline: DiffusionPipeline) -> None:
    """Raise unless it makes images of prompts alone."""
    kind = type(pipeline).__name__
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"`pipeline` has to be a loaded DiffusionPipeline but is {kind}.")
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in accepted or "image" in accepted:
        raise ValueError(
            f"`pipeline` has to be a text-to-image pipeline but is {kind}. One that needs an image "
            "of its own takes the prompts of a prior: t2i(**PezPipeline(clip=clip)(image=target), "
            "image=start)."
        )


def _prompts_of(
    task: str, images: Sequence[Image.Image], prompt: str | list[str] | None, shared: bool
) -> int:
    """How many prompts images are made of."""
    if task == "invert":
        return 1 if shared else len(images)
    if task == "concat" or isinstance(prompt, str) or prompt is None:
        return 1
    return len(prompt)
