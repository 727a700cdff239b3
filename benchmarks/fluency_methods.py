"""Two kinds of methods in benchmarks/fluency.py: SmolLM2 writes, and phrases are the units.

* `written_by_language_model`: the beam search of `pez_core.writing`, with a language model that
  reads text in the place of the bundled one, then swaps by its likelihood.
* `PhraseBeams`: a beam search over whole phrases joined by ", ", which the CLIP alone
  compares.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache
from unseen import ROOT

from pez_core import Clip, LanguageModel, SearchOptions, Vocabulary
from pez_core.baselines.interrogator import load_bank
from pez_core.best import BestSoFar
from pez_core.caption import Caption
from pez_core.objectives import Similarity
from pez_core.priors import ReadabilityPrior
from pez_core.problem import PromptTarget, prepare
from pez_core.readability import as_written
from pez_core.runner import refine_span
from pez_core.verify import verify
from pez_core.writing import WritingSettings, write

SAMPLED = ROOT / "build/token-lm/sampled.jsonl"
BEAMS = 12  # beginnings of prompts of phrases
COMPARED = 1024  # phrases behind each beginning


class WritingPrior(ReadabilityPrior):
    """A `ReadabilityPrior` that prompts can be written with, as with a `FluencyPrior`."""

    def reader(self, rows: int) -> TextReader:
        """A reader of prompts that begin with no learned token."""
        return TextReader(self, rows)


class TextReader:
    """Reads learned tokens as text, one by one; see `pez_core.priors.FluentReader`.

    The language model keeps the keys and values of what it has read. Rows whose words have fewer
    tokens of the language model than those of others are padded, and the padding is masked.

    Args:
        prior: the language model and the caption.
        rows: prompts that are read side by side.
    """

    def __init__(self, prior: WritingPrior, rows: int) -> None:
        self._prior, self._learned = prior, [[] for _ in range(rows)]
        self._texts = [self._text([])] * rows
        first = prior.language_model._rows(self._texts[:1])
        self._mask = torch.ones(1, 0, dtype=torch.long, device=prior.language_model.device)
        self._cache: Any = DynamicCache()
        # its name since transformers 5.24, and before
        names = signature(prior.language_model.model.forward).parameters
        self._keeps = "cache" if "cache" in names else "past_key_values"
        self._logits = self._extended(first).expand(rows, -1)
        self._mask = self._mask.expand(rows, -1)
        self._cache.batch_repeat_interleave(rows)
        self._unread: list[list[int]] = [[] for _ in range(rows)]

    def _text(self, learned: Sequence[int]) -> str:
        return as_written(" ".join(self._prior.caption.words_before(learned, len(learned))))

    @torch.no_grad()
    def _extended(self, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read tokens of the language model, at least one in each row.

        Returns:
            (rows, LM vocabulary) logits behind the last of each row.
        """
        device, longest = self._mask.device, max(map(len, pieces))
        counts = torch.tensor([len(piece) for piece in pieces], device=device)
        ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in pieces], device=device)
        steps = torch.arange(longest, device=device)
        places = self._mask.sum(dim=1, keepdim=True) + steps
        self._mask = torch.cat([self._mask, (steps < counts[:, None]).long()], dim=1)
        output = self._prior.language_model.model(
            ids,
            attention_mask=self._mask,
            position_ids=places,
            use_cache=True,
            **{self._keeps: self._cache},
        )
        return output.logits[torch.arange(len(ids), device=device), counts - 1].float()

    def next_tokens(self) -> torch.Tensor:
        """(rows, allowed) log-likelihood of each token that may come next."""
        if self._unread[0]:  # read only now, since nobody asks behind the last token
            self._logits = self._extended(self._unread)
            self._unread = [[] for _ in self._unread]
        model, table = self._prior.language_model, self._prior._table
        return model._look_up(self._logits, self._texts, table)

    def read(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> None:
        """Read (n,) tokens, each behind the prompt of one of (n,) `parents`; None: in order."""
        if parents is not None:
            self._choose(parents)
        model, texts = self._prior.language_model, self._texts
        self._learned = [[*a, b] for a, b in zip(self._learned, tokens.tolist(), strict=True)]
        self._texts = [self._text(row) for row in self._learned]
        added = [new[len(old) :] for old, new in zip(texts, self._texts, strict=True)]
        if model.opening:
            pairs = zip(texts, added, strict=True)
            added = [piece if old else f" {piece}" for old, piece in pairs]
        pieces = model._ids(added)
        self._unread = [[*a, *b] for a, b in zip(self._unread, pieces, strict=True)]

    def of(self, rows: torch.Tensor) -> TextReader:
        """A reader of some of the prompts, which goes on by itself."""
        other = copy(self)
        other._cache = deepcopy(self._cache)
        other._choose(rows)
        return other

    def _choose(self, rows: torch.Tensor) -> None:
        places = rows.tolist()
        self._learned = [self._learned[k] for k in places]
        self._texts = [self._texts[k] for k in places]
        self._unread = [self._unread[k] for k in places]
        rows = rows.to(self._mask.device)
        self._mask, self._logits = self._mask[rows], self._logits[rows]
        self._cache.batch_select_indices(rows)


def written_by_language_model(
    clip: Clip,
    model: LanguageModel,
    images: Sequence[Image.Image],
    options: SearchOptions,
    beams: int,
    swaps: bool = False,
) -> list[str]:
    """Prompts that a language model and the CLIP write together.

    Args:
        clip, images: of the search.
        model: from `load_language_model`.
        options: with a wording other than "free", and a time limit.
        beams: beginnings of each prompt.
        swaps: swap tokens in the second half of the time, compared by the same language model.
    """
    one = torch.ones(1)
    targets = [PromptTarget(row[None], one, one < 0) for row in clip.encode_images(images)]
    length = options.prompt_len or 8
    problem = prepare(clip, targets, options, length, Caption(clip, as_written=True), 0.0)
    prior = WritingPrior(
        model, clip.text.words, problem.caption, problem.space, options.read_weight
    )
    problem = replace(problem, readability=prior)
    left, trials = problem.time_left(1), problem.work.trials if swaps else 1
    settings = WritingSettings(
        steps=length,
        time_limit=left and (left / 2 if swaps else left),
        beams=beams,
        results=trials,
    )
    features = torch.stack([target.features for target in targets])
    reads: Any = prior  # `write` asks for the reader and the score alone
    found = write(
        problem.space,
        Similarity(problem.encoder, features),
        reads,
        length,
        settings,
        acceptable=problem.space.only_allowed(problem.acceptable),
        seeds=problem.search_seeds,
    )
    best, every = BestSoFar(problem), slice(0, len(targets))
    best.take(every, found)
    if swaps:
        refine_span(problem, best, every, 1, found, None)
    # without the perplexity of each result, which nobody asked for
    return [result.prompt for result in verify(replace(problem, readability=None), best)]


def phrases(file: Path = SAMPLED) -> list[str]:
    """The phrases of CLIP Interrogator and those of sampled captions, split at commas."""
    found = {one for kind, few in load_bank().items() if kind != "negative" for one in few}
    for line in file.read_text("utf-8").splitlines():
        found |= {part.strip() for part in json.loads(line)["text"].split(",") if part.strip()}
    return sorted(found)


def usable(clip: Clip, texts: Sequence[str], prompt_len: int) -> list[tuple[int, ...]]:
    """The tokens of the phrases that fit, of the words that the other methods have."""
    words = {token for (token,) in SearchOptions().allowed.lexicon(clip).phrases}
    lexicon = SearchOptions(vocabulary=Vocabulary(only=texts)).allowed.lexicon(clip)
    return sorted(p for p in lexicon.phrases if len(p) <= prompt_len and words.issuperset(p))


class PhraseBeams:
    """A beam search over whole phrases.

    The phrases that are most similar to the image by themselves are compared exactly behind each
    beginning, joined by a comma. The search ends when none fits or no longer prompt is better. It
    draws nothing.

    Args:
        clip: of the search.
        bank: the tokens of the phrases, from `usable`.
        prompt_len: tokens of a prompt at most, the commas among them.
    """

    def __init__(self, clip: Clip, bank: Sequence[tuple[int, ...]], prompt_len: int) -> None:
        self.clip, self.bank, self.prompt_len = clip, bank, prompt_len
        self._comma = tuple(clip.text.words.encode_behind(","))
        self._encode = clip.text.encoder()
        self._features = torch.empty(len(bank), clip.feature_size, device=clip.device)
        for places in self._by_length(range(len(bank))):
            for few in places.split(1024):
                rows = torch.tensor([bank[k] for k in few.tolist()])
                self._features[few] = self._encoded(rows.to(clip.device))

    @torch.no_grad()
    def _encoded(self, rows: torch.Tensor) -> torch.Tensor:
        table = self.clip.text.token_embedding
        features = self._encode(torch.nn.functional.embedding(rows, table).float())
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def _by_length(self, places: Sequence[int]) -> list[torch.Tensor]:
        """Numbers of phrases in groups of the same length."""
        groups: dict[int, list[int]] = defaultdict(list)
        for place in places:
            groups[len(self.bank[place])].append(place)
        return [torch.tensor(group) for group in groups.values()]

    @torch.no_grad()
    def find(self, feature: torch.Tensor, seconds: float) -> str:
        """The prompt of a (features,) image feature, within seconds by `time.monotonic`."""
        ends = time.monotonic() + seconds
        alone = self._features @ feature
        similar = alone.topk(min(len(self.bank), COMPARED)).indices.tolist()
        beams = [(alone[k].item(), (k,)) for k in similar[:BEAMS]]
        best = beams[0]
        while beams:
            longer: list[tuple[float, tuple[int, ...]]] = []
            for _, beam in beams:
                if time.monotonic() >= ends:
                    break
                longer += self._behind(beam, similar, feature)
            beams = sorted(longer, reverse=True)[:BEAMS]
            if not beams or beams[0][0] <= best[0]:
                break
            best = beams[0]
        return as_written(self.clip.text.words.decode(self._tokens(best[1])))

    def _tokens(self, beam: Sequence[int]) -> list[int]:
        ids = list(self.bank[beam[0]])
        for place in beam[1:]:
            ids += [*self._comma, *self.bank[place]]
        return ids

    def _behind(
        self, beam: tuple[int, ...], similar: Sequence[int], feature: torch.Tensor
    ) -> list[tuple[float, tuple[int, ...]]]:
        """The best few phrases behind a beginning, with their similarities."""
        begun = [*self._tokens(beam), *self._comma]
        room, table = self.prompt_len - len(begun), self.clip.text.token_embedding
        fits = [k for k in similar if len(self.bank[k]) <= room and k not in beam]

        def embed(rows: list) -> torch.Tensor:
            ids = torch.tensor(rows, device=table.device)
            return torch.nn.functional.embedding(ids, table).float()

        rest = Similarity(self._encode, feature[None, None]).given(embed([begun]))
        found = []
        for places in self._by_length(fits):
            numbers = places.tolist()
            _, scores = rest(embed([self.bank[k] for k in numbers]), 0)
            found += [(s, (*beam, k)) for s, k in zip(scores.tolist(), numbers, strict=True)]
        return sorted(found, reverse=True)[:BEAMS]
