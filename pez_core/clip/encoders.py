"""CLIPs of encoders that are already in memory, such as those of an image pipeline."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU, TextTransformer
from PIL import Image, ImageOps
from torch import nn

from ..errors import ArgumentError, ArgumentTypeError, check_choice, check_weights
from ..options import FITS
from .device import default_dtype, pick_device, pick_precision
from .joint import JointClip
from .model import _IMAGE_BATCH, Clip
from .models import BUNDLED, PRESETS
from .projection import find_projection, have_same_tokens, is_trained
from .text import Words
from .weights import WEIGHTS, find_on_disk

if TYPE_CHECKING:
    from transformers import (
        CLIPModel,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionModelWithProjection,
    )

log = logging.getLogger(__name__)

Pictures = Callable[[Sequence[Image.Image]], torch.Tensor]
"""RGB pictures -> (number of pictures, features), of any length."""

_MEAN_COLOUR = (123, 117, 104)  # the mean that CLIPs subtract, 0.481, 0.458 and 0.408
_KINDS = {768: "CLIP-L", 1024: "CLIP-H", 1280: "CLIP-bigG"}
_ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
# Names of transformers within a block, and those of open_clip.
_BLOCK = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass(frozen=True)
class TextWeights:
    """A text encoder of CLIP in memory.

    Attributes:
        name: for messages and results.
        tensors: by the names that transformers gives them in a `CLIPTextModel`, without the prefix
            `text_model.`. It is read once, tensor by tensor.
        layers, heads: of the transformer.
        activation: "gelu" or "quick_gelu".
        projection: (features, width); None: features are the output of the last norm, which images
            cannot be compared with.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    layers: int
    heads: int
    activation: str
    projection: torch.Tensor | None = None


class ClipOfEncoders(Clip):
    """A `Clip` of a text encoder and, optionally, an image encoder that are already in memory.

    The weights of the text encoder are copied. Those of an image encoder of transformers are
    shared.

    Args:
        text: the text encoder.
        images: a `CLIPVisionModelWithProjection` or `CLIPModel`, or a function. None: there is no
            image encoder, and `encode_images` raises an error.
        device: of the text encoder.
        dtype: of the text encoder.
        vocabulary: as in `Clip`.
        remedy: how to get an image encoder, for the error.

    Raises:
        ArgumentError: a tensor of the text encoder is missing or has another shape.
    """

    def __init__(
        self,
        text: TextWeights,
        images: nn.Module | Pictures | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        vocabulary: Sequence[int] | None = None,
        remedy: str = "give `image_encoder`",
    ) -> None:
        with torch.inference_mode(False):
            tower = _text_tower(text, torch.device("cpu") if device is None else device, dtype)
            super().__init__(
                _Model(tower, images), _tokenizer(tower.context_length), text.name, vocabulary
            )
        self.text.words = _words(tower.context_length)  # it caches which tokens round-trip
        self._pictures = None if isinstance(images, nn.Module) else images
        self._shows = images is not None
        self._remedy = remedy

    def encode_images(self, images: Iterable[Image.Image], fit: str = "crop") -> torch.Tensor:
        """As `Clip.encode_images`. Functions get pictures that are square unless `fit` is "crop".

        Raises:
            ArgumentError: there is no image encoder, or it gives features of another length, or
                there is no such `fit`.
        """
        check_choice("fit", fit, FITS)
        if not self._shows:
            raise ArgumentError(
                "clip",
                f"is {self.name} without an image encoder, which compares texts alone",
                self._remedy,
            )
        if self._pictures is None:
            return super().encode_images(images, fit)
        pictures, features = (_as_square(image, fit) for image in images), []
        with self.image_tower():
            while few := list(islice(pictures, _IMAGE_BATCH)):
                features.append(self._pictures(few).detach().float().clone())
        found = torch.cat(features).to(self.device)
        if found.ndim != 2 or found.shape[1] != self.feature_size:
            raise ArgumentError(
                "clip",
                f"has an image encoder that gives features of shape {tuple(found.shape[1:])}, but "
                f"those of its text encoder {self.name} have {self.feature_size} numbers",
                "take the image encoder that was trained with it",
            )
        return F.normalize(found, dim=-1)


