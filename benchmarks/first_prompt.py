"""Seconds until the first prompt in a new process, part by part, on CLIPs of usual size.

    python benchmarks/first_prompt.py                       # ViT-B-32 and ViT-L-14, two efforts
    python benchmarks/first_prompt.py --models ViT-L-14 --efforts balanced --prompt-len 8 \
        --dtypes default --wordings free sentence --out benchmarks/results/first_prompt-wordings

The weights are random, and lie in a file in half precision as published ones do, so that loading is
measured as well. A tag in the name of the file gives the activation and the preparation of images;
`load_clip` takes longer where it has to measure them. Every case is a process of its own, with
nothing in any cache but the disk's. The second prompt is of another image in the same process. The
time of PEZ as published, by this package's loop, is measured over a few steps and scaled up: its
steps all cost the same.

    python benchmarks/first_prompt.py --node [--models emoji-clip ViT-B-32]

measures instead how long the ComfyUI node PEZ Image to Prompt takes from its call until its search
reports the first step, with its own defaults: in the first run, then with another seed, and then
with another image. It runs in ComfyUI's own modules (see tools/get_comfyui.py), without a server.
Writes OUT-node.md.

Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent

EFFORTS = ("fast", "balanced")
DTYPES = ["default", "float32"]  # of the matrices in a search
PUBLISHED, MEASURED = 3000, 12  # steps of PEZ as published, and those that are measured
PARTS = ("imports", "load", "encode_image", "first", "second")
NODE_RUNS = {"first run": (0, 0), "another seed": (1, 0), "another image": (1, 1)}  # seed, image


def measure(
    path: Path, model: str, effort: str, dtype: str, wording: str, prompt_len: int
) -> dict[str, float]:
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
    options = SearchOptions(prompt_len=prompt_len, effort=effort, wording=wording)
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


def measure_node(clip_name: str) -> dict[str, float]:
    """Seconds until the first report of each of `NODE_RUNS`, in this process, with ComfyUI's path.

    Each run ends there, as with Finish now.
    """
    import torch

    pack = _pack()
    clip = pack["pez_core"].load_clip(clip_name, device="cpu")
    cpu = torch.device("cpu")
    loaded = pack["nodes.memory"].LoadedClip(clip, cpu, cpu)
    images = torch.rand(2, 1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    live, reports = pack["nodes.live"].Live, []

    def report(self, one) -> bool:
        reports.append(time.perf_counter())
        return True

    found = {}
    with patch.object(live, "report", report), torch.inference_mode():  # as ComfyUI calls nodes
        for name, (seed, image) in NODE_RUNS.items():
            reports.clear()
            node = pack["nodes.image_to_prompt"].ImageToPrompt.PREPARE_CLASS_CLONE(None)
            began = time.perf_counter()
            node.EXECUTE_NORMALIZED(clip=[loaded], images=[images[image]], seed=[seed])
            found[name] = reports[0] - began
    return found


def _pack() -> dict:
    """Modules of the node pack, by their name in it, inside of ComfyUI's on the processor."""
    cli_args = importlib.import_module("comfy.cli_args")
    cli_args.args.cpu = True
    importlib.import_module("server").PromptServer.instance = SimpleNamespace(client_id=None)
    spec = importlib.util.spec_from_file_location(
        "pez_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    pack = sys.modules["pez_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    names = ("pez_core", "nodes.memory", "nodes.live", "nodes.image_to_prompt")
    return {name: importlib.import_module(f"pez_pack.{name}") for name in names}


def node_rows(models: Sequence[str], folder: Path) -> list[str]:
    """The table of the node, each CLIP in a process of its own."""
    from step_time import machine

    sys.path.append(str(ROOT))
    from tools.get_comfyui import comfyui_path

    lines = [
        "# The first step of the node",
        "",
        "Seconds from the call of PEZ Image to Prompt until its search reports the first step, "
        f"three runs in one process. {machine().removesuffix(', fp32')}.",
        "",
        f"| CLIP | {' | '.join(NODE_RUNS)} |",
        "|---" * (1 + len(NODE_RUNS)) + "|",
    ]
    source = comfyui_path()
    for model in models:
        name = model if model == "emoji-clip" else f"{model}:{weights(model, folder)}"
        command = [sys.executable, __file__, "--node-case", name]
        environment = os.environ | {"PYTHONPATH": str(source)}
        done = subprocess.run(
            command, cwd=source, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        lines.append(f"| {model} | {' | '.join(f'{found[one]:.2f}' for one in NODE_RUNS)} |")
        print(lines[-1], file=sys.stderr)
    return lines


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
        ratio = f"{published / row['tflop']:.1f}x" if published else "-"
        effort = row["effort"] if row["wording"] == "free" else f"{row['effort']}, {row['wording']}"
        lines.append(
            f"| {row['model']} | {effort} | {row['dtype']} | {total:.1f} | "
            f"{' | '.join(parts)} | {row['tflop']:.2f} | {ratio} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--node", action="store_true", help="measure the ComfyUI node instead")
    parser.add_argument("--efforts", nargs="+", default=[*EFFORTS, "paper"])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/first_prompt")
    parser.add_argument("--wordings", nargs="+", default=["free"], help="see `SearchOptions`")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--node-case", help=argparse.SUPPRESS)  # the same
    a = parser.parse_args(argv)
    if a.node_case:
        sys.path.remove(str(Path(__file__).resolve().parent))  # our names would hide ComfyUI's
        print(json.dumps(measure_node(a.node_case)))
        return
    if a.case:
        path, *case = a.case
        print(json.dumps(measure(Path(path), *case, a.prompt_len)))
        return
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if a.node:
        with tempfile.TemporaryDirectory() as folder:
            lines = node_rows(a.models or ["emoji-clip", "ViT-B-32"], Path(folder))
        a.out.with_name(f"{a.out.name}-node.md").write_text("\n".join(lines) + "\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in a.models or ["ViT-B-32", "ViT-L-14"]:
            path = weights(model, Path(folder))
            for effort, dtype, wording in product(a.efforts, a.dtypes, a.wordings):
                case = ["--prompt-len", str(a.prompt_len), "--case", str(path), model]
                case += [effort, dtype, wording]
                done = subprocess.run(
                    [sys.executable, __file__, *case], check=True, capture_output=True, text=True
                )
                named = {"model": model, "effort": effort, "dtype": dtype, "wording": wording}
                rows.append(named | json.loads(done.stdout))
                print(rows[-1], file=sys.stderr)
            path.unlink()
    text = "\n".join(report(rows, a.prompt_len)) + "\n"
    a.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
