"""The prompts of each method after the same work of the text tower, on a small and a large tower.

    python tools/train_large_tower.py              # the large one, of ViT-B/32's shape: an hour
    python benchmarks/equal_work.py [--clips NAME_OR_FOLDER ...] [--images N] [--out OUT]

Seconds depend on the machine and on how well a tower fills it; the operations of the text tower do
not (`pez_core.tower_work`). The unit is the work of PEZ as published, 1,000 steps for one prompt.
Methods that go on as long as they may are read at each of `SHARES` of it; the efforts end by
themselves. Own similarity and that of the held-out judge are those of prompt and drawing. Images by
`emoji-diffusion`, which knows the small tower only, are made of what the methods have at a tenth of
the work and at the end, and compared with the drawing by the judge. Differences from PEZ as
published at its end are paired by drawing.

The drawings were never trained on and are those of pictures.py, or those of --folder. Rows are
appended to OUT.jsonl, and the same command resumes; OUT.md covers all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import ENDLESS, HERE, Bench, Found, append
from drafts import METHODS as DRAFTED
from pictures import subjects
from quality import METHODS as FINDERS
from remedies import mean_and_error
from step_time import machine
from unseen import ROOT

from pez_core import Clip, load_clip
from pez_core.diffusion import load_pipeline
from pez_core.diffusion.image_models import default_settings, draw
from pez_core.tower_work import counted

UNIT_STEPS = 1000  # of PEZ as published
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DRAWN = (0.1, 1.0)
PUBLISHED = "PEZ as published"
NAMES = [PUBLISHED, "PEZ", "AutoPrompt SGD", "GCG", "ours"]
NAMES += ["ours (fast)", "ours (balanced)", "ours (best)", *DRAFTED]
METHODS = FINDERS | DRAFTED
RATE = 1.0  # of AutoPrompt SGD, tuned by quality.py


@dataclass(frozen=True)
class Setup:
    """What all methods share.

    Attributes:
        bench: drawings, CLIP and file.
        unit: work of PEZ as published for one prompt, in FLOP.
        judge, pipeline: that compare and make images.
        pictures: images of each prompt.
    """

    bench: Bench
    unit: float
    judge: Clip
    pipeline: Any
    pictures: int


def unit_of(bench: Bench) -> float:
    """The work of 1,000 steps of PEZ as published, from that of 3 and 13."""
    method = METHODS[PUBLISHED]
    work = []
    for steps in (3, 13):
        problems = bench.problems(method, [0], bench.lengths[0], 0, steps, None)
        with counted() as counter:
            method.run(problems, lambda *_: None)
        work.append(counter.flops)
    return (work[1] - work[0]) / 10 * UNIT_STEPS


def read_at_shares(
    setup: Setup, name: str, places: Sequence[int], seed: int
) -> dict[float | None, tuple[float, float, list[Found]]]:
    """Share -> work and seconds for one prompt, and the prompts; None: the end of an effort."""
    bench, method, found = setup.bench, METHODS[name], {}
    lr = RATE if method.tuned else None
    problems = bench.problems(method, places, bench.lengths[0], seed, ENDLESS, lr)
    left = list(SHARES) if method.budgeted else []
    began = time.process_time()

    def spent() -> tuple[float, float]:
        return counter.flops / len(places), (time.process_time() - began) / len(places)

    def note(step: int, read: Callable[[], list[Found]]) -> bool:
        while left and spent()[0] >= left[0] * setup.unit:
            found[left.pop(0)] = (*spent(), read())
        return method.budgeted and not left

    with counted() as counter:
        last = method.run(problems, note)
    for share in left or ([] if method.budgeted else [None]):
        found[share] = (*spent(), last)
    return found


@torch.no_grad()
def rows_of(setup: Setup, name: str, places: Sequence[int], seed: int) -> list[dict]:
    """One row for each share and drawing."""
    bench, rows = setup.bench, []
    for share, (work, seconds, found) in read_at_shares(setup, name, places, seed).items():
        for place, one in zip(places, found, strict=True):
            target = bench.images[place]
            row = {"clip": bench.clip.name, "method": name, "share": share, "seed": seed}
            row |= {"place": place, "name": target.name, "prompt": one.prompt}
            row |= {"work": work / setup.unit, "seconds": round(seconds, 2)}
            own = bench.clip.encode_texts([one.prompt])[0] @ bench.features[place]
            (goal,) = setup.judge.encode_images([target.image])
            row["own"] = round(own.item(), 5)
            row["judge"] = round((setup.judge.encode_texts([one.prompt])[0] @ goal).item(), 5)
            if share is None or share in DRAWN:
                seeds = [place * setup.pictures + k for k in range(setup.pictures)]
                images = draw(setup.pipeline, one.prompt, seeds, default_settings(setup.pipeline))
                row["images"] = round((setup.judge.encode_images(images) @ goal).mean().item(), 5)
            rows.append(row)
    return rows


def measure(setup: Setup, names: Sequence[str]) -> None:
    """Append the rows that the file does not have yet."""
    bench = setup.bench
    done = {(row["clip"], row["method"], row["seed"], row["place"]) for row in bench.rows()}
    for seed in bench.seeds:
        for name in names:
            places = [
                place
                for place in range(len(bench.images))
                if (bench.clip.name, name, seed, place) not in done
            ]
            for start in range(0, len(places), bench.at_once):
                part = places[start : start + bench.at_once]
                append(bench.found, rows_of(setup, name, part, seed))
                print(f"{bench.clip.name}, {name}: {start + len(part)}", file=sys.stderr)


def by_place(rows: Sequence[dict], key: str) -> dict[int, float]:
    """The mean over the seeds of each drawing."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if key in row:
            found.setdefault(row["place"], []).append(row[key])
    return {place: sum(values) / len(values) for place, values in sorted(found.items())}


