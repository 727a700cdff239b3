"""How a CLIP reads what people write: captions of drawings that it was never trained on.

    python benchmarks/captions.py [--clip NAME_OR_FOLDER ...] [--out benchmarks/results/captions]

The captions (`benchmarks/data/unseen_captions.jsonl`) were written by somebody who saw the pictures
and nothing else. For each CLIP the table has:

* `caption to drawing`, `drawing to caption`: how often the most similar of all is the right one.
* `captions`: their mean similarity to their own drawings; `other drawings`: to all others;
  `no colours`: with the colour words taken out; `shuffled`: with the words in another order.
* `found`: the mean similarity of what `invert` finds for the same drawings, and the captions' share
  of that. A CLIP that is fooled by lists of words has a small share.
* `true word`: the share of prompts learned for `examples/` with a word of the drawing's own name or
  keywords in them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from step_time import machine

from pez_core import Clip, SearchOptions, invert, load_clip
from pez_core.clip.images import load_image

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CAPTIONS = Path(__file__).with_name("data") / "unseen_captions.jsonl"
sys.path.insert(0, str(ROOT / "tools"))

from emoji_captions import COLOUR_WORDS  # noqa: E402
from emoji_data import prepare  # noqa: E402

PROMPT_LEN = 16
AT_ONCE = 10  # images whose prompts are searched for together


@dataclass(frozen=True)
class Captioned:
    """A drawing and what somebody wrote who saw it."""

    caption: str
    image: Image.Image


def captioned(folder: Path, path: Path = CAPTIONS) -> list[Captioned]:
    """The drawings of a file of captions, on white.

    Args:
        folder: where the drawings are rendered to (`tools/emoji_data.py`).
        path: JSON lines with style, icon and caption.
    """
    drawings, pixels = prepare(folder)
    place = {(d.style, d.icon): k for k, d in enumerate(drawings)}
    rows = map(json.loads, path.read_text().splitlines())
    return [
        Captioned(
            row["caption"],
            load_image(Image.fromarray(pixels[place[row["style"], row["icon"]]])),
        )
        for row in rows
    ]


def without_colours(caption: str) -> str:
    return " ".join(w for w in caption.split() if w.strip(",").lower() not in COLOUR_WORDS)


def shuffled(caption: str) -> str:
    words = caption.replace(",", "").split()
    random.Random(0).shuffle(words)
    return " ".join(words)


def reading(clip: Clip, pairs: list[Captioned]) -> dict[str, float]:
    """Retrieval in both directions and mean similarities."""
    images = clip.encode_images([pair.image for pair in pairs])
    captions = [pair.caption for pair in pairs]
    cosines = images @ clip.encode_texts(captions).T
    own = torch.arange(len(pairs), device=cosines.device)
    others = cosines[~torch.eye(len(pairs), dtype=torch.bool, device=cosines.device)]

    def mean(texts: list[str]) -> float:
        return (images * clip.encode_texts(texts)).sum(1).mean().item()

    return {
        "caption to drawing": (cosines.argmax(0) == own).float().mean().item(),
        "drawing to caption": (cosines.argmax(1) == own).float().mean().item(),
        "captions": mean(captions),
        "other drawings": others.mean().item(),
        "no colours": mean([without_colours(caption) for caption in captions]),
        "shuffled": mean([shuffled(caption) for caption in captions]),
    }


def found(clip: Clip, images: list[Image.Image], effort: str) -> list:
    """What `invert` finds for each image."""
    results = []
    for k in range(0, len(images), AT_ONCE):
        part = images[k : k + AT_ONCE]
        options = SearchOptions(effort=effort, prompt_len=PROMPT_LEN, block_unsafe=False)
        results += invert(clip, part, options)
        print(f"{len(results)} of {len(images)}", file=sys.stderr)
    return results


def measured(clip: Clip, pairs: list[Captioned], effort: str) -> tuple[dict[str, float], list]:
    """All figures of a CLIP, and the prompts that it was asked for, with the captions."""
    figures = reading(clip, pairs)
    prompts = found(clip, [pair.image for pair in pairs], effort)
    figures["found"] = sum(one.similarity for one in prompts) / len(prompts)
    figures["share of found"] = figures["captions"] / figures["found"]
    rows = list(map(json.loads, (EXAMPLES / "index.jsonl").open()))
    learned = found(clip, [load_image(EXAMPLES / row["file"]) for row in rows], effort)
    true = [
        bool(set(one.prompt.split()) & set(row["words"]))
        for one, row in zip(learned, rows, strict=True)
    ]
    figures["true word"] = sum(true) / len(true)
    texts = [
        [pair.caption, one.prompt, round(one.similarity, 3)]
        for pair, one in zip(pairs, prompts, strict=True)
    ]
    texts += [
        [row["name"], one.prompt, round(one.similarity, 3)]
        for row, one in zip(rows, learned, strict=True)
    ]
    return figures, texts


def table(figures: dict[str, dict[str, float]]) -> str:
    """A row for each figure, a column for each CLIP."""
    names = list(figures)
    shares = {"caption to drawing", "drawing to caption", "share of found", "true word"}
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in next(iter(figures.values())):
        form = ".0%" if row in shares else ".3f"
        cells = [format(figures[name][row], form) for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip", nargs="+", default=["emoji-clip"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build/emoji")
    parser.add_argument("--captions", type=Path, default=CAPTIONS)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    pairs = captioned(arguments.folder, arguments.captions)
    figures, texts = {}, {}
    for name in arguments.clip:
        clip = load_clip(name, device="cpu")
        figures[name], texts[name] = measured(clip, pairs, arguments.effort)
    text = (
        f"# Captions of held-out drawings\n\n{len(pairs)} captions; prompts of {PROMPT_LEN} tokens "
        f"with effort `{arguments.effort}`. {machine()}.\n\n"
        f"{table(figures)}\n"
    )
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text)
        whole = {"figures": figures, "texts": texts}
        arguments.out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
