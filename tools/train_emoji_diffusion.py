"""Train `emoji-diffusion`, a small latent diffusion model whose text encoder is `emoji-clip`.

    pip install -e ".[diffusers,train]"
    python tools/train_emoji_diffusion.py all       # the stages autoencoder, unet and export

The exported folder is an ordinary Stable Diffusion pipeline: `StableDiffusionPipeline` of diffusers
loads it without code of this project. The autoencoder has 4 latent channels and turns 64x64 pixels
into 16x16 latents. The U-Net reads the hidden states of `emoji-clip`'s own text tower, which stays
frozen, as Stable Diffusion reads those of CLIP. Drawings, captions and split are those of
`train_emoji_clip.py`: the held-out style and names are never used here.

Styles without colours are left out, and the U-Net is trained on two styles (`DRAWN_STYLES`). Every
stage writes a checkpoint to --runs every few minutes and resumes from it; more or fewer --steps
than before are allowed. On one core without AVX-512 the autoencoder took 55 minutes, and a step of
the U-Net takes 0.7 seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from emoji_captions import Captions, Lexicon
from emoji_data import Drawing, prepare
from emoji_views import BACKGROUNDS, BLACK_STYLES, View, composite
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

log = logging.getLogger("train_emoji_diffusion")

CLIP = Path("pez_core/models/emoji-clip")
OUT = Path("pez_core/models/emoji-diffusion")
LATENTS = "latents.pt"  # of all drawings, in the folder of the checkpoints
SAVE_SECONDS, LOG_EVERY = 300, 200
CONTEXT = 77
NO_CAPTION = 0.12  # share of captions left out, for classifier-free guidance
# The U-Net is trained on these alone: a name has much the same outline in both, and many in all.
DRAWN_STYLES = ("noto", "twemoji")
WHITE = 0.9  # share of drawings on white; the others are on a colour that the caption names
EMA = 0.999
STAGES = ("autoencoder", "unet", "export")
WARM_UP, DECAY = 200, 0.2  # steps, and a share of all steps
# Mean and standard deviation of the logarithm of the SNR in training. Latents of 16x16 show the
# outline at an SNR of 5; what is to be learned from the text lies below.
LOG_SNR = (-0.7, 1.8)

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 48, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
}
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 80, 160],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "cross_attention_dim": 128,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def text_encoder(folder: Path) -> CLIPTextModel:
    """The text tower of an open_clip model as a `CLIPTextModel`, with equal hidden states."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    width, layers = config["width"], config["layers"]
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config["vocab_size"],
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=config["heads"],
            max_position_embeddings=config["context_length"],
            hidden_act="gelu",
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    state = load_file(folder / "open_clip_model.safetensors")
    table = "embeddings.token_embedding.weight"
    prefix = next(n.removesuffix(table) for n in model.state_dict() if n.endswith(table))
    new = {
        f"{prefix}embeddings.token_embedding.weight": state["token_embedding.weight"],
        f"{prefix}embeddings.position_embedding.weight": state["positional_embedding"],
        f"{prefix}final_layer_norm.weight": state["ln_final.weight"],
        f"{prefix}final_layer_norm.bias": state["ln_final.bias"],
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for k in range(layers):
        there, here = f"transformer.resblocks.{k}.", f"{prefix}encoder.layers.{k}."
        for end in ("weight", "bias"):
            for old, name in names.items():
                new[f"{here}{name}.{end}"] = state[f"{there}{old}.{end}"]
            parts = state[f"{there}attn.in_proj_{end}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                new[f"{here}self_attn.{letter}_proj.{end}"] = part
    missing, unexpected = model.load_state_dict(
        {name: value.float() for name, value in new.items()}, strict=False
    )
    if unexpected or any("position_ids" not in name for name in missing):
        raise RuntimeError(f"the text tower does not fit: {missing} {unexpected}")
    return model.eval().requires_grad_(False)


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, made of the vocabulary that open_clip ships."""
    import open_clip

    simple = open_clip.SimpleTokenizer()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        ids = simple.encoder | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
        own = {"<start_of_text>", "<end_of_text>"}  # what open_clip calls them
        ids = {token: k for token, k in ids.items() if token not in own}
        vocabulary.write_text(json.dumps(ids), "utf-8")
        ranked = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in ranked)]
        merges.write_text("\n".join(lines) + "\n", "utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)


@dataclass(frozen=True)
class Data:
    """The training drawings.

    Attributes:
        drawings, pixels: all drawings and their (N, 4, 64, 64) values in [0, 255].
        index: of those that are trained on.
    """

    drawings: list[Drawing]
    pixels: torch.Tensor
    index: list[int]

    def on(self, chosen: list[int], backgrounds: list[str]) -> torch.Tensor:
        """(n, 3, 64, 64) values in [-1, 1] of drawings on backgrounds."""
        colours = torch.tensor([BACKGROUNDS[name] for name in backgrounds]) / 255
        return composite(self.pixels[chosen].float() / 255, colours)


def load_data(folder: Path) -> Data:
    drawings, pixels = prepare(folder)
    index = [
        i for i, d in enumerate(drawings) if d.split == "train" and d.style not in BLACK_STYLES
    ]
    return Data(drawings, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), index)


def batches(index: list[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Batches of shuffled indices for ever."""
    while True:
        order = rng.sample(index, len(index))
        yield from (order[k : k + size] for k in range(0, len(order) - size + 1, size))


class Run:
    """A training that saves its state every few minutes and resumes from it."""

    def __init__(self, path: Path, model: nn.Module, lr: float, steps: int) -> None:
        self.path, self.model, self.lr, self.steps = path, model, lr, steps
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        self.average = {n: v.detach().clone() for n, v in model.state_dict().items()}
        self.step, self._saved = 0, time.monotonic()
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]
            log.info("resumed at step %d of %d", self.step, steps)

    def update(self, loss: torch.Tensor) -> None:
        """One step of the optimiser: warm-up, a constant rate, and linear decay in the end.

        A training can so be given more steps, or fewer, while it runs.
        """
        rate = self.lr * min(
            1.0, (self.step + 1) / WARM_UP, (self.steps - self.step) / (DECAY * self.steps)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(EMA, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        if time.monotonic() - self._saved > SAVE_SECONDS or self.step == self.steps:
            self.save()

    def save(self) -> None:
        self._saved = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average,
                "step": self.step,
            },
            part,
        )
        part.replace(self.path)


def train_autoencoder(data: Data, runs: Path, steps: int, batch: int, seed: int) -> None:
    """Reconstruction by L1 and edges, with a small KL term."""
    torch.manual_seed(seed)
    model = AutoencoderKL.from_config(AUTOENCODER).to(memory_format=torch.channels_last)
    run = Run(runs / "autoencoder.pt", model, 1.5e-3, steps)
    rng = random.Random(seed + run.step)
    if run.step < steps:
        (runs / LATENTS).unlink(missing_ok=True)  # of the autoencoder before
    for chosen in batches(data.index, batch, rng):
        if run.step >= steps:
            break
        names = [rng.choice(list(BACKGROUNDS)) if rng.random() > WHITE else "white" for _ in chosen]
        x = data.on(chosen, names)
        mirror = torch.tensor([rng.random() < 0.5 for _ in chosen])[:, None, None, None]
        x = torch.where(mirror, x.flip(-1), x)
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = model.encode(x).latent_dist
        found = model.decode(posterior.sample()).sample
        flat = F.l1_loss(found, x)
        loss = flat + _edges(found, x) + 1e-6 * posterior.kl().mean()
        run.update(loss)
        if run.step % LOG_EVERY == 0:
            log.info("autoencoder %d: L1 %.4f loss %.4f", run.step, flat, loss)
            _save_grid(torch.cat([x[:8], found[:8].detach()]), runs / "autoencoder.png")


def _edges(found: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 of the differences between neighbouring pixels, which keeps outlines sharp."""
    rows = F.l1_loss(found.diff(dim=2), x.diff(dim=2))
    return rows + F.l1_loss(found.diff(dim=3), x.diff(dim=3))


def load_autoencoder(runs: Path) -> AutoencoderKL:
    """The trained autoencoder; once its latents were measured, theirs have mean 0 and std 1."""
    model = AutoencoderKL.from_config(AUTOENCODER)
    model.load_state_dict(torch.load(runs / "autoencoder.pt", weights_only=True)["average"])
    if (runs / LATENTS).exists():
        state = torch.load(runs / LATENTS, weights_only=True)
        _normalise(model, state["mean"], state["std"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _normalise(model: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Let the two 1x1 convolutions beside the latents shift and scale each channel.

    Stable Diffusion has one scale for all channels and no shift. Drawings on white have latents
    far from 0, which the noise of the last timestep would not hide.
    """
    into, out = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()  # of the logarithm of the variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]


@torch.no_grad()
def encode_all(data: Data, runs: Path) -> torch.Tensor:
    """(drawings, 4, 16, 16): the latents of `Data.index` on white, computed once."""
    path = runs / LATENTS
    if path.exists():
        return torch.load(path, weights_only=True)["values"]
    autoencoder, rows = load_autoencoder(runs), []
    for k in range(0, len(data.index), 128):
        part = data.index[k : k + 128]
        rows.append(autoencoder.encode(data.on(part, ["white"] * len(part))).latent_dist.mode())
    values = torch.cat(rows)
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3))
    values = ((values - mean[:, None, None]) / std[:, None, None]).half()
    torch.save({"values": values, "mean": mean, "std": std}, path)
    return values


