"""What a running node tells the screen, and what the screen tells a running node."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management as mm
from aiohttp import web
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..pez_core import Result
from .found import Found
from .kept import digests

EVENT = "pez.live"
SEND_SECONDS = 0.25
"""Between two events; eyes need no more."""
EXPLAIN_SHARE = 0.05
"""Of the time that may go into telling words apart while a search runs."""
CURVE_POINTS = 60

_running: dict[str, Live] = {}
_with_live_view: set[str] = set()  # clients whose nodes show events, and need no plain text


class Live:
    """One run of a node, as the screen sees it.

    A context manager; `report` is the callback of a search, and `found` takes its results. Where a
    node searches several times, `turn` gives the callback of each.

    Args:
        hidden: `cls.hidden` of the node, which has to ask for `unique_id` and `extra_pnginfo`.
        time_limit: seconds for the whole run; 0: none.
    """

    def __init__(self, hidden: Any, time_limit: float = 0.0) -> None:
        self._ends = time.monotonic() + time_limit if time_limit else None
        context = get_executing_context()
        self.node = str(getattr(hidden, "unique_id", None) or "")
        self.client = getattr(PromptServer.instance, "client_id", None)
        self._finish = threading.Event()
        self._bar: ProgressBar | None = None
        self._first: tuple[float, int] | None = None  # when the first report came, and its step
        self._sent = self._explained = 0.0
        self._last: dict[str, Any] | None = None
        self._results: list[Result] = []
        self._too_late = False
        self._words: dict[int, tuple[str, list[tuple[str, float]]]] = {}
        self._curves: dict[int, list[tuple[int, float]]] = {}
        workflow = (getattr(hidden, "extra_pnginfo", None) or {}).get("workflow")
        self.event: dict[str, Any] = {
            "node": self.node,
            "prompt_id": context.prompt_id if context else None,
            "workflow": workflow.get("id") if isinstance(workflow, dict) else None,
            "state": "starting",
            "items": [],
        }

    def __enter__(self) -> Live:
        _running[self.node] = self
        self._send()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        _running.pop(self.node, None)
        if kind is not None:
            cancelled = issubclass(kind, mm.InterruptProcessingException)
            self.event["state"] = "cancelled" if cancelled else "failed"
            self._send()

    def finish(self) -> None:
        """End the search with the best so far; called from the server's thread."""
        self._finish.set()

    @property
    def finished(self) -> bool:
        """A person asked for the best so far."""
        return self._finish.is_set()

    def turn(self, turns: int) -> Callable[[dict[str, Any]], bool]:
        """The callback of the next of several searches, after those that `found` has results of.

        Args:
            turns: how many there still are, this one included.
        """
        self._too_late = self.finished
        done = self._last["step"] if self._last else 0

        def report(one: dict[str, Any]) -> bool:
            before = len(self._results)
            return self.report(
                {
                    "step": done + one["step"],
                    "steps": done + turns * one["steps"],
                    "prompts": [r.prompt for r in self._results] + one["prompts"],
                    "similarities": [r.similarity for r in self._results] + one["similarities"],
                    "explain": lambda k, *prompt: (
                        one["explain"](k - before, *prompt) if k >= before else []
                    ),
                }
            )

        return report

    def time_left(self, turns: int = 1) -> float | None:
        """Seconds for the next of several searches, of which it gets a fair share; None: no limit.

        Args:
            turns: how many there still are, this one included.
        """
        # a search has to have a moment, so that it ends by itself with what it has
        return self._ends and max(self._ends - time.monotonic(), 1e-3) / turns

    def begin(self) -> None:
        """Forget a search that is tried again."""
        self._results, self._last, self._first = [], None, None
        self._words.clear()
        self._curves.clear()

    def report(self, report: dict[str, Any]) -> bool:
        """The callback of a search; true ends it.

        Raises:
            InterruptProcessingException: the run was cancelled.
        """
        mm.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = ProgressBar(report["steps"], node_id=self.node or None)
        self._bar.update_absolute(report["step"], report["steps"])
        self._last = report
        now = time.monotonic()
        self._first = self._first or (now, report["step"])
        if now - self._sent >= SEND_SECONDS or report["step"] == report["steps"]:
            self._show(report)
        return self.finished

    def found(self, results: Sequence[Result]) -> list[Found]:
        """Results with what was seen of them on the way, while the CLIP is still in use."""
        found = []
        for k, result in enumerate(results, start=len(self._results)):
            one = Found.of(result, self._words_of(k, result))
            one.curve = self._curves.get(k, [])
            if self._too_late:
                one.note = f"{one.note} Finished before its turn; a first guess.".strip()
            found.append(one)
        self._results += results
        return found

    def _words_of(self, k: int, result: Result) -> list[tuple[str, float]]:
        if not self._last or k >= len(self._last["prompts"]):
            return []
        if self._last["prompts"][k] == result.prompt:
            self._explain_one(self._last, k)
            return self._words[k][1]
        if not result.candidates:  # in sections, which are explained each for itself
            return []
        # read again, candidates may change places in half precision
        return [(one.word, one.contribution) for one in self._last["explain"](k, result.prompt)]

    def _show(self, report: dict[str, Any]) -> None:
        step, steps = report["step"], report["steps"]
        began, first = self._first or (time.monotonic(), step)
        elapsed = time.monotonic() - began
        items = []
        for k, (prompt, similarity) in enumerate(
            zip(report["prompts"], report["similarities"], strict=True)
        ):
            if not math.isfinite(similarity):
                items.append({"prompt": "", "similarity": None, "words": [], "curve": []})
                continue
            curve = _thinned(self._curves.setdefault(k, []), step, similarity)
            _, words = self._words.get(k, ("", []))
            items.append(
                {"prompt": prompt, "similarity": similarity, "words": words, "curve": [*curve]}
            )
        self._explain(report)
        self.event |= {
            "state": "finishing" if self.finished else "running",
            "step": step,
            "steps": steps,
            "elapsed": elapsed,
            "seconds_left": elapsed / (step - first) * (steps - step) if step > first else None,
            "items": items,
        }
        self._send()
        self._sent = time.monotonic()

    def _explain(self, report: dict[str, Any]) -> None:
        """Tell apart the words of one prompt that has changed, if there is time for it."""
        began = time.monotonic()
        if began < self._explained:
            return
        prompts = report["prompts"]
        changed = [
            k
            for k, prompt in enumerate(prompts)
            if prompt != self._words.get(k, ("", []))[0]
            and math.isfinite(report["similarities"][k])
        ]
        if not changed:
            return
        self._explain_one(report, next((k for k in changed if k not in self._words), changed[0]))
        took = time.monotonic() - began
        self._explained = time.monotonic() + took / EXPLAIN_SHARE

    def _explain_one(self, report: dict[str, Any], k: int) -> None:
        prompt = report["prompts"][k]
        if self._words.get(k, ("", []))[0] != prompt:
            words = [(one.word, one.contribution) for one in report["explain"](k)]
            self._words[k] = prompt, words

    def _send(self) -> None:
        server = PromptServer.instance
        if self.client is None:
            return
        # a copy, since it is made into text later and by another thread
        server.send_sync(EVENT, dict(self.event), self.client)
        if self.client not in _with_live_view and self.event["items"]:
            server.send_progress_text(_as_text(self.event), self.node, self.client)


