"""Independent random streams, and statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ArgumentError, check_integer

if TYPE_CHECKING:
    from .results import Result


def child_seed(seed: int, *key: int) -> int:
    """A seed below 2^63 that belongs to `seed` and `key` alone, by `numpy.random.SeedSequence`.

    With one number k in the key it is that of child k of `SeedSequence(seed).spawn`.
    """
    sequence = np.random.SeedSequence(seed if seed >= 0 else seed % 2**64, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0]) % 2**63


def restart_seed(seed: int, restart: int) -> int:
    """The seed of a restart: `seed` itself for the first one, a child of it for each other.

    So the restarts of one seed share nothing with those of the next seeds.
    """
    return seed % 2**63 if restart == 0 else child_seed(seed, restart - 1)


@dataclass(frozen=True)
class SeedStatistics:
    """The values of a search with several seeds, with their `mean` and `standard_error`.

    Attributes:
        values: one number per seed, in the order of the seeds; by default the similarity.
        results: the return value of the search for each seed.
    """

    values: list[float]
    results: list[Any] = field(repr=False)

    @property
    def mean(self) -> float:
        """The mean of `values`."""
        return sum(self.values) / len(self.values)

    @property
    def standard_error(self) -> float:
        """The standard error of the mean: the sample standard deviation over the root of n."""
        mean, n = self.mean, len(self.values)
        return math.sqrt(sum((value - mean) ** 2 for value in self.values) / (n - 1) / n)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.standard_error:.4f} ({len(self.values)} seeds)"


def over_seeds(
    search: Callable[[int], Result | Sequence[Result]],
    seeds: Sequence[int],
    value: Callable[[Result], float] = lambda result: result.similarity,
) -> SeedStatistics:
    """Run a search with several seeds; mean and standard error of a number of its results.

    Args:
        search: a function of the seed, such as
            `lambda seed: invert(clip, images, SearchOptions(seed=seed))`. Several results of a seed
            count as their mean, since images vary otherwise than seeds do.
        seeds: two or more different numbers, 0 or more.
        value: the number of a result; by default its similarity.

    Raises:
        ArgumentError: fewer than two seeds, or one of them twice.
    """
    seeds = list(seeds)
    for seed in seeds:
        check_integer("seeds", seed, 0)
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ArgumentError("seeds", f"has to hold two or more different numbers but is {seeds}")
    values, results = [], []
    for seed in seeds:
        found = search(int(seed))
        several = list(found) if isinstance(found, Sequence) else [found]
        values.append(sum(map(value, several)) / len(several))
        results.append(found)
    return SeedStatistics(values, results)
