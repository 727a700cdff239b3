"""Features of images that were encoded before: the next search often has the same image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

LAST = 64  # images


class KeptFeatures:
    """The features of the last images that an image tower has read, by their pixels.

    Args:
        tower: the image tower; its features are dropped when its weights change.
    """

    def __init__(self, tower: torch.nn.Module) -> None:
        self._tower, self._features = tower, {}
        self._weights = self._state()

    def _state(self) -> list[tuple[int, int]]:
        """Which tensors the weights are, and how often each was changed in place."""
        weights = [*self._tower.parameters(), *self._tower.buffers()]
        return [(id(one), 0 if one.is_inference() else one._version) for one in weights]

    @staticmethod
    def key(pixels: torch.Tensor) -> bytes:
        """What stands for an image as the tower reads it."""
        return hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()

    def valid(self) -> Mapping[bytes, torch.Tensor]:
        """The (features,) that still hold."""
        if (state := self._state()) != self._weights:
            self._weights, self._features = state, {}
        return self._features

    def keep(self, features: Mapping[bytes, torch.Tensor]) -> None:
        """Add some; of more than `LAST` the oldest are dropped, and NaN is never kept."""
        good = {key: one for key, one in features.items() if one.isfinite().all()}
        every = {**self._features, **good}
        self._features = dict(list(every.items())[-LAST:])
