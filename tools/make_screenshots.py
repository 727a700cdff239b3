"""Take the pictures of the README and the thumbnails of the example workflows.

    python tools/make_screenshots.py

Starts a real ComfyUI and a headless Chromium, as tests/comfyui do, and runs the left half of each
example, without the image model, on drawings that the bundled CLIP never saw.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.comfyui.browser import SETTINGS, Editor, chromium  # noqa: E402
from tests.comfyui.server import Client, ComfyServer  # noqa: E402

WORKFLOWS = ROOT / "example_workflows"
PICTURES = ROOT / "assets/screenshots"
BUNDLED = "bundled emoji CLIP (no download)"
LEARNERS = ("PEZ_ImageToPrompt", "PEZ_ExtractStyle", "PEZ_DistillPrompt", "PEZ_ConcatPrompts")
IMAGES = {
    "Image to image via a prompt": ["noto-fish.png"],
    "Style onto a new subject": ["fxemoji-dog.png", "fxemoji-bird.png", "fxemoji-foggy.png"],
    "Fuse two pictures": ["noto-parrot.png", "noto-wine-glass.png"],
    "Shorten a long prompt": [],
    "Sharpen a caption": ["noto-wine-glass.png"],
}
WIDTH = 920  # of two columns of the examples, which alone are shown


def left_half(workflow: dict[str, Any], images: Sequence[str]) -> dict[str, Any]:
    """The part that learns a prompt, with images and a CLIP that are here."""
    nodes = [node for node in workflow["nodes"] if node["pos"][0] < WIDTH]
    nodes = [node for node in nodes if node["type"] != "MarkdownNote"]
    kept = {node["id"] for node in nodes}
    links = [link for link in workflow["links"] if link[1] in kept and link[3] in kept]
    wires = {link[0] for link in links}
    top, files = 0, list(images)
    for node in nodes:
        for output in node["outputs"]:
            output["links"] = [wire for wire in output["links"] if wire in wires]
        if node["pos"][0] == 0:
            node["pos"][1], top = top, top + node["size"][1] + 60
        if node["type"] == "LoadImage":
            node["widgets_values"][0] = files.pop(0)
        elif node["type"] == "PEZ_LoadCLIP":
            node["widgets_values"][0] = BUNDLED
        elif node["type"] == "PrimitiveStringMultiline":
            node["widgets_values"] = ["a glass"]
    return workflow | {"nodes": nodes, "links": links}


def learned(editor: Editor) -> None:
    """Queue and wait until every prompt is there."""
    editor.queue()
    editor.page.wait_for_function(
        """() => app.rootGraph.nodes
            .filter(node => node.widgets?.some(widget => widget.name === "kept"))
            .every(node => node.widgets.find(widget => widget.name === "kept").value)""",
        timeout=180_000,
    )
    editor.page.wait_for_timeout(1500)


def picture(editor: Editor) -> Image.Image:
    """The graph, fitted into the window, without what stands around it."""
    editor.page.evaluate(
        """() => {
            const nodes = app.rootGraph.nodes.map(node => node.getBounding());
            const left = Math.min(...nodes.map(b => b[0])), top = Math.min(...nodes.map(b => b[1]));
            const right = Math.max(...nodes.map(b => b[0] + b[2]));
            const bottom = Math.max(...nodes.map(b => b[1] + b[3]));
            const ds = app.canvas.ds, scale = Math.min(1200 / (right - left), 780 / (bottom - top));
            ds.scale = scale;
            ds.offset = [200 / scale - left, 140 / scale - top];
            app.canvas.setDirty(true, true);
        }"""
    )
    editor.page.wait_for_timeout(1500)
    box = editor.page.evaluate(
        """() => {
            const ds = app.canvas.ds, nodes = app.rootGraph.nodes.map(node => node.getBounding());
            const canvas = app.canvas.canvas.getBoundingClientRect();
            const x = (value) => canvas.left + (value + ds.offset[0]) * ds.scale;
            const y = (value) => canvas.top + (value + ds.offset[1]) * ds.scale;
            return [
                x(Math.min(...nodes.map(b => b[0]))) - 20,
                y(Math.min(...nodes.map(b => b[1]))) - 20,
                x(Math.max(...nodes.map(b => b[0] + b[2]))) + 20,
                y(Math.max(...nodes.map(b => b[1] + b[3]))) + 20,
            ];
        }"""
    )
    screen = Image.open(io.BytesIO(editor.page.screenshot())).convert("RGB")
    return screen.crop(tuple(max(0, round(edge)) for edge in box))


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="comfyui-") as folder, chromium() as browser:
        inputs = Path(folder) / "input"
        inputs.mkdir()
        for name in {name for names in IMAGES.values() for name in names}:
            shutil.copy(ROOT / "examples" / name, inputs)
        with ComfyServer(Path(folder)) as server, Client(server.url) as client:
            for nodes2 in (False, True):
                shown = {"Comfy.VueNodes.Enabled": nodes2, "Comfy.Minimap.Visible": False}
                client.post("/settings", SETTINGS | shown)
                editor = Editor(browser, server.url)
                for name, images in IMAGES.items():
                    if nodes2 and name != "Fuse two pictures":
                        continue
                    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text())
                    editor.load(left_half(workflow, images))
                    learned(editor)
                    shown = picture(editor)
                    if nodes2:
                        shown.save(PICTURES / "nodes-2.png", optimize=True)
                        continue
                    if name == "Image to image via a prompt":
                        shown.save(PICTURES / "image-to-prompt.png", optimize=True)
                    shown.thumbnail((800, 800))
                    shown.save(WORKFLOWS / f"{name}.jpg", quality=88)
                editor.close()


if __name__ == "__main__":
    main()
