"""PEZ Load CLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..pez_core.clip.device import default_dtype
from ..pez_core.clip.models import ACTIVATIONS
from . import models
from .errors import naming_widgets
from .inputs import CATEGORY, RARE, PezClip
from .live import show_text
from .memory import LoadedClip, places

AUTOMATIC = "automatic"
_PRECISIONS = {
    AUTOMATIC: None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class LoadCLIP(io.ComfyNode):
    """A CLIP with both towers, under ComfyUI's model manager."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PEZ_LoadCLIP",
            display_name="PEZ Load CLIP",
            category=CATEGORY,
            description="Loads a CLIP with image encoder and text encoder. Choose the one of the "
            "image model that will get the prompts.",
            search_aliases=["clip", "load clip for prompts", "image encoder", "pez model"],
            inputs=_inputs(),
            outputs=[PezClip.Output("clip", tooltip="For the other PEZ nodes.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, model: str) -> bool:
        # A file that is missing may never be needed: a kept prompt works without it.
        return True

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: object) -> tuple[tuple[int, int], ...] | None:
        path = models.file_of(model) if model else None  # None where it comes through a wire
        return models.states_of(path) if path else None

    @classmethod
    def execute(
        cls,
        model: str,
        download: bool,
        precision: str = AUTOMATIC,
        device: str = "default",
        activation: str = AUTOMATIC,
    ) -> io.NodeOutput:
        load_device, offload_device = places(device == "cpu")
        dtype = _PRECISIONS[precision]
        if dtype is None and load_device.type != "cpu":  # it is loaded into main memory first
            dtype = default_dtype(load_device)
        with naming_widgets({"name": "`model`", "pretrained": "`model`"}):
            clip = models.load(
                model,
                download,
                _progress(cls.hidden),
                device=offload_device,
                dtype=dtype,
                activation=None if activation == AUTOMATIC else activation,
            )
        return io.NodeOutput(LoadedClip(clip, load_device, offload_device))


def _inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "model",
            options=models.choices(),
            default=next(iter(models.PRESETS)),
            tooltip="The model that you make images with. The list also has files in models/pez, "
            "models/clip_vision and models/text_encoders that hold a whole CLIP.",
        ),
        io.Boolean.Input(
            "download",
            default=False,
            tooltip="On: download the model into models/pez if it is missing. Off: download "
            "nothing.",
        ),
        io.Combo.Input(
            "precision",
            options=list(_PRECISIONS),
            default=AUTOMATIC,
            **RARE,
            tooltip="automatic: bfloat16 on NVIDIA cards that support it, float16 on older ones, "
            "float32 elsewhere.",
        ),
        io.Combo.Input(
            "device",
            options=["default", "cpu"],
            default="default",
            **RARE,
            tooltip="cpu: search on the processor, which is slow and leaves the graphics card to "
            "other models.",
        ),
        io.Combo.Input(
            "activation",
            options=[AUTOMATIC, *ACTIVATIONS],
            default=AUTOMATIC,
            **RARE,
            tooltip="Activation function of a CLIP file, which its weights do not show. automatic: "
            "by the name of the file, or else the one with which pictures and texts agree most.",
        ),
    ]


def _progress(hidden: Any) -> Callable[[int, int], None]:
    """A callback that shows how much of a file is downloaded, and ends with a cancelled run."""
    bar = ProgressBar(1)

    def progress(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        # megabytes: some hooks keep the numbers in 32 bits
        bar.update_absolute(done >> 20, max(total >> 20, 1))
        if done == total:
            show_text(hidden, f"downloaded {total / 1e9:.2f} GB")

    return progress
