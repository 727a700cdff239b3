"""The example workflows: opened in the real page, queued as they come and on a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pez_core.options import IMAGE_WORDING
from tools.make_screenshots import left_half

from .browser import SETTINGS, Editor, chromium
from .server import ROOT, Client, ComfyServer
from .test_browser import queue_and_wait

FOLDER = ROOT / "example_workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
FIRST = "A first look"  # makes images without any further file
# for people with files of their own, without which they do not run
OWN_FILES = ("SDXL with your own files", "Sharpen a generated caption")


@pytest.fixture(scope="module")
def editor(server: ComfyServer, client: Client) -> Iterator[Editor]:
    client.post("/settings", SETTINGS).raise_for_status()
    with chromium() as browser:
        editor = Editor(browser, server.url)
        yield editor
        editor.close()


# pairs of nodes that cover each other, with the sizes that the open renderer gives them
COVERED = """() => {
    const scale = app.canvas.ds.scale;
    const boxes = app.rootGraph.nodes.map(node => {
        const [x, y, width, height] = node.getBounding();
        const shown = document.querySelector(`[data-node-id="${node.id}"]`);
        const drawn = shown ? shown.getBoundingClientRect().height / scale : 0;
        return [node.type, x, y, x + width, y + Math.max(height, drawn)];
    });
    return boxes.flatMap((a, k) => boxes.slice(k + 1)
        .filter(b => a[1] < b[3] && b[1] < a[3] && a[2] < b[4] && b[2] < a[4])
        .map(b => [a, b]));
}"""


def affordable(prompt: dict[str, Any], sd15: str) -> dict[str, Any]:
    """The same graph with models that this machine has, and as little work as possible."""
    prompt = json.loads(json.dumps(prompt))
    for node in prompt.values():
        values = node["inputs"]
        if node["class_type"] == "PEZ_LoadCLIP":
            assert values["model"] == "bundled emoji CLIP (no download)"
        elif node["class_type"] == "PEZ_CLIPFromModel":
            assert {"clip", "clip_vision"} == values.keys()
            bundled = {"model": "bundled emoji CLIP (no download)", "download": False}
            node["class_type"], node["inputs"] = "PEZ_LoadCLIP", bundled
        elif node["class_type"] == "TextGenerate":
            assert values["sampling_mode"] == "off" and values["max_length"] == 60
            assert {"clip", "image", "prompt"} <= values.keys()
            node["class_type"] = "PrimitiveStringMultiline"
            node["inputs"] = {"value": "a glass"}
        elif node["class_type"] == "CheckpointLoaderSimple":
            node["class_type"], node["inputs"] = "DiffusersLoader", {"model_path": sd15}
        elif "effort" in values:
            values |= {"effort": "paper", "steps": 5, "restarts": 2}
        elif node["class_type"] == "KSampler":
            values["steps"] = 1
        elif node["class_type"] == "EmptyLatentImage":
            values |= {"width": 64, "height": 64}
    unused = ("CLIPVisionLoader", "CLIPLoader")
    return {key: node for key, node in prompt.items() if node["class_type"] not in unused}


def images_of(outputs: dict[str, Any]) -> list[Any]:
    return [image for one in outputs.values() for image in one.get("images", [])]


def test_there_are_eight():
    assert len(WORKFLOWS) == 8 and {*OWN_FILES} < {path.stem for path in WORKFLOWS}
    for path in WORKFLOWS:
        thumbnail = path.with_suffix(".jpg")
        assert thumbnail.is_file(), f"{path.name} has no thumbnail"
        assert thumbnail.stat().st_size < 200_000
        notes = [n for n in json.loads(path.read_text())["nodes"] if n["type"] == "MarkdownNote"]
        assert notes
        for note in notes:
            text = note["widgets_values"][0]
            assert len(text) > 100
            # code is blue on blue in Nodes 2.0; the folders of the repository are not in a package
            assert "`" not in text and not re.search(r"examples?/|folder", text)


def test_the_drawings_of_the_examples_are_those_of_the_repository():
    """Renamed, so that they can be told from other files of the input folder."""
    drawings = {path.read_bytes() for path in (ROOT / "examples").glob("*.png")}
    brought = sorted((ROOT / "web/examples").glob("*.png"))
    assert brought and all(path.read_bytes() in drawings for path in brought)
    loaders = [
        node["widgets_values"][0]
        for path in WORKFLOWS
        for node in json.loads(path.read_text())["nodes"]
        if node["type"] == "LoadImage"
    ]
    assert {*loaders} == {path.name for path in brought}
    style = json.loads((FOLDER / "Style onto a new subject.json").read_text())["nodes"]
    images = [node["widgets_values"][0] for node in style if node["type"] == "LoadImage"]
    assert len(set(images)) == len(images) == 3


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_runs_as_it_comes(path: Path, editor: Editor, client: Client, sd15: str):
    """Without a checkpoint; and then with one that this machine has."""
    if (
        "TextGenerate" in path.read_text()
        and "TextGenerate" not in client.get("/object_info").json()
    ):
        pytest.skip("this ComfyUI has no Generate Text")
    editor.load(json.loads(path.read_text()))
    assert editor.page.evaluate(COVERED) == []
    if path.stem not in OWN_FILES:
        untouched = queue_and_wait(editor, client)
        assert untouched["status"]["status_str"] == "success"
        (learned,) = [outputs for outputs in untouched["outputs"].values() if "pez" in outputs]
        assert learned["text"][0]
        assert len(images_of(untouched["outputs"])) == (4 if path.stem == FIRST else 0)

    editor.page.evaluate("() => app.rootGraph.nodes.forEach(node => { node.mode = 0; })")
    prompt = editor.page.evaluate("async () => (await app.graphToPrompt()).output")
    learner = next(
        node for node in prompt.values() if node["class_type"] in (
            "PEZ_ImageToPrompt", "PEZ_ExtractStyle", "PEZ_DistillPrompt", "PEZ_ConcatPrompts"
        )
    )  # fmt: skip
    # every widget got its own value, none that of a neighbour
    values = learner["inputs"]
    assert (values["effort"], values["restarts"], values["seed"]) == ("balanced", 1, 0)
    assert (values["readability"], values["time_limit"], values["steps"]) == (0, 0, 3000)
    writes = learner["class_type"] == "PEZ_ImageToPrompt"
    assert values["wording"] == (IMAGE_WORDING if writes else "free")
    assert (values["lr"], values["weight_decay"], values["patience"]) == (0.1, 0.1, 0)
    assert (values["keep"], values["kept"], values["block"]) == (False, "", "")

    run = client.run(affordable(prompt, sd15), timeout=200)
    assert run.status == "success", run.error
    (learned,) = [outputs for outputs in run.outputs.values() if "pez" in outputs]
    expected = {FIRST: 4, "Style onto a new subject": 2}.get(path.stem, 1)
    assert learned["text"][0] and len(images_of(run.outputs)) == expected
    # the page looks up the size of the checkpoint, which is not on this disk
    assert [c for c in editor.complaints if "huggingface.co" not in c] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_screenshots_show_the_half_that_learns(path: Path):
    workflow = json.loads(path.read_text())
    kinds = [node["type"] for node in left_half(workflow)["nodes"]]
    assert any(kind.startswith("PEZ_") for kind in kinds)
    assert not {"MarkdownNote", "KSampler"} & {*kinds}


def test_nothing_covers_anything_in_nodes_2(editor: Editor, client: Client):
    client.post("/settings", {"Comfy.VueNodes.Enabled": True}).raise_for_status()
    editor.reload()
    for path in WORKFLOWS:
        editor.load(json.loads(path.read_text()))
        editor.page.wait_for_timeout(800)  # the nodes grow with their content
        assert editor.page.locator("[data-node-id]").count()
        assert editor.page.evaluate(COVERED) == [], path.stem
    client.post("/settings", {"Comfy.VueNodes.Enabled": False}).raise_for_status()


def test_the_server_offers_them(client: Client):
    offered = client.get("/workflow_templates").json()["pez"]
    assert sorted(offered) == [path.stem for path in WORKFLOWS]
