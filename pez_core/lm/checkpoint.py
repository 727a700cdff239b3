"""Saves a search to a file from which it resumes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ArgumentError

log = logging.getLogger(__name__)

# Prefix of a hash that stands for a value too long to be stored.
DIGEST = "sha256:"


def digest(*parts: bytes) -> str:
    """A hash of the parts, each with its length, that a checkpoint stores in their place."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return DIGEST + whole.hexdigest()[:16]


class FileCheckpoint:
    """Saves a search to one safetensors file; see the protocol `Checkpoint` of the tracker.

    A file is written beside the old one and then replaces it, so that a crash leaves one of the
    two intact. A hash in the file covers its whole content, so that damage is noticed.

    Args:
        path: the file; its folder has to exist.
        search: the settings of the search, as JSON: a search resumes only from a file that holds
            the same settings.
        every: steps between two saves, at least 1.

    Raises:
        ArgumentError: the file holds another search, is damaged or is no checkpoint; the message
            names the file and the difference.
    """

    def __init__(self, path: str | Path, search: dict[str, Any], every: int = 100) -> None:
        self.path, self.every = Path(path), every
        # numbers of numpy are converted to those of JSON
        self.search = json.loads(json.dumps(search, default=lambda value: value.item()))
        if not self.path.name or self.path.is_dir() or not self.path.parent.is_dir():
            raise ArgumentError(
                "checkpoint", f"is {str(path)!r}, which is a folder, or whose folder does not exist"
            )
        if self.path.exists():
            self._check_search(self._read()[0])
        try:
            self._beside.touch()
            self._beside.unlink()
        except OSError as error:
            raise ArgumentError(
                "checkpoint", f"is {str(path)!r}, where nothing can be written ({error})"
            ) from error

    @property
    def _beside(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def _check_search(self, other: dict[str, Any]) -> None:
        names = sorted(self.search.keys() | other.keys())
        # a digest covers several settings, so settings that are stored as they are come first
        for name in sorted(names, key=lambda name: str(self.search.get(name)).startswith(DIGEST)):
            ours, theirs = self.search.get(name), other.get(name)
            if ours != theirs:
                how = f"with `{name}` {_short(theirs)} where it now is {_short(ours)}"
                if str(ours).startswith(DIGEST):
                    how = f"with another `{name}`"
                raise ArgumentError(
                    "checkpoint",
                    f"is {str(self.path)!r}, which holds a search {how}",
                    "remove the file or name another",
                )

    def _read(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
        """Settings, state without tensors, and tensors of the file."""
        try:
            with safe_open(self.path, "pt") as file:
                content = json.loads(file.metadata()["pez"])
                # it is no dict
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            search, state = content["search"], content["state"]
            whole = _digest_of(search, state, tensors) == content["digest"]
            if not isinstance(search, dict) or not isinstance(state, dict):
                raise TypeError(f"{type(search)}, {type(state)}")
        except (
            SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError,
            AttributeError, RecursionError,
        ) as error:  # fmt: skip
            raise ArgumentError(
                "checkpoint",
                f"is {str(self.path)!r}, which is no checkpoint of a search",
                "name another file",
            ) from error
        if not whole:
            raise ArgumentError(
                "checkpoint",
                f"is {str(self.path)!r}, which is damaged or was changed",
                "remove the file or name another",
            )
        return search, state, tensors

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None: nothing yet.

        Raises:
            ArgumentError: the file is damaged or is no checkpoint.
        """
        if not self.path.exists():
            return None
        _, state, tensors = self._read()
        for key, tensor in tensors.items():
            *path, name = key.split("/")
            inner = state
            for part in path:
                inner = inner[part]
            inner[name] = tensor
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Save `state`: nested dicts of tensors and of values that JSON can hold.

        On a full disk the search continues, and a warning is logged.
        """
        tensors: dict[str, torch.Tensor] = {}
        rest = json.loads(json.dumps(_split(state, "", tensors)))
        content = {"search": self.search, "state": rest}
        content["digest"] = _digest_of(self.search, rest, tensors)
        try:
            save_file(tensors, self._beside, {"pez": json.dumps(content)})
            with open(self._beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._beside, self.path)
        except (OSError, SafetensorError) as error:
            log.warning("%s could not be written (%s); the search continues", self.path, error)


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


def _digest_of(search: object, state: object, tensors: dict[str, torch.Tensor]) -> str:
    parts = [json.dumps([search, state], sort_keys=True).encode()]
    for name, tensor in sorted(tensors.items()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        parts.append(tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest(*parts)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
