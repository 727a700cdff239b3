"""The tasks people have, each joining a CLIP, targets, an objective and the search."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .objectives import Similarity
from .search import Progress, Settings, check_integer, search
from .space import TokenSpace

if TYPE_CHECKING:
    from .clip import Clip
    from .clip.images import ImageInput

log = logging.getLogger(__name__)

Callback = Callable[[dict], bool | None]


@dataclass(frozen=True)
class Candidate:
    """A prompt that one restart found.

    Attributes:
        prompt: the text.
        similarity: cosine similarity of the text, encoded again by the public tokenizer and the
            whole text tower, with its target image (their mean for several images).
        token_ids: the tokens of the text, without start and end token.
    """

    prompt: str
    similarity: float
    token_ids: list[int]


@dataclass(frozen=True)
class Result(Candidate):
    """What a task returns: the best candidate and how it was found.

    Attributes:
        candidates: one per restart, best first; the first is this result's own prompt.
        history: `(step, best similarity so far)`, one per report.
        seconds: of the whole search that this result came from, shared by all of a batch.
    """

    candidates: list[Candidate] = field(repr=False)
    history: list[tuple[int, float]] = field(repr=False)
    seconds: float


def invert(
    clip: Clip,
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
    prompt_len: int = 16,
    steps: int = 3000,
    restarts: int = 1,
    lr: float = 0.1,
    weight_decay: float = 0.1,
    seed: int = 0,
    callback: Callback | None = None,
    *,
    shared: bool = False,
    whole_vocabulary: bool = False,
    patience: int | None = None,
) -> Result | list[Result]:
    """Find a short text prompt that CLIP finds similar to an image (paper, section 4).

    Every image and every restart is a problem of its own in one batch. A result depends on its
    image and the settings, not on what else is in the batch.

    Args:
        clip: from `load_clip`.
        images: a PIL image, a path, or a (H, W, 3) / (3, H, W) tensor in [0, 1]; or a list of these
            or a (N, H, W, 3) / (N, 3, H, W) batch.
        prompt_len: tokens to learn, from 1 to what the context holds (75 for CLIP).
        steps: optimisation steps, at least 1.
        restarts: independent searches per image from different random prompts, at least 1.
        lr: AdamW learning rate.
        weight_decay: AdamW weight decay.
        seed: of the initial prompts; restart r starts from `seed + r`. The same seed gives the same
            prompts on the CPU.
        callback: gets one dict per report: `step`, `steps`, `prompt` and `similarity` of the best
            so far, `prompts` and `similarities` with the best of each result, `elapsed` seconds.
            A true return value ends the search; the best so far is returned.
        shared: learn one prompt for all images, by the mean of their similarities.
        whole_vocabulary: search every row of the embedding table, as the paper does, instead of the
            CLIP's default vocabulary. Only prompts that survive being printed count.
        patience: end a problem that has not improved for this many steps; None: never.

    Returns:
        One `Result` for a single image or with `shared`, else a list in the order of the images.

    Raises:
        TypeError, ValueError: an argument is out of range or an image cannot be read.
    """
    from .clip.images import load_images

    pictures, single = load_images(images)
    check_integer("prompt_len", prompt_len, 1, clip.text.max_prompt_len)
    check_integer("restarts", restarts, 1)
    check_integer("seed", seed, 0)
    settings = Settings(steps=steps, lr=lr, weight_decay=weight_decay, patience=patience)

    with torch.inference_mode(False):
        features = clip.encode_images(pictures)
        targets = features[None] if shared else features[:, None]
        allowed = None if whole_vocabulary else clip.vocabulary
        results = _learn(
            clip, targets, prompt_len, settings, restarts, seed, callback, allowed=allowed
        )
    return results[0] if single or shared else results


def _learn(
    clip: Clip,
    targets: torch.Tensor,
    prompt_len: int,
    settings: Settings,
    restarts: int,
    seed: int,
    callback: Callback | None,
    allowed: torch.Tensor | None,
) -> list[Result]:
    """(n, m, features) unit targets -> n results, each the best of `restarts` searches."""
    began = time.monotonic()
    space = TokenSpace(clip.text.token_embedding, allowed)
    # The same initial prompts for every target, so that a result does not depend on its neighbours;
    # of tokens that survive, so that the first step finds an acceptable prompt even where the whole
    # vocabulary is searched.
    generators = [torch.Generator().manual_seed((seed + r) % 2**63) for r in range(restarts)]
    picks = [torch.randint(len(clip.vocabulary), (1, prompt_len), generator=g) for g in generators]
    starts = clip.vocabulary[torch.cat(picks).to(clip.vocabulary.device)]
    n = len(targets)
    ids = starts.repeat(n, 1)  # problem k belongs to target k // restarts
    objective = Similarity(clip.text.encoder(), targets.repeat_interleave(restarts, dim=0))
    words = clip.text.words

    def survive(ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([words.survives(row) for row in ids.tolist()], device=ids.device)

    def report(progress: Progress) -> bool | None:
        scores, best = progress.scores.view(n, restarts).max(dim=1)
        chosen = progress.ids.view(n, restarts, -1)[torch.arange(n, device=best.device), best]
        prompts = [words.decode(row) for row in chosen.tolist()]
        similarities = scores.tolist()
        top = max(range(n), key=similarities.__getitem__)
        return callback(
            {
                "step": progress.step,
                "steps": progress.steps,
                "prompt": prompts[top],
                "similarity": similarities[top],
                "prompts": prompts,
                "similarities": similarities,
                "elapsed": time.monotonic() - began,
            }
        )

    # Asking costs a wait for the device, so it is left out where it cannot make a difference.
    everything_survives = allowed is not None and words.separable
    found = search(
        space,
        objective,
        ids,
        settings,
        report if callback else None,
        acceptable=None if everything_survives else survive,
    )
    candidates = _verify(clip, found.ids.tolist(), targets.repeat_interleave(restarts, dim=0))
    seconds = time.monotonic() - began
    results = []
    for k in range(n):
        rows = slice(k * restarts, (k + 1) * restarts)
        ranked = sorted(candidates[rows], key=lambda c: -c.similarity)
        results.append(
            Result(
                ranked[0].prompt,
                ranked[0].similarity,
                ranked[0].token_ids,
                candidates=ranked,
                history=[(step, max(scores[rows])) for step, scores in found.history],
                seconds=seconds,
            )
        )
    return results


def _verify(clip: Clip, rows: list[list[int]], targets: torch.Tensor) -> list[Candidate]:
    """Candidates as their printed text is read: (n) id rows and (n, m, features) unit targets."""
    rows = [_readable(clip, row) for row in rows]
    prompts = [clip.text.words.decode(row) for row in rows]
    features = clip.encode_texts(prompts)
    similarities = torch.einsum("nd,nmd->nm", features, targets).mean(dim=1).tolist()
    return [Candidate(p, s, r) for p, s, r in zip(prompts, similarities, rows, strict=True)]


def _readable(clip: Clip, ids: list[int]) -> list[int]:
    """`ids` if they survive being printed, else those of the text that they print as."""
    words, limit = clip.text.words, len(ids)
    if words.survives(ids):
        return ids
    log.warning("The prompt found does not survive being printed; taking the tokens it prints as.")
    ids = [i for i in words.encode(words.decode(ids)) if words.survives([i])][:limit]
    while ids and not words.survives(ids):
        ids.pop()
    return ids or clip.vocabulary[:1].tolist()
