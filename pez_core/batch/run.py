"""Runs over a whole dataset, and plans of them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..errors import check_integer
from ..names import printable
from .engine import Cluster, InProcess, OnRay, spread
from .job import Job
from .output import Output
from .sources import Columns, find_items
from .worker import failed_row

pc: Any = pyarrow.compute  # makes its functions at run time, out of sight of type checkers

# A chunk is lost when its worker is killed: a small part of the items of a worker, but not so small
# that a large dataset becomes a great number of files.
_CHUNKS_PER_WORKER, _LONGEST_CHUNK = 64, 256
# In a chunk the images of a group are read during the search of the group before.
_LEAST_GROUPS = 4
# An empty Parquet file of results.
_FILE_BYTES = 3200

Callback = Callable[[dict], bool | None]


@dataclass(frozen=True)
class BatchPlan:
    """The work of a run.

    Attributes:
        items: in the source, of which `limit` were taken.
        finished: have a row already.
        failed: have a row with an error, and are not searched again.
        to_do: will be searched.
        workers: that search them.
        batch_size: items that a worker searches side by side.
        chunk: items in a file of the results, and lost at most when their worker is killed.
        sampled: items that were searched to measure the time.
        seconds_per_item: of a worker, on average.
        seconds: estimate for everything to do.
        bytes: estimate of the size of the rows on the disk.
    """

    items: int
    finished: int
    failed: int
    to_do: int
    workers: int
    batch_size: int
    chunk: int
    sampled: int
    seconds_per_item: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The outcome of a run.

    Attributes:
        items: in the source, of which `limit` were taken.
        finished_before: had a row already.
        found: have one now.
        errors: number of items that have an error now, by its kind.
        missing: were not searched, because the run was ended.
        seconds: of this run.
        stopped: by its callback.
    """

    items: int
    finished_before: int
    found: int
    errors: dict[str, int]
    missing: int
    seconds: float
    stopped: bool

    @property
    def failed(self) -> int:
        """The number of items that have an error."""
        return sum(self.errors.values())


def run(
    source: str | os.PathLike,
    out: str | os.PathLike,
    job: Job | None = None,
    callback: Callback | None = None,
    *,
    columns: Columns | None = None,
    cluster: Cluster | None = None,
    device: str | None = None,
    download: bool = False,
    batch_size: int | None = None,
    chunk: int | None = None,
    limit: int | None = None,
    shuffle: bool = False,
    retry_failed: bool = False,
) -> Summary:
    """Do a job to every item of a dataset; the same call again resumes an interrupted run.

    A row depends on its item and the job alone. An error is in the row of its item and does not
    stop the others. When a process is killed, at most the chunks that were being searched are lost;
    the next run searches them again. An item is recognised by its id: an image that is replaced by
    another one of the same name is not searched again.

    Args:
        source: a folder, a file or a pattern; see `find_items`.
        out: folder for the results, a Parquet dataset with a row per item: `id`, `prompt`,
            `similarity`, `token_ids`, `seed`, `seconds` (of the search, shared by those searched
            side by side), `error`, the `caption` of the item if it has its own, and a `note`, such
            as that it was cut; null where there is none.
        job: what to do; None: `Job()`, a prompt of 8 tokens for each image on `emoji-clip`.
        callback: gets a dict after each few items: `done` and `total` items of this run, `failed`
            of them, `elapsed` seconds of searching, `rate` items per second and seconds `left`,
            both None before anything is done. A true return value ends the run; in this process
            all finished rows are kept, and on Ray the chunks that were being searched are lost.
        columns: of tables.
        cluster: run on Ray, with a worker per GPU or core, which needs the extra `ray`; None: in
            this process.
        device, download: as `load_clip` takes them.
        batch_size: items that a worker searches side by side, at least 1; None: a number for its
            device, fewer where memory ends.
        chunk: items in a file of the results; None: a 64th of the items of a worker, at most 256,
            but at least four times `batch_size`.
        limit: take only this number of items, the first ones, or random ones with `shuffle`; None:
            all.
        shuffle: take them in a random order, by their ids and the seed of the job.
        retry_failed: search the items that have an error again.

    Returns:
        A `Summary`.

    Raises:
        ArgumentError: an argument is out of range, the source cannot be read, or `out` holds rows
            that were made with other settings, which the message names.
        ImportError: `cluster` is given and Ray is not installed.
    """
    began = time.monotonic()
    job = Job() if job is None else job
    _check(batch_size, chunk, limit, cluster)
    output = Output(out)
    settings = _settings(source, job, columns)
    output.check(settings)
    items = _taken(find_items(source, job.task, columns, job.captions), job, limit, shuffle)
    with output.locked(settings):
        output.tidy()
        to_do, found, failed = _left(items, output, retry_failed)
        progress = _Progress(len(to_do), callback)
        if len(to_do):
            with _engine(job, device, download, batch_size, cluster) as engine:
                engine.check()
                if retry_failed:
                    output.forget_failed(items["id"])
                progress.begin()
                for again in (False, True):
                    size = 1 if again else _chunk(chunk, to_do, engine)
                    parts = [to_do[k : k + size] for k in range(0, len(to_do), size)]
                    # closed in any case, which writes the finished rows before OUT is unlocked
                    with closing(engine.search(parts, output)) as searching:
                        for kinds in searching:
                            if progress.add(kinds):
                                break
                    to_do, *_ = _left(items, output)
                    # items missing now were in chunks whose worker died; find the cause one by one
                    if progress.stopped or not len(to_do):
                        break
                if not progress.stopped:
                    error = "WorkerDied: the process that searched it was killed, each time."
                    output.write([failed_row(item, error) for item in to_do["id"].to_pylist()])
        output.tidy()
        to_do, *_ = _left(items, output)
        errors = output.errors(items["id"])
    return Summary(
        items=len(items),
        finished_before=found + failed,
        found=len(items) - len(to_do) - sum(errors.values()),
        errors=errors,
        missing=len(to_do),
        seconds=time.monotonic() - began,
        stopped=progress.stopped,
    )


