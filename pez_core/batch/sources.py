"""Where the items of a dataset come from: folders, tables and tars -> one table of items."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

IMAGES = frozenset(
    [".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"]
)
TABLES = frozenset([".csv", ".tsv", ".parquet"])
CAPTION = ".txt"

NEEDS = {"invert": {"image"}, "distill": {"prompt"}, "score": {"image", "prompt"}}
"""What an item of each task has."""

# Columns that are meant where none is named; Hugging Face's image folders have `file_name`.
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
    """The columns of a table that items are made of; None: the usual names.

    Attributes:
        image: paths, relative ones from the folder of the table.
        prompt: texts.
        id: what tells items apart, the same in every run; None: the path, the prompt, or both.
    """

    image: str | None = None
    prompt: str | None = None
    id: str | None = None


def find_items(
    source: str | os.PathLike, task: str = "invert", columns: Columns | None = None
) -> pa.Table:
    """Everything that a source holds for a task.

    Args:
        source: a folder, searched with its subfolders; a file; or a pattern such as `"data/*.tar"`
            (`**` goes through folders). Images are items by themselves, with the text file beside
            an image (`a.png`, `a.txt`) as its prompt. A tar is read as WebDataset reads it: files
            whose names are the same up to the first dot of the last part belong together. Tables
            are CSV, TSV and Parquet files with a header; in folders they are passed over.
        task: "invert" takes images, "distill" prompts, "score" both.
        columns: of tables.

    Returns:
        A table with the schema `ITEMS`. Ids are paths from the source on, so that a dataset may
        move; of items with one id the first counts.

    Raises:
        ValueError: there is no such source, a table lacks the columns or cannot be read, an id of
            `columns.id` appears twice, or nothing is found.
    """
    columns = columns or Columns()
    root, files = _files(os.fspath(source))
    rows = _rows(root, files, NEEDS[task], columns)
    batches = []
    while some := [row for _, row in zip(range(_ROWS), rows, strict=False)]:
        batches.append(pa.RecordBatch.from_pylist(some, ITEMS))
    if not batches:
        wanted = " and ".join(sorted(NEEDS[task]))
        raise ValueError(f"`source` {source} holds nothing for {task}, which takes {wanted}.")
    return _once(pa.Table.from_batches(batches, ITEMS), columns.id)


def _files(source: str) -> tuple[str, list[str]]:
    """The folder that ids begin in, and the files in their order; links keep their own names."""
    if os.path.isdir(source):
        root = os.path.abspath(source)
        return root, sorted(_walk(root, set()))
    if os.path.isfile(source):
        path = os.path.abspath(source)
        return os.path.dirname(path), [path]
    if glob.has_magic(source):
        fixed = source
        while glob.has_magic(fixed):
            fixed = os.path.dirname(fixed)
        found = (os.path.abspath(name) for name in glob.glob(source, recursive=True))
        files = sorted(path for path in found if os.path.isfile(path))
        if files:
            return os.path.abspath(fixed), files
        raise ValueError(f"`source` {source} matches no file; check the pattern.")
    raise ValueError(f"`source` {source} does not exist; give a folder, a file or a pattern.")


def _walk(folder: str, within: set[str]) -> Iterator[str]:
    """Images, tars and texts of a folder and its subfolders, links to folders among them."""
    real = os.path.realpath(folder)
    if real in within:  # a link to where it is
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, within | {real})
        elif _suffix(entry.name) in IMAGES | {".tar", CAPTION}:
            yield entry.path


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _rows(root: str, files: Sequence[str], needs: set[str], columns: Columns) -> Iterator[dict]:
    for file in files:
        kind, name = _suffix(file), os.path.relpath(file, root).replace(os.sep, "/")
        if not _is_text(file):
            name = name.encode("utf-8", "replace").decode()
            yield {"id": name, "problem": "UnicodeError: its name is not UTF-8; rename it."}
        elif kind in TABLES:
            yield from _from_table(file, name, needs, columns)
        elif kind == ".tar":
            yield from _from_tar(file, name, needs)
        elif kind in IMAGES and "image" in needs:
            row = {"id": name, "path": file}
            if "prompt" in needs:
                row |= _caption_file(os.path.splitext(file)[0] + CAPTION)
            yield row
        elif kind == CAPTION and "image" not in needs:
            yield {"id": name} | _caption_file(file)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _caption_file(path: str) -> dict:
    try:
        with open(path, "rb") as file:
            return _caption(file.read(), os.path.basename(path))
    except FileNotFoundError:
        return _caption(None, os.path.basename(path))
    except OSError as error:
        return {"problem": f"{type(error).__name__}: {error}"}


def _caption(data: bytes | None, name: str) -> dict:
    if data is None:
        return {"problem": f"NoPrompt: there is no {name} beside the image."}
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return {"problem": f"UnicodeDecodeError: {name} is not UTF-8 text ({error})."}
    return {"prompt": text} if text else {"problem": f"NoPrompt: {name} is empty."}


def _from_tar(file: str, name: str, needs: set[str]) -> Iterator[dict]:
    """Its samples and, where it is damaged, a row that says so beside those that are whole."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    damage = None
    try:
        with tarfile.open(file, "r:") as tar:
            size = os.path.getsize(file)
            damage = _read_members(tar, size, samples)
            for key, sample in samples.items():
                row = {"id": f"{name}/{key}", "path": file}
                image = next((sample[kind] for kind in sample if kind in IMAGES), None)
                caption = sample.get(CAPTION)
                if ("image" in needs and image is None) or (
                    caption is None and "image" not in needs
                ):
                    continue
                if image is not None:
                    row |= {"offset": image.offset_data, "size": image.size}
                if "prompt" in needs:
                    data = None if caption is None else tar.extractfile(caption).read()
                    row |= _caption(data, f"{key}{CAPTION}")
                yield row
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = str(error)
    if damage is not None:  # the others are worth having all the same
        yield {"id": name, "problem": f"TarError: {file} is damaged or no plain tar ({damage})."}


