"""Write the example workflows: python tools/make_workflows.py URL_OF_A_RUNNING_COMFYUI

They are graphs as the page saves them, laid out in columns, each with a note. The server lists the
sockets and widgets of the nodes, so that the workflows fit them. Each learns with the bundled CLIP
from drawings in web/examples, which the page puts into the input folder. The first one makes
images with the bundled image model. In the others the nodes that make images need a checkpoint, and
are muted until a person has one. Two are for people who have files of their own, and do not run
without.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from pez_core.version import read_version

FOLDER = Path(__file__).parent.parent / "example_workflows"
COLUMN, GAP = 420, 40
BUNDLED = "bundled emoji CLIP (no download)"
PAINT = "Make images"
MUTED = 2
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
CHECKPOINT_URL = (
    "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/" + CHECKPOINT
)
BUNDLED = "bundled emoji CLIP (no download)"
SDXL = "sd_xl_base_1.0.safetensors"
SDXL_URL = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/" + SDXL
VISION = "clip_vision_g.safetensors"
VISION_URL = "https://huggingface.co/comfyanonymous/clip_vision_g/resolve/main/" + VISION
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
# those that the page gives them at least, in the taller one of its two renderers
HEIGHTS = {
    "MarkdownNote": 540,
    "LoadImage": 340,
    "CLIPTextEncode": 160,
    "CheckpointLoaderSimple": 160,
    "CLIPLoader": 150,
    "TextGenerate": 340,
    "EmptyLatentImage": 170,
    "KSampler": 330,
    "ImageScaleBy": 150,
    "SaveImage": 400,
    "PreviewAny": 200,
    "PEZ_LoadCLIP": 150,
    "PEZ_CLIPFromModel": 150,
    "PEZ_EmojiModel": 120,
    "PEZ_ImageToPrompt": 770,
    "PEZ_ExtractStyle": 770,
    "PEZ_DistillPrompt": 770,
    "PEZ_ConcatPrompts": 860,
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
        self.groups: list[dict[str, Any]] = []
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
            "properties": {"Node name for S&R": node.type, **_origin(node.type)},
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

    def mute(self, title: str, first: int) -> None:
        """Mute the nodes from the first of these columns on, in a frame."""
        nodes = [node for node in self.nodes if node["pos"][0] >= first * (COLUMN + GAP)]
        for node in nodes:
            node["mode"] = MUTED
        left = min(node["pos"][0] for node in nodes)
        right = max(node["pos"][0] + node["size"][0] for node in nodes)
        bottom = max(node["pos"][1] + node["size"][1] for node in nodes)
        box = [left - 20, -90, right - left + 40, bottom + 110]
        self.groups.append({"id": 1, "title": title, "bounding": box, "flags": {}})

    def to_json(self) -> dict[str, Any]:
        # no id: the page gives one to each copy that is opened
        return {
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
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
    note = f"# {title}\n\n{FIRST}\n{text}\n\n{ALWAYS}"
    # the page drops the space of a line break behind bold text
    note = re.sub(r"(?<!\n)\n(?![\n\d])", " ", note).strip()
    graph.add(Node("MarkdownNote", 0, {"": note}, title="Read me"))
    return graph.add(Node("PEZ_LoadCLIP", 0, {"model": BUNDLED}))


def _image(graph: Graph, drawing: str, title: str = "Your image") -> Node:
    return graph.add(Node("LoadImage", 0, {"image": f"pez-{drawing}.png"}, title=title))


def _paint(graph: Graph, learned: Node, column: int) -> None:
    """What makes an image of a prompt, with Stable Diffusion 1.5; muted."""
    models = [{"name": CHECKPOINT, "url": CHECKPOINT_URL, "directory": "checkpoints"}]
    checkpoint = graph.add(
        Node("CheckpointLoaderSimple", column, {"ckpt_name": CHECKPOINT}, models=models)
    )
    _paint_with(graph, checkpoint, learned, column, "text, watermark", {}, {"cfg": 7.0})


def _paint_with(
    graph: Graph,
    checkpoint: Node,
    learned: Node,
    column: int,
    negative_prompt: str,
    size: dict[str, int],
    sampling: dict[str, Any],
    muted: bool = True,
    scale_by: float = 1.0,
) -> None:
    """What makes an image of a prompt.

    Args:
        graph: to add nodes to.
        checkpoint: gives MODEL, CLIP and VAE.
        learned: gives the prompt.
        column: of the first nodes.
        negative_prompt: text.
        size, sampling: inputs of the empty latent and of the sampler.
        muted: mute it, in a frame.
        scale_by: enlarge the images, whose preview has their own size.
    """
    clip = (checkpoint, "CLIP")
    positive = graph.add(
        Node("CLIPTextEncode", column, {"clip": clip, "text": (learned, "prompt")}, "Prompt")
    )
    negative = graph.add(
        Node("CLIPTextEncode", column, {"clip": clip, "text": negative_prompt}, "Negative prompt")
    )
    latent = graph.add(Node("EmptyLatentImage", column, dict(size)))
    sampler = graph.add(
        Node(
            "KSampler",
            column + 1,
            {
                "model": (checkpoint, "MODEL"),
                "positive": (positive, "CONDITIONING"),
                "negative": (negative, "CONDITIONING"),
                "latent_image": (latent, "LATENT"),
                **sampling,
            },
        )
    )
    image = graph.add(
        Node("VAEDecode", column + 1, {"samples": (sampler, "LATENT"), "vae": (checkpoint, "VAE")})
    )
    if scale_by != 1:
        inputs = {"image": (image, "IMAGE"), "upscale_method": "bicubic", "scale_by": scale_by}
        image = graph.add(Node("ImageScaleBy", column + 1, inputs))
    graph.add(Node("SaveImage", column + 1, {"images": (image, "IMAGE"), "filename_prefix": "PEZ"}))
    if muted:
        graph.mute(PAINT, column)


FIRST = f"""\
**Try it:** press **Run**. It works as it is, with a small CLIP that comes along, which has learned
emoji drawings alone: do not judge PEZ by its words.

