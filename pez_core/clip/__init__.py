"""The only place that knows open_clip: loading, image preparation, text from embeddings."""

from .load import PRESETS, Preset, load_clip
from .model import Clip

__all__ = ["PRESETS", "Clip", "Preset", "load_clip"]
