"""Hard prompts for language models (section 5 of the paper); needs the package transformers.

Names are imported when they are first used, so that the command line can list the options of
`pez lm` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..language_models import load_model
    from .data import TASKS, Task, load_task, read_examples
    from .evaluation import PromptEvaluation, evaluate_prompt
    from .methods import METHODS
    from .splits import few_shot
    from .tune import Tuned, TunedPrompt, TuneReport, tune_prompt

__all__ = [
    "METHODS",
    "TASKS",
    "PromptEvaluation",
    "Task",
    "TuneReport",
    "Tuned",
    "TunedPrompt",
    "evaluate_prompt",
    "few_shot",
    "load_model",
    "load_task",
    "read_examples",
    "tune_prompt",
]

_MODULES = {
    "..language_models": ("load_model",),
    ".data": ("TASKS", "Task", "load_task", "read_examples"),
    ".evaluation": ("PromptEvaluation", "evaluate_prompt"),
    ".methods": ("METHODS",),
    ".splits": ("few_shot",),
    ".tune": ("TuneReport", "Tuned", "TunedPrompt", "tune_prompt"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
