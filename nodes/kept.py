"""Learned prompts that stay in the workflow, and digests of the inputs that they came from."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

from .found import Found
from .renames import is_ours, new_name, old_form

log = logging.getLogger(__name__)

VERSION = 1
NOT_LEARNED_FROM = frozenset({"keep", "kept", "subject", "style_template"})
"""Inputs that a search does not use."""
_SAME_ELSEWHERE = frozenset({"keep", "kept", "download", "device"})
"""Inputs of nodes upstream that do not change their outputs."""
_NEWER = {
    "fit": "crop",
    "activation": "automatic",
    "wording": "free",
    "clean_caption": False,
    "prune_caption": False,
}
"""Inputs that older kept prompts lack, and the values that change nothing."""
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
        """The text for the widget `kept` of the node."""
        items = [found.to_json() for found in self.found]
        text = self._dumped(items)
        if len(text) > _LONGEST:  # hundreds of images: the prompts matter most
            shorter = {"candidates": [], "words": [], "curve": [], "each": []}
            text = self._dumped([item | shorter for item in items])
        return text

    def _dumped(self, items: list[dict[str, Any]]) -> str:
        kept = {"version": VERSION, "items": items, "inputs": self.inputs}
        return json.dumps(kept, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Kept | None:
        """Read the result of `to_text`; None where it is empty or damaged."""
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
        inputs = {new_name(name): digest for name, digest in kept["inputs"].items()}
        return cls(found, inputs) if found else None

    def changed(self, now: dict[str, str]) -> list[str]:
        """Names of inputs that have changed since the prompts were learned.

        The seed counts only beside others: where it is set to randomize, the page changes it after
        every run.
        """
        names = sorted(self.inputs.keys() | now.keys())
        changed = [name for name in names if self.inputs.get(name) != now.get(name)]
        return [] if changed == ["seed"] else changed


def digests(
    prompt: dict[str, Any], node_id: str, nodes: dict[str, str] | None = None
) -> dict[str, str]:
    """A short digest of every input that a search uses, with everything upstream of it.

    Args:
        prompt: nodes by id, as ComfyUI's server gets them.
        node_id: one of them.
        nodes: digests of nodes of this prompt, which are read and added to, so that the digests of
            many nodes take one walk over the prompt; None: begin with none.

    Returns:
        Digests by the name of the input; none where the prompt cannot be followed.
    """
    inputs = prompt.get(node_id, {}).get("inputs", {})
    if not isinstance(inputs, dict):
        return {}
    nodes = {} if nodes is None else nodes
    try:
        return {
            name: _digest(prompt, old_form(name, value)[1], nodes)
            for name, value in inputs.items()
            if name not in NOT_LEARNED_FROM and _NEWER.get(name) != value
        }
    except (AttributeError, TypeError, RecursionError) as error:
        log.warning("The inputs of node %s cannot be followed (%s).", node_id, error)
        return {}


def changed_inputs(prompt: dict[str, Any]) -> dict[str, list[str]]:
    """The inputs that changed since prompts were kept.

    Args:
        prompt: nodes by id, as ComfyUI's server gets them.

    Returns:
        Names of inputs by the id of each node that has a kept prompt.
    """
    changed = {}
    nodes: dict[str, str] = {}
    for node_id, node in prompt.items():
        inputs = node.get("inputs") if is_ours(node) else None
        text = inputs.get("kept") if isinstance(inputs, dict) else None
        if isinstance(text, str) and (kept := Kept.from_text(text)):
            changed[node_id] = kept.changed(digests(prompt, node_id, nodes))
    return changed


def _digest(prompt: dict[str, Any], value: Any, nodes: dict[str, str]) -> str:
    """A digest of a value, or of the output that it is linked to; `nodes` remembers theirs."""
    if source := _source(prompt, value):
        _digest_nodes(prompt, source, nodes)
    return _value_digest(prompt, value, nodes)


def _source(prompt: dict[str, Any], value: Any) -> str | None:
    """The node that a value is linked to; None: it is no link."""
    if isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt:
        return str(value[0])
    return None


def _value_digest(prompt: dict[str, Any], value: Any, nodes: dict[str, str]) -> str:
    """A digest of a value; that of a linked node is in `nodes`, or it is part of a loop."""
    if source := _source(prompt, value):
        return _short(f"{nodes.get(source, 'a loop')}.{value[1]}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # the page writes 1 for 1.0, of which ComfyUI makes a float again
    return _short(json.dumps(value, sort_keys=True, default=str))


def _digest_nodes(prompt: dict[str, Any], node_id: str, nodes: dict[str, str]) -> None:
    """Add the digests of a node, and of all upstream of it, to `nodes`.

    Each node is read once. Without recursion: a prompt may chain thousands of nodes.
    """
    opened: dict[str, dict[str, Any]] = {}
    stack = [node_id]
    while stack:
        current = stack[-1]
        if current in nodes:
            stack.pop()
        elif current not in opened:
            inputs = opened[current] = _inputs_that_count(prompt[current])
            sources = [_source(prompt, inputs[name]) for name in sorted(inputs)]
            stack += [one for one in sources if one and one not in nodes and one not in opened]
        else:
            inputs = opened[current]
            within = [(name, _value_digest(prompt, inputs[name], nodes)) for name in sorted(inputs)]
            nodes[current] = _short(f"{prompt[current].get('class_type')}{within}")


def _inputs_that_count(node: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a node upstream that change its outputs."""
    inputs = node.get("inputs", {})
    if not is_ours(node):
        return inputs
    inputs = dict(old_form(name, value) for name, value in inputs.items())
    return {
        name: inputs[name]
        for name in inputs.keys() - _SAME_ELSEWHERE
        if _NEWER.get(name) != inputs[name]
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
