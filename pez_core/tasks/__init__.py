"""The tasks: a CLIP, targets and options in, prompts out."""

from .distill import DistillResult, distill
from .fuse import FuseResult, fuse
from .invert import invert
from .style import StyleResult, check_style_template, style

__all__ = [
    "DistillResult",
    "FuseResult",
    "StyleResult",
    "check_style_template",
    "distill",
    "fuse",
    "invert",
    "style",
]
