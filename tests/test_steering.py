"""Templates, initial prompts, weights and what to stay away from."""

from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, make_clip

from pez_core import Vocabulary, invert
from pez_core.clip.images import load_image

STEPS = 60
FISH, PARROT = (p for p in EXAMPLES if p.stem in ("noto-fish", "noto-parrot"))


def similarity(clip, prompt, image):
    picture = clip.encode_images([load_image(image)])[0]
    return (clip.encode_texts([prompt])[0] @ picture).item()


@pytest.mark.parametrize(
    "template", ["a photo of {} on a beach", "{}, oil", "a fish in Water, {}", "(Big:1.2) {}"]
)
def test_a_template_stays_and_is_scored(emoji_clip, template):
    result = invert(emoji_clip, FISH, 4, STEPS, restarts=2, template=template)
    assert result.prompt == template.replace("{}", result.learned)
    assert len(emoji_clip.tokenizer.encode(result.learned)) == 4
    assert emoji_clip.tokenizer.encode(result.prompt) == result.token_ids
    assert result.similarity == pytest.approx(similarity(emoji_clip, result.prompt, FISH), abs=1e-5)
    assert result.history[-1][1] == pytest.approx(result.similarity, abs=1e-5)


def test_learned_tokens_add_what_a_caption_missed(emoji_clip):
    caption = "a blue fish"
    result = invert(emoji_clip, FISH, 4, STEPS, template=caption + " {}")
    assert result.prompt.startswith(caption)
    assert result.similarity > similarity(emoji_clip, caption, FISH) + 0.05


def test_the_words_around_change_what_is_learned(emoji_clip):
    plain = invert(emoji_clip, FISH, 4, STEPS)
    inside = invert(emoji_clip, FISH, 4, STEPS, template="a drawing of a fish {} at night")
    assert plain.learned != inside.learned
    assert inside.similarity > similarity(
        emoji_clip, f"a drawing of a fish {plain.learned} at night", FISH
    )


@pytest.mark.parametrize(
    "template, message",
    [
        ("no place", "has to hold {} once"),
        ("{} and {}", "has to hold {} once"),
        ("pre{}", "put a space on both sides"),
        ("a " * 72 + "{}", "beside the template's 72 tokens there is room for 3"),
        ("a " * 90 + "{}", "beside the template's 90 tokens there is room for 0"),
    ],
)
def test_bad_templates(emoji_clip, template, message):
    with pytest.raises(ValueError, match=message):
        invert(emoji_clip, FISH, 4, 3, template=template)


def test_an_initial_prompt_is_where_the_search_begins(emoji_clip):
    initial = "red fish with big white eyes in blue water"
    ids = emoji_clip.tokenizer.encode(initial)
    result = invert(emoji_clip, FISH, len(ids), 1, initial=initial)
    assert result.prompt == initial
    filled = invert(emoji_clip, FISH, len(ids) + 3, 1, initial=initial)
    assert filled.token_ids[: len(ids)] == ids and len(filled.token_ids) == len(ids) + 3
    longer = invert(emoji_clip, FISH, len(ids), STEPS, initial=initial, restarts=3)
    assert longer.similarity > result.similarity
    others = invert(emoji_clip, FISH, len(ids), 1, initial=initial, restarts=3)
    assert len({candidate.prompt for candidate in others.candidates}) == 3


def test_an_initial_prompt_outside_the_vocabulary_moves_into_it(emoji_clip):
    words = Vocabulary(bank=["cat", "dog", "tree"])
    result = invert(emoji_clip, FISH, 3, 1, initial="lion wolf forest", vocabulary=words)
    assert set(result.prompt.split()) <= {"cat", "dog", "tree"}


def test_bad_initial_prompts(emoji_clip):
    with pytest.raises(ValueError, match="`initial` has 5 tokens, more than `prompt_len` 3"):
        invert(emoji_clip, FISH, 3, 1, initial="a b c d e")
    with pytest.raises(TypeError, match="`initial`"):
        invert(emoji_clip, FISH, 3, 1, initial=["a"])
    rules = Vocabulary(whole_words=False, blocked=["hot dog"])
    words = Vocabulary(bank=["hot", "dog"]) & rules
    with pytest.raises(ValueError, match="`initial` begins with a blocked word"):
        invert(emoji_clip, FISH, 2, 1, initial="hot dog", vocabulary=words)


