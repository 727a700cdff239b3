import json
import os
import sys
from importlib import import_module
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from pez_core import Clip, SearchOptions, Vocabulary, load_clip
from pez_core.clip.images import load_image

if "PYTEST_XDIST_WORKER" in os.environ:
    # one process per core: more threads would only wait for each other, here and in commands
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    torch.set_num_threads(1)

LONG = {"slow", "sweep", "ray", "comfyui"}
ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.png"))


def pytest_collection_modifyitems(items):
    """A slow machine may take ten times as long as a usual one; a test that hangs still ends."""
    for item in items:
        if item.get_closest_marker("timeout") is None and any(map(item.get_closest_marker, LONG)):
            item.add_marker(pytest.mark.timeout(900))


def all_words(**fields) -> SearchOptions:
    """Options that allow every word of the CLIP, twice, as independent implementations search."""
    if fields.get("effort") != "paper":  # which has every token
        fields = {"vocabulary": Vocabulary(dictionary=False)} | fields
    return SearchOptions(block_unsafe=False, **{"repeats": True} | fields)


def paper(steps: int, **fields) -> SearchOptions:
    """Algorithm 1 alone, with every word of the CLIP."""
    return all_words(swaps=0, steps=steps, **fields)


class Alone:
    """Features of single tokens for a `SingleWordPrior`, as a table of all or of none yet."""

    def __init__(self, table, all_at_once=False, sample=10**6):
        self.table, self.all_at_once, self.sample, self.asked = table, all_at_once, sample, []

    def __call__(self, ids):
        self.asked.append(ids.tolist())
        return self.table[ids]


class Clock:
    """A clock for tests: reading it takes `tick` seconds."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 1000.0, tick

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of every search."""
    clock = Clock()
    searching = ("best", "options", "problem", "single_words", "tracker", "verify")
    for module in (*searching, "tasks.jobs", "tasks.distill"):
        monkeypatch.setattr(import_module(f"pez_core.{module}"), "time", clock)
    if "pez_core.diffusion.pipeline" in sys.modules:
        monkeypatch.setattr("pez_core.diffusion.pipeline.time", clock)
    return clock


VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}


def make_model(kind=CLIP, text=None, seed=0, **options):
    """A real open_clip model at tiny size with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(
            embed_dim=16, vision_cfg=dict(VISION), text_cfg=TEXT | (text or {}), **options
        ).eval()
        # trained towers have embeddings of a size that matters beside the positions
        tower = getattr(model, "text", model)
        torch.nn.init.normal_(tower.token_embedding.weight, std=0.3)
    open_clip.factory.set_model_preprocess_cfg(
        model, {**open_clip.transform.PreprocessCfg().__dict__, "size": 16}
    )
    towers = {"embed_dim": 16, "vision_cfg": dict(VISION), "text_cfg": TEXT | (text or {})}
    custom = {"custom_text": True} if kind is not CLIP else {}
    model.built_from = {"model_cfg": towers | custom | options, "tokenizer": None}
    return model


def make_clip(kind=CLIP, text=None, seed=0, **options) -> Clip:
    model = make_model(kind, text, seed, **options)
    length = (text or {}).get("context_length", 77)
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    return Clip(model, tokenizer, "tiny", range(320, 3000), model.built_from)


@pytest.fixture(scope="session")
def tiny_clip() -> Clip:
    return make_clip()


@pytest.fixture(scope="session")
def vit_clip() -> Clip:
    """A second real CLIP of another build, trained here on the examples and their names."""
    rows = list(map(json.loads, (ROOT / "examples/index.jsonl").open()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(
            embed_dim=32,
            vision_cfg=VISION | {"image_size": 32, "width": 64, "layers": 2},
            text_cfg=TEXT | {"width": 48, "layers": 2, "heads": 4},
        )
        open_clip.factory.set_model_preprocess_cfg(
            model, {**open_clip.transform.PreprocessCfg().__dict__, "size": 32}
        )
        clip = Clip(model, open_clip.SimpleTokenizer(), "vit", load_clip().vocabulary.tolist())
        images = [load_image(ROOT / "examples" / row["file"]) for row in rows]
        pixels = torch.stack([clip._prepare(image) for image in images])
        texts = clip.tokenizer([" ".join([row["name"], *row["words"]]) for row in rows])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.train()
        for _ in range(60):
            a = model.encode_image(pixels, normalize=True)
            b = model.encode_text(texts, normalize=True)
            logits = 10 * a @ b.T
            labels = torch.arange(len(rows))
            loss = sum(torch.nn.functional.cross_entropy(x, labels) for x in (logits, logits.T))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
    return clip


@pytest.fixture(scope="session")
def emoji_clip() -> Clip:
    return load_clip("emoji-clip", device="cpu")


__all__ = [
    "CLIP",
    "EXAMPLES",
    "ROOT",
    "TEXT",
    "Clock",
    "CustomTextCLIP",
    "all_words",
    "make_clip",
    "make_model",
    "paper",
]
