"""Measures a prompt on the examples of a task."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ArgumentError, ArgumentTypeError, check_integer
from .classifier import PromptedClassifier, classifier_of, frozen
from .objective import Encoded, classify, spare_context
from .splits import check_examples
from .text import Example, Format


@dataclass(frozen=True)
class PromptEvaluation:
    """The quality of a prompt on examples.

    Attributes:
        prompt: the text; "" is the template alone, None a soft prompt.
        accuracy: share of examples whose own label has the most likely word, from 0 to 1.
        loss: mean cross-entropy over the words of the labels, in nats.
        perplexity: of the prompt under the model, exp of its mean negative log-likelihood per
            token; None for an encoder-decoder, a soft or an empty prompt.
        labels: the predicted label of each example.
    """

    prompt: str | None
    accuracy: float
    loss: float
    perplexity: float | None
    labels: list[Hashable] = field(repr=False)


def evaluate_prompt(
    model: torch.nn.Module,
    tokenizer: Any,
    prompt: str | torch.Tensor,
    dataset: Sequence[Example],
    template: str,
    verbalizer: Mapping[Hashable, str],
    batch_size: int = 32,
    max_length: int = 128,
) -> PromptEvaluation:
    """Classify examples behind a prompt, which may have been learned with another model.

    Args:
        model, tokenizer, template, verbalizer, max_length: as in `tune_prompt`.
        prompt: text; "" for the template alone. Or (prompt_len, dim) embeddings of a soft prompt,
            which only the model that it was learned with can read.
        dataset: examples, at least one.
        batch_size: examples of one pass.

    Raises:
        ArgumentError: an argument is not as above; the message names it.
        FloatingPointError: losses are NaN or infinite, which half precision can cause.
    """
    check_integer("batch_size", batch_size, 1)
    check_integer("max_length", max_length, 1)
    soft = isinstance(prompt, torch.Tensor)
    if not soft and not isinstance(prompt, str):
        raise ArgumentTypeError("prompt", f"has to be text or embeddings but is {prompt!r}")
    check_examples("dataset", dataset)
    with frozen(model):
        text = Format(tokenizer, template, verbalizer, max_length)
        classifier = classifier_of(model, text)
        width = classifier.table.shape[1]
        if soft and (prompt.ndim != 2 or prompt.shape[1] != width):
            raise ArgumentError(
                "prompt",
                f"has to be (prompt_len, {width}) embeddings for this model but is "
                f"{tuple(prompt.shape)}",
            )
        given = prompt.to(classifier.device) if soft else text.prompt_ids(prompt)
        examples = text.encode_examples(dataset, len(given) > 0)
        check_context(classifier, len(given), examples, "prompt")
        found = classify(classifier, given, examples, batch_size)
    labels = [text.labels[k] for k in found.labels]
    perplexity = perplexity_of(found.fluency)
    return PromptEvaluation(
        None if soft else prompt, found.accuracy, found.loss, perplexity, labels
    )


def check_context(
    classifier: PromptedClassifier, prompt_len: int, examples: Sequence[Encoded], argument: str
) -> None:
    """Raise unless a prompt and the longest example fit in the context of the model.

    Args:
        classifier: the language model.
        prompt_len: tokens of the prompt.
        examples: at least one.
        argument: the argument that the prompt comes from.
    """
    if spare_context(classifier, prompt_len, examples) < 0:
        longest = max(len(ids) for ids, _ in examples)
        raise ArgumentError(
            argument,
            f"makes a prompt of {prompt_len} tokens, which does not fit beside an example of "
            f"{longest} in the model's context of {classifier.context} tokens",
            "take a shorter prompt or a lower `max_length`",
        )


def perplexity_of(fluency: float | None) -> float | None:
    """exp of a mean negative log-likelihood, where there is one."""
    return None if fluency is None else math.exp(fluency)
