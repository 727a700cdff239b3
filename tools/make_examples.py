"""Draw `examples/`: emoji that `emoji-clip` never saw, picked by a seed and by nothing else.

    python tools/make_examples.py

Ten drawings each of the two styles whose names were held out and of the style that was held out
whole, among smileys, animals, food, places, activities and objects (no people, signs or flags).
Writes 256-pixel PNGs and `index.jsonl` with each drawing's name and keywords.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from emoji_data import content_words, load_svgs, prepare, render
from PIL import Image

GROUPS = (0, 3, 4, 5, 6, 7)  # emojibase: smileys, animals, food, travel, activities, objects
STYLES = ("noto", "twemoji", "fxemoji")
PER_STYLE = 10


def main(folder: Path = Path("build/emoji"), out: Path = Path("examples")) -> None:
    drawings, _ = prepare(folder)
    svgs = load_svgs(folder)
    rng = random.Random(2023)
    out.mkdir(exist_ok=True)
    index, taken = [], set()
    for style in STYLES:
        unseen = [
            d for d in drawings if d.style == style and d.split != "train" and d.group in GROUPS
        ]
        unseen = [d for d in unseen if d.name not in taken]
        for drawing in sorted(rng.sample(unseen, PER_STYLE), key=lambda d: d.name):
            taken.add(drawing.name)
            file = f"{style}-{re.sub('[^a-z0-9]+', '-', drawing.name)}.png"
            rgba = Image.fromarray(render(svgs[style, drawing.icon], 256))
            white = Image.new("RGBA", rgba.size, "white")
            Image.alpha_composite(white, rgba).convert("RGB").save(out / file, optimize=True)
            index.append(
                {
                    "file": file,
                    "name": drawing.name,
                    "words": sorted(content_words(drawing)),
                    "style": style,
                    "unseen": drawing.split.removeprefix("held-out "),
                }
            )
    # not .json: ComfyUI takes every such file in a folder of this name for a workflow
    (out / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in index))


if __name__ == "__main__":
    main()
