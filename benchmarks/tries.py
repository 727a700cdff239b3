"""What was tried to make a step and the screening of swaps faster, and whether it pays.

    python benchmarks/tries.py [--model ViT-B-32] [--only products compile search] [--rounds 9]

Each way is compared with what the package does on this processor, in turns in one process, on a
CLIP with random weights. The pieces of work are a step of PEZ through the text tower, forward and
backward, and the screening of a swap: the scores of many prompts that differ at one position in the
middle. *Found* is the share of the 32 best of 256 such prompts, by the scores in float32, that a
way has among its 64 best. Random weights have no outliers, which round worse, so the trained
emoji-clip shows it as well.

Ways in one process are compared by the least time of each, which other programs disturb least.
`torch.compile` has processes of its own: with an empty cache, with the cache of the first, and
without a C++ compiler. Run it on an idle machine. It needs a processor with AVX-512, as two of the
ways do.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from step_time import machine, random_clip, targets_for

from pez_core import Clip, SearchOptions, invert, load_clip, swaps
from pez_core.clip import text
from pez_core.objectives import Similarity

PROMPT_LEN, PLACE = 16, 8  # tokens, and the position of the swap
FEW, MANY = 32, 256  # candidates: those of a search, and those that are ranked
BEST, LOOKED_AT = 32, 64
PARTS = ("products", "compile", "search")
COMPILED = ("step, batch 1", "step, batch 8", f"screening of {FEW}")
SHIPPED, INT8 = "what ships", "int8, torch's dynamic layer"
PACKED = "bfloat16, weights packed by oneDNN"
NO_COMPILER = {"CXX": "/nowhere/g++"}

HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")

Matrix = tuple[torch.Tensor, torch.Tensor]
Multiply = Callable[[torch.Tensor, Matrix], torch.Tensor]


class Kept:
    """What is made of a matrix once, by its place in memory."""

    def __init__(self, make: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        self.make, self.made = make, {}

    def __call__(self, matrix: Matrix) -> object:
        key = matrix[0].data_ptr(), matrix[0].shape
        if key not in self.made:
            # the matrix is kept, too, so that no other gets its place
            self.made[key] = self.make(*(part.detach() for part in matrix)), matrix
        return self.made[key][0]


def int8_of_torch() -> Multiply:
    """PyTorch's dynamic layer: a scale for each column of the weights and one for all rows."""

    def make(weight: torch.Tensor, bias: torch.Tensor) -> object:
        weight = weight.float()
        zeros = torch.zeros(len(weight), dtype=torch.long)
        scales = weight.abs().amax(dim=1) / 127
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantized, bias.float())

    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"
    kept = Kept(make)
    return lambda x, matrix: torch.ops.quantized.linear_dynamic(x.float(), kept(matrix), False)


