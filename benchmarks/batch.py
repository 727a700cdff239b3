"""A whole dataset: the cost of an image, the cost of Ray, and recovery from kills.

    python benchmarks/batch.py [--count 2000] [--out benchmarks/results/batch]

Needs the extra `batch` and the drawings of `tools/emoji_data.py`. It runs the command `pez batch`,
each time in a process of its own: 250, 500, 1,000 and all the images in one process of one thread,
as the workers have; a quarter of them on two Ray workers and, for comparison, in two plain
processes with half of them each; and all of them on Ray while a worker is killed with SIGKILL
midway, then the driver, which is started again. Nothing else should run on the machine. For numbers
of clusters, the operations that one driver does for all machines are timed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from step_time import machine

from pez_core.batch import find_items
from pez_core.batch.output import Output

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tools"))

from emoji_data import prepare  # noqa: E402

SEARCH = ["--effort", "fast", "--prompt-len", "8", "--allow-unsafe"]
CLUSTER = {"gpus": 64, "items": 10_000_000, "seconds": 0.5}
LISTED, ROWS_PER_FILE, FILES = 100_000, 256, 4_000


def _images(work: Path, count: int) -> Path:
    folder = work / "images"
    folder.mkdir()
    drawings, pixels = prepare(ROOT / "build/emoji")
    for k in random.Random(0).sample(range(len(drawings)), count):
        rgba = Image.fromarray(pixels[k])
        white = Image.new("RGBA", rgba.size, "white")
        picture = Image.alpha_composite(white, rgba).convert("RGB").resize((224, 224))
        picture.save(folder / f"{k:05d}.png")
    return folder


def start(images: Path, out: Path, *flags: str, threads: int | None = None) -> subprocess.Popen:
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "pez_core", "batch", str(images), str(out), *SEARCH, *flags]
    return subprocess.Popen(
        [*command, "--json"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[dict, float]:
    """Its JSON output, and its peak memory in MB."""
    memory, status = 0.0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:  # the operating system's own sum contains that of the parent
        lines = status.read_text().splitlines() if status.exists() else []
        peak = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
        memory = max([memory, *(kilobytes / 1024 for kilobytes in peak)])
        time.sleep(0.1)
    printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"pez batch ended with {process.returncode}: {printed}")
    return json.loads(printed), memory


def timed(images: Path, out: Path, *flags: str, threads: int | None = None) -> tuple[float, float]:
    """Seconds and MB of one run that finds a prompt for every image."""
    began = time.perf_counter()
    summary, memory = finish(start(images, out, *flags, threads=threads))
    if summary["missing"] or summary["errors"]:
        raise SystemExit(f"not every image has a prompt: {summary}")
    return time.perf_counter() - began, memory


def rows(out: Path) -> dict[str, tuple[str, int]]:
    found = pq.read_table(out).to_pylist()
    unique = {row["id"]: (row["prompt"], row["seed"]) for row in found}
    if len(unique) != len(found):
        raise SystemExit(f"{out} has rows twice.")
    return unique


def cost_by_size(images: Path, work: Path, sizes: list[int]) -> list[dict]:
    """Seconds per image in one process, without the first one, which includes the start."""
    first, _ = timed(images, work / "one", "--limit", "1", threads=1)
    table = [{"images": 1, "seconds": first}]
    for size in sizes:
        seconds, memory = timed(images, work / f"of-{size}", "--limit", str(size), threads=1)
        each = (seconds - first) / (size - 1)
        table.append({"images": size, "seconds": seconds, "each": each, "memory": memory})
        print(table[-1], file=sys.stderr)
    return table


def cost_of_ray(images: Path, work: Path, count: int) -> dict:
    """Two workers on Ray beside two plain processes, each with half the images and one thread."""
    halves = [work / "half-0", work / "half-1"]
    for half in halves:
        half.mkdir()
    for k, path in enumerate(sorted(images.iterdir())[:count]):
        shutil.copy(path, halves[k % 2])

    def plain(limit: int) -> float:
        began = time.perf_counter()
        out = [work / f"plain-{limit}-{k}" for k in range(2)]
        both = [
            start(half, folder, "--limit", str(limit), threads=1)
            for half, folder in zip(halves, out, strict=True)
        ]
        for process in both:
            finish(process)
        return time.perf_counter() - began

    def on_ray(limit: int) -> float:
        flags = ["--ray", "--workers", "2", "--limit", str(limit)]
        return timed(images, work / f"ray-{limit}", *flags)[0]

    found = {"images": count, "plain start": plain(1), "ray start": on_ray(2)}
    found |= {"plain": plain(count // 2), "ray": on_ray(count)}
    for name in ("plain", "ray"):
        found[f"{name} each"] = (found[name] - found[f"{name} start"]) / (count - 2)
    print(found, file=sys.stderr)
    return found


def with_kills(images: Path, out: Path, count: int) -> dict:
    """A worker is killed after a third of the images, the driver after two."""
    began = time.perf_counter()
    driver = start(images, out, "--ray", "--workers", "2")

    def wait_for(share: float) -> int:
        while True:
            done = sum(pq.read_metadata(path).num_rows for path in out.glob("part-*.parquet"))
            if done >= share * count:
                return done
            if driver.poll() is not None:
                raise SystemExit("the run ended before its turn")
            time.sleep(0.2)

    counts = {"worker killed at": wait_for(1 / 3)}
    os.kill(_workers()[0], signal.SIGKILL)
    counts["driver killed at"] = wait_for(2 / 3)
    driver.kill()
    driver.wait()
    summary, _ = finish(start(images, out, "--ray", "--workers", "2"))
    counts |= {"rows": len(rows(out)), "found before": summary["finished_before"]}
    return counts | {"seconds": time.perf_counter() - began}


def _workers() -> list[int]:
    return [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker")
    ]


def driver_times(work: Path) -> dict:
    """Seconds per item of listing a folder, and of reading which items are finished."""
    folder = work / "listed"
    for k in range(LISTED):
        sub = folder / f"{k // 1000:03d}"
        if k % 1000 == 0:
            sub.mkdir(parents=True)
        (sub / f"{k:06d}.png").touch()
    began = time.perf_counter()
    items = find_items(folder)
    listing = (time.perf_counter() - began) / LISTED
    tracemalloc.start()
    find_items(folder)
    peak = (tracemalloc.get_traced_memory()[1] + items.nbytes) / LISTED  # Arrow's is not traced
    tracemalloc.stop()
    output, rng = Output(work / "written"), random.Random(0)
    output.folder.mkdir()
    writing = 0.0
    for k in range(FILES):
        some = [_made_up_row(f"{k:05d}/{i:05d}.png", rng) for i in range(ROWS_PER_FILE)]
        began = time.perf_counter()
        output.write(some)
        writing += (time.perf_counter() - began) / FILES
    began = time.perf_counter()
    output.ids()
    reading = (time.perf_counter() - began) / (FILES * ROWS_PER_FILE)
    began = time.perf_counter()
    output.tidy()
    tidying = (time.perf_counter() - began) / (FILES * ROWS_PER_FILE)
    chunk = hand_out_empty_chunks()
    size = sum(path.stat().st_size for path in output.folder.iterdir()) / (FILES * ROWS_PER_FILE)
    return {
        "listing": listing,
        "item bytes": items.nbytes / LISTED,
        "peak bytes": peak,
        "writing a file": writing,
        "reading": reading,
        "tidying": tidying,
        "row bytes": size,
        "chunk": chunk,
    }


def _made_up_row(item: str, rng: random.Random) -> dict:
    ids = [rng.randrange(320, 49406) for _ in range(8)]
    prompt = " ".join(f"{i:05x}" for i in ids)
    numbers = {"similarity": rng.random(), "seed": rng.getrandbits(48), "seconds": rng.random()}
    return {"id": item, "prompt": prompt, "token_ids": ids, "error": None} | numbers


class _Nothing:
    def __call__(self, chunk: pa.Table) -> pa.Table:
        return chunk.select(["id"])


def hand_out_empty_chunks(count: int = 1000) -> float:
    """Seconds per chunk of Ray Data with workers that do nothing."""
    import ray
    import ray.data

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    chunks = [pa.table({"id": [str(i) for i in range(ROWS_PER_FILE)]}) for _ in range(count)]

    def seconds(some: list[pa.Table]) -> float:
        began = time.perf_counter()
        data = ray.data.from_arrow(some).map_batches(
            _Nothing,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=1,
        )
        for _ in data.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass
        return time.perf_counter() - began

    each = (seconds(chunks) - seconds(chunks[:2])) / (count - 2)
    ray.shutdown()
    return each


def report(found: dict) -> str:
    each = [row["each"] for row in found["sizes"][1:]]
    spread = max(each) / min(each) - 1
    ray, kills, driver = found["ray"], found["kills"], found["driver"]
    added = 2 * (ray["ray each"] - ray["plain each"])
    lines = [
        "# Whole datasets",
        "",
        f"`python benchmarks/batch.py`, {found['machine']}; bundled CLIP, `{' '.join(SEARCH)}`.",
        *([found["note"]] if "note" in found else []),
        "",
        f"**The cost of an image is flat within {spread:.1%}** from "
        f"{found['sizes'][1]['images']:,} to {found['count']:,} images, in one process with one "
        "thread:",
        "",
        "| images | seconds | seconds per image beyond the first | memory, MB |",
        "|---|---|---|---|",
        *(
            f"| {row['images']:,} | {row['seconds']:.1f} | "
            + (f"{row['each']:.3f} | {row['memory']:.0f} |" if "each" in row else "| |")
            for row in found["sizes"]
        ),
        "",
        f"**Ray adds {1000 * added:.0f} ms of a worker's time to each image "
        f"({ray['ray each'] / ray['plain each'] - 1:+.1%})** and "
        f"{ray['ray start'] - ray['plain start']:.0f} s to a start:",
        "",
        f"| {ray['images']:,} images, two workers of one core | seconds | of them start | "
        "seconds per image |",
        "|---|---|---|---|",
        *(
            f"| {what} | {ray[name]:.1f} | {ray[f'{name} start']:.1f} | {ray[f'{name} each']:.3f} |"
            for name, what in (("plain", "two processes by hand"), ("ray", "`--ray --workers 2`"))
        ),
        "",
        f"**Kills lose nothing.** {found['count']:,} images on two Ray workers; one of them got "
        f"SIGKILL when {kills['worker killed at']:,} rows were there, the driver at "
        f"{kills['driver killed at']:,}, and was started again, where it found "
        f"{kills['found before']:,}. In the end there are {kills['rows']:,} rows, none twice, in "
        f"{kills['seconds']:.0f} s; **{kills['same']:,} of {found['count']:,} prompts and seeds "
        "are those of the run in one process**, which had other batches.",
        "",
        *_cluster(driver, added, ray["ray start"]),
    ]
    return "\n".join(lines) + "\n"


def _cluster(driver: dict, added: float, start: float) -> list[str]:
    gpus, items, seconds = CLUSTER["gpus"], CLUSTER["items"], CLUSTER["seconds"]
    hours = items * seconds / gpus / 3600
    files = items / 256
    alone = items * driver["listing"]
    again = items * (2 * driver["tidying"] + 2 * driver["reading"])
    chunk = 256 * seconds
    chunks = 1 / driver["chunk"]
    return [
        f"## {gpus} GPUs and {items:,} images",
        "",
        "By arithmetic, from what one driver does here; no such cluster was at hand.",
        "",
        f"| per item, in the driver | {items:,} items |",
        "|---|---|",
        f"| listing a folder, {1e6 * driver['listing']:.1f} µs | {alone:.0f} s |",
        f"| table of items, {driver['item bytes']:.0f} bytes | "
        f"{items * driver['item bytes'] / 1e9:.1f} GB |",
        f"| memory while it is made, {driver['peak bytes']:.0f} bytes | "
        f"{items * driver['peak bytes'] / 1e9:.1f} GB |",
        f"| reading which are finished, {1e6 * driver['reading']:.2f} µs | "
        f"{items * driver['reading']:.0f} s |",
        f"| looking for rows that are there twice, {1e6 * driver['tidying']:.2f} µs | "
        f"{items * driver['tidying']:.0f} s |",
        f"| results, {driver['row bytes']:.0f} bytes | "
        f"{items * driver['row bytes'] / 1e9:.1f} GB in {files:,.0f} files |",
        "",
        f"At {seconds} s of a GPU per image (an assumption: GPU figures are not measured yet) the "
        f"searches take {hours:.0f} hours. The driver works alone for {(alone + again) / 60:.1f} "
        f"minutes of a run, {(alone + again) / 3600 / hours:.1%} of that. While the workers "
        f"search, {gpus} chunks of 256 images come every {chunk:.0f} s, {gpus / chunk:.2f} per "
        f"second; Ray Data hands out {chunks:.0f} empty chunks per second here, so that its driver "
        f"would be busy at {chunks * chunk:,.0f} GPUs. A file of 256 rows is written in "
        f"{1000 * driver['writing a file']:.0f} ms, {driver['writing a file'] / chunk:.2%} of its "
        f"search. The kill of a worker costs at most {chunk / 60:.0f} minutes of one GPU, that of "
        "the driver as much of all.",
        "",
        "Where it stops scaling: first at the storage that all machines share, which has to give "
        f"{gpus / seconds:.0f} images per second, {gpus / seconds * 0.2:.0f} MB/s at 200 kB each; "
        "then, at some ten times as many items, at the memory of the driver, which lists all of "
        "them: split the source, an OUT for each part. A driver reads the headers of tars one "
        "after another, so that very many are better listed in parts, too.",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="images (2000)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument(
        "--again", action="store_true", help="time these sizes and the driver again, keep the rest"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results/batch")
    arguments = parser.parse_args(argv)
    kept = arguments.out.with_suffix(".json")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.again:
            found = json.loads(kept.read_text())
            work = Path(folder)
            found["driver"] = driver_times(work)
            images = _images(work, arguments.count)
            new = {row["images"]: row for row in cost_by_size(images, work, arguments.sizes)[1:]}
            found["sizes"] = [new.get(row["images"], row) for row in found["sizes"]]
        else:
            found = measure(Path(folder), arguments.count, arguments.sizes)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(report(found))


def measure(work: Path, count: int, sizes: list[int]) -> dict:
    images = _images(work, count)
    found = {"machine": machine(), "count": count}
    found["driver"] = driver_times(work)
    print(found["driver"], file=sys.stderr)
    found["sizes"] = cost_by_size(images, work, [*sizes, count])
    found["ray"] = cost_of_ray(images, work, count // 4)
    found["kills"] = with_kills(images, work / "killed", count)
    expected = rows(work / f"of-{count}")
    again = rows(work / "killed")
    found["kills"]["same"] = sum(again.get(item) == row for item, row in expected.items())
    print(found["kills"], file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
