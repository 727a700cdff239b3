"""Image models: the bundled one, loading by name, and the images of one prompt."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from transformers import dynamic_module_utils
from transformers.utils import logging as transformers_logging

from ..clip.device import default_dtype, pick_device
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    check_integer,
    check_number,
    check_string,
    first_line,
)
from ..prompt_text import read
from .belonging import text_encoders
from .inputs import one_per_prompt

logger = logging.getLogger(__name__)

_INDEX = "model_index.json"
# owner/name, as the Hub spells it
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# arguments of pipelines that need more than a prompt: ControlNets, adapters
_MORE_THAN_A_PROMPT = ("controlnet_conditioning_scale", "control_image", "reference_image")


@dataclass(frozen=True)
class BundledModel:
    """A text-to-image pipeline that comes with this package.

    Attributes:
        folder: where diffusers loads it from.
        clip: the bundled CLIP whose text tower is its text encoder.
        settings: arguments that its images are best with.
    """

    folder: Path
    clip: str
    settings: Mapping[str, Any]


BUNDLED = {
    "emoji-diffusion": BundledModel(
        Path(__file__).parent.parent / "models" / "emoji-diffusion",
        "emoji-clip",
        {"num_inference_steps": 12, "guidance_scale": 4.0},
    )
}


def bundled_model(argument: str, name: str | os.PathLike) -> BundledModel | None:
    """The bundled model of this name, or None.

    Args:
        argument: that `name` was given for, for the error.
        name: of the model.

    Raises:
        ArgumentError: its weights are not in the package.
    """
    model = BUNDLED.get(str(name))
    if model is not None and not (model.folder / _INDEX).is_file():
        raise ArgumentError(
            argument,
            f"is {str(name)!r}, whose weights are not in {model.folder}",
            "install this package again",
        )
    return model


def origin(pipeline: DiffusionPipeline) -> Path | None:
    """The folder or repository that a pipeline was loaded from; None where it was built by hand."""
    name = getattr(pipeline, "name_or_path", None)
    return Path(str(name)) if name else None


def default_settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Number of steps and guidance of a pipeline where nobody chooses them.

    Those of a bundled model are its own. Other pipelines with a UNet have those of the paper, which
    made its images with Stable Diffusion. All others have none: their own defaults count.
    """
    unet = getattr(pipeline, "unet", None)
    for model in BUNDLED.values():
        if origin(pipeline) == model.folder or _has_config(unet, model.folder / "unet"):
            return dict(model.settings)
    if unet is not None:
        return {"num_inference_steps": 25, "guidance_scale": 9.0}
    return {}


def _has_config(unet: Any, folder: Path) -> bool:
    """Whether a UNet is as the one in a folder, such as one that was saved elsewhere."""
    given = getattr(unet, "config", None)
    if not isinstance(given, Mapping) or not (folder / "config.json").is_file():
        return False
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = [name for name in config if not name.startswith("_")]
    return all(_plain(given.get(name)) == config[name] for name in names)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_settings(pipeline: DiffusionPipeline, settings: Mapping[str, Any]) -> None:
    """Raise where the steps, the guidance or the size among these arguments are wrong."""
    for name in ("height", "width"):
        if settings.get(name) is not None:
            check_integer(name, settings[name], 1)
    steps, scale = settings.get("num_inference_steps"), settings.get("guidance_scale")
    if steps is not None:
        check_integer("num_inference_steps", steps, 1)
        config = getattr(getattr(pipeline, "scheduler", None), "config", {})
        trained = config.get("num_train_timesteps")
        if trained is not None and steps >= trained:
            raise ArgumentError(
                "num_inference_steps",
                f"is {steps}, but the scheduler was made for fewer than {trained}",
                "25 are usual",
            )
    if scale is not None:
        check_number("guidance_scale", scale)


