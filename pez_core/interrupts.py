"""Ctrl-C that keeps what was found."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(said: str = "") -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, so that the best so far is kept; a second one ends.

    `said` is printed at the first.
    """
    pressed = []

    def on_interrupt(signum, frame) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        if said:
            print(f"\npez: {said}", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
