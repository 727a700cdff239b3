"""A CLIP under ComfyUI's model manager, which loads, evicts and offloads it like any model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..pez_core import AnyClip, JointClip, SearchOptions
from ..pez_core.options import Effort
from ..pez_core.priors import reads_like_clip
from .reading import LoadedLanguageModel

log = logging.getLogger(__name__)

T = TypeVar("T")

# Rows that a refinement encodes in one batch, without gradients.
_SWAPS_AT_ONCE = 2048
# Bytes that a language model holds beside its weights: logits of a few hundred positions.
_READING = 400_000_000


def places(on_cpu: bool = False) -> tuple[torch.device, torch.device]:
    """Where a CLIP works, and where it waits.

    Args:
        on_cpu: it has to stay on the CPU.
    """
    cpu = torch.device("cpu")
    # with --novram the manager leaves weights on the CPU, where half precision is slow
    if on_cpu or mm.vram_state == mm.VRAMState.NO_VRAM:
        return cpu, cpu
    return mm.get_torch_device(), mm.text_encoder_offload_device()


class PezTextEncoder(nn.Module):
    """All of an open_clip model but its image tower, to be moved by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            if name != "visual":
                self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._model = [model]  # in a list, so that it is no part of this one

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # parameters and buffers of the model itself have to be set again: a move replaces buffers
        # by new tensors, and between some kinds of devices parameters, too
        super()._apply(fn, recurse)
        (model,) = self._model
        for name, parameter in self.named_parameters(recurse=False):
            setattr(model, name, parameter)
        for name, buffer in model.named_buffers(recurse=False):
            setattr(model, name, fn(buffer))
        return self


