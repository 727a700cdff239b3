"""English articles in learned prompts."""

from __future__ import annotations

import pytest

from pez_core import SearchOptions, invert
from pez_core.articles import article_of, with_right_articles


@pytest.mark.parametrize(
    ("article", "words"),
    [
        ("an", "angel orange icon umbrella uninvited unimportant hour honest ugly upward"),
        ("an", "unidentified X-ray MRI SUV 8-bit 18th-century 80s 11 apple"),
        ("a", "usage usable Utah Uruguay onesie UFO ufo USB 110 3d Unicorn"),
        (
            "a",
            "fish unicorn uniform user usual utensil ukulele utility ukrainian european one once",
        ),
    ],
)
def test_the_sound_decides(article, words):
    assert {word: article_of(word) for word in words.split()} == dict.fromkeys(
        words.split(), article
    )


def corrected(clip, text, allowed=None):
    words = clip.text.words
    ids = words.encode(text)
    allowed = clip.vocabulary.tolist() if allowed is None else allowed
    return words.decode(with_right_articles(ids, words.decode, words.encode, allowed))


def test_articles_follow_the_next_word(tiny_clip):
    assert (
        corrected(tiny_clip, "a angel and an fish on a orange")
        == "an angel and a fish on an orange"
    )
    assert corrected(tiny_clip, "a, a 3 and an") == "a , a 3 and an"
    assert (
        corrected(tiny_clip, "a angel", allowed=tiny_clip.text.words.encode("a angel")) == "a angel"
    )


@pytest.mark.parametrize("wording", ["sentence", "free"])
def test_only_prompts_that_read_are_corrected(emoji_clip, wording, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "pez_core.verify.with_right_articles", lambda ids, *_: seen.append(ids) or list(ids)
    )
    options = SearchOptions(prompt_len=3, effort="fast", swaps=1, wording=wording)
    invert(emoji_clip, emoji_clip.encode_texts(["an orange"]), options)
    assert bool(seen) == (wording == "sentence")
