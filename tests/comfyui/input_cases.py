"""Runs every node with one input changed at a time; `test_inputs.py` starts it inside of ComfyUI.

The whole node runs, with a real CLIP, a short search and a fake clock. Inputs that ComfyUI fetches
only on demand arrive only where the node asks for them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import folder_paths
import torch
from own_models import ImageTower, emoji_clip
from pez_pack import nodes
from pez_pack.nodes import emoji_diffusion, learning, live, loading, memory, models
from pez_pack.pez_core import Vocabulary, best, load_clip, options, problem, tracker, verify
from pez_pack.pez_core.clip.images import load_image
from server import PromptServer
from tiny_diffusion import export_emoji_diffusion

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")

JUDGE = ROOT / "benchmarks/models/emoji-clip-judge"

CLIP = load_clip("emoji-clip", device="cpu")
OTHER_CLIP = load_clip(str(JUDGE), device="cpu")


def loaded(clip) -> memory.LoadedClip:
    return memory.LoadedClip(clip, CPU, CPU)


def picture(name: str) -> torch.Tensor:
    """A batch of one image, as ComfyUI's nodes give them."""
    image = load_image(ROOT / f"examples/{name}.png").resize((32, 32))
    return torch.tensor(list(image.getdata())).view(1, 32, 32, 3) / 255


FISH, PARROT, DOG = map(picture, ("noto-fish", "noto-parrot", "fxemoji-dog"))
WIDE = torch.cat([PARROT, FISH, DOG], 2)
COLOURS = Vocabulary(only=["red", "blue", "green"])
# two for each word of a prompt of five: no fewer, or words repeat anyway
FEW = Vocabulary(only=["red", "blue", "fish", "bird", "dog", "cat", "sea", "sun", "tree", "green"])
KEPT = json.dumps({"version": 1, "inputs": {}, "items": [{"prompt": "a kept", "similarity": 0.5}]})


class Drawing(NamedTuple):
    """A small image model of random weights."""

    model: Any
    text_encoder: Any
    vae: Any


def drawing(seed: int) -> Drawing:
    with TemporaryDirectory() as folder:
        export_emoji_diffusion(Path(folder), seed)
        return Drawing(*emoji_diffusion.load(Path(folder)))


def latents(count: int) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(count, 4, 16, 16)}


DRAWS, DRAWS_OTHERWISE = drawing(0), drawing(1)
SKIPPING = DRAWS.text_encoder.clone()
SKIPPING.clip_layer(-2)


class Letter:
    """A language model that likes one letter, much more than the search likes its target."""

    def _likes(self, text: str) -> float:
        return 10 * text.count("e") / max(len(text), 1)

    def table(self, words):
        return words

    def next_words(self, texts, table):
        return torch.tensor([list(map(self._likes, table))] * len(texts))

    def readability_score(self, texts):
        return torch.tensor(list(map(self._likes, texts)))

    def perplexity(self, texts):
        return 10 - self.readability_score(texts)


@dataclass
class Case:
    """One input with another value.

    Attributes:
        changed: the value, or a function of the first result before the change.
        beside: inputs beside it, before and after.
    """

    changed: Any
    beside: dict[str, Any] = field(default_factory=dict)


def _first_word(result: list) -> str:
    """The first learned word, by the output `candidates`."""
    return result[-3][0].split()[0]


SEARCH = {
    "clip": Case(loaded(OTHER_CLIP)),
    "prompt_len": Case(4),
    "effort": Case("fast"),
    "restarts": Case(2),
    "seed": Case(1),
    "readability": Case(1.0, {"effort": "fast"}),
    "wording": Case("tags", {"effort": "fast"}),
    "block": Case(_first_word, {"vocabulary": COLOURS}),
    "vocabulary": Case(COLOURS),
    "repeats": Case(True, {"effort": "fast", "vocabulary": FEW, "prompt_len": 5}),
    "time_limit": Case(2.0, {"steps": 20}),
    "steps": Case(7),
    "lr": Case(3.0, {"steps": 8, "lr": 0.5}),
    "weight_decay": Case(1.9, {"steps": 8, "lr": 0.5}),
    "patience": Case(1, {"steps": 30}),
    "keep": Case(True, {"kept": KEPT}),
    "kept": Case(KEPT.replace("a kept", "another kept"), {"keep": True, "kept": KEPT}),
}
SHORT = {"prompt_len": 3, "effort": "paper", "steps": 4, "clip": loaded(CLIP)}

LEARN = {"always_learn": True}
JOIN = {"always_learn": False, "images_1": None}

