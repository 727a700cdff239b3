"""Whole datasets in this process: what is found where, and that nothing is lost or done twice."""

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import EXAMPLES, ROOT, make_clip
from filelock import FileLock
from PIL import Image
from test_readability import make_lm

import pez_core.cli
from pez_core import (
    ArgumentError,
    SearchOptions,
    Vocabulary,
    distill,
    invert,
    prepare_caption,
    priors,
    score,
)
from pez_core.batch import BatchPlan, Columns, Job, Summary, find_items, plan, run
from pez_core.batch import job as job_module
from pez_core.batch import worker as worker_module
from pez_core.batch.output import Output
from pez_core.batch.worker import Worker, failed_row
from pez_core.cli import batch as command_module
from pez_core.cli import show
from pez_core.cli.main import build_parser
from pez_core.clip.images import load_image

PAPER = SearchOptions(swaps=0, steps=2, prompt_len=2)
QUICK = Job(options=PAPER)


@pytest.fixture(autouse=True)
def loads(monkeypatch, emoji_clip):
    """The calls of `load_clip`; the bundled CLIP is loaded once for all tests."""
    calls, load = [], worker_module.load_clip

    def loaded(names, device=None, **options):
        calls.append(SimpleNamespace(names=names, device=device, **options))
        usual = names == ["emoji-clip"] and options["weights"] is None
        return emoji_clip if usual else load(names, device="cpu", **options)

    monkeypatch.setattr(worker_module, "load_clip", loaded)
    return calls


