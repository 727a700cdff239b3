"""Earlier prompts of the nodes of a workflow, out of ComfyUI's own history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .renames import is_ours

MOST_RUNS = 100
"""How far back the history is read."""
MOST_FINDS = 12
"""How many prompts of one node are given."""

MOST_TEXT = 1_000_000
"""How many characters of kept texts are given for one node."""

Prompt = Mapping[str, Mapping[str, Any]]
Finds = dict[tuple[str, ...], dict[str, Any]]
"""The finds of one node by their prompts."""


def finds(history: Mapping[str, Any], workflow: str) -> dict[str, list[dict[str, Any]]]:
    """What the nodes of a workflow have learned, newest first.

    Args:
        history: of ComfyUI's queue, oldest first.
        workflow: its id.

    Returns:
        By the id of the node: the text for its widget `kept`, and as `pictures` what `/view` needs
        for the images that were made of the prompt, or else for those that it was learned from.
        Runs that gave the same prompts count once.
    """
    found: dict[str, Finds] = {}
    for run in reversed(history.values()):
        try:
            _, _, prompt, extra, *_ = run["prompt"]
            if extra["extra_pnginfo"]["workflow"]["id"] != workflow:
                continue
            for node, event in _results(run["outputs"]):
                prompts = tuple(item["prompt"] for item in event["items"])
                mine = found.setdefault(node, {})
                if prompts not in mine and _has_room(mine, event["kept"]):
                    pictures = _made(prompt, run["outputs"], node) or _seen(prompt, node)
                    mine[prompts] = {"kept": event["kept"], "pictures": pictures}
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # a client may send any workflow along, or none
    return {node: list(mine.values()) for node, mine in found.items()}


def _has_room(found: Finds, kept: str) -> bool:
    length = sum(len(find["kept"]) for find in found.values())
    return len(found) < MOST_FINDS and length + len(kept) <= MOST_TEXT


def _results(outputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of the learning nodes of a run."""
    for node, shown in outputs.items():
        for event in shown.get("pez") or ():
            if event.get("kept"):
                yield node, event


def _made(prompt: Prompt, outputs: Mapping[str, Any], node: str) -> list[dict[str, str]]:
    """The images that were made behind a node."""
    behind = {node}
    while more := {
        one
        for one, values in prompt.items()
        if one not in behind and behind & set(_sources(values))
    }:
        behind |= more
    shown = [image for one in sorted(behind) for image in outputs.get(one, {}).get("images", [])]
    saved = [image for image in shown if image.get("type") == "output"]
    return [
        {key: str(image.get(key, "")) for key in ("filename", "subfolder", "type")}
        for image in saved or shown
    ]


def _seen(prompt: Prompt, node: str) -> list[dict[str, str]]:
    """The image files before a node, in the order of its inputs."""
    seen, files, waiting = {node}, [], [node]
    while waiting:
        values = prompt.get(waiting.pop(0), {})
        name = values.get("inputs", {}).get("image")
        if isinstance(name, str) and not is_ours(values):
            files.append(_file(name))
        new = [one for one in _sources(values) if one not in seen]
        seen.update(new)
        waiting += new
    return files


def _sources(values: Mapping[str, Any]) -> list[str]:
    """The nodes that a node is wired to."""
    inputs = values.get("inputs", {}).values()
    return [str(one[0]) for one in inputs if isinstance(one, list) and len(one) == 2]


def _file(name: str) -> dict[str, str]:
    """What `/view` needs for the name of an image such as `folder/a.png [output]`."""
    path, kind = name, "input"
    for one in ("input", "output", "temp"):
        if name.endswith(f"[{one}]"):
            path, kind = name.removesuffix(f"[{one}]").rstrip(), one
    folder, _, file = path.replace("\\", "/").rpartition("/")
    return {"filename": file, "subfolder": folder, "type": kind}
