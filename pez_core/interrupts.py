"""Ctrl-C that keeps the results so far."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(note: str = "") -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that the best so far is kept; a second one ends.

    Only the main thread of a process can do so; in others the flag stays unset.

    Args:
        note: printed to stderr at the first Ctrl-C.

    Yields:
        A function that returns whether Ctrl-C was pressed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed: list[bool] = []

    def on_interrupt(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        if note:
            print(f"\npez: {note}", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
