"""The results on disk: a Parquet dataset that is complete and readable at any time."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ..errors import ArgumentError

pc: Any = pyarrow.compute  # makes its functions at run time, out of sight of type checkers

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("similarity", pa.float64()),
        ("token_ids", pa.list_(pa.int32())),
        ("seed", pa.int64()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
        ("caption", pa.string()),
        ("note", pa.string()),
    ]
)
"""A row of the results; with an `error`, of the form `Kind: message`, the others are null. A
`caption` is that of the item, if it has its own, and a `note` a remark for the user; null where
there is none."""

# Readers of Parquet datasets skip files that begin with an underscore or a dot.
_SETTINGS, _LOCK = "_settings.json", "_lock"
_FOUND, _FAILED = "part", "failed"


class Output:
    """A folder of Parquet files, each with the rows of one chunk of items.

    A file is written under another name, flushed to the disk and then renamed, so that it is never
    incomplete. Rows with an error are in files of their own. An item is finished when it has a row;
    nothing else is recorded.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).resolve()

    @contextmanager
    def locked(self, settings: dict) -> Iterator[None]:
        """Lock the folder, which holds rows of these settings and no others.

        Raises:
            ArgumentError: another run is writing here, its rows were made with other settings, or
                the folder holds other files.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ArgumentError("out", f"is {str(self.folder)!r}, which is a file", "give a folder")
        self.check(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ArgumentError(
                "out",
                f"is {str(self.folder)!r}, which is being written by another run",
                "wait for it or give another folder",
            ) from error
        with lock:
            self.check(settings)  # again: the other run may just have begun
            if not (self.folder / _SETTINGS).exists():
                text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
                self._put(_SETTINGS, lambda file: file.write(text.encode()))
            yield

    def check(self, settings: dict) -> None:
        """Raise an ArgumentError unless rows of these settings may be added."""
        path = self.folder / _SETTINGS
        if not path.exists():
            others = self.folder.is_dir() and [
                name for name in os.listdir(self.folder) if not name.startswith((".", "_lock"))
            ]
            if others:
                raise ArgumentError(
                    "out",
                    f"is {str(self.folder)!r}, which holds other files, such as "
                    f"{sorted(others)[0]!r}",
                    "give a new folder",
                )
            return
        stored = _read_settings(path)
        changed = [
            f"{name}: {stored.get(name)!r} there, {settings.get(name)!r} now"
            for name in [*settings, *(stored.keys() - settings.keys())]
            if stored.get(name) != settings.get(name)
        ]
        if changed:
            raise ArgumentError(
                "out",
                f"is {str(self.folder)!r}, which was made with other settings; give another "
                "folder, or the same settings:\n  " + "\n  ".join(changed),
            )

    def ids(self) -> tuple[pa.Array, pa.Array]:
        """The ids that have a prompt or score, and those that have an error."""
        found, failed = (
            [_read(path, ["id"])["id"] for path in paths]
            for paths in (self._files(_FOUND), self._files(_FAILED))
        )
        return _joined(found), _joined(failed)

    def errors(self, ids: pa.ChunkedArray) -> dict[str, int]:
        """The number of these ids with an error, by its kind, the most frequent first."""
        counts: Counter[str] = Counter()
        for path in self._files(_FAILED):
            table = _read(path, ["id", "error"])
            table = table.filter(pc.is_in(table["id"].cast(pa.large_string()), ids))
            counts.update(error.partition(":")[0] for error in table["error"].to_pylist())
        return dict(counts.most_common())

    def has(self, ids: Sequence[str]) -> bool:
        """Whether `write` has been given rows of these ids, in this order, and any was good."""
        return (self.folder / f"{_FOUND}-{_name(ids)}.parquet").exists()

    def write(self, rows: Sequence[dict]) -> None:
        """Add rows with the names of `SCHEMA`; given again, they replace themselves."""
        name = _name([row["id"] for row in rows])
        # errors first: where the file of the others exists, all rows have been written
        for kind, failed in ((_FAILED, True), (_FOUND, False)):
            some = [row for row in rows if (row["error"] is not None) == failed]
            if some:
                table = pa.Table.from_pylist(some, SCHEMA)
                self._put(f"{kind}-{name}.parquet", lambda f, table=table: pq.write_table(table, f))

    def forget_failed(self, ids: pa.ChunkedArray) -> None:
        """Remove the rows of these ids that have errors; their items are then searched again."""
        for path in self._files(_FAILED):
            table = _read(path)
            again = pc.is_in(table["id"].cast(pa.large_string()), ids)
            self._replace(path, table.filter(pc.invert(again)))

    def tidy(self) -> None:
        """Remove unfinished files, and all but one of the rows with one id.

        Two rows with one id are rare: a worker may write after its run was killed, when the next
        run has already begun to search the item again.
        """
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        paths = [*self._files(_FOUND), *self._files(_FAILED)]
        columns = [_read(path, ["id"])["id"] for path in paths]
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
            self._replace(path, _read(path).filter(pa.array(kept)))

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
        except OSError as error:
            if error.filename is None:  # as on a full disk
                raise OSError(error.errno, error.strerror, str(self.folder / name)) from error
            raise
        finally:
            beside.unlink(missing_ok=True)
        if os.name == "posix":  # the new name, too, has to survive a power failure
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(
            "out", f"holds {str(path)!r}, which cannot be read ({error})"
        ) from error
    if not isinstance(settings, dict):
        raise ArgumentError("out", f"holds {str(path)!r}, which holds no settings")
    return settings


def _read(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        # pyarrow takes only names that are text
        with path.open("rb") as data, pq.ParquetFile(data) as file:
            return file.read(columns)
    except Exception as error:  # damaged files make pyarrow raise all kinds of errors
        raise ArgumentError(
            "out",
            f"holds {str(path)!r}, which is damaged ({error})",
            "remove this file; its items are then searched again",
        ) from error


def _name(ids: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(list(ids)).encode(), digest_size=10).hexdigest()


def _joined(columns: Sequence[pa.ChunkedArray]) -> pa.Array:
    chunks = [chunk for column in columns for chunk in column.chunks]
    chunks = [chunk.cast(pa.large_string()) for chunk in chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())
