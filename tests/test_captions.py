"""Captions of other models: cleaned, cut, and written by a captioner."""

import json
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_readability import WORDS, tokenizers, transformers

from pez_core import (
    ArgumentError,
    SearchOptions,
    caption_wording,
    captioners,
    clean_caption,
    explain,
    fit_caption,
    invert,
    load_captioner,
    load_clip,
    prepare_caption,
    prune_caption,
)
from pez_core.caption import Caption, check_caption
from pez_core.captions import _with_articles, pruned
from pez_core.cli import main
from pez_core.clip.images import load_image
from pez_core.prompt_text import kept_spans, read
from pez_core.scoring import towards
from pez_core.targets import encode_prompt

IMAGE = str(EXAMPLES[0])
QUICK = ["--effort", "fast", "--steps", "2", "--swaps", "2", "--prompt-len", "2"]

# --- clean

CLEANED = {
    # BLIP and GIT
    "a dog sitting on the grass": None,
    "there is a dog that is sitting on the grass": "a dog that is sitting on the grass",
    "arafed dog sitting on a bench": "dog sitting on a bench",
    "there are two arafed dogs , one is black": "two dogs, one is black",
    # Florence-2
    "</s><s>A brown dog sits on the grass.</s><pad><pad>": "A brown dog sits on the grass",
    "<MORE_DETAILED_CAPTION>The image shows a red car.": "a red car",
    "The image is a close-up of a cat.": "a close-up of a cat",
    "The image shows a dog. It is brown.<loc_12><loc_998>": "a dog. It is brown",
    "In this image we can see a dog on the grass.": "a dog on the grass",
    "In the image, a woman is reading.": "a woman is reading",
    # kinds of images stay
    "This is a picture of a dog.": "a picture of a dog",
    "This digital painting depicts a castle on a hill.": "a digital painting of a castle on a hill",
    "The old photo captures a street": "an old photo of a street",
    "A black and white photograph of a man": None,
    "The provided image clearly features a boat": "a boat",
    # LLaVA, JoyCaption, Qwen-VL and other language models
    "Sure! Here is a caption:\n\nA dog in the snow.": "A dog in the snow",
    'Sure, here\'s a short caption for the image: "A dog in the snow."': "A dog in the snow",
    "I'd be happy to help! Here is a description: a dog": "a dog",
    "Based on the image, here is a detailed prompt for it: a dog, oil painting": (
        "a dog, oil painting"
    ),
    "**Caption:** A dog in the snow.": "A dog in the snow",
    "# Image Description\n\nA dog.\n\nIt is snowing.": "A dog. It is snowing",
    "Description: a *small* dog with a **red** hat": "a small dog with a red hat",
    "```text\na dog, a cat\n```": "a dog, a cat",
    "- a dog\n- a cat.\n- a bird": "a dog, a cat, a bird",
    "Tags:\n1. dog\n2. snow\n3. winter": "dog, snow, winter",
    "A dog\n\nsnow, winter,": "A dog, snow, winter",
    "A dog in\nthe   snow": "A dog in the snow",
    "<think>The user wants a caption.\nOK.</think>\n\nA dog.": "A dog",
    "The user wants a caption.\n</think>\n\nA dog.": "A dog",
    "<think>One.</think> Two. </think><answer>A dog.</answer>": "A dog",
    "A dog. <think>The user wants": "A dog",
    "<thinking>The user wants a short": "",
    "A dog in the snow.<|im_end|>": "A dog in the snow",
    "[INST] a dog [/INST]": "a dog",
    "<start_of_turn>A dog<end_of_turn>": "A dog",
    "A dog. Let me know if you would like another caption!": "A dog",
    "“A dog in the snow”": "A dog in the snow",
    "'A dog's life'": "A dog's life",
    # no chatter
    '"Stop" and "Go" on two signs, "left"': None,
    "2 dogs, 3.5 cats": None,
    "a caption on a sign: stop!": None,
    "sure-footed goats": None,
    "The image": None,
    "it is raining": None,
    "f/2.8, 85mm, *": None,
    # syntax
    "(red dog:1.2), <lora:my  style:0.8>, {} in {snow|rain}": None,
    "The image shows (a *dog*:1.2) __place__ saber \\(fate\\) <cat-toy>.": (
        "(a *dog*:1.2) __place__ saber \\(fate\\) <cat-toy>"
    ),
    "**{}, a dog.**": "{}, a dog",
    "": None,
    " \n.": "",
}


