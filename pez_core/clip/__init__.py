"""The only place that knows open_clip: loading, image preparation, text from embeddings."""

from typing import TypeAlias

from .joint import JointClip
from .load import PRESETS, Preset, load_clip
from .model import Clip

AnyClip: TypeAlias = Clip | JointClip
"""One CLIP, or several as one."""

__all__ = ["PRESETS", "AnyClip", "Clip", "JointClip", "Preset", "load_clip"]
