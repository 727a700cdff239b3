"""Whether a lower precision is faster on this processor, which is measured."""

from __future__ import annotations

import time
from functools import cache

import torch
import torch.nn.functional as F

# How much faster a product has to be; below that rounding costs more than is gained.
_PAYS = 1.5
# Rows and columns of the products that are timed. The second is long enough, some milliseconds,
# that other programs on the processor hardly change the ratio.
_SHORT, _LONG, _ROUNDS = (32, 512), (512, 1024), 4


@cache
def bfloat16_pays() -> bool:
    """Whether this processor multiplies faster in bfloat16, measured once in 0.1 s."""
    plain, low = _product(*_SHORT, torch.float32), _product(*_SHORT, torch.bfloat16)
    for product in (plain, low):
        _seconds(product)  # the first one of a dtype prepares
    if _seconds(low) > 4 * _seconds(plain):  # without such instructions
        return False
    plain, low = _product(*_LONG, torch.float32), _product(*_LONG, torch.bfloat16)
    rounds = [(_seconds(plain), _seconds(low)) for _ in range(_ROUNDS)]
    return min(a for a, _ in rounds) >= _PAYS * min(b for _, b in rounds)


def _product(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a matrix, with values that cost nothing special."""
    return torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)


@torch.no_grad()
def _seconds(product: tuple[torch.Tensor, torch.Tensor]) -> float:
    began = time.perf_counter()
    F.linear(*product)
    return time.perf_counter() - began
