"""CLIPs by the names that people use for them. Imports neither torch nor open_clip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BUNDLED = {"emoji-clip": Path(__file__).parent.parent / "models" / "emoji-clip"}
"""The CLIPs that come with this package, and their folders."""

ACTIVATIONS = ("gelu", "quick_gelu")
"""Activations that the CLIP in a file may have."""


@dataclass(frozen=True)
class Preset:
    """A CLIP that people choose by the image model that it belongs to.

    Attributes:
        name, pretrained: open_clip's architecture and tag.
        purpose: the models that read prompts with this CLIP.
        size: of the download in GB.
        repository: where the Hugging Face Hub has the weights.
    """

    name: str
    pretrained: str
    purpose: str
    size: float
    repository: str


PRESETS = (
    Preset(
        "ViT-L-14",
        "openai",
        "Stable Diffusion 1.5, first encoder of SDXL",
        1.71,
        "timm/vit_large_patch14_clip_224.openai",
    ),
    Preset(
        "ViT-H-14",
        "laion2b_s32b_b79k",
        "Stable Diffusion 2.x",
        3.94,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ),
    Preset(
        "ViT-bigG-14",
        "laion2b_s39b_b160k",
        "second encoder of SDXL",
        10.16,
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    ),
    Preset(
        "ViT-B-32",
        "laion2b_s34b_b79k",
        "small and fast, for a first look",
        0.61,
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ),
)

TRANSFORMERS_NAMES = {
    "openai/clip-vit-large-patch14": "ViT-L-14:openai",
    "openai/clip-vit-base-patch32": "ViT-B-32:openai",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H-14:laion2b_s32b_b79k",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": "ViT-bigG-14:laion2b_s39b_b160k",
}
"""Repositories that hold the same weights for transformers, and open_clip's names for them."""


def find_preset(name: str, pretrained: str) -> Preset | None:
    """The preset of an architecture and tag, or None."""
    return next((p for p in PRESETS if (p.name, p.pretrained) == (name, pretrained)), None)
