"""The routes of ComfyUI's server that the live view uses."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from server import PromptServer

from . import consent, models
from .finds import MOST_RUNS, finds
from .kept import changed_inputs
from .live import running, with_live_view
from .renames import update_prompt


def register_routes() -> None:
    """Add the routes that the live view uses."""
    routes = PromptServer.instance.routes

    @routes.get("/pez/live")
    async def events(request: web.Request) -> web.Response:
        """The last event of every node that runs, for pages that were loaded meanwhile."""
        return web.json_response([dict(live.event) for live in list(running.values())])

    @routes.post("/pez/live")
    async def has_live_view(request: web.Request) -> web.Response:
        """Register a page that shows events."""
        client = (await _json(request)).get("client_id")
        if isinstance(client, str) and len(client) < 100:
            if len(with_live_view) > 1000:
                with_live_view.clear()
            with_live_view.add(client)
        return web.json_response({})

    @routes.post("/pez/finish")
    async def finish(request: web.Request) -> web.Response:
        """End the search of a node with the best so far."""
        body = await _json(request)
        live = running.get(str(body.get("node")))
        # a late click must not end another run of the same node
        found = live is not None and body.get("prompt_id") in (None, live.event["prompt_id"])
        if found:
            live.finish()
        return web.json_response({"finishing": found})

    @routes.get("/pez/finds")
    async def earlier_finds(request: web.Request) -> web.Response:
        """Earlier prompts of the nodes of a workflow, out of ComfyUI's history."""
        queue = PromptServer.instance.prompt_queue
        # as it is: ComfyUI would copy every workflow otherwise
        history = queue.get_history(max_items=MOST_RUNS, map_function=lambda run: run)
        return web.json_response(finds(history, request.query.get("workflow", "")))

    @routes.post("/pez/agree")
    async def agree(request: web.Request) -> web.Response:
        """Remember that the person at the page wants a model downloaded."""
        # a page of another site can post JSON only under this type with leave of this server
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="the body has to be application/json")
        model = (await _json(request)).get("model")
        if model not in list(models.PRESETS):
            raise web.HTTPBadRequest(text="`model` is none that can be downloaded")
        try:
            await asyncio.to_thread(consent.agree, model)
        except OSError as error:
            raise web.HTTPInternalServerError(text=f"cannot be stored: {error}") from error
        return web.json_response({"agreed": model})

    @routes.post("/pez/changed")
    async def changed(request: web.Request) -> web.Response:
        """The inputs that changed since prompts were kept, by the nodes of a prompt that do so."""
        prompt = (await _json(request)).get("prompt")
        if not isinstance(prompt, dict):
            raise web.HTTPBadRequest(text="`prompt` has to be an object")
        return web.json_response(await asyncio.to_thread(_changed, prompt))


def _changed(prompt: dict[str, Any]) -> dict[str, list[str]]:
    update_prompt(prompt)
    return changed_inputs(prompt)


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text="the body is not JSON, or too deep") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="the body is not a JSON object")
    return body
