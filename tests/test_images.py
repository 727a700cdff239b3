"""Every kind of picture that people have either works as they expect or says what is wrong."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT
from PIL import Image

from pez_core import SearchOptions, explain, fuse, invert, prune, score, style
from pez_core.clip.images import load_image, load_images, trim_to_centre
from pez_core.errors import ArgumentError
from pez_core.targets import encode_targets
from pez_core.tasks.style import style_target

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
        load_images([torch.rand(8, 6, 3), torch.zeros(8, 6, 2), torch.rand(8, 6, 3)])


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


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.int32, np.int64])
def test_integers_of_other_types_are_pixels_of_8_or_16_bits(kind):
    array = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    array[0, 0] = 255
    deep = array.astype(np.uint16) * 257  # the same picture in 16 bits
    expected = load_image(array).tobytes()
    if kind is not np.uint16:  # whose values have 16 bits always
        for given in (array.astype(kind), torch.from_numpy(array.astype(kind))):
            assert load_image(given).tobytes() == expected
    if kind is not np.int16:
        assert load_image(deep.astype(kind)).tobytes() == expected
    mask = (array > 127).astype(kind)
    if kind is not np.uint16:
        assert load_image(mask).tobytes() == load_image(array > 127).tobytes()
    if kind is np.int64:
        with pytest.raises(ValueError, match=r"spans 0 to 2e\+05"):
            load_image(mask * 200_000)


def test_a_tensor_of_two_dimensions_is_a_grey_picture_or_features(tiny_clip):
    options = SearchOptions(prompt_len=2, effort="fast", steps=1, swaps=1)
    mask = torch.zeros(20, 30)
    mask[:, :9] = 1
    expected = invert(tiny_clip, mask[..., None], options)[0]
    for given in (mask, mask.bool(), mask.byte() * 255, mask.numpy()):
        assert [one.prompt for one in invert(tiny_clip, given, options)] == [expected.prompt]
    with pytest.raises(ArgumentError, match=r"features of .* numbers; .*\[\.\.\., None\]"):
        invert(tiny_clip, mask - 0.1, options)
    as_wide_as_features = mask[:, : tiny_clip.feature_size]
    expected = invert(tiny_clip, as_wide_as_features[..., None], options)[0]
    assert invert(tiny_clip, as_wide_as_features, options)[0].prompt == expected.prompt
    feature = torch.eye(tiny_clip.feature_size)[:2]  # without a negative value
    assert len(invert(tiny_clip, feature, options)) == 2


def test_values_beyond_the_range_by_bicubic_upscaling_are_clamped():
    # the pattern of the kernel's own signs, whose extremes are those of all images
    hard = torch.zeros(1, 3, 8, 8)
    hard[..., [1, 2, 1, 2], [1, 1, 2, 2]] = hard[..., [0, 3, 0, 3], [0, 0, 3, 3]] = 1
    hard = torch.cat([hard, 1 - hard], 3)
    large = torch.nn.functional.interpolate(hard, scale_factor=20, mode="bicubic")[0]
    assert large.min() < -0.43 and large.max() > 1.43
    expected = load_image(large.clamp(0, 1))
    assert load_image(large).tobytes() == expected.tobytes()
    for value in (-0.6, 1.6):
        with pytest.raises(ValueError, match=r"values in \[0, 1\] but spans"):
            load_image(torch.full((8, 6, 3), value))


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.full((8, 6, 3), float("nan")), "NaN"),
        (torch.full((8, 6, 3), float("inf")), "infinite"),
        (torch.full((8, 6, 3), 128.0), r"values in \[0, 1\] but spans 128"),
        (torch.full((8, 6, 3), -1.0), r"\[0, 1\]"),
        (torch.zeros(8), r"shape \(8,\)"),
        (torch.zeros(5, 8, 6), r"shape \(5, 8, 6\); write images\[\.\.\., None\]"),
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


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_a_grey_array_of_two_dimensions_is_a_picture(kind):
    ramp = torch.arange(48).view(8, 6) * 5
    grey = ramp.byte() if kind == torch.uint8 else ramp / 255
    for given in (grey, grey.numpy()):
        (image,), single = load_images(given)
        assert single and image.mode == "RGB"
        assert np.array_equal(np.asarray(image), ramp[..., None].expand(8, 6, 3).numpy())


def test_the_content_of_a_file_is_an_image(save, tiny_clip):
    path = save(Image.fromarray(_ramp(30, 20)), "a.png")
    expected = load_image(path).tobytes()
    content = path.read_bytes()
    with path.open("rb") as file:
        for given in (content, bytearray(content), memoryview(content), io.BytesIO(content), file):
            (image,), single = load_images(given)
            assert single and image.tobytes() == expected
    pictures, single = load_images([content, path, io.BytesIO(content)])
    assert not single and {one.tobytes() for one in pictures} == {expected}
    features = encode_targets("targets", tiny_clip, [content, io.BytesIO(content)])
    torch.testing.assert_close(features, tiny_clip.encode_images(pictures[:2]))


def test_content_that_is_no_image_is_named(save, tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    for given, message in (
        (b"no picture", "the content of a file, which is not an image"),
        (b"", "the content of a file, which is an empty file"),
        ((tmp_path / "a.txt").open("rb"), r"a.txt', which is not an image"),
        ((tmp_path / "a.txt").open(), r"a.txt', which is opened as text; open it with mode 'rb'"),
        (io.BytesIO(), "a file object, which is an empty file"),
    ):
        with pytest.raises(ArgumentError, match=message):
            load_image(given)
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ArgumentError, match=r"a file object, which cannot be read \(.*closed"):
        load_image(closed)


def test_a_path_may_begin_with_the_home_of_the_user(save, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save(Image.new("RGB", (30, 20), RED), "a.png")
    for path in ("~/a.png", Path("~/a.png")):
        assert load_image(path).size == (30, 20)
    monkeypatch.chdir(tmp_path)
    save(Image.new("RGB", (3, 2), RED), "~b.png")
    assert load_image("~b.png").size == (3, 2)
    with pytest.raises(ArgumentError, match=r"missing.png', which does not exist"):
        load_image("~/missing.png")


@pytest.mark.slow
def test_images_of_16k_are_read(save, monkeypatch):
    """Pillow itself refuses them; a limit that somebody has set stays."""
    path = save(Image.new("1", (16384, 16384)), "a.png")
    before = Image.MAX_IMAGE_PIXELS
    assert load_image(path).size == (2048, 2048)
    assert before == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before - 1)
    with pytest.raises(ArgumentError, match="too large"):
        load_image(path)
    bomb = save(Image.new("1", (33000, 17000)), "b.png")
    monkeypatch.undo()
    with pytest.raises(ArgumentError, match="too large"):
        load_image(bomb)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_a_large_tensor_needs_little_memory_beside_itself(kind):
    """The peak of the process, as bytes per pixel."""
    script = f"""
