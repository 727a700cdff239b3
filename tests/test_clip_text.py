"""Two independent ways to text features must agree: ours from embeddings, open_clip's from ids."""

import json

import open_clip
import pytest
import torch
from conftest import CLIP, CustomTextCLIP, make_clip, make_model
from open_clip.coca_model import CoCa
from PIL import Image
from safetensors.torch import save_file

from pez_core import ArgumentError, Clip, JointClip, SearchOptions, invert, load_clip
from pez_core.clip.text import TextTower, Words

TOWERS = {
    "CLIP": (CLIP, {}, True),
    "CLIP with QuickGELU": (CLIP, {"quick_gelu": True}, True),
    "CLIP with one layer": (CLIP, {"text": {"layers": 1}}, True),
    "CLIP with LayerScale": (CLIP, {"text": {"ls_init_value": 0.5}}, True),
    "CLIP with projection bias": (CLIP, {"text": {"proj_bias": True}}, True),
    "CLIP pooled at eos": (CLIP, {"text": {"pool_type": "eos", "eos_id": 49407}}, True),
    "short context": (CLIP, {"text": {"context_length": 32}}, True),
    "custom text": (CustomTextCLIP, {}, True),
    "custom block": (CustomTextCLIP, {"text": {"block_type": "custom", "qk_norm": True}}, True),
    "no causal mask (MobileCLIP)": (CustomTextCLIP, {"text": {"no_causal_mask": True}}, False),
    "no mask, last (SigLIP)": (
        CustomTextCLIP,
        {"text": {"no_causal_mask": True, "pool_type": "last", "context_length": 64}},
        False,
    ),
    "class token (CoCa)": (
        CustomTextCLIP,
        {"text": {"embed_cls": True, "context_length": 76}},
        False,
    ),
}


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("prompt_len", [1, 5, 16])
def test_features_equal_open_clips_own(kind, prompt_len):
    model_class, options, causal = TOWERS[kind]
    clip = make_clip(model_class, **options)
    assert clip.text.causal == causal
    generator = torch.Generator().manual_seed(prompt_len)
    ids = clip.vocabulary[torch.randint(len(clip.vocabulary), (3, prompt_len), generator=generator)]
    texts = [clip.text.words.decode(row) for row in ids.tolist()]
    embeddings = clip.text.token_embedding.detach()[ids]
    ours = torch.nn.functional.normalize(clip.text(embeddings), dim=-1)
    torch.testing.assert_close(ours, clip.encode_texts(texts), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize(
    "templates", [["a photo of {} on a beach"], ["{}, oil", "low light {}", "{}"]]
)
def test_fixed_text_around_the_learned_tokens(kind, templates):
    model_class, options, _ = TOWERS[kind]
    clip = make_clip(model_class, **options)
    words = clip.text.words
    ids = clip.vocabulary[torch.tensor([[5, 80, 900], [7, 7, 1200], [9, 10, 11]])]
    encode = clip.text.encoder(
        [tuple(words.encode(part) for part in template.split("{}")) for template in templates]
    )
    ours = torch.nn.functional.normalize(encode(clip.text.token_embedding.detach()[ids]), dim=-1)
    texts = [
        templates[k % len(templates)].format(words.decode(row))
        for k, row in enumerate(ids.tolist())
    ]
    torch.testing.assert_close(ours, clip.encode_texts(texts), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_encoding_what_follows_given_what_precedes(kind, first):
    model_class, options, _ = TOWERS[kind]
    clip = make_clip(model_class, **options)
    ids = clip.vocabulary[torch.tensor([[5, 80, 900], [7, 7, 1200], [9, 10, 11], [9, 2, 3]])]
    ids[1, :first], ids[3, :first] = ids[0, :first], ids[2, :first]  # two prompts per problem
    encode = clip.text.encoder([(clip.text.words.encode("a photo of"), ())])
    embeddings = clip.text.token_embedding.detach()[ids]
    whole = encode(embeddings)
    rest = encode.given(embeddings[::2, :first])(embeddings[:, first:])
    torch.testing.assert_close(rest, whole, atol=2e-6, rtol=1e-4)
    one_by_one = encode.given(embeddings[:, :first]).given(embeddings[:, first : first + 1])
    if first < 2:
        torch.testing.assert_close(
            one_by_one(embeddings[:, first + 1 :]), whole, atol=2e-6, rtol=1e-4
        )


def test_longest_prompt_fills_the_context(tiny_clip):
    assert tiny_clip.text.max_prompt_len == 75
    ids = tiny_clip.vocabulary[:75]
    ours = torch.nn.functional.normalize(
        tiny_clip.text(tiny_clip.text.token_embedding.detach()[ids][None]), dim=-1
    )
    theirs = tiny_clip.encode_texts([tiny_clip.text.words.decode(ids.tolist())])
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_gradient_equals_the_whole_towers(tiny_clip):
    ids = tiny_clip.vocabulary[100:108][None]
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    embeddings = tiny_clip.text.token_embedding.detach()[ids].requires_grad_()
    (ours,) = torch.autograd.grad((tiny_clip.text(embeddings) @ direction).sum(), embeddings)

    # d/d(embedding) through the public path: the hooked output of the embedding layer
    seen = {}

    def keep(module, inputs, output):
        seen["embeddings"] = output

    hook = tiny_clip.model.token_embedding.register_forward_hook(keep)
    text = tiny_clip.text.words.decode(ids[0].tolist())
    features = tiny_clip.model.encode_text(tiny_clip.tokenizer([text]))
    hook.remove()
    (theirs,) = torch.autograd.grad((features @ direction).sum(), seen["embeddings"])
    torch.testing.assert_close(ours, theirs[:, 1:9], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rows, prompt_len", [(1, 8), (5, 8), (2, 30)])
def test_the_memory_of_a_prompt_is_about_what_is_kept_for_its_gradient(
    emoji_clip, rows, prompt_len
):
    weights = {p.untyped_storage().data_ptr() for p in emoji_clip.model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    width = emoji_clip.text.token_embedding.shape[1]
    embeddings = torch.randn(rows, prompt_len, width).requires_grad_()
    encode = emoji_clip.text.encoder()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encode(embeddings)
    found = sum(storage.nbytes() for storage in kept.values())
    assert features.requires_grad
    assert 0.75 < found / (rows * emoji_clip.text.memory_per_prompt(prompt_len)) < 1.1


def test_coca_model_equals_its_own_encode_text():
    options = {"context_length": 76, "embed_cls": True, "output_tokens": True, "pad_id": 0}
    model = make_model(
        CoCa,
        options,
        multimodal_cfg={"context_length": 76, "width": 32, "heads": 4, "layers": 1},
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=76)
    tower = TextTower(model, tokenizer)
    ids = torch.tensor([tokenizer.encode("a red apple on a table")])
    ours = torch.nn.functional.normalize(tower(tower.token_embedding.detach()[ids]), dim=-1)
    theirs = model.encode_text(tokenizer(["a red apple on a table"]))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_no_weight_gets_a_gradient_or_changes(tiny_clip):
    before = {k: v.clone() for k, v in tiny_clip.model.state_dict().items()}
    embeddings = tiny_clip.text.token_embedding.detach()[:4][None].requires_grad_()
    torch.autograd.grad(tiny_clip.text(embeddings).sum(), embeddings)
    assert all(p.grad is None and p.requires_grad for p in tiny_clip.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tiny_clip.model.state_dict().items())


def test_hugging_face_text_tower_is_refused():
    class Fake(torch.nn.Module):
        def __init__(self):
            super().__init__()
            # the real class without its __init__, which would need a configuration from the hub
            self.text = open_clip.hf_model.HFTextEncoder.__new__(open_clip.hf_model.HFTextEncoder)
            torch.nn.Module.__init__(self.text)

    with pytest.raises(ValueError, match="Hugging Face text tower"):
        TextTower(Fake(), open_clip.SimpleTokenizer())


@pytest.fixture
def hugging_face_tokenizer(tmp_path):
    """A real one, of words, in the manner of SigLIP: an end token, padding, no start token."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "apple", "on", "table", "green", "dog"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    return open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=16, clean="canonicalize")


@pytest.mark.parametrize(
    "kind", [{"no_causal_mask": True, "pool_type": "last"}, {"pool_type": "eos", "eos_id": 1}]
)
def test_a_hugging_face_tokenizer_beside_open_clips_own_tower(hugging_face_tokenizer, kind):
    text = kind | {"context_length": 16, "vocab_size": 10}
    clip = Clip(make_model(CustomTextCLIP, text), hugging_face_tokenizer)
    assert clip.vocabulary.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert clip.text.max_prompt_len == 15 and clip.text.causal == ("eos_id" in kind)
    ids = torch.tensor([[4, 5, 6, 3, 7], [9, 9, 9, 9, 9]])
    embeddings = clip.text.token_embedding.detach()[ids]
    ours = torch.nn.functional.normalize(clip.text(embeddings), dim=-1)
    theirs = clip.encode_texts(["red apple on a table", "dog dog dog dog dog"])
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    options = SearchOptions(prompt_len=15, swaps=0, steps=20, block_unsafe=False)
    (result,) = invert(clip, torch.rand(8, 8, 3), options)
    assert clip.text.words.encode(result.prompt) == result.token_ids


def test_a_folder_with_its_own_hugging_face_tokenizer(hugging_face_tokenizer, tmp_path):
    """Loads without the network and without a cache."""
    text = {"context_length": 16, "vocab_size": 10, "no_causal_mask": True, "pool_type": "last"}
    model = make_model(CustomTextCLIP, text)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    model_cfg = model.built_from["model_cfg"]
    model_cfg["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "lower"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    clip = load_clip(str(tmp_path), device="cpu")
    assert clip.vocabulary.tolist() == [3, 4, 5, 6, 7, 8, 9] and clip.config is None
    ours = clip.encode_texts(["Red apple"])
    theirs = torch.nn.functional.normalize(
        model.encode_text(hugging_face_tokenizer(["red apple"])), dim=-1
    )
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_tokenizers_are_equal_where_they_encode_and_decode_alike(hugging_face_tokenizer):
    plain = Words(open_clip.SimpleTokenizer())
    assert plain.equals(Words(open_clip.SimpleTokenizer(context_length=32)))
    assert not plain.equals(Words(open_clip.SimpleTokenizer(clean="canonicalize")))
    assert not plain.equals(Words(hugging_face_tokenizer))
    assert not Words(hugging_face_tokenizer).equals(Words(hugging_face_tokenizer))
    first, second = make_clip(), make_clip(seed=1)
    assert JointClip([first, second]).clips[1].text.words is first.text.words


def test_words_print_and_read():
    words = Words(open_clip.SimpleTokenizer())
    ids = words.encode("a red apple")
    assert words.decode(ids) == "a red apple"
    assert words.round_trips(ids)
    piece = words.tokenizer.encoder["app"]  # no word end: fuses with what follows
    assert not words.round_trips([piece])
    assert not words.round_trips([49407]) and not words.round_trips([*ids, 49406])


# ------------------------------------------------------------------------- moving


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["CLIP", "CLIP with LayerScale", "class token (CoCa)"])
def test_a_clip_moves_to_another_precision_and_back(kind, dtype):
    model_class, options, _ = TOWERS[kind]
    clip, texts = make_clip(model_class, **options), ["a red apple", "dog"]
    picture = [Image.effect_noise((20, 20), 80).convert("RGB")]
    before = clip.encode_texts(texts), clip.encode_images(picture)
    clip.cache["x"] = 1
    assert clip.to(dtype=dtype) is clip and clip.dtype == dtype and not clip.cache
    ours = clip.text(clip.text.token_embedding.detach()[clip.vocabulary[None, :3]].float())
    text = clip.text.words.decode(clip.vocabulary[:3].tolist())
    theirs = clip.encode_texts([text])
    assert float((torch.nn.functional.normalize(ours.float(), dim=-1) * theirs).sum()) > 0.99
    clip.to("cpu", torch.float32)
    assert clip.dtype == torch.float32
    for a, b in zip((clip.encode_texts(texts), clip.encode_images(picture)), before, strict=True):
        assert float((a * b).sum(-1).min()) > 0.99


def test_a_clip_that_was_loaded_in_half_precision_moves_too(tmp_path):
    clip = load_clip("emoji-clip", device="cpu", dtype=torch.bfloat16)
    whole = load_clip("emoji-clip", device="cpu").encode_texts(["a red apple"])
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        clip.to(dtype=dtype)
        assert clip.dtype == dtype
        assert float((clip.encode_texts(["a red apple"]) * whole).sum()) > 0.99
    joint = JointClip([make_clip(), make_clip(seed=1)])
    assert joint.to(dtype=torch.float16) is joint
    assert {one.dtype for one in joint.clips} == {torch.float16}


def test_a_clip_that_cannot_move_is_refused():
    clip = make_clip()
    for given in ({"device": "nowhere"}, {"dtype": torch.float64}, {"dtype": "half"}):
        with pytest.raises(ArgumentError, match=f"`{next(iter(given))}`"):
            clip.to(**given)
    with pytest.raises(ArgumentError, match="a memory manager moves its image tower"):
        load_clip("emoji-clip", device="cpu", low_memory=True).to("cpu")


@pytest.mark.parametrize("clean", ["lower", "canonicalize"])
def test_words_read_together_are_those_that_round_trip_alone(clean):
    words = Words(open_clip.SimpleTokenizer(clean=clean))
    ids = range(0, words.size, 9)
    found = words.round_trip_ids(ids)
    alone = Words(words.tokenizer)
    assert found == [i for i in ids if alone.round_trips_inside([i])]
    assert words.round_trip_ids([*ids, words.size, -1]) == found