@pytest.mark.parametrize("text", CLEANED)
def test_only_the_description_is_left(text):
    expected = text if CLEANED[text] is None else CLEANED[text]
    assert clean_caption(text) == expected
    assert clean_caption(expected) == expected


PARTS = [
    *("The image shows ", "Sure! ", "Caption: ", "a dog", ". ", ", ", "\n", "\n\n", "- ", "# "),
    *("**", '"', "'", "`", "```\n", "</s>", "<think>", "</think>", "(a:1.2)", "<lora:x y:1>"),
    *("{}", "{a|b}", "[", "]", "(", "\\(", "\x00", "1. ", "there is ", "this is ", "A photo "),
]


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join))
def test_a_clean_caption_stays_and_is_one_line(text):
    cleaned = clean_caption(text)
    assert clean_caption(cleaned) == cleaned == cleaned.strip() and "\n" not in cleaned


@given(st.lists(st.sampled_from(PARTS[:16]), max_size=8).map("".join))
def test_weights_and_tags_stay(text):
    kept = "(red dog:1.2) <lora:x:0.8> {} {a|b} [cat:dog:0.5]"
    assert kept in clean_caption(f"{text} dog {kept} cat")


def test_long_texts_take_little_time():
    for part in ("a dog. ", "\n", "- a\n", "**", "The image shows ", '"', "(", "<think>"):
        clean_caption(part * 1000)


def test_a_caption_is_a_string():
    with pytest.raises(ArgumentError, match="text"):
        clean_caption(None)


# --- prune


def test_only_words_that_do_harm_are_dropped(tiny_clip):
    caption = prune_caption(tiny_clip, "a red dog on <lora:x:1> a boat (in rain:1.2)", IMAGE)
    left = explain(tiny_clip, caption, Path(IMAGE))
    assert "<lora:x:1>" in caption and all(word.contribution >= -1e-6 for word in left)
    assert prune_caption(tiny_clip, caption, IMAGE) == caption
    assert prune_caption(tiny_clip, "dog <lora:x:1>", IMAGE) == "dog <lora:x:1>"


def test_the_place_of_the_learned_words_stays(tiny_clip):
    text = "a red dog {} on a boat (in rain:1.2)"
    caption = prune_caption(tiny_clip, text, IMAGE)
    before, behind = (half.split() for half in caption.split("{}"))
    assert set(before) <= {"a", "red", "dog"} and set(behind) <= {
        "on",
        "a",
        "boat",
        "(in",
        "rain:1.2)",
    }
    plain = prune_caption(tiny_clip, text.replace("{} ", ""), IMAGE)
    assert " ".join([*before, *behind]) == plain
    assert prune_caption(tiny_clip, "{} dog", IMAGE) == "{} dog"


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ("big", "An orange parrot with a hat of the day"),
        ("parrot", "A big orange with a hat of the day"),
        ("big orange parrot", "with a hat of the day"),
        ("hat", "A big orange parrot with of the day"),
        ("the day", "A big orange parrot with a hat of"),
    ],
)
def test_an_article_goes_with_its_noun(gone, left):
    text = "A big orange parrot with a hat of the day"
    words = [(word, True) for word in text.split()]
    lost = {k for k, (word, _) in enumerate(words) if word in gone.split()}
    found = _with_articles(words, lost)
    assert " ".join(word for k, (word, _) in enumerate(found) if k not in lost) == left


def test_an_article_in_front_of_the_learned_words_stays():
    words, gone = ["a", "red", "(an", "owl:1.2)", "on", "a", "{}"], set()
    given = [(word, word != "(an") for word in words]
    assert _with_articles(given, gone) == given and gone == set()


def test_articles_alone_go_but_for_the_last_word():
    gone = set()
    found = _with_articles([(word, True) for word in ("a", "a", "owl,", "a")], gone)
    assert [word for word, _ in found][1:3] == ["an", "owl,"] and gone == {0, 3}
    gone = {1}
    assert _with_articles([("a", True), ("is", True)], gone)[0] == ("a", True) and gone == {1}


def test_a_word_that_means_something_is_left(tiny_clip, monkeypatch):
    """Where every word does harm, the one that does least of those with a meaning."""
    harm = {"a": 0, "is": 1, "of": 1, "boat": 3, "dog": 2, "there": 1}

    def scores(clip, texts, feature):
        return [-sum(harm[word] for word in text) for text in texts]

    monkeypatch.setattr("pez_core.scoring.towards", scores)
    assert prune_caption(tiny_clip, "there is a boat of a dog", IMAGE) == "a dog"
    assert prune_caption(tiny_clip, "there is of", IMAGE) in ("there", "is", "of")


