"""Where files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def models_folder() -> Path:
    """The folder of weights that people place by hand: `PEZ_MODELS`, else `~/.cache/pez`."""
    folder = os.environ.get("PEZ_MODELS") or os.path.join("~", ".cache", "pez")
    return Path(os.path.expanduser(folder))
