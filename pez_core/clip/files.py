"""Weights files: the CLIP that a file holds, by its header, and files that transformers wrote."""

from __future__ import annotations

import json
import logging
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors.torch import load_file

from .device import first_line

log = logging.getLogger(__name__)

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
# Errors of a file with a damaged header.
_MALFORMED = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)

# Names of tensors in files of transformers' CLIPModel, and their names in open_clip.
_RENAMED = (
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)
_PARTS = re.compile(r"\.attn\.q_proj\.(weight|bias)$")


@dataclass(frozen=True)
class FoundClip:
    """The CLIP in a file.

    Attributes:
        name: open_clip's name of the architecture.
        tag: the tag of its weights where the name of the file contains it, else None.
        quick_gelu: its activation, which the tensors do not show.
        transformers: the tensors have the names that the package transformers gives them.
    """

    name: str
    tag: str | None
    quick_gelu: bool
    transformers: bool


def find_clip(path: Path) -> FoundClip | None:
    """The CLIP in a safetensors file; None unless the file holds both towers of a known one.

    Only the header is read. The activation is that of a `config.json` of transformers in the same
    folder, or that of the tag whose first word is in the name of the file or of its folder (such as
    `openai` or `laion2b`); else OpenAI's for an architecture of theirs.
    """
    try:
        shapes = _shapes(path)
    except _MALFORMED as error:
        log.warning("%s is passed over: it cannot be read (%s).", path, first_line(error))
        return None
    try:
        transformers = "text_model.embeddings.token_embedding.weight" in shapes
        if transformers:
            shapes = {_rename(key): shape for key, shape in shapes.items()}
        name = _plain_clips().get(_dimensions(shapes))
    except _MALFORMED:
        return None
    if name is None:
        return None
    tags = list_pretrained_tags_by_model(name)
    title = f"{path.parent.name}/{path.stem}".lower()
    tag = next((tag for tag in tags if re.split(r"[_-]", tag)[0] in title), None)
    supposed = tag or ("openai" if "openai" in tags else None)
    quick = bool(supposed and get_pretrained_cfg(name, supposed).get("quick_gelu"))
    if transformers:
        quick = _configured_activation(path.parent / "config.json", quick)
    return FoundClip(name, tag, quick, transformers)


def read_transformers(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of transformers' CLIPModel under open_clip's names."""
    tensors = {_rename(key): tensor for key, tensor in load_file(path).items()}
    for key in [key for key in tensors if _PARTS.search(key)]:
        parts = [tensors.pop(key.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        tensors[_PARTS.sub(r".attn.in_proj_\1", key)] = torch.cat(parts)
    for key in ("visual.proj", "text_projection"):
        tensors[key] = tensors[key].T.contiguous()
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
    return {key: tuple(header[key]["shape"]) for key in header if key != "__metadata__"}


def _rename(key: str) -> str:
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key


def _dimensions(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The dimensions in which architectures differ, independent of how projections are stored."""
    width, _, patch, _ = shapes["visual.conv1.weight"]
    positions, _ = shapes["visual.positional_embedding"]
    words, text_width = shapes["token_embedding.weight"]
    context, _ = shapes["positional_embedding"]
    shared = {*shapes["visual.proj"]} & {*shapes["text_projection"]}
    hidden = shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0]
    embed_dim = min(shared) if shared else 0
    layers = [_layers(shapes, prefix) for prefix in ("visual.transformer", "transformer")]
    return embed_dim, width, patch, positions, hidden, text_width, words, context, *layers


def _layers(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    found = re.compile(rf"^{re.escape(prefix)}\.resblocks\.(\d+)\.")
    return len({match[1] for key in shapes if (match := found.match(key))})


def _plain_clips() -> dict[tuple[int, ...], str]:
    """Names of open_clip's plain CLIPs by their dimensions."""
    names: dict[tuple[int, ...], str] = {}
    for name in open_clip.list_models():
        config = config_of(name)
        image, text = config["vision_cfg"], config["text_cfg"]
        if config.get("custom_text") or "multimodal_cfg" in config or config.get("quick_gelu"):
            continue
        if not isinstance(image.get("layers"), int) or "hf_model_name" in text:
            continue
        if set(text) - {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}:
            continue
        width, patch = image["width"], image["patch_size"]
        dimensions = (
            config["embed_dim"],
            width,
            patch,
            (image["image_size"] // patch) ** 2 + 1,
            int(width * image.get("mlp_ratio", 4.0)),
            text["width"],
            text["vocab_size"],
            text["context_length"],
            image["layers"],
            text["layers"],
        )
        names.setdefault(dimensions, name)
    return names


def config_of(name: str) -> dict[str, Any]:
    """open_clip's config of one of its architectures."""
    config = get_model_config(name)
    if config is None:
        raise KeyError(name)
    return config


def _configured_activation(path: Path, otherwise: bool) -> bool:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config["text_config"].get("hidden_act", "quick_gelu") == "quick_gelu"
    except _MALFORMED:
        return otherwise


def check_header(path: Path) -> None:
    """Raise if a file cannot hold weights; torch would raise any kind of exception for some files.

    Raises:
        EOFError: the file is empty.
        UnpicklingError: it is no PyTorch file, or one that holds code.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        raise EOFError("the file is empty")
    if path.suffix == ".safetensors":
        return
    if start not in (b"PK", b"\x80\x02"):
        raise pickle.UnpicklingError("not a PyTorch file")
    if start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("a TorchScript archive, which holds code")
