"""PEZ: images and long prompts into short text prompts that work."""

from .clip import PRESETS, Clip, load_clip
from .search import Progress, Settings, search
from .space import TokenSpace
from .tasks import Candidate, Result, invert

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Candidate",
    "Clip",
    "Progress",
    "Result",
    "Settings",
    "TokenSpace",
    "invert",
    "load_clip",
    "search",
]
