"""Every kind of picture that people have either works as they expect or says what is wrong."""

import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from pez_core import SearchOptions, invert
from pez_core.clip.images import load_image, load_images, trim_to_centre
from pez_core.errors import ArgumentError

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


def test_the_array_of_a_pil_image_is_read_without_a_warning():
    array = np.asarray(Image.new("RGB", (4, 4), RED))
    assert not array.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colour(load_image(array)) == RED


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


@pytest.mark.parametrize("damage", [b"\xff", b"\x00"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_damaged_orientation_is_ignored(save, name, damage):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.new("RGB", (40, 20), RED), name, exif=exif)
    content = path.read_bytes()
    start = content.index(b"MM\x00*") if b"MM\x00*" in content else content.index(b"II*\x00")
    size = len(exif.tobytes()) - (6 if name == "a.jpg" else 0) - 6
    damaged = content[:start] + damage * size + content[start + size :]
    if name == "a.png":  # whose chunks have checksums
        (length,) = struct.unpack(">I", content[start - 8 : start - 4])
        chunk = damaged[start - 4 : start + length]
        damaged = damaged[: start + length] + struct.pack(">I", zlib.crc32(chunk))
        damaged += content[start + length + 4 :]
    path.write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path).size == (40, 20)


@pytest.mark.parametrize("error", [SyntaxError, RuntimeError, KeyError, ZeroDivisionError])
def test_whatever_an_image_raises_names_the_image(save, monkeypatch, error):
    path = save(Image.new("RGB", (40, 20), RED), "a.png")

    def fail(*_, **__):
        raise error("x")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ArgumentError, match=r"a.png', which is damaged \('?x'?\)"):
        load_image(path)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ArgumentError, match=r"a.png', which cannot be read \('?x'?\)"):
        load_image(path)


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    """Pillow hands it to Ghostscript, whatever the name of the file is."""
    fake = tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-here\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    with pytest.raises(ArgumentError, match=r"a.png', which is not an image that can be read"):
        load_image(tmp_path / "a.png")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("size", [(2048, 1500), (1500, 2600), (40, 20)])
def test_an_image_of_usual_size_keeps_all_its_pixels(mode, size):
    """Against the conversion of the whole image at once."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[..., :2].copy().view(np.uint16)[..., 0])
        grey = (np.asarray(image, np.float64) / 65535 * 255).round().astype(np.uint8)
        expected = Image.fromarray(grey).convert("RGB")
    elif mode == "F":
        image = Image.fromarray(noise[..., 0].astype(np.float32) / 3)
        grey = (np.asarray(image, np.float64) / 255 * 255).round().astype(np.uint8)
        expected = Image.fromarray(grey).convert("RGB")
    elif mode == "RGBA":
        expected = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    else:
        image = image.convert("RGB").convert(mode)
        expected = image.convert("RGB")
    assert load_image(image).tobytes() == expected.tobytes()


def _ramp(width, height):
    x = np.linspace(0, 255, width)[None].repeat(height, 0)
    y = np.linspace(255, 0, height)[:, None].repeat(width, 1)
    return np.stack([x, y, x], -1).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp"])
@pytest.mark.parametrize("size", [(4500, 4200), (3000, 5000), (8300, 2100)])
def test_a_large_image_is_scaled_down(save, name, size):
    small = load_image(save(Image.fromarray(_ramp(*size)), name))
    assert min(small.size) == 2048
    assert small.width / small.height == pytest.approx(size[0] / size[1], rel=1e-3)
    difference = np.asarray(small, float) - _ramp(*small.size)
    assert abs(difference).max() < 6 and abs(difference).mean() < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "I;16B"])
def test_a_large_image_needs_little_memory_beside_itself(mode):
    """The peak of the process, as bytes per pixel."""
    script = f"""
import resource
from PIL import Image
from pez_core.clip.images import load_image
load_image(Image.new("RGB", (4200, 4200)))
image = Image.new({mode!r}, (9000, 9000))
image.load()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert min(load_image(image).size) == 2048
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / image.width / image.height)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert not run.returncode, run.stderr
    assert float(run.stdout) < 1.5


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


@pytest.mark.parametrize("shape", [(8, 6, 3), (3, 8, 6), (8, 6, 1), (8, 6, 4)])
def test_arrays_of_8_bit_integers_are_pixels(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for given in (array, torch.from_numpy(array)):
        same = load_image(torch.from_numpy(array).double() / 255)
        assert load_image(given).tobytes() == same.tobytes()


def test_values_beyond_the_range_by_bicubic_upscaling_are_clamped():
    hard = (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    large = torch.nn.functional.interpolate(hard, scale_factor=7, mode="bicubic")[0]
    assert large.min() < -0.1 and large.max() > 1.1
    expected = load_image(large.clamp(0, 1))
    assert load_image(large).tobytes() == expected.tobytes()
    for value in (-0.5, 1.5):
        with pytest.raises(ValueError, match=r"values in \[0, 1\] but spans"):
            load_image(torch.full((8, 6, 3), value))


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.full((8, 6, 3), float("nan")), "NaN"),
        (torch.full((8, 6, 3), float("inf")), "infinite"),
        (torch.full((8, 6, 3), 128.0), r"values in \[0, 1\] but spans 128"),
        (torch.full((8, 6, 3), -1.0), r"\[0, 1\]"),
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


def test_features_have_to_be_unit_vectors(tiny_clip):
    features = tiny_clip.encode_images([Image.effect_noise((20, 20), 80).convert("RGB")] * 2)
    options = SearchOptions(prompt_len=2, effort="fast", steps=1, swaps=1)
    good = invert(tiny_clip, features.to(torch.bfloat16), options)
    assert abs(good[0].similarity) <= 1.01
    for wrong in (features * 5, features * torch.tensor([[1], [0.9]]), features * 0, features / 0):
        with pytest.raises(ArgumentError, match="`images` has to hold unit vectors"):
            invert(tiny_clip, wrong, options)
