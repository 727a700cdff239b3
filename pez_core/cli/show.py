"""What the commands print: results, JSON and progress."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..names import as_utf8

if TYPE_CHECKING:
    from ..options import SearchOptions
    from ..results import Report, Result

# Seconds between two updates of a bar, and between two lines of progress in a log.
_BAR_EVERY, LOG_EVERY = 0.1, 60


def print_json(value: Any) -> None:
    """Print a value as JSON, which has no NaN. Names in it are UTF-8 in any locale.

    Raises:
        FloatingPointError: it holds NaN or an infinite number.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise FloatingPointError(f"a result is not a finite number ({error}).") from error
    # JSON's own escapes are those that every terminal shows
    print(re.sub(r"[^\x00-\x7f]+", lambda found: json.dumps(found[0])[1:-1], as_utf8(text)))


def rounded(value: float) -> float:
    """A similarity as `--json` prints it.

    Raises:
        FloatingPointError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"a similarity is {value}, not a finite number.")
    return round(value, 6)


def row_of(result: Result) -> dict[str, Any]:
    """A result as `--json` prints it."""
    row: dict[str, Any] = {
        "prompt": result.prompt,
        "similarity": rounded(result.similarity),
        "token_ids": result.token_ids,
        "seconds": round(result.seconds, 3),
    }
    if len(result.similarities) > 1:
        row["similarities"] = list(map(rounded, result.similarities))
    if result.avoided:
        row["avoided"] = list(map(rounded, result.avoided))
    if len(result.encoders) > 1:
        row["encoders"] = {name: rounded(value) for name, value in result.encoders.items()}
    if result.loop_similarity is not None:
        row["loop_similarity"] = rounded(result.loop_similarity)
    if result.perplexity is not None:
        row["perplexity"] = round(result.perplexity, 3)
    if result.note:
        row["note"] = result.note
    return row


def print_result(result: Result) -> None:
    """Print similarity and prompt, and the similarity by each of several CLIPs."""
    print(f"{rounded(result.similarity):.4f}  {result.prompt}")
    if len(result.encoders) > 1:
        for name, similarity in result.encoders.items():
            print(f"  {similarity:.4f}  by {name}")
    if result.loop_similarity is not None:
        print(f"  {result.loop_similarity:.4f}  of the tokens in the loop")


def duration(seconds: float) -> str:
    """A rough duration in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def size(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.0f} GB"


@contextmanager
def search_bar(options: SearchOptions, label: str = "") -> Iterator[Callable[[Report], None]]:
    """A bar on stderr with the best prompt so far; nothing where stderr is no terminal."""
    from tqdm import tqdm

    work = options.work
    bar = tqdm(
        total=work.total,
        disable=None,
        leave=False,
        # `update` decides when to draw; with a time limit the total follows the speed so far
        mininterval=0,
        miniters=0,
        smoothing=0 if work.until_time_limit else 0.3,
        dynamic_ncols=True,
        desc=label or None,
        bar_format="{l_bar}{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
    )
    drawn_at = 0.0

    def update(report: Report) -> None:
        nonlocal drawn_at
        now = time.monotonic()
        due = now - drawn_at > _BAR_EVERY or report.step == report.steps
        if not due or bar.disable:
            return  # decoding the prompt of a report takes time
        drawn_at = now
        bar.total = report.steps
        bar.set_postfix_str(f"{report.similarity:.3f} {report.prompt}", refresh=False)
        bar.update(report.step - bar.n)  # below 0 where an estimate has fallen

    with bar:
        yield update


@contextmanager
def items_bar() -> Iterator[Callable[[dict], None]]:
    """Items done, items per second and time left, on stderr.

    A bar on a terminal; in a log a line every minute.
    """
    from tqdm import tqdm

    bar = tqdm(
        disable=None,
        dynamic_ncols=True,
        bar_format="{l_bar}{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )
    logged_at = time.monotonic()

    def update(report: dict) -> None:
        nonlocal logged_at
        rate, failed = report["rate"], report["failed"]
        speed = f"{rate:.2f} items/s, {duration(report['left'])} left" if rate else "first items"
        speed += f", {failed:,} with errors" if failed else ""
        if not bar.disable:
            bar.total = report["total"]
            bar.set_postfix_str(speed, refresh=False)
            bar.n = report["done"]
            bar.refresh()
        elif time.monotonic() - logged_at >= LOG_EVERY:
            logged_at = time.monotonic()
            print(f"pez: {report['done']:,} of {report['total']:,}, {speed}", file=sys.stderr)

    with bar:
        yield update
