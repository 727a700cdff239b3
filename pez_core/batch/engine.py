"""Engines that search chunks of items: this process, or Ray Data."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..errors import ArgumentError
from .job import Job
from .output import SCHEMA, Output
from .worker import DeviceLost, Worker, default_batch_size, kind_of

# A chunk that kills its worker is tried again this often.
_RETRIES = 2

Kinds = list[str | None]
"""For each finished item the kind of its error, or None."""


@dataclass(frozen=True)
class Cluster:
    """Where Ray runs the workers.

    Attributes:
        address: of a running cluster, as `ray.init` takes it ("auto" finds the one of this
            machine); None: one is started on this machine for this job.
        workers: their number; None: one for each GPU or, where there are none, for each `cpus` CPU
            cores.
        cpus: cores of each worker, at least 1.
        gpus: GPUs of each worker, a part of one to share it; None: 1 where the cluster has any.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
    gpus: float | None = None


@dataclass(frozen=True)
class Sample:
    """Time and space of a search of some items.

    Attributes:
        items: their number.
        seconds: of all of them.
        batch_size: number of them searched side by side.
        row_bytes: of a row on the disk, on average.
    """

    items: int
    seconds: float
    batch_size: int
    row_bytes: float


def sample(worker: Worker, items: Sequence[dict]) -> Sample:
    """Do the job to some items and throw the rows away."""
    worker.check()
    began = time.perf_counter()
    rows = [row for some in worker.rows(items) for row in some]
    seconds = time.perf_counter() - began
    size = (_parquet_size(rows * 9) - _parquet_size(rows)) / (8 * max(len(rows), 1))
    return Sample(len(rows), seconds, worker.batch_size, size)


def _parquet_size(rows: Sequence[dict]) -> int:
    # ids differ, or equal rows would be stored once
    rows = [row | {"id": f"{k}{row['id']}"} for k, row in enumerate(rows)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink)
    return sink.getvalue().size


class InProcess:
    """One worker in this process."""

    workers = 1

    def __init__(
        self, job: Job, device: str | None, download: bool, batch_size: int | None
    ) -> None:
        self.worker = Worker(job, device, download, batch_size)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exception) -> None:
        pass

    @property
    def batch_size(self) -> int:
        return self.worker.batch_size

    def check(self) -> None:
        self.worker.check()

    def sample(self, items: Sequence[dict]) -> Sample:
        return sample(self.worker, items)

    def search(self, chunks: Sequence[pa.Table], output: Output) -> Iterator[Kinds]:
        """Search the items of all chunks; finished rows are written whatever ends the search."""
        items = (item for chunk in chunks for item in chunk.to_pylist())
        rows: list[dict[str, Any]] = []
        try:
            for some in self.worker.rows(items):
                rows += some
                if len(rows) >= len(chunks[0]):
                    rows, full = [], rows
                    output.write(full)
                yield _kinds(some)
        finally:
            if rows:
                output.write(rows)