@pytest.fixture
def images(tmp_path):
    """A folder with five images, one of them in a subfolder."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for path in EXAMPLES[:4]:
        shutil.copy(path, folder)
    shutil.copy(EXAMPLES[4], folder / "more")
    return folder


def names(count=5):
    return [*(path.name for path in EXAMPLES[: min(count, 4)]), f"more/{EXAMPLES[4].name}"][:count]


def read(out):
    rows = pq.read_table(out).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def ids(*arguments):
    return find_items(*arguments)["id"].to_pylist()


def picture():
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, "PNG")
    return file.getvalue()


def write_tar(path, **members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# --- sources


def test_a_folder_has_its_images_in_order_and_no_hidden_files(images):
    (images / "notes.md").write_text("no image")
    (images / ".hidden.png").write_bytes(picture())
    (images / "UPPER.JPG").write_bytes(picture())
    assert ids(images) == sorted([*names(), "UPPER.JPG"])


def test_a_pattern_begins_where_the_fixed_part_ends(images):
    assert ids(f"{images}/**/*.png") == sorted(names())
    assert ids(f"{images}/m*/*.png") == [names()[-1]]


def test_a_text_beside_an_image_is_its_prompt(images):
    caption = (images / names()[0]).with_suffix(".txt")
    caption.write_text("a red thing\n", "utf-8-sig")
    first, second = find_items(images, "score").to_pylist()[:2]
    assert first["prompt"] == "a red thing" and first["problem"] is None
    assert second["problem"].startswith("NoPrompt: there is no")
    (text,) = find_items(images, "distill").to_pylist()
    assert text == first | {"id": caption.name, "path": None}


def test_a_tar_is_read_as_webdataset_reads_it(tmp_path):
    members = {
        "a.b/001.png": picture(),
        "a.b/001.txt": b"a red box",
        "a.b/001.seg.png": b"another part of the sample, not its image",
        "a.b/002.json": b"{}",
        "003.PNG": picture(),
        ".hidden": b"",
    }
    write_tar(tmp_path / "one.tar", **members)
    assert ids(tmp_path / "one.tar") == ["one.tar/a.b/001", "one.tar/003"]
    assert ids(tmp_path, "distill") == ["one.tar/a.b/001"]
    first = find_items(tmp_path, "score").to_pylist()[0]
    assert first["prompt"] == "a red box"
    with (tmp_path / "one.tar").open("rb") as file:
        file.seek(first["offset"])
        assert file.read(first["size"]) == picture()


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (lambda data: data, 3),
        (lambda data: data[:512], 0),  # within the first member
        (lambda data: data[:1100], 1),  # within the second header
        (lambda data: data[:1024], 1),  # between two members
        (lambda data: data[:1600], 1),  # within the second member
        (lambda data: data[:1024] + b"x" * 512 + data[1536:], 1),
        (lambda data: b"no tar at all" * 100, 0),
    ],
)
def test_a_damaged_tar_is_an_item_with_a_problem_beside_what_is_whole(tmp_path, damage, whole):
    assert len(picture()) <= 512  # each member is a header and one block
    write_tar(tmp_path / "a.tar", **{f"{k}.png": picture() for k in range(3)})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(damage(data))
    items = [item for item in find_items(tmp_path).to_pylist() if item["id"].startswith("b.tar")]
    good = [f"b.tar/{k}" for k in range(whole)]
    assert [item["id"] for item in items] == good + ["b.tar"] * (whole < 3)
    assert [item["problem"] for item in items[:whole]] == [None] * whole
    assert whole == 3 or items[-1]["problem"].startswith("TarError: ")


def test_tables_of_several_folders_do_not_hide_one_another(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metadata.csv").write_text("file_name\n0.png\n\n1.png\n")
    (tmp_path / "a" / "metadata.csv").write_text('file_name\n0.png\n""\n1.png\n')
    items = find_items(tmp_path / "*" / "metadata.csv").to_pylist()
    assert [item["id"] for item in items] == [
        "a/0.png",
        "a/metadata.csv: row 2",
        "a/1.png",
        "b/0.png",
        "b/1.png",
    ]
    assert items[3]["path"] == str(tmp_path / "b" / "0.png")


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_links_keep_their_own_names(images, tmp_path):
    (tmp_path / "blob").write_bytes(picture())
    (tmp_path / "linked").mkdir()
    for name in "ab":
        (tmp_path / "linked" / f"{name}.png").symlink_to(tmp_path / "blob")
    (tmp_path / "linked" / "folder").symlink_to(images / "more")
    (tmp_path / "linked" / "self").symlink_to(tmp_path / "linked")
    assert ids(tmp_path / "linked") == ["a.png", "b.png", f"folder/{EXAMPLES[4].name}"]
    assert ids(tmp_path / "linked/*.png") == ["a.png", "b.png"]
    assert ids(tmp_path / "linked/a.png") == ["a.png"]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_a_name_that_is_not_utf_8_is_an_item_with_a_problem(images):
    with open(os.path.join(os.fsencode(images), b"caf\xe9.png"), "wb") as file:
        file.write(picture())
    (odd,) = [item for item in find_items(images).to_pylist() if item["problem"]]
    assert odd["id"] == "caf?.png" and odd["problem"].startswith("UnicodeError: ")


def test_texts_beside_images_are_found_whatever_the_pattern(images):
    (images / names()[0]).with_suffix(".txt").write_text("a red thing")
    for source in (images / names()[0], f"{images}/{names()[0][:-4]}*.png"):
        assert find_items(source, "score").to_pylist()[0]["prompt"] == "a red thing"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_of_paths_and_prompts(tmp_path, suffix):
    file = tmp_path / f"table{suffix}"
    rows = [
        ("a.png", 'a "quoted", long\ntext', "007"),
        ("/b.png", "null", "8"),
        ("http://c/d.png", "x", "9"),
    ]
    columns = dict(zip(("file_name", "words", "number"), zip(*rows, strict=True), strict=True))
    if suffix == ".parquet":
        pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), file)
    else:
        options = pa.csv.WriteOptions(delimiter="\t" if suffix == ".tsv" else ",")
        pa.csv.write_csv(pa.table({k: list(v) for k, v in columns.items()}), file, options)
    items = find_items(file).to_pylist()
    assert [item["id"] for item in items] == ["a.png", "/b.png", "http://c/d.png"]
    assert [item["path"] for item in items] == [str(tmp_path / "a.png"), "/b.png", "http://c/d.png"]
    named = find_items(file, "score", Columns(prompt="words", id="number")).to_pylist()
    assert [item["id"] for item in named] == ["007", "8", "9"]
    assert [item["prompt"] for item in named] == [text for _, text, _ in rows]
    with pytest.raises(ValueError, match=r"none of the columns prompt.*file_name, words, number"):
        find_items(file, "distill")
    with pytest.raises(
        ValueError, match=r"`image_column` is 'path', but .*table.* has only file_name"
    ):
        find_items(file, "invert", Columns(image="path"))


def test_empty_cells_have_a_problem(tmp_path):
    (tmp_path / "table.csv").write_text("id,prompt\n1,a dog\n2,\n3,  \n")
    items = find_items(tmp_path / "table.csv", "distill", Columns(id="id")).to_pylist()
    assert [item["problem"] for item in items] == [None, *["EmptyCell: the row has no prompt."] * 2]


def test_an_id_counts_once(tmp_path):
    (tmp_path / "table.csv").write_text("id,prompt\n1,a dog\n2,a cat\n1,a dog\n")
    assert ids(tmp_path / "table.csv", "distill") == ["a dog", "a cat"]
    with pytest.raises(ValueError, match="`id_column` is 'id', which holds '1' twice"):
        find_items(tmp_path / "table.csv", "distill", Columns(id="id"))


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("nowhere", "invert", "does not exist"),
        ("*.bmp", "invert", "matches no file"),
        ("images", "distill", "holds nothing for distill, which takes prompts"),
    ],
)
def test_sources_that_hold_nothing(images, name, task, message):
    with pytest.raises(ValueError, match=message):
        find_items(images.parent / name, task)


@pytest.mark.skipif(os.name != "posix", reason="makes links and pipes")
@pytest.mark.parametrize("task", ["invert", "distill", "score"])
def test_entries_that_cannot_be_read_are_items_with_a_problem(images, tmp_path, monkeypatch, task):
    (images / names()[0]).with_suffix(".txt").write_text("a red thing")
    (images / "loop").symlink_to(images / "loop")
    (images / "closed").mkdir()
    os.mkfifo((images / names()[1]).with_suffix(".txt"))
    os.mkfifo(images / "pipe.png")
    scan = os.scandir

    def closed(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", closed)
    items = {item["id"]: item for item in find_items(images, task).to_pylist()}
    assert items["loop"]["problem"].startswith("OSError: ")
    assert items["closed"]["problem"].startswith("PermissionError: ")
    if task != "distill":
        assert items["pipe.png"]["problem"].startswith("NoFile: ")
    good = names()[0].replace(".png", ".txt") if task == "distill" else names()[0]
    assert items[good]["problem"] is None
    if task != "invert":
        piped = names()[1].replace(".png", ".txt") if task == "distill" else names()[1]
        assert items[piped]["problem"].startswith("NoFile: ")


IN_ANOTHER_LOCALE = """
import sys
from pez_core.batch import find_items
from pez_core.cli import main
assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
folder, out, table = sys.argv[1:]
quick = ["--swaps", "0", "--steps", "2", "--prompt-len", "2"]
assert main(["batch", folder, out, *quick]) == 1  # there is an item with an error
print(ascii(find_items(table, "score").to_pylist()))
main(["batch", folder, table, *quick])
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows and macOS have UTF-8 names in any locale")
@pytest.mark.slow
def test_names_are_utf8_in_any_locale(tmp_path):
    folder, out = tmp_path / "bilder-ä", tmp_path / "öut"
    folder.mkdir()
    shutil.copy(EXAMPLES[0], folder / "fünf.png")
    write_tar(folder / "größe.tar", **{"ü.png": picture()})
    with open(os.path.join(os.fsencode(folder), b"bad-\xff.png"), "wb") as bad:
        bad.write(picture())
    table = tmp_path / "täble.csv"
    table.write_text("file_name,prompt\nfünf.png,ä fish\n", encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    given = [sys.executable, "-c", IN_ANOTHER_LOCALE, folder, out, table]
    done = subprocess.run(given, cwd=ROOT, env=os.environ | plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read(out)
    assert rows["fünf.png"]["prompt"] and rows["größe.tar/ü"]["prompt"]
    assert rows["bad-?.png"]["error"] == "UnicodeError: its name is not UTF-8; rename it."
    (item,) = ast.literal_eval(done.stdout.splitlines()[-1])
    assert (item["id"], item["path"]) == ("fünf.png | ä fish", str(tmp_path / "fünf.png"))
    assert r"t\udcc3\udca4ble.csv', which is a file" in done.stderr
    # the settings, too: the same batch is complete here
    summary = run(folder, out, QUICK)
    assert summary.items == summary.finished_before == 3


def test_a_folder_that_cannot_be_listed_is_named(images, monkeypatch):
    def closed(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(ArgumentError, match=r"`source` .*images' cannot be listed .*Permission"):
        find_items(images)


def sparse(header):
    """The header of a file in GNU's sparse format."""
    return header[:156] + b"S" + header[157:]


def negative(header):
    """A header whose size is below 0."""
    return header[:124] + b"\xff" * 12 + header[136:]


def huge(header):
    return header[:124] + b"\x80" + b"\x7f" * 11 + header[136:]


@pytest.mark.parametrize("damage", [sparse, negative, huge])
def test_headers_that_mislead_tarfile_are_a_problem_of_their_tar(tmp_path, damage):
    write_tar(tmp_path / "a.tar", **{f"{k}.png": picture() for k in range(3)})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    header = bytearray(damage(bytes(data[1024:1536])))
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "b.tar").write_bytes(data[:1024] + header + data[1536:])
    items = {item["id"]: item["problem"] for item in find_items(tmp_path).to_pylist()}
    assert items["a.tar/2"] is None and items["b.tar/0"] is None
    assert items["b.tar"].startswith("TarError: ") and str(tmp_path / "b.tar") in items["b.tar"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_damaged_table_is_an_item_with_a_problem(tmp_path, suffix):
    good, bad = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    table = pa.table({"prompt": ["a dog", "a cat"]})
    write = pq.write_table if suffix == ".parquet" else pa.csv.write_csv
    write(table, good)
    whole = good.read_bytes()
    damaged = [whole[:-9], whole.replace(b"a cat", b"a\xff\xfet"), b"", b"\0" * 50]
    for data in damaged:
        bad.write_bytes(data)
        items = find_items(tmp_path / f"*{suffix}", "distill").to_pylist()
        problems = [item["problem"] for item in items if item["problem"]]
        assert [item["prompt"] for item in items if not item["problem"]][-2:] == ["a dog", "a cat"]
        if problems:
            assert problems[0].startswith("TableError: ") and str(bad) in problems[0]
        else:  # a CSV file may be cut between two letters
            assert suffix == ".csv" and data == whole[:-9]


# --- what a job is


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"task": "paint"}, "`task` has to be one of 'invert'"),
        ({"task": "distill", "caption": "a {}"}, "`caption` is given, but task 'distill'"),
        ({"task": "invert", "ratio": 0.5}, "`ratio` is given, but task 'invert'"),
        (
            {"task": "score", "options": SearchOptions(steps=3)},
            "`steps` is given, but task 'score'",
        ),
        ({"task": "score", "language_model": "x"}, "`language_model` is given, but task 'score'"),
        ({"options": SearchOptions(time_limit=3)}, "`time_limit` cannot be an option of a batch"),
        ({"options": SearchOptions(batch_size=3)}, "`batch_size` cannot be an option of a batch"),
        ({"options": SearchOptions(seed=[1, 2])}, "`seed` has to be an integer"),
        ({"captioner": "x", "caption": "a"}, "`captioner` cannot be combined with `caption`"),
        ({"captions": True, "caption": "a"}, "`captions` cannot be combined with `caption`"),
        ({"captions": True, "captioner": "x"}, "`captioner` cannot be combined with `captions`"),
        ({"task": "score", "captions": True}, "`captions` is given, but task 'score'"),
        ({"prune_caption": True}, "`prune_caption` requires `caption`, `captions` or"),
        ({"task": "distill", "captioner": "x"}, "`captioner` is given, but task 'distill'"),
        ({"avoid": [3]}, "`avoid` has to be a string"),
        ({"avoid": str(EXAMPLES[0])}, "`avoid` is the text .* image file"),
        ({"avoid_weight": -1}, "`avoid_weight` has to be finite and 0 or more"),
        ({"task": "distill", "ratio": 2}, "`ratio` has to be above 0 and at most 1"),
    ],
)
def test_jobs_with_values_that_cannot_be_used(job, message):
    with pytest.raises(ArgumentError, match=message):
        Job(**job)


