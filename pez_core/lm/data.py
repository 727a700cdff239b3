"""Examples of classification tasks: the paper's tasks, tasks from a package, and files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch

from ..errors import ArgumentError, check_choice, first_line
from .text import Example

Splits = tuple[list[Example], list[Example]]

# The sdist that holds the snippets, and the archive inside it.
_VADER = "vaderSentiment==3.3.2"
_VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_SNIPPETS = "additional_resources/hutto_ICWSM_2014.tar.gz"
# Snippets with a mean rating, from -4 to 4, closer to 0 are left out as neutral, as in SST-2.
_NEUTRAL = 0.5
_TEST_SHARE, _SPLIT_SEED = 0.2, 0


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        template, verbalizer, max_length: see `pez_core.lm.tune_prompt`.
        source: the origin of its examples, in words.
        load: source and whether to download -> training and test examples.
    """

    template: str
    verbalizer: Mapping[Hashable, str]
    max_length: int
    source: str
    load: Callable[[str | Path | None, bool], Splits]


def load_task(name: str, source: str | Path | None = None, download: bool = False) -> Splits:
    """The training and the test examples of one of `TASKS`.

    "sst2", "amazon-polarity" and "ag-news" are read by the package datasets, from its cache on this
    disk or from `source`, a folder with their files. Their labels are numbers, as there. The
    training examples of Amazon Polarity are cut to 180,000, about as many as in the paper's code.

    The others consist of snippets in the source package of vaderSentiment 3.3.2 (Hutto and Gilbert
    2014): movie reviews, Amazon reviews, newspaper editorials and tweets, rated from -4 to 4 by
    people. The label of "movie-reviews" and "amazon-reviews" is the sign of the rating (snippets
    within 0.5 of 0 are left out), the label of "sources" is one of the four origins. `source` is
    that source package, or a folder with its `*_GroundTruth.txt`. A fifth, drawn with a fixed seed,
    is for testing.

    Args:
        name: one of `TASKS`.
        source: see above. None: files that were downloaded before.
        download: fetch files that are not on this disk, the snippets with pip.

    Raises:
        ArgumentError: no such task, or no examples at `source`.
    """
    check_choice("name", name, tuple(TASKS))
    return TASKS[name].load(source, download)


