"""Sockets and widgets that several nodes share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pez_core.options import EFFORTS, FITS, WORDINGS, SearchOptions

PezClip = io.Custom("PEZ_CLIP")
PezVocabulary = io.Custom("PEZ_VOCABULARY")

IMAGES = [io.Image, io.ClipVisionOutput]
"""Types of a socket for images: pictures, or those that CLIP Vision Encode has encoded."""

CATEGORY = "PEZ"
PAPER = "paper"
"""The `effort` that is the published algorithm alone, and the only one that reads `steps`."""

RARE = {"optional": True, "advanced": True}
"""Options of a widget that the page hides until a person asks for all of them."""

_DEFAULTS = SearchOptions()


def text(name: str, tooltip: str, **options: Any) -> io.Input:
    """A text box that is empty at first."""
    return io.String.Input(name, default="", tooltip=tooltip, **options)


def images(name: str, tooltip: str) -> io.Input:
    """A socket for images, encoded ones too, that only a search uses; a kept prompt needs none."""
    return io.MultiType.Input(name, IMAGES, lazy=True, optional=True, tooltip=tooltip)


def clip(**options: Any) -> io.Input:
    return PezClip.Input(
        "clip",
        tooltip="From PEZ Load CLIP, or from PEZ CLIP from Model. Choose the CLIP of the image "
        "model that will get the prompt.",
        **options,
    )


def search(prompt_len: int, prompt_len_tooltip: str) -> list[io.Input]:
    """The options of a search that people change most, in their order on the node."""
    return [
        io.Int.Input(
            "prompt_len",
            default=prompt_len,
            min=0 if prompt_len == 0 else 1,
            max=75,
            tooltip=prompt_len_tooltip,
        ),
        _effort(),
        io.Int.Input(
            "restarts",
            default=_DEFAULTS.restarts,
            min=1,
            max=64,
            tooltip="How many times to search, each time from another random start. The best "
            "result becomes the prompt; all of them are candidates to choose from. "
            "Without a fast graphics card each search takes as long as the first.",
        ),
        io.Int.Input(
            "seed",
            default=_DEFAULTS.seed,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate="fixed",
            tooltip="Seed of the random prompts that the search starts from. Another seed finds "
            "another prompt.",
        ),
        _readability(),
    ]


def _effort() -> io.Input:
    return io.Combo.Input(
        "effort",
        options=list(EFFORTS),
        default=_DEFAULTS.effort,
        tooltip="How long to search. fast takes about a third of the time of balanced, best about "
        "five times as long. These three improve several variants of a prompt, word by word. "
        "paper runs the published algorithm alone, for the number of `steps`.",
    )


def _readability() -> io.Input:
    return io.Float.Input(
        "readability",
        default=_DEFAULTS.readability,
        min=0.0,
        max=1.0,
        step=0.05,
        optional=True,
        tooltip="Above 0 a language model scores the words, too, so that the prompt reads more "
        "like text. Try 0.3; near 1 the images get less similar. 0: none if `wording` is free, "
        "else 0.5.",
    )


def words() -> list[io.Input]:
    """The words that may appear in a prompt."""
    return [
        text(
            "block",
            optional=True,
            tooltip="Words that must not appear, separated by commas. A click on a word in the "
            "live view adds it here.",
        ),
        PezVocabulary.Input(
            "vocabulary",
            optional=True,
            lazy=True,
            tooltip="The words that may appear, from PEZ Vocabulary. Without it: the words of an "
            "English dictionary, or every token if `effort` is paper; unsafe words are blocked.",
        ),
    ]


def rarely_used() -> list[io.Input]:
    """Limits of the search, and settings of the optimiser."""
    return [
        io.Float.Input(
            "time_limit",
            default=0.0,
            min=0.0,
            max=86400.0,
            step=1.0,
            **RARE,
            tooltip="Seconds for the whole node. Above 0 the search continues until the limit, "
            "whatever its `effort`; with paper it ends earlier if its steps are done. 0: no limit.",
        ),
        io.Int.Input(
            "steps",
            default=EFFORTS[PAPER].steps,
            min=1,
            max=20000,
            **RARE,
            tooltip="Number of steps if `effort` is paper. The other efforts ignore it.",
        ),
        *_optimiser(),
    ]


def _optimiser() -> list[io.Input]:
    return [
        io.Float.Input(
            "lr",
            default=_DEFAULTS.lr,
            min=0.001,
            max=10.0,
            step=0.001,
            **RARE,
            tooltip="Size of the steps of the search. A higher value changes more words per "
            "step. The default suits nearly all images. It is the learning rate of "
            "AdamW.",
        ),
        io.Float.Input(
            "weight_decay",
            default=_DEFAULTS.weight_decay,
            min=0.0,
            max=10.0,
            step=0.01,
            **RARE,
            tooltip="Keeps the search away from extreme values. The default suits nearly all "
            "images. It is the weight decay of AdamW.",
        ),
        io.Int.Input(
            "patience",
            default=0,
            min=0,
            max=20000,
            **RARE,
            tooltip="Stops early: a search ends when its prompt has not improved for this "
            "many steps. 0: never.",
        ),
    ]


def keep() -> list[io.Input]:
    """The switch that repeats a learned prompt, and the widget that stores it."""
    return [
        io.Boolean.Input(
            "keep",
            default=False,
            optional=True,
            label_on="prompt: kept",
            label_off="prompt: new",
            tooltip="On: return the prompt that was learned last, at once, without the CLIP or the "
            "images. It is stored in the workflow, so this also works for others who open the "
            "workflow.",
        ),
        text(
            "kept",
            **RARE,
            socketless=True,
            tooltip="The learned prompt. The node fills this in.",
        ),
    ]


def repeats() -> io.Input:
    """Behind all inputs that are older, so that the values of older workflows keep their places."""
    return io.Boolean.Input(
        "repeats",
        default=_DEFAULTS.repeats,
        optional=True,
        advanced=True,
        tooltip="Allow a word to occur twice. If `effort` is paper, it always may.",
    )


def fit() -> io.Input:
    """Behind `repeats`, which is older."""
    return io.Combo.Input(
        "fit",
        options=list(FITS),
        default=_DEFAULTS.fit,
        **RARE,
        tooltip="How an image becomes square for the CLIP. crop: as in its training, for most "
        "CLIPs the centre of the image. pad: the whole image with bars. stretch: the whole image, "
        "distorted.",
    )


def wording(default: str) -> io.Input:
    """Behind `fit`, which is older."""
    return io.Combo.Input(
        "wording",
        options=list(WORDINGS),
        default=default,
        optional=True,
        tooltip="What the prompt reads like. free: any words in any order. tags: short phrases "
        "with commas. sentence: a description. With tags and sentence a small language model and "
        "the CLIP write the prompt together. With `effort` paper, or a CLIP with another tokenizer "
        "than CLIP's own, every prompt is free.",
    )
