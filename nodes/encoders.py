"""The encoders inside of ComfyUI's CLIP and CLIP_VISION, which are read and never changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management as mm
import numpy as np
import torch
import torch.nn.functional as F
from comfy.clip_model import CLIPTextModel
from PIL import Image

from ..pez_core.clip.encoders import Pictures, TextWeights
from ..pez_core.clip.projection import depths_in, is_trained, projections_in

# Pictures of one size that ComfyUI encodes at a time.
_AT_ONCE = 8
# Cosine similarity of a matrix in memory and in its file, of another precision.
_EQUAL = 0.999
_SIGN = 2.0  # where GELU and its quick form differ most


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of CLIP inside of a ComfyUI CLIP.

    Attributes:
        clip: that ComfyUI CLIP.
        name: that ComfyUI gives it, such as clip_l.
        path: of the encoder in `clip.cond_stage_model`.
        model: the encoder.
    """

    clip: Any
    name: str
    path: str
    model: CLIPTextModel

    @property
    def table(self) -> torch.Tensor:
        """(vocabulary, width) token embeddings, without patches."""
        return _plain(self.patches("text_model.embeddings.token_embedding.")["weight"][0])

    @property
    def width(self) -> int:
        return self.model.text_model.final_layer_norm.weight.shape[0]

    @property
    def layers(self) -> int:
        return len(self.model.text_model.encoder.layers)

    @torch.inference_mode()
    def lacks_last_layer(self) -> bool:
        """Whether its last layer came without weights, as in some files of SD 2.x, which skip it.

        ComfyUI sets them to memory that is not initialised, as it does with projections.
        """
        last = self.patches(f"text_model.encoder.layers.{self.layers - 1}.mlp.fc1.")
        if not is_trained(_plain(last["weight"][0])):
            return True
        files = _files(self.clip) or []
        depths = [one for path in files for one in depths_in(path, self.table.shape)]
        return max(depths, default=0) in range(1, self.layers)

    def patches(self, name: str) -> dict[str, list]:
        """Each tensor whose name begins with `name`, with the patches on it, by the rest of it."""
        prefix = f"{self.path}.{name}"
        found = self.clip.patcher.get_key_patches(prefix)
        return {key.removeprefix(prefix): value for key, value in found.items()}

    def weights(self, projection: torch.Tensor | None) -> TextWeights:
        """The encoder for `ClipOfEncoders`.

        Args:
            projection: (features, width); None: none.
        """
        layers = self.model.text_model.encoder.layers
        return TextWeights(
            name=self.name,
            tensors=_Patched(self),
            layers=self.layers,
            heads=layers[0].self_attn.heads,
            activation=_activation(layers[0].mlp.activation),
            projection=projection,
        )

    @torch.inference_mode()
    def projection(self) -> torch.Tensor | None:
        """Its own (features, width) text projection, with patches; None where it came without one.

        ComfyUI sets a projection that no file had to memory that is not initialised. So the value
        has to be in the file. Where that is not known, only the projection of bigG is taken, which
        image models read.
        """
        found = self.patches("text_projection.").get("weight")
        if found is None or not is_trained(weight := _plain(found[0])):
            return None
        files = _files(self.clip)
        if files is None:
            return _patched(found, self.name) if self.name == "clip_g" else None
        stored = [one for path in files for one in projections_in(path, weight.shape[1])]
        same = [one for one in stored if one.shape == weight.shape and _equal(one, weight)]
        return _patched(found, self.name) if same else None


def text_encoders(clip: Any) -> tuple[list[TextEncoder], list[str]]:
    """The encoders of a ComfyUI CLIP that are CLIPs, and the names of all others."""
    model = clip.cond_stage_model
    found = []
    for path, module in model.named_modules():
        if isinstance(module, CLIPTextModel):
            name = path.removesuffix(".transformer").rpartition(".")[2]
            found.append(TextEncoder(clip, name, path, module))
    others = [
        name
        for name, child in model.named_children()
        if not any(isinstance(module, CLIPTextModel) for module in child.modules())
        and next(child.parameters(), None) is not None
    ]
    return found, others


