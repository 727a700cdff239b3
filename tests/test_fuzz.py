"""Odd inputs, drawn at random: none may end in a traceback, an error without a name, or in silence.

What is drawn is the same in every run. `PEZ_FUZZ=20 pytest tests/test_fuzz.py` draws 20 times as
much.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, TEXT, VISION, make_clip, make_model
from PIL import Image
from safetensors.torch import save

import pez_core
from pez_core import ArgumentError, SearchOptions, Vocabulary, explain, prune, score
from pez_core.cli import main
from pez_core.clip.files import find_clip
from pez_core.clip.images import load_image
from pez_core.errors import ArgumentTypeError
from pez_core.lm.checkpoint import FileCheckpoint
from pez_core.lm.data import read_examples

hypothesis = pytest.importorskip("hypothesis")
pa = pytest.importorskip("pyarrow")
st = hypothesis.strategies

import pyarrow.parquet as pq  # noqa: E402 - where pyarrow is installed

from pez_core.batch.sources import find_items  # noqa: E402

TIMES = int(os.environ.get("PEZ_FUZZ", "1"))
NAMED = (ValueError, TypeError, OSError)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 * TIMES)]


def fuzz(examples: int) -> Callable:
    return hypothesis.settings(
        max_examples=examples * TIMES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def refused(call: Callable[[], Any], *names: str) -> Any:
    """The result of a call, or None where it raises an error that has one of these names in it."""
    try:
        return call()
    except NAMED as error:
        assert isinstance(error, (ArgumentError, ArgumentTypeError, OSError)), repr(error)
        assert any(name in str(error) for name in names), f"{error!r} names none of {names}"
        return None


# --- what is drawn


def changed(*originals: bytes) -> Any:
    """Files that were good, with some bytes replaced, put in or left out."""
    edits = st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), max_size=5
    )
    whole = st.just(1.0)
    return st.builds(_edited, st.sampled_from(originals), edits, whole | st.floats(0, 1))


def _edited(original: bytes, edits: list[tuple[float, bytes, int]], share: float) -> bytes:
    content = bytearray(original[: round(share * len(original))])
    for where, put, out in edits:
        at = round(where * len(content))
        content[at : at + out] = put
    return bytes(content)


WORDS = st.text(max_size=12) | st.sampled_from(
    [
        "a red dog",
        "",
        " ",
        "&nbsp;",
        "\x1b[0m",
        "(:",
        "((a:1.2)",
        "<lora:x:1>",
        "{}",
        "{} {}",
        "😂",
        "\0",
    ]
)
NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 0.5, -0.5, 1e-300, 1e300, 10**400, float("nan"), float("inf"), True, None]
)
SCALARS = NUMBERS | WORDS | st.binary(max_size=3) | st.just(len) | st.builds(object)
ODD = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(WORDS, NUMBERS, max_size=2)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1000) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


# --- images


def encoded(mode: str, kind: str, size: tuple[int, int] = (9, 7), **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.linear_gradient("L").resize(size).convert(mode)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "camera"
    return tags


FILES = {
    ".png": [encoded(mode, "PNG") for mode in ("1", "L", "LA", "P", "I;16", "RGB", "RGBA")],
    ".jpg": [encoded(mode, "JPEG", exif=exif()) for mode in ("L", "RGB", "CMYK")],
    ".webp": [encoded("RGBA", "WEBP", exif=exif())],
    ".gif": [encoded("P", "GIF", save_all=True, append_images=[Image.new("P", (9, 7))])],
    ".bmp": [encoded("RGB", "BMP")],
    ".tif": [encoded(mode, "TIFF") for mode in ("L", "F", "RGB")],
}


@fuzz(400)
@hypothesis.given(st.data())
def test_a_file_of_an_image_is_read_or_named(data):
    suffix = data.draw(st.sampled_from(sorted(FILES)))
    content = data.draw(changed(*FILES[suffix]))
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"picture{suffix}"
        path.write_bytes(content)
        image = refused(lambda: load_image(path), path.name)
    if image is not None:
        assert image.mode == "RGB" and min(image.size) > 0


@fuzz(300)
@hypothesis.given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(
        ["uint8", "int16", "int64", "float16", "float32", "float64", "bool", "U1"]
    ),
    fill=st.sampled_from([0, 1, 255, -1, 1e30, float("nan")]),
    as_tensor=st.booleans(),
)
def test_an_array_is_an_image_or_named(shape, dtype, fill, as_tensor):
    with np.errstate(all="ignore"):
        try:
            array = np.full(shape, fill).astype(dtype)
        except (ValueError, OverflowError):
            hypothesis.reject()
    given = torch.from_numpy(array) if as_tensor and dtype != "U1" else array
    image = refused(lambda: load_image(given), "image")
    if image is not None:
        assert image.mode == "RGB" and min(image.size) > 0


# --- arguments


@pytest.fixture(scope="module")
def clip():
    return make_clip()


OPTIONS = [field.name for field in fields(SearchOptions) if field.init]
RULES = [field.name for field in fields(Vocabulary) if field.init]


@fuzz(400)
@hypothesis.given(st.dictionaries(st.sampled_from(OPTIONS), ODD, min_size=1, max_size=2))
def test_options_of_a_search_are_taken_or_named(given):
    refused(lambda: SearchOptions(**given).work, *given)


@fuzz(300)
@hypothesis.given(st.dictionaries(st.sampled_from(RULES), ODD, min_size=1, max_size=3))
def test_rules_for_words_are_taken_or_named(clip, given):
    rules = refused(lambda: Vocabulary(**given), *given)
    if rules is not None:
        refused(lambda: rules.lexicon(clip), *given, "vocabulary")


@fuzz(60)
@hypothesis.given(prompt=WORDS | ODD, target=WORDS | ODD, loss=NUMBERS)
def test_a_prompt_is_scored_or_named(clip, prompt, target, loss):
    refused(lambda: score(clip, prompt, target), "prompts", "images")
    names = ("prompt", "target", "max_loss")
    refused(lambda: explain(clip, prompt, target), *names)
    refused(lambda: prune(clip, prompt, target, loss), *names)


# --- command lines


@pytest.fixture
def strict(monkeypatch, clip):
    """The command, which shows any error that it should not have to expect."""
    monkeypatch.setattr(pez_core, "load_clip", lambda *_, **__: clip)
    expected = (*NAMED, FloatingPointError)
    monkeypatch.setattr(sys.modules["pez_core.cli.main"], "_EXPECTED", expected)


def command(argv: list[str]) -> tuple[int, str, str]:
    """Exit status and output; a traceback goes through."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue(), err.getvalue()