def test_one_clip_or_text_is_a_list_of_one():
    assert Job(clip="emoji-clip", avoid="dog") == Job(clip=["emoji-clip"], avoid=["dog"])


def search_job(**options):
    return Job(options=SearchOptions(**options))


@pytest.mark.slow
def test_settings_are_all_that_a_result_depends_on():
    usual = Job().settings
    later = {"fit", "activation", "wording", "captions", "captioner", "prune_caption"}
    assert not later & {*usual}  # outputs of older versions go on
    assert search_job(readability=0.5).settings["wording"] == "free"  # by another language model
    assert usual == search_job(prompt_len=8, restarts=1, effort="balanced").settings
    # numbers in place of a name, which may get others
    assert usual == search_job(steps=150, swaps=32).settings and usual["work"]["swaps"] == 32
    alone, published = search_job(steps=3000, swaps=0).settings, search_job(effort="paper").settings
    assert published["published"] and "published" not in alone
    assert published["repeats"] and not published["vocabulary"]["whole_words"]
    differ = {"published", "work", "repeats", "vocabulary"}
    assert alone | {name: published[name] for name in differ} == published
    limited = search_job(vocabulary=Vocabulary(only=["a", "b"])).settings
    assert limited["vocabulary"]["only"] == ["a", "b"]
    changed = [
        search_job(effort="fast"),
        search_job(steps=3),
        search_job(swaps=3),
        search_job(prompt_len=3),
        search_job(restarts=3),
        search_job(seed=3),
        search_job(start_from="a"),
        search_job(readability=0.5),
        search_job(wording="tags"),
        search_job(wording="sentence"),
        search_job(block_unsafe=False),
        search_job(repeats=True),
        search_job(vocabulary=Vocabulary(dictionary=False)),
        search_job(fit="pad"),
        Job(activation="gelu"),
        Job(task="score", options=SearchOptions(fit="pad")),
        search_job(lr=0.2),
        search_job(weight_decay=0.2),
        search_job(patience=3),
        search_job(vocabulary=Vocabulary(ascii_only=True)),
        Job(language_model="x"),
        Job(caption="a"),
        Job(captions=True),
        Job(captions=True, prune_caption=True),
        Job(captioner="a"),
        Job(captioner="a", prune_caption=True),
        Job(avoid="a"),
        Job(avoid_weight=0.1),
        Job(clip="a"),
        Job(clip_weights=[1]),
        Job(task="distill"),
        Job(task="score"),
    ]
    different = {json.dumps(job.settings) for job in changed}
    assert len(different) == len(changed) and json.dumps(usual) not in different
    assert set(Job(task="score").settings) == {"task", "clip", "clip_weights"}


def test_settings_hold_every_option():
    """A new option must not be left out."""
    elsewhere = {"effort", "steps", "swaps", "block_unsafe", *job_module._REFUSED}
    names = {field.name for field in fields(SearchOptions)} | {field.name for field in fields(Job)}
    names -= {"options", "ratio"}
    # those that came later are left out where they are the default, or old outputs would not resume
    given = SearchOptions(fit="pad", wording="tags")
    later = Job(options=given, activation="gelu", captioner="x").settings
    assert names - elsewhere <= set(later) and "ratio" in Job(task="distill").settings
    new = {"fit", "activation", "wording", "captions", "captioner", "prune_caption"}
    assert set(later) - set(Job().settings) == new
    assert {"work", "unsafe_words"} <= set(Job().settings)


def test_a_job_can_be_pickled():
    vocabulary = Vocabulary(only=["a"]) & Vocabulary(block=["b"], whole_words=False)
    job = Job(options=SearchOptions(vocabulary=vocabulary, steps=3), avoid=["a"], clip_weights=[1])
    again = pickle.loads(pickle.dumps(job))
    assert again == job and again.settings == job.settings


def test_the_seed_of_an_item_is_its_own():
    seeds = {search_job(seed=seed).seed_of(item) for seed in range(3) for item in "abc"}
    assert len(seeds) == 9 and max(seeds) < 2**48
    assert search_job(effort="best").seed_of("a") == Job().seed_of("a")


# --- results


def test_a_row_is_what_invert_finds(images, tmp_path, emoji_clip):
    summary = run(images, tmp_path / "out", QUICK)
    assert (summary.items, summary.found, summary.failed, summary.missing) == (5, 5, 0, 0)
    rows = read(tmp_path / "out")
    assert sorted(rows) == sorted(names())
    row = rows[names()[1]]
    seed = QUICK.seed_of(names()[1])
    (alone,) = invert(emoji_clip, EXAMPLES[1], replace(PAPER, seed=seed))
    assert (row["prompt"], row["token_ids"]) == (alone.prompt, alone.token_ids)
    assert row["similarity"] == pytest.approx(alone.similarity, abs=1e-6)
    assert row["seed"] == seed and row["seconds"] > 0 and row["error"] is None


def prompts(out):
    return {item: (row["prompt"], row["seed"]) for item, row in read(out).items()}


@pytest.mark.slow
def test_neither_packing_nor_order_nor_a_second_run_changes_a_prompt(images, tmp_path):
    job = search_job(effort="fast", steps=4, swaps=4, prompt_len=4)
    run(images, tmp_path / "all", job, batch_size=5)
    expected = prompts(tmp_path / "all")
    assert len(set(expected.values())) == 5
    run(images, tmp_path / "single", job, batch_size=1, chunk=2, shuffle=True)
    assert prompts(tmp_path / "single") == expected
    before = run(images, tmp_path / "twice", job, batch_size=2, limit=2)
    after = run(images, tmp_path / "twice", job, batch_size=3)
    assert (before.found, after.found, after.finished_before) == (2, 5, 2)
    assert prompts(tmp_path / "twice") == expected


def test_groups_are_filled_up_on_a_cpu(images, tmp_path, monkeypatch):
    search, sizes = worker_module.invert, []

    def counted(clip, features, *arguments, **options):
        sizes.append(len(features))
        return search(clip, features, *arguments, **options)

    monkeypatch.setattr(worker_module, "invert", counted)
    run(images, tmp_path / "out", QUICK, batch_size=3)
    assert sizes == [1, 4, 4]  # the first is the check of the settings
    assert len(read(tmp_path / "out")) == 5


