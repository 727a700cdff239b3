"""Remedies against overfitting of a search to its CLIP, scored by a held-out CLIP.

    python benchmarks/remedies.py [--images N] [--out benchmarks/results/remedies.md]

Prompts of the effort "fast" for drawings outside of the training data of both CLIPs, with each
remedy alone, compared with none image by image: own similarity, that of the judge, and the
difference of the judge in each of the three sets. Needs the drawings (tools/emoji_data.py).

* words alone: the similarity of each word of the prompt alone counts as well, and how well the CLIP
  has learned it (`pez_core.single_words`); by the weight of each word, and with one of the two left
  out.
* augmentation: the target is the mean feature of the image and seven changed copies of it.
* early end: half the swaps.
* readability: a language model scores prompts as well, see benchmarks/readability.py for its cost.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision.transforms.functional as change
from PIL import Image
from step_time import machine
from unseen import EVERY_WORD, Unseen, from_folder, unseen

from pez_core import Clip, SearchOptions, load_clip, load_language_model, single_words
from pez_core.options import EFFORTS
from pez_core.problem import PromptTarget
from pez_core.runner import learn
from pez_core.single_words import WORD_WEIGHT

JUDGE = Path(__file__).parent / "models" / "emoji-clip-judge"
COPIES = 7
# prompt_len -> the prompts of all images
Remedy = Callable[[int], list[str]]


def augmented(clip: Clip, images: list[Image.Image]) -> torch.Tensor:
    """(n, features) mean unit features of images and of changed copies."""
    draw, total = random.Random(0), clip.encode_images(images)
    for _ in range(COPIES):
        copies = []
        for image in images:
            shift = [round(draw.uniform(-0.06, 0.06) * side) for side in image.size]
            image = change.affine(
                image, draw.uniform(-8, 8), shift, draw.uniform(0.85, 1.1), [0, 0], fill=[255] * 3
            )
            image = change.hflip(image) if draw.random() < 0.5 else image
            copies.append(change.adjust_brightness(image, draw.uniform(0.9, 1.1)))
        total = total + clip.encode_images(copies)
    return torch.nn.functional.normalize(total, dim=-1)


def find(
    clip: Clip, features: torch.Tensor, prompt_len: int, word_weight: float = 0.0, **options: Any
) -> list[str]:
    """The prompts of features, with `SearchOptions` besides the effort "fast"."""
    one = torch.ones(1)
    targets = [PromptTarget(feature[None], one, one < 0) for feature in features]
    seeds = list(range(len(targets)))
    options = SearchOptions(effort="fast", seed=seeds, **(EVERY_WORD | options))
    results = learn(clip, targets, options, prompt_len, word_weight=word_weight)
    return [result.prompt for result in results]


def with_familiarity(value: float, run: Remedy) -> Remedy:
    """The same search with another weight of familiarity against similarity."""
    return patch.object(single_words, "FAMILIAR", value)(run)


def remedies_for(clip: Clip, images: list[Image.Image], readability: list[float]) -> dict:
    """Name -> `Remedy`; the first is the search without any."""
    own, changed = clip.encode_images(images), augmented(clip, images)
    run = partial(find, clip, own)
    remedies: dict[str, Remedy] = {"none": run}
    for weight in (0.5 * WORD_WEIGHT, WORD_WEIGHT, 2 * WORD_WEIGHT):
        remedies[f"words alone, weight {weight:g}"] = partial(run, word_weight=weight)
    remedies["words alone, similarity only"] = with_familiarity(
        0.0, partial(run, word_weight=WORD_WEIGHT)
    )
    tiny = 1e-6  # of the similarity, with the usual amount of familiarity
    remedies["words alone, familiarity only"] = with_familiarity(
        single_words.FAMILIAR / tiny, partial(run, word_weight=WORD_WEIGHT * tiny)
    )
    remedies["augmentation"] = partial(find, clip, changed)
    remedies["early end"] = partial(run, swaps=EFFORTS["fast"].swaps // 2)
    if readability:
        model = load_language_model(dtype=torch.bfloat16)
        for value in readability:
            remedies[f"readability {value}"] = partial(run, readability=value, language_model=model)
    return remedies


def mean_and_error(values: torch.Tensor) -> str:
    return f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}"


def table(
    clip: Clip, judge: Clip, drawings: list[Unseen], remedies: dict[str, Remedy], prompt_len: int
) -> list[str]:
    images, sets = [one.image for one in drawings], sorted({one.set for one in drawings})
    own, neutral = clip.encode_images(images), judge.encode_images(images)
    lines = [
        "| remedy | judge, against none | judge | own | true word | "
        + " | ".join(f"against none, {name}" for name in sets)
        + " |",
        "|---" * (5 + len(sets)) + "|",
    ]
    base = None
    for name, run in remedies.items():
        prompts = run(prompt_len)
        ours = (clip.encode_texts(prompts) * own).sum(1)
        theirs = (judge.encode_texts(prompts) * neutral).sum(1)
        base = theirs if base is None else base
        gain = theirs - base
        hits = [bool(set(p.split()) & d.words) for p, d in zip(prompts, drawings, strict=True)]
        by_set = [
            mean_and_error(gain[torch.tensor([d.set == one for d in drawings])]) for one in sets
        ]
        lines.append(
            f"| {name} | {mean_and_error(gain)} | {mean_and_error(theirs)} | "
            f"{mean_and_error(ours)} | {statistics.mean(hits):.0%} | {' | '.join(by_set)} |"
        )
        print(lines[-1], file=sys.stderr)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=102)
    parser.add_argument("--folder", type=Path, help="other images, see unseen.from_folder")
    parser.add_argument("--prompt-len", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--readability", type=float, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    clip, judge = load_clip("emoji-clip", device="cpu"), load_clip(str(JUDGE), device="cpu")
    drawings = from_folder(arguments.folder) if arguments.folder else unseen(arguments.images)
    remedies = remedies_for(clip, [one.image for one in drawings], arguments.readability)
    lines = [
        "# Remedies against overfitting",
        "",
        f"Effort `fast`, {len(drawings)} drawings never trained on, one seed; ± is one standard "
        f"error over images. {machine()}.",
    ]
    for prompt_len in arguments.prompt_len:
        lines += ["", f"## prompt_len {prompt_len}", ""]
        lines += table(clip, judge, drawings, remedies, prompt_len)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
