"""Whole datasets in this process: what is found where, and that nothing is lost or done twice."""

import io
import json
import os
import shutil
import tarfile
import threading
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import EXAMPLES
from filelock import FileLock
from PIL import Image

from pez_core import Vocabulary, cli, distill, invert, score
from pez_core.batch import Columns, Job, find_items, plan, run
from pez_core.batch import worker as worker_module
from pez_core.batch.output import Output
from pez_core.batch.worker import Worker, failed_row
from pez_core.clip.images import load_image

QUICK = Job(steps=2, prompt_len=2)


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
    with pytest.raises(ValueError, match="no column 'path'"):
        find_items(file, "invert", Columns(image="path"))


def test_empty_cells_have_a_problem(tmp_path):
    (tmp_path / "table.csv").write_text("id,prompt\n1,a dog\n2,\n3,  \n")
    items = find_items(tmp_path / "table.csv", "distill", Columns(id="id")).to_pylist()
    assert [item["problem"] for item in items] == [None, *["EmptyCell: the row has no prompt."] * 2]


def test_an_id_counts_once(tmp_path):
    (tmp_path / "table.csv").write_text("id,prompt\n1,a dog\n2,a cat\n1,a dog\n")
    assert ids(tmp_path / "table.csv", "distill") == ["a dog", "a cat"]
    with pytest.raises(ValueError, match="id '1' twice in its column id"):
        find_items(tmp_path / "table.csv", "distill", Columns(id="id"))


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("nowhere", "invert", "does not exist"),
        ("*.bmp", "invert", "matches no file"),
        ("images", "distill", "holds nothing for distill, which takes prompt"),
    ],
)
def test_sources_that_hold_nothing(images, name, task, message):
    with pytest.raises(ValueError, match=message):
        find_items(images.parent / name, task)


# --- what a job is


def test_jobs_say_what_does_not_belong():
    with pytest.raises(ValueError, match="`task` has to be one of 'invert'"):
        Job(task="paint")
    with pytest.raises(ValueError, match=r"`template` is 'a \{\}', but task 'distill'"):
        Job(task="distill", template="a {}")
    with pytest.raises(ValueError, match="`preset` has to be one of"):
        Job(preset="quick")
    with pytest.raises(ValueError, match="`restarts`"):
        Job(restarts=0)
    assert Job() == Job(clip="emoji-clip", prompt_len=16, restarts=1)


def test_settings_are_all_that_a_result_depends_on():
    assert Job().settings == Job(preset="balanced").settings
    assert Job().settings["plan"]["refine_steps"] == 56  # in place of a name: presets may change
    assert Job().settings != Job(preset="fast").settings
    assert Job(vocabulary=Vocabulary(bank=["a", "b"])).settings["vocabulary"]["bank"] == ["a", "b"]
    assert set(Job(task="score").settings) == {"task", "clip", "clip_weights"}


def test_the_seed_of_an_item_is_its_own():
    seeds = {Job(seed=seed).seed_of(item) for seed in range(3) for item in "abc"}
    assert len(seeds) == 9 and max(seeds) < 2**48
    assert Job(preset="best").seed_of("a") == Job().seed_of("a")


# --- results


def test_a_row_is_what_invert_finds(images, tmp_path, emoji_clip):
    summary = run(images, tmp_path / "out", QUICK)
    assert (summary.items, summary.found, summary.failed, summary.missing) == (5, 5, 0, 0)
    rows = read(tmp_path / "out")
    assert sorted(rows) == sorted(names())
    row = rows[names()[1]]
    seed = QUICK.seed_of(names()[1])
    alone = invert(emoji_clip, EXAMPLES[1], 2, steps=2, seed=seed)
    assert (row["prompt"], row["token_ids"]) == (alone.prompt, alone.token_ids)
    assert row["similarity"] == pytest.approx(alone.similarity, abs=1e-6)
    assert row["seed"] == seed and row["seconds"] > 0 and row["error"] is None


def prompts(out):
    return {item: (row["prompt"], row["seed"]) for item, row in read(out).items()}