def test_finished_items_are_not_searched_again(images, tmp_path, monkeypatch):
    run(images, tmp_path / "out", QUICK)
    monkeypatch.setattr(worker_module, "load_clip", lambda *a, **k: pytest.fail("loaded"))
    assert run(images, tmp_path / "out", QUICK).finished_before == 5


@pytest.mark.slow
def test_a_shuffled_limit_takes_what_the_seed_says(images, tmp_path):
    taken = set()
    for seed in range(6):
        job, out = (
            search_job(swaps=0, steps=1, prompt_len=1, seed=seed),
            tmp_path / str(seed),
        )
        run(images, out, job, shuffle=True, limit=2)
        two = set(read(out))
        run(images, out, job, shuffle=True, limit=3)
        assert len(two) == 2 and two < set(read(out))
        taken.add(frozenset(two))
    assert len(taken) > 1
    run(images, tmp_path / "plain", search_job(swaps=0, steps=1, prompt_len=1), limit=2)
    assert set(read(tmp_path / "plain")) == set(names(2))


def test_a_bad_image_is_a_row_with_its_error(images, tmp_path):
    (images / "bad.png").write_bytes(b"no image")
    (images / "empty.png").write_bytes(b"")
    reports = []
    summary = run(images, tmp_path / "out", QUICK, reports.append, batch_size=2)
    assert summary.found == 5
    assert summary.errors == {"UnidentifiedImageError": 1, "ValueError": 1}
    rows = read(tmp_path / "out")
    bad = rows["bad.png"]
    assert bad["error"].startswith("UnidentifiedImageError: ") and "save it as PNG" in bad["error"]
    assert bad["prompt"] is None and bad["similarity"] is None and bad["seed"] is None
    assert reports[0] | {"elapsed": 0} == {
        "done": 0,
        "total": 7,
        "failed": 0,
        "elapsed": 0,
        "rate": None,
        "left": None,
    }
    last = reports[-1]
    assert (last["done"], last["failed"], last["left"]) == (7, 2, 0)
    assert last["rate"] == pytest.approx(7 / last["elapsed"])


def test_errors_stay_until_a_retry_is_asked_for(images, tmp_path):
    (images / "bad.png").write_bytes(b"no image")
    run(images, tmp_path / "out", QUICK)
    shutil.copy(EXAMPLES[5], images / "bad.png")
    again = run(images, tmp_path / "out", QUICK)
    assert (again.finished_before, again.failed) == (6, 1)
    retried = run(images, tmp_path / "out", QUICK, retry_failed=True)
    assert (retried.finished_before, retried.found, retried.errors) == (5, 6, {})
    assert read(tmp_path / "out")["bad.png"]["error"] is None


def test_a_retry_leaves_other_errors_alone(images, tmp_path):
    for name in ("a-bad.png", "z-bad.png"):
        (images / name).write_bytes(b"no image")
    run(images, tmp_path / "out", QUICK)
    assert run(images, tmp_path / "out", QUICK, retry_failed=True, limit=1).failed == 1
    assert len(read(tmp_path / "out")) == 7
    again = run(images, tmp_path / "out", QUICK, retry_failed=True)
    assert (again.finished_before, again.failed) == (5, 2)


def test_a_retry_that_fails_again_says_why_now(images, tmp_path):
    bad = [images / f"{letter}-bad.png" for letter in "abcdefgh"]
    for path in bad:
        path.write_bytes(b"no image")
    assert run(images, tmp_path / "out", QUICK).errors == {"UnidentifiedImageError": 8}
    for path in bad:
        path.write_bytes(b"")
    again = run(images, tmp_path / "out", QUICK, retry_failed=True, chunk=1)
    assert again.errors == {"ValueError": 8} and len(read(tmp_path / "out")) == 13


def test_whatever_a_decoder_raises_is_the_error_of_its_image(images, tmp_path, monkeypatch):
    load = worker_module.load_image

    def odd(path):
        if path.endswith(names()[1]):
            raise Unforeseen("a decoder")
        return load(path)

    monkeypatch.setattr(worker_module, "load_image", odd)
    summary = run(images, tmp_path / "out", QUICK)
    assert (summary.found, summary.errors) == (4, {"Unforeseen": 1})


def test_a_prompt_without_words_is_an_error_of_its_item(tmp_path):
    (tmp_path / "table.csv").write_text(f"prompt\n&nbsp;\n{'a red bird ' * 4}\n")
    summary = run(tmp_path / "table.csv", tmp_path / "out", Job(task="distill", options=PAPER))
    assert (summary.found, summary.errors) == (1, {"ValueError": 1})
    assert "no words" in read(tmp_path / "out")["&nbsp;"]["error"]


def test_nan_is_an_error_of_its_item(images, tmp_path, monkeypatch, emoji_clip):
    for name in names(3):
        (images / name).with_suffix(".txt").write_text("a bird")
    encode = emoji_clip.encode_images
    calls = []

    def broken(pictures, fit):
        calls.append(None)
        return encode(pictures, fit) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(emoji_clip, "encode_images", broken)
    summary = run(images, tmp_path / "out", Job(task="score"))
    assert (summary.found, summary.errors) == (2, {"FloatingPointError": 1, "NoPrompt": 2})
    (row,) = [r for r in read(tmp_path / "out").values() if "Floating" in (r["error"] or "")]
    assert "emoji-clip" in row["error"] and row["similarity"] is None


def test_a_clip_that_gives_nan_is_named(images, tmp_path, monkeypatch):
    """Before a search as for each item."""
    clip = make_clip()
    monkeypatch.setattr(worker_module, "load_clip", lambda *_, **__: clip)
    worker = worker_module.Worker(QUICK)
    torch.nn.init.constant_(clip.model.text_projection, float("nan"))
    with pytest.raises(FloatingPointError, match="similarities by tiny are NaN"):
        worker.check()
    torch.nn.init.constant_(clip.model.visual.proj, float("nan"))
    (item,) = find_items(images / names(1)[0], "invert").to_pylist()
    ((row,),) = worker.rows([item])
    assert row["error"].startswith("FloatingPointError: similarities by tiny are NaN")


def test_a_device_that_is_lost_ends_the_run_and_is_no_fault_of_the_items(
    images, tmp_path, monkeypatch
):
    search, calls = worker_module.invert, []

    def broken(*arguments, **options):
        calls.append(None)
        if len(calls) > 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return search(*arguments, **options)

    monkeypatch.setattr(worker_module, "invert", broken)
    with pytest.raises(worker_module.DeviceLost, match="illegal memory access"):
        run(images, tmp_path / "out", QUICK, batch_size=2)
    rows = read(tmp_path / "out")
    assert len(rows) == 2 and not any(row["error"] for row in rows.values())


class Unforeseen(Exception):
    """No error that anybody expects."""


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("not a number"),
        ZeroDivisionError("division by zero"),
        Unforeseen("caf\udce9"),
        AssertionError(),
        KeyError("x"),
        RecursionError("too deep"),
    ],
)
def test_an_item_that_breaks_its_group_is_found_and_the_others_stay(
    images, tmp_path, monkeypatch, error
):
    search, seed = worker_module.invert, QUICK.seed_of(names()[2])

    def failing(clip, features, options, **steering):
        if isinstance(options.seed, tuple) and bad in options.seed:
            raise error
        return search(clip, features, options, **steering)

    bad = seed
    monkeypatch.setattr(worker_module, "invert", failing)
    summary = run(images, tmp_path / "out", QUICK, batch_size=5)
    assert (summary.found, summary.errors) == (4, {type(error).__name__: 1})
    message = f"{type(error).__name__}: {error}".replace("\udce9", "?")
    assert read(tmp_path / "out")[names()[2]]["error"] == message


