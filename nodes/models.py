"""The CLIPs that an artist can choose, and their files in ComfyUI's folders."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile

import folder_paths

from ..pez_core import AnyClip, JointClip, load_clip
from ..pez_core.clip.files import INDEX, find_clip, is_index, is_safetensors
from ..pez_core.clip.weights import download_size, fetch_weights
from . import consent
from .consent import FOLDER

log = logging.getLogger(__name__)

_FIRST_PART = re.compile(r"-00001-of-\d{5}\.safetensors$")

FOLDERS = (FOLDER, "clip_vision", "text_encoders")
"""Folders of ComfyUI that may hold files with both towers of a CLIP."""


@dataclass(frozen=True)
class Weights:
    """Weights that open_clip publishes."""

    name: str
    pretrained: str

    @property
    def file(self) -> str:
        """The name of the file in `models/pez`."""
        return f"{self.name}.{self.pretrained}.safetensors"


VIT_L = Weights("ViT-L-14", "openai")
VIT_H = Weights("ViT-H-14", "laion2b_s32b_b79k")
VIT_BIGG = Weights("ViT-bigG-14", "laion2b_s39b_b160k")

BUNDLED = "bundled emoji CLIP (no download)"
PRESETS = {
    "SD 1.5 (ViT-L/14)": [VIT_L],
    "SD 2.x (ViT-H/14)": [VIT_H],
    "SDXL (L + bigG)": [VIT_L, VIT_BIGG],
}


def register_folder() -> None:
    """Register `models/pez`, so that `extra_model_paths.yaml` can move it."""
    path = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:  # which matters to a download alone, and ends it with an error
        log.debug("models/pez cannot be made: %s", error)


def choices() -> list[str]:
    """The entries of the model list: presets, the bundled CLIP, and files with a whole CLIP."""
    found = [choice for choice, path in weights_files() if _holds_clip(path)]
    return [*PRESETS, BUNDLED, *found]


def weights_files() -> Iterator[tuple[str, str]]:
    """The safetensors files in ComfyUI's folders: how the model list has them, and their paths.

    With the index of several parts, which ComfyUI itself does not list.
    """
    for folder in FOLDERS:
        listed = _files_in(folder)
        indices = {_FIRST_PART.sub(INDEX, one) for one in listed if _FIRST_PART.search(one)}
        for file in [*listed, *sorted(indices.difference(listed))]:
            path = folder_paths.get_full_path(folder, file)
            if path and is_safetensors(Path(path)):
                yield f"{folder}/{file}".replace("\\", "/"), path


def _files_in(folder: str) -> list[str]:
    """The files in one of ComfyUI's folders; none where a drive or the folder is gone."""
    try:
        return folder_paths.get_filename_list(folder)
    except (OSError, KeyError) as error:
        log.debug("models/%s cannot be listed: %s", folder, error)
        return []


def file_of(choice: str) -> Path | None:
    """The file that a choice like `pez/my-clip.safetensors` names, inside ComfyUI's folders."""
    if not isinstance(choice, str):  # a prompt may hold anything
        return None
    folder, _, file = choice.partition("/")
    path = folder_paths.get_full_path(folder, file) if folder in FOLDERS else None
    return Path(path) if path else None


def load(
    choice: str,
    download: bool,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> AnyClip:
    """Load the chosen CLIP.

    Args:
        choice: one of `choices()`.
        download: fetch weights that are missing into `models/pez`, if a person at this machine has
            agreed to it (see `consent`).
        progress: called with bytes that are here and all bytes of the file that is being fetched.
        options: `device`, `dtype` and `activation` of `load_clip`.

    Raises:
        ValueError: an unknown choice, or weights that are missing; with folder, name and size.
        OSError: the download failed.
    """
    with _quiet_open_clip():
        return _load(choice, download, progress, **options)


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Inside, the ten lines that open_clip logs for each model stay out of ComfyUI's log."""
    root = logging.getLogger()  # open_clip has no logger of its own
    root.addFilter(_is_worth_a_line)
    try:
        yield
    finally:
        root.removeFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "open_clip" not in Path(record.pathname).parts


def _load(
    choice: str, download: bool, progress: Callable[[int, int], None] | None, **options
) -> AnyClip:
    if choice == BUNDLED:
        return load_clip("emoji-clip", **options)
    if not isinstance(choice, str) or choice not in PRESETS:
        path = file_of(choice)
        if path is None:
            raise ValueError(
                f"`model` is {choice!r}, which is not on this disk: put the file into "
                f"{_places()} and press R, or choose another."
            )
        return load_clip(str(path), **options)
    wanted = PRESETS[choice]
    missing = [weights for weights in wanted if _path(weights) is None]
    if missing and not download:
        raise ValueError(_how_to_get(choice, missing))
    if missing and not consent.agreed(choice):
        raise ValueError(_how_to_agree(choice, missing))
    for weights in missing:
        folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
        path = folder / weights.file
        _check_writable(folder)
        fetch_weights(weights.name, weights.pretrained, path, progress, only_safetensors=True)
    # `load_clip` finds the activation of the weights by the name of the file
    clips = [load_clip(str(_path(weights)), **options) for weights in wanted]
    return clips[0] if len(clips) == 1 else JointClip(clips)


def _path(weights: Weights) -> Path | None:
    path = folder_paths.get_full_path(FOLDER, weights.file)
    return Path(path) if path else None


def _check_writable(folder: Path) -> None:
    """Raise an error before anything is fetched that cannot be stored."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`model` has to be downloaded into {folder}, where ComfyUI may not write ({error}): "
            "allow it, or give another folder for `pez` in extra_model_paths.yaml."
        ) from error


def _how_to_agree(choice: str, missing: list[Weights]) -> str:
    total = sum(download_size(w.name, w.pretrained) for w in missing)
    return (
        f"{choice} is not on this disk yet, and `download` was on when this workflow was opened. "
        f"If you want {total:.2f} GB in {folder_paths.get_folder_paths(FOLDER)[0]}, switch "
        "`download` off and on again by hand, then run. Nothing was downloaded."
    )


def _how_to_get(choice: str, missing: list[Weights]) -> str:
    total = sum(download_size(w.name, w.pretrained) for w in missing)
    files = ", ".join(f"{w.file} ({download_size(w.name, w.pretrained):.2f} GB)" for w in missing)
    return (
        f"{choice} is not on this disk yet. Turn on `download` to fetch {total:.2f} GB into "
        f"{folder_paths.get_folder_paths(FOLDER)[0]}, or put there by hand: {files}. The README "
        f"has the links. To try PEZ without a download choose {BUNDLED!r}."
    )


def _places() -> str:
    return " or ".join(f"models/{folder}" for folder in FOLDERS)


def states_of(path: Path) -> tuple[tuple[int, int], ...]:
    """When the file of a CLIP was changed, and its size; for an index those of its parts, too."""
    parts = sorted(path.parent.glob("*-of-*")) if is_index(path) else []
    return tuple((one.st_mtime_ns, one.st_size) for one in map(os.stat, (path, *parts)))


def _holds_clip(path: str) -> bool:
    try:
        states = states_of(Path(path))
    except OSError:  # of a drive that has gone, or a link to nothing
        return False
    return _header_holds_clip(path, states)


@lru_cache(maxsize=1024)
def _header_holds_clip(path: str, states: tuple[tuple[int, int], ...]) -> bool:
    return find_clip(Path(path)) is not None
