"""CLIPs and CLIP_VISIONs in ComfyUI's own classes, for tests that run inside of ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.clip_vision
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import numpy as np
import torch
from pez_pack import nodes
from pez_pack.nodes import emoji_diffusion
from pez_pack.pez_core import Clip, SearchOptions, Vocabulary
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLED = ROOT / "pez_core/models/emoji-clip"

FEW = Vocabulary(only=["red", "blue", "fish", "bird", "dog", "cat", "sea", "sun", "tree", "night"])
QUICK = SearchOptions(prompt_len=3, swaps=2, steps=3, vocabulary=FEW)
STEPS = SearchOptions(prompt_len=3, effort="paper", steps=2, vocabulary=FEW)
LONG = "a very small red fish in the deep blue sea at night"

_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random weights in place of memory that is not set."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                one.fill_(1)
            elif one.ndim:
                one.copy_(torch.randn(one.shape, generator=generator) * 0.05)
    return model


def comfy_clip(tokenizer: Any, model: Any) -> Any:
    """A CLIP of true widths and three layers with random weights."""
    options = {f"clip_{kind}_model_config": {"num_hidden_layers": 3} for kind in "lgh"}
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    clip = comfy.sd.CLIP(target, model_options=options | {"dtype": torch.float32})
    randomised(clip.cond_stage_model)
    return clip


def sdxl() -> Any:
    return comfy_clip(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)


def vision(projection: int) -> Any:
    """A small CLIP_VISION with features of this length and random weights; 0: not projected."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "gelu",
        "num_channels": 3,
        "model_type": "clip_vision_model",
    }
    if projection:
        small["projection_dim"] = projection
    made = comfy.clip_vision.ClipVisionModel(small)
    randomised(made.model)
    return made


def emoji_clip(folder: Path = BUNDLED) -> Any:
    """The text tower of a CLIP in open_clip's layout as a CLIP, without its projection."""
    sizes = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    weights = load_file(folder / "open_clip_model.safetensors")
    found = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
        "final_layer_norm.weight": weights["ln_final.weight"],
        "final_layer_norm.bias": weights["ln_final.bias"],
    }
    for k in range(sizes["layers"]):
        ours, theirs = f"transformer.resblocks.{k}.", f"encoder.layers.{k}."
        for kind in ("weight", "bias"):
            for name, new in _NAMES.items():
                found[f"{theirs}{new}.{kind}"] = weights[f"{ours}{name}.{kind}"]
            parts = weights[f"{ours}attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                found[f"{theirs}self_attn.{letter}_proj.{kind}"] = part.contiguous()
    config = {
        "hidden_size": sizes["width"],
        "intermediate_size": 4 * sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "max_position_embeddings": sizes["context_length"],
        "hidden_act": "gelu",
        "eos_token_id": 49407,
    }
    return emoji_diffusion.load_clip(config, {name: one.float() for name, one in found.items()})


class ImageTower:
    """The image tower of a CLIP of the core in place of a CLIP_VISION, which has no ResNets."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        projection = torch.nn.Linear(8, clip.feature_size)
        self.model = SimpleNamespace(visual_projection=projection)

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Any:
        pictures = [Image.fromarray((255 * one).round().byte().numpy()) for one in image]
        output = comfy.clip_vision.Output()
        output["image_embeds"] = 3 * self.clip.encode_images(pictures)  # not normalised
        return output


def picture(name: str) -> torch.Tensor:
    """One of the examples as a batch of one image."""
    image = Image.open(ROOT / f"examples/{name}.png").convert("RGB")
    return torch.from_numpy(np.asarray(image, np.float32) / 255)[None]


def execute(*given: Any) -> tuple[Any, str]:
    """The value of PEZ CLIP from Model, and its line."""
    output = nodes.ClipFromModel.PREPARE_CLASS_CLONE(None).execute(*given)
    return output.args[0], output.ui["text"][0]