def test_where_memory_ends_fewer_are_searched_batch_size(images, tmp_path, monkeypatch):
    run(images, tmp_path / "room", QUICK)
    search, sizes = worker_module.invert, []

    def limited(clip, features, *arguments, **options):
        sizes.append(len(features))
        if len(features) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(clip, features, *arguments, **options)

    monkeypatch.setattr(worker_module, "invert", limited)
    assert run(images, tmp_path / "out", QUICK, batch_size=5).found == 5
    assert sizes == [1, 8, 4, 4]  # the first is the check of the settings
    assert prompts(tmp_path / "out") == prompts(tmp_path / "room")


def test_as_many_items_are_searched_batch_size_as_there_is_memory_for(monkeypatch):
    each = Worker(QUICK).clip.text.memory_per_prompt(2) * QUICK.options.work.trials
    each /= worker_module._SHARE  # the rest is for what does not grow
    for free, items in [(None, 16), (10**12, 16), (round(7.5 * each), 7), (each // 2, 1)]:
        monkeypatch.setattr(worker_module, "_free_memory", lambda device, free=free: free)
        assert Worker(QUICK).batch_size == items
    assert Worker(QUICK, batch_size=3).batch_size == 3


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_whatever_ends_it_what_was_found_is_kept(images, tmp_path, how):
    def end(report):
        if report["done"] >= 2:
            if how == "interrupt":
                raise KeyboardInterrupt
            return True

    if how == "stop":
        summary = run(images, tmp_path / "out", QUICK, end, batch_size=1, chunk=5)
        assert summary.stopped and (summary.found, summary.missing) == (2, 3)
    else:
        with pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps it
            run(images, tmp_path / "out", QUICK, end, batch_size=1, chunk=5)
        assert kept.tb
    assert len(read(tmp_path / "out")) == 2
    assert run(images, tmp_path / "out", QUICK).finished_before == 2


def test_settings_that_do_not_fit_the_clip_are_told_before_anything_is_searched(images, tmp_path):
    with pytest.raises(ValueError, match="`prompt_len` has to be from 1 to 75 but is 76"):
        run(images, tmp_path / "out", search_job(prompt_len=76, steps=1))
    with pytest.raises(ArgumentError, match="`caption`"):
        run(images, tmp_path / "out2", Job(caption="{} {}", options=PAPER))
    assert not list(tmp_path.glob("out*/*.parquet"))


def test_prompts_are_distilled(tmp_path, emoji_clip):
    (tmp_path / "table.csv").write_text("prompt\na small red bird on a long green branch\n\n")
    job = Job(task="distill", options=PAPER)
    assert run(tmp_path / "table.csv", tmp_path / "out", job).found == 1
    (row,) = read(tmp_path / "out").values()
    options = replace(PAPER, seed=job.seed_of(row["id"]))
    alone = distill(emoji_clip, "a small red bird on a long green branch", options)
    assert (row["prompt"], row["token_ids"]) == (alone.prompt, alone.token_ids)


def test_pairs_are_scored_as_the_judge_scores_them(images, tmp_path, emoji_clip):
    prompts = ["an anchor", "a bird " * 50]  # the second is longer than a context
    for name, prompt in zip(names(2), prompts, strict=True):
        (images / name).with_suffix(".txt").write_text(prompt)
    (images / "more" / "x.png").write_bytes(picture())
    summary = run(images, tmp_path / "out", Job(task="score"))
    assert (summary.found, summary.errors) == (2, {"NoPrompt": 4})
    for name, prompt in zip(names(2), prompts, strict=True):
        row = read(tmp_path / "out")[name]
        expected = score(emoji_clip, [prompt], [images / name]).similarity.item()
        assert row["similarity"] == pytest.approx(expected, abs=1e-5)
        assert row["prompt"] == prompt.strip() and row["seed"] is None


def test_members_of_a_tar_are_searched_like_files(images, tmp_path):
    members = {name: (images / name).read_bytes() for name in names(3)}
    write_tar(tmp_path / "data.tar", **members, **{"zz.png": b"broken"})
    summary = run(tmp_path / "data.tar", tmp_path / "out", QUICK)
    assert (summary.found, summary.errors) == (3, {"UnidentifiedImageError": 1})
    row = read(tmp_path / "out")[f"data.tar/{names()[0][:-4]}"]
    job = Worker(QUICK)
    item = find_items(images).to_pylist()[0] | {"id": row["id"]}
    ((alone,),) = job.rows([item])
    assert alone["prompt"] == row["prompt"]
    assert alone["similarity"] == pytest.approx(row["similarity"], abs=1e-6)


# --- the results on the disk


def row_of(item, error=None):
    if error:
        return failed_row(item, error)
    good = {"prompt": "a", "similarity": 0.5, "token_ids": [320], "seed": 1, "seconds": 0.1}
    return {"id": item, "error": None} | good


def test_another_source_or_column_is_another_setting(images, tmp_path):
    run(images, tmp_path / "out", QUICK)
    with pytest.raises(ValueError, match=r"source: .*images' there, .*more' now"):
        run(images / "more", tmp_path / "out", QUICK)
    (tmp_path / "t.csv").write_text("a,b\na red bird,a cat\n")
    job = Job(task="score")
    assert job.settings == Job(task="score").settings
    job = Job(task="distill", options=PAPER)
    run(tmp_path / "t.csv", tmp_path / "texts", job, columns=Columns(prompt="a"))
    with pytest.raises(ValueError, match=r"columns: .*'a'.* there, .*'b'.* now"):
        run(tmp_path / "t.csv", tmp_path / "texts", job, columns=Columns(prompt="b"))


def test_other_settings_are_refused_with_the_difference(images, tmp_path):
    run(images, tmp_path / "out", QUICK)
    before = sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"prompt_len: 2 there, 3 now\n  caption: '' there"):
        run(images, tmp_path / "out", Job(options=replace(PAPER, prompt_len=3), caption="a {}"))
    with pytest.raises(ValueError, match="other settings"):
        plan(images, tmp_path / "out", Job())
    assert sorted(os.listdir(tmp_path / "out")) == before


def test_a_folder_with_something_else_is_left_alone(images, tmp_path):
    with pytest.raises(ValueError, match="holds other files, such as"):
        run(images, images, QUICK)
    assert "_lock" not in os.listdir(images)
    with pytest.raises(ValueError, match="which is a file; give a folder"):
        run(images, images / names()[0], QUICK)


def test_two_runs_do_not_write_batch_size(images, tmp_path):
    run(images, tmp_path / "out", QUICK, limit=1)
    with (
        FileLock(tmp_path / "out" / "_lock"),
        pytest.raises(ValueError, match="written by another run"),
    ):
        run(images, tmp_path / "out", QUICK)
    assert run(images, tmp_path / "out", QUICK).found == 5


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    output = Output(tmp_path)
    output.write([row_of("a")])

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        output.write([row_of("b")])
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 1 and list(read(tmp_path)) == ["a"]


def test_rows_of_a_worker_that_outlived_its_run_do_not_stay_twice(tmp_path):
    output = Output(tmp_path)
    output.write([row_of("a"), row_of("b"), row_of("c", "Odd: x")])
    output.write([row_of("b"), row_of("c"), row_of("d", "Odd: y")])
    output.write([row_of("a", "Odd: z")])
    (tmp_path / ".part-0.parquet.123.tmp").write_bytes(b"half a file")
    output.tidy()
    rows = read(tmp_path)
    assert {item: row["error"] for item, row in rows.items()} == {
        "a": None,
        "b": None,
        "c": None,
        "d": "Odd: y",
    }
    assert not list(tmp_path.glob(".*"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    output.tidy()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_rows_given_again_replace_themselves(tmp_path):
    output = Output(tmp_path)
    rows = [row_of("a"), row_of("b", "Odd: x")]
    for _ in range(2):
        output.write(rows)
    assert len(read(tmp_path)) == 2
    assert output.has(["a", "b"]) and not output.has(["a"]) and not output.has(["b", "a"])
    assert output.errors(pa.chunked_array([["a", "b"]])) == {"Odd": 1}


# --- plan and command


def test_a_plan_writes_nothing_and_knows_what_is_left(images, tmp_path):
    (images / "bad.png").write_bytes(b"no image")
    run(images, tmp_path / "out", QUICK, limit=3)
    before = sorted(os.listdir(tmp_path / "out"))
    planned = plan(images, tmp_path / "out", QUICK, batch_size=2)
    assert sorted(os.listdir(tmp_path / "out")) == before
    assert (planned.items, planned.finished, planned.failed, planned.to_do) == (6, 2, 1, 3)
    assert plan(images, tmp_path / "out", QUICK, retry_failed=True).to_do == 4
    assert planned.sampled == 3 and planned.seconds == pytest.approx(3 * planned.seconds_per_item)
    assert planned.chunk == 3 and 2800 < planned.bytes < 6000
    assert not (tmp_path / "new").exists() and plan(images, tmp_path / "new", QUICK).to_do == 6
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_planned_bytes_are_about_those_written(images, tmp_path):
    for k in range(40):
        shutil.copy(EXAMPLES[k % 20], images / f"{k:04d}.png")
    planned = plan(images, tmp_path / "out", QUICK)
    run(images, tmp_path / "out", QUICK)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert planned.bytes == pytest.approx(written, rel=0.3)


def test_the_longest_chunk_and_the_shortest(images, tmp_path):
    assert plan(images, tmp_path / "out", QUICK).chunk == 5
    assert plan(images, tmp_path / "out", QUICK, batch_size=2, chunk=3).chunk == 3
    for name in ("batch_size", "chunk", "limit"):
        with pytest.raises(ValueError, match=f"`{name}` has to be"):
            plan(images, tmp_path / "out", QUICK, **{name: 0})


@pytest.fixture
def command(images, tmp_path, capsys):
    def command(*arguments, source=images, out="out"):
        quick = ["--effort", "paper", "--steps", "2", "--prompt-len", "2"]
        quick = [] if "score" in arguments else quick
        given = ["batch", str(source), str(tmp_path / out), *quick, *arguments]
        try:
            status = pez_core.cli.main(given)
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr()

    return command


@pytest.mark.slow
def test_the_command_prints_the_summary(command, images, tmp_path):
    (images / "bad.png").write_bytes(b"no image")
    status, done = command("--limit", "3")
    assert status == 1
    assert done.out.startswith("3 items: 2 found, 1 with errors; ")
    assert done.out.endswith("\n  1  UnidentifiedImageError\n")
    status, done = command("--json")
    summary = json.loads(done.out)
    assert status == 1 and (summary["found"], summary["finished_before"]) == (5, 3)
    (images / "bad.png").write_bytes(picture())
    status, done = command("--retry-failed")
    assert status == 0 and done.out.startswith("6 items: 6 found, 5 of them before; ")


def test_a_dry_run(command, tmp_path):
    status, done = command("--dry-run")
    assert status == 0 and not (tmp_path / "out").exists()
    first, second, third = done.out.splitlines()
    assert first == "5 items: 5 to do, 0 finished, 0 with errors"
    assert second == "1 worker, 16 items side by side, files of 5"
    assert third.split(",")[0].endswith(" s per item (measured on 5)")
    assert json.loads(command("--dry-run", "--json")[1].out)["to_do"] == 5


def test_the_command_in_a_log_prints_its_progress(command, monkeypatch):
    monkeypatch.setattr(show, "LOG_EVERY", 0)
    _, done = command("--batch-size", "2", "--chunk", "2")
    lines = done.err.splitlines()
    assert lines[0] == "pez: 0 of 5, first items"
    assert lines[-1].startswith("pez: 5 of 5, ") and lines[-1].endswith(" items/s, 0 s left")


# option -> its value and other arguments, what it changes, and what this then is
def option(name):
    return lambda run: getattr(run.job.options, name)


def field(name):
    return lambda run: getattr(run.job, name)


def setting(name):
    return lambda run: run.settings[name]


def words(run):
    return {word for (word,) in run.job.options.allowed.lexicon(run.clip).phrases}


def tokens(*texts):
    return lambda run: {run.clip.text.words.encode(text)[0] for text in texts}


EFFECTS = {
    "--task": (["score"], field("task"), "score"),
    "--image-column": (["a"], lambda run: run.settings["columns"].image, "a"),
    "--prompt-column": (["a"], lambda run: run.settings["columns"].prompt, "a"),
    "--id-column": (["a"], lambda run: run.settings["columns"].id, "a"),
    "--limit": (["3"], setting("limit"), 3),
    "--shuffle": ([], setting("shuffle"), True),
    "--retry-failed": ([], setting("retry_failed"), True),
    "--dry-run": ([], lambda run: run.called, "plan"),
    "--ray": ([], lambda run: run.settings["cluster"] is not None, True),
    "--address": (["auto", "--ray"], lambda run: run.cluster("address"), "auto"),
    "--workers": (["3", "--ray"], lambda run: run.cluster("workers"), 3),
    "--cpus-per-worker": (["2", "--ray"], lambda run: run.cluster("cpus"), 2),
    "--gpus-per-worker": (["0.5", "--ray"], lambda run: run.cluster("gpus"), 0.5),
    "--batch-size": (["4"], setting("batch_size"), 4),
    "--chunk": (["8"], setting("chunk"), 8),
    "--prompt-len": (["5"], option("prompt_len"), 5),
    "--effort": (["fast"], option("effort"), "fast"),
    "--steps": (["7"], option("steps"), 7),
    "--swaps": (["9", "--effort", "fast"], option("swaps"), 9),
    "--restarts": (["3"], option("restarts"), 3),
    "--seed": (["5"], option("seed"), 5),
    "--fit": (["pad"], option("fit"), "pad"),
    "--wording": (["tags"], option("wording"), "tags"),
    "--readability": (["0.5", "--effort", "fast"], option("readability"), 0.5),
    "--language-model": (
        ["x", "--readability", "1", "--effort", "fast"],
        field("language_model"),
        "x",
    ),
    "--ratio": (["0.5", "--task", "distill"], field("ratio"), 0.5),
    "--caption": (["a {}"], field("caption"), "a {}"),
    "--captions": ([], field("captions"), True),
    "--captioner": (["x"], field("captioner"), "x"),
    "--prune-caption": (["--captioner", "x"], field("prune_caption"), True),
    "--start-from": (["a dog"], option("start_from"), "a dog"),
    "--avoid": (["dog", "--avoid", "cat"], field("avoid"), ("dog", "cat")),
    "--avoid-weight": (["2"], field("avoid_weight"), 2),
    "--only": (["{only}"], lambda run: words(run) == tokens("dog", "cat")(run), True),
    "--block": (["dog"], lambda run: tokens("dog")(run) <= words(run), False),
    "--block-list": (["{only}"], lambda run: tokens("dog")(run) <= words(run), False),
    "--allow-unsafe": ([], option("block_unsafe"), False),
    "--repeats": ([], option("repeats"), True),
    "--all-words": ([], lambda run: run.job.options.vocabulary is None, False),
    "--ascii": ([], lambda run: "ascii_only" in str(run.job.options.vocabulary), True),
    "--vocabulary": (["{rules}"], lambda run: words(run) == tokens("fish")(run), True),
    "--clip": (["a", "--clip", "b"], field("clip"), ("a", "b")),
    "--clip-weight": (["2", "--clip-weight", "1"], field("clip_weights"), (2, 1)),
    "--activation": (["gelu"], field("activation"), "gelu"),
    "--device": (["mps"], setting("device"), "mps"),
    "--download": ([], setting("download"), True),
    "--json": ([], lambda run: run.out.startswith("{"), True),
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for action in build_parser()._subparsers._group_actions[0].choices["batch"]._actions
        for name in action.option_strings
        if name not in ("-h", "--help")
    ],
)
def test_every_option_has_its_effect(name, capsys, tmp_path, monkeypatch, emoji_clip):
    (tmp_path / "only").write_text("dog\ncat\n")
    Vocabulary(only=["fish"]).save(tmp_path / "rules")
    calls = []

    def stub(called, result):
        def call(source, out, job, callback=None, **settings):
            calls.append(SimpleNamespace(called=called, job=job, settings=settings))
            return result

        monkeypatch.setattr(pez_core.batch, called, call)

    stub("run", Summary(1, 0, 1, {}, 0, 1.0, False))
    stub("plan", BatchPlan(1, 0, 0, 1, 1, 1, 1, 0, 0.0, 0.0, 0))

    def effect_of(*arguments):
        assert pez_core.cli.main(["batch", "source", "out", *arguments]) == 0
        done = calls.pop()
        cluster = done.settings["cluster"]
        done.cluster = lambda name: getattr(cluster, name) if cluster else None
        done.out, done.clip = capsys.readouterr().out, emoji_clip
        return effect(done)

    given, effect, expected = EFFECTS[name]
    paths = {"{only}": str(tmp_path / "only"), "{rules}": str(tmp_path / "rules")}
    given = [paths.get(part, part) for part in given]
    assert effect_of() != expected
    assert effect_of(name, *given) == expected


def test_the_options_of_the_run_reach_the_worker(images, tmp_path, loads, monkeypatch):
    sizes, search = [], Worker._search
    monkeypatch.setattr(
        Worker, "_search", lambda self, group: sizes.append(len(group)) or search(self, group)
    )
    job = Job(options=PAPER, clip=["emoji-clip"])
    run(images, tmp_path / "out", job, batch_size=2, device="cpu", download=True)
    assert sizes == [2, 2, 1]
    (load,) = loads
    assert (load.device, load.download, load.weights) == ("cpu", True, None)
    assert load.activation is None


@pytest.mark.parametrize("task", ["invert", "score"])
def test_images_of_a_batch_are_read_as_fit_says(task, tmp_path, emoji_clip):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 90, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    features = {fit: emoji_clip.encode_images([picture], fit) for fit in ("crop", "stretch")}
    assert (features["crop"] * features["stretch"]).sum() < 0.99
    for fit, expected in features.items():
        worker = Worker(Job(task=task, options=SearchOptions(fit=fit)), device="cpu")
        item = {"problem": None, "offset": None, "path": str(tmp_path / "a.png")}
        torch.testing.assert_close(worker._read(item), expected)
    with pytest.raises(ArgumentError, match="`activation` has to be one of"):
        Job(activation="relu")


def test_a_worker_loads_a_language_model_where_the_bundled_one_does_not_serve(monkeypatch):
    loaded, lm = [], make_lm()

    def load(path=None, **options):
        loaded.append(path)
        return lm

    for module in (worker_module, priors):
        monkeypatch.setattr(module, "load_language_model", load)
    free, fluent, tags = ({}, {"readability": 0.5}, {"wording": "tags"})

    def model_of(options, path=None):
        job = Job(options=SearchOptions(**options), language_model=path)
        return Worker(job, device="cpu")._options.language_model

    assert [model_of(options) for options in (free, fluent, tags)] == [None] * 3 and not loaded
    assert [model_of(options, "x") for options in (free, fluent, tags)] == [None, lm, lm]
    monkeypatch.setattr(priors, "reads_like_clip", lambda words: False)
    assert [model_of(options) for options in (free, fluent, tags)] == [None, lm, None]
    assert loaded == ["x", "x", None]


@pytest.mark.slow
def test_a_wording_reaches_the_prompt(images, tmp_path, emoji_clip):
    options = SearchOptions(prompt_len=3, effort="fast", swaps=2, wording="tags")
    job = Job(options=options)
    run(images, tmp_path / "out", job, limit=1)
    ((item, row),) = read(tmp_path / "out").items()
    (alone,) = invert(emoji_clip, images / item, replace(options, seed=job.seed_of(item)))
    assert row["prompt"] == alone.prompt


def test_steering_reaches_the_prompt(images, tmp_path, emoji_clip):
    vocabulary = Vocabulary(only=["dog", "cat", "sexy"])
    options = replace(PAPER, vocabulary=vocabulary, start_from="dog")
    job = Job(options=options, caption="a {} here", avoid=["dog"], avoid_weight=3)
    run(images, tmp_path / "out", job, limit=1)
    ((item, row),) = read(tmp_path / "out").items()
    seeded = replace(options, seed=job.seed_of(item))
    avoid = pez_core.Avoid(["dog"], 3)
    (alone,) = invert(emoji_clip, images / item, seeded, caption="a {} here", avoid=avoid)
    assert row["prompt"] == alone.prompt
    assert set(row["prompt"].split()) <= {"a", "here", "dog", "cat"}


TEXTS = {0: "The image shows an anchor.", 1: "**Caption:** a big red boat, " + "a red sky, " * 40}


@pytest.fixture
def captioner(monkeypatch):
    """A captioner in the place of any, which counts its loads; the third image has no caption."""
    pictures = [load_image(path).tobytes() for path in EXAMPLES]
    loads = []

    def load(name, device=None, download=False):
        loads.append((name, str(device), download))

        def write(image):
            at = image.tobytes()
            if at == pictures[2]:
                raise RuntimeError("out of order")
            return TEXTS.get(pictures.index(at), "{}") if at in pictures else "a grey square"

        return write

    monkeypatch.setattr(worker_module, "load_captioner", load)
    return loads


@pytest.mark.parametrize("batch_size", [None, 3])
def test_each_image_of_a_batch_has_the_caption_of_the_captioner(
    images, tmp_path, emoji_clip, captioner, batch_size
):
    job = Job(options=PAPER, captioner="x", avoid=["dog"])
    summary = run(images, tmp_path / "out", job, batch_size=batch_size, download=True)
    assert captioner == [("x", "cpu", True)]
    assert (summary.found, summary.errors) == (4, {"RuntimeError": 1})
    rows = read(tmp_path / "out")
    for k, item in enumerate(names(2)):
        options = replace(PAPER, seed=job.seed_of(item))
        caption, remark = prepare_caption(emoji_clip, TEXTS[k], options)
        avoid = pez_core.Avoid(["dog"], 0.5)
        (alone,) = invert(emoji_clip, images / item, options, caption=caption, avoid=avoid)
        assert rows[item]["prompt"] == alone.prompt
        assert rows[item]["caption"] + ", {}" == caption
        assert rows[item]["note"] == (remark or None) and bool(remark) == (k == 1)
    failed, empty = rows[names()[2]], rows[names()[3]]
    assert failed["error"] == "RuntimeError: out of order" and failed["caption"] is None
    assert empty["caption"] == "" and empty["prompt"] and empty["note"] is None


def test_a_batch_with_a_captioner_resumes_and_prunes(images, tmp_path, emoji_clip, captioner):
    job = Job(options=PAPER, captioner="x", prune_caption=True)
    run(images, tmp_path / "out", job, limit=1)
    with pytest.raises(ArgumentError, match="prune_caption: True there, False now"):
        run(images, tmp_path / "out", replace(job, prune_caption=False))
    assert run(images, tmp_path / "out", job, limit=2).finished_before == 1
    assert len(captioner) == 2  # one for each run
    item = names()[0]
    caption, _ = prepare_caption(emoji_clip, TEXTS[0], PAPER, images / item)
    row = read(tmp_path / "out")[item]
    assert row["caption"] + ", {}" == caption and row["caption"] in ("an", "anchor", "an anchor")
    assert pickle.loads(pickle.dumps(job)) == job


@pytest.mark.parametrize("prune", [False, True])
def test_captions_beside_the_images_are_continued(images, tmp_path, emoji_clip, prune):
    texts = ["The image shows an anchor {} here.", "a big red boat, " * 30, "{} and {}"]
    for name, text in zip(names(3), texts, strict=True):
        (images / name).with_suffix(".txt").write_text(text)
    job = Job(options=PAPER, captions=True, prune_caption=prune)
    summary = run(images, tmp_path / "out", job)
    assert (summary.found, summary.errors) == (2, {"ValueError": 1, "NoPrompt": 2})
    rows = read(tmp_path / "out")
    for name, text in zip(names(2), texts, strict=False):
        target = images / name if prune else None
        caption, remark = prepare_caption(emoji_clip, text, PAPER, target)
        before, behind = caption.split("{}")
        assert rows[name]["prompt"].startswith(before) and rows[name]["prompt"].endswith(behind)
        assert rows[name]["note"] == (remark or None)
    assert "the caption has to hold {} once at most" in rows[names()[2]]["error"]


def test_captions_of_a_table_are_continued(images, tmp_path):
    table = f"file_name,caption\n{names()[0]},a red anchor\n"
    (images / "table.csv").write_text(table)
    assert run(images / "table.csv", tmp_path / "out", Job(options=PAPER, captions=True)).found == 1
    (row,) = read(tmp_path / "out").values()
    assert row["caption"] == "a red anchor" and row["prompt"].startswith("a red anchor, ")


def test_a_captioner_that_is_not_there_is_an_error_of_the_run(command):
    status, done = command("--captioner", "some/model")
    assert status == 2 and "--captioner is 'some/model', which is not on this disk" in done.err
    status, done = command("--captioner", "x", "--caption", "a dog")
    assert status == 2 and "--captioner cannot be combined with --caption" in done.err


def test_a_captioner_that_writes_nothing_is_an_error_of_the_run(images, tmp_path, monkeypatch):
    def write(image):
        raise ArgumentError("name_or_path", "is 'x', which writes no caption")

    monkeypatch.setattr(worker_module, "load_captioner", lambda *_, **__: write)
    with pytest.raises(ArgumentError, match="`captioner` is 'x', which writes no caption"):
        run(images, tmp_path / "out", Job(options=PAPER, captioner="x"))


def test_a_note_on_a_long_caption_is_in_its_row(images, tmp_path):
    run(images, tmp_path / "out", Job(options=PAPER, caption="a red boat " * 30), limit=1)
    (row,) = read(tmp_path / "out").values()
    assert "It is encoded in 2 parts" in row["note"] and row["caption"] is None


def test_the_tasks_of_the_command_are_those_of_a_job():
    assert set(command_module.TASKS) == set(job_module.NEEDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "--workers requires --ray; add it"),
        (["--address", "auto"], "--address requires --ray; add it"),
        (["--task", "distill", "--caption", "a {}"], "--caption is given, but task 'distill'"),
        (["--limit", "0"], "--limit has to be at least 1"),
        (["--batch-size", "0"], "--batch-size has to be at least 1"),
        (["--clip", "nothing-here"], "nothing-here"),
        (["--language-model", "x"], "--language-model requires --readability above 0"),
        (["--avoid", str(EXAMPLES[0])], "a batch can avoid only texts"),
        (["--task", "score", "--allow-unsafe"], "--allow-unsafe is given, but task 'score'"),
        (["--image-column", "a"], None),
    ],
)
def test_usage_errors(command, arguments, message):
    status, done = command(*arguments)
    if message is None:  # no table, no use for the name of a column
        assert status == 0
        return
    assert status == 2 and message in done.err and "`" not in done.err.replace("`name`", "")


