"""The example workflows: opened in the real page, queued on a real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import SETTINGS, Editor, chromium
from .server import ROOT, Client, ComfyServer

FOLDER = ROOT / "example_workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def editor(server: ComfyServer, client: Client) -> Iterator[Editor]:
    client.post("/settings", SETTINGS).raise_for_status()
    with chromium() as browser:
        editor = Editor(browser, server.url)
        yield editor
        editor.close()


def affordable(prompt: dict[str, Any], sd15: str) -> dict[str, Any]:
    """The same graph with models that this machine has, and as little work as possible."""
    prompt = json.loads(json.dumps(prompt))
    for node in prompt.values():
        values = node["inputs"]
        if node["class_type"] == "PEZ_LoadCLIP":
            values["model"] = "bundled emoji CLIP (no download)"
        elif node["class_type"] == "CheckpointLoaderSimple":
            node["class_type"], node["inputs"] = "DiffusersLoader", {"model_path": sd15}
        elif node["class_type"].startswith("PEZ_"):
            values |= {"effort": "paper", "steps": 5, "restarts": 2}
        elif node["class_type"] == "KSampler":
            values["steps"] = 1
        elif node["class_type"] == "EmptyLatentImage":
            values |= {"width": 64, "height": 64}
    return prompt


def test_there_are_five():
    assert len(WORKFLOWS) == 5
    for path in WORKFLOWS:
        assert path.with_suffix(".jpg").is_file(), f"{path.name} has no thumbnail"
        notes = [n for n in json.loads(path.read_text())["nodes"] if n["type"] == "MarkdownNote"]
        assert notes and all(len(note["widgets_values"][0]) > 100 for note in notes)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_opens_and_runs(
    path: Path, editor: Editor, server: ComfyServer, client: Client, sd15: str
):
    shutil.copy(ROOT / "examples/noto-fish.png", server.folder / "input/example.png")
    saved = json.loads(path.read_text())
    editor.load(saved)
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
    assert (values["lr"], values["weight_decay"], values["patience"]) == (0.1, 0.1, 0)
    assert (values["keep"], values["kept"], values["block"]) == (False, "", "")

    run = client.run(affordable(prompt, sd15), timeout=200)
    assert run.status == "success", run.error
    (learned,) = [outputs for outputs in run.outputs.values() if "pez" in outputs]
    images = [image for outputs in run.outputs.values() for image in outputs.get("images", [])]
    subjects = 2 if "style" in path.stem.lower() else 1
    assert learned["text"][0] and len(images) == subjects
    # the page looks up the size of the checkpoint, which is not on this disk
    assert [c for c in editor.complaints if "huggingface.co" not in c] == []


def test_the_server_offers_them(client: Client):
    offered = client.get("/workflow_templates").json()["pez"]
    assert sorted(offered) == [path.stem for path in WORKFLOWS]
