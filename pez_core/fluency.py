"""The fluency loss of "Hard Prompts Made Easy" (section 5) for the prompts of a CLIP.

In the paper one language model has the task and the fluency. Here the language model is a
`TokenLM`, whose token ids are those of the CLIP: its embedding table stands beside that of the
CLIP, so that Algorithm 1 gets the gradient of a likelihood as it gets that of the similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from typing import TYPE_CHECKING

import torch

from .errors import ArgumentError, check_choice, check_integer, check_number
from .options import WORDINGS
from .priors import kind_of, reads_like_clip
from .token_lm import FixedText, State, TokenLM, load_token_lm, repeated

if TYPE_CHECKING:
    from .clip import AnyClip


class FluencyLoss:
    """The fluency loss of the paper by the language model of the package, an `extra_loss`.

    It is the mean negative log-likelihood, in nats, of the learned tokens, of the fixed text behind
    them and of the end of the prompt, which counts four times. A likelihood is the dot product of
    what the language model expects with the embedding of the token, plus the bias of the token.
    The gradient reaches a learned token as the one that is expected behind others, and as one that
    others are expected behind.

    AdamW makes steps of the same size in the columns of the CLIP and in those of the language
    model, whatever `weight` is. `projection` therefore decides how far likely tokens are preferred
    in Algorithm 1; `weight` decides which prompt is the best, and counts in the swaps.

    Args:
        clip: the CLIP of the search, with CLIP's own tokenizer.
        weight: lambda of the paper, above 0 and below 1; the similarity has the rest. 0.05 counts
            as much as a `readability` of 0.5.
        projection: share of the language model in the projection, above 0 and below 1.
        prompts: the number of prompts that are learned, at least 1.
        wording: what prompts are read as, see `SearchOptions`.

    Attributes:
        weight, projection, prompts: as above.
        token_embedding: (vocab_size, table_width + 1) fp32 on the device of the CLIP; the last
            column is the bias.

    Raises:
        ArgumentError: an argument is out of range, or the CLIP has another tokenizer.
    """

    refinable = True

    def __init__(
        self,
        clip: AnyClip,
        weight: float = 0.05,
        *,
        projection: float = 0.3,
        prompts: int = 1,
        wording: str = "free",
    ) -> None:
        self.weight = _share("weight", weight)
        self.projection = _share("projection", projection)
        check_integer("prompts", prompts, 1)
        check_choice("wording", wording, WORDINGS)
        if not reads_like_clip(clip.text.words):
            raise ArgumentError(
                "clip",
                f"is {clip.name}, whose tokenizer is not CLIP's own, which the language model "
                "reads the tokens of",
                "take a CLIP with CLIP's own tokenizer",
            )
        self.prompts = prompts
        self._words, self._kind = clip.text.words, kind_of(wording)
        self._model = load_token_lm(device=clip.device)
        self.token_embedding = self._model.table_with_bias()

    @property
    def parts(self) -> list[tuple[int, float]]:
        """See `ExtraLoss`."""
        return [(self.token_embedding.shape[1], 1.0)]

    def objective(
        self, before: Sequence[int], after: Sequence[int], goals: Sequence[int]
    ) -> FluentTokens:
        """See `ExtraLoss`."""

        def fixed_of(prompt_len: int) -> FixedText:
            return FixedText(self._model, before, [*[-1] * prompt_len, *after], self._kind)

        return FluentTokens(self._model, fixed_of)

    @torch.no_grad()
    def losses(self, texts: Sequence[str], goals: Sequence[int]) -> torch.Tensor:
        """See `ExtraLoss`. All tokens of a text count, those of a caption before it, too.

        Of a text that is longer than the context of the language model the last tokens count.
        """
        table, loss, found = self.token_embedding, self.objective([], [], goals), []
        room = self._model.shape.context - 1  # one place is the end's
        for text in texts:
            ids = torch.tensor([self._words.encode(text)[-room:]], device=table.device)
            found.append(loss(table[ids]))
        return torch.cat(found)


class FluentTokens:
    """The fluency loss as a function of the embeddings of learned tokens.

    Args:
        model: the language model.
        fixed_of: the text around so many learned tokens. It is read once, at the first call.
    """

    # nothing in it synchronises with the device after the first call; see `pez_core.capture`
    capturable = True

    def __init__(self, model: TokenLM, fixed_of: Callable[[int], FixedText]) -> None:
        self._model, self._fixed_of = model, cache(fixed_of)
        self._before: torch.Tensor | None = None

    def given(self, embeddings: torch.Tensor) -> FluentTokens:
        """The loss as a function of the tokens behind these (rows, n, columns) embeddings.

        The function takes any multiple of `rows`, those of the first row first.
        """
        other = copy(self)
        other._before = embeddings.detach()
        return other

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len, columns) -> (rows,) mean negative log-likelihoods, in nats."""
        first = 0 if self._before is None else self._before.shape[1]
        fixed = self._fixed_of(first + embeddings.shape[1])
        (query, state), total = fixed.start, embeddings.new_zeros(1)
        if self._before is not None and first:
            with torch.no_grad():
                query, state = _in_each(self._before, query, state)
                likely, query, state = self._read(self._before, query, state)
                total = likely @ fixed.shares[: likely.shape[1]]
        total = total.repeat_interleave(len(embeddings) // len(total))
        after = fixed.embedded[len(fixed.slots) :].expand(len(embeddings), -1, -1)
        rest = torch.cat([embeddings, after], dim=1)
        if rest.shape[1]:
            query, state = _in_each(rest, query, state)
            likely, _, _ = self._read(rest, query, state, ends=True)
            total = total + likely @ fixed.shares[-rest.shape[1] :]
        return -total / fixed.shares.sum()

    def _read(
        self, rows: torch.Tensor, query: torch.Tensor, state: State, ends: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, State]:
        """Read (rows, n, columns) behind what is expected and the state of the tokens before.

        Args:
            rows, query, state: see above.
            ends: nothing is read behind, so that the last token need not be.

        Returns:
            (rows, n) likelihoods, and the query and the state behind.
        """
        tokens, bias = rows[..., :-1], rows[..., -1]
        if not ends or tokens.shape[1] > 1:
            read = tokens[:, :-1] if ends else tokens
            queries, state = self._model.extend_embedded(read, state)
            query = torch.cat([query, queries], dim=1)
        likely = (query[:, : tokens.shape[1]] * tokens).sum(2) + bias
        return likely, query[:, -1:], state


def _in_each(rows: torch.Tensor, query: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    """A query and a state of few rows for (rows, ...), those of the first first."""
    count = len(rows) // len(query)
    return query.repeat_interleave(count, 0), repeated(state, count)


def _share(name: str, value: float) -> float:
    """The number; raise unless it is above 0 and below 1."""
    share = check_number(name, value, 0, 1, above=True)
    if share == 1:
        raise ArgumentError(name, "has to be below 1, which leaves nothing for the similarity")
    return share
