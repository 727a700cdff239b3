"""The evaluation of the prompts that quality.py found: its table, its plot and its images."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from unseen import words_of

from pez_core import Clip
from pez_core.readability import load_language_model

if TYPE_CHECKING:
    from bench import Bench

PUBLISHED = "PEZ as published"
TEXTS = 256  # encoded at once
EXPLANATION = """\
*Own* is the similarity of the printed prompt with the image by the CLIP of the search; *in the
loop* is that of the search itself. *Neutral* is the similarity by a held-out CLIP. *True keyword*
is the share of prompts with a word of the image's own name or keywords and, in brackets, of the
other images'. *GFLOP* is the work of the text tower (`pez_core.tower_work`) for one image alone,
without what a CLIP keeps after its first image. *Lost per word* is the similarity lost when a word
is dropped, the mean over the words. *Perplexity* is that by a small language model, a geometric
mean. Behind ± is one standard error: over the images, of the mean over the seeds. Differences are
with PEZ as published in the same seconds (in the most seconds, for methods without a budget),
paired by image."""

# (method, prompt_len, budget) -> its rows
Cells = dict[tuple[str, int, float | None], list[dict]]


def report(bench: Bench, judge: Clip, language_model: str | None) -> None:
    """Write OUT.md and OUT.png."""
    cells: Cells = defaultdict(list)
    for row in measured(bench, judge):
        cells[row["method"], row["prompt_len"], row["budget"]].append(row)
    compared = [
        row
        for (_, _, budget), rows in cells.items()
        if budget in (None, bench.budgets[-1])
        for row in rows
    ]
    note = add_perplexities(compared, language_model)
    calibration = bench.calibration()
    searched, judged = (Path(clip.name).name for clip in (bench.clip, judge))
    lines = [
        "# Prompts of each method after the same seconds",
        "",
        f"{len(bench.images)} images, never trained on, with {len(bench.seeds)} seeds. Searched on "
        f"{searched}, judged by {judged}. Seconds are those of one image alone on "
        f"{calibration['machine']}.",
        "",
        *EXPLANATION.split("\n"),
        *(["", f"There are no perplexities: {note}"] if note else []),
        *duels(cells, bench),
        *speed(calibration),
    ]
    for prompt_len in bench.lengths:
        lines += ["", f"## prompt_len {prompt_len}", "", *table(cells, bench, prompt_len)]
    for prompt_len in bench.lengths:
        lines += ["", f"## By set, prompt_len {prompt_len}", "", *by_set(cells, bench, prompt_len)]
    lines += learning_rates(calibration)
    bench.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(cells, bench, bench.out.with_suffix(".png"))


def measured(bench: Bench, judge: Clip) -> list[dict]:
    """The rows of the search with the similarities of their prompts."""
    rows = [row for row in bench.rows() if row["method"] in bench.methods]
    searched = dict.fromkeys((row["prompt"], row["place"]) for row in rows)
    shorter = {one: [(text, one[1]) for text in one_dropped(one[0])] for one in searched}
    pairs = list(dict.fromkeys([*searched, *(one for few in shorter.values() for one in few)]))
    own, neutral = (similarities(clip, bench, pairs) for clip in (bench.clip, judge))
    pictures = {image_key(row): row["images"] for row in read(images_file(bench))}
    for row in rows:
        one = row["prompt"], row["place"]
        words = set(words_of(row["prompt"]))
        hits = [bool(words & image.words) for image in bench.images]
        row |= {
            "own": own[one],
            "neutral": neutral[one],
            "keyword": hits.pop(row["place"]),
            "chance": statistics.mean(hits),
            "lost": own[one] - statistics.mean(own[few] for few in shorter[one]),
            "lost_neutral": neutral[one] - statistics.mean(neutral[few] for few in shorter[one]),
            "images": pictures.get(image_key(row)),
            "nats": None,
        }
    return rows


def one_dropped(prompt: str) -> list[str]:
    words = prompt.split()
    return [" ".join(words[:k] + words[k + 1 :]) for k in range(len(words))]


def similarities(
    clip: Clip, bench: Bench, pairs: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], float]:
    """The similarity of each text, encoded the public way, with the image of its place."""
    features = clip.encode_images([one.image for one in bench.images])
    values = []
    for start in range(0, len(pairs), TEXTS):
        texts, places = zip(*pairs[start : start + TEXTS], strict=True)
        values += (clip.encode_texts(texts) * features[list(places)]).sum(1).tolist()
    return dict(zip(pairs, values, strict=True))


def add_perplexities(rows: Sequence[dict], name: str | None) -> str:
    """Set the mean negative log-likelihood per token of each prompt, or give the reason why not."""
    try:
        model = load_language_model(name)
    except ValueError as error:
        return str(error)
    texts = list(dict.fromkeys(row["prompt"] for row in rows))
    nats = dict(zip(texts, (-model.log_likelihoods(texts)).tolist(), strict=True))
    for row in rows:
        row["nats"] = nats[row["prompt"]]
    return ""


def summary(rows: Sequence[dict], measure: str, less: Sequence[dict] = ()) -> tuple[float, float]:
    """Mean over images and its standard error; of the differences with `less`, image by image."""
    values = by_place(rows, measure)
    if less:
        other = by_place(less, measure)
        values = {place: value - other[place] for place, value in values.items()}
    several = len(values) > 1
    error = statistics.stdev(values.values()) / len(values) ** 0.5 if several else math.nan
    return statistics.mean(values.values()), error


def by_place(rows: Sequence[dict], measure: str) -> dict[int, float]:
    """The mean over seeds of each image."""
    values = defaultdict(list)
    for row in rows:
        values[row["place"]].append(row[measure])
    return {place: statistics.mean(few) for place, few in values.items()}


def with_error(rows: Sequence[dict], measure: str, less: Sequence[dict] = ()) -> str:
    mean, error = summary(rows, measure, less)
    return f"{mean:+.3f} ± {error:.3f}" if less else f"{mean:.3f} ± {error:.3f}"


def keyword(rows: Sequence[dict]) -> str:
    share, error = summary(rows, "keyword")
    return f"{share:.0%} ± {error:.0%} ({summary(rows, 'chance')[0]:.0%})"


def perplexity(rows: Sequence[dict]) -> str:
    nats, error = summary(rows, "nats")
    return f"{math.exp(nats):,.0f} ± {math.exp(nats) * error:,.0f}"


def cases(cells: Cells, bench: Bench, prompt_len: int) -> Iterable[tuple[str, float | None, list]]:
    """Method, budget and rows of a prompt_len, by budget; methods without a budget come last."""
    for budget in [*bench.budgets, None]:
        for name, method in bench.methods.items():
            length = prompt_len if method.prompt_len is None else method.prompt_len
            if (name, length, budget) in cells:
                yield name, budget, cells[name, length, budget]


def published(cells: Cells, bench: Bench, prompt_len: int, budget: float | None) -> list[dict]:
    return cells.get((PUBLISHED, prompt_len, budget or bench.budgets[-1]), [])


def table(cells: Cells, bench: Bench, prompt_len: int) -> list[str]:
    columns = [
        "neutral, less as published",
        "own, less as published",
        "neutral",
        "own",
        "in the loop",
        "true keyword",
        "lost per word, neutral",
        "lost per word, own",
        "perplexity",
        "images, neutral",
        "steps",
        "GFLOP",
    ]
    lines = [f"| seconds | method | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, budget, rows in cases(cells, bench, prompt_len):
        base = published(cells, bench, prompt_len, budget)
        compared = base and name != PUBLISHED
        texts = [
            with_error(rows, "neutral", base) if compared else "-",
            with_error(rows, "own", base) if compared else "-",
            with_error(rows, "neutral"),
            with_error(rows, "own"),
            f"{summary(rows, 'score')[0]:.3f}",
            keyword(rows),
            with_error(rows, "lost_neutral"),
            with_error(rows, "lost"),
            perplexity(rows) if measured_for(rows, "nats") else "-",
            with_error(rows, "images") if measured_for(rows, "images") else "-",
            f"{rows[0]['steps']:,}" if budget else "-",
            work(bench, rows[0]),
        ]
        lines.append(f"| {seconds(bench, rows[0])} | {name} | {' | '.join(texts)} |")
    return lines


def measured_for(rows: Sequence[dict], measure: str) -> bool:
    return all(row[measure] is not None for row in rows)


def seconds(bench: Bench, row: dict) -> str:
    if row["budget"]:
        return f"{row['budget']:g}"
    return f"{bench.calibration('seconds', row['method'], str(row['prompt_len'])):.1f}"


def work(bench: Bench, row: dict) -> str:
    """The work of the text tower for one image alone."""
    measured = bench.calibration().get("work", {}).get(row["method"], {})
    found = measured.get(str(row["prompt_len"]), {})
    budget = f"{row['budget']:g}" if row["budget"] else ""
    return f"{found[budget] / 1e9:,.1f}" if budget in found else "-"


def duels(cells: Cells, bench: Bench) -> list[str]:
    """How often each of our methods beats PEZ as published after each budget."""
    lines = [
        f"| prompt_len | ours | {PUBLISHED} | neutral: difference | images won | searches won | "
        "own: difference | images won | searches won |",
        "|---" * 9 + "|",
    ]
    for prompt_len in bench.lengths:
        for name, budget, rows in cases(cells, bench, prompt_len):
            for other in bench.budgets:
                base = published(cells, bench, prompt_len, other)
                if not name.startswith("ours") or not base or budget not in (None, other):
                    continue
                texts = [
                    text
                    for measure in ("neutral", "own")
                    for text in (with_error(rows, measure, base), *won(rows, base, measure))
                ]
                lines.append(
                    f"| {prompt_len} | {name}, {seconds(bench, rows[0])} s | {other:g} s | "
                    f"{' | '.join(texts)} |"
                )
    return ["", f"## Ours against {PUBLISHED}", "", *lines] if lines[2:] else []


def won(rows: Sequence[dict], base: Sequence[dict], measure: str) -> tuple[str, str]:
    """Shares of images, by the mean over seeds, and of pairs of the same image and seed."""
    ours, theirs = by_place(rows, measure), by_place(base, measure)
    images = [ours[place] > theirs[place] for place in ours]
    other = {(row["place"], row["seed"]): row[measure] for row in base}
    pairs = [row[measure] > other[row["place"], row["seed"]] for row in rows]
    return f"{statistics.mean(images):.0%}", f"{statistics.mean(pairs):.0%}"


def speed(calibration: dict) -> list[str]:
    lines = ["", "## One image alone", "", "| what | prompt_len | against the first | seconds |"]
    lines.append("|---|---|---|---|")
    for prompt_len, times in calibration["speed"].items():
        times = dict(times)
        for name, seconds_of in calibration["seconds"].items():
            if name.startswith("ours"):
                times[name] = seconds_of[prompt_len]
        first = next(iter(times.values()))
        for what, taken in times.items():
            lines.append(f"| {what} | {prompt_len} | {first / taken:.1f}x | {taken:.2f} |")
    return lines


def by_set(cells: Cells, bench: Bench, prompt_len: int) -> list[str]:
    """Each set of images by itself, after the largest budget."""
    sets = list(dict.fromkeys(one.set for one in bench.images))
    lines = [f"| method | {' | '.join(f'{one}: neutral | own | keyword' for one in sets)} |"]
    lines.append("|---" * (3 * len(sets) + 1) + "|")
    for name, budget, rows in cases(cells, bench, prompt_len):
        if budget not in (None, bench.budgets[-1]):
            continue
        texts = []
        for one in sets:
            few = [row for row in rows if row["set"] == one]
            texts += [with_error(few, "neutral"), with_error(few, "own"), keyword(few)]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def learning_rates(calibration: dict) -> list[str]:
    rates = calibration["rates"]
    if not rates:
        return []
    lines = ["", "## Learning rates", "", "Own similarity on other images.", ""]
    grid = next(iter(rates.values()))["grid"]
    lines.append(f"| method | taken | {' | '.join(grid)} |")
    lines.append("|---" * (len(grid) + 2) + "|")
    for name, rate in rates.items():
        values = " | ".join(f"{value:.3f}" for value in rate["grid"].values())
        lines.append(f"| {name} | {rate['lr']:g} | {values} |")
    return lines


def plot(cells: Cells, bench: Bench, path: Path) -> None:
    """Own and neutral similarity against seconds, one line per method."""
    figure = Figure(figsize=(13, 5 * len(bench.lengths)), layout="constrained")
    axes = figure.subplots(len(bench.lengths), 2, squeeze=False)
    for row, prompt_len in zip(axes, bench.lengths, strict=True):
        for axis, measure in zip(row, ("own", "neutral"), strict=True):
            draw(axis, cells, bench, prompt_len, measure)
            axis.set_title(f"{measure} similarity, {prompt_len} tokens", loc="left")
    figure.savefig(path, dpi=110)


def draw(axis, cells: Cells, bench: Bench, prompt_len: int, measure: str) -> None:
    points = defaultdict(list)  # (seconds, mean, standard error) of each method
    for name, _, rows in cases(cells, bench, prompt_len):
        points[name].append((float(seconds(bench, rows[0])), *summary(rows, measure)))
    last = [line[-1][1] for line in points.values()]
    top, end = max(last), bench.budgets[-1]
    low = top - 1.1 * (top - min(last))  # values below all final ones are cut off
    labels = spread(last, (top - low) * 0.04)
    for (name, line), label in zip(points.items(), labels, strict=True):
        strong = name.startswith("ours") or name == PUBLISHED
        colour = "black" if name == PUBLISHED else f"C{list(bench.methods).index(name) % 10}"
        x, y, error = zip(*line, strict=True)
        width = 2.5 if strong else 1.2
        if bench.methods[name].budgeted or strong:
            marker = {
                "marker": "o" if bench.methods[name].budgeted else "*",
                "markersize": width + 3,
            }
            axis.errorbar(x, y, error, color=colour, linewidth=width, elinewidth=0.8, **marker)
        else:
            axis.axhline(y[0], color=colour, linewidth=width, linestyle=":")
        axis.annotate(
            name,
            (x[-1] if strong else end, y[-1]),
            (end * 1.2, label),
            color=colour,
            fontsize=9,
            fontweight="bold" if strong else "normal",
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )
    axis.set_xscale("log")
    axis.set_xticks(bench.budgets, [f"{budget:g} s" for budget in bench.budgets])
    axis.minorticks_off()
    axis.set_xlim(right=end * 1.1)
    axis.set_ylim(bottom=low)
    axis.spines[["top", "right"]].set_visible(False)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Values moved apart to at least `gap`, their order and mean kept."""
    order = sorted(range(len(values)), key=values.__getitem__)
    moved, last = [0.0] * len(values), -math.inf
    for k in order:
        last = moved[k] = max(values[k], last + gap)
    shift = statistics.mean(moved) - statistics.mean(values)
    return [value - shift for value in moved]


