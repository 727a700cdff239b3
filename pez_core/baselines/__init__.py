"""Other methods, for comparison with PEZ at the same number of steps or seconds.

All except the interrogator and VGD have the signature of `pez_core.search`, and keep and report the
best prompt with the same `Tracker`.
"""

from .gcg import gcg
from .hotflip import autoprompt
from .interrogator import Interrogation, Interrogator, load_bank
from .projected import autoprompt_sgd, fluent_prompt
from .soft import SoftProgress, soft_prompt
from .vgd import vgd

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
    "vgd",
]
