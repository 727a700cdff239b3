"""Rivals of PEZ, to compare it with at the same number of steps or seconds.

All but the interrogator are called like `pez_core.search.search`, and keep and report the best
prompt by the same `Tracker`.
"""

from .gcg import gcg
from .hotflip import autoprompt
from .interrogator import Interrogation, Interrogator, load_bank
from .projected import autoprompt_sgd, fluent_prompt
from .soft import SoftProgress, soft_prompt

__all__ = [
    "Interrogation",
    "Interrogator",
    "SoftProgress",
    "autoprompt",
    "autoprompt_sgd",
    "fluent_prompt",
    "gcg",
    "load_bank",
    "soft_prompt",
]