def images_file(bench: Bench) -> Path:
    return bench.out.with_name(f"{bench.out.stem}-images.jsonl")


def read(path: Path) -> list[dict]:
    return list(map(json.loads, path.open())) if path.exists() else []


def image_key(row: dict) -> tuple:
    return row["method"], row["prompt_len"], row["seed"], row["place"], row["budget"]


def make_images(bench: Bench, judge: Clip, pipeline: str, pictures: int) -> None:
    """Append the judge's similarity of images made of the prompts of the largest budget."""
    from diffusers import DiffusionPipeline

    from pez_core.diffusion.evaluation import evaluate

    half = bench.clip.device.type == "cuda"
    pipe = DiffusionPipeline.from_pretrained(
        pipeline, dtype=torch.float16 if half else torch.float32
    ).to(bench.clip.device)
    pipe.set_progress_bar_config(disable=True)
    done = {image_key(row) for row in read(images_file(bench))}
    for row in bench.rows():
        if row["budget"] not in (None, bench.budgets[-1]) or image_key(row) in done:
            continue
        # the same noise for each method
        seeds = [row["place"] * pictures + k for k in range(pictures)]
        evaluation = evaluate(
            pipe,
            row["prompt"],
            bench.images[row["place"]].image,
            judge,
            pictures,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        case = {key: row[key] for key in ("method", "prompt_len", "seed", "place", "budget")}
        with images_file(bench).open("a") as file:
            file.write(json.dumps(case | {"images": evaluation.mean}) + "\n")
