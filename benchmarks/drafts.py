"""Searches that begin on a cheaper text tower, and end with swaps on the CLIP itself.

For equal_work.py: the ways to do less work that were tried beside the presets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bench import Found, Method, Note, Problems
from quality import ours
from unseen import EVERY_WORD

from pez_core import Clip, SearchOptions, invert, load_clip
from pez_core.tower_work import count, counted

SWAPS = 8  # on the CLIP itself, half of those of the effort `fast`
SHARE = 0.5  # of the work of low-rank weights


@dataclass(frozen=True)
class Draft:
    """A CLIP in place of another.

    Attributes:
        clip: that is searched.
        share: of the work that is counted for it, since a low-rank product takes less than that of
            a matrix of its size.
    """

    clip: Clip
    share: float = 1.0


def small(clip: Clip) -> Draft:
    """Another CLIP with the same tokenizer."""
    return Draft(load_clip("emoji-clip"))


def first_half(clip: Clip) -> Draft:
    """The CLIP without the second half of the blocks of its text tower."""
    model = copy.deepcopy(clip.model)
    blocks = model.transformer.resblocks
    model.transformer.resblocks = blocks[: len(blocks) // 2]
    return Draft(_with_model(clip, model))


@torch.no_grad()
def low_rank(clip: Clip) -> Draft:
    """The CLIP with the nearest matrices of the rank whose two factors take `SHARE` of the work."""
    model = copy.deepcopy(clip.model)
    for weight in model.transformer.resblocks.parameters():
        if weight.ndim == 2:
            rank = int(SHARE * weight.numel() / sum(weight.shape))
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u[:, :rank] * s[:rank] @ v[:rank])
    return Draft(_with_model(clip, model), SHARE)


def _with_model(clip: Clip, model: Any) -> Clip:
    """A CLIP with another model, and the same tokenizer and vocabulary."""
    tokens = clip.trained_tokens
    return Clip(model, clip.tokenizer, clip.name, None if tokens is None else sorted(tokens))


def drafted(problems: Problems, note: Note, make: Callable[[Clip], Draft]) -> list[Found]:
    """The effort `fast` on a draft, then swaps from its prompt."""
    draft = make(problems.clip)
    with counted(alone=True) as work:
        first = ours(replace(problems, clip=draft.clip), lambda *_: None, effort="fast")
    count(work.flops * draft.share)
    options = SearchOptions(
        prompt_len=problems.prompt_len, effort="fast", steps=1, swaps=SWAPS, **EVERY_WORD
    )
    found = []
    for image, seed, one in zip(problems.images, problems.seeds, first, strict=True):
        own = replace(options, seed=seed, start_from=one.prompt)
        (result,) = invert(problems.clip, image.image, own)
        found += problems.found(result.prompt, result.similarity)
    return found


METHODS = {
    f"fast, {SWAPS} swaps": Method(partial(ours, effort="fast", swaps=SWAPS), budgeted=False),
    "fast, patience 4": Method(partial(ours, effort="fast", patience=4), budgeted=False),
    "balanced, patience 8": Method(partial(ours, effort="balanced", patience=8), budgeted=False),
    **{
        f"fast on {name}, then {SWAPS} swaps": Method(partial(drafted, make=make), budgeted=False)
        for name, make in (
            ("emoji-clip", small),
            ("half of the blocks", first_half),
            ("low-rank weights", low_rank),
        )
    },
}