def test_pruning_ends_where_it_has_to(tiny_clip):
    text, rounds = "a red dog on a boat in the rain", []
    assert prepare_caption(tiny_clip, text, prune_for=IMAGE, stop=lambda: True)[1] == ""
    hurried = SearchOptions(time_limit=1e-9)
    assert prepare_caption(tiny_clip, text, hurried, prune_for=IMAGE)[1] == ""
    caption, _ = pruned(tiny_clip, text, IMAGE, stop=lambda: rounds.append(1) or False)
    assert caption == prune_caption(tiny_clip, text, IMAGE) != text and rounds


def test_long_captions_are_pruned_side_by_side(tiny_clip, monkeypatch):
    """Several words in a round, and many texts in each pass through the text tower."""
    text = "a red dog on a boat, (in the:1.2) rain, a tree " * 10
    feature = tiny_clip.encode_images([load_image(IMAGE)])[0]
    passes, rounds, encode = [], [], tiny_clip.model.encode_text
    (together,) = towards(tiny_clip, [text.split()], feature)
    assert together == pytest.approx((encode_prompt(tiny_clip, text) @ feature).item(), abs=1e-6)
    monkeypatch.setattr(
        tiny_clip.model, "encode_text", lambda ids: passes.append(len(ids)) or encode(ids)
    )
    caption, _ = pruned(tiny_clip, text, IMAGE, stop=lambda: rounds.append(1) or False)
    dropped = len(text.split()) - len(caption.split())
    assert 1 < len(rounds) <= dropped and len(passes) < 20 * len(rounds), (dropped, rounds, passes)


def test_a_caption_for_several_images_is_pruned_by_their_mean(tiny_clip):
    text, images = "a red dog on a boat in the rain", list(EXAMPLES[:3])
    features = tiny_clip.encode_images([load_image(path) for path in images])
    caption = prune_caption(tiny_clip, text, images)
    assert caption == prune_caption(tiny_clip, text, features)
    assert all(word.contribution >= -1e-6 for word in explain(tiny_clip, caption, list(features)))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([*PARTS[10:], "{} ", " \\(x\\)", "BREAK "]), max_size=6).map("".join)
)
def test_whatever_a_caption_holds_its_place_stays(tiny_clip, text):
    if text.count("{}") < 2 and read(text.replace("{}", "")):
        caption = prune_caption(tiny_clip, text, IMAGE)
        assert caption.count("{}") == text.count("{}") and read(caption.replace("{}", ""))


# --- all in one


@pytest.mark.parametrize(
    "wording, text, expected",
    [
        ("tags", "The image shows a dog.", "a dog, {}"),
        ("free", "a dog, a cat,", "a dog, a cat, {}"),
        ("sentence", "The image shows a dog.", "a dog {}"),
        ("sentence", "1girl, solo, blue hair", "1girl, solo, blue hair, {}"),
        ("tags", "a photo of", "a photo of {}"),
        ("free", "Style:", "Style: {}"),
        ("tags", "(a dog:1.2)", "(a dog:1.2), {}"),
        ("sentence", "The image shows {} in a\nhouse.", "{} in a house"),
        ("sentence", "**{}, a dog**", "{}, a dog"),
        ("free", " \n.", ""),
        ("free", "", ""),
        ("free", " {} ", ""),
    ],
)
def test_the_text_of_any_captioner_becomes_a_caption(tiny_clip, wording, text, expected):
    options = SearchOptions(wording=wording)
    assert prepare_caption(tiny_clip, text, options) == (expected, "")


TAGS = [
    *("1girl, solo, blue hair", "a dog, a cat", "long_hair", "long_hair blue_eyes 1girl"),
    *("(masterpiece:1.2), best quality, <lora:x:1>, black and white", "red \\(fate\\), hat, sky"),
    "portrait of a woman, oil painting, sharp focus",
]
SENTENCES = [
    *("a dog", "", "a brown dog, sitting on the green grass", "A dog. A cat, a bird, a car."),
    *("a man, a woman, and a dog", "a dog, which is red, runs", "In Paris, a man walks"),
    "a small brown dog on the green grass, a red ball, a tree",
]


@pytest.mark.parametrize("text", [*TAGS, *SENTENCES])
def test_the_style_of_a_caption(text):
    assert caption_wording(text) == ("tags" if text in TAGS else "sentence")


