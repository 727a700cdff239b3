"""The language model that says how prompts read."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..pez_core.readability import LanguageModel, load_language_model


def language_model(readability: float) -> LanguageModel | None:
    """The language model for a search, None for one that does without.

    It stays loaded, on the CPU, until a search does without it.

    Raises:
        ValueError: a package is missing.
    """
    if not readability:
        _load.cache_clear()
        return None
    return _load()


@lru_cache(maxsize=1)
def _load() -> LanguageModel:
    # private in torch, which has no public way to ask
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    with torch.inference_mode(False):  # weights made inside of it could not be used outside
        return load_language_model(dtype=torch.bfloat16 if fast else torch.float32)
