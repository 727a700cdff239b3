"""Runs `pez lm`: learns prompts, measures them, and transfers them to other models."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import wraps
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..clip.device import pick_device
from ..errors import ArgumentError, check_integer
from ..interrupts import interruptible
from ..language_models import load_model
from .data import TASKS, Splits, load_task, read_examples
from .evaluation import evaluate_prompt
from .splits import few_shot
from .text import Example, columns_of
from .tune import Tuned, TuneReport, tune_prompt

# Options whose names are not those of the arguments that they set.
_OPTIONS = {
    "name_or_path": "--model",
    "path": "--data",
    "dataset": "--data",
    "verbalizer": "--word",
    "other_templates": "--other-template",
}
Command = Callable[[argparse.Namespace], int]


def _option(argument: str) -> str:
    return _OPTIONS.get(argument, f"--{argument.replace('_', '-')}")


def _with_option_names(command: Command) -> Command:
    """A command whose errors name options of the command line."""

    @wraps(command)
    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except ArgumentError as error:
            raise ValueError(error.render(_option)) from error

    return run


@_with_option_names
def tune(arguments: argparse.Namespace) -> int:
    """Learn a prompt; gives the exit code."""
    frame = _frame(arguments)
    learned, _ = _splits(arguments, arguments.task, frame, arguments.other_template)
    holdout = None
    if arguments.shots is not None:
        learned, holdout = few_shot(learned, arguments.shots, arguments.seed)
    settings = {
        name: getattr(arguments, name)
        for name in (
            "prompt_len", "steps", "lr", "fluency", "batch_size", "accumulate", "optimizer",
            "method", "seed", "restarts", "start_from", "check_every",
        )
    }  # fmt: skip
    model, tokenizer = _load(arguments, arguments.model)
    bar = tqdm(disable=None, leave=False, total=arguments.steps * arguments.restarts)

    def show(report: TuneReport) -> bool:
        bar.set_postfix_str(f"{report.score:.3f} {report.prompt}", refresh=False)
        bar.update(report.restart * report.steps + report.step - bar.n)
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
        again = "; the same command resumes it" if arguments.checkpoint else ""
        done = max(one.steps for one in found.candidates)
        print(f"pez: interrupted after {done} steps{again}", file=sys.stderr)
    _print_tuned(arguments, frame, settings, found)
    return status


def _print_tuned(
    arguments: argparse.Namespace, frame: dict[str, Any], settings: dict[str, Any], found: Tuned
) -> None:
    if not arguments.json:
        for one in found.candidates:
            print(f"{one.accuracy:.4f}  {one.prompt}")
        return
    # as keys of JSON all labels would become text
    frame = frame | {"verbalizer": list(frame["verbalizer"].items())}
    names = ("model", "task", "data", "shots")
    about = {name: getattr(arguments, name) for name in names} | frame | settings
    about["other_templates"] = arguments.other_template
    print(json.dumps(about | _rows(found), indent=2))


def _rows(found: Tuned) -> dict[str, Any]:
    names = ("prompt", "accuracy", "loss", "perplexity", "seed", "steps", "history")
    candidates = [{name: getattr(one, name) for name in names} for one in found.candidates]
    best = {name: value for name, value in candidates[0].items() if name != "steps"}
    return best | {"seconds": found.seconds, "candidates": candidates}


@_with_option_names
def evaluate(arguments: argparse.Namespace) -> int:
    """Measure prompts on the test examples; gives the exit code."""
    frame = _frame(arguments)
    _, examples = _splits(arguments, arguments.task, frame)
    rows: list[dict[str, Any]] = []
    try:
        _measure(arguments, arguments.model, ["", *arguments.prompt], examples, frame, rows)
    finally:  # rows that are there are printed, whatever ends the measurement
        print(json.dumps(rows, indent=2) if arguments.json else _table(rows))
    return 0


@_with_option_names
def transfer(arguments: argparse.Namespace) -> int:
    """Measure learned prompts with other models; gives the exit code."""
    task, frame, prompts = _read_tuned(arguments.tuned)
    check_integer("top", arguments.top, 1)
    _, examples = _splits(arguments, task, frame)
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


def _read_tuned(path: str) -> tuple[str | None, dict[str, Any], list[str]]:
    """Task, frame and prompts, best first, of the output of `tune --json`."""
    try:
        tuned = json.loads(Path(path).read_text(encoding="utf-8"))
        frame = {name: tuned[name] for name in ("template", "max_length")}
        frame["verbalizer"] = {label: word for label, word in tuned["verbalizer"]}
        prompts = [one["prompt"] for one in tuned["candidates"]]
        task = tuned["task"]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("`candidates` has to hold prompts")
        if task is not None and task not in TASKS:
            raise ValueError(f"there is no task {task!r}")
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the output of `pez lm tune --json` ({error!r})."
        ) from error
    return task, frame, prompts


def _load(arguments: argparse.Namespace, name: str | None) -> tuple[torch.nn.Module, Any]:
    device = pick_device(arguments.device)
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    return load_model(name, device, dtype, arguments.download)


def _frame(arguments: argparse.Namespace) -> dict[str, Any]:
    """Template, verbalizer and length of the task, or those of the options."""
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
    if not arguments.task:
        return {
            "template": arguments.template,
            "verbalizer": words,
            "max_length": arguments.max_length or 128,
        }
    task = TASKS[arguments.task]
    if not arguments.data:  # its labels may be numbers
        labels: dict[Hashable, Hashable] = {str(label): label for label in task.verbalizer}
        words = {labels.get(label, label): word for label, word in words.items()}
    return {
        "template": arguments.template or task.template,
        "verbalizer": words or dict(task.verbalizer),
        "max_length": arguments.max_length or task.max_length,
    }


def _splits(
    arguments: argparse.Namespace,
    task: str | None,
    frame: dict[str, Any],
    other_templates: Sequence[str] = (),
) -> Splits:
    """Training and test examples; those of a file serve as both."""
    if arguments.data is None:
        if task is None:
            raise ValueError(f"{arguments.tuned} was learned from a file; give it with --data.")
        return load_task(task, arguments.source, arguments.download)
    # labels of a file are text, but may be numbers in the verbalizer of a task
    labels: dict[Hashable, Hashable] = {str(label): label for label in frame["verbalizer"]}
    read = read_examples(arguments.data, arguments.label)
    _check_file(arguments.data, read, labels, [frame["template"], *other_templates])
    examples = [(text, labels[label]) for text, label in read]
    return examples, examples


def _check_file(
    path: str, examples: list[Example], labels: Collection[Hashable], templates: Sequence[str]
) -> None:
    """Check examples before a model is loaded, which takes a while."""
    if not examples:
        raise ValueError(f"--data is {path}, which holds no examples.")
    for _, label in examples:
        if label not in labels:
            raise ValueError(
                f"{path} has the label {label!r}, which has no word; there are words for "
                f"{', '.join(map(repr, labels))}. Give it one with --word."
            )
    columns = list(examples[0][0])
    for option, template in zip_longest(["--template"], templates, fillvalue="--other-template"):
        for name in columns_of(template):
            if name not in columns:
                raise ValueError(
                    f"{option} is {template!r}, but {path} has no column {name!r}; it has "
                    f"{', '.join(map(repr, columns))}."
                )


def _measure(
    arguments: argparse.Namespace,
    name: str | None,
    prompts: list[str],
    examples: list[Example],
    frame: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    """Append the measurements of each prompt to `rows`."""
    if arguments.limit is not None:
        check_integer("limit", arguments.limit, 1)
    model, tokenizer = _load(arguments, name)
    examples = examples[: arguments.limit]
    for prompt in tqdm(prompts, disable=None, leave=False):
        found = evaluate_prompt(
            model, tokenizer, prompt, examples, batch_size=arguments.batch_size, **frame
        )
        names = ("prompt", "accuracy", "loss", "perplexity")
        rows.append({one: getattr(found, one) for one in names} | {"examples": len(examples)})


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"  {r['accuracy']:.4f}  {r['prompt'] or '(the template alone)'}" for r in rows]
    if rows:
        lines.insert(0, f"accuracy on {rows[0]['examples']} examples:")
    return "\n".join(lines)