def is_named(argv: list[str], message: str) -> bool:
    """Whether a message has an option, a value or an argument's name of the command line in it."""
    words = [word for word in argv[1:] if word.strip()]
    options = [word.split("=")[0] for word in words]
    named = ["PROMPT", "IMAGE", "COMMAND", "SOURCE", "OUT", *options, *map(repr, words)]
    return any(word in message for word in [*words, *named])


FEW = ["--effort", "fast", "--steps", "1", "--swaps", "1", "--prompt-len", "2"]
FLAGS = [
    "--json",
    "--shared",
    "--negative-prompt",
    "--low-memory",
    "--ascii",
    "--explain",
    "--prune",
]
WITH_TEXT = [
    "--caption",
    "--avoid",
    "--block",
    "--start-from",
    "--only",
    "--vocabulary",
    "--block-list",
]
WITH_FILE = ["--avoid-image", "--image", "--judge", "--language-model"]
WITH_NUMBER = ["--seed", "--restarts", "--weight", "--avoid-weight", "--readability", "--max-loss",
               "--clip-weight", "--prompt-len", "--ratio", "--style-weight", "--limit"]  # fmt: skip
NUMERALS = st.sampled_from(["-1", "0", "1", "0.5", "1e400", "nan", "inf", "x", "", "9" * 400, "٣"])
PLACES = st.sampled_from(
    [
        str(EXAMPLES[0]),
        str(EXAMPLES[0].parent),
        "missing.png",
        "",
        "\0",
        "a" * 300,
        "/dev/null",
        "-",
    ]
)
TEXTS = WORDS.map(lambda text: text.encode("utf-8", "replace").decode())
PARTS = (
    st.sampled_from(FLAGS).map(lambda flag: [flag])
    | st.tuples(st.sampled_from(WITH_TEXT), TEXTS).map(list)
    | st.tuples(st.sampled_from(WITH_FILE), PLACES).map(list)
    | st.tuples(st.sampled_from(WITH_NUMBER), NUMERALS).map(list)
    | st.tuples(st.just("--wording"), st.sampled_from(["free", "tags", "sentence", ""])).map(list)
)


@fuzz(150)
@hypothesis.given(
    task=st.sampled_from(["invert", "style", "distill", "fuse", "score", "models"]),
    given=st.lists(TEXTS | PLACES, max_size=3),
    parts=st.lists(PARTS, max_size=3),
)
def test_a_command_line_works_or_names_what_is_wrong(strict, monkeypatch, task, given, parts):
    few = FEW if task not in ("score", "models") else []
    argv = [task, *few, *given, *(word for part in parts for word in part)]
    monkeypatch.setattr("sys.stdin", io.StringIO("a red dog"))
    code, out, err = command(argv)
    assert code in (0, 1, 2), argv
    assert "Traceback" not in out + err
    if code == 1 and "--json" in argv:  # of one of several images
        assert any(row.get("error") for row in json.loads(out)), (argv, out)
    elif code:
        assert "error" in err, (argv, err)
        assert is_named(argv, err) or "required" in err or "stdin" in err, (argv, err)
    elif "--json" in argv:
        json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in {out}"))
    elif task != "models":
        assert out.strip() or "-h" in argv, argv
        assert "nan" not in out.split(), (argv, out)


