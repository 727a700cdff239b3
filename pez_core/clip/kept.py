"""Features of images that were encoded before: the next search often has the same image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch.utils.weak import WeakIdRef

LAST = 64  # images


class KeptFeatures:
    """The features of the last images that an image tower has read, on the CPU, by their pixels.

    A copy of it, also by pickle, is empty.

    Args:
        tower: the image tower; its features are dropped when its weights change.
    """

    def __init__(self, tower: torch.nn.Module) -> None:
        self._tower, self._features = tower, {}
        self._weights = self._state()

    def __reduce__(self) -> tuple[type, tuple[torch.nn.Module]]:
        return type(self), (self._tower,)

    def _state(self) -> list[tuple[WeakIdRef, torch.dtype, object]]:
        """Which tensors the weights are, their dtypes, and how often each was changed in place.

        Not where they are: a memory manager moves the tower for each use. Changes of tensors of
        inference mode are not counted, so these are unequal to themselves.
        """
        weights = [*self._tower.parameters(), *self._tower.buffers()]
        return [
            (WeakIdRef(one), one.dtype, object() if one.is_inference() else one._version)
            for one in weights
        ]

    @staticmethod
    def key(pixels: torch.Tensor) -> bytes:
        """What stands for an image as the tower reads it."""
        return hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()

    def valid(self) -> Mapping[bytes, torch.Tensor]:
        """The (features,) that still hold, by the key of their image."""
        if (state := self._state()) != self._weights:
            self._weights, self._features = state, {}
        return self._features

    def keep(self, features: Mapping[bytes, torch.Tensor]) -> None:
        """Add some; of more than `LAST` the oldest are dropped, and NaN is never kept."""
        good = {key: one for key, one in features.items() if one.isfinite().all()}
        every = {**self._features, **good}
        self._features = dict(list(every.items())[-LAST:])
