"""`distill` and `concatenate`: prompts in, shorter or joined prompts out."""

from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES

from pez_core import Vocabulary, concatenate, distill

LONG = (
    "a very happy dog with a big hat sitting in front of a green tree , bright sun , yellow "
    "flower , smile , blue sky with white cloud and a rainbow"
)
QUICK = dict(steps=60, restarts=1)


def count(clip, text):
    return len(clip.tokenizer.encode(text))


@pytest.mark.parametrize("ratio", [0.7, 0.5, 0.3, 0.1])
def test_ratios_of_the_paper(emoji_clip, ratio):
    result = distill(emoji_clip, LONG, ratio, **QUICK)
    before = count(emoji_clip, LONG)
    assert result.tokens_before == before
    assert result.tokens_after == len(result.token_ids) == round(ratio * before)
    assert result.tokens_saved == before - result.tokens_after
    assert emoji_clip.tokenizer.encode(result.prompt) == result.token_ids
    a, b = emoji_clip.encode_texts([LONG, result.prompt])
    assert result.similarity == pytest.approx((a @ b).item(), abs=1e-5)
    # it says more than as many of the prompt's own words do
    cut = emoji_clip.text.words.decode(emoji_clip.tokenizer.encode(LONG)[: result.tokens_after])
    assert result.similarity > (emoji_clip.encode_texts([cut])[0] @ a).item()
    assert result.note == "" and len(result.candidates) == 1


def test_a_number_of_tokens(emoji_clip):
    result = distill(emoji_clip, LONG, prompt_len=5, **QUICK)
    assert result.tokens_after == 5
    best = distill(emoji_clip, LONG, prompt_len=5, steps=60, restarts=3)
    assert len(best.candidates) == 3 and best.similarity >= result.similarity


def test_longer_than_the_context_is_never_cut(emoji_clip):
    """Two prompts that only differ behind the context are two different targets."""
    head = " , ".join(["red car"] * 25)
    ending = "blue fish in water " * 12
    assert count(emoji_clip, head) == 74
    first = distill(emoji_clip, head, prompt_len=6, **QUICK)
    second = distill(emoji_clip, f"{head} {ending}", prompt_len=6, **QUICK)
    assert second.tokens_before == 74 + 48
    fish = emoji_clip.encode_texts(["blue fish in water"])[0]
    close = [(emoji_clip.encode_texts([r.prompt])[0] @ fish).item() for r in (first, second)]
    assert close[1] > close[0] + 0.2
    # the target is the mean of both contexts by their tokens
    ids = emoji_clip.tokenizer.encode(f"{head} {ending}")
    parts = emoji_clip.encode_texts(
        [emoji_clip.text.words.decode(ids[:75]), emoji_clip.text.words.decode(ids[75:])]
    )
    target = torch.nn.functional.normalize(75 * parts[0] + 47 * parts[1], dim=0)
    expected = (emoji_clip.encode_texts([second.prompt])[0] @ target).item()
    assert second.similarity == pytest.approx(expected, abs=1e-5)


def test_what_does_not_fit_one_context_is_shortened_further_and_says_so(emoji_clip):
    result = distill(emoji_clip, LONG + " , " + LONG + " , " + LONG, 0.9, steps=3, restarts=1)
    assert result.tokens_after == 75 and "what one context holds: 75" in result.note
    whole = distill(emoji_clip, " , ".join([LONG] * 4), 1.0, steps=3, restarts=1)
    assert whole.tokens_after == 75 and "shortened further" in whole.note


def test_weights_and_tags_stay(emoji_clip):
    prompt = f"(red:1.3) cat, {LONG} <lora:foo:0.8>, embedding:bad-hands"
    result = distill(emoji_clip, prompt, 0.3, **QUICK)
    assert result.prompt == f"{result.learned} (red:1.3) <lora:foo:0.8> embedding:bad-hands"
    assert not set("()<>[]\\") & set(result.learned)
    # CLIP reads the weighted word and no tag
    assert emoji_clip.tokenizer.encode(f"{result.learned} red") == result.token_ids
    a, b = emoji_clip.encode_texts([f"red cat, {LONG}", f"{result.learned} red"])
    assert result.similarity == pytest.approx((a @ b).item(), abs=2e-2)
    assert result.tokens_before == count(emoji_clip, f"red cat, {LONG}")


def test_sections_are_shortened_each_for_itself(emoji_clip):
    reports = []
    result = distill(
        emoji_clip,
        f"{LONG} BREAK a cat BREAK {LONG} (big:1.2)",
        0.2,
        steps=20,
        restarts=1,
        callback=lambda report: reports.append(dict(report)),
    )
    first, second, third = result.prompt.split(" BREAK ")
    assert len(first.split()) < 12 and third.endswith("(big:1.2)")
    assert len(second.split()) == 1
    assert [r["step"] for r in reports] == list(range(1, 61))
    assert {r["steps"] for r in reports} == {60}
    short = distill(emoji_clip, f"{LONG} BREAK a cat", prompt_len=4, **QUICK)
    assert short.prompt.endswith(" BREAK a cat") and "Section 2 is short enough" in short.note


def test_a_stop_keeps_what_was_found(emoji_clip):
    result = distill(
        emoji_clip,
        f"{LONG} BREAK {LONG}",
        0.2,
        steps=50,
        restarts=1,
        callback=lambda report: report["step"] >= 10,
    )
    first, second = result.prompt.split(" BREAK ")
    assert len(first.split()) < 12 and second == LONG
    assert "Section 2 was not reached" in result.note


