"""PEZ CLIP from Model on real ComfyUI CLIPs, against ComfyUI's own encoding."""

from __future__ import annotations

import pytest

from .inside import ROOT, inside

pytest.importorskip("diffusers")

# CLIPs with ComfyUI's classes: true widths, fewer layers
MODELS = f"""
import folder_paths
from pathlib import Path
from types import SimpleNamespace
import comfy.clip_model, comfy.clip_vision, comfy.sd, comfy.sd1_clip, comfy.sdxl_clip
import comfy.supported_models_base, comfy.text_encoders.sd2_clip as sd2_clip
from pez_pack import nodes
from pez_pack.nodes import encoders, from_model, memory, models
from pez_pack.pez_core import SearchOptions, Vocabulary, distill, fuse, invert, load_clip
ROOT = Path({str(ROOT)!r})
models.register_folder()
FEW = Vocabulary(only="red blue fish bird dog cat sea sun tree night".split())
QUICK = SearchOptions(prompt_len=3, swaps=2, steps=3, vocabulary=FEW)
LONG = "a very small red fish in the deep blue sea at night"

def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                one.fill_(1)
            elif one.ndim:
                one.copy_(torch.randn(one.shape, generator=generator) * 0.05)
    return model

def comfy_clip(tokenizer, model, layers=3, **options):
    names = [name for name in ("clip_l", "clip_g", "clip_h")]
    options |= {{f"{{name}}_model_config": {{"num_hidden_layers": layers}} for name in names}}
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    clip = comfy.sd.CLIP(target, model_options=options | {{"dtype": torch.float32}})
    randomised(clip.cond_stage_model)
    return clip

def sdxl(**options):
    return comfy_clip(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel, **options)

def vision(projection, **config):
    small = {{
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_hidden_layers": 3, "image_size": 28, "patch_size": 14, "hidden_act": "gelu",
        "num_channels": 3, "projection_dim": projection, "model_type": "clip_vision_model",
    }}
    made = comfy.clip_vision.ClipVisionModel(small | config)
    randomised(made.model)
    return made

def execute(*given):
    here = nodes.ClipFromModel.PREPARE_CLASS_CLONE(None)
    output = here.execute(*given)
    return output.args[0], output.ui["text"][0]

def state(clip):
    patcher = clip.patcher
    kept = patcher.model.state_dict()
    tensors = [(k, v.clone(), v.data_ptr(), v.dtype, v.device) for k, v in kept.items()]
    return tensors, patcher.patches_uuid, len(patcher.backup), sorted(patcher.pinned)

def unchanged(before, after):
    same = all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2:] == b[2:]
        for a, b in zip(before[0], after[0], strict=True)
    )
    return same and before[1:] == after[1:]
"""


def run(code: str, timeout: float = 500):
    return inside(MODELS + code, timeout)


def test_it_finds_what_sdxl_holds():
    line, features, equal = run(
        """
with torch.inference_mode():
    clip = sdxl()
    value, line = execute(clip, vision(1280))
    with value.in_use() as found:
        text = "a red fish at night"
        feature = found.encode_texts([text])[0]
        pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1][0]
        cosine = float(feature @ torch.nn.functional.normalize(pooled, dim=-1))
answer([line, found.feature_size, cosine])
"""
    )
    assert line == ""
    assert features == 1280 and equal == pytest.approx(1, abs=1e-5)
