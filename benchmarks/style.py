"""Does a style prompt carry the style to new subjects, and only the style?

    python benchmarks/style.py            # about five minutes, writes benchmarks/results/style.md

Each trial takes one of four drawing styles, learns a prompt from six drawings of different things
in it, gives it to a seventh thing, and asks which of the four drawings of this seventh thing the
prompt is closest to. Chance is 25 %. One of the styles, FxEmojis, `emoji-clip` never saw; the other
three are those that it tells apart best among all ten that it knows, when their own words are given
(also printed), since where the true words fail no learned ones can be expected to do better.

Needs `npm` and `resvg-py` (`pip install -e ".[train]"`), as the drawings are rendered anew.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from PIL import Image
from step_time import machine

from pez_core import Settings, load_clip
from pez_core.learn import Learning, learn
from pez_core.tasks import style_goal

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from emoji_data import HELD_OUT_STYLE, STYLES, prepare  # noqa: E402

TEMPLATES = (
    "{subject}, {style}",
    "{subject} in {style} style",
    "{subject}, in the style of {style}",
)
GROUPS = (0, 3, 4, 5, 6, 7)  # emojibase: smileys, animals, food, travel, activities, objects
IMAGES = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/emoji")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/style.md")
    arguments = parser.parse_args()

    drawings = Drawings(arguments.folder)
    seen, accuracy = drawings.best_named_styles()
    styles = [HELD_OUT_STYLE, *seen]
    trials = drawings.trials(styles, arguments.trials, arguments.seed)
    learning = Learning(8, Settings(steps=arguments.steps), arguments.restarts)
    prompts = {}
    for mode in ("separate", "joint"):
        goals = [
            style_goal(drawings.clip, [drawings.picture(i) for i in trial["images"]], mode)
            for trial in trials
        ]
        prompts[mode] = [result.prompt for result in learn(drawings.clip, goals, learning)]
    prompts["the style's own words"] = [STYLES[trial["style"]][1][0] for trial in trials]

    text = report(drawings, styles, trials, prompts, accuracy, arguments)
    arguments.out.write_text(text)
    print(text)


class Drawings:
    """The rendered emoji with their features."""

    def __init__(self, folder: Path) -> None:
        self.clip = load_clip("emoji-clip", device="cpu")
        self.rows, self.pixels = prepare(folder)
        self.places: dict[str, dict[str, int]] = {}  # style -> emoji -> row
        for i, row in enumerate(self.rows):
            if row.hexcode and row.group in GROUPS:
                self.places.setdefault(row.style, {}).setdefault(row.hexcode, i)
        self._features: dict[int, torch.Tensor] = {}

    def picture(self, i: int) -> Image.Image:
        rgba = Image.fromarray(self.pixels[i])
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")

    def features(self, rows: list[int]) -> torch.Tensor:
        missing = [i for i in rows if i not in self._features]
        if missing:
            found = self.clip.encode_images([self.picture(i) for i in missing])
            self._features |= dict(zip(missing, found, strict=True))
        return torch.stack([self._features[i] for i in rows])

    def common(self, styles: list[str]) -> list[str]:
        """Emoji that every one of `styles` has."""
        return sorted(set.intersection(*(set(self.places[style]) for style in styles)))

    def best_named_styles(self, count: int = 3) -> tuple[list[str], dict[str, float]]:
        """The styles that their own words pick most often among all that were seen in training."""
        styles = [style for style in STYLES if style != HELD_OUT_STYLE]
        emoji = random.Random(1).sample(self.common(styles), 100)
        accuracy = {}
        for style in styles:
            trials = [{"style": style, "subject": e} for e in emoji]
            words = [STYLES[style][1][0]] * len(trials)
            hits = self.hits(styles, trials, words, TEMPLATES[0])
            accuracy[style] = sum(hits) / len(hits)
        return sorted(accuracy, key=lambda style: -accuracy[style])[:count], accuracy

    def trials(self, styles: list[str], count: int, seed: int) -> list[dict]:
        rng, emoji = random.Random(seed), self.common(styles)
        trials = []
        for k in range(count):
            style, chosen = styles[k % len(styles)], rng.sample(emoji, IMAGES + 1)
            images = [self.places[style][e] for e in chosen[:IMAGES]]
            trials.append({"style": style, "images": images, "subject": chosen[IMAGES]})
        return trials

    def hits(
        self, styles: list[str], trials: list[dict], prompts: list[str], template: str
    ) -> list[bool]:
        """Whether each prompt is closest to its own style's drawing of its trial's subject."""
        names = [self.rows[self.places[t["style"]][t["subject"]]].name for t in trials]
        texts = self.clip.encode_texts(
            [template.format(subject=n, style=p) for n, p in zip(names, prompts, strict=True)]
        )
        hits = []
        for trial, text in zip(trials, texts, strict=True):
            drawn = self.features([self.places[style][trial["subject"]] for style in styles])
            hits.append(styles[int((drawn @ text).argmax())] == trial["style"])
        return hits


def report(drawings, styles, trials, prompts, accuracy, arguments) -> str:
    lines = [
        "# Style prompts on new subjects",
        "",
        f"`python benchmarks/style.py --trials {arguments.trials} --seed {arguments.seed} "
        f"--steps {arguments.steps} --restarts {arguments.restarts}`, {machine()}.",
        "",
        "Share of trials in which `subject + style prompt` is closer to the drawing of this new "
        "subject in that style than to its drawings in the three other styles. The prompts have 8 "
        f"tokens and come from {IMAGES} drawings of other things. Chance is 25 %; one standard "
        f"error is about {100 * (0.16 / len(trials)) ** 0.5:.0f} points.",
        "",
    ]
    header = "| template | method | all | " + " | ".join(styles) + " |"
    lines += [header, "|---|---|---|" + "---|" * len(styles)]
    for template in TEMPLATES:
        for method, texts in prompts.items():
            hits = drawings.hits(styles, trials, texts, template)
            cells = [
                [h for h, t in zip(hits, trials, strict=True) if t["style"] == style]
                for style in styles
            ]
            shares = " | ".join(f"{100 * sum(c) / len(c):.0f} %" for c in cells)
            everything = 100 * sum(hits) / len(hits)
            lines.append(f"| `{template}` | {method} | **{everything:.0f} %** | {shares} |")
    lines += [
        "",
        f"`{styles[0]}` is the style that the model never saw. The other three are those that "
        "their own words pick most often among the ten that it knows: "
        + ", ".join(f"{s} {100 * a:.0f} %" for s, a in accuracy.items())
        + ".",
        "",
        "The first prompt of each style, by the mode that separates and by the joint one:",
        "",
        "| style | separate | joint |",
        "|---|---|---|",
    ]
    for k, style in enumerate(styles):
        lines.append(f"| {style} | {prompts['separate'][k]} | {prompts['joint'][k]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