def _as_square(picture: Image.Image, fit: str) -> Image.Image:
    """A picture that looks the same after a crop of the centre; with "crop" as it is."""
    if fit == "crop":
        return picture
    side = max(picture.size)
    if fit == "pad":
        return ImageOps.pad(picture, (side, side), Image.Resampling.BICUBIC, color=_MEAN_COLOUR)
    return picture.resize((side, side), Image.Resampling.BICUBIC)


class _Model(nn.Module):
    """A text tower and an image encoder with the interface of open_clip's models."""

    def __init__(self, text: TextTransformer, images: nn.Module | Pictures | None) -> None:
        super().__init__()
        self.text = text
        self.visual = _Images(images if isinstance(images, nn.Module) else None)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return self.text(ids)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.visual(pixels)


class _Images(nn.Module):
    """An image encoder of transformers; None: pictures are encoded elsewhere."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        size = {} if model is None else {"size": _vision_config(model).image_size}
        self.preprocess_cfg = open_clip.transform.PreprocessCfg(**size).__dict__

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(pooled)


def _vision_config(model: Any) -> Any:
    return getattr(model.config, "vision_config", model.config)


@lru_cache(maxsize=4)
def _tokenizer(context_length: int) -> Any:
    return open_clip.SimpleTokenizer(context_length=context_length)


@lru_cache(maxsize=4)
def _words(context_length: int) -> Words:
    return Words(_tokenizer(context_length))


def _text_tower(text: TextWeights, device: torch.device, dtype: torch.dtype) -> TextTransformer:
    """The text encoder as open_clip's text tower, with the weights copied."""
    tensors = _Tensors(text)
    half = dtype != torch.float32
    state = {
        "token_embedding.weight": tensors.get("embeddings.token_embedding.weight"),
        "positional_embedding": tensors.get("embeddings.position_embedding.weight"),
        "ln_final.weight": tensors.get("final_layer_norm.weight"),
        "ln_final.bias": tensors.get("final_layer_norm.bias"),
    }
    # as `load_clip` has them: norms compute in float32, embeddings are cast where they are used
    state = {name: _copied(tensor, device, torch.float32) for name, tensor in state.items()}
    for k in range(text.layers):
        for name, tensor in _block(tensors, f"encoder.layers.{k}."):
            kept = torch.float32 if name.startswith("ln_") else dtype
            state[f"transformer.resblocks.{k}.{name}"] = _copied(tensor, device, kept)
    if text.projection is not None:
        state["text_projection"] = _copied(text.projection.T, device, dtype)
    vocab_size, width = state["token_embedding.weight"].shape
    hidden = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    with torch.device("meta"):  # skips the random weights
        tower = TextTransformer(
            context_length=len(state["positional_embedding"]),
            vocab_size=vocab_size,
            width=width,
            heads=text.heads,
            layers=text.layers,
            mlp_ratio=hidden / width,
            output_dim=None if text.projection is None else len(text.projection),
            act_layer=_activation(text),
            norm_layer=LayerNormFp32 if half else LayerNorm,
        )
    try:
        tower.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ArgumentError(
            "text_encoder", f"is {text.name}, whose weights do not fit together ({error})"
        ) from error
    tower.register_buffer("attn_mask", tower.build_causal_mask().to(device), persistent=False)
    return tower.requires_grad_(False)


class _Tensors:
    """The tensors of a text encoder; one that is missing raises an error."""

    def __init__(self, text: TextWeights) -> None:
        self.text = text

    def get(self, name: str) -> torch.Tensor:
        try:
            return self.text.tensors[name]
        except KeyError as error:
            raise ArgumentError(
                "text_encoder", f"is {self.text.name}, which lacks the weights {name}"
            ) from error


def _block(tensors: _Tensors, prefix: str) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of a block under open_clip's names."""
    for kind in ("weight", "bias"):
        for theirs, ours in _BLOCK.items():
            yield f"{ours}.{kind}", tensors.get(f"{prefix}{theirs}.{kind}")
        parts = [tensors.get(f"{prefix}self_attn.{part}_proj.{kind}") for part in "qkv"]
        yield f"attn.in_proj_{kind}", torch.cat(parts)


