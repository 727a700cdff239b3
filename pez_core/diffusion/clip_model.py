"""`PezClipModel`: a CLIP as a diffusers model, which pipelines save, move and offload."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..clip import AnyClip, Clip, JointClip, load_clip
from ..clip.build import from_config
from ..clip.encoders import ClipOfEncoders
from ..errors import ArgumentError, ArgumentTypeError

T = TypeVar("T")
_TOWER = ("name", "config", "preprocess_cfg", "vocabulary")  # keys of each
# arguments of `from_pretrained` that `load_config` takes too
_FILES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class PezClipModel(ModelMixin, ConfigMixin):
    """One CLIP or several, on which prompts are searched.

    Use `from_clip`, `load` or `from_pretrained` to make one. To use it, call it: the offloading
    hooks of diffusers move the weights to the device in `forward` only. The weights never need
    gradients.

    Args:
        towers: one dict per CLIP, with `name`, `config` and `vocabulary` as in `pez_core.Clip`, and
            `preprocess_cfg`, open_clip's settings for images.
        weights: of the CLIPs in the similarity, where there are several.
    """

    # the search reads weights of submodules without calling these, so that hooks would not run
    _supports_group_offloading = False

    @register_to_config
    def __init__(self, towers: Sequence[dict], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        built = [from_config(tower["config"], tower["preprocess_cfg"]) for tower in towers]
        self.models = nn.ModuleList(model for model, _ in built)
        self.requires_grad_(False)
        self._tokenizers = [tokenizer for _, tokenizer in built]

    @cached_property
    def clip(self) -> AnyClip:
        """The CLIP for `pez_core`; made at its first use, when the weights are loaded."""
        config: Any = self.config
        clips = [
            Clip(model, tokenizer, tower["name"], tower["vocabulary"], tower["config"])
            for model, tokenizer, tower in zip(
                self.models, self._tokenizers, config.towers, strict=True
            )
        ]
        return clips[0] if len(clips) == 1 else JointClip(clips, config.weights)

    @classmethod
    def from_clip(cls, clip: AnyClip) -> PezClipModel:
        """Wrap a loaded CLIP, which stays unchanged. Both share the weights until one is moved.

        Raises:
            ArgumentError: `clip` is no CLIP of `pez_core`, or lacks its `config`.
        """
        if not isinstance(clip, (Clip, JointClip)):
            raise ArgumentTypeError(
                "clip", f"has to be a CLIP from `load_clip` but is {type(clip).__name__}"
            )
        parts = clip.clips if isinstance(clip, JointClip) else [clip]
        if all(isinstance(part, ClipOfEncoders) for part in parts):
            return cls._of_encoders(clip, parts)
        for part in parts:
            if part.config is None:
                raise ArgumentError(
                    "clip",
                    f"has no `config`: {part.name} was built by hand, or its folder holds its own "
                    "tokenizer, so that it could not be saved",
                    "load an architecture of open_clip by `load_clip`, or give `Clip` a `config`",
                )
        towers = [
            {
                "name": part.name,
                "config": part.config,
                "preprocess_cfg": part.model.visual.preprocess_cfg,
                "vocabulary": None if part.trained_tokens is None else sorted(part.trained_tokens),
            }
            for part in parts
        ]
        weights = [weight for _, weight in clip.text.parts] if len(parts) > 1 else None
        # skips the random weights; image towers of timm compute with theirs while they are built
        with nullcontext() if _of_timm(towers) else init_empty_weights():
            model = cls(towers, weights)
        for ours, part in zip(model.models, parts, strict=True):
            ours.load_state_dict(part.model.state_dict(), assign=True)
        # open_clip's half precision leaves some layers in float32; a component has one dtype
        nn.Module.to(model.requires_grad_(False), clip.device, parts[0].dtype)
        return model

    @classmethod
    def _of_encoders(cls, clip: AnyClip, parts: Sequence[Clip]) -> PezClipModel:
        """The component of encoders that belong to an image pipeline; it cannot be saved."""
        model = cls([])
        model.models = nn.ModuleList(part.model for part in parts)
        model.__dict__["clip"] = clip  # the value of the cached property
        return model

    # pipelines look at the signature to find out whether a component has variants
    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `ModelMixin.save_pretrained`.

        Raises:
            ArgumentError: the CLIP is of the encoders of an image pipeline.
        """
        if not self.config["towers"]:
            raise ArgumentError(
                "clip",
                "was made of the encoders of an image pipeline, which are saved with that pipeline",
                "save `.pipeline`, and make this one again by `from_pipe`",
            )
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any
    ) -> PezClipModel:
        """As `ModelMixin.from_pretrained`.

        Raises:
            ArgumentError: the config is damaged, would run code, or names files in another place.
        """
        files = {name: kwargs[name] for name in _FILES if name in kwargs}
        load_config: Any = cls.load_config  # diffusers types it without None
        config = load_config(pretrained_model_name_or_path, **files)
        try:
            of_timm = _of_timm(config["towers"])
            missing = [key for key in _TOWER for tower in config["towers"] if key not in tower]
            if missing:
                raise LookupError(missing[0])
        except (LookupError, TypeError, AttributeError) as error:
            raise ArgumentError(
                "pretrained_model_name_or_path",
                f"is {str(pretrained_model_name_or_path)!r}, whose config.json is not that of a "
                "PezClipModel",
            ) from error
        if of_timm:
            kwargs["low_cpu_mem_usage"] = False
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load(
        cls,
        name: str | Sequence[str],
        pretrained: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        download: bool = False,
    ) -> PezClipModel:
        """`load_clip`, then `from_clip`; see there for arguments and errors."""
        clip = load_clip(name, pretrained, "cpu", torch.float32, download)
        model = cls.from_clip(clip)
        nn.Module.to(model, device, dtype)
        return model

    def forward(self, use: Callable[[AnyClip], T]) -> T:
        """Call `use` with the CLIP, which is on its device meanwhile, and return the result."""
        return use(self.clip)


def _of_timm(towers: Sequence[dict]) -> bool:
    return any("timm_model_name" in tower["config"]["model_cfg"]["vision_cfg"] for tower in towers)
