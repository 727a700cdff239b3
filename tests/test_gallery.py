"""Pages of prompts, their images and their targets."""

import base64
import inspect
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_diffusion import stable_diffusion

from pez_core import ArgumentError
from pez_core.clip.images import load_image
from pez_core.diffusion import Gallery, GalleryError, PezClipModel, make_gallery
from pez_core.diffusion.page import Entry, Similarities, Target
from pez_core.diffusion.sheet import CELL, GAP, MARGIN, draw_sheet

FISH, GLASSES = (ROOT / "examples" / f"noto-{name}.png" for name in ("fish", "glasses"))
PROMPTS = ["a blue fish", "red glasses and a hat"]
QUICK = {"num_images_per_prompt": 2, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def sd():
    return stable_diffusion()


class Reader(HTMLParser):
    """The tags, addresses, and text of a page; fails where a tag is closed out of order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.sources, self.texts, self._open = [], [], [], []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def gallery_of(prompt="a dog", target="a text", name="", images=1, title=""):
    picture = Image.new("RGB", (8, 8), "red")
    scores = [Similarities("searched", 0.5, [0.25] * images)]
    entry = Entry(prompt, [Target(target, name)], [picture] * images, scores, title)
    return Gallery([entry], list(range(7, 7 + images)), {"images by": "a pipeline"})


@pytest.mark.parametrize("wrap", [lambda clip: clip, PezClipModel.from_clip])
def test_the_numbers_are_those_made_by_hand(sd, emoji_clip, vit_clip, wrap):
    found = make_gallery(sd, PROMPTS, [FISH, GLASSES], wrap(emoji_clip), vit_clip, seed=5, **QUICK)
    assert found.seeds == [5, 6]
    for entry, prompt, target in zip(found.entries, PROMPTS, (FISH, GLASSES), strict=True):
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        pictures = sd(
            prompt,
            num_images_per_prompt=2,
            num_inference_steps=2,
            guidance_scale=9.0,
            generator=generators,
        ).images
        assert entry.prompt == prompt and entry.targets[0].name == str(target)
        for ours, theirs in zip(entry.images, pictures, strict=True):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        for clip, scores in zip((emoji_clip, vit_clip), entry.similarities, strict=True):
            (goal,) = clip.encode_images([load_image(target)])
            assert scores.clip == clip.name
            text = F.cosine_similarity(clip.encode_texts([prompt]), goal[None])
            assert scores.prompt == pytest.approx(text.item(), abs=1e-5)
            expected = F.cosine_similarity(clip.encode_images(pictures), goal[None]).tolist()
            assert scores.images == pytest.approx(expected, abs=1e-5)
            assert scores.mean == pytest.approx(sum(expected) / 2, abs=1e-5)


def test_several_targets_of_both_kinds_have_weights(sd, emoji_clip):
    targets = ["a red car", load_image(FISH)]
    found = make_gallery(sd, "a fish", [targets], emoji_clip, weights=[3, 1], **QUICK)
    same = make_gallery(sd, "a fish", targets, emoji_clip, weights=[3, 1], **QUICK)
    (scores,) = found.entries[0].similarities
    (prompt,) = emoji_clip.encode_texts(["a fish"])
    text = emoji_clip.encode_texts(["a red car"])[0] @ prompt
    image = emoji_clip.encode_images([load_image(FISH)])[0] @ prompt
    assert scores.prompt == pytest.approx((3 * text + image).item() / 4, abs=1e-5)
    assert same.entries[0].similarities == found.entries[0].similarities


def test_settings_reach_the_pipeline_and_the_page(sd, emoji_clip, tmp_path):
    given = QUICK | {"guidance_scale": 2.5, "height": 32, "width": 32}
    found = make_gallery(sd, "a dog", "a dog", emoji_clip, **given)
    assert found.entries[0].images[0].size == (32, 32)
    assert found.facts["guidance scale"] == "2.5" and found.facts["num inference steps"] == "2"
    assert "guidance scale: 2.5" in found.save(tmp_path).read_text()


def test_syntax_that_diffusers_lacks_is_not_drawn(emoji_clip):
    drawn = []

    class Recorder(DiffusionPipeline):
        def __call__(self, prompt: list[str]):
            drawn.append(prompt)
            return ([Image.new("RGB", (8, 8)) for _ in prompt],)

    found = make_gallery(
        Recorder(), "a (red:1.2) dog <lora:x:1>", "a dog", emoji_clip, num_images_per_prompt=3
    )
    assert drawn == [["a red dog"] * 3] and len(found.entries[0].images) == 3
    assert found.entries[0].prompt == "a (red:1.2) dog <lora:x:1>"


def test_progress_is_reported_and_ends_the_work(sd, emoji_clip):
    reported = []

    def report(done, count):
        reported.append(done)
        return done >= 1.5

    found = make_gallery(
        sd, ["one", "two", "three"], ["a"] * 3, emoji_clip, callback=report, **QUICK
    )
    assert reported == [0, 0.5, 1, 1, 1.5]
    assert [len(entry.images) for entry in found.entries] == [2, 0, 0]
    assert all(entry.similarities[0].prompt for entry in found.entries)
    none = make_gallery(sd, "one", "a", emoji_clip, callback=lambda done, count: True, **QUICK)
    assert none.entries[0].images == []


def test_a_failure_keeps_what_was_made(sd, emoji_clip, monkeypatch):
    call = type(sd).__call__

    def failing(self, prompt, **options):
        if prompt == "two":
            raise RuntimeError("out of memory")
        return call(self, prompt, **options)

    failing.__signature__ = inspect.signature(call)
    monkeypatch.setattr(type(sd), "__call__", failing)
    with pytest.raises(GalleryError, match=r"prompt 2 of 3, 'two', failed \(out") as caught:
        make_gallery(sd, ["one", "two", "three"], ["a"] * 3, emoji_clip, **QUICK)
    assert [len(entry.images) for entry in caught.value.partial.entries] == [2, 0, 0]


def test_the_page_is_one_file_that_loads_nothing(sd, emoji_clip, vit_clip, tmp_path):
    found = make_gallery(sd, PROMPTS, [FISH, "glasses"], emoji_clip, vit_clip, seed=3, **QUICK)
    path = found.save(tmp_path / "a" / "page")
    page = path.read_text()
    assert path.name == "index.html" and (path.parent / "sheet.png").exists()
    reader = Reader(page)
    assert "script" not in reader.tags and "link" not in reader.tags
    assert len(reader.sources) == 1 + 4 and all(s.startswith("data:") for s in reader.sources)
    assert not re.findall(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    pictures = [found.entries[0].targets[0].shown]
    pictures += [image for entry in found.entries for image in entry.images]
    for source, expected in zip(reader.sources, pictures, strict=True):
        shown = Image.open(BytesIO(base64.b64decode(source.partition(",")[2])))
        assert np.array_equal(np.asarray(shown), np.asarray(expected))
    text = " ".join(reader.texts)
    assert "target noto-fish.png" in text and str(FISH) not in text
    for entry in found.entries:
        own, judge = entry.similarities
        assert f"emoji-clip: prompt {own.prompt:.3f}, images {own.mean:.3f}" in text
        assert f"{own.images[1]:.3f} · {judge.images[1]:.3f} · seed 4" in text
        assert entry.prompt in text


def test_large_targets_are_scaled_down_and_images_stay_whole(tmp_path):
    found = gallery_of(target=Image.new("RGB", (2000, 1000)))
    large = Entry("a", found.entries[0].targets, [Image.new("RGB", (1024, 1024))], [], "")
    found = Gallery([large], [0], {})
    sources = Reader(found.save(tmp_path).read_text()).sources
    sizes = [Image.open(BytesIO(base64.b64decode(s.partition(",")[2]))).size for s in sources]
    assert sizes[0] == (512, 256) and sizes[1:] in ([(1024, 1024)], [])


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "\"'><img src=x onerror=y>",
        "a & b < c",
        "東京 😂",
        "un\u00a0chat,\u3000👨\u200d👩",
        "\udcff\x00",
    ],
)
def test_texts_stay_texts(text, tmp_path):
    found = gallery_of(text, text, f"{text}.png", title=text)
    found.facts["searched on"] = text
    picture = gallery_of("plain", Image.new("RGB", (4, 4)), f"{text}.png")
    whole = Gallery([*found.entries, *picture.entries], [7], found.facts)
    reader = Reader(whole.save(tmp_path).read_text("utf-8"))
    assert reader.tags.count("img") == 3 and "script" not in reader.tags
    shown = text.replace("\x00", "").replace("\udcff", "\\udcff")
    assert "".join(reader.texts).count(shown) >= 4 if shown else True


def test_nothing_is_overwritten(tmp_path):
    path = gallery_of().save(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match=r"`folder` is .*, which has index\.html already"):
        gallery_of("another").save(tmp_path)
    path.unlink()
    with pytest.raises(ArgumentError, match=r"has sheet\.png already"):
        gallery_of().save(tmp_path)
    assert before
    with pytest.raises(ArgumentError, match="which is a file"):
        gallery_of().save(tmp_path / "sheet.png")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="which is a file"):
        gallery_of().save(tmp_path / "link")


def test_a_page_without_images_says_so(tmp_path):
    text = gallery_of(images=0).save(tmp_path).read_text()
    assert "No images: the command ended before." in text and "images 0" not in text


def test_the_sheet_shows_targets_and_images_in_their_places():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    wide = Image.new("RGB", (20, 10), "lime")
    sheet = draw_sheet([([red], [blue, wide], "one"), ([red, "text"], [blue] * 7, "two " * 100)])
    left = MARGIN + CELL + 2 * GAP
    middle = CELL // 2
    assert sheet.getpixel((MARGIN + middle, MARGIN + middle)) == (255, 0, 0)
    assert sheet.getpixel((left + middle, MARGIN + middle)) == (0, 0, 255)
    second = left + CELL + GAP + middle
    assert sheet.getpixel((second, MARGIN + middle)) == (0, 255, 0)
    assert sheet.getpixel((second, MARGIN + CELL // 8)) == (255, 255, 255)  # keeps its shape
    assert sheet.width == left + 6 * (CELL + GAP) + MARGIN
    # the seventh image of the second row is below the first
    dark = np.asarray(sheet.convert("L"))[:, left + middle] == 29  # blue in grey
    assert dark.sum() == pytest.approx(3 * CELL, abs=6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": [1]}, "`prompts` has to be"),
        ({"targets": []}, "`targets` has to hold one entry"),
        ({"targets": [[], "a"]}, "`targets` holds an empty list"),
        ({"targets": ["", "a"]}, "`targets` holds an empty text"),
        ({"targets": [str(FISH), "a"]}, "name of an image file"),
        ({"targets": [FISH.parent / "none.png", "a"]}, "`targets`"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        ({"seed": -1}, "`seed`"),
        ({"weights": [1, 2]}, "`weights`"),
        ({"prompts": 3}, "`prompts` has to hold strings"),
        ({"titles": ["a", "b", "c"]}, "`titles` has to hold at most one for each of 2"),
        ({"titles": None}, "`titles` has to hold"),
        ({"titles": [3]}, "`titles` has to be a string but is 3"),
        ({"fit": "squeeze"}, "`fit` has to be one of"),
        ({"generator": None}, "`generator` is made from `seed`"),
        ({"latents": None}, "`latents` is made from `seed`"),
        ({"callback_on_step_end": print}, "`callback_on_step_end` is made from"),
        ({"callback": 3}, "`callback` has to be a function"),
        ({"clip": "emoji-clip"}, "`clip` has to be a CLIP"),
        ({"judge": 3}, "`judge` has to be a CLIP"),
        ({"height": -64, "width": 64}, "`height` has to be at least 1"),
        ({"colour": "red"}, "`colour` is no argument of StableDiffusionPipeline"),
    ],
)
def test_wrong_arguments_are_named(sd, emoji_clip, arguments, message):
    given = {"prompts": PROMPTS, "targets": ["a", "b"], "clip": emoji_clip} | QUICK
    with pytest.raises(ArgumentError, match=message):
        make_gallery(sd, **given | arguments)


def test_a_height_alone_has_an_effect(sd, emoji_clip):
    gallery = make_gallery(sd, "a", "b", emoji_clip, height=32, **QUICK)
    assert {image.size for image in gallery.entries[0].images} == {(64, 32)}


def test_the_judge_has_to_be_another_clip(sd, emoji_clip):
    with pytest.raises(ArgumentError, match="`judge` is emoji-clip"):
        make_gallery(sd, "a", "b", emoji_clip, emoji_clip, **QUICK)
