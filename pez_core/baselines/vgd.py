"""VGD, a beam search of a language model that a CLIP ranks."""

from __future__ import annotations

import torch

from ..priors import FluencyPrior
from ..space import TokenSpace
from ..swaps import RefinableObjective
from ..tracker import Acceptable, Budget, Callback, Progress, Tracker

BEAMS, EXPANSIONS = 10, 10
CLIP_WEIGHT = 1.5
_LOGIT_SCALE = 100.0  # of CLIP


@torch.no_grad()
def vgd(
    space: TokenSpace,
    objective: RefinableObjective,
    prior: FluencyPrior,
    prompt_len: int,
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    beams: int = BEAMS,
    expansions: int = EXPANSIONS,
    clip_weight: float = CLIP_WEIGHT,
) -> Progress:
    """Visually Guided Decoding (Kim et al., ICLR 2025, section 3), for one image.

    Behind each beginning the likeliest tokens of the language model are compared. A beginning is
    ranked by the sum over its tokens of the log-likelihood and of `clip_weight` times the logarithm
    of the softmax of the CLIP's logits over all that were compared. The original has Llama; the
    settings are those of its evaluation.

    Args:
        space: its allowed tokens.
        objective: as in `pez_core.swaps.refine`, of one problem.
        prior: its language model, whose weight does not count.
        prompt_len: tokens to write.
        callback, acceptable: as in `pez_core.search`.
        beams: beginnings that are kept.
        expansions: tokens that are compared behind each.
        clip_weight: see above.

    Returns:
        A `Progress` with (1, prompt_len) ids: of the last beginnings the most similar prompt.
    """
    device = space.table.device
    ids = torch.empty(1, 0, dtype=torch.long, device=device)
    ranks = torch.zeros(1, device=device)
    reader = prior.reader(1)
    plain = space.allowed[:1].repeat(1, prompt_len)
    tracker = Tracker(plain, Budget(steps=prompt_len), callback, acceptable)
    for _ in range(prompt_len):
        likely = reader.next_tokens().masked_fill(space.taken(ids), -torch.inf)
        values, places = likely.topk(min(expansions, likely.shape[1]), dim=1)
        tokens = space.allowed[places]
        rest = objective.given(space.embed(ids))
        _, scores = rest(space.embed(tokens)[:, :, None].flatten(0, 1), 0)
        guided = (_LOGIT_SCALE * scores).log_softmax(0).view(values.shape)
        totals = (ranks[:, None] + values + clip_weight * guided).flatten()
        ranks, best = totals.topk(min(beams, len(totals)))
        parents, picks = best // tokens.shape[1], tokens.flatten()[best]
        ids = torch.cat([ids[parents], picks[:, None]], dim=1)
        reader.read(picks, parents)
        if ids.shape[1] == prompt_len:
            top = scores[best].argmax()
            tracker.update(ids[top][None], scores[best][top][None])
        if tracker.end_step():
            break
    return tracker.progress
