"""A CLIP keeps the features of the last images."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from conftest import EXAMPLES, make_clip
from test_backends import DEVICE, Device, _Factories

from pez_core.clip import kept
from pez_core.clip.device import keep_image_tower_in_main_memory
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
        lambda clip: clip.model.to(torch.bfloat16),
        lambda clip: clip.cache.clear(),
    ],
    ids=["in place", "loaded", "precision", "precision of the module", "cleared"],
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


def test_features_that_are_kept_hold_no_graph(clip, pictures):
    clip.model.requires_grad_()
    clip.encode_images(pictures[:2])
    assert all(one.grad_fn is None for one in clip._kept_features.valid().values())


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


def test_weights_of_inference_mode_may_change_unseen(pictures):
    with torch.inference_mode():
        clip = make_clip()
        before = clip.encode_images(pictures[:1])
        clip.model.visual.conv1.weight.mul_(-1)
    assert not torch.equal(clip.encode_images(pictures[:1]), before)


def test_other_weights_at_the_same_address_are_other_weights(clip, encoded, pictures):
    layer = clip.model.visual.conv1
    size = layer.weight.shape
    layer.weight = torch.nn.Parameter(torch.ones(size))
    clip.encode_images(pictures[:1])
    before = id(layer.weight)
    for _ in range(100):  # Python soon uses the address again
        zeros, layer.weight = torch.zeros(size), None
        layer.weight = torch.nn.Parameter(zeros)
        if id(layer.weight) == before:
            break
    else:
        pytest.skip("no other tensor got this address")
    clip.encode_images(pictures[:1])
    assert encoded == [1, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda clip: pickle.loads(pickle.dumps(clip))])
def test_a_copy_of_a_clip_begins_without_features(clip, pictures, copied):
    before = clip.encode_images(pictures[:1])
    again = copied(clip)
    assert not again._kept_features.valid()
    assert torch.equal(again.encode_images(pictures[:1]), before)


def test_features_are_where_the_text_tower_was_moved(clip, pictures):
    here = clip.encode_images(pictures[:1])
    with _Factories(), Device():
        keep_image_tower_in_main_memory(clip, DEVICE)
        there = clip.encode_images(pictures[:1])
        assert there.device == DEVICE and torch.equal(there.cpu(), here)


def test_features_are_on_the_device_though_the_text_tower_was_not(pictures):
    """A memory manager may evict the text tower where it lends the image tower."""
    with _Factories(), Device():
        clip = make_clip().to(DEVICE)

        @contextmanager
        def lend():
            clip.model.to("cpu")
            yield
            clip.model.to(DEVICE)

        clip.image_tower = lend
        for _ in range(2):
            assert clip.encode_images(pictures[:1]).device == DEVICE
