"""The matrices of the blocks of a text tower, in the dtype that searches multiply in.

A search multiplies a few rows by the same large matrices again and again, and a processor spends
most of that time reading them. Processors with instructions for bfloat16 (AMX, AVX-512 BF16) read
half as many bytes and multiply faster. Norms, sums and attention stay in float32, and so does all
that encodes a finished prompt: a search only chooses with these products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..precision import bfloat16_pays

# Weights in the blocks below which a copy is not worth while: other work takes most of the time.
_SMALL = 10_000_000


@dataclass(frozen=True)
class BlockMatrices:
    """Weight and bias of the four products of a block.

    Attributes:
        read: from the input to queries, keys and values, one below the other.
        mix: behind the attention.
        widen, narrow: of the two layers of the MLP.
    """

    read: tuple[torch.Tensor, torch.Tensor]
    mix: tuple[torch.Tensor, torch.Tensor]
    widen: tuple[torch.Tensor, torch.Tensor]
    narrow: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, block: Any) -> BlockMatrices:
        """Those of an open_clip `ResidualAttentionBlock`, not copied."""
        attn, mlp = block.attn, block.mlp
        return cls(
            (attn.in_proj_weight, attn.in_proj_bias),
            (attn.out_proj.weight, attn.out_proj.bias),
            (mlp.c_fc.weight, mlp.c_fc.bias),
            (mlp.c_proj.weight, mlp.c_proj.bias),
        )

    def tensors(self) -> list[torch.Tensor]:
        """All weights and biases."""
        return [*self.read, *self.mix, *self.widen, *self.narrow]

    def to(self, dtype: torch.dtype) -> BlockMatrices:
        """A copy in another dtype."""
        pairs = (self.read, self.mix, self.widen, self.narrow)
        return BlockMatrices(*((w.detach().to(dtype), b.detach().to(dtype)) for w, b in pairs))


class Matrices:
    """The matrices of all blocks of a tower; a copy in another dtype is kept for the next search.

    Args:
        blocks: of the tower.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        self._blocks = blocks
        self._copy: tuple[list, list[BlockMatrices]] | None = None

    def __call__(self, dtype: torch.dtype | None) -> list[BlockMatrices]:
        """The matrices in a dtype; None: in the one that is fastest here."""
        own = [BlockMatrices.of(block) for block in self._blocks]
        tensors = [tensor for one in own for tensor in one.tensors()]
        if dtype is None:
            dtype = fastest_dtype(tensors)
        if all(tensor.dtype == dtype for tensor in tensors):
            self._copy = None
            return own
        state = [dtype, *map(_state, tensors)]
        if self._copy is None or self._copy[0] != state:
            self._copy = state, [one.to(dtype) for one in own]
        return self._copy[1]


def fastest_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype to multiply by these weights in: their own, or bfloat16 where that is faster."""
    first = tensors[0]
    plain = first.device.type == "cpu" and first.dtype == torch.float32
    if plain and sum(t.numel() for t in tensors) >= _SMALL and bfloat16_pays():
        return torch.bfloat16
    return first.dtype


def _state(tensor: torch.Tensor) -> tuple[int, torch.device, int]:
    """Changes with the values of a tensor."""
    return tensor.data_ptr(), tensor.device, 0 if tensor.is_inference() else tensor._version


def multiply(x: torch.Tensor, matrix: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(..., n) rows times a matrix, with its bias, in the dtype of the matrix."""
    weight, bias = matrix
    return F.linear(x.to(weight.dtype), weight, bias)
