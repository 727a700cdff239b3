"""PEZ: short text prompts that work, from images and long prompts.

Names are imported when they are first used, so that `import pez_core` needs neither torch nor
open_clip.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captioners import load_captioner
    from .captions import clean_caption, fit_caption, prepare_caption, prune_caption
    from .clip import PRESETS, AnyClip, Clip, JointClip, clip_from_encoders, load_clip
    from .continuation import caption_wording
    from .diffusion import PezPipeline as PezPipeline
    from .errors import ArgumentError, ArgumentTypeError
    from .options import SearchOptions
    from .pez import PezSettings, search
    from .readability import LanguageModel, load_language_model
    from .results import Candidate, Report, Result, Trajectory
    from .scoring import Pruned, Scores, WordContribution, explain, prune, score
    from .seeds import SeedStatistics, over_seeds
    from .space import PhraseSpace, TokenSpace
    from .swaps import SwapSettings, refine
    from .targets import Avoid, objective_for
    from .tasks import (
        DistillResult,
        FuseResult,
        JobError,
        StyleResult,
        distill,
        fuse,
        invert,
        style,
    )
    from .tracker import Progress
    from .version import __version__ as __version__
    from .vocabulary import UNSAFE_WORDS, Vocabulary

__all__ = [
    "PRESETS",
    "UNSAFE_WORDS",
    "AnyClip",
    "ArgumentError",
    "ArgumentTypeError",
    "Avoid",
    "Candidate",
    "Clip",
    "DistillResult",
    "FuseResult",
    "JobError",
    "JointClip",
    "LanguageModel",
    "PezSettings",
    "PhraseSpace",
    "Progress",
    "Pruned",
    "Report",
    "Result",
    "Scores",
    "SearchOptions",
    "SeedStatistics",
    "StyleResult",
    "SwapSettings",
    "TokenSpace",
    "Trajectory",
    "Vocabulary",
    "WordContribution",
    "caption_wording",
    "clean_caption",
    "clip_from_encoders",
    "distill",
    "explain",
    "fit_caption",
    "fuse",
    "invert",
    "load_captioner",
    "load_clip",
    "load_language_model",
    "objective_for",
    "over_seeds",
    "prepare_caption",
    "prune",
    "prune_caption",
    "refine",
    "score",
    "search",
    "style",
]

_MODULES = {
    "captioners": ("load_captioner",),
    "captions": ("clean_caption", "fit_caption", "prepare_caption", "prune_caption"),
    "continuation": ("caption_wording",),
    "clip": ("PRESETS", "AnyClip", "Clip", "JointClip", "clip_from_encoders", "load_clip"),
    "diffusion": ("PezPipeline",),
    "errors": ("ArgumentError", "ArgumentTypeError"),
    "options": ("SearchOptions",),
    "pez": ("PezSettings", "search"),
    "readability": ("LanguageModel", "load_language_model"),
    "results": ("Candidate", "Report", "Result", "Trajectory"),
    "scoring": ("Pruned", "Scores", "WordContribution", "explain", "prune", "score"),
    "seeds": ("SeedStatistics", "over_seeds"),
    "space": ("PhraseSpace", "TokenSpace"),
    "swaps": ("SwapSettings", "refine"),
    "targets": ("Avoid", "objective_for"),
    "tasks": (
        "DistillResult",
        "FuseResult",
        "JobError",
        "StyleResult",
        "distill",
        "fuse",
        "invert",
        "style",
    ),
    "tracker": ("Progress",),
    "version": ("__version__",),
    "vocabulary": ("UNSAFE_WORDS", "Vocabulary"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
