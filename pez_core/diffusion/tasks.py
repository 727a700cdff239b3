"""The tasks of `pez_core` with the arguments of `PezPipeline`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..captions import check_captioner, in_time, prepare_caption, pruned
from ..errors import ArgumentError, ArgumentTypeError, check_bool, check_choice, check_string
from ..options import SearchOptions
from ..prompt_text import read
from ..tasks import StyleResult, check_style_template, distill, fuse, invert, style
from .inputs import check_keywords, is_shared, keywords_of

if TYPE_CHECKING:
    from ..clip import AnyClip

TASKS = {"invert": invert, "style": style, "distill": distill, "fuse": fuse}
Prompt = str | list[str] | None

CHANGES = ("clean_caption", "prune_caption")
"""Keys of `task_kwargs` for `"invert"` that change the caption before the search."""


def check_task(
    task: str, images: Sequence[Image.Image], prompt: Prompt, task_kwargs: Mapping[str, Any] | None
) -> None:
    """Raise unless the task has the images and texts that it needs, and takes `task_kwargs`."""
    check_choice("task", task, tuple(TASKS))
    _check_texts(prompt)
    if task in ("invert", "style") and not images:
        raise ArgumentError("image", f"has to be given for the task {task!r}")
    if task == "distill" and not prompt:
        raise ArgumentError("prompt", "has to be given for the task 'distill'")
    if task == "distill" and images:
        raise ArgumentError("image", "cannot be used by the task 'distill'", "leave it out")
    if task == "fuse" and len(images) + len(_texts(prompt)) < 2:
        raise ArgumentError("prompt", "and `image` have to hold two sources or more together")
    check_keywords("task_kwargs", task_kwargs, f"the task {task!r}", task_keywords(task))
    if task == "invert" and task_kwargs:
        for name in CHANGES:
            check_bool(name, task_kwargs.get(name, False))
        negative = task_kwargs.get("negative_prompt", False)
        prunes = task_kwargs.get("prune_caption", False)
        if prunes and prompt is None:
            raise ArgumentError("prune_caption", "requires a caption", "give it as `prompt`")
        check_captioner(None, prunes, caption=True, negative_prompt=negative)
    if task == "invert" and isinstance(prompt, list):
        _check_captions(prompt, len(images), is_shared(task_kwargs))
    if task_kwargs and "style_template" in task_kwargs:
        check_style_template(task_kwargs["style_template"])
        if prompt is None:
            raise ArgumentError("style_template", "needs a subject", "give it as `prompt`")


def _texts(prompt: Prompt) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt or []


def _check_texts(prompt: Prompt) -> None:
    if prompt is None or isinstance(prompt, str):
        return
    if not isinstance(prompt, list):
        raise ArgumentTypeError(
            "prompt", f"has to be a string or a list of strings but is {type(prompt).__name__}"
        )
    if not prompt:
        raise ArgumentError("prompt", "is empty", "leave it out, or give a text")
    for text in prompt:
        check_string("prompt", text)


def task_keywords(task: str) -> list[str]:
    """The keys that `task_kwargs` may have."""
    own = ("caption", "callback")  # `prompt` and `pez_callback_on_step_end`
    names = [name for name in keywords_of(TASKS[task]) if name not in own]
    if task == "invert":
        return [*names, *CHANGES]
    return [*names, "style_template"] if task == "style" else names


def _check_captions(prompt: list[str], images: int, shared: bool) -> None:
    if shared:
        raise ArgumentError("prompt", "has to be one string with `shared`")
    if len(prompt) != images:
        raise ArgumentError(
            "prompt",
            f"has to hold one caption for each of {images} images but holds {len(prompt)}",
            "give a string for all images",
        )


def count_prompts(
    task: str, images: Sequence[Image.Image], prompt: Prompt, task_kwargs: Mapping[str, Any] | None
) -> int:
    """The number of prompts that images are made of."""
    if task == "invert":
        return 1 if is_shared(task_kwargs) else len(images)
    return len(prompt) if isinstance(prompt, list) and task != "fuse" else 1


def calls_of(
    task: str, images: Sequence[Image.Image], prompt: Prompt
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The targets and the caption of each call of the task; one per prompt where they differ."""
    texts = _texts(prompt)
    if task == "style":
        yield images, {}
    elif task == "fuse":
        # a text of tags alone stays, for the error of the task
        yield [*(read(text) or text for text in texts), *images], {}
    elif task == "distill":
        # without weights and tags, which the image pipelines of diffusers read as words
        yield from ((read(text), {}) for text in texts)
    elif isinstance(prompt, list):
        yield from (([image], {"caption": text}) for image, text in zip(images, texts, strict=True))
    else:
        yield images, {"caption": prompt or ""}


def change_caption(
    clip: AnyClip, images: Any, options: SearchOptions, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The arguments of a task whose caption is changed as `CHANGES` among them say, and a remark.

    Args:
        clip: of the search.
        images: of the call.
        options: of the search.
        arguments: of the task, and `CHANGES`, which are left out.
    """
    cleans, prunes = (bool(arguments.get(name)) for name in CHANGES)
    own, remark = {k: v for k, v in arguments.items() if k not in CHANGES}, ""
    if own.get("caption") and cleans:
        target = images if prunes else None
        own["caption"], remark = prepare_caption(clip, own["caption"], options, target)
    elif own.get("caption") and prunes:
        stop = in_time(options, lambda: False)
        own["caption"], remark = pruned(clip, own["caption"], images, options.fit, stop)
    return own, remark


def apply_style(result: StyleResult, subjects: str | list[str], style_template: str) -> list[str]:
    """A prompt for each subject."""
    return [result.apply(subject, style_template) for subject in _texts(subjects)]