def test_errors_name_their_file(command, tmp_path):
    for name, message in [("gone", "gone' does not exist"), ("*.nothing", "matches no file")]:
        status, done = command(source=tmp_path / name)
        assert status == 2 and f"SOURCE '{tmp_path / name}'" in done.err and message in done.err
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    status, done = command(source=tmp_path / "t.csv")
    assert status == 2 and f"'{tmp_path / 't.csv'}' has none of the columns" in done.err
    assert "--image-column" in done.err
    status, done = command("--image-column", "c", source=tmp_path / "t.csv")
    assert status == 2 and f"--image-column is 'c', but '{tmp_path / 't.csv'}' has" in done.err


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_settings_that_cannot_be_read_name_their_file(command, images, tmp_path, text):
    command()
    (tmp_path / "out" / "_settings.json").write_text(text)
    status, done = command()
    assert status == 2 and "_settings.json" in done.err and "Traceback" not in done.err


def test_a_damaged_file_of_results_is_named(command, tmp_path):
    command()
    (file,) = (tmp_path / "out").glob("part-*")
    file.write_bytes(file.read_bytes()[:-20])
    status, done = command()
    assert status == 2 and str(file) in done.err and "remove this file" in done.err


def test_a_full_disk_names_its_file(command, tmp_path, monkeypatch):
    sync = os.fsync

    def full(number):
        if len(os.listdir(tmp_path / "out")) > 2:  # the settings and the lock are there
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    status, done = command()
    assert status == 2 and "No space left on device" in done.err and ".parquet" in done.err