def cells(rows: Sequence[dict], base: Sequence[dict]) -> list[str]:
    """Own similarity, the judge's and that of the images, with the differences from `base`."""
    found = []
    for key in ("own", "judge", "images"):
        mine, theirs = by_place(rows, key), by_place(base, key)
        both = sorted(mine.keys() & theirs.keys())
        if not both:
            found += ["", ""]
            continue
        mean = sum(mine.values()) / len(mine)
        difference = torch.tensor([mine[place] - theirs[place] for place in both])
        found += [f"{mean:.3f}", mean_and_error(difference) if rows is not base else ""]
    return found


def report(bench: Bench, units: dict[str, float]) -> None:
    rows = bench.rows()
    seeds = len({row["seed"] for row in rows})
    lines = [
        "# The same work of the text tower",
        "",
        f"prompt_len {bench.lengths[0]}, {len(bench.images)} drawings never trained on, {seeds} "
        "seed(s). Work is that of one prompt, as a share of 1,000 steps of PEZ as published. "
        "Behind own similarity, the judge's and that of the images stand the differences from PEZ "
        "as published at its end, paired by drawing, ± one standard error. Seconds are processor "
        f"time. {machine()}. See benchmarks/equal_work.py.",
    ]
    for clip in dict.fromkeys(row["clip"] for row in rows):
        unit = f": PEZ as published is {units[clip] / 1e12:.2f} TFLOP" if clip in units else ""
        lines += ["", f"## {clip}{unit}", ""]
        lines += ["| work | method | own | | judge | | images | | s |", "|---" * 9 + "|"]
        of_clip = [row for row in rows if row["clip"] == clip]
        base = [row for row in of_clip if (row["method"], row["share"]) == (PUBLISHED, 1.0)]
        groups: dict[tuple, list[dict]] = {}
        for row in of_clip:
            groups.setdefault((row["method"], row["share"]), []).append(row)
        table = []
        for (method, share), group in groups.items():
            work = sum(row["work"] for row in group) / len(group)
            seconds = sum(row["seconds"] for row in group) / len(group)
            own = cells(base if group == base else group, base)
            shown = f"{work:.3f}" if share is None else f"{share:g}"
            line = f"| {shown} | {method} | {' | '.join(own)} | {seconds:.1f} |"
            table.append((share or work, NAMES.index(method), line))
        lines += [line for *_, line in sorted(table)]
    bench.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", nargs="+", default=["emoji-clip", "build/emoji-clip-large"])
    parser.add_argument("--judge", default=str(HERE / "models/emoji-clip-judge"))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/emoji")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--pictures", type=int, default=2, help="made of each prompt")
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--at-once", type=int, default=8, help="drawings searched side by side")
    parser.add_argument("--out", type=Path, default=HERE / "results/equal_work")
    a = parser.parse_args(argv)
    judge, pipeline = load_clip(a.judge), load_pipeline("emoji-diffusion", "cpu")
    pipeline.set_progress_bar_config(disable=True)
    images, units = subjects(a.folder, a.images), {}
    for name in a.clips:
        clip = load_clip(name)
        bench = Bench(
            clip=clip,
            images=images,
            methods={},
            lengths=[a.prompt_len],
            seeds=range(a.seeds),
            budgets=[],
            at_once=a.at_once,
            out=a.out,
        )
        units[clip.name] = unit_of(bench)
        measure(Setup(bench, units[clip.name], judge, pipeline, a.pictures), a.methods)
    report(bench, units)


if __name__ == "__main__":
    main()
