"""Every kind of picture that people have either works as they expect or says what is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from pez_core.clip.images import load_image, load_images, trim_to_centre

RED = (200, 30, 40)


def colour(image, x=0.5, y=0.5):
    return image.getpixel((int(x * (image.width - 1)), int(y * (image.height - 1))))


@pytest.fixture
def save(tmp_path):
    def save(image, name, **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif"])
def test_formats(save, name):
    image = load_image(save(Image.new("RGB", (30, 20), RED), name))
    assert image.mode == "RGB" and image.size == (30, 20)
    assert np.allclose(colour(image), RED, atol=6)


def test_a_path_may_be_a_string(save):
    assert load_image(str(save(Image.new("RGB", (3, 2), RED), "a.png"))).size == (3, 2)


def test_transparency_lies_on_white(save):
    half = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    half.paste((*RED, 255), (0, 0, 5, 10))
    for image in (half, half.convert("LA"), half.quantize(8)):
        result = load_image(image)
        assert colour(result, x=1) == (255, 255, 255)
        assert max(colour(result, x=0)) < 230
    assert colour(load_image(save(half, "a.webp", lossless=True)), x=1) == (255, 255, 255)


def test_palette_with_a_transparent_index(save):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    result = load_image(save(image, "a.png", transparency=0))
    assert colour(result, 0, 0) == (255, 255, 255) and colour(result, 1, 1) == RED


def test_cmyk(save):
    image = load_image(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg"))
    red, green, blue = colour(image)
    assert red > 180 and green < 80 and blue < 80


@pytest.mark.parametrize("value, expected", [(0, 0), (32768, 128), (65535, 255), (257, 1)])
def test_16_bit_grey_keeps_its_brightness(save, value, expected):
    path = save(Image.fromarray(np.full((6, 6), value, np.uint16)), "a.png")
    assert colour(load_image(path)) == (expected,) * 3


def test_float_grey():
    assert colour(load_image(Image.fromarray(np.full((6, 6), 0.5, np.float32)))) == (128,) * 3
    with pytest.raises(ValueError, match="NaN"):
        load_image(Image.fromarray(np.full((6, 6), np.nan, np.float32)))


def test_animation_gives_its_first_frame(save):
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, (0, 0, 255))]
    path = save(frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert np.allclose(colour(load_image(path)), RED, atol=6)


def test_an_animation_of_the_caller_stays_where_it_was(save):
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, (0, 0, 255))]
    path = save(frames[0], "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        image.seek(1)
        assert np.allclose(colour(load_image(image)), RED, atol=6)
        assert image.tell() == 1


def test_arrays_with_negative_strides():
    array = np.zeros((4, 4, 3), np.float32)
    array[..., 0] = 1
    assert colour(load_image(array[..., ::-1])) == (0, 0, 255)


def test_an_error_says_which_image():
    with pytest.raises(ValueError, match=r"image 2 of 3"):
        load_images([torch.rand(8, 6, 3), torch.zeros(8, 6), torch.rand(8, 6, 3)])


def test_exif_rotation(save):
    image = Image.new("RGB", (40, 20), RED)
    image.paste((0, 0, 255), (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    result = load_image(save(image, "a.jpg", exif=exif, quality=95))
    assert result.size == (20, 40)
    assert colour(result, y=0.1)[2] > 200 and colour(result, y=0.9)[0] > 150


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30), (1, 20_000), (20_000, 1)])
def test_extreme_sizes_are_encoded(tiny_clip, size):
    features = tiny_clip.encode_images([load_image(Image.new("RGB", size, RED))])
    reference = tiny_clip.encode_images([Image.new("RGB", (16, 16), RED)])
    torch.testing.assert_close(features, reference, atol=1e-4, rtol=1e-4)


def test_trimming_does_not_change_what_is_seen(tiny_clip):
    ramp = np.tile(np.linspace(0, 255, 1000).astype(np.uint8)[None, :, None], (20, 1, 3))
    image = Image.fromarray(ramp)
    assert trim_to_centre(image).size == (160, 20)
    trimmed = tiny_clip._prepare(trim_to_centre(image))
    torch.testing.assert_close(trimmed, tiny_clip._prepare(image), atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(8, 6, 3), (3, 8, 6), (8, 6, 4), (1, 8, 6), (8, 6, 1)])
def test_tensors(shape):
    for array in (torch.full(shape, 0.2), torch.full(shape, 0.2, dtype=torch.float16).numpy()):
        image = load_image(array)
        assert image.size == (6, 8) and image.mode == "RGB"
        assert colour(image)[0] == (214 if 4 in shape else 51)  # alpha 0.2 on white


def test_batches_and_lists():
    for shape in ((5, 8, 6, 3), (5, 3, 8, 6)):
        images, single = load_images(torch.rand(shape))
        assert len(images) == 5 and not single and images[0].size == (6, 8)
    images, single = load_images([Image.new("RGB", (2, 3)), torch.rand(8, 6, 3)])
    assert [i.size for i in images] == [(2, 3), (6, 8)] and not single
    assert load_images(Image.new("RGB", (2, 3)))[1]


def test_inference_tensors_work():
    with torch.inference_mode():
        tensor = torch.rand(8, 6, 3)
    assert load_image(tensor).size == (6, 8)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.full((8, 6, 3), float("nan")), "NaN"),
        (torch.full((8, 6, 3), float("inf")), "infinite"),
        (torch.full((8, 6, 3), 128.0), r"values in \[0, 1\] but spans 128"),
        (torch.full((8, 6, 3), -1.0), r"\[0, 1\]"),
        (torch.zeros(8, 6, 3, dtype=torch.uint8), "divide it by 255"),
        (torch.zeros(8, 6), r"shape \(8, 6\)"),
        (torch.zeros(8, 6, 7), r"shape \(8, 6, 7\)"),
        (torch.zeros(0, 6, 3), "empty"),
    ],
)
def test_bad_tensors(tensor, message):
    with pytest.raises(ValueError, match=f"`images`.*{message}"):
        load_image(tensor)


def test_bad_files(tmp_path, save):
    whole = save(Image.new("RGB", (300, 300), RED), "whole.png").read_bytes()
    cases = {
        "missing.png": (None, "does not exist"),
        "empty.png": (b"", "empty file"),
        "text.png": (b"not a picture at all", "not an image"),
        "cut.png": (whole[: len(whole) // 2], "damaged"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value) and "`images`" in str(caught.value)
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)


def test_a_decompression_bomb_is_refused(save, monkeypatch):
    path = save(Image.new("L", (3000, 3000)), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(ValueError, match="too large"):
        load_image(path)


def test_wrong_types_and_nothing():
    with pytest.raises(TypeError, match=r"`images`.*int"):
        load_image(3)
    with pytest.raises(TypeError, match="`images`"):
        load_images(3)
    with pytest.raises(ValueError, match="at least one image"):
        load_images([])
    with pytest.raises(ValueError, match="0x5"):
        load_image(Image.new("RGB", (0, 5)))
