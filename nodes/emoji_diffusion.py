"""The bundled image model as ComfyUI's own MODEL, CLIP and VAE.

The folder has the layout of diffusers. ComfyUI's classes are built with its sizes, and its own
tables translate the names of the weights. Two things differ from the models that ComfyUI loads:
the groups of the group normalisation, which its classes have as 32, and an autoencoder of fewer
levels without attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.ldm.modules.diffusionmodules.model as autoencoder_parts
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch

FOLDER = Path(__file__).resolve().parent.parent / "pez_core/models/emoji-diffusion"
_LEVELS = 4  # of the autoencoder that ComfyUI's tables are about


class Latents(comfy.latent_formats.LatentFormat):
    """4 channels at a quarter of the size in pixels."""

    latent_channels = 4
    spacial_downscale_ratio = 4

    def __init__(self, scale_factor: float = 1.0) -> None:
        self.scale_factor = scale_factor


class Config(comfy.supported_models_base.BASE):
    """What ComfyUI has to know about the U-Net."""

    latent_format = Latents

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION


class _Times(float):
    """A multiple of the channels of the first level; ComfyUI's are whole numbers."""

    def __mul__(self, channels: int) -> int:
        return round(float(self) * channels)

    __rmul__ = __mul__


def load(folder: Path = FOLDER) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE.

    Raises:
        ValueError: the folder lacks the weights.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"The weights of the demo model are not in {folder}: install this pack again."
        )
    vae_config = _read(folder, "vae")[0]
    return (
        load_model(*_read(folder, "unet"), scale_factor=vae_config["scaling_factor"]),
        load_clip(*_read(folder, "text_encoder")),
        load_vae(*_read(folder, "vae")),
    )


def _read(folder: Path, part: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and weights, in float32, of a part of a pipeline."""
    config = json.loads((folder / part / "config.json").read_text("utf-8"))
    (file,) = (folder / part).glob("*.safetensors")
    weights = comfy.utils.load_torch_file(str(file), safe_load=True)
    return config, {name: value.float() for name, value in weights.items()}


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' config of a `UNet2DConditionModel` as ComfyUI's."""
    channels, each = config["block_out_channels"], config["layers_per_block"]
    depths = [int("CrossAttn" in kind) for kind in config["down_block_types"]]
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [_Times(one / channels[0]) for one in channels],
        "num_res_blocks": [each] * len(channels),
        "transformer_depth": [depth for depth in depths for _ in range(each)],
        "transformer_depth_output": [depth for depth in depths for _ in range(each + 1)],
        "transformer_depth_middle": 1,
        "context_dim": config["cross_attention_dim"],
        # diffusers' name for the number of heads, by an old mistake that it keeps
        "num_heads": config["attention_head_dim"],
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_checkpoint": False,
        "legacy": False,
        "dtype": torch.float32,
    }


def load_model(
    config: dict[str, Any], weights: dict[str, torch.Tensor], scale_factor: float
) -> Any:
    """The U-Net as a MODEL."""
    converted = unet_config(config)
    own = Config(converted)
    own.unet_config = converted  # without the defaults of other models
    own.latent_format = Latents(scale_factor)
    own.set_inference_dtype(torch.float32, None)
    own.custom_operations = _with_groups(config["norm_num_groups"])
    names = comfy.utils.unet_to_diffusers(converted)
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    model = own.get_model({}, device=offload)
    state = {names[name]: value for name, value in weights.items()}
    model.diffusion_model.load_state_dict(state)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def _with_groups(groups: int) -> type:
    """ComfyUI's operations, with so many groups in each group normalisation."""
    base = comfy.ops.disable_weight_init

    class GroupNorm(base.GroupNorm):
        def __init__(self, num_groups: int, num_channels: int, *rest: Any, **options: Any) -> None:
            super().__init__(groups, num_channels, *rest, **options)

    return type("Operations", (base,), {"GroupNorm": GroupNorm})


def load_clip(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """The text encoder with ComfyUI's own tokenizer as a CLIP."""
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel
    )
    encoder = partial(
        comfy.sd1_clip.SDClipModel, textmodel_json_config=config, return_projected_pooled=False
    )
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"clip_l_class": encoder, "dtype": torch.float32},
    )
    prefix = "text_model."  # which newer versions of transformers leave out
    clip.load_sd({prefix + name.removeprefix(prefix): value for name, value in weights.items()})
    return clip


def load_vae(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """The autoencoder as a VAE."""
    channels = config["block_out_channels"]
    sizes = {
        "ch": channels[0],
        "ch_mult": [one // channels[0] for one in channels],
        "num_res_blocks": config["layers_per_block"],
        "z_channels": config["latent_channels"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "resolution": config["sample_size"],
        "attn_resolutions": [],
        "double_z": True,
    }
    params = {"ddconfig": sizes, "embed_dim": config["latent_channels"]}
    state = _renamed(weights, len(channels))
    with _groups_of_autoencoder(config["norm_num_groups"]):
        vae = comfy.sd.VAE(sd=state, config={"params": params}, dtype=torch.float32)
    if not config["mid_block_add_attention"]:
        for part in (vae.first_stage_model.encoder, vae.first_stage_model.decoder):
            part.mid.attn_1 = torch.nn.Identity()
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(channels) - 1)
    return vae


def _renamed(weights: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """ComfyUI's names; its tables count the levels of the decoder from the last of four."""
    renamed = {}
    for name, value in comfy.diffusers_convert.convert_vae_state_dict(weights).items():
        if name.startswith("decoder.up."):
            level, rest = name.removeprefix("decoder.up.").split(".", 1)
            name = f"decoder.up.{int(level) - (_LEVELS - levels)}.{rest}"
        renamed[name] = value
    return renamed


@contextmanager
def _groups_of_autoencoder(groups: int) -> Iterator[None]:
    """Inside, ComfyUI builds its autoencoder with so many groups."""
    # its function `Normalize` is bound where classes are defined, and looks this up when called
    operations = autoencoder_parts.ops
    autoencoder_parts.ops = _with_groups(groups)
    try:
        yield
    finally:
        autoencoder_parts.ops = operations