# node -> its inputs before each change, and the cases
CASES: dict[type, tuple[dict[str, Any], dict[str, Case]]] = {
    nodes.ImageToPrompt: (
        SHORT | {"images": FISH},
        SEARCH
        | {
            "images": Case(DOG),
            "shared": Case(True, {"images": torch.cat([FISH, DOG])}),
            "caption": Case("a photo of"),
            "clean_caption": Case(False, {"caption": "The image shows a fish."}),
            "prune_caption": Case(True, {"caption": "music, dog, red house, tree, bird, car"}),
            "avoid": Case("a red fish"),
            "avoid_images": Case(PARROT),
            "avoid_weight": Case(3.0, {"avoid": "a red fish"}),
            "negative_prompt": Case(True),
            "start_from": Case("red blue green", {"steps": 1}),
            "fit": Case("pad", {"images": WIDE}),
        },
    ),
    nodes.ExtractStyle: (
        SHORT | {"images": torch.cat([FISH, PARROT, DOG]), "subject": "a cat"},
        SEARCH
        | {
            "images": Case(torch.cat([FISH, DOG])),
            "subject": Case("a house"),
            "style_template": Case("{style}: {subject}"),
            "keep_content": Case(True),
            "content": Case(_first_word, {"vocabulary": COLOURS}),
            "fit": Case("stretch", {"images": torch.cat([WIDE, WIDE.flip(2)])}),
        },
    ),
    nodes.DistillPrompt: (
        SHORT | {"text": "a cat and a dog in a red car near the old house"},
        SEARCH | {"text": Case("a fish in blue water"), "ratio": Case(0.6, {"prompt_len": 0})},
    ),
    nodes.FusePrompts: (
        SHORT | LEARN | {"prompt_1": "a red car", "prompt_2": "a bird", "images_1": FISH},
        SEARCH
        | {
            "images_1": Case(DOG),
            "images_2": Case(DOG),
            "prompt_1": Case("a blue car", JOIN),
            "prompt_2": Case("a dog", JOIN),
            "prompt_3": Case("a dog", JOIN),
            "prompt_4": Case("a dog", JOIN),
            "always_learn": Case(True, JOIN),
            "weights": Case("1, 1, 9"),
            "max_tokens": Case(2, JOIN | {"prompt_len": 2}),
            "fit": Case("pad", {"images_1": WIDE}),
        },
    ),
    nodes.ScorePrompt: (
        {"clip": loaded(CLIP), "images": FISH, "text": "a red fish in a blue car"},
        {
            "clip": Case(loaded(OTHER_CLIP)),
            "images": Case(DOG),
            "text": Case("a dog"),
            "max_loss": Case(1.0, {"text": "fish swimming in water"}),  # two of its words help
            "judge": Case(loaded(OTHER_CLIP)),
            "fit": Case("stretch", {"images": WIDE}),
            "target": Case("a dog\na house"),
        },
    ),
    nodes.ChooseByImage: (
        {
            "clip": loaded(CLIP),
            "images": FISH,
            "prompts": "a red fish",
            "model": DRAWS.model,
            "text_encoder": DRAWS.text_encoder,
            "vae": DRAWS.vae,
            "latent_image": latents(1),
            "seed": 0,
            "num_inference_steps": 2,
            "guidance_scale": 4.0,
            "sampler_name": "ddim",
            "scheduler": "ddim_uniform",
        },
        {
            "clip": Case(loaded(OTHER_CLIP)),
            "images": Case(DOG),
            "prompts": Case("a green bird"),
            "model": Case(DRAWS_OTHERWISE.model),
            "text_encoder": Case(SKIPPING),
            "vae": Case(DRAWS_OTHERWISE.vae),
            "latent_image": Case(latents(2)),
            "seed": Case(1),
            "num_inference_steps": Case(3),
            "guidance_scale": Case(1.0),
            "sampler_name": Case("heun"),
            "scheduler": Case("karras"),
            "negative_prompt": Case("a dog"),
            "fit": Case("stretch", {"images": WIDE}),
        },
    ),
    nodes.ClipFromModel: (
        {"clip": emoji_clip()},
        {
            "clip": Case(emoji_clip(JUDGE)),
            "clip_vision": Case(ImageTower(CLIP)),
            "clip_vision_2": Case(ImageTower(CLIP)),
        },
    ),
    nodes.MakeVocabulary: (
        {"only": "", "block": "", "block_unsafe": False, "ascii_only": False},
        {
            "only": Case("red, blue"),
            "block": Case("red"),
            "block_unsafe": Case(True),
            "ascii_only": Case(True, {"whole_words": False}),
            "word_list": Case("words.txt"),
            "whole_words": Case(False),
            "min_embedding_std": Case(0.037),
            "and_also": Case(COLOURS),
            "dictionary": Case(False),
        },
    ),
    nodes.LoadCLIP: (
        {"model": models.BUNDLED, "download": False},
        {
            "model": Case("SD 1.5 (ViT-L/14)"),
            "download": Case(True, {"model": "SD 2.x (ViT-H/14)"}),
            "precision": Case("float16"),
            "device": Case("cpu"),
            "activation": Case("quick_gelu"),
        },
    ),
}


