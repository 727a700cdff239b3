"""Take the pictures of the README and of docs/comfyui.md.

    python tools/make_screenshots.py ["A first look" ...]

Starts a real ComfyUI and a headless Chromium, as tests/comfyui do, and runs the example with the
bundled image model, and the left half of two others, without an image model.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
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
# the example, whether all of it is shown, whether in Nodes 2.0, and the file
SHOWN = (
    ("A first look", True, False, "first-look.png"),
    ("Image to image via a prompt", False, False, "image-to-prompt.png"),
    ("Fuse two pictures", False, True, "nodes-2.png"),
)
WIDTH = 920  # of two columns of the examples, which alone are shown


def left_half(workflow: dict[str, Any]) -> dict[str, Any]:
    """The part that learns a prompt, without the note."""
    nodes = [node for node in workflow["nodes"] if node["pos"][0] < WIDTH]
    nodes = [node for node in nodes if node["type"] != "MarkdownNote"]
    kept = {node["id"] for node in nodes}
    links = [link for link in workflow["links"] if link[1] in kept and link[3] in kept]
    wires = {link[0] for link in links}
    top = 0
    for node in nodes:
        for output in node["outputs"]:
            output["links"] = [wire for wire in output["links"] if wire in wires]
        if node["pos"][0] == 0:
            node["pos"][1], top = top, top + node["size"][1] + 60
    return workflow | {"nodes": nodes, "links": links, "groups": []}


def learned(editor: Editor) -> None:
    """Queue and wait until every prompt is there, and every image."""
    editor.queue()
    editor.page.wait_for_function(
        """() => app.rootGraph.nodes
            .filter(node => node.widgets?.some(widget => widget.name === "kept"))
            .every(node => node.widgets.find(widget => widget.name === "kept").value)""",
        timeout=600_000,
    )
    editor.page.wait_for_function(
        """() => app.rootGraph.nodes
            .filter(node => node.type === "SaveImage").every(node => node.imgs?.length)""",
        timeout=600_000,
    )
    editor.page.wait_for_timeout(8000)  # until the page no longer shows that a job is completed


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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of examples; default: all")
    names = parser.parse_args().names
    PICTURES.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix="comfyui-") as folder,
        chromium() as browser,
        ComfyServer(Path(folder), timeout=300) as server,
        Client(server.url) as client,
    ):
        for name, whole, nodes2, file in SHOWN:
            if names and name not in names:
                continue
            shown = {"Comfy.VueNodes.Enabled": nodes2, "Comfy.Minimap.Visible": False}
            client.post("/settings", SETTINGS | shown)
            editor = Editor(browser, server.url)
            workflow = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))
            editor.load(workflow if whole else left_half(workflow))
            learned(editor)
            picture(editor).quantize(256).save(PICTURES / file, optimize=True)
            editor.close()


if __name__ == "__main__":
    main()
