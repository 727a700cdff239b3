"""What `emoji-clip` is trained on and how: captions that are true, and shortcuts that are exact."""

import random
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import paraphrase_captions
import train_emoji_clip as train
from emoji_captions import COLOUR_WORDS, Captions, Lexicon, looks, read_phrases
from emoji_data import Drawing, words_of
from emoji_views import View

RED, GREEN, BLUE = (221, 46, 68), (92, 170, 60), (40, 90, 200)


def picture(*columns, turned=False):
    """A wide bar (64, 64, 4) of colours from left to right, or from top to bottom."""
    image = np.zeros((64, 64, 4), np.uint8)
    for k, colour in enumerate(columns):
        start = 8 + 48 * k // len(columns)
        image[20:40, start : 8 + 48 * (k + 1) // len(columns)] = (*colour, 255)
    return image.transpose(1, 0, 2) if turned else image


def captions_of(*images, name="parrot", style="noto"):
    drawings = [Drawing(style, "x", "", name, ["bird"], 3, "train") for _ in images]
    return Captions(drawings, np.stack(images), Lexicon(), random.Random(0))


def test_colours_and_where_they_are_come_from_the_pixels():
    bar, tower = looks(np.stack([picture(RED, GREEN), picture(RED, GREEN, BLUE, turned=True)]))
    assert bar.colours == ["green", "red"] or bar.colours == ["red", "green"]
    assert (bar.places["left"], bar.places["right"]) == ("red", "green")
    assert (tower.places["top"], tower.places["bottom"]) == ("red", "blue")
    assert "wide" in bar.shapes and "tall" in tower.shapes
    assert bar.has("red") and not bar.has("blue")
    assert "blue" in bar.false_colours() and "green" not in bar.false_colours()


def test_captions_say_only_colours_that_are_there():
    written = captions_of(picture(RED, GREEN))
    said = set()
    for _ in range(300):
        said |= set(words_of(written.caption(View((0,), False, "white"), 14).text)) & COLOUR_WORDS
    assert {"red", "green"} <= said
    assert all(written.looks[0].has(word) for word in said - {"white"})


def test_sides_change_when_the_view_is_mirrored():
    written = captions_of(picture(RED, GREEN))
    for flip, side in ((False, "left"), (True, "right")):
        texts = [written._placed(0, "parrot", flip) for _ in range(50)]
        assert all(f"red at the {side}" in t or "red " + side in t for t in texts if "red" in t)


@pytest.mark.slow
def test_phrases_with_colours_are_for_drawings_that_have_them():
    green, blue = (captions_of(picture(colour), name="frog") for colour in (GREEN, BLUE))
    black = captions_of(picture((0, 0, 0)), name="frog", style="emojione-monotone")
    said = [" ".join(one.phrases[0]).split() for one in (green, blue, black)]
    assert ["green" in words for words in said] == [True, False, False]


def test_what_is_nearly_true_differs_and_uses_known_words():
    written = captions_of(picture(RED, GREEN))
    known = len(written.lexicon.tokens)
    for _ in range(300):
        view = View((0,), False, "white")
        caption = written.caption(view, 14)
        wrong = written.nearly(caption, view)
        assert wrong != caption.text
        for text in (caption.text, wrong, written.corrupted(caption)):
            written.lexicon.ids(text)
    assert len(written.lexicon.tokens) == known


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    image = {"image_size": 64, "width": 32, "head_width": 64, "layers": [1, 1, 1, 1]}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return CLIP(32, image | {"patch_size": None}, text).eval()


@torch.no_grad()
def test_texts_of_all_lengths_are_encoded_as_open_clip_does(model):
    rows = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    whole = torch.zeros(3, 77, dtype=torch.long)
    for row, ids in zip(rows, whole, strict=True):
        ids[: len(row) + 2] = torch.tensor([49406, *row, 49407])
    theirs = model.encode_text(whole, normalize=True)
    for row, one in zip(rows, theirs, strict=True):
        embeddings = model.token_embedding(torch.tensor([[49406, *row, 49407]]))
        ours = train.encode_text(model, embeddings, torch.tensor([len(row) + 1]))
        torch.testing.assert_close(ours[0], one)


@torch.no_grad()
def test_the_image_tower_in_two_parts_is_the_whole(model, monkeypatch):
    monkeypatch.setattr(train, "autocast", nullcontext)  # bfloat16 where a processor has it
    for norm in (m for m in model.visual.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 3, 64, 64)
    visual = model.visual
    halves = train.attention_pool(visual.attnpool, visual.layer4(train.frozen_trunk(visual)(x)))
    torch.testing.assert_close(halves, visual(x), rtol=1e-3, atol=1e-4)


def test_the_hunt_only_improves_and_uses_no_barred_token(model):
    hunt = train.Hunt()
    barred = torch.zeros(len(model.token_embedding.weight))
    barred[:1000] = -torch.inf
    for k in range(train.HUNTED + 1):
        prompt = torch.randint(1000, 49000, (train.ADVERSARIAL_LEN,))
        hunt.add(k, prompt, barred, free=False)
    assert hunt.drawings[:2] == [train.HUNTED, 1] and len(hunt.prompts) == train.HUNTED

    image = nn.functional.normalize(torch.randn(train.HUNTED, 32), dim=1)

    def cosines():
        embeddings = model.token_embedding(train._edged(hunt.prompts))
        return train.Hunt._cosines(model, embeddings, image).detach()

    before = cosines()
    for position in (0, 5, train.ADVERSARIAL_LEN - 1):
        hunt.improve(model, image, position)
    assert (cosines() >= before - 1e-6).all() and cosines().mean() > before.mean()
    assert hunt.prompts.min() >= 1000


SENSES = {
    "noun": [
        ("house", ["house", "home"]),
        ("couch", ["couch", "sofa", "lounge"]),
        ("dog", ["dog"]),
    ],
    "verb": [("hold", ["hold", "take_hold", "grip"])],
    "adj": [("small", ["small", "little"])],
}


@pytest.fixture
def wordnet(tmp_path):
    """A folder with a few words in the form of WordNet's files."""
    for part, senses in SENSES.items():
        data, index = "  1 licence\n", ["  1 licence"]
        for lemma, words in senses:
            place = len(data.encode())
            pairs = " ".join(f"{word} 0" for word in words)
            data += f"{place:08d} 03 n {len(words):02x} {pairs} 001 @ 00000001 n 0000 | text\n"
            index.append(f"{lemma} n 2 2 @ ~ 2 1 {place:08d} 00000099")
        (tmp_path / f"data.{part}").write_text(data)
        (tmp_path / f"index.{part}").write_text("\n".join(index) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("phrase", "paraphrase", "good"),
    [
        ("a brown dog on a couch", "on a sofa there is a brown dog", True),
        ("a small house", "the picture of a little home", True),
        ("a hand holding a dog", "a dog gripped by a hand", True),
        ("a small house", "a small house", False),  # nothing is said in other words
        ("a small house", "a small house, a dog", False),  # more is said
        ("a dog, a house and a couch", "a dog", False),  # too much is missing
        ("a red dog and a blue house", "a blue dog and a red house", False),  # other colours
        ("a red dog and a blue house", "a house that is blue and a dog that is red", True),
        ("a red dog", "a dog", False),
        ("a dog on the left of a house", "a dog on the right of a house", False),
        ("two dogs", "the dogs", False),
        ("a dog with a couch", "a dog without a couch", False),
        ("a dog and a house", "a dog, a house and the house", False),  # said again
    ],
)
def test_a_paraphrase_stays_true(wordnet, phrase, paraphrase, good):
    checker = paraphrase_captions.Checker(paraphrase_captions.Synonyms(wordnet))
    assert checker.stays_true(phrase, paraphrase) is good


def test_paraphrases_are_read_as_phrases_are(tmp_path):
    found = {"dog": ["a puppy", "a small dog"], "cat": []}
    paraphrase_captions.write(found, tmp_path / "some.tsv")
    assert read_phrases(tmp_path / "some.tsv") == {"dog": ["a puppy", "a small dog"]}
