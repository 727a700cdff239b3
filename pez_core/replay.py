"""A step that is recorded once and then launched as a whole.

What a step computes takes a graphics card less time than Python takes to ask for it. A CUDA graph
asks once: the kernels of a step are recorded, and launched together from then on.

A record is not trusted: it is held against the step itself before it takes its place. The
environment variable `PEZ_RECORD=0` turns recording off.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

Step = Callable[[], None]

# By how much a record may differ from the step: a share of the greatest value. Half precision and
# sums in any order account for less, a record of something else differs by more.
_TOLERANCE = 0.05
# What was said already: a search that cannot be recorded is not told of twice.
_said: set[str] = set()
# Why nothing is recorded any more, on any device.
_failures: list[str] = []


class Recorder(Protocol):
    """Records steps of one search, which have to run one after the other on one device.

    It may run a step while it records it: what the step changes is put back after that.
    """

    def warm_up(self, step: Step) -> None:
        """Run a step where it is going to be recorded."""

    def record(self, step: Step) -> Step:
        """What does the same as `step`.

        Raises:
            RuntimeError: the step waits for the device or does something else that has no record.
        """


class NoWaiting(TorchDispatchMode):
    """Inside, what would make Python wait for a device, or copy from another, raises instead.

    CUDA would find that out too, but leave its allocator in the middle of a recording.

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
    """Records CUDA graphs that share their memory."""

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
        if self._pool is None:  # what warming up has left is of no use to the graphs
            torch.cuda.empty_cache()
        collects = gc.isenabled()
        gc.disable()  # a finalizer may do what cannot be recorded
        try:
            with torch.cuda.stream(self._stream), NoWaiting():
                # only this thread is looked at: others may well allocate memory meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        # the graphs never run side by side and leave nothing behind but what is copied
        self._pool = graph.pool()
        return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # one for good: libraries keep workspaces for each stream that they ever saw
    return torch.cuda.Stream(device)


def wanted() -> bool:
    """Whether steps are recorded where a search is not told otherwise."""
    return os.environ.get("PEZ_RECORD") != "0"


def recorder_for(device: torch.device) -> Recorder | None:
    """Records on this device; None: steps are run as they are there, which is logged once."""
    if device.type == "cuda" and torch.version.cuda is not None:
        return None if _failures else CudaRecorder(device)
    kind = "ROCm" if device.type == "cuda" else device.type
    _say(logging.INFO, f"steps are not recorded on {kind}, but launched one kernel at a time")
    return None


class Replay:
    """Runs a step as it is some times, and then from a record, if there can be one.

    A step that is to be recorded works on tensors that stay where they are, changes them in place,
    and takes nothing else that changes from the outside. Where it cannot be recorded, or its record
    does something else, it is run as it is, and nothing is recorded from then on.

    Args:
        step: what is done at each call.
        recorder: None: the step is always run as it is.
        changed: called once the step has run: the tensors that it changes.
        warm_up: calls before the step is recorded, at least 1.
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
        if self._recorder is None or _failures:
            self._step()
        elif self._left > 0:
            self._left -= 1
            self._recorder.warm_up(self._step)
        else:
            recorder, self._recorder = self._recorder, None
            self._record(recorder)

    def _record(self, recorder: Recorder) -> None:
        """Run the step as it is and from a record, which is kept if both come to the same."""
        changed = self._changed()
        before = _copies(changed)
        try:
            recorded = recorder.record(self._step)
        except RuntimeError as error:
            _give_up(str(error).partition("\n")[0])
            recorded = None
        put(changed, before)  # whether or not the recorder has run the step
        recorder.warm_up(self._step)
        if recorded is None:
            return
        right = _copies(changed)
        put(changed, before)
        recorded()
        if all(map(_alike, changed, right, before)):
            self._step = recorded
        else:
            _give_up("the record of a step did something else than the step")
        put(changed, right)


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [one.detach().clone() for one in tensors]


@torch.no_grad()
def put(where: Sequence[torch.Tensor], what: Sequence[torch.Tensor]) -> None:
    """Give tensors new values where they are, which is where records look for them."""
    for old, new in zip(where, what, strict=True):
        old.copy_(new)


@torch.no_grad()
def _alike(found: torch.Tensor, right: torch.Tensor, before: torch.Tensor) -> bool:
    if torch.equal(found, before) and not torch.equal(right, before):
        return False  # a change may well be smaller than the tolerance
    if not right.is_floating_point():  # of two that are nearly equal either may be chosen
        return True
    greatest = right.abs().nan_to_num(0, 0, 0).max().item()
    return torch.allclose(found, right, rtol=0, atol=_TOLERANCE * greatest, equal_nan=True)


def _give_up(why: str) -> None:
    _failures.append(why)
    _say(logging.WARNING, f"steps are launched one kernel at a time from now on ({why})")


def _say(level: int, what: str) -> None:
    if what not in _said:
        _said.add(what)
        log.log(level, what)