# --- weights


def state() -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in make_model().state_dict().items()}


KEYS = ["model_cfg", "embed_dim", "vision_cfg", "text_cfg", "width", "layers", "heads"]
KEYS += ["context_length", "preprocess_cfg", "tokenizer_kwargs"]
CONFIG = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
SMALL = save({"visual.proj": torch.zeros(2, 3), "text_projection": torch.zeros(3, 2)})


@fuzz(200)
@hypothesis.given(changed(SMALL))
def test_the_header_of_a_file_is_understood_or_passed_over(content):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(content)
        find_clip(path)
        refused(lambda: pez_core.load_clip(path, device="cpu"), path.name)


@fuzz(60)
@hypothesis.given(
    keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=3),
    value=JSON,
    weights=st.sampled_from([b"", SMALL]),
)  # fmt: skip
def test_the_config_of_a_folder_is_read_or_the_folder_is_named(keys, value, weights):
    config = json.loads(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    at: Any = config
    for key in keys[:-1]:
        at = at[key] if isinstance(at.get(key), dict) else at
    at[keys[-1]] = value
    with TemporaryDirectory() as folder:
        place = Path(folder) / "stranger"
        place.mkdir()
        (place / "open_clip_config.json").write_text(json.dumps(config))
        (place / "open_clip_model.safetensors").write_bytes(weights)
        refused(lambda: pez_core.load_clip(place, device="cpu"), place.name)


@fuzz(60)
@hypothesis.given(changed(save({"ids": torch.arange(6)}, {"state": json.dumps({"step": 3})})))
def test_a_checkpoint_is_resumed_or_named(content):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "search.safetensors"
        path.write_bytes(content)
        refused(lambda: FileCheckpoint(path, {"steps": 3}).load(), path.name)


# --- tables


def rows() -> Iterator[list[str]]:
    yield from (["image", "prompt", "id"], ["a.png", "a red dog", "1"], ["b.png", "Zürich 😂", "2"])


def table(delimiter: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows())
    return text.getvalue().encode()


def parquet() -> bytes:
    names, *values = rows()
    sink = io.BytesIO()
    columns = zip(*values, strict=True)
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), sink)
    return sink.getvalue()


def tar(kind: int) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as archive:
        for name, content in (("1.png", FILES[".png"][0]), ("1.txt", b"a red dog"), ("2.txt", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


DATA = {
    "items.csv": [table(",")],
    "items.tsv": [table("\t")],
    "items.parquet": [parquet()],
    "items.tar": [
        tar(kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ],
}
SAVED = [*RULES, "operation", "left", "right"]
TEXT_FILES = [
    ("a.jsonl", b'{"text": "good", "label": "1"}\n{"text": "bad", "label": "0"}\n'),
    ("a.csv", b"text,label\na,1\nb,0\n"),
]


@fuzz(300)
@hypothesis.given(st.data())
def test_items_are_found_or_their_file_is_named(data):
    name = data.draw(st.sampled_from(sorted(DATA)))
    content = data.draw(changed(*DATA[name]))
    task = data.draw(st.sampled_from(["invert", "distill", "score"]))
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        found = refused(lambda: find_items(path, task), name)
    assert found is None or len(found)


@fuzz(100)
@hypothesis.given(st.sampled_from(TEXT_FILES), st.data())
def test_examples_are_read_or_their_file_is_named(kind, data):
    name, original = kind
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data.draw(changed(original)))
        refused(lambda: read_examples(path), name)


@fuzz(60)
@hypothesis.given(JSON | st.dictionaries(st.sampled_from(SAVED), JSON))
def test_saved_rules_are_read_or_their_file_is_named(rules):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "words.json"
        path.write_text(json.dumps(rules))
        refused(lambda: Vocabulary.load(path), path.name)


@fuzz(12)
@hypothesis.given(st.data())
def test_a_batch_has_a_row_or_an_error_for_each_item(strict, data):
    name = data.draw(st.sampled_from(sorted(DATA)))
    content = data.draw(changed(*DATA[name]))
    with TemporaryDirectory() as folder:
        path, out = Path(folder) / name, Path(folder) / "out"
        path.write_bytes(content)
        code, _, err = command(["batch", str(path), str(out), "--task", "distill", *FEW])
        assert code in (0, 1, 2) and "Traceback" not in err
        found = [pq.read_table(part) for part in out.glob("*.parquet")] if out.is_dir() else []
        if code == 2:
            assert name in err or "--" in err, err
            return
        failed = sum(bool(error) for part in found for error in part["error"].to_pylist())
        assert sum(map(len, found)) > 0
        assert (code == 1) == (failed > 0), (code, failed, err)
