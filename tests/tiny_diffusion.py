"""Real diffusers pipelines at tiny size, built offline."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

ROOT = Path(__file__).parent.parent
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@cache
def tokenizer() -> CLIPTokenizer:
    """transformers' own tokenizer for CLIP, from the vocabulary that open_clip carries."""
    words = open_clip.SimpleTokenizer()

    def rename(token: str) -> str:
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        return names.get(token, token)

    vocab = {rename(token): k for token, k in words.encoder.items()}
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def text_config(width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=projection,
    )


def vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        **options,
    )


def unet(width: int, **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        norm_num_groups=2,
        **options,
    )


def stable_diffusion(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """Stable Diffusion 1.x, or 2.x with `v_prediction`, in 64 x 64 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(16, 16)),
            tokenizer=tokenizer(),
            unet=unet(16),
            scheduler=DDIMScheduler(
                **SCHEDULE,
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction_type,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _quiet(pipe)


def stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL in 64 x 64 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(16, 16)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(24, 24)),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(
                40,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 24,
                transformer_layers_per_block=1,
                attention_head_dim=2,
                use_linear_projection=True,
            ),
            scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
        )
    return _quiet(pipe)


def flux(seed: int = 0) -> FluxPipeline:
    """Flux, whose default size has to be asked for: 32 x 32 pixels are quick."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
            text_encoder=CLIPTextModel(text_config(16, 16)),
            tokenizer=tokenizer(),
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=130, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            ),
            tokenizer_2=T5Tokenizer(vocab=letters, model_max_length=64),
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=(4, 4, 8),
            ),
        )
    return _quiet(pipe)


def export_emoji_diffusion(folder: Path, seed: int = 0) -> None:
    """What `tools/train_emoji_diffusion.py` exports, with small networks of random weights."""
    sys.path.insert(0, str(ROOT / "tools"))
    import train_emoji_diffusion as tool

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = tool.AUTOENCODER | {"block_out_channels": [8, 16, 24]}
        network = tool.UNET | {"block_out_channels": [32, 48, 80]}
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL.from_config(autoencoder),
            text_encoder=tool.text_encoder(ROOT / tool.CLIP),
            tokenizer=tool.tokenizer(),
            unet=UNet2DConditionModel.from_config(network),
            scheduler=tool.DPMSolverMultistepScheduler.from_config(tool.SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.vae.register_to_config(scaling_factor=0.5)
    tool.export(_quiet(pipe), folder)


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipe
