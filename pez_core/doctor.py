"""A self-test of this machine, and what to paste into a bug report.

It measures how fast memory is copied and matrices are multiplied, which no search can exceed,
compares a step with the least time by these rates, and compares a device with the CPU: features,
gradients and a search. On CUDA it also compares a search
whose steps are captured as CUDA graphs with one whose steps are not. Only where that has passed
once are steps captured without being asked for (`pez_core.capture.wanted`).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import numpy as np
import torch
from PIL import Image

from . import __version__, capture
from .clip import AnyClip, Clip
from .clip.device import default_dtype, pick_device
from .clip.load import load_clip
from .errors import first_line
from .objectives import Similarity
from .pez import PezSettings, search
from .precision import bfloat16_pays
from .space import TokenSpace
from .swaps import SwapSettings, refine
from .tracker import Progress

CLIP = "emoji-clip"
TEXTS = ("a red fish", "two green trees under a blue sky", "the number seven", "")
PROBLEMS, PROMPT_LEN, STEPS = 4, 8, 60
# Cosine similarity with the CPU that each precision has to reach.
_ALIKE = {torch.float32: 0.999, torch.bfloat16: 0.98, torch.float16: 0.98}
PARTS = ("rates", "features and gradients", "search", "CUDA graphs", "step")
_PACKAGES = ("open_clip_torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")
# Rows of the products, bytes of the copy, and the least seconds of the runs that are timed.
_MATRIX, _BYTES, _SECONDS = 1024, 2**28, 0.15
# The step that is timed: tokens of its prompt, the steps of a short search, and its repetitions.
_STEP_LEN, _FEW, _ROUNDS = 16, 6, 3


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared; of a part of the self-test that ended with an error, its name.
        passed: the result; None: there is nothing to compare on this machine, or
            what is equal is not faster.
        detail: the numbers, or the error.
    """

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "not needed"}[self.passed]
        return f"{self.name}: {word} ({self.detail})"


