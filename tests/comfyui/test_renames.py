"""Workflows that were saved when inputs had other names: before_renames.json, as HEAD made it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import SETTINGS, Editor, chromium
from .server import Client, ComfyServer, Run

BEFORE = json.loads((Path(__file__).parent / "before_renames.json").read_text())
INVERT, STYLE, DISTILL, FUSE, SCORE, VOCABULARY = "7", "8", "9", "10", "11", "5"
NOW = {
    VOCABULARY: {"block": "water, sea*", "ascii_only": True},
    INVERT: {
        "effort": "paper", "steps": 3, "shared": True, "start_from": "a drawing",
        "block": ["6", 0], "vocabulary": ["5", 0], "images": ["4", 0], "seed": 7, "keep": True,
        "wording": "free", "clean_caption": False, "prune_caption": False,
    },
    STYLE: {"effort": "paper", "keep_content": True, "block": "red", "content": "animals"},
    DISTILL: {"effort": "paper", "block": "", "ratio": 0.5},
    FUSE: {"effort": "paper", "always_learn": True, "weights": "1, 2"},
    SCORE: {"judge": ["1", 0], "text": ["7", 0], "max_loss": 0.01},
}  # fmt: skip


@pytest.fixture(scope="module")
def editor(server: ComfyServer, client: Client) -> Iterator[Editor]:
    client.post("/settings", SETTINGS).raise_for_status()
    with chromium() as browser:
        editor = Editor(browser, server.url)
        yield editor
        editor.close()


def check(run: Run, changed: list[str]) -> None:
    """Every node ran with the old settings."""
    assert run.status == "success", run.error
    kept = json.loads(BEFORE["prompt"][INVERT]["inputs"]["kept"])
    (event,) = run.outputs[INVERT]["pez"]
    assert event["state"] == "kept" and event["changed"] == changed
    assert event["items"] == kept["items"]
    for node in (STYLE, DISTILL, FUSE):
        (event,) = run.outputs[node]["pez"]
        assert event["state"] == "done" and len(event["items"][0]["candidates"]) == 2
    assert float(run.outputs["12"]["text"][0]) == pytest.approx(kept["items"][0]["similarity"], 1)


def test_a_prompt_in_the_old_form_runs(client: Client):
    check(client.run(BEFORE["prompt"]), [])


def test_a_workflow_in_the_old_form_opens_and_runs(editor: Editor, client: Client):
    editor.load(BEFORE["workflow"])
    prompt: dict[str, Any] = editor.page.evaluate("async () => (await app.graphToPrompt()).output")
    for node, values in NOW.items():
        inputs = prompt[node]["inputs"]
        assert {name: inputs.get(name) for name in values} == values
        old = {"preset", "initial", "blocked", "batch", "mode", "fuse", "held_out"}
        assert not old & inputs.keys()
    # the page fills in inputs that the nodes have got since
    check(client.run(prompt), ["repeats", "vocabulary"])

    saved = {str(node["id"]): node for node in editor.serialized()["nodes"]}
    for node in NOW:
        names = [socket["name"] for socket in saved[node]["inputs"]]
        assert names.count("block") <= 1 and not {"blocked", "held_out"} & {*names}
    assert editor.complaints == []


def test_a_subgraph_in_the_old_form_opens(editor: Editor):
    editor.load(BEFORE["workflow"])
    editor.page.evaluate(
        """id => {
            const inside = app.rootGraph.getNodeById(id);
            app.rootGraph.convertToSubgraph(new Set([inside]));
        }""",
        STYLE,
    )
    workflow = editor.serialized()
    (subgraph,) = workflow["definitions"]["subgraphs"]
    (inside,) = subgraph["nodes"]
    old = {"effort": "preset", "block": "blocked", "keep_content": "mode"}
    for socket in inside["inputs"]:
        socket["name"] = old.get(socket["name"], socket["name"])
        if socket.get("widget"):
            socket["widget"]["name"] = socket["name"]
    (before,) = [one for one in BEFORE["workflow"]["nodes"] if str(one["id"]) == STYLE]
    inside["widgets_values"] = before["widgets_values"]
    editor.load(workflow)
    prompt = editor.page.evaluate("async () => (await app.graphToPrompt()).output")
    (style,) = [node for node in prompt.values() if node["class_type"] == "PEZ_ExtractStyle"]
    assert {name: style["inputs"][name] for name in NOW[STYLE]} == NOW[STYLE]


def test_widgets_that_a_subgraph_shows_are_renamed(editor: Editor):
    inside = [{"id": 5, "type": "PEZ_ImageToPrompt"}, {"id": 6, "type": "Another"}]
    shown = [["5", "preset"], ["5", "seed"], ["6", "preset"]]
    workflow = {
        "nodes": [{"id": 1, "type": "a-subgraph", "properties": {"proxyWidgets": shown}}],
        "definitions": {"subgraphs": [{"id": "a-subgraph", "nodes": inside}]},
    }
    updated = editor.page.evaluate(
        """async workflow => {
            const { loadRenames, updatePromoted } = await import("/extensions/pez/renames.js");
            await loadRenames();
            updatePromoted(workflow);
            return workflow;
        }""",
        workflow,
    )
    widgets = updated["nodes"][0]["properties"]["proxyWidgets"]
    assert widgets == [["5", "effort"], ["5", "seed"], ["6", "preset"]]
