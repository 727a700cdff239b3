"""Stable Diffusion 1.5 in shape and layout, with random weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

# small, for the VAE's image to stay finite; a prime number of them, so that no two rows of a
# matrix are alike
_POOL = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype("<f2").tobytes()
_ONES = np.ones(10_000, "<f2").tobytes()


def write_sd15(folder: Path) -> None:
    """Write the model (2.1 GB) as diffusers and ComfyUI's `DiffusersLoader` read it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280)
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        )
        # CLIPTextModel names its weights without the prefix `text_model.` since transformers 5.6,
        # and ComfyUI then finds none of them; the kind with a projection still has it
        text = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                hidden_act="quick_gelu",
                projection_dim=768,
            )
        )
    for model, name in ((unet, "unet"), (vae, "vae")):
        model.save_config(folder / name)
        _save(model, folder / name / "diffusion_pytorch_model.safetensors")
    text.config.save_pretrained(folder / "text_encoder")
    _save(text, folder / "text_encoder/model.safetensors")
    (folder / "model_index.json").write_text("{}")


def _save(model: torch.nn.Module, path: Path) -> None:
    """Write a safetensors file piece by piece: the tensors in memory first take twice as long."""
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
    }
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    pieces, end = [], 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {
            "dtype": "F16",
            "shape": list(parameter.shape),
            "data_offsets": [start, end],
        }
        pieces.append((_ONES if name in norms else _POOL, end - start))
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values, size in pieces:
            for _ in range(size // len(values)):
                file.write(values)
            file.write(values[: size % len(values)])