def tell(hidden: Any, text: str) -> None:
    """A line of text on a node, for screens without the live view."""
    server, node = PromptServer.instance, getattr(hidden, "unique_id", None)
    if node and server.client_id is not None and server.client_id not in _with_live_view:
        server.send_progress_text(text, node, server.client_id)


def register_routes() -> None:
    """What the live view asks of the server."""
    routes = PromptServer.instance.routes

    @routes.get("/pez/live")
    async def running(request: web.Request) -> web.Response:
        """The last event of every node that runs, for pages that were loaded meanwhile."""
        return web.json_response([dict(live.event) for live in list(_running.values())])

    @routes.post("/pez/live")
    async def has_live_view(request: web.Request) -> web.Response:
        """A page says that it shows events."""
        client = (await _json(request)).get("client_id")
        if isinstance(client, str) and len(client) < 100:
            if len(_with_live_view) > 1000:
                _with_live_view.clear()
            _with_live_view.add(client)
        return web.json_response({})

    @routes.post("/pez/finish")
    async def finish(request: web.Request) -> web.Response:
        """End the search of a node with the best so far."""
        asked = await _json(request)
        live = _running.get(str(asked.get("node")))
        # a late click must not end another run of the same node
        found = live is not None and asked.get("prompt_id") in (None, live.event["prompt_id"])
        if found:
            live.finish()
        return web.json_response({"finishing": found})

    @routes.post("/pez/inputs")
    async def inputs(request: web.Request) -> web.Response:
        """Digests of what the nodes in a prompt would learn from; tells what is out of date."""
        prompt = (await _json(request)).get("prompt")
        if not isinstance(prompt, dict):
            raise web.HTTPBadRequest(text="`prompt` has to be an object")
        found = {
            node: digests(prompt, node)
            for node, what in prompt.items()
            if isinstance(what, dict) and str(what.get("class_type", "")).startswith("PEZ_")
        }
        return web.json_response(found)


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        asked = await request.json()
    except ValueError as error:
        raise web.HTTPBadRequest(text="this is no JSON") from error
    if not isinstance(asked, dict):
        raise web.HTTPBadRequest(text="this is no JSON object")
    return asked


def _thinned(curve: list, step: int, similarity: float) -> list:
    """`curve` with one more point where it rises, and half of its points when it gets long.

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