**For your own images:** in **PEZ Load CLIP** choose **SD 1.5 (ViT-L/14)** and turn on **download**
(1.71 GB, once). In **Load Checkpoint** choose a model of the Stable Diffusion 1.5 family. Then
right-click the frame **{PAINT}** and choose **Set Group Nodes to Always**.
"""
ALWAYS = """\
A learned prompt may say odd things. That is normal: it says what the CLIP finds most similar, not
what a person would. Judge the prompt by the images. Not happy? Change **seed** and run again;
without a change nothing runs.

For advanced inputs: **Show advanced inputs** at the bottom of the node, or **Show Advanced** in its
right-click menu.
"""


def first_look(graph: Graph) -> None:
    note = (
        "# A first look, without a download\n\n1. Run. Watch the prompt emerge, and the images "
        "that the demo model makes of it.\n2. Choose another drawing of one thing on white, and "
        "run again.\n3. For images of your own open the template *Image to image via a prompt* "
        "(SD 1.5) or *SDXL with your own files*.\n\nThe bundled CLIP and **PEZ Emoji Model "
        "(demo)** belong together. Both were trained on emoji drawings alone, so do not judge PEZ "
        "by their images of photos.\n\n"
        f"{ALWAYS}"
    )
    graph.add(Node("MarkdownNote", 0, {"": note}, title="Read me"))
    clip = graph.add(Node("PEZ_LoadCLIP", 0, {"model": BUNDLED}))
    image = _image(graph, "face-with-tongue", "Your drawing")
    inputs = {"clip": (clip, "clip"), "images": (image, "IMAGE"), "prompt_len": 8}
    learned = graph.add(Node("PEZ_ImageToPrompt", 1, inputs))
    model = graph.add(Node("PEZ_EmojiModel", 2))
    sampling = {"steps": 25, "cfg": 4.0, "sampler_name": "ddim", "scheduler": "ddim_uniform"}
    size = {"width": 64, "height": 64, "batch_size": 4}
    _paint_with(graph, model, learned, 2, "", size, sampling, muted=False, scale_by=4.0)


def image_to_image_via_prompt(graph: Graph) -> None:
    clip = _start(
        graph,
        "An image becomes a prompt becomes images",
        "1. Choose your image.\n2. Run. Watch the prompt emerge; **Finish now** ends the search "
        "with the best so far.\n3. Click words that you do not want, and run again.\n\n"
        "The new image shares subject, mood and style; it does not copy layout, face or pose.\n\n"
        "The node stores the prompt of every finished run. Turn on **keep** after a run that you "
        "like: the node then repeats that prompt whatever you change, and everyone who opens the "
        "workflow gets it without the CLIP and without your image. A click on an earlier prompt, "
        "below the words, brings that one back.\n\n"
        "To choose among several prompts, set **restarts** to 4 and wire **candidates** instead of "
        "**prompt** to **CLIP Text Encode**: you get an image of each. A click on a candidate "
        "uses it.",
    )
    image = _image(graph, "dog")
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
    drawings = ("anchor", "bird", "heart-with-ribbon")
    images = [_image(graph, name, f"Style image {k}") for k, name in enumerate(drawings, start=1)]
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
    first = _image(graph, "musical-note", "Picture 1")
    second = _image(graph, "wine-glass", "Picture 2")
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


def _sharpened(
    graph: Graph, clip: Node, image: Node, caption: tuple[Node, str], column: int
) -> Node:
    """What adds a few learned words to a caption."""
    inputs = {"clip": (clip, "clip"), "images": (image, "IMAGE"), "caption": caption}
    return graph.add(Node("PEZ_ImageToPrompt", column, inputs | {"prompt_len": 6}))


def sharpen_a_caption(graph: Graph) -> None:
    clip = _start(
        graph,
        "A caption, and the words that it missed",
        "Put your captioner node (Florence, BLIP, JoyCaption, ...) in place of **Caption**. The "
        "caption stays; a few learned words add what it left out.\n\n**clean_caption** leaves out "
        "phrases such as The image shows, and cuts captions that are longer than the CLIP reads, "
        "with a remark below the words. **prune_caption** drops the words that lower the "
        "similarity with the image. Both are advanced inputs.",
    )
    image = _image(graph, "wine-glass")
    caption = graph.add(
        Node(
            "PrimitiveStringMultiline",
            0,
            {"value": "a glass"},
            title="Caption (your captioner goes here)",
        )
    )
    learned = _sharpened(graph, clip, image, (caption, "STRING"), 1)
    _paint(graph, learned, 2)


def _origin(kind: str) -> dict[str, str]:
    """The registry's name of the pack that has a node, and its version, as the page saves them."""
    if kind.startswith("PEZ_"):
        return {"cnr_id": "pez-core", "ver": read_version()}
    return {"cnr_id": "comfy-core"}


