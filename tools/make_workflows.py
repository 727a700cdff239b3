"""Write the example workflows: python tools/make_workflows.py URL_OF_A_RUNNING_COMFYUI

They are graphs as the page saves them, laid out in columns, each with a note. The server lists the
sockets and widgets of the nodes, so that the workflows fit them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

FOLDER = Path(__file__).parent.parent / "example_workflows"
COLUMN, GAP = 420, 40
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
CHECKPOINT_URL = (
    "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/" + CHECKPOINT
)
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
HEIGHTS = {
    "MarkdownNote": 460,
    "LoadImage": 320,
    "CLIPTextEncode": 140,
    "KSampler": 280,
    "SaveImage": 400,
    "PreviewAny": 140,
    "PEZ_LoadCLIP": 110,
    "PEZ_ImageToPrompt": 620,
    "PEZ_ExtractStyle": 620,
    "PEZ_DistillPrompt": 620,
    "PEZ_ConcatPrompts": 660,
    "PrimitiveStringMultiline": 160,
}


@dataclass
class Node:
    """A node to be; inputs are values of widgets, or `(node, output name)` for wires."""

    type: str
    column: int
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    models: list[dict[str, str]] = field(default_factory=list)


class Graph:
    """Nodes and wires as the page saves them."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.heights: dict[int, int] = {}
        self.made: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def add(self, node: Node) -> Node:
        """Place a node under those of its column and wire it."""
        number = len(self.nodes) + 1
        info = self._info(node.type)
        saved = {
            "id": number,
            "type": node.type,
            "pos": [node.column * (COLUMN + GAP), self.heights.get(node.column, 0)],
            "size": [COLUMN, HEIGHTS.get(node.type, 120)],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [],
            "outputs": [
                {"name": name, "type": kind, "links": []}
                for name, kind in zip(info["output_name"], info["output"], strict=True)
            ],
            "properties": {"Node name for S&R": node.type},
            "widgets_values": [],
        }
        if node.title:
            saved["title"] = node.title
        if node.models:
            saved["properties"]["models"] = node.models
        self.heights[node.column] = saved["pos"][1] + saved["size"][1] + 60
        self.nodes.append(saved)
        self.made[id(node)] = saved, info
        for kind in ("required", "optional"):
            for name, (what, *options) in info["input"].get(kind, {}).items():
                self._fill(saved, node, name, what, options[0] if options else {})
        unknown = {name.partition(".")[0] for name in node.inputs} - self._names(info)
        if unknown:
            raise ValueError(f"{node.type} has no inputs {sorted(unknown)}")
        return node

    def to_json(self) -> dict[str, Any]:
        # no id: the page gives one to each copy that is opened
        return {
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [40, 40]}},
            "version": 0.4,
        }

    def _info(self, kind: str) -> dict[str, Any]:
        if kind == "MarkdownNote":  # a node of the page alone
            return {"input": {"required": {"": ["STRING", {}]}}, "output": [], "output_name": []}
        return requests.get(f"{self.server}/object_info/{kind}", timeout=30).json()[kind]

    @staticmethod
    def _names(info: dict[str, Any]) -> set[str]:
        return {name for kind in info["input"].values() for name in kind}

    def _fill(self, saved: dict, node: Node, name: str, what: Any, options: dict) -> None:
        if what == "COMFY_AUTOGROW_V3":  # as many sockets as there are wires
            ((kind, *_),) = options["template"]["input"]["required"].values()
            for grown in [grown for grown in node.inputs if grown.startswith(f"{name}.")]:
                saved["inputs"].append({"name": grown, "type": kind, "link": None})
                saved["inputs"][-1]["link"] = self._link(saved, *node.inputs[grown])
            return
        value = node.inputs.get(name)
        is_widget = isinstance(what, list) or what in WIDGETS
        if isinstance(value, tuple) or not is_widget:
            slot = {"name": name, "type": "COMBO" if isinstance(what, list) else what, "link": None}
            if is_widget:
                slot["widget"] = {"name": name}
            saved["inputs"].append(slot)
            if value is not None:
                slot["link"] = self._link(saved, *value)
        if not is_widget:
            return
        if value is None or isinstance(value, tuple):
            choices = what if isinstance(what, list) else options.get("options", [""])
            value = options.get("default", choices[0] if choices else "")
        saved["widgets_values"].append(value)
        if options.get("control_after_generate"):
            saved["widgets_values"].append("fixed")
        if options.get("image_upload"):
            saved["widgets_values"].append("image")

    def _link(self, target: dict[str, Any], source: Node, output: str) -> int:
        saved, info = self.made[id(source)]
        slot = info["output_name"].index(output)
        number = len(self.links) + 1
        position = len(target["inputs"]) - 1
        kind = info["output"][slot]
        self.links.append([number, saved["id"], slot, target["id"], position, kind])
        saved["outputs"][slot]["links"].append(number)
        return number


