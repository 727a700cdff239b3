"""The prompts that the default settings find for the bundled examples, and how true they are.

    python benchmarks/examples.py [--steps N] [--out benchmarks/results/examples]

For each example (drawings that emoji-clip never saw) it prints the learned prompt, whether a word
of the drawing's own name or keywords is in it, and two figures that tell whose fault a miss is:

* `true words` is the similarity of the drawing's name and keywords written one after the other. A
  miss whose prompt is *more* similar than that is the model's: the search gave what it asked for.
* `rank` is the place of the true name among the names of all examples when CLIP reads the image.

"By chance" is the share of hits when every prompt is held against the words of the *others*.
Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from step_time import machine

from pez_core import invert, load_clip
from pez_core.clip.images import load_image

EXAMPLES = Path(__file__).parent.parent / "examples"


def longest_that_fits(clip, words: list[str], limit: int) -> str:
    """As many of the words, in order, as fit into `limit` tokens."""
    text = ""
    for word in words:
        longer = f"{text} {word}".strip()
        if len(clip.text.words.encode(longer)) <= limit:
            text = longer
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    index = list(map(json.loads, (EXAMPLES / "index.jsonl").open()))
    clip = load_clip(arguments.clip, device="cpu")
    images = [load_image(EXAMPLES / row["file"]) for row in index]
    found = []
    for start in range(0, len(images), 10):
        found += invert(clip, images[start : start + 10], steps=arguments.steps)
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
        words = result.prompt.split()
        chances += [bool(set(words) & set(other["words"])) for other in index if other is not row]
        rows.append(
            {
                "file": row["file"],
                "name": row["name"],
                "unseen": row["unseen"],
                "prompt": result.prompt,
                "hits": sorted(set(words) & set(row["words"])),
                "similarity": round(result.similarity, 4),
                "true_words_similarity": round(true_similarities[k], 4),
                "rank": order[k].index(k) + 1,
            }
        )
    hits = [row for row in rows if row["hits"]]
    misses = [row for row in rows if not row["hits"]]
    model_limited = [r for r in misses if r["similarity"] > r["true_words_similarity"]]
    lines = [
        "# Prompts for the examples",
        "",
        f"{len(hits)} of {len(rows)} prompts ({len(hits) / len(rows):.0%}) have a word of the "
        f"drawing's own name or keywords in them; by chance {statistics.mean(chances):.0%}. "
        f"Mean similarity {statistics.mean(r['similarity'] for r in rows):.3f}; of the true words "
        f"written out {statistics.mean(r['true_words_similarity'] for r in rows):.3f}.",
        "",
        f"Of the {len(misses)} misses, {len(model_limited)} are the model's limit and not the "
        "search's: the learned prompt is more similar to the image than the true words are, so a "
        "better search would only move further from them.",
        "",
        f"`invert` with its defaults (prompt_len 16, steps {arguments.steps}, restarts 1, seed 0), "
        f"{found[0].seconds / 10:.1f} s per image in batches of 10. {machine()}.",
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
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
