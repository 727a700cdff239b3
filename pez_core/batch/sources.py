"""Where the items of a dataset come from: folders, tables and tars -> one table of items."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pyarrow import csv

from ..errors import ArgumentError, check_choice
from ..names import printable, text_of

pc: Any = pyarrow.compute  # makes its functions at run time, out of sight of type checkers

IMAGES = frozenset(
    [".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"]
)
TABLES = frozenset([".csv", ".tsv", ".parquet"])
CAPTION = ".txt"

NEEDS = {"invert": {"image"}, "distill": {"prompt"}, "score": {"image", "prompt"}}
"""The fields that an item of each task has."""

# Columns that are looked for where none is named; image folders of Hugging Face have `file_name`.
_USUAL = {"image": ("image", "path", "file_name", "file"), "prompt": ("prompt", "caption", "text")}

ITEMS = pa.schema(
    [
        ("id", pa.large_string()),  # ids and prompts of millions of items exceed 2 GiB
        ("path", pa.large_string()),  # of the image, or of the tar that holds it
        ("offset", pa.int64()),  # of the image in its tar
        ("size", pa.int64()),
        ("prompt", pa.large_string()),
        ("problem", pa.large_string()),  # why it cannot be searched
    ]
)

# Items that are turned into columns at once.
_ROWS = 65536


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold the items; None: the usual names.

    Errors name these fields `image_column`, `prompt_column` and `id_column`.

    Attributes:
        image: paths, relative ones from the folder of the table.
        prompt: texts.
        id: a unique id, the same in every run; None: the path, the prompt, or both.
    """

    image: str | None = None
    prompt: str | None = None
    id: str | None = None


def find_items(
    source: str | os.PathLike,
    task: str = "invert",
    columns: Columns | None = None,
    captions: bool = False,
) -> pa.Table:
    """All items of a source for a task.

    A file or folder that cannot be read is an item with a `problem`.

    Args:
        source: a folder, searched with its subfolders; a file; or a pattern such as `"data/*.tar"`
            (`**` goes through folders). Images are items by themselves, with the text file beside
            an image (`a.png`, `a.txt`) as its prompt. A tar is read as WebDataset reads it: files
            whose names are the same up to the first dot of the last part belong together. Tables
            are CSV, TSV and Parquet files with a header; in folders they are passed over.
        task: "invert" takes images, "distill" prompts, "score" both.
        columns: of tables.
        captions: images need a prompt, too, which is their caption.

    Returns:
        A table with the schema `ITEMS`. Ids are paths from the source on, so that a dataset may
        move; of items with one id the first counts.

    Raises:
        ArgumentError: there is no such source, a table lacks the columns, an id of `columns.id`
            appears twice, or nothing is found.
    """
    check_choice("task", task, tuple(NEEDS))
    columns = columns or Columns()
    root, files = _files(os.fspath(source))
    needs = NEEDS[task] | ({"prompt"} if captions else set())
    rows = _rows(root, files, needs, columns)
    batches = []
    while some := [row for _, row in zip(range(_ROWS), rows, strict=False)]:
        batches.append(pa.RecordBatch.from_pylist(some, ITEMS))
    if not batches:
        kinds = {"image": "images (PNG, JPEG, WebP, ...)", "prompt": "prompts"}
        wanted = " and ".join(kinds[need] for need in sorted(needs))
        raise ArgumentError(
            "source",
            f"{source!r} holds nothing for {task}, which takes {wanted}",
            "give a folder, a tar file or a table that has them",
        )
    return _once(pa.Table.from_batches(batches, ITEMS), columns.id)


@dataclass(frozen=True, order=True)
class _File:
    """A file of a source.

    Attributes:
        path: its absolute path, in which links keep their own names.
        problem: why it cannot be read, as `Kind: message`; None: it can.
    """

    path: str
    problem: str | None = None


def _files(source: str) -> tuple[str, list[_File]]:
    """The folder that ids begin in, and the files in their order."""
    if os.path.isdir(source):
        root = os.path.abspath(source)
        try:
            os.listdir(root)
        except OSError as error:
            raise ArgumentError("source", f"{source!r} cannot be listed ({error})") from error
        return root, sorted(_walk(root, frozenset()))
    if os.path.isfile(source):
        path = os.path.abspath(source)
        return os.path.dirname(path), [_File(path)]
    if os.path.lexists(source):
        raise ArgumentError("source", f"{source!r} is neither a folder nor a file; check it")
    if glob.has_magic(source):
        fixed = source
        while glob.has_magic(fixed):
            fixed = os.path.dirname(fixed)
        found = (os.path.abspath(name) for name in glob.glob(source, recursive=True))
        files = sorted(_File(path) for path in found if os.path.isfile(path))
        if files:
            return os.path.abspath(fixed), files
        raise ArgumentError("source", f"{source!r} matches no file", "check the pattern")
    raise ArgumentError(
        "source", f"{source!r} does not exist", "give a folder, a file or a pattern"
    )