@pytest.mark.parametrize("missing", ["pyarrow", "filelock", "ray"])
def test_packages_that_are_missing_are_named(command, monkeypatch, missing):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, missing, None)
    if missing != "ray":
        for name in [name for name in modules if name.startswith("pez_core.batch")]:
            monkeypatch.delitem(modules, name)
        monkeypatch.delattr(pez_core, "batch")
    status, done = command("--ray")
    extra = "ray" if missing == "ray" else "batch"
    assert status == 2 and missing in done.err and f"install the extra `{extra}`" in done.err


def test_images_are_read_while_others_are_searched(images, monkeypatch):
    """The second image waits to be read until the search of the first one has begun."""
    worker, began = Worker(QUICK, batch_size=1), threading.Event()
    read, search, counts = worker._read, worker._search, Counter()

    def reading(item):
        counts["read"] += 1
        assert counts["read"] == 1 or began.wait(20)
        return read(item)

    def searching(group):
        began.set()
        counts["searched"] += 1
        assert counts["read"] - counts["searched"] <= 2  # nor are all of them held
        return search(group)

    monkeypatch.setattr(worker, "_read", reading)
    monkeypatch.setattr(worker, "_search", searching)
    rows = [row for some in worker.rows(find_items(images).to_pylist()) for row in some]
    assert [row["error"] for row in rows] == [None] * 5
    assert counts == {"read": 5, "searched": 5}
