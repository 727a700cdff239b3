"""PEZ: images and long prompts into short text prompts that work."""

from typing import TYPE_CHECKING

from .clip import PRESETS, AnyClip, Clip, JointClip, load_clip
from .judge import Pruned, Scores, WordContribution, explain, prune, score
from .learn import Candidate, Result
from .readability import LanguageModel, load_language_model
from .refine import Refinement, refine
from .search import Progress, Settings, search
from .space import PhraseSpace, TokenSpace
from .tasks import Concatenated, Distilled, Style, concatenate, distill, extract_style, invert
from .version import read_version
from .vocabulary import UNSAFE_WORDS, Vocabulary

if TYPE_CHECKING:
    from .diffusion import PezPipeline as PezPipeline

__version__ = read_version()

__all__ = [
    "PRESETS",
    "UNSAFE_WORDS",
    "AnyClip",
    "Candidate",
    "Clip",
    "Concatenated",
    "Distilled",
    "JointClip",
    "LanguageModel",
    "PhraseSpace",
    "Progress",
    "Pruned",
    "Refinement",
    "Result",
    "Scores",
    "Settings",
    "Style",
    "TokenSpace",
    "Vocabulary",
    "WordContribution",
    "concatenate",
    "distill",
    "explain",
    "extract_style",
    "invert",
    "load_clip",
    "load_language_model",
    "prune",
    "refine",
    "score",
    "search",
]


def __getattr__(name: str) -> type:
    # diffusers and transformers take seconds to import, and not everyone has them
    if name == "PezPipeline":
        try:
            from .diffusion import PezPipeline
        except ModuleNotFoundError as error:
            raise ImportError(
                f"PezPipeline needs the package {error.name}; install the extra `diffusers`: "
                "pip install -e '.[diffusers]' in the clone."
            ) from error
        return PezPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
