"""The end of a search: the prompts as printed, encoded again the public way, and ranked."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .articles import with_right_articles
from .best import BestSoFar
from .caption import Caption
from .problem import Problem, PromptTarget, uses_language_model
from .results import Candidate, Result
from .swaps import ROWS
from .tags import Tags

if TYPE_CHECKING:
    from .clip import AnyClip

log = logging.getLogger(__name__)

# Similarity that the order of tags may cost. More is lost in few prompts, but much in these.
_ORDER_COSTS = 0.01


def verify(problem: Problem, best: BestSoFar) -> list[Result]:
    """Results whose similarities are those of the printed text, encoded again the public way."""
    clip, caption, restarts = problem.clip, problem.caption, problem.options.restarts
    rows, seen = best.ids.tolist(), None
    if problem.options.published:
        table = clip.text.token_embedding.detach()
        with torch.no_grad():
            seen = F.normalize(
                problem.encoder(F.embedding(best.ids, table).float()).float(), dim=-1
            )
    else:
        rows = [_round_trip(clip, caption, row) for row in rows]
    if problem.options.wording == "tags" and not caption.inserts:
        rows = _by_importance(problem, rows)
    if uses_language_model(problem.options):
        rows = [_with_right_articles(problem, row) for row in rows]
    texts = [caption.text(row) for row in rows]
    features, extra = _features_of(problem, rows, texts), problem.options.extra_loss
    losses = None if extra is None else extra.losses(texts, problem.owners).tolist()
    seconds = time.monotonic() - problem.began
    results, note = [], f"{caption.note(problem.prompt_len)} {_note(problem)}".strip()
    for k in range(len(problem.targets)):
        span = slice(k * restarts, (k + 1) * restarts)
        extras: list[dict[str, Any]] = [
            {"trajectory": best.trajectories.get(n)} for n in range(span.start, span.stop)
        ]
        if seen is not None:
            shares = _shares(problem.targets[k])
            loop = (seen[span] @ problem.targets[k].features.T @ shares).tolist()
            extras = [one | {"loop_similarity": s} for one, s in zip(extras, loop, strict=True)]
        found = losses and losses[span]
        ranked = _ranked(problem, k, rows[span], features[span], found, extras)
        results.append(
            Result(
                **vars(ranked[0]),
                candidates=ranked,
                history=best.history[k],
                seconds=seconds,
                note=f"{best.note(k)} {note}".strip(),
            )
        )
    return results


def _note(problem: Problem) -> str:
    """Remarks on options that had no effect, "" where there are none."""
    unused = problem.options.settings_of_pez if problem.writer else []
    names, remarks = " and ".join(f"`{name}`" for name in unused), []
    if names:
        remarks.append(
            f"Without effect: {names}, since the prompt was written in place of Algorithm 1, and "
            "all phrases of the vocabulary are single tokens."
        )
    if problem.lacks_words:
        remarks.append(
            "Words may occur twice, since the vocabulary has fewer than two for each token."
        )
    return " ".join(remarks)


def _by_importance(problem: Problem, rows: list[list[int]]) -> list[list[int]]:
    """Tags in order, each before those whose loss would cost less similarity.

    Where this costs too much or is refused, only the first of them is moved, or none.
    """
    caption = problem.caption
    (comma,) = problem.clip.text.words.encode_behind(",")
    tags = [Tags.of(row, comma, caption.before, caption.after) for row in rows]
    without = _similarities(problem, [one.without() for one in tags])
    orders = [one.orders(scores) for one, scores in zip(tags, without, strict=True)]
    orders = [[*few, row] for few, row in zip(orders, rows, strict=True)]

    def best(few: list[list[int]], scores: list[float]) -> list[int]:
        least = scores[-1] - _ORDER_COSTS
        good = (row for row, score in zip(few, scores, strict=True) if score >= least)
        return next((row for row in good if _passes(problem, row)), few[-1])

    found = zip(orders, _similarities(problem, orders), strict=True)
    return [best(few, scores) for few, scores in found]


@torch.no_grad()
def _similarities(problem: Problem, groups: Sequence[list[list[int]]]) -> list[list[float]]:
    """Similarities of learned tokens, of any lengths: a group of each search, with its target."""
    pairs = zip(problem.owners, groups, strict=True)
    rows = [(row, owner) for owner, group in pairs for row in group]
    found = [0.0] * len(rows)
    for n in {len(row) for row, _ in rows}:
        places = [k for k, (row, _) in enumerate(rows) if len(row) == n]
        ids = torch.tensor([rows[k][0] for k in places], device=problem.ids.device)
        encode = replace(problem, prompt_len=n).encoder
        parts = [encode(problem.space.embed(part)).float() for part in ids.split(ROWS)]
        towards = torch.stack([problem.targets[rows[k][1]].towards for k in places])
        values = (F.normalize(torch.cat(parts), dim=-1) * towards).sum(dim=1)
        for k, value in zip(places, values.tolist(), strict=True):
            found[k] = value
    scores = iter(found)
    return [[next(scores) for _ in group] for group in groups]


def _with_right_articles(problem: Problem, ids: list[int]) -> list[int]:
    """The learned tokens with the right articles, unless the prompt cannot be printed so."""
    words, allowed = problem.clip.text.words, frozenset(problem.space.allowed.tolist())
    right = with_right_articles(ids, words.decode, words.encode, allowed)
    return right if _passes(problem, right) else ids


def _passes(problem: Problem, ids: list[int]) -> bool:
    """Whether learned tokens round-trip and are acceptable."""
    good = problem.space.only_allowed(problem.acceptable)
    rows = torch.tensor([ids], device=problem.space.table.device)
    return problem.caption.round_trips(ids) and (good is None or bool(good(rows).all()))


def _features_of(problem: Problem, rows: list[list[int]], texts: list[str]) -> torch.Tensor:
    """(rows, features) of printed prompts, in contexts where they are longer than one."""
    clip, caption = problem.clip, problem.caption
    if caption.contexts(problem.prompt_len) is None:
        return clip.encode_texts(texts)
    cut = [caption.cut(caption.reread(row)) for row in rows]
    return torch.stack([clip.encode_chunks(parts) for parts in cut])


def _ranked(
    problem: Problem,
    k: int,
    rows: list[list[int]],
    features: torch.Tensor,
    losses: list[float] | None,
    extras: list[dict[str, Any]],
) -> list[Candidate]:
    """Candidates of target `k`, best first.

    Args:
        problem: of the search.
        k: number of the target.
        rows: the learned ids of each candidate.
        features: (candidates, features) of their printed text.
        losses: the extra loss of each; None: there is none.
        extras: further fields of each.
    """
    clip, caption, target = problem.clip, problem.caption, problem.targets[k]
    products = features @ target.features.T
    towards, shares = ~target.avoid, _shares(target)
    similarity = (products @ shares).tolist()
    parts, targets = clip.split(features), clip.split(target.features)
    by_encoder = {name: (parts[name] @ targets[name].T @ shares).tolist() for name in parts}
    perplexities = problem.readability and problem.readability.perplexities(rows)
    candidates = [
        Candidate(
            prompt=caption.print(row),
            similarity=similarity[n],
            token_ids=caption.reread(row) if problem.options.published else caption.ids(row),
            learned=caption.learned(row),
            similarities=products[n][towards].tolist(),
            avoided=products[n][target.avoid].tolist(),
            encoders={name: values[n] for name, values in by_encoder.items()},
            extra_loss=losses[n] if losses else None,
            perplexity=perplexities[n] if perplexities else None,
            **extras[n],
        )
        for n, row in enumerate(rows)
    ]
    scores = _final_scores(problem, target, rows, features, losses)
    return [candidates[n] for n in sorted(range(len(rows)), key=lambda n: -scores[n])]


def _shares(target: PromptTarget) -> torch.Tensor:
    """(n,) shares of the targets in the similarity that is reported, summing to 1."""
    towards = (~target.avoid).any()
    shares = target.weights.clamp(min=0) if towards else target.weights.abs()
    return shares / shares.sum()


def _final_scores(
    problem: Problem,
    target: PromptTarget,
    rows: list[list[int]],
    features: torch.Tensor,
    losses: list[float] | None,
) -> list[float]:
    """The scores that candidates are ranked by; arguments as in `_ranked`."""
    if target.direction is None:
        scores = (features @ target.features.T @ target.weights).tolist()
    else:
        scores = (features @ target.direction).tolist()
    extra = problem.options.extra_loss
    if losses is not None and extra is not None:
        weight = extra.weight
        pairs = zip(scores, losses, strict=True)
        scores = [(1 - weight) * score - weight * loss for score, loss in pairs]
    if problem.readability is not None:
        added = problem.readability.scores_of(rows)
        scores = [a + b for a, b in zip(scores, added, strict=True)]
    return scores


def _round_trip(clip: AnyClip, caption: Caption, ids: list[int]) -> list[int]:
    """`ids` if they round-trip through the tokenizer, else the tokens of their printed text."""
    words, limit = clip.text.words, len(ids)
    if caption.round_trips(ids):
        return ids
    log.warning("The prompt found does not round-trip; taking the tokens of its printed text.")
    good = words.round_trips, words.round_trips_inside
    ids = [i for i in caption.encode(words.decode(ids)) if any(g([i]) for g in good)][:limit]
    while ids and not caption.round_trips(ids):
        ids.pop()
    return ids or caption.encode(words.decode(clip.vocabulary[:1].tolist()))