@pytest.mark.parametrize(
    "wording, caption, expected",
    [
        ("tags", "a dog", "a dog, "),
        ("tags", "a dog, ", "a dog, "),
        ("tags", "a photo of", "a photo of "),
        ("tags", "a dog {}", "a dog "),
        ("sentence", "a dog", "a dog "),
        ("sentence", "1girl, solo", "1girl, solo, "),
        ("free", "a dog, a cat", "a dog, a cat "),
    ],
)
def test_what_stands_behind_a_caption_of_ones_own(tiny_clip, wording, caption, expected):
    assert check_caption(caption, wording).removesuffix("{}").rstrip() == expected.rstrip()
    options = SearchOptions(prompt_len=2, steps=None, swaps=1, wording=wording, effort="fast")
    (result,) = invert(tiny_clip, IMAGE, options, caption=caption)
    assert result.prompt == expected + result.learned


def test_a_caption_leaves_room_for_the_prompt_len_of_the_search(tiny_clip):
    for options, learned in [(SearchOptions(prompt_len=40), 40), (SearchOptions(), 8)]:
        caption, remark = prepare_caption(tiny_clip, LONG, options)
        assert room(tiny_clip, caption) >= learned and f"and {learned} are learned" in remark


def test_what_is_lost_of_a_caption_is_named(tiny_clip):
    assert prepare_caption(tiny_clip, "<think>What is it") == (
        "",
        "The caption holds no description, so the prompt has none.",
    )
    given = "a red dog on a boat in the rain"
    caption, remark = prepare_caption(tiny_clip, given, prune_for=IMAGE)
    left = caption.removesuffix("{}").rstrip(", ").split()
    assert left != given.split() and remark.startswith("Dropped, since they lower the similarity: ")
    dropped = remark.partition(': "')[2].removesuffix('".').split()
    assert sorted(left + dropped) == sorted(given.split())
    caption, remark = fit_caption(tiny_clip, "a dog, " * 20 + "a cat", 40)
    assert remark.endswith('40 are learned. Left out: "' + "a dog, " * 8 + 'a cat".')
    assert len(fit_caption(tiny_clip, LONG * 9, 40)[1]) < 260


def test_a_caption_that_leaves_less_than_the_usual_room_is_told(tiny_clip):
    options = SearchOptions(steps=2, swaps=0)
    (result,) = invert(tiny_clip, IMAGE, options, caption="dog " * 72)
    number = room(tiny_clip, "dog " * 72)
    assert 0 < number < 8
    message = f"Beside the caption there is room for {number} learned tokens, not for 8."
    assert result.note == message
    (result,) = invert(tiny_clip, IMAGE, options, caption="dog")
    assert result.note == ""


def test_a_caption_is_pruned_for_an_image_as_it_is_fit(tiny_clip):
    text, wide = (
        "The image shows a red dog on a boat in the rain.",
        Image.new("RGB", (90, 30), "red"),
    )
    wide.paste((0, 90, 200), (30, 0, 60, 30))
    for fit in ("crop", "stretch"):
        caption, _ = prepare_caption(tiny_clip, text, SearchOptions(fit=fit), wide)
        words = prune_caption(tiny_clip, "a red dog on a boat in the rain", wide, fit)
        assert caption.removesuffix("{}").rstrip(", ") == clean_caption(words)
    options = SearchOptions(prompt_len=2, steps=2, swaps=0)
    (result,) = invert(tiny_clip, wide, options, caption=caption)
    assert result.prompt.startswith(caption.removesuffix("{}"))


def test_texts_that_cannot_be_captions(tiny_clip):
    with pytest.raises(ArgumentError, match="once at most"):
        prepare_caption(tiny_clip, "{} and {}")
    with pytest.raises(ArgumentError, match="has to be a string"):
        prepare_caption(tiny_clip, None)
    with pytest.raises(ArgumentError, match="`caption` is empty"):
        prune_caption(tiny_clip, " ", IMAGE)


# --- fit

LONG = (
    "a small brown dog on the green grass, a red ball beside it, " + "a tree in the rain and " * 12
)


def room(clip, caption):
    return Caption(clip, caption if "{}" in caption else f"{caption} {{}}").room


