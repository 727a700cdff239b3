"""The time of a step against the limit of the hardware: ours, ours uncaptured, the authors'.

    python benchmarks/gpu.py [--reference PATH] [--models ...] [--prompt-len ...] [--batch ...]

Models have random weights, on which speed does not depend. The image tower is off the device, as
after images are encoded. PATH is a checkout of the authors' repository, whose loop runs unchanged
in fp32 over all 49,408 tokens (see step_time.py). All of them run one after the other in one
process. Milliseconds per step are the difference between STEPS steps and a few, the median of
three; set-up and capture are listed separately. Prompts per minute are for the paper's 3,000 steps.

The limit of a step is the longer of two times that are measured as well: the memory traffic at the
bandwidth of a copy (the weights of the text tower forward and backward, the allowed vocabulary
once), or the matrix products at the speed of a large one.

Writes OUT.md, OUT.json and OUT.png.

    python benchmarks/gpu.py --precision 51

finds prompts for so many drawings of build/emoji with the bundled CLIP in each precision, with the
same seeds, scores all printed prompts by the CLIP in float32, and writes OUT-precision.md.

    python benchmarks/gpu.py --memory

counts, without a card, the bytes of all tensors that a search holds at once, for the same models,
tokens and batches, and writes OUT-memory.md.

    python benchmarks/gpu.py --searches 200

runs so many whole searches of the effort `fast` with the bundled CLIP in one process, each for
other features, and writes the memory in use after each tenth of them to OUT-searches.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, product
from pathlib import Path
from unittest.mock import patch

import open_clip
import torch
from step_time import Reference, machine, targets_for
from torch.profiler import ProfilerActivity, profile
from unseen import unseen

from pez_core import (
    Clip,
    PezSettings,
    SearchOptions,
    TokenSpace,
    capture,
    invert,
    load_clip,
    search,
)
from pez_core.clip.device import keep_image_tower_in_main_memory
from pez_core.doctor import Rates
from pez_core.objectives import Similarity

HERE = Path(__file__).parent
MODELS = ("ViT-L-14", "ViT-H-14", "ViT-bigG-14")
PAPER_STEPS = 3000
ROUNDS = 3
# Steps that warm up, capture the graph, and replay it once.
FEW = 6
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random_clip(name: str, dtype: torch.dtype, device: str) -> Clip:
    """A CLIP of random weights whose text tower alone is on the device."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval().requires_grad_(False)
    clip = Clip(model.to(dtype), open_clip.get_tokenizer(name), name)
    return keep_image_tower_in_main_memory(clip, torch.device(device))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def per_step(run: Callable[[int], object], steps: int, device: torch.device) -> dict:
    """Milliseconds of a further step, and of everything else."""
    run(FEW)
    pairs = []
    for _ in range(ROUNDS):
        few, many = (seconds(lambda n=n: run(n), device) for n in (FEW, FEW + steps))
        pairs.append((1e3 * (many - few) / steps, 1e3 * few))
    step = statistics.median(one for one, _ in pairs)
    return {"ms": step, "set_up": statistics.median(few for _, few in pairs) - FEW * step}


