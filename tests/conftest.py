from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from pez_core import Clip, load_clip

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.png"))

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
    return model


def make_clip(kind=CLIP, text=None, seed=0, **options) -> Clip:
    model = make_model(kind, text, seed, **options)
    length = (text or {}).get("context_length", 77)
    return Clip(model, open_clip.SimpleTokenizer(context_length=length), "tiny", range(320, 3000))


@pytest.fixture(scope="session")
def tiny_clip() -> Clip:
    return make_clip()


@pytest.fixture(scope="session")
def emoji_clip() -> Clip:
    return load_clip("emoji-clip", device="cpu")


__all__ = ["CLIP", "EXAMPLES", "ROOT", "CustomTextCLIP", "make_clip", "make_model"]
