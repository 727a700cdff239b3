"""Prompts of the bundled examples, and how many of their words are true.

    python benchmarks/examples.py [--steps N] [--out benchmarks/results/examples]

For each example (drawings outside of the training data of emoji-clip) it prints the learned prompt,
whether it contains a word of the drawing's own name or keywords, and two figures for misses:

* `true words` is the similarity of the drawing's name and keywords written one after the other. If
  the prompt of a miss is *more* similar, the model is the limit, not the search.
* `rank` is the place of the true name among the names of all examples, by similarity to the image.

"By chance" is the share of hits when every prompt is compared with the words of the *others*.
Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from step_time import machine
from unseen import EVERY_WORD

from pez_core import Clip, Result, SearchOptions, invert, load_clip
from pez_core.clip.images import load_image

EXAMPLES = Path(__file__).parent.parent / "examples"
BATCH = 10  # images of one call


def longest_that_fits(clip: Clip, words: list[str], limit: int) -> str:
    """As many of the words, in order, as fit into `limit` tokens."""
    text = ""
    for word in words:
        longer = f"{text} {word}".strip()
        if len(clip.text.words.encode(longer)) <= limit:
            text = longer
    return text


def measure(clip: Clip, index: list[dict], steps: int) -> tuple[list[dict], float, float]:
    """A row for each example, the share of hits by chance, and seconds per image."""
    images = [load_image(EXAMPLES / row["file"]) for row in index]
    options = SearchOptions(swaps=0, steps=steps, **EVERY_WORD)
    found: list[Result] = []
    for start in range(0, len(images), BATCH):
        found += invert(clip, images[start : start + BATCH], options)
        print(f"{len(found)} of {len(images)}", file=sys.stderr)
    features = clip.encode_images(images)
    names = clip.encode_texts([row["name"] for row in index])
    order = (features @ names.T).argsort(dim=1, descending=True).tolist()
    truths = [
        longest_that_fits(clip, [*row["name"].split(), *row["words"]], len(result.token_ids))
        for row, result in zip(index, found, strict=True)
    ]
    true_similarities = (features * clip.encode_texts(truths)).sum(1).tolist()
    rows, chances = [], []
    for k, (row, result) in enumerate(zip(index, found, strict=True)):
        words = set(result.prompt.split())
        chances += [bool(words & set(other["words"])) for other in index if other is not row]
        rows.append(
            {
                "file": row["file"],
                "name": row["name"],
                "unseen": row["unseen"],
                "prompt": result.prompt,
                "hits": sorted(words & set(row["words"])),
                "similarity": round(result.similarity, 4),
                "true_words_similarity": round(true_similarities[k], 4),
                "rank": order[k].index(k) + 1,
            }
        )
    return rows, statistics.mean(chances), found[0].seconds / min(BATCH, len(images))


def report(rows: list[dict], chance: float, steps: int, seconds: float) -> str:
    hits = [row for row in rows if row["hits"]]
    misses = [row for row in rows if not row["hits"]]
    model_limited = [r for r in misses if r["similarity"] > r["true_words_similarity"]]
    lines = [
        "# Prompts for the examples",
        "",
        f"{len(hits)} of {len(rows)} prompts ({len(hits) / len(rows):.0%}) have a word of the "
        f"drawing's own name or keywords in them; by chance {chance:.0%}. "
        f"Mean similarity {statistics.mean(r['similarity'] for r in rows):.3f}; of the true words "
        f"written out {statistics.mean(r['true_words_similarity'] for r in rows):.3f}.",
        "",
        f"Of the {len(misses)} misses, {len(model_limited)} are the model's limit and not the "
        "search's: the learned prompt is more similar to the image than the true words are, so a "
        "better search would only move further from them.",
        "",
        f"`invert` without swaps (prompt_len 16, steps {steps}, restarts 1, seed 0), "
        f"{seconds:.1f} s per image in batches of {BATCH}. {machine()}.",
        "",
        "| image | never seen | similarity | true words | rank | prompt (true words in bold) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        prompt = " ".join(f"**{w}**" if w in row["hits"] else w for w in row["prompt"].split())
        prompt = prompt.replace("|", "\\|")
        lines.append(
            f"| {row['name']} | {row['unseen']} | {row['similarity']:.3f} | "
            f"{row['true_words_similarity']:.3f} | {row['rank']} | {prompt} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--count", type=int, help="the first examples only")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    index = list(map(json.loads, (EXAMPLES / "index.jsonl").open()))[: arguments.count]
    clip = load_clip(arguments.clip, device="cpu")
    rows, chance, seconds = measure(clip, index, arguments.steps)
    text = report(rows, chance, arguments.steps, seconds)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
