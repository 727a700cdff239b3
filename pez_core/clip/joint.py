"""Several CLIPs that share their tokens, searched as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from .model import Clip
from .text import Encoder, TextTower


class JointText:
    """The text towers of several CLIPs side by side; see `TextTower`.

    Token embeddings lie next to each other, so that one id means its row in every table. Features
    are unit vectors times the root of their encoder's weight, so that a dot product of two joint
    features is the weighted mean of the encoders' cosines.
    """

    def __init__(self, towers: Sequence[TextTower], weights: Sequence[float]) -> None:
        self.towers = towers
        self.words = towers[0].words
        self.known_word = towers[0].known_word
        self.max_prompt_len = min(tower.max_prompt_len for tower in towers)
        self.parts = [
            (tower.token_embedding.shape[1], weight)
            for tower, weight in zip(towers, weights, strict=True)
        ]

    @property
    def token_embedding(self) -> torch.Tensor:
        """(vocab_size, sum of widths) tables side by side, where the towers are now."""
        return torch.cat([tower.token_embedding.detach().float() for tower in self.towers], dim=1)

    def encoder(
        self, fixed: Sequence[tuple[Sequence[int], Sequence[int]]] = (((), ()),)
    ) -> Encoder:
        """As `TextTower.encoder`, for embeddings and features side by side."""
        return _JointEncoder(self, [tower.encoder(fixed) for tower in self.towers])

    def memory_per_prompt(self, prompt_len: int) -> int:
        """As `TextTower.memory_per_prompt`, of all towers."""
        return sum(tower.memory_per_prompt(prompt_len) for tower in self.towers)

    def join(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """The features of each encoder -> joint unit features."""
        return torch.cat(
            [
                F.normalize(part.float(), dim=-1) * weight**0.5
                for part, (_, weight) in zip(features, self.parts, strict=True)
            ],
            dim=-1,
        )


class _JointEncoder:
    """The encoders of several towers as one."""

    def __init__(self, text: JointText, encoders: Sequence[Encoder]) -> None:
        self.text, self.encoders = text, encoders

    def _each(self, embeddings: torch.Tensor) -> Iterator[tuple[Encoder, torch.Tensor]]:
        columns = [columns for columns, _ in self.text.parts]
        return zip(self.encoders, embeddings.split(columns, dim=-1), strict=True)

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.text.join([encode(part) for encode, part in self._each(embeddings)])

    def given(self, embeddings: torch.Tensor) -> _JointEncoder:
        given = [encode.given(part) for encode, part in self._each(embeddings)]
        return _JointEncoder(self.text, given)


class JointClip:
    """Several CLIPs as one, for models that read a prompt with more than one, such as SDXL.

    One id sequence, one search; projection and objective look at all encoders. Made by `load_clip`
    from a list of names; everything that takes a `Clip` takes this.

    Args:
        clips: two or more, whose tokenizers agree on every token.
        weights: how much each counts; scaled to sum to 1. None: all the same.

    Raises:
        ValueError: fewer than two clips, the same one twice, tokenizers or devices that differ,
            weights that do not fit.
    """

    def __init__(self, clips: Sequence[Clip], weights: Sequence[float] | None = None) -> None:
        if len(clips) < 2:
            raise ValueError(f"`clips` has to hold at least two CLIPs but holds {len(clips)}.")
        if len(set(map(id, clips))) < len(clips):
            raise ValueError(f"`clips` holds one CLIP twice: {', '.join(c.name for c in clips)}.")
        names = []
        for clip in clips:
            taken = names.count(clip.name)
            names.append(f"{clip.name} ({taken + 1})" if taken else clip.name)
        weights = [1.0] * len(clips) if weights is None else [float(w) for w in weights]
        if len(weights) != len(clips) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(
                f"`weights` has to hold one number above 0 for each of {len(clips)} CLIPs but is "
                f"{weights}."
            )
        for clip in clips[1:]:
            _check_same_tokens(clips[0], clip)
        self.cache: dict[str, Any] = {}
        self.clips = list(clips)
        self.names = names
        self.name = " + ".join(names)
        self.text = JointText([c.text for c in clips], [w / sum(weights) for w in weights])
        shared = set.intersection(*(set(clip.vocabulary.tolist()) for clip in clips))
        if not shared:
            raise ValueError(f"`clips`: {self.name} have no word in common to make prompts of.")
        self.vocabulary = torch.tensor(sorted(shared))
        known = [clip.known for clip in clips if clip.known is not None]
        self.known = frozenset.intersection(*known) if known else None

    def __repr__(self) -> str:
        return f"JointClip({self.name!r}, device={str(self.device)!r})"

    @property
    def device(self) -> torch.device:
        return self.clips[0].device

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """As `Clip.encode_images`; joint features."""
        return self.text.join([clip.encode_images(images) for clip in self.clips])

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """As `Clip.encode_texts`; joint features."""
        return self.text.join([clip.encode_texts(texts) for clip in self.clips])

    def encode_chunks(self, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
        """As `Clip.encode_chunks`; joint features."""
        return self.text.join([clip.encode_chunks(chunks) for clip in self.clips])

    def split(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Joint features -> the unit features of each encoder."""
        sizes = [clip.features for clip in self.clips]
        parts = features.split(sizes, dim=-1)
        return {
            name: F.normalize(part, dim=-1) for name, part in zip(self.names, parts, strict=True)
        }


def _check_same_tokens(a: Clip, b: Clip) -> None:
    same = a.text.words.size == b.text.words.size and all(
        a.text.words.decode([i]) == b.text.words.decode([i]) for i in range(a.text.words.size)
    )
    if not same:
        raise ValueError(
            f"`clips`: the tokenizers of {a.name} and {b.name} differ, so that one prompt cannot "
            "be the same tokens for both; take CLIPs of one tokenizer, like ViT-L-14 and "
            "ViT-bigG-14."
        )
    if a.device != b.device:
        raise ValueError(
            f"`clips`: {a.name} is on {a.device} and {b.name} on {b.device}; put them on one."
        )