def _own_files(graph: Graph, title: str, text: str) -> tuple[Node, Node]:
    """The note, and the files of a person with SDXL: the checkpoint and its CLIP Vision."""
    note = re.sub(r"(?<!\n)\n(?![\n\d])", " ", f"# {title}\n\n{text}\n\n{ALWAYS}").strip()
    graph.add(Node("MarkdownNote", 0, {"": note}, title="Read me"))
    checkpoint = graph.add(
        Node(
            "CheckpointLoaderSimple",
            0,
            {"ckpt_name": SDXL},
            title="1. Your checkpoint",
            models=[{"name": SDXL, "url": SDXL_URL, "directory": "checkpoints"}],
        )
    )
    vision = graph.add(
        Node(
            "CLIPVisionLoader",
            0,
            {"clip_name": VISION},
            title="2. Its CLIP Vision",
            models=[{"name": VISION, "url": VISION_URL, "directory": "clip_vision"}],
        )
    )
    return checkpoint, vision


def _own_clip(graph: Graph, checkpoint: Node, vision: Node, column: int) -> Node:
    wires = {"clip": (checkpoint, "CLIP"), "clip_vision": (vision, "CLIP_VISION")}
    return graph.add(Node("PEZ_CLIPFromModel", column, wires))


FILES = """\
**You need:** a checkpoint of the SDXL family (Pony, Illustrious, NoobAI, ...) and clip_vision_g
(3.7 GB, which IPAdapter uses, too). Nothing else is downloaded: **PEZ CLIP from Model** searches on
the text encoder inside of your checkpoint. LoRAs belong between the checkpoint and it.

1. Below, choose your checkpoint.
2. Choose clip_vision_g as its CLIP Vision.
3. Choose your image.
"""


def sdxl_with_your_own_files(graph: Graph) -> None:
    checkpoint, vision = _own_files(
        graph,
        "An image becomes a prompt, with your own SDXL files",
        f"{FILES}4. Run. Watch the prompt emerge; **Finish now** ends the search with the best so "
        "far.\n5. Click words that you do not want, and run again.\n\n"
        "For Stable Diffusion 1.5 take a whole ViT-L/14 as CLIP Vision (1.71 GB).",
    )
    image = _image(graph, "dog", "3. Your image")
    clip = _own_clip(graph, checkpoint, vision, 1)
    learned = graph.add(
        Node("PEZ_ImageToPrompt", 1, {"clip": (clip, "clip"), "images": (image, "IMAGE")})
    )
    size = {"width": 1024, "height": 1024}
    _paint_with(graph, checkpoint, learned, 2, "text, watermark", size, {"cfg": 6.0}, muted=False)


def sharpen_a_generated_caption(graph: Graph) -> None:
    checkpoint, vision = _own_files(
        graph,
        "A caption by a language model, sharpened",
        f"{FILES}4. Choose a language model that reads images, such as Gemma or Qwen-VL. "
        "**Generate Text** describes the image with it. Its sentence stays, and PEZ adds a few "
        "words for what it left out.\n5. Run.\n\nAny other captioner will do: connect its text to "
        "**caption**.",
    )
    image = _image(graph, "wine-glass", "3. Your image")
    writer = graph.add(Node("CLIPLoader", 0, {"clip_name": ""}, title="4. Your language model"))
    caption = graph.add(
        Node(
            "TextGenerate",
            1,
            {
                "clip": (writer, "CLIP"),
                "prompt": "Describe this image in one short sentence.",
                "image": (image, "IMAGE"),
                "max_length": 60,
                "sampling_mode": "off",
            },
        )
    )
    clip = _own_clip(graph, checkpoint, vision, 1)
    learned = _sharpened(graph, clip, image, (caption, "generated_text"), 2)
    size = {"width": 1024, "height": 1024}
    _paint_with(graph, checkpoint, learned, 3, "text, watermark", size, {"cfg": 6.0}, muted=False)


WORKFLOWS = {
    "A first look": first_look,
    "Image to image via a prompt": image_to_image_via_prompt,
    "Style onto a new subject": style_onto_a_new_subject,
    "Fuse two pictures": fuse_two_pictures,
    "Shorten a long prompt": shorten_a_long_prompt,
    "Sharpen a caption": sharpen_a_caption,
    "SDXL with your own files": sdxl_with_your_own_files,
    "Sharpen a generated caption": sharpen_a_generated_caption,
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
