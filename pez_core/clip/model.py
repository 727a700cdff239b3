"""A CLIP as the rest of pez_core sees it: pictures and texts in, unit features out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from ..vocabulary import round_trip_ids
from .images import trim_to_centre
from .text import TextTower, Words

_IMAGE_BATCH = 64


@lru_cache(maxsize=8)
def _surviving(words: Words, ids: tuple[int, ...]) -> list[int]:
    # seconds for a whole vocabulary, and CLIPs that are made of one another ask again
    return round_trip_ids(words, ids)


class Clip:
    """An open_clip model, its public tokenizer and its image preparation.

    Made by `load_clip`; build it directly to search a model you already have in memory.

    Args:
        model: open_clip model on its device, in its dtype.
        tokenizer: what `open_clip.get_tokenizer` returns for it.
        name: shown in messages and results.
        vocabulary: ids of the tokens that prompts are made of by default; None: all of them. Tokens
            that do not survive being printed and read again are left out either way.
        config: what the model was built from: open_clip's `model_cfg` and, where the tokenizer is
            not CLIP's own, `tokenizer`, the architecture that it belongs to. Only needed where the
            model is to be saved; `load_clip` fills it in.

    Attributes:
        text: `TextTower`, from token embeddings to text features.
        vocabulary: (n,) sorted ids of the default vocabulary, on the CPU.
        known: ids that the model was trained on; None: all of them.
        image_tower: what every use of the image tower is wrapped in. Nothing by default; whoever
            manages memory puts a context manager here that brings the tower to the device.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        name: str = "clip",
        vocabulary: Sequence[int] | None = None,
        config: dict | None = None,
    ) -> None:
        self.config = config
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.text = TextTower(model, tokenizer)
        self._prepare = image_transform_v2(
            PreprocessCfg(**model.visual.preprocess_cfg), is_train=False
        )
        self._centre_crops = model.visual.preprocess_cfg.get("resize_mode") == "shortest"
        self.known = None if vocabulary is None else frozenset(vocabulary)
        every = range(len(self.text.token_embedding)) if vocabulary is None else vocabulary
        self.vocabulary = torch.tensor(_surviving(self.text.words, tuple(sorted(every))))
        self.cache: dict[str, Any] = {}
        self.image_tower: Callable[[], AbstractContextManager] = nullcontext

    def __repr__(self) -> str:
        return f"Clip({self.name!r}, device={str(self.device)!r}, dtype={self.dtype})"

    @property
    def device(self) -> torch.device:
        return self.text.token_embedding.device

    @cached_property
    def features(self) -> int:
        """Length of a feature vector."""
        return self.encode_texts(["a"]).shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the text tower computes in."""
        return self.text.tower.transformer.get_cast_dtype()

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures -> (len(images), features) unit features in fp32."""
        if self._centre_crops:
            images = [trim_to_centre(image) for image in images]
        features = []
        with self.image_tower():
            device = next(self.model.visual.parameters()).device
            for start in range(0, len(images), _IMAGE_BATCH):
                few = images[start : start + _IMAGE_BATCH]
                batch = torch.stack([self._prepare(image) for image in few])
                features.append(self.model.encode_image(batch.to(device, self.dtype)).float())
        return F.normalize(torch.cat(features), dim=-1).to(self.device)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> (len(texts), features) unit features in fp32, the public way.

        The public tokenizer and the whole text tower, nothing of the search's own path. Texts
        longer than the context are cut by the tokenizer.
        """
        ids = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    @torch.no_grad()
    def encode_chunks(self, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids of one text, cut to fit the context -> (features,) unit feature of all of it.

        Each chunk is encoded by itself, between a start and an end token of its own, as ComfyUI
        does; the features are averaged by their number of tokens.
        """
        text, length = self.text, self.text.context_length
        rows = [[*text._before, *chunk, *text._after] for chunk in chunks]
        # the row of one known word is as long as the context, so no row is too short
        ids = torch.tensor([row[:length] for row in rows], device=self.device)
        each = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        counts = torch.tensor([float(len(chunk)) for chunk in chunks], device=self.device)
        return F.normalize((each * counts[:, None]).sum(0), dim=-1)

    def split(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features by the name of their encoder, of which there is one."""
        return {self.name: features}
