"""`pez batch`: a whole dataset."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..interrupts import interruptible
from .arguments import (
    add_clip,
    add_search,
    add_vocabulary,
    search_options,
)
from .learn import add_ratio, add_steering
from .show import duration, items_bar, print_json, size

if TYPE_CHECKING:
    from ..batch import BatchPlan, Cluster, Job, Summary

TASKS = ("invert", "distill", "score")
"""The tasks of `pez_core.batch.Job`."""


def add_commands(commands: Any) -> None:
    """Add `batch` to the subparsers of `pez`."""
    command = commands.add_parser(
        "batch",
        help="find prompts for a whole dataset",
        description="Find a prompt for every image of a dataset, shorten every prompt, or score "
        "every pair. The same command again resumes an interrupted run.",
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="folder, or CSV, TSV or Parquet file, or tar of a WebDataset, or a pattern of these",
    )
    command.add_argument("out", metavar="OUT", help="folder for the results, a Parquet dataset")
    command.add_argument(
        "--task", choices=TASKS, default="invert", help="task for each item (default: invert)"
    )
    _add_items(command)
    _add_workers(command)
    add_search(command, prompt_len="8, or by --ratio", batch=True)
    add_ratio(command)
    add_steering(command, batch=True)
    add_vocabulary(command)
    add_clip(command, low_memory=False)  # images are encoded all the time
    command.set_defaults(
        run=_batch,
        names={
            "source": "SOURCE",
            "out": "OUT",
            "cpus": "--cpus-per-worker",
            "gpus": "--gpus-per-worker",
            "clip_weights": "--clip-weight",
        },
    )


def _add_items(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("items")
    group.add_argument(
        "--image-column",
        metavar="NAME",
        help="column of a table with image paths (default: image, path, file_name or file)",
    )
    group.add_argument(
        "--prompt-column",
        metavar="NAME",
        help="column of a table with texts (default: prompt, caption or text)",
    )
    group.add_argument(
        "--id-column",
        metavar="NAME",
        help="column of a table with an id for each row (default: the path or the prompt)",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="take only the first N items (default: all)"
    )
    group.add_argument(
        "--shuffle", action="store_true", help="take the items in a random order, by --seed"
    )
    group.add_argument(
        "--retry-failed", action="store_true", help="search items with an error again"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="search a few items, write nothing, and print the number of items left and the time "
        "for them",
    )


def _add_workers(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("workers")
    group.add_argument(
        "--ray", action="store_true", help="one worker for each GPU or CPU core, on Ray"
    )
    group.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a running Ray cluster, or auto (default: a new one on this machine)",
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="workers on Ray (default: as many as fit)"
    )
    group.add_argument(
        "--cpus-per-worker", type=int, metavar="N", help="CPU cores per worker on Ray (default: 1)"
    )
    group.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="X",
        help="GPUs per worker on Ray (default: 1 where there are any)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="items that a worker searches side by side (default: by the device and its memory)",
    )
    group.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="items per result file, lost when their worker is killed (default: a 64th of the "
        "items of a worker, at most 256, but at least four times --batch-size)",
    )


def _batch(arguments: argparse.Namespace) -> int:
    # pyarrow takes a second to import
    from .. import batch

    job, cluster = _job(arguments), _cluster(arguments)
    columns = batch.Columns(arguments.image_column, arguments.prompt_column, arguments.id_column)
    settings = {
        "columns": columns,
        "cluster": cluster,
        "device": arguments.device,
        "download": arguments.download,
        "batch_size": arguments.batch_size,
        "chunk": arguments.chunk,
        "limit": arguments.limit,
        "shuffle": arguments.shuffle,
        "retry_failed": arguments.retry_failed,
    }
    if arguments.dry_run:
        plan = batch.plan(arguments.source, arguments.out, job, **settings)
        if arguments.json:
            print_json(vars(plan))
        else:
            print(_plan_text(plan))
        return 0
    note = "ending after the items that are being searched; Ctrl-C again ends at once"
    with interruptible(note) as interrupted, items_bar() as show:
        summary = batch.run(
            arguments.source,
            arguments.out,
            job,
            callback=lambda report: show(report) or interrupted(),
            **settings,
        )
    if arguments.json:
        print_json(vars(summary))
    else:
        print(_summary_text(summary, "scored" if arguments.task == "score" else "found"))
    if summary.stopped:
        return 130
    return 1 if summary.failed or summary.missing else 0


def _job(arguments: argparse.Namespace) -> Job:
    from ..batch import Job

    options = search_options(arguments)
    return Job(
        task=arguments.task,
        clip=arguments.clip or ("emoji-clip",),
        clip_weights=arguments.clip_weight,
        activation=arguments.activation,
        options=options,
        language_model=arguments.language_model,
        caption=arguments.caption,
        captions=arguments.captions,
        captioner=arguments.captioner,
        prune_caption=arguments.prune_caption,
        avoid=arguments.avoid,
        avoid_weight=arguments.avoid_weight,
        ratio=arguments.ratio,
    )


def _cluster(arguments: argparse.Namespace) -> Cluster | None:
    from ..batch import Cluster

    if arguments.ray:
        cpus = 1 if arguments.cpus_per_worker is None else arguments.cpus_per_worker
        return Cluster(arguments.address, arguments.workers, cpus, arguments.gpus_per_worker)
    for name in ("address", "workers", "cpus_per_worker", "gpus_per_worker"):
        if getattr(arguments, name) is not None:
            raise ArgumentError(name, "requires `ray`", "add it")
    return None


def _plan_text(plan: BatchPlan) -> str:
    lines = [
        f"{plan.items:,} items: {plan.to_do:,} to do, {plan.finished:,} finished, "
        f"{plan.failed:,} with errors",
        f"{plan.workers} worker{'s' * (plan.workers > 1)}, {plan.batch_size} items side by side, "
        f"files of {plan.chunk}",
    ]
    if plan.sampled:
        lines.append(
            f"{plan.seconds_per_item:.2f} s per item (measured on {plan.sampled}), "
            f"{duration(plan.seconds)} in all, {size(plan.bytes)} of results"
        )
    return "\n".join(lines)


def _summary_text(summary: Summary, done: str) -> str:
    parts = [f"{summary.found:,} {done}"]
    if summary.failed:
        parts.append(f"{summary.failed:,} with errors")
    if summary.missing:
        parts.append(f"{summary.missing:,} not searched")
    before = f", {summary.finished_before:,} of them before" if summary.finished_before else ""
    line = f"{summary.items:,} items: {', '.join(parts)}{before}; {duration(summary.seconds)}"
    width = max((len(f"{count:,}") for count in summary.errors.values()), default=0)
    kinds = [f"  {count:{width},}  {kind}" for kind, count in summary.errors.items()]
    return "\n".join([line, *kinds])
