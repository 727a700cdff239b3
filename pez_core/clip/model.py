"""A CLIP as the rest of the package uses it: images and texts in, unit features out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import LayerNormFp32
from PIL import Image

from ..errors import ArgumentError, check_choice
from ..options import FITS
from .device import pick_device, pick_precision
from .images import trim_to_centre
from .kept import KeptFeatures
from .text import TextTower

_IMAGE_BATCH = _CHUNK_BATCH = 64


class Clip:
    """An open_clip model, its public tokenizer and its image preparation.

    Made by `load_clip`; build it directly to search a model that is already in memory.

    Args:
        model: open_clip model on its device, in its dtype.
        tokenizer: its tokenizer, from `open_clip.get_tokenizer`.
        name: shown in messages and results.
        vocabulary: ids of the tokens that the model was trained on, of which prompts are made by
            default; None: all tokens.
        config: the configuration of the model: open_clip's `model_cfg` and, where the tokenizer is
            not CLIP's own, `tokenizer`, the architecture that it belongs to. Only needed to save
            the model; `load_clip` fills it in.

    Attributes:
        text: `TextTower`, from token embeddings to text features.
        trained_tokens: ids that the model was trained on; None: all of them.
        image_tower: a function without arguments; every use of the image tower runs in the context
            that it returns. Nothing by default; a memory manager sets one that moves the tower to
            the device and back.
        cache: for data derived from the weights, such as the features of single tokens, by a name
            that the module that puts it there chooses. Clear it after a change of the weights.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "clip",
        vocabulary: Sequence[int] | None = None,
        config: dict | None = None,
    ) -> None:
        self.config = config
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.text = TextTower(model, tokenizer)
        self._prepare = self._preparation()
        self._centre_crops = model.visual.preprocess_cfg.get("resize_mode") == "shortest"
        self.trained_tokens = None if vocabulary is None else frozenset(vocabulary)
        self.image_tower: Callable[[], AbstractContextManager] = nullcontext
        self.cache: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Clip({self.name!r}, device={str(self.device)!r}, dtype={self.dtype})"

    @cached_property
    def vocabulary(self) -> torch.Tensor:
        """(n,) sorted ids of the default vocabulary, on the CPU.

        The trained tokens that round-trip; it takes seconds to find them among all tokens of CLIP.
        """
        tokens = self.trained_tokens
        if tokens is None:
            tokens = range(len(self.text.token_embedding))
        with torch.inference_mode(False):
            return torch.tensor(self.text.words.round_trip_ids(tokens))

    @property
    def device(self) -> torch.device:
        """Where the weights of the text encoder are."""
        return self.text.token_embedding.device

    @cached_property
    def feature_size(self) -> int:
        """Length of a feature vector."""
        return self.encode_texts(["a"]).shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the text tower computes in."""
        return self.text.tower.transformer.get_cast_dtype()

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Clip:
        """Move the model to a device, a dtype or both, in place; returns this CLIP.

        Args:
            device: as in `load_clip`; None: where it is.
            dtype: float32, float16 or bfloat16; None: as it is. As in PyTorch, the digits that a
                lower one loses do not come back.

        Raises:
            ArgumentError: there is no such device or dtype, or a memory manager moves the image
                tower, as with `low_memory`.
        """
        if self.image_tower is not nullcontext:
            raise ArgumentError(
                "device",
                f"of {self.name} cannot be changed, since a memory manager moves its image tower",
                "load it again where it is wanted",
            )
        target = self.device if device is None else pick_device(device)
        if dtype is not None:
            pick_precision(target, dtype)
            self.text.matrix_dtype = dtype
        with torch.inference_mode(False):
            self.model.to(target, dtype)
            for module in self.model.modules():
                if isinstance(module, LayerNormFp32):  # computes with float32 weights only
                    module.float()
        self.cache.clear()
        return self

    def encode_images(self, images: Iterable[Image.Image], fit: str = "crop") -> torch.Tensor:
        """RGB pictures -> (number of images, features) unit features in float32.

        Each is prepared as soon as `images` gives it, so that large ones need not exist together.
        The features of the last images are kept, so that a search for the same image starts sooner.

        Args:
            images: of any size.
            fit: how each becomes a square. `"crop"`: as the CLIP was trained, which for most is the
                centre of the image. `"pad"`: the whole image, with bars in the mean colour that the
                CLIP subtracts. `"stretch"`: the whole image, distorted.

        Raises:
            ArgumentError: there is no such `fit`.
        """
        prepare = self._prepare_for(fit)
        prepared = (prepare(image) for image in images)
        kept, features = self._kept_features, []
        # leaving inference mode turns gradients on again
        with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
            borrowed = False
            while few := list(islice(prepared, _IMAGE_BATCH)):
                keys, before = [kept.key(one) for one in few], kept.valid()
                found = {key: before[key] for key in keys if key in before}
                new = {key: one for key, one in zip(keys, few, strict=True) if key not in found}
                if new:
                    if not borrowed:
                        stack.enter_context(self.image_tower())
                        borrowed = True
                    encoded = self._encode_pixels(torch.stack(list(new.values())))
                    found |= zip(new, encoded, strict=True)
                    kept.keep({key: found[key] for key in new})
                features += [found[key] for key in keys]
        # behind the image tower's use: for that a memory manager may have moved the text tower
        return torch.stack(features).to(self.device)

    @property
    def _kept_features(self) -> KeptFeatures:
        return self.cache.setdefault("images", KeptFeatures(self.model.visual))

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, height, width) pixels -> (n, features) unit features on the CPU."""
        device = next(self.model.visual.parameters()).device
        features = self.model.encode_image(pixels.to(device, self.dtype)).float()
        return F.normalize(features, dim=-1).cpu()

    def _preparation(self, **changes: Any) -> Callable[[Image.Image], torch.Tensor]:
        """open_clip's preparation of images, with changes of its `PreprocessCfg`."""
        prepare: Any = image_transform_v2(
            PreprocessCfg(**{**self.model.visual.preprocess_cfg, **changes}), is_train=False
        )
        return prepare

    def _prepare_for(self, fit: str) -> Callable[[Image.Image], torch.Tensor]:
        check_choice("fit", fit, FITS)
        if fit == "stretch":
            return self._preparation(resize_mode="squash")
        if fit == "pad":
            mean = tuple(round(255 * value) for value in self.model.visual.preprocess_cfg["mean"])
            prepare = self._preparation(resize_mode="longest", fill_color=mean)
            size = min(_pair(self.model.visual.preprocess_cfg["size"]))
            return lambda image: prepare(trim_to_centre(image, size))  # one pixel at least
        if self._centre_crops:
            return lambda image: self._prepare(trim_to_centre(image))
        return lambda image: self._prepare(image)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> (len(texts), features) unit features in float32, by open_clip's own way.

        That is the public tokenizer and the whole text tower, independent of the code that searches
        use. The tokenizer cuts texts that are longer than the context.
        """
        ids = self.tokenizer(list(texts)).to(self.device)
        self.text.count(len(ids), ids.shape[1])
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    @torch.no_grad()
    def _encode_chunks(self, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids of chunks -> (len(chunks), features) unit features."""
        text, length = self.text, self.text.context_length
        rows = [[*text.ids_before, *chunk, *text.ids_behind] for chunk in chunks]
        # with one token the row is as long as the context, so no row is too short
        ids = torch.tensor([row[:length] for row in rows], device=self.device)
        self.text.count(len(ids), ids.shape[1])
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    @torch.no_grad()
    def encode_chunks(self, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids of one text, cut to fit the context -> (features,) unit feature of all of it.

        Each chunk is encoded by itself, between a start and an end token of its own, as ComfyUI
        does; the features are averaged by their number of tokens.
        """
        return self.encode_long_texts([chunks])[0]

    @torch.no_grad()
    def encode_long_texts(self, texts: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        """Texts in chunks, as `encode_chunks` takes one -> (len(texts), features) unit features.

        Equal chunks of several texts are encoded once, and many side by side.
        """
        chunks = list(dict.fromkeys(tuple(chunk) for text in texts for chunk in text))
        few = [chunks[k : k + _CHUNK_BATCH] for k in range(0, len(chunks), _CHUNK_BATCH)]
        each = torch.cat([self._encode_chunks(some) for some in few])
        places = {chunk: k for k, chunk in enumerate(chunks)}
        found = []
        for text in texts:
            rows = torch.tensor([places[tuple(chunk)] for chunk in text], device=each.device)
            counts = torch.tensor([float(len(chunk)) for chunk in text], device=each.device)
            found.append((each[rows] * counts[:, None]).sum(0))
        return F.normalize(torch.stack(found), dim=-1)

    def split(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features by the name of their encoder, of which there is one."""
        return {self.name: features}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
