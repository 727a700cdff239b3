"""Distillation, fusion and style, judged by the images of their prompts.

    python benchmarks/pictures_tasks.py                     # the bundled models, hours
    python benchmarks/pictures_tasks.py --parts fuse --cases 12 --images 2 --seeds 1 \
        --out build/few

The protocols are those of the paper's figures 6 (distillation), 4 (fusion) and 3 (style), with
numbers in place of an eye. The judge is a held-out CLIP.

- distill: the images of a shortened prompt are compared with those of the long one, image by image,
  with the same noise. The long prompts are captions of unseen drawings with their keywords.
- fuse: the images of a prompt for two drawings are compared with both drawings.
- style: words are learned from six drawings in one style and put behind the name of a seventh
  thing. Its images are compared with the drawings of that thing in each style.

Rows are appended to OUT.jsonl, and the same command resumes. Another number of cases, images or
tokens, and other models, need another --out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import HERE, Bench, append
from pictures import Made, Setup, Subject, add_models, images_of, own_options, subjects
from pictures_report import machines_of
from step_time import machine
from style import Drawings, in_style

from pez_core import distill, fuse, invert, load_clip, style
from pez_core.diffusion import load_pipeline

RATIOS = (0.7, 0.5, 0.3, 0.1)  # the paper's
STYLES = ("noto", "twemoji", "openmoji", "fluent-emoji", "fluent-emoji-flat")  # in colour
EXPLANATIONS = {
    "distill": "*Images* is the similarity of the images of the short prompt with those of the "
    "long one, by the judge. The last two lines are the long prompt with other noise, and another "
    "long prompt.",
    "fuse": "*First* and *second* are the similarities of the images with both drawings, by the "
    "judge; *lower* is the lower one of the two; *both* is the share of pairs whose lower one is "
    "higher than that of each prompt alone, and *each* the share of pairs in which both are higher "
    "than those of the prompt of that drawing alone.",
    "style": "*Own* is the similarity of the images with the drawing of the same thing in the "
    "style that was learned, *other* with its drawings in the other styles, by the judge; *right* "
    f"is the share whose most similar drawing is in that style (chance: {1 / len(STYLES):.0%}).",
}

_NO_COLUMNS = ("part", "case", "seed", "images_each", "cases", "models", "prompt_len")
_NO_COLUMNS += ("machine", "method", "prompt")

# The rows of a part for one case and seed, without their part, case and seed
Part = Callable[["Setup", int, int], list[dict]]


def features(setup: Setup, prompt: str, noise: Sequence[int]) -> torch.Tensor:
    """(images, features) of a prompt's images, by the judge."""
    return setup.judge.encode_images(images_of(setup, Made(prompt), noise))


