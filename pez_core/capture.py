"""Steps that are captured once as a CUDA graph and then replayed.

Steps of a search are launch-bound: to launch their kernels takes longer than to run them. A CUDA
graph holds all kernels of a step and launches them together.

Each captured graph is compared with the eager step before it is used. Where the caller does not
say, steps are captured only on a device on which `pez doctor` found them equal and faster. The
environment variable `PEZ_CAPTURE` turns capturing on (1) or off (0) everywhere.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import tower_work
from .folders import models_folder
from .version import __version__

log = logging.getLogger(__name__)

Step = Callable[[], None]

# How far a replayed step may be from the eager one: a share of the greatest value. Half precision
# and sums in another order differ by less, a wrong graph by more.
_TOLERANCE = 0.05


def wanted(device: torch.device) -> bool:
    """Whether steps are captured on a device where the caller does not say."""
    choice = os.environ.get("PEZ_CAPTURE")
    if choice in ("0", "1"):
        return choice == "1"
    return device.type == "cuda" and _trusted().get(_place(device), False)


def trust(device: torch.device, passed: bool) -> bool:
    """Note whether captured steps passed the self-test on a device.

    Returns:
        Whether that could be stored.
    """
    path = _record()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(_trusted() | {_place(device): passed}, indent=1), "utf-8")
        part.replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error)
        return False
    return True


def device_name(device: torch.device) -> str:
    """The name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _place(device: torch.device) -> str:
    """What the result of the self-test depends on."""
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, pez {__version__}"
    return f"{device_name(device)}, {versions}"


def _record() -> Path:
    return models_folder() / "captures.json"


