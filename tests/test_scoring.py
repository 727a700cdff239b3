"""Scores, what words contribute and what can go, each against the plain way."""

from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES

from pez_core import ArgumentError, explain, prune, score
from pez_core.clip.images import load_image

PROMPT = "a blue fish in water with big eyes"
FISH = next(path for path in EXAMPLES if path.stem == "noto-fish")


def plain(clip, texts, images):
    return clip.encode_texts(texts) @ clip.encode_images([load_image(i) for i in images]).T


def test_every_prompt_with_every_image(emoji_clip, vit_clip):
    prompts = ["a cat", PROMPT]
    scores = score(emoji_clip, prompts, EXAMPLES[:3])
    torch.testing.assert_close(scores.similarity, plain(emoji_clip, prompts, EXAMPLES[:3]))
    assert scores.judge is None
    judged = score(emoji_clip, prompts, EXAMPLES[:3], judge=vit_clip)
    torch.testing.assert_close(judged.judge, plain(vit_clip, prompts, EXAMPLES[:3]))
    assert score(emoji_clip, "a cat", FISH).similarity.shape == (1, 1)


def test_a_prompt_longer_than_the_context_counts_as_a_whole(emoji_clip):
    head = "red car " * 37
    a, b = score(emoji_clip, [head, head + "blue fish in water " * 12], FISH).similarity
    assert b > a + 0.05


def test_contributions_are_what_is_lost_without_a_word(emoji_clip):
    found = explain(emoji_clip, PROMPT, FISH)
    words = PROMPT.split()
    assert [entry.word for entry in found] == words
    whole = plain(emoji_clip, [PROMPT], [FISH]).item()
    for k, entry in enumerate(found):
        without = " ".join(words[:k] + words[k + 1 :])
        expected = whole - plain(emoji_clip, [without], [FISH]).item()
        assert entry.contribution == pytest.approx(expected, abs=1e-5)


def test_targets_are_texts_and_images(emoji_clip):
    towards = ["a blue fish", Path(FISH)]
    found = explain(emoji_clip, PROMPT, towards)
    each = [explain(emoji_clip, PROMPT, target) for target in towards]
    for entry, a, b in zip(found, *each, strict=True):
        mean = (a.contribution + b.contribution) / 2
        assert entry.contribution == pytest.approx(mean, abs=1e-5)
    assert len(explain(emoji_clip, "fish", FISH)) == 1


def test_a_long_prompt_is_explained_word_by_word(emoji_clip):
    found = explain(emoji_clip, "red car " * 38 + "fish", FISH)
    assert len(found) == 77
    assert all(-1 < entry.contribution < 1 for entry in found)
    assert len(explain(emoji_clip, "語" * 90, FISH)) == 1


def test_words_that_do_not_pay_go(emoji_clip):
    before = plain(emoji_clip, [PROMPT + " parliament tax"], [FISH]).item()
    pruned = prune(emoji_clip, PROMPT + " parliament tax", FISH)
    assert pruned.similarity_before == pytest.approx(before, abs=1e-5)
    assert pruned.similarity >= pruned.similarity_before
    assert pruned.similarity == pytest.approx(
        plain(emoji_clip, [pruned.prompt], [FISH]).item(), abs=1e-5
    )
    kept = pruned.prompt.split()
    assert sorted(kept + pruned.dropped) == sorted((PROMPT + " parliament tax").split())
    # nothing more can go
    for k in range(len(kept)):
        less = " ".join(kept[:k] + kept[k + 1 :])
        assert len(kept) == 1 or plain(emoji_clip, [less], [FISH]).item() < before


def test_what_may_be_lost(emoji_clip):
    tight, loose = (prune(emoji_clip, PROMPT, FISH, max_loss) for max_loss in (0.0, 0.1))
    assert len(loose.prompt.split()) <= len(tight.prompt.split())
    assert loose.similarity >= loose.similarity_before - 0.1
    assert len(prune(emoji_clip, PROMPT, FISH, 5.0).prompt.split()) == 1


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda c: score(c, [], FISH), ValueError, "`prompts` is empty"),
        (lambda c: score(c, [""], FISH), ValueError, "`prompts` holds an empty text"),
        (lambda c: score(c, [3], FISH), TypeError, "`prompts` has to hold strings"),
        (lambda c: score(c, "a", []), ValueError, "`images` is empty"),
        (lambda c: explain(c, " ", FISH), ValueError, "`prompt` is empty"),
        (lambda c: explain(c, 3, FISH), TypeError, "`prompt` has to be a string"),
        (lambda c: explain(c, "a", []), ValueError, "`target` is empty"),
        (lambda c: explain(c, "a", Path("x.png")), ValueError, "`target`.*x.png.* does not exist"),
        (lambda c: prune(c, "a", FISH, -1), ValueError, "`max_loss`"),
    ],
)
def test_bad_arguments(emoji_clip, call, error, message):
    with pytest.raises(error, match=message):
        call(emoji_clip)


WEIGHTED = "a (blue fish:1.3) <lora:Detail (x):0.8> in [water:1.1] BREAK embedding:bad"
SPOKEN = "a blue fish in water"


def test_weights_and_tags_are_read_as_elsewhere(emoji_clip):
    image = EXAMPLES[0]
    a, b = (score(emoji_clip, text, image).similarity for text in (WEIGHTED, SPOKEN))
    assert torch.allclose(a, b, atol=1e-5)
    found = explain(emoji_clip, WEIGHTED, Path(image))
    words = ["a", "(blue fish:1.3)", "<lora:Detail (x):0.8>", "in", "[water:1.1]", "BREAK"]
    assert [one.word for one in found] == [*words, "embedding:bad"]
    values = {one.word: one.contribution for one in found}
    assert values["<lora:Detail (x):0.8>"] == values["BREAK"] == values["embedding:bad"] == 0
    without = score(emoji_clip, "a in water", image).similarity
    assert values["(blue fish:1.3)"] == pytest.approx((b - without).item(), abs=1e-5)


def test_pruning_keeps_tags_and_whole_weights(emoji_clip):
    result = prune(emoji_clip, WEIGHTED, Path(EXAMPLES[0]), max_loss=2)
    left = result.prompt.split()
    assert {"BREAK", "embedding:bad"} <= set(left) and "<lora:Detail (x):0.8>" in result.prompt
    assert len(result.dropped) == 3  # of four words one stays
    assert set(result.dropped) < {"a", "(blue fish:1.3)", "in", "[water:1.1]"}


@pytest.mark.parametrize("prompt", ["<lora:x:1>", "embedding:y BREAK"])
def test_a_prompt_of_tags_alone(emoji_clip, prompt):
    for call in (
        lambda: score(emoji_clip, prompt, EXAMPLES[0]),
        lambda: explain(emoji_clip, prompt, Path(EXAMPLES[0])),
    ):
        with pytest.raises(ArgumentError, match="holds only tags, no words"):
            call()