@pytest.mark.parametrize("end", ["", " {}", ", {}", ", {}, oil painting"])
@pytest.mark.parametrize("prompt_len", [1, 8, 40, 60])
def test_a_long_caption_is_cut(tiny_clip, end, prompt_len):
    caption, remark = fit_caption(tiny_clip, LONG.strip() + end, prompt_len)
    assert room(tiny_clip, caption) >= prompt_len
    assert caption.endswith(end) and LONG.startswith(caption.removesuffix(end))
    assert not caption.removesuffix(end).endswith((" and", " in", " the", " a", ","))
    assert "The caption was cut from" in remark and f"and {prompt_len} are learned" in remark
    assert fit_caption(tiny_clip, caption, prompt_len) == (caption, "")


def test_a_text_without_spaces_is_cut_behind_a_mark(tiny_clip):
    sentence = "一只红色的鱼在蓝色的水里游泳"
    caption, remark = fit_caption(tiny_clip, f"{sentence}，" * 20, 8)
    assert caption == sentence or caption.startswith(f"{sentence}，")
    assert caption.endswith(sentence) and "Left out" in remark
    assert room(tiny_clip, caption) >= 8


def test_nothing_is_said_of_a_mark_that_is_cut(tiny_clip):
    options = SearchOptions(prompt_len=75, wording="tags")
    assert prepare_caption(tiny_clip, "<lora:x:1>", options) == ("<lora:x:1> {}", "")


@pytest.mark.parametrize("text", ["***", "--- ### ...", "_ , {}"])
def test_marks_describe_nothing(tiny_clip, text):
    assert prepare_caption(tiny_clip, text) == (
        "",
        "The caption holds no description, so the prompt has none.",
    )
    assert prepare_caption(tiny_clip, "🐟")[0].startswith("🐟")


def test_a_caption_that_fits_stays(tiny_clip):
    assert fit_caption(tiny_clip, "a dog. ", 8) == ("a dog. ", "")


def test_a_caption_ends_with_a_phrase_where_it_is_near(tiny_clip):
    caption, _ = fit_caption(tiny_clip, LONG, 59)
    assert caption == "a small brown dog on the green grass, a red ball beside it"
    caption, _ = fit_caption(tiny_clip, LONG, 64)
    assert caption == "a small brown dog on the green grass"


def test_tags_stay_and_weights_go_whole(tiny_clip):
    text = f"(a small dog:1.2) {LONG} (in the rain:1.3) <lora:x:1>, {{}}"
    caption, _ = fit_caption(tiny_clip, text, 70)
    assert caption == "(a small dog:1.2) <lora:x:1>, {}"
    caption, remark = fit_caption(tiny_clip, text, 75)
    assert caption == "<lora:x:1> {}" and "to 0 tokens" in remark


def test_a_caption_that_no_cut_makes_fit(tiny_clip):
    with pytest.raises(ArgumentError, match="prompt_len"):
        fit_caption(tiny_clip, LONG, 76)
    with pytest.raises(ArgumentError, match="prompt_len"):
        fit_caption(tiny_clip, f"a dog {{}} {LONG}", 8)


# --- captioners


