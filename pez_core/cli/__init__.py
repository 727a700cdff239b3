"""The `pez` command.

Nothing here imports torch or open_clip until a command runs, so that `pez --help` starts at once.
"""

from .main import main

__all__ = ["main"]
