"""The fluency loss of the paper by gradient, against a language model that compares swaps.

    python benchmarks/fluency.py [--images N] [--seconds S] [--out benchmarks/results/fluency.md]

One prompt for each of N drawings that the CLIPs were not trained on, by the bundled language model:
Algorithm 1 without and with the fluency loss (`pez_core.fluency.FluencyLoss`), swaps compared by
`readability`, both, and prompts written from left to right. Own similarity, that of the held-out
judge, and perplexity by token. Each method has the same seconds of processor time, so that other
work on the machine does not count; on the bundled CLIP a step of the language model costs more than
one of the CLIP. The last two rows have the same number of steps instead, which is about the same
time on a large CLIP. Needs the drawings (tools/emoji_data.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench import ENDLESS
from remedies import JUDGE, mean_and_error
from step_time import machine
from unseen import Unseen, from_folder, unseen

from pez_core import Clip, SearchOptions, invert, load_clip
from pez_core.fluency import FluencyLoss
from pez_core.token_lm import END, KINDS, load_token_lm

SEEDS = (0, 1)
READABILITY = 0.5
MORE = 0.7  # which alone reaches the perplexity of both
WEIGHT = 1 / 21  # to the rest as READABILITY to the similarity
PROJECTIONS = (0.1, 0.3, 0.6)
SHOWN = 6


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


def methods(clip: Clip, count: int) -> dict[str, tuple[Callable[[], dict[str, Any]], bool]]:
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
    found["Algorithm 1, swaps by readability, 150 + 32 steps"] = (lambda: readable, False)
    found["Algorithm 1 with fluency loss, swaps by readability, 150 + 32 steps"] = (
        lambda: readable | {"extra_loss": loss(middle, only)},
        False,
    )
    return found


@torch.no_grad()
def nats(clip: Clip, prompt: str) -> float:
    """Mean negative log-likelihood of the tokens and the end of a prompt."""
    model, ids = load_token_lm(), torch.tensor([[*clip.text.words.encode(prompt), END]])
    query, state = model.start(torch.tensor([KINDS.index("text")]))
    behind, _ = model.extend(ids[:, :-1], state)
    return -model.likelihoods(torch.cat([query, behind], dim=1), ids).mean().item()


def measure(
    clip: Clip, judge: Clip, drawings: list[Unseen], prompt_len: int, seconds: float
) -> list[str]:
    """Lines of the report."""
    images = [one.image for one in drawings]
    neutral = judge.encode_images(images)
    lines, shown = [], {}
    for name, (options_of, timed) in methods(clip, len(images)).items():
        prompts, own, began = [], [], time.process_time()
        for seed in SEEDS:
            limit = {"time_limit": seconds * len(images)} if timed else {}
            options = SearchOptions(prompt_len=prompt_len, seed=seed, **limit, **options_of())
            with patch("time.monotonic", time.process_time):
                results = invert(clip, images, options)
            prompts += [result.prompt for result in results]
            own += [result.similarity for result in results]
        taken = (time.process_time() - began) / len(prompts)
        theirs = (judge.encode_texts(prompts) * neutral.repeat(len(SEEDS), 1)).sum(1)
        likely = torch.tensor([nats(clip, prompt) for prompt in prompts])
        # seeds of one drawing are not independent
        cells = [
            mean_and_error(values.view(len(SEEDS), -1).mean(0))
            for values in (torch.tensor(own), theirs, likely)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {likely.mean().exp():,.0f} | {taken:.1f} |")
        shown[name] = prompts[: len(images)]
        print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", "| drawing | method | prompt |", "|---|---|---|"]
    for place in range(0, len(images), -(-len(images) // SHOWN)):
        for name, prompts in shown.items():
            cell = prompts[place].replace("|", "\\|")
            lines.append(f"| {drawings[place].name} | {name} | {cell} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="other images, see unseen.from_folder")
    parser.add_argument("--prompt-len", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each drawing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    clip, judge = load_clip("emoji-clip", device="cpu"), load_clip(str(JUDGE), device="cpu")
    drawings = from_folder(arguments.folder) if arguments.folder else unseen(arguments.images)
    lines = measure(clip, judge, drawings, arguments.prompt_len, arguments.seconds)
    text = "\n".join(
        [
            "# The fluency loss",
            "",
            f"`emoji-clip`, prompt_len {arguments.prompt_len}, {len(drawings)} drawings never "
            f"trained on, {len(SEEDS)} seeds; {arguments.seconds:g} s of processor time for each "
            "drawing, but for the last two methods. The readability is "
            f"{READABILITY}, the weight of the fluency loss {WEIGHT:.3f}, which count as much; "
            f"its projection {PROJECTIONS[1]} where none is named. ± is one standard error over "
            f"drawings. {machine()}.",
            "",
            "| method | own similarity | judge | nats per token | perplexity | s per drawing |",
            "|---|---|---|---|---|---|",
            *lines,
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
