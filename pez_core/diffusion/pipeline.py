"""`PezPipeline`: learns short prompts from images and long prompts, and makes images of them."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import replace_example_docstring
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn

from ..caption import Caption, check_caption
from ..clip import AnyClip, clip_from_encoders
from ..clip.images import ImageInput
from ..errors import ArgumentError, ArgumentTypeError, check_choice, check_integer, check_number
from ..options import SearchOptions, with_share_of_time
from ..priors import needed_language_model
from ..results import Report, Result
from ..targets import check_callback
from ..tasks import check_prompt
from ..tasks.style import STYLE_TEMPLATE, StyleResult
from .belonging import text_encoders, warn_where_foreign
from .choice import choose_by_image
from .clip_model import PezClipModel
from .denoising import DenoisingLoss
from .evaluation import Evaluation, evaluate
from .image_models import (
    bundled_model,
    check_pipeline,
    check_settings,
    cut_remark,
    default_settings,
    draws_from_prompts,
    with_both_sizes,
    without_foreign_code,
)
from .inputs import (
    TEXTS,
    check_keywords,
    check_options,
    check_texts,
    is_shared,
    keywords_of,
    load_pictures,
    named,
    of_prompt,
    one_per_prompt,
    search_seeds,
    weights_of,
)
from .pipeline_output import PezPipelineOutput, PezPriorOutput
from .tasks import (
    CHANGES,
    TASKS,
    apply_style,
    calls_of,
    change_caption,
    check_task,
    count_prompts,
    task_keywords,
)

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
PezCallback = Callable[["PezPipeline", int, Report], Any]

OWN = "own"
"""Instead of a CLIP: the one of the pipeline's text encoders."""
CHOICES = ("prompt", "image")
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
# arguments of `from_pretrained` that `load_config` takes too
_FILES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# arguments of the image pipeline that concern the images of the output alone
_OF_THE_OUTPUT = (
    "num_images_per_prompt",
    "generator",
    "latents",
    "output_type",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)