def distilled(setup: Setup, case: int, seed: int) -> list[dict]:
    clip, noise = setup.bench.clip, setup.noise(case, seed)
    texts = [long_prompt(one) for one in setup.bench.images]
    text, other = texts[case], texts[(case + len(texts) // 2) % len(texts)]
    prompts = {
        f"ratio {ratio}": distill(clip, text, own_options(case, seed), ratio=ratio).prompt
        for ratio in RATIOS
    }
    goal, rows = features(setup, text, noise), []
    elsewhere = [len(texts) * 10 * setup.images + k for k in noise]
    for method, prompt, seeds in (
        *((method, prompt, noise) for method, prompt in prompts.items()),
        ("the long prompt, other noise", text, elsewhere),
        ("another long prompt", other, noise),
    ):
        near = (features(setup, prompt, seeds) * goal).sum(-1)
        tokens = len(clip.text.words.encode(prompt))
        rows.append({"method": method, "prompt": prompt, "tokens": tokens, "images": mean(near)})
    return rows


def long_prompt(one: Subject) -> str:
    """The caption, and the keywords that it lacks."""
    said = set(one.caption.split())
    return ", ".join([one.caption or one.name, *sorted(one.words - said)])


def fused(setup: Setup, case: int, seed: int) -> list[dict]:
    bench, noise = setup.bench, setup.noise(case, seed)
    count = len(bench.images)
    pair = [bench.images[k].image for k in (case, (case + count // 2) % count)]
    length = bench.lengths[0]
    own = own_options(case, seed, prompt_len=length)
    first, second = (one.prompt for one in invert(bench.clip, pair, own))
    half = replace(own, prompt_len=length // 2)
    prompts = {
        "fused": fuse(bench.clip, pair, own).prompt,
        "of the first": first,
        "of the second": second,
        "both, one behind the other": " ".join(
            one.prompt for one in invert(bench.clip, pair, half)
        ),
    }
    goals = setup.judge.encode_images(pair)
    rows = []
    for method, prompt in prompts.items():
        near = (features(setup, prompt, noise) @ goals.T).mean(0)
        first_, second_ = near.tolist()
        row = {"method": method, "prompt": prompt, "first": first_, "second": second_}
        rows.append(row | {"lower": min(first_, second_)})
    _, one, other, _ = rows
    alone = max(one["lower"], other["lower"])
    return [
        row
        | {"both": float(row["lower"] > alone)}
        | {"each": float(row["first"] > one["first"] and row["second"] > other["second"])}
        for row in rows
    ]


def styled(drawings: Drawings, trials: Sequence[dict], setup: Setup, case: int, seed: int) -> list:
    trial, noise = trials[case], setup.noise(case, seed)
    pictures = [drawings.picture(i) for i in trial["images"]]
    name = drawings.rows[drawings.places[trial["style"]][trial["subject"]]].name
    learned = style(setup.bench.clip, pictures, own_options(case, seed))
    prompts = {
        "learned words": learned.apply(name),
        "the style's own words": in_style(name, trial["style"]),
        "the name alone": name,
    }
    drawn = [drawings.picture(drawings.places[one][trial["subject"]]) for one in STYLES]
    goals, rows = setup.judge.encode_images(drawn), []
    for method, prompt in prompts.items():
        near = dict(
            zip(STYLES, (features(setup, prompt, noise) @ goals.T).mean(0).tolist(), strict=True)
        )
        right = max(near, key=near.__getitem__) == trial["style"]
        own = near.pop(trial["style"])
        row = {"method": method, "prompt": prompt, "own": own, "right": float(right)}
        rows.append(row | {"other": statistics.mean(near.values())})
    return rows


def mean(values: torch.Tensor) -> float:
    return round(values.mean().item(), 5)


def settings(setup: Setup) -> dict[str, Any]:
    """What the rows depend on beside part, case and seed."""
    bench = setup.bench
    sizes = {"images_each": setup.images, "cases": len(bench.images)}
    return sizes | {"models": setup.models, "prompt_len": bench.lengths[0]}


def check_rows(setup: Setup) -> None:
    """End where the rows so far have other settings."""
    for row in setup.bench.rows():
        if any(row.get(name) != value for name, value in settings(setup).items()):
            raise SystemExit(f"{setup.bench.found} has other settings; give another --out.")


def measure(setup: Setup, parts: dict[str, Part], cases: int) -> None:
    """Append the rows that the file does not have yet."""
    bench = setup.bench
    done = {(row["part"], row["case"], row["seed"]) for row in bench.rows()}
    for seed in bench.seeds:
        for name, part in parts.items():
            for case in range(cases):
                if (name, case, seed) in done:
                    continue
                shared = {"part": name, "case": case, "seed": seed} | settings(setup)
                shared["machine"] = machine()
                append(bench.found, [shared | row for row in part(setup, case, seed)])
                print(f"{name}, seed {seed}: {case + 1}/{cases}", file=sys.stderr)


def report(rows: Sequence[dict], title: str) -> Iterator[str]:
    """The lines of OUT.md."""
    yield from ("# Distillation, fusion and style by their images", "", title)
    for part, explanation in EXPLANATIONS.items():
        found = [row for row in rows if row["part"] == part]
        if not found:
            continue
        columns = [k for k in found[0] if k not in _NO_COLUMNS]
        seeds = len({row["seed"] for row in found})
        counted = f"{seeds} {'seed' if seeds == 1 else 'seeds at most'}. {explanation}"
        yield from ("", f"## {part}", "", counted, "")
        yield f"| prompt | {' | '.join(columns)} |"
        yield "|---" * (len(columns) + 1) + "|"
        for method in dict.fromkeys(row["method"] for row in found):
            own = [row for row in found if row["method"] == method]
            yield f"| {method} | {' | '.join(with_error(own, c) for c in columns)} |"


def with_error(rows: Sequence[dict], column: str) -> str:
    """The mean over cases, and its standard error."""
    cases: dict[int, list[float]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row[column])
    means = [statistics.mean(values) for values in cases.values()]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else float("nan")
    digits = 1 if column == "tokens" else 3
    return f"{statistics.mean(means):.{digits}f} ± {error:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_models(parser)
    parser.add_argument("--parts", nargs="+", choices=EXPLANATIONS, default=list(EXPLANATIONS))
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--images", type=int, default=4, help="made of each prompt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompt-len", type=int, default=8)
    parser.add_argument("--report", action="store_true", help="write OUT.md only")
    parser.add_argument("--out", type=Path, default=HERE / "results/pictures_tasks")
    a = parser.parse_args(argv)

    clip, judge = (load_clip(name, device=a.device) for name in (a.clip, a.judge))
    images = subjects(a.folder, a.cases)
    bench = Bench(clip, images, {}, [a.prompt_len], range(a.seeds), [], len(images), a.out)
    if not a.report:
        pipeline = load_pipeline(a.pipeline, a.device)
        pipeline.set_progress_bar_config(disable=True)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Part] = {"distill": distilled, "fuse": fused}
        if "style" in a.parts:
            drawings = Drawings(a.folder)
            trials = drawings.trials(list(STYLES), len(images), seed=0)
            parts["style"] = lambda *given: styled(drawings, trials, *given)
        setup = Setup(bench, pipeline, judge, steps=0, images=a.images)
        check_rows(setup)
        measure(setup, {name: parts[name] for name in a.parts}, len(images))
    names = [Path(name).name for name in (clip.name, a.pipeline, judge.name)]
    rows = bench.rows()
    cases = {row["case"] for row in rows}
    each = {row["images_each"] for row in rows if "images_each" in row} or {a.images}
    title = (
        f"{len(cases)} cases, {'/'.join(map(str, sorted(each)))} images of each prompt. Searched "
        f"on {names[0]}, images by {names[1]}, judged by {names[2]}. "
        f"{'; '.join(machines_of(rows))}. Behind ± is one standard error over the cases."
    )
    text = "\n".join(report(rows, title)) + "\n"
    a.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