def has_bypassed_lora(clip: Any) -> bool:
    """Whether a LoRA acts beside the weights, which then do not show it."""
    return bool(getattr(clip.patcher, "injections", None))


def feature_length(clip_vision: Any) -> int | None:
    """The length of a CLIP_VISION's image features; None: they cannot be compared with texts.

    SigLIP and DINO have no projection. LLaVA's image tower came without its own.
    """
    model = getattr(clip_vision, "model", None)
    if getattr(model, "multi_modal_projector", None) is not None:
        return None
    projection = getattr(model, "visual_projection", None)
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, torch.Tensor) or not is_trained(weight):
        return None
    return weight.shape[0]


def encoder_of(clip_vision: Any) -> Pictures:
    """A function of RGB pictures that returns their features by ComfyUI's own `encode_image`."""

    def encode(pictures: Sequence[Image.Image]) -> torch.Tensor:
        features = []
        with torch.inference_mode():
            for _, equal in groupby(pictures, key=lambda picture: picture.size):
                for few in _batches(list(equal)):
                    features.append(clip_vision.encode_image(_pixels(few))["image_embeds"])
        return torch.cat([part.float().cpu() for part in features])

    return encode


def _batches(pictures: list[Image.Image]) -> Iterator[list[Image.Image]]:
    for k in range(0, len(pictures), _AT_ONCE):
        yield pictures[k : k + _AT_ONCE]


def _pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(number, height, width, 3) values in [0, 1], as ComfyUI's nodes give images."""
    return torch.from_numpy(np.stack([np.asarray(one, np.float32) / 255 for one in pictures]))


class _Patched(Mapping[str, torch.Tensor]):
    """The tensors of an encoder as the sampler will use them: with LoRAs and merges."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._name = encoder.name
        self._found = encoder.patches("text_model.")

    def __getitem__(self, name: str) -> torch.Tensor:
        with torch.inference_mode():
            return _patched(self._found[name], f"{self._name}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _patched(found: list, key: str) -> torch.Tensor:
    """A weight with its patches, which ComfyUI gives behind it in a list."""
    first, *patches = found
    if not patches:
        return _plain(first)
    weight, convert = first
    device = mm.get_torch_device()
    # the steps of ComfyUI's `ModelPatcher.patch_weight_to_device`, without setting the weight
    value = mm.cast_to_device(weight, device, mm.lora_compute_dtype(device), copy=True)
    value = comfy.lora.calculate_weight(patches, convert(value, inplace=True), key)
    if weight.dtype.itemsize > 1:  # else quantised
        value = value.to(weight.dtype)
    return value.cpu()


def _plain(first: tuple[torch.Tensor, Any]) -> torch.Tensor:
    """A weight without patches, out of its quantisation; not a copy where there is none."""
    weight, convert = first
    value = convert(weight, inplace=False)
    return value if value.dtype.itemsize > 1 else value.float()


def _activation(function: Any) -> str:
    """The name of an activation, which ComfyUI stores as a function."""
    here = torch.tensor(_SIGN)
    value = float(function(here))
    known = {"gelu": F.gelu(here), "quick_gelu": here * torch.sigmoid(1.702 * here)}
    return next((name for name, one in known.items() if abs(value - float(one)) < 1e-5), "unknown")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = (one.detach().float().cpu().flatten() for one in (a, b))
    return F.cosine_similarity(*flat, dim=0).item() > _EQUAL


def _files(clip: Any) -> list[Path] | None:
    """The files that a ComfyUI CLIP was loaded from; None where that is not known.

    ComfyUI 0.30 keeps them to load a model again on another device.
    """
    again = getattr(clip.patcher, "cached_patcher_init", None)
    try:
        first = again[1][0]
    except (TypeError, LookupError):
        return None
    paths = [first] if isinstance(first, str) else first
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        return None
    files = [Path(path) for path in paths]
    return files if all(path.suffix in (".safetensors", ".sft") for path in files) else None
