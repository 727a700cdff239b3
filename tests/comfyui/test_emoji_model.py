"""The bundled image model inside ComfyUI, against diffusers on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from pez_core import load_clip
from pez_core.clip.images import load_image

from .inside import inside
from .server import ROOT, Client, ComfyServer

pytest.importorskip("diffusers")

TEXT = "a red fish in the blue sea"
# Both in one process, with the sampler DDIM. ComfyUI starts from noise times sigma and ends at
# sigma 0; diffusers starts from sqrt(1 + sigma^2) and ends at the first sigma of the training. The
# first is given to diffusers by its latents, the second by `set_alpha_to_one`.
COMPARED = """
import math
from pathlib import Path
from diffusers import DDIMScheduler, StableDiffusionPipeline
import comfy.sample
from pez_pack.nodes import emoji_diffusion
folder = Path({folder!r})
pipe = StableDiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config, set_alpha_to_one=True, clip_sample=False
)
with torch.inference_mode():
    model, clip, vae = emoji_diffusion.load(folder)
    def encode(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))
    ours, theirs = encode({text!r})[0][0], pipe.encode_prompt({text!r}, "cpu", 1, False)[0]
    states = (ours - theirs).abs().max().item()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = comfy.sample.sample(
        model, noise, 10, 4.0, "ddim", "ddim_uniform", encode({text!r}), encode(""),
        torch.zeros_like(noise), seed=0,
    )
    sigma = model.get_model_object("model_sampling").sigmas[901].item()
    start = noise * sigma / math.sqrt(1 + sigma**2)
    settings = dict(num_inference_steps=10, guidance_scale=4.0, num_images_per_prompt=2)
    expected = pipe({text!r}, latents=start, output_type="latent", **settings).images
    expected = expected / pipe.vae.config.scaling_factor
    latents = (found - expected).abs().max().item() / expected.std().item()
    plain = pipe({text!r}, latents=noise, output_type="latent", **settings).images
    plain = plain / pipe.vae.config.scaling_factor
    moved = (found - plain).abs().mean().item() / expected.std().item()
    another = pipe("a green hat", latents=start, output_type="latent", **settings).images
    another = (found - another / pipe.vae.config.scaling_factor).abs().mean().item()
    pixels = vae.decode(found)
    made = pipe.vae.decode(found).sample.permute(0, 2, 3, 1) / 2 + 0.5
    decoded = (pixels - made.clamp(0, 1)).abs().max().item()
    back = vae.encode(pixels[:1])
    encoded = pipe.vae.encode(pixels[:1].permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    encoding = (back - encoded).abs().max().item()
    empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 8, 8), 8)
answer([states, latents, moved, another, decoded, encoding, list(pixels.shape), list(empty.shape)])
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from tiny_diffusion import export_emoji_diffusion

    folder = tmp_path_factory.mktemp("models") / "emoji-diffusion"
    export_emoji_diffusion(folder)
    return folder


@pytest.mark.parametrize("weights", ["random", "bundled"])
def test_comfyui_samples_what_diffusers_samples(exported, weights):
    folder = exported if weights == "random" else ROOT / "pez_core/models/emoji-diffusion"
    code = COMPARED.format(folder=str(folder), text=TEXT)
    states, latents, moved, another, decoded, encoding, shape, empty = inside(code)
    assert states < 1e-4
    assert latents < 0.01
    assert another > 10 * latents
    assert moved < 0.05  # with the start and the end of each program
    assert decoded < 0.01 and encoding < 0.01
    assert shape == [2, 64, 64, 3] and empty == [1, 4, 16, 16]


def test_missing_weights_are_named(tmp_path):
    message = inside(
        f"""
from pathlib import Path
from pez_pack.nodes import emoji_diffusion
try:
    emoji_diffusion.load(Path({str(tmp_path)!r}))
except ValueError as error:
    answer(str(error))
"""
    )
    assert "weights of the demo model are not in" in message