def _start(graph: Graph, title: str, text: str) -> Node:
    """The note and the CLIP that every example has."""
    note = f"# {title}\n\n{ONCE}\n{text}\n\n{ALWAYS}"
    graph.add(Node("MarkdownNote", 0, {"": note}, title="Read me"))
    return graph.add(Node("PEZ_LoadCLIP", 0, {"model": "SD 1.5 (ViT-L/14)"}))


def _image(graph: Graph, title: str = "Your image") -> Node:
    return graph.add(Node("LoadImage", 0, {"image": "example.png"}, title=title))


def _paint(graph: Graph, learned: Node, column: int) -> None:
    """What makes an image of a prompt, with Stable Diffusion 1.5."""
    models = [{"name": CHECKPOINT, "url": CHECKPOINT_URL, "directory": "checkpoints"}]
    checkpoint = graph.add(
        Node("CheckpointLoaderSimple", column, {"ckpt_name": CHECKPOINT}, models=models)
    )
    clip = (checkpoint, "CLIP")
    positive = graph.add(
        Node("CLIPTextEncode", column, {"clip": clip, "text": (learned, "prompt")}, "Prompt")
    )
    negative = graph.add(
        Node("CLIPTextEncode", column, {"clip": clip, "text": "text, watermark"}, "Negative prompt")
    )
    latent = graph.add(Node("EmptyLatentImage", column))
    sampler = graph.add(
        Node(
            "KSampler",
            column + 1,
            {
                "model": (checkpoint, "MODEL"),
                "positive": (positive, "CONDITIONING"),
                "negative": (negative, "CONDITIONING"),
                "latent_image": (latent, "LATENT"),
                "cfg": 7.0,
            },
        )
    )
    image = graph.add(
        Node("VAEDecode", column + 1, {"samples": (sampler, "LATENT"), "vae": (checkpoint, "VAE")})
    )
    graph.add(Node("SaveImage", column + 1, {"images": (image, "IMAGE"), "filename_prefix": "PEZ"}))


ONCE = """\
**Once:** in **PEZ Load CLIP** turn on **download** (1.71 GB; it may stay on). In **Load
Checkpoint** choose a model of the Stable Diffusion 1.5 family. To try PEZ without a download,
choose the bundled emoji CLIP and a drawing of an animal or a thing. It was trained on emoji
drawings alone, so do not judge PEZ by its prompts.
"""
ALWAYS = """\
A learned prompt reads like word salad. That is normal: the search chooses words by their CLIP
features together. Judge the prompt by the images. Not happy? Change **seed** and run again; without
a change nothing runs.

For advanced inputs: **Show advanced inputs** at the bottom of the node, or **Show Advanced** in its
right-click menu.
"""


def image_to_image_via_prompt(graph: Graph) -> None:
    clip = _start(
        graph,
        "An image becomes a prompt becomes images",
        "1. Choose your image.\n2. Run. Watch the prompt emerge; **Finish now** ends the search "
        "with the best so far.\n3. Click words that you do not want, and run again.\n\n"
        "The new image shares subject, mood and style; it does not copy layout, face or pose.\n\n"
        "The node stores the prompt of every finished run. Turn on **keep** after a run that you "
        "like: the node then repeats that prompt whatever you change, and everyone who opens the "
        "workflow gets it without the CLIP and without your image.\n\n"
        "To choose among several prompts, set **restarts** to 4 and wire **candidates** instead of "
        "**prompt** to **CLIP Text Encode**: you get an image of each, the most similar first.",
    )
    image = _image(graph)
    learned = graph.add(
        Node("PEZ_ImageToPrompt", 1, {"clip": (clip, "clip"), "images": (image, "IMAGE")})
    )
    _paint(graph, learned, 2)