def _trusted() -> dict[str, bool]:
    """The results of the self-test so far; a file that cannot be read has none."""
    try:
        found = json.loads(_record().read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {place: passed is True for place, passed in found.items()}


@dataclass
class Captures:
    """What became of the steps that were to be captured.

    Attributes:
        used: the number of graphs that are replayed.
        failures: why others are not.
    """

    used: int = 0
    failures: list[str] = field(default_factory=list)


_NOTED: ContextVar[Captures | None] = ContextVar("captures", default=None)


@contextmanager
def noted() -> Iterator[Captures]:
    """Note what becomes of the captures until the end of the block, in this thread."""
    captures = Captures()
    token = _NOTED.set(captures)
    try:
        yield captures
    finally:
        _NOTED.reset(token)


class Recorder(Protocol):
    """Captures the steps of one search, which run one after the other on one device.

    It may run a step while it captures it; the caller restores the tensors that the step changes.

    Attributes:
        failed: a capture failed; no step of this search is captured any more.
    """

    failed: bool

    def warm_up(self, step: Step) -> None:
        """Run a step where it is going to be captured."""

    def record(self, step: Step) -> Step:
        """A replay that does the same as `step`.

        Raises:
            RuntimeError: the step synchronises with the device, or cannot be captured otherwise.
        """
        ...


class NoWaiting(TorchDispatchMode):
    """Raises at each operation that would wait for the device or copy from another one.

    CUDA would raise, too, but leave its allocator in the middle of a capture.

    Raises:
        RuntimeError: names the operation.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        packet, aten = func.overloadpacket, torch.ops.aten
        waits = packet in (aten._local_scalar_dense, aten.nonzero, aten.equal)
        if packet in (aten.index, aten.index_put, aten.index_put_):
            masks = (one for one in args[1] if one is not None)
            waits = any(one.dtype in (torch.bool, torch.uint8) for one in masks)
        elif packet in (aten.copy_, aten._to_copy):
            where = {one.device for one in tensors} | {kwargs.get("device") or tensors[0].device}
            waits = len({torch.device(one).type for one in where}) > 1
        if waits:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **kwargs)


class CudaRecorder:
    """Captures CUDA graphs that share their memory."""

    failed = False

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = _stream(device), None

    def warm_up(self, step: Step) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        if self._pool is None:  # the graphs cannot use memory that is left from warming up
            torch.cuda.empty_cache()
        collects = gc.isenabled()
        gc.disable()  # a finalizer may do something that cannot be captured
        try:
            with torch.cuda.stream(self._stream), NoWaiting():
                # other threads may allocate memory meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        # the graphs never run side by side, and their results are copied out
        self._pool = graph.pool()
        return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # one per device for good: libraries keep workspaces for every stream that they were given
    return torch.cuda.Stream(device)


def recorder_for(device: torch.device) -> Recorder | None:
    """A recorder for this device; None: its steps are always launched kernel by kernel."""
    if device.type == "cuda" and torch.version.cuda is not None:
        return CudaRecorder(device)
    log.debug("steps are not captured on %s", device.type)
    return None


def capturable(*parts: object) -> bool:
    """Whether all parts of a step declare that they can be captured."""
    return all(getattr(part, "capturable", False) for part in parts)


def captured(
    step: Callable[[int], None],
    device: torch.device,
    changed: Callable[[], Sequence[torch.Tensor]],
    *,
    wanted: bool,
    parts: Sequence[object],
) -> Callable[[int], None]:
    """`step`, replayed from a CUDA graph where that is possible.

    Args:
        step: one step of a search, called with its number.
        device: of the search.
        changed: called after the step has run: the tensors that it changes in place.
        wanted: False: never capture.
        parts: objects that take part in the step; all have to be `capturable`.
    """
    recorder = recorder_for(device) if wanted and capturable(*parts) else None
    if recorder is None:
        return step
    replay = Replay(partial(step, 0), recorder, changed)
    return lambda _: replay()


class Replay:
    """Runs a step eagerly a few times, then captures it as a CUDA graph and replays that.

    Each call `replay()` has the effect of one step. The first `warm_up` calls are eager. The next
    one captures the step, runs it eagerly and from the graph, and compares the tensors of
    `changed`; later calls launch the graph if both were alike. If they were not, or the capture
    failed, a warning is logged, this step runs eagerly from then on, and so do all steps with the
    same recorder that are not captured yet.

    The caller has to make sure that the step can be captured: it writes its results into tensors
    that exist already, at the same address in each call, it never waits for the device, and it
    reads nothing else that changes between calls, such as Python numbers.

    Args:
        step: a function without arguments and result, which changes tensors in place.
        recorder: from `recorder_for(device)`, one for all steps of a search. None: the step always
            runs eagerly.
        changed: a function without arguments that returns a list of all tensors which the step
            changes. It is called after the first calls, so that they may create tensors.
        warm_up: number of eager calls before the capture, at least 1.
    """

    def __init__(
        self,
        step: Step,
        recorder: Recorder | None,
        changed: Callable[[], Sequence[torch.Tensor]],
        warm_up: int = 3,
    ) -> None:
        self._step, self._recorder, self._left = step, recorder, warm_up
        self._changed = changed

    def __call__(self) -> None:
        if self._recorder is None or self._recorder.failed:
            self._step()
        elif self._left > 0:
            self._left -= 1
            self._recorder.warm_up(self._step)
        else:
            recorder, self._recorder = self._recorder, None
            self._capture(recorder)

    def _capture(self, recorder: Recorder) -> None:
        """Run the step eagerly and from a graph; keep the graph if both give the same result."""
        changed = self._changed()
        before = _copies(changed)
        flops = 0.0
        try:
            # Python runs a step that is captured, but its kernels do not run
            with tower_work.counted(alone=True) as work:
                replayed = recorder.record(self._step)
                flops = work.flops
        except RuntimeError as error:
            _give_up(recorder, str(error).partition("\n")[0])
            replayed = None
        put(changed, before)  # whether or not the recorder has run the step
        recorder.warm_up(self._step)
        if replayed is None:
            return
        expected = _copies(changed)
        put(changed, before)
        replayed()
        if all(map(_alike, changed, expected, before)):
            self._step = partial(_replay, replayed, flops)
            if captures := _NOTED.get():
                captures.used += 1
        else:
            _give_up(recorder, "the graph of a step gave another result than the step")
        put(changed, expected)


def _replay(replayed: Step, flops: float) -> None:
    replayed()
    tower_work.count(flops)


def _give_up(recorder: Recorder, why: str) -> None:
    recorder.failed = True
    if captures := _NOTED.get():
        captures.failures.append(why)
    log.warning("the steps of this search are launched one kernel at a time (%s)", why)


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [one.detach().clone() for one in tensors]


@torch.no_grad()
def put(where: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy new values into tensors, which stay in place for the graphs that read them."""
    for old, new in zip(where, values, strict=True):
        old.copy_(new)


@torch.no_grad()
def _alike(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> bool:
    if torch.equal(found, before) and not torch.equal(expected, before):
        return False  # a change may be smaller than the tolerance
    if not expected.is_floating_point():  # of two nearly equal choices either may be taken
        return True
    greatest = expected.abs().nan_to_num(0, 0, 0).max().item()
    return torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * greatest, equal_nan=True)
