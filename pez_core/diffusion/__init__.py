"""PEZ for diffusers. The only part of `pez_core` that needs diffusers and transformers."""

from .clip_model import PezClipModel

__all__ = ["PezClipModel"]
