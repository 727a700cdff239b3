"""One prompt for what several images share."""

import weakref
from importlib import import_module

import pytest
import torch
from conftest import EXAMPLES, paper

from pez_core import ArgumentError, StyleResult, Vocabulary, invert, style
from pez_core.clip.images import load_image
from pez_core.objectives import SampledSimilarity, Similarity
from pez_core.style_direction import perturb, style_direction
from pez_core.vocabulary import Blocklist

QUICK = paper(60, restarts=2)
ONE_STYLE = [path for path in EXAMPLES if path.stem.startswith("fxemoji")][:6]


@pytest.fixture(scope="module")
def pictures():
    return [load_image(path) for path in ONE_STYLE]


def test_a_style_for_subjects(emoji_clip, pictures):
    found = style(emoji_clip, pictures, QUICK)
    assert isinstance(found, StyleResult)
    assert len(found.token_ids) == 8 and len(found.candidates) == 2
    assert found.apply("a cat") == f"a cat, {found.prompt}"
    assert found.apply("{x}", "{style} of {subject}") == f"{found.prompt} of {{x}}"
    for template in ("{subject}", "{style}", ""):
        with pytest.raises(ArgumentError, match="`style_template`"):
            found.apply("a cat", template)
    image = emoji_clip.encode_images(pictures)
    text = emoji_clip.encode_texts([found.prompt])[0]
    assert found.similarities == pytest.approx((image @ text).tolist(), abs=1e-5)
    assert found.similarity == pytest.approx((image @ text).mean().item(), abs=1e-5)


@pytest.mark.slow
def test_a_style_with_its_content_is_one_prompt_for_all_images(emoji_clip, pictures):
    options = paper(60, prompt_len=8)
    joint = style(emoji_clip, pictures, options, keep_content=True)
    (shared,) = invert(emoji_clip, pictures, options, shared=True)
    assert joint.prompt == shared.prompt
    everything = style(emoji_clip, pictures, options, keep_content=True, images_per_step=6)
    assert everything.similarity == pytest.approx(joint.similarity, abs=0.05)


@pytest.mark.slow
def test_a_style_turns_away_from_contents(emoji_clip, pictures):
    """Its prompt has less of the differences between the images than with `keep_content`."""
    features = emoji_clip.encode_images(pictures)
    differences = features - features.mean(0)

    def content(found):
        return (emoji_clip.encode_texts([found.prompt]) @ differences.T).abs().mean().item()

    options = paper(100, restarts=4)
    joint = style(emoji_clip, pictures, options, keep_content=True)
    separate = style(emoji_clip, pictures, options)
    assert content(separate) < content(joint)


def test_the_direction_has_less_of_the_differences(emoji_clip, pictures):
    features = emoji_clip.encode_images(pictures)
    direction = style_direction(emoji_clip, pictures, features)
    mean = torch.nn.functional.normalize(features.mean(0), dim=0)
    differences = features - features.mean(0)
    assert direction.norm().item() == pytest.approx(1, abs=1e-5)
    assert (differences @ direction).norm() < 0.8 * (differences @ mean).norm()
    assert (features @ direction).min() > 0.1


def test_the_direction_has_less_of_what_survives_perturbation(emoji_clip, pictures, monkeypatch):
    features = emoji_clip.encode_images(pictures)
    perturbed = torch.cat([emoji_clip.encode_images(perturb(picture)) for picture in pictures])
    direction = style_direction(emoji_clip, pictures, features)

    def ahead(d):
        return ((features @ d).mean() - (perturbed @ d).mean()) / (features @ d).mean()

    monkeypatch.setattr("pez_core.style_direction.PERTURBED", 0.0)
    assert ahead(direction) > ahead(style_direction(emoji_clip, pictures, features)) + 0.01


@pytest.mark.slow
def test_many_images_leave_something(emoji_clip):
    many = [load_image(path) for path in EXAMPLES]
    features = emoji_clip.encode_images(many)
    assert style_direction(emoji_clip, many, features).isfinite().all()


def test_the_same_picture_twice(emoji_clip, pictures):
    assert style(emoji_clip, [pictures[0]] * 2, paper(20)).similarity > 0.2


def test_perturbation_changes_every_picture_and_keeps_its_size(pictures):
    variants = list(perturb(pictures[0]))
    assert all(v.size == pictures[0].size and v.mode == "RGB" for v in variants)
    assert len({v.tobytes() for v in [*variants, pictures[0]]}) == len(variants) + 1