class Clock:
    """Reading it takes `tick` seconds."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now


def changes() -> dict[str, dict[str, list]]:
    """The results of each node: twice before a change of each input, and once after it.

    Returns:
        `[before, again, after]` by the identifiers of node and input. All inputs of the schemas
        are there; the list is empty for one without a case.
    """
    with TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path(models.FOLDER, folder)
        Path(folder, "words.txt").write_text("red\nblue\n")
        Path(folder, models.VIT_L.file).write_bytes(b"")
        return {
            node.define_schema().node_id: {
                one.id: _compared(node, before, cases[one.id], one.id) if one.id in cases else []
                for one in node.define_schema().inputs
            }
            for node, (before, cases) in CASES.items()
        }


def _compared(node: type, before: dict[str, Any], case: Case, name: str) -> list:
    before = before | case.beside
    found, again = _run(node, before), _run(node, before)
    changed = case.changed(found) if callable(case.changed) else case.changed
    return [found, again, _run(node, before | {name: changed})]


def _run(node: type, given: dict[str, Any]) -> list:
    """All that can be seen of a run, in a form that JSON holds."""
    given = {name: value for name, value in given.items() if value is not None}
    if node is nodes.LoadCLIP:
        return _loading(given)
    if node is nodes.ClipFromModel:
        output = node.PREPARE_CLASS_CLONE(None).execute(**given)
        with output.args[0].in_use() as clip:
            return [output.ui, clip.encode_texts(["a red fish"]).tolist()]
    if node is nodes.MakeVocabulary:
        (vocabulary,) = node.execute(**given).args
        return sorted(vocabulary.lexicon(CLIP).phrases)
    return _searching(node, {name: [value] for name, value in given.items()})


def _searching(node: type, given: dict[str, list]) -> list:
    """The outputs, and the steps that the page was shown."""
    here = node.PREPARE_CLASS_CLONE(None)
    lazy = {one.id for one in node.define_schema().inputs if getattr(one, "lazy", None)}
    if lazy:
        missing = {name: None for name in lazy & given.keys()}
        wanted = here.check_lazy_status(**(given | missing))
        given = {name: value for name, value in given.items() if name not in lazy or name in wanted}
    server = PromptServer.instance = Page()
    for module in (live, best, problem, tracker, verify):
        module.time = server.clock
    outputs = map(_plain, here.execute(**given).args)
    steps = [(data["step"], data["steps"]) for data in server.events if data.get("steps")]
    return [*outputs, steps]


def _plain(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return [list(output.shape), output.double().mean().item()]
    return output


class Page:
    """A server with one page that has the live view."""

    client_id = "page"

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        # every report is shown, since more time than `SEND_SECONDS` is between two
        self.clock = Clock(2 * live.SEND_SECONDS)
        live.with_live_view.add(self.client_id)

    def send_sync(self, kind: str, data: dict[str, Any], client: str) -> None:
        self.events.append(data)


def time_limits() -> list[dict[str, Any]]:
    """Searches with a time limit: the node, its `effort`, and the last event."""
    runs = []
    for node, (before, cases) in CASES.items():
        if "time_limit" not in cases:
            continue
        for effort in ("fast", "paper"):
            given = before | {"effort": effort, "steps": 20000, "time_limit": 300.0}
            if node is nodes.DistillPrompt:  # a list, whose searches share the time
                given["text"] = ["a red fish in deep blue water", "a small green bird in a tree"]
            _searching(node, {k: v if isinstance(v, list) else [v] for k, v in given.items()})
            event = PromptServer.instance.events[-1]
            event = {name: event[name] for name in ("step", "steps", "elapsed")}
            runs.append({"node": node.define_schema().node_id, "effort": effort} | event)
    return runs


def _loading(given: dict[str, Any]) -> list:
    """The weights that are loaded and fetched, their precision and their device."""
    calls = []

    def load(name: str, **options):
        calls.append(["load", Path(name).name])
        return load_clip("emoji-clip", **options)

    def fetch(name: str, pretrained: str, path: Path, progress, **_):
        calls.append(["fetch", name])
        path.write_bytes(b"")

    models.load_clip, models.fetch_weights = load, fetch
    loading.mm.get_torch_device = lambda: torch.device("meta")  # as if there were a graphics card
    # reads the folder anew
    folder_paths.filename_list_cache.clear()
    try:
        (output,) = nodes.LoadCLIP.PREPARE_CLASS_CLONE(None).execute(**given).args
    except ValueError as error:
        return [str(error)]
    (patcher,) = output._texts
    return [calls, str(output.clip.dtype), str(patcher.load_device)]


options.EFFORTS = dict(options.EFFORTS) | {
    "fast": options.Effort(steps=3, swaps=4, trials=2, screened=16)
}
learning.language_model = lambda readability, *_: Letter() if readability else None
# hundreds of searches with the same few vocabularies, each of which takes seconds to apply
Vocabulary.lexicon = lru_cache(32)(Vocabulary.lexicon)