def test_neither_packing_nor_order_nor_a_second_run_changes_a_prompt(images, tmp_path):
    job = Job(preset="fast", steps=4, refine_steps=4, prompt_len=4)
    run(images, tmp_path / "all", job, at_once=5)
    expected = prompts(tmp_path / "all")
    assert len(set(expected.values())) == 5
    run(images, tmp_path / "single", job, at_once=1, chunk=2, shuffle=True)
    assert prompts(tmp_path / "single") == expected
    before = run(images, tmp_path / "twice", job, at_once=2, limit=2)
    after = run(images, tmp_path / "twice", job, at_once=3)
    assert (before.found, after.found, after.finished_before) == (2, 5, 2)
    assert prompts(tmp_path / "twice") == expected


def test_groups_are_filled_up_on_a_cpu(images, tmp_path, monkeypatch):
    search, sizes = worker_module.invert, []

    def counted(clip, features, *arguments, **options):
        sizes.append(len(features))
        return search(clip, features, *arguments, **options)

    monkeypatch.setattr(worker_module, "invert", counted)
    run(images, tmp_path / "out", QUICK, at_once=3)
    assert sizes == [1, 4, 4]  # the first is the check of the settings
    assert len(read(tmp_path / "out")) == 5


def test_finished_items_are_not_searched_again(images, tmp_path, monkeypatch):
    run(images, tmp_path / "out", QUICK)
    monkeypatch.setattr(worker_module, "load_clip", lambda *a, **k: pytest.fail("loaded"))
    assert run(images, tmp_path / "out", QUICK).finished_before == 5


def test_a_shuffled_limit_takes_what_the_seed_says(images, tmp_path):
    taken = set()
    for seed in range(6):
        job, out = Job(steps=1, prompt_len=1, seed=seed), tmp_path / str(seed)
        run(images, out, job, shuffle=True, limit=2)
        two = set(read(out))
        run(images, out, job, shuffle=True, limit=3)
        assert len(two) == 2 and two < set(read(out))
        taken.add(frozenset(two))
    assert len(taken) > 1
    run(images, tmp_path / "plain", Job(steps=1, prompt_len=1), limit=2)
    assert set(read(tmp_path / "plain")) == set(names(2))


def test_a_bad_image_is_a_row_with_its_error(images, tmp_path):
    (images / "bad.png").write_bytes(b"no image")
    (images / "empty.png").write_bytes(b"")
    reports = []
    summary = run(images, tmp_path / "out", QUICK, reports.append, at_once=2)
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


def test_whatever_a_decoder_raises_is_the_error_of_its_image(images, tmp_path):
    Image.new("RGB", (8, 8)).save(images / "odd.png", exif=b"Exif\0\0nonsense")
    with pytest.raises(SyntaxError):  # no error that one would expect
        load_image(images / "odd.png")
    assert run(images, tmp_path / "out", QUICK).errors == {"SyntaxError": 1}


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
        run(images, tmp_path / "out", QUICK, at_once=2)
    rows = read(tmp_path / "out")
    assert len(rows) == 2 and not any(row["error"] for row in rows.values())


def test_an_item_that_breaks_its_group_is_found_and_the_others_stay(images, tmp_path, monkeypatch):
    search, seed = worker_module.invert, QUICK.seed_of(names()[2])

    def failing(clip, features, *arguments, seed=0, **options):
        if isinstance(seed, list) and bad in seed:
            raise FloatingPointError("not a number")
        return search(clip, features, *arguments, seed=seed, **options)

    bad = seed
    monkeypatch.setattr(worker_module, "invert", failing)
    summary = run(images, tmp_path / "out", QUICK, at_once=5)
    assert (summary.found, summary.errors) == (4, {"FloatingPointError": 1})
    assert read(tmp_path / "out")[names()[2]]["error"] == "FloatingPointError: not a number"