def int8_by_rows() -> Multiply:
    """A scale for each column of the weights and for each row."""

    def make(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole, scales = _int8(weight.float())
        return whole.T, scales.T, bias.float()

    kept = Kept(make)

    def multiply(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        weight, columns, bias = kept(matrix)
        rows, scales = _int8(x.float().flatten(0, -2))
        product = torch._int_mm(rows, weight).float().mul_(scales)
        return torch.addcmul(bias, product, columns).unflatten(0, x.shape[:-1])

    return multiply


def _int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = rows.abs().amax(dim=1, keepdim=True) / 127
    return (rows / scales).round_().to(torch.int8), scales


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward, bias):
        ctx.backward_matrix = backward
        return torch.ops.mkldnn._linear_pointwise(x, forward, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        matrix = ctx.backward_matrix
        product = torch.ops.mkldnn._linear_pointwise(gradient, matrix, None, "none", [], "")
        return product, None, None, None


def packed() -> Multiply:
    """bfloat16 with the weights in oneDNN's own order, once for each direction."""

    def make(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weight = weight.bfloat16()
        both = weight.contiguous(), weight.T.contiguous()
        pack = torch.ops.mkldnn._reorder_linear_weight
        return *(pack(one, FEW) for one in both), bias.bfloat16()

    kept = Kept(make)
    return lambda x, matrix: _Packed.apply(x.bfloat16(), *kept(matrix))


def one_call(clip: Clip, target: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Scores of whole prompts, each block one call of PyTorch's fast path, in bfloat16."""
    clip = in_bfloat16(clip)
    tower = clip.text.tower
    layers = []
    for block in tower.transformer.resblocks:
        attn, mlp = block.attn, block.mlp
        settings = attn.embed_dim, attn.num_heads
        weights = attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias
        norms = [x for norm in (block.ln_1, block.ln_2) for x in (norm.weight, norm.bias)]
        wide = [x for layer in (mlp.c_fc, mlp.c_proj) for x in (layer.weight, layer.bias)]
        layers.append((*settings, *weights, True, True, block.ln_1.eps, *norms, *wide))
    start, end = (clip.text._embed(clip.text._ids(ids[:1])) for ids in _marks(clip))

    def scores(embeddings: torch.Tensor) -> torch.Tensor:
        each = len(embeddings), 1, 1
        x = torch.cat([start.repeat(each), embeddings.bfloat16(), end.repeat(each)], dim=1)
        x = x + clip.text._positions(0, x.shape[1])
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for layer in layers:
            x = torch._transformer_encoder_layer_fwd(x, *layer, mask, 0)
        features = clip.text._project(tower.ln_final(x[:, -1])).float()
        return F.normalize(features, dim=-1) @ F.normalize(target, dim=-1)

    return scores


def _marks(clip: Clip) -> tuple[list[int], list[int]]:
    return clip.text.ids_before, clip.text.ids_behind


def in_bfloat16(clip: Clip) -> Clip:
    model = copy.deepcopy(clip.model).bfloat16()
    return Clip(model, clip.text.words.tokenizer, clip.name)


@dataclass(frozen=True)
class Way:
    """A way to multiply by the matrices of the tower.

    Attributes:
        clip: that has them.
        dtype: in which they are kept; None: what ships.
        multiply: in place of the package's function.
        differentiable: it has a backward pass.
    """

    clip: Clip
    dtype: torch.dtype | None = None
    multiply: Multiply | None = None
    differentiable: bool = True

    def used(self) -> AbstractContextManager:
        return patch.object(text, "multiply", self.multiply) if self.multiply else nullcontext()

    def objective(self, batch: int = 1) -> Similarity:
        self.clip.text.matrix_dtype = self.dtype
        return Similarity(self.clip.text.encoder(), targets_for(self.clip, batch))

    def step(self, batch: int) -> Callable[[], object]:
        objective, x = self.objective(batch), embedded(self.clip, prompts(self.clip, batch))
        return lambda: _forward_and_backward(objective, x)

    def screening(self, candidates: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The scores of (n, PROMPT_LEN) prompts that agree before PLACE."""
        x = embedded(self.clip, candidates)
        objective = self.objective().given(x[:1, :PLACE])
        return lambda: _scores(objective, x[:, PLACE:])


def _forward_and_backward(objective: Callable, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x, 0)[0].sum(), x)
    return gradient


@torch.no_grad()
def _scores(objective: Callable, x: torch.Tensor) -> torch.Tensor:
    return objective(x, 0)[1]


def prompts(clip: Clip, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(clip.vocabulary), (count, PROMPT_LEN), generator=generator)
    return clip.vocabulary[picks]


def swapped(clip: Clip, count: int) -> torch.Tensor:
    """(count, PROMPT_LEN) prompts that differ at PLACE."""
    rows = prompts(clip, count)
    others = torch.arange(PROMPT_LEN) != PLACE
    return torch.where(others, rows[:1], rows)


def embedded(clip: Clip, ids: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, clip.text.token_embedding.detach()).float()


def ways(clip: Clip) -> dict[str, Way]:
    """The first one ships."""
    return {
        SHIPPED: Way(clip),
        "float32": Way(clip, torch.float32),
        "all in bfloat16, norms and attention as well": Way(in_bfloat16(clip)),
        PACKED: Way(clip, None, packed()),
        INT8: Way(clip, None, int8_of_torch(), differentiable=False),
        "int8, a scale for each row": Way(clip, None, int8_by_rows(), differentiable=False),
    }


def least_times(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each run, all of them taken in turns after one warm-up."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    return best


def inside(way: Way, run: Callable[[], object]) -> Callable[[], object]:
    def used() -> object:
        with way.used():
            return run()

    return used


def products(clip: Clip, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by work and way."""
    tried, found = ways(clip), {}
    for batch in (1, 8):
        work = {n: inside(w, w.step(batch)) for n, w in tried.items() if w.differentiable}
        found[f"step, batch {batch}"] = least_times(work, rounds)
    for count in (FEW, MANY):
        rows = swapped(clip, count)
        work = {name: inside(way, way.screening(rows)) for name, way in tried.items()}
        if type(clip.text.tower.transformer.resblocks[0].mlp.gelu) is torch.nn.GELU:
            scores, x = one_call(clip, targets_for(clip, 1)[0, 0]), embedded(clip, rows)
            work["one call for each block, which encodes all tokens"] = torch.no_grad()(
                lambda scores=scores, x=x: scores(x)
            )
        found[f"screening of {count}"] = least_times(work, rounds if count == FEW else 3)
        print(found, file=sys.stderr)
    return found


def quality(clip: Clip) -> dict[str, float]:
    """The share of the best candidates that each way finds."""
    rows, tried = swapped(clip, MANY), ways(clip)
    exact = set(tried["float32"].screening(rows)().topk(BEST).indices.tolist())
    found = {}
    for name, way in tried.items():
        scores = inside(way, way.screening(rows))()
        found[name] = len(exact & set(scores.topk(LOOKED_AT).indices.tolist())) / BEST
    return found


def searches(clip: Clip, rounds: int) -> dict[str, float]:
    """Seconds of a search of the effort `fast`, by what is used in it, and of its screening."""
    target = F.normalize(targets_for(clip, 1)[0], dim=-1)
    options = SearchOptions(prompt_len=PROMPT_LEN, effort="fast")
    tried, shipped = ways(clip), swaps.scores_behind
    screenings: list[float] = []  # of the last search

    def screening_in(way: Way) -> Callable:
        def scores(space, rest, candidates, i):
            if candidates.shape[1] <= swaps.SwapSettings.candidates:  # the exact comparison
                return shipped(space, rest, candidates, i)
            began = time.perf_counter()
            with way.used():
                found = shipped(space, rest, candidates, i)
            screenings.append(time.perf_counter() - began)
            return found

        return scores

    def search(way: Way, screened_by: Way) -> Callable[[], None]:
        def run() -> None:
            clip.text.matrix_dtype = None
            screenings.clear()
            with way.used(), patch.object(swaps, "scores_behind", screening_in(screened_by)):
                invert(clip, target, options)

        return run

    ship, pack, int8 = (tried[name] for name in (SHIPPED, PACKED, INT8))
    work = {SHIPPED: search(ship, ship), PACKED: search(pack, pack)}
    work["int8 in the screening alone"] = search(ship, int8)
    found = {name: ms / 1e3 for name, ms in least_times(work, rounds).items()}
    work[SHIPPED]()
    return found | {"the screening in what ships": sum(screenings)}


def compiled(clip: Clip, what: str, rounds: int) -> dict[str, object]:
    """Seconds until the first result of `torch.compile`, and milliseconds against eager."""
    way = Way(clip)
    if what.startswith("step"):
        batch = int(what.split()[-1])
        objective, inputs = way.objective(batch), embedded(clip, prompts(clip, batch))
        run = _forward_and_backward
    else:
        x = embedded(clip, swapped(clip, FEW))
        objective, inputs = way.objective().given(x[:1, :PLACE]), x[:, PLACE:]
        run = _scores
    fast = torch.compile(objective.__call__)
    with patch.object(text.TextTower, "count", lambda *_, **__: None):  # breaks the graph
        run(objective, inputs)
        began = time.perf_counter()
        try:
            run(fast, inputs)
        except Exception as error:
            found = {"error": type(getattr(error, "inner_exception", error)).__name__}
            torch._dynamo.reset()
            began = time.perf_counter()
            with torch._dynamo.config.patch(suppress_errors=True):  # goes on without compiling
                run(fast, inputs)
            return found | {"seconds": time.perf_counter() - began}
        seconds = time.perf_counter() - began
        names = {"eager": objective, "compiled": fast}
        work = {name: lambda one=one: run(one, inputs) for name, one in names.items()}
        return {"seconds": seconds} | least_times(work, rounds)


def in_processes(model: str, rounds: int) -> dict[str, dict[str, dict]]:
    """What `compiled` has, by work and state of the machine."""
    found: dict[str, dict[str, dict]] = {}
    for what in COMPILED:
        with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as empty:
            states = {
                "empty cache": {"TORCHINDUCTOR_CACHE_DIR": cache},
                "full cache, new process": {"TORCHINDUCTOR_CACHE_DIR": cache},
                "no C++ compiler": {"TORCHINDUCTOR_CACHE_DIR": empty} | NO_COMPILER,
            }
            for state, variables in states.items():
                command = [sys.executable, __file__, "--model", model, "--compiled", what]
                command += ["--rounds", str(rounds)]
                done = subprocess.run(
                    command,
                    env=os.environ | variables,
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                found.setdefault(what, {})[state] = json.loads(done.stdout.splitlines()[-1])
                print(what, state, found[what][state], file=sys.stderr)
    return found


def report(found: dict, arguments: argparse.Namespace) -> list[str]:
    where = machine().removesuffix(", fp32")
    lines = [
        "# What was tried to be faster",
        "",
        f"{arguments.model} with random weights, {PROMPT_LEN} tokens, swaps at token {PLACE + 1}. "
        f"{where}. Above 1 is faster than what ships. See benchmarks/tries.py.",
    ]
    if "products" in found:
        lines += ["", "## Products", "", *_products_table(found)]
    if "compile" in found:
        lines += ["", "## torch.compile", "", *_compile_table(found["compile"])]
    if "search" in found:
        seconds = found["search"]
        lines += ["", "## A search of the effort `fast`", ""]
        lines += ["| way | ratio | s |", "|---|---|---|"]
        first = seconds[SHIPPED]
        lines += [f"| {name} | {first / s:.2f}x | {s:.1f} |" for name, s in seconds.items()]
    return lines


def _products_table(found: dict) -> list[str]:
    times, shares = found["products"], found["quality"]
    names = list(times[f"screening of {FEW}"])
    lines = [
        f"| way | {' | '.join(f'{work}: ratio' for work in times)} | "
        f"{' | '.join(f'found, {clip}' for clip in shares)} | "
        f"{' | '.join(f'{work}: ms' for work in times)} |",
        "|---" * (1 + 2 * len(times) + len(shares)) + "|",
    ]
    for name in names:
        ms = [times[work].get(name) for work in times]
        firsts = [times[work][SHIPPED] for work in times]
        ratios = [f"{a / b:.2f}x" if b else "-" for a, b in zip(firsts, ms, strict=True)]
        parts = [one.get(name) for one in shares.values()]
        cells = [*ratios, *("-" if p is None else f"{p:.0%}" for p in parts)]
        cells += ["-" if b is None else f"{b:.1f}" for b in ms]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _compile_table(found: dict[str, dict[str, dict]]) -> list[str]:
    lines = [
        "| work | state | ratio | seconds until the first result | ms eager | ms compiled |",
        "|---|---|---|---|---|---|",
    ]
    for what, states in found.items():
        for state, one in states.items():
            if "error" in one:
                lost = f"{one['error']}; {one['seconds']:.1f} where errors are suppressed"
                lines.append(f"| {what} | {state} | - | {lost} | - | - |")
                continue
            eager, fast = one["eager"], one["compiled"]
            lines.append(
                f"| {what} | {state} | {eager / fast:.2f}x | {one['seconds']:.1f} | {eager:.1f} | "
                f"{fast:.1f} |"
            )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/tries")
    parser.add_argument("--compiled", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args(argv)
    if not HAS_AVX512:
        raise SystemExit("This processor has no AVX-512, which two of the ways need.")
    clip, rounds, found = random_clip(arguments.model), arguments.rounds, {}
    clip.model.requires_grad_(False)
    if arguments.compiled:
        print(json.dumps(compiled(clip, arguments.compiled, rounds)))
        return
    if "products" in arguments.only:
        found["products"] = products(clip, rounds)
        trained = load_clip("emoji-clip", device="cpu")
        found["quality"] = {"random weights": quality(clip), "emoji-clip": quality(trained)}
    if "search" in arguments.only:
        found["search"] = searches(clip, max(1, rounds // 3))
    if "compile" in arguments.only:
        found["compile"] = in_processes(arguments.model, rounds)
    lines = "\n".join(report(found, arguments)) + "\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(lines, encoding="utf-8")
    print(lines)


if __name__ == "__main__":
    main()
