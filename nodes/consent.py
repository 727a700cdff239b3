"""Which models the person at this machine has agreed to download.

`download` is a widget, and a workflow from somebody else may come with it switched on. So the page
tells the server when a person switches it on by hand, and the server keeps that beside the models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import folder_paths

FOLDER = "pez"
_FILE = "downloads.json"


def agreed(model: str) -> bool:
    """Whether a person has agreed to download this model."""
    return model in _read()


def agree(model: str) -> None:
    """Remember that a person has agreed to download this model.

    Raises:
        OSError: the folder of the models cannot be written.
    """
    models = _read()
    if model in models:
        return
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(sorted({*models, model}), ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)


def _path() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / _FILE


def _read() -> set[str]:
    try:
        models = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    return (
        {model for model in models if isinstance(model, str)} if isinstance(models, list) else set()
    )