@dataclass(frozen=True)
class Examination:
    """The result of `examine`.

    Attributes:
        facts: versions, device and rates, by name.
        checks: the comparisons.
    """

    facts: dict[str, str]
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        """Whether no comparison failed."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.facts.items()]
        return "\n".join([*lines, "", *map(str, self.checks)])


def examine(
    device: str | torch.device | None = None, callback: Callable[[str], None] | None = None
) -> Examination:
    """Examine a device, in about ten seconds.

    Args:
        device: name of the device; None: the one that `load_clip` takes.
        callback: called with each of `PARTS` before it begins.

    Returns:
        An `Examination`. A part that ends with an error, such as that of an operation which the
        device lacks, is a check that failed; the other parts go on. Where captured steps are equal
        and faster, that is noted for later searches on this device.

    Raises:
        ArgumentError: the device does not exist or cannot be used here.
    """
    where = pick_device(device)
    rates, compared, searched, captured, step = PARTS
    facts, checks, measured = _versions(), [], Rates()
    clip_on = cache(lambda device: cast(Clip, load_clip(CLIP, device=device)))

    @contextmanager
    def examined(part: str) -> Iterator[None]:
        if callback is not None:
            callback(part)
        try:
            yield
        except Exception as error:
            checks.append(Check(part, False, f"{type(error).__name__}: {first_line(error)}"))

    with examined(rates):
        for name, value in _rates(where, measured):
            facts[name] = value
    with examined(compared):
        for check in _compared(clip_on(where), clip_on(torch.device("cpu"))):
            checks.append(check)
    with examined(searched):
        checks.append(_searched(clip_on(where)))
    with examined(captured):
        checks.append(_captured(clip_on(where)))
    with examined(step):
        facts[step] = _step(clip_on(where), measured)
    return Examination(facts, checks)


def _versions() -> dict[str, str]:
    versions = {"pez": __version__, "python": platform.python_version()}
    versions |= {"system": platform.platform(), "torch": torch.__version__}
    for backend in ("cuda", "hip", "xpu"):
        if version := getattr(torch.version, backend, None):
            versions[f"torch {backend}"] = str(version)
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass
class Rates:
    """What a device can do in a second.

    Attributes:
        moved: bytes that a copy reads and writes.
        operations: floating-point operations in a product of large matrices, by dtype.
    """

    moved: float = 0.0
    operations: dict[torch.dtype, float] = field(default_factory=dict)

    def least(
        self,
        clip: Clip,
        batch: int,
        prompt_len: int,
        dtype: torch.dtype | None = None,
        compared: torch.dtype = torch.float32,
    ) -> dict[str, float]:
        """The least seconds of a step of Algorithm 1: by its memory traffic, by its arithmetic.

        The traffic is the weights of the text tower, forward and backward, and the allowed
        vocabulary once.

        Args:
            clip, batch, prompt_len: of the search.
            dtype: of the tower; None: its own.
            compared: dtype in which the tokens of the vocabulary are compared.
        """
        dtype = clip.dtype if dtype is None else dtype
        tower = clip.text.tower
        parts = [*tower.transformer.parameters(), *tower.ln_final.parameters()]
        projection = tower.text_projection
        parts += [projection] if isinstance(projection, torch.Tensor) else []
        weights = sum(part.numel() for part in parts)
        # of the last block only keys and values are computed for all positions
        last = sum(part.numel() for part in tower.transformer.resblocks[-1].parameters())
        allowed, width = len(clip.vocabulary), clip.text.token_embedding.shape[1]
        moved = 2 * weights * dtype.itemsize + allowed * width * compared.itemsize
        # forward and backward, of the learned tokens and the end token
        positions = prompt_len + 1
        tower_operations = 4 * batch * ((weights - last) * positions + last * (positions + 5) / 6)
        nearest = 2 * batch * prompt_len * allowed * width
        return {
            "memory": moved / self.moved,
            "arithmetic": tower_operations / self.operations[dtype]
            + nearest / self.operations[compared],
        }


def _rates(device: torch.device, measured: Rates) -> Iterator[tuple[str, str]]:
    """The device, and its rates of copying and multiplying, which are also put into `measured`."""
    yield "device", capture.device_name(device)
    yield "threads", str(torch.get_num_threads())
    yield "cores", str(os.cpu_count())
    precision = str(default_dtype(device)).removeprefix("torch.")
    if device.type == "cpu" and bfloat16_pays():
        precision += ", large CLIPs are searched in bfloat16"
    yield "default precision", precision
    source = torch.ones(_BYTES // 4, device=device)
    target = torch.empty_like(source)
    measured.moved = 2 * _BYTES * _per_second(device, lambda: target.copy_(source))
    yield "copy", f"{measured.moved / 1e9:.1f} GB/s"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"
        try:
            a = torch.ones(_MATRIX, _MATRIX, device=device, dtype=dtype)
            products = _per_second(device, lambda a=a: a @ a)
        except (RuntimeError, TypeError) as error:  # a backend without this precision
            yield name, f"not supported ({type(error).__name__})"
        else:
            measured.operations[dtype] = 2 * _MATRIX**3 * products
            yield name, f"{measured.operations[dtype] / 1e9:,.0f} GFLOP/s"


def _per_second(device: torch.device, run: Callable[[], object]) -> float:
    """How often a function runs in a second, in a row that ends with one wait for the device."""
    run()
    _wait(device)
    count = 1
    while True:
        began = time.perf_counter()
        for _ in range(count):
            run()
        _wait(device)
        if (elapsed := time.perf_counter() - began) >= _SECONDS:
            return count / elapsed
        count *= 2


def _wait(device: torch.device) -> None:
    """Wait until the device has done what was launched; not every backend has `synchronize`."""
    if device.type != "cpu":
        torch.zeros((), device=device).item()


def _compared(clip: AnyClip, expected: AnyClip) -> Iterator[Check]:
    """Features and gradients of the device against those of the CPU."""
    names = ("texts", "images", "gradients")
    if clip.device.type == "cpu":
        yield Check("features and gradients", None, "the device is the CPU")
        return
    least = _ALIKE[default_dtype(clip.device)]
    for name, found, wanted in zip(names, _outputs(clip), _outputs(expected), strict=True):
        near = torch.cosine_similarity(found.flatten(1), wanted.flatten(1)).min().item()
        # of NaN no comparison is true
        yield Check(name, near >= least, f"cosine similarity with the CPU {near:.4f}")


def _outputs(clip: AnyClip) -> Iterator[torch.Tensor]:
    """Features of texts and of images, and gradients of prompts, in float32 on the CPU."""
    yield clip.encode_texts(TEXTS).float().cpu()
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    yield clip.encode_images([Image.fromarray(one) for one in noise]).float().cpu()
    space, objective, ids = _problem(clip)
    with torch.enable_grad():
        embeddings = space.embed(ids).requires_grad_()
        loss, _ = objective(embeddings, 0)
        (gradients,) = torch.autograd.grad(loss.sum(), embeddings)
    yield gradients.float().cpu()


def _problem(
    clip: AnyClip, problems: int = PROBLEMS, prompt_len: int = PROMPT_LEN
) -> tuple[TokenSpace, Similarity, torch.Tensor]:
    """A small search for some texts."""
    space = TokenSpace(clip.text.token_embedding, clip.vocabulary)
    goals = clip.encode_texts(TEXTS)[:problems]
    objective = Similarity(clip.text.encoder(), goals[:, None])
    generator = torch.Generator().manual_seed(0)
    return space, objective, space.random(problems, prompt_len, generator).to(clip.device)


def _searched(clip: AnyClip) -> Check:
    """A search has to improve the prompts that it starts from."""
    space, objective, ids = _problem(clip)
    with torch.no_grad():
        _, before = objective(space.embed(ids), 0)
    found = search(space, objective, ids, PezSettings(steps=STEPS, capture=False))
    gain = (found.scores.cpu() - before.cpu()).min().item()
    return Check("search", gain > 0, f"each similarity rises by {gain:.3f} or more")


def _captured(clip: AnyClip) -> Check:
    """Captured steps have to give what eager ones give, in less time."""
    name = "steps as CUDA graphs"
    if capture.recorder_for(clip.device) is None:
        return Check(name, None, f"not on {clip.device.type}")
    seconds, found = {}, {}
    with capture.noted() as captures:
        for way in (True, False, True, False):  # the first two warm up
            began = time.perf_counter()
            found[way] = [*_searches(clip, way)]
            _wait(clip.device)
            seconds[way] = time.perf_counter() - began
    pairs = zip(found[True], found[False], strict=True)
    apart = max((a.scores - b.scores).abs().max().item() for a, b in pairs)
    ratio = seconds[False] / seconds[True]
    passed: bool | None = apart < 1 - _ALIKE[default_dtype(clip.device)]
    detail = f"{ratio:.1f} times as fast, similarities differ by {apart:.4f} at most"
    if captures.failures or not captures.used:  # such steps are eager, and equal to themselves
        why = "; ".join(dict.fromkeys(captures.failures))
        passed, detail = False, why or "no step was captured"
    elif passed and ratio <= 1:
        passed, detail = None, f"{detail}; they are not faster, and not used"
    if not capture.trust(clip.device, passed is True):
        detail += f"; that could not be stored: set PEZ_CAPTURE={int(passed is True)}"
    return Check(name, passed, detail)


def _searches(clip: AnyClip, captured: bool) -> Iterator[Progress]:
    space, objective, ids = _problem(clip)
    yield search(space, objective, ids, PezSettings(steps=STEPS, capture=captured))
    settings = SwapSettings(steps=STEPS, trials=1, capture=captured)
    yield refine(space, objective, ids, settings, seeds=range(PROBLEMS))


def _step(clip: Clip, measured: Rates) -> str:
    """The time of a step as searches run it, and the longer of its limits."""
    problem = _problem(clip, 1, _STEP_LEN)

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        search(*problem, PezSettings(steps=steps))
        _wait(clip.device)
        return time.perf_counter() - began

    seconds(_FEW)  # warms up
    taken = [seconds(_FEW + STEPS) - seconds(_FEW) for _ in range(_ROUNDS)]
    step = statistics.median(taken) / STEPS
    shown = f"{1e3 * step:.2f} ms for a prompt of {_STEP_LEN} tokens with {clip.name}"
    if not measured.moved or not {clip.dtype, torch.float32} <= measured.operations.keys():
        return shown
    limits = measured.least(clip, 1, _STEP_LEN)
    binds = max(limits, key=limits.__getitem__)
    ratio, least = step / limits[binds], 1e3 * limits[binds]
    return f"{shown}, {ratio:.1f} times the limit of {least:.2f} ms ({binds})"
