"""Does the picture follow when a person changes a word of a prompt?

    python benchmarks/pictures.py                   # finds the prompts
    python benchmarks/edits.py                      # minutes
    python benchmarks/edits.py --methods "ours (tags)" "true caption" --drawings 20

In each prompt one word becomes another thing: the word that the prompt owes most of its similarity
with the target, by the CLIP that was searched. Images of the prompt before and after, with the same
noise, are compared with the new word by a held-out CLIP. The edit is *seen* where the
similarity of the images with the new word rises by at least 0.1; *gain* is the mean rise; *same* is
the similarity of the images after the edit with those before. Behind ± is one standard error over
the drawings, of the mean over seeds. Rows are appended to OUT.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import HERE, Bench, append
from pictures import ANOTHER, Made, Setup, add_models, images_of, subjects
from step_time import machine

from pez_core import load_clip
from pez_core.diffusion import load_pipeline
from pez_core.readability import FUNCTION_WORDS

SEEN = 0.1
IMAGES = 2  # of each prompt
METHODS = (
    ANOTHER,
    "ours (balanced), no repeats",
    "PEZ as published",
    "ours (tags)",
    "ours (sentence)",
    "VGD (tags)",
    "VGD (sentence)",
    "true caption",
)
# things that have a drawing in the training of the image model, each one word
THINGS = """fish bird cat dog house car tree flower star heart moon sun boat book key bell apple
banana cake clock cloud crown guitar hammer rocket umbrella butterfly snake turtle mushroom"""


def main_word(setup: Setup, prompt: str, place: int) -> str | None:
    """The content word without which the prompt is least similar to its target."""
    words = [w.strip(",") for w in prompt.split()]
    content = sorted({w for w in words if w.isalpha() and w not in FUNCTION_WORDS})
    if not content:
        return None
    clip, target = setup.bench.clip, setup.bench.features[place]
    without = [" ".join(v for v in words if v != word) or "a" for word in content]
    near = clip.encode_texts(without) @ target
    return content[int(near.argmin())]


def edited(prompt: str, word: str, other: str) -> str:
    """The prompt with a word replaced, and its article corrected."""
    found: list[str] = []
    for one in prompt.split():
        new = one.replace(word, other) if one.strip(",") == word else one
        if new != one and found and found[-1] in ("a", "an"):
            found[-1] = "an" if other[0] in "aeiou" else "a"
        found.append(new)
    return " ".join(found)


def measure(setup: Setup, row: dict, seed: int) -> dict | None:
    """The result of one edit; None where the prompt has no word to change."""
    prompt, place = row["prompt"], row["place"]
    word = main_word(setup, prompt, place)
    if word is None:
        return None
    things = [thing for thing in THINGS.split() if thing not in prompt.split()]
    other = random.Random(1000 * seed + place).choice(things)
    after = edited(prompt, word, other)
    noise, judge = setup.noise(place, seed), setup.judge
    features = [
        judge.encode_images(images_of(setup, Made(text), noise)) for text in (prompt, after)
    ]
    (thing,) = judge.encode_texts([f"a {other}"])
    near = [(one @ thing).mean().item() for one in features]
    same = (features[0] * features[1]).sum(1).mean().item()
    found = {"word": word, "other": other, "edited": after, "gain": near[1] - near[0]}
    of_prompt = {k: row[k] for k in ("method", "seed", "place", "prompt")}
    return of_prompt | {"images": setup.images} | found | {"same": same}


def by_drawing(rows: Sequence[dict], value: Callable[[dict], float]) -> tuple[float, float]:
    """The mean of a value and its standard error over the drawings, each a mean over its seeds."""
    places = dict.fromkeys(row["place"] for row in rows)
    means = [statistics.mean(value(r) for r in rows if r["place"] == place) for place in places]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else float("nan")
    return statistics.mean(means), error


def report(rows: Sequence[dict], title: str) -> str:
    lines = [
        "# Edits of one word",
        "",
        title,
        "",
        *__doc__.split("\n\n")[2].rstrip().split("\n"),
        "",
    ]
    lines += ["| method | edits | seeds | seen | gain | same |", "|---|---|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        seen, unsure = by_drawing(own, lambda row: row["gain"] >= SEEN)
        gain, error = by_drawing(own, lambda row: row["gain"])
        same, _ = by_drawing(own, lambda row: row["same"])
        seeds = len({row["seed"] for row in own})
        lines.append(
            f"| {method} | {len(own)} | {seeds} | {seen:.0%} ± {unsure:.0%} "
            f"| {gain:+.3f} ± {error:.3f} | {same:.3f} |"
        )
    lines += ["", "The first edits of each:", ""]
    for method in dict.fromkeys(row["method"] for row in rows):
        lines += [
            f"- {method}: *{row['prompt']}* -> *{row['edited']}* ({row['gain']:+.2f})"
            for row in [row for row in rows if row["method"] == method][:3]
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_models(parser)
    parser.add_argument("--drawings", type=int, default=102)
    parser.add_argument("--images", type=int, default=IMAGES, help="of each prompt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--prompts", type=Path, default=HERE / "results/pictures.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "results/edits")
    a = parser.parse_args(argv)

    clip, judge = (load_clip(name, device=a.device) for name in (a.clip, a.judge))
    bench = Bench(clip, subjects(a.folder, a.drawings), {}, [0], range(1), [], 1, a.out)
    pipeline = load_pipeline(a.pipeline, a.device)
    pipeline.set_progress_bar_config(disable=True)
    setup = Setup(bench, pipeline, judge, 0, a.images)
    done = {(row["method"], row["seed"], row["place"]): row["prompt"] for row in bench.rows()}
    if any(row.get("images", IMAGES) != a.images for row in bench.rows()):
        raise SystemExit(f"{bench.found} has another number of images; give another --out.")
    found = [
        row
        for row in map(json.loads, a.prompts.read_text().splitlines())
        if row["seed"] < a.seeds and row["method"] in a.methods and row["place"] < a.drawings
    ]
    found.sort(key=lambda row: (row["seed"], a.methods.index(row["method"])))
    for k, row in enumerate(found):
        before = done.get((row["method"], row["seed"], row["place"]))
        if before not in (None, row["prompt"]):
            raise SystemExit(f"{bench.found} has edits of other prompts; give another --out.")
        if before is None:
            one = measure(setup, row, row["seed"])
            append(bench.found, [one] if one else [])
            print(f"{row['method']}: {k + 1}/{len(found)}", file=sys.stderr)
    title = f"Images by {Path(a.pipeline).name}, judged by {Path(a.judge).name}. {machine()}."
    text = report(bench.rows(), title)
    a.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