CHOSEN = """
from pathlib import Path
from pez_pack import nodes
from pez_pack.nodes import emoji_diffusion, memory
from pez_pack.pez_core import load_clip
from pez_pack.pez_core.targets import encode_targets
model, text_encoder, vae = emoji_diffusion.load(Path({folder!r}))
cpu = torch.device("cpu")
clip = memory.LoadedClip(load_clip("emoji-clip", device="cpu"), cpu, cpu)
target = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
given = dict(
    clip=clip, images=target, model=model, text_encoder=text_encoder, vae=vae, seed=3,
    latent_image=dict(samples=torch.zeros(2, 4, 16, 16)), num_inference_steps=2,
    guidance_scale=4.0, sampler_name="ddim", scheduler="ddim_uniform",
)
def choose(prompts):
    node = nodes.ChooseByImage.PREPARE_CLASS_CLONE(None)
    with torch.inference_mode():
        return node.execute(prompts=prompts, **{{k: [v] for k, v in given.items()}}).args
prompts = ["a red fish", "a green hat", "the sun"]
best, images, ordered, similarities = choose([*prompts, prompts[0]])
alone = {{one: choose([one])[1:4:2] for one in prompts}}
with torch.no_grad():
    picture = encode_targets("images", clip.clip, [target[0]])
    features = encode_targets("images", clip.clip, list(images))
given |= dict(latent_image=dict(samples=torch.zeros(1, 4, 16, 40)))
wide = choose(prompts[:1])[1]
fits = []
for given["fit"] in ("crop", "pad", "stretch"):
    given["images"] = wide
    fits += choose(prompts[:1])[3]
try:
    choose([" "])
    message = ""
except Exception as error:
    message = str(error)
drawn = []
nodes.choose._images_of = lambda *_: drawn.append(0)
given["images"] = torch.full((1, 64, 64, 3), float("nan"))
try:
    choose(prompts)
except Exception as error:
    message += f"; {{error}}; {{len(drawn)}} drawn"
answer([
    best, ordered, similarities, [alone[one][1][0] for one in ordered],
    torch.equal(images, alone[best][0]), (features @ picture.T).mean().item(), message, fits,
])
"""


def test_the_prompt_with_the_most_similar_images_is_chosen(exported):
    code = CHOSEN.format(folder=str(exported))
    best, ordered, similarities, alone, same, expected, message, fits = inside(code)
    assert sorted(ordered) == ["a green hat", "a red fish", "the sun"]  # each one once
    assert best == ordered[0] and similarities == sorted(similarities, reverse=True)
    assert len({*similarities}) == 3
    assert similarities == pytest.approx(alone)  # each has the same noise
    assert same
    assert similarities[0] == pytest.approx(expected, abs=1e-4)
    assert "prompts" in message and "is empty" in message
    # wide images with themselves as the target
    assert fits == pytest.approx([1.0] * 3, abs=1e-3)


def graph(image: str) -> dict[str, Any]:
    """The graph of the template "A first look", with a quick search."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "target": node("LoadImage", image=image),
        "clip": node("PEZ_LoadCLIP", model="bundled emoji CLIP (no download)", download=False),
        "learned": node(
            "PEZ_ImageToPrompt", clip=["clip", 0], images=["target", 0], prompt_len=8,
            effort="fast", restarts=1, seed=0,
        ),
        "model": node("PEZ_EmojiModel"),
        "positive": node("CLIPTextEncode", clip=["model", 1], text=["learned", 0]),
        "negative": node("CLIPTextEncode", clip=["model", 1], text=""),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=4),
        "sampler": node(
            "KSampler", model=["model", 0], positive=["positive", 0], negative=["negative", 0],
            latent_image=["latent", 0], seed=0, steps=25, cfg=4.0, sampler_name="ddim",
            scheduler="ddim_uniform", denoise=1.0,
        ),
        "images": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "saved": node("SaveImage", images=["images", 0], filename_prefix="like"),
    }  # fmt: skip


@pytest.mark.timeout(900)
def test_most_images_look_like_their_own_target(server: ComfyServer, client: Client):
    """By a CLIP that no search used: the images that KSampler makes of the learned prompt."""
    targets = sorted((ROOT / "examples").glob("noto-*.png"))
    assert len(targets) == 10
    judge = load_clip(ROOT / "benchmarks/models/emoji-clip-judge", device="cpu")
    features = []
    for target in targets:
        run = client.run(graph(client.upload(target)), timeout=300)
        assert run.status == "success", run.error
        saved = [one["filename"] for one in run.outputs["saved"]["images"]]
        pictures = [Image.open(server.folder / "output" / name).convert("RGB") for name in saved]
        made = judge.encode_images(pictures)
        features.append(made.mean(0))
    similar = torch.stack(features) @ judge.encode_images(list(map(load_image, targets))).T
    own = int((similar.argmax(1) == torch.arange(10)).sum())
    print(f"{own} of 10 images are most similar to their own target")
    assert own >= 6, similar
