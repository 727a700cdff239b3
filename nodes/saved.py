"""Kept prompts in what a saved image carries."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from .kept import Kept
from .values import CONTROL

log = logging.getLogger(__name__)

KEPT = "kept"
PROPERTY = "pez_kept"


def store_in_workflow(extra_pnginfo: Any, node_id: str, widgets: Sequence[str], text: str) -> None:
    """Put kept prompts into the workflow that saved images will carry.

    The page puts them into the node when the run ends, but the workflow that goes into the images
    of this very run left the page before it began.

    Args:
        extra_pnginfo: what the page sent along; its workflow is changed in place.
        node_id: of the node, a path such as `12:5` for one in a subgraph.
        widgets: the names of the node's widgets in the order in which a file stores their values.
        text: for the widget `kept`.
    """
    workflow = (extra_pnginfo or {}).get("workflow")
    if not isinstance(workflow, dict):
        return
    try:
        node = _find(workflow, str(node_id).split(":")) or {}
        if str(node.get("type")).startswith("PEZ_"):  # a client may send any workflow along
            _store(node, widgets, text)
    except (AttributeError, TypeError) as error:
        log.warning("The workflow that images carry cannot be read (%s).", error)


def store_in_prompt(prompt: Any, node_id: str, text: str) -> None:
    """Put kept prompts into the queued prompt that saved images will carry beside the workflow.

    Images of a client without a page carry nothing else. A node with `keep` off ignores the text,
    so that the prompt still runs as before.

    Args:
        prompt: nodes by id, as ComfyUI gave it to the node; changed in place.
        node_id: of the node.
        text: for the input `kept`.
    """
    inputs = prompt.get(node_id, {}).get("inputs")
    if isinstance(inputs, dict):
        inputs[KEPT] = text


def _store(node: dict[str, Any], widgets: Sequence[str], text: str) -> None:
    """Set the value of `kept`, wherever other packs have put their widgets."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        values[KEPT] = text
    elif isinstance(values, list):
        place = _place(values, _saved_names(node) or list(widgets))
        if place is None:
            node.setdefault("properties", {})[PROPERTY] = text  # the page puts it into the widget
        else:
            values[place] = text


def _saved_names(node: dict[str, Any]) -> list[str]:
    """The names of the widgets as the file lists them, in the order of their values; [] if not."""
    sockets = [socket.get("widget") for socket in node.get("inputs") or []]
    names = [widget["name"] for widget in sockets if widget]
    if KEPT not in names:
        return []  # older pages list only the widgets that have wires
    # the one widget that has no socket and no input of its own
    return [name for one in names for name in ((one, CONTROL) if one == "seed" else (one,))]


def _place(values: list[Any], names: list[str]) -> int | None:
    """The place of `kept` among the values of a node's widgets.

    A text that was kept before shows its place. Otherwise the names do: other packs may add
    widgets, and do so behind those of the schema.
    """
    kept = [k for k, value in enumerate(values) if _is_kept(value)]
    if len(kept) == 1:
        return kept[0]
    place = names.index(KEPT)
    if place < len(values) and isinstance(values[place], str):
        return place
    return None


def _is_kept(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("{") and Kept.from_text(value) is not None


def _find(workflow: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    """The node of an execution id such as `12:5`: node 5 in the subgraph that is node 12."""
    subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
    graph = workflow
    for depth, node_id in enumerate(path):
        node = next((n for n in graph.get("nodes", []) if str(n.get("id")) == node_id), None)
        if node is None or depth == len(path) - 1:
            return node
        graph = next((g for g in subgraphs if g.get("id") == node.get("type")), {})
    return None
