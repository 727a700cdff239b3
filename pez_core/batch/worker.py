"""Items in, rows out: one CLIP, loaded once, and full batches of its search."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..clip import load_clip
from ..clip.device import default_dtype
from ..clip.images import load_image, load_image_at
from ..priors import check_readability
from ..readability import load_language_model
from ..targets import encode_targets
from ..tasks import distill, invert
from .job import Job

log = logging.getLogger(__name__)

# Versions of prompts that are searched side by side where nobody says how many items are, and the
# most items. On a CPU more bring nothing; on a GPU there are fewer where memory ends.
_VERSIONS = {"cpu": 128, "mps": 512, "cuda": 4096}
_MOST = {"cpu": 16}
_SCORED = 64

# MKL rounds a row of a product of matrices differently where it is one of the last of a number of
# rows that 4 does not divide. With groups of so many items no number of rows is like that, and no
# result depends on what else is in a group.
_FULL = 4

# Of the memory that is free, the part for what grows with the number of items.
_SHARE = 0.4

# What one item may raise without an end of the others.
_ERRORS = (ValueError, RuntimeError, FloatingPointError, MemoryError, OSError)


class Problem(ValueError):
    """Why an item cannot be searched, as `Kind: message`."""


class DeviceLost(Exception):
    """The device can do nothing more in this process; it is no fault of an item."""


def items_at_once(job: Job, device: str) -> int:
    """How many items are searched side by side on a kind of device, if memory allows."""
    if job.task == "distill":  # prompts of other lengths take other lengths
        return 1
    if job.task == "score":
        return _SCORED
    room = _VERSIONS.get(device, 128) // (job.plan.trials * job.restarts)
    return max(_FULL, min(room, _MOST.get(device, 64)))


def _free_memory(device: torch.device) -> int | None:
    """Bytes; None where it cannot be told, or where there is enough."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class Worker:
    """Does a job to items.

    What it finds for an item does not depend on what else it is given, or in which order.

    Args:
        job: what to do.
        device, download: as `load_clip` takes them.
        at_once: items that are searched side by side; None: as `items_at_once` says. Where memory
            ends there are fewer. On a CPU a multiple of 4 wastes nothing.
    """

    def __init__(
        self,
        job: Job,
        device: str | None = None,
        download: bool = False,
        at_once: int | None = None,
    ) -> None:
        self.job = job
        self.clip = load_clip(
            list(job.clip), device=device, download=download, weights=job.clip_weights
        )
        self._options = job.options()
        if job.task != "score":
            given = job.language_model and load_language_model(job.language_model)
            model = check_readability(job.readability, given, self.clip.device)
            if model is not None:
                model.model.to(self.clip.device, default_dtype(self.clip.device))
            self._options["language_model"] = model
        self.at_once = at_once or self._that_fit(items_at_once(job, self.clip.device.type))

    def _that_fit(self, items: int) -> int:
        """So many items, or those for which the device has memory."""
        free = _free_memory(self.clip.device)
        if free is None or self.job.task != "invert":
            return items
        versions = self.job.plan.trials * self.job.restarts
        each = versions * self.clip.text.memory_per_prompt(self.job.prompt_len)
        return max(1, min(items, int(_SHARE * free) // each))

    def check(self) -> None:
        """Search for a moment, so that settings that do not fit the CLIP are told at once.

        Raises:
            TypeError, ValueError: they do not fit.
        """
        if self.job.task == "score":
            return
        options = self._options | {"steps": 1, "refine_steps": min(1, self.job.plan.refine_steps)}
        if self.job.task == "distill":
            longer = "bird " * min(2 * (self.job.prompt_len or 8), self.clip.text.max_prompt_len)
            distill(self.clip, longer, **options)
        else:
            invert(self.clip, self.clip.encode_texts(["a bird"]), **options)

    def rows(self, items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """The rows of items, some at a time, in any order; images are read while others are
        searched.

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
                while len(coming) < 2 * self.at_once and (item := next(waiting, None)):
                    coming.append((item, reader.submit(self._read, item)))
                if not coming:
                    break
                item, pending = coming.popleft()
                try:
                    group.append((item, self._when_read(item, pending)))
                except Exception as error:  # decoders of damaged data raise whatever they meet
                    _check_device(error)
                    yield [self._failed(item, error)]
                if len(group) >= self.at_once:
                    yield self._search(group)
                    group = []
            if group:
                yield self._search(group)
        finally:
            reader.shutdown(cancel_futures=True)

    def _read(self, item: dict[str, Any]) -> torch.Tensor | str:
        """What of an item the search needs: (1, features) of its image, or its prompt."""
        if item["problem"]:
            raise Problem(item["problem"])
        if self.job.task == "distill":
            return item["prompt"]
        if item["offset"] is None:
            picture = load_image(item["path"])
        else:
            picture = load_image_at(item["path"], item["offset"], item["size"])
        # a picture alone, since a sum may depend on what else is in the batch
        return self.clip.encode_images([picture])

    def _when_read(self, item: dict[str, Any], pending) -> torch.Tensor | str:
        try:
            return pending.result()
        except torch.OutOfMemoryError:  # the search beside it had it all
            return self._read(item)

    def _search(self, group: Sequence[tuple[dict[str, Any], Any]]) -> list[dict[str, Any]]:
        began = time.perf_counter()
        try:
            found = getattr(self, f"_{self.job.task}")(group)
        except _ERRORS as error:
            _check_device(error)
            if len(group) == 1:
                return [self._failed(group[0][0], error)]
            size = 1
            if isinstance(error, torch.OutOfMemoryError):
                size = self.at_once = -(-len(group) // 2)
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
        seeds = [self.job.seed_of(item["id"]) for item, _ in group]
        features = torch.cat([feature for _, feature in group])
        if self.clip.device.type == "cpu":  # the first ones again fill it up
            filled = torch.arange(-(-len(group) // _FULL) * _FULL) % len(group)
            features, seeds = features[filled], [seeds[k] for k in filled]
        results = invert(self.clip, features, seed=seeds, **self._options)
        return [_row(result, seed) for result, seed, _ in zip(results, seeds, group, strict=False)]

    def _distill(self, group: Sequence[tuple[dict, str]]) -> list[dict[str, Any]]:
        ((item, prompt),) = group
        seed = self.job.seed_of(item["id"])
        return [_row(distill(self.clip, prompt, seed=seed, **self._options), seed)]

    def _score(self, group: Sequence[tuple[dict, torch.Tensor]]) -> list[dict[str, Any]]:
        prompts = [item["prompt"] for item, _ in group]
        images = torch.cat([feature for _, feature in group])
        # each alone: a sum may depend on what else is in the batch
        texts = torch.cat([encode_targets("prompt", self.clip, [prompt]) for prompt in prompts])
        similarities = [float(text @ image) for text, image in zip(texts, images, strict=True)]
        encode = self.clip.text.words.encode
        return [
            {"prompt": prompt, "similarity": similarity, "token_ids": encode(prompt), "seed": None}
            for prompt, similarity in zip(prompts, similarities, strict=True)
        ]

    def _failed(self, item: dict[str, Any], error: Exception) -> dict[str, Any]:
        message = str(error).removeprefix("`images`: ").removeprefix("`prompt` ")
        if not isinstance(error, Problem):
            message = f"{type(error.__cause__ or error).__name__}: {message}"
        return failed_row(item["id"], message)


def _check_device(error: Exception) -> None:
    """Raise `DeviceLost` for errors after which every other call fails, too."""
    if "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError):
        raise DeviceLost(str(error)) from error


def failed_row(item: str, error: str) -> dict[str, Any]:
    """The row of an item that has an error, of the form `Kind: message`."""
    nothing = dict.fromkeys(["prompt", "similarity", "token_ids", "seed", "seconds"])
    return {"id": item, **nothing, "error": error}


def kind_of(error: str) -> str:
    """What kind of error a row has."""
    return error.partition(":")[0]


def _row(result, seed: int) -> dict[str, Any]:
    return {
        "prompt": result.prompt,
        "similarity": result.similarity,
        "token_ids": result.token_ids,
        "seed": seed,
    }
