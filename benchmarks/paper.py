"""Do the paper's findings hold on the bundled CLIPs?

    python benchmarks/paper.py [--only lengths rates ratios] [--images N] [--steps N]

* lengths: prompt length against own and neutral similarity (paper, figure 5).
* rates: learning rate against similarity (figure 7, there on language models).
* ratios: long texts distilled to 0.7, 0.5, 0.3 and 0.1 of their tokens (figure 6).
* the comparison of methods (table 1) uses the prompts that quality.py has found.

The paper makes images of the prompts and compares these with the target by a held-out CLIP. Here
such a CLIP, the judge, compares the prompt itself with the target; this similarity is called
neutral. Each part is saved to OUT.json when it is done; OUT.md and OUT.png cover all saved parts.
It needs the same packages and files as quality.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench import HERE, Bench, find
from matplotlib.figure import Figure
from quality import METHODS
from quality_report import measured, summary
from step_time import machine
from unseen import EVERY_WORD, unseen

from pez_core import Clip, SearchOptions, distill, load_clip

LENGTHS = (1, 2, 4, 8, 16, 32)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RATIOS = (0.7, 0.5, 0.3, 0.1)
NEAR = 0.01  # similarity
MEASURES = ("loop", "own", "neutral")

# Table 1 of the paper: the mean of its four datasets, each method less PEZ with 8 tokens.
TABLE_1 = {
    "PEZ as published": 0.0,
    "PEZ + bank": 0.019,
    "AutoPrompt SGD": -0.007,
    "FluentPrompt": -0.010,
    "soft prompt": -0.213,
    "Interrogator, 75 tokens": -0.006,
}
WITHOUT_NUMBERS = ("PEZ", "Interrogator", "true name", "true words", "true name + 4 learned")

Row = dict[str, float]


def judged(clip: Clip, judge: Clip, bench: Bench, found: Sequence[dict]) -> Row:
    """Means over images, and the standard error of the neutral one."""
    prompts = [row["prompt"] for row in found]
    images = [one.image for one in bench.images]
    own, neutral = (
        (each.encode_texts(prompts) * each.encode_images(images)).sum(1) for each in (clip, judge)
    )
    return {
        "loop": statistics.mean(row["score"] for row in found),
        "own": own.mean().item(),
        "neutral": neutral.mean().item(),
        "error": (neutral.std() / len(neutral) ** 0.5).item(),
    }


def by_length(bench: Bench, judge: Clip, steps: int) -> dict[str, dict[str, Row]]:
    parts = {}
    for name in ("PEZ as published", "PEZ", "ours (balanced)"):
        for prompt_len in LENGTHS:
            found = find(bench, METHODS[name], prompt_len, 0, {None: steps}, None)
            row = judged(bench.clip, judge, bench, found)
            parts.setdefault(name, {})[str(prompt_len)] = row
            print(name, prompt_len, row, file=sys.stderr)
    return parts


def by_rate(bench: Bench, judge: Clip, steps: int) -> dict[str, dict[str, Row]]:
    """With a third of the steps, which is enough to compare many rates."""
    parts = {}
    for name in ("PEZ", "AutoPrompt SGD", "FluentPrompt", "soft prompt"):
        for lr in RATES:
            found = find(bench, METHODS[name], 8, 0, {None: steps // 3}, lr)
            row = judged(bench.clip, judge, bench, found)
            parts.setdefault(name, {})[f"{lr:g}"] = row
            print(name, lr, row, file=sys.stderr)
    return parts


def by_ratio(bench: Bench, judge: Clip, steps: int) -> dict[str, dict[str, Row]]:
    """Texts are the words of a drawing, of the third of the drawings with the most words."""
    read = bench.clip.text.words.encode
    texts = [
        " ".join({**dict.fromkeys(one.name.split()), **dict.fromkeys(sorted(one.words))})
        for one in bench.images
    ]
    order = sorted(range(len(texts)), key=lambda k: len(read(texts[k])), reverse=True)
    longest = order[: max(2, len(order) // 3)]
    whole = [texts[k] for k in longest]
    texts_of = [each.encode_texts(whole) for each in (bench.clip, judge)]
    pictures = judge.encode_images([bench.images[k].image for k in longest])

    def row(prompts: Sequence[str]) -> Row:
        features = [each.encode_texts(prompts) for each in (bench.clip, judge)]
        own, neutral = (
            (a * b).sum(1).mean().item() for a, b in zip(features, texts_of, strict=True)
        )
        image = (features[1] * pictures).sum(1)
        tokens = statistics.mean(len(read(one)) for one in prompts)
        return {
            "own": own,
            "neutral": neutral,
            "image": image.mean().item(),
            "error": (image.std() / len(image) ** 0.5).item(),
            "tokens": tokens,
        }

    methods = {
        "PEZ as published": SearchOptions(swaps=0, steps=steps, **EVERY_WORD),
        "ours (balanced)": SearchOptions(restarts=4, **EVERY_WORD),
    }
    parts = {"the whole text": {"1": row(whole)}}
    for name, options in methods.items():
        for ratio in RATIOS:
            prompts = [distill(bench.clip, text, options, ratio=ratio).prompt for text in whole]
            parts.setdefault(name, {})[f"{ratio:g}"] = row(prompts)
            print(name, ratio, parts[name][f"{ratio:g}"], file=sys.stderr)
    return parts


PARTS: dict[str, Callable[[Bench, Clip, int], dict]] = {
    "lengths": by_length,
    "rates": by_rate,
    "ratios": by_ratio,
}


def tabled(
    columns: Sequence[str],
    parts: dict[str, dict[str, Row]],
    measures: Callable[[Row], Sequence[str]],
) -> list[str]:
    """A table with a line for each row of each method."""
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return lines + [
        f"| {name} | {setting} | {' | '.join(measures(row))} |"
        for name, rows in parts.items()
        for setting, row in rows.items()
    ]


def with_error(row: Row, measure: str) -> str:
    return f"{row[measure]:.3f} ± {row['error']:.3f}"


def length_lines(parts: dict[str, dict[str, Row]]) -> list[str]:
    lines = [
        "## Prompt length (figure 5)",
        "",
        "The paper: the longer, the less loss, but from 16 tokens on the images get worse.",
        "",
        *tabled(
            ("tokens", "in the loop", "own", "neutral"),
            parts,
            lambda row: (f"{row['loop']:.3f}", f"{row['own']:.3f}", with_error(row, "neutral")),
        ),
        "",
    ]
    for name, rows in parts.items():
        best = {measure: max(rows, key=lambda n: rows[n][measure]) for measure in MEASURES}
        lines.append(
            f"{name}: the best length is {best['loop']} tokens in the loop, {best['own']} for own "
            f"and {best['neutral']} for neutral similarity."
        )
    return lines


def rate_lines(parts: dict[str, dict[str, Row]]) -> list[str]:
    lines = [
        "## Learning rates (figure 7)",
        "",
        "The paper: methods that project at each step get stuck unless the rate is tuned. Own "
        "similarity of 8 tokens after a third of the steps; PEZ and the soft prompt with AdamW, "
        "the others with SGD.",
        "",
        f"| method | {' | '.join(f'{lr:g}' for lr in RATES)} | rates within {NEAR} of its best |",
        "|---" * (len(RATES) + 2) + "|",
    ]
    for name, rows in parts.items():
        values = [rows[f"{lr:g}"]["own"] for lr in RATES]
        near = sum(value >= max(values) - NEAR for value in values)
        cells = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {cells} | {near} of {len(values)} |")
    return lines


def ratio_lines(parts: dict[str, dict[str, Row]]) -> list[str]:
    return [
        "## Distillation (figure 6)",
        "",
        "The paper: even three or four tokens still give images like those of the long prompt. The "
        "texts are all words that are true of a drawing, of the third of the drawings that have "
        "the most; *image* is the judge's similarity of the short prompt with that drawing, which "
        "nothing was fitted to.",
        "",
        *tabled(
            ("ratio", "tokens", "own, with the text", "neutral, with the text", "image"),
            parts,
            lambda row: (
                f"{row['tokens']:.1f}",
                f"{row['own']:.3f}",
                f"{row['neutral']:.3f}",
                with_error(row, "image"),
            ),
        ),
    ]


def table_lines(bench: Bench, judge: Clip) -> list[str]:
    """The prompts that quality.py has found, each method compared on its own seeds."""
    methods = [*TABLE_1, *WITHOUT_NUMBERS]
    bench = replace(bench, methods={name: METHODS[name] for name in methods})
    cells: dict[tuple[str, int], list[dict]] = {}
    found = measured(bench, judge)
    longest = max((row["budget"] for row in found if row["budget"]), default=0)
    for row in found:
        if row["budget"] in (None, longest):
            cells.setdefault((row["method"], row["prompt_len"]), []).append(row)
    base = cells.get(("PEZ as published", 8))
    lines = [
        "## The methods (table 1)",
        "",
        f"Eight tokens, unless the name has another number, after {longest:g} seconds each. "
        "*Paper* is the mean of its four datasets; all are less PEZ as published.",
        "",
        "| method | paper | neutral | own |",
        "|---|---|---|---|",
    ]
    for name in methods:
        rows = cells.get((name, METHODS[name].prompt_len or 8)) or cells.get((name, 0))
        if not rows or not base:
            continue
        seeds = {row["seed"] for row in rows}
        less = [row for row in base if row["seed"] in seeds]
        texts = [f"{TABLE_1[name]:+.3f}" if name in TABLE_1 else "-"]
        for measure in ("neutral", "own"):
            mean, error = summary(rows, measure, [] if name == "PEZ as published" else less)
            sign = "" if name == "PEZ as published" else "+"
            texts.append(f"{mean:{sign}.3f} ± {error:.3f}")
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def plot(parts: dict[str, dict], path: Path) -> None:
    figure = Figure(figsize=(5 * len(parts), 4), layout="constrained")
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    shown = {"lengths": "neutral", "rates": "own", "ratios": "image"}
    titles = {"lengths": "tokens", "rates": "learning rate", "ratios": "share of the tokens"}
    for axis, (part, methods) in zip(axes, parts.items(), strict=True):
        for k, (name, rows) in enumerate(methods.items()):
            x = [float(one) for one in rows]
            axis.plot(
                x, [row[shown[part]] for row in rows.values()], "o-", color=f"C{k}", label=name
            )
            if part == "lengths":
                axis.plot(x, [row["own"] for row in rows.values()], ":", color=f"C{k}")
        axis.set_xscale("log")
        axis.set_title(
            "neutral (dotted: own) similarity" if part == "lengths" else shown[part], loc="left"
        )
        axis.set_xlabel(titles[part])
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE / "results/paper")
    arguments = parser.parse_args(argv)
    clip = load_clip("emoji-clip", device="cpu")
    judge = load_clip(str(HERE / "models/emoji-clip-judge"), device="cpu")
    bench = Bench(
        clip=clip,
        images=unseen(arguments.images),
        methods=METHODS,
        lengths=[8],
        seeds=range(3),
        budgets=[10],
        at_once=arguments.images,
        out=HERE / "results/quality",
    )
    saved = arguments.out.with_suffix(".json")
    parts = json.loads(saved.read_text()) if saved.exists() else {}
    for name in arguments.only:
        parts[name] = PARTS[name](bench, judge, arguments.steps)
        saved.write_text(json.dumps(parts, indent=1) + "\n")

    tables = {"lengths": length_lines, "rates": rate_lines, "ratios": ratio_lines}
    lines = [
        "# The paper's findings, on the bundled CLIPs",
        "",
        f"{arguments.images} drawings never trained on, one seed; PEZ and the baselines with "
        f"{arguments.steps:,} steps. ± is one standard error over images. {machine()}.",
    ]
    for name in PARTS:
        if name in parts:
            lines += ["", *tables[name](parts[name])]
    lines += ["", *table_lines(replace(bench, images=unseen()), judge)]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot({name: parts[name] for name in PARTS if name in parts}, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
