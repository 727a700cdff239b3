"""Messages between a running node and the page."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import comfy.model_management as mm
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..pez_core import Report, Result
from .found import Found

T = TypeVar("T")

EVENT = "pez.live"
SEND_SECONDS = 0.25
"""Shortest time between two events."""
EXPLAIN_SHARE = 0.05
"""Largest share of the time that a running search spends on the contributions of words."""
CURVE_POINTS = 60

running: dict[str, Live] = {}
"""The nodes that run, by their id."""
with_live_view: set[str] = set()
"""Clients with the live view. They get no plain text."""


class Live:
    """One run of a node, as the page shows it.

    A context manager; `report` is the callback of a search, and `found` takes its results. A
    node that searches several times uses `turn` for the callback of each. Errors inside are also
    sent to the page.

    Args:
        hidden: `cls.hidden` of the node; its schema has to list `unique_id` and `extra_pnginfo`.
        time_limit: seconds for the whole run; 0: none.
        inputs: digests of the inputs. A run that is cancelled or fails sends them, so that the page
            can keep its best so far.
    """

    def __init__(
        self, hidden: Any, time_limit: float = 0.0, inputs: Mapping[str, str] | None = None
    ) -> None:
        self._ends = time.monotonic() + time_limit if time_limit else None
        self._inputs = dict(inputs or {})
        self.node = str(getattr(hidden, "unique_id", None) or "")
        self.client = getattr(PromptServer.instance, "client_id", None)
        self._finish = threading.Event()
        self._bar: ProgressBar | None = None
        self._first: tuple[float, int] | None = None  # when the first report came, and its step
        self._sent = self._explained = self._phase_began = 0.0
        self._last: Report | _Turn | None = None
        self._results: list[Result] = []
        self._pace = _Pace()
        self._fixed: list[tuple[int, list[int]]] = []
        self._too_late = False
        self._words: dict[int, tuple[str, list[tuple[str, float]]]] = {}
        self._curves: dict[int, list[tuple[int, float]]] = {}
        self.event = _event(hidden, "starting")

    def __enter__(self) -> Live:
        running[self.node] = self
        self._send()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        running.pop(self.node, None)
        if kind is not None:
            cancelled = issubclass(kind, mm.InterruptProcessingException)
            self.event["state"] = "cancelled" if cancelled else "failed"
            self.event["message"] = "" if cancelled else _message(error)
            self.event["inputs"] = self._inputs
            self._send()

    def finish(self) -> None:
        """End the search with the best so far; called from the server's thread."""
        self._finish.set()

    @property
    def finished(self) -> bool:
        """A person clicked Finish now."""
        return self._finish.is_set()

    def turn(self, turns: int, caption: str = "") -> Callable[[Report], bool]:
        """The callback of the next of several searches, after those whose results `found` got.

        Args:
            turns: how many there still are, this one included.
            caption: fixed text around the learned words, as in `invert`.
        """
        self._too_late = self.finished
        self._fixed.append((len(self._results), _words_around(caption)))
        before, done = list(self._results), self._last.step if self._last else 0
        return lambda report: self.report(_Turn(report, before, done, turns))

    def time_left(self, turns: int = 1) -> float | None:
        """Seconds for the next of several searches: its fair share. None: no limit.

        Args:
            turns: how many there still are, this one included.
        """
        # never 0, so that a search ends by itself with its best so far
        return self._ends and max(self._ends - time.monotonic(), 1e-3) / turns

    def phase(self, name: str, done: int = 0, of: int = 0) -> None:
        """Show what takes the time before the first step.

        Args:
            name: "loadingWords" (the language model) or "reading" (the words, by that model).
            done, of: how much of it is done; 0 of 0: nobody can say.

        Raises:
            InterruptProcessingException: the run was cancelled.
        """
        mm.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if self.event.get("phase") != name:
            self._phase_began, self._sent = now, 0.0
        if self._last is not None or now - self._sent < SEND_SECONDS:
            return
        elapsed = now - self._phase_began
        left = elapsed / done * (of - done) if done else None
        self.event |= {"phase": name, "seconds_left": left}
        self._send()
        self._sent = now

    def begin(self) -> None:
        """Forget a search that is tried again."""
        self._results, self._last, self._first = [], None, None
        self._pace = _Pace()
        self._fixed.clear()
        self._words.clear()
        self._curves.clear()

    def report(self, report: Report | _Turn) -> bool:
        """The callback of a search; true ends it.

        Raises:
            InterruptProcessingException: the run was cancelled.
        """
        mm.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = ProgressBar(report.steps, node_id=self.node or None)
        self._bar.update_absolute(report.step, report.steps)
        self._last = report
        now = time.monotonic()
        self._first = self._first or (now, report.step)
        self._pace.note(now, *report.part)
        if now - self._sent >= SEND_SECONDS or report.step == report.steps:
            self._show(report)
        return self.finished

    def found(self, results: Sequence[Result]) -> list[Found]:
        """Results with the curves and words of their search; needs the CLIP in use."""
        found = []
        for k, result in enumerate(results, start=len(self._results)):
            one = Found.of(result, self._words_of(k, result))
            one.curve = self._curves.get(k, [])
            one.fixed = self._fixed_of(k)
            if self._too_late:
                one.note = f"{one.note} Finished before its turn; a first guess.".strip()
            found.append(one)
        self._results += results
        return found

    def _words_of(self, k: int, result: Result) -> list[tuple[str, float]]:
        if not self._last or k >= len(self._last.prompts):
            return []
        if self._last.prompts[k] == result.prompt:
            self._explain_one(self._last, k)
            return self._words[k][1]
        if not result.candidates:  # in sections, each with words of its own
            return []
        # in half precision the verified candidates may be in another order
        return [(one.word, one.contribution) for one in self._last.explain(k, result.prompt)]

    def _fixed_of(self, k: int) -> list[int]:
        """Numbers of words around the learned part of the k-th prompt, [] where there are none."""
        return next((fixed for first, fixed in reversed(self._fixed) if first <= k), [])

    def _show(self, report: Report | _Turn) -> None:
        step, steps = report.step, report.steps
        elapsed = time.monotonic() - (self._first or (time.monotonic(), step))[0]
        done, of, follows = report.part
        pairs = zip(report.prompts, report.similarities, strict=True)
        items = [self._item(k, step, *pair) for k, pair in enumerate(pairs)]
        self._explain(report)
        self.event |= {
            "state": "finishing" if self.finished else "running",
            "step": step,
            "steps": steps,
            "elapsed": elapsed,
            "seconds_left": self._pace.seconds_left(done, of, follows),
            "more_follows": follows,
            "phase": None,
            "items": items,
        }
        self._send()
        self._sent = time.monotonic()

    def _item(self, k: int, step: int, prompt: str, similarity: float) -> dict[str, Any]:
        """The k-th prompt as the page shows it."""
        if not math.isfinite(similarity):
            return {"prompt": "", "similarity": None, "words": [], "curve": []}
        curve = _thinned(self._curves.setdefault(k, []), step, similarity)
        return {
            "prompt": prompt,
            "similarity": similarity,
            "words": self._words.get(k, ("", []))[1],
            "curve": [*curve],
            "fixed": self._fixed_of(k),
        }

    def _explain(self, report: Report | _Turn) -> None:
        """Find the contributions of words in one prompt that has changed, if there is time."""
        began = time.monotonic()
        if began < self._explained:
            return
        changed = [
            k
            for k, prompt in enumerate(report.prompts)
            if prompt != self._words.get(k, ("", []))[0] and math.isfinite(report.similarities[k])
        ]
        if not changed:
            return
        self._explain_one(report, next((k for k in changed if k not in self._words), changed[0]))
        took = time.monotonic() - began
        self._explained = time.monotonic() + took / EXPLAIN_SHARE

    def _explain_one(self, report: Report | _Turn, k: int) -> None:
        prompt = report.prompts[k]
        if self._words.get(k, ("", []))[0] != prompt:
            words = [(one.word, one.contribution) for one in report.explain(k)]
            self._words[k] = prompt, words

    def _send(self) -> None:
        server = PromptServer.instance
        if self.client is None:
            return
        # a copy, since another thread serialises it later
        server.send_sync(EVENT, dict(self.event), self.client)
        if self.client not in with_live_view and self.event["items"]:
            server.send_progress_text(_as_text(self.event), self.node, self.client)


