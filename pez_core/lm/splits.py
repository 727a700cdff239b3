"""Splits examples into those that a prompt is learned from and those that are held out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from ..errors import ArgumentError, ArgumentTypeError, check_integer
from .text import Example

# Held-out examples where no holdout is given, at most, and the seed that draws them.
_HELD_OUT, _HOLDOUT_SEED = 500, 0


def few_shot(
    dataset: Sequence[Example], shots: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """A few examples to learn from, and as many held-out ones (section 5.1).

    Args:
        dataset: examples.
        shots: of each label in each of the two (k in the paper), at least 1.
        seed: of the draw.

    Raises:
        ArgumentError: a label has fewer than `2 * shots` examples.
    """
    check_integer("shots", shots, 1)
    by_label: dict[Hashable, list[Example]] = defaultdict(list)
    for example in dataset:
        by_label[example[1]].append(example)
    generator = torch.Generator().manual_seed(seed % 2**63)
    learned: list[Example] = []
    held: list[Example] = []
    for label, examples in by_label.items():
        if len(examples) < 2 * shots:
            raise ArgumentError(
                "shots",
                f"is {shots}, but label {label!r} has {len(examples)} examples, not the "
                f"{2 * shots} for learning and choosing",
            )
        order = torch.randperm(len(examples), generator=generator).tolist()
        learned += [examples[k] for k in order[:shots]]
        held += [examples[k] for k in order[shots : 2 * shots]]
    return learned, held


def split_holdout(
    dataset: Sequence[Example], holdout: Sequence[Example] | None
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; without a holdout, half of `dataset` is held out."""
    dataset = list(dataset)
    check_examples("dataset", dataset)
    if holdout is not None:
        check_examples("holdout", holdout)
        return dataset, list(holdout)
    if len(dataset) < 2:
        raise ArgumentError("dataset", "has one example", "give more, or a `holdout`")
    generator = torch.Generator().manual_seed(_HOLDOUT_SEED)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    count = min(len(dataset) // 2, _HELD_OUT)
    return [dataset[k] for k in order[count:]], [dataset[k] for k in order[:count]]


def check_examples(name: str, examples: Sequence[Example]) -> None:
    """Raise unless the argument `name` holds (text, label) pairs, at least one."""
    if len(examples) == 0:
        raise ArgumentError(name, "is empty", "give at least one example")
    for example in examples:
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise ArgumentTypeError(name, f"has to hold (text, label) pairs but holds {example!r}")