import resource, torch
from pez_core.clip.images import load_image
load_image(torch.zeros(4200, 4200, 3))
tensor = torch.ones(6000, 6000, 3, dtype=torch.{kind})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert load_image(tensor).getpixel((7, 2000)) == ((255,) * 3 if {kind!r} == "float32" else (1,) * 3)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / 6000**2)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert not run.returncode, run.stderr
    assert float(run.stdout) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_large_array_is_scaled_down_as_a_file_of_it_is(save, channels):
    pixels = np.concatenate([_ramp(4300, 4200), _ramp(4300, 4200)[::-1, :, :1]], 2)[..., :channels]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    expected = load_image(save(image, "a.png")).tobytes()
    for array in (pixels, torch.from_numpy(pixels).float() / 255):
        assert load_image(array).tobytes() == expected


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (40, 40)])
def test_fit(tiny_clip, size):
    """Against the squares that Pillow makes."""
    image = Image.fromarray(_ramp(*size))
    mean = tuple(round(255 * m) for m in tiny_clip.model.visual.preprocess_cfg["mean"])
    long, short = max(size), min(size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2
    padded = Image.new("RGB", (long, long), mean)
    padded.paste(image, ((long - size[0]) // 2, (long - size[1]) // 2))
    squares = {
        "crop": image.crop((left, top, left + short, top + short)),
        "pad": padded,
        "stretch": image.resize((short, short), Image.Resampling.BICUBIC),
    }
    for fit, square in squares.items():
        features = tiny_clip.encode_images([image], fit)
        assert (features * tiny_clip.encode_images([square])).sum() > 0.99, fit
    different = {tuple(tiny_clip.encode_images([image], fit)[0].tolist()) for fit in squares}
    assert len(different) == (1 if long == short else 3)
    assert torch.equal(tiny_clip.encode_images([image], "crop"), tiny_clip.encode_images([image]))


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30), (1, 20_000)])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_extreme_sizes_fit(tiny_clip, size, fit):
    features = tiny_clip.encode_images([load_image(Image.new("RGB", size, RED))], fit)
    assert features.isfinite().all()


