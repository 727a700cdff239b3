"""The results on disk: a Parquet dataset that is whole whenever anything is killed."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("similarity", pa.float64()),
        ("token_ids", pa.list_(pa.int32())),
        ("seed", pa.int64()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
    ]
)
"""A row of the results; with an `error`, of the form `Kind: message`, the others are null."""

# Readers of Parquet datasets pass over files that begin with an underscore or a dot.
_SETTINGS, _LOCK = "_settings.json", "_lock"
_FOUND, _FAILED = "part", "failed"


class Output:
    """A folder of Parquet files, each with the rows of one chunk of items.

    A file is written beside its place, flushed to the disk and then renamed, so that it is there
    whole or not at all. Rows with an error are in files of their own. That an item is finished is
    said by its row and by nothing else.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).resolve()

    @contextmanager
    def locked(self, settings: dict) -> Iterator[None]:
        """The folder, ours alone, with rows of these settings and no others.

        Raises:
            ValueError: another run is writing here, the rows that are here were made with other
                settings, or the folder holds something else.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`out` {self.folder} is a file; give a folder.")
        self.check(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"`out` {self.folder} is being written by another run; wait for it or give "
                "another folder."
            ) from error
        with lock:
            self.check(settings)  # again: the other run may just have begun
            if not (self.folder / _SETTINGS).exists():
                text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
                self._put(_SETTINGS, lambda file: file.write(text.encode()))
            yield

    def check(self, settings: dict) -> None:
        """Raise a ValueError unless rows of these settings may be added."""
        path = self.folder / _SETTINGS
        if not path.exists():
            others = self.folder.is_dir() and [
                name for name in os.listdir(self.folder) if not name.startswith((".", "_lock"))
            ]
            if others:
                raise ValueError(
                    f"`out` {self.folder} holds other files, such as {sorted(others)[0]}; give a "
                    "new folder."
                )
            return
        known = json.loads(path.read_text("utf-8"))
        changed = [
            f"{name}: {known.get(name)!r} there, {settings.get(name)!r} now"
            for name in [*settings, *(known.keys() - settings.keys())]
            if known.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"`out` {self.folder} was made with other settings; give another folder, or the "
                "same settings:\n  " + "\n  ".join(changed)
            )

    def ids(self) -> tuple[pa.Array, pa.Array]:
        """The ids that have a prompt or score, and those that have an error."""
        found, failed = (
            [pq.read_table(path, columns=["id"], partitioning=None)["id"] for path in paths]
            for paths in (self._files(_FOUND), self._files(_FAILED))
        )
        return _joined(found), _joined(failed)

    def errors(self, ids: pa.ChunkedArray) -> dict[str, int]:
        """How many of these ids have an error, by its kind, the most frequent first."""
        counts: Counter[str] = Counter()
        for path in self._files(_FAILED):
            table = pq.read_table(path, columns=["id", "error"], partitioning=None)
            table = table.filter(pc.is_in(table["id"].cast(pa.large_string()), ids))
            counts.update(error.partition(":")[0] for error in table["error"].to_pylist())
        return dict(counts.most_common())

    def has(self, ids: Sequence[str]) -> bool:
        """Whether `write` has been given rows of these ids, in this order, and any was good."""
        return (self.folder / f"{_FOUND}-{_name(ids)}.parquet").exists()

    def write(self, rows: Sequence[dict]) -> None:
        """Add rows with the names of `SCHEMA`; given again, they replace themselves."""
        name = _name([row["id"] for row in rows])
        # the errors first, so that the rest says that all of them are there
        for kind, failed in ((_FAILED, True), (_FOUND, False)):
            some = [row for row in rows if (row["error"] is not None) == failed]
            if some:
                table = pa.Table.from_pylist(some, SCHEMA)
                self._put(f"{kind}-{name}.parquet", lambda f, table=table: pq.write_table(table, f))

    def forget_failed(self, ids: pa.ChunkedArray) -> None:
        """Remove the rows of these ids with errors; their items count as not searched yet."""
        for path in self._files(_FAILED):
            table = pq.read_table(path, partitioning=None)
            known = pc.is_in(table["id"].cast(pa.large_string()), ids)
            self._replace(path, table.filter(pc.invert(known)))

    def tidy(self) -> None:
        """Remove unfinished files, and all but one of the rows with one id.

        Two rows with one id are rare: a worker may write after the run that it belonged to was
        killed, while the next run, which did not see its row, searches the item again.
        """
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        paths = [*self._files(_FOUND), *self._files(_FAILED)]
        columns = [pq.read_table(path, columns=["id"], partitioning=None)["id"] for path in paths]
        ids = _joined(columns)
        codes = pc.dictionary_encode(ids).indices.to_numpy()
        keep = np.zeros(len(ids), bool)
        keep[np.unique(codes, return_index=True)[1]] = True
        if keep.all():
            return
        start = 0
        for path, column in zip(paths, columns, strict=True):
            kept = keep[start : start + len(column)]
            start += len(column)
            if kept.all():
                continue
            self._replace(path, pq.read_table(path, partitioning=None).filter(pa.array(kept)))

    def _replace(self, path: Path, table: pa.Table) -> None:
        if len(table):
            self._put(path.name, lambda file: pq.write_table(table, file))
        else:
            path.unlink()

    def _files(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*.parquet"))

    def _put(self, name: str, write) -> None:
        beside = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            with beside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.folder / name)
        finally:
            beside.unlink(missing_ok=True)
        if os.name == "posix":  # that the name is there has to outlive the machine, too
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _name(ids: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(list(ids)).encode(), digest_size=10).hexdigest()


def _joined(columns: Sequence[pa.ChunkedArray]) -> pa.Array:
    chunks = [chunk for column in columns for chunk in column.chunks]
    chunks = [chunk.cast(pa.large_string()) for chunk in chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())
