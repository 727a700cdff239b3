"""The work of text towers: what a search with a CLIP of usual size costs, on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class TowerWork:
    """The work of the text towers of all CLIPs.

    Attributes:
        flops: floating-point operations: two for each weight of the tower's blocks and each token
            that goes through them, forward or backward. The backward pass counts as much as the
            forward pass, since the weights need no gradient. The attention between tokens, the
            image tower, language models and image models do not count.
    """

    flops: float = 0.0


_ACTIVE: ContextVar[tuple[TowerWork, ...]] = ContextVar("tower work", default=())


@contextmanager
def counted(alone: bool = False) -> Iterator[TowerWork]:
    """Count the work of text towers until the end of the block, in this thread.

    A block inside another one counts for both.

    Args:
        alone: the blocks around this one do not count its work.
    """
    work = TowerWork()
    token = _ACTIVE.set((work,) if alone else (*_ACTIVE.get(), work))
    try:
        yield work
    finally:
        _ACTIVE.reset(token)


def count(flops: float) -> None:
    """Add work to all blocks of `counted` that the call is in."""
    for work in _ACTIVE.get():
        work.flops += flops