def style_onto_a_new_subject(graph: Graph) -> None:
    clip = _start(
        graph,
        "A style for new subjects",
        "1. Replace **all** the images: different subjects, one style. Six do well; add **Load "
        "Image** nodes to **Batch Images**.\n"
        "2. Write subjects, one per line: each becomes a prompt and an image.\n3. Run.\n\n"
        "With **keep** on you can change the subjects without a new search.",
    )
    images = [_image(graph, f"Style image {k}") for k in (1, 2, 3)]
    batch = graph.add(
        Node(
            "BatchImagesNode",
            1,
            {f"images.image{k}": (image, "IMAGE") for k, image in enumerate(images)},
        )
    )
    style = graph.add(
        Node(
            "PEZ_ExtractStyle",
            1,
            {
                "clip": (clip, "clip"),
                "images": (batch, "IMAGE"),
                "subject": "a lighthouse\na sleeping fox",
            },
        )
    )
    _paint(graph, style, 2)


def fuse_two_pictures(graph: Graph) -> None:
    clip = _start(
        graph,
        "Two pictures in one prompt",
        "Replace both images. The node learns one prompt that is similar to both. A text in "
        "**prompt_1** is one more source; it does not stay word for word. **weights** sets how "
        "much each source counts: first the texts, then the images.",
    )
    first, second = (_image(graph, f"Picture {k}") for k in (1, 2))
    fused = graph.add(
        Node(
            "PEZ_ConcatPrompts",
            1,
            {
                "clip": (clip, "clip"),
                "images_1": (first, "IMAGE"),
                "images_2": (second, "IMAGE"),
            },
        )
    )
    _paint(graph, fused, 2)


LONG = (
    "masterpiece, a breathtaking wide view of an old stone lighthouse on a cliff above a stormy "
    "sea, huge waves breaking on black rocks, seagulls in the wind, dramatic clouds lit by the "
    "last light of the evening, warm light in the windows, tiny figure with a lantern on the "
    "stairs, highly detailed oil painting in the manner of the romantic masters, rich colours, "
    "visible brush strokes, golden ratio, (volumetric light:1.2)"
)


def shorten_a_long_prompt(graph: Graph) -> None:
    clip = _start(
        graph,
        "A long prompt, shortened",
        "**ratio** sets the new length. Weights such as (word:1.2), LoRA tags, embeddings and "
        "BREAK stay as they are.\n\n**tokens_saved** counts the tokens that became free.",
    )
    short = graph.add(Node("PEZ_DistillPrompt", 1, {"clip": (clip, "clip"), "text": LONG}))
    graph.add(Node("PreviewAny", 1, {"source": (short, "tokens_saved")}, title="Tokens saved"))
    _paint(graph, short, 2)


def sharpen_a_caption(graph: Graph) -> None:
    clip = _start(
        graph,
        "A caption, and the words that it missed",
        "Put your captioner node (Florence, BLIP, JoyCaption, ...) in place of **Caption**. The "
        "caption stays; a few learned words add what it left out. A caption may have any "
        "length; CLIP reads 75 tokens at a time.",
    )
    image = _image(graph)
    caption = graph.add(
        Node(
            "PrimitiveStringMultiline",
            0,
            {"value": "a girl with fox ears in a forest"},
            title="Caption (your captioner goes here)",
        )
    )
    learned = graph.add(
        Node(
            "PEZ_ImageToPrompt",
            1,
            {
                "clip": (clip, "clip"),
                "images": (image, "IMAGE"),
                "caption": (caption, "STRING"),
                "prompt_len": 6,
            },
        )
    )
    _paint(graph, learned, 2)


WORKFLOWS = {
    "Image to image via a prompt": image_to_image_via_prompt,
    "Style onto a new subject": style_onto_a_new_subject,
    "Fuse two pictures": fuse_two_pictures,
    "Shorten a long prompt": shorten_a_long_prompt,
    "Sharpen a caption": sharpen_a_caption,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="URL of a running ComfyUI that has this pack")
    server = parser.parse_args().server.rstrip("/")
    FOLDER.mkdir(exist_ok=True)
    for name, build in WORKFLOWS.items():
        graph = Graph(server)
        build(graph)
        text = json.dumps(graph.to_json(), indent=1, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
