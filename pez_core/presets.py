"""How long to search and by what: three presets, and single settings in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .search import check_integer


@dataclass(frozen=True)
class Plan:
    """PEZ first, then swaps.

    Attributes:
        steps: of PEZ.
        refine_steps: of the refinement; 0: none.
        trials: versions of each prompt that are searched side by side.
        screened: swaps that each step of the refinement compares in the best version.
        word_weight: what the similarity of each word alone counts in the refinement, beside that
            of the prompt (see `pez_core.priors.WordsAlone`).
        open_ended: the refinement goes on until a time limit, whatever `refine_steps` says.
    """

    steps: int
    refine_steps: int
    trials: int
    screened: int
    word_weight: float = 0.0
    open_ended: bool = False

    @property
    def total(self) -> int:
        return self.steps + self.refine_steps


# benchmarks/quality.py measures what they find. More steps of PEZ before the swaps bring less than
# as much time for swaps, and more versions more than longer rounds.
PRESETS = {
    "fast": Plan(steps=20, refine_steps=32, trials=8, screened=64),
    "balanced": Plan(steps=30, refine_steps=56, trials=16, screened=128),
    "best": Plan(steps=60, refine_steps=640, trials=32, screened=256),
}

_READABLE_TRIALS = 4

# `Plan.word_weight` of prompts for images, where it raises the similarity to a CLIP that took no
# part (benchmarks/results/remedies.md). Words for a text are better chosen for what they mean
# together: with it distilled prompts are less similar.
WORD_WEIGHT = 0.035

# The paper's search has no refinement.
_PAPER = Plan(steps=3000, refine_steps=0, trials=1, screened=128)


def make_plan(
    preset: str | None,
    steps: int | None,
    refine_steps: int | None,
    time_limit: float | None = None,
    extra: bool = False,
    readability: float = 0.0,
) -> Plan:
    """The plan for what a caller has said.

    Args:
        preset: a name of `PRESETS`. None: "balanced", or the paper's search where `steps` are given
            or `extra` is.
        steps, refine_steps: in place of those of the preset.
        time_limit: with one and no `refine_steps`, a refinement goes on until it.
        extra: there is a loss beside the similarity; it cannot be refined.
        readability: above 0 a language model takes part in the refinement.

    Raises:
        TypeError, ValueError: an unknown preset, a number out of range, a refinement with an extra
            loss, or readability without a refinement.
    """
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        names = ", ".join(map(repr, PRESETS))
        raise ValueError(f"`preset` has to be one of {names} but is {preset!r}.")
    if steps is not None:
        check_integer("steps", steps, 1)
    if refine_steps is not None:
        check_integer("refine_steps", refine_steps, 0)
    if extra and (preset is not None or refine_steps):
        raise ValueError(
            "`extra` cannot be refined: each swap would cost as much as a step. Leave `preset` and "
            "`refine_steps` out and give `steps`."
        )
    paper = preset is None and (steps is not None or extra)
    plan = _PAPER if paper else PRESETS[preset or "balanced"]
    if paper and refine_steps:
        plan = replace(plan, trials=PRESETS["balanced"].trials)
    if readability and not (plan.refine_steps if refine_steps is None else refine_steps):
        raise ValueError(
            f"`readability` is {readability}, but it counts in the choice between swaps, of which "
            "there are none; give a `preset` or `refine_steps`."
        )
    if readability:  # a language model takes its time for each version
        plan = replace(plan, trials=min(plan.trials, _READABLE_TRIALS))
    open_ended = time_limit is not None and refine_steps is None and plan.refine_steps > 0
    return replace(
        plan,
        steps=plan.steps if steps is None else steps,
        refine_steps=plan.refine_steps if refine_steps is None else refine_steps,
        trials=1 if refine_steps == 0 else plan.trials,
        open_ended=open_ended,
    )
