"""Several CLIPs of one tokenizer, searched as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import ArgumentError, check_weights
from .model import Clip
from .text import Encoder, TextTower


class JointText:
    """The text towers of several CLIPs side by side; see `TextTower`.

    Token embeddings lie next to each other, so that one id means its row in every table. Features
    are unit vectors times the square root of their encoder's weight, so that a dot product of two
    joint features is the weighted mean of the encoders' cosine similarities.
    """

    def __init__(self, towers: Sequence[TextTower], weights: Sequence[float]) -> None:
        self.towers = towers
        self.words = towers[0].words
        self.example_token = towers[0].example_token
        self.max_prompt_len = min(tower.max_prompt_len for tower in towers)
        self.parts = [
            (tower.token_embedding.shape[1], weight)
            for tower, weight in zip(towers, weights, strict=True)
        ]

    @property
    def causal(self) -> bool:
        """Whether all towers are causal."""
        return all(tower.causal for tower in self.towers)

    @property
    def token_embedding(self) -> torch.Tensor:
        """(vocab_size, sum of widths) tables side by side, on the device of the towers."""
        return torch.cat([tower.token_embedding.detach().float() for tower in self.towers], dim=1)

    def encoder(
        self,
        fixed: Sequence[tuple[Sequence[int], Sequence[int]]] = (((), ()),),
        inserts: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> Encoder:
        """As `TextTower.encoder`, for embeddings and features side by side."""
        return _JointEncoder(self, [tower.encoder(fixed, inserts) for tower in self.towers])

    def encoder_of_contexts(
        self, contexts: Sequence[tuple[Sequence[int], Sequence[int], tuple[int, int]]]
    ) -> _JointEncoder:
        """As `TextTower.encoder_of_contexts`."""
        return _JointEncoder(self, [tower.encoder_of_contexts(contexts) for tower in self.towers])

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
        """As `Encoder.given`."""
        given = [encode.given(part) for encode, part in self._each(embeddings)]
        return _JointEncoder(self.text, given)


class JointClip:
    """Several CLIPs as one, for models that read a prompt with more than one, such as SDXL.

    There is one sequence of ids and one search; projection and objective use all encoders. Made by
    `load_clip` from a list of names; every function that takes a `Clip` takes this.

    Args:
        clips: two or more, whose tokenizers agree on every token.
        weights: of each in the similarity; scaled to sum to 1. None: all the same.

    Attributes:
        trained_tokens: ids that all of them were trained on; None: all ids.
        cache: as that of a `Clip`.

    Raises:
        ArgumentError: fewer than two clips, the same one twice, tokenizers or devices that differ,
            weights that do not fit.
    """

    def __init__(self, clips: Sequence[Clip], weights: Sequence[float] | None = None) -> None:
        if len(clips) < 2:
            raise ArgumentError("clips", f"has to hold at least two CLIPs but holds {len(clips)}")
        if len(set(map(id, clips))) < len(clips):
            names = ", ".join(clip.name for clip in clips)
            raise ArgumentError("clips", f"holds one CLIP twice: {names}")
        numbers = [1.0] * len(clips)
        if weights is not None:
            numbers = check_weights("weights", weights, len(clips))
        for clip in clips[1:]:
            _check_same_tokens(clips[0], clip)
            if clip.text.words.equals(clips[0].text.words):
                clip.text.words = clips[0].text.words  # it caches which tokens round-trip
        self.clips = list(clips)
        self.names = _distinct([clip.name for clip in clips])
        self.name = " + ".join(self.names)
        self.text = JointText([clip.text for clip in clips], [n / sum(numbers) for n in numbers])
        trained = [clip.trained_tokens for clip in clips if clip.trained_tokens is not None]
        self.trained_tokens = frozenset.intersection(*trained) if trained else None
        self.cache: dict[str, Any] = {}

    @property
    def feature_size(self) -> int:
        """Length of a feature vector."""
        return sum(clip.feature_size for clip in self.clips)

    def __repr__(self) -> str:
        return f"JointClip({self.name!r}, device={str(self.device)!r})"

    @cached_property
    def vocabulary(self) -> torch.Tensor:
        """(n,) sorted ids in the default vocabularies of all CLIPs, on the CPU.

        Raises:
            ArgumentError: they have none in common.
        """
        shared = set.intersection(*(set(clip.vocabulary.tolist()) for clip in self.clips))
        if not shared:
            raise ArgumentError("clip", f"is {self.name}, which have no word in common")
        with torch.inference_mode(False):
            return torch.tensor(sorted(shared))

    @property
    def device(self) -> torch.device:
        """Where the weights of all its CLIPs are."""
        return self.clips[0].device

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> JointClip:
        """As `Clip.to`, for all of them."""
        for clip in self.clips:
            clip.to(device, dtype)
        self.cache.clear()
        return self

    def encode_images(self, images: Iterable[Image.Image], fit: str = "crop") -> torch.Tensor:
        """As `Clip.encode_images`; joint features. Each CLIP iterates over `images` anew."""
        return self.text.join([clip.encode_images(images, fit) for clip in self.clips])

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """As `Clip.encode_texts`; joint features."""
        return self.text.join([clip.encode_texts(texts) for clip in self.clips])

    def encode_chunks(self, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
        """As `Clip.encode_chunks`; joint features."""
        return self.text.join([clip.encode_chunks(chunks) for clip in self.clips])

    def encode_long_texts(self, texts: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        """As `Clip.encode_long_texts`; joint features."""
        return self.text.join([clip.encode_long_texts(texts) for clip in self.clips])

    def split(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Joint features -> the unit features of each encoder."""
        parts = features.split([clip.feature_size for clip in self.clips], dim=-1)
        return {
            name: F.normalize(part, dim=-1) for name, part in zip(self.names, parts, strict=True)
        }


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where two are the same."""
    distinct = []
    for k, name in enumerate(names):
        before = names[:k].count(name)
        distinct.append(f"{name} ({before + 1})" if before else name)
    return distinct


def _check_same_tokens(a: Clip, b: Clip) -> None:
    same = a.text.words.size == b.text.words.size and all(
        a.text.words.decode([i]) == b.text.words.decode([i]) for i in range(a.text.words.size)
    )
    if not same:
        raise ArgumentError(
            "clips",
            f"holds {a.name} and {b.name}, whose tokenizers differ, so that one prompt cannot be "
            "the same tokens for both",
            "take CLIPs of one tokenizer, like ViT-L-14 and ViT-bigG-14",
        )
    if a.device != b.device:
        raise ArgumentError(
            "clips", f"holds {a.name} on {a.device} and {b.name} on {b.device}", "put them on one"
        )
