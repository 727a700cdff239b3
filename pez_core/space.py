"""The discrete space that prompts live in: an embedding table and what may be made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F

from .errors import ArgumentError
from .precision import bfloat16_pays

# Similarities held at once while projecting: 2**26 floats are 256 MB.
_CHUNK = 2**26
# Tokens compared at once on the CPU, where a block of similarities should stay in the cache.
_CPU_BLOCK = 2**14
# A table of fewer numbers is compared exactly at once; with others so many tokens are, behind a
# look at all in bfloat16.
_LARGE_TABLE, _LOOKED_AT = 2**23, 32
# A dot product of unit vectors in bfloat16 is wrong by less: three roundings, each by 2**-9.
_ROUNDING = 3 * 2**-9


class TokenSpace:
    """The embedding table of a text encoder, with the tokens that prompts may be made of.

    `embed(ids)` looks embeddings up. `nearest(embeddings)` has the ids of the allowed tokens with
    the highest cosine similarity. `random(problems, prompt_len, generator)` draws allowed ids to
    start from.

    Args:
        table: (vocab_size, dim) token embeddings of any dtype; computations are in float32. For
            several encoders with the same tokenizer their tables side by side, as with
            `torch.cat(tables, dim=1)`.
        allowed: int64 ids that prompts may be made of, sorted. None: all of 0 to vocab_size - 1.
        parts: a pair (columns, weight) for each encoder in `table`, from left to right: the number
            of its columns, and the weight of its cosine in the weighted mean by which `nearest`
            compares tokens. None: one encoder.
        once: int64 ids that a prompt holds once at most. There have to be more of them than tokens
            in a prompt and in `beside`. None: every id may repeat.
        beside: ids of the fixed text around a prompt, which count for `once`.

    Raises:
        ArgumentError: `allowed` is empty or holds ids outside the table.
    """

    # nothing in it synchronises with the device; see `pez_core.capture`
    capturable = True

    def __init__(
        self,
        table: torch.Tensor,
        allowed: torch.Tensor | None = None,
        parts: Sequence[tuple[int, float]] | None = None,
        once: torch.Tensor | None = None,
        beside: Sequence[int] = (),
    ) -> None:
        if allowed is None:
            allowed = torch.arange(len(table))
        if allowed.numel() == 0:
            raise ArgumentError("allowed", "is empty", "give at least one token id")
        if int(allowed.min()) < 0 or int(allowed.max()) >= len(table):
            raise ArgumentError(
                "allowed",
                f"has to hold ids from 0 to {len(table) - 1} but spans "
                f"{int(allowed.min())} to {int(allowed.max())}",
            )
        self.table = table.detach()
        self.allowed = allowed.to(table.device)
        self.parts = [(table.shape[1], 1.0)] if parts is None else list(parts)
        self._once = None
        if once is not None:
            self._once = torch.zeros(len(table), dtype=torch.bool, device=table.device)
            self._once[once] = True
        self._beside = torch.tensor(sorted(set(beside)), dtype=torch.long, device=table.device)
        # rows of zero norm (never trained) stay zero and can only win against negative similarities
        directions = self.table[self.allowed].float()
        self._lengths_of_parts = []
        for part, (_, weight) in zip(self._split(directions), self.parts, strict=True):
            self._lengths_of_parts.append(part.norm(dim=-1) / weight)
            F.normalize(part, dim=-1, out=part).mul_(weight)
        self._block = _CPU_BLOCK if directions.device.type == "cpu" else len(directions)
        self._similarities = [_similarity_to(block) for block in directions.split(self._block)]
        on_cpu = directions.device.type == "cpu"
        screens = on_cpu and directions.numel() >= _LARGE_TABLE and bfloat16_pays()
        self._screen = _Screen(directions) if screens else None

    @property
    def may_repeat(self) -> bool:
        """Whether every id may occur twice in a prompt."""
        return self._once is None

    def _split(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return embeddings.split([columns for columns, _ in self.parts], dim=-1)

    def _directions(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(..., dim) with the embedding of each encoder at unit length."""
        return torch.cat([F.normalize(part, dim=-1) for part in self._split(embeddings)], dim=-1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(..., prompt_len) ids -> (..., prompt_len, dim) fp32 embeddings, not normalised."""
        return F.embedding(ids, self.table).float()

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (...) ids of the allowed tokens of the highest cosine similarity."""
        # with one encoder no length needs taking out: a positive factor moves no maximum
        rows = embeddings if len(self.parts) == 1 else self._directions(embeddings)
        rows = rows.reshape(-1, embeddings.shape[-1])
        size = max(1, _CHUNK // self._block)
        best = torch.cat([self._best(chunk) for chunk in rows.split(size)])
        ids = self.allowed[best].reshape(embeddings.shape[:-1])
        return ids if self._once is None else self._without_repeats(ids, rows)

    @torch.no_grad()
    def _without_repeats(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(problems, prompt_len) nearest ids of (n, dim) rows, those that repeat replaced.

        From left to right, each by the nearest that is not taken.
        """
        problems, length = ids.shape
        again: torch.Tensor | slice = slice(None)
        if ids.device.type == "cpu":  # elsewhere looking at the result would wait for the device
            again = self.repeated(ids).nonzero()[:, 0]
            if not len(again):
                return ids
        rows = rows.view(problems, length, -1)[again].flatten(0, 1)
        count = min(length + len(self._beside), len(self.allowed))
        near = torch.cat([self._near(chunk, count) for chunk in rows.split(_CPU_BLOCK)])
        near = near.view(-1, length, count)
        chosen = self._beside.expand(len(near), -1)
        for n in range(length):
            taken = (near[:, n, :, None] == chosen[:, None]).any(-1) & self._is_once(near[:, n])
            first = (~taken).int().argmax(dim=1, keepdim=True)
            chosen = torch.cat([chosen, near[:, n].gather(1, first)], dim=1)
        ids = ids.clone()
        ids[again] = chosen[:, len(self._beside) :]
        return ids

    def _near(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """(n, dim) -> (n, count) ids of the highest cosine similarity, in order."""
        values, places, first = [], [], 0
        for similarity in self._similarities:
            block = similarity(rows)
            top = block.topk(min(count, block.shape[1]), dim=-1)
            values.append(top.values)
            places.append(top.indices + first)
            first += block.shape[1]
        best = torch.cat(values, dim=-1).topk(count, dim=-1).indices
        return self.allowed[torch.cat(places, dim=-1).gather(1, best)]

    def _is_once(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(ids).bool() if self._once is None else self._once[ids]

    def repeated(self, ids: torch.Tensor) -> torch.Tensor:
        """(..., prompt_len) ids -> (...) whether one that may occur once occurs again."""
        if self._once is None:
            return torch.zeros(ids.shape[:-1], dtype=torch.bool, device=ids.device)
        every = torch.arange(ids.shape[-1], device=ids.device)
        named = torch.where(self._once[ids], ids, -1 - every)  # the others differ from all
        beside = self._beside[self._once[self._beside]].expand(*ids.shape[:-1], -1)
        named = torch.cat([named, beside], dim=-1).sort(dim=-1).values
        return (named[..., 1:] == named[..., :-1]).any(dim=-1)

    @torch.no_grad()
    def _best(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, dim) -> (n,) positions in `allowed`; the first of equals, as argmax has it."""
        if self._screen is None:
            return self._exactly(rows)
        position, sure = self._screen.best(rows)
        if not sure.all():
            position[~sure] = self._exactly(rows[~sure])
        return position

    def _exactly(self, rows: torch.Tensor) -> torch.Tensor:
        """`_best` by the exact product with every direction."""
        best, position = self._similarities[0](rows).max(dim=-1)
        for k, similarity in enumerate(self._similarities[1:], start=1):
            value, place = similarity(rows).max(dim=-1)
            better = value > best
            best = torch.where(better, value, best)
            position = torch.where(better, place + k * self._block, position)
        return position

    @torch.no_grad()
    def products(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, dim) -> (n, len(allowed)) dot products with the embeddings of the allowed tokens."""
        total, first = rows.new_zeros(()), 0
        for (columns, _), lengths in zip(self.parts, self._lengths_of_parts, strict=True):
            one = rows
            if len(self.parts) > 1:
                one = torch.zeros_like(rows)
                one[:, first : first + columns] = rows[:, first : first + columns]
                first += columns
            total = total + torch.cat([s(one) for s in self._similarities], dim=-1) * lengths
        return total

    def swaps(
        self,
        ids: torch.Tensor,
        gradient: torch.Tensor,
        position: int,
        count: int,
        bonus: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The most promising swaps at one position, by first order (HotFlip, eq. 10).

        Args:
            ids: (rows, prompt_len) prompts.
            gradient: (rows, prompt_len - position, dim) of the loss at the embeddings from
                `position` on.
            position: of the token that is swapped.
            count: swaps for each row; fewer where there are fewer tokens.
            bonus: (rows, len(allowed)) added to what each token promises.

        Returns:
            (rows, count, n) ids for what stands from `position` on, -1 for what stays, and
            (rows, count) the bonus of each, -inf where there are fewer swaps; None: of no swap.
        """
        promise = -self.products(gradient[:, 0])
        if bonus is not None:
            promise = promise + bonus
        if self._once is not None:
            others = torch.cat([ids[:, :position], ids[:, position + 1 :]], dim=1)
            promise = promise.masked_fill(self.taken(others), -torch.inf)
        picks = promise.topk(min(count, promise.shape[1]), dim=1).indices
        swaps = self.allowed[picks][..., None]
        return swaps, None if bonus is None else bonus.gather(1, picks)

    def taken(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, n) ids of a prompt -> (rows, len(allowed)) tokens that may not occur again."""
        taken = torch.zeros(len(ids), len(self.table), dtype=torch.bool, device=ids.device)
        if self._once is not None:
            others = torch.cat([ids, self._beside.expand(len(ids), -1)], dim=1)
            taken = taken.scatter(1, others, True) & self._once
        return taken[:, self.allowed]

    @staticmethod
    def swapped(ids: torch.Tensor, swaps: torch.Tensor, position: int) -> torch.Tensor:
        """(rows, prompt_len) ids with each of their (rows, count, n) swaps -> (rows, count, ...)"""
        swapped = ids[:, None].repeat(1, swaps.shape[1], 1)
        place = swapped[:, :, position : position + swaps.shape[2]]
        place.copy_(torch.where(swaps < 0, place, swaps))
        return swapped

    def changed(self, ids: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        """(prompt_len,) -> (count, prompt_len), a random token of each changed at random."""
        picks = torch.randint(len(self.allowed), (count, len(ids)), generator=generator)
        fresh = self.allowed[picks.to(self.allowed.device)]
        places = torch.randint(len(ids), (count, 1), generator=generator).to(ids.device)
        return ids.repeat(count, 1).scatter(1, places, fresh.gather(1, places))

    def only_allowed(
        self, acceptable: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A check of (n, prompt_len) ids for the rules of this space and `acceptable`.

        None where there is nothing to check.
        """
        if self._once is None:
            return acceptable

        def good(ids: torch.Tensor) -> torch.Tensor:
            found = ~self.repeated(ids)
            return found if acceptable is None else found & acceptable(ids)

        return good

    def random(self, problems: int, prompt_len: int, generator: torch.Generator) -> torch.Tensor:
        """(problems, prompt_len) allowed ids drawn uniformly with a CPU `generator`."""
        if self._once is not None:
            return torch.stack([self._drawn(prompt_len, generator) for _ in range(problems)])
        picks = torch.randint(len(self.allowed), (problems, prompt_len), generator=generator)
        return self.allowed[picks.to(self.allowed.device)]

    def _drawn(self, prompt_len: int, generator: torch.Generator) -> torch.Tensor:
        """(prompt_len,) different allowed ids, none of which stands beside the prompt."""
        order = torch.randperm(len(self.allowed), generator=generator)
        ids = self.allowed[order[: prompt_len + len(self._beside)].to(self.allowed.device)]
        return ids[(ids[:, None] != self._beside).all(dim=1)][:prompt_len]


class PhraseSpace(TokenSpace):
    """Prompts that are made of whole phrases, such as the entries of a keyword bank.

    Nearest is the sequence of phrases with the highest sum of cosines over all positions, exactly:
    by dynamic programming over where phrases begin. With phrases of one token each it is what
    `TokenSpace` has.

    Args:
        table, parts: as in `TokenSpace`.
        phrases: token ids of each phrase.
        prompt_len: tokens of a prompt; phrases that are longer are left out.
        first: token ids of each phrase that a prompt can begin with, for tokenizers that read the
            first word in other tokens; `phrases` then stand behind it. None: `phrases`.

    Raises:
        ArgumentError: no combination of `phrases` has `prompt_len` tokens; says which lengths there
            are near it.
    """

    capturable = False  # the dynamic programme over phrases runs in Python

    def __init__(
        self,
        table: torch.Tensor,
        phrases: Sequence[Sequence[int]],
        prompt_len: int,
        parts: Sequence[tuple[int, float]] | None = None,
        first: Sequence[Sequence[int]] | None = None,
    ) -> None:
        two, first = first is not None, phrases if first is None else first
        lengths = sorted({len(phrase) for phrase in phrases})
        reachable = _sums(lengths, prompt_len + max(lengths))
        whole = {len(phrase) + rest for phrase in first for rest in reachable}
        if prompt_len not in whole:
            near = sorted(sorted(whole, key=lambda n: abs(n - prompt_len))[:3])
            raise ArgumentError(
                "prompt_len",
                f"is {prompt_len}, but the phrases have {', '.join(map(str, lengths[:6]))} tokens, "
                "which do not add up to it",
                f"take {' or '.join(map(str, near))}",
            )
        kinds = [
            [phrase for phrase in few if len(phrase) <= prompt_len] for few in (first, phrases)
        ]
        tokens = sorted({token for few in kinds for phrase in few for token in phrase})
        super().__init__(table, torch.tensor(tokens), parts)
        place = {token: k for k, token in enumerate(tokens)}
        self._first = _Phrases(kinds[0], place, table.device)
        self._behind = _Phrases(kinds[1], place, table.device) if two else self._first
        self._lengths = sorted({*self._first.by_length, *self._behind.by_length})
        self._reachable = reachable

    def _phrases_at(self, position: int) -> _Phrases:
        """The phrases that may begin at a position."""
        return self._behind if position else self._first

    def _at(self, position: int) -> dict[int, torch.Tensor]:
        """By length, (count, length) positions in `allowed` of the phrases that may begin there."""
        return self._phrases_at(position).by_length

    @torch.no_grad()
    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(problems, prompt_len, dim) -> (problems, prompt_len) ids of the best phrases."""
        # what the longest of the gathers below holds for one problem
        size = embeddings.shape[1] * max(self._first.widest, self._behind.widest)
        chunks = embeddings.split(max(1, _CHUNK // size))
        return torch.cat([self._nearest(chunk) for chunk in chunks])

    def _nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        rows = self._directions(embeddings).flatten(0, 1)
        cosines = torch.cat([similarity(rows) for similarity in self._similarities], dim=-1)
        cosines = cosines.view(*embeddings.shape[:2], -1)
        problems, prompt_len, _ = cosines.shape
        # of the best phrase of each length that begins at the first position, and at later ones
        same = self._behind is self._first
        opening = self._first.best(cosines, 0, prompt_len if same else 1)
        later = opening if same else self._behind.best(cosines, 1, prompt_len)

        best_value = {0: cosines.new_zeros(problems)}
        best_ids = {0: cosines.new_zeros(problems, 0, dtype=torch.long)}
        for end in range(1, prompt_len + 1):
            last = [k for k in self._lengths if end - k in best_value and k in self._at(end - k)]
            if not last:
                continue
            # (problems, starts) values and (problems, starts, length) picks, and the start in them
            found = [(*(later if end > k else opening)[k], end - k) for k in last]
            found = [(v, p, at if same or not at else at - 1) for v, p, at in found]
            pairs = list(zip(last, found, strict=True))
            candidates = torch.stack([best_value[end - k] + v[:, at] for k, (v, _, at) in pairs])
            ids = torch.stack(
                [torch.cat([best_ids[end - k], p[:, at]], dim=1) for k, (_, p, at) in pairs]
            )
            best_value[end], choice = candidates.max(dim=0)
            best_ids[end] = ids[choice, torch.arange(problems, device=ids.device)]
        return self.allowed[best_ids[prompt_len]]

    def random(self, problems: int, prompt_len: int, generator: torch.Generator) -> torch.Tensor:
        """(problems, prompt_len) ids of random phrases that fill the prompt."""
        rows = []
        for _ in range(problems):
            row: list[int] = []
            while len(row) < prompt_len:
                left = prompt_len - len(row)
                phrases = self._phrases_at(len(row))
                fits = [length for length in phrases.by_length if left - length in self._reachable]
                row += phrases.random(fits, generator)
            rows.append(row)
        return self.allowed[torch.tensor(rows, device=self.allowed.device)]

    def swaps(
        self,
        ids: torch.Tensor,
        gradient: torch.Tensor,
        position: int,
        count: int,
        bonus: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `TokenSpace.swaps`, a phrase for what takes as many tokens from `position` on."""
        rows, left, _ = gradient.shape
        phrases = {n: p for n, p in self._at(position).items() if n <= left}
        if not phrases:  # none is short enough to begin here
            nothing = ids.new_full((rows, 1, 1), -1)
            return nothing, None if bonus is None else bonus.new_zeros(rows, 1)
        products = self.products(gradient.flatten(0, 1)).view(rows, left, -1)
        # what goes when a token is swapped
        now = (gradient * self.embed(ids[:, position:])).sum(-1)
        ends = [{a + n for a, n in self._spans(row)} | {0} for row in ids.tolist()]
        promises, bonuses, swaps = [], [], []
        if bonus is None:
            bonus = products.new_zeros(rows, len(self.allowed))
        for n, p in phrases.items():
            fits = [position in edges and position + n in edges for edges in ends]
            refused = ~torch.tensor(fits, device=ids.device)[:, None]
            promise = now[:, :n].sum(1, keepdim=True)
            promise = promise - sum(products[:, j, p[:, j]] for j in range(n))
            promises.append(promise)
            bonuses.append(bonus[:, p[:, 0]].masked_fill(refused, -torch.inf))
            swaps.append(F.pad(self.allowed[p], (0, max(phrases) - n), value=-1))
        bonus = torch.cat(bonuses, dim=1)
        promise = torch.cat(promises, dim=1) + bonus
        picks = promise.topk(min(count, promise.shape[1]), dim=1).indices
        bonus, chosen = bonus.gather(1, picks), torch.cat(swaps)[picks]
        chosen[bonus == -torch.inf] = -1
        return chosen, bonus

    def changed(self, ids: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        """As `TokenSpace.changed`, a phrase for another of as many tokens."""
        row = ids.tolist()
        spans = self._spans(row)
        if not spans:
            return ids.repeat(count, 1)
        rows = []
        for _ in range(count):
            start, n = spans[int(torch.randint(len(spans), (), generator=generator))]
            phrases = self._at(start)[n]
            pick = int(torch.randint(len(phrases), (), generator=generator))
            fresh = self.allowed[phrases[pick]].tolist()
            rows.append([*row[:start], *fresh, *row[start + n :]])
        return torch.tensor(rows, device=ids.device)

    def only_allowed(
        self, acceptable: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        def both(ids: torch.Tensor) -> torch.Tensor:
            good = torch.tensor([bool(self._spans(row)) for row in ids.tolist()])
            good = good.to(ids.device)
            if acceptable is not None and good.any():
                good[good.clone()] = acceptable(ids[good])
            return good

        return both

    def _spans(self, ids: list[int]) -> list[tuple[int, int]]:
        """First token and length of each phrase that `ids` are made of; empty if they are not."""
        spans: dict[int, list[tuple[int, int]]] = {0: []}
        for end in range(1, len(ids) + 1):
            for n in self._lengths:
                phrases = self._phrases_at(end - n).ids if end - n in spans else ()
                if tuple(ids[end - n : end]) in phrases:
                    spans[end] = [*spans[end - n], (end - n, n)]
                    break
        return spans.get(len(ids), [])


class _Phrases:
    """Phrases that may begin at some positions of a prompt.

    Attributes:
        by_length: (count, length) positions of their tokens in `allowed`, by length.
        ids: their tokens.
        widest: the largest of the tensors has this number of elements.
    """

    def __init__(
        self, phrases: Sequence[Sequence[int]], place: dict[int, int], device: torch.device
    ) -> None:
        self.by_length = {
            length: torch.tensor(
                sorted([place[t] for t in phrase] for phrase in phrases if len(phrase) == length),
                device=device,
            )
            for length in sorted({len(phrase) for phrase in phrases})
        }
        self.ids = {tuple(phrase) for phrase in phrases}
        self.widest = max(map(len, self.by_length.values()), default=0)
        # flat, for drawing at random: all phrases one after the other
        self._flat = [i for p in self.by_length.values() for i in p.flatten().tolist()]
        counts = [(length, len(p)) for length, p in self.by_length.items()]
        self._lengths = torch.tensor([length for length, count in counts for _ in range(count)])
        self._ends = self._lengths.cumsum(0)

    def random(self, lengths: Sequence[int], generator: torch.Generator) -> list[int]:
        """The positions in `allowed` of a random phrase that has one of these lengths."""
        choices = torch.isin(self._lengths, torch.tensor(lengths)).nonzero()[:, 0]
        pick = int(choices[torch.randint(len(choices), (1,), generator=generator)])
        end = int(self._ends[pick])
        return self._flat[end - int(self._lengths[pick]) : end]

    def best(
        self, cosines: torch.Tensor, begin: int, stop: int
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The best phrase of each length that begins at each position from `begin` to `stop` - 1.

        Args:
            cosines: (problems, prompt_len, allowed).
            begin, stop: see above; fewer positions where the prompt ends before.

        Returns:
            By length, (problems, starts) sums of cosines and (problems, starts, length) tokens.
        """
        found = {}
        for length, phrases in self.by_length.items():
            starts = min(stop, cosines.shape[1] - length + 1) - begin
            if starts < 1:
                continue
            terms = (
                cosines[:, begin + j : begin + j + starts][..., phrases[:, j]]
                for j in range(length)
            )
            value, best = reduce(torch.add, terms).max(dim=-1)
            found[length] = value, phrases[best]
        return found


def _sums(lengths: Sequence[int], top: int) -> set[int]:
    """Every number up to `top` that is a sum of `lengths`, and 0."""
    sums = {0}
    for total in range(1, top + 1):
        if any(total - length in sums for length in lengths):
            sums.add(total)
    return sums


class _Screen:
    """The most similar of many directions: some are found in bfloat16, and compared exactly.

    Args:
        directions: (n, dim), of length 1 at most.
    """

    def __init__(self, directions: torch.Tensor) -> None:
        self.directions = directions
        self.low = directions.bfloat16()

    def best(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, dim) -> (n,) positions of the highest dot product, and whether it is sure to be."""
        top = F.linear(rows.bfloat16(), self.low).topk(_LOOKED_AT, dim=1)
        places = top.indices.sort(dim=1).values  # in order, so that the first of equals is found
        exact = torch.bmm(F.embedding(places, self.directions), rows[..., None])[..., 0]
        value, pick = exact.max(dim=1)
        # all others are below the last one that was looked at
        most = top.values[:, -1].float() + _ROUNDING * rows.norm(dim=1)
        return places.gather(1, pick[:, None])[:, 0], most < value


def _similarity_to(directions: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from (n, dim) rows to their (n, len(directions)) dot products.

    The product is the longest single part of a step on the CPU, and oneDNN's with packed weights is
    faster there than torch's plain one.
    """
    if directions.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return lambda rows: rows @ directions.T
    packed = directions.to_mkldnn()
    return lambda rows: torch.ops.aten.mkldnn_linear(rows.to_mkldnn(), packed).to_dense()