def ours(clip: Clip, batch: int, prompt_len: int, steps: int, captured: bool) -> dict:
    """Milliseconds, the peak memory in GB, and whether steps were captured."""
    device = clip.device
    targets = targets_for(clip, batch).to(device)

    def run(steps: int) -> None:
        space = TokenSpace(clip.text.token_embedding, clip.vocabulary)
        ids = space.random(batch, prompt_len, torch.Generator().manual_seed(0))
        objective = Similarity(clip.text.encoder(), targets)
        search(space, objective, ids, PezSettings(steps=steps, capture=captured))

    gc.collect()
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    row = per_step(run, steps, device)
    row["gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9 if on_card else None
    row["reserved"] = torch.cuda.max_memory_reserved(device) / 1e9 if on_card else None
    row["captured"] = captured and capture.recorder_for(device) is not None
    return row


class Limits:
    """The measured limits of the device.

    Args:
        device: that is measured.
        dtypes: of the products; those that it cannot multiply are left out.
        size: bytes that are copied.
        rows: of the matrices; None: those of a fourth of `size` in float16.

    Attributes:
        bytes_per_second: read and written by a copy.
        operations: per second in a product of large matrices, by dtype.
    """

    def __init__(
        self,
        device: torch.device,
        dtypes: Iterable[torch.dtype],
        size: int,
        rows: int | None = None,
    ) -> None:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        goal = torch.empty_like(source)
        goal.copy_(source)
        taken = min(seconds(lambda: goal.copy_(source), device) for _ in range(5))
        self.bytes_per_second = 2 * size / taken
        self.operations = {}
        n = rows or max(256, round((size / 8) ** 0.5) // 128 * 128)
        for kind in set(dtypes):
            a = torch.randn(n, n, device=device).to(kind)
            multiply = torch._int_mm if kind is torch.int8 else torch.mm
            try:
                multiply(a, a)
            except (RuntimeError, NotImplementedError):
                continue
            taken = min(seconds(lambda f=multiply, a=a: f(a, a), device) for _ in range(3))
            self.operations[kind] = 2 * n**3 / taken

    def milliseconds(
        self,
        clip: Clip,
        batch: int,
        prompt_len: int,
        dtype: torch.dtype | None = None,
        compared: torch.dtype = torch.float32,
    ) -> dict[str, float]:
        """The least time of a step by each limit, as `pez_core.doctor.Rates.least`."""
        rates = Rates(self.bytes_per_second, self.operations)
        seconds = rates.least(clip, batch, prompt_len, dtype, compared)
        return {limit: 1e3 * one for limit, one in seconds.items()}


def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    """A row for each case, complete when it is yielded."""
    device = torch.device(arguments.device)
    dtype = DTYPES[arguments.dtype]
    limits = Limits(device, (dtype, torch.float32), arguments.copy_bytes)
    reference = Reference(arguments.reference) if arguments.reference else None
    for name in arguments.models:
        rows = []
        clip = random_clip(name, dtype, arguments.device)
        for prompt_len, batch in product(arguments.prompt_len, arguments.batch):
            row = {"model": name, "prompt_len": prompt_len, "batch": batch}
            try:
                row["ours"] = ours(clip, batch, prompt_len, arguments.steps, True)
                row["uncaptured"] = ours(clip, batch, prompt_len, arguments.steps, False)
            except torch.OutOfMemoryError:
                print(f"{row}: no memory", file=sys.stderr)
                continue
            row["limit"] = limits.milliseconds(clip, batch, prompt_len)
            rows.append(row)
        del clip
        gc.collect()
        if reference is not None:
            clip = random_clip(name, torch.float32, arguments.device)
            for row in rows:
                case = (row["batch"], row["prompt_len"])

                def run(steps: int, clip=clip, case=case) -> None:
                    reference.time(clip, *case, steps)

                row["authors"] = per_step(run, arguments.reference_steps, device)["ms"]
            del clip, run
            gc.collect()  # their loop adds a method to the model, a reference cycle
        for row in rows:
            print(row, file=sys.stderr)
            yield row


def report(rows: Sequence[dict], arguments: argparse.Namespace) -> str:
    where = machine().removesuffix(", fp32")
    if arguments.device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name()}, {where}"
    missed = sum(not row["ours"]["captured"] for row in rows)
    lines = [
        "# Speed of a step",
        "",
        f"{where}; {arguments.dtype} tower and the default vocabulary, the authors' loop in "
        f"float32 and the whole one; {arguments.steps} steps. See benchmarks/gpu.py."
        + (f" **{missed} of {len(rows)} cases were not captured.**" if missed else ""),
        "",
        "| model | tokens | batch | authors / ours | uncaptured / ours | share of the limit | ours "
        "ms/step | uncaptured | authors | set-up ms | prompts per minute | peak GB | reserved GB |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        mine, plain, authors = row["ours"]["ms"], row["uncaptured"]["ms"], row.get("authors")
        memory = row["ours"]["gigabytes"], row["ours"]["reserved"]
        bound = max(row["limit"], key=row["limit"].get)
        cells = [
            row["model"],
            row["prompt_len"],
            row["batch"],
            f"{authors / mine:.1f}x" if authors else "-",
            f"{plain / mine:.2f}x",
            f"{100 * row['limit'][bound] / mine:.0f} % ({bound})",
            f"{mine:.2f}",
            f"{plain:.2f}",
            f"{authors:.1f}" if authors else "-",
            f"{row['ours']['set_up']:.0f}",
            f"{row['batch'] * 60e3 / (mine * PAPER_STEPS + row['ours']['set_up']):.1f}",
            *(f"{one:.2f}" if one else "-" for one in memory),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, *per_problem(rows)]) + "\n"


def per_problem(rows: Sequence[dict]) -> list[str]:
    """Memory of each further problem."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        for prompt_len in dict.fromkeys(row["prompt_len"] for row in rows):
            some = [r for r in rows if (r["model"], r["prompt_len"]) == (name, prompt_len)]
            if len(some) > 1 and some[0]["ours"]["gigabytes"]:
                first, last = some[0], some[-1]
                more = last["ours"]["gigabytes"] - first["ours"]["gigabytes"]
                megabytes = 1e3 * more / (last["batch"] - first["batch"])
                lines.append(f"- {name}, {prompt_len} tokens: {megabytes:.1f} MB")
    return ["", "Memory of each further problem:", "", *lines] if lines else []


def draw(rows: Sequence[dict], path: Path) -> None:
    """Milliseconds per step against the batch, and the limit; one panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(4.5 * len(names), 4), squeeze=False, layout="constrained"
    )
    for name, axes in zip(names, panels[0], strict=True):
        for k, prompt_len in enumerate(dict.fromkeys(row["prompt_len"] for row in rows)):
            some = [r for r in rows if (r["model"], r["prompt_len"]) == (name, prompt_len)]
            batches = [row["batch"] for row in some]
            color = f"C{k}"
            label = f"{prompt_len} tokens"
            axes.plot(batches, [r["ours"]["ms"] for r in some], "o-", color=color, label=label)
            best = [max(r["limit"].values()) for r in some]
            axes.plot(batches, best, ":", color=color)
            if "authors" in some[0]:
                axes.plot(batches, [r["authors"] for r in some], "x--", color=color)
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms per step", title=name)
    panels[0][0].legend(title="solid ours, dotted limit, dashed authors", fontsize=7)
    figure.savefig(path, dpi=120)