def train_unet(data: Data, runs: Path, steps: int, batch: int, seed: int, clip: Path) -> None:
    """v-prediction on latents, conditioned on captions of all kinds that a person may write."""
    torch.manual_seed(seed)
    latents = encode_all(data, runs)
    autoencoder = load_autoencoder(runs)
    model = UNet2DConditionModel.from_config(UNET)
    run = Run(runs / "unet.pt", model, 1e-3, steps)
    rng = random.Random(seed + run.step)
    generator = torch.Generator().manual_seed(seed + run.step)
    encoder, words = text_encoder(clip), tokenizer()
    pixels = data.pixels.permute(0, 2, 3, 1).numpy()
    captions = Captions(data.drawings, pixels, Lexicon(), rng)
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    place = {i: k for k, i in enumerate(data.index)}
    began, first = time.monotonic(), run.step
    drawn = [i for i in data.index if data.drawings[i].style in DRAWN_STYLES]
    for chosen in batches(drawn, batch, rng):
        if run.step >= steps:
            break
        views = [View((i,), False, _background(rng)) for i in chosen]
        z = latents[[place[i] for i in chosen]].float()
        coloured = [k for k, v in enumerate(views) if v.background != "white"]
        if coloured:
            x = data.on([chosen[k] for k in coloured], [views[k].background for k in coloured])
            with torch.no_grad():
                z[coloured] = autoencoder.encode(x).latent_dist.mode()
        loss = _diffusion_loss(
            model,
            scheduler,
            z,
            _states(encoder, words, captions, views, rng),
            generator,
        )
        run.update(loss)
        if run.step % LOG_EVERY == 0:
            seconds = (time.monotonic() - began) / (run.step - first)
            log.info("unet %d: loss %.4f, %.2f s each", run.step, loss, seconds)