def test_perturbed_images_do_not_fill_the_memory(tiny_clip, pictures, monkeypatch):
    made, most, prepare = [], [], tiny_clip._prepare

    def watched(image):
        for one in perturb(image):
            made.append(weakref.ref(one))
            yield one

    def count(image):
        most.append(sum(one() is not None for one in made))
        return prepare(image)

    monkeypatch.setattr("pez_core.style_direction.perturb", watched)
    monkeypatch.setattr(tiny_clip, "_prepare", count)
    features = tiny_clip.encode_images(pictures)
    style_direction(tiny_clip, pictures, features)
    assert len(made) == 12 * len(pictures) and max(most) <= 2


def test_a_minibatch_per_step_and_a_score_on_all():
    targets = torch.nn.functional.normalize(
        torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    embeddings = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))

    def encode(x):
        return x.mean(1)

    generator = torch.Generator().manual_seed(2)
    sampled = SampledSimilarity(encode, targets, None, 2, generator)
    loss_of_all, score = Similarity(encode, targets)(embeddings, 0)
    pairs = (torch.nn.functional.normalize(encode(embeddings), dim=-1) @ targets[0].T)[0]
    possible = {round(1 - (pairs[i] + pairs[j]).item() / 2, 4) for i in range(5) for j in range(i)}
    losses = []
    for step in range(40):
        loss, here = sampled(embeddings, step)
        torch.testing.assert_close(here, score)
        losses.append(loss.item())
    assert {round(loss, 4) for loss in losses} <= possible and len(set(losses)) > 5
    assert sum(losses) / 40 == pytest.approx(loss_of_all.item(), abs=0.1)


def test_minibatches_come_from_the_seed(emoji_clip, pictures):
    def find(**fields):
        options = paper(40, **fields)
        return style(emoji_clip, pictures, options, keep_content=True, images_per_step=2)

    first = find()
    assert find().prompt == first.prompt
    assert find(seed=5).prompt != first.prompt
    text = emoji_clip.encode_texts([first.prompt])[0]
    mean = (emoji_clip.encode_images(pictures) @ text).mean().item()
    assert first.similarity == pytest.approx(mean, abs=1e-5)


@pytest.mark.slow
def test_words_of_the_content_do_not_appear(emoji_clip, pictures):
    free = style(emoji_clip, pictures, QUICK)
    words = [word for word in free.prompt.split() if len(word) > 2]
    named = style(emoji_clip, pictures, QUICK, content=[" ".join(words[:4]), words[4]])
    assert Blocklist(words[:5]).find(named.prompt) is None
    options = paper(60, restarts=2, vocabulary=Vocabulary(ascii_only=True))
    both = style(emoji_clip, pictures, options, content=words[0])
    assert Blocklist(words[:1]).find(both.prompt) is None


def test_words_of_captions_are_told_apart(emoji_clip, pictures, monkeypatch):
    """Captions of boorus lack spaces behind commas, and others have weights."""
    seen = []

    def learned(clip, targets, options, *_):
        seen.append(options.allowed)
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("pez_core.tasks.style"), "learn", learned)
    content = "1girl,rain,hat a (cat:1.2) on-top dog/fish don't"
    for given in ((), content):
        with pytest.raises(KeyboardInterrupt):
            style(emoji_clip, pictures, QUICK, content=given)
    every, left = ({phrase for phrase in one.lexicon(emoji_clip).phrases} for one in seen)
    encode = emoji_clip.text.words.encode
    words = ["rain", "hat", "cat", "top", "dog", "fish"]
    assert all(tuple(encode(word)) in every for word in words)
    assert not any(tuple(encode(word)) in left for word in words)
    assert tuple(encode("on")) in left and len(left) > len(every) - 50


@pytest.mark.parametrize(
    "options, error, argument, message",
    [
        ({"images": [EXAMPLES[0]]}, ValueError, "images", "at least two images"),
        ({"images": EXAMPLES[0]}, ValueError, "images", "at least two images"),
        ({"images": []}, ValueError, "images", "is empty"),
        ({"keep_content": "no"}, TypeError, "keep_content", "True or False but is 'no'"),
        ({"images_per_step": 2}, ValueError, "images_per_step", "needs `keep_content`"),
        (
            {"images_per_step": 4, "keep_content": True},
            ValueError,
            "images_per_step",
            "has to be from 1 to 3 but is 4",
        ),
        ({"content": [3]}, TypeError, "content", "has to hold strings"),
        ({"content": 3}, TypeError, "content", "has to hold strings"),
    ],
)
def test_bad_arguments(emoji_clip, options, error, argument, message):
    with pytest.raises(error, match=message) as caught:
        style(emoji_clip, **({"images": EXAMPLES[:3]} | options))
    assert isinstance(caught.value, ArgumentError) and caught.value.argument == argument