# arguments of `__call__` for the image pipeline
_IMAGE_KWARGS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    *_OF_THE_OUTPUT,
)
_IMAGE_DEFAULTS = {"num_images_per_prompt": 4, "output_type": "pil"}

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from pez_core import PezPipeline, SearchOptions

        >>> pipe = PezPipeline.from_pretrained(
        ...     "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ...     clip="ViT-L-14:openai",
        ...     dtype=torch.bfloat16,
        ... )
        >>> pipe.to("cuda")

        >>> output = pipe(
        ...     image="photo.jpg",
        ...     options=SearchOptions(effort="fast"),
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> print(output.prompts[0], output.similarities[0])
        >>> output.images[0].save("like-photo.png")
        ```
"""


class _CallLock:
    """A lock for the calls of one pipeline; a copy of the pipeline gets a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_CallLock], tuple[()]]:
        return _CallLock, ()


def _one_at_a_time(
    call: Callable[Concatenate[PezPipeline, P], T],
) -> Callable[Concatenate[PezPipeline, P], T]:
    """Let calls from several threads wait for each other: they share the models' state."""

    @wraps(call)
    def locked(self: PezPipeline, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._call_lock:
            return call(self, *args, **kwargs)

    return locked


class PezPipeline(DiffusionPipeline):
    r"""
    Pipeline that learns short prompts with PEZ ("Hard Prompts Made Easy") and makes images of them.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the
    generic methods implemented for all pipelines (downloading, saving, running on a particular
    device, etc.). Moving, offloading to the CPU, progress bars and `scheduler` reach the image
    pipeline, too; for everything else use `pipe.pipeline`. Calls from several threads run one after
    the other.

    Args:
        clip ([`PezClipModel`], `pez_core.Clip`, `pez_core.JointClip`, `str` or `list[str]`):
            The CLIP of the search: the one whose text encoder the image pipeline has, together with
            its image tower, which image pipelines lack; a warning is logged where it is another
            one. `pez_core.load_clip` loads a name; nothing is downloaded, unlike by
            `PezClipModel.load` with `download=True`.
        pipeline ([`DiffusionPipeline`], *optional*):
            Any text-to-image pipeline. Without one this is a prior: pass its output to any
            pipeline, even one that needs an image of its own: `t2i(**pez(image=image))`.
    """

    model_cpu_offload_seq = "clip"
    # sequential offloading hooks submodules, and the search reads weights without calling these
    _exclude_from_cpu_offload = ["clip"]  # noqa: RUF012
    _optional_components = ["pipeline"]  # noqa: RUF012

    def __init__(self, clip: PezClipModel, pipeline: DiffusionPipeline | None = None) -> None:
        super().__init__()
        if pipeline is not None:
            check_pipeline(pipeline)
        self.register_modules(clip=_component(clip), pipeline=pipeline)
        self._call_lock = _CallLock()
        self._start()
        if pipeline is not None:
            warn_where_foreign(self.clip.clip, pipeline)

    # Loading, moving and progress bars, which include the image pipeline.

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
        Load a saved `PezPipeline`, or a text-to-image pipeline and a CLIP for it.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder or a repository of the Hub; or `"emoji-diffusion"`, the small image model
                that comes with this package and brings its CLIP along.
            clip ([`PezClipModel`], `pez_core.AnyClip`, `str` or `list[str]`, *optional*):
                Needed for all other text-to-image pipelines. `pez_core.load_clip` loads a name:
                for Stable Diffusion 1.x `"ViT-L-14:openai"`, for 2.x
                `"ViT-H-14:laion2b_s32b_b79k"`, for XL both `"ViT-L-14:openai"` and
                `"ViT-bigG-14:laion2b_s39b_b160k"` in a list. The CLIP then gets the device and
                dtype of the pipeline.
            clip_pretrained (`str`, *optional*):
                Tag or file of the weights, where `clip` lacks it.
            download (`bool`, *optional*):
                Whether to download a CLIP that is not on this disk; by default `True`, as for the
                pipeline, unless `local_files_only` is set.
            kwargs:
                Passed to [`DiffusionPipeline.from_pretrained`].
        """
        model = bundled_model("pretrained_model_name_or_path", pretrained_model_name_or_path)
        if model is not None:
            pretrained_model_name_or_path = model.folder
            clip = model.clip if clip is None else clip
        files = {name: kwargs[name] for name in _FILES if name in kwargs}
        index: Any = cls.load_config(pretrained_model_name_or_path, **files)
        if download is None:
            download = not kwargs.get("local_files_only", False)
        by_name = isinstance(clip, (str, list, tuple))
        kind, saved = _read_index(index, pretrained_model_name_or_path)
        is_saved = kind in [one.__name__ for one in cls.__mro__]
        if not is_saved and "custom_pipeline" not in kwargs:
            _check_kind(kind, pretrained_model_name_or_path)
        if clip is not None:  # before the image pipeline, which can take long
            clip = _component(clip, clip_pretrained, download=download)
        if is_saved:
            files.pop("proxies", None)
            with without_foreign_code():
                pez = cls._load_saved(pretrained_model_name_or_path, clip, saved, files, **kwargs)
        elif clip is None:
            raise ArgumentError(
                "clip",
                f"has to be given, since {pretrained_model_name_or_path} is a {kind}",
                "give the CLIP whose text encoder it has, such as 'ViT-L-14:openai' for Stable "
                "Diffusion 1.x",
            )
        else:
            with without_foreign_code():
                pipeline = DiffusionPipeline.from_pretrained(
                    pretrained_model_name_or_path, **kwargs
                )
            pez = cls(clip, pipeline)
        if by_name and pez.pipeline is not None:
            _place(pez.clip, pez.pipeline)
        return pez

    @classmethod
    def _load_saved(
        cls,
        folder: str | os.PathLike,
        clip: PezClipModel | None,
        has_pipeline: bool,
        files: dict[str, Any],
        **kwargs: Any,
    ) -> PezPipeline:
        """Load a folder of `save_pretrained`.

        Args:
            folder: a folder or a repository.
            clip: to use in place of the saved one.
            has_pipeline: an image pipeline was saved.
            files: arguments of `snapshot_download`.
            kwargs: of `from_pretrained`.
        """
        if not os.path.isdir(folder):
            # the base class refuses repositories that need a library beside diffusers
            folder = snapshot_download(str(folder), **files)
        pipeline = kwargs.pop("pipeline", None)
        if pipeline is None and has_pipeline:
            pipeline = DiffusionPipeline.from_pretrained(Path(folder, "pipeline"), **kwargs)
        if clip is not None:
            kwargs["clip"] = clip
        elif kwargs.get("variant") is not None:
            # the base class looks for variants among files and fails on the pipeline's folders
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            if isinstance(dtype, dict):
                dtype = dtype.get("clip", dtype.get("default"))
            kwargs["clip"] = PezClipModel.from_pretrained(
                folder, subfolder="clip", variant=kwargs["variant"], dtype=dtype
            )
        kwargs.pop("variant", None)
        pez = super().from_pretrained(folder, pipeline=None, **kwargs)
        pez.register_modules(pipeline=pipeline)
        if pipeline is not None:
            warn_where_foreign(pez.clip.clip, pipeline)
        return pez

    @classmethod
    def from_pipe(  # pyright: ignore[reportIncompatibleMethodOverride] - takes no components
        cls,
        pipeline: DiffusionPipeline,
        clip: PezClipModel | AnyClip | str | Sequence[str] | None = None,
        clip_pretrained: str | None = None,
        download: bool = False,
        image_encoder: Any = None,
    ) -> PezPipeline:
        r"""
        Add a CLIP to a loaded pipeline, which stays unchanged.

        Args:
            pipeline ([`DiffusionPipeline`]):
                A text-to-image pipeline, or a `PezPipeline`, whose CLIP is used by default.
            clip, clip_pretrained:
                As in `from_pretrained`, or `"own"` for the text encoders of the pipeline itself,
                which need no download and may be fine-tuned: their weights are copied, and the
                result cannot be saved. A CLIP given by name gets the device and dtype of the
                pipeline, and is offloaded where the models of the pipeline are; a loaded one stays
                where it is.
            download (`bool`, *optional*, defaults to `False`):
                Whether to download a CLIP that is not on this disk.
            image_encoder (`CLIPVisionModelWithProjection` or `CLIPModel` or a list, *optional*):
                With `clip="own"` the image encoders that belong to the text encoders, which are
                shared and move with the pipeline; see `pez_core.clip_from_encoders`. Without one
                prompts are learned from texts alone.
        """
        if isinstance(pipeline, PezPipeline):
            clip, pipeline = clip or pipeline.clip, pipeline.pipeline
        if image_encoder is not None and clip != OWN:
            raise ArgumentError("image_encoder", "is for `clip` 'own'", "leave it out")
        if clip is None:
            raise ArgumentError("clip", "has to be given, such as 'ViT-L-14:openai'")
        if pipeline is not None:
            check_pipeline(pipeline)
        by_name = isinstance(clip, (str, list, tuple))
        if by_name and clip == OWN:
            component = _own_component(pipeline, image_encoder)
        else:
            component = _component(clip, clip_pretrained, download)
        pez = cls(component)
        if by_name and pipeline is not None:
            _place(pez.clip, pipeline)
            if getattr(pipeline, "_all_hooks", None):
                pez.enable_model_cpu_offload(device=pipeline._offload_device)
        pez.register_modules(pipeline=pipeline)
        if pipeline is not None:
            warn_where_foreign(pez.clip.clip, pipeline)
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

    # The state of the running call, or of the last one.

    @property
    def prompts(self) -> list[str]:
        """The best prompts so far; after a call, even a failed one, those of this call."""
        running = [] if self._report is None else self._report.prompts
        return [*self._prompts, *running]

    @property
    def results(self) -> list[Result]:
        """The `pez_core.Result` of each finished search of the call."""
        return self._results

    @property
    def interrupt(self) -> bool:
        """Whether a callback ended the search; the best prompts so far are then used."""
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

    def _start(self) -> None:
        """Forget the last call."""
        self._prompts: list[str] = []
        self._results: list[Result] = []
        self._report: Report | None = None
        self._interrupt = False

    def check_inputs(
        self,
        images: Sequence[Image.Image],
        prompt: str | list[str] | None,
        task: str,
        options: SearchOptions,
        task_kwargs: dict[str, Any] | None,
        denoising_weight: float,
        denoising_kwargs: dict[str, Any] | None,
    ) -> None:
        """Raise where the arguments of the search are wrong or do not go together."""
        check_task(task, images, prompt, task_kwargs)
        allowed = [name for name in keywords_of(DenoisingLoss) if name != "shared"]
        check_keywords("denoising_kwargs", denoising_kwargs, "DenoisingLoss", allowed)
        if check_number("denoising_weight", denoising_weight, 0, 1):
            self._check_denoising(task, options)
            prunes = (task_kwargs or {}).get("prune_caption") and not is_shared(task_kwargs)
            if len(images) > 1 and (isinstance(prompt, list) or prunes):
                raise ArgumentError(
                    "denoising_weight",
                    "needs one caption for all images, as a string, which is not pruned for each",
                    "call the pipeline once for each image",
                )
        elif denoising_kwargs:
            raise ArgumentError("denoising_kwargs", "needs a `denoising_weight` above 0")

    def _check_denoising(self, task: str, options: SearchOptions) -> None:
        """Raise now rather than after the denoising loss has encoded the images."""
        if self.pipeline is None or task != "invert":
            raise ArgumentError(
                "denoising_weight", "needs an image pipeline and the task 'invert'", "leave it out"
            )
        if options.extra_loss is not None:
            raise ArgumentError(
                "denoising_weight", "is an `extra_loss`, and `options` has another", "leave one out"
            )
        if options.work.swaps:
            raise ArgumentError(
                "denoising_weight",
                "cannot be refined by swaps, since each would cost as much as a step of PEZ",
                "give options=SearchOptions(swaps=0, steps=200)",
            )

    def check_choice(
        self,
        choose_by: str,
        task: str,
        options: SearchOptions,
        task_kwargs: Mapping[str, Any] | None,
    ) -> None:
        """Raise where there are no images, or no candidates, to choose by or among."""
        check_choice("choose_by", choose_by, CHOICES)
        if choose_by == "prompt":
            return
        negative = (task_kwargs or {}).get("negative_prompt", False)
        if self.pipeline is None or task != "invert" or negative:
            raise ArgumentError(
                "choose_by",
                "is 'image', which needs an image pipeline, the task 'invert' and no "
                "`negative_prompt`",
                "leave it out",
            )
        if options.restarts < 2:
            raise ArgumentError(
                "choose_by",
                "is 'image', but `restarts` is 1, so that there is one candidate",
                "give options=SearchOptions(restarts=4)",
            )

    def check_image_inputs(self, prompts: int, image_kwargs: Mapping[str, Any]) -> None:
        """Raise where arguments of the image pipeline are wrong, before a long search.

        Args:
            prompts: the number of prompts that images are made of.
            image_kwargs: all arguments of the image pipeline but `prompt`.
        """
        each, generator = image_kwargs["num_images_per_prompt"], image_kwargs.get("generator")
        check_integer("num_images_per_prompt", each, 1)
        check_choice("output_type", image_kwargs["output_type"], OUTPUT_TYPES)
        draws = self.pipeline is not None  # a list for the searches alone is checked by them
        if draws and isinstance(generator, list) and len(generator) != prompts * each:
            raise ArgumentError(
                "generator",
                f"has to hold one for each of {prompts * each} images ({each} for each of "
                f"{prompts} prompts) but holds {len(generator)}",
            )
        for name in TEXTS & image_kwargs.keys():
            check_texts(name, image_kwargs[name], prompts)
        callback = image_kwargs.get("callback_on_step_end")
        if callback is not None and not callable(callback):
            raise ArgumentTypeError(
                "callback_on_step_end", f"has to be a function but is {callback!r}"
            )
        latents = image_kwargs.get("latents")
        if latents is not None and not isinstance(latents, torch.Tensor):
            kind = type(latents).__name__
            raise ArgumentTypeError("latents", f"has to be a tensor but is a {kind}")
        if draws and latents is not None and latents.shape[:1] != (prompts * each,):
            raise ArgumentError(
                "latents",
                f"has to hold one for each of {prompts * each} images ({each} for each of "
                f"{prompts} prompts) but has shape {tuple(latents.shape)}",
            )
        # without an image pipeline its arguments are not used, but unknown ones are still an error
        if self.pipeline is not None:
            check_settings(self.pipeline, image_kwargs)
        passed = sorted(set(image_kwargs) - {"num_images_per_prompt", "generator", "output_type"})
        _check_accepted(self if self.pipeline is None else self.pipeline, passed)
        check = getattr(self.pipeline, "check_inputs", None)
        if check is None:
            return
        accepted = inspect.signature(type(self.pipeline).__call__).parameters
        values = {name: parameter.default for name, parameter in accepted.items()}
        # a size that every pipeline takes: some choose theirs only after the check
        values |= {"height": 1024, "width": 1024, "callback_steps": 1}
        values |= one_per_prompt(image_kwargs, prompts) | {"prompt": ["a"] * prompts}
        needed = inspect.signature(check).parameters
        if set(needed) <= set(values):
            check(**{name: values[name] for name in needed})

    def with_denoising_loss(
        self,
        options: SearchOptions,
        images: Sequence[Image.Image],
        weight: float,
        kwargs: dict[str, Any] | None,
        shared: bool,
    ) -> SearchOptions:
        """The options with the denoising loss of the image pipeline, if its weight is above 0."""
        if not weight:
            return options
        with named(images="image"):
            loss = DenoisingLoss(
                self.pipeline, images, self.clip.clip, weight, shared=shared, **kwargs or {}
            )
        return replace(options, extra_loss=loss)

    def learn_prompts(
        self,
        images: Sequence[Image.Image],
        prompt: str | list[str] | None,
        task: str,
        options: SearchOptions,
        seeds: Sequence[int],
        callback: PezCallback | None,
        style_template: str = STYLE_TEMPLATE,
        **task_kwargs: Any,
    ) -> list[Result]:
        """Call the task of `pez_core`, with one call per prompt where it takes one prompt only.

        Args:
            images, prompt, task, options: as in `__call__`. The calls share the time limit.
            seeds: one per learned prompt.
            callback: `pez_callback_on_step_end`.
            style_template: for the subjects of a style.
            task_kwargs: of the task.

        Returns:
            One result per learned prompt; fewer where the search was interrupted.
        """
        prunes = task_kwargs.get("prune_caption") and not is_shared(task_kwargs)
        if prunes and isinstance(prompt, str):  # each image may get another caption
            prompt = [prompt] * len(images)
        calls = list(calls_of(task, images, prompt))
        given, words = options.language_model, self.clip.clip.text.words
        with named(caption="prompt"):
            self._check_calls(task, calls, options, task_kwargs)
        # by `readability` alone: a wording has the bundled one
        model = needed_language_model(options.readability, given, self._execution_device, words)
        options, began = replace(options, language_model=model), time.monotonic()
        for k, (targets, caption) in enumerate(calls):
            own = with_share_of_time(options, 1 / (len(calls) - k), began)
            own = replace(own, seed=tuple(seeds) if len(calls) == 1 else seeds[k])
            with named(images="image", caption="prompt", sources="prompt"):
                self._learn(task, targets, own, callback, **caption, **task_kwargs)
            if self._interrupt:
                break
        if prompt is not None and isinstance(self._results[0], StyleResult):
            self._prompts = apply_style(self._results[0], prompt, style_template)
            self._warn_of_ends()
        return self._results

    def _check_calls(
        self,
        task: str,
        calls: Sequence[tuple[Any, Mapping[str, str]]],
        options: SearchOptions,
        task_kwargs: Mapping[str, Any],
    ) -> None:
        """Raise now where the text of a later call would fail only at its turn."""
        clip, changes = self.clip.clip, any(task_kwargs.get(name) for name in CHANGES)
        for targets, given in calls:
            if task == "distill":
                self.clip(lambda clip, text=targets: check_prompt(clip, text))
            elif given.get("caption") and not changes:
                check_caption(given["caption"], options.wording)
                if self.pipeline is not None:
                    _check_length(clip, given["caption"], options)

    def _warn_of_ends(self) -> None:
        """Warn where the image pipeline will cut off the end of a prompt."""
        if self.pipeline is None:
            return
        for prompt in self._prompts:
            if remark := cut_remark(self.pipeline, prompt):
                logger.warning("%s", remark)

    def _learn(
        self,
        task: str,
        targets: Any,
        options: SearchOptions,
        callback: PezCallback | None,
        **kwargs: Any,
    ) -> None:
        """One call of a task, under a progress bar; adds to `prompts` and `results`."""
        score = "similarity" if options.extra_loss is None else "score"
        new_bar: Any = self.progress_bar
        with new_bar(total=options.work.total) as progress_bar:

            def report(state: Report) -> bool:
                self._report = state
                progress_bar.total = state.steps
                progress_bar.update(state.step - progress_bar.n)
                progress_bar.set_postfix({score: f"{state.similarity:.4f}"})
                # callbacks of diffusers return their last argument, which must not end the search
                if callback is not None and callback(self, state.step, state) is True:
                    self._interrupt = True
                return self._interrupt

            def search(clip: AnyClip) -> Any:
                began = time.monotonic()
                own, remark = change_caption(clip, targets, options, kwargs)
                if self.pipeline is not None and own.get("caption"):
                    _check_length(clip, own["caption"], options)
                left = with_share_of_time(options, 1, began)
                found = TASKS[task](clip, targets, left, callback=report, **own)
                if remark:
                    found = [replace(one, note=f"{remark} {one.note}".strip()) for one in found]
                return found

            found = self.clip(search)
        found = found if isinstance(found, list) else [found]
        for result in found:
            if result.note:
                logger.warning("%s", result.note)
        self._results += found
        self._prompts += [result.prompt for result in found]
        self._report = None

    def choose_candidates(
        self,
        images: Sequence[Image.Image],
        shared: bool,
        options: SearchOptions,
        seeds: Sequence[int],
        image_kwargs: Mapping[str, Any],
        weights: Sequence[float] | None = None,
    ) -> None:
        """Replace the results by the candidates whose images are most similar to the targets.

        Args:
            images: the targets.
            shared: all of them are the targets of one prompt.
            options, seeds: of the search. The noise has the first seed and the numbers behind it.
            image_kwargs: arguments of the image pipeline.
            weights: of the targets of one prompt; None: all the same.
        """
        settings = {k: v for k, v in image_kwargs.items() if k not in _OF_THE_OUTPUT}
        each = image_kwargs["num_images_per_prompt"]
        targets = [list(images)] if shared else [[image] for image in images]
        noise = [(seeds[0] + k) % 2**63 for k in range(each)]
        self._results = [
            choose_by_image(
                self.pipeline,
                self.clip,
                result,
                targets[k],
                noise,
                of_prompt(settings, k),
                lambda: self._interrupt,
                options.fit,
                weights,
            )
            for k, result in enumerate(self._results)
        ]
        self._prompts = [result.prompt for result in self._results]

    def make_images(self, image_kwargs: Mapping[str, Any]) -> tuple[Any, list[bool] | None]:
        """Images of `prompts`, and the flags of the safety checker where there is one."""
        prompts, each = self._prompts, image_kwargs["num_images_per_prompt"]
        settings = dict(image_kwargs)
        # an interrupted search has fewer prompts
        for name, value in settings.items():
            if name == "generator" and isinstance(value, list):
                settings[name] = value[: len(prompts) * each]
            elif name in TEXTS and isinstance(value, list):
                settings[name] = value[: len(prompts)]
        latents = settings.get("latents")
        if latents is not None and len(latents) > len(prompts) * each:
            settings["latents"] = latents[: len(prompts) * each]
        settings = default_settings(self.pipeline) | settings
        accepted = inspect.signature(type(self.pipeline).__call__).parameters
        settings = {name: value for name, value in settings.items() if name in accepted}
        if "num_images_per_prompt" not in accepted:
            prompts = [prompt for prompt in prompts for _ in range(each)]
            for name in TEXTS & settings.keys():
                if isinstance(settings[name], list):
                    settings[name] = [text for text in settings[name] for _ in range(each)]
        try:
            made = self.pipeline(prompt=prompts, **one_per_prompt(settings, len(prompts)))
        except Exception:
            logger.error("No images, but `prompts` has the learned prompts: %s", self._prompts)
            raise
        return made[0], getattr(made, "nsfw_content_detected", None)

    @_one_at_a_time
    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | torch.Tensor | None = None,
        prompt: str | list[str] | None = None,
        task: str = "invert",
        options: SearchOptions | None = None,
        *,
        task_kwargs: dict[str, Any] | None = None,
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
        denoising_kwargs: dict[str, Any] | None = None,
        choose_by: str = "prompt",
        pez_callback_on_step_end: PezCallback | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        **kwargs: Any,
    ) -> PezPipelineOutput | PezPriorOutput | tuple:
        r"""
        The call function to the pipeline: learns prompts and makes images of them.

        A `PezPipeline` may have no image pipeline. It then learns prompts alone, and arguments for
        the image pipeline have no effect.

        Args:
            image (`ImageInput` or `list[ImageInput]`, *optional*):
                Images to learn prompts for: paths, PIL images, or (H, W, 3) or (3, H, W) arrays or
                tensors of uint8 or of floats in [0, 1]; one, a list, or a batch with one more
                dimension in front. `"invert"` and `"style"` require them, `"distill"` takes none.
            prompt (`str` or `list[str]`, *optional*):
                For `"invert"` the caption, which stays in the prompt: the learned words go where it
                holds `{}`, else behind it. A list has one caption per image.
                With `clean_caption` in `task_kwargs` it may be the text of any captioner. For
                `"style"` the subjects that get the style, with one prompt each; for `"distill"` the
                prompts to shorten; for `"fuse"` further sources beside the images. Pipelines of
                diffusers read the syntax of ComfyUI as plain words; so `"distill"` and `"fuse"`
                drop it: of `(word:1.2)` the word stays, `BREAK` and tags go.
            task (`str`, *optional*, defaults to `"invert"`):
                `"invert"`: a prompt for each image. `"style"`: one prompt for the style of all
                images. `"distill"`: a shorter prompt for each prompt. `"fuse"`: one prompt for all
                prompts and images together.
            options ([`pez_core.SearchOptions`], *optional*):
                How to search, and which words may appear. With a `generator` its `seed` has no
                effect. A list of captions, or of prompts to shorten, is learned one after the
                other, each with an equal share of the `time_limit`.
            task_kwargs (`dict`, *optional*):
                Further arguments of the task, which is a function of `pez_core`: `avoid`, `shared`
                and `negative_prompt` of `"invert"`, for which `clean_caption=True` makes the
                captions fit with [`pez_core.prepare_caption`], and `prune_caption=True` drops their
                words that lower the similarity with the image; `keep_content`, `content` and
                `images_per_step` of `"style"`; `ratio` of `"distill"`; `weights` (those of the
                prompts first), `max_tokens` and `always_learn` of `"fuse"`. For `"style"` with a
                `prompt` also `style_template`, the text around subject and style, by default
                `"{subject}, {style}"`. Words that are learned with `negative_prompt` are drawn as
                any prompt here; for the negative prompt of images learn them with
                [`pez_core.invert`] and pass them as `negative_prompt="..."`.
            height (`int`, *optional*):
                Height of the images in pixels; the image pipeline has the default.
            width (`int`, *optional*):
                Width of the images in pixels; the image pipeline has the default.
            num_inference_steps (`int`, *optional*):
                Denoising steps. For pipelines with a UNet (Stable Diffusion 1.x, 2.x and XL) the
                default is 25, as in the paper (12 for `"emoji-diffusion"`); others have their own.
            guidance_scale (`float`, *optional*):
                For pipelines with a UNet the default is 9.0, as in the paper, and 4.0 for
                `"emoji-diffusion"`, the small model that comes with this package; others have their
                own.
            num_images_per_prompt (`int`, *optional*, defaults to 4):
                Images to make of each prompt, at least 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the results reproducible. The image pipeline draws its noise from it. The
                search takes only `generator.initial_seed()` as its seed and draws nothing, so that
                the image pipeline alone makes the same images of the learned prompt with the same
                generator. A list has one generator for each output image, those of the first prompt
                first; the first one of each prompt gives the seed of its search.
            latents (`torch.Tensor`, *optional*):
                Passed to the image pipeline, which makes all images in one call: one latent for
                each of the prompts times `num_images_per_prompt` images.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"pt"`, `"np"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output class instead of a plain tuple.
            denoising_weight (`float`, *optional*, defaults to 0.0):
                Weight w of the denoising loss of the image pipeline, from 0 to 1: the score is
                (1 - w) * similarity - w * loss. Above 0 it needs a Stable Diffusion 1.x, 2.x or XL
                pipeline, the task `"invert"`, and `options` without swaps (`swaps=0` or
                `effort="paper"`). For each image a step of the search takes 4 * `restarts` forward
                and backward passes of the UNet (4 is `samples` of `denoising_kwargs`); so begin
                with `SearchOptions(swaps=0, steps=200)`. The results have the loss as `extra_loss`.
            denoising_kwargs (`dict`, *optional*):
                Further arguments of [`DenoisingLoss`].
            choose_by (`str`, *optional*, defaults to `"prompt"`):
                How to choose among the candidates of several `restarts`. `"prompt"`: by the
                similarity of the prompt with the target. `"image"`: makes `num_images_per_prompt`
                images of each candidate and takes the candidate whose images are most similar to
                the target, by the image tower of `clip`; the images of the output are then made in
                addition. `"image"` needs an image pipeline, the task `"invert"` without
                `negative_prompt`, and two or more restarts.
            pez_callback_on_step_end (`Callable`, *optional*):
                Called as `pez_callback_on_step_end(pipe, step, report)` with a `pez_core.Report`,
                after each step where the search runs on the CPU, and after every 25th on other
                devices. Return `True`, or set `pipe._interrupt = True`, to end the search and make
                images of the best prompts so far.
            callback_on_step_end (`Callable`, *optional*):
                Passed to the image pipeline, which calls it as
                `callback_on_step_end(pipeline, step, timestep, callback_kwargs)`; `pipeline` is the
                image pipeline, not this one.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                Passed to the image pipeline.
            kwargs:
                All other arguments are passed to the image pipeline, such as `negative_prompt`.

        Examples:

        Returns:
            [`PezPipelineOutput`] or `tuple`:
                With `images`, `prompts` and `similarities`; a tuple has them in this order, and
                behind them the flags of the safety checker, if there is one. Without an image
                pipeline a [`PezPriorOutput`] with `prompt`, the list of prompts, or a tuple of this
                list. Both classes have the attributes `similarities` and `results`. If making
                images fails, `pipe.prompts` and `pipe.results` still have what was learned.

        Raises:
            ArgumentError: an argument is missing, unknown, out of range or of the wrong type, or
                two exclude each other. It is raised before the search wherever possible.
            FloatingPointError: a score or gradient became NaN or infinite.
        """
        given = locals()
        self._start()

        # 1. Check inputs, those of the image pipeline too. Raise error if not correct
        with named(callback="pez_callback_on_step_end"):
            check_callback(pez_callback_on_step_end)
        options = check_options(options)
        images = [] if image is None else load_pictures("image", image)
        self.check_inputs(
            images, prompt, task, options, task_kwargs, denoising_weight, denoising_kwargs
        )
        self.check_choice(choose_by, task, options, task_kwargs)
        own_kwargs = {name: given[name] for name in _IMAGE_KWARGS if given[name] is not None}
        image_kwargs = _IMAGE_DEFAULTS | with_both_sizes(self.pipeline, own_kwargs) | kwargs
        count, shared = count_prompts(task, images, prompt, task_kwargs), is_shared(task_kwargs)
        self.check_image_inputs(count, image_kwargs)

        # 2. Choose the seeds of the search, and add the denoising loss
        seeds = search_seeds(generator, options, 1 if task == "style" else count)
        loss = denoising_weight, denoising_kwargs, shared
        options = self.with_denoising_loss(options, images, *loss)

        # 3. Learn prompts, and make room for the image pipeline
        self.learn_prompts(
            images, prompt, task, options, seeds, pez_callback_on_step_end, **task_kwargs or {}
        )
        for hook in getattr(self, "_all_hooks", []):
            hook.offload()

        # 4. Make images
        if choose_by == "image":
            weights = weights_of(task_kwargs)
            self.choose_candidates(images, shared, options, seeds, image_kwargs, weights)
        output = self.make_output(image_kwargs)
        return output if return_dict else output.to_tuple()

    def make_output(self, image_kwargs: Mapping[str, Any]) -> PezPipelineOutput | PezPriorOutput:
        """The output of a call, with images of `prompts` where there is an image pipeline."""
        results = self._results
        similarities = [result.similarity for result in results]
        similarities *= len(self._prompts) // len(results)  # a style may have several subjects
        if self.pipeline is None:
            return PezPriorOutput(self._prompts, similarities, results)
        made, flagged = self.make_images(image_kwargs)
        return PezPipelineOutput(made, self._prompts, similarities, flagged, results)

    def evaluate(
        self,
        image: ImageInput | Sequence[ImageInput] | torch.Tensor,
        judge: PezClipModel | AnyClip,
        prompts: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Evaluation:
        r"""
        Make images of prompts, and measure how similar they are to target images.

        A CLIP that the search did not use measures the similarity, since the search overfits its
        own. The CLIP of the search is measured too, for comparison.

        Args:
            image (`ImageInput` or `list`):
                The target images, each given as in `__call__`. A single image is the target of all
                prompts. For one prompt a list holds all its targets. For several prompts it has one
                entry per prompt: an image, or a list of images, whose mean similarity counts. If
                all prompts have the same list of targets, such as one style with several subjects,
                give `[images] * len(prompts)`.
            judge ([`PezClipModel`], `pez_core.Clip` or `pez_core.JointClip`):
                The CLIP that measures, such as ViT-bigG-14 for prompts learned on ViT-H-14;
                `pez_core.load_clip` loads one.
            prompts (`str` or `list[str]`, *optional*):
                By default those of the last call.
            kwargs:
                `num_images_per_prompt` (4), `num_inference_steps` and `guidance_scale` (as in
                `__call__`), `generator` and `callback` as in `pez_core.diffusion.evaluate`, and all
                other arguments of the image pipeline.

        Returns:
            [`Evaluation`]:
                `mean` and `standard_error` of the similarity, `similarities` (a tensor
                (prompts, num_images_per_prompt) of cosines), `searched_similarities`
                (the same by the CLIP of the search) and the `images`, a list for each prompt.

        Raises:
            ArgumentError: there is no image pipeline, no prompt or a wrong number of targets, an
                argument is out of range or unknown, or the prompts were learned on the judge.
            FloatingPointError: similarities of prompts and targets are NaN or infinite.
            EvaluationError: making or measuring images failed; its `partial` has the prompts
                before.
        """
        if self.pipeline is None:
            raise ArgumentError("pipeline", "is missing, and `evaluate` needs one")
        prompts = self.prompts if prompts is None else prompts
        if not prompts and not isinstance(prompts, str):
            raise ArgumentError("prompts", "has to be given, since no prompt was learned yet")
        unset = {"num_inference_steps": None, "guidance_scale": None}
        chosen = {name: value for name, value in kwargs.items() if value is not None}
        kwargs = unset | default_settings(self.pipeline) | chosen
        with named(images="image"):
            return evaluate(self.pipeline, prompts, image, judge, searched=self.clip, **kwargs)


# Components.


def _component(clip: Any, pretrained: str | None = None, download: bool = False) -> PezClipModel:
    """A CLIP, or the name of one, as a component; `from_clip` refuses everything else."""
    if isinstance(clip, PezClipModel):
        return clip
    if clip == OWN:
        raise ArgumentError(
            "clip",
            f"is {OWN!r}, which needs a loaded pipeline",
            f"call PezPipeline.from_pipe(pipeline, clip={OWN!r})",
        )
    if not isinstance(clip, (str, list, tuple)):
        return PezClipModel.from_clip(clip)
    with named(name="clip", pretrained="clip_pretrained"):
        return PezClipModel.load(clip, pretrained, download=download)


def _own_component(pipeline: DiffusionPipeline | None, image_encoder: Any) -> PezClipModel:
    """The CLIP of a pipeline's text encoders as a component."""
    encoders = {} if pipeline is None else text_encoders(pipeline)
    if not encoders:
        raise ArgumentError(
            "clip",
            f"is {OWN!r}, but {type(pipeline).__name__} has no text encoder of CLIP",
            "name a CLIP",
        )
    texts = [encoder for encoder, _ in encoders.values()]
    # in one precision, which `_place` sets; open_clip's half precision keeps norms in float32
    clip = clip_from_encoders(texts, image_encoder, "cpu", torch.float32)
    return PezClipModel.from_clip(clip)


def _read_index(index: Any, path: str | os.PathLike | None) -> tuple[str, bool]:
    """The class that a model_index.json names, and whether a PezPipeline has an image pipeline."""
    try:
        return index["_class_name"], index.get("pipeline", [None])[0] is not None
    except (LookupError, TypeError, AttributeError) as error:
        raise ArgumentError(
            "pretrained_model_name_or_path",
            f"is {str(path)!r}, whose model_index.json is not that of a pipeline",
        ) from error


def _check_kind(kind: Any, path: str | os.PathLike | None) -> None:
    """Raise where a class of diffusers is missing, or makes no images from prompts alone."""
    found = getattr(diffusers, kind, None) if isinstance(kind, str) else DiffusionPipeline
    if found is None:
        raise ArgumentError(
            "pretrained_model_name_or_path",
            f"is {str(path)!r}, a {kind}, which this version of diffusers does not have",
            "update diffusers, or give its code as `custom_pipeline`",
        )
    # diffusers itself names the packages that a class lacks
    is_there = isinstance(found, type) and issubclass(found, DiffusionPipeline)
    if is_there and found is not DiffusionPipeline and not draws_from_prompts(found):
        raise ArgumentError(
            "pretrained_model_name_or_path",
            f"is {str(path)!r}, a {kind}, which is no text-to-image pipeline",
            "learn the prompts with PezPipeline(clip=clip), and give them to it",
        )


def _check_length(clip: AnyClip, caption: str, options: SearchOptions) -> None:
    """Raise where a text encoder of the image pipeline would cut the prompt."""
    fixed, prompt_len = check_caption(caption, options.wording), options.prompt_len or 1
    room, size = Caption(clip, fixed).room, clip.text.max_prompt_len
    if room < prompt_len <= size:
        raise ArgumentError(
            "caption",
            f"has {size - room} tokens, and {prompt_len} are learned at least, but the image "
            f"pipeline reads {size} and cuts the others off",
            "shorten it, or learn prompts with a PezPipeline that has no image pipeline",
        )


def _place(clip: PezClipModel, pipeline: DiffusionPipeline) -> None:
    """Move the CLIP to the device of the pipeline's models, or to the CPU where they wait there."""
    waits = bool(getattr(pipeline, "_all_hooks", None))
    encoder = getattr(pipeline, "text_encoder", None)
    dtype = pipeline.dtype if encoder is None else encoder.dtype
    # of Module, since that of diffusers warns about modules to keep in float32 where there are none
    nn.Module.to(clip, "cpu" if waits else pipeline._execution_device, dtype)


def _check_accepted(pipeline: DiffusionPipeline, names: Sequence[str]) -> None:
    """Raise where a pipeline does not take an argument; some would ignore it."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    for name in names:
        if name in accepted:
            continue
        every = [*inspect.signature(PezPipeline.__call__).parameters, *accepted]
        close = next(iter(get_close_matches(name, every, 1)), None)
        remedy = f"perhaps `{close}` is meant" if close else "leave it out"
        if name in SearchOptions.__dataclass_fields__:
            remedy = f"write options=SearchOptions({name}=...)"
        elif any(name in task_keywords(task) for task in TASKS):
            remedy = f"write task_kwargs={{{name!r}: ...}}"
        raise ArgumentTypeError(name, f"is not an argument of {type(pipeline).__name__}", remedy)