def precision(arguments: argparse.Namespace) -> str:
    """Mean similarity of prompts found in each precision, to the CLIP in float32."""
    device = arguments.device
    drawings = unseen(arguments.precision)
    judge = load_clip(device=device, dtype=torch.float32)
    targets = judge.encode_images([one.image for one in drawings])
    lines = [
        "# Precision",
        "",
        f"{len(drawings)} drawings that the bundled CLIP was not trained on, effort balanced, 8 "
        f"and 16 tokens; similarity to the CLIP in float32, mean and standard error. {machine()}",
        "",
        "| tokens | precision | similarity | against float32 | same prompts |",
        "|---|---|---|---|---|",
    ]
    for prompt_len in (8, 16):
        found = {}
        for name in ("float32", "bfloat16", "float16"):
            clip = load_clip(device=device, dtype=DTYPES[name])
            options = SearchOptions(prompt_len=prompt_len, batch_size=1, block_unsafe=False)
            results = invert(clip, [one.image for one in drawings], options)
            prompts = [result.prompt for result in results]
            scores = (judge.encode_texts(prompts) * targets).sum(1)
            found[name] = prompts, scores
            less = scores - found["float32"][1]
            same = sum(a == b for a, b in zip(prompts, found["float32"][0], strict=True))
            error = float(less.std()) / len(less) ** 0.5
            lines.append(
                f"| {prompt_len} | {name} | {float(scores.mean()):.4f} | "
                f"{float(less.mean()):+.4f} ± {error:.4f} | {same} |"
            )
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def memory(arguments: argparse.Namespace) -> str:
    """Bytes of the text tower, and the peak of a search."""
    lines = [
        "# Memory, counted without a card",
        "",
        f"What the tensors of a search take in {arguments.dtype}, the image tower elsewhere, as "
        "torch's CPU allocator counted them over three steps (attention is that of the CPU). A "
        "card needs its workspaces for products of matrices, too: some 10 to 70 MB.",
        "",
        "| model | tokens | batch | text tower GB | greatest GB |",
        "|---|---|---|---|---|",
    ]
    for name in arguments.models:
        clip = random_clip(name, DTYPES[arguments.dtype], "cpu")
        clip.model.visual = torch.nn.Identity()
        tensors = [*clip.model.parameters(), *clip.model.buffers()]
        tower = sum(one.numel() * one.element_size() for one in tensors)
        for prompt_len, batch in product(arguments.prompt_len, arguments.batch):
            greatest = tower + added(clip, prompt_len, batch)
            cells = name, prompt_len, batch, f"{tower / 1e9:.3f}", f"{greatest / 1e9:.3f}"
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def added(clip: Clip, prompt_len: int, batch: int) -> int:
    """Peak bytes of a search without the model."""
    targets = targets_for(clip, batch)
    with (
        # on a card the vocabulary is neither packed nor cut into blocks, nor copied in bfloat16
        patch("pez_core.space._similarity_to", lambda directions: lambda rows: rows @ directions.T),
        patch("pez_core.space._CPU_BLOCK", len(clip.text.token_embedding)),
        patch("pez_core.space.bfloat16_pays", lambda: False),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        space = TokenSpace(clip.text.token_embedding, clip.vocabulary)
        ids = space.random(batch, prompt_len, torch.Generator().manual_seed(0))
        search(space, Similarity(clip.text.encoder(), targets), ids, PezSettings(steps=3))
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


def searches(arguments: argparse.Namespace) -> str:
    """The memory in use after many searches in one process."""
    clip = load_clip("emoji-clip", device=arguments.device)
    count, on_card = arguments.searches, clip.device.type == "cuda"
    lines = [
        "# Memory after many searches in one process",
        "",
        f"`emoji-clip`, effort `fast`, each search for other features. {machine()}.",
        "",
        "| searches | allocated MB | reserved MB | peak of the process MB |",
        "|---|---|---|---|",
    ]
    torch.manual_seed(0)
    for k, target in enumerate(targets_for(clip, count), start=1):
        invert(clip, torch.nn.functional.normalize(target, dim=-1), SearchOptions(effort="fast"))
        if k % max(1, count // 10) == 0:
            gc.collect()
            card = [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()] if on_card else []
            cells = [f"{one / 1e6:.1f}" for one in card] or ["-", "-"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            lines.append(f"| {k} | {' | '.join(cells)} | {peak:.1f} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--prompt-len", nargs="+", type=int, default=[8, 16, 32, 75])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--reference-steps", type=int, default=30)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--copy-bytes", type=int, default=2**30, help="size of the copy")
    parser.add_argument("--precision", type=int, metavar="N", help="see above")
    parser.add_argument("--memory", action="store_true", help="see above")
    parser.add_argument("--searches", type=int, metavar="N", help="see above")
    parser.add_argument("--out", type=Path, default=HERE / "results/gpu")
    arguments = parser.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.precision:
        path = arguments.out.with_name(arguments.out.name + "-precision.md")
        path.write_text(precision(arguments), encoding="utf-8")
        return
    if arguments.memory:
        path = arguments.out.with_name(arguments.out.name + "-memory.md")
        path.write_text(memory(arguments), encoding="utf-8")
        return
    if arguments.searches:
        path = arguments.out.with_name(arguments.out.name + "-searches.md")
        path.write_text(searches(arguments), encoding="utf-8")
        return
    about = {"machine": machine(), "dtype": arguments.dtype, "steps": arguments.steps}
    rows = []
    for row in measure(arguments):  # written after each row, since a card may disappear
        rows.append(row)
        whole = json.dumps(about | {"rows": rows}, indent=1)
        arguments.out.with_suffix(".json").write_text(whole, encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(report(rows, arguments), encoding="utf-8")
    draw(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
