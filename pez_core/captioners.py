"""Models that write a caption for an image, from this disk unless `download` is set.

The package transformers is imported when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .clip.device import default_dtype, pick_device
from .clip.images import ImageInput, load_image
from .errors import ArgumentError, first_line
from .language_models import cached_folder, dtype_name, no_bars

_REMEDY = "give a folder of transformers or a model of the hub that writes text for images"

# For models that follow instructions.
_INSTRUCTION = "Describe this image in one or two short sentences. Write only the description."
# Florence-2 is asked by a token.
_TASKS = {"florence2": "<DETAILED_CAPTION>"}
_LONGEST = 160  # tokens, more than the context of a CLIP holds


def load_captioner(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    download: bool = False,
) -> Callable[[ImageInput], str]:
    """Load a model of transformers that writes a caption for an image.

    Models are those of `AutoModelForImageTextToText`: BLIP, GIT, Florence-2, LLaVA (JoyCaption),
    Qwen-VL and others. Code that a model's folder carries is never run.

    Args:
        name_or_path: a folder, or the name of a model on the Hugging Face hub, such as
            "Salesforce/blip-image-captioning-base".
        device: as in `load_clip`.
        download: fetch a model that is not on this disk.

    Returns:
        A function of an image, as in `invert`, whose result is the text of the model; see
        `clean_caption`. The same image gives the same text.

    Raises:
        ArgumentError: no such model on this disk, transformers is missing, or the files are damaged
            or of another kind.
    """
    if not str(name_or_path).strip():
        raise ArgumentError("name_or_path", "is empty", _REMEDY)
    if find_spec("transformers") is None:
        raise ArgumentError(
            "name_or_path",
            f"is {str(name_or_path)!r}, which needs the package transformers",
            "pip install -e '.[captioner]' in the clone",
        )
    place = pick_device(device)
    path = Path(name_or_path).expanduser()
    source = str(path if path.exists() else name_or_path)
    if not path.exists() and not download:
        source = cached_folder(source)
    with _naming(name_or_path, "cannot be loaded"):
        model, processor = _read(source, default_dtype(place), download)
    model = model.to(place).eval()

    def caption(image: ImageInput) -> str:
        picture = load_image(image)
        with _naming(name_or_path, "writes no caption"), torch.inference_mode(), no_bars():
            return _written(model, processor, picture)

    return caption


@contextmanager
def naming_captioner() -> Iterator[None]:
    """Inside, errors about the name of a model are about the argument `captioner`."""
    try:
        yield
    except ArgumentError as error:
        if error.argument == "name_or_path":
            raise error.about("captioner") from error
        raise


@contextmanager
def _naming(name_or_path: str | Path, problem: str) -> Iterator[None]:
    """Inside, errors name the model, except for those of memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files and other kinds of models raise anything
        raise ArgumentError(
            "name_or_path",
            f"is {str(name_or_path)!r}, which {problem} ({first_line(error)})",
            _REMEDY,
        ) from error


def _read(source: str, dtype: torch.dtype, download: bool) -> tuple[Any, Any]:
    """Model and processor from a folder or the hub; code of the model itself is refused."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"local_files_only": not download, "trust_remote_code": False}
    with no_bars():
        processor = AutoProcessor.from_pretrained(source, **options)
        if not hasattr(processor, "image_processor"):
            raise ValueError("it has no processor of images and texts")
        options[dtype_name()] = dtype
        return AutoModelForImageTextToText.from_pretrained(source, **options), processor


def _written(model: Any, processor: Any, image: Image.Image) -> str:
    """The text that the model writes for an image."""
    inputs = _inputs(model, processor, image).to(model.device, model.dtype)
    ids = model.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
    if "input_ids" in inputs and not model.config.is_encoder_decoder:
        ids = ids[:, inputs["input_ids"].shape[1] :]  # the instruction
    return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def _inputs(model: Any, processor: Any, image: Image.Image) -> Any:
    """The image as the model takes it, with an instruction where it follows one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image}, {"type": "text", "text": _INSTRUCTION}]
        # a thought would take all of the tokens
        thinks = "enable_thinking" in str(processor.chat_template)
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **({"enable_thinking": False} if thinks else {}),
        )
    task = _TASKS.get(model.config.model_type)
    return processor(images=image, return_tensors="pt", **({"text": task} if task else {}))
