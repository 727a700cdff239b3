"""Hard prompts for language models (section 5 of the paper); needs the package transformers."""

from ..language_models import load_model
from .data import TASKS, Task, load_task, read_examples
from .methods import METHODS
from .tune import Evaluation, Tuned, TunedPrompt, evaluate, few_shot, tune_prompt

__all__ = [
    "METHODS",
    "TASKS",
    "Evaluation",
    "Task",
    "Tuned",
    "TunedPrompt",
    "evaluate",
    "few_shot",
    "load_model",
    "load_task",
    "read_examples",
    "tune_prompt",
]
