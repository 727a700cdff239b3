"""The `pez` command."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import open_clip
from tqdm import tqdm

from .clip import PRESETS, load_clip
from .clip.images import load_image
from .clip.load import BUNDLED, find_on_disk, models_folder
from .search import Settings
from .tasks import invert

# Images searched together; enough to share the cost of a step, little enough to see results early.
BATCH = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 (an image failed), 2 (usage), 130 (Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="pez: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may lack a prompt's letters
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"pez: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pez: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pez",
        description="Turn images into short text prompts that CLIP finds similar to them.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    invert = commands.add_parser(
        "invert",
        help="find a prompt for each image",
        description="Find a short text prompt for each image. Ctrl-C keeps the best found so far.",
    )
    invert.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    invert.add_argument(
        "--clip",
        default="emoji-clip",
        metavar="NAME[:PRETRAINED_OR_FILE]",
        help="CLIP to search on, see `pez models` (default: emoji-clip, bundled)",
    )
    invert.add_argument("--prompt-len", type=int, default=16, metavar="N", help="tokens (16)")
    invert.add_argument("--steps", type=int, default=3000, metavar="N", help="steps (3000)")
    invert.add_argument(
        "--restarts", type=int, default=1, metavar="N", help="searches per image, best kept (1)"
    )
    invert.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    invert.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    invert.add_argument(
        "--download", action="store_true", help="fetch the CLIP's weights if they are not here"
    )
    invert.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    invert.set_defaults(run=_invert)

    models = commands.add_parser("models", help="list the CLIPs that are here or can be fetched")
    models.set_defaults(run=_models)
    return parser


def _invert(arguments: argparse.Namespace) -> int:
    Settings(steps=arguments.steps)  # say what is wrong before a large model is loaded
    clip = load_clip(arguments.clip, device=arguments.device, download=arguments.download)
    rows: list[dict[str, Any]] = [{"image": path} for path in arguments.images]
    try:
        with _interruptible() as interrupted:
            for start in range(0, len(rows), BATCH):
                if interrupted():
                    break
                _invert_batch(clip, arguments, rows, start, interrupted)
            was_interrupted = interrupted()
    finally:  # whatever happens, what was found is shown
        for row in rows:
            if "prompt" not in row:
                row.setdefault("error", "not searched: ended before its turn")
                if not arguments.json:
                    print(f"pez: error: {row['image']}: {row['error']}", file=sys.stderr)
        if arguments.json:
            print(json.dumps(rows, indent=2))
    if was_interrupted:
        return 130
    return 1 if any("error" in row for row in rows) else 0


def _invert_batch(clip, arguments, rows: list[dict], start: int, interrupted) -> None:
    """Search the images of `rows[start : start + BATCH]` together and fill in their rows."""
    batch, images = [], []
    for row in rows[start : start + BATCH]:
        try:
            images.append(load_image(row["image"]))
            batch.append(row)
        except ValueError as error:
            row["error"] = str(error).removeprefix("`images`: ")
    if not batch:
        return
    label = "" if len(rows) == 1 else f"image {start + 1}-{start + len(batch)} of {len(rows)}"
    try:
        with _progress_bar(arguments.steps, label) as show:
            results = invert(
                clip,
                images,
                prompt_len=arguments.prompt_len,
                steps=arguments.steps,
                restarts=arguments.restarts,
                seed=arguments.seed,
                callback=lambda report: show(report) or interrupted(),
            )
    except (RuntimeError, FloatingPointError, MemoryError) as error:
        for row in batch:
            row["error"] = str(error) or type(error).__name__
        return
    for row, result in zip(batch, results, strict=True):
        row |= {
            "prompt": result.prompt,
            "similarity": round(result.similarity, 6),
            "token_ids": result.token_ids,
            "seconds": round(result.seconds / len(batch), 3),
        }
        if not arguments.json:
            print(f"{row['image']}\n  {result.similarity:.4f}  {result.prompt}", flush=True)


@contextmanager
def _interruptible():
    """Turns the first Ctrl-C into a flag, so that the best so far is kept; a second one ends."""
    pressed = []

    def on_interrupt(signum, frame) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _progress_bar(steps: int, label: str):
    """A bar on stderr with the best prompt so far; nothing when stderr is not a terminal."""
    bar = tqdm(
        total=steps,
        disable=None,
        leave=False,
        dynamic_ncols=True,
        desc=label or None,
        bar_format="{l_bar}{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
    )
    shown_at = 0.0

    def update(report: dict) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at > 0.1 or report["step"] == report["steps"]:
            shown_at = now
            bar.set_postfix_str(f"{report['similarity']:.3f} {report['prompt']}", refresh=False)
            bar.update(report["step"] - bar.n)

    with bar:
        yield update


def _models(arguments: argparse.Namespace) -> int:
    print("Bundled (no download):")
    for name in BUNDLED:
        print(f"  {name}")
    print("\nOn this disk:")
    tags = [(name, tag) for name, tag in open_clip.list_pretrained() if find_on_disk(name, tag)]
    for name, tag in tags:
        print(f"  {name}:{tag}")
    if not tags:
        print("  none")
    print(f"  (looked in the Hugging Face cache and for NAME.TAG.safetensors in {models_folder()})")
    print("\nPresets (fetched only with --download):")
    for preset in PRESETS:
        name = f"{preset.name}:{preset.pretrained}"
        print(f"  {name:32s} {preset.size:5.2f} GB  {preset.purpose}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
