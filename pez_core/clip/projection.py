"""The text projection of a text encoder that came without it, from files on this disk.

Image models read the hidden states of a CLIP, so that their files often lack the last matrix of its
text tower, which similarities with images need.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

_TABLE = "token_embedding.weight"
_PROJECTION = "text_projection"
# Tensors of the layers of a text encoder, in the layouts of open_clip and of transformers.
_LAYER = re.compile(r"^(.*?)(?:transformer\.resblocks|encoder\.layers)\.(\d+)\.")
# Rows of the embedding table that are compared, of ordinary words and parts of words.
_ROWS = slice(320, 1344)
# Cosine similarity of the tables of a text encoder and one that was trained further from it is
# close to 1; that of two that were trained independently is close to 0.
_SAME = 0.8
# An entry of a trained matrix is seldom as small as this; in 8 bits without a scale many are zero.
_TINY, _FEW = 1e-12, 0.25
_LARGEST = 1e4  # entry, in standard deviations


@dataclass(frozen=True)
class Projection:
    """The last matrix of a text tower.

    Attributes:
        weight: (features, width) in float32.
        path: the file that it comes from.
    """

    weight: torch.Tensor
    path: Path


def is_trained(weight: torch.Tensor) -> bool:
    """Whether values can be those of a trained matrix; memory that was never set seldom has such.

    Weights of another model that are left in memory cannot be told from trained ones: look for the
    matrix in the file, too, where that is known.
    """
    if weight.is_meta or not weight.numel():
        return False
    values = weight.detach().float()
    if not values.isfinite().all():
        return False
    tiny = (values.abs() < _TINY).float().mean().item()
    spread = values.std().item()
    return tiny < _FEW and 0 < spread < 10 and values.abs().max().item() < _LARGEST * spread


def find_projection(
    table: torch.Tensor, files: Iterable[Path], layers: int = 0
) -> Projection | None:
    """The projection in the first file whose text encoder has nearly the same embedding table.

    Args:
        table: (vocabulary, width) token embeddings of the text encoder.
        layers: of the text encoder, which may have lost its last ones: projections belong to all.
            A file that has layers has to have as many. 0: any number.
        files: safetensors files that may hold a text encoder, in the layout of open_clip or of
            transformers. Those that cannot be read are passed over.
    """
    for path in files:
        try:
            weight = _projection_in(path, table, layers)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError):
            continue
        if weight is not None and is_trained(weight):
            return Projection(weight, path)
    return None


def projections_in(path: Path, width: int) -> list[torch.Tensor]:
    """All (features, width) text projections in a safetensors file; none if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            found = [_read(file, name, width) for name in file.keys()]  # noqa: SIM118
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError):
        return []
    return [weight for weight in found if weight is not None]


def _projection_in(path: Path, table: torch.Tensor, layers: int) -> torch.Tensor | None:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        read = [_read(file, name, table.shape[1]) for name in names]
        weights = [weight for weight in read if weight is not None]
        if not weights:
            return None
        for name in names:
            if name.endswith(_TABLE):
                part = file.get_slice(name)
                same_shape = tuple(part.get_shape()) == tuple(table.shape)
                if not same_shape or not _are_close(part[_ROWS], table[_ROWS]):
                    continue
                if not layers or layers_of(names, name.removesuffix(_TABLE)) in (0, layers):
                    return weights[0]
    return None


def depths_in(path: Path, shape: Sequence[int]) -> list[int]:
    """The layers of each text encoder in a safetensors file; none if it cannot be read.

    Args:
        path: of the file.
        shape: of the embedding table of the text encoder.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tables = [name for name in names if name.endswith(_TABLE)]
            same = [one for one in tables if file.get_slice(one).get_shape() == list(shape)]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError):
        return []
    return [layers_of(names, one.removesuffix(_TABLE)) for one in same]


def layers_of(names: Iterable[str], prefix: str) -> int:
    """The layers of a text encoder.

    Args:
        names: of the tensors in a file.
        prefix: what stands before the name of its embedding table, `token_embedding.weight`.
    """
    before = prefix.removesuffix("embeddings.")
    found = [match for name in names if (match := _LAYER.match(name)) and match[1] == before]
    return 1 + max((int(match[2]) for match in found), default=-1)


def _read(file: safe_open, name: str, width: int) -> torch.Tensor | None:
    """A tensor as (features, width) projection; None: it is another one."""
    in_transformers = name.endswith(f"{_PROJECTION}.weight")
    if not in_transformers and not name.endswith(_PROJECTION):
        return None
    shape = file.get_slice(name).get_shape()
    if len(shape) != 2 or shape[1 if in_transformers else 0] != width:
        return None
    weight = file.get_tensor(name).float()
    return weight if in_transformers else weight.T.contiguous()


def have_same_tokens(table: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two embedding tables of one shape are from the same training, or nearly."""
    return _are_close(table[_ROWS], other[_ROWS])


def _are_close(rows: torch.Tensor, others: torch.Tensor) -> bool:
    a, b = rows.detach().float().cpu(), others.detach().float().cpu()
    a, b = a - a.mean(0), b - b.mean(0)
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() > _SAME
