"""PezClipModel: every kind of CLIP comes back from disk as it was."""

import json

import open_clip
import pytest
import torch
from conftest import EXAMPLES, TEXT, CustomTextCLIP, make_clip

from pez_core import Clip, JointClip, invert, load_clip
from pez_core.clip.build import from_config, saved_config
from pez_core.clip.images import load_image
from pez_core.clip.models import BUNDLED
from pez_core.diffusion import PezClipModel

TEXTS = ["a red cat", "blue fish at night"]


def _close(a, b):
    # where weights lie in memory decides how they round
    return a.shape == b.shape and (a - b).abs().max() < 1e-5


def _kinds():
    return {
        "plain": lambda: make_clip(),
        "quick": lambda: make_clip(quick_gelu=True),
        "custom": lambda: make_clip(CustomTextCLIP),
        "no mask": lambda: make_clip(CustomTextCLIP, {"no_causal_mask": True, "pool_type": "last"}),
        "short": lambda: make_clip(text={"context_length": 32}),
        "two": lambda: JointClip([load_clip("emoji-clip", device="cpu"), make_clip()], [3, 1]),
    }


@pytest.mark.parametrize("kind", _kinds())
def test_saved_and_loaded_again(kind, tmp_path):
    clip = _kinds()[kind]()
    model = PezClipModel.from_clip(clip)
    model.save_pretrained(tmp_path)
    loaded = PezClipModel.from_pretrained(tmp_path)
    pictures = [load_image(path) for path in EXAMPLES[:2]]
    for other in (model.clip, loaded.clip):
        assert _close(other.encode_texts(TEXTS), clip.encode_texts(TEXTS))
        assert _close(other.encode_images(pictures), clip.encode_images(pictures))
        assert torch.equal(other.vocabulary, clip.vocabulary)
        assert other.trained_tokens == clip.trained_tokens
        assert other.text.parts == clip.text.parts and other.name == clip.name
    settings = {"prompt_len": 3, "steps": 5}
    expected = invert(clip, EXAMPLES[0], **settings)
    assert loaded(lambda one: invert(one, EXAMPLES[0], **settings)).prompt == expected.prompt


def test_the_folder_holds_safetensors_and_readable_json(tmp_path):
    PezClipModel.from_clip(make_clip(quick_gelu=True)).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["towers"][0]["config"]["model_cfg"]["quick_gelu"] is True


def test_wrapping_shares_weights_and_changes_nothing():
    clip = make_clip()
    weight = clip.model.token_embedding.weight
    model = PezClipModel.from_clip(clip)
    assert model.models[0].token_embedding.weight.data_ptr() == weight.data_ptr()
    model.to(torch.float64)
    assert clip.model.token_embedding.weight is weight and weight.dtype == torch.float32
    assert weight.requires_grad and not any(w.requires_grad for w in model.parameters())


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_what_open_clip_knows_by_name_is_built_alike(name):
    """Names and shapes of all weights, without the weights."""
    from open_clip.factory import get_model_config

    theirs = open_clip.create_model(name, load_weights=False, device="meta")
    config = saved_config(get_model_config(name))
    with torch.device("meta"):
        ours, _ = from_config(config, theirs.visual.preprocess_cfg)
    assert type(ours) is type(theirs)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_a_folder_is_known_by_its_config(tmp_path):
    for path in BUNDLED["emoji-clip"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = PezClipModel.from_clip(load_clip(str(tmp_path), device="cpu"))
    assert model.config.towers[0]["config"]["model_cfg"]["embed_dim"] == 256
    assert model.clip.trained_tokens == load_clip("emoji-clip", device="cpu").trained_tokens


def test_a_clip_that_does_not_know_what_it_was_built_from_is_refused():
    clip = make_clip()
    clip.config = None
    with pytest.raises(ValueError, match="tiny does not know what it was built from"):
        PezClipModel.from_clip(clip)


def test_image_towers_of_timm_compute_while_they_are_built(tmp_path):
    """ViTamin's does, which fails on weights that are not there yet."""
    vision = {
        "timm_model_name": "vitamin_small_224",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 224,
    }
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": vision,
            "text_cfg": dict(TEXT),
            "custom_text": True,
        },
        "tokenizer": None,
    }
    preprocess = {**open_clip.transform.PreprocessCfg().__dict__, "size": 224}
    model, tokenizer = from_config(config, preprocess)
    clip = Clip(model, tokenizer, "timm", range(320, 400), config)
    PezClipModel.from_clip(clip).save_pretrained(tmp_path)
    loaded = PezClipModel.from_pretrained(tmp_path)
    pictures = [load_image(path) for path in EXAMPLES[:2]]
    assert _close(loaded.clip.encode_images(pictures), clip.encode_images(pictures))
