"""The discrete space that prompts live in: an embedding table and the tokens that may be used."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Similarities held at once while projecting: 2**26 floats are 256 MB.
_CHUNK = 2**26
# Tokens compared at once on the CPU, where a block of similarities should stay in the cache.
_CPU_BLOCK = 2**14


class TokenSpace:
    """One embedding table with a set of allowed tokens.

    Args:
        table: (vocab_size, dim) token embeddings; used in fp32 whatever their dtype.
        allowed: ids that prompts may be made of, in rising order; None allows every row.

    Raises:
        ValueError: `allowed` is empty or holds ids outside the table.
    """

    def __init__(self, table: torch.Tensor, allowed: torch.Tensor | None = None) -> None:
        if allowed is None:
            allowed = torch.arange(len(table))
        if allowed.numel() == 0:
            raise ValueError("`allowed` has to hold at least one token id but is empty.")
        if int(allowed.min()) < 0 or int(allowed.max()) >= len(table):
            raise ValueError(
                f"`allowed` has to hold ids from 0 to {len(table) - 1} but spans "
                f"{int(allowed.min())} to {int(allowed.max())}."
            )
        self.table = table.detach()
        self.allowed = allowed.to(table.device)
        # rows of zero norm (never trained) stay zero and can only win against negative similarities
        directions = self.table[self.allowed].float()
        F.normalize(directions, dim=-1, out=directions)
        self._block = _CPU_BLOCK if directions.device.type == "cpu" else len(directions)
        self._similarities = [_similarity_to(block) for block in directions.split(self._block)]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(..., prompt_len) ids -> (..., prompt_len, dim) fp32 embeddings, not normalised."""
        return F.embedding(ids, self.table).float()

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (...) ids of the allowed tokens of the highest cosine similarity.

        The embeddings themselves need no normalising: a positive factor does not move the maximum.
        """
        rows = embeddings.reshape(-1, embeddings.shape[-1])
        size = max(1, _CHUNK // self._block)
        best = torch.cat([self._best(chunk) for chunk in rows.split(size)])
        return self.allowed[best].reshape(embeddings.shape[:-1])

    @torch.no_grad()
    def _best(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, dim) -> (n,) positions in `allowed`; the first of equals, as argmax has it."""
        best, position = self._similarities[0](rows).max(dim=-1)
        for k, similarity in enumerate(self._similarities[1:], start=1):
            value, place = similarity(rows).max(dim=-1)
            better = value > best
            best = torch.where(better, value, best)
            position = torch.where(better, place + k * self._block, position)
        return position

    def random(self, problems: int, prompt_len: int, generator: torch.Generator) -> torch.Tensor:
        """(problems, prompt_len) allowed ids drawn uniformly with a CPU `generator`."""
        picks = torch.randint(len(self.allowed), (problems, prompt_len), generator=generator)
        return self.allowed[picks.to(self.allowed.device)]


def _similarity_to(directions: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from (n, dim) rows to their (n, len(directions)) dot products.

    The product is the longest single part of a step on the CPU, and oneDNN's with packed weights is
    faster there than torch's plain one.
    """
    if directions.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return lambda rows: rows @ directions.T
    packed = directions.to_mkldnn()
    return lambda rows: torch.ops.aten.mkldnn_linear(rows.to_mkldnn(), packed).to_dense()
