"""Captions, text to start from, weights and targets to avoid."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, make_clip, paper

from pez_core import ArgumentError, Avoid, SearchOptions, Vocabulary, invert
from pez_core.clip.images import load_image
from pez_core.prompt_text import read

STEPS = 60
FISH, PARROT = (p for p in EXAMPLES if p.stem in ("noto-fish", "noto-parrot"))
SHORT = paper(STEPS, prompt_len=4)


def similarity(clip, prompt, image):
    picture = clip.encode_images([load_image(image)])[0]
    return (clip.encode_texts([prompt])[0] @ picture).item()


@pytest.mark.parametrize(
    "caption", ["a photo of {} on a beach", "{}, oil", "a fish in Water, {}", "(Big:1.2) {}"]
)
def test_a_caption_stays_and_is_scored(emoji_clip, caption):
    (result,) = invert(emoji_clip, FISH, replace(SHORT, restarts=2), caption=caption)
    assert result.prompt == caption.replace("{}", result.learned)
    assert len(emoji_clip.tokenizer.encode(result.learned)) == 4
    spoken = read(result.prompt)
    assert emoji_clip.tokenizer.encode(spoken) == result.token_ids
    assert result.similarity == pytest.approx(similarity(emoji_clip, spoken, FISH), abs=1e-5)
    assert result.history[-1][1] == pytest.approx(result.similarity, abs=1e-5)


def test_learned_tokens_add_to_a_caption(emoji_clip):
    caption = "a blue fish"
    (result,) = invert(emoji_clip, FISH, SHORT, caption=caption)
    assert result.prompt == f"{caption} {result.learned}"  # behind it, where it has no {}
    assert result.similarity > similarity(emoji_clip, caption, FISH) + 0.05
    (same,) = invert(emoji_clip, FISH, SHORT, caption=caption + " {}")
    assert same.prompt == result.prompt


@pytest.mark.slow
def test_the_words_around_change_the_learned_words(emoji_clip):
    options = SearchOptions(prompt_len=4, effort="fast")
    (plain,) = invert(emoji_clip, FISH, options)
    (inside,) = invert(emoji_clip, FISH, options, caption="a drawing of a fish {} at night")
    assert plain.learned != inside.learned
    assert inside.similarity > similarity(
        emoji_clip, f"a drawing of a fish {plain.learned} at night", FISH
    )


@pytest.mark.parametrize(
    "caption, argument, message",
    [
        ("{} and {}", "caption", "has to hold {} once"),
        ("pre{}", "caption", "put a space on both sides"),
    ],
)
def test_bad_captions(emoji_clip, caption, argument, message):
    with pytest.raises(ArgumentError, match=message) as error:
        invert(emoji_clip, FISH, SHORT, caption=caption)
    assert error.value.argument == argument


def test_a_search_begins_at_the_text_to_start_from(emoji_clip):
    text = "red fish with big white eyes in blue water"
    ids = emoji_clip.tokenizer.encode(text)
    first = paper(1, prompt_len=len(ids), start_from=text)
    (result,) = invert(emoji_clip, FISH, first)
    assert result.prompt == text
    (filled,) = invert(emoji_clip, FISH, replace(first, prompt_len=len(ids) + 3))
    assert filled.token_ids[: len(ids)] == ids and len(filled.token_ids) == len(ids) + 3
    (longer,) = invert(emoji_clip, FISH, replace(first, steps=STEPS, restarts=3))
    assert longer.similarity > result.similarity
    (others,) = invert(emoji_clip, FISH, replace(first, restarts=3))
    assert len({candidate.prompt for candidate in others.candidates}) == 3


def test_text_to_start_from_moves_into_the_vocabulary(emoji_clip):
    words = Vocabulary(only=["cat", "dog", "tree"])
    options = paper(1, prompt_len=3, start_from="lion wolf forest", vocabulary=words)
    (result,) = invert(emoji_clip, FISH, options)
    assert set(result.prompt.split()) <= {"cat", "dog", "tree"}


def test_bad_text_to_start_from(emoji_clip):
    options = paper(1, prompt_len=3)
    with pytest.raises(ArgumentError, match="`start_from` has 5 tokens, more than `prompt_len` 3"):
        invert(emoji_clip, FISH, replace(options, start_from="a b c d e"))
    with pytest.raises(TypeError, match="`start_from`"):
        replace(options, start_from=["a"])
    rules = Vocabulary(whole_words=False, block=["hot dog"])
    words = Vocabulary(only=["hot", "dog"]) & rules
    options = paper(1, prompt_len=2, start_from="hot dog", vocabulary=words)
    with pytest.raises(ArgumentError, match="`start_from` begins with a blocked word"):
        invert(emoji_clip, FISH, options)


@pytest.mark.slow
def test_targets_to_avoid_cost(emoji_clip):
    options = paper(STEPS, prompt_len=8)
    (free,) = invert(emoji_clip, FISH, options)
    for avoid in ("a fish", Path(PARROT), load_image(PARROT)):
        (kept_off,) = invert(emoji_clip, FISH, options, avoid=Avoid(avoid, 1.0))
        if isinstance(avoid, str):
            other = emoji_clip.encode_texts([avoid])[0]
        else:
            other = emoji_clip.encode_images([load_image(PARROT)])[0]
        before = (emoji_clip.encode_texts([free.prompt])[0] @ other).item()
        after = (emoji_clip.encode_texts([kept_off.prompt])[0] @ other).item()
        assert kept_off.avoided == [pytest.approx(after, abs=1e-5)]
        assert after < before - 0.2
        # the similarity is still that with the image alone; the score pays for both
        assert kept_off.similarity == pytest.approx(
            similarity(emoji_clip, kept_off.prompt, FISH), abs=1e-5
        )
        assert kept_off.history[-1][1] == pytest.approx(kept_off.similarity - after, abs=1e-4)
    assert free.avoided == []


def test_a_weight_is_for_all_targets_to_avoid_together_or_for_each(emoji_clip):
    options, away = paper(20, prompt_len=4), ["a fish", PARROT]

    def find(avoid):
        return invert(emoji_clip, FISH, options, avoid=avoid)[0]

    one, each = find(Avoid(away, 0.6)), find(Avoid(away, [0.3, 0.3]))
    assert one.prompt == each.prompt and one.avoided == each.avoided
    none = find(Avoid(away, 0.0))
    assert none.prompt == find(()).prompt and len(none.avoided) == 2
    # targets without `Avoid` have the weight 0.5
    half = find(Avoid(away, 0.5))
    assert find(away).history == half.history != one.history


def test_a_negative_prompt(emoji_clip):
    options = paper(STEPS, prompt_len=8)
    (far,) = invert(emoji_clip, FISH, options, negative_prompt=True)
    assert far.similarity < -0.3 and far.similarities == []
    assert far.avoided == [pytest.approx(far.similarity)]
    (unwanted,) = invert(emoji_clip, FISH, options, avoid=Path(PARROT), negative_prompt=True)
    assert unwanted.similarity == pytest.approx(
        similarity(emoji_clip, unwanted.prompt, PARROT), abs=1e-5
    )
    assert unwanted.similarity > unwanted.avoided[0] + 0.3


@pytest.mark.slow
def test_weights_of_shared_images(emoji_clip):
    options = paper(STEPS, prompt_len=8)
    even, fish, parrot = (
        invert(emoji_clip, [FISH, PARROT], options, shared=shared)[0]
        for shared in (True, [9, 1], [1, 9])
    )
    assert fish.similarities[0] > even.similarities[0] > parrot.similarities[0]
    assert fish.similarities[1] < even.similarities[1] < parrot.similarities[1]
    assert fish.similarity == pytest.approx(0.9 * fish.similarities[0] + 0.1 * fish.similarities[1])


@pytest.mark.parametrize(
    "options, error, argument, message",
    [
        ({"shared": [1, 2]}, ValueError, "shared", "has to hold 1 numbers but holds 2"),
        ({"shared": [0]}, ValueError, "shared", "has to be finite and above 0"),
        ({"shared": ["a"]}, TypeError, "shared", "has to be a number"),
        ({"shared": "yes"}, TypeError, "shared", "has to be a list of numbers"),
        ({"shared": 1}, TypeError, "shared", "has to be a list of numbers"),
        ({"avoid": Avoid("x", -1)}, ValueError, "avoid_weight", "finite and 0 or more"),
        ({"avoid": Avoid("x", [1, 2])}, ValueError, "avoid_weight", "has to hold 1 numbers"),
        ({"avoid": Avoid("x", "a")}, TypeError, "avoid_weight", "has to be a number"),
        ({"avoid": Avoid("x", 0), "negative_prompt": True}, ValueError, "avoid_weight", "is 0"),
        ({"avoid": ""}, ValueError, "avoid", "holds an empty text"),
        ({"avoid": Path("missing.png")}, ValueError, "avoid", "missing.png.* does not exist"),
        ({"avoid": [3]}, TypeError, "avoid", "has to hold"),
        ({"negative_prompt": 1}, TypeError, "negative_prompt", "has to be True or False"),
        ({"caption": 3}, TypeError, "caption", "has to be a string"),
    ],
)
def test_bad_steering(emoji_clip, options, error, argument, message):
    with pytest.raises(error, match=message) as caught:
        invert(emoji_clip, FISH, paper(1, prompt_len=3), **options)
    assert isinstance(caught.value, ArgumentError) and caught.value.argument == argument


def test_phrases_with_a_caption_and_something_to_avoid(emoji_clip):
    words = Vocabulary(only=["blue fish", "red car", "a happy old cat", "big"], block=["red car"])
    options = paper(STEPS, prompt_len=5, restarts=2, vocabulary=words)
    (result,) = invert(emoji_clip, FISH, options, caption="painting of {}", avoid="a red car")
    rest = result.learned
    for phrase in ("blue fish", "a happy old cat", "big"):
        rest = rest.replace(phrase, "")
    assert not rest.strip() and "blue fish" in result.learned


def test_without_a_causal_mask_a_caption_works_too():
    from conftest import CustomTextCLIP

    clip = make_clip(CustomTextCLIP, text={"no_causal_mask": True})
    image = torch.rand(9, 9, 3, generator=torch.Generator().manual_seed(0))
    (result,) = invert(clip, image, paper(5, prompt_len=3), caption="a photo {} of it")
    assert clip.tokenizer.encode(result.prompt) == result.token_ids
    assert result.history[-1][1] == pytest.approx(result.similarity, abs=1e-5)
