"""All architectures of open_clip, cut to a few layers of small width: exact or refused.

The parts that decide about text features stay: masks, pooling, projections, activations, norms,
context, tokenizer. Image towers of timm cannot be cut, and the smallest one of timm stands for
them. Architectures that are the same after the cut run once.
"""

import json

import open_clip
import pytest
import torch
from open_clip.factory import get_model_config
from PIL import Image
from test_tokenizers import gemma, t5

from pez_core import SearchOptions, invert, load_clip
from pez_core.errors import ArgumentError

pytestmark = pytest.mark.sweep

WIDTH, HEADS, LAYERS = 64, 4, 2
# open_clip lowers the precision of models with an image tower of timm in another way
TIMM = {
    "timm_model_name": "test_vit",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 160,
}
TEXTS = ["a red apple on a table", "blue dog"]
# Cosine distance between half and full precision, of random weights.
HALF = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def cut(config):
    """The config with few layers of small width."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if "timm_model_name" in vision:
        vision = dict(TIMM)
    elif isinstance(vision["layers"], list):  # a ResNet
        vision |= {"layers": [1] * 4, "width": 16, "image_size": 64}
    else:
        size = 2 * vision["patch_size"]
        vision |= {"layers": LAYERS, "width": WIDTH, "head_width": 16, "image_size": size}
    text |= {"layers": LAYERS, "width": WIDTH, "heads": HEADS}
    size = WIDTH if text.get("proj_type") == "none" else WIDTH // 2
    cut = config | {"embed_dim": size, "vision_cfg": vision, "text_cfg": text}
    if "multimodal_cfg" in config:
        cut["multimodal_cfg"] = config["multimodal_cfg"] | {
            "layers": 1,
            "width": WIDTH,
            "heads": HEADS,
            "attn_pooler_heads": HEADS,
        }
    for part in (vision, cut.get("multimodal_cfg", {})):
        if "attn_pooler_heads" in part:
            part["attn_pooler_heads"] = HEADS
    return cut


def searchable():
    """Cut configs, as JSON, and the architectures of each."""
    found = {}
    for name in open_clip.list_models():
        config = get_model_config(name)
        if "hf_model_name" in config["text_cfg"]:
            continue
        config = cut(config)
        tokenizer = config["text_cfg"].get("hf_tokenizer_name")
        if tokenizer:  # one of each family stands for all
            config["text_cfg"]["hf_tokenizer_name"] = "gemma" if "SigLIP2" in tokenizer else "t5"
            config["text_cfg"].get("tokenizer_kwargs", {}).pop("strip_sep_token", None)
        found.setdefault(json.dumps(config, sort_keys=True), []).append(name)
    return found


def write(folder, config):
    """A folder for `load_clip` with random weights."""
    kind = config["text_cfg"].get("hf_tokenizer_name")
    if kind:
        tokenizer = {"gemma": gemma, "t5": t5}[kind]()
        tokenizer.save_pretrained(folder)
        end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
        config["text_cfg"] |= {"vocab_size": len(tokenizer)}
        if config["text_cfg"].get("pool_type") == "eos":
            config["text_cfg"]["eos_id"] = end
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tower = getattr(model, "text", model)
    torch.nn.init.normal_(tower.token_embedding.weight, std=0.3)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")


def features(clip):
    """Text features by our tower, and by open_clip's own way."""
    ids = [clip.text.words.encode(text) for text in TEXTS]
    table = clip.text.token_embedding.detach().float()
    ours = torch.cat([clip.text(table[torch.tensor([row])]) for row in ids]).detach()
    return torch.nn.functional.normalize(ours.float(), dim=-1), clip.encode_texts(TEXTS)


def apart(a, b):
    return float((1 - (a * b).sum(-1)).abs().max())


CASES = searchable()


def test_every_architecture_is_swept_or_refused():
    swept = {name for names in CASES.values() for name in names}
    others = set(open_clip.list_models()) - swept
    assert len(swept) > 130 and len(others) == 10
    for name in others:
        with pytest.raises(ArgumentError, match="text tower is a Hugging Face model"):
            load_clip(name, "any")


@pytest.mark.parametrize("config", CASES, ids=[names[0] for names in CASES.values()])
def test_an_architecture_is_exact_in_every_precision(config, tmp_path):
    write(tmp_path, json.loads(config))
    picture = Image.effect_noise((40, 40), 80).convert("RGB")
    whole = None
    for dtype, bound in HALF.items():
        clip = load_clip(str(tmp_path), device="cpu", dtype=dtype)
        assert clip.dtype == dtype
        ours, theirs = features(clip)
        assert apart(ours, theirs) < (1e-5 if dtype is torch.float32 else bound)
        image = clip.encode_images([picture])
        whole = (theirs, image) if whole is None else whole
        assert apart(theirs, whole[0]) < bound and apart(image, whole[1]) < bound
    clip = load_clip(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    options = SearchOptions(effort="fast", steps=1, swaps=2, block_unsafe=False, prompt_len=2)
    words = clip.text.words
    clip.vocabulary = torch.tensor(words.round_trip_ids(range(min(1500, words.size)))[:64])
    (result,) = invert(clip, picture, options)
    assert clip.text.words.encode(result.prompt) == result.token_ids
