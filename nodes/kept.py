"""Learned prompts that stay in the workflow, and what they were learned from."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

from .found import Found

log = logging.getLogger(__name__)

VERSION = 1
NOT_LEARNED_FROM = frozenset({"keep", "kept", "subject", "style_template"})
"""Inputs that a search does not look at."""
_SAME_ELSEWHERE = frozenset({"keep", "kept", "download", "device"})
"""Inputs of nodes upstream that change nothing in what comes out of them."""
_LONGEST = 4_000_000  # characters of a kept text; a batch of hundreds of images stays below


@dataclass(frozen=True)
class Kept:
    """Prompts that were learned before.

    Attributes:
        found: one per image or prompt.
        inputs: a digest of each input that they were learned from.
    """

    found: list[Found]
    inputs: dict[str, str]

    def to_text(self) -> str:
        """As it is stored in the node's `kept` widget."""
        items = [found.to_json() for found in self.found]
        text = self._dumped(items)
        if len(text) > _LONGEST:  # hundreds of images: the prompts matter, the pictures do not
            text = self._dumped(
                [item | {"candidates": [], "words": [], "curve": []} for item in items]
            )
        return text

    def _dumped(self, items: list[dict[str, Any]]) -> str:
        kept = {"version": VERSION, "items": items, "inputs": self.inputs}
        return json.dumps(kept, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Kept | None:
        """What `to_text` made; None where there is nothing or it cannot be used."""
        if not text.strip() or len(text) > _LONGEST:
            return None
        try:
            kept = json.loads(text)
            if kept["version"] != VERSION or not isinstance(kept["inputs"], dict):
                raise ValueError("another version")
            found = [Found.from_json(item) for item in kept["items"]]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.warning("The kept prompt cannot be read (%s) and is learned anew.", error)
            return None
        return cls(found, kept["inputs"]) if found else None

    def changed(self, now: dict[str, str]) -> list[str]:
        """Names of inputs that are not what they were when the prompts were learned."""
        names = sorted(self.inputs.keys() | now.keys())
        return [name for name in names if self.inputs.get(name) != now.get(name)]


def digests(prompt: dict[str, Any], node_id: str) -> dict[str, str]:
    """A short digest of every input of a node that matters, with all that lies upstream.

    Args:
        prompt: nodes by id, as ComfyUI's server gets them.
        node_id: one of them.

    Returns:
        Digests by the name of the input; none where the prompt cannot be followed.
    """
    inputs = prompt.get(node_id, {}).get("inputs", {})
    if not isinstance(inputs, dict):
        return {}
    nodes: dict[str, str] = {}
    try:
        return {
            name: _digest(prompt, value, nodes)
            for name, value in inputs.items()
            if name not in NOT_LEARNED_FROM
        }
    except (AttributeError, TypeError, RecursionError) as error:
        log.warning("What node %s learns from cannot be told (%s).", node_id, error)
        return {}


def _digest(prompt: dict[str, Any], value: Any, nodes: dict[str, str]) -> str:
    """A digest of a value, or of the output that it is linked to; `nodes` remembers theirs."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # the page writes 1 for 1.0, of which ComfyUI makes a float again
    if not (isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt):
        return _short(json.dumps(value, sort_keys=True, default=str))
    source, slot = str(value[0]), value[1]
    if source not in nodes:
        nodes[source] = "a loop"
        node = prompt[source]
        inputs = node.get("inputs", {})
        within = [
            (name, _digest(prompt, inputs[name], nodes))
            for name in sorted(inputs)
            if name not in _SAME_ELSEWHERE or not node.get("class_type", "").startswith("PEZ_")
        ]
        nodes[source] = _short(f"{node.get('class_type')}{within}")
    return _short(f"{nodes[source]}.{slot}")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


_CHANGED = "out_of_date"  # no input of any node, so that ComfyUI hands it on and looks no further


def cut_wires(request: dict[str, Any], needed: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Take the wires off nodes that give a kept prompt, before ComfyUI looks at what it is to run.

    It checks all that lies upstream, even of inputs that are never asked for: an image that is not
    on this disk would stop a prompt that does not need it.

    Args:
        request: what was posted to the server, with the nodes as `prompt`; changed in place.
        needed: inputs that only a search needs, by the type of the node.
    """
    prompt = request.get("prompt")
    giving: list[tuple[dict[str, Any], tuple[str, ...], list[str]]] = []
    for node_id, node in (prompt if isinstance(prompt, dict) else {}).items():
        names = needed.get(node.get("class_type"))
        text = node.get("inputs", {}).get("kept")
        if not names or node["inputs"].get("keep") is not True or not isinstance(text, str):
            continue
        if kept := Kept.from_text(text):
            changed = kept.changed(digests(prompt, node_id))
            giving.append((node["inputs"], names, changed))
    for inputs, names, changed in giving:
        inputs[_CHANGED] = ",".join(changed)
        for name in names:
            if isinstance(inputs.get(name), list):
                del inputs[name]
    return request


def out_of_date(kept: Kept, prompt: dict[str, Any], node_id: str) -> list[str]:
    """Inputs that changed since a prompt was learned, also where the wires have been cut."""
    known = prompt.get(node_id, {}).get("inputs", {}).get(_CHANGED)
    if isinstance(known, str):
        return [name for name in known.split(",") if name]
    return kept.changed(digests(prompt, node_id))


def store_in_workflow(extra_pnginfo: Any, node_id: str, text: str) -> None:
    """Put kept prompts into the workflow that saved images will carry.

    The page puts them into the node when the run ends, but the workflow that goes into the images
    of this very run left the page before it began.
    """
    workflow = (extra_pnginfo or {}).get("workflow")
    if not isinstance(workflow, dict):
        return
    try:
        node = _find(workflow, str(node_id).split(":")) or {}
        ours = str(node.get("type")).startswith("PEZ_")  # a client may send any workflow along
        values = node.get("widgets_values")
    except (AttributeError, TypeError) as error:
        log.warning("The workflow that images carry cannot be read (%s).", error)
        return
    if ours and isinstance(values, list) and values and isinstance(values[-1], str):
        values[-1] = text  # `kept` is the last widget of every learning node


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
