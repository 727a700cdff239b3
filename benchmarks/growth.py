"""How the cost of a search grows: a panel and a table for each quantity, from one run.

    python benchmarks/growth.py [--model emoji-clip] [--rounds 3] [--images 100 1000 10000] [--ray]
    python benchmarks/growth.py --only images --out FILE       # a part, with a table of its own

The time of a step by prompt_len, by batch (prompts that are searched side by side) and by the size
of the vocabulary; the time of a whole search by restarts; and the time and the memory of a job of
`pez_core.batch` by the number of its images, each number in a process of its own with one thread.
The model is emoji-clip, or one of open_clip with random weights; jobs take emoji-clip. Their images
are noise, and their searches are as short as can be, so that what does not belong to a search
shows. Needs the extra `batch`.

With `--ray`, which needs that extra, one process of two threads is compared with Ray and two
workers of one thread, on the same images with the effort `fast`. The first tenth of the images, in
which the workers start, is left out.

Writes OUT.md and OUT.png. Run it on an idle machine; otherwise say so with `--note`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from limit import clip_of
from PIL import Image
from step_time import machine, median_times, targets_for, time_ours

from pez_core import Clip, SearchOptions, invert

LENGTHS = (4, 8, 16, 32, 75)
BATCHES = (1, 4, 16, 64, 256)
VOCABULARIES = (1_000, 4_000, 16_000, 49_408)
RESTARTS = (1, 2, 4, 8, 16)
PROMPT_LEN, STEPS = 16, 20
SEARCHES = {
    "short": SearchOptions(prompt_len=4, steps=2, swaps=0),
    "fast": SearchOptions(effort="fast"),
}
# of jobs, so that the first images are a small part; those with Ray have many chunks, too
SIZES = {"short": {"batch_size": 8}, "fast": {"batch_size": 8, "chunk": 16}}


def steps(clip: Clip) -> dict[str, dict[int, Callable[[], float]]]:
    """Functions that time a step, by quantity and its value."""
    size = len(clip.text.token_embedding)
    usual = clip.vocabulary

    def of(batch: int, length: int, allowed: torch.Tensor) -> Callable[[], float]:
        return lambda: time_ours(clip, batch, length, STEPS, allowed)

    longest = clip.text.max_prompt_len
    return {
        "prompt_len": {n: of(1, n, usual) for n in LENGTHS if n <= longest},
        "batch": {n: of(n, PROMPT_LEN, usual) for n in BATCHES},
        "vocabulary": {n: of(1, PROMPT_LEN, torch.arange(n)) for n in VOCABULARIES if n <= size},
    }


def searches(clip: Clip) -> dict[int, Callable[[], float]]:
    """Functions that time a search, by its restarts."""
    target = torch.nn.functional.normalize(targets_for(clip, 1)[0], dim=-1)

    def of(restarts: int) -> Callable[[], float]:
        options = SearchOptions(effort="fast", restarts=restarts)

        def run() -> float:
            began = time.perf_counter()
            invert(clip, target, options)
            return time.perf_counter() - began

        return run

    return {n: of(n) for n in RESTARTS}


def noise(folder: Path, count: int) -> Path:
    """A folder of small images."""
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for k in range(count):
        image = Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(folder / f"{k:06d}.png")
    return folder


def job(images: Path, out: Path, count: int, search: str, workers: int) -> dict[str, float]:
    """Milliseconds of an image behind the first tenth, and megabytes of this process."""
    from pez_core.batch import Cluster, Job, run

    reports: list[dict] = []
    cluster = Cluster(workers=workers) if workers else None
    options = Job(options=SEARCHES[search])
    run(images, out, options, reports.append, cluster=cluster, limit=count, **SIZES[search])
    first, last = next(one for one in reports if one["done"] >= count / 10), reports[-1]
    if first["done"] == last["done"]:  # all were searched side by side
        first = {"done": 0, "elapsed": 0.0}
    each = (last["elapsed"] - first["elapsed"]) / (last["done"] - first["done"])
    # the number of the operating system that Python has contains the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return {"ms": 1e3 * each, "megabytes": peak / 1024}


def in_process(threads: int, *arguments: object) -> dict[str, float]:
    """`job` in a process of its own."""
    command = [sys.executable, __file__, "--job", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    print(*arguments[2:], found, file=sys.stderr)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    """Milliseconds by quantity and its value, and megabytes of jobs."""
    clip, wanted = clip_of(arguments.model), arguments.only
    found: dict[str, dict] = {}
    for what, runs in {**steps(clip), "restarts": searches(clip)}.items():
        if what in wanted:
            found[what] = median_times(runs, arguments.rounds)
            print(what, found[what], file=sys.stderr)
    counts = arguments.images if "images" in wanted else []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images = noise(work / "images", max([*counts, arguments.ray or 0]))
        jobs = {n: in_process(1, images, work / str(n), n, "short", 0) for n in counts}
        if arguments.ray:
            count = arguments.ray
            found["ray"] = {
                "one process, two threads": in_process(2, images, work / "a", count, "fast", 0),
                "Ray, two workers of one thread": in_process(
                    1, images, work / "b", count, "fast", 2
                ),
            }
    if jobs:
        found["images"] = {n: one["ms"] for n, one in jobs.items()}
        found["memory"] = {n: one["megabytes"] for n, one in jobs.items()}
    return found


UNITS = {
    "prompt_len": "ms per step",
    "batch": "ms per step",
    "vocabulary": "ms per step",
    "restarts": "ms per search",
    "images": "ms per image of a job",
    "memory": "MB of a job",
}
QUANTITIES = [what for what in UNITS if what != "memory"]  # which comes with the images
# the value of which each costs the same when the cost is proportional
SHARED = ("batch", "restarts")


def measured(found: dict[str, dict]) -> dict[str, str]:
    """The unit of each quantity that was measured."""
    return {what: unit for what, unit in UNITS.items() if what in found}


def rows(found: dict[str, dict[int, float]]) -> Iterator[str]:
    for what, unit in measured(found).items():
        (first, least), *_ = found[what].items()
        for value, cost in found[what].items():
            each = f"{cost / value:,.2f}" if what in SHARED else ""
            name = "images" if what == "memory" else what
            yield (
                f"| {name} | {value:,} | {unit} | {cost:,.1f} | {value / first:.1f} | "
                f"{cost / least:.2f} | {each} |"
            )


def report(found: dict, arguments: argparse.Namespace) -> str:
    lines = [
        "# How the cost grows",
        "",
        f"{arguments.model}, prompt_len {PROMPT_LEN}, batch 1 and the default vocabulary where "
        f"nothing else is said, {STEPS} steps with their set-up, medians of {arguments.rounds} "
        "runs. Searches with restarts are of the effort `fast` and have 8 tokens. Jobs have "
        "emoji-clip, one thread and two steps for 4 tokens; their start is left out. "
        f"{machine()}. See benchmarks/growth.py.",
        *([arguments.note] if arguments.note else []),
        "",
        f"![How the cost of a search grows]({arguments.out.name}.png)",
        "",
        "| quantity | value | unit | cost | value / first | cost / first | cost of each |",
        "|---" * 7 + "|",
        *rows(found),
    ]
    if "ray" in found:
        (plain, alone), (spread, many) = found["ray"].items()
        ratio = many["ms"] / alone["ms"]
        change = "more" if ratio > 1 else "less"
        lines += [
            "",
            f"## Ray ({arguments.ray:,} images, effort `fast`)",
            "",
            f"After the start, an image takes {abs(1 - ratio):.1%} {change} time with {spread} "
            f"than with {plain}.",
            "",
            "| way | ms per image after the start |",
            "|---|---|",
            *(f"| {way} | {one['ms']:.1f} |" for way, one in found["ray"].items()),
        ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axes in panels.flat[len(measured(found)) :]:
        axes.remove()
    for (what, unit), axes in zip(measured(found).items(), panels.flat, strict=False):
        values, costs = zip(*found[what].items(), strict=True)
        axes.plot(values, costs, "o-")
        axes.set(xscale="log", xlabel="images" if what == "memory" else what, ylabel=unit)
        axes.set_xticks(values, [f"{n:,}" for n in values], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if what in SHARED:
            alone = [costs[0] * n / values[0] for n in values]
            axes.plot(values, alone, ":", color="grey", label="one after the other")
            axes.set_yscale("log")
            axes.legend(fontsize=7)
        else:
            axes.set_ylim(0, 1.1 * max(costs))
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="emoji-clip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", nargs="+", type=int, default=[100, 1_000, 10_000])
    parser.add_argument("--only", nargs="*", choices=QUANTITIES, default=QUANTITIES)
    parser.add_argument(
        "--ray", nargs="?", type=int, const=640, metavar="IMAGES", help="compare with Ray"
    )
    parser.add_argument("--note", help="what else there is to know of the machine")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/growth")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args(argv)
    if arguments.job:
        images, out, count, search, workers = arguments.job
        print(json.dumps(job(Path(images), Path(out), int(count), search, int(workers))))
        return
    found = measure(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(report(found, arguments), encoding="utf-8")
    draw(found, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
