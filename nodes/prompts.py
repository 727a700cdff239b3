"""Changes to a prompt before ComfyUI checks it: old names, and wires that are not needed."""

from __future__ import annotations

from typing import Any

from .kept import Kept, digests
from .renames import update_prompt

_CHANGED = "out_of_date"  # no input of any node, so ComfyUI passes it on without a check


def prepare(request: dict[str, Any], needed: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Bring a prompt into the form of today's nodes.

    Args:
        request: the body that was posted to the server, with the nodes as `prompt`; changed in
            place.
        needed: the inputs that only a search needs, by the type of the node.
    """
    update_prompt(request.get("prompt"))
    return cut_wires(request, needed)


def cut_wires(request: dict[str, Any], needed: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Remove the inputs that a node with a kept prompt does not use.

    ComfyUI checks all nodes upstream, even of inputs that it never evaluates: an image that is not
    on this disk would stop a prompt that does not need it. A seed that changes after each run would
    make everything downstream run again.

    Args:
        request, needed: as in `prepare`.
    """
    prompt = request.get("prompt")
    giving: list[tuple[dict[str, Any], tuple[str, ...], list[str]]] = []
    nodes: dict[str, str] = {}
    for node_id, node in (prompt if isinstance(prompt, dict) else {}).items():
        names = needed.get(node.get("class_type"))
        text = node.get("inputs", {}).get("kept")
        if not names or node["inputs"].get("keep") is not True or not isinstance(text, str):
            continue
        if kept := Kept.from_text(text):
            changed = kept.changed(digests(prompt, node_id, nodes))
            giving.append((node["inputs"], names, changed))
    for inputs, names, changed in giving:
        inputs[_CHANGED] = ",".join(changed)
        for name in names:
            if isinstance(inputs.get(name), list):
                del inputs[name]
        inputs["seed"] = 0
    return request


def out_of_date(kept: Kept, prompt: dict[str, Any], node_id: str) -> list[str]:
    """Inputs that changed since a prompt was learned, also where `cut_wires` removed them."""
    changed = prompt.get(node_id, {}).get("inputs", {}).get(_CHANGED)
    if isinstance(changed, str):
        return [name for name in changed.split(",") if name]
    return kept.changed(digests(prompt, node_id))
