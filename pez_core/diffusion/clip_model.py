"""A CLIP as a component of diffusers pipelines, saved, moved and offloaded like the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..clip import AnyClip, Clip, JointClip, load_clip
from ..clip.build import from_config

T = TypeVar("T")
# what `from_pretrained` takes to find files, of which `load_config` knows these
_FILES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class PezClipModel(ModelMixin, ConfigMixin):
    """One or several CLIPs to search prompts on, as diffusers keeps its models.

    Made by `from_clip`, `load` or `from_pretrained`. Its weights never need gradients, and
    calling it is the only way to use it: hooks that bring it to the device listen to that.

    Args:
        towers: what each CLIP is built from: `name`, `config` and `vocabulary` as in
            `pez_core.Clip`, and `preprocess_cfg`, how images are prepared.
        weights: how much each counts where there are several.
    """

    # its text path reads the weights of submodules without calling them
    _supports_group_offloading = False

    @register_to_config
    def __init__(self, towers: Sequence[dict], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        clips = []
        for tower in towers:
            model, tokenizer = from_config(tower["config"], tower["preprocess_cfg"])
            known = tower["vocabulary"]
            clips.append(Clip(model, tokenizer, tower["name"], known, tower["config"]))
        self.models = nn.ModuleList(clip.model for clip in clips)
        self.requires_grad_(False)
        self.clip: AnyClip = clips[0] if len(clips) == 1 else JointClip(clips, weights)

    @classmethod
    def from_clip(cls, clip: AnyClip) -> PezClipModel:
        """Wrap a CLIP that is loaded. It stays as it is; the weights are shared until moved.

        Raises:
            TypeError: `clip` is no CLIP of `pez_core`.
            ValueError: it does not know what it was built from.
        """
        if not isinstance(clip, (Clip, JointClip)):
            raise TypeError(
                f"`clip` has to be a CLIP from `load_clip` but is {type(clip).__name__}."
            )
        parts = clip.clips if isinstance(clip, JointClip) else [clip]
        for part in parts:
            if part.config is None:
                raise ValueError(
                    f"`clip`: {part.name} does not know what it was built from, or has a tokenizer "
                    "of its own in its folder, and could not be saved; load one that open_clip "
                    "knows by `load_clip`, or give `Clip` its `config`."
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
        # nothing is computed to be thrown away; image towers of timm need real weights to be built
        with nullcontext() if _of_timm(towers) else init_empty_weights():
            model = cls(towers, weights)
        for ours, part in zip(model.models, parts, strict=True):
            ours.load_state_dict(part.model.state_dict(), assign=True)
        # open_clip's half precision keeps some layers in float32, which does not survive `to`
        return nn.Module.to(model.requires_grad_(False), clip.device, parts[0].dtype)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> PezClipModel:
        """As `ModelMixin.from_pretrained`."""
        files = {name: kwargs[name] for name in _FILES if name in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **files)
        if _of_timm(config["towers"]):
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
        """`load_clip`, wrapped; see there for arguments and errors."""
        clip = load_clip(name, pretrained, "cpu", torch.float32, download)
        return nn.Module.to(cls.from_clip(clip), device, dtype)

    def forward(self, use: Callable[[AnyClip], T]) -> T:
        """What `use` makes of the CLIP, which is on its device while it runs."""
        return use(self.clip)


def _of_timm(towers: Sequence[dict]) -> bool:
    return any("timm_model_name" in tower["config"]["model_cfg"]["vision_cfg"] for tower in towers)
