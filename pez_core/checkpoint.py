"""A search in a file, from which it goes on where it was."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

log = logging.getLogger(__name__)

# What a text begins with that stands for something too long to be kept.
DIGEST = "sha256:"


class FileCheckpoint:
    """Keeps a search in one safetensors file; see `pez_core.search.Checkpoint`.

    A file is written whole beside the old one and then takes its place, so that a machine that
    fails leaves one of the two.

    Args:
        path: of the file; its folder has to exist.
        search: what the search is, as JSON: a search goes on only from a file that holds the same.
        every: steps between two saves, at least 1.

    Raises:
        ValueError: the file holds another search, or is none of these files. Says what differs.
    """

    def __init__(self, path: str | Path, search: dict[str, Any], every: int = 100) -> None:
        self.path, self.every = Path(path), every
        # numbers of numpy are as good as others
        self.search = json.loads(json.dumps(search, default=lambda value: value.item()))
        if not self.path.name or self.path.is_dir() or not self.path.parent.is_dir():
            raise ValueError(f"`checkpoint` is {str(path)!r}, which is a folder, or lies in none.")
        if self.path.exists():
            self._check(self._metadata()["search"])
        try:
            self._beside.touch()
            self._beside.unlink()
        except OSError as error:
            raise ValueError(
                f"`checkpoint` is {str(path)!r}, where nothing can be written ({error})."
            ) from error

    @property
    def _beside(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def _check(self, other: dict[str, Any]) -> None:
        names = sorted(self.search.keys() | other.keys())
        # a digest differs for whatever went into it, so what is named itself comes first
        for name in sorted(names, key=lambda name: str(self.search.get(name)).startswith(DIGEST)):
            ours, theirs = self.search.get(name), other.get(name)
            if ours != theirs:
                how = f"with `{name}` {_short(theirs)} where it now is {_short(ours)}"
                if str(ours).startswith(DIGEST):
                    how = f"with another `{name}`"
                raise ValueError(
                    f"`checkpoint` is {str(self.path)!r}, which holds a search {how}; remove the "
                    "file or name another."
                )

    def _metadata(self) -> dict[str, Any]:
        try:
            with safe_open(self.path, "pt") as file:
                content = json.loads(file.metadata()["pez"])
                return {name: content[name] for name in ("search", "state")}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`checkpoint` is {str(self.path)!r}, which is no checkpoint of a search; name "
                "another file."
            ) from error

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None: nothing yet."""
        if not self.path.exists():
            return None
        state = self._metadata()["state"]
        with safe_open(self.path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dict
                *path, name = key.split("/")
                inner = state
                for part in path:
                    inner = inner[part]
                inner[name] = file.get_tensor(key)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state`: nested dicts of tensors and of what JSON can hold.

        Where the disk is full the search goes on, and a warning is logged.
        """
        tensors: dict[str, torch.Tensor] = {}
        rest = _split(state, "", tensors)
        metadata = {"pez": json.dumps({"search": self.search, "state": rest})}
        try:
            save_file(tensors, self._beside, metadata)
            with open(self._beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._beside, self.path)
        except (OSError, SafetensorError) as error:
            log.warning("%s could not be written (%s); the search goes on", self.path, error)


def _split(state: dict[str, Any], prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`state` without its tensors, which go into `tensors` under their paths."""
    rest: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            rest[name] = _split(value, f"{prefix}{name}/", tensors)
        elif isinstance(value, torch.Tensor):
            # a copy, since tensors that share memory cannot be saved
            tensors[prefix + name] = value.detach().cpu().clone().contiguous()
        else:
            rest[name] = value
    return rest


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
