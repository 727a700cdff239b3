"""Images for benchmarks: drawings that `emoji-clip` was never trained on, or those of a folder."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pez_core import Vocabulary
from pez_core.clip.images import load_image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from emoji_data import (  # noqa: E402
    HELD_OUT_NAME_STYLES,
    HELD_OUT_STYLE,
    Drawing,
    content_words,
    prepare,
    words_of,
)

# Every whole word of a CLIP, and any of them twice: the words that the methods are compared with.
EVERY_WORD = {"vocabulary": Vocabulary(dictionary=False), "repeats": True, "block_unsafe": False}
SETS = {style: "held-out name" for style in HELD_OUT_NAME_STYLES} | {
    HELD_OUT_STYLE: "held-out style"
}


@dataclass(frozen=True)
class Unseen:
    """An image and the words that are true of it.

    Attributes:
        set: the group of images that it belongs to.
        name: what it depicts, in words.
        words: every word that names it, those of the name among them.
        image: RGB.
    """

    set: str
    name: str
    words: frozenset[str]
    image: Image.Image


def unseen(
    count: int = 102,
    seed: int = 0,
    apart: Sequence[Unseen] = (),
    folder: Path = ROOT / "build/emoji",
) -> list[Unseen]:
    """As many drawings of each of three sets that no bundled CLIP was trained on.

    The sets are the held-out names in the styles `noto` and `twemoji`, and the held-out style
    `fxemoji`. No name comes twice.

    Args:
        count: drawings in all, a multiple of 3.
        seed: of the choice.
        apart: drawings whose names are left out.
        folder: where the drawings are rendered to (`tools/emoji_data.py`).
    """
    drawings, pixels = prepare(folder)
    chosen, names = [], {one.name for one in apart}
    for style, split in SETS.items():
        places = [i for i, d in enumerate(drawings) if d.style == style and d.split == split]
        random.Random(seed).shuffle(places)
        wanted = len(chosen) + count // len(SETS)
        while len(chosen) < wanted:
            drawing = drawings[place := places.pop()]
            if drawing.name not in names:
                names.add(drawing.name)
                image = load_image(Image.fromarray(pixels[place]))
                words = frozenset(content_words(drawing))
                chosen.append(Unseen(style, drawing.name, words, image))
    return chosen


def from_folder(path: Path) -> list[Unseen]:
    """The images of a folder: each folder in it is a set, each file in that an image.

    An image is called like its file, unless a text file of the same name with the suffix `.txt`
    lies beside it, whose first line is its caption and the others keywords.

    Raises:
        ValueError: there is no image.
    """
    found = []
    for file in sorted(path.glob("*/*")):
        if file.suffix.lower() not in Image.registered_extensions():
            continue
        text = file.with_suffix(".txt")
        lines = text.read_text("utf-8").splitlines() if text.exists() else [file.stem]
        name, *keywords = [" ".join(words_of(line)) for line in lines]
        words = content_words(Drawing(file.parent.name, file.stem, "", name, keywords, -1, ""))
        found.append(Unseen(file.parent.name, name, frozenset(words), load_image(file)))
    if not found:
        raise ValueError(f"`path`: no folder in {path} holds an image; each folder in it is a set.")
    return found
