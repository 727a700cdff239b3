"""Milliseconds per step and per prompt, ours and the authors', in one run.

    python benchmarks/step_time.py [--reference PATH] [--out FILE]

PATH is a checkout of the authors' repository (YuxinWenRick/hard-prompts-made-easy). Their loop,
`optim_utils.py`, runs as it is, on the very model that ours runs on; the method that their fork of
open_clip adds to the model (77 embeddings through the whole tower) is added to it here. They search
the whole vocabulary of 49,408 tokens; ours is timed on its default vocabulary and on the whole one.
The runs are timed in turns, so that a drift of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch

from pez_core import Clip, PezSettings, TokenSpace, load_clip, search
from pez_core.objectives import Similarity
from pez_core.precision import bfloat16_pays

ROUNDS = 5


def random_clip(name: str, like: Clip | None = None) -> Clip:
    """A CLIP with random weights, or the weights of `like`, searched in float32."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval() if like is None else like.model
    clip = Clip(model, open_clip.get_tokenizer(name), name)
    clip.text.matrix_dtype = None if like is None else torch.float32
    return clip


def targets_for(clip: Clip, batch: int) -> torch.Tensor:
    width = clip.encode_texts(["a"]).shape[1]
    return torch.randn(batch, 1, width, generator=torch.Generator().manual_seed(1))


def time_ours(clip: Clip, batch: int, prompt_len: int, steps: int, allowed) -> float:
    """Seconds per step, including set-up and result."""
    targets = targets_for(clip, batch).to(clip.device)
    began = time.perf_counter()
    space = TokenSpace(clip.text.token_embedding, allowed)
    ids = space.random(batch, prompt_len, torch.Generator().manual_seed(0))
    objective = Similarity(clip.text.encoder(), targets)
    search(space, objective, ids, PezSettings(steps=steps, report_every=25))
    return (time.perf_counter() - began) / steps


class Reference:
    """The authors' `optimize_prompt_loop`, made to run on a given open_clip model."""

    def __init__(self, path: Path) -> None:
        # It uses two documented functions of sentence_transformers. Without that package, functions
        # of plain torch with the same results replace them, which can only be faster.
        try:
            import sentence_transformers.util  # noqa: F401
        except ImportError:
            sys.modules["sentence_transformers"] = types.ModuleType("sentence_transformers")
            sys.modules["sentence_transformers.util"] = util = types.ModuleType("util")
            util.normalize_embeddings = lambda x: torch.nn.functional.normalize(x, dim=1)
            util.dot_score = lambda a, b: a @ b.T
            util.semantic_search = _semantic_search
        sys.modules.setdefault("requests", types.ModuleType("requests"))
        spec = importlib.util.spec_from_file_location("reference", path / "optim_utils.py")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def time(self, clip: Clip, batch: int, prompt_len: int, steps: int) -> float:
        model = clip.model
        arguments = types.SimpleNamespace(
            prompt_len=prompt_len,
            prompt_bs=batch,
            iter=steps,
            lr=0.1,
            weight_decay=0.1,
            print_step=None,
            batch_size=None,
            loss_weight=1.0,
        )
        model.forward_text_embedding = types.MethodType(_forward_text_embedding, model)
        words = open_clip.SimpleTokenizer()
        targets = targets_for(clip, batch)[:, 0].to(clip.device)
        began = time.perf_counter()
        self.module.optimize_prompt_loop(
            model, words, model.token_embedding, targets, arguments, str(clip.device)
        )
        return (time.perf_counter() - began) / steps


def _semantic_search(queries, corpus, query_chunk_size, top_k, score_function):
    values, indices = torch.topk(score_function(queries, corpus), top_k, dim=1, sorted=False)
    values, indices = values.cpu().tolist(), indices.cpu().tolist()
    return [
        [{"corpus_id": i, "score": s} for i, s in zip(row, scores, strict=True)]
        for row, scores in zip(indices, values, strict=True)
    ]


def _forward_text_embedding(self, embeddings, ids, image_features):
    """The method that the authors' fork of open_clip adds: the whole tower from 77 embeddings."""
    x = embeddings + self.positional_embedding
    x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask))
    text = x[torch.arange(x.shape[0]), ids.argmax(dim=-1)] @ self.text_projection
    text = torch.nn.functional.normalize(text, dim=-1)
    image = torch.nn.functional.normalize(image_features, dim=-1)
    logits = image @ text.t()
    return logits, logits.t()


def median_times(runs: dict, rounds: int) -> dict:
    """Medians of each run, all of them taken in turns, after one warm-up."""
    for run in runs.values():
        run()
    taken = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(run() * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def compare(clips: dict, reference: Reference | None, rounds: int) -> list[str]:
    lines = [
        "| CLIP | batch | authors / ours | authors / ours, both on the whole vocabulary | ours "
        "ms/step | ours, whole vocabulary ms/step | authors ms/step | ours ms/step/prompt | "
        "authors ms/step/prompt |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, clip in clips.items():
        # enough steps that the set-up is as small a part as in a real search
        steps, their_steps = (200, 100) if name == "emoji-clip" else (60, 4)
        for batch in (1, 8):
            runs = {
                "ours": lambda c=clip, b=batch, s=steps: time_ours(c, b, 16, s, c.vocabulary),
                "whole": lambda c=clip, b=batch, s=steps: time_ours(c, b, 16, s, None),
            }
            if reference:
                runs["theirs"] = lambda c=clip, b=batch, s=their_steps: reference.time(c, b, 16, s)
            times = median_times(runs, rounds)
            ours, whole, theirs = times["ours"], times["whole"], times.get("theirs")
            ratios = [f"{theirs / t:.1f}x" if theirs else "-" for t in (ours, whole)]
            cells = [theirs, ours / batch, theirs and theirs / batch]
            cells = [f"{t:.1f}" if t else "-" for t in cells]
            lines.append(
                f"| {name} | {batch} | {' | '.join(ratios)} | {ours:.1f} | {whole:.1f} | "
                f"{' | '.join(cells)} |"
            )
            print(lines[-1], file=sys.stderr)
    return lines


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].split(":")[1].strip() if names else model
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, fp32"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, help="checkout of the authors' repository")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed runs of each case")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args(argv)
    reference = Reference(arguments.reference) if arguments.reference else None
    clips = {"emoji-clip": load_clip(device="cpu")}
    for name in ("ViT-B-32", "ViT-L-14"):
        clip = random_clip(name)
        clips[f"{name}, random weights"] = clip
        clips[f"{name}, random weights, float32"] = random_clip(name, clip)
    where = machine().removesuffix(", fp32")
    text = "\n".join(
        [
            "# Time per step",
            "",
            f"prompt_len 16, medians of {arguments.rounds} runs taken in turns. {where}. Matrices "
            f"of large towers in {'bfloat16' if bfloat16_pays() else 'float32'} unless said; the "
            "authors' loop in float32.",
            "",
            *compare(clips, reference, arguments.rounds),
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
