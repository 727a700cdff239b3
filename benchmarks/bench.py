"""The parts that the benchmarks of prompts share: images, methods, searches and their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from unseen import Unseen

from pez_core import Clip, PezSettings, Progress, TokenSpace
from pez_core.caption import Caption
from pez_core.objectives import Similarity

HERE = Path(__file__).parent
ENDLESS = 10**9  # steps


@dataclass(frozen=True)
class Found:
    """A prompt and its score in the search."""

    token_ids: list[int]
    prompt: str
    score: float


# Called by a method after each step with the steps done and a function that returns the best
# prompts so far. A true return value ends the search.
Note = Callable[[int, Callable[[], list[Found]]], bool | None]


@dataclass(frozen=True)
class Problems:
    """Images whose prompts are searched side by side.

    Attributes:
        features: (n, features) of the images.
        caption: fixed text around the learned words, where NAME stands for the image's name.
        seeds: of the initial prompt of each image.
        steps: of methods that do not end by themselves.
        lr: learning rate of methods with a tuned one.
    """

    clip: Clip
    images: list[Unseen]
    features: torch.Tensor
    caption: str
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
        """Prompts of a method with the signature of `pez_core.search`."""
        captions = [
            Caption(self.clip, self.caption.replace("NAME", one.name)) for one in self.images
        ]
        fixed = [(tuple(one.before), tuple(one.after)) for one in captions]

        def read(progress: Progress) -> list[Found]:
            rows = zip(captions, progress.ids.tolist(), progress.scores.tolist(), strict=True)
            return [Found(one.ids(ids), one.print(ids), score) for one, ids, score in rows]

        space = TokenSpace(self.clip.text.token_embedding, words)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        ids = torch.cat([space.random(1, self.prompt_len, one) for one in generators])
        # one caption for all images is faster
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
    """A method that finds prompts.

    Attributes:
        run: finds the prompts; the set-up of the search is part of it.
        anytime: its prompts after n steps do not depend on the planned steps, so that one run
            serves every budget.
        budgeted: False: it ends by itself, whatever time that takes.
        tuned: `--tune` chooses its learning rate.
        seeded: False: it draws nothing, so that one seed is enough.
        prompt_len: its only prompt length; None: every length.
        caption: as in `Problems`.
        at_once: images of one call; None: any number.
    """

    run: Callable[[Problems, Note], list[Found]]
    anytime: bool = True
    budgeted: bool = True
    tuned: bool = False
    seeded: bool = True
    prompt_len: int | None = None
    caption: str = "{}"
    at_once: int | None = None


@dataclass(frozen=True)
class Bench:
    """The common parts of all stages: images, CLIP, methods and files."""

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
        return Problems(self.clip, images, features, method.caption, seeds, prompt_len, steps, lr)

    def calibration(self, *keys: str) -> Any:
        """The calibration, or its entry of these keys."""
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
        """The prompts found so far."""
        return list(map(json.loads, self.found.open())) if self.found.exists() else []


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
    """The prompts after the steps of each budget, or at the end of a shorter run."""
    noted = {}

    def note(step: int, read: Callable) -> bool:
        if step in plan.values():
            noted[step] = read()
        return step >= max(plan.values())

    last = method.run(problems, note)
    return {budget: noted.get(steps, last) for budget, steps in plan.items()}


def append(path: Path, rows: list[dict]) -> None:
    """Append lines to a file in one write, so that a killed run leaves no half of them."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())
