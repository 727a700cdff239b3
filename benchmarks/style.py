"""Style prompts on new subjects: is the style kept, and only the style?

    python benchmarks/style.py            # about ten minutes, writes benchmarks/results/style.md

Each trial takes one of four drawing styles, learns a prompt from six drawings of different things
in it, applies it to a seventh thing, and compares the prompt with the four drawings of this seventh
thing. Chance is 25 %. One of the four, FxEmojis, was not in the training data of `emoji-clip`. The
other three are, in the first set, the styles of its training data that their own words pick most
reliably (two of them are black and white and much alike) and, in the second set, three that look
different to a person: thin outlines, glossy 3D, and black and white. The accuracy of the styles'
own words is printed as well: where it is low, the model is the limit.

Needs `npm` and `resvg-py` (`pip install -e ".[train]"`), as the drawings are rendered anew.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from step_time import machine
from unseen import EVERY_WORD

from pez_core import SearchOptions, load_clip
from pez_core.runner import learn
from pez_core.tasks.style import PROMPT_LEN, style_target

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
DIFFERENT = ["openmoji", "fluent-emoji", "fluent-emoji-high-contrast"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/emoji")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/style.md")
    arguments = parser.parse_args(argv)

    drawings = Drawings(arguments.folder)
    best, accuracy = drawings.best_named_styles()
    lines = [
        "# Style prompts on new subjects",
        "",
        f"`python benchmarks/style.py --trials {arguments.trials} --seed {arguments.seed} "
        f"--steps {arguments.steps} --restarts {arguments.restarts}`, {machine()}.",
        "",
        "Share of trials in which `subject + style prompt` is closer to the drawing of this new "
        "subject in that style than to its drawings in all three other styles (chance: 25 %) and, "
        "behind the stroke, than to that in one other style (chance: 50 %). The prompts have 8 "
        f"tokens and come from {IMAGES} drawings of other things. {arguments.trials} trials; one "
        f"standard error is about {100 * (0.18 / arguments.trials) ** 0.5:.0f} points.",
    ]
    for name, others in (("best named", best), ("different to a person", DIFFERENT)):
        styles = [HELD_OUT_STYLE, *others]
        trials = drawings.trials(styles, arguments.trials, arguments.seed)
        lines += report(drawings, name, styles, trials, learn_all(drawings, trials, arguments))
    lines += [
        "",
        "How often its own words pick a style among all ten of the training data: "
        + ", ".join(f"{style} {100 * share:.0f} %" for style, share in accuracy.items())
        + ".",
    ]
    text = "\n".join(lines) + "\n"
    arguments.out.write_text(text)
    print(text)


def learn_all(drawings: Drawings, trials: list[dict], arguments) -> dict[str, list[str]]:
    """One style prompt per trial by each method."""
    options = SearchOptions(
        swaps=0, steps=arguments.steps, restarts=arguments.restarts, **EVERY_WORD
    )
    prompts = {}
    for method, keep_content in (("separate", False), ("joint", True)):
        pictures = [[drawings.picture(i) for i in trial["images"]] for trial in trials]
        targets = [style_target(drawings.clip, some, keep_content) for some in pictures]
        found = learn(drawings.clip, targets, options, PROMPT_LEN)
        prompts[method] = [result.prompt for result in found]
    prompts["the style's own words"] = [STYLES[trial["style"]][1][0] for trial in trials]
    return prompts


def in_style(name: str, style: str) -> str:
    """A thing in a style, by words that the training data has for it."""
    return TEMPLATES[0].format(subject=name, style=STYLES[style][1][0])


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
        """Emoji that all of `styles` contain."""
        return sorted(set.intersection(*(set(self.places[style]) for style in styles)))

    def best_named_styles(self, count: int = 3) -> tuple[list[str], dict[str, float]]:
        """The styles that their own words pick most often among all styles of the training data."""
        styles = [style for style in STYLES if style != HELD_OUT_STYLE]
        emoji = random.Random(1).sample(self.common(styles), 100)
        accuracy = {}
        for style in styles:
            trials = [{"style": style, "subject": e} for e in emoji]
            words = [STYLES[style][1][0]] * len(trials)
            wins = self.wins(styles, trials, words, TEMPLATES[0])
            accuracy[style] = sum(map(all, wins)) / len(wins)
        return sorted(accuracy, key=lambda style: -accuracy[style])[:count], accuracy

    def trials(self, styles: list[str], count: int, seed: int) -> list[dict]:
        rng, emoji = random.Random(seed), self.common(styles)
        trials = []
        for k in range(count):
            style, chosen = styles[k % len(styles)], rng.sample(emoji, IMAGES + 1)
            images = [self.places[style][e] for e in chosen[:IMAGES]]
            trials.append({"style": style, "images": images, "subject": chosen[IMAGES]})
        return trials

    def wins(
        self, styles: list[str], trials: list[dict], prompts: list[str], template: str
    ) -> list[list[bool]]:
        """Per trial and other style: the prompt is closer to the drawing in its own style."""
        names = [self.rows[self.places[t["style"]][t["subject"]]].name for t in trials]
        texts = self.clip.encode_texts(
            [template.format(subject=n, style=p) for n, p in zip(names, prompts, strict=True)]
        )
        wins = []
        for trial, text in zip(trials, texts, strict=True):
            drawn = self.features([self.places[style][trial["subject"]] for style in styles])
            near = dict(zip(styles, (drawn @ text).tolist(), strict=True))
            own = near.pop(trial["style"])
            wins.append([own > other for other in near.values()])
        return wins


def report(
    drawings: Drawings, name: str, styles: list[str], trials: list[dict], prompts: dict
) -> list[str]:
    lines = ["", f"## {name.capitalize()}: {', '.join(styles)}", ""]
    lines += ["| template | method | all | " + " | ".join(styles) + " |"]
    lines += ["|---|---|---|" + "---|" * len(styles)]
    for template in TEMPLATES:
        for method, texts in prompts.items():
            wins = drawings.wins(styles, trials, texts, template)
            rows = {
                style: [w for w, t in zip(wins, trials, strict=True) if t["style"] == style]
                for style in styles
            }
            shares = " | ".join(map(share, rows.values()))
            lines.append(f"| `{template}` | {method} | **{share(wins)}** | {shares} |")
    lines += ["", "The first prompt of each style:", ""]
    for k, style in enumerate(styles):
        separate, joint = prompts["separate"][k], prompts["joint"][k]
        lines.append(f"- {style}: *{separate}*; joint: *{joint}*")
    return lines


def share(wins: list[list[bool]]) -> str:
    pairs = [win for trial in wins for win in trial]
    strict = 100 * sum(map(all, wins)) / len(wins)
    return f"{strict:.0f} % / {100 * sum(pairs) / len(pairs):.0f} %"


if __name__ == "__main__":
    main()