def _portrait():
    """Its top and its bottom, which a crop leaves out, are bright."""
    picture = Image.new("RGB", (40, 120), (10, 20, 200))
    picture.paste((255, 230, 0), (0, 0, 40, 40))
    picture.paste((255, 0, 0), (0, 80, 40, 120))
    return picture


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_every_task_reads_its_images_alike(emoji_clip, fit):
    """Similarities are with the feature that the image has with this `fit`."""
    picture, fish = _portrait(), load_image(EXAMPLES[0])
    goal, other = emoji_clip.encode_images([picture, fish], fit)
    options = SearchOptions(prompt_len=2, effort="fast", steps=2, swaps=2, fit=fit)

    def cosine(text, target):
        return float(emoji_clip.encode_texts([text])[0] @ target)

    (found,) = invert(emoji_clip, picture, options)
    assert found.similarity == pytest.approx(cosine(found.prompt, goal), abs=1e-4)
    (away,) = invert(emoji_clip, fish, options, avoid=picture)
    assert away.avoided == pytest.approx([cosine(away.prompt, goal)], abs=1e-4)
    mixed = fuse(emoji_clip, [picture, "a dog"], options)
    assert mixed.similarities[0] == pytest.approx(cosine(mixed.prompt, goal), abs=1e-4)
    styled = style(emoji_clip, [picture, fish], options, keep_content=True)
    mean = (goal + other) / 2
    assert styled.similarity == pytest.approx(cosine(styled.prompt, mean), abs=1e-4)
    scores = score(emoji_clip, "a red fish", picture, judge=emoji_clip, fit=fit)
    expected = pytest.approx(cosine("a red fish", goal), abs=1e-4)
    assert scores.similarity.item() == scores.judge.item() == expected
    assert prune(emoji_clip, "a red fish", picture, fit=fit).similarity_before == expected
    whole = cosine("red fish", goal) - cosine("fish", goal)
    (red, _) = explain(emoji_clip, "red fish", picture, fit)
    assert red.contribution == pytest.approx(whole, abs=1e-4)


def test_a_style_without_content_reads_its_images_alike(emoji_clip):
    pictures = [_portrait(), _portrait().transpose(Image.Transpose.ROTATE_180)]
    targets = {fit: style_target(emoji_clip, pictures, fit=fit) for fit in ("crop", "stretch")}
    squares = [one.resize((40, 40), Image.Resampling.BICUBIC) for one in pictures]
    expected = style_target(emoji_clip, squares)
    near, far = (float(targets[fit].direction @ expected.direction) for fit in ("stretch", "crop"))
    assert near > 0.95 > far + 0.1


def test_an_unknown_fit_is_named(tiny_clip):
    for call in (
        lambda: SearchOptions(fit="squash"),
        lambda: score(tiny_clip, "a", _portrait(), fit="squash"),
        lambda: explain(tiny_clip, "a", _portrait(), fit=None),
    ):
        with pytest.raises(ArgumentError, match=r"`fit` has to be one of 'crop', 'pad', 'stretch'"):
            call()


def test_features_have_to_be_unit_vectors(tiny_clip):
    features = tiny_clip.encode_images([Image.effect_noise((20, 20), 80).convert("RGB")] * 2)
    options = SearchOptions(prompt_len=2, effort="fast", steps=1, swaps=1)
    good = invert(tiny_clip, features.to(torch.bfloat16), options)
    assert abs(good[0].similarity) <= 1.01
    for wrong in (features * 5, features * torch.tensor([[1], [0.9]]), features * 0, features / 0):
        with pytest.raises(ArgumentError, match="`images` has to hold unit vectors"):
            invert(tiny_clip, wrong, options)
