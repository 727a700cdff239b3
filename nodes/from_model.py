"""PEZ CLIP from Model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from comfy_api.latest import io
from server import PromptServer

from ..pez_core import AnyClip, JointClip, SearchOptions
from ..pez_core.clip.device import default_dtype
from ..pez_core.clip.encoders import ClipOfEncoders, find_missing
from ..pez_core.options import Effort
from . import models
from .encoders import (
    TextEncoder,
    encoder_of,
    feature_length,
    has_bypassed_lora,
    text_encoders,
)
from .errors import naming_widgets
from .inputs import CATEGORY, PezClip
from .memory import LoadedClip, places
from .reading import LoadedLanguageModel

T = TypeVar("T")

# The smallest public file with the image encoder of a text encoder, by the width of the latter.
_VISION = {
    768: "a whole ViT-L/14 such as clip-vit-large-patch14 (1.71 GB)",
    1024: "clip_vision_h (1.3 GB)",
    1280: "clip_vision_g (3.7 GB)",
}
_NO_LAST_LAYER = "its file lacks its last layer; use PEZ Load CLIP"
_NO_PROJECTION = "no file here has its text projection"
_REMEDY = (
    ": put a whole ViT-L/14 such as clip-vit-large-patch14 (1.71 GB) into models/clip_vision, or "
    "download SD 1.5 in PEZ Load CLIP, the same size"
)


@dataclass(frozen=True)
class Part:
    """A text encoder that is searched.

    Attributes:
        encoder: of the ComfyUI CLIP.
        projection: (features, width) from a file; None: the encoder's own, if it has one.
        trained: ids that it was trained on; None: all.
        clip_vision: the ComfyUI CLIP_VISION that belongs to it; None: texts alone are compared.
    """

    encoder: TextEncoder
    projection: torch.Tensor | None = None
    trained: list[int] | None = None
    clip_vision: Any = None

    def build(self, device: torch.device, dtype: torch.dtype) -> ClipOfEncoders:
        """A searchable copy of the weights as they are now."""
        own = self.encoder.projection() if self.projection is None else self.projection
        images = None if self.clip_vision is None else encoder_of(self.clip_vision)
        remedy = f"connect `clip_vision` of PEZ CLIP from Model; {_vision(self.encoder)} fits"
        return ClipOfEncoders(
            self.encoder.weights(own), images, device, dtype, self.trained, remedy
        )


class ModelClip:
    """The value of a PEZ_CLIP wire that was made from a ComfyUI CLIP; see `LoadedClip`.

    It holds no weights. Each use copies them, and the copy goes with the end of the use.

    Args:
        clip: the ComfyUI CLIP, for its size in ComfyUI's cache.
        parts: of it.
    """

    def __init__(self, clip: Any, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.patcher = clip.patcher
        self.load_device, self.offload_device = places()
        self.reads_like_clip = True  # as all encoders that `text_encoders` finds
        self.language_model: LoadedLanguageModel | None = None

    @contextmanager
    def _built(self) -> Iterator[LoadedClip]:
        dtype = default_dtype(self.load_device)
        with naming_widgets({"text_encoder": "`clip`"}):
            clips = [part.build(self.offload_device, dtype) for part in self.parts]
        loaded = LoadedClip(
            clips[0] if len(clips) == 1 else JointClip(clips),
            self.load_device,
            self.offload_device,
        )
        loaded.language_model = self.language_model
        try:
            yield loaded
        finally:
            loaded.unload()

    @contextmanager
    def in_use(
        self, searches: int = 1, prompt_len: int | None = None, effort: Effort | None = None
    ) -> Iterator[AnyClip]:
        """As `LoadedClip.in_use`."""
        with self._built() as loaded, loaded.in_use(searches, prompt_len, effort) as clip:
            yield clip

    def search(
        self, run: Callable[[AnyClip, SearchOptions], T], options: SearchOptions, targets: int = 1
    ) -> T:
        """As `LoadedClip.search`."""
        with self._built() as loaded:
            return loaded.search(run, options, targets)


class ClipFromModel(io.ComfyNode):
    """A searchable CLIP of the encoders that make images anyway."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PEZ_CLIPFromModel",
            display_name="PEZ CLIP from Model",
            category=CATEGORY,
            description="Searches on the text encoders of your own checkpoint, LoRAs included. "
            "Prompts from texts need nothing else; prompts from images need a CLIP Vision model.",
            search_aliases=["own clip", "clip from checkpoint", "already loaded", "clip vision"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP that will read the prompt, from any loader and behind any "
                    "LoRA.",
                ),
                *_vision_inputs(),
            ],
            outputs=[PezClip.Output("clip", tooltip="For the other PEZ nodes.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> str:
        return "\n".join(str(path) for path in _files())  # a new one may have a projection

    @classmethod
    def execute(
        cls, clip: Any, clip_vision: Any = None, clip_vision_2: Any = None
    ) -> io.NodeOutput:
        visions = [one for one in (clip_vision, clip_vision_2) if one is not None]
        parts, line = choose(clip, visions)
        server, node = PromptServer.instance, cls.hidden.unique_id if cls.hidden else None
        if node and server.client_id is not None:
            server.send_progress_text(line, node, server.client_id)
        return io.NodeOutput(ModelClip(clip, parts), ui={"text": [line]})


def _vision_inputs() -> list[io.Input]:
    return [
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="The image encoder that belongs to a text encoder of `clip`: clip_vision_g "
            "for SDXL, clip_vision_h for SD 2.x, ViT-L/14 for SD 1.5. Without it there are "
            "prompts from texts alone.",
        ),
        io.ClipVision.Input(
            "clip_vision_2",
            optional=True,
            tooltip="One more, for a model with two text encoders. With one, the encoder that it "
            "belongs to is searched alone.",
        ),
    ]


def choose(clip: Any, visions: Sequence[Any]) -> tuple[list[Part], str]:
    """The encoders of a ComfyUI CLIP that can be searched.

    Args:
        clip: from ComfyUI.
        visions: CLIP_VISIONs of ComfyUI; none: texts alone will be compared.

    Returns:
        The encoders, and one line about what is searched and what is not.

    Raises:
        ValueError: nothing can be searched.
    """
    encoders, others = text_encoders(clip)
    lengths = [feature_length(one) for one in visions]
    parts, left = [], []
    for encoder in encoders:
        part, problem = _part(encoder, visions, lengths)
        if part is None:
            left.append(f"{encoder.name} ({problem})")
        else:
            parts.append(part)
    left += [f"{name} (no CLIP)" for name in others]
    unused = _unused(visions, lengths, parts)
    if not parts:
        problems = "; ".join([*left, *unused]) or "it has no text encoder"
        raise ValueError(
            f"`clip` has nothing that can be searched: {problems}. Models that read prompts "
            "with T5 or a language model alone are best prompted with plain sentences."
            if not encoders
            else f"`clip` has nothing that can be searched: {problems}."
        )
    return parts, _line(clip, parts, left, unused)


def _part(
    encoder: TextEncoder, visions: Sequence[Any], lengths: Sequence[int | None]
) -> tuple[Part | None, str]:
    """An encoder that can be searched; or None, and the reason."""
    if encoder.lacks_last_layer():
        return None, _NO_LAST_LAYER
    own = encoder.projection()
    projection, trained = None, None
    if own is None:
        projection, trained = find_missing(encoder.table, files=_files(), layers=encoder.layers)
    if not visions:
        return Part(encoder, projection, trained), ""
    found = own if projection is None else projection
    if found is None:
        return None, _NO_PROJECTION + _REMEDY * (encoder.width == 768)
    for vision, length in zip(visions, lengths, strict=True):
        if length == len(found):
            return Part(encoder, projection, trained, vision), ""
    return None, f"its CLIP_VISION is not connected: {_vision(encoder)}"


def _files() -> list[Path]:
    """Files that may hold the projection of a text encoder."""
    return [Path(path) for _, path in models.weights_files()]


def _unused(
    visions: Sequence[Any], lengths: Sequence[int | None], parts: Sequence[Part]
) -> list[str]:
    """What is to be said of CLIP_VISIONs that belong to no encoder."""
    used = [part.clip_vision for part in parts]
    found = []
    for k, (vision, length) in enumerate(zip(visions, lengths, strict=True), start=1):
        if any(vision is one for one in used):
            continue
        why = f"no encoder has {length} features" if length else "its features cannot be compared"
        found.append(f"CLIP_VISION {k} ({why})")
    return found


def _line(clip: Any, parts: Sequence[Part], left: Sequence[str], unused: Sequence[str]) -> str:
    searched = ", ".join(part.encoder.name for part in parts)
    if all(part.clip_vision is None for part in parts):
        searched += ", for texts alone (for images connect clip_vision)"
    line = f"Searched: {searched}."
    if left or unused:
        line += f" Left out: {'; '.join([*left, *unused])}."
    if has_bypassed_lora(clip):
        line += " LoRAs in bypass mode do not count."
    return line


def _vision(encoder: TextEncoder) -> str:
    return _VISION.get(encoder.width, f"one of {encoder.width} features")