def _copied(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    place = tensor.device if tensor.is_meta else device
    return tensor.detach().to(place, dtype, copy=True).contiguous()


def _activation(text: TextWeights) -> type[nn.Module]:
    if text.activation not in _ACTIVATIONS:
        raise ArgumentError(
            "text_encoder", f"is {text.name}, which has the activation {text.activation!r}",
            f"known are {', '.join(_ACTIVATIONS)}",
        )  # fmt: skip
    return _ACTIVATIONS[text.activation]


def kind_of(width: int) -> str:
    """The name that people use for a text encoder of CLIP with this width."""
    return _KINDS.get(width, f"CLIP of width {width}")


def clip_from_encoders(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection | Sequence[Any],
    image_encoder: CLIPVisionModelWithProjection | CLIPModel | Pictures | Sequence[Any] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    weights: Sequence[float] | None = None,
) -> Clip | JointClip:
    """Build a CLIP to search prompts on from encoders that are in memory.

    For the text encoders of an image pipeline of diffusers, which may be fine-tuned:
    `clip_from_encoders([pipe.text_encoder, pipe.text_encoder_2])`. Their weights are copied.

    Without image encoders texts can be compared with texts: `distill`, `fuse` of texts, `explain`
    and `prune`. With image encoders each is paired with the text encoder whose features have the
    same length, and a text encoder without one is left out, which a warning says.

    Text encoders of Stable Diffusion 1.x, and the first one of XL, lack the projection that images
    need. It is taken from a `CLIPModel` among the image encoders, or from weights that `load_clip`
    finds on this disk, where these have the same embeddings; nothing is downloaded.

    Args:
        text_encoder: one or several of transformers' `CLIPTextModel` and
            `CLIPTextModelWithProjection`, whose tokenizer is CLIP's own.
        image_encoder: one or several of transformers' `CLIPVisionModelWithProjection` and
            `CLIPModel`. They are shared, not copied. Or, for a single text encoder, a function of
            RGB pictures that returns their (number of pictures, features) tensor.
        device: of the copied weights. None: that of the text encoder.
        dtype: as in `load_clip`.
        weights: one number above 0 per text encoder that is searched, as in `load_clip`.

    Returns:
        A `Clip`; for several text encoders a `JointClip`. `load_clip` loads CLIPs from disk.

    Raises:
        ArgumentError: an argument is no such encoder, its weights are offloaded or have LoRA layers
            that are not fused, or no image encoder belongs to a text encoder.
    """
    texts = [_check_text(one) for one in _several(text_encoder, "text_encoder")]
    images = _several(image_encoder, "image_encoder", needed=False)
    functions = [one for one in images if not isinstance(one, nn.Module)]
    if functions and (len(texts) > 1 or len(images) > 1 or not callable(functions[0])):
        raise ArgumentTypeError(
            "image_encoder",
            "has to be a CLIPVisionModelWithProjection or a CLIPModel, several of them, or one "
            f"function for one text encoder, but holds {type(functions[0]).__name__}",
        )
    for one in images:
        if isinstance(one, nn.Module) and not hasattr(one, "visual_projection"):
            raise ArgumentTypeError(
                "image_encoder", f"holds a {type(one).__name__}, which has no projection",
                "load it as CLIPVisionModelWithProjection",
            )  # fmt: skip
    found: list[Clip] = []
    for encoder in texts:
        text, trained = _text_of(encoder, images)
        mate = _mate(text, images)
        if images and mate is None:
            log.warning("%s is not searched: %s.", text.name, _lacking(text))
            continue
        table = encoder.get_input_embeddings().weight
        place = table.device if device is None else pick_device(device)
        pick_precision(place, dtype)
        kept = default_dtype(place) if dtype is None else dtype
        found.append(ClipOfEncoders(text, mate, place, kept, trained))
    if not found:
        raise ArgumentError(
            "image_encoder", "belongs to none of the text encoders",
            "give the one that was trained with a text encoder, or none to compare texts alone",
        )  # fmt: skip
    if weights is not None:
        check_weights("weights", weights, len(found))
    return found[0] if len(found) == 1 else JointClip(found, weights)


def _several(given: Any, name: str, needed: bool = True) -> list[Any]:
    """One or several as a list."""
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    several = [one for one in several if one is not None]
    if needed and not several:
        raise ArgumentError(name, "is empty", "give at least one")
    return several


def _check_text(encoder: Any) -> Any:
    """The encoder; raise unless it is one of CLIP with weights that can be read."""
    config = getattr(encoder, "config", None)
    if not isinstance(encoder, nn.Module) or not hasattr(config, "hidden_act"):
        raise ArgumentTypeError(
            "text_encoder",
            f"has to be a CLIPTextModel of transformers but is {type(encoder).__name__}",
        )
    if any(one.is_meta for one in encoder.parameters()):
        raise ArgumentError(
            "text_encoder",
            "has weights that are offloaded",
            "build the CLIP before `enable_sequential_cpu_offload`",
        )
    if any(".base_layer." in name for name, _ in encoder.named_parameters()):
        raise ArgumentError(
            "text_encoder",
            "has LoRA layers beside its weights",
            "call `fuse_lora()` and `unload_lora_weights()` of the pipeline first",
        )
    return encoder


def _text_of(encoder: Any, images: Sequence[Any]) -> tuple[TextWeights, list[int] | None]:
    """The weights of a text encoder of transformers, and the ids that it was trained on."""
    # transformers 5.6 and later give a plain CLIPTextModel no prefix
    tensors = {
        name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()
    }
    table, trained = encoder.get_input_embeddings().weight, None
    projection = tensors.get("text_projection.weight")
    if projection is None or not is_trained(projection):
        projection, trained = find_missing(table, images, layers=encoder.config.num_hidden_layers)
    config = encoder.config
    text = TextWeights(
        name=kind_of(table.shape[1]),
        tensors=tensors,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        activation=config.hidden_act,
        projection=projection,
    )
    return text, trained


def find_missing(
    table: torch.Tensor,
    models: Sequence[Any] = (),
    files: Iterable[Path] = (),
    layers: int = 0,
) -> tuple[torch.Tensor | None, list[int] | None]:
    """The projection of a text encoder that lacks it, and the ids that it was trained on.

    Args:
        table: (vocabulary, width) token embeddings of the text encoder.
        models: among them there may be a `CLIPModel` of the same text encoder.
        files: safetensors files in which to look before the weights that `load_clip` finds.
        layers: of the text encoder; one of another depth has another projection. 0: any.

    Returns:
        (features, width) projection; None where there is none. Ids; None: all of them.
    """
    for model in models:
        if not hasattr(model, "text_projection"):
            continue
        if layers not in (0, model.config.text_config.num_hidden_layers):
            continue
        theirs = model.text_model.embeddings.token_embedding.weight
        if theirs.shape == table.shape and have_same_tokens(theirs, table):
            return model.text_projection.weight, None
    bundled = {folder / WEIGHTS[0]: folder for folder in BUNDLED.values()}
    placed = [find_on_disk(one.name, one.pretrained) for one in PRESETS]
    found = find_projection(table, [*files, *bundled, *filter(None, placed)], layers)
    if found is None:
        return None, None
    folder = bundled.get(found.path)
    if folder is None:
        return found.weight, None
    return found.weight, json.loads((folder / "vocabulary.json").read_text("utf-8"))


def _mate(text: TextWeights, images: Sequence[Any]) -> Any:
    """The image encoder that belongs to a text encoder, or None."""
    if text.projection is None:
        return None
    for one in images:
        if not isinstance(one, nn.Module):
            return one
        if len(one.get_parameter("visual_projection.weight")) == len(text.projection):
            return one
    return None


def _lacking(text: TextWeights) -> str:
    if text.projection is None:
        if (text.name, text.layers) == (kind_of(1024), 23):
            return (
                "it came without its last layer and projection, which Stable Diffusion 2 does not "
                "use; load ViT-H-14:laion2b_s32b_b79k instead"
            )
        return "it came without its text projection, and no file on this disk has it"
    return f"there is no image encoder of {len(text.projection)} features"
