"""The time of a step on this processor against the least that the processor allows.

    python benchmarks/limit.py [--models ...] [--batch ...] [--prompt-len 16] [--dtypes ...]

The least time of a step is the longer of two, by rates that are measured first. One is that of its
memory traffic: the weights of the text tower forward and backward and the allowed vocabulary once,
at the rate of a copy. The other is that of its products of matrices, those with the vocabulary
included, at the rate of large ones. Reading alone may be faster than a copy, and a tower whose
weights stay in the cache is read faster than memory.

Models other than emoji-clip have random weights, on which speed does not depend. Steps that were
profiled are not those that were timed. Writes OUT.md. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from gpu import Limits, ours, random_clip
from step_time import machine, targets_for
from torch.profiler import ProfilerActivity, profile

from pez_core import Clip, PezSettings, TokenSpace, load_clip, search
from pez_core.objectives import Similarity
from pez_core.tower_work import counted

CPU = torch.device("cpu")
MODELS = ("emoji-clip", "ViT-B-32", "ViT-L-14")
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
DTYPES = ["float32", "bfloat16"]
PROFILED, SHOWN = 10, 3  # steps, and operations


def clip_of(name: str) -> Clip:
    if name == "emoji-clip":
        return load_clip(name, device="cpu")
    return random_clip(name, torch.float32, "cpu")


def least(limits: Limits, clip: Clip, *case: int, dtype: torch.dtype) -> dict[str, float]:
    """The least milliseconds of a step by each limit, with the tower in a dtype."""
    screens = TokenSpace(clip.text.token_embedding, clip.vocabulary)._screen is not None
    compared = torch.bfloat16 if screens else torch.float32
    return limits.milliseconds(clip, *case, dtype=dtype, compared=compared)


def steps(clip: Clip, batch: int, prompt_len: int) -> tuple[float, list[tuple[str, float]]]:
    """The operations of the text tower in a step, and the largest parts of its time."""
    space = TokenSpace(clip.text.token_embedding, clip.vocabulary)
    ids = space.random(batch, prompt_len, torch.Generator().manual_seed(0))
    objective = Similarity(clip.text.encoder(), targets_for(clip, batch))
    settings = PezSettings(steps=PROFILED, capture=False)
    search(space, objective, ids, settings)  # warms up
    with (
        counted() as work,
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler,
    ):
        search(space, objective, ids, settings)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    largest = sorted(times, key=lambda name: -times[name])[:SHOWN]
    total = sum(times.values())
    return work.flops / PROFILED, [(name, times[name] / total) for name in largest]


def measure(arguments: argparse.Namespace, limits: Limits) -> Iterator[dict]:
    """A row for each model, batch and dtype."""
    kinds = {name: dtype for name, dtype in KINDS.items() if dtype in limits.operations}
    for name in arguments.models:
        clip = clip_of(name)
        for batch, wanted in product(arguments.batch, arguments.dtypes):
            if wanted not in kinds:
                continue
            case = batch, arguments.prompt_len
            by_kind = {kind: least(limits, clip, *case, dtype=d) for kind, d in kinds.items()}
            clip.text.matrix_dtype = kinds[wanted]
            flops, largest = steps(clip, *case)
            yield {
                "model": name,
                "batch": batch,
                "dtype": wanted,
                "ms": ours(clip, *case, arguments.steps, captured=False)["ms"],
                "parts": by_kind[wanted],
                "limits": {kind: max(parts.values()) for kind, parts in by_kind.items()},
                "flops": flops,
                "largest": largest,
            }


def report(rows: Sequence[dict], limits: Limits, arguments: argparse.Namespace) -> str:
    rates = []
    for name, dtype in KINDS.items():
        rate = limits.operations.get(dtype)
        rates.append(f"| product of matrices, {name} | {_cell(rate and rate / 1e9)} GFLOP/s |")
    lines = [
        "# A step against the limit of the processor",
        "",
        f"prompt_len {arguments.prompt_len}, default vocabulary, "
        f"median of three runs of {arguments.steps} steps. {machine().removesuffix(', fp32')}. "
        "See benchmarks/limit.py.",
        "",
        "| rate of this processor | |",
        "|---|---|",
        f"| copy, read and written | {limits.bytes_per_second / 1e9:.1f} GB/s |",
        *rates,
        "",
        "| CLIP | batch | matrices in | step / limit | limited by | ms/step | memory ms | "
        "arithmetic ms | "
        + " | ".join(f"limit in {name} ms" for name in KINDS)
        + " | tower GFLOP/step | largest operations |",
        "|---" * (10 + len(KINDS)) + "|",
    ]
    for row in rows:
        binds = max(row["parts"], key=row["parts"].__getitem__)
        largest = ", ".join(f"`{name}` {share:.0%}" for name, share in row["largest"])
        cells = [
            row["model"],
            str(row["batch"]),
            row["dtype"],
            f"{row['ms'] / row['parts'][binds]:.1f}x",
            binds,
            _cell(row["ms"]),
            *map(_cell, row["parts"].values()),
            *(_cell(row["limits"].get(name)) for name in KINDS),
            f"{row['flops'] / 1e9:.2f}",
            largest,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--copy-bytes", type=int, default=2**28, help="size of the copy")
    parser.add_argument("--matrix", type=int, default=2048, help="rows of the large matrices")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/limit")
    arguments = parser.parse_args(argv)
    limits = Limits(CPU, KINDS.values(), arguments.copy_bytes, arguments.matrix)
    rows = []
    for row in measure(arguments, limits):
        rows.append(row)
        print(row, file=sys.stderr)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(report(rows, limits, arguments), encoding="utf-8")


if __name__ == "__main__":
    main()
