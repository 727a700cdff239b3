"""`pez score`: similarities of prompts with images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..names import as_utf8
from .arguments import add_clip, add_fit, add_judge, check_texts, load_clip, load_judge
from .show import print_json, rounded

if TYPE_CHECKING:
    from PIL import Image

    from ..clip import AnyClip

_BAR_WIDTH = 24


def add_commands(commands: Any) -> None:
    """Add `score` to the subparsers of `pez`."""
    command = commands.add_parser(
        "score",
        help="measure the similarity of prompts and images",
        description="Measure the similarity of prompts and images, and the contribution of each "
        "word.",
    )
    command.add_argument("prompts", nargs="+", metavar="PROMPT", help="prompt to score")
    command.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="image; may be repeated"
    )
    add_judge(command)
    add_fit(command)
    command.add_argument(
        "--explain", action="store_true", help="print the similarity that each word contributes"
    )
    command.add_argument(
        "--prune", action="store_true", help="drop the words that contribute nothing"
    )
    command.add_argument(
        "--max-loss",
        type=float,
        metavar="X",
        help="similarity that a prompt may lose by --prune (default: 0)",
    )
    add_clip(command)
    command.set_defaults(run=_score, names={"images": "--image"})


def _score(arguments: argparse.Namespace) -> int:
    from .. import score
    from ..clip.images import load_images

    if arguments.max_loss is not None and not arguments.prune:
        raise ArgumentError("max_loss", "requires `prune`", "add it")
    check_texts("prompts", arguments.prompts, "--image")
    images, _ = load_images(arguments.image)
    clip = load_clip(arguments)
    scores = score(clip, arguments.prompts, images, load_judge(arguments), arguments.fit)
    rows = []
    for k, prompt in enumerate(arguments.prompts):
        row: dict[str, Any] = {"prompt": prompt, "similarities": _values(scores.similarity[k])}
        if scores.judge is not None:
            row["judge"] = _values(scores.judge[k])
        if len(scores.encoders) > 1:
            row["encoders"] = {name: _values(all_[k]) for name, all_ in scores.encoders.items()}
        rows.append(row | _words(arguments, clip, prompt, images))
    if arguments.json:
        print_json(rows)
        return 0
    for row in rows:
        _print(row, arguments.image)
    return 0


def _values(similarities: Any) -> list[float]:
    return list(map(rounded, similarities.tolist()))


def _words(
    arguments: argparse.Namespace, clip: AnyClip, prompt: str, images: Sequence[Image.Image]
) -> dict[str, Any]:
    """The fields of `--explain` and `--prune`."""
    from .. import explain, prune

    row: dict[str, Any] = {}
    if arguments.explain:
        row["words"] = [
            {"word": found.word, "contribution": rounded(found.contribution)}
            for found in explain(clip, prompt, images, arguments.fit)
        ]
    if arguments.prune:
        pruned = prune(clip, prompt, images, arguments.max_loss or 0, arguments.fit)
        row["pruned"] = {
            "prompt": pruned.prompt,
            "similarity": rounded(pruned.similarity),
            "dropped": pruned.dropped,
        }
    return row


def _print(row: dict[str, Any], images: Sequence[str]) -> None:
    print(row["prompt"])
    for k, image in enumerate(images):
        others = f"  judge {row['judge'][k]:.4f}" if "judge" in row else ""
        for name, values in row.get("encoders", {}).items():
            others += f"  {name} {values[k]:.4f}"
        print(f"  {row['similarities'][k]:.4f}{others}  {as_utf8(image)}")
    words = row.get("words", [])
    longest = max((len(entry["word"]) for entry in words), default=0)
    most = max((abs(entry["contribution"]) for entry in words), default=0) or 1
    for entry in words:
        contribution = entry["contribution"]
        bar = ("█" if contribution > 0 else "░") * round(_BAR_WIDTH * abs(contribution) / most)
        print(f"    {entry['word']:{longest}s}  {contribution:+.4f}  {bar}".rstrip())
    if "pruned" in row:
        print(f"  pruned to {row['pruned']['similarity']:.4f}  {row['pruned']['prompt']}")
