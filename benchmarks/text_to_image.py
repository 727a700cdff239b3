"""How well an image model for emoji draws what a text says, by a held-out CLIP.

    python benchmarks/text_to_image.py [--pipeline emoji-diffusion] [--count 200]

For drawings that the image model was trained on, and for drawings of names that it never saw:

* `right name`: an image is made of the name, and the judge picks the most similar one of all names
  of all drawings. `drawings` is the same for the drawings themselves, which no image can pass by
  much, and `share` is the one of the other.
* `own caption`, `another`: an image is made of a caption; the similarity with its own drawing, and
  that of the image of another caption with this drawing. Drawings that were trained on have the
  captions of training, the others have those that a person wrote
  (`benchmarks/data/unseen_captions.jsonl`).

Every image is the first one, none is picked. Drawings are on white, in the styles of the training.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captions import CAPTIONS
from PIL import Image
from step_time import machine
from unseen import ROOT, prepare

from pez_core import Clip, load_clip
from pez_core.clip.images import load_image
from pez_core.diffusion import load_pipeline
from pez_core.diffusion.image_models import default_settings

sys.path.insert(0, str(ROOT / "tools"))

from emoji_captions import Captions, Lexicon
from emoji_data import Drawing, words_of
from emoji_views import View
from train_emoji_diffusion import DRAWN_STYLES

HERE = Path(__file__).parent
TEMPLATES = ("{}", "{} emoji", "a picture of {}")
AT_ONCE = 8  # images made together


@dataclass(frozen=True)
class Item:
    """A drawing on white, its name and a true caption."""

    name: str
    caption: str
    image: Image.Image


def trained_items(
    drawings: list[Drawing], pixels: Any, count: int, rng: random.Random
) -> list[Item]:
    """Drawings of different names that it was trained on, with captions of the training."""
    captions = Captions(drawings, pixels, Lexicon(), rng)
    places = [k for k, d in enumerate(drawings) if d.split == "train" and d.style in DRAWN_STYLES]
    rng.shuffle(places)
    chosen = list({captions.names[k]: k for k in places}.items())[:count]
    return [
        Item(name, captions.caption(View((k,), False, "white"), 16).text, _picture(pixels, k))
        for name, k in chosen
    ]


def held_out_items(drawings: list[Drawing], pixels: Any) -> list[Item]:
    """The drawings that somebody described, whose names no training used."""
    places = {(d.style, d.icon): k for k, d in enumerate(drawings)}
    items = []
    for row in map(json.loads, CAPTIONS.read_text("utf-8").splitlines()):
        k = places[row["style"], row["icon"]]
        if drawings[k].split == "held-out name":
            name = " ".join(words_of(drawings[k].name))
            items.append(Item(name, row["caption"], _picture(pixels, k)))
    return items


def _picture(pixels: Any, k: int) -> Image.Image:
    return load_image(Image.fromarray(pixels[k]))


def images_of(pipeline: Any, texts: Sequence[str]) -> list[Image.Image]:
    """One image of each text, with its own noise."""
    made = []
    for k in range(0, len(texts), AT_ONCE):
        part = list(texts[k : k + AT_ONCE])
        noise = [torch.Generator().manual_seed(n) for n in range(k, k + len(part))]
        made += pipeline(part, generator=noise, **default_settings(pipeline)).images
        print(f"{len(made)}/{len(texts)}", end="\r", file=sys.stderr)
    return made


def name_features(judge: Clip, names: Sequence[str]) -> torch.Tensor:
    """(names, features) their mean features in several sentences."""
    return sum(judge.encode_texts([t.format(n) for n in names]) for t in TEMPLATES) / len(TEMPLATES)


def measure(pipeline: Any, judge: Clip, items: Sequence[Item], names: Sequence[str]) -> dict:
    """The row of a set of drawings; `names` are those that the judge picks from."""
    every = name_features(judge, names)
    own = torch.tensor([names.index(item.name) for item in items])

    def right(images: Sequence[Image.Image]) -> float:
        return ((judge.encode_images(images) @ every.T).argmax(1) == own).float().mean().item()

    drawn = judge.encode_images([item.image for item in items])
    made = judge.encode_images(images_of(pipeline, [item.caption for item in items]))
    true = (made * drawn).sum(1)
    other = (made.roll(len(items) // 2, 0) * drawn).sum(1)
    of_drawings = right([item.image for item in items])
    of_images = right(images_of(pipeline, [item.name for item in items]))
    return {
        "count": len(items),
        "drawings": of_drawings,
        "images": of_images,
        "true": true.tolist(),
        "other": other.tolist(),
    }


def report(rows: dict[str, dict], names: int, judge: str, pipeline: str) -> str:
    lines = [
        "# What the image model draws",
        "",
        f"One image of each text by {pipeline}, judged by {judge}, which picks one of {names:,} "
        f"names. Behind ± is one standard error over the drawings. {machine()}.",
        "",
        "| set | drawings | right name: images | drawings | share | own caption | another | "
        "difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        share = f"{row['images'] / row['drawings']:.0%}" if row["drawings"] else "-"
        gains = [a - b for a, b in zip(row["true"], row["other"], strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        lines.append(
            f"| {kind} | {row['count']} | {row['images']:.0%} | {row['drawings']:.0%} | {share} | "
            f"{statistics.mean(row['true']):.3f} | {statistics.mean(row['other']):.3f} | "
            f"{statistics.mean(gains):+.3f} ± {error:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", default="emoji-diffusion", help="see `load_pipeline`")
    parser.add_argument("--judge", default=str(HERE / "models/emoji-clip-judge"))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/emoji")
    parser.add_argument("--count", type=int, default=200, help="of drawings that were trained on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results/text_to_image")
    arguments = parser.parse_args(argv)

    drawings, pixels = prepare(arguments.folder)
    pipeline = load_pipeline(arguments.pipeline, device=arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_clip(arguments.judge, device=arguments.device)
    names = sorted({" ".join(words_of(d.name)) for d in drawings})
    sets = {
        "trained on": trained_items(drawings, pixels, arguments.count, random.Random(0)),
        "held-out names": held_out_items(drawings, pixels),
    }
    rows = {kind: measure(pipeline, judge, items, names) for kind, items in sets.items()}
    shown = Path(judge.name).name, Path(str(arguments.pipeline)).name
    text = report(rows, len(names), *shown)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
