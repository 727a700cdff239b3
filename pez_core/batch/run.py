"""One command for a whole dataset: what is there, what is left to do, do it, say how it went."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..search import check_integer
from .engine import Cluster, InProcess, OnRay, spread
from .job import Job
from .output import Output
from .sources import Columns, find_items
from .worker import failed_row

# A chunk is lost when its worker is killed: a small part of what a worker has to do, but not so
# small that a large dataset becomes a great number of files.
_CHUNKS_PER_WORKER, _LONGEST_CHUNK = 64, 256
# In a chunk the images of a group are read while the one before is searched.
_LEAST_GROUPS = 4
# An empty Parquet file of results.
_FILE_BYTES = 2800

Callback = Callable[[dict], bool | None]


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        items: in the source, of which `limit` were taken.
        finished: have a row already.
        failed: have a row with an error, and are not searched again.
        to_do: will be searched.
        workers: that search them.
        at_once: items that a worker searches side by side.
        chunk: items in a file of the results, and lost at most when their worker is killed.
        sampled: items that were searched to tell the time.
        seconds_per_item: of a worker, on average.
        seconds: of all there is to do.
        bytes: that the rows will take on the disk.
    """

    items: int
    finished: int
    failed: int
    to_do: int
    workers: int
    at_once: int
    chunk: int
    sampled: int
    seconds_per_item: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Summary:
    """How a run went.

    Attributes:
        items: in the source, of which `limit` were taken.
        finished_before: had a row already.
        found: have one now.
        errors: how many items have an error now, by its kind.
        missing: were not searched, since the run was ended.
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
    at_once: int | None = None,
    chunk: int | None = None,
    limit: int | None = None,
    shuffle: bool = False,
    retry_failed: bool = False,
) -> Summary:
    """Do a job to every item of a dataset; the same call again goes on where it ended.

    A row depends on its item and the job alone. Where there is an error, it is in the row of its
    item, and the others go on. Whatever is killed, at most the chunks that were being searched are
    lost, and are searched again by the next run.

    Args:
        source: a folder, a file or a pattern; see `find_items`.
        out: folder for the results, a Parquet dataset with a row per item: `id`, `prompt`,
            `similarity`, `token_ids`, `seed`, `seconds` (of the search, shared by those searched
            side by side) and `error`.
        job: what to do; None: `Job()`, a prompt of 16 tokens for each image by `emoji-clip`.
        callback: gets a dict after each few items: `done` and `total` items of this run, `failed`
            of them, `elapsed` seconds of searching, `rate` items per second and seconds `left`,
            both None before anything is done. A true return value ends the run; in this process
            what was found is kept, and on Ray the chunks that were being searched are lost.
        columns: which columns of a table are meant.
        cluster: run on Ray, with a worker per GPU or core, which needs the extra `ray`; None: in
            this process.
        device, download: as `load_clip` takes them.
        at_once: items that a worker searches side by side, at least 1; None: what pays on its
            device, less where memory ends.
        chunk: items in a file of the results; None: a 64th of what a worker has to do, at most 256,
            but four times `at_once`.
        limit: take so many of the items, the first ones, or any with `shuffle`; None: all.
        shuffle: take them in an order that their ids and the seed of the job say.
        retry_failed: search the items that have an error again.

    Returns:
        A `Summary`.

    Raises:
        TypeError, ValueError: an argument is out of range, the source cannot be read, or `out`
            holds rows that were made with other settings, which the message names.
        ImportError: Ray is asked for and not installed.
    """
    began = time.monotonic()
    job = Job() if job is None else job
    _check(at_once, chunk, limit, cluster)
    output = Output(out)
    settings = _settings(source, job, columns)
    output.check(settings)
    items = _taken(find_items(source, job.task, columns), job, limit, shuffle)
    with output.locked(settings):
        output.tidy()
        to_do, found, failed = _left(items, output, retry_failed)
        progress = _Progress(len(to_do), callback)
        if len(to_do):
            with _engine(job, device, download, at_once, cluster) as engine:
                engine.check()
                if retry_failed:
                    output.forget_failed(items["id"])
                progress.begin()
                for again in (False, True):
                    size = 1 if again else _chunk(chunk, to_do, engine)
                    parts = [to_do[k : k + size] for k in range(0, len(to_do), size)]
                    # closed in any case, which writes what it has while OUT is ours
                    with closing(engine.search(parts, output)) as searching:
                        for kinds in searching:
                            if progress.add(kinds):
                                break
                    to_do, *_ = _left(items, output)
                    # what is missing now was in a chunk whose worker died: which item was it?
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
    at_once: int | None = None,
    chunk: int | None = None,
    limit: int | None = None,
    shuffle: bool = False,
    retry_failed: bool = False,
) -> Plan:
    """What `run` would do with these arguments, and how long that takes by a few of the items.

    Nothing is written.
    """
    job = Job() if job is None else job
    _check(at_once, chunk, limit, cluster)
    output = Output(out)
    output.check(_settings(source, job, columns))
    items = _taken(find_items(source, job.task, columns), job, limit, shuffle)
    to_do, found, failed = _left(items, output, retry_failed)
    with _engine(job, device, download, at_once, cluster) as engine:
        sampled = engine.sample(spread(to_do, max(4, engine.at_once))) if len(to_do) else None
        size = _chunk(chunk, to_do, engine)
        per_item = sampled.seconds / sampled.items if sampled else 0.0
        row_bytes = sampled.row_bytes if sampled else 0.0
        return Plan(
            items=len(items),
            finished=found,
            failed=failed,
            to_do=len(to_do),
            workers=engine.workers,
            at_once=sampled.at_once if sampled else engine.at_once,
            chunk=size,
            sampled=sampled.items if sampled else 0,
            seconds_per_item=per_item,
            seconds=per_item * len(to_do) / engine.workers,
            bytes=round(row_bytes * len(to_do) + _FILE_BYTES * -(-len(to_do) // size)),
        )


def _check(
    at_once: int | None, chunk: int | None, limit: int | None, cluster: Cluster | None
) -> None:
    given = {"at_once": at_once, "chunk": chunk, "limit": limit}
    if cluster is not None:
        given |= {"workers": cluster.workers, "cpus": cluster.cpus}
    for name, value in given.items():
        if value is not None:
            check_integer(name, value, 1)


def _engine(
    job: Job, device: str | None, download: bool, at_once: int | None, cluster: Cluster | None
) -> AbstractContextManager:
    if cluster is None:
        return InProcess(job, device, download, at_once)
    return OnRay(job, device, download, at_once, cluster)


def _taken(items: pa.Table, job: Job, limit: int | None, shuffle: bool) -> pa.Table:
    """The items that count, in their order, which does not depend on how many there are."""
    if shuffle:
        keys = [
            hashlib.blake2b(f"{job.seed}/{item}".encode(), digest_size=8).digest()
            for item in items["id"].to_pylist()
        ]
        items = items.take(pa.array(np.argsort(np.array(keys, "S8"), kind="stable")))
    return items if limit is None else items[:limit]


def _left(items: pa.Table, output: Output, retry_failed: bool = False) -> tuple[pa.Table, int, int]:
    """The items that are to be searched, and of the others how many are good and have an error."""
    found, failed = (pc.is_in(items["id"], ids) for ids in output.ids())
    done = found if retry_failed else pc.or_(found, failed)
    bad = 0 if retry_failed else pc.sum(failed).as_py() or 0
    return items.filter(pc.invert(done)), pc.sum(found).as_py() or 0, bad


def _settings(source: str | os.PathLike, job: Job, columns: Columns | None) -> dict:
    """What rows in one folder have in common."""
    where = {"source": os.path.abspath(source), "columns": asdict(columns or Columns())}
    return where | job.settings


def _chunk(chunk: int | None, to_do: pa.Table, engine: InProcess | OnRay) -> int:
    if chunk is not None:
        return chunk
    share = -(-len(to_do) // engine.workers)
    groups = -(-min(share // _CHUNKS_PER_WORKER, _LONGEST_CHUNK) // engine.at_once)
    return max(1, min(max(_LEAST_GROUPS, groups) * engine.at_once, share))


class _Progress:
    """Counts what is done and tells the callback."""

    def __init__(self, total: int, callback: Callback | None) -> None:
        self.total, self.callback = total, callback
        self.done, self.failed, self.stopped = 0, 0, False

    def begin(self) -> None:
        self._began = time.monotonic()
        self.add([])

    def add(self, kinds: Sequence[str | None]) -> bool:
        """Whether to stop."""
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
