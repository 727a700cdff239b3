"""Prompts written from left to right, by a CLIP and a language model together.

A beam search: each step puts one token behind each of several beginnings. The language model and
the gradient of the similarity propose tokens, and the beginnings with the highest sum of similarity
and likelihood stay. VGD (Kim et al. 2025, "Visually Guided Decoding", section 3) ranks the
proposals of a language model by a CLIP in the same way; it has no gradient to propose tokens that
the language model alone finds unlikely, and nothing changes what is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .errors import check_integer
from .priors import FluencyPrior
from .space import TokenSpace
from .swaps import ROWS, RefinableObjective, scores_behind
from .tracker import Acceptable, Budget, Callback, Progress, Tracker

# A proposed token is at most this much less likely than the likeliest one, in nats.
_UNLIKELY = 9.0
# Likeliest tokens at which the gradient is taken; their mean is a better guide than one of them.
_PROBES = 4
# Probes of all searches whose gradients are taken at once. They hold about as much memory as the
# candidates of swaps; where there are more searches, one probe of each of 8 beginnings holds less
# than the 4 trials of PEZ (three quarters with 8 tokens, a third with 75).
_PROBED = ROWS // 8
# Standard deviations of the noise in the similarities, by which seeds and restarts differ. More
# makes restarts more different, and each of them a little worse.
_NOISE, _NOISE_OF_RESTARTS = 0.004, 0.03


@dataclass(frozen=True)
class WritingSettings(Budget):
    """Settings of `write`; there is a step for each token.

    Attributes:
        beams: beginnings of each prompt that are written side by side, at least 1.
        proposals: tokens that are compared behind each beginning, at least 1.
        results: prompts that are returned for each problem, from 1 to `beams`.

    Raises:
        ArgumentError: a value is out of range.
    """

    beams: int = 8
    proposals: int = 48
    results: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("beams", self.beams, 1)
        check_integer("proposals", self.proposals, 1)
        check_integer("results", self.results, 1, self.beams)


def write(
    space: TokenSpace,
    objective: RefinableObjective,
    prior: FluencyPrior,
    prompt_len: int,
    settings: WritingSettings,
    callback: Callback | None = None,
    acceptable: Acceptable | None = None,
    *,
    seeds: Sequence[int],
    firsts: Sequence[bool] | None = None,
    start: torch.Tensor | None = None,
) -> Progress:
    """Write a prompt for each problem.

    Args:
        space: its allowed tokens.
        objective: as in `pez_core.swaps.refine`.
        prior: the likelihood of a prompt.
        prompt_len: tokens to write.
        settings: see `WritingSettings`; `steps` has to be `prompt_len`.
        callback: as in `pez_core.search`. Until the end its prompts are those that the language
            model alone would write.
        acceptable: as in `pez_core.search`. Of fewer than `prompt_len` ids it says whether a
            prompt may begin with them.
        seeds: one int per problem, for the differences between restarts.
        firsts: True for the first restart of a target; the others get more noise, so that their
            prompts differ more. None: True for all.
        start: (problems * results, prompt_len) acceptable ids, in the place of prompts that the
            language model alone would write and that are not acceptable. None: these stay, with
            the score -inf.

    Returns:
        A `Progress` with (problems * results, prompt_len) ids, those of the first problem first.
    """
    results = settings.results
    noise = [_NOISE if first else _NOISE_OF_RESTARTS for first in firsts or [True] * len(seeds)]
    beams = _Beams(space, objective, prior, settings, acceptable, seeds, noise)
    plain = beams.finished(prompt_len).repeat_interleave(results, dim=0)
    if acceptable is not None and start is not None:
        plain = torch.where(acceptable(plain)[:, None], plain, start)
    tracker = Tracker(plain, settings, callback, acceptable)

    @torch.no_grad()
    def update(ids: torch.Tensor) -> None:
        _, scores = objective(space.embed(ids), 0)
        tracker.update(ids, scores, scores + prior.score(ids))

    update(plain)
    for k in range(prompt_len):
        beams.write()
        if k + 1 == prompt_len:
            update(beams.finished(prompt_len, results))
        if tracker.end_step():
            break
    progress = tracker.progress
    if progress.step < prompt_len:
        update(beams.finished(prompt_len, results))
        progress.ids, progress.scores = tracker.ids.clone(), tracker.scores.clone()
    return progress


class _Beams:
    """Beginnings of prompts, those of the first problem first.

    There is one of each problem before the first token, and `beams` behind it.

    Attributes:
        ids: their tokens.
        likely: (rows,) sums of log-likelihoods.
        totals: (rows,) what they are ranked by; -inf for those that do not exist yet.
    """

    def __init__(
        self,
        space: TokenSpace,
        objective: RefinableObjective,
        prior: FluencyPrior,
        settings: WritingSettings,
        acceptable: Acceptable | None,
        seeds: Sequence[int],
        noise: Sequence[float],
    ) -> None:
        self.space, self.objective, self.prior, self.settings = space, objective, prior, settings
        self.acceptable = acceptable
        self.problems, device = len(seeds), space.table.device
        self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self.noise = noise
        self.ids = torch.empty(self.problems, 0, dtype=torch.long, device=device)
        self.likely = torch.zeros(self.problems, device=device)
        self.totals = torch.zeros(self.problems, device=device)
        self.reader = prior.reader(self.problems)

    def write(self) -> None:
        """Put one more token behind each beginning."""
        tokens, likely = self._proposals()
        with torch.no_grad():
            rest = self.objective.given(self.space.embed(self.ids))
            scores = scores_behind(self.space, rest, tokens[:, :, None], 0)
        scores = scores + self._noise(tokens.shape[1])
        likely = self.likely[:, None] + likely
        written = self.ids.shape[1] + 1
        totals = scores + self.prior.weight * likely / written
        totals = totals.masked_fill(self.totals.isinf()[:, None], -torch.inf)
        self._keep(tokens, likely, totals)

    def _keep(self, tokens: torch.Tensor, likely: torch.Tensor, totals: torch.Tensor) -> None:
        """Keep the best of (rows, count) longer beginnings of each problem."""
        beams, count = len(self.ids) // self.problems, tokens.shape[1]
        totals = totals.view(self.problems, -1)
        totals = F.pad(totals, (0, max(0, self.settings.beams - totals.shape[1])), value=-torch.inf)
        first = torch.arange(self.problems, device=tokens.device)[:, None] * beams

        def picks(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return first + (places // count).clamp(max=beams - 1), places % count

        def longer(places: torch.Tensor) -> torch.Tensor:
            parents, _ = found = picks(places)
            return torch.cat([self.ids[parents], tokens[found][..., None]], dim=2)

        best, places = self._best(totals, self.settings.beams, longer)
        parents, _ = found = picks(places)
        self.ids = longer(places).flatten(0, 1)
        self.likely, self.totals = likely[found].flatten(), best.flatten()
        self.reader.read(tokens[found].flatten(), parents.flatten())

    def _best(
        self, totals: torch.Tensor, count: int, longer: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of some beginnings that a prompt may have.

        Args:
            totals: (rows, n) what they are ranked by.
            count: how many of each row are the best.
            longer: (rows, k) places -> (rows, k, tokens) beginnings. Only those that may be kept
                are checked, since a check costs more than a comparison.

        Returns:
            (rows, count) totals, -inf where there are fewer that are acceptable, and their places.
        """
        checked = torch.zeros_like(totals, dtype=torch.bool)
        while True:
            best, places = totals.topk(count, dim=1)
            if self.acceptable is None:
                return best, places
            new = best.isfinite() & ~checked.gather(1, places)
            if not new.any():
                return best, places
            refused = new.clone()
            refused[new] = ~self.acceptable(longer(places)[new])
            checked.scatter_(1, places, True)
            totals = totals.scatter(1, places, best.masked_fill(refused, -torch.inf))

    def _proposals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, proposals) tokens to compare behind each beginning, and their log-likelihoods."""
        space, settings = self.space, self.settings
        likely = self.reader.next_tokens().masked_fill(space.taken(self.ids), -torch.inf)
        usual = likely.topk(min(_PROBES, likely.shape[1]), dim=1).indices
        rest = self.objective.given(space.embed(self.ids))
        gradient = torch.zeros_like(space.embed(usual[:, :1]))
        for part in usual.split(max(1, _PROBED // len(usual)), dim=1):
            with torch.enable_grad():
                probes = space.embed(space.allowed[part])[:, :, None].requires_grad_()
                loss, _ = rest(probes.flatten(0, 1), 0)
                (one,) = torch.autograd.grad(loss.sum(), probes)
            gradient += one.sum(dim=1)
        promise = -space.products(gradient[:, 0] / usual.shape[1])
        promise = promise + self.prior.weight * likely / (self.ids.shape[1] + 1)
        least = likely.max(dim=1, keepdim=True).values - _UNLIKELY
        promise = promise.masked_fill(likely < least, -torch.inf)
        places = promise.topk(min(settings.proposals, promise.shape[1]), dim=1).indices
        return space.allowed[places], likely.gather(1, places)

    def _noise(self, count: int) -> torch.Tensor:
        """(rows, count)."""
        pairs = zip(self.noise, self.generators, strict=True)
        rows = [s * torch.randn(self.settings.beams, count, generator=g) for s, g in pairs]
        beams = len(self.ids) // self.problems
        return torch.cat([some[:beams] for some in rows]).to(self.totals.device)

    @torch.no_grad()
    def finished(self, prompt_len: int, results: int = 1) -> torch.Tensor:
        """(problems * results, prompt_len): the best beginnings as whole prompts.

        The language model alone continues those that are too short.
        """
        beams = len(self.ids) // self.problems
        best = self.totals.view(self.problems, beams).topk(results, dim=1).indices
        first = torch.arange(self.problems, device=best.device)[:, None] * beams
        rows = (first + best).flatten()
        ids, reader = self.ids[rows], self.reader.of(rows)
        while ids.shape[1] < prompt_len:
            likely = reader.next_tokens().masked_fill(self.space.taken(ids), -torch.inf)

            def longer(places: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
                return torch.cat([ids, self.space.allowed[places]], dim=1)[:, None]

            ids = longer(self._best(likely, 1, longer)[1])[:, 0]
            reader.read(ids[:, -1])
        return ids