def _read_members(
    tar: tarfile.TarFile, size: int, samples: dict[str, dict[str, tarfile.TarInfo]]
) -> str | None:
    """Sort the members of a tar into samples; what is wrong with the tar, if anything is."""
    while True:
        try:
            member = tar.next()
        except tarfile.TarError as error:
            return str(error)
        if member is None:
            break
        if member.offset_data + member.size > size:
            return f"{member.name} is cut"
        folder, _, last = member.name.rpartition("/")
        key, _, suffix = last.partition(".")
        if member.isfile() and key and _is_text(member.name):  # what begins with a dot is none
            sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
            sample.setdefault(f".{suffix.lower()}", member)
    # tarfile takes a broken header for the end, of which two empty blocks are the mark
    tar.fileobj.seek(tar.offset)
    return None if tar.fileobj.read(512) == bytes(512) else "it ends early"


def _from_table(file: str, name: str, needs: set[str], columns: Columns) -> Iterator[dict]:
    try:
        table, chosen = _read_table(file, needs, columns)
    except pa.ArrowException as error:
        raise ValueError(f"`source` {file} cannot be read ({error}); check it.") from error
    folder, number = os.path.dirname(name), 0
    for batch in table.to_batches():
        for values in zip(*(batch.column(name).to_pylist() for name in chosen), strict=True):
            number += 1
            one = dict(zip(chosen.values(), values, strict=True))
            row = {"prompt": one.get("prompt")}
            parts = [one[need] or "" for need in ("image", "prompt") if need in needs]
            if "image" in needs and one["image"]:
                row["path"] = os.path.join(os.path.dirname(file), one["image"])
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
    """The columns that count, as strings, and what each is: image, prompt or id."""
    if _suffix(file) == ".parquet":
        names = pq.read_schema(file).names
    else:
        parse = pa.csv.ParseOptions(
            delimiter="\t" if _suffix(file) == ".tsv" else ",", newlines_in_values=True
        )
        with pa.csv.open_csv(file, parse_options=parse) as reader:
            names = reader.schema.names
    chosen = {_choose(names, need, columns, file): need for need in sorted(needs)}
    if len(chosen) < len(needs):
        raise ValueError(f"the image column and the prompt column are both {next(iter(chosen))}.")
    if columns.id is not None:
        if columns.id not in names:
            raise ValueError(_no_column(file, columns.id, names))
        if columns.id in chosen:
            raise ValueError(f"the {chosen[columns.id]} column is its own id; leave the id out.")
        chosen[columns.id] = "id"
    if _suffix(file) == ".parquet":
        table = pq.read_table(file, columns=list(chosen))
    else:
        # as they are written: an id like 007 is no number, a prompt like null no missing value
        convert = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(chosen, pa.large_string()),
            include_columns=list(chosen),
            strings_can_be_null=False,
        )
        table = pa.csv.read_csv(file, parse_options=parse, convert_options=convert)
    return table.cast(pa.schema([(name, pa.large_string()) for name in table.column_names])), chosen


def _choose(names: Sequence[str], need: str, columns: Columns, file: str) -> str:
    named = getattr(columns, need)
    if named is not None:
        if named not in names:
            raise ValueError(_no_column(file, named, names))
        return named
    for usual in _USUAL[need]:
        if usual in names:
            return usual
    raise ValueError(
        f"`source` {file} has none of the columns {', '.join(_USUAL[need])} for the {need}, but "
        f"{', '.join(names)}; say which one it is."
    )


def _no_column(file: str, name: str, names: Sequence[str]) -> str:
    return f"`source` {file} has no column {name!r}, but {', '.join(names)}; name one of these."


def _once(items: pa.Table, id_column: str | None) -> pa.Table:
    """The first item of each id."""
    codes = pc.dictionary_encode(items["id"].combine_chunks()).indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    if len(first) == len(items):
        return items
    if id_column is not None:
        twice = np.setdiff1d(np.arange(len(items)), first)[0]
        raise ValueError(
            f"`source` has the id {items['id'][int(twice)].as_py()!r} twice in its column "
            f"{id_column}; ids have to tell items apart."
        )
    return items.take(np.sort(first))