def plan(
    source: str | os.PathLike,
    out: str | os.PathLike,
    job: Job | None = None,
    *,
    columns: Columns | None = None,
    cluster: Cluster | None = None,
    device: str | None = None,
    download: bool = False,
    batch_size: int | None = None,
    chunk: int | None = None,
    limit: int | None = None,
    shuffle: bool = False,
    retry_failed: bool = False,
) -> BatchPlan:
    """The work of `run` with these arguments, and its duration, measured on a few items.

    Nothing is written.
    """
    job = Job() if job is None else job
    _check(batch_size, chunk, limit, cluster)
    output = Output(out)
    output.check(_settings(source, job, columns))
    items = _taken(find_items(source, job.task, columns, job.captions), job, limit, shuffle)
    to_do, found, failed = _left(items, output, retry_failed)
    with _engine(job, device, download, batch_size, cluster) as engine:
        sampled = engine.sample(spread(to_do, max(4, engine.batch_size))) if len(to_do) else None
        size = _chunk(chunk, to_do, engine)
        per_item = sampled.seconds / sampled.items if sampled else 0.0
        row_bytes = sampled.row_bytes if sampled else 0.0
        return BatchPlan(
            items=len(items),
            finished=found,
            failed=failed,
            to_do=len(to_do),
            workers=engine.workers,
            batch_size=sampled.batch_size if sampled else engine.batch_size,
            chunk=size,
            sampled=sampled.items if sampled else 0,
            seconds_per_item=per_item,
            seconds=per_item * len(to_do) / engine.workers,
            bytes=round(row_bytes * len(to_do) + _FILE_BYTES * -(-len(to_do) // size)),
        )


def _check(
    batch_size: int | None, chunk: int | None, limit: int | None, cluster: Cluster | None
) -> None:
    given = {"batch_size": batch_size, "chunk": chunk, "limit": limit}
    if cluster is not None:
        given |= {"workers": cluster.workers, "cpus": cluster.cpus}
    for name, value in given.items():
        if value is not None:
            check_integer(name, value, 1)


def _engine(
    job: Job, device: str | None, download: bool, batch_size: int | None, cluster: Cluster | None
) -> AbstractContextManager:
    if cluster is None:
        return InProcess(job, device, download, batch_size)
    return OnRay(job, device, download, batch_size, cluster)


def _taken(items: pa.Table, job: Job, limit: int | None, shuffle: bool) -> pa.Table:
    """The items to take, in an order that does not depend on their number."""
    if shuffle:
        keys = [
            hashlib.blake2b(f"{job.options.seed}/{item}".encode(), digest_size=8).digest()
            for item in items["id"].to_pylist()
        ]
        items = items.take(pa.array(np.argsort(np.array(keys, "S8"), kind="stable")))
    return items if limit is None else items[:limit]


def _left(items: pa.Table, output: Output, retry_failed: bool = False) -> tuple[pa.Table, int, int]:
    """The items to search, and the numbers of items with a result and with an error."""
    found, failed = (pc.is_in(items["id"], ids) for ids in output.ids())
    done = found if retry_failed else pc.or_(found, failed)
    bad = 0 if retry_failed else pc.sum(failed).as_py() or 0
    return items.filter(pc.invert(done)), pc.sum(found).as_py() or 0, bad


def _settings(source: str | os.PathLike, job: Job, columns: Columns | None) -> dict:
    """The settings that all rows in one folder share."""
    where = {"source": printable(os.path.abspath(source)), "columns": asdict(columns or Columns())}
    return where | job.settings


def _chunk(chunk: int | None, to_do: pa.Table, engine: InProcess | OnRay) -> int:
    if chunk is not None:
        return chunk
    share = -(-len(to_do) // engine.workers)
    groups = -(-min(share // _CHUNKS_PER_WORKER, _LONGEST_CHUNK) // engine.batch_size)
    return max(1, min(max(_LEAST_GROUPS, groups) * engine.batch_size, share))


class _Progress:
    """Counts finished items and calls the callback."""

    def __init__(self, total: int, callback: Callback | None) -> None:
        self.total, self.callback = total, callback
        self.done, self.failed, self.stopped = 0, 0, False

    def begin(self) -> None:
        self._began = time.monotonic()
        self.add([])

    def add(self, kinds: Sequence[str | None]) -> bool:
        """Count these items; whether the callback ends the run."""
        self.done += len(kinds)
        self.failed += sum(kind is not None for kind in kinds)
        elapsed = time.monotonic() - self._began
        rate = self.done / elapsed if self.done and elapsed else None
        report = {
            "done": self.done,
            "total": self.total,
            "failed": self.failed,
            "elapsed": elapsed,
            "rate": rate,
            "left": (self.total - self.done) / rate if rate else None,
        }
        self.stopped = bool(self.callback and self.callback(report))
        return self.stopped
