"""CLIPs of encoders in memory, against transformers' own forward and the same CLIP from a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_diffusion import flux, stable_diffusion, stable_diffusion_xl, text_config, tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from pez_core import (
    ArgumentError,
    JointClip,
    PezPipeline,
    SearchOptions,
    Vocabulary,
    clip_from_encoders,
    distill,
    explain,
    fuse,
    invert,
    load_clip,
    prune,
)
from pez_core.clip import encoders as encoders_module
from pez_core.clip.encoders import ClipOfEncoders, TextWeights
from pez_core.clip.images import load_image
from pez_core.clip.projection import depths_in, find_projection, is_trained
from pez_core.targets import encode_targets

TEXTS = ["a red cat", "blue fish at night, in deep water"]
FEW = Vocabulary(only=["red", "blue", "fish", "bird", "dog", "cat", "sea", "sun", "tree", "night"])
QUICK = SearchOptions(prompt_len=3, swaps=2, steps=3, vocabulary=FEW)
LONG = "a very small red fish in the deep blue sea at night"


def with_seed(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def text_encoder(width=16, projection=16, activation="quick_gelu", projected=True):
    config = text_config(width, projection)
    config.hidden_act = activation
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return with_seed(lambda: kind(config))


def vision_config(projection):
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=28,
        patch_size=14,
        projection_dim=projection,
    )


def image_encoder(projection=16):
    return with_seed(lambda: CLIPVisionModelWithProjection(vision_config(projection)))


def whole(width=16, projection=16):
    config = CLIPConfig(
        text_config=text_config(width, projection).to_dict(),
        vision_config=vision_config(projection).to_dict(),
        projection_dim=projection,
    )
    return with_seed(lambda: CLIPModel(config))


@pytest.fixture(scope="module")
def emoji_encoder():
    """The text tower of `emoji-clip` as a model of transformers, without its projection."""
    sys.path.insert(0, str(ROOT / "tools"))
    import train_emoji_diffusion as tool

    return tool.text_encoder(ROOT / tool.CLIP).eval()


@pytest.fixture
def pictures():
    return [load_image(path) for path in EXAMPLES[:2]]


@torch.no_grad()
def text_embeds(encoder, texts):
    ids = tokenizer()(texts, padding="max_length", return_tensors="pt")
    return F.normalize(encoder(**ids).text_embeds, dim=-1)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_texts_have_the_features_that_transformers_computes(activation):
    encoder = text_encoder(24, 16, activation)
    clip = clip_from_encoders(encoder)
    expected = text_embeds(encoder, TEXTS)
    assert torch.allclose(clip.encode_texts(TEXTS), expected, atol=1e-6)
    # by the way of a search, from embeddings
    ids = torch.tensor([clip.text.words.encode(TEXTS[0])])
    found = F.normalize(clip.text(clip.text.token_embedding[ids]), dim=-1)
    assert torch.allclose(found, expected[:1], atol=1e-6)
    other = text_encoder(24, 16, {"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation])
    assert not torch.allclose(clip_from_encoders(other).encode_texts(TEXTS), expected, atol=1e-5)


def test_images_have_the_features_that_transformers_computes(pictures):
    encoder, model = text_encoder(), image_encoder()
    clip = clip_from_encoders(encoder, model)
    pixels = torch.stack([clip._prepare(picture) for picture in pictures])
    with torch.no_grad():
        expected = F.normalize(model(pixel_values=pixels).image_embeds, dim=-1)
    assert torch.allclose(clip.encode_images(pictures), expected, atol=1e-6)
    assert pixels.shape[-1] == 28
    (result,) = invert(clip, pictures[0], QUICK)
    feature = text_embeds(encoder, [result.prompt])[0]
    assert result.similarity == pytest.approx(float(feature @ expected[0]), abs=1e-5)


def test_an_image_encoder_may_be_a_function(pictures):
    clip = clip_from_encoders(text_encoder(), lambda few: torch.ones(len(few), 16) * len(few))
    assert torch.allclose(clip.encode_images(pictures), torch.full((2, 16), 0.25))
    wrong = clip_from_encoders(text_encoder(), lambda few: torch.ones(len(few), 5))
    with pytest.raises(ArgumentError, match=r"shape \(5,\), but .* have 16 numbers"):
        wrong.encode_images(pictures)


@pytest.mark.parametrize(
    "fit, size", [("crop", (80, 40)), ("pad", (80, 80)), ("stretch", (80, 80))]
)
def test_a_function_gets_pictures_that_fit(fit, size):
    seen = []

    def encode(few):
        seen.extend(few)
        return torch.ones(len(few), 16)

    wide = Image.new("RGB", (80, 40), "red")
    clip = clip_from_encoders(text_encoder(), encode)
    clip.encode_images([wide], fit)
    (picture,) = seen
    assert picture.size == size
    assert picture.getpixel((40, picture.height // 2)) == (255, 0, 0)
    assert (picture.getpixel((40, 1)) == (255, 0, 0)) == (fit != "pad")
    with pytest.raises(ValueError, match="fit"):
        clip.encode_images([wide], "squash")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_that_of_load_clip(dtype, emoji_encoder):
    clip = clip_from_encoders(emoji_encoder, dtype=dtype)
    same = load_clip("emoji-clip", device="cpu", dtype=dtype)
    assert clip.dtype == same.dtype == dtype
    assert torch.equal(clip.encode_texts(TEXTS), same.encode_texts(TEXTS))


def test_prompts_are_those_of_the_same_clip_from_a_file(emoji_encoder, emoji_clip):
    """The projection and the trained words come from the bundled file."""
    clip = clip_from_encoders(emoji_encoder, device="cpu")
    found, expected = (distill(one, LONG, QUICK) for one in (clip, emoji_clip))
    assert found.prompt == expected.prompt
    assert found.similarity == pytest.approx(expected.similarity, abs=1e-6)
    assert clip.trained_tokens == emoji_clip.trained_tokens


def test_without_an_image_encoder_texts_are_searched_and_images_are_refused(pictures):
    encoders = [text_encoder(16, projected=False), text_encoder(24, 24)]
    clip = clip_from_encoders(encoders)
    assert isinstance(clip, JointClip) and len(clip.clips) == 2
    assert len(distill(clip, LONG, QUICK).encoders) == 2
    assert fuse(clip, ["a red car", "a blue sea"], QUICK, always_learn=True).fused
    assert len(explain(clip, "red blue", "a red car")) == 2
    assert prune(clip, "red blue", "a red car").prompt
    with pytest.raises(ArgumentError, match=r"width 16 without an image encoder.*image_encoder"):
        invert(clip, pictures[0], QUICK)


def test_each_image_encoder_finds_its_text_encoder_by_the_length_of_features(caplog, pictures):
    encoders = [text_encoder(24, 24), text_encoder(16)]
    clip = clip_from_encoders(encoders, [image_encoder(16), image_encoder(24)])
    assert [part.feature_size for part in clip.clips] == [24, 16]
    assert clip.encode_images(pictures).shape == (2, 40)
    with caplog.at_level(logging.WARNING):
        one = clip_from_encoders(encoders, image_encoder(16))
    assert one.feature_size == 16
    assert "width 24 is not searched: there is no image encoder of 24 features" in caplog.text
    with pytest.raises(ArgumentError, match="belongs to none of the text encoders"):
        clip_from_encoders(encoders, image_encoder(8))


def test_a_missing_projection_comes_from_a_whole_clip_with_the_same_words(caplog):
    model = whole()
    bare = CLIPTextModel(model.config.text_config).eval()
    inner = model.text_model.state_dict()
    first = next(iter(bare.state_dict()))
    prefix = "text_model." if first.startswith("text_model.") else ""
    bare.load_state_dict({f"{prefix}{name}": value for name, value in inner.items()})
    clip = clip_from_encoders(bare, model)
    with torch.no_grad():
        ids = tokenizer()(TEXTS, padding="max_length", return_tensors="pt")
        expected = model.text_projection(model.text_model(**ids).pooler_output)
    assert torch.allclose(clip.encode_texts(TEXTS), F.normalize(expected, dim=-1), atol=1e-6)
    with caplog.at_level(logging.WARNING), pytest.raises(ArgumentError):
        other = CLIPTextModel(text_config(16, 16))  # other words: its projection is another one
        clip_from_encoders(other, model)
    assert "without its text projection" in caplog.text


@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
def test_a_projection_is_found_in_files_of_both_layouts(tmp_path, layout):
    model = whole(16, 24)
    table = model.text_model.embeddings.token_embedding.weight.detach()
    weight = model.text_projection.weight.detach()
    names = {"transformers": "text_model.embeddings.token_embedding.weight"}
    tensors = {names.get(layout, "token_embedding.weight"): table.clone()}
    if layout == "transformers":
        tensors["text_projection.weight"] = weight.clone()
    else:
        tensors["text_projection"] = weight.T.contiguous()
    good, bad, other = (tmp_path / f"{name}.safetensors" for name in ("good", "bad", "other"))
    save_file(tensors, good)
    bad.write_bytes(b"no weights")
    save_file(tensors | {next(iter(tensors)): torch.randn_like(table)}, other)
    tuned = table + 0.2 * table.std() * torch.randn_like(table)
    found = find_projection(tuned, [tmp_path / "missing", bad, other, good])
    assert found is not None and found.path == good and torch.equal(found.weight, weight)
    assert find_projection(tuned, [bad, other]) is None
    zero = {name: value * ("projection" not in name) for name, value in tensors.items()}
    save_file(zero, good)
    assert find_projection(tuned, [good]) is None


@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
def test_the_projection_of_an_encoder_of_another_depth_is_not_taken(tmp_path, layout, caplog):
    """As of SD 2.x in diffusers, whose text encoder came without its last layer."""
    model = whole(16, 24)
    inner = model.text_model.state_dict()
    depth = model.config.text_config.num_hidden_layers
    tensors = {f"text_model.{name}": tensor for name, tensor in inner.items()}
    if layout == "open_clip":
        tensors = {"token_embedding.weight": inner["embeddings.token_embedding.weight"]} | {
            f"{tower}transformer.resblocks.{k}.ln_1.bias": torch.zeros(2)
            for tower, layers in (("", depth), ("visual.", depth - 1))
            for k in range(layers)
        }
        tensors["text_projection"] = torch.randn(16, 24)
    else:
        tensors["text_projection.weight"] = torch.randn(24, 16)
    path = tmp_path / "whole.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    table = inner["embeddings.token_embedding.weight"]
    assert find_projection(table, [path]) and find_projection(table, [path], depth)
    assert find_projection(table, [path], depth - 1) is None
    assert depths_in(path, table.shape) == [depth]
    config = model.config.text_config
    config = CLIPTextConfig(**config.to_dict() | {"num_hidden_layers": depth - 1})
    cut = CLIPTextModel(config).eval()
    cut.get_input_embeddings().weight.data.copy_(table)
    with caplog.at_level(logging.WARNING), pytest.raises(ArgumentError, match="belongs to none"):
        clip_from_encoders(cut, model)
    assert "without its text projection" in caplog.text
    assert clip_from_encoders(cut).encode_texts(TEXTS).shape == (len(TEXTS), 16)


def test_memory_that_was_never_set_is_no_trained_matrix():
    real = load_file(ROOT / "pez_core/models/emoji-clip/open_clip_model.safetensors")
    assert is_trained(real["text_projection"]) and is_trained(torch.randn(8, 8) * 0.02)
    # as in checkpoints that were cast to 8 bits: many entries become zero
    assert is_trained((torch.randn(64, 64) * 0.01).to(torch.float8_e4m3fn))
    broken = real["text_projection"].float().clone()
    broken[3, 4] = float("nan")
    unset = (torch.zeros(8, 8), torch.full((8, 8), 1e-40), torch.full((8, 8), 0.5), broken)
    for weight in (*unset, torch.empty(8, 8, device="meta"), torch.randn(8, 8) * 1e6):
        assert not is_trained(weight)


def test_the_encoders_stay_as_they_are():
    encoder, model = text_encoder(), image_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    clip = clip_from_encoders(encoder, model)
    distill(clip, LONG, QUICK)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    for module in (encoder, model):
        assert all(one.requires_grad for one in module.parameters())
        assert not any(hasattr(one, "grad") and one.grad is not None for one in module.parameters())
    ours = {one.data_ptr() for one in clip.text.tower.parameters()}
    assert not ours & {one.data_ptr() for one in encoder.parameters()}


def test_what_cannot_be_searched_is_named():
    def refused(error, *given):
        with pytest.raises(ArgumentError, match=error):
            clip_from_encoders(*given)

    refused("`text_encoder` is empty", [])
    refused("has to be a CLIPTextModel of transformers but is str", "ViT-L-14")
    with torch.device("meta"):
        refused("offloaded", CLIPTextModel(text_config(16, 16)))
    tuned = text_encoder()
    tuned.text_model.base_layer = torch.nn.Sequential()
    tuned.text_model.base_layer.base_layer = torch.nn.Linear(2, 2)
    refused("LoRA layers.*fuse_lora", tuned)
    no_projection = with_seed(lambda: CLIPVisionModel(vision_config(16)))
    refused("CLIPVisionModel, which has no projection", text_encoder(), no_projection)
    refused("one function for one text encoder", [text_encoder()] * 2, lambda few: few)
    tensors = dict(text_encoder().text_model.named_parameters())
    del tensors["encoder.layers.2.mlp.fc2.bias"]
    with pytest.raises(ArgumentError, match=r"lacks the weights encoder.layers.2.mlp.fc2.bias"):
        ClipOfEncoders(TextWeights("broken", tensors, 3, 2, "gelu"))


def test_an_encoded_image_is_a_target(pictures):
    clip = clip_from_encoders(text_encoder(), image_encoder())
    feature = clip.encode_images(pictures[:1])[0]
    found = encode_targets("targets", clip, [3 * feature, "a cat", pictures[0]])
    assert torch.allclose(found[0], feature, atol=1e-6) and torch.allclose(found[2], feature)
    with pytest.raises(ArgumentError, match=r"`avoid` holds an encoded image of 5 numbers.* 16"):
        encode_targets("avoid", clip, [torch.ones(5)])
    with pytest.raises(ArgumentError, match="without a direction"):
        encode_targets("avoid", clip, [torch.zeros(16)])


# width, layers, heads, activation of the text towers, and open_clip's name of the architecture
SHAPES = {
    "L": (768, 12, 12, "quick_gelu", "ViT-L-14-quickgelu"),
    "H": (1024, 24, 16, "gelu", "ViT-H-14"),
    "bigG": (1280, 32, 20, "gelu", "ViT-bigG-14"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_text_encoder_of_full_size_becomes_the_tower_of_its_architecture(kind):
    """Without weights, on the meta device."""
    width, layers, heads, activation, name = SHAPES[kind]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=width,
    )
    with torch.device("meta"):
        theirs = CLIPTextModelWithProjection(config)
        model_cfg = open_clip.get_model_config(name)
        text_cfg = open_clip.model.CLIPTextCfg(**model_cfg["text_cfg"])
        expected = open_clip.model._build_text_tower(
            model_cfg["embed_dim"], text_cfg, model_cfg.get("quick_gelu", False)
        )
    tensors = {n.removeprefix("text_model."): p for n, p in theirs.state_dict().items()}
    text = TextWeights(
        encoders_module.kind_of(width),
        tensors,
        layers,
        heads,
        activation,
        theirs.text_projection.weight,
    )
    tower = encoders_module._text_tower(text, torch.device("meta"), torch.float32)
    shapes = {name: tuple(value.shape) for name, value in tower.named_parameters()}
    assert shapes == {name: tuple(value.shape) for name, value in expected.named_parameters()}
    assert str(tower.transformer.resblocks[0]) == str(expected.transformer.resblocks[0])
    assert text.name == f"CLIP-{kind}"


def test_a_pipeline_is_searched_on_its_own_text_encoders(tmp_path: Path):
    t2i = stable_diffusion_xl()
    before = {name: value.clone() for name, value in t2i.text_encoder_2.state_dict().items()}
    pez = PezPipeline.from_pipe(t2i, clip="own")
    output = pez(
        prompt=LONG, task="distill", options=QUICK, num_inference_steps=1, num_images_per_prompt=1
    )
    own = clip_from_encoders([t2i.text_encoder, t2i.text_encoder_2], device="cpu")
    assert output.prompts == [distill(own, LONG, QUICK).prompt] and len(output.images) == 1
    after = t2i.text_encoder_2.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(ArgumentError, match="without an image encoder"):
        pez(image=EXAMPLES[0], options=QUICK)
    with pytest.raises(ArgumentError, match=r"encoders of an image pipeline.*from_pipe"):
        pez.save_pretrained(tmp_path)


def test_a_pipeline_gets_an_image_encoder_and_moves_both():
    t2i, images = stable_diffusion_xl(), image_encoder(24)
    pez = PezPipeline.from_pipe(t2i, clip="own", image_encoder=images)
    output = pez(image=EXAMPLES[0], options=QUICK, num_inference_steps=1, num_images_per_prompt=1)
    assert output.prompts[0] and pez.clip.clip.feature_size == 24
    pez.to(dtype=torch.float64)
    assert {one.dtype for one in images.parameters()} == {torch.float64}
    assert pez.clip.clip.dtype == torch.float64


def test_own_needs_a_pipeline_that_reads_clip():
    with pytest.raises(ArgumentError, match="`image_encoder` is for `clip` 'own'"):
        PezPipeline.from_pipe(stable_diffusion(), "emoji-clip", image_encoder=image_encoder())
    t2i = flux()
    assert PezPipeline.from_pipe(t2i, clip="own").clip.clip.name == "CLIP of width 16"
    t2i.register_modules(text_encoder=None)
    with pytest.raises(ArgumentError, match="FluxPipeline has no text encoder of CLIP"):
        PezPipeline.from_pipe(t2i, clip="own")