def write_blip(folder):
    """Save a BLIP with random weights."""
    special = {"pad_token": "[PAD]", "sep_token": "[SEP]", "bos_token": "[DEC]"}
    vocabulary = {word: k for k, word in enumerate([*special.values(), *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[PAD]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    sides = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sides,
        "vocab_size": len(tokenizer),
        "intermediate_size": 32,
        "encoder_hidden_size": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 1.0,
    }
    vision = {**sides, "image_size": 16, "patch_size": 8, "intermediate_size": 32}
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision | {"initializer_range": 1.0}, projection_dim=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    write_blip(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder of a LLaVA with random weights, which follows instructions."""
    special = {"pad_token": "[PAD]", "eos_token": "</s>", "unk_token": "[UNK]"}
    words = [*special.values(), "<image>", "Describe", "USER", *WORDS]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, additional_special_tokens=["<image>"], **special
    )
    sides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sides |= {"intermediate_size": 32, "initializer_range": 1.0}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, **sides),
        text_config=transformers.LlamaConfig(vocab_size=len(words), eos_token_id=1, **sides),
        image_token_index=vocabulary["<image>"],
    )
    folder = tmp_path_factory.mktemp("llava")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for part in messages[0]['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} USER ",
    ).save_pretrained(folder)
    return folder


def test_an_instruction_is_no_part_of_the_text(llava, monkeypatch):
    asked, inputs = [], captioners._inputs
    monkeypatch.setattr(
        captioners, "_inputs", lambda *args: asked.append(inputs(*args)) or asked[0]
    )
    text = load_captioner(llava, device="cpu")(IMAGE)
    assert asked[0]["input_ids"].shape[1] > 10 and "pixel_values" in asked[0]
    assert text and len(text.split()) <= captioners._LONGEST and "[UNK] [UNK] [UNK]" not in text


def test_a_captioner_is_told_not_to_think(llava, monkeypatch):
    read = captioners._read

    def thinking(*args):
        model, processor = read(*args)
        processor.chat_template += "{% if enable_thinking is false %}Describe USER{% endif %}"
        return model, processor

    lengths, inputs = [], captioners._inputs

    def measured(*args):
        found = inputs(*args)
        lengths.append(found["input_ids"].shape[1])
        return found

    monkeypatch.setattr(captioners, "_inputs", measured)
    load_captioner(llava, device="cpu")(IMAGE)
    monkeypatch.setattr(captioners, "_read", thinking)
    load_captioner(llava, device="cpu")(IMAGE)
    assert lengths[1] == lengths[0] + 2


def test_a_captioner_writes_the_same_text_again(blip):
    write = load_captioner(blip, device="cpu")
    text = write(IMAGE)
    assert isinstance(text, str) and len(text) > 20 and "[PAD]" not in text
    assert write(EXAMPLES[0]) == text


def test_a_captioner_that_is_not_there(blip, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"not on this disk.*`download`"):
        load_captioner("some/captioner")
    with pytest.raises(ArgumentError, match="is empty"):
        load_captioner(" ")
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        load_captioner(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        load_captioner(tmp_path)
    monkeypatch.setattr(captioners, "find_spec", lambda name: None)
    with pytest.raises(
        ArgumentError, match=r"package transformers; pip install -e '.\[captioner]'"
    ):
        load_captioner(blip)


@pytest.mark.parametrize("wording, behind", [("tags", ", "), ("free", ", "), ("sentence", " ")])
def test_the_command_continues_the_text_of_a_captioner(blip, capsys, wording, behind):
    command = ["invert", IMAGE, str(EXAMPLES[1]), "--captioner", str(blip), "--wording", wording]
    command += ["--effort", "fast", "--swaps", "1", "--prompt-len", "2"]
    assert main([*command, "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for row, path in zip(rows, EXAMPLES, strict=False):
        whole = clean_caption(load_captioner(blip, device="cpu")(path))
        assert row["caption"] and whole.startswith(row["caption"])
        assert row["prompt"].startswith(row["caption"] + behind)
        assert ("cut from" in row.get("note", "")) == (row["caption"] != whole)
    assert main([*command, "--device", "cpu"]) == 0
    assert f"  caption: {rows[0]['caption']}\n" in capsys.readouterr().out


def test_a_batch_continues_the_texts_of_a_captioner(blip, tmp_path):
    (tmp_path / "images").mkdir()
    for path in EXAMPLES[:2]:
        shutil.copy(path, tmp_path / "images")
    command = ["batch", str(tmp_path / "images"), str(tmp_path / "out"), "--captioner", str(blip)]
    assert main([*command, *QUICK, "--device", "cpu"]) == 0
    rows = {row["id"]: row for row in parquet.read_table(tmp_path / "out").to_pylist()}
    for path in EXAMPLES[:2]:
        row, whole = rows[path.name], clean_caption(load_captioner(blip, device="cpu")(path))
        assert row["caption"] and whole.startswith(row["caption"])
        assert row["prompt"].startswith(f"{row['caption']}, ")
        assert ("cut from" in (row["note"] or "")) == (row["caption"] != whole)


def wordings_of(monkeypatch, *command):
    """The exit status of `pez invert`, and the wording of each search."""
    found = []

    def searched(clip, images, options, caption, **others):
        found.append(options.wording)
        return invert(clip, images, options, caption=caption, **others)

    monkeypatch.setattr("pez_core.invert", searched)
    return main(["invert", *command, "--effort", "fast", "--swaps", "1", "--json"]), found


def test_the_command_continues_each_caption_in_its_style(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    texts = {"1": "1girl, solo, blue hair", "2": "The image shows a dog on the grass."}
    monkeypatch.setattr(
        "pez_core.load_captioner", lambda name, **options: lambda image: texts[str(image.width)]
    )
    for number in texts:
        Image.new("RGB", (int(number), 2), "red").save(f"{number}.png")
    command = ["1.png", "2.png", "--captioner", "x", "--prompt-len", "2"]
    assert wordings_of(monkeypatch, *command) == (0, ["tags", "sentence"])
    tags, sentence = json.loads(capsys.readouterr().out)
    assert tags["prompt"].startswith("1girl, solo, blue hair, ")
    assert tags["note"] == "The caption is a list of tags, so the learned words are tags, too."
    assert sentence["prompt"].startswith("a dog on the grass ") and "note" not in sentence
    assert wordings_of(monkeypatch, *command, "--wording", "sentence")[1] == ["sentence"] * 2
    command = ["1.png", "--prompt-len", "2", "--caption"]
    assert wordings_of(monkeypatch, *command, "blue hair, solo") == (0, ["tags"])
    assert wordings_of(monkeypatch, *command, "a dog") == (0, ["sentence"])


def test_a_batch_continues_tags_by_tags(tmp_path):
    (tmp_path / "images").mkdir()
    for path, text in zip(EXAMPLES[:2], ("1girl, solo, blue hair", "a dog"), strict=True):
        shutil.copy(path, tmp_path / "images")
        (tmp_path / "images" / path.name).with_suffix(".txt").write_text(text)
    command = ["batch", str(tmp_path / "images"), str(tmp_path / "out"), "--captions"]
    quick = ["--effort", "fast", "--swaps", "1", "--prompt-len", "2", "--wording", "sentence"]
    assert main([*command, *quick, "--device", "cpu"]) == 0
    rows = {row["id"]: row for row in parquet.read_table(tmp_path / "out").to_pylist()}
    tags, sentence = (rows[path.name] for path in EXAMPLES[:2])
    assert tags["prompt"].startswith("1girl, solo, blue hair, ") and "tags, too" in tags["note"]
    assert sentence["prompt"].startswith("a dog ") and sentence["note"] is None


def test_the_command_prunes_the_caption(monkeypatch, capsys):
    monkeypatch.setattr(
        "pez_core.load_captioner", lambda name, **options: lambda image: "The image shows a boat."
    )
    command = ["invert", "examples/noto-fish.png", "--captioner", "x", *QUICK, "--json"]
    monkeypatch.chdir(EXAMPLES[0].parent.parent)
    before = main(command) or json.loads(capsys.readouterr().out)[0]["caption"]
    after = main([*command, "--prune-caption"]) or json.loads(capsys.readouterr().out)[0]["caption"]
    assert before == "a boat" and after in ("a", "boat", "a boat")


OWN = "a red dog on {} a boat in the rain"


def test_a_caption_of_ones_own_is_pruned_for_each_image(tiny_clip, monkeypatch, capsys):
    monkeypatch.setattr("pez_core.load_clip", lambda *_, **__: tiny_clip)
    images = list(map(str, EXAMPLES[:2]))
    command = ["invert", *images, "--caption", OWN, "--prune-caption", *QUICK, "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    for row, image in zip(rows, images, strict=True):
        before, after = prune_caption(tiny_clip, OWN, image).split("{}")
        assert row["prompt"].startswith(before) and row["prompt"].endswith(after)
        assert row["note"].startswith("Dropped, since they lower the similarity: ")
    assert main([*command, "--shared"]) == 0
    row = json.loads(capsys.readouterr().out)
    before, after = prune_caption(tiny_clip, OWN, images).split("{}")
    assert row["prompt"].startswith(before) and row["prompt"].endswith(after)
    assert row["note"].startswith("Dropped, since they lower the similarity: ")
    assert row["caption"] == prune_caption(tiny_clip, OWN, images)


def test_ctrl_c_ends_pruning_for_images_that_share_a_prompt(tiny_clip, monkeypatch, capsys):
    monkeypatch.setattr("pez_core.load_clip", lambda *_, **__: tiny_clip)
    stops = []

    def pruned(clip, caption, images, fit, stop):
        signal.raise_signal(signal.SIGINT)
        stops.append(stop())
        return caption, ""

    monkeypatch.setattr("pez_core.cli.captions.pruned", pruned)
    command = ["invert", *map(str, EXAMPLES[:2]), "--shared", "--caption", OWN, "--prune-caption"]
    assert main([*command, *QUICK]) == 130 and stops == [True]
    assert "a red dog on" in capsys.readouterr().out


def test_a_shared_list_of_tags_is_continued_by_tags(tiny_clip, monkeypatch, capsys):
    monkeypatch.setattr("pez_core.load_clip", lambda *_, **__: tiny_clip)
    seen = []

    def invert(clip, images, options, **given):
        seen.append((options.wording, given["caption"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("pez_core.invert", invert)
    given = ["--shared", "--caption", "red dog, old boat, rain", "--prune-caption"]
    assert main(["invert", *map(str, EXAMPLES[:2]), *given]) == 130
    assert [wording for wording, _ in seen] == ["tags"]


def test_a_caption_of_ones_own_is_pruned_in_a_batch(tmp_path):
    (tmp_path / "images").mkdir()
    for path in EXAMPLES[:2]:
        shutil.copy(path, tmp_path / "images")
    command = ["batch", str(tmp_path / "images"), str(tmp_path / "out"), "--caption", OWN]
    assert main([*command, "--prune-caption", *QUICK, "--device", "cpu"]) == 0
    rows = {row["id"]: row for row in parquet.read_table(tmp_path / "out").to_pylist()}
    clip = load_clip("emoji-clip", device="cpu")
    for path in EXAMPLES[:2]:
        before, after = prune_caption(clip, OWN, path).split("{}")
        prompt = rows[path.name]["prompt"]
        assert prompt.startswith(before) and prompt.endswith(after)
        assert rows[path.name]["note"].startswith("Dropped, since")


def test_the_pipeline_takes_the_text_of_any_captioner(tiny_clip):
    from pez_core import PezPipeline

    prior = PezPipeline(tiny_clip)
    prior.set_progress_bar_config(disable=True)
    options = SearchOptions(prompt_len=2, effort="fast", steps=2, swaps=1)
    text, images = "The image shows a red dog on a boat in the rain.", list(EXAMPLES[:2])
    changes = {"clean_caption": True, "prune_caption": True}
    found = prior(image=images, prompt=text, options=options, task_kwargs=changes).results
    for result, image in zip(found, images, strict=True):
        caption, remark = prepare_caption(tiny_clip, text, options, image)
        assert result.prompt.startswith(caption.removesuffix("{}")) and result.note == remark
    (pruned_alone,) = prior(
        image=images,
        prompt=OWN,
        options=options,
        task_kwargs={"prune_caption": True, "shared": True},
    ).results
    assert pruned_alone.prompt.startswith(prune_caption(tiny_clip, OWN, images).split("{}")[0])
    with pytest.raises(ArgumentError, match="leave `prune_caption` or `negative_prompt` out"):
        both = {"prune_caption": True, "negative_prompt": True}
        prior(image=images, prompt=OWN, options=options, task_kwargs=both)
    with pytest.raises(ArgumentError, match="`clean_caption` has to be True or False"):
        prior(image=images, prompt=OWN, options=options, task_kwargs={"clean_caption": 1})


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--captioner", "x", "--caption", "a dog"],
            "--captioner cannot be combined with --caption",
        ),
        (["--captioner", "x", "--shared"], "--captioner cannot be combined with --shared"),
        (["--captioner", "x", "--negative-prompt"], "cannot be combined with --negative-prompt"),
        (["--prune-caption"], "--prune-caption requires --captioner or --caption; add one of them"),
        (
            ["--prune-caption", "--caption", "a dog", "--negative-prompt"],
            "leave --prune-caption or --negative-prompt out",
        ),
        (["--captioner", "some/model"], "--captioner is 'some/model', which is not on this disk"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    assert main(["invert", IMAGE, *options]) == 2
    assert message in capsys.readouterr().err


def test_an_image_without_a_caption_has_an_error(blip, monkeypatch, capsys):
    """Of a captioner that fails on one image: the others have prompts."""
    written, images = captioners._written, []

    def write(model, processor, image):
        images.append(image)
        if len(images) == 1:
            raise RuntimeError("out of order")
        return written(model, processor, image)

    monkeypatch.setattr(captioners, "_written", write)
    command = ["invert", IMAGE, str(EXAMPLES[1]), "--captioner", str(blip), *QUICK, "--json"]
    assert main([*command, "--wording", "free"]) == 1
    failed, found = json.loads(capsys.readouterr().out)
    message = f"--captioner is {str(blip)!r}, which writes no caption (out of order)"
    assert failed["error"].startswith(message) and "prompt" not in failed
    assert found["prompt"] and "error" not in found


def test_kept_spans_are_those_of_the_syntax():
    text = "a (b:1.2) {} <lora:x:1>"
    assert [text[start:end] for start, end in kept_spans(text)] == ["(b:1.2)", "<lora:x:1>"]
