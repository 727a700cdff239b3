"""Whether a lower precision is faster on this processor, which is measured."""

from __future__ import annotations

import time
from functools import cache

import torch
import torch.nn.functional as F

# How much faster a product has to be; below that rounding costs more than is gained.
_PAYS = 1.5
_ROWS, _WIDTH, _ROUNDS = 32, 512, 5  # of the products that are timed


@cache
def bfloat16_pays() -> bool:
    """Whether this processor multiplies a few rows faster in bfloat16; measured once."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _WIDTH, generator=draws)
    weight = torch.randn(4 * _WIDTH, _WIDTH, generator=draws)
    plain, low = (x, weight), (x.bfloat16(), weight.bfloat16())
    # the first ones prepare; processors without such instructions are slow enough to stop there
    _seconds(*plain)
    if _seconds(*low) > 4 * _seconds(*plain):
        return False
    rounds = [(_seconds(*plain), _seconds(*low)) for _ in range(_ROUNDS)]
    return min(a for a, _ in rounds) >= _PAYS * min(b for _, b in rounds)


@torch.no_grad()
def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    began = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - began
