"""Checks and conversions of the arguments that diffusers users give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from ..clip.images import ImageInput, load_images
from ..errors import ArgumentError, ArgumentTypeError
from ..options import SearchOptions

# arguments of image pipelines that hold one text per prompt, where `prompt` is a list
TEXTS = {f"{name}{k}" for name in ("prompt", "negative_prompt") for k in ("", "_2", "_3", "_4")}


def check_texts(name: str, value: Any, prompts: int) -> None:
    """Raise unless the argument `name` is a string, or a list of one for each prompt."""
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ArgumentTypeError(name, f"has to be a string or a list of strings but is {value!r}")
    if len(value) != prompts:
        raise ArgumentError(
            name,
            f"has to be a string or one for each of {prompts} prompts but holds {len(value)}",
        )


@contextmanager
def named(**names: str) -> Iterator[None]:
    """Show these names for arguments of `pez_core` in errors: `named(images="image")`."""
    try:
        yield
    except ArgumentError as error:
        raise error.renamed(names) from error


def load_pictures(
    name: str, images: ImageInput | Sequence[ImageInput] | torch.Tensor
) -> list[Image.Image]:
    """The images of the argument `name`; a single one as a list."""
    with named(images=name):
        return load_images(images)[0]


def check_options(options: SearchOptions | None) -> SearchOptions:
    """The options; those by default where there are none."""
    if options is None:
        return SearchOptions()
    if not isinstance(options, SearchOptions):
        raise ArgumentTypeError("options", f"has to be a SearchOptions but is {options!r}")
    return options


def keywords_of(function: Callable) -> list[str]:
    """The names of the keyword-only parameters of a function."""
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]


def check_keywords(name: str, given: object, owner: str, allowed: Sequence[str]) -> None:
    """Raise unless the argument `name` is None or a dict with keys that are `allowed`.

    Args:
        name: of the argument.
        given: its value.
        owner: of the allowed keywords, for the message.
        allowed: keywords.
    """
    if given is None:
        return
    if not isinstance(given, dict):
        raise ArgumentTypeError(name, f"has to be a dict but is {given!r}")
    for key in given:
        if key not in allowed:
            raise ArgumentTypeError(
                name,
                f"has the key {key!r}, but {owner} takes {', '.join(allowed)}",
                "give it in `options`" if key in SearchOptions.__dataclass_fields__ else "",
            )


def is_shared(task_kwargs: Mapping[str, Any] | None) -> bool:
    """Whether one prompt is learned for all images."""
    return (task_kwargs or {}).get("shared", False) is not False


def weights_of(task_kwargs: Mapping[str, Any] | None) -> Sequence[float] | None:
    """The weights of the images of one prompt; None: all the same, or a prompt for each."""
    shared = (task_kwargs or {}).get("shared")
    return None if isinstance(shared, bool) else shared


def search_seeds(
    generator: torch.Generator | list[torch.Generator] | None, options: SearchOptions, prompts: int
) -> list[int]:
    """The seed of the search for each prompt. No generator is drawn from.

    Args:
        generator: its initial seed is that of all prompts. A list has the same number of generators
            for each prompt, and the first of each counts. None: the seeds of `options`.
        options: of the search.
        prompts: their number.

    Raises:
        ArgumentError: the numbers of generators or seeds and of prompts differ.
    """
    if generator is None:
        return options.seeds(prompts)
    generators = generator if isinstance(generator, list) else [generator] * prompts
    for one in generators:
        if not isinstance(one, torch.Generator):
            raise ArgumentTypeError(
                "generator",
                f"has to be a torch.Generator or a list of them but holds {one!r}",
                "write torch.Generator().manual_seed(0)",
            )
    each, rest = divmod(len(generators), prompts)
    if not each or rest:
        raise ArgumentError(
            "generator",
            f"has to hold one for each of {prompts} prompts, or one for each of their images, but "
            f"holds {len(generators)}",
        )
    return [one.initial_seed() % 2**63 for one in generators[::each]]


def one_per_prompt(passed: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """Texts as lists, since `negative_prompt` must be a list where `prompt` is one."""
    return {
        name: [value] * prompts if name in TEXTS and isinstance(value, str) else value
        for name, value in passed.items()
    }


def of_prompt(passed: Mapping[str, Any], k: int) -> dict[str, Any]:
    """The arguments for prompt k alone: one text of each list of texts."""
    return {
        name: value[k] if name in TEXTS and isinstance(value, list) else value
        for name, value in passed.items()
    }