def test_where_memory_ends_fewer_are_searched_at_once(images, tmp_path, monkeypatch):
    run(images, tmp_path / "room", QUICK)
    search, sizes = worker_module.invert, []

    def limited(clip, features, *arguments, **options):
        sizes.append(len(features))
        if len(features) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(clip, features, *arguments, **options)

    monkeypatch.setattr(worker_module, "invert", limited)
    assert run(images, tmp_path / "out", QUICK, at_once=5).found == 5
    assert sizes == [1, 8, 4, 4]  # the first is the check of the settings
    assert prompts(tmp_path / "out") == prompts(tmp_path / "room")


def test_as_many_items_are_searched_at_once_as_there_is_memory_for(monkeypatch):
    each = Worker(QUICK).clip.text.memory_per_prompt(2) * QUICK.plan.trials
    each /= worker_module._SHARE  # the rest is for what does not grow
    for free, items in [(None, 16), (10**12, 16), (round(7.5 * each), 7), (each // 2, 1)]:
        monkeypatch.setattr(worker_module, "_free_memory", lambda device, free=free: free)
        assert Worker(QUICK).at_once == items
    assert Worker(QUICK, at_once=3).at_once == 3


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_whatever_ends_it_what_was_found_is_kept(images, tmp_path, how):
    def end(report):
        if report["done"] >= 2:
            if how == "interrupt":
                raise KeyboardInterrupt
            return True

    if how == "stop":
        summary = run(images, tmp_path / "out", QUICK, end, at_once=1, chunk=5)
        assert summary.stopped and (summary.found, summary.missing) == (2, 3)
    else:
        with pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps it
            run(images, tmp_path / "out", QUICK, end, at_once=1, chunk=5)
        assert kept.tb
    assert len(read(tmp_path / "out")) == 2
    assert run(images, tmp_path / "out", QUICK).finished_before == 2


def test_settings_that_do_not_fit_the_clip_are_told_before_anything_is_searched(images, tmp_path):
    with pytest.raises(ValueError, match="`prompt_len` has to be from 1 to 75 but is 76"):
        run(images, tmp_path / "out", Job(prompt_len=76, steps=1))
    with pytest.raises(ValueError, match="`template` has to hold"):
        run(images, tmp_path / "out2", Job(template="no place", steps=1))
    assert not list(tmp_path.glob("out*/*.parquet"))


def test_prompts_are_distilled(tmp_path, emoji_clip):
    (tmp_path / "table.csv").write_text("prompt\na small red bird on a long green branch\n\n")
    job = Job(task="distill", prompt_len=2, steps=2, restarts=1)
    assert run(tmp_path / "table.csv", tmp_path / "out", job).found == 1
    (row,) = read(tmp_path / "out").values()
    settings = {"prompt_len": 2, "steps": 2, "restarts": 1, "seed": job.seed_of(row["id"])}
    alone = distill(emoji_clip, "a small red bird on a long green branch", **settings)
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
    job = Job(task="distill", prompt_len=1, steps=1, restarts=1)
    run(tmp_path / "t.csv", tmp_path / "texts", job, columns=Columns(prompt="a"))
    with pytest.raises(ValueError, match=r"columns: .*'a'.* there, .*'b'.* now"):
        run(tmp_path / "t.csv", tmp_path / "texts", job, columns=Columns(prompt="b"))


def test_other_settings_are_refused_with_the_difference(images, tmp_path):
    run(images, tmp_path / "out", QUICK)
    before = sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"prompt_len: 2 there, 3 now\n  template: '\{\}' there"):
        run(images, tmp_path / "out", Job(steps=2, prompt_len=3, template="a {}"))
    with pytest.raises(ValueError, match="other settings"):
        plan(images, tmp_path / "out", Job())
    assert sorted(os.listdir(tmp_path / "out")) == before


def test_a_folder_with_something_else_is_left_alone(images, tmp_path):
    with pytest.raises(ValueError, match="holds other files, such as"):
        run(images, images, QUICK)
    assert "_lock" not in os.listdir(images)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        run(images, images / names()[0], QUICK)


def test_two_runs_do_not_write_at_once(images, tmp_path):
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
    planned = plan(images, tmp_path / "out", QUICK, at_once=2)
    assert sorted(os.listdir(tmp_path / "out")) == before
    assert (planned.items, planned.finished, planned.failed, planned.to_do) == (6, 2, 1, 3)
    assert plan(images, tmp_path / "out", QUICK, retry_failed=True).to_do == 4
    assert planned.sampled == 3 and planned.seconds == pytest.approx(3 * planned.seconds_per_item)
    assert planned.chunk == 3 and 2800 < planned.bytes < 6000
    assert not (tmp_path / "new").exists() and plan(images, tmp_path / "new", QUICK).to_do == 6
    assert not (tmp_path / "new").exists()


def test_planned_bytes_are_about_those_written(images, tmp_path):
    for k in range(40):
        shutil.copy(EXAMPLES[k % 20], images / f"{k:04d}.png")
    planned = plan(images, tmp_path / "out", QUICK)
    run(images, tmp_path / "out", QUICK)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert planned.bytes == pytest.approx(written, rel=0.3)


def test_the_longest_chunk_and_the_shortest(images, tmp_path):
    assert plan(images, tmp_path / "out", QUICK).chunk == 5
    assert plan(images, tmp_path / "out", QUICK, at_once=2, chunk=3).chunk == 3
    for name in ("at_once", "chunk", "limit"):
        with pytest.raises(ValueError, match=f"`{name}` has to be"):
            plan(images, tmp_path / "out", QUICK, **{name: 0})


@pytest.fixture
def command(images, tmp_path, capsys):
    def command(*arguments, out="out"):
        quick = ["--steps", "2", "--prompt-len", "2"]
        status = cli.main(["batch", str(images), str(tmp_path / out), *quick, *arguments])
        return status, capsys.readouterr()

    return command


def test_the_command_says_what_it_found(command, images, tmp_path):
    (images / "bad.png").write_bytes(b"no image")
    status, said = command("--limit", "3")
    assert status == 1
    assert said.out.startswith("3 items: 2 found, 1 with errors; ")
    assert said.out.endswith("\n  1  UnidentifiedImageError\n")
    status, said = command("--json")
    summary = json.loads(said.out)
    assert status == 1 and (summary["found"], summary["finished_before"]) == (5, 3)
    (images / "bad.png").write_bytes(picture())
    status, said = command("--retry-failed")
    assert status == 0 and said.out.startswith("6 items: 6 found, 5 of them before; ")


def test_a_dry_run(command, tmp_path):
    status, said = command("--dry-run")
    assert status == 0 and not (tmp_path / "out").exists()
    first, second, third = said.out.splitlines()
    assert first == "5 items: 5 to do, 0 finished, 0 with errors"
    assert second == "1 worker, 16 items at once, files of 5"
    assert third.split(",")[0].endswith(" s per item (5 were searched to tell)")
    assert json.loads(command("--dry-run", "--json")[1].out)["to_do"] == 5


def test_the_command_in_a_log_says_how_far_it_is(command, monkeypatch):
    monkeypatch.setattr(cli, "_LOG_EVERY", 0)
    _, said = command("--at-once", "2", "--chunk", "2")
    lines = said.err.splitlines()
    assert lines[0] == "pez: 0 of 5, first items"
    assert lines[-1].startswith("pez: 5 of 5, ") and lines[-1].endswith(" items/s, 0 s left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "and --gpus-per-worker belong to --ray"),
        (["--address", "auto"], "--address has nothing to say without --ray"),
        (["--task", "distill", "--template", "a {}"], "task 'distill' has no use for it"),
        (["--limit", "0"], "`limit` has to be"),
        (["--clip", "nothing-here"], "nothing-here"),
    ],
)
def test_usage_errors(command, arguments, message):
    status, said = command(*arguments)
    assert status == 2 and message in said.err


def test_without_ray_it_says_what_to_install(command, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    status, said = command("--ray")
    assert status == 2 and "install the extra `ray`" in said.err


def test_images_are_read_while_others_are_searched(images, monkeypatch):
    """The second image waits to be read until the search of the first one has begun."""
    worker, began = Worker(QUICK, at_once=1), threading.Event()
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
