"""One prompt for what several images share."""

import pytest
import torch
from conftest import EXAMPLES

from pez_core import Style, Vocabulary, extract_style, invert
from pez_core.clip.images import load_image
from pez_core.objectives import SampledSimilarity, Similarity
from pez_core.style import spoil, style_direction
from pez_core.vocabulary import Blocklist

QUICK = dict(steps=60, restarts=2)
ONE_STYLE = [path for path in EXAMPLES if path.stem.startswith("fxemoji")][:6]


@pytest.fixture(scope="module")
def pictures():
    return [load_image(path) for path in ONE_STYLE]


def test_a_style_for_subjects(emoji_clip, pictures):
    style = extract_style(emoji_clip, pictures, **QUICK)
    assert isinstance(style, Style) and len(style.token_ids) == 8 and len(style.candidates) == 2
    assert style.apply("a cat") == f"a cat, {style.prompt}"
    assert style.apply("{x}", "{style} of {subject}") == f"{style.prompt} of {{x}}"
    for template in ("{subject}", "{style}", ""):
        with pytest.raises(ValueError, match="`template`"):
            style.apply("a cat", template)
    image = emoji_clip.encode_images(pictures)
    text = emoji_clip.encode_texts([style.prompt])[0]
    assert style.similarities == pytest.approx((image @ text).tolist(), abs=1e-5)
    assert style.similarity == pytest.approx((image @ text).mean().item(), abs=1e-5)


def test_the_joint_mode_is_one_prompt_for_all_images(emoji_clip, pictures):
    joint = extract_style(emoji_clip, pictures, 8, 60, 1, mode="joint")
    shared = invert(emoji_clip, pictures, 8, 60, shared=True)
    assert joint.prompt == shared.prompt
    everything = extract_style(emoji_clip, pictures, 8, 60, 1, mode="joint", batch_size=6)
    assert everything.similarity == pytest.approx(joint.similarity, abs=0.05)


def test_the_separating_mode_turns_away_from_contents(emoji_clip, pictures):
    """What tells the images apart is less in its prompt than in that of the joint mode."""
    features = emoji_clip.encode_images(pictures)
    differences = features - features.mean(0)

    def content(style):
        return (emoji_clip.encode_texts([style.prompt]) @ differences.T).abs().mean().item()

    options = dict(steps=100, restarts=4)
    joint = extract_style(emoji_clip, pictures, mode="joint", **options)
    separate = extract_style(emoji_clip, pictures, **options)
    assert content(separate) < content(joint)


def test_the_direction_has_less_of_the_differences(emoji_clip, pictures):
    features = emoji_clip.encode_images(pictures)
    direction = style_direction(emoji_clip, pictures, features)
    mean = torch.nn.functional.normalize(features.mean(0), dim=0)
    differences = features - features.mean(0)
    assert direction.norm().item() == pytest.approx(1, abs=1e-5)
    assert (differences @ direction).norm() < 0.8 * (differences @ mean).norm()
    assert (features @ direction).min() > 0.1


def test_the_direction_has_less_of_what_survives_spoiling(emoji_clip, pictures, monkeypatch):
    features = emoji_clip.encode_images(pictures)
    spoilt = torch.cat([emoji_clip.encode_images(spoil(picture)) for picture in pictures])
    direction = style_direction(emoji_clip, pictures, features)

    def ahead(d):
        return ((features @ d).mean() - (spoilt @ d).mean()) / (features @ d).mean()

    monkeypatch.setattr("pez_core.style.SPOILT", 0.0)
    assert ahead(direction) > ahead(style_direction(emoji_clip, pictures, features)) + 0.01


def test_many_images_leave_something(emoji_clip):
    many = [load_image(path) for path in EXAMPLES]
    features = emoji_clip.encode_images(many)
    assert style_direction(emoji_clip, many, features).isfinite().all()


def test_the_same_picture_twice(emoji_clip, pictures):
    style = extract_style(emoji_clip, [pictures[0]] * 2, steps=20, restarts=1)
    assert style.similarity > 0.2


def test_spoiling_changes_every_picture_and_keeps_its_size(pictures):
    versions = spoil(pictures[0])
    assert all(v.size == pictures[0].size and v.mode == "RGB" for v in versions)
    assert len({v.tobytes() for v in [*versions, pictures[0]]}) == len(versions) + 1


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
    options = dict(steps=40, restarts=1, mode="joint", batch_size=2)
    first = extract_style(emoji_clip, pictures, **options)
    assert extract_style(emoji_clip, pictures, **options).prompt == first.prompt
    assert extract_style(emoji_clip, pictures, seed=5, **options).prompt != first.prompt
    text = emoji_clip.encode_texts([first.prompt])[0]
    mean = (emoji_clip.encode_images(pictures) @ text).mean().item()
    assert first.similarity == pytest.approx(mean, abs=1e-5)


def test_contents_that_are_named_are_not_said(emoji_clip, pictures):
    free = extract_style(emoji_clip, pictures, **QUICK)
    words = [word for word in free.prompt.split() if len(word) > 2]
    named = extract_style(emoji_clip, pictures, content=[" ".join(words[:4]), words[4]], **QUICK)
    assert Blocklist(words[:5]).find(named.prompt) is None
    both = extract_style(
        emoji_clip, pictures, content=words[0], vocabulary=Vocabulary(ascii_only=True), **QUICK
    )
    assert Blocklist(words[:1]).find(both.prompt) is None


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"images": [EXAMPLES[0]]}, ValueError, "at least two images"),
        ({"images": EXAMPLES[0]}, ValueError, "at least two images"),
        ({"images": []}, ValueError, "`images` is empty"),
        ({"mode": "other"}, ValueError, "`mode` has to be 'separate' or 'joint'"),
        ({"batch_size": 2}, ValueError, "`batch_size` belongs to mode='joint'"),
        ({"batch_size": 4, "mode": "joint"}, ValueError, "`batch_size` has to be from 1 to 3"),
        ({"content": [3]}, TypeError, "`content`"),
    ],
)
def test_bad_arguments(emoji_clip, options, error, message):
    with pytest.raises(error, match=message):
        extract_style(emoji_clip, **({"images": EXAMPLES[:3]} | options))