class LoadedClip:
    """The value of a PEZ_CLIP wire.

    Args:
        clip: on the offload device.
        load_device: where it works.
        offload_device: where it waits.

    Attributes:
        clip: the CLIP. Its text towers are on the device inside of `in_use`; its image tower is
            moved there for each use.
        load_device, offload_device: as given.
        reads_like_clip: its tokenizer is CLIP's own.
        language_model: the one of `readability`, kept for the next search; None: not used yet.
    """

    def __init__(
        self, clip: AnyClip, load_device: torch.device, offload_device: torch.device
    ) -> None:
        self.clip, self.load_device, self.offload_device = clip, load_device, offload_device
        self.reads_like_clip = reads_like_clip(clip.text.words)
        self.language_model: LoadedLanguageModel | None = None
        parts = clip.clips if isinstance(clip, JointClip) else [clip]
        self._texts = [
            ModelPatcher(PezTextEncoder(part.model), load_device, offload_device) for part in parts
        ]
        self._together = list(self._texts)
        for part in parts:
            # partials, not bound methods: avoids a reference cycle
            if next(part.model.visual.parameters(), None) is None:
                part.image_tower = partial(_lend_others, self._together)
            else:
                images = ModelPatcher(part.model.visual, load_device, offload_device)
                part.image_tower = partial(_lend, images, self._together)
            part.model.requires_grad_(False)  # or activations are kept for gradients of weights
        self.patcher = self._texts[0]  # ComfyUI's cache finds the size of a model by it

    @contextmanager
    def in_use(
        self, searches: int = 1, prompt_len: int | None = None, effort: Effort | None = None
    ) -> Iterator[AnyClip]:
        """The CLIP, ready for gradients, inside of ComfyUI's inference mode.

        Args:
            searches: how many run side by side.
            prompt_len: tokens of each; None: as many as CLIP can read.
            effort: their work; None: the steps of PEZ alone.
        """
        with torch.inference_mode(False), torch.enable_grad():
            reading = _READING * (len(self._together) > len(self._texts))
            _load(self._together, _needed(self.clip, searches, prompt_len, effort) + reading)
            yield self.clip

    def unload(self) -> None:
        """Take the text towers out of the manager, before they are dropped."""
        for patcher in self._texts:
            _unload(patcher)

    def search(
        self,
        run: Callable[[AnyClip, SearchOptions], T],
        options: SearchOptions,
        targets: int = 1,
    ) -> T:
        """Run a task; if memory runs out, again with half of the searches side by side.

        Args:
            run: gets the CLIP and the options of the task.
            options: of the search.
            targets: number of prompts that are learned side by side.

        Raises:
            torch.OutOfMemoryError: again, so that ComfyUI frees memory and reports it.
        """
        searches = targets * options.restarts
        with self._reading(options):
            return self._search(run, options, searches)

    @contextmanager
    def _reading(self, options: SearchOptions) -> Iterator[None]:
        """Inside, the language model is on the device whenever the text towers are."""
        shared = self.language_model
        if shared is None or options.language_model is None:
            yield
            return
        self._together.append(shared.patcher)
        try:
            yield
        finally:
            self._together.remove(shared.patcher)
            if shared.model is not None:
                shared.model.progress = None

    def _search(
        self, run: Callable[[AnyClip, SearchOptions], T], options: SearchOptions, searches: int
    ) -> T:
        try:
            with self.in_use(searches, options.prompt_len, options.work) as clip:
                return run(clip, options)
        except Exception as error:
            if searches < 2 or not _is_oom(error):
                raise
            log.warning("Out of memory with %d searches side by side; trying half.", searches)
        # outside of the handler, whose traceback would keep the memory in use
        mm.soft_empty_cache()
        half = -(-searches // 2)
        with self.in_use(half, options.prompt_len, options.work) as clip:
            return run(clip, replace(options, batch_size=half))


@contextmanager
def cancellable(clip: AnyClip) -> Iterator[None]:
    """Inside, each pass through a text tower ends with a cancelled run.

    For work that has no callback. A search has one, and steps that are captured as CUDA graphs.
    """
    parts = clip.clips if isinstance(clip, JointClip) else [clip]
    towers = [part.text.tower.transformer for part in parts]
    hooks = [tower.register_forward_pre_hook(_check_cancelled) for tower in towers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_cancelled(*_: object) -> None:
    mm.throw_exception_if_processing_interrupted()


@contextmanager
def _lend(images: ModelPatcher, texts: list[ModelPatcher]) -> Iterator[None]:
    """An image tower on the device for as long as targets are encoded."""
    _load([images], 0)
    try:
        yield
    finally:
        _unload(images)
    # loading the image tower may have evicted the text towers
    _load(texts, 0)


@contextmanager
def _lend_others(texts: list[ModelPatcher]) -> Iterator[None]:
    """While another node's model, under the manager, too, encodes images."""
    yield
    # loading that model may have evicted the text towers
    _load(texts, 0)


def _load(patchers: list[ModelPatcher], memory_required: int) -> None:
    with torch.inference_mode(False):
        mm.load_models_gpu(patchers, memory_required=memory_required, force_full_load=True)
        for patcher in patchers:
            # a model that was moved by another node has weights that gradients cannot pass
            if any(weight.is_inference() for weight in patcher.model.parameters()):
                patcher.model._apply(torch.Tensor.clone)


def _is_oom(error: Exception) -> bool:
    if hasattr(mm, "is_oom"):  # not in the oldest ComfyUI that the pack supports
        return mm.is_oom(error)
    return isinstance(error, mm.OOM_EXCEPTION)


def _unload(patcher: ModelPatcher) -> None:
    for loaded in [one for one in mm.current_loaded_models if one.model is patcher]:
        loaded.model_unload()
        mm.current_loaded_models.remove(loaded)
    mm.soft_empty_cache()


def _needed(
    clip: AnyClip, searches: int, prompt_len: int | None = None, effort: Effort | None = None
) -> int:
    """Bytes that a search holds beside the weights.

    Korthikanti et al. 2022 count 34 for each value of a layer in half precision. Swaps are compared
    without gradients, so that one layer is held at a time.
    """
    needed = 0
    prompt_len = prompt_len or clip.text.max_prompt_len
    rows = searches * (effort.trials if effort else 1)
    swaps = _SWAPS_AT_ONCE if effort and effort.swaps else 0
    for part in clip.clips if isinstance(clip, JointClip) else [clip]:
        tower = part.text.tower.transformer
        values = (prompt_len + 2) * tower.width * max(rows * tower.layers, swaps)
        table = len(clip.vocabulary) * tower.width * 4
        needed += (
            17 * part.dtype.itemsize * values + table + rows * prompt_len * len(clip.vocabulary) * 4
        )
    return needed
