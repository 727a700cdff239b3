"""The table and the figure of pictures.py."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from quality_report import PUBLISHED, summary
from unseen import words_of

BALANCED = "ours (balanced), default words"
BOUNDS = ("autoencoder", "another drawing's prompt")
COLUMNS = (
    *("method", "drawings", "seeds", "tokens", "images", "difference", "first half", "second half"),
    *("less balanced", "own", "prompt", "own prompt", "true word", "alike", "GFLOP", "seconds"),
)
EXPLANATION = """\
*Images* is the similarity of the images made of a prompt with their target, by the judge, which is
not searched; *own* is the same by the CLIP of the search; *prompt* is the similarity of the prompt
itself, by the judge, and *own prompt* by the CLIP of the search. Behind ± is one standard error
over the drawings, of the mean over images and seeds. Differences are with PEZ as published, paired
by drawing, on all drawings and on each half: defaults are chosen on the first half (drawings of
even place) and reported on the second. *Less balanced* is the difference with "ours (balanced),
default words", which is `invert` without any option: words of an English dictionary, each once, and
no unsafe ones. So have the rows that begin with a true caption or end with "by image"; others have
all words of the CLIP. *True word* is the share of prompts with a word of the drawing's own name or
keywords. *Alike* is the similarity of the images of one prompt with one
another, by the judge. *GFLOP* is the work of the text tower (`pez_core.tower_work`) and *seconds*
the time of the search for one drawing, with others searched side by side, on the machine that is
named first."""


def report(
    rows: Sequence[dict],
    out: Path,
    names: Mapping[str, str],
    order: Sequence[str],
    words: Sequence[frozenset[str]],
) -> None:
    """Write OUT.md and OUT.png.

    Args:
        rows: of OUT.jsonl.
        out: path without suffix.
        names: of the pipeline, the CLIP of the search and the judge.
        order: of the methods.
        words: that are true of each drawing.
    """
    cells: dict[str, list[dict]] = {name: [] for name in order}
    for row in rows:
        means = {"images": statistics.mean(row["judge"]), "own_images": statistics.mean(row["own"])}
        means["true_word"] = not words[row["place"]].isdisjoint(words_of(row["prompt"]))
        cells[row["method"]].append(row | means)
    cells = {name: found for name, found in cells.items() if found}
    drawings = {row["place"] for row in rows}
    each = max((len(row["judge"]) for row in rows), default=0)
    seeds = {row["seed"] for row in rows}
    machines = machines_of(rows)
    shown = {kind: Path(name).name for kind, name in names.items()}
    lines = [
        "# Images of the prompts of each method",
        "",
        f"{len(drawings)} held-out drawings, {each} images of each prompt, {len(seeds)} "
        f"{'seed' if len(seeds) == 1 else 'seeds at most'}. "
        f"Searched on {shown['search']}, images by {shown['images']}, judged by {shown['judge']}. "
        f"{'; '.join(machines)}.",
        "",
        *EXPLANATION.split("\n"),
        "",
        *table(cells, "".join(machines[:1])),
    ]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(cells, out.with_suffix(".png"))


def machines_of(rows: Sequence[dict]) -> list[str]:
    """The machines that made the rows, that of most rows first."""
    return [name for name, _ in Counter(row["machine"] for row in rows).most_common()]


def table(cells: Mapping[str, Sequence[dict]], timed_on: str) -> list[str]:
    """A line for each method, with the seconds on one machine."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    base = cells.get(PUBLISHED, ())
    for name, rows in cells.items():
        timed = [row["seconds"] for row in rows if row["machine"] == timed_on]
        texts = [
            str(len({row["place"] for row in rows})),
            str(len({row["seed"] for row in rows})),
            f"{statistics.mean(row['tokens'] for row in rows):.1f}",
            with_error(rows, "images"),
            *(difference(half(rows, k), half(base, k)) for k in (None, 0, 1)),
            difference(rows, cells.get(BALANCED, ())),
            with_error(rows, "own_images"),
            *(with_error(given(rows, measure), measure) for measure in ("judge_text", "own_text")),
            share(rows, "true_word") if any(row["prompt"] for row in rows) else "-",
            with_error(given(rows, "alike"), "alike"),
            f"{statistics.mean(row['gflop'] for row in rows):,.1f}",
            f"{statistics.mean(timed):.2f}" if timed else "-",
        ]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def half(rows: Sequence[dict], rest: int | None) -> list[dict]:
    """The rows of every other drawing, or of all."""
    return [row for row in rows if rest is None or row["place"] % 2 == rest]


def difference(rows: Sequence[dict], base: Sequence[dict]) -> str:
    """The difference with another method on the same drawings and seeds; "-" with itself."""
    if [row["method"] for row in rows[:1]] == [row["method"] for row in base[:1]]:
        return "-"
    theirs = {(row["place"], row["seed"]) for row in base}
    ours = {(row["place"], row["seed"]) for row in rows}
    both = theirs & ours
    one, other = (
        [row for row in some if (row["place"], row["seed"]) in both] for some in (rows, base)
    )
    if not both:
        return "-"
    mean, error = summary(one, "images", other)
    return f"{mean:+.3f} ± {error:.3f}"


def given(rows: Sequence[dict], measure: str) -> list[dict]:
    """The rows that have a value of a measure."""
    return [row for row in rows if row[measure] is not None]


def share(rows: Sequence[dict], measure: str) -> str:
    mean, error = summary(rows, measure)
    return f"{mean:.0%} ± {error:.0%}"


def with_error(rows: Sequence[dict], measure: str) -> str:
    if not rows:
        return "-"
    mean, error = summary(rows, measure)
    return f"{mean:.3f} ± {error:.3f}"


def plot(cells: Mapping[str, Sequence[dict]], path: Path) -> None:
    """Similarity of the images of each method, the best on top, between the bounds."""
    found = {name: summary(rows, "images") for name, rows in cells.items()}
    methods = sorted((name for name in found if name not in BOUNDS), key=lambda name: found[name])
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(methods)), layout="constrained")
    axis = figure.subplots()
    for k, name in enumerate(methods):
        mean, error = found[name]
        colour = "C3" if name == PUBLISHED else "C0" if name.startswith("ours") else "0.4"
        axis.errorbar(mean, k, xerr=error, fmt="o", color=colour, capsize=3)
    for name in BOUNDS:
        if name in found:
            axis.axvline(found[name][0], color="0.6", linestyle=":")
            axis.annotate(
                name, (found[name][0], 1), xycoords=("data", "axes fraction"), fontsize=8,
                ha="center", va="bottom", color="0.4",
            )  # fmt: skip
    axis.set_yticks(range(len(methods)), methods)
    axis.set_xlabel("similarity of the images with their target, by the judge")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
