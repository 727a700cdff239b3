"""What keeps a search from overfitting its CLIP, judged by one that took no part.

    python benchmarks/remedies.py [--images N] [--out benchmarks/results/remedies.md]

Prompts of the preset "fast" for drawings that neither CLIP was trained on, with each remedy by
itself, held against none image by image: own similarity, that to the judge, and the difference to
the judge in each of the three sets. Needs the drawings (tools/emoji_data.py).

* words alone: what each word of the prompt means by itself counts, too, and how well the CLIP has
  learned it (`priors.WordsAlone`); by the weight of each word, and with one of the two left out.
* augmentation: the target is the mean feature of the image and seven changed copies of it.
* early end: half the swaps.
* readability: a language model takes part, see benchmarks/readability.py for its cost.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torchvision.transforms.functional as change
from PIL import Image
from step_time import machine
from unseen import unseen

from pez_core import Clip, load_clip, load_language_model, priors
from pez_core.runner import Goal, Learning, learn
from pez_core.presets import PRESETS, WORD_WEIGHT, Plan
from pez_core.pez import PezSettings

JUDGE = Path(__file__).parent / "models" / "emoji-clip-judge"
COPIES = 7


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


def find(clip: Clip, features: torch.Tensor, prompt_len: int, plan: Plan, **options) -> list[str]:
    one = torch.ones(1)
    goals = [Goal(feature[None], one, one < 0) for feature in features]
    settings = PezSettings(plan.steps)
    learning = Learning(prompt_len, settings, seed=list(range(len(goals))), plan=plan, **options)
    return [result.prompt for result in learn(clip, goals, learning)]


def with_familiarity(value: float, run: Callable[[int], list[str]]) -> Callable[[int], list[str]]:
    """The same search with another weight of familiarity beside similarity."""
    return patch.object(priors, "FAMILIAR", value)(run)


def mean_and_error(values: torch.Tensor) -> str:
    return f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=102)
    parser.add_argument("--prompt-len", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--readability", type=float, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    clip, judge = load_clip("emoji-clip", device="cpu"), load_clip(str(JUDGE), device="cpu")
    drawings = unseen(arguments.images)
    images = [one.image for one in drawings]
    own, neutral = clip.encode_images(images), judge.encode_images(images)
    sets = sorted({one.set for one in drawings})
    fast = replace(PRESETS["fast"], word_weight=0.0)
    changed = augmented(clip, images)
    remedies: dict[str, Callable[[int], list[str]]] = {"none": lambda n: find(clip, own, n, fast)}
    for weight in (0.5 * WORD_WEIGHT, WORD_WEIGHT, 2 * WORD_WEIGHT):
        remedies[f"words alone, weight {weight:g}"] = lambda n, w=weight: find(
            clip, own, n, replace(fast, word_weight=w)
        )
    remedies["words alone, similarity only"] = with_familiarity(
        0.0, lambda n: find(clip, own, n, replace(fast, word_weight=WORD_WEIGHT))
    )
    tiny = 1e-6  # beside so little similarity as much familiarity as usual
    remedies["words alone, familiarity only"] = with_familiarity(
        priors.FAMILIAR / tiny,
        lambda n: find(clip, own, n, replace(fast, word_weight=WORD_WEIGHT * tiny)),
    )
    remedies["augmentation"] = lambda n: find(clip, changed, n, fast)
    remedies["early end"] = lambda n: find(
        clip, own, n, replace(fast, refine_steps=fast.refine_steps // 2)
    )
    if arguments.readability:
        model = load_language_model(dtype=torch.bfloat16)
        for value in arguments.readability:
            remedies[f"readability {value}"] = lambda n, r=value: find(
                clip, own, n, replace(fast, trials=2), readability=r, language_model=model
            )

    lines = [
        "# Remedies against overfitting",
        "",
        f"Preset `fast`, {len(images)} drawings never trained on, one seed; ± is one standard "
        f"error over images. {machine()}.",
    ]
    for prompt_len in arguments.prompt_len:
        lines += [
            "",
            f"## prompt_len {prompt_len}",
            "",
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
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