class _Pace:
    """The time that is left of the part of a search that runs, by the pace of its own steps."""

    def __init__(self) -> None:
        self._part: tuple[int, bool] | None = None
        self._began, self._now = (0.0, 0), 0.0

    def note(self, now: float, done: int, of: int, follows: bool) -> None:
        """A report has come; arguments as in `Report.part`."""
        # with a time limit the number of steps is an estimate, and changes within a part
        part = (of if follows else 0, follows)
        if part != self._part or done < self._began[1]:
            self._part, self._began = part, (now, done)
        self._now = now

    def seconds_left(self, done: int, of: int, follows: bool) -> float | None:
        """None before the second report of a part."""
        began, first = self._began
        return (self._now - began) / (done - first) * (of - done) if done > first else None


class _Turn:
    """The report of one of several searches as a part of the whole.

    Args:
        report: of this search.
        before: results of the searches before it.
        done: steps before it.
        turns: number of searches that are left, this one included.
    """

    def __init__(self, report: Report, before: list[Result], done: int, turns: int) -> None:
        self._report, self._before = report, before
        self.step = done + report.step
        self.steps = done + turns * report.steps
        done, of, follows = report.part
        self.part = done, of, follows or turns > 1

    @cached_property
    def prompts(self) -> list[str]:
        return [result.prompt for result in self._before] + self._report.prompts

    @cached_property
    def similarities(self) -> list[float]:
        return [result.similarity for result in self._before] + self._report.similarities

    def explain(self, k: int, prompt: str | None = None) -> list:
        """The words of the k-th prompt; [] for one of an earlier search."""
        here = k - len(self._before)
        return self._report.explain(here, prompt) if here >= 0 else []


