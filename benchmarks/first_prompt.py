"""Seconds until the first prompt in a new process, part by part, on CLIPs of usual size.

    python benchmarks/first_prompt.py                       # ViT-B-32 and ViT-L-14, two efforts
    python benchmarks/first_prompt.py --models ViT-L-14 --efforts balanced --prompt-len 8

The weights are random, and lie in a file in half precision as published ones do, so that loading is
measured as well. A tag in the name of the file gives the activation and the preparation of images;
`load_clip` takes longer where it has to measure them. Every case is a process of its own, with
nothing in any cache but the disk's. The second prompt is of another image in the same process. The
time of PEZ as published, by this package's loop, is measured over a few steps and scaled up: its
steps all cost the same.

Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

EFFORTS = ("fast", "balanced")
DTYPES = ["default", "float32"]  # of the matrices in a search
PUBLISHED, MEASURED = 3000, 12  # steps of PEZ as published, and those that are measured
PARTS = ("imports", "load", "encode_image", "first", "second")


def measure(path: Path, model: str, effort: str, dtype: str, prompt_len: int) -> dict[str, float]:
    """The parts of one case, in this process."""
    began = time.perf_counter()
    import numpy as np
    import torch
    from PIL import Image

    from pez_core import SearchOptions, invert, load_clip

    found, last = {}, began

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        found[name], last = now - last, now

    lap("imports")
    chosen = torch.float32 if dtype == "float32" else None
    clip = load_clip(f"{model}:{path}", device="cpu", dtype=chosen)
    lap("load")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 300, 300, 3), dtype=np.uint8)
    features = clip.encode_images([Image.fromarray(one) for one in pixels])
    lap("encode_image")
    options = SearchOptions(prompt_len=prompt_len, effort=effort)
    if effort == "paper":
        options = replace(options, steps=MEASURED)
    for k, name in enumerate(("first", "second")):
        (result,) = invert(clip, features[k : k + 1], options)
        lap(name)
    found["words"], found["tflop"] = len(clip.vocabulary), result.tower_flops / 1e12
    if effort == "paper":
        (longer,) = invert(clip, features[1:], replace(options, steps=2 * MEASURED))
        lap("longer")
        more = PUBLISHED / MEASURED - 1
        seconds = found.pop("longer") - found["second"]
        found["tflop"] += more * (longer.tower_flops / 1e12 - found["tflop"])
        for name in ("first", "second"):
            found[name] += more * seconds
    return found


def weights(model: str, folder: Path) -> Path:
    """A file of random weights in half precision."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = folder / f"{model}-openai.safetensors"
    state = open_clip.create_model(model, load_weights=False).state_dict()
    save_file({name: v.half().contiguous() for name, v in state.items()}, path)
    return path


def report(rows: Sequence[dict], prompt_len: int) -> list[str]:
    from step_time import machine

    from pez_core.precision import bfloat16_pays

    lines = [
        "# The first prompt in a new process",
        "",
        f"Seconds; prompts of {prompt_len} tokens, random weights in half precision on the disk, "
        f"weights in float32 in memory. {machine().removesuffix(', fp32')}.",
        "",
        "*Default* multiplies by the matrices of the text tower in "
        f"{'bfloat16' if bfloat16_pays() else 'float32'}, which is faster on this processor.",
        "",
        "*Total* is everything from the first import to the first prompt. *Work* is that of the "
        "text tower (see `pez_core.tower_work`). PEZ as published (`paper`) has 3,000 steps; "
        f"{MEASURED} were measured.",
        "",
        "| CLIP | effort | dtype | total | imports | load | image | first search | second search | "
        "work, TFLOP | work of PEZ as published / ours |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        published = next(
            (o["tflop"] for o in rows if o["model"] == row["model"] and o["effort"] == "paper"), 0.0
        )
        parts = [f"{row[name]:.2f}" for name in PARTS]
        total = sum(row[name] for name in PARTS[:-1])
        ratio = f"{published / row['tflop']:.1f}x"
        lines.append(
            f"| {row['model']} | {row['effort']} | {row['dtype']} | {total:.1f} | "
            f"{' | '.join(parts)} | {row['tflop']:.2f} | {ratio} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-L-14"])
    parser.add_argument("--efforts", nargs="+", default=[*EFFORTS, "paper"])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/first_prompt")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)  # a process of its own
    a = parser.parse_args(argv)
    if a.case:
        path, model, effort, dtype = a.case
        print(json.dumps(measure(Path(path), model, effort, dtype, a.prompt_len)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in a.models:
            path = weights(model, Path(folder))
            for effort, dtype in product(a.efforts, a.dtypes):
                case = ["--prompt-len", str(a.prompt_len), "--case", str(path), model]
                case += [effort, dtype]
                done = subprocess.run(
                    [sys.executable, __file__, *case], check=True, capture_output=True, text=True
                )
                named = {"model": model, "effort": effort, "dtype": dtype}
                rows.append(named | json.loads(done.stdout))
                print(rows[-1], file=sys.stderr)
            path.unlink()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(report(rows, a.prompt_len)) + "\n"
    a.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
