"""Whole datasets on Ray: workers and the driver die, and the rows are those of one process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import EXAMPLES, ROOT
from test_captions import write_blip

from pez_core import SearchOptions, Vocabulary
from pez_core.batch import Cluster, Job, run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc"),
]

OPTIONS = SearchOptions(
    effort="fast",
    steps=6,
    swaps=6,
    prompt_len=3,
    vocabulary=Vocabulary() & Vocabulary(block=["dog"], whole_words=False),
)
JOB = Job(options=OPTIONS, avoid=["a cat"])
TWO = Cluster(workers=2)
COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for k in range(COUNT - 1):
        shutil.copy(EXAMPLES[k], folder / f"{k:02d}.png")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected")
    run(images, out, JOB)
    return prompts(out)


def prompts(out):
    rows = pq.read_table(out).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: (row["prompt"], row["token_ids"], row["error"]) for row in rows}


def actors():
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return sorted(found)


def test_two_workers_find_what_one_process_finds(images, tmp_path, expected):
    reports = []
    summary = run(images, tmp_path / "out", JOB, reports.append, cluster=TWO, chunk=3)
    assert (summary.found, summary.errors) == (COUNT - 1, {"UnidentifiedImageError": 1})
    assert prompts(tmp_path / "out") == expected
    assert [report["done"] for report in reports] == list(range(0, COUNT + 1, 3))
    assert reports[-1]["failed"] == 1


def test_each_worker_has_the_captioner(images, tmp_path):
    write_blip(tmp_path / "blip")
    options = SearchOptions(effort="fast", steps=2, swaps=2, prompt_len=2)
    job = Job(options=options, captioner=str(tmp_path / "blip"), prune_caption=True)
    found = []
    for cluster in (None, TWO):
        out = tmp_path / f"out{len(found)}"
        run(images, out, job, limit=6, cluster=cluster, device="cpu", chunk=2)
        rows = pq.read_table(out).to_pylist()
        found.append({row["id"]: (row["prompt"], row["caption"], row["note"]) for row in rows})
    assert found[0] == found[1] and len(found[0]) == 6
    assert all(prompt.startswith(caption) for prompt, caption, _ in found[0].values())
    assert sum(bool(caption) for _, caption, _ in found[0].values()) > 3


def test_a_worker_that_is_killed_costs_nothing(images, tmp_path, expected):
    killed = []

    def kill(report):
        if report["done"] and not killed:
            killed.extend(actors()[:1])
            os.kill(killed[0], signal.SIGKILL)

    summary = run(images, tmp_path / "out", JOB, kill, cluster=TWO, chunk=2)
    assert killed and summary.found == COUNT - 1
    assert prompts(tmp_path / "out") == expected


def test_a_driver_that_is_killed_goes_on_where_it_was(ray, images, tmp_path, expected):
    """It has joined a cluster, which outlives it and so do its workers for a moment."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pez_core", "batch", str(images), str(out), "--ray"]
    command += ["--effort", "fast", "--steps", "6", "--swaps", "6", "--prompt-len", "3"]
    command += ["--avoid", "a cat", "--block", "dog"]
    command += ["--workers", "2", "--chunk", "1"]
    command += ["--address", ray.get_runtime_context().gcs_address]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(list(out.glob("part-*"))) < 3 and driver.poll() is None:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    there = {
        path: path.stat().st_mtime_ns for path in out.glob("part-*") if path.stat().st_size > 0
    }
    assert len(there) >= 3  # a fast driver may write more before it is killed
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1, again.stderr  # there is a bad image
    assert f"{COUNT} items: {COUNT - 1} found, 1 with errors" in again.stdout
    assert prompts(out) == expected
    for path, written in there.items():  # not done twice
        assert path.stat().st_mtime_ns == written


def test_an_item_that_kills_its_worker_has_an_error_and_the_others_are_found(
    images, tmp_path, expected
):
    class Deadly(Job):  # defined here, so that it travels to the workers as it is
        def seed_of(self, item):
            if item in ("05.png", "06.png"):
                os._exit(1)
            return super().seed_of(item)

    job = Deadly(options=OPTIONS, avoid=["a cat"])
    summary = run(images, tmp_path / "out", job, cluster=TWO, chunk=4)
    assert (summary.found, summary.missing) == (COUNT - 3, 0)
    assert summary.errors == {"WorkerDied": 2, "UnidentifiedImageError": 1}
    found = prompts(tmp_path / "out")
    for item in ("05.png", "06.png"):
        assert found.pop(item)[2].startswith("WorkerDied: ")
    assert found == {item: row for item, row in expected.items() if item in found}


def test_errors_are_those_of_one_process(images, tmp_path):
    with pytest.raises(ValueError, match="`prompt_len` has to be from 1 to 75 but is 76"):
        run(images, tmp_path / "out", Job(options=SearchOptions(prompt_len=76)), cluster=TWO)
    with pytest.raises(ValueError, match="`workers` is 3, but the cluster has 2 CPU cores"):
        run(images, tmp_path / "out2", JOB, cluster=Cluster(workers=3))


def test_a_worker_that_cannot_write_ends_the_run(images, tmp_path):
    out = tmp_path / "out"

    def fill(report):  # as on a full disk, nothing can be written
        if report["done"] == 0:
            shutil.rmtree(out)
            out.write_text("")

    with pytest.raises(OSError, match="a worker could not write"):
        run(images, out, JOB, fill, cluster=TWO, chunk=4)


def test_a_run_on_ray_can_be_ended(images, tmp_path):
    summary = run(
        images, tmp_path / "out", JOB, lambda report: report["done"] > 0, cluster=TWO, chunk=1
    )
    assert summary.stopped and summary.found >= 1
    assert summary.found + summary.failed + summary.missing == COUNT
