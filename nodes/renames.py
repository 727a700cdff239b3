"""Inputs that had another name or other values, or were missing, when a workflow was saved.

`web/renames.json` lists them once, for the server and for the page: the page changes workflows when
it opens them, the server changes prompts that come from elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TABLE = json.loads((Path(__file__).parent.parent / "web/renames.json").read_text("utf-8"))
_NEW_NAMES: dict[str, str] = _TABLE["inputs"]
_NEW_VALUES: dict[str, dict[str, Any]] = _TABLE["values"]
# by an older input of the same nodes; with these values a search stays the same
_NEWER: dict[str, dict[str, Any]] = _TABLE["newer"]
_OLD_NAMES = {new: old for old, new in _NEW_NAMES.items()}


def new_name(name: str) -> str:
    """The name that an input has now."""
    return _NEW_NAMES.get(name, name)


def is_ours(node: Any) -> bool:
    """Whether a node of a prompt belongs to this pack."""
    return isinstance(node, dict) and str(node.get("class_type")).startswith("PEZ_")


def update_prompt(prompt: Any) -> None:
    """Rename the inputs of this pack's nodes in a prompt, replace old values, and add missing ones.

    Args:
        prompt: nodes by id, as ComfyUI's server gets them; changed in place.
    """
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if is_ours(node) and isinstance(node.get("inputs"), dict):
            node["inputs"] = _updated(node["inputs"])


def _updated(inputs: dict[str, Any]) -> dict[str, Any]:
    updated: dict[str, Any] = {}
    for old, value in inputs.items():
        name = new_name(old)
        if name != old and name in inputs:
            continue  # it has both, of which the new one counts
        updated[name] = _new_value(name, value)
    for older, values in _NEWER.items():
        if older in updated:
            updated = values | updated
    return updated


def _new_value(name: str, value: Any) -> Any:
    values = _NEW_VALUES.get(name, {})
    return values.get(value, value) if isinstance(value, str) else value


def old_form(name: str, value: Any) -> tuple[str, Any]:
    """Name and value of an input before they changed.

    Digests of inputs are made of these, so that a prompt that was kept before the change is not
    taken for out of date.
    """
    values = {new: old for old, new in _NEW_VALUES.get(name, {}).items()}
    renamed = isinstance(value, (str, bool)) and value in values
    return _OLD_NAMES.get(name, name), values[value] if renamed else value
