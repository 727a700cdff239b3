"""A CLIP keeps the features of the last images."""

import pytest
import torch
from conftest import EXAMPLES, make_clip

from pez_core.clip import kept
from pez_core.clip.images import load_image


@pytest.fixture
def clip():
    return make_clip()


@pytest.fixture
def encoded(clip, monkeypatch):
    """How many images the tower was given in each call."""
    counts, encode = [], clip.model.encode_image

    def count(pixels):
        counts.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(clip.model, "encode_image", count)
    return counts


@pytest.fixture(scope="module")
def pictures():
    return [load_image(path) for path in EXAMPLES[:4]]


def test_an_image_is_encoded_once(clip, encoded, pictures):
    first = clip.encode_images(pictures[:2])
    again = clip.encode_images([pictures[1], pictures[2], pictures[1]])
    assert encoded == [2, 1]
    assert torch.equal(again[0], first[1]) and torch.equal(again[2], first[1])
    torch.testing.assert_close(again[1], make_clip().encode_images([pictures[2]])[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda clip: clip.model.visual.conv1.weight.add_(0.1),
        lambda clip: clip.model.load_state_dict(make_clip(seed=1).model.state_dict()),
        lambda clip: clip.to(dtype=torch.bfloat16),
        lambda clip: clip.cache.clear(),
    ],
    ids=["in place", "loaded", "precision", "cleared"],
)
def test_other_weights_have_other_features(clip, encoded, pictures, change):
    clip.encode_images(pictures[:1])
    with torch.no_grad():
        change(clip)
    clip.encode_images(pictures[:1])
    assert encoded == [1, 1]


def test_another_part_of_an_image_is_another_image(clip, encoded, pictures):
    wide = pictures[0].resize((96, 32))
    for fit in ("crop", "pad", "stretch", "crop"):
        clip.encode_images([wide], fit)
    assert encoded == [1, 1, 1]


def test_the_last_images_are_kept(clip, encoded, pictures, monkeypatch):
    monkeypatch.setattr(kept, "LAST", 2)
    clip.encode_images(pictures[:3])
    clip.encode_images(pictures[1:3])
    clip.encode_images(pictures[:1])
    assert encoded == [3, 1]


def test_features_that_are_nan_are_not_kept(clip, pictures, monkeypatch):
    encode, broken = clip.model.encode_image, [True]
    monkeypatch.setattr(
        clip.model, "encode_image", lambda x: encode(x) * (torch.nan if broken.pop() else 1)
    )
    assert clip.encode_images(pictures[:1]).isnan().all()
    broken.append(False)
    assert clip.encode_images(pictures[:1]).isfinite().all()


def test_features_of_inference_mode_serve_a_search(clip, pictures):
    with torch.inference_mode():
        clip.encode_images(pictures[:1])
    (feature,) = clip.encode_images(pictures[:1])
    query = torch.ones_like(feature, requires_grad=True)
    (query @ feature).backward()
    assert torch.equal(query.grad, feature)


def test_the_tower_is_lent_for_what_is_new(clip, pictures):
    lent = []

    class Lend:
        def __enter__(self):
            lent.append("begin")

        def __exit__(self, *_):
            lent.append("end")

    clip.image_tower = Lend
    clip.encode_images(pictures)
    clip.encode_images(pictures)
    assert lent == ["begin", "end"]