def with_both_sizes(
    pipeline: DiffusionPipeline | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings, with the default width where the height is given alone, or the reverse.

    Some pipelines with a UNet ignore one alone. All others complete it themselves.
    """
    found = dict(settings)
    config = getattr(getattr(pipeline, "unet", None), "config", None)
    side = config.get("sample_size") if isinstance(config, Mapping) else None
    scale = getattr(pipeline, "vae_scale_factor", None)
    given = [name for name in ("height", "width") if found.get(name) is not None]
    if len(given) == 1 and isinstance(side, int) and isinstance(scale, int):
        found = {"height": side * scale, "width": side * scale} | {
            name: value for name, value in found.items() if value is not None
        }
    return found


def unread_end(pipeline: DiffusionPipeline, prompt: str) -> str:
    """What a pipeline cuts off at the end of a long prompt, "" where it reads all of it.

    Nothing is known of text encoders other than CLIP's, which read longer prompts.
    """
    encoders, ends = text_encoders(pipeline), []
    for name, part in pipeline.components.items() if encoders else ():
        if part is None or not name.startswith("text_encoder"):
            continue
        tokenizer = encoders[name][1] if name in encoders else None
        if tokenizer is None:
            return ""
        ids, size = tokenizer(prompt, verbose=False).input_ids, tokenizer.model_max_length
        ends.append("" if len(ids) <= size else tokenizer.decode(ids[size - 1 : -1]).strip())
    return min(ends, key=len, default="")


def cut_remark(pipeline: DiffusionPipeline, prompt: str) -> str:
    """A remark on what images of a long prompt lack, "" where there is nothing.

    The prompt may have weights and tags, which are not drawn.
    """
    end = unread_end(pipeline, read(prompt) or prompt)
    return end and (
        f"The image model reads a prompt only so far, and cuts off {end!r}: its images lack these "
        "words. Shorten the caption or the subject."
    )


def load_pipeline(
    name: str | os.PathLike,
    device: str | torch.device | None = None,
    download: bool = False,
    low_memory: bool = False,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline of diffusers.

    Args:
        name: `"emoji-diffusion"` (bundled), the folder of a pipeline, or a repository of the Hub.
        device: as in `pez_core.load_clip`. The weights have float32, on CUDA bfloat16 (float16 on
            cards without it).
        download: fetch a repository that is not on this disk.
        low_memory: keep the models in main memory, except for the one that is computing.

    Returns:
        The pipeline, on the device, or with offload to it where `low_memory` is set.

    Raises:
        ArgumentError: there is no such pipeline, it is not on this disk, or it makes no images from
            prompts alone.
        OSError: the download failed.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise ArgumentTypeError("pipeline", f"has to be a name or a folder but is {name!r}")
    place = pick_device(device)
    source = _source(os.fspath(name), download)
    try:
        with nullcontext() if download else _quiet(), without_foreign_code():
            pipeline = DiffusionPipeline.from_pretrained(
                source, dtype=default_dtype(place), local_files_only=not download
            )
    except AttributeError as error:  # diffusers looks its classes up by name
        raise ArgumentError(
            "pipeline", f"is {str(name)!r}, which this version of diffusers cannot load ({error})"
        ) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged folders raise anything: KeyError, NotImplementedError, ...
        if download and isinstance(error, OSError):
            raise  # the download failed
        raise ArgumentError(
            "pipeline",
            f"is {str(name)!r}, which cannot be loaded ({first_line(error)})",
            "give a whole pipeline of diffusers, without code of its own",
        ) from error
    check_pipeline(pipeline)
    if low_memory and place.type != "cpu":
        pipeline.enable_model_cpu_offload(device=place)
    else:
        pipeline.to(place)
    return pipeline


@contextmanager
def without_foreign_code() -> Iterator[None]:
    """Inside, transformers runs no code that a folder carries, and does not ask whether it may.

    diffusers loads processors by transformers without the argument that would refuse it.
    """
    usual = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds for an answer; 0: no question
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = usual


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, loading shows no progress bars; the settings are restored behind."""
    libraries = [diffusers_logging, transformers_logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _source(name: str, download: bool) -> str | Path:
    """What diffusers loads; raise where it is not there."""
    check_string("pipeline", name)
    model = bundled_model("pipeline", name)
    if model is not None:
        return model.folder
    path = Path(name).expanduser()
    if path.exists():
        _check_folder(name, path)
        return path
    if not _REPOSITORY.fullmatch(name):
        raise ArgumentError(
            "pipeline",
            f"is {name!r}, which is neither a folder nor a repository such as OWNER/NAME",
            f"bundled: {', '.join(BUNDLED)}",
        )
    if not download:
        try:
            hf_hub_download(name, _INDEX, local_files_only=True)
        except LocalEntryNotFoundError as error:
            raise ArgumentError(
                "pipeline", f"is {name!r}, which is not on this disk", "add `download`"
            ) from error
    return name


def _check_folder(name: str, path: Path) -> None:
    """Raise unless a path is the folder of a pipeline."""
    if path.is_file():
        raise ArgumentError(
            "pipeline",
            f"is {name!r}, which is a file",
            "give the folder of a pipeline of diffusers; a checkpoint of one file becomes one by "
            "`from_single_file` and `save_pretrained` of its pipeline",
        )
    if not (path / _INDEX).is_file():
        raise ArgumentError(
            "pipeline",
            f"is {name!r}, which holds no {_INDEX}",
            "give the folder of a pipeline of diffusers",
        )
    if (path / "clip").is_dir() and (path / "pipeline" / _INDEX).is_file():
        raise ArgumentError(
            "pipeline",
            f"is {name!r}, which `PezPipeline.save_pretrained` wrote",
            f"give {str(path / 'pipeline')!r}, the image pipeline in it",
        )


def draws_from_prompts(kind: type) -> bool:
    """Whether a class of pipelines makes images from prompts alone.

    Those of diffusers that may get an image, but need none, are among its text-to-image pipelines.
    """
    accepted = inspect.signature(kind.__call__).parameters  # pyright: ignore - pipelines have one
    if "prompt" not in accepted or any(name in accepted for name in _MORE_THAN_A_PROMPT):
        return False
    if "num_frames" not in accepted and any(
        name == "video" or name.startswith("audio_") for name in accepted
    ):
        return False
    if "video" in accepted and accepted["video"].default is inspect.Parameter.empty:
        return False
    return "image" not in accepted or kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()


def check_pipeline(pipeline: DiffusionPipeline) -> None:
    """Raise unless the pipeline makes images from prompts alone."""
    kind = type(pipeline).__name__
    if not isinstance(pipeline, DiffusionPipeline):
        raise ArgumentTypeError("pipeline", f"has to be a loaded DiffusionPipeline but is {kind}")
    if not draws_from_prompts(type(pipeline)):
        raise ArgumentError(
            "pipeline",
            f"has to be a text-to-image pipeline but is {kind}",
            "for a pipeline that needs an image, learn the prompts first: "
            "pipeline(**PezPipeline(clip=clip)(image=target), image=start)",
        )


class Stopped(Exception):
    """`on_step` ended the images of a prompt."""


def draw(
    pipeline: DiffusionPipeline,
    prompt: str,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    on_step: Callable[[float], object] = lambda share: None,
) -> list[Image.Image]:
    """Images of one prompt, one for each seed.

    Args:
        pipeline: a text-to-image pipeline. It gets the arguments that it takes.
        prompt: plain text.
        seeds: of the noise. An image depends on its own seed only. Pipelines for videos make one
            frame for each.
        settings: further arguments of the pipeline.
        on_step: called with the share of the steps that are done; a true return value ends them.

    Raises:
        Stopped: `on_step` returned a true value.
    """
    accepted = inspect.signature(type(pipeline).__call__).parameters

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if on_step((step + 1) / pipe.num_timesteps):
            raise Stopped
        return tensors

    given = {
        "num_images_per_prompt": len(seeds),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "callback_on_step_end": step_end,
        "output_type": "pil",
    } | dict(settings)
    given["num_frames"] = 1
    given = {name: value for name, value in given.items() if name in accepted}
    prompts: Any = prompt
    if "num_images_per_prompt" not in given:
        prompts = [prompt] * len(seeds)
        given = one_per_prompt(given, len(seeds))
    make: Any = pipeline  # the base class has no `__call__`
    made = make(prompt=prompts, **given)
    flags = getattr(made, "nsfw_content_detected", None)
    if flagged := sum(map(bool, [] if flags is None else flags)):
        logger.warning(
            "The safety checker of the pipeline blanked %d of %d images of %r; their similarities "
            "are those of blank images.",
            flagged,
            len(seeds),
            prompt,
        )
    return [one[0] if isinstance(one, list) else one for one in made[0]]