@pytest.mark.parametrize("options", [{"ratio": 1}, {"prompt_len": 60}])
def test_a_prompt_that_is_short_enough_comes_back(emoji_clip, options):
    result = distill(emoji_clip, "A Dog,  (red:1.2), <lora:x:1>", **options)
    assert result.prompt == "A Dog,  (red:1.2), <lora:x:1>"
    assert result.similarity == 1 and result.tokens_saved == 0
    assert "short enough" in result.note


@pytest.mark.parametrize("prompt", ["BREAK a dog", "<lora:x:1> BREAK a cat", "(a dog:1.2)"])
def test_sections_without_plain_words(emoji_clip, prompt):
    result = distill(emoji_clip, prompt)
    assert "unchanged" in result.note and result.tokens_after >= 1
    assert result.prompt.endswith(prompt.split()[-1])


def test_braces_in_a_tag_are_no_template(emoji_clip):
    result = distill(emoji_clip, LONG + " (a {} b:1.2)", prompt_len=3, **QUICK)
    assert result.prompt == f"{result.learned} (a {{}} b:1.2)"


def test_distilling_within_a_vocabulary(emoji_clip):
    words = Vocabulary(bank=["happy dog", "tree", "sun", "sky"])
    result = distill(emoji_clip, LONG, prompt_len=4, vocabulary=words, **QUICK)
    assert set(result.prompt.split()) <= {"happy", "dog", "tree", "sun", "sky"}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prompt": ""}, ValueError, "`prompt` holds no words"),
        ({"prompt": " , "}, ValueError, "`prompt` holds no words"),
        ({"prompt": "<lora:x:1>"}, ValueError, "`prompt` holds no words"),
        ({"prompt": 3}, TypeError, "`prompt`"),
        ({"ratio": 0}, ValueError, "`ratio` has to be above 0 and at most 1 but is 0"),
        ({"ratio": 1.5}, ValueError, "`ratio` has to be above 0 and at most 1"),
        ({"ratio": float("nan")}, ValueError, "`ratio`"),
        ({"ratio": "0.3"}, TypeError, "`ratio`"),
        ({"prompt_len": 0}, ValueError, "`prompt_len`"),
        ({"steps": 0}, ValueError, "`steps`"),
    ],
)
def test_bad_distilling(emoji_clip, options, error, message):
    with pytest.raises(error, match=message):
        distill(emoji_clip, **({"prompt": LONG} | options))


def test_a_join_that_fits_is_the_plain_join(emoji_clip):
    result = concatenate(emoji_clip, ["a red dog", " happy face "], weights=[3, 1])
    assert result.prompt == "a red dog happy face" and not result.fused
    assert result.tokens == count(emoji_clip, result.prompt) == 5
    a, b, c = emoji_clip.encode_texts(["a red dog", "happy face", result.prompt])
    assert result.similarities == pytest.approx([(a @ c).item(), (b @ c).item()], abs=1e-5)
    mean = 0.75 * (a @ c).item() + 0.25 * (b @ c).item()
    assert result.similarity == pytest.approx(mean, abs=1e-5)


def test_a_join_that_does_not_fit_is_learned(emoji_clip):
    result = concatenate(
        emoji_clip, [LONG, LONG, "a red fish"], max_tokens=12, prompt_len=10, **QUICK
    )
    assert result.fused and result.tokens == 10
    assert "more than max_tokens 12" in result.note
    assert len(result.similarities) == 3 and len(result.candidates) == 1


def test_prompts_and_images_fuse(emoji_clip):
    sources = ["a red dog", Path(EXAMPLES[3]), LONG + " , " + LONG + " , " + LONG]
    result = concatenate(emoji_clip, sources, steps=100, restarts=2)
    assert result.fused and result.tokens == 16 and result.note == ""
    tilted = concatenate(emoji_clip, sources, weights=[1, 20, 1], steps=100, restarts=2)
    assert tilted.similarities[1] > result.similarities[1]
    asked = concatenate(emoji_clip, ["a red dog", "blue fish"], fuse=True, prompt_len=3, **QUICK)
    assert asked.fused and asked.tokens == 3 and asked.note == ""


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": ["one"]}, "at least two sources but holds 1"),
        ({"prompts": "one"}, "at least two sources but holds 1"),
        ({"prompts": ["one", ""]}, "`prompts` holds an empty text"),
        ({"prompts": ["one", Path("missing.png")]}, "`prompts`: missing.png does not exist"),
        ({"max_tokens": 76}, "`max_tokens` has to be from 1 to 75"),
        ({"max_tokens": 3, "prompt_len": 16}, "`prompt_len` is 16, more than `max_tokens` 3"),
        ({"weights": [1]}, "`weights` has to hold 2 numbers"),
    ],
)
def test_bad_joins(emoji_clip, options, message):
    with pytest.raises(ValueError, match=message):
        concatenate(emoji_clip, **({"prompts": ["a dog", "a red cat"]} | options))


def test_tags_of_the_sources_stay_and_weights_are_read(emoji_clip):
    sources = ["a (red:1.3) dog <lora:x:1>", "a blue fish embedding:y"]
    joined = concatenate(emoji_clip, sources)
    assert joined.prompt == " ".join(sources) and joined.tokens == 6
    assert joined.similarities == concatenate(emoji_clip, ["a red dog", "a blue fish"]).similarities
    fused = concatenate(emoji_clip, sources, fuse=True, max_tokens=5, **QUICK)
    assert fused.prompt == f"{fused.learned} <lora:x:1> embedding:y" and fused.tokens == 5
    text = emoji_clip.encode_texts([fused.learned])[0]
    close = (emoji_clip.encode_texts(["a red dog", "a blue fish"]) @ text).tolist()
    assert fused.similarities == pytest.approx(close, abs=1e-5)