def _walk(folder: str, within: frozenset[str]) -> Iterator[_File]:
    """Images, tars and texts of a folder and its subfolders, links to folders among them.

    An entry that cannot be read has a problem, and the others are found all the same.
    """
    real = os.path.realpath(folder)
    if real in within:  # a link to a folder that it is in
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        yield _File(folder, _problem_of(error))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # such as a link to itself
            yield _File(entry.path, _problem_of(error))
            continue
        if is_folder:
            yield from _walk(entry.path, within | {real})
        elif _suffix(entry.name) in IMAGES | {".tar", CAPTION}:
            # a pipe would be waited for, perhaps for ever
            yield _File(entry.path, None if is_file else "NoFile: it is no regular file.")


def _problem_of(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _rows(
    root: str, files: Sequence[_File], needs: set[str], columns: Columns
) -> Iterator[dict[str, Any]]:
    for file in files:
        path, kind = file.path, _suffix(file.path)
        name = os.path.relpath(path, root).replace(os.sep, "/")
        if (kind in IMAGES and "image" not in needs) or (kind == CAPTION and "image" in needs):
            continue
        try:
            stored, name = text_of(path), text_of(name)
        except UnicodeError:
            problem = "UnicodeError: its name is not UTF-8; rename it."
            yield {"id": printable(name), "problem": problem}
            continue
        if file.problem is not None:
            yield {"id": name, "problem": file.problem}
        elif kind in TABLES:
            yield from _from_table(path, name, needs, columns)
        elif kind == ".tar":
            yield from _from_tar(path, name, needs)
        elif kind in IMAGES:
            row = {"id": name, "path": stored}
            if "prompt" in needs:
                row |= _caption_file(os.path.splitext(path)[0] + CAPTION)
            yield row
        elif kind == CAPTION:
            yield {"id": name} | _caption_file(path)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _caption_file(path: str) -> dict[str, Any]:
    name = printable(os.path.basename(path))
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            return {"problem": f"NoFile: {name} is no regular file."}
        with open(path, "rb") as file:
            return _caption(file.read(), name)
    except FileNotFoundError:
        return _caption(None, name)
    except OSError as error:
        return {"problem": _problem_of(error)}


def _caption(data: bytes | None, name: str) -> dict:
    if data is None:
        return {"problem": f"NoPrompt: there is no {name} beside the image."}
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return {"problem": f"UnicodeDecodeError: {name} is not UTF-8 text ({error})."}
    return {"prompt": text} if text else {"problem": f"NoPrompt: {name} is empty."}


def _from_tar(file: str, name: str, needs: set[str]) -> Iterator[dict[str, Any]]:
    """Its samples and, where it is damaged, a row with an error beside those that are whole."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(file, "r:", encoding="utf-8") as tar:
            damage = _read_members(tar, os.path.getsize(file), samples)
            for key, sample in samples.items():
                row = _sample_row(tar, key, sample, needs)
                if row is not None:
                    yield {"id": f"{name}/{key}", "path": text_of(file)} | row
    except Exception as error:  # damaged data makes tarfile raise all kinds of errors
        damage = str(error)
    if damage is not None:
        problem = f"TarError: {file} is damaged or no plain tar ({damage})."
        yield {"id": name, "problem": printable(problem)}


def _sample_row(
    tar: tarfile.TarFile, key: str, sample: dict[str, tarfile.TarInfo], needs: set[str]
) -> dict[str, Any] | None:
    """What an item has of a sample; None where it lacks what makes it an item."""
    image = next((sample[kind] for kind in sample if kind in IMAGES), None)
    caption = sample.get(CAPTION)
    if ("image" in needs and image is None) or (caption is None and "image" not in needs):
        return None
    row: dict[str, Any] = {}
    if image is not None:
        row = {"offset": image.offset_data, "size": image.size}
    if "prompt" in needs:
        data = None
        if caption is not None:
            member = tar.extractfile(caption)
            data = None if member is None else member.read()
        row |= _caption(data, f"{key}{CAPTION}")
    return row


def _read_members(
    tar: tarfile.TarFile, size: int, samples: dict[str, dict[str, tarfile.TarInfo]]
) -> str | None:
    """Sort the members of a tar into samples; the damage, if there is any."""
    while True:
        try:
            member = tar.next()
        except Exception as error:  # such as an OverflowError for a size that is none
            return str(error)
        if member is None:
            break
        if member.issparse():
            return f"{member.name} is stored as a sparse file"
        if member.size < 0 or member.offset_data + member.size > size:
            return f"{member.name} is cut"
        folder, _, last = member.name.rpartition("/")
        key, _, suffix = last.partition(".")
        if member.isfile() and key and _is_text(member.name):  # hidden files are no samples
            sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
            sample.setdefault(f".{suffix.lower()}", member)
    # tarfile takes a broken header for the end, which two empty blocks mark
    tar.fileobj.seek(tar.offset)
    return None if tar.fileobj.read(512) == bytes(512) else "it ends early"


def _from_table(
    file: str, name: str, needs: set[str], columns: Columns
) -> Iterator[dict[str, Any]]:
    try:
        table, chosen = _read_table(file, needs, columns)
    except ArgumentError:
        raise
    except Exception as error:  # damaged files make pyarrow raise all kinds of errors
        problem = f"TableError: {file} cannot be read ({error}); check it."
        yield {"id": name, "problem": printable(problem)}
        return
    folder, number = os.path.dirname(name), 0
    beside = text_of(os.path.dirname(file))
    for batch in table.to_batches():
        for values in zip(*(batch.column(name).to_pylist() for name in chosen), strict=True):
            number += 1
            one = dict(zip(chosen.values(), values, strict=True))
            row = {"prompt": one.get("prompt")}
            parts = [one[need] or "" for need in ("image", "prompt") if need in needs]
            if "image" in needs and one["image"]:
                row["path"] = os.path.join(beside, one["image"])
                if one["image"].startswith(("http://", "https://")):
                    row["path"] = one["image"]
                else:  # tables of several folders may have the same names
                    parts[0] = os.path.join(folder, one["image"])
            row["id"] = one.get("id") or " | ".join(parts)
            empty = [need for need in sorted(needs) if not (one[need] or "").strip()]
            if empty:
                row["problem"] = f"EmptyCell: the row has no {empty[0]}."
                row["id"] = one.get("id") or f"{name}: row {number}"
            yield row


def _read_table(file: str, needs: set[str], columns: Columns) -> tuple[pa.Table, dict[str, str]]:
    """The needed columns, as strings, and the role of each: image, prompt or id."""
    delimiter = "\t" if _suffix(file) == ".tsv" else ","
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    if _suffix(file) == ".parquet":
        with open(file, "rb") as data:  # pyarrow takes only names that are text
            names = pq.read_schema(data).names
    else:
        with open(file, "rb") as data, csv.open_csv(data, parse_options=parse) as reader:
            names = reader.schema.names
    chosen = {_choose(names, need, columns, file): need for need in sorted(needs)}
    if len(chosen) < len(needs):
        raise ArgumentError(
            "image_column",
            f"is {next(iter(chosen))!r} in {file!r}, and so is `prompt_column`",
            "name another one",
        )
    if columns.id is not None:
        if columns.id not in names:
            raise _no_column("id", file, columns.id, names)
        if columns.id in chosen:
            raise ArgumentError(
                "id_column",
                f"is {columns.id!r}, which is the {chosen[columns.id]} column",
                "leave it out",
            )
        chosen[columns.id] = "id"
    if _suffix(file) == ".parquet":
        with open(file, "rb") as data:
            table = pq.read_table(data, columns=list(chosen))
    else:
        # as they are written: an id like 007 is no number, a prompt like null no missing value
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(chosen, pa.large_string()),
            include_columns=list(chosen),
            strings_can_be_null=False,
        )
        with open(file, "rb") as data:
            table = csv.read_csv(data, parse_options=parse, convert_options=convert)
    table = table.cast(pa.schema([(name, pa.large_string()) for name in table.column_names]))
    table.validate(full=True)  # Parquet may hold strings that are not UTF-8
    return table, chosen


def _choose(names: Sequence[str], need: str, columns: Columns, file: str) -> str:
    named = getattr(columns, need)
    if named is not None:
        if named not in names:
            raise _no_column(need, file, named, names)
        return named
    for usual in _USUAL[need]:
        if usual in names:
            return usual
    raise ArgumentError(
        "source",
        f"{file!r} has none of the columns {', '.join(_USUAL[need])} for the {need}, but "
        f"{', '.join(names)}",
        f"give one of these as `{need}_column`",
    )


def _no_column(need: str, file: str, name: str, names: Sequence[str]) -> ArgumentError:
    return ArgumentError(
        f"{need}_column",
        f"is {name!r}, but {file!r} has only {', '.join(names)}",
        "name one of these",
    )


def _once(items: pa.Table, id_column: str | None) -> pa.Table:
    """The first item of each id."""
    codes = pc.dictionary_encode(items["id"].combine_chunks()).indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    if len(first) == len(items):
        return items
    if id_column is not None:
        twice = np.setdiff1d(np.arange(len(items)), first)[0]
        raise ArgumentError(
            "id_column",
            f"is {id_column!r}, which holds {items['id'][int(twice)].as_py()!r} twice",
            "give a column with another id in each row",
        )
    return items.take(np.sort(first))
