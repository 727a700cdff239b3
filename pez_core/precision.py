"""Whether a lower precision is faster on this processor, which is measured."""

from __future__ import annotations

import time
from functools import cache

import torch
import torch.nn.functional as F

# How much faster a product has to be; below that rounding costs more than is gained.
_PAYS = 1.5
# Rows and columns of the products that are timed, and how often: of several samples the shortest
# is taken, since other programs may interrupt each.
_SHORT, _LONG, _ROUNDS = (32, 512), (512, 1024), 5


@cache
def bfloat16_pays() -> bool:
    """Whether this processor multiplies faster in bfloat16, measured once in 0.1 s."""
    plain, low = _shortest(*_SHORT)
    if low > 4 * plain:  # without such instructions long products would take seconds
        return False
    plain, low = _shortest(*_LONG)
    return plain >= _PAYS * low


def _shortest(rows: int, width: int) -> tuple[float, float]:
    """The seconds of a product in float32 and in bfloat16, the least of several samples."""
    plain, low = (_product(rows, width, dtype) for dtype in (torch.float32, torch.bfloat16))
    rounds = [(_seconds(plain), _seconds(low)) for _ in range(_ROUNDS)]
    return min(a for a, _ in rounds), min(b for _, b in rounds)


def _product(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a matrix, with values that cost nothing special."""
    return torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)


@torch.no_grad()
def _seconds(product: tuple[torch.Tensor, torch.Tensor]) -> float:
    began = time.perf_counter()
    F.linear(*product)
    return time.perf_counter() - began