def countdown(items: Sequence[T]) -> Iterator[tuple[int, T]]:
    """Each item with the number of those that are left, itself included."""
    return zip(range(len(items), 0, -1), items, strict=True)


def show_text(hidden: Any, text: str) -> None:
    """Show a line of text on a node, in pages without the live view."""
    server, node = PromptServer.instance, getattr(hidden, "unique_id", None)
    if node and server.client_id is not None and server.client_id not in with_live_view:
        server.send_progress_text(text, node, server.client_id)


@contextmanager
def showing_errors(hidden: Any) -> Iterator[None]:
    """Send errors to the live view of a node that makes no `Live`.

    Args:
        hidden: as for `Live`.
    """
    try:
        yield
    except Exception as error:
        server = PromptServer.instance
        if server.client_id is not None:
            event = _event(hidden, "failed") | {"message": _message(error)}
            server.send_sync(EVENT, event, server.client_id)
        raise


def _event(hidden: Any, state: str) -> dict[str, Any]:
    """An event of the node that runs."""
    context = get_executing_context()
    workflow = (getattr(hidden, "extra_pnginfo", None) or {}).get("workflow")
    return {
        "node": str(getattr(hidden, "unique_id", None) or ""),
        "prompt_id": context.prompt_id if context else None,
        "workflow": workflow.get("id") if isinstance(workflow, dict) else None,
        "state": state,
        "items": [],
    }


def _message(error: BaseException | None) -> str:
    """The text of an error, or its type where it has none."""
    return str(error).strip() or type(error).__name__


def _words_around(caption: str) -> list[int]:
    """Numbers of words before and behind the learned ones; [] without a caption."""
    if not caption:
        return []
    before, _, behind = caption.partition("{}")
    return [len(before.split()), len(behind.split())]


def _thinned(curve: list, step: int, similarity: float) -> list:
    """`curve` with one more point if it rises, and half of its points if it is long.

    With a time limit steps are an estimate, which may fall from one part of a search to the next.
    """
    similarity = round(similarity, 4)
    if not curve or similarity > curve[-1][1]:
        curve.append((max(step, curve[-1][0]) if curve else step, similarity))
        if len(curve) > CURVE_POINTS:
            del curve[1:-1:2]
    return curve


def _as_text(event: dict[str, Any]) -> str:
    best = max(event["items"], key=lambda item: item["similarity"] or 0)
    if best["similarity"] is None:
        return ""
    more = f" (best of {len(event['items'])})" if len(event["items"]) > 1 else ""
    return f"{event['step']}/{event['steps']}  {best['similarity']:.3f}{more}\n{best['prompt']}"
