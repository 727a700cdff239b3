"""The tasks: a CLIP, targets and options in, prompts out."""

from .distill import DistillResult, check_prompt, distill
from .fuse import FuseResult, fuse
from .invert import invert
from .jobs import JobError
from .style import StyleResult, check_style_template, style

__all__ = [
    "DistillResult",
    "FuseResult",
    "JobError",
    "StyleResult",
    "check_prompt",
    "check_style_template",
    "distill",
    "fuse",
    "invert",
    "style",
]