def read_examples(path: str | Path, label: str = "label") -> list[Example]:
    """Examples from a file: CSV, TSV (with a line of column names) or JSON lines.

    Args:
        path: ends in .csv, .tsv, .jsonl or .json.
        label: column of the label, which is read as text. The others are columns for the template.

    Raises:
        ArgumentError: no such file, another ending, or a line that cannot be read or lacks the
            label.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentError("path", f"is {str(path)!r}, but there is no such file")
    readers = {".csv": _csv, ".tsv": partial(_csv, delimiter="\t"), ".jsonl": _jsonl}
    readers[".json"] = _jsonl
    read = readers.get(path.suffix.lower())
    if read is None:
        raise ArgumentError("path", f"is {str(path)!r}, but has to end in {', '.join(readers)}")
    examples: list[Example] = []
    # one text may be a whole book
    most = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in read(file):
                if row.get(label) is None:
                    raise ArgumentError(
                        "path",
                        f"is {str(path)!r}, whose line {line} has no column {label!r}; it has "
                        f"{', '.join(row)}",
                    )
                columns = {
                    name: value if isinstance(value, str) else json.dumps(value)
                    for name, value in row.items()
                    if name != label and value is not None
                }
                examples.append((columns, str(row[label])))
    except UnicodeDecodeError as error:
        raise ArgumentError(
            "path", f"is {str(path)!r}, which is no UTF-8 text ({error})"
        ) from error
    except (csv.Error, OSError) as error:
        raise ArgumentError("path", f"is {str(path)!r}, which cannot be read ({error})") from error
    finally:
        csv.field_size_limit(most)
    return examples


def _csv(file: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(file, delimiter=delimiter, restkey="more than the columns")
    for row in reader:
        yield reader.line_num, row


def _jsonl(file: TextIO) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(
                "path", f"is {file.name!r}, whose line {number} is no JSON ({error})"
            ) from error
        if not isinstance(row, dict):
            raise ArgumentError("path", f"is {file.name!r}, whose line {number} is no JSON object")
        yield number, row


def _of_datasets(
    name: tuple[str, ...],
    columns: tuple[str, ...],
    test: str,
    limit: int | None,
    source: str | Path | None,
    download: bool,
) -> Splits:
    """The splits of a dataset of the hub."""
    if find_spec("datasets") is None:
        raise ArgumentError(
            "name",
            f"is a task whose examples ({name[0]}) need the package datasets",
            "pip install datasets, or give a file of your own",
        )
    datasets: Any = import_module("datasets")
    given = name if source is None else (str(source),)
    # the only setting that it checks before it uses the network
    offline, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, not download
    try:
        splits = datasets.load_dataset(*given)
        parts = [splits[part].select_columns([*columns, "label"]) for part in ("train", test)]
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetGenerationError) as error:
        raise ArgumentError(
            "source",
            f"is {given[0]!r}, which could not be read ({first_line(error)})",
            f"fetch it with `download`, or give a folder with its splits train and {test}, of "
            f"columns {', '.join(columns)} and label",
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    examples: list[list[Example]] = []
    for part, most in zip(parts, (limit, None), strict=True):
        if most is not None and len(part) > most:
            generator = torch.Generator().manual_seed(_SPLIT_SEED)
            part = part.select(torch.randperm(len(part), generator=generator)[:most].tolist())
        examples.append([({c: row[c] for c in columns}, row["label"]) for row in part])
    return examples[0], examples[1]


def _sentiment(file: str, source: str | Path | None, download: bool) -> Splits:
    rated = _snippets(source, download)[file]
    return _split(
        [
            (text, "positive" if rating > 0 else "negative")
            for rating, text in rated
            if abs(rating) >= _NEUTRAL
        ]
    )


def _origin(source: str | Path | None, download: bool) -> Splits:
    snippets = _snippets(source, download)
    return _split([(text, file) for file in _FILES for _, text in snippets[file]])


def _split(examples: list[Example]) -> Splits:
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(examples), generator=generator).tolist()
    count = round(len(examples) * _TEST_SHARE)
    return [examples[k] for k in order[count:]], [examples[k] for k in order[:count]]


# By label of the task "sources".
_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "newspaper": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}


def _snippets(source: str | Path | None, download: bool) -> dict[str, list[tuple[float, str]]]:
    """Rating and text of each snippet, by label of the task "sources"."""
    if source is None:
        source = _fetched(download)
    source = Path(source)
    try:
        contents = _in_folder(source) if source.is_dir() else _in_sdist(source)
        snippets = {label: _rated(content) for label, content in contents.items()}
    except (OSError, EOFError, LookupError, ValueError, tarfile.TarError, zlib.error) as error:
        raise ArgumentError(
            "source",
            f"is {str(source)!r}, which is neither the source package of {_VADER} nor a folder "
            f"with its *_GroundTruth.txt ({error})",
        ) from error
    return snippets


def _rated(content: bytes) -> list[tuple[float, str]]:
    rows = (line.split("\t", 2) for line in content.decode("utf-8").splitlines())
    return [(float(rating), text.strip()) for _, rating, text in rows]


def _in_folder(folder: Path) -> dict[str, bytes]:
    return {label: (folder / file).read_bytes() for label, file in _FILES.items()}


def _in_sdist(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as outer:
        (inner,) = [one for one in outer.getmembers() if one.name.endswith(_SNIPPETS)]
        data = _content(outer, inner)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        names = {Path(one.name).name: one for one in archive.getmembers()}
        return {label: _content(archive, names[file]) for label, file in _FILES.items()}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a file")
    return file.read()


def _fetched(download: bool) -> Path:
    """The source package; where it is missing and `download` is set, it is fetched."""
    folder = Path.home() / ".cache" / "pez"
    found = sorted(folder.glob("vader*3.3.2.tar.gz")) if folder.is_dir() else []
    for file in found:
        if hashlib.sha256(file.read_bytes()).hexdigest() == _VADER_SHA256:
            return file
    if not download:
        raise ArgumentError(
            "source",
            "is missing, and the snippets are not on this disk",
            "fetch them with `download` (2.4 MB, from PyPI), or give the source package of "
            f"{_VADER}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as there:
        # pip runs code of a source package, so it is checked before
        wanted = Path(there) / "wanted.txt"
        wanted.write_text(f"{_VADER} --hash=sha256:{_VADER_SHA256}\n")
        options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--dest", there]
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True)
        files = list(Path(there).glob("*.tar.gz"))
        if done.returncode or not files:
            raise OSError(f"pip could not fetch {_VADER}: {done.stderr.strip()[-300:]}")
        return files[0].replace(folder / files[0].name)


_TWO: dict[Hashable, str] = {0: "negative", 1: "positive"}
_REVIEW: dict[Hashable, str] = {"negative": "negative", "positive": "positive"}
_PACKAGE = f"source package of {_VADER}"

# Templates, verbalizers and lengths of the first three are those of the paper's code (table 4).
TASKS: dict[str, Task] = {
    "sst2": Task(
        "{sentence}. It was",
        _TWO,
        128,
        "datasets: nyu-mll/glue, sst2",
        partial(_of_datasets, ("nyu-mll/glue", "sst2"), ("sentence",), "validation", None),
    ),
    "amazon-polarity": Task(
        "{title} {content} It was",
        _TWO,
        256,
        "datasets: fancyzhx/amazon_polarity",
        partial(_of_datasets, ("fancyzhx/amazon_polarity",), ("title", "content"), "test", 180_000),
    ),
    "ag-news": Task(
        "{text} It was about",
        {0: "politics", 1: "sports", 2: "business", 3: "technology"},
        256,
        "datasets: fancyzhx/ag_news",
        partial(_of_datasets, ("fancyzhx/ag_news",), ("text",), "test", None),
    ),
    "movie-reviews": Task("{text} It was", _REVIEW, 128, _PACKAGE, partial(_sentiment, "movies")),
    "amazon-reviews": Task(
        "{text} It was", _REVIEW, 128, _PACKAGE, partial(_sentiment, "products")
    ),
    "sources": Task(
        "{text} It was about",
        {"movies": "movies", "products": "products", "newspaper": "politics", "tweets": "life"},
        128,
        _PACKAGE,
        _origin,
    ),
}
