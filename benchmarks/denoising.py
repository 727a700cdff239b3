"""Seconds and memory of a search step through an image pipeline, compared with a CLIP alone.

    python benchmarks/denoising.py                   # ten minutes on two cores
    python benchmarks/denoising.py --xl --dtype bfloat16 --cases 1,1 4,1
    python benchmarks/denoising.py --device cuda --dtype float16

Builds a pipeline of the shape of Stable Diffusion 1.5, or XL, and a CLIP ViT-L-14, all with random
weights, and writes the table to benchmarks/results. Each case runs in a process of its own; its
memory is the peak of that process, or of the device, during the search.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from step_time import machine
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from pez_core import Clip, Report, SearchOptions, invert, load_clip
from pez_core.diffusion import DenoisingLoss

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "examples/noto-parrot.png"
CASES = ["1,1", "4,1", "4,4"]

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
UNET = {"sample_size": 64, "cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
UNET_XL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "norm_num_groups": 2,
}


def build_pipeline(shape: str) -> DiffusionPipeline:
    """`shape` is tiny, sd15 or xl."""
    parts = {"scheduler": DDIMScheduler(**SCHEDULE)}
    channels = (4, 8) if shape == "tiny" else (128, 256, 512, 512)
    parts["vae"] = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1 if shape == "tiny" else 2,
        norm_num_groups=2 if shape == "tiny" else 32,
    )
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    tiny["num_hidden_layers"] = 2
    parts["tokenizer"] = tokenizer()
    parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**(tiny if shape == "tiny" else TEXT)))
    parts["unet"] = UNet2DConditionModel(**{"tiny": TINY, "sd15": UNET, "xl": UNET_XL}[shape])
    for part in (parts["vae"], parts["text_encoder"], parts["unet"]):
        part.eval()
    if shape != "xl":
        return StableDiffusionPipeline(
            **parts,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    text = CLIPTextConfig(**TEXT_2, num_hidden_layers=32, projection_dim=1280, hidden_act="gelu")
    return StableDiffusionXLPipeline(
        **parts,
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer_2=tokenizer(),
    )


def tokenizer() -> CLIPTokenizer:
    words = open_clip.SimpleTokenizer()
    vocab = dict(words.encoder)
    for name in ("start", "end"):
        vocab[f"<|{name}oftext|>"] = vocab.pop(f"<{name}_of_text>")
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def build_clip(shape: str, device: str, dtype: torch.dtype) -> Clip:
    if shape == "tiny":
        return load_clip(device=device)
    model = open_clip.create_model("ViT-L-14", load_weights=False).to(device, dtype).eval()
    return Clip(model, open_clip.get_tokenizer("ViT-L-14"), "ViT-L-14")


def measure(
    shape: str, device: str, dtype: torch.dtype, steps: int, threads: int, case: tuple | None
) -> tuple[float, float, float]:
    """Seconds per step, GiB before the search, and the peak during it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clip = build_clip(shape, device, dtype)
    extra = None
    if case is not None:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            pipeline = build_pipeline(shape)
        torch.set_default_dtype(torch.float32)
        samples, batch_size = case
        extra = DenoisingLoss(
            pipeline, Image.open(PICTURE), clip, samples=samples, batch_size=batch_size
        )
    before = memory(device, start=True)
    reports = []
    most = []

    def report(state: Report) -> None:
        reports.append((state.step, state.elapsed))
        most.append(memory(device))

    # the first step warms up
    options = SearchOptions(
        prompt_len=16, swaps=0, steps=steps + 1, extra_loss=extra, block_unsafe=False
    )
    invert(clip, Image.open(PICTURE), options, callback=report)
    (first, began), (last, ended) = reports[0], reports[-1]
    return (ended - began) / (last - first), before, most[-1]


def memory(device: str, start: bool = False) -> float:
    """GiB now, as the start of a measurement; or the peak since the start."""
    if device == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def alone(*arguments) -> tuple[float, float, float]:
    """`measure` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def table(
    shape: str, device: str, dtype: torch.dtype, steps: int, threads: int, cases: list[str]
) -> list[str]:
    lines = [
        "| what | samples | batch_size | against the CLIP alone | s/step | s/step/sample | "
        "GiB at most | of these in the step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in [None, *(tuple(map(int, case.split(","))) for case in cases)]:
        # a step of the CLIP alone is short, and one of the pipeline is not
        count = steps if case else 10 * steps
        run = measure if shape == "tiny" else alone
        seconds, before, most = run(shape, device, dtype, count, threads, case)
        if case is None:
            clip_seconds = seconds
        name = "the CLIP alone" if case is None else "the pipeline alone"
        samples, batch_size = case or ("-", "-")
        each = f"{seconds / samples:.3g}" if case else "-"
        lines.append(
            f"| {name} | {samples} | {batch_size} | {seconds / clip_seconds:.1f}x | "
            f"{seconds:.3g} | {each} | {most:.2f} | {most - before:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--xl", action="store_true", help="the shape of Stable Diffusion XL")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each case")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", default=CASES, help="samples,batch_size")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    shape = "tiny" if arguments.tiny else "xl" if arguments.xl else "sd15"
    torch.set_num_threads(arguments.threads)
    where = machine().removesuffix(", fp32")
    if arguments.device == "cuda":
        where = (
            f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, "
            f"torch {torch.__version__}"
        )
    name = {"tiny": "a tiny pipeline", "sd15": "Stable Diffusion 1.5", "xl": "Stable Diffusion XL"}
    lines = [
        f"# A step through {name[shape]}",
        "",
        f"Random weights, prompt_len 16, one prompt and image, {arguments.steps} timed steps after "
        f"one to warm up. {where}, {arguments.dtype}.",
        "",
        *table(
            shape,
            arguments.device,
            getattr(torch, arguments.dtype),
            arguments.steps,
            arguments.threads,
            arguments.cases,
        ),
        "",
        "A sample is a forward and a backward pass of the UNet. The CLIP is in memory in every "
        "case. A step by both takes both times.",
        "",
    ]
    if arguments.device != "cuda":
        lines += ["Times and memory on a GPU are still to be measured.", ""]
    text = "\n".join(lines)
    print(text)
    suffix = "" if shape == "sd15" else f"-{shape}"
    out = arguments.out or ROOT / f"benchmarks/results/denoising{suffix}.md"
    out.write_text(text)


if __name__ == "__main__":
    main()
