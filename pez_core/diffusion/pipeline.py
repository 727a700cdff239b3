"""`PezPipeline`: images, styles and long prompts into short prompts, and these into images."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput, replace_example_docstring
from huggingface_hub import snapshot_download
from PIL import Image

from ..clip import AnyClip
from ..clip.images import ImageInput
from ..learn import Result
from ..tasks import concatenate, distill, extract_style, invert
from .clip_model import PezClipModel
from .denoising import DenoisingLoss
from .evaluation import Evaluation, evaluate
from .inputs import pictures, seeds

logger = logging.getLogger(__name__)

TASKS = ("invert", "style", "distill", "concat")
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
# what the loaders of diffusers take to find files, of which `load_config` knows these
_FILES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# Stable Diffusion reads these from `**kwargs`, though they are no longer in its signature
_OWN = {"seed", "callback", "extra"}  # of the tasks' arguments, what the pipeline sets itself
_OF_OLD = {"callback", "callback_steps"}

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
            `num_images_per_prompt` images of each prompt, one prompt after the other.
        prompts (`list[str]`):
            The prompts that the images were made of.
        similarities (`list[float]`):
            Cosine similarity of each prompt with its target, as the CLIP of the search sees it.

    Its attribute `results` holds the `pez_core.Result` of each search.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    prompts: list[str]
    similarities: list[float]
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
    device, etc.); they reach the image pipeline, too.

    Args:
        clip ([`PezClipModel`], `pez_core.Clip`, `pez_core.JointClip`, `str` or `list[str]`):
            The CLIP that prompts are searched on: the one whose text encoder the image pipeline
            has. A name is given to `pez_core.load_clip`, which downloads nothing.
        pipeline ([`DiffusionPipeline`], *optional*):
            Any text-to-image pipeline. Without it this is a prior, whose output feeds any pipeline:
            `t2i(**pez(image=image))`.
    """

    model_cpu_offload_seq = "clip"
    # sequential offloading hooks submodules, whose weights the search reads without calling them
    _exclude_from_cpu_offload = ["clip"]  # noqa: RUF012
    _optional_components = ["pipeline"]  # noqa: RUF012

    def __init__(self, clip: PezClipModel, pipeline: DiffusionPipeline = None) -> None:
        super().__init__()
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
        **kwargs: Any,
    ) -> PezPipeline:
        r"""
        Load what `save_pretrained` wrote, or a text-to-image pipeline to put a CLIP in front of.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder or a repository of the Hub.
            clip ([`PezClipModel`], `pez_core.AnyClip`, `str` or `list[str]`, *optional*):
                Needed for a text-to-image pipeline. A name is given to `pez_core.load_clip`, with
                download unless
                `local_files_only` is set: for Stable Diffusion 1.x `"ViT-L-14:openai"`, for 2.x
                `"ViT-H-14:laion2b_s32b_b79k"`, for XL both `"ViT-L-14:openai"` and
                `"ViT-bigG-14:laion2b_s39b_b160k"` in a list.
            clip_pretrained (`str`, *optional*):
                Tag or file of the weights, where `clip` does not say it.
            kwargs:
                Passed to [`DiffusionPipeline.from_pretrained`].
        """
        files = {name: kwargs[name] for name in _FILES if name in kwargs}
        index = cls.load_config(pretrained_model_name_or_path, **files)
        download = not kwargs.get("local_files_only", False)
        if index["_class_name"] != cls.__name__:
            if clip is None:
                raise ValueError(
                    f"`clip` has to be given, since {pretrained_model_name_or_path} is a "
                    f"{index['_class_name']}: give the CLIP whose text encoder it has, such as "
                    "'ViT-L-14:openai' for Stable Diffusion 1.x."
                )
            pipeline = DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)
            return cls.from_pipe(pipeline, clip, clip_pretrained, download=download)
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            # the base class refuses repositories that need a library beside diffusers
            folder = snapshot_download(folder, **files)
        pipeline = kwargs.pop("pipeline", None)
        if pipeline is None and index["pipeline"][0] is not None:
            pipeline = DiffusionPipeline.from_pretrained(Path(folder, "pipeline"), **kwargs)
        if clip is not None:
            kwargs["clip"] = _component(clip, clip_pretrained, download=download)
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
        named = isinstance(clip, (str, list, tuple))
        pez = cls(_component(clip, clip_pretrained, pipeline if named else None, download))
        if named and pipeline is not None and getattr(pipeline, "_all_hooks", None):
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
        """Set `_interrupt` in a callback to end the search; images are made of the best so far."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        return self.pipeline.guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self.pipeline.num_timesteps

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        return self.pipeline._callback_tensor_inputs

    # The steps of a call.

    def check_inputs(
        self,
        images: Sequence[Image.Image],
        prompt: str | list[str] | None,
        task: str,
        denoising_weight: float,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        pez_kwargs: dict[str, Any],
        passed: dict[str, Any],
    ) -> None:
        """Raise where the arguments of a call do not go together."""
        if task not in TASKS:
            raise ValueError(f"`task` has to be one of {', '.join(TASKS)} but is {task!r}.")
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise ValueError(f"`prompt` has to be of type `str` or `list` but is {type(prompt)}.")
        if task in ("invert", "style") and not images:
            raise ValueError(f"`image` has to be given for the task {task!r}.")
        if task == "invert" and isinstance(prompt, list):
            raise ValueError(
                "`prompt` has to be of type `str` for the task 'invert', which adds to it, but is "
                f"{type(prompt)}."
            )
        if task == "distill" and not prompt:
            raise ValueError("`prompt` has to be given for the task 'distill'.")
        if task == "distill" and images:
            raise ValueError("`image` cannot be given for the task 'distill'; leave it out.")
        if not 0 <= denoising_weight <= 1:
            raise ValueError(f"`denoising_weight` has to be from 0 to 1 but is {denoising_weight}.")
        if denoising_weight and (self.pipeline is None or task != "invert"):
            raise ValueError(
                "`denoising_weight` needs an image pipeline and the task 'invert'; leave it out."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"`output_type` has to be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}."
            )
        for name in _OWN & set(pez_kwargs):
            raise ValueError(f"`pez_kwargs` holds `{name}`, which is given in another way.")
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
        accepted = set(inspect.signature(type(target).__call__).parameters)
        if unknown := sorted(set(passed) - accepted - _OF_OLD):
            raise TypeError(
                f"`{unknown[0]}` is not an argument of {type(target).__name__}; those of the "
                "search go into `pez_kwargs`."
            )

    def learn_prompt(
        self,
        images: Sequence[Image.Image],
        prompt: str | list[str] | None,
        task: str,
        seeds: Sequence[int],
        callback: Callable[[PezPipeline, int, dict], Any] | None,
        **settings: Any,
    ) -> list[Result]:
        """One result for each prompt that is learned; `settings` go to the task of `pez_core`."""

        def run(search: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            with self.progress_bar(total=settings["steps"]) as progress_bar:

                def report(state: dict) -> bool:
                    self._prompts = [*done, *state["prompts"]]
                    progress_bar.total = state["steps"]
                    progress_bar.update(state["step"] - progress_bar.n)
                    progress_bar.set_postfix(similarity=f"{state['similarity']:.4f}")
                    if callback is not None:
                        callback(self, state["step"], state)
                    return self._interrupt

                return self.clip(
                    lambda clip: search(clip, *inputs, callback=report, **options, **settings)
                )

        done: list[str] = []
        if task == "style":
            return [run(extract_style, images, seed=seeds[0])]
        if task == "concat":
            sources = [*([prompt] if isinstance(prompt, str) else prompt or []), *images]
            return [run(concatenate, sources, seed=seeds[0])]
        if task == "invert":
            if prompt is not None:
                settings["template"] = f"{prompt} {{}}"
            seed = list(seeds) if len(seeds) > 1 else seeds[0]
            found = run(invert, images, seed=seed)
            return found if isinstance(found, list) else [found]
        results = []
        for text, seed in zip([prompt] if isinstance(prompt, str) else prompt, seeds, strict=True):
            results.append(run(distill, text, seed=seed))
            done.append(results[-1].prompt)
        return results

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | torch.Tensor | None = None,
        prompt: str | list[str] | None = None,
        task: str = "invert",
        prompt_len: int | None = None,
        pez_steps: int = 3000,
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
                For `"invert"` a caption that the learned words are added to; for `"style"` the
                subjects that get the style; for `"distill"` what to shorten; for `"concat"` what to
                join, beside the images.
            task (`str`, *optional*, defaults to `"invert"`):
                `"invert"`, a prompt for each image; `"style"`, one for the style that all images
                share; `"distill"`, a shorter one for each prompt; `"concat"`, one of all prompts
                and images.
            prompt_len (`int`, *optional*):
                Tokens to learn; by default 16, for `"style"` 8, and for `"distill"` 0.3 of those
                given.
            pez_steps (`int`, *optional*, defaults to 3000):
                Steps of the search.
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
                generator. Of a list, with one for each image made, the first of each prompt is the
                search's. By default both are drawn anew.
            latents (`torch.Tensor`, *optional*):
                Passed to the image pipeline.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"pt"`, `"np"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output class instead of a plain tuple.
            denoising_weight (`float`, *optional*, defaults to 0.0):
                Share of the image pipeline's own denoising loss in what is minimised, from 0 to 1;
                the CLIP has the rest. Needs a Stable Diffusion 1.x, 2.x or XL pipeline, and a UNet
                forward and backward for every step.
            pez_callback_on_step_end (`Callable`, *optional*):
                Called as `pez_callback_on_step_end(pipe, step, callback_kwargs)` while prompts are
                learned, every step on the CPU and every 25 elsewhere; `callback_kwargs` are those
                of `pez_core.invert`'s callback. Set
                `pipe._interrupt = True` in it to end the search and make images of the best so far.
            callback_on_step_end (`Callable`, *optional*):
                Passed to the image pipeline, which it gets as its first argument.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                Passed to the image pipeline.
            pez_kwargs (`dict`, *optional*):
                Further arguments of the task: `invert`, `extract_style`, `distill` or `concatenate`
                of `pez_core`.
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
        images = [] if image is None else pictures("image", image)
        pez_kwargs = pez_kwargs or {}
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
            denoising_weight,
            num_images_per_prompt,
            generator,
            output_type,
            pez_kwargs,
            chosen,
        )
        self._interrupt, self._prompts, self._results = False, [], []
        shared = pez_kwargs.get("shared", False)
        starts = seeds(generator, _prompts_of(task, images, prompt, shared))

        settings = {"steps": pez_steps, "restarts": restarts} | pez_kwargs
        if prompt_len is not None:
            settings["prompt_len"] = prompt_len
        if denoising_weight:
            settings["extra"] = DenoisingLoss(
                self.pipeline,
                images,
                self.clip.clip,
                weight=denoising_weight,
                shared=shared,
                generator=torch.Generator().manual_seed(starts[0]),
                **(denoising_kwargs or {}),
            )
        self._results = self.learn_prompt(
            images, prompt, task, starts, pez_callback_on_step_end, **settings
        )
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
        for name, value in chosen.items():
            # such as `negative_prompt`, which has to be a list where `prompt` is one
            if "prompt" in name and isinstance(value, str):
                chosen[name] = [value] * len(prompts)
        try:
            made = self.pipeline(
                prompt=prompts,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                output_type=output_type,
                return_dict=False,
                **chosen,
            )[0]
        except Exception:
            logger.error("No images, but the prompts learned are kept in `prompts`: %s", prompts)
            raise
        if not return_dict:
            return made, prompts, similarities
        return PezPipelineOutput(made, prompts, similarities, self._results)

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
        prompts = prompts or self._prompts
        if not prompts:
            raise ValueError("`prompts` has to be given, since nothing has been learned yet.")
        if getattr(self.pipeline, "unet", None) is None:
            # the paper's settings are those of Stable Diffusion
            kwargs = {"num_inference_steps": None, "guidance_scale": None} | kwargs
        return evaluate(self.pipeline, prompts, image, judge, searched=self.clip, **kwargs)


def _component(
    clip: PezClipModel | AnyClip | str | Sequence[str],
    pretrained: str | None = None,
    like: DiffusionPipeline | None = None,
    download: bool = False,
) -> PezClipModel:
    """A CLIP, or the name of one, as a component; a named one is placed as the pipeline `like`."""
    if isinstance(clip, PezClipModel):
        return clip
    if not isinstance(clip, (str, list, tuple)):
        return PezClipModel.from_clip(clip)
    placed = {} if like is None else {"device": like.device, "dtype": like.dtype}
    return PezClipModel.load(clip, pretrained, download=download, **placed)


def _prompts_of(
    task: str, images: Sequence[Image.Image], prompt: str | list[str] | None, shared: bool
) -> int:
    """How many prompts images are made of."""
    if task == "invert":
        return 1 if shared else len(images)
    if task == "concat" or isinstance(prompt, str) or prompt is None:
        return 1
    return len(prompt)
