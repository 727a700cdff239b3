"""A step that is recorded once and then launched as a whole.

What a step computes takes a graphics card less time than Python takes to ask for it. A CUDA graph
asks once: the kernels of a step are recorded, and launched together from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

log = logging.getLogger(__name__)

Step = Callable[[], None]


class Recorder(Protocol):
    """Records steps of one search, which have to run one after the other on one device."""

    def warm_up(self, step: Step) -> None:
        """Run a step where it is going to be recorded."""

    def record(self, step: Step) -> Step:
        """What does the same as `step`, which is not run by this.

        Raises:
            RuntimeError: the step waits for the device or does something else that has no record.
        """


class CudaRecorder:
    """Records CUDA graphs that share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), None

    def warm_up(self, step: Step) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        # torch.cuda.graph would collect garbage and empty the cache of memory each time
        with torch.cuda.stream(self._stream):
            # only this thread is looked at: others may well allocate memory meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        # the graphs never run side by side and leave nothing behind but what is copied
        self._pool = graph.pool()
        return graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """Records on this device; None: steps are run as they are there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return CudaRecorder(device)


class Replay:
    """Runs a step as it is some times, and then from a record, if there can be one.

    A step that is to be recorded works on tensors that stay where they are, changes them in place,
    and takes nothing else that changes from the outside.

    Args:
        step: what is done at each call.
        recorder: None: the step is always run as it is.
        warm_up: calls before the step is recorded.
    """

    def __init__(self, step: Step, recorder: Recorder | None, warm_up: int = 3) -> None:
        self._step, self._recorder, self._left = step, recorder, warm_up

    def __call__(self) -> None:
        if self._recorder is None:
            self._step()
        elif self._left > 0:
            self._left -= 1
            self._recorder.warm_up(self._step)
        else:
            self._record()
            self._step()

    def _record(self) -> None:
        recorder, self._recorder = self._recorder, None
        try:
            self._step = recorder.record(self._step)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            log.warning("steps are launched one kernel at a time (%s)", first_line)