class OnRay:
    """A pool of Ray Data's actors, each with a worker that writes its own chunks.

    Ray does the scheduling, restarts and back-pressure.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(
        self, job: Job, device: str | None, download: bool, batch_size: int | None, cluster: Cluster
    ) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]
            import ray.data  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"a run on Ray needs the package {error.name}; install the extra `batch`: "
                "pip install -e '.[batch]' in the clone."
            ) from error
        self._ray, self._job, self._cluster = ray, job, cluster
        self._arguments = (job, device, download, batch_size)

    def __enter__(self) -> OnRay:
        ray, cluster = self._ray, self._cluster
        # no usage statistics, unless the variable of Ray is set to send them
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"logging_level": logging.ERROR, "log_to_driver": False}
        # Ray logs each start of a worker as an error
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        if cluster.address is None:
            options["include_dashboard"] = False
        self._began_here = not ray.is_initialized()
        if self._began_here:
            ray.init(cluster.address or "local", **options)
        there = ray.cluster_resources()
        gpus = cluster.gpus
        if gpus is None:
            gpus = 1 if there.get("GPU") else 0
        self.needs = {"num_cpus": cluster.cpus, "num_gpus": gpus}
        room = there.get("GPU", 0) / gpus if gpus else there.get("CPU", 0) / cluster.cpus
        self.workers = cluster.workers or max(1, int(room))
        if room < self.workers:
            self.__exit__()
            raise ArgumentError(
                "workers",
                f"is {self.workers}, but the cluster has {there.get('CPU', 0):g} CPU cores and "
                f"{there.get('GPU', 0):g} GPUs, enough for {int(room)} with {cluster.cpus} cores "
                f"and {gpus:g} GPUs each",
                "ask for fewer",
            )
        batch_size, device = self._arguments[3], self._arguments[1]
        kind = (device or ("cuda" if gpus else "cpu")).partition(":")[0]
        self.batch_size = batch_size or default_batch_size(self._job, kind)
        return self

    def __exit__(self, *exception) -> None:
        if self._began_here:
            self._ray.shutdown()

    def check(self) -> None:
        self._ask(_check, self._arguments)

    def sample(self, items: Sequence[dict]) -> Sample:
        return self._ask(_sample, self._arguments, items)

    def _ask(self, what: Callable, *arguments) -> Any:
        """Call a function in a process like those of the workers."""
        task = self._ray.remote(**self.needs)(what)
        try:
            return self._ray.get(task.remote(*arguments))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ValueError, TypeError, OSError)):
                raise error.cause from None
            raise

    def search(self, chunks: Sequence[pa.Table], output: Output) -> Iterator[Kinds]:
        """Search the chunks; those that kill their workers again and again are left out."""
        data, log = self._ray.data, logging.getLogger("ray.data")
        context = data.DataContext.get_current()
        before = context.enable_progress_bars, context.max_errored_blocks, log.level
        context.enable_progress_bars, context.max_errored_blocks = False, -1
        log.setLevel(logging.CRITICAL)
        try:
            yield from self._search(chunks, output)
        finally:
            context.enable_progress_bars, context.max_errored_blocks, level = before
            log.setLevel(level)

    def _search(self, chunks: Sequence[pa.Table], output: Output) -> Iterator[Kinds]:
        data = self._ray.data
        # a chunk that waits for a worker which dies counts as one that has killed it
        waiting = {"max_tasks_in_flight_per_actor": 1} if len(chunks[0]) == 1 else {}
        with warnings.catch_warnings():
            # there is no other way yet to limit the retries of a chunk
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            finished = data.from_arrow(list(chunks)).map_batches(
                _Actor,
                fn_constructor_args=(*self._arguments, output.folder),
                batch_size=None,  # a chunk
                batch_format="pyarrow",
                compute=data.ActorPoolStrategy(size=min(self.workers, len(chunks)), **waiting),
                max_task_retries=_RETRIES,
                **self.needs,
            )
        for batch in finished.iter_batches(batch_size=None, batch_format="pyarrow"):
            for raised in filter(None, batch["raised"].to_pylist()):
                raise OSError(f"a worker could not write: {raised}")
            yield batch["kind"].to_pylist()


class _Actor:
    """A worker in a process of Ray's."""

    def __init__(
        self, job: Job, device: str | None, download: bool, batch_size: int | None, folder: Path
    ) -> None:
        _use_cores()
        self._worker = Worker(job, device, download, batch_size)
        self._output = Output(folder)

    def __call__(self, chunk: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = []
        if not self._output.has(chunk["id"].to_pylist()):
            items = chunk.to_pylist()
            try:
                for some in self._worker.rows(items):
                    rows += some
            except DeviceLost:
                os._exit(1)  # Ray starts another process, and the chunk there
            order = {item["id"]: k for k, item in enumerate(items)}
            rows.sort(key=lambda row: order[row["id"]])  # `has` compares ids in order
            try:
                self._output.write(rows)
            except OSError as error:  # the other chunks cannot be written either
                return _answer([None], str(error))
        return _answer(_kinds(rows) or [None] * len(chunk))


def _answer(kinds: Kinds, raised: str | None = None) -> pa.Table:
    rows = {"kind": kinds, "raised": [raised] * len(kinds)}
    return pa.table(rows, pa.schema([("kind", pa.string()), ("raised", pa.string())]))


def _check(arguments: tuple) -> None:
    _use_cores()
    Worker(*arguments).check()


def _sample(arguments: tuple, items: Sequence[dict]) -> Sample:
    _use_cores()
    return sample(Worker(*arguments), items)


def _use_cores() -> None:
    # Ray sets the number of cores, in some processes after torch has read it
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _kinds(rows: Sequence[dict]) -> Kinds:
    return [None if row["error"] is None else kind_of(row["error"]) for row in rows]


def spread(items: pa.Table, count: int) -> list[dict]:
    """Some items, at even distances."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return items.take(pa.array(places)).to_pylist()
