"""The search of items, a full batch at a time, on a CLIP that is loaded once."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from ..captioners import load_captioner, naming_captioner
from ..captions import prepare_caption, pruned, text_of_caption
from ..clip import load_clip
from ..clip.device import default_dtype
from ..clip.images import ImageInput, load_image, load_image_at
from ..continuation import continuing
from ..errors import ArgumentError
from ..names import name_of, printable
from ..priors import needed_language_model
from ..prompt_text import SLOT
from ..readability import LanguageModel, load_language_model
from ..results import Result
from ..scoring import check_finite
from ..targets import Avoid, encode_targets
from ..tasks import distill, invert
from .job import Job

log = logging.getLogger(__name__)

# Variants of prompts that are searched side by side by default, and the most items. On a CPU more
# bring nothing; on a GPU there are fewer where memory ends.
_VARIANTS = {"cpu": 128, "mps": 512, "cuda": 4096}
_MOST = {"cpu": 16}
_SCORED = 64

# MKL rounds a row of a matrix product differently where it is one of the last rows of a number
# that 4 does not divide. With multiples of 4 no result depends on the other items.
_FULL = 4

# The share of the free memory for what grows with the number of items.
_SHARE = 0.4


# Arguments of the tasks, as the errors of items name them.
_SHOWN = {"images": "the item", "prompt": "the prompt", "caption": "the caption"}


class Problem(ValueError):
    """Why an item cannot be searched, as `Kind: message`."""


class DeviceLost(Exception):
    """The device fails every further call of this process; no item is the cause."""


def default_batch_size(job: Job, device: str) -> int:
    """The number of items that are searched side by side on a kind of device, given the memory."""
    if job.task == "distill" or job.captioned:  # prompts differ in length
        return 1
    if job.task == "score":
        return _SCORED
    room = _VARIANTS.get(device, 128) // (job.options.work.trials * job.options.restarts)
    return max(_FULL, min(room, _MOST.get(device, 64)))


def _free_memory(device: torch.device) -> int | None:
    """Bytes; None where it is unknown, or where there is enough."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class Worker:
    """Does a job to items.

    A result depends on its item and the job, not on other items or their order.

    Args:
        job: what to do.
        device, download: as `load_clip` takes them.
        batch_size: items that are searched side by side; None: `default_batch_size`. Where memory
            ends there are fewer. On a CPU a multiple of 4 wastes nothing.
    """

    def __init__(
        self,
        job: Job,
        device: str | None = None,
        download: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.job = job
        self.clip = load_clip(
            list(job.clip),
            device=device,
            download=download,
            weights=job.clip_weights,
            activation=job.activation,
        )
        self._write = self._captioner(download)
        self._options = replace(job.options, language_model=self._language_model())
        self._steering: dict[str, Any] = {
            "caption": job.caption,
            "avoid": Avoid(job.avoid, job.avoid_weight),
        }
        default = default_batch_size(job, self.clip.device.type)
        self.batch_size = batch_size or self._that_fit(default)

    def _captioner(self, download: bool) -> Callable[[ImageInput], str] | None:
        """The model that the job names; None: there is none."""
        name = self.job.captioner
        if name is None:
            return None
        with naming_captioner():
            return load_captioner(name, device=self.clip.device, download=download)

    def _language_model(self) -> LanguageModel | None:
        """The one that the job names, or that its CLIP needs; None: there is none."""
        job, device = self.job, self.clip.device
        if job.options.read_weight and job.language_model is not None:
            model = load_language_model(job.language_model)
        else:  # by `readability` alone: a wording has the bundled one
            weight, words = job.options.readability, self.clip.text.words
            model = needed_language_model(weight, None, device, words)
        if model is not None:
            model.model.to(device, default_dtype(device))
        return model

    def _that_fit(self, items: int) -> int:
        """This number of items, or the number that the device has memory for."""
        free = _free_memory(self.clip.device)
        if free is None or self.job.task != "invert":
            return items
        variants = self.job.options.work.trials * self.job.options.restarts
        each = variants * self.clip.text.memory_per_prompt(self.job.prompt_len or 1)
        return max(1, min(items, int(_SHARE * free) // each))

    def check(self) -> None:
        """Search for a moment, so that options that do not fit the CLIP are reported at once.

        Raises:
            ArgumentError: they do not fit.
        """
        if self.job.task == "score":
            return
        work = self.job.options.work
        options = replace(self._options, swaps=min(1, work.swaps))
        if options.wording == "free" or options.start_from is not None:
            options = replace(options, steps=1)
        if self.job.task == "distill":
            longer = "bird " * min(2 * (options.prompt_len or 8), self.clip.text.max_prompt_len)
            distill(self.clip, longer, options, ratio=self.job.ratio)
        else:
            feature = check_finite(self.clip.encode_texts(["a bird"]), self.clip)
            invert(self.clip, feature, options, **self._steering)
            if self._write is not None:
                _written(self._write, Image.new("RGB", (64, 64), "grey"))

    def rows(self, items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """The rows of items, some at a time, in any order; images are read during a search.

        Args:
            items: with the names of `pez_core.batch.sources.ITEMS`.

        Yields:
            Rows with the names of `pez_core.batch.output.SCHEMA`.
        """
        group: list[tuple[dict, Any]] = []
        coming: deque = deque()
        waiting = iter(items)
        reader = ThreadPoolExecutor(1)
        try:
            while True:
                while len(coming) < 2 * self.batch_size and (item := next(waiting, None)):
                    coming.append((item, reader.submit(self._read, item)))
                if not coming:
                    break
                item, pending = coming.popleft()
                try:
                    group.append((item, self._when_read(item, pending)))
                except Exception as error:  # decoders of damaged data raise whatever they meet
                    _check_device(error)
                    yield [self._failed(item, error)]
                if len(group) >= self.batch_size:
                    yield self._search(group)
                    group = []
            if group:
                yield self._search(group)
        finally:
            reader.shutdown(cancel_futures=True)

    def _read(self, item: dict[str, Any]) -> torch.Tensor | str:
        """(1, features) of the image of an item, or its prompt."""
        if item["problem"]:
            raise Problem(item["problem"])
        if self.job.task == "distill":
            return item["prompt"]
        if item["offset"] is None:
            picture = load_image(name_of(item["path"]))
        else:
            picture = load_image_at(name_of(item["path"]), item["offset"], item["size"])
        if self._write is not None:
            item["prompt"] = _written(self._write, picture)
        # a picture alone, since a sum may depend on what else is in the batch
        return check_finite(self.clip.encode_images([picture], self.job.options.fit), self.clip)

    def _when_read(self, item: dict[str, Any], pending: Future) -> torch.Tensor | str:
        try:
            return pending.result()
        except torch.OutOfMemoryError:  # the search beside it had it all
            return self._read(item)

    def _search(self, group: Sequence[tuple[dict[str, Any], Any]]) -> list[dict[str, Any]]:
        began = time.perf_counter()
        try:
            found = getattr(self, f"_{self.job.task}")(group)
        except Exception as error:  # no item may end the others, whatever it raises
            _check_device(error)
            if len(group) == 1:
                return [self._failed(group[0][0], error)]
            size = 1
            if isinstance(error, torch.OutOfMemoryError):
                size = self.batch_size = -(-len(group) // 2)
                log.warning("No memory for %d items at once; going on with %d.", len(group), size)
        else:
            seconds = (time.perf_counter() - began) / len(group)
            return [
                {"id": item["id"], "seconds": seconds, "error": None} | one
                for (item, _), one in zip(group, found, strict=True)
            ]
        # outside of the handler, whose error holds on to the memory that is needed now
        parts = [group[k : k + size] for k in range(0, len(group), size)]
        return [row for part in parts for row in self._search(part)]

    def _invert(self, group: Sequence[tuple[dict, torch.Tensor]]) -> list[dict[str, Any]]:
        if self.job.captioned:  # a search has one caption
            return [self._continue_caption(item, feature) for item, feature in group]
        seeds = [self.job.seed_of(item["id"]) for item, _ in group]
        features = torch.cat([feature for _, feature in group])
        if self.clip.device.type == "cpu":  # the first ones again fill it up
            filled = torch.arange(-(-len(group) // _FULL) * _FULL) % len(group)
            features, seeds = features[filled], [seeds[k] for k in filled]
        options = replace(self._options, seed=seeds)
        results = invert(self.clip, features, options, **self._steering)
        return [_row(result, seed) for result, seed, _ in zip(results, seeds, group, strict=False)]

    def _continue_caption(self, item: dict[str, Any], feature: torch.Tensor) -> dict[str, Any]:
        """Search the words behind the caption of an item, whose (1, features) image this is."""
        seed = self.job.seed_of(item["id"])
        options = replace(self._options, seed=seed)
        if self.job.caption:  # of the user, whose other words stay as they are
            caption, remark = pruned(self.clip, self.job.caption, feature, options.fit)
        else:
            target = feature if self.job.prune_caption else None
            caption, remark = prepare_caption(self.clip, item["prompt"], options, target)
        steering = {**self._steering, "caption": caption}
        options, change = continuing(options, caption)
        (result,) = invert(self.clip, feature, options, **steering)
        row = _row(result, seed) | {"caption": text_of_caption(caption)}
        return row | {"note": " ".join(filter(None, [remark, change, row["note"]])) or None}

    def _distill(self, group: Sequence[tuple[dict, str]]) -> list[dict[str, Any]]:
        ((item, prompt),) = group
        seed = self.job.seed_of(item["id"])
        options = replace(self._options, seed=seed)
        return [_row(distill(self.clip, prompt, options, ratio=self.job.ratio), seed)]

    def _score(self, group: Sequence[tuple[dict, torch.Tensor]]) -> list[dict[str, Any]]:
        prompts = [item["prompt"] for item, _ in group]
        images = torch.cat([feature for _, feature in group])
        # each text alone: a sum may depend on the others in the batch
        texts = torch.cat([encode_targets("prompt", self.clip, [prompt]) for prompt in prompts])
        pairs = zip(texts, images, strict=True)
        similarities = torch.stack([text @ image for text, image in pairs])
        encode = self.clip.text.words.encode
        return [
            {"prompt": prompt, "similarity": similarity, "token_ids": encode(prompt), "seed": None}
            for prompt, similarity in zip(
                prompts, check_finite(similarities, self.clip).tolist(), strict=True
            )
        ]

    def _failed(self, item: dict[str, Any], error: Exception) -> dict[str, Any]:
        if isinstance(error, Problem):
            return failed_row(item["id"], str(error))
        cause = error.__cause__ or error
        kind = "ValueError" if isinstance(cause, ArgumentError) else type(cause).__name__
        message = str(error)
        if isinstance(error, ArgumentError):
            message = error.render(lambda name: _SHOWN.get(name, name))
        return failed_row(item["id"], f"{kind}: {message}")


def _written(write: Callable[[ImageInput], str], picture: Image.Image) -> str:
    """The text of a captioner, in which no place for the learned words is meant."""
    with naming_captioner():
        return write(picture).replace(SLOT, "")


def _check_device(error: Exception) -> None:
    """Raise `DeviceLost` for errors after which every other call fails, too."""
    if "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError):
        raise DeviceLost(str(error)) from error


def failed_row(item: str, error: str) -> dict[str, Any]:
    """The row of an item that has an error, of the form `Kind: message`."""
    nothing = dict.fromkeys(["prompt", "similarity", "token_ids", "seed", "seconds"])
    return {"id": item, **nothing, "error": printable(error)}


def kind_of(error: str) -> str:
    """The kind of the error of a row."""
    return error.partition(":")[0]


def _row(result: Result, seed: int) -> dict[str, Any]:
    return {
        "prompt": result.prompt,
        "similarity": result.similarity,
        "token_ids": result.token_ids,
        "seed": seed,
        "note": result.note or None,
    }