def test_what_is_to_be_avoided_costs(emoji_clip):
    options = dict(prompt_len=8, steps=STEPS)
    free = invert(emoji_clip, FISH, **options)
    for avoid in ("a fish", Path(PARROT), load_image(PARROT)):
        kept_off = invert(emoji_clip, FISH, negative=avoid, negative_weights=1.0, **options)
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


def test_negative_weights_are_for_all_together_or_for_each(emoji_clip):
    options = dict(prompt_len=4, steps=20, negative=["a fish", PARROT])
    one = invert(emoji_clip, FISH, negative_weights=0.6, **options)
    each = invert(emoji_clip, FISH, negative_weights=[0.3, 0.3], **options)
    assert one.prompt == each.prompt and one.avoided == each.avoided
    none = invert(emoji_clip, FISH, negative_weights=0.0, **options)
    assert none.prompt == invert(emoji_clip, FISH, 4, 20).prompt


def test_a_negative_prompt(emoji_clip):
    options = dict(prompt_len=8, steps=STEPS, learn_negative=True)
    far = invert(emoji_clip, FISH, **options)
    assert far.similarity < -0.3 and far.similarities == []
    assert far.avoided == [pytest.approx(far.similarity)]
    unwanted = invert(emoji_clip, FISH, negative=Path(PARROT), **options)
    assert unwanted.similarity == pytest.approx(
        similarity(emoji_clip, unwanted.prompt, PARROT), abs=1e-5
    )
    assert unwanted.similarity > unwanted.avoided[0] + 0.3


def test_weights_of_shared_images(emoji_clip):
    options = dict(prompt_len=8, steps=STEPS, shared=True)
    even = invert(emoji_clip, [FISH, PARROT], **options)
    fish = invert(emoji_clip, [FISH, PARROT], weights=[9, 1], **options)
    parrot = invert(emoji_clip, [FISH, PARROT], weights=[1, 9], **options)
    assert fish.similarities[0] > even.similarities[0] > parrot.similarities[0]
    assert fish.similarities[1] < even.similarities[1] < parrot.similarities[1]
    assert fish.similarity == pytest.approx(0.9 * fish.similarities[0] + 0.1 * fish.similarities[1])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"weights": [1]}, ValueError, "`weights` .* add shared=True"),
        ({"weights": [1, 2], "shared": True}, ValueError, "`weights` has to hold 1 numbers"),
        ({"weights": [0], "shared": True}, ValueError, "`weights` has to be finite and above 0"),
        ({"weights": ["a"], "shared": True}, TypeError, "`weights` has to hold numbers"),
        ({"negative": "x", "negative_weights": -1}, ValueError, "`negative_weights`"),
        ({"negative": "x", "negative_weights": [1, 2]}, ValueError, "has to hold 1 numbers"),
        (
            {"negative": "x", "negative_weights": 0, "learn_negative": True},
            ValueError,
            "`negative_weights` is 0",
        ),
        ({"negative": ""}, ValueError, "`negative` holds an empty text"),
        ({"negative": Path("missing.png")}, ValueError, "`negative`: missing.png does not exist"),
        ({"negative": [3]}, TypeError, "`negative` has to hold"),
        ({"vocabulary": "a.txt"}, TypeError, "`vocabulary` has to be a Vocabulary"),
        ({"template": 3}, TypeError, "`template`"),
    ],
)
def test_bad_steering(emoji_clip, options, error, message):
    with pytest.raises(error, match=message):
        invert(emoji_clip, FISH, 3, 1, **options)


def test_a_phrase_bank_with_a_template_and_something_to_avoid(emoji_clip):
    bank = Vocabulary(bank=["blue fish", "red car", "a happy old cat", "big"], blocked=["red car"])
    result = invert(
        emoji_clip,
        FISH,
        5,
        STEPS,
        restarts=2,
        vocabulary=bank,
        template="painting of {}",
        negative="a red car",
    )
    rest = result.learned
    for phrase in ("blue fish", "a happy old cat", "big"):
        rest = rest.replace(phrase, "")
    assert not rest.strip() and "blue fish" in result.learned


def test_without_a_causal_mask_a_template_works_too():
    from conftest import CustomTextCLIP

    clip = make_clip(CustomTextCLIP, text={"no_causal_mask": True})
    image = torch.rand(9, 9, 3, generator=torch.Generator().manual_seed(0))
    result = invert(clip, image, 3, 5, template="a photo {} of it")
    assert clip.tokenizer.encode(result.prompt) == result.token_ids
    assert result.history[-1][1] == pytest.approx(result.similarity, abs=1e-5)