def _background(rng: random.Random) -> str:
    return "white" if rng.random() < WHITE else rng.choice(list(BACKGROUNDS))


@torch.no_grad()
def _states(
    encoder: CLIPTextModel,
    words: CLIPTokenizer,
    captions: Captions,
    views: list[View],
    rng: random.Random,
) -> torch.Tensor:
    """(n, 77, width) hidden states of a caption of each view; some are empty."""
    texts = []
    for view in views:
        text = captions.caption(view, 16).text
        if view.background != "white" and view.background not in text:
            text = f"{text}, {view.background} background"
        texts.append("" if rng.random() < NO_CAPTION else text)
    ids = words(
        texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    ).input_ids
    return encoder(ids).last_hidden_state


def _diffusion_loss(
    model: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    z: torch.Tensor,
    states: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    noise = torch.randn(z.shape, generator=generator)
    steps = _timesteps(scheduler, len(z), generator)
    noisy = scheduler.add_noise(z, noise, steps)
    target = scheduler.get_velocity(z, noise, steps)
    return F.mse_loss(model(noisy, steps, states).sample, target)


def _timesteps(scheduler: DDIMScheduler, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) timesteps whose logarithm of the SNR has a normal distribution (see `LOG_SNR`)."""
    signal = scheduler.alphas_cumprod
    table = (signal / (1 - signal)).log()  # falls
    mean, deviation = LOG_SNR
    wanted = mean + deviation * torch.randn(count, generator=generator)
    return torch.searchsorted(-table, -wanted).clamp(max=len(table) - 1)


def build(runs: Path, clip: Path) -> StableDiffusionPipeline:
    """The pipeline of the weights in `runs`."""
    autoencoder = load_autoencoder(runs)
    autoencoder.register_to_config(scaling_factor=1.0)
    model = UNet2DConditionModel.from_config(UNET)
    model.load_state_dict(torch.load(runs / "unet.pt", weights_only=True)["average"])
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder(clip),
        tokenizer=tokenizer(),
        unet=model.eval(),
        # 12 of its steps make the images of 25 steps of DDIM
        scheduler=DPMSolverMultistepScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipe: StableDiffusionPipeline, out: Path) -> None:
    """Save the pipeline in half precision, in such a way that it loads in float32.

    diffusers loads its own models in float32; transformers loads in the dtype of the config. The
    weights of the text encoder get the names of published pipelines, which every version reads.
    """
    pipe.to(dtype=torch.float16).save_pretrained(out)
    path = out / "text_encoder/config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    weights, prefix = out / "text_encoder/model.safetensors", "text_model."
    state = {prefix + n.removeprefix(prefix): v for n, v in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})


def sample(runs: Path, clip: Path, texts: list[str], path: Path, guidance_scale: float) -> None:
    """A grid of four images for each text."""
    pipe = build(runs, clip)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for text in texts:
        made = pipe(
            text,
            num_images_per_prompt=4,
            num_inference_steps=12,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        images.append(made.images * 2 - 1)
    _save_grid(torch.cat(images), path, columns=4)


def _save_grid(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    rows = [torch.cat([*row], dim=2) for row in images.float().split(columns)]
    pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (pixels.shape[1] * 2, pixels.shape[0] * 2), Image.Resampling.NEAREST
    ).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["all", *STAGES, "sample"])
    parser.add_argument("texts", nargs="*", help="for sample")
    parser.add_argument("--folder", type=Path, default=Path("build/emoji"))
    parser.add_argument("--runs", type=Path, default=Path("build/emoji-diffusion"))
    parser.add_argument("--clip", type=Path, default=CLIP)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="default: 16")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if a.stage == "sample":
        sample(a.runs, a.clip, a.texts, a.runs / "samples.png", a.guidance_scale)
        return
    if a.stage == "all" and a.steps is not None:
        parser.error("--steps is that of one stage; name autoencoder or unet")
    for stage in STAGES if a.stage == "all" else [a.stage]:
        if stage == "export":
            export(build(a.runs, a.clip), a.out)
        elif stage == "autoencoder":
            train_autoencoder(load_data(a.folder), a.runs, a.steps or 2_400, a.batch or 16, a.seed)
        else:
            data = load_data(a.folder)
            train_unet(data, a.runs, a.steps or 24_000, a.batch or 16, a.seed, a.clip)


if __name__ == "__main__":
    main()
